"""Methods that take the score apart exactly, operation by operation: their terms sum to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from innersight.methods import Look, method
from innersight.methods.baselines import baseline as _baseline

if TYPE_CHECKING:  # a list of the methods needs no torch
    import torch


@method(
    family="decomposition",
    reads=("input.value",),
    visits=("rules",),
    unit="share of the score's difference from the baseline's",
    passes="2 forward, 1 backward under rules",
    paper="Shrikumar, Greenside, Kundaje: DeepLIFT, ICML 2017 (arXiv:1704.02685)",
)
def deeplift(look: Look, baseline: Any = "zero", channels: bool = False) -> torch.Tensor:
    """What each pixel adds to the score over that of a baseline, by differences of activations; sums to the difference.

    The rescale rule, set on operations: functional and reused activations, products, attention, norms and max pooling
    have their exact rule, so the sum is complete on any network. Libraries that hook modules (Captum) fall back to the
    gradient where no module is, and their sums are off by it. `verdict["completeness_error"]` is the difference left,
    relative to the score's.

    baseline: "zero" (the mean color of a normalized picture), "mean", "blur", numbers or a picture; see
              `methods.baselines`
    channels: keep the colors apart, `(N, C, H, W)`
    """
    start = _baseline(look, baseline)
    ruled = look.under(_deeplift(), baseline=start)
    rise = ruled.scores - ruled.baseline_scores
    noise = 1e-4 * ruled.scores.abs().maximum(ruled.baseline_scores.abs())  # what rounding of the scores can make of it
    error = (ruled.relevance.flatten(1).sum(1, dtype=rise.dtype) - rise).abs() / rise.abs().maximum(noise).clamp(1e-30)
    look.say(completeness_error=error, baseline_score=ruled.baseline_scores)
    return ruled.relevance if channels else ruled.relevance.sum(1)


@method(
    family="decomposition",
    reads=("input.value",),
    visits=("rules",),
    signed=False,
    unit="each layer's share brought to 1, summed over layers and channels",
    passes="1 forward, 1 backward",
    paper="Srinivas, Fleuret: Full-Gradient Representation, NeurIPS 2019 (arXiv:1905.00780)",
)
def fullgrad(look: Look) -> torch.Tensor:
    """The gradient times the picture and times every bias on the way: all layers' shares of the score in one map.

    The score is the sum of gradient x input and of gradient x bias of every operation; biases are those of convolutions
    and norms and, of activations that are not homogeneous (GELU, SiLU), what they add themselves. As the authors' code
    has it, each layer's shares are taken by size, brought to 0..1 over the layer and summed; layers without a place in
    the picture count in the sum alone. `verdict` tells the input's and the biases' share of the score, and what is left
    (completeness_error).
    """
    x = look.value("input")
    ruled = look.under(_full_gradient(), keep=lambda layer, own: (layer, _scaled(own)))
    total = _scaled(ruled.relevance)
    parts = [_over(part, x) for part in ruled.kept]  # one for all images, or one for each
    for i, each in enumerate(parts):
        rows = slice(None) if len(parts) == 1 else slice(i, i + 1)
        for layer_map in each:
            total[rows] += layer_map
    score = ruled.scores.double()
    look.say(
        completeness_error=ruled.closure,
        input_share=ruled.shares["input"] / score,
        bias_share=(ruled.shares["bias"] + ruled.shares["constant"] + ruled.shares["other"]) / score,
    )
    return total


def _scaled(own: torch.Tensor) -> torch.Tensor:
    """(n, C, H, W) by size, brought to 0..1 over each image, summed over channels."""
    size = own.abs().flatten(1)
    low = size.amin(1, keepdim=True)
    size = (size - low) / (size.amax(1, keepdim=True) - low).clamp(1e-30)
    return size.reshape(own.shape).sum(1)


def _over(kept: list, x: torch.Tensor) -> list[torch.Tensor]:
    return [layer.over_input(own, x.shape[-2:]) for layer, own in kept]


def _deeplift() -> Any:
    from innersight.observe.differences import DEEPLIFT

    return DEEPLIFT


def _full_gradient() -> Any:
    from innersight.observe.fullgradient import FULL_GRADIENT

    return FULL_GRADIENT
