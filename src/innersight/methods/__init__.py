"""The saliency methods: each is one function and a decorator; this module is their registry.

A method gets a `Look` at what the network did and returns a map, nothing else: no model, no batching, no scaling.

    @method(family="cam", reads=("layer.value", "layer.gradient"), paper="Selvaraju et al., Grad-CAM, ICCV 2017")
    def gradcam(look): ...

What it reads is declared, so that many methods are served by one pass; what it asks for beyond that (other points,
backward rules, patches, channels) it asks the look for. From its name, signature and docstring come the options of the
command line, the table of methods and its tests.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from innersight import errors

if TYPE_CHECKING:
    import torch

# A new family: one file, and its name here.
_MODULES = ("gradient", "path", "cam", "relevance", "decomposition", "attention", "perturbation", "superpixels")
READS = (
    "input.value", "input.gradient", "layer.value", "layer.gradient", "attention.value", "attention.gradient",
)  # fmt: skip
VISITS = (*READS[1:4], "score", "rules", "patches", "channels")


class Look:
    """What a method may see of a batch of n images, and ask for.

    values, gradients: what was read, under "input" and "layer": `(n, C, H, W)`, tokens and channels-last layers already
                       turned to that grid. Gradients are of the target's score
    scores:            (n,), the target's score
    attention:         the attention matrices, in run order, `observe.attention.AttentionMap` each, where it reads them
    tokens:            where their tokens lie, an `observe.attention.TokenGrid`
    """

    def __init__(
        self,
        values: Mapping[str, torch.Tensor],
        gradients: Mapping[str, torch.Tensor],
        scores: torch.Tensor,
        attention: Sequence[Any] = (),
        tokens: Any = None,
        holds: Callable[[], torch.Tensor | None] = lambda: None,
    ):
        self.values = values
        self.gradients = gradients
        self.scores = scores
        self.attention = attention
        self.tokens = tokens
        self._holds = holds

    @property
    def holds(self) -> torch.Tensor | None:
        """(n,) bool: whether the network decides for the target (its class is the predicted one, a is above b).

        None where the target is no decision: a box, an embedding, the only output there is.
        """
        return self._holds()

    def value(self, of: str = "layer") -> torch.Tensor:
        return self.values[of]

    def gradient(self, of: str = "layer") -> torch.Tensor:
        return self.gradients[of]

    def visit(
        self, count: int, make: Callable[[range], torch.Tensor], *reads: str
    ) -> Iterator[tuple[range, Look]]:  # fmt: skip
        """Looks at `count` changed versions of the one image, in parts that fit the memory.

        make(part): those points, `(len(part), C, H, W)`, when they are needed. Parts come in order but are as long as
                    the memory allows: random numbers are drawn point by point.
        reads:      what to read at each point besides its score, "input.gradient", "layer.value", ...
        """
        raise NotImplementedError

    def under(self, rules: Any, baseline: torch.Tensor | None = None, keep: Callable[..., Any] | None = None) -> Any:
        """The pass under backward rules: an `observe.rules.Ruled`. The same rules are run once a request.

        baseline: `(n, C, H, W)`, for rules that compare with one
        keep:     called with each layer that has a grid and what of the score it takes itself, `(k, C, h, w)`; what it
                  returns is in `Ruled.kept`
        """
        raise NotImplementedError

    def patched(self, boxes: Sequence[tuple[int, int, int, int]], fill: torch.Tensor) -> Iterator[tuple[range, Any]]:
        """Scores `(k,)` of the one image with each box (top, left, height, width) taken from `fill` `(1, C, H, W)`."""
        raise NotImplementedError

    def without_channels(self) -> torch.Tensor:
        """(C,): the score of the one image with each channel of the layer set to zero."""
        raise NotImplementedError

    def scaled(self, factors: Sequence[float]) -> torch.Tensor:
        """(k,): the score of the one image with the layer's value multiplied by each of the factors."""
        raise NotImplementedError

    def once(self, function: Callable[..., Any], *args: Hashable) -> Any:
        """`function(look, *args)`, computed once for these images: methods that need the same share it."""
        raise NotImplementedError

    def say(self, **numbers: Any) -> None:
        """What the map's own axioms say, `(n,)` each or a number for all; goes into `Saliency.verdict`."""
        raise NotImplementedError

    def note(self, sentence: str) -> None:
        """What the user has to know of this map, a sentence."""
        raise NotImplementedError


@dataclass(frozen=True)
class Method:
    """A registered method: what it is called, what it reads, what its map means."""

    name: str
    function: Callable[..., torch.Tensor]
    family: str
    paper: str
    reads: tuple[str, ...]
    visits: tuple[str, ...]
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
        """What the network must offer: "gradient", "layer" (one with a grid), "attention"."""
        asked = (*self.reads, *self.visits)
        needs = []
        if "rules" in asked or any(r.endswith("gradient") for r in asked):
            needs.append("gradient")
        if "channels" in asked or any(r.startswith("layer") for r in asked):
            needs.append("layer")
        if any(r.startswith("attention") for r in asked):
            needs.append("attention")
        return tuple(needs)

    @property
    def one_by_one(self) -> bool:
        """Whether it sees one image at a time: where it goes from there depends on that image alone."""
        return bool(set(self.visits) - {"rules"})

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
    visits: tuple[str, ...] = (),
    signed: bool = True,
    passes: str = "1 forward, 1 backward",
    unit: str = "",
) -> Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]:
    """Register a method under its function's name.

    reads:  which of READS it looks at on the pictures as they are; methods asked for together share that pass
    visits: what else it asks its look for: "score", "input.gradient", ... at other points (`look.visit`), "rules",
            "patches", "channels"; it then sees one image at a time (rules alone: all)
    signed: whether negative values mean evidence against the target
    passes: its cost, in words
    unit:   what one value of the map says

    The function takes a `Look` and its own options by keyword and returns `(n, H, W)`, or `(n, C, H, W)` where
    colour channels were asked to be kept apart; on the grid of the layer, if it reads one.
    """
    for given, known, what in ((reads, READS, "read"), (visits, VISITS, "visit")):
        if unknown := [r for r in given if r not in known]:
            raise ValueError(f"a method can {what} {', '.join(known)}, not {unknown[0]!r}")

    def register(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        name = function.__name__
        _registry[name] = Method(name, function, family, paper, reads, visits, signed, passes, unit)
        return function

    return register


def all_methods() -> dict[str, Method]:
    """Every method by name, in the order of the families."""
    for name in _MODULES:
        importlib.import_module(f"innersight.methods.{name}")
    places = {f"innersight.methods.{name}": i for i, name in enumerate(_MODULES)}
    return dict(sorted(_registry.items(), key=lambda item: places.get(item[1].function.__module__, len(places))))


def find(name: str) -> Method:
    """The method of that name; raises UnknownName with the nearest ones."""
    methods = all_methods()
    if name not in methods:
        raise errors.unknown("method", name, methods, "")
    return methods[name]
