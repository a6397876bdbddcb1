"""Relevance methods against what is not ours: zennit, Captum, the papers' formulas written out, cases by hand."""

import copy
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import innersight
from innersight import errors
from innersight.data.small_cnn import SimpleCNN
from innersight.observe import composites, rules
from innersight.observe.composites import COMPOSITES
from innersight.observe.passes import Engine
from innersight.testing import small_network

# Zennit adds its epsilon at more places than the papers do (at sums and at pools), so the two agree as it vanishes.
EPSILON = 1e-9


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(make, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = make()
        for m in module.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.normal_(m.bias, std=0.2)
                m.running_mean.normal_(std=0.3)
                m.running_var.uniform_(0.5, 1.5)
    return module.eval()


def opened(module, *shape):
    return innersight.open(module, input_shape=shape)


def ruled(module, x, chosen, target):
    engine = Engine(module)
    with engine.session():
        return rules.run(engine, x, chosen, lambda output: output[:, target])


def agree(ours, theirs, tolerance):
    ours, theirs = (torch.as_tensor(np.asarray(v)).double().flatten() for v in (ours, theirs))
    assert float(theirs.abs().max()) > 0
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < tolerance


# -- zennit


class Block(nn.Module):
    """A residual block; the sum is a module where zennit needs to see one."""

    def __init__(self, before, after, add=None):
        super().__init__()
        self.stride = 2 if after > before else 1
        self.conv1 = nn.Conv2d(before, after, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.add = add

    def forward(self, x):
        h = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            missing = (h.shape[1] - x.shape[1]) // 2
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, missing, missing))
        h = h + x if self.add is None else self.add(torch.stack([h, x], dim=-1))
        return self.relu2(h)


class ResNet20(nn.Module):
    """The CIFAR network of He et al. 2016, shortcuts without weights."""

    def __init__(self, widths=(16, 32, 64), depth=3, add=lambda: None):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        before = widths[0]
        for i, width in enumerate(widths, 1):
            blocks = [Block(before if k == 0 else width, width, add()) for k in range(depth)]
            setattr(self, f"layer{i}", nn.Sequential(*blocks))
            before = width
        self.stages = len(widths)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(before, 10)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.linear(self.pool(x).flatten(1))


def plain():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(108, 20), nn.ReLU(), nn.Linear(20, 10),
    )  # fmt: skip


def pairs():
    """Composite -> ours and zennit's rules for the first layer, convolutions and linear layers."""
    z = pytest.importorskip("zennit.rules")
    low, high = -3.0, 3.0
    linear = z.Epsilon(EPSILON)
    flat, squares = z.Flat(EPSILON), z.WSquare(EPSILON, zero_params="bias")
    boxed = replace(COMPOSITES["epsilon_gamma_box"], low=low, high=high)
    return {
        "epsilon": (COMPOSITES["epsilon"], None, z.Epsilon(EPSILON), linear),
        "epsilon_plus_flat": (COMPOSITES["epsilon_plus_flat"], flat, z.ZPlus(EPSILON), linear),
        "without bias": (replace(COMPOSITES["epsilon_plus_flat"], bias=False), flat,
                         z.ZPlus(EPSILON, zero_params="bias"), linear),
        "epsilon_plus_w2": (COMPOSITES["epsilon_plus_w2"], squares, z.ZPlus(EPSILON), linear),
        "epsilon_gamma_box": (boxed, z.ZBox(low, high, EPSILON), z.Gamma(0.25, EPSILON), linear),
        "epsilon_alpha2_beta1_flat": (COMPOSITES["epsilon_alpha2_beta1_flat"], flat, z.AlphaBeta(2, 1, EPSILON),
                                      linear),
        "gamma": (COMPOSITES["gamma"], None, z.Gamma(0.25, EPSILON), z.Gamma(0.25, EPSILON)),
    }  # fmt: skip


ORACLES = ("epsilon", "epsilon_plus_flat", "without bias", "epsilon_plus_w2", "epsilon_gamma_box",
           "epsilon_alpha2_beta1_flat", "gamma")  # fmt: skip


def zennits(module, x, target, first, conv, dense, canonizers=()):
    """Relevance by zennit of a relevance of 1 at the target; the module is put back."""
    from zennit.attribution import Gradient
    from zennit.composites import LayerMapComposite, SpecialFirstLayerMapComposite
    from zennit.layer import Sum
    from zennit.rules import Norm, Pass
    from zennit.types import Activation, AvgPool, Convolution, Linear

    kinds = [(Activation, Pass()), (Sum, Norm(EPSILON)), (AvgPool, Norm(EPSILON)), (Convolution, conv), (Linear, dense)]
    if first is None:
        composite = LayerMapComposite(kinds, canonizers=list(canonizers))
    else:
        composite = SpecialFirstLayerMapComposite(kinds, [(Convolution, first)], canonizers=list(canonizers))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = module(x[:1]).shape[1]
        with Gradient(model=module, composite=composite) as attributor:
            return attributor(x.clone().requires_grad_(), torch.eye(outputs)[[target] * len(x)])[1]


def agrees_with_zennit(module, x, target, name, canonizers=()):
    """In double precision; in single, the rounding of sums that cancel is all that could be compared."""
    ours, *theirs = pairs()[name]
    module, x = module.double(), x.double()
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):  # what zennit leaves of a merged one still divides by sqrt(1 + eps)
            m.running_var += m.eps - 1e-12
            m.eps = 1e-12
    r = ruled(module, x, replace(ours, epsilon=EPSILON), target)
    agree(r.relevance / r.scores.view(-1, 1, 1, 1), zennits(module, x, target, *theirs, canonizers), 1e-5)
    assert float(r.closure.max()) < 1e-4


@pytest.mark.parametrize("name", ORACLES)
def test_lrp_agrees_with_zennit_on_a_plain_network(name):
    agrees_with_zennit(made(plain), noise(2, 3, 16, 16), 3, name)


@pytest.mark.parametrize("name", ORACLES)
def test_lrp_agrees_with_zennit_on_a_residual_network_with_batch_norm(name):
    zennit = pytest.importorskip("zennit")
    from zennit.canonizers import SequentialMergeBatchNorm

    module = made(lambda: ResNet20((8, 12), 1, zennit.layer.Sum))
    agrees_with_zennit(module, noise(2, 3, 16, 16), 3, name, [SequentialMergeBatchNorm()])


@pytest.fixture(scope="module")
def photographs(shared_data):
    from PIL import Image
    from torchvision import transforms

    prepare = transforms.Compose([
        transforms.Resize(128), transforms.CenterCrop(128), transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ])  # fmt: skip
    names = ("n01532829_house_finch", "n01641577_bullfrog")
    return torch.stack(
        [prepare(Image.open(shared_data("imagenet", "images", f"{n}.JPEG")).convert("RGB")) for n in names]
    )


@pytest.fixture(scope="module")
def squeezenet(shared_data):
    import torchvision

    module = torchvision.models.squeezenet1_1(weights=None)
    module.load_state_dict(torch.load(shared_data("torch", "squeezenet1_1_imagenet.pth")))
    return module.eval()


@pytest.mark.parametrize("name", ORACLES)
def test_lrp_agrees_with_zennit_on_trained_squeezenet(squeezenet, photographs, name):
    agrees_with_zennit(copy.deepcopy(squeezenet), photographs, 12, name)


@pytest.mark.parametrize("name", ORACLES)
def test_lrp_agrees_with_zennit_on_trained_resnet20(shared_data, name):
    zennit = pytest.importorskip("zennit")
    from PIL import Image
    from torchvision.transforms.functional import normalize, to_tensor
    from zennit.canonizers import SequentialMergeBatchNorm

    saved = torch.load(shared_data("torch", "cifar10_resnet20-12fca82f.th"), map_location="cpu", weights_only=True)
    module = ResNet20(add=zennit.layer.Sum).eval()
    module.load_state_dict({k.removeprefix("module."): v for k, v in saved["state_dict"].items()})
    files = sorted(shared_data("cifar10", "test100_png").glob("*.png"))[::40]
    x = torch.stack([to_tensor(Image.open(f).convert("RGB")) for f in files])
    x = normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    target = int(module(x[:1]).argmax())
    agrees_with_zennit(module, x, target, name, [SequentialMergeBatchNorm()])


# -- Captum

RECTIFYING = [("guided_backprop", "GuidedBackprop"), ("deconvolution", "Deconvolution")]


def with_modules():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(300, 16), nn.ReLU(), nn.Linear(16, 10),
    )  # fmt: skip


def captums(name, module, x, target, *args, **options):
    import captum.attr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        method = getattr(captum.attr, name)(module, *args)
        return method.attribute(x.clone().requires_grad_(), target=target, **options).detach()


@pytest.mark.parametrize(
    ("ours", "theirs"), [("guided_backprop", "GuidedBackprop"), ("deconvolution", "Deconvolution")]
)
def test_guided_backprop_and_deconvolution_agree_with_captum_where_relus_are_modules(ours, theirs):
    module, x = made(with_modules), noise(2, 3, 16, 16)
    net = opened(module, 3, 16, 16)
    agree(net.explain(x, method=ours, target=3, channels=True).values, captums(theirs, module, x, 3), 1e-6)


@pytest.mark.parametrize(
    ("ours", "theirs"), [("guided_backprop", "GuidedBackprop"), ("deconvolution", "Deconvolution")]
)
def test_guided_backprop_and_deconvolution_agree_with_captum_on_trained_squeezenet(
    squeezenet, photographs, ours, theirs
):
    g = opened(squeezenet, 3, 128, 128).explain(photographs, method=ours, target=12, channels=True)
    agree(g.values, captums(theirs, squeezenet, photographs, 12), 1e-5)


def test_guided_gradcam_agrees_with_captum():
    module, x = made(with_modules), noise(2, 3, 16, 16)
    net = opened(module, 3, 16, 16)
    s = net.explain(x, method="guided_gradcam", target=3, layer="4", channels=True)
    theirs = captums("GuidedGradCam", module, x, 3, module[4], interpolate_mode="bilinear")
    agree(s.values, theirs, 1e-5)
    assert np.allclose(
        net.explain(x, method="guided_gradcam", target=3, layer="4").values, np.abs(s.values).max(1), atol=1e-6
    )


def test_lrp_agrees_with_captum():
    class Plain(nn.Module):  # Captum refuses nn.Flatten
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3)
            self.relu1, self.relu2, self.pool = nn.ReLU(), nn.ReLU(), nn.MaxPool2d(2)
            self.fc = nn.Linear(300, 10)

        def forward(self, x):
            return self.fc(self.relu2(self.conv2(self.pool(self.relu1(self.conv1(x))))).flatten(1))

    module, x = made(Plain), noise(2, 3, 16, 16)
    ours = opened(module, 3, 16, 16).explain(
        x, method="lrp", target=3, composite="epsilon", epsilon=1e-9, channels=True
    )
    agree(ours.values, captums("LRP", module, x, 3), 1e-4)


def test_where_relus_are_functions_captums_guided_backprop_is_the_gradient_and_ours_is_not():
    module, x = made(SimpleCNN), noise(2, 1, 28, 28)
    net = opened(module, 1, 28, 28)
    gradient = net.explain(x, method="gradient", target=3, channels=True).values
    theirs = captums("GuidedBackprop", module, x, 3).numpy()
    assert np.allclose(theirs, gradient, atol=1e-6)
    ours = net.explain(x, method="guided_backprop", target=3, channels=True).values
    assert np.abs(ours - gradient).max() > 0.1 * np.abs(gradient).max()
    relus = ReLUs()
    relus.load_state_dict(module.state_dict())
    agree(ours, captums("GuidedBackprop", relus.eval(), x, 3), 1e-6)


class ReLUs(SimpleCNN):
    """The same network, each ReLU a module of its own."""

    def __init__(self):
        super().__init__()
        self.relus = nn.ModuleList(nn.ReLU() for _ in range(4))

    def forward(self, x):
        x = self.pool(self.relus[0](self.conv1(x)))
        x = self.pool(self.relus[1](self.conv2(x)))
        x = torch.flatten(x, 1)
        return self.fc3(self.relus[3](self.fc2(self.relus[2](self.fc1(x)))))


def test_guided_backprop_of_functions_worked_by_hand():
    class Net(nn.Module):
        def forward(self, x):
            a, b = x[:, 0, 0, 0], x[:, 0, 0, 1]
            return torch.stack([F.relu(a - b) - F.relu(b), a], 1)

    net = opened(Net(), 1, 1, 2)
    x = torch.tensor([[[[3.0, 1.0]]]])
    explained = {
        m: net.explain(x, method=m, target=0, channels=True).values.ravel().tolist()
        for m in ("gradient", "guided_backprop", "deconvolution")
    }
    assert explained == {"gradient": [1, -2], "guided_backprop": [1, -1], "deconvolution": [1, -1]}


# -- excitation backprop


def walk(weights, activations, start):
    """Marginal winning probabilities, as the paper has them: P(i) = sum_j P(i|j) P(j), P(i|j) = Z_j a_i w_ij+."""
    p = start
    for w, a in zip(reversed(weights), reversed(activations), strict=True):
        through = a[None, :] * w.clamp(min=0)
        total = through.sum(1, keepdim=True)
        p = p @ torch.where(total > 0, through / total.clamp(min=1e-30), 0)
    return p


def test_excitation_backprop_is_the_walk_of_the_paper():
    net = made(
        lambda: nn.Sequential(nn.Flatten(), *[nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3)])
    )
    x = noise(1, 3, 2, 2).abs()
    first, second, last = (net[i].weight.detach() for i in (1, 3, 5))
    hidden = F.relu(net[1](x.flatten(1)))[0].detach()
    deeper = F.relu(net[3](hidden)).detach()
    target = int(net(x).argmax())
    start = torch.eye(3)[target]
    chosen = replace(composites.EXCITATION, first=None)  # the paper has no layer that reads the pixels
    r = ruled(net, x, chosen, target)
    agree(r.relevance / r.scores, walk([first, second, last], [x.flatten(), hidden, deeper], start), 1e-4)
    negated = walk([first, second, -last], [x.flatten(), hidden, deeper], start)
    r = ruled(net, x, replace(composites.CONTRASTIVE, first=None), target)
    agree(r.relevance / r.scores, walk([first, second, last], [x.flatten(), hidden, deeper], start) - negated, 1e-4)


def test_excitation_backprop_gives_probabilities():
    net = opened(made(plain), 3, 16, 16)
    x = noise(2, 3, 16, 16)
    s = net.explain(x, method="excitation_backprop")
    assert s.values.min() >= 0
    assert np.allclose(s.values.sum((1, 2)), 1, atol=1e-5)
    assert np.allclose(s.verdict["input_share"], 1, atol=1e-5)
    both_signs = net.explain(x, method="excitation_backprop", contrastive=True).values
    assert np.allclose(both_signs.sum((1, 2)), 0, atol=1e-5)
    assert both_signs.min() < 0 < both_signs.max()


def test_contrastive_excitation_backprop_wants_weights_that_make_the_scores():
    pooled = made(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    net, x = opened(pooled, 3, 8, 8), noise(1, 3, 8, 8)
    assert net.explain(x, method="excitation_backprop").values.sum() == pytest.approx(1, abs=1e-5)
    with pytest.raises(errors.Unsupported, match="the scores are made from those by further operations"):
        net.explain(x, method="excitation_backprop", contrastive=True)


# -- the methods


def test_lrp_says_where_the_score_went():
    net = small_network("tokens")
    s = net.explain(noise(2, 3, 16, 16), method="lrp", composite="attnlrp", target=1)
    shares = [s.verdict[f"{name}_share"] for name in ("input", "bias", "constant", "epsilon", "softmax", "other")]
    assert np.allclose(np.sum(shares, axis=0), 1, atol=1e-4)
    assert max(s.verdict["conservation_error"]) < 1e-5
    assert np.allclose(s.values.sum((1, 2)), np.multiply(s.verdict["input_share"], s.verdict["score"]), rtol=1e-3)
    assert abs(s.verdict["softmax_share"][0]) > 1e-3
    kept = net.explain(noise(2, 3, 16, 16), method="lrp", composite="attnlrp", target=1, channels=True).values
    assert np.allclose(kept.sum(1), s.values, atol=1e-6)


def notes_of(saliency):
    return " ".join(saliency.provenance.notes)


def test_lrp_says_which_composite_it_chose_and_when_little_reaches_the_picture():
    s = small_network("tokens").explain(noise(1, 3, 16, 16), method="lrp")
    assert "composite cp" in notes_of(s)
    assert "of the score reaches the picture" in notes_of(s)
    s = small_network("residual").explain(noise(1, 3, 16, 16), method="lrp")
    assert "composite epsilon_plus_flat" in notes_of(s)
    assert "reaches the picture" not in notes_of(s)


def test_options_of_lrp_change_it_and_unknown_composites_are_suggested():
    net, x = small_network("residual"), noise(1, 3, 16, 16)
    usual = net.explain(x, method="lrp").values
    for options in ({"epsilon": 0.5}, {"bias": False}, {"composite": "epsilon_gamma_box"}):
        assert not np.allclose(net.explain(x, method="lrp", **options).values, usual)
    box = {"method": "lrp", "composite": "epsilon_gamma_box"}
    assert not np.allclose(net.explain(x, **box, low=[-9, -9, -9], high=9.0).values, net.explain(x, **box).values)
    with pytest.raises(errors.UnknownName, match="no composite 'epsilon_plus_flatt'; did you mean epsilon_plus_flat"):
        net.explain(x, method="lrp", composite="epsilon_plus_flatt")


def test_a_network_without_relus_is_told_that_guided_backprop_is_the_gradient():
    net, x = small_network("channels_last"), noise(1, 3, 16, 16)
    s = net.explain(x, method="guided_backprop", channels=True)
    assert np.allclose(s.values, net.explain(x, method="gradient", channels=True).values, atol=1e-7)
    assert "plain gradient" in notes_of(s)


def test_relevance_of_a_difference_is_the_difference_of_relevances():
    net, x = opened(made(SimpleCNN), 1, 28, 28), noise(1, 1, 28, 28)
    options = {"method": "lrp", "composite": "epsilon_plus_flat"}
    one, other = (net.explain(x, target=t, **options).values for t in (3, 7))
    both = net.explain(x, target=innersight.targets.difference(3, 7), **options).values
    assert np.allclose(both, one - other, atol=1e-5 * np.abs(one).max())
