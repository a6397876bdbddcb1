"""Scans while a network is trained: what is counted at a step, that training does not notice, and what changed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import innersight
from innersight import errors
from innersight.scanning import store

for package in ("pandas", "pyarrow", "sklearn"):
    pytest.importorskip(package)


class Net(nn.Module):
    """With everything that a careless look would disturb: BatchNorm's statistics, dropout's draws, a counter."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(8, 10)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x = F.relu(self.norm(self.conv1(x)))
        x = self.drop(F.relu(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.from_numpy(found.images[:, None].astype(np.float32) / 16), torch.from_numpy(found.target)


def train(digits, steps, watch=None, seed=0):
    """A few steps of a network; every tensor that training holds, and what the generators say next."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    watcher = watch(net) if watch else None
    for step in range(steps):
        chosen = torch.randint(0, len(digits[0]), (32,))
        loss = F.cross_entropy(net(digits[0][chosen]), digits[1][chosen])
        optimizer.zero_grad()
        loss.backward()
        if watcher is not None and step == 2:
            watcher.at(1000)  # between backward and the step: gradients are there
        optimizer.step()
        if watcher is not None:
            watcher.step()
    held = [*net.state_dict().values(), *(p.grad for p in net.parameters())]
    held += [v for s in optimizer.state.values() for v in s.values()]
    return net, held, (torch.rand(3), np.random.rand(3), random.random()), watcher


def some(digits, count=60):
    return digits[0][:count], digits[1][:count].numpy()


def test_training_goes_on_as_if_nobody_looked(digits, tmp_path):
    plain, held, drawn, _ = train(digits, 7)
    watched, held_too, drawn_too, watch = train(
        digits, 7, lambda net: innersight.Training(net, some(digits), tmp_path / "run", every=3)
    )
    assert list(watch.scans) == [3, 6, 1000]
    assert all(torch.equal(a, b) for a, b in zip(held, held_too, strict=True))
    assert torch.equal(drawn[0], drawn_too[0])
    assert (drawn[1] == drawn_too[1]).all()
    assert drawn[2] == drawn_too[2]
    assert watched.calls == plain.calls
    assert watched.training
    assert not watched._forward_hooks


def test_a_step_holds_what_the_network_was_then(digits, tmp_path):
    net, _, _, watch = train(
        digits, 4, lambda n: innersight.Training(n, some(digits), tmp_path / "r", every=4, images=3)
    )
    scan, place = watch.scans[4], tmp_path / "r" / "step-00000004"
    assert innersight.Scan(place).complete
    net.eval()
    seen = {}
    net.conv2.register_forward_hook(lambda _m, _i, out: seen.__setitem__("conv2", out.detach()))
    with torch.no_grad():
        answers = net(digits[0][:60])
    rows = scan.channels("conv2")
    np.testing.assert_allclose(rows["mean"], seen["conv2"].mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(rows["max"], seen["conv2"].amax((0, 2, 3)), rtol=1e-5)
    right = (answers.argmax(1) == digits[1][:60]).float().mean()
    assert scan.manifest["summary"]["accuracy"] == pytest.approx(float(right))
    from safetensors.torch import load_file

    weights = load_file(place / "weights.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in net.state_dict().items())
    maps = innersight.load(place / "maps.safetensors")
    np.testing.assert_allclose(maps["conv2"], seen["conv2"][:3], rtol=1e-4, atol=1e-6)
    assert list(maps) == [n for n in scan.layers if n not in ("mean", "fc")]


@pytest.mark.parametrize(
    ("options", "numbers", "wanted"),
    [({"every": 4}, [None] * 9, [4, 8]), ({"steps": (1, 2, 5)}, [None] * 9, [1, 2, 5]),
     ({"every": 10}, [4, 8, 12, 16, 20, 25], [12, 20]), ({"every": 4, "layers": "conv1"}, [None] * 4, [4])],
)  # fmt: skip
def test_steps_are_chosen(digits, tmp_path, options, numbers, wanted):
    watch = innersight.Training(Net(), some(digits, 12), tmp_path / "r", images=0, **options)
    for number in numbers:
        watch.step(number)
    assert list(watch.scans) == wanted
    if "layers" in options:
        assert watch.scans[4].layers == ["conv1"]
    assert not (tmp_path / "r" / f"step-{wanted[0]:08}" / "maps.safetensors").exists()


def test_a_folder_is_found_again_and_half_a_step_is_none(digits, tmp_path):
    make = lambda: innersight.Training(Net(), some(digits, 12), tmp_path / "r", every=2)  # noqa: E731
    watch = make()
    watch.step(2)
    watch.step(4)
    (tmp_path / "r" / "step-00000006").mkdir()
    (tmp_path / "r" / "step-00000004").rename(tmp_path / "r" / ".step-00000004.old")  # killed while replacing
    (tmp_path / "r" / ".step-00000008.part").mkdir()
    again = make()
    assert list(again.scans) == [2, 4]
    assert "2, 4" in repr(again)
    with pytest.warns(UserWarning, match="steps up to 4 of an earlier run"):
        again.step(2)
    assert sorted(again.scans) == [2, 4]


def test_a_kill_leaves_whole_steps_alone(digits, tmp_path):
    script = textwrap.dedent("""
        import os, signal, sys
        import innersight
        from sklearn.datasets import load_digits
        from innersight.scanning import training
        sys.path.insert(0, sys.argv[2])
        from test_training import Net
        found = load_digits()
        data = (found.images[:12, None].astype("float32") / 16, found.target[:12])
        watch = innersight.Training(Net(), data, sys.argv[1], every=1)
        watch.step()
        watch._write_weights = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        watch.step()
    """)
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "r", Path(__file__).parent], capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    watch = innersight.Training(Net(), some(digits, 12), tmp_path / "r", every=1)
    assert list(watch.scans) == [1]
    assert watch.step(2).complete
    assert not list((tmp_path / "r").glob(".step*"))


def test_what_goes_wrong_while_training_is_a_warning_and_training_goes_on(digits, tmp_path, monkeypatch):
    watch = innersight.Training(Net(), some(digits, 12), tmp_path / "r", every=1)
    watch.step()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_json", full)
        with pytest.warns(UserWarning, match="training goes on: the disk of .* is full"):
            assert watch.step() is None
        assert watch.step() is None  # said once
    assert "full" in watch.failed[2]
    assert list(watch.scans) == [1]
    assert not list((tmp_path / "r").glob(".step*"))
    assert watch.step().complete
    assert list(watch.scans) == [1, 4]
    with monkeypatch.context() as patch:
        patch.setattr(store, "write_json", full)
        with pytest.raises(errors.InputError, match="is full"):
            watch.at(9)


def test_what_changed_between_two_steps(digits, tmp_path):
    net, _, _, watch = train(digits, 6, lambda n: innersight.Training(n, some(digits), tmp_path / "r", every=3))
    with torch.no_grad():  # a channel dies
        net.conv2.weight[5] = 0
        net.conv2.bias[5] = -1
    watch.step(9)
    found = watch.compare(6, 9)
    assert found.layers["conv1"].equal
    assert not found.layers["conv2"].equal
    dead = found.channels[(found.channels["layer"] == "conv2") & found.channels["died"]]
    assert dead["channel"].tolist() == [5]
    assert not found.channels["revived"].any()
    assert any("1 channel died: conv2 5" in line for line in found.words())
    before = watch.compare(3, 6)
    a, b = (innersight.Scan(tmp_path / "r" / f"step-{n:08}").channels("conv1") for n in (3, 6))
    rows = before.channels[before.channels["layer"] == "conv1"]
    assert rows["mean_a"].tolist() == a["mean"].tolist()
    assert rows["mean_b"].tolist() == b["mean"].tolist()
    json.dumps(before.to_json())
    other = Net().eval()
    from safetensors.torch import load_file

    outputs = []
    for step in (3, 6):
        other.load_state_dict(load_file(tmp_path / "r" / f"step-{step:08}" / "weights.safetensors"))
        with torch.no_grad():
            outputs.append(other(digits[0][:60]))
    error = 10 * torch.log10(outputs[0].square().sum() / (outputs[0] - outputs[1]).square().sum())
    assert before.layers["fc"].sqnr == pytest.approx(float(error), abs=0.1)
    with pytest.raises(errors.UnknownName, match="3, 6, 9"):
        watch.compare(3, 7)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"every": 0}, "every must be a whole number from 1"), ({"steps": (1, "x")}, "one of steps"),
     ({"layers": "conv9"}, "conv9"), ({"images": -1}, "images must be")],
)  # fmt: skip
def test_wrong_options_are_said_at_once(digits, tmp_path, options, sentence):
    with pytest.raises(errors.InnersightError, match=sentence):
        innersight.Training(Net(), some(digits, 4), tmp_path / "r", **options)


def test_wrong_models_and_folders_are_said_at_once(digits, tmp_path):
    with pytest.raises(errors.InputError, match="not trained in this process"):
        innersight.Training("model.onnx", some(digits, 4), tmp_path / "r")
    (tmp_path / "f").write_text("")
    with pytest.raises(errors.InputError, match="is a file"):
        innersight.Training(Net(), some(digits, 4), tmp_path / "f")
    with pytest.raises(errors.InputError, match=r"keras\.Model"):
        innersight.Training(Net(), some(digits, 4), tmp_path / "r").keras()


# -- TensorBoard


def test_tensorboard_reads_what_was_written(digits, tmp_path):
    pytest.importorskip("tensorboard")
    _, _, _, watch = train(
        digits, 4, lambda n: innersight.Training(n, some(digits), tmp_path / "r", every=2, tensorboard=True, images=1)
    )
    assert "tensorflow" not in sys.modules
    script = textwrap.dedent("""
        import io, json, sys
        from PIL import Image
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        board = EventAccumulator(sys.argv[1])
        board.Reload()
        tags = board.Tags()
        scalars = {t: [(e.step, e.value) for e in board.Scalars(t)] for t in tags["scalars"]}
        sizes = {t: Image.open(io.BytesIO(board.Images(t)[-1].encoded_image_string)).size for t in tags["images"]}
        steps = {t: [e.step for e in board.Images(t)] for t in tags["images"]}
        print(json.dumps([scalars, sizes, steps]))
    """)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, tmp_path / "r" / "tensorboard"], capture_output=True, check=True,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
    )  # fmt: skip
    scalars, sizes, steps = json.loads(done.stdout.splitlines()[-1])
    wanted = [[step, float(np.float32(scan.channels("conv2")["mean"].mean()))] for step, scan in watch.scans.items()]
    np.testing.assert_allclose(sorted(scalars["mean/conv2"]), wanted, rtol=1e-6)
    np.testing.assert_allclose(
        sorted(scalars["accuracy"]), [[n, s.manifest["summary"]["accuracy"]] for n, s in watch.scans.items()], rtol=1e-6
    )
    assert sorted(steps["maps/conv2"]) == [2, 4, 1000]
    assert min(sizes["maps/conv2"]) >= 32


# -- Lightning


def test_lightning_counts_the_optimizers_steps(digits, tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    import logging

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Trained(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_step(self, batch, _):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    def fitted(watch_in=None):
        lightning.seed_everything(0, verbose=False)
        module = Trained()
        watch = innersight.Training(module.net, some(digits, 12), watch_in, every=3) if watch_in else None
        data = torch.utils.data.TensorDataset(digits[0][:160], digits[1][:160])
        trainer = lightning.Trainer(
            max_epochs=1, accumulate_grad_batches=2, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[watch.lightning()] if watch else [],
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about workers
            trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=16))
        return module, watch, trainer

    plain, _, _ = fitted()
    module, watch, trainer = fitted(tmp_path / "r")
    assert trainer.global_step == 5
    assert list(watch.scans) == [0, 3]
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), module.state_dict().values(), strict=True)
    )
    assert module.net.training
    with pytest.raises(errors.InputError, match="no part of it"):
        watch.lightning().on_train_start(trainer, Trained())


# -- Keras


KERAS = """
import json, sys, warnings
warnings.simplefilter("ignore")
import numpy as np
import {keras} as keras
import innersight
from sklearn.datasets import load_digits

found = load_digits()
x, y = found.images[:96, ..., None].astype("float32") / 16, found.target[:96]

def made():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        keras.layers.Input((8, 8, 1)), keras.layers.Conv2D(4, 3, name="conv", activation="relu"),
        keras.layers.BatchNormalization(name="norm"), keras.layers.Dropout(0.2),
        keras.layers.GlobalAveragePooling2D(name="pool"), keras.layers.Dense(10, name="fc"),
    ])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model

plain = made()
plain.fit(x, y, batch_size=16, epochs=2, verbose=0)
model = made()
watch = innersight.Training(model, (x[:32], y[:32]), sys.argv[1], every=4)
model.fit(x, y, batch_size=16, epochs=2, verbose=0, callbacks=[watch.keras()])
same = all(np.array_equal(a, b) for a, b in zip(plain.get_weights(), model.get_weights()))
last = keras.Model(model.inputs, model.get_layer("conv").output)
maps = last.predict(x[:32], verbose=0)
told = watch.scans[12].channels()
layer = next(n for n in watch.scans[12].layers if "conv" in n and np.allclose(
    told[told["layer"] == n]["mean"], maps.mean((0, 1, 2)), rtol=1e-3))
change = watch.compare(4, 12)
print(json.dumps(dict(same=same, steps=list(watch.scans), failed=watch.failed, layer=layer, words=change.words(),
    mean=told[told["layer"] == layer]["mean"].tolist(), wanted=maps.mean((0, 1, 2)).tolist())))
"""


@pytest.mark.parametrize(
    ("keras", "backend"),
    [("keras", "torch"), *(pytest.param(*p, marks=pytest.mark.skipif(
        not os.environ.get("INNERSIGHT_SLOW"), reason="INNERSIGHT_SLOW=1 runs it"))
        for p in (("keras", "tensorflow"), ("keras", "jax"), ("tf_keras", "tensorflow")))],
)  # fmt: skip
def test_keras_is_watched_while_it_fits(tmp_path, keras, backend):
    done = subprocess.run(
        [sys.executable, "-c", KERAS.replace("{keras}", keras), tmp_path / "r"], capture_output=True, text=True,
        env=os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    if "No module named" in done.stderr:
        pytest.skip(f"needs {keras} on {backend}")
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["same"]
    assert said["steps"] == [0, 4, 8, 12]
    assert not said["failed"]
    np.testing.assert_allclose(said["mean"], said["wanted"], rtol=1e-3, atol=1e-5)
    assert said["words"]
