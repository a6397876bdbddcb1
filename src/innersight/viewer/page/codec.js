// Chunks: see chunks.py. A header that says what there is, then the numbers, deflated.

const TYPES = { f4: Float32Array, u1: Uint8Array, i4: Int32Array }

export async function unpack(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  if (bytes.length < 8 || String.fromCharCode(...bytes.subarray(0, 4)) !== 'FMC1') throw new Error('this is no chunk')
  const end = 8 + view.getUint32(4, true)
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, end)))
  const stream = new Blob([bytes.subarray(end)]).stream().pipeThrough(new DecompressionStream('deflate'))
  const data = await new Response(stream).arrayBuffer()
  const found = { about: header, bytes: data.byteLength }
  let at = 0
  for (const [name, kind, shape] of header.arrays) {
    const count = shape.reduce((a, b) => a * b, 1)
    found[name] = new TYPES[kind](data, at, count)
    found[name].shape = shape
    at += Math.ceil((count * TYPES[kind].BYTES_PER_ELEMENT) / 4) * 4
  }
  return found
}

// One channel of maps that were sent as bytes.
export function channel(maps, index) {
  const [, height, width] = maps.q.shape
  const n = height * width
  const low = maps.low[index]
  const step = (maps.high[index] - low) / 255
  return {
    height, width, low, high: maps.high[index], step,
    q: maps.q.subarray(index * n, (index + 1) * n),
    at: (y, x) => low + step * maps.q[index * n + y * width + x],
  }
}
