// The head picker of Select Heads: layers × heads, two-way with the text of `selection`, which stays the truth.

import { app, api, ask, attach, colour, isLinked, low, make, origin, saved, told, wholeRows, widgetOf, write } from "./shared.js"
import { read, text } from "./selection.js"

const NODE = "AttuneHeads"
const PRESETS = { sd15: "SD1.5", sdxl: "SDXL", sd3: "SD3 medium", flux: "FLUX.1", flux2: "FLUX.2 dev", flux2_klein: "FLUX.2 klein 4B", qwen_image: "Qwen-Image", qwen_image21: "Qwen-Image 2.1", z_image: "Z-Image", krea2: "Krea 2", chroma: "Chroma", lumina2: "Lumina 2", anima: "Anima", cosmos_predict2: "Cosmos Predict 2", wan: "Wan 14B", demo: "Demo model" }
const LOADERS = { ckpt_name: "checkpoints", unet_name: "diffusion_models" }
const AUTO = "auto" // written: the layer that SoftPAG takes by itself, whatever the model
const OWN = "selection" // not a preset: what is written
const TALL = 250 // pixels of the grid in Nodes 2.0, at most
const LABELS = 58
const HEADER = 13
const known = new Map() // what is asked of the server, to its promise
let heat = [] // scores that nodes have told: { title, sites }
const pickers = new WeakMap()

function layoutOf(question) {
  const key = JSON.stringify(question)
  if (!known.has(key)) {
    known.set(
      key,
      ask("layout", question).catch((error) => {
        known.delete(key)
        throw error
      })
    )
  }
  return known.get(key)
}

/** What to ask the server for the model that is connected; null without one, undefined where only a run can tell. */
function connected(node) {
  let here = node
  for (let hops = 0; hops < 100; hops++) {
    const name = here === node ? "model" : here.inputs?.find((slot) => slot.type === "MODEL" && slot.link != null)?.name
    const found = name && origin(here, name)
    if (!found) return here === node ? null : undefined
    here = found.node
    if (here.comfyClass === "AttuneDemoModel") return { preset: "demo" }
    for (const [widget, folder] of Object.entries(LOADERS)) {
      const { value: file, options } = widgetOf(here, widget) ?? {}
      if (file) return options?.values?.includes?.(file) === false ? { missing: file } : { folder, file }
    }
  }
  return undefined
}

const isScore = (score) => score !== undefined && score !== null

/** Blue over grey to yellow, for scores from 0 to 1; told apart by colour-blind eyes. */
function warm(t) {
  const stops = [[0, 32, 76], [59, 73, 108], [112, 113, 115], [166, 157, 117], [225, 204, 85], [255, 234, 70]]
  const at = Math.min(0.9999, Math.max(0, t)) * (stops.length - 1)
  const [a, b] = [stops[Math.floor(at)], stops[Math.floor(at) + 1]]
  return `rgb(${a.map((v, i) => Math.round(v + (b[i] - v) * (at % 1))).join(",")})`
}

class Picker {
  constructor(node) {
    this.node = node
    this.layout = null
    this.chosen = []
    this.bad = []
    this.cursor = [0, 0]
    this.hover = null
    this.run = null // the layout that the last run has told, and for which model
    const button = (name, title, act) => make("button", { type: "button", textContent: name, title, onclick: act })
    this.source = make(
      "select",
      { "aria-label": "Model whose heads are shown", title: "Whose layers to show", onchange: () => this.choosePreset() },
      make("option", { value: "", textContent: "connected model" }),
      ...Object.entries(PRESETS).map(([value, name]) => make("option", { value, textContent: name }))
    )
    this.groups = make("span", { className: "attune-bar" })
    this.buttons = make(
      "span",
      { className: "attune-bar" },
      button("all", "Choose every head", () => this.apply(() => 1, true)),
      button("none", "Choose no head", () => this.apply(() => 0, true)),
      button("invert", "Swap chosen and other heads", () => this.apply((i, n) => 1 - this.chosen[i][n]))
    )
    this.preset = button("default", "The layer that SoftPAG takes by itself", () => this.choose(AUTO))
    this.colours = make("button", {
      type: "button",
      textContent: "colours",
      title: "Show the heads' scores as colours, or not",
      "aria-pressed": "true",
      onclick: () => {
        this.colours.setAttribute("aria-pressed", this.colours.getAttribute("aria-pressed") === "true" ? "false" : "true")
        this.refresh()
      }
    })
    this.buttons.append(this.preset, this.colours)
    this.canvas = make("canvas", {
      tabIndex: 0,
      role: "application",
      "aria-roledescription": "grid of attention heads",
      "aria-label": "Attention heads: arrow keys move, space chooses, shift and space a layer, control and space a head of all layers"
    })
    this.grid = make("div", { className: "attune-scroll attune-grid" }, this.canvas)
    this.status = make("div", { className: "attune-status" })
    this.speech = make("div", { className: "attune-hidden", "aria-live": "polite" })
    this.root = make(
      "div",
      { className: "attune attune-heads" },
      make("div", { className: "attune-bar" }, this.source, make("span", { className: "attune-space" }), this.buttons),
      this.groups,
      this.grid,
      this.status,
      this.speech
    )
    this.listen()
    const sizes = new ResizeObserver(() => this.draw())
    for (const element of [this.grid, this.root]) sizes.observe(element)
    low(node, "selection")
    attach(node, "picker", this.root, { height: 210, tick: () => this.tick() })
    const callback = widgetOf(node, "selection")?.callback
    if (widgetOf(node, "selection")) {
      widgetOf(node, "selection").callback = (...args) => {
        const result = callback?.apply(widgetOf(node, "selection"), args)
        this.refresh()
        return result
      }
    }
    this.tick()
  }

  // --- whose layers ---

  tick() {
    const preset = this.node.properties?.attune_preset ?? ""
    const question = preset ? { preset } : connected(this.node)
    const key = JSON.stringify(question ?? null)
    if (this.source.value !== preset) this.source.value = preset
    if (this.run && this.run.key !== key) this.run = null
    if (key !== this.key) {
      this.key = key
      this.find(question, key)
    }
    if (this.value() !== this.seen || this.named !== this.seenName || this.automatic !== this.seenAuto) this.refresh()
  }

  async find(question, key) {
    let layout = null
    this.untold = question === undefined // only a run can tell
    this.problem = question === null ? "Connect a model, or choose one above to see its heads." : ""
    try {
      if (question?.missing) this.problem = `“${question.missing}” is not on this machine; choose a model above to see its heads.`
      else if (question) layout = await layoutOf(question)
      else if (question === undefined) {
        layout = this.node.properties?.attune_layout ?? null
        this.problem = layout ? "" : "Run the workflow once to see this model's heads, or choose one above."
      }
    } catch (error) {
      this.problem = error.message
    }
    if (layout?.untold) {
      this.untold = true
      this.problem = layout.untold
      layout = this.node.properties?.attune_layout ?? null // what the last run has told
    }
    if (key === this.key) this.show(this.run?.layout ?? layout)
  }

  /** The layout that a run has told; it is the model's own, whatever the graph looks like. */
  tell(layout) {
    this.run = { key: this.key, layout }
    this.problem = ""
    if (!this.node.properties?.attune_preset && (this.untold || !this.layout)) {
      this.node.properties.attune_layout = layout // a loader that cannot be asked: known again after a reload
      saved(this.node)
    }
    if (!this.node.properties?.attune_preset) this.show(layout)
  }

  choosePreset() {
    if (this.source.value) this.node.properties.attune_preset = this.source.value
    else delete this.node.properties.attune_preset
    saved(this.node)
    this.tick()
  }

  show(layout) {
    this.layout = layout
    this.layers = layout?.layers ?? []
    this.most = Math.max(1, ...this.layers.map(([, heads]) => heads))
    this.cursor = [0, 0]
    const places = [...new Set(this.layers.map(([name]) => name.split(".")[0]))]
    this.groups.replaceChildren(
      ...places.map((place) =>
        make("button", {
          type: "button",
          textContent: place,
          title: `Choose all heads of the ${place} layers, or none`,
          onclick: () => {
            const mine = this.layers.flatMap(([name], i) => (name.startsWith(`${place}.`) ? [i] : []))
            const on = mine.every((i) => this.chosen[i].every(Boolean)) ? 0 : 1
            this.apply((i, n) => (mine.includes(i) ? on : this.chosen[i][n]))
          }
        })
      )
    )
    this.refresh()
    const first = this.chosen.findIndex((row) => row.some(Boolean))
    if (first >= 0 && this.m.rows[first] + this.m.high > this.grid.clientHeight) this.grid.scrollTop = this.m.rows[first] - HEADER
  }

  // --- the text, and what is chosen ---

  /** The chosen preset's name; nothing where the text says which heads. */
  get named() {
    const name = widgetOf(this.node, "preset")?.value
    return name && name !== OWN && !isLinked(this.node, "preset") ? name : ""
  }

  value() {
    if (this.named) return this.layout?.presets?.[this.named] ?? ""
    const written = widgetOf(this.node, "selection")?.value ?? ""
    return this.automatic ? (this.layout?.default ?? "") : written
  }

  get automatic() {
    return !this.named && widgetOf(this.node, "selection")?.value?.trim() === AUTO
  }

  get fixed() {
    return isLinked(this.node, "selection") || isLinked(this.node, "preset") || Boolean(this.named)
  }

  refresh() {
    this.seen = this.value()
    this.seenName = this.named
    this.seenAuto = this.automatic
    const { chosen, bad } = read(this.seen, this.layers ?? [])
    this.chosen = chosen
    this.bad = this.layout ? bad : []
    for (const button of this.root.querySelectorAll("button")) button.disabled = !this.layout || this.fixed
    this.colours.disabled = false
    this.colours.style.display = this.scores() ? "" : "none"
    this.draw()
    this.say()
  }

  commit() {
    if (this.fixed || !this.layout) return
    const kept = this.bad.map(({ item }) => item) // what another model may have is not thrown away
    write(this.node, "selection", [text(this.chosen, this.layers), ...kept].filter(Boolean).join(" "))
    this.refresh()
  }

  /** `whole`: what this model does not have goes too. */
  apply(value, whole = false) {
    if (this.fixed || !this.layout) return
    if (whole) this.bad = []
    this.chosen.forEach((row, i) => row.forEach((_, n) => (row[n] = value(i, n))))
    this.commit()
  }

  choose(selection) {
    if (this.fixed || !this.layout) return
    write(this.node, "selection", selection)
    this.refresh()
  }

  say() {
    const total = this.layers?.reduce((sum, [, heads]) => sum + heads, 0) ?? 0
    const count = this.chosen.reduce((sum, row) => sum + row.reduce((a, b) => a + b, 0), 0)
    const scored = this.heat()
    let line = this.named
      ? `${count} head${count === 1 ? "" : "s"} of the preset ${this.named}; set preset to ${OWN} to choose others`
      : this.fixed
        ? "The selection comes from a connected text."
        : `${this.automatic ? "auto: " : ""}${count} of ${total} heads in ${this.layers?.length ?? 0} layers`
    if (scored) line += `, colours: ${scored.title}`
    if (this.hover && this.layout) {
      const [i, n] = this.hover
      const score = scored?.sites[this.layers[i][0]]?.[n]
      line = `${this.layers[i][0]}${n < 0 ? "" : ` head ${n}`}${n >= 0 && this.chosen[i][n] ? ", chosen" : ""}${!isScore(score) ? "" : `, ${score.toPrecision(3)}`}`
    }
    const stranger = this.named && this.layout && !this.layout.presets?.[this.named]
    const wrong = stranger ? `The preset ${this.named} is for another model.` : this.bad[0] && `${this.bad[0].why} (in “${this.bad[0].item}”)`
    this.status.textContent = this.layout ? wrong || line : this.problem
    this.status.title = this.status.textContent
    this.status.className = `attune-status${this.layout && wrong ? " attune-error" : ""}`
  }

  speak() {
    const [i, n] = this.cursor
    if (this.layers[i]) this.speech.textContent = `${this.layers[i][0]}, head ${n}, ${this.chosen[i][n] ? "chosen" : "not chosen"}`
  }

  /** The scores that fit this model, the newest ones. */
  heat() {
    return this.colours.getAttribute("aria-pressed") === "true" ? this.scores() : undefined
  }

  scores() {
    return heat.findLast(({ sites }) => this.layers?.some(([name]) => sites[name]) && Object.entries(sites).every(([name, row]) => this.layers.some(([own, heads]) => own === name && heads === row.length)))
  }

  // --- drawing ---

  measure() {
    const width = Math.max(120, this.grid.clientWidth || 240)
    const cell = Math.max(6, Math.min(22, (width - LABELS - 6) / this.most))
    const high = Math.round(Math.max(8, Math.min(13, cell)))
    const rows = []
    let y = HEADER
    let place = null
    for (const [name] of this.layers ?? []) {
      const own = name.split(".")[0]
      if (place !== null && own !== place) y += 5
      place = own
      rows.push(y)
      y += high
    }
    return { width: Math.max(width, LABELS + cell * this.most + 6), height: y + 4, cell, high, rows }
  }

  draw() {
    if (!this.layers || !this.chosen.length) {
      this.canvas.style.display = "none"
      return
    }
    this.canvas.style.display = ""
    const m = (this.m = this.measure())
    const ratio = Math.max(1, window.devicePixelRatio || 1) * 1.5 // the editor zooms in
    this.canvas.width = Math.round(m.width * ratio)
    this.canvas.height = Math.round(m.height * ratio)
    this.canvas.style.width = `${m.width}px`
    this.canvas.style.height = `${m.height}px`
    wholeRows(this.root, this.grid, [...m.rows.slice(0, -1).map((y) => y + m.high), m.height], TALL)
    this.canvas.dataset.geometry = JSON.stringify({ ...m, left: LABELS }) // where everything is
    const c = this.canvas.getContext("2d")
    c.scale(ratio, ratio)
    const [quiet, accent, empty, strong] = [
      colour(this.root, "--descrip-text", "#999"),
      colour(this.root, "--attune-accent", "#4b8df8"),
      colour(this.root, "--border-color", "#4e4e4e"),
      colour(this.root, "--input-text", "#ddd")
    ]
    const scored = this.heat()
    const every = scored ? Object.values(scored.sites).flat().filter(isScore) : []
    const [low, top] = [Math.min(...every), Math.max(...every)]
    c.font = "9px Inter, Arial, sans-serif"
    c.textBaseline = "middle"
    c.fillStyle = quiet
    c.textAlign = "center"
    const every_nth = m.cell >= 11 ? 1 : m.cell >= 7 ? 4 : 8
    for (let n = 0; n < this.most; n += every_nth) c.fillText(n, LABELS + m.cell * (n + 0.5), HEADER / 2 + 1)
    c.textAlign = "right"
    this.layers.forEach(([name, heads], i) => {
      const y = m.rows[i]
      c.fillStyle = this.hover?.[0] === i ? strong : quiet
      c.fillText(name, LABELS - 6, y + m.high / 2)
      for (let n = 0; n < heads; n++) {
        const x = LABELS + n * m.cell
        const [w, h] = [m.cell - 1.5, m.high - 1.5]
        const score = scored?.sites[name]?.[n]
        c.fillStyle = isScore(score) ? warm((score - low) / (top - low || 1)) : this.chosen[i][n] ? accent : empty
        c.globalAlpha = !isScore(score) && !this.chosen[i][n] ? 0.55 : 1
        c.beginPath()
        c.roundRect(x, y, w, h, 2)
        c.fill()
        c.globalAlpha = 1
        if (isScore(score) && this.chosen[i][n]) {
          c.strokeStyle = strong
          c.lineWidth = 1.6
          c.stroke()
        }
      }
    })
    if (document.activeElement === this.canvas) {
      const [i, n] = this.cursor
      c.strokeStyle = strong
      c.lineWidth = 1.5
      c.strokeRect(LABELS + n * m.cell - 1, m.rows[i] - 1, m.cell + 0.5, m.high + 0.5)
    }
  }

  // --- mouse and keys ---

  /** The layer and head at a point; -1 for a whole layer, or for the head of all layers. */
  at(x, y) {
    const { rows, high, cell } = this.m
    const i = rows.findIndex((top) => y >= top && y < top + high)
    const n = Math.floor((x - LABELS) / cell)
    if (y < HEADER && n >= 0 && n < this.most) return [-1, n]
    if (i < 0 || n >= this.layers[i][1]) return null
    return [i, Math.max(-1, n)]
  }

  cells([i, n]) {
    if (i < 0) return this.layers.flatMap(([, heads], row) => (n < heads ? [[row, n]] : []))
    if (n < 0) return [...this.chosen[i].keys()].map((head) => [i, head])
    return [[i, n]]
  }

  paint(target) {
    for (const [i, n] of this.cells(target)) this.chosen[i][n] = this.value_painted
  }

  start(target) {
    this.value_painted = this.cells(target).every(([i, n]) => this.chosen[i][n]) ? 0 : 1
    this.paint(target)
  }

  listen() {
    const canvas = this.canvas
    let last = null
    const find = (event) => (this.layout ? this.at(event.offsetX, event.offsetY) : null)
    canvas.addEventListener("pointerdown", (event) => {
      const target = event.button === 0 && !this.fixed ? find(event) : null
      if (!target) return
      canvas.setPointerCapture(event.pointerId)
      this.start(target)
      if (target[0] >= 0) this.cursor = [target[0], Math.max(0, target[1])]
      last = { x: event.offsetX, y: event.offsetY, kind: target[0] < 0 ? "column" : target[1] < 0 ? "row" : "cell" }
      this.draw()
      this.say()
    })
    canvas.addEventListener("pointermove", (event) => {
      const now = find(event)
      if (last) {
        // every cell on the way, also of a fast move
        const parts = Math.max(1, Math.ceil(Math.hypot(event.offsetX - last.x, event.offsetY - last.y) / 4))
        for (let k = 1; k <= parts; k++) {
          let [x, y] = [last.x + ((event.offsetX - last.x) * k) / parts, last.y + ((event.offsetY - last.y) * k) / parts]
          if (last.kind === "row") x = 0
          if (last.kind === "column") y = 0
          const target = this.at(x, y)
          if (target && (last.kind !== "cell" || (target[0] >= 0 && target[1] >= 0))) this.paint(target)
        }
        Object.assign(last, { x: event.offsetX, y: event.offsetY })
      }
      this.hover = now && now[0] >= 0 ? now : null
      this.draw()
      this.say()
    })
    const end = () => {
      if (!last) return
      last = null
      this.commit()
    }
    canvas.addEventListener("pointerup", end)
    canvas.addEventListener("pointercancel", end)
    canvas.addEventListener("pointerleave", () => {
      this.hover = null
      this.draw()
      this.say()
    })
    for (const type of ["focus", "blur"]) canvas.addEventListener(type, () => this.draw())
    canvas.addEventListener("keydown", (event) => {
      if (!this.layout) return
      const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -99], End: [0, 99], PageUp: [-8, 0], PageDown: [8, 0] }
      let [i, n] = this.cursor
      if (event.key === " " && !this.fixed) {
        this.start(event.shiftKey ? [i, -1] : event.ctrlKey || event.metaKey ? [-1, n] : [i, n])
        this.commit()
      } else if (moves[event.key]) {
        i = Math.max(0, Math.min(this.layers.length - 1, i + moves[event.key][0]))
        n = Math.max(0, Math.min(this.layers[i][1] - 1, n + moves[event.key][1]))
        this.cursor = this.hover = [i, n]
        const y = this.m.rows[i]
        if (y - HEADER < this.grid.scrollTop) this.grid.scrollTop = y - HEADER
        if (y + this.m.high > this.grid.scrollTop + this.grid.clientHeight) this.grid.scrollTop = y + this.m.high - this.grid.clientHeight
        this.draw()
        this.say()
      } else return
      event.preventDefault()
      this.speak()
    })
  }
}

told("attune_layout", (node, layout) => pickers.get(node)?.tell(layout))
api.addEventListener("executed", ({ detail }) => {
  const found = detail?.output?.attune_scores?.[0]
  if (!found) return
  heat = [...heat.filter(({ title }) => title !== found.title), found].slice(-8)
  for (const graph of [app.rootGraph ?? app.graph, ...((app.rootGraph ?? app.graph).subgraphs?.values?.() ?? [])]) {
    for (const node of graph.nodes) pickers.get(node)?.refresh()
  }
})

app.registerExtension({
  name: "Attune.Heads",
  nodeCreated(node) {
    if (node.comfyClass === NODE) pickers.set(node, new Picker(node))
  }
})
