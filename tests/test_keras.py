"""Keras files and models open as Keras computes them: against TensorFlow, tf.keras 2 and Keras on torch.

Each engine runs in a process of its own (`keras_models.py`) that saves models and the values of their layers.
"""

from __future__ import annotations

import copy
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import innersight
from innersight.network import Network
from innersight.observe.passes import Request
from innersight.testing import check_network
from keras_models import FAMILIES

SCRIPT = Path(__file__).with_name("keras_models.py")
ENGINES = ("tensorflow", "tf_keras", "torch")
CIFAR = "airplane automobile bird cat deer dog frog horse ship truck".split()


def started(folder: Path, engine: str, *families: str) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), engine, str(folder), *families]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen) -> str:
    """What the process complained about; its failure is the test's."""
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said[-2000:]
    return "\n".join(line for line in said.splitlines() if ": not " in line or "cannot build" in line)


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, str]]:
    """`recorded("tensorflow")` is the folder of that engine's models and what it could not make."""
    folders = {engine: tmp_path_factory.mktemp(engine) for engine in ENGINES}
    running = {engine: started(folder, engine) for engine, folder in folders.items()}
    said: dict[str, str] = {}

    def wait(engine: str) -> tuple[Path, str]:
        if engine not in said:
            said[engine] = finished(running[engine])
        return folders[engine], said[engine]

    return wait


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files we wrote ourselves are read in this process: hundreds are opened. Others have tests of their own."""
    from innersight.formats import keras
    from keras_reading import read_here

    monkeypatch.setattr(keras, "read", read_here)


def as_input(x: np.ndarray, case: str = "") -> torch.Tensor:
    """What Keras was given, as a network of innersight takes it: channels on axis 1."""
    tensor = torch.from_numpy(x)
    if case.startswith("first_"):
        return tensor
    if tensor.dim() == 2:
        channels = next(c for c in (1, 3) if math.isqrt(tensor.shape[1] // c) ** 2 * c == tensor.shape[1])
        side = math.isqrt(tensor.shape[1] // channels)
        tensor = tensor.reshape(len(x), side, side, channels)
    elif tensor.dim() == 3 and not re.search("1[dD]|causal", case):
        return tensor.unsqueeze(1)
    return tensor.movedim(-1, 1)


def off(value: torch.Tensor, wanted: np.ndarray) -> float:
    """The largest difference, in parts of the largest value; a value may stand in Keras's order or with channels first.

    No two sides of the models are equal, so that only one of them fits.
    """
    turned = value.movedim(1, -1) if value.dim() > 2 else value
    for have in (turned, value):
        if tuple(have.shape) == wanted.shape:
            return float(np.abs(have.detach().numpy() - wanted).max() / max(np.abs(wanted).max(), 1e-30))
    return math.inf


def differences(path: Path, values: dict[str, np.ndarray], double: bool = False) -> dict[str, float]:
    """For each layer of a file how far its value is from Keras's."""
    net = innersight.open(path)
    x = as_input(values["x"], path.stem)
    if double:
        net, x = net._with_module(copy.deepcopy(net.module).double()), x.double()
    names = {key: key.removeprefix("layer:").replace("#", "_") for key in values if key != "x"}
    recording = net.engine.recording(x)
    names = {key: name for key, name in names.items() if recording.find(name).kind != "input"}
    found = net.engine.run(x, Request(read=list(names.values()))).values
    return {name: off(found[name], values[key]) for key, name in names.items()}


# Where Keras on torch computes something else than TensorFlow, which is followed.
TORCH_DIFFERS = {"average_same_1", "average_same_2", "average_same_3", "resizing_bicubic", "upsampling_bicubic"}


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.usefixtures("here")
def test_every_layer_of_every_class_has_the_value_of_keras(
    recorded: Callable[[str], tuple[Path, str]], engine: str, suffix: str
) -> None:
    folder, _ = recorded(engine)
    compared, wrong = 0, []
    for path in sorted(folder.glob(f"*{suffix}")):
        if engine == "torch" and path.stem in TORCH_DIFFERS:
            continue
        with np.load(path.with_suffix(".npz")) as values:
            found = differences(path, dict(values))
        compared += len(found)
        wrong += [(path.name, name, error) for name, error in found.items() if not error < 1e-5]
    assert not wrong
    assert compared > 350


@pytest.mark.parametrize("name", ["nested_deep.h5", "sequential_inside.keras", "transfer_tf.h5", "two_outputs.keras"])
@pytest.mark.usefixtures("here")
def test_small_networks_pass_the_checks_of_every_network(
    recorded: Callable[[str], tuple[Path, str]], name: str
) -> None:
    assert "the gradient equals finite differences" in check_network(innersight.open(recorded("tensorflow")[0] / name))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("style", ["tf", "torch", "caffe"])
@pytest.mark.usefixtures("here")
def test_pixels_are_given_to_a_network_that_scales_them_by_arithmetic(
    recorded: Callable[[str], tuple[Path, str]], engine: str, style: str
) -> None:
    path = recorded(engine)[0] / f"transfer_{style}.h5"
    if engine == "torch" and style == "caffe":
        assert not path.exists()  # Keras on torch knows no negative steps
        return
    net = innersight.open(path)
    assert net.preprocess is not None
    assert net.preprocess.scale == 1
    assert any("pixels 0..255" in note for note in net.notes)
    assert "base/c1" in net.layers


def test_keras_could_make_nearly_all_of_the_models(recorded: Callable[[str], tuple[Path, str]]) -> None:
    for engine in ENGINES:
        _, said = recorded(engine)
        missing = {line.partition(":")[0] for line in said.splitlines()}
        # LayerNormalization over rows fails in Keras on torch; tf.keras 2 cannot write an ellipsis into a .keras file.
        # RMSNormalization is of Keras 3 alone, ThresholdedReLU of tf.keras 2.
        assert missing <= {"layer_norm_rows", "op_index.keras", "transfer_caffe.keras", "rms_norm", "thresholded"}, said


# --- whole networks --------------------------------------------------------------------------------------------------

QUICK = ("MobileNetV2", "MobileNetV3Small")


@pytest.fixture(scope="session")
def application(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`application("VGG16")` is a folder that holds that family, in double precision."""
    folder = tmp_path_factory.mktemp("applications")

    def make(family: str) -> Path:
        if not (folder / f"{family}.npz").exists():
            finished(started(folder, "tensorflow", *(QUICK if family in QUICK else [family])))
        return folder

    return make


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("here")
def test_a_family_of_keras_applications(application: Callable[[str], Path], family: str) -> None:
    """In double precision, where what is left is no rounding. All but two run where INNERSIGHT_SLOW is set."""
    if family not in QUICK and not os.environ.get("INNERSIGHT_SLOW"):
        pytest.skip("slow; set INNERSIGHT_SLOW=1 to run it")
    folder = application(family)
    with np.load(folder / f"{family}.npz") as values:
        wanted = dict(values)
    for suffix in (".keras", ".h5"):
        found = differences(folder / f"{family}{suffix}", wanted, double=True)
        assert len(found) > 18
        assert max(found.values()) < 1e-7, suffix  # the gelu of TensorFlow itself is off by 2e-9
        rounded = differences(folder / f"{family}{suffix}", wanted)
        print(f"{family}{suffix}: {max(found.values()):.1e} in double, {max(rounded.values()):.1e} in single precision")


@pytest.fixture(scope="module")
def resnet(shared_data: Callable[..., Path]) -> Network:
    """MLPerf Tiny's ResNet-8, trained on CIFAR-10, written by tf.keras 2; it takes pixels 0..255."""
    return innersight.open(shared_data("keras", "pretrainedResnet.h5"), preprocess={"scale": 1}, labels=CIFAR)


@pytest.fixture(scope="module")
def pictures(shared_data: Callable[..., Path]) -> list[Path]:
    return sorted(shared_data("cifar10", "test100_png").rglob("*.png"))


def test_the_trained_resnet_is_right_as_often_as_published(resnet: Network, pictures: list[Path]) -> None:
    wanted = [CIFAR.index(re.sub(r"\d", "", path.stem)) for path in pictures]
    assert (resnet.predict(pictures).logits.argmax(1) == wanted).sum() == 92


@pytest.mark.parametrize("parts", [("keras", "vww_96.h5"), ("keras", "tiny_vgg", "tiny_vgg.keras")])
def test_real_files_pass_the_checks_of_every_network(shared_data: Callable[..., Path], parts: tuple[str, ...]) -> None:
    done = check_network(innersight.open(shared_data(*parts)))
    assert "the gradient equals finite differences" in done


def test_the_resnet_passes_the_checks(resnet: Network, pictures: list[Path]) -> None:
    assert "the gradient equals finite differences" in check_network(resnet, pictures[:3])


class ByHand(nn.Module):
    """The same ResNet-8 as anybody would write it in torch, with the weights as h5py reads them."""

    def __init__(self, path: Path):
        import h5py

        super().__init__()
        with h5py.File(path) as file:
            read = lambda layer, name: torch.from_numpy(file["model_weights"][layer][layer][f"{name}:0"][()])  # noqa: E731
            labels = [""] + [f"_{i}" for i in range(1, 9)]
            self.convs = nn.ModuleList()
            for label in labels:
                kernel = read(f"conv2d{label}", "kernel").permute(3, 2, 0, 1)
                conv = nn.Conv2d(kernel.shape[1], kernel.shape[0], kernel.shape[2])
                conv.weight.data, conv.bias.data = kernel.contiguous(), read(f"conv2d{label}", "bias")
                self.convs.append(conv)
            self.norms = nn.ModuleList()
            for label in labels[:7]:
                values = [read(f"batch_normalization{label}", n) for n in ("gamma", "beta", "moving_mean",
                                                                           "moving_variance")]  # fmt: skip
                norm = nn.BatchNorm2d(len(values[0]), eps=1e-3)
                norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var = values
                self.norms.append(norm)
            self.dense = nn.Linear(64, 10)
            self.dense.weight.data, self.dense.bias.data = read("dense", "kernel").T.contiguous(), read("dense", "bias")
        self.requires_grad_(False)
        self.eval()

    def conv(self, i: int, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        conv = self.convs[i]
        if conv.kernel_size == (3, 3):
            x = F.pad(x, (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1))
        return F.conv2d(x, conv.weight, conv.bias, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norms[0](self.conv(0, x)))
        y = F.relu(self.norms[1](self.conv(1, x)))
        x = F.relu(x + self.norms[2](self.conv(2, y)))
        for conv, norm in ((3, 3), (6, 5)):
            y = F.relu(self.norms[norm](self.conv(conv, x, 2)))
            x = F.relu(self.conv(conv + 2, x, 2) + self.norms[norm + 1](self.conv(conv + 1, y)))
        x = F.avg_pool2d(x, 8).flatten(1)
        return F.softmax(self.dense(x), -1)


METHODS = {
    "gradcam": {}, "ablationcam": {}, "occlusion": {"window": 8, "stride": 4}, "lrp": {}, "deeplift": {},
    "integrated_gradients": {"steps": 8},
}  # fmt: skip


@pytest.mark.parametrize(("method", "options"), METHODS.items())
def test_methods_agree_with_the_network_written_by_hand(
    resnet: Network, pictures: list[Path], shared_data: Callable[..., Path], method: str, options: dict[str, Any]
) -> None:
    hand = innersight.open(
        ByHand(shared_data("keras", "pretrainedResnet.h5")), preprocess=resnet.preprocess, labels=CIFAR
    )
    chosen = [pictures[i] for i in (3, 40, 77)]
    np.testing.assert_allclose(hand.predict(chosen).logits, resnet.predict(chosen).logits, atol=1e-5)
    if "cam" in method:
        last = [name for name in hand.layers if "relu" in name][-1]
        ours = resnet.explain(chosen, method=method, layer="activation_6", **options).values
        theirs = hand.explain(chosen, method=method, layer=last, **options).values
    else:
        ours = resnet.explain(chosen, method=method, **options).values
        theirs = hand.explain(chosen, method=method, **options).values
    assert np.abs(ours).max() > 0
    assert np.abs(ours - theirs).max() <= 1e-3 * np.abs(theirs).max()


def test_eight_maps_of_a_layer_in_a_grid(
    resnet: Network, pictures: list[Path], shared_data: Callable[..., Path], tmp_path: Path
) -> None:
    maps = resnet.maps(pictures[0], "conv2d")
    hand = ByHand(shared_data("keras", "pretrainedResnet.h5")).conv(0, resnet.read(pictures[0]).tensor)
    np.testing.assert_allclose(maps["conv2d"], hand.detach().numpy(), rtol=1e-5, atol=1e-3)
    (written,) = maps.save(tmp_path / "maps.png", columns=4, limit=8)
    with Image.open(written) as picture:
        width, height = picture.size
    assert 1.5 < width / height < 3  # two rows of four, beside the picture
