"""Backward rules on operations: LRP, guided backprop, DeepLIFT and their like, as tables of what each operation does.

What is carried back is the multiplier G, not the relevance R: R = value * G can be read at any tensor. Then everything
that is homogeneous of degree one (views, sums, pools, ReLU, a product with a constant) keeps relevance under its plain
gradient and needs no rule, a sum of two branches is split by what each contributes, and nothing is divided by a value
that may be zero.

**The first layer.** Flat, w² and z-box give relevance to pixels that are zero, which no multiplier can do. They are
surrogates in `op.side.grain`, a tensor of zeros whose gradient *is* relevance; it accompanies the picture through what
only moves, scales or shifts it. The result is `x * G` and what arrived there.

**Books.** The terms are summed for each image: input + bias + constant + epsilon + softmax + other = score. What is
left over (`Ruled.closure`) is not only rounding: an operation that loses relevance without a booking shows there.

Bach et al., PLoS ONE 2015; Montavon et al., Layer-Wise Relevance Propagation: An Overview, 2019; Achtibat et al.,
AttnLRP, ICML 2024; Shrikumar et al., DeepLIFT, ICML 2017.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from innersight import errors
from innersight.observe import guard, observer
from innersight.observe.observer import Call, Node, Recording, Ref, Runner, Tap
from innersight.observe.passes import Engine, _real
from innersight.observe.replay import CannotSkip, batch_dims, joined
from innersight.observe.surrogates import (
    CONSTANT,
    CONVOLUTIONS,
    OWN,
    PRODUCTS,
    Op,
    Rules,
    Side,
    Surrogate,
    Way,
    affine_of,
    filled,
    statistics,
)

# ---------------------------------------------------------------------------------------------------------------------
# The result


@dataclass
class Ruled:
    """What a run under rules brought back, for n images.

    rules:      those that were applied
    output:     what the network answered
    scores:     (n,), what was explained
    multiplier: (n, C, H, W), G at the input
    side:       (n, C, H, W), relevance that the first layer's rule gave; None without such a rule
    relevance:  (n, C, H, W): input * G + side; with a baseline (input - baseline) * G
    shares:     where the score went, (n,) each: "input", and "bias", "constant", "epsilon", "softmax", "other"
    closure:    (n,), what the shares and the score differ by, relative to the greatest of them; None without books
    layers:     of the layers asked for: their value and their G
    met:        how often each rule was applied
    notes:      what the user has to know
    baseline_scores: (n,) with a baseline
    kept:       what `keep` returned: a list for all images, or one for each where they had to be run alone
    """

    rules: Rules
    output: Any
    scores: torch.Tensor
    multiplier: torch.Tensor
    side: torch.Tensor | None
    relevance: torch.Tensor
    shares: dict[str, torch.Tensor]
    closure: torch.Tensor | None
    layers: dict[str, tuple[torch.Tensor, torch.Tensor]]
    met: dict[str, int]
    notes: tuple[str, ...]
    baseline_scores: torch.Tensor | None = None
    kept: list[list[Any]] = field(default_factory=list)


Keep = Callable[[Node, torch.Tensor], Any]
SHARES = ("bias", "constant", "epsilon", "softmax", "other")


class _Books:
    """For each image, what of the relevance ended where."""

    def __init__(
        self, n: int, dims: Mapping[tuple[int, int], int | None], device: torch.device, keep: Keep | None = None
    ):
        self.n = n
        self.dims = dims
        self.keep = keep
        self.kept: list[Any] = []
        self.shares = {share: torch.zeros(n, dtype=_wide(device), device=device) for share in SHARES}

    def each(self, value: torch.Tensor, multiplier: torch.Tensor, ref: Ref) -> torch.Tensor:
        """Sums of value * G, one for each image; what no relevance reaches counts nothing, be it infinite."""
        product = torch.where(multiplier == 0, 0, value.detach() * multiplier)
        if self.n == 1:
            return product.sum(dtype=self.shares["bias"].dtype).reshape(1)
        dim = self.dims.get((ref.node, ref.output))
        if dim is None:
            raise _OneByOne
        return product.movedim(dim, 0).reshape(self.n, -1).sum(1, dtype=self.shares["bias"].dtype)

    def add(self, share: str, value: torch.Tensor, multiplier: torch.Tensor, ref: Ref) -> None:
        self.shares[share] += self.each(value, multiplier, ref)

    def own(self, node: Node, parts: Sequence[tuple[torch.Tensor, torch.Tensor]], lost: Sequence[tuple]) -> None:
        """Hand on, value by value, what an operation itself takes of the score: that of `parts` less that of `lost`."""
        if self.keep is None or any(value.shape != parts[0][1].shape for value, _ in lost):
            return
        taken = sum((value.detach() * g for value, g in parts), torch.zeros_like(parts[0][1]))
        reduced = self.keep(node, taken - sum(value.detach() * g for value, g in lost))
        if reduced is not None:
            self.kept.append(reduced)


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


# ---------------------------------------------------------------------------------------------------------------------
# On the way back


class _Saved:
    """Values that are needed later; who writes into their memory has them copied first."""

    def __init__(self, values: Sequence[torch.Tensor]):
        self.values = [v.detach() for v in values]

    def copy(self, key: int | None) -> None:
        self.values = [v.clone() if observer.storage_key(v) == key else v for v in self.values]


class _Step(_Saved):
    """One operation under a rule: what it read, and how G passes it."""

    def __init__(self, op: Op, rule: Surrogate, books: _Books | None):
        super().__init__([*op.inputs, *([op.side.grain] if op.side is not None else [])])
        self.op = op
        self.rule = rule
        self.books = books
        op.inputs = []  # they hold the graph that will hold this step

    def back(self, multiplier: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        op, count = self.op, len(self.op.refs)
        leaves = [v.detach().requires_grad_() for v in self.values]
        op.inputs, op.multiplier = leaves[:count], multiplier
        if op.side is not None:
            op.side = replace(op.side, grain=leaves[count])
        with torch.enable_grad():
            made = self.rule.terms(op)
            terms = {"input": made} if isinstance(made, torch.Tensor) else made
            through = terms.pop("input")
            found = torch.autograd.grad(through, leaves, multiplier, allow_unused=True)
        if self.books is not None:
            here = Ref(op.node.index)
            for share, value in terms.items():
                self.books.add(share, value, multiplier, here)
            passed = [(v, g, ref) for v, g, ref in zip(leaves, found, op.refs, strict=False) if g is not None]
            if self.rule.measured:
                lost = self.books.each(through, multiplier, here)
                for value, g, ref in passed:
                    lost = lost - self.books.each(value, g, ref)
                self.books.shares[self.rule.measured] += lost
                self.books.own(op.node, [(through, multiplier)], [(value, g) for value, g, _ in passed])
            elif terms:
                self.books.own(op.node, [(value, multiplier) for value in terms.values()], [])
        self.values, op.inputs, op.baseline, op.side = [], [], None, None
        op.multiplier = torch.empty(0)
        return found


class _Passed(torch.autograd.Function):
    """`y` going forward, the gradient of a step's surrogate going back. y is fresh: it may be written in place."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, step: _Step, *_inputs: torch.Tensor) -> torch.Tensor:
        ctx.step = step
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None, None, *ctx.step.back(gradients[0])


# ---------------------------------------------------------------------------------------------------------------------
# The plan: what stands where in this network

_ENDS = frozenset("softmax log_softmax sigmoid".split())
_CHOICES = frozenset("getitem reshape flatten topk sort cat concat stack gather index_select masked_select".split())


@dataclass
class _Plan:
    """What the recording tells the rules.

    folds:  batch norm -> the convolution it is made part of
    gates:  what is a sigmoid written out of other operations: relu6(x + 3) / 6
    ends:   what turns the scores into probabilities at the very end
    last:   the linear maps whose results are the scores
    """

    folds: dict[int, int] = field(default_factory=dict)
    gates: set[int] = field(default_factory=set)
    ends: set[int] = field(default_factory=set)
    last: set[int] = field(default_factory=set)


def _plan(recording: Recording, rules: Rules) -> _Plan:
    nodes, plan = recording.nodes, _Plan()
    readers: dict[int, list[int]] = {}
    for node in nodes:
        for i in node.inputs:
            readers.setdefault(i, []).append(node.index)
    outputs = {ref.node for ref in recording.outputs}
    for node in nodes:
        conv = _folds_into(node, recording) if rules.fold else None
        if conv is not None and readers[conv.index] == [node.index] and conv.index not in outputs:
            plan.folds[node.index] = conv.index
        if _is_hard_sigmoid(node, nodes, readers):
            plan.gates.add(node.index)
    ends, seen = outputs, set(outputs)
    while ends:  # backwards over what only changes the shape or, as detectors do, picks the best
        found = [nodes[i] for i in ends]
        plan.ends |= {n.index for n in found if n.op in _ENDS}
        plan.last |= {n.index for n in found if n.op in CONVOLUTIONS | PRODUCTS}
        passed = [n for n in found if n.kind in ("view", "copy") or n.op in _CHOICES or n.op in _ENDS]
        twins = {n.index for n in map(recording.handed_on, found) if n is not None}
        ends = ({i for n in passed for i in n.inputs} | twins) - seen
        seen |= ends
    return plan


def _folds_into(node: Node, recording: Recording) -> Node | None:
    if node.op != "batch_norm":
        return None
    read = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(read, Ref) or read.output:
        return None
    if not statistics(recording.calls[node.position].func, node.args, node.kwargs).fixed:
        return None
    conv = recording.nodes[read.node]
    grouped = conv.kwargs.get("groups", conv.args[6] if len(conv.args) > 6 else 1) != 1
    if conv.partial or conv.inplace or ("transpose" in conv.op and grouped):
        return None
    return conv if conv.op in CONVOLUTIONS or (conv.op == "linear" and len(conv.shape) == 2) else None


def _is_hard_sigmoid(node: Node, nodes: list[Node], readers: Mapping[int, list[int]]) -> bool:
    """relu6(x + 3) that goes nowhere but into a division by 6."""
    bounds = {"relu6": (), "clamp": (0, 6), "hardtanh": (0, 6)}.get(node.op)
    if bounds is None or len(node.inputs) != 1:
        return False
    given = tuple(v for v in (*node.args[1:3], *node.kwargs.values()) if not isinstance(v, bool))
    added = nodes[node.inputs[0]]
    follows = [nodes[i] for i in readers.get(node.index, ())]
    return (
        (not bounds or given == bounds)
        and added.op == "add"
        and 3 in [v for v in added.args if isinstance(v, (int, float))]
        and [n.op for n in follows] in (["div"], ["mul"])
        and any(isinstance(v, (int, float)) and v in (6, 1 / 6) for v in follows[0].args)
    )


# ---------------------------------------------------------------------------------------------------------------------
# On the way forward

# What only moves the values of a picture, repeats or drops some: it does the same to what accompanies the picture.
_MOVES = frozenset(
    "contiguous clone to float double half bfloat16 type type_as cpu cuda reshape view flatten unflatten expand "
    "expand_as roll flip stack unbind split chunk tensor_split split_with_sizes index_select squeeze unsqueeze "
    "transpose permute movedim moveaxis swapaxes swapdims T mT getitem narrow select slice cat concat concatenate pad "
    "constant_pad_nd pixel_unshuffle unfold dropout alias rot90 fliplr flipud hsplit vsplit".split()
)
# What scales and shifts each value by constants.
_SHIFTS = frozenset("add sub mul div neg rsub batch_norm true_divide multiply subtract divide".split())


class _Ruling(Runner):
    """Runs the network with its own values, and a graph that leads back by the rules."""

    def __init__(
        self,
        recording: Recording,
        taps: Mapping[int, Tap],
        stop: bool,
        *,
        rules: Rules,
        plan: _Plan,
        books: _Books | None,
        start: tuple[torch.Tensor, Side | None],
        remembered: Mapping[int, _Saved] | None = None,
    ):
        super().__init__(recording, taps, stop, cut=-1)
        self.tail = self.length  # to the end, every call must be the one that was learnt
        self.rules = rules
        self.plan = plan
        self.made_part = set(plan.folds.values())
        self.books = books
        self.remembered = remembered
        self.met: Counter[str] = Counter()
        self.stopped = ""  # the last operation that made a constant
        self.strayed = ""  # the first operation behind which the picture is no longer followed
        self.folded: dict[int, Op] = {}
        self.sides: dict[int, tuple[weakref.ref, Side]] = {}
        self.saved: dict[int, list[_Saved]] = {}
        self.backwards: set[type] = {_BACK}  # of graphs that operations made under our eyes
        self.writes = any(call.writes for call in self.calls)
        if start[1] is not None:
            self.sides[id(start[0])] = weakref.ref(start[0]), start[1]

    def clear(self) -> None:
        """Let go of what the run held."""
        for held in (self.folded, self.sides, self.saved, self.edges, self.values, self._kept):
            held.clear()
        self.books = self.remembered = None

    # -- one call

    def _run(self, _position: int, call: Call, func: Callable, args: tuple, kwargs: dict) -> Any:
        if call.grad_mode or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if call.node is None:
            return _without_grad(func, args, kwargs)
        node = self.recording.nodes[call.node]
        with torch._C.DisableTorchFunction():
            if (op := self.folded.pop(self.plan.folds.get(node.index, -1), None)) is not None:
                op.folded = affine_of(statistics(func, *_detached(args, kwargs)))
            else:
                op = Op(node, func, args, kwargs, self.rules)
            self.refuse(op)
            if not op.inputs:
                return _without_grad(func, args, kwargs)
            target = observer.written(observer.raw_name(func), args, kwargs) if node.inplace else None
            if node.index in self.made_part and op.linear is not None:
                self.folded[node.index] = op  # the rule is applied at the batch norm behind it
                return _without_grad(func, args, kwargs)
            if self.rules.entry(op.name) is None and target is None:
                out = _without_grad(func, args, kwargs)
                if not any(t.is_floating_point() or t.is_complex() for t in observer.tensors_in(out)):
                    return out  # an index, a comparison: no relevance passes it
            rule = self.rule(op, node)
            self.met[rule.name] += 1
            sides = [self.side_of(i) for i in op.inputs] if self.sides and op.side is None else []
            out = self.under(rule, op, func, args, kwargs, target)
            if any(sides):
                self.follow(op, sides, out if target is None else target)
            return out

    def rule(self, op: Op, node: Node) -> Way | Surrogate:
        if node.index in self.plan.gates and self.rules.entry("sigmoid") is CONSTANT:
            return CONSTANT
        if node.index in self.plan.ends and self.rules.ends is not None:
            return self.rules.ends
        entry = self.rules.entry(op.name)
        if entry is None:
            raise errors.Unsupported(
                f"{self.rules.name} has no rule for the operation {op.name!r} (layer {op.layer!r}); gradient_x_input "
                "and integrated_gradients need none"
            )
        op.last = op.node.index in self.plan.last
        if self.sides and self.rules.first is not None and len(op.inputs) == 1 and op.linear is not None:
            op.side = self.side_of(op.inputs[0])
        return entry if isinstance(entry, (Way, Surrogate)) else entry(op)

    def under(self, rule: Way | Surrogate, op: Op, func: Callable, args: tuple, kwargs: dict,
              target: torch.Tensor | None) -> Any:  # fmt: skip
        """The operation with its own value, and, in the place of its graph, what the rule says."""
        if rule is OWN:
            self.protect(target)
            out = func(*filled(op.args, op.inputs), **filled(op.kwargs, op.inputs))
            self.backwards.update(type(t.grad_fn) for t in observer.tensors_in(out))
            return out
        if target is not None and rule is CONSTANT and not target._is_view():
            target.detach_()  # else what is written into it would count as what was there before
        fresh = None if target is None else target.detach().clone()
        given = observer.map_tensors(
            (args, kwargs), lambda t: fresh if t is target and fresh is not None else t.detach()
        )
        with torch.no_grad():
            out = func(*given[0], **given[1])
        y = fresh if fresh is not None else observer.first_tensor(out)
        assert y is not None
        if isinstance(rule, Surrogate):
            y = self.passed(rule, op, y)
        else:
            self.stopped = f"{op.layer!r} ({op.name})"
        if target is None:
            return y if isinstance(out, torch.Tensor) else observer.with_first(out, y)
        self.protect(target)  # now: this very operation may have kept it
        target.copy_(y)
        return None if out is None else target

    def passed(self, rule: Surrogate, op: Op, y: torch.Tensor) -> torch.Tensor:
        if any(observer.storage_key(y) == observer.storage_key(i) for i in op.inputs):
            y = y.clone()
        y = y.data  # what einsum returns is a view, and a view may not be given another graph
        if self.remembered is not None:
            kept = self.remembered[op.node.position].values
            op.baseline = [kept[slot] for slot in op.slots]
        inputs = [*op.inputs, *([op.side.grain] if op.side is not None else [])]
        step = _Step(op, rule, self.books)
        self.save(step)
        return _Passed.apply(y, step, *inputs)

    def refuse(self, op: Op) -> None:
        """What a graph made elsewhere would carry back by itself, past the rules."""
        if observer._recomputed():
            raise errors.Unsupported(
                f"layer {op.layer!r} lies in a checkpoint, which computes it once more on the way back, where no "
                f"rules can be set; {self.rules.name} needs the network without checkpoints"
            )
        if op.unseen and self.recording.gaps:
            raise errors.Unsupported(
                f"layer {op.layer!r} reads what code that cannot be watched (scripted, traced or compiled) made, so "
                f"{self.rules.name} cannot go through it; gradient methods can"
            )
        for value in op.inputs:
            made = value.grad_fn
            if isinstance(made, torch.autograd.function.BackwardCFunction) and type(made) not in self.backwards:
                raise errors.Unsupported(
                    f"layer {op.layer!r} reads what a torch.autograd.Function made ({type(made).__name__}), whose "
                    f"backward is its author's: {self.rules.name} cannot go through it; use the plain operations"
                )

    # -- values that are needed later

    def save(self, saved: _Saved) -> None:
        for value in saved.values if self.writes else ():
            if (key := observer.storage_key(value)) is not None:
                self.saved.setdefault(key, []).append(saved)

    def protect(self, target: torch.Tensor | None) -> None:
        if target is None or not self.saved:
            return
        key = observer.storage_key(target)
        for saved in self.saved.pop(key or -1, ()):
            saved.copy(key)

    def _gradient_here(self, node: Node, value: torch.Tensor) -> torch.Tensor:
        if value.requires_grad:
            self.edges[node.index] = torch.autograd.graph.get_gradient_edge(value)
        return value

    # -- what accompanies the picture

    def side_of(self, tensor: torch.Tensor) -> Side | None:
        known = self.sides.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else None

    def follow(self, op: Op, sides: list[Side | None], out: Any) -> None:
        """Note what accompanies the result of an operation on the picture, as long as that is one."""
        known = [s for s in sides if s is not None]
        tensors = list(observer.tensors_in(out))
        found: list[Side] = []
        if len(known) == len(sides) and not op.node.partial:
            if op.name in _MOVES:
                found = _moved(op, known)
            elif op.name == "exact" or (op.name == "clamp" and op.node.kind == "inner"):
                found = known[:1]  # a picture brought to integers, each pixel in its place
            elif op.name in _SHIFTS and len(known) == 1 and known[0].grain.shape == tensors[0].shape:
                with torch.no_grad():
                    a, b = op(known[0].low), op(known[0].high)
                found = [replace(known[0], low=torch.minimum(a, b), high=torch.maximum(a, b))]
        for tensor, side in zip(tensors, found, strict=False):
            self.sides[id(tensor)] = weakref.ref(tensor), side
        if not found:
            if op.node.inplace:  # what shares memory with it has changed as well
                key = observer.storage_key(tensors[0])
                self.sides = {
                    i: (ref, side)
                    for i, (ref, side) in self.sides.items()
                    if (known_tensor := ref()) is not None and observer.storage_key(known_tensor) != key
                }
            self.strayed = self.strayed or f"{op.layer!r} ({op.name})"


_BACK = _Passed._backward_cls


def _moved(op: Op, sides: list[Side]) -> list[Side]:
    """What accompanies each output of an operation that moves values about, and perhaps puts constants beside them."""

    def moved(values: list[torch.Tensor]) -> list[torch.Tensor]:
        return list(observer.tensors_in(op.outputs(*values)))

    def alone(values: list[torch.Tensor]) -> list[torch.Tensor]:
        constants = moved([torch.zeros_like(v) for v in values])
        return [a - b for a, b in zip(moved(values), constants, strict=True)]

    with torch.no_grad():
        inside = alone([s.inside for s in sides])
        low, high = moved([s.low for s in sides]), moved([s.high for s in sides])
    grain = alone([s.grain for s in sides])
    return [Side(*each) for each in zip(grain, inside, low, high, strict=True)]


def _detached(args: tuple, kwargs: dict) -> Any:
    return observer.map_tensors((args, kwargs), torch.Tensor.detach)


def _without_grad(func: Callable, args: tuple, kwargs: dict) -> Any:
    with torch._C.DisableTorchFunction():
        graph = any(t.requires_grad for t in observer.tensors_in((args, kwargs)))
    if not graph:  # a view that is made without grad mode may not be written into with it
        return func(*args, **kwargs)
    torch._C._set_grad_enabled(False)
    try:
        return func(*args, **kwargs)
    finally:
        torch._C._set_grad_enabled(True)


class _Remembering(Runner):
    """Runs the network on the baseline and keeps what its operations read."""

    def __init__(self, recording: Recording, taps: Mapping[int, Tap], stop: bool, *, rules: Rules):
        super().__init__(recording, taps, stop)
        self.tail = self.length
        self.rules = rules
        self.remembered: dict[int, _Saved] = {}
        self.saved: dict[int, list[_Saved]] = {}

    def _run(self, position: int, call: Call, func: Callable, args: tuple, kwargs: dict) -> Any:
        with torch._C.DisableTorchFunction():
            target = observer.written(observer.raw_name(func), args, kwargs) if call.writes else None
            if call.node is not None and not isinstance(self.rules.entry(self.recording.nodes[call.node].op), Way):
                read = _Saved(list(observer.tensors_in((args, kwargs))))
                self.remembered[position] = read
                for value in read.values:
                    self.saved.setdefault(observer.storage_key(value) or -1, []).append(read)
            if target is not None:
                key = observer.storage_key(target)
                for saved in self.saved.pop(key or -1, ()):
                    saved.copy(key)
        return func(*args, **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# A run


class _OneByOne(Exception):
    """Which dimension of some value holds the batch is not known, so that images have to be run alone."""


@dataclass
class _Part:
    """One trip under rules: all images, or one of them."""

    output: Any
    leaf: torch.Tensor
    grain: torch.Tensor | None
    runner: _Ruling
    books: _Books | None
    base: Any = None


def run(
    engine: Engine,
    x: torch.Tensor,
    rules: Rules,
    score: Callable[[Any], torch.Tensor],
    baseline: torch.Tensor | None = None,
    layers: Sequence[str] = (),
    keep: Keep | None = None,
) -> Ruled:
    """The score of each image, led back by the rules. Call it inside `engine.session()`.

    score:    the output -> (n,)
    baseline: (n or 1, C, H, W), for rules that compare with one
    layers:   where besides the input value and multiplier are wanted
    keep:     called with a node and what of the score it takes itself (a bias times its multiplier), in the shape of
              its output; what it returns is kept. For rules with books

    Raises Unsupported where the network does what the rules, or this way of applying them, cannot follow.
    """
    x = x.clone() if x.is_inference() else x.detach()
    if baseline is not None:
        baseline = baseline.to(x).expand_as(x)
    try:
        for attempt in range(3):  # as learnt; learnt anew for this batch; the other way round about gradients
            recording = engine.recording(x, grad=attempt != 1, again=attempt > 0, opened=True)
            _refuse_opaque(engine, recording, x, rules)
            chosen, why = rules.choose(recording)
            try:
                return _run(engine, recording, x, chosen, score, baseline, layers, why, keep)
            except observer.Diverged:
                continue
    except RuntimeError as error:
        raise _explained(error, rules) from error
    raise errors.Unsupported("this model does something else each time it runs, so its layers cannot be told apart")


def _explained(error: RuntimeError, rules: Rules) -> Exception:
    said = str(error)
    if "Inference tensors" in said:
        return errors.Unsupported(
            "this model was built in inference mode, so no gradient can pass its parameters; build or load it outside "
            "of torch.inference_mode()"
        )
    if "modified by an inplace operation" in said:
        return errors.Unsupported(
            f"the network overwrites in place what the way back still needs, so {rules.name} cannot pass it; a "
            "gradient cannot either"
        )
    return error


def _refuse_opaque(engine: Engine, recording: Recording, x: torch.Tensor, rules: Rules) -> None:
    """What was made unseen, unless it is a constant: of two images there are then not two of it."""
    opaque = [n for n in recording.nodes if n.kind == "opaque"]
    if opaque and engine.fixed_batch is None and not any(n.inputs for n in opaque):
        opaque = [n for n in _of_two(engine, x).nodes if n.kind == "opaque"]
    for node in opaque:
        raise errors.Unsupported(
            f"layer {node.name!r} is made by code that cannot be watched (scripted, traced or compiled), so "
            f"{rules.name} cannot go through it; gradient methods can"
        )


def _of_two(engine: Engine, x: torch.Tensor) -> Recording:
    guard.seed(engine.module)
    return observer.learn(engine.module, torch.cat([x[:1], x[:1]]), call=engine.call, grad=True, opened=True)


def _run(
    engine: Engine,
    recording: Recording,
    x: torch.Tensor,
    rules: Rules,
    score: Callable[[Any], torch.Tensor],
    baseline: torch.Tensor | None,
    layers: Sequence[str],
    why: str,
    keep: Keep | None,
) -> Ruled:
    plan = _plan(recording, rules)
    if rules.last is not None and not plan.last:
        raise errors.Unsupported(
            f"{rules.name} negates the weights that make the scores; here the scores are made from those by further "
            "operations (a pool, a sum), so there are none"
        )
    nodes = {name: recording.find(name) for name in layers}
    for name, node in nodes.items():
        if (norm := next((b for b, conv in plan.folds.items() if conv == node.index), None)) is not None:
            raise errors.Unsupported(
                f"{rules.name} makes layer {name!r} and the batch norm behind it one, so there is no relevance "
                f"between them; ask for {recording.nodes[norm].name!r}"
            )
    dims = _dims(engine, recording, x) if rules.books and len(x) > 1 else {}
    together = engine.fixed_batch in (None, len(x)) and (dims is not None or len(x) == 1)
    try:
        if together:
            return _back([_forth(engine, recording, x, rules, plan, nodes, dims or {}, baseline, keep)],
                         x, rules, score, baseline, nodes, why)  # fmt: skip
    except _OneByOne:
        pass
    parts = []
    for i in range(len(x)):
        other = None if baseline is None else baseline[i : i + 1]
        parts.append(_forth(engine, recording, x[i : i + 1], rules, plan, nodes, {}, other, keep))
    return _back(parts, x, rules, score, baseline, nodes, why)


def _forth(engine: Engine, recording: Recording, x: torch.Tensor, rules: Rules, plan: _Plan, nodes: Mapping[str, Node],
           dims: Mapping, baseline: torch.Tensor | None, keep: Keep | None) -> _Part:  # fmt: skip
    n, remembered, base = len(x), None, None
    if baseline is not None:
        base, remembered = _remember(engine, recording, baseline, rules)
        base = base if engine.fixed_batch is None else _real_of(base, n)
    whole = engine._filled(x)[0]
    books = _Books(n, dims, x.device, keep) if rules.books else None
    guard.seed(engine.module)
    with torch.enable_grad():
        leaf = whole.detach().requires_grad_()
        given = leaf.clone()
        side = None if rules.first is None else _side(whole, rules)
        taps = {node.index: Tap(keep=True, gradient=True) for node in nodes.values()}
        output, runner = observer.run(
            engine.module, recording, [given], taps, call=engine.call, runner=_Ruling,
            rules=rules, plan=plan, books=books, start=(given, side), remembered=remembered,
        )  # fmt: skip
    assert isinstance(runner, _Ruling)
    grain = None if side is None else side.grain
    output = output if engine.fixed_batch is None else _real_of(output, n)
    return _Part(output, leaf, grain, runner, books, base)


def _real_of(output: Any, n: int) -> Any:
    """Without the images that only filled up a fixed batch."""
    first = observer.first_tensor(output)
    return output if first is None else _real(output, n, first.shape[0] if first.dim() else n)


def _remember(engine: Engine, recording: Recording, baseline: torch.Tensor, rules: Rules) -> tuple[Any, dict]:
    guard.seed(engine.module)
    with torch.no_grad():
        output, runner = observer.run(
            engine.module, recording, [engine._filled(baseline)[0].clone()], {}, call=engine.call,
            runner=_Remembering, rules=rules,
        )  # fmt: skip
    assert isinstance(runner, _Remembering)
    return output, runner.remembered


def _side(x: torch.Tensor, rules: Rules) -> Side:
    space = tuple(range(2, x.dim())) or (1,)

    def bound(given: float | tuple[float, ...] | None, own: torch.Tensor) -> torch.Tensor:
        if given is None:
            return own.expand_as(x)
        return torch.as_tensor(given).to(x).reshape(-1, *[1] * (x.dim() - 2)).expand_as(x)

    low, high = bound(rules.low, x.amin(space, keepdim=True)), bound(rules.high, x.amax(space, keepdim=True))
    return Side(torch.zeros_like(x).requires_grad_(), torch.ones_like(x), low, high)


# Engine -> (recording, which dimension of each value holds the batch)
_known_dims: weakref.WeakKeyDictionary[Engine, dict[int, tuple[Recording, Any]]] = weakref.WeakKeyDictionary()


def _dims(engine: Engine, recording: Recording, x: torch.Tensor) -> dict[tuple[int, int], int | None] | None:
    """Which dimension of each value holds the images, one after the other; None if that cannot be known."""
    known = _known_dims.setdefault(engine, {})
    if id(recording) not in known:
        known[id(recording)] = recording, _found_dims(engine, recording, x)
    return known[id(recording)][1]


def _found_dims(engine: Engine, recording: Recording, x: torch.Tensor) -> dict[tuple[int, int], int | None] | None:
    if engine.fixed_batch is not None or recording.batch != 1:
        return None
    try:
        two = _of_two(engine, x)
        if [c.func for c in two.calls] != [c.func for c in recording.calls]:
            return None
        dims = batch_dims(recording.nodes, two.nodes)
        return dims if _images_stay_together(engine, recording, x, dims) else None
    except (CannotSkip, observer.Diverged, RuntimeError, ValueError, IndexError):  # it takes one image alone
        return None


def _images_stay_together(engine: Engine, recording: Recording, x: torch.Tensor, dims: Mapping) -> bool:
    """Whether in dimensions that hold the batch and more (windows, heads) the first image comes first, all of it."""
    merged = [n for n in recording.nodes if (d := dims.get((n.index, 0))) is not None and n.shape[d] != 1]
    if not merged:
        return True

    def print_of(node: Node) -> Callable[[torch.Tensor], torch.Tensor]:
        def reduce(value: torch.Tensor) -> torch.Tensor:
            rows = value.movedim(dims[node.index, 0], 0).reshape(value.shape[dims[node.index, 0]], -1).double()
            return rows @ torch.arange(rows.shape[1], device=rows.device).double().cos()

        return reduce

    noise = torch.randn(x[:1].shape, generator=torch.Generator().manual_seed(0)).to(x)
    prints = []
    for batch in (x[:1], torch.cat([x[:1], x[:1] + noise])):
        taps = {n.index: Tap(reduce=print_of(n)) for n in merged}
        guard.seed(engine.module)
        with torch.no_grad():
            _, runner = observer.run(engine.module, recording, [batch.clone()], taps, call=engine.call)
        prints.append(runner.values)
    alone, first = prints
    return all(
        torch.allclose(alone[n.index], first[n.index][: len(alone[n.index])], rtol=1e-3,
                       atol=1e-4 * float(alone[n.index].abs().max()) + 1e-9)
        for n in merged
    )  # fmt: skip


def _back(parts: list[_Part], x: torch.Tensor, rules: Rules, score: Callable[[Any], torch.Tensor],
          baseline: torch.Tensor | None, nodes: Mapping[str, Node], why: str) -> Ruled:  # fmt: skip
    try:
        return _led_back(parts, x, rules, score, baseline, nodes, why)
    finally:
        for part in parts:
            part.runner.clear()


def _led_back(parts: list[_Part], x: torch.Tensor, rules: Rules, score: Callable[[Any], torch.Tensor],
              baseline: torch.Tensor | None, nodes: Mapping[str, Node], why: str) -> Ruled:  # fmt: skip
    n, runner = len(x), parts[0].runner
    with torch.enable_grad():
        output = parts[0].output if len(parts) == 1 else joined([p.output for p in parts])
        # The score of copies: what an output gives to others behind it is no part of what it is itself asked for.
        ends = [t for t in observer.tensors_in(output) if t.is_floating_point() and t.requires_grad]
        copies = {id(t): t.detach().requires_grad_() for t in ends}
        scores = score(observer.map_tensors(output, lambda t: copies.get(id(t), t)))
    if not scores.requires_grad:
        stopped = f": what {runner.stopped} returns counts as a constant under them" if runner.stopped else ""
        raise errors.Unsupported(f"the score does not depend on the picture in a way {rules.name} can follow{stopped}")
    for name, node in nodes.items():
        if any(node.index not in p.runner.edges for p in parts):
            raise errors.Unsupported(f"no relevance passes layer {name!r}: its value is a constant under {rules.name}")
    wanted = torch.autograd.grad(scores.sum(), list(copies.values()), allow_unused=True)
    ends = [t for t, g in zip(ends, wanted, strict=True) if g is not None]
    asked = [g for g in wanted if g is not None]
    at = [p.leaf for p in parts] + [p.grain for p in parts if p.grain is not None]
    at += [p.runner.edges[node.index] for node in nodes.values() for p in parts]
    found = list(torch.autograd.grad(ends, at, asked, allow_unused=True))

    size = n if len(parts) == 1 else 1
    multiplier = torch.cat([_or_zeros(found.pop(0), p.leaf)[:size] for p in parts])
    side = None
    if parts[0].grain is not None:
        side = torch.cat([_or_zeros(found.pop(0), p.leaf)[:size] for p in parts])
    read: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, node in nodes.items():
        values = [_real_of(p.runner.values[node.index], size) for p in parts]
        gradients = [_or_zeros(found.pop(0), v) for v in (p.runner.values[node.index] for p in parts)]
        read[name] = torch.cat(values), torch.cat([_real_of(g, size) for g in gradients])
    relevance = multiplier * (x if baseline is None else x - baseline)
    relevance = relevance if side is None else relevance + side

    scores = scores.detach()
    total, base_scores, shares, closure = scores, None, {}, None
    if baseline is not None:
        with torch.no_grad():
            base_scores = score(parts[0].base if len(parts) == 1 else joined([p.base for p in parts]))
        total = scores - base_scores
    wide = _wide(x.device)
    shares["input"] = relevance.flatten(1).sum(1, dtype=wide)
    if rules.books:
        start = sum(_each(t.detach() * g, n, wide) for t, g in zip(ends, asked, strict=True))
        for share in SHARES:
            shares[share] = torch.cat([p.books.shares[share] for p in parts if p.books is not None])
        shares["other"] = shares["other"] + (total.to(wide) - start)  # of a target that is no sum of outputs
    if rules.books or baseline is not None:
        all_of_it = torch.stack(list(shares.values()))
        scale = torch.cat([all_of_it.abs(), total.abs().to(wide)[None]]).amax(0)
        closure = (all_of_it.sum(0) - total.to(wide)).abs() / scale.clamp(min=torch.finfo(x.dtype).tiny)
    return Ruled(
        rules, observer.map_tensors(output, torch.Tensor.detach), scores, multiplier, side, relevance, shares, closure,
        read, dict(sum((p.runner.met for p in parts), Counter())), _notes(parts, rules, why), base_scores,
        [p.books.kept for p in parts if p.books is not None],
    )  # fmt: skip


def _or_zeros(gradient: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def _each(value: torch.Tensor, n: int, dtype: torch.dtype) -> torch.Tensor:
    return value.sum(dtype=dtype).reshape(1) if n == 1 else value.reshape(n, -1).sum(1, dtype=dtype)


def _notes(parts: list[_Part], rules: Rules, why: str) -> tuple[str, ...]:
    runner, notes = parts[0].runner, [why] if why else []
    if rules.meets and not runner.met[rules.meets]:
        notes.append(f"no rectifier (ReLU) was met, so {rules.name} is the plain gradient here")
    if rules.first is not None and not runner.met[rules.first.name]:
        because = f"behind {runner.strayed} it is no longer a picture" if runner.strayed else "no layer reads it"
        notes.append(f"the first layer's rule ({rules.first.name}) was not applied to the picture: {because}")
    if isinstance(rules.ends, Surrogate) and runner.met[rules.ends.name]:
        notes.append("the network answers with probabilities; relevance starts at the scores they are made from")
    return tuple(notes)
