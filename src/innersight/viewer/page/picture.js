// The picture as the network gets it, with what is drawn over it: receptive fields, a pixel, a brushed region.

import { fit, h } from '#dom'

export class PictureView {
  // frame: of the manifest: the input's size and how the original maps onto it
  constructor(bitmap, size, frame, options = {}) {
    this.bitmap = bitmap
    this.size = size // [width, height] of the original
    this.frame = frame
    this.options = options
    const [height, width] = frame.size
    this.scale = (options.width || 288) / width
    this.width = width * this.scale
    this.height = height * this.scale
    this.base = h('canvas')
    this.over = h('canvas.over', { role: 'img', 'aria-label': options.label || 'the picture as the network gets it' })
    this.element = h('div.picture', { style: { width: `${this.width}px`, height: `${this.height}px` } }, this.base, this.over)
    this.draw()
    if (options.pick) this.over.addEventListener('click', (e) => options.pick(...this.pixel(e)))
    if (options.brush) this.brushable()
  }

  // Where on the input the pointer is: [y, x] in pixels.
  pixel(event) {
    const r = this.over.getBoundingClientRect()
    const [height, width] = this.frame.size
    return [Math.floor(((event.clientY - r.top) / r.height) * height), Math.floor(((event.clientX - r.left) / r.width) * width)]
  }

  draw(gray = false) {
    const context = fit(this.base, this.width, this.height)
    const [sx, sy, tx, ty] = this.frame.to_input
    const s = this.scale
    context.imageSmoothingEnabled = sx * s < 1
    if (gray) context.filter = 'grayscale(1) brightness(0.6)'
    context.drawImage(this.bitmap, tx * s, ty * s, this.size[0] * sx * s, this.size[1] * sy * s)
    context.filter = 'none'
    this.context = context
  }

  clear() {
    this.overlay = fit(this.over, this.width, this.height)
  }

  // Boxes in pixels of the input; solid or dashed.
  boxes(list) {
    this.clear()
    const c = this.overlay
    for (const { box, dashed, color } of list) {
      const x = box.left * this.scale
      const y = box.top * this.scale
      const w = (box.right - box.left) * this.scale
      const t = (box.bottom - box.top) * this.scale
      c.setLineDash(dashed ? [4, 3] : [])
      c.lineWidth = 3
      c.strokeStyle = '#000'
      c.strokeRect(x, y, w, t)
      c.lineWidth = 1.5
      c.strokeStyle = color || '#ffd400'
      c.strokeRect(x, y, w, t)
    }
  }

  brushable() {
    let start = null
    const corner = (e) => {
      const [y, x] = this.pixel(e)
      const [height, width] = this.frame.size
      return [Math.max(0, Math.min(height, y)), Math.max(0, Math.min(width, x))]
    }
    const span = (a, b) => ({
      top: Math.min(a[0], b[0]), left: Math.min(a[1], b[1]), bottom: Math.max(a[0], b[0]) + 1, right: Math.max(a[1], b[1]) + 1,
    })
    this.over.style.touchAction = 'none'
    this.over.addEventListener('pointerdown', (e) => { start = corner(e); this.over.setPointerCapture(e.pointerId) })
    this.over.addEventListener('pointermove', (e) => { if (start) this.boxes([{ box: span(start, corner(e)), dashed: true }]) })
    this.over.addEventListener('pointerup', (e) => {
      if (!start) return
      const box = span(start, corner(e))
      start = null
      this.boxes([{ box }])
      this.overlay.fillStyle = '#808080'
      this.overlay.fillRect(box.left * this.scale, box.top * this.scale, (box.right - box.left) * this.scale, (box.bottom - box.top) * this.scale)
      this.options.brush(box)
    })
  }
}
