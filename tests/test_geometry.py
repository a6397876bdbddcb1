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
from innersight.observe.geometry import Geometry, ReceptiveField, effective_box, trace
from innersight.observe.observer import (
    _ATTENTION,
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
                return args[0] + args[0].mean(dim, keepdim=True)
            if op == "layer_norm":
                return args[0] + args[0].mean(tuple(range(-len(args[1]), 0)), keepdim=True)
            if op == "group_norm":
                n, c, *space = args[0].shape
                parts = args[0].reshape(n, args[1], -1)
                return (parts + parts.mean(2, keepdim=True)).reshape(n, c, *space)
            if op == "scaled_dot_product_attention":
                q, k, v = (
                    a if a is not None else kwargs[n] for a, n in zip(args[:3], ("query", "key", "value"), strict=False)
                )
                return q.mean(-1, keepdim=True) + k.mean((-1, -2), keepdim=True) + v.mean(-2, keepdim=True)
            out = func(*args, **kwargs)
            if op in ("mul", "matmul", "div", "bmm") and out.is_floating_point():
                out = out / out.detach().abs().max().clamp(min=1e-30)  # products of products leave every range
            return out


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
    recording = learn(model, x, grad=True)  # some models go another way without gradients
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
            assert g is None or g.isfinite().all(), f"{node.name}: the test itself overflowed"
            seen = g[0].abs().sum(0).numpy() if g is not None else np.zeros(shape[2:])
            top, left, bottom, right = geometry.receptive_field.box(y, x_)
            if top >= bottom or left >= right:  # a padded unit sees nothing
                top = bottom = left = right = 0
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


# ---------------------------------------------------------------------------------------------------------------------
# Whole architectures, a few layers of each

ARCHITECTURES = {
    "resnet18": ((64, 96), None),
    "vgg11_bn": ((48, 64), ["features.0", "features.10", "features.20", "features.28"]),
    "googlenet": ((64, 96), None),
    "densenet121": ((64, 80), None),
    "mobilenet_v2": ((64, 96), None),
    "squeezenet1_1": ((96, 64), None),
    "alexnet": ((160, 128), ["features.3", "features.5", "features.12", "avgpool"]),
    "mnasnet0_5": ((64, 96), None),
    "regnet_x_400mf": ((64, 96), None),
    "shufflenet_v2_x0_5": ((64, 96), None),
    "convnext_tiny": (
        (64, 96),
        ["features.1.0.block.0", "features.1.2.add", "features.3.1.block.3", "features.5.0.add"],
    ),
    "mobilenet_v3_small": ((64, 96), None),
    "swin_t": ((64, 96), ["features.1.0.attn.linear", "features.1.0.add", "features.1.1.add", "features.3.0.norm1"]),
}


def architecture(name: str) -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    return getattr(torchvision.models, name)(weights=None, **options).eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fields_are_the_gradients_support(name: str) -> None:
    size, names = ARCHITECTURES[name]
    counts, bad = compare(architecture(name), (1, 3, *size), layers=6, names=names)
    assert not bad
    assert counts["wrong"] == counts["false claim"] == 0
    if name != "swin_t":  # its windows wrap around, which boxes cannot say
        assert counts["not exact"] == 0


def field(model: nn.Module, shape: tuple[int, ...], name: str | None = None) -> ReceptiveField:
    return geometry(model, shape, name).receptive_field


def geometry(model: nn.Module, shape: tuple[int, ...], name: str | None = None) -> Geometry:
    recording = learn(model.eval(), torch.rand(shape))
    node = recording.find(name) if name else recording.nodes[-1]
    found = trace(recording)[node.index]
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("conv1", "7x7, stride 2, centre 0"),
        ("maxpool", "11x11, stride 4, centre 0"),
        ("layer1", "43x43, stride 4, centre 0"),
        ("layer2", "99x99, stride 8, centre 0"),
        ("layer3", "211x211, stride 16, centre 0"),
        ("layer4", "435x435, stride 32, centre 0"),
        ("avgpool", "whole picture"),
        ("fc", "whole picture"),
    ],
)
def test_resnet18_has_the_published_fields(name: str, text: str) -> None:
    """Araujo et al. list 435 and stride 32 for the last stage."""
    found = field(architecture("resnet18"), (1, 3, 224, 224), name)
    assert str(found) == text
    assert found.exact


# ---------------------------------------------------------------------------------------------------------------------
# Worked by hand


class Fn(nn.Module):
    def __init__(self, fn: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.fn = fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fn(x)


def conv(k: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(3, 3, k, **options)


@pytest.mark.parametrize(
    ("model", "text", "box"),
    [
        (nn.Sequential(*[conv(3, stride=2, padding=1)] * 2), "7x7, stride 4, centre 0", (0, 0, 4, 4)),
        (conv(3, dilation=4), "9x9, stride 1, centre 4", (0, 0, 9, 9)),
        (conv(3, padding="same", dilation=2), "5x5, stride 1, centre 0", (0, 0, 3, 3)),
        (nn.Conv2d(3, 3, (1, 5), stride=(1, 2)), "1x5, stride 1x2, centre (0, 2)", (0, 0, 1, 5)),
        (nn.MaxPool2d(2), "2x2, stride 2, centre 0.5", (0, 0, 2, 2)),
        (nn.Sequential(nn.MaxPool2d(3, 2, ceil_mode=True)), "3x3, stride 2, centre 1", (0, 0, 3, 3)),
        (Fn(lambda x: x[:, :, 3::2, 1:]), "1x1, stride 2x1, centre (3, 1)", (3, 1, 4, 2)),
        (nn.AdaptiveAvgPool2d((4, 8)), "4x3, stride 4x3, centre (1.5, 1)", (0, 0, 4, 3)),
        (nn.Upsample(scale_factor=2), "up to 1x1, stride 0.5, centre -0.25", (0, 0, 1, 1)),
        (nn.PixelUnshuffle(2), "2x2, stride 2, centre 0.5", (0, 0, 2, 2)),
        (nn.AdaptiveAvgPool2d(1), "whole picture", (0, 0, 16, 24)),
        (nn.GroupNorm(1, 3), "whole picture", (0, 0, 16, 24)),
        (Fn(lambda x: torch.fft.fft2(x).real), "up to the whole picture", (0, 0, 16, 24)),
        (Fn(lambda x: torch.cummax(x, 2)[0] + torch.cumsum(x, 3)), "up to the whole picture", (0, 0, 16, 24)),
    ],
)  # fmt: skip
def test_one_operation(model: nn.Module, text: str, box: tuple[int, int, int, int]) -> None:
    found = field(model, (1, 3, 16, 24))
    assert str(found) == text
    assert found.box(0, 0) == box


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.long, self.short = conv(5, padding=2), conv(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.long(x) + self.short(x)


class Shuffled(nn.Module):
    """Halves of channels see differently; shuffled, chosen, and only then mixed."""

    def __init__(self, shuffle: bool):
        super().__init__()
        self.stem, self.far, self.last, self.shuffle = nn.Conv2d(3, 4, 1), conv4(5), nn.Conv2d(4, 4, 1), shuffle

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.cat((x, self.far(x)), 1)
        if self.shuffle:
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.last(x[:, :4])


def conv4(k: int) -> nn.Conv2d:
    return nn.Conv2d(4, 4, k, padding=k // 2)


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.far, self.deep, self.groups = (
            nn.Conv2d(3, 3, 5, padding=2),
            nn.Conv2d(6, 6, 3, padding=1, groups=6),
            (nn.Conv2d(6, 4, 1, groups=2)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.groups(self.deep(torch.cat((x, self.far(x)), 1)))
        return x[:, :2] * 1.0


class Blocks(nn.Module):
    """Space to depth by view and permute, mixed, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(12, 12, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        x = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(n, 4 * c, h // 2, w // 2)
        return F.pixel_shuffle(self.mix(x), 2) + 0


class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * 4 * 4, 8)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(F.unfold(x, 4, stride=4).transpose(1, 2))
        return torch.cat((self.token.expand(len(x), -1, -1), tokens), 1) * 2


class WindowedConv(nn.Module):
    """A convolution inside windows of 4x4, put back together."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        x = x.view(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, 4, 4)
        x = self.conv(x)
        return x.view(n, h // 4, w // 4, c, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(n, c, h, w)


class WindowedTokens(nn.Module):
    """Attention inside windows, on tokens that go back to their order and meet what they were."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        tokens = F.avg_pool2d(x, 3, 1, 1).flatten(2).transpose(1, 2)
        q = tokens.view(n, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        q = (q @ q.transpose(1, 2)).softmax(-1) @ q
        q = q.view(n, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h * w, c)
        return (tokens + q) * 1


class Focus(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [x[..., i::2, j::2] for i in range(2) for j in range(2)]
        return self.conv(torch.cat(parts, 1))


class Excited(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate = conv(3, padding=1), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return x * torch.sigmoid(self.gate(x.mean((2, 3))))[:, :, None, None]


class Attention(nn.Module):
    """Written out by einsum over rows and columns, without flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        rows = torch.einsum("nchw,nciw->nwhi", y, y).softmax(-1)  # along columns of the picture only
        return torch.einsum("nwhi,nciw->nchw", rows, y)


class Pyramid(nn.Module):
    def __init__(self, mode: str, **options: Any) -> None:
        super().__init__()
        self.down, self.side, self.resize = conv(3, stride=4, padding=1), conv(3, padding=1), (mode, options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mode, options = self.resize
        return self.side(x) + F.interpolate(self.down(x), size=x.shape[2:], mode=mode, **options)


class HiddenWrite(nn.Module):
    """Writes into the picture through a view, and reads the picture again."""

    def __init__(self) -> None:
        super().__init__()
        self.far = nn.Conv2d(3, 1, 5, padding=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 1.0
        first = x[:, :1]
        first += self.far(x.detach() if not x.requires_grad else x.clone())
        return x.relu()


CASES: dict[str, tuple[Callable[[], nn.Module], bool]] = {  # and whether the field must be exact
    "residual": (Residual, True),
    "channel shuffle": (lambda: Shuffled(True), True),
    "channels chosen": (lambda: Shuffled(False), True),
    "grouped": (Grouped, True),
    "space to depth and back": (Blocks, True),
    "pixel shuffle": (lambda: nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), nn.PixelShuffle(2), conv(3)), True),
    "channel shuffle module": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ChannelShuffle(2), conv4(3)), True),
    "patches": (Patches, True),
    "windows": (WindowedConv, True),
    "windows of tokens": (WindowedTokens, True),
    "focus": (Focus, True),
    "squeeze and excitation": (Excited, True),
    "attention along one axis": (Attention, True),
    "transposed": (lambda: nn.Sequential(conv(3, stride=2), nn.ConvTranspose2d(3, 3, 4, 2, 1), conv(3)), True),
    "transposed, sparse": (lambda: nn.ConvTranspose2d(3, 3, 2, stride=3, padding=1, output_padding=1), True),
    "transposed, dilated": (lambda: nn.ConvTranspose2d(3, 3, 3, stride=2, dilation=3), True),
    "ceil mode": (
        lambda: nn.Sequential(conv(3), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.AvgPool2d(2, ceil_mode=True)),
        True,
    ),
    "adaptive, uneven": (lambda: nn.Sequential(conv(3), nn.AdaptiveAvgPool2d((5, 7)), conv(3, padding=1)), True),
    "adaptive, more": (lambda: nn.Sequential(conv(3, stride=4), nn.AdaptiveAvgPool2d((6, 9))), True),
    "pad reflect": (lambda: nn.Sequential(conv(3, stride=2), conv(3, padding=2, padding_mode="reflect")), True),
    "pad replicate": (lambda: nn.Sequential(conv(3, stride=2), nn.ReplicationPad2d((3, 0, 1, 2)), conv(3)), True),
    "pad circular": (lambda: conv(3, padding=1, padding_mode="circular"), True),
    "pad negative": (lambda: nn.Sequential(Fn(lambda x: F.pad(x, (-2, 3, 1, -4))), conv(3)), True),
    "sliced with steps": (lambda: nn.Sequential(Fn(lambda x: x[:, :, 1:-2:3, ::2]), conv(3, padding=1)), True),
    "flipped": (lambda: nn.Sequential(conv(3), Fn(lambda x: x.flip(3)), conv(3, stride=2)), True),
    "rolled": (lambda: nn.Sequential(conv(3), Fn(lambda x: x.roll((2, 1), (2, 3))), conv(3)), False),
    "split along rows": (lambda: Fn(lambda x: torch.cat([F.avg_pool2d(p, 2) for p in x.split(8, 2)], 2)), True),
    "channels last": (lambda: Fn(lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (3,)).transpose(1, 3).mT * 1), True),
    "rows pooled": (lambda: nn.Sequential(conv(3), Fn(lambda x: x.mean(3, keepdim=True) * x)), True),
    "nearest": (lambda: Pyramid("nearest"), True),
    "bilinear": (lambda: Pyramid("bilinear"), True),
    "bilinear, corners": (lambda: Pyramid("bilinear", align_corners=True), False),
    "bicubic": (lambda: Pyramid("bicubic"), True),
    "area": (lambda: nn.Sequential(conv(3), Fn(lambda x: F.interpolate(x, size=(5, 6), mode="area"))), True),
    "antialiased": (lambda: Fn(lambda x: F.interpolate(x, size=(7, 5), mode="bilinear", antialias=True)), False),
    "rows by columns": (lambda: Fn(lambda x: x.mean(2, keepdim=True) + x[..., :1] * 1), True),
    "gathered rows": (lambda: nn.Sequential(conv(3), Fn(lambda x: x + x[:, :, [3]] * 1)), False),
    "windows of a sliding view": (lambda: Fn(lambda x: x.unfold(2, 4, 2).unfold(3, 3, 3).mean((4, 5))), True),
    "folded": (lambda: Fn(lambda x: F.fold(F.unfold(x, 3, stride=2), x.shape[2:], 3, stride=2)), False),
    "written through a view": (HiddenWrite, False),
    "picture plus its transpose": (lambda: Fn(lambda x: x[..., :16] + x[..., :16].mT), False),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_unit_and_layer_of_a_small_case(name: str) -> None:
    make, exact = CASES[name]
    counts, bad = compare(make(), (1, 3, 16, 24), layers=30)
    assert not bad
    assert sum(counts[k] for k in ("equal", "contained")) > 0
    if exact:
        assert counts["not exact"] == counts["contained"] == 0


def test_boxes_at_the_border_and_beyond_it() -> None:
    found = field(nn.Sequential(conv(3, padding=1), nn.MaxPool2d(2), conv(3, padding=1)), (1, 3, 16, 24))
    assert str(found) == "8x8, stride 2, centre 0.5"
    assert found.box(0, 0) == (0, 0, 5, 5)
    assert found.box(0, 0, clip=False) == (-3, -3, 5, 5)
    assert found.box(4, 5) == (5, 7, 13, 15)
    assert found.box(-1, -1) == (11, 19, 16, 24)
    assert found.size == (8, 8)
    assert found.stride == (2, 2)
    assert found.centre == (Fraction(1, 2), Fraction(1, 2))
    with pytest.raises(errors.InputError, match="no unit 8; this layer has 8"):
        found.box(8, 0)


def test_fields_that_have_no_formula_say_the_most_of_any_unit() -> None:
    """6 bins over 15 rows: two to four... floor(i 15/6) to ceil((i+1) 15/6), 3 rows each; 24 columns, even."""
    found = field(nn.AdaptiveAvgPool2d((6, 6)), (1, 3, 15, 24))
    assert [found.box(i, 0)[::2] for i in range(6)] == [(0, 3), (2, 5), (5, 8), (7, 10), (10, 13), (12, 15)]
    assert found.exact
    assert str(found).startswith("up to")


def test_alexnets_adaptive_pool_is_exact_unit_by_unit() -> None:
    found = field(architecture("alexnet"), (1, 3, 160, 160), "avgpool")
    assert found.exact
    assert found.box(0, 0) == (0, 0, 129, 129)


# ---------------------------------------------------------------------------------------------------------------------
# Layouts


class Tokens(nn.Module):
    """A convolution's map as tokens with extra ones around, which a layer reads."""

    def __init__(self, before: int, behind: int = 0):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, stride=4)
        self.before, self.behind = (nn.Parameter(torch.zeros(1, n, 8)) for n in (before, behind))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        extra = [p.expand(len(x), -1, -1) for p in (self.before, self.behind)]
        return self.norm(torch.cat((extra[0], tokens, extra[1]), 1))


@pytest.mark.parametrize(
    ("before", "behind", "note"),
    [
        (0, 0, "24 tokens as 4x6"),
        (1, 0, "25 tokens: 1 class token left out, 24 as 4x6"),
        (5, 0, "29 tokens: 5 class or register tokens left out, 24 as 4x6"),
        (1, 2, "27 tokens: 1 class token and 2 tokens at the end left out, 24 as 4x6"),
    ],
)
def test_tokens_are_turned_to_a_grid(before: int, behind: int, note: str) -> None:
    model = Tokens(before, behind)
    layout = geometry(model, (1, 3, 16, 24), "norm").layout
    assert layout.labels == ("n", "t", "c")
    assert (layout.grid, layout.prefix, layout.suffix, layout.note) == ((4, 6), before, behind, note)
    x = torch.rand(3, 3, 16, 24)  # another batch than the one that was recorded
    expected = model.norm(model.conv(x).movedim(1, 3)).movedim(3, 1)
    assert torch.allclose(layout.to_grid(model(x)), expected, atol=1e-6)


def test_channels_last_is_turned() -> None:
    layout = geometry(Fn(lambda x: x.permute(0, 2, 3, 1).relu()), (1, 3, 8, 12)).layout
    assert layout.labels == ("n", "y", "x", "c")
    assert layout.channel == 3
    assert "channels last" in layout.note
    x = torch.rand(2, 3, 8, 12)
    assert torch.equal(layout.to_grid(x.permute(0, 2, 3, 1)), x)


def test_windows_are_put_together_and_turned_back() -> None:
    def windows(x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        x = x.roll((-2, -1), (2, 3)).view(n, c, h // 4, 4, w // 4, 4)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c) * 1

    layout = geometry(Fn(windows), (1, 3, 8, 12)).layout
    x = torch.rand(2, 3, 8, 12)
    assert layout.grid == (8, 12)
    assert torch.equal(layout.to_grid(windows(x)), x)


def test_a_vision_transformers_layers_are_grids_its_attention_maps_are_not() -> None:
    torchvision = pytest.importorskip("torchvision")
    vit = torchvision.models.VisionTransformer(32, 8, 2, 4, 16, 32).eval()
    recording = learn(vit, torch.rand(1, 3, 32, 32))
    found = {n.name: g for n, g in zip(recording.nodes, trace(recording), strict=True) if g}
    note = "17 tokens: 1 class token left out, 16 as 4x4"
    assert found["encoder.layers.encoder_layer_0.ln_1"].layout.note == note
    assert str(found["encoder.layers.encoder_layer_0.ln_1"].receptive_field) == "8x8, stride 8, centre 3.5"
    assert str(found["encoder.layers.encoder_layer_1.mlp.3"].receptive_field) == "whole picture"
    assert found["encoder.layers.encoder_layer_1.mlp.3"].layout.note == note
    heads = next(g for n, g in found.items() if "scaled_dot_product_attention" in n or n.endswith("bmm"))
    assert heads.layout.grid == (4, 4) or not heads.layout.spatial
    assert not found["heads.head"].layout.spatial


def test_plain_maps_need_no_note() -> None:
    layout = geometry(conv(3), (1, 3, 8, 12)).layout
    assert (layout.labels, layout.spatial, layout.note, layout.guessed) == (("n", "c", "y", "x"), True, "", False)


def test_vectors_have_no_grid() -> None:
    layout = geometry(nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5)), (1, 3, 8, 8)).layout
    assert layout.labels == ("n", "c")
    assert not layout.spatial
    with pytest.raises(errors.Unsupported, match="no rows and columns"):
        layout.to_grid(torch.zeros(1, 5))


def test_video_has_time_and_no_grid() -> None:
    found = geometry(nn.Conv3d(3, 4, 3, padding=1), (1, 3, 4, 8, 12))
    assert found.layout.labels == ("n", "c", "time", "y", "x")
    assert not found.layout.spatial
    assert str(found.receptive_field) == "3x3, stride 1, centre 0"


@pytest.mark.parametrize(
    ("shape", "labels", "grid"),
    [
        ((1, 7, 4, 6), ("n", "c", "y", "x"), (4, 6)),
        ((1, 25, 8), ("n", "t", "c"), (4, 6)),
        ((1, 24, 8), ("n", "t", "c"), (4, 6)),
        ((1, 29, 8), ("n", "t", "c"), (4, 6)),
        ((1, 50, 8), ("n", "t", "c"), (7, 7)),
        ((1, 23, 8), ("n", "?", "?"), None),
    ],
)
def test_what_cannot_be_followed_is_read_by_its_shape(shape: tuple, labels: tuple, grid: tuple | None) -> None:
    def unknown(x: torch.Tensor) -> torch.Tensor:
        return torch.take(x, torch.arange(int(np.prod(shape))) % x.numel()).reshape(shape).cumsum(1)

    found = geometry(Fn(unknown), (1, 3, 64, 96))
    assert (found.layout.labels, found.layout.grid) == (labels, grid)
    assert found.layout.guessed
    assert ("guessed from the shape" in found.layout.note) == (grid is not None)
    assert str(found.receptive_field) == "up to the whole picture"
    assert not found.receptive_field.exact


# ---------------------------------------------------------------------------------------------------------------------
# Effective boxes


def test_effective_box_leaves_out_the_same_share_on_each_side() -> None:
    """Rows 1 2 4 2 1 of one column: without a tenth at each end 8 of 10 are left, so nine tenths need all."""
    energy = np.zeros((7, 5))
    energy[1:6, 2] = [1, 2, 4, 2, 1]
    assert effective_box(energy, 0.8) == (2, 2, 5, 3)
    assert effective_box(energy, 0.9) == (1, 2, 6, 3)
    assert effective_box(energy, 1.0) == (1, 2, 6, 3)


def test_effective_box_holds_its_share_and_hardly_more() -> None:
    y, x = np.mgrid[:81, :121]
    energy = np.exp(-((y - 40) ** 2) / 50 - ((x - 60) ** 2) / 200)
    top, left, bottom, right = effective_box(energy, 0.9)
    share = energy[top:bottom, left:right].sum() / energy.sum()
    assert 0.9 <= share < 0.95
    assert top + bottom == 81
    assert left + right == 121


def test_effective_box_of_nothing_and_of_nonsense() -> None:
    assert effective_box(np.zeros((3, 4))) == (0, 0, 0, 0)
    with pytest.raises(errors.InputError, match="H, W"):
        effective_box(np.zeros(3))
    with pytest.raises(errors.InputError, match="not negative"):
        effective_box(np.full((2, 2), -1.0))
    with pytest.raises(errors.InputError, match="share"):
        effective_box(np.ones((2, 2)), 0)
