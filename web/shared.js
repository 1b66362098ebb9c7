// What the pack's widgets have in common: elements, reading the graph, asking the server, and noticing changes.

import { app } from "../../scripts/app.js"
import { api } from "../../scripts/api.js"

export { app, api }

const MARGIN = 20 // around a DOM widget, above and below

const STYLE = `
.attune { display: flex; flex-direction: column; gap: 6px; width: 100%; height: 100%; box-sizing: border-box; padding: 4px 2px;
  font: 11px/1.35 Inter, Arial, sans-serif; color: var(--input-text); overflow: hidden; pointer-events: auto; text-align: left; }
.attune * { box-sizing: border-box; }
.attune-bar { display: flex; flex-wrap: wrap; gap: 4px; align-items: center; flex: none; }
.attune-space { flex: 1; }
.attune button, .attune select, .attune input, .attune textarea { font: inherit; color: var(--input-text);
  background: var(--comfy-input-bg); border: 1px solid var(--border-color); border-radius: 6px; padding: 2px 7px; margin: 0; }
.attune button { cursor: pointer; }
.attune-heads button[aria-pressed=true] { border-color: var(--attune-accent); }
.attune button:hover:not(:disabled) { border-color: var(--descrip-text); }
.attune button:disabled { opacity: .45; cursor: default; }
.attune :focus-visible { outline: 2px solid var(--attune-accent); outline-offset: 1px; }
.attune-quiet { color: var(--descrip-text); }
.attune-error { color: var(--error-text); white-space: pre-wrap; overflow-wrap: anywhere; }
.attune-no-effect { display: block; border-left: 3px solid #e09a2b; border-radius: 4px; padding: 3px 7px; background: var(--comfy-input-bg);
  overflow: auto; scrollbar-width: thin; }
.attune-no-effect b { color: #e09a2b; }
.attune-status { flex: none; min-height: 15px; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; color: var(--descrip-text); }
.attune-scroll { flex: 1; min-height: 0; overflow: auto; scrollbar-width: thin; }
.attune-grid { position: relative; border-radius: 6px; background: var(--comfy-input-bg); }
.attune-grid canvas { display: block; touch-action: none; cursor: cell; outline-offset: -2px !important; }
.attune-hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.attune-rows { display: flex; flex-direction: column; gap: 4px; }
.attune-row { display: grid; grid-template-columns: 18px 78px 1fr auto; gap: 4px; align-items: start; padding: 3px 4px; border-radius: 6px;
  background: var(--comfy-input-bg); }
.attune-row.base { background: none; border: 1px dashed var(--border-color); }
.attune-row.over { box-shadow: 0 -2px 0 var(--attune-accent); }
.attune-row .handle { cursor: grab; color: var(--descrip-text); text-align: center; padding: 2px 0; user-select: none; }
.attune-row .text { padding: 2px 4px; min-height: 20px; cursor: text; overflow-wrap: anywhere; border-radius: 4px; }
.attune-row input, .attune-row textarea { width: 100%; border-color: transparent; background: none; padding: 2px 4px; border-radius: 4px; }
.attune-row textarea { resize: none; field-sizing: content; background: var(--comfy-menu-bg); }
.attune-row .small { padding: 0 5px; border-color: transparent; background: none; color: var(--descrip-text); }
.attune mark { background: color-mix(in srgb, var(--attune-accent) 38%, transparent); color: inherit; border-radius: 3px; padding: 0 2px; }
.attune-encoder { display: flex; gap: 6px; align-items: baseline; margin-bottom: 4px; }
.attune-encoder > span { flex: 0 0 38px; color: var(--descrip-text); }
.attune-chips { display: flex; flex-wrap: wrap; gap: 3px; user-select: none; }
.attune button.attune-chip { border-radius: 10px; padding: 1px 8px; touch-action: none; }
.attune button.attune-chip[aria-pressed=true] { background: var(--attune-accent); border-color: var(--attune-accent); color: #fff; }
.attune button.attune-chip.auto { border: 1px dashed var(--attune-accent); }
.attune button.attune-chip.joined { border-top-left-radius: 0; border-bottom-left-radius: 0; margin-left: -4px; }
.attune button.attune-chip.drag { box-shadow: 0 0 0 2px var(--attune-accent); }
.attune-chip b { margin-left: 4px; font-weight: 600; font-size: 10px; }
.attune button.attune-chip.more { box-shadow: inset 0 -2px 0 #e09a2b; }
.attune button.attune-chip.less { box-shadow: inset 0 -2px 0 #3fa7c4; }
.attune-chip.more b { color: #e09a2b; }
.attune-chip.less b { color: #3fa7c4; }
.attune-chip[aria-pressed=true] b { color: inherit; }
.attune-chip small { opacity: .65; margin-left: 4px; font-size: 9px; }
.attune-maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(88px, 1fr)); gap: 6px; align-content: start; }
.attune-maps > div { display: contents; }
.attune-maps figure { margin: 0; min-width: 0; }
.attune-maps canvas { width: 100%; display: block; border-radius: 4px; background: #000; }
.attune-maps figcaption { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; padding-top: 2px; }
.attune-explained { flex: 1; min-height: 0; display: flex; gap: 8px; align-items: flex-start; }
.attune-explained canvas { flex: 0 0 auto; width: 60%; height: auto; max-height: 100%; object-fit: contain; object-position: left top; cursor: crosshair;
  touch-action: none; }
.lg-node .attune-explained canvas { max-height: 420px; }
.attune-shares { flex: 1; min-width: 0; margin: 0; padding: 0; list-style: none; display: flex; flex-direction: column; gap: 3px; }
.attune-shares li { display: flex; justify-content: space-between; gap: 6px; padding: 2px 6px; border-radius: 4px;
  background: linear-gradient(90deg, color-mix(in srgb, var(--attune-accent) 38%, transparent) var(--share, 0%), var(--comfy-input-bg) 0); }
.attune-shares li.attune-quiet { background: none; padding: 0; }
.attune-shares span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.attune-shares b { white-space: nowrap; }
.attune-explain .attune-chips { flex: none; max-height: 66px; }
.attune-legend { display: flex; flex-wrap: wrap; gap: 2px 8px; }
.attune-legend i { display: inline-block; width: 8px; height: 8px; border-radius: 2px; margin-right: 4px; }
.lg-node .attune { height: auto; }
.lg-node .attune-scroll { max-height: 380px; }
:root { --attune-accent: var(--p-primary-500, #4b8df8); }
`
document.head.append(Object.assign(document.createElement("style"), { textContent: STYLE }))

/** An element: `on…` are listeners, `aria`/`data` are attributes by their prefix, the rest are properties. */
export function make(tag, settings = {}, ...children) {
  const element = document.createElement(tag)
  for (const [name, value] of Object.entries(settings)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value)
    else if (name.includes("-") || name === "role") element.setAttribute(name, value)
    else element[name] = value
  }
  element.append(...children)
  return element
}

const OWN_KEYS = [" ", "a", "c", "v", "x", "z", "y"] // with Ctrl: what text fields and the head picker do with them

/** A DOM widget at the end of a node, in no workflow's values. `tick` is called when something may have changed. */
export function attach(node, name, element, { height, tick, remove }) {
  for (const type of ["pointerdown", "mousedown", "dblclick", "contextmenu", "wheel", "paste", "copy"]) {
    element.addEventListener(type, (event) => event.stopPropagation())
  }
  element.addEventListener("keydown", (event) => {
    const held = event.ctrlKey || event.metaKey || event.altKey
    if (!held || OWN_KEYS.includes(event.key.toLowerCase())) event.stopPropagation() // the editor's other shortcuts go on
  })
  const widget = node.addDOMWidget(name, "attune", element, {
    serialize: false,
    getMinHeight: () => height + MARGIN,
    getValue: () => "",
    setValue() {}
  })
  widget.serialize = false
  element.style.minHeight = `${height}px`
  const timer = tick && setInterval(() => element.isConnected && tick(), 300)
  const removed = node.onRemoved
  node.onRemoved = function (...args) {
    clearInterval(timer)
    remove?.()
    return removed?.apply(this, args)
  }
  fit(node)
  return widget
}

/** Let a box that scrolls end after a whole row, in the room that `root` has for it: `ends` of its rows, from its own top, in pixels.
 *  In Nodes 2.0, where nodes grow with what is in them, the room is `most`. */
export function wholeRows(root, box, ends, most) {
  const others = [...root.children].filter((child) => child !== box && child.offsetHeight > 1)
  const left = root.clientHeight - 8 - others.reduce((sum, child) => sum + child.offsetHeight + 6, 0)
  const room = root.closest(".lg-node") ? most : left
  const fits = ends.filter((end) => end <= room)
  box.style.maxHeight = fits.length && fits.length < ends.length ? `${fits.at(-1)}px` : ""
}

/** Keep a node's text boxes low, so that what is added gets the room. */
export function low(node, ...names) {
  for (const name of names) {
    const options = widgetOf(node, name)?.options
    if (options) options.getMaxHeight = () => 74
  }
}

/** Make a node as high as its widgets ask for. */
export function fit(node) {
  const [width, height] = node.computeSize()
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)])
  node.graph?.setDirtyCanvas(true, true)
}

export const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name)

/** Write a widget as a person would, and let undo know. */
export function write(node, name, value) {
  const widget = widgetOf(node, name)
  if (!widget || widget.value === value) return
  widget.value = value
  widget.callback?.(value, app.canvas, node)
  if (widget.inputEl) widget.inputEl.value = value
  saved(node)
}

export function saved(node) {
  node.graph?.setDirtyCanvas(true, true)
  const tracker = app.extensionManager?.workflow?.activeWorkflow?.changeTracker
  tracker?.checkState?.()
}

export const isLinked = (node, name) => node.inputs?.some((slot) => slot.name === name && slot.link != null) ?? false

/** The node and slot that feed an input, through reroutes and in and out of subgraphs; null where that ends. */
export function origin(node, name) {
  let graph = node.graph
  let link = graph?.getLink?.(node.inputs?.find((slot) => slot.name === name)?.link)
  for (let hops = 0; link && hops < 100; hops++) {
    const source = graph.getNodeById(link.origin_id)
    if (!source) {
      // the subgraph's own input: go on outside, at the node that holds it
      const holder = holders(graph)[0]
      link = holder && holder.graph.getLink(holder.inputs?.[link.origin_slot]?.link)
      graph = holder?.graph
    } else if (source.subgraph) {
      const inner = source.subgraph
      link = inner.getLink?.(inner.outputs?.[link.origin_slot]?.linkIds?.[0])
      graph = inner
    } else if (source.type === "Reroute" || source.mode === 4) {
      const type = source.outputs?.[link.origin_slot]?.type
      const slot = source.inputs?.find((s) => s.link != null && (source.type === "Reroute" || s.type === type))
      link = slot && graph.getLink(slot.link)
    } else return { node: source, slot: link.origin_slot }
  }
  return null
}

function holders(subgraph) {
  const root = app.rootGraph ?? app.graph
  const graphs = [root, ...(root.subgraphs?.values?.() ?? [])]
  return graphs.flatMap((graph) => graph.nodes.filter((node) => node.subgraph === subgraph))
}

/** The nodes that an output feeds, through reroutes. */
export function targets(node, slot) {
  const links = node.outputs?.[slot]?.links ?? []
  return links.flatMap((id) => {
    const link = node.graph?.getLink?.(id) ?? node.graph?.links?.get?.(id)
    const target = link && node.graph.getNodeById(link.target_id)
    return !target ? [] : target.type === "Reroute" ? targets(target, 0) : [target]
  })
}

/** The text of an input: its widget's, or that of the text node it is connected to; null where only a run can tell. */
export function textOf(node, name) {
  if (!isLinked(node, name)) return widgetOf(node, name)?.value ?? ""
  const source = origin(node, name)?.node
  const texts = source?.widgets?.filter((w) => typeof w.value === "string" && w.type !== "attune" && w.type !== "combo") ?? []
  const open = source?.inputs?.some((slot) => slot.link != null)
  return texts.length === 1 && !open ? texts[0].value : null
}

/** A node by the id that the server gives it: "3", or "7:3" in a subgraph. */
export function locate(id) {
  let graph = app.rootGraph ?? app.graph
  let node = null
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(Number(part)) ?? null
    graph = node?.subgraph
  }
  return node
}

/** What a node's last run has told: `act(node, data)` for every output under this name. */
export function told(name, act) {
  api.addEventListener("executed", ({ detail }) => {
    const data = detail?.output?.[name]?.[0]
    const node = data && locate(detail.display_node ?? detail.node)
    if (node) act(node, data)
  })
}

/** Ask a route of the pack; throws an Error with its sentence. */
export async function ask(path, body) {
  const request = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) }
  const answer = await api.fetchApi(`/attune/${path}`, request).catch(() => null)
  if (answer?.status === 404) throw new Error("This ComfyUI does not know the route: restart it after an update of Attune.")
  const found = await answer?.json().catch(() => null)
  if (!found) throw new Error("ComfyUI does not answer; is it still running?")
  if (found.error) throw new Error(found.error)
  return found
}

export const colour = (element, name, other) => getComputedStyle(element).getPropertyValue(name).trim() || other
