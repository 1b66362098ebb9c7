// The word chips of Prompt Words: the prompt's words, for every text encoder once a run has told its tokens. A click chooses one; with Ctrl and
// the arrow keys up and down it weighs more or less, in Word Weights where that takes these words, else in the prompt, as (word:1.1).

import { app, attach, isLinked, low, make, origin, targets, textOf, told, wholeRows, widgetOf, write } from "./shared.js"

const NODE = "AttuneWords"
const TALL = 250 // pixels of the chips in Nodes 2.0, at most
const WEIGHTS = "AttuneWordWeights"
const [LEAST, MOST] = [-2, 5]
const NAMES = { l: "CLIP-L", g: "CLIP-G", h: "CLIP-H", t5xxl: "T5" }
const nameOf = (encoder) => NAMES[encoder] ?? encoder // a language model's own name
const LETTER = "[\\p{L}\\p{N}\\u0300-\\u036f]"
const WORD = new RegExp(`(?<![^ \\n])embedding:\\S*[^\\s,]|(?<=[\\p{L}\\p{N}])['’]${LETTER}+|${LETTER}+`, "gu")
const chips = new WeakMap()

const key = (word) => word.normalize("NFKC").toLowerCase().replaceAll("’", "'")

/** The words of a prompt, without weights and escapes. */
const split = (text) => placed(text).map((word) => word.text)

/** The words of a prompt with their places in it. */
function placed(text) {
  const blank = (found) => " ".repeat(found.length)
  const plain = text.replace(/\\[()]/g, blank).replace(/:\s*[+-]?\d*\.?\d+\s*(?=\))/g, blank).replace(/[()]/g, " ")
  return [...plain.matchAll(WORD)].map((m) => ({ text: m[0], start: m.index, end: m.index + m[0].length }))
}

/** What the character at `place` weighs by the brackets around it: as ComfyUI reads them, an inner number in place of outer ones. */
function weightAt(text, place) {
  const open = []
  const around = []
  for (let i = 0; i < text.length; i++) {
    if (text[i] === "\\" && "()".includes(text[i + 1])) i++
    else if (text[i] === "(") open.push(i)
    else if (text[i] === ")" && open.length) {
      const start = open.pop()
      if (start < place && place < i) around.unshift(text.slice(start + 1, i)) // outer ones come later
    }
  }
  return around.reduce((weight, inside) => {
    const number = inside.slice(inside.lastIndexOf(":") + 1)
    return inside.lastIndexOf(":") > 0 && number.trim() && !isNaN(number) ? Number(number) : weight * 1.1
  }, 1)
}

/** The phrases and weights of Word Weights' text. */
function lines(text) {
  return text.split(/[,，、;；\n]/).map((line) => {
    const [, phrase, number] = line.match(/^(.*)[:：=]\s*([^:：=]*)$/) ?? []
    return { line, phrase: phrase?.trim(), weight: number?.trim() && !isNaN(number) ? Number(number) : null }
  })
}

const alike = (one, two) => split(one).map(key).join(" ") === split(two).map(key).join(" ")
const shown = (weight) => String(Math.round(weight * 100) / 100)

class Chips {
  constructor(node) {
    this.node = node
    this.told = null // what the last run has told
    this.rows = make("div", { className: "attune-scroll" })
    this.status = make("div", { className: "attune-status" })
    this.root = make("div", { className: "attune attune-words" }, this.rows, this.status)
    low(node, "text")
    attach(node, "chips", this.root, { height: 76, tick: () => this.tick() })
    new ResizeObserver(() => this.fit()).observe(this.root)
    this.tick()
  }

  tick() {
    if (this.drag) return
    const text = textOf(this.node, "text")
    const weights = this.weighing().map((node) => widgetOf(node, "weights")?.value)
    const seen = JSON.stringify([text, widgetOf(this.node, "words")?.value, this.told, isLinked(this.node, "words"), weights])
    if (seen === this.seen) return
    this.seen = seen
    this.show(text ?? this.told?.text ?? null)
  }

  /** The nodes that weigh this node's words. */
  weighing() {
    return targets(this.node, 0).filter((node) => node.comfyClass === WEIGHTS && node.mode !== 4 && node.mode !== 2)
  }

  /** What every word weighs: by the nodes that take these words, else by the prompt's own brackets. */
  weights(text) {
    const places = placed(text ?? "")
    const own = this.words.map((word, i) => (places[i]?.text === word ? weightAt(text, places[i].start) : 1))
    for (const node of this.weighing()) {
      for (const { phrase, weight } of lines(widgetOf(node, "weights")?.value ?? "")) {
        if (weight !== null) this.owners([phrase]).forEach((at, i) => (own[i] = at === 0 ? weight : own[i]))
      }
    }
    return own
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
    const weights = this.weights(text)
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
            "aria-description": weights[i] === 1 ? "" : `weighs ${shown(weights[i])}`,
            title: columns.length ? `${columns.length > 1 ? "tokens" : "token"} ${columns.join(", ")} of ${nameOf(encoder)}` : encoder ? "takes no place" : "Click to choose; drag over several for a phrase",
            "aria-pressed": String(owner[i] >= 0 && !automatic),
            onkeydown: (event) => this.key(event, i),
            onclick: (event) => event.detail === 0 && this.choose(i, i),
            onpointerdown: (event) => this.start(event, i)
          })
          button.dataset.word = i
          button.dataset.encoder = encoder ?? ""
          if (weights[i] !== 1) {
            button.classList.add(weights[i] > 1 ? "more" : "less")
            button.append(make("b", { textContent: shown(weights[i]) }))
          }
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
    this.fit()
  }

  fit() {
    const ends = this.buttons.map((button) => button.offsetTop + button.offsetHeight - this.rows.offsetTop + 2)
    wholeRows(this.root, this.rows, [...new Set(ends)].sort((a, b) => a - b), TALL)
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
    const change = { ArrowUp: 1, ArrowDown: -1 }[event.key]
    if (change && (event.ctrlKey || event.metaKey)) {
      event.preventDefault()
      event.stopPropagation()
      this.weigh(i, change)
      return
    }
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key]
    if (!step) return
    event.preventDefault()
    const at = this.buttons.indexOf(event.currentTarget)
    this.buttons[at + step]?.focus()
  }

  /** Make the phrase of a word, or else the word, weigh a step more or less. */
  weigh(i, change) {
    const step = Number(app.ui?.settings?.getSettingValue?.("Comfy.EditAttention.Delta")) || 0.05
    const raw = textOf(this.node, "text")
    const at = this.owners(this.shown)[i]
    let [from, to] = [i, i]
    if (at >= 0) {
      const size = split(this.shown[at]).length
      const spelled = split(this.shown[at]).map(key)
      from = [...Array(size).keys()].map((k) => i - k).find((s) => s >= 0 && spelled.every((w, k) => this.words[s + k] !== undefined && key(this.words[s + k]) === w)) ?? i
      to = from + size - 1
    }
    const phrase = this.words.slice(from, to + 1).join(" ").replace(/ (['’])/g, "$1")
    const now = this.weights(raw ?? this.told?.text)[i]
    const next = Math.min(MOST, Math.max(LEAST, Math.round((now + change * step) * 100) / 100))
    const [node] = this.weighing()
    const here = raw === null || isLinked(this.node, "text") ? origin(this.node, "text")?.node : this.node
    if (node && !isLinked(node, "weights")) this.intoNode(node, phrase, next)
    else if (here === this.node && placed(raw)[from]) write(this.node, "text", intoText(raw, placed(raw)[from].start, placed(raw)[to].end, next))
    else {
      this.status.textContent = "The prompt comes from another node: connect Word Weights to weigh its words."
      return
    }
    this.seen = null
    this.tick()
    this.status.textContent = `“${phrase}” weighs ${shown(next)}, in ${node ? "Word Weights" : "the prompt"}.`
  }

  intoNode(node, phrase, weight) {
    const before = widgetOf(node, "weights").value ?? ""
    const known = lines(before).filter((one) => one.line.trim())
    const mine = known.find((one) => one.phrase && alike(one.phrase, phrase))
    const line = `${phrase}: ${shown(weight)}`
    const keeps = weight !== 1 || isLinked(node, "mask") // with a mask, a weight of 1 says where
    const all = mine ? known.flatMap((one) => (one === mine ? (keeps ? [line] : []) : [one.line.trim()])) : [...known.map((one) => one.line.trim()), line]
    write(node, "weights", all.join("\n"))
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

/** A prompt in which the stretch from `start` to `end` weighs something: in brackets of its own, or in none for 1. */
function intoText(text, start, end, weight) {
  const before = text.slice(0, start).match(/\(\s*$/)
  const after = before && text.slice(end).match(/^\s*(?::\s*[+-]?\d*\.?\d+\s*)?\)/)
  if (after) [start, end] = [before.index, end + after[0].length]
  const inner = after ? text.slice(start + before[0].length, end - after[0].length) : text.slice(start, end)
  return text.slice(0, start) + (weight === 1 ? inner : `(${inner}:${shown(weight)})`) + text.slice(end)
}

told("attune_words", (node, data) => chips.get(node)?.tell(data))

app.registerExtension({
  name: "Attune.Words",
  nodeCreated(node) {
    if (node.comfyClass === NODE) chips.set(node, new Chips(node))
  }
})
