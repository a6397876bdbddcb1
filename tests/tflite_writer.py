"""Writes small TFLite files for tests: tensors and operators given as plain values, laid out as a flatbuffer.

x = tensor("x", (1, 4, 4, 2), "int8", scale=0.1, zero=3)
y = tensor("y", (1, 4, 4, 2), "int8", scale=0.2, zero=0)
data = model([op("RELU", [x], [y])], [x], [y])
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from innersight.formats.tflite_file import _OPTIONS, OPERATORS, TYPES

_NUMBERS = {name: number for number, name in TYPES.items()}
# Which union member an operator's options are: lite/schema/schema.fbs, BuiltinOptions.
_UNION = {
    "CONV_2D": 1, "DEPTHWISE_CONV_2D": 2, "AVERAGE_POOL_2D": 5, "MAX_POOL_2D": 5, "FULLY_CONNECTED": 8, "SOFTMAX": 9,
    "CONCATENATION": 10, "ADD": 11, "L2_NORMALIZATION": 12, "RESIZE_BILINEAR": 15, "RESHAPE": 17, "SPACE_TO_DEPTH": 19,
    "MUL": 21, "PAD": 22, "GATHER": 23, "BATCH_TO_SPACE_ND": 24, "SPACE_TO_BATCH_ND": 25, "TRANSPOSE": 26, "MEAN": 27,
    "SUM": 27, "REDUCE_MAX": 27, "REDUCE_MIN": 27, "REDUCE_PROD": 27, "SUB": 28, "DIV": 29, "SQUEEZE": 30,
    "STRIDED_SLICE": 32, "EXP": 33, "SPLIT": 35, "CAST": 37, "DEQUANTIZE": 38, "MAXIMUM": 39, "MINIMUM": 39,
    "ARG_MAX": 40, "NEG": 42, "PADV2": 43, "SLICE": 48, "TRANSPOSE_CONV": 49, "TILE": 51, "EXPAND_DIMS": 52,
    "SHAPE": 55, "POW": 56, "PACK": 59, "UNPACK": 64, "SQUARE": 66, "RESIZE_NEAREST_NEIGHBOR": 74, "LEAKY_RELU": 75,
    "SQUARED_DIFFERENCE": 76, "MIRROR_PAD": 77, "ABS": 78, "SPLIT_V": 79, "REVERSE_V2": 81, "QUANTIZE": 89,
    "HARD_SWISH": 91, "DEPTH_TO_SPACE": 94, "BATCH_MATMUL": 101, "GELU": 116,
}  # fmt: skip


@dataclass(eq=False)
class T:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    data: np.ndarray | None = None
    scale: Any = None
    zero: Any = 0
    axis: int = 0
    signature: tuple[int, ...] | None = None
    extra: Mapping[int, Any] = field(default_factory=dict)


@dataclass(eq=False)
class O:  # noqa: E742
    """An operator to be written."""

    code: str
    inputs: Sequence[T | None]
    outputs: Sequence[T]
    options: Mapping[str, Any] = field(default_factory=dict)
    custom: str = ""


def tensor(name: str, shape: Sequence[int], dtype: str = "float32", **options: Any) -> T:
    return T(name, tuple(shape), dtype, **options)


def constant(name: str, data: Any, dtype: str | None = None, **options: Any) -> T:
    array = np.asarray(data, dtype)
    return T(name, array.shape, str(array.dtype), array, **options)


def op(code: str, inputs: Sequence[T | None], outputs: Sequence[T], custom: str = "", **options: Any) -> O:
    return O(code, inputs, outputs, options, custom)


def model(
    operators: Sequence[O],
    inputs: Sequence[T],
    outputs: Sequence[T],
    description: str = "",
    metadata: Mapping[str, bytes] | None = None,
    graphs: int = 1,
) -> bytes:
    """The bytes of a file with these operators, in this order."""
    tensors = list(dict.fromkeys([*inputs, *(t for o in operators for t in (*o.inputs, *o.outputs) if t), *outputs]))
    number = {t: i for i, t in enumerate(tensors)}
    buffers: list[bytes] = [b""]
    kinds = list(dict.fromkeys((o.code, o.custom) for o in operators))
    listed = []
    for t in tensors:
        place = 0
        if t.data is not None:
            place = len(buffers)
            buffers.append(np.ascontiguousarray(t.data).tobytes())
        fields: dict[int, Any] = {
            0: Vector("i", t.shape), 1: ("b", _NUMBERS[t.dtype]), 2: ("I", place), 3: Text(t.name), **t.extra,
        }  # fmt: skip
        if t.scale is not None:
            scale = np.atleast_1d(np.asarray(t.scale, np.float32))
            zero = np.broadcast_to(np.atleast_1d(t.zero), scale.shape)
            fields[4] = {2: Vector("f", scale.tolist()), 3: Vector("q", [int(z) for z in zero]), 6: ("i", t.axis)}
        if t.signature is not None:
            fields[7] = Vector("i", t.signature)
        listed.append(fields)
    graph = {
        0: Tables(listed),
        1: Vector("i", [number[t] for t in inputs]),
        2: Vector("i", [number[t] for t in outputs]),
        3: Tables([_operator(o, kinds, number) for o in operators]),
    }
    entries = []
    for key, value in (metadata or {}).items():
        entries.append({0: Text(key), 1: ("I", len(buffers))})
        buffers.append(value)
    codes = [_code(code, custom) for code, custom in kinds]
    root: dict[int, Any] = {
        0: ("I", 3),
        1: Tables(codes),
        2: Tables([graph] * graphs),
        3: Text(description),
        4: Tables([{0: Bytes(b)} if b else {} for b in buffers]),
    }
    if entries:
        root[6] = Tables(entries)
    return flatbuffer(root, b"TFL3")


def _code(code: str, custom: str) -> dict[int, Any]:
    number = OPERATORS.index(code)
    fields: dict[int, Any] = {0: ("b", min(number, 127)), 2: ("i", 1), 3: ("i", number)}
    return fields | ({1: Text(custom)} if custom else {})


def _operator(o: O, kinds: Sequence[tuple[str, str]], number: Mapping[T, int]) -> dict[int, Any]:
    fields: dict[int, Any] = {
        0: ("I", kinds.index((o.code, o.custom))),
        1: Vector("i", [-1 if t is None else number[t] for t in o.inputs]),
        2: Vector("i", [number[t] for t in o.outputs]),
    }
    if o.code in _UNION:
        known = _OPTIONS.get(o.code, {})
        options: dict[int, Any] = {}
        for name, value in o.options.items():
            place, letter, _ = known[name]
            options[place] = Vector("i", value) if letter == "*i" else (letter, value)
        fields |= {3: ("B", _UNION[o.code]), 4: options}
    return fields


def described(mean: Sequence[float], std: Sequence[float], labels: str = "") -> bytes:
    """A TFLITE_METADATA buffer: the input's normalization and the name of the output's label file."""
    unit = {0: ("B", 1), 1: {0: Vector("f", mean), 1: Vector("f", std)}}
    output: dict[int, Any] = {6: Tables([{0: Text(labels)}])} if labels else {}
    return flatbuffer({3: Tables([{2: Tables([{4: Tables([unit])}]), 3: Tables([output])}])}, b"M001")


def packed(data: bytes, **files: str) -> bytes:
    """With files packed behind it, as tflite-support does; `labels_txt` is "labels.txt"."""
    behind = io.BytesIO(data)
    with zipfile.ZipFile(behind, "a") as z:
        for name, text in files.items():
            z.writestr(name.replace("_", "."), text)
    return behind.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Flatbuffers, front to back: a table, then what it points to


@dataclass
class Vector:
    letter: str
    values: Sequence[Any]


@dataclass
class Tables:
    values: Sequence[Mapping[int, Any]]


@dataclass
class Text:
    value: str


@dataclass
class Bytes:
    value: bytes


def flatbuffer(root: Mapping[int, Any], identifier: bytes) -> bytes:
    out = bytearray(4) + identifier
    struct.pack_into("<I", out, 0, _table(out, root))
    return bytes(out)


def _align(out: bytearray, size: int, more: int = 0) -> None:
    while (len(out) + more) % size:
        out.append(0)


def _table(out: bytearray, fields: Mapping[int, Any]) -> int:
    sizes = {i: struct.calcsize("<" + v[0]) if isinstance(v, tuple) else 4 for i, v in fields.items()}
    places, size = {}, 4
    for i in sorted(fields, key=lambda i: -sizes[i]):
        size = -(-size // sizes[i]) * sizes[i]
        places[i] = size
        size += sizes[i]
    count = max(fields, default=-1) + 1
    _align(out, 2)
    vtable = len(out)
    out += struct.pack(f"<{2 + count}H", 4 + 2 * count, size, *(places.get(i, 0) for i in range(count)))
    _align(out, 8)
    at = len(out)
    out += bytes(size)
    struct.pack_into("<i", out, at, at - vtable)
    for i, value in fields.items():
        if isinstance(value, tuple):
            struct.pack_into("<" + value[0], out, at + places[i], value[1])
        else:
            target = _child(out, value)
            struct.pack_into("<I", out, at + places[i], target - (at + places[i]))
    return at


def _child(out: bytearray, value: Any) -> int:
    if isinstance(value, Mapping):
        return _table(out, value)
    if isinstance(value, Text):
        return _vector(out, value.value.encode() + b"\0", 1, len(value.value.encode()), 4)
    if isinstance(value, Bytes):
        return _vector(out, value.value, 1, len(value.value), 16)
    if isinstance(value, Vector):
        size = struct.calcsize("<" + value.letter)
        return _vector(out, struct.pack(f"<{len(value.values)}{value.letter}", *value.values), size,
                       len(value.values), max(size, 4))  # fmt: skip
    at = _vector(out, bytes(4 * len(value.values)), 4, len(value.values), 4)
    for k, fields in enumerate(value.values):
        place = at + 4 + 4 * k
        struct.pack_into("<I", out, place, _table(out, fields) - place)
    return at


def _vector(out: bytearray, data: bytes, _size: int, length: int, alignment: int) -> int:
    _align(out, 4)
    _align(out, alignment, 4)
    at = len(out)
    out += struct.pack("<I", length) + data
    return at
