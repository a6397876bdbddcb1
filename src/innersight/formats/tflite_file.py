"""TFLite files, read with struct and NumPy: tensors, operators and what the file says of itself; nothing is run.

A TFLite file is a flatbuffer: tables with a list of where their fields are, vectors, strings, all by offsets. Nothing
in a file is believed: every offset is checked against the file's length before it is followed.

Schema: tensorflow/compiler/mlir/lite/schema/schema.fbs (TFL3) and tflite-support's metadata_schema.fbs (M001).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from innersight.errors import InputError

MAX_BYTES = 1 << 30  # of a file
MAX_ELEMENTS = 1 << 31  # of a tensor
MAX_AXES = 8
MAX_ENTRIES = 200_000  # tensors, operators, buffers
MAX_NAME = 4096

TYPES: Mapping[int, str] = {
    0: "float32", 1: "float16", 2: "int32", 3: "uint8", 4: "int64", 5: "string", 6: "bool", 7: "int16", 8: "complex64",
    9: "int8", 10: "float64", 11: "complex128", 12: "uint64", 13: "resource", 14: "variant", 15: "uint32",
    16: "uint16", 17: "int4", 18: "bfloat16", 19: "int2", 20: "uint4",
}  # fmt: skip
_NUMPY = "float32 float16 int32 uint8 int64 bool int16 int8 float64 uint64 uint32 uint16".split()

# In the order of their numbers.
OPERATORS = """
    ADD AVERAGE_POOL_2D CONCATENATION CONV_2D DEPTHWISE_CONV_2D DEPTH_TO_SPACE DEQUANTIZE EMBEDDING_LOOKUP FLOOR
    FULLY_CONNECTED HASHTABLE_LOOKUP L2_NORMALIZATION L2_POOL_2D LOCAL_RESPONSE_NORMALIZATION LOGISTIC LSH_PROJECTION
    LSTM MAX_POOL_2D MUL RELU RELU_N1_TO_1 RELU6 RESHAPE RESIZE_BILINEAR RNN SOFTMAX SPACE_TO_DEPTH SVDF TANH
    CONCAT_EMBEDDINGS SKIP_GRAM CALL CUSTOM EMBEDDING_LOOKUP_SPARSE PAD UNIDIRECTIONAL_SEQUENCE_RNN GATHER
    BATCH_TO_SPACE_ND SPACE_TO_BATCH_ND TRANSPOSE MEAN SUB DIV SQUEEZE UNIDIRECTIONAL_SEQUENCE_LSTM STRIDED_SLICE
    BIDIRECTIONAL_SEQUENCE_RNN EXP TOPK_V2 SPLIT LOG_SOFTMAX DELEGATE BIDIRECTIONAL_SEQUENCE_LSTM CAST PRELU MAXIMUM
    ARG_MAX MINIMUM LESS NEG PADV2 GREATER GREATER_EQUAL LESS_EQUAL SELECT SLICE SIN TRANSPOSE_CONV SPARSE_TO_DENSE
    TILE EXPAND_DIMS EQUAL NOT_EQUAL LOG SUM SQRT RSQRT SHAPE POW ARG_MIN FAKE_QUANT REDUCE_PROD REDUCE_MAX PACK
    LOGICAL_OR ONE_HOT LOGICAL_AND LOGICAL_NOT UNPACK REDUCE_MIN FLOOR_DIV REDUCE_ANY SQUARE ZEROS_LIKE FILL FLOOR_MOD
    RANGE RESIZE_NEAREST_NEIGHBOR LEAKY_RELU SQUARED_DIFFERENCE MIRROR_PAD ABS SPLIT_V UNIQUE CEIL REVERSE_V2 ADD_N
    GATHER_ND COS WHERE RANK ELU REVERSE_SEQUENCE MATRIX_DIAG QUANTIZE MATRIX_SET_DIAG ROUND HARD_SWISH IF WHILE
    NON_MAX_SUPPRESSION_V4 NON_MAX_SUPPRESSION_V5 SCATTER_ND SELECT_V2 DENSIFY SEGMENT_SUM BATCH_MATMUL
    PLACEHOLDER_FOR_GREATER_OP_CODES CUMSUM CALL_ONCE BROADCAST_TO RFFT2D CONV_3D IMAG REAL COMPLEX_ABS HASHTABLE
    HASHTABLE_FIND HASHTABLE_IMPORT HASHTABLE_SIZE REDUCE_ALL CONV_3D_TRANSPOSE VAR_HANDLE READ_VARIABLE
    ASSIGN_VARIABLE BROADCAST_ARGS RANDOM_STANDARD_NORMAL BUCKETIZE RANDOM_UNIFORM MULTINOMIAL GELU
    DYNAMIC_UPDATE_SLICE RELU_0_TO_1 UNSORTED_SEGMENT_PROD UNSORTED_SEGMENT_MAX UNSORTED_SEGMENT_SUM ATAN2
    UNSORTED_SEGMENT_MIN SIGN BITCAST BITWISE_XOR RIGHT_SHIFT
    """.split()
STABLEHLO = 163  # from this number on: StableHLO's, which no TFLite runtime runs by itself

# What the readers of operators ask for: name -> (field, struct's letter or "*i" for a list, default).
_ACTIVATION = {"activation": (0, "b", 0)}
_WINDOW = {"padding": (0, "b", 0), "stride_w": (1, "i", 1), "stride_h": (2, "i", 1)}
_OPTIONS: Mapping[str, Mapping[str, tuple[int, str, Any]]] = {
    "CONV_2D": _WINDOW | {"activation": (3, "b", 0), "dilation_w": (4, "i", 1), "dilation_h": (5, "i", 1)},
    "DEPTHWISE_CONV_2D": _WINDOW
    | {"multiplier": (3, "i", 0), "activation": (4, "b", 0), "dilation_w": (5, "i", 1), "dilation_h": (6, "i", 1)},
    "TRANSPOSE_CONV": _WINDOW | {"activation": (3, "b", 0)},
    **dict.fromkeys(
        ("AVERAGE_POOL_2D", "MAX_POOL_2D", "L2_POOL_2D"),
        _WINDOW | {"filter_w": (3, "i", 1), "filter_h": (4, "i", 1), "activation": (5, "b", 0)},
    ),
    "FULLY_CONNECTED": _ACTIVATION | {"weights_format": (1, "b", 0), "keep_num_dims": (2, "?", False)},
    **dict.fromkeys(("ADD", "SUB", "MUL", "DIV", "L2_NORMALIZATION"), _ACTIVATION),
    "CONCATENATION": {"axis": (0, "i", 0), "activation": (1, "b", 0)},
    "SOFTMAX": {"beta": (0, "f", 0.0)},
    "RESHAPE": {"new_shape": (0, "*i", None)},
    "RESIZE_BILINEAR": {"align_corners": (2, "?", False), "half_pixel": (3, "?", False)},
    "RESIZE_NEAREST_NEIGHBOR": {"align_corners": (0, "?", False), "half_pixel": (1, "?", False)},
    **{
        code: {"keep_dims": (0, "?", False)}
        for code in "MEAN SUM REDUCE_MAX REDUCE_MIN REDUCE_PROD REDUCE_ANY REDUCE_ALL".split()
    },
    "STRIDED_SLICE": {
        name: (i, "i", 0) for i, name in enumerate(("begin", "end", "ellipsis", "new_axis", "shrink_axis"))
    },
    "LEAKY_RELU": {"alpha": (0, "f", 0.0)},
    "PACK": {"count": (0, "i", 0), "axis": (1, "i", 0)},
    "SHAPE": {"to": (0, "b", 2)},
    "UNPACK": {"num": (0, "i", 0), "axis": (1, "i", 0)},
    "SQUEEZE": {"dims": (0, "*i", None)},
    "SPLIT": {"num": (0, "i", 0)},
    "SPLIT_V": {"num": (0, "i", 0)},
    "DEPTH_TO_SPACE": {"block": (0, "i", 0)},
    "SPACE_TO_DEPTH": {"block": (0, "i", 0)},
    "MIRROR_PAD": {"mode": (0, "b", 0)},
    "GATHER": {"axis": (0, "i", 0), "batch_dims": (1, "i", 0)},
    "CAST": {"to": (1, "b", 0)},
    "BATCH_MATMUL": {"adj_x": (0, "?", False), "adj_y": (1, "?", False)},
    "GELU": {"approximate": (0, "?", False)},
}


class _Damaged(Exception):
    """What is wrong with a file, to be said with its name."""


@dataclass(eq=False)
class TensorRecord:
    """One tensor of the file.

    shape:     as stored: for what operators make it is a hint, and some files store nonsense
    signature: the same with -1 for sizes that are free
    data:      the constant, of `dtype`; None for what is computed. A dtype that NumPy lacks: raw bytes
    scale, zero_point: empty where it is not quantised; several for weights with one a channel, along `axis`
    """

    index: int
    name: str
    dtype: str
    shape: tuple[int, ...]
    signature: tuple[int, ...]
    data: np.ndarray | None
    scale: np.ndarray
    zero_point: np.ndarray
    axis: int
    variable: bool = False
    sparse: bool = False


@dataclass(eq=False)
class Operator:
    """One operator: its builtin name (`code`), what it reads (-1: left out) and makes, its options by name."""

    index: int
    code: str
    custom: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Mapping[str, Any]


@dataclass(eq=False)
class TFLiteFile:
    """The first graph of a file."""

    tensors: list[TensorRecord]
    operators: list[Operator]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    description: str
    graphs: int
    input_names: Mapping[int, str] = field(default_factory=dict)
    normalization: tuple[tuple[float, ...], tuple[float, ...]] | None = None  # mean and std of the float input
    label_files: tuple[str, ...] = ()


def read(data: bytes, name: str) -> TFLiteFile:
    """The graph in the bytes of a TFLite file; `name` is what errors call it. Raises InputError with one sentence."""
    try:
        if len(data) > MAX_BYTES:
            raise _Damaged(f"it is {len(data) >> 20} MiB long, at most {MAX_BYTES >> 20} are read")
        if len(data) < 8 or data[4:8] != b"TFL3":
            raise InputError(f"{name} is no TFLite file: it does not say TFL3 at its fifth byte")
        return _Reader(data).file()
    except _Damaged as error:
        raise InputError(f"{name} is not a sound TFLite file: {error}") from None
    except (struct.error, IndexError, OverflowError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name} is not a sound TFLite file: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Flatbuffers


class _Table:
    """One table; fields by their number, each checked against the file."""

    def __init__(self, data: bytes, at: int):
        self.data = data
        self.at = at
        back = _number(data, "i", at)
        self.fields = at - back
        self.count = (_number(data, "H", self.fields) - 4) // 2
        self.size = _number(data, "H", self.fields + 2)
        if self.count < 0 or self.fields + 4 + 2 * self.count > len(data) or at + self.size > len(data):
            raise _Damaged(f"the table at byte {at} does not fit into it")

    def place(self, number: int, size: int) -> int | None:
        """Where a field of `size` bytes is; None if it is left out."""
        if number >= self.count:
            return None
        offset = _number(self.data, "H", self.fields + 4 + 2 * number)
        if not offset:
            return None
        if offset < 4 or offset + size > self.size:
            raise _Damaged(f"field {number} of the table at byte {self.at} lies outside of it")
        return self.at + offset

    def number(self, number: int, letter: str, default: Any = 0) -> Any:
        at = self.place(number, struct.calcsize("<" + letter))
        return default if at is None else _number(self.data, letter, at)

    def _target(self, number: int) -> int | None:
        at = self.place(number, 4)
        return None if at is None else at + _number(self.data, "I", at)

    def table(self, number: int) -> _Table | None:
        at = self._target(number)
        return None if at is None else _Table(self.data, at)

    def vector(self, number: int, size: int) -> tuple[int, int]:
        """(where the items begin, how many) of a vector of items of `size` bytes."""
        at = self._target(number)
        if at is None:
            return 0, 0
        length = _number(self.data, "I", at)
        if at + 4 + length * size > len(self.data):
            raise _Damaged(f"a list of {length} items at byte {at} does not fit into it")
        return at + 4, length

    def array(self, number: int, dtype: str) -> np.ndarray:
        begin, length = self.vector(number, np.dtype(dtype).itemsize)
        return np.frombuffer(self.data, "<" + dtype, length, begin) if length else np.empty(0, dtype)

    def ints(self, number: int) -> tuple[int, ...]:
        return tuple(self.array(number, "i4").tolist())

    def text(self, number: int) -> str:
        begin, length = self.vector(number, 1)
        return self.data[begin : begin + min(length, MAX_NAME)].decode("utf-8", "replace")

    def tables(self, number: int) -> Iterator[_Table]:
        begin, length = self.vector(number, 4)
        if length > MAX_ENTRIES:
            raise _Damaged(f"it lists {length} entries where at most {MAX_ENTRIES} are read")
        for i in range(length):
            at = begin + 4 * i
            yield _Table(self.data, at + _number(self.data, "I", at))


def _number(data: bytes, letter: str, at: int) -> Any:
    if at < 0 or at + struct.calcsize("<" + letter) > len(data):
        raise _Damaged(f"an offset leads to byte {at} of {len(data)}")
    return struct.unpack_from("<" + letter, data, at)[0]


# ---------------------------------------------------------------------------------------------------------------------
# The schema


class _Reader:
    def __init__(self, data: bytes):
        self.data = data
        self.root = _Table(data, _number(data, "I", 0))

    def file(self) -> TFLiteFile:
        root = self.root
        if (version := root.number(0, "I")) != 3:
            raise _Damaged(f"its schema has version {version}, known is 3")
        self.buffers = list(root.tables(4))
        codes = [
            (max(c.number(0, "b"), c.number(3, "i")), c.text(1)) for c in root.tables(1)
        ]  # the old byte field ends at 127
        graphs = list(root.tables(2))
        if not graphs:
            raise _Damaged("it holds no graph")
        graph = graphs[0]
        tensors = [self.tensor(i, t) for i, t in enumerate(graph.tables(0))]
        operators = [self.operator(i, o, codes) for i, o in enumerate(graph.tables(3))]
        inputs, outputs = graph.ints(1), graph.ints(2)
        self.check(tensors, operators, inputs, outputs)
        found = TFLiteFile(tensors, operators, inputs, outputs, root.text(3), len(graphs))
        found.input_names = self.input_names()
        self.metadata(found)
        return found

    def tensor(self, index: int, table: _Table) -> TensorRecord:
        name = table.text(3)
        try:
            return self._tensor(index, name, table)
        except _Damaged as error:
            raise _Damaged(f"tensor {index} ({name[:80]!r}): {error}") from None

    def _tensor(self, index: int, name: str, table: _Table) -> TensorRecord:
        shape, number = table.ints(0), table.number(1, "b")
        if number not in TYPES and number not in (21, 22):
            raise _Damaged(f"type {number} is not known")
        dtype = TYPES.get(number, "float8")
        if len(shape) > MAX_AXES or any(s < 0 for s in shape) or math.prod(shape) > MAX_ELEMENTS:
            raise _Damaged(f"the shape {shape} is beyond what is read")
        scale, zero_point, axis = np.empty(0, np.float32), np.empty(0, np.int64), 0
        if (how := table.table(4)) is not None:
            scale, zero_point = how.array(2, "f4"), how.array(3, "i8")
            axis = how.number(6, "i")
            known = (
                np.isfinite(scale).all() and not ((scale < 0) | (scale > 1e30) | ((scale > 0) & (scale < 1e-30))).any()
            )
            if not known:
                raise _Damaged("a scale is negative, no number, or beyond any measure")
            if len(zero_point) not in (0, len(scale)) and len(scale):
                raise _Damaged(f"there are {len(scale)} scales and {len(zero_point)} zero points")
            if len(zero_point) != len(scale):
                zero_point = np.zeros(len(scale), np.int64)
            if (np.abs(zero_point) > 1 << 31).any():
                raise _Damaged("a zero point has more than 32 bits")
        data = self.constant(table.number(2, "I"), dtype, shape)
        return TensorRecord(
            index, name, dtype, shape, table.ints(7) or shape, data, scale, zero_point, axis,
            bool(table.number(5, "?")), table.table(6) is not None,
        )  # fmt: skip

    def constant(self, number: int, dtype: str, shape: tuple[int, ...]) -> np.ndarray | None:
        if number >= len(self.buffers):
            raise _Damaged(f"buffer {number} of {len(self.buffers)} does not exist")
        raw = self.buffer(number)
        if not len(raw) or not number:
            return None
        if dtype not in _NUMPY:
            return raw
        expected = math.prod(shape) * np.dtype(dtype).itemsize
        if len(raw) != expected:
            raise _Damaged(f"{len(raw)} bytes are stored for a {dtype} of shape {shape}, expected {expected}")
        return raw.view(np.dtype(dtype).newbyteorder("<")).reshape(shape)

    def buffer(self, number: int) -> np.ndarray:
        table = self.buffers[number]
        begin, length = table.vector(0, 1)
        offset, size = table.number(1, "Q"), table.number(2, "Q")
        if offset > 1:  # behind the flatbuffer
            if offset + size > len(self.data):
                raise _Damaged(f"buffer {number} ends behind the file")
            begin, length = offset, size
        raw = np.frombuffer(self.data, np.uint8, length, begin) if length else np.empty(0, np.uint8)
        return raw if begin % 16 == 0 else raw.copy()  # aligned, whatever the file's writer did

    def operator(self, index: int, table: _Table, codes: list[tuple[int, str]]) -> Operator:
        number = table.number(0, "I")
        if number >= len(codes):
            raise _Damaged(f"operator {index} is of kind {number}, and {len(codes)} kinds are listed")
        code, custom = codes[number]
        known = 0 <= code < len(OPERATORS)
        name = OPERATORS[code] if known else f"STABLEHLO_{code}" if code >= STABLEHLO else f"BUILTIN_{code}"
        options = table.table(4)
        return Operator(index, name, custom, table.ints(1), table.ints(2), _options(name, options))

    def check(self, tensors: list[TensorRecord], operators: list[Operator], inputs: tuple[int, ...],
              outputs: tuple[int, ...]) -> None:  # fmt: skip
        """Tensors exist, and operators read only what is given, constant or made before them."""
        places = range(len(tensors))
        if bad := [i for i in (*inputs, *outputs) if i not in places]:
            raise _Damaged(f"the graph takes or returns tensor {bad[0]} of {len(tensors)}")
        if not inputs or not outputs:
            raise _Damaged("the graph has no input or no output")
        made = {*inputs, *(t.index for t in tensors if t.data is not None or t.variable)}
        for op in operators:
            if bad := [i for i in op.outputs if i not in places] + [
                i for i in op.inputs if i != -1 and i not in places
            ]:
                raise _Damaged(f"operator {op.index} ({op.code}) names tensor {bad[0]} of {len(tensors)}")
            empty = [i for i in op.inputs if i != -1 and i not in made and 0 not in tensors[i].shape]
            if empty:
                raise _Damaged(
                    f"operator {op.index} ({op.code}) reads tensor {empty[0]}, which nothing before it makes"
                )
            made.update(op.outputs)
        if bad := [i for i in outputs if i not in made]:
            raise _Damaged(f"the graph returns tensor {bad[0]}, which nothing makes")

    def input_names(self) -> dict[int, str]:
        signature = next(iter(self.root.tables(7)), None)
        return {} if signature is None else {m.number(1, "I"): m.text(0) for m in signature.tables(0)}

    # -- what tflite-support wrote

    def metadata(self, found: TFLiteFile) -> None:
        for entry in self.root.tables(6):
            number = entry.number(1, "I")
            if entry.text(0) == "TFLITE_METADATA" and number < len(self.buffers):
                raw = self.buffer(number).tobytes()
                if raw[4:8] == b"M001":
                    self.described(_Table(raw, _number(raw, "I", 0)), found)

    def described(self, root: _Table, found: TFLiteFile) -> None:
        graph = next(iter(root.tables(3)), None)
        if graph is None:
            return
        for tensor in graph.tables(2):
            for unit in tensor.tables(4):
                options = unit.table(1)
                if unit.number(0, "B") == 1 and options is not None and found.normalization is None:
                    mean, std = (tuple(options.array(i, "f4").tolist()) for i in (0, 1))
                    if mean and len(mean) == len(std) and all(map(math.isfinite, (*mean, *std))) and all(std):
                        found.normalization = mean, std
        files = [f.text(0) for tensor in graph.tables(3) for f in tensor.tables(6)]
        found.label_files = tuple(f for f in files if f)


def _options(code: str, table: _Table | None) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, (number, letter, default) in _OPTIONS.get(code, {}).items():
        if table is None:
            values[name] = default
        elif letter == "*i":
            values[name] = table.ints(number) if table.place(number, 4) is not None else default
        else:
            values[name] = table.number(number, letter, default)
    return values
