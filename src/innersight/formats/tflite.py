"""TFLite files, opened without TFLite: float networks, and 8-bit ones with the integers that the device computes.

    net = innersight.open("person_detect.tflite")        # values are scale * (q - zero_point) of the device's q
    net = innersight.open("vww_int8.tflite", arithmetic="float")

`arithmetic` says whose integers: "device" (default) are TFLite-Micro's kernels for int8 and LiteRT's reference kernels
for uint8, which TFLite-Micro refuses; "litert" are LiteRT's reference kernels for both; "float" computes no integers
but the real-valued twin, each value clamped to what its integers could hold: faster, with smoother gradients, a step or
two beside the device. Gradients are the twin's in all three (straight-through).

The file is read by `tflite_file`; operators are made by `tflite_windows`, `tflite_operators` and `tflite_moving`; the
arithmetic is in `tflite_integers`.
"""

from __future__ import annotations

import io
import math
import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from innersight import errors
from innersight.errors import InputError, Unsupported
from innersight.formats import Assumed, Opened, Quantised, tflite_file, tflite_moving, tflite_windows
from innersight.formats.graph import Graph, Step
from innersight.formats.tflite_file import Operator, TFLiteFile
from innersight.formats.tflite_operators import quantized_input
from innersight.formats.tflite_values import MAKERS, TURN, Layer, Out, Scale, Site, Value, as_scale, dequantised
from innersight.observe.passes import free_memory
from innersight.preprocess import Preprocess

OPERATORS = (tflite_windows, tflite_moving)  # whose import fills MAKERS; tflite_operators does, too
ARITHMETIC = ("device", "litert", "float")
MAX_INPUT = 1 << 25  # numbers of the input
MAX_VALUE, MAX_VALUES = 1 << 27, 1 << 29  # numbers of one value, and of all, for one picture
MAX_WORK = 1 << 36  # multiplications for one picture
_LABEL_BYTES = 4 << 20
_CHOOSE = ("ARG_MAX", "ARG_MIN")  # what is behind them is no score
_BLOBS = re.compile(r"edgetpu|ethos|vela|neuton|hailo|coreml|_npu", re.I)
_STATEFUL = frozenset(
    """IF WHILE CALL CALL_ONCE LSTM RNN SVDF UNIDIRECTIONAL_SEQUENCE_LSTM BIDIRECTIONAL_SEQUENCE_LSTM
    UNIDIRECTIONAL_SEQUENCE_RNN BIDIRECTIONAL_SEQUENCE_RNN VAR_HANDLE READ_VARIABLE ASSIGN_VARIABLE HASHTABLE
    """.split()
)


def open_tflite(source: Path | bytes, arithmetic: str | None = None) -> Opened:
    """A TFLite network as a graph of layers.

    source:     the file, or its bytes
    arithmetic: "device" (default), "litert" or "float", see the module's text

    Raises InputError for a file that is damaged, Unsupported for one that holds what cannot be run here (custom
    operators at its beginning, int16 activations, recurrent layers, several graphs, sparse weights), each in one
    sentence that names the operator.
    """
    if arithmetic not in (None, *ARITHMETIC):
        raise errors.unknown("arithmetic", arithmetic, ARITHMETIC, " for TFLite files")
    name, data = ("the file", source) if isinstance(source, bytes) else (source.name, _bytes_of(source))
    file = tflite_file.read(data, name)
    plan = _Plan(file, name, arithmetic or "device")
    module = plan.graph()
    notes = [*plan.notes, *_notes(file, plan, arithmetic)]
    labels, note = _labels(data, file, plan)
    preprocess, guess = _preprocess(file, plan)
    return Opened(
        module=module,
        name=name.removesuffix(".tflite"),
        input_shape=plan.input_shape,
        preprocess=preprocess,
        labels=labels,
        notes=[n for n in (*notes, note, guess) if n],
        fixed_batch=plan.fixed_batch,
        quantisation=plan.quantisation or None,
    )


def _bytes_of(path: Path) -> bytes:
    try:
        if path.stat().st_size > tflite_file.MAX_BYTES:
            raise InputError(f"{path.name} is larger than the {tflite_file.MAX_BYTES >> 20} MiB that are read")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Running


class IntegerGraph(Graph):
    """A graph whose sums of integers have to be exact: without the shortcuts that torch may be set to take."""

    def forward(self, x: Tensor) -> Any:
        with _exactly(x.device):
            return super().forward(x)


@contextmanager
def _exactly(device: torch.device) -> Iterator[None]:
    """Autocast and NNPACK's Winograd make other numbers of sums of integers; so does TF32."""
    with ExitStack() as stack:
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            tf32 = torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = False
            stack.callback(setattr, torch.backends.cuda.matmul, "allow_tf32", tf32)
            stack.enter_context(torch.backends.cudnn.flags(enabled=True, allow_tf32=False))
        else:
            stack.enter_context(torch.backends.nnpack.flags(enabled=False))
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Planning


class _Plan:
    """Walks through a file's operators with an input of zeros: each becomes a step and is run at once.

    So shapes are what the operators make, not what the file says, and what cannot run is refused on opening.
    """

    def __init__(self, file: TFLiteFile, name: str, arithmetic: str):
        self.file = file
        self.name = name
        self.arithmetic = arithmetic
        self.notes: list[str] = []
        self.steps: list[Step] = []
        self.constants: dict[Any, Tensor] = {}
        self.values: dict[int, Value] = {}
        self.quantisation: dict[str, Quantised] = {}
        self.input_shape: tuple[int, ...] | None = None
        self.fixed_batch: int | None = None
        self.budget = free_memory() // 4
        self.work = self.made = 0
        self._refuse()
        self.names = _names(file)
        self.scores = _scores(file)
        self.last = {i: op.index for op in file.operators for i in op.inputs}
        with torch.no_grad(), _exactly(torch.device("cpu")):
            self._input()
            self.end = self._operators()
            self.outputs = self._outputs()
        self.alone = [v.sample for v in self.outputs]
        self.classes = self.alone[0].shape[1] if self.alone[0].dim() == 2 else None
        for value in self.values.values():
            value.sample = None

    @property
    def whole(self) -> bool:
        return self.arithmetic != "float"

    def error(self, op: Operator, text: str, kind: type[errors.InnersightError] = InputError) -> errors.InnersightError:
        made = self.file.tensors[op.outputs[0]].name[:120] if op.outputs else "nothing"
        code = op.code if op.code != "CUSTOM" else f"custom operator {op.custom[:60]!r}"
        return kind(f"{self.name}: operator {op.index}, {code}, which makes {made!r}: {text}")

    def _refuse(self) -> None:
        """What is known not to work before anything is run."""
        file, name = self.file, self.name
        for op in file.operators:
            if op.code == "CUSTOM" and _BLOBS.search(op.custom):
                raise Unsupported(
                    f"{name} was compiled for an accelerator ({op.custom[:60]!r}), which hides its layers: open the "
                    "file from before that compilation"
                )
        for op in file.operators:
            if op.code in _STATEFUL:
                raise self.error(op, "recurrent layers and control flow are not supported", Unsupported)
        for tensor in file.tensors:
            if tensor.variable:
                raise Unsupported(f"{name}: tensor {tensor.index} keeps state between runs, which is not supported")
            if tensor.sparse:
                raise Unsupported(
                    f"{name}: tensor {tensor.index} ({tensor.name[:80]!r}) has sparse weights, convert without"
                )
            if tensor.dtype in ("int4", "int2", "uint4", "float8", "bfloat16"):
                raise Unsupported(
                    f"{name}: tensor {tensor.index} ({tensor.name[:80]!r}) is packed {tensor.dtype}, which is not read"
                )
            if tensor.dtype == "int16" and tensor.data is None and len(tensor.scale):
                raise Unsupported(
                    f"{name}: tensor {tensor.index} ({tensor.name[:80]!r}) has int16 activations; only int8 and uint8 "
                    "are read"
                )

    # -- the input

    def _input(self) -> None:
        file = self.file
        given = [i for i in file.inputs if file.tensors[i].data is None]
        if len(given) != 1:
            raise Unsupported(f"{self.name} takes {len(given)} inputs, expected one picture")
        record = file.tensors[given[0]]
        shape = record.shape
        if record.dtype not in ("float32", "int8", "uint8") or len(shape) < 2 or 0 in shape:
            raise Unsupported(f"{self.name} takes a {record.dtype} of shape {shape}, expected a picture")
        first = len(shape) == 4 and shape[1] in (1, 3) and shape[3] not in (1, 3) and min(shape[2:]) > 3
        turned = len(shape) == 4 and not first  # channels first: as some exporters from torch write their input
        if shape[0] != 1:
            self.fixed_batch = shape[0]
        asked = [shape[a] for a in TURN] if turned else list(shape)
        if math.prod(asked) > MAX_INPUT or math.prod(asked) * 8 > self.budget:
            raise InputError(f"{self.name} takes an input of shape {shape}, which is larger than what is read")
        self.input = record
        self.input_shape = tuple(asked[1:])
        self.input_turned = turned
        self.input_scale = as_scale(record)
        if record.dtype != "float32" and self.input_scale is None:
            self.input_scale = Scale(1.0, 0, record.dtype)
        x = Value("input", record, torch.zeros(asked), turned)
        self.values[record.index] = x
        if self.input_scale is None:
            return
        site = self._site(Operator(-1, "QUANTIZE", "", (record.index,), (record.index,), {}))
        layer = quantized_input(site, x, Out(self.input_scale))
        made = Value(record.index, record, layer.call(x.sample), turned, self.input_scale)
        self._step("quantized_input", "QUANTIZE", layer, [made])

    def _room(self, shape: Sequence[int], work: int = 0) -> None:
        """Raises where a value of that shape, or so many multiplications more, are beyond what is run for a picture."""
        sizes = tuple(int(s) for s in shape)
        if math.prod(sizes) * 8 > self.budget or math.prod(sizes) > MAX_VALUE:
            raise InputError(f"a value of shape {sizes} is larger than what is run here")
        self.work += int(work)
        if self.work > MAX_WORK:
            raise InputError(f"with it, a picture takes more than {MAX_WORK:.0e} multiplications")

    # -- operators

    def _value(self, index: int) -> Value | None:
        if index == -1:
            return None
        if index not in self.values:
            record = self.file.tensors[index]
            if record.data is None:
                return None
            if record.data.dtype == np.uint8 and record.dtype != "uint8":
                raise Unsupported(f"tensor {index} is a constant of type {record.dtype}, which is not read")
            self.values[index] = Value(index, record, record.data, False, as_scale(record), True)
        return self.values[index]

    def _site(self, op: Operator) -> Site:
        count = [0]

        def keep(what: str, tensor: Tensor) -> Value:
            count[0] += 1
            key = (self.names.get(op.index, "input"), what, count[0])
            self.constants[key] = tensor
            return Value(key, self.file.tensors[op.outputs[0]], tensor)

        outputs = [self.file.tensors[i] for i in op.outputs]
        scale = as_scale(outputs[0])
        micro = self.arithmetic == "device" and scale is not None and scale.dtype == "int8"
        inputs = [self._value(i) for i in op.inputs]
        return Site(op, inputs, outputs, micro, self.whole, keep, self._room, op.index in self.scores)

    def _operators(self) -> int:
        """All up to the first that cannot be run because only its author knows it; the number of operators planned."""
        for op in self.file.operators:
            if op.code == "CUSTOM":
                self._stop_at(op)
                return op.index
            if not op.outputs:
                raise self.error(op, "it makes nothing")
            try:
                self._operator(op)
            except errors.InnersightError as error:
                raise self.error(op, str(error), type(error)) from None
            except (RuntimeError, ValueError, TypeError, IndexError, OverflowError, ZeroDivisionError, MemoryError,
                    ArithmeticError, AttributeError, KeyError, AssertionError) as error:  # fmt: skip
                said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
                raise self.error(op, f"it cannot run ({said})") from None
            for i in op.inputs:
                done = self.last.get(i) == op.index and op.code not in _CHOOSE
                if done and i in self.values and i not in self.file.outputs:
                    self.values[i].sample = None
        return len(self.file.operators)

    def _operator(self, op: Operator) -> None:
        if op.code not in MAKERS and op.code != "DEQUANTIZE":
            raise Unsupported("this operator is not supported")
        site = self._site(op)
        if op.code == "DEQUANTIZE":
            self._dequantize(site)
            return
        layer = MAKERS[op.code](site)
        made = layer.call(*(None if v is None else v.sample for v in layer.reads))
        parts = list(made) if len(op.outputs) > 1 else [made]
        turned = [layer.turned] * len(parts) if isinstance(layer.turned, bool) else list(layer.turned)
        if len(parts) != len(op.outputs):
            raise InputError(f"it makes {len(parts)} values and names {len(op.outputs)}")
        values = []
        for index, part, turn in zip(op.outputs, parts, turned, strict=True):
            record = self.file.tensors[index]
            self.made += part.numel() if isinstance(part, Tensor) else part.size
            if self.made > MAX_VALUES:
                raise InputError(f"with it, a picture makes more than {MAX_VALUES:.0e} values")
            if part.ndim > tflite_file.MAX_AXES:
                raise InputError(f"it makes a value with {part.ndim} axes")
            values.append(Value(index, record, part, turn, as_scale(record)))
        if not layer.seen and all(v is None or v.constant for v in layer.reads):  # known for good
            for value in values:
                value.constant = True
                self.values[value.record.index] = value
            return
        self._step(self.names[op.index], op.code, layer, values)

    def _dequantize(self, site: Site) -> None:
        """Values are real numbers already; a constant (float16 weights) is made so once."""
        x, record = site.read(0), site.outputs[0]
        if x.constant:
            value = Value(record.index, record, dequantised(x), constant=True)
        else:
            value = Value(x.key, record, x.sample, x.turned)
        self.values[record.index] = value

    def _step(self, name: str, kind: str, layer: Layer, made: list[Value]) -> None:
        reads = [None if v is None or v.constant else v.key for v in layer.reads]
        bound = [v.sample if v is not None and v.constant else None for v in layer.reads]
        call = layer.call if all(b is None for b in bound) else _with(layer.call, bound)
        self.steps.append(Step(name, kind, call, tuple(reads), tuple(v.key for v in made), layer.seen))
        for value in made:
            self.values[value.record.index] = value
        scale = made[0].scale
        if scale is not None and layer.seen:
            lo = scale.lo if layer.lo is None else layer.lo
            hi = scale.hi if layer.hi is None else layer.hi
            self.quantisation[name] = Quantised((scale.step,), scale.zero, scale.dtype, lo, hi)

    def _stop_at(self, op: Operator) -> None:
        if all(step.name == "quantized_input" for step in self.steps):
            raise self.error(op, "nothing before it can be shown, and its code is not in the file", Unsupported)
        self.notes.append(
            f"operators from {op.index} on are left out: {op.custom[:60]!r} is a custom operator, whose code is not in "
            "the file; what it would read is the output"
        )

    # -- the outputs

    def _outputs(self) -> list[Value]:
        file = self.file
        wanted = [i for i in file.outputs if i in self.values and not self.values[i].constant]
        if self.end < len(file.operators):
            wanted = [*file.operators[self.end].inputs, *wanted]
        found: list[Value] = []
        for i in dict.fromkeys(wanted):
            value = self.values.get(i)
            if value is None or value.constant or value.known:
                continue
            maker = next((op for op in file.operators if i in op.outputs), None)
            if maker is not None and maker.code in _CHOOSE:
                self.notes.append(
                    "the network answers with the number of the best class; the scores before it are shown"
                )
                value = self.values[maker.inputs[0]]
            if value.key not in [f.key for f in found]:
                found.append(value)
        if not found:
            raise Unsupported(f"{self.name} computes nothing of its input that could be shown")
        if any(v.key == "input" for v in found):
            raise Unsupported(f"{self.name} returns its input as it is")
        return found

    def graph(self) -> Graph:
        kind = IntegerGraph if self.quantisation and self.whole else Graph
        used = {k for step in self.steps for k in step.inputs}
        constants = {key: value for key, value in self.constants.items() if key in used}
        graph = kind(self.steps, "input", [v.key for v in self.outputs], constants)
        self._check_batches(graph)
        return graph.eval()

    def _check_batches(self, graph: Graph) -> None:
        """Two pictures at once have to bring what each brings alone."""
        if self.fixed_batch is not None:
            return
        noise = torch.randn((1, *(self.input_shape or ())), generator=torch.Generator().manual_seed(0))
        try:
            with torch.no_grad():
                together = graph(torch.cat([torch.zeros_like(noise), noise]))
        except RuntimeError:
            together = None
        parts = together if isinstance(together, tuple) else (together,)
        alone = self.alone
        if together is None or not all(
            b.shape == (2 * a.shape[0], *a.shape[1:]) and torch.allclose(a.float(), b[: len(a)].float(), 1e-3, 1e-4)
            for a, b in zip(alone, parts, strict=True)
        ):
            self.fixed_batch = 1
            self.notes.append("the network takes one picture at a time")


_ENDS = frozenset("SOFTMAX LOGISTIC RESHAPE SQUEEZE DEQUANTIZE QUANTIZE ARG_MAX".split())


def _scores(file: TFLiteFile) -> set[int]:
    """The operators that make the outputs, or what these are made of by a softmax and the like."""
    maker = {i: op for op in file.operators for i in op.outputs}
    found, waiting = set(), [maker[i] for i in file.outputs if i in maker]
    while waiting:
        op = waiting.pop()
        if op.code in _ENDS:
            waiting += [maker[i] for i in op.inputs[:1] if i in maker and maker[i].index < op.index]
        else:
            found.add(op.index)
    return found


def _with(call: Any, bound: list[Any]) -> Any:
    """The call with lists of numbers that are known in their places."""

    def filled(*given: Any) -> Any:
        return call(*(g if b is None else b for g, b in zip(given, bound, strict=True)))

    return filled


# ---------------------------------------------------------------------------------------------------------------------
# What layers are called

_WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV")
_WEIGHT_NAME = re.compile(
    r"^(.*?)/(?:Conv2D|Conv2D_Fold|depthwise|depthwise_Fold|MatMul|conv2d_transpose|"
    r"(?:depthwise_)?weights.*|kernel.*)\d*$"
)
_ENDINGS = re.compile(
    r"/(?:Relu6?|BiasAdd|FusedBatchNormV3|FusedBatchNorm|add_fold|AvgPool|MaxPool|Reshape|Mean|Softmax|MatMul|Conv2D|"
    r"depthwise|add|Pad|Squeeze|concat)\d*$"
)
_EMPTY = re.compile(r"^(?:(Stateful)?PartitionedCall|Identity)(_int8)?(_\d+)?(:\d+)?$")  # what says nothing
_TRACED = re.compile(r"_te_transform|^input\.\d+|^\d+$|fuse_attr")


def _names(file: TFLiteFile) -> dict[int, str]:
    """Operator -> a name as people know it, each once: operators have none, but their tensors do."""
    found = {op.index: _name(file, op) for op in file.operators if op.outputs}
    scopes = [name.partition("/")[0] for name in found.values() if "/" in name]
    scope = (
        f"{scopes[0]}/" if len(scopes) > 1 and len(set(scopes)) == 1 else ""
    )  # of the whole network: "model/", "MobilenetV1/"
    names: dict[int, str] = {}
    used: dict[str, int] = {"input": 1, "quantized_input": 1}
    counts: dict[str, int] = {}
    for op in file.operators:
        counts[op.code] = counts.get(op.code, -1) + 1
        if not op.outputs:
            continue
        name = found[op.index]
        while scope and name.startswith(scope) and name != scope:
            name = name.removeprefix(scope)
        name = name if name and not _EMPTY.match(name) else f"{op.code.lower()}_{counts[op.code]}"
        count = used.get(name, 0)
        while count and f"{name}_{count}" in used:
            count += 1
        unique = f"{name}_{count}" if count else name
        used[name], used[unique] = count + 1, 1
        names[op.index] = unique
    return names


def _name(file: TFLiteFile, op: Operator) -> str:
    if op.code in _WEIGHTED and len(op.inputs) > 1 and op.inputs[1] != -1:
        for part in _parts(file.tensors[op.inputs[1]].name):
            if found := _WEIGHT_NAME.match(part):
                return found.group(1)
    part = next(iter(_parts(file.tensors[op.outputs[0]].name)), "")
    if _TRACED.search(part):
        return ""
    return _ENDINGS.sub("", part)


def _parts(name: str) -> list[str]:
    """The names that a converter joined, without those that repeat others."""
    parts = [p.strip() for p in name.split(";") if p.strip()]
    own = [p for p in parts if not p.startswith("StatefulPartitionedCall/")]
    return own or [p.removeprefix("StatefulPartitionedCall/") for p in parts]


# ---------------------------------------------------------------------------------------------------------------------
# What the file says besides


def _notes(file: TFLiteFile, plan: _Plan, asked: str | None) -> list[str]:
    notes = []
    kinds = {q.dtype for q in plan.quantisation.values()}
    if not kinds:
        if asked is not None:
            notes.append(f"arithmetic={asked!r} has no use here: nothing in {plan.name} is quantised")
        hybrid = [t for t in file.tensors if t.data is not None and t.dtype == "int8" and len(t.scale)]
        if hybrid:
            notes.append(
                f"{len(hybrid)} weights are int8 in a float network: computed as floats, while a device quantises what "
                "meets them as it runs, so not bit for bit"
            )
    elif plan.arithmetic == "float":
        notes.append(
            'values are the float twin\'s, a step or two beside the integers; arithmetic="device" computes those'
        )
    elif "int8" in kinds and plan.arithmetic == "device":
        notes.append(
            "values are the integers of TFLite-Micro's kernels, bit for bit; arithmetic=\"litert\" takes LiteRT's, "
            '"float" the float twin'
        )
    else:
        why = "uint8 networks do not run on TFLite-Micro: " if kinds == {"uint8"} and asked != "litert" else ""
        notes.append(
            f"{why}values are the integers of LiteRT's reference kernels, bit for bit; "
            'arithmetic="float" takes the float twin'
        )
    if file.graphs > 1:
        notes.append(f"the first of {file.graphs} graphs is shown")
    for tensor in file.tensors:
        axis = tensor.axis
        if (
            len(tensor.scale) > 1
            and tensor.data is not None
            and not (axis < len(tensor.shape) and tensor.shape[axis] == len(tensor.scale))
        ):
            notes.append(
                f"some scales are said to belong to an axis that does not exist (tensor {tensor.index}, axis {axis}); "
                "they are read as microcontrollers do"
            )
            break
    return notes


def _labels(data: bytes, file: TFLiteFile, plan: _Plan) -> tuple[list[str] | None, str]:
    """Class names from the files that are packed behind the network."""
    if not data.rfind(b"PK\x05\x06", -(1 << 16) - 64) >= 0:
        return None, ""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as packed:
            members = packed.infolist()[:1000]
            listed = [m for m in members if m.filename in file.label_files] or [
                m for m in members if "label" in m.filename.lower() and m.filename.lower().endswith(".txt")
            ]
            if not listed or listed[0].file_size > _LABEL_BYTES:
                return None, ""
            with packed.open(listed[0]) as member:
                text = member.read(_LABEL_BYTES)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, EOFError, KeyError):
        return None, "the files packed behind the network cannot be read; labels= names the classes"
    except Exception as error:  # a damaged member: zlib.error, lzma.LZMAError
        return None, f"the files packed behind the network cannot be read ({type(error).__name__})"
    labels = [line.strip() for line in text.decode("utf-8", "replace").splitlines()]
    while labels and not labels[-1]:
        labels.pop()
    classes = plan.classes
    if classes is not None and len(labels) != classes:
        return None, f"{listed[0].filename} names {len(labels)} classes for {classes} outputs, so it is left out"
    return labels, f"{len(labels)} labels from {listed[0].filename} in the file"


def _preprocess(file: TFLiteFile, plan: _Plan) -> tuple[Preprocess | None, str]:
    shape = plan.input_shape or ()
    if len(shape) != 3 or shape[0] not in (1, 3):
        return None, ""
    size, channels = (shape[1], shape[2]), "L" if shape[0] == 1 else "RGB"
    if file.normalization is not None:
        mean, std = file.normalization
        if len(mean) in (1, shape[0]):
            return Preprocess(size, channels, scale=1.0, mean=mean, std=std), "pictures are prepared as the file says"
    scale = plan.input_scale
    change = "; preprocess= changes it"
    if scale is None:
        record = Preprocess(size, channels)
        return record, Assumed(f"the file does not say which values a picture takes: 0..1 is assumed{change}")
    low, high = scale.real(scale.lo), scale.real(scale.hi)

    def near(a: float, b: float) -> bool:
        return abs(low - a) < 0.05 * (b - a) and abs(high - b) < 0.05 * (b - a)

    values: dict[str, Any] | None = None
    if near(0, 255):
        values = {"scale": 1.0}
    elif near(0, 1):
        values = {}
    elif near(-1, 1):
        values = {"scale": 1.0, "mean": (127.5,), "std": (127.5,)}
    elif near(-128, 127):
        values = {"scale": 1.0, "mean": (128.0,)}
    elif near(-2.1, 2.64) and shape[0] == 3:
        values = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    if values is None:
        said = f"its input holds {low:.3g} to {high:.3g}; pictures of 0..1 are assumed{change}"
        return Preprocess(size, channels), Assumed(said)
    record = Preprocess(size, channels, **values)
    return record, f"pictures are brought to its input's {low:.3g}..{high:.3g}, guessed from the scale{change}"
