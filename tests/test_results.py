"""Results keep their values, say in a line what they are, and come back from disk as they went."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image

from innersight import errors, results
from innersight.draw import color, plots
from innersight.images import Picture
from innersight.results import FeatureMaps, Predictions, Provenance, Saliency, Sensitivity, load

RNG = np.random.default_rng(0)
PROVENANCE = Provenance(
    network="SimpleCNN", method="gradient", layer="conv1", target="7", options={"n": 3}, seed=5,
    notes=("input 8x8: from the first layer; change with input_shape=",), versions={"innersight": "0.1.0"},
)  # fmt: skip


def picture(name: str = "seven.png", size: tuple[int, int] = (20, 30), seen: tuple[int, int] = (8, 8)) -> Picture:
    """A landscape photo of which the network saw a square from the middle."""
    h, w = size
    original = Image.fromarray(RNG.integers(0, 256, (h, w, 3), dtype=np.uint8))
    scale = seen[0] / h
    return Picture(name, original, (scale, scale, 0.0, -scale * (w - h) / 2 if w > h else 0.0), seen, label="seven")


def landscape(name: str = "seven.png") -> Picture:
    """20 x 30 pixels, the middle 20 x 20 of them seen as 8 x 8: columns 5 to 24."""
    original = Image.fromarray(RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    return Picture(name, original, (0.4, 0.4, -2.0, 0.0), (8, 8), label="seven")


def maps(n: int = 1) -> FeatureMaps:
    values = {
        "conv1": RNG.normal(size=(n, 6, 8, 8)).astype(np.float32),
        "layer1.0/relu:0": np.maximum(RNG.normal(size=(n, 4, 4, 4)), 0).astype(np.float32),
        "fc": RNG.normal(size=(n, 10)).astype(np.float32),
    }
    pictures = [landscape(f"{i}.png") for i in range(n)]
    return FeatureMaps(values, pictures, {"conv1": {"kind": "Conv2d"}}, PROVENANCE)


def saliency(n: int = 2, signed: bool = True) -> Saliency:
    values = RNG.normal(size=(n, 8, 8)).astype(np.float32)
    return Saliency(
        values if signed else np.abs(values), [landscape(f"{i}.png") for i in range(n)], signed, PROVENANCE,
        targets=["7"] * n, verdict={"score": [1.5] * n}, unit="logit",
    )  # fmt: skip


def predictions() -> Predictions:
    logits = np.array([[0.0, np.log(3.0), -50], [1000, 0, 0]], np.float32)
    return Predictions(
        logits, ["cat", "dog <b>", "eel"], [landscape("a.png"), landscape("b.png")], provenance=PROVENANCE
    )


def sensitivity() -> Sensitivity:
    values = np.array([[0.5, -3, 0, 1], [0.5, -1, 0, -1.5]], np.float32)
    pictures = [landscape("a.png"), landscape("b.png")]
    return Sensitivity(values, "conv1", np.array([4, 5], np.float32), pictures, ["7", "1"], PROVENANCE)


ALL = [maps, saliency, predictions, sensitivity]
kinds = pytest.mark.parametrize("make", ALL, ids=lambda make: make.__name__)


def texts(figure) -> str:
    import matplotlib.text

    return " | ".join(t.get_text().replace("\n", " ") for t in figure.findobj(matplotlib.text.Text) if t.get_text())


# -- on disk


@kinds
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_what_was_saved_comes_back_equal(make, suffix, tmp_path):
    before = make()
    path = tmp_path / f"result{suffix}"
    assert before.save(path) == [path]
    after = load(path)
    assert type(after) is type(before)
    assert after.provenance == before.provenance
    assert repr(after) == repr(before)
    assert after.to_json() == before.to_json()
    arrays, about = before.record()
    arrays_after, about_after = after.record()
    assert about_after == about
    assert list(arrays_after) == list(arrays)
    for name, values in arrays.items():
        assert arrays_after[name].dtype == values.dtype
        assert np.array_equal(arrays_after[name], values), name


@pytest.mark.parametrize("style", color.STYLES)
def test_overlays_are_the_same_after_loading(style, tmp_path):
    before = saliency()
    before.save(tmp_path / "s.npz")
    for a, b in zip(before.overlay(style), load(tmp_path / "s.npz").overlay(style), strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))


def test_large_pictures_are_kept_small_with_their_geometry(tmp_path):
    s = Saliency(np.eye(8, dtype=np.float32)[None], [picture(size=(1000, 4000))], False)
    s.save(tmp_path / "s.npz")
    (kept,) = load(tmp_path / "s.npz").pictures
    assert kept.display().size == (1024, 256)
    full, small = s.pictures[0].back(s.values[0]), kept.back(s.values[0])
    assert np.isnan(full).mean() == pytest.approx(np.isnan(small).mean(), abs=0.01)
    assert np.nansum(full) / full.size == pytest.approx(np.nansum(small) / small.size, rel=0.02)
    assert (tmp_path / "s.npz").stat().st_size < 1024 * 256 * 3 + 5000


def test_float_inputs_without_an_original_are_kept_as_they_look(tmp_path):
    values = RNG.normal(size=(1, 8, 8)).astype(np.float32)
    s = Saliency(values, [Picture("image 0", None, (1.0, 1.0, 0.0, 0.0), (8, 8), values=values)], True)
    s.save(tmp_path / "s.safetensors")
    again = load(tmp_path / "s.safetensors")
    assert np.array_equal(np.asarray(again.overlay()[0]), np.asarray(s.overlay()[0]))


def test_values_can_be_read_without_innersight(tmp_path):
    m = maps()
    m.save(tmp_path / "m.npz")
    with np.load(tmp_path / "m.npz", allow_pickle=False) as file:
        assert np.array_equal(file["values/conv1"], m["conv1"])
        assert json.loads(str(file["innersight"]))["provenance"]["network"] == "SimpleCNN"


def test_files_that_are_no_results_are_refused_with_a_sentence(tmp_path):
    with pytest.raises(errors.InputError, match="no file"):
        load(tmp_path / "missing.npz")
    with pytest.raises(errors.InputError, match="is a folder"):
        load(tmp_path)
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(errors.InputError, match=r"from .npz and .safetensors files, not from 'x.txt'"):
        load(tmp_path / "x.txt")
    for suffix in (".npz", ".safetensors"):
        broken = tmp_path / f"broken{suffix}"
        broken.write_bytes(b"PK\x03\x04 this is not it")
        with pytest.raises(errors.InputError, match="cannot be read"):
            load(broken)
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(errors.InputError, match="no result of innersight"):
        load(tmp_path / "other.npz")
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(errors.InputError, match="no result of innersight"):
        load(tmp_path / "other.safetensors")
    np.savez(tmp_path / "half.npz", innersight=np.array(json.dumps({"innersight": 1, "result": "Saliency"})))
    with pytest.raises(errors.InputError, match="parts of it are missing"):
        load(tmp_path / "half.npz")
    np.savez(tmp_path / "later.npz", innersight=np.array(json.dumps({"innersight": 99})))
    with pytest.raises(errors.InputError, match="later version"):
        load(tmp_path / "later.npz")


def test_a_truncated_file_is_refused(tmp_path):
    for suffix in (".npz", ".safetensors"):
        path = tmp_path / f"s{suffix}"
        saliency().save(path)
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(errors.InputError):
            load(path)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("/tmp/innersight-was-run",)


def test_pickles_in_a_file_are_never_run(tmp_path):
    saliency().save(tmp_path / "s.npz")
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.array([Bomb()], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "s.npz", "a") as file:
        file.writestr("evil.npy", buffer.getvalue())
    with pytest.raises(errors.InputError, match="pickled objects"):
        load(tmp_path / "s.npz")
    (tmp_path / "p.npz").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(errors.InputError):
        load(tmp_path / "p.npz")
    assert not os.path.exists("/tmp/innersight-was-run")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.jpg", r"'a.jpg': unknown suffix '.jpg'; use .png, .pdf, .svg for a picture, .npz, .safetensors"),
        ("a", "unknown suffix ''"),
        ("no/such/a.png", "there is no folder .*; make it first"),
        ("no/a.npz", "there is no folder"),
        ("folder.png", "it is a folder"),
    ],
)
@kinds
def test_places_that_cannot_be_written_are_named(make, name, message, tmp_path):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(errors.InputError, match=message):
        make().save(tmp_path / name)


def test_a_failed_write_leaves_nothing_and_says_why(tmp_path, monkeypatch):
    def full(*_args):
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "s.npz"
    path.write_bytes(b"older")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(errors.InputError, match=r"cannot write .*s.npz': Permission denied"):
        saliency().save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["s.npz"]
    assert path.read_bytes() == b"older"


def test_options_of_drawing_are_refused_for_values(tmp_path):
    with pytest.raises(errors.InputError, match="style: for pictures only"):
        saliency().save(tmp_path / "s.npz", style="heat")


# -- provenance


def test_provenance_goes_through_json():
    p = dataclasses.replace(PROVENANCE, layer=("conv1", "relu"), options={"points": np.float32(0.5), "nan": np.nan})
    data = json.loads(json.dumps(p.to_json(), allow_nan=False))
    assert data["options"] == {"points": 0.5, "nan": None}
    back = Provenance.from_json({**data, "of a later version": 1})
    assert back.layer == ("conv1", "relu")
    assert back.notes == p.notes


@kinds
def test_the_summary_is_json_with_provenance(make):
    result = make()
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert data["result"] == type(result).__name__
    assert data["summary"] == repr(result)
    assert data["provenance"]["notes"] == list(PROVENANCE.notes)


def test_summaries_hold_shapes_ranges_and_what_stands_out():
    m = maps()
    m["layer1.0/relu:0"][:, 2] = 0
    layers = m.to_json()["layers"]
    assert layers["conv1"]["shape"] == [1, 6, 8, 8]
    assert layers["conv1"]["maximum"] == pytest.approx(float(m["conv1"].max()))
    assert layers["layer1.0/relu:0"]["dead"] == [2]
    s = saliency()
    s.values[1, 3, 4] = -9
    image = s.to_json()["images"][1]
    assert image["peak"] == {"y": 3, "x": 4}
    assert image["minimum"] == -9
    assert image["sum"] == pytest.approx(float(s.values[1].sum()), rel=1e-5)


def test_not_a_number_in_the_values_breaks_neither_line_nor_summary_nor_picture(tmp_path):
    s = saliency()
    s.values[0, 0, 0] = np.nan
    assert repr(s).endswith(", 1 NaN>")
    json.dumps(s.to_json(), allow_nan=False)
    s.save(tmp_path / "s.png")


# -- lines


def test_repr_is_one_line_with_what_how_big_and_which_range():
    m = FeatureMaps({"conv1": np.arange(32.0).reshape(1, 2, 4, 4)}, [landscape()], {}, PROVENANCE)
    assert repr(m) == "<FeatureMaps of SimpleCNN: 1 layer for 1 image (conv1 2x4x4), 0 to 31>"
    s = Saliency(np.eye(8)[None], [landscape()], False, PROVENANCE, ["7"])
    assert repr(s) == "<Saliency gradient of SimpleCNN at conv1 for 7: 1 image of 8x8, 0 to 1>"
    p = predictions()
    assert repr(p).startswith("<Predictions of SimpleCNN: 2 images, 3 classes, logits -50 to 1000; dog <b> 0.750; cat")
    assert repr(sensitivity()) == "<Sensitivity of SimpleCNN at conv1 for 7, 1: 4 channels, 2 images, -3 to 1>"


@kinds
def test_html_is_escaped(make):
    result = make()
    page = result._repr_html_()
    assert "<b>" not in page
    assert "&lt;" in page


@kinds
def test_a_notebook_shows_what_was_drawn(make):
    result = make()
    assert result.figure is None
    before = result._repr_html_()
    assert result.plot() is result
    assert result.figure is not None
    after = result._repr_html_()
    assert "data:image/png;base64," in after
    assert after != before


# -- feature maps


def test_maps_are_a_mapping_from_layer_to_values():
    m = maps()
    assert list(m) == ["conv1", "layer1.0/relu:0", "fc"]
    assert "conv1" in m
    assert "conv" not in m
    assert m["fc"].shape == (1, 10)
    assert len(m) == 3
    assert dict(m)["conv1"] is m["conv1"]
    with pytest.raises(errors.UnknownName, match="no layer 'con1' among these maps; did you mean conv1"):
        m["con1"]
    with pytest.raises(errors.UnknownName, match="did you mean conv1"):
        m.plot("con1")
    assert m in [m]
    assert m not in [maps()]


def test_plot_draws_a_figure_for_each_layer_of_the_image_asked_for():
    m = maps(2)
    assert len(m.plot().figures) == 3
    said = texts(m.plot("conv1", columns=3, image=1).figure)
    assert "conv1: 6 maps of 8x8" in said
    assert "1.png (2 of 2)" in said
    with pytest.raises(errors.InputError, match="no image 2: there are 0 to 1"):
        m.plot(image=2)


def test_plot_draws_into_given_axes():
    from matplotlib.figure import Figure

    figure = Figure()
    m = maps().plot("conv1", ax=figure.add_subplot())
    assert m.figure is figure
    with pytest.raises(errors.InputError, match="one set of axes holds one layer: name one of conv1"):
        maps().plot(ax=figure.add_subplot())


def test_layers_that_are_no_maps_of_an_image_are_refused():
    video = FeatureMaps({"conv": np.zeros((1, 2, 3, 4, 4))}, [landscape()])
    with pytest.raises(errors.InputError, match="layer 'conv' holds 2x3x4x4 values an image"):
        video.plot("conv")


def test_one_layer_and_image_is_saved_under_the_name_given(tmp_path):
    m = maps()
    assert m.save(tmp_path / "maps.png", layer="conv1", columns=2, scale="shared") == [tmp_path / "maps.png"]
    figure = m.plot("conv1", columns=2, scale="shared").figure
    sheet = np.asarray(Image.open(tmp_path / "maps.png").convert("RGB"))
    assert np.array_equal(sheet, np.asarray(Image.open(io.BytesIO(plots.png(figure))).convert("RGB")))


def test_many_layers_and_images_are_a_file_each_or_pages_of_one_pdf(tmp_path):
    m = maps(2)
    names = [p.name for p in m.save(tmp_path / "maps.png")]
    expected = [f"maps_{part}_{i}.png" for i in (0, 1) for part in ("conv1", "layer1.0_relu_0", "fc")]
    assert names == expected
    assert all((tmp_path / n).read_bytes().startswith(b"\x89PNG") for n in names)
    assert m.save(tmp_path / "maps.pdf", image=1) == [tmp_path / "maps.pdf"]
    assert (tmp_path / "maps.pdf").read_bytes().count(b"/Type /Page ") == 3


def test_layer_names_make_safe_and_different_file_names():
    assert results._file_parts(["a/b", "a:b", "../../x", "/", "ok.1"]) == ["a_b", "a_b~2", "x", "layer", "ok.1"]


# -- saliency


def test_overlays_have_the_size_of_the_originals_and_mark_what_was_cut_off():
    s = saliency(1, signed=False)
    s.values[:] = 0
    s.values[0, 0, 0] = 3
    (overlay,) = s.overlay()
    pixels, original = np.asarray(overlay), np.asarray(s.pictures[0].original)
    assert pixels.shape == (20, 30, 3)
    dimmed = np.rint(color.UNDERLAY * color.gray(original.astype(np.float32))).astype(np.uint8)
    assert (pixels[:, 10:25] == dimmed[:, 10:25]).all()  # seen, nothing there
    assert pixels[0, 5].tolist() == color.table(color.SEQUENTIAL_OVERLAY)[-1].tolist()
    assert pixels[:, :5].mean() < dimmed[:, :5].mean()  # not seen
    assert pixels[:, 25:].mean() < dimmed[:, 25:].mean()


def test_one_scale_for_all_images_or_each_its_own():
    s = saliency(2, signed=False)
    s.values[1] *= 0.01
    own, shared = s.overlay("map"), s.overlay("map", scale="shared")
    seen = slice(5, 25)
    back = s.pictures[1].back(s.values[1])[:, seen]
    assert np.array_equal(np.asarray(own[1])[:, seen], color.paint(back, s.scale(1)))
    assert np.array_equal(np.asarray(shared[1])[:, seen], color.paint(back, s.scale()))
    assert s.scale().high > 50 * s.scale(1).high
    with pytest.raises(errors.UnknownName, match="no scale 'all'"):
        s.overlay(scale="all")


def test_evidence_of_a_billionth_does_not_glow():
    faint = saliency(1)
    faint.values[:] *= 1e-9
    assert faint.scale(0).blank.startswith("at most")
    pixels, original = np.asarray(faint.overlay()[0]), np.asarray(faint.pictures[0].original)
    dimmed = np.rint(color.UNDERLAY * color.gray(original.astype(np.float32))).astype(np.uint8)
    assert (pixels[:, 5:25] == dimmed[:, 5:25]).all()
    assert "blank: at most" in texts(faint.plot().figure)
    known = dataclasses.replace(faint, verdict={"reference": 1e-8})
    assert known.scale(0).blank == ""


def test_color_channels_become_one_map_to_draw():
    values = np.array([1.0, -3, 1]).reshape(1, 3, 1, 1) * np.ones((1, 3, 8, 8))
    assert (Saliency(values, [landscape()], True).maps == -1).all()
    assert (Saliency(np.abs(values), [landscape()], False).maps == 3).all()


def test_one_image_of_many():
    s = saliency(3)
    one = s[1]
    assert np.array_equal(one.values, s.values[1:2])
    assert one.pictures == s.pictures[1:2]
    assert one.verdict == {"score": [1.5]}
    assert [np.array_equal(a.values[0], v) for a, v in zip(s, s.values, strict=True)] == [True] * 3
    assert np.array_equal(s[-1].values[0], s.values[2])


def test_the_figure_says_method_network_layer_target_scale_and_unit():
    s = saliency()
    said = texts(s.plot(smooth=1.5).figure)
    assert "gradient of SimpleCNN at conv1 for 7" in said
    assert "± the 99.5th percentile of |value| (blue against the target, red for it)" in said
    assert "values: logit" in said
    assert "smoothed by 1.5 pixels" in said
    assert "0.png" in said
    assert f" {color.number(s.scale(0, smooth=1.5).high)} " in said


def test_many_images_are_paged():
    s = saliency(5)
    said = texts(s.plot(limit=2, page=3).figure)
    assert "4.png" in said
    assert "3.png" not in said
    assert "images 4 to 4 of 5, page 3 of 3" in said


def test_an_overlay_goes_into_given_axes():
    from matplotlib.figure import Figure

    figure = Figure()
    ax = figure.add_subplot()
    s = saliency(1)
    assert s.plot(ax=ax).figure is figure
    assert np.array_equal(ax.images[0].get_array(), np.asarray(s.overlay()[0]))
    with pytest.raises(errors.InputError, match="holds one image"):
        saliency(2).plot(ax=ax)


def test_methods_side_by_side():
    a, b = saliency(2), saliency(2, signed=False)
    figure = results.plot_comparison({"gradient": a, "gradcam": b})
    said = texts(figure)
    assert said.count("gradient: 7") == said.count("gradcam: 7") == 2
    assert "0 to the 99.5th percentile, or ± that of |value|" in said
    with pytest.raises(errors.InputError, match="same images"):
        results.plot_comparison({"a": a, "b": saliency(3)})
    with pytest.raises(errors.InputError, match="nothing to compare"):
        results.plot_comparison({})


def test_constructors_check_that_parts_belong_together():
    with pytest.raises(ValueError, match="2 images, but 1 pictures"):
        Saliency(np.zeros((2, 8, 8)), [landscape()], True)
    with pytest.raises(ValueError, match="1 targets for 2 images"):
        Saliency(np.zeros((2, 8, 8)), [landscape()] * 2, True, targets=["7"])
    with pytest.raises(ValueError, match="predictions are"):
        Predictions(np.zeros(3))
    with pytest.raises(ValueError, match="sensitivity is"):
        Sensitivity(np.zeros((2, 3)), "conv1", np.zeros(3))


# -- predictions


def test_probabilities_are_the_softmax_and_do_not_overflow():
    p = predictions()
    assert p.probabilities == pytest.approx(np.array([[0.25, 0.75, 0], [1, 0, 0]]))
    assert p.classes.tolist() == [1, 0]
    assert p.top(2)[0] == [("dog <b>", pytest.approx(0.75)), ("cat", pytest.approx(0.25))]
    assert len(p.top(99)[0]) == 3


def test_probabilities_of_the_network_stay_as_they_are():
    p = Predictions(np.array([[0.25, 0.25, 0.5]]), kind="probabilities")
    assert p.probabilities is p.logits
    assert p.top(3)[0] == [("class 2", 0.5), ("class 0", 0.25), ("class 1", 0.25)]


def test_a_single_output_goes_through_the_logistic_function():
    p = Predictions(np.array([[0.0], [np.log(3.0)], [-2000.0]]))
    assert p.probabilities[:, 0] == pytest.approx([0.5, 0.75, 0])


def test_predictions_print_as_a_table():
    assert str(predictions()) == (
        "a.png  dog <b> 0.750  cat 0.250      eel 0.000\n"
        "b.png  cat 1.000      dog <b> 0.000  eel 0.000"
    )  # fmt: skip


# -- sensitivity


def test_the_channels_whose_removal_changes_most():
    s = sensitivity()
    assert s.top(2) == [(1, -2.0), (0, 0.5)]
    assert s.top(2, image=0) == [(1, -3.0), (3, 1.0)]
    assert s.top(1, image=-1) == [(3, -1.5)]


def test_both_drawings_of_sensitivity_state_the_score():
    s = sensitivity()
    assert "mean score with all channels: 4.5" in texts(s.plot().figure)
    said = texts(s.plot(kind="matrix").figure)
    assert "a.png" in said
    assert "scale -2." in said
    with pytest.raises(errors.UnknownName, match="no kind 'pie'"):
        s.plot(kind="pie")


@kinds
def test_values_are_not_touched_by_drawing(make, tmp_path):
    result = make()
    before = {name: a.copy() for name, a in result.record()[0].items()}
    result.save(tmp_path / "x.pdf")
    for name, values in result.record()[0].items():
        assert np.array_equal(values, before[name])
    assert result.figure is None


def test_values_cut_off_by_quantisation_are_marked():
    """A scale of 0.5 and a zero point of -1: integers -4..3 are -1.5..2. The zeros of a fused ReLU are no loss."""
    kept = {"dtype": "int8", "scale": [0.5], "zero_point": -1, "lo": -4, "hi": 3}
    values = np.array([[[-1.5, -1.0], [0.0, 2.0]], [[1.5, 1.0], [2.0, 0.5]]], np.float32)
    assert results.saturated(values, kept).tolist() == [
        [[True, False], [False, True]], [[False, False], [True, False]],
    ]  # fmt: skip
    relu = kept | {"lo": -1}
    assert results.saturated(np.maximum(values, 0), relu).sum() == 2
    picture = Picture("p", None, (1, 1, 0, 0), (4, 4), values=np.zeros((1, 4, 4), np.float32))
    maps = results.FeatureMaps({"conv": values[None]}, [picture], {"conv": {"quantised": kept}}).plot("conv")
    shown = [a.get_images()[0].get_array() for a in maps.figure.axes if a.get_images()]
    assert any((pixels == (255, 212, 0)).all(-1).any() for pixels in shown if pixels.ndim == 3)
    words = " ".join(t.get_text() for t in maps.figure.findobj(lambda a: hasattr(a, "get_text")))
    assert "int8, scale 0.5, zero point -1" in words
    assert "38% of the values are cut off" in words
