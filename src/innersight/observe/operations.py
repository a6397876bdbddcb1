"""What each operation makes of the dimensions and lines of the tensors that it reads: a table of rules, by its name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import reduce
from typing import TYPE_CHECKING, Any

from innersight.observe import lines
from innersight.observe.dimensions import (
    AXES,
    Atom,
    State,
    along,
    atoms_of,
    concatenated,
    everything,
    fitted,
    grouped,
    joined,
    merged,
    mix,
    moved,
    padded,
    size_of,
    taken,
    viewed,
    windowed,
)
from innersight.observe.lines import Lost
from innersight.observe.observer import Const, Ref

if TYPE_CHECKING:
    from innersight.observe.observer import Node

Rule = Callable[["Call"], "State | list[State]"]
RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
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
        return [self._state(r) for r in refs((self.node.args, self.node.kwargs))]

    def shape(self, value: Any) -> tuple[int, ...]:
        return self._state(value).shape if isinstance(value, Ref) else value.shape

    def ints(self, position: int, name: str) -> tuple[int, ...]:
        """Numbers given one by one or as one list."""
        value = self.arg(position, name)
        if isinstance(value, int) and position < len(self.node.args):
            return tuple(v for v in self.node.args[position:] if isinstance(v, int))
        return (value,) if isinstance(value, int) else tuple(value)


def refs(value: Any) -> Iterator[Ref]:
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from refs(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from refs(item)


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
    return fitted(reduce(joined, states), call.node.shape)


@_rule(*"""
    contiguous clone to float double half bfloat16 int long bool type type_as cpu cuda detach alias data real
    requires_grad lift_fresh _to_copy exact
    """.split())  # fmt: skip
def _same(call: Call) -> State:
    """The tensor itself (another one, if given, lends its type alone); integers see what their float twin sees."""
    return call.state()


@_rule("copy")
def _copy(call: Call) -> State:
    return fitted(call.state(1, "src"), call.node.shape)


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
    state = mix(state, chosen, keep=False)
    if len(call.node.shape) < n:
        state = replace(state, dims=tuple(dim for d, dim in enumerate(state.dims) if d not in chosen))
    else:  # a row of units was made one unit of that row
        before = call.state()
        kinds = {d: {a.axis for a in atoms_of(before.dims[d])} for d in chosen}
        state = replace(state, dims=tuple(
            (Atom(next(iter(kinds[d])), 1),) if d in kinds and len(kinds[d]) == 1 else dim
            for d, dim in enumerate(state.dims)))  # fmt: skip
    return [state] * len(call.node.shapes)


@_rule("softmax", "log_softmax", "softmin", "_softmax", "gumbel_softmax")
def _softmax(call: Call) -> State:
    state = call.state()
    dim = call.arg(3 if call.node.op == "gumbel_softmax" else 1, "dim")
    return mix(state, [dim if dim is not None else 1 if len(state.dims) in (2, 4) else 0], keep=True)


@_rule("normalize")
def _normalized(call: Call) -> State:
    return mix(call.state(), _tuple(call.arg(2, "dim", 1), 1), keep=True)


@_rule("layer_norm", "rms_norm", "native_layer_norm")
def _layer_norm(call: Call) -> State:
    state = call.state()
    return mix(state, range(-len(_tuple(call.arg(1, "normalized_shape"), 1)), 0), keep=True)


@_rule("batch_norm")
def _batch_norm(call: Call) -> State:
    state = call.state()
    if not call.arg(5, "training", False):
        return state
    return mix(state, [d for d in range(len(state.dims)) if d != 1], keep=True)


@_rule("instance_norm")
def _instance_norm(call: Call) -> State:
    state = call.state()
    return mix(state, range(2, len(state.dims)), keep=True) if call.arg(5, "use_input_stats", True) else state


@_rule("group_norm")
def _group_norm(call: Call) -> State:
    state = call.state()
    return mix(state, range(1, len(state.dims)), keep=True)


@_rule("local_response_norm")
def _local_response_norm(call: Call) -> State:
    return merged(call.state())


@_rule("conv1d", "conv2d", "conv3d", "convolution")
def _conv(call: Call) -> State:
    state = call.state()
    if isinstance(weight := call.arg(1, "weight"), Ref):
        state = weighted(state, call._state(weight))
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
    if size_of(state.dims[first - 1]) != shape[1] * groups:
        raise Lost
    state = grouped(state, first - 1, groups, shape[0])
    for i in range(n):
        out = call.node.shape[first + i]
        state = windowed(state, first + i, shape[2 + i], strides[i], paddings[i], dilations[i], out)
    return state


def weighted(state: State, weight: State) -> State:
    """Weights that were made of the picture: everything they saw counts everywhere."""
    return state.seeing_too(everything(merged(weight)))


@_rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transposed(call: Call) -> State:
    state = call.state()
    if isinstance(weight := call.arg(1, "weight"), Ref):
        state = weighted(state, call._state(weight))
    shape = call.shape(weight)
    n = len(shape) - 2
    strides, paddings = _tuple(call.arg(3, "stride", 1), n), _tuple(call.arg(4, "padding", 0), n)
    groups, dilations = call.arg(6, "groups", 1), _tuple(call.arg(7, "dilation", 1), n)
    first = len(state.dims) - n
    state = grouped(state, first - 1, groups, shape[1] * groups)
    for i in range(n):
        size, out = size_of(state.dims[first + i]), call.node.shape[first + i]
        reads = lines.transposed(size, out, shape[2 + i], strides[i], paddings[i], dilations[i])
        state = moved(state, first + i, reads)
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
        state = windowed(state, first + i, kernels[i], strides[i], paddings[i], dilations[i], out)
    return [state] * len(call.node.shapes)


@_rule("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d",
       "adaptive_max_pool2d", "adaptive_max_pool3d", "_adaptive_avg_pool2d")  # fmt: skip
def _adaptive_pool(call: Call) -> list[State]:
    state = call.state()
    n = int(call.node.op[-2])
    for d in range(len(state.dims) - n, len(state.dims)):
        size, out = size_of(state.dims[d]), call.node.shape[d]
        if size == out:
            continue
        if len({a.axis for a in along(state.dims[d], *AXES)}) > 1:  # over tokens
            state = mix(state, [d], keep=False)
            state = (state if out == 1 else state.inexact()).with_dim(d, (Atom("?", out, 0),))
            continue
        reads = lines.adaptive(size, out)
        state = moved(state, d, reads)
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
        size, out = size_of(state.dims[d]), call.node.shape[d]
        if mode == "area":
            reads = lines.adaptive(size, out)
        else:
            scale = Fraction(size, out)
            if corners:
                scale = Fraction(size - 1, out - 1) if out > 1 else Fraction(0)
            elif keep_scale:
                factor = scales if isinstance(scales, (int, float)) else scales[i]
                scale = 1 / Fraction(factor).limit_denominator(4096)
            reads = lines.interpolated(size, out, mode, corners, scale, bool(call.arg(6, "antialias", False)))
        state = moved(state, d, reads)
    return state


@_rule("pad", "constant_pad_nd")
def _pad(call: Call) -> State:
    state = call.state()
    widths = call.arg(1, "pad")
    mode = "constant" if call.node.op == "constant_pad_nd" else call.arg(2, "mode", "constant")
    for i in range(len(widths) // 2):
        state = padded(state, len(state.dims) - 1 - i, widths[2 * i], widths[2 * i + 1], mode)
    return state


@_rule("roll")
def _roll(call: Call) -> State:
    state = call.state()
    shifts, dims = call.arg(1, "shifts"), call.arg(2, "dims")
    if dims is None or dims == ():
        raise Lost
    for shift, dim in zip(_tuple(shifts, 1), _tuple(dims, 1), strict=True):
        d = dim % len(state.dims)
        size = size_of(state.dims[d])
        if shift % size == 0:
            continue
        reads = replace(lines.picked(tuple((i - shift) % size for i in range(size))), exact=False)
        state = moved(state, d, reads, roll=shift)
    return state


@_rule("flip", "fliplr", "flipud")
def _flip(call: Call) -> State:
    state = call.state()
    dims = {"fliplr": (1,), "flipud": (0,)}.get(call.node.op) or call.ints(1, "dims")
    for dim in dims:
        state = taken(state, dim % len(state.dims), range(size_of(state.dims[dim]) - 1, -1, -1))
    return state


# -- the same numbers in another order


@_rule("view", "reshape", "flatten", "unflatten", "ravel", "view_as", "reshape_as", "_unsafe_view", "unsafe_view")
def _view(call: Call) -> State:
    state = call.state()
    return state if state.shape == call.node.shape else viewed(state, call.node.shape)


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
        dim for d, dim in enumerate(state.dims) if d not in dims or size_of(dim) != 1))  # fmt: skip


@_rule("unsqueeze")
def _unsqueeze(call: Call) -> State:
    state = call.state()
    d = call.arg(1, "dim") % (len(state.dims) + 1)
    return replace(state, dims=(*state.dims[:d], (), *state.dims[d:]))


@_rule("expand", "expand_as", "broadcast_to")
def _expand(call: Call) -> State:
    return fitted(call.state(), call.node.shape)


@_rule("repeat", "tile")
def _repeat(call: Call) -> State:
    state = call.state()
    times = call.ints(1, "repeats" if call.node.op == "repeat" else "dims")
    state = replace(state, dims=((),) * (len(times) - len(state.dims)) + state.dims)
    times = (1,) * (len(state.dims) - len(times)) + times
    for d, k in enumerate(times):
        size = size_of(state.dims[d])
        if k == 1:
            continue
        if size == 1:
            grown = tuple(s if e != d else k for e, s in enumerate(state.shape))
            state = fitted(state, grown)
        else:
            reads = lines.picked(tuple(range(size)) * k)
            state = moved(state, d, reads)
    return state


@_rule("repeat_interleave")
def _repeat_interleave(call: Call) -> State:
    state = call.state()
    times, dim = call.arg(1, "repeats"), call.arg(2, "dim")
    if not isinstance(times, int) or dim is None:
        raise Lost
    d = dim % len(state.dims)
    size = size_of(state.dims[d])
    return moved(state, d, lines.picked(tuple(i for i in range(size) for _ in range(times))))


@_rule("chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split", "unbind")
def _split(call: Call) -> list[State]:
    state = call.state()
    d = call.arg(1, "dim", 0) if call.node.op == "unbind" else call.arg(2, "dim", 0)
    d %= len(state.dims)
    parts: list[State] = []
    begin = 0
    for shape in call.node.shapes:
        size = 1 if call.node.op == "unbind" else shape[d]
        part = taken(state, d, range(begin, begin + size))
        parts.append(_without(part, d) if call.node.op == "unbind" else part)
        begin += size
    if begin != size_of(state.dims[d]):
        raise Lost
    return parts


def _without(state: State, d: int) -> State:
    """One unit of dimension d was chosen; the dimension goes."""
    return replace(state, dims=state.dims[:d] + state.dims[d + 1 :])


@_rule("select")
def _select(call: Call) -> State:
    state = call.state()
    d = call.arg(1, "dim") % len(state.dims)
    i = call.arg(2, "index") % size_of(state.dims[d])
    return _without(taken(state, d, range(i, i + 1)), d)


@_rule("narrow", "slice")
def _narrow(call: Call) -> State:
    state = call.state()
    d = call.arg(1, "dim", 0) % len(state.dims)
    size = size_of(state.dims[d])
    if call.node.op == "slice":
        chosen = range(size)[slice(call.arg(2, "start"), call.arg(3, "end"), call.arg(4, "step", 1))]
    else:
        begin = call.arg(2, "start") % size
        chosen = range(begin, begin + call.arg(3, "length"))
    return taken(state, d, chosen)


@_rule("index_select")
def _index_select(call: Call) -> State:
    state = call.state()
    d = call.arg(1, "dim") % len(state.dims)
    return _chosen(state, d, call.node.shape[d])


def _chosen(state: State, d: int, count: int) -> State:
    """Units of dimension d that are known at run time only."""
    mixed = mix(state, [d], keep=False).inexact()
    kinds = {a.axis for a in atoms_of(state.dims[d])}
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
        size = size_of(state.dims[d])
        if isinstance(item, bool):
            raise Lost
        if isinstance(item, int):
            state = _without(taken(state, d, range(size)[item : item + 1 or None]), d)
            cut.append(at)
        elif isinstance(item, slice):
            chosen = range(size)[item]
            if chosen != range(size):
                cut.append(at)
            state = taken(state, d, chosen)
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
        return merged(base).inexact()
    target, cut = _indexed(base, call.arg(1, "index"))
    flat = all(not along(base.dims[d], *AXES) for d in cut) and len(target.dims) == len(base.dims)
    if flat and len(value.dims) <= len(base.dims):
        value = replace(value, dims=((),) * (len(base.dims) - len(value.dims)) + value.dims)
        dims = tuple(() if d in cut else dim for d, dim in enumerate(value.dims))
        return replace(joined(merged(base), replace(merged(value), dims=dims)), blurred=True)
    return weighted(merged(base), value).inexact()


@_rule("cat", "concat", "concatenate")
def _cat(call: Call) -> State:
    tensors = call.arg(0, "tensors")
    d = call.arg(1, "dim", call.node.kwargs.get("axis", 0))
    n = len(call.node.shape)
    tensors = [t for t in tensors if len(call.shape(t)) == n]  # an empty tensor of one dimension is allowed
    return concatenated([(call._state(t) if isinstance(t, Ref) else None, call.shape(t)[d]) for t in tensors], d % n)


@_rule("stack")
def _stack(call: Call) -> State:
    n = len(call.node.shape)
    d = call.arg(1, "dim", 0) % n

    def grown(state: State) -> State:
        return replace(state, dims=(*state.dims[:d], (), *state.dims[d:]))

    tensors = call.arg(0, "tensors")
    return concatenated([(grown(call._state(t)) if isinstance(t, Ref) else None, 1) for t in tensors], d)


@_rule("glu")
def _glu(call: Call) -> State:
    state = call.state()
    d = call.arg(1, "dim", -1) % len(state.dims)
    half = size_of(state.dims[d]) // 2
    return joined(taken(state, d, range(half)), taken(state, d, range(half, 2 * half)))


@_rule("pixel_shuffle")
def _pixel_shuffle(call: Call) -> State:
    state = call.state()
    *lead, c, h, w = state.shape
    r, n = call.arg(1, "upscale_factor"), len(lead)
    parts = viewed(state, (*lead, c // r**2, r, r, h, w))
    order = (*range(n), *(n + i for i in (0, 3, 1, 4, 2)))
    return viewed(_permuted(parts, order), call.node.shape)


@_rule("pixel_unshuffle")
def _pixel_unshuffle(call: Call) -> State:
    state = call.state()
    *lead, c, h, w = state.shape
    r, n = call.arg(1, "downscale_factor"), len(lead)
    parts = viewed(state, (*lead, c, h // r, r, w // r, r))
    order = (*range(n), *(n + i for i in (0, 2, 4, 1, 3)))
    return viewed(_permuted(parts, order), call.node.shape)


@_rule("channel_shuffle")
def _channel_shuffle(call: Call) -> State:
    state = call.state()
    n, c, *rest = state.shape
    groups = call.arg(1, "groups")
    parts = viewed(state, (n, groups, c // groups, *rest))
    return viewed(_permuted(parts, (0, 2, 1, *range(3, len(rest) + 3))), state.shape)


@_rule("unfold", "im2col")
def _unfold(call: Call) -> State:
    state = call.state()
    if call.node.op == "unfold" and len(call.node.shape) == len(state.dims) + 1:  # Tensor.unfold(dimension, size, step)
        d, size, step = call.arg(1, "dimension") % len(state.dims), call.arg(2, "size"), call.arg(3, "step")
        state = windowed(state, d, size, step, 0, 1, call.node.shape[d])
        return replace(merged(state), dims=(*state.dims, (Atom("c", size),)), blurred=True)
    kernels, dilations = _tuple(call.arg(1, "kernel_size"), 2), _tuple(call.arg(2, "dilation", 1), 2)
    paddings, strides = _tuple(call.arg(3, "padding", 0), 2), _tuple(call.arg(4, "stride", 1), 2)
    state = merged(state)
    for i, d in enumerate((-2, -1)):
        size = size_of(state.dims[d])
        out = (size + 2 * paddings[i] - dilations[i] * (kernels[i] - 1) - 1) // strides[i] + 1
        at = len(state.dims) + d
        state = windowed(state, at, kernels[i], strides[i], paddings[i], dilations[i], out)
    *lead, _, y, x = state.dims
    return replace(state, dims=(*lead, (Atom("c", call.node.shape[-2]),), (*y, *x)), blurred=True)


@_rule("fold", "col2im")
def _fold(call: Call) -> State:
    state = merged(call.state())
    outs = call.node.shape[-2:]
    kernels, dilations = _tuple(call.arg(2, "kernel_size"), 2), _tuple(call.arg(3, "dilation", 1), 2)
    paddings, strides = _tuple(call.arg(4, "padding", 0), 2), _tuple(call.arg(5, "stride", 1), 2)
    sizes = [
        (outs[i] + 2 * paddings[i] - dilations[i] * (kernels[i] - 1) - 1) // strides[i] + 1 for i in range(2)
    ]  # fmt: skip
    if along(state.dims[-2], *AXES):
        raise Lost
    if state.blurred:  # each tap takes channels of its own
        state = state.inexact()
    lead = state.shape[:-2]
    state = mix(state, [len(state.dims) - 2], keep=False)
    state = viewed(state, (*lead, 1, *sizes))
    state = state.with_dim(len(lead), (Atom("c", call.node.shape[-3]),))
    for i in range(2):
        d = len(lead) + 1 + i
        reads = lines.transposed(sizes[i], outs[i], kernels[i], strides[i], paddings[i], dilations[i])
        state = moved(state, d, reads)
    return state


# -- products


@_rule("linear")
def _linear(call: Call) -> State:
    state = call.state()
    if isinstance(weight := call.arg(1, "weight"), Ref):
        state = weighted(state, call._state(weight))
    last = len(state.dims) - 1
    return mix(state, [last], keep=False).with_dim(last, (Atom("c", call.node.shape[-1]),))


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
        state = mix(state, gone, keep=False)
        place = dict(zip(names, state.dims, strict=True))
        parts.append(replace(state, dims=tuple(place.get(name, ()) for name in out)))
    state = reduce(joined, parts)
    for d, size in enumerate(shape):  # what came from a constant alone, or from the other side's units
        if size_of(state.dims[d]) != size:
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
    return state if bias is None else fitted(joined(state, bias), call.node.shape)


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
        parts.append(mix(query, [n - 1], keep=False))
    if key is not None:
        parts.append(mix(key, [n - 2, n - 1], keep=False))
    if value is not None:
        parts.append(mix(value, [n - 2], keep=False))
    if isinstance(mask, Ref):
        parts.append(mix(call.state(3, "attn_mask"), [-1], keep=False))
    state = fitted(reduce(joined, parts), call.node.shape)
    if value is None:
        state = state.with_dim(n - 1, (Atom("c", call.node.shape[-1]),))
    return state.inexact() if limited else state


@_rule("multi_head_attention_forward")
def _multi_head(call: Call) -> list[State]:
    query, key, value = (call.either(i, name) for i, name in enumerate(("query", "key", "value")))
    states = [mix(s, [0, len(s.dims) - 1], keep=False) for s in (key, value) if s is not None]
    if query is None:
        raise Lost
    own = mix(query, [len(query.dims) - 1], keep=False)
    state = reduce(joined, states, own)
    state = state.with_dim(len(state.dims) - 1, (Atom("c", call.node.shape[-1]),)).inexact()
    return [state]
