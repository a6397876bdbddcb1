"""TFLite's operators that move numbers about: shapes, axes, parts, padding; and those that resize maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from innersight.errors import InputError, Unsupported
from innersight.formats import tflite_integers as integers
from innersight.formats.graph import exact
from innersight.formats.tflite_values import (
    BACK,
    TURN,
    Layer,
    Looked,
    Out,
    Site,
    Value,
    activation,
    by_held,
    dequantised,
    file_shape,
    held,
    of_arrays,
    operator,
    picture,
    same_axes,
    same_scale,
    to_file,
    turned_if,
)

# -- moving numbers


@operator("SHAPE")
def _shape(site: Site) -> Layer:
    x = site.read(0)
    if x.constant:
        return of_arrays(site, lambda v: np.asarray(v.shape, np.int64))

    def call(x: Any) -> np.ndarray:
        shape = tuple(x.shape)
        return np.asarray([shape[a] for a in BACK] if x_turned else shape, np.int64)

    x_turned = x.turned
    return Layer(call, [x], seen=False)


def _target(shape: tuple[int, ...], sizes: Sequence[int], stored: int) -> list[int]:
    """A shape as the file asks for it, with the images of the batch in the place of its one."""
    sizes = [int(s) for s in sizes]
    n = shape[0] if shape else 1
    if any(s < -1 for s in sizes) or sizes.count(-1) > 1:
        raise InputError(f"it asks for the shape {sizes}")
    if n != stored and sizes:
        if -1 in sizes:
            if sizes[0] == stored:
                sizes[0] = n
        elif math.prod(sizes) * n == math.prod(shape) * stored:
            sizes[0] = sizes[0] * n // stored
    return sizes


@operator("RESHAPE")
def _reshape(site: Site) -> Layer:
    x = site.read(0)
    given = site.inputs[1] if len(site.inputs) > 1 else None
    sizes = site.options["new_shape"]
    if given is not None and given.known:
        if not given.constant:
            if x.known:
                return of_arrays(site, lambda v, s: v.reshape([int(i) for i in s]))
            return _reshaped(site, x, given, None)
        sizes = given.sample.reshape(-1)
    if sizes is None:
        raise InputError("the shape that it makes is not given")
    if x.known:
        return of_arrays(site, lambda v, *_: v.reshape([int(i) for i in sizes]))
    return _reshaped(site, x, None, [int(s) for s in sizes])


def _reshaped(site: Site, x: Value, given: Value | None, sizes: list[int] | None) -> Layer:
    same_scale(site, x)
    rank = len(given.sample.reshape(-1)) if given is not None else len(sizes or ())
    turned, flat = x.turned, rank == 2
    stored = x.sample.shape[0] if x.rank else 1

    def call(x: Tensor, given: np.ndarray | None) -> Tensor:
        asked = given.reshape(-1).tolist() if given is not None else sizes or []
        shape = tuple(x.shape)  # read once: two images are led through the same calls as one
        target = _target(shape, asked, stored)
        if turned and not (flat and shape[2] * shape[3] == 1):
            x = x.permute(BACK)
        rows = flat and len(shape) > 1 and target[0] in (shape[0], -1) and target[1] in (-1, math.prod(shape[1:]))
        y = x.flatten(1) if rows else x.reshape(target)
        return y.permute(TURN) if rank == 4 else y

    return Layer(call, [x, given], rank == 4)


@operator("SQUEEZE")
def _squeeze(site: Site) -> Layer:
    x = site.read(0)
    if x.known:
        return of_arrays(site, np.squeeze)
    same_scale(site, x)
    shape = file_shape(x)
    dims = site.options["dims"]
    gone = {d % len(shape) for d in dims} if dims else {d for d, s in enumerate(shape) if s == 1 and d}
    left = [s for d, s in enumerate(shape) if d not in gone]
    if any(shape[d] != 1 for d in gone):
        raise InputError(f"it drops axes {sorted(gone)} of {shape}, which are not of size 1")
    return _reshaped(site, x, None, left)


@operator("EXPAND_DIMS")
def _expand_dims(site: Site) -> Layer:
    x = site.read(0)
    axis = int(site.array(1).reshape(-1)[0])
    if x.known:
        return of_arrays(site, lambda v, _: np.expand_dims(v, axis))
    shape = list(file_shape(x))
    if not -len(shape) - 1 <= axis <= len(shape):
        raise InputError(f"axis {axis} of a value with {len(shape)} axes does not exist")
    shape.insert(axis % (len(shape) + 1), 1)
    return _reshaped(site, x, None, shape)


@operator("TRANSPOSE")
def _transpose(site: Site) -> Layer:
    x = site.read(0)
    order = [int(a) for a in site.array(1).reshape(-1)]
    if sorted(order) != list(range(x.rank)):
        raise InputError(f"it orders axes as {order}")
    if x.known:
        return of_arrays(site, lambda v, _: v.transpose(order))
    same_scale(site, x)
    now = list(TURN) if x.turned else list(range(x.rank))

    def moves(turned: bool) -> list[int]:
        asked = by_held(order, turned)
        return [now.index(a) for a in asked]

    # The axes that are held may be those that are asked for: a file in NCHW turns its picture for TFLite's kernels.
    still = [t for t in ((True, False) if x.rank == 4 else (False,)) if moves(t) == list(range(x.rank))]
    turned = still[0] if still else x.rank == 4
    moved = moves(turned)
    return Layer(lambda x: x.permute(moved), [x], turned)


@operator("PAD", "PADV2", "MIRROR_PAD")
def _pad(site: Site) -> Layer:
    x, code = site.read(0), site.operator.code
    widths = site.array(1)
    if widths.shape != (x.rank, 2) or (widths < 0).any() or x.known:
        raise InputError(f"its paddings {widths.tolist()[:8]} do not fit a value with {x.rank} axes")
    around = by_held([(int(a), int(b)) for a, b in widths], x.turned)
    site.room([n + a + b for n, (a, b) in zip(x.sample.shape, around, strict=True)])
    if any(around[0]):
        raise Unsupported("it pads the batch, which is not supported")
    same_scale(site, x)
    flat = [n for pair in reversed(around) for n in pair]
    while len(flat) > 2 and not any(flat[-2:]):
        flat = flat[:-2]
    if code == "MIRROR_PAD":
        return _mirrored(site, x, around)
    value = 0.0
    if code == "PADV2":
        constant = site.read(2)
        if not constant.constant:
            raise Unsupported("the value it pads with is computed as it runs, which is not supported")
        value = float(dequantised(constant).reshape(-1)[0])
    return Layer(lambda x: F.pad(x, flat, value=value), [x], x.turned)


def _mirrored(site: Site, x: Value, around: Sequence[tuple[int, int]]) -> Layer:
    symmetric = site.options["mode"] == 1

    def mirror(n: int, before: int, behind: int) -> list[int]:
        period = 2 * n if symmetric else max(2 * (n - 1), 1)
        places = [i % period for i in range(-before, n + behind)]
        return [(period - 1 - i if symmetric else period - i) if i >= n else i for i in places]

    def call(x: Tensor) -> Tensor:
        for d, (before, behind) in enumerate(around):
            if before or behind:
                x = _picked(x, d, mirror(x.shape[d], before, behind))
        return x

    return Layer(call, [x], x.turned)


def _picked(x: Tensor, dim: int, places: Sequence[int]) -> Tensor:
    return x.index_select(dim, torch.tensor(places, device=x.device))


@operator("CONCATENATION", "PACK")
def _joined(site: Site) -> Layer:
    values = [v for v in site.inputs if v is not None]
    axis, pack = int(site.options["axis"]), site.operator.code == "PACK"
    if not values:
        raise InputError("it reads nothing")
    if all(v.known and not isinstance(v.sample, Tensor) for v in values) and all(
        v.sample.dtype.kind in "iub" for v in values
    ):
        join = np.stack if pack else np.concatenate
        return of_arrays(site, lambda *given: join(given, axis=axis))
    if pack:
        return _packed(site, values, axis)
    rank = values[0].rank
    if any(v.rank != rank for v in values):
        raise InputError("it joins values with different numbers of axes")
    found, turns, turned = same_axes(site, values)
    dim = held(axis, rank, turned)
    # (several images beside one constant: each gets it)
    constants = [v.constant for v in values]
    sizes = [list(turned_if(v.sample, t).shape) for v, t in zip(found, turns, strict=True)]
    site.room([sum(s[d] for s in sizes) if d == dim else sizes[0][d] for d in range(rank)])

    def together(*given: Tensor) -> Tensor:
        parts = [turned_if(x, t) for x, t in zip(given, turns, strict=True)]
        n = max(p.shape[0] for p in parts)
        parts = [p.expand(n, *p.shape[1:]) if c and dim else p for p, c in zip(parts, constants, strict=True)]
        return torch.cat(parts, dim)

    act = activation(site.options["activation"]) if site.scale is None else None
    if site.scale is None or any(v.scale is None for v in found):
        return Layer(lambda *given: together(*given) if act is None else act(together(*given)), found, turned)
    if all(v.scale == site.scale for v in found):
        return Layer(together, found, turned)
    if site.scale.dtype == "int8":
        same_scale(site, *found)
        return Layer(together, found, turned)
    return _rescaled_join(site, found, together, turned)


def _rescaled_join(site: Site, found: list[Value], together: Callable[..., Tensor], turned: bool) -> Layer:
    """uint8 values of different scales, each brought to the output's in float32."""
    out = Out(site.scale)  # type: ignore[arg-type]
    if not site.whole:
        return Layer(lambda *given: out.twin(together(*given)), found, turned)
    tables = []
    for v in found:
        assert v.scale is not None
        q = integers.all_of(v.scale.lo, v.scale.hi)
        if v.scale != out.scale:
            k = np.float32(v.scale.step) * (np.float32(1) / np.float32(out.scale.step))
            b = np.float32(-v.scale.zero) * k
            q = integers.away(q.astype(np.float32) * k + b) + out.scale.zero
        tables.append(Looked(v.scale, out, q))

    def compute(*given: Tensor) -> Tensor:
        return together(*(t(x) for t, x in zip(tables, given, strict=True)))

    return Layer(lambda *given: exact(out.twin(together(*given)), compute, *given), found, turned)


def _packed(site: Site, values: list[Value], axis: int) -> Layer:
    found = [site.tensor(v) for v in values]
    rank = max(v.rank for v in found) + 1
    turned = [v.turned for v in found]
    same_scale(site, *found)
    site.room((len(found), *found[0].sample.shape))

    def call(*given: Tensor) -> Tensor:
        y = torch.stack([to_file(x, t) for x, t in zip(given, turned, strict=True)], axis)
        return y.permute(TURN) if rank == 4 else y

    return Layer(call, found, rank == 4)


@operator("UNPACK")
def _unpacked(site: Site) -> Layer:
    x, axis = site.read(0), int(site.options["axis"])
    if x.known:
        n = x.sample.shape[axis] if -x.rank <= axis < x.rank else 0
        return _of_parts(site, lambda v: tuple(np.moveaxis(v, axis, 0)), n)
    four = x.rank == 5
    dim = axis % x.rank
    if dim == 0 or len(site.outputs) != file_shape(x)[dim]:
        raise Unsupported("it takes the batch, or not all of an axis, apart, which is not supported")
    turned = x.turned

    def call(x: Tensor) -> tuple[Tensor, ...]:
        parts = to_file(x, turned).unbind(dim)
        return tuple(p.permute(TURN) for p in parts) if four else parts

    return Layer(call, [x], [four] * len(site.outputs))


def _of_parts(site: Site, function: Callable[..., tuple[np.ndarray, ...]], n: int) -> Layer:
    if n != len(site.outputs):
        raise InputError(f"it makes {n} values and names {len(site.outputs)}")

    def call(value: Any) -> Any:
        parts = tuple(np.asarray(p) for p in function(value))
        return parts[0] if n == 1 else parts

    return Layer(call, [site.read(0)], [False] * n, seen=False)


@operator("SPLIT", "SPLIT_V")
def _split(site: Site) -> Layer:
    by_size = site.operator.code == "SPLIT_V"
    x = site.read(0 if by_size else 1)
    axis = int(site.array(2 if by_size else 0).reshape(-1)[0])
    if x.known:
        raise Unsupported("of a constant or a shape it is not supported")
    dim, n = held(axis, x.rank, x.turned), len(site.outputs)
    length = x.sample.shape[dim]
    sizes = [int(s) for s in site.array(1).reshape(-1)] if by_size else [length // n] * n
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = length - (sum(sizes) + 1)
    if sum(sizes) != length or len(sizes) != n or min(sizes) < 0 or not dim:
        raise InputError(f"it cuts an axis of {length} into {sizes[:8]}")
    return Layer(lambda x: x.split(sizes, dim) if n > 1 else x, [x], [x.turned] * n)


@operator("SLICE")
def _slice(site: Site) -> Layer:
    x, begin, size = site.read(0), site.array(1).reshape(-1), site.array(2).reshape(-1)
    if len(begin) != x.rank or len(size) != x.rank:
        raise InputError(f"it cuts {len(begin)} axes of a value with {x.rank}")
    shape = x.sample.shape if x.known else file_shape(x)
    cuts = [
        slice(int(b), int(b) + (int(s) if s >= 0 else n - int(b))) for b, s, n in zip(begin, size, shape, strict=True)
    ]
    if any(c.start < 0 or c.stop > n or c.stop < c.start for c, n in zip(cuts, shape, strict=True)):
        raise InputError(f"it cuts {begin.tolist()} with sizes {size.tolist()} out of {tuple(shape)}")
    return _cut(site, x, cuts)


@operator("STRIDED_SLICE")
def _strided_slice(site: Site) -> Layer:
    x = site.read(0)
    begin, end, step = (site.array(i).reshape(-1).tolist() for i in (1, 2, 3))
    options = site.options
    if options["ellipsis"] or options["new_axis"]:
        raise Unsupported("with an ellipsis or a new axis it is not supported")
    if not len(begin) == len(end) == len(step) <= x.rank or 0 in step:
        raise InputError(f"it cuts from {begin} to {end} in steps of {step}, of a value with {x.rank} axes")
    shape = x.sample.shape if x.known else file_shape(x)
    cuts: list[Any] = [slice(None)] * len(shape)
    for d, (b, e, s) in enumerate(zip(begin, end, step, strict=True)):
        if options["shrink_axis"] >> d & 1:
            if not -shape[d] <= b < shape[d]:
                raise InputError(f"it takes element {b} of an axis of {shape[d]}")
            cuts[d] = int(b)
            continue
        cuts[d] = slice(
            None if options["begin"] >> d & 1 else int(b), None if options["end"] >> d & 1 else int(e), int(s)
        )
    return _cut(site, x, cuts)


def _cut(site: Site, x: Value, cuts: list[Any]) -> Layer:
    if x.known:
        return of_arrays(site, lambda v, *_: v[tuple(cuts)])
    same_scale(site, x)
    shape = file_shape(x)
    first = cuts[0]
    if not isinstance(first, slice) or len(range(*first.indices(shape[0]))) != shape[0]:
        raise Unsupported("it takes some images of the batch, which is not supported")
    places = [c if not isinstance(c, slice) else range(*c.indices(n)) for c, n in zip(cuts, shape, strict=True)]
    places[0] = None
    turned = x.turned

    def call(x: Tensor) -> Tensor:
        here = by_held(places, turned)
        index: list[Any] = []
        for d, p in enumerate(here):
            if isinstance(p, range) and p.step < 0:
                x, p = x.flip(d), range(x.shape[d] - 1 - p.start, x.shape[d] - 1 - p.stop, -p.step)
            index.append(slice(p.start, p.stop, p.step) if isinstance(p, range) else slice(None) if p is None else p)
        gone = [d for d, p in enumerate(here) if isinstance(p, int)]
        y = x[tuple(index)]
        return y.movedim(1, -1) if turned and gone and 1 not in gone and y.dim() > 2 else y

    dropped = any(isinstance(p, int) for p in places)
    return Layer(call, [x], turned and not dropped)


@operator("GATHER")
def _gather(site: Site) -> Layer:
    x, places = site.read(0), site.array(1)
    axis = int(site.options["axis"])
    if site.options["batch_dims"]:
        raise Unsupported("for each image apart it is not supported")
    if x.known:
        return of_arrays(site, lambda v, p: np.take(v, p, axis=axis))
    same_scale(site, x)
    dim = held(axis, x.rank, x.turned)
    length = x.sample.shape[dim]
    if dim == 0 or places.size == 0 or places.ndim > 1 or places.min() < 0 or places.max() >= length:
        raise Unsupported(f"it picks {places.shape} elements of an axis of {length}, which is not supported")
    chosen = [int(p) for p in places.reshape(-1)]
    site.room([len(chosen) if d == dim else n for d, n in enumerate(x.sample.shape)])
    drop, turned = places.ndim == 0, x.turned
    if drop and turned and dim != 1:
        return Layer(lambda x: x.select(dim, chosen[0]).movedim(1, -1), [x], False)
    if drop:
        return Layer(lambda x: x.select(dim, chosen[0]), [x], False)
    return Layer(lambda x: _picked(x, dim, chosen), [x], turned)


@operator("REVERSE_V2")
def _reversed(site: Site) -> Layer:
    x = site.read(0)
    dims = [held(int(a), x.rank, x.turned) for a in site.array(1).reshape(-1)]
    return Layer(lambda x: x.flip(dims), [x], x.turned)


@operator("TILE", "BROADCAST_TO")
def _tiled(site: Site) -> Layer:
    x, times = site.read(0), site.read(1)
    if not times.known:
        raise Unsupported("how often is computed as it runs, which is not supported")
    if x.known:
        return of_arrays(site, np.tile if site.operator.code == "TILE" else lambda v, s: np.broadcast_to(v, s))
    counts = [int(t) for t in times.sample.reshape(-1)]
    same_scale(site, x)
    if not times.constant or len(counts) != x.rank or min(counts, default=0) < 1:
        raise Unsupported(f"by {counts[:8]} it is not supported")
    if site.operator.code == "BROADCAST_TO":
        counts = [c // n if n == 1 else 1 for c, n in zip(counts, file_shape(x), strict=True)]
    repeats = by_held(counts, x.turned)
    if repeats[0] != 1:
        raise Unsupported("it repeats the batch, which is not supported")
    site.room([n * r for n, r in zip(x.sample.shape, repeats, strict=True)])
    return Layer(lambda x: x.repeat(repeats), [x], x.turned)


@operator("CAST")
def _cast(site: Site) -> Layer:
    x, dtype = site.read(0), site.outputs[0].dtype
    if x.known:
        if dtype not in ("int32", "int64", "float32", "uint8", "int8", "bool"):
            raise Unsupported(f"to {dtype} it is not supported")
        return of_arrays(site, lambda v: v.astype(dtype))
    if dtype != "float32" or (x.scale is not None and (x.scale.step, x.scale.zero) != (1.0, 0)):
        raise Unsupported(f"from {x.record.dtype} to {dtype} it is not supported")
    return Layer(lambda x: x.float() if not x.is_floating_point() else x, [x], x.turned)


@operator("SPACE_TO_DEPTH", "DEPTH_TO_SPACE")
def _space_and_depth(site: Site) -> Layer:
    x, turn = picture(site)
    block = int(site.options["block"])
    _, c, h, w = turned_if(x.sample, turn).shape
    down = site.operator.code == "SPACE_TO_DEPTH"
    if block < 1 or (h % block or w % block if down else c % block**2):
        raise InputError(f"blocks of {block} do not fit {c} channels of {h}x{w}")
    same_scale(site, x)

    def call(x: Tensor) -> Tensor:
        x = turned_if(x, turn)
        n, c, h, w = x.shape
        if down:
            parts = x.reshape(n, c, h // block, block, w // block, block)
            return parts.permute(0, 3, 5, 1, 2, 4).reshape(n, -1, h // block, w // block)
        parts = x.reshape(n, block, block, c // block**2, h, w)
        return parts.permute(0, 3, 4, 1, 5, 2).reshape(n, -1, h * block, w * block)

    return Layer(call, [x], True)


@operator("SPACE_TO_BATCH_ND", "BATCH_TO_SPACE_ND")
def _space_and_batch(site: Site) -> Layer:
    """Blocks become images of the batch. Those of one image stay together, in an order that no file can see."""
    x, turn = picture(site)
    blocks = [int(b) for b in site.array(1).reshape(-1)]
    edges = site.array(2)
    if len(blocks) != 2 or edges.shape != (2, 2) or min(blocks) < 1 or (edges < 0).any():
        raise Unsupported(f"with blocks {blocks} it is not supported")
    (top, bottom), (left, right) = (tuple(int(v) for v in e) for e in edges)
    b, count = blocks, math.prod(blocks)
    same_scale(site, x)
    n, c, h, w = turned_if(x.sample, turn).shape
    if site.operator.code == "SPACE_TO_BATCH_ND":
        site.room((n, c, h + top + bottom, w + left + right))
        if (h + top + bottom) % b[0] or (w + left + right) % b[1]:
            raise InputError(f"blocks {blocks} do not fit {h}x{w}")

        # (TFLite-Micro fills the padding with whatever its memory held; meant is the zero point.)
        def apart(x: Tensor) -> Tensor:
            x = F.pad(turned_if(x, turn), (left, right, top, bottom))
            n, c, h, w = x.shape
            parts = x.reshape(n, c, h // b[0], b[0], w // b[1], b[1]).permute(0, 3, 5, 1, 2, 4)
            return parts.reshape(n * count, c, h // b[0], w // b[1])

        return Layer(apart, [x], True)
    if n % count or top + bottom >= h * b[0] or left + right >= w * b[1]:
        raise InputError(f"blocks {blocks} do not fit a batch of {n} maps of {h}x{w}")

    def together(x: Tensor) -> Tensor:
        x = turned_if(x, turn)
        n, c, h, w = x.shape
        parts = x.reshape(n // count, b[0], b[1], c, h, w).permute(0, 3, 4, 1, 5, 2)
        whole = parts.reshape(n // count, c, h * b[0], w * b[1])
        return whole[:, :, top : h * b[0] - bottom, left : w * b[1] - right]

    return Layer(together, [x], True)


# -- resizing


def _new_size(site: Site) -> tuple[int, int]:
    size = [int(s) for s in site.array(1).reshape(-1)]
    if len(size) != 2 or min(size) < 1:
        raise InputError(f"it makes a map of size {size}")
    return size[0], size[1]


@operator("RESIZE_NEAREST_NEIGHBOR")
def _nearest(site: Site) -> Layer:
    x, turn = picture(site)
    size = _new_size(site)
    corners, half = bool(site.options["align_corners"]), bool(site.options["half_pixel"])
    n, c, *_ = turned_if(x.sample, turn).shape
    site.room((n, c, *size))
    same_scale(site, x)
    f32 = np.float32

    def places(n: int, out: int) -> list[int]:
        j = np.arange(out, dtype=np.float32)
        if corners and out > 1:
            at = integers.away(j * (f32(n - 1) / f32(out - 1)))
        else:
            at = np.floor((j + f32(0.5) if half else j) * (f32(n) / f32(out))).astype(np.int64)
        return np.minimum(at, n - 1).tolist()

    def call(x: Tensor) -> Tensor:
        x = turned_if(x, turn)
        ask = [places(x.shape[2], size[0]), places(x.shape[3], size[1])]
        if all(out % n == 0 and at == [i // (out // n) for i in range(out)]
               for n, out, at in zip(x.shape[2:], size, ask, strict=True)):  # fmt: skip
            return F.interpolate(x, size, mode="nearest")
        return _picked(_picked(x, 2, ask[0]), 3, ask[1])

    return Layer(call, [x], True)


@operator("RESIZE_BILINEAR")
def _bilinear(site: Site) -> Layer:
    x, turn = picture(site)
    size = _new_size(site)
    corners, half = bool(site.options["align_corners"]), bool(site.options["half_pixel"])
    n, c, *_ = turned_if(x.sample, turn).shape
    site.room((n, c, *size))

    def function(x: Tensor) -> Tensor:
        x = turned_if(x, turn)
        if corners or half:
            return F.interpolate(x, size, mode="bilinear", align_corners=corners)
        rows, columns = (_blend(n, out).to(x) for n, out in zip(x.shape[2:], size, strict=True))
        return rows @ x @ columns.T

    if x.scale is None or site.scale is None:
        return Layer(function, [x], True)
    same_scale(site, x)
    out, scale = Out(site.scale), x.scale
    if not site.whole:
        return Layer(lambda x: out.twin(function(x)), [x], True)
    resize = _resized_uint8 if scale.dtype == "uint8" else _resized_int8

    def compute(x: Tensor) -> Tensor:
        q = scale.centered(turned_if(x, turn)).double() + scale.zero
        return out.real(resize(q, size, corners, half) - scale.zero)

    return Layer(lambda x: exact(out.twin(function(x)), compute, x), [x], True)


def _blend(n: int, out: int) -> Tensor:
    """(out, n): bilinear weights of positions j n / out."""
    at = torch.arange(out, dtype=torch.float32) * (n / out)
    low = at.floor().clamp(max=n - 1)
    high = (low + 1).clamp(max=n - 1)
    weights = torch.zeros(out, n)
    rows = torch.arange(out)
    weights.index_put_((rows, low.long()), 1 - (at - low), accumulate=True)
    weights.index_put_((rows, high.long()), at - low, accumulate=True)
    return weights


def _resized_int8(q: Tensor, size: tuple[int, int], corners: bool, half: bool) -> Tensor:
    """10 bits behind the point in each direction."""

    def taps(n: int, out: int) -> tuple[Tensor, Tensor, Tensor]:
        scale = (n * 1024 + out // 2) // out
        if corners and out > 1:
            scale = ((n - 1) * 1024 + (out - 1) // 2) // (out - 1)
        p = np.arange(out, dtype=np.int64) * scale
        if half:
            p = p + scale // 2 - 512
        low = np.maximum(np.trunc(p / 1024).astype(np.int64), 0)
        high = np.minimum(np.trunc((p + 1023) / 1024).astype(np.int64), n - 1)
        low = np.minimum(low, n - 1)
        return tuple(torch.from_numpy(np.asarray(v)).to(q.device) for v in (low, high, p - 1024 * low))  # type: ignore[return-value]

    (y0, y1, fy), (x0, x1, fx) = (taps(n, out) for n, out in zip(q.shape[2:], size, strict=True))
    fy, fx = fy[:, None].double(), fx[None, :].double()
    up, down = q.index_select(2, y0), q.index_select(2, y1.clamp(min=0))
    v = (up.index_select(3, x0) * (1024 - fx) + up.index_select(3, x1.clamp(min=0)) * fx) * (1024 - fy)
    v = v + (down.index_select(3, x0) * (1024 - fx) + down.index_select(3, x1.clamp(min=0)) * fx) * fy
    return torch.trunc((v + torch.where(v > 0, 2.0**19, -(2.0**19))) / 2**20)


def _resized_uint8(q: Tensor, size: tuple[int, int], corners: bool, half: bool) -> Tensor:
    """In float32, cut off behind one half more."""
    f32 = np.float32

    def taps(n: int, out: int) -> tuple[Tensor, Tensor, Tensor]:
        scale = f32(n - 1) / f32(out - 1) if corners and out > 1 else f32(n) / f32(out)
        j = np.arange(out, dtype=np.float32)
        p = (j + f32(0.5)) * scale - f32(0.5) if half else j * scale
        low = np.maximum(np.floor(p), 0)
        high = np.minimum(np.ceil(p), n - 1)
        return (
            torch.from_numpy(low.astype(np.int64)).to(q.device),
            torch.from_numpy(np.maximum(high, 0).astype(np.int64)).to(q.device),
            torch.from_numpy((p - low).astype(np.float32)).to(q.device),
        )

    (y0, y1, fy), (x0, x1, fx) = (taps(n, out) for n, out in zip(q.shape[2:], size, strict=True))
    fy, fx, q = fy[:, None], fx[None, :], q.float()
    up, down = q.index_select(2, y0), q.index_select(2, y1)
    v = up.index_select(3, x0) * (1 - fy) * (1 - fx) + down.index_select(3, x0) * fy * (1 - fx)
    v = v + up.index_select(3, x1) * (1 - fy) * fx + down.index_select(3, x1) * fy * fx
    return torch.trunc(v + 0.5).double()
