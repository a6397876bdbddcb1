"""The first five minutes: train the tutorial's small network on real digits, look inside, and say what is there.

`run` is what `innersight demo` does. Its claims are measured: channels are removed, not estimated to matter; what never
fires is counted over all held-out images; where a mistake was looked at is checked by painting that part over. They go
to findings.json as numbers, to the pictures, and in words to the page that shows both.
"""

from __future__ import annotations

import html
import io
import json
import math
import os
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

import innersight
from innersight import data as digit_sets
from innersight import errors, results
from innersight.draw import color, plots

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from innersight.data import Digits
    from innersight.data.small_cnn import SimpleCNN, TrainResult
    from innersight.network import Network
    from innersight.results import FeatureMaps, Saliency

Progress = Callable[[str, int, int, str], None]
STAGES = ("data", "train", "channels", "mistakes", "pictures")

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


def run(
    out: str | Path,
    data: str = "digits",
    root: str | Path | None = None,
    seed: int = 0,
    epochs: int | None = None,
    progress: Progress | None = None,
) -> DemoResult:
    """Train the small network, look inside, and write pictures, words, numbers and weights into the folder `out`.

    data:     "digits" (scikit-learn's, works offline) or "mnist"; `root` is the folder of the MNIST files
    epochs:   of training; None: 20 for the digits, 2 for MNIST
    progress: called as progress(stage, done, total, text): the stages are STAGES in this order, each begins with
              done=0 and ends with done=total; text says in a few words what is being done, it may be empty

    The folder is made if need be; files of an earlier demo are replaced, others stay. Everything is written at the end,
    each file whole, so that an interrupt leaves no half of it. The findings depend on the data, the seed and the epochs
    alone. Raises InputError where the folder cannot be written, the data not be read.
    """
    from innersight.data import small_cnn

    began = time.perf_counter()
    say: Progress = progress or (lambda *_: None)
    say("data", 0, 1, f"reading {data}")
    digits = digit_sets.load(data, root)
    say("data", 1, 1, digits.note)
    folder = _writable(out)
    with small_cnn.one_thread():  # sums in one order, so that the numbers are the same on any number of cores
        model, trained = _train(digits, seed, digits.epochs if epochs is None else epochs, say)
        net = innersight.open(
            model, preprocess=digits.preprocess, input_shape=(1, 28, 28), labels=[str(k) for k in range(CLASSES)]
        )
        study = _study(net, digits, len(trained.history), seed, say)
        files = _pictures(net, study, say)
        files["layers.txt"] = f"{net.layers}\n".encode()
    files["weights.safetensors"] = _weights(model, digits, trained.accuracy, seed)
    files["findings.json"] = _json(study)
    files["index.html"] = _page(study, net).encode()
    for name, content in files.items():
        results.write_whole(folder / name, partial(_put, content))
    return DemoResult(
        folder, digits.note, study.reading.accuracy, tuple(folder / name for name in files), tuple(study.findings),
        time.perf_counter() - began,
    )  # fmt: skip


def _put(content: bytes, file: IO[bytes]) -> None:
    file.write(content)


@dataclass(frozen=True)
class DemoResult:
    """What a demo came to.

    data:     which images it used, a sentence
    accuracy: the share of the held-out images that are read right
    files:    all it wrote; index.html shows the pictures with the words
    findings: what one learns, a sentence each; findings.json has the numbers
    seconds:  how long everything took
    """

    out: Path
    data: str
    accuracy: float
    files: tuple[Path, ...]
    findings: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As JSON knows it; the numbers behind the findings are in findings.json."""
        return {
            "data": self.data,
            "accuracy": self.accuracy,
            "findings": list(self.findings),
            "files": [str(f) for f in self.files],
            "next": self.commands,
            "seconds": round(self.seconds, 1),
        }

    @property
    def commands(self) -> list[str]:
        """What to try next with the weights that were written."""
        return _commands(self.out)

    def lines(self) -> list[str]:
        """What the command prints."""
        return [
            f"Data: {self.data}.",
            *(f"- {sentence}" for sentence in self.findings),
            f"{len(self.files)} files in {self.out} after {self.seconds:.0f} s; open {self.out / 'index.html'}",
            "Next:",
            *(f"  {command}" for command in self.commands),
        ]


def _commands(folder: Path) -> list[str]:
    weights, example = (shlex.quote(str(folder / name)) for name in ("weights.safetensors", "example.png"))
    maps, heat = (shlex.quote(str(folder / name)) for name in ("my_maps.png", "my_heat.png"))
    return [
        f"innersight layers {weights} --arch {ARCH}",
        f"innersight maps {weights} {example} --arch {ARCH} --layer conv1 --columns 4 --out {maps}",
        f"innersight explain {weights} {example} --arch {ARCH} --method gradient,gradcam --out {heat}",
    ]


def _writable(out: str | Path) -> Path:
    """The folder, made and tried, before minutes are spent on what could not be written."""
    folder = Path(out).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = "it is a file" if folder.is_file() else (error.strerror or str(error)).lower()
        raise errors.InputError(
            f"the demo cannot write into the folder {str(folder)!r}: {reason}; name another with --out"
        ) from error
    return folder


def _train(digits: Digits, seed: int, epochs: int, say: Progress) -> tuple[SimpleCNN, TrainResult]:
    import torch

    from innersight.data import small_cnn

    def step(now: small_cnn.Step) -> None:
        held_out = "" if now.accuracy is None else f", {_percent(now.accuracy)} of the held-out images right"
        say("train", now.step, now.steps, f"epoch {now.epoch} of {now.epochs}, loss {now.loss:.3f}{held_out}")

    say("train", 0, 1, "")
    with torch.random.fork_rng(devices=[]):  # a new module draws weights from the global state; `train` draws its own
        model = small_cnn.SimpleCNN()
    trained = small_cnn.train(model, digits.train, digits.test, epochs=epochs, seed=seed, progress=step)
    return model.eval(), trained


def _weights(model: SimpleCNN, digits: Digits, accuracy: float, seed: int) -> bytes:
    from innersight.data import small_cnn

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "weights.safetensors")
        small_cnn.save_weights(model, path, data=digits.name, accuracy=accuracy, seed=seed)
        return Path(path).read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# What is measured


@dataclass(frozen=True)
class Reading:
    """How the held-out images are read.

    confusion: (10, 10), how often class `row` is read as `column`
    interval:  of the accuracy, 95% (Wilson, 1927): what other images of the same kind might give
    unsure:    how many answers are below the probability SURE; unsure_wrong: how many of them are wrong
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
    findings: list[str] = field(default_factory=list)


def _study(net: Network, digits: Digits, epochs: int, seed: int, say: Progress) -> Study:
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
    example = _first_right(reading, 2)
    maps = net.maps(images[[example]], ["conv1", *SHOWN])
    name = f"{_a(labels[example])} (held-out image {example})"
    maps = replace(maps, pictures=[replace(p, name=name) for p in maps.pictures])
    study = Study(
        digits, epochs, seed, reading, firing,
        paper=np.flatnonzero((paper > 0).any((1, 2))).tolist(),
        dependence=dependence, looks=looks,
        ink=_ink(gradient, images[right, 0].numpy()),
        example=example, maps=maps, saliency=saliency,
    )  # fmt: skip
    return replace(study, findings=[*_about_reading(study), *_about_channels(study), *_about_looks(study)])


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95% interval of a share of which `right` of `count` were seen (E. B. Wilson, JASA 1927).

    >>> [round(v, 3) for v in wilson(351, 355)]
    [0.971, 0.996]
    """
    z, share = 1.959964, right / count
    middle = share + z * z / (2 * count)
    reach = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, (middle - reach) / (1 + z * z / count)), min(1.0, (middle + reach) / (1 + z * z / count))


def _first_right(reading: Reading, k: int) -> int:
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


# ---------------------------------------------------------------------------------------------------------------------
# In words


def _percent(share: float) -> str:
    """An accuracy or a probability, never rounded up to a certainty that it is not.

    >>> _percent(0.98873), _percent(0.99999), _percent(1.0)
    ('98.9%', 'over 99.9%', '100%')
    """
    if share in (0.0, 1.0):
        return f"{share:.0%}"
    if share > 0.999 or share < 0.001:
        return "over 99.9%" if share > 0.999 else "under 0.1%"
    return f"{share:.1%}"


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _and(items: Sequence[Any]) -> str:
    """1, 2 and 3"""
    texts = [str(i) for i in items]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def _a(k: int) -> str:
    return f"an {k}" if k == 8 else f"a {k}"


def _about_reading(study: Study) -> list[str]:
    reading = study.reading
    right, count = int(reading.right.sum()), len(reading.labels)
    low, high = reading.interval
    said = [
        f"It reads {_percent(reading.accuracy)} of the held-out images right, {right:,} of {count:,} "
        f"(95% interval for such images: {_percent(low)} to {_percent(high)})."
    ]
    counts = reading.confusion
    each = counts.diagonal() / np.maximum(counts.sum(1), 1)
    if right < count:
        k = int(each.argmin())
        perfect = np.flatnonzero(each == 1).tolist()
        rest = f"; every {_and(perfect)} is read right" if perfect else ""
        said.append(f"The {k} is read worst: {counts[k, k]:,} of {counts[k].sum():,}, {_percent(each[k])}{rest}.")
        pairs = [f"{_a(t)} read as {_a(p)} ({_times(n)})" for t, p, n in reading.pairs[:3]]
        few = count - right < 10
        more = f"; {count - right} mistakes are too few to tell a habit from chance" if few else ""
        said.append(f"Most often confused: {', '.join(pairs)}{more}.")
    unsure, wrong = int(reading.unsure.sum()), int((~reading.right).sum())
    if unsure and wrong:
        caught = int((reading.unsure & ~reading.right).sum())
        said.append(
            f"{unsure:,} answers ({_percent(unsure / count)}) have a probability below {SURE:.0%}; {caught:,} of the "
            f"{wrong:,} mistakes are among them, and a person asked in these cases would catch them."
        )
    return said


def _alone(study: Study) -> str:
    return (
        f"Each channel was removed alone, on {_which(study)} of each digit: two channels that do the same work both "
        "look dispensable."
    )


def _about_channels(study: Study) -> list[str]:
    said = []
    for k in range(CLASSES):
        parts = [_leans(study.dependence[layer], k) for layer in study.dependence]
        said.append(f"Digit {k} depends most on {' and '.join(parts)}.")
    said += [_redundant(found) for found in study.dependence.values()]
    said.append(_alone(study))
    said += [_silent(study.firing[layer]) for layer in ("relu", "relu_1")]
    units = [f"{len(study.firing[layer].never)} of the {_size(study.firing[layer])} of {FEEDS[layer]}"
             for layer in ("relu_2", "relu_3")]  # fmt: skip
    said.append(f"Of the units that follow, {_and(units)} never fire.")
    return said


def _size(firing: Firing) -> int:
    return len(firing.images)


def _leans(found: Dependence, k: int) -> str:
    channel = found.strongest(k)
    if channel is None:
        return f"no channel of {FEEDS[found.layer]}"
    score, less = found.score[k], found.score[k] + found.change[k, channel]
    read = _read_right(found, k, channel)
    return f"{FEEDS[found.layer]} channel {channel} (without it: score {score:.1f} to {less:.1f}, read right {read})"


def _read_right(found: Dependence, k: int, without: int) -> str:
    """How well class `k` is read without a channel, and how well before."""
    before, after = found.accuracy[k], found.accuracy[k] + found.loss[k, without]
    return f"{_percent(before)} as before" if after == before else f"{_percent(before)} to {_percent(after)}"


def _redundant(found: Dependence) -> str:
    """How far a single channel can hurt, and how many hurt nobody."""
    name, count = FEEDS[found.layer], found.loss.shape[1]
    k, channel = np.unravel_index(int(found.loss.argmin()), found.loss.shape)
    lost = round(-float(found.loss[k, channel]) * int(found.images[k]))
    spare = int((found.loss * found.images[:, None] > -1.5).all(0).sum())
    if lost < 1:
        return f"{name}: removing any one of its {count} channels costs no digit a single image."
    return (
        f"{name}: the hardest loss is channel {channel} for digit {k}, {lost} of {found.images[k]} images; {spare} of "
        f"the {count} channels can each be removed at the price of at most one image a digit."
    )


def _silent(firing: Firing) -> str:
    name = FEEDS[firing.layer]
    texts = []
    if firing.never:
        it = "it" if len(firing.never) == 1 else "they"
        texts.append(
            f"channel{'s' * (it == 'they')} {_and(firing.never)} never fire{'s' * (it == 'it')} in any of the "
            f"{firing.count:,} held-out images, so {it} could be cut out without changing an answer to one of them"
        )
    texts += [f"channel {c} fires in only {firing.images[c]} of them" for c in firing.seldom]
    if not texts:
        return f"{name}: none of its {_size(firing)} channels is silent, each fires somewhere in " + (
            "every held-out image."
            if (firing.images == firing.count).all()
            else f"at least {_percent(float(firing.images.min()) / firing.count)} of the held-out images."
        )
    return f"{name}: {'; '.join(texts)}."


def _about_looks(study: Study) -> list[str]:
    said = []
    if study.reading.right.all():
        said.append(
            f"There is no mistake among {len(study.reading.labels):,} images; the least sure answers are looked at."
        )
    said += [f"{_headline(look)}: {_looked(look)}" for look in study.looks]
    tried = [look for look in study.looks if look.painted is not None]
    if tried:
        said.append(
            f"Painting over bore out the map in {sum(look.borne_out for look in tried)} of {len(tried)} of these "
            "pictures: a map is a hint, not a proof."
        )
    return said


def _headline(look: Look) -> str:
    if look.true == look.predicted:
        return (
            f"Held-out image {look.index}, {_a(look.true)}, is read right with only {_percent(look.probability)} "
            f"({_a(look.rival)} comes second)"
        )
    return (
        f"Held-out image {look.index}, {_a(look.true)}, is read as {_a(look.predicted)} with "
        f"{_percent(look.probability)} ({_a(look.true)}: {_percent(look.probability_true)})"
    )


def _looked(look: Look) -> str:
    if look.cam.share == 0:
        return f"Grad-CAM for {look.predicted} is blank: where conv2 looks, nothing speaks for it."
    if look.cam.box is None:
        return f"Grad-CAM for {look.predicted} points nowhere in particular, {look.cam}."
    assert look.painted is not None
    assert look.opposite is not None
    what = look.cam.words.split()[-1]
    verdict = "so the map points at what counted" if look.borne_out else "so the map does not show what counted most"
    text = (
        f"of the evidence for {look.predicted} (Grad-CAM), {look.cam.share:.0%} lies in the {look.cam.words}. With "
        f"that {what} painted over as paper the score of {look.predicted} {_moves(look.painted)}, with the opposite "
        f"{what} it {_moves(look.opposite)}: {verdict}."
    )
    if look.instead is not None and look.instead[0] != look.predicted:
        text += f" Without that {what} the answer is {look.instead[0]} ({_percent(look.instead[1])})."
    return text


def _moves(drop: float) -> str:
    return f"falls by {drop:.1f}" if drop >= 0.05 else f"rises by {-drop:.1f}" if drop <= -0.05 else "does not move"


# ---------------------------------------------------------------------------------------------------------------------
# In numbers


def _json(study: Study) -> bytes:
    reading = study.reading
    record = {
        "innersight": innersight.__version__,
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
        "findings": study.findings,
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


# ---------------------------------------------------------------------------------------------------------------------
# In pictures


def _pictures(net: Network, study: Study, say: Progress) -> dict[str, bytes]:
    """The PNG files by name."""
    drawings: dict[str, Callable[[], Figure]] = {
        "confusion": partial(_draw_confusion, study),
        "maps_conv1": partial(_draw_maps, study, "conv1", columns=4),
        "maps_eight": partial(_draw_maps, study, "relu", columns=4, limit=8, order="activation"),
        **{f"maps_{layer}": partial(_draw_maps, study, layer, columns=columns) for layer, columns in SHOWN.items()},
        **{f"removed_{FEEDS[layer]}": partial(_draw_removed, study, layer) for layer in study.dependence},
        "firing": partial(_draw_firing, study),
        "saliency_right": partial(_draw_right, net, study),
        "saliency_worst": partial(_draw_worst, study),
    }
    files = {"example.png": _example(study)}
    for i, (name, draw) in enumerate(drawings.items()):
        say("pictures", i, len(drawings), f"{name}.png")
        files[f"{name}.png"] = plots.png(draw())
    say("pictures", len(drawings), len(drawings), "")
    return files


def _example(study: Study) -> bytes:
    """The example digit as a picture file, to try the commands on."""
    from PIL import Image

    pixels = np.rint(255 * study.digits.test_images[study.example, 0].numpy()).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _draw_maps(study: Study, layer: str, **options: Any) -> Figure:
    figure = study.maps.plot(layer, **options).figure
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
            found.change, [[_signed(v, 1) for v in row] for row in found.change],
            scale=color.scale(found.change, signed=True), down="digit", **shared,
        ),
        plots.Table(
            f"change of its accuracy in percentage points (one image: {100 / found.images.max():.0f}); empty: none",
            points, [[_signed(v, 0) for v in row] for row in points],
            scale=color.scale(points, signed=True), down="digit", **shared,
        ),
    ]  # fmt: skip
    notes = [
        f"set to zero after the ReLU (layer {layer}), one at a time",
        f"{_which(study)} a digit",
        "each table on its own scale: ± the 99.5th percentile of |value|",
    ]
    return plots.tables(parts, title=f"What each digit loses without a channel of {name}", notes=notes)


def _which(study: Study) -> str:
    """On how many images of each digit the channels were removed."""
    images = study.dependence["relu"].images
    if images.sum() == len(study.reading.labels):
        return f"all {images.min()} to {images.max()} held-out images"
    return f"the first {images.max()} held-out images"


def _signed(value: float, digits: int) -> str:
    """+1.2, or nothing where that is all zeros."""
    text = f"{value:+.{digits}f}"
    return "" if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


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
                [*(str(k) for k in range(CLASSES)), "all"], [str(c) for c in range(_size(firing))],
                color.Scale(0, 100, False, 0, 100), across="channel", down="digit", colors="YlGnBu",
            )
        )  # fmt: skip
    notes = [
        f"mean over all {study.firing['relu'].count:,} held-out images",
        "a cell fires where the ReLU lets it pass",
    ]
    return plots.tables(parts, title="How much of each channel's map fires, by digit", notes=notes)


def _caption(true: int, predicted: int, probability: float) -> str:
    return f"{_a(true)}, read as {predicted} ({_percent(probability)})"


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
    chosen = sorted({_first_right(reading, k) for k in range(CLASSES)}, key=lambda i: reading.labels[i])
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
    return plots.saliency(list(zip(*columns, strict=True)), title=_worst_title(study), notes=[_SCALE_NOTE, _CAM_NOTE])


def _worst_title(study: Study) -> str:
    return "Its least sure answers" if study.reading.right.all() else "Its worst mistakes, the most confident first"


# ---------------------------------------------------------------------------------------------------------------------
# The page

_STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --faint: #5f646b; --paper: #fbfbfa; --line: #d9d9d6; --card: #fff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e6; --faint: #a3a7ad; --paper: #17181a; --line: #3a3c40; --card: #202225 }
}
body { margin: 0 auto; padding: 1.5rem; max-width: 78rem; background: var(--paper); color: var(--ink);
       font: 1rem/1.55 system-ui, sans-serif }
h1 { font-size: 1.7rem; line-height: 1.25; margin: .5rem 0 }
h2 { font-size: 1.25rem; margin: 3rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line) }
p, ul, ol { max-width: 46rem } li { margin: .35rem 0 }
.pair { display: grid; grid-template-columns: minmax(0, 3fr) minmax(17rem, 2fr); gap: 0 2rem; align-items: start;
        margin: 1.2rem 0 }
@media (max-width: 56rem) { .pair { grid-template-columns: minmax(0, 1fr) } }
figure { margin: 1rem 0 } figcaption { color: var(--faint); font-size: .9rem; max-width: 46rem }
img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; border: 1px solid var(--line) }
@media (prefers-color-scheme: dark) { img { filter: brightness(.9) } }
pre { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .7rem 1rem;
      font-size: .85rem; line-height: 1.4 }
table { border-collapse: collapse; font-size: .92rem; display: block; overflow-x: auto }
th, td { text-align: left; vertical-align: bottom; padding: .25rem .8rem .25rem 0;
         border-bottom: 1px solid var(--line) }
.lead { font-size: 1.1rem } .note { color: var(--faint); font-size: .9rem }
"""


def _page(study: Study, net: Network) -> str:
    sections = [
        _page_reading(study),
        _page_maps(study, net),
        _page_removed(study),
        _page_firing(study),
        _page_looks(study),
        _page_next(),
    ]
    title = f"Inside a small network that reads {'MNIST' if study.digits.name == 'mnist' else 'handwritten digits'}"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n"
        + _p(
            "Two convolutions and three linear layers, trained from scratch in "
            f"{study.epochs} epoch{'s' * (study.epochs != 1)} (seed {study.seed}). Images: {study.digits.note}.",
            "lead",
        )
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def _p(text: str, kind: str = "") -> str:
    return f"<p{f' class={kind}' if kind else ''}>{html.escape(text)}</p>\n"


def _list(items: Sequence[str], tag: str = "ul") -> str:
    return f"<{tag}>\n" + "".join(f"<li>{html.escape(i)}</li>\n" for i in items) + f"</{tag}>\n"


def _figure(name: str, caption: str) -> str:
    image = f'<a href="{name}"><img src="{name}" alt="{html.escape(caption)}"></a>'
    return f"<figure>{image}\n<figcaption>{html.escape(caption)}</figcaption></figure>\n"


def _pair(figure: str, words: str) -> str:
    return f'<div class="pair">{figure}<div>{words}</div></div>\n'


def _page_reading(study: Study) -> str:
    caption = "Rows: the digit that was written. Columns: the digit that was read. Colored cells are mistakes."
    words = _list(_about_reading(study))
    return "<h2>How well it reads</h2>\n" + _pair(_figure("confusion.png", caption), words)


def _page_maps(study: Study, net: Network) -> str:
    k = study.reading.labels[study.example]
    maps, paper = study.maps, study.paper
    cut = float((maps["conv1"] <= 0).mean())
    follow = _follow(maps["conv1"][0], study.digits.test_images[study.example, 0].numpy())
    filters = (
        f"A map is what one channel answers all over the picture, here for {_a(k)}. Each of the 16 filters of conv1 "
        "looks at 5x5 pixels: its map is red where it answers above zero, blue where below. See which side or which "
        "direction of a stroke lights up."
    )
    same = (
        f"{_channels(follow)}: the map looks like the digit itself (correlation with the ink above 0.8)."
        if follow
        else "None of the maps looks like the digit itself (correlation with the ink above 0.8)."
    )
    empty = (
        f"{_channels(paper)}: above zero on an empty picture, too, by a positive bias; there red means paper."
        if paper
        else "On an empty picture no channel answers above zero."
    )
    relu = f"The ReLU sets all below zero to zero, here {cut:.0%} of the values. What is left says where a pattern is."
    eight = "The eight channels that answer this digit most, strongest first."
    pool = (
        "Pooling keeps the largest of each 2x2 values: 24x24 becomes 12x12. Where exactly a stroke ran is lost, and a "
        "shift by a pixel matters less from here on."
    )
    relu_1 = (
        "conv2 combines all 16 maps, and each of its values depends on 14x14 pixels: wide enough for an end, a bend or "
        "a crossing of strokes. A gray map with a stroke through it is zero everywhere for this digit."
    )
    pool_1 = "After the second pooling 32 maps of 4x4 are left, 512 numbers. The linear layers decide from these alone."
    table = (
        "What each layer sees: 'receptive field' is how many pixels of the input one value depends on, 'stride' how "
        "far apart its neighbors look, 'centre' where the first of them does."
    )
    return (
        "<h2>What its layers make of a digit</h2>\n"
        + _pair(_figure("maps_conv1.png", "conv1, before the ReLU"), _p(filters) + _list([same, empty]))
        + _pair(_figure("maps_relu.png", "after the first ReLU"), _p(relu))
        + _pair(_figure("maps_eight.png", "the eight most active maps after the first ReLU"), _p(eight))
        + _pair(_figure("maps_pool.png", "after the first pooling"), _p(pool))
        + _pair(_figure("maps_relu_1.png", "conv2 after its ReLU"), _p(relu_1))
        + _pair(_figure("maps_pool_1.png", "after the second pooling"), _p(pool_1))
        + _p(table)
        + f"<pre>{html.escape(str(net.layers))}</pre>\n"
    )


def _channels(numbers: Sequence[int]) -> str:
    return f"Channel{'s' * (len(numbers) != 1)} {_and(numbers)}"


def _follow(maps: np.ndarray, picture: np.ndarray) -> list[int]:
    """The channels of conv1 (C, 24, 24) whose map looks like the picture that it was made from."""
    edge = (picture.shape[0] - maps.shape[1]) // 2
    ink = picture[edge:-edge, edge:-edge].ravel()
    return [c for c, m in enumerate(maps) if m.std() > 0 and np.corrcoef(m.ravel(), ink)[0, 1] > 0.8]


def _page_removed(study: Study) -> str:
    how = (
        "To learn what a channel is worth, it is removed: set to zero, and the rest of the network is run again, on "
        f"{_which(study)} of each digit. Nothing is estimated. A blue cell: the digit's own score falls without the "
        "channel, so the channel speaks for it. Red: the score rises, the channel speaks against it."
    )
    figures = "".join(
        _figure(f"removed_{FEEDS[layer]}.png", f"{FEEDS[layer]}: its channels removed one at a time")
        for layer in study.dependence
    )
    rest = [*(_redundant(found) for found in study.dependence.values()), _alone(study)]
    return (
        "<h2>Which channels each digit depends on</h2>\n" + _p(how) + figures + _strongest_table(study) + _list(rest)
        + _p("A score can fall far and the answer stay right: only the order of the ten scores decides.", "note")
    )  # fmt: skip


def _strongest_table(study: Study) -> str:
    """The three channels of each layer that each digit depends on most, and how well it is read without the first."""
    head = ["digit"]
    for layer in study.dependence:
        head += [
            f"{FEEDS[layer]}: the three channels without which its score falls most",
            "read right without the first",
        ]
    rows = []
    for k in range(CLASSES):
        row = [str(k)]
        for found in study.dependence.values():
            three = [c for c in np.argsort(found.change[k], kind="stable")[:3] if found.change[k, c] < 0]
            row.append(", ".join(f"{c} ({_signed(found.change[k, c], 1) or 0})" for c in three) or "none")
            row.append(_read_right(found, k, three[0]) if three else "")
        rows.append(row)
    return (
        "<table>\n<tr>" + "".join(f'<th scope="col">{html.escape(text)}</th>' for text in head) + "</tr>\n"
        + "".join(f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in row)}</tr>\n" for row in rows)
        + "</table>\n"
    )  # fmt: skip


def _page_firing(study: Study) -> str:
    said = [s for s in _about_channels(study) if "fire" in s]
    hint = (
        "No gradient passes a ReLU where it is zero, so what never fires on the training images has stopped learning. "
        "If there is much of it, a smaller learning rate or another seed may help, or a smaller network does as well."
    )
    caption = "The share of each channel's map that is above zero. A column of zeros is a channel that never fires."
    return "<h2>Which channels never fire</h2>\n" + _list(said) + _figure("firing.png", caption) + _p(hint)


def _page_looks(study: Study) -> str:
    share, covered = study.ink
    words = (
        "The gradient (Simonyan, Vedaldi, Zisserman 2013) shows which pixels would change the score most if they were "
        "changed a little. Grad-CAM (Selvaraju et al. 2017) shows where the maps of conv2 speak for the answer, "
        "coarsely: each of its values stands for 14x14 pixels."
    )
    ink = (
        f"Where the answer is right, {share:.0%} of the gradient lies on ink, which covers {covered:.0%} of the "
        f"picture: {'more' if share > covered else 'no more'} than its share, and paper counts, too. What is not there "
        "tells digits apart as well: a 3 is an 8 whose left side is open."
    )
    right = _pair(_figure("saliency_right.png", "One digit of each kind that was read right"), _p(words) + _p(ink))
    looks = [
        f"{_headline(look)}: {_looked(look)} {look.ink:.0%} of the gradient lies on ink, which covers "
        f"{look.covered:.0%} of the picture."
        for look in study.looks
    ]
    none = study.reading.right.all()
    head = (
        "There is no mistake among the held-out images. These are the answers with the least confidence."
        if none
        else "The last column asks what speaks for the answer and against the true digit."
    )
    caution = (
        "A map is a hint, not a proof. That is why the part it points at was painted over as paper, and the opposite "
        "part for comparison: the map is borne out if the score falls more without the first."
    )
    return (
        "<h2>What it looked at</h2>\n" + right + f"<h2>{html.escape(_worst_title(study))}</h2>\n" + _p(head)
        + _figure("saliency_worst.png", "Pictures with what was read, and what spoke for it")
        + _list(looks, "ol") + _p(caution)
    )  # fmt: skip


def _page_next() -> str:
    ideas = [
        "Look at the mistakes first: would you have read them right? Where a person would not, no network can help.",
        "Give it more examples of what it confuses, or train longer (--epochs), and see which findings stay. Another "
        "--seed shows which were chance: channel numbers will change, and weak findings may vanish.",
        f"Let a person look at answers below {SURE:.0%}: above and in findings.json is what that would catch.",
    ]
    commands = "\n".join(_commands(Path()))
    return (
        "<h2>What one might do next</h2>\n" + _list(ideas) + _p("In this folder:")
        + f"<pre>{html.escape(commands)}</pre>\n"
        + _p("All numbers are in findings.json; weights.safetensors holds the network.", "note")
    )  # fmt: skip
