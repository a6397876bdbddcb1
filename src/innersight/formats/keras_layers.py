"""Keras layers and operations as torch calls: one builder a class, in the tables LAYERS and OPERATIONS.

Keras counts axes its own way, mostly with channels last. A value here is a tensor and a flag: `moved` says that Keras's
last axis stands on axis 1 of the tensor, as torch wants it. Convolutions and pools take and give moved values; what
acts on "the last axis" or on Keras's order of the numbers takes a view in that order. So pictures stay `(N, C, H, W)`.

Where Keras's engines differ, these follow TensorFlow.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from innersight.errors import InputError, Unsupported

MAX_VALUE = 1 << 29
"""Numbers in the largest value that a layer may make of one picture; a file of a few bytes can ask for any size."""


def allow(shape: Sequence[int]) -> None:
    """Raises InputError for a value (N, ...) that is larger than any network's."""
    if math.prod(shape[1:]) > MAX_VALUE:
        raise InputError(f"it would make a value of shape {tuple(shape)}, larger than networks of pictures need")


@dataclass(frozen=True)
class Value:
    """A tensor; `moved`: Keras's last axis is axis 1 of it."""

    tensor: torch.Tensor
    moved: bool = False

    @property
    def rank(self) -> int:
        return self.tensor.dim()


Weights = Mapping[str, torch.Tensor]
Apply = Callable[..., Any]  # (weights, *arguments of the layer's call, **keywords) -> Value


@dataclass
class Build:
    """What a builder reads: the layer's configuration and, in the order Keras makes them, its weights.

    fetch:  (names it may have, index, shape) -> array
    keep:   the weights as the layer's call will receive them
    keras2: the file was written by Keras 2 or older
    custom: what stands for the user's own activations
    """

    name: str
    kind: str
    config: dict[str, Any]
    fetch: Callable[[str, int, Sequence[int | None] | None], np.ndarray]
    keras2: bool = False
    custom: Mapping[str, Any] = field(default_factory=dict)
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    modules: dict[str, torch.nn.Module] = field(default_factory=dict)
    taken: int = 0

    def weight(self, names: str, shape: Sequence[int | None] | None = None, turn: Callable = lambda a: a) -> str:
        """Take the next weight and keep it, turned to torch's order, under the last of its `names` ("a|b").

        Raises InputError where the file has none or one of another shape (None: any size).
        """
        array = self.fetch(names, self.taken, shape)
        self.taken += 1
        name = names.rpartition("|")[2]
        self.kept[name] = torch.from_numpy(np.array(turn(array), np.float32, order="C", copy=True))
        return name

    def bias(self, size: int | None) -> None:
        if self.config.get("use_bias", True):
            self.weight("bias", (size,))

    def ints(self, key: str, n: int, default: int | None = None) -> tuple[int, ...]:
        """A setting given as one number or n of them."""
        value = self.config.get(key, default)
        value = [value] * n if isinstance(value, int) else value
        if not isinstance(value, (list, tuple)) or len(value) != n or not all(type(v) is int for v in value):
            raise self.wrong(f"{key}={value!r}; expected {n} whole numbers")
        return tuple(value)

    def int(self, key: str, default: int | None = None) -> int:
        return self.ints(key, 1, default)[0]

    def number(self, key: str, default: float) -> float:
        value = _plain(self.config.get(key, default))
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong(f"{key}={value!r}; expected a number")
        return float(value)

    def choice(self, key: str, default: str, known: Iterable[str]) -> str:
        value = self.config.get(key) or default
        value = value.lower() if isinstance(value, str) else value
        if value not in tuple(known):
            raise Unsupported(f"{self.kind} {self.name!r} has {key}={value!r}; innersight knows {', '.join(known)}")
        return str(value)

    def wrong(self, what: str) -> InputError:
        return InputError(f"{self.kind} {self.name!r} has {what}")

    def activation(self, default: Any = None) -> Callable[[Value], Value]:
        return activation(self, self.config.get("activation", default))


def _plain(value: Any) -> Any:
    """A number that Keras wrapped: {"class_name": "__numpy__", "config": {"value": 6.0}}."""
    while isinstance(value, dict):
        inner = value.get("config", value.get("value"))
        value = inner.get("value") if isinstance(inner, dict) else inner
    return value


# --- layouts ---------------------------------------------------------------------------------------------------------


def keras_order(v: Value) -> torch.Tensor:
    return v.tensor.movedim(1, -1) if v.moved else v.tensor


def channels_first(v: Value) -> torch.Tensor:
    """Keras's last axis on axis 1."""
    return v.tensor if v.moved or v.rank < 3 else v.tensor.movedim(-1, 1)


def axis_in(v: Value, axis: int) -> int:
    """Where Keras's axis stands in the tensor."""
    if not -v.rank <= axis < v.rank:
        raise InputError(f"axis {axis} of a value with {v.rank} axes")
    axis %= v.rank
    if not v.moved or axis == 0:
        return axis
    return 1 if axis == v.rank - 1 else axis + 1


def unary(fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Value], Value]:
    return lambda v: Value(fn(v.tensor), v.moved)


def aligned(values: Sequence[Any], batch_first: bool = False) -> tuple[list[Any], bool]:
    """Values (and numbers) so that torch broadcasts them as Keras does, and whether they are moved.

    batch_first: missing axes are put in behind the batch, as merging layers do, instead of in front.
    """
    values = list(values)
    tensors = [v for v in values if isinstance(v, Value)]
    rank = max((v.rank for v in tensors), default=0)
    moved = any(v.moved for v in tensors)
    out: list[Any] = []
    for v in values:
        if not isinstance(v, Value):
            out.append(v)
        elif v.rank == 0:
            out.append(v.tensor)
        elif v.rank == rank:
            out.append(channels_first(v) if moved else v.tensor)
        else:
            t, lacks = keras_order(v), rank - v.rank
            shape = (t.shape[0], *[1] * lacks, *t.shape[1:]) if batch_first else (*[1] * lacks, *t.shape)
            t = t.reshape(shape)
            out.append(t.movedim(-1, 1) if moved else t)
    sizes = [v.shape for v in out if isinstance(v, torch.Tensor) and v.dim() == rank]
    allow([max(axis) for axis in zip(*sizes, strict=True)])
    return out, moved


def spatial(b: Build, n: int) -> tuple[Callable[[Value], torch.Tensor], bool]:
    """How a layer over n axes of space sees a value, with channels on axis 1, and whether what it makes is moved."""
    first = b.choice("data_format", "channels_last", ("channels_last", "channels_first")) == "channels_first"

    def look(v: Value) -> torch.Tensor:
        if v.rank != n + 2:
            raise InputError(f"expected {n + 2} axes, got {v.rank}")
        return keras_order(v) if first else channels_first(v)

    return look, not first


def same(sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> list[tuple]:
    """(before, after) for each axis, as padding="same" has it: the odd one goes behind."""
    pads = []
    for n, k, s, d in zip(sizes, kernel, stride, dilation, strict=True):
        total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        pads.append((total // 2, total - total // 2))
    return pads


def padded(x: torch.Tensor, pads: Sequence[tuple], value: float = 0.0) -> torch.Tensor:
    if not any(map(any, pads)):
        return x
    lead = x.dim() - len(pads)
    allow((*x.shape[:lead], *(n + a + b for n, (a, b) in zip(x.shape[lead:], pads, strict=True))))
    return F.pad(x, [side for pair in reversed(pads) for side in pair], value=value)


# --- activations -----------------------------------------------------------------------------------------------------


def _squareplus(x: torch.Tensor, b: float = 4.0) -> torch.Tensor:
    return (x + torch.sqrt(x * x + b)) / 2


def _sparse_plus(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x <= -1, torch.zeros_like(x), torch.where(x < 1, 0.25 * (x + 1) ** 2, x))


ELEMENTWISE: dict[str, Callable[..., torch.Tensor]] = {
    "linear": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "mish": F.mish,
    "exponential": torch.exp,
    "hard_sigmoid": F.hardsigmoid,
    "hard_silu": F.hardswish,
    "hard_swish": F.hardswish,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "log_sigmoid": F.logsigmoid,
    "hard_tanh": F.hardtanh,
    "hard_shrink": F.hardshrink,
    "soft_shrink": F.softshrink,
    "tanh_shrink": F.tanhshrink,
    "squareplus": _squareplus,
    "sparse_plus": _sparse_plus,
}


def _hard_sigmoid_of_keras2(x: torch.Tensor) -> torch.Tensor:
    return torch.clamp(0.2 * x + 0.5, 0.0, 1.0)


def _softmax(axis: int | Sequence[int] = -1, log: bool = False) -> Callable[[Value], Value]:
    def apply(v: Value) -> Value:
        if not isinstance(axis, int):
            axes = [axis_in(v, a) for a in axis]
            shifted = v.tensor - v.tensor.amax(axes, keepdim=True)
            return Value(torch.exp(shifted - torch.logsumexp(shifted, axes, keepdim=True)), v.moved)
        fn = F.log_softmax if log else F.softmax
        return Value(fn(v.tensor, axis_in(v, axis)), v.moved)

    return apply


def activation(b: Build, spec: Any) -> Callable[[Value], Value]:
    """An activation by name, as {"class_name": "function", "config": name}, or as a layer."""
    name = spec
    if isinstance(spec, dict):
        config = spec.get("config")
        if isinstance(config, str):
            name = config
        elif spec.get("class_name") in LAYERS:
            inner = Build(b.name, str(spec["class_name"]), dict(config or {}), _no_weights(b), b.keras2, b.custom)
            apply = LAYERS[inner.kind](inner)
            return lambda v: apply({}, v)
        else:
            name = spec.get("class_name")
    if name in b.custom and isinstance(name, str):
        module = b.custom[name]({}, [])
        if not isinstance(module, torch.nn.Module):
            raise InputError(f"custom={{{name!r}: ...}} must return a torch.nn.Module, got {type(module).__name__}")
        b.modules["activation"] = module.eval()
        return lambda v: Value(module(v.tensor), v.moved)
    if name is None or name == "linear":
        return lambda v: v
    if name == "softmax":
        return _softmax()
    if name == "log_softmax":
        return _softmax(log=True)
    if name == "hard_sigmoid" and b.keras2:
        return unary(_hard_sigmoid_of_keras2)
    if name not in ELEMENTWISE or not isinstance(name, str):
        raise Unsupported(
            f"{b.kind} {b.name!r} has the activation {name!a}, which innersight does not know; custom= takes "
            "what stands for it"
        )
    return unary(ELEMENTWISE[name])


def _no_weights(b: Build) -> Callable:
    def fetch(names: str, *_: Any) -> np.ndarray:
        raise Unsupported(f"{b.kind} {b.name!r} has an activation with weights of its own ({names})")

    return fetch


# --- convolutions ----------------------------------------------------------------------------------------------------

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def _convolution(b: Build, n: int) -> Callable[[torch.Tensor, torch.Tensor, Any, int], torch.Tensor]:
    """`run(x, kernel, bias, groups)` with the strides and padding of the configuration."""
    kernel, stride, dilation = b.ints("kernel_size", n), b.ints("strides", n, 1), b.ints("dilation_rate", n, 1)
    padding = b.choice("padding", "valid", ("valid", "same", "causal") if n == 1 else ("valid", "same"))
    if min(*kernel, *stride, *dilation) < 1:
        raise b.wrong("a kernel, stride or dilation below 1")

    def run(x: torch.Tensor, weight: torch.Tensor, bias: Any, groups: int = 1) -> torch.Tensor:
        pads = [(0, 0)] * n
        if padding == "same":
            pads = same(x.shape[2:], kernel, stride, dilation)
        elif padding == "causal":
            pads = [(dilation[0] * (kernel[0] - 1), 0)]
        even = tuple(before for before, _ in pads)
        sides = zip(x.shape[2:], pads, kernel, stride, dilation, strict=True)
        out = [(n + p + q - (k - 1) * d - 1) // s + 1 for n, (p, q), k, s, d in sides]
        allow((x.shape[0], weight.shape[0], *out))
        if any(before != after for before, after in pads):
            x, even = padded(x, pads), (0,) * n
        return _CONV[n](x, weight, bias, stride, even, dilation, groups)

    return run


def conv(n: int) -> Callable[[Build], Apply]:
    def build(b: Build) -> Apply:
        look, moved = spatial(b, n)
        run, groups, filters = _convolution(b, n), b.int("groups", 1), b.int("filters")
        b.weight("kernel", (*b.ints("kernel_size", n), None, filters), lambda k: k.transpose(n + 1, n, *range(n)))
        b.bias(filters)
        act = b.activation()
        return lambda w, v: act(Value(run(look(v), w["kernel"], w.get("bias"), groups), moved))

    return build


def _depthwise_kernel(kernel: np.ndarray) -> np.ndarray:
    """(h, w, C, m) -> (C * m, 1, h, w)."""
    n = kernel.ndim - 2
    return kernel.transpose(n, n + 1, *range(n)).reshape(-1, 1, *kernel.shape[:n])


def depthwise(n: int) -> Callable[[Build], Apply]:
    def build(b: Build) -> Apply:
        look, moved = spatial(b, n)
        run, multiplier = _convolution(b, n), b.int("depth_multiplier", 1)
        b.weight("depthwise_kernel|kernel", (*b.ints("kernel_size", n), None, multiplier), _depthwise_kernel)
        b.bias(None)
        act = b.activation()

        def apply(w: Weights, v: Value) -> Value:
            x = look(v)
            return act(Value(run(x, w["kernel"], w.get("bias"), x.shape[1]), moved))

        return apply

    return build


def separable(n: int) -> Callable[[Build], Apply]:
    def build(b: Build) -> Apply:
        look, moved = spatial(b, n)
        run, multiplier, filters = _convolution(b, n), b.int("depth_multiplier", 1), b.int("filters")
        b.weight("depthwise_kernel", (*b.ints("kernel_size", n), None, multiplier), _depthwise_kernel)
        one = (1,) * n
        b.weight("pointwise_kernel", (*one, None, filters), lambda k: k.transpose(n + 1, n, *range(n)))
        b.bias(filters)
        act = b.activation()

        def apply(w: Weights, v: Value) -> Value:
            x = look(v)
            y = run(x, w["depthwise_kernel"], None, x.shape[1])
            return act(Value(_CONV[n](y, w["pointwise_kernel"], w.get("bias")), moved))

        return apply

    return build


def transposed(n: int) -> Callable[[Build], Apply]:
    """Transposed convolution, cut as TensorFlow cuts it.

    Torch can cut the same at both ends or more in front. Where more is cut behind, a row of zeros in front makes the
    whole longer by a stride, so that more is cut in front.
    """

    def build(b: Build) -> Apply:
        look, moved = spatial(b, n)
        kernel, stride, dilation = b.ints("kernel_size", n), b.ints("strides", n, 1), b.ints("dilation_rate", n, 1)
        padding = b.choice("padding", "valid", ("valid", "same"))
        extra = None if b.config.get("output_padding") is None else b.ints("output_padding", n)
        filters = b.int("filters")
        b.weight("kernel", (*kernel, filters, None), lambda k: k.transpose(n + 1, n, *range(n)))
        b.bias(filters)
        act = b.activation()

        def cut(size: int, axis: int) -> tuple[int, int, int]:
            """Rows of zeros in front, torch's padding, torch's output_padding."""
            s, k = stride[axis], (kernel[axis] - 1) * dilation[axis] + 1
            if extra is not None:
                out = (size - 1) * s + k + extra[axis] - (2 * (k // 2) if padding == "same" else 0)
            else:
                out = size * s + (0 if padding == "same" else max(k - s, 0))
            full = (size - 1) * s + k
            before = max(full - out, 0) // 2 if padding == "same" else 0
            behind = out - full + 2 * before
            return (0, before, behind) if behind >= 0 else (1, before + s, behind + s)

        def apply(w: Weights, v: Value) -> Value:
            x = look(v)
            cuts = [cut(size, axis) for axis, size in enumerate(x.shape[2:])]
            x = padded(x, [(front, 0) for front, _, _ in cuts])
            before, behind = tuple(c[1] for c in cuts), tuple(c[2] for c in cuts)
            full = [
                (n - 1) * s + (k - 1) * d + 1 for n, s, k, d in zip(x.shape[2:], stride, kernel, dilation, strict=True)
            ]
            allow((x.shape[0], filters, *full))
            y = _TRANSPOSED[n](x, w["kernel"], w.get("bias"), stride, before, behind, 1, dilation)
            return act(Value(y, moved))

        return apply

    return build


# --- pools, paddings, sizes ------------------------------------------------------------------------------------------

_POOLS: dict[tuple[str, int], Callable[..., torch.Tensor]] = {
    ("max", 1): F.max_pool1d, ("max", 2): F.max_pool2d, ("max", 3): F.max_pool3d,
    ("average", 1): F.avg_pool1d, ("average", 2): F.avg_pool2d, ("average", 3): F.avg_pool3d,
}  # fmt: skip


def pool(which: str, n: int) -> Callable[[Build], Apply]:
    """Pools; with padding="same" the cells of the padding win no maximum and do not count in an average.

    More padding behind than in front is torch's ceil_mode, except where a window of even size moves by one.
    """

    def build(b: Build) -> Apply:
        look, moved = spatial(b, n)
        size = b.ints("pool_size", n, 2)
        stride = size if b.config.get("strides") is None else b.ints("strides", n)
        whole = b.choice("padding", "valid", ("valid", "same")) == "same"
        if min(*size, *stride) < 1:
            raise b.wrong("a pool or stride below 1")
        run = _POOLS[which, n]

        def apply(_: Weights, v: Value) -> Value:
            x = look(v)
            if not whole:
                return Value(run(x, size, stride), moved)
            pads = same(x.shape[2:], size, stride, (1,) * n)
            if any(before < after and s == 1 for (before, after), s in zip(pads, stride, strict=True)):
                if which == "max":
                    return Value(run(padded(x, pads, -math.inf), size, stride), moved)
                real = run(padded(torch.ones_like(x[:1, :1]), pads), size, stride)
                return Value(run(padded(x, pads), size, stride) / real, moved)
            before = tuple(p for p, _ in pads)
            if which == "max":
                return Value(run(x, size, stride, before, ceil_mode=True), moved)
            return Value(run(x, size, stride, before, ceil_mode=True, count_include_pad=False), moved)

        return apply

    return build


def global_pool(which: str, n: int) -> Callable[[Build], Apply]:
    def build(b: Build) -> Apply:
        look, moved = spatial(b, n)
        keep = bool(b.config.get("keepdims", False))
        axes = tuple(range(2, n + 2))

        def apply(_: Weights, v: Value) -> Value:
            x = look(v)
            y = x.mean(axes, keepdim=keep) if which == "average" else x.amax(axes, keepdim=keep)
            return Value(y, moved and keep)

        return apply

    return build


def _pairs(b: Build, key: str, n: int) -> list[tuple[int, int]]:
    """Amounts on both sides of n axes: one number, one an axis, or (before, after) an axis."""
    value = b.config.get(key)
    if n == 1 and isinstance(value, (list, tuple)) and len(value) == 2 and all(type(v) is int for v in value):
        value = [value]
    value = [value] * n if isinstance(value, int) else value
    try:
        pairs = [(v, v) if isinstance(v, int) else (int(v[0]), int(v[1])) for v in value]  # type: ignore[union-attr]
    except (TypeError, ValueError, IndexError):
        pairs = []
    if len(pairs) != n or any(side < 0 for pair in pairs for side in pair):
        raise b.wrong(f"{key}={value!r}; expected (before, after) for {n} axes")
    return pairs


def zero_padding(n: int) -> Callable[[Build], Apply]:
    def build(b: Build) -> Apply:
        look, moved = spatial(b, n)
        pads = _pairs(b, "padding", n)
        return lambda _, v: Value(padded(look(v), pads), moved)

    return build


def cropping(n: int) -> Callable[[Build], Apply]:
    def build(b: Build) -> Apply:
        look, moved = spatial(b, n)
        cuts = _pairs(b, "cropping", n)

        def apply(_: Weights, v: Value) -> Value:
            x = look(v)
            for axis, (before, after) in enumerate(cuts, 2):
                x = x.narrow(axis, before, x.shape[axis] - before - after)
            return Value(x, moved)

        return apply

    return build


def upsampling(n: int) -> Callable[[Build], Apply]:
    def build(b: Build) -> Apply:
        look, moved = spatial(b, n)
        by = b.ints("size", n, 2)
        how = b.choice("interpolation", "nearest", tuple(_RESIZES)) if n == 2 else "nearest"

        def apply(_: Weights, v: Value) -> Value:
            x = look(v)
            return Value(resized(x, [s * f for s, f in zip(x.shape[2:], by, strict=True)], how), moved)

        return apply

    return build


def resized(x: torch.Tensor, size: Sequence[int], how: str) -> torch.Tensor:
    allow((*x.shape[:2], *size))
    return _RESIZES[how](x, list(size))


def _nearest(x: torch.Tensor, size: list[int]) -> torch.Tensor:
    whole = all(to % n == 0 for to, n in zip(size, x.shape[2:], strict=True))
    return F.interpolate(x, size, mode="nearest" if whole else "nearest-exact")


def _bicubic(x: torch.Tensor, size: list[int]) -> torch.Tensor:
    rows, columns = (_cubic(n, to).to(x) for n, to in zip(x.shape[2:], size, strict=True))
    return torch.einsum("Hh,nchw,Ww->ncHW", rows, x, columns)


def _cubic(n: int, to: int) -> torch.Tensor:
    """(to, n): TensorFlow's bicubic kernel (a = -0.5, half pixels, read from a table of 1024 steps)."""
    at = (np.arange(to, dtype=np.float32) + np.float32(0.5)) * np.float32(n / to) - np.float32(0.5)
    start = np.floor(at)
    step = np.rint((at - start) * 1024).astype(int) / 1024

    def near(x: np.ndarray) -> np.ndarray:
        return (1.5 * x - 2.5) * x * x + 1

    def far(x: np.ndarray) -> np.ndarray:
        return ((-0.5 * x + 2.5) * x - 4) * x + 2

    taps = np.stack([far(step + 1), near(step), near(1 - step), far(2 - step)])
    places = start.astype(int) + np.arange(-1, 3)[:, None]
    taps = np.where((places >= 0) & (places < n), taps, 0)
    taps = taps / taps.sum(0)
    weights = np.zeros((to, n), np.float32)
    np.add.at(weights, (np.broadcast_to(np.arange(to), places.shape), places.clip(0, n - 1)), taps)
    return torch.from_numpy(weights)


_RESIZES: dict[str, Callable[[torch.Tensor, list[int]], torch.Tensor]] = {
    "nearest": _nearest,
    "bilinear": lambda x, size: F.interpolate(x, size, mode="bilinear", align_corners=False),
    "bicubic": _bicubic,
}


def resizing(b: Build) -> Apply:
    look, moved = spatial(b, 2)
    height, width = b.int("height"), b.int("width")
    how = b.choice("interpolation", "bilinear", tuple(_RESIZES))
    for option in ("pad_to_aspect_ratio", "antialias"):
        if b.config.get(option):
            raise Unsupported(f"Resizing {b.name!r} has {option}=True, which innersight does not know")
    crop = bool(b.config.get("crop_to_aspect_ratio"))

    def apply(_: Weights, v: Value) -> Value:
        x = look(v)
        if crop:
            h, w = x.shape[2:]
            x = _center(x, max(min(h, int(w * height / width)), 1), max(min(w, int(h * width / height)), 1))
        return Value(x if tuple(x.shape[2:]) == (height, width) else resized(x, [height, width], how), moved)

    return apply


def _center(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
    return x[:, :, top : top + height, left : left + width]


def center_crop(b: Build) -> Apply:
    look, moved = spatial(b, 2)
    height, width = b.int("height"), b.int("width")

    def apply(_: Weights, v: Value) -> Value:
        x = look(v)
        if x.shape[2] < height or x.shape[3] < width:
            raise Unsupported(f"a crop to {height}x{width} of a smaller picture is not known here")
        return Value(_center(x, height, width), moved)

    return apply


# --- dense, norms ----------------------------------------------------------------------------------------------------


def dense(b: Build) -> Apply:
    units = b.int("units")
    b.weight("kernel", (None, units), np.transpose)
    b.bias(units)
    act = b.activation()

    def apply(w: Weights, v: Value) -> Value:
        x = keras_order(v)
        allow((*x.shape[:-1], units))
        return act(Value(F.linear(x, w["kernel"], w.get("bias"))))

    return apply


def einsum_dense(b: Build) -> Apply:
    """What only acts on the last axis is a linear layer, and said so to those who know linear layers."""
    equation = b.config.get("equation")
    if not isinstance(equation, str):
        raise b.wrong("no equation")
    plain = re.fullmatch(r"(\.\.\.|[a-z]+)([a-z]),\2([a-z])->\1\3", equation.replace(" ", ""))
    flat = plain is not None and b.config.get("bias_axes") in (None, plain[3])
    b.weight("kernel", None, np.transpose if flat else lambda k: k)
    if b.config.get("bias_axes"):
        b.weight("bias")
    act = b.activation()

    def apply(w: Weights, v: Value) -> Value:
        if flat:
            return act(Value(F.linear(keras_order(v), w["kernel"], w.get("bias"))))
        y = torch.einsum(equation, keras_order(v), w["kernel"])
        return act(Value(y + w["bias"] if "bias" in w else y))

    return apply


def _axes(b: Build, default: int = -1) -> list[int]:
    axis = b.config.get("axis", default)
    axes = [axis] if isinstance(axis, int) else axis
    if not isinstance(axes, (list, tuple)) or not axes or not all(type(a) is int for a in axes):
        raise b.wrong(f"axis={axis!r}; expected whole numbers")
    return list(axes)


def _along(v: Value, axes: Sequence[int], weight: torch.Tensor) -> torch.Tensor:
    """A weight over some of Keras's axes, in a shape that broadcasts with the value."""
    shape = [1] * v.rank
    for axis, size in zip(axes, weight.shape, strict=True):
        shape[axis_in(v, axis)] = size
    return weight.reshape(shape)


def batch_norm(b: Build) -> Apply:
    axes, epsilon = _axes(b), b.number("epsilon", 1e-3)
    size = (None,) * len(axes)
    for name, wanted in (("gamma", "scale"), ("beta", "center")):
        if b.config.get(wanted, True):
            b.weight(name, size)
    b.weight("moving_mean", size)
    b.weight("moving_variance", size)

    def apply(w: Weights, v: Value) -> Value:
        mean, variance, gamma, beta = w["moving_mean"], w["moving_variance"], w.get("gamma"), w.get("beta")
        at = [axis_in(v, a) for a in axes]
        if len(at) == 1 and at[0] == v.rank - 1 and not v.moved and v.rank > 2:
            v, at = Value(channels_first(v), True), [1]
        if at == [1]:
            return Value(F.batch_norm(v.tensor, mean, variance, gamma, beta, eps=epsilon), v.moved)
        by = torch.rsqrt(variance + epsilon)
        by = by if gamma is None else by * gamma
        by, mean = _along(v, axes, by), _along(v, axes, mean)
        y = (v.tensor - mean) * by
        return Value(y if beta is None else y + _along(v, axes, beta), v.moved)

    return apply


def layer_norm(b: Build) -> Apply:
    axes, epsilon = _axes(b), b.number("epsilon", 1e-3)
    rms = bool(b.config.get("rms_scaling", False))
    size = (None,) * len(axes)
    if b.config.get("scale", True) or rms:
        b.weight("gamma", size)
    if b.config.get("center", True) and not rms:
        b.weight("beta", size)

    def apply(w: Weights, v: Value) -> Value:
        gamma, beta = w.get("gamma"), w.get("beta")
        places = [a % v.rank for a in axes]
        if places == list(range(v.rank - len(places), v.rank)) and not rms:
            x = keras_order(v)
            return Value(F.layer_norm(x, x.shape[v.rank - len(places) :], gamma, beta, epsilon))
        at = [axis_in(v, a) for a in axes]
        x = v.tensor
        variance = x.var(at, unbiased=False, keepdim=True)
        y = (x if rms else x - x.mean(at, keepdim=True)) * torch.rsqrt(variance + epsilon)
        y = y if gamma is None else y * _along(v, axes, gamma)
        return Value(y if beta is None else y + _along(v, axes, beta), v.moved)

    return apply


def group_norm(b: Build) -> Apply:
    axis, epsilon, groups = _axes(b)[0], b.number("epsilon", 1e-3), b.int("groups", 32)
    if b.config.get("scale", True):
        b.weight("gamma", (None,))
    if b.config.get("center", True):
        b.weight("beta", (None,))

    def apply(w: Weights, v: Value) -> Value:
        if axis % v.rank == v.rank - 1:
            v = Value(channels_first(v), v.rank > 2)
        elif v.moved or axis % v.rank != 1:
            raise Unsupported(f"groups over axis {axis} are not known here; expected the channels")
        x = v.tensor
        many = x.shape[1] if groups == -1 else groups
        return Value(F.group_norm(x, many, w.get("gamma"), w.get("beta"), epsilon), v.moved)

    return apply


def unit_norm(b: Build) -> Apply:
    axes, least = _axes(b), 1e-12 if b.keras2 else 1e-24
    return lambda _, v: _normalized(v, axes, least)


def _normalized(v: Value, axes: Sequence[int], least: float) -> Value:
    """Over its length, whose square is taken as `least` or more."""
    at = [axis_in(v, a) for a in axes]
    squares = (v.tensor * v.tensor).sum(at, keepdim=True)
    return Value(v.tensor * torch.rsqrt(squares.clamp(min=least)), v.moved)


def rms_norm(b: Build) -> Apply:
    axes, epsilon = _axes(b), b.number("epsilon", 1e-6)
    b.weight("scale", (None,) * len(axes))

    def apply(w: Weights, v: Value) -> Value:
        at = [axis_in(v, a) for a in axes]
        mean = (v.tensor * v.tensor).mean(at, keepdim=True)
        return Value(v.tensor * torch.rsqrt(mean + epsilon) * _along(v, axes, w["scale"]), v.moved)

    return apply


def normalization(b: Build) -> Apply:
    config = b.config
    axes = _axes(b) if config.get("axis", -1) not in (None, []) else []
    if config.get("mean") is None:
        b.weight("mean", (None,) * len(axes))
        b.weight("variance", (None,) * len(axes))
    else:
        for name in ("mean", "variance"):
            given = np.asarray(_plain(config[name]), np.float32)
            kept = given.size > 1 or len(axes) == given.ndim
            b.kept[name] = torch.from_numpy(given.copy() if kept else given.reshape(()))
            if given.ndim and given.ndim != len(axes):
                b.kept[name] = b.kept[name].reshape([n for n in given.shape if n != 1] or [1])
    invert = bool(config.get("invert", False))

    def apply(w: Weights, v: Value) -> Value:
        mean, variance = (t if t.dim() == 0 else _along(v, axes, t) for t in (w["mean"], w["variance"]))
        std = torch.sqrt(variance).clamp(min=1e-7)
        y = mean + v.tensor * std if invert else (v.tensor - mean) / std
        return Value(y, v.moved)

    return apply


def rescaling(b: Build) -> Apply:
    for name, default in (("scale", 1.0), ("offset", 0.0)):
        given = np.asarray(_plain(b.config.get(name, default)), np.float32)
        b.kept[name] = torch.from_numpy(given.copy())

    def apply(w: Weights, v: Value) -> Value:
        (x, scale, offset), moved = aligned([v, Value(w["scale"]), Value(w["offset"])])
        return Value(x * scale + offset, moved)

    return apply


def layer_scale(b: Build) -> Apply:
    b.weight("gamma", (None,))
    return lambda w, v: Value(v.tensor * _along(v, [-1], w["gamma"]), v.moved)


# --- activations that are layers -------------------------------------------------------------------------------------


def relu(b: Build) -> Apply:
    top = _plain(b.config.get("max_value"))
    slope, threshold = b.number("negative_slope", 0.0), b.number("threshold", 0.0)

    def apply(x: torch.Tensor) -> torch.Tensor:
        if threshold == 0 and (slope == 0 or top is None):
            if slope:
                return F.leaky_relu(x, slope)
            return F.relu(x) if top is None else F.relu6(x) if top == 6 else F.hardtanh(x, 0.0, top)
        y = torch.where(x >= threshold, x, slope * (x - threshold))
        return y if top is None else y.clamp(max=top)

    if top is not None:
        top = b.number("max_value", 0.0)
        if top < 0:
            raise b.wrong(f"max_value={top}; expected 0 or more")
    fn = unary(apply)
    return lambda _, v: fn(v)


def leaky_relu(b: Build) -> Apply:
    slope = b.number("negative_slope" if "negative_slope" in b.config else "alpha", 0.3)
    return lambda _, v: Value(F.leaky_relu(v.tensor, slope), v.moved)


def elu(b: Build) -> Apply:
    alpha = b.number("alpha", 1.0)
    return lambda _, v: Value(F.elu(v.tensor, alpha), v.moved)


def prelu(b: Build) -> Apply:
    b.weight("alpha")

    def apply(w: Weights, v: Value) -> Value:
        alpha = w["alpha"]
        if alpha.dim() != v.rank - 1:
            raise InputError(f"alpha has {alpha.dim()} axes for a value of {v.rank}")
        channels = alpha.numel() == alpha.shape[-1]
        if channels and v.moved:
            return Value(F.prelu(v.tensor, alpha.reshape(-1)), True)
        alpha = alpha.movedim(-1, 0) if v.moved else alpha
        return Value(F.relu(v.tensor) - alpha * F.relu(-v.tensor), v.moved)

    return apply


def thresholded_relu(b: Build) -> Apply:
    theta = b.number("theta", 1.0)
    return lambda _, v: Value(F.threshold(v.tensor, theta, 0.0), v.moved)


def softmax(b: Build) -> Apply:
    axes = _axes(b)
    fn = _softmax(axes[0] if len(axes) == 1 else axes)

    def apply(_: Weights, v: Value, mask: Any = None) -> Value:
        if mask is not None:
            raise Unsupported("a mask is not known here")
        return fn(v)

    return apply


def activation_layer(b: Build) -> Apply:
    fn = b.activation("linear")
    return lambda _, v: fn(v)


def identity(_: Build) -> Apply:
    return lambda _, v: v


def masking(b: Build) -> Apply:
    if b.number("mask_value", 0.0) != 0:
        raise Unsupported(f"Masking {b.name!r} with another value than 0 is not known here")
    return lambda _, v: v


# --- merging, shapes -------------------------------------------------------------------------------------------------


def merge(fn: Callable[[list[torch.Tensor]], torch.Tensor]) -> Callable[[Build], Apply]:
    def build(_: Build) -> Apply:
        def apply(_: Weights, *values: Any) -> Value:
            tensors, moved = aligned(_listed(values), batch_first=True)
            return Value(fn(tensors), moved)

        return apply

    return build


def _listed(values: Sequence[Any]) -> list[Any]:
    return list(values[0]) if len(values) == 1 and isinstance(values[0], (list, tuple)) else list(values)


def _folded(fn: Callable[[Any, Any], torch.Tensor]) -> Callable[[list[torch.Tensor]], torch.Tensor]:
    def apply(values: list[torch.Tensor]) -> torch.Tensor:
        total = values[0]
        for value in values[1:]:
            total = fn(total, value)
        return total

    return apply


_ADD = _folded(lambda a, b: a + b)


def scaled_add(b: Build) -> Apply:
    """InceptionResNetV2's residual: x + scale * y."""
    scale = b.number("scale", 1.0)

    def apply(_: Weights, *values: Any) -> Value:
        (x, y), moved = aligned(_listed(values), batch_first=True)
        return Value(x + scale * y, moved)

    return apply


def concatenate(b: Build) -> Apply:
    (axis,) = _axes(b)
    return lambda _, *values: joined(_listed(values), axis)


def joined(values: list[Any], axis: int) -> Value:
    if len({v.rank for v in values}) != 1:
        raise InputError("values with different numbers of axes cannot be concatenated")
    tensors, moved = aligned(values)
    allow((tensors[0].shape[0], sum(t[0].numel() for t in tensors)))
    return Value(torch.cat(tensors, axis_in(Value(tensors[0], moved), axis)), moved)


def flatten(b: Build) -> Apply:
    first = b.choice("data_format", "channels_last", ("channels_last", "channels_first")) == "channels_first"

    def apply(_: Weights, v: Value) -> Value:
        x = keras_order(v)
        if first and v.rank > 2:
            x = x.movedim(1, -1)
        return Value(x.reshape(x.shape[0], -1))

    return apply


def reshape(b: Build) -> Apply:
    shape = b.config.get("target_shape")
    if not isinstance(shape, (list, tuple)) or not all(type(n) is int for n in shape):
        raise b.wrong(f"target_shape={shape!r}; expected whole numbers")
    return lambda _, v: Value(keras_order(v).reshape(v.tensor.shape[0], *shape))


def permute(b: Build) -> Apply:
    dims = b.config.get("dims")
    if not isinstance(dims, (list, tuple)) or sorted(map(str, dims)) != sorted(map(str, range(1, len(dims) + 1))):
        raise b.wrong(f"dims={dims!r}; expected a permutation")
    return lambda _, v: Value(keras_order(v).permute(0, *dims))


def repeat_vector(b: Build) -> Apply:
    n = b.int("n")

    def apply(_: Weights, v: Value) -> Value:
        allow((v.tensor.shape[0], n, v.tensor.shape[1]))
        return Value(v.tensor.unsqueeze(1).repeat(1, n, 1))

    return apply


# --- attention, wrappers ---------------------------------------------------------------------------------------------


def attention(b: Build) -> Apply:
    heads, key_dim = b.int("num_heads"), b.int("key_dim")
    value_dim = key_dim if b.config.get("value_dim") is None else b.int("value_dim")
    for part, dim in (("query", key_dim), ("key", key_dim), ("value", value_dim)):
        b.weight(f"{part}/kernel", (None, heads, dim), lambda k: k.reshape(k.shape[0], -1).T)
        if b.config.get("use_bias", True):
            b.weight(f"{part}/bias", (heads, dim), np.ravel)
    b.weight("attention_output/kernel", (heads, value_dim, None), lambda k: k.reshape(-1, k.shape[-1]).T)
    if b.config.get("use_bias", True):
        b.weight("attention_output/bias", (None,))
    axes = b.config.get("attention_axes")

    def split(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)

    def apply(w: Weights, query: Value, value: Value | None = None, key: Value | None = None, *_: Any,
              attention_mask: Any = None, use_causal_mask: bool = False, return_attention_scores: bool = False,
              query_mask: Any = None, value_mask: Any = None, key_mask: Any = None) -> Value:  # fmt: skip
        value = query if value is None else value
        if return_attention_scores or any(m is not None for m in (attention_mask, query_mask, value_mask, key_mask)):
            raise Unsupported("a mask, or scores handed out, are not known here")
        if axes is not None and sorted(a % query.rank for a in axes) != list(range(1, query.rank - 1)):
            raise Unsupported(f"attention over axes {axes} alone is not known here")
        q, k, v = (
            split(F.linear(x.reshape(x.shape[0], -1, x.shape[-1]), w[f"{part}/kernel"], w.get(f"{part}/bias")))
            for part, x in (
                ("query", keras_order(query)), ("key", keras_order(key or value)), ("value", keras_order(value))
            )
        )  # fmt: skip
        y = F.scaled_dot_product_attention(q, k, v, is_causal=bool(use_causal_mask))
        y = y.transpose(1, 2).reshape(*keras_order(query).shape[:-1], -1)
        return Value(F.linear(y, w["attention_output/kernel"], w.get("attention_output/bias")))

    return apply


def time_distributed(b: Build) -> Apply:
    inner = b.config.get("layer")
    kind = inner.get("class_name") if isinstance(inner, dict) else None
    if kind not in LAYERS or kind == "TimeDistributed" or not isinstance(inner, dict):
        raise Unsupported(f"TimeDistributed {b.name!r} around {kind}, which is not known here")
    config = inner.get("config") if isinstance(inner.get("config"), dict) else {}
    each = Build(b.name, str(kind), dict(config or {}), b.fetch, b.keras2, b.custom)
    apply_each = LAYERS[each.kind](each)
    b.kept.update(each.kept)
    b.taken += each.taken
    b.modules.update(each.modules)

    def apply(w: Weights, v: Value) -> Value:
        x = keras_order(v)
        made = keras_order(apply_each(w, Value(x.reshape(-1, *x.shape[2:]))))
        return Value(made.reshape(*x.shape[:2], *made.shape[1:]))

    return apply


LAYERS: dict[str, Callable[[Build], Apply]] = {
    **{f"Conv{n}D": conv(n) for n in (1, 2, 3)},
    **{f"Convolution{n}D": conv(n) for n in (1, 2, 3)},
    **{f"DepthwiseConv{n}D": depthwise(n) for n in (1, 2)},
    **{f"SeparableConv{n}D": separable(n) for n in (1, 2)},
    **{f"SeparableConvolution{n}D": separable(n) for n in (1, 2)},
    **{f"Conv{n}DTranspose": transposed(n) for n in (1, 2, 3)},
    **{f"MaxPooling{n}D": pool("max", n) for n in (1, 2, 3)},
    **{f"AveragePooling{n}D": pool("average", n) for n in (1, 2, 3)},
    **{f"GlobalMaxPooling{n}D": global_pool("max", n) for n in (1, 2, 3)},
    **{f"GlobalAveragePooling{n}D": global_pool("average", n) for n in (1, 2, 3)},
    **{f"ZeroPadding{n}D": zero_padding(n) for n in (1, 2, 3)},
    **{f"Cropping{n}D": cropping(n) for n in (1, 2, 3)},
    **{f"UpSampling{n}D": upsampling(n) for n in (1, 2, 3)},
    "Resizing": resizing,
    "CenterCrop": center_crop,
    "Dense": dense,
    "EinsumDense": einsum_dense,
    "BatchNormalization": batch_norm,
    "BatchNormalizationV1": batch_norm,
    "SyncBatchNormalization": batch_norm,
    "LayerNormalization": layer_norm,
    "GroupNormalization": group_norm,
    "UnitNormalization": unit_norm,
    "RMSNormalization": rms_norm,
    "Normalization": normalization,
    "Rescaling": rescaling,
    "LayerScale": layer_scale,
    "ReLU": relu,
    "LeakyReLU": leaky_relu,
    "ELU": elu,
    "PReLU": prelu,
    "ThresholdedReLU": thresholded_relu,
    "Softmax": softmax,
    "Activation": activation_layer,
    "Add": merge(_ADD),
    "Subtract": merge(_folded(lambda a, b: a - b)),
    "Multiply": merge(_folded(lambda a, b: a * b)),
    "Average": merge(lambda values: _ADD(values) / len(values)),
    "Maximum": merge(_folded(torch.maximum)),
    "Minimum": merge(_folded(torch.minimum)),
    "CustomScaleLayer": scaled_add,
    "Concatenate": concatenate,
    "Flatten": flatten,
    "Reshape": reshape,
    "Permute": permute,
    "RepeatVector": repeat_vector,
    "MultiHeadAttention": attention,
    "TimeDistributed": time_distributed,
    "Masking": masking,
    **dict.fromkeys(
        "InputLayer Identity Dropout SpatialDropout1D SpatialDropout2D SpatialDropout3D AlphaDropout GaussianDropout "
        "GaussianNoise ActivityRegularization StochasticDepth RandomFlip RandomRotation RandomTranslation RandomZoom "
        "RandomContrast RandomBrightness RandomHue RandomSaturation RandomSharpness RandomGaussianBlur RandomInvert "
        "RandomPosterization RandomErasing RandomShear RandomColorJitter RandomColorDegeneration RandomGrayscale "
        "RandomPerspective RandomElasticTransform".split(),
        identity,
    ),
}


# --- operations ------------------------------------------------------------------------------------------------------


_DEFAULTS: dict[str, dict[str, Any]] = {
    "celu": {"alpha": 1.0}, "squareplus": {"b": 4},
    "soft_shrink": {"threshold": 0.5}, "hard_shrink": {"threshold": 0.5},
    "resize": {"fill_mode": "constant", "fill_value": 0.0},
}  # fmt: skip


def operation(name: str) -> Apply:
    """The operation of that name, for (values, ...) and the keywords it knows: others must not change what it does."""
    run, usual = OPERATIONS[name], _DEFAULTS.get(name, {})
    known = {*inspect.signature(run).parameters, "name", "dtype", "conjugate"}

    def apply(*args: Any, **given: Any) -> Any:
        for key, value in given.items():
            idle = value is None or value is False or value in ("NHWC", "channels_last") or value == usual.get(key)
            if key not in known and not idle:
                raise Unsupported(f"{key}={value!r} is not known here")
        return run(*args, **given)

    return apply


def _elementwise(fn: Callable[..., torch.Tensor]) -> Apply:
    def apply(v: Any, **_: Any) -> Value:
        return Value(fn(v.tensor), v.moved)

    return apply


def _binary(fn: Callable[[Any, Any], torch.Tensor]) -> Apply:
    def apply(x: Any = None, y: Any = None, *, x1: Any = None, x2: Any = None, a: Any = None, b: Any = None,
              value: Any = None, bias: Any = None, **_: Any) -> Value:  # fmt: skip
        left = next((v for v in (x, x1, a, value) if v is not None), None)
        right = next((v for v in (y, x2, b, bias) if v is not None), None)
        if left is None or right is None:
            raise InputError("an operation on two values got one")
        some = next(v for v in (left, right) if isinstance(v, Value)).tensor
        left, right = (Value(some.new_tensor(v)) if isinstance(v, list) else v for v in (left, right))
        (one, two), moved = aligned([left, right])
        if not isinstance(one, torch.Tensor) and fn not in _OPERATORS:
            one = torch.as_tensor(one, dtype=two.dtype, device=two.device)
        if not isinstance(two, torch.Tensor) and fn not in _OPERATORS:
            two = torch.as_tensor(two, dtype=one.dtype, device=one.device)
        return Value(fn(one, two), moved)

    return apply


def _plus(x: Any, y: Any) -> torch.Tensor:
    return x + y


def _minus(x: Any, y: Any) -> torch.Tensor:
    return x - y


def _times(x: Any, y: Any) -> torch.Tensor:
    return x * y


def _over(x: Any, y: Any) -> torch.Tensor:
    return x / y


def _to_the(x: Any, y: Any) -> torch.Tensor:
    return x**y


_OPERATORS = (_plus, _minus, _times, _over, _to_the)


def _reduction(fn: Callable[..., torch.Tensor]) -> Apply:
    def apply(v: Value, axis: Any = None, keepdims: Any = False, **_: Any) -> Value:
        axes = list(range(v.rank)) if axis is None else [axis] if isinstance(axis, int) else list(axis)
        at = [axis_in(v, a) for a in axes]
        if 0 in at:
            raise Unsupported("an operation over the whole batch makes pictures depend on each other: not known here")
        y = fn(v.tensor, at, keepdim=bool(keepdims))
        still = v.moved and (bool(keepdims) or (1 not in at and y.dim() > 2))
        return Value(y, still)

    return apply


def _concat_op(values: Any, axis: int = -1, **_: Any) -> Value:
    return joined(list(values), axis)


def _stack(values: Any, axis: int = 0, **_: Any) -> Value:
    allow((1, sum(v.tensor[0].numel() for v in values)))
    return Value(torch.stack([keras_order(v) for v in values], axis))


def _reshape_op(v: Value, newshape: Any = None, *, shape: Any = None, **_: Any) -> Value:
    wanted = [int(n) if isinstance(n, int) else -1 for n in (newshape if newshape is not None else shape)]
    x = keras_order(v)
    if wanted[0] not in (-1, x.shape[0]) and wanted.count(-1) == 0:
        wanted[0] = x.shape[0] if math.prod(wanted[1:]) * x.shape[0] == x.numel() else wanted[0]
    return Value(x.reshape(wanted))


def _transpose(v: Value, axes: Any = None, *, perm: Any = None, **_: Any) -> Value:
    order = axes if axes is not None else perm
    return Value(keras_order(v).permute(*(order if order is not None else reversed(range(v.rank)))))


def _squeeze(v: Value, axis: Any = None, **_: Any) -> Value:
    x = keras_order(v)
    axes = (
        [a for a in range(1, v.rank) if x.shape[a] == 1] if axis is None else [axis] if isinstance(axis, int) else axis
    )
    return Value(x.squeeze(tuple(axes)))


def _expand(v: Value, axis: Any = -1, **_: Any) -> Value:
    x = keras_order(v)
    for a in sorted([axis] if isinstance(axis, int) else axis):
        x = x.unsqueeze(a)
    return Value(x)


def _item(v: Value, key: Any = None, *, slice_spec: Any = None, **_: Any) -> Value:
    given = slice_spec if key is None else key
    keys = list(given) if isinstance(given, (list, tuple)) else [given]
    if ... in keys:
        at = keys.index(...)
        taken = sum(k is not None and k is not ... for k in keys)
        keys[at : at + 1] = [slice(None)] * (v.rank - taken)
    x, axis = keras_order(v), 0
    for i, k in enumerate(keys):
        if isinstance(k, slice) and k.step is not None and k.step < 0:  # which torch does not know: turned first
            places = range(*k.indices(x.shape[axis]))
            x, first = x.flip(axis), x.shape[axis] - 1 - places.start
            keys[i] = slice(first, first + len(places) * -k.step, -k.step)
        axis += k is not None
    return Value(x[tuple(keys)])


def _matmul(x: Value, y: Any = None, *, x2: Any = None, transpose_a: bool = False, transpose_b: bool = False,
            b: Any = None, **_: Any) -> Value:  # fmt: skip
    other = next(v for v in (y, x2, b) if v is not None)
    left, right = keras_order(x), keras_order(other)
    left = left.transpose(-1, -2) if transpose_a else left
    right = right.transpose(-1, -2) if transpose_b else right
    return Value(torch.matmul(left, right))


def _pad_op(v: Value, pad_width: Any = None, *, paddings: Any = None, mode: str = "constant",
            constant_values: Any = 0, **_: Any) -> Value:  # fmt: skip
    given = pad_width if pad_width is not None else paddings
    pairs = [(given, given)] * v.rank if isinstance(given, int) else [tuple(p) for p in given]
    pairs = pairs * v.rank if len(pairs) == 1 else pairs
    sides = [(0, 0)] * v.rank
    for axis, pair in enumerate(pairs):
        sides[axis_in(v, axis)] = pair
    mode = mode.lower()
    if mode == "constant":
        fill = _plain(constant_values) or 0
        return Value(padded(v.tensor, sides, float(fill)), v.moved)
    if mode not in ("reflect",) or any(map(any, sides[:2])):
        raise Unsupported(f"padding with mode={mode!r} is not known here")
    flat = [side for pair in reversed(sides[2:]) for side in pair]
    return Value(F.pad(v.tensor, flat, mode=mode), v.moved)


def _clip(v: Value, x_min: Any = None, x_max: Any = None, *, clip_value_min: Any = None, clip_value_max: Any = None,
          **_: Any) -> Value:  # fmt: skip
    low, high = (next((_plain(n) for n in pair if n is not None), None)
                 for pair in ((x_min, clip_value_min), (x_max, clip_value_max)))  # fmt: skip
    return Value(v.tensor.clamp(low, high), v.moved)


def _relu_op(v: Value, *, negative_slope: Any = 0, alpha: Any = 0, max_value: Any = None, threshold: Any = 0,
             **_: Any) -> Value:  # fmt: skip
    config = {"negative_slope": negative_slope or alpha, "max_value": max_value, "threshold": threshold}
    return relu(Build("relu", "relu", config, lambda *_: np.zeros(0)))({}, v)


def _leaky_op(v: Value, negative_slope: Any = 0.2, *, alpha: Any = None, **_: Any) -> Value:
    return Value(F.leaky_relu(v.tensor, alpha if alpha is not None else negative_slope), v.moved)


def _gelu_op(v: Value, approximate: Any = True, **_: Any) -> Value:
    return Value(F.gelu(v.tensor, approximate="tanh" if approximate else "none"), v.moved)


def _elu_op(v: Value, alpha: Any = 1.0, **_: Any) -> Value:
    return Value(F.elu(v.tensor, alpha), v.moved)


def _softmax_op(v: Value, axis: Any = -1, **_: Any) -> Value:
    return _softmax(-1 if axis is None else axis)(v)


def _log_softmax_op(v: Value, axis: Any = -1, **_: Any) -> Value:
    return _softmax(-1 if axis is None else axis, log=True)(v)


def _identity_op(v: Value, **_: Any) -> Value:
    return v


def _cast(v: Value, dtype: Any = "float32", **_: Any) -> Value:
    if not isinstance(dtype, str) or not re.fullmatch(r"(b?float|half|double).*", dtype):
        raise Unsupported(f"a cast to {dtype!r} is not known here; expected floating numbers")
    return v


def _split(v: Value, indices_or_sections: Any = None, axis: int = 0, *, num_or_size_splits: Any = None,
           **_: Any) -> tuple[Value, ...]:  # fmt: skip
    given = indices_or_sections if indices_or_sections is not None else num_or_size_splits
    at = axis_in(v, axis)
    size = v.tensor.shape[at]
    if isinstance(given, int):
        sizes = [size // given] * given
    elif num_or_size_splits is not None:
        sizes = list(given)
    else:
        ends = [*given, size]
        sizes = [b - a for a, b in zip([0, *given], ends, strict=True)]
    return tuple(Value(t, v.moved) for t in v.tensor.split(sizes, at))


def _einsum_op(*args: Any, subscripts: str = "", equation: str = "", **_: Any) -> Value:
    if args and isinstance(args[0], str):
        subscripts, args = args[0], args[1:]
    return Value(torch.einsum(subscripts or equation, *(keras_order(v) for v in _listed(args))))


def _resize_op(v: Value, size: Any = None, *, interpolation: str = "bilinear", method: str | None = None,
               antialias: bool = False, data_format: str = "channels_last", **_: Any) -> Value:  # fmt: skip
    how = (method or interpolation).lower()
    if antialias or data_format == "channels_first":
        raise Unsupported("antialias=True and channels first are not known here")
    if how not in _RESIZES:
        raise Unsupported(f"interpolation={how!r} is not known here; innersight knows {', '.join(_RESIZES)}")
    return Value(resized(channels_first(v), list(size), how), True)


def _depth_to_space(v: Value, block_size: int = 2, **_: Any) -> Value:
    x = keras_order(v)
    n, h, w, c = x.shape
    y = x.reshape(n, h, w, block_size, block_size, c // block_size**2).permute(0, 5, 1, 3, 2, 4)
    return Value(y.reshape(n, -1, h * block_size, w * block_size), True)


def _space_to_depth(v: Value, block_size: int = 2, **_: Any) -> Value:
    x = keras_order(v)
    n, h, w, c = x.shape
    s = block_size
    y = x.reshape(n, h // s, s, w // s, s, c).permute(0, 2, 4, 5, 1, 3)
    return Value(y.reshape(n, s * s * c, h // s, w // s), True)


def _normalize_op(v: Value, axis: Any = -1, order: Any = 2, epsilon: Any = None, **_: Any) -> Value:
    if order != 2:
        raise Unsupported(f"normalize with order={order!r} is not known here; expected 2")
    axes = [-1] if axis is None else [axis] if isinstance(axis, int) else axis
    return _normalized(v, axes, (1e-7 if epsilon is None else float(epsilon)) ** 2)


def _l2_normalize(v: Value, axis: Any = None, epsilon: Any = 1e-12, **_: Any) -> Value:
    axes = list(range(1, v.rank)) if axis is None else [axis] if isinstance(axis, int) else axis
    return _normalized(v, axes, float(epsilon))


OPERATIONS: dict[str, Apply] = {
    **dict.fromkeys(("add", "add_v2", "bias_add"), _binary(_plus)),
    **dict.fromkeys(("subtract", "sub"), _binary(_minus)),
    **dict.fromkeys(("multiply", "mul"), _binary(_times)),
    **dict.fromkeys(("divide", "true_divide", "truediv", "realdiv"), _binary(_over)),
    **dict.fromkeys(("power", "pow"), _binary(_to_the)),
    "radd": _binary(lambda x, y: y + x),
    "rmul": _binary(lambda x, y: y * x),
    "rsub": _binary(lambda x, y: y - x),
    "rtruediv": _binary(lambda x, y: y / x),
    "maximum": _binary(torch.maximum),
    "minimum": _binary(torch.minimum),
    **dict.fromkeys(("mean", "reduce_mean"), _reduction(torch.mean)),
    **dict.fromkeys(("sum", "reduce_sum"), _reduction(torch.sum)),
    **dict.fromkeys(("max", "amax", "reduce_max"), _reduction(torch.amax)),
    **dict.fromkeys(("min", "amin", "reduce_min"), _reduction(torch.amin)),
    **{name: _elementwise(fn) for name, fn in ELEMENTWISE.items()},
    **{
        name: _elementwise(fn)
        for name, fn in {
            "exp": torch.exp, "log": torch.log, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "square": torch.square,
            "abs": torch.abs, "absolute": torch.abs, "negative": torch.neg, "neg": torch.neg, "sin": torch.sin,
            "cos": torch.cos, "erf": torch.erf, "reciprocal": torch.reciprocal, "log1p": torch.log1p,
            "expm1": torch.expm1, "sign": torch.sign, "floor": torch.floor, "ceil": torch.ceil,
        }.items()
    },
    "relu": _relu_op,
    "leaky_relu": _leaky_op,
    "gelu": _gelu_op,
    "elu": _elu_op,
    "softmax": _softmax_op,
    "log_softmax": _log_softmax_op,
    **dict.fromkeys(("clip", "clip_by_value"), _clip),
    **dict.fromkeys(("concat", "concatenate"), _concat_op),
    "stack": _stack,
    "reshape": _reshape_op,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "expand_dims": _expand,
    **dict.fromkeys(("getitem", "get_item", "slicing"), _item),
    "matmul": _matmul,
    "pad": _pad_op,
    **dict.fromkeys(("identity", "stop_gradient", "copy"), _identity_op),
    **dict.fromkeys(("cast", "convert_to_tensor"), _cast),
    "split": _split,
    "einsum": _einsum_op,
    "resize": _resize_op,
    "depth_to_space": _depth_to_space,
    "space_to_depth": _space_to_depth,
    "normalize": _normalize_op,
    "l2_normalize": _l2_normalize,
}  # fmt: skip
