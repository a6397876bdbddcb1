"""The digits that the demo learns, where they come from, and the network that learns them."""

from __future__ import annotations

import gzip
import random
import socket
import struct
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from innersight import data, errors
from innersight.data import digits, mnist, small_cnn
from innersight.data.small_cnn import SimpleCNN

FILES = (*mnist.TRAIN, *mnist.TEST)


@pytest.fixture(scope="module")
def small() -> data.Digits:
    pytest.importorskip("sklearn")
    return digits.load()


# --- scikit-learn's digits


def test_digits_are_sklearns_enlarged_as_pillow_would(small):
    from sklearn.datasets import load_digits

    bunch = load_digits()
    first_five = [i for i in range(60) if bunch.target[i] == 0][:5]  # of the zeros the fifth is held out
    picture = Image.fromarray((bunch.images[first_five[4]] / 16).astype(np.float32))
    expected = np.asarray(picture.resize((28, 28), Image.Resampling.BICUBIC)).clip(0, 1)
    held_out = small.test_images[small.test_labels == 0][0, 0]
    np.testing.assert_allclose(held_out.numpy(), expected, atol=1e-5)


def test_digits_lie_between_0_and_1(small):
    for images in (small.train_images, small.test_images):
        assert images.dtype == torch.float32
        assert images.shape[1:] == (1, 28, 28)
        assert images.min() == 0
        assert images.max() == 1
    assert small.train_labels.dtype == torch.int64


def test_split_is_disjoint_complete_and_stratified(small):
    train, test = ({image.numpy().tobytes() for image in part} for part in (small.train_images, small.test_images))
    assert not train & test
    assert len(train | test) == 1797
    for digit in range(10):
        held_out, rest = int((small.test_labels == digit).sum()), int((small.train_labels == digit).sum())
        assert held_out == (held_out + rest) // 5


def test_digits_without_sklearn_name_the_package_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(errors.MissingPackage, match=r'scikit-learn.*pip install "innersight\[demo\]"'):
        digits.load()


# --- data.load


def test_load_dispatches_by_name(small):
    again = data.load("digits")
    assert repr(again) == "Digits('digits': 1,442 to train, 355 held out, 28x28, 0..1)"
    assert torch.equal(again.test_images, small.test_images)


def test_unknown_data_set_names_the_near_one():
    with pytest.raises(errors.UnknownName, match="no data set 'minst'; did you mean mnist"):
        data.load("minst")


def test_digits_take_no_folder(tmp_path):
    with pytest.raises(errors.InputError, match="root"):
        data.load("digits", tmp_path)


def test_importing_data_imports_nothing_heavy():
    heavy = "{'torch', 'numpy', 'sklearn', 'torchvision', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", f"import sys, innersight.data; assert not {heavy}, {heavy}"], check=True)


def test_a_picture_file_becomes_what_the_network_learned(small, tmp_path):
    from innersight import images

    pixels = (small.test_images[3, 0] * 255).round().to(torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "digit.png")
    read = images.read(tmp_path / "digit.png", small.preprocess)
    np.testing.assert_allclose(np.asarray(read.tensor), pixels[None, None] / 255, atol=1e-6)


# --- MNIST files


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()


def mnist_values(n: int = 12) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    values = {}
    for names, count in ((mnist.TRAIN, n), (mnist.TEST, n // 2)):
        values[names[0]] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        values[names[1]] = rng.integers(0, 10, count, dtype=np.uint8)
    return values


def write_mnist(folder: Path, values: dict[str, np.ndarray], packed: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in values.items():
        content = idx(array)
        (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("folder", [".", "raw", "MNIST/raw"])
def test_idx_files_are_found_and_read_back(tmp_path, folder, packed):
    values = mnist_values()
    write_mnist(tmp_path / folder, values, packed)
    before = sorted(tmp_path.rglob("*"))
    loaded = mnist.load(tmp_path, download=False)
    expected = torch.from_numpy(values[mnist.TRAIN[0]] / np.float32(255))
    assert torch.equal(loaded.train_images[:, 0], expected)
    assert torch.equal(loaded.test_labels, torch.from_numpy(values[mnist.TEST[1]]).long())
    assert len(loaded.test_images) == 6
    assert sorted(tmp_path.rglob("*")) == before  # nothing written


def test_idx_reader_agrees_with_torchvision(tmp_path):
    datasets = pytest.importorskip("torchvision.datasets")
    write_mnist(tmp_path / "MNIST" / "raw", mnist_values(), packed=False)
    theirs, ours = datasets.MNIST(tmp_path, train=True), mnist.load(tmp_path)
    assert torch.equal(theirs.data / 255, ours.train_images[:, 0])
    assert torch.equal(theirs.targets, ours.train_labels)


def test_gzip_is_recognized_by_content_not_by_name(tmp_path):
    values = mnist_values()
    write_mnist(tmp_path, values, packed=False)
    (tmp_path / FILES[0]).rename(tmp_path / f"{FILES[0]}.gz")  # as browsers leave it that unpack on the way
    (tmp_path / FILES[1]).write_bytes(gzip.compress(idx(values[FILES[1]])))
    assert torch.equal(mnist.load(tmp_path).train_labels, torch.from_numpy(values[FILES[1]]).long())


IMAGES = idx(np.zeros((12, 28, 28), np.uint8))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "truncated: its header is not whole"),
        (IMAGES[:9], "truncated: its header is not whole"),
        (IMAGES[:-1], "truncated: its header promises 9,408 bytes and it holds only 9,407"),
        (IMAGES + b"x", "damaged: its header promises 9,408 bytes and it holds more"),
        (gzip.compress(IMAGES)[:-20], "truncated or damaged: gzip"),
        (gzip.compress(IMAGES)[:20] + b"\0" * 50, "truncated or damaged: gzip"),
        (b"\x89PNG\r\n\x1a\n", "begins with 0x89504e47"),
        (b"\0\0\x0d\x03" + IMAGES[4:], "begins with 0x00000d03"),
        (struct.pack(">IIII", 0x803, 12, 27, 28), "promises 12x27x28 values"),
        (struct.pack(">IIII", 0x803, 2**32 - 1, 28, 28), "promises 4294967295x28x28 values"),
        (idx(np.zeros(12, np.uint8)), "does not hold images"),
        (idx(np.zeros((11, 28, 28), np.uint8)), "holds 11 images, .* 12 labels"),
    ],
    ids="empty header_cut byte_short byte_over gzip_cut gzip_damaged png floats odd huge labels image_short".split(),
)
def test_broken_idx_files_get_one_sentence(tmp_path, content, sentence):
    write_mnist(tmp_path, mnist_values(), packed=False)
    (tmp_path / FILES[0]).write_bytes(content)
    with pytest.raises(errors.InputError, match=sentence) as caught:
        mnist.load(tmp_path)
    assert FILES[0] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_labels_beyond_9_are_refused(tmp_path):
    values = mnist_values()
    values[FILES[1]][4] = 10
    write_mnist(tmp_path, values, packed=True)
    with pytest.raises(errors.InputError, match="holds the label 10"):
        mnist.load(tmp_path)


def test_missing_files_without_download_name_root(tmp_path):
    write_mnist(tmp_path, mnist_values(), packed=True)
    (tmp_path / f"{FILES[2]}.gz").unlink()
    with pytest.raises(errors.InputError, match=f"--root names a folder that holds .*{FILES[2]}"):
        mnist.load(tmp_path, download=False)


def test_root_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "mnist.zip").touch()
    with pytest.raises(errors.InputError, match="is a file; --root names a folder"):
        mnist.load(tmp_path / "mnist.zip")


def test_no_network_is_one_sentence_that_names_root(tmp_path, monkeypatch):
    def refuse(*_args, **_options):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(errors.InputError, match="no network to download it; --root names a folder"):
        mnist.load(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_silent_network_is_given_up(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the call, never answers
        monkeypatch.setattr(mnist, "PATIENCE", 0.2)
        monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", [f"http://127.0.0.1:{silent.getsockname()[1]}/"])
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        start = time.monotonic()
        with pytest.raises(errors.InputError, match="no network"):
            mnist.load(tmp_path)
        assert time.monotonic() - start < 5


def test_torchvision_downloads_from_the_mirror_that_answers(tmp_path, monkeypatch):
    values = mnist_values()
    asked = {}

    def download(self):
        asked.update(mirrors=self.mirrors, timeout=socket.getdefaulttimeout())
        write_mnist(Path(self.raw_folder), values, packed=False)

    monkeypatch.setattr(mnist, "_answering", lambda mirrors, _file: mirrors[1])
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", ["one", "two"])
    monkeypatch.setattr("torchvision.datasets.MNIST.download", download)
    loaded = mnist.load(tmp_path)
    assert torch.equal(loaded.train_labels, torch.from_numpy(values[FILES[1]]).long())
    assert (tmp_path / "MNIST" / "raw" / FILES[0]).is_file()
    assert asked == {"mirrors": ["two"], "timeout": mnist.PATIENCE}
    assert socket.getdefaulttimeout() is None


def test_a_download_that_breaks_off_says_so(tmp_path, monkeypatch):
    def download(_self):
        raise RuntimeError("Error downloading a:\nTried b, got:\nnothing\n")

    monkeypatch.setattr(mnist, "_answering", lambda mirrors, _file: mirrors[0])
    monkeypatch.setattr("torchvision.datasets.MNIST.download", download)
    with pytest.raises(
        errors.InputError, match=r"download failed \(Error downloading a: Tried b.*\); --root"
    ) as caught:
        mnist.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_real_mnist(shared_data):
    loaded = data.load("mnist", shared_data("mnist"))
    assert repr(loaded) == "Digits('mnist': 60,000 to train, 10,000 held out, 28x28, 0..1)"
    assert loaded.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert loaded.test_labels[:5].tolist() == [7, 2, 1, 0, 4]
    # The mean and deviation that every tutorial normalizes MNIST with.
    assert loaded.train_images.double().mean().item() == pytest.approx(0.1307, abs=5e-5)
    assert loaded.train_images.double().std().item() == pytest.approx(0.3081, abs=5e-5)


# --- the network


def test_simple_cnn_is_the_tutorials():
    torch.manual_seed(0)
    net = SimpleCNN()
    assert {name: tuple(p.shape) for name, p in net.named_parameters() if name.endswith("weight")} == {
        "conv1.weight": (16, 1, 5, 5),
        "conv2.weight": (32, 16, 5, 5),
        "fc1.weight": (120, 512),
        "fc2.weight": (84, 120),
        "fc3.weight": (10, 84),
    }
    p = {name: value.detach().double() for name, value in net.named_parameters()}
    x = torch.rand(3, 1, 28, 28, dtype=torch.float64)

    def convolve(x, w, b):  # each window of 5x5, weighted and summed
        return torch.einsum("nchwij,ocij->nohw", x.unfold(2, 5, 1).unfold(3, 5, 1), w) + b[:, None, None]

    def pool(x):  # the largest of each 2x2
        return x.unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2))

    h = pool(convolve(x, p["conv1.weight"], p["conv1.bias"]).clamp(min=0))
    h = pool(convolve(h, p["conv2.weight"], p["conv2.bias"]).clamp(min=0)).reshape(3, 512)
    h = (h @ p["fc1.weight"].T + p["fc1.bias"]).clamp(min=0)
    h = (h @ p["fc2.weight"].T + p["fc2.bias"]).clamp(min=0)
    expected = h @ p["fc3.weight"].T + p["fc3.bias"]
    with torch.no_grad():
        torch.testing.assert_close(net(x.float()).double(), expected, rtol=1e-5, atol=1e-6)


def few(part: tuple[torch.Tensor, torch.Tensor], n: int = 150) -> tuple[torch.Tensor, torch.Tensor]:
    return part[0][:n], part[1][:n]


def test_same_seed_same_weights_another_seed_others(small):
    def trained(seed):
        net = SimpleCNN()  # its own random weights do not matter
        result = small_cnn.train(net, few(small.train), few(small.test), epochs=2, seed=seed)
        return torch.cat([p.detach().flatten() for p in net.parameters()]), result

    (a, first), (b, second), (c, _) = trained(1), trained(1), trained(2)
    assert torch.equal(a, b)
    assert (first.history, first.accuracy) == (second.history, second.accuracy)
    assert not torch.allclose(a, c)


def test_training_leaves_random_state_and_threads_alone(small):
    def state():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    def stop(step):
        if step.step == 2:
            raise KeyboardInterrupt

    net, before, threads = SimpleCNN(), state(), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        small_cnn.train(net, few(small.train), few(small.test), epochs=1, seed=0)
        with pytest.raises(KeyboardInterrupt):
            small_cnn.train(net, few(small.train), few(small.test), epochs=1, seed=0, progress=stop)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert state() == before


def test_progress_tells_every_batch_and_the_accuracy_of_each_epoch(small):
    steps = []
    result = small_cnn.train(SimpleCNN(), few(small.train), few(small.test), epochs=2, seed=0, progress=steps.append)
    per_epoch = -(-150 // small_cnn.BATCH)
    assert [s.step for s in steps] == list(range(1, 2 * per_epoch + 1))
    assert [s.epoch for s in steps] == [1] * per_epoch + [2] * per_epoch
    ends = [s for s in steps if s.accuracy is not None]
    assert [(s.step, s.loss, s.accuracy) for s in ends] == [
        (per_epoch, result.history[0].loss, result.history[0].accuracy),
        (2 * per_epoch, result.history[1].loss, result.history[1].accuracy),
    ]


def test_initial_weights_are_distributed_as_pytorchs():
    torch.manual_seed(0)
    ours, theirs = SimpleCNN(), SimpleCNN().state_dict()
    small_cnn.draw_weights(ours, torch.Generator().manual_seed(0))
    for name, drawn in ours.state_dict().items():
        bound = theirs[name.replace("bias", "weight")].abs().max()  # biases are drawn from the same range
        assert drawn.abs().max() <= bound * 1.02
        assert drawn.unique().numel() > 9
        if drawn.numel() >= 400:
            assert drawn.abs().max().item() == pytest.approx(bound.item(), rel=0.02)
            assert drawn.std().item() == pytest.approx(theirs[name].std().item(), rel=0.05)


def test_jitter_turns_scales_and_shifts_each_image_within_its_limits(monkeypatch):
    dot = torch.zeros(64, 1, 29, 29)
    dot[:, :, 14, 14] = 1
    y = x = torch.arange(29.0)

    def centers(images):
        mass = images.sum((1, 2, 3))
        return torch.stack([(images.sum((1, 3)) * y).sum(1) / mass, (images.sum((1, 2)) * x).sum(1) / mass], 1)

    def jittered(turn, zoom, shift):
        for name, value in (("ROTATE", turn), ("ZOOM", zoom), ("SHIFT", shift)):
            monkeypatch.setattr(small_cnn, name, value)
        return small_cnn.jitter(dot, torch.Generator().manual_seed(0))

    torch.testing.assert_close(jittered(0, 0, 0), dot, atol=1e-5, rtol=0)
    moved = centers(jittered(0, 0, 2)) - 14
    assert moved.abs().max() <= 2 + 1e-3
    assert (moved.amin() < -1) & (moved.amax() > 1)
    dot = dot.roll(10, dims=3)  # 10 to the right of the centre turns around it
    around = centers(jittered(10, 0, 0)) - 14
    torch.testing.assert_close(around.norm(dim=1), torch.full((64,), 10.0), atol=0.05, rtol=0)
    assert (around[:, 0] / 10).asin().rad2deg().abs().max() == pytest.approx(9.8, abs=0.5)
    nearer = centers(jittered(0, 0.1, 0))[:, 1] - 14
    assert 8.9 < nearer.min() < 9.3
    assert 10.7 < nearer.max() < 11.1


def test_no_epochs_are_refused(small):
    with pytest.raises(errors.InputError, match="at least one epoch"):
        small_cnn.train(SimpleCNN(), small.train, small.test, epochs=0, seed=0)


def test_digits_are_learned_to_over_97_percent(small):
    net = SimpleCNN()
    result = small_cnn.train(net, small.train, small.test, epochs=small.epochs, seed=0)
    with torch.no_grad():
        right = (net(small.test_images).argmax(1) == small.test_labels).double().mean().item()
    assert result.accuracy == right == result.history[-1].accuracy
    assert right > 0.97
    assert all(p.grad is None for p in net.parameters())
    assert F.softmax(net(small.test_images[:1]), dim=1).max() > 0.5  # and it is sure of it


# --- weights on disk


def test_weights_come_back_with_what_is_said_of_them(tmp_path):
    saved, loaded = SimpleCNN(), SimpleCNN()
    path = tmp_path / "new" / "digits.safetensors"
    small_cnn.save_weights(saved, path, data="digits", accuracy=0.9915, seed=3)
    about = small_cnn.load_weights(loaded, path)
    assert about == {
        "data": "digits",
        "accuracy": "0.9915",
        "seed": "3",
        "arch": "innersight.data.small_cnn:SimpleCNN",
    }
    for name, value in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_weights_that_cannot_be_used_get_one_sentence(tmp_path):
    from safetensors.torch import save_file

    net = SimpleCNN()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    path = tmp_path / "w.safetensors"
    with pytest.raises(errors.InputError, match="no such file"):
        small_cnn.load_weights(net, path)
    path.write_bytes(b"not weights")
    with pytest.raises(errors.InputError, match="not a whole safetensors file"):
        small_cnn.load_weights(net, path)
    save_file({**SimpleCNN().state_dict(), "fc3.bias": torch.zeros(7), "extra": torch.zeros(1)}, path)
    with pytest.raises(errors.InputError, match=r"does not hold weights of SimpleCNN: extra, fc3\.bias differ"):
        small_cnn.load_weights(net, path)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
