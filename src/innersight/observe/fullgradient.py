"""The plain gradient as a table with books: what of the score each bias on the way holds.

A network of homogeneous operations and biases is the sum of gradient x input and gradient x bias (Srinivas, Fleuret:
Full-Gradient Representation, NeurIPS 2019); of other operations, what they do not pass on is booked as theirs.
"""

from __future__ import annotations

from innersight.observe.composites import RELEVANCE, additive, affine, batch_norm, padding, plain
from innersight.observe.surrogates import (
    CONSTANT,
    CONVOLUTIONS,
    OWN,
    PRODUCTS,
    Op,
    Rules,
    Surrogate,
    Terms,
    Way,
    statistics,
    surrogate,
)


@surrogate
def weighted_sum(op: Op) -> Terms:
    """A linear map; its bias keeps its share."""
    linear = op.linear
    assert linear is not None
    through = linear.call(op.inputs[0], linear.weight)
    return through if linear.bias is None else {"input": through, "bias": linear.bias}


def weighted_sum_or_product(op: Op) -> Way | Surrogate:
    return plain if op.linear is None else weighted_sum


def fixed_batch_norm(op: Op) -> Way | Surrogate:
    return batch_norm if statistics(op.func, op.args, op.kwargs).fixed else plain


_STEPS = "argmax argmin argsort eq ne lt le gt ge logical_and logical_or logical_not logical_xor int long bool one_hot"
_KEPT = (OWN, additive, padding, affine)
FULL_GRADIENT = Rules(
    "the gradient",
    {
        **{name: entry if entry in _KEPT else plain for name, entry in RELEVANCE.items() if name != "var_mean"},
        **dict.fromkeys(_STEPS.split(), CONSTANT),
        **dict.fromkeys([*CONVOLUTIONS, *PRODUCTS], weighted_sum_or_product),
        "batch_norm": fixed_batch_norm,
    },
    fold=False,
)
