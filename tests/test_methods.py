"""Every method on every small network, and against what is not ours: Captum, pytorch-grad-cam, finite differences."""

import numpy as np
import pytest
import torch
from torch import nn

import innersight
from innersight import errors, targets
from innersight.data.small_cnn import SimpleCNN
from innersight.methods import all_methods, find
from innersight.testing import NETWORKS, check_method, close, small_network

QUICK = {"extremal_perturbation": {"steps": 20}, "guided_integrated_gradients": {"steps": 20}}  # step after step
CAMS = [name for name, m in all_methods().items() if m.family == "cam" and not m.visits]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", all_methods())
def test_every_method_keeps_its_promises_on_every_network(name, network):
    if "attention" in find(name).needs and network != "tokens":
        with pytest.raises(errors.Unsupported, match=f"{name} reads attention, and .* has none"):
            check_method(name, small_network(network))
        return
    if (name, network) == ("cam", "tokens"):
        with pytest.raises(errors.Unsupported, match="cam is defined where global average pooling"):
            check_method(name, small_network(network))
        return
    assert len(check_method(name, small_network(network), **QUICK.get(name, {}))) == 8


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def resnet():
    import torchvision

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = torchvision.models.resnet18(weights=None, num_classes=10)
        for m in module.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.normal_(m.bias, std=0.1)
        module.train()(noise(8, 3, 64, 64, seed=5))  # statistics as after training
    return module.eval()


# -- Gradients


def test_gradient_is_the_derivative_that_finite_differences_give():
    net = small_network("tokens")
    x = noise(1, 3, 16, 16)
    g = net.explain(x, target=2, channels=True).values[0]
    module = net.module.double()
    try:
        for c, i, j in [(0, 3, 4), (1, 15, 0), (2, 8, 8)]:
            step = torch.zeros(1, 3, 16, 16, dtype=torch.float64)
            step[0, c, i, j] = 1e-5
            with torch.no_grad():
                slope = (module(x.double() + step)[0, 2] - module(x.double() - step)[0, 2]) / 2e-5
            assert g[c, i, j] == pytest.approx(float(slope), rel=1e-3, abs=1e-6)
    finally:
        module.float()


def test_gradient_is_the_largest_absolute_value_over_the_colours():
    net = small_network("residual")
    x = noise(2, 3, 16, 16)
    kept = net.explain(x, target=1, channels=True)
    assert kept.values.shape == (2, 3, 16, 16)
    assert (kept.values < 0).any()
    np.testing.assert_array_equal(net.explain(x, target=1).values, np.abs(kept.values).max(1))


@pytest.mark.parametrize("size", [64, 96])
def test_gradients_agree_with_captum(resnet, size):
    from captum.attr import InputXGradient, Saliency

    x = noise(2, 3, size, size)
    net = innersight.open(resnet, input_shape=(3, size, size))
    many = net.explain(x, method=["gradient", "gradient_x_input"], target=3)
    ours = net.explain(x, method="gradient", target=3, channels=True).values
    assert close(ours, Saliency(resnet).attribute(x.requires_grad_(), target=3, abs=False).detach())
    theirs = InputXGradient(resnet).attribute(x, target=3).detach().sum(1)
    assert close(many["gradient_x_input"].values, theirs)


# -- CAMs


def test_gradcam_worked_by_hand():
    """Two maps, 1x1 head weights 2 and -1 over average pooling: weights 2/4 and -1/4, so the map is relu(a/2 - b/4)."""

    class Hand(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 1, bias=False)
            self.fc = nn.Linear(2, 1, bias=False)
            self.conv.weight.data = torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1)
            self.fc.weight.data = torch.tensor([[2.0, -1.0]])

        def forward(self, x):
            return self.fc(self.conv(x).mean((2, 3)))

    x = torch.tensor([[[[1.0, 2.0], [-3.0, 0.0]]]])
    net = innersight.open(Hand(), input_shape=(1, 2, 2))
    # a = x, b = 2x: x/2 - 2x/4 = 0 everywhere
    assert np.abs(net.explain(x, "gradcam", layer="conv", relu=False).values).max() == 0
    net.module.fc.weight.data = torch.tensor([[2.0, 1.0]])
    expected = np.array([[1.0, 2.0], [-3.0, 0.0]])  # x/2 + 2x/4
    np.testing.assert_allclose(net.explain(x, "gradcam", layer="conv", relu=False).values[0], expected)
    np.testing.assert_allclose(net.explain(x, "gradcam", layer="conv").values[0], expected.clip(0))


PEERS = {
    "gradcam": "GradCAM",
    "hirescam": "HiResCAM",
    "layercam": "LayerCAM",
    "xgradcam": "XGradCAM",
}


@pytest.mark.parametrize(("name", "peer"), PEERS.items())
@pytest.mark.parametrize("stage", ["layer4", "layer2"])
def test_cams_agree_with_pytorch_grad_cam(resnet, name, peer, stage):
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    x = noise(2, 3, 64, 64)
    net = innersight.open(resnet, input_shape=(3, 64, 64))
    ours = net.explain(x, method=name, target=[1, 7], layer=stage)
    # Their picture-sized maps are scaled to 0..1 and resized by OpenCV; their maps before that are what to compare.
    with getattr(pytorch_grad_cam, peer)(model=resnet, target_layers=[getattr(resnet, stage)]) as cam:
        wanted = [ClassifierOutputTarget(1), ClassifierOutputTarget(7)]
        cam.outputs = cam.activations_and_grads(x)
        cam.model.zero_grad()
        sum(t(o) for t, o in zip(wanted, cam.outputs, strict=True)).backward()
        a, g = (
            v[0].cpu().data.numpy()
            for v in (cam.activations_and_grads.activations, cam.activations_and_grads.gradients)
        )
        theirs = np.maximum(cam.get_cam_image(x, cam.target_layers[0], wanted, a, g, False), 0)
    resnet.zero_grad(set_to_none=True)
    assert close(ours.coarse, theirs)
    assert ours.grid == theirs.shape[1:]


def test_gradcam_agrees_with_captum_on_the_tutorial_network():
    from captum.attr import LayerGradCam

    torch.manual_seed(0)
    model = SimpleCNN().eval()
    x = noise(3, 1, 28, 28)
    ours = innersight.open(model).explain(x, "gradcam", target=4, layer="conv2")
    theirs = LayerGradCam(model, model.conv2).attribute(x, target=4, relu_attributions=True)
    assert close(ours.coarse, theirs[:, 0].detach())


def test_a_cam_lies_where_the_units_of_its_layer_look():
    """conv2 of the tutorial's network: 8x8 units, unit i sees pixels 2i to 2i + 13, so its middle is at 2i + 7."""
    torch.manual_seed(0)
    net = innersight.open(SimpleCNN().eval())
    s = net.explain(noise(2, 1, 28, 28), "gradcam", target=4, layer="conv2", relu=False)
    at = np.arange(28) + 0.5
    weights = np.stack([np.interp(at, 7 + 2 * np.arange(8), row) for row in np.eye(8)])  # constant beyond the ends
    fade = np.clip(1 - (np.abs(at - 14) - 8) / 2, 0, 1)  # the outermost cells end at 6 and 22
    weights = (weights * fade).T
    np.testing.assert_allclose(s.values, weights @ s.coarse @ weights.T, atol=1e-7)
    assert not s.values[:, :4].any()
    assert not s.values[:, :, 24:].any()


def test_tokens_that_tile_the_picture_are_stretched_over_it():
    net = small_network("tokens")
    s = net.explain(noise(2, 3, 16, 16), "gradcam", target=1, layer="blocks.0", relu=False)
    stretched = torch.nn.functional.interpolate(torch.from_numpy(s.coarse)[:, None], size=(16, 16), mode="bilinear")
    assert close(s.values, stretched[:, 0])


def test_a_cam_in_a_real_network_peaks_where_the_only_object_is():
    """A bright square moved over a plain picture: the map's peak moves with it, to the middle of what the unit sees."""
    import torchvision

    torch.manual_seed(0)
    module = torchvision.models.resnet18(weights=None).layer1  # residual blocks: the field is centred on the unit
    net = innersight.open(nn.Sequential(nn.Conv2d(1, 64, 3, 2, 1), module), input_shape=(1, 64, 64))
    energy = lambda out: out.square().mean((1, 2, 3))  # noqa: E731
    for y, x in [(12, 12), (32, 44), (50, 20)]:
        picture = torch.zeros(1, 1, 64, 64)
        picture[:, :, y - 1 : y + 2, x - 1 : x + 2] = 5
        s = net.explain(picture, "hirescam", target=energy, layer="1", relu=False)
        mass = np.abs(s.values[0] - np.median(s.values[0]))
        mass *= mass > 0.2 * mass.max()
        middle = [(mass * grid).sum() / mass.sum() for grid in np.mgrid[:64, :64]]
        assert np.abs(np.array(middle) - (y, x)).max() < 1.5


def test_a_cam_at_a_reused_layer_explains_the_call_that_was_named():
    """The tutorial's one pooling layer runs twice; tools that hook modules explain whichever call came last."""
    torch.manual_seed(0)
    net = innersight.open(SimpleCNN().eval())
    x = noise(1, 1, 28, 28)
    first, second = (net.explain(x, "gradcam", target=4, layer=name) for name in ("pool", "pool_1"))
    assert first.grid == (12, 12)
    assert second.grid == (4, 4)


def test_many_methods_share_one_pass(resnet):
    calls = []
    handle = resnet.register_forward_hook(lambda *_: calls.append(1))
    net = innersight.open(resnet, input_shape=(3, 64, 64))
    x = noise(2, 3, 64, 64)
    net.explain(x, method=["gradcam"], target=1)  # learns the network, which is a run of its own
    calls.clear()
    try:
        many = net.explain(x, method=["gradient", "gradient_x_input", *CAMS], target=1)
    finally:
        handle.remove()
    assert len(calls) == 1
    for name, saliency in many.items():
        np.testing.assert_array_equal(saliency.values, net.explain(x, method=name, target=1).values)


@pytest.mark.parametrize(
    ("make", "layer"),
    [
        ("resnet18", "layer4.1.relu_1"),
        ("densenet121", "relu"),
        ("mobilenet_v3_small", "features.12.2"),
        ("vit_b_32", "encoder.layers.encoder_layer_11.ln_1"),
        ("swin_t", "norm"),
    ],
)
def test_the_layer_of_a_cam_is_the_last_that_everything_passes_through(make, layer):
    import torchvision

    torch.manual_seed(0)
    module = torchvision.models.get_model(make, weights=None).eval()
    for p in module.parameters():
        if not bool(p.any()):
            nn.init.normal_(p, std=0.02)  # ViT's head starts at zero, which has no gradient
    size = 224 if make in ("vit_b_32",) else 64
    s = innersight.open(module, input_shape=(3, size, size)).explain(noise(1, 3, size, size), "gradcam", relu=False)
    assert s.provenance.layer == layer
    assert any(layer in note for note in s.provenance.notes)
    assert np.abs(s.values).max() > 0


# -- Targets in a request


def test_each_image_has_its_own_target():
    net = small_network("residual")
    x = noise(3, 3, 16, 16)
    together = net.explain(x, target=[0, 2, None])
    predicted = int(net.predict(x[2:]).classes[0])
    for i, t in enumerate([0, 2, predicted]):
        assert close(together.values[i], net.explain(x[i : i + 1], target=t).values[0])
    assert together.targets == ["class 0", "class 2", f"class {predicted}"]


def test_a_difference_explains_the_difference():
    net = small_network("gated")
    x = noise(2, 3, 16, 16)
    a, b = (net.explain(x, target=t, channels=True).values for t in (0, 3))
    both = net.explain(x, target=targets.difference(0, 3), channels=True)
    assert close(both.values, a - b)
    assert both.targets == ["class 0 and not class 3"] * 2


def test_any_function_of_the_output_is_a_target():
    net = small_network("several_outputs")
    x = noise(2, 3, 16, 16)
    s = net.explain(x, target=lambda out: out["logits"][:, 1] * 2, channels=True)
    assert close(s.values, 2 * net.explain(x, target=1, channels=True).values)


# -- What cannot be done is said


def test_an_unknown_method_option_or_layer_is_named_with_the_nearest():
    net = small_network("residual")
    x = noise(1, 3, 16, 16)
    with pytest.raises(errors.UnknownName, match="no method 'gradcan'; did you mean gradcam"):
        net.explain(x, method="gradcan")
    with pytest.raises(errors.UnknownName, match="no option 'rellu' of method 'gradcam'; did you mean relu"):
        net.explain(x, method="gradcam", rellu=True)
    with pytest.raises(errors.UnknownName, match="no layer 'conv22' in this network; did you mean conv2"):
        net.explain(x, method="gradcam", layer="conv22")
    with pytest.raises(errors.Unsupported, match="'fc'.*has no place in the picture"):
        net.explain(x, method="gradcam", layer="fc")


def test_a_network_without_gradient_says_so_and_gives_no_zeros():
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 3)

        def forward(self, x):
            return (self.conv(x) > 0).float().mean((2, 3))

    net = innersight.open(Steps(), input_shape=(1, 8, 8))
    with pytest.raises(errors.Unsupported, match="gradient"):
        net.explain(noise(1, 1, 8, 8))


def test_a_function_offers_no_gradient():
    net = innersight.open(lambda x: x.mean((2, 3)), input_shape=(3, 8, 8))
    with pytest.raises(errors.Unsupported, match="gradcam needs gradients and inner layers, which a plain function"):
        net.explain(noise(1, 3, 8, 8), "gradcam")


def test_a_method_states_what_it_is():
    for m in all_methods().values():
        assert m.paper
        assert m.summary.endswith(".")
        assert set(m.needs) <= {"gradient", "layer", "attention"}
    assert find("gradcam").options == {"relu": True}
