"""Methods that hide parts: against Captum, scikit-learn and the papers' definitions, re-derived slowly."""

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

import innersight
from innersight import errors, targets
from innersight.methods import find
from innersight.methods.perturbation import _nearness, _smooth_max
from innersight.methods.superpixels import _labels
from innersight.testing import NETWORKS, check_method, close, left_as_found, small_network

SMALL = {
    "occlusion": {"window": 6},
    "rise": {"masks": 40},
    "sobol": {"grid": 3, "designs": 4},
    "lime": {"samples": 40, "count": 9},
    "kernel_shap": {"samples": 60, "count": 9},
    "minimal_region": {"count": 6},
    "extremal_perturbation": {"steps": 3},
}
BLIND = [name for name in SMALL if name != "extremal_perturbation"]  # those that need no gradient


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def black_box(function, size=16, channels=1):
    """A function of NumPy pictures (N, C, H, W) to one score each, as a network."""
    return innersight.open(lambda x: function(x)[:, None], input_shape=(channels, size, size))


def quarters(size=16, parts=2):
    """Labels (size, size) of parts x parts cells."""
    at = np.arange(size) * parts // size
    return at[:, None] * parts + at


# -- What holds for all


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", SMALL)
def test_each_keeps_its_promises_on_every_network(name, network):
    assert len(check_method(name, small_network(network), **SMALL[name])) == 8


@pytest.mark.parametrize("name", BLIND)
def test_a_plain_function_is_explained_as_the_network_it_wraps(name):
    net = small_network("residual")
    with torch.no_grad():
        box = innersight.open(lambda x: net.module(torch.from_numpy(x)).numpy(), input_shape=(3, 16, 16))
        x = noise(2, 3, 16, 16)
        assert find(name).needs == ()
        assert close(box.explain(x, name, **SMALL[name]).values, net.explain(x, name, **SMALL[name]).values, 1e-4)


def test_extremal_perturbation_says_what_a_plain_function_lacks():
    with pytest.raises(
        errors.Unsupported, match=r"needs gradients, which a plain function.*occlusion, rise, sobol, lime"
    ):
        black_box(lambda x: x.mean((1, 2, 3))).explain(noise(1, 1, 16, 16), "extremal_perturbation")


@pytest.mark.parametrize("name", SMALL)
def test_each_image_has_its_own_target(name):
    net = small_network("gated")
    x = noise(3, 3, 16, 16)
    together = net.explain(x, name, target=[0, None, 3], **SMALL[name])
    for i, target in enumerate([0, None, 3]):
        alone = net.explain(x[i : i + 1], name, target=target, **SMALL[name])
        assert close(together.values[i], alone.values[0], 1e-4)
        for number, said in alone.verdict.items():
            assert together.verdict[number][i] == pytest.approx(said[0], rel=1e-4, abs=1e-6), number


@pytest.mark.parametrize("name", SMALL)
def test_how_points_are_packed_changes_nothing(name):
    """Random numbers belong to a point, not to a batch; and when RISE stops does not depend on the memory."""
    net = small_network("tokens")
    x = noise(1, 3, 16, 16)
    options = SMALL[name] | ({"masks": 700, "error": 0.3} if name == "rise" else {})
    roomy = net.explain(x, name, **options)
    net.engine.chunk_size = lambda *_: 5
    tight = net.explain(x, name, **options)
    assert close(tight.values, roomy.values, 1e-4)
    if name == "rise":
        assert tight.verdict["masks"] == roomy.verdict["masks"]
        assert roomy.verdict["masks"][0] in (256, 512)


@pytest.mark.parametrize("name", ["rise", "sobol", "lime", "kernel_shap"])
def test_another_seed_is_another_draw(name):
    net = small_network("tokens")
    x = noise(1, 3, 16, 16)
    one, other = (net.explain(x, name, seed=seed, **SMALL[name]).values for seed in (0, 1))
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("name", SMALL)
def test_an_interrupt_half_way_leaves_the_model_as_found(name):
    net = small_network("residual")
    calls = []

    def target(output):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return output[:, 0]

    with left_as_found(net.module), pytest.raises(KeyboardInterrupt):
        net.explain(noise(1, 3, 16, 16), name, target=target, **SMALL[name])


@pytest.mark.parametrize("name", SMALL)
def test_a_constant_score_has_no_map(name):
    """Nothing matters, and nothing is what is found; of a minimal region, that there is none is said."""

    class Constant(nn.Module):
        def forward(self, x):
            return x.new_tensor([1.0, 2.0]).expand(len(x), 2) + 0 * x.sum((1, 2, 3))[:, None]

    s = innersight.open(Constant(), input_shape=(3, 16, 16)).explain(noise(1, 3, 16, 16), name, **SMALL[name])
    if name == "minimal_region":
        assert s.verdict["flipped"] == [0]
        assert any("does not change the decision" in note for note in s.provenance.notes)
    elif name != "extremal_perturbation":
        assert np.abs(s.values).max() < 1e-6


def test_what_cannot_be_is_said():
    net = small_network("gated")
    x = noise(1, 3, 16, 16)
    for name, options, sentence in [
        ("occlusion", {"window": 4, "stride": 5}, "a stride of 5 leaves gaps between windows of 4 pixels"),
        ("occlusion", {"window": "large"}, "window='large': give a number of pixels"),
        ("rise", {"share": 1.0}, "share=1.0: it is between"),
        ("rise", {"masks": 0}, "masks=0: it must be 1 or more"),
        ("sobol", {"designs": 24}, "designs=24: a Sobol sequence is even only at powers of two"),
        ("lime", {"segments": np.zeros((16, 16), int)}, "one single region"),
        (
            "lime",
            {"segments": np.zeros((8, 16), int)},
            r"one for each pixel of the input \(16, 16\); given were \(8, 16\)",
        ),
        ("lime", {"segments": np.zeros((16, 16))}, "whole numbers.*float64"),
        ("lime", {"segments": "slick"}, "no segments 'slick'.*did you mean slic"),
        ("lime", {"distance": "cosin"}, "no distance 'cosin'; did you mean cosine"),
        ("lime", {"kernel_width": 0.0}, "kernel_width=0.0: it must be above 0"),
        ("kernel_shap", {"samples": 30, "segments": "grid"}, "30 samples are too few for 49 segments: take 196"),
        ("extremal_perturbation", {"area": 1.5}, "area=1.5: a share of the picture between 0 and 1"),
        ("rise", {"fill": "blurr"}, "no baseline 'blurr'.*did you mean blur"),
    ]:
        with pytest.raises(errors.InnersightError, match=sentence):
            net.explain(x, name, **options)


@pytest.mark.parametrize("name", SMALL)
def test_parts_are_hidden_in_pictures_alone(name):
    net = innersight.open(nn.Linear(7, 2))
    with pytest.raises(errors.Unsupported, match=r"hidden in pictures \(N, C, H, W\); this input is \(1, 7\)"):
        net.explain(noise(2, 7), name)


# -- Occlusion


@pytest.mark.parametrize(("window", "stride"), [(4, 4), (4, 2), ((8, 4), (4, 2))])
@pytest.mark.parametrize("fill", ["zero", 0.7])
def test_occlusion_agrees_with_captum_where_its_windows_end_at_the_border(window, stride, fill):
    from captum.attr import Occlusion

    net = small_network("residual")
    x = noise(2, 3, 16, 16)
    ours = net.explain(x, "occlusion", target=[1, 3], window=window, stride=stride, fill=fill)
    pair = lambda v: (v, v) if isinstance(v, int) else v  # noqa: E731
    theirs = Occlusion(net.module).attribute(
        x,
        (3, *pair(window)),
        (3, *pair(stride)),
        baselines=0.0 if fill == "zero" else fill,
        target=torch.tensor([1, 3]),
    )
    assert close(ours.values, theirs[:, 0].detach(), 1e-4)


def test_occlusion_by_hand_the_last_window_stops_at_the_border():
    """A row of 5 under windows of 2, stride 2, of the sum: windows at 0, 2, 3; pixel 3 is covered twice."""
    x = torch.tensor([1.0, 2, 3, 4, 5]).reshape(1, 1, 1, 5)
    net = innersight.open(lambda a: a.sum((2, 3)), input_shape=(1, 1, 5))
    s = net.explain(x, "occlusion", window=(1, 2), stride=(1, 2))
    np.testing.assert_allclose(s.values[0, 0], [3, 3, 7, (7 + 9) / 2, 9])


def test_occlusion_of_a_picture_is_a_window_of_a_seventh():
    net = black_box(lambda x: x[:, 0, 10, 10], size=28)
    s = net.explain(torch.ones(1, 1, 28, 28), "occlusion")
    where = np.argwhere(s.values[0] > 0)
    assert where.min() == 8  # windows of 4 at 8 and 10 hide pixel 10
    assert where.max() == 13
    assert s.values[0, 10, 10] == 1  # every window over it takes the whole score


# -- RISE


def authors_masks(count, grid, share, size, seed):
    """As the authors' code makes them, by scikit-image, from our draws."""
    from skimage.transform import resize

    generator = torch.Generator().manual_seed(seed)
    cells = [math.ceil(side / grid) for side in size]
    masks = []
    for _ in range(count):
        shows = (torch.rand(grid, grid, generator=generator) < share).numpy().astype(np.float32)
        top, left = (int(torch.randint(cell, (), generator=generator)) for cell in cells)
        up = resize(shows, [(grid + 1) * cell for cell in cells], order=1, mode="reflect", anti_aliasing=False)
        masks.append(up[top : top + size[0], left : left + size[1]])
    return np.stack(masks)


@pytest.mark.parametrize(("grid", "size"), [(7, (16, 16)), (4, (15, 22)), (1, (8, 8))])
def test_rise_is_what_the_authors_code_makes_of_the_same_masks(grid, size):
    weights = noise(*size, seed=3).numpy()
    score = lambda x: np.tanh((x * weights).sum((1, 2, 3)) / 5) + 2  # noqa: E731
    net = innersight.open(lambda x: score(x)[:, None], input_shape=(1, *size))
    x = noise(1, 1, *size)
    masks = authors_masks(50, grid, 0.4, size, seed=5)
    scores = score(x.numpy()[0] * masks[:, None])
    options = {"masks": 50, "grid": grid, "share": 0.4, "seed": 5}
    published = net.explain(x, "rise", centered=False, **options)
    assert close(published.values[0], np.tensordot(scores, masks, 1) / 50 / 0.4, 1e-5)
    centered = net.explain(x, "rise", **options)
    assert close(centered.values[0], np.tensordot(scores - scores.mean(), masks, 1) / 50 / 0.4, 1e-4)


@pytest.mark.parametrize("centered", [True, False])
def test_the_error_bar_of_rise_is_the_spread_over_seeds(centered):
    weights = noise(14, 14, seed=2).numpy()
    net = black_box(lambda x: np.tanh((x * weights).sum((1, 2, 3)) / 8) + 1, size=14)
    x = torch.ones(1, 1, 14, 14)
    runs = [net.explain(x, "rise", masks=200, centered=centered, seed=seed) for seed in range(40)]
    maps = np.stack([s.values[0] - s.values[0].mean() for s in runs])
    true = np.sqrt(maps.var(0, ddof=1).mean())
    said = np.mean([s.verdict["standard_error"][0] * s.values.std() for s in runs])
    assert said == pytest.approx(true, rel=0.1)


def test_rise_stops_when_the_map_has_settled_or_says_that_it_has_not():
    net = black_box(lambda x: x[:, 0, 4:8, 8:12].mean((1, 2)))
    x = torch.ones(1, 1, 16, 16)
    early, late, never = (net.explain(x, "rise", masks=m, error=e) for m, e in [(4000, 0.3), (4000, 0.1), (300, 0.01)])
    assert early.verdict["masks"][0] < late.verdict["masks"][0] < 4000
    assert early.verdict["settled"] == late.verdict["settled"] == [1]
    assert late.verdict["standard_error"][0] <= 0.1
    assert never.verdict["settled"] == [0]
    assert never.verdict["masks"] == [300]
    y, at = np.unravel_index(late.values[0].argmax(), (16, 16))
    assert 4 <= y < 8
    assert 8 <= at < 12


def test_centering_takes_the_noise_of_the_masks_out_and_leaves_the_map():
    """On an offset of ten times its range, the published map needs a hundred times as many masks."""
    net = black_box(lambda x: x[:, 0, 4:8, 8:12].mean((1, 2)) + 10)
    x = torch.ones(1, 1, 16, 16)
    centered, published = (net.explain(x, "rise", masks=1500, error=0.0, centered=c) for c in (True, False))
    assert centered.verdict["standard_error"][0] < 0.15
    assert published.verdict["standard_error"][0] > 0.5


# -- Sobol indices


def cell_means(x, parts):
    n, _, h, w = x.shape
    return x.reshape(n, parts, h // parts, parts, w // parts).mean((2, 4)).reshape(n, -1)


def test_sobol_indices_of_a_sum_are_known():
    """f = Σ a m, each m uniform on 0..1: the index of a cell is its share of Σ a²."""
    a = np.array([1.0, 2, 3, 0, -2, 0.5, 0, 1, 4])
    net = black_box(lambda x: cell_means(x, 3) @ a, size=12)
    s = net.explain(torch.ones(1, 1, 12, 12), "sobol", grid=3, designs=512)
    np.testing.assert_allclose(cell_means(s.values[None], 3)[0], a**2 / (a**2).sum(), atol=0.01)
    assert s.verdict["variance"][0] == pytest.approx((a**2).sum() / 12, rel=0.03)


def test_sobol_indices_of_a_product_are_known():
    """f = m0 m3: its variance is 1/9 - 1/16, of which each takes part in E[m²] Var(m) = 1/36: 4/7."""
    net = black_box(lambda x: cell_means(x, 2)[:, [0, 3]].prod(1), size=12)
    s = net.explain(torch.ones(1, 1, 12, 12), "sobol", grid=2, designs=1024)
    np.testing.assert_allclose(cell_means(s.values[None], 2)[0], [4 / 7, 0, 0, 4 / 7], atol=0.02)


def test_sobol_is_jansens_estimator_over_the_same_masks():
    net = small_network("gated")
    x = noise(1, 3, 16, 16)
    s = net.explain(x, "sobol", target=1, grid=4, designs=8, fill=0.3, seed=2)

    drawn = torch.quasirandom.SobolEngine(32, scramble=True, seed=2).draw(8)
    a, b = drawn[:, :16], drawn[:, 16:]

    @torch.no_grad()
    def score(masks):
        shown = masks.reshape(-1, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
        return net.module(x * shown + 0.3 * (1 - shown))[:, 1].double().numpy()

    variance = np.concatenate([score(a), score(b)]).var(ddof=1)
    for cell in range(16):
        c = a.clone()
        c[:, cell] = b[:, cell]
        index = ((score(a) - score(c)) ** 2).sum() / (2 * 8 * variance)
        assert s.values[0, cell // 4 * 4, cell % 4 * 4] == pytest.approx(index, rel=1e-3, abs=1e-6)


# -- Segments


def test_superpixels_follow_the_picture():
    """Two colors that meet in a slanted line: superpixels hold one of them, cells of a grid both."""
    right = torch.arange(64) > torch.arange(64)[:, None] / 2 + 17
    x = torch.stack([right * 2.0, ~right * -1.0, torch.zeros(64, 64)])
    look = type("Look", (), {"note": lambda *_: None})()

    def apart(segments):
        labels = _labels(look, x, segments, 36)
        of_right = [right[labels == i].float().mean() for i in labels.unique()]
        pure = [(labels == i).sum() * max(r, 1 - r) for i, r in zip(labels.unique(), of_right, strict=True)]
        return float(sum(pure)) / 64**2

    assert apart("slic") > 0.98
    assert apart("grid") < 0.96


def test_a_grid_has_about_as_many_cells_as_asked_for():
    net = innersight.open(lambda a: a.mean((2, 3)), input_shape=(1, 12, 24))
    s = net.explain(noise(1, 1, 12, 24), "kernel_shap", segments="grid", count=8, fill=0.0)
    assert s.verdict["segments"] == [8]
    assert len(np.unique(s.values)) == 8
    assert all(len(np.unique(cell)) == 1 for row in np.split(s.values[0], 2) for cell in np.split(row, 4, 1))


def test_segments_of_ones_own_may_have_any_numbers():
    net = small_network("residual")
    x = noise(1, 3, 16, 16)
    own, plain = (
        net.explain(x, "kernel_shap", segments=s).values for s in (quarters() * 10 - 7, torch.tensor(quarters()))
    )
    np.testing.assert_array_equal(own, plain)


def test_noise_without_superpixels_is_cut_into_cells():
    x = noise(1, 3, 96, 96)
    x[0, :, ::2] = 40  # stripes too fine for superpixels
    net = innersight.open(lambda a: a.mean((2, 3)), input_shape=(3, 96, 96))
    s = net.explain(x, "lime", samples=20, count=2)
    assert s.verdict["segments"][0] > 1


def test_without_scikit_image_the_line_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.segmentation", None)
    net = small_network("gated")
    with pytest.raises(errors.MissingPackage, match=r'superpixels needs skimage: pip install "innersight\[segments\]"'):
        net.explain(noise(1, 3, 16, 16), "lime")
    assert net.explain(noise(1, 3, 16, 16), "lime", segments="grid", samples=20).verdict["segments"] == [49]


# -- LIME


@pytest.mark.parametrize(("distance", "alpha"), [("cosine", 1.0), ("l2", 0.1)])
def test_lime_is_the_weighted_ridge_of_scikit_learn(distance, alpha):
    from sklearn.linear_model import Ridge
    from sklearn.metrics import pairwise_distances

    net = small_network("tokens")
    x = noise(1, 3, 16, 16)
    labels = quarters(parts=4)
    s = net.explain(x, "lime", target=2, segments=labels, samples=60, distance=distance, alpha=alpha, fill=0.2, seed=3)
    z = (torch.rand(60, 16, generator=torch.Generator().manual_seed(3)) < 0.5).numpy()
    z[0] = True
    shows = torch.from_numpy(z[:, labels])[:, None]
    with torch.no_grad():
        y = net.module(torch.where(shows, x, 0.2))[:, 2].numpy()
    away = pairwise_distances(z.astype(float), np.ones((1, 16)), metric=distance).ravel()
    width = 0.25 if distance == "cosine" else 0.75 * 4
    weights = np.sqrt(np.exp(-(away**2) / width**2))
    ridge = Ridge(alpha=alpha).fit(z, y, sample_weight=weights)
    assert close(s.values[0], ridge.coef_[labels], 1e-4)
    assert s.verdict["r2"][0] == pytest.approx(ridge.score(z, y, sample_weight=weights), abs=1e-4)


def test_lime_and_kernel_shap_agree_with_captum_on_a_linear_network():
    """Where the score is a sum over segments there is one answer, however it is sampled."""
    from captum._utils.models.linear_model import SkLearnLinearRegression
    from captum.attr import KernelShap, Lime

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.Parameter(noise(2, 3, 16, 16, seed=4))

        def forward(self, x):
            return torch.einsum("nchw,kchw->nk", x, self.weights)

    model = Linear()
    net = innersight.open(model, input_shape=(3, 16, 16))
    x = noise(1, 3, 16, 16)
    labels = torch.from_numpy(quarters(parts=4))
    share = (x * model.weights[1]).detach().sum((0, 1))
    exact = torch.zeros(16).index_add(0, labels.flatten(), share.flatten())[labels]
    for name, options in [("lime", {"alpha": 0.0, "samples": 100}), ("kernel_shap", {"samples": 100})]:
        ours = net.explain(x, name, target=1, segments=labels, fill="zero", **options)
        assert close(ours.values[0], exact, 1e-4)
    assert ours.verdict["completeness_error"][0] < 1e-6
    assert ours.verdict["standard_error"][0] < 1e-5
    torch.manual_seed(0)
    theirs = KernelShap(model).attribute(x, target=1, feature_mask=labels[None, None], n_samples=200)
    assert close(theirs[0, 0].detach(), exact, 1e-3)
    lime = Lime(model, interpretable_model=SkLearnLinearRegression(), similarity_func=lambda *_, **__: 1.0)
    theirs = lime.attribute(x, target=1, feature_mask=labels[None, None], n_samples=200)
    assert close(theirs[0, 0].detach(), exact, 1e-3)


# -- Shapley values


def shapley(value, m):
    """By definition: the mean over all orders of what each adds to those before it."""
    phi = np.zeros(m)
    for i in range(m):
        others = [j for j in range(m) if j != i]
        for k in range(m):
            for s in itertools.combinations(others, k):
                weight = math.factorial(k) * math.factorial(m - k - 1) / math.factorial(m)
                phi[i] += weight * (value({*s, i}) - value(set(s)))
    return phi


def six(size=18):
    rows, columns = np.arange(size) * 2 // size, np.arange(size) * 3 // size
    return rows[:, None] * 3 + columns


def test_few_segments_have_their_exact_shapley_values():
    labels = six()
    weights = noise(18, 18, seed=6).numpy()
    score = lambda a: np.tanh((a * weights).sum((1, 2, 3)) / 4) + a[:, 0, 2, 2] * a[:, 0, 15, 15]  # noqa: E731
    x = noise(1, 1, 18, 18, seed=7).numpy()

    def value(shown):
        return score(np.where(np.isin(labels, list(shown)), x, 0.1).astype(np.float32))[0]

    s = black_box(score, size=18).explain(torch.from_numpy(x), "kernel_shap", segments=labels, fill=0.1)
    assert close(s.values[0], shapley(value, 6)[labels], 1e-5)
    assert s.verdict["standard_error"] == [0]
    assert s.verdict["completeness_error"][0] < 1e-6
    assert s.verdict["baseline_score"][0] == pytest.approx(value(set()), rel=1e-5)


def test_many_segments_have_their_shapley_values_within_the_error_bar():
    """12 segments: 4,096 choices against 400 drawn. The error bar is the spread over seeds."""
    labels = np.minimum(quarters(parts=4), 11)
    weights = noise(16, seed=8).numpy() * 2
    score = lambda a: np.tanh(a[:, 0, ::4, ::4].reshape(-1, 16) @ weights / 4)  # noqa: E731
    net = black_box(score)
    x = torch.ones(1, 1, 16, 16)
    exact = net.explain(x, "kernel_shap", segments=labels, samples=2**12)
    assert exact.verdict["standard_error"] == [0]
    runs = [net.explain(x, "kernel_shap", segments=labels, samples=400, seed=seed) for seed in range(20)]
    off = np.stack([s.values - exact.values for s in runs])
    true = np.sqrt((off**2).mean())
    said = np.mean([s.verdict["standard_error"][0] * exact.values.std() for s in runs])
    assert said == pytest.approx(true, rel=0.25)
    assert true < 0.1 * exact.values.std()
    assert np.abs(off.mean(0)).max() < true
    assert max(s.verdict["completeness_error"][0] for s in runs) < 1e-6


# -- Extremal perturbation


class Window(nn.Module):
    """Two classes: the texture (squared differences of neighbors) in a square, and outside of it."""

    def forward(self, x):
        texture = (x[:, :, :, 1:] - x[:, :, :, :-1]).square().mean(1)
        inside = texture[:, 8:16, 20:28].mean((1, 2))
        return torch.stack([inside, texture.mean((1, 2)) - inside], 1)


def test_the_extremal_mask_finds_the_only_evidence():
    net = innersight.open(Window(), input_shape=(3, 32, 32))
    x = noise(1, 3, 32, 32)
    s = net.explain(x, "extremal_perturbation", target=0, area=0.14, steps=80)
    mask = s.values[0]
    assert mask[9:15, 21:27].min() > 0.95
    far = np.ones((32, 32), bool)
    far[4:20, 16:32] = False
    assert mask[far].max() < 0.1
    assert s.verdict["masked_score"][0] > 0.95 * s.verdict["score"][0]
    assert s.verdict["area"][0] == pytest.approx(0.14, abs=0.03)


def test_the_extremal_mask_takes_no_notice_of_the_units_of_the_score():
    net = innersight.open(Window(), input_shape=(3, 32, 32))
    x = noise(1, 3, 32, 32)
    one, thousandth = (
        net.explain(x, "extremal_perturbation", target=lambda out, k=k: out[:, 0] * k, steps=20).values
        for k in (1.0, 0.001)
    )
    assert close(one, thousandth, 1e-3)


def test_showing_it_mirrored_changes_nothing_where_left_and_right_are_alike():
    class Alike(Window):
        def forward(self, x):
            return super().forward(x) + super().forward(x.flip(-1))

    net = innersight.open(Alike(), input_shape=(3, 32, 32))
    x = noise(1, 3, 32, 32)
    plain, mirrored = (net.explain(x, "extremal_perturbation", target=0, steps=9, mirror=m) for m in (False, True))
    assert close(plain.values, mirrored.values, 1e-4)


def test_the_mean_over_areas_is_the_mean_of_their_masks():
    net = small_network("residual")
    x = noise(1, 3, 16, 16)
    both = net.explain(x, "extremal_perturbation", area=[0.1, 0.4], steps=20)
    one, other = (net.explain(x, "extremal_perturbation", area=a, steps=20).values for a in (0.1, 0.4))
    assert close(both.values, (one + other) / 2, 1e-4)
    assert one.mean() < other.mean()


def test_the_smooth_maximum_is_what_the_paper_defines():
    """Each pixel: Σ v exp(20 v) / Σ exp(20 v) over the cells around, v = bump times nearness."""
    size, cell, sigma = (10, 13), 3, 5.0
    near = _nearness(size, cell, sigma)
    bumps = torch.rand(1, 4, 5, generator=torch.Generator().manual_seed(0))
    mask = _smooth_max(bumps, near, cell)[0]
    reach = 1 + math.ceil(sigma / cell)
    for y, x in [(0, 0), (5, 6), (9, 12), (2, 7)]:
        values = []
        for i in range(y // cell - reach, y // cell + reach + 1):
            for j in range(x // cell - reach, x // cell + reach + 1):
                bump = float(bumps[0, i, j]) if 0 <= i < 4 and 0 <= j < 5 else 0.0
                z = math.hypot(y - (i * cell + 1), x - (j * cell + 1)) / sigma
                values.append(bump * math.exp(-2 * max(z - 0.5, 0) ** 2))
        v = np.array(values)
        assert float(mask[y, x]) == pytest.approx((v * np.exp(20 * v)).sum() / np.exp(20 * v).sum(), rel=1e-4)


# -- The smallest region


def decisions(rule):
    """A classifier of four quarters: class 0 with score rule(means of the quarters), class 1 with 0.5."""

    def classify(x):
        first = np.array([rule(q) for q in cell_means(x, 2)])
        return np.stack([first, np.full(len(x), 0.5)], 1)

    return innersight.open(classify, input_shape=(1, 16, 16), labels=["object", "background"])


def region_of(s):
    return {int(q) for q in np.unique(quarters()[s.values[0] == 1])}


ONES = torch.ones(1, 1, 16, 16)
OWN = {"segments": quarters(), "fill": "zero"}


def test_one_segment_may_be_enough():
    s = decisions(lambda q: 0.8 * q[1] + 0.2 * q[3]).explain(ONES, "minimal_region", **OWN)
    assert region_of(s) == {1}
    assert s.targets == ["object"]
    assert s.verdict["flipped"] == [1]
    assert s.verdict["area"] == [0.25]


def test_evidence_that_is_there_twice_has_to_be_hidden_twice():
    s = decisions(lambda q: max(q[1], q[2])).explain(ONES, "minimal_region", **OWN)
    assert region_of(s) == {1, 2}


def test_what_was_hidden_in_vain_is_shown_again():
    """The first quarter lowers the score most but is not needed once the evidence, which is there twice, is gone."""
    rule = lambda q: 1 + 0.2 * q[0] if q[1] or q[2] else 0.2 * q[0]  # noqa: E731
    s = decisions(rule).explain(ONES, "minimal_region", **OWN)
    assert region_of(s) == {1, 2}


def test_of_several_that_flip_the_one_that_lowers_the_score_most_is_taken():
    s = decisions(lambda q: 0.9 - (q[1] == 0) * 0.5 - (q[2] == 0) * 0.7).explain(ONES, "minimal_region", **OWN)
    assert region_of(s) == {2}


def test_a_class_that_is_not_predicted_is_followed_half_way_down():
    net = decisions(lambda q: 0.3 * q[0] + 0.1 * q[1])
    s = net.explain(ONES, "minimal_region", target="object", **OWN)
    assert region_of(s) == {0}
    assert any("does not decide for the target" in note for note in s.provenance.notes)


def test_a_target_without_a_decision_is_followed_half_way_down():
    net = decisions(lambda q: 3 + 0.2 * q[0] + 0.3 * q[1] + 0.4 * q[2])
    s = net.explain(ONES, "minimal_region", target=lambda out: out[:, 0] * 2, **OWN)
    assert region_of(s) == {1, 2}  # 0.4 of 0.9 is not yet half


def test_a_difference_decides_by_its_sign():
    net = decisions(lambda q: 0.2 * q[0] + 0.7 * q[3])
    s = net.explain(ONES, "minimal_region", target=targets.difference("object", "background"), **OWN)
    assert region_of(s) == {3}
    assert not s.provenance.notes or not any("half-way" in note for note in s.provenance.notes)


def test_a_decision_that_nothing_changes_is_said():
    s = decisions(lambda q: 0.8 + 0.1 * q[0]).explain(ONES, "minimal_region", **OWN)
    assert s.verdict["flipped"] == [0]
    assert s.verdict["area"] == [1]
    assert any("hiding the whole picture does not change the decision" in note for note in s.provenance.notes)
    up = decisions(lambda q: 1 - q[0]).explain(ONES, "minimal_region", target="object", **OWN)
    assert up.verdict["flipped"] == [0]


def test_no_part_of_a_region_can_be_left_out():
    net = small_network("channels_last")
    x = noise(4, 3, 16, 16)
    labels = quarters(parts=4)
    s = net.explain(x, "minimal_region", segments=labels, fill=-1.0)
    clean = net.predict(x).classes
    assert any(s.verdict["flipped"])
    for i in np.flatnonzero(s.verdict["flipped"]):
        region = np.unique(labels[s.values[i] == 1])

        def decided(hidden, i=i):
            return net.predict(torch.where(torch.from_numpy(np.isin(labels, hidden)), -1.0, x[i : i + 1])).classes[0]

        assert decided(region) != clean[i]
        assert all(decided(region[region != part]) == clean[i] for part in region)
