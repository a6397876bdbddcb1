"""How an ONNX file becomes a graph of steps: constants worked out, shapes out of sight, each operator left a layer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from innersight import errors
from innersight.formats import Quantised
from innersight.formats import onnx_limits as limits
from innersight.formats.graph import Graph, Step
from innersight.formats.onnx_file import Body, File, captured
from innersight.formats.onnx_fusion import fused
from innersight.formats.onnx_operators import CONTRIB, HOST, OPERATORS, SCALAR, Node, constant, numbers, refuse
from innersight.formats.onnx_picture import WHOLE, Picture
from innersight.formats.onnx_quantised import BUILDERS, PASSING, Built, Grid, behind, dequantised
from innersight.formats.onnx_trial import within

MAX_TRIPS = 4096
"""Times that a Loop may go round."""

_LOOSE = frozenset("NonZero Compress NonMaxSuppression Loop If Unique Range".split())
_RANDOM = frozenset("RandomNormal RandomUniform RandomNormalLike RandomUniformLike Bernoulli Multinomial".split())
_CONTROL = frozenset({"If", "Loop"})
_AFTER_SCORES = frozenset(
    "DequantizeLinear QuantizeLinear Softmax Sigmoid QLinearSoftmax QLinearSigmoid LogSoftmax Cast".split()
)
_ROUNDS = "rounds of loops\0"  # no name that a file can use for a value


class Plan:
    """Sorts a file's values into three kinds, and makes steps of the nodes that are left.

    A constant is worked out here. What depends on shapes alone ("shape") is run unseen, once an input shape. The rest
    are the layers.
    """

    def __init__(self, file: File, picture: Picture | None = None):
        self.file = file
        self.constants: dict[str, Any] = dict(file.weights)
        self.shapes: set[str] = set()
        self.loose: set[str] = set()  # values whose size depends on values
        self.used: dict[Hashable, torch.Tensor] = {}
        self.grids: dict[str, Grid] = {}  # of values that the file keeps as integers
        self.on: dict[str, Grid] = {}  # of floats that a DequantizeLinear made
        self.held: dict[str, tuple[Any, Any, Any]] = {}  # weights: their integers, scales and zero points
        self.makers: dict[str, Node] = {}
        self.nodes: dict[str, Node] = {}
        self.steps: list[Step] = []
        self.notes: list[str] = []
        self.quantised: dict[str, Quantised] = {}
        self.outputs = self.scores(file)
        self.input = picture.name if picture else (file.inputs[0].name if file.inputs else "")
        self.batch = picture.batch if picture else None
        self.last = picture is not None and picture.last
        self.whole = picture is not None and picture.type in WHOLE
        for n in file.nodes:
            supported(n)

    def graph(self) -> Graph:
        nodes = list(self.file.nodes)
        source = self.input
        if self.last:
            source = f"{self.input} as (N, C, H, W)"
            nodes = self.turned(nodes, source)
        self.reference = source
        if self.whole and (found := self.input_grid(nodes, source)) is not None:
            self.grids[source] = self.grids[self.input] = found
        for n in nodes:
            n.batch = self.batch
        self.mark_scores(nodes)
        left = [n for n in nodes if not self.done(n, self.fold)]
        for n in fused(left, self.constants, self.outputs):
            self.done(n, self.add)
        for name in self.outputs:
            if name in self.constants:
                self.used[name] = self.constants[name]
        return Graph(self.steps, source, self.outputs, self.used)

    def stored(self, name: Any, value: Any) -> Any:
        """A value as the file keeps it."""
        return self.grids[name].integers(value) if name in self.grids else value

    @property
    def stepped(self) -> bool:
        """Whether floats are brought to integers between layers (QDQ), where two ways of adding up may part."""
        return any(step.kind == "QuantizeLinear" for step in self.steps)

    def said(self) -> list[str]:
        if not self.quantised:
            return []
        notes = ["it is quantised; layers are shown as the real numbers that its integers stand for"]
        if sum(step.kind == "QuantizeLinear" for step in self.steps) > 1:
            notes.append(
                "it is quantised by QuantizeLinear and DequantizeLinear around float operators; an integer may be one "
                "step off ONNX Runtime's and others with it, as with and without its own optimizations"
            )
        return notes

    def turned(self, nodes: list[Node], source: str) -> list[Node]:
        """Feed the file, which has its channels last, with pictures that have them first."""
        readers = [n for n in nodes if self.input in n.inputs or self.input in captured(n)]
        if all(n.op == "Transpose" and n.get("perm") == [0, 3, 1, 2] for n in readers):
            for n in readers:  # which is what they do themselves
                n.op, n.inputs = "Identity", (source,)
            return nodes
        turn = Node(
            f"{self.input} (channels last)", "Transpose", "", (source,), (self.input,), {"perm": [0, 2, 3, 1]}, 13
        )
        return [turn, *nodes]

    def scores(self, file: File) -> list[str]:
        """The outputs, numbers of classes replaced by the scores that they were chosen by."""
        made = {o: n for n in file.nodes for o in n.outputs}
        outputs = []
        for name in file.outputs:
            n = made.get(name)
            while n is not None and n.op in ("Cast", "Squeeze", "Identity") and n.inputs[0] in made:
                n = made[n.inputs[0]]
            if n is not None and n.op == "ArgMax" and not n.domain:
                self.notes.append(f"it answers with the number of a class ({name}); the scores before it are shown")
                name = n.inputs[0]
            if name not in outputs:
                outputs.append(name)
        return outputs

    def mark_scores(self, nodes: list[Node]) -> None:
        """Tell the nodes that make the answer, and those in front of a softmax or the like behind them."""
        behind_scores = set(self.outputs)
        for n in reversed(nodes):
            if behind_scores & set(n.outputs):
                n.attributes["scores"] = 1
                if n.op in PASSING or n.op in _AFTER_SCORES:
                    behind_scores.update(n.inputs[:1])

    def input_grid(self, nodes: list[Node], source: str) -> Grid | None:
        """What the integers of the input stand for: what their first reader takes them to be."""
        same = {source}
        for n in nodes:
            if n.inputs and n.inputs[0] in same and n.op in PASSING:
                same.add(n.outputs[0])
            elif same & set(n.inputs) and (built := self.built(n)) is not None:
                return next((g for p, g in zip(built.data, built.grids, strict=True) if n.inputs[p] in same), None)
        return None

    # -- one node

    def built(self, n: Node) -> Built | None:
        """A node of quantised values as a step; None for any other."""
        constants = [self.constants.get(i) if i else None for i in n.inputs]
        types = [self.file.types.get(i) for i in n.inputs]
        if n.key in BUILDERS:
            return BUILDERS[n.key](n, constants, types)
        return dequantised(n, constants, types) if n.op == "DequantizeLinear" else None

    def add_built(self, n: Node, built: Built) -> None:
        keys: list[str] = []
        turns: list[Callable[[torch.Tensor], torch.Tensor] | None] = []
        for p, wanted in zip(built.data, built.grids, strict=True):
            name = n.inputs[p]
            have = self.grids.get(name)
            turn: Callable[[torch.Tensor], torch.Tensor] | None = None
            if name in self.constants:
                key = f"{name} for {n.outputs[0]}"
                self.used[key] = wanted.real(self.constants[name]) if wanted else real(self.constants[name])
                keys.append(key)
            else:
                keys.append(name)
                if have is not None and (wanted is None or not have.same(wanted)):
                    turn = have.raw if wanted is None else _between(have, wanted)
                elif have is None and wanted is not None:
                    turn = wanted.from_raw
            turns.append(turn)
        for i, w in enumerate(built.weights):
            key = f"{n.outputs[0]} weight {i}"
            self.used[key] = w
            keys.append(key)
        call = built.call
        if any(turns):

            def call(*values: Any) -> Any:
                turned = [v if t is None else t(v) for t, v in zip(turns, values, strict=False)]
                return built.call(*turned, *values[len(turns) :])

        if built.grid is None and n.op == "DequantizeLinear" and built.grids[0] is not None:
            self.on[n.outputs[0]] = built.grids[0]
        if built.grid is not None and (sums := self.sums(n, built.grid)) is not None:
            built, given = sums
            for i, w in enumerate(built.weights):
                self.used[f"{n.outputs[0]} weight {i}"] = w
            keys, call = [*given, *(f"{n.outputs[0]} weight {i}" for i in range(len(built.weights)))], built.call
        if built.grid is not None:
            self.grids[n.outputs[0]] = built.grid
            self.quantised[n.name] = built.grid.described()
        self.steps.append(Step(n.name, n.op, call, tuple(keys), (n.outputs[0],)))

    def sums(self, n: Node, out: Grid) -> tuple[Built, list[str]] | None:
        """A QuantizeLinear by the integer sums of the node whose floats it reads; and what it then reads."""
        m = self.makers.get(n.inputs[0]) if n.op == "QuantizeLinear" else None
        relu = m is not None and m.op == "Relu"
        m = self.makers.get(m.inputs[0]) if m is not None and relu else m
        if m is None or m.domain or m.op not in ("Conv", "Gemm", "MatMul", "GlobalAveragePool"):
            return None
        x = self.on.get(m.inputs[0])
        if x is None or "scaled" in m.attributes:
            return None
        bias = None
        if len(m.inputs) > 2 and m.inputs[2]:
            if m.inputs[2] not in self.held:
                return None
            bias = self.held[m.inputs[2]][0].flatten()
        held = self.held.get(m.inputs[1]) if len(m.inputs) > 1 else None
        made = behind(m, x, out, held, bias, relu)
        return None if made is None else (made, [n.inputs[0], m.inputs[0]])

    def passed(self, n: Node) -> Grid | None:
        """The grid that a node's inputs and outputs share, if it only moves or chooses values."""
        if n.op not in PASSING or n.domain or n.inputs[0] not in self.grids:
            return None
        shared = self.grids[n.inputs[0]]
        if n.op == "Concat":
            others = [self.grids.get(i) for i in n.inputs if i not in self.constants]
            if any(g is None or not g.same(shared) for g in others):
                return None
        outputs = n.outputs if n.op == "Split" else () if n.op in ("ArgMax", "ArgMin") else n.outputs[:1]
        self.grids.update((o, shared) for o in outputs if o)
        return shared

    def done(self, n: Node, act: Callable[[Node], bool | None]) -> bool:
        """What `act` says; an error in it names the node and the file."""
        try:
            return bool(act(n))
        except errors.InnersightError as error:
            raise type(error)(_in_file(error, self.file.name)) from error
        except Exception as error:  # whatever inputs or attributes that make no sense lead to
            said = first_line(error)
            raise errors.InputError(f"{n.op} {n.name!r} in {self.file.name} cannot be set up: {said}") from error

    def add(self, n: Node) -> None:
        reads = [i for i in (*n.inputs, *sorted(captured(n))) if i]
        kind_shape = n.op in ("Shape", "Size") or all(i in self.constants or i in self.shapes for i in reads)
        host = HOST.get(n.key, ())
        layers = [i for i in reads if i not in self.constants and i not in self.shapes]
        by_value = any(n.inputs[p] in layers for p in host if p < len(n.inputs) and n.inputs[p])
        if (n.op in _LOOSE and not kind_shape) or by_value or any(i in self.loose for i in reads):
            self.loose.update(filter(None, n.outputs))
        if kind_shape:
            self.shapes.update(filter(None, n.outputs))
        self.makers[n.outputs[0]] = self.nodes[n.name] = n
        if not kind_shape and (built := self.built(n)) is not None:
            self.add_built(n, built)
            return
        if n.op in PASSING and n.op != "Pad" and len(layers) == 1 and n.inputs[0] in self.on:
            self.on.update((o, self.on[n.inputs[0]]) for o in n.outputs[: None if n.op == "Split" else 1])
        lasting = kind_shape and not any(i in self.loose for i in reads)
        self.steps.append(self.step(n, kind_shape, lasting))

    def fold(self, n: Node) -> bool:
        """Whether a node reads constants alone; then its values are constants as well."""
        if any(i not in self.constants for i in (*n.inputs, *captured(n)) if i):
            return False
        given = [self.constants[i] if i else None for i in n.inputs]
        with torch.no_grad():
            made = results(within(n, given, limits.MAX_CONSTANT, lambda: run(n, given, self.constants)))
        self.constants.update((name, value) for name, value in zip(n.outputs, made, strict=False) if name)
        if n.op == "DequantizeLinear":
            q, scale, zero = ([self.constants.get(i) for i in n.inputs] + [None])[:3]
            self.held[n.outputs[0]] = q, scale, zero
        return True

    def step(self, n: Node, unseen: bool, lasting: bool) -> Step:
        host = HOST.get(n.key, ())
        given: list[Any] = [None] * len(n.inputs)
        keys: list[str] = []
        places: list[int] = []
        beside: list[int] = []
        raws: dict[int, Grid] = {}
        shared = self.passed(n)
        prepared = {} if unseen else prepare(n, self.constants)
        for p, name in enumerate(n.inputs):
            if not name:
                continue
            if name in self.constants:
                value = prepared.get(p, self.constants[name])
                if shared is not None and n.op == "Concat":
                    value = shared.real(value)
                if p in host:
                    given[p] = numbers(value) if value.dim() else [value.item()]
                elif unseen:
                    given[p] = value
                elif n.op in SCALAR and not (n.op == "Pow" and p == 0) and _plain(value):
                    given[p] = value.item()
                else:
                    key = name if p not in prepared else f"{name} for {n.outputs[0]}"
                    self.used[key] = real(value)
                    keys.append(key)
                    places.append(p)
            else:
                keys.append(name)
                places.append(p)
                if name in self.shapes and p not in host and not unseen:
                    beside.append(p)
                if name in self.grids and shared is None and not unseen:
                    raws[p] = self.grids[name]
        if shared is not None and n.op == "Pad":
            _refilled(n, given, shared)
        if n.op in ("Cast", "CastLike") and not unseen:
            given += [None] * ((2 if n.op == "Cast" else 3) - len(given))
            keys.append(self.reference)
            places.append(len(given) - 1)
        within = [i for i in sorted(captured(n)) if i not in self.constants]
        call = _call(n, given, places, beside, within, self.constants, raws)
        return Step(n.name, n.op, call, (*keys, *within), tuple(o or (n.name, i) for i, o in enumerate(n.outputs)),
                    seen=not unseen, lasting=lasting)  # fmt: skip


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _in_file(error: Exception, name: str) -> str:
    said = str(error)
    return said if name in said else f"{name}: {said}"


def _between(have: Grid, wanted: Grid) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda v: wanted.from_raw(have.raw(v))


def _refilled(n: Node, given: list[Any], grid: Grid) -> None:
    """Let a Pad of integers fill with the value that its integer stands for."""
    stated = given[2][0] if len(given) > 2 and given[2] else n.get("value", 0)
    value = grid.step * (stated - grid.null)
    n.attributes["value"] = value
    if len(given) > 2:
        given[2] = [value]


def _plain(value: torch.Tensor) -> bool:
    return value.numel() == 1 and value.dim() <= 1 and value.dtype != torch.bool


def real(value: torch.Tensor) -> torch.Tensor:
    """The value as layers read it: there is one floating type."""
    return value.float() if value.is_floating_point() else value


def operators() -> tuple[list[str], list[str]]:
    """The operators that are known: ONNX's own, and those of `com.microsoft`."""
    own = {name for name in OPERATORS if ":" not in name} | {"Constant", *_CONTROL}
    return sorted(own), sorted(name.partition(":")[2] for name in OPERATORS if ":" in name)


def supported(n: Node) -> None:
    """Raises Unsupported for a node that is not known here."""
    if n.op in _RANDOM and n.domain == "":
        raise refuse(n, "is random; export the network for inference")
    if n.domain not in ("", CONTRIB):
        raise refuse(n, f"is from the domain {n.domain!r}, which is not part of ONNX and not supported")
    if n.key not in OPERATORS and n.op not in ("Constant", *_CONTROL):
        raise refuse(n, f"is an operator that is not supported{' (' + n.domain + ')' if n.domain else ''}")
    for value in n.attributes.values():
        if isinstance(value, Body):
            for inner in value.nodes:
                supported(inner)


def prepare(n: Node, constants: dict[str, Any]) -> dict[int, torch.Tensor]:
    """Constant inputs in another form: matrices as `F.linear` wants them."""
    values = [constants.get(i) if i else None for i in n.inputs]
    if n.key == "MatMul" and values[1] is not None and values[1].dim() == 2 and values[1].is_floating_point():
        n.attributes["turned"] = 1
        return {1: values[1].T.contiguous()}
    if n.key != "Gemm" or values[1] is None or not values[1].is_floating_point():
        return {}
    alpha, beta, made = n.get("alpha", 1.0), n.get("beta", 1.0), {}
    n.attributes["stored"] = n.get("transB", 0)
    if alpha != 1 or beta != 1:
        n.attributes["scaled"] = 1
    if not n.get("transB", 0) or alpha != 1:
        w = values[1] if n.get("transB", 0) else values[1].T
        made[1] = (w * alpha if alpha != 1 else w).contiguous()
    if beta != 1 and len(values) > 2 and values[2] is not None:
        made[2] = values[2] * beta
        n.attributes["beta"] = 1.0
    n.attributes |= {"transB": 1, "alpha": 1.0}
    return made


def _call(n: Node, given: list[Any], places: list[int], beside: list[int], within: list[str],
          constants: dict[str, Any], raws: dict[int, Grid]) -> Callable[..., Any]:  # fmt: skip
    """The node as a function of the values that it reads when it runs."""
    if n.op in _CONTROL and not n.domain:
        outer = {i: constants[i] for i in captured(n) if i in constants}

        def control(*values: Any) -> Any:
            args = list(given)
            for p, v in zip(places, values, strict=False):
                args[p] = v
            return _made(n, run(n, args, {**outer, **dict(zip(within, values[len(places) :], strict=True))}))

        return control
    function = OPERATORS[n.key]
    if not beside and not raws and places == list(range(len(given))):
        return lambda *values: _made(n, function(n, *values))

    def call(*values: Any) -> Any:
        args = list(given)
        for p, v in zip(places, values, strict=True):
            args[p] = v
        for p, grid in raws.items():
            args[p] = grid.raw(args[p])
        for p in beside:
            like = next((v for q, v in zip(places, values, strict=True) if q not in beside), args[p])
            args[p] = constant(args[p], like)
        return _made(n, function(n, *args))

    return call


# --- running a node --------------------------------------------------------------------------------------------------


def run(n: Node, args: Sequence[Any], outer: dict[str, Any]) -> Any:
    """What a node makes of its inputs; `outer` are the values that graphs within it may read."""
    if n.op == "Constant" and not n.domain:
        return _constant(n)
    if n.op == "If" and not n.domain:
        return _if(n, args[0], outer)
    if n.op == "Loop" and not n.domain:
        return _loop(n, args, outer)
    return OPERATORS[n.key](n, *args)


def results(made: Any) -> Sequence[Any]:
    return made if isinstance(made, (tuple, list)) else (made,)


def _made(n: Node, made: Any) -> Any:
    """What a step returns: one value, or as many as the node has outputs."""
    found = results(made)
    return found[0] if len(n.outputs) == 1 else tuple(found[: len(n.outputs)])


def _constant(n: Node) -> torch.Tensor:
    for key, kind in (("value_float", torch.float32), ("value_floats", torch.float32), ("value_int", torch.int64),
                      ("value_ints", torch.int64)):  # fmt: skip
        if key in n.attributes:
            return torch.tensor(n.attributes[key], dtype=kind)
    if "value" not in n.attributes:
        raise refuse(n, "holds no numbers, which is not supported")
    return n.attributes["value"]


def _if(n: Node, condition: torch.Tensor, outer: dict[str, Any]) -> Any:
    body = n.get("then_branch" if bool(numbers(condition)[0]) else "else_branch")
    return _body(body, {}, outer)


def _loop(n: Node, args: Sequence[Any], outer: dict[str, Any]) -> Any:
    body: Body = n.get("body")
    trips = None if args[0] is None else int(numbers(args[0])[0])
    going = args[1] is None or bool(numbers(args[1])[0])
    carried = list(args[2:])
    scans: list[list[torch.Tensor]] = [[] for _ in range(len(body.outputs) - 1 - len(carried))]
    trip = 0
    rounds: list[int] = outer.setdefault(_ROUNDS, [0])  # of all loops around this one as well
    while going and (trips is None or trip < trips):
        rounds[0] += 1
        if rounds[0] > MAX_TRIPS:
            raise refuse(n, f"goes round more than {MAX_TRIPS} times")
        given = [torch.tensor(trip), torch.tensor(going), *carried]
        made = _body(body, dict(zip(body.inputs, given, strict=True)), outer)
        going = bool(numbers(made[0])[0])
        carried = list(made[1 : 1 + len(carried)])
        for scan, value in zip(scans, made[1 + len(carried) :], strict=True):
            scan.append(value)
        trip += 1
    if any(not scan for scan in scans):
        raise refuse(n, "never goes round, so what it gathers has no size")
    return (*carried, *(torch.stack(scan) for scan in scans))


def _body(body: Body, inputs: dict[str, Any], outer: dict[str, Any]) -> list[Any]:
    values = {**outer, **body.weights, **inputs}
    for n in body.nodes:
        made = run(n, [values[i] if i else None for i in n.inputs], values)
        values.update((name, v) for name, v in zip(n.outputs, results(made), strict=False) if name)
    return [values[o] for o in body.outputs]
