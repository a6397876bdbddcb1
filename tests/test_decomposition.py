"""DeepLIFT and FullGrad: what the terms sum to, by hand, and beside other libraries where those are right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import innersight
from innersight import errors
from innersight.data.small_cnn import SimpleCNN
from innersight.testing import NETWORKS, check_method, close, small_network


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class On(nn.Module):
    """A function of a few numbers, laid out as a picture (1, 1, 1, k)."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(*x.flatten(1).unbind(1))[:, None]


def terms(function, x, x0, method="deeplift"):
    x, x0 = torch.tensor(x)[None, None, None], torch.tensor(x0)[None, None, None]
    net = innersight.open(On(function), input_shape=tuple(x.shape[1:]))
    return net.explain(x, method, baseline=x0[0]).values.reshape(-1).tolist()


@pytest.mark.parametrize(
    ("function", "x", "x0", "right"),
    [
        # Captum, which sees no module here, answers (3, 2) with the gradient; the score differs by 4.
        (lambda a, b: F.relu(a - 1) + b, [3.0, 2.0], [0.0, 0.0], [2, 2]),
        (lambda a, b: a * b, [3.0, 4.0], [1.0, 2.0], [6, 4]),
        (lambda a, b, c: torch.maximum(torch.maximum(a, b), c), [5.0, 1.0, 2.0], [0.0, 3.0, 1.0], [2, 0, 0]),
        (lambda a, b, c: torch.stack([a, b, c], 1).amax(1), [0.0, 3.0, 1.0], [5.0, 1.0, 2.0], [-2, 0, 0]),
        (lambda a, b: a / b, [6.0, 3.0], [1.0, 1.0], [5 * 2 / 3, -(2 / 3) * 3.5]),  # 1/b from 1 to 1/3, at the middle
        (lambda a, b: torch.sigmoid(a) + 0 * b, [2.0, 1.0], [0.0, 0.0], [torch.sigmoid(torch.tensor(2.0)) - 0.5, 0]),
    ],
)
def test_deeplift_by_hand(function, x, x0, right):
    np.testing.assert_allclose(terms(function, x, x0), right, atol=1e-5)


def test_deeplift_agrees_with_captum_where_every_activation_is_a_module():
    from captum.attr import DeepLift

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(6, 5, 3), nn.Sigmoid(), nn.Flatten(),
        nn.Linear(125, 4),
    ).eval()  # fmt: skip
    x, x0 = noise(2, 3, 16, 16), noise(1, 3, 16, 16, seed=2)
    ours = innersight.open(model, input_shape=(3, 16, 16)).explain(
        x, "deeplift", target=[1, 3], baseline=x0, channels=True
    )
    with pytest.warns(UserWarning, match="forward, backward hooks"):
        theirs = (
            DeepLift(model)
            .attribute(x.clone().requires_grad_(), x0.repeat(2, 1, 1, 1).requires_grad_(), target=torch.tensor([1, 3]))
            .detach()
        )
    assert close(ours.values, theirs)


class Everything(nn.Module):
    """One of each kind of operation that has a rule of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.bn, self.gn, self.inorm = nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True)
        self.ln, self.rms = nn.LayerNorm(8), nn.RMSNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)
        with torch.no_grad():
            self.bn.running_mean.normal_()
            self.bn.running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = F.max_pool2d(F.gelu(self.bn(self.a(x))), 3, 2, padding=1, ceil_mode=True)
        x = self.gn(F.silu(self.b(x), inplace=True)) * torch.sigmoid(x.mean((2, 3), keepdim=True))
        x = torch.cat([x[:, :4].clamp(-1, 1), F.hardswish(x[:, 4:])], 1)
        x = F.adaptive_max_pool2d(self.inorm(x), 3)
        x = x / (1 + x.std((2, 3), keepdim=True))
        t = self.ln(x.flatten(2).transpose(1, 2))
        t = t + self.attention(t, t, t, need_weights=False)[0]
        t = self.rms(F.normalize(t, dim=-1))
        t = F.glu(torch.cat([t, t * t], -1), -1) + t.amax(1, keepdim=True)
        return F.log_softmax(self.head(t.mean(1)), 1)


def test_deeplift_is_complete_whatever_the_network_is_made_of():
    torch.manual_seed(0)
    net = innersight.open(Everything().eval(), input_shape=(3, 12, 12))
    x, x0 = noise(3, 3, 12, 12), noise(1, 3, 12, 12, seed=5)
    s = net.explain(x, "deeplift", target=[0, 1, 3], baseline=x0)
    f, f0 = net.predict(x).logits[[0, 1, 2], [0, 1, 3]], net.predict(x0).logits[0, [0, 1, 3]]
    np.testing.assert_allclose(s.values.sum((1, 2)), f - f0, atol=2e-5)
    assert max(s.verdict["completeness_error"]) < 1e-4
    np.testing.assert_allclose(s.verdict["baseline_score"], f0, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "convnext_tiny", "swin_t", "densenet121"])
def test_deeplift_is_complete_on_real_architectures(name):
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None)
    with torch.no_grad():
        model.train()(noise(8, 3, 64, 64, seed=3))  # statistics of its own, else the activations vanish
    # In double precision: an untrained score moves by less than the rounding of its 64 thousand terms.
    net = innersight.open(model.eval().double(), input_shape=(3, 64, 64))
    s = net.explain(noise(2, 3, 64, 64), "deeplift", target=3, baseline=noise(1, 3, 64, 64, seed=4).double())
    assert max(s.verdict["completeness_error"]) < 1e-6


def test_deeplift_runs_on_the_tutorial_network_which_captum_refuses():
    """F.relu, which Captum would leave to the gradient, and one pooling layer that is used twice."""
    from captum.attr import DeepLift

    torch.manual_seed(0)
    model = SimpleCNN().eval()
    x, x0 = noise(1, 1, 28, 28), noise(1, 1, 28, 28, seed=7)
    net = innersight.open(model)
    ours = net.explain(x, "deeplift", target=4, baseline=x0)
    rise = float(net.predict(x).logits[0, 4] - net.predict(x0).logits[0, 4])
    assert abs(float(ours.values.sum()) - rise) < 1e-5 * abs(rise) + 1e-7
    with pytest.warns(UserWarning, match="hooks"), pytest.raises(RuntimeError, match="being used more than once"):
        DeepLift(model).attribute(x.requires_grad_(), x0.requires_grad_(), target=4)


def test_what_has_no_rule_is_named():
    net = innersight.open(On(lambda a, b: torch.erfinv(a / 10) + b), input_shape=(1, 1, 2))
    with pytest.raises(errors.Unsupported, match="DeepLIFT has no rule for the operation 'erfinv'"):
        net.explain(noise(1, 1, 1, 2), "deeplift")


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", ["deeplift", "fullgrad"])
def test_they_keep_the_promises_of_every_method(method, name):
    check_method(method, small_network(name))


# -- FullGrad


def test_fullgrad_is_the_definition_on_a_network_of_relu():
    """Srinivas and Fleuret's sum, slowly: every layer's bias times the gradient at its output."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1), nn.ReLU(),
                          nn.Flatten(), nn.Linear(5 * 64, 3)).eval()  # fmt: skip
    x = noise(1, 1, 8, 8).requires_grad_()
    outs = []
    h = x
    for layer in model:
        h = layer(h)
        if isinstance(layer, nn.Conv2d):
            outs.append((layer.bias.detach()[None, :, None, None], h))
    gradients = torch.autograd.grad(h[0, 2], [x, *(o for _, o in outs)], retain_graph=True)

    def scaled(m):
        m = m.detach().abs()
        return (m - m.min()) / (m.max() - m.min())

    wanted = scaled(x * gradients[0]).sum(1)
    shares = float((x * gradients[0]).sum().detach())
    for (bias, _), g in zip(outs, gradients[1:], strict=True):
        wanted = wanted + scaled(bias * g).sum(1)  # the grid is the picture's own: nothing to lay over it
        shares += float((bias * g).sum())
    shares += float(model[-1].bias[2].detach())
    s = innersight.open(model, input_shape=(1, 8, 8)).explain(x.detach(), "fullgrad", target=2)
    assert close(s.values, wanted.numpy())
    assert abs(shares - s.verdict["score"][0]) < 1e-5
    np.testing.assert_allclose(s.verdict["input_share"][0] + s.verdict["bias_share"][0], 1, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_fullgrad_is_complete(name):
    s = small_network(name).explain(noise(2, 3, 16, 16), "fullgrad", target=1)
    assert max(s.verdict["completeness_error"]) < 1e-4


@pytest.mark.parametrize("method", ["deeplift", "lrp", "fullgrad"])
def test_a_pass_under_rules_keeps_to_the_memory_budget(method):
    """Its images are those of the clean pass, which alone would need far less."""
    net, x, sizes = small_network("residual"), noise(6, 3, 16, 16), []
    whole = net.explain(x, method, target=1)
    net.engine.budget = 120_000
    with net.module.conv1.register_forward_hook(lambda _m, args, _out: sizes.append(args[0].shape[0])):
        parts = net.explain(x, method, target=1)
    assert max(sizes) < 6
    assert close(parts.values, whole.values)
