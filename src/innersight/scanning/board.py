"""Scalars and pictures of scans for TensorBoard."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from innersight import errors
from innersight.scanning.change import with_dead

if TYPE_CHECKING:
    from innersight.results import FeatureMaps
    from innersight.scanning.reader import Scan

TAGS = {"mean": "mean", "std": "std", "zeros": "share of zeros", "dead": "dead channels", "selectivity": "selectivity"}
"""What TensorBoard shows of each layer."""


class Board:
    """Scalars and pictures for TensorBoard, as one file of events.

    Written through the record writer alone: torch's SummaryWriter would load TensorFlow where that is installed, which
    does not bear every engine of Keras in its process.
    """

    def __init__(self, folder: Path):
        errors.need("tensorboard", "training", "writing for TensorBoard")
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        self.event, self.summary = Event, Summary
        self.folder = folder
        self.file = folder / f"events.out.tfevents.{int(time.time())}.{os.getpid()}.{id(self):x}.innersight"

    def write(self, found: Scan, maps: FeatureMaps | None, step: int) -> None:
        """Everything of one step, as one event; all of it or, where OSError is raised, nothing."""
        values = [self.summary.Value(tag=tag, simple_value=value) for tag, value in _scalars(found)]
        values += [self._picture(layer, maps[layer][0]) for layer in maps or () if maps and maps[layer].ndim == 4]
        self._append(self.event(wall_time=time.time(), step=step, summary=self.summary(value=values)))

    def _picture(self, layer: str, maps: np.ndarray) -> Any:
        """The maps (C, H, W) of the first image in a grid, each on its own scale, as a PNG."""
        from PIL import Image

        from innersight.draw import color

        each = np.stack([color.paint(m, color.scale(m)) for m in maps[:256]])
        zoom = max(1, 32 // max(each.shape[1:3]))
        grid = color.tile(each, color.near_square(len(each), *each.shape[1:3]), zoom=zoom)
        data = io.BytesIO()
        Image.fromarray(grid).save(data, "PNG")
        image = self.summary.Image(
            height=grid.shape[0], width=grid.shape[1], colorspace=3, encoded_image_string=data.getvalue()
        )
        return self.summary.Value(tag=f"maps/{layer}", image=image)

    def _append(self, event: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.folder.mkdir(parents=True, exist_ok=True)
        with self.file.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                writer = RecordWriter(file)
                if not size:
                    writer.write(self.event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
                writer.write(event.SerializeToString())
            except OSError:  # half a record would hide all that follow
                file.truncate(size)
                raise


def _scalars(found: Scan) -> Iterator[tuple[str, float]]:
    """Tag and value: accuracy and loss over the data, and of each layer the mean over its channels."""
    accuracy = found.manifest["summary"]["accuracy"]
    if accuracy is not None:
        yield "accuracy", float(accuracy)
        yield "loss", float(found.images()["loss"].mean())
    table = with_dead(found)
    for layer, rows in table.groupby("layer", sort=False):
        for name, tag in TAGS.items():
            value = float(rows[name].mean())
            if np.isfinite(value):
                yield f"{tag}/{layer}", value
