// The notebook's side of a live page, which anywidget runs: a frame that can reach nothing of the notebook, and what it
// and the kernel say to each other. The frame appears once the kernel has answered; a notebook that is opened without
// one shows the picture above.

const GONE = 'The kernel that computed here has gone: run the cell again.'

function render({ model, el }) {
  // Nobody else knows this name: neither other frames nor other views of the same page.
  const channel = Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, '0')).join('')
  const frame = document.createElement('iframe')
  const still = document.createElement('style')
  let port = null

  const begin = () => {
    frame.name = channel
    frame.title = model.get('title')
    frame.setAttribute('sandbox', 'allow-scripts')
    frame.srcdoc = model.get('page')
    Object.assign(frame.style, { width: '100%', height: `${model.get('height')}px`, border: '1px solid #8884', boxSizing: 'border-box' })
    frame.style.colorScheme = document.body?.dataset.jpThemeLight === 'false' ? 'dark' : 'light'
    el.append(frame)
    const end = model.get('still') // of the picture that a saved notebook shows, as it stands in its address
    if (/^[\w+/=]+$/.test(end)) still.textContent = `img[src$="${end}"] { display: none }`
    document.head.append(still)
  }

  // The page says its name when it is there, and is handed its end of a pipe.
  const greeted = ({ source, data }) => {
    if (!frame.contentWindow || source !== frame.contentWindow || data?.innersight !== channel) return
    port?.close()
    const pipe = new MessageChannel()
    port = pipe.port1
    port.onmessage = ({ data: { number, ask, about, content } }) => {
      model.send({ channel, number, ask, about }, undefined, content ? [content.buffer] : [])
    }
    frame.contentWindow.postMessage({ innersight: channel }, '*', [pipe.port2]) // the frame's origin has no name
  }

  const told = (message, buffers) => {
    if (message.channel !== channel) return
    if (message.ready) { if (!frame.isConnected) begin(); return }
    const content = buffers?.length ? new Uint8Array(buffers[0].buffer.slice(buffers[0].byteOffset, buffers[0].byteOffset + buffers[0].byteLength)) : undefined
    port?.postMessage({ ...message, content }, content ? [content.buffer] : [])
  }

  const lost = () => port?.postMessage({ gone: GONE })

  window.addEventListener('message', greeted)
  model.on('msg:custom', told)
  model.on('comm_live_update', lost)
  model.send({ channel, ask: 'hello' })
  return () => {
    window.removeEventListener('message', greeted)
    model.off('msg:custom', told)
    model.off('comm_live_update', lost)
    still.remove()
    port?.close()
    model.send({ channel, ask: 'leave' })
  }
}

export default { render }
