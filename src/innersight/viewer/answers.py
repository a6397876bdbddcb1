"""Answers: what a page asks of a session, whichever way the question came (HTTP, or a notebook's widget).

manifest                                   what there is
get {key}                                  the bytes of a key
hide {network, input, box}                 what is said with a region hidden
inputs {name} and the picture's bytes      one more picture
scanned {network, image}                   an image of the data set as one more picture
jobs {kind, network, …}                    begins what takes long, `explain` or `maximize`; its number, to listen to
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from innersight import errors, images

if TYPE_CHECKING:
    from innersight.network import Network
    from innersight.viewer.session import Session

MAX_BODY = 32 << 20  # bytes of a picture
MAX_PICTURES = 500  # in a session
FORGOTTEN = 20  # jobs that are over and that nobody listened to, at most

Heard = Callable[[str, dict[str, Any]], None]  # progress, done or failed, and what is said of it


class Cancelled(Exception):
    """Nobody waits for the result any more."""


@dataclass
class Job:
    """Something that takes a while: what is done of it, and in the end what it came to, or why it did not."""

    run: Callable[[], dict[str, Any]]
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    listeners: list[Heard] = field(default_factory=list)
    lock: Any = field(default_factory=threading.RLock)
    cancelled: bool = False
    over: bool = False

    def tell(self, kind: str, **said: Any) -> None:
        with self.lock:
            self.over = kind != "progress"
            if self.events and self.events[-1][0] == "progress":  # only the newest is of interest
                self.events.pop()
            self.events.append((kind, said))
            for heard in list(self.listeners):  # who has heard the end leaves
                heard(kind, said)


class Answers:
    """The answers to a page's questions.

    One thread computes. What takes long tells its progress between its passes, and what was asked meanwhile is answered
    there: maps do not wait for a saliency map of thousands of passes.
    """

    def __init__(self, session: Session):
        self.session = session
        self.jobs: dict[str, Job] = {}
        self.worker = ThreadPoolExecutor(1, "innersight")
        self.numbers = itertools.count(1)
        self.questions: SimpleQueue[tuple[Future, Callable[[], Any]]] = SimpleQueue()

    def ask(self, what: str, asked: Any = None, content: bytes = b"") -> Future:
        """The answer to come: bytes for `get`, else what JSON holds. Its error is a sentence for whoever asked.

        asked:   an object with what the question names, from wherever: it is not trusted
        content: a picture's bytes, for `inputs`
        """
        answer: Future = Future()
        try:
            if what == "get" and (known := self.session.known(str(told(asked, "key")["key"]))) is not None:
                answer.set_result(known)
            elif what == "jobs":
                answer.set_result(self._start(told(asked, "kind", "network")))
            else:
                self.questions.put((answer, self._question(what, asked, content)))
                self.worker.submit(self._answer)  # finds nothing left where a job answered on its way
        except Exception as error:
            answer.set_exception(error)
        return answer

    def _question(self, what: str, asked: Any, content: bytes) -> Callable[[], Any]:
        match what:
            case "manifest":
                return partial(self.session.manifest, True)
            case "get":
                return partial(self.session.get, str(asked["key"]))
            case "hide":
                of = told(asked, "network", "input", "box")
                return lambda: {"top": self.session.hidden(int(of["network"]), int(of["input"]), of["box"])}
            case "inputs":
                return partial(self._add, content, str(told(asked, "name")["name"])[:200])
            case "scanned":
                of = told(asked, "network", "image")
                return partial(self._scanned, int(of["network"]), int(of["image"]))
        raise errors.UnknownName(f"nothing is known of {what[:200]!r}")

    def _answer(self) -> None:
        """In the thread of computation: answer all that was asked."""
        with contextlib.suppress(Empty):
            while True:
                answer, function = self.questions.get_nowait()
                if answer.set_running_or_notify_cancel():
                    try:
                        answer.set_result(function())
                    except Exception as error:  # whoever asked is told
                        answer.set_exception(error)

    def _add(self, content: bytes, name: str) -> dict[str, Any]:
        image = images.from_bytes(content, name)
        with self.session.lock:
            self._room()
            (number,) = self.session.add([image], name)
            return self.session._input(number)

    def _scanned(self, m: int, image: int) -> dict[str, Any]:
        """An image of the data set as one more picture, or the picture that it already is."""
        with self.session.lock:
            self._room()
            return self.session._input(self.session.add_scanned(m, image))

    def _room(self) -> None:
        if len(self.session.pictures) >= MAX_PICTURES:
            raise errors.InputError(f"there are {MAX_PICTURES} pictures already: start again for more")

    # -- jobs

    def _start(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        m = int(asked["network"])
        if not 0 <= m < len(self.session.networks):
            raise errors.InputError("there is no such network")
        run = self._maximize(m, asked) if asked["kind"] == "maximize" else self._explain(m, asked)
        number = f"{next(self.numbers)}"
        for old in [k for k, j in self.jobs.items() if j.over and not j.listeners][:-FORGOTTEN]:
            self.jobs.pop(old, None)
        job = self.jobs[number] = Job(run)
        self.worker.submit(self._work, job, self.session.networks[m])
        return {"id": number}

    def _explain(self, m: int, asked: Mapping[str, Any]) -> Callable[[], dict[str, Any]]:
        i, method = int(asked.get("input", -1)), str(asked.get("method", ""))
        if not 0 <= i < len(self.session.pictures):
            raise errors.InputError("there is no such picture")
        target, against = (None if asked.get(k) in (None, -1) else asked[k] for k in ("target", "against"))
        return lambda: self.session.explain(m, i, method, target, against)

    def _maximize(self, m: int, asked: Mapping[str, Any]) -> Callable[[], dict[str, Any]]:
        layer, channel = str(asked.get("layer", "")), int(asked.get("channel", -1))
        return lambda: self.session.maximize(m, layer, channel)

    def _work(self, job: Job, net: Network) -> None:
        """Run one job in the thread of computation; its progress is told to whoever listens."""

        def progress(done: int, total: int, what: str) -> None:
            if job.cancelled:
                raise Cancelled
            job.tell("progress", done=done, total=total, what=what)
            net.progress = None  # that of the job, not of what is answered in between
            try:
                self._answer()
            finally:
                net.progress = progress

        try:
            if job.cancelled:
                raise Cancelled
            with self.session.lock:
                before, net.progress = net.progress, progress
                try:
                    entry = job.run()
                finally:
                    net.progress = before
            job.tell("done", **entry)
        except Cancelled:
            job.tell("failed", error="cancelled")
        except errors.InnersightError as error:
            job.tell("failed", error=str(error))
        except Exception as error:  # told to the page as well; the others are still answered
            job.tell("failed", error=f"{type(error).__name__}: {error}")

    def listen(self, number: str, heard: Heard) -> Callable[[], None]:
        """Hear of a job what was told last and all that will be, in the thread of computation.

        What comes back ends that; a job that nobody listens to any more is cancelled.
        """
        job = self.jobs.get(number)
        if job is None:
            raise errors.UnknownName("there is no such job")
        with job.lock:
            job.listeners.append(heard)
            for kind, said in job.events:
                heard(kind, said)

        def leave() -> None:
            with job.lock:
                if heard in job.listeners:
                    job.listeners.remove(heard)
                if not job.listeners:
                    job.cancelled = True
                    if job.over:
                        self.jobs.pop(number, None)

        return leave

    def close(self) -> None:
        """Cancel what is being computed; nothing more is answered."""
        for job in list(self.jobs.values()):
            job.cancelled = True
        self.worker.shutdown(wait=False, cancel_futures=True)


def told(asked: Any, *names: str) -> Mapping[str, Any]:
    """An object with these names in it."""
    if not isinstance(asked, Mapping) or not set(names) <= set(asked):
        raise errors.InputError(f"expected a JSON object with {', '.join(names)}")
    return asked
