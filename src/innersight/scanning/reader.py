"""Scan: what a whole data set did in a network, read back from its folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from innersight import errors
from innersight.scanning import findings, store
from innersight.scanning.findings import Finding

if TYPE_CHECKING:
    import pandas
    from PIL import Image


class Scan:
    """A scan on disk: `innersight.Scan("out/")`.

        found.channels()            one row a channel: mean, spread, quantiles, zeros, selectivity, nearest channel
        found.images()              one row an image: label, prediction, confidence, loss
        found.top("conv2", 7)       the images and places that excite a channel most
        found.strip("conv2", 7)     and what it saw there
        found.confusion()           labels by predictions
        found.findings()            what is worth looking at, in words

    folder, manifest: where it is, and what it was made of (network, hash of its weights, data, plan, versions, notes)

    Raises InputError if there is no scan. The tables are those of a complete scan.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        manifest = store.read_manifest(self.folder)
        if manifest is None:
            raise errors.InputError(f"there is no scan in {str(self.folder)!r}: it has no manifest.json")
        self.manifest: dict[str, Any] = manifest

    @property
    def complete(self) -> bool:
        return bool(self.manifest["complete"])

    @property
    def layers(self) -> list[str]:
        """The names of the layers that were watched."""
        return [one["name"] for one in self.manifest["plan"]["layers"]]

    @property
    def notes(self) -> list[str]:
        """What was decided and bounded, a sentence each."""
        return [*self.manifest["notes"], *self.manifest["plan"]["notes"]]

    def __repr__(self) -> str:
        m = self.manifest
        head = f"<Scan {str(self.folder)!r}: {m['network']['name']} on {m['data']['name']}"
        if not self.complete:
            shard = f", shard {m['shard']}" if m.get("shard") else ""
            return f"{head}{shard}, not complete>"
        said = m["summary"]
        skipped = f" ({said['skipped']} skipped)" if said["skipped"] else ""
        right = "" if said["accuracy"] is None else f", {100 * said['accuracy']:.1f}% right"
        channels = sum(one["grid"][0] for one in m["plan"]["layers"])
        return f"{head}, {said['images']:,} images{skipped}, {len(self.layers)} layers, {channels:,} channels{right}>"

    def words(self) -> list[str]:
        """What is in it, and what is worth looking at, a line each."""
        said = [repr(self).strip("<>")]
        return [*said, *(f"- {found.kind}: {found}" for found in self.findings())] if self.complete else said

    def to_json(self) -> dict[str, Any]:
        found = [one.to_json() for one in self.findings()] if self.complete else None
        return {"folder": str(self.folder), **self.manifest, "findings": found}

    def _check_complete(self) -> None:
        if not self.complete:
            raise errors.InputError(
                f"the scan in {str(self.folder)!r} is not complete: go on with resume=True, or merge its shards"
            )

    # -- tables

    def _table(self, name: str) -> pandas.DataFrame:
        pandas = errors.need("pandas", "scan", "reading the tables of a scan")
        errors.need("pyarrow", "scan", "reading the tables of a scan")
        file = self.folder / f"{name}.parquet"
        self._check_complete()
        if not file.is_file():
            raise errors.InputError(
                f"the scan in {str(self.folder)!r} has no {file.name}: the network names no classes"
            )
        return pandas.read_parquet(file)

    def channels(self, layer: str | None = None) -> pandas.DataFrame:
        """One row a channel, of one layer or of all."""
        table = self._table("channels")
        return table if layer is None else table[table["layer"] == self._layer(layer)].reset_index(drop=True)

    def images(self) -> pandas.DataFrame:
        """One row an image that was counted, by its number in the data set."""
        return self._table("images")

    def skipped(self) -> pandas.DataFrame:
        """The images that could not be read, and why."""
        return self._table("skipped")

    def classes(self) -> pandas.DataFrame:
        """One row a class: images, predictions, recall, precision."""
        return self._table("classes")

    def confusion(self) -> pandas.DataFrame:
        """How many images of each label (rows) were predicted as each class (columns), of classes that occur."""
        pairs = self._table("confusion")
        order = [c for c in self.manifest["plan"]["classes"] if c in {*pairs["label"], *pairs["prediction"]}]
        counts = pairs.pivot_table(index="label", columns="prediction", values="images", aggfunc="sum", fill_value=0)
        return counts.reindex(index=order, columns=order, fill_value=0).astype(int)

    def top(self, layer: str, channel: int) -> pandas.DataFrame:
        """The places that excite a channel most, one an image, strongest first, with the box of the input they see."""
        name = self._layer(layer)
        self._channel(name, channel)
        pandas = errors.need("pandas", "scan", "reading the tables of a scan")
        file = self.folder / "tops.parquet"
        found = pandas.read_parquet(file, filters=[("layer", "==", name), ("channel", "==", channel)])
        return found.sort_values("rank").reset_index(drop=True)

    def strip(self, layer: str, channel: int) -> Image.Image:
        """Crops of what the channel saw in its top images, strongest on the left."""
        from PIL import Image

        index = self.layers.index(self._layer(layer))
        self._channel(layer, channel)
        file = self.folder / "crops" / f"{index:03}" / f"{channel:05}.jpg"
        if not file.is_file():
            raise errors.InputError(
                f"no crops were drawn for channel {channel} of {layer}: it never changes, or crops= left it out"
            )
        with Image.open(file) as image:
            return image.convert("RGB")

    def findings(self) -> list[Finding]:
        """What is worth looking at: each a sentence, its evidence, and what one might do."""
        self._check_complete()
        return findings.read(self.folder)

    # -- arrays

    def _array(self, name: str) -> np.ndarray:
        from safetensors import safe_open

        with safe_open(self.folder / "statistics.safetensors", framework="numpy") as file:
            if name not in file.keys():  # noqa: SIM118 - not a mapping
                raise errors.InputError(f"this scan keeps no {name.partition('/')[2]} there; its notes say why")
            return file.get_tensor(name)

    def histogram(self, layer: str, channel: int) -> tuple[np.ndarray, np.ndarray]:
        """(counts, edges) of a channel's values: (B,) and (B, 2), from a fixed number of cells an image."""
        index = self.layers.index(self._layer(layer))
        self._channel(layer, channel)
        return self._array(f"{index}/histogram")[channel], self._array("edges")

    def class_means(self, layer: str) -> pandas.DataFrame:
        """The mean of each channel (columns) over the images of each class (rows)."""
        pandas = errors.need("pandas", "scan", "reading the tables of a scan")
        values = self._array(f"{self.layers.index(self._layer(layer))}/class_mean")
        return pandas.DataFrame(values, index=self.manifest["plan"]["classes"])

    def correlation(self, layer: str) -> np.ndarray:
        """(C, C) correlation between the channels of a layer, of their means over an image."""
        return self._array(f"{self.layers.index(self._layer(layer))}/correlation")

    def embeddings(self) -> np.ndarray:
        """(N, D) float16, in the order of `images()`."""
        file = self.folder / "embeddings.safetensors"
        if not file.is_file():
            raise errors.InputError("this scan keeps no embeddings: the network has no last layer with weights")
        from safetensors.numpy import load_file

        return load_file(file)["embedding"]

    def sensitivity(self) -> pandas.DataFrame:
        """The mean change of a class's score when a channel is removed: classes (rows) by channels (columns).

        Of the layer that `sensitivity=` named, over the images of the class; negative where the class needs it.
        """
        pandas = errors.need("pandas", "scan", "reading the tables of a scan")
        if not self.manifest["plan"]["sensitivity"]:
            raise errors.InputError("this scan did not remove channels: scan with sensitivity= naming a layer")
        return pandas.DataFrame(self._array("sensitivity/mean"), index=self.manifest["plan"]["classes"] or ["all"])

    # --

    def _layer(self, name: str) -> str:
        if name not in self.layers:
            raise errors.unknown("layer", name, self.layers, " in this scan")
        return name

    def _channel(self, layer: str, channel: int) -> None:
        count = self.manifest["plan"]["layers"][self.layers.index(layer)]["grid"][0]
        if not 0 <= channel < count:
            raise errors.InputError(f"layer {layer} has the channels 0 to {count - 1}, not {channel}")
