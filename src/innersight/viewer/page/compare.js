// Two networks beside each other: the same layer of both on one scale, one cursor in both.

import { channel as one } from '#codec'
import { bar, image, number, range, table } from '#color'
import { busy, failure, fill, fit, h, select } from '#dom'
import { bars } from '#plot'
import { key } from '#source'
import { set, state } from '#state'

export class CompareView {
  constructor(source, root) {
    this.source = source
    this.list = h('nav.rail', { 'aria-label': 'pairs of layers' })
    this.main = h('section.main', { 'aria-label': 'maps of both' })
    fill(root, h('div.two', {}, this.list, this.main))
  }

  async show() {
    const s = state()
    const { manifest } = this.source
    if (manifest.networks.length < 2) { fill(this.main, h('p.note', {}, 'There is one network here. Name two: innersight view A B --compare.')); return }
    const turn = (this.turn = (this.turn || 0) + 1)
    const [a, b] = manifest.networks
    const comparison = manifest.comparison
    const pairs = (comparison || []).map((p) => [p.a, p.b, p])
    if (!pairs.length) { fill(this.main, h('p.note', {}, 'No layer of one could be paired with a layer of the other.')); return }
    const [x, y, pair] = pairs.find(([p]) => p === s.layer) || pairs[0]
    fill(this.list, h('ul', {}, pairs.map(([p, q, numbers]) => h('li', {}, h('button', { type: 'button', 'aria-current': p === x ? 'true' : null, onclick: () => set({ layer: p }) },
      h('span', {}, h('b', {}, p), q === p ? null : h('small', {}, q), h('small', {}, numbers.equal ? 'equal' : `${number(numbers.sqnr)} dB, cosine ${number(numbers.cosine)}`)))))))
    fill(this.main, busy('reading the maps of both'))
    try {
      const [p, q] = await Promise.all([this.source.get(key('maps', 0, s.input, x)), this.source.get(key('maps', 1, s.input, y))])
      if (turn !== this.turn) return
      this.both(p, q, pair, a, b)
    } catch (error) { if (turn === this.turn) fill(this.main, failure(error)) }
  }

  // Channels may stand in another order in the second.
  both(p, q, pair, a, b) {
    const s = state()
    const [x, y] = [pair.a, pair.b]
    const other = (i) => (pair.order ? pair.order[i] : i)
    const same = String(p.q.shape) === String(q.q.shape)
    const count = Math.min(p.low.length, q.low.length)
    const order = Array.from({ length: count }, (_, i) => i)
    const distance = order.map((i) => (same ? difference(one(p, i), one(q, other(i))) : 0))
    if (s.sort !== 'index') order.sort((i, j) => distance[j] - distance[i])
    const signed = Math.min(...p.low, ...q.low) < 0
    const window = range(Math.min(...p.low, ...q.low), Math.max(...p.high, ...q.high), signed)
    const colors = table(s.colors, signed)
    const value = h('p.status', { 'aria-live': 'polite' })
    const rows = order.slice(0, 64).map((i) => {
      const maps = [one(p, i), one(q, other(i))]
      const canvases = maps.map((m) => paint(m, window, colors))
      const off = same ? paint(minus(...maps), ...minusWindow(...maps)) : null
      const all = [...canvases, ...(off ? [off] : [])]
      for (const c of canvases) {
        c.addEventListener('mousemove', (e) => {
          const r = c.getBoundingClientRect()
          const [u, v] = [(e.clientX - r.left) / r.width, (e.clientY - r.top) / r.height]
          const at = (m) => m.at(Math.min(m.height - 1, Math.floor(v * m.height)), Math.min(m.width - 1, Math.floor(u * m.width)))
          fill(value, `channel ${i}: ${number(at(maps[0]))} in ${a.name}, ${number(at(maps[1]))} in ${b.name}`)
          for (const beside of all) {
            const cursor = beside.nextElementSibling
            Object.assign(cursor.style, { left: `${100 * u}%`, top: `${100 * v}%` })
            beside.parentElement.classList.add('linked')
          }
        })
        c.addEventListener('mouseleave', () => all.forEach((o) => o.parentElement.classList.remove('linked')))
      }
      return h('tr', {}, h('th', { scope: 'row' }, other(i) === i ? String(i) : `${i}, ${other(i)}`), all.map((c) => h('td', {}, h('span.linkable', {}, c, h('i.cursor')))), h('td.number', {}, same ? number(distance[i]) : '–'))
    })
    fill(this.main, h('header', {}, h('h2', {}, x === y ? x : `${x} and ${y}`), h('p.quiet', {}, `paired by ${pair.how}${pair.equal ? ', equal in every value' : `, signal to noise ${number(pair.sqnr)} dB, cosine ${number(pair.cosine)}`}`), h('div.tools', {}, select('sort', [['rms', 'largest difference'], ['index', 'number']], s.sort === 'index' ? 'index' : 'rms', (sort) => set({ sort })))),
      h('div.sides', {}, [0, 1].map((m) => h('section', {}, h('h3', {}, this.source.manifest.networks[m].name), said(this.source, m)))),
      h('div.key', {}, bar(h('canvas'), window, colors), h('span', {}, `${number(window[0])} to ${number(window[1])}, the same in both`)),
      same ? null : h('p.note', {}, `Their shapes differ (${p.q.shape.join('×')} and ${q.q.shape.join('×')}), so no difference is drawn.`), value,
      h('table.pairs', {}, h('thead', {}, h('tr', {}, ['channel', a.name, b.name, ...(same ? ['difference'] : []), 'RMS of the difference'].map((t) => h('th', { scope: 'col' }, t)))), h('tbody', {}, rows)),
      count > 64 ? h('p.quiet', {}, `64 of ${count} channels are shown.`) : null)
  }
}

function said(source, network) {
  const top = source.manifest.inputs[state().input].predictions[network].top
  return bars(top.map(([, label, chance, score]) => [label, chance ?? score, chance === null ? number(score) : `${(100 * chance).toFixed(1)}%`]))
}

function minus(a, b) {
  const low = a.low - b.high
  const high = a.high - b.low
  const step = (high - low) / 255
  const q = Uint8Array.from(a.q, (v, i) => (step ? Math.round((a.low + a.step * v - b.low - b.step * b.q[i] - low) / step) : 0))
  return { width: a.width, height: a.height, low, high, step, q }
}

function minusWindow(a, b) {
  const most = Math.max(Math.abs(a.high - b.low), Math.abs(a.low - b.high)) / 4 || 1
  return [[-most, most], table('auto', true)]
}

function difference(a, b) {
  let sum = 0
  for (let i = 0; i < a.q.length; i++) sum += (a.low + a.step * a.q[i] - b.low - b.step * b.q[i]) ** 2
  return Math.sqrt(sum / a.q.length)
}

function paint(map, window, colors, side = 96) {
  const canvas = h('canvas')
  const zoom = side / Math.max(map.width, map.height)
  fit(canvas, map.width * zoom, map.height * zoom).drawImage(image(map, window, colors), 0, 0, map.width * zoom, map.height * zoom)
  return canvas
}
