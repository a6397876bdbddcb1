"""Quantised ONNX operators with the integers of ONNX Runtime's kernels, and the slopes of what they stand for.

A value that a file keeps as integers q is held as what it means, `scale * (q - zero point)` in float32; the integers
come back by rounding. Between such values a layer computes its float twin (a convolution with real weights, clamped to
what its integers can hold), whose slope counts, and then its exact value from the integers: `formats.graph.exact`.

Integer sums are exact in float32 below 2^24, and in float64 beyond. The result is what ONNX Runtime makes of them:
`round half even(float32(sum) * float32(s_x s_w / s_y)) + z_y`, cut off at the ends of the type. What it computes
element by element goes through real numbers: `round half even(f(x, ...) / s_y) + z_y`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from innersight.formats import Quantised
from innersight.formats.graph import exact
from innersight.formats.onnx_operators import CONTRIB, OPERATORS, Node, allowed, operator, refuse
from innersight.formats.tflite_integers import EXACT, sums_are_exact

Tensor = torch.Tensor


@dataclass(frozen=True)
class Grid:
    """The values an integer type can stand for: scale * (q - zero), q in lo..hi.

    scale, zero: float32 tensors of one number, or shaped so that they go along an axis
    step, null:  the same as plain numbers, where there is one of each
    ends:        whether its ends cut off the slope; not for scores, or a sure network would have no gradient at all
    """

    scale: Tensor
    zero: Tensor
    lo: int
    hi: int
    dtype: str
    step: float
    null: float
    ends: bool = True

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return self.scale.to(device), self.zero.to(device)

    def centered(self, real: Tensor) -> Tensor:
        """q - zero of values on the grid."""
        return torch.round(real / self.step)

    def raw(self, real: Tensor) -> Tensor:
        """q of values on the grid; no rounding in it, so that a slope goes through."""
        return real / self.step + self.null

    def from_raw(self, q: Tensor) -> Tensor:
        """The values of integers that a float tensor holds, in sight."""
        return (q - self.null) * self.step

    def integers(self, real: Tensor) -> Tensor:
        """The same rounded, for comparison."""
        scale, zero = self.on(real.device)
        return torch.round(real / scale) + zero

    def real(self, q: Tensor) -> Tensor:
        """The values of integers q, in float32."""
        scale, zero = self.on(q.device)
        return (q.float() - zero) * scale

    def snapped(self, scaled: Tensor) -> Tensor:
        """The value for a number of steps from zero, rounded half to even and cut off at the ends."""
        scale, zero = self.on(scaled.device)
        return (torch.clamp(torch.round(scaled) + zero, self.lo, self.hi) - zero) * scale

    def clamped(self, twin: Tensor) -> Tensor:
        """The float twin within what the integers can hold."""
        if not self.ends:
            return twin
        return torch.clamp(twin, self.step * (self.lo - self.null), self.step * (self.hi - self.null))

    def same(self, other: Grid) -> bool:
        return torch.equal(self.scale, other.scale) and torch.equal(self.zero, other.zero)

    def described(self) -> Quantised:
        return Quantised((self.step,), int(self.null), self.dtype, self.lo, self.hi)


_RANGES = {2: ("uint8", 0, 255), 3: ("int8", -128, 127), 4: ("uint16", 0, 65535), 5: ("int16", -32768, 32767),
           6: ("int32", -(1 << 31), (1 << 31) - 1), 21: ("uint4", 0, 15), 22: ("int4", -8, 7),
           25: ("uint2", 0, 3), 26: ("int2", -2, 1)}  # fmt: skip
_OF_TORCH = {torch.uint8: 2, torch.int8: 3, torch.int16: 5, torch.int32: 6}


def grid(n: Node, scale: Tensor | None, zero: Tensor | None, kind: int | None = None, shape: Sequence[int] | None = None
         ) -> Grid:  # fmt: skip
    """The grid of a scale and a zero point; `kind` is ONNX's number of the type, by default the zero point's."""
    if scale is None:
        raise refuse(n, "has a scale that is not constant, which is not supported")
    number = kind or (_OF_TORCH.get(zero.dtype, 0) if zero is not None else n.get("output_dtype") or 2)
    if number not in _RANGES:
        raise refuse(n, f"quantises to a type ({number}) that is not supported")
    dtype, lo, hi = _RANGES[number]
    s = scale.float()
    z = torch.zeros_like(s) if zero is None else zero.float().expand(s.shape) if zero.numel() == 1 else zero.float()
    if z.shape != s.shape:
        raise refuse(n, f"has {z.numel()} zero points for {s.numel()} scales")
    if not bool((s > 0).all()) or not bool(torch.isfinite(s).all()):
        raise refuse(n, "has a scale that is not a positive number")
    s, z = (t.reshape(shape) if shape is not None else t.reshape(()) if t.numel() == 1 else t for t in (s, z))
    step, null = (float(t.flatten()[0]) if t.numel() == 1 else math.nan for t in (s, z))
    return Grid(s.clone(), z.clone(), lo, hi, dtype, step, null, not n.get("scores"))


@dataclass
class Built:
    """A quantised node as a step.

    data:    positions of the inputs that are read when it runs
    grids:   for each of them the grid that the node takes it to be on; None for floats
    weights: constants that `call` takes behind the data
    grid:    what the result is on; None for floats
    """

    call: Callable[..., Tensor]
    data: list[int]
    grids: list[Grid | None]
    grid: Grid | None
    weights: list[Tensor] = field(default_factory=list)


Builder = Callable[[Node, Sequence[Any], Sequence[int | None]], Built]
BUILDERS: dict[str, Builder] = {}
"""By operator: (node, constants by position, ONNX's types of them) -> Built."""


def builder(*names: str) -> Callable[[Builder], Builder]:
    def register(function: Builder) -> Builder:
        for name in names:
            BUILDERS[name] = function
            operator(name)(_on_integers)
        return function

    return register


def _on_integers(n: Node, *args: Any) -> Tensor:
    """The operator on integers themselves, in a part of a file that is computed when it is opened."""
    constants = list(args)
    made = BUILDERS[n.key](n, constants, [None] * len(args))
    given = [args[p] if g is None else g.real(args[p]) for p, g in zip(made.data, made.grids, strict=True)]
    y = made.call(*given, *made.weights)
    return y if made.grid is None else made.grid.integers(y).to(_integer(made.grid))


def _integer(g: Grid) -> torch.dtype:
    return {"uint8": torch.uint8, "int8": torch.int8, "int16": torch.int16}.get(g.dtype, torch.int32)


# --- between floats and integers -------------------------------------------------------------------------------------


def _along(n: Node, scale: Tensor, x: Tensor | None) -> list[int] | None:
    """The shape of scales that go along an axis of x."""
    if scale.numel() == 1:
        return None
    if x is None or scale.dim() != 1 or n.get("block_size", 0):
        raise refuse(n, "quantises with several scales, which is supported for weights alone")
    return [scale.numel(), *[1] * (x.dim() - 1 - n.get("axis", 1) % x.dim())]


@builder("QuantizeLinear", "com.microsoft:QuantizeLinear")
def _quantise(n: Node, const: Sequence[Any], types: Sequence[int | None]) -> Built:
    scale, zero = const[1], const[2] if len(const) > 2 else None
    if scale is None:
        raise refuse(n, "has a scale that is not constant, which is not supported")
    out = grid(n, scale, zero, types[2] if zero is not None else None, _along(n, scale, const[0]))

    def call(x: Tensor) -> Tensor:
        if math.isnan(out.step):  # weights, which no observer sees
            return out.snapped(x / out.scale)
        return exact(out.clamped(x), lambda v: out.snapped(v.float() / out.scale.to(v.device)).to(v.dtype), x)

    return Built(call, [0], [None], out)


@operator("DequantizeLinear", "com.microsoft:DequantizeLinear")
def _dequantise(n: Node, x: Tensor, scale: Tensor, zero: Any = None) -> Tensor:
    """The operator on integers: weights, and values whose scale is computed as well."""
    q = x if x.is_floating_point() else x.float()
    block, axis = n.get("block_size", 0), n.get("axis", 1)
    if block and scale.dim() == x.dim():
        allowed([scale.numel(), block])
        parts: list[Any] = [t if t is None else t.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
                 for t in (scale, zero)]  # fmt: skip
        return (q if parts[1] is None else q - parts[1]) * parts[0]
    if scale.numel() > 1:
        shape = [scale.numel(), *[1] * (x.dim() - 1 - axis % x.dim())]
        scale, zero = scale.reshape(shape), None if zero is None else zero.reshape(shape)
    else:
        scale, zero = scale.reshape(()), None if zero is None else zero.reshape(())
    return (q if zero is None else q - zero) * scale


def dequantised(n: Node, const: Sequence[Any], types: Sequence[int | None]) -> Built | None:
    """A DequantizeLinear of a value that is held as real numbers already; None where its scale is computed."""
    scale, zero = const[1], const[2] if len(const) > 2 else None
    if scale is None or (len(n.inputs) > 2 and n.inputs[2] and zero is None):
        return None
    kind = types[2] if zero is not None else None
    return Built(lambda x: x, [0], [grid(n, scale, zero, kind, _along(n, scale, const[0]))], None)


@operator("DynamicQuantizeLinear")
def _dynamic(_n: Node, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Integers in a float tensor, their scale and zero point, for whatever the values of x span."""

    def scale_and_zero(v: Tensor) -> tuple[Tensor, Tensor]:
        low, high = v.amin().clamp(max=0), v.amax().clamp(min=0)
        scale = (high - low) / 255
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        return scale, torch.round(torch.clamp(-low / scale, 0, 255))

    scale, zero = scale_and_zero(x.detach())

    def compute(v: Tensor) -> Tensor:
        s, z = scale_and_zero(v)
        return torch.clamp(torch.round(v / s) + z, 0, 255)

    return exact(torch.clamp(x / scale + zero, 0, 255), compute, x), scale, zero


# --- sums of products ------------------------------------------------------------------------------------------------


def _whole(n: Node, w: Tensor, zero: Tensor | None, axis: int) -> Tensor:
    """w less its zero point, one for all or one along an axis."""
    z = torch.zeros(()) if zero is None else zero.double()
    if z.numel() > 1:
        if z.numel() != w.shape[axis]:
            raise refuse(n, f"has {z.numel()} zero points for {w.shape[axis]} channels")
        z = z.reshape([-1 if i == axis else 1 for i in range(w.dim())])
    else:
        z = z.reshape(())
    return (w.double() - z).to(torch.int16 if w.dtype in (torch.int8, torch.uint8) else torch.int32)


def _summed(product: Callable[[Tensor, Tensor], Tensor], centered: Tensor, whole: Tensor, limit: float) -> Tensor:
    """Sums of products of integers, in sight so that parts of a map can be run, too."""
    if limit < EXACT and sums_are_exact(centered.device):
        return product(centered.float(), whole.float())
    return product(centered.double(), whole.double())


def _requantised(
    out: Grid, factor: Tensor, bias: Tensor | None, y: Tensor, sums: Tensor, shape: Sequence[int]
) -> Tensor:
    def compute(total: Tensor) -> Tensor:
        if bias is not None:
            total = total.double() + bias.to(total.device).double().reshape(shape)
        scaled = total.float() * factor.to(total.device).reshape(shape if factor.numel() > 1 else ())
        return out.snapped(scaled).to(y.dtype)

    return exact(out.clamped(y), compute, sums)


@dataclass
class _Weights:
    """Constant weights: real for the twin, whole for the sums, and how large those can get."""

    real: Tensor
    whole: Tensor
    bias: Tensor | None
    limit: float


def _weights(
    n: Node, x: Grid, w: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, axis: int
) -> _Weights:
    whole = _whole(n, w, zero, axis)
    s = scale.float()
    if s.numel() > 1 and s.numel() != w.shape[axis]:
        raise refuse(n, f"has {s.numel()} scales for {w.shape[axis]} channels")
    shape = [-1 if i == axis and s.numel() > 1 else 1 for i in range(w.dim())]
    real = whole.float() * s.reshape(shape)
    reach = max(x.hi - float(x.zero), float(x.zero) - x.lo)
    others = [i for i in range(w.dim()) if i != axis]
    sums = whole.double().abs().sum(others) * reach
    own = None
    if bias is not None:
        sums = sums + bias.double().abs().flatten()
        own = (bias.double() * x.scale.double() * s.double().reshape(-1 if s.numel() > 1 else ())).float()
    return _Weights(real, whole, own, float(sums.max()) if sums.numel() else 0.0)


@builder("QLinearConv")
def _qlinear_conv(n: Node, const: Sequence[Any], types: Sequence[int | None]) -> Built:
    x, out = grid(n, const[1], const[2], types[2]), grid(n, const[6], const[7], types[7])
    if const[3] is None:
        raise refuse(n, "has weights that are not constant, which is not supported")
    bias = const[8] if len(const) > 8 else None
    w = _weights(n, x, const[3], const[4], const[5], bias, 0)
    factor = x.scale * const[4].float() / out.scale
    shape = [-1, *[1] * (const[3].dim() - 2)]

    def product(v: Tensor, k: Tensor) -> Tensor:
        return OPERATORS["Conv"](n, v, k)

    def call(v: Tensor, real: Tensor, whole: Tensor, b: Tensor | None = None) -> Tensor:
        sums = _summed(product, x.centered(v.detach()), whole, w.limit)
        return _requantised(out, factor, bias, OPERATORS["Conv"](n, v, real, b), sums, shape)

    return Built(call, [0], [x], out, [w.real, w.whole, *([w.bias] if w.bias is not None else [])])


@builder("QLinearMatMul")
def _qlinear_matmul(n: Node, const: Sequence[Any], types: Sequence[int | None]) -> Built:
    a, out = grid(n, const[1], const[2], types[2]), grid(n, const[6], const[7], types[7])
    if const[3] is None or const[3].dim() != 2:
        b = grid(n, const[4], const[5], types[5])
        factor = a.scale * b.scale / out.scale

        def two(v: Tensor, w: Tensor) -> Tensor:
            sums = torch.matmul(a.centered(v.detach()).double(), b.centered(w.detach()).double())
            return _requantised(out, factor, None, torch.matmul(v, w), sums, ())

        return Built(two, [0, 3], [a, b], out)
    return _dense(n, a, out, const[3].T.contiguous(), const[4], const[5], None, 1.0)


@builder("com.microsoft:QGemm")
def _qgemm(n: Node, const: Sequence[Any], types: Sequence[int | None]) -> Built:
    const = [*const, *[None] * (9 - len(const))]
    types = [*types, *[None] * (9 - len(types))]
    a = grid(n, const[1], const[2], types[2])
    out = grid(n, const[7], const[8], types[8]) if const[7] is not None else None
    if n.get("transA", 0) or const[3] is None:
        raise refuse(n, "turns its input or has weights that are not constant, which is not supported")
    w = const[3] if n.get("transB", 0) else const[3].T.contiguous()
    return _dense(n, a, out, w, const[4], const[5], const[6], n.get("alpha", 1.0))


def _dense(n: Node, x: Grid, out: Grid | None, w: Tensor, scale: Tensor, zero: Any, bias: Any, alpha: float) -> Built:
    bias = None if bias is None else bias.flatten()
    held = _weights(n, x, w, scale, zero, bias, 0)
    factor = torch.tensor(alpha, dtype=torch.float32) * x.scale * scale.float()
    factor = factor if out is None else factor / out.scale

    def call(v: Tensor, real: Tensor, whole: Tensor, b: Tensor | None = None) -> Tensor:
        y = F.linear(v, real, b)
        sums = _summed(F.linear, x.centered(v.detach()), whole, held.limit)
        if out is not None:
            return _requantised(out, factor, bias, y, sums, (-1,))

        def compute(total: Tensor) -> Tensor:
            own = 0.0 if bias is None else bias.to(total.device)
            return ((total.double() + own).float() * factor.to(total.device)).to(y.dtype)

        return exact(y, compute, sums)

    real = held.real * alpha if alpha != 1 else held.real
    own = [] if held.bias is None else [held.bias * alpha if alpha != 1 else held.bias]
    return Built(call, [0], [x], out, [real, held.whole, *own])


def behind(m: Node, x: Grid, out: Grid, held: tuple[Tensor, Tensor, Any] | None, bias: Tensor | None,
           relu: bool) -> Built | None:  # fmt: skip
    """A QuantizeLinear behind a float Conv, Gemm, MatMul or mean `m` of values on the grid x, by its integer sums.

    That is what ONNX Runtime makes of the four nodes, and what is equal whatever the batch. None where it does not fit.

    held: integers, scales and zero points of m's weights
    bias: m's bias in integers
    relu: whether there is a Relu between the two
    """

    def cut(v: Tensor) -> Tensor:
        return v.clamp(min=0) if relu else v

    if m.op == "GlobalAveragePool":

        def mean(y: Tensor, v: Tensor) -> Tensor:
            count = math.prod(v.shape[2:])

            def compute(given: Tensor) -> Tensor:
                sums = x.centered(given).double().sum(list(range(2, given.dim())), keepdim=True)
                return cut(out.snapped(sums.float() * (x.scale / (out.scale * count)).to(given.device))).to(y.dtype)

            return exact(out.clamped(y), compute, v)

        return Built(mean, [], [], out)
    if held is None:
        return None
    q, scale, zero = held
    if m.op != "Conv":
        if q.dim() != 2 or m.get("transA", 0):
            return None
        axis = 0 if m.op == "Gemm" and m.get("stored", 0) else 1
        q, axis = (q, 0) if axis == 0 else (q.T.contiguous(), 0)
    if scale.dim() > 1 or (scale.numel() > 1 and scale.numel() != q.shape[0]):
        return None
    w = _weights(m, x, q, scale, zero, bias, 0)
    factor = x.scale * scale.float() / out.scale
    shape = [-1, *[1] * (q.dim() - 2)]

    def product(v: Tensor, k: Tensor) -> Tensor:
        return OPERATORS["Conv"](m, v, k) if m.op == "Conv" else F.linear(v, k)

    def call(y: Tensor, v: Tensor, whole: Tensor) -> Tensor:
        sums = _summed(product, x.centered(v.detach()), whole, w.limit)

        def compute(total: Tensor) -> Tensor:
            if bias is not None:
                total = total.double() + bias.flatten().to(total.device).double().reshape(shape)
            scaled = total.float() * factor.to(total.device).reshape(shape if factor.numel() > 1 else ())
            return cut(out.snapped(scaled)).to(y.dtype)

        return exact(out.clamped(y), compute, sums)

    return Built(call, [], [], out, [w.whole])


@operator("ConvInteger")
def _conv_integer(n: Node, x: Tensor, w: Tensor, xz: Any = None, wz: Any = None) -> Tensor:
    def product(v: Tensor, dtype: torch.dtype) -> Tensor:
        k = w.to(dtype) if wz is None else w.to(dtype) - (wz.reshape(-1, *[1] * (w.dim() - 1)) if wz.dim() else wz)
        v = v.to(dtype) if xz is None else v.to(dtype) - xz.reshape(())
        return OPERATORS["Conv"](n, v, k.to(dtype))

    return _exactly(x, product)


@operator("MatMulInteger")
def _matmul_integer(_n: Node, a: Tensor, b: Tensor, az: Any = None, bz: Any = None) -> Tensor:
    def product(v: Tensor, dtype: torch.dtype) -> Tensor:
        v = v.to(dtype) if az is None else v.to(dtype) - (az.unsqueeze(-1) if az.dim() == 1 and az.numel() > 1 else az)
        return torch.matmul(v, b.to(dtype) if bz is None else b.to(dtype) - bz)

    return _exactly(a, product)


def _exactly(x: Tensor, product: Callable[[Tensor, torch.dtype], Tensor]) -> Tensor:
    if not x.is_floating_point():
        return product(x, torch.float64).to(torch.int32)
    return exact(product(x, x.dtype), lambda v: torch.round(product(torch.round(v), torch.float64)).to(v.dtype), x)


# --- element by element ----------------------------------------------------------------------------------------------


def _through_reals(function: Callable[..., Tensor], count: int) -> Builder:
    """An operator of `count` quantised inputs that is computed on real numbers."""

    def build(n: Node, const: Sequence[Any], types: Sequence[int | None]) -> Built:
        const = [*const, *[None] * (3 * count + 2 - len(const))]
        types = [*types, *[None] * (3 * count + 2 - len(types))]
        data = [3 * i for i in range(count)]
        grids = [grid(n, const[p + 1], const[p + 2], types[p + 2]) for p in data]
        out = grid(n, const[3 * count], const[3 * count + 1], types[3 * count + 1] or types[2])
        return Built(_snapping(lambda *v: function(n, *v), out), data, list(grids), out)

    return build


def _snapping(function: Callable[..., Tensor], out: Grid) -> Callable[..., Tensor]:
    def call(*values: Tensor) -> Tensor:
        y = function(*values)
        return exact(out.clamped(y), lambda *v: _snap(function, out, v), *values)

    return call


def _snap(function: Callable[..., Tensor], out: Grid, values: Sequence[Tensor]) -> Tensor:
    y = function(*(v.float() for v in values))
    return out.snapped(y / out.scale.to(y.device)).to(values[0].dtype)


def _average(n: Node, x: Tensor) -> Tensor:
    if n.get("channels_last", 0):
        raise refuse(n, "has the channels last, which is not supported")
    return OPERATORS["AveragePool"](n, x)


def _softmax(n: Node, x: Tensor) -> Tensor:
    version = n.get("opset", 13)
    return OPERATORS["Softmax"](Node(n.name, "Softmax", "", (), ("",), {"axis": n.get("axis", -1)}, version), x)


for _name, _function, _count in (
    ("QLinearAdd", lambda _n, a, b: a + b, 2),
    ("QLinearMul", lambda _n, a, b: a * b, 2),
    ("QLinearSigmoid", lambda _n, x: torch.sigmoid(x), 1),
    ("QLinearLeakyRelu", lambda n, x: F.leaky_relu(x, n.get("alpha", 0.01)), 1),
    ("QLinearAveragePool", _average, 1),
    ("QLinearSoftmax", _softmax, 1),
):
    builder(f"{CONTRIB}:{_name}")(_through_reals(_function, _count))


@builder("com.microsoft:QLinearGlobalAveragePool")
def _global_average(n: Node, const: Sequence[Any], types: Sequence[int | None]) -> Built:
    if n.get("channels_last", 0):
        raise refuse(n, "has the channels last, which is not supported")
    x, out = grid(n, const[1], const[2], types[2]), grid(n, const[3], const[4], types[4])

    def call(v: Tensor) -> Tensor:
        y = OPERATORS["GlobalAveragePool"](n, v)
        count = math.prod(v.shape[2:])

        def compute(given: Tensor) -> Tensor:
            sums = x.centered(given).double().sum(list(range(2, given.dim())), keepdim=True)
            factor = x.scale / (out.scale * count)
            return out.snapped(sums.float() * factor.to(sums.device)).to(given.dtype)

        return exact(out.clamped(y), compute, v)

    return Built(call, [0], [x], out)


@builder("com.microsoft:QLinearConcat")
def _concat(n: Node, const: Sequence[Any], types: Sequence[int | None]) -> Built:
    out = grid(n, const[0], const[1], types[1])
    data = list(range(2, len(const), 3))
    grids = [grid(n, const[p + 1], const[p + 2], types[p + 2]) for p in data]
    function = _snapping(lambda *v: torch.cat(v, n.get("axis")), out)
    return Built(function, data, list(grids), out)


PASSING = frozenset(
    "Reshape Flatten Transpose Squeeze Unsqueeze Identity Slice Split Gather GatherND GatherElements MaxPool Expand "
    "Tile DepthToSpace SpaceToDepth Concat Dropout Pad GlobalMaxPool ArgMax ArgMin TopK".split()
)
"""Operators that only move or choose values, so that those on a grid stay on it."""
