"""Checks that every network and every method passes, and small networks with known answers.

Used by innersight's own tests, and by whoever adds a format or a method:

    check_network(innersight.open("my.model"), images)
    check_method("my_method", net, images)

Each raises AssertionError with a sentence that says which property failed, and returns what it checked.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from innersight import errors
from innersight.methods import find
from innersight.network import Network
from innersight.observe import observer
from innersight.observe.passes import INPUT, Request

# ---------------------------------------------------------------------------------------------------------------------
# State


def state_of(module: nn.Module) -> dict[str, Any]:
    """Everything about a model, and about torch, that explaining must leave as it was."""
    return {
        "training flags": [m.training for m in module.modules()],
        "parameters": [(id(p), p.detach().clone()) for p in module.parameters()],
        "requires_grad": [p.requires_grad for p in module.parameters()],
        "gradients": [None if p.grad is None else p.grad.detach().clone() for p in module.parameters()],
        "buffers": [(name, b.detach().clone()) for name, b in module.named_buffers()],
        "hooks": [_hooks(m) for m in module.modules() if not isinstance(m, torch.jit.ScriptModule)],
        "global hooks": _global_hooks(),
        "devices": [p.device for p in module.parameters()],
        "random state of torch": torch.get_rng_state(),
        "random state of Python": random.getstate(),
        "random state of NumPy": [np.asarray(v).tolist() for v in np.random.get_state()],
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "function modes": torch._C._len_torch_function_stack(),
    }


def _hooks(module: nn.Module) -> list[int]:
    return [len(getattr(module, n)) for n in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]


def _global_hooks() -> list[int]:
    where = nn.modules.module
    return [len(where._global_forward_hooks), len(where._global_forward_pre_hooks)]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and a.device == b.device and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@contextmanager
def left_as_found(module: nn.Module) -> Iterator[None]:
    """Assert that the body, whether it succeeds or raises, leaves the model and torch as they were."""
    before = state_of(module)
    try:
        yield
    finally:
        after = state_of(module)
        changed = [key for key in before if not _same(before[key], after[key])]
        assert not changed, f"explaining changed the model: {', '.join(changed)}"


def close(a: Any, b: Any, tolerance: float = 1e-5) -> bool:
    """Equal within `tolerance` of the largest value."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return a.shape == b.shape and bool(np.abs(a - b).max(initial=0) <= tolerance * max(np.abs(b).max(initial=0), 1e-30))


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def check_network(net: Network, images: Any = None, gradient: bool = True, tolerance: float = 1e-5) -> list[str]:
    """What every opened network can do, whatever it was opened from.

    images:   two or more inputs; default noise of the network's own input shape
    gradient: whether its gradient is that of its own output (False for a straight-through backward, or for none)
    """
    x = _inputs(net, images)
    done = []

    def check(what: str, holds: Any) -> None:
        assert holds, f"{net.name}: {what} does not hold"
        done.append(what)

    module, engine = net.module, net.engine
    with left_as_found(module):
        table = net.layers
        names = list(table)
        check("there are layers", names)
        check("layers stand in the order they run", _ascending(table[n].node.index for n in names))
        check("every layer is found by its name", all(table[n].name == n for n in names))
    done.append("listing the layers leaves the model as found")

    with engine.session():
        watched = engine.run(x, Request(read=names))
        plain = _plain(net, x)
        direct = _hooked(net, x)
    check("the output is that of the plain run", _all_close(watched.output, plain, tolerance))
    captured = {n: v for n, v in watched.values.items() if n in direct}
    check("captured equals direct", all(close(v, direct[n], tolerance) for n, v in captured.items()))
    early = [p.values for p in net._passes(x, Request(read=names[:1], output=False))]
    first = torch.cat([v[names[0]] for v in early])
    check("a run that stops early reads the same", close(first, watched.values[names[0]], tolerance))

    together = net.predict(x).logits
    one_by_one = np.concatenate([net.predict(x[i : i + 1]).logits for i in range(len(x))])
    check("a batch equals one by one", close(together, one_by_one, max(tolerance, 1e-5)))
    check("a second run gives the same", np.array_equal(together, net.predict(x).logits))

    if gradient:
        check("the gradient equals finite differences", _gradient_error(net, x[:1]) < 1e-4)
    for what, fail in _failures(net, x).items():
        with left_as_found(module):
            try:
                fail()
            except (RuntimeError, errors.InnersightError):
                done.append(f"nothing is left behind when {what}")
            else:
                raise AssertionError(f"{net.name}: no error where {what}")
    was = [m.training for m in module.modules()]
    module.train()
    try:
        with left_as_found(module):
            check("in train mode it is explained in eval mode", close(net.predict(x).logits, together, tolerance))
    finally:
        for m, flag in zip(module.modules(), was, strict=True):
            m.training = flag
    return done


def check_method(name: str, net: Network, images: Any = None, **options: Any) -> list[str]:
    """What every saliency method promises, on this network."""
    x = _inputs(net, images)
    done = []

    def check(what: str, holds: Any) -> None:
        assert holds, f"{name} on {net.name}: {what} does not hold"
        done.append(what)

    with left_as_found(net.module):
        s = net.explain(x, method=name, **options)
    done.append("the model is left as found")
    check("one map an image, in the size of the input", s.values.shape == (len(x), *x.shape[-2:]))
    check("the values are finite", np.isfinite(s.values).all())
    check("something is found", np.abs(s.values).max() > 0)
    check("an unsigned map has nothing below zero", find(name).signed or s.values.min() >= 0)
    check("the same seed gives the same map", np.array_equal(s.values, net.explain(x, method=name, **options).values))
    one_by_one = np.concatenate([net.explain(x[i : i + 1], method=name, **options).values for i in range(len(x))])
    check("a batch equals one by one", close(s.values, one_by_one, 1e-4))
    given = x.clone()
    net.explain(given, method=name, **options)
    check("the pictures are left as they were", torch.equal(given, x))
    return done


def _inputs(net: Network, images: Any) -> torch.Tensor:
    if images is not None:
        x = net.read(images).tensor
        assert len(x) > 1, "checks need two images or more"
        return x
    sample = net._sample()
    noise = torch.randn((2, *sample.shape[1:]), generator=torch.Generator().manual_seed(1))
    return noise.to(sample)


def _ascending(values: Any) -> bool:
    values = list(values)
    return values == sorted(values)


def _plain(net: Network, x: torch.Tensor) -> Any:
    with torch.no_grad():
        return net.engine.call(net.module, x.clone()) if net.engine.call else net.module(x.clone())


def _all_close(a: Any, b: Any, tolerance: float) -> bool:
    pairs = list(zip(observer.tensors_in(a), observer.tensors_in(b), strict=True))
    return bool(pairs) and all(close(x.detach(), y.detach(), tolerance) for x, y in pairs)


def _hooked(net: Network, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What plain hooks on the modules read, cloned at once."""
    seen: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(_m: nn.Module, _args: Any, out: Any) -> None:
            if isinstance(out, torch.Tensor):
                seen.setdefault(name, out.detach().clone())

        return keep

    modules = [(n, m) for n, m in net.module.named_modules() if n]
    handles = [m.register_forward_hook(hook(n)) for n, m in modules if not isinstance(m, torch.jit.ScriptModule)]
    try:
        _plain(net, x)
    finally:
        for h in handles:
            h.remove()
    return seen


def _gradient_error(net: Network, x: torch.Tensor) -> float:
    """How far the input gradient is from a central difference along a random direction, in double precision."""
    twin = net._with_module(copy.deepcopy(net.module).double())
    x = x.double()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(x.device)

    def score(output: Any) -> torch.Tensor:
        main = twin._main(output).flatten(1)
        return main @ torch.linspace(-1, 1, main.shape[1]).to(main)

    with twin.engine.session():
        g = twin.engine.run(x, Request(gradients=[INPUT], score=score)).gradients[INPUT]
        assert g is not None, f"{net.name}: the output does not depend on the input"
        step = 1e-6
        up, down = (score(twin.engine.run(x + s * direction, Request()).output) for s in (step, -step))
    difference = float((up - down)[0]) / (2 * step)
    along = float((g * direction).sum())
    return abs(along - difference) / max(abs(difference), float(g.norm()), 1e-12)


def _failures(net: Network, x: torch.Tensor) -> dict[str, Callable[[], Any]]:
    def wrong(_output: Any) -> torch.Tensor:
        raise RuntimeError("on purpose")

    def half_way(_value: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("on purpose")

    middle = list(net.layers)[len(net.layers) // 2]
    return {
        "the target fails": lambda: list(net._passes(x, Request(gradients=[INPUT], score=wrong))),
        "the run fails half-way": lambda: list(net._passes(x, Request(reduce={middle: half_way}))),
        "a layer does not exist": lambda: net.maps(x, layers=["no such layer"]),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Small networks with known answers


class Residual(nn.Module):
    """In-place ReLU behind an in-place addition: a hook that does not copy reads the wrong values here."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        out = self.conv2(x)
        out += x
        out = self.relu(out)
        return self.fc(F.adaptive_avg_pool2d(out, 1).flatten(1))


class Gated(nn.Module):
    """Squeeze and excitation, SiLU, concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.b = nn.Conv2d(3, 4, 1, stride=2)
        self.gate = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([F.silu(self.a(x)), F.silu(self.b(x))], 1)
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.head(x.mean((2, 3)))


class Tokens(nn.Module):
    """A small vision transformer with a class token."""

    def __init__(self, size: int = 16, patch: int = 4, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, stride=patch)
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.pos = nn.Parameter(torch.randn(1, 1 + (size // patch) ** 2, width))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(width, 4, 32, 0.1, batch_first=True) for _ in range(2))
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


class ChannelsLast(nn.Module):
    """A block that works on (N, H, W, C), as ConvNeXt and Swin do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, stride=2)
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        x = x + F.gelu(self.mlp(self.norm(x)))
        return self.head(x.mean((1, 2)))


class SeveralOutputs(nn.Module):
    """Answers with a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.conv(x).relu()
        return {"features": features, "logits": self.head(features.mean((2, 3)))}


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "residual": (Residual, (3, 16, 16)),
    "gated": (Gated, (3, 16, 16)),
    "tokens": (Tokens, (3, 16, 16)),
    "channels_last": (ChannelsLast, (3, 16, 16)),
    "several_outputs": (SeveralOutputs, (3, 16, 16)),
}


def small_network(name: str) -> Network:
    """One of NETWORKS, opened, with the same random weights every time."""
    import innersight

    if name not in NETWORKS:
        raise errors.unknown("network", name, NETWORKS)
    make, shape = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make().eval()
        for m in module.modules():  # statistics as after a training, so that eval mode differs from train mode
            if isinstance(m, nn.BatchNorm2d):
                m.load_state_dict(
                    {"running_mean": torch.randn(m.num_features), "running_var": torch.rand(m.num_features) + 0.5},
                    strict=False,
                )
    return innersight.open(module, input_shape=shape)
