// Values to colors. Tables come from draw/color.py, so that the page and the figures agree.

const tables = new Map()

export function begin(colors) {
  for (const [name, text] of Object.entries(colors)) {
    const binary = atob(text)
    const n = binary.length / 3
    const words = new Uint32Array(n)
    for (let i = 0; i < n; i++) {
      const [r, g, b] = [0, 1, 2].map((k) => binary.charCodeAt(3 * i + k))
      words[i] = (255 << 24) | (b << 16) | (g << 8) | r
    }
    tables.set(name, words)
  }
}

export const dark = () => document.documentElement.dataset.theme === 'dark'

export function table(name, signed, over = false) {
  if (name !== 'auto' && tables.has(name)) return tables.get(name)
  if (signed) return tables.get(over || dark() ? 'bluered_dark' : 'bluered')
  return tables.get(over ? 'embers' : 'magma')
}

// The window of values that is spread over a table: symmetric around zero where values have a sign.
export function range(low, high, signed) {
  if (signed) {
    const most = Math.max(Math.abs(low), Math.abs(high))
    return [-most, most]
  }
  return [Math.min(low, 0), high]
}

// A channel of bytes as an image of its own size.
const scratch = new Map()
export function image(map, [low, high], colors) {
  const key = `${map.width}x${map.height}`
  if (!scratch.has(key)) {
    const canvas = new OffscreenCanvas(map.width, map.height)
    scratch.set(key, { canvas, context: canvas.getContext('2d', { willReadFrequently: true }) })
  }
  const { canvas, context } = scratch.get(key)
  const pixels = context.createImageData(map.width, map.height)
  const words = new Uint32Array(pixels.data.buffer)
  const lookup = new Uint32Array(256)
  const span = high - low
  for (let b = 0; b < 256; b++) {
    const place = span > 0 ? (map.low + map.step * b - low) / span : low < 0 ? 0.5 : 0
    lookup[b] = colors[Math.round(Math.min(1, Math.max(0, place)) * (colors.length - 1))]
  }
  for (let i = 0; i < words.length; i++) words[i] = lookup[map.q[i]]
  context.putImageData(pixels, 0, 0)
  return canvas
}

export function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return '–'
  if (value === 0) return '0'
  const size = Math.abs(value)
  return size >= 1e-3 && size < 1e6 ? String(Number(value.toPrecision(3))) : value.toExponential(2)
}

export const percent = (value) => (value === null ? '–' : value > 0 && value < 0.001 ? '<0.1%' : `${(100 * value).toFixed(1)}%`)

// A bar that says what the colors mean.
export function bar(canvas, [low, high], colors, width = 160) {
  canvas.width = width
  canvas.height = 8
  const context = canvas.getContext('2d')
  const pixels = context.createImageData(width, 8)
  const words = new Uint32Array(pixels.data.buffer)
  for (let x = 0; x < width; x++) {
    const c = colors[Math.round((x / (width - 1)) * (colors.length - 1))]
    for (let y = 0; y < 8; y++) words[y * width + x] = c
  }
  context.putImageData(pixels, 0, 0)
  canvas.setAttribute('role', 'img')
  canvas.setAttribute('aria-label', `colors from ${number(low)} to ${number(high)}`)
  return canvas
}
