"""Report: the page with its data in it, one HTML file that opens from disk, offline, years later.

A report is what a live page would have asked for, written down: the same modules, the same keys, each answer in a
`<script type="text/plain">` of its own. What does not fit the size that was allowed is made smaller in fixed steps, the
important last, and the page says what and by how much. The same networks, pictures and seed give the same bytes.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from innersight import errors, storage
from innersight.viewer import chunks
from innersight.viewer.keys import key
from innersight.viewer.session import Session, packed_maps, packed_stats

if TYPE_CHECKING:
    from innersight.network import Network

MEGABYTES = 25  # what a mail takes
METHODS = ("gradcam", "smoothgrad", "integrated_gradients")
START = 'import("#app").then((app) => app.start());'
_SCANNED = 0.4  # of the room goes to the data set before maps get theirs; what they leave, too
_GROUP = 64 << 20  # bytes of values that are read in one pass

# What is left of a layer's maps on one picture: (cells a side, channels) at most; None: all. The last leaves none.
STEPS: tuple[tuple[int | None, int | None], ...] = ((None, None), (56, None), (28, None), (28, 64), (28, 16), (0, 0))


def opened(networks: Any) -> list[Network]:
    """One network or several, opened where they are not."""
    from innersight.network import open as open_network

    many = list(networks) if isinstance(networks, (list, tuple)) else [networks]
    return [open_network(n) for n in many]


def report(
    networks: Any,
    images: Any,
    path: str | Path,
    *,
    methods: Sequence[str] = METHODS,
    target: Any = None,
    title: str | None = None,
    max_mb: float = MEGABYTES,
    scan: Any = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Path:
    """Write the page with everything about these pictures in it.

    networks: one, or a list of two that are compared; each a Network or what `innersight.open` takes
    images:   anything `Network.read` takes
    methods:  of saliency, each computed for every picture
    target:   the class that is explained; default what each network predicts
    max_mb:   the file is made no larger (10^6 bytes)
    scan:     what `innersight.scan` made of a data set and a network here, as a folder or a Scan, or one for each

    Raises InputError where the page without any maps is already larger.
    """
    session = Session(opened(networks), images, target=target, title=title, scan=scan)
    if not session.pictures:
        raise errors.InputError("a report shows pictures: name one or more")
    content = written(session, methods, int(max_mb * 1e6), progress or (lambda *_: None))
    out = Path(path)
    storage.write_whole(out, lambda file: file.write(content))
    return out


def written(session: Session, methods: Sequence[str], limit: int, progress: Callable[[int, int, str], None]) -> bytes:
    """The bytes of a report on what is in the session."""
    refused = _explain(session, methods, progress)
    fixed = dict(_fixed(session))
    manifest = session.manifest() | {"refused": refused}
    manifest |= {"reduced": [], "limit": limit}
    _effective(session, manifest, progress)
    scanned = _SCANNED * (limit - len(assembled(manifest, fixed, session.overlays)))
    fixed |= _within(_data_set(session), scanned)
    kept, manifest["reduced"] = _fitted(session, limit - len(assembled(manifest, fixed, session.overlays)), progress)
    rest = chain(_filters(session), ((name, chunk) for name, chunk in _data_set(session) if name not in fixed))
    fixed |= _within(rest, limit - len(assembled(manifest, fixed | kept, session.overlays)))
    content = assembled(manifest, fixed | kept, session.overlays)
    if len(content) > limit:
        raise errors.InputError(
            f"the report takes {len(content) / 1e6:.1f} MB even without maps, more than the {limit / 1e6:g} MB "
            "allowed; give fewer pictures, or allow more with max_mb="
        )
    return content


def _explain(session: Session, methods: Sequence[str], progress: Callable) -> list[dict[str, Any]]:
    """Compute the saliency maps; which could not be, and why."""
    refused: list[dict[str, Any]] = []
    todo = [
        (m, i, name) for m in range(len(session.networks)) for i in range(len(session.pictures)) for name in methods
    ]
    for done, (m, i, name) in enumerate(todo):
        progress(done, len(todo), "saliency maps")
        try:
            session.explain(m, i, name)
        except errors.UnknownName:
            raise
        except errors.InnersightError as error:
            if not any(r["network"] == m and r["method"] == name for r in refused):
                refused.append({"network": m, "method": name, "why": str(error)})
    return refused


def _within(found: Iterable[tuple[str, bytes]], room: float) -> dict[str, bytes]:
    """Those that there is room for, in the order they come."""
    kept = {}
    for name, chunk in found:
        if (cost := _cost(name, chunk)) <= room:
            kept[name] = chunk
            room -= cost
    return kept


def _effective(session: Session, manifest: dict[str, Any], progress: Callable) -> None:
    """What moves a unit most, of every layer with a place in the picture."""
    every = [(net["id"], layer) for net in manifest["networks"] for layer in net["layers"] if layer["grid"]]
    for done, (m, layer) in enumerate(every):
        progress(done, len(every), "receptive fields")
        with contextlib.suppress(errors.Unsupported):  # a layer without a gradient has none
            layer["effective"] = list(session.effective(m, layer["name"]))


def _data_set(session: Session) -> Iterator[tuple[str, bytes]]:
    """What there is of a data set, the important first."""
    there = [(m, dataset) for m, dataset in enumerate(session.datasets) if dataset is not None]
    for m, dataset in there:
        every = [
            key("images", m),
            *(key("gallery", m, n) for n, one in enumerate(dataset.findings) if one.picture),
            *(key("channels", m, name) for name in dataset.scan.layers),
        ]
        for name in every:
            yield name, session.get(name)
    for m, dataset in there:
        for layer, channel in dataset.strips():
            yield key("strip", m, layer, channel), dataset.strip(layer, channel)


def _fixed(session: Session) -> Iterator[tuple[str, bytes]]:
    """What every report holds, beside the numbers of all channels: pictures and saliency."""
    for i in range(len(session.pictures)):
        yield (k := key("picture", i)), session.get(k)
    for entry in session.saliencies:
        yield entry["key"], session.get(entry["key"])


def _filters(session: Session) -> Iterator[tuple[str, bytes]]:
    """Weights of the layers: those that look at the picture itself first, large ones not at all."""
    found = []
    for m in range(len(session.networks)):
        for name in session._table(m):
            weight = session.weight(m, name)
            if weight is not None and weight.nbytes <= 1 << 19:
                found.append((weight.shape[1] > 4, weight.nbytes, key("filters", m, name), weight))
    for *_, name, weight in sorted(found, key=lambda f: f[:3]):
        yield name, chunks.pack({"weight": weight})


@dataclass
class _Maps:
    """One layer's maps on one picture, and how much of them is kept."""

    key: str
    rank: tuple
    sizes: list[int]
    made: list[bytes]
    step: int = 0


def _fitted(session: Session, room: int, progress: Callable) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """Maps and numbers of every layer on every picture in so many bytes, and what had to be left out of them."""
    kept: dict[str, bytes] = {}
    waiting: list[_Maps] = []
    pairs = [(m, i) for m in range(len(session.networks)) for i in range(len(session.pictures))]
    for done, (m, i) in enumerate(pairs):
        progress(done, len(pairs), "layers of pictures")
        for name, maps in _every_layer(session, m, i):
            kept[key("stats", m, i, name)] = packed_stats(maps, session._table(m)[name].to_json()["quantised"])
            order = np.argsort(-np.square(maps.reshape(len(maps), -1)).mean(1), kind="stable")
            at = key("maps", m, i, name)
            made = [_step(maps, order, side, count) for side, count in STEPS]
            waiting.append(_Maps(at, (i, -maps[0].size), [_cost(at, c) if c else 0 for c in made], made))
        for name, relevance in _relevance(session, m, i):
            kept[key("relevance", m, i, name, session._targets[m][i])] = chunks.pack({"relevance": relevance})
    room -= sum(_cost(k, v) for k, v in kept.items())
    room -= sum(len(w.key) + 80 for w in waiting)  # for what will have to be said of each
    total = sum(w.sizes[0] for w in waiting)
    # Pictures behind the first give way first, large maps before small ones, one step at a time.
    for step in range(1, len(STEPS)):
        for one in sorted(waiting, key=lambda w: (-w.rank[0], w.rank[1])):
            if total <= room:
                break
            total += one.sizes[step] - one.sizes[one.step]
            one.step = step
    reduced = []
    for one in waiting:
        if one.made[one.step]:
            kept[one.key] = one.made[one.step]
        if one.step and one.made[one.step] != one.made[0]:
            side, count = STEPS[one.step]
            reduced.append({"key": one.key, "side": side, "channels": count})
    return kept, reduced


def _step(maps: np.ndarray, order: np.ndarray, side: int | None, count: int | None) -> bytes:
    if side == 0:
        return b""
    down = 1 if side is None else max(1, -(-max(maps.shape[1:]) // side))
    channels = None if count is None or count >= len(maps) else sorted(int(c) for c in order[:count])
    return packed_maps(maps, down, channels)


def _every_layer(session: Session, m: int, i: int) -> Iterator[tuple[str, np.ndarray]]:
    """Every layer's values on one picture, read in as few passes as the memory allows."""
    group: list[str] = []
    size = 0
    table = session._table(m)
    for name, layer in table.items():
        need = 4 * int(np.prod(layer.shape))
        if group and size + need > _GROUP:
            yield from session.values(m, i, group).items()
            group, size = [], 0
        group.append(name)
        size += need
    if group:
        yield from session.values(m, i, group).items()


def _relevance(session: Session, m: int, i: int) -> Iterator[tuple[str, np.ndarray]]:
    """Each channel's relevance to the target, where the network has gradients."""
    target = session._targets[m][i]
    if target is None:
        return
    try:
        yield from session.relevance(m, i, list(session._table(m)), target).items()
    except errors.Unsupported:
        return


# ---------------------------------------------------------------------------------------------------------------------
# The file


def page(name: str) -> bytes:
    """A file of the page, as it is served."""
    return resources.files("innersight.viewer").joinpath("page", name).read_bytes()


def modules() -> dict[str, str]:
    """The page's modules: the name that they import each other by -> file."""
    folder = resources.files("innersight.viewer").joinpath("page")
    names = sorted(f.name for f in folder.iterdir() if f.name.endswith(".js"))
    return {f"#{n.removesuffix('.js')}": n for n in names}


def import_map(address: Callable[[str], str]) -> str:
    return json.dumps({"imports": {name: address(file) for name, file in modules().items()}}, separators=(",", ":"))


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def script_hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _cost(name: str, chunk: bytes) -> int:
    return len(_block(name, chunk)) + 1  # a line of its own


def _block(name: str, chunk: bytes) -> str:
    return (f'<script type="text/plain" class="chunk" data-key="{html.escape(name)}">'
            f"{base64.b64encode(chunk).decode()}</script>")  # fmt: skip


def assembled(manifest: dict[str, Any], blocks: dict[str, bytes], overlays: Mapping[str, bytes] | None = None) -> bytes:
    """Page, data and all in one file; overlays: saliency maps as pictures, for where no script runs."""
    told = json.dumps(manifest, allow_nan=False, separators=(",", ":"), sort_keys=True).replace("<", "\\u003c")
    parts = [
        *_shell(manifest["title"], _plain(manifest, blocks, overlays or {})),
        f'<script type="application/json" id="manifest">{told}</script>',
        f'<script type="module">{START}</script>\n',
        *(_block(name, chunk) for name, chunk in sorted(blocks.items())),
        '<script type="text/plain" id="end"></script></body></html>\n',
    ]
    return "\n".join(parts).encode()


def framed(title: str) -> str:
    """The page without data, for a frame whose parent brings the answers."""
    return "\n".join([*_shell(title, ""), f'<script type="module">{START}</script></body></html>\n'])


def _shell(title: str, inside: str) -> list[str]:
    """What comes before the data: style, modules, and a policy that lets nothing else run, and nothing be fetched."""
    imports = import_map(lambda file: _data("text/javascript", page(file)))
    policy = (
        f"default-src 'none'; script-src data: {script_hash(imports)} {script_hash(START)}; style-src 'unsafe-inline'; "
        "img-src data: blob:; connect-src 'none'; base-uri 'none'; form-action 'none'"
    )
    return [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title>",
        f"<style>{page('style.css').decode()}</style></head>",
        f'<body><div id="app">{inside}</div>',
        f'<script type="importmap">{imports}</script>',
    ]


def _plain(manifest: dict[str, Any], blocks: dict[str, bytes], overlays: Mapping[str, bytes]) -> str:
    """What is shown without JavaScript: the pictures, what the networks say of them, and what drove it."""
    parts = [f"<noscript><main><h1>{html.escape(manifest['title'])}</h1>",
             "<p>Without JavaScript this page shows pictures, predictions and saliency alone.</p>"]  # fmt: skip
    for one in manifest["inputs"]:
        parts.append(f"<h2>{html.escape(str(one['name']))}</h2>")
        if chunk := blocks.get(key("picture", one["id"])):
            parts.append(_image(chunk, str(one["name"])))
        for net, said in zip(manifest["networks"], one["predictions"], strict=True):
            rows = "".join(
                f"<tr><td>{html.escape(str(label))}</td><td>{'' if chance is None else f'{chance:.1%}'}</td></tr>"
                for _, label, chance, _ in said["top"]
            )
            parts.append(f"<table><caption>{html.escape(net['name'])}</caption>{rows}</table>")
        for entry in (e for e in manifest["saliency"] if e["input"] == one["id"] and e["key"] in overlays):
            said = f"{entry['method']} for {entry['text']}, {entry['scale']['text']}"
            parts.append(
                f"<figure>{_image(overlays[entry['key']], said)}<figcaption>{html.escape(said)}</figcaption></figure>"
            )
    return "".join([*parts, "</main></noscript>"])


def _image(content: bytes, text: str) -> str:
    kind = "image/png" if content.startswith(b"\x89PNG") else "image/jpeg"
    return f'<img alt="{html.escape(text)}" src="{_data(kind, content)}">'
