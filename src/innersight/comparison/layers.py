"""Layers beside their counterparts: sums over images, what they come to, and the layer where two networks part."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from innersight import errors
from innersight.comparison.alignment import Pair
from innersight.draw import color
from innersight.results import jsonable

BLOCK = 1 << 16  # values that are worked on at once: more fall out of the caches
EXACT = 150.0  # dB: what a drop is counted from where values are equal; float32 itself rounds at about that


def decibel(signal: Any, noise: Any) -> np.ndarray:
    """10 log10 (signal / noise); inf where there is no noise, -inf where there is noise alone."""
    signal, noise = np.asarray(signal, float), np.asarray(noise, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = 10 * (np.log10(signal) - np.log10(noise))
    return np.where(noise == 0, np.inf, ratio)


def worst_first(signal: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """The channels that have some share in the noise, a tenth of its mean or more, the least signal to noise first."""
    matters = np.flatnonzero((noise > 0) & (noise >= 0.1 * noise.mean()))
    return matters[np.lexsort((-noise[matters], decibel(signal[matters], noise[matters])))]


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
        """The channels with the least signal to noise, (channel, dB), of those with a tenth of the mean noise or more.

        So a channel that hardly ever answers is not called the worst for a difference that does not matter.
        """
        db = self.channel_sqnr
        return [(int(c), float(db[c])) for c in worst_first(self.signal_a, self.noise)[:count]]

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
    saturated = [f"{which} {percent(s)}" for which, s in zip("ab", r.saturation, strict=True) if s]
    dead = [f"{which} {len(r.dead(which))}" for which in "ab" if r.dead(which)]
    worst = ", ".join(f"{c} ({db_text(v)})" for c, v in r.worst(3)) if r.shape[0] > 1 else ""
    return (
        short(r.a), "" if r.b == r.a else short(r.b), "x".join(map(str, r.shape)), db_text(r.sqnr),
        cosine_text(r.cosine), _range_text(r.range_a), _range_text(r.range_b), ", ".join(saturated), ", ".join(dead),
        worst, r.how,
    )  # fmt: skip


def short(name: str, room: int = 48) -> str:
    """A name for a table: of TFLite's, thirty to two hundred letters long, the beginning and the end.

    >>> short("model/activation/Relu;model/batch_normalization/FusedBatchNormV3;model/conv2d/Conv2D", 40)
    'model/activation/Relu;m…el/conv2d/Conv2D'
    """
    return name if len(name) <= room else f"{name[: room * 3 // 5 - 1]}…{name[len(name) - room * 2 // 5 :]}"


def percent(share: float) -> str:
    """
    >>> percent(0.154), percent(0.00001)
    ('15%', '<0.01%')
    """
    return f"{100 * share:.2g}%" if share >= 1e-4 else "<0.01%"


def _range_text(ends: tuple[float, float]) -> str:
    return f"{color.number(ends[0])} to {color.number(ends[1])}"


# ---------------------------------------------------------------------------------------------------------------------
# Sums


class Sums:
    """What is kept of a layer: sums over images and places for each channel, and over channels for each image."""

    def __init__(self, pair: Pair, images: int, step_a: Any, step_b: Any):
        self.pair = pair
        self.order = None if pair.order is None else torch.tensor(pair.order)
        channels = pair.a.shape[0]
        self.steps = (step_a, step_b)
        self.noise, self.aa, self.bb, self.ab = np.zeros((4, channels))
        self.low = np.full((2, channels), np.inf)
        self.high = np.full((2, channels), -np.inf)
        self.cut = np.zeros((2, 2, channels))  # side, low or high end
        self.values = 0  # of a channel
        self.largest = 0.0
        self.by_image = np.zeros((2, images))  # signal, noise

    def add(self, rows: Sequence[int], a: torch.Tensor, b: torch.Tensor) -> None:
        b = b.to(a.device)
        if self.order is not None:
            b = b[:, self.order.to(b.device)]
        self.values += a.shape[0] * math.prod(a.shape[2:])
        a, b = (v.flatten(2) if v.dim() > 2 else v[:, :, None] for v in (a, b))
        step = max(1, BLOCK // a.shape[2]) if a.device.type == "cpu" else a.shape[1]
        for row, x, y in zip(rows, a, b, strict=True):
            for first in range(0, len(x), step):
                part = slice(first, first + step)
                self._add(row, part, x[part], y[part])

    def _add(self, row: int, part: slice, x: torch.Tensor, y: torch.Tensor) -> None:
        """Some channels (c, places) of one image."""
        for k, v in enumerate((x, y)):
            low, high = (end.double().cpu().numpy() for end in (v.amin(1), v.amax(1)))
            self.low[k, part] = np.minimum(self.low[k, part], low)
            self.high[k, part] = np.maximum(self.high[k, part], high)
        x, y = x.double(), y.double()
        d = x - y
        self.largest = max(self.largest, float(d.abs().max()))
        products = torch.stack([(p * q).sum(1) for p, q in ((d, d), (x, x), (y, y), (x, y))])
        noise, signal, other, product = products.cpu().numpy()
        self.noise[part] += noise
        self.aa[part] += signal
        self.bb[part] += other
        self.ab[part] += product
        self.by_image[:, row] += signal.sum(), noise.sum()
        for k, v in enumerate((x, y)):
            if (step := self.steps[k]) is not None:
                q = step.integers(v)
                self.cut[k, 0, part] += (q <= step.lo).sum(1).cpu().numpy()
                self.cut[k, 1, part] += (q >= step.hi).sum(1).cpu().numpy()

    def share_of_noise(self) -> np.ndarray:
        """(N,): how far each image is off, for choosing one."""
        signal, noise = self.by_image
        return noise / np.maximum(signal + noise, 1e-300)

    def shown(self, count: int) -> np.ndarray:
        """The channels to look at: the worst ones, then, of those that are equal, the ones with most energy."""
        worst = worst_first(self.aa, self.noise)
        rest = [c for c in np.argsort(-self.aa, kind="stable") if c not in worst]
        return np.array([*worst, *rest][:count], int)

    def finish(self, shown: Any) -> LayerComparison:
        pair = self.pair
        return LayerComparison(
            a=pair.a.name, b=pair.b.name, kind_a=pair.a.kind, kind_b=pair.b.kind, shape=pair.a.shape, how=pair.how,
            order=pair.order, standing=pair.standing, match=pair.match,
            noise=self.noise, signal_a=self.aa, signal_b=self.bb, product=self.ab, low=self.low, high=self.high,
            saturated=tuple(self._saturated(k) for k in (0, 1)), largest=self.largest,
            by_image=decibel(*self.by_image), quantised=tuple(None if s is None else str(s) for s in self.steps),
            shown=shown,
        )  # fmt: skip

    def _saturated(self, k: int) -> np.ndarray | None:
        """(C,): the share of values at an end of what can be represented; zero behind a ReLU is no such end."""
        step = self.steps[k]
        if step is None:
            return None
        low = 0 if step.lo == step.zero_point else self.cut[k, 0]
        return (low + self.cut[k, 1]) / max(self.values, 1)


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
        drop = before - min(EXACT, row.sqnr)
        rule = (
            f"where {drop:.1f} dB are lost against the aligned layers that it reads, more than anywhere else"
            if threshold is None
            else f"the first layer in a's order with less than {threshold:g} dB of signal to noise"
        )
        return cls(row, tuple(inputs), drop, rule)

    def __str__(self) -> str:
        r = self.layer
        ranges = f"there a reads {_range_text(r.range_a)} and b {_range_text(r.range_b)}"
        return f"{named(r)}, {self.rule}, with {db_text(r.sqnr)} dB; {self._fed()}; {ranges}."

    def _fed(self) -> str:
        """What its inputs say of where the difference arises."""
        if not self.inputs:
            return "nothing before it is aligned"
        low = min(self.inputs, key=lambda i: i.sqnr)
        which = f"{low.a}, which it reads," if len(self.inputs) == 1 else f"{low.a}, the worst of what it reads,"
        if low.equal:
            return f"{which} is equal in both, so the difference arises here or on the way from there"
        has = f"{which} has {db_text(low.sqnr)} dB"
        if self.drop <= 0:
            return f"{has}, no more, so the difference comes from further up"
        new = 1 - 10 ** (-self.drop / 10)
        return f"{has}: if noise were passed on as signal is, about {100 * new:.0f}% of it would be new here"

    def to_json(self) -> dict[str, Any]:
        return jsonable(
            {
                "layer": self.layer.a, "layer_b": self.layer.b, "sqnr_db": self.layer.sqnr, "drop_db": self.drop,
                "inputs": [{"layer": i.a, "sqnr_db": i.sqnr, "equal": i.equal} for i in self.inputs],
                "range_a": self.layer.range_a, "range_b": self.layer.range_b, "rule": self.rule, "said": str(self),
            }
        )  # fmt: skip


def named(row: LayerComparison) -> str:
    return row.a if row.a == row.b else f"{row.a} ({row.b} in b)"


def first(rows: Sequence[LayerComparison], reads: Mapping[str, list[str]], threshold: float) -> Divergence | None:
    by_name = {row.a: row for row in rows}
    row = next((r for r in rows if r.sqnr < threshold), None)
    return None if row is None else Divergence.of(row, [by_name[n] for n in reads[row.a]], threshold)


def largest(rows: Sequence[LayerComparison], reads: Mapping[str, list[str]]) -> Divergence | None:
    by_name = {row.a: row for row in rows}
    all_ = [Divergence.of(r, [by_name[n] for n in reads[r.a]]) for r in rows if reads[r.a]]
    falls = [d for d in all_ if d.drop > 0]
    return max(falls, key=lambda d: d.drop) if falls else None
