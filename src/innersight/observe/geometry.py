"""Where every unit of a layer looks, and what the dimensions of a layer's output mean, from the operations themselves.

`trace(recording)` goes once through a recorded run, with numbers and no tensors. For each node it follows two things:

*Which part of the picture.* Along each axis of the picture a `Line` says, unit by unit, which pixels can reach that
unit. Explicit intervals, because adaptive pooling, interpolation, ragged windows and borders have no formula with one
size and one stride; where there is one (`Regular`), it is carried along too and gives the field its name: "43x43,
stride 8". Different channels may see differently (a concatenation); a few classes of channels are told apart.

*Which dimension is which.* A dimension is a product of `Atom`s: a batch, channels, a stretch of rows or columns.
`view` splits and joins atoms, `permute` moves them. So channel shuffles, channels-last blocks, patches, tokens and
windows of windows are followed by one rule each, and the way back to an (N, C, H, W) grid is known.

What cannot be followed is said to see the whole picture, not exactly. A box never leaves out a pixel that counts.

Receptive fields: Araujo, Norris, Sim, Computing Receptive Fields of Convolutional Neural Networks, Distill 2019.
Effective ones: Luo, Li, Urtasun, Zemel, Understanding the Effective Receptive Field, NeurIPS 2016.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache, reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from innersight import errors
from innersight.observe.observer import Const, Ref

if TYPE_CHECKING:
    import torch

    from innersight.observe.observer import Node, Recording

Box = tuple[int, int, int, int]  # top, left, bottom, right; the last two are not inside

# ---------------------------------------------------------------------------------------------------------------------
# What comes out


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
        for d, dim in enumerate(self.dims):
            if len(dim) == 1 and isinstance(dim[0], Tokens):
                tensor = tensor.narrow(d, dim[0].prefix, dim[0].size - dim[0].prefix - dim[0].suffix)
        atoms = [a for dim in self.dims for a in _atoms(dim)]
        parts = tensor.reshape([-1 if a.axis == "n" else a.size for a in atoms])
        order = sorted(range(len(atoms)), key=lambda i: (_GRID_ORDER[atoms[i].axis], _descending(atoms[i]), i))
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


# ---------------------------------------------------------------------------------------------------------------------
# Lines: what the units along one axis see

_FAR = 1 << 60  # an empty interval is (_FAR, -_FAR): the hull with anything is the other


class Regular(NamedTuple):
    """Unit i sees `size` pixels from `start + i * jump` on. tight: no fewer, away from the border."""

    jump: Fraction
    start: Fraction
    size: Fraction
    tight: bool = True


@dataclass(frozen=True, eq=False)  # compared as objects: caches below are keyed by them
class Line:
    """Unit i sees pixels first[i] ... last[i] - 1, already clipped to the picture."""

    first: tuple[int, ...]
    last: tuple[int, ...]
    regular: Regular | None
    exact: bool = True

    def __len__(self) -> int:
        return len(self.first)

    @cached_property
    def rising(self) -> bool:
        return all(a <= b for line in (self.first, self.last) for a, b in itertools.pairwise(line))

    @cached_property
    def constant(self) -> bool:
        return len(set(self.first)) == 1 and len(set(self.last)) == 1


@dataclass(frozen=True, eq=False)
class Reads:
    """Which units of the axis before each unit reads; `change` is what that does to a regular field.

    change: (first, scale, extra, tight): the start moves by `first` units, the jump is scaled, the size grows by
    `extra` units.
    """

    units: tuple[Sequence[int], ...]
    change: tuple[Fraction, Fraction, Fraction, bool] | None = None
    exact: bool = True


@lru_cache(maxsize=64)
def _picture(pixels: int) -> Line:
    return Line(tuple(range(pixels)), tuple(range(1, pixels + 1)), Regular(Fraction(1), Fraction(0), Fraction(1)))


@lru_cache(maxsize=64)
def _whole(units: int, pixels: int, exact: bool) -> Line:
    return Line((0,) * units, (pixels,) * units, None, exact)


@lru_cache(maxsize=64)
def _nothing(units: int) -> Line:
    return Line((_FAR,) * units, (-_FAR,) * units, None)


@lru_cache(maxsize=4096)
def _read(line: Line, reads: Reads) -> Line:
    """The line of units that each read some units of `line`."""
    if line.rising:  # the first and the last unit read see furthest
        first = tuple(line.first[u[0]] if u else _FAR for u in reads.units)
        last = tuple(line.last[u[-1]] if u else -_FAR for u in reads.units)
    else:
        first = tuple(min((line.first[i] for i in u), default=_FAR) for u in reads.units)
        last = tuple(max((line.last[i] for i in u), default=-_FAR) for u in reads.units)
    regular = None
    if line.regular and reads.change:
        (jump, start, size, tight), (offset, scale, extra, still) = line.regular, reads.change
        regular = Regular(jump * scale, start + offset * jump, size + extra * jump, tight and still)
    return Line(first, last, regular, line.exact and reads.exact)


@lru_cache(maxsize=4096)
def _hull(a: Line, b: Line) -> Line:
    """What the units of both lines see together."""
    if a is b:
        return a
    if len(a) != len(b):
        a, b = (_spread(line, max(len(a), len(b))) for line in (a, b))
    first = tuple(map(min, a.first, b.first))
    last = tuple(map(max, a.last, b.last))
    # An inexact line inside an exact one does no harm.
    exact = (a.exact and (b.exact or (first, last) == (a.first, a.last))) or (
        b.exact and (first, last) == (b.first, b.last)
    )
    if a.last[0] < 0 and a.constant:
        return b
    if b.last[0] < 0 and b.constant:
        return a
    regular = None
    if a.regular and b.regular and a.regular.jump == b.regular.jump:
        start = min(a.regular.start, b.regular.start)
        end = max(r.start + r.size for r in (a.regular, b.regular))
        regular = Regular(a.regular.jump, start, end - start, a.regular.tight and b.regular.tight)
    return Line(first, last, regular, exact)


def _both(fields: Iterable[tuple[Line, Line]]) -> tuple[Line, Line]:
    """The hull along each axis."""
    return reduce(lambda p, q: (_hull(p[0], q[0]), _hull(p[1], q[1])), fields)


@lru_cache(maxsize=1024)
def _spread(line: Line, units: int) -> Line:
    """One unit's field for all units."""
    if len(line) == units:
        return line
    if len(line) != 1:
        raise Lost
    return Line(line.first * units, line.last * units, None, line.exact)


@lru_cache(maxsize=1024)
def _blend(line: Line, mixed: tuple[tuple[int, int], ...]) -> Line:
    """Every unit sees what all units see that differ from it in the given (size, stride) digits of its index."""
    if line.constant or not mixed:
        return line
    first, last = list(line.first), list(line.last)
    for size, stride in mixed:
        low: dict[int, int] = {}
        high: dict[int, int] = {}
        base = [u - u // stride % size * stride for u in range(len(line))]
        for b, lo, hi in zip(base, first, last, strict=True):
            low[b], high[b] = min(lo, low.get(b, _FAR)), max(hi, high.get(b, -_FAR))
        first, last = [low[b] for b in base], [high[b] for b in base]
    return Line(tuple(first), tuple(last), None, line.exact)


@lru_cache(maxsize=1024)
def _condense(line: Line, mixed: tuple[tuple[int, int], ...], left: tuple[tuple[int, int], ...]) -> Line:
    """`_blend`, then one unit for each value of the digits `left` (largest stride first)."""
    blended = _blend(line, mixed)
    units = _offsets(left)
    regular = None
    step = left[-1][1] if left else 0
    if line.regular and left and all(a[1] == b[0] * b[1] for a, b in itertools.pairwise(left)):
        jump, start, size, tight = line.regular
        regular = Regular(jump * step, start, size + sum((n - 1) * s for n, s in mixed) * jump, tight)
    first, last = (tuple(table[u] for u in units) for table in (blended.first, blended.last))
    return Line(first, last, regular, line.exact)


@lru_cache(maxsize=1024)
def _join_lines(lines: tuple[Line, ...]) -> Line:
    """One line behind the other; regular if each goes on where the one before ended."""
    first = tuple(itertools.chain.from_iterable(line.first for line in lines))
    last = tuple(itertools.chain.from_iterable(line.last for line in lines))
    return Line(first, last, _common(lines), all(line.exact for line in lines))


def _common(lines: tuple[Line, ...]) -> Regular | None:
    """The formula that all these lines, one behind the other, follow; padding follows any."""
    found: Regular | None = None
    begin = 0
    for line in lines:
        padding = line.constant and line.last[0] < 0
        if not padding:
            if not line.regular:
                return None
            r = line.regular
            r = r._replace(start=r.start - begin * r.jump)
            if found and found != r:
                return None
            found = r
        begin += len(line)
    return found


# -- which units are read


@lru_cache(maxsize=1024)
def _window(units: int, out: int, k: int, s: int, p: int, d: int) -> Reads:
    """Convolution and pooling: `k` taps `d` apart, every `s` units, from `p` units before the first on."""
    reads = []
    for o in range(out):
        begin = o * s - p
        t0, t1 = max(0, -(begin // d)), min(k - 1, (units - 1 - begin) // d)
        reads.append(range(begin + t0 * d, begin + t1 * d + 1, d))
    change = Fraction(-p), Fraction(s), Fraction((k - 1) * d), True
    return Reads(tuple(reads), change)


@lru_cache(maxsize=1024)
def _transposed(units: int, out: int, k: int, s: int, p: int, d: int) -> Reads:
    """Transposed convolution: unit o gets from unit i by tap t where o = i s - p + t d."""
    reads = tuple(
        tuple(at // s for at in range(o + p - (k - 1) * d, o + p + 1, d) if at % s == 0 and 0 <= at < units * s)
        for o in range(out)
    )
    reach = Fraction((k - 1) * d, s)
    return Reads(reads, (Fraction(p, s) - reach, Fraction(1, s), reach, s == 1))


@lru_cache(maxsize=1024)
def _adaptive(units: int, out: int) -> Reads:
    reads = tuple(range(o * units // out, -(-(o + 1) * units // out)) for o in range(out))
    if out == 1 and units > 1:
        return Reads(reads)
    ratio, ragged = Fraction(units, out), Fraction(out - 1, out) if units % out else Fraction(0)
    return Reads(reads, (-ragged, ratio, ratio + 2 * ragged - 1, not ragged))


@lru_cache(maxsize=1024)
def _picked(units: tuple[int, ...] | range) -> Reads:
    change = None
    if isinstance(units, range) and units.step > 0 and len(units):
        change = Fraction(units.start), Fraction(units.step), Fraction(0), True
    return Reads(tuple((u,) for u in units), change)


@lru_cache(maxsize=1024)
def _padded(units: int, left: int, right: int, mode: str) -> Reads:
    wrap: dict[str, Callable[[int], int]] = {
        "constant": lambda i: i,
        "replicate": lambda i: min(max(i, 0), units - 1),
        "reflect": lambda i: (units - 1) - abs((units - 1) - abs(i)),
        "circular": lambda i: i % units,
    }
    places = (wrap[mode](i) for i in range(-left, units + right))
    reads = tuple((i,) if 0 <= i < units else () for i in places)
    return Reads(reads, (Fraction(-left), Fraction(1), Fraction(0), True))


@lru_cache(maxsize=1024)
def _interpolated(units: int, out: int, mode: str, corners: bool, scale: Fraction, antialias: bool) -> Reads:
    """Resizing; `scale` is source units for one new unit."""
    if units == out and scale == 1:
        return _picked(range(units))
    reads: list[Sequence[int]] = []
    if mode.startswith("nearest"):
        half = Fraction(1, 2) if mode == "nearest-exact" else Fraction(0)
        reads = [(min(math.floor((o + half) * scale), units - 1),) for o in range(out)]
        slack = 1 - Fraction(1, scale.denominator)
        return Reads(tuple(reads), (half * scale - slack, scale, slack, scale.denominator == 1 and not half))
    reach = 2 if mode == "bicubic" else 1
    offset = Fraction(0) if corners else (scale - 1) / 2
    wide = reach * max(scale, Fraction(1)) if antialias else Fraction(reach)
    # A tap of weight 0 reads nothing; in floating point that is certain for halves, quarters, ... only.
    dyadic = scale.denominator & (scale.denominator - 1) == 0
    for o in range(out):
        at = o * scale + offset
        if reach == 1:
            at = max(at, Fraction(0))
        if antialias:
            taps = range(math.floor(at - wide), math.ceil(at + wide) + 1)
        elif at.denominator == 1 and dyadic:
            taps = range(int(at), int(at) + 1)
        else:
            taps = range(math.floor(at) - reach + 1, math.floor(at) + reach + 1)
        reads.append(sorted({min(max(i, 0), units - 1) for i in taps}))
    return Reads(tuple(reads), (offset - wide, scale, 2 * wide, False), dyadic and not antialias)


# ---------------------------------------------------------------------------------------------------------------------
# Dimensions


class Atom(NamedTuple):
    """A factor of a dimension: "n", "c", "y", "x", "f" (frames) or "?"; a step along it is `stride` units of its axis.

    The units of "y" and "x" are those of the state's lines, of "c" the state's classes; others count nothing.
    """

    axis: str
    size: int
    stride: int = 1


class Tokens(NamedTuple):
    """A dimension of flattened rows and columns, with class or register tokens before and behind."""

    prefix: int
    atoms: tuple[Atom, ...]
    suffix: int

    @property
    def size(self) -> int:
        return self.prefix + math.prod(a.size for a in self.atoms) + self.suffix


Dim = tuple["Atom | Tokens", ...]
_AXES = ("y", "x")
_GRID_ORDER = {"n": 0, "c": 1, "?": 1, "f": 1, "y": 2, "x": 3}  # "?" and frames only where there is one


class Lost(Exception):
    """An operation that cannot be followed."""


def _size(dim: Dim) -> int:
    return math.prod(a.size for a in dim)


def _atoms(dim: Dim) -> Iterator[Atom]:
    for a in dim:
        if isinstance(a, Tokens):
            yield from a.atoms
        else:
            yield a


def _along(dim: Dim, *axes: str) -> list[Atom]:
    return [a for a in _atoms(dim) if a.axis in axes and a.size > 1]


def _descending(atom: Atom) -> int:
    return -atom.stride if atom.axis in _AXES else 0


def _offsets(digits: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """The units that the digits (size, stride), slowest first, step through."""
    units: tuple[int, ...] = (0,)
    for size, stride in digits:
        units = tuple(u + i * stride for u in units for i in range(size))
    return units


def _restride(dim: Dim, axis: str, strides: Iterator[int]) -> Dim:
    """`dim` with the strides of the atoms of one axis replaced, in order."""
    new: list[Atom | Tokens] = []
    for a in dim:
        if isinstance(a, Tokens):
            new.append(a._replace(atoms=tuple(_restride(a.atoms, axis, strides))))  # type: ignore[arg-type]
        else:
            new.append(a._replace(stride=next(strides)) if a.axis == axis and a.size > 1 else a)
    return tuple(new)


def _signature(dim: Dim) -> tuple:
    """Equal for dimensions that step through space in the same way."""
    return tuple(
        ("t", a.prefix, _signature(a.atoms), a.suffix)
        if isinstance(a, Tokens)
        else (a.axis if a.axis in _AXES else "*", a.size)
        for a in dim
        if a.size > 1
    )


@dataclass(frozen=True)
class State:
    """What is known of one tensor.

    dims: its dimensions. The atoms of "y" (of "x") in all of them, in order of stride, count the units of the lines.
    fields: lines (y, x), one pair for each class of channels; classes: the class of each channel, None if all are one.
    blurred: the lines are what all channels see together; of a choice of channels they may be too much.
    extra: what the class and register tokens see, as lines of one unit.
    """

    dims: tuple[Dim, ...]
    fields: tuple[tuple[Line, Line], ...]
    classes: tuple[int, ...] | None = None
    blurred: bool = False
    extra: tuple[Line, Line] | None = None
    roll: tuple[int, int] = (0, 0)
    guessed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(_size, self.dims))

    def line(self, axis: str) -> Line:
        """What the units see, all channels together."""
        k = _AXES.index(axis)
        return reduce(_hull, (f[k] for f in self.fields))

    def atoms(self, *axes: str) -> list[Atom]:
        return [a for dim in self.dims for a in _along(dim, *axes)]

    def with_dim(self, d: int, dim: Dim) -> State:
        return replace(self, dims=(*self.dims[:d], dim, *self.dims[d + 1 :]))

    def with_lines(self, axis: str, change: Callable[..., Line], *args: Any, recount: bool = True) -> State:
        """`change(line, *args)` for the lines of one axis; `recount`: its units are others afterwards."""
        if axis == "y":
            fields = tuple((change(y, *args), x) for y, x in self.fields)
            return replace(self, fields=fields, roll=(0, self.roll[1]) if recount else self.roll)
        fields = tuple((y, change(x, *args)) for y, x in self.fields)
        return replace(self, fields=fields, roll=(self.roll[0], 0) if recount else self.roll)

    def seeing_too(self, lines: tuple[Line, Line]) -> State:
        """Every unit sees what one more unit sees as well."""
        for axis, line in zip(_AXES, lines, strict=True):
            self = self.with_lines(axis, _hull, line, recount=False)
        return self

    def inexact(self) -> State:
        fields = tuple(tuple(_loosen(line) for line in f) for f in self.fields)
        extra = tuple(map(_loosen, self.extra)) if self.extra else None
        return replace(self, fields=fields, extra=extra)  # type: ignore[arg-type]

    def axis_of(self, d: int) -> str:
        """The axis of space that dimension d is; "" for none. Two at once are lost."""
        found = {a.axis for a in _along(self.dims[d], *_AXES)}
        if not found and not _along(self.dims[d], "n", "c", "f", "?"):  # a map of one row is a map
            found = {a.axis for a in _atoms(self.dims[d]) if a.axis in _AXES}
        if len(found) > 1 or any(isinstance(a, Tokens) for a in self.dims[d]):
            raise Lost
        return found.pop() if found else ""


@lru_cache(maxsize=512)
def _loosen(line: Line) -> Line:
    return replace(line, exact=False)


def _merged(state: State) -> State:
    """All channels as one class."""
    if state.classes is None:
        return state
    y, x = state.line("y"), state.line("x")
    same = all(f == state.fields[0] for f in state.fields)
    return replace(state, fields=((y, x),), classes=None, blurred=state.blurred or not same)


def _everything(state: State) -> tuple[Line, Line]:
    """What all units and extra tokens see together, as lines of one unit."""
    everything = _total(state.line("y")), _total(state.line("x"))
    return _both((everything, state.extra)) if state.extra else everything


@lru_cache(maxsize=512)
def _total(line: Line) -> Line:
    """One unit that sees what all of them see."""
    return Line((min(line.first),), (max(line.last),), None, line.exact)


def _mix(state: State, dims: Iterable[int], keep: bool) -> State:
    """Every unit sees what all units along `dims` see; the dimensions stay (`keep`) or become 1 long."""
    dims = sorted({d % len(state.dims) for d in dims})
    channels = [a for d in dims for a in _along(state.dims[d], "c", "?")]
    if channels and len(channels) == len(state.atoms("c", "?")):
        state = replace(_merged(state), blurred=False)
    elif channels:
        state = _merged(state)
    if any(isinstance(a, Tokens) for d in dims for a in state.dims[d]):
        everything = _everything(state)
        if state.extra:
            state = state.seeing_too(state.extra)
        state = replace(state, extra=everything)
    blank = replace(state, dims=tuple(() if d in dims else dim for d, dim in enumerate(state.dims)))
    for axis in _AXES:
        mixed = tuple((a.size, a.stride) for d in dims for a in _along(state.dims[d], axis))
        if not mixed:
            continue
        if keep:
            state = state.with_lines(axis, _blend, mixed, recount=False)
            continue
        left = tuple((a.size, a.stride) for a in sorted(blank.atoms(axis), key=_descending))
        blank = _compact(blank.with_lines(axis, _condense, mixed, left), axis)
    if keep:
        return state
    if blank.extra and not any(isinstance(a, Tokens) for dim in blank.dims for a in dim):
        blank = replace(blank, extra=None)
    return blank


def _compact(state: State, axis: str) -> State:
    """New strides for the atoms of an axis after some were removed, in the old order."""
    strides, unit = {}, 1
    for a in sorted(state.atoms(axis), key=lambda a: a.stride):
        strides[a.stride] = unit
        unit *= a.size
    order = iter([strides[a.stride] for a in state.atoms(axis)])
    return replace(state, dims=tuple(_restride(dim, axis, order) for dim in state.dims))


def _anchored(state: State, d: int) -> State:
    """Dimension d, of one axis of space, as a single atom: its units, whatever they were made of, in a new count.

    Other dimensions may hold atoms of the same axis (windows); they then count slower.
    """
    axis = state.axis_of(d)
    dim = state.dims[d]
    if any(a.axis == "n" and a.size > 1 for a in _atoms(dim)):
        raise Lost
    if _along(dim, "c", "?"):
        state = _merged(state)
    rest = sorted((a for e, other in enumerate(state.dims) if e != d for a in _along(other, axis)), key=_descending)
    own = _offsets((a.size, a.stride if a.axis == axis else 0) for a in _atoms(dim))
    slow = _offsets((a.size, a.stride) for a in rest)
    units = tuple(r + o for r in slow for o in own)
    if units != tuple(range(len(state.fields[0][_AXES.index(axis)]))):
        state = state.with_lines(axis, _regrouped, units)
    unit = len(own)
    strides = {}
    for a in reversed(rest):
        strides[a.stride] = unit
        unit *= a.size
    dims = list(state.dims)
    for e, other in enumerate(dims):
        if e != d:
            order = iter([strides[a.stride] for a in _along(other, axis)])
            dims[e] = _restride(other, axis, order)
    dims[d] = (Atom(axis, len(own)),)
    return replace(state, dims=tuple(dims))


@lru_cache(maxsize=512)
def _regrouped(line: Line, units: tuple[int, ...]) -> Line:
    """The line of these units of `line`; each repeated r times (pixel shuffle) is a field that moves by 1/r."""
    r = sum(u == units[0] for u in units)
    reads = _picked(units)
    if units == tuple(i // r for i in range(len(units))):
        slack = Fraction(r - 1, r)
        reads = replace(reads, change=(-slack, Fraction(1, r), slack, r == 1))
    return _read(line, reads)


def _moved(state: State, d: int, reads: Reads, roll: int = 0) -> State:
    """Dimension d made of new units that read the old ones."""
    out = len(reads.units)
    axis = state.axis_of(d)
    if not axis:
        state = _merged(state)
        kinds = {a.axis for a in _atoms(state.dims[d]) if a.size > 1} or {a.axis for a in _atoms(state.dims[d])}
        return state.with_dim(d, (Atom(kinds.pop() if len(kinds) == 1 else "?", out),))
    state = _anchored(state, d)
    own = _size(state.dims[d])
    windows = any(e != d and _along(dim, axis) for e, dim in enumerate(state.dims))

    def apply(line: Line) -> Line:
        if not windows:
            return _read(line, reads)
        parts = (_read(_slice(line, i, own), reads) for i in range(0, len(line), own))
        return replace(_join_lines(tuple(parts)), regular=None)

    rolled = state.roll
    state = state.with_lines(axis, apply)
    dims = [
        dim if e == d else _restride(dim, axis, iter([a.stride // own * out for a in _along(dim, axis)]))
        for e, dim in enumerate(state.dims)
    ]
    dims[d] = (Atom(axis, out),)
    state = replace(state, dims=tuple(dims))
    if roll:
        y, x = rolled
        state = replace(state, roll=((y + roll) % out, x) if axis == "y" else (y, (x + roll) % out))
    return state


@lru_cache(maxsize=1024)
def _slice(line: Line, begin: int, units: int) -> Line:
    return Line(line.first[begin : begin + units], line.last[begin : begin + units], None, line.exact)


def _taken(state: State, d: int, units: range) -> State:
    """The chosen units of dimension d."""
    dim = state.dims[d]
    size = _size(dim)
    if units == range(size):
        return state
    if len(dim) == 1 and isinstance(dim[0], Tokens):
        return _taken_tokens(state, d, dim[0], units)
    if len({a.axis for a in _along(dim, *_AXES)}) > 1:
        return _mix(state, [d], keep=False).inexact().with_dim(d, (Atom("?", len(units), 0),))
    if state.axis_of(d):
        return _moved(state, d, _picked(units))
    channels = _along(dim, "c")
    if state.classes is not None and _own_classes(state, d):
        offsets = _offsets((a.size, a.stride) for a in channels)
        return _with_classes(state, d, [state.fields[state.classes[offsets[u]]] for u in units])
    if channels or _along(dim, "?", "n"):
        state = _merged(state)
        state = state.inexact() if state.blurred else state
    kinds = {a.axis for a in _atoms(dim)} or {"?"}
    return state.with_dim(d, (Atom(kinds.pop() if len(kinds) == 1 else "?", len(units)),))


def _taken_tokens(state: State, d: int, tokens: Tokens, units: range) -> State:
    inner = tokens.size - tokens.prefix - tokens.suffix
    begin, end = tokens.prefix, tokens.prefix + inner
    chosen = [u for u in units if begin <= u < end]
    if not chosen:  # class tokens alone
        extra = state.extra or (_nothing(1), _nothing(1))
        state = _mix(state, [d], keep=False)
        fields = tuple(_spread(line, len(own)) for line, own in zip(extra, state.fields[0], strict=True))
        state = replace(state, fields=(fields,), classes=None, extra=None)  # type: ignore[arg-type]
        return state.with_dim(d, (Atom("?", len(units), 0),))
    if chosen == list(range(begin, end)) and units.step == 1:
        prefix, suffix = begin - units.start, units.stop - end
        if prefix or suffix:
            return state.with_dim(d, (Tokens(prefix, tokens.atoms, suffix),))
        return replace(state.with_dim(d, tokens.atoms), extra=None)
    return _mix(state, [d], keep=False).inexact().with_dim(d, (Atom("?", len(units), 0),))


def _with_classes(state: State, d: int, channels: Sequence[tuple[Line, Line]]) -> State:
    """The state with one channel dimension, d, whose channels see what is given."""
    fields = tuple(dict.fromkeys(channels))
    number = {field: k for k, field in enumerate(fields)}
    classes = tuple(number[c] for c in channels) if len(fields) > 1 else None
    return replace(state.with_dim(d, (Atom("c", len(channels)),)), fields=fields, classes=classes)


# -- putting two together


def _positions(state: State, axis: str) -> set[int]:
    return {d for d, dim in enumerate(state.dims) if _along(dim, axis)}


def _reconciled(a: State, b: State) -> tuple[State, State]:
    """Both with dimensions that do not contradict each other; what `b` says too much is mixed out of it."""
    if a.dims == b.dims:
        return a, b
    for axis in _AXES:
        ours, theirs = _positions(a, axis), _positions(b, axis)
        for d in sorted(ours & theirs):
            if _signature(a.dims[d]) == _signature(b.dims[d]) and _plain(a.dims[d]) and _plain(b.dims[d]):
                continue
            with contextlib.suppress(Lost):
                a, b = _anchored(a, d), _anchored(b, d)
            if _signature(a.dims[d]) != _signature(b.dims[d]):
                b = _mix(b, [d], keep=False).inexact()
    for axis in _AXES:
        ours, theirs = _positions(a, axis), _positions(b, axis)
        if ours - theirs and theirs - ours:  # the units of one against the units of the other: attention
            crossed = any(_along(a.dims[d], *_AXES) for d in theirs - ours)  # rows of one against columns of the other
            b = replace(_mix(b, theirs - ours, keep=False), blurred=True)
            b = b.inexact() if crossed else b
    # Rows here, columns there, along one dimension.
    for d in range(len(a.dims)):
        if _along(a.dims[d], *_AXES) and _along(b.dims[d], *_AXES) and _signature(a.dims[d]) != _signature(b.dims[d]):
            b = _mix(b, [d], keep=False).inexact()
    return a, b


def _plain(dim: Dim) -> bool:
    """Space alone, or space and batch: no channels that would count in one order here and in another there."""
    return not (_along(dim, *_AXES) and _along(dim, "c", "?"))


def _rank(state: State, dim: Dim) -> tuple:
    kinds = {a.axis for a in _atoms(dim) if a.size > 1}
    return (
        bool(kinds & set(_AXES)),
        bool(kinds) and "?" not in kinds,
        "n" in kinds or "f" in kinds,
        bool(state.classes),
        bool(dim) and "?" not in {a.axis for a in _atoms(dim)},
    )


def _lifted(state: State, dims: tuple[Dim, ...], lengths: tuple[int, int]) -> State:
    """The lines of `state` counted as the atoms of `dims` count; `dims` hold those of the state and perhaps more."""
    if state.dims == dims:
        return state
    for k, axis in enumerate(_AXES):
        digits = []
        for own, new in zip(state.dims, dims, strict=True):
            mine, others = _along(own, axis), _along(new, axis)
            if mine and [a.size for a in mine] != [a.size for a in others]:
                raise Lost
            digits += [
                (o.size, o.stride, m.stride if m else 0)
                for o, m in itertools.zip_longest(others, mine)
            ]  # fmt: skip
        digits.sort(key=lambda t: -t[1])
        units = _offsets((size, stride) for size, _, stride in digits)
        if len(units) != lengths[k]:
            raise Lost
        if len(state.fields[0][k]) != len(units) or units != tuple(range(len(units))):
            state = state.with_lines(axis, _regathered, units, recount=False)
    return state


@lru_cache(maxsize=512)
def _regathered(line: Line, units: tuple[int, ...]) -> Line:
    return replace(_read(line, _picked(units)), regular=None)


def _joined(a: State, b: State) -> State:
    """What an operation on two tensors, unit by unit with broadcasting, makes."""
    n = max(len(a.dims), len(b.dims))
    a, b = (replace(s, dims=((),) * (n - len(s.dims)) + s.dims) for s in (a, b))
    if a.dims == b.dims and a.classes == b.classes and a.roll == b.roll:
        fields = tuple(_both(pair) for pair in zip(a.fields, b.fields, strict=True))
        return replace(a, fields=fields, blurred=a.blurred or b.blurred, extra=_extras(a, b),
                       guessed=a.guessed or b.guessed)  # fmt: skip
    if len(a.atoms(*_AXES)) < len(b.atoms(*_AXES)):
        a, b = b, a
    a, b = _reconciled(a, b)
    dims, lengths, roll = [], [0, 0], [0, 0]
    for d in range(n):
        dims.append(a.dims[d] if _rank(a, a.dims[d]) >= _rank(b, b.dims[d]) else b.dims[d])
    for k, axis in enumerate(_AXES):  # one of the two counts the axis: the one with more of it
        owner = a if _positions(b, axis) <= _positions(a, axis) else b
        lengths[k], roll[k] = len(owner.fields[0][k]), owner.roll[k]
        other = b if owner is a else a
        if _positions(other, axis) and other.roll[k] != roll[k]:
            roll[k] = 0
        for d in range(n):
            if strides := [atom.stride for atom in _along(owner.dims[d], axis)]:
                dims[d] = _restride(dims[d], axis, iter(strides))
    a, b = _lifted(a, tuple(dims), (lengths[0], lengths[1])), _lifted(b, tuple(dims), (lengths[0], lengths[1]))
    chosen = [_along(dim, "c") for dim in dims]
    a, b = (s if s.classes is None or [_along(dim, "c") for dim in s.dims] == chosen else _merged(s) for s in (a, b))
    if a.classes and b.classes and len(a.classes) != len(b.classes):
        a, b = _merged(a), _merged(b)
    result = State(tuple(dims), a.fields, None, a.blurred or b.blurred, _extras(a, b), (roll[0], roll[1]),
                   a.guessed or b.guessed)  # fmt: skip
    if not a.classes and not b.classes:
        return replace(result, fields=(_both((*a.fields, *b.fields)),))
    count = len(a.classes or b.classes or ())
    pairs = list(zip(a.classes or (0,) * count, b.classes or (0,) * count, strict=True))
    number = {pair: k for k, pair in enumerate(dict.fromkeys(pairs))}
    fields = tuple(_both((a.fields[i], b.fields[j])) for i, j in number)
    return replace(result, fields=fields, classes=tuple(number[pair] for pair in pairs))


def _extras(a: State, b: State) -> tuple[Line, Line] | None:
    has = [any(isinstance(t, Tokens) for dim in s.dims for t in dim) for s in (a, b)]
    if not any(has):
        return None
    # A tensor without tokens of its own (a gate) reaches the class tokens with all it sees.
    parts = [s.extra if own else _everything(s) for s, own in zip((a, b), has, strict=True)]
    known = [p for p in parts if p is not None]
    return _both(known) if known else None


def _viewed(state: State, shape: Sequence[int]) -> State:
    """The same numbers in another shape: atoms are split and put together, in order."""
    left = [a for dim in reversed(state.dims) for a in reversed(dim)]
    dims: list[Dim] = []
    for size in shape:
        dim: list[Atom | Tokens] = []
        need = size
        if need == 1 and left and left[-1].size == 1:
            dim.append(left.pop())
        while need > 1:
            if not left:
                raise Lost
            a = left.pop()
            if need % a.size == 0:
                dim.append(a)
                need //= a.size
            elif isinstance(a, Atom) and a.size % need == 0:
                fast = a.size // need
                dim.append(a._replace(size=need, stride=a.stride * fast))
                left.append(a._replace(size=fast))
                need = 1
            else:
                raise Lost
        dims.append(tuple(dim))
    if any(a.size > 1 for a in left):
        raise Lost
    if left and dims:
        dims[-1] = (*dims[-1], *reversed(left))
    return replace(state, dims=tuple(map(_fused, dims)))


def _fused(dim: Dim) -> Dim:
    """Atoms that go on where the one behind them ends are one: rows of windows and rows in a window are rows."""
    fused: list[Atom | Tokens] = []
    for a in dim:
        last = fused[-1] if fused else None
        if (
            isinstance(last, Atom) and isinstance(a, Atom) and last.axis == a.axis and a.stride > 0
            and last.stride == a.size * a.stride and last.size > 1 and a.size > 1
        ):  # fmt: skip
            fused[-1] = a._replace(size=last.size * a.size)
        else:
            fused.append(a)
    return tuple(fused)


def _fitted(state: State, shape: tuple[int, ...]) -> State:
    """Broadcast to a shape: missing dimensions in front, those of 1 grown."""
    state = replace(state, dims=((),) * (len(shape) - len(state.dims)) + state.dims)
    for d, size in enumerate(shape):
        if _size(state.dims[d]) == 1 and size != 1:
            if state.axis_of(d):
                state = _moved(state, d, _picked((0,) * size))
            else:
                kind = next((a.axis for a in _atoms(state.dims[d])), "?")
                state = _merged(state).with_dim(d, (Atom(kind, size, 0 if kind == "?" else 1),))
    return state


def _padded_dim(state: State, d: int, left: int, right: int, mode: str) -> State:
    if left < 0 or right < 0:
        size = _size(state.dims[d])
        state = _taken(state, d, range(max(0, -left), size - max(0, -right)))
        left, right = max(0, left), max(0, right)
    if not left and not right:
        return state
    dim = state.dims[d]
    both = len({a.axis for a in _along(dim, *_AXES)}) > 1
    if both and mode == "constant" and len(dim) == 1 and isinstance(dim[0], Tokens):
        return state.with_dim(d, (dim[0]._replace(prefix=dim[0].prefix + left, suffix=dim[0].suffix + right),))
    if both and mode == "constant" and all(isinstance(a, Atom) and a.axis in _AXES for a in dim if a.size > 1):
        return state.with_dim(d, (Tokens(left, tuple(_atoms(dim)), right),))
    size = _size(dim)
    if not state.axis_of(d):
        state = replace(_merged(state), blurred=True)
    return _moved(state, d, _padded(size, left, right, mode))


def _windowed(state: State, d: int, k: int, s: int, p: int, dilation: int, out: int) -> State:
    size = _size(state.dims[d])
    if k == 1 and s == 1 and p == 0 and out == size:
        return state
    if len({a.axis for a in _along(state.dims[d], *_AXES)}) > 1:  # a window over flattened rows and columns
        return _mix(state, [d], keep=False).inexact().with_dim(d, (Atom("?", out, 0),))
    return _moved(state, d, _window(size, out, k, s, p, dilation))


def _channels(state: State, d: int, groups: int, out: int) -> State:
    """What a convolution does along its channels."""
    size = _size(state.dims[d])
    dim = state.dims[d]
    if groups == 1:
        return _mix(state, [d], keep=False).with_dim(d, (Atom("c", out),))
    if _along(dim, *_AXES):
        return _mix(state, [d], keep=False).inexact().with_dim(d, (Atom("c", out),))
    if state.classes is None or not _own_classes(state, d):
        return _merged(state).with_dim(d, (Atom("c", out),))
    offsets = _offsets((a.size, a.stride) for a in _along(dim, "c"))
    seen = [state.fields[state.classes[u]] for u in offsets]
    each = size // groups
    fields = [_both(dict.fromkeys(seen[g * each : (g + 1) * each])) for g in range(groups)]
    return _with_classes(state, d, [fields[o * groups // out] for o in range(out)])


def _concatenated(parts: list[tuple[State | None, int]], d: int) -> State:
    """parts: states, None for constants, with their sizes along d."""
    states = [s for s, _ in parts if s is not None]
    d %= len(states[0].dims)
    total = sum(size for _, size in parts)
    spatial = [s for s in states if _along(s.dims[d], *_AXES) or any(isinstance(a, Tokens) for a in s.dims[d])]
    if spatial and len({a.axis for s in spatial for a in _along(s.dims[d], *_AXES)}) > 1:
        return _concatenated_tokens(parts, d, spatial, total)
    if spatial or any(_is_axis(s, d) for s in states):
        return _concatenated_space(parts, d, states, total)
    kinds = {a.axis for s in states for a in _atoms(s.dims[d])}
    others = reduce(_joined, (_merged(s).with_dim(d, ()) for s in states))
    if kinds & {"n", "f"}:
        return replace(others, blurred=True).with_dim(d, (Atom("n" if "n" in kinds else "f", total),))
    lengths = len(others.fields[0][0]), len(others.fields[0][1])
    channels: list[tuple[Line, Line]] = []
    blurred = False
    for state, size in parts:
        if state is None:
            channels += [(_nothing(lengths[0]), _nothing(lengths[1]))] * size
            continue
        if not _own_classes(state, d):
            state = _merged(state)
        offsets = _offsets((a.size, a.stride) for a in _along(state.dims[d], "c"))
        state = _lifted(_reconciled(others, state.with_dim(d, ()))[1], others.dims, lengths)
        blurred = blurred or state.blurred
        channels += [state.fields[state.classes[u]] for u in offsets] if state.classes else [state.fields[0]] * size
    if any(_along(dim, "c") for dim in others.dims) and len(set(channels)) > 1:
        return replace(others.with_dim(d, (Atom("c", total),)), fields=(_both(dict.fromkeys(channels)),), blurred=True)
    return replace(_with_classes(others, d, channels), blurred=blurred)


def _own_classes(state: State, d: int) -> bool:
    """The classes of channels, if there are any, are those of dimension d."""
    channels = _along(state.dims[d], "c")
    return state.classes is None or channels == state.atoms("c") == list(state.dims[d])


def _is_axis(state: State, d: int) -> bool:
    dim = state.dims[d]
    return not _along(dim, "n", "c", "f", "?") and any(a.axis in _AXES for a in _atoms(dim))


def _concatenated_space(parts: list[tuple[State | None, int]], d: int, states: list[State], total: int) -> State:
    states = [_anchored(_merged(s), d) if _is_axis(s, d) or _along(s.dims[d], *_AXES) else s for s in states]
    axis = next(a.axis for s in states for a in s.dims[d] if isinstance(a, Atom) and a.axis in _AXES)
    k = _AXES.index(axis)
    if any(_positions(s, axis) - {d} for s in states) or any(
        a.axis != axis for s in states for a in _atoms(s.dims[d]) if a.size > 1
    ):
        raise Lost
    across = [s.with_dim(d, ()) for s in states]  # along the other axis they are joined
    others = reduce(_joined, (s.with_lines(axis, _total) for s in across))
    same = all(s.fields[0][1 - k] is states[0].fields[0][1 - k] for s in states)
    queue = iter(states)
    lines = tuple(
        _spread(next(queue).fields[0][k], size) if state is not None else _nothing(size) for state, size in parts
    )
    fields = (_join_lines(lines), others.fields[0][1]) if k == 0 else (others.fields[0][0], _join_lines(lines))
    state = replace(others, fields=(fields,)).with_dim(d, (Atom(axis, total),))
    state = replace(state, blurred=any(s.blurred for s in states))
    return state if same else state.inexact()


def _concatenated_tokens(parts: list[tuple[State | None, int]], d: int, spatial: list[State], total: int) -> State:
    states = [_merged(s) for s, _ in parts if s is not None]
    if len(spatial) > 1:
        mixed = [_mix(s, [d], keep=False).inexact() for s in states]
        return reduce(_joined, mixed).with_dim(d, (Atom("?", total, 0),))
    at = next(i for i, (s, _) in enumerate(parts) if s is spatial[0])
    main = _merged(spatial[0])
    before, behind = (sum(size for _, size in side) for side in (parts[:at], parts[at + 1 :]))
    dim = main.dims[d]
    tokens = dim[0] if len(dim) == 1 and isinstance(dim[0], Tokens) else Tokens(0, tuple(_atoms(dim)), 0)
    if tokens.size != _size(dim) or any(a.axis not in _AXES for a in tokens.atoms if a.size > 1):
        raise Lost
    extras = [_everything(_merged(s)) for s, _ in parts if s is not None and s is not spatial[0]]
    if main.extra:
        extras.append(main.extra)
    extra = _both(extras) if extras else None
    grown = Tokens(tokens.prefix + before, tokens.atoms, tokens.suffix + behind)
    alone = grown.prefix == grown.suffix == 0
    return replace(main.with_dim(d, grown.atoms if alone else (grown,)), extra=None if alone else extra)


# ---------------------------------------------------------------------------------------------------------------------
# Operations

Rule = Callable[["Call"], "State | list[State]"]
_RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


class Call:
    """A node with the states of what it read."""

    def __init__(self, node: Node, state: Callable[[Ref], State]):
        self.node = node
        self._state = state

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        if position < len(self.node.args):
            return self.node.args[position]
        return self.node.kwargs.get(name, default)

    def state(self, position: int = 0, name: str = "input") -> State:
        value = self.arg(position, name, self.node.kwargs.get("self") if position == 0 else None)
        if not isinstance(value, Ref):
            raise Lost
        return self._state(value)

    def either(self, position: int, name: str) -> State | None:
        """A state, or None for a constant."""
        value = self.arg(position, name)
        return self._state(value) if isinstance(value, Ref) else None

    def states(self) -> list[State]:
        return [self._state(r) for r in _refs((self.node.args, self.node.kwargs))]

    def shape(self, value: Any) -> tuple[int, ...]:
        return self._state(value).shape if isinstance(value, Ref) else value.shape

    def ints(self, position: int, name: str) -> tuple[int, ...]:
        """Numbers given one by one or as one list."""
        value = self.arg(position, name)
        if isinstance(value, int) and position < len(self.node.args):
            return tuple(v for v in self.node.args[position:] if isinstance(v, int))
        return (value,) if isinstance(value, int) else tuple(value)


def _refs(value: Any) -> Iterator[Ref]:
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _refs(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _refs(item)


def _tuple(value: Any, n: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * n if len(values) == 1 else values


@_rule(*"""
    add sub mul div pow rsub neg abs relu relu6 leaky_relu elu selu celu gelu silu mish hardswish hardsigmoid
    hardtanh sigmoid tanh tanhshrink hardshrink softshrink softsign softplus logsigmoid log_sigmoid threshold rrelu
    prelu exp exp2 expm1 log log1p log2 log10 sqrt rsqrt square reciprocal sin cos erf sign clamp clip clamp_min
    clamp_max floor ceil round trunc frac remainder fmod lerp addcmul addcdiv where maximum minimum fmax fmin hypot
    atan2 masked_fill eq ne lt le gt ge logical_and logical_or logical_not isnan isfinite nan_to_num floordiv
    floor_divide true_divide multiply subtract divide dropout dropout1d dropout2d dropout3d alpha_dropout
    feature_dropout feature_alpha_dropout native_dropout fake_quantize_per_tensor_affine
    fake_quantize_per_channel_affine logit xlogy bitwise_and bitwise_or and or copysign heaviside swish erfinv tan
    atan asin acos sinh cosh sinc expit positive
    """.split())  # fmt: skip
def _pointwise(call: Call) -> State:
    states = call.states()
    # In place, or with scalars: the result has the shape of what it was written into.
    return _fitted(reduce(_joined, states), call.node.shape)


@_rule(*"""
    contiguous clone to float double half bfloat16 int long bool type type_as cpu cuda detach alias data real
    requires_grad lift_fresh _to_copy
    """.split())  # fmt: skip
def _same(call: Call) -> State:
    """The tensor itself; another one, if given, lends its type alone."""
    return call.state()


@_rule("copy")
def _copy(call: Call) -> State:
    return _fitted(call.state(1, "src"), call.node.shape)


@_rule("max", "min", "mean", "sum", "nansum", "nanmean", "amax", "amin", "prod", "std", "var", "logsumexp", "median",
       "all", "any", "count_nonzero", "std_mean", "var_mean", "aminmax")  # fmt: skip
def _reduced(call: Call) -> State | list[State]:
    state = call.state()
    dims = call.arg(1, "dim", call.node.kwargs.get("axis"))
    if isinstance(dims, (Ref, Const)) or "other" in call.node.kwargs:
        return _pointwise(call)
    if call.node.op in ("std", "var", "std_mean", "var_mean", "all", "any") and isinstance(dims, bool):
        dims = None
    return _reduce(call, state, dims)


@_rule("norm", "vector_norm", "linalg_vector_norm")
def _norm(call: Call) -> State | list[State]:
    return _reduce(call, call.state(), call.arg(2, "dim"))


def _reduce(call: Call, state: State, dims: Any) -> State | list[State]:
    n = len(state.dims)
    chosen = set(range(n)) if dims is None or dims == () else {d % n for d in _tuple(dims, 1)}
    state = _mix(state, chosen, keep=False)
    if len(call.node.shape) < n:
        state = replace(state, dims=tuple(dim for d, dim in enumerate(state.dims) if d not in chosen))
    else:  # a row of units was made one unit of that row
        before = call.state()
        kinds = {d: {a.axis for a in _atoms(before.dims[d])} for d in chosen}
        state = replace(state, dims=tuple(
            (Atom(next(iter(kinds[d])), 1),) if d in kinds and len(kinds[d]) == 1 else dim
            for d, dim in enumerate(state.dims)))  # fmt: skip
    return [state] * len(call.node.shapes)


@_rule("softmax", "log_softmax", "softmin", "_softmax", "gumbel_softmax")
def _softmax(call: Call) -> State:
    state = call.state()
    dim = call.arg(3 if call.node.op == "gumbel_softmax" else 1, "dim")
    return _mix(state, [dim if dim is not None else 1 if len(state.dims) in (2, 4) else 0], keep=True)


@_rule("normalize")
def _normalized(call: Call) -> State:
    return _mix(call.state(), _tuple(call.arg(2, "dim", 1), 1), keep=True)


@_rule("layer_norm", "rms_norm", "native_layer_norm")
def _layer_norm(call: Call) -> State:
    state = call.state()
    return _mix(state, range(-len(_tuple(call.arg(1, "normalized_shape"), 1)), 0), keep=True)


@_rule("batch_norm")
def _batch_norm(call: Call) -> State:
    state = call.state()
    if not call.arg(5, "training", False):
        return state
    return _mix(state, [d for d in range(len(state.dims)) if d != 1], keep=True)


@_rule("instance_norm")
def _instance_norm(call: Call) -> State:
    state = call.state()
    return _mix(state, range(2, len(state.dims)), keep=True) if call.arg(5, "use_input_stats", True) else state


@_rule("group_norm")
def _group_norm(call: Call) -> State:
    state = call.state()
    return _mix(state, range(1, len(state.dims)), keep=True)


@_rule("local_response_norm")
def _local_response_norm(call: Call) -> State:
    return _merged(call.state())


@_rule("conv1d", "conv2d", "conv3d", "convolution")
def _conv(call: Call) -> State:
    state = call.state()
    if isinstance(weight := call.arg(1, "weight"), Ref):
        state = _weighted(state, call._state(weight))
    shape = call.shape(weight)
    n = len(shape) - 2
    if call.node.op == "convolution":
        stride, padding, dilation, transposed, _, groups = (call.arg(i, "") for i in range(3, 9))
        if transposed:
            raise Lost
    else:
        stride, padding = call.arg(3, "stride", 1), call.arg(4, "padding", 0)
        dilation, groups = call.arg(5, "dilation", 1), call.arg(6, "groups", 1)
    strides, dilations = _tuple(stride, n), _tuple(dilation, n)
    if padding == "same":
        paddings = tuple((k - 1) * d // 2 for k, d in zip(shape[2:], dilations, strict=True))
    else:
        paddings = (0,) * n if padding == "valid" else _tuple(padding, n)
    first = len(state.dims) - n
    if _size(state.dims[first - 1]) != shape[1] * groups:
        raise Lost
    state = _channels(state, first - 1, groups, shape[0])
    for i in range(n):
        out = call.node.shape[first + i]
        state = _windowed(state, first + i, shape[2 + i], strides[i], paddings[i], dilations[i], out)
    return state


def _weighted(state: State, weight: State) -> State:
    """Weights that were made of the picture: everything they saw counts everywhere."""
    return state.seeing_too(_everything(_merged(weight)))


@_rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transposed(call: Call) -> State:
    state = call.state()
    if isinstance(weight := call.arg(1, "weight"), Ref):
        state = _weighted(state, call._state(weight))
    shape = call.shape(weight)
    n = len(shape) - 2
    strides, paddings = _tuple(call.arg(3, "stride", 1), n), _tuple(call.arg(4, "padding", 0), n)
    groups, dilations = call.arg(6, "groups", 1), _tuple(call.arg(7, "dilation", 1), n)
    first = len(state.dims) - n
    state = _channels(state, first - 1, groups, shape[1] * groups)
    for i in range(n):
        size, out = _size(state.dims[first + i]), call.node.shape[first + i]
        reads = _transposed(size, out, shape[2 + i], strides[i], paddings[i], dilations[i])
        state = _moved(state, first + i, reads)
    return state


@_rule("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "lp_pool1d", "lp_pool2d",
       "lp_pool3d")  # fmt: skip
def _pool(call: Call) -> list[State]:
    state = call.state()
    n = int(call.node.op[-2])
    lp = call.node.op.startswith("lp")
    kernels = _tuple(call.arg(1 + lp, "kernel_size"), n)
    stride = call.arg(2 + lp, "stride")
    strides = kernels if stride is None or stride == () else _tuple(stride, n)
    paddings = (0,) * n if lp else _tuple(call.arg(3, "padding", 0), n)
    dilations = _tuple(call.arg(4, "dilation", 1), n) if call.node.op.startswith("max") else (1,) * n
    first = len(state.dims) - n
    for i in range(n):
        out = call.node.shape[first + i]
        state = _windowed(state, first + i, kernels[i], strides[i], paddings[i], dilations[i], out)
    return [state] * len(call.node.shapes)


@_rule("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d",
       "adaptive_max_pool2d", "adaptive_max_pool3d", "_adaptive_avg_pool2d")  # fmt: skip
def _adaptive_pool(call: Call) -> list[State]:
    state = call.state()
    n = int(call.node.op[-2])
    for d in range(len(state.dims) - n, len(state.dims)):
        size, out = _size(state.dims[d]), call.node.shape[d]
        if size == out:
            continue
        if len({a.axis for a in _along(state.dims[d], *_AXES)}) > 1:  # over tokens
            state = _mix(state, [d], keep=False)
            state = (state if out == 1 else state.inexact()).with_dim(d, (Atom("?", out, 0),))
            continue
        reads = _adaptive(size, out)
        state = _moved(state, d, reads)
    return [state] * len(call.node.shapes)


@_rule("interpolate", "upsample", "upsample_nearest", "upsample_bilinear")
def _interpolate(call: Call) -> State:
    state = call.state()
    n = len(state.dims) - 2
    mode = {"upsample_nearest": "nearest", "upsample_bilinear": "bilinear"}.get(
        call.node.op, call.arg(3, "mode", "nearest")
    )
    corners = bool(call.arg(4, "align_corners")) or call.node.op == "upsample_bilinear"
    scales = call.arg(2, "scale_factor")
    keep_scale = scales is not None and not call.arg(5, "recompute_scale_factor")
    for i in range(n):
        d = 2 + i
        size, out = _size(state.dims[d]), call.node.shape[d]
        if mode == "area":
            reads = _adaptive(size, out)
        else:
            scale = Fraction(size, out)
            if corners:
                scale = Fraction(size - 1, out - 1) if out > 1 else Fraction(0)
            elif keep_scale:
                factor = scales if isinstance(scales, (int, float)) else scales[i]
                scale = 1 / Fraction(factor).limit_denominator(4096)
            reads = _interpolated(size, out, mode, corners, scale, bool(call.arg(6, "antialias", False)))
        state = _moved(state, d, reads)
    return state


@_rule("pad", "constant_pad_nd")
def _pad(call: Call) -> State:
    state = call.state()
    widths = call.arg(1, "pad")
    mode = "constant" if call.node.op == "constant_pad_nd" else call.arg(2, "mode", "constant")
    for i in range(len(widths) // 2):
        state = _padded_dim(state, len(state.dims) - 1 - i, widths[2 * i], widths[2 * i + 1], mode)
    return state


@_rule("roll")
def _roll(call: Call) -> State:
    state = call.state()
    shifts, dims = call.arg(1, "shifts"), call.arg(2, "dims")
    if dims is None or dims == ():
        raise Lost
    for shift, dim in zip(_tuple(shifts, 1), _tuple(dims, 1), strict=True):
        d = dim % len(state.dims)
        size = _size(state.dims[d])
        if shift % size == 0:
            continue
        reads = replace(_picked(tuple((i - shift) % size for i in range(size))), exact=False)
        state = _moved(state, d, reads, roll=shift)
    return state


@_rule("flip", "fliplr", "flipud")
def _flip(call: Call) -> State:
    state = call.state()
    dims = {"fliplr": (1,), "flipud": (0,)}.get(call.node.op) or call.ints(1, "dims")
    for dim in dims:
        state = _taken(state, dim % len(state.dims), range(_size(state.dims[dim]) - 1, -1, -1))
    return state


# -- the same numbers in another order


@_rule("view", "reshape", "flatten", "unflatten", "ravel", "view_as", "reshape_as", "_unsafe_view", "unsafe_view")
def _view(call: Call) -> State:
    state = call.state()
    return state if state.shape == call.node.shape else _viewed(state, call.node.shape)


def _permuted(state: State, order: Sequence[int]) -> State:
    return replace(state, dims=tuple(state.dims[d] for d in order))


@_rule("permute")
def _permute(call: Call) -> State:
    return _permuted(call.state(), call.ints(1, "dims"))


@_rule("transpose", "swapaxes", "swapdims", "t", "T", "mT", "adjoint", "H", "mH")
def _transpose(call: Call) -> State:
    state = call.state()
    n = len(state.dims)
    order = list(range(n))
    if call.node.op in ("T", "t"):
        return _permuted(state, order[::-1])
    first, second = -1, -2
    if call.node.op in ("transpose", "swapaxes", "swapdims"):
        first = call.arg(1, "dim0", call.node.kwargs.get("axis0"))
        second = call.arg(2, "dim1", call.node.kwargs.get("axis1"))
    order[first], order[second] = order[second], order[first]
    return _permuted(state, order)


@_rule("movedim", "moveaxis")
def _movedim(call: Call) -> State:
    state = call.state()
    n = len(state.dims)
    source = [d % n for d in _tuple(call.arg(1, "source"), 1)]
    target = [d % n for d in _tuple(call.arg(2, "destination"), 1)]
    order = [d for d in range(n) if d not in source]
    for to, d in sorted(zip(target, source, strict=True)):
        order.insert(to, d)
    return _permuted(state, order)


@_rule("squeeze")
def _squeeze(call: Call) -> State:
    state = call.state()
    chosen = call.arg(1, "dim")
    n = len(state.dims)
    dims = range(n) if chosen is None else [d % n for d in _tuple(chosen, 1)]
    return replace(state, dims=tuple(
        dim for d, dim in enumerate(state.dims) if d not in dims or _size(dim) != 1))  # fmt: skip


@_rule("unsqueeze")
def _unsqueeze(call: Call) -> State:
    state = call.state()
    d = call.arg(1, "dim") % (len(state.dims) + 1)
    return replace(state, dims=(*state.dims[:d], (), *state.dims[d:]))


@_rule("expand", "expand_as", "broadcast_to")
def _expand(call: Call) -> State:
    return _fitted(call.state(), call.node.shape)


@_rule("repeat", "tile")
def _repeat(call: Call) -> State:
    state = call.state()
    times = call.ints(1, "repeats" if call.node.op == "repeat" else "dims")
    state = replace(state, dims=((),) * (len(times) - len(state.dims)) + state.dims)
    times = (1,) * (len(state.dims) - len(times)) + times
    for d, k in enumerate(times):
        size = _size(state.dims[d])
        if k == 1:
            continue
        if size == 1:
            grown = tuple(s if e != d else k for e, s in enumerate(state.shape))
            state = _fitted(state, grown)
        else:
            reads = _picked(tuple(range(size)) * k)
            state = _moved(state, d, reads)
    return state


@_rule("repeat_interleave")
def _repeat_interleave(call: Call) -> State:
    state = call.state()
    times, dim = call.arg(1, "repeats"), call.arg(2, "dim")
    if not isinstance(times, int) or dim is None:
        raise Lost
    d = dim % len(state.dims)
    size = _size(state.dims[d])
    return _moved(state, d, _picked(tuple(i for i in range(size) for _ in range(times))))


@_rule("chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split", "unbind")
def _split(call: Call) -> list[State]:
    state = call.state()
    d = call.arg(1, "dim", 0) if call.node.op == "unbind" else call.arg(2, "dim", 0)
    d %= len(state.dims)
    parts: list[State] = []
    begin = 0
    for shape in call.node.shapes:
        size = 1 if call.node.op == "unbind" else shape[d]
        part = _taken(state, d, range(begin, begin + size))
        parts.append(_without(part, d) if call.node.op == "unbind" else part)
        begin += size
    if begin != _size(state.dims[d]):
        raise Lost
    return parts


def _without(state: State, d: int) -> State:
    """One unit of dimension d was chosen; the dimension goes."""
    return replace(state, dims=state.dims[:d] + state.dims[d + 1 :])


@_rule("select")
def _select(call: Call) -> State:
    state = call.state()
    d = call.arg(1, "dim") % len(state.dims)
    i = call.arg(2, "index") % _size(state.dims[d])
    return _without(_taken(state, d, range(i, i + 1)), d)


@_rule("narrow", "slice")
def _narrow(call: Call) -> State:
    state = call.state()
    d = call.arg(1, "dim", 0) % len(state.dims)
    size = _size(state.dims[d])
    if call.node.op == "slice":
        chosen = range(size)[slice(call.arg(2, "start"), call.arg(3, "end"), call.arg(4, "step", 1))]
    else:
        begin = call.arg(2, "start") % size
        chosen = range(begin, begin + call.arg(3, "length"))
    return _taken(state, d, chosen)


@_rule("index_select")
def _index_select(call: Call) -> State:
    state = call.state()
    d = call.arg(1, "dim") % len(state.dims)
    return _chosen(state, d, call.node.shape[d])


def _chosen(state: State, d: int, count: int) -> State:
    """Units of dimension d that are known at run time only."""
    mixed = _mix(state, [d], keep=False).inexact()
    kinds = {a.axis for a in _atoms(state.dims[d])}
    return mixed.with_dim(d, (Atom("c" if kinds == {"c"} else "n" if kinds == {"n"} else "?", count),))


def _indexed(state: State, index: Any) -> tuple[State, list[int]]:
    """The state behind `tensor[index]`, and which dimensions of the tensor the index cuts."""
    items = list(index) if isinstance(index, tuple) else [index]
    given = sum(item is not None and item is not Ellipsis for item in items)
    if not any(item is Ellipsis for item in items):
        items.append(Ellipsis)
    d, at, cut = 0, 0, []
    for item in items:
        if item is None:
            state = replace(state, dims=(*state.dims[:d], (), *state.dims[d:]))
            d += 1
            continue
        if item is Ellipsis:
            skip = len(state.dims) - d - (given - at)
            d, at, given = d + skip, at + skip, given + skip
            continue
        size = _size(state.dims[d])
        if isinstance(item, bool):
            raise Lost
        if isinstance(item, int):
            state = _without(_taken(state, d, range(size)[item : item + 1 or None]), d)
            cut.append(at)
        elif isinstance(item, slice):
            chosen = range(size)[item]
            if chosen != range(size):
                cut.append(at)
            state = _taken(state, d, chosen)
            d += 1
        elif isinstance(item, Const) and len(item.shape) == 1 and sum(isinstance(i, Const) for i in items) == 1:
            state = _chosen(state, d, item.shape[0])
            cut.append(at)
            d += 1
        else:
            raise Lost
        at += 1
    return state, cut


@_rule("getitem")
def _getitem(call: Call) -> State:
    state, _ = _indexed(call.state(), call.arg(1, "index"))
    return state


@_rule("setitem")
def _setitem(call: Call) -> State:
    """What was written counts, as far as it can be told, only where it was written."""
    value = call.either(2, "value")
    base = call.either(0, "self")
    if base is None:
        raise Lost
    if value is None:
        return _merged(base).inexact()
    target, cut = _indexed(base, call.arg(1, "index"))
    flat = all(not _along(base.dims[d], *_AXES) for d in cut) and len(target.dims) == len(base.dims)
    if flat and len(value.dims) <= len(base.dims):
        value = replace(value, dims=((),) * (len(base.dims) - len(value.dims)) + value.dims)
        dims = tuple(() if d in cut else dim for d, dim in enumerate(value.dims))
        return replace(_joined(_merged(base), replace(_merged(value), dims=dims)), blurred=True)
    return _weighted(_merged(base), value).inexact()


@_rule("cat", "concat", "concatenate")
def _cat(call: Call) -> State:
    tensors = call.arg(0, "tensors")
    d = call.arg(1, "dim", call.node.kwargs.get("axis", 0))
    n = len(call.node.shape)
    tensors = [t for t in tensors if len(call.shape(t)) == n]  # an empty tensor of one dimension is allowed
    return _concatenated([(call._state(t) if isinstance(t, Ref) else None, call.shape(t)[d]) for t in tensors], d % n)


@_rule("stack")
def _stack(call: Call) -> State:
    n = len(call.node.shape)
    d = call.arg(1, "dim", 0) % n

    def grown(state: State) -> State:
        return replace(state, dims=(*state.dims[:d], (), *state.dims[d:]))

    tensors = call.arg(0, "tensors")
    return _concatenated([(grown(call._state(t)) if isinstance(t, Ref) else None, 1) for t in tensors], d)


@_rule("glu")
def _glu(call: Call) -> State:
    state = call.state()
    d = call.arg(1, "dim", -1) % len(state.dims)
    half = _size(state.dims[d]) // 2
    return _joined(_taken(state, d, range(half)), _taken(state, d, range(half, 2 * half)))


@_rule("pixel_shuffle")
def _pixel_shuffle(call: Call) -> State:
    state = call.state()
    *lead, c, h, w = state.shape
    r, n = call.arg(1, "upscale_factor"), len(lead)
    parts = _viewed(state, (*lead, c // r**2, r, r, h, w))
    order = (*range(n), *(n + i for i in (0, 3, 1, 4, 2)))
    return _viewed(_permuted(parts, order), call.node.shape)


@_rule("pixel_unshuffle")
def _pixel_unshuffle(call: Call) -> State:
    state = call.state()
    *lead, c, h, w = state.shape
    r, n = call.arg(1, "downscale_factor"), len(lead)
    parts = _viewed(state, (*lead, c, h // r, r, w // r, r))
    order = (*range(n), *(n + i for i in (0, 2, 4, 1, 3)))
    return _viewed(_permuted(parts, order), call.node.shape)


@_rule("channel_shuffle")
def _channel_shuffle(call: Call) -> State:
    state = call.state()
    n, c, *rest = state.shape
    groups = call.arg(1, "groups")
    parts = _viewed(state, (n, groups, c // groups, *rest))
    return _viewed(_permuted(parts, (0, 2, 1, *range(3, len(rest) + 3))), state.shape)


@_rule("unfold", "im2col")
def _unfold(call: Call) -> State:
    state = call.state()
    if call.node.op == "unfold" and len(call.node.shape) == len(state.dims) + 1:  # Tensor.unfold(dimension, size, step)
        d, size, step = call.arg(1, "dimension") % len(state.dims), call.arg(2, "size"), call.arg(3, "step")
        state = _windowed(state, d, size, step, 0, 1, call.node.shape[d])
        return replace(_merged(state), dims=(*state.dims, (Atom("c", size),)), blurred=True)
    kernels, dilations = _tuple(call.arg(1, "kernel_size"), 2), _tuple(call.arg(2, "dilation", 1), 2)
    paddings, strides = _tuple(call.arg(3, "padding", 0), 2), _tuple(call.arg(4, "stride", 1), 2)
    state = _merged(state)
    for i, d in enumerate((-2, -1)):
        size = _size(state.dims[d])
        out = (size + 2 * paddings[i] - dilations[i] * (kernels[i] - 1) - 1) // strides[i] + 1
        at = len(state.dims) + d
        state = _windowed(state, at, kernels[i], strides[i], paddings[i], dilations[i], out)
    *lead, _, y, x = state.dims
    return replace(state, dims=(*lead, (Atom("c", call.node.shape[-2]),), (*y, *x)), blurred=True)


@_rule("fold", "col2im")
def _fold(call: Call) -> State:
    state = _merged(call.state())
    outs = call.node.shape[-2:]
    kernels, dilations = _tuple(call.arg(2, "kernel_size"), 2), _tuple(call.arg(3, "dilation", 1), 2)
    paddings, strides = _tuple(call.arg(4, "padding", 0), 2), _tuple(call.arg(5, "stride", 1), 2)
    sizes = [
        (outs[i] + 2 * paddings[i] - dilations[i] * (kernels[i] - 1) - 1) // strides[i] + 1 for i in range(2)
    ]  # fmt: skip
    if _along(state.dims[-2], *_AXES):
        raise Lost
    if state.blurred:  # each tap takes channels of its own
        state = state.inexact()
    lead = state.shape[:-2]
    state = _mix(state, [len(state.dims) - 2], keep=False)
    state = _viewed(state, (*lead, 1, *sizes))
    state = state.with_dim(len(lead), (Atom("c", call.node.shape[-3]),))
    for i in range(2):
        d = len(lead) + 1 + i
        reads = _transposed(sizes[i], outs[i], kernels[i], strides[i], paddings[i], dilations[i])
        state = _moved(state, d, reads)
    return state


# -- products


@_rule("linear")
def _linear(call: Call) -> State:
    state = call.state()
    if isinstance(weight := call.arg(1, "weight"), Ref):
        state = _weighted(state, call._state(weight))
    last = len(state.dims) - 1
    return _mix(state, [last], keep=False).with_dim(last, (Atom("c", call.node.shape[-1]),))


def _contracted(operands: Sequence[State | None], letters: Sequence[Sequence[Any]], out: Sequence[Any],
                shape: tuple[int, ...]) -> State:  # fmt: skip
    """Sum of products: letters name the dimensions of each operand; those not in `out` are summed over."""
    parts = []
    for state, names in zip(operands, letters, strict=True):
        if state is None:
            continue
        if len(names) != len(state.dims) or len(set(names)) != len(names):
            raise Lost
        gone = [d for d, name in enumerate(names) if name not in out]
        state = _mix(state, gone, keep=False)
        place = dict(zip(names, state.dims, strict=True))
        parts.append(replace(state, dims=tuple(place.get(name, ()) for name in out)))
    state = reduce(_joined, parts)
    for d, size in enumerate(shape):  # what came from a constant alone, or from the other side's units
        if _size(state.dims[d]) != size:
            names = [n for s, n in zip(operands, letters, strict=True) if s is None]
            kind = "c" if any(out[d] in n for n in names) else "?"
            state = state.with_dim(d, (Atom(kind, size, 1 if kind == "c" else 0),))
    return state


@_rule("matmul", "mm", "bmm", "mv", "dot", "outer")
def _matmul(call: Call) -> State:
    left, right = call.either(0, "input"), call.either(1, "other")
    shapes = [call.shape(call.node.args[i]) for i in range(2)] if len(call.node.args) > 1 else []
    if len(shapes) != 2 or call.node.op == "outer":
        raise Lost
    return _product(left, right, shapes[0], shapes[1], call.node.shape)


def _product(left: State | None, right: State | None, a: tuple[int, ...], b: tuple[int, ...],
             shape: tuple[int, ...]) -> State:  # fmt: skip
    depth = max(len(a), len(b)) - 2
    one = [f"b{i}" for i in range(depth - len(a) + 2, depth)] + ["i", "k"] if len(a) > 1 else ["k"]
    two = [f"b{i}" for i in range(depth - len(b) + 2, depth)] + ["k", "j"] if len(b) > 1 else ["k"]
    out = [f"b{i}" for i in range(max(depth, 0))] + ["i"] * (len(a) > 1) + ["j"] * (len(b) > 1)
    return _contracted([left, right], [one, two], out, shape)


@_rule("addmm", "baddbmm")
def _addmm(call: Call) -> State:
    left, right = call.either(1, "mat1"), call.either(2, "mat2")
    shapes = [call.shape(v) for v in call.node.args[1:3]]
    bias = call.either(0, "input")
    if left is None and right is None:
        raise Lost
    state = _product(left, right, shapes[0], shapes[1], call.node.shape)
    return state if bias is None else _fitted(_joined(state, bias), call.node.shape)


@_rule("einsum")
def _einsum(call: Call) -> State:
    equation, *operands = call.node.args
    if len(operands) == 1 and isinstance(operands[0], tuple):
        operands = list(operands[0])
    if not isinstance(equation, str) or "..." in equation:
        raise Lost
    given, arrow, out = equation.replace(" ", "").partition("->")
    if not arrow:
        counts = given.replace(",", "")
        out = "".join(sorted(c for c in set(counts) if counts.count(c) == 1))
    states = [call._state(o) if isinstance(o, Ref) else None for o in operands]
    return _contracted(states, given.split(","), out, call.node.shape)


@_rule("scaled_dot_product_attention")
def _attention(call: Call) -> State:
    query, key, value = (call.either(i, name) for i, name in enumerate(("query", "key", "value")))
    mask = call.arg(3, "attn_mask")
    # A constant for each head is a table of relative positions; others may hide units from each other.
    table = isinstance(mask, Const) and len(mask.shape) > 2 and math.prod(mask.shape[:-3]) == 1 and mask.shape[-3] > 1
    limited = bool(call.arg(5, "is_causal", False)) or not (mask is None or table)
    parts = []
    n = len(call.node.shape)
    if query is not None:
        parts.append(_mix(query, [n - 1], keep=False))
    if key is not None:
        parts.append(_mix(key, [n - 2, n - 1], keep=False))
    if value is not None:
        parts.append(_mix(value, [n - 2], keep=False))
    if isinstance(mask, Ref):
        parts.append(_mix(call.state(3, "attn_mask"), [-1], keep=False))
    state = _fitted(reduce(_joined, parts), call.node.shape)
    if value is None:
        state = state.with_dim(n - 1, (Atom("c", call.node.shape[-1]),))
    return state.inexact() if limited else state


@_rule("multi_head_attention_forward")
def _multi_head(call: Call) -> list[State]:
    query, key, value = (call.either(i, name) for i, name in enumerate(("query", "key", "value")))
    states = [_mix(s, [0, len(s.dims) - 1], keep=False) for s in (key, value) if s is not None]
    if query is None:
        raise Lost
    own = _mix(query, [len(query.dims) - 1], keep=False)
    state = reduce(_joined, states, own)
    state = state.with_dim(len(state.dims) - 1, (Atom("c", call.node.shape[-1]),)).inexact()
    return [state]


# ---------------------------------------------------------------------------------------------------------------------
# The whole run


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
        return State(dims, ((_whole(1, pixels[0], False), _whole(1, pixels[1], False)),))
    own = shape[labels.index("y")], shape[labels.index("x")]
    if own != pixels:
        return State(dims, ((_whole(own[0], pixels[0], False), _whole(own[1], pixels[1], False)),))
    return State(dims, ((_picture(pixels[0]), _picture(pixels[1])),))


def _follow(
    node: Node, states: dict[tuple[int, int], State], pixels: tuple[int, int], batch: int
) -> list[State]:  # fmt: skip
    """The states of a node's outputs: by its rule, or as one that cannot be followed."""
    read = {i: states[i, 0] for i in node.inputs if (i, 0) in states}
    if node.op.startswith("new_") or node.op.endswith("_like"):  # made of a shape, not of values
        return [_blank(shape) for shape in node.shapes]
    rule = _RULES.get(node.op)
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

    direct = {r.node for r in _refs((node.args, node.kwargs))}
    hidden = [s for i, s in read.items() if i not in direct]
    if not hidden:
        yield plain
        return
    for shown in sorted(hidden, key=lambda s: -math.prod(s.shape)):

        def merged(ref: Ref, shown: State = shown) -> State:
            return reduce(_weighted, (_merged(s) for s in (*hidden, plain(ref))), _merged(shown)).inexact()

        yield merged


def _blank(shape: tuple[int, ...]) -> State:
    """A tensor that holds nothing of the picture."""
    return State(tuple((Atom("?", size, 0),) for size in shape), ((_nothing(1), _nothing(1)),))


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
        if label in _AXES:
            lengths[label] = size
        dims.append((Atom(label, size, 0 if label == "?" else 1),))
    fields = _whole(lengths["y"], pixels[0], False), _whole(lengths["x"], pixels[1], False)
    extra = (_whole(1, pixels[0], False), _whole(1, pixels[1], False)) if split and split[0] else None
    return State(tuple(dims), (fields,), blurred=True, extra=extra, guessed=True)


def _guess(
    shape: tuple[int, ...], read: list[State], pixels: tuple[int, int], batch: int
) -> tuple[str, tuple[int, int, int] | None]:
    like = [s for s in read if len(s.dims) == len(shape) and s.shape[:1] == shape[:1]]
    for state in like:
        labels = _labels(state)
        if state.shape == shape and any(dim and isinstance(dim[0], Tokens) for dim in state.dims):
            tokens = next(d[0] for d in state.dims if d and isinstance(d[0], Tokens))
            h, w = (math.prod(a.size for a in tokens.atoms if a.axis == axis) for axis in _AXES)
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
        kinds = {a.axis for a in _atoms(dim) if a.size > 1} or {a.axis for a in dim[:1] if isinstance(a, Atom)}
        if len(kinds) == 1:
            names.append({"f": "time"}.get(kind := kinds.pop(), kind))
        else:
            names.append("t" if kinds == set(_AXES) else "?")
    return tuple(names)


def _tidy(state: State) -> State:
    """Rows made of rows and channels (a pixel shuffle) as rows, channels made of channels and rows as channels."""
    pure = {labels for labels in _labels(state) if labels in _AXES}
    for d, dim in enumerate(state.dims):
        large = [a for a in _atoms(dim) if a.size > 1]
        space = {a.axis for a in large if a.axis in _AXES}
        kinds = [a.axis for a in _atoms(dim)]
        if not space or "n" in kinds or len(large) == 1:
            continue
        if kinds[0] == "c" and len(pure) == 2:
            state = replace(_mix(state, [d], keep=False).with_dim(d, (Atom("c", _size(dim)),)), blurred=True)
        elif len(space) == 1 and large[0].axis in _AXES and {a.axis for a in large} <= space | {"c", "?"}:
            with contextlib.suppress(Lost):
                state = _anchored(state, d)
    return state


def _geometry(state: State, pixels: tuple[int, int]) -> Geometry:
    state = _tidy(state)
    layout = _layout(state)
    axes = []
    for k, axis in enumerate(_AXES):
        line = state.line(axis)
        if layout.roll[k]:
            line = _read(line, _picked(tuple((i + layout.roll[k]) % len(line) for i in range(len(line)))))
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
    atoms = [a for dim in state.dims for a in _atoms(dim)]
    kinds = [a.axis for a in atoms]
    unclear = any(a.axis == "f" or (a.axis == "?" and a.size > 1) for a in atoms) or kinds.count("n") > 1
    nested = any(isinstance(a, Tokens) and len(dim) > 1 for dim in state.dims for a in dim)
    mixed = any(_along(dim, "c") and any(a.axis in _AXES for a in _atoms(dim)) for dim in state.dims)
    if unclear or nested or mixed or not {"y", "x"} <= set(kinds) or len(labels) < 2:
        return None
    sizes = [math.prod(a.size for a in atoms if a.axis == axis) for axis in _AXES]
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
    if "t" in labels and not any(_along(dim, "n") and _along(dim, *_AXES) for dim in state.dims):
        tokens_at = labels.index("t")
        if _size(state.dims[tokens_at]) == h * w:
            return f"{h * w} tokens as {h}x{w}"
    if any(len(_along(dim, axis)) and len(state.atoms(axis)) > 1 for dim in state.dims for axis in _AXES):
        return f"windows put together to {h}x{w}"
    order = [label for label in labels if label in "cyx"]
    if order == ["y", "x", "c"]:
        return "channels last, turned to (N, C, H, W)"
    if order == ["c", "x", "y"] or order == ["x", "y", "c"]:
        return "columns before rows, turned to (N, C, H, W)"
    return ""
