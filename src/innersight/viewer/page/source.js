// What a page is told, decoded and kept, whichever way it comes.

import { unpack } from '#codec'
import { h } from '#dom'
import { bridged, served, written } from '#ways'

export { Missing } from '#ways'

const KEPT = 256 * 1024 * 1024

export function open() {
  const told = document.getElementById('manifest')
  return told ? new Source(JSON.parse(told.textContent), written) : null
}

export async function connect() {
  const way = location.protocol === 'about:' ? await bridged() : served // a frame without an address has no server
  return new Source(await way.manifest(), way)
}

class Source {
  constructor(manifest, way) {
    this.manifest = manifest
    this.way = way
    this.live = manifest.live
    this.known = new Map()
    this.size = 0
  }

  raw(key) {
    return this.way.get(key)
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
      const line = h('progress', { max: 1, value: 0, 'aria-label': 'progress' })
      const leave = this.way.listen(id, (kind, said) => {
        if (kind === 'progress') { line.max = said.total; line.value = said.done; return }
        leave()
        if (kind === 'done') done(said)
        else fail(new Error(said.error))
      })
      show(line, h('button', { type: 'button', onclick: () => { leave(); fail(new Error('cancelled')) } }, 'cancel'))
    })
  }

  // Bytes of a key as a picture.
  async drawn(key) {
    return createImageBitmap(new Blob([await this.raw(key)]))
  }

  ask(what, asked) {
    return this.way.ask(what, asked)
  }

  // A picture of the user's, as one more; what the manifest would say of it.
  add(file) {
    return this.way.add(file)
  }
}

export function key(kind, ...parts) {
  return [kind, ...parts.map((p) => encodeURIComponent(String(p)).replace(/[!'()*]/g,
    (c) => `%${c.charCodeAt(0).toString(16).toUpperCase()}`))].join('/')
}
