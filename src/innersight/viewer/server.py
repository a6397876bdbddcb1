"""The live page: served on loopback to whoever holds the token, computing what is asked for.

Any web page that is open in the same browser can send requests to loopback, so each request is checked: its Host must
be ours (against DNS rebinding), its Origin, if it names one, too, and it must carry the token, by a cookie that other
sites' pages cannot send. Nothing that a client sends is a path: keys are looked up, modules of the page come from a
fixed table, and no model can be opened from the browser.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import socket
import sys
import threading
import webbrowser
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from innersight import errors
from innersight.viewer.answers import MAX_BODY, Answers
from innersight.viewer.notebook import Page, in_notebook
from innersight.viewer.report import START, import_map, modules, opened, page, script_hash
from innersight.viewer.session import Session

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response


ALIVE = 15.0  # seconds between signs of life on a stream
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}


class Viewer:
    """A session's `Answers` as HTTP."""

    def __init__(self, session: Session):
        self.answers = Answers(session)

    async def answer(self, what: str, asked: Any = None, content: bytes = b"") -> Any:
        return await asyncio.wrap_future(self.answers.ask(what, asked, content))

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

        return JSONResponse(await self.answer("manifest"))

    async def get(self, request: Request) -> Response:
        from starlette.responses import Response

        asked = request.scope["raw_path"].decode("ascii", "replace").partition("/api/get/")[2]
        return Response(await self.answer("get", {"key": asked}), media_type="application/octet-stream")

    async def add(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        name = unquote(request.headers.get("x-name", "picture"))
        return JSONResponse(await self.answer("inputs", {"name": name}, await request.body()), status_code=201)

    async def question(self, request: Request) -> Response:
        """What is asked with a JSON object: hide, scanned, jobs."""
        from starlette.responses import JSONResponse

        what = request.url.path.rpartition("/")[2]
        try:
            asked = json.loads(await request.body())
        except (ValueError, RecursionError):
            raise errors.InputError("expected a JSON object") from None
        return JSONResponse(await self.answer(what, asked), status_code=202 if what == "jobs" else 200)

    async def events(self, request: Request) -> Response:
        from starlette.responses import StreamingResponse

        number = request.path_params["number"]
        if number not in self.answers.jobs:
            return self.problem(404, "there is no such job")
        return StreamingResponse(self._stream(number), media_type="text/event-stream")

    async def _stream(self, number: str) -> AsyncIterator[str]:
        loop = asyncio.get_running_loop()
        told: asyncio.Queue[tuple[str, dict[str, Any]]] = asyncio.Queue()

        def heard(kind: str, said: dict[str, Any]) -> None:
            with contextlib.suppress(RuntimeError):  # the server has stopped
                loop.call_soon_threadsafe(told.put_nowait, (kind, said))

        leave = self.answers.listen(number, heard)
        try:
            kind = "progress"
            while kind == "progress":
                try:
                    kind, said = await asyncio.wait_for(told.get(), ALIVE)
                    yield f"event: {kind}\ndata: {json.dumps(said)}\n\n"
                except TimeoutError:
                    yield ": alive\n\n"
        finally:
            leave()

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
        *(Route(f"/api/{what}", viewer.question, methods=["POST"]) for what in ("hide", "scanned", "jobs")),
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

    In a notebook nothing is served (a port is what fails there): a `Page` comes back, which asks the kernel (with
    innersight[notebook]) or holds its data.
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
