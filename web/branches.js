// The branch editor of Decompose Prompt: branches as rows; what is changed by hand is written to `manual`, which stays the truth.

import { app, ask, attach, isLinked, low, make, textOf, told, widgetOf, write } from "./shared.js"

const NODE = "AttuneDecompose"
const editors = new WeakMap()
const WORD = /[\p{L}\p{N}\u0300-\u036f'’-]+/gu

/** The lines of `manual` as branches. */
function read(manual) {
  return manual
    .split("\n")
    .filter((line) => line.trim())
    .map((line) => {
      const at = line.search(/[|｜]/)
      return at < 0 ? { subject: "", text: line.trim(), added: [] } : { subject: line.slice(0, at).trim(), text: line.slice(at + 1).trim(), added: [] }
    })
}

const lines = (branches) => branches.map(({ subject, text }) => `${subject || "*"} | ${text.replace(/\s+/g, " ")}`).join("\n")

/** Places in `text` of the words that `plain` does not have, by the longest common row of words. */
function news(text, plain) {
  const own = [...text.matchAll(WORD)]
  const old = [...plain.matchAll(WORD)].map((m) => m[0].toLowerCase())
  const best = Array.from({ length: own.length + 1 }, () => new Uint16Array(old.length + 1))
  for (let i = own.length - 1; i >= 0; i--) {
    for (let j = old.length - 1; j >= 0; j--) {
      best[i][j] = own[i][0].toLowerCase() === old[j] ? best[i + 1][j + 1] + 1 : Math.max(best[i + 1][j], best[i][j + 1])
    }
  }
  const spans = []
  for (let i = 0, j = 0; i < own.length; i++) {
    while (j < old.length && best[i][j + 1] === best[i][j] && own[i][0].toLowerCase() !== old[j]) j++
    if (j < old.length && own[i][0].toLowerCase() === old[j] && best[i][j] === best[i + 1][j + 1] + 1) j++
    else spans.push([own[i].index, own[i].index + own[i][0].length])
  }
  return spans
}

/** Where a branch's added words are: as the server says, else what the branch without details does not have. */
function marks(branch, plain) {
  if (branch.added.length) {
    const lower = branch.text.toLowerCase()
    return branch.added.flatMap((part) => {
      const at = lower.indexOf(part.toLowerCase())
      return at < 0 ? [] : [[at, at + part.length]]
    })
  }
  if (!plain) return []
  // an article alone is no news: “a” has become “an”
  const spans = join(branch.text, news(branch.text, plain))
  return spans.filter(([a, b]) => !/^(a|an|the)$/i.test(branch.text.slice(a, b)))
}

/** Spans with nothing but space between them are one. */
function join(text, spans) {
  const joined = []
  for (const [a, b] of spans.sort((x, y) => x[0] - y[0])) {
    const before = joined.at(-1)
    if (before && /^\s*$/.test(text.slice(before[1], a))) before[1] = Math.max(before[1], b)
    else joined.push([a, b])
  }
  return joined
}

function marked(text, spans) {
  const out = []
  let at = 0
  for (const [a, b] of join(text, spans)) {
    out.push(text.slice(at, a), make("mark", { textContent: text.slice(a, b) }))
    at = b
  }
  return [...out, text.slice(at)]
}

class Editor {
  constructor(node) {
    this.node = node
    this.automatic = null // what the server has last taken apart, and of what
    this.rows = make("div", { className: "attune-scroll attune-rows", role: "list", "aria-label": "Branches" })
    this.message = make("div", { "aria-live": "polite" })
    const button = (name, title, act) => make("button", { type: "button", textContent: name, title, onclick: act })
    this.parse = button("take apart", "Show the branches that the prompt is taken apart into", () => this.takeApart())
    this.check = button("check", "See whether every line can be read", () => this.takeApart(this.manual))
    this.add = button("+ branch", "Add a branch", () => this.insert())
    this.clear = button("automatic", "Drop what was written by hand", () => this.commit([]))
    this.mode = make("span", { className: "attune-quiet" })
    this.root = make(
      "div",
      { className: "attune attune-branches" },
      make("div", { className: "attune-bar" }, this.parse, this.check, this.clear, make("span", { className: "attune-space" }), this.mode, this.add),
      this.rows,
      this.message
    )
    low(node, "text", "manual")
    attach(node, "branches", this.root, { height: 150, tick: () => this.tick() })
    this.tick()
  }

  get manual() {
    return widgetOf(this.node, "manual")?.value ?? ""
  }

  get fixed() {
    return isLinked(this.node, "manual")
  }

  /** All that the branches depend on. */
  inputs() {
    const of = (name) => widgetOf(this.node, name)?.value
    return { text: textOf(this.node, "text"), granularity: of("granularity"), order: of("order"), remove_then_add: of("remove_then_add"), sort: of("sort") }
  }

  tick() {
    if (this.editing && this.root.contains(document.activeElement)) return
    this.editing = false
    const seen = JSON.stringify([this.manual, this.inputs(), this.fixed])
    if (seen !== this.seen) {
      this.seen = seen
      this.say("")
      this.show()
    }
  }

  say(text, wrong = false) {
    this.message.textContent = text
    this.message.className = wrong ? "attune-error" : "attune-quiet"
    this.message.title = text
  }

  async takeApart(manual = "") {
    const inputs = this.inputs()
    if (inputs.text === null) return this.say("The prompt comes from a node that only a run can read: run the workflow, and its branches appear here.")
    this.parse.disabled = true
    try {
      const found = await ask("decompose", { ...inputs, manual })
      if (manual) this.say(`${found.branches.length} branches, all well.`)
      else this.tell(found, inputs)
    } catch (error) {
      this.say(error.message, true)
    }
    this.parse.disabled = false
  }

  /** Branches from a route or a run. */
  tell(found, inputs = this.inputs()) {
    this.automatic = { ...found, inputs: JSON.stringify(inputs) }
    this.say(found.branches.length > 1 ? "" : "There is nothing to take apart: no noun of this prompt has details.")
    this.show()
  }

  /** The branches to show, and whether they are written by hand. `base` is a first row that only tells. */
  current() {
    const { text, order, remove_then_add } = this.inputs()
    if (this.manual.trim()) {
      const branches = read(this.manual)
      const own = order === "simple first" && !remove_then_add && branches[0]?.subject === "*"
      return { base: own ? null : (text ?? "the prompt"), branches, hand: true, first: own }
    }
    const known = this.automatic?.inputs === JSON.stringify(this.inputs()) ? this.automatic : null
    if (!known) return { base: text, branches: [], hand: false }
    const branches = known.branches.map((b) => ({ ...b, added: [...b.added] }))
    return known.base_in_manual ? { base: null, branches, hand: false, first: true } : { base: branches[0].text, branches: branches.slice(1), hand: false }
  }

  show() {
    const now = (this.now = this.current())
    const plain = (now.branches.find((b) => b.subject === "*") ?? (now.first ? now.branches[0] : null))?.text ?? ""
    const rows = now.branches.map((branch, i) => this.row(branch, i, plain, now.first && i === 0))
    if (now.base) rows.unshift(make("div", { className: "attune-row base", role: "listitem" }, make("span"), make("span", { className: "attune-quiet", textContent: "base" }), make("div", { textContent: now.base, className: "text" })))
    this.rows.replaceChildren(...rows)
    this.mode.textContent = now.hand ? "by hand" : now.branches.length ? "automatic" : ""
    this.clear.style.display = this.check.style.display = now.hand ? "" : "none"
    this.parse.style.display = now.hand ? "none" : ""
    for (const button of this.root.querySelectorAll("button")) button.disabled = this.fixed
    if (this.fixed) this.say("The branches come from a connected text.")
  }

  row(branch, i, plain, isBase) {
    const act = (name, label, does) => make("button", { type: "button", className: "small", textContent: name, title: label, "aria-label": `${label} ${i + 1}`, onclick: does })
    const subject = make("input", {
      type: "text",
      value: branch.subject,
      title: "The noun that the details are of; * is the whole picture",
      "aria-label": `Subject of branch ${i + 1}`,
      onfocus: () => (this.editing = true),
      onkeydown: (event) => event.key === "Enter" && !event.isComposing && subject.blur(),
      onchange: () => this.change(i, { subject: subject.value.trim() })
    })
    subject.readOnly = isBase || this.fixed
    const text = make("div", { className: "text", tabIndex: 0, role: "button", "aria-label": `Branch ${i + 1}: ${branch.text}`, title: "Click to edit" })
    text.append(...(isBase || branch.text === plain ? [branch.text] : marked(branch.text, marks(branch, plain))))
    const edit = () => !this.fixed && this.edit(text, branch, i)
    text.addEventListener("click", edit)
    text.addEventListener("keydown", (event) => event.key === "Enter" && (event.preventDefault(), edit()))
    const handle = make("span", { className: "handle", textContent: "⋮⋮", title: "Drag to move", draggable: !this.fixed })
    const row = make("div", { className: "attune-row", role: "listitem" }, handle, subject, text, make("span", {}, act("↑", "Move up branch", () => this.move(i, i - 1)), act("↓", "Move down branch", () => this.move(i, i + 1)), act("×", "Delete branch", () => this.remove(i))))
    handle.addEventListener("dragstart", (event) => {
      event.stopPropagation()
      event.dataTransfer.effectAllowed = "move"
      event.dataTransfer.setData("text/x-attune-branch", String(i))
      this.dragged = i
    })
    row.addEventListener("dragover", (event) => {
      if (this.dragged === undefined) return
      event.preventDefault()
      event.stopPropagation()
      row.classList.add("over")
    })
    row.addEventListener("dragleave", () => row.classList.remove("over"))
    row.addEventListener("drop", (event) => {
      if (this.dragged === undefined) return
      event.preventDefault()
      event.stopPropagation()
      this.move(this.dragged, i)
    })
    handle.addEventListener("dragend", () => {
      this.dragged = undefined
      row.classList.remove("over")
    })
    return row
  }

  edit(place, branch, i) {
    this.editing = true
    const field = make("textarea", { value: branch.text, rows: 1, "aria-label": `Branch ${i + 1}` })
    let done = false
    const end = (keep) => {
      if (done) return
      done = true
      this.editing = false
      const value = field.value.replace(/\s+/g, " ").trim()
      if (keep && value !== branch.text) this.change(i, { text: value, added: [] })
      else this.show()
    }
    field.addEventListener("blur", () => end(true))
    field.addEventListener("keydown", (event) => {
      if (event.isComposing) return // Enter chooses a word of an input method
      if (event.key === "Enter" && !event.shiftKey && !event.ctrlKey && !event.metaKey) end(true)
      else if (event.key === "Escape") end(false)
      else return
      event.preventDefault()
    })
    place.replaceWith(field)
    field.focus()
    field.setSelectionRange(field.value.length, field.value.length)
  }

  /** Write branches to `manual`; none is automatic again. */
  commit(branches) {
    if (this.fixed) return
    write(this.node, "manual", lines(branches))
    this.seen = JSON.stringify([this.manual, this.inputs(), this.fixed])
    this.say("")
    this.show()
    if (branches.length && textOf(this.node, "text")) this.verify(this.manual)
  }

  /** Say what is wrong with the lines, and nothing when all is well. */
  async verify(manual) {
    const inputs = this.inputs()
    try {
      await ask("decompose", { ...inputs, manual })
    } catch (error) {
      if (manual === this.manual) this.say(error.message, true)
    }
  }

  change(i, values) {
    const branches = this.now.branches.slice()
    branches[i] = { ...branches[i], ...values }
    this.commit(branches[i].text ? branches : branches.filter((_, k) => k !== i))
  }

  move(from, to) {
    this.dragged = undefined
    if (to < 0 || to >= this.now.branches.length || from === to) return
    const branches = this.now.branches.slice()
    branches.splice(to, 0, ...branches.splice(from, 1))
    this.commit(branches)
  }

  remove(i) {
    this.commit(this.now.branches.filter((_, k) => k !== i))
  }

  insert() {
    const text = this.now.branches.at(-1)?.text ?? textOf(this.node, "text") ?? ""
    if (!text.trim()) return this.say("Write the prompt first.", true)
    this.commit([...this.now.branches, { subject: "*", text, added: [] }])
    this.rows.lastElementChild?.scrollIntoView({ block: "nearest" })
    this.rows.lastElementChild?.querySelector("input")?.select()
  }
}

told("attune_branches", (node, found) => {
  const editor = editors.get(node)
  const text = editor?.inputs().text
  // not where the prompt has been changed while it ran
  if (editor?.manual.trim() === "" && (text === null || text === undefined || text === found.prompt)) editor.tell(found)
})

app.registerExtension({
  name: "Attune.Branches",
  nodeCreated(node) {
    if (node.comfyClass === NODE) editors.set(node, new Editor(node))
  }
})
