// Receptive fields: which part of the picture a unit looks at, and which units look at a pixel.

// (top, left, bottom, right) in pixels of the network's input, half-open, as far as it reaches beyond the picture.
export function box(layer, y, x) {
  const f = layer.receptive_field
  if (!f) return null
  return { top: f.y[2 * y], bottom: f.y[2 * y + 1], left: f.x[2 * x], right: f.x[2 * x + 1] }
}

// The box of most of what moves a unit: that of the middle unit, moved to where this one looks.
export function effective(layer, found, y, x) {
  if (!found || found[0] === found[2] || !layer.receptive_field) return null
  const [middle, here] = [box(layer, Math.floor(layer.grid[1] / 2), Math.floor(layer.grid[2] / 2)), box(layer, y, x)]
  const [down, right] = [here.top - middle.top, here.left - middle.left]
  return { top: found[0] + down, left: found[1] + right, bottom: found[2] + down, right: found[3] + right }
}

// The rows and columns of units that look at a pixel of the input: [first, last], or null if none does.
export function lookers(layer, y, x) {
  const f = layer.receptive_field
  if (!f) return null
  const rows = within(f.y, y)
  const columns = within(f.x, x)
  return rows && columns ? { rows, columns } : null
}

function within(ends, at) {
  let found = null
  for (let i = 0; 2 * i < ends.length; i++) {
    if (at < ends[2 * i] || at >= ends[2 * i + 1]) continue
    found = found ? [found[0], i] : [i, i]
  }
  return found
}

// The share of a box that lies outside of the picture: padding.
export function padding(b, [height, width]) {
  const area = (b.bottom - b.top) * (b.right - b.left)
  if (!area) return 0
  const inside = Math.max(0, Math.min(b.bottom, height) - Math.max(b.top, 0))
    * Math.max(0, Math.min(b.right, width) - Math.max(b.left, 0))
  return 1 - inside / area
}
