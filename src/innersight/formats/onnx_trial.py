"""The first run of a file, in which nothing grows beyond the limits, and the sizes that operators make.

Most sizes follow from the shapes by a line of arithmetic. Where that cannot tell, or tells of too much, the operator is
run on shapes alone first (`onnx_limits.Limited`), which is exact and slow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from innersight.formats import onnx_limits as limits
from innersight.formats.graph import Graph, Step
from innersight.formats.onnx_operators import Node

Shape = Sequence[int]


def _broadcast(_n: Node, shapes: list[Shape]) -> int:
    return math.prod(torch.broadcast_shapes(*shapes))


def _concat(_n: Node, shapes: list[Shape]) -> int:
    return sum(map(math.prod, shapes))


def _conv(n: Node, shapes: list[Shape]) -> int:
    x, w = shapes[:2]
    pads = n.get("pads") or [0] * (2 * len(x))
    d = len(x) - 2
    sides = [side + abs(pads[i]) + abs(pads[i + d]) + w[i + 2] * 8 for i, side in enumerate(x[2:])]
    return x[0] * w[0] * math.prod(sides)


def _conv_transpose(n: Node, shapes: list[Shape]) -> int:
    x, w = shapes[:2]
    d = len(x) - 2
    ones = [1] * d
    steps, dilations, extra = n.get("strides") or ones, n.get("dilations") or ones, n.get("output_padding") or ones
    sides = [(side - 1) * steps[i] + w[i + 2] * dilations[i] + extra[i] for i, side in enumerate(x[2:])]
    return x[0] * w[1] * n.get("group", 1) * math.prod(n.get("output_shape") or sides)


def _matmul(n: Node, shapes: list[Shape]) -> int:
    a, b = shapes[:2]
    if n.op in ("Gemm", "QGemm") or n.get("turned"):  # a matrix of weights, turned or not
        return math.prod(a[:-1]) * max(b) if not n.get("transA", 0) else math.prod(a) * max(b)
    if len(a) < 2 or len(b) < 2:
        return math.prod(a) + math.prod(b)
    return math.prod(torch.broadcast_shapes(a[:-2], b[:-2])) * a[-2] * b[-1]


def _gather(n: Node, shapes: list[Shape]) -> int:
    x, index = (shapes[0], shapes[1] if len(shapes) > 1 else ())
    return math.prod(x) // max(x[n.get("axis", 0)], 1) * math.prod(index)


_SIZES: dict[str, Callable[[Node, list[Shape]], int]] = {
    **dict.fromkeys(
        "Add Sub Mul Div Pow Equal Less LessOrEqual Greater GreaterOrEqual And Or Xor Sum Max Min Mean Where Mod PRelu "
        "BitwiseAnd BitwiseOr BitwiseXor com.microsoft:QLinearAdd com.microsoft:QLinearMul".split(),
        _broadcast,
    ),
    "Concat": _concat,
    "Conv": _conv,
    "ConvInteger": _conv,
    "ConvTranspose": _conv_transpose,
    "QLinearConv": _conv,
    "com.microsoft:FusedConv": _conv,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "Gemm": _matmul,
    "com.microsoft:QGemm": _matmul,
    "Gather": _gather,
}
_NO_LARGER = frozenset(
    """
    Relu Sigmoid Tanh Abs Neg Exp Log Sqrt Reciprocal Floor Ceil Round Erf Sign Sin Cos HardSwish Softplus Softsign Mish
    Not IsNaN IsInf Clip LeakyRelu Elu Celu Selu HardSigmoid ThresholdedRelu Gelu Swish Identity Dropout Cast
    BatchNormalization InstanceNormalization LayerNormalization GroupNormalization LRN LpNormalization Softmax
    LogSoftmax Hardmax MaxPool AveragePool LpPool GlobalAveragePool GlobalMaxPool ReduceMean ReduceSum ReduceMax
    ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceSumSquare ArgMax ArgMin Shape Size Reshape Flatten Squeeze Unsqueeze
    Transpose Split Slice DepthToSpace SpaceToDepth Trilu QuantizeLinear DequantizeLinear DynamicQuantizeLinear
    ScatterND ScatterElements Scatter GatherElements CumSum CumProd TopK Compress EyeLike CenterCropPad
    Pad Tile Expand ConstantOfShape Range OneHot Resize Upsample
    com.microsoft:QLinearSigmoid com.microsoft:QLinearLeakyRelu com.microsoft:QLinearGlobalAveragePool
    com.microsoft:QLinearAveragePool Constant
    """.split()
)
"""Operators that make nothing larger than what they read; those of the last lines but one ask `allowed` themselves."""


def within(n: Node, given: Iterable[Any], most: int, run: Callable[[], Any]) -> Any:
    """What `run` makes, unless it would be more than `most` bytes, which raises ValueError."""
    with limits.strict(most):
        if n.key in _NO_LARGER or _small(n, given, most):
            return run()
        with limits.Limited(most):
            return run()


def _small(n: Node, given: Iterable[Any], most: int) -> bool:
    shapes: list[Shape] = [tuple(v.shape) for v in given if isinstance(v, torch.Tensor)]
    if n.key not in _SIZES or not shapes:
        return False
    try:
        return _SIZES[n.key](n, shapes) * 8 <= most
    except (RuntimeError, IndexError, TypeError, ValueError):
        return False


def limited_run(graph: Graph, nodes: Mapping[str, Node], x: torch.Tensor) -> tuple:
    """One run without gradient in which nothing grows beyond the limits; the outputs.

    nodes: by the name of their step
    """
    most = limits.most(x)
    held: dict[Any, int] = {}

    def through(step: Step, given: list[Any]) -> Any:
        return within(nodes[step.name], given, most, lambda: graph.step(step, given))

    def watch(step: Step, made: dict[Any, Any], dead: Iterable[Any]) -> None:
        held.update((key, limits.live([value])) for key, value in made.items())
        for key in dead:
            held.pop(key, None)
        if sum(held.values()) > limits.MAX_LIVE * len(x):
            raise RuntimeError(f"{step.kind} {step.name!r}: its values need more memory than is allowed here")

    with torch.no_grad():
        values = graph.run(x, watch=watch, through=through)
    return tuple(values[k] for k in graph.outputs)
