"""The integer arithmetic of TFLite's kernels, bit for bit: multipliers, roundings, tables.

Two sets of kernels are followed where they differ: TFLite-Micro's, which microcontrollers run, and LiteRT's reference
kernels. Integers are held in floating tensors as long as that is exact, which is faster than int64: a float64
holds 53 bits, and the products here are proven to stay below.

A real multiplier d is (q, e): d = q / 2^31 * 2^e with q a 31-bit integer
(`tensorflow/lite/kernels/internal/quantization_util.cc`, `.../common.cc`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Array = np.ndarray
f32 = np.float32

# ---------------------------------------------------------------------------------------------------------------------
# Multipliers


def multiplier(real: Any) -> tuple[Array, Array]:
    """(q, e), int64, of real multipliers >= 0."""
    fraction, exponent = np.frexp(np.asarray(real, np.float64))
    q = np.floor(fraction * 2.0**31 + 0.5).astype(np.int64)
    e = exponent.astype(np.int64)
    full = q == 1 << 31
    q, e = np.where(full, 1 << 30, q), np.where(full, e + 1, e)
    lost = e < -31
    return np.where(lost, 0, q), np.where(lost, 0, e)


def wrap32(x: Array) -> Array:
    """The low 32 bits, as a signed number."""
    return ((x + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)


def high_multiply(a: Any, b: Any) -> Any:
    """floor((a b + 2^30) / 2^31) of int64 arrays or tensors: the saturating rounding doubling high multiply."""
    return (a * b + (1 << 30)) >> 31


def half_away(x: Any, r: Any) -> Any:
    """x / 2^r rounded half away from zero, of int64 arrays or tensors; r >= 0."""
    return np.where(r > 0, (x + ((1 << r) >> 1) - (x < 0)) >> r, x) if isinstance(x, np.ndarray) else (
        (x + ((1 << r) >> 1) - (x < 0).long()) >> r if r > 0 else x
    )  # fmt: skip


def twice_rounded(x: Array, q: Array, e: Array) -> Array:
    """x d, rounded to a high product, then to what is left of the shift: nearly all kernels."""
    left, right = np.maximum(e, 0), np.maximum(-e, 0)
    return half_away(high_multiply(wrap32(np.asarray(x, np.int64) << left), q), right)


def once_rounded(x: Array, q: Array, e: Array) -> Array:
    """x d, rounded once, up at half: FULLY_CONNECTED of LiteRT's reference kernels."""
    x = np.asarray(x, np.int64)
    return (x * q + (1 << (30 - e))) >> (31 - e)


def away(x: Any) -> Array:
    """Rounded half away from zero."""
    x = np.asarray(x, np.float64)
    return (np.sign(x) * np.floor(np.abs(x) + 0.5)).astype(np.int64)


class Scaling:
    """The kernels' product of an integer and a real multiplier, on tensors: one, or one a channel.

    limit: the greatest magnitude of what it is applied to, which says how few bits will do
    once:  rounded once
    """

    def __init__(self, real: Any, limit: float, once: bool = False):
        q, e = multiplier(real)
        self.q, self.e = np.atleast_1d(q), np.atleast_1d(e)
        self.once = once
        self.limit = limit
        bits = math.log2(max(limit, 1)) + max(float(self.e.max()), 0)
        self.plain, self.split = bits <= 22 and not once, bits <= 30.9 and not once
        left, right = np.maximum(self.e, 0), np.maximum(-self.e, 0)
        self.factor = torch.from_numpy(self.q * 2.0 ** (left - 31))
        self.high = torch.from_numpy((self.q >> 16).astype(np.float64))
        self.low = torch.from_numpy((self.q & 0xFFFF).astype(np.float64))
        self.left = torch.from_numpy(2.0**left)
        self.shrink = torch.from_numpy(2.0**-right)

    def __call__(self, x: Tensor, shape: tuple[int, ...] = (-1,), positive: bool = False) -> Tensor:
        """x d for integers in a float64 tensor of its own, which is overwritten.

        shape: where the channels stand; positive: nobody looks at what is below 0, which is then rounded otherwise
        """

        def at(values: Tensor) -> Tensor:
            return values.to(x.device).view(shape)

        if self.plain:
            h = x.mul_(at(self.factor)).add_(0.5).floor_()
        elif self.split:
            x = x.mul_(at(self.left))
            low = x.mul(at(self.low)).add_(2.0**30).div_(2.0**16).floor_()
            h = x.mul_(at(self.high)).add_(low).div_(2.0**15).floor_()
        else:
            return self._wide(x, shape)
        if positive:
            return h.mul_(at(self.shrink)).add_(0.5).floor_()
        half = torch.copysign(torch.full((), 0.5, dtype=h.dtype, device=h.device), h)
        return h.mul_(at(self.shrink)).add_(half).trunc_()

    def _wide(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        def at(values: Array) -> Tensor:
            return torch.from_numpy(values).to(x.device).view(shape)

        wide, q, e = x.long(), at(self.q), at(self.e)
        if self.once:
            return ((wide * q + (1 << (30 - e))) >> (31 - e)).double()
        left, right = e.clamp(min=0), (-e).clamp(min=0)
        moved = (((wide << left) + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)
        h = high_multiply(moved, q)
        return torch.where(right > 0, (h + ((1 << right) >> 1) - (h < 0).long()) >> right, h).double()


# ---------------------------------------------------------------------------------------------------------------------
# Sums of products

EXACT = 1 << 24
"""Whole numbers up to here are exact in float32, in any order of summation."""

_probed: dict[torch.device, bool] = {}


def sums_are_exact(device: torch.device) -> bool:
    """Whether a float32 convolution of small integers is exact on this device as torch is set; asked once.

    Fast algorithms (Winograd, FFT) and short types (TF32, bfloat16) are not.
    """
    if device not in _probed:
        generator = torch.Generator().manual_seed(0)
        x = torch.randint(-255, 256, (16, 16, 12, 12), generator=generator)
        w = torch.randint(-127, 128, (16, 16, 3, 3), generator=generator)
        columns = F.unfold(x.double(), 3, padding=1)
        right = (w.double().flatten(1) @ columns).view(16, 16, 12, 12)
        with torch.no_grad(), torch._C.DisableTorchFunction():
            got = F.conv2d(x.float().to(device), w.float().to(device), padding=1).double().cpu()
        _probed[device] = torch.equal(got, right)
    return _probed[device]


# ---------------------------------------------------------------------------------------------------------------------
# Tables of functions of one 8-bit number


def all_of(lo: int, hi: int) -> Array:
    return np.arange(lo, hi + 1, dtype=np.int64)


def float_function(function: Callable[[Array], Array], s: float, z: int, s_out: float, z_out: int,
                   x: Array) -> Array:  # fmt: skip
    """LOGISTIC, TANH, EXP, ...: the function in float32, then quantised."""
    real = f32(s) * (x - z).astype(f32)
    return away(function(real).astype(f32) * (f32(1) / f32(s_out))) + z_out


def logistic(x: Array) -> Array:
    return f32(1) / (f32(1) + np.exp(-x))


def hard_swish(s: float, z: int, s_out: float, z_out: int, x: Array) -> Array:
    """In 16 bits (`.../reference/hard_swish.h`)."""

    def high16(a: Array, b: Any) -> Array:
        return (a * b + (1 << 14)) >> 15

    def sixteen(q: Any) -> Array:
        return np.minimum((q + (1 << 15)) >> 16, 32767)

    high = f32(s) * f32(1 / 128)
    (qa, ea), (qb, eb) = multiplier(np.float64(high) / s_out), multiplier(np.float64(high) / np.float64(f32(3 / 32768)))
    u = (x - z) << 7
    p = high16(u, sixteen(qa))
    t = u
    if eb > 0:
        t = np.clip(t << (eb - 1), -32768, 32767)
    t = high16(t, sixteen(qb))
    if eb > 0:
        t = np.clip(t << 1, -32768, 32767)
    if eb < 0:
        t = half_away(t, -eb)
    t = (t + (1 << 15)) >> 1
    product = t * p
    product = np.sign(product) * (np.abs(product) >> 15)
    return half_away(product, np.maximum(-ea, 0)) + z_out


# ---------------------------------------------------------------------------------------------------------------------
# Softmax (`.../reference/softmax.h`, gemmlowp's fixed point)

_ONE = 1 << 31


def _constant(value: float) -> int:
    return min(math.floor(_ONE * value + 0.5), _ONE - 1)


def _exp_of_negative(a: Array, bits: int) -> Array:
    """exp of a <= 0 with `bits` bits before the point, as a fraction of 2^31."""
    f = 31 - bits
    quarter = 1 << (f - 2)
    m = (a & (quarter - 1)) - quarter
    u = (m << bits) + (1 << 28)
    u2 = high_multiply(u, u)
    u3, u4 = high_multiply(u2, u), high_multiply(u2, u2)
    p = half_away(high_multiply(half_away(u4, 2) + u3, _constant(1 / 3)) + u2, 1)
    eighth = _constant(math.exp(-1 / 8))
    e = eighth + high_multiply(np.asarray(eighth), u + p)
    for j in range(-2, 5):
        if j < bits:
            e = np.where((m - a) >> (f + j) & 1, high_multiply(e, _constant(math.exp(-(2.0**j)))), e)
    return np.where(a == 0, _ONE - 1, e)


def _reciprocal(x: Tensor) -> Tensor:
    """1 / (1 + x) of fractions of 2^31."""
    half = (x + _ONE) // 2
    w = math.floor(2**29 * 48 / 17 + 0.5) + high_multiply(half, -math.floor(2**29 * 32 / 17 + 0.5))
    for _ in range(3):
        w = w + (4 * high_multiply(w, (1 << 29) - high_multiply(half, w))).clamp(-_ONE, _ONE - 1)
    return (2 * w).clamp(-_ONE, _ONE - 1)


class Softmax:
    """Softmax of 8-bit integers along the last axis, as integers."""

    def __init__(self, scale: float, beta: float, lo: int, hi: int):
        self.lo, self.hi = lo, hi
        q, e = multiplier(min(beta * scale * 2.0**26, 2.0**31 - 1))
        left = int(e)
        least = -math.floor(31 * 2.0**26 / 2.0**left)
        d = -np.arange(256, dtype=np.int64)
        scaled = d << left if left >= 0 else d >> -left
        e = _exp_of_negative(high_multiply(scaled, q), 5)
        e = np.where(d < least, 0, e)
        self.e = torch.from_numpy(np.asarray(e, np.int64))
        self.small = half_away(self.e, 12)
        self.lost = torch.from_numpy(d < least)

    def __call__(self, q: Tensor) -> Tensor:
        """int64 -> int64 of the same shape."""
        below = (q.amax(-1, keepdim=True) - q).clamp(max=255)
        e, small, lost = (t.to(q.device)[below] for t in (self.e, self.small, self.lost))
        total = small.sum(-1, keepdim=True)
        # leading zeros of a 32-bit number; float64 holds it exactly
        zeros = 31 - torch.floor(torch.log2(total.double())).long()
        share = _reciprocal((total << zeros) - _ONE)
        shift = 12 - zeros + 31 - 8
        y = high_multiply(share.expand_as(e), e)
        y = (y + ((1 << shift) >> 1) - (y < 0).long()) >> shift
        return (y + self.lo).masked_fill(lost, self.lo).clamp(self.lo, self.hi)
