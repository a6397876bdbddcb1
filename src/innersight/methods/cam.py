"""Class activation maps: the feature maps of one layer, weighted by what they do to the score.

Each is a line of weighting over the layer's activations `a` and gradients `g`, both `(N, C, H, W)`. The maps have the
layer's own grid (`Saliency.coarse`, what other libraries agree with); the network lays each value over the picture at
the middle of what it sees, where other libraries stretch the grid from border to border.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from innersight.methods import Look, method

if TYPE_CHECKING:  # a list of the methods needs no torch
    import torch

_READS = ("layer.value", "layer.gradient")


@method(
    family="cam",
    reads=_READS,
    signed=False,
    paper="Selvaraju et al.: Grad-CAM, ICCV 2017 (arXiv:1610.02391)",
)
def gradcam(look: Look, relu: bool = True) -> torch.Tensor:
    """Where a layer holds evidence: its maps, each weighted by its mean gradient, summed, positive part.

    relu: False keeps what speaks against the target, too.
    """
    a, g = look.value(), look.gradient()
    cam = (a * g.mean((2, 3), keepdim=True)).sum(1)
    return cam.relu() if relu else cam


@method(
    family="cam",
    reads=_READS,
    signed=False,
    paper="Draelos, Carin: Use HiResCAM instead of Grad-CAM, 2020 (arXiv:2011.08891)",
)
def hirescam(look: Look, relu: bool = True) -> torch.Tensor:
    """Where a layer contributes to the score: its maps times their gradients, summed, positive part.

    Faithful where Grad-CAM, which averages the gradient over the picture, may point elsewhere.

    relu: False keeps what speaks against the target, too.
    """
    cam = (look.value() * look.gradient()).sum(1)
    return cam.relu() if relu else cam


@method(
    family="cam",
    reads=_READS,
    signed=False,
    paper="Jiang et al.: LayerCAM, IEEE TIP 2021",
)
def layercam(look: Look) -> torch.Tensor:
    """Fine maps from early layers: each value weighted by its own positive gradient, summed, positive part."""
    return (look.value() * look.gradient().relu()).sum(1).relu()
