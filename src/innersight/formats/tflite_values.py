"""What TFLite's operators are made with: values and their scales, axes, activations, and the table of makers.

A value between layers is a float32 tensor of real values. Of a quantised layer it holds `scale * (q - zero_point)`
exactly, so the integers come back by rounding, and whatever only moves numbers (max pooling, reshaping, padding with
the zero point) needs no arithmetic of its own. Every other quantised layer computes its float twin (convolution with
real weights, clamped to the range that its integers can hold) and then `exact(twin, compute, ...)`, whose value is what
the device's integers come to.

Four axes are kept as `(N, C, H, W)`, where the file has `(N, H, W, C)`: such a value is `turned`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from innersight.errors import InputError, Unsupported
from innersight.formats import tflite_integers as integers
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
    scores: whether the answers are made of its output alone; then its twin is not cut off at the ends of the range,
           where a sure network would have no slope
    room:  (shape, multiplications): raises where a value of such a shape, or so much work, is beyond what is run here
    """

    operator: Operator
    inputs: list[Value | None]
    outputs: list[TensorRecord]
    micro: bool
    whole: bool
    keep: Callable[[str, Tensor], Value]
    room: Callable[..., None]
    scores: bool = False

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


def same_axes(site: Site, values: Sequence[Value]) -> tuple[list[Value], list[bool], bool]:
    """Operands of an elementwise operator as tensors: which have to be turned first, and whether the result is."""
    rank = max(v.rank for v in values)
    live = [v for v in values if not v.constant and v.rank == rank]
    turned = rank == 4 and (any(v.turned for v in live) or not live)
    found = [site.tensor(v, turned, rank if v.constant and v.rank else None) for v in values]
    return found, [turned and v.rank == 4 and not v.turned for v in found], turned


def aligned(x: Tensor, turn: bool, rank: int, turned: bool) -> Tensor:
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
    functions: dict[int, Callable[[Tensor], Tensor]] = {1: F.relu, 2: minus_one_to_one, 3: F.relu6}
    return functions.get(number)


def minus_one_to_one(x: Tensor) -> Tensor:
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


class Out:
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
        """From q - zero, unclamped, in a tensor of its own, which is overwritten."""
        return q.clamp_(self.lo - self.scale.zero, self.hi - self.scale.zero).float().mul_(self.scale.step)


class Pointwise:
    """A compute of `exact` whose every element depends on the elements in its own place alone."""

    pointwise = True


# ---------------------------------------------------------------------------------------------------------------------
# The table

MAKERS: dict[str, Callable[[Site], Layer]] = {}


def operator(*names: str) -> Callable[[Callable[[Site], Layer]], Callable[[Site], Layer]]:
    def register(make: Callable[[Site], Layer]) -> Callable[[Site], Layer]:
        MAKERS.update(dict.fromkeys(names, make))
        return make

    return register


# -- what several of them need


def picture(site: Site, position: int = 0) -> tuple[Value, bool]:
    """A picture that is read, and whether it has to be turned first."""
    x = site.read(position)
    if x.constant or x.known or x.rank != 4:
        raise Unsupported(f"it reads a value with {x.rank} axes, expected a picture with 4")
    return x, not x.turned


def turned_if(x: Tensor, turn: bool) -> Tensor:
    return x.permute(TURN) if turn else x


def same_scale(site: Site, *values: Value) -> None:
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


class Looked(Pointwise):
    """A function of one 8-bit integer, by its table of 256 real values."""

    def __init__(self, scale: Scale, out: Out, q: np.ndarray):
        q = np.clip(q, out.lo, out.hi)
        self.scale = scale
        self.table = torch.from_numpy((q - out.scale.zero).astype(np.float32)) * out.scale.step

    def __call__(self, x: Tensor) -> Tensor:
        return self.table.to(x.device)[self.scale.index(x)]


def of_arrays(site: Site, function: Callable[..., np.ndarray]) -> Layer:
    """Bookkeeping on shapes, in the file's axes, which nobody watches."""

    def call(*values: Any) -> np.ndarray:
        result = np.asarray(function(*values))
        if result.size > 1 << 20:
            raise InputError("it makes a list of more than a million numbers")
        return result

    return Layer(call, [v for v in site.inputs if v is not None], seen=False)


def file_shape(x: Value) -> tuple[int, ...]:
    shape = tuple(x.sample.shape)
    return tuple(shape[a] for a in BACK) if x.turned else shape
