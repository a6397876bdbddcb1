"""A keras.Model in memory, on each engine: in a process of its own, since engines do not bear each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

COMMON = """
import json, os, warnings
import numpy as np
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
warnings.filterwarnings("ignore")
import keras
L = keras.layers
rng = np.random.default_rng(0)
x = rng.normal(size=(2, 14, 11, 3)).astype("float32")
as_array = lambda t: t.detach().numpy() if hasattr(t, "detach") else np.asarray(t)
nchw = lambda a: np.ascontiguousarray(np.moveaxis(a, -1, 1))
def said(fn):
    try:
        fn()
    except Exception as error:
        return type(error).__name__ + ": " + str(error)
"""

FUNCTIONAL = """
inner_in = keras.Input((None, None, 3), name="inner_in")
inner = keras.Model(inner_in, L.BatchNormalization(name="bn")(L.Conv2D(4, 3, name="c1")(inner_in)), name="inner")
start = keras.Input((14, 11, 3), name="start")
conv = L.Conv2D(3, 3, padding="same", name="twice")
y = L.Add(name="add")([conv(start), conv(conv(start))])
y = L.PReLU(name="prelu")(inner(y))
model = keras.Model(start, L.Dense(5, activation="softmax", name="head")(L.GlobalAveragePooling2D(name="gap")(y)))
model.set_weights([np.abs(rng.normal(0.3, 0.3, w.shape)).astype("float32") for w in model.get_weights()])
middle = keras.Model(start, [y, model.output])
wanted = [as_array(v) for v in middle(x, training=False)]
import innersight
net = innersight.open(model)
maps = net.maps(nchw(x), "prelu")["prelu"]
before = net.predict(nchw(x)).logits
model.set_weights([w * 0 for w in model.get_weights()])
print(json.dumps({
    "version": int(keras.__version__[0]), "layers": list(net.layers), "notes": net.notes, "shape": net.input_shape,
    "prelu": float(np.abs(maps - nchw(wanted[0])).max() / np.abs(wanted[0]).max()),
    "head": float(np.abs(before - wanted[1]).max()),
    "later": float(np.abs(net.predict(nchw(x)).logits - before).max()),
    "layer": said(lambda: innersight.open(conv)),
}))
"""

SUBCLASSED = """
class Block(L.Layer):
    def __init__(self, n):
        super().__init__()
        self.conv, self.bn = L.Conv2D(n, 3, padding="same"), L.BatchNormalization()
    def call(self, x, training=False):
        return keras.ops.relu(self.bn(self.conv(x), training=training))
class Net(keras.Model):
    def __init__(self):
        super().__init__()
        self.blocks = [Block(4), Block(6)]
        start = keras.Input((None, None, 6))
        self.base = keras.Model(start, L.Conv2D(7, 3, name="inner")(start))
        self.gap, self.head = L.GlobalAveragePooling2D(), L.Dense(5)
    def call(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.gap(self.base(x)))
"""

WATCHED = """
import innersight, torch
keras.utils.set_random_seed(1)  # of weights whose ReLUs keep their side over the step below
never = said(lambda: innersight.open(Net()))
model = Net()
wanted = as_array(model(x, training=False))
net = innersight.open(model)
from innersight.testing import check_network
block = model.blocks[0](x)
batch = torch.from_numpy(nchw(x))
done = check_network(net, gradient=False)
t = batch.clone().requires_grad_()
net.module(t)[:, 0].sum().backward()
step, at = 1e-2, torch.zeros_like(batch)
at[0, 1, 5, 6] = step
with torch.no_grad():
    slope = ((net.module(batch + at) - net.module(batch - at))[0, 0] / (2 * step)).item()
class Cut(keras.Model):
    def __init__(self):
        super().__init__()
        self.head = L.Dense(2)
    def call(self, x):
        return self.head(keras.ops.mean(keras.ops.convert_to_tensor(keras.ops.convert_to_numpy(x)), axis=(1, 2)))
cut = Cut()
cut(x)
start = keras.Input((14, 11, 3))
y = L.Lambda(lambda t: t * 2.0, name="twofold")(L.Conv2D(4, 3, name="c1")(start))
code = keras.Model(start, L.Dense(3)(L.Flatten()(y)))
coded = innersight.open(code)
print(json.dumps({
    "output": float(np.abs(net.predict(nchw(x)).logits - wanted).max()), "layers": list(net.layers),
    "block": float(np.abs(net.maps(batch, "blocks/0")["blocks/0"] - nchw(as_array(block))).max()),
    "inner": list(net.maps(batch, "base/inner")["base/inner"].shape), "notes": net.notes, "checks": len(done),
    "slope": [slope, t.grad[0, 1, 5, 6].item()], "never": never, "cut": innersight.open(cut).notes,
    "coded": [list(coded.layers), coded.notes,
              float(np.abs(coded.predict(nchw(x)).logits - as_array(code(x, training=False))).max())],
    "cam": list(net.explain(batch, method="gradcam").values.shape),
}))
"""

REFUSED = """
import innersight
model = Net()
model(x)
print(json.dumps(said(lambda: innersight.open(model))))
"""


OLD = """
import tf_keras as keras
L = keras.layers
"""
PROGRAMS = {
    "torch": (COMMON, FUNCTIONAL, SUBCLASSED, WATCHED),
    "tensorflow": (COMMON, FUNCTIONAL, SUBCLASSED, REFUSED, OLD, FUNCTIONAL),
}


@pytest.fixture(scope="module")
def results() -> Callable[[str], list[Any]]:
    """`results("torch")`: what that engine's process printed, a record a program."""
    known: dict[str, list[Any]] = {}

    def of(engine: str) -> list[Any]:
        if engine not in known:
            known[engine] = run(engine)
        return known[engine]

    return of


def run(engine: str) -> list[Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KERAS_BACKEND": engine}
    done = subprocess.run(
        [sys.executable, "-c", "".join(PROGRAMS[engine])],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("{", '"'))]


@pytest.mark.parametrize(("engine", "which"), [("torch", 0), ("tensorflow", 0), ("tensorflow", 2)])
def test_a_functional_model_of_any_engine(results: Callable[[str], list[Any]], engine: str, which: int) -> None:
    """The third is tf.keras 2."""
    found = results(engine)[which]
    assert found["version"] == (2 if which else 3)
    assert found["prelu"] < 1e-5
    assert found["head"] < 1e-6
    assert found["later"] == 0  # a copy: what happens to the model afterwards is not seen
    assert found["shape"] == [3, 14, 11]
    assert [n for n in found["layers"] if "." not in n] == [
        "twice", "twice_1", "twice_2", "add", "inner/c1", "inner/bn", "prelu", "gap", "head",
    ]  # fmt: skip
    assert any("later changes to it are not seen" in note for note in found["notes"])
    assert "Conv2D of Keras is no model" in found["layer"]


def test_a_class_of_its_own_on_torch(results: Callable[[str], list[Any]]) -> None:
    found = results("torch")[1]
    assert found["output"] < 1e-6
    assert found["block"] < 1e-5
    assert found["inner"] == [2, 7, 12, 9]
    assert {"blocks/0/conv.conv2d", "blocks/1/conv.conv2d", "base/inner.conv2d"} <= set(found["layers"])
    assert found["checks"] > 10
    assert found["slope"][0] == pytest.approx(found["slope"][1], rel=1e-2)
    assert found["cam"] == [2, 14, 11]
    assert "has never been called on one picture" in found["never"]
    assert any("no gradient reaches its input" in note for note in found["cut"])
    assert not any("no gradient" in note for note in found["notes"])


def test_a_functional_model_with_code_of_its_own_is_watched_on_torch(results: Callable[[str], list[Any]]) -> None:
    layers, notes, error = results("torch")[1]["coded"]
    assert error < 1e-6
    assert {"c1.conv2d", "twofold.mul"} <= set(layers)
    assert any("Lambda 'twofold' holds Python code" in note for note in notes)


def test_a_class_of_its_own_on_another_engine_is_refused_with_two_ways_out(
    results: Callable[[str], list[Any]],
) -> None:
    said = results("tensorflow")[1]
    assert said.startswith("Unsupported: Net is a class of its own")
    assert "KERAS_BACKEND=torch" in said
    assert "format='onnx'" in said
