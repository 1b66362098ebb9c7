// Show Attention Maps after a run: a word under the pointer shows its heat over the picture, a place under it the words that the model saw there.

import { HEAT } from "./heat.js"
import { app, api, attach, make, told } from "./shared.js"

const NODE = "AttuneShowMaps"
const OUTPUT = "attune_maps"
const WIDTH = 360
const KEPT = 16 // runs that are asked for
const [MOST_NAMES, MOST_PICTURES, SIDE, LISTED] = [64, 64, 64, 5]
const views = new WeakMap()

/** What a run has told, if it is what it should be; null otherwise. */
function checked(data) {
  const whole = (n, most) => Number.isInteger(n) && n > 0 && n <= most
  const text = (t) => typeof t === "string" && /^[A-Za-z0-9+/]+=*$/.test(t)
  const { names, chosen, size, total, pictures } = data ?? {}
  const fine =
    Array.isArray(names) && whole(names.length, MOST_NAMES) && names.every((name) => typeof name === "string") && whole(chosen, names.length) &&
    Array.isArray(size) && size.length === 2 && size.every((n) => whole(n, SIDE)) &&
    Array.isArray(pictures) && whole(pictures.length, MOST_PICTURES) && whole(total, 1e6) &&
    pictures.every((p) => text(p?.picture) && text(p.maps) && p.ranges?.length === names.length && p.ranges.every((r) => r?.length === 2 && r.every(Number.isFinite)))
  return fine ? data : null
}

async function decoded(kind, text) {
  const image = new Image()
  image.src = `data:image/${kind};base64,${text}`
  await image.decode()
  return image
}

class View {
  constructor(node) {
    this.node = node
    this.canvas = make("canvas", { tabIndex: 0, role: "img", onpointermove: (e) => this.point(e), onpointerleave: () => this.at(null), onkeydown: (e) => this.key(e), onblur: () => this.at(null) })
    this.list = make("ol", { className: "attune-shares", "aria-live": "polite" })
    this.chips = make("div", { className: "attune-chips attune-scroll", role: "group", "aria-label": "Words" })
    const step = (by) => make("button", { type: "button", textContent: by < 0 ? "‹" : "›", "aria-label": by < 0 ? "Picture before" : "Next picture", onclick: () => this.turn(by) })
    this.which = make("span", { className: "attune-quiet" })
    this.bar = make("div", { className: "attune-bar" }, step(-1), this.which, step(1))
    this.root = make("div", { className: "attune attune-explain" }, this.bar, make("div", { className: "attune-explained" }, this.canvas, this.list), this.chips)
    this.widget = attach(node, "explain", this.root, { height: 290 })
    this.number = 0
  }

  async show(data) {
    this.data = data
    this.number = Math.min(this.number, data.pictures.length - 1)
    this.held = this.over = this.place = null
    this.buttons = data.names.map((name, n) =>
      make("button", {
        type: "button", className: `attune-chip${n < data.chosen ? " auto" : ""}`, textContent: name, "aria-pressed": "false",
        onpointerenter: () => this.word(n), onpointerleave: () => this.word(null), onfocus: () => this.word(n), onblur: () => this.word(null),
        onclick: () => this.hold(n)
      })
    )
    this.chips.replaceChildren(...this.buttons)
    await this.load()
  }

  /** The picture that is looked at, with the values of its words' maps. */
  async load() {
    const { data, number } = this
    const { picture, maps, ranges } = data.pictures[number]
    const [image, sheet] = await Promise.all([decoded("jpeg", picture), decoded("png", maps)])
    const [width, height] = data.size
    if (sheet.width !== width || sheet.height !== height * ranges.length) throw new Error("the maps have another size")
    if (this.data !== data || this.number !== number) return // something else is shown by now
    const context = make("canvas", { width, height: sheet.height }).getContext("2d", { willReadFrequently: true })
    context.drawImage(sheet, 0, 0)
    const { data: pixels } = context.getImageData(0, 0, width, sheet.height)
    this.image = image
    this.tiles = ranges.map((_, n) => Uint8Array.from({ length: width * height }, (_, i) => pixels[4 * (n * width * height + i)]))
    this.heats = this.tiles.map((tile) => {
      const heat = make("canvas", { width, height })
      const painted = new ImageData(width, height)
      tile.forEach((v, i) => painted.data.set([...HEAT[v], 255], 4 * i))
      heat.getContext("2d").putImageData(painted, 0, 0)
      return heat
    })
    const { total, pictures } = data
    this.which.textContent = `picture ${number + 1} of ${pictures.length}${total > pictures.length ? ` (the first of ${total})` : ""}`
    this.bar.style.display = pictures.length > 1 ? "" : "none"
    this.canvas.width = image.width
    this.canvas.height = image.height
    this.draw()
  }

  turn(by) {
    const count = this.data.pictures.length
    this.number = (this.number + by + count) % count
    this.load().catch(() => {})
  }

  word(n) {
    this.over = n
    this.draw()
  }

  /** Keep a word's heat when the pointer leaves it, or no longer. */
  hold(n) {
    this.held = this.held === n ? null : n
    this.buttons.forEach((button, i) => button.setAttribute("aria-pressed", i === this.held))
    this.draw()
  }

  point(event) {
    const { canvas } = this
    const box = canvas.getBoundingClientRect()
    const scale = Math.min(box.width / canvas.width, box.height / canvas.height) // all of the picture is in the box, at its left top
    const at = [(event.clientX - box.x) / scale / canvas.width, (event.clientY - box.y) / scale / canvas.height]
    this.at(at.every((n) => n >= 0 && n < 1) ? at : null)
  }

  /** A place, as parts of the picture's width and height. */
  at(place) {
    this.place = place
    this.draw()
  }

  key(event) {
    const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key]
    if (!by || !this.data) return
    event.preventDefault()
    const cell = (n) => (Math.floor((this.place?.[n] ?? 0.5) * this.data.size[n]) + 0.5 + by[n]) / this.data.size[n]
    this.at([0, 1].map((n) => Math.min(0.9999, Math.max(0, cell(n)))))
  }

  /** The words' shares at a place, the largest first. */
  shares(place) {
    const [width, height] = this.data.size
    const i = Math.floor(place[1] * height) * width + Math.floor(place[0] * width)
    const values = this.data.pictures[this.number].ranges.map(([low, high], n) => low + ((high - low) * this.tiles[n][i]) / 255)
    const all = values.reduce((a, b) => a + b, 0) || 1
    return values.map((value, n) => ({ n, share: value / all })).sort((a, b) => b.share - a.share || a.n - b.n)
  }

  draw() {
    if (!this.image) return
    const { canvas, place } = this
    const context = canvas.getContext("2d")
    context.globalAlpha = 1
    context.drawImage(this.image, 0, 0)
    const word = this.over ?? this.held
    if (word !== null) {
      context.globalAlpha = 0.6
      context.imageSmoothingEnabled = true
      context.drawImage(this.heats[word], 0, 0, canvas.width, canvas.height)
    }
    canvas.setAttribute("aria-label", word === null ? "The picture" : `Heat of ${this.data.names[word]} over the picture`)
    if (place) {
      context.globalAlpha = 1
      const [x, y, radius] = [place[0] * canvas.width, place[1] * canvas.height, canvas.width / 40]
      for (const [width, colour] of [[3, "#000"], [1.5, "#fff"]]) {
        context.beginPath()
        context.arc(x, y, radius, 0, 2 * Math.PI)
        context.lineWidth = (width * canvas.width) / 200
        context.strokeStyle = colour
        context.stroke()
      }
    }
    if (!place) return this.list.replaceChildren(make("li", { className: "attune-quiet" }, "Point at a place to see which words the model saw there, or at a word to see where."))
    this.list.replaceChildren(
      ...this.shares(place).slice(0, LISTED).map(({ n, share }) => {
        const row = make("li", {}, make("span", { textContent: this.data.names[n] }), make("b", { textContent: `${Math.round(100 * share)} %` }))
        row.style.setProperty("--share", `${100 * share}%`)
        return row
      })
    )
  }
}

function explain(node, output) {
  const data = node?.comfyClass === NODE && checked(output)
  if (!data) return
  if (!views.has(node)) views.set(node, new View(node))
  views.get(node).show(data).catch((error) => console.warn("Attune: attention maps that cannot be shown:", error.message))
}

/** A node and all that it depends on, as a text: equal ones make equal outputs. */
function lineage(prompt, id, seen = {}) {
  if (!prompt?.[id] || id in seen) return JSON.stringify(seen)
  seen[id] = [prompt[id].class_type, prompt[id].inputs]
  for (const value of Object.values(prompt[id].inputs)) if (Array.isArray(value)) lineage(prompt, value[0], seen)
  return JSON.stringify(seen)
}

/** What the server still has of the picture that is there: after a reload of the page, and where a run had nothing to do. */
async function restore(number) {
  const waiting = app.graph?.nodes.filter((node) => node.comfyClass === NODE && !views.has(node)) ?? []
  const answer = waiting.length && (await api.fetchApi(`/history?max_items=${KEPT}`).catch(() => null))
  const runs = answer?.ok ? Object.values(await answer.json()).reverse() : []
  const last = runs.find(({ prompt }) => (number ? prompt?.[1] === number : prompt?.[3]?.extra_pnginfo?.workflow?.id === app.graph.id))
  const now = last?.prompt[2] ?? (runs.length && (await app.graphToPrompt()).output)
  for (const node of waiting) {
    const same = (run) => run.outputs?.[node.id]?.[OUTPUT] && lineage(run.prompt?.[2], node.id) === lineage(now, node.id)
    const run = runs.find(same)
    if (run && !views.has(node)) explain(node, run.outputs[node.id][OUTPUT][0])
  }
}

told(OUTPUT, explain)

app.registerExtension({
  name: "Attune.Explain",
  setup: () => api.addEventListener("execution_success", ({ detail }) => setTimeout(() => restore(detail?.prompt_id), 300)),
  afterConfigureGraph: () => void setTimeout(() => restore(), 300),
  nodeCreated(node) {
    if (node.comfyClass === NODE) node.setSize([Math.max(WIDTH, node.size[0]), node.size[1]]) // a saved size comes after this
  }
})
