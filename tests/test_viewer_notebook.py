"""The page in a notebook: what the kernel's side answers, and the page that asks through a widget, in a browser."""

from __future__ import annotations

import base64
import io
import json
import queue
import threading
from importlib import resources

import numpy as np
import pytest
from PIL import Image

from innersight.viewer import answers, chunks, notebook
from innersight.viewer.bridge import Bridge
from innersight.viewer.keys import key
from innersight.viewer.notebook import Page
from innersight.viewer.session import Session
from test_viewer import opened, photograph, png
from test_viewer_browser import browser, needs_chromium, page  # noqa: F401


class Kernel:
    """The kernel's side, and what it sent."""

    def __init__(self, session=None):
        self.sent = queue.Queue()
        self.session = session or Session([opened()], [photograph(0)])
        self.bridge = Bridge(self.session, lambda message, buffers: self.sent.put((message, buffers)))
        self.number = 0

    def ask(self, what, about=None, content=(), channel="a"):
        """The next message to a question."""
        self.number += 1
        question = {"channel": channel, "number": self.number, "ask": what, "about": about}
        self.bridge.heard(question, [memoryview(c) for c in content])
        message, buffers = self.sent.get(timeout=20)
        assert (message["channel"], message["number"]) == (channel, self.number)
        return buffers[0] if buffers else message.get("said", message)

    def told(self, job):
        """All that is told of a job."""
        said = [self.ask("listen", {"id": job})]
        while said[-1]["kind"] == "progress":
            said.append(self.sent.get(timeout=20)[0])
        return said


@pytest.fixture
def kernel():
    made = Kernel()
    yield made
    made.bridge.close()


def test_the_bridge_answers_what_the_session_does(kernel):
    session = Session([opened()], [photograph(0)])
    assert kernel.ask("manifest") == json.loads(json.dumps(session.manifest(True)))
    for asked in (key("maps", 0, 0, "conv2"), key("picture", 0), key("stats", 0, 0, "fc")):
        assert kernel.ask("get", {"key": asked}) == session.get(asked)
        assert kernel.ask("get", {"key": asked}) == session.get(asked)  # from what is known
    box = [2, 3, 20, 30]
    assert kernel.ask("hide", {"network": 0, "input": 0, "box": box}) == {"top": session.hidden(0, 0, box)}


def test_whether_a_kernel_is_there(kernel):
    kernel.bridge.heard({"channel": "x", "ask": "hello"})
    assert kernel.sent.get(timeout=5) == ({"channel": "x", "ready": True}, [])


def test_a_job_tells_its_progress_and_its_end(kernel):
    job = kernel.ask("jobs", {"kind": "explain", "network": 0, "input": 0, "method": "smoothgrad"})["id"]
    message = None
    kernel.number += 1
    kernel.bridge.heard({"channel": "a", "number": kernel.number, "ask": "listen", "about": {"id": job}})
    while message is None or message["kind"] == "progress":
        message, _ = kernel.sent.get(timeout=20)
        assert message["number"] == kernel.number
    assert message["kind"] == "done"
    fresh = Session([opened()], [photograph(0)])
    made = kernel.ask("get", {"key": message["said"]["key"]})
    assert made == fresh.get(fresh.explain(0, 0, "smoothgrad")["key"])


def test_leaving_cancels_a_job(kernel):
    begun, net = threading.Event(), kernel.session.networks[0]

    def endless(*_, **__):
        begun.set()
        while True:
            net.progress(0, 1, "points")

    net.explain = endless
    job = kernel.ask("jobs", {"kind": "explain", "network": 0, "input": 0, "method": "gradient"})["id"]
    kernel.bridge.heard({"channel": "a", "number": 77, "ask": "listen", "about": {"id": job}})
    assert begun.wait(10)
    held = kernel.bridge.answers.jobs[job]
    kernel.bridge.heard({"channel": "b", "ask": "leave"})  # another frame
    assert not held.cancelled
    kernel.bridge.heard({"channel": "a", "ask": "leave"})
    assert held.cancelled
    del net.explain
    while not kernel.sent.empty():
        kernel.sent.get()
    assert kernel.ask("get", {"key": key("picture", 0)}) == kernel.session.get(key("picture", 0))


def test_a_picture_comes_in_pieces(kernel):
    content = png(photograph(3))
    for start in range(0, len(content), 700):
        kernel.ask("piece", {"upload": 5}, [content[start : start + 700]])
    said = kernel.ask("inputs", {"upload": 5, "name": "<b>.png"})
    assert said["name"] == "<b>.png"
    assert len(kernel.session.pictures) == 2
    top = opened().predict([photograph(3)]).top(1)[0][0][0]
    assert said["predictions"][0]["top"][0][1] == top


@pytest.mark.parametrize(
    ("what", "about", "sentence"),
    [("get", {"key": "maps/0/0/nowhere"}, "nowhere"), ("get", {}, "expected a JSON object with key"),
     ("get", [1], "expected"), ("nonsense", {}, "nothing is known"), ("hide", {"network": 0}, "expected"),
     ("jobs", {"kind": "explain", "network": 9}, "no such network"), ("listen", {"id": "99"}, "no such job"),
     ("jobs", {"kind": "explain", "network": "x"}, "invalid"), ("piece", {}, "upload"),
     ("inputs", {"upload": 4, "name": "n"}, "empty"), ("scanned", {"network": 0, "image": 1}, "no scan")],
)  # fmt: skip
def test_nonsense_gets_a_sentence(kernel, what, about, sentence):
    said = kernel.ask(what, about)
    assert sentence in said["error"]
    assert "\n" not in said["error"]
    assert kernel.ask("manifest")["title"] == "Small"


@pytest.mark.parametrize("message", [None, [], "x", {}, {"channel": 3, "ask": "get"}, {"channel": "a", "ask": ["get"]}])
def test_what_is_no_message_is_passed_over(kernel, message):
    kernel.bridge.heard(message)
    assert kernel.sent.empty()


def test_uploads_are_bounded(kernel, monkeypatch):
    import innersight.viewer.bridge as bridge

    monkeypatch.setattr(bridge, "MAX_BODY", 5000)
    assert kernel.ask("piece", {"upload": 1}, [bytes(3000)]) == {}
    assert "MB are taken" in kernel.ask("piece", {"upload": 1}, [bytes(3000)])["error"]
    assert kernel.ask("piece", {"upload": 2}, [bytes(3000)]) == {}  # what was too large is forgotten
    bomb = png(Image.new("1", (20000, 20000)))
    monkeypatch.setattr(bridge, "MAX_BODY", answers.MAX_BODY)
    kernel.ask("piece", {"upload": 3}, [bomb])
    assert "pixels" in kernel.ask("inputs", {"upload": 3, "name": "bomb"})["error"]


# -- what a notebook keeps


def test_without_a_widget_it_is_a_report():
    session = Session([opened()], [photograph(0)])
    shown = Page(session, methods=["gradient"])
    assert not shown.live
    assert 'pip install "innersight[notebook]"' in repr(shown)
    bundle = shown._repr_mimebundle_()
    assert bundle["text/html"].startswith("<iframe sandbox")
    still = Image.open(io.BytesIO(base64.b64decode(bundle["image/png"])))
    assert max(still.size) <= notebook.STILL_SIDE
    assert len(np.unique(np.asarray(still.convert("RGB")).reshape(-1, 3), axis=0)) > 50


def test_a_live_page_is_a_widget_with_a_picture_behind_it(monkeypatch):
    pytest.importorskip("anywidget")
    shown_ = []
    ipython = pytest.importorskip("IPython")
    monkeypatch.setattr(ipython.display, "display", lambda *a, **_: shown_.append(a[0]))
    shown = Page(Session([opened()], [photograph(0)]), live=True)
    shown._ipython_display_()
    still, widget = shown_
    assert widget is shown.widget
    assert base64.b64decode(still["image/png"]).startswith(b"\x89PNG")
    assert still["image/png"].endswith(widget.still)
    assert len(still["image/png"]) < 1.4 * notebook.STILL_BYTES
    assert "sandbox" in widget._esm
    assert "script.chunk" not in widget.page.partition("<body>")[0]
    sent = []
    widget.bridge._send = lambda message, buffers: sent.append((message, buffers))
    widget._handle_custom_msg({"channel": "c", "ask": "hello"}, [])
    assert sent == [({"channel": "c", "ready": True}, [])]
    shown.close()


# -- the page and the widget in a browser


STAND_IN = """async ([source, page, still]) => {
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0))
  const text = (buffer) => btoa(Array.from(new Uint8Array(buffer), (b) => String.fromCharCode(b)).join(''))
  const listeners = {}
  const known = { page, still, title: 'Small', height: 700 }
  const model = {
    get: (name) => known[name],
    on: (what, f) => { (listeners[what] ||= new Set()).add(f) },
    off: (what, f) => listeners[what]?.delete(f),
    send: (message, _, buffers) => window.toKernel(JSON.stringify(message), (buffers || []).map(text)),
  }
  window.told = (message, buffers) => {
    const views = buffers.map((b) => new DataView(bytes(b).buffer))
    for (const f of listeners['msg:custom'] || []) f(message, views)
  }
  window.lost = () => { for (const f of listeners.comm_live_update || []) f() }
  const { default: widget } = await import(source)
  window.end = widget.render({ model, el: document.getElementById('cell') })
}"""


class Notebook:
    """A page with a widget in it, whose kernel is here."""

    def __init__(self, page, kernel):  # noqa: F811
        self.page, self.kernel, self.heard = page, kernel, []
        page.expose_function("toKernel", self.take)
        page.goto("about:blank")
        page.set_content("<!doctype html><body><div id=cell></div></body>")
        source = resources.files("innersight.viewer").joinpath("widget.js").read_bytes()
        address = f"data:text/javascript;base64,{base64.b64encode(source).decode()}"
        from innersight.viewer.report import framed

        page.evaluate(STAND_IN, [address, framed("Small"), "AAAA"])

    def take(self, message, buffers):
        self.heard.append(json.loads(message))
        self.kernel.bridge.heard(json.loads(message), [base64.b64decode(b) for b in buffers])

    def until(self, selector, seconds=20):
        """Pass on what the kernel says until something is seen in the frame."""
        frame = self.page.frame_locator("#cell iframe")
        for _ in range(int(seconds * 50)):
            while not self.kernel.sent.empty():
                message, buffers = self.kernel.sent.get()
                self.page.evaluate(
                    "([m, b]) => window.told(m, b)", [message, [base64.b64encode(b).decode() for b in buffers]]
                )
            if frame.locator(selector).count():
                return frame
            self.page.wait_for_timeout(20)
        raise AssertionError(f"{selector} did not come")


@pytest.fixture
def book(page, kernel):  # noqa: F811
    return Notebook(page, kernel)


@needs_chromium
def test_a_page_in_a_notebook_asks_the_kernel(book):
    frame = book.until(".card canvas")
    assert frame.locator("h1").inner_text() == "Small"
    assert frame.locator(".badge").inner_text() == "live"
    top = frame.locator("aside .bars .name").all_inner_texts()
    assert top == [n for n, _ in opened().predict([photograph(0)]).top(5)[0]]
    frame.get_by_text("Feature maps", exact=True).click()
    book.until(".inspector .picture")
    frame.get_by_text("Saliency", exact=True).click()
    book.until('article[data-method="smoothgrad"] dl')
    entry = next(e for e in book.kernel.session.saliencies if e["method"] == "smoothgrad")
    assert frame.locator('article[data-method="smoothgrad"] .key').inner_text() == entry["scale"]["text"]
    maps, _ = chunks.unpack(book.kernel.session.get(entry["key"]))
    assert maps["q"].shape[1:] == (32, 40)
    assert {m["ask"] for m in book.heard} >= {"hello", "manifest", "get", "jobs", "listen"}


@needs_chromium
def test_a_picture_is_added_in_a_notebook(book, tmp_path):
    frame = book.until(".card canvas")
    photograph(5).save(tmp_path / "new.png")
    frame.locator("input[type=file]").set_input_files(tmp_path / "new.png")
    book.until(".strip [data-input='1'][aria-selected=true]")
    assert frame.locator(".strip [data-input='1'] b").inner_text() == "new.png"


@needs_chromium
def test_a_kernel_that_has_gone_is_said(book):
    frame = book.until(".card canvas")
    book.page.evaluate("window.lost()")
    frame.get_by_text("Saliency", exact=True).click()
    book.until(".failure")
    assert "run the cell again" in frame.locator(".failure").first.inner_text()
    book.page.said = [s for s in book.page.said if "has gone" not in s]


@needs_chromium
def test_only_the_frame_itself_is_heard(book):
    frame = book.until(".card canvas")
    before = len(book.heard)
    channel = book.heard[0]["channel"]
    # A foreign frame of the same notebook, and the notebook's page itself, try to be the page or the kernel.
    book.page.evaluate(
        """(channel) => {
          const other = document.createElement('iframe')
          const say = JSON.stringify({ innersight: channel })
          other.srcdoc = `<script>parent.postMessage(${say}, '*'); parent.frames[0].postMessage(${say}, '*')<\\/script>`
          document.body.append(other)
          window.postMessage({ innersight: channel }, '*')
          document.querySelector('iframe').contentWindow.postMessage({ number: 1, said: { title: 'forged' } }, '*')
        }""",
        channel,
    )
    book.page.wait_for_timeout(400)
    assert len(book.heard) == before
    frame.get_by_text("Feature maps", exact=True).click()
    book.until(".inspector .picture")
    assert frame.locator("h1").inner_text() == "Small"
    book.page.evaluate("window.end()")
    book.page.wait_for_timeout(100)
    assert book.heard[-1] == {"channel": channel, "ask": "leave"}
