"""TFLite's operators: for each a function that makes the call of a layer.

A value between layers is a float32 tensor of real values. Of a quantised layer it holds `scale * (q - zero_point)`
exactly, so the integers come back by rounding, and whatever only moves numbers (max pooling, reshaping, padding with
the zero point) needs no arithmetic of its own. Every other quantised layer computes its float twin (convolution with
real weights, clamped to the range that its integers can hold) and then `exact(twin, compute, ...)`, whose value is what
the device's integers come to.

Four axes are kept as `(N, C, H, W)`, where the file has `(N, H, W, C)`: such a value is `turned`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from innersight.errors import InputError, Unsupported
from innersight.formats import tflite_integers as integers
from innersight.formats.graph import exact
from innersight.formats.tflite_file import Operator, TensorRecord

TURN, BACK = (0, 3, 1, 2), (0, 2, 3, 1)
_RANGES = {"int8": (-128, 127), "uint8": (0, 255)}


@dataclass(frozen=True)
class Scale:
    """How a value's 8-bit integers are meant: `step * (q - zero)`, q in lo..hi."""

    step: float  # exactly a float32
    zero: int
    dtype: str

    @property
    def lo(self) -> int:
        return _RANGES[self.dtype][0]

    @property
    def hi(self) -> int:
        return _RANGES[self.dtype][1]

    def real(self, q: int) -> float:
        return float(np.float32(self.step) * np.float32(q - self.zero))

    def centered(self, x: Tensor) -> Tensor:
        """q - zero of real values, in their type."""
        return torch.round(x * (1 / self.step))

    def index(self, x: Tensor) -> Tensor:
        """q - lo of real values: where they stand in a table."""
        return torch.round(x * (1 / self.step)).add_(self.zero - self.lo).long()


def as_scale(tensor: TensorRecord) -> Scale | None:
    """Of an 8-bit tensor with one scale; None of any other."""
    if tensor.dtype not in _RANGES or len(tensor.scale) != 1 or not tensor.scale[0] > 0:
        return None
    return Scale(float(tensor.scale[0]), int(tensor.zero_point[0]), tensor.dtype)


@dataclass(eq=False)
class Value:
    """A tensor of the file as the graph holds it.

    sample:   what it is for a batch of one: a tensor, or an array for what only says shapes and indices
    turned:   whether its four axes are `(N, C, H, W)` of the file's `(N, H, W, C)`
    constant: a tensor of the file; then `sample` is the array as stored
    """

    key: Any
    record: TensorRecord
    sample: Any
    turned: bool = False
    scale: Scale | None = None
    constant: bool = False

    @property
    def known(self) -> bool:
        """Whether it is an array, constant or not: a shape, a list of axes."""
        return isinstance(self.sample, np.ndarray)

    @property
    def rank(self) -> int:
        return self.sample.ndim


@dataclass(eq=False)
class Layer:
    """What an operator becomes: a call, what it reads, and for each output whether it is turned."""

    call: Callable[..., Any]
    reads: Sequence[Value | None]
    turned: bool | Sequence[bool] = False
    seen: bool = True
    lo: int | None = None
    hi: int | None = None


@dataclass(eq=False)
class Site:
    """An operator at its place: what it reads, how its outputs are quantised, and whose arithmetic is asked for.

    micro: TFLite-Micro's kernels where they differ from LiteRT's reference kernels
    whole: whether integers are computed; otherwise the twin is the value
    room:  (shape, multiplications): raises where a value of such a shape, or so much work, is beyond what is run here
    """

    operator: Operator
    inputs: list[Value | None]
    outputs: list[TensorRecord]
    micro: bool
    whole: bool
    keep: Callable[[str, Tensor], Value]
    room: Callable[..., None]
    notes: list[str] = field(default_factory=list)

    @property
    def options(self) -> Mapping[str, Any]:
        return self.operator.options

    @property
    def scale(self) -> Scale | None:
        return as_scale(self.outputs[0])

    def read(self, position: int) -> Value:
        value = self.inputs[position] if position < len(self.inputs) else None
        if value is None:
            raise InputError(f"its input {position} is missing")
        return value

    def array(self, position: int) -> np.ndarray:
        """An input that must be known before anything runs."""
        value = self.read(position)
        if not value.constant or not value.known:
            raise Unsupported(f"its input {position} is computed as it runs, only a constant is known here")
        return value.sample

    def tensor(self, value: Value, turned: bool = False, rank: int | None = None) -> Value:
        """A constant of real values as a weight, brought to `rank` axes, turned or not; other values as they are."""
        if not value.constant:
            if value.known:
                raise Unsupported("it computes with numbers that were made of a shape, which is not supported")
            return value
        array = dequantised(value)
        if rank is not None and array.ndim < rank:
            array = array.reshape((1,) * (rank - array.ndim) + array.shape)
        if turned and array.ndim == 4:
            array = array.transpose(TURN)
        kept = self.keep(f"{value.key}", torch.from_numpy(np.array(array, np.float32)))
        kept.scale, kept.turned, kept.record = value.scale, turned and array.ndim == 4, value.record
        return kept


def dequantised(value: Value) -> np.ndarray:
    """The real values of a constant, float32."""
    array, record = value.sample, value.record
    if array.dtype == np.float32:
        return array
    if array.dtype.kind == "f":
        return array.astype(np.float32)
    if not len(record.scale):
        return array.astype(np.float32)
    scale, zero = per_channel(record, array.ndim)
    return (scale * (array.astype(np.float32) - zero.astype(np.float32))).astype(np.float32)


def per_channel(record: TensorRecord, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zero points in a shape that fits the tensor."""
    n = len(record.scale)
    if n == 1:
        return record.scale[0], record.zero_point[0]
    axis = channel_axis(record)
    shape = [n if a == axis else 1 for a in range(rank)]
    return record.scale.reshape(shape), record.zero_point.reshape(shape)


def channel_axis(record: TensorRecord) -> int:
    """Which axis a constant's scales belong to: what it says, or the only one that fits."""
    n, shape = len(record.scale), record.shape
    if 0 <= record.axis < len(shape) and shape[record.axis] == n:
        return record.axis
    fits = [a for a, size in enumerate(shape) if size == n]
    if len(fits) != 1:
        raise InputError(f"tensor {record.index} has {n} scales along axis {record.axis} of {shape}, which do not fit")
    return fits[0]


# ---------------------------------------------------------------------------------------------------------------------
# Axes


def to_file(x: Tensor, turned: bool) -> Tensor:
    return x.permute(BACK) if turned else x


def held(axis: int, rank: int, turned: bool) -> int:
    """Where an axis of the file stands."""
    if not -rank <= axis < rank:
        raise InputError(f"axis {axis} of a value with {rank} axes does not exist")
    axis %= rank
    return TURN.index(axis) if turned else axis


def by_held(values: Sequence[Any], turned: bool) -> list[Any]:
    """Something for each axis of the file, in the order in which the axes stand."""
    return [values[a] for a in TURN] if turned else list(values)


def _same_axes(site: Site, values: Sequence[Value]) -> tuple[list[Value], list[bool], bool]:
    """Operands of an elementwise operator as tensors: which have to be turned first, and whether the result is."""
    rank = max(v.rank for v in values)
    live = [v for v in values if not v.constant and v.rank == rank]
    turned = rank == 4 and (any(v.turned for v in live) or not live)
    found = [site.tensor(v, turned, rank if v.constant and v.rank else None) for v in values]
    return found, [turned and v.rank == 4 and not v.turned for v in found], turned


def _aligned(x: Tensor, turn: bool, rank: int, turned: bool) -> Tensor:
    if turn:
        return x.permute(TURN)
    if x.dim() in (0, rank):
        return x
    # A vector for each image beside a map: the file counts axes from the last one.
    x = x.reshape(x.shape[0], *[1] * (rank - x.dim()), *x.shape[1:])
    return x.permute(TURN) if turned and rank == 4 else x


# ---------------------------------------------------------------------------------------------------------------------
# Activations


def activation(number: int) -> Callable[[Tensor], Tensor] | None:
    """The function of a float operator's fused activation."""
    if number not in (0, 1, 2, 3):
        raise Unsupported(f"fused activation {number} is not supported")  # LiteRT's kernels pass over a tanh
    functions: dict[int, Callable[[Tensor], Tensor]] = {1: F.relu, 2: _minus_one_to_one, 3: F.relu6}
    return functions.get(number)


def _minus_one_to_one(x: Tensor) -> Tensor:
    return torch.clamp(x, -1.0, 1.0)


def bounds(scale: Scale, number: int) -> tuple[int, int]:
    """The least and greatest integer behind a fused activation."""

    def q(value: float) -> int:
        return scale.zero + int(integers.away(np.float32(value) / np.float32(scale.step)))

    lo, hi = scale.lo, scale.hi
    if number == 1:
        return max(lo, scale.zero), hi
    if number == 3:
        return max(lo, scale.zero), min(hi, q(6.0))
    if number == 2:
        return max(lo, q(-1.0)), min(hi, q(1.0))
    if number != 0:
        raise Unsupported(f"fused activation {number} of a quantised operator is not known here")
    return lo, hi


class _Out:
    """Integers as the real values of a layer: clamped, scaled."""

    def __init__(self, scale: Scale, lo: int | None = None, hi: int | None = None):
        self.scale = scale
        self.lo = scale.lo if lo is None else lo
        self.hi = scale.hi if hi is None else hi
        self.low, self.high = scale.real(self.lo), scale.real(self.hi)

    def twin(self, x: Tensor) -> Tensor:
        """Real values clamped to what the integers can hold."""
        return torch.clamp(x, self.low, self.high)

    def real(self, q: Tensor) -> Tensor:
        """From q - zero, unclamped."""
        return q.clamp(self.lo - self.scale.zero, self.hi - self.scale.zero).float() * self.scale.step


class Pointwise:
    """A compute of `exact` whose every element depends on the elements in its own place alone."""

    pointwise = True


# ---------------------------------------------------------------------------------------------------------------------
# The table

MAKERS: dict[str, Callable[[Site], Layer]] = {}


def _operator(*names: str) -> Callable[[Callable[[Site], Layer]], Callable[[Site], Layer]]:
    def register(make: Callable[[Site], Layer]) -> Callable[[Site], Layer]:
        MAKERS.update(dict.fromkeys(names, make))
        return make

    return register


# -- convolutions


def _strides(site: Site, *names: str) -> list[int]:
    values = [int(site.options[name]) for name in names]
    if any(v < 1 for v in values):
        raise InputError(f"{', '.join(names)} are {values}, expected 1 or more")
    return values


def _same(n: int, k: int, s: int, d: int) -> tuple[int, int]:
    """(before, behind) of SAME padding."""
    total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
    return total // 2, total - total // 2


class _Window:
    """Where a convolution or pool looks: SAME or VALID, in rows and columns."""

    def __init__(self, site: Site, kernel: tuple[int, int], dilation: tuple[int, int] = (1, 1)):
        stride_h, stride_w = _strides(site, "stride_h", "stride_w")
        if site.options["padding"] not in (0, 1):
            raise InputError(f"padding {site.options['padding']} is neither SAME (0) nor VALID (1)")
        if min(kernel) < 1 or min(dilation) < 1:
            raise InputError(f"its window {kernel}, dilated {dilation}, is empty")
        self.kernel, self.stride, self.dilation = kernel, (stride_h, stride_w), dilation
        self.same = site.options["padding"] == 0
        self.room = site.room

    def padding(self, x: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
        """(before, behind) for rows and for columns."""
        sizes = tuple(zip(x.shape[-2:], self.kernel, self.stride, self.dilation, strict=True))
        around = tuple(_same(*size) if self.same else (0, 0) for size in sizes)
        if any(size[0] + sum(p) < (size[1] - 1) * size[3] + 1 for size, p in zip(sizes, around, strict=True)):
            raise InputError(f"its window {self.kernel} is larger than what it reads, {tuple(x.shape[-2:])}")
        return around[0], around[1]

    def padded(self, x: Tensor, value: float = 0.0) -> tuple[Tensor, tuple[int, int]]:
        """x with what has to be padded unevenly, and the padding that is left to the operation."""
        (top, bottom), (left, right) = self.padding(x)
        if top == bottom and left == right:
            return x, (top, left)
        return F.pad(x, (left, right, top, bottom), value=value), (0, 0)

    def check(self, x: Tensor, made: int, each: int) -> None:
        """Room and work for a sample."""
        (top, bottom), (left, right) = self.padding(x)
        self.room((*x.shape[:2], x.shape[2] + top + bottom, x.shape[3] + left + right))
        out = [
            (n + p - (k - 1) * d - 1) // s + 1
            for n, p, k, s, d in zip(
                x.shape[-2:], (top + bottom, left + right), self.kernel, self.stride, self.dilation, strict=True
            )
        ]
        self.room((x.shape[0], made, *out), math.prod(out) * made * each)


@dataclass(eq=False)
class _Weights:
    """A convolution's or dense layer's weights, real and as integers, with its bias."""

    real: Value
    bias: Value | None
    whole: Value | None = None
    limit: float = 0.0  # of a sum of products
    bias_q: np.ndarray | None = None
    multiplier: np.ndarray | None = None


def _weights(site: Site, x: Value, weight: Value, bias: Value | None, axes: Sequence[int], channel: int,
             dense: bool = False) -> _Weights:  # fmt: skip
    """`axes`: the order in which torch wants the file's; `channel`: the file's axis of output channels."""
    if not weight.constant:
        raise Unsupported("its weights are computed as it runs, which is not supported")
    record, stored = weight.record, weight.sample
    real = dequantised(weight).transpose(axes)
    channels = stored.shape[channel]
    form = torch.channels_last if len(axes) == 4 else torch.contiguous_format
    kept = site.keep("weight", torch.from_numpy(np.array(real)).contiguous(memory_format=form))
    made = _Weights(kept, None)
    b = None
    if bias is not None:
        if not bias.constant or bias.sample.size != channels:
            raise InputError(f"its bias does not hold one number for each of {channels} channels")
        b = bias.sample.reshape(-1)
    if x.scale is None or site.scale is None:
        if b is not None:
            made.bias = site.keep("bias", torch.from_numpy(np.array(dequantised(bias).reshape(-1))))  # type: ignore[arg-type]
        return made
    if stored.dtype not in (np.int8, np.uint8) or not len(record.scale) or not (record.scale > 0).all():
        raise Unsupported(
            f"its weights are {record.dtype} without scales for a quantised input, which is not supported"
        )
    if len(record.scale) not in (1, channels) or (len(record.scale) > 1 and channel_axis(record) != channel):
        raise InputError(f"its weights have {len(record.scale)} scales for {channels} channels")
    scales = np.broadcast_to(record.scale, channels)
    if b is None:
        b = np.zeros(channels, np.int32)
    if b.dtype.kind != "i":
        raise Unsupported(f"its bias is {b.dtype} in a quantised layer, expected int32")
    made.bias = site.keep("bias", torch.from_numpy((x.scale.step * scales.astype(np.float64) * b).astype(np.float32)))
    if not site.whole:
        return made
    zero = int(record.zero_point[0]) if stored.dtype == np.uint8 or dense else 0
    q = stored.astype(np.int16) - np.int16(zero)
    made.whole = site.keep("integers", torch.from_numpy(q.transpose(axes).copy()).contiguous(memory_format=form))
    largest = max(x.scale.hi - x.scale.zero, x.scale.zero - x.scale.lo)
    sums = np.abs(np.moveaxis(q, channel, 0).reshape(channels, -1).astype(np.int64)).sum(1)
    made.limit = float(sums.max(initial=0)) * largest
    made.bias_q = b.astype(np.int64)
    made.multiplier = _product_scale(site, x.scale, record.scale, scales, dense)
    return made


def _product_scale(site: Site, x: Scale, stored: np.ndarray, scales: np.ndarray, dense: bool) -> np.ndarray:
    """The real multiplier of each channel, in the precision in which the kernels compute it."""
    out = np.float64(site.scale.step)  # type: ignore[union-attr]
    short = len(stored) == 1 and (site.micro if dense else x.dtype == "uint8")
    if short:
        return (np.float32(x.step) * scales).astype(np.float64) / out
    return np.float64(x.step) * scales.astype(np.float64) / out


class _Requantised(Pointwise):
    """Sums of products as the layer's values; channels stand on axis 1, of a dense layer on the last."""

    def __init__(self, out: _Out, weights: _Weights, once: bool = False, last: bool = False):
        assert weights.bias_q is not None
        assert weights.multiplier is not None
        self.out = out
        limit = weights.limit + float(np.abs(weights.bias_q).max(initial=0))
        self.scaling = integers.Scaling(weights.multiplier, limit, once)
        self.bias = torch.from_numpy(weights.bias_q.astype(np.float64))
        self.last = last

    def __call__(self, sums: Tensor) -> Tensor:
        shape = (-1,) if self.last else (-1, 1, 1)
        x = sums.double() + self.bias.to(sums.device).view(shape)
        return self.out.real(self.scaling(x, shape, positive=self.out.lo >= self.out.scale.zero))


def _summed(x: Tensor, scale: Scale, whole: Tensor, limit: float,
            product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:  # fmt: skip
    """Sums of products of integers, exact. Watched like any operation, so that parts of a map can be run, too."""
    c = scale.centered(x.detach())
    if limit <= integers.EXACT and integers.sums_are_exact(x.device):
        return product(c, whole.to(torch.float32))
    return torch.round(product(c.to(torch.float64), whole.to(torch.float64)))


def _linear_layer(site: Site, x: Value, weights: _Weights, product: Callable[..., Tensor], turned: bool,
                  dense: bool = False) -> Layer:  # fmt: skip
    """A convolution or dense layer. product: (x, weight, bias) -> sums."""
    if x.scale is None or site.scale is None:
        act = activation(site.options["activation"])

        def real(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            y = product(x, weight, bias)
            return y if act is None else act(y)

        return Layer(real, [x, weights.real, weights.bias], turned)
    out = _Out(site.scale, *bounds(site.scale, site.options["activation"]))
    if not site.whole:

        def twin(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return out.twin(product(x, weight, bias))

        return Layer(twin, [x, weights.real, weights.bias], turned, lo=out.lo, hi=out.hi)
    scale, limit, compute = x.scale, weights.limit, _Requantised(out, weights, dense and not site.micro, dense)

    def call(x: Tensor, weight: Tensor, bias: Tensor | None, whole: Tensor) -> Tensor:
        y = out.twin(product(x, weight, bias))
        sums = _summed(x, scale, whole, limit, lambda c, w: product(c, w, None))
        return exact(y, compute, sums)

    return Layer(call, [x, weights.real, weights.bias, weights.whole], turned, lo=out.lo, hi=out.hi)


def _map(site: Site, position: int = 0) -> tuple[Value, bool]:
    """A picture that is read, and whether it has to be turned first."""
    x = site.read(position)
    if x.constant or x.known or x.rank != 4:
        raise Unsupported(f"it reads a value with {x.rank} axes, expected a picture with 4")
    return x, not x.turned


def _turned(x: Tensor, turn: bool) -> Tensor:
    return x.permute(TURN) if turn else x


@_operator("CONV_2D", "DEPTHWISE_CONV_2D")
def _convolution(site: Site) -> Layer:
    x, turn = _map(site)
    weight = site.read(1)
    depthwise = site.operator.code == "DEPTHWISE_CONV_2D"
    if weight.rank != 4 or 0 in weight.sample.shape or (depthwise and weight.sample.shape[0] != 1):
        raise InputError(f"its weights have the shape {weight.sample.shape}")
    axes, channel = ((3, 0, 1, 2), 3) if depthwise else ((0, 3, 1, 2), 0)
    weights = _weights(site, x, weight, site.inputs[2] if len(site.inputs) > 2 else None, axes, channel)
    out, inner, kh, kw = weights.real.sample.shape
    sample = _turned(x.sample, turn)
    if sample.shape[1] % inner or out % (groups := sample.shape[1] // inner or 1):
        raise InputError(f"its weights {weight.sample.shape} do not fit an input of {sample.shape[1]} channels")
    window = _Window(site, (kh, kw), tuple(_strides(site, "dilation_h", "dilation_w")))  # type: ignore[arg-type]
    window.check(sample, out, inner * kh * kw)

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, padding = window.padded(_turned(x, turn))
        return F.conv2d(x, weight, bias, window.stride, padding, window.dilation, groups)

    return _linear_layer(site, x, weights, product, True)


@_operator("TRANSPOSE_CONV")
def _transposed_convolution(site: Site) -> Layer:
    x, turn = _map(site, 2)
    weight = site.read(1)
    if weight.rank != 4 or 0 in weight.sample.shape:
        raise InputError(f"its weights have the shape {weight.sample.shape}")
    weights = _weights(site, x, weight, site.inputs[3] if len(site.inputs) > 3 else None, (3, 0, 1, 2), 0)
    _, out, *kernel = weights.real.sample.shape
    sample = _turned(x.sample, turn)
    if sample.shape[1] != weight.sample.shape[3]:
        raise InputError(f"its weights {weight.sample.shape} do not fit an input of {sample.shape[1]} channels")
    strides = _strides(site, "stride_h", "stride_w")
    size = site.read(0)
    if not size.known or size.sample.shape != (4,):
        raise InputError("the size that it makes is not given as four numbers")
    h, w = (int(v) for v in size.sample[1:3])
    full = [(n - 1) * s + k for n, s, k in zip(sample.shape[2:], strides, kernel, strict=True)]
    site.room((1, out, *full), math.prod(sample.shape) * out * math.prod(kernel))
    site.room((1, out, h, w))
    if min(h, w) < 1:
        raise InputError(f"the size {h}x{w} that it makes is beyond what is run here")

    def crop(full: int, n: int) -> int:
        return max(full - n, 0) // 2

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = _turned(x, turn)
        full = [(n - 1) * s + k for n, s, k in zip(x.shape[2:], strides, kernel, strict=True)]
        top, left = crop(full[0], h), crop(full[1], w)
        more = [max(n - f, 0) for n, f in zip((h, w), full, strict=True)]
        if any(m >= s for m, s in zip(more, strides, strict=True)):
            raise InputError(f"the size {h}x{w} that it makes does not fit {tuple(x.shape[2:])} at strides {strides}")
        y = F.conv_transpose2d(x, weight, bias, strides, (top, left), more)
        return y if y.shape[2:] == (h, w) else y[:, :, :h, :w]

    return _linear_layer(site, x, weights, product, True)


@_operator("FULLY_CONNECTED")
def _dense(site: Site) -> Layer:
    x, weight = site.read(0), site.read(1)
    if weight.rank != 2 or 0 in weight.sample.shape or x.known:
        raise InputError(f"its weights have the shape {weight.sample.shape}, expected two axes")
    if site.options["weights_format"] != 0:
        raise Unsupported("its weights are shuffled for another processor, which is not supported")
    weights = _weights(site, x, weight, site.inputs[2] if len(site.inputs) > 2 else None, (0, 1), 0, dense=True)
    out, inner = weight.sample.shape
    turned, keep = x.turned, bool(site.options["keep_num_dims"])
    each = math.prod(x.sample.shape)
    if each % inner:
        raise InputError(f"it multiplies {each} numbers with weights for {inner}")
    site.room((each // inner, out), each * out)

    def rows(x: Tensor) -> Tensor:
        """(.., inner) as the file sees it."""
        if x.dim() == 2 and x.shape[1] == inner:
            return x
        if turned and (x.shape[2] * x.shape[3] > 1 or keep):
            x = x.permute(BACK)
        if keep or x.dim() == 1:
            return x if x.shape[-1] == inner else x.reshape(*x.shape[:-1], inner)
        return x.flatten(1) if math.prod(x.shape[1:]) == inner else x.reshape(-1, inner)

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(rows(x), weight, bias)

    layer = _linear_layer(site, x, weights, product, False, dense=True)
    if not keep or x.rank != 4:
        return layer
    call = layer.call
    return Layer(lambda *given: call(*given).permute(TURN), layer.reads, True, layer.seen, layer.lo, layer.hi)


# -- pools


@_operator("AVERAGE_POOL_2D", "MAX_POOL_2D")
def _pool(site: Site) -> Layer:
    x, turn = _map(site)
    window = _Window(site, tuple(_strides(site, "filter_h", "filter_w")))  # type: ignore[arg-type]
    sample = _turned(x.sample, turn)
    window.check(sample, sample.shape[1], math.prod(window.kernel))
    average = site.operator.code == "AVERAGE_POOL_2D"
    if x.scale is None or site.scale is None:
        act = activation(site.options["activation"])

        def real(x: Tensor) -> Tensor:
            y = _averaged(x, window, turn) if average else _greatest(x, window, turn)
            return y if act is None else act(y)

        return Layer(real, [x], True)
    _same_scale(site, x)
    out = _Out(site.scale, *bounds(site.scale, site.options["activation"]))
    clamps = (out.lo, out.hi) != (out.scale.lo, out.scale.hi)
    if not average or not site.whole:

        def moved(x: Tensor) -> Tensor:
            y = _averaged(x, window, turn) if average else _greatest(x, window, turn)
            return out.twin(y) if clamps or average else y

        return Layer(moved, [x], True, lo=out.lo, hi=out.hi)
    scale = x.scale

    def call(x: Tensor) -> Tensor:
        y = out.twin(_averaged(x, window, turn))
        c = scale.centered(x.detach())
        (top, bottom), (left, right) = window.padding(_turned(x, turn))
        if top + bottom + left + right == 0:
            sums = F.avg_pool2d(_turned(c, turn), window.kernel, window.stride, divisor_override=1)
            return exact(y, _Averaged(out, math.prod(window.kernel)), sums)
        return exact(y, lambda c: _Averaged(out, _cells(c, window, turn))(_window_sums(c, window, turn)), c)

    return Layer(call, [x], True, lo=out.lo, hi=out.hi)


class _Averaged(Pointwise):
    """A sum of stored integers over its number, rounded half away from zero."""

    def __init__(self, out: _Out, cells: Any):
        self.out, self.cells = out, cells

    def __call__(self, sums: Tensor) -> Tensor:
        n, zero = self.cells, self.out.scale.zero
        s = sums.double() + zero * n
        half = torch.div(torch.as_tensor(n, dtype=s.dtype, device=s.device), 2, rounding_mode="floor")
        y = torch.where(s > 0, torch.floor((s + half) / n), -torch.floor((half - s) / n))
        return self.out.real(y - zero)


def _window_sums(x: Tensor, window: _Window, turn: bool) -> Tensor:
    x, padding = window.padded(_turned(x, turn))
    return F.avg_pool2d(x, window.kernel, window.stride, padding, divisor_override=1)


def _cells(x: Tensor, window: _Window, turn: bool) -> Tensor:
    """How many cells of each window lie in the picture."""
    ones = torch.ones_like(_turned(x, turn)[:1, :1], dtype=torch.float64)
    return _window_sums(ones, window, False)


def _averaged(x: Tensor, window: _Window, turn: bool) -> Tensor:
    x = _turned(x, turn)
    padded, padding = window.padded(x)
    if padded is x:
        return F.avg_pool2d(x, window.kernel, window.stride, padding, count_include_pad=False)
    sums = F.avg_pool2d(padded, window.kernel, window.stride, divisor_override=1)
    return sums * (1 / _cells(x.detach(), window, False)).to(x.dtype)


def _greatest(x: Tensor, window: _Window, turn: bool) -> Tensor:
    x = _turned(x, turn)
    (top, bottom), (left, right) = window.padding(x)
    if top == bottom and left == right and 2 * top <= window.kernel[0] and 2 * left <= window.kernel[1]:
        return F.max_pool2d(x, window.kernel, window.stride, (top, left))
    return F.max_pool2d(F.pad(x, (left, right, top, bottom), value=-1e30), window.kernel, window.stride)


def _same_scale(site: Site, *values: Value) -> None:
    """Operators that only move integers cannot change what they mean."""
    out = site.scale
    for x in values:
        if out is None or x.scale is None:
            continue
        if out.dtype != x.scale.dtype or out.zero != x.scale.zero or abs(out.step / x.scale.step - 1) > 1e-5:
            raise Unsupported(
                f"it moves integers of scale {x.scale.step:.6g} and zero point {x.scale.zero} to a value of scale "
                f"{out.step:.6g} and zero point {out.zero}, which is not supported"
            )


# -- sums and products of two values


@_operator("ADD", "SUB", "MUL", "DIV", "MAXIMUM", "MINIMUM", "POW", "SQUARED_DIFFERENCE")
def _two_values(site: Site) -> Layer:
    code, a, b = site.operator.code, site.read(0), site.read(1)
    if a.known and b.known:
        return _of_arrays(site, _ARRAY_FUNCTIONS[code])
    (va, vb), turns, turned = _same_axes(site, (a, b))
    rank = max(va.rank, vb.rank)
    function = _FUNCTIONS[code]
    shape = np.broadcast_shapes(
        *(_aligned(v.sample, t, rank, turned).shape for v, t in zip((va, vb), turns, strict=True))
    )
    site.room(shape)

    def two(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return _aligned(a, turns[0], rank, turned), _aligned(b, turns[1], rank, turned)

    if va.scale is None or vb.scale is None or site.scale is None:
        act = activation(site.options.get("activation", 0))

        def real(a: Tensor, b: Tensor) -> Tensor:
            y = function(*two(a, b))
            return y if act is None else act(y)

        return Layer(real, [va, vb], turned)
    out = _Out(site.scale, *bounds(site.scale, site.options.get("activation", 0)))
    if code in ("MAXIMUM", "MINIMUM"):
        _same_scale(site, va, vb)
        return Layer(lambda a, b: function(*two(a, b)), [va, vb], turned)
    if code not in ("ADD", "SUB", "MUL"):
        raise Unsupported("of integers it is not supported")
    if not site.whole:
        return Layer(lambda a, b: out.twin(function(*two(a, b))), [va, vb], turned, lo=out.lo, hi=out.hi)
    compute = _Multiplied(site, out, va.scale, vb.scale) if code == "MUL" else _Added(site, out, va.scale, vb.scale)

    def call(a: Tensor, b: Tensor) -> Tensor:
        a, b = two(a, b)
        return exact(out.twin(function(a, b)), compute, a, b)

    return Layer(call, [va, vb], turned, lo=out.lo, hi=out.hi)


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "ADD": torch.add, "SUB": torch.sub, "MUL": torch.mul, "DIV": torch.div, "MAXIMUM": torch.maximum,
    "MINIMUM": torch.minimum, "POW": torch.pow, "SQUARED_DIFFERENCE": lambda a, b: torch.square(a - b),
}  # fmt: skip
_ARRAY_FUNCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "ADD": np.add, "SUB": np.subtract, "MUL": np.multiply, "DIV": lambda a, b: np.fix(a / b).astype(a.dtype),
    "MAXIMUM": np.maximum, "MINIMUM": np.minimum, "POW": np.power, "SQUARED_DIFFERENCE": lambda a, b: (a - b) ** 2,
}  # fmt: skip


class _Added(Pointwise):
    """Both brought to a common scale with 20 bits to spare, then added."""

    def __init__(self, site: Site, out: _Out, a: Scale, b: Scale):
        self.out, self.a, self.b = out, a, b
        twice = 2 * np.float64(max(a.step, b.step))
        self.table_a, self.table_b = (self._table(s, twice) for s in (a, b))
        if site.operator.code == "SUB":
            self.table_b = -self.table_b
        limit = float(self.table_a.abs().max() + self.table_b.abs().max())
        self.scaling = integers.Scaling(twice / ((1 << 20) * np.float64(out.scale.step)), limit)

    @staticmethod
    def _table(scale: Scale, twice: np.float64) -> Tensor:
        q = integers.all_of(scale.lo, scale.hi)
        shared = integers.twice_rounded((q - scale.zero) << 20, *integers.multiplier(np.float64(scale.step) / twice))
        return torch.from_numpy(shared.astype(np.float64))

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        x = self.table_a.to(a.device)[self.a.index(a)] + self.table_b.to(b.device)[self.b.index(b)]
        return self.out.real(self.scaling(x, positive=self.out.lo >= self.out.scale.zero))


class _Multiplied(Pointwise):
    def __init__(self, site: Site, out: _Out, a: Scale, b: Scale):
        self.out, self.a, self.b = out, a, b
        kind = np.float64 if site.micro else np.float32
        self.scaling = integers.Scaling(kind(a.step) * kind(b.step) / kind(out.scale.step), 1 << 16)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return self.out.real(self.scaling(self.a.centered(a).double() * self.b.centered(b).double()))


# -- functions of one value


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_ONE: dict[str, Callable[[Tensor], Tensor]] = {
    "RELU": F.relu, "RELU6": F.relu6, "RELU_N1_TO_1": _minus_one_to_one,
    "RELU_0_TO_1": lambda x: torch.clamp(x, 0.0, 1.0),
    "LOGISTIC": torch.sigmoid, "TANH": torch.tanh, "EXP": torch.exp, "LOG": torch.log, "SQRT": torch.sqrt,
    "RSQRT": torch.rsqrt, "ABS": torch.abs, "NEG": torch.neg, "SQUARE": torch.square, "SIN": torch.sin,
    "COS": torch.cos, "FLOOR": torch.floor, "CEIL": torch.ceil, "ROUND": torch.round, "ELU": F.elu, "GELU": _gelu,
    "HARD_SWISH": F.hardswish, "LEAKY_RELU": F.leaky_relu, "SIGN": torch.sign,
}  # fmt: skip
_QUANTISED_ONE = "RELU RELU6 RELU_N1_TO_1 LOGISTIC TANH EXP ABS ELU GELU HARD_SWISH LEAKY_RELU".split()


class _Looked(Pointwise):
    """A function of one 8-bit integer, by its table of 256 real values."""

    def __init__(self, scale: Scale, out: _Out, q: np.ndarray):
        q = np.clip(q, out.lo, out.hi)
        self.scale = scale
        self.table = torch.from_numpy((q - out.scale.zero).astype(np.float32)) * out.scale.step

    def __call__(self, x: Tensor) -> Tensor:
        return self.table.to(x.device)[self.scale.index(x)]


@_operator(*_ONE)
def _one_value(site: Site) -> Layer:
    x, code = site.read(0), site.operator.code
    function = _ONE[code]
    if code == "GELU" and site.options["approximate"]:
        function = _gelu_tanh
    if code == "LEAKY_RELU":
        alpha = float(site.options["alpha"])

        def function(x: Tensor) -> Tensor:
            return F.leaky_relu(x, alpha)

    if x.known:
        raise Unsupported("of a constant or a shape it is not supported")
    if x.scale is None or site.scale is None:
        return Layer(lambda x: function(x), [x], x.turned)
    if code not in _QUANTISED_ONE:
        raise Unsupported("of integers it is not supported")
    lo, hi = site.scale.lo, site.scale.hi
    limits = {"RELU": 1, "RELU6": 3, "RELU_N1_TO_1": 2}
    if code in limits and not (code == "RELU6" and site.micro):
        lo, hi = bounds(site.scale, limits[code])
    out = _Out(site.scale, lo, hi)
    return _through_table(site, x, out, function, lambda q: _of_integers(site, x.scale, q))  # type: ignore[arg-type]


def _through_table(site: Site, x: Value, out: _Out, function: Callable[[Tensor], Tensor],
                   table: Callable[[np.ndarray], np.ndarray]) -> Layer:  # fmt: skip
    """A function of one integer; the twin of one that never leaves the range but by rounding keeps its slope there."""
    assert x.scale is not None
    bounded = site.operator.code in ("LOGISTIC", "TANH")

    def twin(x: Tensor) -> Tensor:
        return function(x) if bounded else out.twin(function(x))

    if not site.whole:
        return Layer(twin, [x], x.turned, lo=out.lo, hi=out.hi)
    compute = _Looked(x.scale, out, table(integers.all_of(x.scale.lo, x.scale.hi)))
    return Layer(lambda x: exact(twin(x), compute, x), [x], x.turned, lo=out.lo, hi=out.hi)


def _of_integers(site: Site, scale: Scale, q: np.ndarray) -> np.ndarray:
    """What the kernels make of each stored integer, unclamped."""
    out, code = site.scale, site.operator.code
    assert out is not None
    s, z, s_out, z_out = scale.step, scale.zero, out.step, out.zero
    functions: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "LOGISTIC": integers.logistic, "TANH": np.tanh, "EXP": np.exp,
        "ELU": lambda x: np.where(x < 0, np.expm1(x), x),
        "GELU": lambda x: _gelu_array(x, bool(site.options["approximate"])),
    }  # fmt: skip
    if code in functions:
        with np.errstate(over="ignore"):
            return integers.float_function(functions[code], s, z, s_out, z_out, q)
    if code == "HARD_SWISH":
        return integers.hard_swish(s, z, s_out, z_out, q)
    if code == "RELU6" and site.micro:
        return np.clip(q, z, z + integers.away(np.float32(6) / np.float32(s)))
    if code == "LEAKY_RELU":
        kind = np.float64 if site.micro else np.float32
        alpha = kind(np.float32(site.options["alpha"]))
        up, down = kind(s) / kind(s_out), kind(s) * alpha / kind(s_out)
        both = [integers.twice_rounded(q - z, *integers.multiplier(m)) for m in (up, down)]
        return np.where(q >= z, *both) + z_out
    x = np.abs(q - z) if code == "ABS" else q - z
    return integers.twice_rounded(x, *integers.multiplier(np.float32(s) / np.float32(s_out))) + z_out


def _gelu_array(x: np.ndarray, approximate: bool) -> np.ndarray:
    real = torch.from_numpy(x.astype(np.float32))
    return F.gelu(real, approximate="tanh" if approximate else "none").numpy()


@_operator("PRELU")
def _prelu(site: Site) -> Layer:
    x = site.read(0)
    if x.scale is not None:
        raise Unsupported("of integers it is not supported")
    slope = site.tensor(site.read(1), x.turned, x.rank)
    channels = x.sample.shape[1] if x.sample.dim() > 1 else 0
    if slope.sample.numel() in (1, channels) and slope.sample.dim() > 1 and slope.sample.shape[1] in (1, channels):
        return Layer(lambda x, a: F.prelu(x, a.flatten()), [x, slope], x.turned)
    return Layer(lambda x, a: F.relu(x) - a * F.relu(-x), [x, slope], x.turned)


@_operator("QUANTIZE")
def _quantize(site: Site) -> Layer:
    x = site.read(0)
    if site.scale is None or x.known:
        raise Unsupported("it does not make int8 or uint8, which is not supported")
    out = _Out(site.scale)
    if x.scale is None:
        return quantized_input(site, x, out)
    source = x.scale

    def rescaled(q: np.ndarray) -> np.ndarray:
        ratio = np.float64(source.step) / np.float64(out.scale.step)
        return integers.twice_rounded(q - source.zero, *integers.multiplier(ratio)) + out.scale.zero

    return _through_table(site, x, out, lambda x: x, rescaled)


class _Rounded(Pointwise):
    """Real values to the nearest integer, half away from zero."""

    def __init__(self, out: _Out):
        self.out = out

    def __call__(self, x: Tensor) -> Tensor:
        if bool(torch.isnan(x).any()):
            raise InputError("the picture given holds NaN (not a number), which no integer stands for")
        q = (x.double() / self.out.scale.step).float().double()
        return self.out.real(torch.copysign(torch.floor(q.abs() + 0.5), q))


def quantized_input(site: Site, x: Value, out: _Out) -> Layer:
    compute = _Rounded(out)
    if not site.whole:
        return Layer(lambda x: out.twin(x), [x], x.turned)
    return Layer(lambda x: exact(out.twin(x), compute, x), [x], x.turned)


# -- over axes


@_operator("SOFTMAX", "LOG_SOFTMAX")
def _softmax(site: Site) -> Layer:
    x = site.read(0)
    dim = 1 if x.turned else -1
    if site.operator.code == "LOG_SOFTMAX":
        if x.scale is not None:
            raise Unsupported("of integers it is not supported")
        return Layer(lambda x: F.log_softmax(x, dim), [x], x.turned)
    beta = float(site.options["beta"])
    if not math.isfinite(beta):
        raise InputError("its beta is no number")

    def function(x: Tensor) -> Tensor:
        return F.softmax(x if beta == 1.0 else x * beta, dim)

    # The twin is not cut off at 255/256, the greatest integer: a sure network would have no slope at all.
    if x.scale is None or site.scale is None:
        return Layer(function, [x], x.turned)
    scale, out = x.scale, _Out(site.scale)
    if abs(out.scale.step * 256 - 1) > 1e-3 or out.scale.zero != out.scale.lo:
        raise Unsupported(f"it answers in steps of {out.scale.step:.6g}, the kernels do in 1/256")
    if not site.whole:
        return Layer(function, [x], x.turned)
    kernel = integers.Softmax(scale.step, beta, out.scale.lo, out.scale.hi)

    def compute(x: Tensor) -> Tensor:
        q = kernel(scale.index(x).movedim(dim, -1) + scale.lo)
        return out.real(q.movedim(-1, dim) - out.scale.zero)

    return Layer(lambda x: exact(function(x), compute, x), [x], x.turned)


@_operator("MEAN", "SUM", "REDUCE_MAX", "REDUCE_MIN", "REDUCE_PROD")
def _reduced(site: Site) -> Layer:
    x, code, keep = site.read(0), site.operator.code, bool(site.options["keep_dims"])
    axes = [int(a) for a in site.array(1).reshape(-1)]
    if x.known:
        functions: dict[str, Callable[..., Any]] = {
            "SUM": np.sum, "REDUCE_PROD": np.prod, "REDUCE_MAX": np.max, "REDUCE_MIN": np.min,
        }  # fmt: skip
        if code not in functions:
            raise Unsupported("of a shape it is not supported")
        function = functions[code]
        return Layer(lambda v: np.asarray(function(v, axis=tuple(axes), keepdims=keep)), [x], seen=False)
    dims = tuple(sorted({held(a, x.rank, x.turned) for a in axes}))
    left = x.rank if keep else x.rank - len(dims)
    turned = x.turned and left == 4
    turn = x.turned and left == 3 and 1 not in dims  # the file's channels stand last

    def put_back(y: Tensor) -> Tensor:
        return y.movedim(1, -1) if turn else y

    if code == "REDUCE_PROD":
        if len(dims) != 1 or x.scale is not None:
            raise Unsupported("over several axes, or of integers, it is not supported")
        return Layer(lambda x: put_back(torch.prod(x, dims[0], keep)), [x], turned)
    if code in ("REDUCE_MAX", "REDUCE_MIN"):
        _same_scale(site, x)
        pick = torch.amax if code == "REDUCE_MAX" else torch.amin
        return Layer(lambda x: put_back(pick(x, dims, keep)), [x], turned)
    total = torch.mean if code == "MEAN" else torch.sum

    def function_of(x: Tensor) -> Tensor:
        return put_back(total(x, dims, keepdim=keep))

    if x.scale is None or site.scale is None:
        return Layer(function_of, [x], turned)
    if code != "MEAN":
        raise Unsupported("of integers it is not supported")
    out, scale = _Out(site.scale), x.scale
    if not site.whole:
        return Layer(lambda x: out.twin(function_of(x)), [x], turned)

    def compute(x: Tensor) -> Tensor:
        n = math.prod(x.shape[d] for d in dims)
        sums = scale.centered(x).double().sum(dims, keepdim=keep)
        q, e = integers.multiplier(np.float64(scale.step) / np.float64(out.scale.step))
        k = min(n.bit_length() - 1, 32, 31 + int(e))
        scaled = integers.twice_rounded(sums.cpu().numpy().astype(np.int64), (q << k) // n, e - k)
        return put_back(out.real(torch.from_numpy(scaled).to(x.device)))

    return Layer(lambda x: exact(out.twin(function_of(x)), compute, x), [x], turned)


@_operator("ARG_MAX", "ARG_MIN")
def _best(site: Site) -> Layer:
    x = site.read(0)
    axis = int(site.array(1).reshape(-1)[0])
    dim = held(axis, x.rank, x.turned)
    pick = torch.argmax if site.operator.code == "ARG_MAX" else torch.argmin
    turn = x.turned and dim != 1
    return Layer(lambda x: pick(x, dim).movedim(1, -1) if turn else pick(x, dim), [x], False)


@_operator("L2_NORMALIZATION")
def _unit_length(site: Site) -> Layer:
    x = site.read(0)
    if x.scale is not None:
        raise Unsupported("of integers it is not supported")
    return Layer(lambda x: F.normalize(x, dim=1 if x.dim() == 4 else -1, eps=1e-6), [x], x.turned)


@_operator("BATCH_MATMUL")
def _matmul(site: Site) -> Layer:
    a, b = (site.tensor(v) for v in (site.read(0), site.read(1)))
    if a.scale is not None or b.scale is not None:
        raise Unsupported("of integers it is not supported")
    turn_a, turn_b = bool(site.options["adj_x"]), bool(site.options["adj_y"])
    four = max(a.rank, b.rank) == 4
    if min(a.rank, b.rank) < 2:
        raise InputError("it multiplies values with one axis")
    (*_, m, k), (*_, k2, n) = (_file_shape(v) for v in (a, b))
    made = max(math.prod(_file_shape(v)[:-2]) for v in (a, b)) * (k if turn_a else m) * (k2 if turn_b else n)
    site.room((made,), made * (m if turn_a else k))

    def call(x: Tensor, y: Tensor) -> Tensor:
        x, y = to_file(x, a.turned), to_file(y, b.turned)
        z = torch.matmul(x.transpose(-2, -1) if turn_a else x, y.transpose(-2, -1) if turn_b else y)
        return z.permute(TURN) if four and a.turned else z

    return Layer(call, [a, b], four and a.turned)


# -- moving numbers


def _of_arrays(site: Site, function: Callable[..., np.ndarray]) -> Layer:
    """Bookkeeping on shapes, in the file's axes, which nobody watches."""

    def call(*values: Any) -> np.ndarray:
        result = np.asarray(function(*values))
        if result.size > 1 << 20:
            raise InputError("it makes a list of more than a million numbers")
        return result

    return Layer(call, [v for v in site.inputs if v is not None], seen=False)


@_operator("SHAPE")
def _shape(site: Site) -> Layer:
    x = site.read(0)
    if x.constant:
        return _of_arrays(site, lambda v: np.asarray(v.shape, np.int64))

    def call(x: Any) -> np.ndarray:
        shape = tuple(x.shape)
        return np.asarray([shape[a] for a in BACK] if x_turned else shape, np.int64)

    x_turned = x.turned
    return Layer(call, [x], seen=False)


def _target(x: Tensor, sizes: Sequence[int], stored: int) -> list[int]:
    """A shape as the file asks for it, with the images of the batch in the place of its one."""
    sizes = [int(s) for s in sizes]
    n = x.shape[0] if x.dim() else 1
    if any(s < -1 for s in sizes) or sizes.count(-1) > 1:
        raise InputError(f"it asks for the shape {sizes}")
    if n != stored and sizes:
        if -1 in sizes:
            if sizes[0] == stored:
                sizes[0] = n
        elif math.prod(sizes) * n == x.numel() * stored:
            sizes[0] = sizes[0] * n // stored
    return sizes


@_operator("RESHAPE")
def _reshape(site: Site) -> Layer:
    x = site.read(0)
    given = site.inputs[1] if len(site.inputs) > 1 else None
    sizes = site.options["new_shape"]
    if given is not None and given.known:
        if not given.constant:
            if x.known:
                return _of_arrays(site, lambda v, s: v.reshape([int(i) for i in s]))
            return _reshaped(site, x, given, None)
        sizes = given.sample.reshape(-1)
    if sizes is None:
        raise InputError("the shape that it makes is not given")
    if x.known:
        return _of_arrays(site, lambda v, *_: v.reshape([int(i) for i in sizes]))
    return _reshaped(site, x, None, [int(s) for s in sizes])


def _reshaped(site: Site, x: Value, given: Value | None, sizes: list[int] | None) -> Layer:
    _same_scale(site, x)
    rank = len(given.sample.reshape(-1)) if given is not None else len(sizes or ())
    turned, flat = x.turned, rank == 2
    stored = x.sample.shape[0] if x.rank else 1

    def call(x: Tensor, given: np.ndarray | None) -> Tensor:
        asked = given.reshape(-1).tolist() if given is not None else sizes or []
        target = _target(x, asked, stored)
        if turned and not (flat and x.shape[2] * x.shape[3] == 1):
            x = x.permute(BACK)
        rows = flat and x.dim() > 1 and target[0] in (x.shape[0], -1) and target[1] in (-1, math.prod(x.shape[1:]))
        y = x.flatten(1) if rows else x.reshape(target)
        return y.permute(TURN) if rank == 4 else y

    return Layer(call, [x, given], rank == 4)


@_operator("SQUEEZE")
def _squeeze(site: Site) -> Layer:
    x = site.read(0)
    if x.known:
        return _of_arrays(site, np.squeeze)
    _same_scale(site, x)
    shape = _file_shape(x)
    dims = site.options["dims"]
    gone = {d % len(shape) for d in dims} if dims else {d for d, s in enumerate(shape) if s == 1 and d}
    left = [s for d, s in enumerate(shape) if d not in gone]
    if any(shape[d] != 1 for d in gone):
        raise InputError(f"it drops axes {sorted(gone)} of {shape}, which are not of size 1")
    return _reshaped(site, x, None, left)


@_operator("EXPAND_DIMS")
def _expand_dims(site: Site) -> Layer:
    x = site.read(0)
    axis = int(site.array(1).reshape(-1)[0])
    if x.known:
        return _of_arrays(site, lambda v, _: np.expand_dims(v, axis))
    shape = list(_file_shape(x))
    if not -len(shape) - 1 <= axis <= len(shape):
        raise InputError(f"axis {axis} of a value with {len(shape)} axes does not exist")
    shape.insert(axis % (len(shape) + 1), 1)
    return _reshaped(site, x, None, shape)


def _file_shape(x: Value) -> tuple[int, ...]:
    shape = tuple(x.sample.shape)
    return tuple(shape[a] for a in BACK) if x.turned else shape


@_operator("TRANSPOSE")
def _transpose(site: Site) -> Layer:
    x = site.read(0)
    order = [int(a) for a in site.array(1).reshape(-1)]
    if sorted(order) != list(range(x.rank)):
        raise InputError(f"it orders axes as {order}")
    if x.known:
        return _of_arrays(site, lambda v, _: v.transpose(order))
    _same_scale(site, x)
    now = list(TURN) if x.turned else list(range(x.rank))

    def moves(turned: bool) -> list[int]:
        asked = by_held(order, turned)
        return [now.index(a) for a in asked]

    # The axes that are held may be those that are asked for: a file in NCHW turns its picture for TFLite's kernels.
    still = [t for t in ((True, False) if x.rank == 4 else (False,)) if moves(t) == list(range(x.rank))]
    turned = still[0] if still else x.rank == 4
    moved = moves(turned)
    return Layer(lambda x: x.permute(moved), [x], turned)


@_operator("PAD", "PADV2", "MIRROR_PAD")
def _pad(site: Site) -> Layer:
    x, code = site.read(0), site.operator.code
    widths = site.array(1)
    if widths.shape != (x.rank, 2) or (widths < 0).any() or x.known:
        raise InputError(f"its paddings {widths.tolist()[:8]} do not fit a value with {x.rank} axes")
    around = by_held([(int(a), int(b)) for a, b in widths], x.turned)
    site.room([n + a + b for n, (a, b) in zip(x.sample.shape, around, strict=True)])
    if any(around[0]):
        raise Unsupported("it pads the batch, which is not supported")
    _same_scale(site, x)
    flat = [n for pair in reversed(around) for n in pair]
    while len(flat) > 2 and not any(flat[-2:]):
        flat = flat[:-2]
    if code == "MIRROR_PAD":
        return _mirrored(site, x, around)
    value = 0.0
    if code == "PADV2":
        constant = site.read(2)
        if not constant.constant:
            raise Unsupported("the value it pads with is computed as it runs, which is not supported")
        value = float(dequantised(constant).reshape(-1)[0])
    return Layer(lambda x: F.pad(x, flat, value=value), [x], x.turned)


def _mirrored(site: Site, x: Value, around: Sequence[tuple[int, int]]) -> Layer:
    symmetric = site.options["mode"] == 1

    def mirror(n: int, before: int, behind: int) -> list[int]:
        period = 2 * n if symmetric else max(2 * (n - 1), 1)
        places = [i % period for i in range(-before, n + behind)]
        return [(period - 1 - i if symmetric else period - i) if i >= n else i for i in places]

    def call(x: Tensor) -> Tensor:
        for d, (before, behind) in enumerate(around):
            if before or behind:
                x = _picked(x, d, mirror(x.shape[d], before, behind))
        return x

    return Layer(call, [x], x.turned)


def _picked(x: Tensor, dim: int, places: Sequence[int]) -> Tensor:
    return x.index_select(dim, torch.tensor(places, device=x.device))


@_operator("CONCATENATION", "PACK")
def _joined(site: Site) -> Layer:
    values = [v for v in site.inputs if v is not None]
    axis, pack = int(site.options["axis"]), site.operator.code == "PACK"
    if not values:
        raise InputError("it reads nothing")
    if all(v.known and not isinstance(v.sample, Tensor) for v in values) and all(
        v.sample.dtype.kind in "iub" for v in values
    ):
        join = np.stack if pack else np.concatenate
        return _of_arrays(site, lambda *given: join(given, axis=axis))
    if pack:
        return _packed(site, values, axis)
    rank = values[0].rank
    if any(v.rank != rank for v in values):
        raise InputError("it joins values with different numbers of axes")
    found, turns, turned = _same_axes(site, values)
    dim = held(axis, rank, turned)
    # (several images beside one constant: each gets it)
    constants = [v.constant for v in values]
    sizes = [list(_turned(v.sample, t).shape) for v, t in zip(found, turns, strict=True)]
    site.room([sum(s[d] for s in sizes) if d == dim else sizes[0][d] for d in range(rank)])

    def together(*given: Tensor) -> Tensor:
        parts = [_turned(x, t) for x, t in zip(given, turns, strict=True)]
        n = max(p.shape[0] for p in parts)
        parts = [p.expand(n, *p.shape[1:]) if c and dim else p for p, c in zip(parts, constants, strict=True)]
        return torch.cat(parts, dim)

    act = activation(site.options["activation"]) if site.scale is None else None
    if site.scale is None or any(v.scale is None for v in found):
        return Layer(lambda *given: together(*given) if act is None else act(together(*given)), found, turned)
    if all(v.scale == site.scale for v in found):
        return Layer(together, found, turned)
    if site.scale.dtype == "int8":
        _same_scale(site, *found)
        return Layer(together, found, turned)
    return _rescaled_join(site, found, together, turned)


def _rescaled_join(site: Site, found: list[Value], together: Callable[..., Tensor], turned: bool) -> Layer:
    """uint8 values of different scales, each brought to the output's in float32."""
    out = _Out(site.scale)  # type: ignore[arg-type]
    if not site.whole:
        return Layer(lambda *given: out.twin(together(*given)), found, turned)
    tables = []
    for v in found:
        assert v.scale is not None
        q = integers.all_of(v.scale.lo, v.scale.hi)
        if v.scale != out.scale:
            k = np.float32(v.scale.step) * (np.float32(1) / np.float32(out.scale.step))
            b = np.float32(-v.scale.zero) * k
            q = integers.away(q.astype(np.float32) * k + b) + out.scale.zero
        tables.append(_Looked(v.scale, out, q))

    def compute(*given: Tensor) -> Tensor:
        return together(*(t(x) for t, x in zip(tables, given, strict=True)))

    return Layer(lambda *given: exact(out.twin(together(*given)), compute, *given), found, turned)


def _packed(site: Site, values: list[Value], axis: int) -> Layer:
    found = [site.tensor(v) for v in values]
    rank = max(v.rank for v in found) + 1
    turned = [v.turned for v in found]
    _same_scale(site, *found)
    site.room((len(found), *found[0].sample.shape))

    def call(*given: Tensor) -> Tensor:
        y = torch.stack([to_file(x, t) for x, t in zip(given, turned, strict=True)], axis)
        return y.permute(TURN) if rank == 4 else y

    return Layer(call, found, rank == 4)


@_operator("UNPACK")
def _unpacked(site: Site) -> Layer:
    x, axis = site.read(0), int(site.options["axis"])
    if x.known:
        n = x.sample.shape[axis] if -x.rank <= axis < x.rank else 0
        return _of_parts(site, lambda v: tuple(np.moveaxis(v, axis, 0)), n)
    four = x.rank == 5
    dim = axis % x.rank
    if dim == 0 or len(site.outputs) != _file_shape(x)[dim]:
        raise Unsupported("it takes the batch, or not all of an axis, apart, which is not supported")
    turned = x.turned

    def call(x: Tensor) -> tuple[Tensor, ...]:
        parts = to_file(x, turned).unbind(dim)
        return tuple(p.permute(TURN) for p in parts) if four else parts

    return Layer(call, [x], [four] * len(site.outputs))


def _of_parts(site: Site, function: Callable[..., tuple[np.ndarray, ...]], n: int) -> Layer:
    if n != len(site.outputs):
        raise InputError(f"it makes {n} values and names {len(site.outputs)}")

    def call(value: Any) -> Any:
        parts = tuple(np.asarray(p) for p in function(value))
        return parts[0] if n == 1 else parts

    return Layer(call, [site.read(0)], [False] * n, seen=False)


@_operator("SPLIT", "SPLIT_V")
def _split(site: Site) -> Layer:
    by_size = site.operator.code == "SPLIT_V"
    x = site.read(0 if by_size else 1)
    axis = int(site.array(2 if by_size else 0).reshape(-1)[0])
    if x.known:
        raise Unsupported("of a constant or a shape it is not supported")
    dim, n = held(axis, x.rank, x.turned), len(site.outputs)
    length = x.sample.shape[dim]
    sizes = [int(s) for s in site.array(1).reshape(-1)] if by_size else [length // n] * n
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = length - (sum(sizes) + 1)
    if sum(sizes) != length or len(sizes) != n or min(sizes) < 0 or not dim:
        raise InputError(f"it cuts an axis of {length} into {sizes[:8]}")
    return Layer(lambda x: x.split(sizes, dim) if n > 1 else x, [x], [x.turned] * n)


@_operator("SLICE")
def _slice(site: Site) -> Layer:
    x, begin, size = site.read(0), site.array(1).reshape(-1), site.array(2).reshape(-1)
    if len(begin) != x.rank or len(size) != x.rank:
        raise InputError(f"it cuts {len(begin)} axes of a value with {x.rank}")
    shape = x.sample.shape if x.known else _file_shape(x)
    cuts = [
        slice(int(b), int(b) + (int(s) if s >= 0 else n - int(b))) for b, s, n in zip(begin, size, shape, strict=True)
    ]
    if any(c.start < 0 or c.stop > n or c.stop < c.start for c, n in zip(cuts, shape, strict=True)):
        raise InputError(f"it cuts {begin.tolist()} with sizes {size.tolist()} out of {tuple(shape)}")
    return _cut(site, x, cuts)


@_operator("STRIDED_SLICE")
def _strided_slice(site: Site) -> Layer:
    x = site.read(0)
    begin, end, step = (site.array(i).reshape(-1).tolist() for i in (1, 2, 3))
    options = site.options
    if options["ellipsis"] or options["new_axis"]:
        raise Unsupported("with an ellipsis or a new axis it is not supported")
    if not len(begin) == len(end) == len(step) <= x.rank or 0 in step:
        raise InputError(f"it cuts from {begin} to {end} in steps of {step}, of a value with {x.rank} axes")
    shape = x.sample.shape if x.known else _file_shape(x)
    cuts: list[Any] = [slice(None)] * len(shape)
    for d, (b, e, s) in enumerate(zip(begin, end, step, strict=True)):
        if options["shrink_axis"] >> d & 1:
            if not -shape[d] <= b < shape[d]:
                raise InputError(f"it takes element {b} of an axis of {shape[d]}")
            cuts[d] = int(b)
            continue
        cuts[d] = slice(
            None if options["begin"] >> d & 1 else int(b), None if options["end"] >> d & 1 else int(e), int(s)
        )
    return _cut(site, x, cuts)


def _cut(site: Site, x: Value, cuts: list[Any]) -> Layer:
    if x.known:
        return _of_arrays(site, lambda v, *_: v[tuple(cuts)])
    _same_scale(site, x)
    shape = _file_shape(x)
    first = cuts[0]
    if not isinstance(first, slice) or len(range(*first.indices(shape[0]))) != shape[0]:
        raise Unsupported("it takes some images of the batch, which is not supported")
    places = [c if not isinstance(c, slice) else range(*c.indices(n)) for c, n in zip(cuts, shape, strict=True)]
    places[0] = None
    turned = x.turned

    def call(x: Tensor) -> Tensor:
        here = by_held(places, turned)
        index: list[Any] = []
        for d, p in enumerate(here):
            if isinstance(p, range) and p.step < 0:
                x, p = x.flip(d), range(x.shape[d] - 1 - p.start, x.shape[d] - 1 - p.stop, -p.step)
            index.append(slice(p.start, p.stop, p.step) if isinstance(p, range) else slice(None) if p is None else p)
        gone = [d for d, p in enumerate(here) if isinstance(p, int)]
        y = x[tuple(index)]
        return y.movedim(1, -1) if turned and gone and 1 not in gone and y.dim() > 2 else y

    dropped = any(isinstance(p, int) for p in places)
    return Layer(call, [x], turned and not dropped)


@_operator("GATHER")
def _gather(site: Site) -> Layer:
    x, places = site.read(0), site.array(1)
    axis = int(site.options["axis"])
    if site.options["batch_dims"]:
        raise Unsupported("for each image apart it is not supported")
    if x.known:
        return _of_arrays(site, lambda v, p: np.take(v, p, axis=axis))
    _same_scale(site, x)
    dim = held(axis, x.rank, x.turned)
    length = x.sample.shape[dim]
    if dim == 0 or places.size == 0 or places.ndim > 1 or places.min() < 0 or places.max() >= length:
        raise Unsupported(f"it picks {places.shape} elements of an axis of {length}, which is not supported")
    chosen = [int(p) for p in places.reshape(-1)]
    site.room([len(chosen) if d == dim else n for d, n in enumerate(x.sample.shape)])
    drop, turned = places.ndim == 0, x.turned
    if drop and turned and dim != 1:
        return Layer(lambda x: x.select(dim, chosen[0]).movedim(1, -1), [x], False)
    if drop:
        return Layer(lambda x: x.select(dim, chosen[0]), [x], False)
    return Layer(lambda x: _picked(x, dim, chosen), [x], turned)


@_operator("REVERSE_V2")
def _reversed(site: Site) -> Layer:
    x = site.read(0)
    dims = [held(int(a), x.rank, x.turned) for a in site.array(1).reshape(-1)]
    return Layer(lambda x: x.flip(dims), [x], x.turned)


@_operator("TILE", "BROADCAST_TO")
def _tiled(site: Site) -> Layer:
    x, times = site.read(0), site.read(1)
    if not times.known:
        raise Unsupported("how often is computed as it runs, which is not supported")
    if x.known:
        return _of_arrays(site, np.tile if site.operator.code == "TILE" else lambda v, s: np.broadcast_to(v, s))
    counts = [int(t) for t in times.sample.reshape(-1)]
    _same_scale(site, x)
    if not times.constant or len(counts) != x.rank or min(counts, default=0) < 1:
        raise Unsupported(f"by {counts[:8]} it is not supported")
    if site.operator.code == "BROADCAST_TO":
        counts = [c // n if n == 1 else 1 for c, n in zip(counts, _file_shape(x), strict=True)]
    repeats = by_held(counts, x.turned)
    if repeats[0] != 1:
        raise Unsupported("it repeats the batch, which is not supported")
    site.room([n * r for n, r in zip(x.sample.shape, repeats, strict=True)])
    return Layer(lambda x: x.repeat(repeats), [x], x.turned)


@_operator("CAST")
def _cast(site: Site) -> Layer:
    x, dtype = site.read(0), site.outputs[0].dtype
    if x.known:
        if dtype not in ("int32", "int64", "float32", "uint8", "int8", "bool"):
            raise Unsupported(f"to {dtype} it is not supported")
        return _of_arrays(site, lambda v: v.astype(dtype))
    if dtype != "float32" or (x.scale is not None and (x.scale.step, x.scale.zero) != (1.0, 0)):
        raise Unsupported(f"from {x.record.dtype} to {dtype} it is not supported")
    return Layer(lambda x: x.float() if not x.is_floating_point() else x, [x], x.turned)


@_operator("SPACE_TO_DEPTH", "DEPTH_TO_SPACE")
def _space_and_depth(site: Site) -> Layer:
    x, turn = _map(site)
    block = int(site.options["block"])
    _, c, h, w = _turned(x.sample, turn).shape
    down = site.operator.code == "SPACE_TO_DEPTH"
    if block < 1 or (h % block or w % block if down else c % block**2):
        raise InputError(f"blocks of {block} do not fit {c} channels of {h}x{w}")
    _same_scale(site, x)

    def call(x: Tensor) -> Tensor:
        x = _turned(x, turn)
        n, c, h, w = x.shape
        if down:
            parts = x.reshape(n, c, h // block, block, w // block, block)
            return parts.permute(0, 3, 5, 1, 2, 4).reshape(n, -1, h // block, w // block)
        parts = x.reshape(n, block, block, c // block**2, h, w)
        return parts.permute(0, 3, 4, 1, 5, 2).reshape(n, -1, h * block, w * block)

    return Layer(call, [x], True)


@_operator("SPACE_TO_BATCH_ND", "BATCH_TO_SPACE_ND")
def _space_and_batch(site: Site) -> Layer:
    """Blocks become images of the batch. Those of one image stay together, in an order that no file can see."""
    x, turn = _map(site)
    blocks = [int(b) for b in site.array(1).reshape(-1)]
    edges = site.array(2)
    if len(blocks) != 2 or edges.shape != (2, 2) or min(blocks) < 1 or (edges < 0).any():
        raise Unsupported(f"with blocks {blocks} it is not supported")
    (top, bottom), (left, right) = (tuple(int(v) for v in e) for e in edges)
    b, count = blocks, math.prod(blocks)
    _same_scale(site, x)
    n, c, h, w = _turned(x.sample, turn).shape
    if site.operator.code == "SPACE_TO_BATCH_ND":
        site.room((n, c, h + top + bottom, w + left + right))
        if (h + top + bottom) % b[0] or (w + left + right) % b[1]:
            raise InputError(f"blocks {blocks} do not fit {h}x{w}")
        # TFLite-Micro fills with the integer 0, whatever the zero point is.
        value = x.scale.real(0) if x.scale is not None and site.micro else 0.0

        def apart(x: Tensor) -> Tensor:
            x = F.pad(_turned(x, turn), (left, right, top, bottom), value=value)
            n, c, h, w = x.shape
            parts = x.reshape(n, c, h // b[0], b[0], w // b[1], b[1]).permute(0, 3, 5, 1, 2, 4)
            return parts.reshape(n * count, c, h // b[0], w // b[1])

        return Layer(apart, [x], True)
    if n % count or top + bottom >= h * b[0] or left + right >= w * b[1]:
        raise InputError(f"blocks {blocks} do not fit a batch of {n} maps of {h}x{w}")

    def together(x: Tensor) -> Tensor:
        x = _turned(x, turn)
        n, c, h, w = x.shape
        parts = x.reshape(n // count, b[0], b[1], c, h, w).permute(0, 3, 4, 1, 5, 2)
        whole = parts.reshape(n // count, c, h * b[0], w * b[1])
        return whole[:, :, top : h * b[0] - bottom, left : w * b[1] - right]

    return Layer(together, [x], True)


# -- resizing


def _new_size(site: Site) -> tuple[int, int]:
    size = [int(s) for s in site.array(1).reshape(-1)]
    if len(size) != 2 or min(size) < 1:
        raise InputError(f"it makes a map of size {size}")
    return size[0], size[1]


@_operator("RESIZE_NEAREST_NEIGHBOR")
def _nearest(site: Site) -> Layer:
    x, turn = _map(site)
    size = _new_size(site)
    corners, half = bool(site.options["align_corners"]), bool(site.options["half_pixel"])
    n, c, *_ = _turned(x.sample, turn).shape
    site.room((n, c, *size))
    _same_scale(site, x)
    f32 = np.float32

    def places(n: int, out: int) -> list[int]:
        j = np.arange(out, dtype=np.float32)
        if corners and out > 1:
            at = integers.away(j * (f32(n - 1) / f32(out - 1)))
        else:
            at = np.floor((j + f32(0.5) if half else j) * (f32(n) / f32(out))).astype(np.int64)
        return np.minimum(at, n - 1).tolist()

    def call(x: Tensor) -> Tensor:
        x = _turned(x, turn)
        ask = [places(x.shape[2], size[0]), places(x.shape[3], size[1])]
        if all(out % n == 0 and at == [i // (out // n) for i in range(out)]
               for n, out, at in zip(x.shape[2:], size, ask, strict=True)):  # fmt: skip
            return F.interpolate(x, size, mode="nearest")
        return _picked(_picked(x, 2, ask[0]), 3, ask[1])

    return Layer(call, [x], True)


@_operator("RESIZE_BILINEAR")
def _bilinear(site: Site) -> Layer:
    x, turn = _map(site)
    size = _new_size(site)
    corners, half = bool(site.options["align_corners"]), bool(site.options["half_pixel"])
    n, c, *_ = _turned(x.sample, turn).shape
    site.room((n, c, *size))

    def function(x: Tensor) -> Tensor:
        x = _turned(x, turn)
        if corners or half:
            return F.interpolate(x, size, mode="bilinear", align_corners=corners)
        rows, columns = (_blend(n, out).to(x) for n, out in zip(x.shape[2:], size, strict=True))
        return rows @ x @ columns.T

    if x.scale is None or site.scale is None:
        return Layer(function, [x], True)
    _same_scale(site, x)
    out, scale = _Out(site.scale), x.scale
    if not site.whole:
        return Layer(lambda x: out.twin(function(x)), [x], True)
    resize = _resized_uint8 if scale.dtype == "uint8" else _resized_int8

    def compute(x: Tensor) -> Tensor:
        q = scale.centered(_turned(x, turn)).double() + scale.zero
        return out.real(resize(q, size, corners, half) - scale.zero)

    return Layer(lambda x: exact(out.twin(function(x)), compute, x), [x], True)


def _blend(n: int, out: int) -> Tensor:
    """(out, n): bilinear weights of positions j n / out."""
    at = torch.arange(out, dtype=torch.float32) * (n / out)
    low = at.floor().clamp(max=n - 1)
    high = (low + 1).clamp(max=n - 1)
    weights = torch.zeros(out, n)
    rows = torch.arange(out)
    weights.index_put_((rows, low.long()), 1 - (at - low), accumulate=True)
    weights.index_put_((rows, high.long()), at - low, accumulate=True)
    return weights


def _resized_int8(q: Tensor, size: tuple[int, int], corners: bool, half: bool) -> Tensor:
    """10 bits behind the point in each direction."""

    def taps(n: int, out: int) -> tuple[Tensor, Tensor, Tensor]:
        scale = (n * 1024 + out // 2) // out
        if corners and out > 1:
            scale = ((n - 1) * 1024 + (out - 1) // 2) // (out - 1)
        p = np.arange(out, dtype=np.int64) * scale
        if half:
            p = p + scale // 2 - 512
        low = np.maximum(np.trunc(p / 1024).astype(np.int64), 0)
        high = np.minimum(np.trunc((p + 1023) / 1024).astype(np.int64), n - 1)
        low = np.minimum(low, n - 1)
        return tuple(torch.from_numpy(np.asarray(v)).to(q.device) for v in (low, high, p - 1024 * low))  # type: ignore[return-value]

    (y0, y1, fy), (x0, x1, fx) = (taps(n, out) for n, out in zip(q.shape[2:], size, strict=True))
    fy, fx = fy[:, None].double(), fx[None, :].double()
    up, down = q.index_select(2, y0), q.index_select(2, y1.clamp(min=0))
    v = (up.index_select(3, x0) * (1024 - fx) + up.index_select(3, x1.clamp(min=0)) * fx) * (1024 - fy)
    v = v + (down.index_select(3, x0) * (1024 - fx) + down.index_select(3, x1.clamp(min=0)) * fx) * fy
    return torch.trunc((v + torch.where(v > 0, 2.0**19, -(2.0**19))) / 2**20)


def _resized_uint8(q: Tensor, size: tuple[int, int], corners: bool, half: bool) -> Tensor:
    """In float32, cut off behind one half more."""
    f32 = np.float32

    def taps(n: int, out: int) -> tuple[Tensor, Tensor, Tensor]:
        scale = f32(n - 1) / f32(out - 1) if corners and out > 1 else f32(n) / f32(out)
        j = np.arange(out, dtype=np.float32)
        p = (j + f32(0.5)) * scale - f32(0.5) if half else j * scale
        low = np.maximum(np.floor(p), 0)
        high = np.minimum(np.ceil(p), n - 1)
        return (
            torch.from_numpy(low.astype(np.int64)).to(q.device),
            torch.from_numpy(np.maximum(high, 0).astype(np.int64)).to(q.device),
            torch.from_numpy((p - low).astype(np.float32)).to(q.device),
        )

    (y0, y1, fy), (x0, x1, fx) = (taps(n, out) for n, out in zip(q.shape[2:], size, strict=True))
    fy, fx, q = fy[:, None], fx[None, :], q.float()
    up, down = q.index_select(2, y0), q.index_select(2, y1)
    v = up.index_select(3, x0) * (1 - fy) * (1 - fx) + down.index_select(3, x0) * fy * (1 - fx)
    v = v + up.index_select(3, x1) * (1 - fy) * fx + down.index_select(3, x1) * fy * fx
    return torch.trunc(v + 0.5).double()
