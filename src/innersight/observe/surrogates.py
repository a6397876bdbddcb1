"""What a backward rule is, and what it is told: rules as data.

`Rules.table` maps the name of an operation (`Node.op`: "relu", "add", "softmax") to

- `OWN`        the operation's own gradient; it costs nothing
- `CONSTANT`   the result counts as a constant: no relevance goes through it
- `Surrogate`  another function whose gradient is the rule. It is given the `Op` and returns a tensor of the output's
               shape that depends on `op.inputs` (what descends from the network's input; weights and constants are
               reached by `op.arg(position, name)` or `op.linear`):

                   @surrogate
                   def ratio(op):                       # f(x) as x times a constant
                       x = op.inputs[0]
                       return x * (op(x) / x).detach()  # op(...) is the operation itself, on other inputs

               Or a dictionary of terms: "input" is that tensor, the others are what of the output's value is taken
               from the relevance and on which share it is booked: `{"input": x * s, "bias": t}`. All of them sum to
               the value of the output. `op.multiplier` is the G that arrives.
- a function   of the `Op` that chooses one of these when the operation runs: by how many of its operands descend from
               the input (`op.inputs`), or by an argument

The surrogate is built on the way back, from the inputs alone, and freed at once: a run under rules keeps what a plain
gradient keeps. Its value does not matter, the network computes what it always computes.

With a baseline the network is first run on that, and the rules find in `op.baseline` what `op.inputs` were then. So
DeepLIFT's rule for an elementwise function is `x * ((op(x) - op(x0)) / (x - x0)).detach()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from innersight.observe import observer
from innersight.observe.observer import Const, Node, Recording, Ref


@dataclass(frozen=True)
class Way:
    """What needs no surrogate."""

    name: str


OWN = Way("own gradient")
CONSTANT = Way("constant")

Terms = torch.Tensor | dict[str, torch.Tensor]


@dataclass(frozen=True)
class Surrogate:
    """A function of the `Op` whose gradient is the rule.

    measured: the share on which what goes in less what comes out is booked, where the terms do not tell
    """

    name: str
    terms: Callable[[Op], Terms]
    measured: str = ""


def surrogate(function: Callable[[Op], Terms]) -> Surrogate:
    return Surrogate(function.__name__, function)


def measured(share: str) -> Callable[[Callable[[Op], Terms]], Surrogate]:
    return lambda function: Surrogate(function.__name__, function, share)


Entry = Way | Surrogate | Callable[["Op"], "Way | Surrogate"]


@dataclass(frozen=True)
class Rules:
    """A table of rules, and what its rules are told. Two of the same name and options are the same.

    table:   operation -> what it does on the way back; see the module's text
    others:  what operations do that are not in the table; None refuses them
    conv, dense: what `linear_map`, the entry of convolutions and matrix products with weights, chooses
    first:   ... for those that read the picture itself; last: for those that make the scores. None: as all others
    ends:    the rule of a softmax or sigmoid that makes the network's answer
    epsilon, gamma, alpha, beta: numbers of the rules of that name
    bias:    whether biases take part in the sums by which relevance is split (epsilon's rule aside, where they do)
    low, high: the range of the picture, a number or one for each channel; default the least and greatest of each image
    fold:    whether a batch norm directly behind a convolution is made part of it
    books:   whether shares are kept
    meets:   a kind of operation without which these rules are the plain gradient: the name of its surrogate
    """

    name: str
    table: Mapping[str, Entry] = field(repr=False, compare=False)
    others: Way | Surrogate | None = None
    conv: Entry = OWN
    dense: Entry = OWN
    first: Surrogate | None = None
    last: Surrogate | None = None
    ends: Way | Surrogate | None = None
    epsilon: float = 1e-6
    gamma: float = 0.25
    alpha: float = 2.0
    beta: float = 1.0
    bias: bool = True
    low: float | tuple[float, ...] | None = None
    high: float | tuple[float, ...] | None = None
    fold: bool = True
    books: bool = True
    meets: str = ""

    def choose(self, _recording: Recording) -> tuple[Rules, str]:
        """These rules; those that depend on the network say which they became, and why."""
        return self, ""

    def entry(self, name: str) -> Entry | None:
        return self.table.get(name, self.others)


@dataclass(frozen=True)
class _Slot:
    """Stands, in the arguments of an `Op`, for what descends from the input."""

    index: int


@dataclass(frozen=True)
class Linear:
    """A linear map with constant weights: `call(x, weight) + bias`, whatever it was written as."""

    call: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    weight: torch.Tensor
    bias: torch.Tensor | None  # in a shape that fits the output
    conv: bool

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = self.call(x, self.weight)
        return out if self.bias is None else out + self.bias

    def scaled(self, scale: torch.Tensor, shift: torch.Tensor, transposed: bool) -> Linear:
        """With an affine map of the output channels made part of it."""
        rest = self.weight.dim() - 2
        shape = (1, -1, *[1] * rest) if transposed else (-1, 1, *[1] * rest)
        fits = (-1, *[1] * rest)
        bias = shift.view(fits) if self.bias is None else self.bias * scale.view(fits) + shift.view(fits)
        return Linear(self.call, self.weight * scale.view(shape), bias, self.conv)


@dataclass
class Side:
    """What accompanies the picture up to the first layer, in the shape the picture has there.

    grain: zeros that collect relevance; inside: 1 where there is picture, 0 in padding; low, high: the picture's range
    """

    grain: torch.Tensor
    inside: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    def map(self, moved: Callable[[torch.Tensor], torch.Tensor]) -> Side:
        return Side(moved(self.grain), moved(self.inside), moved(self.low), moved(self.high))


class Op:
    """One operation of the run, as a rule sees it.

    name, layer: what it is and what it is called
    inputs:      those of its operands that descend from the network's input and have not been made constant
    baseline:    the same operands when the network was run on the baseline; None without one
    multiplier:  G at the output, on the way back
    side:        at the first layer, what accompanies the picture
    """

    def __init__(self, node: Node, func: Callable, args: tuple, kwargs: dict, rules: Rules):
        self.name = node.op
        self.layer = node.name
        self.node = node
        self.func = func
        self.rules = rules
        self.inputs: list[torch.Tensor] = []
        self.refs: list[Ref] = []
        self.baseline: list[torch.Tensor] | None = None
        self.multiplier: torch.Tensor = torch.empty(0)
        self.side: Side | None = None
        self.last = False
        self.unseen = False  # it reads what no watched operation made, and which has a graph all the same
        self.folded: tuple[torch.Tensor, torch.Tensor] | None = None  # scale and shift of the batch norm behind it
        self.slots: list[int] = []  # where, among all tensors of the call, the inputs stand
        self._count = 0
        self.args = tuple(self._held(a, f) for a, f in _pairs(args, node.args))
        self.kwargs = {k: self._held(a, node.kwargs.get(k)) for k, a in kwargs.items()}

    def _held(self, value: Any, frozen: Any) -> Any:
        """The value with slots for what descends from the input, and all else without a graph."""
        if isinstance(value, torch.Tensor):
            self._count += 1
            if not value.requires_grad:
                return value
            if not isinstance(frozen, Ref):
                self.unseen |= not value.is_leaf
                return value.detach()
            self.inputs.append(value)
            self.refs.append(frozen)
            self.slots.append(self._count - 1)
            return _Slot(len(self.inputs) - 1)
        if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
            return observer.like(value, [self._held(v, f) for v, f in _pairs(value, frozen)])
        if isinstance(value, dict):
            given = frozen if isinstance(frozen, dict) else {}
            return {k: self._held(v, given.get(k)) for k, v in value.items()}
        return value

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """An argument, by position or name."""
        value = self.args[position] if position < len(self.args) else self.kwargs.get(name, default)
        return filled(value, self.inputs)

    def varies(self, position: int, name: str) -> bool:
        """Whether that argument is one of the inputs."""
        value = self.args[position] if position < len(self.args) else self.kwargs.get(name)
        return isinstance(value, _Slot)

    def weighs(self, position: int, name: str) -> bool:
        """Whether that argument is a weight: a tensor that never descended from the input."""
        value = self.args[position] if position < len(self.args) else self.kwargs.get(name)
        frozen = self.node.args[position] if position < len(self.args) else self.node.kwargs.get(name)
        return isinstance(value, torch.Tensor) and isinstance(frozen, Const)

    def __call__(self, *inputs: torch.Tensor, put: Mapping[int | str, Any] | None = None) -> torch.Tensor:
        """The operation on other inputs, perhaps with other arguments; its first tensor, if it returns several."""
        tensor = observer.first_tensor(self.outputs(*inputs, put=put))
        assert tensor is not None
        return tensor

    def outputs(self, *inputs: torch.Tensor, put: Mapping[int | str, Any] | None = None) -> Any:
        """All that the operation returns on other inputs."""
        put = put or {}
        args = [put.get(i, filled(a, inputs)) for i, a in enumerate(self.args)]
        kwargs = {k: put.get(k, filled(a, inputs)) for k, a in self.kwargs.items()}
        if self.node.inplace:
            target = observer.written(observer.raw_name(self.func), tuple(args), kwargs)
            fresh = None if target is None else target.clone()
            args = [fresh if a is target else a for a in args]
            kwargs = {k: fresh if a is target else a for k, a in kwargs.items()}
            out = self.func(*args, **kwargs)
            return fresh if out is None else out
        return self.func(*args, **kwargs)

    @property
    def output(self) -> torch.Tensor:
        """The value the operation has on its inputs; no gradient passes through it."""
        with torch.no_grad():
            folded = self.linear if self.folded is not None else None
            return self(*self.inputs) if folded is None else folded(self.inputs[0])

    @property
    def linear(self) -> Linear | None:
        """The operation as a linear map of its one input, if it is one and its weights are weights."""
        found = _linear(self)  # made anew each time: kept, it and the operation would hold each other
        if found is None or self.folded is None:
            return found
        return found.scaled(*self.folded, transposed="transpose" in self.name)


def _pairs(values: Sequence, frozen: Any) -> Iterator[tuple[Any, Any]]:
    known = frozen if isinstance(frozen, (tuple, list)) and len(frozen) == len(values) else [None] * len(values)
    return zip(values, known, strict=True)


def filled(value: Any, inputs: Sequence[torch.Tensor]) -> Any:
    if isinstance(value, _Slot):
        return inputs[value.index]
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        return observer.like(value, [filled(v, inputs) for v in value])
    if isinstance(value, dict):
        return {k: filled(v, inputs) for k, v in value.items()}
    return value


# -- linear maps

CONVOLUTIONS = frozenset("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split())
PRODUCTS = frozenset("linear matmul mm bmm einsum addmm".split())


def _linear(op: Op) -> Linear | None:
    if len(op.inputs) != 1:
        return None
    if op.name in CONVOLUTIONS or op.name == "linear":
        return _layer(op)
    if op.name in ("matmul", "mm", "bmm"):
        name = "other" if op.name == "matmul" else "mat2"
        weight: int | str = 1 if op.varies(0, "input") else 0
        if not op.weighs(int(weight), name if weight else "input"):
            return None
        weight = weight if int(weight) < len(op.args) else name
        return _product(op, weight, None)
    if op.name == "einsum" and len(op.args) == 3 and all(op.varies(i, "") or op.weighs(i, "") for i in (1, 2)):
        return _product(op, 2 if op.varies(1, "") else 1, None)
    if op.name == "addmm" and op.varies(1, "mat1") and op.weighs(0, "input") and op.weighs(2, "mat2"):
        scale, share = op.arg(9, "alpha", 1), op.arg(9, "beta", 1)
        return Linear(lambda x, w: scale * torch.mm(x, w), op.arg(2, "mat2"), share * op.arg(0, "input"), False)
    return None


def _layer(op: Op) -> Linear | None:
    if not op.varies(0, "input") or not isinstance(op.arg(1, "weight"), torch.Tensor):
        return None
    weight, bias, conv = op.arg(1, "weight"), op.arg(2, "bias"), op.name != "linear"
    if bias is not None and conv:
        bias = bias.view(-1, *[1] * (weight.dim() - 2))
    w = 1 if len(op.args) > 1 else "weight"
    b = 2 if len(op.args) > 2 else "bias"
    return Linear(lambda x, weight: op(x, put={w: weight, b: None}), weight, bias, conv)


def _product(op: Op, weight: int | str, bias: torch.Tensor | None) -> Linear:
    given = op.args[weight] if isinstance(weight, int) else op.kwargs[weight]
    return Linear(lambda x, w: op(x, put={weight: w}), given, bias, False)


def linear_map(op: Op) -> Way | Surrogate:
    """The entry of convolutions and products: which rule depends on where the layer stands and what it is."""
    if op.linear is None:
        return _chosen(op.rules.table["mul"], op)  # two signals, or a signal and what the picture made constant
    rules = op.rules
    if op.side is not None and rules.first is not None:
        return _chosen(rules.first, op)
    if op.last and rules.last is not None:
        return _chosen(rules.last, op)
    return _chosen(rules.conv if op.linear.conv else rules.dense, op)


def _chosen(entry: Entry, op: Op) -> Way | Surrogate:
    return entry if isinstance(entry, (Way, Surrogate)) else entry(op)


@dataclass(frozen=True)
class Statistics:
    """The arguments of a batch norm; `fixed`, if it uses the statistics it was trained with."""

    mean: Any
    var: Any
    weight: Any
    bias: Any
    eps: float
    fixed: bool


def statistics(func: Callable, args: Sequence, kwargs: Mapping[str, Any]) -> Statistics:
    names = "mean var weight bias training momentum eps".split()
    if func is not F.batch_norm:  # torch.batch_norm and aten's
        names = "weight bias mean var training momentum eps".split()
    given = dict(zip(names, args[1:], strict=False))
    given |= {k.removeprefix("running_"): v for k, v in kwargs.items()}
    mean, training = given.get("mean"), given.get("training", False)
    fixed = mean is not None and training is False
    return Statistics(mean, given.get("var"), given.get("weight"), given.get("bias"), given.get("eps", 1e-5), fixed)


def affine_of(norm: Statistics) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch norm with fixed statistics as a scale and a shift for each channel."""
    scale = (norm.var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias
