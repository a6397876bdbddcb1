"""What was measured, drawn: the demo's pictures."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from innersight.demo import words
from innersight.demo.study import CLASSES, FEEDS, SHOWN, first_right
from innersight.draw import color, plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from innersight.demo.study import Progress, Study
    from innersight.network import Network
    from innersight.results import FeatureMaps, Saliency


def draw(net: Network, study: Study, say: Progress) -> dict[str, bytes]:
    """The PNG files by name."""
    digit = study.reading.labels[study.example]
    caption = f"{words.a(digit)} (held-out image {study.example})"
    maps = replace(study.maps, pictures=[replace(p, name=caption) for p in study.maps.pictures])
    drawings: dict[str, Callable[[], Figure]] = {
        "confusion": partial(_draw_confusion, study),
        "maps_conv1": partial(_draw_maps, maps, "conv1", columns=4),
        "maps_eight": partial(_draw_maps, maps, "relu", columns=4, limit=8, order="activation"),
        **{f"maps_{layer}": partial(_draw_maps, maps, layer, columns=columns) for layer, columns in SHOWN.items()},
        **{f"removed_{FEEDS[layer]}": partial(_draw_removed, study, layer) for layer in study.dependence},
        "firing": partial(_draw_firing, study),
        "saliency_right": partial(_draw_right, net, study),
        "saliency_worst": partial(_draw_worst, study),
    }
    files = {"example.png": _example(study)}
    for i, (name, figure) in enumerate(drawings.items()):
        say("pictures", i, len(drawings), f"{name}.png")
        files[f"{name}.png"] = plots.png(figure())
    say("pictures", len(drawings), len(drawings), "")
    return files


def _example(study: Study) -> bytes:
    """The example digit as a picture file, to try the commands on."""
    from PIL import Image

    pixels = np.rint(255 * study.digits.test_images[study.example, 0].numpy()).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _draw_maps(maps: FeatureMaps, layer: str, **options: Any) -> Figure:
    figure = maps.plot(layer, **options).figure
    assert figure is not None
    return figure


def _draw_confusion(study: Study) -> Figure:
    counts = study.reading.confusion
    diagonal = np.eye(CLASSES, dtype=bool)
    digits = [str(k) for k in range(CLASSES)]
    table = plots.Table(
        "mistakes in color, right answers in gray",
        np.where(diagonal, 0, counts), [[f"{n:,}" if n else "" for n in row] for row in counts], digits, digits,
        color.Scale(0, max(1, int(counts[~diagonal].max())), False, 0, int(counts[~diagonal].max())),
        across="read as", down="true digit", muted=diagonal, colors="OrRd",
    )  # fmt: skip
    right, count = int(study.reading.right.sum()), len(study.reading.labels)
    notes = [f"{right:,} of {count:,} held-out images right", f"{count - right:,} mistakes"]
    return plots.tables([table], title="Which digits are read as which", notes=notes)


def _draw_removed(study: Study, layer: str) -> Figure:
    found, name = study.dependence[layer], FEEDS[layer]
    channels, digits = [str(c) for c in range(found.change.shape[1])], [str(k) for k in range(CLASSES)]
    shared: dict[str, Any] = {"rows": digits, "columns": channels, "across": f"channel of {name} that is removed"}
    points = 100 * found.loss
    parts = [
        plots.Table(
            "mean change of the digit's own score (logit): blue, the digit loses by the removal",
            found.change, [[words.signed(v, 1) for v in row] for row in found.change],
            scale=color.scale(found.change, signed=True), down="digit", **shared,
        ),
        plots.Table(
            f"change of its accuracy in percentage points (one image: {100 / found.images.max():.0f}); empty: none",
            points, [[words.signed(v, 0) for v in row] for row in points],
            scale=color.scale(points, signed=True), down="digit", **shared,
        ),
    ]  # fmt: skip
    notes = [
        f"set to zero after the ReLU (layer {layer}), one at a time",
        f"{words.which(study)} a digit",
        "each table on its own scale: ± the 99.5th percentile of |value|",
    ]
    return plots.tables(parts, title=f"What each digit loses without a channel of {name}", notes=notes)


def _draw_firing(study: Study) -> Figure:
    parts = []
    for layer in ("relu", "relu_1"):
        firing = study.firing[layer]
        mean = (firing.cells * np.bincount(study.reading.labels, minlength=CLASSES)[:, None]).sum(0) / firing.count
        values = 100 * np.concatenate([firing.cells, mean[None]])
        parts.append(
            plots.Table(
                f"{FEEDS[layer]}: in percent of a map's {'24x24' if layer == 'relu' else '8x8'} cells",
                values, [["0" if v == 0 else f"{v:.0f}" if v >= 1 else "<1" for v in row] for row in values],
                [*(str(k) for k in range(CLASSES)), "all"], [str(c) for c in range(firing.channels)],
                color.Scale(0, 100, False, 0, 100), across="channel", down="digit", colors="YlGnBu",
            )
        )  # fmt: skip
    notes = [
        f"mean over all {study.firing['relu'].count:,} held-out images",
        "a cell fires where the ReLU lets it pass",
    ]
    return plots.tables(parts, title="How much of each channel's map fires, by digit", notes=notes)


def _caption(true: int, predicted: int, probability: float) -> str:
    return f"{words.a(true)}, read as {predicted} ({words.percent(probability)})"


def _panels(saliency: Saliency, captions: Sequence[str]) -> list[plots.Panel]:
    overlays = saliency.overlay()
    return [plots.Panel(text, np.asarray(overlays[i]), saliency.scale(i)) for i, text in enumerate(captions)]


def _plain(saliency: Saliency, captions: Sequence[str]) -> list[plots.Panel]:
    pictures = [np.asarray(p.display().convert("RGB")) for p in saliency.pictures]
    return [plots.Panel(text, pixels) for text, pixels in zip(captions, pictures, strict=True)]


_CAM_NOTE = "Grad-CAM (conv2): each of its 8x8 values at the middle of the 14x14 pixels that it sees"
_SCALE_NOTE = "color and opacity: 0 to the 99.5th percentile, each map on its own scale"


def _draw_right(net: Network, study: Study) -> Figure:
    """The first image of each digit that is read right: the picture, and under it two maps."""
    reading = study.reading
    chosen = sorted({first_right(reading, k) for k in range(CLASSES)}, key=lambda i: reading.labels[i])
    found = net.explain(study.digits.test_images[chosen], ["gradient", "gradcam"])
    captions = [_caption(reading.labels[i], reading.predicted[i], reading.confidence[i]) for i in chosen]
    answers = [reading.predicted[i] for i in chosen]
    kinds = [
        _plain(found["gradient"], captions),
        _panels(found["gradient"], [f"gradient for {p}" for p in answers]),
        _panels(found["gradcam"], [f"Grad-CAM for {p}" for p in answers]),
    ]
    half = math.ceil(len(chosen) / 2)
    rows = [kind[part] for part in (slice(0, half), slice(half, None)) for kind in kinds if kind[part]]
    title = "What drives the answer where it is right"
    return plots.saliency(rows, title=title, notes=[_SCALE_NOTE, _CAM_NOTE])


def _draw_worst(study: Study) -> Figure:
    looks = study.looks
    columns = [
        _plain(
            study.saliency["gradient"],
            [f"{i}: {_caption(k.true, k.predicted, k.probability)}" for i, k in enumerate(looks, 1)],
        ),
        _panels(study.saliency["gradient"], [f"gradient for {k.predicted}" for k in looks]),
        _panels(study.saliency["gradcam"], [f"Grad-CAM for {k.predicted}" for k in looks]),
        _panels(study.saliency["contrast"], [f"Grad-CAM: why {k.predicted} and not {k.rival}" for k in looks]),
    ]
    return plots.saliency(
        list(zip(*columns, strict=True)), title=words.worst_title(study), notes=[_SCALE_NOTE, _CAM_NOTE]
    )
