"""One network in four formats gives the same maps, answers and reasons, whatever file it came from."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import innersight
from innersight.testing import check_network
from tflite_writer import constant, model, op, tensor

SIDE, CLASSES = 14, 5
METHODS = ["gradient", "gradcam", "integrated_gradients", "lrp", "deeplift", "occlusion", "ablationcam", "smoothgrad"]

KERAS = """
import os, sys
os.environ["KERAS_BACKEND"] = "torch"
import keras, numpy as np
w = np.load(sys.argv[1])
net = keras.Sequential([
    keras.layers.Input((14, 14, 3)),
    keras.layers.Conv2D(8, 3, padding="same", activation="relu", name="conv1"),
    keras.layers.MaxPooling2D(2, name="pool"),
    keras.layers.Conv2D(12, 3, activation="relu", name="conv2"),
    keras.layers.GlobalAveragePooling2D(name="mean"),
    keras.layers.Dense(5, name="fc"),
])
for name in ("conv1", "conv2", "fc"):
    kernel = w[name + ".weight"]
    net.get_layer(name).set_weights([kernel.transpose(2, 3, 1, 0) if kernel.ndim == 4 else kernel.T, w[name + ".bias"]])
net.save(sys.argv[2])
net.save(sys.argv[3])
"""


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 12, 3)
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x):
        x = nn.functional.max_pool2d(torch.relu(self.conv1(x)), 2)
        return self.fc(torch.relu(self.conv2(x)).mean((2, 3)))


def tflite(weights):
    """The same in TFLite: channels last, weights (out, h, w, in), activations fused."""
    x = tensor("input", (1, SIDE, SIDE, 3))
    values = [tensor("conv1", (1, SIDE, SIDE, 8)), tensor("pool", (1, SIDE // 2, SIDE // 2, 8)),
              tensor("conv2", (1, 5, 5, 12)), tensor("mean", (1, 12)), tensor("fc", (1, CLASSES))]  # fmt: skip
    conv1, pool, conv2, mean, fc = values

    def given(name):
        kernel = weights[f"{name}.weight"]
        kernel = kernel.transpose(0, 2, 3, 1) if kernel.ndim == 4 else kernel
        return constant(f"{name}/kernel", kernel.copy()), constant(f"{name}/bias", weights[f"{name}.bias"])

    steps = [
        op("CONV_2D", [x, *given("conv1")], [conv1], padding=0, stride_w=1, stride_h=1, activation=1),
        op("MAX_POOL_2D", [conv1], [pool], padding=1, stride_w=2, stride_h=2, filter_w=2, filter_h=2),
        op("CONV_2D", [pool, *given("conv2")], [conv2], padding=1, stride_w=1, stride_h=1, activation=1),
        op("MEAN", [conv2, constant("axes", np.array([1, 2], np.int32))], [mean]),
        op("FULLY_CONNECTED", [mean, *given("fc")], [fc]),
    ]
    return model(steps, [x], [fc])


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    for package in ("h5py", "onnx", "keras"):  # not imported: Keras would bring TensorFlow along
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    folder = tmp_path_factory.mktemp("formats")
    torch.manual_seed(0)
    module = Network().eval()
    weights = {k: v.numpy() for k, v in module.state_dict().items()}
    np.savez(folder / "weights.npz", **weights)
    files = [str(folder / f"net.{suffix}") for suffix in ("keras", "h5")]
    quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-c", KERAS, str(folder / "weights.npz"), *files], check=True, env=quiet)
    (folder / "net.tflite").write_bytes(tflite(weights))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, torch.zeros(1, 3, SIDE, SIDE), str(folder / "net.onnx"), dynamo=False,
                          dynamic_axes={"input": {0: "n"}}, input_names=["input"])  # fmt: skip
    opened = {"torch": innersight.open(module, input_shape=(3, SIDE, SIDE))}
    return opened | {s: innersight.open(folder / f"net.{s}") for s in ("keras", "h5", "onnx", "tflite")}


@pytest.fixture(scope="module")
def pictures():
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


OTHERS = ["keras", "h5", "onnx", "tflite"]


def near(found, right, tolerance=1e-4):
    assert found.shape == right.shape
    assert np.abs(found - right).max() <= tolerance * np.abs(right).max()


@pytest.mark.parametrize("name", OTHERS)
def test_every_format_is_a_network_like_any_other(networks, pictures, name):
    assert networks[name].input_shape == (3, SIDE, SIDE)
    check_network(networks[name], pictures)


@pytest.mark.parametrize("name", OTHERS)
def test_answers_and_maps_are_the_same(networks, pictures, name):
    a, b = networks["torch"], networks[name]
    near(b.predict(pictures).logits, a.predict(pictures).logits)
    wanted = [a.maps(pictures, [layer])[layer] for layer in ("relu", "max_pool2d", "relu_1")]
    maps = b.maps(pictures)
    for values in wanted:  # whatever the layers are called there
        same = [m for m in maps.values() if m.shape == values.shape and np.allclose(m, values, atol=1e-4)]
        assert same
    fields = {str(layer.receptive_field) for layer in b.layers.values() if layer.grid}
    assert {str(a.layers[n].receptive_field) for n in ("relu", "max_pool2d", "relu_1")} <= fields


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", OTHERS)
def test_reasons_are_the_same(networks, pictures, name, method):
    found = {
        n: networks[n].explain(pictures, method, target=2, **({"layer": None} if "cam" in method else {}))
        for n in ("torch", name)
    }
    near(found[name].values, found["torch"].values)
    assert found[name].verdict["score"] == pytest.approx(found["torch"].verdict["score"], rel=1e-4)


def test_compare_pairs_the_layers_of_all(networks, pictures):
    for name in OTHERS:
        found = innersight.compare(networks["torch"], networks[name], pictures, method=None)
        assert found.first_divergence is None
        assert min(layer.cosine for layer in found.layers.values()) > 1 - 1e-6
        assert len(found.layers) >= 5


def test_what_one_file_says_of_pictures_holds_beside_it_for_one_that_does_not(networks, tmp_path):
    from PIL import Image

    from innersight.network import prepared_alike

    silent = networks["tflite"]
    stated = innersight.open(Network().eval(), preprocess={"size": (SIDE, SIDE), "mean": (0.5,), "std": (0.25,)})
    a, b = prepared_alike([silent, stated])
    assert a.preprocess == stated.preprocess
    assert b is stated
    assert any("pictures are prepared as for Network" in note for note in a.notes)
    assert not any("0..1 is assumed" in note for note in a.notes)
    assert any("0..1 is assumed" in note for note in silent.notes)
    Image.fromarray(np.arange(SIDE * SIDE * 3, dtype=np.uint8).reshape(SIDE, SIDE, 3)).save(tmp_path / "p.png")
    found = innersight.compare(silent, stated, tmp_path / "p.png", method=None)
    assert not any("What they are fed differs" in line for line in found.words())
    other = innersight.open(Network().eval(), input_shape=(3, 20, 20), preprocess={"size": (20, 20)})
    assert prepared_alike([silent, other])[0] is silent
