"""Methods that read the gradient of the score with respect to the picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from innersight import errors
from innersight.methods import Look, method

if TYPE_CHECKING:  # a list of the methods needs no torch
    import torch


@method(
    family="gradient",
    reads=("input.gradient",),
    signed=False,
    unit="change of the score per unit of input",
    paper="Simonyan, Vedaldi, Zisserman: Deep Inside Convolutional Networks, 2013 (arXiv:1312.6034)",
)
def gradient(look: Look, channels: bool = False) -> torch.Tensor:
    """How strongly each pixel would move the score: the gradient, by its largest absolute value over the colors.

    channels: keep the colors apart and the sign, `(N, C, H, W)`.
    """
    g = look.gradient("input")
    return g if channels else g.abs().amax(1)


@method(
    family="gradient",
    reads=("input.value", "input.gradient"),
    unit="first-order share of the score",
    paper="Shrikumar et al.: Not Just a Black Box, 2016 (arXiv:1605.01713)",
)
def gradient_x_input(look: Look, channels: bool = False) -> torch.Tensor:
    """What each pixel contributes to first order: gradient times value, summed over the colors.

    The zero of the input is its baseline: for a normalized picture that is the mean color, not black.

    channels: keep the colors apart, `(N, C, H, W)`.
    """
    product = look.gradient("input") * look.value("input")
    return product if channels else product.sum(1)


@method(
    family="gradient",
    reads=("input.value",),
    visits=("input.gradient",),
    signed=False,
    unit="change of the score per unit of input",
    passes="25 forward, 25 backward, shared with squaregrad and vargrad",
    paper="Smilkov et al.: SmoothGrad, 2017 (arXiv:1706.03825)",
)
def smoothgrad(
    look: Look, noise: float = 0.15, samples: int = 25, seed: int = 0, channels: bool = False
) -> torch.Tensor:
    """The gradient averaged over noisy versions of the picture, which keeps what does not hang on single pixels.

    Averaged with its sign, then brought to one map as `gradient` is: by its largest absolute value over the colors.
    (The authors' code averages squares where asked for "magnitude": here squaregrad.) The verdict's `standard_error`
    is that of the average, as a share of it: near 1, the map is still the noise's.

    noise:    its standard deviation, as a share of the range of the picture's own values
    samples:  how many noisy versions
    seed:     which noise; smoothgrad, squaregrad and vargrad of one seed see the same
    channels: keep the colors apart and the sign, `(N, C, H, W)`
    """
    mean, _, variance = look.once(_under_noise, noise, samples, seed)
    if samples > 1 and bool(mean.any()):
        look.say(standard_error=(variance.sum() / (samples - 1)).sqrt() / mean.norm())
    return mean if channels else mean.abs().amax(1)


@method(
    family="gradient",
    reads=("input.value",),
    visits=("input.gradient",),
    signed=False,
    unit="(change of the score per unit of input)²",
    passes="25 forward, 25 backward, shared with smoothgrad and vargrad",
    paper="Hooker et al.: A Benchmark for Interpretability Methods in Deep Neural Networks, NeurIPS 2019 "
    "(arXiv:1806.10758)",
)
def squaregrad(
    look: Look, noise: float = 0.15, samples: int = 25, seed: int = 0, channels: bool = False
) -> torch.Tensor:
    """The squared gradient averaged over noisy versions of the picture; the largest over the colors.

    Slopes that change their sign from one version to the next do not cancel. Captum calls it smoothgrad_sq.

    noise, samples, seed: as in smoothgrad
    channels:             keep the colors apart, `(N, C, H, W)`
    """
    _, square, _ = look.once(_under_noise, noise, samples, seed)
    return square if channels else square.amax(1)


@method(
    family="gradient",
    reads=("input.value",),
    visits=("input.gradient",),
    signed=False,
    unit="variance of the change of the score per unit of input",
    passes="25 forward, 25 backward, shared with smoothgrad and squaregrad",
    paper="Adebayo et al.: Local Explanation Methods for Deep Neural Networks Lack Sensitivity to Parameter Values, "
    "2018 (arXiv:1810.03307)",
)
def vargrad(look: Look, noise: float = 0.15, samples: int = 25, seed: int = 0, channels: bool = False) -> torch.Tensor:
    """The variance of the gradient over noisy versions of the picture; the largest over the colors.

    High where the slope hangs on what else is in the picture. It is zero for a linear network, whatever its weights.
    The mean squared distance from the mean, as Captum has it; times samples / (samples - 1) it is free of bias.

    noise, samples, seed: as in smoothgrad; two samples or more
    channels:             keep the colors apart, `(N, C, H, W)`
    """
    if samples < 2:
        raise errors.InputError(f"a variance takes two samples or more, not samples={samples}")
    _, _, variance = look.once(_under_noise, noise, samples, seed)
    return variance if channels else variance.amax(1)


def _under_noise(look: Look, noise: float, samples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, mean square and variance of the gradient around the one picture, each (1, C, H, W)."""
    import torch

    if not noise > 0 or not isinstance(samples, int) or samples < 1:
        raise errors.InputError(
            "noise is a share of the picture's range, above 0, and samples a whole number of at least 1, "
            f"not {noise!r} and {samples!r}"
        )
    x = look.value("input")
    draw = torch.Generator().manual_seed(seed)
    sigma = noise * float(x.max() - x.min())
    if not sigma:
        look.note("a picture of one value has no range to take a share of, so no noise was added to it")

    def points(part: range) -> torch.Tensor:
        return torch.cat([x + sigma * torch.randn(x.shape, generator=draw).to(x) for _ in part])

    first, sums = None, torch.zeros(2, *x.shape, dtype=torch.float64)
    for _, seen in look.visit(samples, points, "input.gradient"):
        g = seen.gradient("input").float().cpu()
        first = g[:1] if first is None else first
        away = g - first  # sums of squares around something near lose no digits
        sums += torch.stack([away.sum(0, keepdim=True), away.square().sum(0, keepdim=True)])
    assert first is not None
    mean_away, square_away = sums / samples
    mean = first + mean_away
    variance = (square_away - mean_away.square()).clamp(min=0)
    return mean, mean.square() + variance, variance
