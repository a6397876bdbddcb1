"""Counting a data set block by block: the network over a block of images, and who does which block.

A block is a fixed range of images, its batches never reach into the next, and an image that cannot be read is left out
of its batch. So a block's counts do not depend on who counts it, nor when.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from innersight import errors, targets
from innersight.inquiry import Inquiry
from innersight.observe.passes import Pass, Request
from innersight.scanning import accumulators
from innersight.scanning.plan import Plan, maps_of, pool, projection

if TYPE_CHECKING:
    import torch

    from innersight.network import Network
    from innersight.scanning.accumulators import Counts
    from innersight.scanning.data import Sample, Source


@dataclass(frozen=True)
class Block:
    """What was counted of one block of images.

    counts:  see `accumulators`
    rows:    one row an image, see `_Rows`
    said:    what else is kept of each image, as JSON: names, labels, and the images that were skipped and why
    """

    number: int
    counts: Counts
    rows: dict[str, np.ndarray]
    said: dict[str, Any]


def local(net: Network, source: Source, plan: Plan, wanted: Iterable[int]) -> Iterator[Block]:
    """The blocks of these numbers, in order; images are read ahead by threads while the network runs."""
    end = sys.maxsize if source.size is None else source.size
    numbers = (n for b in wanted for n in range(b * plan.block, min((b + 1) * plan.block, end)))
    samples = source.samples(numbers, net.preprocess, net.input_shape)
    with net.engine.session():
        for number, of_block in itertools.groupby(samples, key=lambda sample: sample.index // plan.block):
            yield measure(net, plan, number, list(of_block))


def measure(net: Network, plan: Plan, number: int, samples: Sequence[Sample]) -> Block:
    """What these images of one block do in the network."""
    rows = _Rows(plan)
    looks: list[dict[str, dict[str, np.ndarray]]] = []
    removed: list[tuple[int, np.ndarray]] = []
    for sample in samples:
        if sample.values is None:
            rows.skip(sample, sample.problem)
    for batch in _batches([s for s in samples if s.values is not None], plan.batch):
        try:
            looks += _passes(net, plan, batch, rows)
        except errors.InputError:  # an image that the network makes NaN of; which one, a run of each alone tells
            for sample in batch:
                try:
                    looks += _passes(net, plan, [sample], rows)
                except errors.InputError as error:
                    rows.skip(sample, str(error))
    if plan.sensitivity:
        by_index = {s.index: s for s in samples}
        removed = [_removal(net, plan, by_index[i], c) for i, c in zip(rows.images, rows.classes(), strict=True)]
    counts: Counts = {}
    ids, classes = np.array(rows.images, np.int64), np.array(rows.classes(), np.int64)
    for i, layer in enumerate(plan.layers):
        of_layer = accumulators.count(
            [one[layer.name] for one in looks], layer.channels, ids, plan.top,
            classes if layer.by_class else None, len(plan.classes), layer.cross, layer.ends is not None,
        )  # fmt: skip
        counts |= {f"{i}/{name}": value for name, value in of_layer.items()}
    if plan.sensitivity:
        counts |= _sensitivity(net, plan, removed)
    return Block(number, counts, *rows.done())


def _batches(samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    """Of equal input sizes, in order."""
    for _, alike in itertools.groupby(samples, key=lambda s: s.values.shape):  # type: ignore[union-attr]
        group = list(alike)
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _passes(net: Network, plan: Plan, batch: Sequence[Sample], rows: _Rows) -> list[dict[str, dict[str, np.ndarray]]]:
    """Run a batch; what is kept of each layer, one entry a pass."""
    import torch

    x = net._to_model(torch.cat([s.values for s in batch]))  # type: ignore[misc]
    if plan.channels_last:
        x = x.to(memory_format=torch.channels_last)
    table = net._layers_for(x)
    found = []

    def run(part: torch.Tensor, where: slice) -> Pass:
        ids = [s.index for s in batch[where]]
        reduce: dict[str, Any] = {}
        for one in plan.layers:
            layer = table[one.name]
            reduce[one.name] = lambda v, layer=layer, ends=one.ends: {
                "look": accumulators.look(maps_of(layer, v[: len(ids)]), ids, ends)
            }
        if plan.embedding:
            layer, looked = table[plan.embedding], reduce.get(plan.embedding)

            def pooled(v: torch.Tensor) -> dict[str, Any]:
                row = pool(layer, v[: len(ids)]).float().cpu().numpy()
                return {"pooled": row} | (looked(v) if looked is not None else {})

            reduce[plan.embedding] = pooled
        return net.engine.run(part, Request(reduce=reduce))

    done = 0
    kept: list[tuple[Sequence[Sample], Pass]] = []
    for passed in net.engine.chunks(x, run, len(batch)):
        n = len(next(iter(passed.values.values()))["look"]["mean"])
        kept.append((batch[done : done + n], passed))
        done += n
    for part, passed in kept:  # all of the batch is there, or none of it
        found.append({one.name: passed.values[one.name]["look"] for one in plan.layers})
        embedding = passed.values[plan.embedding]["pooled"] if plan.embedding else None
        rows.add(part, _scores(net, plan, passed.output), embedding)
    return found


def _scores(net: Network, plan: Plan, output: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """(n, K) probabilities and (n,) the predicted class."""
    if not plan.predicts:
        return None
    main = net._main(output).detach()
    scores = targets.class_scores(main).float()
    shares = scores if plan.probabilities else targets.probabilities(scores)
    return shares.cpu().numpy(), targets.winner(main).cpu().numpy()


class _Rows:
    """What is kept of each image of a block.

    image, label, prediction, runner_up: numbers; label -1 where there is none
    confidence, label_probability:       of the prediction, of the label (NaN where there is none)
    embedding (n, width) float16
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self.images: list[int] = []
        self.names: list[str] = []
        self.labels: list[Any] = []
        self.skipped: list[dict[str, Any]] = []
        self.label_class: list[int] = []
        self.predicted: list[int] = []
        self.runner_up: list[int] = []
        self.confidence: list[float] = []
        self.of_label: list[float] = []
        self.embeddings: list[np.ndarray] = []
        self.projection = projection(plan.embedding_size)

    def skip(self, sample: Sample, why: str) -> None:
        self.skipped.append({"image": sample.index, "name": sample.name, "reason": why})

    def add(self, batch: Sequence[Sample], scores: Any, embedding: np.ndarray | None) -> None:
        for i, sample in enumerate(batch):
            label = self.plan.class_of(sample.label)
            self.images.append(sample.index)
            self.names.append(sample.name)
            self.labels.append(sample.label)
            self.label_class.append(label)
            if scores is not None:
                shares, predicted = scores[0][i], int(scores[1][i])
                order = np.argsort(-shares, kind="stable")
                self.predicted.append(predicted)
                self.runner_up.append(int(order[0] if order[0] != predicted else order[1]))
                self.confidence.append(float(shares[predicted]))
                self.of_label.append(float(shares[label]) if label >= 0 else float("nan"))
        if embedding is not None:
            rows = embedding if self.projection is None else embedding @ self.projection
            self.embeddings.append(rows.clip(-65504, 65504).astype(np.float16))

    def classes(self) -> list[int]:
        """By what class means are made: labels, or predictions where the data set has none."""
        return self.label_class if self.plan.by_label or not self.plan.predicts else self.predicted

    def done(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        rows: dict[str, np.ndarray] = {
            "image": np.array(self.images, np.int64),
            "label": np.array(self.label_class, np.int32),
        }
        if self.plan.predicts:
            rows["prediction"] = np.array(self.predicted, np.int32)
            rows["runner_up"] = np.array(self.runner_up, np.int32)
            rows["confidence"] = np.array(self.confidence, np.float32)
            rows["label_probability"] = np.array(self.of_label, np.float32)
        if self.plan.embedding:
            rows["embedding"] = np.concatenate([np.zeros((0, self.plan.width), np.float16), *self.embeddings])
        skipped = sorted(self.skipped, key=lambda one: one["image"])
        return rows, {"names": self.names, "labels": self.labels, "skipped": skipped}


def _removal(net: Network, plan: Plan, sample: Sample, of_class: int) -> tuple[int, np.ndarray]:
    """The class, and how much its score changes without each channel, (C,)."""
    assert sample.values is not None
    x = net._to_model(sample.values)
    inquiry = Inquiry(net, x, of_class if of_class >= 0 else None)
    base, without, _ = inquiry.without_channels(0, net._layers_for(x)[plan.sensitivity])
    return of_class, without.double().cpu().numpy() - base


def _sensitivity(net: Network, plan: Plan, removed: Sequence[tuple[int, np.ndarray]]) -> Counts:
    classes = max(len(plan.classes), 1)
    channels = net.layers[plan.sensitivity]
    width = channels.node.shape[channels.channel_axis]
    total, square, count = np.zeros((classes, width)), np.zeros((classes, width)), np.zeros(classes, np.int64)
    for of_class, change in removed:
        if of_class >= 0:
            total[of_class] += change
            square[of_class] += change**2
            count[of_class] += 1
    return {"sensitivity/sum": total, "sensitivity/square": square, "sensitivity/images": count}
