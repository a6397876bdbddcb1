"""Methods that read the attention of transformers.

A look holds the attention matrices in run order, `(n, heads, T, T)` each, row i what token i takes from every token,
and `look.tokens`, which says where each token lies. The maps have the grid of the tokens (`Saliency.coarse`).

All of them follow the tokens that the score is read from: the class token; the mean of several (class and distillation
token, or every patch where the network averages them); the query of an attention pooling. Which these are is taken from
the network itself: a token that is not read has no gradient at the last attention. Class, register and other tokens
that are no part of the picture are left out of the map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from innersight import errors
from innersight.methods import Look, method

if TYPE_CHECKING:  # a list of the methods needs no torch
    import torch

    from innersight.observe.attention import AttentionMap

_HEADS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda a: a.mean(1),
    "max": lambda a: a.amax(1),
    "min": lambda a: a.amin(1),
}
_LAYERS = ("last", "all")


@method(
    family="attention",
    reads=("attention.value",),
    signed=False,
    passes="1 forward",
    unit="share of the attention",
    paper="Abnar, Zuidema: Quantifying Attention Flow in Transformers, ACL 2020 (arXiv:2005.00928)",
)
def attention_rollout(look: Look, head_fusion: str = "mean", discard: float = 0.0) -> torch.Tensor:
    """Where the score's tokens have looked, through all layers: the product of the attention matrices.

    Each layer counts half for its attention and half for the tokens it passes on. No gradient is in it, so of a
    classifier it is the same for every class.

    head_fusion: "mean", "max" or "min" over the heads; rows are made to sum to 1 again
    discard:     share of each layer's weights, the smallest, that is set to zero; the class token's own is kept
    """
    _check_option("head_fusion", head_fusion, _HEADS)
    if not 0 <= discard < 1:
        raise errors.InputError(f"discard is a share, at least 0 and below 1, not {discard}")

    def fused(m: AttentionMap) -> torch.Tensor:
        return _largest(_HEADS[head_fusion](m.value), discard, keep_own=m.square and 0 in look.tokens.special)

    return _followed(look, lambda m: _to_one(fused(m) + _eye(m)), lambda m: _to_one(fused(m)))


@method(
    family="attention",
    reads=("attention.value",),
    signed=False,
    passes="1 forward",
    unit="share of the attention",
    paper="Dosovitskiy et al.: An Image is Worth 16x16 Words, ICLR 2021 (arXiv:2010.11929)",
)
def attention_last(look: Look, head_fusion: str = "mean") -> torch.Tensor:
    """Where the score's tokens look in the last layer: its attention, as it is.

    What the tokens are made of by then is not asked: see attention_rollout. The same for every class.

    head_fusion: "mean", "max" or "min" over the heads
    """
    _check_option("head_fusion", head_fusion, _HEADS)
    m = look.attention[-1]
    return _of_the_score(look, _HEADS[head_fusion](m.value), m)


@method(
    family="attention",
    reads=("attention.value", "attention.gradient"),
    signed=False,
    paper="Chefer, Gur, Wolf: Generic Attention-model Explainability, ICCV 2021 (arXiv:2103.15679)",
)
def attention_relevance(look: Look) -> torch.Tensor:
    """Where the attention that speaks for the target comes from, through all layers: R += mean (dF/dA * A)+ R.

    R starts as the identity, which is taken off at the end: for a class token that leaves the published map; where the
    network averages its patches, it would add the same to all of them.
    """
    _refuse_without_gradient(look)
    found = _followed(look, lambda m: _for_the_target(m) + _eye(m), _for_the_target, less=1.0)
    return found.clamp(min=0)  # but for rounding it is


@method(
    family="attention",
    reads=("attention.value", "attention.gradient"),
    signed=False,
    paper="Gildenblat: Exploring Explainability for Vision Transformers, 2020 (gradient attention rollout)",
)
def attention_gradient(look: Look, layers: str = "last") -> torch.Tensor:
    """Attention times its gradient, mean over the heads, positive part: where attention speaks for the target.

    layers: "last", or "all" for the rollout of it through every layer, rows made to sum to 1
    """
    _check_option("layers", layers, _LAYERS)
    _refuse_without_gradient(look)

    def weighted(m: AttentionMap) -> torch.Tensor:
        return (m.value * _gradient(m)).mean(1).relu()

    m = look.attention[-1]
    if layers == "last":
        return _of_the_score(look, weighted(m), m)
    return _followed(look, lambda m: _to_one(weighted(m) + _eye(m)), weighted)


# ---------------------------------------------------------------------------------------------------------------------
# What they share


def _followed(
    look: Look,
    step: Callable[[AttentionMap], torch.Tensor],
    pooled: Callable[[AttentionMap], torch.Tensor],
    less: float = 0.0,
) -> torch.Tensor:
    """The product of the layers' `(n, T, T)`, the last on the left, as far as it reaches the score: `(n, h, w)`.

    pooled: of an attention pooling at the end, (n, 1, T), which passes nothing on besides
    less:   how much of the identity is taken off
    """
    *before, last = look.attention
    layers = [*before, last] if last.square else before
    flow = step(layers[0])
    for m in layers[1:]:
        flow = step(m) @ flow
    if last.square:
        return _of_the_score(look, flow - less * _eye(last), last)
    return _of_the_score(look, pooled(last) @ flow, last)


def _of_the_score(look: Look, relevance: torch.Tensor, last: AttentionMap) -> torch.Tensor:
    """`(n, T, T)` or, behind an attention pooling, `(n, 1, T)` as `(n, h, w)`: the rows of the tokens that are read."""
    if not last.square:
        return look.tokens.to_grid(relevance[:, 0])
    read = _read(look, last).to(relevance)
    return look.tokens.to_grid((read[:, None] @ relevance)[:, 0] / read.sum(1, keepdim=True))


def _read(look: Look, last: AttentionMap) -> torch.Tensor:
    """(n, T): 1 for the tokens that the score is read from, else 0."""
    special = look.tokens.special
    usual = last.value.new_zeros(last.value.shape[-1])
    if special:
        usual[special[0]] = 1
    else:
        usual += 1
    read = usual.expand(len(last.value), -1)
    if last.gradient is not None:
        moves = last.gradient.abs().sum((1, 3)) > 0
        read = moves.to(usual).where(moves.any(1, keepdim=True), read)  # a score that nothing moves: as usual
    count = int(read.sum(1).max())
    if count > 1:
        what = f"{count} tokens" if count < look.tokens.count else "all tokens"
        look.note(f"the score is read from {what}: the map is the mean of their rows")
    return read


def _largest(a: torch.Tensor, discard: float, keep_own: bool) -> torch.Tensor:
    """`(n, T, T)` with the share `discard` of the smallest of each image at zero."""
    flat = a.flatten(1)
    count = int(flat.shape[1] * discard)
    if not count:
        return a
    gone = flat.topk(count, largest=False).indices
    kept = flat.scatter(1, gone, 0)
    if keep_own:
        kept[:, 0] = flat[:, 0]
    return kept.view_as(a)


def _to_one(a: torch.Tensor) -> torch.Tensor:
    total = a.sum(-1, keepdim=True)
    return (a / total).where(total > 0, a)


def _eye(m: AttentionMap) -> torch.Tensor:
    return m.value.new_ones(m.value.shape[-1]).diag()


def _for_the_target(m: AttentionMap) -> torch.Tensor:
    return (m.value * _gradient(m)).relu().mean(1)


def _gradient(m: AttentionMap) -> torch.Tensor:
    """Attention that no path leads from to the score has no part in it."""
    return m.value.new_zeros(m.value.shape) if m.gradient is None else m.gradient


def _refuse_without_gradient(look: Look) -> None:
    if all(m.gradient is None for m in look.attention):
        raise errors.Unsupported(
            "the score does not depend on the attention in a way that has a gradient, so no map can be made from it; "
            "attention_rollout needs none"
        )


def _check_option(name: str, value: str, known: object) -> None:
    names = list(known)  # type: ignore[call-overload]
    if value not in names:
        raise errors.InputError(f"{name} is {', '.join(map(repr, names[:-1]))} or {names[-1]!r}, not {value!r}")
