// Why: saliency maps side by side over the picture, with what each can be believed.

import { channel as one } from '#codec'
import { bar, number, percent, table } from '#color'
import { busy, failure, fill, fit, h, select, slider } from '#dom'
import { predictions } from '#overview'
import { PictureView } from '#picture'
import { bars } from '#plot'
import { set, state } from '#state'

const SIDE = 260
const STYLES = [['heat', 'over the picture'], ['spotlight', 'spotlight'], ['map', 'map alone']]

export class SaliencyView {
  constructor(source, root) {
    this.source = source
    this.tools = h('div.tools')
    this.cards = h('div.saliencies')
    this.side = h('aside')
    this.errors = h('div')
    this.chosen = new Set(source.manifest.saliency.map((e) => e.method))
    if (source.live && !this.chosen.size) this.chosen = new Set(['gradcam', 'smoothgrad'])
    fill(root, h('div.columns', {}, h('section', { 'aria-label': 'saliency maps' }, h('h2', {}, 'What drove the decision'), this.tools, this.errors, this.cards), this.side))
  }

  async show() {
    const s = state()
    const turn = (this.turn = (this.turn || 0) + 1)
    const { manifest, live } = this.source
    const entry = manifest.inputs[s.input]
    const said = entry.predictions[s.network]
    const target = s.target >= 0 ? s.target : said.target
    const net = manifest.networks[s.network]
    const named = (k) => said.top.find(([i]) => i === k)?.[1] ?? net.classes?.[k] ?? `class ${k}`
    this.bitmap = await this.source.picture(s.input)
    if (turn !== this.turn) return
    fill(this.tools,
      live ? select('why', this.classes(net, said, named), String(target), (v) => set({ target: Number(v) })) : h('span', {}, `why ${named(target)}`),
      live ? select('and not', [['-1', '–'], ...this.classes(net, said, named).filter(([k]) => Number(k) !== target)], String(s.against), (v) => set({ against: Number(v) })) : null,
      select('shown', STYLES, s.style, (style) => set({ style })),
      slider('opacity', 0, 1, 0.05, s.opacity, (opacity) => set({ opacity })),
      slider('smooth', 0, 6, 0.5, s.smooth, (smooth) => set({ smooth })),
      select('colors', [['auto', 'automatic'], ...Object.keys(manifest.colors).map((c) => [c, c])], s.colors, (colors) => set({ colors })),
      live ? select('add', [['', 'a method …'], ...manifest.methods.filter((m) => !this.chosen.has(m.name)).map((m) => [m.name, `${m.name} (${m.passes})`])], '', (m) => { this.chosen.add(m); this.show() }) : null)
    this.sided(entry, said)
    const wanted = [...this.chosen]
    const cards = wanted.map((method) => this.card(method, entry, target, s, turn))
    const refused = (manifest.refused || []).filter((r) => r.network === s.network)
    fill(this.cards, this.original(entry), cards, refused.map((r) => h('article.saliency', {}, h('h3', {}, r.method), h('p.note', {}, r.why))))
  }

  classes(net, said, named) {
    const all = net.classes ? net.classes.map((name, k) => [String(k), name]) : Array.from({ length: Math.min(net.outputs, 2000) }, (_, k) => [String(k), named(k)])
    const first = said.top.map(([k, label]) => [String(k), label])
    return [...first, ...all.filter(([k]) => !first.some(([f]) => f === k))]
  }

  sided(entry, said) {
    const { live } = this.source
    const answer = h('div', { 'aria-live': 'polite' })
    const picture = new PictureView(this.bitmap, entry.size, entry.frames[state().network], {
      width: 260, label: `${entry.name}: drag over a region to hide it`,
      brush: live ? (box) => this.hide(box, said, answer) : null,
    })
    fill(this.side, h('h2', {}, 'What it says'), predictions(this.source), h('h3', {}, 'Hide a region'), picture.element,
      live ? h('p.quiet', {}, 'Drag over the picture: the region is greyed and the network asked again.') : h('p.quiet', {}, 'Hiding regions needs the network: innersight view.'), answer)
  }

  async hide(box, said, answer) {
    fill(answer, busy('asking the network'))
    const turn = (this.hiding = (this.hiding || 0) + 1)
    try {
      const { network, input } = state()
      const found = await this.source.ask('hide', { network, input, box: [box.top, box.left, box.bottom, box.right] })
      if (turn !== this.hiding) return
      fill(answer, bars(found.top.map(([k, label, chance, score]) => {
        const before = said.top.find(([i]) => i === k)
        const was = before ? before[2] ?? before[3] : null
        return [label, chance ?? score, `${chance === null ? number(score) : percent(chance)}${was === null ? '' : ` (was ${chance === null ? number(was) : percent(was)})`}`]
      })))
    } catch (error) { if (turn === this.hiding) fill(answer, failure(error)) }
  }

  original(entry) {
    const picture = new PictureView(this.bitmap, entry.size, entry.frames[state().network], { width: SIDE, label: entry.name })
    return h('article.saliency', {}, h('h3', {}, 'The picture'), picture.element, h('p.quiet', {}, `${entry.name}, as the network gets it`))
  }

  find(method, target, s) {
    return this.source.manifest.saliency.find((e) => e.method === method && e.network === s.network && e.input === s.input
      && (e.target === target || !this.source.live) && (e.against ?? -1) === (this.source.live ? s.against : -1))
  }

  card(method, entry, target, s, turn) {
    const article = h('article.saliency', { 'data-method': method }, h('h3', {}, method), busy(this.source.live ? 'computing' : 'reading'))
    this.fillCard(article, method, entry, target, s, turn).catch((error) => {
      if (turn === this.turn) fill(article, h('h3', {}, method), failure(error))
    })
    return article
  }

  async fillCard(article, method, entry, target, s, turn) {
    let made = this.find(method, target, s)
    if (!made) {
      if (!this.source.live) { fill(article, h('h3', {}, method), h('p.note', {}, 'was not computed for this picture')); return }
      made = await this.compute(article, method, target, s)
      if (!this.source.manifest.saliency.some((e) => e.key === made.key)) this.source.manifest.saliency.push(made)
    }
    const maps = await this.source.get(made.key)
    if (turn !== this.turn) return
    const picture = new PictureView(this.bitmap, entry.size, entry.frames[s.network], { width: SIDE, label: `${method} for ${made.text}` })
    const colors = table(s.colors, made.signed, s.style !== 'map')
    lay(picture, one(maps, 0), made, colors, s)
    const verdict = Object.entries(made.verdict).filter(([k, v]) => !['blank', 'reference'].includes(k) && v !== null)
    fill(article, h('h3', {}, method), picture.element,
      h('div.key', {}, bar(h('canvas'), [made.scale.low, made.scale.high], colors), h('span', {}, made.scale.text)),
      h('p', {}, `for ${made.text}${made.layer ? `, at ${made.layer}` : ''}`),
      verdict.length ? h('dl', { 'aria-label': 'verdict' }, verdict.map(([k, v]) => [h('dt', {}, k.replaceAll('_', ' ')), h('dd', {}, typeof v === 'number' ? number(v) : String(v))])) : null,
      made.notes.length ? h('details', {}, h('summary', {}, 'how it was made'), h('ul', {}, made.notes.map((n) => h('li', {}, n)))) : null)
  }

  compute(article, method, target, s) {
    return this.source.job({ kind: 'explain', network: s.network, input: s.input, method, target, against: s.against },
      (...parts) => fill(article, h('h3', {}, method), parts))
  }
}

// A map over its picture: the same rules as draw/color.py's overlay.
function lay(picture, map, made, colors, s) {
  const { low, high, blank } = made.scale
  const [width, height] = [map.width, map.height]
  const values = blurred(map, s.smooth)
  const canvas = new OffscreenCanvas(width, height)
  const context = canvas.getContext('2d')
  const pixels = context.createImageData(width, height)
  const words = new Uint32Array(pixels.data.buffer)
  const span = high - low
  for (let i = 0; i < words.length; i++) {
    const place = blank || !(span > 0) ? (made.signed ? 0.5 : 0) : Math.min(1, Math.max(0, (values[i] - low) / span))
    const weight = made.signed ? Math.abs(2 * place - 1) : place
    if (s.style === 'spotlight') {
      const light = (made.signed ? Math.max(0, 2 * place - 1) : place) ** 0.7
      words[i] = Math.round(255 * s.opacity * 0.9 * (1 - light)) << 24
    } else {
      const alpha = s.style === 'map' ? 1 : s.opacity * Math.sqrt(weight)
      words[i] = (colors[Math.round(place * (colors.length - 1))] & 0xffffff) | (Math.round(255 * alpha) << 24)
    }
  }
  context.putImageData(pixels, 0, 0)
  picture.draw(s.style === 'heat')
  const over = fit(picture.over, picture.width, picture.height)
  over.imageSmoothingEnabled = width < picture.width / 2
  over.drawImage(canvas, 0, 0, picture.width, picture.height)
}

function blurred(map, sigma) {
  const { width, height, q, low, step } = map
  let values = Float32Array.from(q, (b) => low + step * b)
  if (!sigma) return values
  const reach = Math.ceil(3 * sigma)
  const kernel = Array.from({ length: 2 * reach + 1 }, (_, i) => Math.exp(-0.5 * ((i - reach) / sigma) ** 2))
  const total = kernel.reduce((a, b) => a + b)
  const fold = (i, n) => { const m = ((i % (2 * n)) + 2 * n) % (2 * n); return m < n ? m : 2 * n - 1 - m }
  for (const [n, stride, lines, jump] of [[width, 1, height, width], [height, width, width, 1]]) {
    const out = new Float32Array(values.length)
    for (let line = 0; line < lines; line++) {
      for (let i = 0; i < n; i++) {
        let sum = 0
        for (let k = -reach; k <= reach; k++) sum += kernel[k + reach] * values[line * jump + fold(i + k, n) * stride]
        out[line * jump + i * stride] = sum / total
      }
    }
    values = out
  }
  return values
}
