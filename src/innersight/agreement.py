"""What a comparison of two networks found, in their layers, answers and reasons: as tables, files and words."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from innersight import errors, storage
from innersight.draw import color
from innersight.results import Predictions, Provenance, Result, Saliency, jsonable

if TYPE_CHECKING:
    from innersight.images import Picture

EXACT = 150.0  # dB: what a drop is counted from where values are equal; float32 itself rounds at about that
UNLIKE = 0.5  # a correlation of two saliency maps below which the reasons count as different


def decibel(signal: Any, noise: Any) -> np.ndarray:
    """10 log10 (signal / noise); inf where there is no noise, -inf where there is noise alone."""
    signal, noise = np.asarray(signal, float), np.asarray(noise, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = 10 * (np.log10(signal) - np.log10(noise))
    return np.where(noise == 0, np.inf, ratio)


def _cosine(product: Any, a: Any, b: Any, noise: Any) -> np.ndarray:
    """1 where values are equal, nan where one side is zero throughout."""
    product, a, b, noise = (np.asarray(v, float) for v in (product, a, b, noise))
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = np.clip(product / (np.sqrt(a) * np.sqrt(b)), -1, 1)
    return np.where(noise == 0, 1.0, cosine)


def db_text(value: float) -> str:
    """
    >>> db_text(float("inf")), db_text(23.456)
    ('equal', '23.5')
    """
    if value == math.inf:
        return "equal"
    return "n/a" if math.isnan(value) else "-inf" if value == -math.inf else f"{value:.1f}"


def cosine_text(value: float) -> str:
    """So many nines that it differs from 1."""
    if math.isnan(value):
        return "n/a"
    return "1" if value == 1 else f"{value:.4f}" if value < 0.9999 else f"1-{1 - value:.0e}".replace("e-0", "e-")


# ---------------------------------------------------------------------------------------------------------------------
# Layers


@dataclass(frozen=True, eq=False, repr=False)
class LayerComparison:
    """One layer of a beside its counterpart in b, over all images. Arrays (C,) stand in the order of a's channels.

    a, b:      names; kind_a, kind_b: what the networks call such a layer; shape: of one image's value, channels first
    how:       how the two were aligned, in words
    order:     the channel of b for each of a, where they stand in another order; standing: the mean correlation of the
               channels without that, match: with it, over the sample that was looked at
    noise, signal_a, signal_b, product: (C,) sums of (a - b)^2, a^2, b^2 and a b over images and places
    low, high: (2, C), the least and greatest value of both
    largest:   the largest |a - b|
    saturated: (C,) for both, the share of values at an end of the range that a quantised layer can answer (zero behind
               a ReLU is no such end); None where it is not quantised
    by_image:  (N,), signal to noise of each image in dB
    quantised: how both are quantised, in words
    shown:     channels, their maps in a and in b, of one picture
    """

    a: str
    b: str
    kind_a: str
    kind_b: str
    shape: tuple[int, ...]
    how: str
    order: tuple[int, ...] | None
    standing: float | None
    match: float | None
    noise: np.ndarray
    signal_a: np.ndarray
    signal_b: np.ndarray
    product: np.ndarray
    low: np.ndarray
    high: np.ndarray
    saturated: tuple[np.ndarray | None, ...]
    largest: float
    by_image: np.ndarray
    quantised: tuple[str | None, ...] = (None, None)
    shown: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    @property
    def sqnr(self) -> float:
        """Signal to quantisation noise: 10 log10 (sum a^2 / sum (a - b)^2), in dB; inf where all values are equal."""
        return float(decibel(self.signal_a.sum(), self.noise.sum()))

    @property
    def cosine(self) -> float:
        """sum a b / sqrt(sum a^2 sum b^2); 1 where all values are equal, nan where one side is zero throughout."""
        sums = (self.product, self.signal_a, self.signal_b, self.noise)
        return float(_cosine(*(s.sum() for s in sums)))

    @property
    def equal(self) -> bool:
        """Whether all values are equal, bit for bit but for the sign of zero."""
        return not self.noise.any()

    @property
    def channel_sqnr(self) -> np.ndarray:
        """(C,): as `sqnr`."""
        return decibel(self.signal_a, self.noise)

    @property
    def channel_cosine(self) -> np.ndarray:
        """(C,): as `cosine`."""
        return _cosine(self.product, self.signal_a, self.signal_b, self.noise)

    @property
    def range_a(self) -> tuple[float, float]:
        """The least and greatest value of a."""
        return float(self.low[0].min()), float(self.high[0].max())

    @property
    def range_b(self) -> tuple[float, float]:
        """The least and greatest value of b."""
        return float(self.low[1].min()), float(self.high[1].max())

    @property
    def saturation(self) -> tuple[float | None, float | None]:
        """The mean of `saturated` for both; None where a side is not quantised."""
        a, b = (None if s is None else float(np.mean(s)) for s in self.saturated)
        return a, b

    def dead(self, side: str) -> list[int]:
        """Channels of "a" or "b" that have one value everywhere, on all images (zero behind a ReLU); a's numbers."""
        k = {"a": 0, "b": 1}[side]
        return [int(c) for c in np.flatnonzero(self.low[k] == self.high[k])]

    def worst(self, count: int = 5) -> list[tuple[int, float]]:
        """The channels with the least signal to noise that are not equal: (channel, dB)."""
        db = self.channel_sqnr
        order = [int(c) for c in np.lexsort((-self.signal_a, db)) if np.isfinite(db[c]) or db[c] == -np.inf]
        return [(c, float(db[c])) for c in order[:count]]

    def __repr__(self) -> str:
        name = self.a if self.a == self.b else f"{self.a} / {self.b}"
        said = "equal" if self.equal else f"{db_text(self.sqnr)} dB, cosine {cosine_text(self.cosine)}"
        return f"<LayerComparison {name} {'x'.join(map(str, self.shape))}: {said}>"

    def to_json(self) -> dict[str, Any]:
        """As JSON knows it; sqnr_db is null where `equal`."""
        names = {"a": self.dead("a"), "b": self.dead("b")}
        record = {
            "a": self.a, "b": self.b, "kind_a": self.kind_a, "kind_b": self.kind_b, "shape": self.shape,
            "aligned_by": self.how, "channel_order": self.order, "correlation": self.match,
            "correlation_as_they_stand": self.standing, "equal": self.equal, "sqnr_db": self.sqnr,
            "cosine": self.cosine, "largest_difference": self.largest, "range_a": self.range_a, "range_b": self.range_b,
            "saturated": dict(zip("ab", self.saturation, strict=True)),
            "quantised": dict(zip("ab", self.quantised, strict=True)), "dead": names,
            "worst": [{"channel": c, "sqnr_db": v} for c, v in self.worst()],
            "channels": {
                "sqnr_db": self.channel_sqnr, "cosine": self.channel_cosine,
                "low_a": self.low[0], "high_a": self.high[0], "low_b": self.low[1], "high_b": self.high[1],
                "saturated_a": self.saturated[0], "saturated_b": self.saturated[1],
            },
            "images": {"sqnr_db": self.by_image},
        }  # fmt: skip
        return jsonable(record)


HEADER = ("layer of a", "layer of b", "shape", "SQNR dB", "cosine", "range of a", "range of b", "saturated", "dead",
          "worst channels", "aligned by")  # fmt: skip


class LayerTable(Mapping[str, LayerComparison]):
    """The aligned layers in the order a runs them, by a's name (b's name finds them too); prints as a table."""

    def __init__(self, rows: Mapping[str, LayerComparison]):
        self._rows = dict(rows)

    def __getitem__(self, name: str) -> LayerComparison:
        """The layer of that name in a, or in b; raises UnknownName with the nearest names."""
        if name in self._rows:
            return self._rows[name]
        for row in self._rows.values():
            if row.b == name:
                return row
        raise errors.unknown("layer", name, self._rows, " among those compared")

    def __contains__(self, name: object) -> bool:
        return name in self._rows or any(row.b == name for row in self._rows.values())

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self) -> list[tuple[str, ...]]:
        """The table: a cell for each of HEADER."""
        return [_cells(row) for row in self.values()]

    def to_json(self) -> list[dict[str, Any]]:
        return [row.to_json() for row in self.values()]

    def to_csv(self) -> str:
        """A line a layer, for spreadsheets; signal to noise of equal layers is inf."""
        out = io.StringIO()
        table = csv.writer(out, lineterminator="\n")
        table.writerow(
            "a b kind_a kind_b shape sqnr_db cosine largest_difference low_a high_a low_b high_b saturated_a "
            "saturated_b dead_a dead_b worst_channel worst_sqnr_db aligned_by".split()
        )
        for r in self.values():
            worst: list[tuple[Any, Any]] = [*r.worst(1), ("", "")]
            table.writerow(
                [r.a, r.b, r.kind_a, r.kind_b, "x".join(map(str, r.shape)), r.sqnr, r.cosine, r.largest, *r.range_a,
                 *r.range_b, *("" if s is None else s for s in r.saturation), len(r.dead("a")), len(r.dead("b")),
                 *worst[0], r.how]
            )  # fmt: skip
        return out.getvalue()

    def __repr__(self) -> str:
        rows = list(self.values())
        equal = sum(r.equal for r in rows)
        rest = [r.sqnr for r in rows if not r.equal]
        said = f", {equal} equal" if equal else ""
        if rest:
            said += f", SQNR {db_text(min(rest))} to {db_text(max(rest))} dB"
        return f"<{len(rows)} layers{said}>"

    def __str__(self) -> str:
        cells = [HEADER, *self.rows()]
        keep = [i for i in range(len(HEADER)) if any(row[i] for row in cells[1:])]
        widths = {i: max(len(row[i]) for row in cells) for i in keep}
        lines = ["  ".join(row[i].ljust(widths[i]) for i in keep).rstrip() for row in cells]
        lines.insert(1, "  ".join("-" * widths[i] for i in keep))
        return "\n".join(lines)


def _cells(r: LayerComparison) -> tuple[str, ...]:
    saturated = [f"{which} {100 * s:.2g}%" for which, s in zip("ab", r.saturation, strict=True) if s]
    dead = [f"{which} {len(r.dead(which))}" for which in "ab" if r.dead(which)]
    worst = ", ".join(f"{c} ({db_text(v)})" for c, v in r.worst(3)) if r.shape[0] > 1 else ""
    return (
        r.a, "" if r.b == r.a else r.b, "x".join(map(str, r.shape)), db_text(r.sqnr), cosine_text(r.cosine),
        _range_text(r.range_a), _range_text(r.range_b), ", ".join(saturated), ", ".join(dead), worst, r.how,
    )  # fmt: skip


def _range_text(ends: tuple[float, float]) -> str:
    return f"{color.number(ends[0])} to {color.number(ends[1])}"


# ---------------------------------------------------------------------------------------------------------------------
# Where they part


@dataclass(frozen=True, eq=False)
class Divergence:
    """A layer where signal to noise is lost: what it is there, and at the aligned layers that it depends on.

    layer:  the layer; inputs: the nearest aligned layers that it reads (none: it reads the picture)
    drop:   the least signal to noise among its inputs less its own, in dB; equal inputs count as 150 dB, and
            so does the picture
    rule:   why this layer was picked
    """

    layer: LayerComparison
    inputs: tuple[LayerComparison, ...]
    drop: float
    rule: str

    @classmethod
    def of(
        cls, row: LayerComparison, inputs: Sequence[LayerComparison], threshold: float | None = None
    ) -> Divergence:  # fmt: skip
        before = min([EXACT, *(i.sqnr for i in inputs)])
        rule = (
            "the layer that loses most signal to noise against the aligned layers it reads"
            if threshold is None
            else f"the first layer in a's order with less than {threshold:g} dB of signal to noise"
        )
        return cls(row, tuple(inputs), before - min(EXACT, row.sqnr), rule)

    def __str__(self) -> str:
        r = self.layer
        if self.inputs:
            low = min(self.inputs, key=lambda i: i.sqnr)
            fed = f"{low.a}, which it reads, " + ("is equal in both" if low.equal else f"has {db_text(low.sqnr)} dB")
            if len(self.inputs) > 1:
                fed = f"of the aligned layers that it reads, the worst, {low.a}, " + (
                    "is equal in both" if low.equal else f"has {db_text(low.sqnr)} dB"
                )
        else:
            fed = "it reads the picture, or nothing before it is aligned"
        if self.drop >= 10 or not self.inputs:
            where = "So most of the difference arises at this layer, or between that one and it."
        elif self.drop > 0:
            where = "So most of the difference has built up before it, layer by layer."
        else:
            where = "So the difference comes from before it."
        if not self.inputs:
            where = ""
        ranges = f"a reads {_range_text(r.range_a)}, b {_range_text(r.range_b)}"
        return f"{_named(r)}: {db_text(r.sqnr)} dB, {self.rule}; {fed} ({ranges}). {where}".strip()

    def to_json(self) -> dict[str, Any]:
        return jsonable(
            {
                "layer": self.layer.a, "layer_b": self.layer.b, "sqnr_db": self.layer.sqnr, "drop_db": self.drop,
                "inputs": [{"layer": i.a, "sqnr_db": i.sqnr, "equal": i.equal} for i in self.inputs],
                "range_a": self.layer.range_a, "range_b": self.layer.range_b, "rule": self.rule, "said": str(self),
            }
        )  # fmt: skip


def _named(row: LayerComparison) -> str:
    return row.a if row.a == row.b else f"{row.a} ({row.b} in b)"


# ---------------------------------------------------------------------------------------------------------------------
# Answers


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
        kl = _entropy(p, np.maximum(q, 1e-6))
        return cls(a, b, names, columns, how, top, change, np.clip(js, 0, 1), kl, tied)

    @property
    def same(self) -> np.ndarray:
        """(N,): whether both give the highest score to the same class (the first of equal ones)."""
        return self.top[0] == self.top[1]

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

    def goals(self, rows: Sequence[int]) -> tuple[list[int], list[int]]:
        """The class that a predicts for each image, as both number it."""
        if self.a.logits.shape[1] == 1:
            return [0] * len(rows), [0] * len(rows)
        at = self.top[0, list(rows)]
        return [int(c) for c in self.columns[0, at]], [int(c) for c in self.columns[1, at]]

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
    correlation: (N,) of the two maps (Pearson); nan where one of them tells no place from another
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
        return f"maps correlate by {known.min():.2f} to {known.max():.2f}, median {np.median(known):.2f}"

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


# ---------------------------------------------------------------------------------------------------------------------
# All of it


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Result):
    """Two networks side by side; made by `innersight.compare`.

    a, b:        their names; a is the reference
    layers:      the table of aligned layers, by a's name
    only_a, only_b: layers without a counterpart, (name, why)
    predictions: the answers, image by image; None where they cannot be compared
    reasons:     the saliencies of both; None where they were not asked for or cannot be compared
    count:       of images
    threshold:   dB below which a layer counts as parted
    shown_picture: the image whose maps are kept: where the answers are furthest apart
    """

    KIND = "Comparison"

    a: str
    b: str
    layers: LayerTable
    only_a: tuple[tuple[str, str], ...]
    only_b: tuple[tuple[str, str], ...]
    predictions: Predicted | None
    reasons: Reasons | None
    pictures: list[Picture]
    count: int
    shown_picture: int
    threshold: float
    divergence: Divergence | None
    largest: Divergence | None
    provenance: Provenance

    @property
    def first_divergence(self) -> Divergence | None:
        """The first layer in a's order with less than `threshold` dB of signal to noise; None if none has."""
        return self.divergence

    @property
    def first_difference(self) -> LayerComparison | None:
        """The first layer whose values are not all equal; None if all are."""
        return next((r for r in self.layers.values() if not r.equal), None)

    @property
    def largest_drop(self) -> Divergence | None:
        """The layer that loses most signal to noise against the aligned layers that it reads; None if none does."""
        return self.largest

    def words(self) -> list[str]:
        """What was found, a sentence each."""
        rows = list(self.layers.values())
        images = f"{self.count} image{'s' * (self.count != 1)}"
        said = [
            f"{len(rows)} layer{'s' * (len(rows) != 1)} of {self.a} and {self.b} {'are' if len(rows) != 1 else 'is'} aligned "
            f"and compared over {images}."
        ]
        if all(r.equal for r in rows):
            said.append("All their values are equal, bit for bit.")
        else:
            first = self.first_difference
            assert first is not None
            if first.a != rows[0].a:
                said.append(f"Up to {_named(first)} all values are equal.")
            if self.divergence is None:
                low = min(rows, key=lambda r: r.sqnr)
                said.append(
                    f"None falls below {self.threshold:g} dB of signal to noise; the lowest is {_named(low)} with "
                    f"{db_text(low.sqnr)} dB."
                )
            else:
                said.append(f"They part at {self.divergence}")
            if self.largest is not None and (
                self.divergence is None or self.largest.layer is not self.divergence.layer
            ):
                said.append(f"Most is lost at {self.largest}")
        if moved := [r for r in rows if r.order is not None]:
            said.append(
                f"In {len(moved)} layer{'s' * (len(moved) != 1)} ({moved[0].a}{', ...' * (len(moved) > 1)}) the "
                "channels of b stand in another order and were matched by correlation (channels='index' compares them "
                "as they stand)."
            )
        if self.predictions is not None:
            p = self.predictions
            tied = f" ({int(p.tied.sum())} of them with a tie for first place)" if p.tied.any() else ""
            said.append(f"Both give the same class for {int(p.same.sum())} of {images}{tied}.")
        if self.reasons is not None:
            r = self.reasons
            other = f"; {len(r.unlike)} with the same answer for another reason (correlation below {UNLIKE:g})"
            said.append(f"Reasons by {r.method}{r._at()}: {r.said()}{other if r.unlike else ''}.")
        if self.only_a or self.only_b:
            said.append(f"Without a counterpart: {len(self.only_a)} layers of a, {len(self.only_b)} of b.")
        return said

    def __repr__(self) -> str:
        parted = "" if self.divergence is None else f", part at {self.divergence.layer.a}"
        p = self.predictions
        same = "" if p is None else f", same class for {int(p.same.sum())} of {len(p)}"
        images = f"{self.count} image{'s' * (self.count != 1)}"
        return f"<Comparison of {self.a} and {self.b}: {repr(self.layers).strip('<>')} over {images}{parted}{same}>"

    def __str__(self) -> str:
        return f"{self.layers}\n\n" + "\n".join(self.words())

    # -- drawing

    def plot(
        self, layer: str | None = None, *, scale: str = "each", limit: int | None = 120, page: int = 1
    ) -> Comparison:
        """Draw signal to noise and cosine along the depth; of a `layer` its worst channels and their difference.

        scale: of a layer's maps: "each" channel on its own, the same for both networks, or one "shared" by all shown
        limit, page: at most this many layers on a page, and which page
        """
        from innersight.draw import comparison

        if layer is None:
            return self._drawn(comparison.overview(self, limit=limit, page=page))
        row = self.layers[layer]
        return self._drawn(comparison.layer(self, row, scale=scale))

    def plot_reasons(self) -> Comparison:
        """Draw the saliency of both for the pictures on which they are least alike."""
        from innersight.draw import comparison

        if self.reasons is None or not self.reasons.kept:
            raise errors.Unsupported("there are no reasons to draw: compare with method= says why")
        return self._drawn(comparison.reasons(self))

    def save(self, path: str | os.PathLike, **drawing: Any) -> list[Path]:
        """Write by suffix: .html one page, .json everything, .csv the layers, .png .pdf .svg what `plot` draws.

        Returns the files written.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        texts = {".html": self._page, ".json": self._json, ".csv": self.layers.to_csv}
        if suffix in texts:
            if drawing:
                raise errors.InputError(f"{', '.join(drawing)}: for pictures only, not for {suffix}")
            storage.check_place(path)
            text = texts[suffix]()
            return [storage.write_whole(path, lambda file: file.write(text.encode("utf-8")))]
        if suffix not in storage.DRAWN:
            kinds = f"{', '.join((*texts, *storage.DRAWN))}"
            raise errors.InputError(
                f"{path.name!r}: unknown suffix {path.suffix!r}; a comparison is written as {kinds}"
            )
        return self._save_drawn(path, **drawing)

    def _page(self) -> str:
        from innersight.draw.comparison_page import render

        return render(self)

    def _json(self) -> str:
        return json.dumps(self.to_json(), ensure_ascii=False, allow_nan=False, indent=1)

    def _summary(self) -> dict[str, Any]:
        return {
            "a": self.a, "b": self.b, "images": self.count, "words": self.words(), "threshold_db": self.threshold,
            "first_divergence": self.divergence, "largest_drop": self.largest,
            "first_difference": None if self.first_difference is None else self.first_difference.a,
            "layers": self.layers.to_json(),
            "only_a": [{"layer": n, "why": w} for n, w in self.only_a],
            "only_b": [{"layer": n, "why": w} for n, w in self.only_b],
            "predictions": self.predictions, "reasons": self.reasons,
        }  # fmt: skip

    def _html(self) -> str:
        import html

        return f"<pre>{html.escape(str(self))}</pre>"
