"""A data set on the page: a scan of a network, told by key.

channels/0/conv1   what each channel did over the data set, and its top images
strip/0/conv1/7    crops of what a channel saw in its top images
images/0           what the network said of each image
gallery/0/2        the picture of a finding
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from innersight import errors
from innersight.scanning import Scan, store
from innersight.viewer import chunks

if TYPE_CHECKING:
    import pandas

    from innersight.network import Network
    from innersight.scanning.data import Sample, Source

ROWS = 5000  # images that are listed, at most
PAIRS = 2000  # of label and prediction
NUMBERS = ("mean", "std", "min", "max", "zeros", "fires", "clipped", "selectivity", "class_mean", "correlation", "q01",
           "median", "q99", "q999")  # fmt: skip
FILES = ("channels.parquet", "tops.parquet", "images.parquet", "skipped.parquet", "statistics.safetensors",
         "findings.json")  # fmt: skip
_LISTED = 20  # layers that a finding names, and channels of each


class DataSet:
    """What a page is told of a scan.

    source: the data set itself, to look at images of it; None where it is not at hand
    """

    def __init__(self, scan: Scan, source: Source | None = None):
        scan._check_complete()
        missing = [name for name in FILES if not (scan.folder / name).is_file()]
        if missing:
            raise errors.InputError(f"the scan in {str(scan.folder)!r} is not whole any more: {missing[0]} is missing")
        self.scan = scan
        self.source = None if source is None else _same(scan, source)
        self.classes: list[str] = scan.manifest["plan"]["classes"]
        self.number = {name: i for i, name in enumerate(self.classes)}

    # -- to begin with

    def manifest(self) -> dict[str, Any]:
        scan, said = self.scan, self.scan.manifest["summary"]
        predicts = scan.manifest["plan"]["predicts"]
        pairs = scan._table("confusion").nlargest(PAIRS, "images") if predicts else None
        return {
            "name": scan.manifest["data"]["name"], "images": said["images"], "skipped": said["skipped"],
            "accuracy": said["accuracy"], "layers": scan.layers, "classes": self.classes,
            "open": self.source is not None, "notes": scan.notes,
            "findings": [self._finding(n) for n in range(len(self.findings))],
            "confusion": [] if pairs is None else [
                [self.number[a], self.number[b], int(n)]
                for a, b, n in zip(pairs["label"], pairs["prediction"], pairs["images"], strict=True)
            ],
        }  # fmt: skip

    @cached_property
    def findings(self) -> list[Any]:
        return self.scan.findings()

    def _finding(self, n: int) -> dict[str, Any]:
        found = self.findings[n]
        items = [
            {"layer": one["layer"], "channels": [int(c) for c in one["channels"][:_LISTED]]}
            for one in found.items[:_LISTED]
            if "layer" in one and "channels" in one
        ]
        return {"kind": found.kind, "text": found.text, "evidence": found.evidence, "advice": found.advice,
                "items": items, "picture": bool(found.picture)}  # fmt: skip

    # -- by key

    def channels(self, name: str) -> bytes:
        """The channels of a layer: a number for each, its histogram, its top images."""
        table = self.scan.channels(name)
        arrays: dict[str, np.ndarray] = {n: table[n].to_numpy(np.float32) for n in NUMBERS}
        arrays["class"] = np.array([self.number.get(c, -1) for c in table["class"]], np.int32)
        arrays["nearest"] = table["nearest"].to_numpy(np.int32)
        arrays |= self._histograms(name)
        arrays["crops"] = np.array([self._strip(name, c).is_file() for c in range(len(table))], np.uint8)
        return chunks.pack(arrays | self._tops(name, len(table)))

    def _histograms(self, name: str) -> dict[str, np.ndarray]:
        """Square roots of the counts, as shares of each channel's largest, in the bins that any channel fills."""
        index = self.scan.layers.index(name)
        counts, edges = self.scan._array(f"{index}/histogram"), self.scan._array("edges")
        filled = np.flatnonzero(counts.any(0))
        some = slice(filled[0], filled[-1] + 1) if len(filled) else slice(0, 1)
        most = np.maximum(counts.max(1, keepdims=True), 1)
        return {"histogram": np.rint(255 * np.sqrt(counts[:, some] / most)).astype(np.uint8), "edges": edges[some]}

    def _tops(self, name: str, count: int) -> dict[str, np.ndarray]:
        """Images (C, k), -1 where there are fewer, with value and unit; the images' numbers and names, each once."""
        import pandas

        tops = pandas.read_parquet(self.scan.folder / "tops.parquet", filters=[("layer", "==", name)])
        size = (count, int(self.scan.manifest["plan"]["top"]))
        arrays = {"top_image": np.full(size, -1, np.int32), "top_value": np.zeros(size, np.float32),
                  "top_y": np.zeros(size, np.int32), "top_x": np.zeros(size, np.int32)}  # fmt: skip
        at = tops["channel"].to_numpy(), tops["rank"].to_numpy()
        for column in ("image", "value", "y", "x"):
            arrays[f"top_{column}"][at] = tops[column]
        each = tops.drop_duplicates("image").sort_values("image")
        return arrays | {"named": each["image"].to_numpy(np.int32), "names": _joined(each["name"])}

    def _strip(self, name: str, channel: int) -> Path:
        return self.scan.folder / "crops" / f"{self.scan.layers.index(name):03}" / f"{channel:05}.jpg"

    def strip(self, name: str, channel: int) -> bytes:
        self.scan._channel(self.scan._layer(name), channel)
        file = self._strip(name, channel)
        if not file.is_file():
            raise errors.UnknownName(f"no crops were drawn for channel {channel} of {name}")
        return file.read_bytes()

    def images(self) -> bytes:
        """Images as the page lists them: wrong answers first, the most confident first, then the least confident."""
        table = self.scan.images()
        kept = _ordered(table).head(ROWS)
        arrays: dict[str, np.ndarray] = {"image": kept["image"].to_numpy(np.int32)}
        for column in ("label", "prediction", "runner_up"):
            if column in kept:
                arrays[column] = np.array([self.number.get(c, -1) for c in kept[column]], np.int32)
        for column in ("confidence", "label_probability"):
            if column in kept:
                arrays[column] = kept[column].to_numpy(np.float32, na_value=np.nan)
        arrays["names"] = _joined(kept["name"])
        return chunks.pack(arrays, of=len(table))

    def gallery(self, n: int) -> bytes:
        found = self.findings[n] if 0 <= n < len(self.findings) else None
        if found is None or not found.picture:
            raise errors.UnknownName(f"finding {n} has no picture")
        return (self.scan.folder / found.picture).read_bytes()

    def strips(self) -> Iterator[tuple[str, int]]:
        """Channels with crops, of all layers in turn, the most selective of each first."""
        table = self.scan.channels()
        table = table.assign(order=table["selectivity"].fillna(-1))
        ranked = [
            [int(c) for c in rows.sort_values("order", ascending=False, kind="stable")["channel"]]
            for _, rows in table.groupby("layer", sort=False)
        ]
        for rank in range(max(map(len, ranked), default=0)):
            for name, channels in zip(self.scan.layers, ranked, strict=True):
                if rank < len(channels) and self._strip(name, channels[rank]).is_file():
                    yield name, channels[rank]

    # -- images of the data set

    def sample(self, number: int, net: Network) -> Sample:
        """An image of the data set, by its number."""
        if self.source is None:
            raise errors.InputError("the data set is not at hand: name it, as --data or data=, to look at its images")
        for sample in self.source.samples([number], net.preprocess, net.input_shape):
            if sample.picture is None:
                raise errors.InputError(f"{sample.name} cannot be read: {sample.problem}")
            return sample
        raise errors.UnknownName(f"the data set has no image {number}")


def _joined(names: Iterable[str]) -> np.ndarray:
    return np.frombuffer("\0".join(names).encode("utf-8", "replace"), np.uint8)


def _ordered(table: pandas.DataFrame) -> pandas.DataFrame:
    if "confidence" not in table:
        return table
    right = table["correct"].fillna(True).astype(bool) if "correct" in table else np.True_
    order = np.where(right, 1 + table["confidence"], -table["confidence"])
    return table.assign(order=order).sort_values("order", kind="stable")


def _same(scan: Scan, source: Source) -> Source:
    """The data set that was scanned, if this is it; of it the part that was scanned."""
    was = scan.manifest["data"]
    if source.identity != was["identity"]:
        source = source.limited(was["images"])
    if source.identity != was["identity"]:
        raise errors.InputError(
            f"{source.name} is not the data set that was scanned into {str(scan.folder)!r} ({was['name']}, "
            f"{was['images']} images): names, labels or order of its images differ"
        )
    return source


def matched(networks: Sequence[Network], scans: Any, data: Any = None, root: Any = None) -> list[DataSet | None]:
    """For each network the scan of it, by its weights; None where there is none.

    scans: a folder, a Scan, or a list of them; data: the data set, as `innersight.scan` takes it
    """
    found: list[DataSet | None] = [None] * len(networks)
    given = scans if isinstance(scans, (list, tuple)) else [] if scans is None else [scans]
    if not given:
        if data is not None:
            raise errors.InputError("data= names the data set of a scan: give scan=, too")
        return found
    source = None
    if data is not None:
        from innersight.scanning.data import open_data

        source = open_data(data, root)
    hashes = [store.model_hash(net.module) for net in networks]
    for one in given:
        scan = one if isinstance(one, Scan) else Scan(one)
        wanted = scan.manifest["network"]["weights"]
        place = next((i for i, h in enumerate(hashes) if h == wanted and found[i] is None), None)
        if place is None and wanted in hashes:
            raise errors.InputError(
                f"two scans are of the same network, {networks[hashes.index(wanted)].name}: give one of each"
            )
        if place is None:
            raise errors.InputError(
                f"the scan in {str(scan.folder)!r} is of other weights ({scan.manifest['network']['name']}) than "
                f"those of {' and '.join(n.name for n in networks)}: scan this network"
            )
        found[place] = DataSet(scan, source)
    return found
