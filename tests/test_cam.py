"""Class activation maps: against pytorch-grad-cam, the papers' formulas worked slowly, closed forms, and by hand."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import innersight
from innersight import errors, targets
from innersight.methods import all_methods
from innersight.testing import NETWORKS, close, small_network

CAMS = {name: m for name, m in all_methods().items() if m.family == "cam" and m.function.__module__.endswith(".cam")}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def settled(module: nn.Module, size: int) -> nn.Module:
    """Random weights as after training: BatchNorm statistics that fit, no weights of zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for m in module.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.normal_(m.bias, std=0.1)
            elif isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=m.in_features**-0.5)
                if m.bias is not None:
                    nn.init.normal_(m.bias, std=0.1)
        for name, p in module.named_parameters():
            if name.endswith(("gamma", "layer_scale")):  # 1e-6 in ConvNeXt: a branch that does nothing yet
                nn.init.ones_(p)
        module.train()(noise(8, 3, size, size, seed=5))
    return module.eval()


def build(make: Callable[[], nn.Module], size: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return settled(make(), size)


@pytest.fixture(scope="module")
def resnet():
    import torchvision

    return build(lambda: torchvision.models.resnet18(weights=None, num_classes=10), 64)


class Plain(nn.Module):
    """Convolutions, average pooling, a linear layer: where the theory says which maps are equal."""

    def __init__(self, channels: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, channels, 3, padding=1, stride=2)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x):
        return self.fc(F.relu(self.conv2(F.relu(self.conv1(x)))).mean((2, 3)))


class Deep(Plain):
    """The same with a second convolution behind the layer and a hidden layer in the head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1)
        self.hidden = nn.Linear(8, 8)

    def forward(self, x):
        x = F.relu(self.conv3(F.relu(self.conv2(F.relu(self.conv1(x))))))
        return self.fc(F.relu(self.hidden(x.mean((2, 3)))))


def opened(module: nn.Module, size: int = 16) -> innersight.network.Network:
    return innersight.open(module, input_shape=(3, size, size))


# -- Against pytorch-grad-cam, on convolutional and token networks

PEERS = {
    "gradcam": "GradCAM",
    "hirescam": "HiResCAM",
    "layercam": "LayerCAM",
    "xgradcam": "XGradCAM",
    "eigencam": "EigenCAM",
    "eigengradcam": "EigenGradCAM",
    "scorecam": "ScoreCAM",
}


def vit():
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)


def swin():
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        img_size=64, patch_size=4, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(2, 2), num_classes=5
    )


def convnext():
    from timm.models.convnext import ConvNeXt

    return ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 16, 16, 24), num_classes=5)


def torch_convnext():
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=5)


# make, size of the picture, layer, what pytorch-grad-cam needs to be told about it
NETS = {
    "plain": (Plain, 16, "relu_1", None),
    "vit": (vit, 32, "blocks.1.norm1", lambda t: t[:, 1:].reshape(len(t), 4, 4, -1).permute(0, 3, 1, 2)),
    "swin": (swin, 64, "norm", lambda t: t.permute(0, 3, 1, 2)),
    "convnext": (convnext, 64, "stages.3.blocks.0", None),
    "convnext channels-last": (torch_convnext, 32, "features.1.0.block.2", lambda t: t.permute(0, 3, 1, 2)),
}


@pytest.fixture(scope="module")
def nets():
    return {name: (build(make, size), size, layer, shaped) for name, (make, size, layer, shaped) in NETS.items()}


class _Named(nn.Module):
    """An operation as a module, for tools that hook modules."""

    def forward(self, x):
        return x.relu()


def theirs(peer: str, model: nn.Module, layer: str, x: torch.Tensor, classes: list[int], shaped=None) -> np.ndarray:
    """Their map on the layer's grid, before it is clipped, scaled and resized."""
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model = copy.deepcopy(model)
    if layer == "relu_1":  # the second F.relu of `Plain`
        model.named = _Named()
        model.forward = lambda x: model.fc(model.named(model.conv2(F.relu(model.conv1(x)))).mean((2, 3)))
        layer = "named"
    module = model.get_submodule(layer)
    wanted = [ClassifierOutputTarget(c) for c in classes]
    with getattr(pytorch_grad_cam, peer)(model=model, target_layers=[module], reshape_transform=shaped) as cam:
        cam.outputs = cam.activations_and_grads(x)
        sum(t(o) for t, o in zip(wanted, cam.outputs, strict=True)).backward()
        a, g = (
            v[0].detach().numpy() for v in (cam.activations_and_grads.activations, cam.activations_and_grads.gradients)
        )
        return cam.get_cam_image(x, module, wanted, a, g, False)


@pytest.fixture
def from_border_to_border(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their Score-CAM stretches a map from the middle of its first cell to that of its last; the authors' does not."""
    monkeypatch.setattr(
        nn, "UpsamplingBilinear2d", lambda size: nn.Upsample(size=size, mode="bilinear", align_corners=False)
    )


@pytest.mark.usefixtures("from_border_to_border")
@pytest.mark.parametrize("network", NETS)
@pytest.mark.parametrize("name", PEERS)
def test_maps_agree_with_pytorch_grad_cam_without_being_told_how_tokens_lie(nets, name, network):
    model, size, layer, shaped = nets[network]
    x = noise(2, 3, size, size)
    ours = opened(model, size).explain(x, name, target=[1, 3], layer=layer, relu=False).coarse
    peer = theirs(PEERS[name], model, layer, x, [1, 3], shaped)
    if name.startswith("eigen"):  # the sign of theirs is what LAPACK makes of it
        peer = peer * np.sign((ours * peer).sum((1, 2), keepdims=True))
    if name == "scorecam":  # channels that are the same everywhere take part in their softmax
        ours, peer = (v / np.abs(v).max((1, 2), keepdims=True) for v in (ours, peer))
    # ConvNeXt's first norm blows rounding up where a mask lets nothing through.
    assert close(ours, peer, 1e-3 if (name, network) == ("scorecam", "convnext") else 2e-5)


@pytest.mark.usefixtures("from_border_to_border")
@pytest.mark.parametrize("name", ["eigencam", "eigengradcam", "scorecam"])
def test_maps_of_resnet18_agree_with_pytorch_grad_cam(resnet, name):
    x = noise(1, 3, 64, 64)
    ours = opened(resnet, 64).explain(x, name, target=[1], layer="layer1", relu=False).coarse
    peer = theirs(PEERS[name], resnet, "layer1", x, [1])
    assert close(ours, peer * np.sign((ours * peer).sum()))


@pytest.mark.parametrize("stage", ["layer4", "layer3"])
def test_ablationcam_of_resnet18_agrees_with_pytorch_grad_cam(resnet, stage):
    x = noise(1, 3, 64, 64)
    best = int(resnet(x).argmax())
    ours = opened(resnet, 64).explain(x, "ablationcam", target=best, layer=stage, relu=False)
    assert ours.verdict["score"][0] > 0
    assert close(ours.coarse, theirs("AblationCAM", resnet, stage, x, [best]))


# -- Networks of average pooling and one linear layer: closed forms


def maps_and_rows(model: nn.Module, layer: nn.Module, x: torch.Tensor, classes: list[int]):
    seen = []
    handle = layer.register_forward_hook(lambda _m, _a, out: seen.append(out.detach().clone()))
    with torch.no_grad():
        scores = model(x)
    handle.remove()
    return seen[0], model.fc.weight.detach()[classes], scores[range(len(x)), classes]


def test_cam_is_the_row_of_the_linear_layer_over_the_last_maps(resnet):
    x = noise(2, 3, 96, 96)
    a, rows, scores = maps_and_rows(resnet, resnet.layer4, x, [3, 8])
    s = opened(resnet, 96).explain(x, "cam", target=[3, 8])
    assert close(s.coarse, torch.einsum("nchw,nc->nhw", a, rows))
    assert s.signed
    assert (s.values < 0).any()
    assert close(s.coarse.mean((1, 2)) + resnet.fc.bias.detach()[[3, 8]].numpy(), scores)  # as its unit says


def test_there_cam_gradcam_hirescam_and_xgradcam_are_one(resnet):
    x = noise(2, 3, 96, 96)
    many = opened(resnet, 96).explain(x, ["cam", "gradcam", "hirescam", "xgradcam"], target=[3, 8])
    wanted = many["cam"].coarse.clip(0)
    for name in ("gradcam", "hirescam", "xgradcam"):
        assert close(many[name].coarse * 9, wanted)  # 3 x 3 places


def test_there_a_map_is_ablated_to_its_share_of_the_score(resnet):
    x = noise(2, 3, 64, 64)
    a, rows, scores = maps_and_rows(resnet, resnet.layer4, x, [3, 8])
    shares = rows * a.mean((2, 3)) / scores.abs()[:, None]
    s = opened(resnet, 64).explain(x, "ablationcam", target=[3, 8], relu=False)
    assert close(s.coarse, torch.einsum("nchw,nc->nhw", a, shares), 1e-4)


def test_hirescam_differs_from_gradcam_where_the_gradient_varies_over_the_picture():
    net = opened(build(Deep, 16))
    many = net.explain(noise(1, 3, 16, 16), ["gradcam", "hirescam"], target=1, layer="relu_1", relu=False)
    assert not close(many["gradcam"].coarse, many["hirescam"].coarse, 1e-2)


def test_cam_of_a_difference_weighs_with_the_difference_of_the_rows():
    net = opened(build(Plain, 16))
    x = noise(2, 3, 16, 16)
    a, b = (net.explain(x, "cam", target=c).coarse for c in (4, 2))
    assert close(net.explain(x, "cam", target=targets.difference(4, 2)).coarse, a - b)


def test_cam_is_defined_behind_shifted_windows_and_where_the_maps_are_the_classes(nets):
    model, size, layer, _ = nets["swin"]
    x = noise(1, 3, size, size)
    a, rows, _ = maps_and_rows(_with_head_as_fc(model), model.norm, x, [2])
    s = opened(model, size).explain(x, "cam", target=2, layer=layer)
    assert close(s.coarse, torch.einsum("nhwc,nc->nhw", a, rows))

    squeeze = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    s = opened(squeeze).explain(noise(1, 3, 16, 16), "cam", target=2, layer="1")
    assert close(s.coarse[0], squeeze[:2](noise(1, 3, 16, 16))[0, 2].detach())


def _with_head_as_fc(model):
    model = copy.copy(model)
    model.fc = model.head.fc
    return model


class PastTheLayer(Plain):
    def forward(self, x):
        first = F.relu(self.conv1(x))
        last = F.relu(self.conv2(first)).mean((2, 3))
        return self.fc(last) + first.mean((2, 3))[:, :5] ** 2


REFUSED = {
    "a convolution follows": (lambda: Deep(), "relu_1", 1),
    "a hidden layer follows": (lambda: Deep(), "relu_2", 1),
    "a probability is asked for": (Plain, "relu_1", targets.probability(1)),
    "a class token is read": (vit, "blocks.1.norm1", 1),
    "a norm follows the pooling": (convnext, "stages.3.blocks.0", 1),
}


@pytest.mark.parametrize("why", REFUSED)
def test_cam_is_refused_where(why):
    make, layer, target = REFUSED[why]
    size = {"a class token is read": 32, "a norm follows the pooling": 64}.get(why, 16)
    with pytest.raises(errors.Unsupported, match="cam is defined where global average pooling.* or use gradcam"):
        opened(build(make, size), size).explain(noise(1, 3, size, size), "cam", target=target, layer=layer)


def test_cam_is_refused_where_a_way_leads_past_the_layer():
    net = opened(build(PastTheLayer, 16))
    with pytest.raises(errors.Unsupported, match="another way leads past it"):
        net.explain(noise(1, 3, 16, 16), "cam", target=1, layer="relu_1")


# -- Grad-CAM++ and XGrad-CAM: what divides


def plus_plus(a: np.ndarray, g1: np.ndarray, g2: np.ndarray, g3: np.ndarray) -> np.ndarray:
    """Equation 19, place by place, in double precision."""
    channels, height, width = a.shape
    total = np.zeros((height, width))
    for k in range(channels):
        weight = 0.0
        for i in range(height):
            for j in range(width):
                if g1[k, i, j] > 0:
                    weight += g1[k, i, j] * g2[k, i, j] / (2 * g2[k, i, j] + a[k].sum() * g3[k, i, j])
        total += weight * a[k]
    return total.clip(0)


def read(net, x, score):
    """Activation and gradient at the second ReLU of a `Deep`, by autograd on the network cut in two there."""
    a = F.relu(net.module.conv2(F.relu(net.module.conv1(x)))).detach().requires_grad_()
    y = net.module.fc(F.relu(net.module.hidden(F.relu(net.module.conv3(a)).mean((2, 3)))))
    (g,) = torch.autograd.grad(score(y).sum(), a)
    return a.detach().double().numpy(), g.double().numpy()


@pytest.mark.parametrize("factor", [1e4, 1.0, 1e-4, 1e-12])
def test_gradcam_plus_plus_is_the_papers_formula_however_small_the_gradient(factor):
    net, x = opened(build(Deep, 16)), noise(2, 3, 16, 16)
    score = lambda out: out[:, 1] * factor  # noqa: E731
    ours = net.explain(x, "gradcam_plus_plus", target=score, layer="relu_1").coarse
    a, g = read(net, x, score)
    slow = np.stack([plus_plus(*(v[i] for v in (a, g, g**2, g**3))) for i in range(2)])
    assert slow.max() > 0
    assert close(ours, slow)


def test_gradcam_plus_plus_agrees_with_pytorch_grad_cam_where_its_epsilon_is_small(resnet):
    """Their 1e-6 stands beside squared gradients: of a ResNet's last layer these are 1e-6, too."""
    x = noise(1, 3, 64, 64)
    for head, tolerance in ((resnet, None), (_times(resnet, 1000), 1e-5)):
        ours = opened(head, 64).explain(x, "gradcam_plus_plus", target=1, layer="layer2").coarse
        peer = theirs("GradCAMPlusPlus", head, "layer2", x, [1]).clip(0)
        if tolerance:
            assert close(ours, peer, tolerance)
        else:
            assert not close(ours, peer, 0.02)


def _times(model, factor):
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.fc.weight *= factor
    return model


@pytest.mark.parametrize("name", ["gradcam_plus_plus", "xgradcam", "smooth_gradcam_plus_plus", "layercam"])
def test_small_activations_and_gradients_are_no_less_evidence(name):
    """A layer scaled down a million times and back up behind: the same network, the same map but for the scale."""
    module = build(Deep, 16)
    scaled = copy.deepcopy(module)
    with torch.no_grad():
        for p in (scaled.conv2.weight, scaled.conv2.bias):
            p *= 1e-6
        scaled.conv3.weight *= 1e6
    x = noise(2, 3, 16, 16)
    a, b = (opened(m).explain(x, name, target=1, layer="relu_1").coarse for m in (module, scaled))
    assert a.max() > 0
    assert close(a / a.max(), b / b.max(), 1e-4)


def test_xgradcam_keeps_what_its_axiom_promises():
    """Conservation: the map sums to the sum of activation times gradient."""
    net = opened(build(Deep, 16))
    many = net.explain(noise(2, 3, 16, 16), ["xgradcam", "hirescam"], target=1, layer="relu_1", relu=False)
    assert close(many["xgradcam"].coarse.sum((1, 2)), many["hirescam"].coarse.sum((1, 2)))


# -- Smooth Grad-CAM++


def test_smooth_gradcam_plus_plus_without_noise_is_gradcam_plus_plus():
    net, x = opened(build(Deep, 16)), noise(2, 3, 16, 16)
    smooth = net.explain(x, "smooth_gradcam_plus_plus", target=1, layer="relu_1", noise=0.0, samples=3)
    assert close(smooth.coarse, net.explain(x, "gradcam_plus_plus", target=1, layer="relu_1").coarse)


def test_smooth_gradcam_plus_plus_has_means_in_the_place_of_derivatives():
    net, x = opened(build(Deep, 16)), noise(1, 3, 16, 16)
    ours = net.explain(x, "smooth_gradcam_plus_plus", target=1, layer="relu_1", noise=0.2, samples=40, seed=7).coarse
    draw = torch.Generator().manual_seed(7)
    points = torch.cat([x + 0.2 * (x.max() - x.min()) * torch.randn(x.shape, generator=draw) for _ in range(40)])
    _, g = read(net, points, lambda out: out[:, 1])
    a, _ = read(net, x, lambda out: out[:, 1])
    slow = plus_plus(a[0], *((g**p).mean(0) for p in (1, 2, 3)))
    assert slow.max() > 0
    assert close(ours[0], slow)


def test_smooth_gradcam_plus_plus_is_the_same_in_chunks_and_other_for_another_seed():
    net, x = opened(build(Deep, 16)), noise(1, 3, 16, 16)
    ask = lambda seed: net.explain(x, "smooth_gradcam_plus_plus", target=1, layer="relu_1", seed=seed).coarse  # noqa: E731
    whole = ask(0)
    net.engine.budget = 1
    assert close(ask(0), whole)
    assert not close(ask(1), whole, 1e-3)


# -- Eigen-CAM


def test_eigencam_of_one_pattern_is_that_pattern():
    """All channels are multiples of one picture, so that picture is the first component, up to its length."""
    net = opened(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    x = noise(1, 1, 16, 16).abs().expand(1, 3, 16, 16).contiguous()
    weights = net.module[0].weight.detach().sum((1, 2, 3))
    pattern = x[0, 0] * weights.norm()
    uncentered = net.explain(x, "eigencam", layer="0", center=False).coarse[0]
    assert close(uncentered, pattern)
    centered = net.explain(x, "eigencam", layer="0", relu=False).coarse[0]
    assert close(centered, pattern - pattern.mean())


@pytest.mark.parametrize("center", [True, False])
def test_eigencam_is_the_first_singular_vector_and_goes_up_with_the_activity(resnet, center):
    x = noise(3, 3, 64, 64)
    ours = opened(resnet, 64).explain(x, "eigencam", layer="layer3", center=center, relu=False).coarse
    a, _, _ = maps_and_rows(resnet, resnet.layer3, x, [0, 0, 0])
    for values, found in zip(a.double().numpy(), ours, strict=True):
        places = values.reshape(len(values), -1).T
        places = places - places.mean(0) if center else places
        on_first = places @ np.linalg.svd(places)[2][0]
        mass = values.sum(0).ravel()
        if np.corrcoef(on_first, mass)[0, 1] < 0:
            on_first = -on_first
        assert close(found.ravel(), on_first)
    if not center:
        assert ours.min() >= 0  # of maps without negative values


def test_eigencam_takes_no_notice_of_the_target_and_eigengradcam_does(resnet):
    net, x = opened(resnet, 64), noise(1, 3, 64, 64)
    one, other = (net.explain(x, ["eigencam", "eigengradcam"], target=c, layer="layer3") for c in (1, 2))
    assert close(one["eigencam"].coarse, other["eigencam"].coarse)
    assert not close(one["eigengradcam"].coarse, other["eigengradcam"].coarse, 1e-2)


# -- Without a gradient: Score-CAM, Ablation-CAM, Eigen-CAM


def test_scorecam_is_the_papers_algorithm_and_runs_no_map_that_is_the_same_everywhere():
    module = build(Plain, 16)
    with torch.no_grad():
        module.conv2.weight[[2, 5]] = 0
        module.conv2.bias[[2, 5]] = torch.tensor([-1.0, 0.5])  # dead; a constant
    net, x = opened(module), noise(2, 3, 16, 16)
    runs = []
    net.progress = lambda _done, total, what: runs.append(total) if what == "points" else None
    ours = net.explain(x, "scorecam", target=3, layer="relu_1").coarse
    assert set(runs) == {6}
    for picture, found in zip(x, ours, strict=True):
        a = F.relu(module.conv2(F.relu(module.conv1(picture[None]))))[0].detach()
        scores, live = [], [k for k in range(8) if k not in (2, 5)]
        for k in live:
            mask = F.interpolate(a[None, k : k + 1], (16, 16), mode="bilinear", align_corners=False)
            mask = (mask - mask.min()) / (mask.max() - mask.min())
            base = module(torch.zeros(1, 3, 16, 16))[0, 3]
            scores.append(float((module(picture * mask)[0, 3] - base).detach()))
        weights = np.exp(scores) / np.exp(scores).sum()
        assert close(found, sum(w * a[k].numpy() for w, k in zip(weights, live, strict=True)).clip(0))


@pytest.mark.parametrize("network", ["vit", "swin", "convnext channels-last"])
def test_ablationcam_of_tokens_takes_one_channel_away_from_all_of_them(nets, network):
    model, size, layer, shaped = nets[network]
    x = noise(1, 3, size, size)
    ours = opened(model, size).explain(x, "ablationcam", target=2, layer=layer, relu=False).coarse
    state = {"channel": None, "value": None}

    def hook(_module, _args, out):
        out = out.clone()
        if state["channel"] is None:
            state["value"] = shaped(out)[0]
        else:
            out[..., state["channel"]] = 0
        return out

    handle = model.get_submodule(layer).register_forward_hook(hook)
    with torch.no_grad():
        score, lost = float(model(x)[0, 2]), []
        for channel in range(len(state["value"])):
            state["channel"] = channel
            lost.append((score - float(model(x)[0, 2])) / abs(score))
    handle.remove()
    assert close(ours[0], torch.einsum("chw,c->hw", state["value"], torch.tensor(lost)), 1e-4)


def test_a_loss_stays_a_loss_where_the_score_is_negative():
    """Divided by the score itself, as printed, the maps that speak for the class would speak against it."""
    module = build(Plain, 16)
    net, x = opened(module), noise(1, 3, 16, 16)
    maps = []
    for bias in (10.0, -10.0):
        module.fc.bias.data[1] = bias
        s = net.explain(x, "ablationcam", target=1, layer="relu_1", relu=False)
        assert np.sign(s.verdict["score"][0]) == np.sign(bias)
        maps.append(s.coarse * abs(s.verdict["score"][0]))
    assert close(maps[0], maps[1], 1e-4)


def test_a_score_of_zero_has_no_shares_and_no_infinite_map():
    module = build(Plain, 16)
    net, x = opened(module), noise(1, 3, 16, 16)
    s = net.explain(x, "ablationcam", target=targets.difference(1, 1), layer="relu_1")
    assert s.verdict["score"] == [0.0]
    assert not s.values.any()


class Steps(Plain):
    """Its score has no gradient."""

    def forward(self, x):
        return self.fc((self.conv2(F.relu(self.conv1(x))) > 0).float().mean((2, 3)))


@pytest.mark.parametrize("name", ["scorecam", "ablationcam", "eigencam"])
def test_some_need_no_gradient(name):
    assert CAMS[name].needs == ("layer",)
    s = opened(build(Steps, 16)).explain(noise(1, 3, 16, 16), name, target=1, layer="relu")
    assert np.abs(s.values).max() > 0


# -- The family


@pytest.mark.parametrize("name", CAMS)
def test_relu_clips_the_map_and_nothing_else(name):
    net, x = small_network("residual"), noise(2, 3, 16, 16)
    whole, clipped = (net.explain(x, name, target=1, relu=relu).coarse for relu in (False, True))
    np.testing.assert_array_equal(clipped, whole.clip(0))
    assert CAMS[name].options["relu"] is (name != "cam")  # Zhou et al. keep what speaks against


@pytest.mark.parametrize("network", NETWORKS)
def test_every_map_of_a_batch_has_its_own_target(network):
    net, x = small_network(network), noise(2, 3, 16, 16)
    names = [name for name in CAMS if (name, network) != ("cam", "tokens")]
    together = net.explain(x, names, target=[2, None])
    for i, target in ((0, 2), (1, None)):
        alone = net.explain(x[i : i + 1], names, target=target)
        assert all(close(together[name].values[i], alone[name].values[0], 1e-4) for name in names)


def test_maps_that_need_the_picture_alone_share_one_pass(resnet):
    calls = []
    net, x = opened(resnet, 64), noise(2, 3, 64, 64)
    net.explain(x, "gradcam")  # learns the network, which is a run of its own
    handle = resnet.register_forward_hook(lambda *_: calls.append(1))
    try:
        many = [name for name, m in CAMS.items() if not m.visits]
        net.explain(x, many, layer=["layer3", "layer4"])
    finally:
        handle.remove()
    assert len(calls) == 1
    assert len(many) == 7


# -- Several layers in one map


def test_fused_layers_agree_with_pytorch_grad_cam():
    """Where nothing is resized and every map begins at zero, their scaling is ours."""
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    def make():  # within `build`, which seeds
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(),
            nn.Conv2d(6, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
        )  # fmt: skip

    module = build(make, 16)
    module[8].weight.data *= 1e4  # they add 1e-7 to what they divide by
    x = noise(2, 3, 16, 16)
    net = opened(module)
    apart = net.explain(x, "layercam", target=[1, 4], layer=["1", "3"])
    ours = net.explain(x, "layercam", target=[1, 4], layer=["1", "3"], fuse="mean")
    assert all((s.coarse.min((1, 2)) == 0).all() for s in apart.values())
    assert all(close(s.values, s.coarse) for s in apart.values())
    twin = copy.deepcopy(module)
    with pytorch_grad_cam.LayerCAM(model=twin, target_layers=[twin[1], twin[3]]) as cam:
        peer = cam(x, [ClassifierOutputTarget(1), ClassifierOutputTarget(4)])
    assert close(ours.values / ours.values.max((1, 2), keepdims=True), peer)
    assert ours.provenance.layer == ("1", "3")

    most = net.explain(x, "layercam", target=[1, 4], layer=["1", "3"], fuse="max")
    each = [s.values / s.values.max((1, 2), keepdims=True) for s in apart.values()]
    assert close(most.values, np.maximum(*each))


# -- Why this class and not its look-alikes


def test_finer_agrees_with_pytorch_grad_cam_on_the_nearest_class(resnet):
    """With one class to compare with, their weighting by probability makes no difference."""
    import pytorch_grad_cam

    x = noise(2, 3, 64, 64)
    s = opened(resnet, 64).explain(x, "gradcam", target=targets.finer(similar=1), layer="layer2")
    twin = copy.deepcopy(resnet)
    cam = pytorch_grad_cam.FinerCAM(model=twin, target_layers=[twin.layer2])
    made = []
    plain = cam.base_cam.get_cam_image
    cam.base_cam.get_cam_image = lambda *args: made.append(plain(*args)) or made[-1]
    cam(x, alpha=0.6, comparison_categories=[1])
    assert close(s.coarse, made[0].clip(0))


def test_finer_takes_the_mean_of_the_classes_whose_scores_are_nearest():
    net, x = opened(build(Plain, 16)), noise(3, 3, 16, 16)
    logits = net.predict(x).logits
    s = net.explain(x, "gradcam", target=targets.finer([2, None, "4"], alpha=0.5, similar=2), relu=False)
    each = np.stack([net.explain(x, "gradcam", target=c, relu=False).values for c in range(5)])
    for i, own in enumerate([2, int(logits[1].argmax()), 4]):
        near = sorted((c for c in range(5) if c != own), key=lambda c: abs(logits[i, c] - logits[i, own]))[:2]
        assert close(s.values[i], each[own, i] - 0.5 * each[near, i].mean(0), 1e-4)
        assert s.verdict["score"][i] == pytest.approx(logits[i, own] - 0.5 * logits[i, near].mean(), rel=1e-4)
        assert s.targets[i] == f"class {own} and not class {near[0]}, class {near[1]}"


def test_what_finer_compares_with_is_settled_on_the_picture_as_it_is():
    """Score-CAM's masked pictures have other nearest classes; the score still is that of the same ones."""
    net, x = opened(build(Plain, 16)), noise(1, 3, 16, 16)
    logits = net.predict(x).logits[0]
    near = sorted((c for c in range(5) if c != 2), key=lambda c: abs(logits[c] - logits[2]))[0]
    same = lambda out: out[:, 2] - 0.6 * out[:, near]  # noqa: E731
    for method in ("scorecam", "ablationcam", "gradcam"):
        a, b = (net.explain(x, method, target=t, relu=False).coarse for t in (targets.finer(2, similar=1), same))
        assert close(a, b)


def test_finer_compares_with_as_many_as_there_are_and_refuses_none():
    x = noise(1, 3, 16, 16)
    two = opened(build(lambda: Plain(classes=2), 16))
    finer, difference = (
        two.explain(x, "gradcam", target=t, relu=False).coarse
        for t in (targets.finer(0, alpha=1, similar=3), targets.difference(0, 1))
    )
    assert close(finer, difference)
    with pytest.raises(errors.Unsupported, match="one output alone"):
        opened(build(lambda: Plain(classes=1), 16)).explain(x, target=targets.finer())
    for wrong in (0, -1, 1.5):
        with pytest.raises(errors.InputError, match="1 or more"):
            targets.finer(similar=wrong)
