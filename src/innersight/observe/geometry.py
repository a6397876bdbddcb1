"""Where every unit of a layer looks, and what the dimensions of a layer's output mean, from the operations themselves.

`trace(recording)` goes once through a recorded run, with numbers and no tensors. For each node it follows two things:
which part of the picture each unit sees, a line of pixels for rows and one for columns (`lines`), and which dimension
is which, so that the way back to an (N, C, H, W) grid is known (`dimensions`). What an operation does to both is a rule
in a table (`operations`). Different channels may see differently (a concatenation); a few classes of channels are told
apart.

What cannot be followed is said to see the whole picture, not exactly. A box never leaves out a pixel that counts.

Receptive fields: Araujo, Norris, Sim, Computing Receptive Fields of Convolutional Neural Networks, Distill 2019.
Effective ones: Luo, Li, Urtasun, Zemel, Understanding the Effective Receptive Field, NeurIPS 2016.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, reduce
from typing import TYPE_CHECKING, Any

import numpy as np

from innersight import errors
from innersight.observe import lines
from innersight.observe.dimensions import (
    AXES,
    Atom,
    Dim,
    State,
    Tokens,
    along,
    anchored,
    atoms_of,
    descending,
    merged,
    mix,
    size_of,
)
from innersight.observe.lines import Lost, Regular
from innersight.observe.observer import Ref
from innersight.observe.operations import RULES, Call, refs, weighted

if TYPE_CHECKING:
    import torch

    from innersight.observe.observer import Node, Recording

Box = tuple[int, int, int, int]  # top, left, bottom, right; the last two are not inside
_GRID_ORDER = {"n": 0, "c": 1, "?": 1, "f": 1, "y": 2, "x": 3}  # "?" and frames only where there is one


@dataclass(frozen=True)
class Layout:
    """What the dimensions of a layer's output mean.

    labels: for each dimension "n" batch, "c" channel, "y", "x" space, "t" tokens (rows times columns, perhaps with
    class or register tokens around them), "time", or "?".
    grid: rows and columns of the feature map, None if there is none.
    guessed: read from the shape alone, because the operations could not be followed.
    """

    labels: tuple[str, ...]
    grid: tuple[int, int] | None
    note: str = ""
    guessed: bool = False
    prefix: int = 0
    suffix: int = 0
    dims: tuple[Dim, ...] = ()
    roll: tuple[int, int] = (0, 0)

    @property
    def spatial(self) -> bool:
        """Can be shown as feature maps."""
        return self.grid is not None

    @property
    def channel(self) -> int | None:
        """The dimension that holds the channels, if it is one."""
        return self.labels.index("c") if self.labels.count("c") == 1 else None

    def to_grid(self, tensor: torch.Tensor) -> torch.Tensor:
        """The layer's output, of any batch size, as (N, C, H, W): a view where possible."""
        if self.grid is None:
            raise errors.Unsupported(
                f"this layer's output {tuple(tensor.shape)} has no rows and columns; choose a layer with feature maps"
            )
        if tensor.dim() != len(self.dims):
            raise errors.InputError(
                f"this layer's output has {len(self.dims)} dimensions, not {tensor.dim()}: {tuple(tensor.shape)}"
            )
        if self.labels == ("n", "c", "y", "x") and all(len(dim) == 1 for dim in self.dims) and not any(self.roll):
            return tensor  # nothing to put in order
        for d, dim in enumerate(self.dims):
            if len(dim) == 1 and isinstance(dim[0], Tokens):
                tensor = tensor.narrow(d, dim[0].prefix, dim[0].size - dim[0].prefix - dim[0].suffix)
        atoms = [a for dim in self.dims for a in atoms_of(dim)]
        parts = tensor.reshape([-1 if a.axis == "n" else a.size for a in atoms])
        order = sorted(range(len(atoms)), key=lambda i: (_GRID_ORDER[atoms[i].axis], descending(atoms[i]), i))
        channels = math.prod(a.size for a in atoms if a.axis == "c")
        batch = tensor.numel() // max(1, channels * self.grid[0] * self.grid[1])
        maps = parts.permute(order).reshape(batch, channels, *self.grid)
        return maps.roll((-self.roll[0], -self.roll[1]), (2, 3)) if any(self.roll) else maps


@dataclass(frozen=True)
class AxisField:
    """The receptive field along one axis, in pixels of the input: unit i sees first[i] ... last[i] - 1.

    regular: (jump, start of unit 0, size) where one formula holds away from the border, else None.
    """

    pixels: int
    first: tuple[int, ...]
    last: tuple[int, ...]
    regular: Regular | None
    exact: bool

    @cached_property
    def size(self) -> Fraction:
        """How many pixels a unit sees: before clipping to the picture if that is regular, else the most of any."""
        if self.regular:
            return self.regular.size if self.regular.tight else Fraction(math.floor(self.regular.size))
        return Fraction(max((b - a for a, b in zip(self.first, self.last, strict=True) if b > a), default=0))

    @cached_property
    def jump(self) -> Fraction:
        """Pixels from one unit to the next; the mean where they are uneven, 0 for a single unit or all the same."""
        if self.regular:
            return self.regular.jump
        seen = [a + b for a, b in zip(self.first, self.last, strict=True) if b > a]
        return Fraction(seen[-1] - seen[0], 2 * (len(seen) - 1)) if len(seen) > 1 else Fraction(0)

    @cached_property
    def start(self) -> Fraction:
        """First pixel of unit 0; negative where the field hangs over the border."""
        if self.regular:
            return self.regular.start
        return Fraction(self.first[0] if self.last[0] > self.first[0] else 0)

    @cached_property
    def centre(self) -> Fraction:
        return self.start + ((self.regular.size if self.regular else self.size) - 1) / 2

    @cached_property
    def whole(self) -> bool:
        return all(a <= 0 and b >= self.pixels for a, b in zip(self.first, self.last, strict=True))

    def interval(self, i: int, clip: bool) -> tuple[int, int]:
        if not -len(self.first) <= i < len(self.first):
            raise errors.InputError(f"there is no unit {i}; this layer has {len(self.first)} along this side")
        i %= len(self.first)
        a, b = self.first[i], self.last[i]
        if self.regular and (not clip or b <= a):
            begin = self.regular.start + i * self.regular.jump
            low, high = math.floor(begin), math.ceil(begin + self.regular.size)
            if clip:  # a unit that sees nothing: an empty box where it lies
                at = min(max((low + high) // 2, 0), self.pixels)
                return at, at
            return (min(low, a), max(high, b)) if b > a else (low, high)
        return (a, b) if b > a else (0, 0)


@dataclass(frozen=True)
class ReceptiveField:
    """The pixels of the input that can change a unit of a layer.

    exact: `box` is what every unit sees, as tight as a box can be. Otherwise it is contained in `box`, which never
    leaves out a pixel that counts. Of channels that see differently, it is what all of them see together. Where a
    picture is smaller than the field, `size` says the field's full size.

    >>> str(field)
    '43x43, stride 8, centre 3.5'
    """

    y: AxisField
    x: AxisField

    @property
    def size(self) -> tuple[Fraction, Fraction]:
        return self.y.size, self.x.size

    @property
    def stride(self) -> tuple[Fraction, Fraction]:
        return self.y.jump, self.x.jump

    @property
    def centre(self) -> tuple[Fraction, Fraction]:
        """Middle of unit (0, 0)'s field, in pixels: 0 is the middle of the first pixel."""
        return self.y.centre, self.x.centre

    @property
    def exact(self) -> bool:
        return self.y.exact and self.x.exact

    @property
    def whole(self) -> bool:
        """Every unit sees the whole picture."""
        return self.y.whole and self.x.whole

    @property
    def picture(self) -> tuple[int, int]:
        return self.y.pixels, self.x.pixels

    def box(self, y: int, x: int, *, clip: bool = True) -> Box:
        """What unit (y, x) sees: (top, left, bottom, right) in pixels, half-open; `clip` keeps it in the picture."""
        top, bottom = self.y.interval(y, clip)
        left, right = self.x.interval(x, clip)
        return top, left, bottom, right

    def __str__(self) -> str:
        regular = self.y.regular and self.x.regular
        if self.whole and not regular:
            return "whole picture" if self.exact else "up to the whole picture"
        text = _pair(self.size, "x")
        if not regular:
            alone = len(self.y.first) == len(self.x.first) == 1
            stride = "" if alone or not any(self.stride) else f", stride {_pair(self.stride, 'x', merge=True)}"
            return f"{text}{stride}" if alone and self.exact else f"up to {text}{stride}"
        tight = self.exact and self.y.regular.tight and self.x.regular.tight  # type: ignore[union-attr]
        stride, centre = _pair(self.stride, "x", merge=True), _pair(self.centre, ", ", merge=True)
        centre = f"({centre})" if ", " in centre else centre
        return f"{'' if tight else 'up to '}{text}, stride {stride}, centre {centre}"

    def to_json(self) -> dict[str, Any]:
        return {
            "size": [float(v) for v in self.size],
            "stride": [float(v) for v in self.stride],
            "centre": [float(v) for v in self.centre],
            "exact": self.exact,
            "whole": self.whole,
            "text": str(self),
        }


@dataclass(frozen=True)
class Geometry:
    """What a node's output means and what its units see."""

    layout: Layout
    receptive_field: ReceptiveField


def _pair(values: tuple[Fraction, Fraction], sign: str, merge: bool = False) -> str:
    first, second = (f"{float(v):.5g}" for v in values)
    return first if merge and first == second else f"{first}{sign}{second}"


def effective_box(energy: np.ndarray, share: float = 0.9) -> Box:
    """The box that holds `share` of a unit's squared gradient: its effective receptive field.

    energy: (H, W), the squared gradient of the unit for each pixel (colour channels summed). The box leaves out the
    same share of the energy's row sums above and below, and of its column sums left and right, at most q at each side;
    it is the one with the largest q that still holds at least `share` of all energy. (top, left, bottom, right),
    half-open; (0, 0, 0, 0) where there is no energy at all.
    """
    energy = np.asarray(energy, dtype=np.float64)
    if energy.ndim != 2 or not np.isfinite(energy).all() or (energy < 0).any():
        raise errors.InputError("the energy must be one (H, W) array of finite numbers that are not negative")
    if not 0 < share <= 1:
        raise errors.InputError(f"share must be above 0 and at most 1, not {share}")
    total = energy.sum()
    if total == 0:
        return 0, 0, 0, 0
    table = np.pad(energy.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    sides = []  # for each axis: energy before each line, and behind it
    for axis in (1, 0):
        sums = energy.sum(axis) / total
        sides.append((np.cumsum(sums).round(12), np.cumsum(sums[::-1]).round(12)))  # even energy, even sides

    def box(q: float) -> Box:
        (above, below), (left, right) = sides
        cut = [int(np.searchsorted(s, q, "right")) for s in (above, below, left, right)]
        top, low, west, east = (min(c, n - 1) for c, n in zip(cut, (len(above),) * 2 + (len(left),) * 2, strict=True))
        return top, west, len(above) - low, len(left) - east

    def held(b: Box) -> float:
        return table[b[2], b[3]] - table[b[0], b[3]] - table[b[2], b[1]] + table[b[0], b[1]]

    tries = np.unique(np.concatenate([[0.0], *(s for pair in sides for s in pair)]))
    tries = tries[tries < 0.5]  # beyond, the sides would meet
    enough = share * total * (1 - 1e-12)
    low, high = 0, len(tries) - 1  # the energy held falls with q: bisect
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if held(box(tries[middle])) >= enough else (low, middle - 1)
    return box(tries[low])


def trace(recording: Recording) -> list[Geometry | None]:
    """Layout and receptive field of every node of a recorded run, by index; None for those that leave no tensor.

    The picture is the first input with rows and columns.
    """
    pixels, states = _states(recording)
    found: list[Geometry | None] = []
    for node in recording.nodes:
        state = states.get((node.index, 0))
        found.append(_geometry(state, pixels) if state is not None else None)
    return found


def _states(recording: Recording) -> tuple[tuple[int, int], dict[tuple[int, int], State]]:
    shapes = {i: recording.nodes[i].shape for i in recording.inputs}
    labels = {i: _input_labels(shape) for i, shape in shapes.items()}
    pixels = (1, 1)
    for i, names in labels.items():
        if "y" in names:
            pixels = shapes[i][names.index("y")], shapes[i][names.index("x")]
            break
    batch = next((1 if labels[i][0] in "cy" else s[0] for i, s in shapes.items() if len(s) > 1), 1)
    states: dict[tuple[int, int], State] = {}
    for node in recording.nodes:
        if not node.shapes:
            continue
        if node.op == "input":
            outs = [_input(node.shape, labels.get(node.index, ""), pixels)]
        else:
            outs = _follow(node, states, pixels, batch)
        for k, state in enumerate(outs):
            states[node.index, k] = state
    return pixels, states


def _input_labels(shape: tuple[int, ...]) -> str:
    """What an input's dimensions are taken for: pictures, with the channels first unless the shape says last."""
    if len(shape) == 4:
        return "nyxc" if shape[3] in (1, 3, 4) and shape[1] > 4 else "ncyx"
    if len(shape) == 3:
        return "yxc" if shape[2] in (1, 3, 4) and shape[0] > 4 else "cyx" if shape[0] <= 4 else "n??"
    if len(shape) == 5:
        return "nfcyx" if shape[2] in (1, 3) and shape[1] not in (1, 3) else "ncfyx"
    return "n" + "?" * (len(shape) - 1) if shape else ""


def _input(shape: tuple[int, ...], labels: str, pixels: tuple[int, int]) -> State:
    dims = tuple((Atom(axis, size),) for axis, size in zip(labels, shape, strict=True))
    if "y" not in labels:  # a second input of another kind
        return State(dims, ((lines.whole(1, pixels[0], False), lines.whole(1, pixels[1], False)),))
    own = shape[labels.index("y")], shape[labels.index("x")]
    if own != pixels:
        return State(dims, ((lines.whole(own[0], pixels[0], False), lines.whole(own[1], pixels[1], False)),))
    return State(dims, ((lines.picture(pixels[0]), lines.picture(pixels[1])),))


def _follow(
    node: Node, states: dict[tuple[int, int], State], pixels: tuple[int, int], batch: int
) -> list[State]:  # fmt: skip
    """The states of a node's outputs: by its rule, or as one that cannot be followed."""
    read = {i: states[i, 0] for i in node.inputs if (i, 0) in states}
    if node.op.startswith("new_") or node.op.endswith("_like"):  # made of a shape, not of values
        return [_blank(shape) for shape in node.shapes]
    rule = RULES.get(node.op)
    if rule is not None:
        for lookup in _readings(node, states, read):
            # The arguments are another library's calls, in any form torch takes: whatever does not fit is not followed.
            try:
                made = rule(Call(node, lookup))
            except Exception:
                continue
            outs = made if isinstance(made, list) else [made]
            outs = (outs * len(node.shapes))[: len(node.shapes)] if len(outs) == 1 else outs
            if [s.shape for s in outs] == list(node.shapes):
                return outs
    return [_lost(shape, list(read.values()), pixels, batch) for shape in node.shapes]


def _readings(
    node: Node, states: dict[tuple[int, int], State], read: dict[int, State]
) -> Iterator[Callable[[Ref], State]]:
    """What the node's arguments may have been.

    A tensor that shares memory with one that was written in place stands, among the arguments, as that write, while the
    node lists the tensor it was before as well. Its shape is then that of one of the two, and both count.
    """

    def plain(ref: Ref) -> State:
        return states[ref.node, ref.output]

    direct = {r.node for r in refs((node.args, node.kwargs))}
    hidden = [s for i, s in read.items() if i not in direct]
    if not hidden:
        yield plain
        return
    for shown in sorted(hidden, key=lambda s: -math.prod(s.shape)):

        def written(ref: Ref, shown: State = shown) -> State:
            return reduce(weighted, (merged(s) for s in (*hidden, plain(ref))), merged(shown)).inexact()

        yield written


def _blank(shape: tuple[int, ...]) -> State:
    """A tensor that holds nothing of the picture."""
    return State(tuple((Atom("?", size, 0),) for size in shape), ((lines.nothing(1), lines.nothing(1)),))


def _lost(shape: tuple[int, ...], read: list[State], pixels: tuple[int, int], batch: int) -> State:
    """What is left when an operation cannot be followed: everything counts; the layout by the operands or the shape."""
    labels, split = _guess(shape, read, pixels, batch)
    dims: list[Dim] = []
    lengths = {"y": 1, "x": 1}
    for label, size in zip(labels, shape, strict=True):
        if label == "t" and split:
            prefix, h, w = split
            atoms = Atom("y", h), Atom("x", w)
            dims.append((Tokens(prefix, atoms, 0),) if prefix else atoms)
            lengths.update(y=h, x=w)
            continue
        if label in AXES:
            lengths[label] = size
        dims.append((Atom(label, size, 0 if label == "?" else 1),))
    fields = lines.whole(lengths["y"], pixels[0], False), lines.whole(lengths["x"], pixels[1], False)
    extra = (lines.whole(1, pixels[0], False), lines.whole(1, pixels[1], False)) if split and split[0] else None
    return State(tuple(dims), (fields,), blurred=True, extra=extra, guessed=True)


def _guess(
    shape: tuple[int, ...], read: list[State], pixels: tuple[int, int], batch: int
) -> tuple[str, tuple[int, int, int] | None]:
    like = [s for s in read if len(s.dims) == len(shape) and s.shape[:1] == shape[:1]]
    for state in like:
        labels = _labels(state)
        if state.shape == shape and any(dim and isinstance(dim[0], Tokens) for dim in state.dims):
            tokens = next(d[0] for d in state.dims if d and isinstance(d[0], Tokens))
            h, w = (math.prod(a.size for a in tokens.atoms if a.axis == axis) for axis in AXES)
            if not tokens.suffix and labels.count("t") == 1:
                return _plain_labels(labels), (tokens.prefix, h, w)
        if labels in (("n", "c", "y", "x"), ("n", "y", "x", "c")):
            return "".join(labels), None
    if not shape or shape[0] != batch:
        return "?" * len(shape), None
    if len(shape) == 4:
        return "ncyx", None
    if len(shape) == 3 and shape[1] > 3 and shape[2] > 1 and (split := _token_grid(shape[1], pixels)):
        return "ntc", split
    if len(shape) == 5:
        return "ncfyx", None
    return "n" + "c" * (len(shape) == 2) + "?" * (len(shape) - 1 - (len(shape) == 2)), None


def _plain_labels(labels: tuple[str, ...]) -> str:
    return "".join("f" if label == "time" else label for label in labels)


def _token_grid(tokens: int, pixels: tuple[int, int]) -> tuple[int, int, int] | None:
    """(extra tokens, rows, columns): the picture's own proportions first, then a square."""
    for extra in (0, 1, 2, 5, 9):
        n = tokens - extra
        h = math.isqrt(n * pixels[0] // pixels[1]) if n >= 4 else 0
        if h and n % h == 0 and h * pixels[1] == n // h * pixels[0]:
            return extra, h, n // h
    for extra in (0, 1, 2, 5):
        if (n := tokens - extra) >= 4 and math.isqrt(n) ** 2 == n:
            return extra, math.isqrt(n), math.isqrt(n)
    return None


# -- from states to what users see


def _labels(state: State) -> tuple[str, ...]:
    names = []
    for dim in state.dims:
        kinds = {a.axis for a in atoms_of(dim) if a.size > 1} or {a.axis for a in dim[:1] if isinstance(a, Atom)}
        if len(kinds) == 1:
            names.append({"f": "time"}.get(kind := kinds.pop(), kind))
        else:
            names.append("t" if kinds == set(AXES) else "?")
    return tuple(names)


def _tidy(state: State) -> State:
    """Rows made of rows and channels (a pixel shuffle) as rows, channels made of channels and rows as channels."""
    pure = {labels for labels in _labels(state) if labels in AXES}
    for d, dim in enumerate(state.dims):
        large = [a for a in atoms_of(dim) if a.size > 1]
        space = {a.axis for a in large if a.axis in AXES}
        kinds = [a.axis for a in atoms_of(dim)]
        if not space or "n" in kinds or len(large) == 1:
            continue
        if kinds[0] == "c" and len(pure) == 2:
            state = replace(mix(state, [d], keep=False).with_dim(d, (Atom("c", size_of(dim)),)), blurred=True)
        elif len(space) == 1 and large[0].axis in AXES and {a.axis for a in large} <= space | {"c", "?"}:
            with contextlib.suppress(Lost):
                state = anchored(state, d)
    return state


def _geometry(state: State, pixels: tuple[int, int]) -> Geometry:
    state = _tidy(state)
    layout = _layout(state)
    axes = []
    for k, axis in enumerate(AXES):
        line = state.line(axis)
        if layout.roll[k]:
            line = lines.read(line, lines.picked(tuple((i + layout.roll[k]) % len(line) for i in range(len(line)))))
        axes.append(AxisField(pixels[k], line.first, line.last, line.regular, line.exact))
    return Geometry(layout, ReceptiveField(axes[0], axes[1]))


def _layout(state: State) -> Layout:
    labels = _labels(state)
    grid = _grid(state, labels)
    if grid is None:
        return Layout(labels, None, guessed=state.guessed, dims=state.dims)
    tokens = [dim[0] for dim in state.dims if dim and isinstance(dim[0], Tokens)]
    prefix, suffix = (tokens[0].prefix, tokens[0].suffix) if tokens else (0, 0)
    notes = [_note(state, labels, grid)]
    if any(state.roll):
        notes.append(f"shifted by {state.roll[0]} and {state.roll[1]} in the network, turned back")
    if state.guessed:
        notes.append("guessed from the shape")
    note = "; ".join(n for n in notes if n)
    return Layout(labels, grid, note, state.guessed, prefix, suffix, state.dims, state.roll)


def _grid(state: State, labels: tuple[str, ...]) -> tuple[int, int] | None:
    atoms = [a for dim in state.dims for a in atoms_of(dim)]
    kinds = [a.axis for a in atoms]
    unclear = any(a.axis == "f" or (a.axis == "?" and a.size > 1) for a in atoms) or kinds.count("n") > 1
    nested = any(isinstance(a, Tokens) and len(dim) > 1 for dim in state.dims for a in dim)
    mixed = any(along(dim, "c") and any(a.axis in AXES for a in atoms_of(dim)) for dim in state.dims)
    if unclear or nested or mixed or not {"y", "x"} <= set(kinds) or len(labels) < 2:
        return None
    sizes = [math.prod(a.size for a in atoms if a.axis == axis) for axis in AXES]
    return sizes[0], sizes[1]


def _note(state: State, labels: tuple[str, ...], grid: tuple[int, int]) -> str:
    h, w = grid
    tokens = [dim[0] for dim in state.dims if dim and isinstance(dim[0], Tokens)]
    if tokens:
        left_out = []
        if p := tokens[0].prefix:
            left_out.append("1 class token" if p == 1 else f"{p} class or register tokens")
        if s := tokens[0].suffix:
            left_out.append(f"{s} token{'s' * (s > 1)} at the end")
        return f"{tokens[0].size} tokens: {' and '.join(left_out)} left out, {h * w} as {h}x{w}"
    if "t" in labels and not any(along(dim, "n") and along(dim, *AXES) for dim in state.dims):
        tokens_at = labels.index("t")
        if size_of(state.dims[tokens_at]) == h * w:
            return f"{h * w} tokens as {h}x{w}"
    if any(len(along(dim, axis)) and len(state.atoms(axis)) > 1 for dim in state.dims for axis in AXES):
        return f"windows put together to {h}x{w}"
    order = [label for label in labels if label in "cyx"]
    if order == ["y", "x", "c"]:
        return "channels last, turned to (N, C, H, W)"
    if order == ["c", "x", "y"] or order == ["x", "y", "c"]:
        return "columns before rows, turned to (N, C, H, W)"
    return ""
