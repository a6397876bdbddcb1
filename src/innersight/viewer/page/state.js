// What is looked at, kept in the address, so that a view can be linked.

const DEFAULTS = {
  view: 'overview', network: 0, input: 0, layer: '', channel: -1, sort: 'rms', scale: 'layer', size: 0, target: -1,
  against: -1, style: 'heat', opacity: 1, smooth: 0, colors: 'auto', filter: '', pixel: '', as: 'grid',
  part: 'findings', only: 'all', pair: '', kind: 'all', order: 'number', rows: 100,
}
const listeners = new Set()
let current = { ...DEFAULTS }

export function state() {
  return current
}

export function set(patch, push = false) {
  const next = { ...current, ...patch }
  if (Object.keys(DEFAULTS).every((k) => next[k] === current[k])) return
  const before = current
  current = next
  write(push || before.view !== next.view)
  for (const f of listeners) f(current, before)
}

export function subscribe(f) {
  listeners.add(f)
}

function write(push) {
  const words = new URLSearchParams()
  for (const [key, value] of Object.entries(current)) if (value !== DEFAULTS[key]) words.set(key, value)
  try { // inside a notebook's frame the address cannot be written
    history[push ? 'pushState' : 'replaceState'](null, '', `#${words}`)
  } catch { /* the view works without */ }
}

function read() {
  const words = new URLSearchParams(location.hash.slice(1))
  const found = { ...DEFAULTS }
  for (const [key, fallback] of Object.entries(DEFAULTS)) {
    if (!words.has(key)) continue
    const value = words.get(key)
    if (typeof fallback !== 'number') found[key] = value
    else if (Number.isFinite(Number(value))) found[key] = Number(value)
  }
  return found
}

export function begin() {
  current = read()
  window.addEventListener('popstate', () => {
    const before = current
    current = read()
    for (const f of listeners) f(current, before)
  })
}
