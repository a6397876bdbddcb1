"""Patches: computing only what a patch reaches gives what whole runs give, patch by patch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from innersight import errors
from innersight.formats.function import open_function
from innersight.observe import observer
from innersight.observe.passes import Engine
from innersight.observe.patches import Patches
from innersight.testing import NETWORKS, left_as_found, small_network

Box = tuple[int, int, int, int]


class Fn(nn.Module):
    """A network that is one function of itself and the picture."""

    def __init__(self, forward: Callable[..., Any], **children: Any):
        super().__init__()
        self.fn = forward
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x: torch.Tensor) -> Any:
        return self.fn(self, x)


def picture(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*(shape or (1, 3, 32, 32)), generator=torch.Generator().manual_seed(seed))


def conv(i: int, o: int, k: int = 1, **options: Any) -> nn.Conv2d:
    torch.manual_seed(i * 31 + o)
    return nn.Conv2d(i, o, k, **options)


def norm(channels: int) -> nn.BatchNorm2d:
    """As after a training."""
    torch.manual_seed(channels)
    made = nn.BatchNorm2d(channels)
    for tensor, low, high in ((made.weight, 0.5, 1.5), (made.bias, -0.3, 0.3), (made.running_mean, -0.3, 0.3),
                              (made.running_var, 0.5, 2.0)):  # fmt: skip
        nn.init.uniform_(tensor, low, high)
    return made


def by_size(height: int, width: int) -> list[Box]:
    """Single pixels, corners, sides, odd sizes, the middle, and all of it."""
    return [
        (0, 0, 1, 1), (height - 1, width - 1, 1, 1), (height // 2, width // 3, 1, 1), (0, width - 4, 3, 4),
        (height - 5, 0, 5, 2), (height // 3, width // 2, 5, 7), (height // 2 + 1, width // 4, 4, 4), (0, 3, height, 2),
        (0, 0, height, width),
    ]  # fmt: skip


SMALL = by_size(32, 32)[:-2]  # those that leave most of the picture as it is


def whole_runs(net: nn.Module, x: torch.Tensor, fill: Any, boxes: list[Box]) -> list[list[torch.Tensor]]:
    """The oracle: the bare model on each patched picture alone."""
    fill = torch.as_tensor(fill).to(x).expand_as(x)
    found = []
    for top, left, height, width in boxes:
        patched = x.clone()
        where = (..., slice(top, top + height), slice(left, left + width))
        patched[where] = fill[where]
        with torch.no_grad():
            found.append([t.clone() for t in observer.tensors_in(net(patched))])
    return found


def agree(outputs: Any, expected: list[list[torch.Tensor]], tolerance: float) -> None:
    outputs = list(observer.tensors_in(outputs))
    assert len(outputs) == len(expected[0])
    for k, output in enumerate(outputs):
        assert len(output) == len(expected)
        for index, each in enumerate(expected):
            scale = float(each[k].abs().max()) or 1.0
            assert float((output[index] - each[k][0]).abs().max()) <= tolerance * scale, (index, k)


def compare(net: nn.Module, x: torch.Tensor, boxes: list[Box], fill: Any = 0.7, tolerance: float = 1e-5,
            **options: Any) -> Patches:  # fmt: skip
    """Answers for the boxes, at once and in parts, against whole runs. Returns the patches."""
    net.eval()
    expected = whole_runs(net, x, fill, boxes)
    clean = whole_runs(net, x, fill, [(0, 0, 0, 0)])[0]
    assert any(not torch.equal(clean[0], each[0]) for each in expected), "patches change nothing"
    engine = Engine(net, **options)
    with left_as_found(net), engine.session():
        patches = Patches(engine, x, fill)
        agree(patches.run(boxes), expected, tolerance)
        for size in (None, 3):
            done = []
            for part, output in patches.parts(boxes, size):
                agree(output, expected[part.start : part.stop], tolerance)
                done += part
            assert done == list(range(len(boxes)))
    return patches


def pooled(h: torch.Tensor) -> torch.Tensor:
    return h.flatten(2).topk(3).values.flatten(1)


# ---------------------------------------------------------------------------------------------------------------------
# One operation at a time, between two convolutions

FOLLOWED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "relu in place": lambda h: F.relu(h, inplace=True),
    "relu in place, answer ignored": lambda h: (F.relu_(h), h)[1],
    "relu6": F.relu6,
    "hardswish": lambda h: F.hardswish(h, True),
    "silu, gelu, elu, leaky relu": lambda h: F.leaky_relu(F.elu(F.gelu(F.silu(h)))),
    "arithmetic": lambda h: (1 - h * 2 + h.abs().sqrt()).div_(3).clamp(-1, 1),
    "in place arithmetic": lambda h: h.mul_(2).add_(h).sub_(1),
    "operators in place": lambda h: _iadd(h, h * 2),
    "where": lambda h: torch.where(h > 0.1, h, -h),
    "a channel's own factor": lambda h: h * torch.linspace(-1, 1, 8)[:, None, None],
    "batch norm alone": lambda h: F.batch_norm(F.relu(h), torch.zeros(8), torch.ones(8)),
    "prelu": lambda h: F.prelu(h, torch.linspace(0, 1, 8)),
    "dropout": lambda h: F.dropout(h, 0.5, False),
    "dropout in place": lambda h: F.dropout(h, 0.5, False, True),
    "conv strided": lambda h: _conv(h, 8, 3, stride=2, padding=1),
    "conv with another stride each way": lambda h: _conv(h, 8, (3, 2), stride=(1, 2), padding=(0, 1)),
    "conv dilated": lambda h: _conv(h, 8, 3, dilation=2, padding=2),
    "conv depthwise": lambda h: _conv(h, 8, 3, padding=1, groups=8),
    "conv grouped": lambda h: _conv(h, 8, 3, padding=1, groups=2),
    "conv with stride above its kernel": lambda h: _conv(h, 8, 1, stride=3),
    "conv unpadded": lambda h: _conv(h, 8, 5),
    "conv padded widely": lambda h: _conv(h, 8, 3, padding=4),
    "conv same": lambda h: _conv(h, 8, 4, padding="same"),
    "conv valid": lambda h: _conv(h, 8, 2, padding="valid"),
    "torch.convolution": lambda h: torch.convolution(h, torch.full((8, 8, 3, 3), 0.1), None, [2, 2], [1, 1], [1, 1],
                                                     False, [0, 0], 1),
    "max pool": lambda h: F.max_pool2d(h, 2),
    "max pool padded, ceil": lambda h: F.max_pool2d(h - 9, 3, 2, 1, ceil_mode=True),
    "max pool ceil": lambda h: F.max_pool2d(h - 9, 3, 2, ceil_mode=True),
    "max pool dilated": lambda h: F.max_pool2d(h, 3, 2, 1, 2),
    "average pool": lambda h: F.avg_pool2d(h, 2),
    "average pool padded": lambda h: F.avg_pool2d(h + 9, 3, 2, 1),
    "average pool that does not count padding": lambda h: F.avg_pool2d(h + 9, 3, 1, 1, count_include_pad=False),
    "average pool ceil": lambda h: F.avg_pool2d(h + 9, 3, 2, 0, True),
    "average pool ceil, padded": lambda h: F.avg_pool2d(h + 9, (3, 4), (2, 3), 1, True, False),
    "average pool, other divisor": lambda h: F.avg_pool2d(h + 9, 3, 2, 1, divisor_override=5),
    "adaptive average pool": lambda h: F.adaptive_avg_pool2d(h, 16),
    "adaptive average pool of the same size": lambda h: F.adaptive_avg_pool2d(h, 32),
    "adaptive max pool": lambda h: F.adaptive_max_pool2d(h, (8, 16)),
    "cat": lambda h: torch.cat([h[:, :4], _conv(h, 4, 3, padding=1)], 1),
    "branches of different reach": lambda h: _conv(h, 8, 5, padding=2) + h * _conv(h, 8, 1),
    "chunks": lambda h: torch.cat(h.chunk(2, 1)[::-1], 1),
    "split": lambda h: torch.cat([p.relu() for p in h.split([3, 5], 1)], 1),
    "unbind": lambda h: h[:, 0:1] + h.unbind(1)[2][:, None] + h,
    "channels picked": lambda h: h[:, 2][:, None] * h[:, 1:2] + h[..., :, :].select(1, 0).unsqueeze(1) + h,
    "index_select and narrow": lambda h: h.narrow(1, 0, 4).tanh() + h.index_select(1, torch.tensor([1, 0, 3, 2])),
    "channel shuffle": lambda h: h.view(len(h), 2, 4, *h.shape[2:]).transpose(1, 2).contiguous().view(h.shape),
    "channel shuffle by torch": lambda h: F.channel_shuffle(h, 2),
    "softmax over channels": lambda h: h.softmax(1),
    "normalized over channels": lambda h: F.normalize(h),
    "local response": lambda h: F.local_response_norm(h, 3),
    "mean and maximum of channels": lambda h: h * torch.sigmoid(h.mean(1, keepdim=True) + h.max(1, keepdim=True)[0]),
    "a mean that drops the channels": lambda h: h.mean(1).unsqueeze(1) + h,
    "channels last, layer norm, linear": lambda h: F.linear(
        F.layer_norm(h.permute(0, 2, 3, 1), (8,)), torch.eye(8) + 0.1).permute(0, 3, 1, 2),
    "movedim and swapaxes": lambda h: h.movedim(1, -1).relu().movedim(-1, 1).swapaxes(2, 3).tanh().transpose(3, 2),
    "rows and columns flattened apart": lambda h: h.reshape(len(h), 2, 2, 2, *h.shape[2:]).flatten(1, 3),
    "padded with a constant": lambda h: F.pad(h, (1, 2, 3, 0), value=0.5),
    "padded, then written": lambda h: _conv(F.pad(h, (1, 1, 1, 1)).relu_(), 8, 3) + h,
    "reshaped, then written": lambda h: h.reshape(len(h), 2, 4, *h.shape[2:]).clone().relu_().flatten(1, 2) - h,
    "squeezed": lambda h: h.unsqueeze(2).squeeze(2).unsqueeze(-1).squeeze(-1),
    "double precision and back": lambda h: h.double().float(),
    "detached and cloned": lambda h: h.detach().clone().contiguous(),
    "the data attribute": lambda h: h.data * 2,
}  # fmt: skip

NOT_FOLLOWED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "interpolated": lambda h: F.interpolate(h, scale_factor=2),
    "padded by reflection": lambda h: F.pad(h, (1, 1, 1, 1), mode="reflect"),
    "padded circularly": lambda h: F.pad(h, (1, 1, 1, 1), mode="circular"),
    "cut at the side": lambda h: h[:, :, 1:-1, 2:],
    "padded by less than nothing": lambda h: F.pad(h, (-1, 0, 2, 0)),
    "flipped": lambda h: h.flip(3),
    "rolled": lambda h: h.roll(3, 2),
    "rows against columns": lambda h: h + h.transpose(2, 3),
    "every other row": lambda h: h[:, :, ::2],
    "one row picked": lambda h: h[:, :, 3][:, :, None] + h,
    "positions added": lambda h: h + torch.linspace(0, 1, 32),
    "squeeze and excitation": lambda h: h * torch.sigmoid(F.adaptive_avg_pool2d(h, 1)),
    "gate by mean": lambda h: h * h.mean((2, 3), keepdim=True),
    "uneven adaptive pool": lambda h: F.adaptive_avg_pool2d(h, 7),
    "group norm": lambda h: F.group_norm(h, 2),
    "instance norm": lambda h: F.instance_norm(h),
    "softmax over columns": lambda h: h.softmax(3),
    "layer norm of everything": lambda h: F.layer_norm(h, h.shape[1:]),
    "attention": lambda h: F.scaled_dot_product_attention(
        *[h.flatten(2).transpose(1, 2)] * 3).transpose(1, 2).unflatten(2, (32, 32)),
    "transposed convolution": lambda h: F.conv_transpose2d(h, torch.full((8, 8, 2, 2), 0.1), stride=2),
    "pixel shuffle": lambda h: F.pixel_shuffle(h, 2),
    "linear over columns": lambda h: F.linear(h, torch.eye(32) + 0.1),
    "rows and channels mixed": lambda h: h.reshape(len(h), 32, 8, 32).transpose(1, 2),
    "unsqueezed in place": lambda h: h.unsqueeze_(2).squeeze_(2),
    "pooled with its indices": lambda h: F.max_pool2d(h, 2, return_indices=True)[0],
    "written to a canvas": lambda h: _on_canvas(h),
    "an out argument": lambda h: torch.add(h, 1, out=torch.empty_like(h)),
}  # fmt: skip


def _iadd(h: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    h += other
    h *= 2
    return h


def _conv(h: torch.Tensor, out: int, k: int | tuple[int, int], groups: int = 1, **options: Any) -> torch.Tensor:
    k = (k, k) if isinstance(k, int) else k
    generator = torch.Generator().manual_seed(out * 7 + k[0])
    return F.conv2d(h, torch.randn(out, h.shape[1] // groups, *k, generator=generator) * 0.3, groups=groups, **options)


def _on_canvas(h: torch.Tensor) -> torch.Tensor:
    board = h.new_zeros(h.shape)
    board[:, :4] = h[:, 4:]
    return board


def between(operation: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = operation(m.first(x))
        for k, c in enumerate(m.behind):
            h = c(h) if k == len(m.behind) - 1 else c(h).tanh()
        return pooled(h)

    with torch.no_grad():
        channels = operation(torch.randn(1, 8, 32, 32)).shape[1]
    behind = nn.ModuleList([conv(channels, 16, 3, padding=1), conv(16, 4)])
    return Fn(forward, first=conv(3, 8, 3, padding=1), behind=behind)


def last_convolution(patches: Patches) -> int:
    return patches.plan.recording.find("behind.1").index


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("name", FOLLOWED)
def test_an_operation_is_followed_and_exact(name):
    patches = compare(between(FOLLOWED[name]), picture(), SMALL)
    assert patches.skips
    assert min(patches._dense) > last_convolution(patches), patches.notes


@pytest.mark.parametrize("name", NOT_FOLLOWED)
def test_an_operation_that_is_not_followed_is_exact_all_the_same(name):
    patches = compare(between(NOT_FOLLOWED[name]), picture(), SMALL)
    assert patches.skips
    assert min(patches._dense) < last_convolution(patches), patches.notes


def written_in_part(h: torch.Tensor) -> torch.Tensor:
    h[:, 1:3] += 2
    return h


def a_view_is_written(h: torch.Tensor) -> torch.Tensor:
    top = h[:, :2]
    top.mul_(3)
    return h


def a_view_with_another_shape(h: torch.Tensor) -> torch.Tensor:
    flat = h.flatten(2)
    flat.relu_()
    return h + flat.mean(1).view(len(h), 1, 32, 32)


def a_flat_view_is_written(h: torch.Tensor) -> torch.Tensor:
    h.flatten(1).relu_()
    return h


@pytest.mark.parametrize(
    "operation", [written_in_part, a_view_is_written, a_view_with_another_shape, a_flat_view_is_written]
)
def test_memory_that_is_written_through_another_tensor(operation):
    net = between(operation)
    compare(net, picture(), SMALL)
    later = Fn(lambda m, x: m.net(m.pre(x)), pre=conv(3, 3, 3, stride=1, padding=1), net=net)
    assert compare(later, picture(), SMALL).skips


def test_a_copy_on_the_model_s_side_that_is_none_of_a_window():
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = m.a(x)
        y = h.permute(0, 2, 3, 1).contiguous()  # of a channels-last window this would be the window itself
        y.add_(1)
        return pooled(m.b(h * y.permute(0, 3, 1, 2)))

    compare(Fn(forward, a=conv(3, 8, 3), b=conv(8, 4, 3)), picture(), SMALL)


def test_the_input_is_written():
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x -= 0.3
        x.div_(0.5)
        return pooled(m.b(m.a(x).relu_()))

    x = picture()
    patches = compare(Fn(forward, a=conv(3, 8, 3), b=conv(8, 4, 3)), x, SMALL)
    assert patches.share < 0.3
    assert torch.equal(x, picture())


def test_views_of_a_map_that_lies_channels_last():
    """`view(n, -1)` works on the model's own maps and must go on to work."""
    net = Fn(lambda m, x: m.fc(F.max_pool2d(m.a(x).relu(), 4).view(x.shape[0], -1)), a=conv(3, 8, 3, padding=1),
             fc=nn.Linear(512, 4))  # fmt: skip
    assert compare(net, picture(), by_size(32, 32)).skips


# ---------------------------------------------------------------------------------------------------------------------
# Networks


@pytest.mark.parametrize("name", NETWORKS)
def test_small_networks(name):
    net = small_network(name).module
    patches = compare(net, picture(1, 3, 16, 16), by_size(16, 16))
    assert patches.skips


def torchvision_model(name: str, **options: Any) -> nn.Module:
    import torchvision

    torch.manual_seed(0)
    make = torchvision.models.get_model_builder(name)
    if name.startswith(("vgg", "alexnet")):  # drawing the weights of their heads takes longer than all else
        with torch.device("meta"):
            net = make()
            net.classifier = nn.Linear(next(m for m in net.classifier if isinstance(m, nn.Linear)).in_features, 10)
        net.to_empty(device="cpu")
        for m in net.modules():
            if hasattr(m, "reset_parameters"):
                m.reset_parameters()
    else:
        net = make(weights=None, **options)
    for m in net.modules():  # as after a training
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.8, 1.6)
            nn.init.uniform_(m.bias, -0.2, 0.5)
            nn.init.uniform_(m.running_mean, -0.2, 0.2)
            nn.init.uniform_(m.running_var, 0.8, 1.5)
    return net


def some_boxes(size: int) -> list[Box]:
    return [(0, 0, 1, 1), (size - 9, size - 8, 9, 8), (size // 2, 5, 4, 9), (0, size // 2, 3, 3), (7, 11, 6, 5)]


@pytest.mark.parametrize(
    ("name", "size", "share", "options"),
    [
        ("resnet18", 64, 0.95, {}),
        ("vgg11_bn", 64, 0.6, {}),
        ("alexnet", 64, 0.95, {}),
        ("densenet121", 64, 0.8, {}),
        ("mobilenet_v2", 64, 0.8, {}),
        ("mobilenet_v3_small", 64, 0.99, {}),
        ("googlenet", 64, 0.7, {"init_weights": False}),
        ("squeezenet1_1", 64, 0.7, {}),
        ("shufflenet_v2_x0_5", 64, 0.9, {}),
        ("efficientnet_b0", 64, 1.0, {}),
        ("regnet_x_400mf", 64, 0.9, {}),
        ("convnext_tiny", 96, 0.9, {}),
    ],
)
def test_answers_equal_whole_runs(name, size, share, options):
    patches = compare(torchvision_model(name, **options), picture(1, 3, size, size), some_boxes(size), tolerance=2e-5)
    assert patches.skips
    assert patches.share < share, patches.notes


def test_a_vision_transformer():
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    net = VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5)
    nn.init.normal_(net.heads.head.weight)
    assert compare(net, picture(), by_size(32, 32)).skips


def test_a_segmentation_network_answers_with_maps():
    def forward(m: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
        h = m.b(m.a(x).relu())
        small = m.c(F.max_pool2d(h, 2))
        return {"out": F.interpolate(small, x.shape[2:], mode="bilinear"), "features": h}

    net = Fn(forward, a=conv(3, 8, 3, padding=1), b=conv(8, 8, 3, padding=1), c=conv(8, 4, 3, padding=1))
    patches = compare(net, picture(), by_size(32, 32))
    assert patches.skips


# ---------------------------------------------------------------------------------------------------------------------
# Random stacks

BLOCKS = ["conv", "strided", "depthwise", "dilated", "max", "max ceil", "average", "average ceil", "norm", "residual",
          "dense", "pre-activation", "downsample", "pad", "layer norm"]  # fmt: skip


class Stack(nn.Module):
    def __init__(self, kinds: list[str]):
        super().__init__()
        self.kinds = kinds
        self.convolutions = nn.ModuleList(conv(3 if k == 0 else 6, 6, 3, padding=1) for k in range(len(kinds) + 1))
        self.others = nn.ModuleList(conv(6, 6, 1, stride=2) for _ in kinds)
        self.norms = nn.ModuleList(norm(6) for _ in kinds)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.convolutions[0](x)
        for kind, c, other, n in zip(self.kinds, self.convolutions[1:], self.others, self.norms, strict=True):
            if min(h.shape[2:]) < 6:
                break
            h = self.block(kind, h, c, other, n)
        return h.flatten(1)

    def block(self, kind: str, h: torch.Tensor, c: nn.Module, other: nn.Module, n: nn.Module) -> torch.Tensor:
        w, b = c.weight, c.bias
        match kind:
            case "conv":
                return c(h).relu()
            case "strided":
                return F.conv2d(h, w, b, stride=(2, 3), padding=(0, 2))
            case "depthwise":
                return F.relu6(F.conv2d(h, w[:, :1], b, padding=2, groups=6))
            case "dilated":
                return F.conv2d(h, w, None, padding=1, dilation=2)
            case "max":
                return F.max_pool2d(h, 3, 2, 1)
            case "max ceil":
                return F.max_pool2d(h, (2, 3), 2, ceil_mode=True)
            case "average":
                return F.avg_pool2d(h, 3, 1, 1, count_include_pad=False)
            case "average ceil":
                return F.avg_pool2d(h, 2, 2, 0, True)
            case "norm":
                return F.relu(n(c(h)), inplace=True)
            case "residual":
                out = n(c(h))
                out += h
                return F.relu_(out)
            case "dense":
                return torch.cat([h[:, :3], F.conv2d(h, w[:3], b[:3], padding=1)], 1)
            case "pre-activation":
                return h + c(n(h).relu())
            case "downsample":
                return other(h) + F.conv2d(h, w, b, stride=2, padding=1)
            case "pad":
                return c(F.pad(h, (0, 1, 2, 0)))
        return F.layer_norm(h.permute(0, 2, 3, 1), (6,)).permute(0, 3, 1, 2)


@given(
    st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=6),
    st.tuples(st.integers(9, 30), st.integers(9, 30)),
    st.lists(st.tuples(*[st.floats(0, 0.999)] * 4), min_size=1, max_size=5),
)
@settings(max_examples=60, deadline=None)
def test_any_stack_at_any_size_with_any_boxes(kinds, size, corners):
    boxes = []
    for y, x, h, w in corners:
        top, left = int(y * size[0]), int(x * size[1])
        boxes.append((top, left, 1 + int(h * (size[0] - top)), 1 + int(w * (size[1] - left))))
    net, x = Stack(kinds).eval(), picture(1, 3, *size)
    expected = whole_runs(net, x, 2.0, boxes)
    engine = Engine(net)
    with engine.session():
        patches = Patches(engine, x, 2.0)
        agree(patches.run(boxes), expected, 5e-5)
    assert patches.skips


# ---------------------------------------------------------------------------------------------------------------------
# Models with ways of their own


def test_only_what_a_patch_reaches_is_computed():
    net = Fn(lambda m, x: pooled(m.b(m.a(x))), a=conv(3, 8, 3, padding=1), b=conv(8, 4, 3, padding=1)).eval()
    engine = Engine(net)
    made = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket.__name__ == "convolution":
                made.append(tuple(out.shape))
            return out

    with engine.session():
        patches = Patches(engine, picture(), 0.0)
        patches.run([(4, 4, 2, 3)])
        with Count():
            patches.run([(10, 10, 2, 3), (0, 0, 2, 3)])
        assert made == [(2, 8, 4, 5), (2, 4, 6, 7)]
        share = (8 * 27 * 20 + 4 * 72 * 42) / ((8 * 27 + 4 * 72) * 32 * 32)
        assert math.isclose(patches.share, share)
        assert "3% of the multiplications" in patches.notes[0]


def test_what_a_patch_does_not_reach_is_as_in_the_clean_run():
    """Bit by bit: only windows are laid over it."""
    net = Fn(lambda m, x: m.b(m.a(x)), a=conv(3, 8, 3, padding=1), b=conv(8, 4, 3, padding=1)).eval()
    engine = Engine(net)
    with engine.session(), torch.no_grad():
        out = Patches(engine, picture(), 0.0).run([(10, 12, 4, 4)])
        clean = net(picture())
    changed = torch.zeros(32, 32, dtype=torch.bool)
    changed[8:16, 10:18] = True
    assert torch.equal(out[0][:, ~changed], clean[0][:, ~changed])
    assert not torch.equal(out[0][:, changed], clean[0][:, changed])


@pytest.mark.parametrize("fill", [0.5, torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), picture(1, 3, 32, 32, seed=5),
                                  picture(1, 1, 32, 32, seed=6)])  # fmt: skip
def test_fills_of_any_shape(fill):
    compare(between(F.relu), picture(), SMALL, fill)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_precisions(dtype):
    net = between(F.relu).to(dtype)
    x = picture().to(dtype)
    assert compare(net, x, SMALL, tolerance=1e-12 if dtype == torch.float64 else 5e-3).skips


def test_a_network_that_works_in_half_precision_inside():
    net = between(F.relu).half()
    call = lambda m, batch: m(batch.half())  # noqa: E731
    expected = whole_runs(lambda t: net(t.half()), picture(), 0.7, SMALL)
    engine = Engine(net.eval(), call=call)
    with engine.session():
        patches = Patches(engine, picture(), 0.7)
        agree(patches.run(SMALL), expected, 5e-3)
    assert patches.skips


def test_a_network_of_one_batch_size():
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[0] == 2
        return pooled(m.a(x))

    net = Fn(forward, a=conv(3, 5, 3)).eval()
    expected = whole_runs(lambda t: net(t.repeat(2, 1, 1, 1))[:1], picture(), 0.7, SMALL)
    engine = Engine(net, fixed_batch=2)
    with left_as_found(net), engine.session():
        patches = Patches(engine, picture(), 0.7)
        agree(patches.run(SMALL), expected, 1e-6)
        for part, output in patches.parts(SMALL):
            agree(output, expected[part.start : part.stop], 1e-6)
    assert not patches.skips
    assert "batches of 2 only" in patches.notes[0]


def test_a_plain_function_means_whole_runs():
    def means(batch: np.ndarray) -> np.ndarray:
        return batch.mean((2, 3)) ** 3

    net = open_function(means).module
    patches = compare(net, picture(), SMALL)
    assert not patches.skips
    assert patches.share == 1.0
    assert "whole run" in patches.notes[0]


def test_numbers_read_out_of_tensors_mean_one_whole_run_each():
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = m.a(x)
        return pooled(m.b(h)) if h.abs().mean().item() > 0.4 else pooled(m.b(h.relu() * 3))

    assert not compare(Fn(forward, a=conv(3, 8), b=conv(8, 4)), picture(), by_size(32, 32), fill=4.0).skips


@pytest.mark.parametrize("mix", ["mean", "batch norm", "one image only", "another way for two"])
def test_models_that_do_not_keep_images_apart(mix):
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = m.a(x)
        if mix == "mean":
            h = h - h.mean((0, 2, 3), keepdim=True)
        elif mix == "batch norm":
            h = F.batch_norm(h, None, None, training=True)
        elif mix == "one image only":
            h = h.view(1, 8, 32, 32)
        elif len(x) > 1:
            h = h.relu()
        return pooled(m.b(h.tanh()))

    assert not compare(Fn(forward, a=conv(3, 8), b=conv(8, 4)), picture(), SMALL).skips


def test_a_batch_merged_the_other_way_round_is_found_out():
    """Batch and channels in one dimension, the batch running fastest: right for one image, wrong for two."""

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = m.a(x)
        n, c = h.shape[:2]
        h = h.transpose(0, 1).reshape(1, c * n, 32, 32).relu()
        return pooled(m.b(h.view(n, c, 32, 32)))

    compare(Fn(forward, a=conv(3, 8), b=conv(8, 4)), picture(), SMALL)


def test_another_way_for_some_patches():
    """The path hangs on a flag that nobody can see: followed until it differs, whole runs from there on."""
    state = {"calls": 0}

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        state["calls"] += 1
        h = m.a(x)
        return pooled(m.b(h.relu() if state["calls"] > 5 else h))

    net = Fn(forward, a=conv(3, 8), b=conv(8, 4)).eval()
    engine = Engine(net)
    with engine.session():
        patches = Patches(engine, picture(), 0.7)
        patches.run(SMALL[:1])
        state["calls"] = 10
        found = patches.run(SMALL)
    agree(found, whole_runs(net, picture(), 0.7, SMALL), 1e-6)
    assert not patches.skips
    assert "another way" in patches.notes[0]


def test_a_rule_that_is_wrong_is_found_out(monkeypatch):
    """The first patch is compared with a whole run."""
    from innersight.observe import regions

    monkeypatch.setitem(regions.RULES, "flip", lambda call: call.along())
    patches = compare(between(lambda h: h.flip(3) + h), picture(), SMALL)
    assert not patches.skips
    assert "differed" in patches.notes[0]


def test_nan_is_refused_as_the_engine_does():
    net = Fn(lambda m, x: pooled(m.b(m.a(x).log())), a=conv(3, 8), b=conv(8, 4)).eval()
    engine = Engine(net)
    with left_as_found(net), engine.session(), pytest.raises(errors.InputError, match="the first layer to produce one"):
        Patches(engine, picture(), 0.0).run(SMALL)
    net = between(F.relu).eval()
    engine = Engine(net)
    with engine.session(), pytest.raises(errors.InputError, match="NaN"):
        Patches(engine, picture(), float("nan")).run(SMALL)


def test_an_error_of_the_model_leaves_it_as_found_and_is_its_own():
    state = {"fails": False}

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = m.a(x)
        if state["fails"]:
            raise ZeroDivisionError("on purpose")
        return pooled(m.b(h))

    net = Fn(forward, a=conv(3, 8), b=conv(8, 4)).train()
    engine = Engine(net)
    with left_as_found(net), engine.session():
        patches = Patches(engine, picture(), 0.7)
        patches.run(SMALL)
        state["fails"] = True
        with pytest.raises(ZeroDivisionError, match="on purpose"):
            patches.run(SMALL)


def test_what_does_not_fit_is_refused():
    engine = Engine(between(F.relu).eval())
    with engine.session():
        with pytest.raises(errors.InputError, match=r"one picture \(1, C, H, W\), not over \(2, 3, 32, 32\)"):
            Patches(engine, picture(2, 3, 32, 32), 0.0)
        with pytest.raises(errors.InputError, match=r"the fill \(3, 5, 5\) does not fit"):
            Patches(engine, picture(), torch.zeros(3, 5, 5))
        patches = Patches(engine, picture(), 0.0)
        for box in [(3, 3, 0, 2), (40, 3, 2, 2), (-5, 0, 5, 5)]:
            with pytest.raises(errors.InputError, match="covers no pixel"):
                patches.run([(0, 0, 1, 1), box])
        with pytest.raises(errors.InputError, match="no boxes"):
            patches.run([])


def test_boxes_over_the_border_end_at_it():
    net = between(F.relu).eval()
    engine = Engine(net)
    with engine.session():
        patches = Patches(engine, picture(), 0.7)
        cut, whole = patches.run([(-2, 28, 5, 9)]), patches.run([(0, 28, 3, 4)])
    assert torch.equal(cut, whole)


def test_any_number_of_boxes_comes_back_in_order():
    """In groups of patches that reach equally far, put back into the order given."""
    net = between(lambda h: F.max_pool2d(h, 2)).eval()
    boxes = [(y, x, 4, 4) for y in range(0, 32, 4) for x in range(0, 32, 4)]
    order = np.random.default_rng(0).permutation(len(boxes))
    boxes = np.asarray(boxes)[order]
    expected = whole_runs(net, picture(), 0.7, boxes.tolist())
    engine = Engine(net)
    with engine.session():
        patches = Patches(engine, picture(), 0.7)
        seen = 0
        for part, output in patches.parts(torch.from_numpy(boxes), 5):
            assert part.start == seen
            agree(output, expected[part.start : part.stop], 1e-5)
            seen = part.stop
        assert seen == len(boxes)
        assert patches.chunk_size() == 32
        assert list(patches.parts(boxes[:0])) == []
    small = Engine(net, budget=1)
    with small.session():
        assert Patches(small, picture(), 0.7).chunk_size() == 1
