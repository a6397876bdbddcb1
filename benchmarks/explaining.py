"""More jobs: explanations that run the network many times, or under rules of their own. See peers.py for what a job is.

Each is heavy, so these are settings of which a round takes seconds. What is done once a request (a clean run, folding
weights) weighs more here than in longer ones: RISE with 4,000 masks is not measured by RISE with 128.
"""

from __future__ import annotations

from typing import Any

import torch
from peers import JOBS, Job, NotOffered, Run, Subject

STEPS, SAMPLES, MASKS, CHUNK = 50, 25, 256, 16

IG = Job(
    "integrated_gradients", f"Integrated gradients, {STEPS} steps",
    f"Unit: {STEPS} forwards and backwards to the input, by hand, frozen parameters, one at a time.", reference=0,
)  # fmt: skip
SMOOTH = Job(
    "smoothgrad", f"SmoothGrad, {SAMPLES} samples",
    f"Unit: {SAMPLES} forwards and backwards to the input, by hand, frozen parameters, one at a time. Everybody "
    "draws noise of their own, so values are not compared.", reference=0,
)  # fmt: skip
OCCLUSION = Job(
    "occlusion", "Occlusion, window 32, stride 16",
    "Unit: Captum, 16 windows at a time. How windows that overlap are averaged differs, so values are not compared.",
    reference=0,
)  # fmt: skip
ABLATION = Job("ablationcam", "Ablation-CAM at the last stage", "Unit: a bare forward of one image.", reference=1)
SCORE = Job(
    "scorecam", "Score-CAM at the last stage",
    f"Unit: a bare forward for each channel, {CHUNK} at a time.", reference=1,
)  # fmt: skip
RISE = Job(
    "rise", f"RISE, {MASKS} masks",
    "Unit: as many bare forwards, one at a time. Everybody draws masks of their own.", reference=0,
)  # fmt: skip
LRP = Job(
    "lrp", "LRP, composite epsilon-plus-flat",
    "Unit: a forward and a backward to the input, frozen parameters. Rules differ in where epsilon stands, so values "
    "are not compared here; tests/test_relevance.py does, with epsilon set alike.", reference=0,
)  # fmt: skip
DEEPLIFT = Job(
    "deeplift", "DeepLIFT against zero", "Unit: a forward and a backward to the input, frozen parameters.", reference=0
)
for _job in (IG, SMOOTH, OCCLUSION, ABLATION, SCORE, RISE, LRP, DEEPLIFT):
    JOBS[_job.key] = _job


def _gradients(
    model: torch.nn.Module, points: torch.Tensor, target: int, chunk: int = CHUNK, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """The (weighted) sum of the input gradients at many points, some at a time."""
    weights = torch.ones(len(points), 1, 1, 1) if weights is None else weights
    total = torch.zeros_like(points[:1])
    for part, weight in zip(points.split(chunk), weights.split(chunk), strict=True):
        part = part.clone().requires_grad_()
        gradient = torch.autograd.grad(model(part)[:, target].sum(), part)[0]
        total += (weight * gradient).sum(0, keepdim=True)
    return total


def _one(s: Subject) -> torch.Tensor:
    if len(s.x) > 1:
        raise NotOffered("run with batch 1 only, for its length")
    return s.x


# ---------------------------------------------------------------------------------------------------------------------
# Many gradients


def _ig_by_hand(s: Subject, chunk: int) -> Run:
    import numpy as np

    model, x = s.twin(), _one(s)
    places, weights = np.polynomial.legendre.leggauss(STEPS)
    at = torch.tensor((places + 1) / 2, dtype=x.dtype)[:, None, None, None]
    share = torch.tensor(weights / 2, dtype=x.dtype)[:, None, None, None]

    return Run(lambda: _gradients(model, at * x, s.target, chunk, share) * x, lambda found: [found.sum(1)])


@IG.by("torch", "by hand: Gauss-Legendre points, frozen parameters, one at a time")
def ig_by_hand(s: Subject) -> Run:
    return _ig_by_hand(s, 1)


@IG.by("torch", f"by hand, {CHUNK} at a time")
def ig_by_hand_in_chunks(s: Subject) -> Run:
    return _ig_by_hand(s, CHUNK)


@IG.by("innersight", f'`net.explain(x, "integrated_gradients", steps={STEPS})`')
def ig_fixed(s: Subject) -> Run:
    return Run(
        lambda: s.net.explain(_one(s), "integrated_gradients", target=s.target, steps=STEPS),
        lambda found: [found.values],
    )


@IG.by("innersight", '`net.explain(x, "integrated_gradients")`: until complete to 1%', only="small networks")
def ig_adaptive(s: Subject) -> Run:
    return Run(lambda: s.net.explain(_one(s), "integrated_gradients", target=s.target))


def _captum_ig(s: Subject, batch: int | None) -> Run:
    from captum.attr import IntegratedGradients

    attribution, x = IntegratedGradients(s.twin()), _one(s)
    return Run(
        lambda: attribution.attribute(x, target=s.target, n_steps=STEPS, internal_batch_size=batch).detach(),
        lambda found: [found.sum(1)],
    )


@IG.by("Captum", f"`IntegratedGradients`, internal_batch_size={CHUNK}, frozen parameters")
def captum_ig_chunked(s: Subject) -> Run:
    return _captum_ig(s, CHUNK)


@IG.by("Captum", "`IntegratedGradients` its default (all steps at once), frozen parameters")
def captum_ig(s: Subject) -> Run:
    return _captum_ig(s, None)


def _smooth_by_hand(s: Subject, chunk: int) -> Run:
    model, x = s.twin(), _one(s)
    return Run(lambda: _gradients(model, x + 0.15 * torch.randn(SAMPLES, *x.shape[1:]), s.target, chunk))


@SMOOTH.by("torch", "by hand, frozen parameters, one at a time")
def smooth_by_hand(s: Subject) -> Run:
    return _smooth_by_hand(s, 1)


@SMOOTH.by("torch", f"by hand, {CHUNK} at a time")
def smooth_by_hand_in_chunks(s: Subject) -> Run:
    return _smooth_by_hand(s, CHUNK)


@SMOOTH.by("innersight", f'`net.explain(x, "smoothgrad", samples={SAMPLES})`')
def smooth(s: Subject) -> Run:
    return Run(lambda: s.net.explain(_one(s), "smoothgrad", target=s.target, samples=SAMPLES))


@SMOOTH.by("innersight", '`net.explain(x, ["smoothgrad", "squaregrad", "vargrad"])`')
def smooth_three(s: Subject) -> Run:
    names = ["smoothgrad", "squaregrad", "vargrad"]
    return Run(lambda: s.net.explain(_one(s), names, target=s.target, samples=SAMPLES))


@SMOOTH.by("Captum", f"`NoiseTunnel(Saliency)`, nt_samples_batch_size={CHUNK}, frozen parameters")
def captum_smooth(s: Subject) -> Run:
    from captum.attr import NoiseTunnel, Saliency

    attribution, x = NoiseTunnel(Saliency(s.twin())), _one(s)

    def call() -> torch.Tensor:
        return attribution.attribute(
            x.clone().requires_grad_(), nt_type="smoothgrad", nt_samples=SAMPLES, nt_samples_batch_size=CHUNK,
            stdevs=0.15, target=s.target, abs=False,
        ).detach()  # fmt: skip

    return Run(call)


@SMOOTH.by("Zennit", "`SmoothGrad`, frozen parameters")
def zennit_smooth(s: Subject) -> Run:
    from zennit.attribution import SmoothGrad

    attribution, x = SmoothGrad(s.twin(), noise_level=0.15, n_iter=SAMPLES), _one(s)
    return Run(lambda: attribution(x.clone(), _picked(s))[1].detach())


def _picked(s: Subject) -> Any:
    def pick(output: torch.Tensor) -> torch.Tensor:
        chosen = torch.zeros_like(output)
        chosen[:, s.target] = 1
        return chosen

    return pick


# ---------------------------------------------------------------------------------------------------------------------
# Perturbation


def _captum_occlusion(s: Subject, batch: int) -> Run:
    from captum.attr import Occlusion

    attribution, x = Occlusion(s.twin()), _one(s)

    @torch.no_grad()
    def call() -> torch.Tensor:
        return attribution.attribute(
            x, target=s.target, sliding_window_shapes=(3, 32, 32), strides=(3, 16, 16), perturbations_per_eval=batch
        )

    return Run(call)


@OCCLUSION.by("Captum", f"`Occlusion`, perturbations_per_eval={CHUNK}")
def captum_occlusion(s: Subject) -> Run:
    return _captum_occlusion(s, CHUNK)


@OCCLUSION.by("Captum", "`Occlusion`, perturbations_per_eval=8", only="small networks")
def captum_occlusion_few(s: Subject) -> Run:
    return _captum_occlusion(s, 8)


@OCCLUSION.by("Captum", "`Occlusion`, perturbations_per_eval=32")
def captum_occlusion_many(s: Subject) -> Run:
    return _captum_occlusion(s, 32)


@OCCLUSION.by("Captum", "`Occlusion`, its default, one at a time", only="small networks")
def captum_occlusion_plain(s: Subject) -> Run:
    return _captum_occlusion(s, 1)


@OCCLUSION.by("innersight", '`net.explain(x, "occlusion", window=32, stride=16)`')
def occlusion(s: Subject) -> Run:
    return Run(lambda: s.net.explain(_one(s), "occlusion", target=s.target, window=32, stride=16))


def _channels(s: Subject) -> int:
    return s.net.layers[s.stage].grid[0]


@ABLATION.by("torch", "bare forward, `no_grad`")
def ablation_unit(s: Subject) -> Run:
    x = _one(s)

    @torch.no_grad()
    def call() -> torch.Tensor:
        return s.model(x)

    return Run(call)


@ABLATION.by("innersight", '`net.explain(x, "ablationcam")`')
def ablation(s: Subject) -> Run:
    return Run(lambda: s.net.explain(_one(s), "ablationcam", target=s.target, layer=s.stage))


@SCORE.by("torch", "bare forwards, `no_grad`")
def score_unit(s: Subject) -> Run:
    x, count = _one(s), _channels(s)

    @torch.no_grad()
    def call() -> None:
        for start in range(0, count, CHUNK):
            s.model(x.expand(min(CHUNK, count - start), *x.shape[1:]))

    return Run(call)


@SCORE.by("innersight", '`net.explain(x, "scorecam")`')
def score(s: Subject) -> Run:
    return Run(lambda: s.net.explain(_one(s), "scorecam", target=s.target, layer=s.stage))


def _grad_cam(s: Subject, name: str) -> Run:
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, x = s.twin(), _one(s)
    cam = getattr(pytorch_grad_cam, name)(
        model, [model.get_submodule(s.stage)], reshape_transform=s.grid if s.tokens else None
    )
    cam.batch_size = CHUNK
    wanted = [ClassifierOutputTarget(s.target)]

    @torch.no_grad()
    def call() -> Any:
        return cam(x, wanted)

    return Run(call)


@ABLATION.by("pytorch-grad-cam", f"`AblationCAM`, batch_size={CHUNK}, frozen parameters, `no_grad`")
def ablation_peer(s: Subject) -> Run:
    if s.tokens:
        raise NotOffered("its layer for ablation takes the dimension behind the batch for channels")
    return _grad_cam(s, "AblationCAM")


@SCORE.by("pytorch-grad-cam", f"`ScoreCAM`, batch_size={CHUNK}, frozen parameters, `no_grad`")
def score_peer(s: Subject) -> Run:
    return _grad_cam(s, "ScoreCAM")


def _forwards(s: Subject, chunk: int) -> Run:
    x = _one(s)

    @torch.no_grad()
    def call() -> None:
        for _ in range(MASKS // chunk):
            s.model(x.expand(chunk, *x.shape[1:]))

    return Run(call)


@RISE.by("torch", "bare forwards, `no_grad`, one at a time")
def rise_unit(s: Subject) -> Run:
    return _forwards(s, 1)


@RISE.by("torch", f"bare forwards, `no_grad`, {CHUNK} at a time")
def rise_unit_in_chunks(s: Subject) -> Run:
    return _forwards(s, CHUNK)


@RISE.by("innersight", f'`net.explain(x, "rise", masks={MASKS})`')
def rise(s: Subject) -> Run:
    return Run(lambda: s.net.explain(_one(s), "rise", target=s.target, masks=MASKS))


# ---------------------------------------------------------------------------------------------------------------------
# Rules


@LRP.by("torch", "forward + backward to the input, frozen parameters")
@DEEPLIFT.by("torch", "forward + backward to the input, frozen parameters")
def gradient(s: Subject) -> Run:
    model = s.twin()
    return Run(lambda: _gradients(model, s.x, s.target))


@LRP.by("innersight", '`net.explain(x, "lrp", composite="epsilon_plus_flat")`')
def lrp(s: Subject) -> Run:
    return Run(lambda: s.net.explain(s.x, "lrp", target=s.target, composite="epsilon_plus_flat"))


@LRP.by("Zennit", "`EpsilonPlusFlat` with the canonizer for this network, frozen parameters")
def zennit_lrp(s: Subject) -> Run:
    from zennit.attribution import Gradient
    from zennit.composites import EpsilonPlusFlat
    from zennit.torchvision import ResNetCanonizer, VGGCanonizer

    if s.name.startswith("resnet"):
        canonizers = [ResNetCanonizer()]
    elif s.name.startswith("vgg"):
        canonizers = [VGGCanonizer()]
    else:
        raise NotOffered("has no canonizer for this network")
    model, x = s.twin(), s.x

    def call() -> torch.Tensor:
        with Gradient(model, EpsilonPlusFlat(canonizers=canonizers)) as attribution:
            return attribution(x.clone().requires_grad_(), _picked(s))[1].detach()

    return Run(call)


@LRP.by("Captum", "`LRP`, its own rules, frozen parameters")
def captum_lrp(s: Subject) -> Run:
    from captum.attr import LRP as CaptumLRP

    attribution = CaptumLRP(s.twin())
    return Run(lambda: attribution.attribute(s.x.clone().requires_grad_(), target=s.target).detach())


@DEEPLIFT.by("innersight", '`net.explain(x, "deeplift")`')
def deeplift(s: Subject) -> Run:
    return Run(lambda: s.net.explain(s.x, "deeplift", target=s.target))


@DEEPLIFT.by("Captum", "`DeepLift`, frozen parameters")
def captum_deeplift(s: Subject) -> Run:
    from captum.attr import DeepLift

    attribution = DeepLift(s.twin())
    return Run(lambda: attribution.attribute(s.x.clone().requires_grad_(), target=s.target).detach())
