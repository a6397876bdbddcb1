"""ONNX files (`.onnx`), run by torch: each node is the layer of its name, and can be watched, changed and explained.

    net = innersight.open("model.onnx")

Constants and the arithmetic of shapes are worked out when the file is opened, or once for each input shape, and are no
layers. What remains are the operators of `onnx_operators.py`, one a layer. Where ONNX Runtime is installed its answer
is compared on opening; `agreement` compares every value of a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from innersight import errors
from innersight.formats import Opened, Quantised
from innersight.formats import onnx_limits as limits
from innersight.formats.graph import Graph, Step
from innersight.formats.onnx_file import Body, File, captured, literal, parse, read
from innersight.formats.onnx_fusion import fused
from innersight.formats.onnx_operators import (
    CONTRIB,
    HOST,
    OPERATORS,
    SCALAR,
    Node,
    constant,
    numbers,
    refuse,
)
from innersight.formats.onnx_quantised import BUILDERS, PASSING, Built, Grid, behind, dequantised
from innersight.formats.onnx_trial import limited_run, within
from innersight.preprocess import Preprocess

MAX_TRIPS = 4096
"""Times that a Loop may go round."""
MAX_COMPARED = 1 << 28
"""Bytes of a file up to which ONNX Runtime is asked on opening."""

_LOOSE = frozenset("NonZero Compress NonMaxSuppression Loop If Unique Range".split())
_RANDOM = frozenset("RandomNormal RandomUniform RandomNormalLike RandomUniformLike Bernoulli Multinomial".split())
_CONTROL = frozenset({"If", "Loop"})
_AFTER_SCORES = frozenset(
    "DequantizeLinear QuantizeLinear Softmax Sigmoid QLinearSoftmax QLinearSigmoid LogSoftmax Cast".split()
)
_ROUNDS = "rounds of loops\0"  # no name that a file can use for a value


def open_onnx(source: Path | bytes | Any) -> Opened:
    """An ONNX file by its path, its bytes, or an `onnx.ModelProto`.

    The module takes (N, C, H, W) floats, also for a file that wants its channels last, and answers what the file's
    outputs are. Whole batches are run where the file is right with them, which is tried; otherwise one at a time.

    Raises InputError for a damaged file or one that asks for too much, Unsupported for operators and inputs that are
    not known here, MissingPackage without the `onnx` package. Each is one sentence.
    """
    file = read(source)
    picture, notes = _picture(file)
    plan = Plan(file, picture)
    graph = plan.graph()
    picture = replace(picture, grid=plan.grids.get(picture.name))
    shape, output, more = _tried(graph, plan.nodes, file, picture)
    notes += file.notes + plan.notes + more
    fixed, batch_notes = _batches(graph, picture, shape, output, plan.nodes if plan.loose else None)
    notes += batch_notes
    preprocess, labels, told = _told(file, picture, shape, plan.constants)
    notes += told
    if len(graph.outputs) > 1:
        notes.append(
            f"it answers {len(graph.outputs)} values ({', '.join(map(str, graph.outputs))}); output= picks one"
        )
    notes += plan.said()
    stored = {str(k): plan.stored(k, v) for k, v in zip(graph.outputs, output, strict=True) if k in file.outputs}
    notes += _compared(source, picture, _noise(picture, shape), stored, plan.stepped)
    graph.known.clear()
    opened = Opened(graph, file.name, shape, preprocess, labels, notes, fixed_batch=fixed)
    opened.quantisation = plan.quantised or None
    return opened


# --- the input -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """The input of a file: its name, its sizes as (N, C, H, W), and whether the file has the channels last."""

    name: str
    type: int
    batch: int | None
    sizes: tuple[int | None, int | None, int | None]
    last: bool
    grid: Grid | None = None


_REAL = {1: "float32", 10: "float16", 11: "float64", 16: "bfloat16"}
_WHOLE = {2: (0, 255), 3: (-128, 127), 4: (0, 65535), 5: (-32768, 32767), 6: (0, 255), 7: (0, 255)}


def _picture(file: File) -> tuple[Picture, list[str]]:
    used = {i for n in file.nodes for i in (*n.inputs, *captured(n))} | set(file.outputs)
    inputs = [i for i in file.inputs if i.name in used]
    if len(inputs) != 1:
        names = ", ".join(i.name for i in inputs) or "none"
        raise errors.Unsupported(
            f"{file.name} takes {len(inputs)} inputs ({names}); innersight explains networks of one image input"
        )
    found = inputs[0]
    if found.type not in _REAL and found.type not in _WHOLE:
        raise errors.Unsupported(f"the input {found.name!r} of {file.name} holds no numbers that a picture has")
    if found.shape is not None and len(found.shape) != 4:
        raise errors.Unsupported(
            f"the input {found.name!r} of {file.name} has {len(found.shape)} dimensions; "
            "innersight explains networks of one image input, (N, C, H, W) or (N, H, W, C)"
        )
    batch, *sizes = found.shape or (None, None, None, None)
    last = sizes[2] in (1, 3, 4) and sizes[0] not in (1, 3, 4)
    if last:
        sizes = [sizes[2], sizes[0], sizes[1]]
    notes = []
    if last:
        notes.append("its input has the channels last; pictures go in as (N, C, H, W) all the same and are turned")
    if found.type in _REAL and found.type != 1:
        notes.append(f"its input is declared {_REAL[found.type]}; it is run in float32")
    return Picture(found.name, found.type, batch, tuple(sizes), last), notes  # type: ignore[arg-type]


def _noise(picture: Picture, shape: Sequence[int], count: int = 1, seed: int = 0) -> torch.Tensor:
    """Inputs of noise, in whole numbers where the file wants those."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((count, *shape), generator=generator)
    if picture.type in _WHOLE:
        low, high = (max(v, -255) if v < 0 else min(v, 255) for v in _WHOLE[picture.type])
        x = (torch.sigmoid(x) * (high - low) + low).round()
        x = x if picture.grid is None else picture.grid.real(x)
    return x


_SIDES = (224, 32, 28, 64, 96, 128, 160, 192, 256, 299, 320, 384, 416, 512, 640)


def _tried(
    graph: Graph, nodes: dict[str, Node], file: File, picture: Picture
) -> tuple[tuple[int, int, int], tuple, list[str]]:
    """The input shape with which the file runs, what it answered, and what was assumed."""
    channels, height, width = picture.sizes
    notes = []
    count = picture.batch or 1
    wanted = [channels] if channels else [_channels(file, picture.name) or 3]
    if not channels and wanted[0] == 3:
        wanted.append(1)
    tries = [
        (c, height or side, width or side) for c in wanted for side in (_SIDES if not (height and width) else (0,))
    ]
    problem: Exception | None = None
    for shape in tries:
        try:
            output = limited_run(graph, nodes, _noise(picture, shape, count))
        except errors.InnersightError as error:
            raise type(error)(f"{file.name} cannot be run: {error}") from error
        except (RuntimeError, MemoryError) as error:
            problem = problem or error
            continue
        if None in picture.sizes:
            notes.append(f"the file leaves its input's size open; {shape} is assumed, input_shape= says another")
        return shape, output, notes
    said = "not enough memory" if problem is None else _first_line(problem)
    raise errors.InputError(f"{file.name} cannot be run on its own input shape {tries[0]}: {said}") from problem


def _channels(file: File, name: str) -> int | None:
    for n in file.nodes:
        if n.op == "Conv" and n.inputs[0] == name and n.inputs[1] in file.weights:
            w = file.weights[n.inputs[1]]
            return w.shape[1] * n.get("group", 1) if w.dim() > 1 else None
    return None


def _batches(
    graph: Graph, picture: Picture, shape: tuple[int, ...], single: tuple, nodes: dict[str, Node] | None
) -> tuple[int | None, list[str]]:
    """The only batch size, if there is one, and what to say of it: two pictures together must be as each alone."""
    if picture.batch not in (None, 1):
        return picture.batch, [f"the file was written for batches of {picture.batch}, so pictures go through it so"]
    x = torch.cat([_noise(picture, shape), _noise(picture, shape, seed=1)])

    def run(x: torch.Tensor) -> dict[Any, Any]:
        return graph.run(x) if nodes is None else dict(zip(graph.outputs, limited_run(graph, nodes, x), strict=True))

    written = "the file was written for one picture at a time" if picture.batch else "its answers depend on the batch"
    alone = [f"{written} and is run so"]
    try:
        with torch.no_grad():
            second, both = run(x[1:]), run(x)
    except Exception:
        return 1, alone
    for key, first in zip(graph.outputs, single, strict=True):
        together = both[key]
        if not isinstance(together, torch.Tensor) or together.dim() == 0 or together.shape[0] != 2 * first.shape[0]:
            return 1, alone
        if not _near(together, torch.cat([first, second[key]])):
            return 1, alone
    if picture.batch:
        return None, ["the file was written for one picture at a time; it runs in batches, which was found to be equal"]
    return None, []


def _near(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> bool:
    if a.shape != b.shape:
        return False
    return difference(a.double().numpy(), b.double().numpy()) <= tolerance


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """max|a - b| / max|b|; what is not finite has to stand in the same places."""
    if a.shape != b.shape:
        return math.inf
    a, b = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(b)
    if not np.array_equal(np.where(finite, 0, b), np.where(finite, 0, a), equal_nan=True):
        return math.inf
    a, b = a[finite], b[finite]
    return float(np.abs(a - b).max(initial=0) / max(np.abs(b).max(initial=0), 1e-30))


def _told(
    file: File, picture: Picture, shape: tuple[int, ...], constants: dict[str, Any]
) -> tuple[Preprocess | None, list[str] | None, list[str]]:
    """Preprocessing and labels, as far as the file says, and what is assumed."""
    notes = []
    labels = None
    for key in ("classes", "names", "labels", "classlabels_strings", "class_names"):
        if key in file.metadata and (labels := _labels(file.metadata[key])):
            notes.append(f"{len(labels)} labels from the file's metadata ({key})")
            break
    if shape[0] not in (1, 3):
        return None, labels, notes
    stated = Preprocess.for_shape(shape)
    said = {k.rpartition(".")[2]: v for k, v in file.metadata.items()}
    if "BitmapPixelFormat" in said or "NominalPixelRange" in said:
        bgr = said.get("BitmapPixelFormat", "").lower().startswith("bgr") and shape[0] == 3
        wide = "255" in said.get("NominalPixelRange", "")
        stated = replace(stated, channels="BGR" if bgr else stated.channels, scale=1.0 if wide else 1 / 255)
        notes.append(f"pictures are prepared as the file's metadata says: {stated.describe()}")
        return stated, labels, notes
    first, wide = _scaled_first(file, picture.name, constants)
    if picture.grid is not None:
        stated, why = _of_grid(stated, picture.grid), "as its input's integers stand for"
    elif picture.type in _WHOLE:
        low = -128.0 if picture.type == 3 else 0.0
        stated, why = replace(stated, scale=1.0, mean=(-low,)), "since its input is whole numbers"
    elif wide:
        stated, why = replace(stated, scale=1.0), f"since the file itself goes on with {first}"
    else:
        why = f"though the file itself goes on with {first}" if first else "without mean and std"
    values = stated.describe().rpartition("; ")[2]
    notes.append(
        f"the file does not say how its pictures are prepared; {values} are assumed, {why}; preprocess= says another"
    )
    return stated, labels, notes


def _scaled_first(file: File, name: str, constants: dict[str, Any]) -> tuple[str, bool]:
    """What shifts or scales the input first, if something does, and whether its numbers are those of pixels 0..255."""
    names = {name}
    for n in file.nodes:
        if not names & set(n.inputs):
            continue
        if n.op in ("Identity", "Transpose", "Cast"):
            names.add(n.outputs[0])
            continue
        by = [constants[i] for i in n.inputs if i in constants and constants[i].is_floating_point()]
        if n.op not in ("Sub", "Add", "Mul", "Div") or not by or not by[0].numel():
            return "", False
        size = float(by[0].abs().max())
        wide = size >= 16 if n.op in ("Sub", "Div", "Add") else size <= 1 / 16
        return f"{n.op} {n.name!r}", wide
    return "", False


def _of_grid(stated: Preprocess, grid: Grid) -> Preprocess:
    """Pictures for an input whose integers stand for 0..255, -1..1 or (by default) 0..1."""
    low, high = (grid.step * (end - grid.null) for end in (grid.lo, grid.hi))
    if high > 128:
        return replace(stated, scale=1.0)
    return replace(stated, scale=1 / 127.5, mean=(1.0,)) if low < -0.5 and high < 1.5 else stated


def _labels(text: str) -> list[str] | None:
    if not text.lstrip().startswith(("{", "[", "(")):
        names = text.split(",") if "," in text else text.splitlines()
        return [name.strip() for name in names] if len(names) > 1 else None
    try:
        found = literal(text, object)
    except ValueError:
        return None
    if isinstance(found, dict) and all(isinstance(k, int) and 0 <= k < 1 << 20 for k in found):
        return [str(found.get(i, i)) for i in range(max(found, default=-1) + 1)]
    return [str(v) for v in found] if isinstance(found, (list, tuple)) else None


# --- the plan --------------------------------------------------------------------------------------------------------


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
        self.whole = picture is not None and picture.type in _WHOLE
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
                "it is quantised by QuantizeLinear and DequantizeLinear around float operators; its integers may be "
                "one step off ONNX Runtime's, which differ as much with and without its optimizations"
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
            said = _first_line(error)
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
            made = _results(within(n, given, limits.MAX_CONSTANT, lambda: run(n, given, self.constants)))
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


def _first_line(error: BaseException) -> str:
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


def _results(made: Any) -> Sequence[Any]:
    return made if isinstance(made, (tuple, list)) else (made,)


def _made(n: Node, made: Any) -> Any:
    """What a step returns: one value, or as many as the node has outputs."""
    found = _results(made)
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
        values.update((name, v) for name, v in zip(n.outputs, _results(made), strict=False) if name)
    return [values[o] for o in body.outputs]


# --- ONNX Runtime ----------------------------------------------------------------------------------------------------


def _session(model: Any, folder: Path | None, optimised: bool = True) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _fed(picture: Picture, x: torch.Tensor) -> np.ndarray:
    kinds = {1: np.float32, 10: np.float16, 11: np.float64, 2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16,
             6: np.int32, 7: np.int64}  # fmt: skip
    x = x if picture.grid is None else picture.grid.integers(x)
    array = (x.permute(0, 2, 3, 1) if picture.last else x).contiguous().numpy()
    return array.astype(kinds[picture.type])


def _compared(source: Any, picture: Picture, x: torch.Tensor, output: dict[str, Any], stepped: bool) -> list[str]:
    """What ONNX Runtime says to the same noise, in a sentence."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        return ["ONNX Runtime is not installed, so its answers were not compared"]
    if picture.type == 16 or not output:
        return ["its answers were not compared with ONNX Runtime"]
    model, _name, folder = (source, "", None) if isinstance(source, (bytes, bytearray)) else _bytes(source)
    size = len(model)
    if size > MAX_COMPARED:
        return [f"at {size / 2**20:.0f} MiB it was not compared with ONNX Runtime; onnx.agreement(path) does"]
    try:
        x = x if picture.batch is None or picture.batch == len(x) else _noise(picture, x.shape[1:], picture.batch)
        answers = _session(bytes(model), folder).run(list(output), {picture.name: _fed(picture, x)})
        worst = max(difference(o.double().numpy(), a) for o, a in zip(output.values(), answers, strict=True))
    except Exception as error:
        said = _first_line(error)
        return [f"ONNX Runtime could not run it, so its answers were not compared ({said[:120]})"]
    if worst == 0:
        return ["agrees with ONNX Runtime to the last bit"]
    if worst <= (5e-2 if stepped else 1e-3):
        return [f"agrees with ONNX Runtime within {worst:.0e} of the largest output"]
    return [f"differs from ONNX Runtime by {worst:.0e} of the largest output on noise: take its answers with care"]


def _bytes(source: Any) -> tuple[bytes, str, Path | None]:
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        return path.read_bytes(), path.name, path.parent.resolve()
    return source.SerializeToString(), "", None


def agreement(source: Path | bytes | Any, x: Any = None, optimised: bool = False) -> dict[str, float]:
    """For every value of a file: how far it is from ONNX Runtime's, as max|a - b| / max|b|.

    source: as for `open_onnx`
    x:      (N, C, H, W) pictures; default one of noise
    optimised: with ONNX Runtime's own optimizations, which leave few values to compare

    Raises MissingPackage without onnxruntime, and what `open_onnx` raises.

    >>> worst = max(agreement("model.onnx").values())  # doctest: +SKIP
    """
    errors.need("onnxruntime", "test", "comparing with ONNX Runtime")
    file = read(source)
    picture, _notes = _picture(file)
    plan = Plan(file, picture)
    graph = plan.graph()
    picture = replace(picture, grid=plan.grids.get(picture.name))
    if x is None:
        shape, _output, _more = _tried(graph, plan.nodes, file, picture)
        x = _noise(picture, shape, picture.batch or 1)
    x = torch.as_tensor(x)
    ours = {name: np.asarray(plan.stored(name, value)) for name, value in observed(graph, x).items()}
    model, _name, folder = parse(source)
    import onnx

    model = onnx.ModelProto.FromString(model.SerializeToString())
    had = {o.name for o in model.graph.output}
    made = [o for n in model.graph.node for o in n.output if o and o in ours and o not in had]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in made)
    session = _session(model.SerializeToString(), folder, optimised)
    names = [o.name for o in session.get_outputs() if o.name in ours]
    theirs = session.run(names, {picture.name: _fed(picture, x)})
    return {name: difference(ours[name], np.asarray(value)) for name, value in zip(names, theirs, strict=True)}


def observed(graph: Graph, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every value that a run makes, by its name in the file."""
    with torch.no_grad():
        values = graph.run(x, keep=True)
    return {k: v.detach() for k, v in values.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
