// The page: what is at the top of it, which view is shown, and the keys.

import * as color from '#color'
import { CompareView } from '#compare'
import { DatasetView } from '#dataset'
import { failure, fill, h } from '#dom'
import { LayerView } from '#layer'
import { overview } from '#overview'
import { SaliencyView } from '#saliency'
import { connect, open } from '#source'
import { begin, set, state, subscribe } from '#state'

const VIEWS = [['overview', 'Overview'], ['layer', 'Feature maps'], ['saliency', 'Saliency'], ['dataset', 'Data set'], ['compare', 'Compare']]
const there = (view) => (view === 'compare' ? source.manifest.networks.length > 1 : view === 'dataset' ? Boolean(source.manifest.scans?.some(Boolean)) : true)
const offered = () => VIEWS.filter(([v]) => there(v))
const KEYS = [['1 … 5', 'views'], ['j k', 'next and previous layer'], ['[ ]', 'previous and next picture'], ['arrows', 'move in the grid'], ['s', 'next way to sort'],
  ['n', 'scale of the layer or of each map'], ['+ −', 'larger and smaller maps'], ['m', 'next way to show saliency'], ['o p', 'less and more opaque'], ['/', 'filter layers'],
  ['t', 'light or dark'], ['c', 'copy the link'], ['?', 'this list'], ['Esc', 'close, unmark']]

let source
let views = {}

export async function start() {
  const app = document.getElementById('app')
  try {
    source = open() || await connect()
    themed()
    color.begin(source.manifest.colors)
    begin()
    if (!offered().some(([v]) => v === state().view)) set({ view: 'overview' })
    layout(app)
    subscribe(changed)
    document.addEventListener('keydown', pressed)
    await render()
  } catch (error) {
    fill(app, failure(error))
    throw error
  } finally {
    document.documentElement.dataset.ready = '1'
  }
}

function themed(name) {
  let kept = null
  try { kept = localStorage.getItem('innersight-theme') } catch { /* not in a frame */ }
  const chosen = name || kept || (matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light')
  document.documentElement.dataset.theme = chosen
  if (name) try { localStorage.setItem('innersight-theme', name) } catch { /* not in a frame */ }
}

let tabs, strip, root, dialog, networks
function layout(app) {
  const { manifest } = source
  tabs = h('nav.tabs', { 'aria-label': 'views' })
  strip = h('div.strip', { role: 'listbox', 'aria-label': 'pictures' })
  networks = h('div.networks')
  root = h('main', { id: 'view' })
  dialog = h('dialog', { 'aria-label': 'keys' }, h('h2', {}, 'Keys'), h('dl', {}, KEYS.map(([k, what]) => [h('dt', {}, k), h('dd', {}, what)])),
    h('form', { method: 'dialog' }, h('button', {}, 'close')))
  fill(app, h('header.top', {}, h('h1', {}, manifest.title), h('span.badge', {}, source.live ? 'live' : 'report'), tabs, networks,
    h('button', { type: 'button', title: 'light or dark (t)', 'aria-label': 'light or dark', onclick: () => toggleTheme() }, '◐'),
    h('button', { type: 'button', title: 'keys (?)', 'aria-label': 'keys', onclick: () => dialog.showModal() }, '?')),
  h('section', { 'aria-label': 'pictures' }, strip), root, h('footer', {}, `${manifest.generator}${manifest.reduced?.length ? ` · ${manifest.reduced.length} maps were made smaller or left out to fit ${(manifest.limit / 1e6).toFixed(0)} MB` : ''}`), dialog)
}

function toggleTheme() {
  themed(color.dark() ? 'light' : 'dark')
  views = {}
  render()
}

async function pictures() {
  const s = state()
  if (strip.dataset.count !== String(source.manifest.inputs.length)) {
    strip.dataset.count = source.manifest.inputs.length
    fill(strip, source.manifest.inputs.map((one) => {
      const canvas = h('canvas', { width: 44, height: 44, 'aria-hidden': 'true' })
      source.picture(one.id).then((bitmap) => {
        const side = Math.min(bitmap.width, bitmap.height)
        canvas.getContext('2d').drawImage(bitmap, (bitmap.width - side) / 2, (bitmap.height - side) / 2, side, side, 0, 0, 44, 44)
      }, () => {})
      return h('button', { type: 'button', role: 'option', 'data-input': one.id, title: one.name, onclick: () => set({ input: one.id, target: -1, against: -1, pixel: '' }) },
        canvas, h('span', {}, h('b', {}, one.name), h('small', {}, one.predictions[0]?.top[0]?.[1] ?? '')))
    }), source.live ? uploader() : null)
  }
  for (const b of strip.querySelectorAll('[data-input]')) b.setAttribute('aria-selected', String(Number(b.dataset.input) === s.input))
}

function uploader() {
  const input = h('input', { type: 'file', accept: 'image/*', hidden: true, onchange: () => send(input.files[0]) })
  return h('span', {}, input, h('button', { type: 'button', onclick: () => input.click() }, '+ picture'))
}

async function send(file) {
  if (!file) return
  let said
  try { said = await source.add(file) } catch (error) { fill(root, failure(error)); return }
  source.manifest.inputs.push(said)
  set({ input: said.id, target: -1, against: -1, pixel: '' })
  render()
}

function changed(now, before) {
  if (now.view !== before.view) delete views[now.view]
  render()
}

async function render() {
  const s = state()
  const { manifest } = source
  if (s.input >= manifest.inputs.length || s.input < 0) {
    if (manifest.inputs.length) return set({ input: 0 })
    if (s.view !== 'dataset') return empty()
  }
  if (s.network >= manifest.networks.length || s.network < 0) return set({ network: 0 })
  fill(tabs, offered().map(([v, name], i) => h('a', {
    href: `#view=${v}`, title: `${name} (${i + 1})`, 'aria-current': v === s.view ? 'page' : null, onclick: (e) => { e.preventDefault(); set({ view: v }) },
  }, name)))
  fill(networks, manifest.networks.length > 1 && s.view !== 'compare' ? manifest.networks.map((n) => h('button', { type: 'button', 'aria-pressed': String(n.id === s.network), onclick: () => set({ network: n.id, target: -1 }) }, n.name)) : null)
  pictures()
  root.dataset.view = s.view
  try {
    if (s.view === 'overview') overview(source, root)
    else {
      const make = { layer: LayerView, saliency: SaliencyView, compare: CompareView, dataset: DatasetView }[s.view]
      const view = (views[s.view] ||= new make(source, root))
      await view.show()
    }
  } catch (error) {
    fill(root, failure(error))
    throw error
  }
  return undefined
}

function empty() {
  fill(root, h('p.note', {}, source.live ? 'No picture yet: add one above.' : 'This report holds no picture.'))
  pictures()
}

function step(list, now, by) {
  const at = list.indexOf(now)
  return list[Math.min(list.length - 1, Math.max(0, at + by))]
}

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return
  if (/^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName) && event.key !== 'Escape') return
  const s = state()
  const { manifest } = source
  const names = manifest.networks[s.network].layers.map((l) => l.name)
  const layer = names.includes(s.layer) ? s.layer : views.layer?.layer?.name || names[0]
  const size = s.size || views.layer?.size() || 72
  const actions = {
    j: () => set({ layer: step(names, layer, 1), channel: -1 }), k: () => set({ layer: step(names, layer, -1), channel: -1 }),
    '[': () => set({ input: Math.max(0, s.input - 1), target: -1, pixel: '' }), ']': () => set({ input: Math.min(manifest.inputs.length - 1, s.input + 1), target: -1, pixel: '' }),
    s: () => set({ sort: step(['rms', 'index', 'maximum', 'zeros', 'relevance', 'rms'], s.sort, 1) }), n: () => set({ scale: s.scale === 'layer' ? 'each' : 'layer' }),
    '+': () => set({ size: Math.min(240, size + 16) }), '=': () => set({ size: Math.min(240, size + 16) }), '-': () => set({ size: Math.max(16, size - 16) }),
    m: () => set({ style: { heat: 'spotlight', spotlight: 'map', map: 'heat' }[s.style] }),
    o: () => set({ opacity: Math.max(0, s.opacity - 0.1) }), p: () => set({ opacity: Math.min(1, s.opacity + 0.1) }),
    t: toggleTheme, '?': () => dialog.showModal(), c: () => navigator.clipboard?.writeText(location.href),
    '/': () => document.getElementById('filter')?.focus(), Escape: () => set({ pixel: '', channel: -1 }),
  }
  const view = offered()[Number(event.key) - 1]
  const action = view ? () => set({ view: view[0] }) : actions[event.key]
  if (!action) return
  event.preventDefault()
  action()
}
