// The three ways to answers: written into this page (a report), computed by the server that sent it, or by the kernel of
// the notebook whose frame this is. The last two answer the same questions, see answers.py.

const PIECE = 2 << 20 // bytes of an upload in one message; Jupyter ends a connection over larger ones than 10 MB

export class Missing extends Error {}

// A report. The page runs while the rest of a large file is still being read, so a block counts once something stands
// behind it.
export const written = {
  async get(key) {
    for (;;) {
      const block = document.querySelector(`script.chunk[data-key="${CSS.escape(key)}"]`)
      const whole = document.getElementById('end')
      if (block && (block.nextElementSibling || whole)) return decode(block.textContent)
      if (whole) throw new Missing(`this report does not hold ${decodeURIComponent(key)}`)
      await new Promise((wake) => setTimeout(wake, 30))
    }
  },
}

function decode(text) {
  const binary = atob(text)
  const bytes = new Uint8Array(binary.length)
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i)
  return bytes
}

// A server, which sent this page.
export const served = {
  async manifest() {
    const answer = await fetch('api/manifest')
    if (!answer.ok) throw new Error(`the server answered ${answer.status}: reload the page from the address it printed`)
    return answer.json()
  },

  async get(key) {
    const answer = await fetch(`api/get/${key}`)
    if (answer.ok) return new Uint8Array(await answer.arrayBuffer())
    const said = await answer.json().catch(() => ({}))
    throw new (answer.status === 404 ? Missing : Error)(said.error || `the server answered ${answer.status}`)
  },

  ask: (what, asked) => post(what, { 'Content-Type': 'application/json' }, JSON.stringify(asked)),

  add: (file) => post('inputs', { 'Content-Type': 'application/octet-stream', 'X-Name': encodeURIComponent(file.name) }, file),

  listen(id, heard) {
    const events = new EventSource(`api/jobs/${id}/events`)
    for (const kind of ['progress', 'done', 'failed']) events.addEventListener(kind, (e) => heard(kind, JSON.parse(e.data)))
    events.onerror = () => heard('failed', { error: 'the server does not answer any more' })
    return () => events.close()
  },
}

async function post(what, headers, body) {
  const answer = await fetch(`api/${what}`, { method: 'POST', headers, body })
  const said = await answer.json()
  if (!answer.ok) throw new Error(said.error || `the server answered ${answer.status}`)
  return said
}

// The kernel of a notebook, by way of the widget around this frame (widget.js). The widget gave the frame a name that
// nobody else knows; to who says it, it hands a port, and what matters goes through that.
export async function bridged() {
  const port = await new Promise((open) => {
    const heard = ({ source, data, ports }) => {
      if (source !== window.parent || data?.innersight !== window.name || !ports.length) return
      window.removeEventListener('message', heard)
      open(ports[0])
    }
    window.addEventListener('message', heard)
    window.parent.postMessage({ innersight: window.name }, '*')
  })
  const waiting = new Map() // number of a question -> who hears what is said to it
  let last = 0
  let gone = null
  port.onmessage = ({ data }) => {
    if (!data.gone) { waiting.get(data.number)?.(data); return }
    gone = { error: data.gone }
    for (const heard of [...waiting.values()]) heard(gone)
  }
  const send = (ask, about, heard, content) => {
    const number = ++last
    waiting.set(number, heard)
    if (gone) queueMicrotask(() => heard(gone))
    else port.postMessage({ number, ask, about, content })
    return number
  }
  const once = (ask, about, content) => new Promise((done, fail) => {
    const number = send(ask, about, (answer) => {
      waiting.delete(number)
      if (answer.error !== undefined) fail(new (answer.missing ? Missing : Error)(answer.error))
      else done(answer.content || answer.said)
    }, content)
  })
  return {
    manifest: () => once('manifest'),
    get: (key) => once('get', { key }),
    ask: (what, asked) => once(what, asked),

    async add(file) {
      const content = new Uint8Array(await file.arrayBuffer())
      const upload = ++last
      for (let at = 0; at < content.length; at += PIECE) await once('piece', { upload }, content.slice(at, at + PIECE))
      return once('inputs', { upload, name: file.name })
    },

    listen(id, heard) {
      const number = send('listen', { id }, (told) => {
        if (told.kind !== 'progress') waiting.delete(number)
        if (told.error === undefined) heard(told.kind, told.said)
        else heard('failed', told)
      })
      return () => { if (waiting.delete(number)) port.postMessage({ ask: 'leave', about: { number } }) }
    },
  }
}
