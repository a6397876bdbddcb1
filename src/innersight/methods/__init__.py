"""The saliency methods: each is one function and a decorator; this module is their registry.

A method gets a `Look` at what the network did and returns a map, nothing else: no model, no batching, no scaling.

    @method(family="cam", reads=("layer.value", "layer.gradient"), paper="Selvaraju et al., Grad-CAM, ICCV 2017")
    def gradcam(look): ...

What it reads is declared, so that many methods are served by one pass. From its name, signature and docstring come
the options of the command line, the table of methods and its tests.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from innersight import errors

if TYPE_CHECKING:
    import torch

_MODULES = ("gradient", "cam")  # a new family is one file and its name here
READS = ("input.value", "input.gradient", "layer.value", "layer.gradient")


@dataclass(frozen=True)
class Look:
    """What a method may see of one batch.

    values and gradients hold what it declared to read, under "input" and "layer": `(n, C, H, W)`, tokens and channels-
    last layers already turned to that grid. Gradients are of the target's score.
    """

    values: Mapping[str, torch.Tensor]
    gradients: Mapping[str, torch.Tensor]

    def value(self, of: str = "layer") -> torch.Tensor:
        return self.values[of]

    def gradient(self, of: str = "layer") -> torch.Tensor:
        return self.gradients[of]


@dataclass(frozen=True)
class Method:
    """A registered method: what it is called, what it reads, what its map means."""

    name: str
    function: Callable[..., torch.Tensor]
    family: str
    paper: str
    reads: tuple[str, ...]
    signed: bool
    passes: str
    unit: str

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @property
    def options(self) -> dict[str, Any]:
        """Its own options and their defaults."""
        parameters = list(inspect.signature(self.function).parameters.values())[1:]
        return {p.name: p.default for p in parameters}

    @property
    def needs(self) -> tuple[str, ...]:
        """What the network must offer: "gradient", "layer" (one with a grid)."""
        needs = []
        if any(r.endswith("gradient") for r in self.reads):
            needs.append("gradient")
        if any(r.startswith("layer") for r in self.reads):
            needs.append("layer")
        return tuple(needs)

    def check_options(self, options: Mapping[str, Any]) -> None:
        for name in options:
            if name not in self.options:
                raise errors.unknown("option", name, self.options, f" of method {self.name!r}")


_registry: dict[str, Method] = {}


def method(
    *,
    family: str,
    reads: tuple[str, ...],
    paper: str,
    signed: bool = True,
    passes: str = "1 forward, 1 backward",
    unit: str = "",
) -> Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]:
    """Register a method under its function's name.

    reads:  which of "input.value", "input.gradient", "layer.value", "layer.gradient" it looks at
    signed: whether negative values mean evidence against the target
    passes: its cost, in words
    unit:   what one value of the map says

    The function takes a `Look` and its own options by keyword and returns `(n, H, W)`, or `(n, C, H, W)` where
    colour channels were asked to be kept apart.
    """
    if unknown := [r for r in reads if r not in READS]:
        raise ValueError(f"a method can read {', '.join(READS)}, not {unknown[0]!r}")

    def register(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        name = function.__name__
        _registry[name] = Method(name, function, family, paper, reads, signed, passes, unit)
        return function

    return register


def all_methods() -> dict[str, Method]:
    """Every method by name, in the order of the families."""
    for name in _MODULES:
        importlib.import_module(f"innersight.methods.{name}")
    return dict(_registry)


def find(name: str) -> Method:
    """The method of that name; raises UnknownName with the nearest ones."""
    methods = all_methods()
    if name not in methods:
        raise errors.unknown("method", name, methods, "")
    return methods[name]
