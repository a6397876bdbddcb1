"""What a unit is said to see, against what its gradient reaches.

A network is made linear and positive: weights their absolute values, biases 0, normalisation by the statistics of no
data, activations the identity, maxima means, softmax and layer normalisation a sum over what they normalise. Then a
pixel counts for a unit exactly where the gradient is not 0. A field that calls itself exact must equal that support;
any other must contain it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from innersight import errors
from innersight.observe.geometry import Geometry, Layout, ReceptiveField, effective_box, trace
from innersight.observe.observer import (
    _ATTENTION,
    Recording,
    _run_attention_under,
    first_tensor,
    learn,
    op_name,
    raw_name,
)

# ---------------------------------------------------------------------------------------------------------------------
# The gradient's support

_IDENTITY = frozenset(
    "relu relu6 hardswish hardsigmoid hardtanh silu gelu mish sigmoid tanh elu leaky_relu dropout softplus".split()
)


class Positive(TorchFunctionMode):
    """Runs a recorded network made linear and keeps the values of the wanted calls, by position."""

    def __init__(self, wanted: set[int]):
        super().__init__()
        self.wanted, self.position, self.kept = wanted, -1, {}

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _ATTENTION:
            return _run_attention_under(self, args, kwargs)
        self.position += 1
        position = self.position
        out = self.linear(op_name(raw_name(func)), func, args, kwargs)
        if position in self.wanted:
            with torch._C.DisableTorchFunction():
                self.kept[position] = first_tensor(out).clone()
        return out

    def linear(self, op: str, func: Callable, args: tuple, kwargs: dict) -> Any:
        with torch._C.DisableTorchFunction():
            if op in _IDENTITY:
                return args[0]
            if op == "max_pool2d":
                k, s, p = (args[1:4] + (None, None, 0)[len(args) - 1 :])[:3]
                s, p = kwargs.get("stride", s), kwargs.get("padding", p)
                return F.avg_pool2d(args[0], k, s if s else k, p, ceil_mode=kwargs.get("ceil_mode", False))
            if op == "softmax":
                dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
                return args[0] + args[0].sum(dim, keepdim=True)
            if op == "layer_norm":
                return args[0] + args[0].sum(tuple(range(-len(args[1]), 0)), keepdim=True)
            if op == "group_norm":
                n, c, *space = args[0].shape
                parts = args[0].reshape(n, args[1], -1)
                return (parts + parts.sum(2, keepdim=True)).reshape(n, c, *space)
            if op == "scaled_dot_product_attention":
                q, k, v = (a if a is not None else kwargs[n] for a, n in zip(args[:3], ("query", "key", "value")))
                return q.sum(-1, keepdim=True) + k.sum((-1, -2), keepdim=True) + v.sum(-2, keepdim=True)
        return func(*args, **kwargs)


def positive(model: nn.Module) -> nn.Module:
    model = model.double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.copy_(torch.rand_like(p) + 0.5)
                p.div_(p.sum(tuple(range(1, p.dim())), keepdim=True))
            else:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
        for name, b in model.named_buffers():
            if b.is_floating_point() and "running" in name:
                b.fill_(0.0 if name.endswith("mean") else 1.0)
    return model


def compare(
    model: nn.Module, shape: tuple[int, ...], layers: int = 12, names: list[str] | None = None, seed: int = 0
) -> tuple[dict[str, int], list[str]]:
    """Counts of axis checks (equal, contained, wrong, exact but not equal) over some layers, and texts on the bad."""
    torch.manual_seed(0)
    model = positive(model)
    x = (torch.rand(shape, dtype=torch.float64) + 0.5).requires_grad_()
    recording = learn(model, x)
    found = trace(recording)
    nodes = [n for n in recording.nodes if n.position >= 0 and found[n.index] and found[n.index].layout.spatial]
    if names is not None:
        nodes = [recording.find(name) for name in names]
    elif len(nodes) > layers:
        nodes = sorted(random.Random(seed).sample(nodes, layers), key=lambda n: n.index)
    mode = Positive({n.position for n in nodes})
    with mode:
        model(x)
    counts = dict.fromkeys(("equal", "contained", "wrong", "false claim", "not exact"), 0)
    bad = []
    for node in nodes:
        geometry = found[node.index]
        maps = geometry.layout.to_grid(mode.kept[node.position])
        h, w = maps.shape[2:]
        for y, x_ in {(h // 2, w // 2), (0, 0), (h - 1, w - 1), (h // 3, w - 1 - w // 4)}:
            (g,) = torch.autograd.grad(maps[0, :, y, x_].sum(), x, retain_graph=True, allow_unused=True)
            seen = g[0].abs().sum(0).numpy() if g is not None else np.zeros(shape[2:])
            top, left, bottom, right = geometry.receptive_field.box(y, x_)
            for axis, begin, end in ((0, top, bottom), (1, left, right)):
                field = (geometry.receptive_field.y, geometry.receptive_field.x)[axis]
                where = np.flatnonzero(seen.any(1 - axis))
                first, last = (where[0], where[-1] + 1) if len(where) else (begin, begin)
                if (first, last) == (begin, end):
                    verdict = "equal"
                else:
                    verdict = "contained" if begin <= first and last <= end else "wrong"
                counts[verdict] += 1
                counts["not exact"] += not field.exact
                if verdict == "wrong" or (field.exact and verdict != "equal"):
                    counts["false claim"] += verdict != "wrong"
                    bad.append(f"{node.name} unit {y, x_} axis {axis}: said {begin, end}, is {first, last}")
    return counts, bad
