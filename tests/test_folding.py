"""Folding: many points, run with folded weights and maps channels-last, give what a plain run gives."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from innersight import errors, testing
from innersight.observe import folding, passes
from innersight.observe.passes import Engine, Pass, Request

MANY = 100


class Fn(nn.Module):
    """A network that is one function of itself and the picture."""

    def __init__(self, forward: Callable[..., Any], **children: nn.Module):
        super().__init__()
        self.fn = forward
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x: torch.Tensor) -> Any:
        return self.fn(self, x)


def picture(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*(shape or (3, 3, 16, 16)), generator=torch.Generator().manual_seed(seed))


def trained(module: nn.Module, *shape: int) -> nn.Module:
    """In eval mode, with the statistics and the scales of BatchNorms as after a training."""
    torch.manual_seed(0)
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for m in norms:
        m.momentum = None
        if m.affine:
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.uniform_(m.bias, -0.5, 0.5)
    with torch.no_grad():
        module.train()(picture(*(shape or (8, 3, 16, 16)), seed=1))
    return module.eval()


def smooth(module: nn.Module) -> nn.Module:
    """Without kinks: at one, rounding decides which slope a gradient has, and two right answers are far apart."""
    for m in module.modules():
        for name, child in m.named_children():
            if isinstance(child, (nn.ReLU, nn.Hardswish)):
                setattr(m, name, nn.SiLU())
            if isinstance(child, nn.Hardsigmoid):
                setattr(m, name, nn.Sigmoid())
            if isinstance(child, nn.MaxPool2d):
                setattr(m, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
    return module


def score(output: Any) -> torch.Tensor:
    if isinstance(output, dict):
        output = output["logits"]
    return output.flatten(1).square().sum(1)


class Batches(TorchDispatchMode):
    """Which operations run below autograd, and how often."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))

    @property
    def norms(self) -> int:
        return sum("batch_norm" in name and "backward" not in name for name in self.seen)


def run(module: nn.Module, x: torch.Tensor, **request: Any) -> tuple[Pass, Pass, int]:
    """A plain pass, one as of many points, and how many BatchNorms the latter computed."""
    engine, asked = Engine(module), Request(**{"score": score, **request})
    with engine.session():
        plain = engine.run(x, asked)
        engine.run(x, asked, points=MANY)  # compares with a plain run
        with Batches() as batches:
            fast = engine.run(x, asked, points=MANY)
    return plain, fast, batches.norms


def off(found: torch.Tensor, right: torch.Tensor) -> float:
    """The largest difference, in parts of the largest value."""
    assert found.shape == right.shape
    return float(((found - right).abs().max() / right.abs().max()).detach())


def assert_same(plain: Pass, fast: Pass, tolerance: float = 1e-5) -> None:
    pairs = list(zip(passes.observer.tensors_in(fast.output), passes.observer.tensors_in(plain.output), strict=True))
    pairs += [(fast.values[k], plain.values[k]) for k in plain.values]
    pairs += [(fast.gradients[k], plain.gradients[k]) for k in plain.gradients]
    pairs += [(fast.scores, plain.scores)] if plain.scores is not None else []
    assert pairs
    for found, right in pairs:
        assert off(found.detach(), right.detach()) < tolerance
        assert found.is_contiguous()
    assert fast.values.keys() == plain.values.keys()
    assert fast.gradients.keys() == plain.gradients.keys()


# ---------------------------------------------------------------------------------------------------------------------
# Whole networks


# network, a layer read and differentiated, BatchNorms that are left
MODELS = [
    ("resnet18", "layer3.0.relu", 0),
    ("mobilenet_v3_small", "features.8.block.0.1", 0),
    ("densenet121", "features.denseblock2.denselayer1.conv2", 62),  # half of its norms are behind a concatenation
    ("vgg11_bn", "features.16", 0),
]


@pytest.fixture(scope="module")
def zoo() -> Iterator[Callable[[str], nn.Module]]:
    import torchvision

    made: dict[str, nn.Module] = {}

    def get(name: str) -> nn.Module:
        if name not in made:
            options = {"num_classes": 10} if name != "vgg11_bn" else {"num_classes": 10, "dropout": 0.0}
            torch.manual_seed(0)
            net = torchvision.models.get_model(name, weights=None, **options)
            if name == "vgg11_bn":
                net.classifier = nn.Linear(512 * 49, 10)  # its own takes half a gigabyte
            made[name] = trained(smooth(net), 4, 3, 64, 64)
        return made[name]

    yield get
    made.clear()


@pytest.mark.parametrize(("name", "layer", "left"), MODELS, ids=[m[0] for m in MODELS])
def test_values_and_gradients_of_a_network_are_those_of_a_plain_run(zoo, name, layer, left):
    net, x = zoo(name), picture(2, 3, 64, 64)
    with testing.left_as_found(net):
        plain, fast, norms = run(net, x, read=[layer], gradients=["input", layer])
    assert norms == left
    assert_same(plain, fast)
    plain, fast, norms = run(net, x, gradients=[layer])  # the graph begins at the layer
    assert norms == left
    assert_same(plain, fast)
    plain, fast, norms = run(net, x)  # no graph
    assert norms == left
    assert_same(plain, fast)


@pytest.mark.parametrize("name", testing.NETWORKS)
def test_small_networks_of_every_kind_give_what_they_give_plainly(name):
    net = testing.small_network(name)
    x = picture(3, *testing.NETWORKS[name][1])
    middle = list(net.layers)[len(net.layers) // 2]
    with testing.left_as_found(net.module):
        plain, fast, _ = run(net.module, x, read=[middle], gradients=["input", middle])
    assert_same(plain, fast)


def test_a_folded_network_is_as_near_to_the_exact_values_as_a_plain_one():
    import copy

    import torchvision

    torch.manual_seed(0)
    net = trained(torchvision.models.resnet18(weights=None, num_classes=10), 4, 3, 64, 64)
    x = picture(4, 3, 64, 64)
    plain, fast, _ = run(net, x, gradients=["input"], score=lambda output: output[:, 3])
    exact, _, _ = run(copy.deepcopy(net).double(), x.double(), gradients=["input"], score=lambda output: output[:, 3])
    assert off(fast.output, exact.output) < 3 * off(plain.output, exact.output) + 1e-6
    by = {k: (p.gradients["input"] - exact.gradients["input"]).norm() for k, p in (("plain", plain), ("fast", fast))}
    assert by["fast"] < 3 * by["plain"] + 1e-2 * exact.gradients["input"].norm()


# ---------------------------------------------------------------------------------------------------------------------
# What is folded


FOLDED = {
    "conv1d": (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), (3, 3, 9)),
    "conv2d": (nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), (3, 3, 9, 9)),
    "conv2d without bias": (nn.Conv2d(3, 4, (1, 3), bias=False), nn.BatchNorm2d(4), (3, 3, 9, 9)),
    "conv3d": (nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), (3, 3, 5, 5, 5)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (3, 4, 9, 9)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), (3, 4, 9, 9)),
    "circular": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(4), (3, 3, 9, 9)),
    "same": (nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4), (3, 3, 9, 9)),
    "transposed": (nn.ConvTranspose2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), (3, 3, 5, 5)),
    "transposed and grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (3, 4, 5, 5)),
    "linear": (nn.Linear(7, 4), nn.BatchNorm1d(4), (3, 7)),
    "not affine": (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), (3, 3, 9, 9)),
    "large epsilon": (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.3), (3, 3, 9, 9)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", FOLDED)
def test_a_batch_norm_behind_a_convolution_is_folded_into_it(kind, dtype):
    convolution, norm, shape = FOLDED[kind]
    net = trained(
        Fn(lambda m, x: torch.tanh(m.norm(m.convolution(x))), convolution=convolution, norm=norm), 8, *shape[1:]
    )
    net = net.to(dtype)
    plain, fast, norms = run(net, picture(*shape).to(dtype), read=["norm"], gradients=["input", "norm"])
    net.float()
    assert norms == 0
    assert fast.output.dtype == dtype
    assert_same(plain, fast, 1e-5 if dtype == torch.float32 else 1e-12)


def conv_is_asked_for(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return m.b(m.a(x)).sin()


def conv_is_read_twice(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    h = m.a(x)
    return m.b(h) + h


def conv_is_returned(m: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    h = m.a(x)
    return {"conv": h, "logits": m.b(h)}


def something_in_between(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return m.b(m.a(x).sin())


def written_in_between(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    h = m.a(x)
    h.sin_()
    return m.b(h)


def written_through_a_view(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    h = m.a(x)
    h[:, :1].mul_(3)
    return m.b(h)


def scale_is_computed(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(m.a(x), m.b.running_mean, m.b.running_var, m.b.weight * x.mean().exp(), m.b.bias)


def weight_is_computed(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return m.b(F.conv2d(x, m.a.weight * x.mean().exp()))


def weight_is_written(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        m.b.running_mean.copy_(x.mean((0, 2, 3)).repeat(2)[:4])
    return m.b(m.a(x))


def statistics_of_the_batch(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(m.a(x), None, None, m.b.weight, m.b.bias, training=True)


@pytest.mark.parametrize(
    "forward",
    [conv_is_asked_for, conv_is_read_twice, conv_is_returned, something_in_between, written_in_between,
     written_through_a_view, scale_is_computed, weight_is_computed, weight_is_written, statistics_of_the_batch],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_what_cannot_be_folded_is_not(forward):
    net = trained(Fn(forward, a=nn.Conv2d(3, 4, 1, bias=False), b=nn.BatchNorm2d(4)))
    asked = {"read": ["a"], "gradients": ["input", "a"]} if forward is conv_is_asked_for else {"gradients": ["input"]}
    x = picture(1, 3, 16, 16) if forward in (scale_is_computed, weight_is_computed) else picture()
    with testing.left_as_found(net):
        plain, fast, norms = run(net, x, **asked)
    assert norms == 1
    assert_same(plain, fast)


def test_statistics_that_are_not_tracked_are_not_folded():
    net = Fn(lambda m, x: m.b(m.a(x)).sin(), a=nn.Conv2d(3, 4, 3), b=nn.BatchNorm2d(4, track_running_stats=False))
    engine = Engine(net.eval())
    with engine.session():
        plain = engine.run(picture(), Request())
        engine.run(picture(), Request(), points=MANY)
        (made,) = engine._foldings.values()
        assert not made.norms
        assert not made.ways  # a batch is no image times n here, which the comparison told
        assert torch.equal(engine.run(picture(), Request(), points=MANY).output, plain.output)


def test_a_batch_norm_over_another_dimension_is_not_folded():
    net = trained(Fn(lambda m, x: m.b(m.a(x)).sin(), a=nn.Linear(6, 4), b=nn.BatchNorm1d(5)), 8, 5, 6)
    plain, fast, norms = run(net, picture(3, 5, 6), gradients=["input"])
    assert norms == 1
    assert_same(plain, fast)


def test_modules_that_are_used_again_are_folded_at_each_call():
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = m.b(m.a(x)).sin()
        x = m.b(m.a(x)).sin()  # the same two
        x = m.c(m.a(x)).sin()  # the same convolution with another norm
        h = m.a(x)
        return m.b(h) + h.cos()  # and one that is read again

    net = trained(Fn(forward, a=nn.Conv2d(3, 3, 3, padding=1), b=nn.BatchNorm2d(3), c=nn.BatchNorm2d(3)))
    plain, fast, norms = run(net, picture(), read=["b", "c"], gradients=["input", "b_1"])
    assert norms == 1
    assert_same(plain, fast)
    plain, fast, norms = run(net, picture(), read=["a_1"])
    assert norms == 2  # that behind the layer asked for, and the last
    assert_same(plain, fast)


# ---------------------------------------------------------------------------------------------------------------------
# Channels-last


def formats(module: nn.Module, x: torch.Tensor, layer: str) -> tuple[bool, Pass, Pass]:
    """Whether a layer's maps lie channels-last in the second of two passes of many points; that, and a plain one."""
    seen: list[bool] = []

    def look(value: torch.Tensor) -> float:
        seen.append(value.is_contiguous(memory_format=torch.channels_last) and not value.is_contiguous())
        return float(value.sum())

    engine, request = Engine(module), Request(reduce={layer: look}, gradients=["input"], score=score)
    with engine.session():
        engine.run(x, request, points=MANY)
        seen.clear()
        fast = engine.run(x, request, points=MANY)
        assert len(seen) == 1
        return seen[0], engine.run(x, Request(gradients=["input"], score=score)), fast


def test_maps_lie_channels_last_where_that_is_faster():
    net = trained(Fn(lambda m, x: m.b(m.a(x)).sin(), a=nn.Conv2d(3, 4, 3), b=nn.BatchNorm2d(4)))
    assert formats(net, picture(), "sin")[0]
    assert not formats(net.double(), picture().double(), "sin")[0]


def test_a_model_that_views_its_maps_is_folded_all_the_same():
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = m.b(m.a(x)).sin()
        return m.c(h.view(h.shape[0], -1))

    net = trained(Fn(forward, a=nn.Conv2d(3, 4, 3), b=nn.BatchNorm2d(4), c=nn.Linear(4 * 14 * 14, 5)))
    last, plain, fast = formats(net, picture(), "sin")
    assert not last
    fast.values.clear()
    assert_same(plain, fast)
    assert run(net, picture(), gradients=["input"])[2] == 0


def test_a_model_that_silently_depends_on_strides_is_found_out():
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = m.b(m.a(x)).sin()
        return m.c(h.as_strided((h.shape[0], 4 * 14 * 14), (4 * 14 * 14, 1)))

    net = trained(Fn(forward, a=nn.Conv2d(3, 4, 3), b=nn.BatchNorm2d(4), c=nn.Linear(4 * 14 * 14, 5)))
    plain, fast, norms = run(net, picture(), gradients=["input"])
    assert norms == 0  # folded, with maps as the model expects them
    assert_same(plain, fast)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "size"),
    [(7, 2, 3, (16, 16)), (7, 2, 3, (17, 15)), (4, 4, 0, (16, 18)), (11, 4, 2, (27, 35)), (5, 3, 0, (16, 19)),
     ((4, 6), 2, (0, 2), (13, 11)), (5, 2, "valid", (16, 16))],
)  # fmt: skip
def test_the_gradient_through_a_strided_stem_is_autograds(kernel, stride, padding, size):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, kernel, stride, padding), nn.SiLU()).eval()
    x = picture(3, 3, *size)
    engine = Engine(net)
    with engine.session():
        fast = engine.run(x, Request(gradients=["input", "0"], score=score), points=MANY)
        (made,) = engine._foldings.values()
    assert (made.convolutions[0].stem is None) == (padding == "valid")
    y = x.clone().requires_grad_()
    h = net[0](y)
    at_x, at_h = torch.autograd.grad(score(net[1](h)).sum(), [y, h])
    assert off(fast.gradients["input"], at_x) < 1e-5
    assert off(fast.gradients["0"], at_h) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# When, and what is left behind


def small() -> nn.Module:
    return trained(Fn(lambda m, x: m.b(m.a(x)).sin(), a=nn.Conv2d(3, 4, 3), b=nn.BatchNorm2d(4)))


def test_a_single_pass_is_bit_for_bit_that_of_the_model_also_beside_many():
    net, x = small(), picture()
    engine = Engine(net)
    with torch.no_grad():
        expected = net(x)
    with engine.session():
        for points in (1, 7, MANY, 1):
            with Batches() as batches:
                output = engine.run(x, Request(), points).output
            assert torch.equal(output, expected) or points == MANY
        assert batches.norms == 1


def test_a_few_more_points_use_what_many_have_made():
    net, x = small(), picture(2, 3, 16, 16)
    engine, request = Engine(net), Request(gradients=["input"], score=score)
    with engine.session():
        engine.run(x, request), engine.run(x, Request())  # to learn the network
        for points, other, norms in ((2, False, 1), (8, False, 1), (2, False, 0), (2, True, 1), (1, False, 1)):
            with Batches() as batches:
                engine.run(x, Request() if other else request, points)
            assert batches.norms == norms, (points, other)


def test_outside_of_a_session_nothing_is_folded():
    engine = Engine(small())
    engine.run(picture(), Request(), points=MANY)
    assert not engine._foldings


def test_nothing_is_kept_after_the_outermost_session():
    net = small()
    engine = Engine(net)
    with engine.session():
        with engine.session():
            engine.run(picture(), Request(gradients=["input"], score=score), points=MANY)
        (made,) = engine._foldings.values()
        kept = [weakref.ref(made), *(weakref.ref(w) for weights in made._made.values() for w in weights[:2])]
        assert len(kept) == 3
        assert made.weights(0, True, torch.channels_last)[0] is kept[1]()  # made once
        del made
    gc.collect()
    assert [ref() for ref in kept] == [None] * 3


def test_a_model_that_changed_between_sessions_is_folded_anew():
    net, x = small(), picture()
    engine = Engine(net)
    for _ in range(2):
        with engine.session():
            fast = engine.run(x, Request(), points=MANY).output
        with torch.no_grad():
            assert off(fast, net(x)) < 1e-5
            net.a.weight.mul_(2)
            net.b.running_var.add_(1)


def test_parameters_are_not_in_the_graph_of_what_is_folded():
    leaves: list[torch.Tensor] = []

    def look(output: torch.Tensor) -> torch.Tensor:
        waiting = [output.grad_fn]
        while waiting:
            fn = waiting.pop()
            leaves.extend([fn.variable] if hasattr(fn, "variable") else [])
            waiting += [f for f, _ in fn.next_functions if f is not None]
        return score(output)

    net = small()
    engine = Engine(net)
    with engine.session():
        engine.run(picture(), Request(gradients=["input"], score=look))
        assert len([p for p in leaves if isinstance(p, nn.Parameter)]) == 4
        engine.run(picture(), Request(gradients=["input"], score=look), points=MANY)  # and a plain one, to compare
        leaves.clear()
        engine.run(picture(), Request(gradients=["input"], score=look), points=MANY)
    assert not [p for p in leaves if isinstance(p, nn.Parameter)]
    assert len(leaves) == 1


def test_a_model_in_train_mode_with_frozen_parts_is_left_as_found():
    net = small().train()
    net.a.requires_grad_(False)
    x = picture()
    with testing.left_as_found(net):
        fast = run(net, x, gradients=["input"])[1]
    assert off(fast.output, net.eval()(x)) < 1e-5


@contextmanager
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("context", [torch.no_grad, inference, torch.enable_grad], ids=lambda c: c.__name__)
def test_the_callers_grad_mode_makes_no_difference(context):
    net = small()
    expected = run(net, picture(), gradients=["input"])[0]
    with context():
        fast = run(net, picture(), gradients=["input"])[1]
    assert_same(expected, fast)


def test_a_network_of_one_batch_size_is_filled_up():
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        assert len(x) == 4
        return m.b(m.a(x)).sin()

    net = Fn(forward, a=nn.Conv2d(3, 4, 3), b=nn.BatchNorm2d(4)).eval()
    engine, request = Engine(net, fixed_batch=4), Request(read=["b"], gradients=["input"], score=score)
    with engine.session():
        plain = engine.run(picture(), request)
        engine.run(picture(), request, points=MANY)
        with Batches() as batches:
            fast = engine.run(picture(), request, points=MANY)
    assert batches.norms == 0
    assert fast.scores.shape == (3,)
    assert_same(plain, fast)


def test_points_that_take_another_way_get_what_that_way_gives():
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = m.b(m.a(x)) if float(x.mean()) < 0.5 else m.a(x).cos()
        return h.sin()

    net = trained(Fn(forward, a=nn.Conv2d(3, 4, 3), b=nn.BatchNorm2d(4)))
    engine, request = Engine(net), Request(gradients=["input"], score=score)
    with engine.session():
        for x in (picture(), picture() + 1, picture(), picture() + 1):
            assert_same(engine.run(x, request), engine.run(x, request, points=MANY))
        (made,) = engine._foldings.values()
        assert not made.ways  # and is no longer tried


def test_under_autocast_nothing_is_folded_since_that_would_change_the_values():
    net = small()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, fast, norms = run(net, picture(), gradients=["input"])
    assert norms == 1
    assert torch.equal(fast.output, plain.output)
    assert torch.equal(fast.gradients["input"], plain.gradients["input"])


def test_half_precision_is_left_alone():
    net, x = small().bfloat16(), picture().bfloat16()
    plain, fast, norms = run(net, x)
    assert norms == 1
    assert torch.equal(plain.output, fast.output)


def test_memory_that_is_short_is_reported_for_smaller_chunks_and_folding_goes_on():
    net = small()
    engine = Engine(net)

    def greedy(output: torch.Tensor) -> torch.Tensor:
        if len(output) > 2:
            raise torch.OutOfMemoryError
        return score(output)

    request = Request(gradients=["input"], score=greedy)
    with engine.session():
        x = picture(7, 3, 16, 16)
        found = list(engine.chunks(x, lambda part, _: engine.run(part, request, MANY), size=4))
        (made,) = engine._foldings.values()
        assert len(made.ways) == 2
        plain = engine.run(x, Request(gradients=["input"], score=score))
    assert [len(p.scores) for p in found] == [2, 2, 2, 1]
    assert off(torch.cat([p.gradients["input"] for p in found]), plain.gradients["input"]) < 1e-5


def test_errors_are_those_of_a_plain_run():
    net = small()
    engine = Engine(net)

    def wrong(_output: Any) -> torch.Tensor:
        raise ValueError("on purpose")

    with testing.left_as_found(net), engine.session():
        with pytest.raises(ValueError, match="on purpose"):
            engine.run(picture(), Request(gradients=["input"], score=wrong), points=MANY)
        with pytest.raises(LookupError, match="no layer 'c'"):
            engine.run(picture(), Request(read=["c"]), points=MANY)
        with torch.no_grad():
            weight = net.a.weight.clone()
            net.a.weight[0] = float("nan")
        with pytest.raises(errors.InputError, match="the first layer to produce one is 'a'"):
            engine.run(picture(), Request(), points=MANY)
        with torch.no_grad():
            net.a.weight.copy_(weight)


def test_a_recording_with_parts_that_cannot_be_watched_is_not_folded():
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        hidden = torch.jit.script(double)

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = m.a(x)
        m.b(h)
        return hidden(h).sin()

    net = trained(Fn(forward, a=nn.Conv2d(3, 4, 3), b=nn.BatchNorm2d(4)))
    plain, fast, norms = run(net, picture(), gradients=["input"])
    assert norms == 1
    assert_same(plain, fast)


def test_folded_weights_are_rounded_once():
    norm = {"running_mean": torch.tensor([0.3]), "running_var": torch.tensor([0.7]), "weight": torch.tensor([1.1]),
            "bias": torch.tensor([-0.2]), "eps": 1e-3}  # fmt: skip
    convolution = folding._Convolution("conv2d", torch.full((1, 1, 1, 1), 0.9), torch.tensor([0.4]), 1, norm=norm)
    weight, bias = convolution.folded()
    double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in norm.items()}
    scale = double["weight"] / (double["running_var"] + 1e-3).sqrt()
    assert float(weight) == float((torch.tensor(0.9).double() * scale).float())
    shift = (torch.tensor(0.4).double() - double["running_mean"]) * scale + double["bias"]
    assert float(bias) == float(shift.float())
