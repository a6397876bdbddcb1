// Where answers come from: written into this page (a report), or computed by the server that sent it (live).

import { unpack } from '#codec'
import { h } from '#dom'

const KEPT = 256 * 1024 * 1024

export function open() {
  const told = document.getElementById('manifest')
  if (told) return new Source(JSON.parse(told.textContent), written)
  return null
}

export async function connect() {
  const answer = await fetch('api/manifest')
  if (!answer.ok) throw new Error(`the server answered ${answer.status}: reload the page from the address it printed`)
  return new Source(await answer.json(), served)
}

class Source {
  constructor(manifest, raw) {
    this.manifest = manifest
    this.raw = raw
    this.live = manifest.live
    this.known = new Map()
    this.size = 0
  }

  // The decoded chunk of a key; one request for many who ask at once.
  async get(key) {
    let entry = this.known.get(key)
    if (!entry) {
      entry = this.raw(key).then((bytes) => unpack(bytes))
      entry.then((chunk) => this.count(key, chunk.bytes), () => this.known.delete(key))
    }
    this.known.delete(key) // the one used last is let go last
    this.known.set(key, entry)
    return entry
  }

  count(key, bytes) {
    this.size += bytes
    for (const old of this.known.keys()) {
      if (this.size <= KEPT || old === key) break
      const entry = this.known.get(old)
      this.known.delete(old)
      entry.then((chunk) => { this.size -= chunk.bytes }, () => {})
    }
  }

  // A picture as something that can be drawn.
  async picture(index) {
    this.pictures ||= new Map()
    if (!this.pictures.has(index)) {
      this.pictures.set(index, this.raw(`picture/${index}`).then((bytes) => createImageBitmap(new Blob([bytes]))))
    }
    return this.pictures.get(index)
  }

  // Something that takes a while: `show` is handed a bar of progress and a button that ends it.
  async job(asked, show) {
    const { id } = await this.ask('jobs', asked)
    return new Promise((done, fail) => {
      const events = new EventSource(`api/jobs/${id}/events`)
      const end = (f, value) => { events.close(); f(value) }
      const line = h('progress', { max: 1, value: 0, 'aria-label': 'progress' })
      show(line, h('button', { type: 'button', onclick: () => end(fail, new Error('cancelled')) }, 'cancel'))
      events.addEventListener('progress', (e) => { const { done: n, total } = JSON.parse(e.data); line.max = total; line.value = n })
      events.addEventListener('done', (e) => end(done, JSON.parse(e.data)))
      events.addEventListener('failed', (e) => end(fail, new Error(JSON.parse(e.data).error)))
      events.onerror = () => end(fail, new Error('the server does not answer any more'))
    })
  }

  // Bytes of a key as a picture.
  async drawn(key) {
    return createImageBitmap(new Blob([await this.raw(key)]))
  }

  async ask(path, body) {
    const answer = await fetch(`api/${path}`, {
      method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(body),
    })
    const said = await answer.json()
    if (!answer.ok) throw new Error(said.error || `the server answered ${answer.status}`)
    return said
  }
}

export function key(kind, ...parts) {
  return [kind, ...parts.map((p) => encodeURIComponent(String(p)).replace(/[!'()*]/g,
    (c) => `%${c.charCodeAt(0).toString(16).toUpperCase()}`))].join('/')
}

export class Missing extends Error {}

// The page runs while the rest of a large file is still being read, so a block counts once something stands behind it.
async function written(key) {
  for (;;) {
    const block = document.querySelector(`script.chunk[data-key="${CSS.escape(key)}"]`)
    const whole = document.getElementById('end')
    if (block && (block.nextElementSibling || whole)) return decode(block.textContent)
    if (whole) throw new Missing(`this report does not hold ${decodeURIComponent(key)}`)
    await new Promise((wake) => setTimeout(wake, 30))
  }
}

function decode(text) {
  const binary = atob(text)
  const bytes = new Uint8Array(binary.length)
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i)
  return bytes
}

async function served(key) {
  const answer = await fetch(`api/get/${key}`)
  if (answer.ok) return new Uint8Array(await answer.arrayBuffer())
  const said = await answer.json().catch(() => ({}))
  throw new (answer.status === 404 ? Missing : Error)(said.error || `the server answered ${answer.status}`)
}
