"""What is explained: a target turns the output of the network into one number an image.

Wherever a target is asked for, these are taken:

- None                   the class the network predicts, image by image (default)
- 3, "tench"             a class, by index or name
- [3, "tench", None]     one target for each image
- difference(a, b)       why a and not b
- finer(of)              why this class and not the ones most like it
- probability(of)        the probability of a class rather than its logit
- mask(where, of)        a region of a segmentation
- box(where, of)         a detected object
- embedding(vector)      similarity to a vector
- any function of the output that returns one number an image
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from innersight import errors
from innersight.observe.observer import tensors_in

_MAIN = (
    "logits",
    "out",
    "output",
    "outputs",
    "prediction",
    "predictions",
    "pred",
    "class_logits",
    "x",
    "last_hidden_state",
)
Score = Callable[[Any, torch.Tensor, Sequence[int]], torch.Tensor]


@dataclass(frozen=True)
class Target:
    """A weighting of the output.

    score(raw, main, part): one number for each row of the output `(n,)`, from the whole output of the model and from
    its main tensor; `part` says which image of the request each row is. Differentiable.
    texts(main, part): what is explained, in words, one for each row.
    holds(raw, main, part): whether the output decides for it (its class is the predicted one, a is above b), `(n,)`, or
    None where it is no decision.
    """

    score: Score
    texts: Callable[[torch.Tensor, Sequence[int]], list[str]]
    holds: Callable[[Any, torch.Tensor, Sequence[int]], torch.Tensor | None] = lambda _raw, _main, _part: None


@dataclass(frozen=True)
class Classes:
    """The classes of a network: how many outputs there are and what they are called."""

    labels: tuple[str, ...] | None = None

    def name(self, index: int) -> str:
        return self.labels[index] if self.labels and index < len(self.labels) else f"class {index}"

    def index(self, which: int | str, count: int) -> int:
        """The output that `which` means; raises UnknownName with the nearest names."""
        if isinstance(which, str) and which not in (self.labels or ()) and which.lstrip("-").isdecimal():
            which = int(which)
        if isinstance(which, str):
            return self._named(which)
        try:
            number = operator.index(which)
        except TypeError:
            raise errors.InputError(
                f"{which!r} is no class; give a class by number or name, or None for the predicted one"
            ) from None
        if not 0 <= number < count:
            raise errors.UnknownName(
                f"class {number} is out of range: the network has {count} outputs, numbered 0 to {count - 1}"
            )
        return number

    def _named(self, name: str) -> int:
        if not self.labels:
            raise errors.UnknownName(
                f"no class {name!r}: this network states no class names; give the number of the class, or open it "
                "with labels="
            )
        for same in (str.__eq__, lambda a, b: a.lower() == b.lower()):
            found = [i for i, label in enumerate(self.labels) if same(label, name)]
            if len(found) == 1:
                return found[0]
            if found:
                raise errors.UnknownName(
                    f"{len(found)} classes are called {name!r}; say which by number: {', '.join(map(str, found))}"
                )
        synonyms = [
            i for i, label in enumerate(self.labels) if name.lower() in (s.strip().lower() for s in label.split(","))
        ]
        if len(synonyms) == 1:
            return synonyms[0]
        if synonyms:
            said = ", ".join(f"{i} ({self.labels[i]})" for i in synonyms)
            raise errors.UnknownName(f"{name!r} names {len(synonyms)} classes; say which by number: {said}")
        raise errors.unknown("class", name, self.labels, " in this network")


# ---------------------------------------------------------------------------------------------------------------------
# The output


def main_tensor(output: Any, choice: str | int | None = None, count: int | None = None) -> tuple[torch.Tensor, str]:
    """The tensor of the output that is read as the network's answer, and a note where there was a choice.

    Tensors are taken as they are; of dicts, dataclasses and named tuples the entry called logits, out, ...; of tuples
    the first that has a row for each image; of detections the best score of each of `count` classes. `choice` names
    another.
    """
    if isinstance(output, torch.Tensor):
        if choice is not None:
            raise errors.UnknownName(f"no output {str(choice)!r}: this network returns one tensor; leave output= out")
        return output, ""
    entries = _entries(output)
    tensors = {k: v for k, v in entries.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    if choice is not None:
        key = str(choice)
        if key not in entries:
            raise errors.unknown("output", key, entries, " of this network")
        inner = entries[key]
        if isinstance(inner, torch.Tensor):
            return inner, f"the answer is output {key!r}, as chosen"
        return main_tensor(inner)
    if is_detection(output):
        note = "detections: the answer is, for each class, the score of the best object of that class"
        return detected_classes(output, count), note
    if not tensors:
        for value in entries.values():
            if isinstance(value, (Mapping, tuple, list)) and any(t.is_floating_point() for t in tensors_in(value)):
                return main_tensor(value)
        raise errors.Unsupported(f"the network returned {type(output).__name__} without a tensor of numbers in it")
    key = next((k for k in _MAIN if k in tensors), None) or next(
        (k for k, v in tensors.items() if v.dim() >= 2), next(iter(tensors))
    )
    if len(entries) == 1:
        return tensors[key], ""
    return tensors[
        key
    ], f"the network returns {', '.join(entries)}; {key!r} is taken as its answer (output= changes it)"


def _entries(output: Any) -> dict[str, Any]:
    if isinstance(output, Mapping):
        return {str(k): v for k, v in output.items()}
    if hasattr(output, "_asdict"):
        return output._asdict()
    if hasattr(output, "__dataclass_fields__"):
        return {k: getattr(output, k) for k in output.__dataclass_fields__ if getattr(output, k, None) is not None}
    if isinstance(output, (tuple, list)):
        return {str(i): v for i, v in enumerate(output)}
    raise errors.Unsupported(f"the network returned {type(output).__name__}, not a tensor")


def is_detection(output: Any) -> bool:
    """Whether this is a list of detected objects for each image, as torchvision's detectors return it."""
    return (
        isinstance(output, (list, tuple))
        and len(output) > 0
        and all(isinstance(d, Mapping) and "boxes" in d and "scores" in d for d in output)
    )


def class_scores(main: torch.Tensor) -> torch.Tensor:
    """(n, K) class scores; dense outputs `(n, K, H, W)` (segmentation) are averaged where the class is predicted."""
    if main.dim() == 1:
        return main[:, None]
    if main.dim() == 2:
        return main
    if main.dim() == 4:
        best = main.detach().argmax(1, keepdim=True)
        where = torch.zeros_like(main, dtype=torch.bool).scatter_(1, best, True)
        nowhere = ~where.flatten(2).any(2)[:, :, None, None]
        where = where | nowhere  # a class that wins nowhere is judged over the whole picture
        return (main * where).flatten(2).sum(2) / where.flatten(2).sum(2)
    raise errors.Unsupported(
        f"the answer has shape {tuple(main.shape)}, which names no class for an image; give a function of the output "
        "as the target"
    )


def detected_classes(output: Sequence[Mapping[str, torch.Tensor]], count: int | None = None) -> torch.Tensor:
    """(n, K): for each class the score of the best object of it that was detected, 0 where there is none."""
    labels = [d.get("labels", torch.zeros_like(d["scores"])).long() for d in output]
    highest = max((int(of_image.max()) for of_image in labels if of_image.numel()), default=0)
    empty = output[0]["scores"].new_zeros(max(count or 0, highest + 1))
    return torch.stack(
        [empty.scatter_reduce(0, of_image, d["scores"], "amax") for of_image, d in zip(labels, output, strict=True)]
    )


def winner(main: torch.Tensor) -> torch.Tensor:
    """The predicted class of each image: the largest score, or the class that covers most of a segmentation."""
    main = main.detach()
    if main.dim() == 4:
        counts = torch.nn.functional.one_hot(main.argmax(1), main.shape[1]).flatten(1, 2).sum(1)
        return counts.argmax(1)
    return class_scores(main).argmax(1)


# ---------------------------------------------------------------------------------------------------------------------
# The targets


def resolve(target: Any, count: int, classes: Classes) -> Target:
    """What the user gave, as a Target for `count` images of one request.

    What None stands for (the predicted class, the class that fills the mask) is settled by the first pass over an image
    and stays: what follows, on changed pictures, explains the same.
    """
    if isinstance(target, _Deferred):
        return target.build(count, classes)
    if isinstance(target, Target):
        return target
    if callable(target) and not isinstance(target, (str, int)):
        return _function(target)
    return _class(_each(target, count), classes)


def _each(target: Any, count: int) -> list[Any]:
    """A class for each image, from one for all or a list."""
    if isinstance(target, (list, np.ndarray, torch.Tensor)):
        items = target.tolist() if hasattr(target, "tolist") else list(target)
        items = items if isinstance(items, list) else [items] * count
        if len(items) != count:
            raise errors.InputError(f"{len(items)} targets were given for {count} images; give one, or one for each")
        return items
    if isinstance(target, tuple):
        raise errors.InputError(
            "a tuple is no target: difference(a, b) explains why a and not b, a list gives one target an image"
        )
    return [target] * count


@dataclass(frozen=True)
class _Deferred:
    """A target that waits for the class names and the number of images."""

    build: Callable[[int, Classes], Target]


Pick = Callable[[torch.Tensor], Sequence[int]]


def _settled(known: dict[int, int], main: torch.Tensor, part: Sequence[int], pick: Pick) -> torch.Tensor:
    """The class of each row: what is known of its image, else what `pick` makes of `main`, from then on."""
    if any(k not in known for k in part):
        for k, index in zip(part, pick(main), strict=True):
            known.setdefault(k, int(index))
    return torch.tensor([known[k] for k in part], device=main.device)


def _class(items: Sequence[Any], classes: Classes) -> Target:
    indices = _indices(items, classes)

    def score(_raw: Any, main: torch.Tensor, part: Sequence[int]) -> torch.Tensor:
        return class_scores(main).gather(1, indices(main, part)[:, None])[:, 0]

    def texts(main: torch.Tensor, part: Sequence[int]) -> list[str]:
        return [classes.name(int(i)) for i in indices(main, part)]

    return Target(score, texts, lambda _raw, main, part: winner(main) == indices(main, part))


def _indices(items: Sequence[Any], classes: Classes) -> Callable[[torch.Tensor, Sequence[int]], torch.Tensor]:
    """(main, part) -> the class of each row."""
    known: dict[int, int] = {}

    def indices(main: torch.Tensor, part: Sequence[int]) -> torch.Tensor:
        def pick(main: torch.Tensor) -> list[int]:
            count = main.shape[1] if main.dim() > 1 else 1
            given = [items[k] for k in part]
            predicted = winner(main).tolist() if None in given else given
            return [p if t is None else classes.index(t, count) for p, t in zip(predicted, given, strict=True)]

        return _settled(known, main, part, pick)

    return indices


def difference(a: Any, b: Any) -> _Deferred:
    """Why `a` and not `b`: the score of target `a` minus that of target `b` (each a class, or None for the predicted).

    Prabhushankar et al., Contrastive Explanations in Neural Networks, 2020.
    """

    def build(count: int, classes: Classes) -> Target:
        first, second = resolve(a, count, classes), resolve(b, count, classes)
        return Target(
            lambda raw, main, part: first.score(raw, main, part) - second.score(raw, main, part),
            lambda main, part: [
                f"{x} and not {y}" for x, y in zip(first.texts(main, part), second.texts(main, part), strict=True)
            ],
            lambda raw, main, part: first.score(raw, main, part) > second.score(raw, main, part),
        )

    return _Deferred(build)


def finer(of: Any = None, alpha: float = 0.6, similar: int = 3) -> _Deferred:
    """Why this class and not the ones most like it: its score minus `alpha` times the mean score of `similar` others.

    A target like any other, so every method gives its finer map: what is shared with the look-alikes drops out, what
    sets the class apart stays. Zhang et al., Finer-CAM, CVPR 2025 (arXiv:2501.11309).

    of:      a class, or a list with one for each image; None for the predicted
    alpha:   how strongly the others count against it; 0 is the class alone
    similar: how many others: those whose scores on the picture as it is are nearest to the class's own, as the authors'
             code picks them (likeness in the classifier's weights cannot be asked of every network); settled by the
             first pass over an image

    Others count alike, as in the paper; pytorch-grad-cam weighs them with their probabilities.
    """
    if not isinstance(similar, int) or similar < 1:
        raise errors.InputError(f"similar= is how many classes to compare with, 1 or more, not {similar!r}")

    def build(count: int, classes: Classes) -> Target:
        index = _indices(_each(of, count), classes)
        known: dict[int, list[int]] = {}

        def others(main: torch.Tensor, part: Sequence[int]) -> torch.Tensor:
            """(n, similar)"""
            if any(k not in known for k in part):
                scores, own = class_scores(main).detach(), index(main, part)[:, None]
                if scores.shape[1] < 2:
                    raise errors.Unsupported("finer compares with other classes, and this network has one output alone")
                apart = (scores - scores.gather(1, own)).abs().scatter(1, own, float("inf"))
                near = apart.argsort(stable=True)[:, : min(similar, scores.shape[1] - 1)]
                for k, row in zip(part, near.tolist(), strict=True):
                    known.setdefault(k, row)
            return torch.tensor([known[k] for k in part], device=main.device)

        def score(_raw: Any, main: torch.Tensor, part: Sequence[int]) -> torch.Tensor:
            scores = class_scores(main)
            own = scores.gather(1, index(main, part)[:, None])[:, 0]
            return own - alpha * scores.gather(1, others(main, part)).mean(1)

        def texts(main: torch.Tensor, part: Sequence[int]) -> list[str]:
            return [
                f"{classes.name(int(i))} and not {', '.join(map(classes.name, near))}"
                for i, near in zip(index(main, part), others(main, part).tolist(), strict=True)
            ]

        return Target(score, texts, lambda _raw, main, part: winner(main) == index(main, part))

    return _Deferred(build)


def probability(of: Any = None) -> _Deferred:
    """The probability of a class rather than its logit: softmax over the outputs, or the sigmoid of a single one."""

    def build(count: int, classes: Classes) -> Target:
        inner = resolve(of, count, classes)
        return Target(
            lambda raw, main, part: inner.score(raw, probabilities(class_scores(main)), part),
            lambda main, part: [f"probability of {t}" for t in inner.texts(main, part)],
            inner.holds,
        )

    return _Deferred(build)


def probabilities(logits: torch.Tensor) -> torch.Tensor:
    """`(n, K)` logits as probabilities; one output alone is that of a yes or no."""
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)


def mask(where: Any, of: Any = None) -> _Deferred:
    """The mean score of a class over a region of a segmentation.

    where: boolean `(H, W)` or `(N, H, W)`, in the picture as the network sees it; brought to the size of the output.
    """

    def build(count: int, classes: Classes) -> Target:
        given = where.detach().cpu() if isinstance(where, torch.Tensor) else where
        region = torch.as_tensor(np.asarray(given)).bool()
        if region.dim() not in (2, 3) or not bool(region.any()):
            raise errors.InputError("a mask is a boolean array (H, W) or (N, H, W) that marks at least one pixel")
        if region.dim() == 3 and len(region) not in (1, count):
            raise errors.InputError(f"{len(region)} masks were given for {count} images; give one, or one for each")
        region = region.expand(count, *region.shape[-2:])
        known: dict[int, int] = {}

        def pick(main: torch.Tensor, part: Sequence[int]) -> torch.Tensor:
            if main.dim() != 4:
                raise errors.Unsupported(
                    f"a mask is a target for a segmentation (N, K, H, W); this network answers {tuple(main.shape)}"
                )
            resized = torch.nn.functional.interpolate(region[list(part), None].float().to(main.device), main.shape[-2:])
            if not bool((resized.flatten(1).sum(1) > 0).all()):
                raise errors.InputError("the mask marks less than one value of the network's output")
            return resized

        def index(main: torch.Tensor, part: Sequence[int]) -> torch.Tensor:
            def fills(main: torch.Tensor) -> list[int]:
                if of is not None:
                    return [classes.index(of, main.shape[1])] * len(part)
                return (main.detach() * pick(main, part)).flatten(2).sum(2).argmax(1).tolist()

            return _settled(known, main, part, fills)

        def score(_raw: Any, main: torch.Tensor, part: Sequence[int]) -> torch.Tensor:
            weights = pick(main, part)
            chosen = main[torch.arange(main.shape[0], device=main.device), index(main, part)]
            return (chosen * weights[:, 0]).flatten(1).sum(1) / weights.flatten(1).sum(1)

        return Target(score, lambda main, part: [f"{classes.name(int(i))} in the mask" for i in index(main, part)])

    return _Deferred(build)


def box(where: Sequence[float], of: Any = None) -> _Deferred:
    """The score of the detected object that overlaps the box `(left, top, right, bottom)` most, in input pixels."""

    def build(_count: int, classes: Classes) -> Target:
        try:
            wanted = torch.tensor([float(v) for v in where])
        except (TypeError, ValueError):
            wanted = torch.zeros(4)
        if wanted.numel() != 4 or not (wanted[2] > wanted[0] and wanted[3] > wanted[1]):
            raise errors.InputError(
                "a box is (left, top, right, bottom) in pixels of the input, with left < right and top < bottom"
            )

        found: set[int] = set()

        def score(raw: Any, main: torch.Tensor, part: Sequence[int]) -> torch.Tensor:
            if not is_detection(raw):
                raise errors.Unsupported(
                    f"a box is a target for a detector; this network answers a tensor {tuple(main.shape)}"
                )
            scores = []
            for d, k in zip(raw, part, strict=True):
                best = _best(d, wanted.to(main.device), of, classes)
                if best is None and k not in found:
                    raise errors.InputError(
                        f"the network detects no {'object' if of is None else of} that overlaps the box; "
                        f"it found {len(d['scores'])} objects in this picture"
                    )
                found.add(k)  # from now on: where it is no longer detected, its score is zero
                scores.append(main.new_zeros(()) if best is None else best)
            return torch.stack(scores)

        text = f"object at {', '.join(f'{v:g}' for v in where)}"
        return Target(score, lambda main, _part: [text if of is None else f"{of}: {text}"] * main.shape[0])

    return _Deferred(build)


def _best(detected: Mapping[str, torch.Tensor], wanted: torch.Tensor, of: Any, classes: Classes) -> torch.Tensor | None:
    """The score of the object that overlaps the wanted box most; None if none does."""
    boxes, scores = detected["boxes"].detach(), detected["scores"]
    size = (torch.minimum(boxes[:, 2:], wanted[2:]) - torch.maximum(boxes[:, :2], wanted[:2])).clamp(min=0)
    shared = size.prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (wanted[2:] - wanted[:2]).prod()
    overlap = shared / (areas - shared).clamp(min=1e-9)
    if of is not None and "labels" in detected:
        count = len(classes.labels) if classes.labels else torch.iinfo(torch.int32).max
        overlap = overlap * (detected["labels"] == classes.index(of, count))
    return scores[overlap.argmax()] if overlap.numel() and bool(overlap.max() > 0) else None


def embedding(vector: Any) -> _Deferred:
    """Similarity (cosine) of the output to a vector `(D,)`, or to one for each image `(N, D)`."""

    def build(count: int, _classes: Classes) -> Target:
        given = vector.detach().cpu() if isinstance(vector, torch.Tensor) else vector
        wanted = torch.as_tensor(np.asarray(given, dtype=np.float32))
        if wanted.dim() not in (1, 2) or (wanted.dim() == 2 and wanted.shape[0] != count):
            raise errors.InputError(f"an embedding is a vector (D,) or one for each of the {count} images (N, D)")
        wanted = wanted.expand(count, wanted.shape[-1])

        def score(_raw: Any, main: torch.Tensor, part: Sequence[int]) -> torch.Tensor:
            flat = main.flatten(1)
            if flat.shape[1] != wanted.shape[1]:
                raise errors.InputError(
                    f"the embedding has {wanted.shape[1]} numbers, the network's output {flat.shape[1]}"
                )
            return torch.cosine_similarity(flat, wanted[list(part)].to(flat), dim=1)

        return Target(score, lambda main, _part: ["similarity to the embedding"] * main.shape[0])

    return _Deferred(build)


def _function(fn: Callable[[torch.Tensor], torch.Tensor]) -> Target:
    name = getattr(fn, "__name__", type(fn).__name__)

    def score(raw: Any, main: torch.Tensor, _part: Sequence[int]) -> torch.Tensor:
        value = fn(raw)
        if not isinstance(value, torch.Tensor) or value.shape not in ((main.shape[0],), (main.shape[0], 1)):
            got = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise errors.InputError(
                f"the target function {name!r} must return one number an image, a tensor ({main.shape[0]},); "
                f"it returned {got}"
            )
        return value.reshape(-1)

    return Target(score, lambda main, _part: ["the target function" if name == "<lambda>" else name] * main.shape[0])
