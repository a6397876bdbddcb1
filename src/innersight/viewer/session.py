"""Session: networks and pictures that a page asks about, by key; what was computed is kept within a budget.

A live page and a report ask the same session the same keys, so what one shows the other shows.
"""

from __future__ import annotations

import base64
import io
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from innersight import __version__, errors, targets
from innersight.draw import color
from innersight.network import prepared_alike
from innersight.results import saturated
from innersight.viewer import chunks
from innersight.viewer.keys import digest, key, parse

if TYPE_CHECKING:
    from innersight.images import Inputs, Picture
    from innersight.layers import Layer
    from innersight.network import Network
    from innersight.results import Predictions, Saliency
    from innersight.viewer.dataset import DataSet

PICTURE_SIDE = 1024  # pictures are sent up to this many pixels a side
OVERLAY_SIDE = 256  # and saliency maps over them, for where no script runs, up to this many
THUMBNAIL = 28  # cells a side of a layer's thumbnail, at most
KEPT = 256 << 20  # bytes of chunks that a session holds on to
TOP = 5
_LOOKED = 2  # pictures that an effective receptive field is averaged over
COLORS = ("magma", "viridis", "cividis", "gray", color.SEQUENTIAL_OVERLAY, color.DIVERGING, color.DIVERGING_OVERLAY)


class Session:
    """What a page can be shown of these networks and pictures.

    networks: one or more, which see the same pictures, each prepared its own way
    images:   anything `Network.read` takes; None for none yet
    target:   the class that is explained, a name or an index; default the class that each network predicts
    title:    of the page
    scan:     a scan of each network, as a folder or a Scan, or a list of them
    data:     the data set that was scanned, to look at its images; root: where the files of one named by a word are
    """

    def __init__(
        self, networks: Sequence[Network], images: Any = None, *, target: Any = None, title: str | None = None,
        scan: Any = None, data: Any = None, root: Any = None,
    ):  # fmt: skip
        if not networks:
            raise errors.InputError("there is no network to look at")
        self.networks = prepared_alike(networks)
        self.title = title or " and ".join(n.name for n in networks)
        self.lock = threading.RLock()  # one question at a time: networks are watched as they run
        self.saliencies: list[dict[str, Any]] = []
        self.overlays: dict[str, bytes] = {}  # by the key of a saliency map: it over its picture, to look at
        self._maximized: dict[str, dict[str, Any]] = {}
        self._inputs: list[Inputs | None] = [None] * len(networks)
        self._predictions: list[Predictions | None] = [None] * len(networks)
        self._targets: list[list[int | None]] = [[] for _ in networks]
        self._chunks: dict[str, bytes] = {}
        self._given = target
        self._compared: tuple[int, list[dict[str, Any]]] = (0, [])
        self._scanned: dict[tuple[int, int], int] = {}  # image of a network's data set -> its number as a picture
        self.datasets: list[DataSet | None] = [None] * len(networks)
        if scan is not None or data is not None:
            from innersight.viewer.dataset import matched

            self.datasets = matched(self.networks, scan, data, root)
        if images is not None:
            self.add(images)

    # -- pictures

    @property
    def pictures(self) -> list[Picture]:
        first = self._inputs[0]
        return [] if first is None else first.pictures

    def add(self, images: Any, name: str | None = None, label: Any = None) -> range:
        """More pictures; the numbers they have from now on. name, label: of a single one, where it brings none."""
        import torch

        with self.lock:
            start = len(self.pictures)
            read = [n.read(images) for n in self.networks]
            if name is not None:
                read = [replace(r, pictures=[replace(p, name=name, label=label) for p in r.pictures]) for r in read]
            answers = [n.predict(r) for n, r in zip(self.networks, read, strict=True)]
            for m, (new, answer) in enumerate(zip(read, answers, strict=True)):
                old, known = self._inputs[m], self._predictions[m]
                if old is not None and known is not None:
                    new = replace(
                        old, tensor=torch.cat([old.tensor, new.tensor]), pictures=[*old.pictures, *new.pictures]
                    )
                    answer = replace(known, logits=np.concatenate([known.logits, answer.logits]), pictures=new.pictures)
                self._inputs[m], self._predictions[m] = new, answer
                self._targets[m] += [self._target(m, i) for i in range(start, len(new.pictures))]
            return range(start, len(self.pictures))

    def add_scanned(self, m: int, number: int) -> int:
        """An image of the data set that network m was scanned on, as one more picture; its number among them."""
        dataset = self._dataset(m)
        with self.lock:
            if (m, number) not in self._scanned:
                sample = dataset.sample(number, self.networks[m])
                assert sample.picture is not None
                self._scanned[m, number] = self.add([_shown(sample.picture)], Path(sample.name).name, sample.label)[0]
            return self._scanned[m, number]

    def _dataset(self, m: int) -> DataSet:
        found = self.datasets[m] if 0 <= m < len(self.datasets) else None
        if found is None:
            raise errors.UnknownName("there is no scan of this network here: innersight scan makes one")
        return found

    def _target(self, m: int, i: int) -> int | None:
        answer = self._predictions[m]
        assert answer is not None
        if answer.logits.shape[1] == 0:
            return None
        if self._given is None:
            return int(answer.classes[i])
        return self.class_index(m, self._given)

    def class_index(self, m: int, name: Any) -> int:
        """The index of a class of network m, by name or number."""
        answer = self._predictions[m]
        if answer is None:
            raise errors.InputError("there is no picture yet, so it is not known how many classes there are")
        return targets.Classes(self.networks[m].labels).index(name, answer.logits.shape[1])

    def _one(self, m: int, i: int) -> Inputs:
        inputs = self._inputs[m]
        if inputs is None or not 0 <= i < len(inputs.pictures):
            raise errors.UnknownName(f"there is no picture {i}; there are {len(self.pictures)}")
        return replace(inputs, tensor=inputs.tensor[i : i + 1], pictures=inputs.pictures[i : i + 1])

    # -- what there is

    def manifest(self, live: bool = False) -> dict[str, Any]:
        """All that a page needs to begin with, as JSON; the rest it asks for by key."""
        with self.lock:
            return {
                "format": 1,
                "generator": f"innersight {__version__}",
                "title": self.title,
                "live": live,
                "colors": {n: base64.b64encode(color.table(n).tobytes()).decode() for n in COLORS},
                "networks": [self._network(m) for m in range(len(self.networks))],
                "inputs": [self._input(i) for i in range(len(self.pictures))],
                "methods": _methods() if live else [],
                "saliency": list(self.saliencies),
                "comparison": self.comparison(),
                "scans": [None if d is None else d.manifest() for d in self.datasets],
            }

    def _network(self, m: int) -> dict[str, Any]:
        net = self.networks[m]
        layers = self._table(m)
        known = self._predictions[m]
        return {
            "id": m,
            "name": net.name,
            "notes": list(net.notes),
            "input": list(net.input_shape or ()),
            "preparation": net.preprocess.describe() if net.preprocess is not None else "",
            "classes": None if net.labels is None else list(net.labels),
            "outputs": 0 if known is None else int(known.logits.shape[1]),
            "probabilities": known is not None and known.kind == "probabilities",
            "parameters": sum(p.numel() for p in net.module.parameters()),
            "layers": [_layer(layer) for layer in layers.values()],
        }

    def _table(self, m: int) -> Mapping[str, Layer]:
        inputs = self._inputs[m]
        net = self.networks[m]
        return net.layers if inputs is None else net._layers_for(inputs.tensor)

    def _input(self, i: int) -> dict[str, Any]:
        picture = self.pictures[i]
        height, width = picture.original_size or picture.input_size
        frames, predictions = [], []
        for m in range(len(self.networks)):
            seen, answer = self._inputs[m], self._predictions[m]
            assert seen is not None
            assert answer is not None
            own = seen.pictures[i]
            frames.append({"size": list(own.input_size), "to_input": [float(v) for v in own.to_input]})
            top = _top(answer, i)
            predictions.append({"top": top, "target": self._targets[m][i]})
        return {
            "id": i, "name": picture.name, "label": picture.label, "size": [width, height], "frames": frames,
            "predictions": predictions,
        }  # fmt: skip

    def comparison(self) -> list[dict[str, Any]] | None:
        """Which layers of two networks stand for each other, over the pictures there are, and how far they agree."""
        if len(self.networks) != 2 or not self.pictures:
            return None
        known, pairs = self._compared
        if known != len(self.pictures):
            from innersight.comparison import compare

            found = compare(self.networks[0], self.networks[1], [_shown(p) for p in self.pictures], method=None)
            pairs = [
                {"a": v.a, "b": v.b, "sqnr": None if v.equal else _number(v.sqnr), "equal": v.equal,
                 "cosine": _number(v.cosine), "order": v.order, "how": v.how}
                for v in found.layers.values()
            ]  # fmt: skip
            self._compared = (len(self.pictures), pairs)
        return pairs

    # -- keys

    def known(self, asked: str) -> bytes | None:
        """The bytes of a key that were computed before, without waiting for what is computed now."""
        return self._chunks.get(asked)

    def get(self, asked: str) -> bytes:
        """The bytes of a key; raises UnknownName where there is no such thing."""
        if (known := self.known(asked)) is not None:
            return known
        with self.lock:
            kind, parts = parse(asked)
            make = self._makers().get(kind)
            if make is None:
                raise errors.UnknownName(f"nothing is known by the key {asked[:200]!r}")
            try:
                return self._keep(asked, make(*parts))
            except (TypeError, ValueError, LookupError) as error:
                if isinstance(error, errors.InnersightError):
                    raise
                raise errors.UnknownName(f"nothing is known by the key {asked[:200]!r}") from error

    def _makers(self) -> dict[str, Callable[..., bytes]]:
        return {"picture": self._picture, "maps": self._maps, "stats": self._stats, "relevance": self._relevance,
                "filters": self._filters, "effective": self._effective,
                "channels": lambda m, name: self._dataset(int(m)).channels(name),
                "strip": lambda m, name, channel: self._dataset(int(m)).strip(name, int(channel)),
                "images": lambda m: self._dataset(int(m)).images(),
                "gallery": lambda m, n: self._dataset(int(m)).gallery(int(n))}  # fmt: skip

    def _keep(self, asked: str, chunk: bytes) -> bytes:
        self._chunks[asked] = chunk
        size = sum(map(len, self._chunks.values()))
        # What can be made again goes first; saliency maps may have taken minutes and are small.
        for old in [k for k in self._chunks if k != asked and not k.startswith(("saliency/", "maximized/"))]:
            if size <= KEPT:
                break
            size -= len(self._chunks.pop(old))
        return chunk

    def _picture(self, number: str) -> bytes:
        image = self._one(0, int(number)).pictures[0].display()
        return encoded(image)

    def values(self, m: int, i: int, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Values of layers on one picture, (C, H, W); of a layer without a place in the picture (C, 1, 1)."""
        maps = self.networks[m].maps(self._one(m, i), list(names))
        return {n: v[0] if v[0].ndim == 3 else v[0].reshape(-1, 1, 1) for n, v in maps.items()}

    def _maps(self, m: str, i: str, name: str) -> bytes:
        return packed_maps(self.values(int(m), int(i), [name])[name])

    def _stats(self, m: str, i: str, name: str) -> bytes:
        return packed_stats(self.values(int(m), int(i), [name])[name], self._table(int(m))[name].to_json()["quantised"])

    def _relevance(self, m: str, i: str, name: str, target: str) -> bytes:
        found = self.relevance(int(m), int(i), [name], int(target))
        return chunks.pack({"relevance": found[name]})

    def relevance(self, m: int, i: int, names: Sequence[str], target: int) -> dict[str, np.ndarray]:
        """What each channel (C,) says for a class: its activation times its gradient, summed over its map.

        To first order this is what the score loses without the channel (Molchanov et al., ICLR 2017).
        """
        from innersight.inquiry import Inquiry
        from innersight.observe.passes import Request

        net, x, table = self.networks[m], self._one(m, i).tensor, self._table(m)
        inquiry = Inquiry(net, x, self.class_index(m, target))
        found: dict[str, np.ndarray] = {}
        with net.engine.session():
            net._learn(x)
            request = Request(read=list(names), gradients=list(names))
            for passed in inquiry.run(x, request, inquiry.score_of(0)):
                for n in names:
                    value, gradient = passed.values[n], passed.gradients[n]
                    if gradient is None:
                        raise errors.Unsupported(
                            f"the score does not depend on layer {n!r} in a way that has a gradient"
                        )
                    both = table[n].to_grid(value.detach() * gradient)
                    found[n] = both[0].flatten(1).sum(1).float().cpu().numpy() if both.dim() == 4 else _flat(both[0])
        return found

    def _filters(self, m: str, name: str) -> bytes:
        weight = self.weight(int(m), name)
        if weight is None:
            raise errors.UnknownName(f"layer {name!r} has no weights of its own")
        return chunks.pack({"weight": weight})

    def weight(self, m: int, name: str) -> np.ndarray | None:
        """The filters of a convolution (out, in, kh, kw), or the weights of a linear layer (out, in, 1, 1)."""
        net, x = self.networks[m], self._one(m, 0).tensor
        recording = net.engine.recording(x)
        node = self._table(m)[name].node
        tensors = {id(t): t for t in (*net.module.parameters(), *net.module.buffers())}
        inside = [n for n in recording.nodes[: node.index + 1] if n.path == node.path or n.index == node.index]
        for n in reversed(inside):
            if n.op not in ("conv2d", "linear") or n.position >= len(recording.calls):
                continue
            for where, held in recording.calls[n.position].held:
                if where in (1, "weight") and held in tensors and tensors[held].dim() in (2, 4):
                    weight = tensors[held].detach().float().cpu().numpy()
                    return weight if weight.ndim == 4 else weight[:, :, None, None]
        return None

    def _effective(self, m: str, name: str) -> bytes:
        return chunks.pack({"box": np.array(self.effective(int(m), name), np.int32)})

    def effective(self, m: int, name: str) -> tuple[int, int, int, int]:
        """The box around the middle unit (top, left, bottom, right) that 90% of its squared gradient comes from."""
        inputs = self._inputs[m]
        shown = None
        if inputs is not None:
            shown = replace(inputs, tensor=inputs.tensor[:_LOOKED], pictures=inputs.pictures[:_LOOKED])
        return self._table(m)[name].effective_receptive_field(shown)

    def hidden(self, m: int, i: int, box: Sequence[int]) -> list[list[Any]]:
        """What the network says when a box of its input (top, left, bottom, right) is filled with its mean."""
        with self.lock:
            one = self._one(m, i)
            height, width = one.tensor.shape[-2:]
            top, left, bottom, right = (int(v) for v in box)
            if not (0 <= top < bottom <= height and 0 <= left < right <= width):
                raise errors.InputError(f"a box must lie in the input of {height}x{width} pixels, got {list(box)}")
            x = one.tensor.clone()
            x[..., top:bottom, left:right] = x.mean((-2, -1), keepdim=True)
            return _top(self.networks[m].predict(replace(one, tensor=x)), 0)

    # -- saliency

    def explain(
        self, m: int, i: int, method: str, target: Any = None, against: Any = None,
        options: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Compute one saliency map, or find it; what the page is told of it. Its values have the key it names."""
        with self.lock:
            index = self._targets[m][i] if target is None else self.class_index(m, target)
            other = None if against is None else self.class_index(m, against)
            name = key("saliency", digest([m, i, method, index, other, dict(options or {})]))
            known = next((s for s in self.saliencies if s["key"] == name), None)
            if known is not None:
                return known
            goal = index if other is None else targets.difference(index, other)
            made = self.networks[m].explain(self._one(m, i), method, target=goal, **(options or {}))
            entry = {
                "key": name, "network": m, "input": i, "method": method, "target": index, "against": other,
                "options": dict(options or {}), **_about(made),
            }  # fmt: skip
            self._keep(name, chunks.pack(chunks.quantized(made.maps)))
            self.overlays[name] = encoded(made.overlay()[0], OVERLAY_SIDE)
            self.saliencies.append(entry)
            return entry

    def maximize(self, m: int, layer: str, channel: int) -> dict[str, Any]:
        """The picture that a channel answers to most, found once; its key, and how far above chance it gets."""
        with self.lock:
            name = key("maximized", digest([m, layer, channel]))
            if name not in self._maximized:
                made = self.networks[m].maximize(layer, channel)
                self._keep(name, encoded(made.images[0]))
                self._maximized[name] = {"key": name, "verdict": _verdict(made.verdict)}
            return self._maximized[name]


def _shown(picture: Picture) -> Any:
    """A picture as it was given, for another network to prepare its own way."""
    return picture.values if picture.original is None else picture.original


def _about(made: Saliency) -> dict[str, Any]:
    scale = made.scale(0)
    return {
        "text": made.targets[0] if made.targets else "",
        "layer": made.provenance.layer,
        "signed": bool(made.signed),
        "unit": made.unit,
        "grid": None if made.grid is None else list(made.grid),
        "scale": {"low": _number(scale.low), "high": _number(scale.high), "blank": scale.blank, "text": str(scale)},
        "verdict": _verdict(made.verdict),
        "notes": list(made.provenance.notes),
    }


def _top(answer: Predictions, i: int) -> list[list[Any]]:
    """The likeliest classes of picture i: index, name, probability, raw score."""
    order = np.argsort(-answer.logits[i], kind="stable")[:TOP]
    chances = answer.probabilities[i]
    return [[int(k), answer.label(int(k)), _number(chances[k]), _number(answer.logits[i, k])] for k in order]


def _methods() -> list[dict[str, Any]]:
    from innersight.methods import all_methods

    return [{"name": m.name, "family": m.family, "passes": m.passes, "paper": m.paper, "about": m.summary,
             "signed": m.signed} for m in all_methods().values()]  # fmt: skip


def _verdict(verdict: Mapping[str, Any]) -> dict[str, Any]:
    """A verdict on one picture, as JSON holds it."""
    first = {k: v[0] if isinstance(v, list) and v else v for k, v in verdict.items()}
    return {k: _number(v) if isinstance(v, float) else v for k, v in first.items()}


def _layer(layer: Layer) -> dict[str, Any]:
    field = layer.receptive_field
    about = layer.to_json()
    if field is None or layer.grid is None:
        about["receptive_field"] = None
        return about
    about["receptive_field"] |= {
        "y": [v for k in range(layer.grid[1]) for v in field.y.interval(k, False)],
        "x": [v for k in range(layer.grid[2]) for v in field.x.interval(k, False)],
    }
    return about


def _flat(value: Any) -> np.ndarray:
    return value.flatten().float().cpu().numpy()


def _number(value: Any) -> float | None:
    """A number as JSON holds it."""
    value = float(value)
    return value if math.isfinite(value) else None


def encoded(image: Any, side: int = PICTURE_SIDE) -> bytes:
    """A picture as a browser shows it, at most `side` pixels wide or high: PNG where it is small, else JPEG."""
    shown = image.copy() if image.mode in ("L", "RGB") else image.convert("RGB")
    shown.thumbnail((side, side))
    file = io.BytesIO()
    if max(shown.size) <= 128:
        shown.save(file, "PNG")
    else:
        shown.save(file, "JPEG", quality=90)
    return file.getvalue()


def packed_maps(maps: np.ndarray, down: int = 1, channels: Sequence[int] | None = None) -> bytes:
    """Maps (C, H, W) as a chunk, smaller by `down`, of these channels alone."""
    kept = maps if channels is None else maps[list(channels)]
    arrays = chunks.quantized(chunks.block_mean(kept, down))
    if channels is not None:
        arrays["channels"] = np.asarray(channels, np.int32)
    return chunks.pack(arrays, of=len(maps), size=list(maps.shape[1:]), down=down)


def packed_stats(maps: np.ndarray, kept: Mapping[str, Any] | None = None) -> bytes:
    """What each channel of (C, H, W) does, in numbers, and the most active one as a thumbnail.

    kept: how a quantised layer keeps its numbers
    """
    flat = maps.reshape(len(maps), -1).astype(np.float64)
    finite = np.isfinite(flat)
    clean = np.where(finite, flat, 0.0)
    rms = np.sqrt(np.square(clean).mean(1))
    strongest = int(np.argmax(rms)) if len(rms) else 0
    by = max(1, -(-max(maps.shape[1:]) // THUMBNAIL))
    thumb = chunks.block_mean(np.where(np.isfinite(maps[strongest]), maps[strongest], 0)[None], by)[0]
    arrays = {
        "minimum": clean.min(1), "maximum": clean.max(1), "mean": clean.mean(1), "rms": rms,
        "zeros": (clean == 0).mean(1), "place": clean.argmax(1).astype(np.int32), "thumbnail": thumb,
    }  # fmt: skip
    if kept is not None:
        arrays["saturated"] = saturated(maps, kept).reshape(len(maps), -1).mean(1)
    return chunks.pack(
        arrays, strongest=strongest, nonfinite=int((~finite).sum()), signed=bool(color.is_signed(maps)),
        size=list(maps.shape[1:]),
    )  # fmt: skip
