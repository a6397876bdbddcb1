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


@method(
    family="cam",
    reads=_READS,
    signed=False,
    paper="Chattopadhay et al.: Grad-CAM++, WACV 2018 (arXiv:1710.11063)",
)
def gradcam_plus_plus(look: Look) -> torch.Tensor:
    """Grad-CAM for several objects of one class: each place's positive gradient weighted by its share, summed.

    The weights are those of the paper's equation 19 for a score that is the exponential of the logit, where the higher
    derivatives are powers of the gradient; as pytorch-grad-cam has it.
    """
    a, g = look.value(), look.gradient()
    shared = 2 * g**2 + a.sum((2, 3), keepdim=True) * g**3
    alpha = (g**2 / (shared + 1e-6)).where(g != 0, 0)
    return (a * (alpha * g.relu()).sum((2, 3), keepdim=True)).sum(1).relu()


@method(
    family="cam",
    reads=_READS,
    signed=False,
    paper="Fu et al.: Axiom-based Grad-CAM, BMVC 2020 (arXiv:2008.02312)",
)
def xgradcam(look: Look, relu: bool = True) -> torch.Tensor:
    """Grad-CAM whose weights are means over the places where a map is active, after two axioms; positive part.

    relu: False keeps what speaks against the target, too.
    """
    a, g = look.value(), look.gradient()
    weights = (g * a).sum((2, 3), keepdim=True) / (a.sum((2, 3), keepdim=True) + 1e-7)
    cam = (a * weights).sum(1)
    return cam.relu() if relu else cam
