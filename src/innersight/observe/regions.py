"""What each operation makes of the part of a value that a patch of the picture can change: a table by its name.

Of a value that n patches change, only a `Crop` is held: a window for each patch, all of one size, wide enough for what
that patch changes; elsewhere it is as in the run without patches. A `Step` makes the crop of an operation's output from
those of its inputs. It has to be right for every element of the window, and the window has to hold everything that may
change: then nothing else has to be computed.

Nakandala, Kumar, Papakonstantinou, Incremental and Approximate Inference for Faster Occlusion-based Deep CNN
Explanations, SIGMOD 2019.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from innersight.observe import observer
from innersight.observe.observer import Const, Node, Ref
from innersight.observe.operations import refs

# From here on the window is given up: cutting and laying over costs more than computing the rest of the map.
FULL = 0.92


@dataclass(frozen=True, eq=False)
class Place:
    """Where rows and columns stand among a value's dimensions (the batch is the first), and the value without patches.

    shape: of one image, `(1, ...)`; rows: `(H * W, everything else)`, None where it is not needed
    """

    shape: tuple[int, ...]
    y: int
    x: int
    rows: torch.Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        return self.shape[self.y], self.shape[self.x]

    def flat(self, value: torch.Tensor) -> torch.Tensor:
        """`(n * h * w, everything else)` of a value, or of a window of it."""
        return value.movedim((self.y, self.x), (1, 2)).reshape(-1, math.prod(self.shape) // math.prod(self.size))

    def shaped(self, rows: torch.Tensor, n: int, size: Sequence[int]) -> torch.Tensor:
        """`flat`, undone."""
        rest = [s for d, s in enumerate(self.shape) if d not in (0, self.y, self.x)]
        return rows.view(n, *size, *rest).movedim((1, 2), (self.y, self.x))

    def fits(self, value: torch.Tensor, n: int, size: Sequence[int]) -> bool:
        """Whether this is a window of that size."""
        expected = list(self.shape)
        expected[0], expected[self.y], expected[self.x] = n, *size
        return list(value.shape) == expected


def stand_in(place: Place, n: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of the shape of n such values that takes no memory."""
    return torch.zeros((), dtype=dtype, device=device).expand(n, *place.shape[1:])


@dataclass(frozen=True, eq=False)
class Crop:
    """A window of a value for each of n patches: `data`, whose upper left corners are at `starts` `(n, 2)`.

    first, last: `(n, 2)`, rows and columns that the patch may change, `last` not among them; all inside the window
    """

    place: Place
    data: torch.Tensor
    starts: np.ndarray
    first: np.ndarray
    last: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        return self.data.shape[self.place.y], self.data.shape[self.place.x]

    def window(self, starts: np.ndarray, size: Sequence[int], outside: float | None = None) -> torch.Tensor:
        """Another window of the same value; `outside` is what stands beyond its borders."""
        if tuple(size) == self.size and np.array_equal(starts, self.starts):
            return self.data
        place, (h, w), n = self.place, self.size, len(starts)
        assert place.rows is not None
        parts = [place.rows, place.flat(self.data)]
        if outside is not None:
            parts.append(torch.full_like(place.rows[:1], outside))
        source = torch.cat(parts)
        # Each element is taken from the clean map, from the crop laid over it, or from the row of padding behind both.
        corner = torch.from_numpy(np.stack([starts, starts - self.starts], -1)).to(source.device)
        (y, cy), (x, cx) = (
            (corner[:, d, None] + torch.arange(length, device=source.device)[:, None]).unbind(-1)
            for d, length in enumerate(size)
        )
        patch = torch.arange(n, device=source.device)[:, None]
        inside = ((cy >= 0) & (cy < h))[:, :, None] & ((cx >= 0) & (cx < w))[:, None, :]
        laid_over = ((patch * h + cy) * w + len(place.rows))[:, :, None] + cx[:, None, :]
        index = torch.where(inside, laid_over, (y * place.size[1])[:, :, None] + x[:, None, :])
        if outside is not None:
            beyond = [(at < 0) | (at >= length) for at, length in zip((y, x), place.size, strict=True)]
            index[beyond[0][:, :, None] | beyond[1][:, None, :]] = len(source) - 1
        return place.shaped(source.index_select(0, index.view(-1)), n, size)

    def whole(self) -> torch.Tensor:
        """The whole value, `(n, ...)`."""
        return self.window(np.zeros_like(self.starts), self.place.size)


@dataclass(frozen=True, eq=False)
class Made:
    """What a step made: what the operation returns, with windows in the place of values."""

    out: Any
    starts: np.ndarray
    first: np.ndarray
    last: np.ndarray


def _around(first: np.ndarray, last: np.ndarray, length: Sequence[int]) -> tuple[np.ndarray, tuple[int, int]] | None:
    """Windows of one size, inside the map, around these rows and columns; None if that is nearly all of the map."""
    size = np.maximum((last - first).max(0), 1)
    if size.prod() > FULL * math.prod(length):
        return None
    return np.clip(first, 0, np.asarray(length) - size), (int(size[0]), int(size[1]))


class Now:
    """A call as it comes: the model's own arguments, and the crops of what they stand for."""

    def __init__(self, node: Node, func: Callable, args: tuple, kwargs: Mapping[str, Any], crops: Mapping[Ref, Crop],
                 weights: tuple[torch.Tensor, torch.Tensor | None] | None = None, own: bool = False):  # fmt: skip
        self.node = node
        self.func = func
        self.args = args
        self.kwargs = kwargs
        self.crops = crops
        self.weights = weights  # of a convolution, with the normalization behind it in them
        self.own = own  # whether what is written in place is nobody else's

    @property
    def crop(self) -> Crop:
        return next(iter(self.crops.values()))

    def arg(self, position: int, name: str) -> Any:
        return self.args[position] if position < len(self.args) else self.kwargs.get(name)

    def run(self, data: Mapping[Ref, torch.Tensor]) -> Any:
        """The call on windows in the place of values."""
        args, kwargs = substituted((self.node.args, self.node.kwargs), (self.args, self.kwargs), lambda r, _: data[r])
        return self.func(*args, **kwargs)


def substituted(frozen: Any, actual: Any, swap: Callable[[Ref, Any], Any]) -> Any:
    """A call's arguments with `swap(ref, argument)` for each that descends from the picture."""
    if isinstance(frozen, Ref):
        return swap(frozen, actual)
    if isinstance(frozen, dict):
        return {k: substituted(v, actual[k], swap) for k, v in frozen.items()}
    if isinstance(frozen, tuple) and isinstance(actual, (tuple, list)):
        items = [substituted(f, a, swap) for f, a in zip(frozen, actual, strict=True)]
        return observer.like(actual, items)
    return actual


# ---------------------------------------------------------------------------------------------------------------------
# Steps


class Step:
    """An operation on windows. As it stands, one that leaves rows and columns where they are: the call itself."""

    around = False  # whether it reads more of what it is given than the windows
    hands_on = False  # whether what it makes lies in the memory of what it reads

    def reach(self, _node: Node, first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows and columns that change, from those that change in what is read."""
        return first, last

    def __call__(self, now: Now) -> Made | None:
        """What the call makes of windows; None if they would be nearly all of the map, which is then better made."""
        crops = list(now.crops.values())
        first, last, starts, size = crops[0].first, crops[0].last, crops[0].starts, crops[0].size
        if len(crops) > 1:
            first, last = union((c.first, c.last) for c in crops)
            around = _around(first, last, crops[0].place.size)
            if around is None:
                return None
            starts, size = around
        data = {ref: crop.window(starts, size) for ref, crop in now.crops.items()}
        if not now.node.inplace:
            return Made(now.run(data), starts, first, last)
        target = now.node.args[0]
        if not now.own:
            data[target] = data[target].clone()  # windows may share memory where the values do not
        now.run(data)
        return Made(data[target], starts, first, last)


def union(reaches: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns that hold all of several."""
    firsts, lasts = zip(*reaches, strict=True)
    return reduce(np.minimum, firsts), reduce(np.maximum, lasts)


class _View(Step):
    """The same numbers in another shape, in which rows and columns stand at `y` and `x`."""

    hands_on = True

    def __init__(self, shape: tuple[int, ...], y: int, x: int):
        self.shape, self.y, self.x = shape, y, x

    def __call__(self, now: Now) -> Made:
        crop, shape = now.crop, list(self.shape)
        shape[0], shape[self.y], shape[self.x] = len(crop.starts), *crop.size
        return Made(crop.data.reshape(shape), crop.starts, crop.first, crop.last)


class _Window(Step):
    """Convolution and pooling: `k` taps `d` apart, every `s` units, from `p` before the first on; rows, then columns.

    compute: (call, the window that is read, with `outside` around the map, corners of what is made, its size) -> made
    """

    around = True

    def __init__(self, k: Sequence[int], s: Sequence[int], p: Sequence[int], d: Sequence[int], outside: float,
                 compute: Callable[[Now, torch.Tensor, np.ndarray, Sequence[int]], torch.Tensor]):  # fmt: skip
        self.s, self.p = np.asarray(s), np.asarray(p)
        self.span = (np.asarray(k) - 1) * np.asarray(d)
        self.outside = outside
        self.compute = compute

    def reach(self, node: Node, first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        length = node.shape[-2:]
        begin = np.clip(-((self.span - self.p - first) // self.s), 0, length)
        return begin, np.clip((last - 1 + self.p) // self.s + 1, begin, length)  # a stride may step over the patch

    def __call__(self, now: Now) -> Made | None:
        crop = now.crop
        first, last = self.reach(now.node, crop.first, crop.last)
        around = _around(first, last, now.node.shape[-2:])
        if around is None:
            return None
        starts, size = around
        read = (np.asarray(size) - 1) * self.s + self.span + 1
        window = crop.window(starts * self.s - self.p, (int(read[0]), int(read[1])), self.outside)
        return Made(self.compute(now, window, starts, size), starts, first, last)


class _Shift(Step):
    """Padding: the window lies further down and to the right."""

    hands_on = True

    def __init__(self, top: int, left: int):
        self.by = np.asarray([top, left])

    def reach(self, _node: Node, first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return first + self.by, last + self.by

    def __call__(self, now: Now) -> Made:
        crop = now.crop
        return Made(crop.data, crop.starts + self.by, *self.reach(now.node, crop.first, crop.last))


# ---------------------------------------------------------------------------------------------------------------------
# Which step an operation is

Axes = tuple[int, int]  # where rows and columns stand
Found = tuple[Step, list[Axes]]
RULES: dict[str, Callable[[_Call], Found | None]] = {}


class _Call:
    """A node with the places of what it reads."""

    def __init__(self, node: Node, place: Callable[[Ref], Place]):
        self.node = node
        self.refs = list(dict.fromkeys(refs((node.args, node.kwargs))))
        self.places = [place(ref) for ref in self.refs]
        self.place = self.places[0]

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        return self.node.args[position] if position < len(self.node.args) else self.node.kwargs.get(name, default)

    def ints(self, position: int, name: str) -> tuple[int, ...]:
        """Numbers given one by one or as one list."""
        value = self.arg(position, name)
        if isinstance(value, int) and position < len(self.node.args):
            return tuple(v for v in self.node.args[position:] if isinstance(v, int))
        return (value,) if isinstance(value, int) else tuple(value)

    def reads_one(self) -> bool:
        """Whether the first argument alone descends from the picture."""
        return self.refs == [self.arg(0, "input", self.node.kwargs.get("self"))]

    def along(self, *mixed: int, order: Sequence[int | None] | None = None) -> Found | None:
        """The call itself on windows, if dimensions `mixed` are neither rows nor columns nor the batch.

        order: for each dimension of what is made the one that it was before, None for a new one
        """
        place = self.place
        order = list(range(len(place.shape))) if order is None else list(order)
        if {d % len(place.shape) for d in mixed} & {0, place.y, place.x} or order[0] != 0:
            return None
        return Step(), [(order.index(place.y), order.index(place.x))] * len(self.node.shapes)


def find(node: Node, place: Callable[[Ref], Place]) -> Found | None:
    """How to follow a node whose inputs all have a place, and where rows and columns stand in what it makes.

    None: not at all; it looks all over the map, or is not known.
    """
    rule = RULES.get(node.op)
    if rule is None or (node.inplace and (rule not in _IN_PLACE or "out" in node.kwargs or not node.args)):
        return None
    try:
        return rule(_Call(node, place))
    except Exception:  # the arguments are another library's calls, in any form torch takes
        return None


def _rule(*names: str) -> Callable[[Callable], Callable]:
    def register(rule: Callable[[_Call], Found | None]) -> Callable[[_Call], Found | None]:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def _constants(value: Any) -> list[Const]:
    if isinstance(value, Const):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    return [c for item in items for c in _constants(item)]


def _pair(value: Any) -> tuple[int, int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values[0], values[-1]


@_rule(*"""
    add sub mul div pow rsub neg abs relu relu6 leaky_relu elu selu celu gelu silu mish hardswish hardsigmoid
    hardtanh sigmoid tanh tanhshrink hardshrink softshrink softsign softplus logsigmoid log_sigmoid threshold exp exp2
    expm1 log log1p log2 log10 sqrt rsqrt square reciprocal sin cos tan atan sinh cosh erf sign clamp clip clamp_min
    clamp_max floor ceil round trunc frac remainder fmod lerp addcmul addcdiv where maximum minimum fmax fmin hypot
    atan2 masked_fill eq ne lt le gt ge logical_and logical_or logical_not isnan isfinite nan_to_num floordiv
    floor_divide true_divide multiply subtract divide logit xlogy and or copysign positive
    contiguous clone to float double half bfloat16 type type_as cpu cuda detach alias data
    """.split())  # fmt: skip
def _elementwise(call: _Call) -> Found | None:
    node, place, n = call.node, call.place, len(call.node.shape)
    if any((len(p.shape), p.y, p.x, p.size) != (n, place.y, place.x, place.size) for p in call.places):
        return None
    for constant in _constants((node.args, node.kwargs)):
        shape = (1,) * (n - len(constant.shape)) + constant.shape
        if len(shape) != n or (shape[place.y], shape[place.x]) != (1, 1):
            return None  # other values at other rows and columns
    return None if node.inplace and not isinstance(node.args[0], Ref) else call.along()


@_rule("exact")
def _exact(call: _Call) -> Found | None:
    """Integers in the place of their float twin, if each is made of what stands in its own place."""
    return _elementwise(call) if getattr(call.arg(1, "compute"), "pointwise", False) else None


@_rule("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "feature_dropout")
def _dropout(call: _Call) -> Found | None:
    return _elementwise(call) if call.arg(2, "training", True) is False else None


_IN_PLACE = (_elementwise, _dropout)


@_rule("batch_norm")
def _batch_norm(call: _Call) -> Found | None:
    return call.along(1) if call.reads_one() and not call.arg(5, "training", False) else None


@_rule("prelu", "local_response_norm", "channel_shuffle", "native_channel_shuffle")
def _over_channels(call: _Call) -> Found | None:
    return call.along(1) if call.reads_one() else None


@_rule("layer_norm", "rms_norm")
def _layer_norm(call: _Call) -> Found | None:
    return call.along(*range(-len(call.arg(1, "normalized_shape")), 0)) if call.reads_one() else None


@_rule("linear")
def _linear(call: _Call) -> Found | None:
    return call.along(-1) if call.reads_one() else None


@_rule("softmax", "log_softmax", "normalize", "glu", "cumsum")
def _along_one(call: _Call) -> Found | None:
    position, default = {"normalize": (2, 1), "glu": (1, -1)}.get(call.node.op, (1, None))
    return call.along(call.arg(position, "dim", default)) if call.reads_one() else None


@_rule("max", "min", "mean", "sum", "amax", "amin", "std", "var", "logsumexp", "norm")
def _reduced(call: _Call) -> Found | None:
    dims = call.arg(2 if call.node.op == "norm" else 1, "dim")
    dims = (dims,) if isinstance(dims, int) else dims
    if not call.reads_one() or isinstance(dims, bool) or not dims:
        return None
    n = len(call.place.shape)
    kept = len(call.node.shape) == n
    left = [d for d in range(n) if kept or d not in {e % n for e in dims}]
    return call.along(*dims, order=left)


@_rule("cat", "concat", "concatenate")
def _cat(call: _Call) -> Found | None:
    parts, place = call.arg(0, "tensors"), call.place
    if not all(isinstance(p, Ref) for p in parts):
        return None
    if any((p.y, p.x, p.size) != (place.y, place.x, place.size) for p in call.places):
        return None
    return call.along(call.arg(1, "dim", 0))


@_rule("chunk", "split", "tensor_split", "split_with_sizes")
def _split(call: _Call) -> Found | None:
    return call.along(call.arg(2, "dim", 0)) if call.reads_one() else None


@_rule("narrow", "index_select")
def _taken(call: _Call) -> Found | None:
    return call.along(call.arg(1, "dim")) if call.reads_one() else None


@_rule("select", "unbind")
def _one_of(call: _Call) -> Found | None:
    dim = call.arg(1, "dim", 0) % len(call.place.shape)
    return call.along(dim, order=[d for d in range(len(call.place.shape)) if d != dim]) if call.reads_one() else None


@_rule("getitem")
def _getitem(call: _Call) -> Found | None:
    given = call.arg(1, "index")
    index = list(given) if isinstance(given, tuple) else [given]
    shape = call.place.shape
    known = all(i is None or i is Ellipsis or (isinstance(i, (int, slice)) and not isinstance(i, bool)) for i in index)
    if not call.reads_one() or not known:
        return None
    taken = sum(isinstance(i, (int, slice)) for i in index)
    at = index.index(Ellipsis) if Ellipsis in index else len(index)
    index[at : at + 1] = [slice(None)] * (len(shape) - taken)
    order: list[int | None] = []
    mixed, d = [], 0
    for i in index:
        if i is None:
            order.append(None)
            continue
        if isinstance(i, slice):
            order.append(d)
        if not isinstance(i, slice) or i.indices(shape[d]) != (0, shape[d], 1):
            mixed.append(d)
        d += 1
    return call.along(*mixed, order=order)


@_rule("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis")
def _permuted(call: _Call) -> Found | None:
    n = len(call.place.shape)
    numbered = np.empty(range(n))  # each dimension as long as its number
    if call.node.op == "permute":
        order = numbered.transpose(call.ints(1, "dims")).shape
    elif call.node.op in ("movedim", "moveaxis"):
        order = np.moveaxis(numbered, call.arg(1, "source"), call.arg(2, "destination")).shape
    else:
        a, b = (call.arg(i, f"dim{i - 1}", call.node.kwargs.get(f"axis{i - 1}")) for i in (1, 2))
        order = numbered.swapaxes(a, b).shape
    return call.along(order=order) if call.reads_one() else None


@_rule("unsqueeze")
def _unsqueezed(call: _Call) -> Found | None:
    n = len(call.place.shape)
    order: list[int | None] = list(range(n))
    order.insert(call.arg(1, "dim") % (n + 1), None)
    return call.along(order=order) if call.reads_one() else None


@_rule("squeeze")
def _squeezed(call: _Call) -> Found | None:
    n = len(call.place.shape)
    gone = {d % n for d in call.ints(1, "dim")}
    if gone & {call.place.y, call.place.x}:
        return None
    return call.along(order=[d for d in range(n) if d not in gone or call.place.shape[d] != 1])


@_rule("view", "reshape", "flatten", "unflatten", "_unsafe_view")
def _viewed(call: _Call) -> Found | None:
    """Rows and columns must be kept apart from everything else."""
    shape, place = call.node.shape, call.place
    found: list[int] = []
    for d in (place.y, place.x):
        before = math.prod(place.shape[:d])
        at = (e for e in range(1, len(shape)) if e not in found)
        found.append(next(e for e in at if shape[e] == place.shape[d] and math.prod(shape[:e]) == before))
    if not call.reads_one() or shape[0] != 1 or isinstance(call.arg(1, "dtype"), torch.dtype):
        return None
    return _View(shape, *found), [(found[0], found[1])]


def _is_map(call: _Call) -> bool:
    """(N, C, H, W), read and made."""
    place = call.place
    return call.reads_one() and (len(place.shape), place.y, place.x, len(call.node.shapes)) == (4, 2, 3, 1)


@_rule("conv2d", "convolution")
def _convolution(call: _Call) -> Found | None:
    at = [3, 4, 5, 8] if call.node.op == "convolution" else [3, 4, 5, 6]
    names = [("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1)]
    stride, padding, dilation, groups = (call.arg(i, *name) for i, name in zip(at, names, strict=True))
    if not _is_map(call) or (call.node.op == "convolution" and call.arg(6, "transposed")):
        return None
    kernel, stride, dilation = call.arg(1, "weight").shape[2:], _pair(stride), _pair(dilation)
    if padding == "same":
        padding = [(k - 1) * d // 2 for k, d in zip(kernel, dilation, strict=True)]
    padding = (0, 0) if padding == "valid" else _pair(padding)

    def compute(now: Now, window: torch.Tensor, _starts: np.ndarray, _size: Sequence[int]) -> torch.Tensor:
        weight, bias = now.weights or (now.arg(1, "weight"), now.arg(2, "bias"))
        return F.conv2d(window, weight, bias, stride, 0, dilation, groups)

    return _Window(kernel, stride, padding, dilation, 0.0, compute), [(2, 3)]


@_rule("max_pool2d")
def _max_pool(call: _Call) -> Found | None:
    kernel = _pair(call.arg(1, "kernel_size"))
    stride = _pair(call.arg(2, "stride") or kernel)
    padding, dilation = _pair(call.arg(3, "padding", 0)), _pair(call.arg(4, "dilation", 1))

    def compute(_now: Now, window: torch.Tensor, _starts: np.ndarray, _size: Sequence[int]) -> torch.Tensor:
        return F.max_pool2d(window, kernel, stride, 0, dilation)

    return (_Window(kernel, stride, padding, dilation, -math.inf, compute), [(2, 3)]) if _is_map(call) else None


@_rule("avg_pool2d")
def _avg_pool(call: _Call) -> Found | None:
    kernel = _pair(call.arg(1, "kernel_size"))
    stride, padding = _pair(call.arg(2, "stride") or kernel), _pair(call.arg(3, "padding", 0))
    options = call.arg(4, "ceil_mode", False), call.arg(5, "count_include_pad", True)
    # What each unit's sum is divided by; at the borders that depends on what counts.
    ones = torch.ones(1, 1, *call.place.size, dtype=torch.float64)
    mean, count = (F.avg_pool2d(ones, kernel, stride, padding, *options, divisor)
                   for divisor in (call.arg(6, "divisor_override"), 1))  # fmt: skip
    share = (mean / count)[0, 0]

    def compute(_now: Now, window: torch.Tensor, starts: np.ndarray, size: Sequence[int]) -> torch.Tensor:
        y, x = (torch.from_numpy(starts[:, d, None] + np.arange(size[d])) for d in (0, 1))
        total = F.avg_pool2d(window, kernel, stride, divisor_override=1)
        return total * share[y[:, :, None], x[:, None, :]][:, None].to(total)

    return (_Window(kernel, stride, padding, (1, 1), 0.0, compute), [(2, 3)]) if _is_map(call) else None


@_rule("adaptive_avg_pool2d", "adaptive_max_pool2d")
def _adaptive_pool(call: _Call) -> Found | None:
    """Where every unit reads as many rows and columns as the next."""
    sizes = list(zip(call.place.size, call.node.shape[-2:], strict=True))
    kernel = [size // units for size, units in sizes]
    pool = F.avg_pool2d if call.node.op == "adaptive_avg_pool2d" else F.max_pool2d

    def compute(_now: Now, window: torch.Tensor, _starts: np.ndarray, _size: Sequence[int]) -> torch.Tensor:
        return pool(window, kernel, kernel)

    if not _is_map(call) or any(size % units or units == 1 < size for size, units in sizes):
        return None
    return _Window(kernel, kernel, (0, 0), (1, 1), 0.0, compute), [(2, 3)]


@_rule("pad", "constant_pad_nd")
def _padded(call: _Call) -> Found | None:
    """With a constant, around rows and columns."""
    place, widths = call.place, tuple(call.arg(1, "pad"))
    constant = call.node.op == "constant_pad_nd" or call.arg(2, "mode", "constant") == "constant"
    if not call.reads_one() or not constant or min(widths) < 0:
        return None
    by = {len(place.shape) - 1 - i // 2: widths[i] for i in range(0, len(widths), 2) if any(widths[i : i + 2])}
    if set(by) - {place.y, place.x}:
        return None
    return _Shift(by.get(place.y, 0), by.get(place.x, 0)), [(place.y, place.x)]
