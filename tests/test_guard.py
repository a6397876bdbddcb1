"""The model, and torch, are left as they were found: on success, on error, on interrupt, whatever the model does."""

from __future__ import annotations

import random
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules import module as nn_module
from torch.overrides import _len_torch_function_stack

from innersight.observe import guard
from innersight.observe.passes import Engine, Request
from innersight.testing import left_as_found


class Troublesome(nn.Module):
    """Batch normalisation, dropout, a step counter and a cache as buffers, and an error when asked for one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Conv2d(4, 2, 1)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("cache", None)
        self.register_buffer("replaced", torch.zeros(1))
        self.fail: BaseException | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        self.cache = x.mean().detach()
        self.replaced = torch.ones(2)
        self.register_buffer("new", torch.ones(3))
        torch.rand(3), random.random(), np.random.rand()
        h = self.drop(self.bn(self.conv(x)))
        if self.fail is not None:
            raise self.fail
        return self.head(h)


def picture(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, 3, 8, 8)), generator=torch.Generator().manual_seed(0))


def state(module: nn.Module) -> dict[str, Any]:
    hooks = "_forward_hooks _forward_pre_hooks _backward_hooks _backward_pre_hooks".split()
    return {
        "state_dict": {k: v.clone() for k, v in module.state_dict().items()},
        "objects": [(n, id(t)) for n, t in (*module.named_parameters(), *module.named_buffers())],
        "training": [m.training for m in module.modules()],
        "hooks": [len(getattr(m, h)) for m in module.modules() for h in hooks],
        "global hooks": [len(h) for h in (nn_module._global_forward_hooks, nn_module._global_forward_pre_hooks,
                                          nn_module._global_forward_hooks_always_called)],
        "gradients": [(p.requires_grad, p.grad) for p in module.parameters()],
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), _len_torch_function_stack()),
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()),
    }  # fmt: skip


def assert_same(before: Any, after: Any) -> None:
    assert type(before) is type(after)
    if isinstance(before, dict):
        assert before.keys() == after.keys()
        for key in before:
            assert_same(before[key], after[key])
    elif isinstance(before, (list, tuple)):
        assert len(before) == len(after)
        for a, b in zip(before, after, strict=True):
            assert_same(a, b)
    elif isinstance(before, torch.Tensor):
        assert torch.equal(before, after)
    elif isinstance(before, np.ndarray):
        assert np.array_equal(before, after)
    else:
        assert before == after


def everything(engine: Engine, x: torch.Tensor) -> None:
    engine.run(x, Request(read=["conv", "bn"], gradients=["input", "bn"], score=lambda o: o.flatten(1).sum(1)))
    engine.run(x, Request(read=["conv"], output=False))
    engine.run(x, Request(change={"bn": lambda v: v * 0}))


@pytest.mark.parametrize("train", [True, False])
def test_a_model_is_the_same_after_every_kind_of_pass(train):
    net = Troublesome().train(train)
    net.head.eval()  # each module has its own flag
    before = state(net)
    engine = Engine(net)
    with engine.session():
        everything(engine, picture())
    assert_same(before, state(net))


@pytest.mark.parametrize("error", [ValueError("half-way"), KeyboardInterrupt(), SystemExit(), GeneratorExit()])
@pytest.mark.parametrize("learnt", [True, False])
def test_a_model_is_the_same_after_an_error_half_way(error, learnt):
    net = Troublesome().train()
    before = state(net)
    engine = Engine(net)
    if learnt:
        with engine.session():
            everything(engine, picture())
    net.fail = error
    with pytest.raises(type(error)), engine.session():
        engine.run(picture(), Request(read=["conv"], gradients=["input"]))
    assert_same(before, state(net))


@pytest.mark.parametrize("where", ["score", "reduce", "change"])
def test_a_model_is_the_same_after_an_error_of_the_callers(where):
    def fail(_: Any) -> Any:
        raise ZeroDivisionError

    net = Troublesome().train()
    before = state(net)
    engine = Engine(net)
    requests = {
        "score": Request(gradients=["input"], score=fail),
        "reduce": Request(reduce={"bn": fail}),
        "change": Request(change={"bn": fail}),
    }
    with pytest.raises(ZeroDivisionError), engine.session():
        engine.run(picture(), requests[where])
    assert_same(before, state(net))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=lambda c: c.__name__)
def test_the_callers_modes_are_the_same_afterwards(context):
    net = Troublesome().train()
    with context():
        before = state(net)
        engine = Engine(net)
        with engine.session():
            everything(engine, picture())
        assert_same(before, state(net))


def test_a_model_in_train_mode_is_explained_in_eval_mode():
    net = Troublesome().train()
    engine = Engine(net)
    with engine.session():
        inside = engine.run(picture(), Request()).output
        assert not any(m.training for m in net.modules())
    net.eval()
    with torch.no_grad():
        h = net.head(net.bn(net.conv(picture())))
    assert torch.equal(inside, h)


def test_sessions_can_be_nested():
    net = Troublesome().train()
    before = state(net)
    engine = Engine(net)
    with engine.session(), engine.session():
        everything(engine, picture())
    assert_same(before, state(net))


def test_frozen_and_unfrozen_parameters_and_their_gradients_stay():
    net = Troublesome().train()
    net.conv.requires_grad_(False)
    net.head.weight.grad = torch.ones_like(net.head.weight)
    before = state(net)
    engine = Engine(net)
    with engine.session():
        everything(engine, picture())
    assert_same(before, state(net))


def test_the_users_own_hooks_stay_and_run():
    net, called = Troublesome().eval(), []
    net.bn.register_forward_hook(lambda *_: called.append(1))
    before = state(net)
    engine = Engine(net)
    with engine.session():
        engine.run(picture(), Request())
    assert called
    assert_same(before, state(net))


def test_a_models_set_grad_enabled_does_not_leak():
    class Switches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch.set_grad_enabled(False)
            return x * 2

    engine = Engine(Switches())
    with engine.session():
        engine.run(picture(), Request())
        engine.run(picture(), Request(gradients=["input"]))
    assert torch.is_grad_enabled()


def scripted(make: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


@pytest.mark.parametrize("kind", ["script", "trace", "frozen"])
def test_torchscript_models_too(kind):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    if kind == "script":
        module = scripted(lambda: torch.jit.script(net.train()))
    elif kind == "trace":
        module = scripted(lambda: torch.jit.trace(net.eval(), picture()))
    else:
        module = scripted(lambda: torch.jit.freeze(torch.jit.script(net.eval())))
    weights = {k: v.clone() for k, v in module.state_dict().items()}
    training = getattr(module, "training", None)
    engine = Engine(module)
    with engine.session():
        output = engine.run(picture(), Request()).output
    with torch.no_grad():
        assert torch.allclose(output, net.eval()(picture()), atol=1e-6)
    assert getattr(module, "training", None) == training
    assert_same(weights, dict(module.state_dict()))


def test_an_exported_program_too():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval()
    module = scripted(lambda: torch.export.export(net, (picture(),)).module())
    before = {k: v.clone() for k, v in module.state_dict().items()}
    engine = Engine(module, fixed_batch=2)
    with engine.session():
        output = engine.run(picture(), Request()).output
    assert torch.equal(output, net(picture()))
    assert_same(before, dict(module.state_dict()))


def test_one_request_at_a_time_for_a_model():
    net = Troublesome().train()
    inside, seen = threading.Event(), []

    def other() -> None:
        inside.wait(5)
        with guard.as_found(net):
            seen.append(net.training)

    thread = threading.Thread(target=other)
    thread.start()
    with guard.as_found(net):
        inside.set()
        thread.join(0.05)
        assert seen == []
    thread.join(5)
    assert seen == [False]
    assert net.training


def test_seeding_is_undone():
    before = torch.get_rng_state()
    net = nn.Linear(2, 2)
    before = torch.get_rng_state()
    with guard.as_found(net):
        guard.seed(net, 7)
        first = torch.rand(2)
        guard.seed(net, 7)
        assert torch.equal(first, torch.rand(2))
    assert torch.equal(before, torch.get_rng_state())


def test_statistics_that_a_model_updates_even_in_eval_mode_are_put_back():
    """`batch_norm(training=True)` writes running statistics without torch counting it as a write."""

    class Insists(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(2)

        def forward(self, x):
            return nn.functional.batch_norm(x, self.bn.running_mean, self.bn.running_var, training=True)

    module = Insists()
    with left_as_found(module), guard.as_found(module):
        module(torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0)) + 3)
