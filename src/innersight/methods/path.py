"""Methods that add up gradients on the way from a baseline to the picture, so that the parts sum to the score's change.

All are one integral: gradient at a point of the way, times where the way goes from there. They differ in the way. What
each promises, that its map sums to f(picture) - f(baseline), is measured: `verdict["completeness_error"]` is what is
missing as a share of that change, `verdict["steps"]` the number of points it took, `verdict["baseline_score"]`
f(baseline).

**Where the points lie.** A network is nearly linear in the size of its input far from zero and bends close to it, so
points at equal distances are wasted on one end and too few on the other. Between two neighboring points both scores and
both slopes are known, hence also by how much the trapezoid between them misses; the stretches that miss most are halved
until what all miss together is within the bound, and would be with any signs. SqueezeNet's logits need 10 to 30 points
for an error of 1%; equal distances leave up to 3% after 128, Gauss-Legendre's rule as much after 50.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from innersight import errors
from innersight.methods import Look, method
from innersight.methods.baselines import baseline as the_baseline
from innersight.methods.baselines import gaussian, sides

if TYPE_CHECKING:  # a list of the methods needs no torch
    import torch


@method(
    family="path",
    reads=("input.value", "input.gradient"),
    visits=("input.gradient",),
    unit="share of the score's change from the baseline",
    passes="9 or more forward and backward (about 10 to 30), at most max_steps; or as many as steps",
    paper="Sundararajan, Taly, Yan: Axiomatic Attribution for Deep Networks, ICML 2017 (arXiv:1703.01365)",
)
def integrated_gradients(
    look: Look,
    baseline: Any = "zero",
    error: float = 0.01,
    steps: int = 0,
    max_steps: int = 256,
    channels: bool = False,
) -> torch.Tensor:
    """What each pixel adds to the score on the straight way from a baseline to the picture; summed over the colors.

    baseline:  "zero" (the mean color of normalized pictures), "mean", "blur", numbers or an array as the network sees
               them, see `innersight.methods.baselines`
    error:     how much of the score's change the points may miss; they are added where the score bends
    steps:     this many points instead, by Gauss-Legendre's rule
    max_steps: no more points than this; a note says where they were too few
    channels:  keep the colors apart, `(N, C, H, W)`
    """
    x, start = look.value("input"), the_baseline(look, baseline)
    way = Way(lambda times: start + _column(times, x) * (x - start), lambda _times: x - start)
    return _integral(look, way, error, steps, max_steps, channels)


@method(
    family="path",
    reads=("input.value", "input.gradient"),
    visits=("input.gradient",),
    unit="share of the score's change from the blurred picture",
    passes="9 or more forward and backward (about 50 to 100), at most max_steps; or as many as steps",
    paper="Xu, Venugopalan, Sundararajan: Attribution in Scale and Space, CVPR 2020 (arXiv:2004.03383)",
)
def blur_integrated_gradients(
    look: Look,
    sigma: float = 50.0,
    edge: str = "zero",
    error: float = 0.01,
    steps: int = 0,
    max_steps: int = 256,
    channels: bool = False,
) -> torch.Tensor:
    """What each pixel adds to the score while the picture gets sharp out of a blur; summed over the colors.

    No color is the baseline's, so none is overlooked; what speaks is that there is detail.

    sigma:     standard deviation of the strongest blur, in pixels of the input
    edge:      "zero": beyond the picture's edges is zero as the network sees it, as the authors' code has it, so edges
               fade with the blur; "mirror": the picture goes on backwards, and they do not
    error, steps, max_steps, channels: as in integrated_gradients
    """
    if edge not in ("zero", "mirror"):
        raise errors.unknown("edge", edge, ("zero", "mirror"))
    if not sigma > 0:
        raise errors.InputError(f"sigma is a blur in pixels, above 0, not {sigma!r}")
    return _integral(look, _out_of_blur(look.value("input"), float(sigma), edge), error, steps, max_steps, channels)


@method(
    family="path",
    reads=("input.value",),
    visits=("input.gradient",),
    unit="share of the score's change from the baseline",
    passes="200 forward, 200 backward, one after the other",
    paper="Kapishnikov et al.: Guided Integrated Gradients, CVPR 2021 (arXiv:2106.09788)",
)
def guided_integrated_gradients(
    look: Look,
    baseline: Any = "zero",
    steps: int = 200,
    fraction: float = 0.25,
    max_dist: float = 0.02,
    channels: bool = False,
) -> torch.Tensor:
    """What each pixel adds on a way that moves first what the score heeds least, against noise; summed over colors.

    As in the authors' code: each step brings the picture one share of its distance nearer, by the values with the
    smallest gradients, none of them further than `max_dist` from the straight way (instead of the paper's anchors).
    The gradient at a step's start stands for the whole step, and what moves is what has a small one there: a tenth to
    nine tenths of the change of SqueezeNet's scores are missing from its maps' sums, however many the steps. A note
    says so.

    baseline: as in integrated_gradients
    steps:    how many, each of which has to wait for the one before
    fraction: of the values, those that are moved at a time
    max_dist: how far a value may be before or behind the straight way, as a share of it: 0 is integrated gradients
    channels: keep the colors apart, `(N, C, H, W)`
    """
    import torch

    _at_least(1, steps=steps)
    if not (0 < fraction <= 1 and 0 <= max_dist <= 1):
        raise errors.InputError(f"fraction is in (0, 1] and max_dist in [0, 1], not {fraction!r} and {max_dist!r}")
    start, end = (t.detach().double().cpu() for t in (the_baseline(look, baseline), look.value("input")))
    total, x, scores = torch.zeros_like(start), start, []
    for step in range(steps):
        ((_, seen),) = look.visit(1, lambda _part, x=x: x, "input.gradient")  # type: ignore[misc]
        scores.append(float(seen.scores))
        gradient = seen.gradient("input").double().cpu()
        moved = _guided_step(x, start, end, gradient.abs(), (step + 1) / steps, fraction, max_dist)
        total += (moved - x) * gradient
        x = moved
    if _say_complete(look, float(total.sum()), scores[0], steps) > 0.1:
        look.note(
            "more than a tenth of the score's change is missing from the sum of a guided_integrated_gradients map, see "
            "completeness_error in the verdict: integrated_gradients miss less"
        )
    return total if channels else total.sum(1)


@method(
    family="path",
    reads=("input.value",),
    visits=("score", "input.gradient"),
    unit="share of the score's change from the baselines, on average",
    passes="100 forward, 100 backward, and a forward for each baseline",
    paper="Erion et al.: Improving Performance of Deep Learning Models with Axiomatic Attribution Priors and Expected "
    "Gradients, Nature Machine Intelligence 2021 (arXiv:1906.10670)",
)
def expected_gradients(
    look: Look, baselines: Any = "colors", samples: int = 100, seed: int = 0, channels: bool = False
) -> torch.Tensor:
    """What each pixel adds on the way from many baselines, on average; summed over the colors. Also: GradientSHAP.

    Each sample is one point on the way from one baseline. The points' places are spread evenly over the ways, and the
    baselines are used equally often, which estimates the same average as independent draws, with less noise.

    `verdict["completeness_error"]` and its `verdict["standard_error"]`, as a share of the score's change from the mean
    over the baselines, tell how far the average has settled.

    baselines: a batch `(K, C, H, W)` as the network sees it, such as pictures of the training data; or "colors", which
               needs none: plain pictures in the colors of random pixels of the picture itself. They are never those of
               other pictures in the request
    samples:   how many points
    seed:      which points
    channels:  keep the colors apart, `(N, C, H, W)`
    """
    import torch

    _at_least(1, samples=samples)
    x = look.value("input")
    draw = torch.Generator().manual_seed(seed)
    starts = _baselines(x, baselines, samples, draw)
    rounds = -(-samples // len(starts))
    which = torch.cat([torch.randperm(len(starts), generator=draw) for _ in range(rounds)])[:samples]
    times = (torch.randperm(samples, generator=draw) + torch.rand(samples, generator=draw)) / samples

    def start(part: range) -> torch.Tensor:
        return starts[which[part.start : part.stop]].to(x)

    def points(part: range) -> torch.Tensor:
        return start(part) + _column(times[part.start : part.stop], x) * (x - start(part))

    total, sums = torch.zeros(x.shape, dtype=torch.float64), []
    for part, seen in look.visit(samples, points, "input.gradient"):
        added = (seen.gradient("input") * (x - start(part))).float().cpu()
        sums.append(added.flatten(1).sum(1, dtype=torch.float64))
        total += added.sum(0, keepdim=True, dtype=torch.float64) / samples
    used, again = which.unique(return_inverse=True)  # each baseline is scored once

    def alone(part: range) -> torch.Tensor:
        return starts[used[part.start : part.stop]].expand(-1, *x.shape[1:])

    scores = torch.cat([seen.scores.double().cpu() for _, seen in look.visit(len(used), alone)])
    _say_settled(look, torch.cat(sums), scores[again])
    return total if channels else total.sum(1)


# ---------------------------------------------------------------------------------------------------------------------
# Integrals along a way


class Way(NamedTuple):
    """From a baseline at time 0 to the picture at time 1.

    at:    times (k,) -> the points there (k, C, H, W)
    speed: times (k,) -> where it goes from there (k, C, H, W), or (1, C, H, W) if always the same
    """

    at: Callable[[Any], torch.Tensor]
    speed: Callable[[Any], torch.Tensor]


class _Stop(NamedTuple):
    """What is known at a point: its score, how fast that changes on the way, by which pixels, (C, H, W) or (H, W)."""

    score: float
    slope: float
    share: torch.Tensor


def _integral(look: Look, way: Way, error: float, steps: int, max_steps: int, channels: bool) -> torch.Tensor:
    """(1, C, H, W) or, summed over the colors, (1, H, W): what each value adds along the way."""
    _at_least(0, steps=steps)
    if steps:
        value, start = _by_gauss(look, way, steps, channels)
    else:
        if not error > 0:
            raise errors.InputError(f"error is a share of the score's change, above 0, not {error!r}")
        _at_least(9, max_steps=max_steps)
        value, start, steps = _by_halving(look, way, error, max_steps, channels)
    _say_complete(look, float(value.sum()), start, steps)
    return value[None]


def _by_gauss(look: Look, way: Way, steps: int, channels: bool) -> tuple[torch.Tensor, float]:
    """The integral by Gauss-Legendre's rule, and the score at the start."""
    import numpy as np
    import torch

    places, weights = np.polynomial.legendre.leggauss(steps)
    stops = _stops(look, way, ((places + 1) / 2).tolist(), channels)
    value = _weighted((stop, weight / 2) for weight, stop in zip(weights, stops, strict=True))
    ((_, seen),) = look.visit(1, lambda _part: way.at(torch.zeros(1)))
    return value, float(seen.scores)


def _by_halving(look: Look, way: Way, error: float, most: int, channels: bool) -> tuple[torch.Tensor, float, int]:
    """The integral by trapezoids, halved where they miss; the score at the start; the number of points."""
    import torch

    (here,) = _stops_of(look, way.speed(torch.ones(1)), channels)  # the picture itself has been seen
    known, wanted = {1.0: here}, [i / 8 for i in range(8)]
    while wanted:
        known.update(zip(wanted, _stops(look, way, wanted, channels), strict=True))
        times = sorted(known)
        misses = {(a, b): _miss(known, a, b) for a, b in pairwise(times)}
        scale = max(abs(stop.score) for stop in known.values())
        bound = max(error * abs(here.score - known[0.0].score), 1e-5 * scale)  # below that scores are rounding
        wanted = _to_halve(misses, bound)[: most - len(known)]
    if _together(misses.values()) > bound:
        look.note(
            f"error={error:g} was not reached within max_steps={most} points: completeness_error in the verdict tells "
            "what is missing"
        )
    halves = ((known[at], (b - a) / 2) for a, b in misses for at in (a, b))
    return _weighted(halves), known[0.0].score, len(known)


def _to_halve(misses: dict[tuple[float, float], float], bound: float) -> list[float]:
    """The middles of the stretches that miss most: all but those that together miss half the bound."""
    if _together(misses.values()) <= bound:
        return []
    worst = sorted(misses, key=lambda stretch: abs(misses[stretch]), reverse=True)
    count = next(i for i in range(len(worst) + 1) if _together(misses[s] for s in worst[i:]) <= bound / 2)
    return [(a + b) / 2 for a, b in worst[:count] if b - a > 2**-16]  # a score that jumps has no slope to find


def _together(misses: Iterable[float]) -> float:
    """What stretches miss as a whole, or would if each had its sign by lot: a sum that cancels may be luck."""
    misses = list(misses)
    return max(abs(math.fsum(misses)), math.hypot(*misses))


def _miss(known: dict[float, _Stop], a: float, b: float) -> float:
    """By how much the slopes at both ends are wrong about what the score does between."""
    return known[b].score - known[a].score - (b - a) / 2 * (known[a].slope + known[b].slope)


def _stops(look: Look, way: Way, times: Sequence[float], channels: bool) -> Iterator[_Stop]:
    """What is known at each of these times, one after the other."""
    import torch

    at = torch.as_tensor(times, dtype=torch.float64)
    for part, seen in look.visit(len(times), lambda part: way.at(at[part.start : part.stop]), "input.gradient"):
        yield from _stops_of(seen, way.speed(at[part.start : part.stop]), channels)


def _stops_of(seen: Look, speed: torch.Tensor, channels: bool) -> list[_Stop]:
    shares = (seen.gradient("input") * speed).float()
    shares = (shares if channels else shares.sum(1)).cpu()
    slopes = shares.double().flatten(1).sum(1)
    return [_Stop(*each) for each in zip(seen.scores.tolist(), slopes.tolist(), shares, strict=True)]


def _weighted(stops: Iterable[tuple[_Stop, float]]) -> torch.Tensor:
    """The sum of their shares, each with its weight."""
    import torch

    total = torch.zeros((), dtype=torch.float64)
    for stop, weight in stops:
        total = total + stop.share.double() * weight
    return total


def _out_of_blur(x: torch.Tensor, sigma: float, edge: str) -> Way:
    """The way on which a picture gets sharp: the blur goes down from `sigma` to 0 evenly with time."""
    import torch

    def blurs(times: torch.Tensor) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
        for time in times.tolist():
            yield [tuple(m.to(x) for m in gaussian(n, sigma * (1 - time), edge)) for n in sides(x)]  # type: ignore

    def at(times: torch.Tensor) -> torch.Tensor:
        return torch.cat([down @ x @ across.mT for (down, _), (across, _) in blurs(times)])

    def speed(times: torch.Tensor) -> torch.Tensor:
        both = [(d_down @ x @ across.mT + down @ x @ d_across.mT)
                for (down, d_down), (across, d_across) in blurs(times)]  # fmt: skip
        return -sigma * torch.cat(both)

    return Way(at, speed)


# ---------------------------------------------------------------------------------------------------------------------
# A guided step, baselines by lot, and what is said


def _guided_step(
    x: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    strength: torch.Tensor,
    time: float,
    fraction: float,
    max_dist: float,
) -> torch.Tensor:
    """The point where the distance to `end` is (1 - time) of the whole, reached by the values of least `strength`."""
    import torch

    low, high = (start + min(max(t, 0.0), 1.0) * (end - start) for t in (time - max_dist, time + max_dist))
    goal = float((end - start).abs().sum()) * (1 - time)
    rank = int(fraction * (x.numel() - 1)) + 1
    behind = (x - low) * (end - start).sign() < 0  # no value may fall behind
    x, strength = torch.where(behind, low, x), strength.clone()
    while (excess := float((end - x).abs().sum()) - goal) > 1e-9 * max(goal, 1.0):
        strength[x == high] = torch.inf  # as far as it may go
        free = (strength <= strength.flatten().kthvalue(rank).values) & (strength < torch.inf)
        room = float(((high - x).abs() * free).sum())
        if not room:
            break
        x = torch.where(free, high if excess >= room else x + excess / room * (high - x), x)
    return x


def _baselines(x: torch.Tensor, kind: Any, samples: int, draw: torch.Generator) -> torch.Tensor:
    """(K, C, H, W), or (K, C, 1, 1) where they are plain: what the samples start from."""
    import torch

    if isinstance(kind, str):
        if kind != "colors":
            raise errors.unknown("baselines", kind, ("colors",), " (or give a batch)")
        pixels = x[0].flatten(1)
        where = torch.randint(pixels.shape[1], (samples,), generator=draw).to(x.device)
        return pixels[:, where].T.reshape(samples, -1, *[1] * (x.dim() - 2))
    wanted = f"baselines= is a batch of pictures as the network sees them, (K, {', '.join(map(str, x.shape[1:]))})"
    try:
        given = torch.as_tensor(kind, dtype=x.dtype).detach()
    except (TypeError, ValueError, RuntimeError):
        raise errors.InputError(f'{wanted}, or "colors", not {type(kind).__name__}') from None
    given = given[None] if given.dim() == x.dim() - 1 else given
    if given.shape[1:] != x.shape[1:] or not len(given):
        raise errors.InputError(f"{wanted}, not {tuple(given.shape)}")
    if not bool(torch.isfinite(given).all()):
        raise errors.InputError("the baselines hold NaN or infinite numbers")
    return given


def _column(times: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return times.to(x).reshape(-1, *[1] * (x.dim() - 1))


def _at_least(least: int, **options: int) -> None:
    for name, value in options.items():
        if not isinstance(value, int) or value < least:
            raise errors.InputError(f"{name} is a whole number of at least {least}, not {value!r}")


def _say_complete(look: Look, total: float, start: float, steps: int) -> float:
    """What the map's sum misses of the score's change, as a share of it."""
    change = float(look.scores[0]) - start
    missing = _share(total - change, change, start)
    look.say(completeness_error=missing, baseline_score=start, steps=steps)
    return missing


def _share(missing: float, change: float, score: float) -> float:
    """`missing` as a share of `change`; where the score did not change, of what of it is more than rounding."""
    return abs(missing) / max(abs(change), 1e-6 * abs(score), 1e-30) if missing else 0.0


def _say_settled(look: Look, sums: torch.Tensor, starts: torch.Tensor) -> None:
    """What the mean of the samples misses of the score's change, and how sure that is."""
    misses, score = sums - (float(look.scores[0]) - starts), float(starts.mean())
    change = float(look.scores[0]) - score
    look.say(completeness_error=_share(float(misses.mean()), change, score), baseline_score=score, steps=len(misses))
    if len(misses) > 1:
        look.say(standard_error=_share(float(misses.std()) / len(misses) ** 0.5, change, score))
