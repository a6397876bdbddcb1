"""The plan of a scan: which layers, which counts of each, how images are batched, how labels name classes.

It is settled by the first image, written into the manifest and taken from there when a scan goes on, so that every
part of a scan is counted the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from innersight import errors, targets
from innersight.observe.passes import Request, _best_batch, _near

if TYPE_CHECKING:
    from innersight.layers import Layer
    from innersight.network import Network
    from innersight.observe.observer import Recording
    from innersight.scanning.data import Source

BLOCK = 64
CLASS_NUMBERS = 4_000_000
"""Class means are kept where channels times classes stay below this, in all layers together; deepest layers first."""
CROSS_CHANNELS, CROSS_NUMBERS = 512, 4_000_000
"""Correlations are kept for layers of so many channels, and so many numbers in all; deepest layers first."""
EMBEDDING = 512
"""Wider embeddings are projected to half of this."""


@dataclass(frozen=True)
class Watched:
    """A layer of the scan: name, kind, grid (C, H, W) at the input's usual size, and what is kept beyond sums.

    ends: the values beyond which it clips, None where it does not; None if it has no such end
    """

    name: str
    kind: str
    grid: tuple[int, int, int]
    by_class: bool = True
    cross: bool = True
    sees: str = ""
    ends: tuple[float | None, float | None] | None = None

    @property
    def channels(self) -> int:
        return self.grid[0]


@dataclass(frozen=True)
class Plan:
    """How a scan counts.

    classes:       names by number; labels and predictions are numbers into them; empty if there are none
    named:         lower-case label -> class
    renumbered:    number of a label -> class, where the data set counts otherwise than the network; None if alike
    predicts:      whether the network names a class for an image
    probabilities: whether its output is probabilities already
    embedding:     the layer whose mean over the picture is kept for each image; "" for none
    width:         of the embedding as kept
    sensitivity:   the layer whose channels are removed one by one; "" for none
    channels_last: whether the input is laid out so (a CPU convolves faster then, in another order of its sums)
    notes:         what was decided, what was bounded
    """

    layers: tuple[Watched, ...]
    batch: int
    channels_last: bool = False
    top: int = 9
    block: int = BLOCK
    classes: tuple[str, ...] = ()
    named: Mapping[str, int] = field(default_factory=dict)
    renumbered: tuple[int, ...] | None = None
    predicts: bool = True
    probabilities: bool = False
    by_label: bool = True
    embedding: str = ""
    embedding_size: int = 0
    sensitivity: str = ""
    notes: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        return self.embedding_size if self.embedding_size <= EMBEDDING else EMBEDDING // 2

    def class_of(self, label: Any) -> int:
        """The class that a label names; -1 if it names none."""
        if isinstance(label, str):
            found = self.named.get(label.strip().lower())
            if found is not None or not label.strip().isdecimal():
                return -1 if found is None else found
            label = int(label)
        if label is None:
            return -1
        if self.renumbered is not None:
            return self.renumbered[label] if 0 <= label < len(self.renumbered) else -1
        return label if 0 <= label < len(self.classes) else -1

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        given = dict(data)
        layers = tuple(
            Watched(**{**one, "grid": tuple(one["grid"]), "ends": one["ends"] and tuple(one["ends"])})
            for one in given.pop("layers")
        )
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        return cls(layers=layers, **given)


def make(
    net: Network, source: Source, x: torch.Tensor, *, layers: Sequence[str] | None, top: int, sensitivity: str | None,
    notes: Iterable[str] = (),
) -> Plan:  # fmt: skip
    """The plan for this network and these images, `x` (1, C, H, W) being one of them."""
    found = [*notes]
    table = net._layers_for(x)
    chosen = _chosen(net, table, layers, found)
    removed = "" if sensitivity is None else table[sensitivity].name
    with net.engine.session():
        recording = net._learn(x)
        embedding = _embedding(recording)
        pooled: list[int] = []
        reads = {embedding: lambda v: pooled.append(pool(table[embedding], v).shape[1])} if embedding else {}
        passed = net.engine.run(x, Request(reduce=reads))
    classes, predicts = _classes(net, source, passed.output, found)
    named, renumbered = _labels(source, classes, found)
    batch = net.engine.fixed_batch or min(BLOCK, _best_batch(x, False))
    if embedding and pooled[0] > EMBEDDING:
        found.append(f"embeddings of {embedding} ({pooled[0]} numbers) are kept as {EMBEDDING // 2} random projections")
    last = _fits_last(net, x, passed.output)
    watched = _bounded([_watched(layer) for layer in chosen], len(classes), found)
    return Plan(
        layers=tuple(watched), batch=batch, channels_last=last, top=top, classes=classes, named=named,
        renumbered=renumbered,
        predicts=predicts, probabilities=predicts and net._kind(x) == "probabilities", by_label=source.labelled,
        embedding=embedding, embedding_size=pooled[0] if embedding else 0, sensitivity=removed,
        notes=tuple(dict.fromkeys(found)),
    )  # fmt: skip


def _fits_last(net: Network, x: torch.Tensor, output: Any) -> bool:
    """Whether the network takes a channels-last input, and says the same."""
    if x.dim() != 4 or x.device.type != "cpu" or net.engine.fixed_batch:
        return False
    try:
        with net.engine.session():
            other = net.engine.run(x.to(memory_format=torch.channels_last), Request()).output
    except (errors.InnersightError, RuntimeError):  # it asks maps for a `view`
        return False
    return _near(output, other)


def grid_of(layer: Layer) -> tuple[int, int, int] | None:
    """(C, H, W) as it is counted: a vector is a map of one cell; None for what is neither."""
    if layer.grid is not None:
        return layer.grid
    return (layer.shape[0], 1, 1) if len(layer.shape) == 1 else None


def maps_of(layer: Layer, value: torch.Tensor) -> torch.Tensor:
    """Its value as (N, C, H, W)."""
    return layer.to_grid(value) if layer.grid is not None else value[:, :, None, None]


def pool(layer: Layer, value: torch.Tensor) -> torch.Tensor:
    """(N, D): the mean over the picture, or over whatever stands between images and their last dimension."""
    if layer.grid is not None:
        return layer.to_grid(value).flatten(2).mean(-1)
    return value if value.dim() == 2 else value.flatten(1, -2).mean(1)


def _watched(layer: Layer) -> Watched:
    grid = grid_of(layer)
    assert grid is not None
    sees = "" if layer.grid is None or layer.receptive_field is None else str(layer.receptive_field)
    return Watched(layer.name, layer.kind, grid, sees=sees, ends=_ends(layer))


_SURE = ("softmax", "sigmoid", "logistic", "hardsigmoid", "hard_sigmoid", "tanh")


def _ends(layer: Layer) -> tuple[float | None, float | None] | None:
    """Where the layer clips: a quantised one at its range (but not at zero, there a ReLU cuts), a ReLU6 at 6.

    A probability or a gate is at its end where it is sure, and loses nothing.
    """
    sure = any(name.lower().startswith(_SURE) for name in (layer.kind, layer.node.op))
    if layer.quantised is not None and not sure:
        low, high = layer.quantised.range
        return (low if low < 0 else None), high
    if layer.kind.lower().rstrip("_") == "relu6":
        return None, 6.0
    return None


def _chosen(net: Network, table: Any, layers: Sequence[str] | None, notes: list[str]) -> list[Layer]:
    if layers is None:
        fit = [layer for layer in table.values() if grid_of(layer) is not None]
        if len(fit) < len(table):
            left = [layer.name for layer in table.values() if grid_of(layer) is None]
            notes.append(f"left out, being neither maps nor one vector an image: {_some(left)}")
        if not fit:
            raise errors.Unsupported(
                f"{net.name} has no layer whose values have channels, so there is nothing to count"
            )
        return fit
    chosen: dict[str, Layer] = {}
    for name in layers:
        of_kind = [layer for layer in table.values() if layer.kind.lower() == name.lower()]
        for layer in [table[name]] if name in table or not of_kind else of_kind:
            if grid_of(layer) is None:
                raise errors.Unsupported(
                    f"layer {layer.name!r} {layer.shape} has neither maps nor one vector an image, so its channels "
                    "cannot be counted"
                )
            chosen[layer.name] = layer
    if not chosen:
        raise errors.InputError("layers= is empty: name one or more, or leave it out for every layer")
    return list(chosen.values())


def _bounded(watched: list[Watched], classes: int, notes: list[str]) -> list[Watched]:
    """With what does not fit left out, and said."""
    by_class, cross = CLASS_NUMBERS, CROSS_NUMBERS
    kept = []
    for layer in reversed(watched):
        fits = bool(classes) and classes * layer.channels <= by_class
        by_class -= classes * layer.channels if fits else 0
        square = layer.channels <= CROSS_CHANNELS and layer.channels**2 <= cross
        cross -= layer.channels**2 if square else 0
        kept.append(replace(layer, by_class=fits, cross=square))
    kept.reverse()
    if classes and (without := [one.name for one in kept if not one.by_class]):
        notes.append(f"no class means of {_some(without)}: {CLASS_NUMBERS:,} numbers are kept, deepest layers first")
    if without := [one.name for one in kept if not one.cross]:
        notes.append(
            f"no correlations of {_some(without)}: they are kept for layers of up to {CROSS_CHANNELS} channels and "
            f"{CROSS_NUMBERS:,} numbers in all, deepest layers first"
        )
    return kept


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more layers"


def _embedding(recording: Recording) -> str:
    """The value that the classifier reads: the input of the last operation with weights before the answer."""
    if not recording.outputs:
        return ""
    node = recording.nodes[recording.outputs[0].node]
    while node.inputs:
        before = recording.nodes[node.inputs[0]]
        if node.parameters and node.op in ("linear", "addmm", "matmul", "conv2d"):
            return before.name if before.kind in ("layer", "view", "copy") else ""
        if node.parameters or len(node.inputs) > 1:
            return ""
        node = before
    return ""


def _classes(net: Network, source: Source, output: Any, notes: list[str]) -> tuple[tuple[str, ...], bool]:
    """The names of the classes, and whether the network predicts one."""
    try:
        count = targets.class_scores(net._main(output)).shape[1]
    except errors.Unsupported as error:
        notes.append(f"no predictions: {error}")
        count = 0
    if count == 1:
        notes.append("no predictions: the network answers with one number, which names no class")
    if count < 2:
        return tuple(source.classes or ()), False
    if net.labels is not None and len(net.labels) == count:
        return tuple(map(str, net.labels)), True
    if source.classes is not None and len(source.classes) == count:
        return tuple(source.classes), True
    return tuple(str(i) for i in range(count)), True


def _labels(source: Source, classes: Sequence[str], notes: list[str]) -> tuple[dict[str, int], tuple[int, ...] | None]:
    """Label in words -> class, number of a label -> class; what was decided is noted."""
    named: dict[str, int] = {}
    for i, name in enumerate(classes):
        named.setdefault(name.strip().lower(), i)
    if not source.labelled or source.classes is None or not classes:
        return named, None
    theirs = [name.strip().lower() for name in source.classes]
    known = [name in named for name in theirs]
    if all(known):
        numbers = tuple(named[name] for name in theirs)
        return named, None if numbers == tuple(range(len(classes))) else numbers
    if all(name.isdecimal() and int(name) < len(classes) for name in theirs):
        return named, None
    if len(theirs) == len(classes):
        notes.append(
            f"the labels ({source.classes[0]}, ...) are none of the network's classes ({classes[0]}, ...), so they are "
            "taken as its classes in their order (labels= names them)"
        )
        return {**named, **{name: i for i, name in enumerate(theirs)}}, None
    if any(known):
        missing = [name for name, k in zip(source.classes, known, strict=True) if not k]
        notes.append(f"labels that name no class of the network count as none: {_some(missing)}")
        return named, tuple(named.get(name, -1) for name in theirs)
    notes.append(
        f"the {len(theirs)} labels ({source.classes[0]}, ...) name none of the network's {len(classes)} classes, so "
        "nothing is said of right and wrong (labels= names the classes)"
    )
    return {}, ()


def projection(size: int) -> np.ndarray | None:
    """(size, width) of signs over the width's root, which keeps distances (Achlioptas, 2003); None if not needed."""
    if size <= EMBEDDING:
        return None
    width = EMBEDDING // 2
    signs = np.random.default_rng(0).integers(0, 2, (size, width), dtype=np.int8) * 2 - 1
    return signs.astype(np.float32) / np.float32(np.sqrt(width))
