// Small drawings: histograms and bars.

import { number } from '#color'
import { h, svg } from '#dom'

export function histogram(map, width = 288, height = 60, bins = 48) {
  const counts = new Array(bins).fill(0)
  for (const b of map.q) counts[Math.min(bins - 1, Math.floor((b / 256) * bins))]++
  const most = Math.max(...counts)
  const bar = width / bins
  const drawing = svg('svg', { viewBox: `0 0 ${width} ${height}`, width, height, role: 'img',
    'aria-label': `histogram of ${map.q.length} values from ${number(map.low)} to ${number(map.high)}` })
  counts.forEach((n, i) => {
    const tall = n ? Math.max(1, (Math.sqrt(n / most) * (height - 2))) : 0
    drawing.append(svg('rect', { x: i * bar, y: height - tall, width: Math.max(bar - 1, 0.5), height: tall, class: 'bar' }))
  })
  return h('figure', {}, drawing, h('figcaption', {}, h('span', {}, number(map.low)), h('span', {}, 'square roots of counts'), h('span', {}, number(map.high))))
}

// Rows of [text, value, shown]; bars reach left of the middle for negative values.
export function bars(rows, { signed = false, pick = null, picked = null } = {}) {
  const most = Math.max(1e-30, ...rows.map(([, v]) => Math.abs(v || 0)))
  return h('ol.bars', {}, rows.map(([text, value, shown, id]) => {
    const share = (100 * Math.abs(value || 0)) / most
    const style = signed ? { width: `${share / 2}%`, marginLeft: value < 0 ? `${50 - share / 2}%` : '50%' } : { width: `${share}%` }
    const inside = [h('span.name', {}, text), h('span.track', {}, h(value < 0 ? 'span.less' : 'span.more', { style })), h('span.value', {}, shown)]
    return h('li', {}, pick ? h('button', { type: 'button', onclick: () => pick(id), 'aria-pressed': String(id === picked) }, inside) : inside)
  }))
}
