"""What each ONNX operator computes, as torch calls: one function a row of OPERATORS, by the operator's name.

A function is called `f(n, *inputs)`: `n` is the node (its attributes and the version of the operator set), inputs are
tensors, None where the file leaves one out, and plain lists of numbers where a shape, an axis or the like is constant.
Where torch has a function for the operator (`F.conv2d`, `F.batch_norm`, `F.layer_norm`) it is that one which is called,
so that rules, class activation maps and receptive fields know what they see.

The reference is the operators' specification (https://onnx.ai/onnx/operators), and ONNX Runtime where it leaves room.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from innersight import errors
from innersight.formats import onnx_limits as limits

Value = Any  # a tensor, or a list of numbers


@dataclass
class Node:
    """One node of a file.

    inputs, outputs: names of values; "" where one is left out
    attributes:      plain values; tensors as tensors, graphs as what `onnx.py` makes of them
    opset:           version of the operator set that the node is from
    batch:           the only batch size the file was written for; None if it takes any
    """

    name: str
    op: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    opset: int = 1
    batch: int | None = None
    scope: str = ""

    def get(self, name: str, default: Any = None) -> Any:
        return self.attributes.get(name, default)

    def wants(self, output: int) -> bool:
        return len(self.outputs) > output and bool(self.outputs[output])

    @property
    def key(self) -> str:
        return self.op if not self.domain else f"{self.domain}:{self.op}"


Operator = Callable[..., Any]
OPERATORS: dict[str, Operator] = {}
CONTRIB = "com.microsoft"

HOST: dict[str, tuple[int, ...]] = {}
"""Inputs that are no data but say what to do: shapes, axes, counts."""


def operator(*names: str, host: Sequence[int] = ()) -> Callable[[Operator], Operator]:
    def register(function: Operator) -> Operator:
        for name in names:
            OPERATORS[name] = function
            HOST[name] = tuple(host)
        return function

    return register


def refuse(n: Node, why: str) -> errors.Unsupported:
    return errors.Unsupported(f"{n.op} {n.name!r} {why}")


def allowed(shape: Sequence[int]) -> list[int]:
    """The shape, unless it is more than a picture can need."""
    limits.check(math.prod(shape) * 4, limits.bound())
    return list(shape)


def numbers(value: Value) -> list:
    """The numbers in a host input; reading them is no operation of the network."""
    if isinstance(value, (list, tuple)):
        return list(value)
    with torch._C.DisableTorchFunction():
        found = value.tolist()
    return found if isinstance(found, list) else [found]


def ints(value: Value) -> list[int]:
    return [int(v) for v in numbers(value)]


def unseen(function: Callable[..., Any], *args: Any) -> Any:
    """What a function of shapes alone makes, out of sight."""
    with torch.no_grad(), torch._C.DisableTorchFunction():
        return function(*args)


def constant(values: Any, like: torch.Tensor) -> torch.Tensor:
    """A table beside `like`, in its type if both are floating.

    It is made in sight, so that an observer knows it for a constant, and filled out of sight.
    """
    given = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    with torch._C.DisableTorchFunction():
        kind = like.dtype if given.is_floating_point() and like.is_floating_point() else given.dtype
        shape, device = tuple(given.shape), like.device
    made = torch.empty(shape, dtype=kind, device=device)
    unseen(made.copy_, given)
    return made


# --- element by element ----------------------------------------------------------------------------------------------

_UNARY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Relu": F.relu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "Abs": torch.abs,
    "Neg": torch.neg,
    "Exp": torch.exp,
    "Log": torch.log,
    "Sqrt": torch.sqrt,
    "Reciprocal": torch.reciprocal,
    "Floor": torch.floor,
    "Ceil": torch.ceil,
    "Round": torch.round,
    "Erf": torch.erf,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Cos": torch.cos,
    "Tan": torch.tan,
    "Asin": torch.asin,
    "Acos": torch.acos,
    "Atan": torch.atan,
    "Sinh": torch.sinh,
    "Cosh": torch.cosh,
    "Asinh": torch.asinh,
    "Acosh": torch.acosh,
    "Atanh": torch.atanh,
    "HardSwish": F.hardswish,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Mish": F.mish,
    "Not": torch.logical_not,
    "BitwiseNot": torch.bitwise_not,
    "IsNaN": torch.isnan,
    "Det": torch.det,
}


def _unary(function: Callable[[torch.Tensor], torch.Tensor]) -> Operator:
    return lambda _n, x: function(x)


for _name, _function in _UNARY.items():
    operator(_name)(_unary(_function))


def _divide(a: Any, b: Any) -> Any:
    """Integers are divided toward zero."""
    whole = isinstance(a, torch.Tensor) and not a.is_floating_point()
    whole = whole and (isinstance(b, int) or (isinstance(b, torch.Tensor) and not b.is_floating_point()))
    return torch.div(a, b, rounding_mode="trunc") if whole else a / b


def _power(a: Any, b: Any) -> Any:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dtype != b.dtype:
        return torch.pow(a.to(b.dtype) if b.is_floating_point() else a, b).to(a.dtype)
    return torch.pow(a, b)


_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": _divide,
    "Pow": _power,
    "Equal": lambda a, b: a == b,
    "Less": lambda a, b: a < b,
    "LessOrEqual": lambda a, b: a <= b,
    "Greater": lambda a, b: a > b,
    "GreaterOrEqual": lambda a, b: a >= b,
    "And": lambda a, b: torch.logical_and(a, b),
    "Or": lambda a, b: torch.logical_or(a, b),
    "Xor": lambda a, b: torch.logical_xor(a, b),
    "BitwiseAnd": lambda a, b: torch.bitwise_and(a, b),
    "BitwiseOr": lambda a, b: torch.bitwise_or(a, b),
    "BitwiseXor": lambda a, b: torch.bitwise_xor(a, b),
}
SCALAR = frozenset("Add Sub Mul Div Pow Min Max Sum".split())
"""Operators that may be handed a single constant as a plain number."""


def _binary(function: Callable[[Any, Any], Any]) -> Operator:
    def run(n: Node, a: Any, b: Any) -> Any:
        if n.opset < 7 and n.get("broadcast") and isinstance(b, torch.Tensor) and "axis" in n.attributes:
            axis = n.get("axis") % max(a.dim(), 1)
            b = b.reshape(*b.shape, *[1] * (a.dim() - axis - b.dim()))  # aligned at an axis, not at the end
        return function(a, b)

    return run


for _name, _two in _BINARY.items():
    operator(_name)(_binary(_two))


@operator("Mod")
def _mod(n: Node, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.fmod(a, b) if n.get("fmod", 0) else torch.remainder(a, b)


@operator("BitShift")
def _shift(n: Node, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if n.get("direction") == b"LEFT":
        return torch.bitwise_left_shift(a, b)
    return torch.bitwise_right_shift(a, b)


def _fold(two: Callable[[Any, Any], Any]) -> Operator:
    def run(_n: Node, *values: Any) -> Any:
        result = values[0]
        for value in values[1:]:
            result = two(result, value)
        return result

    return run


def _extreme(tensor: Callable[..., torch.Tensor], low: bool) -> Callable[[Any, Any], Any]:
    def two(a: Any, b: Any) -> Any:
        if not isinstance(a, torch.Tensor):
            a, b = b, a
        if isinstance(b, torch.Tensor):
            return tensor(a, b)
        if low and b == 0:
            return F.relu(a)
        return torch.clamp(a, min=b) if low else torch.clamp(a, max=b)

    return two


operator("Sum")(_fold(lambda a, b: a + b))
operator("Max")(_fold(_extreme(torch.maximum, True)))
operator("Min")(_fold(_extreme(torch.minimum, False)))


@operator("Mean")
def _mean(n: Node, *values: torch.Tensor) -> torch.Tensor:
    return OPERATORS["Sum"](n, *values) / len(values)


@operator("Where")
def _where(_n: Node, condition: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.where(condition, a, b)


@operator("IsInf")
def _is_inf(n: Node, x: torch.Tensor) -> torch.Tensor:
    up, down = n.get("detect_positive", 1), n.get("detect_negative", 1)
    if up and down:
        return torch.isinf(x)
    return torch.isposinf(x) if up else torch.isneginf(x) if down else torch.zeros_like(x, dtype=torch.bool)


@operator("Clip", host=(1, 2))
def _clip(n: Node, x: torch.Tensor, low: Value = None, high: Value = None) -> torch.Tensor:
    if n.opset < 11:
        bounds = [n.get("min", -3.4028234663852886e38), n.get("max", 3.4028234663852886e38)]
    else:
        bounds = [None if b is None else numbers(b)[0] for b in (low, high)]
    least, most = (None if b is None or abs(b) >= 3.4e38 else b for b in bounds)
    if not x.is_floating_point():
        return torch.clamp(x, least, most) if (least, most) != (None, None) else x
    if (least, most) == (0, None):
        return F.relu(x)
    if (least, most) == (0, 6):
        return F.relu6(x)
    if least is not None and most is not None and least < most:
        return F.hardtanh(x, least, most)
    return torch.clamp(x, least, most) if (least, most) != (None, None) else x


@operator("LeakyRelu")
def _leaky(n: Node, x: torch.Tensor) -> torch.Tensor:
    return F.leaky_relu(x, n.get("alpha", 0.01))


@operator("Elu")
def _elu(n: Node, x: torch.Tensor) -> torch.Tensor:
    return F.elu(x, n.get("alpha", 1.0))


@operator("Celu")
def _celu(n: Node, x: torch.Tensor) -> torch.Tensor:
    return F.celu(x, n.get("alpha", 1.0))


@operator("Selu")
def _selu(n: Node, x: torch.Tensor) -> torch.Tensor:
    alpha, gamma = n.get("alpha", 1.6732632), n.get("gamma", 1.0507010)
    if abs(alpha - 1.6732632) < 1e-5 and abs(gamma - 1.0507010) < 1e-5:
        return F.selu(x)
    return F.elu(x, alpha) * gamma


@operator("HardSigmoid")
def _hard_sigmoid(n: Node, x: torch.Tensor) -> torch.Tensor:
    alpha, beta = n.get("alpha", 0.2), n.get("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return F.hardsigmoid(x)
    return torch.clamp(x * alpha + beta, 0, 1)


@operator("ThresholdedRelu")
def _thresholded(n: Node, x: torch.Tensor) -> torch.Tensor:
    return F.threshold(x, n.get("alpha", 1.0), 0.0)


@operator("Gelu", "com.microsoft:Gelu")
def _gelu(n: Node, x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh" if n.get("approximate", b"none") == b"tanh" else "none")


@operator("com.microsoft:FastGelu")
def _fast_gelu(_n: Node, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@operator("com.microsoft:BiasGelu")
def _bias_gelu(_n: Node, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.gelu(x + bias)


@operator("com.microsoft:QuickGelu")
def _quick_gelu(n: Node, x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x * n.get("alpha", 1.702))


@operator("Swish")
def _swish(n: Node, x: torch.Tensor) -> torch.Tensor:
    alpha = n.get("alpha", 1.0)
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(x * alpha)


@operator("Shrink")
def _shrink(n: Node, x: torch.Tensor) -> torch.Tensor:
    bias, lambd = n.get("bias", 0.0), n.get("lambd", 0.5)
    moved = torch.where(x < -lambd, x + bias, x - bias)
    return torch.where(x.abs() > lambd, moved, torch.zeros_like(x)).to(x.dtype)


@operator("PRelu")
def _prelu(n: Node, x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    channels = x.shape[1] if x.dim() > 1 else 1
    if n.opset < 7 and slope.dim() == 1 and slope.numel() > 1:
        return F.prelu(x, slope)
    per_channel = slope.numel() == channels and slope.dim() == x.dim() - 1 and slope.shape[0] == channels
    if x.is_floating_point() and (slope.numel() == 1 or per_channel):
        return F.prelu(x, slope.reshape(-1))
    return torch.where(x < 0, x * slope, x)


@operator("Identity", "Dropout")
def _identity(n: Node, x: torch.Tensor, *_ignored: Any) -> Any:
    if n.wants(1):
        return x, torch.ones_like(x, dtype=torch.bool)
    return x


@operator("ImageScaler")
def _image_scaler(n: Node, x: torch.Tensor) -> torch.Tensor:
    bias = x.new_tensor(n.get("bias", [0.0])).reshape(1, -1, 1, 1)
    return x * n.get("scale", 1.0) + bias


_TYPES = {1: None, 2: torch.uint8, 3: torch.int8, 4: torch.int32, 5: torch.int16, 6: torch.int32, 7: torch.int64,
          9: torch.bool, 10: None, 11: torch.float64, 12: torch.int64, 13: torch.int64, 16: None}  # fmt: skip


def dtype_of(n: Node, number: int, real: torch.dtype = torch.float32) -> torch.dtype:
    """The torch type for ONNX's number; unsigned ones that torch cannot compute with become wider signed ones."""
    if number not in _TYPES:
        raise refuse(n, f"makes numbers of a type ({number}) that is not supported")
    return _TYPES[number] or real


@operator("Cast")
def _cast(n: Node, x: torch.Tensor, reference: torch.Tensor | None = None) -> torch.Tensor:
    """Of floating types there is one, that of the network's input: `reference`."""
    return _to(x, dtype_of(n, n.get("to")), reference)


def _to(x: torch.Tensor, kind: torch.dtype, reference: torch.Tensor | None) -> torch.Tensor:
    if reference is not None and kind.is_floating_point:
        return x if x.is_floating_point() else x.to(reference.dtype)
    if kind == torch.bool:
        return x != 0
    if x.is_floating_point() and kind in (torch.uint8, torch.int8):
        return x.to(torch.int32).to(kind)
    return x.to(kind)


@operator("CastLike")
def _cast_like(_n: Node, x: torch.Tensor, like: torch.Tensor, reference: torch.Tensor | None = None) -> torch.Tensor:
    return _to(x, like.dtype, reference)


# --- layers with weights ---------------------------------------------------------------------------------------------

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_T = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _spatial(n: Node, x: torch.Tensor) -> int:
    d = x.dim() - 2
    if d not in (1, 2, 3):
        raise refuse(n, f"on {d} spatial dimensions is not supported (1 to 3 are)")
    return d


def _listed(n: Node, name: str, d: int, default: int = 1) -> list[int]:
    values = n.get(name) or [default] * d
    if len(values) != d:
        raise refuse(n, f"has {len(values)} {name} for {d} spatial dimensions")
    return list(values)


def margins(n: Node, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int],
            pool: bool = False) -> tuple[list[int], list[int]]:  # fmt: skip
    """Cells added (or, if negative, cut) before and behind each spatial dimension."""
    d = len(sizes)
    auto = n.get("auto_pad", b"NOTSET")
    if auto in (b"NOTSET", b""):
        pads = n.get("pads") or [0] * (2 * d)
        if len(pads) != 2 * d:
            raise refuse(n, f"has {len(pads)} pads for {d} spatial dimensions")
        return list(pads[:d]), list(pads[d:])
    if auto == b"VALID":
        return [0] * d, [0] * d
    before, behind = [], []
    for size, k, s, dil in zip(sizes, kernel, strides, dilations, strict=True):
        if pool:  # ONNX Runtime: the dilation does not count, halves go toward zero, and it may cut
            total = (math.ceil(size / s) - 1) * s + k - size
            half = int(total / 2) if auto == b"SAME_UPPER" else int((total + 1) / 2)
        else:
            total = max((math.ceil(size / s) - 1) * s + (k - 1) * dil + 1 - size, 0)
            half = total // 2 if auto == b"SAME_UPPER" else total - total // 2
        before.append(half)
        behind.append(total - half)
    return before, behind


def padded(x: torch.Tensor, before: Sequence[int], behind: Sequence[int], value: float = 0.0) -> torch.Tensor:
    """x with a margin around its last dimensions."""
    if not any(before) and not any(behind):
        return x
    allowed([side + p + q for side, p, q in zip(x.shape[-len(before) :], before, behind, strict=True)])
    pairs = [side for pair in zip(reversed(before), reversed(behind), strict=True) for side in pair]
    return F.pad(x, pairs, value=value)


@operator("Conv")
def _conv(n: Node, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
    d = _spatial(n, x)
    strides, dilations = _listed(n, "strides", d), _listed(n, "dilations", d)
    before, behind = margins(n, x.shape[2:], w.shape[2:], strides, dilations)
    if before != behind or min(before) < 0:
        x, before = padded(x, before, behind), [0] * d
    return _CONV[d](x, w, b, strides, before, dilations, n.get("group", 1))


@operator("com.microsoft:FusedConv")
def _fused_conv(n: Node, x: torch.Tensor, w: torch.Tensor, b: Any = None, z: Any = None) -> torch.Tensor:
    y = _conv(n, x, w, b)
    return activated(n, y if z is None else y + z)


def activated(n: Node, y: torch.Tensor) -> torch.Tensor:
    """The activation that a fused node names."""
    kind = n.get("activation", b"").decode()
    params = n.get("activation_params") or []
    if not kind:
        return y
    names = {"LeakyRelu": ("alpha",), "HardSigmoid": ("alpha", "beta"), "Clip": ("min", "max")}.get(kind, ())
    if kind not in (*_UNARY, "LeakyRelu", "HardSigmoid", "Clip"):
        raise refuse(n, f"ends in {kind}, which is not supported")
    return OPERATORS[kind](Node(n.name, kind, "", (), (), dict(zip(names, params, strict=False)), 6), y)


@operator("ConvTranspose")
def _conv_transpose(n: Node, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
    d = _spatial(n, x)
    strides, dilations = _listed(n, "strides", d), _listed(n, "dilations", d)
    extra = _listed(n, "output_padding", d, 0)
    groups = n.get("group", 1)
    auto, wanted = n.get("auto_pad", b"NOTSET"), n.get("output_shape")
    plain = [(i - 1) * s + (k - 1) * dil + 1
             for i, s, k, dil in zip(x.shape[2:], strides, w.shape[2:], dilations, strict=True)]  # fmt: skip
    full = [p + e for p, e in zip(plain, extra, strict=True)]
    if wanted or auto in (b"SAME_UPPER", b"SAME_LOWER"):
        out = wanted[-d:] if wanted else [min(i * s, f) for i, s, f in zip(x.shape[2:], strides, full, strict=True)]
        total = [max(f - o, 0) for f, o in zip(full, out, strict=True)]
        before = [t // 2 if auto == b"SAME_UPPER" else t - t // 2 for t in total]
    else:
        before, behind = margins(n, x.shape[2:], w.shape[2:], strides, dilations)
        out = [f - p - q for f, p, q in zip(full, before, behind, strict=True)]
    # torch takes equal margins, and an output_padding that is smaller than the stride or the dilation.
    over = [o - (p - 2 * q) for o, p, q in zip(out, plain, before, strict=True)]
    limits = zip(over, strides, dilations, before, strict=True)
    if all(0 <= e < max(s, dil) and p >= 0 for e, s, dil, p in limits):
        return _CONV_T[d](x, w, b, strides, before, over, groups, dilations)
    y = _CONV_T[d](x, w, None, strides, 0, 0, groups, dilations)
    y = padded(y, [-p for p in before], [o - (p - q) for o, p, q in zip(out, plain, before, strict=True)])
    return y if b is None else y + b.reshape(-1, *[1] * d)


@operator("DeformConv")
def _deform_conv(n: Node, x: torch.Tensor, w: torch.Tensor, offset: torch.Tensor, b: Any = None,
                 mask: Any = None) -> torch.Tensor:  # fmt: skip
    from torchvision.ops import deform_conv2d

    before, behind = margins(n, x.shape[2:], w.shape[2:], [1, 1], [1, 1])
    if before != behind:
        raise refuse(n, "has unequal pads, which is not supported")
    return deform_conv2d(x, offset, w, b, _listed(n, "strides", 2), before, _listed(n, "dilations", 2), mask)


@operator("Gemm")
def _gemm(n: Node, a: torch.Tensor, b: torch.Tensor, c: Any = None) -> torch.Tensor:
    alpha, beta = n.get("alpha", 1.0), n.get("beta", 1.0)
    if n.opset < 7 and a.dim() > 2:
        a = a.flatten(1)
    if n.get("transA", 0):
        a = a.transpose(0, 1)
    plain = not isinstance(c, torch.Tensor) or c.dim() == 1 or c.shape[:-1].numel() == 1
    if n.get("transB", 0) and alpha == 1 and beta == 1 and plain and (c is None or isinstance(c, torch.Tensor)):
        bias = c if c is None or c.dim() == 1 else c.reshape(-1)
        if bias is None or bias.numel() == b.shape[0]:
            return F.linear(a, b, bias)
    y = a @ (b.transpose(0, 1) if n.get("transB", 0) else b)
    y = y if alpha == 1 else y * alpha
    return y if c is None else y + (c if beta == 1 else c * beta)


@operator("MatMul")
def _matmul(n: Node, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return F.linear(a, b, bias) if n.get("turned") else torch.matmul(a, b)


@operator("com.microsoft:FusedMatMul")
def _fused_matmul(n: Node, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a = a.transpose(-1, -2) if n.get("transA", 0) else a
    b = b.transpose(-1, -2) if n.get("transB", 0) else b
    return torch.matmul(a, b) * n.get("alpha", 1.0)


@operator("Einsum")
def _einsum(n: Node, *values: torch.Tensor) -> torch.Tensor:
    return torch.einsum(n.get("equation").decode().replace(" ", ""), *values)


@operator("Attention")
def _attention(n: Node, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any = None,
               *past: Any) -> torch.Tensor:  # fmt: skip
    known = {"q_num_heads", "kv_num_heads", "scale", "is_causal", "softcap", "qk_matmul_output_mode",
             "softmax_precision"}  # fmt: skip
    if others := sorted(set(n.attributes) - known):
        raise refuse(n, f"has the attribute {others[0]!r}, which is not supported")
    if any(p is not None for p in past) or n.wants(1) or n.wants(2) or n.wants(3) or n.get("softcap", 0.0):
        raise refuse(n, "keeps keys of the past or has a soft cap, which is not supported")
    flat = q.dim() == 3
    if flat:
        heads, kv = n.get("q_num_heads"), n.get("kv_num_heads")
        q, k, v = (t.unflatten(2, (h, -1)).transpose(1, 2) for t, h in ((q, heads), (k, kv), (v, kv)))
    scale = n.get("scale")
    causal = bool(n.get("is_causal", 0))
    if causal and mask is not None:
        raise refuse(n, "has a mask and is causal, which is not supported")
    grouped = k.shape[1] != q.shape[1]
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return y.transpose(1, 2).flatten(2) if flat else y


# --- normalization ---------------------------------------------------------------------------------------------------


@operator("BatchNormalization")
def _batch_norm(n: Node, x: torch.Tensor, scale: torch.Tensor, b: torch.Tensor, mean: torch.Tensor,
                var: torch.Tensor) -> Any:  # fmt: skip
    eps = n.get("epsilon", 1e-5)
    if n.opset < 9 and n.get("spatial", 1) == 0:
        return (x - mean) / torch.sqrt(var + eps) * scale + b
    if n.opset >= 14 and n.get("training_mode", 0):
        y = F.batch_norm(x, None, None, scale, b, True, 0.0, eps)
        if not n.wants(1) and not n.wants(2):
            return y
        momentum = n.get("momentum", 0.9)
        dims = [0, *range(2, x.dim())]
        means, variances = x.mean(dims), x.var(dims, unbiased=False)
        made = (y, mean * momentum + means * (1 - momentum), var * momentum + variances * (1 - momentum))
        return made[: len(n.outputs)]
    return F.batch_norm(x, mean, var, scale, b, False, 0.0, eps)


@operator("InstanceNormalization")
def _instance_norm(n: Node, x: torch.Tensor, scale: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.instance_norm(x, weight=scale, bias=b, eps=n.get("epsilon", 1e-5))


@operator("GroupNormalization")
def _group_norm(n: Node, x: torch.Tensor, scale: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    groups = n.get("num_groups")
    if n.opset < 21 and scale.numel() == groups and groups != x.shape[1]:
        scale, b = (t.repeat_interleave(x.shape[1] // groups) for t in (scale, b))
    return F.group_norm(x, groups, scale, b, n.get("epsilon", 1e-5))


@operator("LayerNormalization")
def _layer_norm(n: Node, x: torch.Tensor, scale: torch.Tensor, b: torch.Tensor | None = None) -> Any:
    eps = n.get("epsilon", 1e-5)
    axis = n.get("axis", -1) % x.dim()
    shape = list(x.shape[axis:])
    weights = [t if t is None or list(t.shape) == shape else t.expand(shape) for t in (scale, b)]
    y = F.layer_norm(x, shape, weights[0], weights[1], eps)
    if not n.wants(1) and not n.wants(2):
        return y
    dims = list(range(axis, x.dim()))
    mean = x.mean(dims, keepdim=True)
    return (y, mean, torch.rsqrt(x.var(dims, unbiased=False, keepdim=True) + eps))[: len(n.outputs)]


@operator("RMSNormalization")
def _rms_norm(n: Node, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    shape = list(x.shape[n.get("axis", -1) % x.dim() :])
    return F.rms_norm(x, shape, scale if list(scale.shape) == shape else scale.expand(shape), n.get("epsilon", 1e-5))


@operator("com.microsoft:SkipLayerNormalization")
def _skip_layer_norm(n: Node, x: torch.Tensor, skip: torch.Tensor, gamma: torch.Tensor, beta: Any = None,
                     bias: Any = None) -> Any:  # fmt: skip
    total = x + skip if bias is None else x + skip + bias
    y = F.layer_norm(total, list(total.shape[-1:]), gamma, beta, n.get("epsilon", 1e-5))
    if n.wants(1) or n.wants(2):
        raise refuse(n, "hands out its statistics, which is not supported")
    return (y, None, None, total) if n.wants(3) else y


@operator("LRN")
def _lrn(n: Node, x: torch.Tensor) -> torch.Tensor:
    size, alpha, beta, bias = n.get("size"), n.get("alpha", 1e-4), n.get("beta", 0.75), n.get("bias", 1.0)
    if size % 2:  # as torch has it
        return F.local_response_norm(x, size, alpha, beta, bias)
    below = (size - 1) // 2
    squares = F.pad(x.square().flatten(2).unsqueeze(1), (0, 0, below, size - 1 - below))
    sums = F.avg_pool2d(squares, (size, 1), stride=1).squeeze(1).reshape(x.shape)
    return x / (sums * alpha + bias).pow(beta)


@operator("LpNormalization")
def _lp_norm(n: Node, x: torch.Tensor) -> torch.Tensor:
    p, axis = n.get("p", 2), n.get("axis", -1)
    norm = torch.norm(x, p=p, dim=axis, keepdim=True)
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


@operator("MeanVarianceNormalization")
def _mvn(n: Node, x: torch.Tensor) -> torch.Tensor:
    axes = n.get("axes") or [0, 2, 3]
    centered = x - x.mean(axes, keepdim=True)
    return centered / (centered.square().mean(axes, keepdim=True).sqrt() + 1e-9)


def _softmax(function: Callable[..., torch.Tensor]) -> Operator:
    def run(n: Node, x: torch.Tensor) -> torch.Tensor:
        if n.opset >= 13:
            return function(x, n.get("axis", -1))
        axis = n.get("axis", 1)
        axis += x.dim() if axis < 0 else 0
        if axis == x.dim() - 1 or all(side == 1 for side in x.shape[axis + 1 :]):
            return function(x, axis)
        return function(x.reshape(math.prod(x.shape[:axis]), -1), 1).reshape(x.shape)

    return run


def _hardmax(x: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.zeros_like(x).scatter(dim, x.argmax(dim, keepdim=True), 1)


operator("Softmax")(_softmax(F.softmax))
operator("LogSoftmax")(_softmax(F.log_softmax))
operator("Hardmax")(_softmax(_hardmax))


# --- pooling ---------------------------------------------------------------------------------------------------------


def _window(n: Node, x: torch.Tensor) -> tuple[list[int], list[int], list[int], list[int], list[int], list[int]]:
    """Kernel, strides, dilations, margins before and behind, and the size that comes out."""
    d = _spatial(n, x)
    kernel = _listed(n, "kernel_shape", d)
    strides, dilations = _listed(n, "strides", d), _listed(n, "dilations", d)
    before, behind = margins(n, x.shape[2:], kernel, strides, dilations, pool=True)
    out = []
    for size, k, s, dil, p, q in zip(x.shape[2:], kernel, strides, dilations, before, behind, strict=True):
        room = size + p + q - (k - 1) * dil - 1
        count = (math.ceil(room / s) if n.get("ceil_mode", 0) else room // s) + 1
        out.append(count - 1 if n.get("ceil_mode", 0) and (count - 1) * s >= size + p else count)
    if min(out) < 1:
        raise refuse(n, f"has windows larger than what it is given ({'x'.join(map(str, x.shape[2:]))})")
    return kernel, strides, dilations, before, behind, out


def _needed(n: Node, x: torch.Tensor, value: float) -> tuple[torch.Tensor, list[int], list[int], list[int]]:
    """x with exactly the margin that its windows read; kernel, strides and dilations."""
    kernel, strides, dilations, before, _behind, out = _window(n, x)
    spans = [(o - 1) * s + (k - 1) * dil + 1 for o, s, k, dil in zip(out, strides, kernel, dilations, strict=True)]
    rest = [span - size - p for span, size, p in zip(spans, x.shape[2:], before, strict=True)]
    return padded(x, before, rest, value), kernel, strides, dilations


@operator("MaxPool")
def _max_pool(n: Node, x: torch.Tensor) -> Any:
    d = _spatial(n, x)
    kernel, strides, dilations, before, behind, _out = _window(n, x)
    if not x.is_floating_point():
        pooled = _max_pool(n, x.double())
        return tuple(t.to(x.dtype) for t in pooled[:1]) + pooled[1:] if n.wants(1) else pooled.to(x.dtype)
    if n.wants(1):
        return _max_pool_with_indices(n, x, d)
    if before == behind and min(before) >= 0 and all(2 * p <= k for p, k in zip(before, kernel, strict=True)):
        return _MAX[d](x, kernel, strides, before, dilations, bool(n.get("ceil_mode", 0)))
    x, kernel, strides, dilations = _needed(n, x, -torch.inf)
    return _MAX[d](x, kernel, strides, 0, dilations)


def _max_pool_with_indices(n: Node, x: torch.Tensor, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values, and their places in the whole tensor counted row by row (or, storage_order=1, column by column)."""
    kernel, strides, dilations, before, *_rest = _window(n, x)
    wide, kernel, strides, dilations = _needed(n, x, -torch.inf)
    y, flat = _MAX[d](wide, kernel, strides, 0, dilations, return_indices=True)
    places: list[torch.Tensor] = []
    for size, start in zip(reversed(wide.shape[2:]), reversed(before), strict=True):
        places.insert(0, flat % size - start)
        flat = flat // size
    sizes = list(x.shape[2:])
    steps = [math.prod(sizes[i + 1 :]) if not n.get("storage_order", 0) else math.prod(sizes[:i]) for i in range(d)]
    index = sum(p * s for p, s in zip(places, steps, strict=True))
    planes = torch.arange(x.shape[0] * x.shape[1], device=x.device).reshape(*x.shape[:2], *[1] * d)
    return y, index + planes * math.prod(sizes)


@operator("AveragePool")
def _average_pool(n: Node, x: torch.Tensor) -> torch.Tensor:
    d = _spatial(n, x)
    kernel, strides, dilations, before, behind, _out = _window(n, x)
    include = bool(n.get("count_include_pad", 0))
    same = before == behind and min(before) >= 0 and all(2 * p <= k for p, k in zip(before, kernel, strict=True))
    if same and max(dilations) == 1 and not (n.get("ceil_mode", 0)):
        return _AVERAGE[d](x, kernel, strides, before, False, include)

    def counts() -> torch.Tensor:
        ones = torch.ones(1, 1, *x.shape[2:], dtype=x.dtype, device=x.device)
        if include:
            ones = padded(ones, before, behind, 1.0)
            rest = [w - o for w, o in zip(wide.shape[2:], ones.shape[2:], strict=True)]
            ones = padded(ones, [0] * d, rest)
        else:
            ones = _needed(n, ones, 0.0)[0]
        return math.prod(kernel) * _sums(ones, kernel, strides, dilations)

    wide, kernel, strides, dilations = _needed(n, x, 0.0)
    number = unseen(counts)
    y = _sums(wide, kernel, strides, dilations)
    share = unseen(lambda: math.prod(kernel) / number)
    return y if unseen(lambda: bool((share == 1).all())) else y * constant(share, y)


def _sums(x: torch.Tensor, kernel: list[int], strides: list[int], dilations: list[int]) -> torch.Tensor:
    """The mean of each window."""
    d = len(kernel)
    if max(dilations) == 1:
        return _AVERAGE[d](x, kernel, strides, 0)
    w = torch.full((x.shape[1], 1, *kernel), 1 / math.prod(kernel), dtype=x.dtype, device=x.device)
    return _CONV[d](x, w, None, strides, 0, dilations, x.shape[1])


@operator("LpPool")
def _lp_pool(n: Node, x: torch.Tensor) -> torch.Tensor:
    p = n.get("p", 2)
    powers = x.abs() if p == 1 else x.abs().pow(p)
    wide, kernel, strides, dilations = _needed(n, powers, 0.0)
    sums = _sums(wide, kernel, strides, dilations) * math.prod(kernel)
    return sums if p == 1 else sums.pow(1 / p)


@operator("GlobalAveragePool")
def _global_average(_n: Node, x: torch.Tensor) -> torch.Tensor:
    if x.dim() == 4:
        return F.adaptive_avg_pool2d(x, 1)
    return x.mean(list(range(2, x.dim())), keepdim=True)


@operator("GlobalMaxPool")
def _global_max(_n: Node, x: torch.Tensor) -> torch.Tensor:
    if x.dim() == 4:
        return F.adaptive_max_pool2d(x, 1)
    return x.amax(list(range(2, x.dim())), keepdim=True)


@operator("GlobalLpPool")
def _global_lp(n: Node, x: torch.Tensor) -> torch.Tensor:
    p = n.get("p", 2)
    return x.abs().pow(p).sum(list(range(2, x.dim())), keepdim=True).pow(1 / p)


@operator("MaxUnpool", host=(2,))
def _max_unpool(n: Node, x: torch.Tensor, places: torch.Tensor, shape: Value = None) -> torch.Tensor:
    d = _spatial(n, x)
    kernel, strides = _listed(n, "kernel_shape", d), _listed(n, "strides", d)
    pads = n.get("pads") or [0] * (2 * d)
    natural = [(i - 1) * s + k - p - q
               for i, s, k, p, q in zip(x.shape[2:], strides, kernel, pads[:d], pads[d:], strict=True)]  # fmt: skip
    flat = x.new_zeros(x.shape[0] * x.shape[1] * math.prod(natural))
    y = flat.scatter(0, places.flatten(), x.flatten()).reshape(*x.shape[:2], *natural)
    if shape is None:
        return y
    return padded(y, [0] * d, [o - i for o, i in zip(ints(shape)[2:], natural, strict=True)])


@operator("RoiAlign")
def _roi_align(n: Node, x: torch.Tensor, rois: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    from torchvision.ops import roi_align

    if n.get("mode", b"avg") != b"avg":
        raise refuse(n, "takes the maximum, which is not supported")
    half = n.get("coordinate_transformation_mode", b"half_pixel" if n.opset >= 16 else b"output_half_pixel")
    boxes = torch.cat([batch.to(rois.dtype).unsqueeze(1), rois], 1)
    size = n.get("output_height", 1), n.get("output_width", 1)
    return roi_align(x, boxes, size, n.get("spatial_scale", 1.0), n.get("sampling_ratio", 0), half == b"half_pixel")


@operator("NonMaxSuppression", host=(2, 3, 4))
def _nms(n: Node, boxes: torch.Tensor, scores: torch.Tensor, most: Value = None, overlap: Value = None,
         least: Value = None) -> torch.Tensor:  # fmt: skip
    from torchvision.ops import nms

    count = ints(most)[0] if most is not None else 0
    threshold = float(numbers(overlap)[0]) if overlap is not None else 0.0
    found = []
    for image in range(boxes.shape[0]):
        a, b, c, d = boxes[image].unbind(-1)
        if n.get("center_point_box", 0):
            corners = torch.stack([a - c / 2, b - d / 2, a + c / 2, b + d / 2], -1)
        else:
            y0, y1, x0, x1 = torch.minimum(a, c), torch.maximum(a, c), torch.minimum(b, d), torch.maximum(b, d)
            corners = torch.stack([x0, y0, x1, y1], -1)
        for label in range(scores.shape[1]):
            s = scores[image, label]
            kept = torch.arange(len(s), device=s.device)
            if least is not None:
                kept = kept[s > float(numbers(least)[0])]
            kept = kept[nms(corners[kept], s[kept], threshold)][:count]
            head = torch.tensor([[image, label]], device=kept.device).expand(len(kept), 2)
            found.append(torch.cat([head, kept.unsqueeze(1)], 1))
    return torch.cat(found) if found else torch.zeros((0, 3), dtype=torch.int64)


# --- reductions ------------------------------------------------------------------------------------------------------

_REDUCE: dict[str, Callable[[torch.Tensor, list[int], bool], torch.Tensor]] = {
    "ReduceMean": lambda x, d, k: x.mean(d, keepdim=k) if x.is_floating_point() else x.double().mean(d, keepdim=k),
    "ReduceSum": lambda x, d, k: x.sum(d, keepdim=k),
    "ReduceMax": lambda x, d, k: x.amax(d, keepdim=k),
    "ReduceMin": lambda x, d, k: x.amin(d, keepdim=k),
    "ReduceL1": lambda x, d, k: x.abs().sum(d, keepdim=k),
    "ReduceL2": lambda x, d, k: x.square().sum(d, keepdim=k).sqrt(),
    "ReduceSumSquare": lambda x, d, k: x.square().sum(d, keepdim=k),
    "ReduceLogSum": lambda x, d, k: x.sum(d, keepdim=k).log(),
    "ReduceLogSumExp": lambda x, d, k: x.logsumexp(d, keepdim=k),
}


def _products(x: torch.Tensor, dims: list[int], keep: bool) -> torch.Tensor:
    for dim in sorted((d % x.dim() for d in dims), reverse=True):
        x = x.prod(dim, keepdim=keep)
    return x


def _reduction(reduce: Callable[[torch.Tensor, list[int], bool], torch.Tensor]) -> Operator:
    def run(n: Node, x: torch.Tensor, axes: Value = None) -> torch.Tensor:
        dims = n.get("axes") if axes is None else ints(axes)
        if not dims:
            if n.get("noop_with_empty_axes", 0):
                if n.op in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceLogSumExp"):
                    return x
                return reduce(x.unsqueeze(0), [0], False)
            dims = list(range(x.dim()))
        if not x.dim():
            return reduce(x.reshape(1), [0], False)
        y = reduce(x, dims, bool(n.get("keepdims", 1)))
        return y.to(x.dtype) if y.dtype != x.dtype else y

    return run


for _name, _reduce in (*_REDUCE.items(), ("ReduceProd", _products)):
    operator(_name, host=(1,))(_reduction(_reduce))


def _arg(function: Callable[..., torch.Tensor]) -> Operator:
    def run(n: Node, x: torch.Tensor) -> torch.Tensor:
        axis, keep = n.get("axis", 0), bool(n.get("keepdims", 1))
        if n.get("select_last_index", 0):
            return x.shape[axis] - 1 - function(x.flip(axis), axis, keepdim=keep)
        return function(x, axis, keepdim=keep)

    return run


operator("ArgMax")(_arg(torch.argmax))
operator("ArgMin")(_arg(torch.argmin))


@operator("CumProd", host=(1,))
def _cumprod(n: Node, x: torch.Tensor, axis: Value) -> torch.Tensor:
    dim = ints(axis)[0]
    back = bool(n.get("reverse", 0))
    x = x.flip(dim) if back else x
    if n.get("exclusive", 0):
        x = torch.cat([torch.ones_like(x.narrow(dim, 0, 1)), x.narrow(dim, 0, x.shape[dim] - 1)], dim)
    y = x.cumprod(dim).to(x.dtype)
    return y.flip(dim) if back else y


@operator("CumSum", host=(1,))
def _cumsum(n: Node, x: torch.Tensor, axis: Value) -> torch.Tensor:
    dim = ints(axis)[0]
    back = bool(n.get("reverse", 0))
    x = x.flip(dim) if back else x
    y = x.cumsum(dim).to(x.dtype)
    if n.get("exclusive", 0):
        y = y - x
    return y.flip(dim) if back else y


@operator("TopK", host=(1,))
def _topk(n: Node, x: torch.Tensor, k: Value = None) -> tuple[torch.Tensor, torch.Tensor]:
    axis = n.get("axis", -1)
    count = n.get("k") if k is None else ints(k)[0]
    if count > x.shape[axis]:
        raise refuse(n, f"asks for the first {count} of {x.shape[axis]}")
    values, places = torch.sort(x, stable=True, dim=axis, descending=bool(n.get("largest", 1)))
    return values.narrow(axis, 0, count), places.narrow(axis, 0, count)


# --- shapes ----------------------------------------------------------------------------------------------------------


@operator("Shape")
def _shape(n: Node, x: torch.Tensor) -> torch.Tensor:
    return torch.tensor(list(x.shape)[slice(n.get("start", 0), n.get("end"))], dtype=torch.int64)


@operator("Size")
def _size(_n: Node, x: torch.Tensor) -> torch.Tensor:
    return torch.tensor(x.numel(), dtype=torch.int64)


@operator("Reshape", host=(1,))
def _reshape(n: Node, x: torch.Tensor, shape: Value = None) -> torch.Tensor:
    to = list(n.get("shape")) if shape is None else ints(shape)
    if not n.get("allowzero", 0):
        to = [x.shape[i] if side == 0 and i < x.dim() else side for i, side in enumerate(to)]
    if n.batch is not None and to and x.dim() and to[0] == n.batch != x.shape[0]:
        # Written for one batch size and run with another.
        if -1 in to[1:] or math.prod(to[1:]) * x.shape[0] == x.numel():
            to[0] = x.shape[0]
        elif to[1:] and x.numel() % math.prod(to[1:]) == 0:
            to[0] = x.numel() // math.prod(to[1:])
    return x.reshape(to)


@operator("Flatten")
def _flatten(n: Node, x: torch.Tensor) -> torch.Tensor:
    axis = n.get("axis", 1)
    axis += x.dim() if axis < 0 else 0
    if axis == 1 and x.dim() > 1:
        return x.flatten(1)
    return x.reshape(math.prod(x.shape[:axis]), -1 if x.numel() else math.prod(x.shape[axis:]))


@operator("Squeeze", host=(1,))
def _squeeze(n: Node, x: torch.Tensor, axes: Value = None) -> torch.Tensor:
    dims = n.get("axes") if axes is None else ints(axes)
    if dims is None:
        dims = [i for i, side in enumerate(x.shape) if side == 1]
    if wrong := [d for d in dims if x.shape[d] != 1]:
        raise refuse(n, f"squeezes axis {wrong[0]}, which has {x.shape[wrong[0]]} entries")
    return x.squeeze(tuple(dims)) if dims else x


@operator("Unsqueeze", host=(1,))
def _unsqueeze(n: Node, x: torch.Tensor, axes: Value = None) -> torch.Tensor:
    dims = n.get("axes") if axes is None else ints(axes)
    rank = x.dim() + len(dims)
    for dim in sorted(d + rank if d < 0 else d for d in dims):
        x = x.unsqueeze(dim)
    return x


@operator("Transpose")
def _transpose(n: Node, x: torch.Tensor) -> torch.Tensor:
    return x.permute(n.get("perm") or list(reversed(range(x.dim()))))


@operator("Concat")
def _concat(n: Node, *values: torch.Tensor) -> torch.Tensor:
    axis = n.get("axis", 1)
    if n.batch is not None and axis % values[0].dim() != 0:
        most = max(v.shape[0] for v in values)
        values = tuple(v.expand(most, *v.shape[1:]) if v.shape[0] == n.batch == 1 else v for v in values)
    return torch.cat(values, axis) if len(values) > 1 else values[0]


@operator("Split", host=(1,))
def _split(n: Node, x: torch.Tensor, sizes: Value = None) -> tuple[torch.Tensor, ...]:
    axis = n.get("axis", 0)
    parts = n.get("split") if sizes is None else ints(sizes)
    if not parts:
        side, count = x.shape[axis], n.get("num_outputs") or len(n.outputs)
        chunk = math.ceil(side / count)
        parts = [max(min(chunk, side - i * chunk), 0) for i in range(count)]
    return torch.split(x, parts, axis)


@operator("Slice", host=(1, 2, 3, 4))
def _slice(n: Node, x: torch.Tensor, starts: Value = None, ends: Value = None, axes: Value = None,
           steps: Value = None) -> torch.Tensor:  # fmt: skip
    if starts is None:
        starts, ends, axes = n.get("starts"), n.get("ends"), n.get("axes")
    first, last = ints(starts), ints(ends)
    dims = list(range(len(first))) if axes is None else ints(axes)
    by = [1] * len(first) if steps is None else ints(steps)
    index: list[slice] = [slice(None)] * x.dim()
    for start, end, dim, step in zip(first, last, dims, by, strict=True):
        side = x.shape[dim]
        if step == 0:
            raise refuse(n, "has a step of 0")
        if step < 0:
            start = min(start + side if start < 0 else start, side - 1)
            end = max(end + side if end < 0 else end, -1)
            x = x.index_select(dim, constant(np.arange(start, end, step), x))
        else:
            index[dim] = slice(max(start, -side), max(min(end, side), -side), step)
    return x[tuple(index)] if any(part != slice(None) for part in index) else x


_PAD = {b"reflect": "reflect", b"edge": "edge", b"wrap": "wrap"}


@operator("Pad", "com.microsoft:Pad", host=(1, 2, 3))
def _pad(n: Node, x: torch.Tensor, pads: Value = None, fill: Value = None, axes: Value = None) -> torch.Tensor:
    sides = (n.get("pads") or n.get("paddings")) if pads is None else ints(pads)
    dims = list(range(x.dim())) if axes is None else [a % x.dim() for a in ints(axes)]
    if len(sides) != 2 * len(dims):
        raise refuse(n, f"has {len(sides)} pads for {len(dims)} axes")
    before, behind = [0] * x.dim(), [0] * x.dim()
    for i, dim in enumerate(dims):
        before[dim], behind[dim] = sides[i], sides[i + len(dims)]
    mode = n.get("mode", b"constant")
    if mode == b"constant":
        value = n.get("value", 0.0) if fill is None else numbers(fill)[0]
        skip = next((i for i in range(x.dim()) if before[i] or behind[i]), x.dim())
        return padded(x, before[skip:], behind[skip:], value)
    if mode not in _PAD:
        raise refuse(n, f"pads in mode {mode.decode(errors='replace')!r}, which is not supported")
    for dim, (p, q) in enumerate(zip(before, behind, strict=True)):
        if p or q:
            side = x.shape[dim]
            if max(p, q) > (1 << 24):
                raise refuse(n, f"pads by {max(p, q)} cells, more than a picture can need")
            cells = np.arange(side)[max(-p, 0) : side - max(-q, 0)]
            cells = np.pad(cells, (max(p, 0), max(q, 0)), mode=_PAD[mode])  # type: ignore[call-overload]
            x = x.index_select(dim, constant(cells, x))
    return x


@operator("Tile", host=(1, 2))
def _tile(n: Node, x: torch.Tensor, repeats: Value, axis: Value = None) -> torch.Tensor:
    counts = ints(repeats)
    if n.opset < 6 and axis is not None:
        dim, times = ints(axis)[0], counts[0]
        counts = [times if i == dim else 1 for i in range(x.dim())]
    allowed([side * count for side, count in zip(x.shape, counts, strict=True)])
    return x.repeat(counts)


@operator("Expand", host=(1,))
def _expand(n: Node, x: torch.Tensor, shape: Value) -> torch.Tensor:
    to = ints(shape)
    if n.batch is not None and to and len(to) == x.dim() and to[0] == n.batch != x.shape[0]:
        to[0] = 1
    return x.expand(allowed(torch.broadcast_shapes(x.shape, to)))


@operator("ConstantOfShape", host=(0,))
def _constant_of_shape(n: Node, shape: Value) -> torch.Tensor:
    value = n.get("value")
    if value is None:
        return torch.zeros(allowed(ints(shape)))
    return torch.full(allowed(ints(shape)), value.flatten()[0].item(), dtype=value.dtype)


@operator("Range")
def _range(_n: Node, start: torch.Tensor, end: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    a, b, s = (numbers(v)[0] for v in (start, end, step))
    count = max(math.ceil((b - a) / s), 0)
    allowed([count])
    return torch.arange(count, device=start.device).to(start.dtype) * s + a


@operator("EyeLike")
def _eye_like(n: Node, x: torch.Tensor) -> torch.Tensor:
    kind = dtype_of(n, n.get("dtype"), x.dtype) if n.get("dtype") else x.dtype
    rows, columns = x.shape
    k = n.get("k", 0)
    return (torch.arange(columns, device=x.device) - torch.arange(rows, device=x.device)[:, None] == k).to(kind)


@operator("Trilu", host=(1,))
def _trilu(n: Node, x: torch.Tensor, k: Value = None) -> torch.Tensor:
    diagonal = 0 if k is None else ints(k)[0]
    return torch.triu(x, diagonal) if n.get("upper", 1) else torch.tril(x, diagonal)


@operator("DepthToSpace")
def _depth_to_space(n: Node, x: torch.Tensor) -> torch.Tensor:
    block = n.get("blocksize")
    if n.get("mode", b"DCR") == b"CRD":
        return F.pixel_shuffle(x, block)
    batch, channels, height, width = x.shape
    y = x.reshape(batch, block, block, channels // block**2, height, width).permute(0, 3, 4, 1, 5, 2)
    return y.reshape(batch, channels // block**2, height * block, width * block)


@operator("SpaceToDepth")
def _space_to_depth(n: Node, x: torch.Tensor) -> torch.Tensor:
    block = n.get("blocksize")
    if n.get("mode", b"DCR") == b"CRD":
        return F.pixel_unshuffle(x, block)
    batch, channels, height, width = x.shape
    y = x.reshape(batch, channels, height // block, block, width // block, block).permute(0, 3, 5, 1, 2, 4)
    return y.reshape(batch, channels * block**2, height // block, width // block)


@operator("CenterCropPad", host=(1,))
def _center_crop_pad(n: Node, x: torch.Tensor, shape: Value) -> torch.Tensor:
    axes = n.get("axes") or list(range(x.dim()))
    for axis, side in zip(axes, ints(shape), strict=True):
        axis, here = axis % x.dim(), x.shape[axis]
        if side < here:
            x = x.narrow(axis, (here - side) // 2, side)
        elif side > here:
            before = [(side - here) // 2 if i == axis else 0 for i in range(x.dim())]
            behind = [side - here - before[axis] if i == axis else 0 for i in range(x.dim())]
            x = padded(x, before, behind)
    return x


@operator("Col2Im", host=(1, 2))
def _col2im(n: Node, x: torch.Tensor, image: Value, block: Value) -> torch.Tensor:
    size, kernel = ints(image), ints(block)
    if len(size) != 2:
        raise refuse(n, f"on {len(size)} spatial dimensions is not supported (2 are)")
    pads = n.get("pads") or [0] * 4
    wide = size[0] + pads[0] + pads[2], size[1] + pads[1] + pads[3]
    dilations, strides = tuple(_listed(n, "dilations", 2)), tuple(_listed(n, "strides", 2))
    y = F.fold(x, wide, tuple(kernel), dilations, 0, strides)
    return padded(y, [-p for p in pads[:2]], [-p for p in pads[2:]])


# --- picking ---------------------------------------------------------------------------------------------------------


def _wrapped(index: torch.Tensor, side: int) -> torch.Tensor:
    return torch.where(index < 0, index + side, index)


@operator("Gather")
def _gather(n: Node, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    axis = n.get("axis", 0) % x.dim()
    if not index.dim():
        return x.select(axis, ints(index)[0])
    flat = _wrapped(index, x.shape[axis]).flatten()
    y = x.index_select(axis, flat)
    return y if index.dim() == 1 else y.unflatten(axis, index.shape) if index.numel() else y.reshape(
        *x.shape[:axis], *index.shape, *x.shape[axis + 1 :]
    )  # fmt: skip


@operator("GatherElements")
def _gather_elements(n: Node, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    axis = n.get("axis", 0)
    return torch.gather(x, axis, _wrapped(index, x.shape[axis]).long())


def _coordinates(index: torch.Tensor, sizes: Sequence[int]) -> tuple[torch.Tensor, ...]:
    return tuple(_wrapped(part, side).long() for part, side in zip(index.unbind(-1), sizes, strict=False))


@operator("GatherND")
def _gather_nd(n: Node, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    batch = n.get("batch_dims", 0)
    places = _coordinates(index, x.shape[batch:])
    if batch:
        own = [torch.arange(side, device=x.device).reshape(-1, *[1] * (index.dim() - 2 - i))
               for i, side in enumerate(x.shape[:batch])]  # fmt: skip
        places = (*own, *places)
    return x[places]


@operator("ScatterND")
def _scatter_nd(n: Node, x: torch.Tensor, index: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
    places = _coordinates(index, x.shape)
    how = n.get("reduction", b"none").decode()
    if how in ("none", "add"):
        return torch.index_put(x, places, updates, accumulate=how == "add")
    steps = [math.prod(x.shape[i + 1 : len(places)]) for i in range(len(places))]
    rows = sum(p * s for p, s in zip(places, steps, strict=True)).flatten()  # type: ignore[union-attr]
    tail = math.prod(x.shape[len(places) :])
    flat = rows[:, None].expand(-1, tail)
    reduce = {"mul": "prod", "max": "amax", "min": "amin"}[how]
    return x.reshape(-1, tail).scatter_reduce(0, flat, updates.reshape(-1, tail), reduce).reshape(x.shape)


@operator("ScatterElements", "Scatter")
def _scatter(n: Node, x: torch.Tensor, index: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
    axis = n.get("axis", 0)
    places = _wrapped(index, x.shape[axis]).long()
    how = n.get("reduction", b"none").decode()
    if how == "none":
        return torch.scatter(x, axis, places, updates)
    return x.scatter_reduce(axis, places, updates, {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}[how])


@operator("NonZero")
def _non_zero(_n: Node, x: torch.Tensor) -> torch.Tensor:
    return torch.nonzero(x.reshape(1) if not x.dim() else x).T.contiguous()


@operator("Compress")
def _compress(n: Node, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    places = torch.nonzero(condition.flatten()).flatten()
    axis = n.get("axis")
    return x.flatten().index_select(0, places) if axis is None else x.index_select(axis, places)


@operator("OneHot", host=(1,))
def _one_hot(n: Node, index: torch.Tensor, depth: Value, values: torch.Tensor) -> torch.Tensor:
    count, axis = int(numbers(depth)[0]), n.get("axis", -1)
    axis += index.dim() + 1 if axis < 0 else 0
    allowed([*index.shape, count])
    classes = torch.arange(count, device=index.device).reshape(-1, *[1] * (index.dim() - axis))
    hit = _wrapped(index.long(), count).unsqueeze(axis) == classes
    return torch.where(hit, values[1], values[0])


@operator("ReverseSequence", host=(1,))
def _reverse_sequence(n: Node, x: torch.Tensor, lengths: Value) -> torch.Tensor:
    time, batch = n.get("time_axis", 0), n.get("batch_axis", 1)
    y = x.clone()
    for i, length in enumerate(ints(lengths)):
        own, other = y.select(batch, i), x.select(batch, i)
        dim = time - (1 if batch < time else 0)
        own.narrow(dim, 0, length).copy_(other.narrow(dim, 0, length).flip(dim))
    return y


# --- resizing --------------------------------------------------------------------------------------------------------


@operator("Upsample", host=(1,))
def _upsample(n: Node, x: torch.Tensor, scales: Value = None) -> torch.Tensor:
    factors = n.get("scales") if scales is None else numbers(scales)
    if factors is None:
        factors = [1.0, 1.0, n.get("height_scale", 1.0), n.get("width_scale", 1.0)]
    old = Node(n.name, n.op, "", n.inputs, n.outputs, {
        "mode": n.get("mode", b"nearest"), "coordinate_transformation_mode": b"asymmetric", "nearest_mode": b"floor",
    }, 11, n.batch)  # fmt: skip
    return _resize(old, x, None, factors, None)


@operator("Resize", host=(1, 2, 3))
def _resize(n: Node, x: torch.Tensor, roi: Value = None, scales: Value = None, sizes: Value = None) -> torch.Tensor:
    from innersight.formats import onnx_resize

    if n.opset < 11:
        return _upsample(n, x, roi)
    return onnx_resize.resize(n, x, roi, scales, sizes)


@operator("GridSample")
def _grid_sample(n: Node, x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(
        n.get("mode", b"linear").decode(), n.get("mode", b"").decode()
    )
    border = n.get("padding_mode", b"zeros").decode()
    return F.grid_sample(x, grid, mode, border, align_corners=bool(n.get("align_corners", 0)))


@operator("AffineGrid", host=(1,))
def _affine_grid(n: Node, theta: torch.Tensor, size: Value) -> torch.Tensor:
    return F.affine_grid(theta, ints(size), align_corners=bool(n.get("align_corners", 0)))
