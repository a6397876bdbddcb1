"""Attention under the observer: which layers are attention matrices, and which of their tokens are the picture.

A recording with `opened` holds the weights of fused attention as well. `matrices` finds them all, in run order;
`token_grid` says where each token lies, or refuses where the matrices are not over all tokens of one sequence.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from innersight import errors
from innersight.observe.dimensions import AXES, Atom, Dim, Tokens, along, atoms_of, size_of
from innersight.observe.geometry import Geometry, Layout
from innersight.observe.observer import FUSED, Node, Recording

if TYPE_CHECKING:
    import torch

_SOFTMAX = frozenset({"softmax", "_softmax"})
_PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "einsum", "mm", "addmm"})
# What may lie between the softmax and the product with the values without changing the matrix.
_CARRIES = frozenset("to to_copy float double half bfloat16 type type_as contiguous clone dropout view reshape expand "
                     "flatten unflatten squeeze unsqueeze transpose permute movedim swapaxes T mT".split())  # fmt: skip


@dataclass(frozen=True)
class AttentionMap:
    """One attention matrix of a batch, of all heads.

    name:     the layer that makes it: a softmax, or fused attention
    value:    (N, heads, T, T), each row what one token takes from every token; (N, heads, 1, T) of a single query;
              where it is neither, as the network holds it
    gradient: of the summed scores by it, in the same shape; None where it was not asked for, or there is none
    """

    name: str
    value: torch.Tensor
    gradient: torch.Tensor | None = None

    def of(self, images: slice) -> AttentionMap:
        """Of these images alone."""
        gradient = None if self.gradient is None else self.gradient[images]
        return AttentionMap(self.name, self.value[images], gradient)

    @property
    def square(self) -> bool:
        return self.value.shape[-1] == self.value.shape[-2]


@dataclass(frozen=True)
class TokenGrid:
    """Where the tokens of the attention lie in the picture.

    count:   how many there are
    special: which of them are no part of it: class, distillation and register tokens
    grid:    rows and columns of the others
    """

    count: int
    special: tuple[int, ...]
    grid: tuple[int, int]
    layout: Layout

    def to_grid(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, T), a number for each token, as (n, h, w), without the special ones."""
        return self.layout.to_grid(rows[:, None])[:, 0]


def matrices(recording: Recording) -> list[Node]:
    """The attention matrices of a run in order: softmaxes over a last dimension that weigh values, or are square."""
    found = [n for n in recording.layers if n.op in _SOFTMAX and len(n.shape) >= 3 and n.shape[-1] > 1 and _by_row(n)]
    if not found:
        return []
    readers = _readers(recording)
    return [n for n in found if _square(n) or _changed(n, readers) is None]


def name_of(node: Node) -> str:
    """The layer of the network that makes this matrix: fused attention is one layer."""
    if node.path.rpartition(".")[2] != FUSED:
        return node.name
    return node.path + node.name.removeprefix(f"{node.path}.softmax")


def as_map(node: Node, value: torch.Tensor, gradient: torch.Tensor | None, real: int, filled: int) -> AttentionMap:
    """What was read at a node as an AttentionMap of `real` images, of `filled` that were run."""

    def shaped(t: torch.Tensor) -> torch.Tensor:
        n = real if t.shape[0] == real else filled
        merged = t.dim() == 3 and t.shape[0] % n == 0  # images and heads in one dimension, the images first
        if merged or t.shape[0] == n:
            t = t.reshape(n, -1, *t.shape[-2:])
        return t[:real] if t.shape[0] == filled else t

    return AttentionMap(name_of(node), shaped(value), None if gradient is None else shaped(gradient))


def token_grid(recording: Recording, traced: Sequence[Geometry | None], method: str, network: str) -> TokenGrid:
    """Where the tokens lie that all attention of the network is over.

    traced: `geometry.trace(recording)`
    Raises Unsupported, naming `method` and `network`, where there is no attention or it is not over all tokens.
    """
    nodes = matrices(recording)
    pooled = len(nodes) > 1 and not _square(nodes[-1]) and nodes[-1].shape[-2] == 1  # a query that reads the others
    squares = nodes[:-1] if pooled else nodes
    if not nodes:
        raise errors.Unsupported(f"{method} reads attention, and {network} has none")

    def refuse(why: str) -> errors.Unsupported:
        return errors.Unsupported(f"{method} is defined for attention over all tokens; {network} {why}")

    readers = _readers(recording)
    for node in nodes:
        if (op := _changed(node, readers)) is not None:
            raise refuse(f"changes its attention between softmax and use, by {op} (behind {name_of(node)!r})")
    for node in squares:
        if (why := _elsewhere(node, traced[node.index])) is not None:
            raise refuse(f"{why} (at {name_of(node)!r})")
    first, last = squares[0], squares[-1]
    dims = [_tokens_of(traced[n.index]) for n in squares]
    for node, dim in zip(nodes, [*dims, *dims[-1:]] if pooled else dims, strict=True):
        if _shape_of(dim) != _shape_of(dims[0]) or node.shape[-1] != first.shape[-1]:
            raise refuse(
                f"has {first.shape[-1]} of them at {name_of(first)!r} and {node.shape[-1]} at {name_of(node)!r}"
            )
    for node in recording.nodes[first.index : last.index]:
        if _mixes(node):
            raise refuse(f"mixes them by {node.op} as well ({node.name!r})")
    for node, behind in itertools.pairwise(nodes):
        if not _leads(node, behind, readers):
            raise errors.Unsupported(
                f"{method} is defined for attention layer after layer; {network} runs some side by side "
                f"({name_of(node)!r}, {name_of(behind)!r})"
            )
    dim = dims[0]
    layout = traced[first.index].layout  # type: ignore[union-attr]
    rows, columns = (math.prod(a.size for a in atoms_of(dim) if a.axis == axis) for axis in AXES)
    tokens = dim[0] if isinstance(dim[0], Tokens) else Tokens(0, tuple(atoms_of(dim)), 0)
    special = (*range(tokens.prefix), *range(tokens.size - tokens.suffix, tokens.size))
    own = Layout(("n", "c", "t"), (rows, columns), dims=((Atom("n", 1),), (Atom("c", 1),), dim), roll=layout.roll)
    return TokenGrid(tokens.size, special, (rows, columns), own)


def _square(node: Node) -> bool:
    return node.shape[-1] == node.shape[-2]


def _by_row(node: Node) -> bool:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis"))
    return dim in (-1, len(node.shape) - 1)


def _readers(recording: Recording) -> dict[int, list[Node]]:
    found: dict[int, list[Node]] = {}
    for node in recording.nodes:
        for i in node.inputs:
            found.setdefault(i, []).append(node)
    return found


def _changed(node: Node, readers: dict[int, list[Node]]) -> str | None:
    """What is done to a matrix before it weighs anything; None if it weighs values as it is."""
    waiting, changes = [node], []
    while waiting:
        for reader in readers.get(waiting.pop().index, ()):
            if reader.op in _PRODUCTS:
                return None
            if reader.kind in ("view", "copy") and reader.op in _CARRIES:
                waiting.append(reader)
            elif reader.kind not in ("sink", "other"):
                changes.append(reader.op)
    return changes[0] if changes else "nothing that can be seen"


def _tokens_of(geometry: Geometry | None) -> Dim:
    return geometry.layout.dims[-2] if geometry is not None else ()


def _shape_of(dim: Dim) -> tuple:
    return tuple((a.prefix, _shape_of(a.atoms), a.suffix) if isinstance(a, Tokens) else (a.axis, a.size) for a in dim
                 if a.size > 1)  # fmt: skip


def _elsewhere(node: Node, geometry: Geometry | None) -> str | None:
    """What this attention is over, where that is not all tokens; None where it is."""
    if not _square(node):
        return f"looks from {node.shape[-2]} at {node.shape[-1]}"
    if geometry is None or geometry.layout.guessed or not geometry.layout.dims:
        return f"attends over {node.shape[-1]} things whose place in the picture could not be followed"
    dims = geometry.layout.dims
    space = along(dims[-2], *AXES)
    if not space and any(along(dim, *AXES) for dim in dims[:-2]):
        return "attends within each patch"
    if not space:
        return f"attends between {'channels' if along(dims[-2], 'c') else 'what has no place in the picture'}"
    if any(along(dim, *AXES) for dim in dims[:-2]):
        sides = "x".join(str(math.prod(a.size for a in space if a.axis == axis)) for axis in AXES)
        return f"attends within windows of {sides} tokens"
    plain = all(isinstance(a, Tokens) or a.axis in AXES for a in dims[-2] if a.size > 1)
    nested = len(dims[-2]) > 1 and any(isinstance(a, Tokens) for a in dims[-2])
    first = next(iter(dims[0]), None)
    if not plain or nested or size_of(dims[-2]) != node.shape[-1] or not isinstance(first, Atom) or first.axis != "n":
        return f"attends over {node.shape[-1]} things that are not tokens of the picture alone"
    return None


def _leads(node: Node, behind: Node, readers: dict[int, list[Node]]) -> bool:
    """Whether what `behind` makes depends on what `node` made."""
    waiting, met = [node.index], {node.index}
    while waiting:
        for reader in readers.get(waiting.pop(), ()):
            if reader.index == behind.index:
                return True
            if reader.index < behind.index and reader.index not in met:
                met.add(reader.index)
                waiting.append(reader.index)
    return False


def _mixes(node: Node) -> bool:
    """Whether an operation lets tokens see their neighbors without attention."""
    if "pool" in node.op:
        return True
    if not node.op.startswith("conv"):
        return False
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    return any(size > 1 for size in getattr(weight, "shape", ())[2:])
