"""Bridge: a page in a notebook asks the kernel, by messages that a widget passes on; no port is involved.

    page -> kernel   {channel, number, ask, about}, and a part of a picture's bytes
    kernel -> page   {channel, number, said} or the bytes of a key or {…, error, missing}; of a job {…, kind, said}

`channel` names one frame, `number` its question. Asked is what `Answers` answers, and what only messages need:
`hello`, whether a kernel is there; `piece`, a part of a picture, since Jupyter ends a connection over messages of
10 MB; `listen`, what is told of a job; `leave`, no more of that, or no more of anything in that frame.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from importlib import resources
from typing import Any

from innersight import errors
from innersight.viewer.answers import MAX_BODY, Answers, told
from innersight.viewer.session import Session

PACE = 0.1  # seconds between what is told of a job's progress; Jupyter drops messages where they are many


class Bridge:
    """Answers the messages of a page's frames.

    send: takes a message and its buffers, in any thread; is called by one at a time
    """

    def __init__(self, session: Session, send: Callable[[dict[str, Any], list[bytes]], Any]):
        self.answers = Answers(session)
        self._send = send
        self._lock = threading.Lock()
        self._leaves: dict[tuple[str, int], Callable[[], None]] = {}
        self._pieces: dict[tuple[str, int], bytearray] = {}

    def heard(self, message: Any, buffers: Sequence[Any] = ()) -> None:
        """Take a message; returns at once, the answer is sent when it is there."""
        if not isinstance(message, Mapping):
            return
        channel, number, what, about = (message.get(k) for k in ("channel", "number", "ask", "about"))
        if not isinstance(channel, str) or not isinstance(what, str):
            return
        if what == "hello":
            self._say({"channel": channel, "ready": True})
        elif what == "leave":
            self._leave(channel, about.get("number") if isinstance(about, Mapping) else None)
        elif isinstance(number, int):
            head = {"channel": channel, "number": number}
            try:
                self._question(head, what, about, b"".join(bytes(b) for b in buffers))
            except Exception as error:
                self._say(head | _refusal(error))

    def _question(self, head: dict[str, Any], what: str, about: Any, content: bytes) -> None:
        channel = head["channel"]
        if what == "listen":
            self._listen(head, str(told(about, "id")["id"]))
        elif what == "piece":
            at = channel, int(told(about, "upload")["upload"])
            if sum(map(len, self._pieces.values())) + len(content) > MAX_BODY:
                self._pieces.pop(at, None)
                raise errors.InputError(f"no more than {MAX_BODY >> 20} MB are taken")
            self._pieces.setdefault(at, bytearray()).extend(content)
            self._say(head | {"said": {}})
        else:
            if what == "inputs":
                content = bytes(self._pieces.pop((channel, int(told(about, "upload")["upload"])), b""))
            self.answers.ask(what, about, content).add_done_callback(lambda answer: self._answered(head, answer))

    def _answered(self, head: dict[str, Any], answer: Future) -> None:
        try:
            found = answer.result()
        except CancelledError:  # closed
            return
        except Exception as error:
            self._say(head | _refusal(error))
            return
        if isinstance(found, bytes):
            self._say(head, [found])
        else:
            self._say(head | {"said": found})

    def _listen(self, head: dict[str, Any], job: str) -> None:
        at = head["channel"], head["number"]
        last, over = 0.0, False

        def heard(kind: str, said: dict[str, Any]) -> None:
            nonlocal last, over
            if kind == "progress" and time.monotonic() - last < PACE:
                return
            last = time.monotonic()
            self._say(head | {"kind": kind, "said": said})
            if kind != "progress":
                over = True
                self._leave(*at)

        self._leaves[at] = self.answers.listen(job, heard)
        if over:  # before there was anything to leave
            self._leave(*at)

    def _leave(self, channel: str, number: int | None) -> None:
        for at in list(self._leaves):
            if at[0] == channel and number in (None, at[1]) and (leave := self._leaves.pop(at, None)):
                leave()
        if number is None:
            for at in [a for a in self._pieces if a[0] == channel]:
                self._pieces.pop(at, None)

    def _say(self, message: dict[str, Any], buffers: Sequence[bytes] = ()) -> None:
        with self._lock:
            self._send(message, list(buffers))

    def close(self) -> None:
        """Cancel what is being computed; nothing more is answered."""
        self.answers.close()


def _refusal(error: Exception) -> dict[str, Any]:
    known = isinstance(error, (errors.InnersightError, ValueError, TypeError))
    sentence = str(error) if known else f"{type(error).__name__}: {error}"
    return {"error": sentence, "missing": isinstance(error, errors.UnknownName)}


def widget(session: Session, page: str, still: str, height: int) -> Any:
    """A page as a widget of Jupyter's, whose questions the kernel answers.

    page: its text; still: the end of the address of the picture that it stands in for, which is hidden then
    """
    anywidget = errors.need("anywidget", "notebook", "a live page in a notebook")
    import traitlets

    class Live(anywidget.AnyWidget):  # type: ignore[name-defined]
        _esm = resources.files("innersight.viewer").joinpath("widget.js").read_text()
        page = traitlets.Unicode().tag(sync=True)
        still = traitlets.Unicode().tag(sync=True)
        title = traitlets.Unicode().tag(sync=True)
        height = traitlets.Int().tag(sync=True)

        def __repr__(self) -> str:
            return f"<live page of {self.title}>"

    made = Live(page=page, still=still, title=session.title, height=height)
    # A kernel's messages may be sent from any thread; what comes in does so in the kernel's own, which must go on.
    made.bridge = Bridge(session, made.send)
    made.on_msg(lambda _, message, buffers: made.bridge.heard(message, buffers))
    return made
