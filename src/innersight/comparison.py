"""Two networks side by side: float against int8, epoch against epoch, one format against another, a device's dump.

    c = innersight.compare("float.tflite", "int8.tflite", "photos/")
    print(c.layers)             # signal to noise in dB, cosine, ranges, saturation, dead channels, layer by layer
    c.first_divergence          # the first layer where they part, by a rule that is stated
    c.save("compare.html")

Pictures are prepared for each network its own way and go through both chunk by chunk; of the maps only sums are kept,
in double precision. `a` is the reference throughout.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import platform
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from innersight import __version__, alignment, errors, storage
from innersight.agreement import Comparison, Divergence, LayerComparison, LayerTable, Predicted, Reasons, decibel
from innersight.alignment import Alignment, Pair, Place
from innersight.images import Inputs, Picture
from innersight.inquiry import Inquiry
from innersight.layers import Layer
from innersight.methods import find
from innersight.network import Network
from innersight.network import open as open_network
from innersight.observe.passes import Request, free_memory
from innersight.results import FeatureMaps, Predictions, Provenance, load

THRESHOLD = 20.0  # dB: the noise is a tenth of the signal
PROBED = 16  # images that channels and leftover layers are matched on
PLACES = 32  # and places in each of their maps
SHOWN = 6  # channels of a layer that are kept to be looked at
KEPT = 8  # pictures whose two saliency maps are kept

Progress = Callable[[str, int, int], None]


def compare(
    a: Any,
    b: Any,
    images: Any = None,
    *,
    layers: str | Sequence[str] | None = None,
    method: str | None = "gradcam",
    target: Any = None,
    at: str | None = None,
    threshold: float = THRESHOLD,
    channels: str = "match",
    progress: Progress | None = None,
) -> Comparison:
    """How two networks differ, layer by layer, over all `images`; `a` is the reference.

    a, b:      what `innersight.open` takes, an opened Network, or tensors by name: a mapping or an .npz file, as
               `innersight.dump` or a device writes them, each (N, C, H, W), (N, H, W, C) or (N, K)
    images:    as for `Network.predict`; each network has them prepared its own way. Not needed for two dumps
    layers:    names in a (or b) to compare; default every layer that can be aligned
    method:    the saliency method that gives the reasons of both, None for none; default Grad-CAM
    target:    what the reasons are for; default the class that a predicts, in both networks
    at:        the layer of a whose maps the method reads; default the one it takes by itself
    threshold: decibel of signal to noise below which a layer counts as parted
    channels:  "match" finds channels that stand in another order in b, "index" compares them as they stand
    progress:  called with what is being done, how much of it is done, and of how much

    Raises InputError, UnknownName or Unsupported where something cannot be opened, read or compared at all.
    """
    if channels not in ("match", "index"):
        raise errors.unknown("way to pair channels", channels, ("match", "index"))
    if method is not None:
        find(method)
    side_a, side_b = _sides(a, b, images)
    work = _Work(side_a, side_b, progress or (lambda *_: None), [])
    with ExitStack() as stack:
        for side in (side_a, side_b):
            stack.enter_context(side.session())
        aligned = alignment.align(side_a.places(), side_b.places())
        work.refine(aligned, reorder=channels == "match")
        if not aligned.pairs:
            raise errors.InputError(
                f"no layer of {side_a.name} could be aligned with one of {side_b.name}: no name, and no run of layers "
                "of the same kinds and shapes, is in both"
            )
        work.pick(aligned, layers)
        sums, predicted = work.measure(aligned)
        shown = work.shown(aligned, sums, predicted)
    reasons = work.reasons(aligned, predicted, method, target, at) if method is not None else None
    rows = [s.finish(p, shown.get(p.a.name)) for p, s in zip(aligned.pairs, sums, strict=True)]
    table = LayerTable({row.a: row for row in rows})
    return Comparison(
        a=side_a.name, b=side_b.name, layers=table, only_a=tuple(aligned.only_a), only_b=tuple(aligned.only_b),
        predictions=predicted, reasons=reasons, pictures=side_a.pictures or side_b.pictures or [],
        count=side_a.count, shown_picture=work.looked_at, threshold=threshold,
        divergence=_first(rows, work.readers(aligned), threshold), largest=_largest(rows, work.readers(aligned)),
        provenance=Provenance(
            network=f"{side_a.name} and {side_b.name}", method=method, layer=None, seed=0,
            target=None if reasons is None else "; ".join(dict.fromkeys(reasons.targets)),
            options={"threshold": threshold, "channels": channels}, notes=tuple(dict.fromkeys(work.notes)),
            versions={"innersight": __version__, "torch": torch.__version__, "python": platform.python_version()},
        ),
    )  # fmt: skip


def dump(net: Any, images: Any, path: str | os.PathLike, layers: Sequence[str] | None = None) -> Path:
    """Write what every layer (or `layers`) answers to `images` into an .npz of name -> array, for `compare`.

    Arrays are float32 as the layer holds them on its grid, (N, C, H, W) or (N, K); the file can be read by NumPy alone.
    """
    path = Path(path)
    if path.suffix.lower() != ".npz":
        raise errors.InputError(f"{path.name!r}: tensors by name are written to an .npz file")
    storage.check_place(path)
    net = open_network(net)
    table = net._layers_for(net.read(images).tensor[:1])
    maps = net.maps(images, layers=list(table) if layers is None else layers)
    return storage.write_whole(path, lambda file: np.savez_compressed(file, **dict(maps)))


# ---------------------------------------------------------------------------------------------------------------------
# The two sides


class _Side:
    """What is compared: layers, and their values for some of the images with channels first."""

    name: str
    count: int
    pictures: list[Picture] | None = None
    notes: Sequence[str] = ()

    def places(self) -> list[Place]:
        raise NotImplementedError

    def session(self) -> Any:
        return ExitStack()

    def size(self, _names: Sequence[str]) -> int:
        """How many images fit into one chunk that holds these layers."""
        return self.count

    def values(self, rows: Sequence[int], names: Sequence[str]) -> tuple[dict[str, torch.Tensor], Any]:
        """Layer -> (n, C, ...) for these images, and what the network answers to them (None for a dump)."""
        raise NotImplementedError


class _Opened(_Side):
    def __init__(self, net: Network, inputs: Inputs):
        self.net, self.inputs, self.name = net, inputs, net.name
        self.count = len(inputs.tensor)
        self.pictures = inputs.pictures
        self.table = net._layers_for(inputs.tensor[:1])
        self.recording = net.engine.recording(inputs.tensor[:1])

    def session(self) -> Any:
        return self.net.engine.session()

    def size(self, names: Sequence[str]) -> int:
        return self.net.engine.chunk_size(self.inputs.tensor, Request(read=list(names)))

    def places(self) -> list[Place]:
        listed = {self.table[name].node.index: name for name in self.table}
        ends = {ref.node for ref in self.recording.outputs}
        return [
            Place(name, self.table[name].kind, self._shape(self.table[name]), self._reads(i, listed), i in ends)
            for i, name in listed.items()
        ]

    def _reads(self, index: int, listed: Mapping[int, str]) -> tuple[str, ...]:
        """The listed layers a node reads, through views."""
        found: dict[str, None] = {}
        stack = list(self.recording.nodes[index].inputs)
        while stack:
            i = stack.pop(0)
            if i in listed:
                found[listed[i]] = None
            else:
                stack += self.recording.nodes[i].inputs
        return tuple(found)

    def _shape(self, layer: Layer) -> tuple[int, ...]:
        batch = max(self.recording.batch, 1)
        return tuple(_first_axis(layer, torch.empty(layer.node.shape, device="meta"), batch).shape[1:])

    def values(self, rows: Sequence[int], names: Sequence[str]) -> tuple[dict[str, torch.Tensor], Any]:
        x = self.inputs.tensor[list(rows)]
        passed = self.net.engine.run(x, Request(read=list(names)))
        found = {name: _first_axis(self.table[name], passed.values[name].detach(), len(rows)) for name in names}
        return found, passed.output


def _first_axis(layer: Layer, value: torch.Tensor, count: int) -> torch.Tensor:
    """A layer's value with images first and channels second, without sides of length 1: (n, C, H, W), (n, C)."""
    if layer.grid is not None:
        value = layer.to_grid(value)
    elif value.shape[0] != count or value.dim() < 2:
        value = value.reshape(count, -1)
    elif layer.channel_axis > 1:
        value = value.movedim(layer.channel_axis, 1)
    return value.flatten(1) if math.prod(value.shape[2:]) == 1 else value


class _Dump(_Side):
    """Tensors by name, of as many images."""

    def __init__(self, source: Any, arrays: Mapping[str, np.ndarray], count: int | None):
        self.name = Path(source).name if isinstance(source, (str, os.PathLike)) else "the dump"
        if isinstance(source, FeatureMaps) and source.provenance.network:
            self.name = f"maps of {source.provenance.network}"
        self.arrays = {str(k): np.asarray(v) for k, v in arrays.items()}
        self.arrays = {k: v for k, v in self.arrays.items() if v.ndim and v.dtype.kind in "fiub" and v.size}
        if not self.arrays:
            raise errors.InputError(f"{self.name} holds no array of numbers to compare")
        self.count = count if count is not None else len(next(iter(self.arrays.values())))
        for name, v in self.arrays.items():
            if len(v) != self.count and self.count == 1:
                v = self.arrays[name] = v[None]
            if len(v) != self.count:
                raise errors.InputError(
                    f"{self.name}: {name!r} is {'x'.join(map(str, v.shape))}, so of {len(v)} images; expected "
                    f"{self.count} along its first axis"
                )
            if v.dtype.kind == "f" and not np.isfinite(v).all():
                raise errors.InputError(f"{self.name}: {name!r} holds NaN or infinite values; dump it again")
        self.last = False  # whether the channels are the last axis
        self.steps: dict[str, Any] = {}  # how integers become real values

    def fit(self, other: _Side, notes: list[str]) -> None:
        """Read axes and integers as the other side tells."""
        shapes = {p.shape for p in other.places()}
        pictures = [v.shape[1:] for v in self.arrays.values() if v.ndim == 4]
        first = sum(s in shapes for s in pictures)
        last = sum((s[2], *s[:2]) in shapes for s in pictures)
        self.last = last > first
        if self.last:
            notes.append(f"{self.name}: arrays of four axes are read with the channels last")
        steps = getattr(getattr(other, "net", None), "quantisation", None) or {}
        whole = [name for name, v in self.arrays.items() if v.dtype.kind in "iu"]
        self.steps = {name: steps[name] for name in whole if name in steps}
        if self.steps:
            notes.append(f"{self.name}: integers are made real by the scale and zero point that {other.name} states")
        if left := [name for name in whole if name not in self.steps]:
            notes.append(
                f"{self.name}: {', '.join(left[:3])}{', ...' if len(left) > 3 else ''} hold integers of unknown scale, "
                "compared as they are: save real values, scale * (q - zero_point), to compare them with real ones"
            )

    def places(self) -> list[Place]:
        names = list(self.arrays)
        return [
            Place(n, "", tuple(self._one(n, slice(0, 1)).shape[1:]), (names[i - 1],) if i else (), known=False)
            for i, n in enumerate(names)
        ]

    def _one(self, name: str, rows: Any) -> torch.Tensor:
        v = np.asarray(self.arrays[name][rows])
        if self.last and v.ndim == 4:
            v = np.moveaxis(v, 3, 1)
        wide = v.dtype == np.float64 or (v.dtype.kind in "iu" and v.dtype.itemsize > 2)
        real = v.astype(np.float64 if wide else np.float32)
        if name in self.steps:
            step = self.steps[name]
            real = (real - step.zero_point) * np.float32(step.scale[0])
        value = torch.from_numpy(np.ascontiguousarray(real))
        if value.dim() == 1:
            value = value[:, None]
        return value.flatten(1) if math.prod(value.shape[2:]) == 1 else value

    def values(self, rows: Sequence[int], names: Sequence[str]) -> tuple[dict[str, torch.Tensor], Any]:
        return {name: self._one(name, list(rows)) for name in names}, None


def _sides(a: Any, b: Any, images: Any) -> tuple[_Side, _Side]:
    dumps = [_tensors(source) for source in (a, b)]
    if images is None and not all(d is not None for d in dumps):
        raise errors.InputError("no images were given: a network answers only to images")
    opened: list[Network | None] = [
        None if d is not None else open_network(s) for s, d in zip((a, b), dumps, strict=True)
    ]
    if isinstance(images, Iterator):
        images = list(images)  # it is read twice
    inputs: list[Inputs | None] = []
    for net in opened:
        first = opened[0] if inputs and inputs[0] is not None else None
        if net is not None and first is not None and _alike(first, net) and inputs[0] is not None:
            same = inputs[0]
            inputs.append(dataclasses.replace(same, tensor=net._to_model(same.tensor)))
        else:
            inputs.append(None if net is None else net.read(images))
    counts = {len(i) for i in inputs if i is not None}
    count = counts.pop() if counts else None
    sides: list[_Side] = []
    for source, net, read, arrays in zip((a, b), opened, inputs, dumps, strict=True):
        if net is not None and read is not None:
            sides.append(_Opened(net, read))
        else:
            assert arrays is not None
            sides.append(_Dump(source, arrays, count))
            count = sides[-1].count
    if sides[0].name == sides[1].name:
        for side, letter in zip(sides, "ab", strict=True):
            side.name += f" ({letter})"
    return sides[0], sides[1]


def _alike(a: Network, b: Network) -> bool:
    """Whether one reading of the pictures serves both."""
    return a.preprocess == b.preprocess and a.input_shape == b.input_shape


def _tensors(source: Any) -> Mapping[str, np.ndarray] | None:
    """The arrays of a dump; None if this is no dump."""
    if isinstance(source, Mapping):
        return source
    if isinstance(source, (str, os.PathLike)) and Path(source).suffix.lower() == ".npz":
        return _read_npz(Path(source).expanduser())
    return None


def _read_npz(path: Path) -> Mapping[str, np.ndarray]:
    if not path.is_file():
        raise errors.InputError(f"there is no file {path}")
    try:
        with zipfile.ZipFile(path) as held:
            need = sum(entry.file_size for entry in held.infolist())
            ours = "innersight.npy" in held.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise errors.InputError(f"{path} is no .npz file: {error}") from error
    if need > 0.5 * (free := free_memory("cpu")):
        raise errors.InputError(
            f"the tensors of {path} take {need / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free: dump fewer layers "
            "or images"
        )
    if ours:
        found = load(path)
        if not isinstance(found, FeatureMaps):
            raise errors.InputError(f"{path} holds a {found.KIND}; to compare, it must hold tensors by name")
        return found
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # each broken byte raises something else
        if "allow_pickle" in str(error):
            raise errors.InputError(f"{path} holds pickled objects, which could run code: not loaded") from None
        raise errors.InputError(f"{path} cannot be read as an .npz file of arrays: it is broken") from error


# ---------------------------------------------------------------------------------------------------------------------
# Asking


@dataclass
class _Work:
    """One comparison under way."""

    a: _Side
    b: _Side
    progress: Progress
    notes: list[str]
    looked_at: int = 0

    def __post_init__(self) -> None:
        if self.a.count != self.b.count:
            raise errors.InputError(f"{self.a.name} has {self.a.count} images and {self.b.name} {self.b.count}")
        for side, other in ((self.a, self.b), (self.b, self.a)):
            if isinstance(side, _Dump):
                side.fit(other, self.notes)
        for side in (self.a, self.b):
            if isinstance(side, _Opened):
                self.notes += [f"{side.name}: {note}" for note in (*side.net.notes, *side.inputs.notes)]
        if isinstance(self.a, _Opened) and isinstance(self.b, _Opened):
            sizes = [s.inputs.tensor.shape[1:] for s in (self.a, self.b)]
            if sizes[0] != sizes[1]:
                said = " and ".join("x".join(map(str, s)) for s in sizes)
                self.notes.append(
                    f"the inputs are {said}: maps are compared only where their sizes are equal, reasons on the picture"
                )

    def chunks(self, rows: Sequence[int], pairs: Sequence[Pair], what: str) -> Iterator[Any]:
        """Both networks over the images: rows, a's values, b's values, both answers, chunk by chunk."""
        names = [list(dict.fromkeys(p.a.name for p in pairs)), list(dict.fromkeys(p.b.name for p in pairs))]
        size = max(1, min(self.a.size(names[0]), self.b.size(names[1])))
        start = 0
        while start < len(rows):
            part = rows[start : start + size]
            try:
                (va, oa), (vb, ob) = self.a.values(part, names[0]), self.b.values(part, names[1])
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                size //= 2
                continue
            yield part, va, vb, oa, ob
            start += len(part)
            self.progress(what, start, len(rows))

    # -- alignment by values

    def refine(self, aligned: Alignment, reorder: bool) -> None:
        """Look at a sample of values: are channels in another order, does a name mislead, what is left?"""
        left_a = self._left(self.a, aligned.only_a)
        left_b = self._left(self.b, aligned.only_b)
        shapes = {p.shape for p in left_a} & {p.shape for p in left_b}
        names_a = [p.a.name for p in aligned.pairs] + [p.name for p in left_a if p.shape in shapes]
        names_b = [p.b.name for p in aligned.pairs] + [p.name for p in left_b if p.shape in shapes]
        sample_a, sample_b = self._samples(names_a, names_b)
        for pair in aligned.pairs:
            x, y = sample_a[pair.a.name], sample_b[pair.b.name]
            pair.match = alignment.same_values(x, y)
            if reorder:
                self._reorder(pair, x, y)
        alignment.by_values(aligned, left_a, left_b, sample_a, sample_b, min(self.a.count, PROBED), reorder)
        order = {place.name: i for i, place in enumerate(self.a.places())}
        aligned.pairs.sort(key=lambda pair: order[pair.a.name])

    def _left(self, side: _Side, only: Sequence[tuple[str, str]]) -> list[Place]:
        names = {name for name, _ in only}
        return [p for p in side.places() if p.name in names]

    def _reorder(self, pair: Pair, x: np.ndarray, y: np.ndarray) -> None:
        order, match = alignment.match_channels(x, y)
        if order is not None:
            pair.order, pair.standing, pair.match = order, pair.match, match
            pair.how += "; channels of b matched by correlation"

    def _samples(self, names_a: Sequence[str], names_b: Sequence[str]) -> tuple[dict, dict]:
        """Layer -> (C, values): some places of some images, the same in both networks and in whatever order."""
        rows = self._probed()
        found: tuple[dict[str, list], dict[str, list]] = ({}, {})
        sizes = (self.a.size(names_a), self.b.size(names_b))
        size = max(1, min(sizes))
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            for side, names, kept in zip((self.a, self.b), (names_a, names_b), found, strict=True):
                values, _ = side.values(part, names)
                for name in dict.fromkeys(names):
                    v = values[name].flatten(2) if values[name].dim() > 2 else values[name][:, :, None]
                    at = torch.linspace(0, v.shape[2] - 1, min(PLACES, v.shape[2])).round().long().to(v.device)
                    kept.setdefault(name, []).append(v[:, :, at].float().cpu().numpy())
            self.progress("aligning", start + len(part), len(rows))
        joined = [
            {n: np.concatenate(p).transpose(1, 0, 2).reshape(p[0].shape[1], -1) for n, p in kept.items()}
            for kept in found
        ]
        return joined[0], joined[1]

    def _probed(self) -> list[int]:
        """The images that are looked at first: the same whichever order they come in."""
        if self.a.count <= PROBED:
            return list(range(self.a.count))
        side = next((s for s in (self.a, self.b) if isinstance(s, _Opened)), None)
        if side is None:
            return list(range(PROBED))
        key = [hashlib.sha1(row.cpu().numpy().tobytes()).digest() for row in side.inputs.tensor]
        return sorted(sorted(range(self.a.count), key=key.__getitem__)[:PROBED])

    def pick(self, aligned: Alignment, layers: str | Sequence[str] | None) -> None:
        """Only the layers that were asked for."""
        if layers is None:
            return
        wanted = [layers] if isinstance(layers, str) else list(layers)
        if not wanted:
            raise errors.InputError("layers= is empty: name one or more, or leave it out for all")
        chosen = []
        why = dict([*aligned.only_b, *aligned.only_a])
        for name in wanted:
            pair = next((p for p in aligned.pairs if p.a.name == name), None)
            pair = pair or next((p for p in aligned.pairs if p.b.name == name), None)
            if pair is None and name in why:
                raise errors.InputError(f"layer {name!r} has no counterpart in the other network: {why[name]}")
            if pair is None:
                raise errors.unknown("layer", name, [p.a.name for p in aligned.pairs], " in both networks")
            chosen.append(pair)
        aligned.pairs = [p for p in aligned.pairs if p in chosen]

    def readers(self, aligned: Alignment) -> dict[str, list[str]]:
        """For each aligned layer of a the nearest aligned ones that it depends on."""
        places = {p.name: p for p in self.a.places()}
        there = {p.a.name for p in aligned.pairs}
        found: dict[str, list[str]] = {}
        for name in there:
            near: dict[str, None] = {}
            stack, seen = list(places[name].inputs), set()
            while stack:
                n = stack.pop(0)
                if n in seen:
                    continue
                seen.add(n)
                if n in there:
                    near[n] = None
                else:
                    stack += places[n].inputs
            found[name] = list(near)
        return found

    # -- the numbers

    def measure(self, aligned: Alignment) -> tuple[list[_Sums], Predicted | None]:
        sums = [self._sums(p) for p in aligned.pairs]
        answers: list[list[np.ndarray]] = [[], []]
        for part, va, vb, oa, ob in self.chunks(range(self.a.count), aligned.pairs, "comparing"):
            for pair, s in zip(aligned.pairs, sums, strict=True):
                s.add(part, va[pair.a.name], vb[pair.b.name])
            for side, output, rows in zip((self.a, self.b), (oa, ob), answers, strict=True):
                if (scores := self._scores(side, output)) is not None:
                    rows.append(scores)
        return sums, self._predicted(aligned, answers)

    def _sums(self, pair: Pair) -> _Sums:
        steps = [
            ((side.net.quantisation or {}) if isinstance(side, _Opened) else {}).get(name)
            for side, name in ((self.a, pair.a.name), (self.b, pair.b.name))
        ]
        return _Sums(pair.a.shape[0], self.a.count, pair.order, steps[0], steps[1])

    def _scores(self, side: _Side, output: Any) -> np.ndarray | None:
        if not isinstance(side, _Opened):
            return None
        try:
            return side.net._scores(output).float().cpu().numpy()
        except errors.Unsupported:
            return None

    def _predicted(self, aligned: Alignment, answers: list[list[np.ndarray]]) -> Predicted | None:
        found: list[Predictions | None] = []
        for side, other, rows in zip((self.a, self.b), (self.b, self.a), answers, strict=True):
            if isinstance(side, _Opened) and rows and len({r.shape[1] for r in rows}) == 1:
                kind = side.net._kind(side.inputs.tensor)
                found.append(
                    Predictions(
                        np.concatenate(rows), side.net.labels, side.inputs.pictures, kind, Provenance(side.name)
                    )
                )
            elif isinstance(side, _Dump) and isinstance(other, _Opened):
                found.append(self._dumped_answer(aligned, side, other))
            else:
                found.append(None)
        if found[0] is None or found[1] is None:
            who = [s.name for s, f in zip((self.a, self.b), found, strict=True) if f is None]
            self.notes.append(f"predictions are not compared: {' and '.join(who)} states no scores of classes")
            return None
        try:
            return Predicted.of(found[0], found[1], [p.name for p in found[0].pictures or found[1].pictures])
        except errors.Unsupported as error:
            self.notes.append(f"predictions are not compared: {error}")
            return None

    def _dumped_answer(self, aligned: Alignment, dump: _Dump, other: _Opened) -> Predictions | None:
        """The classes in a dump that holds the network's last layer."""
        for pair in reversed(aligned.pairs):
            theirs, ours = (pair.a, pair.b) if dump is self.b else (pair.b, pair.a)
            if theirs.outside and len(theirs.shape) == 1:
                logits = dump._one(ours.name, slice(None)).float().numpy()
                kind = other.net._kind(other.inputs.tensor)
                return Predictions(logits, other.net.labels, other.inputs.pictures, kind, Provenance(dump.name))
        return None

    def shown(
        self, aligned: Alignment, sums: Sequence[_Sums], predicted: Predicted | None
    ) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Layer -> channels, and their maps in both, of the picture on which the networks are furthest apart."""
        if predicted is not None and predicted.divergence.max() > 0:
            self.looked_at = int(predicted.divergence.argmax())
        else:
            noise = np.sum([s.share_of_noise() for s in sums], 0)
            self.looked_at = int(np.argmax(noise))
        found = {}
        for _, va, vb, _, _ in self.chunks([self.looked_at], aligned.pairs, "looking"):
            for pair, s in zip(aligned.pairs, sums, strict=True):
                if len(pair.a.shape) != 3:
                    continue
                picked = s.worst(SHOWN)
                order = np.arange(pair.a.shape[0]) if pair.order is None else np.array(pair.order)
                maps = [v[0].float().cpu().numpy() for v in (va[pair.a.name], vb[pair.b.name])]
                found[pair.a.name] = (picked, maps[0][picked], maps[1][order[picked]])
        return found

    # -- reasons

    def reasons(
        self, aligned: Alignment, predicted: Predicted | None, method: str, target: Any, layer: str | None
    ) -> Reasons | None:
        if not (isinstance(self.a, _Opened) and isinstance(self.b, _Opened)):
            self.notes.append("reasons are not compared: a dump has no gradients and cannot be run")
            return None
        try:
            return self._reasons(self.a, self.b, aligned, predicted, method, target, layer)
        except errors.Unsupported as error:
            self.notes.append(f"reasons are not compared: {error}")
            return None

    def _reasons(
        self, a: _Opened, b: _Opened, aligned: Alignment, predicted: Predicted | None, method: str, target: Any,
        layer: str | None,
    ) -> Reasons:  # fmt: skip
        at: list[str | None] = [None, None]
        if "layer" in find(method).needs:
            at = self._reason_layers(a, b, aligned, layer)
        if target is None and predicted is not None:
            self.notes.append("reasons are for the class that a predicts, in both networks (target= changes it)")
        found = Reasons(method, at[0], at[1])
        for start in range(0, a.count, 16):
            rows = range(start, min(start + 16, a.count))
            goals = (target, target) if target is not None or predicted is None else predicted.goals(rows)
            maps = [
                side.net.explain(
                    Inputs(side.inputs.tensor[rows.start : rows.stop], side.inputs.pictures[rows.start : rows.stop]),
                    method=method, target=goal, layer=where,
                )
                for side, goal, where in zip((a, b), goals, at, strict=True)
            ]  # fmt: skip
            found.add(rows, maps[0], maps[1], None if predicted is None else predicted.same, KEPT)
            self.progress("explaining", rows.stop, a.count)
        return found

    def _reason_layers(self, a: _Opened, b: _Opened, aligned: Alignment, layer: str | None) -> list[str | None]:
        with a.net.engine.session():
            chosen, note = Inquiry(a.net, a.inputs.tensor[:1], None).layer(layer)
        if note:
            self.notes.append(f"reasons: {note.partition(' (')[0]}, of a (at= changes it)")
        partner = next((p.b.name for p in aligned.pairs if p.a.name == chosen.name), None)
        if partner is not None and b.table[partner].grid is not None:
            return [chosen.name, partner]
        with b.net.engine.session():
            other, _ = Inquiry(b.net, b.inputs.tensor[:1], None).layer(None)
        self.notes.append(f"reasons: {chosen.name} is not aligned, so b is looked at in {other.name}, its own last")
        return [chosen.name, other.name]


class _Sums:
    """What is kept of a layer: sums over images and places for each channel, and over channels for each image."""

    def __init__(self, channels: int, images: int, order: tuple[int, ...] | None, step_a: Any, step_b: Any):
        self.order = None if order is None else torch.tensor(order)
        self.steps = (step_a, step_b)
        self.noise, self.aa, self.bb, self.ab = np.zeros((4, channels))
        self.low = np.full((2, channels), np.inf)
        self.high = np.full((2, channels), -np.inf)
        self.cut = np.zeros((2, 2, channels))  # side, low or high end
        self.values = 0  # of a channel
        self.largest = 0.0
        self.by_image = np.zeros((2, images))  # signal, noise

    def add(self, rows: Sequence[int], a: torch.Tensor, b: torch.Tensor) -> None:
        b = b.to(a.device)
        if self.order is not None:
            b = b[:, self.order.to(b.device)]
        step = max(1, (1 << 22) // max(a[0].numel(), 1))
        for start in range(0, len(a), step):
            self._add(rows[start : start + step], a[start : start + step], b[start : start + step])

    def _add(self, rows: Sequence[int], a: torch.Tensor, b: torch.Tensor) -> None:
        sides = [v.reshape(*v.shape[:2], -1).double() for v in (a, b)]
        x, y = sides
        d = x - y

        def total(v: torch.Tensor) -> np.ndarray:
            return v.sum(-1).cpu().numpy()  # (n, C)

        noise, signal = total(d * d), total(x * x)
        self.noise += noise.sum(0)
        self.aa += signal.sum(0)
        self.bb += total(y * y).sum(0)
        self.ab += total(x * y).sum(0)
        self.by_image[0, list(rows)] = signal.sum(1)
        self.by_image[1, list(rows)] = noise.sum(1)
        self.values += x.shape[0] * x.shape[2]
        self.largest = max(self.largest, float(d.abs().max()))
        for k, v in enumerate(sides):
            self.low[k] = np.minimum(self.low[k], v.amin((0, 2)).cpu().numpy())
            self.high[k] = np.maximum(self.high[k], v.amax((0, 2)).cpu().numpy())
            if self.steps[k] is not None:
                q = self.steps[k].integers(v)
                self.cut[k, 0] += (q <= self.steps[k].lo).sum((0, 2)).cpu().numpy()
                self.cut[k, 1] += (q >= self.steps[k].hi).sum((0, 2)).cpu().numpy()

    def share_of_noise(self) -> np.ndarray:
        """(N,): how far each image is off, for choosing one."""
        signal, noise = self.by_image
        return noise / np.maximum(signal + noise, 1e-300)

    def worst(self, count: int) -> np.ndarray:
        """The channels with the least signal to noise; of equal ones those with most energy."""
        db = decibel(self.aa, self.noise)
        live = (self.aa > 0) | (self.bb > 0)
        return np.lexsort((-self.aa, db, ~live))[:count]

    def finish(self, pair: Pair, shown: Any) -> LayerComparison:
        return LayerComparison(
            a=pair.a.name, b=pair.b.name, kind_a=pair.a.kind, kind_b=pair.b.kind, shape=pair.a.shape, how=pair.how,
            order=pair.order, standing=pair.standing, match=pair.match,
            noise=self.noise, signal_a=self.aa, signal_b=self.bb, product=self.ab, low=self.low, high=self.high,
            saturated=tuple(self._saturated(k) for k in (0, 1)), largest=self.largest,
            by_image=decibel(*self.by_image), quantised=tuple(None if s is None else str(s) for s in self.steps),
            shown=shown,
        )  # fmt: skip

    def _saturated(self, k: int) -> np.ndarray | None:
        """(C,): the share of values at an end of what can be represented; zero behind a ReLU is no such end."""
        step = self.steps[k]
        if step is None:
            return None
        low = 0 if step.lo == step.zero_point else self.cut[k, 0]
        return (low + self.cut[k, 1]) / max(self.values, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Where they part


def _first(rows: Sequence[LayerComparison], reads: Mapping[str, list[str]], threshold: float) -> Divergence | None:
    by_name = {row.a: row for row in rows}
    row = next((r for r in rows if r.sqnr < threshold), None)
    return None if row is None else Divergence.of(row, [by_name[n] for n in reads[row.a]], threshold)


def _largest(rows: Sequence[LayerComparison], reads: Mapping[str, list[str]]) -> Divergence | None:
    by_name = {row.a: row for row in rows}
    all_ = [Divergence.of(r, [by_name[n] for n in reads[r.a]]) for r in rows if reads[r.a]]
    falls = [d for d in all_ if d.drop > 0]
    return max(falls, key=lambda d: d.drop) if falls else None
