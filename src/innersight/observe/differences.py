"""DeepLIFT's rescale rule as a table: every operation explains how its output differs from that on a baseline.

With x the operand, x0 what it was on the baseline and m the multiplier that reaches the output, each surrogate is
linear in x, and its slope times (x - x0) is exactly y - y0. So the terms of a whole network sum to f(x) - f(x0),
whatever it is made of: what libraries that hook modules leave to the gradient (functional and reused activations,
products, softmax, norms, max pooling) has its rule here.

Shrikumar, Greenside, Kundaje: Learning Important Features Through Propagating Activation Differences, ICML 2017
(arXiv:1704.02685), the rescale rule; products and norms after Chen, Lundberg, Lee: Explaining a series of models by
propagating Shapley values, Nature Communications 2022.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from innersight import errors
from innersight.observe.composites import RELEVANCE
from innersight.observe.surrogates import (
    CONSTANT,
    CONVOLUTIONS,
    OWN,
    PRODUCTS,
    Entry,
    Op,
    Rules,
    Surrogate,
    Terms,
    Way,
    statistics,
    surrogate,
)

# ---------------------------------------------------------------------------------------------------------------------
# Pieces


def _slope(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
    """(f(x) - f(x0)) / (x - x0) of an elementwise function; where they are as good as one, the derivative between."""
    x, x0 = x.detach(), x0.detach()
    difference = x - x0
    near = difference.abs() < 1e-6 * (1 + x0.abs())
    with torch.no_grad():
        slope = (function(x) - function(x0)) / torch.where(near, 1, difference)
    if bool(near.any()):
        with torch.enable_grad():
            middle = ((x + x0) / 2).requires_grad_()
            (derivative,) = torch.autograd.grad(function(middle).sum(), middle)
        slope = torch.where(near, derivative, slope)
    return slope


def _unknown(op: Op, how: str) -> errors.Unsupported:
    return errors.Unsupported(
        f"DeepLIFT has no rule for {op.name!r} {how} (layer {op.layer!r}); integrated_gradients needs none"
    )


def _baseline(op: Op) -> list[torch.Tensor]:
    assert op.baseline is not None, "DeepLIFT compares with a baseline: run it with one"
    return op.baseline


def _winner(dim: int, x: torch.Tensor, x0: torch.Tensor, y: torch.Tensor, y0: torch.Tensor, at: torch.Tensor,
            at0: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """A maximum: what rose is owed to the winner, what fell to the winner on the baseline. The slope is in [0, 1].

    x, x0: with all that compete in `dim`; y, at and y0, at0: the maxima and where in `dim` they stand
    """
    who = torch.where(y >= y0, at, at0)
    read = x.gather(dim, who)
    with torch.no_grad():
        moved = read - x0.gather(dim, who)
        slope = torch.where(moved == 0, 1, (y - y0) / torch.where(moved == 0, 1, moved))
    return read * slope


# ---------------------------------------------------------------------------------------------------------------------
# Rules


@surrogate
def rescale(op: Op) -> Terms:
    """An elementwise function: the slope of its secant."""
    return op.inputs[0] * _slope(op, op.inputs[0], _baseline(op)[0])


@surrogate
def midpoint(op: Op) -> Terms:
    """A product: each factor with the mean of the other's two values; exact, and the same for both."""
    (a, b), (a0, b0) = op.inputs, _baseline(op)
    return op(a, (b.detach() + b0) / 2) + op((a.detach() + a0) / 2, b)


def product(op: Op) -> Way | Surrogate:
    return OWN if len(op.inputs) == 1 else midpoint


@surrogate
def quotient(op: Op) -> Terms:
    """A product with the reciprocal."""
    inputs, base = list(op.inputs), list(_baseline(op))
    above = inputs.pop(0) if op.varies(0, "input") else op.arg(0, "input")
    above0 = base.pop(0) if op.varies(0, "input") else above
    below, below0 = inputs[0], base[0]
    slope = -1 / (below.detach() * below0)
    one, one0 = 1 / below.detach(), 1 / below0
    top = above.detach() if isinstance(above, torch.Tensor) else above
    through = below * slope * (top + above0) / 2
    return through + above * (one + one0) / 2 if op.varies(0, "input") else through


def division(op: Op) -> Way | Surrogate:
    return quotient if op.varies(1, "other") else OWN


@surrogate
def fused_product(op: Op) -> Terms:
    """A sum and a product of two signals in one call."""
    *_, a, b = op.inputs
    *_, a0, b0 = _baseline(op)
    rest, zeros = op.inputs[:-2], [torch.zeros_like(i) for i in op.inputs[:-2]]
    return op(*rest, a, (b.detach() + b0) / 2) + op(*zeros, (a.detach() + a0) / 2, b)


def product_and_sum(op: Op) -> Way | Surrogate:
    both = op.varies(1, "batch1" if op.name == "baddbmm" else "tensor1") and op.varies(
        2, "batch2" if op.name == "baddbmm" else "tensor2"
    )
    return fused_product if both else OWN


def _exponentials(x: torch.Tensor, x0: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
    """exp(x) and exp(x0) under one shift, and exp's slope between."""
    shift = torch.maximum(x.detach(), x0).amax(dim, keepdim=True)
    return (x.detach() - shift).exp(), (x0 - shift).exp(), _slope(torch.exp, x.detach() - shift, x0 - shift)


@surrogate
def softmax(op: Op) -> Terms:
    """exp, sum, reciprocal, product."""
    (x,), (x0,) = op.inputs, _baseline(op)
    dim = op.arg(1, "dim", -1)
    e, e0, slope = _exponentials(x, x0, dim)
    s, s0 = e.sum(dim, keepdim=True), e0.sum(dim, keepdim=True)
    through = x * slope
    return through * (1 / s + 1 / s0) / 2 - through.sum(dim, keepdim=True) / (s * s0) * (e + e0) / 2


@surrogate
def log_softmax(op: Op) -> Terms:
    (x,), (x0,) = op.inputs, _baseline(op)
    dim = op.arg(1, "dim", -1)
    e, e0, slope = _exponentials(x, x0, dim)
    log = _slope(torch.log, e.sum(dim, keepdim=True), e0.sum(dim, keepdim=True))
    return x - (x * slope).sum(dim, keepdim=True) * log


def _normalized(x: torch.Tensor, x0: torch.Tensor, dims: tuple[int, ...], eps: float, center: bool = True,
                size: bool = False) -> torch.Tensor:  # fmt: skip
    """x over its spread: centering, square, mean, root, product. size: over its length, at least eps."""
    c = x - x.mean(dims, keepdim=True) if center else x
    c0 = x0 - x0.mean(dims, keepdim=True) if center else x0
    now, then = c.detach(), c0
    square = c * (now + then)  # less a constant: c² - c0² = (c - c0)(c + c0)

    def one_over(v: torch.Tensor) -> torch.Tensor:
        return 1 / v.sqrt().clamp(min=eps) if size else (v + eps).rsqrt()

    def spread(v: torch.Tensor) -> torch.Tensor:
        return v.sum(dims, keepdim=True) if size else v.mean(dims, keepdim=True)

    v, v0 = spread(now.square()), spread(then.square())
    root = spread(square) * _slope(one_over, v, v0)
    return c * (one_over(v) + one_over(v0)) / 2 + root * (now + then) / 2


def _channels(value: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | float:
    return 1.0 if value is None else value.view(1, -1, *[1] * (x.dim() - 2))


@surrogate
def layer_norm(op: Op) -> Terms:
    (x,), (x0,) = op.inputs, _baseline(op)
    dims, weight = tuple(range(-len(op.arg(1, "normalized_shape")), 0)), op.arg(2, "weight")
    return _normalized(x, x0, dims, op.arg(4, "eps", 1e-5)) * (1.0 if weight is None else weight)


@surrogate
def rms_norm(op: Op) -> Terms:
    (x,), (x0,) = op.inputs, _baseline(op)
    dims, weight, eps = tuple(range(-len(op.arg(1, "normalized_shape")), 0)), op.arg(2, "weight"), op.arg(3, "eps")
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return _normalized(x, x0, dims, eps, center=False) * (1.0 if weight is None else weight)


@surrogate
def group_norm(op: Op) -> Terms:
    (x,), (x0,), groups = op.inputs, _baseline(op), op.arg(1, "num_groups")
    parts, parts0 = (v.reshape(v.shape[0], groups, -1) for v in (x, x0))
    value = _normalized(parts, parts0, (2,), op.arg(4, "eps", 1e-5)).reshape(x.shape)
    return value * _channels(op.arg(2, "weight"), x)


@surrogate
def over_space(op: Op) -> Terms:
    """An instance norm with the picture's own statistics."""
    (x,), (x0,) = op.inputs, _baseline(op)
    value = _normalized(x, x0, tuple(range(2, x.dim())), op.arg(7, "eps", 1e-5))
    return value * _channels(op.arg(3, "weight"), x)


def instance_norm(op: Op) -> Way | Surrogate:
    return over_space if op.arg(5, "use_input_stats", True) else OWN


def batch_norm(op: Op) -> Way | Surrogate:
    if not statistics(op.func, op.args, op.kwargs).fixed:
        raise _unknown(op, "with the statistics of the batch")
    return OWN


@surrogate
def unit_length(op: Op) -> Terms:
    (x,), (x0,) = op.inputs, _baseline(op)
    return _normalized(x, x0, (op.arg(2, "dim", 1),), op.arg(3, "eps", 1e-12), center=False, size=True)


def normalize(op: Op) -> Way | Surrogate:
    if op.arg(1, "p", 2.0) != 2:
        raise _unknown(op, "by another norm than the Euclidean")
    return unit_length


@surrogate
def pooled(op: Op) -> Terms:
    """Max pooling, window by window."""
    (x,), (x0,) = op.inputs, _baseline(op)
    space = int(op.name[-2])
    if op.name.startswith("adaptive"):
        pool = getattr(F, f"adaptive_max_pool{space}d_with_indices")
        options: tuple[Any, ...] = (op.arg(1, "output_size"),)
    else:
        pool = getattr(F, f"max_pool{space}d_with_indices")
        stride = op.arg(2, "stride") or None
        options = (op.arg(1, "kernel_size"), stride, op.arg(3, "padding", 0), op.arg(4, "dilation", 1),
                   op.arg(5, "ceil_mode", False))  # fmt: skip
    with torch.no_grad():
        (y, at), (y0, at0) = pool(x.detach(), *options), pool(x0, *options)
    first = x.dim() - space
    flat = [v.flatten(first) for v in (x, x0, y, y0, at, at0)]
    return _winner(first, *flat).reshape(y.shape)


@surrogate
def greatest(op: Op) -> Terms:
    """The greatest along one dimension, or of all."""
    (x,), (x0,) = op.inputs, _baseline(op)
    dim, keep = op.arg(1, "dim"), op.arg(2, "keepdim", False)
    dims = sorted(d % x.dim() for d in ([dim] if isinstance(dim, int) else dim or range(x.dim())))
    rest = [d for d in range(x.dim()) if d not in dims]
    a, a0 = (v.permute(*rest, *dims).flatten(len(rest)) for v in (x, x0))
    with torch.no_grad():
        (y, at), (y0, at0) = (v.max(-1, keepdim=True) for v in (a.detach(), a0))
    out = _winner(-1, a, a0, y, y0, at, at0)
    return out.reshape([1 if d in dims else s for d, s in enumerate(x.shape) if keep or d not in dims])


@surrogate
def greater(op: Op) -> Terms:
    """The greater (or less) of two signals."""
    sign = -1 if "min" in op.name else 1
    a, a0 = torch.stack(torch.broadcast_tensors(*op.inputs)), torch.stack(torch.broadcast_tensors(*_baseline(op)))
    with torch.no_grad():
        (y, at), (y0, at0) = ((sign * v).max(0, keepdim=True) for v in (a.detach(), a0))
    return sign * _winner(0, sign * a, sign * a0, y, y0, at, at0)[0]


def choosing(op: Op) -> Way | Surrogate:
    """max and min: of two signals, of a signal and a constant, or over dimensions."""
    if len(op.inputs) == 2:
        return greater
    if isinstance(op.arg(1, "other"), torch.Tensor):
        return rescale
    if op.name not in ("max", "amax"):
        raise _unknown(op, "over dimensions")
    return greatest


@surrogate
def gated(op: Op) -> Terms:
    """A gated linear unit."""
    dim = op.arg(1, "dim", -1)
    (a, b), (a0, b0) = op.inputs[0].chunk(2, dim), _baseline(op)[0].chunk(2, dim)
    gate, gate0 = b.detach().sigmoid(), b0.sigmoid()
    return a * (gate + gate0) / 2 + b * _slope(torch.sigmoid, b, b0) * (a.detach() + a0) / 2


@surrogate
def variance(op: Op) -> Terms:
    """The variance (or its root) along dimensions; a sum of squares."""
    (x,), (x0,) = op.inputs, _baseline(op)
    dims = op.arg(1, "dim")
    dims = tuple(range(x.dim())) if dims is None or isinstance(dims, bool) else dims
    c, c0 = x - x.mean(dims, keepdim=True), x0 - x0.mean(dims, keepdim=True)
    with torch.no_grad():
        y, y0 = op(x.detach()), op(x0)
        total, total0 = c.square().sum(dims, keepdim=True), c0.square().sum(dims, keepdim=True)
        rise = total - total0
        slope = (y - y0).reshape(rise.shape) / torch.where(rise == 0, 1, rise)
    out = (c * (c.detach() + c0)).sum(dims, keepdim=True) * slope
    return out.reshape(y.shape)


# ---------------------------------------------------------------------------------------------------------------------
# The table

# What keeps relevance under its own gradient is linear, but for these.
_NOT_LINEAR = """
    amin median sort topk fractional_max_pool2d max_unpool2d lp_pool1d lp_pool2d lp_pool3d nansum nanmean masked_select
    view_as_real view_as_complex roi_pool
    """
_ELEMENTWISE = """
    relu relu6 leaky_relu prelu rrelu elu selu celu gelu silu swish mish hardswish hardsigmoid hardtanh sigmoid expit
    logsigmoid log_sigmoid tanh softplus softsign softshrink hardshrink tanhshrink threshold clamp clip clamp_min
    clamp_max exp exp2 log log2 log10 log1p expm1 sqrt rsqrt reciprocal square pow float_power abs sin cos sinh cosh
    atan asinh erf nan_to_num
    """
_STEPS = """
    argmax argmin argsort eq ne lt le gt ge logical_and logical_or logical_not logical_xor isnan isfinite isinf
    count_nonzero any all int long bool one_hot bucketize
    """


def _same(names: str, entry: Entry) -> dict[str, Entry]:
    return dict.fromkeys(names.split(), entry)


_TABLE: dict[str, Entry] = {
    **{name: OWN for name, entry in RELEVANCE.items() if entry is OWN and name not in _NOT_LINEAR.split()},
    **_same("add sub rsub cat concat concatenate stack hstack vstack dstack subtract pad constant_pad_nd", OWN),
    **_same("where masked_fill masked_scatter", OWN),
    **_same(_STEPS, CONSTANT),
    **_same(_ELEMENTWISE, rescale),
    **_same(" ".join([*CONVOLUTIONS, *PRODUCTS]), product),
    **_same("mul multiply dot mv", product),
    **_same("addcmul baddbmm", product_and_sum),
    **_same("div divide true_divide", division),
    **_same("max_pool1d max_pool2d max_pool3d", pooled),
    **_same("adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d", pooled),
    **_same("maximum minimum fmax fmin max min amax", choosing),
    **_same("var std", variance),
    "exact": OWN,
    "softmax": softmax,
    "log_softmax": log_softmax,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "group_norm": group_norm,
    "instance_norm": instance_norm,
    "batch_norm": batch_norm,
    "normalize": normalize,
    "glu": gated,
}
DEEPLIFT = Rules("DeepLIFT", _TABLE, fold=False, books=False)
