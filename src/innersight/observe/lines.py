"""What the units along one axis of the picture see, and what reading some of them sees.

A `Line` says, unit by unit, which pixels can reach that unit. Explicit intervals, because adaptive pooling,
interpolation, ragged windows and borders have no formula with one size and one stride; where there is one (`Regular`),
it is carried along too. `Reads` says which units a layer's units are made of; `read` makes the next line of both.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache, reduce
from typing import NamedTuple


class Lost(Exception):
    """An operation that cannot be followed."""


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
def picture(pixels: int) -> Line:
    return Line(tuple(range(pixels)), tuple(range(1, pixels + 1)), Regular(Fraction(1), Fraction(0), Fraction(1)))


@lru_cache(maxsize=64)
def whole(units: int, pixels: int, exact: bool) -> Line:
    return Line((0,) * units, (pixels,) * units, None, exact)


@lru_cache(maxsize=64)
def nothing(units: int) -> Line:
    return Line((_FAR,) * units, (-_FAR,) * units, None)


@lru_cache(maxsize=4096)
def read(line: Line, reads: Reads) -> Line:
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
def hull(a: Line, b: Line) -> Line:
    """What the units of both lines see together."""
    if a is b:
        return a
    if len(a) != len(b):
        a, b = (spread(line, max(len(a), len(b))) for line in (a, b))
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


def both(fields: Iterable[tuple[Line, Line]]) -> tuple[Line, Line]:
    """The hull along each axis."""
    return reduce(lambda p, q: (hull(p[0], q[0]), hull(p[1], q[1])), fields)


@lru_cache(maxsize=1024)
def spread(line: Line, units: int) -> Line:
    """One unit's field for all units."""
    if len(line) == units:
        return line
    if len(line) != 1:
        raise Lost
    return Line(line.first * units, line.last * units, None, line.exact)


def offsets(digits: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """The units that the digits (size, stride), slowest first, step through."""
    units: tuple[int, ...] = (0,)
    for size, stride in digits:
        units = tuple(u + i * stride for u in units for i in range(size))
    return units


@lru_cache(maxsize=1024)
def blend(line: Line, mixed: tuple[tuple[int, int], ...]) -> Line:
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
def condense(line: Line, mixed: tuple[tuple[int, int], ...], left: tuple[tuple[int, int], ...]) -> Line:
    """`blend`, then one unit for each value of the digits `left` (largest stride first)."""
    blended = blend(line, mixed)
    units = offsets(left)
    regular = None
    step = left[-1][1] if left else 0
    if line.regular and left and all(a[1] == b[0] * b[1] for a, b in itertools.pairwise(left)):
        jump, start, size, tight = line.regular
        regular = Regular(jump * step, start, size + sum((n - 1) * s for n, s in mixed) * jump, tight)
    first, last = (tuple(table[u] for u in units) for table in (blended.first, blended.last))
    return Line(first, last, regular, line.exact)


@lru_cache(maxsize=1024)
def joined(lines: tuple[Line, ...]) -> Line:
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
def window(units: int, out: int, k: int, s: int, p: int, d: int) -> Reads:
    """Convolution and pooling: `k` taps `d` apart, every `s` units, from `p` units before the first on."""
    reads = []
    for o in range(out):
        begin = o * s - p
        t0, t1 = max(0, -(begin // d)), min(k - 1, (units - 1 - begin) // d)
        reads.append(range(begin + t0 * d, begin + t1 * d + 1, d))
    change = Fraction(-p), Fraction(s), Fraction((k - 1) * d), True
    return Reads(tuple(reads), change)


@lru_cache(maxsize=1024)
def transposed(units: int, out: int, k: int, s: int, p: int, d: int) -> Reads:
    """Transposed convolution: unit o gets from unit i by tap t where o = i s - p + t d."""
    reads = tuple(
        tuple(at // s for at in range(o + p - (k - 1) * d, o + p + 1, d) if at % s == 0 and 0 <= at < units * s)
        for o in range(out)
    )
    reach = Fraction((k - 1) * d, s)
    return Reads(reads, (Fraction(p, s) - reach, Fraction(1, s), reach, s == 1))


@lru_cache(maxsize=1024)
def adaptive(units: int, out: int) -> Reads:
    reads = tuple(range(o * units // out, -(-(o + 1) * units // out)) for o in range(out))
    if out == 1 and units > 1:
        return Reads(reads)
    ratio, ragged = Fraction(units, out), Fraction(out - 1, out) if units % out else Fraction(0)
    return Reads(reads, (-ragged, ratio, ratio + 2 * ragged - 1, not ragged))


@lru_cache(maxsize=1024)
def picked(units: tuple[int, ...] | range) -> Reads:
    change = None
    if isinstance(units, range) and units.step > 0 and len(units):
        change = Fraction(units.start), Fraction(units.step), Fraction(0), True
    return Reads(tuple((u,) for u in units), change)


@lru_cache(maxsize=1024)
def padded(units: int, left: int, right: int, mode: str) -> Reads:
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
def interpolated(units: int, out: int, mode: str, corners: bool, scale: Fraction, antialias: bool) -> Reads:
    """Resizing; `scale` is source units for one new unit."""
    if units == out and scale == 1:
        return picked(range(units))
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


@lru_cache(maxsize=512)
def loosen(line: Line) -> Line:
    return replace(line, exact=False)


@lru_cache(maxsize=512)
def total(line: Line) -> Line:
    """One unit that sees what all of them see."""
    return Line((min(line.first),), (max(line.last),), None, line.exact)


@lru_cache(maxsize=512)
def regrouped(line: Line, units: tuple[int, ...]) -> Line:
    """The line of these units of `line`; each repeated r times (pixel shuffle) is a field that moves by 1/r."""
    r = sum(u == units[0] for u in units)
    reads = picked(units)
    if units == tuple(i // r for i in range(len(units))):
        slack = Fraction(r - 1, r)
        reads = replace(reads, change=(-slack, Fraction(1, r), slack, r == 1))
    return read(line, reads)


@lru_cache(maxsize=1024)
def part(line: Line, begin: int, units: int) -> Line:
    return Line(line.first[begin : begin + units], line.last[begin : begin + units], None, line.exact)


@lru_cache(maxsize=512)
def regathered(line: Line, units: tuple[int, ...]) -> Line:
    return replace(read(line, picked(units)), regular=None)
