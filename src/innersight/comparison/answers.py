"""The answers of two networks image by image, and the reasons that they give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from innersight import errors
from innersight.results import Predictions, Saliency, jsonable
from innersight.targets import Classes

UNLIKE = 0.5  # a correlation of two saliency maps below which the reasons count as different


@dataclass(frozen=True, eq=False, repr=False)
class Predicted:
    """The answers of both, image by image.

    a, b:       their predictions
    names:      of the images
    columns:    (2, K) the outputs of both that stand for the same class; how: how they were paired
    top:        (2, N) the class of each, as an index into `columns`
    change:     (N,) how the probability of a's class changes in b
    divergence: (N,) Jensen-Shannon divergence in bits, 0 equal to 1 disjoint
    kl:         (N,) Kullback-Leibler divergence of b from a, in bits; a probability in b below 1e-6 counts as that
    tied:       images on which a network gives its highest score twice
    """

    a: Predictions
    b: Predictions
    names: Sequence[str]
    columns: np.ndarray
    how: str
    top: np.ndarray
    change: np.ndarray
    divergence: np.ndarray
    kl: np.ndarray
    tied: np.ndarray

    @classmethod
    def of(cls, a: Predictions, b: Predictions, names: Sequence[str]) -> Predicted:
        columns, how = _columns(a, b)
        p, q = (_chances(x, c) for x, c in zip((a, b), columns, strict=True))
        if a.logits.shape[1] == 1:
            scores = [p, q]
        else:
            scores = [x.logits[:, c] for x, c in zip((a, b), columns, strict=True)]
        top = np.stack([s.argmax(1) for s in scores])
        tied = np.any([(s == s.max(1, keepdims=True)).sum(1) > 1 for s in scores], 0)
        change = (q - p)[np.arange(len(p)), top[0]]
        exclusive = all(np.abs(x.sum(1) - 1).max() < 0.1 for x in (p, q))
        p, q = (_distributions(x, exclusive) for x in (p, q))
        middle = (p + q) / 2
        js = (_entropy(p, middle) + _entropy(q, middle)) / 2
        kl = np.maximum(_entropy(p, np.maximum(q, 1e-6)), 0)
        return cls(a, b, names, columns, how, top, change, np.clip(js, 0, 1), kl, tied)

    @property
    def same(self) -> np.ndarray:
        """(N,): whether both give the highest score to the same class (the first of equal ones)."""
        return self.top[0] == self.top[1]

    @property
    def differ(self) -> list[int]:
        """The images to which the two give different classes."""
        return [int(i) for i in np.flatnonzero(~self.same)]

    @property
    def agreement(self) -> float:
        """The share of images with the same answer."""
        return float(self.same.mean())

    def label(self, side: int, image: int) -> str:
        """The class that a (0) or b (1) gives an image."""
        answers = (self.a, self.b)[side]
        if answers.logits.shape[1] == 1:
            return f"{answers.label(0)}: {'yes' if self.top[side, image] else 'no'}"
        return answers.label(int(self.columns[side, self.top[side, image]]))

    def probability(self, side: int, image: int) -> float:
        """What a (0) or b (1) gives to its own class."""
        answers = (self.a, self.b)[side]
        if answers.logits.shape[1] == 1:
            p = float(answers.probabilities[image, 0])
            return p if self.top[side, image] else 1 - p
        return float(answers.probabilities[image, self.columns[side, self.top[side, image]]])

    def goals(self, rows: Sequence[int], target: Any = None) -> tuple[list[int], list[int]]:
        """The class to explain of each image, as both number it: what a predicts, or `target`, a class of a."""
        if self.a.logits.shape[1] == 1:
            return [0] * len(rows), [0] * len(rows)
        given = target if isinstance(target, list) else [target] * len(rows)
        classes = Classes(None if self.a.labels is None else tuple(self.a.labels))
        of_b = dict(self.columns.T.tolist())
        found = []
        for i, t in zip(rows, given, strict=True):
            index = int(self.columns[0, self.top[0, i]])
            if t is not None:
                index = classes.index(t, self.a.logits.shape[1])
            if index not in of_b:
                raise errors.InputError(
                    f"{classes.name(index)!r} is no class of both networks, so it has no reasons in b"
                )
            found.append(index)
        return found, [of_b[index] for index in found]

    def __len__(self) -> int:
        return self.top.shape[1]

    def __repr__(self) -> str:
        return f"<Predicted: the same class for {int(self.same.sum())} of {len(self)} images>"

    def to_json(self) -> dict[str, Any]:
        images = [
            {
                "name": self.names[i], "a": self.label(0, i), "b": self.label(1, i), "same": self.same[i],
                "probability_a": self.probability(0, i), "probability_b": self.probability(1, i),
                "change": self.change[i], "jensen_shannon": self.divergence[i], "kullback_leibler": self.kl[i],
                "tied": self.tied[i],
            }
            for i in range(len(self))
        ]  # fmt: skip
        return jsonable({"agreement": self.agreement, "paired_by": self.how, "images": images})


def _columns(a: Predictions, b: Predictions) -> tuple[np.ndarray, str]:
    """The outputs that stand for the same class in both."""
    counts = a.logits.shape[1], b.logits.shape[1]
    if a.labels and b.labels and list(a.labels) != list(b.labels):
        index = {label: i for i, label in reversed(list(enumerate(b.labels)))}
        both = [(i, index[label]) for i, label in enumerate(a.labels) if label in index]
        if len(both) > 1 and (len(both) == min(counts) or counts[0] != counts[1]):
            return np.array(both).T, f"classes are paired by name, {len(both)} of {counts[0]} and {counts[1]}"
    if counts[0] != counts[1]:
        raise errors.Unsupported(
            f"they tell {counts[0]} and {counts[1]} classes apart, and no class names say which is which (labels=)"
        )
    return np.stack([np.arange(counts[0])] * 2), "outputs of the same number are the same class"


def _chances(answers: Predictions, columns: np.ndarray) -> np.ndarray:
    """(N, K): the probability of each class; of a single output no and yes."""
    p = np.clip(answers.probabilities.astype(np.float64), 0, 1)
    return np.concatenate([1 - p, p], 1) if p.shape[1] == 1 else p[:, columns]


def _distributions(p: np.ndarray, exclusive: bool) -> np.ndarray:
    """(N, K, 1): a distribution over classes; (N, 2, K) where each class is there or not, whatever the others."""
    if exclusive:
        return (p / np.maximum(p.sum(1, keepdims=True), 1e-300))[..., None]
    return np.stack([1 - p, p], 1)


def _entropy(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence in bits, of distributions along axis 1, averaged over the rest."""
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * np.log2(p / q), 0)
    return terms.sum(1).mean(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Reasons


@dataclass(eq=False, repr=False)
class Reasons:
    """Saliency of both for the same target, image by image.

    method:      its name; layer_a, layer_b: where it looks, if it looks at a layer
    targets:     what was explained, in words
    correlation: (N,) of the two maps (Pearson); nan where one of them tells no place from
                 another, or is nothing beside an ordinary score
    rank:        (N,) of their ranks (Spearman)
    grid:        on which grid they were compared, in words
    kept:        image -> both saliencies, of those that are least alike
    """

    method: str
    layer_a: str | None = None
    layer_b: str | None = None
    targets: list[str] = field(default_factory=list)
    correlation: np.ndarray = field(default_factory=lambda: np.zeros(0))
    rank: np.ndarray = field(default_factory=lambda: np.zeros(0))
    grid: str = ""
    kept: dict[int, tuple[Saliency, Saliency]] = field(default_factory=dict)
    same: np.ndarray | None = None

    def add(self, rows: Sequence[int], a: Saliency, b: Saliency, same: np.ndarray | None, keep: int) -> None:
        """The next images."""
        self.same = same
        found = []
        for i in range(len(rows)):
            x, y, self.grid = _on_one_grid(a, b, i)
            seen = np.isfinite(x) & np.isfinite(y)
            if a.scale(i).blank or b.scale(i).blank:
                seen[:] = False  # noise around nothing has no places to compare
            found.append((_correlation(x[seen], y[seen]), _correlation(_ranks(x[seen]), _ranks(y[seen]))))
            self.kept[rows[i]] = a[i], b[i]
        self.targets += a.targets
        self.correlation = np.append(self.correlation, [f[0] for f in found])
        self.rank = np.append(self.rank, [f[1] for f in found])
        first = sorted(self.kept, key=lambda i: (not self._misleads(i), np.nan_to_num(self.correlation[i], nan=2), i))
        self.kept = {i: self.kept[i] for i in first[:keep]}

    def _misleads(self, i: int) -> bool:
        return (self.same is None or bool(self.same[i])) and self.correlation[i] < UNLIKE

    @property
    def unlike(self) -> list[int]:
        """Images with the same answer for another reason: the maps correlate by less than 0.5."""
        return [i for i in range(len(self.correlation)) if self._misleads(i)]

    def __repr__(self) -> str:
        return f"<Reasons by {self.method}{self._at()}: {self.said()}>"

    def _at(self) -> str:
        if self.layer_a is None:
            return ""
        return f" at {self.layer_a}" + ("" if self.layer_b == self.layer_a else f" and {self.layer_b}")

    def said(self) -> str:
        """The correlations in words."""
        known = self.correlation[np.isfinite(self.correlation)]
        if not known.size:
            return "no picture has two maps to compare"
        blank = len(self.correlation) - known.size
        nothing = f"; in {blank} image{'s' * (blank != 1)} a map tells no place from another" if blank else ""
        return f"maps correlate by {known.min():.2f} to {known.max():.2f}, median {np.median(known):.2f}{nothing}"

    def to_json(self) -> dict[str, Any]:
        return jsonable(
            {
                "method": self.method, "layer_a": self.layer_a, "layer_b": self.layer_b, "grid": self.grid,
                "targets": self.targets, "correlation": self.correlation, "rank_correlation": self.rank,
                "same_answer_other_reason": self.unlike,
            }
        )  # fmt: skip


def _on_one_grid(a: Saliency, b: Saliency, i: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Both maps of an image on the finest grid that they share."""
    p, q = a.pictures[i], b.pictures[i]
    (hp, wp), (hq, wq) = p.input_size, q.input_size
    there = [v / s for v, s in zip(p.to_input, (wp, hp, wp, hp), strict=True)]
    here = [v / s for v, s in zip(q.to_input, (wq, hq, wq, hq), strict=True)]
    if np.allclose(there, here, rtol=1e-6, atol=1e-9):
        if a.coarse is not None and b.coarse is not None and a.coarse.shape == b.coarse.shape:
            size = "x".join(map(str, a.coarse.shape[1:]))
            return a.coarse[i], b.coarse[i], f"the layer's own {size} grid"
        if a.maps.shape == b.maps.shape:
            return a.maps[i], b.maps[i], f"the {hp}x{wp} pixels of the input"
    if p.original_size == q.original_size:
        return p.back(a.maps[i]), q.back(b.maps[i]), "the pixels of the picture that both networks see"
    raise errors.Unsupported(
        "the two networks' inputs are of different sizes and came without a picture to map back to"
    )


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x.astype(float).ravel(), y.astype(float).ravel()
    if x.size < 2 or (x == x[0]).all() or (y == y[0]).all():
        return math.nan
    if np.array_equal(x, y):
        return 1.0
    x, y = x - x.mean(), y - y.mean()
    x, y = x / np.abs(x).max(), y / np.abs(y).max()
    return float(np.clip((x @ y) / np.sqrt((x @ x) * (y @ y)), -1, 1))


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks, equal values sharing their mean."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse.ravel()]
