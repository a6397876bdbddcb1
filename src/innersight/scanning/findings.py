"""What a scan means, in words: each finding with its evidence and what one might do.

    for finding in innersight.Scan("out/").findings():
        print(finding)

Findings are made when a scan ends, from its tables, and from the network once more where reasons are asked for: why
this class and not that, for the worst errors; which errors have the same reason.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from innersight import errors, images, storage, targets
from innersight.scanning import accumulators, store
from innersight.scanning.accumulators import Counts
from innersight.scanning.plan import Plan

if TYPE_CHECKING:
    from innersight.network import Network
    from innersight.results import Saliency
    from innersight.scanning.data import Sample, Source

ALIKE = 0.99
"""Correlation from which two channels count as one."""
FAR = 4.0
"""A maximum this many times the 99.9% quantile stretches the range that a quantiser has to cover."""
CLIPPED = 0.01
"""Share of a channel's cells at the end of its range from which it is called saturated."""
UNLIKE = 6.0
"""Distance in the embedding, in robust standard deviations, from which an image is unlike the rest."""
GALLERY, CLUSTERED = 12, 256  # errors that are shown, and that are clustered by their reasons
_GRID = 16  # saliency maps are compared at this size
_SIDE = 128  # pixels of a picture in a gallery
_TOGETHER = 32  # images whose saliency is in memory at once


@dataclass(frozen=True)
class Finding:
    """Something worth looking at.

    kind:     "dead channels", "always on", "duplicates", "wide ranges", "saturated", "not finite", "unread images",
              "confused classes", "worst errors", "errors with one reason", "unlike the rest", "needed channels"
    text:     what it is
    evidence: what was counted
    advice:   what one might do
    items:    the layers, channels, classes or images it is about
    picture:  a gallery, a path inside the scan's folder; "" if there is none
    """

    kind: str
    text: str
    evidence: str
    advice: str
    items: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    picture: str = ""

    def __str__(self) -> str:
        return f"{self.text} ({self.evidence}); {self.advice}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Finding:
        return cls(**{**data, "items": tuple(data["items"])})


def read(folder: Path) -> list[Finding]:
    return [Finding.from_json(one) for one in json.loads((folder / "findings.json").read_text(encoding="utf-8"))]


def write(folder: Path, net: Network, source: Source, plan: Plan, channels: Sequence[Counts], counts: Counts) -> None:
    """Make the findings of a scan whose tables are written."""
    import pyarrow.parquet as parquet

    with store.plain_errors(folder):
        (folder / "findings").mkdir(exist_ok=True)
    table = parquet.read_table(folder / "channels.parquet").to_pydict()
    found = [
        *dead(net, plan, channels), *always_on(plan, channels), *duplicates(net, plan, channels),
        *wide_ranges(plan, table), *saturated(plan, channels), *not_finite(plan, channels), *unread(folder),
    ]  # fmt: skip
    wrong = worst_errors(folder, CLUSTERED)
    found += confused(folder)
    if wrong:
        found += reasons(folder, net, source, plan, wrong)
    found += unlike(folder, net, source, plan)
    found += needed(plan, counts)
    store.write_json(folder / "findings.json", [one.to_json() for one in found])


# --- channels --------------------------------------------------------------------------------------------------------


def dead(net: Network, plan: Plan, channels: Sequence[Counts]) -> Iterator[Finding]:
    """Channels that never change, and those that never get through the ReLU behind them; each once along its way."""
    items: list[dict[str, Any]] = []
    table = net.layers
    known: dict[int, set[int]] = {}
    for layer, counts in zip(plan.layers, channels, strict=True):
        node = table[layer.name].node
        behind = [n.op.rstrip("_") for n in table._recording.nodes if node.index in n.inputs]
        cut = bool(behind) and all(op in _CUT for op in behind)
        constant = (counts["low"] == counts["high"]) & (counts["cells"] > 1)
        which = np.flatnonzero(constant | (counts["high"] <= 0 if cut else False))
        known[node.index] = set(which.tolist())
        if len(which) and not any(known.get(i) == known[node.index] for i in node.inputs):
            items.append({"layer": layer.name, "channels": which, "of": layer.channels})
    if items:
        yield Finding(
            "dead channels",
            f"{_channels(items)} without anything to say about any image: {_places(items)}",
            f"over {_images(channels)} images they have one value everywhere, or never get above zero with a ReLU next",
            "take them out (the network answers the same), or look whether learning rate or weight decay killed them",
            tuple(items),
        )


_CUT = ("relu", "relu6", "threshold")  # what lets nothing below zero through


def _is_relu(kind: str) -> bool:
    return kind.lower().rstrip("_") in ("relu", "relu6")


def always_on(plan: Plan, channels: Sequence[Counts]) -> Iterator[Finding]:
    """Channels of a ReLU that it never cuts."""
    items: list[dict[str, Any]] = []
    for layer, counts in zip(plan.layers, channels, strict=True):
        on = (counts["low"] > 0) & (counts["high"] > counts["low"]) & _is_relu(layer.kind)
        if on.any():
            items.append({"layer": layer.name, "channels": np.flatnonzero(on), "of": layer.channels})
    if items:
        yield Finding(
            "always on",
            f"{_channels(items)} firing in every cell of every image: {_places(items)}",
            f"their smallest value over {_images(channels)} images is above zero, so their ReLU never cuts",
            "they are linear here; a bias that carries them may be all they say, compare their selectivity",
            tuple(items),
        )


def duplicates(net: Network, plan: Plan, channels: Sequence[Counts]) -> Iterator[Finding]:
    """Groups of channels of a layer whose means over an image go together; of layers with weights, if there are any."""
    items: list[dict[str, Any]] = []
    weighed = {one.name for one in plan.layers if net.layers[one.name].parameters}
    for layer, counts in zip(plan.layers, channels, strict=True):
        if "cross" not in counts or counts["images"].max(initial=0) < 3 or (weighed and layer.name not in weighed):
            continue
        between = accumulators.correlation(counts)
        for group in _groups(between):
            least = float(np.nanmin(between[np.ix_(group, group)]))
            items.append({"layer": layer.name, "channels": np.array(group), "of": layer.channels, "correlation": least})
    if items:
        spare = sum(len(one["channels"]) - 1 for one in items)
        yield Finding(
            "duplicates",
            f"{_many(spare, 'channel')} more than needed: {_places(items, ' alike')}",
            f"their means over an image correlate by more than {ALIKE} over {_images(channels)} images; where in the "
            "image they fire was not compared",
            "look at their top images side by side; where those agree, too, one of each group is enough",
            tuple(sorted(items, key=lambda one: -len(one["channels"]))),
        )


def _groups(between: np.ndarray) -> list[list[int]]:
    """Groups of channels of which each is alike to the first, the first being the lowest number."""
    free, groups = np.ones(len(between), bool), []
    alike = np.nan_to_num(between) > ALIKE
    np.fill_diagonal(alike, True)
    for c in range(len(between)):
        if free[c]:
            group = np.flatnonzero(alike[c] & free)
            free[group] = False
            if len(group) > 1:
                groups.append(group.tolist())
    return groups


def wide_ranges(plan: Plan, table: Mapping[str, Sequence]) -> Iterator[Finding]:
    """Layers with outliers that stretch the range of a quantiser."""
    names = np.array(table["layer"])
    items: list[dict[str, Any]] = []
    for layer in plan.layers:
        here = names == layer.name
        low, high, q001, q999 = (np.array(table[n], float)[here] for n in ("min", "max", "q001", "q999"))
        usual = np.nanmax(np.maximum(np.abs(q001), np.abs(q999)), initial=0)
        most = np.maximum(np.abs(low), np.abs(high))
        largest = np.nanmax(most, initial=0)
        if usual > 0 and largest >= FAR * usual:
            far = np.flatnonzero(most >= FAR * usual)
            items.append({"layer": layer.name, "channels": far, "of": layer.channels, "largest": float(largest),
                          "usual": float(usual), "times": float(largest / usual)})  # fmt: skip
    if items:
        items.sort(key=lambda one: -one["times"])
        first = items[0]
        bits = np.log2(first["times"])
        yield Finding(
            "wide ranges",
            f"outliers stretch the range of {_many(len(items), 'layer')}: {_places(items)}",
            f"in {first['layer']} the largest value is {first['largest']:.3g}, {first['times']:.1f} times what 99.9% "
            f"of each channel's cells stay below ({first['usual']:.3g}, from a sample): {bits:.1f} bits of int8",
            "clip the range at a quantile when quantising, or quantise these layers by channel",
            tuple(items),
        )


def saturated(plan: Plan, channels: Sequence[Counts]) -> Iterator[Finding]:
    """Channels that are often at the end of the range that their layer can take."""
    items: list[dict[str, Any]] = []
    for layer, counts in zip(plan.layers, channels, strict=True):
        if "clipped" in counts:
            share = counts["clipped"] / np.maximum(counts["cells"], 1)
            if len(which := np.flatnonzero(share >= CLIPPED)):
                items.append({"layer": layer.name, "channels": which, "of": layer.channels, "ends": layer.ends,
                              "share": float(share.max()), "worst": int(share.argmax())})  # fmt: skip
    if items:
        first = max(items, key=lambda one: one["share"])
        yield Finding(
            "saturated",
            f"{_channels(items)} often at the end of the range: {_places(items)}",
            f"channel {first['worst']} of {first['layer']} is there in {100 * first['share']:.1f}% of its cells",
            "what is beyond is lost: calibrate the range on more images, or train with it (a ReLU6 may be meant to)",
            tuple(items),
        )


def not_finite(plan: Plan, channels: Sequence[Counts]) -> Iterator[Finding]:
    items: list[dict[str, Any]] = [
        {"layer": layer.name, "channels": np.flatnonzero(c["nonfinite"]), "of": layer.channels}
        for layer, c in zip(plan.layers, channels, strict=True)
        if c["nonfinite"].any()
    ]
    if items:
        cells = sum(int(c["nonfinite"].sum()) for c in channels)
        yield Finding(
            "not finite",
            f"{_channels(items)} with infinite values: {_places(items)}",
            f"{cells} cells; they were left out of every statistic",
            "look for a logarithm of zero, a division by zero or an overflow in front of the first of these layers",
            tuple(items),
        )


def unread(folder: Path) -> Iterator[Finding]:
    import pyarrow.parquet as parquet

    skipped = parquet.read_table(folder / "skipped.parquet").to_pylist()
    if skipped:
        first = skipped[0]
        yield Finding(
            "unread images",
            f"{_many(len(skipped), 'image')} skipped",
            f"the first is {first['name']}: {first['reason']}",
            "mend or remove them; skipped.parquet lists each with its reason",
            tuple(skipped[:100]),
        )


def needed(plan: Plan, counts: Counts) -> Iterator[Finding]:
    """The channels that classes depend on, by removal."""
    if not plan.sensitivity:
        return
    n = counts["sensitivity/images"]
    items: list[dict[str, Any]] = []
    for k in np.flatnonzero(n):
        change = counts["sensitivity/sum"][k] / n[k]
        c = int(change.argmin())
        if change[c] < 0:
            spread = np.sqrt(max(counts["sensitivity/square"][k, c] / n[k] - change[c] ** 2, 0))
            name = plan.classes[k] if plan.classes else "all"
            items.append(
                {"class": name, "channel": c, "change": float(change[c]), "std": float(spread), "images": int(n[k])}
            )
    if items:
        items.sort(key=lambda one: one["change"])
        first = items[0]
        yield Finding(
            "needed channels",
            f"{first['class']} depends most on channel {first['channel']} of {plan.sensitivity}",
            f"without it its score changes by {first['change']:.3g} (standard deviation {first['std']:.2g}) over "
            f"{first['images']} images, by exact removal",
            "look at that channel's top images: is this what the class should be told by?",
            tuple(items),
        )


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _channels(items: Sequence[Mapping[str, Any]]) -> str:
    return _many(sum(len(one["channels"]) for one in items), "channel")


def _images(channels: Sequence[Counts]) -> str:
    return f"{max(int(c['images'].max(initial=0)) for c in channels):,}"


def _places(items: Sequence[Mapping[str, Any]], said: str = "") -> str:
    def place(one: Mapping[str, Any]) -> str:
        numbers = [str(c) for c in one["channels"][:4]]
        more = f" and {len(one['channels']) - 4} more" if len(one["channels"]) > 4 else ""
        return f"{', '.join(numbers)}{more} of {one['layer']}{said}"

    more = f"; and in {_many(len(items) - 4, 'more place')}" if len(items) > 4 else ""
    return "; ".join(place(one) for one in items[:4]) + more


# --- classes and errors ----------------------------------------------------------------------------------------------


def worst_errors(folder: Path, most: int) -> list[dict[str, Any]]:
    """The images that are wrong with the highest confidence, worst first; a bounded number is in memory."""
    import pyarrow.parquet as parquet

    file = parquet.ParquetFile(folder / "images.parquet")
    if "correct" not in file.schema_arrow.names:
        return []
    worst: list[dict[str, Any]] = []
    for batch in file.iter_batches(4096, columns=["image", "name", "label", "prediction", "confidence", "correct"]):
        worst += [row for row in batch.to_pylist() if row["correct"] is False]
        sure = [row for row in worst if row["confidence"] == row["confidence"]]  # not NaN
        worst = sorted(sure, key=lambda row: (-row["confidence"], row["image"]))[:most]
    return worst


def confused(folder: Path) -> Iterator[Finding]:
    import pyarrow.parquet as parquet

    if not (folder / "confusion.parquet").is_file():
        return
    pairs = parquet.read_table(folder / "confusion.parquet").to_pylist()
    per_class: dict[str, int] = {}
    for one in pairs:
        per_class[one["label"]] = per_class.get(one["label"], 0) + one["images"]
    wrong = [
        {**one, "share": one["images"] / per_class[one["label"]]} for one in pairs if one["label"] != one["prediction"]
    ]
    wrong.sort(key=lambda one: (-one["images"], one["label"], one["prediction"]))
    if wrong and wrong[0]["images"] > 1:
        first, total = wrong[0], sum(one["images"] for one in wrong)
        yield Finding(
            "confused classes",
            f"{first['label']} is most often taken for {first['prediction']}",
            f"{first['images']} of {per_class[first['label']]} images ({100 * first['share']:.0f}%), {total} errors in "
            f"all; next: {', '.join(_pair(one) for one in wrong[1:4]) or 'none'}",
            "see the worst errors for what the network took for the difference; more such images of both classes help "
            "most",
            tuple(wrong[:50]),
        )


def _pair(one: Mapping[str, Any]) -> str:
    return f"{one['label']} for {one['prediction']} ({one['images']})"


def reasons(
    folder: Path, net: Network, source: Source, plan: Plan, wrong: Sequence[Mapping[str, Any]]
) -> Iterator[Finding]:  # fmt: skip
    """Why this and not that, for the worst errors; and which errors have the same reason."""
    number = {name: i for i, name in reversed(list(enumerate(plan.classes)))}
    rows = {one["image"]: one for one in wrong}
    shown = {one["image"] for one in wrong[:GALLERY]}
    maps: dict[int, np.ndarray] = {}
    tiles: dict[int, list[Image.Image]] = {}
    method = ""
    for part in _together(source, net, sorted(rows)):
        pairs = [(number[rows[s.index]["prediction"]], number[rows[s.index]["label"]]) for s in part]
        try:
            saliency = _why(net, part, pairs)
        except errors.InnersightError as error:
            yield Finding(
                "worst errors", f"the {len(shown)} worst of {len(wrong)} errors, without their reasons", str(error),
                "look at the pictures themselves", tuple(wrong[:GALLERY]),
            )  # fmt: skip
            return
        method = saliency.provenance.method or ""
        for i, sample in enumerate(part):
            maps[sample.index] = _small(saliency.values[i])
        overlays = saliency.overlay()
        for i, sample in enumerate(part):
            tiles[sample.index] = [_tile(saliency.pictures[i].display()), _tile(overlays[i])]
    there = [one for one in wrong if one["image"] in maps]
    if not there:
        return
    gallery = [one for one in there if one["image"] in shown]
    picture = _sheet(folder, "worst-errors", [(tiles[one["image"]], _caption(one)) for one in gallery])
    first = gallery[0]
    yield Finding(
        "worst errors",
        f"{first['name']} is {first['label']} and was taken for {first['prediction']}, with {first['confidence']:.3f}",
        f"the surest of {len(wrong)}{' or more' if len(wrong) == CLUSTERED else ''} errors; the gallery shows "
        f"{len(gallery)}, each with its {method} map of why the prediction and not the label",
        "look whether the label is right, whether the thing is in the picture, and whether the map is on it",
        tuple(gallery), picture,
    )  # fmt: skip
    yield from same_reason(folder, there, maps, tiles)


def _together(source: Source, net: Network, numbers: Sequence[int]) -> Iterator[list[Sample]]:
    """The samples that can be read, some at a time, those of one size."""
    part: list[Sample] = []
    for sample in source.samples(numbers, net.preprocess, net.input_shape):
        if sample.values is None:
            continue
        if part and (len(part) == _TOGETHER or part[0].values.shape != sample.values.shape):  # type: ignore[union-attr]
            yield part
            part = []
        part.append(sample)
    if part:
        yield part


def _why(net: Network, part: Sequence[Sample], pairs: Sequence[tuple[int, int]]) -> Saliency:
    """The saliency of the first class of each pair and not the second."""
    import torch

    pictures: list[Any] = [s.picture for s in part]
    inputs = images.Inputs(net._to_model(torch.cat([s.values for s in part])), pictures)  # type: ignore[misc]
    target = targets.difference([a for a, _ in pairs], [b for _, b in pairs])
    try:
        return net.explain(inputs, method="layercam", target=target)
    except errors.Unsupported:  # no layer with a grid
        return net.explain(inputs, method="gradient_x_input", target=target)


def _small(values: np.ndarray) -> np.ndarray:
    """(_GRID ** 2,) of a map (H, W), means of its blocks; of length one."""
    image = Image.fromarray(values.astype(np.float32))
    small = np.asarray(image.resize((_GRID, _GRID), Image.Resampling.BOX), np.float64).ravel()
    length = np.linalg.norm(small)
    return small / length if length > 0 and np.isfinite(length) else np.zeros_like(small)


def same_reason(
    folder: Path, wrong: Sequence[Mapping[str, Any]], maps: Mapping[int, np.ndarray], tiles: Mapping[int, list]
) -> Iterator[Finding]:  # fmt: skip
    """Clusters of errors whose maps are alike: spectral clustering as in SpRAy (Lapuschkin et al., 2019)."""
    rows = [one for one in wrong if maps[one["image"]].any()]
    points = np.stack([maps[one["image"]] for one in rows]) if rows else np.zeros((0, 1))
    groups = clusters(points)
    if groups is None:
        return
    inside, between = _closeness(points, groups)
    for k in sorted(set(groups.tolist()), key=lambda k: -(groups == k).sum()):
        members = [one for one, g in zip(rows, groups, strict=True) if g == k]
        mean = points[groups == k].mean(0).reshape(_GRID, _GRID)
        where = _where(mean)
        picture = _sheet(
            folder, f"reason-{k}", [(tiles[one["image"]], _caption(one)) for one in members[:GALLERY]]
        )  # fmt: skip
        labels, predictions = ({m[n] for m in members} for n in ("label", "prediction"))
        as_what = f"taken for {_few(predictions)}" if len(predictions) < len(labels) else f"of {_few(labels)}"
        yield Finding(
            "errors with one reason",
            f"{len(members)} errors, {as_what}, have one reason in common: {where}",
            f"of the saliency maps of {len(rows)} errors, these are alike (mean cosine {inside[k]:.2f}, "
            f"{between:.2f} between clusters)",
            "if nothing of the class is there, it is a shortcut (a mark, a border, a background): cover it and see "
            "whether the answer changes, then collect images without it",
            tuple(members), picture,
        )  # fmt: skip


def clusters(points: np.ndarray) -> np.ndarray | None:
    """(n,) the cluster of each map, None if there are none to tell apart.

    As many as the largest gap between the eigenvalues of the graph of neighbours says (von Luxburg, 2007), from 2 to 8;
    none where points are no closer inside of clusters than between them (silhouette below 0.2).
    """
    if len(points) < 12:
        return None
    cluster = errors.need("sklearn.cluster", "scan", "clustering the errors of a scan")
    metrics = errors.need("sklearn.metrics", "scan", "clustering the errors of a scan")
    cosine = np.clip(points @ points.T, -1, 1)
    near = max(3, round(np.log2(len(points)) * 2))
    ranks = np.argsort(np.argsort(-cosine, axis=1, kind="stable"), axis=1, kind="stable")
    graph = np.where((ranks <= near) | (near >= ranks.T), (1 + cosine) / 2, 0)
    scale = 1 / np.sqrt(graph.sum(1))
    eigenvalues, vectors = np.linalg.eigh(np.eye(len(graph)) - scale[:, None] * graph * scale)
    gaps = np.diff(eigenvalues[: min(9, len(points) // 3) + 1])
    count = int(gaps[1:].argmax()) + 2
    rows = vectors[:, :count] / np.maximum(np.linalg.norm(vectors[:, :count], axis=1, keepdims=True), 1e-12)
    found = cluster.KMeans(count, n_init=10, random_state=0).fit_predict(rows)  # Ng, Jordan and Weiss, 2002
    if len(set(found.tolist())) < 2:
        return None
    distance = 1 - cosine
    np.fill_diagonal(distance, 0)
    return found if metrics.silhouette_score(distance, found, metric="precomputed") >= 0.2 else None


def _closeness(points: np.ndarray, groups: np.ndarray) -> tuple[dict[int, float], float]:
    cosine = points @ points.T
    same = groups[:, None] == groups[None]
    inside = {int(k): float(cosine[np.ix_(groups == k, groups == k)].mean()) for k in set(groups.tolist())}
    return inside, float(cosine[~same].mean())


def _where(mean: np.ndarray) -> str:
    """In which part of the picture the map lies."""
    strength = np.maximum(mean, 0) if (mean > 0).any() else np.abs(mean)
    share = strength / strength.sum()
    along = (np.arange(_GRID) + 0.5) / _GRID
    y, x = float((share.sum(1) * along).sum()), float((share.sum(0) * along).sum())
    rows = "the top" if y < 0.4 else "the bottom" if y > 0.6 else "the middle"
    columns = "left" if x < 0.4 else "right" if x > 0.6 else ""
    top = np.sort(share.ravel())[::-1]
    cells = int((np.cumsum(top) < 0.5).sum()) + 1
    place = f"{rows} {columns}".strip() if rows != "the middle" or columns else "the middle"
    return f"{place} of the picture, half of the evidence in {100 * cells / _GRID**2:.0f}% of it"


def _few(names: set[str]) -> str:
    names_ = sorted(names)
    return ", ".join(names_[:3]) + (f" and {len(names_) - 3} more" if len(names_) > 3 else "")


# --- images unlike the rest ------------------------------------------------------------------------------------------


def unlike(folder: Path, net: Network, source: Source, plan: Plan) -> Iterator[Finding]:
    """Images whose embedding is far from that of all others of their predicted class."""
    if not plan.embedding or not plan.predicts:
        return
    distance = distances(folder)
    if len(distance) < 20:
        return
    middle = np.median(distance)
    spread = 1.4826 * np.median(np.abs(distance - middle))
    if spread <= 0:
        return
    score = (distance - middle) / spread
    far = [int(i) for i in np.argsort(-score, kind="stable")[:GALLERY] if score[i] > UNLIKE]
    if not far:
        return
    items = [{**row, "deviations": float(score[i])} for i, row in zip(far, _rows_at(folder, far), strict=True)]
    by_number = {one["image"]: one for one in items}
    tiles = {
        s.index: [_tile(s.picture.display())]
        for s in source.samples(sorted(by_number), net.preprocess, net.input_shape)
        if s.picture is not None
    }
    shown = [one for one in items if one["image"] in tiles]
    captions = [(one["name"], f"{one['deviations']:.0f} deviations") for one in shown]
    picture = _sheet(folder, "unlike", [(tiles[one["image"]], c) for one, c in zip(shown, captions, strict=True)])
    count = int((score > UNLIKE).sum())
    yield Finding(
        "unlike the rest",
        f"{_many(count, 'image')} unlike the rest of what the network takes them for, first {items[0]['name']}",
        f"their embeddings ({plan.embedding}) are more than {UNLIKE:g} robust standard deviations further from the "
        "mean of their predicted class than the median image's (Mahalanobis distance)",
        "look whether they belong into the data set at all; a network's confidence means little on them",
        tuple(items), picture,
    )  # fmt: skip


def _rows_at(folder: Path, places: Sequence[int]) -> list[dict[str, Any]]:
    """These rows of the table of images, of which a few are in memory at a time."""
    import pyarrow.parquet as parquet

    kept: dict[int, dict[str, Any]] = {}
    start = 0
    columns = ["image", "name", "label", "prediction", "confidence"]
    for batch in parquet.ParquetFile(folder / "images.parquet").iter_batches(4096, columns=columns):
        here = [i for i in places if start <= i < start + batch.num_rows]
        kept.update(zip(here, batch.take([i - start for i in here]).to_pylist() if here else [], strict=True))
        start += batch.num_rows
    return [kept[i] for i in places]


def distances(folder: Path) -> np.ndarray:
    """Each row's distance (N,) from the mean of its predicted class.

    By the covariance inside of classes, shrunk by a tenth towards its diagonal. Two passes over the embeddings, 4,096
    of them in memory at a time.
    """
    import pyarrow.parquet as parquet
    from safetensors import safe_open

    columns = parquet.read_table(folder / "images.parquet", columns=["prediction"])
    names = columns["prediction"].to_pylist()
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    of = np.array([number[n] for n in names], np.int64)
    with safe_open(folder / "embeddings.safetensors", framework="numpy") as file:
        tensor = file.get_slice("embedding")
        width = tensor.get_shape()[1]
        parts = [slice(i, min(i + 4096, len(of))) for i in range(0, len(of), 4096)]
        total, square = np.zeros((len(number), width)), np.zeros((width, width))
        for part in parts:
            e = np.nan_to_num(tensor[part].astype(np.float64))
            np.add.at(total, of[part], e)
            square += e.T @ e
        count = np.bincount(of, minlength=len(number))[:, None]
        mean = total / np.maximum(count, 1)
        within = (square - (mean * count).T @ mean) / max(len(of), 1)
        shrunk = (
            0.9 * within + 0.1 * np.diag(np.diag(within)) + 1e-6 * np.eye(width) * max(np.trace(within) / width, 1e-12)
        )
        inverse = np.linalg.inv(shrunk)
        found = np.empty(len(of))
        for part in parts:
            d = np.nan_to_num(tensor[part].astype(np.float64)) - mean[of[part]]
            found[part] = np.sqrt(np.maximum(np.einsum("ij,jk,ik->i", d, inverse, d, optimize=True), 0))
    return found


# --- galleries -------------------------------------------------------------------------------------------------------


def _tile(picture: Image.Image) -> Image.Image:
    scale = _SIDE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX
    tile = Image.new("RGB", (_SIDE, _SIDE), (128, 128, 128))
    tile.paste(picture.convert("RGB").resize(size, how), ((_SIDE - size[0]) // 2, (_SIDE - size[1]) // 2))
    return tile


def _caption(one: Mapping[str, Any]) -> tuple[str, str]:
    return str(one["name"]), f"{one['label']} as {one['prediction']} {one['confidence']:.2f}"


def _sheet(folder: Path, name: str, entries: Sequence[tuple[Sequence[Image.Image], tuple[str, str]]]) -> str:
    """Pictures side by side, two lines of text below each group, as a JPEG; where it is."""
    if not entries:
        return ""
    gap, text = 4, 28
    wide = len(entries[0][0]) * _SIDE
    columns = max(1, min(len(entries), 768 // wide))
    rows = -(-len(entries) // columns)
    size = columns * (wide + gap) - gap, rows * (_SIDE + text + gap) - gap
    sheet = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for i, (pictures, lines) in enumerate(entries):
        x, y = (i % columns) * (wide + gap), (i // columns) * (_SIDE + text + gap)
        for k, picture in enumerate(pictures):
            sheet.paste(picture, (x + k * _SIDE, y))
        for k, line in enumerate(lines):
            most = wide // 6
            cut = line if len(line) <= most else f"...{line[3 - most :]}"
            draw.text((x, y + _SIDE + 2 + 12 * k), cut.encode("latin-1", "replace").decode("latin-1"), fill=(0, 0, 0))
    data = io.BytesIO()
    sheet.save(data, "JPEG", quality=90, subsampling=0)
    with store.plain_errors(folder):
        storage.write_whole(folder / "findings" / f"{name}.jpg", lambda file: file.write(data.getvalue()))
    return f"findings/{name}.jpg"
