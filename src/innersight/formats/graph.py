"""A network that is a list of steps: what Keras, ONNX and TFLite files are, run so that it can be watched.

A file's reader turns each of its layers into a `Step`: a name as people know it, a function of values, and the keys of
what it reads and makes. `Graph` runs them in order, each as the layer of that name, and lets go of every value after
its last reader. Weights are values as well: they move with the module, and the layer that reads them counts them.

Write a step so that its last operation makes the value: a view at the end (a permutation back to the file's own layout)
would take the layer's name and could not be cut or replaced. Keep pictures as `(N, C, H, W)` in channels-last memory
instead, and say in the value, not in its shape, what the file thinks its axes are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import handle_torch_function

from innersight import errors
from innersight.observe.observer import call_as

Key = Hashable
_SHAPES = 16  # of inputs, for which lasting steps are remembered


@dataclass(frozen=True)
class Step:
    """One layer of a file.

    name:    as it is shown, unique in its graph
    kind:    what the file calls it: "Conv2D", "Conv", "CONV_2D"
    call:    a function of the values read (None where `inputs` says None) that returns the value made, or a tuple of
             them where `outputs` names several. A step without a name in sight of nobody (`seen=False`) may do
             bookkeeping: shapes, indices
    inputs:  keys of the values it reads
    outputs: keys of the values it makes
    seen:    False: run where no observer looks, and without gradient
    lasting: of a step that is not seen: what it makes depends on the shape of the network's input alone, so that it is
             run once for each shape
    """

    name: str
    kind: str
    call: Callable[..., Any]
    inputs: tuple[Key | None, ...]
    outputs: tuple[Key, ...]
    seen: bool = True
    lasting: bool = False


class Graph(nn.Module):
    """Steps in the order they run.

    steps:     each reads only inputs, constants and what steps before it made
    input:     key of the value that `forward` is called with
    outputs:   keys of what it returns; one tensor if there is one key
    constants: key -> weight or table; floating ones are parameters (without gradient), others buffers
    finish:    what is made of an output value before it is handed out (a reader may keep more than a tensor in one)

    Raises InputError where a step reads what no step makes, or two make the same.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        input: Key,
        outputs: Sequence[Key],
        constants: Mapping[Key, torch.Tensor],
        finish: Callable[[Any], torch.Tensor] = lambda value: value,
    ):
        super().__init__()
        self.steps = tuple(steps)
        self.input = input
        self.outputs = tuple(outputs)
        self.finish = finish
        self.attributes: dict[Key, str] = {}
        self.known: dict[tuple[int, ...], dict[Key, Any]] = {}  # by shape of the input: what lasting steps made
        for key, value in constants.items():
            self._keep(key, value)
        made = {input, *constants}
        for step in self.steps:
            if missing := [k for k in step.inputs if k is not None and k not in made]:
                raise errors.InputError(
                    f"{step.kind} {step.name!r} reads {missing[0]!r}, which nothing before it makes"
                )
            if twice := [k for k in step.outputs if k in made]:
                raise errors.InputError(f"{step.kind} {step.name!r} makes {twice[0]!r} a second time")
            made.update(step.outputs)
        if missing := [k for k in self.outputs if k not in made]:
            raise errors.InputError(f"the network returns {missing[0]!r}, which nothing makes")
        last: dict[Key, int] = {}
        for i, step in enumerate(self.steps):
            last |= dict.fromkeys((*step.inputs, *step.outputs), i)
        self.dead: list[list[Key]] = [[] for _ in self.steps]
        for key, i in last.items():
            if key is not None and key not in self.outputs:
                self.dead[i].append(key)

    def _keep(self, key: Key, value: torch.Tensor) -> None:
        words = re.sub(r"\W+", "_", "_".join(map(str, key)) if isinstance(key, tuple) else str(key)).strip("_")
        name = f"w_{words}"[:100]
        while hasattr(self, name):
            name += "_"
        if value.is_floating_point():
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        else:
            self.register_buffer(name, value)
        self.attributes[key] = name

    def forward(self, x: torch.Tensor) -> Any:
        values = self.run(x)
        results = tuple(self.finish(values[k]) for k in self.outputs)
        return results[0] if len(results) == 1 else results

    def run(
        self,
        x: torch.Tensor,
        keep: bool = False,
        watch: Callable[[Step, dict[Key, Any], list[Key]], None] | None = None,
        through: Callable[[Step, list[Any]], Any] | None = None,
    ) -> dict[Key, Any]:
        """The values of the outputs by key.

        keep:  every value, none let go of
        watch: called behind each step with what it made and the keys that nothing reads any more
        through: runs each step, as `step` does, and may look at what it is given
        """
        values: dict[Key, Any] = {key: getattr(self, name) for key, name in self.attributes.items()}
        values[self.input] = x
        shape = tuple(x.shape)
        known, learning = self.known.get(shape), {}
        values.update(known or {})
        for step, dead in zip(self.steps, self.dead, strict=True):
            if not (step.lasting and known is not None):
                made = (through or self.step)(step, [None if k is None else values[k] for k in step.inputs])
                made = dict(zip(step.outputs, made if len(step.outputs) > 1 else (made,), strict=True))
                values.update(made)
                if step.lasting:
                    learning.update(made)
                if watch is not None:
                    watch(step, made, dead)
            for key in () if keep else dead:
                del values[key]
        if learning:
            if len(self.known) >= _SHAPES:
                self.known.pop(next(iter(self.known)))
            self.known[shape] = learning
        return values

    def step(self, step: Step, given: Iterable[Any]) -> Any:
        """What one step makes of what it reads."""
        try:
            if step.seen:
                return call_as(step.name, step.call, *given, kind=step.kind)
            with torch.no_grad(), torch._C.DisableTorchFunction():
                return step.call(*given)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a damaged file leads an operator to
            if isinstance(error, errors.InnersightError):
                raise
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RuntimeError(f"{step.kind} {step.name!r}: {said}") from error


class _Exact(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, _twin: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(_ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient, None


def exact(twin: torch.Tensor, compute: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """The value of `compute(*inputs)` with the slope of `twin`: how an integer kernel passes a gradient.

    One operation to an observer, called "exact". `compute` runs unseen and without a graph, so it may take as many
    operations as the device's arithmetic needs; it must be a function of `inputs` alone and answer in the shape and
    type of `twin`. The backward is straight-through (Bengio et al. 2013, https://arxiv.org/abs/1308.3432).
    """
    if torch._C._is_torch_function_mode_enabled():
        return handle_torch_function(exact, (twin, *inputs), twin, compute, *inputs)
    with torch.no_grad(), torch._C.DisableTorchFunction():
        value = compute(*(x.detach() for x in inputs))
    if not (torch.is_grad_enabled() and twin.requires_grad):
        return value
    return _Exact.apply(twin, value)
