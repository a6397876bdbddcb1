"""Path and noise methods against Captum, hand cases, their axioms, and slow re-derivations from the papers."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import innersight
from innersight import errors, targets
from innersight.methods.baselines import baseline, blurred, gaussian
from innersight.testing import NETWORKS, check_method, close, small_network

NOISE = ("smoothgrad", "squaregrad", "vargrad")
PATHS = ("integrated_gradients", "blur_integrated_gradients", "guided_integrated_gradients", "expected_gradients")
QUICK = {"guided_integrated_gradients": {"steps": 8}, "blur_integrated_gradients": {"error": 0.1}}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(function, *shape):
    """A network of one function of the picture."""

    class Hand(nn.Module):
        def forward(self, x):
            return function(x).reshape(len(x), 1)

    return innersight.open(Hand(), input_shape=shape)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", [*NOISE, *PATHS])
def test_every_method_keeps_its_promises_on_every_network(method, name):
    assert len(check_method(method, small_network(name), **QUICK.get(method, {}))) == 8


# -- Noise


def noisy_gradients(net, x, target, share, samples, seed):
    """(samples, C, H, W): the plain gradients at noisy versions of one picture, one by one."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(samples):
        point = x + share * (x.max() - x.min()) * torch.randn(x.shape, generator=draw)
        point.requires_grad_()
        found.append(torch.autograd.grad(net.module(point)[0, target], point)[0][0])
    return torch.stack(found).double()


def test_noise_methods_are_mean_square_and_variance_of_the_gradients_around_the_picture():
    net, x = small_network("tokens"), noise(1, 3, 16, 16)
    g = noisy_gradients(net, x, 2, 0.3, 20, seed=4)
    many = net.explain(x, NOISE, target=2, noise=0.3, samples=20, seed=4, channels=True)
    assert close(many["smoothgrad"].values[0], g.mean(0))
    assert close(many["squaregrad"].values[0], g.square().mean(0))
    assert close(many["vargrad"].values[0], g.var(0, correction=0))
    one = net.explain(x, NOISE, target=2, noise=0.3, samples=20, seed=4)
    for name in NOISE:
        assert close(one[name].values, np.abs(many[name].values).max(1))
    spread = (g.var(0).sum() / 20).sqrt() / g.mean(0).norm()
    assert one["smoothgrad"].verdict["standard_error"] == pytest.approx([float(spread)], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "theirs"), [("smoothgrad", "smoothgrad"), ("squaregrad", "smoothgrad_sq"), ("vargrad", "vargrad")]
)
def test_noise_methods_are_those_of_captum_on_the_same_noise(name, theirs, monkeypatch):
    from captum.attr import NoiseTunnel, Saliency

    net, x = small_network("residual"), noise(1, 3, 16, 16)
    ours = net.explain(x, name, target=1, samples=12, channels=True)
    draw = torch.Generator().manual_seed(0)
    sigma = 0.15 * (x.max() - x.min())
    drawn = sigma * torch.cat([torch.randn(x.shape, generator=draw) for _ in range(12)])
    monkeypatch.setattr(torch, "normal", lambda *_args, **_kw: drawn)
    tunnel = NoiseTunnel(Saliency(net.module))
    found = tunnel.attribute(x, nt_type=theirs, nt_samples=12, stdevs=float(sigma), target=1, abs=False)
    assert close(ours.values, found.detach(), 1e-4)


def test_noise_methods_asked_for_together_see_one_stream_of_points():
    net, x = small_network("residual"), noise(2, 3, 16, 16)
    net.explain(x, "smoothgrad", target=0)
    rows = []
    with net.module.conv1.register_forward_hook(lambda _m, args, _out: rows.append(len(args[0]))):
        many = net.explain(x, NOISE, target=0)
    assert sum(rows) == 2 + 2 * 25
    for name in NOISE:
        assert close(many[name].values, net.explain(x, name, target=0).values)  # but for how maps lie in memory


def test_a_linear_network_has_no_variance_and_keeps_its_gradient():
    weight = noise(3, 4, 4)
    net, x = network(lambda x: (x * weight).sum((1, 2, 3)), 3, 4, 4), noise(2, 3, 4, 4)
    many = net.explain(x, NOISE, channels=True)
    assert close(many["smoothgrad"].values[0], weight)
    assert close(many["squaregrad"].values[0], weight.square())
    assert not many["vargrad"].values.any()
    assert many["smoothgrad"].verdict["standard_error"] == [0, 0]


def test_of_a_bent_score_the_noise_methods_know_the_moments():
    """f = x²/2 has the gradient x: its mean is x, its variance that of the noise, its mean square the sum."""
    net = network(lambda x: x.square().sum((1, 2, 3)) / 2, 1, 1, 2)
    x = torch.tensor([[[[1.0, 3.0]]]])
    many = net.explain(x, NOISE, noise=0.25, samples=4000, channels=True)  # sigma 0.5
    np.testing.assert_allclose(many["smoothgrad"].values[0, 0, 0], [1, 3], atol=0.03)
    np.testing.assert_allclose(many["vargrad"].values[0, 0, 0], [0.25, 0.25], atol=0.02)
    np.testing.assert_allclose(many["squaregrad"].values[0, 0, 0], [1.25, 9.25], atol=0.2)


def test_a_picture_of_one_value_gets_no_noise_and_that_is_said():
    net = small_network("residual")
    s = net.explain(torch.ones(1, 3, 16, 16), "smoothgrad", target=0)
    assert any("no noise was added" in note for note in s.provenance.notes)
    assert close(s.values, net.explain(torch.ones(1, 3, 16, 16), "gradient", target=0).values)


# -- Integrated gradients


@pytest.mark.parametrize("given", ["zero", 0.5, "tensor"])
@pytest.mark.parametrize("name", ["residual", "tokens"])
def test_integrated_gradients_with_fixed_steps_are_those_of_captum(name, given):
    from captum.attr import IntegratedGradients

    net, x = small_network(name), noise(2, 3, 16, 16)
    other = noise(1, 3, 16, 16, seed=3)
    ours = net.explain(x, "integrated_gradients", target=[1, 3], baseline=other if given == "tensor" else given,
                       steps=20, channels=True)  # fmt: skip
    theirs = IntegratedGradients(net.module).attribute(
        x, {"zero": 0, 0.5: 0.5, "tensor": other}[given], target=torch.tensor([1, 3]), n_steps=20,
        method="gausslegendre",
    )  # fmt: skip
    assert close(ours.values, theirs.detach())
    assert ours.verdict["steps"] == [20, 20]


@pytest.mark.parametrize("name", NETWORKS)
def test_integrated_gradients_find_their_own_points(name):
    """They agree with 400 even steps; what is missing is within the bound, and is what the verdict says."""
    from captum.attr import IntegratedGradients

    net, x = small_network(name), noise(2, 3, 16, 16)
    score = net.module if name != "several_outputs" else lambda x: net.module(x)["logits"]
    s = net.explain(x, "integrated_gradients", target=1, error=0.005, channels=True)
    theirs = IntegratedGradients(score).attribute(x, target=1, n_steps=400, method="riemann_middle").detach()
    assert np.linalg.norm(s.values - theirs.numpy()) < 0.03 * theirs.norm()
    with torch.no_grad():
        change = (score(x) - score(torch.zeros_like(x)))[:, 1].numpy()
    missing = np.abs(s.values.sum((1, 2, 3)) - change) / np.abs(change)
    assert (missing < 0.005).all()
    np.testing.assert_allclose(s.verdict["completeness_error"], missing, atol=1e-4)
    np.testing.assert_allclose(s.verdict["score"] - np.array(s.verdict["baseline_score"]), change, rtol=1e-4)


def test_a_linear_network_takes_one_step_or_the_fewest():
    weight = noise(3, 4, 4)
    net, x = network(lambda x: (x * weight).sum((1, 2, 3)) + 7, 3, 4, 4), noise(1, 3, 4, 4)
    for options in ({"steps": 1}, {}):
        s = net.explain(x, "integrated_gradients", channels=True, **options)
        assert close(s.values[0], x[0] * weight)
        assert s.verdict["steps"] == [options.get("steps", 9)]
        assert s.verdict["baseline_score"] == [7]


def test_a_product_is_shared_equally():
    """f = x1 x2 on the way from zero: each gradient is t times the other, so each gets x1 x2 / 2."""
    net = network(lambda x: x[:, 0, 0, 0] * x[:, 0, 0, 1], 1, 1, 2)
    x = torch.tensor([[[[2.0, 5.0]]]])
    for options in ({"steps": 1}, {"error": 1e-3}):
        np.testing.assert_allclose(net.explain(x, "integrated_gradients", **options).values, [[[5, 5]]], rtol=1e-6)


def test_where_the_paper_says_gradients_fail_more_points_are_taken():
    """f = 1 - relu(1 - x) is flat at x = 3: its gradient is zero there, though x raised the score by 1."""
    net = network(lambda x: 1 - (1 - x).relu(), 1, 1, 1)
    x = torch.full((1, 1, 1, 1), 3.0)
    assert not net.explain(x, "gradient").values.any()
    s = net.explain(x, "integrated_gradients")
    assert s.values.item() == pytest.approx(1, abs=0.01)
    assert s.verdict["steps"][0] > 9
    assert s.verdict["completeness_error"][0] <= 0.01


def test_the_smaller_of_two_gets_it_all():
    net = network(lambda x: torch.minimum(x[:, 0, 0, 0], x[:, 0, 0, 1]), 1, 1, 2)
    s = net.explain(torch.tensor([[[[1.0, 3.0]]]]), "integrated_gradients", error=1e-3)
    np.testing.assert_allclose(s.values[0, 0], [1, 0], atol=3e-3)


def test_points_are_spent_where_the_score_bends():
    """A steep rise in a hundredth of the way takes equal steps hundreds of points."""
    net = network(lambda x: torch.tanh(300 * (x - 0.37)), 1, 1, 1)
    s = net.explain(torch.ones(1, 1, 1, 1), "integrated_gradients")
    assert s.values.item() == pytest.approx(2, abs=0.02)
    assert s.verdict["steps"][0] < 60
    even = net.explain(torch.ones(1, 1, 1, 1), "integrated_gradients", steps=60)
    assert even.verdict["completeness_error"][0] > 0.01


def test_where_the_points_do_not_suffice_it_is_said():
    net, x = small_network("tokens"), noise(1, 3, 16, 16)
    s = net.explain(x, "integrated_gradients", target=0, error=1e-5, max_steps=20)
    assert s.verdict["steps"] == [20]
    assert any("error=1e-05 was not reached within max_steps=20" in note for note in s.provenance.notes)
    jump = network(lambda x: x + (x > 0.3).float(), 1, 1, 1)
    s = jump.explain(torch.ones(1, 1, 1, 1), "integrated_gradients")
    assert s.verdict["completeness_error"][0] == pytest.approx(0.5)  # the jump has no slope
    assert s.verdict["steps"][0] < 40
    assert any("was not reached" in note for note in s.provenance.notes)


def test_a_score_that_comes_back_has_a_finite_error():
    net = network(lambda x: torch.sin(2 * torch.pi * x), 1, 1, 1)
    s = net.explain(torch.ones(1, 1, 1, 1), "integrated_gradients", max_steps=64)
    assert abs(s.values.item()) < 1e-3
    assert np.isfinite(s.verdict["completeness_error"][0])


# -- Blur


def test_blur_integrated_gradients_follow_the_picture_out_of_the_blur():
    """The paper's equation as the authors compute it: steps in sigma, the way's direction by a finite difference."""
    from scipy import ndimage

    net, x = small_network("tokens"), noise(1, 3, 16, 16)
    steps, h = 300, 1e-3
    sigmas = (np.arange(steps) + 0.5) * 6.0 / steps

    def blur(sigma):
        return ndimage.gaussian_filter(x[0].double().numpy(), (0, sigma, sigma), mode="constant", truncate=8)

    total = 0
    for sigma in sigmas:
        point = torch.tensor(blur(sigma)[None], dtype=torch.float32).requires_grad_()
        g = torch.autograd.grad(net.module(point)[0, 1], point)[0][0].double().numpy()
        total -= g * (blur(sigma + h) - blur(sigma - h)) / (2 * h) * 6.0 / steps
    for options in ({"error": 0.002}, {"steps": 100}):
        s = net.explain(x, "blur_integrated_gradients", target=1, sigma=6.0, channels=True, **options)
        assert np.linalg.norm(s.values[0] - total) < 0.02 * np.linalg.norm(total)
    with torch.no_grad():
        start = net.module(torch.tensor(blur(6.0)[None], dtype=torch.float32))[0, 1]
    assert s.verdict["baseline_score"] == pytest.approx([float(start)], rel=1e-4)


def test_a_plain_picture_has_nothing_to_bring_out_of_a_blur():
    net = small_network("residual")
    x = torch.ones(1, 3, 16, 16) * torch.tensor([1.0, -2.0, 0.5]).reshape(3, 1, 1)
    assert np.abs(net.explain(x, "blur_integrated_gradients", target=0, edge="mirror").values).max() < 1e-6
    assert np.abs(net.explain(x, "blur_integrated_gradients", target=0).values).max() > 1e-4  # edges fade to zero


@pytest.mark.parametrize(("edge", "theirs"), [("mirror", "reflect"), ("zero", "constant")])
@pytest.mark.parametrize("sigma", [0.3, 2.1, 40.1])
def test_the_blur_is_scipys_and_its_derivative_that_of_differences(sigma, edge, theirs):
    from scipy import ndimage

    x = noise(2, 3, 9, 14).double()
    expected = ndimage.gaussian_filter(x.numpy(), (0, 0, sigma, sigma), mode=theirs, truncate=8)
    assert close(blurred(x, sigma, edge), expected, 1e-7)
    up, down = (gaussian(9, sigma * (1 + s), edge)[0] for s in (1e-4, -1e-4))
    np.testing.assert_allclose(gaussian(9, sigma, edge)[1], (up - down) / (2e-4 * sigma), rtol=1e-3, atol=1e-9)


# -- Guided


def guided(net, x, start, target, steps, fraction, max_dist):
    """The authors' algorithm value by value: by how much each has come along is kept, not where it is."""
    x, start = x.flatten().double(), start.flatten().double()
    weight = (x - start).abs()
    come = [0.0] * len(x)
    total = torch.zeros(len(x), dtype=torch.float64)
    for step in range(1, steps + 1):
        point = (start + torch.tensor(come).double() * (x - start)).float().reshape(1, 3, 4, 4).requires_grad_()
        g = torch.autograd.grad(net.module(point)[0, target], point)[0].flatten().double()
        slowest, fastest = max(step / steps - max_dist, 0), min(step / steps + max_dist, 1)
        before = list(come)
        come = [max(c, slowest) for c in come]
        while (owed := sum(w * (step / steps - c) for w, c in zip(weight.tolist(), come, strict=True))) > 1e-9:
            open_to = [i for i, c in enumerate(come) if c < fastest]
            closed = [i for i, c in enumerate(come) if c >= fastest]
            ranked = sorted(open_to, key=lambda i: abs(float(g[i]))) + closed
            chosen = [i for i in ranked[: int(fraction * (len(x) - 1)) + 1] if i in open_to]
            room = sum(float(weight[i]) * (fastest - come[i]) for i in chosen)
            part = min(1.0, owed / room)
            for i in chosen:
                come[i] = fastest if part == 1 else come[i] + part * (fastest - come[i])
        total += g * (x - start) * (torch.tensor(come).double() - torch.tensor(before).double())
    return total.reshape(3, 4, 4)


@pytest.mark.parametrize(("fraction", "max_dist"), [(0.25, 0.02), (0.5, 0.2), (0.1, 1.0), (1.0, 0.1)])
def test_guided_integrated_gradients_move_first_what_the_score_heeds_least(fraction, max_dist):
    torch.manual_seed(2)
    module = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24, 2)).eval()
    net, x, start = innersight.open(module, input_shape=(3, 4, 4)), noise(1, 3, 4, 4), noise(1, 3, 4, 4, seed=1)
    s = net.explain(x, "guided_integrated_gradients", target=1, baseline=start, steps=15, fraction=fraction,
                    max_dist=max_dist, channels=True)  # fmt: skip
    assert close(s.values[0], guided(net, x, start, 1, 15, fraction, max_dist))
    with torch.no_grad():
        change = float((module(x) - module(start))[0, 1])
    assert s.verdict["completeness_error"] == pytest.approx([abs(s.values.sum() - change) / abs(change)], abs=1e-4)


def test_guided_on_the_straight_way_are_integrated_gradients_with_steps_from_their_starts():
    from captum.attr import IntegratedGradients

    net, x = small_network("tokens"), noise(1, 3, 16, 16)
    ours = net.explain(x, "guided_integrated_gradients", target=1, steps=10, max_dist=0.0, channels=True)
    theirs = IntegratedGradients(net.module).attribute(x, target=1, n_steps=10, method="riemann_left").detach()
    assert close(ours.values, theirs)


# -- Expected gradients


def test_expected_gradients_are_the_mean_of_integrated_gradients():
    from captum.attr import IntegratedGradients

    net, x, starts = small_network("tokens"), noise(1, 3, 16, 16), noise(4, 3, 16, 16, seed=2)
    s = net.explain(x, "expected_gradients", target=1, baselines=starts, samples=400, channels=True)
    each = [
        IntegratedGradients(net.module).attribute(x, b[None], target=1, n_steps=60, method="gausslegendre").detach()
        for b in starts
    ]
    expected = torch.cat(each).mean(0)
    assert np.linalg.norm(s.values[0] - expected.numpy()) < 0.02 * expected.norm()
    with torch.no_grad():
        assert s.verdict["baseline_score"] == pytest.approx([float(net.module(starts)[:, 1].mean())], rel=1e-4)
    assert s.verdict["completeness_error"][0] < 3 * s.verdict["standard_error"][0]


def test_expected_gradients_estimate_what_captums_gradient_shap_does():
    from captum.attr import GradientShap

    net, x, starts = small_network("residual"), noise(1, 3, 16, 16), noise(3, 3, 16, 16, seed=2)
    ours = net.explain(x, "expected_gradients", target=1, baselines=starts, samples=300, channels=True).values
    before = np.random.get_state(), torch.get_rng_state()
    np.random.seed(0)
    theirs = GradientShap(net.module).attribute(x, starts, n_samples=1500, target=1).detach().numpy()
    np.random.set_state(before[0])
    torch.set_rng_state(before[1])
    assert np.linalg.norm(ours - theirs) < 0.1 * np.linalg.norm(theirs)


def test_of_a_linear_network_one_round_of_the_baselines_is_exact():
    weight = noise(3, 4, 4)
    net = network(lambda x: (x * weight).sum((1, 2, 3)), 3, 4, 4)
    x, starts = noise(1, 3, 4, 4), noise(5, 3, 4, 4, seed=1)
    s = net.explain(x, "expected_gradients", baselines=starts, samples=5, channels=True)
    assert close(s.values[0], (x[0] - starts.mean(0)) * weight)
    assert s.verdict["completeness_error"][0] < 1e-5
    assert s.verdict["standard_error"][0] < 1e-5


def test_the_default_baselines_are_plain_pictures_in_the_pictures_own_colors():
    """A picture of two colors; f = x1: the mean baseline is the color's mean, by how often each was drawn."""
    x = torch.zeros(1, 1, 4, 4)
    x[..., :2] = 1.0
    net = network(lambda x: 5 * x[:, 0, 0, 0], 1, 4, 4)
    s = net.explain(x, "expected_gradients", samples=1000)
    start = s.verdict["baseline_score"][0]
    assert start == pytest.approx(2.5, abs=0.25)
    assert s.values[0, 0, 0] == pytest.approx(5 - start, rel=1e-5)


def test_the_standard_error_tells_how_far_the_estimate_is_off():
    net, x = small_network("tokens"), noise(1, 3, 16, 16)
    runs = [net.explain(x, "expected_gradients", target=1, samples=20, seed=i).verdict for i in range(16)]
    missed = np.sqrt(np.mean([r["completeness_error"][0] ** 2 for r in runs]))
    said = np.sqrt(np.mean([r["standard_error"][0] ** 2 for r in runs]))
    assert 0.2 * said < missed < 1.3 * said  # evenly spread points do better than drawn ones


# -- What holds for all


@pytest.mark.parametrize("method", [*NOISE, "expected_gradients"])
def test_another_seed_is_another_map(method):
    net, x = small_network("tokens"), noise(1, 3, 16, 16)
    a, b, c = (net.explain(x, method, target=0, seed=seed).values for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert not np.allclose(a, c)


@pytest.mark.parametrize("method", [*NOISE, *PATHS])
def test_how_points_are_cut_into_batches_does_not_matter(method):
    net, x = small_network("gated"), noise(2, 3, 16, 16)
    options = QUICK.get(method, {})
    whole = net.explain(x, method, target=[0, 2], **options).values
    net.engine.budget = 1  # one at a time
    assert close(net.explain(x, method, target=[0, 2], **options).values, whole)
    for i, target in enumerate([0, 2]):
        assert close(net.explain(x[i : i + 1], method, target=target, **options).values, whole[i : i + 1])


@pytest.mark.parametrize("method", PATHS)
def test_kept_colors_sum_to_the_map(method):
    net, x = small_network("gated"), noise(2, 3, 16, 16)
    options = QUICK.get(method, {})
    kept = net.explain(x, method, target=1, channels=True, **options).values
    assert kept.shape == (2, 3, 16, 16)
    assert close(kept.sum(1), net.explain(x, method, target=1, **options).values)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("smoothgrad", {}),
        ("integrated_gradients", {"steps": 6}),
        ("blur_integrated_gradients", {"steps": 6}),
        ("expected_gradients", {"samples": 6}),
    ],
)
def test_a_difference_and_a_function_are_explained_as_they_are(method, options):
    net, x = small_network("tokens"), noise(2, 3, 16, 16)
    explain = lambda target: net.explain(x, method, target=target, channels=True, **options).values  # noqa: E731
    assert close(explain(targets.difference(0, 3)), explain(0) - explain(3), 1e-4)
    assert close(explain(lambda out: 2 * out[:, 1]), 2 * explain(1))


def test_what_was_predicted_is_explained_all_along_the_way():
    """At the baseline another class wins; what is explained stays that of the picture."""
    net, x = small_network("tokens"), noise(4, 3, 16, 16, seed=3)
    predicted = net.predict(x).classes
    by_default = net.explain(x, "integrated_gradients", steps=4)
    assert close(by_default.values, net.explain(x, "integrated_gradients", target=predicted.tolist(), steps=4).values)


# -- Baselines


def test_baselines_are_what_they_are_called():
    from scipy import ndimage

    x = noise(2, 3, 10, 20)
    assert not baseline(x, "zero").any()
    assert close(baseline(x, "mean"), x.mean((2, 3), keepdim=True).expand_as(x))
    assert close(baseline(x, "blur"), ndimage.gaussian_filter(x.numpy(), (0, 0, 2, 2), mode="reflect", truncate=8))
    assert (baseline(x, -1.5) == -1.5).all()
    color = torch.tensor([1.0, 2.0, 3.0])
    for given in (color, [1, 2, 3], "[1, 2, 3]", color.reshape(3, 1, 1).expand(3, 10, 20).numpy()):
        assert close(baseline(x, given), color.reshape(3, 1, 1).expand_as(x))
    assert (baseline(x, "0.25") == 0.25).all()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("blurr", "no baseline 'blurr'.*did you mean blur"),
        ("black", "how pictures are normalized is not known here"),
        ([1.0, 2.0], r"a baseline of shape \(2,\) does not fit pictures \(3, 16, 16\)"),
        (float("nan"), "the baseline holds NaN"),
        (object(), "is no baseline"),
    ],
)
def test_a_baseline_that_is_none_is_refused(given, said):
    net = small_network("residual")
    with pytest.raises(errors.InnersightError, match=said):
        net.explain(noise(1, 3, 16, 16), "integrated_gradients", baseline=given)


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("integrated_gradients", {"error": 0}, "error is a share"),
        ("integrated_gradients", {"steps": -1}, "steps is a whole number of at least 0"),
        ("integrated_gradients", {"max_steps": 3}, "max_steps is a whole number of at least 9"),
        ("blur_integrated_gradients", {"sigma": 0}, "sigma is a blur"),
        ("blur_integrated_gradients", {"edge": "wrap"}, "no edge 'wrap'"),
        ("guided_integrated_gradients", {"fraction": 0}, "fraction is in"),
        ("expected_gradients", {"samples": 0}, "samples is a whole number"),
        ("expected_gradients", {"baselines": "noise"}, "no baselines 'noise'"),
        ("expected_gradients", {"baselines": torch.zeros(2, 3, 8, 8)}, r"baselines= is a batch.*\(K, 3, 16, 16\)"),
        ("smoothgrad", {"noise": 0}, "noise is a share"),
        ("vargrad", {"samples": 1}, "two samples or more"),
    ],
)
def test_options_out_of_range_are_refused(method, options, said):
    net = small_network("residual")
    with pytest.raises(errors.InnersightError, match=said):
        net.explain(noise(1, 3, 16, 16), method, **options)


def test_expected_gradients_do_not_look_at_the_other_pictures():
    net, x = small_network("residual"), noise(3, 3, 16, 16)
    others = [torch.cat([x[:1], 5 * noise(2, 3, 16, 16, seed=s)]) for s in (1, 2)]
    first, second = (net.explain(batch, "expected_gradients", target=0).values[0] for batch in others)
    assert close(first, second)


def test_two_points_of_the_way_are_halfway_apart_once_more():
    """The rule that chooses: stretches are halved, worst first, until those left miss half the bound."""
    from innersight.methods.path import _to_halve

    misses = dict(zip(itertools.pairwise([0.0, 0.25, 0.5, 1.0]), (0.5, -0.1, 0.02), strict=True))
    assert _to_halve(misses, 1.0) == []
    assert _to_halve(misses, 0.3) == [0.125]
    assert _to_halve(misses, 0.05) == [0.125, 0.375]
    even = dict(zip(itertools.pairwise([0.0, 0.5, 1.0]), (0.4, -0.4), strict=True))
    assert _to_halve(even, 0.1) == [0.25, 0.75]  # that they cancel is no reason to stop


def test_the_method_that_the_documents_show_is_smoothgrad(monkeypatch):
    """Each Python block of docs/adding-a-method.md that defines one runs as it stands."""
    import re
    from pathlib import Path

    from innersight import methods

    monkeypatch.setattr(methods, "_registry", dict(methods._registry))
    text = (Path(__file__).parent.parent / "docs" / "adding-a-method.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, {"torch": torch, "method": methods.method, "Look": methods.Look})
    net, x = small_network("residual"), noise(2, 3, 16, 16)
    shown = net.explain(x, "smooth", target=1)
    assert close(shown.values, net.explain(x, "smoothgrad", target=1).values)
