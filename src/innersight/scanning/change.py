"""What changed in a network between two steps of its training: layers side by side, and what became of channels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from innersight.comparison import Comparison
from innersight.scanning.reader import Scan

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False, repr=False)
class Change(Comparison):
    """A Comparison of one network at two steps of its training, and what became of its channels.

    channels: a data frame, one row a channel: layer, channel, and mean, std, zeros, fires, selectivity, class, dead of
              both steps (`mean_a`, `mean_b`, ...), over all of the scanned data; `died`, `revived`
    scans:    of both steps
    """

    channels: pandas.DataFrame
    scans: tuple[Scan, Scan]

    def words(self) -> list[str]:
        """What was found, a sentence each."""
        return [*super().words(), *self._answers(), *self._lives(), *self._selectivity(), *self._classes()]

    def _answers(self) -> Iterator[str]:
        before, after = (scan.manifest["summary"] for scan in self.scans)
        if before["accuracy"] is not None and after["accuracy"] is not None:
            yield (
                f"Of {after['images']:,} images {100 * before['accuracy']:.1f}% were right at a and "
                f"{100 * after['accuracy']:.1f}% at b."
            )

    def _lives(self) -> Iterator[str]:
        for column, said in (("died", "died"), ("revived", "came to life")):
            named, last = [], None
            for layer, rows in self.channels[self.channels[column]].groupby("layer", sort=False):
                which = rows["channel"].tolist()
                if which != last:  # each once along its way: a ReLU behind a dead channel has one, too
                    named.append((layer, which))
                last = which
            if named:
                count = sum(len(which) for _, which in named)
                places = "; ".join(f"{layer} {listed(which)}" for layer, which in named[:4])
                more = f" and in {len(named) - 4} more layers" if len(named) > 4 else ""
                yield f"{count} channel{'s' * (count != 1)} {said}: {places}{more}."

    def _selectivity(self) -> Iterator[str]:
        means = self.channels.groupby("layer", sort=False)[["selectivity_a", "selectivity_b"]].mean().dropna()
        if len(means):
            change = means["selectivity_b"] - means["selectivity_a"]
            layer = change.abs().idxmax()
            before, after = means.loc[layer]
            yield (
                f"Selectivity (the share of a channel's variance that the class explains) changed most in {layer}, "
                f"from {before:.2f} to {after:.2f} on average."
            )

    def _classes(self) -> Iterator[str]:
        known = self.channels.dropna(subset=["class_a", "class_b"])
        if len(known):
            other = int((known["class_a"] != known["class_b"]).sum())
            yield f"{other} of {len(known)} channels are highest for another class than before."

    def _summary(self) -> dict[str, Any]:
        return {**super()._summary(), "channels": self.channels.to_dict("records")}


def channels(a: Scan, b: Scan) -> pandas.DataFrame:
    """The channels of two scans side by side."""
    keys, kept = ["layer", "channel"], ["mean", "std", "zeros", "fires", "selectivity", "class", "dead"]
    tables = [with_dead(scan)[[*keys, *kept]] for scan in (a, b)]
    both = tables[0].merge(tables[1], on=keys, how="inner", suffixes=("_a", "_b"))
    both = both[[*keys, *(f"{name}_{side}" for name in kept for side in "ab")]]
    return both.assign(died=both["dead_b"] & ~both["dead_a"], revived=both["dead_a"] & ~both["dead_b"])


def with_dead(scan: Scan) -> pandas.DataFrame:
    """Its channels, with a column that says which have one value for all images or never pass the ReLU behind them."""
    table = scan.channels()
    dead = (table["min"] == table["max"]) & (table["cells"] > 1)
    for finding in scan.findings():
        for one in finding.items if finding.kind == "dead channels" else ():
            dead |= (table["layer"] == one["layer"]) & table["channel"].isin(one["channels"])
    return table.assign(dead=dead)


def listed(steps: Sequence[int]) -> str:
    shown = steps if len(steps) <= 6 else [*steps[:3], "...", steps[-1]]
    return ", ".join(map(str, shown))
