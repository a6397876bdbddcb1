"""What a comparison of two networks found, as tables, files and words."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from innersight import errors, storage
from innersight.comparison.alignment import family
from innersight.comparison.answers import UNLIKE, Predicted, Reasons
from innersight.comparison.layers import Divergence, LayerComparison, LayerTable, db_text, named, percent
from innersight.results import Provenance, Result

if TYPE_CHECKING:
    from innersight.images import Picture

ROUNDING = 100.0  # dB: what sums of float32 in another order differ by lies above that
NOTABLE = 0.01  # the share of saturated values that is worth a sentence


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
    inputs_sqnr: signal to noise of what both networks are fed, in dB; None where its shapes differ
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
    inputs_sqnr: float | None
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
        many = f"{len(rows)} layers" if len(rows) != 1 else "1 layer"
        said = [f"Compared: {self.a} (a) and {self.b} (b), {many} over {images}."]
        if self.inputs_sqnr is not None and self.inputs_sqnr < math.inf:
            said.append(
                f"What they are fed differs ({db_text(self.inputs_sqnr)} dB between their inputs): each has the "
                "pictures prepared its own way, and preprocess= when opening changes it."
            )
        if rows and all(r.equal for r in rows):
            said.append("All their values are equal, bit for bit.")
        elif rows:
            first = self.first_difference
            assert first is not None
            if first.a != rows[0].a:
                said.append(f"Up to {named(first)} all values are equal.")
            low = min(rows, key=lambda r: r.sqnr)
            if low.sqnr >= ROUNDING:
                said.append(f"They differ by rounding: no layer has less than {db_text(low.sqnr)} dB ({named(low)}).")
            elif self.divergence is None:
                said.append(
                    f"None falls below {self.threshold:g} dB of signal to noise; the lowest is {named(low)} with "
                    f"{db_text(low.sqnr)} dB."
                )
            else:
                said.append(f"They part at {self.divergence}")
            if (
                self.largest is not None
                and low.sqnr < ROUNDING
                and (self.divergence is None or self.largest.layer is not self.divergence.layer)
            ):
                said.append(f"The largest single loss is at {self.largest}")
        if cut := [r for r in rows if (r.saturation[1] or 0) >= NOTABLE and family(r.kind_b) != "softmax"]:
            worst = max(cut, key=lambda r: r.saturation[1] or 0)
            more = f", and 1% or more in {len(cut) - 1} others" if len(cut) > 1 else ""
            said.append(
                f"In b, {percent(worst.saturation[1] or 0)} of the values of {worst.b} lie at the ends of what it "
                f"can represent{more}."
            )
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
        from innersight.comparison.page import render

        return render(self)

    def _json(self) -> str:
        return json.dumps(self.to_json(), ensure_ascii=False, allow_nan=False, indent=1)

    def _summary(self) -> dict[str, Any]:
        return {
            "a": self.a, "b": self.b, "images": self.count, "words": self.words(), "threshold_db": self.threshold,
            "inputs_sqnr_db": self.inputs_sqnr,
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
