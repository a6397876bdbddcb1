"""Class activation maps: the feature maps of one layer, weighted by what they do to the score.

Each is a line of weighting over the layer's activations `a` and gradients `g`, both `(n, C, H, W)`. The maps have the
layer's own grid (`Saliency.coarse`, what other libraries agree with); the network lays each value over the picture at
the middle of what it sees, where other libraries stretch the grid from border to border.

`relu` is on where the paper clips. Nothing is added to a denominator to keep it from zero: gradients of 1e-6 are
common (a mean over many places, a sure probability), and an epsilon beside them changes the map.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from innersight import errors
from innersight.methods import Look, method

if TYPE_CHECKING:  # a list of the methods needs no torch
    import torch

_cam = partial(method, family="cam", reads=("layer.value", "layer.gradient"), signed=False)


def _total(weighted: torch.Tensor, relu: bool) -> torch.Tensor:
    """The sum over the channels, `(n, H, W)`, clipped where asked."""
    total = weighted.sum(1)
    return total.relu() if relu else total


def _over_space(a: torch.Tensor) -> torch.Tensor:
    return a.sum((2, 3), keepdim=True)


@_cam(
    paper="Zhou et al.: Learning Deep Features for Discriminative Localization, CVPR 2016 (arXiv:1512.04150)",
    reads=("input.value", "layer.value", "layer.gradient"),
    visits=("layer.value", "layer.gradient"),
    signed=True,
    passes="3 forwards, 3 backwards; what follows the layer",
    unit="its mean over the layer's grid, and the bias, are the score",
)
def cam(look: Look, relu: bool = False) -> torch.Tensor:
    """Which places a class is read from: the layer's maps weighted by the class's row of the last linear layer.

    Defined where global average pooling and one linear layer are all that follows (ResNet, DenseNet, Swin). Whether
    this is so is measured, not guessed from names. The gradient has to be the same at every place of the picture and
    of two others (its negative, noise): then it is the row of the linear layer over the number of places. The score
    has to follow the layer in proportion, far up, to zero and into the negative; and at every picture it has to be the
    map's mean and the bias. Other networks are refused; `gradcam` generalizes it to them.

    relu: True drops what speaks against the target; the paper keeps it.
    """
    import torch

    x, a, g = look.value("input"), look.value(), look.gradient()
    row = g.mean((2, 3), keepdim=True)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x) * x.std() + x.mean()
    others = torch.cat([-x, noise])
    apart, biases = [g - row], [look.scores - (a * row).sum()]
    for _, there in look.visit(len(others), lambda part: others[list(part)], "layer.value", "layer.gradient"):
        apart.append(there.gradient() - row)
        biases.append(there.scores - (there.value() * row).sum((1, 2, 3)))
    factors = a.new_tensor([-8, 0, 8])
    beyond = look.scaled(factors.tolist()) - factors * (a * row).sum()
    if torch.cat(apart).abs().max() > 1e-3 * row.abs().max() or _differ(beyond, 8 * a * row):
        raise errors.Unsupported(
            "cam is defined where global average pooling and one linear layer are all between the layer and the score; "
            "here there is more: name the layer in front of the pooling with layer=, or use gradcam, its generalization"
        )
    if _differ(torch.cat(biases), a * row):
        raise errors.Unsupported(
            "cam is defined where the score is read from the layer alone; here another way leads past it: name the "
            "layer in front of the pooling with layer=, or use gradcam"
        )
    return _total(a * row * a[0, 0].numel(), relu)


def _differ(biases: torch.Tensor, parts: torch.Tensor) -> bool:
    """Whether these are several numbers, seen beside the sum of `parts` that they are the rest of."""
    return bool(biases.max() - biases.min() > 1e-3 * (biases.abs().max() + parts.abs().sum()))


@_cam(paper="Selvaraju et al.: Grad-CAM, ICCV 2017 (arXiv:1610.02391)")
def gradcam(look: Look, relu: bool = True) -> torch.Tensor:
    """Where a layer holds evidence: its maps, each weighted by its mean gradient, summed, positive part.

    relu: False keeps what speaks against the target, too.
    """
    return _total(look.value() * look.gradient().mean((2, 3), keepdim=True), relu)


@_cam(paper="Draelos, Carin: Use HiResCAM instead of Grad-CAM, 2020 (arXiv:2011.08891)")
def hirescam(look: Look, relu: bool = True) -> torch.Tensor:
    """Where a layer contributes to the score: its maps times their gradients, summed, positive part.

    Faithful where Grad-CAM, which averages the gradient over the picture, may point elsewhere.

    relu: False keeps what speaks against the target, too.
    """
    return _total(look.value() * look.gradient(), relu)


@_cam(paper="Jiang et al.: LayerCAM, IEEE TIP 2021")
def layercam(look: Look, relu: bool = True) -> torch.Tensor:
    """Fine maps from early layers: each value weighted by its own positive gradient, summed, positive part.

    relu: False keeps the sum's negative part; behind a ReLU it has none.
    """
    return _total(look.value() * look.gradient().relu(), relu)


@_cam(paper="Chattopadhay et al.: Grad-CAM++, WACV 2018 (arXiv:1710.11063)")
def gradcam_plus_plus(look: Look, relu: bool = True) -> torch.Tensor:
    """Grad-CAM for several objects of one class: each place's positive gradient weighted by its share, summed.

    The weights are those of the paper's equation 19 for a score that is the exponential of the logit, where the higher
    derivatives are powers of the gradient. pytorch-grad-cam adds 1e-6 to the denominator, which is more than the
    squared gradient in most networks; where it is less, the maps agree.

    relu: False keeps what speaks against the target, too.
    """
    a, g = look.value(), look.gradient()
    return _total(a * _plus_plus(a, g, third_by_second=g), relu)


def _plus_plus(a: torch.Tensor, first: torch.Tensor, third_by_second: torch.Tensor) -> torch.Tensor:
    """(n, C, 1, 1): Grad-CAM++'s weights from the first derivative and the ratio of the third to the second.

    Equation 19 divided by the second derivative, so that nothing underflows.
    """
    below = 2 + _over_space(a) * third_by_second
    return _over_space((first.relu() / below).where(below != 0, 0))


@_cam(
    paper="Omeiza et al.: Smooth Grad-CAM++, IntelliSys 2019 (arXiv:1908.01224)",
    reads=("input.value", "layer.value", "layer.gradient"),
    visits=("layer.gradient",),
    passes="1 + samples of each",
)
def smooth_gradcam_plus_plus(
    look: Look, samples: int = 25, noise: float = 0.15, seed: int = 0, relu: bool = True
) -> torch.Tensor:  # fmt: skip
    """Grad-CAM++ whose derivatives are means over noisy copies of the picture; the maps are those of the picture.

    Read as Grad-CAM++ with each of the three derivatives in its place, as TorchCAM reads it too: the paper's own
    formula prints the first derivative in the numerator of the shares.

    samples: how many noisy copies
    noise:   standard deviation, as a share of the range of the picture's values
    relu:    False keeps what speaks against the target, too.
    """
    import torch

    x, a = look.value("input"), look.value()
    draw, sigma = torch.Generator().manual_seed(seed), noise * (x.max() - x.min())
    scale = look.gradient().abs().max()  # powers of small gradients underflow
    scale = scale.where(scale > 0, 1)
    first, second, third = (torch.zeros_like(a) for _ in range(3))

    def noisy(part: range) -> torch.Tensor:
        return torch.cat([x + sigma * torch.randn(x.shape, generator=draw).to(x) for _ in part])

    for _, there in look.visit(samples, noisy, "layer.gradient"):
        g = there.gradient() / scale
        first += g.sum(0)
        second += (g**2).sum(0)
        third += (g**3).sum(0)
    ratio = scale * (third / second).where(second > 0, 0)
    return _total(a * _plus_plus(a, scale * first / samples, ratio), relu)


@_cam(paper="Fu et al.: Axiom-based Grad-CAM, BMVC 2020 (arXiv:2008.02312)")
def xgradcam(look: Look, relu: bool = True) -> torch.Tensor:
    """Grad-CAM whose weights are means over the places where a map is active, after two axioms; positive part.

    Made for maps without negative values, behind a ReLU: in others sums that cancel are divided by.

    relu: False keeps what speaks against the target, too.
    """
    a, g = look.value(), look.gradient()
    mass = _over_space(a)
    return _total(a * (_over_space(g * a) / mass).where(mass != 0, 0), relu)


@_cam(
    paper="Muhammad, Yeasin: Eigen-CAM, IJCNN 2020 (arXiv:2008.00299)",
    reads=("layer.value",),
    passes="1 forward",
)
def eigencam(look: Look, center: bool = True, relu: bool = True) -> torch.Tensor:
    """Where a layer is most itself, whatever the class: its maps on their first principal component.

    It takes no notice of the target. The sign of a component is arbitrary; it is taken so that the map goes up where
    the layer is active.

    center: True takes the mean over the places off first, as principal components and pytorch-grad-cam do; False is
            the paper's decomposition, where the first component is close to the mean
    relu:   False keeps the part below zero, where the layer is less active than elsewhere.
    """
    a = look.value()
    return _component(a, a.abs().sum(1), center, relu)


@_cam(paper="Eigen-CAM (arXiv:2008.00299) of activation times gradient, as pytorch-grad-cam introduced it, 2021")
def eigengradcam(look: Look, center: bool = True, relu: bool = True) -> torch.Tensor:
    """HiResCAM without its noise: activation times gradient on its first principal component.

    The sign is taken so that the map goes up where HiResCAM does.

    center: whether the mean over the places is taken off first
    relu:   False keeps the part below zero.
    """
    product = look.value() * look.gradient()
    return _component(product, product.sum(1), center, relu)


def _component(a: torch.Tensor, along: torch.Tensor, center: bool, relu: bool) -> torch.Tensor:
    """(n, H, W): every place `(C,)` on the first component of all places, signed to go with `along` `(n, H, W)`."""
    import torch

    places = a.flatten(2).mT.double()  # (n, H * W, C)
    if center:
        places = places - places.mean(1, keepdim=True)
    if places.shape[1] <= places.shape[2]:  # the smaller of the two products has the same first eigenvalue
        values, vectors = torch.linalg.eigh(places @ places.mT)
        on_first = vectors[..., -1] * values[..., -1:].clamp(min=0).sqrt()
    else:
        on_first = (places @ torch.linalg.eigh(places.mT @ places)[1][..., -1:])[..., 0]
    along = along.flatten(1).double()
    if center:
        along = along - along.mean(1, keepdim=True)
    sign = (on_first * along).sum(1, keepdim=True)
    on_first = on_first.where(sign >= 0, -on_first).to(a).reshape(len(a), *a.shape[2:])
    return on_first.relu() if relu else on_first


@_cam(
    paper="Wang et al.: Score-CAM, CVPR Workshops 2020 (arXiv:1910.01279)",
    reads=("input.value", "layer.value"),
    visits=("score",),
    passes="1 forward + 1 for each channel",
)
def scorecam(look: Look, relu: bool = True) -> torch.Tensor:
    """Where a layer holds evidence, without a gradient: each map weighted by the score of what it lets through.

    The picture is multiplied by each map, stretched over it and brought to 0..1; the weights are the softmax of the
    scores over the channels. So the paper's algorithm and pytorch-grad-cam, which stretches from corner to corner of
    the picture rather than from border to border; the authors' code weighs with probabilities and no softmax. The
    baseline's score, which the paper subtracts, cancels. Maps that are the same everywhere let nothing through and
    are left out, as by the authors.

    relu: False keeps negative sums; behind a ReLU there are none.
    """
    import torch
    import torch.nn.functional as F

    x, a = look.value("input"), look.value()[0]
    live = (a.amax((1, 2)) > a.amin((1, 2))).nonzero()[:, 0]

    def let_through(part: range) -> torch.Tensor:
        maps = F.interpolate(a[live[list(part)]][:, None], x.shape[2:], mode="bilinear")
        low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
        return x * ((maps - low) / (high - low))

    scores = [there.scores for _, there in look.visit(len(live), let_through)]
    weights = torch.cat(scores).softmax(0) if scores else a.new_zeros(0)
    return _total((a[live] * weights[:, None, None])[None], relu)


@_cam(
    paper="Desai, Ramaswamy: Ablation-CAM, WACV 2020",
    reads=("layer.value",),
    visits=("channels",),
    passes="1 forward + what follows the layer for each channel",
)
def ablationcam(look: Look, relu: bool = True) -> torch.Tensor:
    """Where a layer holds evidence, without a gradient: each map weighted by the share of the score lost without it.

    The weights are `(score - score without the map) / |score|`: the paper's for the positive scores it is made for,
    and a loss stays a loss where the score is negative. A score of zero has no shares; its weights are the loss itself.

    relu: False keeps what speaks against the target, too.
    """
    lost = look.scores - look.without_channels()
    weights = lost / look.scores.abs().where(look.scores != 0, 1)
    return _total(look.value() * weights[:, None, None], relu)
