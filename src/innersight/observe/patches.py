"""Patches: what the network answers when a box of the picture is replaced, computing only what the box reaches.

The picture is run once as it is. For n patches the network's own code is walked through once more, call by call: where
a patch reaches only a part of the map, the code is handed a stand-in of the right shape while the part is computed
aside (`regions`); from where it reaches nearly all of it, or cannot be followed, the call runs as it is, on n maps.

Exact: the answers are those of whole runs, up to the rounding of sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from innersight import errors
from innersight.observe import guard, observer, regions
from innersight.observe.folding import Folding
from innersight.observe.folding import _instead as instead
from innersight.observe.observer import Call, Node, Recording, Runner
from innersight.observe.operations import refs
from innersight.observe.passes import Engine, Request, free_memory
from innersight.observe.regions import Crop, Now, Place, Step, substituted
from innersight.observe.replay import CannotSkip, batch_dims, depends_on_data, joined, memory_of, mixes_images, of_two

Box = tuple[int, int, int, int]  # top, left, height, width
Key = tuple[int, int]  # a node and which of its outputs

_CHUNK = {"cpu": 32, "cuda": 256}
_HELD = 32 << 20  # bytes of answers kept back to put them in the order of the boxes
# How far the check of patches against whole runs may be off, as a share of the largest value.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class Patches:
    """What the network answers for one picture with a box of it replaced by the same box of `fill`.

    Make it inside `engine.session()`. Where the model's ways forbid following a patch (parts that cannot be watched,
    numbers read out of tensors), every patch is a whole run. The answers are the same.

    x:    `(1, C, H, W)`
    fill: anything that broadcasts to it
    """

    def __init__(self, engine: Engine, x: torch.Tensor, fill: torch.Tensor | float):
        if x.dim() != 4 or len(x) != 1:
            raise errors.InputError(f"patches are laid over one picture (1, C, H, W), not over {tuple(x.shape)}")
        self.engine = engine
        self.x = x
        try:
            self.fill = torch.as_tensor(fill).to(x).expand_as(x)
        except RuntimeError:
            raise errors.InputError(
                f"the fill {tuple(torch.as_tensor(fill).shape)} does not fit the picture {tuple(x.shape)}"
            ) from None
        self.batch = engine.fixed_batch  # the most patches that may be one batch of a whole run; None: any number
        self.plan: _Plan | None = None
        self._reason = ""
        self._checked = False
        self._computed = self._everything = 0.0
        self._dense: dict[int, bool] = {}  # node -> whether it could not have been followed anyway
        try:
            self.plan = self._planned()
        except (CannotSkip, observer.Diverged) as reason:
            self._reason = str(reason) or "the network does something else each time it runs"

    def _planned(self) -> _Plan:
        engine, x = self.engine, self.x
        recording = engine.recording(x)
        if reads := any(n.kind == "sink" or depends_on_data(n) for n in recording.nodes):
            recording = engine.recording(x, again=True)
        if engine.fixed_batch is not None:
            raise CannotSkip(f"the network takes batches of {engine.fixed_batch} only")
        two = of_two(engine, x, recording, again=reads)
        apart = two is not None and None not in batch_dims(recording.nodes, two.nodes).values()
        if reads or not apart or any(map(mixes_images, recording.nodes)):
            self.batch = 1
        if recording.gaps or any(n.kind == "opaque" for n in recording.nodes):
            raise CannotSkip("the network has parts that cannot be watched")
        if reads:
            raise CannotSkip("the network reads numbers out of tensors, so that its way may depend on them")
        if two is None or self.batch:
            raise CannotSkip("the network does not keep the images of a batch apart")
        plan = _Plan(engine.module, recording, two, x)
        guard.seed(engine.module)
        with torch.no_grad():
            output, _ = observer.run(
                engine.module, recording, [x.clone()], {}, call=engine.call, runner=_Clean, plan=plan
            )
        self._answer_bytes = sum(t.numel() * t.element_size() for t in observer.tensors_in(output))
        return plan

    # -- what was done

    @property
    def skips(self) -> bool:
        """Whether patches are followed; otherwise each is a whole run."""
        return self.plan is not None

    @property
    def share(self) -> float:
        """Multiplications computed so far (of convolutions and linear layers), as a share of those of whole runs."""
        return self._computed / self._everything if self._everything and self.plan else 1.0

    @property
    def notes(self) -> list[str]:
        """What was done, in sentences."""
        if self.plan is None:
            return [f"each patch was a whole run: {self._reason}"]
        notes = []
        if self._everything:
            notes.append(f"only what a patch reaches was computed: {self.share:.0%} of the multiplications")
        if self._dense:
            first = min(self._dense)
            why = (
                "which sees the whole picture or is not known" if self._dense[first] else "where it reaches nearly all"
            )
            notes.append(f"a patch was followed up to layer {self.plan.nodes[first].name!r}, {why}")
        return notes

    # -- running

    def run(self, boxes: Sequence[Box] | np.ndarray | torch.Tensor) -> Any:
        """The network's output `(n, ...)` for n boxes (top, left, height, width), in one go."""
        corners = self._inside(boxes)
        if not len(corners):
            raise errors.InputError("no boxes were given; one is (top, left, height, width)")
        return self._run(corners)

    def parts(self, boxes: Sequence[Box] | np.ndarray | torch.Tensor, size: int | None = None
              ) -> Iterator[tuple[range, Any]]:  # fmt: skip
        """(range of boxes, the network's output for them), in order, for any number of boxes.

        size: how many are computed at once; default what the memory allows and is fast
        """
        corners = self._inside(boxes)
        size = size or self.chunk_size()
        # All windows of a group are as large as the largest: patches that reach equally far belong together.
        held = size * max(1, min(64, _HELD // max(self._answer_bytes * size, 1))) if self.plan else size
        for begin in range(0, len(corners), held):
            part = corners[begin : begin + held]
            groups = _alike(self.plan.reach(part), size) if self.plan and held > size else [np.arange(len(part))]
            outputs = [output for group in groups for output in self._fitting(part[group])]
            output = outputs[0] if len(outputs) == 1 else joined(outputs)
            if len(groups) > 1:
                output = _in_order(output, torch.from_numpy(np.argsort(np.concatenate(groups))))
            yield range(begin, begin + len(part)), output

    def _fitting(self, corners: np.ndarray) -> Iterator[Any]:
        """In halves, if a device has too little memory."""
        try:
            yield self._run(corners)
        except torch.OutOfMemoryError:
            if len(corners) == 1:
                raise
        else:
            return
        for half in np.array_split(corners, 2):
            yield from self._fitting(half)

    def chunk_size(self) -> int:
        """How many patches to run at once."""
        most = _CHUNK.get(self.x.device.type, 32)
        if self.plan is None:
            return self.batch or self.engine.chunk_size(self.x.expand(most, *self.x.shape[1:]), Request())
        need = 6 * max((n.itemsize * sum(map(math.prod, n.shapes)) for n in self.plan.nodes), default=1)
        budget = self.engine.budget or free_memory(self.x.device) // 4
        return int(max(1, min(most, budget // max(need, 1))))

    def _inside(self, boxes: Any) -> np.ndarray:
        """`(n, 4)`: top, left, bottom, right, of the part inside the picture."""
        given = np.asarray(boxes.cpu() if isinstance(boxes, torch.Tensor) else boxes).reshape(-1, 4).astype(np.int64)
        corners = np.concatenate([given[:, :2], given[:, :2] + given[:, 2:]], 1)
        corners = np.clip(corners, 0, (*self.x.shape[2:], *self.x.shape[2:]))
        if empty := np.flatnonzero((corners[:, 2:] <= corners[:, :2]).any(1)).tolist():
            raise errors.InputError(
                f"box {tuple(given[empty[0]].tolist())} (top, left, height, width) covers no pixel of the picture "
                f"{tuple(self.x.shape[2:])}"
            )
        return corners

    def _run(self, corners: np.ndarray) -> Any:
        if self.plan is not None:
            try:
                output = self._followed(self.plan, corners)
                if self._good(output, corners):
                    return output
            except observer.Diverged:
                self._give_up("the network takes another way for some patches")
            except (torch.OutOfMemoryError, errors.InnersightError):
                raise
            except Exception as error:  # the model's own code, on a stand-in: a whole run tells whether it is at fault
                self._give_up(f"following a patch failed ({type(error).__name__}: {str(error)[:200]})")
        return self._whole(corners)

    def _give_up(self, reason: str) -> None:
        self.plan, self._reason = None, reason

    def _good(self, output: Any, corners: np.ndarray) -> bool:
        """Free of NaN, which whole runs refuse with a reason; and, once, some patches as in whole runs of their own."""
        answers = [t for t in observer.tensors_in(output) if t.is_floating_point()]
        if any(bool(torch.isnan(t.sum())) for t in answers):
            self._give_up("its answers are NaN")
            return False
        if not self._checked:
            largest = int((corners[:, 2:] - corners[:, :2]).prod(1).argmax())
            some = sorted({largest, len(corners) // 2})
            whole = [joined([self._whole(corners[i : i + 1]) for i in some])]
            whole = [t for t in observer.tensors_in(whole) if t.is_floating_point()]
            if not all(_near(a[some], b) for a, b in zip(answers, whole, strict=True)):
                self.batch = 1  # perhaps it is the batch that makes the difference
                self._give_up("a patch followed in parts differed from a whole run")
                return False
            self._checked = True
        return True

    def _followed(self, plan: _Plan, corners: np.ndarray) -> Any:
        first, last = corners[:, :2], corners[:, 2:]
        place = plan.places[plan.recording.inputs[0], 0]
        size = (last - first).max(0)
        starts = np.minimum(first, np.asarray(place.size) - size)
        at = [starts[:, d, None] + np.arange(size[d]) for d in (0, 1)]
        rows, columns = ((i >= first[:, d, None]) & (i < last[:, d, None]) for d, i in enumerate(at))
        inside = torch.from_numpy(rows[:, None, :, None] & columns[:, None, None, :]).to(self.x.device)
        y, x = (torch.from_numpy(i).to(self.x.device) for i in at)
        picture, fill = (v[0][:, y[:, :, None], x[:, None, :]].transpose(0, 1) for v in (self.x, self.fill))
        crop = Crop(place, torch.where(inside, fill, picture), starts, first, last)
        given = regions.stand_in(place, len(corners), self.x.dtype, self.x.device)
        guard.seed(self.engine.module)
        with torch.no_grad():
            output, walk = observer.run(
                self.engine.module, plan.recording, [given], {}, call=self.engine.call,
                runner=_Walk, plan=plan, picture=crop, given=given,
            )  # fmt: skip
            assert isinstance(walk, _Walk)
            self._computed += walk.computed
            self._everything += walk.everything
            for index, for_good in walk.dense.items():
                self._dense.setdefault(index, for_good)
            return walk.answer(output)

    def _whole(self, corners: np.ndarray) -> Any:
        outputs = []
        size = self.batch or len(corners)
        for part in (corners[begin : begin + size] for begin in range(0, len(corners), size)):
            batch = self.x.repeat(len(part), 1, 1, 1)
            for picture, (top, left, bottom, right) in zip(batch, part.tolist(), strict=True):
                picture[:, top:bottom, left:right] = self.fill[0, :, top:bottom, left:right]
            outputs.append(self.engine.run(batch, Request(), points=len(corners)).output)
        return joined(outputs)


def _near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    off, scale = (float(t.double().abs().max()) if t.numel() else 0.0 for t in (found - expected, expected))
    return found.shape == expected.shape and off <= _TOLERANCE.get(found.dtype, 1e-4) * scale


def _in_order(output: Any, rows: torch.Tensor) -> Any:
    return observer.map_tensors(output, lambda t: t[rows.to(t.device)])


def _alike(reach: np.ndarray, size: int) -> list[np.ndarray]:
    """The rows of `reach` `(n, 2)` in groups of at most `size` that are much the same."""
    groups, left = [], [np.arange(len(reach))]
    while left:
        group = left.pop()
        if len(group) <= size:
            groups.append(group)
            continue
        order = np.argsort(reach[group, int(np.ptp(reach[group], 0).argmax())], kind="stable")
        left += np.array_split(group[order], 2)[::-1]
    return groups


# ---------------------------------------------------------------------------------------------------------------------
# What can be known before any patch


class _Plan:
    """How each operation is followed, and what of the clean run that takes.

    steps:   node -> how to follow it; nodes without are computed on whole maps
    places:  (node, output) -> where its rows and columns stand, with its value in the clean run where that is read
    weights: convolution -> weight and bias, with the BatchNorm behind it folded in
    norms:   the BatchNorms that were
    own:     works in place, and nobody else reads what it writes into
    forget:  node -> values that nobody reads behind it
    costs:   node -> multiplications for each number that it makes
    """

    def __init__(self, module: nn.Module, recording: Recording, two: Recording, x: torch.Tensor):
        self.recording = recording
        self.nodes = nodes = recording.nodes
        memory = memory_of(nodes)
        parts = {memory[n.index] for n in nodes if n.partial}  # written through one tensor, read through another
        self.real = {n.index for n in nodes if memory[n.index] in parts}
        self.channels_last = x.device.type == "cpu" and not any(n.op in _ON_MEMORY for n in nodes)
        dims = batch_dims(nodes, two.nodes)
        self.reads = [list(dict.fromkeys(refs((n.args, n.kwargs)))) for n in nodes]
        self.steps: dict[int, Step] = {}
        self.places: dict[Key, Place] = {}
        self.outputs = {(ref.node, ref.output) for ref in recording.outputs}
        if any(dims[key] != 0 or nodes[key[0]].shapes[key[1]][0] != 1 for key in self.outputs):
            raise CannotSkip("the network's answers do not have the image as their first dimension")
        self._follow(dims)
        first = (recording.inputs[0], 0)
        if first in self.places:
            self.places[first] = replace(self.places[first], rows=self.places[first].flat(x.clone()))
        if not self.steps:
            raise CannotSkip("its first operations see all of the picture, or cannot be followed in parts")
        self.readers: dict[Key, list[int]] = {}
        for n in nodes:
            for ref in self.reads[n.index]:
                self.readers.setdefault((ref.node, ref.output), []).append(n.index)
            hidden = set(n.inputs) - {ref.node for ref in self.reads[n.index]} - self.real
            if hidden & {node for node, _ in self.places}:
                raise CannotSkip("the network hands tensors on in ways that cannot be followed")
        self._fold(module)
        self.own = {n.index for n in nodes if n.inplace and self._is_alone(n)}
        self.forget: dict[int, list[Key]] = {}
        for key, readers in self.readers.items():
            if key not in self.outputs:
                self.forget.setdefault(readers[-1], []).append(key)
        self.costs = {n.index: cost for n in nodes if (cost := _cost(n))}

    def _follow(self, dims: Mapping[Key, int | None]) -> None:
        """Where rows and columns stand, from the picture on as far as that can be followed."""
        for n in self.nodes:
            if n.index in self.real or any(dims[n.index, k] != 0 or s[0] != 1 for k, s in enumerate(n.shapes)):
                continue
            if n.op == "input":
                self.places[n.index, 0] = Place(n.shape, 2, 3)
                continue
            keys = [(ref.node, ref.output) for ref in self.reads[n.index]]
            if not keys or not all(key in self.places for key in keys):
                continue
            found = regions.find(n, lambda ref: self.places[ref.node, ref.output])
            if found is not None:
                self.steps[n.index], axes = found
                for k, (shape, (y, x)) in enumerate(zip(n.shapes, axes, strict=True)):
                    self.places[n.index, k] = Place(shape, y, x)

    def _is_alone(self, n: Node) -> bool:
        """Whether what an operation writes into is read by nobody else, under this name or another."""
        made_by = self.nodes[n.base or 0]
        step = self.steps.get(made_by.index)
        new = made_by.kind == "layer" and step is not None and not step.hands_on
        return new and self.readers.get((made_by.index, 0)) == [n.index]

    def _fold(self, module: nn.Module) -> None:
        folding = Folding(module, self.recording)
        node = {n.position: n.index for n in self.nodes}
        aside = {p for pair in folding.norms.items() for p in pair if {node[q] for q in pair} & self.real}
        way = torch.channels_last if self.channels_last else torch.contiguous_format
        self.norms = {node[p] for p in folding.norms.keys() - aside}
        self.weights = {
            node[position]: folding.weights(position, convolution.norm_at is not None, way)[:2]
            for position, convolution in folding.convolutions.items()
            if position not in aside
        }

    def reach(self, corners: np.ndarray) -> np.ndarray:
        """`(n, 2)`: how much of the rows and of the columns these patches change, all operations by their work."""
        reaches = {(self.recording.inputs[0], 0): (corners[:, :2], corners[:, 2:])}
        total = np.zeros((len(corners), 2))
        for index, step in self.steps.items():
            node = self.nodes[index]
            first, last = regions.union(reaches[ref.node, ref.output] for ref in self.reads[index])
            first, last = step.reach(node, first, last)
            for k, shape in enumerate(node.shapes):
                reaches[index, k] = first, last
                total += (last - first) * (
                    self.costs.get(index, 0.0) * math.prod(shape) / np.asarray(self.places[index, k].size)
                )
            for key in self.forget.get(index, ()):
                reaches.pop(key, None)
        return total

    def read_around(self, key: Key) -> bool:
        """Whether more of a value is read than the windows that patches change."""
        readers = self.readers.get(key, [])
        return key in self.outputs or any(
            r not in self.steps or self.steps[r].around or len(self.reads[r]) > 1 for r in readers
        )


# Where memory itself is looked at, not only what it holds: another format would show.
_ON_MEMORY = frozenset("as_strided set_data set stride unfold_copy".split())


def _cost(n: Node) -> float:
    """Multiplications for each number made."""
    if n.op not in ("conv1d", "conv2d", "conv3d", "convolution", "linear") or len(n.args) < 2:
        return 0.0
    shape = getattr(n.args[1], "shape", ())
    return math.prod(shape[1:]) if shape else 0.0


class _Clean(Runner):
    """The run without patches: keeps what is read around them."""

    def __init__(self, recording: Recording, taps: Mapping, stop: bool, plan: _Plan):
        super().__init__(recording, taps, stop)
        self.tail = self.length  # to the end, every call must be the one that was learnt
        self.plan = plan

    def keep(self, key: Key, value: torch.Tensor) -> None:
        place = self.plan.places.get(key)
        if place is not None and self.plan.read_around(key):
            rows = place.flat(value)
            shared = observer.storage_key(rows) == observer.storage_key(value)  # something may be written into it
            self.plan.places[key] = replace(place, rows=rows.clone() if shared else rows)

    def _run(self, _position: int, call: Call, func: Callable, args: tuple, kwargs: dict) -> Any:
        out = func(*args, **kwargs)
        if call.node is None:
            return out
        node = self.plan.nodes[call.node]
        with torch._C.DisableTorchFunction():
            target = observer.written(observer.raw_name(func), args, kwargs) if node.inplace else None
            for k, value in enumerate(observer.tensors_in(out if target is None else target)):
                self.keep((node.index, k), value)
        return out


# ---------------------------------------------------------------------------------------------------------------------
# The run with patches


class _Walk(Runner):
    """Walks through the network's own code with n patches, some values followed in parts and the others whole.

    Of a value that is followed, the code has a stand-in: a tensor of its shape that takes no memory. `stand_ins` knows
    them by their id and keeps them alive; `held` has what they stand for.
    """

    def __init__(self, recording: Recording, taps: Mapping, stop: bool, plan: _Plan, picture: Crop,
                 given: torch.Tensor):  # fmt: skip
        super().__init__(recording, taps, stop)
        self.tail = self.length
        self.plan = plan
        self.n = len(picture.starts)
        first = (recording.inputs[0], 0)
        self.held: dict[Key, Any] = {first: picture}
        self.completed: dict[Key, torch.Tensor] = {}
        self.stand_ins: dict[int, tuple[torch.Tensor, Key]] = {id(given): (given, first)}
        self.computed = self.everything = 0.0
        self.dense: dict[int, bool] = {}  # where a patch was followed to -> whether it cannot be followed further

    def stand_in(self, key: Key, data: torch.Tensor) -> torch.Tensor:
        made = regions.stand_in(self.plan.places[key], self.n, data.dtype, data.device)
        self.stand_ins[id(made)] = made, key
        return made

    def _run(self, _position: int, call: Call, func: Callable, args: tuple, kwargs: dict) -> Any:
        if call.node is None:
            return func(*args, **kwargs)
        node = self.plan.nodes[call.node]
        with torch._C.DisableTorchFunction():
            answer = self._in_part(node, func, args, kwargs)
        if answer is None:
            answer = (self._as_it_is(node, func, args, kwargs),)
        for key in self.plan.forget.get(node.index, ()):
            self.held.pop(key, None)
            self.completed.pop(key, None)
        return answer[0]

    def _in_part(self, node: Node, func: Callable, args: tuple, kwargs: dict) -> tuple[Any] | None:
        """The call's answer, if what it makes is followed in parts."""
        step = self.plan.steps.get(node.index)
        read = [(ref, self.held.get((ref.node, ref.output))) for ref in self.plan.reads[node.index]]
        crops = {ref: value for ref, value in read if isinstance(value, Crop)}
        if step is None or len(crops) < len(read):
            return None
        own = node.index in self.plan.own
        made = self._made(step, Now(node, func, args, kwargs, crops, self.plan.weights.get(node.index), own))
        if made is None:
            return None
        for k, data in enumerate(observer.tensors_in(made.out)):
            place = self.plan.places[node.index, k]
            self.held[node.index, k] = crop = Crop(place, data, made.starts, made.first, made.last)
            if not place.fits(data, self.n, crop.size):
                raise RuntimeError(f"{node.name} made {tuple(data.shape)} of its part")
            self._count(node, data.numel())
        if node.inplace:
            target = observer.written(observer.raw_name(func), args, kwargs)
            assert target is not None
            self.stand_ins[id(target)] = target, (node.index, 0)
            return (target,)
        outputs = iter(range(len(node.shapes)))
        return (observer.map_tensors(made.out, lambda t: self.stand_in((node.index, next(outputs)), t)),)

    def _made(self, step: Step, now: Now) -> regions.Made | None:
        if now.node.index in self.plan.norms:  # it is in the convolution's weights already
            crop = now.crop
            return regions.Made(crop.data, crop.starts, crop.first, crop.last)
        return step(now)

    def _as_it_is(self, node: Node, func: Callable, args: tuple, kwargs: dict) -> Any:
        """The call itself, on whole maps in the place of stand-ins."""
        parts = [0]

        def swap(ref: observer.Ref, given: Any) -> Any:
            if id(given) not in self.stand_ins:
                return given
            parts[0] += isinstance(self.held[ref.node, ref.output], Crop)
            return self._complete((ref.node, ref.output))

        with torch._C.DisableTorchFunction():
            full_args, full = substituted((node.args, node.kwargs), (args, kwargs), swap)
        if parts[0]:
            self.dense.setdefault(node.index, node.index not in self.plan.steps)
        self._count(node, self.n * sum(map(math.prod, node.shapes)))
        if node.index in self.plan.norms:
            return full_args[0] if full_args else full["input"]
        if node.index in self.plan.weights:
            for slot, (name, weight) in enumerate(
                zip(("weight", "bias"), self.plan.weights[node.index], strict=True), 1
            ):
                full_args, full = instead(full_args, full, slot, name, weight)
        try:
            out = func(*full_args, **full)
        except RuntimeError:
            if node.op != "view" or not self.plan.channels_last:
                raise
            out = func(full_args[0].contiguous(), *full_args[1:], **full)  # the model's would have been
        if node.index in self.plan.real and node.base is None:  # what is a view of it in the model shall be one here
            out = observer.map_tensors(out, torch.Tensor.contiguous)
        target = observer.written(observer.raw_name(func), args, kwargs) if node.inplace else None
        if target is None or id(target) not in self.stand_ins:
            return out
        # Callers may ignore what an operation in place returns, so what they hold has to become the value.
        written = observer.written(observer.raw_name(func), full_args, full)
        assert written is not None
        with torch._C.DisableTorchFunction():
            target.data = written
        del self.stand_ins[id(target)]
        self.held[node.index, 0] = written
        return None if out is None else target

    def _complete(self, key: Key) -> torch.Tensor:
        """All of a value that is followed in parts."""
        value = self.held[key]
        if not isinstance(value, Crop):
            return value
        if key not in self.completed:
            whole = value.whole()
            self.completed[key] = whole if self.plan.channels_last else whole.contiguous()
        return self.completed[key]

    def _count(self, node: Node, made: int) -> None:
        cost = self.plan.costs.get(node.index, 0.0)
        self.computed += cost * made
        self.everything += cost * self.n * sum(map(math.prod, node.shapes))

    def answer(self, output: Any) -> Any:
        """What the network returned, with values in the place of stand-ins."""
        tensors = list(observer.tensors_in(output))
        known = self.plan.recording.outputs if len(self.plan.recording.outputs) == len(tensors) else ()
        keys = iter([(ref.node, ref.output) for ref in known])

        def value(t: torch.Tensor) -> torch.Tensor:
            key = next(keys, None)
            return self._complete(key or self.stand_ins[id(t)][1]) if id(t) in self.stand_ins else t

        return observer.map_tensors(output, value)
