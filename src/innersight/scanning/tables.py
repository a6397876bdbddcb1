"""What a finished scan leaves: the tables, statistics and crops, made from its counts and rows."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from innersight import errors, storage
from innersight.scanning import accumulators, store
from innersight.scanning.accumulators import Counts
from innersight.scanning.plan import Plan, Watched

if TYPE_CHECKING:
    from innersight.images import Picture
    from innersight.layers import Layer
    from innersight.network import Network
    from innersight.scanning.data import Source

SHARES = {"q001": 0.001, "q01": 0.01, "q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95, "q99": 0.99,
          "q999": 0.999}  # fmt: skip
TILE, GAP = 64, 2
"""Pixels of a crop in a strip, and between two."""
_SIDES = ("top", "left", "bottom", "right")
_AT_ONCE = 512  # channels whose crops are in memory together
_BLOCKS_AT_ONCE = 64


def write(
    folder: Path, net: Network, source: Source, plan: Plan, parts: store.Parts, counts: Counts,
    input_shape: Sequence[int], crops: int,
) -> list[str]:  # fmt: skip
    """Everything but manifest and findings; what was bounded or went wrong, a sentence each."""
    channels = [of_layer(counts, i) for i in range(len(plan.layers))]
    notes: list[str] = []
    wanted = {int(i) for c in channels for i in np.unique(c["top_image"]) if i >= 0}
    names = _write_images(folder, plan, parts, wanted)
    layers = _layers(net, input_shape, plan)
    _write_channels(folder, plan, channels)
    _write_tops(folder, plan, channels, layers, names)
    _write_statistics(folder, plan, channels, counts)
    notes += _write_crops(folder, net, source, plan, channels, crops)
    return notes


def of_layer(counts: Counts, index: int) -> Counts:
    head = f"{index}/"
    return {name.removeprefix(head): value for name, value in counts.items() if name.startswith(head)}


def _layers(net: Network, input_shape: Sequence[int], plan: Plan) -> list[Layer]:
    import torch

    table = net._layers_for(net._to_model(torch.zeros((1, *input_shape))))
    return [table[one.name] for one in plan.layers]


# --- images ----------------------------------------------------------------------------------------------------------


def _write_images(folder: Path, plan: Plan, parts: store.Parts, wanted: set[int]) -> dict[int, str]:
    """The tables of images and classes, a few blocks in memory at a time; the names of the images that are wanted."""
    pyarrow = errors.need("pyarrow", "scan", "writing tables")
    blocks = sorted(parts.blocks())
    names: dict[int, str] = {}
    skipped: list[dict[str, Any]] = []
    pairs: dict[tuple[int, int], int] = defaultdict(int)
    total = 0

    def tables() -> Iterator[Any]:
        nonlocal total
        for start in range(0, len(blocks), _BLOCKS_AT_ONCE):
            some = [parts.rows_of(b) for b in blocks[start : start + _BLOCKS_AT_ONCE]]
            rows = {n: np.concatenate([r[n] for r, _ in some]) for n in some[0][0] if n != "embedding"}
            said = [name for _, s in some for name in s["names"]]
            labels = [label for _, s in some for label in s["labels"]]
            skipped.extend(one for _, s in some for one in s["skipped"])
            names.update((int(i), n) for i, n in zip(rows["image"], said, strict=True) if int(i) in wanted)
            total += len(said)
            for pair in zip(rows["label"].tolist(), rows.get("prediction", rows["label"]).tolist(), strict=True):
                pairs[pair] += 1
            yield pyarrow.table(_image_columns(plan, rows, said, labels, pyarrow))

    store.write_tables(folder / "images.parquet", tables())
    store.write_table(
        folder / "skipped.parquet",
        {"image": np.array([s["image"] for s in skipped], np.int64),
         "name": pyarrow.array([s["name"] for s in skipped], pyarrow.string()),
         "reason": pyarrow.array([s["reason"] for s in skipped], pyarrow.string())},
    )  # fmt: skip
    if plan.embedding:
        parts_of = (parts.rows_of(b)[0]["embedding"] for b in blocks)
        store.write_rows_as_tensor(folder / "embeddings.safetensors", "embedding", parts_of, total, plan.width)
    if plan.predicts:
        _write_confusion(folder, plan, pairs)
    return names


def _image_columns(plan: Plan, rows: Mapping[str, np.ndarray], names: list, labels: list, pyarrow: Any) -> dict:
    def class_name(numbers: np.ndarray) -> Any:
        return pyarrow.array([plan.classes[i] if i >= 0 else None for i in numbers], pyarrow.string())

    given = pyarrow.array([None if label is None else str(label) for label in labels], pyarrow.string())
    columns: dict[str, Any] = {
        "image": rows["image"], "name": pyarrow.array(names, pyarrow.string()), "label_given": given,
        "label": class_name(rows["label"]),
    }  # fmt: skip
    if plan.predicts:
        known = rows["label"] >= 0
        share = rows["label_probability"].astype(np.float64)
        right = rows["label"] == rows["prediction"]
        columns |= {
            "prediction": class_name(rows["prediction"]),
            "confidence": rows["confidence"],
            "runner_up": class_name(rows["runner_up"]),
            "label_probability": pyarrow.array(rows["label_probability"], mask=~known),
            "loss": pyarrow.array(-np.log(np.where(known, np.maximum(share, 1e-12), 1)), mask=~known),
            "correct": pyarrow.array(right, mask=~known),
        }
    return columns


def _write_confusion(folder: Path, plan: Plan, pairs: Mapping[tuple[int, int], int]) -> None:
    known = {pair: n for pair, n in sorted(pairs.items()) if pair[0] >= 0}
    store.write_table(
        folder / "confusion.parquet",
        {"label": [plan.classes[a] for a, _ in known] or np.array([], object),
         "prediction": [plan.classes[b] for _, b in known] or np.array([], object),
         "images": np.array(list(known.values()), np.int64)},
    )  # fmt: skip
    labelled, predicted = np.zeros(len(plan.classes), np.int64), np.zeros(len(plan.classes), np.int64)
    right = np.zeros(len(plan.classes), np.int64)
    for (label, prediction), n in pairs.items():
        predicted[prediction] += n
        if label >= 0:
            labelled[label] += n
            right[label] += n * (label == prediction)
    with np.errstate(invalid="ignore", divide="ignore"):
        recall, precision = right / labelled, right / predicted
    store.write_table(
        folder / "classes.parquet",
        {"class": list(plan.classes), "images": labelled, "predicted": predicted, "correct": right,
         "recall": recall, "precision": precision if known else np.full(len(recall), np.nan)},
    )  # fmt: skip


# --- channels --------------------------------------------------------------------------------------------------------


def _write_channels(folder: Path, plan: Plan, channels: Sequence[Counts]) -> None:
    columns: dict[str, list] = defaultdict(list)
    for layer, counts in zip(plan.layers, channels, strict=True):
        for name, values in channel_columns(plan, layer, counts).items():
            columns[name].append(values)
    store.write_table(folder / "channels.parquet", {n: np.concatenate(v) for n, v in columns.items()})


def channel_columns(plan: Plan, layer: Watched, counts: Counts) -> dict[str, np.ndarray]:
    """The rows of a layer's channels; shares are of what is finite, NaN stands for what is not known."""
    size, cells = len(counts["cells"]), counts["cells"]
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = counts["sum"] / cells
        variance = np.maximum(counts["square"] / cells - mean**2, 0)
        # What is left of two equal numbers is rounding: of the order of float32's, since an image's own numbers are.
        variance[variance < 1e-12 * mean**2] = 0
        columns: dict[str, np.ndarray] = {
            "layer": np.full(size, layer.name, object), "channel": np.arange(size),
            "kind": np.full(size, layer.kind, object),
            "images": counts["images"], "cells": cells, "mean": mean, "std": np.sqrt(variance),
            "min": np.where(cells > 0, counts["low"], np.nan), "max": np.where(cells > 0, counts["high"], np.nan),
            "zeros": counts["zeros"] / cells, "fires": counts["fires"] / counts["images"],
            "nonfinite": counts["nonfinite"],
            "clipped": counts["clipped"] / cells if "clipped" in counts else np.full(size, np.nan),
        }  # fmt: skip
    found = accumulators.quantiles(counts["histogram"], list(SHARES.values()), counts["low"], counts["high"])
    columns |= {name: found[:, i] for i, name in enumerate(SHARES)}
    columns |= _of_classes(plan, counts, size) | _nearest(counts, size)
    return columns


def _of_classes(plan: Plan, counts: Counts, size: int) -> dict[str, np.ndarray]:
    if "class_sum" not in counts or not counts["class_count"].any():
        nothing = np.full(size, np.nan)
        return {"selectivity": nothing, "class": np.full(size, None, object), "class_mean": nothing}
    means = class_means(counts)
    best = np.where(np.isnan(means), -np.inf, means).argmax(0)
    names = np.array(plan.classes, object)[best]
    return {
        "selectivity": accumulators.selectivity(counts), "class": names,
        "class_mean": np.take_along_axis(means, best[None], 0)[0],
    }  # fmt: skip


def class_means(counts: Counts) -> np.ndarray:
    """(K, C); NaN for classes without images."""
    n = counts["class_count"][:, None]
    return np.divide(counts["class_sum"], n, out=np.full(counts["class_sum"].shape, np.nan), where=n > 0)


def _nearest(counts: Counts, size: int) -> dict[str, np.ndarray]:
    if "cross" not in counts or size < 2:
        return {"nearest": np.full(size, -1), "correlation": np.full(size, np.nan)}
    between = accumulators.correlation(counts)
    known = np.where(np.isnan(between), -np.inf, between)
    np.fill_diagonal(known, -np.inf)
    best, value = known.argmax(1), known.max(1)
    there = np.isfinite(value)
    return {"nearest": np.where(there, best, -1), "correlation": np.where(there, value, np.nan)}


def _write_tops(
    folder: Path, plan: Plan, channels: Sequence[Counts], layers: Sequence[Layer], names: Mapping[int, str]
) -> None:  # fmt: skip
    pyarrow = errors.need("pyarrow", "scan", "writing tables")

    def tables() -> Iterator[Any]:
        for watched, layer, counts in zip(plan.layers, layers, channels, strict=True):
            there = counts["top_image"].T >= 0  # (C, k)
            channel, rank = np.nonzero(there)
            values = {n: counts[f"top_{n}"].T[there] for n in ("value", "image", "y", "x")}
            boxes = np.array([box_of(layer, watched, y, x) for y, x in zip(values["y"], values["x"], strict=True)])
            boxes = boxes.reshape(-1, 4)
            known = ~np.isnan(boxes[:, 0])
            yield pyarrow.table({
                "layer": pyarrow.array([watched.name] * len(channel), pyarrow.string()),
                "channel": channel, "rank": rank,
                "image": values["image"],
                "name": pyarrow.array([names[int(i)] for i in values["image"]], pyarrow.string()),
                "value": values["value"], "y": values["y"], "x": values["x"],
                **{n: pyarrow.array(boxes[:, i], mask=~known) for i, n in enumerate(_SIDES)},
            })  # fmt: skip

    store.write_tables(folder / "tops.parquet", tables())


def box_of(layer: Layer, watched: Watched, y: int, x: int) -> tuple[float, float, float, float]:
    """(top, left, bottom, right) on the input that unit (y, x) sees; NaN where it is not known."""
    field = layer.receptive_field
    inside = layer.grid is not None and y < layer.grid[1] and x < layer.grid[2]
    if field is None or not inside or watched.grid[1:] != layer.grid[1:]:  # type: ignore[index]
        return (np.nan,) * 4
    top, left, bottom, right = field.box(int(y), int(x))
    return float(top), float(left), float(bottom), float(right)


def _write_statistics(folder: Path, plan: Plan, channels: Sequence[Counts], everything: Counts) -> None:
    arrays: dict[str, np.ndarray] = {"edges": accumulators.edges()}
    for i, counts in enumerate(channels):
        arrays[f"{i}/histogram"] = counts["histogram"]
        if "class_sum" in counts:
            arrays[f"{i}/class_mean"] = class_means(counts).astype(np.float32)
        if "cross" in counts:
            arrays[f"{i}/correlation"] = accumulators.correlation(counts).astype(np.float32)
    if plan.sensitivity:
        n = everything["sensitivity/images"][:, None]
        total = everything["sensitivity/sum"]
        arrays["sensitivity/mean"] = np.divide(total, n, out=np.full(total.shape, np.nan), where=n > 0)
        square = np.divide(everything["sensitivity/square"], n, out=np.full(total.shape, np.nan), where=n > 0)
        arrays["sensitivity/std"] = np.sqrt(np.maximum(square - arrays["sensitivity/mean"] ** 2, 0))
        arrays["sensitivity/images"] = everything["sensitivity/images"]
    with store.plain_errors(folder):
        storage.store(folder / "statistics.safetensors", arrays, {"layers": [one.name for one in plan.layers]})


# --- crops -----------------------------------------------------------------------------------------------------------


def _write_crops(
    folder: Path, net: Network, source: Source, plan: Plan, channels: Sequence[Counts], most: int
) -> list[str]:  # fmt: skip
    """A strip of what each channel's top units saw; for `most` channels, spread over the layers."""
    chosen, notes = _with_crops(channels, most)
    gone: set[int] = set()
    for start in range(0, len(chosen), _AT_ONCE):
        some = chosen[start : start + _AT_ONCE]
        strips = {key: _blank_strip(plan.top) for key in some}
        wanted: dict[int, list[tuple[tuple[int, int], int, int, int]]] = defaultdict(list)
        for i, c in some:
            counts = channels[i]
            for rank in range(plan.top):
                if (image := int(counts["top_image"][rank, c])) >= 0:
                    place = int(counts["top_y"][rank, c]), int(counts["top_x"][rank, c])
                    wanted[image].append(((i, c), rank, *place))
        for done, sample in enumerate(source.samples(sorted(wanted), net.preprocess, net.input_shape), 1):
            net._report(done, len(wanted), f"crops of {len(some)} channels")
            if sample.values is None or sample.picture is None:
                gone.add(sample.index)
                continue
            table = net._layers_for(net._to_model(sample.values))
            shown = sample.picture.display().convert("RGB")
            for (i, c), rank, y, x in wanted[sample.index]:
                tile = crop(sample.picture, table[plan.layers[i].name], y, x, shown)
                strips[i, c].paste(tile, (rank * (TILE + GAP), 0))
        for (i, c), strip in strips.items():
            _write_strip(folder / "crops" / f"{i:03}", f"{c:05}.jpg", strip)
    if gone:
        notes.append(
            f"{len(gone)} of the images that excite a channel most can no longer be read; their crops are grey"
        )
    return notes


def _write_strip(folder: Path, name: str, strip: Image.Image) -> None:
    data = io.BytesIO()
    strip.save(data, "JPEG", quality=85, optimize=True)
    with store.plain_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        storage.write_whole(folder / name, lambda file: file.write(data.getvalue()))


def _with_crops(channels: Sequence[Counts], most: int) -> tuple[list[tuple[int, int]], list[str]]:
    """(layer, channel) of those that get a strip: not those that never change."""
    live = [np.flatnonzero(c["high"] > c["low"]) for c in channels]
    room, chosen = most, []
    order = sorted(range(len(live)), key=lambda i: len(live[i]))
    for left, i in zip(range(len(order), 0, -1), order, strict=True):
        share = min(len(live[i]), room // left)
        picked = live[i][np.linspace(0, len(live[i]) - 1, share).round().astype(int)] if share else []
        chosen += [(i, int(c)) for c in picked]
        room -= share
    total = sum(map(len, live))
    notes = []
    if len(chosen) < total:
        notes.append(f"crops are drawn for {len(chosen)} of {total} channels that ever change (crops= changes it)")
    return sorted(chosen), notes


def _blank_strip(count: int) -> Image.Image:
    return Image.new("RGB", (count * (TILE + GAP) - GAP, TILE), (128, 128, 128))


def crop(picture: Picture, layer: Layer, y: int, x: int, shown: Image.Image | None = None) -> Image.Image:
    """What unit (y, x) of the layer sees of the picture, TILE by TILE pixels, on grey where it is not square."""
    shown = picture.display().convert("RGB") if shown is None else shown
    box = (0.0, 0.0, float(shown.width), float(shown.height))
    field = layer.receptive_field
    if field is not None and layer.grid is not None:
        top, left, bottom, right = map(float, field.box(y, x))
        x0, y0, x1, y1 = picture.box_to_original((left, top, right, bottom))
        if x1 > x0 and y1 > y0:
            box = x0, y0, x1, y1
    wide, tall = box[2] - box[0], box[3] - box[1]
    scale = TILE / max(wide, tall)
    size = max(1, round(wide * scale)), max(1, round(tall * scale))
    enlarged = max(wide, tall) < TILE
    seen = shown.resize(size, Image.Resampling.NEAREST if enlarged else Image.Resampling.BOX, box=box)
    tile = Image.new("RGB", (TILE, TILE), (128, 128, 128))
    tile.paste(seen, ((TILE - size[0]) // 2, (TILE - size[1]) // 2))
    return tile
