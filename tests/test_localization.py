"""Boxes and masks of maps: where the region is on the picture as people see it, and nothing where nothing speaks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from scipy import ndimage

import innersight
from innersight import errors, images, localize
from innersight.cli import main
from innersight.data.small_cnn import SimpleCNN, draw_weights, save_weights
from innersight.draw import color
from innersight.images import Picture
from innersight.preprocess import Preprocess
from innersight.results import Provenance, Saliency, load, plot_comparison

RNG = np.random.default_rng(0)
CORNERS_TOUCH = np.ones((3, 3))


def plain(values: np.ndarray, **more) -> Saliency:
    """A map on a picture of its own size."""
    h, w = values.shape
    picture = Picture("it.png", Image.new("RGB", (w, h), "gray"), (1.0, 1.0, 0.0, 0.0), (h, w))
    values = values.astype(np.float32)[None]
    return Saliency(values, [picture], bool((values < 0).any()), Provenance(method="gradcam"), **more)


def labelled(where: np.ndarray) -> tuple[np.ndarray, int]:
    runs = localize.Runs.of(where)
    labels = np.zeros(where.shape, int)
    for row, start, stop, region in zip(runs.row, runs.start, runs.stop, runs.region, strict=True):
        labels[row, start:stop] = region + 1
    return labels, runs.count


# -- connected regions


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 1), (20, 33), (90, 60)])
@pytest.mark.parametrize("density", [0, 0.1, 0.3, 0.45, 0.6, 0.9, 1])
def test_regions_are_those_of_scipy(size, density):
    where = RNG.random(size) < density
    expected, count = ndimage.label(where, CORNERS_TOUCH)
    found, found_count = labelled(where)
    assert found_count == count
    assert np.array_equal(found, expected)  # the numbering, too: by the first pixel


@pytest.mark.parametrize("turned", [False, True])
def test_long_winding_regions_are_one(turned):
    where = np.zeros((101, 101), bool)
    where[::2] = True
    where[1::4, -1] = where[3::4, 0] = True  # a snake
    where = where.T if turned else where
    assert labelled(where)[1] == ndimage.label(where)[1] == 1
    where[50, 50] = where[49 if turned else 50, 50] = False
    assert labelled(where)[1] == ndimage.label(where, CORNERS_TOUCH)[1]


def test_boxes_and_what_they_hold_are_those_of_scipy():
    values = color.smooth(RNG.normal(size=(60, 80)), 2)
    (found,) = plain(values).boxes(0.3)
    where = values >= 0.3 * values.max()
    labels, count = ndimage.label(where, CORNERS_TOUCH)
    assert count > 3
    positive = np.maximum(values, 0).astype(np.float64)
    expected = []
    for i, (rows, columns) in enumerate(ndimage.find_objects(labels)):
        held = positive[labels == i + 1].sum() / positive.sum()
        expected.append((columns.start, rows.start, columns.stop, rows.stop, held))
    area = np.bincount(labels.reshape(-1))[1:]
    assert {b[:4] for b in found} == {e[:4] for e in expected}
    by_box = {e[:4]: (e[4], a) for e, a in zip(expected, area, strict=True)}
    assert [b.score for b in found] == pytest.approx([by_box[b[:4]][0] for b in found], rel=1e-6)
    areas = [by_box[b[:4]][1] for b in found]
    assert areas == sorted(areas, reverse=True)


# -- thresholds


def test_a_map_worked_by_hand():
    values = np.zeros((6, 8))
    values[1, 1:4] = 10, 2, 1.9  # the last is below a fifth of the maximum
    values[4:6, 5:8] = 4
    values[0, 7] = -50  # against the target: no evidence for it
    (found,) = plain(values).boxes()
    whole = 10 + 2 + 1.9 + 6 * 4
    assert [b[:4] for b in found] == [(5, 4, 8, 6), (1, 1, 3, 2)]  # the larger one first, though its values are lower
    assert [b.score for b in found] == pytest.approx([24 / whole, 12 / whole])
    assert plain(values).boxes(limit=1) == [found[:1]]
    assert [b[:4] for b in plain(values).boxes(0.15)[0]] == [(5, 4, 8, 6), (1, 1, 4, 2)]
    assert [b[:4] for b in plain(values).boxes(1.0)[0]] == [(1, 1, 2, 2)]
    (where,) = plain(values).mask()
    assert where.sum() == 8
    assert where[1, 1:3].all()
    assert where[4:6, 5:8].all()


def test_energy_is_the_fewest_pixels_that_hold_the_share():
    values = color.smooth(RNG.normal(size=(30, 30)), 1)
    positive = np.maximum(values, 0).astype(np.float64)
    for share in (0.1, 0.5, 0.9, 1.0):
        (where,) = plain(values).mask(share, "energy")
        held = positive[where]
        assert held.sum() >= share * positive.sum() * (1 - 1e-9)
        assert share == 1 or held.sum() - held.min() < share * positive.sum()  # without its least pixel it is less
        assert held.min() >= positive[~where].max(initial=0)
    assert np.array_equal(plain(values).mask(1.0, "energy")[0], positive > 0)


def test_percentile_is_over_what_was_seen():
    values = RNG.permutation(np.arange(1.0, 401)).reshape(20, 20)
    assert plain(values).mask(method="percentile")[0].sum() == 20  # the five percent above the 95th
    picture = Picture("wide", Image.new("L", (40, 20)), (1.0, 1.0, -10.0, 0.0), (20, 20))  # half of it was seen
    seen = Saliency(values.astype(np.float32)[None], [picture], False)
    (where,) = seen.mask(90, "percentile")
    assert where.sum() == 40
    assert not where[:, :10].any()
    assert not where[:, 30:].any()


@pytest.mark.parametrize("method", localize.THRESHOLDS)
@pytest.mark.parametrize(
    "values",
    [np.zeros((5, 7)), np.full((5, 7), 3.0), np.full((5, 7), -1.0), -np.arange(35.0).reshape(5, 7), np.eye(5, 7) / 1e9],
    ids=["zero", "constant", "negative", "only against", "negligible"],
)  # fmt: skip
def test_a_map_that_says_nothing_has_no_box(values, method):
    s = plain(values)
    assert s.boxes(method=method) == [[]]
    (where,) = s.mask(method=method)
    assert where.shape == (5, 7)
    assert where.dtype == bool
    assert not where.any()
    s.plot(boxes=True)


def test_what_counts_as_nothing_is_beside_the_maps_own_reference():
    values = np.zeros((4, 4))
    values[1, 2] = 1e-9
    assert plain(values, verdict={"reference": 1e-9}).boxes() == [[localize.Box(2, 1, 3, 2, 1.0)]]


def test_thresholds_that_cannot_be_are_refused():
    s = plain(np.eye(4))
    with pytest.raises(errors.UnknownName, match="no method 'maxx' of thresholds; did you mean max?"):
        s.boxes(method="maxx")
    with pytest.raises(errors.InputError, match=r"threshold=20: for method 'max' a number from 0 to 1"):
        s.mask(20)
    with pytest.raises(errors.InputError, match="limit=0: at least one box"):
        s.boxes(limit=0)


# -- on the picture


RECTANGLE = (60, 20, 130, 70)  # left, top, right, bottom on the picture as people see it, 200 x 90


def photograph(folder: Path, turned: int = 1) -> Path:
    """A bright rectangle on black, 200 x 90 as people see it, stored lying on its side where EXIF says so."""
    image = Image.new("RGB", (200, 90))
    image.paste((255, 255, 255), RECTANGLE)
    stored = {1: None, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270, 3: Image.Transpose.ROTATE_180}
    if stored[turned] is not None:
        image = image.transpose(stored[turned])
    exif = Image.Exif()
    exif[0x0112] = turned
    path = folder / f"turned{turned}.png"
    image.save(path, exif=exif)
    return path


@pytest.mark.parametrize("turned", [1, 3, 6, 8])
@pytest.mark.parametrize(
    "preprocess",
    [
        Preprocess((64, 96), resize="squash"),
        Preprocess((64, 64), resize="letterbox", fill=(255,)),
        Preprocess((64, 64), resize_to=(64, 143), resize="crop"),
        Preprocess((90, 90), resize_to=90),
        Preprocess((45, 45), resize="keep", resize_to=45),
    ],
    ids=["squash", "letterbox", "crop", "crop at its size", "keep"],
)
def test_boxes_land_on_the_picture_as_people_see_it(preprocess, turned, tmp_path):
    inputs = images.read(photograph(tmp_path, turned), preprocess)
    values = inputs.tensor.mean(1).numpy()  # the map is the brightness the network saw
    if preprocess.resize == "letterbox":  # the fill is no part of the picture, however bright
        assert values.max() == values[0, 0].max() == 1
    s = Saliency(values, inputs.pictures, False)
    ((box, *rest),) = s.boxes(0.5)
    assert not rest
    left, top, right, bottom = RECTANGLE
    sx, sy, tx, _ = inputs.pictures[0].to_input
    if tx < 0:  # cut left and right: the box ends where the network stopped looking
        left, right = max(left, round(-tx / sx)), min(right, round((inputs.tensor.shape[3] - tx) / sx))
    cell = max(1 / sx, 1 / sy)  # a pixel of the input, on the picture
    assert np.abs(np.subtract(box[:4], (left, top, right, bottom))).max() <= cell
    assert box.score > 0.9
    (where,) = s.mask(0.5)
    assert where.shape == (90, 200)
    expected = np.zeros((90, 200), bool)
    expected[top:bottom, left:right] = True
    assert (where & expected).sum() / (where | expected).sum() > 0.9


def test_no_box_reaches_where_the_network_did_not_look(tmp_path):
    inputs = images.read(photograph(tmp_path), Preprocess((90, 90), resize_to=90))  # columns 55 to 145
    bright = Saliency(np.linspace(1, 2, 8100, dtype=np.float32).reshape(1, 90, 90), inputs.pictures, False)
    ((box,),) = bright.boxes()
    assert box == localize.Box(55, 0, 145, 90, 1.0)


def test_boxes_of_several_pictures_of_different_sizes_and_smoothing():
    values = np.zeros((2, 20, 20), np.float32)
    values[0, 5, 5:9:2] = values[1, 10, 10] = 1
    pictures = [
        Picture("a", Image.new("L", (40, 20)), (0.5, 1.0, 0.0, 0.0), (20, 20)),
        Picture("b", Image.new("L", (20, 60)), (1.0, 1 / 3, 0.0, 0.0), (20, 20)),
    ]
    s = Saliency(values, pictures, False)
    first, second = s.boxes(0.6)
    assert [b[:4] for b in first] == [(10, 5, 12, 6), (14, 5, 16, 6)]
    assert [b[:4] for b in second] == [(10, 30, 11, 33)]
    (merged,) = s[0].boxes(0.4, smooth=1)
    assert len(merged) == 1
    assert [m.shape for m in s.mask()] == [(20, 40), (60, 20)]


def test_boxes_are_the_same_after_loading(tmp_path):
    s = plain(color.smooth(RNG.normal(size=(30, 40)), 2))
    s.save(tmp_path / "s.npz")
    assert load(tmp_path / "s.npz").boxes() == s.boxes()


# -- drawn


def rectangles(axes) -> list[tuple[float, ...]]:
    """(left, top, right, bottom) of what is drawn, in shares of the picture."""
    height, width = axes.images[0].get_array().shape[:2]
    found = []
    for p in axes.patches:
        left, top = (p.get_x() + 0.5) / width, (p.get_y() + 0.5) / height
        found.append((left, top, left + p.get_width() / width, top + p.get_height() / height))
    return list(dict.fromkeys(found))


def test_the_largest_box_is_drawn_on_the_overlay():
    values = np.zeros((50, 100))
    values[10:30, 20:60] = 1
    values[40:45, 80:90] = 0.9
    s = plain(values)
    drawn = [r for ax in s.plot(boxes=True).figure.axes if ax.images for r in rectangles(ax)]
    assert np.allclose(drawn, [(0.2, 0.2, 0.6, 0.6)])
    drawn = [r for ax in s.plot(boxes=2).figure.axes if ax.images for r in rectangles(ax)]
    assert np.allclose(drawn, [(0.2, 0.2, 0.6, 0.6), (0.8, 0.8, 0.9, 0.9)])
    assert not any(ax.patches for ax in s.plot().figure.axes if ax.images)
    both = plot_comparison({"a": s, "b": s}, boxes=1)
    assert sum(len(rectangles(ax)) for ax in both.axes if ax.images) == 2


def test_a_box_on_a_large_photograph_is_drawn_at_its_place():
    picture = Picture("large", Image.new("RGB", (2000, 1000)), (0.05, 0.05, 0.0, 0.0), (50, 100))
    values = np.zeros((1, 50, 100), np.float32)
    values[0, 10:30, 20:60] = 1
    s = Saliency(values, [picture], False)
    ((box,),) = s.boxes(0.5)
    assert np.abs(np.subtract(box[:4], (400, 200, 1200, 600))).max() <= 10
    (drawn,) = [r for ax in s.plot(boxes=1).figure.axes if ax.images for r in rectangles(ax)]
    ((at_a_fifth,),) = s.boxes(limit=1)
    assert np.allclose(np.multiply(drawn, (2000, 1000) * 2), at_a_fifth[:4])


def test_the_command_line_prints_and_draws_boxes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = SimpleCNN()
    draw_weights(model, torch.Generator().manual_seed(0))
    save_weights(model, "w.safetensors", data="none", accuracy=0.0, seed=0)
    Image.fromarray(RNG.integers(0, 255, (30, 44), dtype=np.uint8)).save("a.png")
    command = (
        "explain w.safetensors --arch innersight.data.small_cnn:SimpleCNN --input-shape 1,28,28 a.png --boxes".split()
    )
    result = CliRunner().invoke(main, [*command, "--method", "gradcam", "--layer", "conv2", "--smooth", "1"])
    assert result.exit_code == 0, result.output
    net = innersight.open("w.safetensors", arch="innersight.data.small_cnn:SimpleCNN", input_shape=(1, 28, 28))
    s = net.explain("a.png", method="gradcam", layer="conv2")
    expected = s.boxes(smooth=1)[0]
    assert expected
    (row,) = [cells for line in result.stdout.splitlines() if (cells := line.split())[:2] == ["a.png", "gradcam"]]
    assert row[2:] == [*map(str, expected[0][:4]), f"{expected[0].score:.2f}"]
    assert Path("heat.png").stat().st_size > 5000
    result = CliRunner().invoke(main, [*command, "--method", "gradcam,gradient", "--layer", "conv2", "--json"])
    record = json.loads(result.stdout)["boxes"]
    assert list(record) == ["gradcam", "gradient"]
    (picture,) = record["gradcam"]
    assert picture["name"] == "a.png"
    assert [tuple(b.values()) for b in picture["boxes"]] == [pytest.approx(b) for b in s.boxes(limit=16)[0]]
    assert len(record["gradient"][0]["boxes"]) <= 16


# -- on real data


def test_grad_cam_finds_the_dog(shared_data):
    weights = shared_data("torch", "squeezenet1_1_imagenet.pth")
    photo = shared_data("boxes", "coral_seg", "dog_segmentation.bmp")
    # a trimap as in Oxford's pets: 0 the dog, 1 what is around, 2 the border between them
    trimap = np.asarray(Image.open(shared_data("boxes", "coral_seg", "dog_segmentation_mask.bmp")))
    y, x = np.nonzero(trimap == 0)
    truth = x.min(), y.min(), x.max() + 1, y.max() + 1
    net = innersight.open("torchvision:squeezenet1_1", weights=str(weights))
    s = net.explain(photo, method="gradcam")
    ((box, *_),) = s.boxes()
    assert overlap(box[:4], truth) > 0.5
    (where,) = s.mask()
    inside = where & (trimap != 1)
    assert inside.sum() / where.sum() > 0.9  # the map is on the dog, which covers 59% of the picture


def overlap(a, b) -> float:
    """Intersection over union of two boxes."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / sum(((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)), -shared)
