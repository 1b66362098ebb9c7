// A node that had no effect in its last run says so on itself, and why.

import { app, api, attach, locate, make } from "./shared.js"

const runs = new WeakMap() // of each node: the workflow that has told last, and whether the node had an effect in it
const lines = new WeakMap()

function show(node, missing) {
  remove(node)
  const element = make("div", { className: "attune attune-no-effect", role: "status" }, make("b", {}, "No effect"), ` in the last run: ${missing}.`)
  const height = node.size[1]
  const widget = attach(node, "effect", element, { height: 46 })
  lines.set(node, { widget, grown: node.size[1] - height })
}

function remove(node) {
  const line = lines.get(node)
  if (!line) return
  lines.delete(node)
  if (!node.widgets?.includes(line.widget)) return
  node.removeWidget(line.widget)
  node.setSize([node.size[0], Math.max(node.computeSize()[1], node.size[1] - line.grown)])
  node.graph?.setDirtyCanvas(true, true)
}

app.registerExtension({
  name: "Attune.Effect",
  setup() {
    api.addEventListener("attune.effect", ({ detail }) => {
      const node = locate(detail?.node)
      if (!node?.comfyClass?.startsWith("Attune")) return
      const missing = typeof detail.missing === "string" ? detail.missing : null
      const known = runs.get(node)
      const before = known?.prompt === detail.prompt && known.acted // in another sampler of the same workflow
      runs.set(node, { prompt: detail.prompt, acted: missing === null || before })
      if (missing === null || before) remove(node)
      else show(node, missing)
    })
  }
})
