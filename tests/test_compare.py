"""Two networks side by side: numbers against plain NumPy, alignment against networks built to be the same."""

import copy
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import innersight
from innersight import errors
from innersight.comparison import alignment
from innersight.comparison.answers import Predicted, Reasons, _ranks
from innersight.comparison.layers import decibel
from innersight.results import Predictions
from innersight.testing import NETWORKS, left_as_found, small_network


class Small(nn.Module):
    """Convolutions, BatchNorm, a residual path, functional ReLU."""

    def __init__(self, classes=4):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 12, 3, stride=2)
        self.fc = nn.Linear(12, classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn2(self.conv2(x)))
        x = F.relu(self.conv3(x))
        return self.fc(x.mean((2, 3)))


def small(seed=0, classes=4):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Small(classes).eval()
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 1.5)
        return net


def opened(module, **options):
    return innersight.open(module, input_shape=(3, 16, 16), **options)


@pytest.fixture(scope="module")
def x():
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def noisy():
    """A network, and the same with a little noise on all weights."""
    a = small()
    b = copy.deepcopy(a)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in b.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator)
    return opened(a), opened(b)


def maps_of(net, x, name):
    return net.maps(x, layers=[name])[name].astype(np.float64)


# ---------------------------------------------------------------------------------------------------------------------
# The numbers


def test_numbers_are_those_of_plain_numpy_over_captured_maps(noisy, x):
    a, b = noisy
    c = innersight.compare(a, b, x, method=None)
    assert list(c.layers) == list(a.layers)
    for name, row in c.layers.items():
        p, q = maps_of(a, x, name), maps_of(b, x, name)
        if p.ndim == 4 and p.shape[2:] == (1, 1):
            p, q = p[:, :, 0, 0], q[:, :, 0, 0]
        assert row.sqnr == pytest.approx(10 * np.log10((p**2).sum() / ((p - q) ** 2).sum()), abs=1e-9)
        assert row.cosine == pytest.approx((p * q).sum() / np.sqrt((p**2).sum() * (q**2).sum()), abs=1e-12)
        assert row.range_a == (p.min(), p.max())
        assert row.range_b == (q.min(), q.max())
        assert row.largest == pytest.approx(np.abs(p - q).max())
        axes = (0, *range(2, p.ndim))
        with np.errstate(divide="ignore", invalid="ignore"):
            each = 10 * np.log10((p**2).sum(axes) / ((p - q) ** 2).sum(axes))
            images = 10 * np.log10((p**2).reshape(len(x), -1).sum(1) / ((p - q) ** 2).reshape(len(x), -1).sum(1))
        live = (p**2).sum(axes) > 0
        np.testing.assert_allclose(row.channel_sqnr[live], each[live], atol=1e-9)
        np.testing.assert_allclose(row.by_image, images, atol=1e-9)
        constant = [i for i in range(p.shape[1]) if np.ptp(p[:, i]) == 0]
        assert row.dead("a") == constant
        noise = ((p - q) ** 2).sum(axes)
        counts = [i for i in np.argsort(each, kind="stable") if noise[i] >= 0.1 * noise.mean()]
        assert [channel for channel, _ in row.worst(3)] == counts[:3]


def test_a_network_is_equal_to_itself(x):
    net = opened(small())
    c = innersight.compare(net, net, x)
    assert all(r.equal and r.sqnr == math.inf and r.cosine == 1 for r in c.layers.values())
    assert c.first_divergence is None
    assert c.first_difference is None
    assert c.largest_drop is None
    assert c.predictions.agreement == 1
    assert (c.predictions.divergence == 0).all()
    assert (c.predictions.change == 0).all()
    assert (c.reasons.correlation == 1).all()
    assert not c.reasons.unlike
    assert "equal, bit for bit" in str(c)


def test_it_parts_where_the_weights_were_changed(x):
    a, b = small(), small()
    with torch.no_grad():
        b.conv2.weight.mul_(-1)
    c = innersight.compare(opened(a), opened(b), x, method=None)
    assert c.first_difference.a == "conv2"
    assert c.first_divergence.layer.a == "conv2"
    assert [i.a for i in c.first_divergence.inputs] == ["relu"]
    assert c.first_divergence.inputs[0].equal
    assert c.largest_drop.layer.a == "conv2"
    before = list(c.layers)[: list(c.layers).index("conv2")]
    assert all(c.layers[n].equal for n in before)
    behind = list(c.layers)[list(c.layers).index("conv2") :]
    assert not any(c.layers[n].equal for n in behind)
    assert "is equal in both, so the difference arises here" in str(c.first_divergence)


def test_a_small_change_is_found_though_it_stays_above_the_threshold(x):
    a, b = small(), small()
    with torch.no_grad():
        b.conv3.weight.mul_(1.001)
    c = innersight.compare(opened(a), opened(b), x, method=None)
    assert c.first_divergence is None
    assert c.first_difference.a == c.largest_drop.layer.a == "conv3"
    assert c.layers["conv3"].sqnr == pytest.approx(60, abs=1)  # a thousandth, but for the bias
    assert innersight.compare(opened(a), opened(b), x, method=None, threshold=80).first_divergence.layer.a == "conv3"


def test_each_bit_of_the_weights_is_worth_about_six_decibel(x):
    a = small()
    found = {}
    for bits in (4, 6, 8, 10):
        b = copy.deepcopy(a)
        with torch.no_grad():
            for m in b.modules():
                if isinstance(m, (nn.Conv2d, nn.Linear)):
                    step = m.weight.abs().amax() / (2 ** (bits - 1) - 1)
                    m.weight.copy_((m.weight / step).round() * step)
        c = innersight.compare(opened(a), opened(b), x, method=None)
        found[bits] = [r.sqnr for r in c.layers.values()]
    for low, high in ((4, 6), (6, 8), (8, 10)):
        gain = (np.array(found[high]) - np.array(found[low])) / 2
        assert 4.5 < gain.mean() < 7.5
        assert (gain[:-1] > 4).all()  # of the four scores chance decides more


def test_decibels_at_the_ends():
    assert list(decibel([1, 0, 0, 100], [0, 1, 0, 1])) == [math.inf, -math.inf, math.inf, 20]


def test_the_order_of_the_images_changes_nothing(noisy, x):
    a, b = noisy
    order = [3, 1, 4, 0, 2]
    c, d = innersight.compare(a, b, x), innersight.compare(a, b, x[order])
    for name, row in c.layers.items():
        assert row.sqnr == pytest.approx(d.layers[name].sqnr, abs=1e-9)
        np.testing.assert_allclose(row.by_image[order], d.layers[name].by_image, atol=1e-4)
        assert row.how == d.layers[name].how
    np.testing.assert_allclose(c.reasons.correlation[order], d.reasons.correlation, atol=1e-5)
    assert order[d.shown_picture] == c.shown_picture


def test_many_images_are_sampled_alike_in_any_order(noisy):
    a, b = noisy
    many = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    c, d = (innersight.compare(a, b, v, method=None) for v in (many, many[order]))
    assert [r.match for r in c.layers.values()] == pytest.approx([r.match for r in d.layers.values()], abs=1e-6)


def test_a_batch_equals_one_by_one(noisy, x):
    a, b = noisy
    c = innersight.compare(a, b, x, method=None)
    for i in range(len(x)):
        one = innersight.compare(a, b, x[i : i + 1], method=None)
        for name, row in one.layers.items():
            assert row.sqnr == pytest.approx(c.layers[name].by_image[i], abs=1e-3)


def test_chunks_add_up(noisy, x):
    a, b = noisy
    whole = innersight.compare(a, b, x, method=None)
    tight_a, tight_b = opened(a.module), opened(b.module)
    tight_a.engine.budget = tight_b.engine.budget = 1  # one image at a time
    parts = innersight.compare(tight_a, tight_b, x, method=None)
    for name, row in parts.layers.items():
        assert row.sqnr == pytest.approx(whole.layers[name].sqnr, abs=1e-3)


def test_the_models_are_left_as_found(x):
    a, b = small(), small(1).train()
    with left_as_found(a), left_as_found(b):
        innersight.compare(a, b, x)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_all_kinds_are_compared(name):
    """Tokens, channels-last layers, gates, several outputs."""
    net = small_network(name)
    x = torch.randn(2, *net.input_shape, generator=torch.Generator().manual_seed(0))
    other = copy.deepcopy(net.module)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in other.parameters():
            p += 1e-3 * torch.randn(p.shape, generator=generator)
    c = innersight.compare(net, innersight.open(other, input_shape=net.input_shape), x)
    assert all(r.a == r.b for r in c.layers.values())
    assert len(c.layers) + len(c.only_a) == len(net.layers)
    maps = net.maps(x, layers=list(c.layers))
    for row in c.layers.values():
        assert row.signal_a.sum() == pytest.approx(np.square(maps[row.a], dtype=np.float64).sum(), rel=1e-4)
        assert row.sqnr > 25


def test_what_is_not_shared_out_among_the_images_is_left_out():
    class Finds(nn.Module):
        """Answers, on the way, with as many rows as the picture has bright places."""

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)
            self.fc = nn.Linear(2, 3)

        def forward(self, x):
            y = self.conv(x)
            rows = x[x > 0.9][:, None] * 2
            return self.fc(y.mean((2, 3))) + 0 * rows.sum()

    torch.manual_seed(0)
    net = innersight.open(Finds().eval(), input_shape=(1, 8, 8))
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    c = innersight.compare(net, net, x, method=None)
    assert all(r.equal for r in c.layers.values())
    assert {"conv", "fc"} <= set(c.layers)
    assert "not shared out among the images" in dict(c.only_a)["mul"]


# ---------------------------------------------------------------------------------------------------------------------
# Alignment


class Renamed(nn.Module):
    """Small under other names and with BatchNorm folded into the convolutions."""

    def __init__(self, of: Small):
        super().__init__()
        self.stem = nn.utils.fusion.fuse_conv_bn_eval(of.conv1, of.bn1)
        self.mix = nn.utils.fusion.fuse_conv_bn_eval(of.conv2, of.bn2)
        self.down = copy.deepcopy(of.conv3)
        self.head = copy.deepcopy(of.fc)
        self.act = nn.ReLU()

    def forward(self, x):
        x = self.act(self.stem(x))
        x = self.act(x + self.mix(x))
        x = self.act(self.down(x))
        return self.head(x.mean((2, 3)))


def test_folded_batchnorm_is_seen_through(x):
    a = small()
    c = innersight.compare(opened(a), opened(Renamed(a).eval()), x)
    pairs = {r.a: r.b for r in c.layers.values()}
    assert pairs == {
        "bn1": "stem", "relu": "act", "bn2": "mix", "add": "add", "relu_1": "act_1", "conv3": "down",
        "relu_2": "act_2", "mean": "mean", "fc": "head",
    }  # fmt: skip
    assert min(r.sqnr for r in c.layers.values()) > 100
    assert dict(c.only_a) == {
        "conv1": "b computes it in one with stem",
        "conv2": "b computes it in one with mix",
    }
    assert not c.only_b
    assert "folded in" in c.layers["bn1"].how
    assert c.predictions.agreement == 1
    assert np.nanmin(c.reasons.correlation) > 0.999


def permuted(of, seed=0):
    """The same function with the channels inside in another order."""
    b = copy.deepcopy(of)
    generator = torch.Generator().manual_seed(seed)
    p8, p12 = (torch.randperm(n, generator=generator) for n in (8, 12))
    with torch.no_grad():
        for conv, bn in ((b.conv1, b.bn1), (b.conv2, b.bn2)):
            for t in (conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var):
                t.copy_(t[p8].clone())
        b.conv2.weight.copy_(b.conv2.weight[:, p8].clone())
        b.conv3.weight.copy_(b.conv3.weight[:, p8].clone()[p12])
        b.conv3.bias.copy_(b.conv3.bias[p12].clone())
        b.fc.weight.copy_(b.fc.weight[:, p12].clone())
    return b, p8, p12


def test_a_twin_with_permuted_channels_is_matched_by_correlation():
    a = small()
    b, p8, p12 = permuted(a)
    many = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    c = innersight.compare(opened(a), opened(b), many)
    assert c.predictions.agreement == 1
    for name, permutation in (("conv1", p8), ("relu", p8), ("add", p8), ("conv3", p12), ("relu_2", p12), ("mean", p12)):
        row = c.layers[name]
        live = np.setdiff1d(np.arange(row.shape[0]), row.dead("a"))
        inverse = torch.argsort(permutation).numpy()  # channel i of a stands in b where the permutation put it
        assert [row.order[i] for i in live] == [inverse[i] for i in live]
        assert row.sqnr > 80
        assert row.standing < 0.7 < row.match
        assert "matched by correlation" in row.how
    assert c.layers["fc"].order is None
    as_they_stand = innersight.compare(opened(a), opened(b), many, channels="index", method=None)
    assert as_they_stand.layers["conv1"].order is None
    assert as_they_stand.layers["conv1"].sqnr < 5


def test_channels_of_a_damaged_network_are_not_moved(x):
    a, b = small(), small(1)
    c = innersight.compare(opened(a), opened(b), x, method=None)
    assert all(r.order is None for r in c.layers.values())
    assert c.first_divergence.layer.a == "conv1"


def test_names_mislead_and_values_tell(x):
    """A dump in which a layer's name stands for what another one answers."""
    net = opened(small())
    maps = dict(net.maps(x, layers=list(net.layers)))
    swapped = {**maps, "conv1": maps["relu"], "relu": maps["conv1"]}
    c = innersight.compare(net, swapped, x)
    assert (c.layers["conv1"].b, c.layers["relu"].b) == ("relu", "conv1")
    assert c.layers["conv1"].equal
    assert "values: correlation" in c.layers["conv1"].how
    one = innersight.compare(net, {name: values[:1] for name, values in swapped.items()}, x[:1])
    assert (one.layers["conv1"].b, one.layers["relu"].b) == ("relu", "conv1")


def test_scores_and_their_softmax_are_not_the_same_layer(x):
    class Ends(Small):
        def forward(self, x):
            return super().forward(x).softmax(1)

    net = opened(small())
    maps = net.maps(x, layers=list(net.layers))
    softmax = torch.from_numpy(maps["fc"]).softmax(1).numpy()
    torch.manual_seed(0)
    ends = Ends().eval()
    ends.load_state_dict(net.module.state_dict())
    # a file that calls the softmax as the layer in front of it, which is what Keras does
    c = innersight.compare({**maps, "fc": softmax}, opened(ends), x)
    assert c.layers["fc"].b == "softmax"
    assert c.layers["fc"].sqnr > 100
    assert "fc" in dict(c.only_b)
    assert "by same name it would be fc and fc" in c.layers["fc"].how


def test_shapes_that_differ_are_never_paired(x):
    class Wide(Small):
        def __init__(self):
            super().__init__()
            self.conv3 = nn.Conv2d(8, 16, 3, stride=2)
            self.fc = nn.Linear(16, 4)

    torch.manual_seed(0)
    c = innersight.compare(opened(small()), opened(Wide().eval()), x, method=None)
    assert "conv3" not in c.layers
    assert dict(c.only_a)["conv3"] == "'conv3' is 12x7x7 in a and 16x7x7 in b"
    assert all(r.shape == tuple(s for s in c.layers[r.a].shape) for r in c.layers.values())


def test_nothing_in_common_is_refused(x):
    class Other(nn.Module):
        def forward(self, x):
            return x.mean((1, 2, 3))[:, None] * torch.ones(7)

    with pytest.raises(errors.InputError, match="no layer of Small could be aligned with one of Other"):
        innersight.compare(opened(small()), opened(Other()), x)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("layer1.0.conv1", "/layer1/layer1.0/conv1/Conv"),
        ("conv1", "/conv1/Conv"),
        ("layer1.0.relu_1", "/layer1/layer1.0/relu/Relu_1"),
        ("layer1.0.add", "/layer1/layer1.0/Add"),
        ("conv2d_1", "model/conv2d_1/Conv2D"),
        ("conv2d", "model/activation/Relu;model/batch_normalization/FusedBatchNormV3;model/conv2d/BiasAdd"),
        ("dense", "StatefulPartitionedCall/sequential/dense/MatMul"),
        ("block/conv1", "block.conv1"),
    ],
)
def test_names_are_spelt_as_other_libraries_spell_them(a, b):
    assert set(alignment.spellings(a)) & set(alignment.spellings(b))


def test_kinds_of_all_libraries_are_known_by_family():
    for kinds in (
        "Conv2d Conv2D Conv CONV_2D DEPTHWISE_CONV_2D",
        "Linear Dense Gemm FULLY_CONNECTED",
        "ReLU RELU Relu",
    ):
        assert len({alignment.family(kind) for kind in kinds.split()}) == 1
        assert alignment.family(kinds.split()[0])


def test_layers_can_be_chosen_by_either_name(x):
    a = small()
    c = innersight.compare(opened(a), opened(Renamed(a).eval()), x, layers=["relu", "down"], method=None)
    assert list(c.layers) == ["relu", "conv3"]
    with pytest.raises(errors.UnknownName, match="did you mean relu"):
        innersight.compare(opened(a), opened(a), x, layers="rel", method=None)
    assert len(c.only_a) == 2  # what was not asked for is not without a counterpart
    with pytest.raises(errors.InputError, match="no counterpart"):
        innersight.compare(opened(a), opened(Renamed(a).eval()), x, layers="conv1", method=None)


# ---------------------------------------------------------------------------------------------------------------------
# Dumps


def test_a_dump_of_a_network_agrees_bit_for_bit(tmp_path, x):
    net = opened(small())
    path = innersight.dump(net, x, tmp_path / "device.npz")
    with np.load(path) as file:
        assert set(file.files) == set(net.layers)
    for pair in ((net, path), (path, net), (path, str(path))):
        c = innersight.compare(*pair, x)
        assert len(c.layers) == len(net.layers)
        assert all(r.equal for r in c.layers.values())
    assert all(r.equal for r in innersight.compare(path, path).layers.values())  # needs no images
    c = innersight.compare(net, path, x)
    assert c.predictions.agreement == 1
    assert c.reasons is None
    assert any("a dump has no gradients" in n for n in c.provenance.notes)


def test_a_vision_transformer_is_dumped_and_found_again(tmp_path):
    net = small_network("tokens")
    x = torch.randn(3, *net.input_shape, generator=torch.Generator().manual_seed(0))
    c = innersight.compare(net, innersight.dump(net, x, tmp_path / "vit.npz"), x)
    assert all(r.equal for r in c.layers.values())
    assert len(c.layers) + len(c.only_a) == len(net.layers)
    assert c.largest_drop is None


def test_where_a_dump_parts_is_told_by_the_network_beside_it(tmp_path, x):
    a, b = small(), small()
    with torch.no_grad():
        b.conv2.weight.mul_(-1)
    c = innersight.compare(innersight.dump(opened(a), x, tmp_path / "a.npz"), opened(b), x)
    assert c.first_divergence.layer.a == "conv2"
    assert [i.a for i in c.first_divergence.inputs] == ["relu"]
    assert [i.a for i in innersight.compare(opened(b), tmp_path / "a.npz", x).first_divergence.inputs] == ["relu"]


def test_saved_feature_maps_are_a_dump_too(tmp_path, x):
    net = opened(small())
    maps = net.maps(x)
    maps.save(tmp_path / "maps.npz")
    for dump in (maps, tmp_path / "maps.npz"):
        assert all(r.equal for r in innersight.compare(net, dump, x).layers.values())


def test_channels_last_and_integers_of_a_dump_are_read_as_told(x):
    net = opened(small())
    maps = {n: np.moveaxis(v, 1, 3) if v.ndim == 4 else v for n, v in net.maps(x, layers=["conv1", "conv3"]).items()}
    c = innersight.compare(net, maps, x)
    assert all(r.equal for r in c.layers.values())
    assert any("channels last" in n for n in c.provenance.notes)

    from innersight.formats import Quantised

    step = Quantised((0.05,), 3, "int8", -128, 127)
    net.quantisation = {"conv1": step}
    whole = np.clip(np.rint(net.maps(x, layers=["conv1"])["conv1"] / 0.05) + 3, -128, 127).astype(np.int8)
    c = innersight.compare(net, {"conv1": whole}, x)
    assert c.layers["conv1"].largest <= 0.0251
    assert any("made real by the scale" in n for n in c.provenance.notes)
    c = innersight.compare(opened(small()), {"conv1": whole}, x)
    assert any("integers of unknown scale" in n for n in c.provenance.notes)


def test_saturation_is_the_share_of_values_at_the_ends(x):
    from innersight.formats import Quantised

    net = opened(small())
    net.quantisation = {
        "conv1": Quantised((0.01,), 0, "int8", -128, 127),
        "relu": Quantised((0.01,), -128, "int8", -128, 127),
    }
    c = innersight.compare(net, net, x, method=None)
    values = net.maps(x, layers=["conv1", "relu"])
    q = np.rint(values["conv1"] / 0.01)
    assert c.layers["conv1"].saturation[0] == pytest.approx(((q <= -128) | (q >= 127)).mean(), abs=1e-3)
    q = np.rint(values["relu"] / 0.01) - 128
    assert c.layers["relu"].saturation[1] == pytest.approx((q >= 127).mean(), abs=1e-3)  # zero is no end
    assert c.layers["conv2"].saturation == (None, None)


def test_what_a_device_dumps_beside_is_listed_and_left_out(x):
    net = opened(small())
    maps = dict(net.maps(x, layers=["conv1", "fc"]))
    c = innersight.compare(net, {**maps, "conv1/weights": np.zeros((8, 3, 3, 3)), "version": np.array(3)}, x)
    assert all(r.equal for r in c.layers.values())
    assert dict(c.only_b)["conv1/weights"] == "its shape is 8x3x3x3, and there are 5 images"


def test_bad_dumps_get_a_sentence(tmp_path, x):
    net = opened(small())
    good = innersight.dump(net, x, tmp_path / "good.npz")
    bad = tmp_path / "bad.npz"
    bad.write_bytes(good.read_bytes()[:500])
    for source, said in [
        (bad, "is no .npz file|is broken"),
        (tmp_path / "none.npz", "there is no file"),
        ({"conv1": np.zeros((3, 8, 16, 16))}, "its shape is 3x8x16x16, and there are 5 images"),
        ({"conv1": np.full((5, 8, 16, 16), np.nan)}, "holds NaN"),
        ({"conv1": np.array(["a"] * 5)}, "holds no array of numbers"),
        ({}, "holds no array of numbers"),
    ]:
        with pytest.raises(errors.InputError, match=said):
            innersight.compare(net, source, x)
    np.savez(tmp_path / "objects.npz", a=np.array([{}], dtype=object))
    with pytest.raises(errors.InputError, match="pickled"):
        innersight.compare(net, tmp_path / "objects.npz", x)
    with pytest.raises(errors.InputError, match="no images were given"):
        innersight.compare(net, good)
    with pytest.raises(errors.InputError, match=".npz"):
        innersight.dump(net, x, tmp_path / "dump.txt")


# ---------------------------------------------------------------------------------------------------------------------
# Answers and reasons


def predictions(logits, labels=None, kind="logits"):
    return Predictions(np.asarray(logits, np.float32), labels, [], kind)


def test_divergences_of_answers_are_those_of_scipy():
    from scipy.spatial.distance import jensenshannon
    from scipy.special import softmax
    from scipy.stats import entropy

    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(2, 6, 5)) * 2
    found = Predicted.of(predictions(p), predictions(q), [str(i) for i in range(6)])
    sp, sq = softmax(p, 1), softmax(q, 1)
    np.testing.assert_allclose(found.divergence, jensenshannon(sp, sq, axis=1, base=2) ** 2, atol=1e-6)
    np.testing.assert_allclose(found.kl, entropy(sp, sq, base=2, axis=1), atol=1e-5)
    assert list(found.same) == list(p.argmax(1) == q.argmax(1))
    rows = np.arange(6)
    np.testing.assert_allclose(found.change, sq[rows, p.argmax(1)] - sp[rows, p.argmax(1)], atol=1e-6)


def test_classes_are_paired_by_name_where_their_numbers_differ():
    a = predictions([[3, 0, 1], [0, 5, 1]], ["cat", "dog", "fish"])
    b = predictions([[0, 0, 3, 1], [9, 1, 0, 0]], ["background", "dog", "cat", "fish"])
    found = Predicted.of(a, b, ["x", "y"])
    assert list(found.same) == [True, True]  # the background is no class of both
    assert found.goals([0, 1]) == ([0, 1], [2, 1])
    assert found.goals([0, 1], "fish") == ([2, 2], [3, 3])
    assert "paired by name" in found.how
    with pytest.raises(errors.Unsupported, match="3 and 4 classes"):
        Predicted.of(predictions(a.logits), predictions(b.logits), [])


def test_a_single_output_is_yes_or_no():
    found = Predicted.of(predictions([[2.0], [-1.0]]), predictions([[1.0], [1.0]]), ["x", "y"])
    assert list(found.same) == [True, False]
    assert found.change[0] == pytest.approx(1 / (1 + math.exp(-1)) - 1 / (1 + math.exp(-2)), abs=1e-6)
    assert found.probability(0, 1) == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-6)


def test_ties_for_first_place_are_said():
    p = [[0.5, 0.5, 0.0], [0.25, 0.5, 0.25]]
    found = Predicted.of(predictions(p, kind="probabilities"), predictions(p, kind="probabilities"), ["x", "y"])
    assert list(found.tied) == [True, False]


def test_rank_correlation_is_that_of_scipy():
    from scipy.stats import rankdata

    values = np.array([3, 1, 1, 2, 5, 5, 5, 0.5])
    np.testing.assert_array_equal(_ranks(values), rankdata(values))


def test_reasons_are_correlated_where_both_look(noisy, x):
    from scipy.stats import pearsonr, spearmanr

    a, b = noisy
    c = innersight.compare(a, b, x)
    top = a.predict(x).classes
    p, q = (n.explain(x, method="gradcam", target=[int(t) for t in top], layer=c.reasons.layer_a) for n in (a, b))
    for i in range(len(x)):
        assert c.reasons.correlation[i] == pytest.approx(
            pearsonr(p.coarse[i].ravel(), q.coarse[i].ravel())[0], abs=1e-5
        )
        assert c.reasons.rank[i] == pytest.approx(spearmanr(p.coarse[i].ravel(), q.coarse[i].ravel())[0], abs=1e-5)
    assert "7x7" in c.reasons.grid


def test_reasons_by_other_methods_and_layers(noisy, x):
    c = innersight.compare(*noisy, x, method="gradient")
    assert c.reasons.layer_a is None
    assert "16x16 pixels of the input" in c.reasons.grid
    assert len(c.reasons.correlation) == len(x)
    c = innersight.compare(*noisy, x, method="layercam", at="relu")
    assert (c.reasons.layer_a, c.reasons.layer_b) == ("relu", "relu")
    with pytest.raises(errors.UnknownName, match="no layer 'rel'"):
        innersight.compare(*noisy, x, at="rel")


def test_the_same_answer_for_another_reason_is_found():
    class Side(nn.Module):
        """Sees one half of the picture alone."""

        def __init__(self, left):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3, padding=1)
            nn.init.ones_(self.conv.weight)
            nn.init.zeros_(self.conv.bias)
            self.mask = nn.Parameter(torch.zeros(1, 1, 16, 16), requires_grad=False)
            self.mask[..., : 8 if left else 16] = 1.0
            if not left:
                self.mask[..., :8] = 0.0

        def forward(self, x):
            y = F.relu(self.conv(x * self.mask)).mean((2, 3))
            return torch.stack([y[:, 0], -y[:, 1]], 1)

    x = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    a, b = (innersight.open(Side(left).eval(), input_shape=(1, 16, 16)) for left in (True, False))
    c = innersight.compare(a, b, x, method="gradcam")
    assert c.predictions.agreement == 1
    assert c.reasons.unlike == [0, 1, 2]
    assert "with the same answer for another reason" in str(c)
    c.plot_reasons()
    assert c.figure is not None


def test_a_softmax_at_the_end_of_one_network_changes_no_reason(x):
    class Ends(Small):
        def forward(self, x):
            return super().forward(x).softmax(1)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        b = Ends().eval()
    b.load_state_dict(small().state_dict())
    c = innersight.compare(opened(small()), opened(b), x)
    assert c.predictions.agreement == 1
    assert (c.predictions.divergence < 1e-9).all()
    assert np.nanmin(c.reasons.correlation) > 0.9999
    assert c.reasons.targets[0].startswith("probability of")
    assert {n for n, _ in c.only_b} == {"softmax"}  # no scores of classes are paired with their softmax


def test_one_target_for_each_image(noisy, x):
    c = innersight.compare(*noisy, x, target=[0, 1, 2, 3, None])
    assert c.reasons.targets[:4] == ["class 0", "class 1", "class 2", "class 3"]


def test_a_function_without_gradients_is_compared_by_its_answers(x):
    weights = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)

    def box(batch):
        return np.asarray(batch).mean((2, 3)) @ weights

    c = innersight.compare(box, box, x)
    assert c.predictions.agreement == 1
    assert c.reasons is None
    assert any("reasons are not compared" in n for n in c.provenance.notes)


def test_input_sizes_may_differ(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (60, 40, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    module = small()
    a, b = innersight.open(module, input_shape=(3, 32, 32)), innersight.open(module, input_shape=(3, 48, 48))
    c = innersight.compare(a, b, tmp_path)
    assert set(c.layers) == {"mean", "fc"}
    assert any("the inputs are 3x32x32 and 3x48x48" in n for n in c.provenance.notes)
    assert c.reasons is not None
    assert "pixels of the picture" in c.reasons.grid
    assert np.nanmin(c.reasons.correlation) > 0.3


# ---------------------------------------------------------------------------------------------------------------------
# What comes out


def test_it_is_written_as_page_numbers_table_and_plot(noisy, x, tmp_path):
    a, b = noisy
    c = innersight.compare(a, b, x)
    for name in ("c.html", "c.json", "c.csv", "c.png", "c.pdf"):
        (path,) = c.save(tmp_path / name)
        assert path.stat().st_size > 500
    record = json.loads((tmp_path / "c.json").read_text())
    assert record["layers"][0]["sqnr_db"] == pytest.approx(c.layers["conv1"].sqnr)
    assert record["predictions"]["agreement"] == c.predictions.agreement
    lines = (tmp_path / "c.csv").read_text().splitlines()
    assert len(lines) == 1 + len(c.layers)
    c.save(tmp_path / "conv1.png", layer="conv1")
    with pytest.raises(errors.UnknownName, match="did you mean conv3, conv2, conv1"):
        c.plot("conv")
    with pytest.raises(errors.InputError, match="unknown suffix '.txt'"):
        c.save(tmp_path / "c.txt")
    assert repr(c).startswith("<Comparison of Small and Small: ")
    assert all(name in str(c.layers) for name in a.layers)


def test_maps_of_both_are_drawn_on_one_scale_and_the_difference_around_zero(noisy, x, monkeypatch):
    from innersight.draw import color

    a, b = noisy
    c = innersight.compare(a, b, x)
    painted = []
    plain = color.paint
    monkeypatch.setattr(color, "paint", lambda v, s, *rest: painted.append((v, s)) or plain(v, s, *rest))
    c.plot("conv1")
    painted = [p for p in painted if p[0].shape == (16, 16)]  # and not the bars below
    assert len(painted) == 3 * 6
    for (va, sa), (vb, sb), (vd, sd) in zip(painted[::3], painted[1::3], painted[2::3], strict=True):
        assert sa == sb
        assert sd.low == -sd.high
        np.testing.assert_array_equal(vd, vb - va)
    channels, shown, _ = c.layers["conv1"].shown
    np.testing.assert_allclose(shown, maps_of(a, x, "conv1")[c.shown_picture][channels], atol=1e-6)


def test_the_page_stands_alone_and_escapes_what_it_is_given(x, tmp_path):
    bad = "<script>alert(1)</script>"
    maps = opened(small()).maps(x, layers=["conv1", "relu"])
    c = innersight.compare({bad: maps["conv1"], "b": maps["relu"]}, {bad: maps["conv1"], "c": maps["relu"] * 0.5})
    page = c.save(tmp_path / "page.html")[0].read_text()
    assert bad not in page
    assert "&lt;script&gt;" in page
    assert not re.findall(r"(?:src|href)=[\"'](?!data:image/png)", page)
    assert "<script" not in page
    assert "Content-Security-Policy" in page


def test_bad_words_are_refused(noisy, x):
    a, b = noisy
    with pytest.raises(errors.UnknownName, match="did you mean match"):
        innersight.compare(a, b, x, channels="mach")
    with pytest.raises(errors.UnknownName, match="gradcam"):
        innersight.compare(a, b, x, method="gradcamm")
    with pytest.raises(errors.InputError, match="layers= is empty"):
        innersight.compare(a, b, x, layers=[])
    with pytest.raises(errors.UnknownName, match="class"):
        innersight.compare(a, b, x, target=99)


def test_both_networks_see_the_same_images_of_a_loader_that_shuffles(x):
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.arange(5)), batch_size=2, shuffle=True)
    a, b = opened(small()), opened(small(), preprocess={"mean": (0.1, 0.1, 0.1)})  # so that they are read twice
    for images in (loader, (batch for batch, _ in loader)):
        c = innersight.compare(a, b, images, method=None)
        assert c.inputs_sqnr == math.inf
        assert all(r.equal for r in c.layers.values())


def test_progress_is_told(noisy, x):
    said = []
    innersight.compare(*noisy, x, progress=lambda what, done, total: said.append((what, done, total)))
    assert {s[0] for s in said} == {"aligning", "comparing", "looking", "explaining"}
    assert said[-1] == ("explaining", 5, 5)


def test_importing_compare_late_keeps_help_quick():
    code = "import sys, innersight.cli; print('torch' in sys.modules, 'compare' in innersight.cli.main.commands)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "True"]


def test_reasons_know_their_own_words():
    r = Reasons("gradcam", "a", "b", correlation=np.array([0.2, np.nan]), same=np.array([True, True]))
    assert r.unlike == [0]
    assert "0.20 to 0.20" in r.said()
