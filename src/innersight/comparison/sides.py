"""What is compared: an opened network with its pictures, or a file of tensors by name."""

from __future__ import annotations

import dataclasses
import math
import os
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from innersight import errors
from innersight.comparison.alignment import Place
from innersight.images import Inputs, Picture, _items
from innersight.layers import Layer
from innersight.network import Network, prepared_alike
from innersight.network import open as open_network
from innersight.observe.passes import Request, free_memory
from innersight.results import FeatureMaps, load

SHARED = "its values are not shared out among the images"


class Side:
    """What is compared: layers, and their values for some of the images with channels first."""

    name: str
    count: int
    pictures: list[Picture] | None = None
    odd: dict[str, str]  # layers whose values do not belong to one image each, and what is known of them

    def places(self) -> list[Place]:
        raise NotImplementedError

    def session(self) -> Any:
        return ExitStack()

    def size(self, _names: Sequence[str]) -> int:
        """How many images fit into one chunk that holds these layers."""
        return self.count

    def values(self, rows: Sequence[int], names: Sequence[str]) -> tuple[dict[str, torch.Tensor | None], Any]:
        """Layer -> (n, C, ...) for these images, and what the network answers to them (None for a dump).

        None for a layer whose values are not of these images alone.
        """
        raise NotImplementedError


class Opened(Side):
    def __init__(self, net: Network, inputs: Inputs):
        self.net, self.inputs, self.name = net, inputs, net.name
        self.count = len(inputs.tensor)
        self.pictures = inputs.pictures
        self.table = net._layers_for(inputs.tensor[:1])
        self.recording = self.table._recording
        self.shapes = {name: self._shape(self.table[name]) for name in self.table}
        self.odd = {name: SHARED for name, shape in self.shapes.items() if shape is None}

    def session(self) -> Any:
        return self.net.engine.session()

    def size(self, names: Sequence[str]) -> int:
        return self.net.engine.chunk_size(self.inputs.tensor, Request(read=list(names)))

    def places(self) -> list[Place]:
        listed = {self.table[name].node.index: name for name in self.table}
        ends = {ref.node for ref in self.recording.outputs}
        return [
            Place(name, self.table[name].kind, shape, self._reads(i, listed), i in ends)
            for i, name in listed.items()
            if (shape := self.shapes[name]) is not None
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

    def _shape(self, layer: Layer) -> tuple[int, ...] | None:
        batch = max(self.recording.batch, 1)
        value = _first_axis(layer, torch.empty(layer.node.shape, device="meta"), batch)
        return None if value is None or 0 in value.shape else tuple(value.shape[1:])

    def values(self, rows: Sequence[int], names: Sequence[str]) -> tuple[dict[str, torch.Tensor | None], Any]:
        x = self.inputs.tensor[list(rows)]
        passed = self.net.engine.run(x, Request(read=list(names)))
        found = {n: _first_axis(self.table[n], passed.values[n].detach(), len(rows)) for n in names}
        for name, value in found.items():
            if value is None or value.shape[1:] != self.shapes[name]:
                found[name] = None
                self.odd[name] = SHARED
        return found, passed.output


def _first_axis(layer: Layer, value: torch.Tensor, count: int) -> torch.Tensor | None:
    """A layer's value with images first and channels second, without sides of length 1: (n, C, H, W), (n, C).

    None where its values are not shared out among the images, such as the boxes that a detector proposes.
    """
    if layer.grid is not None:
        value = layer.to_grid(value)
    else:
        labels = () if layer.layout is None else layer.layout.labels
        at = labels.index("n") if labels.count("n") == 1 else 0
        if value.dim() > 1 and value.shape[at] == count:
            channel = layer.channel_axis if layer.channel_axis != at else value.dim() - 1
            value = value.movedim(at, 0).movedim(channel + (channel < at), 1)
        elif at or value.numel() % count:
            return None
        else:
            value = value.reshape(count, -1)
    if value.shape[0] != count:
        return None
    return value.flatten(1) if math.prod(value.shape[2:]) == 1 else value


class Dump(Side):
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
        self.odd = {}
        for name, v in list(self.arrays.items()):
            if len(v) != self.count and self.count == 1:
                v = self.arrays[name] = v[None]
            if len(v) != self.count:  # a weight, perhaps
                self.odd[name] = f"its shape is {'x'.join(map(str, v.shape))}, and there are {self.count} images"
                del self.arrays[name]
            elif v.dtype.kind == "f" and not np.isfinite(v).all():
                raise errors.InputError(f"{self.name}: {name!r} holds NaN or infinite values; dump it again")
        if not self.arrays:
            name, why = next(iter(self.odd.items()))
            raise errors.InputError(f"{self.name}: {name!r} cannot be compared: {why}, which its first axis must count")
        self.last = False  # whether the channels are the last axis
        self.steps: dict[str, Any] = {}  # how integers become real values

    def fit(self, other: Side, notes: list[str]) -> None:
        """Read the axes as the other side has them."""
        shapes = {p.shape for p in other.places()}
        pictures = [v.shape[1:] for v in self.arrays.values() if v.ndim == 4]
        first = sum(s in shapes for s in pictures)
        last = sum((s[2], *s[:2]) in shapes for s in pictures)
        self.last = last > first
        if self.last:
            notes.append(f"{self.name}: arrays of four axes are read with the channels last")

    def scale(self, other: Side, partners: Mapping[str, str], notes: list[str]) -> None:
        """Take from the other side what integers stand for; `partners` are its layers by the names here."""
        steps = (other.net.quantisation or {}) if isinstance(other, Opened) else {}
        whole = [name for name, v in self.arrays.items() if v.dtype.kind in "iu" and name in partners]
        self.steps = {name: steps[partners[name]] for name in whole if partners[name] in steps}
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

    def values(self, rows: Sequence[int], names: Sequence[str]) -> tuple[dict[str, torch.Tensor | None], Any]:
        return {name: self._one(name, list(rows)) for name in names}, None


def sides(a: Any, b: Any, images: Any) -> tuple[Side, Side]:
    dumps = [_tensors(source) for source in (a, b)]
    if images is None and not all(d is not None for d in dumps):
        raise errors.InputError("no images were given: a network answers only to images")
    networks = iter(prepared_alike([open_network(s) for s, d in zip((a, b), dumps, strict=True) if d is None]))
    opened: list[Network | None] = [None if d is not None else next(networks) for d in dumps]
    images = _held(images)
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
    both: list[Side] = []
    for source, net, read, arrays in zip((a, b), opened, inputs, dumps, strict=True):
        if net is not None and read is not None:
            both.append(Opened(net, read))
        else:
            assert arrays is not None
            both.append(Dump(source, arrays, count))
            count = both[-1].count
    return both[0], both[1]


def _held(images: Any) -> Any:
    """The images in a form that is the same when read a second time: a loader may shuffle, a generator ends."""
    fixed = (str, os.PathLike, Image.Image, Mapping, list, tuple, Inputs, type(None))
    return images if isinstance(images, fixed) or hasattr(images, "__array__") else list(_items(images))


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
