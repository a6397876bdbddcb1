"""Replay: run again only what a change reaches.

One image has been run once. For n changed values of one layer, the network is run with a batch of n in which every
operation that does not depend on the layer is skipped: where something reads it, it answers with what it returned
before, grown to the batch; elsewhere with a dummy of the right shape that takes neither time nor memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from innersight.observe import guard, observer
from innersight.observe.observer import Call, Node, Recording, Runner
from innersight.observe.passes import Engine, Request


class Replay:
    """What follows `layer`, for many values of that layer on one image.

    Make it inside `engine.session()`. Where the model's own ways forbid skipping (parts that cannot be watched), the
    whole network is run; where they forbid a batch (it goes another way for two images than for one, mixes the images
    of a batch, or reads numbers out of tensors), images are run one by one. The result is the same.

    value: the layer's value for this image, if it is known; then a second image may need no run of its own
    """

    def __init__(self, engine: Engine, x: torch.Tensor, layer: str, value: torch.Tensor | None = None):
        self.engine = engine
        self.x = x
        self.layer = layer
        self.recording = engine.recording(x)
        if reads := any(n.kind == "sink" or depends_on_data(n) for n in self.recording.nodes):
            self.recording = engine.recording(x, again=True)  # another image may have gone another way
        self.node = self.recording.find(layer)
        self.plan: _Plan | None = None
        self.stored: dict[int, Any] = {}  # node -> what the skipped operation answers
        self.together = engine.fixed_batch is None  # whether n values may be run as one batch
        try:
            two = of_two(engine, x, self.recording, again=reads)
            self.together = two is not None
            self.plan = _plan(self.recording, two, self.node)
            self.together &= not self.plan.mixes
            if self.plan.leaks:
                raise CannotSkip
            self.value = self._remembered(value) if value is not None else self._clean_run(x)
            if self.plan.rearranges and self.together:
                self._verify()
        except (CannotSkip, observer.Diverged):
            self.plan = None
            self.value = engine.run(x, Request(read=[layer], output=False)).values[layer]
            self.together &= self.value.shape[:1] == (1,)  # else which dimension holds the batch is not known

    @property
    def skips(self) -> bool:
        """Whether only what follows the layer is run."""
        return self.plan is not None

    def _verify(self) -> None:
        """Where batch and other dimensions are merged, see that the same image twice gives the same output twice.

        It does not where the batch runs fastest in the merged dimension; then images have to be run one by one.
        """
        once, twice = (list(observer.tensors_in(self._skipping(torch.cat([self.value] * n, self.batch_dim))))
                       for n in (1, 2))  # fmt: skip
        for a, b in zip(once, twice, strict=True):
            b = b.float().reshape(-1, *a.shape)
            if float((b - a.float()).abs().max()) > 1e-3 * float(a.float().abs().max()):
                self.together = False

    def _remembered(self, value: torch.Tensor) -> torch.Tensor:
        """Where the layer is all that is read of what was skipped, only shapes are needed besides its value."""
        assert self.plan is not None
        key = (id(self.recording), self.node.index)
        known = self.engine.skipped.get(key)
        if known is None or known[0] is not self.recording:
            own = self._clean_run(self.x)
            if self.plan.frontier or self.plan.real:
                return own
            shapes = {i: observer.map_tensors(answer, _shape_only) for i, answer in self.stored.items()}
            known = self.engine.skipped[key] = (self.recording, shapes)
        self.stored = known[1]
        return value

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
        value = observer.first_tensor(runner.stored[self.node.index])
        assert value is not None
        return value

    @property
    def batch_dim(self) -> int:
        """Which dimension of the layer's value holds the batch (windows and tokens may share it)."""
        return (self.plan.batch_dim.get((self.node.index, 0)) if self.plan else None) or 0

    def without(self, channels: Iterable[int], axis: int) -> torch.Tensor:
        """What to `run`: the layer's value, once for each of these channels, with that channel of `axis` at zero."""
        channels, k = list(channels), self._each
        values = torch.cat([self.value] * len(channels), self.batch_dim)
        for i, channel in enumerate(channels):
            values.narrow(self.batch_dim, i * k, k).select(axis, channel).zero_()
        return values

    def run(self, values: torch.Tensor) -> Any:
        """The model's output for a batch of n that differ in this layer alone.

        values: `(n, ...)`; where the layer's value for one image is k long in `batch_dim`, n times k long there
        """
        if self.together:
            return self._run(values)
        size = self.engine.fixed_batch or 1
        return joined([self._run(part) for part in values.split(size * self._each, self.batch_dim)])

    @property
    def _each(self) -> int:
        return self.value.shape[self.batch_dim] if self.value.dim() else 1

    def _run(self, values: torch.Tensor) -> Any:
        if self.plan is not None:
            try:
                return self._skipping(values)
            except observer.Diverged:  # this value leads elsewhere
                pass
        n = values.shape[self.batch_dim] // self._each
        size = self.engine.fixed_batch or n
        filled = torch.cat([values, *[values.narrow(self.batch_dim, 0, self._each)] * (size - n)], self.batch_dim)
        x = self.x.expand(n, *self.x.shape[1:])
        return self.engine.run(x, Request(change={self.layer: lambda _: filled.clone()})).output

    def _skipping(self, values: torch.Tensor) -> Any:
        assert self.plan is not None
        n = values.shape[self.batch_dim] // self._each
        x = self.x.expand(n, *self.x.shape[1:])
        values = values.clone() if self.plan.writes else values
        guard.seed(self.engine.module)
        with torch.no_grad():
            output, _ = observer.run(
                self.engine.module, self.recording, [x.clone() if self.plan.writes_input else x], {},
                call=self.engine.call, runner=_Skip, plan=self.plan, stored=self.stored, node=self.node, values=values,
                n=n,
            )  # fmt: skip
        return output

    def image_bytes(self) -> float:
        """Bytes that one more image in the batch needs, roughly: what the operations behind the layer make."""
        dirty = self.plan.dirty if self.plan else range(len(self.recording.nodes))
        made = [n for n in (self.recording.nodes[i] for i in dirty) if n.kind != "view"]
        largest = sorted((_size(n) for n in made), reverse=True)[:4]
        return 1.5 * sum(largest) + sum(v.numel() * v.element_size() for v in [self.value])


# Each channel of what these return is made of that channel alone, and of a channel of zeros they make zeros.
_KEEPS_ZERO = frozenset(
    "relu relu6 leaky_relu elu celu selu silu gelu mish hardswish tanh dropout avg_pool2d max_pool2d "
    "adaptive_avg_pool2d adaptive_max_pool2d mean".split()
)


def zeroed_at(recording: Recording, layer: str, axis: int) -> str:
    """The furthest layer at which taking a channel away is the same as at `layer`; it may be `layer` itself.

    Behind the last convolutions that often is the global pool, whose value is a small part of theirs.
    """
    node = recording.find(layer)
    if axis != 1 or len(node.shape) != 4 or recording.gaps:
        return layer
    returned = {ref.node for ref in recording.outputs}
    while node.index not in returned:
        readers = [n for n in recording.nodes[node.index + 1 :] if node.index in n.inputs]
        if len(readers) != 1 or not _keeps_zero(readers[0]) or readers[0].inputs != (node.index,):
            break
        node = readers[0]
    return node.name


def _keeps_zero(node: Node) -> bool:
    if node.op not in _KEEPS_ZERO or node.kind not in ("layer", "copy") or node.inplace or len(node.shapes) != 1:
        return False
    if node.op == "mean":
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        return isinstance(dims, (tuple, list)) and sorted(d % 4 for d in dims) == [2, 3]
    return len(node.shape) == 4


class CannotSkip(Exception):
    """This model has to be run whole."""


def of_two(engine: Engine, x: torch.Tensor, recording: Recording, again: bool) -> Recording | None:
    """What the model does with two such images; None if that is not what it does with one, twice."""
    if engine.fixed_batch is not None:
        raise CannotSkip
    try:
        two = engine.recording_of_two(x, again)
        if [c.func for c in two.calls] != [c.func for c in recording.calls]:
            return None
        batch_dims(recording.nodes, two.nodes)
    except Exception:  # it takes one image alone, or lets one image see another
        return None
    return two


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
        self.mixes = False  # images of one batch do not stay apart, so n have to be n runs
        self.leaks = False  # what follows the layer reaches the model as numbers, which cannot be followed
        self.rearranges = False  # a dimension holds the batch and something else


# What these return is as long as the data says, or is an address within the batch.
_DATA_SHAPED = frozenset("nonzero argwhere masked_select unique unique_consecutive nms bincount".split())


def depends_on_data(node: Node) -> bool:
    if node.op == "where":
        return len(node.args) == 1
    indexed = node.op in ("getitem", "setitem", "index_put") and len(node.args) > 1
    return node.op in _DATA_SHAPED or (indexed and next(_refs(node.args[1]), None) is not None)


def _refs(value: Any) -> Iterator[observer.Ref]:
    if isinstance(value, observer.Ref):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _refs(item)


def mixes_images(node: Node) -> bool:
    """Batch statistics; torch's own positions are those of `F.batch_norm`."""
    training = node.kwargs.get("training", node.args[5] if len(node.args) > 5 else False)
    return node.op == "batch_norm" and training is True


def _plan(recording: Recording, two: Recording | None, node: Node) -> _Plan:
    """What to skip; without a recording of two images, for a batch of one."""
    nodes, plan = recording.nodes, _Plan()
    if recording.gaps or node.partial or any(n.kind == "opaque" for n in nodes):
        raise CannotSkip
    for n in nodes[node.index + 1 :]:
        if any(i == node.index or i in plan.dirty for i in n.inputs):
            plan.dirty.add(n.index)
    plan.leaks = any(nodes[i].kind == "sink" or depends_on_data(nodes[i]) for i in plan.dirty)
    plan.mixes = plan.leaks or any(map(depends_on_data, nodes)) or any(mixes_images(nodes[i]) for i in plan.dirty)
    memory = memory_of(nodes)
    shared = {memory[n.index] for n in nodes if n.partial}  # written through one tensor, read through another

    def need(index: int, own: bool = False) -> None:
        if index == node.index or index in plan.dirty:
            return
        if nodes[index].partial or (nodes[index].kind == "view" and (own or memory[index] in shared)):
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
    if two is not None:
        plan.batch_dim = batch_dims(nodes, two.nodes)
        plan.mixes |= any(
            plan.batch_dim[i, k] is None for i in (node.index, *plan.dirty) for k in range(len(nodes[i].shapes))
        )
        plan.rearranges = any(
            (d := plan.batch_dim[i, k]) is not None and shape[d] != 1
            for i in (node.index, *plan.frontier) for k, shape in enumerate(nodes[i].shapes)
        )  # fmt: skip
    plan.writes_input = any(n.inplace and set(n.inputs) & set(recording.inputs) for n in nodes)
    plan.writes = any(nodes[i].inplace for i in plan.dirty)
    return plan


def memory_of(nodes: list[Node]) -> list[int]:
    """For each node the first one that lies in the same memory."""
    first: list[int] = []
    for n in nodes:
        first.append(n.index if n.base is None else first[n.base])
    return first


def batch_dims(one: list[Node], two: list[Node]) -> dict[tuple[int, int], int | None]:
    return {
        (n.index, k): _batch_dim(a, b)
        for n, m in zip(one, two, strict=True)
        for k, (a, b) in enumerate(zip(n.shapes, m.shapes, strict=True))
    }


def _batch_dim(one: tuple[int, ...], two: tuple[int, ...]) -> int | None:
    """The dimension that doubled with the batch; None if none did."""
    differ = [d for d, (a, b) in enumerate(zip(one, two, strict=True)) if a != b] if len(one) == len(two) else [-1, -1]
    if not differ:
        return None
    if len(differ) > 1 or two[differ[0]] != 2 * one[differ[0]]:
        raise CannotSkip
    return differ[0]


def _grow(value: torch.Tensor, dim: int | None, n: int) -> torch.Tensor:
    """One image's value as a batch of n; a dimension that is merged with the batch (windows) is repeated whole."""
    if dim is None or n == 1:
        return value
    if value.shape[dim] == 1:
        return value.expand(*(n if d == dim else s for d, s in enumerate(value.shape)))
    shape = list(value.shape)
    shape[dim] *= n
    return value.unsqueeze(dim).expand(*value.shape[:dim], n, *value.shape[dim:]).reshape(shape)


def joined(outputs: list) -> Any:
    """The outputs of several runs as that of one batch."""
    first = outputs[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(outputs) if first.dim() else torch.stack(outputs)
    if isinstance(first, list) and len(first) == 1 and isinstance(first[0], Mapping):
        return [image for output in outputs for image in output]  # detections: a list with a dict for each image
    if isinstance(first, Mapping):
        return observer.like(first, {k: joined([o[k] for o in outputs]) for k in first})
    if isinstance(first, (tuple, list)):
        return observer.like(first, [joined(list(same)) for same in zip(*outputs, strict=True)])
    return first


class _Store(Runner):
    """Keeps what the frontier and the layer return, and what every skipped operation's answer looks like."""

    def __init__(self, recording: Recording, taps: Mapping, stop: bool, plan: _Plan, node: Node):
        super().__init__(recording, taps, stop)
        self.tail = self.length  # to the end, every call must be the one that was learnt
        self.plan = plan
        self.node = node
        self.stored: dict[int, Any] = {}  # node -> its answer

    def _run(self, _position: int, call: Call, func: Callable, args: tuple, kwargs: dict) -> Any:
        out = func(*args, **kwargs)
        if call.node is None or call.node in self.plan.dirty or call.node in self.plan.real:
            return out
        target = observer.written(observer.raw_name(func), args, kwargs) if call.writes else None
        answer = out if target is None else target
        # Clones, since something may be written into these later; of what nobody reads only the shape is kept.
        keep = call.node in self.plan.frontier or call.node == self.node.index
        self.stored[call.node] = observer.map_tensors(answer, torch.clone if keep else _shape_only)
        return out


def _shape_only(t: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), dtype=t.dtype, device=t.device).expand(t.shape)


class _Skip(Runner):
    """Runs what depends on the layer and answers everything else from the store."""

    def __init__(self, recording: Recording, taps: Mapping, stop: bool, plan: _Plan, stored: dict, node: Node,
                 values: torch.Tensor, n: int):  # fmt: skip
        super().__init__(recording, taps, stop)
        self.tail = self.length  # to the end, every call must be the one that was learnt
        self.plan = plan
        self.stored = stored
        self.node = node
        self.values_given = values
        self.n = n

    def _run(self, _position: int, call: Call, func: Callable, args: tuple, kwargs: dict) -> Any:
        index = call.node
        if index is None or index in self.plan.dirty or index in self.plan.real:
            return func(*args, **kwargs)
        outputs = iter(range(len(self.recording.nodes[index].shapes)))

        def batch(t: torch.Tensor) -> torch.Tensor:
            grown = _grow(t, self.plan.batch_dim.get((index, next(outputs))), self.n)
            return grown.clone() if index in self.plan.own else grown

        answer = observer.map_tensors(self.stored[index], batch)
        if index == self.node.index:
            answer = observer.with_first(answer, self.values_given)
        node = self.recording.nodes[index]
        if not node.inplace:
            return answer
        target = observer.written(observer.raw_name(func), args, kwargs)
        assert target is not None
        if not node.partial:
            target.data = answer  # callers may ignore what an in-place operation returns
        return None if observer.raw_name(func) == "__setitem__" else target
