"""Where on a picture a map says something: thresholds, connected regions, and the boxes around them.

Weakly supervised localization as class activation maps are judged by it (Zhou et al., Learning Deep Features for
Discriminative Localization, CVPR 2016): what exceeds 20% of the maximum, and the box around its largest connected part.
Simonyan, Vedaldi and Zisserman (2013) took the 95th percentile of a gradient map as seeds and grew them by the colors
of the picture (GraphCut), because a gradient marks an object's most telling parts alone. What is grown so is an edge of
the picture, not of the evidence, so it is left out: regions hold what the map says and no more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from innersight import errors

THRESHOLDS = {"max": 0.2, "energy": 0.5, "percentile": 95.0}
"""What `threshold` means, and what it is if it is not given."""


class Box(NamedTuple):
    """Pixel edges on the original picture, and the share of the map's positive values that lies in the region inside.

    left, top, right, bottom: from the left edge of its first pixel to the right edge of its last one, so that
        `pixels[top:bottom, left:right]` and `image.crop(box[:4])` are what it holds
    score: 0..1 of all that speaks for the target on this picture
    """

    left: int
    top: int
    right: int
    bottom: int
    score: float


def check(threshold: float | None, method: str) -> float:
    """The threshold that is used, or an error for one that cannot be."""
    if method not in THRESHOLDS:
        raise errors.unknown("method", method, THRESHOLDS, " of thresholds")
    value = THRESHOLDS[method] if threshold is None else float(threshold)
    top = 100 if method == "percentile" else 1
    if not 0 <= value <= top:
        raise errors.InputError(f"threshold={threshold}: for method {method!r} a number from 0 to {top}")
    return value


def mask(values: np.ndarray, threshold: float, method: str) -> np.ndarray:
    """Where a map (H, W) speaks for the target: True, never where it is NaN (not seen), zero or negative.

    method: "max": at least `threshold` times the maximum; "energy": the fewest pixels, highest first, that hold
            `threshold` of all positive values; "percentile": what exceeds that percentile of the pixels that were seen
    """
    evidence = _evidence(values)
    top = float(evidence.max(initial=0))
    if top == 0:
        return np.zeros(values.shape, bool)
    if method == "max":
        return (evidence >= threshold * top) & (evidence > 0)
    if method == "percentile":
        return (evidence > np.percentile(evidence[~np.isnan(values)], threshold)) & (evidence > 0)
    descending = np.sort(evidence[evidence > 0].astype(np.float64))[::-1]
    held = np.cumsum(descending)
    last = min(int(np.searchsorted(held, threshold * held[-1] * (1 - 1e-12))), len(descending) - 1)
    return evidence >= descending[last]


def _evidence(values: np.ndarray) -> np.ndarray:
    return np.nan_to_num(np.maximum(values, 0), nan=0.0, posinf=0.0)


def boxes(values: np.ndarray, where: np.ndarray, limit: int | None = None) -> list[Box]:
    """The boxes of the connected regions of `where`, the one with the most pixels first."""
    runs = Runs.of(where)
    if not runs.count:
        return []
    area = np.bincount(runs.region, runs.stop - runs.start, runs.count)
    evidence = _evidence(values)
    ends = np.stack([runs.start, runs.stop], 1) + (runs.row * values.shape[1])[:, None]
    # every second sum is that of a run, the others those between; a zero at the end is for a run that reaches there
    sums = np.add.reduceat(np.append(evidence, np.zeros(1, evidence.dtype)), ends.reshape(-1), dtype=np.float64)[::2]
    held = np.bincount(runs.region, sums, runs.count)
    edges = np.full((4, runs.count), np.iinfo(np.int64).max)
    for edge, at in zip(edges, (runs.start, runs.row, -runs.stop, -1 - runs.row), strict=True):
        np.minimum.at(edge, runs.region, at)
    left, top, right, bottom = edges[0], edges[1], -edges[2], -edges[3]
    whole = evidence.sum(dtype=np.float64)
    order = np.lexsort((left, top, -area))[:limit]
    return [
        Box(int(left[i]), int(top[i]), int(right[i]), int(bottom[i]), float(min(held[i] / whole, 1.0))) for i in order
    ]


@dataclass(frozen=True)
class Runs:
    """The True pixels of a mask as runs along its rows, `start` to `stop`, and the connected `region` of each.

    Pixels that touch at a corner are connected (as in the contours that CAMs are evaluated by). Regions are numbered
    from 0 in the order of their first pixel.
    """

    row: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    region: np.ndarray
    count: int

    @classmethod
    def of(cls, where: np.ndarray) -> Runs:
        height, width = where.shape
        padded = np.zeros((height, width + 2), np.int8)
        padded[:, 1:-1] = where
        change = np.diff(padded, axis=1)
        row, start = np.nonzero(change == 1)
        stop = np.nonzero(change == -1)[1]
        # Runs are sorted by row and column, so those of the row below that a run touches are neighbors in the list.
        length = width + 2
        first = np.searchsorted(row * length + stop, (row + 1) * length + start, "left")
        last = np.searchsorted(row * length + start, (row + 1) * length + stop, "right")
        touching = np.maximum(last - first, 0)
        above = np.repeat(np.arange(len(row)), touching)
        within = np.arange(touching.sum()) - np.repeat(np.cumsum(touching) - touching, touching)
        region = _joined(len(row), above, np.repeat(first, touching) + within)
        return cls(row, start, stop, region, int(region.max(initial=-1)) + 1)


def _joined(count: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(count,): the number of the group of each of `count` things, where a[i] and b[i] belong together."""
    parent = np.arange(count)
    while True:
        one, other = parent[a], parent[b]
        low, high = np.minimum(one, other), np.maximum(one, other)
        if np.array_equal(low, high):
            return np.unique(parent, return_inverse=True)[1].reshape(-1)
        np.minimum.at(parent, high, low)
        while not np.array_equal(parent, parent[parent]):
            parent = parent[parent]
