"""Replay: run again only what a change reaches.

One image has been run once. For n changed values of one layer, the network is run with a batch of n in which every
operation that does not depend on the layer is skipped: where something reads it, it answers with what it returned
before, grown to the batch; elsewhere with a dummy of the right shape that takes neither time nor memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from innersight.observe import guard, observer
from innersight.observe.observer import Call, Node, Recording, Runner
from innersight.observe.passes import Engine, Request


class Replay:
    """What follows `layer`, for many values of that layer on one image.

    Make it inside `engine.session()`. Where the model's own ways forbid skipping (it goes another way for a batch of
    two, or reads numbers out of tensors), the whole network is run instead, with the same result.
    """

    def __init__(self, engine: Engine, x: torch.Tensor, layer: str):
        self.engine = engine
        self.x = x
        self.layer = layer
        self.recording = engine.recording(x)
        self.node = self.recording.find(layer)
        self.plan: _Plan | None = None
        try:
            self.plan = _plan(engine, self.recording, self.node, x)
            self.value = self._clean_run(x)
        except (_CannotSkip, observer.Diverged):
            self.plan = None
            self.value = engine.run(x, Request(read=[layer], output=False)).values[layer]

    @property
    def skips(self) -> bool:
        """Whether only what follows the layer is run."""
        return self.plan is not None

    def _clean_run(self, x: torch.Tensor) -> torch.Tensor:
        assert self.plan is not None
        guard.seed(self.engine.module)
        with torch.no_grad():
            _, runner = observer.run(
                self.engine.module, self.recording, [x.clone()], {}, call=self.engine.call,
                runner=_Store, plan=self.plan, node=self.node,
            )  # fmt: skip
        assert isinstance(runner, _Store)
        self.stored = runner.stored
        return runner.stored[self.node.index][0]

    def run(self, values: torch.Tensor) -> Any:
        """The model's output for a batch of n that differ in this layer alone: `values` is `(n, ...)`."""
        n = values.shape[0]
        x = self.x.expand(n, *self.x.shape[1:])
        if self.plan is None:
            return self.engine.run(x, Request(change={self.layer: lambda _: values.clone()})).output
        values = values.clone() if self.plan.writes else values
        guard.seed(self.engine.module)
        with torch.no_grad():
            output, _ = observer.run(
                self.engine.module, self.recording, [x.clone() if self.plan.writes_input else x], {},
                call=self.engine.call, runner=_Skip, plan=self.plan, stored=self.stored, node=self.node, values=values,
            )  # fmt: skip
        return output

    def image_bytes(self) -> float:
        """Bytes that one more image in the batch needs, roughly: what the operations behind the layer make."""
        dirty = self.plan.dirty if self.plan else range(len(self.recording.nodes))
        made = [n for n in (self.recording.nodes[i] for i in dirty) if n.kind != "view"]
        largest = sorted((_size(n) for n in made), reverse=True)[:4]
        return 1.5 * sum(largest) + sum(v.numel() * v.element_size() for v in [self.value])


class _CannotSkip(Exception):
    """This model has to be run whole."""


def _size(node: Node) -> float:
    return float(sum(torch.Size(s).numel() for s in node.shapes) * node.itemsize)


class _Plan:
    """Which operations run, which answer with what they returned before, and which dimension holds the batch."""

    def __init__(self) -> None:
        self.dirty: set[int] = set()  # depends on the layer
        self.real: set[int] = set()  # does not, but writes into part of something, so it has to happen
        self.frontier: set[int] = set()  # does not, and something that runs reads it
        self.own: set[int] = set()  # frontier that is then written into: needs memory of its own
        self.batch_dim: dict[tuple[int, int], int | None] = {}  # (node, output) -> dimension, None: not batched
        self.writes_input = False
        self.writes = False  # something behind the layer works in place


def _plan(engine: Engine, recording: Recording, node: Node, x: torch.Tensor) -> _Plan:
    two = engine.recording_of_two(x)
    if [c.func for c in two.calls] != [c.func for c in recording.calls] or len(two.nodes) != len(recording.nodes):
        raise _CannotSkip
    nodes, plan = recording.nodes, _Plan()
    if node.kind == "opaque" or node.partial or any(n.kind == "opaque" for n in nodes):
        raise _CannotSkip
    for n in nodes[node.index + 1 :]:
        if any(i == node.index or i in plan.dirty for i in n.inputs):
            plan.dirty.add(n.index)
    if any(nodes[i].kind == "sink" for i in plan.dirty):
        raise _CannotSkip  # a number read out of a tensor of n images

    def need(index: int, own: bool = False) -> None:
        if index == node.index or index in plan.dirty:
            return
        if nodes[index].partial or (nodes[index].kind == "view" and own):
            happen(index)
        else:
            plan.frontier.add(index)
            if own:
                plan.own.add(index)

    def happen(index: int) -> None:
        if index in plan.real:
            return
        plan.real.add(index)
        for i in nodes[index].inputs:
            need(i, own=True)

    for index in sorted(plan.dirty):
        for i in nodes[index].inputs:
            need(i, own=nodes[index].inplace)
    for n in nodes:
        if n.kind == "sink":
            for i in n.inputs:
                need(i)
    for ref in recording.outputs:
        need(ref.node)
    for n, m in zip(nodes, two.nodes, strict=True):
        for k, (a, b) in enumerate(zip(n.shapes, m.shapes, strict=True)):
            plan.batch_dim[n.index, k] = _batch_dim(a, b)
    plan.writes_input = any(n.inplace and set(n.inputs) & set(recording.inputs) for n in nodes)
    plan.writes = any(nodes[i].inplace for i in plan.dirty)
    return plan


def _batch_dim(one: tuple[int, ...], two: tuple[int, ...]) -> int | None:
    """The dimension that doubled with the batch; None if none did."""
    differ = [d for d, (a, b) in enumerate(zip(one, two, strict=True)) if a != b] if len(one) == len(two) else [-1, -1]
    if not differ:
        return None
    if len(differ) > 1 or two[differ[0]] != 2 * one[differ[0]]:
        raise _CannotSkip
    return differ[0]


def _grow(value: torch.Tensor, dim: int | None, n: int) -> torch.Tensor:
    """One image's value as a batch of n; a dimension that is merged with the batch (windows) is repeated whole."""
    if dim is None:
        return value
    if value.shape[dim] == 1:
        return value.expand(*(n if d == dim else s for d, s in enumerate(value.shape)))
    shape = list(value.shape)
    shape[dim] *= n
    return value.unsqueeze(dim).expand(*value.shape[:dim], n, *value.shape[dim:]).reshape(shape)


def _map_tensors(value: Any, fn: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return fn(value)
    if isinstance(value, (tuple, list)):
        items = [_map_tensors(v, fn) for v in value]
        return items if type(value) is list else tuple(items) if type(value) is tuple else type(value)(items)
    return value


class _Store(Runner):
    """Keeps what the frontier and the layer return, and what every skipped operation's answer looks like."""

    def __init__(self, recording: Recording, taps: Mapping, stop: bool, plan: _Plan, node: Node):
        super().__init__(recording, taps, stop)
        self.plan = plan
        self.node = node
        self.stored: dict[int, tuple[torch.Tensor, Any]] = {}  # node -> (first tensor, whole answer)

    def _run(self, _position: int, call: Call, func: Callable, args: tuple, kwargs: dict) -> Any:
        out = func(*args, **kwargs)
        if call.node is None or call.node in self.plan.dirty or call.node in self.plan.real:
            return out
        target = observer.written(observer.raw_name(func), args, kwargs) if call.writes else None
        answer = out if target is None else target
        # Clones, since something may be written into these later; of what nobody reads only the shape is kept.
        keep = call.node in self.plan.frontier or call.node == self.node.index
        answer = _map_tensors(answer, torch.clone if keep else _shape_only)
        first = observer.first_tensor(answer)
        assert first is not None
        self.stored[call.node] = first, answer
        return out


def _shape_only(t: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), dtype=t.dtype, device=t.device).expand(t.shape)


class _Skip(Runner):
    """Runs what depends on the layer and answers everything else from the store."""

    def __init__(self, recording: Recording, taps: Mapping, stop: bool, plan: _Plan, stored: dict, node: Node,
                 values: torch.Tensor):  # fmt: skip
        super().__init__(recording, taps, stop)
        self.plan = plan
        self.stored = stored
        self.node = node
        self.values_given = values

    def _run(self, _position: int, call: Call, func: Callable, args: tuple, kwargs: dict) -> Any:
        index = call.node
        if index is None or index in self.plan.dirty or index in self.plan.real:
            return func(*args, **kwargs)
        n = self.values_given.shape[0]
        outputs = iter(range(len(self.recording.nodes[index].shapes)))

        def batch(t: torch.Tensor) -> torch.Tensor:
            grown = _grow(t, self.plan.batch_dim[index, next(outputs)], n)
            return grown.clone() if index in self.plan.own else grown

        answer = _map_tensors(self.stored[index][1], batch)
        if index == self.node.index:
            answer = observer.with_first(answer, self.values_given)
        if not self.recording.nodes[index].inplace:
            return answer
        target = observer.written(observer.raw_name(func), args, kwargs)
        assert target is not None
        if index in self.plan.frontier or index == self.node.index:
            target.data = answer  # callers may ignore what an in-place operation returns
        return None if observer.raw_name(func) == "__setitem__" else target
