"""Comparing real files: float against int8, and one network in two formats; and the command line."""

import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import innersight
from innersight.cli import main

PIXELS = {"scale": 1}  # 0..255, as this network takes them


def run(*args):
    return CliRunner().invoke(main, [str(a) for a in args], catch_exceptions=False)


@pytest.fixture(scope="module")
def resnet8(shared_data):
    """A float network and its int8 twin over 20 pictures of CIFAR-10."""
    place = shared_data("tflite")
    pictures = sorted(shared_data("cifar10", "test100_png").glob("*.png"))[::5]
    a = innersight.open(place / "pretrainedResnet.tflite", preprocess=PIXELS)
    b = innersight.open(place / "pretrainedResnet_quant.tflite")
    return a, b, pictures, innersight.compare(a, b, pictures)


def test_every_layer_of_an_int8_file_has_its_float_counterpart(resnet8):
    _, _, _, c = resnet8
    assert len(c.only_b) == 1  # the input, made integers
    assert len(c.layers) == 15
    assert all(row.a == row.b for row in c.layers.values())
    assert c.inputs_sqnr == np.inf
    assert all(18 < row.sqnr < 40 for row in c.layers.values())  # eight bits: 6 dB each, less what depth costs
    assert all(row.quantised[0] is None and row.quantised[1].startswith("int8") for row in c.layers.values())
    assert c.predictions.agreement >= 0.9
    assert np.nanmedian(c.reasons.correlation) > 0.95


def test_numbers_of_the_int8_file_are_those_of_plain_numpy(resnet8):
    a, b, pictures, c = resnet8
    for name in ("conv2d", "activation_4", "conv2d_7"):
        p, q = (n.maps(pictures, layers=[name])[name].astype(np.float64) for n in (a, b))
        assert c.layers[name].sqnr == pytest.approx(10 * np.log10((p**2).sum() / ((p - q) ** 2).sum()), abs=1e-4)
        step = b.quantisation[name]
        whole = np.rint(q / step.scale[0]) + step.zero_point
        cut = (whole >= step.hi).mean() + (0 if step.lo == step.zero_point else (whole <= step.lo).mean())
        assert c.layers[name].saturation[1] == pytest.approx(cut, abs=1e-9)


def test_wrong_preprocessing_is_said(shared_data, resnet8):
    _, b, pictures, _ = resnet8
    a = innersight.open(shared_data("tflite", "pretrainedResnet.tflite"), preprocess={"size": (32, 32)})  # 0..1
    c = innersight.compare(a, b, pictures[:4], method=None)
    assert c.first_divergence.layer.a == "conv2d"
    assert any(sentence.startswith("What they are fed differs") for sentence in c.words())


def test_integers_dumped_by_a_device_agree_with_the_host(resnet8, tmp_path):
    """Stored int8 tensors with channels last, as TFLite-Micro holds them."""
    _, b, pictures, _ = resnet8
    names = [n for n in b.layers if n in b.quantisation and b.layers[n].grid is not None]
    held = {}
    for name, values in b.maps(pictures[:3], layers=names).items():
        step = b.quantisation[name]
        whole = np.rint(values / np.float32(step.scale[0])) + step.zero_point
        held[name] = np.moveaxis(whole, 1, 3).astype(np.int8)
    np.savez(tmp_path / "device.npz", **held)
    c = innersight.compare(b, tmp_path / "device.npz", pictures[:3])
    assert set(c.layers) == set(names)
    assert min(row.sqnr for row in c.layers.values()) > 120
    held["conv2d_3"][0, 2, 2, 5] += 9  # a kernel that errs once
    np.savez(tmp_path / "device.npz", **held)
    c = innersight.compare(b, tmp_path / "device.npz", pictures[:3])
    low = min(c.layers.values(), key=lambda row: row.sqnr)
    assert low.a == "conv2d_3"
    assert low.worst(1)[0][0] == 5
    assert low.largest == pytest.approx(9 * b.quantisation["conv2d_3"].scale[0], rel=1e-4)


ANOTHER_RUNTIME = """
import sys
import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType

model, inputs, out = sys.argv[1:]
runs = Interpreter(model, experimental_op_resolver_type=OpResolverType.BUILTIN_REF,
                   experimental_preserve_all_tensors=True)
runs.allocate_tensors()
found = {}
for x in np.load(inputs):
    runs.set_tensor(runs.get_input_details()[0]["index"], x[None])
    runs.invoke()
    for tensor in runs.get_tensor_details():
        try:
            found.setdefault(tensor["name"], []).append(runs.get_tensor(tensor["index"]).copy())
        except ValueError:
            pass
np.savez(out, **{k: np.concatenate(v) if v[0].ndim and len(v[0]) == 1 else v[0] for k, v in found.items()})
"""


def test_all_tensors_of_another_runtime_are_found_by_their_names_and_equal(shared_data, resnet8, tmp_path):
    """LiteRT's reference kernels: int8, channels last, TFLite's own names, weights and biases among them."""
    pytest.importorskip("ai_edge_litert")
    _, _, pictures, _ = resnet8
    file = shared_data("tflite", "pretrainedResnet_quant.tflite")
    pixels = np.stack([np.asarray(Image.open(p).convert("RGB")) for p in pictures[:5]])
    np.save(tmp_path / "x.npy", (pixels.astype(int) - 128).astype(np.int8))
    args = [sys.executable, "-c", ANOTHER_RUNTIME, str(file), str(tmp_path / "x.npy"), str(tmp_path / "other.npz")]
    subprocess.run(args, check=True, capture_output=True)
    net = innersight.open(file, arithmetic="litert")
    c = innersight.compare(net, tmp_path / "other.npz", pictures[:5])
    assert list(c.layers) == list(net.layers)
    assert all(row.equal for row in c.layers.values())
    assert c.layers["conv2d"].b.startswith("model/activation/Relu;model/batch_normalization/FusedBatchNormV3;")
    assert c.predictions.agreement == 1
    assert dict(c.only_b)["model/conv2d/Conv2D"] == "its shape is 16x3x3x3, and there are 5 images"
    assert max(map(len, str(c.layers).splitlines())) < 300  # names are shortened in the table


def test_a_keras_file_and_its_tflite_file_differ_by_rounding(shared_data):
    a = innersight.open(shared_data("keras", "pretrainedResnet.h5"), preprocess=PIXELS)
    b = innersight.open(shared_data("tflite", "pretrainedResnet.tflite"), preprocess=PIXELS)
    pictures = sorted(shared_data("cifar10", "test100_png").glob("*.png"))[:8]
    c = innersight.compare(a, b, pictures)
    assert not c.only_b  # every layer of the converted file is found, with BatchNorm and ReLU folded in or not
    assert min(row.sqnr for row in c.layers.values()) > 100
    assert c.layers["activation"].b == "conv2d"
    assert c.layers["dense"].b == "softmax_0"  # the namesake holds the scores in front of the softmax
    assert c.predictions.agreement == 1
    assert "They differ by rounding" in str(c)


def test_an_onnx_file_and_pytorch_weights_are_one_network(shared_data):
    a = innersight.open("torchvision:squeezenet1_1", weights=shared_data("torch", "squeezenet1_1_imagenet.pth"))
    caffe = {
        "size": (224, 224),
        "resize_to": 256,
        "scale": 1,
        "mean": (104, 117, 123),
        "std": (1,) * 3,
        "channels": "BGR",
    }
    b = innersight.open(shared_data("onnx", "SqueezeNet_fp32_upcast.onnx"), preprocess=caffe)
    pictures = sorted(shared_data("imagenet", "images").iterdir())[:2]
    c = innersight.compare(a, b, pictures)
    assert not c.only_a
    assert [name for name, _ in c.only_b] == ["softmaxout_1"]
    assert c.layers["features.3.squeeze"].b.startswith("fire2/squeeze1x1")
    assert min(row.sqnr for row in c.layers.values()) > 100
    assert c.predictions.agreement == 1
    assert np.nanmin(c.reasons.correlation) > 0.99


# ---------------------------------------------------------------------------------------------------------------------
# The command line


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two exported networks of one kind, and pictures."""
    from test_compare import small

    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i in range(2):
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(tmp_path / "pictures" / f"{i}.png")
    for name, seed in (("a", 0), ("b", 1)):
        module = small()
        with torch.no_grad():
            module.fc.weight += seed * 0.1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it will go one day
            torch.jit.trace(module, torch.zeros(1, 3, 16, 16)).save(tmp_path / f"{name}.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


OPEN = ("--input-shape", "3x16x16")


def test_the_command_prints_a_table_and_writes_a_page(folder):
    result = run("compare", "a.pt", "b.pt", "pictures", *OPEN, "--out", "c.html", "--out", "c.csv")
    assert result.exit_code == 0, result.output
    assert "SQNR dB" in result.output
    assert "wrote c.html" in result.output
    assert (folder / "c.html").read_text().startswith("<!DOCTYPE html>")
    assert (folder / "c.csv").read_text().startswith("a,b,kind_a")


def test_the_command_prints_json(folder):
    assert folder
    result = run("compare", "a.pt", "b.pt", "pictures", *OPEN, "--method", "none", "--json", "--out", "c.json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["first_difference"] == record["layers"][-1]["a"]
    assert record["reasons"] is None
    assert record["files"] == ["c.json"]


def test_the_command_takes_a_dump(folder):
    assert folder
    innersight.dump(innersight.open("a.pt", input_shape=(3, 16, 16)), "pictures", "device.npz")
    result = run("compare", "a.pt", "device.npz", "pictures", *OPEN)
    assert result.exit_code == 0, result.output
    assert "equal, bit for bit" in result.output
    result = run("compare", "device.npz", "device.npz")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("a.pt", "none.npz", "pictures"), "there is no file none.npz"),
        (("a.pt", "none.pt", "pictures"), "there is no file none.pt"),
        (("a.pt", "b.pt", "none.png"), "none.png"),
        (("a.pt", "b.pt", "pictures", "--out", "c.txt"), "unknown suffix '.txt'"),
        (("a.pt", "b.pt", "pictures", "--out", "none/c.html"), "there is no folder"),
        (("a.pt", "b.pt", "pictures", "--method", "gradcamm"), "did you mean gradcam"),
        (("a.pt", "b.pt", "pictures", "--layer", "nothing"), "no layer 'nothing'"),
        (("a.pt", "b.pt"), "no images were given"),
        (("a.pt",), "MODEL_B"),
    ],
)
def test_bad_input_ends_with_2_and_one_sentence(folder, args, said):
    assert folder
    result = run("compare", *args, *OPEN)
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("innersight: ")]
    assert said.lower() in line.lower()
