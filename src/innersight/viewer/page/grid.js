// All maps of a layer in one canvas: only the tiles in sight are drawn, so thousands stay fluid.

import { channel } from '#codec'
import { image } from '#color'
import { fit, framed, h } from '#dom'

const GAP = 6
const LABEL = 14

export class Grid {
  // events: hover(position, y, x) or hover(null), pick(position)
  constructor(events) {
    this.events = events
    this.order = []
    this.canvas = h('canvas')
    this.over = h('canvas.over')
    this.room = h('div.room', {}, h('div.sticky', {}, this.canvas, this.over))
    this.element = h('div.grid', {
      tabIndex: 0, role: 'listbox', 'aria-label': 'feature maps, arrow keys move, Enter picks', onscroll: framed(() => this.draw()),
      onmousemove: framed((e) => this.move(e)), onmouseleave: () => { this.cell = null; this.mark(); events.hover(null) },
      onclick: (e) => { const at = this.at(e); if (at) events.pick(at.position) }, onkeydown: (e) => this.keyed(e),
    }, this.room)
    new ResizeObserver(framed(() => this.layout())).observe(this.element)
  }

  // maps: a chunk; order: positions in it; windows: position -> [low, high]; names: position -> channel number
  show({ maps, order, window, colors, size, picked, names, caption }) {
    Object.assign(this, { maps, order, window, colors, picked, names, caption })
    const [, height, width] = maps.q.shape
    const long = Math.max(height, width)
    const zoom = size >= long ? Math.floor(size / long) : size / long
    this.tile = { width: Math.max(1, Math.round(width * zoom)), height: Math.max(1, Math.round(height * zoom)) }
    this.layout()
  }

  // The largest size at which so many maps are all in sight; not so large that cells become a wall, nor too small to see.
  best(count, [, height, width]) {
    const [across, down] = [this.element.clientWidth - GAP, this.element.clientHeight - GAP]
    const long = Math.max(height, width)
    for (let size = Math.min(240, Math.max(64, 12 * long)); size > 48; size -= 4) {
      const columns = Math.max(1, Math.floor(across / ((size * width) / long + GAP)))
      if (Math.ceil(count / columns) * ((size * height) / long + LABEL + GAP) <= down) return size
    }
    return 48
  }

  layout() {
    if (!this.maps) return
    const width = this.element.clientWidth
    if (!width) return
    this.columns = Math.max(1, Math.floor((width - GAP) / (this.pitch(1).x)))
    this.rows = Math.ceil(this.order.length / this.columns)
    this.room.style.height = `${this.rows * this.pitch().y + GAP}px`
    this.draw()
  }

  pitch() {
    return { x: Math.max(this.tile.width, 34) + GAP, y: this.tile.height + LABEL + GAP }
  }

  place(slot) {
    const p = this.pitch()
    return { x: GAP + (slot % this.columns) * p.x, y: GAP + Math.floor(slot / this.columns) * p.y }
  }

  draw() {
    if (!this.maps || !this.columns) return
    const top = this.element.scrollTop
    const height = this.element.clientHeight
    const context = fit(this.canvas, this.element.clientWidth, height)
    const style = getComputedStyle(this.element)
    context.font = `10px ${style.fontFamily}`
    context.textBaseline = 'top'
    const p = this.pitch()
    const first = Math.max(0, Math.floor((top - GAP) / p.y)) * this.columns
    const last = Math.min(this.order.length, Math.ceil((top + height) / p.y) * this.columns)
    for (let slot = first; slot < last; slot++) {
      const position = this.order[slot]
      const { x, y } = this.place(slot)
      const map = channel(this.maps, position)
      const flat = map.low === map.high
      context.drawImage(image(map, this.window(position), this.colors), x, y - top, this.tile.width, this.tile.height)
      if (flat) {
        context.strokeStyle = '#999'
        context.beginPath()
        context.moveTo(x, y - top + this.tile.height)
        context.lineTo(x + this.tile.width, y - top)
        context.stroke()
      }
      const name = this.names(position)
      if (name === this.picked) {
        context.lineWidth = 2
        context.strokeStyle = style.getPropertyValue('--accent')
        context.strokeRect(x - 2, y - top - 2, this.tile.width + 4, this.tile.height + 4)
      }
      context.fillStyle = style.getPropertyValue('--quiet')
      context.fillText(`${name} ${flat ? 'constant' : this.caption(position)}`, x, y - top + this.tile.height + 2, p.x - 2)
    }
    this.span = [first, last]
    this.mark()
  }

  // The same cell in every tile, and a rectangle of cells.
  mark() {
    const context = fit(this.over, this.element.clientWidth, this.element.clientHeight)
    if (!this.maps || !this.span) return
    const [, height, width] = this.maps.q.shape
    const [u, v] = [this.tile.width / width, this.tile.height / height]
    const rectangles = []
    if (this.region) {
      const { rows, columns } = this.region
      rectangles.push([columns[0], rows[0], columns[1] - columns[0] + 1, rows[1] - rows[0] + 1, '#00c2ff'])
    }
    if (this.cell) rectangles.push([this.cell.x, this.cell.y, 1, 1, '#ffd400'])
    for (let slot = this.span[0]; slot < this.span[1]; slot++) {
      const { x, y } = this.place(slot)
      for (const [left, top, w, t, color] of rectangles) {
        const at = [x + left * u - 1, y - this.element.scrollTop + top * v - 1, w * u + 2, t * v + 2]
        context.lineWidth = 3
        context.strokeStyle = '#000'
        context.strokeRect(...at)
        context.lineWidth = 1.5
        context.strokeStyle = color
        context.strokeRect(...at)
      }
    }
  }

  at(event) {
    if (!this.maps || !this.columns) return null
    const r = this.canvas.getBoundingClientRect()
    const x = event.clientX - r.left - GAP
    const y = event.clientY - r.top - GAP + this.element.scrollTop
    const p = this.pitch()
    const [column, row] = [Math.floor(x / p.x), Math.floor(y / p.y)]
    const slot = row * this.columns + column
    if (x < 0 || y < 0 || column >= this.columns || slot >= this.order.length) return null
    const [, height, width] = this.maps.q.shape
    const [u, v] = [x - column * p.x, y - row * p.y]
    const inside = u < this.tile.width && v < this.tile.height
    return {
      position: this.order[slot], slot, inside,
      x: Math.min(width - 1, Math.floor((u / this.tile.width) * width)),
      y: Math.min(height - 1, Math.floor((v / this.tile.height) * height)),
    }
  }

  move(event) {
    const at = this.at(event)
    this.cell = at && at.inside ? { x: at.x, y: at.y } : null
    this.mark()
    if (this.cell) this.events.hover(at.position, at.y, at.x)
    else this.events.hover(null)
  }

  look(region) {
    this.region = region
    this.mark()
  }

  keyed(event) {
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: this.columns, ArrowUp: -this.columns, Home: -1e9, End: 1e9 }
    const step = steps[event.key]
    if (step === undefined || !this.order.length) return
    event.preventDefault()
    const now = Math.max(0, this.order.findIndex((p) => this.names(p) === this.picked))
    const slot = Math.min(this.order.length - 1, Math.max(0, now + step))
    this.events.pick(this.order[slot])
    const { y } = this.place(slot)
    const p = this.pitch()
    if (y < this.element.scrollTop) this.element.scrollTop = y - GAP
    if (y + p.y > this.element.scrollTop + this.element.clientHeight) this.element.scrollTop = y + p.y - this.element.clientHeight
  }
}
