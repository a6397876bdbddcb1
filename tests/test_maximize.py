"""Activation maximization: what is found raises its unit far above chance, and where the answer is known, finds it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn

import innersight
from innersight import data, errors, targets
from innersight import maximize as maximization
from innersight.cli import main
from innersight.data import small_cnn
from innersight.maximize import Canvas, moved, same_spectrum
from innersight.preprocess import Preprocess
from innersight.results import Maximization, load
from innersight.testing import left_as_found, small_network


@pytest.fixture(scope="module")
def digits() -> innersight.Network:
    """The tutorial's network, trained on the spot."""
    model, known = small_cnn.SimpleCNN(), data.load("digits")
    trained = small_cnn.train(model, known.train, known.test, epochs=3, seed=0)
    assert trained.accuracy > 0.9
    labels = [str(d) for d in range(10)]
    return innersight.open(model.eval(), input_shape=(1, 28, 28), preprocess=known.preprocess, labels=labels)


def opened(module: nn.Module, shape=(3, 16, 16), **options) -> innersight.Network:
    return innersight.open(module.eval(), input_shape=shape, **options)


def filters(weight: torch.Tensor, bias: float = 0.0) -> nn.Conv2d:
    conv = nn.Conv2d(weight.shape[1], len(weight), tuple(weight.shape[2:]))
    with torch.no_grad():
        conv.weight.copy_(weight)
        conv.bias.fill_(bias)
    return conv


def noise(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


# -- what is found


def test_the_class_model_of_each_digit_is_that_digit_to_the_network(digits):
    found = digits.maximize(target=[str(d) for d in range(10)])
    seen = digits.predict(found.inputs)
    assert seen.classes.tolist() == list(range(10))
    assert seen.probabilities.max(1).min() > 0.9
    assert found.verdict["answer"] == [str(d) for d in range(10)]
    assert found.verdict["probability"] == pytest.approx(seen.probabilities.max(1).tolist(), abs=1e-5)
    assert found.verdict["activation"] == pytest.approx(seen.logits.diagonal().tolist(), rel=1e-4)
    assert min(found.verdict["rise"]) > 4
    assert min(found.verdict["rise_over_same_spectrum"]) > 2
    real = digits.predict(data.load("digits").test_images).logits
    assert (seen.logits.diagonal() > real.max(0)).all()  # more than any real digit


@pytest.mark.parametrize("layer", ["conv1", "conv2", "fc1"])
def test_a_channel_rises_far_above_chance(digits, layer):
    """Measured here anew: on white noise, on noise with 1/f, and on the digits it was trained on."""
    channels = [0, 3, 7]
    found = digits.maximize(layer, channels, steps=128)
    rng = np.random.default_rng(3)
    spectrum = 1 / np.maximum(np.hypot(*np.meshgrid(np.fft.fftfreq(28), np.fft.fftfreq(28))), 1 / 28)
    smooth = np.fft.ifft2(np.fft.fft2(rng.normal(size=(100, 1, 28, 28))) * spectrum).real
    smooth = (0.5 + 0.2 * smooth / smooth.std()).clip(0, 1)
    real = data.load("digits").test_images.numpy()
    own = mean_by_hook(digits, layer, found.inputs)[range(3), channels]
    assert own == pytest.approx(found.verdict["activation"], rel=1e-4, abs=1e-5)
    for others in (rng.random((100, 1, 28, 28)), smooth, real):
        values = mean_by_hook(digits, layer, others.astype(np.float32))[:, channels]
        assert ((own - values.mean(0)) / values.std(0)).min() > (2 if others is real else 4)
        assert (own > values.max(0)).all()
    assert min(found.verdict["rise"]) > 4


def mean_by_hook(net, layer: str, x) -> np.ndarray:
    """(N, C): the layer's mean over the places, read by a plain hook."""
    seen = []
    handle = net.module.get_submodule(layer).register_forward_hook(lambda _m, _i, out: seen.append(out))
    with torch.no_grad():
        net.module(torch.as_tensor(x))
    handle.remove()
    return seen[0].flatten(2).mean(2).numpy() if seen[0].dim() > 2 else seen[0].numpy()


def test_one_unit_of_a_channel(digits):
    with digits.engine.session():
        found = digits.maximize("conv2", 5, at=(2, 6), steps=128)
        middle = digits.maximize("conv2", 5, at="middle", steps=128)
    x = torch.from_numpy(np.concatenate([found.inputs, middle.inputs]))
    with torch.no_grad():
        maps = digits.module.conv2(digits.module.pool(torch.relu(digits.module.conv1(x))))[:, 5]
    assert [float(maps[0, 2, 6]), float(maps[1, 4, 4])] == pytest.approx(
        [found.verdict["activation"][0], middle.verdict["activation"][0]], rel=1e-4
    )
    assert min(found.verdict["rise"][0], middle.verdict["rise"][0]) > 4
    assert found.units == ["conv2 channel 5 at (2, 6)"]
    # it does not see the rest of the picture: what is asked for by nobody fades, what it sees has contrast
    box = digits.layers["conv2"].receptive_field.box(4, 4)
    inside = np.zeros((28, 28), bool)
    inside[box[0] : box[2], box[1] : box[3]] = True
    contrast = np.abs(middle.values[0, ..., 0] - 0.5)
    assert contrast[inside].mean() > 2 * contrast[~inside].mean()


@pytest.mark.parametrize("name", ["residual", "gated", "tokens", "channels_last"])
def test_channels_of_every_kind_of_layer_rise(name):
    net = small_network(name)
    layer = net.layers.spatial[-2]
    found = net.maximize(layer, range(4), steps=64)
    assert min(found.verdict["rise"]) > 4
    maps = net.maps(found.inputs, layers=layer)[layer]
    assert found.verdict["activation"] == pytest.approx(
        [float(maps[k, k].mean()) for k in range(4)], rel=1e-4, abs=1e-5
    )


def test_on_tokens_the_mean_is_over_those_of_the_picture():
    net = small_network("tokens")
    found = net.maximize("blocks.0", 3, steps=16)
    seen = []
    handle = net.module.blocks[0].register_forward_hook(lambda _m, _i, out: seen.append(out))
    with torch.no_grad():
        net.module(torch.from_numpy(found.inputs))
    handle.remove()
    assert found.verdict["activation"][0] == pytest.approx(float(seen[0][0, 1:, 3].mean()), rel=1e-4)  # 0: class token


def test_other_targets(digits):
    found = digits.maximize(target=targets.difference("3", "8"), steps=128)
    logits = digits.predict(found.inputs).logits[0]
    assert found.units == ["3 and not 8"]
    assert found.verdict["activation"][0] == pytest.approx(logits[3] - logits[8], rel=1e-4)
    assert found.verdict["rise"][0] > 4
    found = digits.maximize(target=lambda output: output[:, 4] + output[:, 9], steps=16)
    logits = digits.predict(found.inputs).logits[0]
    assert found.verdict["activation"][0] == pytest.approx(logits[4] + logits[9], rel=1e-4)
    assert digits.maximize(target=np.array([1, 2]), steps=1).units == ["1", "2"]


def test_squeezenet_draws_a_goldfish(shared_data):
    weights = shared_data("torch", "squeezenet1_1_imagenet.pth")
    net = innersight.open("torchvision:squeezenet1_1", weights=str(weights))
    found = net.maximize(target="goldfish", steps=24)
    assert found.verdict["answer"] == ["goldfish"]
    assert found.verdict["probability"][0] > 0.9
    assert found.verdict["rise"][0] > 50
    assert found.verdict["rise_over_same_spectrum"][0] > 20


# -- cases with a known answer


@pytest.mark.parametrize("channels", ["L", "RGB", "BGR"])
def test_a_linear_unit_is_answered_by_its_own_signs(channels):
    count = 1 if channels == "L" else 3
    weight = noise(2, count, 9, 7)
    preprocess = Preprocess((9, 7), channels=channels, mean=(0.4,), std=(0.2,))
    net = opened(filters(weight), (count, 9, 7), preprocess=preprocess)
    found = net.maximize("output" if "output" in net.layers else next(iter(net.layers)), [0, 1], robust=False)
    for k in range(2):
        w = weight[k].numpy()
        picture = found.values[k].transpose(2, 0, 1)[:: -1 if channels == "BGR" else 1]  # a picture is RGB
        agree = np.sign(picture - 0.5) == np.sign(w)
        assert np.abs(w)[agree].sum() / np.abs(w).sum() > 0.93
        best = np.abs(w).sum() * 0.5 / 0.2 + (0.5 - 0.4) / 0.2 * w.sum()  # all pixels at their end
        assert found.verdict["activation"][k] > 0.6 * best


def test_pixels_end_where_the_paper_says():
    """S(I) = w . I is S(I) - l2 |I|^2 at its largest for I = w / (2 l2), within what a picture can be."""
    weight = noise(1, 3, 8, 8)
    preprocess = Preprocess((8, 8), mean=(0.5,), std=(0.25,))  # inputs are -2 to 2
    net = opened(filters(weight), (3, 8, 8), preprocess=preprocess)
    layer = next(iter(net.layers))
    found = net.maximize(layer, 0, parameterization="pixels", l2=0.4, robust=False, steps=200)
    expected = (weight / 0.8).clamp(-2, 2).numpy()
    assert np.abs(found.inputs - expected).max() < 0.02
    assert found.values.min() >= 0
    assert found.values.max() <= 1
    assert found.provenance.options["l2"] == 0.4


def test_a_network_that_ends_in_a_softmax_is_asked_for_the_score_before_it():
    logits = nn.Sequential(filters(noise(4, 3, 16, 16)), nn.Flatten())
    net = opened(nn.Sequential(logits, nn.Softmax(1)), labels=["a", "b", "c", "d"])
    bare = opened(logits, labels=["a", "b", "c", "d"])
    found, expected = net.maximize(target="c", steps=32), bare.maximize(target="c", steps=32)
    assert np.allclose(found.values, expected.values, atol=1e-5)
    assert found.verdict["activation"][0] == pytest.approx(
        float(logits(torch.from_numpy(found.inputs)).detach()[0, 2]), rel=1e-4
    )
    assert any("before the softmax" in note for note in found.provenance.notes)


def test_the_run_ends_behind_the_layer():
    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head, self.count = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), 0

        def forward(self, x):
            x = self.first(x)
            self.count += 1
            return self.head(x)

    module = Counted()
    heads = []
    module.head.register_forward_hook(lambda *_: heads.append(1))
    opened(module).maximize("first", 0, steps=20)
    assert module.count <= 6  # learnt a few times; a step ends before the line is reached
    assert len(heads) <= 6


# -- silent units


class Silent(nn.Module):
    """Behind the ReLU: channel 0 always fires, 1 never, 2 only on pictures with contrast."""

    def __init__(self):
        super().__init__()
        weight = torch.zeros(3, 3, 2, 2)
        weight[:2, :, 0], weight[:2, :, 1] = 1, -1
        weight[2, :, :, 0], weight[2, :, :, 1] = 1, -1
        self.conv = filters(weight)
        with torch.no_grad():
            self.conv.bias.copy_(torch.tensor([20.0, -20.0, -1.0]))

    def forward(self, x):
        return torch.relu(self.conv(x)).mean((2, 3))


def test_a_unit_that_never_fires_is_named():
    net = opened(Silent())
    with pytest.raises(errors.Unsupported, match="relu channel 1 answers to none of 17 random starts"):
        net.maximize("relu", 1, steps=4)
    with pytest.raises(errors.Unsupported, match="class 1 answers to none"):
        net.maximize(target=1, steps=4)
    with pytest.raises(errors.Unsupported, match=r"relu channel 1 at \(7, 7\) answers .*the whole channel has more"):
        net.maximize("relu", 1, at="middle", steps=4)


def test_a_silent_channel_in_a_list_does_not_lose_the_others(tmp_path):
    net = opened(Silent())
    found = net.maximize("relu", [0, 1, 2], steps=32)
    assert found.verdict["dead"] == [False, True, False]
    assert found.verdict["rise"][0] > 4
    assert found.verdict["rise"][2] > 4  # silent in front of gray, it was tried on random pictures
    assert np.isnan(found.verdict["rise"][1])
    assert (found.values[1] == 0.5).all()
    assert [note for note in found.provenance.notes if "relu channel 1 answers to none" in note]
    assert np.allclose(found.values[[0, 2]], net.maximize("relu", [0, 2], steps=32).values, atol=1e-4)
    assert repr(found).endswith(", 1 dead>")
    assert found.to_json()["pictures"][1]["rise"] is None
    found.save(tmp_path / "f.npz")
    again = load(tmp_path / "f.npz")
    assert again.verdict["rise"][1] is None
    assert repr(again) == repr(found)
    assert "silent at every start" in texts(again.plot().figure)


def test_what_was_not_raised_is_said():
    net = opened(Silent())
    found = net.maximize("relu", 2, parameterization="pixels", l2=1000.0, steps=32)  # smallness is all that counts
    assert found.verdict["activation"] == [0]
    assert any("was not raised" in note for note in found.provenance.notes)


def test_a_score_without_a_gradient_is_refused():
    class Step(nn.Module):
        def forward(self, x):
            return (x.flatten(1) > 0).float()

    with pytest.raises(errors.Unsupported, match="class 0 does not depend on the picture in a way that has a gradient"):
        opened(Step()).maximize(target=0)
    with pytest.raises(errors.Unsupported, match="gradients, which a plain function does not offer"):
        innersight.open(lambda x: x.mean((2, 3)), input_shape=(3, 8, 8)).maximize(target=0)


# -- frequencies, colors, moves


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (21, 27)])
def test_white_noise_becomes_one_over_f(size):
    canvas = Canvas.of((1, *size), None)
    spectra = noise(600, *canvas.spectrum_shape)
    pictures = canvas.paint(spectra)
    assert float(pictures.min()) > 0
    assert float(pictures.max()) < 1
    logits = torch.logit(pictures.double()).numpy()[:, 0]
    assert logits.var() == pytest.approx(1, rel=0.1)
    power = (np.abs(np.fft.fft2(logits)) ** 2).mean(0)
    fy, fx = np.meshgrid(np.fft.fftfreq(size[0]), np.fft.fftfreq(size[1]), indexing="ij")
    f = np.maximum(np.hypot(fy, fx), 1 / max(size))
    flat = power * f**2
    # the frequencies that are their own mirror image hold half: their phase has no freedom
    free = (fx > 0) & (fx < 0.5)
    assert flat[free].std() / flat[free].mean() < 0.1


def test_colors_vary_as_those_of_photographs():
    canvas = Canvas.of((3, 16, 16), None)
    logits = torch.logit(canvas.paint(noise(500, *canvas.spectrum_shape)).double())
    found = np.cov(logits.movedim(1, 0).flatten(1).numpy())
    # The square root of ImageNet's color covariance as published with Lucid (Olah et al., 2017): another measurement.
    lucid = np.array([[0.26, 0.09, 0.02], [0.27, 0.00, -0.05], [0.27, -0.09, 0.03]])
    expected = lucid @ lucid.T
    expected *= 3 / np.trace(expected)
    assert np.trace(found) == pytest.approx(3, rel=0.1)
    assert np.abs(found / np.trace(found) - expected / 3).max() < 0.03
    axes = canvas.colors().numpy()
    assert np.allclose(axes.T @ axes, np.diag(np.diag(axes.T @ axes)), atol=2e-3)  # along axes at right angles
    assert np.array_equal(Canvas.of((5, 8, 8), None).colors(), np.eye(5))


@pytest.mark.parametrize(
    "preprocess",
    [
        Preprocess((12, 20), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        Preprocess((12, 20), channels="BGR", scale=1.0, mean=(104, 117, 123)),
        Preprocess((12, 20), channels="L", invert=True, mean=(0.1,), std=(0.3,)),
        Preprocess((12, 20), channels="L", scale=1 / 127.5, mean=(1.0,)),
    ],
    ids=["torchvision", "Caffe", "dark on light", "-1 to 1"],
)
def test_a_picture_becomes_the_input_that_reading_it_would_give(preprocess):
    count = preprocess.shape[0]
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, count), dtype=np.uint8)
    expected, _ = preprocess.apply(Image.fromarray(pixels[..., 0] if count == 1 else pixels))
    canvas = Canvas.of(preprocess.shape, preprocess)
    picture = torch.from_numpy(pixels / np.float32(255)).movedim(-1, 0)
    x = canvas.to_input(picture)
    assert np.allclose(x.numpy(), expected, rtol=1e-5, atol=1e-4)
    assert np.allclose(canvas.to_picture(x).numpy(), picture.numpy(), atol=1e-5)
    assert torch.equal(canvas.inside(x), x)
    far = canvas.inside(torch.stack([x - 1000, x + 1000]))
    ends = torch.stack([canvas.to_input(torch.zeros_like(picture)), canvas.to_input(torch.ones_like(picture))])
    assert torch.allclose(far.amin(0), ends.amin(0))
    assert torch.allclose(far.amax(0), ends.amax(0))


@pytest.mark.parametrize(
    "move", [(0, 0, 0, 0), (1, 0, 0, 0), (0, -1, 0, 0), (0, 0, 1, 0), (0, 0, -0.5, 1), (1, 1, 1, -1)]
)
def test_moves_shift_turn_and_scale_without_shearing(move):
    height, width = 40, 60
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    came_from = moved(torch.stack([x, y])[None].float(), torch.tensor(move))[0].numpy()[:, 12:-12, 15:-15]
    right, down, turn, zoom = move
    size, angle = 1.1**-zoom, np.radians(10 * turn)
    rotation = size * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    from_middle = np.stack([x.numpy() - width / 2, y.numpy() - height / 2])[:, 12:-12, 15:-15]
    middle = np.array([width / 2 + 0.05 * right * width, height / 2 + 0.05 * down * height])
    expected = np.einsum("ij,jyx->iyx", rotation, from_middle) + middle[:, None, None]
    assert np.abs(came_from - expected).max() < 1e-3


def test_noise_of_the_same_spectrum_has_the_spectrum_and_the_colors():
    picture = 0.5 + 0.02 * noise(3, 16, 21)  # so faint that nothing is cut
    other = same_spectrum(picture, torch.Generator().manual_seed(0))
    assert not torch.allclose(picture, other, atol=1e-2)
    assert torch.allclose(torch.fft.fft2(other).abs(), torch.fft.fft2(picture).abs(), atol=1e-3)
    assert np.allclose(np.cov(other.flatten(1)), np.cov(picture.flatten(1)), atol=1e-6)
    assert torch.allclose(other.mean((1, 2)), picture.mean((1, 2)), atol=1e-6)


# -- the same again, and left as found


def test_the_same_seed_finds_the_same_picture(digits):
    torch.manual_seed(1)
    first = digits.maximize("conv2", [1, 2], steps=8, seed=5)
    torch.manual_seed(2)
    again = digits.maximize("conv2", [1, 2], steps=8, seed=5)
    assert np.array_equal(first.values, again.values)
    assert first.verdict == again.verdict
    other = digits.maximize("conv2", [1, 2], steps=8, seed=6)
    assert not np.allclose(first.values, other.values, atol=1e-2)
    assert first.provenance.seed == 5


def test_together_is_as_one_by_one_and_in_parts(digits):
    together = digits.maximize("conv2", [4, 1, 9], steps=6)
    for k, channel in enumerate([4, 1, 9]):
        assert np.allclose(together.values[k], digits.maximize("conv2", channel, steps=6).values[0], atol=1e-3)
    digits.engine.budget = 1  # bytes: one at a time
    try:
        parts = digits.maximize("conv2", [4, 1, 9], steps=6)
    finally:
        digits.engine.budget = None
    assert np.allclose(together.values, parts.values, atol=1e-3)
    assert together.verdict["rise"] == pytest.approx(parts.verdict["rise"], rel=1e-2)


def test_a_network_of_one_fixed_batch_size_finds_the_same(digits):
    fixed = digits._with_module(digits.module)
    fixed.engine.fixed_batch = 2
    found, expected = fixed.maximize("conv2", [4, 1, 9], steps=6), digits.maximize("conv2", [4, 1, 9], steps=6)
    assert np.allclose(found.values, expected.values, atol=1e-3)
    found, expected = fixed.maximize(target=["1", "4", "9"], steps=6), digits.maximize(target=["1", "4", "9"], steps=6)
    assert np.allclose(found.values, expected.values, atol=1e-3)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, RuntimeError])
def test_the_model_is_left_as_found(interrupt):
    net = small_network("residual")
    net.module.train()
    with left_as_found(net.module):
        net.maximize("conv2", 1, steps=2)
    with left_as_found(net.module), torch.inference_mode():
        net.maximize(target=1, steps=2)

    def stop(done: int, _total: int, _what: str) -> None:
        if done == 3:
            raise interrupt

    net.progress = stop
    with left_as_found(net.module), pytest.raises(interrupt):
        net.maximize("conv2", 1, steps=8)


def test_progress_counts_the_steps(digits):
    seen = []
    digits.progress = lambda done, total, what: seen.append((done, total, what))
    digits.engine.budget = 1
    try:
        digits.maximize("conv1", [0, 1], steps=5)
    finally:
        digits.progress = digits.engine.budget = None
    assert seen == [(k, 10, "steps") for k in range(1, 11)]


def test_inputs_that_are_no_pictures():
    net = opened(nn.Conv2d(5, 2, 3), (5, 12, 10))
    found = net.maximize(next(iter(net.layers)), 1, steps=32)
    assert found.values.shape == (1, 12, 10, 5)
    assert found.images[0].size == (10, 12)
    assert found.verdict["rise"][0] > 4
    assert any("taken as 0..1" in note for note in found.provenance.notes)
    net.input_shape = None
    with pytest.raises(errors.InputError, match=r"input size .* is not known: open it with input_shape="):
        net.maximize("conv2d", 0)
    net.input_shape = (7,)
    with pytest.raises(errors.Unsupported, match=r"pictures \(C, H, W\) can be found, and Conv2d takes \(7,\)"):
        net.maximize("conv2d", 0)


# -- what is refused


@pytest.mark.parametrize(
    ("given", "kind", "sentence"),
    [
        ({"layer": "conv3", "channel": 0}, errors.UnknownName, "no layer 'conv3' in this network; did you mean conv"),
        ({"layer": "conv2", "channel": 32}, errors.UnknownName, "channel 32 is out of range: conv2 has 32 channels"),
        ({"layer": "conv2", "channel": -1}, errors.UnknownName, "channel -1 is out of range"),
        ({"layer": "conv2", "channel": "7"}, errors.InputError, "channel='7': a whole number, or a list of them"),
        ({"layer": "conv2", "channel": []}, errors.InputError, "channel= is empty"),
        ({"layer": "conv2"}, errors.InputError, "say which channel of conv2: channel= one of 0 to 31, or a list"),
        ({}, errors.InputError, "nothing to maximize: name a class"),
        ({"layer": "conv2", "channel": 1, "target": 3}, errors.InputError, "a class .* or a channel .*, not both"),
        ({"target": "eleven"}, errors.UnknownName, "no class 'eleven' in this network"),
        ({"target": [1, 10]}, errors.UnknownName, "class 10 is out of range: the network has 10 outputs"),
        ({"target": [1, None]}, errors.InputError, "no picture yet, so no class is predicted"),
        ({"target": []}, errors.InputError, "target= is empty"),
        ({"target": 1, "at": "middle"}, errors.InputError, "at= is a place on the grid of a layer"),
        ({"layer": "fc1", "channel": 1, "at": "middle"}, errors.Unsupported, "'fc1' has no place in the picture"),
        ({"layer": "conv2", "channel": 1, "at": (8, 0)}, errors.InputError, "outside of the 8x8 grid of conv2"),
        ({"layer": "conv2", "channel": 1, "at": "center"}, errors.InputError, "at='center': 'everywhere', 'middle' or"),
        ({"target": 1, "steps": 0}, errors.InputError, "steps=0: a whole number from 1 on"),
        ({"target": 1, "parameterization": "wavelets"}, errors.UnknownName, "no parameterization 'wavelets'"),
        ({"target": 1, "l2": 0.1}, errors.InputError, "l2= is for parameterization='pixels'"),
        ({"target": 1, "learning_rate": -1}, errors.InputError, "learning_rate=-1: a number from 0 on"),
    ],
)  # fmt: skip
def test_what_cannot_be_maximized_gets_a_sentence(digits, given, kind, sentence):
    with pytest.raises(kind, match=sentence):
        digits.maximize(**given)


# -- the result


@pytest.fixture(scope="module")
def four(digits) -> Maximization:
    return digits.maximize("conv2", [0, 5, 6, 7], steps=12)


def texts(figure) -> str:
    import matplotlib.text

    return " | ".join(t.get_text().replace("\n", " ") for t in figure.findobj(matplotlib.text.Text) if t.get_text())


def test_a_result_says_what_it_is(four):
    assert re.fullmatch(
        r"<Maximization of SimpleCNN for conv2 channel 0, conv2 channel 5, conv2 channel 6, \.\.\.: 4 pictures of "
        r"28x28, raised [\d.]+ to [\d.]+ standard deviations above random pictures>",
        repr(four),
    )
    assert four.values.shape == (4, 28, 28, 1)
    assert four.values.min() >= 0
    assert four.values.max() <= 1
    assert four.inputs.shape == (4, 1, 28, 28)
    assert four.history.shape == (4, 12)
    assert (four.history[:, -1] > four.history[:, 0]).all()
    p = four.provenance
    assert (p.network, p.method, p.layer, p.seed) == ("SimpleCNN", "maximize", "conv2", 0)
    assert p.options["channel"] == [0, 5, 6, 7]
    assert p.options["steps"] == 12
    one = four[2]
    assert one.units == ["conv2 channel 6"]
    assert np.array_equal(one.values[0], four.values[2])
    assert one.verdict["rise"] == [four.verdict["rise"][2]]
    assert [len(f) for f in four] == [1, 1, 1, 1]
    assert [i.size for i in four.images] == [(28, 28)] * 4
    assert np.abs(np.asarray(four.images[1]) / 255 - four.values[1, ..., 0]).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_saved_result_comes_back_equal(four, suffix, tmp_path):
    path = tmp_path / f"four{suffix}"
    assert four.save(path) == [path]
    again = load(path)
    assert again.to_json() == four.to_json()
    assert repr(again) == repr(four)
    for name in ("values", "inputs", "history"):
        assert np.array_equal(getattr(again, name), getattr(four, name))
    assert np.array_equal(np.asarray(again.images[0]), np.asarray(four.images[0]))


def test_a_result_is_drawn_with_what_it_is_worth(four, digits, tmp_path):
    assert four.plot() is four
    said = texts(four.figure)
    for k, channel in enumerate([0, 5, 6, 7]):
        assert f"channel {channel}" in said
        assert f"rise {innersight.results.color.number(four.verdict['rise'][k])} (" in said
    assert "What conv2 of SimpleCNN answers to most" in said
    drawn = [ax.images[0].get_array() for ax in four.figure.axes]
    assert len(drawn) == 4
    size = drawn[1].shape[0]
    assert np.array_equal(drawn[1][:: size // 28, :: size // 28, 0], np.asarray(four.images[1]))
    (path,) = four.save(tmp_path / "four.png", columns=4)
    with Image.open(path) as image:
        assert image.width > 2 * image.height
    classes = digits.maximize(target=["3", "5"], steps=2).plot()
    assert "seen as" in texts(classes.figure)
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    assert four[0].plot(ax=ax).figure is ax.figure
    with pytest.raises(errors.InputError, match="one set of axes holds one picture, and there are 4"):
        four.plot(ax=ax)
    assert four._repr_html_().count("<img") == 1
    assert four[0]._repr_html_().count("<figure") == 1


# -- the command line


@pytest.fixture
def run(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_cnn.save_weights(digits.module, "w.safetensors", data="digits", accuracy=0.0, seed=0)
    model = ("w.safetensors", "--arch", "innersight.data.small_cnn:SimpleCNN", "--input-shape", "1,28,28")
    return lambda *args: CliRunner().invoke(main, ["maximize", *model, "--steps", "12", *args])


def test_the_command_writes_and_prints(run, digits):
    result = run("--layer", "conv2", "--channel", "0,5-6", "--channel", "7", "--out", "f.png", "--out", "f.npz")
    assert result.exit_code == 0, result.output
    found = load("f.npz")
    expected = digits.maximize("conv2", [0, 5, 6, 7], steps=12)
    assert found.units == expected.units
    assert np.allclose(found.values, expected.values, atol=1e-3)
    rows = [line for line in result.stdout.splitlines() if line.startswith("conv2 channel")]
    assert [line.split()[2] for line in rows] == ["0", "5", "6", "7"]
    assert f"{found.verdict['rise'][3]:.3g}" in rows[3]
    assert "wrote f.png" in result.stdout
    assert Path("f.png").stat().st_size > 5000


def test_the_command_in_json_and_with_classes(run):
    result = run("--target", "3", "--target", "5", "--at", "everywhere", "--seed", "2", "--json", "--out", "f.npz")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert [p["unit"] for p in record["pictures"]] == ["class 3", "class 5"]
    assert record["provenance"]["seed"] == 2
    assert record["files"] == ["f.npz"]
    assert record["pictures"][0]["rise"] == load("f.npz").verdict["rise"][0]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("--layer", "conv2", "--channel", "99"), "channel 99 is out of range: conv2 has 32 channels"),
        (("--layer", "conv2", "--channel", "x"), "--channel takes numbers such as 7, 0,7 or 12-15, not 'x'"),
        (("--layer", "conv2", "--channel", "5-2"), "--channel 5-2: from the lower number to the higher one"),
        (("--layer", "conv2"), "say which channel of conv2: --channel one of 0 to 31"),
        (("--layer", "conv2", "--channel", "1", "--at", "9,9"), "outside of the 8x8 grid"),
        ((), "nothing to maximize: name a class"),
        (("--target", "tench"), "no class 'tench'"),
    ],
)  # fmt: skip
def test_the_command_refuses_with_one_sentence(run, given, sentence):
    result = run(*given)
    assert result.exit_code == 2
    (line,) = [text for text in result.stderr.splitlines() if text.startswith("innersight: ")]
    assert sentence in line
    assert not Path("maximize.png").exists()


def test_choices_of_the_command_are_those_there_are():
    choices = {p.name: tuple(p.type.choices) for p in main.commands["maximize"].params if hasattr(p.type, "choices")}
    assert choices == {"parameterization": maximization.PARAMETERIZATIONS}


def test_the_way_up_is_that_of_torchs_adam():
    from innersight.maximize import _Adam

    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 4, generator=generator)
    theirs, ours = start.clone().requires_grad_(), start.clone()
    peer, own = torch.optim.AdamW([theirs], lr=0.05, eps=1e-20, weight_decay=0.1), _Adam(ours, 0.1)
    for k in range(20):
        slope = torch.randn(3, 4, generator=generator)
        peer.param_groups[0]["lr"] = 0.05 / (k + 1)
        theirs.grad = -slope
        peer.step()
        own.up(slope, 0.05 / (k + 1))
    assert torch.allclose(ours, theirs, atol=1e-6)
