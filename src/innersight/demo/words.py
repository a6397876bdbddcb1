"""What was measured, in words: sentences for the terminal, the page and the captions of the figures."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from innersight.demo.study import ARCH, CLASSES, FEEDS, SURE

if TYPE_CHECKING:
    from innersight.demo.study import Dependence, Firing, Look, Study


def findings(study: Study) -> list[str]:
    """What one learns, a sentence each."""
    return [*about_reading(study), *about_channels(study), *about_looks(study)]


def percent(share: float) -> str:
    """An accuracy or a probability, never rounded up to a certainty that it is not.

    >>> percent(0.98873), percent(0.99999), percent(1.0)
    ('98.9%', 'over 99.9%', '100%')
    """
    if share in (0.0, 1.0):
        return f"{share:.0%}"
    if share > 0.999 or share < 0.001:
        return "over 99.9%" if share > 0.999 else "under 0.1%"
    return f"{share:.1%}"


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def listed(items: Sequence[Any]) -> str:
    """1, 2 and 3"""
    texts = [str(i) for i in items]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def a(k: int) -> str:
    return f"an {k}" if k == 8 else f"a {k}"


def about_reading(study: Study) -> list[str]:
    reading = study.reading
    right, count = int(reading.right.sum()), len(reading.labels)
    low, high = reading.interval
    said = [
        f"It reads {percent(reading.accuracy)} of the held-out images right, {right:,} of {count:,} "
        f"(95% interval for such images: {percent(low)} to {percent(high)})."
    ]
    counts = reading.confusion
    each = counts.diagonal() / np.maximum(counts.sum(1), 1)
    if right < count:
        k = int(each.argmin())
        perfect = np.flatnonzero(each == 1).tolist()
        rest = f"; every {listed(perfect)} is read right" if perfect else ""
        said.append(f"The {k} is read worst: {counts[k, k]:,} of {counts[k].sum():,}, {percent(each[k])}{rest}.")
        pairs = [f"{a(t)} read as {a(p)} ({_times(n)})" for t, p, n in reading.pairs[:3]]
        few = count - right < 10
        more = f"; {count - right} mistakes are too few to tell a habit from chance" if few else ""
        said.append(f"Most often confused: {', '.join(pairs)}{more}.")
    unsure, wrong = int(reading.unsure.sum()), int((~reading.right).sum())
    if unsure and wrong:
        caught = int((reading.unsure & ~reading.right).sum())
        said.append(
            f"{unsure:,} answers ({percent(unsure / count)}) have a probability below {SURE:.0%}; {caught:,} of the "
            f"{wrong:,} mistakes are among them, and a person asked in these cases would catch them."
        )
    return said


def alone(study: Study) -> str:
    return (
        f"Each channel was removed alone, on {which(study)} of each digit: two channels that do the same work both "
        "look dispensable."
    )


def about_channels(study: Study) -> list[str]:
    said = []
    for k in range(CLASSES):
        parts = [_leans(study.dependence[layer], k) for layer in study.dependence]
        said.append(f"Digit {k} depends most on {' and '.join(parts)}.")
    said += [redundant(found) for found in study.dependence.values()]
    said.append(alone(study))
    said += [silent(study.firing[layer]) for layer in ("relu", "relu_1")]
    units = [f"{len(study.firing[layer].never)} of the {study.firing[layer].channels} of {FEEDS[layer]}"
             for layer in ("relu_2", "relu_3")]  # fmt: skip
    said.append(f"Of the units that follow, {listed(units)} never fire.")
    return said


def _leans(found: Dependence, k: int) -> str:
    channel = found.strongest(k)
    if channel is None:
        return f"no channel of {FEEDS[found.layer]}"
    score, less = found.score[k], found.score[k] + found.change[k, channel]
    read = read_right(found, k, channel)
    return f"{FEEDS[found.layer]} channel {channel} (without it: score {score:.1f} to {less:.1f}, read right {read})"


def read_right(found: Dependence, k: int, without: int) -> str:
    """How well class `k` is read without a channel, and how well before."""
    before, after = found.accuracy[k], found.accuracy[k] + found.loss[k, without]
    return f"{percent(before)} as before" if after == before else f"{percent(before)} to {percent(after)}"


def redundant(found: Dependence) -> str:
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


def silent(firing: Firing) -> str:
    name = FEEDS[firing.layer]
    texts = []
    if firing.never:
        it = "it" if len(firing.never) == 1 else "they"
        texts.append(
            f"channel{'s' * (it == 'they')} {listed(firing.never)} never fire{'s' * (it == 'it')} in any of the "
            f"{firing.count:,} held-out images, so {it} could be cut out without changing an answer to one of them"
        )
    texts += [f"channel {c} fires in only {firing.images[c]} of them" for c in firing.seldom]
    if not texts:
        return f"{name}: none of its {firing.channels} channels is silent, each fires somewhere in " + (
            "every held-out image."
            if (firing.images == firing.count).all()
            else f"at least {percent(float(firing.images.min()) / firing.count)} of the held-out images."
        )
    return f"{name}: {'; '.join(texts)}."


def about_looks(study: Study) -> list[str]:
    said = []
    if study.reading.right.all():
        said.append(
            f"There is no mistake among {len(study.reading.labels):,} images; the least sure answers are looked at."
        )
    said += [f"{headline(look)}: {looked(look)}" for look in study.looks]
    tried = [look for look in study.looks if look.painted is not None]
    if tried:
        said.append(
            f"Painting over bore out the map in {sum(look.borne_out for look in tried)} of {len(tried)} of these "
            "pictures: a map is a hint, not a proof."
        )
    return said


def headline(look: Look) -> str:
    if look.true == look.predicted:
        return (
            f"Held-out image {look.index}, {a(look.true)}, is read right with only {percent(look.probability)} "
            f"({a(look.rival)} comes second)"
        )
    return (
        f"Held-out image {look.index}, {a(look.true)}, is read as {a(look.predicted)} with "
        f"{percent(look.probability)} ({a(look.true)}: {percent(look.probability_true)})"
    )


def looked(look: Look) -> str:
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
        text += f" Without that {what} the answer is {look.instead[0]} ({percent(look.instead[1])})."
    return text


def _moves(drop: float) -> str:
    return f"falls by {drop:.1f}" if drop >= 0.05 else f"rises by {-drop:.1f}" if drop <= -0.05 else "does not move"


def which(study: Study) -> str:
    """On how many images of each digit the channels were removed."""
    images = study.dependence["relu"].images
    if images.sum() == len(study.reading.labels):
        return f"all {images.min()} to {images.max()} held-out images"
    return f"the first {images.max()} held-out images"


def signed(value: float, digits: int) -> str:
    """+1.2, or nothing where that is all zeros."""
    text = f"{value:+.{digits}f}"
    return "" if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def worst_title(study: Study) -> str:
    return "Its least sure answers" if study.reading.right.all() else "Its worst mistakes, the most confident first"


def commands(folder: Path) -> list[str]:
    weights, example = (shlex.quote(str(folder / name)) for name in ("weights.safetensors", "example.png"))
    maps, heat = (shlex.quote(str(folder / name)) for name in ("my_maps.png", "my_heat.png"))
    return [
        f"innersight layers {weights} --arch {ARCH}",
        f"innersight maps {weights} {example} --arch {ARCH} --layer conv1 --columns 4 --out {maps}",
        f"innersight explain {weights} {example} --arch {ARCH} --method gradient,gradcam --out {heat}",
    ]
