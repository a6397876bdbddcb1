"""Passes: values and gradients of any layers in one trip equal plain autograd on an out-of-place copy."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from innersight import errors
from innersight.observe.passes import Engine, Pass, Request


class Fn(nn.Module):
    """A network that is one function of itself and the picture."""

    def __init__(self, forward: Callable[..., Any], **children: Any):
        super().__init__()
        self.fn = forward
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, *x: torch.Tensor) -> Any:
        return self.fn(self, *x)


def picture(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*(shape or (1, 3, 8, 8)), generator=torch.Generator().manual_seed(seed))


def score(output: torch.Tensor) -> torch.Tensor:
    return output.flatten(1).square().sum(1)


def run(module: nn.Module, x: torch.Tensor, call: Callable[..., Any] | None = None, **request: Any) -> Pass:
    engine = Engine(module.eval(), call=call)
    with engine.session():
        return engine.run(x, Request(**{"score": score, **request}))


def plain(forward: Callable[[torch.Tensor, dict], torch.Tensor], x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients of what `forward` puts into its dict, by autograd as everybody uses it, nothing in place."""
    at: dict[str, torch.Tensor] = {"input": x.clone().requires_grad_()}
    output = forward(at["input"], at)
    return dict(zip(at, torch.autograd.grad(score(output).sum(), list(at.values())), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


class Residual(nn.Module):
    """In-place additions and activations over a block with a branch beside it, as in every ResNet."""

    def __init__(self, inplace: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.inplace = inplace
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.a = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.side = nn.Conv2d(4, 4, 1)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor, at: dict | None = None) -> torch.Tensor:
        at = {} if at is None else at
        at["stem"] = h = self.stem(x)
        at["relu"] = h = F.relu(h, inplace=self.inplace)
        at["side"] = side = self.side(h)
        at["a"] = b = self.a(h)
        at["bn"] = b = self.bn(b)
        if self.inplace:
            b += side
        else:
            b = b + side
        at["add"] = b
        at["relu_1"] = b = F.relu(b, inplace=self.inplace)
        at["head"] = b = self.head(b)
        return b


LAYERS = ["stem", "relu", "side", "a", "bn", "add", "relu_1", "head"]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "layers",
    [LAYERS, ["input", *LAYERS], ["bn"], ["add"], ["side"], ["side", "a"], ["relu", "add"], ["a", "side", "relu_1"]],
    ids=",".join,
)
def test_gradients_of_several_layers_in_one_pass_equal_an_out_of_place_copy(layers, frozen):
    net = Residual().requires_grad_(not frozen).eval()
    twin = Residual(inplace=False).eval()
    twin.load_state_dict(net.state_dict())
    x = picture(2, 3, 8, 8)
    expected = plain(twin, x)
    passed = run(net, x, gradients=layers, read=LAYERS)
    assert list(passed.gradients) == layers
    for layer in layers:
        torch.testing.assert_close(passed.gradients[layer], expected[layer], rtol=0, atol=0)
    with torch.no_grad():
        values: dict[str, torch.Tensor] = {}
        output = twin(x, values)
    assert torch.equal(passed.output, output)
    for layer in LAYERS:
        assert torch.equal(passed.values[layer], values[layer]), layer


def test_resnet_layers_at_every_depth_equal_an_out_of_place_copy():
    import torchvision

    torch.manual_seed(0)
    net = torchvision.models.resnet18(weights=None).eval()
    twin = copy.deepcopy(net)
    for m in twin.modules():
        if isinstance(m, nn.ReLU):
            m.inplace = False
    x = picture(1, 3, 48, 48)
    seen: dict[str, torch.Tensor] = {}

    def hook_for(path: str) -> Callable[..., torch.Tensor]:
        def hook(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
            seen[path] = output
            return output.clone()  # what `out += identity` may write into

        return hook

    for path in ("layer1.0.conv2", "layer2.0.bn2", "layer2.0.downsample", "layer3.1.conv1", "layer4"):
        twin.get_submodule(path).register_forward_hook(hook_for(path))
    total = score(twin(x)).sum()
    expected = torch.autograd.grad(total, list(seen.values()))
    passed = run(net, x, gradients=list(seen))
    for path, gradient in zip(seen, expected, strict=True):
        torch.testing.assert_close(passed.gradients[path], gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("where", ["input", "layer"])
def test_a_gradient_equals_finite_differences(where):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)).double().eval()
    x = picture(1, 1, 5, 5).double()
    if where == "input":
        base, function, layer = x, lambda z: score(net(z)), "input"
    else:
        base, function, layer = net[0](x).detach(), lambda z: score(net[1:](z)), "0"
    found = run(net, x, gradients=[layer]).gradients[layer]
    with torch.no_grad():
        for index in range(0, base.numel(), 3):
            step = torch.zeros_like(base).flatten()
            step[index] = 1e-6
            step = step.view_as(base)
            slope = (function(base + step) - function(base - step)) / 2e-6
            assert abs(float(slope) - float(found.flatten()[index])) < 1e-6


def test_no_parameter_gets_or_costs_a_gradient():
    net = Residual().eval()
    before = [p.grad for p in net.parameters()]
    run(net, picture(), gradients=["input", "a"])
    assert before == [None] * len(before)
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_parameter_gradients_are_not_computed():
    computed = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(_ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return x * w

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> Any:
            computed.append(ctx.needs_input_grad)
            return g, None

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))
            self.inner = nn.Parameter(torch.ones(1))
            self.inner.register_hook(lambda _: computed.append("parameter"))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Probe.apply(x, self.w) * self.inner

    run(Scale(), picture(), gradients=["input"])
    assert "parameter" not in computed
    assert len(computed) == 1


def test_before_the_earliest_wanted_layer_nothing_is_recorded():
    recorded = []

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = m.a(x)
        recorded.append(h.requires_grad)
        h = m.b(h)
        recorded.append(h.requires_grad)
        return h * 2

    net = Fn(forward, a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 3, 1)).eval()
    engine = Engine(net)
    with engine.session():
        engine.recording(picture(), grad=True)
        recorded.clear()
        engine.run(picture(), Request(gradients=["b"], score=score))
    assert recorded == [False, True]


def test_where_there_is_no_path_the_gradient_is_none():
    net = Fn(lambda m, x: m.a(x) + 0 * m.b(x).detach(), a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 3, 1))
    gradients = run(net, picture(), gradients=["a", "b"]).gradients
    assert gradients["b"] is None
    assert gradients["a"] is not None
    assert run(Fn(lambda m, x: m.a(x).argmax(1).float()[:, None], a=nn.Conv2d(3, 3, 1)), picture(),
               gradients=["input"]).gradients == {"input": None}  # fmt: skip


def test_the_score_can_be_a_layers_value_and_the_run_ends_there():
    calls = []
    net = Fn(lambda m, x: (calls.append(1), m.b(m.a(x).relu()))[1] * 2, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1))
    passed = run(net, picture(), of="relu", gradients=["input", "a"])
    x = picture().requires_grad_()
    a = net.a(x)
    at_x, at_a = torch.autograd.grad(score(a.relu()).sum(), [x, a])
    assert torch.equal(passed.gradients["input"], at_x)
    assert torch.equal(passed.gradients["a"], at_a)
    assert passed.output is None


def test_the_score_of_a_layer_that_is_overwritten_later_is_that_of_the_layer():
    net = Fn(lambda m, x: F.relu(m.a(x), inplace=True), a=nn.Conv2d(3, 4, 1))
    passed = run(net, picture(), of="a", gradients=["input"])
    x = picture().requires_grad_()
    assert torch.equal(passed.gradients["input"], torch.autograd.grad(score(net.a(x)).sum(), x)[0])


# ---------------------------------------------------------------------------------------------------------------------
# Gradients where values are views or written through them


def chunked(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    top, rest = m.a(x).chunk(2, 1)
    return m.b(top.mul(2) + rest)


def through_a_view(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    h = m.a(x)
    h[:, :2].mul_(3)
    return m.b(h[:, 2:] * h[:, :2])


def through_a_reshape(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    h = m.a(x)
    F.relu(h.view(1, -1), inplace=True)  # what it returns is ignored
    return m.b(h[:, 2:] * h[:, :2])


def into_a_canvas(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    h = m.a(x)
    canvas = torch.zeros(1, 4, 8, 8)
    canvas[:, :2] = h[:, 2:]
    canvas[:, 2:] = h[:, :2] * 2
    return m.b(canvas[:, 1:3])


@pytest.mark.parametrize("forward", [chunked, through_a_view, through_a_reshape, into_a_canvas])
def test_the_gradient_of_every_layer_is_the_same_alone_as_with_all_the_others_or_clearly_refused(forward):
    torch.manual_seed(0)
    net = Fn(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(2, 2, 1)).eval()
    x = picture()
    with torch.no_grad():
        expected = net(x)
    engine = Engine(net)
    with engine.session():
        nodes = [n for n in engine.recording(x).nodes if n.name != "input" and n.shapes]
        together = engine.run(x, Request(gradients=["input", *(n.name for n in nodes)], score=score))
        assert torch.equal(together.output, expected)
        for node in nodes:
            alone = engine.run(x, Request(gradients=[node.name], score=score))
            assert torch.equal(alone.output, expected), node.name
            torch.testing.assert_close(alone.gradients[node.name], together.gradients[node.name], rtol=1e-6, atol=1e-7)
    y = x.clone().requires_grad_()
    torch.testing.assert_close(together.gradients["input"], torch.autograd.grad(score(net(y)).sum(), y)[0])


def test_an_operation_that_returns_what_it_was_given_can_be_read_and_differentiated():
    net = Fn(lambda m, x: m.b(m.drop(F.relu(m.a(x), inplace=True)).contiguous().float()),
             a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1), drop=nn.Dropout())  # fmt: skip
    together = run(net, picture(), read=["a", "relu", "drop", "contiguous"], gradients=["relu", "drop", "contiguous"])
    a = net.a(picture())
    h = a.relu().detach().requires_grad_()
    expected = torch.autograd.grad(score(net.b(h)).sum(), h)[0]
    assert torch.equal(together.values["a"], a)
    for name in ("relu", "drop", "contiguous"):
        assert torch.equal(together.values[name], h)
        assert torch.equal(together.gradients[name], expected)
    alone = run(net, picture(), read=["relu", "drop"], gradients=["drop"])
    assert torch.equal(alone.values["relu"], h)
    assert torch.equal(alone.gradients["drop"], expected)


# ---------------------------------------------------------------------------------------------------------------------
# The caller's and the model's own grad modes


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=lambda c: c.__name__)
def test_the_callers_grad_mode_makes_no_difference(context):
    net = Residual().eval()
    expected = run(net, picture(), gradients=["input", "a"], read=["relu"])
    with context():
        x = picture()  # under inference mode one that cannot be differentiated as it is
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        found = run(net, x, gradients=["input", "a"], read=["relu"])
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    for layer in ("input", "a"):
        assert torch.equal(found.gradients[layer], expected.gradients[layer])
    assert torch.equal(found.values["relu"], expected.values["relu"])


def test_gradients_under_autocast_are_those_of_autocast():
    net = Residual().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(net, picture(), gradients=["input"])
        x = picture().requires_grad_()
        expected = torch.autograd.grad(score(net(x)).sum(), x)[0]
    torch.testing.assert_close(found.gradients["input"], expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("wanted", ["a", "b", "c"])
def test_the_models_own_no_grad_holds(wanted):
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = m.a(x)
        with torch.no_grad():
            gate = m.b(h).sigmoid()
        return m.c(h * gate)

    net = Fn(forward, a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 3, 1), c=nn.Conv2d(3, 3, 1)).eval()
    x = picture().requires_grad_()
    h = net.a(x)
    gate = net.b(h).sigmoid().detach()
    c = net.c(h * gate)
    expected = dict(zip("ac", torch.autograd.grad(score(c).sum(), [h, c]), strict=True))
    found = run(net, picture(), gradients=[wanted]).gradients[wanted]
    if wanted == "b":
        assert found is None
    else:
        torch.testing.assert_close(found, expected[wanted], rtol=1e-6, atol=1e-7)


def test_a_part_in_inference_mode_is_no_reason_to_crash():
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            gate = m.b(x).sigmoid()
        return m.a(x) + gate.clone()

    net = Fn(forward, a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 3, 1)).eval()
    passed = run(net, picture(), read=["a", "b"], gradients=["a"])
    assert passed.gradients["a"] is not None
    with torch.no_grad():
        assert torch.equal(passed.values["b"], net.b(picture()))
    with pytest.raises(errors.Unsupported, match="no gradient can be taken there"):
        run(net, picture(), gradients=["b"])


def test_parameters_made_in_inference_mode_are_refused_in_a_sentence():
    with torch.inference_mode():
        net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()).eval()
    with torch.inference_mode():
        expected = net[0](picture())
    assert torch.equal(run(net, picture(), read=["0"]).values["0"], expected)
    with pytest.raises(errors.Unsupported, match="inference mode"):
        run(net, picture(), gradients=["input"])


def test_a_model_that_goes_another_way_when_gradients_are_recorded():
    net = Fn(lambda m, x: m.b(m.a(x)) if torch.is_grad_enabled() else m.b(m.a(x)) + 0, a=nn.Conv2d(3, 3, 1),
             b=nn.Conv2d(3, 3, 1))  # fmt: skip
    assert run(net, picture(), gradients=["a"]).gradients["a"] is not None
    assert "add" in run(net, picture(), read=["add"]).values


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints, scripted parts


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool):
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.stem, self.a, self.b, self.head = (nn.Conv2d(3, 3, 1) for _ in range(4))

    def block(self, h: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(h).relu())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.stem(x)
        return self.head(checkpoint(self.block, h, use_reentrant=self.reentrant))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("layer", ["input", "stem", "a", "relu", "b", "head"])
def test_a_checkpoint_recomputes_what_it_recorded(layer, frozen):
    net = Checkpointed(reentrant=False).requires_grad_(not frozen).eval()
    at: dict[str, torch.Tensor] = {"input": picture().requires_grad_()}
    at["stem"] = net.stem(at["input"])
    at["a"] = net.a(at["stem"])
    at["relu"] = at["a"].relu()
    at["b"] = net.b(at["relu"])
    at["head"] = net.head(at["b"])
    expected = torch.autograd.grad(score(at["head"]).sum(), at[layer])[0]
    torch.testing.assert_close(run(net, picture(), gradients=[layer]).gradients[layer], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("layer", ["input", "stem", "a"])
def test_a_reentrant_checkpoint_is_refused_in_a_sentence(layer, frozen):
    net = Checkpointed(reentrant=True).requires_grad_(not frozen)
    with pytest.raises(errors.Unsupported, match="this model uses reentrant checkpointing"):
        run(net, picture(), gradients=[layer])
    head = run(net, picture(), gradients=["head"]).gradients["head"]
    assert torch.isfinite(head).all()


def test_a_gradient_behind_and_at_and_before_a_scripted_part():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        part = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()).eval())
    net = Fn(lambda m, x: m.b(m.part(m.a(x))), a=nn.Conv2d(3, 4, 1), part=part, b=nn.Conv2d(4, 2, 1)).eval()
    x = picture().requires_grad_()
    a = net.a(x)
    p = part(a)
    b = net.b(p)
    expected = dict(zip(["input", "a", "part", "b"], torch.autograd.grad(score(b).sum(), [x, a, p, b]), strict=True))
    for layer, gradient in expected.items():
        found = run(net, picture(), gradients=[layer]).gradients[layer]
        torch.testing.assert_close(found, gradient, rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------------------
# Change, reduce, read


@pytest.mark.parametrize("layer", ["stem", "relu", "bn", "add", "relu_1"])
def test_a_changed_layer_changes_what_follows(layer):
    net, twin = Residual().eval(), Residual(inplace=False).eval()
    twin.load_state_dict(net.state_dict())

    class Halved(dict):
        def __setitem__(self, key: str, value: torch.Tensor) -> None:
            if key == layer:
                value.mul_(0.5)
            super().__setitem__(key, value)

    with torch.no_grad():
        expected = twin(picture(), Halved())
    passed = run(net, picture(), change={layer: lambda v: v * 0.5})
    assert torch.equal(passed.output, expected)


def test_a_reduced_layer_is_not_kept():
    passed = run(Residual(), picture(3, 3, 8, 8), reduce={"a": lambda v: v.mean((2, 3))}, output=False)
    assert passed.values["a"].shape == (3, 4)
    assert passed.output is None


def test_the_input_can_be_read_beside_layers_and_alone():
    x = picture()
    assert torch.equal(run(Residual(), x, read=["input", "a"]).values["input"], x)
    assert torch.equal(run(Residual(), x, read=["input"], output=False).values["input"], x)


def test_what_the_model_writes_into_its_input_does_not_reach_the_callers():
    x = picture()
    kept = x.clone()
    run(Fn(lambda m, x: m.a(x.mul_(2)), a=nn.Conv2d(3, 3, 1)), x, gradients=["input"], read=["input"])
    assert torch.equal(x, kept)


def test_an_opaque_layer_cannot_be_changed_and_says_so():
    import warnings

    def f(h: torch.Tensor) -> torch.Tensor:
        return h * 2

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        act = torch.jit.script(f)
    with pytest.raises(errors.Unsupported, match="can be read but not changed"):
        run(Fn(lambda m, x: act(m.a(x)).relu(), a=nn.Conv2d(3, 3, 1)), picture(), change={"opaque": lambda v: v})


# ---------------------------------------------------------------------------------------------------------------------
# Batches


class OnlyFour(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[0] == 4, "this network takes four pictures"
        return self.c(x).mean((2, 3))


@pytest.mark.parametrize("n", [1, 3, 4])
def test_a_network_of_one_batch_size_is_filled_up(n):
    net, x = OnlyFour().eval(), picture(n, 3, 8, 8)
    engine = Engine(net, fixed_batch=4)
    with engine.session():
        passed = engine.run(x, Request(read=["c"], gradients=["input", "c"], score=score))
        assert engine.chunk_size(picture(9, 3, 8, 8), Request()) == 4
    y = x.clone().requires_grad_()
    c = net.c(y)
    at_x, at_c = torch.autograd.grad(score(c.mean((2, 3))).sum(), [y, c])
    assert torch.equal(passed.values["c"], c)
    torch.testing.assert_close(passed.gradients["input"], at_x)
    torch.testing.assert_close(passed.gradients["c"], at_c)
    assert passed.scores.shape == (n,)


def test_chunks_cover_the_batch_once_and_shrink_where_memory_is_short():
    engine = Engine(nn.Identity())
    sizes = []

    def work(part: torch.Tensor, where: slice) -> int:
        if part.shape[0] > 3:
            raise torch.OutOfMemoryError
        sizes.append((where.start, part.shape[0]))
        return part.shape[0]

    assert sum(engine.chunks(picture(10, 1), work, size=8)) == 10
    assert sizes[0] == (0, 2)
    assert [s for s, _ in sizes] == [0, 2, 4, 6, 8]


def test_a_smaller_budget_means_smaller_chunks():
    net, x = Residual().eval(), picture(32, 3, 32, 32)
    sizes = []
    for budget in (1 << 40, 1 << 20, 1):
        engine = Engine(net, budget=budget)
        with engine.session():
            sizes.append(engine.chunk_size(x, Request(gradients=["input"])))
    assert sizes[0] == 32
    assert 1 < sizes[1] < 16
    assert sizes[2] == 1


# ---------------------------------------------------------------------------------------------------------------------
# What can go wrong


def test_nan_names_the_first_layer_that_made_one():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Flatten()).eval()
    with torch.no_grad():
        net[2].weight[0] = float("nan")
    with pytest.raises(errors.InputError, match=re.escape("the first layer to produce one is '2'")):
        run(net, picture())
    with pytest.raises(errors.InputError, match="'2'"):
        run(net, picture(), gradients=["input"])
    with pytest.raises(errors.InputError, match="'2'"):
        run(net, picture(), read=["3"], output=False)


def test_nan_in_the_picture_is_the_pictures():
    x = picture()
    x[0, 0, 0, 0] = float("nan")
    with pytest.raises(errors.InputError, match="the picture given holds NaN"):
        run(nn.Sequential(nn.Conv2d(3, 4, 1)), x)


def test_infinities_alone_are_no_nan():
    passed = run(Fn(lambda m, x: torch.cat([m.a(x) / 0, -m.a(x) / 0], 1), a=nn.Conv2d(3, 3, 1)), picture())
    assert torch.isinf(passed.output).all()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_half_way_is_the_models_own(error):
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = m.a(x)
        if x.sum() > 1e6:
            raise error("half-way")
        return h.relu()

    net = Fn(forward, a=nn.Conv2d(3, 3, 1))
    engine = Engine(net)
    with engine.session():
        engine.run(picture(), Request(read=["a"]))
        with pytest.raises(error):
            engine.run(picture() + 1e6, Request(read=["a"]))


def test_a_model_of_two_inputs_says_what_it_lacks():
    net = Fn(lambda m, x, y: m.a(x) + y, a=nn.Conv2d(3, 3, 1))
    with pytest.raises(TypeError, match="y"):
        run(net, picture())
    passed = run(net, picture(), call=lambda m, x: m(x, torch.ones(1, 3, 8, 8)), read=["add"], gradients=["input"])
    with torch.no_grad():
        assert torch.equal(passed.values["add"], net.a(picture()) + 1)


def test_a_gradient_of_whole_numbers_is_refused():
    net = Fn(lambda m, x: m.a(x).argmax(1).float()[:, None] * m.a(x), a=nn.Conv2d(3, 3, 1))
    with pytest.raises(errors.Unsupported, match="integers, which have no gradient"):
        run(net, picture(), gradients=["argmax"])


def test_a_model_cannot_swallow_our_refusal():
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        try:
            return m.a(x).argmax(1).float()[:, None]
        except Exception:
            return x

    with pytest.raises(errors.Unsupported, match="integers, which have no gradient"):
        run(Fn(forward, a=nn.Conv2d(3, 3, 1)), picture(), gradients=["argmax"])


def test_outputs_of_any_make_are_returned_as_they_are():
    net = Fn(lambda m, x: {"logits": m.a(x).mean((2, 3)), "extra": [x, (x, 3)]}, a=nn.Conv2d(3, 3, 1))
    passed = run(net, picture(), gradients=["a"], score=lambda o: o["logits"].sum(1))
    assert list(passed.output) == ["logits", "extra"]
    torch.testing.assert_close(passed.gradients["a"], torch.full((1, 3, 8, 8), 1 / 64))


def test_the_same_module_replaced_between_passes_is_learnt_anew():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval()
    engine = Engine(net)
    with engine.session():
        engine.run(picture(), Request(read=["0"]))
        net[0] = nn.Conv2d(3, 4, 1)
        assert torch.equal(engine.run(picture(), Request(read=["0"])).values["0"], net[0](picture()))


def test_random_layers_draw_the_same_in_every_pass():
    net = Fn(lambda m, x: m.a(F.dropout(x, 0.5, training=True)), a=nn.Conv2d(3, 3, 1))
    engine = Engine(net)
    with engine.session():
        first = engine.run(picture(), Request(read=["a"])).values["a"]
        assert torch.equal(first, engine.run(picture(), Request(read=["a"])).values["a"])
