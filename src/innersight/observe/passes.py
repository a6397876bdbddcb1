"""Passes: one trip of a batch through the network, with the activations and gradients that were asked for.

The engine keeps what it learnt of the network, cuts batches to a memory budget, runs no further than the last layer
asked for, and records for autograd only behind the earliest layer whose gradient is wanted.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from innersight import errors
from innersight.observe import attention, guard, observer
from innersight.observe.attention import AttentionMap
from innersight.observe.folding import Folded, Folding
from innersight.observe.observer import Recording, Tap

INPUT = "input"
_MANY = 8  # points that repay folding weights and running one image twice
_CUDA_CHUNK = 128
_CPU_PIXELS = 16 * 224 * 224  # of a batch; larger ones gain nothing on a CPU and fall out of its caches


def _first(output: Any) -> torch.Tensor:
    return next(observer.tensors_in(output))


@dataclass
class Pass:
    """What one trip brought back.

    output:    what the model returned; None if the run ended early
    values:    layer -> activation, as the model holds it (batch first), or what `reduce` made of it
    gradients: layer (or "input") -> gradient of the summed scores; None where the score does not depend on the layer
    scores:    what was differentiated, one number an image
    attention: the attention matrices in run order, if asked for
    """

    output: Any = None
    values: dict[str, Any] = field(default_factory=dict)
    gradients: dict[str, torch.Tensor | None] = field(default_factory=dict)
    scores: torch.Tensor | None = None
    attention: list[AttentionMap] = field(default_factory=list)


@dataclass(frozen=True)
class Request:
    """What one pass shall bring back.

    read:      layers whose activation is wanted
    gradients: layers, or "input", where d sum(score) / d value is wanted
    score:     the output -> one number an image
    reduce:    layer -> what to make of its activation at once, instead of keeping it
    change:    layer -> what to put in the place of its activation
    output:    False ends the run behind the last layer asked for
    of:        a layer whose activation is scored instead of the output; the run ends there
    attention: "value": every attention matrix, fused attention opened for it; "last": and the last one's gradient,
               which tells which tokens the score is read from; "gradient": and each one's gradient
    """

    read: Sequence[str] = ()
    gradients: Sequence[str] = ()
    score: Callable[[Any], torch.Tensor] = _first
    reduce: Mapping[str, Callable[[torch.Tensor], Any]] = field(default_factory=dict)
    change: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=dict)
    output: bool = True
    of: str | None = None
    attention: str = ""

    @property
    def layers(self) -> list[str]:
        """Every layer that is touched, each once; the input is none of them."""
        of = () if self.of is None else (self.of,)
        names = dict.fromkeys((*self.read, *self.gradients, *self.reduce, *self.change, *of))
        return [name for name in names if name != INPUT]

    @property
    def runs_to_the_end(self) -> bool:
        return self.of is None and (self.output or self.differentiates)

    @property
    def differentiates(self) -> bool:
        return bool(self.gradients) or self.attention in ("last", "gradient")

    @property
    def nothing(self) -> bool:
        return not self.runs_to_the_end and not self.layers and not self.attention


class Engine:
    """Runs one module: learns it once per input shape, then reads what is asked.

    call:        how the module takes a batch, where that is not `module(batch)`
    fixed_batch: the only batch size it takes; smaller batches are filled up with their last image
    budget:      bytes that a pass may use; default a quarter of what is free when the pass starts
    """

    def __init__(
        self,
        module: nn.Module,
        call: Callable[..., Any] | None = None,
        fixed_batch: int | None = None,
        budget: int | None = None,
    ):
        self.module = module
        self.call = call
        self.fixed_batch = fixed_batch
        self.budget = budget
        self._recordings: dict[tuple, Recording] = {}
        self._foldings: dict[tuple, Folding] = {}  # for as long as the session
        self.skipped: dict[tuple[int, int], tuple[Recording, dict]] = {}  # what `Replay` answers where nobody reads
        self._sessions = 0

    @contextmanager
    def session(self) -> Iterator[None]:
        """Everything the engine does happens inside one: the model is in eval mode there and as before behind it."""
        with guard.as_found(self.module), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the model's own, and autograd's about what we ask of it
            self._sessions += 1
            try:
                yield
            finally:
                self._sessions -= 1
                if not self._sessions:
                    self._foldings.clear()

    # -- learning

    def recording(
        self, x: torch.Tensor, grad: bool = False, again: bool = False, opened: bool = False
    ) -> Recording:  # fmt: skip
        """What the model does with a batch of this shape; learnt from `x` if it has not been before.

        opened: with fused attention run as the operations it stands for
        """
        key: tuple = (tuple(x.shape[1:]), x.dtype, x.device, *(("opened",) if opened else ()))
        if grad and not again and (*key, "grad") in self._recordings:
            return self._recordings[*key, "grad"]
        if key not in self._recordings or again:
            guard.seed(self.module)
            one = x if again else x[:1]  # what a model does with the whole batch matters only if it then diverged
            learnt = observer.learn(self.module, self._filled(one)[0], call=self.call, grad=grad, opened=opened)
            self._recordings[(*key, "grad") if grad else key] = learnt
            return learnt
        return self._recordings[key]

    def recording_of_two(self, x: torch.Tensor, again: bool = False) -> Recording:
        """What the model does with two such images: which shapes double tells which dimension holds the batch."""
        key = (tuple(x.shape[1:]), x.dtype, x.device, "two")
        if key not in self._recordings or again:
            guard.seed(self.module)
            two = torch.cat([x[:1], x[:1]])
            self._recordings[key] = observer.learn(self.module, two, call=self.call)
        return self._recordings[key]

    def _filled(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The batch at the size the model insists on, and how many of its images are real."""
        n = x.shape[0]
        if self.fixed_batch is None or n == self.fixed_batch:
            return x, n
        return torch.cat([x, x[-1:].expand(self.fixed_batch - n, *x.shape[1:])]), n

    # -- one pass

    def run(self, x: torch.Tensor, request: Request, points: int = 1) -> Pass:
        """One trip of the batch `x`.

        points: how many images will be run with such a request in this session, `x` among them. From 8 on, BatchNorm
                is folded into the convolutions and, on a CPU, maps lie channels-last: see `folding`. What is returned
                is contiguous, and as near to the exact values as without. The first time, one image is run both ways
                and compared, so `score` has to take a batch of any size. Without `points`, bits are equal to those of
                the bare model. A stream of points passes chunks, of a size that `chunk_size` tells:

                    every = x.expand(count, *x.shape[1:])  # x: the one image; its shape is all that is looked at
                    size = engine.chunk_size(every, request)
                    run = lambda _, part: engine.run(make(part), request, points=count)
                    for passed in engine.chunks(every, run, size): ...

        Raises InputError if the model runs into NaN (naming the first layer that made one), Unsupported where a
        gradient cannot be taken or the model takes another way each time.
        """
        if request.nothing:
            return _untouched(x, request)
        if x.is_inference():
            x = x.clone()  # outside of inference mode: a tensor that can be differentiated
        try:
            fast = points > 1 and self._sessions and not request.attention
            if fast and (passed := self._folded(x, request, points)) is not None:
                return passed
            return self._until_learnt(x, request)
        except RuntimeError as error:
            if "Inference tensors" not in str(error):
                raise
            raise errors.Unsupported(
                "this model was built in inference mode, so no gradient can pass its parameters; build or load it "
                "outside of torch.inference_mode()"
            ) from error

    def _until_learnt(self, x: torch.Tensor, request: Request) -> Pass:
        grad, opened = request.differentiates, bool(request.attention)
        for attempt in range(3):  # as learnt; learnt anew for this batch; the other way round about gradients
            recording = self.recording(x, grad=grad and attempt != 1, again=attempt > 0, opened=opened)
            try:
                return self._with_attention(recording, x, request) if opened else self._run(recording, x, request)
            except observer.Diverged:
                continue
            except errors.UnknownName:
                if attempt:  # the layer may be one that only this batch reaches
                    raise
        raise errors.Unsupported("this model does something else each time it runs, so its layers cannot be told apart")

    def _folded(self, x: torch.Tensor, request: Request, points: int) -> Pass | None:
        """With folded convolutions, in the best way that this model allows; None if it allows none, or they are few."""
        recording = self.recording(x, grad=request.differentiates)
        key = (tuple(x.shape[1:]), x.dtype, x.device, request.differentiates)
        kind = (*map(tuple, (request.read, request.gradients, request.reduce, request.change)), request.of,
                request.output)  # fmt: skip
        folding = self._foldings.get(key)
        if points < _MANY and (folding is None or kind not in folding.agreed):
            return None
        if folding is None:
            folding = self._foldings[key] = Folding(self.module, recording)
        if folding.recording is not recording:  # one that takes now this way, now that
            folding.ways.clear()
        while folding.ways:
            try:
                passed = self._run(recording, x, request, folding)
                if kind not in folding.agreed and not self._agrees(passed, x, request):
                    raise observer.Diverged
            except torch.OutOfMemoryError:
                raise
            except (Exception, observer.Diverged):  # it asks maps for a `view`, or takes another way each time
                folding.ways.pop(0)
            else:
                folding.agreed.add(kind)
                return passed
        return None

    def _agrees(self, passed: Pass, x: torch.Tensor, request: Request) -> bool:
        """Whether the first image's part of a pass is what a plain run says: some models depend on strides."""
        plain = self._until_learnt(x[:1], replace(request, reduce={}))
        return (
            _near(plain.output, passed.output)
            and _near(plain.scores, passed.scores)
            and all(_near(v, passed.values[name]) for name, v in plain.values.items())
            and all(_near(g, passed.gradients[name], gradient=True) for name, g in plain.gradients.items())
        )

    def _with_attention(self, recording: Recording, x: torch.Tensor, request: Request) -> Pass:
        """The attention matrices are layers like others; what was read of them is handed out under their own head."""
        asked = _spelled(request, recording)
        passed = _untouched(x, request) if asked.nothing else self._run(recording, x, asked)
        real, filled = x.shape[0], self.fixed_batch or x.shape[0]
        for node in attention.matrices(recording):
            value, gradient = passed.values[node.name], passed.gradients.get(node.name)
            passed.attention.append(attention.as_map(node, value, gradient, real, filled))
        passed.values = {name: v for name, v in passed.values.items() if name in (*request.read, *request.reduce)}
        passed.gradients = {name: passed.gradients[name] for name in request.gradients}
        return passed

    def _run(self, recording: Recording, x: torch.Tensor, request: Request, folding: Folding | None = None) -> Pass:
        """With the graph cut at the earliest gradient, or, where that cannot be, with all of it."""
        unsuited = ("view", "opaque")  # a leaf cannot stand in their place
        if INPUT in request.gradients or any(recording.find(g).kind in unsuited for g in request.gradients):
            return self._once(recording, x, request, whole=True, folding=folding)
        try:
            passed = self._once(recording, x, request, whole=False, folding=folding)
        except observer.CannotCut:
            return self._once(recording, x, request, whole=True, folding=folding)
        if None in passed.gradients.values() and any(call.grad_mode for call in recording.calls):
            return self._once(recording, x, request, whole=True, folding=folding)
        return passed

    def _once(
        self, recording: Recording, x: torch.Tensor, request: Request, whole: bool, folding: Folding | None
    ) -> Pass:  # fmt: skip
        nodes = {name: recording.find(name) for name in request.layers}
        taps = {node.index: Tap() for node in nodes.values()}
        for name, node in nodes.items():
            tap = taps[node.index]
            tap.keep |= name in request.read
            tap.gradient |= name in request.gradients
            tap.live |= name == request.of
            tap.reduce = request.reduce.get(name, tap.reduce)
            tap.change = request.change.get(name, tap.change)
        mode: dict[str, Any] = {} if folding is None else {"runner": Folded, "folding": folding}
        way = torch.preserve_format if folding is None or x.dim() != 4 else folding.ways[0]
        x, real = self._filled(x)
        batch = x.shape[0]
        guard.seed(self.module)
        with torch.set_grad_enabled(bool(request.gradients)):
            leaf = x.detach().requires_grad_() if whole else x
            answer, runner = observer.run(
                self.module, recording, [leaf.clone(memory_format=way)], taps,  # a clone: the model may write into it
                stop=not request.runs_to_the_end, cut=-1 if whole else None, call=self.call, **mode,
            )  # fmt: skip
            values = {name: runner.values[node.index] for name, node in nodes.items() if node.index in runner.values}
            if INPUT in request.read:
                values[INPUT] = x
            values = {name: _real(value, real, batch) for name, value in values.items()}
            passed = Pass(_real(answer, real, batch), values)
            self._refuse_nan(x, passed)
            if request.gradients:
                scored = answer if request.of is None else runner.live[nodes[request.of].index]
                at = [leaf if g == INPUT else runner.edges[nodes[g].index] for g in request.gradients]
                at += [leaf] if whole else []  # a reentrant checkpoint tells itself on the way to the input alone
                passed.scores, found = _differentiate(request.score(scored), at, real)
                passed.gradients = {g: _real(f, real, batch) for g, f in zip(request.gradients, found, strict=False)}
        return passed if folding is None else _contiguous(passed)

    # -- what can go wrong

    def _refuse_nan(self, x: torch.Tensor, passed: Pass) -> None:
        """Name the first layer that made NaN; the last value read tells as well as the output does."""
        suspects = [t for t in observer.tensors_in(passed.output) if t.is_floating_point()]
        suspects = suspects or [v for v in list(passed.values.values())[-1:] if isinstance(v, torch.Tensor)]
        if not any(bool(torch.isnan(t.detach().sum())) for t in suspects if t.numel()):
            return
        if bool(torch.isnan(x).any()):
            raise errors.InputError("the picture given holds NaN (not a number), so the network's output is NaN too")
        first: list[observer.Node] = []

        def look(node: observer.Node, value: torch.Tensor) -> None:
            if not first and value.is_floating_point() and bool(torch.isnan(value).any()):
                first.append(node)

        guard.seed(self.module)
        observer.learn(self.module, x, call=self.call, check=look)
        if first:
            raise errors.InputError(
                f"the network's output is NaN (not a number); the first layer to produce one is {first[0].name!r}: "
                "check the weights of that layer and the range of the input"
            )

    # -- budget

    def chunk_size(self, x: torch.Tensor, request: Request) -> int:
        """How many images of `x` go into one pass, so that it stays inside the budget."""
        if self.fixed_batch or x.shape[0] == 1:
            return self.fixed_batch or 1
        recording = self.recording(x, opened=bool(request.attention))
        request = _spelled(request, recording)
        made = [0.0 if n.kind == "view" else _bytes(n) / max(recording.batch, 1) for n in recording.nodes]
        need = sum(made[recording.find(name).index] for name in request.read if name != INPUT)
        if request.gradients:  # what autograd keeps, and gradients on their way back
            first = 0 if INPUT in request.gradients else min(recording.find(g).index for g in request.gradients)
            need += 2.5 * sum(made[first:])
        else:
            need += 6.0 * max(made, default=0.0)
        budget = self.budget or free_memory(x.device) // 4
        return int(max(1, min(_best_batch(x, bool(request.gradients)), budget // max(need, 1.0), x.shape[0])))

    def chunks(self, x: torch.Tensor, run: Callable[[torch.Tensor, slice], Any], size: int) -> Iterator[Any]:
        """`run(x[part], part)` over the batch, `size` images at a time; smaller ones if a device has too little."""
        start = 0
        while start < x.shape[0]:
            part = slice(start, min(start + size, x.shape[0]))
            try:
                result = run(x[part], part)
            except torch.OutOfMemoryError:
                if size == 1 or self.fixed_batch:
                    raise
                size = max(1, size // 2)
                continue
            yield result
            start = part.stop


def _contiguous(passed: Pass) -> Pass:
    def plain(value: Any) -> Any:
        if all(t.is_contiguous() for t in observer.tensors_in(value)):
            return value
        return observer.map_tensors(value, torch.Tensor.contiguous)

    values, gradients = ({k: plain(v) for k, v in d.items()} for d in (passed.values, passed.gradients))
    return replace(passed, output=plain(passed.output), values=values, gradients=gradients)


def _near(plain: Any, found: Any, gradient: bool = False) -> bool:
    """Whether what one image brought is the first image's part of what a batch brought, but for rounding.

    Of a gradient, single numbers may differ by more: units within rounding of a kink.
    """
    for a, b in zip(observer.tensors_in(plain), observer.tensors_in(found), strict=True):
        a, b = a.detach(), b.detach()[: len(a)] if a.dim() else b.detach()
        if a.shape != b.shape:
            return False
        a, b = a.double(), b.double()
        far = (b - a).norm() > 0.1 * a.norm() if gradient else (b - a).abs().amax() > 1e-4 * a.abs().amax()
        if bool(far):
            return False
    return True


def _differentiate(scores: torch.Tensor, at: list, real: int) -> tuple[torch.Tensor, Sequence[torch.Tensor | None]]:
    if not scores.requires_grad:
        return scores[:real], [None] * len(at)
    try:
        return scores.detach()[:real], torch.autograd.grad(scores[:real].sum(), at, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" in str(error):
            raise errors.Unsupported(
                "this model uses reentrant checkpointing, which allows no gradient to its input; "
                "build it with use_reentrant=False or without checkpointing"
            ) from error
        raise


def _untouched(x: torch.Tensor, request: Request) -> Pass:
    return Pass(values={INPUT: x} if INPUT in request.read else {})


def _spelled(request: Request, recording: Recording) -> Request:
    """The request with attention matrices named as the layers they are."""
    if not request.attention:
        return request
    names = [n.name for n in attention.matrices(recording)]
    wanted = {"value": [], "last": names[-1:], "gradient": names}[request.attention]
    return replace(request, attention="", read=[*request.read, *names], gradients=[*request.gradients, *wanted])


def _best_batch(x: torch.Tensor, gradients: bool) -> int:
    """The batch that takes the least time an image; measured on two cores, tiny networks, MobileNet and ResNet."""
    if x.device.type != "cpu":
        return _CUDA_CHUNK if x.device.type == "cuda" else 16
    pixels = _CPU_PIXELS // 2 if gradients else _CPU_PIXELS
    return max(4, min(32, pixels // max(math.prod(x.shape[2:]), 1)))


def _bytes(node: observer.Node) -> float:
    return float(sum(math.prod(shape) for shape in node.shapes) * node.itemsize)


def _real(value: Any, real: int, batch: int) -> Any:
    """Without the images that only filled up a fixed batch."""
    if real == batch:
        return value
    return observer.map_tensors(value, lambda t: t[:real] if t.dim() and t.shape[0] == batch else t)


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that can be allocated now."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", "rb", buffering=0) as info:  # asked for in each pass: read no more than the top
            return int(info.read(256).partition(b"MemAvailable:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (ValueError, OSError, AttributeError):
        return 4 << 30
