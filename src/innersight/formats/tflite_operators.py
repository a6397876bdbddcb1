"""TFLite's operators that compute: sums and products of two values, functions of one, softmax, means."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from innersight.errors import InputError, Unsupported
from innersight.formats import tflite_integers as integers
from innersight.formats.graph import exact
from innersight.formats.tflite_values import (
    TURN,
    Layer,
    Looked,
    Out,
    Pointwise,
    Scale,
    Site,
    Value,
    activation,
    aligned,
    bounds,
    file_shape,
    held,
    minus_one_to_one,
    of_arrays,
    operator,
    same_axes,
    same_scale,
    to_file,
)

# -- sums and products of two values


@operator("ADD", "SUB", "MUL", "DIV", "MAXIMUM", "MINIMUM", "POW", "SQUARED_DIFFERENCE")
def _two_values(site: Site) -> Layer:
    code, a, b = site.operator.code, site.read(0), site.read(1)
    if a.known and b.known:
        return of_arrays(site, _ARRAY_FUNCTIONS[code])
    (va, vb), turns, turned = same_axes(site, (a, b))
    rank = max(va.rank, vb.rank)
    function = _FUNCTIONS[code]
    shape = np.broadcast_shapes(
        *(aligned(v.sample, t, rank, turned).shape for v, t in zip((va, vb), turns, strict=True))
    )
    site.room(shape)

    def two(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return aligned(a, turns[0], rank, turned), aligned(b, turns[1], rank, turned)

    if va.scale is None or vb.scale is None or site.scale is None:
        act = activation(site.options.get("activation", 0))

        def real(a: Tensor, b: Tensor) -> Tensor:
            y = function(*two(a, b))
            return y if act is None else act(y)

        return Layer(real, [va, vb], turned)
    out = Out(site.scale, *bounds(site.scale, site.options.get("activation", 0)))
    if code in ("MAXIMUM", "MINIMUM"):
        same_scale(site, va, vb)
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

    def __init__(self, site: Site, out: Out, a: Scale, b: Scale):
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
    def __init__(self, site: Site, out: Out, a: Scale, b: Scale):
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
    "RELU": F.relu, "RELU6": F.relu6, "RELU_N1_TO_1": minus_one_to_one,
    "RELU_0_TO_1": lambda x: torch.clamp(x, 0.0, 1.0),
    "LOGISTIC": torch.sigmoid, "TANH": torch.tanh, "EXP": torch.exp, "LOG": torch.log, "SQRT": torch.sqrt,
    "RSQRT": torch.rsqrt, "ABS": torch.abs, "NEG": torch.neg, "SQUARE": torch.square, "SIN": torch.sin,
    "COS": torch.cos, "FLOOR": torch.floor, "CEIL": torch.ceil, "ROUND": torch.round, "ELU": F.elu, "GELU": _gelu,
    "HARD_SWISH": F.hardswish, "LEAKY_RELU": F.leaky_relu, "SIGN": torch.sign,
}  # fmt: skip
_QUANTISED_ONE = "RELU RELU6 RELU_N1_TO_1 LOGISTIC TANH EXP ABS ELU GELU HARD_SWISH LEAKY_RELU".split()


@operator(*_ONE)
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
    out = Out(site.scale, lo, hi)
    return _through_table(site, x, out, function, lambda q: _of_integers(site, x.scale, q))  # type: ignore[arg-type]


def _through_table(site: Site, x: Value, out: Out, function: Callable[[Tensor], Tensor],
                   table: Callable[[np.ndarray], np.ndarray]) -> Layer:  # fmt: skip
    """A function of one integer; the twin of one that never leaves the range but by rounding keeps its slope there."""
    assert x.scale is not None
    bounded = site.operator.code in ("LOGISTIC", "TANH")

    def twin(x: Tensor) -> Tensor:
        return function(x) if bounded else out.twin(function(x))

    if not site.whole:
        return Layer(twin, [x], x.turned, lo=out.lo, hi=out.hi)
    compute = Looked(x.scale, out, table(integers.all_of(x.scale.lo, x.scale.hi)))
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


@operator("PRELU")
def _prelu(site: Site) -> Layer:
    x = site.read(0)
    if x.scale is not None:
        raise Unsupported("of integers it is not supported")
    slope = site.tensor(site.read(1), x.turned, x.rank)
    channels = x.sample.shape[1] if x.sample.dim() > 1 else 0
    if slope.sample.numel() in (1, channels) and slope.sample.dim() > 1 and slope.sample.shape[1] in (1, channels):
        return Layer(lambda x, a: F.prelu(x, a.flatten()), [x, slope], x.turned)
    return Layer(lambda x, a: F.relu(x) - a * F.relu(-x), [x, slope], x.turned)


@operator("QUANTIZE")
def _quantize(site: Site) -> Layer:
    x = site.read(0)
    if site.scale is None or x.known:
        raise Unsupported("it does not make int8 or uint8, which is not supported")
    out = Out(site.scale)
    if x.scale is None:
        return quantized_input(site, x, out)
    source = x.scale

    def rescaled(q: np.ndarray) -> np.ndarray:
        ratio = np.float64(source.step) / np.float64(out.scale.step)
        return integers.twice_rounded(q - source.zero, *integers.multiplier(ratio)) + out.scale.zero

    return _through_table(site, x, out, lambda x: x, rescaled)


class _Rounded(Pointwise):
    """Real values to the nearest integer, half away from zero."""

    def __init__(self, out: Out):
        self.out = out

    def __call__(self, x: Tensor) -> Tensor:
        if bool(torch.isnan(x).any()):
            raise InputError("the picture given holds NaN (not a number), which no integer stands for")
        q = (x.double() / self.out.scale.step).float().double()
        return self.out.real(torch.copysign(torch.floor(q.abs() + 0.5), q))


def quantized_input(site: Site, x: Value, out: Out) -> Layer:
    compute = _Rounded(out)
    if not site.whole:
        return Layer(lambda x: out.twin(x), [x], x.turned)
    return Layer(lambda x: exact(out.twin(x), compute, x), [x], x.turned)


# -- over axes


@operator("SOFTMAX", "LOG_SOFTMAX")
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
    scale, out = x.scale, Out(site.scale)
    if abs(out.scale.step * 256 - 1) > 1e-3 or out.scale.zero != out.scale.lo:
        raise Unsupported(f"it answers in steps of {out.scale.step:.6g}, the kernels do in 1/256")
    if not site.whole:
        return Layer(function, [x], x.turned)
    kernel = integers.Softmax(scale.step, beta, out.scale.lo, out.scale.hi)

    def compute(x: Tensor) -> Tensor:
        q = kernel(scale.index(x).movedim(dim, -1) + scale.lo)
        return out.real(q.movedim(-1, dim) - out.scale.zero)

    return Layer(lambda x: exact(function(x), compute, x), [x], x.turned)


@operator("MEAN", "SUM", "REDUCE_MAX", "REDUCE_MIN", "REDUCE_PROD")
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
        same_scale(site, x)
        pick = torch.amax if code == "REDUCE_MAX" else torch.amin
        return Layer(lambda x: put_back(pick(x, dims, keep)), [x], turned)
    total = torch.mean if code == "MEAN" else torch.sum

    def function_of(x: Tensor) -> Tensor:
        return put_back(total(x, dims, keepdim=keep))

    if x.scale is None or site.scale is None:
        return Layer(function_of, [x], turned)
    if code != "MEAN":
        raise Unsupported("of integers it is not supported")
    out, scale = Out(site.scale), x.scale
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


@operator("ARG_MAX", "ARG_MIN")
def _best(site: Site) -> Layer:
    x = site.read(0)
    axis = int(site.array(1).reshape(-1)[0])
    dim = held(axis, x.rank, x.turned)
    pick = torch.argmax if site.operator.code == "ARG_MAX" else torch.argmin
    turn = x.turned and dim != 1
    return Layer(lambda x: pick(x, dim).movedim(1, -1) if turn else pick(x, dim), [x], False)


@operator("L2_NORMALIZATION")
def _unit_length(site: Site) -> Layer:
    x = site.read(0)
    if x.scale is not None:
        raise Unsupported("of integers it is not supported")
    return Layer(lambda x: F.normalize(x, dim=1 if x.dim() == 4 else -1, eps=1e-6), [x], x.turned)


@operator("BATCH_MATMUL")
def _matmul(site: Site) -> Layer:
    a, b = (site.tensor(v) for v in (site.read(0), site.read(1)))
    if a.scale is not None or b.scale is not None:
        raise Unsupported("of integers it is not supported")
    turn_a, turn_b = bool(site.options["adj_x"]), bool(site.options["adj_y"])
    four = max(a.rank, b.rank) == 4
    if min(a.rank, b.rank) < 2:
        raise InputError("it multiplies values with one axis")
    (*_, m, k), (*_, k2, n) = (file_shape(v) for v in (a, b))
    made = max(math.prod(file_shape(v)[:-2]) for v in (a, b)) * (k if turn_a else m) * (k2 if turn_b else n)
    site.room((made,), made * (m if turn_a else k))

    def call(x: Tensor, y: Tensor) -> Tensor:
        x, y = to_file(x, a.turned), to_file(y, b.turned)
        z = torch.matmul(x.transpose(-2, -1) if turn_a else x, y.transpose(-2, -1) if turn_b else y)
        return z.permute(TURN) if four and a.turned else z

    return Layer(call, [a, b], four and a.turned)
