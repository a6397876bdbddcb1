// Elements, made in one call. Text is always text: nothing here takes HTML.

export function h(tag, properties = {}, ...children) {
  const [name, ...classes] = tag.split('.')
  const element = document.createElement(name || 'div')
  if (classes.length) element.className = classes.join(' ')
  for (const [key, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue
    if (key.startsWith('on')) element.addEventListener(key.slice(2), value)
    else if (key === 'style') Object.assign(element.style, value)
    else if (key in element && !key.startsWith('aria')) element[key] = value
    else element.setAttribute(key, value === true ? '' : value)
  }
  element.append(...children.flat(Infinity).filter((c) => c !== null && c !== undefined && c !== false))
  return element
}

export function fill(element, ...children) {
  element.replaceChildren(...children.flat(Infinity).filter((c) => c !== null && c !== undefined && c !== false))
  return element
}

const SVG = 'http://www.w3.org/2000/svg'

export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag)
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value)
  element.append(...children)
  return element
}

// A canvas whose pixels are those of the screen; drawing is done in CSS pixels.
export function fit(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1
  canvas.width = Math.round(width * ratio)
  canvas.height = Math.round(height * ratio)
  canvas.style.width = `${width}px`
  canvas.style.height = `${height}px`
  const context = canvas.getContext('2d')
  context.setTransform(ratio, 0, 0, ratio, 0, 0)
  context.imageSmoothingEnabled = false
  return context
}

// Calls `f` at most once a frame, with the last arguments.
export function framed(f) {
  let waiting = null
  return (...args) => {
    if (waiting === null) requestAnimationFrame(() => { const now = waiting; waiting = null; f(...now) })
    waiting = args
  }
}

export function select(label, options, value, change) {
  return h('label', {}, h('span', {}, label), h('select', { onchange: (e) => change(e.target.value) },
    options.map(([id, text]) => h('option', { value: id, selected: id === value }, text))))
}

export function slider(label, min, max, step, value, change) {
  return h('label', {}, h('span', {}, label),
    h('input', { type: 'range', min, max, step, value, oninput: (e) => change(Number(e.target.value)) }))
}

export function busy(text) {
  return h('p.note', { role: 'status' }, text)
}

export function failure(error) {
  return h('p.failure', { role: 'alert' }, error && error.message ? error.message : String(error))
}
