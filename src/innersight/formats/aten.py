"""aten operators as the functions a live model calls, so that one set of names, rules and geometry serves both.

A TorchScript or `torch.export` graph holds `aten::batch_norm(x, weight, bias, mean, ...)` where a live model calls
`F.batch_norm(x, mean, ..., weight, bias)`, and `aten::slice` and `aten::select` where it wrote `x[:, 0]`. Operators
whose arguments stand in the same order are called as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Sizes = Sequence[int]


def python_call(overload: torch._ops.OpOverload) -> Callable[..., Any]:
    """What to call for an operator: torch's public function, given the arguments in its order, or the operator."""
    namespace, _, name = overload._schema.name.partition("::")
    return _CALLS.get(name, overload) if namespace == "aten" else overload


def _batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None,
                training: bool, momentum: float, eps: float, _cudnn: bool) -> Tensor:  # fmt: skip
    return F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)


def _instance_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None,
                   use_input_stats: bool, momentum: float, eps: float, _cudnn: bool) -> Tensor:  # fmt: skip
    return F.instance_norm(x, mean, var, weight, bias, use_input_stats, momentum, eps)


def _group_norm(x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5,
                _cudnn: bool = True) -> Tensor:  # fmt: skip
    return F.group_norm(x, groups, weight, bias, eps)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sizes, padding: Sizes, dilation: Sizes,
                 transposed: bool, output_padding: Sizes, groups: int, *_flags: bool) -> Tensor:  # fmt: skip
    axes = weight.dim() - 2
    if transposed:
        return getattr(F, f"conv_transpose{axes}d")(x, weight, bias, stride, padding, output_padding, groups, dilation)
    return getattr(F, f"conv{axes}d")(x, weight, bias, stride, padding, dilation, groups)


def _slice(x: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Tensor:
    if not start and step == 1 and (end is None or (isinstance(end, int) and end >= x.shape[dim])):
        return x  # the `:` of x[:, 0]
    return x[(*[slice(None)] * (dim % x.dim()), slice(start, end, step))]


def _select(x: Tensor, dim: int, index: int) -> Tensor:
    place: Any = (*[slice(None)] * (dim % x.dim()), index)
    return x[place]


def _rsub(x: Tensor, other: Any, alpha: Any = 1) -> Tensor:
    return other - x if alpha == 1 else other - alpha * x


def _embedding(weight: Tensor, indices: Tensor, *_: Any) -> Tensor:
    return F.embedding(indices, weight)


def _native_attention(query: Tensor, key: Tensor, value: Tensor, width: int, heads: int, qkv_weight: Tensor,
                      qkv_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor, mask: Tensor | None = None,
                      need_weights: bool = True, average: bool = True,
                      mask_type: int | None = None) -> Any:  # fmt: skip
    """The fused kernel of `nn.MultiheadAttention` has no gradient and hides its inside: the function it stands for."""
    if mask_type not in (None, 0, 1):
        native = torch._native_multi_head_attention
        return native(query, key, value, width, heads, qkv_weight, qkv_bias, proj_weight, proj_bias, mask,
                      need_weights, average, mask_type)  # fmt: skip
    q = query.transpose(1, 0)
    k = q if key is query else key.transpose(1, 0)
    v = k if value is key else value.transpose(1, 0)
    output, weights = F.multi_head_attention_forward(
        q, k, v, width, heads, qkv_weight, qkv_bias, None, None, False, 0.0, proj_weight, proj_bias, False,
        key_padding_mask=mask if mask_type == 1 else None, need_weights=need_weights,
        attn_mask=mask if mask_type == 0 else None, average_attn_weights=average,
    )  # fmt: skip
    return output.transpose(1, 0), weights


def _nearest(x: Tensor, size: Sizes | None, *scales: Any) -> Tensor:
    return F.interpolate(x, size, _scales(scales, x) if size is None else None, "nearest")


def _smooth(mode: str) -> Callable[..., Tensor]:
    def call(x: Tensor, size: Sizes | None, align_corners: bool, *scales: Any) -> Tensor:
        return F.interpolate(x, size, _scales(scales, x) if size is None else None, mode, align_corners)

    return call


def _scales(scales: tuple[Any, ...], x: Tensor) -> Any:
    """`.vec` operators hold one list of factors, the others a number for each axis."""
    if len(scales) == 1 and (scales[0] is None or isinstance(scales[0], (list, tuple))):
        return scales[0]
    return list(scales) if len(scales) == x.dim() - 2 and None not in scales else None


_CALLS: dict[str, Callable[..., Any]] = {
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "group_norm": _group_norm,
    "_convolution": _convolution,
    "convolution": _convolution,
    "slice": _slice,
    "select": _select,
    "rsub": _rsub,
    "embedding": _embedding,
    "col2im": F.fold,
    "im2col": F.unfold,
    "_native_multi_head_attention": _native_attention,
    "scaled_dot_product_attention": F.scaled_dot_product_attention,
    "upsample_nearest2d": _nearest,
    "upsample_bilinear2d": _smooth("bilinear"),
    "upsample_bicubic2d": _smooth("bicubic"),
    "upsample_trilinear3d": _smooth("trilinear"),
    **{name: getattr(F, name) for name in ("conv1d", "conv2d", "conv3d", "linear")},
    **{name: getattr(F, name) for name in ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")},
}
