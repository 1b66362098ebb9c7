// Colours of the pack's own sockets and links, in the classic canvas and in Nodes 2.0.

import { app } from "./shared.js"

const COLOURS = {
  ATTUNE_WORDS: "#e0a848",
  ATTUNE_HEADS: "#5aa9d6",
  ATTUNE_MAPS: "#d9705c",
  ATTUNE_SCORER: "#84b860",
  ATTUNE_BRANCHES: "#a98bd4",
}

function paint() {
  for (const [type, colour] of Object.entries(COLOURS)) {
    app.canvas.default_connection_color_byType[type] = colour
    window.LGraphCanvas.link_type_colors[type] = colour
    document.documentElement.style.setProperty(`--color-datatype-${type}`, colour)
  }
}

app.registerExtension({
  name: "Attune.Colours",
  setup() {
    // The editor's own palette, which knows no packs' types, comes after this and with every change of it.
    app.ui.settings.addEventListener("Comfy.ColorPalette.change", () => setTimeout(paint, 300))
    paint()
  },
  afterConfigureGraph: paint,
})
