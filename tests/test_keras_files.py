"""What is refused, and how: damaged, oversized and hostile Keras files, layers that are not known, odd configurations.

The files are written here with h5py and zipfile alone: neither Keras nor TensorFlow is needed to make one.
"""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import innersight
from innersight.errors import InputError, Unsupported
from innersight.formats import keras, keras_file, keras_layers
from innersight.formats.keras import open_keras
from innersight.observe.passes import Request
from keras_reading import read_here

Layers = list[dict[str, Any]]


def weights_of(seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return {
        "conv": {"kernel": rng.normal(size=(3, 3, 3, 4)).astype("f"), "bias": rng.normal(size=4).astype("f")},
        "dense": {"kernel": rng.normal(size=(144, 2)).astype("f"), "bias": rng.normal(size=2).astype("f")},
    }


def layer(kind: str, name: str, **config: Any) -> dict[str, Any]:
    return {"module": "keras.layers", "class_name": kind, "config": {"name": name, "trainable": True, **config},
            "registered_name": None}  # fmt: skip


def chain(*between: dict[str, Any], shape: tuple[int, ...] = (8, 8, 3)) -> Layers:
    return [
        layer("InputLayer", "picture", batch_shape=[None, *shape]),
        layer("Conv2D", "conv", filters=4, kernel_size=[3, 3], activation="relu"),
        *between,
        layer("Flatten", "flatten"),
        layer("Dense", "dense", units=2, activation="softmax"),
    ]


def sequential(layers: Layers, **more: Any) -> dict[str, Any]:
    return {"module": "keras", "class_name": "Sequential", "config": {"name": "small", "layers": layers}, **more}


def write_keras(path: Path, config: Any, weights: Any = None, first: str = "conv2d") -> Path:
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        for name, arrays in {first: "conv", "dense": "dense"}.items():
            group = file.create_group(f"layers/{name}/vars")
            group.attrs["name"] = arrays
            for i, array in enumerate((weights or weights_of())[arrays].values()):
                group.create_dataset(str(i), data=array)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": "3.15.1"}))
        archive.writestr("config.json", config if isinstance(config, str) else json.dumps(config))
        archive.writestr("model.weights.h5", content.getvalue())
    return path


def write_h5(path: Path, config: Any, weights: dict[str, dict[str, np.ndarray]] | None = None) -> Path:
    weights = weights or weights_of()
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = config if isinstance(config, str) else json.dumps(config)
        file.attrs["keras_version"] = "2.4.0"
        group = file.create_group("model_weights")
        group.attrs["layer_names"] = [name.encode() for name in weights]
        for name, arrays in weights.items():
            own = group.create_group(name)
            own.attrs["weight_names"] = [f"{name}/{key}:0".encode() for key in arrays]
            for key, array in arrays.items():
                own.create_dataset(f"{name}/{key}:0", data=array)
    return path


WRITERS = {".keras": write_keras, ".h5": write_h5}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read in this process: for what goes wrong, or right, after reading."""
    monkeypatch.setattr(keras, "read", read_here)


@pytest.fixture(params=WRITERS)
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Path]:
    """`written(layers)`: a Sequential of those layers, as a file of either kind."""
    return lambda layers, **more: WRITERS[request.param](tmp_path / f"small{request.param}", sequential(layers), **more)


def by_hand(x: torch.Tensor) -> torch.Tensor:
    arrays = {layer: {k: torch.from_numpy(v) for k, v in own.items()} for layer, own in weights_of().items()}
    conv, dense = arrays["conv"], arrays["dense"]
    y = torch.relu(torch.nn.functional.conv2d(x, conv["kernel"].permute(3, 2, 0, 1), conv["bias"]))
    return torch.softmax(y.permute(0, 2, 3, 1).flatten(1) @ dense["kernel"] + dense["bias"], -1)


def test_a_small_file_opens_quickly_and_computes_what_it_says(written: Callable[..., Path]) -> None:
    net = innersight.open(written(chain()))
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(net.predict(x).logits, by_hand(x).numpy(), atol=1e-5)
    assert [f"{name} {net.layers[name].kind}" for name in net.layers] == [
        "conv.conv2d conv2d", "conv Conv2D", "dense.linear linear", "dense Dense",
    ]  # fmt: skip
    assert net.maps(x, "conv")["conv"].min() == 0  # with its activation
    assert net.input_shape == (3, 8, 8)


@pytest.mark.usefixtures("here")
def test_what_was_found_is_said(written: Callable[..., Path]) -> None:
    notes = " | ".join(innersight.open(written(chain())).notes)
    assert "Sequential model of Keras" in notes
    assert "values 0..1 are assumed; preprocess= says another" in notes
    assert "softmax: probabilities" in notes


def test_pixels_are_given_where_the_network_scales_them_itself(tmp_path: Path) -> None:
    layers = chain()
    layers.insert(1, layer("Rescaling", "scale", scale=1 / 255, offset=0.0))
    net = innersight.open(write_keras(tmp_path / "scaled.keras", sequential(layers)))
    assert net.preprocess is not None
    assert net.preprocess.scale == 1
    assert any("is for pixels 0..255" in note for note in net.notes)
    white = np.full((8, 8, 3), 255, np.uint8)
    expected = by_hand(torch.ones(1, 3, 8, 8)).numpy()
    np.testing.assert_allclose(net.predict(white).logits, expected, atol=1e-5)


def test_a_rescaling_of_values_that_are_no_pixels_is_left_alone(tmp_path: Path) -> None:
    layers = chain()
    layers.insert(1, layer("Rescaling", "scale", scale=2.0, offset=-1.0))
    net = innersight.open(write_keras(tmp_path / "scaled.keras", sequential(layers)))
    assert net.preprocess is not None
    assert net.preprocess.scale == pytest.approx(1 / 255)


# --- classes of the user's own ---------------------------------------------------------------------------------------


class Times(torch.nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[1:] == (4, 6, 6)  # channels first
        return x * self.factor


def test_a_module_stands_for_a_class_of_the_users_own(written: Callable[..., Path]) -> None:
    mine = {**layer("Times", "times", factor=1.0), "module": "my.layers", "registered_name": "my>Times"}
    path = written(chain(mine))
    with pytest.raises(Unsupported, match=r"'Times' 'times' is not a layer that innersight knows.*custom="):
        innersight.open(path)
    net = innersight.open(path, custom={"Times": lambda config, _: Times(config["factor"])})
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(net.predict(x).logits, by_hand(x).numpy(), atol=1e-5)
    assert net.layers["times"].kind == "Times"
    assert net.maps(x, "times")["times"].shape == (2, 4, 6, 6)


class Corner(torch.nn.Module):
    """A convolution, as a user would write it for a Keras layer with a kernel (height, width, in, out)."""

    def __init__(self, kernel: torch.Tensor, bias: torch.Tensor):
        super().__init__()
        self.kernel, self.bias = torch.nn.Parameter(kernel.permute(3, 2, 0, 1)), torch.nn.Parameter(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(torch.nn.functional.conv2d(x, self.kernel, self.bias))


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_class_of_the_users_own_gets_its_weights(tmp_path: Path, suffix: str) -> None:
    layers = chain()
    layers[1] |= {"module": "my", "class_name": "MyCorner", "registered_name": "my>MyCorner"}
    path, config = tmp_path / f"own{suffix}", sequential(layers)
    path = write_keras(path, config, first="my_corner") if suffix == ".keras" else write_h5(path, config)
    net = innersight.open(path, custom={"MyCorner": lambda _, weights: Corner(*weights)})
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(net.predict(x).logits, by_hand(x).numpy(), atol=1e-5)
    assert net.layers["conv"].kind == "MyCorner"
    with pytest.raises(InputError, match=r"custom=\{'MyCorner': ...\} failed for 'conv': KeyError"):
        innersight.open(path, custom={"MyCorner": lambda config, _: config["gone"]})


def test_a_module_stands_for_an_activation_of_the_users_own(written: Callable[..., Path]) -> None:
    layers = chain()
    layers[1]["config"]["activation"] = {"module": "builtins", "class_name": "function", "config": "swirl"}
    net = innersight.open(written(layers), custom={"swirl": lambda *_: torch.nn.ReLU()})
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(net.predict(x).logits, by_hand(x).numpy(), atol=1e-5)


@pytest.mark.usefixtures("here")
def test_weights_that_are_not_understood_are_not_passed_over(written: Callable[..., Path]) -> None:
    layers = chain()
    layers[1]["config"]["use_bias"] = False
    with pytest.raises(Unsupported, match="Conv2D 'conv' has more weights than are known of its kind"):
        innersight.open(written(layers))
    policy = {"module": "keras", "class_name": "QuantizedDTypePolicy", "config": {"name": "int8_from_float32"}}
    layers = chain()
    layers[-1]["config"]["dtype"] = policy
    with pytest.raises(Unsupported, match=r"Dense 'dense' is quantised by Keras \(int8_from_float32\)"):
        innersight.open(written(layers))


def test_a_class_of_another_package_is_not_taken_for_keras_own(tmp_path: Path) -> None:
    layers = chain()
    layers[1]["module"] = "os"
    with pytest.raises(Unsupported, match="'Conv2D' 'conv' is not a layer that innersight knows"):
        open_keras(write_keras(tmp_path / "other.keras", sequential(layers)))


def test_a_lambda_is_refused_and_not_run(written: Callable[..., Path]) -> None:
    code = layer("Lambda", "surprise", function={"class_name": "__lambda__", "config": {"code": "AAAA"}})
    with pytest.raises(Unsupported, match=r"Lambda 'surprise' holds Python code.*does not run.*ONNX"):
        innersight.open(written(chain(code)))


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (layer("LSTM", "rnn", units=3), "LSTM 'rnn' is a kind of layer that innersight does not open"),
        (layer("QuantConv2D", "q"), "'QuantConv2D' 'q' is not a layer that innersight knows"),
        (layer("Activation", "act", activation="mine"), "Activation 'act' has the activation 'mine'"),
        (layer("UpSampling2D", "up", size=2, interpolation="lanczos5"), "interpolation='lanczos5'; innersight knows"),
        (layer("MaxPooling2D", "pool", pool_size="two"), "pool_size='two'; expected 2 whole numbers"),
        (layer("Reshape", "r", target_shape=None), "target_shape=None; expected whole numbers"),
    ],
)
@pytest.mark.usefixtures("here")
def test_what_is_not_known_is_named(written: Callable[..., Path], entry: dict[str, Any], said: str) -> None:
    with pytest.raises((Unsupported, InputError), match=said):
        innersight.open(written(chain(entry)))


# --- configurations that make no sense -------------------------------------------------------------------------------


def functional(inbound: Any) -> dict[str, Any]:
    start = {**layer("InputLayer", "picture", batch_shape=[None, 8, 8, 3]), "name": "picture", "inbound_nodes": []}
    conv = {**layer("Conv2D", "conv", filters=4, kernel_size=[3, 3]), "name": "conv", "inbound_nodes": inbound}
    return {"class_name": "Functional", "config": {"name": "net", "layers": [start, conv],
            "input_layers": [["picture", 0, 0]], "output_layers": [["conv", 0, 0]]}}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "has a configuration that cannot be read"),
        ("[]", "has a configuration that is no model: expected an object, got list"),
        ("[" * 200_000, "cannot be read: it is nested too deeply"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "cannot be read: it is nested too deeply"),
        ({"class_name": "Net", "config": {}}, "the class 'Net', whose code alone knows how its layers are connected"),
        ({"class_name": "Net", "config": {"layers": []}}, "the class 'Net', which is not Keras's own"),
        (sequential([]), "has no layers"),
        (sequential([{"class_name": "Dense"}]), "the Dense has no configuration"),
        (functional([[["conv", 0, 0, {}]]]), "Conv2D 'conv' reads 'conv', which is missing or needs it in turn"),
        (functional([[["gone", 0, 0, {}]]]), "Conv2D 'conv' reads 'gone', which is missing"),
        (functional([[["picture", -1, 0, {}]]]), "expected a whole one"),
        (functional("picture"), "the calls of a layer are no list"),
        ({"class_name": "Functional", "config": {"layers": [], "input_layers": 3}}, "cannot be understood"),
    ],
)
@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.usefixtures("here")
def test_a_configuration_that_makes_no_sense(tmp_path: Path, suffix: str, config: Any, said: str) -> None:
    path = WRITERS[suffix](tmp_path / f"bad{suffix}", config)
    with pytest.raises((InputError, Unsupported), match=said) as caught:
        open_keras(path)
    assert str(path) in str(caught.value)


@pytest.mark.usefixtures("here")
def test_a_model_of_two_inputs_is_refused(tmp_path: Path) -> None:
    config = functional([[["picture", 0, 0, {}]]])
    other = {**layer("InputLayer", "mask", batch_shape=[None, 8, 8, 1]), "name": "mask", "inbound_nodes": []}
    config["config"]["layers"].append(other)
    config["config"]["input_layers"].append(["mask", 0, 0])
    with pytest.raises(Unsupported, match=r"takes 2 inputs \(picture, mask\); innersight explains networks of one"):
        open_keras(write_h5(tmp_path / "two.h5", config))


@pytest.mark.usefixtures("here")
def test_models_may_not_be_nested_without_end(tmp_path: Path) -> None:
    inner = sequential(chain())
    for _ in range(40):
        inner = sequential([layer("InputLayer", "i", batch_shape=[None, 8, 8, 3]), inner])
    with pytest.raises(InputError, match="nested more than 32 deep"):
        open_keras(write_keras(tmp_path / "deep.keras", inner))


@pytest.mark.usefixtures("here")
def test_many_layers_in_the_wrong_order_are_sorted(tmp_path: Path) -> None:
    start = {**layer("InputLayer", "picture", batch_shape=[None, 8, 8, 3]), "name": "picture", "inbound_nodes": []}
    count = 6000
    acts = [
        {**layer("Activation", f"a{i}", activation="tanh"), "name": f"a{i}",
         "inbound_nodes": [[[f"a{i - 1}" if i else "picture", 0, 0, {}]]]}
        for i in range(count)
    ]  # fmt: skip
    config = {"class_name": "Functional", "config": {"name": "net", "layers": [*acts[::-1], start],
              "input_layers": [["picture", 0, 0]], "output_layers": [[f"a{count - 1}", 0, 0]]}}  # fmt: skip
    began = time.monotonic()
    opened = open_keras(write_h5(tmp_path / "backwards.h5", config))
    assert [step.name for step in opened.module.steps] == ["picture", *(f"a{i}" for i in range(count))]
    assert time.monotonic() - began < 20


@pytest.mark.usefixtures("here")
def test_models_that_call_each_other_twice_do_not_grow_without_end(tmp_path: Path) -> None:
    def twice(name: str, inner: dict[str, Any]) -> dict[str, Any]:
        start = {**layer("InputLayer", "i", batch_shape=[None, 8, 8, 3]), "name": "i", "inbound_nodes": []}
        once = {**inner, "name": "m", "inbound_nodes": [[["i", 0, 0, {}]], [["m", 1, 0, {}]]]}
        return {"class_name": "Functional", "config": {"name": name, "layers": [start, once],
                "input_layers": [["i", 0, 0]], "output_layers": [["m", 2, 0]]}}  # fmt: skip

    inner = functional([[["picture", 0, 0, {}]]])
    for i in range(25):
        inner = twice(f"m{i}", inner)
    weights = {"m": {f"conv/{name}": array for name, array in weights_of()["conv"].items()}}
    path = write_h5(tmp_path / "twice.h5", inner, weights)
    with pytest.raises(InputError, match="more than 20,000 calls of layers"):
        open_keras(path)


@pytest.mark.usefixtures("here")
def test_weights_must_fit_the_configuration(written: Callable[..., Path]) -> None:
    layers = chain()
    layers[1]["config"]["filters"] = 2**31
    with pytest.raises(InputError, match=r"Conv2D 'conv' has weights 'kernel' of shape \(3, 3, 3, 4\)"):
        innersight.open(written(layers))
    with pytest.raises(InputError, match=r"Conv2D 'another' has no weights 'kernel' in the file; save"):
        innersight.open(written(chain(layer("Conv2D", "another", filters=3, kernel_size=3))))


def test_weights_of_another_layer_are_noticed(tmp_path: Path) -> None:
    layers = chain()
    layers[1]["config"]["name"] = "renamed"
    with pytest.raises(InputError, match="Conv2D 'renamed' would get the weights of 'conv'"):
        open_keras(write_keras(tmp_path / "swapped.keras", sequential(layers)))


@pytest.mark.parametrize(
    "entry",
    [
        layer("ZeroPadding2D", "big", padding=10**6),
        layer("UpSampling2D", "big", size=10**5),
        layer("Resizing", "big", height=10**6, width=10**6),
        layer("MaxPooling2D", "big", pool_size=10**12, padding="same", strides=1),
    ],
)
@pytest.mark.usefixtures("here")
def test_no_layer_can_ask_for_more_than_a_picture_needs(written: Callable[..., Path], entry: dict[str, Any]) -> None:
    net = innersight.open(written(chain(entry)))
    with pytest.raises(InputError, match="'big'"):
        net.predict(torch.zeros(1, 3, 8, 8))


# --- hostile files ---------------------------------------------------------------------------------------------------


def test_a_dataset_may_not_declare_what_it_does_not_hold(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "huge.h5", sequential(chain()))
    with h5py.File(path, "a") as file:
        group = file["model_weights/conv/conv"]
        del group["kernel:0"]
        group.create_dataset("kernel:0", shape=(3, 3, 3, 2**32), dtype="f", chunks=(3, 3, 3, 1024))
    with pytest.raises(InputError, match=r"declares 463,856,467,968 bytes for .* and holds 0"):
        open_keras(path)


@pytest.mark.parametrize("how", ["external link", "soft link", "external data", "virtual data", "text"])
def test_weights_must_be_in_the_file(tmp_path: Path, how: str) -> None:
    other = write_h5(tmp_path / "other.h5", sequential(chain()))
    path = write_h5(tmp_path / "linked.h5", sequential(chain()))
    with h5py.File(path, "a") as file:
        group = file["model_weights/conv/conv"]
        del group["bias:0"]
        if how == "external link":
            group["bias:0"] = h5py.ExternalLink(str(other), "/model_weights/conv/conv/bias:0")
        elif how == "soft link":
            group["bias:0"] = h5py.SoftLink("/model_weights/conv/conv/kernel:0")
        elif how == "external data":
            (tmp_path / "raw").write_bytes(bytes(16))
            group.create_dataset("bias:0", shape=(4,), dtype="f", external=[(str(tmp_path / "raw"), 0, 16)])
        elif how == "virtual data":
            layout = h5py.VirtualLayout(shape=(4,), dtype="f")
            layout[:] = h5py.VirtualSource(str(other), "model_weights/conv/conv/bias:0", shape=(4,))
            group.create_virtual_dataset("bias:0", layout)
        else:
            group.create_dataset("bias:0", data=["a", "b", "c", "d"])
    with pytest.raises(InputError, match="must be in the file itself|of type object; expected numbers"):
        open_keras(path)


def test_a_group_may_not_hold_itself(tmp_path: Path) -> None:
    path = write_keras(tmp_path / "loop.keras", sequential(chain()))
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        group = file.create_group("layers")
        group["layers"] = group
    rewrite(path, "model.weights.h5", content.getvalue())
    with pytest.raises(InputError, match="more groups than any model has"):
        open_keras(path)


def rewrite(path: Path, name: str, content: bytes | None, **how: Any) -> None:
    """The archive with a member replaced, or without it."""
    with zipfile.ZipFile(path) as old:
        members = {n: old.read(n) for n in old.namelist() if n != name}
    with zipfile.ZipFile(path, "w") as new:
        for member, data in members.items():
            new.writestr(member, data)
        if content is not None:
            new.writestr(name, content, **how)


def test_archives_that_are_no_models(tmp_path: Path) -> None:
    path = write_keras(tmp_path / "a.keras", sequential(chain()))
    rewrite(path, "config.json", b" " * (300 << 20), compress_type=zipfile.ZIP_DEFLATED)
    began = time.monotonic()
    with pytest.raises(InputError, match="declares 314,572,800 bytes for config.json, more than can be right"):
        open_keras(path)
    assert time.monotonic() - began < 20
    rewrite(path, "config.json", None)
    with pytest.raises(InputError, match="is a zip archive without config.json"):
        open_keras(path)
    write_keras(path, sequential(chain()))
    rewrite(path, "model.weights.h5", None)
    with pytest.raises(InputError, match="holds no weights"):
        open_keras(path)
    write_keras(path, sequential(chain()))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("config.json", "{}")
    with pytest.raises(InputError, match="two of one name"):
        open_keras(path)


def test_files_that_are_something_else(tmp_path: Path) -> None:
    path = tmp_path / "text.keras"
    path.write_text("hello")
    with pytest.raises(InputError, match="neither an HDF5 file nor a .keras archive"):
        open_keras(path)
    alone = tmp_path / "alone.h5"
    with h5py.File(alone, "w") as file:
        file.create_group("layers/conv2d/vars")
    with pytest.raises(InputError, match="holds weights alone"):
        open_keras(alone)
    with h5py.File(alone, "w") as file:
        file["pixels"] = np.zeros(3)
    with pytest.raises(InputError, match="without model_config"):
        open_keras(alone)


def test_reading_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with the damaged files on which libhdf5 goes round for ever; here the reader is made to wait instead."""
    path = write_h5(tmp_path / "slow.h5", sequential(chain()))
    folder = tmp_path / "h5py"
    folder.mkdir()
    (folder / "__init__.py").write_text("while True: pass")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(InputError, match=r"could not be read within 2 s, as happens with damaged HDF5 files"):
        keras_file.read(path, seconds=2)


def test_the_reading_process_needs_neither_torch_nor_keras() -> None:
    code = (
        "import sys, innersight.formats.keras_file\n"
        "assert not {'torch', 'keras', 'tensorflow', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- damage ----------------------------------------------------------------------------------------------------------

FUZZ = """
import io, sys
from pathlib import Path
from innersight.formats import keras_file
folder, start = Path(sys.argv[1]), int(sys.argv[2])
for path in sorted(folder.iterdir(), key=lambda p: int(p.stem))[start:]:
    print(path.stem, end=" ", flush=True)
    try:
        keras_file.extract(path, io.BytesIO())
        print("read", flush=True)
    except Exception as error:
        print(type(error).__name__, flush=True)
"""


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """The file with a few bytes changed, a piece cut out, or its end missing."""
    data = bytearray(content)
    kind = rng.integers(4)
    if kind == 0:
        for _ in range(rng.integers(1, 9)):
            data[rng.integers(len(data))] = rng.integers(256)
    elif kind == 1:
        start = rng.integers(len(data))
        data[start : start + rng.integers(1, 64)] = bytes(rng.integers(0, 256, rng.integers(1, 64), np.uint8))
    elif kind == 2:
        data = data[: rng.integers(1, len(data))]
    else:
        data[rng.integers(min(len(data), 2000))] ^= 1 << rng.integers(8)
    return bytes(data)


@pytest.mark.parametrize("suffix", WRITERS)
def test_damaged_files_are_refused_or_read(tmp_path: Path, suffix: str) -> None:
    """Bytes of the file: the reader of the child process raises nothing that `_main` would not answer for.

    What hangs in libhdf5 is skipped: there the clock of `read` is what helps.
    """
    content = WRITERS[suffix](tmp_path / f"a{suffix}", sequential(chain())).read_bytes()
    folder = tmp_path / "mutants"
    folder.mkdir()
    rng = np.random.default_rng(5)
    for i in range(200):
        (folder / f"{i}{suffix}").write_bytes(mutated(content, rng))
    outcomes: dict[int, str] = {}
    hangs = 0
    while len(outcomes) < 200:
        command = [sys.executable, "-c", FUZZ, str(folder), str(len(outcomes))]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=15, check=False)
            said = done.stdout
            assert done.returncode == 0, (said[-100:], done.stderr[-500:])
        except subprocess.TimeoutExpired as stopped:
            said = (stopped.stdout or b"").decode()
            hangs += 1
        for line in said.splitlines():
            number, _, outcome = line.partition(" ")
            outcomes[int(number)] = outcome or "hangs"
        assert hangs < 4
    assert {"read", "Refused"} & set(outcomes.values())
    # A few of them all the way, through the process that a user's file goes through.
    for i in [i for i, outcome in outcomes.items() if outcome not in ("read", "hangs")][:6]:
        with pytest.raises(InputError):
            open_keras(folder / f"{i}{suffix}")


@pytest.mark.usefixtures("here")
def test_damaged_configurations_are_refused_or_run(tmp_path: Path) -> None:
    """Values of the configuration: replaced, removed, repeated. Whatever opens either runs or says why not."""
    rng = np.random.default_rng(7)
    pieces = [layer("BatchNormalization", "bn", scale=False, center=False), layer("MaxPooling2D", "pool", pool_size=2)]
    original = json.dumps(functional([[["picture", 0, 0, {}]]])), json.dumps(sequential(chain(*pieces[1:])))
    ran, said = 0, []
    for i in range(300):
        config = json.loads(original[i % 2])
        for _ in range(rng.integers(1, 4)):
            disturb(config, rng)
        path = write_keras(tmp_path / "mutant.keras", config)
        try:
            net = innersight.open(path)
            net.predict(net._sample())
            ran += 1
        except (InputError, Unsupported) as error:
            said.append(str(error))
    assert not [text for text in said if "\n" in text]
    assert 0 < ran < 300


def disturb(config: Any, rng: np.random.Generator) -> None:
    """Change one value somewhere in nested dictionaries and lists."""
    places: list[tuple[Any, Any]] = []
    pending = [config]
    while pending:
        item = pending.pop()
        keys = list(item) if isinstance(item, dict) else range(len(item))
        for key in keys:
            places.append((item, key))
            if isinstance(item[key], (dict, list)):
                pending.append(item[key])
    where, key = places[rng.integers(len(places))]
    odd: list[Any] = [None, -1, 0, 3, 2**40, 1.5, "conv", "same", "", [], {}, [1, 2], True, {"class_name": "Dense"},
                      [None, None], ["conv", 0, 0], "channels_first"]  # fmt: skip
    if rng.integers(4) == 0 and isinstance(where, dict):
        del where[key]
    else:
        where[key] = odd[rng.integers(len(odd))]


def test_slices_are_those_of_numpy() -> None:
    x = torch.arange(2 * 5 * 7 * 3.0).reshape(2, 5, 7, 3)
    parts = [slice(None), slice(None, None, -1), slice(4, None, -2), slice(-1, 0, -2), slice(1, -1), -1, None,
             slice(None, 2, -1)]  # fmt: skip
    for a, b, c in itertools.product(parts, repeat=3):
        for key in ((slice(None), a, b, c), (slice(None), a, ..., c)):
            if sum(k is not None and k is not ... for k in key) <= 4:
                found = keras_layers.OPERATIONS["getitem"](keras_layers.Value(x), list(key)).tensor
                np.testing.assert_array_equal(found.numpy(), x.numpy()[key])


def test_every_layer_name_is_found_in_a_run(written: Callable[..., Path]) -> None:
    net = innersight.open(written(chain(layer("Dropout", "drop", rate=0.5))))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = net.engine.run(x, Request(read=["conv", "drop"])).values
    assert torch.equal(found["conv"], found["drop"])  # a layer that does nothing is the value before it
