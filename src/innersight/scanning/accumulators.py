"""What a scan counts of each channel, and how two counts become one.

A count is a dict of arrays named "LAYER/FIELD", LAYER being the number of the layer in the plan of the scan. Fields,
for C channels, k kept tops and K classes:

    images (C,)        images with a finite cell               cells (C,)         finite cells
    sum, square (C,)   over cells, float64                     low, high (C,)     smallest and greatest cell
    zeros, nonfinite (C,)  cells                               fires (C,)         images with a cell above zero
    clipped (C,)       cells at an end of the layer's range, where it has one (ReLU6, quantised layers)
    histogram (C, BINS)    of `SAMPLED` cells an image, see `bins`
    mean, mean_square (C,) over images, of the mean of an image's cells
    top_value, top_image, top_y, top_x (k, C)  the strongest cell of the strongest images, ties to the lower image
    class_sum (K, C), class_count (K,), class_square (C,)  of the means of images that have a class, by class
    cross (C, C)       sums of products of the means of images

Counts are integers or float64, so `merge` is exact but for the rounding of float64, and that does not depend on when
which block was counted: blocks are merged along one fixed tree (`store`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

Counts = dict[str, np.ndarray]

SAMPLED = 16
"""Cells an image that enter the histogram (and the quantiles read from it); all of them where a map has no more."""

_LOWEST, _HIGHEST = -10, 16  # octaves: 2 ** -10 to 2 ** 16
_PER_OCTAVE = 4
_SIDE = (_HIGHEST - _LOWEST) * _PER_OCTAVE + 1  # bins of one sign; the innermost is what is nearer to 0 than 2 ** -10
BINS = 2 * _SIDE + 1


def bins(values: np.ndarray) -> np.ndarray:
    """The bin of each float32: four an octave of its magnitude, one for 0; what is beyond 2 ** 16 is in the last.

    The first two bits of the mantissa follow the exponent in a float's own bits, so its first eleven tell the bin
    (and what is nearer to 0 than 2 ** -128 counts as 0).
    """
    return _BIN_OF_BITS.take(np.ascontiguousarray(values, dtype=np.float32).view(np.uint32) >> (32 - 11))


def _bin_of_bits() -> np.ndarray:
    magnitude = np.arange(1 << 10)
    step = np.clip(magnitude - ((127 + _LOWEST) * _PER_OCTAVE - 2), 1, _SIDE)
    step[0] = 0
    return np.concatenate([_SIDE + step, _SIDE - step])


_BIN_OF_BITS = _bin_of_bits()


def edges() -> np.ndarray:
    """(BINS, 2): the lower and upper edge of each bin."""
    octave, part = np.divmod(np.arange(_SIDE), _PER_OCTAVE)
    above = 2.0 ** (_LOWEST + octave) * (1 + part / _PER_OCTAVE)  # the outer edge of each bin
    inner = np.concatenate([[0.0], above[:-1]])
    positive = np.stack([inner, above], 1)
    return np.concatenate([-positive[::-1, ::-1], np.zeros((1, 2)), positive])


def quantiles(histogram: np.ndarray, shares: Sequence[float], low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """(C, len(shares)) from histograms (C, BINS), linear inside of a bin and no further than the extremes (C,).

    Off by a bin at most: a quarter of the value, 2 ** -10 around zero. NaN where nothing was counted.
    """
    below = np.cumsum(histogram, 1, dtype=np.float64)
    total = below[:, -1:]
    bounds = edges()
    found = np.full((len(histogram), len(shares)), np.nan)
    for i, share in enumerate(shares):
        rank = share * total[:, 0]
        at = np.minimum((below < rank[:, None]).sum(1), BINS - 1)
        at = np.where(rank == 0, (histogram > 0).argmax(1), at)
        inside = np.take_along_axis(histogram, at[:, None], 1)[:, 0]
        before = np.take_along_axis(below, at[:, None], 1)[:, 0] - inside
        share_of_bin = np.divide(rank - before, inside, out=np.zeros(len(at)), where=inside > 0)
        value = bounds[at, 0] + share_of_bin * (bounds[at, 1] - bounds[at, 0])
        found[:, i] = np.where(total[:, 0] > 0, np.clip(value, low, high), np.nan)
    return found


def positions(image: int, cells: int, count: int = SAMPLED) -> np.ndarray:
    """Which cells of an image's map enter the histogram: `count`, spread evenly from a place hashed from its id.

    The steps are the golden section of the map, made prime to its size, so that no cell is met twice.
    """
    if cells <= count:
        return np.arange(cells)
    step = max(1, round(cells * 0.6180339887498949))
    while math.gcd(step, cells) != 1:
        step += 1
    return (_hashed(image) % cells + step * np.arange(count)) % cells


def _hashed(number: int) -> int:
    """64 bits that look like chance (the finalizer of SplitMix64)."""
    x = (number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


Range = tuple[float | None, float | None]


def look(maps: torch.Tensor, ids: Sequence[int], ends: Range | None = None) -> dict[str, np.ndarray]:
    """What is kept of a batch of maps (n, C, H, W) of these images: numbers for each image and channel, (n, C).

    ends: the smallest and greatest value that the layer can take, None where there is no end
    """
    import torch

    last = maps.shape[1] > 1 and maps.stride(1) == 1  # channels last, as convolutions on a CPU and tokens have them
    x = maps.detach().float().movedim(1, -1 if last else 1).contiguous()
    n, cells, channels = len(x), maps.shape[2] * maps.shape[3], maps.shape[1]
    step = max(1, _IN_CACHE // max(channels * cells, 1)) if x.device.type == "cpu" else n
    room = torch.empty_like(x[:step])
    found = _joined([_reduced(part, room[: len(part)], last) for part in x.split(step)])
    found["finite"] = torch.full_like(found["at_y"], cells)
    if not bool(torch.isfinite(found["mean"]).all() and torch.isfinite(found["spread"]).all()):
        found = _reduced_where_finite(x.movedim(-1 if last else 1, 1))
    if ends is not None:
        low, high = (math.inf * sign if end is None else end for end, sign in zip(ends, (-1, 1), strict=True))
        found["clipped"] = ((maps <= low) | (maps >= high)).sum((2, 3))
    where = torch.from_numpy(np.stack([positions(i, cells) for i in ids])).to(x.device)
    if last:
        flat = x.flatten(1, 2)
        found["sample"] = flat.gather(1, where[..., None].expand(*where.shape, channels)).movedim(1, 2)
    else:
        found["sample"] = x.flatten(2).gather(2, where[:, None].expand(n, channels, -1))
    return {name: value.cpu().numpy() for name, value in found.items()} | {"cells": np.full(n, cells)}


_IN_CACHE = 1 << 20  # numbers that are read several times in a row; measured: a tenth of the time of whole batches


def _joined(parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    import torch

    return {name: torch.cat([one[name] for one in parts]) for name in parts[0]}


def _reduced(x: torch.Tensor, room: torch.Tensor, last: bool) -> dict[str, torch.Tensor]:
    """The numbers of maps (m, C, H, W), or (m, H, W, C) for `last`, all finite; `room`, as large, is written over.

    Of ways that say the same, those that a CPU does fast: squares of differences for the variance (`torch.var` takes
    ten times as long), a comparison written as floats for the zeros (exact up to 2 ** 24 cells), rows first for the
    maximum.
    """
    import torch

    height, width = (1, 2) if last else (2, 3)
    cells = x.shape[height] * x.shape[width]
    flat, space = (t.flatten(height, width) for t in (x, room))
    mean = flat.mean(height)
    torch.sub(flat, mean.unsqueeze(height), out=space)
    spread = space.square_().mean(height)
    zeros = torch.eq(flat, 0, out=space).sum(height) if cells < 1 << 24 else (flat == 0).sum(height)
    high, at_y = x.amax(width).max(height)
    index = at_y.unsqueeze(height).unsqueeze(width)
    row = x.gather(height, index.expand(*(1 if d == height else s for d, s in enumerate(x.shape)))).squeeze(height)
    return {"mean": mean, "spread": spread, "low": flat.amin(height), "high": high, "at_y": at_y,
            "at_x": row.argmax(width - 1), "zeros": zeros.long()}  # fmt: skip


def _reduced_where_finite(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same without the cells that are infinite or NaN."""
    flat, width = x.flatten(2), x.shape[-1]
    good = flat.isfinite()
    finite = good.sum(-1)
    exact = flat.masked_fill(~good, 0).double()
    mean = exact.sum(-1) / finite.clamp(min=1)
    spread = ((exact - mean[..., None]) ** 2).mul(good).sum(-1) / finite.clamp(min=1)
    high, at = flat.masked_fill(~good, -math.inf).max(-1)
    return {"mean": mean, "spread": spread, "low": flat.masked_fill(~good, math.inf).amin(-1), "high": high,
            "at_y": at // width, "at_x": at % width, "zeros": (flat == 0).sum(-1), "finite": finite}  # fmt: skip


def count(
    looks: Sequence[Mapping[str, np.ndarray]], channels: int, ids: np.ndarray, top: int, classes: np.ndarray | None,
    class_count: int, cross: bool, clips: bool = False,
) -> Counts:  # fmt: skip
    """The fields of one layer over a block of images, from what `look` kept of its batches.

    ids:         (n,) ascending
    classes:     (n,) the class of each image, -1 where it has none; None to leave class means out
    class_count: K
    """
    if not looks:
        return empty(channels, top, class_count if classes is not None else 0, cross, clips)
    joined = {
        name: np.concatenate([one[name] for one in looks]) for name in looks[0] if name != "sample"
    }  # the samples of batches differ in length where maps do
    cells, mean = joined["finite"].astype(np.int64), joined["mean"].astype(np.float64)
    seen = cells > 0
    mean = np.where(seen, mean, 0)
    counts: Counts = {
        "images": seen.sum(0, dtype=np.int64),
        "cells": cells.sum(0),
        "sum": (mean * cells).sum(0),
        "square": ((joined["spread"].astype(np.float64) + mean**2) * cells).sum(0),
        "low": joined["low"].min(0),
        "high": joined["high"].max(0),
        "zeros": joined["zeros"].sum(0, dtype=np.int64),
        "nonfinite": (joined["cells"][:, None] - cells).sum(0),
        "fires": (joined["high"] > 0).sum(0, dtype=np.int64),
        "histogram": sum(_histogram(one["sample"]) for one in looks),  # type: ignore[dict-item]
        "mean": mean.sum(0),
        "mean_square": (mean**2).sum(0),
    }
    strength = np.where(seen, joined["high"], -np.inf).astype(np.float32)
    order = np.argsort(-strength, axis=0, kind="stable")[:top]
    tops = {
        "top_value": np.take_along_axis(strength, order, 0),
        "top_image": ids[order],
        "top_y": np.take_along_axis(joined["at_y"], order, 0),
        "top_x": np.take_along_axis(joined["at_x"], order, 0),
    }
    counts |= _padded(tops, top, channels)
    if "clipped" in joined:
        counts["clipped"] = joined["clipped"].sum(0, dtype=np.int64)
    if classes is not None:
        sums = np.zeros((class_count, channels))
        for k in np.unique(classes[classes >= 0]):
            sums[k] = mean[classes == k].sum(0)
        counts["class_sum"] = sums
        counts["class_count"] = np.bincount(classes[classes >= 0], minlength=class_count)
        counts["class_square"] = (mean[classes >= 0] ** 2).sum(0)
    if cross:
        counts["cross"] = mean.T @ mean
    return counts


def _histogram(sample: np.ndarray) -> np.ndarray:
    """(C, BINS) of samples (n, C, s); what is not finite is left out."""
    channels = sample.shape[1]
    flat = bins(sample)
    flat += BINS * np.arange(channels)[:, None]
    finite = np.isfinite(sample)
    flat = flat.ravel() if finite.all() else flat[finite]
    return np.bincount(flat, minlength=channels * BINS).reshape(channels, BINS).astype(np.uint32)


_TOPS = ("top_value", "top_image", "top_y", "top_x")


def _padded(tops: Mapping[str, np.ndarray], top: int, channels: int) -> Counts:
    """Tops as (top, C) also where there were fewer images; the places left over hold -inf and image -1."""
    kinds = {"top_value": np.float32, "top_image": np.int64, "top_y": np.int32, "top_x": np.int32}
    full = {}
    for name, kind in kinds.items():
        full[name] = np.full((top, channels), -np.inf if name == "top_value" else -1, kind)
        full[name][: len(tops[name])] = tops[name]
    nothing = np.isneginf(full["top_value"])
    for name in _TOPS[1:]:
        full[name][nothing] = -1
    return full


def empty(channels: int, top: int, class_count: int = 0, cross: bool = False, clips: bool = False) -> Counts:
    """The count of no image: merged with another it changes nothing."""
    integers = {name: np.zeros(channels, np.int64) for name in ("images", "cells", "zeros", "nonfinite", "fires")}
    floats = {name: np.zeros(channels) for name in ("sum", "square", "mean", "mean_square")}
    nothing = np.zeros((0, channels))
    counts: Counts = {
        **integers, **floats, "low": np.full(channels, np.inf, np.float32),
        "high": np.full(channels, -np.inf, np.float32), "histogram": np.zeros((channels, BINS), np.uint32),
        **_padded(dict.fromkeys(_TOPS, nothing), top, channels),
    }  # fmt: skip
    if class_count:
        counts["class_sum"] = np.zeros((class_count, channels))
        counts["class_count"] = np.zeros(class_count, np.int64)
        counts["class_square"] = np.zeros(channels)
    if cross:
        counts["cross"] = np.zeros((channels, channels))
    if clips:
        counts["clipped"] = np.zeros(channels, np.int64)
    return counts


def merge(left: Counts, right: Counts) -> Counts:
    """The count of both; of the same plan. Which is which matters only for the rounding of sums in float64."""
    merged: Counts = {}
    for name, a in left.items():
        b, field = right[name], name.rpartition("/")[2]
        if field == "low":
            merged[name] = np.minimum(a, b)
        elif field == "high":
            merged[name] = np.maximum(a, b)
        elif field == "top_value":
            merged |= _merged_tops(left, right, name.removesuffix(field))
        elif field not in _TOPS:
            merged[name] = a + b
    return merged


def _merged_tops(left: Counts, right: Counts, layer: str) -> Counts:
    both = {f: np.concatenate([left[layer + f], right[layer + f]]) for f in _TOPS}
    order = np.lexsort((both["top_image"], -both["top_value"].astype(np.float64)), axis=0)
    order = order[: len(left[layer + "top_value"])]
    return {layer + f: np.take_along_axis(both[f], order, 0) for f in _TOPS}


def selectivity(counts: Counts) -> np.ndarray:
    """(C,) the share of the variance of an image's mean that its class explains: 0 none, 1 all.

    Corrected for chance (epsilon squared; Kelley, An unbiased correlation ratio measure, PNAS 1935): with few images a
    class, classes explain much of any noise. NaN for channels whose mean never changes, and where no class has more
    than one image. Of images that have a class.
    """
    n = counts["class_count"][:, None].astype(np.float64)
    sums = counts["class_sum"]
    total = n.sum()
    between = np.divide(sums**2, n, out=np.zeros_like(sums), where=n > 0).sum(0) - sums.sum(0) ** 2 / max(total, 1)
    all_of_it = counts["class_square"] - sums.sum(0) ** 2 / max(total, 1)
    wide = all_of_it > 1e-12 * np.maximum(counts["class_square"], 1e-300)
    eta = np.divide(between, all_of_it, out=np.full(len(all_of_it), np.nan), where=wide)
    left = total - (n > 0).sum()  # degrees of freedom inside of the classes
    return (1 - (1 - eta) * (total - 1) / left).clip(0, 1) if left > 0 else np.full(len(eta), np.nan)


def correlation(counts: Counts) -> np.ndarray:
    """(C, C) between the channels' means of images; NaN where one never changes."""
    n, mean = counts["images"].max(initial=0), counts["mean"]
    with np.errstate(invalid="ignore", divide="ignore"):
        covariance = counts["cross"] - np.outer(mean, mean) / max(n, 1)
        variance = np.diag(covariance).copy()
        variance[variance <= 1e-12 * np.diag(counts["cross"])] = np.nan
        return (covariance / np.sqrt(np.outer(variance, variance))).clip(-1, 1)
