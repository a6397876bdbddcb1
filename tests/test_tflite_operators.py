"""Each TFLite operator alone, on random scales and zero points: every integer as TFLite-Micro and LiteRT make it.

The files are written by `tflite_writer`. int8 is held to TFLite-Micro (`arithmetic="device"`) and to LiteRT's reference
kernels ("litert"), uint8 and floats to LiteRT's. What one of them refuses is listed beside the case.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from innersight.formats.tflite import open_tflite
from tflite_oracle import computed, litert, micro
from tflite_writer import O, T, constant, model, op, tensor

Case = tuple[T, list[O], T]
Make = Callable[[np.random.Generator, str], Case]
RANGE = {"int8": (-128, 127), "uint8": (0, 255)}
SEEDS = range(4)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def step(rng: np.random.Generator, low: float = -2.0, high: float = -0.3) -> float:
    return float(np.float32(10 ** rng.uniform(low, high)))


def stored(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    lo, hi = RANGE[dtype]
    return rng.integers(lo, hi + 1, shape).astype(dtype)


def layer(rng: np.random.Generator, name: str, shape: tuple[int, ...], dtype: str, scale: float | None = None) -> T:
    lo, hi = RANGE[dtype]
    zero = int(rng.integers(lo, hi + 1))
    return tensor(name, shape, dtype, scale=step(rng) if scale is None else scale, zero=zero)


def weights(rng: np.random.Generator, dtype: str, shape: tuple[int, ...], axis: int, several: bool = True) -> T:
    w = stored(rng, dtype, shape)
    if dtype == "uint8":
        return constant("w", w, scale=step(rng, -3, -1), zero=int(rng.integers(0, 256)))
    n = shape[axis] if several else 1
    scale = (10 ** rng.uniform(-3, -1, n)).astype(np.float32)
    return constant("w", np.maximum(w, -127), "int8", scale=scale, axis=axis)


def bias(rng: np.random.Generator, w: T, x: T, n: int) -> T:
    return constant("b", rng.integers(-5000, 5000, n).astype(np.int32), scale=np.asarray(w.scale) * x.scale)


def convolution(depthwise: bool = False, several: bool = True) -> Make:
    def make(rng: np.random.Generator, dtype: str) -> Case:
        c, k, m = (int(rng.integers(1, n)) for n in (5, 4, 3))
        out = c * m if depthwise else int(rng.integers(1, 6))
        x = layer(rng, "x", (1, 9, 8, c), dtype)
        shape = (1, k, k, out) if depthwise else (out, k, k, c)
        w = weights(rng, dtype, shape, 3 if depthwise else 0, several)
        s, padding = int(rng.integers(1, 3)), int(rng.integers(0, 2))
        d = 1 if s > 1 else int(rng.integers(1, 3))
        size = [-(-n // s) if padding == 0 else -(-(n - (k - 1) * d) // s) for n in (9, 8)]
        y = layer(rng, "y", (1, *size, out), dtype, step(rng, -1, 2))
        options = {"multiplier": m} if depthwise else {}
        code = "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D"
        act = int(rng.choice([0, 1, 3]))
        made = op(code, [x, w, bias(rng, w, x, out)], [y], padding=padding, stride_w=s, stride_h=s, activation=act,
                  dilation_w=d, dilation_h=d, **options)  # fmt: skip
        return x, [made], y

    return make


def transposed(rng: np.random.Generator, dtype: str) -> Case:
    c, out, k, s = (int(rng.integers(1, n)) for n in (4, 5, 4, 3))
    x = layer(rng, "x", (1, 5, 4, c), dtype)
    w = weights(rng, dtype, (out, k, k, c), 0)
    padding = int(rng.integers(0, 2))
    size = [n * s if padding == 0 else (n - 1) * s + k for n in (5, 4)]
    y = layer(rng, "y", (1, *size, out), dtype, step(rng, -1, 2))
    asked = constant("size", ints(1, *size, out))
    made = op("TRANSPOSE_CONV", [asked, w, x, bias(rng, w, x, out)], [y], padding=padding, stride_w=s, stride_h=s)
    return x, [made], y


def dense(rng: np.random.Generator, dtype: str) -> Case:
    inner, out, keep = int(rng.integers(1, 60)), int(rng.integers(1, 20)), bool(rng.integers(0, 2))
    x = layer(rng, "x", (1, 3, inner) if keep else (1, inner), dtype)
    w = weights(rng, dtype, (out, inner), 0, several=False)
    y = layer(rng, "y", (1, 3, out) if keep else (1, out), dtype, step(rng, -1, 2))
    b = bias(rng, w, x, out) if rng.random() < 0.8 else None
    return x, [op("FULLY_CONNECTED", [x, w, b], [y], activation=int(rng.choice([0, 1, 3])), keep_num_dims=keep)], y


def two(code: str) -> Make:
    def make(rng: np.random.Generator, dtype: str) -> Case:
        x = layer(rng, "x", (1, 5, 4, 3), dtype)
        shape = [(1, 5, 4, 3), (1, 1, 1, 3), (3,)][int(rng.integers(0, 3))]
        c = constant("c", stored(rng, dtype, shape), scale=step(rng), zero=layer(rng, "", (), dtype).zero)
        y = layer(rng, "y", (1, 5, 4, 3), dtype)
        if code in ("MAXIMUM", "MINIMUM"):
            c.scale = y.scale = x.scale
            c.zero = y.zero = x.zero
            return x, [op(code, [x, c], [y])], y
        return x, [op(code, [x, c] if rng.random() < 0.7 else [x, x], [y], activation=int(rng.choice([0, 1, 3])))], y

    return make


def pool(code: str) -> Make:
    def make(rng: np.random.Generator, dtype: str) -> Case:
        k = [int(rng.integers(1, 5)) for _ in range(2)]
        s, padding = int(rng.integers(1, 4)), int(rng.integers(0, 2))
        x = layer(rng, "x", (1, 9, 8, 3), dtype)
        size = [-(-n // s) if padding == 0 else -(-(n - w + 1) // s) for n, w in zip((9, 8), k, strict=True)]
        y = tensor("y", (1, *size, 3), dtype, scale=x.scale, zero=x.zero)
        made = op(code, [x], [y], padding=padding, stride_w=s, stride_h=s, filter_h=k[0], filter_w=k[1],
                  activation=int(rng.choice([0, 1, 3])))  # fmt: skip
        return x, [made], y

    return make


def one(code: str, fixed: tuple[float, int, int] | None = None, **options: object) -> Make:
    """fixed: the output's scale, and its zero point for int8 and for uint8."""

    def make(rng: np.random.Generator, dtype: str) -> Case:
        x, y = layer(rng, "x", (1, 6, 7, 4), dtype), layer(rng, "y", (1, 6, 7, 4), dtype)
        if fixed:
            y.scale, y.zero = fixed[0], fixed[1 + (dtype == "uint8")]
        return x, [op(code, [x], [y], **options)], y

    return make


def softmax(rng: np.random.Generator, dtype: str) -> Case:
    x = layer(rng, "x", (1, int(rng.integers(2, 60))), dtype, step(rng, -2.5, 0))
    y = tensor("y", x.shape, dtype, scale=1 / 256, zero=RANGE[dtype][0])
    return x, [op("SOFTMAX", [x], [y], beta=float(rng.choice([1.0, 0.5])))], y


def mean(rng: np.random.Generator, dtype: str) -> Case:
    x, keep = layer(rng, "x", (1, 6, 7, 4), dtype), bool(rng.integers(0, 2))
    axes = [[1, 2], [1], [3], [2, 3], [1, 2, 3]][int(rng.integers(0, 5))]
    shape = tuple(1 if d in axes else n for d, n in enumerate(x.shape) if keep or d not in axes)
    y = layer(rng, "y", shape, dtype)
    return x, [op("MEAN", [x, constant("axes", ints(*axes))], [y], keep_dims=keep)], y


def joined(rng: np.random.Generator, dtype: str) -> Case:
    x, axis = layer(rng, "x", (1, 4, 3, 2), dtype), int(rng.integers(1, 4))
    other = layer(rng, "", (), dtype) if dtype == "uint8" else x  # int8 kernels take one scale alone
    out = layer(rng, "", (), dtype) if dtype == "uint8" else x
    c = constant("c", stored(rng, dtype, x.shape), scale=other.scale, zero=other.zero)
    shape = tuple(2 * n if d == axis else n for d, n in enumerate(x.shape))
    y = tensor("y", shape, dtype, scale=out.scale, zero=out.zero)
    return x, [op("CONCATENATION", [x, c], [y], axis=axis)], y


def quantize(rng: np.random.Generator, dtype: str) -> Case:
    x, y = tensor("x", (1, 6, 7, 3)), layer(rng, "y", (1, 6, 7, 3), dtype)
    return x, [op("QUANTIZE", [x], [y])], y


def requantize(rng: np.random.Generator, dtype: str) -> Case:
    x, y = layer(rng, "x", (1, 6, 7, 3), dtype), layer(rng, "y", (1, 6, 7, 3), str(rng.choice(["int8", "uint8"])))
    return x, [op("QUANTIZE", [x], [y])], y


def dequantize(rng: np.random.Generator, dtype: str) -> Case:
    x, y = layer(rng, "x", (1, 6, 7, 3), dtype), tensor("y", (1, 6, 7, 3))
    return x, [op("DEQUANTIZE", [x], [y])], y


def resized(code: str) -> Make:
    def make(rng: np.random.Generator, dtype: str) -> Case:
        x, size = layer(rng, "x", (1, 5, 4, 2), dtype), [int(rng.integers(2, 12)) for _ in range(2)]
        corners, half = [(False, False), (True, False), (False, True)][int(rng.integers(0, 3))]
        y = tensor("y", (1, *size, 2), dtype, scale=x.scale, zero=x.zero)
        made = op(code, [x, constant("size", ints(*size))], [y], align_corners=corners, half_pixel=half)
        return x, [made], y

    return make


def moved(code: str, shape: tuple[int, ...], *constants: np.ndarray, **options: object) -> Make:
    """What only moves the integers of a (1, 6, 4, 4) about."""

    def make(rng: np.random.Generator, dtype: str) -> Case:
        x = layer(rng, "x", (1, 6, 4, 4), dtype)
        y = tensor("y", shape, dtype, scale=x.scale, zero=x.zero)
        return x, [op(code, [x, *(constant(f"c{i}", c) for i, c in enumerate(constants))], [y], **options)], y

    return make


edges = np.array([[0, 0], [1, 2], [2, 0], [0, 0]], np.int32)
INTEGER: dict[str, tuple[Make, str]] = {  # and what is left out: kernels that refuse it
    "convolution": (convolution(), ""),
    "convolution, one scale": (convolution(several=False), ""),
    "depthwise": (convolution(depthwise=True), ""),
    "transposed": (transposed, ""),
    "dense": (dense, ""),
    **{code: (two(code), "") for code in ("ADD", "SUB", "MUL", "MAXIMUM", "MINIMUM")},
    **{code: (pool(code), "") for code in ("AVERAGE_POOL_2D", "MAX_POOL_2D")},
    **{code: (one(code), "") for code in ("RELU", "RELU6", "HARD_SWISH")},
    "RELU_N1_TO_1": (one("RELU_N1_TO_1"), "micro"),
    "LEAKY_RELU": (one("LEAKY_RELU", alpha=float(np.float32(0.13))), ""),
    "ABS": (one("ABS"), "uint8"),
    "EXP": (one("EXP"), "micro uint8"),
    "GELU": (one("GELU", approximate=False), "micro"),
    "GELU by tanh": (one("GELU", approximate=True), "micro"),
    "LOGISTIC": (one("LOGISTIC", (1 / 256, -128, 0)), ""),
    "TANH": (one("TANH", (1 / 128, 0, 128)), ""),
    "softmax": (softmax, ""),
    "mean": (mean, ""),
    "concatenation": (joined, ""),
    "quantize": (quantize, ""),
    "requantize": (requantize, ""),
    "dequantize": (dequantize, ""),
    "RESIZE_BILINEAR": (resized("RESIZE_BILINEAR"), ""),
    "RESIZE_NEAREST_NEIGHBOR": (resized("RESIZE_NEAREST_NEIGHBOR"), ""),
    "reshape to tokens": (moved("RESHAPE", (1, 4, 24), ints(1, 4, 24)), ""),
    "reshape to a map": (moved("RESHAPE", (1, 2, 8, 6), ints(1, 2, 8, 6)), ""),
    "to channels first": (moved("TRANSPOSE", (1, 4, 6, 4), ints(0, 3, 1, 2)), ""),
    "rows and columns": (moved("TRANSPOSE", (1, 4, 6, 4), ints(0, 2, 1, 3)), ""),
    "pad": (moved("PAD", (1, 9, 6, 4), edges), ""),
    "mirror": (moved("MIRROR_PAD", (1, 9, 6, 4), edges, mode=0), ""),
    "mirror with the edge": (moved("MIRROR_PAD", (1, 9, 6, 4), edges, mode=1), ""),
    "slice": (moved("SLICE", (1, 3, 2, 4), ints(0, 2, 1, 0), ints(1, 3, 2, -1)), ""),
    "strided slice": (moved("STRIDED_SLICE", (1, 3, 2, 4), ints(0, 1, 0, 0), ints(1, 6, 4, 4), ints(1, 2, 2, 1)), ""),
    "one row": (
        moved("STRIDED_SLICE", (1, 4, 4), ints(0, 1, 0, 0), ints(1, 2, 4, 4), ints(1, 1, 1, 1), shrink_axis=2), ""),
    "columns reversed": (
        moved("STRIDED_SLICE", (1, 6, 4, 4), ints(0, 0, -1, 0), ints(1, 6, 0, 4), ints(1, 1, -1, 1), end=4), ""),
    "space to depth": (moved("SPACE_TO_DEPTH", (1, 3, 2, 16), block=2), ""),
    "depth to space": (moved("DEPTH_TO_SPACE", (1, 12, 8, 1), block=2), ""),
    "space to batch": (  # TFLite-Micro does not initialise what it pads with
        moved("SPACE_TO_BATCH_ND", (4, 4, 3, 4), ints(2, 2), np.array([[1, 1], [0, 2]], np.int32)), "micro"),
    "tile": (moved("TILE", (1, 12, 4, 12), ints(1, 2, 1, 3)), "micro"),
    "expand dims": (moved("EXPAND_DIMS", (1, 1, 6, 4, 4), np.int32(1)), ""),
    "gather": (moved("GATHER", (1, 6, 3, 4), ints(2, 0, 1), axis=2), ""),
    "greatest": (moved("REDUCE_MAX", (1, 4), ints(1, 2), keep_dims=False), ""),
    "least": (moved("REDUCE_MIN", (1, 1, 1, 4), ints(1, 2), keep_dims=True), ""),
    "reverse": (moved("REVERSE_V2", (1, 6, 4, 4), ints(1)), ""),
}  # fmt: skip


def given(rng: np.random.Generator, x: T) -> np.ndarray:
    if x.dtype in RANGE:
        return stored(rng, x.dtype, x.shape)
    return (rng.standard_normal(x.shape) * 2).astype(np.float32)


@pytest.mark.parametrize("kernels", ["micro int8", "litert int8", "litert uint8"])
@pytest.mark.parametrize("name", INTEGER)
def test_every_integer_is_the_kernels(name: str, kernels: str) -> None:
    oracle, dtype = kernels.split()
    make, without = INTEGER[name]
    if oracle in without or dtype in without:
        pytest.skip(f"{oracle} has no kernel for it in {dtype}")
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        x, operators, y = make(rng, dtype)
        data = model(operators, [x], [y])
        picture = given(rng, x)
        theirs = micro(data, picture) if oracle == "micro" else litert(data, picture)
        ours = computed(data, picture, "device" if oracle == "micro" else "litert")
        (index,) = ours.file.outputs
        expected = theirs(index).reshape(y.shape)
        assert ours.values[index].shape == expected.shape
        assert np.array_equal(ours.values[index].astype(np.float64), expected.astype(np.float64)), f"seed {seed}"


# ---------------------------------------------------------------------------------------------------------------------
# Floats

SHAPE = (1, 6, 5, 4)
noise = np.random.default_rng(5)


def floats(*shape: int) -> np.ndarray:
    return noise.standard_normal(shape).astype(np.float32)


def real(code: str, shape: tuple[int, ...], *constants: np.ndarray, last: bool = False, **options: object) -> Case:
    """last: the constants stand before what is read."""
    x, y = tensor("x", SHAPE), tensor("y", shape)
    read = [x, *(constant(f"c{i}", c) for i, c in enumerate(constants))]
    return x, [op(code, read[::-1] if last else read, [y], **options)], y


def several_steps() -> dict[str, Case]:
    """Operators that stand together: shapes made of shapes, parts and their union, weights in halves of precision."""
    found: dict[str, Case] = {}
    x, y = tensor("x", SHAPE), tensor("y", (1, 120))
    s, one, both = tensor("s", (4,), "int32"), tensor("one", (), "int32"), tensor("both", (2,), "int32")
    found["shape, slice, pack, reshape"] = (
        x,
        [
            op("SHAPE", [x], [s], to=2),
            op("STRIDED_SLICE", [s, *(constant(n, ints(v)) for n, v in (("a", 0), ("b", 1), ("c", 1)))], [one],
               shrink_axis=1),
            op("PACK", [one, constant("rest", np.int32(-1))], [both], axis=0, count=2),
            op("RESHAPE", [x, both], [y]),
        ],
        y,
    )  # fmt: skip
    x, y, a, b = (tensor(n, s) for n, s in (("x", SHAPE), ("y", SHAPE), ("a", (1, 2, 5, 4)), ("b", (1, 4, 5, 4))))
    split = op("SPLIT_V", [x, constant("s", ints(2, -1)), constant("d", np.int32(1))], [a, b], num=2)
    found["split and join"] = x, [split, op("CONCATENATION", [b, a], [y], axis=1)], y
    x, y, a, b = (tensor(n, (1, 6, 5, c)) for n, c in (("x", 4), ("y", 2), ("a", 2), ("b", 2)))
    halves = op("SPLIT", [constant("d", np.int32(3)), x], [a, b], num=2)
    found["halves"] = x, [halves, op("SUB", [a, b], [y])], y
    x, y = tensor("x", SHAPE), tensor("y", (1, 6, 2, 4))
    parts = [tensor(f"p{i}", (1, 6, 4)) for i in range(5)]
    unpack = op("UNPACK", [x], parts, num=5, axis=2)
    found["unpack and pack"] = x, [unpack, op("PACK", [parts[3], parts[0]], [y], axis=2, count=2)], y
    x, y = tensor("x", SHAPE), tensor("y", SHAPE)
    a, b = tensor("a", (1, 6, 5, 2, 2)), tensor("b", (1, 6, 5, 2, 2))
    found["channel shuffle"] = (
        x,
        [
            op("RESHAPE", [x, constant("s", ints(1, 6, 5, 2, 2))], [a]),
            op("TRANSPOSE", [a, constant("p", ints(0, 1, 2, 4, 3))], [b]),
            op("RESHAPE", [b, constant("t", ints(1, 6, 5, 4))], [y]),
        ],
        y,
    )
    window = {"padding": 0, "stride_w": 1, "stride_h": 1}
    x, y, w = tensor("x", SHAPE), tensor("y", (1, 6, 5, 7)), tensor("w", (7, 3, 3, 4))
    half = constant("half", floats(7, 3, 3, 4).astype(np.float16))
    bias = constant("bias", floats(7))
    found["float16 weights"] = x, [op("DEQUANTIZE", [half], [w]), op("CONV_2D", [x, w, bias], [y], **window)], y
    x, a, b = tensor("x", (1, 3, 8, 9)), tensor("a", (1, 8, 9, 3)), tensor("b", (1, 8, 9, 5))
    y, z = tensor("y", (1, 5, 8, 9)), tensor("z", (1, 360))
    found["channels first"] = (
        x,
        [
            op("TRANSPOSE", [x, constant("p", ints(0, 2, 3, 1))], [a]),
            op("CONV_2D", [a, constant("w", floats(5, 3, 3, 3)), constant("bias", floats(5))], [b], **window),
            op("TRANSPOSE", [b, constant("q", ints(0, 3, 1, 2))], [y]),
            op("RESHAPE", [y, constant("s", ints(1, -1))], [z]),
        ],
        z,
    )
    x, a, b, y = (
        tensor(n, s) for n, s in (("x", SHAPE), ("a", (4, 4, 4, 4)), ("b", (4, 2, 2, 4)), ("y", (1, 2, 2, 4)))
    )
    blocks, around, crops = ints(2, 2), np.array([[1, 1], [2, 1]], np.int32), np.array([[0, 2], [1, 1]], np.int32)
    found["dilated by batches"] = (
        x,
        [
            op("SPACE_TO_BATCH_ND", [x, constant("k", blocks), constant("e", around)], [a]),
            op("CONV_2D", [a, constant("w", floats(4, 3, 3, 4)), constant("bias", floats(4))], [b], padding=1,
               stride_w=1, stride_h=1),
            op("BATCH_TO_SPACE_ND", [b, constant("k2", blocks), constant("c", crops)], [y]),
        ],
        y,
    )  # fmt: skip
    return found


window = {"padding": 0, "stride_w": 2, "stride_h": 2}
REAL: dict[str, Case] = {
    **{
        code: real(code, SHAPE)
        for code in "RELU RELU6 RELU_N1_TO_1 RELU_0_TO_1 LOGISTIC TANH EXP ABS NEG SQUARE SIN COS FLOOR HARD_SWISH "
        "SQRT L2_NORMALIZATION LOG_SOFTMAX SIGN".split()
    },
    "GELU": real("GELU", SHAPE, approximate=False),
    "GELU by tanh": real("GELU", SHAPE, approximate=True),
    "LEAKY_RELU": real("LEAKY_RELU", SHAPE, alpha=0.3),
    "PRELU": real("PRELU", SHAPE, floats(1, 1, 4)),
    "PRELU of each": real("PRELU", SHAPE, floats(6, 5, 4)),
    "SOFTMAX": real("SOFTMAX", SHAPE, beta=0.7),
    **{code: real(code, SHAPE, floats(4)) for code in "ADD SUB MUL DIV MAXIMUM MINIMUM SQUARED_DIFFERENCE".split()},
    **{f"{code} from": real(code, SHAPE, floats(5, 4), last=True) for code in "SUB DIV".split()},
    "POW": real("POW", SHAPE, np.float32(2)),
    "CONV_2D": real("CONV_2D", (1, 3, 3, 7), floats(7, 3, 2, 4), floats(7), activation=1, **window),
    "CONV_2D in groups": real("CONV_2D", (1, 3, 3, 8), floats(8, 3, 3, 2), floats(8), activation=2, **window),
    "DEPTHWISE_CONV_2D": real(
        "DEPTHWISE_CONV_2D", (1, 3, 3, 8), floats(1, 3, 3, 8), floats(8), activation=3, multiplier=2, **window
    ),
    "TRANSPOSE_CONV": real(
        "TRANSPOSE_CONV", (1, 12, 10, 3), floats(3, 3, 3, 4), ints(1, 12, 10, 3), last=True, **window
    ),
    "FULLY_CONNECTED": real("FULLY_CONNECTED", (1, 9), floats(9, 120), floats(9), activation=2),
    "FULLY_CONNECTED over maps": real("FULLY_CONNECTED", (1, 6, 5, 9), floats(9, 4), floats(9), keep_num_dims=True),
    "FULLY_CONNECTED by rows": real("FULLY_CONNECTED", (30, 9), floats(9, 4), floats(9)),
    **{
        code: real(code, (1, 3, 3, 4), filter_w=2, filter_h=3, activation=1, **window)
        for code in ("AVERAGE_POOL_2D", "MAX_POOL_2D")
    },
    **{code: real(code, (1, 4), ints(1, 2), keep_dims=False) for code in "MEAN SUM REDUCE_MAX REDUCE_MIN".split()},
    "MEAN of rows": real("MEAN", (1, 5, 4), ints(1), keep_dims=False),
    "SUM of channels": real("SUM", (1, 6, 5, 1), ints(3), keep_dims=True),
    "REDUCE_PROD": real("REDUCE_PROD", (1, 6, 5), ints(3), keep_dims=False),
    **{
        f"{code} {corners} {half}": real(code, (1, 11, 3, 4), ints(11, 3), align_corners=corners, half_pixel=half)
        for code in ("RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR")
        for corners, half in ((False, False), (True, False), (False, True))
    },
    "BATCH_MATMUL": real("BATCH_MATMUL", (1, 6, 5, 3), floats(1, 6, 4, 3)),
    "PADV2": real("PADV2", (1, 9, 7, 4), edges, np.float32(-3.5)),
    "SQUEEZE": real("SQUEEZE", (6, 5, 4), dims=[0]),
    **several_steps(),
}


@pytest.mark.parametrize("name", REAL)
def test_floats_are_litert_s(name: str) -> None:
    x, operators, y = REAL[name]
    data = model(operators, [x], [y])
    picture = given(np.random.default_rng(1), x)
    ours = computed(data, picture, "device")
    (index,) = ours.file.outputs
    expected = litert(data, picture)(index)
    assert ours.values[index].shape == expected.shape
    np.testing.assert_allclose(ours.values[index], expected, rtol=1e-5, atol=1e-5 * np.nanmax(np.abs(expected)))


@pytest.mark.parametrize("name", REAL)
def test_three_pictures_at_once_are_three_pictures(name: str) -> None:
    x, operators, y = REAL[name]
    opened = open_tflite(model(operators, [x], [y]))
    if opened.fixed_batch is not None:
        assert name in ("FULLY_CONNECTED by rows", "SQUEEZE")
        return
    pictures = torch.randn(3, *(opened.input_shape or ()), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = opened.module(pictures)
        alone = torch.cat([opened.module(p[None]) for p in pictures])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5, equal_nan=True)
