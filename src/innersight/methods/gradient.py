"""Methods that read the gradient of the score with respect to the picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    """How strongly each pixel would move the score: the gradient, by its largest absolute value over the colours.

    channels: keep the colours apart and the sign, `(N, C, H, W)`.
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
    """What each pixel contributes to first order: gradient times value, summed over the colours.

    The zero of the input is its baseline: for a normalised picture that is the mean colour, not black.

    channels: keep the colours apart, `(N, C, H, W)`.
    """
    product = look.gradient("input") * look.value("input")
    return product if channels else product.sum(1)
