"""TFLite files: what is read of them, what is refused, whose integers are shown, and that every method runs on them.

Oracles: TFLite-Micro and LiteRT's reference kernels, tensor by tensor (`tflite_oracle`); the published answers of the
microcontroller project's person detector; plain integer arithmetic in Python. Small files come from `tflite_writer`.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import innersight
from innersight.errors import InnersightError, InputError, UnknownName, Unsupported
from innersight.formats import tflite_integers
from innersight.formats.tflite import open_tflite
from innersight.network import Network
from innersight.observe.passes import INPUT, Request
from innersight.observe.patches import Patches
from innersight.testing import check_method, check_network
from tflite_oracle import computed, litert, micro
from tflite_writer import O, T, constant, described, model, op, packed, tensor

Shared = Callable[..., Path]
INT8, UINT8 = ("pretrainedResnet_quant", "vww_96_int8", "person_detect"), "mobilenet_v1_0.25_224_quant"
FLOAT = ("pretrainedResnet", "vww_96_float", "mobilenet_v1_0.25_224_1_default_1")


def opened(data: bytes, **options: Any) -> Network:
    return Network(open_tflite(data, **options))


def photographs(shared_data: Shared, shape: tuple[int, ...], n: int) -> np.ndarray:
    """(n, 1, h, w, c) uint8."""
    _, h, w, c = shape
    files = sorted(shared_data("imagenet", "images").iterdir())[:n]
    mode = "L" if c == 1 else "RGB"
    return np.stack([np.asarray(Image.open(f).convert(mode).resize((w, h))).reshape(1, h, w, c) for f in files])


def file_of(shared_data: Shared, name: str) -> bytes:
    return shared_data("tflite", f"{name}.tflite").read_bytes()


SIDES = {
    "pretrainedResnet": (1, 32, 32, 3),
    "vww": (1, 96, 96, 3),
    "person": (1, 96, 96, 1),
    "mobile": (1, 224, 224, 3),
}


def shape_of(name: str) -> tuple[int, ...]:
    return next(shape for start, shape in SIDES.items() if name.startswith(start))


# ---------------------------------------------------------------------------------------------------------------------
# Whole networks, every tensor


@pytest.mark.parametrize(
    ("name", "kernels"),
    [(n, "device") for n in INT8]
    + [("pretrainedResnet_quant", "litert"), ("vww_96_int8", "litert"), (UINT8, "litert")],
)
def test_every_value_of_a_real_network_is_the_integer_that_the_kernels_compute(
    shared_data: Shared, name: str, kernels: str
) -> None:
    data = file_of(shared_data, name)
    for pixels in photographs(shared_data, shape_of(name), 2):
        picture = pixels if name == UINT8 else (pixels.astype(np.int16) - 128).astype(np.int8)
        theirs = (micro if kernels == "device" else litert)(data, picture)
        ours = computed(data, picture, kernels)
        made = {i for o in ours.file.operators for i in o.outputs}
        assert made <= set(ours.values)
        for index in made:
            expected = theirs(index).astype(np.float64)
            assert np.array_equal(ours.values[index].reshape(expected.shape), expected), ours.file.tensors[index].name


@pytest.mark.parametrize("name", FLOAT)
def test_a_real_float_network_answers_as_litert(shared_data: Shared, name: str) -> None:
    data = file_of(shared_data, name)
    for pixels in photographs(shared_data, shape_of(name), 2):
        picture = (pixels / np.float32(255)).astype(np.float32)
        theirs, ours = litert(data, picture), computed(data, picture, "device")
        for index, value in ours.values.items():
            expected = theirs(index)
            off = 1e-5 if index in ours.file.outputs else 4e-5
            np.testing.assert_allclose(
                value.reshape(expected.shape), expected, rtol=0, atol=off * np.abs(expected).max()
            )


def person_pictures(shared_data: Shared) -> torch.Tensor:
    """The two test pictures as the device reads them: each byte as a signed number."""
    folder = shared_data("tflite", "person_detect_testdata")
    pixels = np.stack([np.asarray(Image.open(folder / f"{n}.bmp").convert("L")) for n in ("person", "no_person")])
    stored = pixels.view(np.int8).astype(np.float32)
    quantised = open_tflite(shared_data("tflite", "person_detect.tflite")).quantisation["quantized_input"]  # type: ignore[index]
    return torch.from_numpy(quantised.scale[0] * (stored - quantised.zero_point))[:, None]


def test_the_person_detector_answers_as_on_the_device(shared_data: Shared) -> None:
    net = innersight.open(shared_data("tflite", "person_detect.tflite"))
    logits = net.predict(person_pictures(shared_data)).logits
    assert logits[0, 1] == 0.94140625  # (113 + 128) / 256
    assert logits[1, 0] == 0.72265625  # (57 + 128) / 256
    assert any("axis that does not exist" in note for note in net.notes)


@pytest.mark.parametrize("name", [*INT8, UINT8])
def test_pictures_of_a_batch_have_the_integers_that_they_have_alone(shared_data: Shared, name: str) -> None:
    net = innersight.open(shared_data("tflite", f"{name}.tflite"))
    low, high = net.quantisation["quantized_input"].range  # type: ignore[index]
    x = torch.rand(3, *net.input_shape, generator=torch.Generator().manual_seed(0)) * (high - low) + low  # type: ignore[misc]
    names = list(net.layers)
    together = net.maps(x, layers=[n for n in names if net.layers[n].spatial])
    for i in range(3):
        alone = net.maps(x[i : i + 1], layers=list(together.layers) if hasattr(together, "layers") else None)
        for layer in together:
            assert np.array_equal(together[layer][i], alone[layer][0]), layer


def test_autocast_changes_no_integer(shared_data: Shared) -> None:
    net = innersight.open(shared_data("tflite", "vww_96_int8.tflite"))
    x = torch.rand(16, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = net.module(x)
        with torch.autocast("cpu", torch.bfloat16):
            cast = net.module(x)
    assert cast.dtype == plain.dtype
    assert torch.equal(cast, plain)


@pytest.mark.filterwarnings("ignore:TF32")
def test_without_onednn_a_batch_of_16_has_the_same_integers(shared_data: Shared) -> None:
    """NNPACK's Winograd, which torch takes then, makes other numbers of integers."""
    net = innersight.open(shared_data("tflite", "pretrainedResnet_quant.tflite"))
    x = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 255
    with torch.no_grad():
        plain = net.module(x)
        with torch.backends.mkldnn.flags(enabled=False):
            other = net.module(x)
    assert torch.equal(other, plain)


def test_where_float32_sums_are_not_exact_double_ones_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    operators, x, y = quantised_conv()
    net, picture = opened(model(operators, [x], [y])), torch.rand(2, 3, 8, 8)
    usual = net.module(picture)
    assert tflite_integers.sums_are_exact(torch.device("cpu"))
    monkeypatch.setitem(tflite_integers._probed, torch.device("cpu"), False)
    assert torch.equal(net.module(picture), usual)


# ---------------------------------------------------------------------------------------------------------------------
# The arithmetic


def doubling_high(a: int, b: int) -> int:
    """gemmlowp's SaturatingRoundingDoublingHighMul, in C's integers."""
    product = a * b
    nudged = product + ((1 << 30) if product >= 0 else 1 - (1 << 30))
    return abs(nudged) // (1 << 31) * (1 if nudged >= 0 else -1)


def by_power(x: int, exponent: int) -> int:
    """gemmlowp's RoundingDivideByPOT."""
    mask = (1 << exponent) - 1
    return (x >> exponent) + ((x & mask) > (mask >> 1) + (x < 0))


def scaled(x: int, q: int, e: int) -> int:
    return by_power(doubling_high(tflite_integers.wrap32(np.asarray(x << max(e, 0))).item(), q), max(-e, 0))


@pytest.mark.parametrize("limit", [1 << 12, 1 << 21, 1 << 28])
def test_requantising_in_floats_is_gemmlowp_s_in_integers(limit: int) -> None:
    rng = np.random.default_rng(limit)
    for real in 10 ** rng.uniform(-7, 1.5, 40):
        q, e = (int(v) for v in tflite_integers.multiplier(real))
        assert abs(q / 2**31 * 2.0**e - real) <= 2.0**-31 * real
        x = rng.integers(-limit, limit + 1, 200)
        got = tflite_integers.Scaling(real, limit)(torch.from_numpy(x).double())
        assert got.long().tolist() == [scaled(int(v), q, e) for v in x]


def test_halves_are_rounded_away_from_zero_and_32_bits_wrap() -> None:
    halves = tflite_integers.Scaling(0.25, 100)(torch.tensor([2.0, -2.0, 6.0, -6.0], dtype=torch.float64))
    assert halves.tolist() == [1, -1, 2, -2]
    huge = tflite_integers.Scaling(2.0**17 * 0.75, 1 << 20)(torch.tensor([1 << 15, -(1 << 15)], dtype=torch.float64))
    q, e = (int(v) for v in tflite_integers.multiplier(2.0**17 * 0.75))
    assert huge.tolist() == [scaled(1 << 15, q, e), scaled(-(1 << 15), q, e)]


def wide_dense() -> tuple[bytes, np.ndarray]:
    """More products than float32 sums exactly."""
    rng = np.random.default_rng(0)
    x = tensor("x", (1, 4000), "int8", scale=0.05, zero=-128)
    w = constant("w", rng.integers(100, 128, (3, 4000)).astype(np.int8), scale=0.01)
    b = constant("b", rng.integers(-(1 << 20), 1 << 20, 3).astype(np.int32), scale=0.0005)
    y = tensor("y", (1, 3), "int8", scale=900.0, zero=-100)
    return model([op("FULLY_CONNECTED", [x, w, b], [y])], [x], [y]), rng.integers(100, 128, (1, 4000)).astype(np.int8)


@pytest.mark.parametrize("kernels", ["device", "litert"])
def test_sums_beyond_float32_are_exact(kernels: str) -> None:
    data, picture = wide_dense()
    ours = computed(data, picture, kernels)
    (index,) = ours.file.outputs
    theirs = (micro if kernels == "device" else litert)(data, picture)(index)
    assert np.array_equal(ours.values[index], theirs)
    assert np.abs(theirs.astype(int) + 100).max() > 20


# ---------------------------------------------------------------------------------------------------------------------
# Names, notes, what the file says


@pytest.mark.parametrize("name", ["pretrainedResnet_quant", "vww_96_int8"])
def test_layers_of_a_converted_network_have_their_keras_names(shared_data: Shared, name: str) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(shared_data("keras", f"{name.replace('_quant', '').replace('_int8', '')}.h5")) as file:
        theirs = [n.decode() if isinstance(n, bytes) else n for n in file["model_weights"].attrs["layer_names"]]
    net = innersight.open(shared_data("tflite", f"{name}.tflite"))
    weighted = [n for n in net.layers if net.layers[n].kind in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")]
    assert len(weighted) == {"pretrainedResnet_quant": 10, "vww_96_int8": 28}[name]
    assert set(weighted) <= set(theirs)
    assert sorted(weighted, key=theirs.index) == weighted


def named(*names: str, weight: str = "w") -> list[str]:
    """What layers are called of a chain of convolutions that make tensors of these names."""
    values = [tensor("x", (1, 4, 4, 1)), *(tensor(n, (1, 4, 4, 1)) for n in names)]
    window = {"padding": 0, "stride_w": 1, "stride_h": 1}
    chain = [
        op("CONV_2D", [a, constant(weight, np.ones((1, 1, 1, 1), np.float32)), None], [b], **window)
        for a, b in itertools.pairwise(values)
    ]
    return list(opened(model(chain, values[:1], values[-1:])).layers)


def test_names_are_those_of_the_model_not_of_the_converter() -> None:
    assert named("model/act/Relu;model/bn/FusedBatchNormV3;model/conv/Conv2D", "model/second/BiasAdd") == [
        "act",
        "second",
    ]
    assert named("x1", weight="net/block/conv/Conv2D;StatefulPartitionedCall/net/other") == ["net/block/conv"]
    assert named("StatefulPartitionedCall/net/first/Relu6", "Identity") == ["net/first", "conv_2d_1"]
    assert named("input.13_te_transform", "same/Relu", "same/Relu6") == ["conv_2d_0", "same", "same_1"]
    assert named("input") == ["input_1"]


def quantised_conv(dtype: str = "int8", act: int = 1, scale: float = 1 / 255, zero: int = -128,
                   shape: tuple[int, ...] = (1, 8, 8, 3)) -> tuple[list[O], T, T]:  # fmt: skip
    rng = np.random.default_rng(0)
    x = tensor("x", shape, dtype, scale=scale, zero=zero)
    w = rng.integers(-127 if dtype == "int8" else 0, 128, (4, 3, 3, shape[-1])).astype(dtype)
    weight = constant("w", w, scale=[0.01] * 4 if dtype == "int8" else 0.01, zero=0 if dtype == "int8" else 64)
    bias = constant("b", rng.integers(-100, 100, 4).astype(np.int32), scale=0.01 * scale)
    y = tensor("y", (1, 8, 8, 4), dtype, scale=0.05, zero=-100 if dtype == "int8" else 28)
    return [op("CONV_2D", [x, weight, bias], [y], padding=0, stride_w=1, stride_h=1, activation=act)], x, y


def test_quantised_layers_say_scale_zero_point_and_what_they_can_answer() -> None:
    operators, x, y = quantised_conv()
    net = opened(model(operators, [x], [y]))
    q = net.quantisation["y"]  # type: ignore[index]
    assert (q.scale, q.zero_point, q.dtype, q.lo, q.hi) == ((float(np.float32(0.05)),), -100, "int8", -100, 127)
    assert net.layers["y"].to_json()["quantised"]["zero_point"] == -100
    values = net.maps(torch.rand(2, 3, 8, 8))["y"]
    stored = q.integers(values)
    assert np.array_equal(stored, np.round(stored))
    assert stored.min() >= q.lo
    assert stored.max() <= q.hi
    assert net.layers["y"].parameters == 4 * 3 * 3 * 3 + 4
    assert list(net.layers) == ["quantized_input", "y"]
    assert "CONV_2D int8" in str(net.layers)
    assert net.layers["y"].receptive_field.to_json()["size"] == [3, 3]  # type: ignore[union-attr]


def test_notes_say_whose_integers_these_are() -> None:
    operators, x, y = quantised_conv()
    data = model(operators, [x], [y])
    assert any("TFLite-Micro's" in n and "arithmetic=" in n for n in opened(data).notes)
    assert any("LiteRT's reference" in n for n in opened(data, arithmetic="litert").notes)
    assert any("float twin" in n and "device" in n for n in opened(data, arithmetic="float").notes)
    operators, x, y = quantised_conv("uint8", zero=0)
    assert any("do not run on TFLite-Micro" in n for n in opened(model(operators, [x], [y])).notes)
    with pytest.raises(UnknownName, match="device"):
        opened(data, arithmetic="devise")
    x, y = tensor("x", (1, 4, 4, 1)), tensor("y", (1, 4, 4, 1))
    float_net = opened(model([op("RELU", [x], [y])], [x], [y]), arithmetic="device")
    assert float_net.quantisation is None
    assert any("nothing in" in n for n in float_net.notes)


def test_int8_weights_in_a_float_network_are_floats_and_said_to_be() -> None:
    x, y = tensor("x", (1, 3, 3, 2)), tensor("y", (1, 2))
    w = constant("w", np.arange(36).reshape(2, 18).astype(np.int8), scale=0.5)
    net = opened(model([op("FULLY_CONNECTED", [x, w, None], [y])], [x], [y]))
    picture = torch.rand(1, 2, 3, 3)
    expected = picture.permute(0, 2, 3, 1).reshape(1, 18) @ torch.arange(36.0).view(2, 18).T * 0.5
    torch.testing.assert_close(torch.from_numpy(net.predict(picture).logits), expected)
    assert any("not bit for bit" in n for n in net.notes)


def labelled(classes: int, **options: Any) -> bytes:
    x, y = tensor("x", (1, 8, 8, 3), "uint8", scale=1 / 127.5, zero=128), tensor("y", (1, classes))
    flat = tensor("f", (1, 8, 8, 3))
    w = constant("w", np.ones((classes, 192), np.float32))
    return model([op("DEQUANTIZE", [x], [flat]), op("FULLY_CONNECTED", [flat, w, None], [y])], [x], [y], **options)


def test_labels_and_normalization_come_from_the_metadata() -> None:
    about = {"TFLITE_METADATA": described((127.5,), (127.5,), "labels.txt"), "min_runtime_version": b"1.5.0"}
    data = packed(labelled(3, metadata=about), labels_txt="cat\ndog\nbird\n")
    found = open_tflite(data)
    assert found.labels == ["cat", "dog", "bird"]
    wanted = found.preprocess
    assert wanted is not None
    white, _ = wanted.apply(Image.new("RGB", (20, 10), "white"))
    assert np.allclose(white, 1.0)
    assert any("labels.txt" in n for n in found.notes)


def test_labels_that_do_not_fit_are_left_out_with_a_note() -> None:
    data = packed(labelled(3), labels_txt="cat\ndog\n")
    found = open_tflite(data)
    assert found.labels is None
    assert any("2 classes for 3 outputs" in n for n in found.notes)


def test_a_damaged_archive_behind_the_network_is_no_reason_not_to_open_it() -> None:
    data = bytearray(packed(labelled(3), labels_txt="cat\ndog\nbird\n" * 40))
    at = data.index(b"labels.txt") + 12
    data[at : at + 8] = b"\xff" * 8
    assert open_tflite(bytes(data)).labels is None


@pytest.mark.parametrize(
    ("dtype", "scale", "zero", "black", "white"),
    [
        ("uint8", 1.0, 0, 0, 255),
        ("int8", 1.0, -128, 0, 255),
        ("int8", 1 / 255, -128, 0, 1),
        ("uint8", 1 / 127.5, 128, -1, 1),
        ("int8", 0.0186, -14, -0.485 / 0.229, (1 - 0.485) / 0.229),
    ],
)
def test_the_input_s_range_says_which_values_a_picture_takes(
    dtype: str, scale: float, zero: int, black: float, white: float
) -> None:
    operators, x, y = quantised_conv(dtype, 0, scale, zero)
    found = open_tflite(model(operators, [x], [y]))
    assert found.preprocess is not None
    for color, value in (("black", black), ("white", white)):
        pixels, _ = found.preprocess.apply(Image.new("RGB", (8, 8), color))
        assert pixels[0] == pytest.approx(value, abs=1e-5)
    assert any("guessed" in n for n in found.notes)


def test_files_in_channels_first_order_take_and_show_channels_first() -> None:
    rng = np.random.default_rng(0)
    x, a, b = tensor("x", (1, 3, 8, 8)), tensor("a", (1, 8, 8, 3)), tensor("b", (1, 8, 8, 5))
    w = rng.standard_normal((5, 3, 3, 3)).astype(np.float32)
    turn = op("TRANSPOSE", [x, constant("p", np.array([0, 2, 3, 1], np.int32))], [a])
    conv = op("CONV_2D", [a, constant("w", w), None], [b], padding=0, stride_w=1, stride_h=1)
    net = opened(model([turn, conv], [x], [b]))
    assert net.input_shape == (3, 8, 8)
    picture = torch.rand(2, 3, 8, 8)
    expected = torch.nn.functional.conv2d(picture, torch.from_numpy(w).permute(0, 3, 1, 2), padding=1)
    torch.testing.assert_close(net.module(picture), expected)
    assert net.layers["b"].grid == (5, 8, 8)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def custom(name: str, first: bool = False) -> bytes:
    operators, x, y = quantised_conv()
    z = tensor("z", (1, 4), "float32")
    last = op("CUSTOM", [x if first else y], [z], custom=name)
    return model([last] if first else [*operators, last], [x], [z])


def test_a_network_is_opened_up_to_its_first_custom_operator() -> None:
    net = opened(custom("TFLite_Detection_PostProcess"))
    assert net.module(torch.rand(1, 3, 8, 8)).shape == (1, 4, 8, 8)
    assert any("TFLite_Detection_PostProcess" in n for n in net.notes)


def test_where_the_answer_is_the_best_class_its_scores_are_shown() -> None:
    operators, x, y = quantised_conv()
    best = tensor("best", (1, 8, 8), "int64")
    choose = op("ARG_MAX", [y, constant("axis", np.int32(3))], [best])
    net = opened(model([*operators, choose], [x], [best]))
    picture = torch.rand(2, 3, 8, 8)
    assert torch.equal(net.module(picture), opened(model(operators, [x], [y])).module(picture))
    assert any("number of the best class" in n for n in net.notes)


def refused() -> dict[str, tuple[bytes, type[Exception], str]]:
    operators, x, y = quantised_conv()
    z = tensor("z", (1, 8, 8, 4))
    wide = [tensor(n, (1, 4), "int16", scale=0.1) for n in "ab"]
    floats = [tensor(n, (1, 4, 4, 1)) for n in "abc"]
    packed_weights = tensor("w4", (4, 3, 3, 3), "int4", data=np.zeros(54, np.uint8))
    sparse = constant("ws", np.zeros((4, 3, 3, 3), np.int8), scale=0.1, extra={6: {}})
    window = {"padding": 0, "stride_w": 1, "stride_h": 1}
    huge = constant("size", np.array([40000, 40000], np.int32))
    return {
        "compiled": (custom("edgetpu-custom-op"), Unsupported, "accelerator"),
        "compiled for ethos": (custom("ethos-u"), Unsupported, "accelerator"),
        "custom first": (custom("Mine", first=True), Unsupported, "'Mine'"),
        "recurrent": (model([op("LSTM", [x], [y])], [x], [y]), Unsupported, "LSTM"),
        "control flow": (model([op("WHILE", [x], [y])], [x], [y]), Unsupported, "WHILE"),
        "unknown": (model([op("RFFT2D", [floats[0]], [floats[1]])], floats[:1], floats[1:2]), Unsupported, "RFFT2D"),
        "int16": (model([op("RELU", wide[:1], wide[1:])], wide[:1], wide[1:]), Unsupported, "int16"),
        "int4": (model([op("CONV_2D", [x, packed_weights, None], [y], **window)], [x], [y]), Unsupported, "int4"),
        "sparse": (model([op("CONV_2D", [x, sparse, None], [y], **window)], [x], [y]), Unsupported, "sparse"),
        "state": (
            model([op("ADD", [floats[0], tensor("s", (1, 4, 4, 1), extra={5: ("?", True)})], [floats[1]])],
                  floats[:1], floats[1:2]), Unsupported, "state"),
        "two inputs": (model([op("ADD", floats[:2], floats[2:])], floats[:2], floats[2:]), Unsupported, "2 inputs"),
        "returns its input": (model([], floats[:1], floats[:1]), Unsupported, "input"),
        "huge": (model([op("RESIZE_NEAREST_NEIGHBOR", [x, huge], [z])], [x], [z]), InputError, "larger"),
        "no stride": (model([op("CONV_2D", [x, operators[0].inputs[1], None], [y], padding=0, stride_w=0, stride_h=1)],
                            [x], [y]), InputError, "stride_h"),
        "other scale": (
            model([op("MAX_POOL_2D", [x], [y], filter_w=1, filter_h=1, **window)], [x], [y]), Unsupported, "scale"),
        "empty": (b"", InputError, "TFL3"),
        "zeros": (bytes(1000), InputError, "TFL3"),
        "text": (b"{}" * 50, InputError, "TFL3"),
    }  # fmt: skip


REFUSED = refused()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_shown_is_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    data, kind, words = REFUSED[name]
    path = tmp_path / "mine.tflite"
    path.write_bytes(data)
    with pytest.raises(kind, match=words) as caught:
        innersight.open(path)
    assert "mine.tflite" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_graphs_are_said_and_the_first_is_shown() -> None:
    operators, x, y = quantised_conv()
    assert any("first of 2 graphs" in n for n in opened(model(operators, [x], [y], graphs=2)).notes)


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut off, bits flipped, or an offset made something else."""
    broken, kind = bytearray(data), rng.integers(0, 3)
    if kind == 0:
        return bytes(broken[: rng.integers(0, len(broken))])
    if kind == 1:
        for at in rng.integers(0, len(broken), rng.integers(1, 4)):
            broken[at] ^= int(rng.integers(1, 256))
        return bytes(broken)
    at = int(rng.integers(0, min(len(broken), 40_000) // 4)) * 4
    odd = (0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, len(broken), 1, 1000, 65536)
    struct.pack_into("<I", broken, min(at, len(broken) - 4), odd[rng.integers(0, len(odd))])
    return bytes(broken)


def small_files() -> list[bytes]:
    operators, x, y = quantised_conv()
    conv = model(operators, [x], [y])
    pooled, score = (
        tensor("p", (1, 4), "int8", scale=0.05, zero=-100),
        tensor("s", (1, 4), "int8", scale=1 / 256, zero=-128),
    )
    axes = constant("axes", np.array([1, 2], np.int32))
    tail = [op("MEAN", [y, axes], [pooled], keep_dims=False), op("SOFTMAX", [pooled], [score], beta=1.0)]
    a, b, c = tensor("a", (1, 6, 6, 2)), tensor("b", (1, 6, 6, 4)), tensor("c", (1, 144))
    grow = op("PAD", [a, constant("w", np.array([[0, 0], [0, 0], [0, 0], [0, 2]], np.int32))], [b])
    flat = op("RESHAPE", [b, constant("to", np.array([1, -1], np.int32))], [c])
    labels = {"TFLITE_METADATA": described((127.5,), (127.5,), "labels.txt")}
    return [
        conv,
        model([*operators, *tail], [x], [score]),
        model([grow, flat], [a], [c]),
        packed(labelled(3, metadata=labels), labels_txt="a\nb\nc\n"),
    ]


def test_damaged_files_load_or_are_refused_and_nothing_else() -> None:
    rng = np.random.default_rng(3)
    sources = small_files()
    opens, refusals = 0, []
    for i in range(400):
        try:
            open_tflite(damaged(sources[i % len(sources)], rng))
            opens += 1
        except InnersightError as error:
            refusals.append(str(error))
    assert opens > 20
    assert len(refusals) > 200
    assert not any("\n" in sentence or len(sentence) > 900 for sentence in refusals)


# ---------------------------------------------------------------------------------------------------------------------
# Methods


@pytest.mark.parametrize("name", ["pretrainedResnet_quant", "vww_96_int8"])
def test_an_integer_network_does_what_every_network_does(shared_data: Shared, name: str) -> None:
    net = innersight.open(shared_data("tflite", f"{name}.tflite"))
    x = net.read(sorted(shared_data("imagenet", "images").iterdir())[:2]).tensor
    assert check_network(net, x, gradient=False)


def test_a_float_network_does_what_every_network_does(shared_data: Shared) -> None:
    net = innersight.open(shared_data("tflite", "pretrainedResnet.tflite"))
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 255
    assert "the gradient equals finite differences" in check_network(net, x, gradient=True)


@pytest.mark.parametrize("method", ["gradcam", "gradient", "lrp", "occlusion", "ablationcam", "smoothgrad"])
def test_methods_hold_their_promises_on_integers(shared_data: Shared, method: str) -> None:
    net = innersight.open(shared_data("tflite", "pretrainedResnet_quant.tflite"))
    x = net.read(sorted(shared_data("cifar10", "test100_png").iterdir())[:2]).tensor
    assert check_method(method, net, x)


def input_gradient(net: Network, x: torch.Tensor) -> np.ndarray:
    """Of the greatest score before the softmax, (n, C * H * W)."""
    *_, scores, _ = net.layers
    request = Request(gradients=[INPUT], of=scores, score=lambda value: value.flatten(1).amax(1))
    with net.engine.session():
        g = net.engine.run(x, request).gradients[INPUT]
    assert g is not None
    return g.flatten(1).numpy()


@pytest.mark.parametrize(
    ("name", "least"), [("pretrainedResnet_quant", 0.8), ("vww_96_int8", 0.75), ("person_detect", 0.8)]
)
def test_the_slope_is_the_float_twin_s_at_the_device_s_operating_point(
    shared_data: Shared, name: str, least: float
) -> None:
    path = shared_data("tflite", f"{name}.tflite")
    whole, twin = innersight.open(path), innersight.open(path, arithmetic="float")
    x = whole.read(sorted(shared_data("imagenet", "images").iterdir())[:6]).tensor
    pairs = zip(input_gradient(whole, x), input_gradient(twin, x), strict=True)
    correlations = [np.corrcoef(a, b)[0, 1] for a, b in pairs]
    assert np.isfinite(correlations).all()
    assert np.mean(correlations) > least


def test_of_one_layer_the_slope_is_exactly_the_twin_s() -> None:
    operators, x, y = quantised_conv(act=0)
    data = model(operators, [x], [y])
    whole, twin = opened(data), opened(data, arithmetic="float")
    picture = torch.rand(1, 3, 8, 8)
    grads = []
    for net in (whole, twin):
        on_grid = whole.module.steps[0].call(picture).clone().requires_grad_()  # type: ignore[union-attr,operator]
        grads.append(torch.autograd.grad(net.module(on_grid).sum(), on_grid)[0])
    assert torch.equal(*grads)
    assert grads[0].abs().max() > 0


def test_the_float_twin_stays_within_a_few_steps(shared_data: Shared) -> None:
    path = shared_data("tflite", "vww_96_int8.tflite")
    whole, twin = innersight.open(path), innersight.open(path, arithmetic="float")
    x = whole.read(sorted(shared_data("imagenet", "images").iterdir())[:8]).tensor
    a, b = whole.maps(x, layers=["dense"])["dense"], twin.maps(x, layers=["dense"])["dense"]
    steps = (a - b) / whole.quantisation["dense"].scale[0]  # type: ignore[index]
    assert 0 < np.sqrt((steps**2).mean()) < 4


def test_relevance_of_integers_closes_its_books_with_a_share_for_rounding(shared_data: Shared) -> None:
    net = innersight.open(shared_data("tflite", "pretrainedResnet_quant.tflite"))
    x = net.read(sorted(shared_data("cifar10", "test100_png").iterdir())[:2]).tensor
    s = net.explain(x, method="lrp")
    assert np.max(s.verdict["conservation_error"]) < 1e-4
    assert np.min(np.abs(s.verdict["constant_share"])) > 0
    assert not any("was not applied" in n for n in s.provenance.notes)
    twin = innersight.open(shared_data("tflite", "pretrainedResnet_quant.tflite"), arithmetic="float")
    assert np.max(np.abs(twin.explain(x, method="lrp").verdict["constant_share"])) == 0


@pytest.mark.parametrize("name", ["pretrainedResnet_quant", "vww_96_int8"])
def test_hidden_patches_computed_in_part_have_the_integers_of_whole_runs(shared_data: Shared, name: str) -> None:
    net = innersight.open(shared_data("tflite", f"{name}.tflite"))
    x = net.read(sorted(shared_data("imagenet", "images").iterdir())[:1]).tensor
    size = x.shape[-1]
    boxes = [(i, j, size // 8, size // 8) for i in range(0, size, size // 4) for j in range(0, size, size // 4)]
    hidden = x.repeat(len(boxes), 1, 1, 1)
    for picture, (top, left, h, w) in zip(hidden, boxes, strict=True):
        picture[:, top : top + h, left : left + w] = 0
    with net.engine.session(), torch.no_grad():
        patches = Patches(net.engine, x, 0.0)
        assert torch.equal(patches.run(boxes), net.module(hidden))
        assert patches.skips
        assert patches.share < 0.9


def test_integer_layers_see_what_the_float_file_s_layers_see(shared_data: Shared) -> None:
    whole, real = (
        innersight.open(shared_data("tflite", f"{n}.tflite")) for n in ("pretrainedResnet_quant", "pretrainedResnet")
    )
    shared = [n for n in whole.layers if n in real.layers and whole.layers[n].spatial]
    assert len(shared) > 10
    for name in shared:
        a, b = (net.layers[name].to_json() for net in (whole, real))
        assert (a["receptive_field"], a["grid"]) == (b["receptive_field"], b["grid"]), name
