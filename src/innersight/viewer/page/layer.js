// A layer: its maps in a grid, and what one channel and one cell of them are.

import { channel as one } from '#codec'
import { bar, image, number, percent, range, table } from '#color'
import { overData } from '#dataset'
import { fill, fit, h, select, slider, busy, failure } from '#dom'
import { box, effective, lookers, padding } from '#field'
import { Grid } from '#grid'
import { thumbnail } from '#overview'
import { PictureView } from '#picture'
import { bars, histogram } from '#plot'
import { Missing, key } from '#source'
import { set, state } from '#state'

const SORTS = [['rms', 'activity'], ['index', 'number'], ['maximum', 'maximum'], ['zeros', 'fewest zeros'], ['relevance', 'relevance to the target']]

const FORMS = [['grid', 'maps'], ['table', 'table']]

const mean = (values) => values.reduce((a, v) => a + v, 0) / values.length

export class LayerView {
  constructor(source, root) {
    this.source = source
    this.grid = new Grid({ hover: (...a) => this.hover(...a), pick: (p) => set({ channel: this.names(p) }) })
    this.table = h('div.scroll', { tabIndex: 0, role: 'region', 'aria-label': 'channels in numbers' })
    this.rail = h('nav.rail', { 'aria-label': 'layers' })
    this.tools = h('div.tools')
    this.heading = h('header')
    this.note = h('div')
    this.inspector = h('aside.inspector', { tabIndex: 0, 'aria-label': 'picture and channel' })
    this.status = h('p.status', { 'aria-live': 'polite' })
    fill(root, h('div.three', {}, this.rail, h('section.main', { 'aria-label': 'feature maps' }, this.heading, this.tools, this.note, this.grid.element, this.table, this.status), this.inspector))
  }

  async show() {
    const s = state()
    const net = this.source.manifest.networks[s.network]
    this.layer = net.layers.find((l) => l.name === s.layer) || net.layers.find((l) => l.grid) || net.layers[0]
    this.railed(net)
    const turn = (this.turn = (this.turn || 0) + 1)
    const at = [s.network, s.input, this.layer.name]
    if (this.shown !== at.join('|')) {
      fill(this.note, busy('reading the maps'))
      try {
        const [maps, stats] = await Promise.all([this.source.get(key('maps', ...at)), this.source.get(key('stats', ...at))])
        if (turn !== this.turn) return
        Object.assign(this, { maps, stats, shown: at.join('|'), relevance: null })
        fill(this.note)
      } catch (error) {
        if (turn !== this.turn) return
        this.maps = null
        fill(this.note, error instanceof Missing ? h('p.note', {}, 'The maps of this layer on this picture were left out of this report to keep it small; '
          + 'write it again with a larger --max-mb.') : failure(error))
        this.head()
        return
      }
    }
    if (s.sort === 'relevance' && this.target() >= 0 && this.relevant !== `${this.shown}|${this.target()}`) {
      try {
        const found = await this.source.get(key('relevance', ...at, this.target()))
        if (turn !== this.turn) return
        this.relevance = found.relevance
        this.relevant = `${this.shown}|${this.target()}`
      } catch (error) {
        this.relevance = null
        fill(this.note, h('p.note', {}, `The relevance to this class is not known here (${error.message}); maps are sorted by activity.`))
      }
    }
    this.head()
    this.drawGrid()
    await this.inspect()
  }

  target() {
    const s = state()
    return s.target >= 0 ? s.target : this.source.manifest.inputs[s.input]?.predictions[s.network].target ?? -1
  }

  names(position) {
    return this.maps.channels ? this.maps.channels[position] : position
  }

  railed(net) {
    const s = state()
    const words = s.filter.toLowerCase()
    const stamp = `${s.network}|${s.input}|${words}`
    if (this.railStamp !== stamp) {
      this.railStamp = stamp
      fill(this.rail, h('input', { type: 'search', placeholder: 'filter layers (/)', value: s.filter, id: 'filter', 'aria-label': 'filter layers', oninput: (e) => set({ filter: e.target.value }) }),
        h('ul', {}, net.layers.filter((l) => !words || `${l.name} ${l.kind}`.toLowerCase().includes(words)).map((l) => h('li', {}, h('button', {
          type: 'button', onclick: () => set({ layer: l.name, channel: -1 }), title: l.name, 'data-layer': l.name,
        }, thumbnail(this.source, s.network, s.input, l, 28), h('span', {}, h('b', {}, l.name), h('small', {}, `${l.kind} ${(l.grid || l.shape).join('×')}`)))))))
    }
    for (const b of this.rail.querySelectorAll('button')) {
      const here = b.dataset.layer === this.layer.name
      if (here) b.setAttribute('aria-current', 'true')
      else b.removeAttribute('aria-current')
      if (here && this.railed.last !== this.layer.name) b.scrollIntoView({ block: 'nearest' })
    }
    this.railed.last = this.layer.name
    if (document.activeElement === document.body && words) document.getElementById('filter')?.focus()
  }

  head() {
    const s = state()
    const l = this.layer
    const f = l.receptive_field
    const q = l.quantised
    const facts = [l.kind, (l.grid || l.shape).join('×'), l.parameters ? `${l.parameters.toLocaleString('en')} parameters` : '', f ? `sees ${f.text}` : '',
      q ? `${q.dtype}, scale ${number(q.scale[0])}, zero point ${q.zero_point}` : '', q && this.stats ? `${percent(mean(this.stats.saturated))} saturated` : '',
      this.stats ? `${this.silent()} silent` : ''].filter(Boolean)
    fill(this.heading, h('h2', {}, l.name), h('p.quiet', {}, facts.join(' · ')), l.grid_note ? h('p.quiet', {}, l.grid_note) : null)
    fill(this.tools,
      select('as', FORMS, s.as, (as) => set({ as })),
      select('sort', SORTS, s.sort, (sort) => set({ sort })),
      select('scale', [['layer', 'one for the layer'], ['each', 'each map its own']], s.scale, (scale) => set({ scale })),
      select('colors', [['auto', 'automatic'], ...Object.keys(this.source.manifest.colors).map((c) => [c, c])], s.colors, (colors) => set({ colors })),
      slider('size', 16, 240, 4, this.size(), (size) => set({ size })))
    this.reduced()
  }

  // Of a map, in pixels: what was chosen, or what fits.
  size() {
    return state().size || (this.maps ? this.grid.best(this.maps.low.length, this.maps.q.shape) : 72)
  }

  // The integer that a quantised layer keeps for a value.
  integer(value) {
    const q = this.layer.quantised
    return q ? `, kept as ${Math.round(value / q.scale[0]) + q.zero_point}` : ''
  }

  silent() {
    return this.stats.maximum.reduce((n, v, i) => n + (v === this.stats.minimum[i] ? 1 : 0), 0)
  }

  reduced() {
    if (!this.maps) return
    const { of, down, size } = this.maps.about
    const parts = []
    if (this.maps.channels) parts.push(`the ${this.maps.channels.length} most active of ${of} channels`)
    if (down > 1) parts.push(`means of ${down}×${down} cells of ${size.join('×')}`)
    if (parts.length) fill(this.note, h('p.note', {}, `To keep the report small this layer is shown as ${parts.join(', ')}; --max-mb allows more.`))
  }

  drawGrid() {
    const s = state()
    const { maps, stats } = this
    const many = maps.low.length
    const numbers = this.relevance && s.sort === 'relevance' ? this.relevance : s.sort === 'relevance' ? stats.rms : stats[s.sort]
    const positions = Array.from({ length: many }, (_, i) => i)
    if (s.sort !== 'index') {
      const sign = s.sort === 'zeros' ? 1 : -1
      positions.sort((a, b) => sign * (numbers[this.names(a)] - numbers[this.names(b)]) || a - b)
    }
    this.signed = stats.about.signed
    const whole = range(Math.min(...maps.low), Math.max(...maps.high), this.signed)
    this.window = (p) => (s.scale === 'layer' ? whole : range(maps.low[p], maps.high[p], this.signed))
    this.colors = table(s.colors, this.signed)
    const caption = s.sort === 'index' || s.sort === 'rms' ? (p) => number(maps.high[p]) : (p) => number(numbers[this.names(p)])
    this.grid.element.hidden = s.as === 'table'
    this.table.hidden = s.as !== 'table'
    if (s.as === 'table') this.tabled(positions)
    else this.grid.show({ maps, order: positions, window: this.window, colors: this.colors, size: this.size(), picked: s.channel, names: (p) => this.names(p), caption })
    this.grid.look(this.region())
    const shown = s.scale === 'layer' ? `${number(whole[0])} to ${number(whole[1])}` : 'each map from its own range, the number below it is its maximum'
    this.key = h('div.key', {}, bar(h('canvas'), whole, this.colors), h('span', {}, shown))
  }

  // The grid in numbers: every channel, also those whose maps a report left out.
  tabled(positions) {
    const { stats } = this
    const shown = positions.map((p) => this.names(p))
    const rest = Array.from(stats.rms.keys()).filter((c) => !shown.includes(c))
    const columns = [['maximum', number], ['mean', number], ['rms', number], ['minimum', number], ['zeros', percent], ...(stats.saturated ? [['saturated', percent]] : [])]
    if (this.relevance) columns.push(['relevance', number])
    const value = (name, c) => (name === 'relevance' ? this.relevance : stats[name])[c]
    const wide = this.stats.about.size[1]
    const picked = state().channel
    fill(this.table, h('table.list', {}, h('caption', {}, `${this.layer.name}: ${stats.rms.length} channels, sorted as the maps are`),
      h('thead', {}, h('tr', {}, ['channel', ...columns.map(([name]) => name), 'largest at'].map((t) => h('th', { scope: 'col' }, t)))),
      h('tbody', {}, [...shown, ...rest].map((c) => h('tr', {},
        h('th', { scope: 'row' }, h('button', { type: 'button', 'aria-pressed': String(c === picked), onclick: () => set({ channel: c }) }, String(c))),
        columns.map(([name, say]) => h('td.number', {}, say(value(name, c)))),
        h('td.number', {}, `row ${Math.floor(stats.place[c] / wide)}, column ${stats.place[c] % wide}`))))))
  }

  // The cells that look at the pixel that was clicked, on the grid of what is shown.
  region() {
    if (!state().pixel || !this.layer.receptive_field) return null
    const [y, x] = state().pixel.split(',').map(Number)
    const found = lookers(this.layer, y, x)
    const down = this.maps.about.down
    return found && { rows: found.rows.map((r) => Math.floor(r / down)), columns: found.columns.map((c) => Math.floor(c / down)) }
  }

  async inspect() {
    const s = state()
    const turn = this.turn
    const entry = this.source.manifest.inputs[s.input]
    const frame = entry.frames[s.network]
    const bitmap = await this.source.picture(s.input)
    if (turn !== this.turn) return
    if (this.pictured !== `${s.network}|${s.input}`) {
      this.pictured = `${s.network}|${s.input}`
      this.picture = new PictureView(bitmap, entry.size, frame, { label: `${entry.name}, as the network gets it`, pick: (y, x) => set({ pixel: `${y},${x}` }) })
      this.cellNote = h('p.quiet.cell', {}, 'Point at a cell of a map: its receptive field is drawn here. Click here: the units that look at that pixel are marked.')
      this.strongest = h('div')
    }
    this.moved()
    const parts = [h('h3', {}, entry.name), this.picture.element, this.cellNote, this.strongest, this.key]
    const position = this.position(s.channel)
    if (position >= 0) parts.push(this.channelPanel(position))
    fill(this.inspector, parts)
    this.marked()
  }

  // The effective receptive field of this layer: in a report with the layer, live when it is first asked for.
  async moved() {
    const { layer } = this
    this.effective = layer.effective || null
    if (this.effective || !this.source.live || !layer.receptive_field) return
    const asked = key('effective', state().network, layer.name)
    try {
      const found = await this.source.get(asked)
      if (layer === this.layer) this.effective = Array.from(found.box)
    } catch { /* a layer without a gradient has none */ }
  }

  position(number_) {
    if (number_ < 0) return -1
    return this.maps.channels ? this.maps.channels.indexOf(number_) : number_ < this.maps.low.length ? number_ : -1
  }

  marked() {
    const { pixel } = state()
    if (!pixel) return
    const [y, x] = pixel.split(',').map(Number)
    this.picture.boxes([{ box: { top: y, bottom: y + 1, left: x, right: x + 1 }, color: '#00c2ff' }])
    const found = lookers(this.layer, y, x)
    fill(this.cellNote, !this.layer.receptive_field ? 'The receptive field of this layer is not known.' : !found ? `No unit of this layer looks at pixel (${x}, ${y}).`
      : `Rows ${found.rows.join('–')} and columns ${found.columns.join('–')} of this layer look at pixel (${x}, ${y}).`)
    if (found) this.strong(this.region(), 'strongest there')
  }

  // The channels with the largest values in a rectangle of cells.
  strong({ rows, columns }, title) {
    const [, height, width] = this.maps.q.shape
    const found = []
    for (let p = 0; p < this.maps.low.length; p++) {
      const map = one(this.maps, p)
      let most = -Infinity
      for (let y = rows[0]; y <= Math.min(rows[1], height - 1); y++) {
        for (let x = columns[0]; x <= Math.min(columns[1], width - 1); x++) most = Math.max(most, map.q[y * width + x])
      }
      found.push([map.low + map.step * most, p])
    }
    found.sort((a, b) => b[0] - a[0])
    const picked = state().channel
    fill(this.strongest, h('h4', {}, title), bars(found.slice(0, 6).map(([v, p]) => [`channel ${this.names(p)}`, v, number(v), this.names(p)]), { signed: this.signed, pick: (c) => set({ channel: c }), picked }))
  }

  hover(position, y, x) {
    if (!this.picture || !this.maps) return
    if (position === null) {
      if (state().pixel) this.marked()
      else this.picture.clear()
      fill(this.status)
      return
    }
    const map = one(this.maps, position)
    const down = this.maps.about.down
    const [cy, cx] = [y * down, x * down]
    const b = box(this.layer, Math.min(cy, this.layer.grid ? this.layer.grid[1] - 1 : 0), Math.min(cx, this.layer.grid ? this.layer.grid[2] - 1 : 0))
    const size = this.source.manifest.inputs[state().input].frames[state().network].size
    fill(this.status, `channel ${this.names(position)}, row ${cy}, column ${cx}: ${number(map.at(y, x))} (±${number(map.step / 2)})${this.integer(map.at(y, x))}`)
    if (!b) return
    const most = effective(this.layer, this.effective, Math.min(cy, this.layer.grid[1] - 1), Math.min(cx, this.layer.grid[2] - 1))
    this.picture.boxes([{ box: b }, ...(most ? [{ box: most, dashed: true, color: '#7fe3ff' }] : [])])
    const out = padding(b, size)
    fill(this.cellNote, `This cell sees ${b.right - b.left}×${b.bottom - b.top} pixels${this.layer.receptive_field.exact ? '' : ' at most'}`
      + `${out > 0 ? `, ${Math.round(100 * out)}% of them padding` : ''}.${most ? ` 90% of what moves it lies in ${most.right - most.left}×${most.bottom - most.top} (dashed).` : ''}`)
  }

  channelPanel(position) {
    const map = one(this.maps, position)
    const name = this.names(position)
    const scale = Math.max(1, Math.floor(288 / Math.max(map.width, map.height)))
    const wide = Math.max(map.width, map.height) > 288 ? 288 / Math.max(map.width, map.height) : scale
    const canvas = h('canvas', { role: 'img', 'aria-label': `channel ${name}, ${map.height} by ${map.width}, from ${number(map.low)} to ${number(map.high)}` })
    const context = fit(canvas, map.width * wide, map.height * wide)
    const window = range(map.low, map.high, this.signed)
    context.drawImage(image(map, window, this.colors), 0, 0, map.width * wide, map.height * wide)
    const value = h('p.quiet', {}, 'Point at it for a value.')
    canvas.addEventListener('mousemove', (e) => {
      const r = canvas.getBoundingClientRect()
      const y = Math.min(map.height - 1, Math.floor(((e.clientY - r.top) / r.height) * map.height))
      const x = Math.min(map.width - 1, Math.floor(((e.clientX - r.left) / r.width) * map.width))
      fill(value, `row ${y}, column ${x}: ${number(map.at(y, x))}`)
      this.hover(position, y, x)
    })
    const s = this.stats
    const facts = [['maximum', s.maximum[name]], ['mean', s.mean[name]], ['RMS', s.rms[name]], ['minimum', s.minimum[name]]]
    if (this.relevance) facts.push(['relevance', this.relevance[name]])
    if (s.saturated) facts.push(['saturated', percent(s.saturated[name])])
    const [filters, data] = [h('div'), h('div')]
    this.filters(name, filters)
    overData(this.source, state().network, this.layer.name, name).then((found) => { if (found) fill(data, found) })
    return h('section.channel', { 'aria-label': `channel ${name}` }, h('h3', {}, `Channel ${name}`), canvas, value,
      h('div.key', {}, bar(h('canvas'), window, this.colors), h('span', {}, `${number(window[0])} to ${number(window[1])}`)),
      h('dl', {}, facts.map(([k, v]) => [h('dt', {}, k), h('dd', {}, typeof v === 'string' ? v : number(v))]), h('dt', {}, 'zeros'), h('dd', {}, `${Math.round(100 * s.zeros[name])}%`)),
      histogram(map), data, filters, this.source.live && this.layer.grid ? this.preferred(name) : null)
  }

  // What the channel answers to most, found on the server when it is asked for.
  preferred(name) {
    const { network } = state()
    const layer = this.layer.name
    const room = h('div')
    const id = `${network}|${layer}|${name}`
    this.found ||= new Map()
    const shown = async (made) => {
      const bitmap = await this.source.drawn(made.key)
      const side = 240 / Math.max(bitmap.width, bitmap.height)
      const canvas = h('canvas', { role: 'img', 'aria-label': `the picture that channel ${name} answers to most` })
      const context = fit(canvas, bitmap.width * side, bitmap.height * side)
      context.imageSmoothingEnabled = side < 2
      context.drawImage(bitmap, 0, 0, bitmap.width * side, bitmap.height * side)
      const rise = made.verdict.rise
      fill(room, h('h4', {}, 'What maximises it'), canvas, rise === undefined ? null : h('p.quiet', {}, `${number(rise)} standard deviations above random pictures`))
    }
    const start = async () => {
      try {
        const made = await this.source.job({ kind: 'maximize', network, layer, channel: name }, (...parts) => fill(room, parts))
        this.found.set(id, made)
        await shown(made)
      } catch (error) { fill(room, failure(error), h('button', { type: 'button', onclick: start }, 'try again')) }
    }
    if (this.found.has(id)) shown(this.found.get(id))
    else fill(room, h('button.maximize', { type: 'button', onclick: start }, 'What maximises it'))
    return room
  }

  async filters(name, element) {
    let weight
    try {
      weight = (await this.source.get(key('filters', state().network, this.layer.name))).weight
    } catch { return } // a layer without weights
    const [out, inner, height, width] = weight.shape
    if (out !== (this.layer.grid || this.layer.shape)[0]) return
    const n = inner * height * width
    const own = weight.subarray(name * n, (name + 1) * n)
    const most = own.reduce((a, v) => Math.max(a, Math.abs(v)), 0) || 1
    const colors = table('auto', true)
    const order = Array.from({ length: inner }, (_, i) => i)
    const power = order.map((i) => own.subarray(i * height * width, (i + 1) * height * width).reduce((a, v) => a + v * v, 0))
    if (inner > 16) order.sort((a, b) => power[b] - power[a])
    const tiles = order.slice(0, 16).map((i) => {
      const part = own.subarray(i * height * width, (i + 1) * height * width)
      const map = { width, height, low: -most, step: (2 * most) / 255, q: Uint8Array.from(part, (v) => Math.round(((v + most) / (2 * most)) * 255)) }
      const zoom = Math.max(3, Math.floor(36 / Math.max(width, height)))
      const canvas = h('canvas', { width: width * zoom, height: height * zoom, title: `from input channel ${i}` })
      const context = canvas.getContext('2d')
      context.imageSmoothingEnabled = false
      context.drawImage(image(map, [-most, most], colors), 0, 0, width * zoom, height * zoom)
      return h('span.filter', {}, canvas, h('small', {}, String(i)))
    })
    fill(element, h('h4', {}, inner > 16 ? `Filter: the 16 strongest of ${inner} input channels` : 'Filter, by input channel'),
      h('div.filters', {}, tiles), h('p.quiet', {}, `±${number(most)}, blue is negative`))
  }
}
