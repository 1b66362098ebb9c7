// The colours of heat, of 0 to 255: plasma, as in Show Attention Maps' own picture.

const STOPS = [[13, 8, 135], [84, 2, 163], [139, 10, 165], [185, 50, 137], [219, 92, 104], [244, 136, 73], [254, 188, 43], [240, 249, 33]]

export const HEAT = Array.from({ length: 256 }, (_, v) => {
  const at = Math.min(0.9999, v / 255) * (STOPS.length - 1)
  const [a, b] = [STOPS[Math.floor(at)], STOPS[Math.floor(at) + 1]]
  return a.map((x, i) => Math.round(x + (b[i] - x) * (at % 1)))
})
