// The network as a strip of layers, each with its most active map; the pictures, and what is said of them.

import { image, number, percent, range, table } from '#color'
import { fill, h, svg } from '#dom'
import { key } from '#source'
import { bars } from '#plot'
import { set, state } from '#state'

// Blocks: what stands before the last separator of a name.
export function block(name) {
  const cut = Math.max(name.lastIndexOf('.'), name.lastIndexOf('/'))
  return cut < 0 ? '' : name.slice(0, cut)
}

export function predictions(source, pickable = true) {
  const { input, network } = state()
  const said = source.manifest.inputs[input]?.predictions[network]
  if (!said) return h('p.note', {}, 'no picture yet')
  const net = source.manifest.networks[network]
  const rows = said.top.map(([k, label, chance, score]) => [label, chance ?? score, net.probabilities || chance !== null ? percent(chance) : number(score), k])
  const chosen = state().target >= 0 ? state().target : said.target
  return bars(rows, pickable ? { pick: (k) => set({ target: k }), picked: chosen } : {})
}

export function thumbnail(source, network, input, layer, size = 40) {
  const canvas = h('canvas.thumb', { width: size, height: size, 'aria-hidden': 'true' })
  source.get(key('stats', network, input, layer.name)).then((s) => {
    const [height, width] = s.thumbnail.shape
    if (height * width === 1) { canvas.classList.add('none'); return } // a vector has no picture
    const low = Math.min(...s.thumbnail)
    const high = Math.max(...s.thumbnail)
    const q = Uint8Array.from(s.thumbnail, (v) => (high > low ? Math.round((255 * (v - low)) / (high - low)) : 0))
    const map = { width, height, low, step: (high - low) / 255, q }
    const context = canvas.getContext('2d')
    context.imageSmoothingEnabled = false
    const scale = Math.min(size / width, size / height)
    const drawn = image(map, range(low, high, s.about.signed), table('auto', s.about.signed))
    context.drawImage(drawn, (size - width * scale) / 2, (size - height * scale) / 2, width * scale, height * scale)
  }, () => { canvas.classList.add('none') })
  return canvas
}

export function overview(source, root) {
  const { network, input } = state()
  const net = source.manifest.networks[network]
  const groups = []
  for (const layer of net.layers) {
    const name = block(layer.name)
    if (!groups.length || groups.at(-1).name !== name) groups.push({ name, layers: [] })
    groups.at(-1).layers.push(layer)
  }
  const card = (layer) => h('button.card', {
    type: 'button', title: layer.name, onclick: () => set({ view: 'layer', layer: layer.name, channel: -1 }),
  }, thumbnail(source, network, input, layer, 56), h('b', {}, layer.name.slice(block(layer.name).length).replace(/^[./]/, '') || layer.name),
  h('span', {}, layer.kind), h('span', {}, (layer.grid || layer.shape).join('×')))
  const strip = groups.map(({ name, layers }) => h('details.block', { open: groups.length <= 24 || layers.length === 1 },
    h('summary', {}, name || net.name, h('span.quiet', {}, ` ${layers.length}`), layers.length > 1 ? thumbnail(source, network, input, layers.at(-1), 22) : null),
    h('div.cards', {}, layers.map(card))))
  const facts = [
    ['input', net.input.join('×')], ['prepared', net.preparation || 'not stated'], ['layers', net.layers.length],
    ['parameters', net.parameters.toLocaleString('en')], ['outputs', net.outputs],
  ]
  fill(root, h('div.columns', {},
    h('section', { 'aria-label': 'layers' }, h('h2', {}, 'Layers in the order they run'), sizes(net), strip),
    h('aside', {}, h('h2', {}, 'What it says'), predictions(source), h('h2', {}, 'The network'),
      h('dl', {}, facts.map(([k, v]) => [h('dt', {}, k), h('dd', {}, String(v))])),
      net.notes.length ? h('details', {}, h('summary', {}, 'What was chosen on opening'), h('ul', {}, net.notes.map((n) => h('li', {}, n)))) : null)))
}

// How the picture shrinks and the channels grow along the network.
function sizes(net) {
  const spatial = net.layers.filter((l) => l.grid)
  if (spatial.length < 2) return null
  const [width, height] = [600, 54]
  const tall = Math.max(...spatial.map((l) => Math.log2(1 + l.grid[1])))
  const wide = Math.max(...spatial.map((l) => Math.log2(1 + l.grid[0])))
  const step = width / spatial.length
  const drawing = svg('svg', { viewBox: `0 0 ${width} ${height}`, class: 'sizes', role: 'img', preserveAspectRatio: 'none',
    'aria-label': `maps shrink from ${spatial[0].grid[1]} to ${spatial.at(-1).grid[1]} cells while channels go from ${spatial[0].grid[0]} to ${spatial.at(-1).grid[0]}` })
  spatial.forEach((l, i) => {
    const t = (Math.log2(1 + l.grid[1]) / tall) * (height - 4)
    const deep = 0.25 + (0.75 * Math.log2(1 + l.grid[0])) / wide
    drawing.append(svg('rect', { x: i * step, y: height - t, width: Math.max(step - 1, 0.5), height: t, class: 'bar', opacity: deep },
      svg('title', {}, `${l.name}: ${l.grid.join('×')}`)))
  })
  return h('figure.plain', {}, drawing, h('figcaption', {}, 'height: side of the maps; darkness: channels (both logarithmic)'))
}
