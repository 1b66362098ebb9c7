// The word chips of Prompt Words: the prompt's words, for every text encoder once a run has told its tokens; a click chooses one.

import { app, attach, isLinked, low, make, textOf, told, widgetOf, write } from "./shared.js"

const NODE = "AttuneWords"
const NAMES = { l: "CLIP-L", g: "CLIP-G", h: "CLIP-H", t5xxl: "T5" }
const nameOf = (encoder) => NAMES[encoder] ?? encoder // a language model's own name
const LETTER = "[\\p{L}\\p{N}\\u0300-\\u036f]"
const WORD = new RegExp(`(?<![^ \\n])embedding:\\S*[^\\s,]|(?<=[\\p{L}\\p{N}])['’]${LETTER}+|${LETTER}+`, "gu")
const chips = new WeakMap()

const key = (word) => word.normalize("NFKC").toLowerCase().replaceAll("’", "'")

/** The words of a prompt, without weights and escapes. */
function split(text) {
  const plain = text.replace(/\\([()])/g, " ").replace(/:\s*[+-]?\d*\.?\d+\s*\)/g, ")").replace(/[()]/g, " ")
  return [...plain.matchAll(WORD)].map((m) => m[0])
}

class Chips {
  constructor(node) {
    this.node = node
    this.told = null // what the last run has told
    this.rows = make("div", { className: "attune-scroll" })
    this.status = make("div", { className: "attune-status" })
    this.root = make("div", { className: "attune attune-words" }, this.rows, this.status)
    low(node, "text")
    attach(node, "chips", this.root, { height: 76, tick: () => this.tick() })
    this.tick()
  }

  tick() {
    if (this.drag) return
    const text = textOf(this.node, "text")
    const seen = JSON.stringify([text, widgetOf(this.node, "words")?.value, this.told, isLinked(this.node, "words")])
    if (seen === this.seen) return
    this.seen = seen
    this.show(text ?? this.told?.text ?? null)
  }

  tell(data) {
    this.told = data
    this.tick()
  }

  phrases() {
    return (widgetOf(this.node, "words")?.value ?? "").split(/[,，、\n]/).map((part) => part.trim()).filter(Boolean)
  }

  /** For every word the phrase that it is in, by its place in the list; -1: in none. Repeated ones count everywhere. */
  owners(phrases) {
    const keys = this.words.map(key)
    const owner = keys.map(() => -1)
    phrases.forEach((phrase, p) => {
      const wanted = split(phrase).map(key)
      if (!wanted.length) return
      for (let i = 0; i + wanted.length <= keys.length; i++) {
        if (wanted.every((w, k) => keys[i + k] === w)) wanted.forEach((_, k) => (owner[i + k] = p))
      }
    })
    return owner
  }

  show(text) {
    const fresh = this.told?.text === text ? this.told : null
    this.words = fresh ? fresh.words.map((w) => w.text) : split(text ?? "")
    const chosen = this.phrases()
    const automatic = !chosen.length
    this.shown = automatic ? (fresh?.phrases ?? []) : chosen
    const owner = this.owners(this.shown)
    const encoders = fresh ? fresh.encoders : [null]
    const focused = this.root.contains(document.activeElement) ? document.activeElement.dataset : null
    this.buttons = []
    this.rows.replaceChildren(
      ...encoders.map((encoder) => {
        const row = make("div", { className: "attune-chips", role: "group", "aria-label": encoder ? `Words for ${nameOf(encoder)}` : "Words of the prompt" })
        this.words.forEach((word, i) => {
          const columns = encoder ? (fresh.words[i].encoders[encoder] ?? []) : []
          const joined = i > 0 && owner[i] >= 0 && owner[i] === owner[i - 1] && this.together(owner[i], i, this.shown)
          const button = make("button", {
            type: "button",
            className: `attune-chip${owner[i] >= 0 && automatic ? " auto" : ""}${joined ? " joined" : ""}`,
            textContent: word,
            disabled: isLinked(this.node, "words"),
            title: columns.length ? `${columns.length > 1 ? "tokens" : "token"} ${columns.join(", ")} of ${nameOf(encoder)}` : encoder ? "takes no place" : "Click to choose; drag over several for a phrase",
            "aria-pressed": String(owner[i] >= 0 && !automatic),
            onkeydown: (event) => this.key(event, i),
            onclick: (event) => event.detail === 0 && this.choose(i, i),
            onpointerdown: (event) => this.start(event, i)
          })
          button.dataset.word = i
          button.dataset.encoder = encoder ?? ""
          if (columns.length) button.append(make("small", { textContent: columns.length > 1 ? `${columns[0]}–${columns.at(-1)}` : columns[0] }))
          row.append(button)
          this.buttons.push(button)
        })
        return make("div", { className: "attune-encoder" }, ...(encoder ? [make("span", { textContent: nameOf(encoder) })] : []), row)
      })
    )
    if (focused?.word) this.buttons.find((b) => b.dataset.word === focused.word && b.dataset.encoder === focused.encoder)?.focus()
    const line =
      text === null
        ? "The prompt comes from a node that only a run can read."
        : !this.words.length
          ? "Write a prompt to choose words from."
          : automatic
            ? fresh ? "Automatic: the nouns." : "None chosen: the nouns, found when it runs."
            : `${chosen.length} ${chosen.length > 1 ? "phrases" : "phrase"} chosen.`
    const missing = chosen.find((phrase, p) => !owner.includes(p) && this.words.length && !chosen.some((other, q) => q !== p && split(other).map(key).join(" ").includes(split(phrase).map(key).join(" "))))
    this.status.textContent = missing ? `“${missing}” is not in the prompt.` : line
    this.status.className = `attune-status${missing ? " attune-error" : ""}`
  }

  /** Whether the word at `i` goes on a phrase that the word before it is in. */
  together(p, i, phrases) {
    const wanted = split(phrases[p]).map(key)
    for (let k = 1; k < wanted.length; k++) {
      if (wanted.every((w, j) => this.words[i - k + j] !== undefined && key(this.words[i - k + j]) === w)) return true
    }
    return false
  }

  key(event, i) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key]
    if (!step) return
    event.preventDefault()
    const at = this.buttons.indexOf(event.currentTarget)
    this.buttons[at + step]?.focus()
  }

  start(event, i) {
    if (event.button !== 0) return
    const mark = (to) => this.buttons.forEach((b) => b.classList.toggle("drag", Number(b.dataset.word) >= Math.min(i, to) && Number(b.dataset.word) <= Math.max(i, to)))
    let to = i
    this.drag = true
    event.currentTarget.releasePointerCapture?.(event.pointerId)
    const move = (e) => {
      const over = document.elementFromPoint(e.clientX, e.clientY)?.closest(".attune-chip")
      if (over && this.root.contains(over)) mark((to = Number(over.dataset.word)))
    }
    const end = () => {
      window.removeEventListener("pointermove", move, true)
      window.removeEventListener("pointerup", end, true)
      window.removeEventListener("pointercancel", end, true)
      this.drag = false
      this.choose(Math.min(i, to), Math.max(i, to))
    }
    window.addEventListener("pointermove", move, true)
    window.addEventListener("pointerup", end, true)
    window.addEventListener("pointercancel", end, true)
    mark(i)
  }

  /** Choose a row of words as a phrase, beside what is shown; a click on a word that is shown as chosen takes its phrase out. */
  choose(from, to) {
    let list = [...this.shown]
    const owner = this.owners(list)
    if (from === to && owner[from] >= 0) list = list.filter((_, p) => p !== owner[from])
    else {
      const inside = new Set(owner.slice(from, to + 1).filter((p) => p >= 0))
      list = list.filter((_, p) => !inside.has(p))
      list.push(this.words.slice(from, to + 1).join(" ").replace(/ (['’])/g, "$1"))
    }
    write(this.node, "words", list.join(", "))
    this.seen = null
    this.tick()
  }
}

told("attune_words", (node, data) => chips.get(node)?.tell(data))

app.registerExtension({
  name: "Attune.Words",
  nodeCreated(node) {
    if (node.comfyClass === NODE) chips.set(node, new Chips(node))
  }
})
