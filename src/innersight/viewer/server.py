"""The live page: served on loopback to whoever holds the token, computing what is asked for.

Any web page that is open in the same browser can send requests to loopback, so each request is checked: its Host must
be ours (against DNS rebinding), its Origin, if it names one, too, and it must carry the token, by a cookie that other
sites' pages cannot send. Nothing that a client sends is a path: keys are looked up, modules of the page come from a
fixed table, and no model can be opened from the browser.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import secrets
import socket
import sys
import threading
import webbrowser
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from innersight import errors, images
from innersight.viewer.notebook import Page, in_notebook
from innersight.viewer.report import import_map, modules, opened, page, script_hash
from innersight.viewer.session import Session

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

    from innersight.network import Network

MAX_BODY = 32 << 20
MAX_PICTURES = 500  # in a session
FORGOTTEN = 20  # jobs that are over and that nobody listened to, at most
ALIVE = 15.0  # seconds between signs of life on a stream
START = 'import("#app").then((app) => app.start());'
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}


class Cancelled(Exception):
    """Nobody waits for the result any more."""


@dataclass
class Job:
    """Something that takes a while: what is done of it, and in the end what it came to, or why it did not."""

    run: Callable[[], dict[str, Any]]
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    listeners: int = 0
    cancelled: bool = False
    over: bool = False


class Viewer:
    """The answers to a page's requests.

    One thread computes. What takes long tells its progress between its passes, and what was asked meanwhile is answered
    there: maps do not wait for a saliency map of thousands of passes.
    """

    def __init__(self, session: Session):
        self.session = session
        self.jobs: dict[str, Job] = {}
        self.worker = ThreadPoolExecutor(1, "innersight")
        self.numbers = itertools.count(1)
        self.questions: SimpleQueue[tuple[Future, Callable[[], Any]]] = SimpleQueue()

    async def compute(self, function: Callable[..., Any], *args: Any) -> Any:
        answer: Future = Future()
        self.questions.put((answer, partial(function, *args)))
        self.worker.submit(self._answer)  # finds nothing left where a job answered on its way
        return await asyncio.wrap_future(answer)

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

    # -- requests

    async def index(self, _request: Request) -> Response:
        from starlette.responses import HTMLResponse

        imports = import_map(lambda file: f"./page/{file}")
        policy = (
            f"default-src 'none'; script-src 'self' {script_hash(imports)} {script_hash(START)}; "
            "style-src 'self' 'unsafe-inline'; img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; "
            "form-action 'none'; frame-ancestors 'none'"
        )
        text = (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1"><title>innersight</title>'
            '<link rel="icon" href="data:,"><link rel="stylesheet" href="page/style.css">'
            f'</head><body><div id="app"><p>innersight needs JavaScript here.</p></div>'
            f'<script type="importmap">{imports}</script><script type="module">{START}</script></body></html>'
        )
        return HTMLResponse(text, headers={"Content-Security-Policy": policy})

    async def file(self, request: Request) -> Response:
        from starlette.responses import Response

        name = request.path_params["name"]
        if name not in (*modules().values(), "style.css"):
            return self.problem(404, "the page has no such file")
        kind = "text/css" if name.endswith(".css") else "text/javascript"
        return Response(page(name), media_type=f"{kind}; charset=utf-8")

    async def manifest(self, _request: Request) -> Response:
        from starlette.responses import JSONResponse

        return JSONResponse(await self.compute(self.session.manifest, True))

    async def get(self, request: Request) -> Response:
        from starlette.responses import Response

        asked = request.scope["raw_path"].decode("ascii", "replace").partition("/api/get/")[2]
        chunk = self.session.known(asked) or await self.compute(self.session.get, asked)
        return Response(chunk, media_type="application/octet-stream")

    async def add(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        body = await request.body()
        name = unquote(request.headers.get("x-name", "picture"))[:200]
        return JSONResponse(await self.compute(self._add, body, name), status_code=201)

    def _add(self, body: bytes, name: str) -> dict[str, Any]:
        image = images.from_bytes(body, name)
        with self.session.lock:
            self._room()
            (number,) = self.session.add([image], name)
            return self.session._input(number)

    async def scanned(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        asked = await self.told(request, "network", "image")
        return JSONResponse(await self.compute(self._scanned, int(asked["network"]), int(asked["image"])))

    def _scanned(self, m: int, image: int) -> dict[str, Any]:
        """An image of the data set as one more picture, or the picture that it already is."""
        with self.session.lock:
            self._room()
            return self.session._input(self.session.add_scanned(m, image))

    def _room(self) -> None:
        if len(self.session.pictures) >= MAX_PICTURES:
            raise errors.InputError(f"there are {MAX_PICTURES} pictures already: start again for more")

    async def hide(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        asked = await self.told(request, "network", "input", "box")
        top = await self.compute(self.session.hidden, int(asked["network"]), int(asked["input"]), asked["box"])
        return JSONResponse({"top": top})

    async def told(self, request: Request, *names: str) -> dict[str, Any]:
        """The JSON object that was sent, with these names in it."""
        try:
            asked = json.loads(await request.body())
        except (ValueError, RecursionError):
            raise errors.InputError("expected a JSON object") from None
        if not isinstance(asked, dict) or not set(names) <= set(asked):
            raise errors.InputError(f"expected a JSON object with {', '.join(names)}")
        return asked

    # -- jobs

    async def start(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        asked = await self.told(request, "kind", "network")
        m = int(asked["network"])
        if not 0 <= m < len(self.session.networks):
            raise errors.InputError("there is no such network")
        run = self._maximize(m, asked) if asked["kind"] == "maximize" else self._explain(m, asked)
        loop = asyncio.get_running_loop()
        number = f"{next(self.numbers)}"
        for old in [k for k, j in self.jobs.items() if j.over and not j.listeners][:-FORGOTTEN]:
            del self.jobs[old]
        job = self.jobs[number] = Job(run)
        self.worker.submit(self._work, job, self.session.networks[m], loop)
        return JSONResponse({"id": number}, status_code=202)

    def _explain(self, m: int, asked: dict[str, Any]) -> Callable[[], dict[str, Any]]:
        i, method = int(asked.get("input", -1)), str(asked.get("method", ""))
        if not 0 <= i < len(self.session.pictures):
            raise errors.InputError("there is no such picture")
        target, against = (None if asked.get(k) in (None, -1) else asked[k] for k in ("target", "against"))
        return lambda: self.session.explain(m, i, method, target, against)

    def _maximize(self, m: int, asked: dict[str, Any]) -> Callable[[], dict[str, Any]]:
        layer, channel = str(asked.get("layer", "")), int(asked.get("channel", -1))
        return lambda: self.session.maximize(m, layer, channel)

    def _work(self, job: Job, net: Network, loop: asyncio.AbstractEventLoop) -> None:
        """Run one job in the thread of computation; its progress is told to whoever listens."""

        def tell(kind: str, **said: Any) -> None:
            job.over = kind != "progress"
            job.events.append((kind, said))
            with contextlib.suppress(RuntimeError):  # the server has stopped
                loop.call_soon_threadsafe(job.changed.set)

        def progress(done: int, total: int, what: str) -> None:
            if job.cancelled:
                raise Cancelled
            tell("progress", done=done, total=total, what=what)
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
            tell("done", **entry)
        except Cancelled:
            tell("failed", error="cancelled")
        except errors.InnersightError as error:
            tell("failed", error=str(error))
        except Exception as error:  # told to the page as well; the server goes on
            tell("failed", error=f"{type(error).__name__}: {error}")

    async def events(self, request: Request) -> Response:
        from starlette.responses import StreamingResponse

        job = self.jobs.get(request.path_params["number"])
        if job is None:
            return self.problem(404, "there is no such job")
        return StreamingResponse(self._stream(request.path_params["number"], job), media_type="text/event-stream")

    async def _stream(self, number: str, job: Job) -> AsyncIterator[str]:
        job.listeners += 1
        sent = 0
        try:
            while True:
                job.changed.clear()
                while sent < len(job.events):
                    kind, said = job.events[sent]
                    sent += 1
                    yield f"event: {kind}\ndata: {json.dumps(said)}\n\n"
                if job.over:
                    return
                try:
                    await asyncio.wait_for(job.changed.wait(), ALIVE)
                except TimeoutError:
                    yield ": alive\n\n"
        finally:
            job.listeners -= 1
            if not job.listeners:  # the last who waited has gone
                job.cancelled = True
                if job.over:
                    self.jobs.pop(number, None)

    # -- errors

    @staticmethod
    def problem(status: int, sentence: str) -> Response:
        from starlette.responses import JSONResponse

        return JSONResponse({"error": sentence}, status_code=status)

    async def refused(self, _request: Request, error: Exception) -> Response:
        return self.problem(404 if isinstance(error, errors.UnknownName) else 422, str(error))


class Guard:
    """Lets through what comes from this machine's page with the token, and nothing else."""

    def __init__(self, app: Any, token: str, port: int, hosts: Sequence[str]):
        self.app = app
        self.token = token
        self.cookie = f"innersight_{port}"  # cookies heed no ports
        self.hosts = {f"{h}:{port}" for h in hosts}

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":  # no sockets, no lifespan
            return
        problem = self.problem(scope)
        if problem is not None:
            await self.answer(send, *problem)
            return
        await self.app(scope, self.counted(receive), self.marked(send))

    def problem(self, scope: dict[str, Any]) -> tuple[int, str, dict[str, str]] | None:
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        if headers.get("host") not in self.hosts:
            return 421, "this server answers to the address it printed, and to no other name", {}
        origin = headers.get("origin")
        if origin is not None and origin.removeprefix("http://") not in self.hosts:
            return 403, "requests of other pages are refused", {}
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return 403, "requests of other pages are refused", {}
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > MAX_BODY:
            return 413, f"no more than {MAX_BODY >> 20} MB are taken", {}
        query = dict(part.partition("=")[::2] for part in scope["query_string"].decode("latin-1").split("&"))
        if scope["path"] == "/" and secrets.compare_digest(query.get("token", "").encode(), self.token.encode()):
            cookie = f"{self.cookie}={self.token}; Path=/; HttpOnly; SameSite=Strict"
            return 303, "", {"location": "/", "set-cookie": cookie}
        given = dict(c.strip().partition("=")[::2] for c in headers.get("cookie", "").split(";"))
        if not secrets.compare_digest(given.get(self.cookie, "").encode(), self.token.encode()):
            return 401, "open the address that the command printed: it carries the token", {}
        return None

    async def answer(self, send: Callable, status: int, sentence: str, more: dict[str, str]) -> None:
        body = json.dumps({"error": sentence}).encode() if sentence else b""
        headers = {**HEADERS, "Content-Type": "application/json", "Content-Length": str(len(body)), **more}
        pairs = [(k.lower().encode(), v.encode()) for k, v in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        await send({"type": "http.response.body", "body": body})

    def counted(self, receive: Callable) -> Callable:
        """Bodies without a length are counted as they come."""
        size = 0

        async def counting() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_BODY:
                raise errors.InputError(f"no more than {MAX_BODY >> 20} MB are taken")
            return message

        return counting

    def marked(self, send: Callable) -> Callable:
        async def marking(message: Any) -> None:
            if message["type"] == "http.response.start":
                known = {k.lower() for k, _ in message["headers"]}
                message["headers"] += [
                    (k.lower().encode(), v.encode()) for k, v in HEADERS.items() if k.lower().encode() not in known
                ]
            await send(message)

        return marking


def application(session: Session, token: str, port: int, hosts: Sequence[str] = ("127.0.0.1", "localhost")) -> Any:
    """The ASGI application behind its guard."""
    errors.need("starlette", "view", "the live viewer")
    from starlette.applications import Starlette
    from starlette.routing import Route

    viewer = Viewer(session)
    routes = [
        Route("/", viewer.index),
        Route("/page/{name}", viewer.file),
        Route("/api/manifest", viewer.manifest),
        Route("/api/get/{key:path}", viewer.get),
        Route("/api/inputs", viewer.add, methods=["POST"]),
        Route("/api/scanned", viewer.scanned, methods=["POST"]),
        Route("/api/hide", viewer.hide, methods=["POST"]),
        Route("/api/jobs", viewer.start, methods=["POST"]),
        Route("/api/jobs/{number}/events", viewer.events),
    ]
    handlers: dict[Any, Any] = {
        errors.InnersightError: viewer.refused,
        ValueError: viewer.refused,
        TypeError: viewer.refused,
    }
    app: Starlette = Starlette(routes=routes, exception_handlers=handlers)
    return Guard(app, token, port, hosts)


class Server:
    """A viewer that is being served: its address, until it is stopped. A context manager."""

    def __init__(self, session: Session, port: int = 0):
        uvicorn = errors.need("uvicorn", "view", "the live viewer")
        self.socket = socket.socket()
        try:
            self.socket.bind(("127.0.0.1", port))
            self.socket.listen()  # who comes before the server runs is kept waiting, not sent away
        except OSError as error:
            self.socket.close()
            raise errors.InputError(
                f"port {port} cannot be used: {error.strerror or error}; --port takes another"
            ) from error
        self.port = self.socket.getsockname()[1]
        self.token = secrets.token_urlsafe(24)
        self.address = f"http://127.0.0.1:{self.port}/?token={self.token}"
        config = uvicorn.Config(
            application(session, self.token, self.port), log_level="error", access_log=False, http="h11", ws="none",
            lifespan="off", timeout_graceful_shutdown=2,
        )  # fmt: skip
        self.server = uvicorn.Server(config)

    def run(self) -> None:
        """Serve until interrupted."""
        self.server.run(sockets=[self.socket])

    def __enter__(self) -> Server:
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        self.socket.close()


def view(
    networks: Any,
    images: Any = None,
    *,
    target: Any = None,
    port: int = 0,
    browser: bool = True,
    scan: Any = None,
    data: Any = None,
    root: Any = None,
    told: Callable[[str], Any] = lambda text: print(text, file=sys.stderr),
) -> Any:
    """Look into networks on a page: served on loopback until interrupted (Ctrl-C); in a notebook, shown in its cell.

    networks: one, or a list of two that are compared; each a Network or what `innersight.open` takes
    images:   pictures to begin with; more can be added on the page that is served
    target:   the class that is explained; default what each network predicts
    port:     0 for any that is free
    browser:  open it in the browser
    scan:     what `innersight.scan` made of a data set and a network here, as a folder or a Scan, or one for each
    data:     the data set that was scanned, as `innersight.scan` takes it (root= too), to look at its images

    In a notebook nothing is served (a port is what fails there): a `Page` comes back, which holds its data.
    """
    session = Session(opened(networks), images, target=target, scan=scan, data=data, root=root)
    if in_notebook():
        return Page(session)
    server = Server(session, port)
    told(f"open {server.address} (Ctrl-C ends it)")
    if browser:
        threading.Timer(0.5, webbrowser.open, [server.address]).start()
    server.run()
    return None
