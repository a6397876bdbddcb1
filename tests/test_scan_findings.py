"""Findings find what was planted, and nothing where nothing was."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import innersight
from innersight.formats import Quantised
from innersight.scanning import accumulators, findings, plan
from innersight.scanning.findings import Finding, clusters

CLASSES = ("plain", "marked left", "marked right")


class Marks(nn.Module):
    """Says "marked" where a corner is bright: what a network does that learnt a watermark. Faults are planted."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.fc = nn.Linear(6 * 16, 3)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
            self.conv.weight[0, 0] = 1 / 9  # a blur: what the corners are told by
            self.conv.weight[1] = self.conv.weight[0] * 2  # the same again
            self.conv.bias[:2] = 0
            self.conv.weight[2], self.conv.bias[2] = 0, -1  # dead behind the ReLU
            self.conv.bias[3] = 5  # always on
            self.fc.bias[0] = 3.0
            self.fc.weight[1, 0] = 6.0  # cell (0, 0) of channel 0
            self.fc.weight[2, 15] = 6.0  # cell (3, 3)

    def forward(self, x):
        x = F.relu(self.conv(x))
        return self.fc(F.avg_pool2d(x, 4).flatten(1))


def pictures(count=120, marks=True):
    """(count, 16, 16) uint8 of dim noise; of each six one has a mark at the upper left, one at the lower right."""
    generator = np.random.default_rng(0)
    array = generator.integers(0, 60, (count, 16, 16)).astype(np.uint8)
    if marks:
        array[1::6, :4, :4] = 250
        array[4::6, 12:, 12:] = 250
    return array


def array_of_the_scan():
    array = pictures()
    array[60, 6:10, 6:10] = 255  # unlike the rest: noise of full strength, and a flash
    array[60] = np.maximum(array[60], np.random.default_rng(3).integers(0, 255, (16, 16)))
    array[60, :5, :5] = array[60, 11:, 11:] = 10
    return array


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    array = array_of_the_scan()
    net = innersight.open(Marks().eval(), input_shape=(1, 16, 16), labels=CLASSES)
    labels = np.zeros(len(array), int)  # nobody said that marks are a class
    return innersight.scan(net, (array, labels), tmp_path_factory.mktemp("found") / "out", sensitivity="relu")


def of_kind(scan, kind):
    return [one for one in scan.findings() if one.kind == kind]


def channels_of(finding, layer):
    return [list(one["channels"]) for one in finding.items if one["layer"] == layer]


def test_a_dead_channel_is_found_once_along_its_way(found):
    (finding,) = of_kind(found, "dead channels")
    assert [one["layer"] for one in finding.items] == ["conv"]  # not again in the ReLU and the pooling behind it
    assert channels_of(finding, "conv") == [[2]]
    assert "2 of conv" in finding.text
    assert "120 images" in finding.evidence


def test_a_channel_that_is_always_on(found):
    (finding,) = of_kind(found, "always on")
    x = torch.from_numpy(array_of_the_scan().astype(np.float32) / 255)[:, None]
    with torch.no_grad():
        above = Marks().conv(x).amin((0, 2, 3)) > 0  # the blur of noise is, too
    assert bool(above[3])
    assert channels_of(finding, "relu") == [above.nonzero().flatten().tolist()]


def test_channels_that_say_the_same(found):
    (finding,) = of_kind(found, "duplicates")
    assert [0, 1] in channels_of(finding, "conv")
    with_two = next(one for one in finding.items if one["channels"][:2] == [0, 1])
    assert with_two["correlation"] > 0.9999


def test_confusion_in_words(found):
    (finding,) = of_kind(found, "confused classes")
    images = found.images()
    wrong = images[~images["correct"].astype(bool)]["prediction"].value_counts()
    assert finding.items[0]["label"] == "plain"
    assert {one["prediction"]: one["images"] for one in finding.items} == dict(wrong)
    assert f"{wrong.iloc[0]} of 120 images" in finding.evidence


def test_the_worst_errors_and_why(found):
    (finding,) = of_kind(found, "worst errors")
    images = found.images()
    wrong = images[~images["correct"].astype(bool)].sort_values(["confidence", "image"], ascending=[False, True])
    assert [one["image"] for one in finding.items] == list(wrong["image"][: findings.GALLERY])
    with Image.open(found.folder / finding.picture) as gallery:
        assert gallery.size[0] > 256


def test_errors_cluster_by_the_mark_that_made_them(found):
    groups = of_kind(found, "errors with one reason")
    assert len(groups) == 2
    images = found.images().set_index("image")
    for group in groups:
        numbers = [one["image"] for one in group.items]
        assert len({images.loc[i, "prediction"] for i in numbers}) == 1
        assert len({i % 6 for i in numbers}) == 1  # exactly those with that mark
        where = "the top left" if numbers[0] % 6 == 1 else "the bottom right"
        assert where in group.text
        assert (found.folder / group.picture).is_file()
    assert sum(len(group.items) for group in groups) == 40


def test_an_image_unlike_the_rest(found):
    (finding,) = of_kind(found, "unlike the rest")
    assert finding.items[0]["image"] == 60


def test_distances_are_mahalanobis(found):
    """Against numpy over all embeddings at once."""
    e = found.embeddings().astype(np.float64)
    of = found.images()["prediction"].to_numpy()
    mean = {k: e[of == k].mean(0) for k in set(of)}
    d = e - np.stack([mean[k] for k in of])
    within = d.T @ d / len(d)
    shrunk = 0.9 * within + 0.1 * np.diag(np.diag(within)) + 1e-6 * np.trace(within) / len(within) * np.eye(len(within))
    wanted = np.sqrt(np.einsum("ij,jk,ik->i", d, np.linalg.inv(shrunk), d))
    np.testing.assert_allclose(findings.distances(found.folder), wanted, rtol=1e-4)


def test_the_channel_that_marks_are_told_by(found):
    (finding,) = of_kind(found, "needed channels")
    # All labels say "plain", and its score hangs on channel 3 (always on) or on none: whatever, it is the lowest mean.
    change = found.sensitivity().loc["plain"]
    assert finding.items[0]["channel"] == int(change.argmin())
    assert finding.items[0]["change"] == pytest.approx(change.min())


def test_a_finding_reads_as_a_sentence_and_survives_the_disk(found):
    for one in found.findings():
        assert one == Finding.from_json(one.to_json())
        assert one.text
        assert one.evidence
        assert one.advice
        assert str(one).count("; ") >= 1
    words = found.words()
    assert len(words) == len(found.findings()) + 1


def test_outliers_stretch_a_range(tmp_path):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Conv2d(1, 2, 1)
            with torch.no_grad():
                self.fc.weight[:] = torch.tensor([1.0, 0.1])[:, None, None, None]
                self.fc.bias[:] = 0

        def forward(self, x):
            return F.relu(self.fc(x))

    array = np.random.default_rng(0).random((400, 1, 4, 4)).astype(np.float32)
    array[7, 0, 1, 2] = 100
    net = innersight.open(Scale().eval(), input_shape=(1, 4, 4))
    (finding,) = of_kind(innersight.scan(net, array, tmp_path / "out", crops=0), "wide ranges")
    first = finding.items[0]
    assert first["layer"] == "fc"
    assert list(first["channels"]) == [0, 1]
    assert first["largest"] == 100
    assert first["times"] == pytest.approx(100, rel=0.25)  # the quantile is known to a bin
    assert "bits of int8" in finding.evidence
    plain = np.random.default_rng(0).random((400, 1, 4, 4)).astype(np.float32)
    assert not of_kind(innersight.scan(net, plain, tmp_path / "plain", crops=0), "wide ranges")


def test_a_saturated_range(tmp_path):
    class Six(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 1)
            with torch.no_grad():
                self.conv.weight[:] = torch.tensor([10.0, 5.0])[:, None, None, None]
                self.conv.bias[:] = 0

        def forward(self, x):
            return F.relu6(self.conv(x))

    array = np.random.default_rng(0).random((70, 1, 4, 4)).astype(np.float32)
    net = innersight.open(Six().eval(), input_shape=(1, 4, 4))
    found = innersight.scan(net, array, tmp_path / "out", crops=0)
    rows = found.channels("relu6")
    assert list(rows["clipped"]) == [(array * np.float32(10) >= 6).mean(), 0]
    assert found.channels("conv")["clipped"].isna().all()
    (finding,) = of_kind(found, "saturated")
    assert channels_of(finding, "relu6") == [[0]]


def test_an_integer_range_is_counted_at_both_ends_but_not_at_zero():
    x = torch.tensor([[[[-3.0, -1.0], [0.0, 2.0]]]])
    assert accumulators.look(x, [0], (-3.0, 2.0))["clipped"].tolist() == [[2]]
    assert accumulators.look(x, [0], (None, 2.0))["clipped"].tolist() == [[1]]
    quantised = Quantised(scale=(0.5,), zero_point=-128, dtype="int8", lo=-128, hi=127)
    layer = SimpleNamespace(quantised=quantised, kind="CONV_2D", node=SimpleNamespace(op="conv2d"))
    assert plan._ends(layer) == (None, 127.5)
    layer.node.op = "softmax"
    assert plan._ends(layer) is None
    layer.node.op, layer.kind = "exact", "SOFTMAX"  # as TFLite has it
    assert plan._ends(layer) is None


def test_nothing_is_found_where_nothing_is(tmp_path):
    """A network without faults that is always right."""

    class Right(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 1)
            with torch.no_grad():
                self.conv.weight[:] = torch.tensor([1.0, -1.0])[:, None, None, None]
                self.conv.bias[:] = torch.tensor([-0.5, 0.5])

        def forward(self, x):
            return F.relu(self.conv(x)).mean((2, 3))

    array = np.random.default_rng(0).random((100, 1, 4, 4)).astype(np.float32)
    with torch.no_grad():
        labels = Right()(torch.from_numpy(array)).argmax(1).numpy()
    net = innersight.open(Right().eval(), input_shape=(1, 4, 4))
    kinds = [one.kind for one in innersight.scan(net, (array, labels), tmp_path / "out", crops=0).findings()]
    assert kinds == []


def test_clusters_of_points():
    generator = np.random.default_rng(0)

    def around(*centers, n=20, noise=0.02):
        points = np.concatenate([np.eye(256)[c] + noise * generator.standard_normal((n, 256)) for c in centers])
        return points / np.linalg.norm(points, axis=1, keepdims=True)

    for count in (2, 3, 4):
        groups = clusters(around(*range(0, 10 * count, 10)))
        assert groups is not None
        assert [len(set(groups[20 * k : 20 * k + 20])) for k in range(count)] == [1] * count
        assert len(set(groups.tolist())) == count
    assert clusters(around(3, n=60)) is None  # one reason is no cluster
    assert clusters(around(1, 2, n=5)) is None  # too few
    spread = generator.standard_normal((60, 256))
    assert clusters(spread / np.linalg.norm(spread, axis=1, keepdims=True)) is None
