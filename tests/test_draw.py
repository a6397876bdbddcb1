"""Pictures say what the values say: scales, colors, mosaics and figures, looked at pixel by pixel."""

from __future__ import annotations

import io
import time

import numpy as np
import pytest
from PIL import Image

from innersight import errors
from innersight.draw import color, plots


def decoded(figure) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(plots.png(figure))).convert("RGB"))


def find(sheet: np.ndarray, patch: np.ndarray) -> list[tuple[int, int]]:
    """Every place (top, left) where a patch stands in a sheet, pixel for pixel."""
    h, w = patch.shape[:2]
    rows, columns = sheet.shape[0] - h + 1, sheet.shape[1] - w + 1
    fits = np.ones((rows, columns), bool)
    packed, wanted = sheet @ [1 << 16, 1 << 8, 1], patch @ [1 << 16, 1 << 8, 1]
    for y, x in np.random.default_rng(0).integers(0, (h, w), (12, 2)):  # a few pixels rule out most places
        fits &= packed[y : y + rows, x : x + columns] == wanted[y, x]
    return [(int(y), int(x)) for y, x in np.argwhere(fits) if (packed[y : y + h, x : x + w] == wanted).all()]


# -- scales


def test_values_without_a_sign_run_from_zero_to_their_percentile():
    values = np.arange(1001, dtype=np.float32)
    s = color.scale(values)
    assert (s.low, s.high, s.signed) == (0, 995, False)
    assert s(np.array([0, 497.5, 995, 1000])).tolist() == [0, 0.5, 1, 1]
    assert s.clipped == pytest.approx(5 / 1001)
    assert str(s) == "0 to 995 (0.5% clipped, extremes 0 to 1000)"


def test_values_with_a_sign_have_zero_in_the_middle():
    values = np.concatenate([np.linspace(-2, 0, 500), np.linspace(0, 8, 500)])
    s = color.scale(values)
    assert s.signed
    assert s.low == -s.high
    assert s(np.zeros(1))[0] == 0.5
    assert s.weight(np.array([0, s.high, s.low, s.high / 2])) == pytest.approx([0, 1, 1, 0.5])


def test_rounding_below_zero_is_no_sign():
    assert not color.scale(np.array([-1e-9, 0, 1])).signed
    assert color.scale(np.array([-1e-3, 0, 1])).signed


def test_a_map_on_an_offset_is_shown_from_its_own_floor():
    values = 0.5 + 0.01 * np.linspace(0, 1, 1001)
    s = color.scale(values)
    assert s.low == pytest.approx(0.5001)
    assert s.high == pytest.approx(0.50995)


def test_a_few_hot_cells_in_a_silent_map_are_seen():
    values = np.zeros((112, 112), np.float32)
    values[3, 4] = 2
    s = color.scale(values)
    assert (s.low, s.high, s.blank) == (0, 2, "")


@pytest.mark.parametrize(
    ("values", "reference", "why"),
    [
        (np.zeros((4, 4)), None, "all zero"),
        (np.full((4, 4), 0.52), None, "0.52 everywhere"),
        (np.array([[0, 1e-9], [5e-10, 0]]), 1.0, "at most 1e-09, negligible beside 1"),
        (np.full((4, 4), np.nan), None, "no finite values"),
        (np.zeros((0, 4)), None, "no finite values"),
    ],
)
def test_a_map_without_evidence_is_blank_and_says_why(values, reference, why):
    s = color.scale(values, reference=reference)
    assert s.blank == why
    assert str(s) == f"blank: {why}"
    assert np.nan_to_num(s.weight(values)).max(initial=0) == 0


def test_small_values_count_if_the_reference_is_small_too():
    values = np.array([[0, 1e-9], [5e-10, 0]])
    assert color.scale(values, reference=1e-8).blank == ""
    assert color.scale(values).blank == ""


def test_infinite_values_do_not_set_the_scale():
    values = np.append(np.linspace(0, 1, 1000), [np.inf, np.nan])
    s = color.scale(values)
    assert s.high == pytest.approx(0.995, abs=1e-3)
    assert s(np.array([np.inf, -np.inf])).tolist() == [1, 0]


def test_values_near_the_largest_float_do_not_overflow():
    s = color.scale(np.array([-3e38, 0, 3e38], np.float32))
    assert s(np.array([0, 3e38], np.float32)).tolist() == [0.5, 1]


def test_scales_of_many_maps_are_the_scales_of_each():
    maps = np.random.default_rng(0).normal(size=(7, 9, 9)).astype(np.float32)
    maps[3] = 0
    assert color.scales(maps, signed=True) == [color.scale(m, signed=True) for m in maps]
    assert color.scales(np.abs(maps), signed=False) == [color.scale(m, signed=False) for m in np.abs(maps)]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-0.0, "0"),
        (1234.5, "1230"),
        (-123456.0, "-123000"),
        (0.12345, "0.123"),
        (1e-9, "1e-09"),
        (999, "999"),
    ],
)
def test_numbers_are_short(value, text):
    assert color.number(value) == text


# -- color maps


def lightness(rgb: np.ndarray) -> np.ndarray:
    """CIE L* of sRGB, written down once more."""
    c = rgb / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    y = linear @ [0.2126, 0.7152, 0.0722]
    return np.where(y > 0.008856, 116 * np.cbrt(y) - 16, 903.3 * y)


def test_zero_has_the_middle_color_of_a_diverging_map():
    light, dark = color.table(color.DIVERGING), color.table(color.DIVERGING_OVERLAY)
    s = color.scale(np.array([-1.0, 0, 2]))
    assert color.paint(np.zeros((1, 1)), s)[0, 0].tolist() == light[127].tolist() == [247, 247, 247]
    assert len(light) == len(dark) == 255
    assert np.ptp(dark[127]) == 0
    assert color.paint(np.array([[-2.0, 2.0]]), s).tolist() == [[light[0].tolist(), light[254].tolist()]]


@pytest.mark.parametrize("name", [color.DIVERGING, color.DIVERGING_OVERLAY])
def test_diverging_maps_are_blue_below_and_red_above_and_even_in_lightness(name):
    table = color.table(name).astype(int)
    assert (table[:100, 2] > table[:100, 0]).all()
    assert (table[155:, 0] > table[155:, 2]).all()
    below, above = lightness(table)[127::-1], lightness(table)[127:]
    sign = -1 if name == color.DIVERGING else 1
    assert (sign * np.diff(below) > -0.5).all()  # away from zero always darker (on paper) or lighter (over a picture)
    assert (sign * np.diff(above) > -0.5).all()


@pytest.mark.parametrize("name", [color.SEQUENTIAL, color.SEQUENTIAL_OVERLAY])
def test_sequential_maps_grow_in_lightness(name):
    assert (np.diff(lightness(color.table(name))) > -0.3).all()


def test_no_color_map_of_that_name():
    with pytest.raises(errors.UnknownName, match="no color map 'blured'; did you mean bluered"):
        color.table("blured")


# -- overlays


def photo(h=20, w=30) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (h, w, 3), dtype=np.uint8)


def test_where_the_map_is_zero_the_dimmed_gray_picture_shows_alone():
    picture = photo()
    values = np.zeros(picture.shape[:2])
    values[5, 6] = 4.0
    out = color.overlay(picture, values, color.scale(values, signed=False))
    alone = np.rint(color.UNDERLAY * color.gray(picture.astype(np.float32))).astype(np.uint8)
    zero = values == 0
    assert (out[zero] == alone[zero]).all()
    assert out[5, 6].tolist() == color.table(color.SEQUENTIAL_OVERLAY)[-1].tolist()


@pytest.mark.parametrize("signed", [False, True])
def test_opacity_is_the_root_of_the_value(signed):
    picture = np.full((1, 3, 3), 200, np.uint8)
    s = color.Scale(-4.0 if signed else 0.0, 4.0, signed, 0, 4)
    out = color.overlay(picture, np.array([[0.0, 1.0, 4.0]]), s).astype(float)
    table = color.table(color.colors_for(signed, overlay=True)).astype(float)
    quarter = table[round(0.625 * 254) if signed else round(0.25 * 255)]
    assert out[0, 1] == pytest.approx(0.5 * color.UNDERLAY * 200 + 0.5 * quarter, abs=0.51)
    assert out[0, 2].tolist() == table[-1].tolist()


def test_a_spotlight_shows_the_picture_where_the_map_is_high():
    picture = photo()
    values = np.zeros(picture.shape[:2])
    values[:10] = 1
    values[10:15] = -1
    s = color.scale(values)
    out = color.overlay(picture, values, s, style="spotlight")
    assert (out[:10] == picture[:10]).all()
    shadow = np.rint(color.SHADOW * picture[10:].astype(np.float32)).astype(np.uint8)
    assert (out[10:] == shadow).all()  # what speaks against the target does not shine


def test_what_the_network_did_not_see_is_dark_and_hatched():
    picture = np.full((60, 60, 3), 200, np.uint8)
    values = np.ones((60, 60))
    values[0, 0] = 0
    values[30:] = np.nan
    out = color.overlay(picture, values, color.scale(values))
    unseen = out[30:].reshape(-1, 3)
    assert len(np.unique(unseen, axis=0)) == 2
    assert unseen.max() < color.UNDERLAY * 200


def test_a_blank_map_leaves_the_picture_and_a_map_style_needs_none():
    picture = photo()
    values = np.full(picture.shape[:2], 1e-9)
    values[0, 0] = 0
    out = color.overlay(picture, values, color.scale(values, reference=1.0))
    assert (out == np.rint(color.UNDERLAY * color.gray(picture.astype(np.float32))).astype(np.uint8)).all()
    s = color.scale(values)
    assert (color.overlay(picture, values, s, style="map") == color.paint(values, s)).all()


def test_large_pictures_are_done_in_bands_with_the_same_answer():
    picture = np.full((3000, 1000, 3), 90, np.uint8)
    values = np.linspace(0, 1, 3000)[:, None].repeat(1000, 1)
    values[:, 400:] = np.nan
    s = color.scale(values)
    out = color.overlay(picture, values, s)
    again = np.concatenate([color._overlay(picture, values, s, "heat", color.SEQUENTIAL_OVERLAY, 0)])
    assert (out == again).all()


def test_overlay_refuses_what_it_cannot_lay():
    with pytest.raises(errors.UnknownName, match="no style 'heatmap'; did you mean heat"):
        color.overlay(photo(), np.zeros((20, 30)), color.scale(np.zeros(1)), style="heatmap")
    with pytest.raises(errors.InputError, match="does not fit"):
        color.overlay(photo(), np.zeros((20, 31)), color.scale(np.zeros(1)))


def test_smoothing_keeps_the_sum_and_is_a_gaussian():
    values = np.zeros((41, 41))
    values[20, 20] = 1
    out = color.smooth(values, 2.0)
    assert out.sum() == pytest.approx(1)
    y, x = np.mgrid[-20:21, -20:21]
    gauss = np.exp(-(y**2 + x**2) / 8)
    assert out == pytest.approx(gauss / gauss.sum(), abs=2e-4)
    assert color.smooth(np.ones((3, 50)), 6.0) == pytest.approx(1)
    assert color.smooth(values, 0) is values


# -- mosaics


def test_tiles_stand_where_corners_says():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 3), np.uint8)
    mosaic = color.tile(images, 2, zoom=3, gap=(4, 1), fill=255)
    assert mosaic.shape == (3 * (6 + 4), 2 * (9 + 1) - 1, 3)
    for i, (top, left) in enumerate(color.corners(5, 2, 3, 2, zoom=3, gap=(4, 1))):
        assert (mosaic[top : top + 6, left : left + 9] == i).all()
    assert (mosaic == 255).sum() == mosaic.size - 5 * 6 * 9 * 3


@pytest.mark.parametrize(
    ("count", "columns"), [(1, 1), (2, 2), (8, 4), (16, 4), (64, 8), (512, 32), (2048, 64), (7, 3)]
)
def test_columns_are_near_square(count, columns):
    assert color.near_square(count) == columns


# -- figures of feature maps


def steps(count: int, side: int = 4) -> np.ndarray:
    """Maps that all look different, every one with the same scale (0 to 1)."""
    maps = np.random.default_rng(2).random((count, side, side)).astype(np.float32)
    maps[:, 0, 0], maps[:, 0, 1] = 0, 1
    return maps


def test_every_map_is_in_the_file_in_whole_pixels_in_reading_order():
    maps = steps(8)
    sheet = decoded(plots.maps(maps, title="conv1", columns=4))
    zoom = min(plots.MOSAIC // 16, plots.TILE // 4)
    places = []
    for m in maps:
        tile = color.paint(m, color.scale(m)).repeat(zoom, 0).repeat(zoom, 1)
        (place,) = find(sheet, tile)
        places.append(place)
    tops, lefts = zip(*places, strict=True)
    assert len(set(tops)) == 2
    assert len(set(lefts)) == 4
    assert places == sorted(places)


def test_on_a_shared_scale_a_weak_map_is_dark():
    maps = steps(4)
    maps[1] *= 0.01
    s = color.scale(maps)
    sheet = decoded(plots.maps(maps, title="conv1", scale="shared"))
    zoom = plots.TILE // 4
    for m in maps:
        assert len(find(sheet, color.paint(m, s).repeat(zoom, 0).repeat(zoom, 1))) == 1
    assert color.paint(maps[1], s).max() < 60


def test_a_dead_map_is_marked_and_not_stretched():
    maps = steps(4)
    maps[2] = 0
    maps[3] = np.random.default_rng(0).random((4, 4)) * 1e-9
    sheet = decoded(plots.maps(maps, title="relu"))
    assert len(find(sheet, color.dead(plots.TILE, plots.TILE))) == 2
    assert [t for t in texts(plots.maps(maps, title="relu")) if "2 without a pattern (gray, struck through)" in t]


def texts(figure) -> list[str]:
    import matplotlib.text

    return [t.get_text().replace("\n", " ") for t in figure.findobj(matplotlib.text.Text) if t.get_text()]


def test_the_picture_stands_beside_its_maps_crisp():
    digit = photo(28, 28)
    sheet = decoded(plots.maps(steps(4), title="conv1", picture=digit, caption="seven.png"))
    assert len(find(sheet, digit.repeat(10, 0).repeat(10, 1))) == 1


def test_title_and_notes_state_what_is_seen():
    said = " | ".join(texts(plots.maps(steps(16), title="conv1", notes=["SimpleCNN"], caption="seven.png")))
    assert "conv1: 16 maps of 4x4" in said
    assert "SimpleCNN · each map on its own scale: 0 to its 99.5th percentile" in said
    said = " | ".join(texts(plots.maps(steps(16) - 0.5, title="conv1")))
    assert "± the 99.5th percentile of |value|" in said
    said = " | ".join(texts(plots.maps(steps(16), title="conv1", scale="shared")))
    assert "one scale for all: 0 to 1" in said


def test_each_map_carries_its_channel_number():
    labels = texts(plots.maps(steps(40), title="conv1", limit=10, page=3))
    assert [t for t in labels if t.isdigit()][:10] == [str(c) for c in range(20, 30)]
    assert any("channels 20 to 29 of 40, page 3 of 4" in t for t in labels)


@pytest.mark.parametrize(
    ("page", "channels", "text"),
    [
        (1, range(256), "channels 0 to 255 of 600, page 1 of 3"),
        (3, range(512, 600), "channels 512 to 599 of 600, page 3 of 3"),
    ],
)
def test_a_page_holds_its_channels(page, channels, text):
    selection = plots.select(np.zeros((600, 2, 2)), page=page)
    assert selection.channels.tolist() == list(channels)
    assert selection.text == text


def test_the_most_active_come_first_and_ties_by_number():
    maps = np.zeros((5, 2, 2), np.float32)
    maps[1], maps[3, 0, 0], maps[4] = 1, 6, -1  # root mean squares 1, 3, 1
    assert plots.select(maps, order="activation").channels.tolist() == [3, 1, 4, 0, 2]
    selection = plots.select(maps, order="activation", limit=2, page=2)
    assert selection.channels.tolist() == [4, 0]
    assert selection.text == "most active first (root mean square): 3 to 4 of 5, page 2 of 3"
    assert plots.select(maps, limit=None).channels.tolist() == [0, 1, 2, 3, 4]


def test_rows_without_numbers_are_named_by_channel_or_by_rank():
    maps = np.arange(6.0)[:, None]
    assert plots.select(maps, limit=4, page=2).row_names(1) == ["4", "5"]
    assert plots.select(maps, order="activation", limit=4, page=2).row_names(1) == ["#5", "#6"]
    assert plots.select(maps, order="activation").row_names(3) == ["#1", "#4"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"page": 9}, "page 9 does not exist: 5 maps by 256 make 1 page"),
        ({"limit": 0}, "limit=0: at least one map"),
        ({"order": "size"}, "no order 'size'"),
        ({"scale": "all"}, "no scale 'all'"),
        ({"columns": 0}, "columns=0: at least one"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(errors.InnersightError, match=message):
        plots.maps(steps(5), title="conv1", **options)


def test_two_thousand_maps_are_quick_and_keep_their_places():
    maps = np.random.default_rng(0).random((2048, 7, 7)).astype(np.float32)
    start = time.process_time()
    figure = plots.maps(maps, title="layer4", limit=None)
    sheet = decoded(figure)
    assert time.process_time() - start < 4  # about 0.3 s alone
    ticks = [t.get_text() for ax in figure.axes for t in ax.get_yticklabels() if t.get_text().isdigit()]
    assert ticks[0] == "0"
    assert int(ticks[1]) % 64 == 0
    zoom = plots.MOSAIC // (64 * 7)
    places = [
        find(sheet, color.paint(m, color.scale(m, signed=False)).repeat(zoom, 0).repeat(zoom, 1))
        for m in (maps[0], maps[65], maps[2047])
    ]
    assert [len(p) for p in places] == [1, 1, 1]
    (first, second, last) = (np.array(p[0]) for p in places)
    assert ((last - first) == (second - first) * [31, 63]).all()


def test_maps_too_large_for_a_sheet_are_shrunk_by_averaging():
    maps = np.random.default_rng(0).random((64, 400, 400)).astype(np.float32)
    figure = plots.maps(maps, title="conv1")
    assert any("shrunk 2x" in t for t in texts(figure))
    assert figure.get_figwidth() * plots.DPI < 2300
    assert plots._block_mean(np.arange(8.0).reshape(1, 2, 4), 2).tolist() == [[[2.5, 4.5]]]


def test_maps_can_be_drawn_into_given_axes():
    from matplotlib.figure import Figure

    figure = Figure()
    ax = figure.add_subplot()
    assert plots.maps(steps(4), title="conv1", ax=ax) is figure
    assert len(ax.images) == 1
    assert ax.get_title() == "conv1: 4 maps of 4x4"
    decoded(figure)


def test_names_that_the_font_cannot_show_and_dollars_do_no_harm():
    figure = plots.maps(steps(2), title="$x^{", notes=["犬\t.png", "a" * 900], picture=photo(), caption="猫 $1$.png")
    decoded(figure)  # warnings are errors
    assert "□ $1$.png" in texts(figure)


def test_a_vector_becomes_bars_with_the_largest_named():
    values = np.array([0.5, -3, 2, 0])
    figure = plots.vector(values, title="fc")
    (ax,) = figure.axes
    assert [b.get_height() for b in ax.patches] == values.tolist()
    assert {t.get_text() for t in ax.texts} == {"0", "1", "2"}
    decoded(plots.vector(np.random.default_rng(0).normal(size=5000), title="fc"))
    decoded(plots.vector(np.zeros(3), title="fc"))


# -- figures of saliency and sensitivity


def test_panels_stand_in_rows_and_each_map_has_its_scale():
    s = color.scale(np.array([-2.0, 0, 1]))
    a, b = photo(40, 40), photo(40, 40)[::-1].copy()
    figure = plots.saliency([[plots.Panel("cat.png", a), plots.Panel("gradient: cat", b, s)]], title="gradient")
    sheet = decoded(figure)
    (left,) = find(sheet, a.repeat(11, 0).repeat(11, 1))
    (right,) = find(sheet, b.repeat(11, 0).repeat(11, 1))
    assert left[0] == right[0]
    assert left[1] < right[1]
    assert {"-1.99", "0", "1.99"} <= set(texts(figure))


def test_a_blank_panel_says_so_in_place_of_a_scale():
    s = color.scale(np.full((3, 3), 1e-12), signed=True, reference=1.0)
    figure = plots.saliency([[plots.Panel("a.png", photo()), plots.Panel("gradient", photo(), s)]], title="gradient")
    assert any("blank: at most 1e-12" in t for t in texts(figure))


def test_the_bar_shows_the_colors_of_the_overlay():
    s = color.Scale(-1.0, 1.0, True, -1, 1)
    bar = plots.bar(s, "heat", width=101)
    table = color.table(color.DIVERGING_OVERLAY)
    assert bar[0, 0].tolist() == table[0].tolist()
    assert bar[0, -1].tolist() == table[-1].tolist()
    assert bar[0, 50] == pytest.approx(round(color.UNDERLAY * 128), abs=1)


def test_bars_of_the_channels_that_change_most():
    values = np.array([[0.1, -3, 0, 2], [0.1, -1, 0, 4]], np.float32)
    figure = plots.changes(values, title="Sensitivity", unit="change", limit=3)
    (ax,) = figure.axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["channel 1", "channel 0", "channel 3"]
    assert [b.get_width() for b in ax.patches] == pytest.approx([-2, 0.1, 3])
    assert any("the 3 largest of 4 channels" in t for t in texts(figure))
    decoded(figure)


def test_the_matrix_is_centered_on_zero_and_keeps_the_strongest_channels():
    values = np.array([[0, -3, 0, 2], [0, -1, 0, 3]], np.float32)
    figure = plots.matrix(values, title="Sensitivity", rows=["a.png", "b.png"], limit=2)
    ax = next(ax for ax in figure.axes if ax.get_xlabel())
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "3"]
    pixels = ax.images[0].get_array()
    assert pixels[0, 0].tolist() == color.table(color.DIVERGING)[0].tolist()
    decoded(figure)


# -- files


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_the_same_figure_makes_the_same_file(suffix):
    def file() -> bytes:
        buffer = io.BytesIO()
        plots.write([plots.maps(steps(4), title="conv1")], buffer, suffix)
        return buffer.getvalue()

    first = file()
    assert first.startswith({".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}[suffix])
    assert first == file()


def test_the_file_has_the_size_of_the_sheet():
    figure = plots.maps(steps(16), title="conv1")
    h, w = decoded(figure).shape[:2]
    assert (w, h) == tuple(round(side * plots.DPI) for side in figure.get_size_inches())


def test_drawing_needs_no_pyplot():
    import subprocess
    import sys

    code = (
        "import sys, numpy as np; from innersight.draw import plots, color\n"
        "assert 'matplotlib' not in sys.modules and 'torch' not in sys.modules\n"
        "plots.png(plots.maps(np.eye(4)[None], title='x'))\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
