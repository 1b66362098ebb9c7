// The selection grammar of Select Heads, as patches/hook/sites.py reads it. A layout's `layers` are [name, heads] in order.

const PAPER = /^L([\d,\-*]+)(?:H([\d,\-*]+))?$/i

function numbers(text, count) {
  const out = new Set()
  for (const part of text.split(",")) {
    if (part === "*") {
      for (let n = 0; n < count; n++) out.add(n)
      continue
    }
    const match = /^(\d+)(?:-(\d+))?$/.exec(part)
    if (!match) throw new Error(`“${part}” is not a number, a range like 0-3, or *`)
    const first = Number(match[1])
    const last = Number(match[2] ?? match[1])
    if (last < first) throw new Error(`the range “${part}” runs backwards`)
    for (let n = first; n <= Math.min(last, count); n++) out.add(n)
    if (first > count) out.add(first) // the caller says what is too high
  }
  return [...out].sort((a, b) => a - b)
}

function glob(pattern) {
  const body = pattern.replace(/\[!/g, "[^").replace(/[.+^${}()|\\]/g, (c) => (c === "^" ? c : `\\${c}`))
  try {
    return new RegExp(`^${body.replace(/\*/g, ".*").replace(/\?/g, ".")}$`)
  } catch {
    return /^\b$/
  }
}

function matches(pattern, name) {
  const parts = pattern.split(".")
  const names = name.split(".")
  return (
    parts.length === names.length &&
    parts.every((part, i) =>
      /^\d+$/.test(names[i]) && /^[\d,-]+$/.test(part)
        ? numbers(part, Number(names[i]) + 1).includes(Number(names[i]))
        : glob(part).test(names[i])
    )
  )
}

/** `{ chosen: a Uint8Array of heads per layer, bad: [{ item, why }] }`. */
export function read(text, layers) {
  const chosen = layers.map(([, heads]) => new Uint8Array(heads))
  const bad = []
  for (const item of text.split(/[\s;]+/).filter(Boolean)) {
    try {
      const paper = PAPER.exec(item)
      const at = item.indexOf(":")
      const heads = (paper ? paper[2] : at < 0 ? "" : item.slice(at + 1)) || "*"
      let places
      if (paper) {
        places = numbers(paper[1], layers.length)
        if (places.some((n) => n >= layers.length)) throw new Error(`there is no layer L${places.find((n) => n >= layers.length)}`)
      } else {
        const site = at < 0 ? item : item.slice(0, at)
        places = layers.flatMap(([name], i) => (matches(site, name) ? [i] : []))
        if (!places.length) throw new Error(`no site is called “${site}”`)
      }
      const found = places.map((i) => [i, numbers(heads, layers[i][1])])
      for (const [i, list] of found) {
        if (list.some((n) => n >= layers[i][1])) throw new Error(`${layers[i][0]} has heads 0 to ${layers[i][1] - 1}, not ${Math.max(...list)}`)
      }
      for (const [i, list] of found) for (const n of list) chosen[i][n] = 1
    } catch (error) {
      bad.push({ item, why: error.message })
    }
  }
  return { chosen, bad }
}

function ranges(list) {
  const runs = []
  for (const n of list) {
    const run = runs.at(-1)
    if (run && n === run[1] + 1) run[1] = n
    else runs.push([n, n])
  }
  return runs.map(([a, b]) => (a === b ? `${a}` : `${a}-${b}`)).join(",")
}

/** The shortest plain text of a choice that `read` reads back: neighbours are joined, whole layers and groups are not counted out. */
export function text(chosen, layers) {
  const all = new Map()
  const parts = new Map() // "place|middle number|heads" and so on, to the numbers that are joined
  const names = layers.map(([name]) => name.split("."))
  layers.forEach(([name, heads], i) => {
    const place = names[i][0]
    all.set(place, (all.get(place) ?? 0) + 1)
    const list = [...chosen[i].keys()].filter((n) => chosen[i][n])
    if (!list.length) return
    const which = list.length === heads ? "" : `:${ranges(list)}`
    const key = [...names[i].slice(0, -1), which].join("|")
    if (!parts.has(key)) parts.set(key, { stem: names[i].slice(0, -1), which, last: [] })
    parts.get(key).last.push(Number(names[i].at(-1)))
  })
  const joined = new Map()
  for (const { stem, which, last } of parts.values()) {
    const tail = ranges(last)
    const key = [stem[0], stem.length, tail, which].join("|")
    if (!joined.has(key)) joined.set(key, { place: stem[0], deep: stem.length > 1, tail, which, middle: [] })
    joined.get(key).middle.push(Number(stem[1]))
  }
  const items = [...joined.values()].map(({ place, deep, tail, which, middle }) => ({
    place,
    which,
    site: deep ? `${place}.${ranges(middle)}.${tail}` : `${place}.${tail}`,
    stars: deep ? `${place}.*.*` : `${place}.*`
  }))
  // a group that is chosen as a whole, alike in every layer
  const out = []
  for (const place of all.keys()) {
    const mine = items.filter((item) => item.place === place)
    const count = layers.filter((_, i) => names[i][0] === place && chosen[i].some(Boolean)).length
    const alike = mine.length && count === all.get(place) && mine.every((item) => item.which === mine[0].which)
    out.push(...(alike ? [mine[0].stars + mine[0].which] : mine.map((item) => item.site + item.which)))
  }
  return out.join(" ")
}
