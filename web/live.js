// Attention while it forms: the maps that a running node sends, drawn in the node.

import { HEAT } from "./heat.js"
import { app, api, ask, attach, locate, make } from "./shared.js"

const SETTING = "Attune.LiveMaps"
// Okabe and Ito's colours, as in the nodes' own pictures; the first is the background.
const COLOURS = [[60, 60, 60], [230, 159, 0], [87, 181, 232], [0, 158, 115], [240, 227, 66], [0, 115, 178], [214, 94, 0], [204, 120, 166]]
const views = new WeakMap()

const label = (n) => COLOURS[n === 0 ? 0 : ((n - 1) % (COLOURS.length - 1)) + 1]
const enabled = () => app.extensionManager?.setting?.get(SETTING) ?? app.ui.settings.getSettingValue(SETTING) ?? true

class View {
  constructor(node) {
    this.status = make("div", { className: "attune-status" })
    this.parts = {}
    this.body = make("div", { className: "attune-scroll attune-maps" })
    this.root = make("div", { className: "attune attune-live", role: "img", "aria-label": "Attention maps of the running step" }, this.body, this.status)
    this.widget = attach(node, "attention", this.root, { height: 150 })
  }

  clear() {
    this.parts = {}
    this.body.replaceChildren()
    this.status.textContent = ""
  }

  async show(data) {
    const image = new Image()
    image.src = `data:image/png;base64,${data.image}`
    await image.decode()
    const [width, height] = data.size
    const sheet = make("canvas", { width, height: image.height })
    const context = sheet.getContext("2d", { willReadFrequently: true })
    context.drawImage(image, 0, 0)
    const pixels = context.getImageData(0, 0, width, image.height)
    const colours = data.kind === "regions" ? label : data.kind === "masks" ? (v) => [v, v, v] : (v) => HEAT[v]
    for (let i = 0; i < pixels.data.length; i += 4) {
      const [r, g, b] = colours(pixels.data[i])
      pixels.data[i] = r
      pixels.data[i + 1] = g
      pixels.data[i + 2] = b
    }
    const part = (this.parts[data.kind] ??= this.body.appendChild(make("div")))
    const names = data.kind === "regions" ? [""] : data.names
    while (part.children.length > names.length) part.lastChild.remove()
    names.forEach((name, n) => {
      const figure = part.children[n] ?? part.appendChild(make("figure", {}, make("canvas"), make("figcaption")))
      const [canvas, caption] = figure.children
      canvas.width = width
      canvas.height = height
      canvas.getContext("2d").putImageData(pixels, 0, -n * height, 0, n * height, width, height)
      if (data.kind === "regions") {
        caption.className = "attune-legend"
        caption.replaceChildren(...data.names.map((text, k) => make("span", {}, swatch(k + 1), text)))
      } else {
        caption.textContent = caption.title = name
      }
    })
    this.status.textContent = data.steps ? `step ${data.step} of ${data.steps}` : ""
    this.root.dataset.step = data.step
  }
}

function swatch(n) {
  const square = make("i")
  square.style.background = `rgb(${label(n).join(",")})`
  return square
}

let client = null
/** Tell the server whether this editor wants maps; it sends none unless told so. */
async function wish(on = enabled()) {
  if (!api.clientId) return setTimeout(wish, 300)
  client = api.clientId
  try {
    await ask("live", { client, on })
  } catch {
    // an older server, or none: then there are no maps
  }
}

app.registerExtension({
  name: "Attune.Live",
  settings: [
    {
      id: SETTING,
      name: "Show attention maps while sampling",
      tooltip: "Nodes of Attune that look at attention show it while it forms, up to four times a second. Off costs nothing at all.",
      category: ["Attune", "Live", "Maps"],
      type: "boolean",
      defaultValue: true,
      onChange: (value) => client && wish(value) // comes before the setting has its new value
    }
  ],
  setup() {
    wish()
    api.addEventListener("reconnected", () => wish())
    api.addEventListener("status", () => api.clientId && api.clientId !== client && wish())
    api.addEventListener("attune.maps", ({ detail }) => {
      const node = enabled() && locate(detail.node)
      if (!node || !node.comfyClass?.startsWith("Attune")) return
      if (!views.has(node)) views.set(node, new View(node))
      views.get(node).show(detail)
    })
    // what an earlier run has shown is not this one's
    api.addEventListener("attune.effect", ({ detail }) => detail?.missing && views.get(locate(detail.node))?.clear())
  }
})
