// A data set: what a scan found in it, where the network errs, and what each channel answers to.

import { number, percent } from '#color'
import { busy, failure, fill, h, select, svg } from '#dom'
import { bars } from '#plot'
import { Missing, key } from '#source'
import { set, state } from '#state'

const PARTS = [['findings', 'Findings'], ['images', 'Images'], ['channels', 'Channels']]
const MATRIX = 24 // classes whose confusion is drawn as a matrix
const SHOWN = 100 // rows at a time
const ORDERS = [['number', 'number'], ['selectivity', 'selectivity for a class'], ['zeros', 'share of zeros'], ['max', 'maximum'], ['correlation', 'likeness to another']]
const KINDS = [['all', 'all'], ['dead', 'that never fire'], ['on', 'that always fire'], ['twins', 'that go with another']]
const ALIKE = 0.99

export const scanOf = (source, network) => source.manifest.scans?.[network] || null

export const brief = (name) => name.split(/[/\\]/).at(-1)

export class DatasetView {
  constructor(source, root) {
    this.source = source
    this.head = h('header')
    this.body = h('div')
    fill(root, h('section.dataset', { 'aria-label': 'data set' }, this.head, this.body))
  }

  async show() {
    const s = state()
    const scan = scanOf(this.source, s.network)
    const turn = (this.turn = (this.turn || 0) + 1)
    if (!scan) { fill(this.head, h('p.note', {}, 'There is no scan of this network here: innersight scan makes one, --scan shows it.')); fill(this.body); return }
    const facts = [`${scan.images.toLocaleString('en')} images`, scan.skipped ? `${scan.skipped} could not be read` : '', scan.accuracy === null ? '' : `${percent(scan.accuracy)} right`, `${scan.layers.length} layers`].filter(Boolean)
    fill(this.head, h('h2', {}, scan.name), h('p.quiet', {}, facts.join(' · ')),
      h('div.tools', { role: 'group', 'aria-label': 'parts' }, PARTS.map(([id, text]) => h('button', { type: 'button', 'aria-pressed': String(id === s.part), onclick: () => set({ part: id }) }, text))))
    const parts = { findings: () => this.findings(scan), images: () => this.images(scan, turn), channels: () => this.channels(scan, turn) }
    try {
      await (parts[s.part] || parts.findings)()
    } catch (error) {
      if (turn === this.turn) fill(this.body, missing(error, 'This part was left out of this report to keep it small; write it again with a larger --max-mb.'))
    }
  }

  findings(scan) {
    const { network } = state()
    const layers = this.source.manifest.networks[network].layers
    const cards = scan.findings.map((found, n) => {
      const room = h('div')
      if (found.picture) drawn(this.source, key('gallery', network, n), room, `${found.kind}: ${found.text}`, 900)
      const links = found.items.filter((one) => layers.some((l) => l.name === one.layer)).map((one) => h('li', {}, `${one.layer}: `,
        one.channels.map((c) => h('button.small', { type: 'button', onclick: () => set({ view: 'layer', layer: one.layer, channel: c }) }, String(c)))))
      return h('article.finding', {}, h('h3', {}, found.kind), h('p', {}, `${found.text}.`), h('p.quiet', {}, `${found.evidence}.`), h('p', {}, h('b', {}, 'What one might do: '), `${found.advice}.`),
        links.length ? h('details', {}, h('summary', {}, 'where'), h('ul.where', {}, links)) : null, room)
    })
    fill(this.body, cards.length ? cards : h('p.note', {}, 'Nothing stood out.'),
      scan.notes.length ? h('details', {}, h('summary', {}, 'how it was counted'), h('ul', {}, scan.notes.map((n) => h('li', {}, n)))) : null)
  }

  // -- images

  async images(scan, turn) {
    const s = state()
    if (this.listed !== s.network) {
      fill(this.body, busy('reading the list of images'))
      const found = await this.source.get(key('images', s.network))
      if (turn !== this.turn) return
      this.rows = Array.from(found.image, (number_, i) => ({
        number: number_, label: found.label?.[i] ?? -1, prediction: found.prediction?.[i] ?? -1, runner: found.runner_up?.[i] ?? -1, confidence: found.confidence?.[i] ?? NaN, share: found.label_probability?.[i] ?? NaN,
      }))
      const names = split(found.names)
      this.rows.forEach((r, i) => { r.name = names[i] })
      this.of = found.about.of
      this.listed = s.network
    }
    const named = (k) => (k < 0 ? '–' : scan.classes[k])
    const [of, as] = s.pair ? s.pair.split(',').map(Number) : [-1, -1]
    const wanted = this.rows.filter((r) => (s.pair ? r.label === of && r.prediction === as : s.only === 'all' || (r.label >= 0 && (r.label === r.prediction) === (s.only === 'right'))))
    const count = Math.min(wanted.length, s.rows)
    const look = scan.open && this.source.live
    const said = h('p.status', { 'aria-live': 'polite' })
    const rows = wanted.slice(0, count).map((r) => h('tr', { className: r.label >= 0 && r.label !== r.prediction ? 'wrong' : '' },
      h('th', { scope: 'row', title: r.name }, look ? h('button', { type: 'button', onclick: () => this.look(r, said) }, brief(r.name)) : brief(r.name)),
      h('td', {}, named(r.label)), h('td', {}, r.prediction < 0 ? '–' : `${named(r.prediction)}${r.label >= 0 && r.label !== r.prediction ? ' ✗' : ''}`),
      h('td.number', {}, percent(nullish(r.confidence))), h('td.number', {}, percent(nullish(r.share))), h('td', {}, named(r.runner))))
    const filter = s.pair ? h('span', {}, `${named(of)} taken for ${named(as)} `, h('button', { type: 'button', onclick: () => set({ pair: '' }) }, 'all images'))
      : select('shown', [['all', 'all'], ['wrong', 'wrong answers'], ['right', 'right answers']], s.only, (only) => set({ only, rows: SHOWN }))
    fill(this.body, h('div.columns', {},
      h('section', { 'aria-label': 'images' }, h('div.tools', {}, filter, h('span.quiet', {}, `${count} of ${wanted.length.toLocaleString('en')} are listed`
        + `${this.of > this.rows.length ? `; the page holds ${this.rows.length.toLocaleString('en')} of ${this.of.toLocaleString('en')} images, the wrong ones and the least certain first` : ''}`)),
      h('p.quiet', {}, `${scan.confusion.length ? 'Wrong answers first, the most confident first' : 'The least certain first'}.${look ? ' Pick one to look at it.' : ''}`), said,
      h('div.scroll', { tabIndex: 0, role: 'region', 'aria-label': 'list of images' }, h('table.list', {}, h('thead', {}, h('tr', {}, ['image', 'label', 'prediction', 'confidence', 'label’s probability', 'runner-up'].map((t) => h('th', { scope: 'col' }, t)))), h('tbody', {}, rows))),
      count < wanted.length ? h('button', { type: 'button', onclick: () => set({ rows: s.rows + SHOWN }) }, 'more') : null),
      h('aside', {}, this.confusion(scan, of, as))))
  }

  async look(row, said) {
    fill(said, busy(`reading ${brief(row.name)}`))
    try {
      const { network } = state()
      const entry = await this.source.ask('scanned', { network, image: row.number })
      if (!this.source.manifest.inputs.some((one) => one.id === entry.id)) this.source.manifest.inputs.push(entry)
      set({ view: 'saliency', input: entry.id, target: -1, against: -1, pixel: '' })
    } catch (error) { fill(said, failure(error)) }
  }

  confusion(scan, of, as) {
    const labelled = scan.confusion.length > 0
    if (!labelled) return h('p.note', {}, 'The images have no labels that name classes of this network, so nothing is said of right and wrong.')
    const classes = [...new Set(scan.confusion.flatMap(([a, b]) => [a, b]))].sort((a, b) => a - b)
    const wrong = scan.confusion.filter(([a, b]) => a !== b).sort((a, b) => b[2] - a[2])
    const pick = (a, b) => set({ pair: `${a},${b}`, rows: SHOWN })
    const list = wrong.length ? bars(wrong.slice(0, 12).map(([a, b, n]) => [`${scan.classes[a]} → ${scan.classes[b]}`, n, String(n), `${a},${b}`]), { pick: (p) => pick(...p.split(',')), picked: `${of},${as}` }) : h('p.quiet', {}, 'No wrong answer.')
    const parts = [h('h3', {}, 'Taken for another'), list]
    if (classes.length <= MATRIX) parts.push(h('h3', {}, 'Confusion'), this.matrix(scan, classes, pick, of, as))
    return parts
  }

  // Shades are shares of a label's images.
  matrix(scan, classes, pick, of, as) {
    const counts = new Map(scan.confusion.map(([a, b, n]) => [`${a},${b}`, n]))
    const total = new Map(classes.map((a) => [a, classes.reduce((sum, b) => sum + (counts.get(`${a},${b}`) || 0), 0)]))
    const cell = (a, b) => {
      const n = counts.get(`${a},${b}`) || 0
      if (!n) return h('td')
      const text = `${scan.classes[a]} taken for ${scan.classes[b]}: ${n}`
      const button = h('button', { type: 'button', title: text, 'aria-label': text, 'aria-pressed': String(a === of && b === as), onclick: () => pick(a, b) }, String(n))
      button.style.setProperty('--share', n / total.get(a))
      return h('td', {}, button)
    }
    const shades = h('div.key', {}, h('span.shades'), h('span', {}, 'none to all of the images of a label'))
    return h('div.scroll', { tabIndex: 0, role: 'region', 'aria-label': 'confusion' }, h('table.matrix', {}, h('caption', {}, 'rows: labels, columns: predictions'),
      h('thead', {}, h('tr', {}, h('td'), classes.map((b) => h('th', { scope: 'col', title: scan.classes[b] }, h('span', {}, scan.classes[b]))))),
      h('tbody', {}, classes.map((a) => h('tr', {}, h('th', { scope: 'row' }, scan.classes[a]), classes.map((b) => cell(a, b)))))), shades)
  }

  // -- channels

  async channels(scan, turn) {
    const s = state()
    const name = scan.layers.includes(s.layer) ? s.layer : scan.layers[0]
    fill(this.body, busy(`reading ${name}`))
    const found = await this.source.get(key('channels', s.network, name))
    if (turn !== this.turn) return
    const kinds = { all: () => true, dead: (c) => found.max[c] === found.min[c] || found.fires[c] === 0, on: (c) => found.min[c] > 0 && found.max[c] > found.min[c], twins: (c) => found.correlation[c] > ALIKE }
    const wanted = Array.from(found.mean, (_, c) => c).filter(kinds[s.kind] || kinds.all)
    if (s.order !== 'number' && found[s.order]) {
      const value = (c) => (Number.isNaN(found[s.order][c]) ? -Infinity : found[s.order][c])
      wanted.sort((a, b) => value(b) - value(a) || a - b)
    }
    const count = Math.min(wanted.length, s.rows)
    fill(this.body, h('div.tools', {}, select('layer', scan.layers.map((l) => [l, l]), name, (layer) => set({ layer, channel: -1, rows: SHOWN })),
      select('channels', KINDS, s.kind, (kind) => set({ kind, rows: SHOWN })), select('sort', ORDERS, s.order, (order) => set({ order })),
      h('span.quiet', {}, `${wanted.length} of ${found.mean.length} channels`)),
    h('ol.strips', {}, wanted.slice(0, count).map((c) => h('li', {}, h('button', { type: 'button', title: `channel ${c} of ${name}`, onclick: () => set({ view: 'layer', layer: name, channel: c }) }, `channel ${c}`),
      this.strip(name, c, found), h('p.quiet', {}, facts(found, c, scan))))),
    count < wanted.length ? h('button', { type: 'button', onclick: () => set({ rows: s.rows + SHOWN }) }, 'more') : null)
  }

  // Drawn when it comes into sight.
  strip(name, channel, found) {
    const room = h('div.strip-room')
    if (!found.crops[channel]) { fill(room, h('p.quiet', {}, found.max[channel] === found.min[channel] ? 'one value everywhere: no crops' : 'no crops were drawn')); return room }
    const { network } = state()
    const seen = new IntersectionObserver(([entry]) => {
      if (!entry.isIntersecting) return
      seen.disconnect()
      drawn(this.source, key('strip', network, name, channel), room, `what channel ${channel} saw in its top images: ${tops(found, channel)}`, 720)
    })
    seen.observe(room)
    return room
  }
}

async function drawn(source, asked, room, text, wide) {
  try {
    const bitmap = await source.drawn(asked)
    const canvas = h('canvas.wide', { width: bitmap.width, height: bitmap.height, role: 'img', 'aria-label': text, style: { maxWidth: `${Math.min(wide, 2 * bitmap.width)}px` } })
    canvas.getContext('2d').drawImage(bitmap, 0, 0)
    fill(room, canvas)
  } catch (error) { fill(room, missing(error, 'The crops were left out of this report to keep it small.')) }
}

const nullish = (value) => (Number.isNaN(value) ? null : value)

const split = (names) => new TextDecoder().decode(names).split('\0')

function missing(error, text) {
  return error instanceof Missing ? h('p.note', {}, text) : failure(error)
}

function tops(found, c) {
  const k = found.top_image.shape[1]
  found.called ||= new Map(split(found.names).map((name, i) => [found.named[i], brief(name)]))
  return Array.from({ length: k }, (_, i) => c * k + i).filter((i) => found.top_image[i] >= 0)
    .map((i) => `${found.called.get(found.top_image[i])} ${number(found.top_value[i])}`).join(', ')
}

function facts(found, c, scan) {
  const parts = [`${number(found.min[c])} to ${number(found.max[c])}, mean ${number(found.mean[c])}`, `${percent(nullish(found.zeros[c]))} zeros`]
  if (found.class[c] >= 0 && !Number.isNaN(found.selectivity[c])) parts.push(`its mean is highest for ${scan.classes[found.class[c]]} (${percent(found.selectivity[c])} of its variance by class)`)
  if (found.correlation[c] > 0.9) parts.push(`goes with channel ${found.nearest[c]} (${found.correlation[c].toFixed(3)})`)
  return parts.join(' · ')
}

// A channel over the data set, for the panel of the layer view.
export async function overData(source, network, layer, channel) {
  const scan = scanOf(source, network)
  if (!scan || !scan.layers.includes(layer)) return null
  const title = h('h4', {}, `Over ${scan.images.toLocaleString('en')} images of ${scan.name}`)
  try {
    const found = await source.get(key('channels', network, layer))
    const room = h('div')
    if (found.crops[channel]) drawn(source, key('strip', network, layer, channel), room, `what channel ${channel} saw in its top images: ${tops(found, channel)}`, 290)
    return h('section.over-data', { 'aria-label': 'over the data set' }, title, room, h('p.quiet', {}, `Strongest in ${tops(found, channel) || 'no image'}.`), h('p.quiet', {}, facts(found, channel, scan)), spread(found, channel))
  } catch (error) { return h('section.over-data', {}, title, missing(error, 'left out of this report to keep it small')) }
}

// The histogram of a channel over the data set: bins are finer near zero.
function spread(found, channel, width = 288, height = 60) {
  const [, bins] = found.histogram.shape
  const own = found.histogram.subarray(channel * bins, (channel + 1) * bins)
  const first = own.findIndex((v) => v > 0)
  if (first < 0) return null
  const last = own.findLastIndex((v) => v > 0)
  const bar_ = width / (last - first + 1)
  const [low, high] = [found.edges[2 * first], found.edges[2 * last + 1]]
  const drawing = svg('svg', { viewBox: `0 0 ${width} ${height}`, width, height, role: 'img', 'aria-label': `histogram over the data set, from ${number(low)} to ${number(high)}` })
  for (let i = first; i <= last; i++) {
    const tall = (own[i] / 255) * (height - 2)
    drawing.append(svg('rect', { x: (i - first) * bar_, y: height - tall, width: Math.max(bar_ - 1, 0.5), height: tall, class: 'bar' },
      svg('title', {}, `${number(found.edges[2 * i])} to ${number(found.edges[2 * i + 1])}`)))
  }
  return h('figure', {}, drawing, h('figcaption', {}, h('span', {}, number(low)), h('span', {}, 'roots of counts, bins by powers of two'), h('span', {}, number(high))))
}
