"""What is timed against what: five jobs, and how innersight and each of its peers does them.

Every candidate is a function from a `Subject` (a network, a batch, the layers of the job) to a `Run`. What it prepares
there is not timed: wrapping the model, leaving hooks, freezing parameters, learning the network. Each peer gets the
setting in which it is fastest and is still itself; where tutorials show a slower one, that is a candidate, too.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

SIDE = 224
STAGES = {"resnet": "layer4", "vgg": "features.29", "mobilenet_v3_large": "features.16"}  # of the class activation maps


class NotOffered(Exception):
    """This candidate does not do this job on this network; the message says why."""


@dataclass
class Subject:
    """A network in eval mode with a batch of noise, and the layers that the jobs ask for.

    maps:   the layers of the first job; the first of them is the early layer of the second
    stage:  the layer of the class activation maps
    prefix: the network up to the early layer, run by hand
    tokens: whether its layers hold (N, 1 + H*W, C) in place of (N, C, H, W)
    """

    name: str
    model: nn.Module
    x: torch.Tensor
    maps: list[str]
    stage: str
    prefix: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    tokens: bool = False

    @property
    def early(self) -> str:
        return self.maps[0]

    @functools.cached_property
    def target(self) -> int:
        """The class that is explained, given to everybody, so that nobody pays for finding it.

        That with the best score on all images: a Grad-CAM of a class with a negative one may be zero everywhere.
        """
        with torch.no_grad():
            return int(self.model(self.x).amin(0).argmax())

    @functools.cached_property
    def net(self) -> Any:
        import innersight

        return innersight.open(self.model, input_shape=(3, SIDE, SIDE))

    def twin(self, frozen: bool = True, but: str | None = None) -> nn.Module:
        """The model again, on the same memory: what one candidate hooks, freezes or wraps is nobody else's.

        frozen: no parameter requires a gradient; but: except the last one of this layer
        """
        own = {id(p): nn.Parameter(p.detach(), requires_grad=not frozen) for p in self.model.parameters()}
        shared = {id(b): b for b in self.model.buffers()}
        twin = copy.deepcopy(self.model, {**own, **shared})
        if but is not None:
            list(twin.get_submodule(but).parameters())[-1].requires_grad_()
        return twin

    def grid(self, value: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) of a value of the network; tokens lose the class token."""
        if not self.tokens or value.dim() != 3:
            return value
        side = int((value.shape[1] - 1) ** 0.5)
        return value[:, 1:].transpose(1, 2).unflatten(2, (side, side))


def subject(name: str, batch: int, calibrated: bool = True) -> Subject:
    """A torchvision network with random weights whose activations are nevertheless of a sane size.

    Untrained BatchNorm statistics let activations vanish or explode, which changes how long arithmetic takes; one pass
    in training mode sets them. ViT's head starts as zeros, which would leave no gradient at all.
    """
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None)
    if isinstance(head := getattr(getattr(model, "heads", None), "head", None), nn.Linear):
        nn.init.normal_(head.weight, std=0.02)
    if calibrated:
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        for m in norms:
            m.momentum = None  # the mean over all batches seen, here one
        with torch.no_grad():
            model.train()(torch.randn(8, 3, SIDE, SIDE))
        for m in norms:
            m.momentum = 0.1
    x = torch.randn(batch, 3, SIDE, SIDE)
    model.eval()
    if name.startswith("vit"):
        blocks = [n for n, m in model.named_modules() if type(m).__name__ == "EncoderBlock"]
        return Subject(name, model, x, blocks, f"{blocks[-1]}.ln_1", _first_block, tokens=True)
    convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    ordered = _in_run_order(model, convolutions, x[:1])
    stage = next(layer for family, layer in STAGES.items() if name.startswith(family))
    return Subject(name, model, x, ordered, stage, lambda m, x: m.get_submodule(ordered[0])(x))


def _first_block(model: Any, x: torch.Tensor) -> torch.Tensor:
    tokens = model._process_input(x)
    tokens = torch.cat([model.class_token.expand(len(x), -1, -1), tokens], 1)
    return model.encoder.layers[0](model.encoder.dropout(tokens + model.encoder.pos_embedding))


def _in_run_order(model: nn.Module, names: list[str], x: torch.Tensor) -> list[str]:
    seen: list[str] = []
    hooks = [model.get_submodule(n).register_forward_hook(lambda *_, n=n: seen.append(n)) for n in names]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return seen


@dataclass
class Run:
    """call:   what is timed
    values: from what the call returned to the arrays that all candidates of the job shall agree on; None: nothing to
            compare
    around: entered before the call and left behind it, outside of the time
    scaled: the values are stretched to 0..1, as pytorch-grad-cam does; the reference is, too, before the comparison
    """

    call: Callable[[], Any]
    values: Callable[[Any], list] | None = None
    around: Callable[[], AbstractContextManager] = nullcontext
    scaled: bool = False


@dataclass(frozen=True)
class Candidate:
    who: str
    setting: str
    prepare: Callable[[Subject], Run]
    only: str = ""  # "batch 1", "small networks": too slow for more


@dataclass
class Job:
    """One question and everybody's way to its answer. The first candidate is the unit of time.

    reference: which candidate's values are taken for right
    """

    key: str
    title: str
    text: str
    candidates: list[Candidate] = field(default_factory=list)
    reference: int = 1

    def by(self, who: str, setting: str, only: str = "") -> Callable[[Callable[[Subject], Run]], Any]:
        def add(prepare: Callable[[Subject], Run]) -> Callable[[Subject], Run]:
            self.candidates.append(Candidate(who, setting, prepare, only))
            return prepare

        return add


MAPS = Job("maps", "Maps of every convolution", "For ViT, the output of every encoder block. Unit: a bare forward.")
EARLY = Job(
    "early", "One early map",
    "The first convolution; for ViT, the first encoder block. Unit: a bare forward. The floor is the network up to "
    "that layer, called by hand.",
)  # fmt: skip
GRADIENT = Job(
    "gradient", "Gradient saliency",
    "Unit: a forward and a backward to the input, all parameters frozen, by hand.", reference=0,
)  # fmt: skip
GRADCAM = Job(
    "gradcam", "Grad-CAM at the last stage",
    "`layer4`; for ViT, the norm in front of the last attention. Unit: a bare forward. innersight lays the map where "
    "the units of the layer look, its peers stretch it from border to border: compared are the maps before that.",
)  # fmt: skip
CAMS = Job(
    "cams", "Three CAMs at once",
    "Grad-CAM, HiResCAM and LayerCAM of the same layer and class. Unit: a bare forward.",
)  # fmt: skip
JOBS = {job.key: job for job in (MAPS, EARLY, GRADIENT, GRADCAM, CAMS)}


# ---------------------------------------------------------------------------------------------------------------------
# Units, and the same by hand


def bare_forward(s: Subject) -> Run:
    @torch.no_grad()
    def call() -> torch.Tensor:
        return s.model(s.x)

    return Run(call)


for _job in (MAPS, EARLY, GRADCAM, CAMS):
    _job.by("torch", "bare forward, `no_grad`")(bare_forward)


@MAPS.by("torch", "forward hooks, `no_grad`, nothing copied")
def hooks(s: Subject) -> Run:
    model, seen = s.twin(), {}
    for name in s.maps:
        model.get_submodule(name).register_forward_hook(lambda _m, _i, out, n=name: seen.__setitem__(n, out))

    @torch.no_grad()
    def call() -> dict[str, torch.Tensor]:
        seen.clear()
        model(s.x)
        return dict(seen)

    return Run(call, lambda found: [s.grid(found[n]) for n in s.maps])


@EARLY.by("torch", "the network up to the layer, by hand")
def prefix(s: Subject) -> Run:
    @torch.no_grad()
    def call() -> torch.Tensor:
        return s.prefix(s.model, s.x)

    return Run(call, lambda found: [s.grid(found)])


class _Enough(Exception):
    pass


@EARLY.by("torch", "forward hook that raises")
def raising_hook(s: Subject) -> Run:
    model, seen = s.twin(), []

    def stop(_module: nn.Module, _given: Any, out: torch.Tensor) -> None:
        seen.append(out)
        raise _Enough

    model.get_submodule(s.early).register_forward_hook(stop)

    @torch.no_grad()
    def call() -> torch.Tensor:
        with suppress(_Enough):
            model(s.x)
        return seen.pop()

    return Run(call, lambda found: [s.grid(found)])


def _saliency(g: Any) -> list:
    return [torch.as_tensor(g).abs().amax(1)]


@GRADIENT.by("torch", "forward + backward to the input, frozen parameters")
def input_gradient(s: Subject) -> Run:
    model = s.twin()

    def call() -> torch.Tensor:
        x = s.x.clone().requires_grad_()
        return torch.autograd.grad(model(x)[:, s.target].sum(), x)[0]

    return Run(call, _saliency)


@GRADIENT.by("torch", "as tutorials do: `backward()`, parameter gradients too")
def tutorial_gradient(s: Subject) -> Run:
    model = s.twin(frozen=False)

    def call() -> torch.Tensor:
        model.zero_grad()
        x = s.x.clone().requires_grad_()
        model(x)[:, s.target].sum().backward()
        assert x.grad is not None
        return x.grad

    return Run(call, _saliency)


def _cut_by_hand(s: Subject) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """Activations and gradients of the stage: frozen parameters, and a graph that begins there."""
    model, seen = s.twin(), []

    def cut(_module: nn.Module, _given: Any, out: torch.Tensor) -> torch.Tensor:
        seen.append(out.detach().requires_grad_())
        return seen[-1]

    model.get_submodule(s.stage).register_forward_hook(cut)

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        score = model(s.x)[:, s.target].sum()
        a = seen.pop()
        return s.grid(a.detach()), s.grid(torch.autograd.grad(score, a)[0])

    return call


def _cams(a: torch.Tensor, g: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "gradcam": (a * g.mean((2, 3), keepdim=True)).sum(1).relu(),
        "hirescam": (a * g).sum(1).relu(),
        "layercam": (a * g.relu()).sum(1).relu(),
    }


def _on_picture(cam: torch.Tensor) -> torch.Tensor:
    return F.interpolate(cam[:, None], size=(SIDE, SIDE), mode="bilinear", align_corners=False)[:, 0]


@GRADCAM.by("torch", "forward hook, graph cut at the layer, frozen parameters")
def gradcam_by_hand(s: Subject) -> Run:
    look = _cut_by_hand(s)

    def call() -> torch.Tensor:
        a, g = look()
        return _on_picture((a * g.mean((2, 3), keepdim=True)).sum(1).relu())

    return Run(call, lambda cam: [cam])


@CAMS.by("torch", "forward hook, graph cut at the layer, frozen parameters")
def cams_by_hand(s: Subject) -> Run:
    look = _cut_by_hand(s)
    return Run(lambda: [_on_picture(cam) for cam in _cams(*look()).values()], lambda found: found)


# ---------------------------------------------------------------------------------------------------------------------
# innersight: what users call, and the pass alone


@MAPS.by("innersight", "`net.maps(x, layers)`")
def net_maps(s: Subject) -> Run:
    return Run(lambda: s.net.maps(s.x, s.maps), lambda found: [found[n] for n in s.maps])


@EARLY.by("innersight", "`net.maps(x, layer)`")
def net_map(s: Subject) -> Run:
    return Run(lambda: s.net.maps(s.x, s.early), lambda found: [found[s.early]])


@GRADIENT.by("innersight", '`net.explain(x, "gradient")`')
def net_gradient(s: Subject) -> Run:
    return Run(lambda: s.net.explain(s.x, "gradient", target=s.target), lambda found: [found.values])


def _stretched(saliency: Any) -> torch.Tensor:
    """innersight lays a map where the units of its layer look; everybody else stretches it from border to border."""
    return _on_picture(torch.from_numpy(saliency.coarse))


@GRADCAM.by("innersight", '`net.explain(x, "gradcam")`')
def net_gradcam(s: Subject) -> Run:
    return Run(
        lambda: s.net.explain(s.x, "gradcam", target=s.target, layer=s.stage),
        lambda found: [_stretched(found)],
    )


@CAMS.by("innersight", '`net.explain(x, ["gradcam", "hirescam", "layercam"])`')
def net_cams(s: Subject) -> Run:
    names = ["gradcam", "hirescam", "layercam"]
    return Run(
        lambda: s.net.explain(s.x, names, target=s.target, layer=s.stage),
        lambda found: [_stretched(found[n]) for n in names],
    )


def _pass(s: Subject, **wanted: Any) -> Run:
    from innersight.observe.passes import Request

    engine, request = s.net.engine, Request(**wanted)
    return Run(lambda: engine.run(s.x, request), around=engine.session)


@MAPS.by("innersight", "the engine's pass alone")
def pass_maps(s: Subject) -> Run:
    run = _pass(s, read=s.maps, output=False)
    run.values = lambda passed: [s.grid(passed.values[n]) for n in s.maps]
    return run


@EARLY.by("innersight", "the engine's pass alone")
def pass_map(s: Subject) -> Run:
    run = _pass(s, read=[s.early], output=False)
    run.values = lambda passed: [s.grid(passed.values[s.early])]
    return run


@GRADIENT.by("innersight", "the engine's pass alone")
def pass_gradient(s: Subject) -> Run:
    run = _pass(s, gradients=["input"], score=lambda output: output[:, s.target])
    run.values = lambda passed: _saliency(passed.gradients["input"])
    return run


@GRADCAM.by("innersight", "the engine's pass alone")
def pass_gradcam(s: Subject) -> Run:
    run = _pass(s, read=[s.stage], gradients=[s.stage], score=lambda output: output[:, s.target])

    def values(passed: Any) -> list:
        cams = _cams(s.grid(passed.values[s.stage]), s.grid(passed.gradients[s.stage]))
        return [_on_picture(cams["gradcam"])]

    run.values = values
    return run


# ---------------------------------------------------------------------------------------------------------------------
# torchvision


def _extractor(s: Subject, layers: list[str]) -> Run:
    from torchvision.models.feature_extraction import create_feature_extractor

    extractor = create_feature_extractor(s.twin(), return_nodes={n: n for n in layers})

    @torch.no_grad()
    def call() -> dict[str, torch.Tensor]:
        return extractor(s.x)

    return Run(call, lambda found: [s.grid(found[n]) for n in layers])


@MAPS.by("torchvision", "`create_feature_extractor`, `no_grad`")
def extractor_maps(s: Subject) -> Run:
    return _extractor(s, s.maps)


@EARLY.by("torchvision", "`create_feature_extractor`, `no_grad`")
def extractor_map(s: Subject) -> Run:
    return _extractor(s, [s.early])


# ---------------------------------------------------------------------------------------------------------------------
# Captum


def _layer_activation(s: Subject, layers: list[str]) -> Run:
    from captum.attr import LayerActivation

    model = s.twin()
    found = [model.get_submodule(n) for n in layers]
    attribution = LayerActivation(model, found if len(found) > 1 else found[0])

    @torch.no_grad()
    def call() -> Any:
        return attribution.attribute(s.x)

    return Run(call, lambda maps: [s.grid(m) for m in (maps if len(found) > 1 else [maps])])


@MAPS.by("Captum", "`LayerActivation`, all layers in one call, `no_grad`")
def captum_maps(s: Subject) -> Run:
    return _layer_activation(s, s.maps)


@EARLY.by("Captum", "`LayerActivation`, `no_grad`")
def captum_map(s: Subject) -> Run:
    return _layer_activation(s, [s.early])


@GRADIENT.by("Captum", "`Saliency`, frozen parameters")
def captum_saliency(s: Subject) -> Run:
    from captum.attr import Saliency

    attribution = Saliency(s.twin())

    def call() -> torch.Tensor:
        return attribution.attribute(s.x.clone().requires_grad_(), target=s.target).detach()

    return Run(call, _saliency)


@GRADCAM.by("Captum", "`LayerGradCam`, frozen parameters")
def captum_gradcam(s: Subject) -> Run:
    from captum.attr import LayerAttribution, LayerGradCam

    if s.tokens:
        raise NotOffered("takes the dimension behind the batch for channels, which in tokens it is not")
    model = s.twin()
    attribution = LayerGradCam(model, model.get_submodule(s.stage))

    def call() -> torch.Tensor:
        cam = attribution.attribute(s.x, target=s.target, relu_attributions=True).detach()
        return LayerAttribution.interpolate(cam, (SIDE, SIDE), "bilinear")

    return Run(call, lambda cam: [cam[:, 0]])


# ---------------------------------------------------------------------------------------------------------------------
# pytorch-grad-cam


def _grad_cam(s: Subject, names: list[str], frozen: bool) -> Run:
    import cv2
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    cv2.setNumThreads(torch.get_num_threads())
    cams = []
    for name in names:  # a network each: the hooks of one would fire in the runs of the others
        model = s.twin(frozen, but=s.stage if frozen else None)
        reshape = s.grid if s.tokens else None
        cams.append(getattr(pytorch_grad_cam, name)(model, [model.get_submodule(s.stage)], reshape_transform=reshape))
    wanted = [ClassifierOutputTarget(s.target)] * len(s.x)
    return Run(lambda: [cam(s.x, wanted) for cam in cams], lambda found: found, scaled=True)


_BEST = "all parameters frozen but one in the layer, so that its graph begins there"


@GRADCAM.by("pytorch-grad-cam", f"`GradCAM`, {_BEST}")
def grad_cam(s: Subject) -> Run:
    return _grad_cam(s, ["GradCAM"], frozen=True)


@GRADCAM.by("pytorch-grad-cam", "`GradCAM`, as its README shows it")
def grad_cam_plain(s: Subject) -> Run:
    return _grad_cam(s, ["GradCAM"], frozen=False)


@CAMS.by("pytorch-grad-cam", f"three classes, {_BEST}")
def grad_cams(s: Subject) -> Run:
    return _grad_cam(s, ["GradCAM", "HiResCAM", "LayerCAM"], frozen=True)


@CAMS.by("pytorch-grad-cam", "three classes, as its README shows them", only="batch 1")
def grad_cams_plain(s: Subject) -> Run:
    return _grad_cam(s, ["GradCAM", "HiResCAM", "LayerCAM"], frozen=False)


# ---------------------------------------------------------------------------------------------------------------------
# TorchLens wraps every function of torch, for the whole process, and leaves them so: that, and taking it back, is done
# outside of its time and outside of everybody else's.


@contextmanager
def _torch_wrapped() -> Iterator[None]:
    from torchlens.backends.torch.wrappers import unwrap_torch, wrap_torch

    wrap_torch()
    try:
        yield
    finally:
        unwrap_torch()


def _is_map(s: Subject, context: Any) -> bool:
    """Whether TorchLens has just seen one of the layers: a convolution, or the second sum of an encoder block."""
    if not s.tokens:
        return context.layer_type == "conv2d"
    return context.layer_type == "add" and context.address in s.maps and context.type_index % 2 == 1


def _record(s: Subject, stop: bool) -> Run:
    import torchlens

    model = s.twin()
    wanted = functools.partial(_is_map, s)

    @torch.no_grad()
    def call() -> Any:
        return torchlens.record(model, s.x, save=wanted, halt=wanted if stop else None)

    return Run(call, lambda found: [s.grid(r.ram_payload) for r in found.records], _torch_wrapped)


@MAPS.by("TorchLens", "`record`, these layers alone, `no_grad`, frozen parameters", only="batch 1")
def torchlens_maps(s: Subject) -> Run:
    return _record(s, stop=False)


@MAPS.by("TorchLens", "`trace`, everything, as its README shows it", only="batch 1")
def torchlens_everything(s: Subject) -> Run:
    import torchlens

    model = s.twin(frozen=False)
    return Run(lambda: torchlens.trace(model, s.x), None, _torch_wrapped)


@EARLY.by("TorchLens", "`record` with `halt` at the layer, `no_grad`, frozen parameters", only="batch 1")
def torchlens_map(s: Subject) -> Run:
    return _record(s, stop=True)


@GRADIENT.by("TorchLens", "`attribution.saliency`, frozen parameters", only="batch 1")
def torchlens_saliency(s: Subject) -> Run:
    from torchlens import attribution

    model = s.twin()
    return Run(lambda: attribution.saliency(model, s.x, target=s.target), lambda found: _saliency(found.values))


def arrays(values: list) -> list[np.ndarray]:
    return [v.detach().numpy() if isinstance(v, torch.Tensor) else np.asarray(v) for v in values]
