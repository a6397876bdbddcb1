"""What the demo measures: how the digits are read, what fires, what each digit depends on, what mistakes looked at."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from innersight import __version__, results

if TYPE_CHECKING:
    import torch

    from innersight.data import Digits
    from innersight.network import Network
    from innersight.results import FeatureMaps, Saliency

Progress = Callable[[str, int, int, str], None]
ARCH = "innersight.data.small_cnn:SimpleCNN"
CLASSES = 10
FEEDS = {"relu": "conv1", "relu_1": "conv2", "relu_2": "fc1", "relu_3": "fc2"}  # each ReLU, and whose output it takes
SHOWN = {"relu": 4, "pool": 4, "relu_1": 8, "pool_1": 8}  # layers whose maps are drawn, in so many columns
MOST_REMOVED = 100  # images a class whose channels are removed one by one; of all that are held out, the first
WORST = 5  # mistakes that are looked at
SELDOM = 0.01  # a channel that fires in fewer of the images "nearly never" does
SURE = 0.9  # answers below this probability are called unsure
HALF = 0.6  # the share of the evidence from which a half of the picture is named
INK = 0.5  # a pixel above this is ink


@dataclass(frozen=True)
class Reading:
    """How the held-out images are read.

    confusion: (10, 10), how often class `row` is read as `column`
    interval:  of the accuracy, 95% (Wilson, 1927): what other images of the same kind might give
    unsure:    (N,), which answers have a probability below SURE
    """

    labels: np.ndarray = field(repr=False)
    predicted: np.ndarray = field(repr=False)
    probabilities: np.ndarray = field(repr=False)  # (N, 10)

    @property
    def right(self) -> np.ndarray:
        return self.labels == self.predicted

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())

    @property
    def confidence(self) -> np.ndarray:
        return self.probabilities.max(1)

    @property
    def confusion(self) -> np.ndarray:
        counts = np.zeros((CLASSES, CLASSES), int)
        np.add.at(counts, (self.labels, self.predicted), 1)
        return counts

    @property
    def pairs(self) -> list[tuple[int, int, int]]:
        """(true, read as, how often) of all that were confused, the most frequent first."""
        counts = self.confusion
        wrong = [(t, p, int(counts[t, p])) for t, p in np.argwhere(counts).tolist() if t != p]
        return sorted(wrong, key=lambda pair: (-pair[2], pair))

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(int(self.right.sum()), len(self.labels))

    @property
    def unsure(self) -> np.ndarray:
        return self.confidence < SURE


@dataclass(frozen=True)
class Firing:
    """How often the channels of a layer are above zero.

    images: (C,), in how many images somewhere; peak: (C,), the largest value in any
    cells:  (10, C), the share of a channel's cells, mean over the images of each class
    """

    layer: str
    count: int
    images: np.ndarray
    peak: np.ndarray
    cells: np.ndarray

    @property
    def channels(self) -> int:
        return len(self.images)

    @property
    def never(self) -> list[int]:
        return np.flatnonzero(self.images == 0).tolist()

    @property
    def seldom(self) -> list[int]:
        return np.flatnonzero((self.images > 0) & (self.images < SELDOM * self.count)).tolist()


@dataclass(frozen=True)
class Dependence:
    """What each class loses when a channel of a layer is removed (set to zero), each alone: exact, by running it so.

    score:    (10,), the mean logit of the class over its images; change: (10, C), by how much it moves
    accuracy: (10,), the share of its images that are read right; loss: (10, C), by how much that moves
    images:   (10,), of how many images
    """

    layer: str
    images: np.ndarray
    score: np.ndarray
    change: np.ndarray
    accuracy: np.ndarray
    loss: np.ndarray

    def strongest(self, k: int) -> int | None:
        """The channel without which the score of class `k` falls most; None if it falls without none of them."""
        channel = int(self.change[k].argmin())
        return channel if self.change[k, channel] < 0 else None


@dataclass(frozen=True)
class Place:
    """Where most of a map lies: `share` of it in the `box` (top, left, bottom, right) that `words` names."""

    words: str
    share: float
    box: tuple[int, int, int, int] | None

    def __str__(self) -> str:
        if self.box is None:
            return f"no half of the picture holds {HALF:.0%} of it"
        return f"{self.share:.0%} of it lies in the {self.words}"


@dataclass(frozen=True)
class Look:
    """A picture that was read wrong (or, if none was, with the least confidence), and what the network looked at.

    index:   among the held-out images
    rival:   what it is told from: the label of a mistake, the second answer otherwise
    cam:     where the evidence for the answer lies; contrast: that for the answer and against the rival
    ink:     the share of the gradient's mass on ink; covered: the share of the picture that is ink
    painted: by how much the answer's score falls when the half or quarter that `cam` names is painted over as paper;
             opposite: by how much when the opposite one is; instead: the answer then, and its probability
    """

    index: int
    true: int
    predicted: int
    rival: int
    probability: float
    probability_true: float
    cam: Place
    contrast: Place
    ink: float
    covered: float
    painted: float | None
    opposite: float | None
    instead: tuple[int, float] | None

    @property
    def borne_out(self) -> bool:
        """Whether the score loses by the part that the map names, and more than by its opposite."""
        return self.painted is not None and self.opposite is not None and self.painted > max(self.opposite, 0)


@dataclass(frozen=True)
class Study:
    """All that was measured, and the pictures that belong to it."""

    digits: Digits
    epochs: int
    seed: int
    reading: Reading
    firing: dict[str, Firing]
    paper: list[int]  # channels of conv1 that fire on an empty picture
    dependence: dict[str, Dependence]
    looks: list[Look]
    ink: tuple[float, float]  # for images read right: mean share of the gradient on ink, and share covered by ink
    example: int
    maps: FeatureMaps  # of the example
    saliency: Mapping[str, Saliency]  # "gradient", "gradcam" and "contrast" of the looks


def measure(net: Network, digits: Digits, epochs: int, seed: int, say: Progress) -> Study:
    import torch

    images, labels = digits.test_images, digits.test_labels.numpy()
    answers = net.predict(images)
    reading = Reading(labels, answers.classes, answers.probabilities)
    chosen = [np.flatnonzero(labels == k)[:MOST_REMOVED] for k in range(CLASSES)]
    steps = 2 * CLASSES + 1
    say("channels", 0, steps, "which channels fire")
    firing = _firing(net, images, labels)
    dependence = {}
    for i, layer in enumerate(("relu", "relu_1")):

        def removing(k: int, layer: str = layer, i: int = i) -> None:
            say("channels", 1 + i * CLASSES + k, steps, f"{FEEDS[layer]} without each of its channels, digit {k}")

        dependence[layer] = _dependence(net, images, layer, chosen, removing)
    say("channels", steps, steps, "")
    say("mistakes", 0, 1, "what it looked at")
    looks, saliency = _looks(net, images, reading)
    right = np.concatenate([c[reading.right[c]] for c in chosen])
    gradient = net.explain(images[right], "gradient").values if len(right) else np.zeros((0, 28, 28), np.float32)
    paper = net.maps(torch.zeros(1, *images.shape[1:]), "relu")["relu"][0]
    say("mistakes", 1, 1, "")
    example = first_right(reading, 2)
    maps = net.maps(images[[example]], ["conv1", *SHOWN])
    return Study(
        digits, epochs, seed, reading, firing,
        paper=np.flatnonzero((paper > 0).any((1, 2))).tolist(),
        dependence=dependence, looks=looks,
        ink=_ink(gradient, images[right, 0].numpy()),
        example=example, maps=maps, saliency=saliency,
    )  # fmt: skip


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95% interval of a share of which `right` of `count` were seen (E. B. Wilson, JASA 1927).

    >>> [round(v, 3) for v in wilson(351, 355)]
    [0.971, 0.996]
    """
    z, share = 1.959964, right / count
    middle = share + z * z / (2 * count)
    reach = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, (middle - reach) / (1 + z * z / count)), min(1.0, (middle + reach) / (1 + z * z / count))


def first_right(reading: Reading, k: int) -> int:
    """The first image of class `k` that is read right; failing that, the first that is; failing that, the first."""
    for found in (reading.right & (reading.labels == k), reading.right):
        if found.any():
            return int(found.argmax())
    return 0


def _firing(net: Network, images: torch.Tensor, labels: np.ndarray) -> dict[str, Firing]:
    """Over all images, a thousand at a time."""
    totals: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(images), 1000):
        part = labels[start : start + 1000]
        for layer, values in net.maps(images[start : start + 1000], list(FEEDS)).items():
            values = values.reshape(*values.shape[:2], -1)  # (n, C, cells)
            share = (values > 0).mean(2, dtype=np.float64)
            cells = np.stack([share[part == k].sum(0) for k in range(CLASSES)])
            found = [(share > 0).sum(0), values.max((0, 2)), cells]
            before = totals.get(layer, [np.zeros_like(v) for v in found])
            totals[layer] = [before[0] + found[0], np.maximum(before[1], found[1]), before[2] + found[2]]
    each = np.bincount(labels, minlength=CLASSES)[:, None]
    return {
        layer: Firing(layer, len(images), fired, peak, cells / np.maximum(each, 1))
        for layer, (fired, peak, cells) in totals.items()
    }


def _dependence(
    net: Network, images: torch.Tensor, layer: str, chosen: Sequence[np.ndarray], removing: Callable[[int], None]
) -> Dependence:
    """Of each class the images of those indices."""
    rows = []
    for k, indices in enumerate(chosen):
        removing(k)
        score = net.sensitivity(images[indices], layer, target=k)
        right = net.sensitivity(images[indices], layer, target=_read_as(k))
        rows.append([r.mean(0, dtype=np.float64) for r in (score.scores, score.values, right.scores, right.values)])
    columns = (np.stack(column) for column in zip(*rows, strict=True))
    return Dependence(layer, np.array([len(indices) for indices in chosen]), *columns)


def _read_as(k: int) -> Any:
    """A target that is 1 where the answer is class `k` and 0 elsewhere: its mean is an accuracy."""
    from innersight import targets

    def score(_raw: Any, main: torch.Tensor, _part: Sequence[int]) -> torch.Tensor:
        return (main.argmax(1) == k).float()

    return targets.Target(score, lambda main, _part: [f"read as {k}"] * main.shape[0])


def _looks(net: Network, images: torch.Tensor, reading: Reading) -> tuple[list[Look], dict[str, Saliency]]:
    """The worst mistakes, the most confident first; without any, the least confident of the right answers."""
    from innersight import targets

    wrong = np.flatnonzero(~reading.right)
    if len(wrong):
        worst = wrong[np.argsort(-reading.confidence[wrong], kind="stable")][:WORST]
    else:
        worst = np.argsort(reading.confidence, kind="stable")[:WORST]
    second = np.argsort(-reading.probabilities[worst], axis=1, kind="stable")[:, 1]
    predicted, true = reading.predicted[worst], reading.labels[worst]
    rival = np.where(predicted == true, second, true)
    x = images[worst]
    found = dict(net.explain(x, ["gradient", "gradcam"], target=predicted.tolist()))
    found["contrast"] = net.explain(x, "gradcam", target=targets.difference(predicted.tolist(), rival.tolist()))
    looks = []
    for i, index in enumerate(worst.tolist()):
        cam = place(found["gradcam"].values[i])
        share, covered = _ink(found["gradient"].values[i : i + 1], x[i].numpy())
        painted, opposite, instead = _painted(net, x[i], int(predicted[i]), cam)
        probability = reading.probabilities[index]
        looks.append(
            Look(
                index, int(true[i]), int(predicted[i]), int(rival[i]),
                float(probability[predicted[i]]), float(probability[true[i]]),
                cam, place(found["contrast"].values[i]), share, covered, painted, opposite, instead,
            )
        )  # fmt: skip
    return looks, found


def place(values: np.ndarray) -> Place:
    """In which half or quarter of the picture most of a map (H, W) without negative values lies.

    >>> corner = np.zeros((4, 4)); corner[0, 3] = 1
    >>> print(place(corner))
    100% of it lies in the upper right quarter
    """
    height, width = values.shape
    total = float(values.sum(dtype=np.float64))
    if total <= 0:
        return Place("", 0.0, None)
    upper = float(values[: height // 2].sum(dtype=np.float64)) / total
    left = float(values[:, : width // 2].sum(dtype=np.float64)) / total
    words, box = [], [0, 0, height, width]
    if max(upper, 1 - upper) >= HALF:
        words.append("upper" if upper >= HALF else "lower")
        box[2 if upper >= HALF else 0] = height // 2
    if max(left, 1 - left) >= HALF:
        words.append("left" if left >= HALF else "right")
        box[3 if left >= HALF else 1] = width // 2
    if not words:
        return Place("", max(upper, 1 - upper, left, 1 - left), None)
    top, start, bottom, end = box
    share = float(values[top:bottom, start:end].sum(dtype=np.float64)) / total
    return Place(" ".join([*words, "quarter" if len(words) == 2 else "half"]), share, (top, start, bottom, end))


def _ink(saliency: np.ndarray, pictures: np.ndarray) -> tuple[float, float]:
    """The share of maps (N, H, W) that lies on ink, and the share of the pictures (N, H, W) that is ink; means."""
    if not len(saliency):
        return 0.0, 0.0
    ink = pictures > INK
    total = np.maximum(saliency.sum((1, 2), dtype=np.float64), 1e-30)
    return float(((saliency * ink).sum((1, 2), dtype=np.float64) / total).mean()), float(ink.mean())


def _painted(
    net: Network, picture: torch.Tensor, predicted: int, cam: Place
) -> tuple[float | None, float | None, tuple[int, float] | None]:
    """Is it true? What the score of the answer loses without the part that the map names, and without its opposite."""
    import torch

    if cam.box is None:
        return None, None, None
    height, width = picture.shape[1:]
    top, left, bottom, right = cam.box
    three = torch.stack([picture] * 3)
    three[1, :, top:bottom, left:right] = 0
    three[2, :, height - bottom : height - top, width - right : width - left] = 0
    answer = net.predict(three)
    score = answer.logits[:, predicted].astype(float)
    instead = int(answer.classes[1])
    return score[0] - score[1], score[0] - score[2], (instead, float(answer.probabilities[1, instead]))


def numbers(study: Study, findings: Sequence[str]) -> bytes:
    """findings.json: the numbers behind the words, and the words."""
    reading = study.reading
    record = {
        "innersight": __version__,
        "data": study.digits.note,
        "name": study.digits.name,
        "network": ARCH,
        "seed": study.seed,
        "epochs": study.epochs,
        "accuracy": reading.accuracy,
        "right": int(reading.right.sum()),
        "held_out": len(reading.labels),
        "interval_95": reading.interval,
        "confusion": reading.confusion,  # rows: the true digit, columns: the answer
        "confused": [{"true": t, "read_as": p, "times": n} for t, p, n in reading.pairs],
        "unsure": {
            "below": SURE,
            "answers": int(reading.unsure.sum()),
            "mistakes": int((reading.unsure & ~reading.right).sum()),
        },
        "firing": {
            layer: {
                "after": FEEDS[layer],
                "never": f.never,
                "nearly_never": f.seldom,
                "images": f.images,
                "largest": f.peak,
                "share_of_cells_by_digit": f.cells,
            }
            for layer, f in study.firing.items()
        },
        "fire_on_paper": study.paper,
        "removed": {
            layer: {
                "after": FEEDS[layer],
                "images_by_digit": d.images,
                "score": d.score,
                "change_of_score": d.change,
                "accuracy": d.accuracy,
                "change_of_accuracy": d.loss,
                "depends_most_on": [d.strongest(k) for k in range(CLASSES)],
            }
            for layer, d in study.dependence.items()
        },
        "gradient_on_ink": {"share": study.ink[0], "picture": study.ink[1]},
        "looks": study.looks,
        "findings": findings,
    }
    text = json.dumps(_short(results.jsonable(record)), indent=1, ensure_ascii=False)
    text = re.sub(r"\[[^][{}\"]*\]", lambda row: " ".join(row[0].split()), text)  # a row of numbers on a line
    return f"{text}\n".encode()


def _short(value: Any) -> Any:
    """Six digits of each number: what float32 knows, and easier to read."""
    if isinstance(value, dict):
        return {k: _short(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_short(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
