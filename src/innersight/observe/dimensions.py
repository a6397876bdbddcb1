"""What the dimensions of a tensor are made of, and how they are split, joined, moved and mixed.

A dimension is a product of `Atom`s: a batch, channels, a stretch of rows or columns. `viewed` splits and joins them, a
permutation moves them. So channel shuffles, channels-last blocks, patches, tokens and windows of windows are followed
by one rule each. `State` is all that is known of one tensor: its dimensions, and a line for rows and one for columns.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NamedTuple

from innersight.observe import lines
from innersight.observe.lines import Line, Lost, Reads


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
AXES = ("y", "x")


def size_of(dim: Dim) -> int:
    return math.prod(a.size for a in dim)


def atoms_of(dim: Dim) -> Iterator[Atom]:
    for a in dim:
        if isinstance(a, Tokens):
            yield from a.atoms
        else:
            yield a


def along(dim: Dim, *axes: str) -> list[Atom]:
    return [a for a in atoms_of(dim) if a.axis in axes and a.size > 1]


def descending(atom: Atom) -> int:
    return -atom.stride if atom.axis in AXES else 0


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
        else (a.axis if a.axis in AXES else "*", a.size)
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
        return tuple(map(size_of, self.dims))

    def line(self, axis: str) -> Line:
        """What the units see, all channels together."""
        k = AXES.index(axis)
        return reduce(lines.hull, (f[k] for f in self.fields))

    def atoms(self, *axes: str) -> list[Atom]:
        return [a for dim in self.dims for a in along(dim, *axes)]

    def with_dim(self, d: int, dim: Dim) -> State:
        return replace(self, dims=(*self.dims[:d], dim, *self.dims[d + 1 :]))

    def with_lines(self, axis: str, change: Callable[..., Line], *args: Any, recount: bool = True) -> State:
        """`change(line, *args)` for the lines of one axis; `recount`: its units are others afterwards."""
        if axis == "y":
            fields = tuple((change(y, *args), x) for y, x in self.fields)
            return replace(self, fields=fields, roll=(0, self.roll[1]) if recount else self.roll)
        fields = tuple((y, change(x, *args)) for y, x in self.fields)
        return replace(self, fields=fields, roll=(self.roll[0], 0) if recount else self.roll)

    def seeing_too(self, unit: tuple[Line, Line]) -> State:
        """Every unit sees what one more unit sees as well."""
        for axis, line in zip(AXES, unit, strict=True):
            self = self.with_lines(axis, lines.hull, line, recount=False)
        return self

    def inexact(self) -> State:
        fields = tuple(tuple(lines.loosen(line) for line in f) for f in self.fields)
        extra = tuple(map(lines.loosen, self.extra)) if self.extra else None
        return replace(self, fields=fields, extra=extra)  # type: ignore[arg-type]

    def axis_of(self, d: int) -> str:
        """The axis of space that dimension d is; "" for none. Two at once are lost."""
        found = {a.axis for a in along(self.dims[d], *AXES)}
        if not found and not along(self.dims[d], "n", "c", "f", "?"):  # a map of one row is a map
            found = {a.axis for a in atoms_of(self.dims[d]) if a.axis in AXES}
        if len(found) > 1 or any(isinstance(a, Tokens) for a in self.dims[d]):
            raise Lost
        return found.pop() if found else ""


def merged(state: State) -> State:
    """All channels as one class."""
    if state.classes is None:
        return state
    y, x = state.line("y"), state.line("x")
    same = all(f == state.fields[0] for f in state.fields)
    return replace(state, fields=((y, x),), classes=None, blurred=state.blurred or not same)


def everything(state: State) -> tuple[Line, Line]:
    """What all units and extra tokens see together, as lines of one unit."""
    units = lines.total(state.line("y")), lines.total(state.line("x"))
    return lines.both((units, state.extra)) if state.extra else units


def mix(state: State, dims: Iterable[int], keep: bool) -> State:
    """Every unit sees what all units along `dims` see; the dimensions stay (`keep`) or become 1 long."""
    dims = sorted({d % len(state.dims) for d in dims})
    channels = [a for d in dims for a in along(state.dims[d], "c", "?")]
    if channels and len(channels) == len(state.atoms("c", "?")):
        state = replace(merged(state), blurred=False)
    elif channels:
        state = merged(state)
    if any(isinstance(a, Tokens) for d in dims for a in state.dims[d]):
        extra = everything(state)
        if state.extra:
            state = state.seeing_too(state.extra)
        state = replace(state, extra=extra)
    blank = replace(state, dims=tuple(() if d in dims else dim for d, dim in enumerate(state.dims)))
    for axis in AXES:
        mixed = tuple((a.size, a.stride) for d in dims for a in along(state.dims[d], axis))
        if not mixed:
            continue
        if keep:
            state = state.with_lines(axis, lines.blend, mixed, recount=False)
            continue
        left = tuple((a.size, a.stride) for a in sorted(blank.atoms(axis), key=descending))
        blank = _compact(blank.with_lines(axis, lines.condense, mixed, left), axis)
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


def anchored(state: State, d: int) -> State:
    """Dimension d, of one axis of space, as a single atom: its units, whatever they were made of, in a new count.

    Other dimensions may hold atoms of the same axis (windows); they then count slower.
    """
    axis = state.axis_of(d)
    dim = state.dims[d]
    if any(a.axis == "n" and a.size > 1 for a in atoms_of(dim)):
        raise Lost
    if along(dim, "c", "?"):
        state = merged(state)
    rest = sorted((a for e, other in enumerate(state.dims) if e != d for a in along(other, axis)), key=descending)
    own = lines.offsets((a.size, a.stride if a.axis == axis else 0) for a in atoms_of(dim))
    slow = lines.offsets((a.size, a.stride) for a in rest)
    units = tuple(r + o for r in slow for o in own)
    if units != tuple(range(len(state.fields[0][AXES.index(axis)]))):
        state = state.with_lines(axis, lines.regrouped, units)
    unit = len(own)
    strides = {}
    for a in reversed(rest):
        strides[a.stride] = unit
        unit *= a.size
    dims = list(state.dims)
    for e, other in enumerate(dims):
        if e != d:
            order = iter([strides[a.stride] for a in along(other, axis)])
            dims[e] = _restride(other, axis, order)
    dims[d] = (Atom(axis, len(own)),)
    return replace(state, dims=tuple(dims))


def moved(state: State, d: int, reads: Reads, roll: int = 0) -> State:
    """Dimension d made of new units that read the old ones."""
    out = len(reads.units)
    axis = state.axis_of(d)
    if not axis:
        state = merged(state)
        kinds = {a.axis for a in atoms_of(state.dims[d]) if a.size > 1} or {a.axis for a in atoms_of(state.dims[d])}
        return state.with_dim(d, (Atom(kinds.pop() if len(kinds) == 1 else "?", out),))
    state = anchored(state, d)
    own = size_of(state.dims[d])
    windows = any(e != d and along(dim, axis) for e, dim in enumerate(state.dims))

    def apply(line: Line) -> Line:
        if not windows:
            return lines.read(line, reads)
        parts = (lines.read(lines.part(line, i, own), reads) for i in range(0, len(line), own))
        return replace(lines.joined(tuple(parts)), regular=None)

    rolled = state.roll
    state = state.with_lines(axis, apply)
    dims = [
        dim if e == d else _restride(dim, axis, iter([a.stride // own * out for a in along(dim, axis)]))
        for e, dim in enumerate(state.dims)
    ]
    dims[d] = (Atom(axis, out),)
    state = replace(state, dims=tuple(dims))
    if roll:
        y, x = rolled
        state = replace(state, roll=((y + roll) % out, x) if axis == "y" else (y, (x + roll) % out))
    return state


def taken(state: State, d: int, units: range) -> State:
    """The chosen units of dimension d."""
    dim = state.dims[d]
    size = size_of(dim)
    if units == range(size):
        return state
    if len(dim) == 1 and isinstance(dim[0], Tokens):
        return _taken_tokens(state, d, dim[0], units)
    if len({a.axis for a in along(dim, *AXES)}) > 1:
        return mix(state, [d], keep=False).inexact().with_dim(d, (Atom("?", len(units), 0),))
    if state.axis_of(d):
        return moved(state, d, lines.picked(units))
    channels = along(dim, "c")
    if state.classes is not None and _own_classes(state, d):
        offsets = lines.offsets((a.size, a.stride) for a in channels)
        return _with_classes(state, d, [state.fields[state.classes[offsets[u]]] for u in units])
    if channels or along(dim, "?", "n"):
        state = merged(state)
        state = state.inexact() if state.blurred else state
    kinds = {a.axis for a in atoms_of(dim)} or {"?"}
    return state.with_dim(d, (Atom(kinds.pop() if len(kinds) == 1 else "?", len(units)),))


def _taken_tokens(state: State, d: int, tokens: Tokens, units: range) -> State:
    inner = tokens.size - tokens.prefix - tokens.suffix
    begin, end = tokens.prefix, tokens.prefix + inner
    chosen = [u for u in units if begin <= u < end]
    if not chosen:  # class tokens alone
        extra = state.extra or (lines.nothing(1), lines.nothing(1))
        state = mix(state, [d], keep=False)
        fields = tuple(lines.spread(line, len(own)) for line, own in zip(extra, state.fields[0], strict=True))
        state = replace(state, fields=(fields,), classes=None, extra=None)  # type: ignore[arg-type]
        return state.with_dim(d, (Atom("?", len(units), 0),))
    if chosen == list(range(begin, end)) and units.step == 1:
        prefix, suffix = begin - units.start, units.stop - end
        if prefix or suffix:
            return state.with_dim(d, (Tokens(prefix, tokens.atoms, suffix),))
        return replace(state.with_dim(d, tokens.atoms), extra=None)
    return mix(state, [d], keep=False).inexact().with_dim(d, (Atom("?", len(units), 0),))


def _with_classes(state: State, d: int, channels: Sequence[tuple[Line, Line]]) -> State:
    """The state with one channel dimension, d, whose channels see what is given."""
    fields = tuple(dict.fromkeys(channels))
    number = {field: k for k, field in enumerate(fields)}
    classes = tuple(number[c] for c in channels) if len(fields) > 1 else None
    return replace(state.with_dim(d, (Atom("c", len(channels)),)), fields=fields, classes=classes)


# -- putting two together


def _positions(state: State, axis: str) -> set[int]:
    return {d for d, dim in enumerate(state.dims) if along(dim, axis)}


def _reconciled(a: State, b: State) -> tuple[State, State]:
    """Both with dimensions that do not contradict each other; what `b` says too much is mixed out of it."""
    if a.dims == b.dims:
        return a, b
    for axis in AXES:
        ours, theirs = _positions(a, axis), _positions(b, axis)
        for d in sorted(ours & theirs):
            if _signature(a.dims[d]) == _signature(b.dims[d]) and _plain(a.dims[d]) and _plain(b.dims[d]):
                continue
            with contextlib.suppress(Lost):
                a, b = anchored(a, d), anchored(b, d)
            if _signature(a.dims[d]) != _signature(b.dims[d]):
                b = mix(b, [d], keep=False).inexact()
    for axis in AXES:
        ours, theirs = _positions(a, axis), _positions(b, axis)
        if ours - theirs and theirs - ours:  # the units of one against the units of the other: attention
            crossed = any(along(a.dims[d], *AXES) for d in theirs - ours)  # rows of one against columns of the other
            b = replace(mix(b, theirs - ours, keep=False), blurred=True)
            b = b.inexact() if crossed else b
    # Rows here, columns there, along one dimension.
    for d in range(len(a.dims)):
        if along(a.dims[d], *AXES) and along(b.dims[d], *AXES) and _signature(a.dims[d]) != _signature(b.dims[d]):
            b = mix(b, [d], keep=False).inexact()
    return a, b


def _plain(dim: Dim) -> bool:
    """Space alone, or space and batch: no channels that would count in one order here and in another there."""
    return not (along(dim, *AXES) and along(dim, "c", "?"))


def _rank(state: State, dim: Dim) -> tuple:
    kinds = {a.axis for a in atoms_of(dim) if a.size > 1}
    return (
        bool(kinds & set(AXES)),
        bool(kinds) and "?" not in kinds,
        "n" in kinds or "f" in kinds,
        bool(state.classes),
        bool(dim) and "?" not in {a.axis for a in atoms_of(dim)},
    )


def _lifted(state: State, dims: tuple[Dim, ...], lengths: tuple[int, int]) -> State:
    """The lines of `state` counted as the atoms of `dims` count; `dims` hold those of the state and perhaps more."""
    if state.dims == dims:
        return state
    for k, axis in enumerate(AXES):
        digits = []
        for own, new in zip(state.dims, dims, strict=True):
            mine, others = along(own, axis), along(new, axis)
            if mine and [a.size for a in mine] != [a.size for a in others]:
                raise Lost
            digits += [
                (o.size, o.stride, m.stride if m else 0)
                for o, m in itertools.zip_longest(others, mine)
            ]  # fmt: skip
        digits.sort(key=lambda t: -t[1])
        units = lines.offsets((size, stride) for size, _, stride in digits)
        if len(units) != lengths[k]:
            raise Lost
        if len(state.fields[0][k]) != len(units) or units != tuple(range(len(units))):
            state = state.with_lines(axis, lines.regathered, units, recount=False)
    return state


def joined(a: State, b: State) -> State:
    """What an operation on two tensors, unit by unit with broadcasting, makes."""
    n = max(len(a.dims), len(b.dims))
    a, b = (replace(s, dims=((),) * (n - len(s.dims)) + s.dims) for s in (a, b))
    if a.dims == b.dims and a.classes == b.classes and a.roll == b.roll:
        fields = tuple(lines.both(pair) for pair in zip(a.fields, b.fields, strict=True))
        return replace(a, fields=fields, blurred=a.blurred or b.blurred, extra=_extras(a, b),
                       guessed=a.guessed or b.guessed)  # fmt: skip
    if len(a.atoms(*AXES)) < len(b.atoms(*AXES)):
        a, b = b, a
    a, b = _reconciled(a, b)
    dims, lengths, roll = [], [0, 0], [0, 0]
    for d in range(n):
        dims.append(a.dims[d] if _rank(a, a.dims[d]) >= _rank(b, b.dims[d]) else b.dims[d])
    for k, axis in enumerate(AXES):  # one of the two counts the axis: the one with more of it
        owner = a if _positions(b, axis) <= _positions(a, axis) else b
        lengths[k], roll[k] = len(owner.fields[0][k]), owner.roll[k]
        other = b if owner is a else a
        if _positions(other, axis) and other.roll[k] != roll[k]:
            roll[k] = 0
        for d in range(n):
            if strides := [atom.stride for atom in along(owner.dims[d], axis)]:
                dims[d] = _restride(dims[d], axis, iter(strides))
    a, b = _lifted(a, tuple(dims), (lengths[0], lengths[1])), _lifted(b, tuple(dims), (lengths[0], lengths[1]))
    chosen = [along(dim, "c") for dim in dims]
    a, b = (s if s.classes is None or [along(dim, "c") for dim in s.dims] == chosen else merged(s) for s in (a, b))
    if a.classes and b.classes and len(a.classes) != len(b.classes):
        a, b = merged(a), merged(b)
    result = State(tuple(dims), a.fields, None, a.blurred or b.blurred, _extras(a, b), (roll[0], roll[1]),
                   a.guessed or b.guessed)  # fmt: skip
    if not a.classes and not b.classes:
        return replace(result, fields=(lines.both((*a.fields, *b.fields)),))
    count = len(a.classes or b.classes or ())
    pairs = list(zip(a.classes or (0,) * count, b.classes or (0,) * count, strict=True))
    number = {pair: k for k, pair in enumerate(dict.fromkeys(pairs))}
    fields = tuple(lines.both((a.fields[i], b.fields[j])) for i, j in number)
    return replace(result, fields=fields, classes=tuple(number[pair] for pair in pairs))


def _extras(a: State, b: State) -> tuple[Line, Line] | None:
    has = [any(isinstance(t, Tokens) for dim in s.dims for t in dim) for s in (a, b)]
    if not any(has):
        return None
    # A tensor without tokens of its own (a gate) reaches the class tokens with all it sees.
    parts = [s.extra if own else everything(s) for s, own in zip((a, b), has, strict=True)]
    known = [p for p in parts if p is not None]
    return lines.both(known) if known else None


def viewed(state: State, shape: Sequence[int]) -> State:
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


def fitted(state: State, shape: tuple[int, ...]) -> State:
    """Broadcast to a shape: missing dimensions in front, those of 1 grown."""
    state = replace(state, dims=((),) * (len(shape) - len(state.dims)) + state.dims)
    for d, size in enumerate(shape):
        if size_of(state.dims[d]) == 1 and size != 1:
            if state.axis_of(d):
                state = moved(state, d, lines.picked((0,) * size))
            else:
                kind = next((a.axis for a in atoms_of(state.dims[d])), "?")
                state = merged(state).with_dim(d, (Atom(kind, size, 0 if kind == "?" else 1),))
    return state


def padded(state: State, d: int, left: int, right: int, mode: str) -> State:
    if left < 0 or right < 0:
        size = size_of(state.dims[d])
        state = taken(state, d, range(max(0, -left), size - max(0, -right)))
        left, right = max(0, left), max(0, right)
    if not left and not right:
        return state
    dim = state.dims[d]
    both = len({a.axis for a in along(dim, *AXES)}) > 1
    if both and mode == "constant" and len(dim) == 1 and isinstance(dim[0], Tokens):
        return state.with_dim(d, (dim[0]._replace(prefix=dim[0].prefix + left, suffix=dim[0].suffix + right),))
    if both and mode == "constant" and all(isinstance(a, Atom) and a.axis in AXES for a in dim if a.size > 1):
        return state.with_dim(d, (Tokens(left, tuple(atoms_of(dim)), right),))
    size = size_of(dim)
    if not state.axis_of(d):
        state = replace(merged(state), blurred=True)
    return moved(state, d, lines.padded(size, left, right, mode))


def windowed(state: State, d: int, k: int, s: int, p: int, dilation: int, out: int) -> State:
    size = size_of(state.dims[d])
    if k == 1 and s == 1 and p == 0 and out == size:
        return state
    if len({a.axis for a in along(state.dims[d], *AXES)}) > 1:  # a window over flattened rows and columns
        return mix(state, [d], keep=False).inexact().with_dim(d, (Atom("?", out, 0),))
    return moved(state, d, lines.window(size, out, k, s, p, dilation))


def grouped(state: State, d: int, groups: int, out: int) -> State:
    """What a convolution does along its channels."""
    size = size_of(state.dims[d])
    dim = state.dims[d]
    if groups == 1:
        return mix(state, [d], keep=False).with_dim(d, (Atom("c", out),))
    if along(dim, *AXES):
        return mix(state, [d], keep=False).inexact().with_dim(d, (Atom("c", out),))
    if state.classes is None or not _own_classes(state, d):
        return merged(state).with_dim(d, (Atom("c", out),))
    offsets = lines.offsets((a.size, a.stride) for a in along(dim, "c"))
    seen = [state.fields[state.classes[u]] for u in offsets]
    each = size // groups
    fields = [lines.both(dict.fromkeys(seen[g * each : (g + 1) * each])) for g in range(groups)]
    return _with_classes(state, d, [fields[o * groups // out] for o in range(out)])


def concatenated(parts: list[tuple[State | None, int]], d: int) -> State:
    """parts: states, None for constants, with their sizes along d."""
    states = [s for s, _ in parts if s is not None]
    d %= len(states[0].dims)
    total = sum(size for _, size in parts)
    spatial = [s for s in states if along(s.dims[d], *AXES) or any(isinstance(a, Tokens) for a in s.dims[d])]
    if spatial and len({a.axis for s in spatial for a in along(s.dims[d], *AXES)}) > 1:
        return _concatenated_tokens(parts, d, spatial, total)
    if spatial or any(_is_axis(s, d) for s in states):
        return _concatenated_space(parts, d, states, total)
    kinds = {a.axis for s in states for a in atoms_of(s.dims[d])}
    others = reduce(joined, (merged(s).with_dim(d, ()) for s in states))
    if kinds & {"n", "f"}:
        return replace(others, blurred=True).with_dim(d, (Atom("n" if "n" in kinds else "f", total),))
    lengths = len(others.fields[0][0]), len(others.fields[0][1])
    channels: list[tuple[Line, Line]] = []
    blurred = False
    for state, size in parts:
        if state is None:
            channels += [(lines.nothing(lengths[0]), lines.nothing(lengths[1]))] * size
            continue
        if not _own_classes(state, d):
            state = merged(state)
        offsets = lines.offsets((a.size, a.stride) for a in along(state.dims[d], "c"))
        state = _lifted(_reconciled(others, state.with_dim(d, ()))[1], others.dims, lengths)
        blurred = blurred or state.blurred
        channels += [state.fields[state.classes[u]] for u in offsets] if state.classes else [state.fields[0]] * size
    if any(along(dim, "c") for dim in others.dims) and len(set(channels)) > 1:
        return replace(
            others.with_dim(d, (Atom("c", total),)), fields=(lines.both(dict.fromkeys(channels)),), blurred=True
        )
    return replace(_with_classes(others, d, channels), blurred=blurred)


def _own_classes(state: State, d: int) -> bool:
    """The classes of channels, if there are any, are those of dimension d."""
    channels = along(state.dims[d], "c")
    return state.classes is None or channels == state.atoms("c") == list(state.dims[d])


def _is_axis(state: State, d: int) -> bool:
    dim = state.dims[d]
    return not along(dim, "n", "c", "f", "?") and any(a.axis in AXES for a in atoms_of(dim))


def _concatenated_space(parts: list[tuple[State | None, int]], d: int, states: list[State], total: int) -> State:
    states = [anchored(merged(s), d) if _is_axis(s, d) or along(s.dims[d], *AXES) else s for s in states]
    axis = next(a.axis for s in states for a in s.dims[d] if isinstance(a, Atom) and a.axis in AXES)
    k = AXES.index(axis)
    if any(_positions(s, axis) - {d} for s in states) or any(
        a.axis != axis for s in states for a in atoms_of(s.dims[d]) if a.size > 1
    ):
        raise Lost
    across = [s.with_dim(d, ()) for s in states]  # along the other axis they are joined
    others = reduce(joined, (s.with_lines(axis, lines.total) for s in across))
    same = all(s.fields[0][1 - k] is states[0].fields[0][1 - k] for s in states)
    queue = iter(states)
    row = tuple(
        lines.spread(next(queue).fields[0][k], size) if state is not None else lines.nothing(size)
        for state, size in parts
    )
    fields = (lines.joined(row), others.fields[0][1]) if k == 0 else (others.fields[0][0], lines.joined(row))
    state = replace(others, fields=(fields,)).with_dim(d, (Atom(axis, total),))
    state = replace(state, blurred=any(s.blurred for s in states))
    return state if same else state.inexact()


def _concatenated_tokens(parts: list[tuple[State | None, int]], d: int, spatial: list[State], total: int) -> State:
    states = [merged(s) for s, _ in parts if s is not None]
    if len(spatial) > 1:
        mixed = [mix(s, [d], keep=False).inexact() for s in states]
        return reduce(joined, mixed).with_dim(d, (Atom("?", total, 0),))
    at = next(i for i, (s, _) in enumerate(parts) if s is spatial[0])
    main = merged(spatial[0])
    before, behind = (sum(size for _, size in side) for side in (parts[:at], parts[at + 1 :]))
    dim = main.dims[d]
    tokens = dim[0] if len(dim) == 1 and isinstance(dim[0], Tokens) else Tokens(0, tuple(atoms_of(dim)), 0)
    if tokens.size != size_of(dim) or any(a.axis not in AXES for a in tokens.atoms if a.size > 1):
        raise Lost
    extras = [everything(merged(s)) for s, _ in parts if s is not None and s is not spatial[0]]
    if main.extra:
        extras.append(main.extra)
    extra = lines.both(extras) if extras else None
    grown = Tokens(tokens.prefix + before, tokens.atoms, tokens.suffix + behind)
    alone = grown.prefix == grown.suffix == 0
    return replace(main.with_dim(d, grown.atoms if alone else (grown,)), extra=None if alone else extra)
