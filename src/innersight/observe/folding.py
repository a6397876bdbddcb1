"""Folding: what inference engines do to a network before they run it, for requests that run many points.

A BatchNorm in eval mode behind a convolution scales and shifts each channel, so it can be folded into the convolution's
weights: one pass over the map less, forward and backward. On a CPU the maps then lie channels-last, where the
arithmetic is faster. The model is not touched and not copied: at the convolution's position it is run with other
weights, at the BatchNorm's position its value is returned as it is.

Rounding differs. Values stay within 1e-5 of a plain run, gradients too where the network is smooth. Where units lie
within rounding of a ReLU's kink they fall to either side of it, in any float32 run: integrated gradients of an
untrained ResNet-18 (50 points) are 2.7e-3 of the largest value from double precision in plain torch, 2.1e-3 folded; on
a trained SqueezeNet (three photographs) 4e-4 to 5e-3, the same for both. In double precision both agree to 4e-8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from innersight.observe.observer import Call, Const, Node, Recording, Ref, Runner, Tap

_CONVOLUTIONS = {
    **dict.fromkeys(
        ("conv1d", "conv2d", "conv3d"), ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    ),
    **dict.fromkeys(
        ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        ("input", "weight", "bias", "stride", "padding", "output_padding", "groups"),
    ),
    "linear": ("input", "weight", "bias"),
}
_BATCH_NORMS: dict[Callable, tuple[str, ...]] = {
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    torch.batch_norm: ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
}


@dataclass
class _Convolution:
    """One call of a convolution: its weights as the model has them, and the BatchNorm that can be folded into them."""

    op: str
    weight: torch.Tensor
    bias: torch.Tensor | None
    groups: int
    stem: tuple[int, tuple[int, int]] | None = None  # stride and padding, if `_Stem` is the faster way back
    norm: Mapping[str, Any] = field(default_factory=dict)
    norm_at: int | None = None

    def key(self, folded: bool) -> tuple:
        """The same for two calls that run with the same weights."""
        return (id(self.weight), id(self.bias), *(map(id, self.norm.values()) if folded else ()))

    def folded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of the convolution and the BatchNorm in one; rounded once."""
        norm = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in self.norm.items()}
        scale = (norm["running_var"] + norm.get("eps", 1e-5)).rsqrt()
        scale = scale if norm.get("weight") is None else scale * norm["weight"]
        shift = -norm["running_mean"] if self.bias is None else self.bias.double() - norm["running_mean"]
        shift = shift * scale if norm.get("bias") is None else shift * scale + norm["bias"]
        weight = self.weight.double()
        if self.op.startswith("conv_transpose"):  # (in, out of one group, ...)
            each = scale.view(self.groups, 1, -1, *[1] * (weight.dim() - 2))
            weight = (weight.unflatten(0, (self.groups, -1)) * each).flatten(0, 1)
        else:
            weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
        return weight.to(self.weight), shift.to(self.weight)


class Folding:
    """A recording's convolutions with the BatchNorms behind them folded in, for as long as the model stays as it is.

    ways:   what can be tried, best first: memory formats of the maps; none if nothing would be gained
    agreed: what was asked for in the runs that were compared with a plain one
    """

    def __init__(self, module: nn.Module, recording: Recording):
        self.recording = recording
        self.convolutions: dict[int, _Convolution] = {}  # by position
        self.norms: dict[int, int] = {}  # position of a BatchNorm -> of its convolution
        self.agreed: set[tuple] = set()
        self._made: dict[tuple, tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]] = {}
        self._find({id(t): t for t in (*module.parameters(), *module.buffers())})
        self.ways = [torch.contiguous_format] if self.norms else []
        if any(c.op == "conv2d" and _fast_channels_last(c.weight) for c in self.convolutions.values()):
            self.ways.insert(0, torch.channels_last)

    def _find(self, tensors: Mapping[int, torch.Tensor]) -> None:
        nodes, calls = self.recording.nodes, self.recording.calls
        readers: dict[int, list[Node]] = {}
        for node in nodes:
            for i in node.inputs:
                readers.setdefault(i, []).append(node)
        answered = {ref.node for ref in self.recording.outputs}
        for node in nodes:
            if node.op not in _CONVOLUTIONS or node.kind == "opaque":
                continue
            given = _given(node, calls[node.position], _CONVOLUTIONS[node.op], tensors)
            if given is None or not _foldable(weight := given["weight"], given["bias"]):
                continue
            convolution = _Convolution(node.op, weight, given["bias"], given.get("groups", 1), _stem(node.op, given))
            behind = readers.get(node.index, [])
            alone = len(behind) == 1 and node.index not in answered and not self.recording.gaps
            norm = self._norm(node, behind[0], tensors) if alone else None
            if norm is not None:
                convolution.norm, convolution.norm_at = norm, behind[0].position
                self.norms[behind[0].position] = node.position
            if norm is not None or node.op != "linear":
                self.convolutions[node.position] = convolution

    def _norm(self, convolution: Node, node: Node, tensors: Mapping[int, torch.Tensor]) -> dict[str, Any] | None:
        """What the BatchNorm behind a convolution was given, if it only scales and shifts the channels."""
        call = self.recording.calls[node.position]
        if node.op != "batch_norm" or call.func not in _BATCH_NORMS:
            return None
        given = _given(node, call, _BATCH_NORMS[call.func], tensors)
        if given is None or given["input"] != Ref(convolution.index) or given.get("training"):
            return None
        if any(given.get(name) is None for name in ("running_mean", "running_var")):
            return None
        batched = 2 if convolution.op == "linear" else 2 + int(convolution.op[-2])  # else channels are elsewhere
        return {k: v for k, v in given.items() if k != "input"} if len(node.shape) == batched else None

    def weights(
        self, position: int, folded: bool, way: torch.memory_format
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Weight and bias that the convolution at this position is run with, and `_Stem`'s; made once, in no graph."""
        convolution = self.convolutions[position]
        key = (*convolution.key(folded), way)
        if key not in self._made:
            device = convolution.weight.device.type
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
                weight, bias = convolution.folded() if folded else (convolution.weight.detach(), convolution.bias)
                bias = None if bias is None else bias.detach()
                weight = weight.contiguous(memory_format=way if weight.dim() == 4 else torch.contiguous_format)
                back = None
                if convolution.stem is not None and way is torch.channels_last:
                    back = _phases(weight, convolution.stem[0]).contiguous(memory_format=way)
                self._made[key] = weight, bias, back
        return self._made[key]


def _given(
    node: Node, call: Call, names: tuple[str, ...], tensors: Mapping[int, torch.Tensor]
) -> dict[str, Any] | None:
    """The arguments of a call by name, weights as they are; None if a weight is not the model's own, but computed."""
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    held = {names[w] if isinstance(w, int) and w < len(names) else w: tensors.get(key) for w, key in call.held}
    given.setdefault("bias", None)
    for name in given:
        if name != "input" and isinstance(given[name], (Const, Ref)):
            if not isinstance(given[name], Const) or held.get(name) is None:
                return None
            given[name] = held[name]
    return given


def _foldable(weight: Any, bias: Any) -> bool:
    """In half precision folded weights would be rounded by more than the arithmetic is."""
    tensors = [weight] if bias is None else [weight, bias]
    return all(isinstance(t, torch.Tensor) and t.dtype in (torch.float32, torch.float64) for t in tensors)


def _fast_channels_last(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()


class Folded(Runner):
    """Runs the convolutions with folded weights and passes over their BatchNorms, except where a tap looks between."""

    def __init__(self, recording: Recording, taps: Mapping[int, Tap], stop: bool = False, cut: int | None = None, *,
                 folding: Folding):  # fmt: skip
        super().__init__(recording, taps, stop, cut)
        self.folding = folding
        self.way = folding.ways[0]
        self.tail = max((self.tail, *folding.convolutions, *folding.norms))  # up to there, each call as it was learnt

    def _run(self, position: int, call: Call, func: Callable, args: tuple, kwargs: dict) -> Any:
        convolution = self.folding.convolutions.get(position)
        if convolution is not None:
            folded = convolution.norm_at is not None and position not in self.taps
            with torch._C.DisableTorchFunction():
                weight, bias, back = self.folding.weights(position, folded, self.way)
            args, kwargs = _instead(args, kwargs, 1, "weight", weight)
            args, kwargs = _instead(args, kwargs, 2, "bias", bias)
            x = args[0] if args else kwargs["input"]
            if back is not None and position > self.cut and torch.is_grad_enabled() and x.requires_grad:
                assert convolution.stem is not None
                return _Stem.apply(x, weight, bias, back, *convolution.stem)
        elif (of := self.folding.norms.get(position)) is not None and of not in self.taps:
            return args[0] if args else kwargs["input"]
        return super()._run(position, call, func, args, kwargs)


def _instead(args: tuple, kwargs: dict, slot: int, name: str, value: Any) -> tuple[tuple, dict]:
    if slot < len(args):
        return (*args[:slot], value, *args[slot + 1 :]), kwargs
    return args, {**kwargs, name: value}


# ---------------------------------------------------------------------------------------------------------------------
# The way back through the first convolution


class _Stem(torch.autograd.Function):
    """A strided convolution of a picture, with a gradient that takes a third of the time.

    Each pixel of the gradient sums over the taps of the kernel that met it: with stride s, s*s kinds of pixels, each
    with taps of its own. So it is one dense convolution with s*s times as many channels, then a pixel shuffle. Torch's
    own way is slow where the input has few channels.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, back: torch.Tensor,
                stride: int, padding: tuple[int, int]) -> torch.Tensor:  # fmt: skip
        ctx.save_for_backward(back)
        ctx.how = x.shape[-2:], stride, padding
        return torch.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        (back,) = ctx.saved_tensors
        (height, width), stride, (top, left) = ctx.how
        taps = [k - 1 for k in back.shape[-2:]]
        whole = F.pixel_shuffle(torch.conv2d(g, back, padding=taps), stride)  # with the padding
        missing = [max(0, left + width - whole.shape[-1]), max(0, top + height - whole.shape[-2])]
        whole = F.pad(whole, (0, missing[0], 0, missing[1])) if any(missing) else whole
        return whole[..., top : top + height, left : left + width], None, None, None, None, None


def _phases(weight: torch.Tensor, s: int) -> torch.Tensor:
    """(out, in, h, w) of a convolution with stride s -> (in * s * s, out, h / s, w / s) of the way back."""
    h, w = (-(-k // s) for k in weight.shape[-2:])
    padded = F.pad(weight, (0, w * s - weight.shape[-1], 0, h * s - weight.shape[-2]))
    taps = padded.unflatten(3, (w, s)).unflatten(2, (h, s))  # out, in, tap, phase, tap, phase
    return taps.permute(1, 3, 5, 0, 2, 4).flatten(0, 2).flip(-1, -2)


def _stem(op: str, given: Mapping[str, Any]) -> tuple[int, tuple[int, int]] | None:
    if op != "conv2d" or given["weight"].shape[1] > 4 or min(given["weight"].shape[-2:]) < 4:
        return None
    stride, padding, dilation = (_pair(given.get(k, v)) for k, v in (("stride", 1), ("padding", 0), ("dilation", 1)))
    if isinstance(padding, str) or dilation != (1, 1) or given.get("groups", 1) != 1:
        return None
    return (stride[0], padding) if stride[0] == stride[1] > 1 else None


def _pair(value: Any) -> Any:
    if isinstance(value, str):
        return value
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * 2 if len(values) == 1 else values
