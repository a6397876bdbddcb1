"""Chunks: how arrays travel to the page. A JSON header that says what there is, then the numbers, deflated.

    FMC1 · header length (u32, little-endian) · header (JSON) · zlib stream of the arrays, one behind the other

Arrays are little-endian and begin at multiples of four bytes. Maps are sent as bytes with a range for each channel:
value = low + byte / 255 * (high - low), so a value is off by at most 1/510 of its channel's range.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from innersight import errors

MAGIC = b"FMC1"
_TYPES = {"f4": "<f4", "u1": "u1", "i4": "<i4"}


def pack(arrays: Mapping[str, np.ndarray], **about: Any) -> bytes:
    """Arrays (float as f4, integers as i4, bytes as u1) and what is to be said of them, as one chunk."""
    listed, parts = [], []
    for name, array in arrays.items():
        kind = "u1" if array.dtype == np.uint8 else "i4" if array.dtype.kind in "iub" else "f4"
        data = np.ascontiguousarray(array, _TYPES[kind]).tobytes()
        listed.append([name, kind, list(array.shape)])
        parts.append(data + bytes(-len(data) % 4))
    header = json.dumps({"arrays": listed, **about}, allow_nan=False, separators=(",", ":")).encode()
    return MAGIC + len(header).to_bytes(4, "little") + header + zlib.compress(b"".join(parts), 6)


def unpack(chunk: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of a chunk and the rest of its header."""
    if chunk[:4] != MAGIC or len(chunk) < 8:
        raise errors.InputError("this is no chunk of a viewer")
    end = 8 + int.from_bytes(chunk[4:8], "little")
    header = json.loads(chunk[8:end])
    data, at, arrays = zlib.decompress(chunk[end:]), 0, {}
    for name, kind, shape in header.pop("arrays"):
        count = int(np.prod(shape, dtype=int))
        arrays[name] = np.frombuffer(data, _TYPES[kind], count, at).reshape(shape)
        at += -(-arrays[name].nbytes // 4) * 4
    return arrays, header


def quantized(maps: np.ndarray) -> dict[str, np.ndarray]:
    """Maps (C, H, W) as bytes `q` with `low` and `high` (C,) for each; what is not finite is the byte of `low`.

    A channel that is the same everywhere has low = high and bytes of 0.
    """
    flat = maps.reshape(len(maps), -1).astype(np.float64)
    finite = np.isfinite(flat)
    some = finite.any(1)
    low = np.where(some, np.where(finite, flat, np.inf).min(1), 0.0)
    high = np.where(some, np.where(finite, flat, -np.inf).max(1), 0.0)
    span = np.where(high > low, high - low, 1.0)
    q = (np.where(finite, flat, low[:, None]) - low[:, None]) / span[:, None] * 255
    return {"low": low, "high": high, "q": np.rint(q).astype(np.uint8).reshape(maps.shape)}


def block_mean(maps: np.ndarray, by: int) -> np.ndarray:
    """Maps (C, H, W) made smaller: the mean of squares of `by` cells, smaller ones at the far borders."""
    if by == 1:
        return maps
    rows, columns = (np.arange(0, n, by) for n in maps.shape[1:])
    total = np.add.reduceat(np.add.reduceat(maps.astype(np.float64), rows, 1), columns, 2)
    heights, widths = (np.diff(np.append(at, n)) for at, n in zip((rows, columns), maps.shape[1:], strict=True))
    return (total / (heights[:, None] * widths)).astype(np.float32)
