"""Methods that pass the score back by rules other than the gradient, set on operations."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from innersight.methods import Look, method

if TYPE_CHECKING:  # a list of the methods needs no torch
    import torch

    from innersight.observe.rules import Ruled

_ruled = partial(method, family="relevance", reads=(), visits=("rules",), passes="2 forward, 1 backward under rules")


@_ruled(
    unit="share of the score",
    paper="Bach et al.: On Pixel-Wise Explanations by Layer-Wise Relevance Propagation, PLoS ONE 2015",
)
def lrp(
    look: Look,
    composite: str = "auto",
    epsilon: float = 1e-6,
    gamma: float = 0.25,
    bias: bool = True,
    low: Any = None,
    high: Any = None,
    channels: bool = False,
) -> torch.Tensor:
    """How the score is made up of the pixels: passed back layer by layer, each giving to what it was made from.

    What does not reach the picture is in the verdict: the shares of biases, constants (class tokens, position tables),
    epsilon and softmax. All shares sum to 1; `conservation_error` says how well.

    composite: which rule each kind of layer has; "auto" chooses by the network and says so.
               epsilon: by contribution, everywhere; on networks of ReLU that is gradient times input.
               epsilon_plus, epsilon_plus_flat, epsilon_plus_w2: convolutions by positive contributions, linear layers
               by all; the first layer evenly, or by its squared weights.
               epsilon_gamma, epsilon_gamma_flat, epsilon_gamma_box: convolutions favor contributions of the sum's sign;
               the first layer evenly, or counted from the ends of the picture's range. Finer, signed.
               epsilon_alpha2_beta1, epsilon_alpha2_beta1_flat: convolutions by positive contributions, twice, less
               by negative ones; explodes on attention.
               zplus, alpha2_beta1, gamma: one rule everywhere.
               cp: gamma, with attention weights as constants (Ali et al. 2022); attnlrp: relevance passes the softmax
               too (Achtibat et al. 2024).
    epsilon:   what keeps small sums from counting; larger takes relevance away
    gamma:     by how much contributions of the sum's sign are favoured
    bias:      whether biases take part in the sums by which convolutions share out; without them more reaches the
               picture, but where a sum is little more than its bias, parts grow large
    low, high: the range of the input for epsilon_gamma_box, a number or one for each channel; default that of the image
    channels:  keep the colors apart, `(N, C, H, W)`
    """
    from innersight.observe.composites import composite as named

    options = {"epsilon": epsilon, "gamma": gamma, "bias": bias, "low": _hashable(low), "high": _hashable(high)}
    ruled = look.under(named(composite, **options))
    _tell(look, ruled)
    return ruled.relevance if channels else ruled.relevance.sum(1)


def _hashable(bound: Any) -> Any:
    return tuple(bound) if isinstance(bound, (list, tuple)) else bound


def _tell(look: Look, ruled: Ruled) -> None:
    """Where the score went, as shares of it."""
    score = ruled.scores.to(ruled.shares["input"])
    score = score.where(score.abs() > 1e-12, 1e-12)
    shares = {name: share / score for name, share in ruled.shares.items()}
    look.say(conservation_error=ruled.closure, **{f"{name}_share": share for name, share in shares.items()})
    reached = float(shares["input"].abs().median())
    if reached < 0.1:
        held, share = max(((n, float(s.median())) for n, s in shares.items() if n != "input"), key=lambda s: abs(s[1]))
        look.note(
            f"only {reached:.1%} of the score reaches the picture under {ruled.rules.name} ({held}: {share:.0%}), so "
            "the map explains little of it; another composite= may do better"
        )


@_ruled(
    signed=False,
    paper="Springenberg et al.: Striving for Simplicity, ICLR workshop 2015 (arXiv:1412.6806)",
)
def guided_backprop(look: Look, channels: bool = False) -> torch.Tensor:
    """The gradient with every negative signal stopped at each ReLU, on the way up and on the way back.

    Fine edges; what it draws depends more on the picture than on the class. By its largest absolute value over the
    colors. Networks without ReLU have the plain gradient, and are told.

    channels: keep the colors apart and the sign, `(N, C, H, W)`.
    """
    from innersight.observe.composites import GUIDED

    g = look.under(GUIDED).multiplier
    return g if channels else g.abs().amax(1)


@_ruled(
    signed=False,
    paper="Zeiler, Fergus: Visualizing and Understanding Convolutional Networks, ECCV 2014 (arXiv:1311.2901)",
)
def deconvolution(look: Look, channels: bool = False) -> torch.Tensor:
    """The score sent back through the transposed network, its ReLUs applied to what comes back.

    By its largest absolute value over the colors. Strided layers leave a grid in it.

    channels: keep the colors apart and the sign, `(N, C, H, W)`.
    """
    from innersight.observe.composites import DECONVOLUTION

    g = look.under(DECONVOLUTION).multiplier
    return g if channels else g.abs().amax(1)


@_ruled(
    reads=("layer.value", "layer.gradient"),
    signed=False,
    passes="2 forward, 2 backward, one under rules",
    paper="Selvaraju et al.: Grad-CAM, ICCV 2017 (arXiv:1610.02391)",
)
def guided_gradcam(look: Look, channels: bool = False) -> torch.Tensor:
    """Guided backprop where Grad-CAM finds evidence: the product of both, of the picture's size.

    By its largest absolute value over the colors.

    channels: keep the colors apart and the sign, `(N, C, H, W)`.
    """
    from torch.nn.functional import interpolate

    from innersight.methods.cam import gradcam
    from innersight.observe.composites import GUIDED

    g = look.under(GUIDED).multiplier
    product = g * interpolate(gradcam(look)[:, None], g.shape[-2:], mode="bilinear", align_corners=False)
    return product if channels else product.abs().amax(1)


@_ruled(
    unit="probability that a walk from the class ends here",
    paper="Zhang et al.: Top-down Neural Attention by Excitation Backprop, ECCV 2016 (arXiv:1608.00507)",
)
def excitation_backprop(look: Look, contrastive: bool = False, channels: bool = False) -> torch.Tensor:
    """Where a walk from the class down the network ends, steps taken in proportion to positive contributions.

    The first layer spreads what it gets evenly over the pixels it sees. In networks of convolutions and ReLU the map
    sums to 1; elsewhere `input_share` in the verdict says to what.

    contrastive: less the walk of the class with its weights negated, so that only what speaks for this class rather
                 than for any remains; the map then has both signs. For networks that end in a linear layer.
    channels:    keep the colors apart, `(N, C, H, W)`.
    """
    from innersight.observe.composites import CONTRASTIVE, EXCITATION

    ruled = look.under(CONTRASTIVE if contrastive else EXCITATION)
    score = ruled.scores.where(ruled.scores.abs() > 1e-12, 1e-12)
    walk = ruled.relevance / score.view(-1, *[1] * (ruled.relevance.dim() - 1))
    look.say(input_share=walk.flatten(1).sum(1))
    return walk if channels else walk.sum(1)
