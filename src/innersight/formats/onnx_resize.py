"""Resize as ONNX Runtime computes it: in every mode one matrix of weights an axis, in torch's own function where equal.

The specification: https://onnx.ai/onnx/operators/onnx__Resize.html. ONNX Runtime multiplies sizes and places pixels
in float32, which decides where a coordinate falls on a whole number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from innersight.formats.onnx_operators import Node

MAX_SIDE = 1 << 16
"""Pixels along one side that are still a picture."""


def resize(n: Node, x: torch.Tensor, roi: Any, scales: Any, sizes: Any) -> torch.Tensor:
    """x with its axes resized; see the operator's specification for the attributes."""
    from innersight.formats.onnx_operators import allowed, constant, ints, numbers, refuse

    axes = [a % x.dim() for a in n.get("axes", range(x.dim()))]
    factors = None if scales is None else [float(v) for v in numbers(scales)]
    wanted = None if sizes is None else ints(sizes)
    if wanted:
        if len(wanted) != len(axes):
            raise refuse(n, f"has {len(wanted)} sizes for {len(axes)} axes")
        if n.batch is not None and axes[0] == 0 and wanted[0] == n.batch:
            wanted[0] = x.shape[0]
        policy = n.get("keep_aspect_ratio_policy", b"stretch")
        if policy != b"stretch":
            choose = min if policy == b"not_larger" else max
            scale = choose(w / x.shape[a] for w, a in zip(wanted, axes, strict=True))
            factors = [scale] * len(axes)
            wanted = [math.floor(scale * x.shape[a] + 0.5) for a in axes]
        else:
            factors = [w / x.shape[a] for w, a in zip(wanted, axes, strict=True)]
    elif factors:
        if len(factors) != len(axes):
            raise refuse(n, f"has {len(factors)} scales for {len(axes)} axes")
        if min(factors) <= 0:
            raise refuse(n, "has a scale that is not positive")
        grown = [np.float32(x.shape[a]) * np.float32(f) for f, a in zip(factors, axes, strict=True)]
        wanted = [int(np.floor(np.minimum(side, np.float32(2**31)))) for side in grown]
    else:
        raise refuse(n, "says neither sizes nor scales")
    if max(wanted) > max(MAX_SIDE, *x.shape) or min(wanted) < 0:
        raise refuse(n, f"makes a side of {max(wanted)} pixels, more than a picture can need")
    assert factors is not None
    sides = dict(zip(axes, wanted, strict=True))
    allowed([sides.get(i, side) for i, side in enumerate(x.shape)])
    mode = n.get("mode", b"nearest").decode()
    coordinates = n.get("coordinate_transformation_mode", b"half_pixel").decode()
    region = None
    if coordinates == "tf_crop_and_resize":
        corners = [float(v) for v in numbers(roi)]
        region = {a: (corners[i], corners[i + len(axes)]) for i, a in enumerate(axes)}
    todo = [
        (a, out, f)
        for a, out, f in zip(axes, wanted, factors, strict=True)
        if out != x.shape[a] or f != 1 or region is not None
    ]
    if not todo:
        return x
    if (fast := _by_torch(n, x, todo, mode, coordinates)) is not None:
        return fast
    outside = []
    for axis, out, factor in todo:
        side = x.shape[axis]
        places = _coordinates(out, side, factor, coordinates, None if region is None else region[axis])
        if mode == "nearest":
            rounded = _rounded(places, n.get("nearest_mode", b"round_prefer_floor").decode())
            x = x.index_select(axis, constant(np.clip(rounded, 0, side - 1).astype(np.int64), x))
        else:
            matrix = constant(_weights(n, places, side, factor, mode), x)
            x = torch.matmul(x.movedim(axis, -1), matrix.T).movedim(-1, axis)
        outside.append((axis, (places < 0) | (places > side - 1)))
    if region is not None:
        value = n.get("extrapolation_value", 0.0)
        for axis, beyond in outside:
            mask = constant(beyond, x).reshape(-1, *[1] * (x.dim() - axis - 1))
            x = x.masked_fill(mask, value)
    return x if x.is_contiguous() else x.contiguous()


def _by_torch(n: Node, x: torch.Tensor, todo: Sequence[tuple[int, int, float]], mode: str,
              coordinates: str) -> torch.Tensor | None:  # fmt: skip
    """The same by `F.interpolate`, where it computes the same."""
    if x.dim() != 4 or not x.is_floating_point() or any(axis < 2 for axis, _, _ in todo) or n.get("antialias", 0):
        return None
    size = list(x.shape[2:])
    for axis, out, factor in todo:
        if abs(out / x.shape[axis] - factor) > 1e-9:
            return None
        size[axis - 2] = out
    whole = all(factor == int(factor) for _, _, factor in todo)
    nearest = n.get("nearest_mode", b"round_prefer_floor")
    if mode == "nearest":
        same = (coordinates, nearest) in (("asymmetric", b"floor"), ("half_pixel", b"round_prefer_floor"))
        return F.interpolate(x, size, mode="nearest") if whole and same else None
    if min(size) < 2 or (mode == "cubic" and (n.get("exclude_outside", 0) or n.get("cubic_coeff_a", -0.75) != -0.75)):
        return None
    corners = {"half_pixel": False, "pytorch_half_pixel": False, "align_corners": True}.get(coordinates)
    kind = {"linear": "bilinear", "cubic": "bicubic"}.get(mode)
    if corners is None or kind is None:
        return None
    return F.interpolate(x, size, mode=kind, align_corners=corners)


def _coordinates(out: int, side: int, factor: float, kind: str, region: tuple[float, float] | None) -> np.ndarray:
    """Where each pixel that comes out lies among those that go in, in float32 as ONNX Runtime has it."""
    f = np.float32
    i, scale = np.arange(out, dtype=f), f(factor)
    if kind == "asymmetric":
        return (i / scale).astype(f)
    if kind == "half_pixel" or (kind == "pytorch_half_pixel" and out > 1):
        return ((i + f(0.5)) / scale - f(0.5)).astype(f)
    if kind == "pytorch_half_pixel":
        return np.zeros(out, f)
    if kind == "align_corners":
        return (i * f(side - 1) / f(out - 1)).astype(f) if out > 1 else np.zeros(out, f)
    if kind == "half_pixel_symmetric":
        length = f(factor * side)
        center = f(side) / f(2)
        offset = center * (f(1) - f(out) / length)
        return (offset + (i + f(0.5)) / scale - f(0.5)).astype(f)
    if kind == "tf_half_pixel_for_nn":
        return ((i + f(0.5)) / scale).astype(f)
    if kind == "tf_crop_and_resize" and region is not None:
        start, end = region
        if out > 1:
            return (f(start) * f(side - 1) + i * f((end - start) * (side - 1) / (out - 1))).astype(f)
        return np.full(out, 0.5 * (start + end) * (side - 1), f)
    raise ValueError(f"coordinate_transformation_mode {kind!r} is not known")


def _rounded(places: np.ndarray, kind: str) -> np.ndarray:
    half = np.float32(0.5)
    if kind == "floor":
        return np.floor(places)
    if kind == "ceil":
        return np.ceil(places)
    if kind == "round_prefer_ceil":
        return np.floor(places + half)
    return np.ceil(places - half)


def _weights(n: Node, places: np.ndarray, side: int, factor: float, mode: str) -> np.ndarray:
    """(out, in): what each pixel that comes out takes of those that go in."""
    if mode not in ("linear", "cubic"):
        raise ValueError(f"mode {mode!r} is not known")
    stretch = max(1 / factor, 1.0) if n.get("antialias", 0) else 1.0
    reach = math.ceil((1 if mode == "linear" else 2) * stretch) + 1
    places = places.astype(np.float64)
    start = np.floor(places).astype(np.int64)
    taps = start[:, None] + np.arange(-reach, reach + 1)
    distance = np.abs(taps - places[:, None]) / stretch
    w = np.maximum(1 - distance, 0) if mode == "linear" else _cubic(distance, n.get("cubic_coeff_a", -0.75))
    if n.get("exclude_outside", 0):
        w = np.where((taps < 0) | (taps >= side), 0, w)
    w = w / w.sum(1, keepdims=True)
    table = np.zeros((len(places), side))
    np.add.at(table, (np.arange(len(places))[:, None], np.clip(taps, 0, side - 1)), w)
    return table


def _cubic(d: np.ndarray, a: float) -> np.ndarray:
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0))
