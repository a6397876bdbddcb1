"""Every method explains every kind of target, image by image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import innersight
from innersight import targets
from innersight.methods import all_methods
from innersight.testing import close, small_network

FEW = {
    "samples": 6, "steps": 4, "masks": 32, "grid": 3, "designs": 4, "segments": "grid", "window": 6, "stride": 5,
    "max_steps": 16,
}  # fmt: skip
METHODS = [name for name in all_methods() if name != "cam"]  # which is defined for a class and a linear head alone


def few(name):
    """Options that make a method quick: those of FEW that it has, in the type of its own."""
    more = {"kernel_shap": {"samples": 200}, "guided_integrated_gradients": {"steps": 4}}.get(name, {})
    return {k: v for k, v in FEW.items() if k in all_methods()[name].options} | more


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Dense(nn.Module):
    """A segmentation in 3 classes."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, x):
        return self.b(self.a(x).relu())


class Detector(nn.Module):
    """One object an image: the brighter half of the picture, in the words of torchvision's detectors."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        heat = self.conv(x).relu().mean(1)
        scores = torch.stack([heat[:, :, :8].mean((1, 2)), heat[:, :, 8:].mean((1, 2))], 1).sigmoid()
        boxes = x.new_tensor([[0.0, 0.0, 8.0, 16.0], [8.0, 0.0, 16.0, 16.0]])
        labels = torch.tensor([1, 2])
        return [{"boxes": boxes, "scores": scores[i], "labels": labels} for i in range(len(x))]


def with_attention(name):
    return "attention" in all_methods()[name].needs


@pytest.mark.parametrize("name", METHODS)
def test_a_difference_an_embedding_and_a_function(name):
    net = small_network("tokens" if with_attention(name) else "residual")
    x = noise(2, 3, 16, 16)
    answer = torch.linspace(-1, 1, 4)
    for target, text in [
        (targets.difference(1, 2), "class 1 and not class 2"),
        (targets.embedding(answer), "similarity to the embedding"),
        (lambda out: out[:, 0] * out[:, 3] + 2, "the target function"),
        (targets.probability(0), "probability of class 0"),
    ]:
        s = net.explain(x, name, target=target, **few(name))
        assert s.targets == [text] * 2
        assert np.isfinite(s.values).all()


@pytest.mark.parametrize("name", METHODS)
def test_each_image_has_a_target_of_its_own(name):
    net = small_network("tokens" if with_attention(name) else "gated")
    x = noise(3, 3, 16, 16)
    together = net.explain(x, name, target=[2, None, 0], **few(name))
    for i, target in enumerate([2, None, 0]):
        alone = net.explain(x[i : i + 1], name, target=target, **few(name))
        assert together.targets[i] == alone.targets[0]
        assert close(together.values[i], alone.values[0], 1e-3)


@pytest.mark.parametrize("name", [n for n in METHODS if not with_attention(n)])
def test_a_region_of_a_segmentation(name):
    """The score is that of the left half, so what is found lies there, or within a pixel or two of it."""
    torch.manual_seed(0)
    net = innersight.open(Dense().eval(), input_shape=(3, 16, 16))
    where = np.zeros((16, 16), bool)
    where[:, :8] = True
    s = net.explain(noise(2, 3, 16, 16), name, target=targets.mask(where, of=1), **few(name))
    assert s.targets == ["class 1 in the mask"] * 2
    if all_methods()[name].family in ("gradient", "relevance", "decomposition") and name != "guided_gradcam":
        assert np.abs(s.values[..., 12:]).max() <= 1e-5 * np.abs(s.values).max() or name == "fullgrad"
        assert np.abs(s.values[..., :8]).max() > 0


@pytest.mark.parametrize("name", [n for n in METHODS if not with_attention(n)])
def test_a_detected_object(name):
    torch.manual_seed(0)
    net = innersight.open(Detector().eval(), input_shape=(3, 16, 16))
    s = net.explain(noise(2, 3, 16, 16), name, target=targets.box((9, 1, 15, 15)), **few(name))
    assert s.targets == ["object at 9, 1, 15, 15"] * 2
    assert np.isfinite(s.values).all()
