"""Pictures in and maps back: values equal to the libraries' own preprocessing, geometry exact to the pixel."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from innersight import images as module
from innersight.errors import InputError, UnknownName
from innersight.images import Inputs, Picture, Preprocess, iterate, read

RANDOM = np.random.default_rng(0)
ODD_SIZES = [(301, 517), (517, 301), (224, 225), (97, 333), (33, 29), (256, 256)]  # (W, H)
TINY = Preprocess((8, 8))


def noise(width, height, mode="RGB"):
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = RANDOM.integers(0, 256, (height, width, bands), np.uint8)
    return Image.fromarray(pixels[..., 0] if bands == 1 else pixels)


def values(image, preprocess):
    return read(image, preprocess).tensor[0]


# --- the same values as the libraries' own preprocessing


@pytest.mark.parametrize(
    "weights",
    [
        "ResNet50_Weights.IMAGENET1K_V1",
        "ResNet50_Weights.IMAGENET1K_V2",
        "ViT_B_16_Weights.IMAGENET1K_V1",
        "ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1",  # bicubic
        "Inception_V3_Weights.IMAGENET1K_V1",
        "EfficientNet_B1_Weights.IMAGENET1K_V2",
        "MNASNet0_75_Weights.IMAGENET1K_V1",
    ],
)
def test_classification_presets_of_torchvision_are_met_to_the_last_bit(weights):
    torchvision = pytest.importorskip("torchvision")
    transform = torchvision.models.get_weight(weights).transforms()
    preprocess, note = Preprocess.from_torchvision(transform)
    assert note == ""
    for size in ODD_SIZES:
        image = noise(*size)
        assert torch.equal(values(image, preprocess), transform(image)), size


def test_every_classification_preset_of_torchvision_has_a_record():
    from torchvision.models import get_model_weights, list_models

    for name in list_models(module=sys.modules["torchvision.models"]):
        for weight in get_model_weights(name):
            transform = weight.transforms()
            preprocess, note = Preprocess.from_torchvision(transform)
            assert preprocess is not None, (name, note)
            assert preprocess.size == tuple(transform.crop_size * 2)


def test_segmentation_presets_keep_the_proportions_and_cut_nothing():
    from torchvision.models.segmentation import DeepLabV3_ResNet50_Weights

    transform = DeepLabV3_ResNet50_Weights.DEFAULT.transforms()
    preprocess, _ = Preprocess.from_torchvision(transform)
    for size in ODD_SIZES[:4]:
        image = noise(*size)
        assert torch.equal(values(image, preprocess), transform(image))


def test_detection_presets_leave_the_size_to_the_detector():
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    transform = FasterRCNN_ResNet50_FPN_Weights.DEFAULT.transforms()
    preprocess, note = Preprocess.from_torchvision(transform)
    assert "resizes" in note
    image = noise(301, 217)
    assert torch.equal(values(image, preprocess), transform(image))


def test_an_unknown_transform_gives_a_reason_and_no_record():
    from torchvision.models.video import R3D_18_Weights

    for transform in (R3D_18_Weights.DEFAULT.transforms(), torch.nn.Identity(), object()):
        preprocess, reason = Preprocess.from_torchvision(transform)
        assert preprocess is None
        assert type(transform).__name__ in reason


@pytest.mark.parametrize(
    "config",
    [
        {"input_size": (3, 224, 224), "crop_pct": 0.95, "interpolation": "bicubic"},
        {"input_size": (3, 224, 224), "crop_pct": 0.875, "interpolation": "bilinear"},
        {"input_size": (3, 240, 240), "crop_pct": 0.9, "mean": (0.5,) * 3, "std": (0.5,) * 3},
        {"input_size": (3, 384, 384), "crop_pct": 1.0, "crop_mode": "squash"},
        {"input_size": (3, 224, 224), "crop_pct": 0.9, "crop_mode": "squash"},
        {"input_size": (3, 192, 256), "crop_pct": 0.9},
        {"input_size": (3, 224, 224), "crop_pct": 0.9, "crop_mode": "border"},
        {"input_size": (3, 128, 192), "crop_pct": 1.0, "crop_mode": "border", "interpolation": "lanczos"},
    ],
)
def test_evaluation_transforms_of_timm_are_met(config):
    data = pytest.importorskip("timm.data")
    resolved = data.resolve_data_config({}, pretrained_cfg=config)
    transform = data.create_transform(**resolved, is_training=False)
    for record in (config, resolved):
        preprocess, note = Preprocess.from_timm(record)
        assert note == ""
        for size in ODD_SIZES:
            image = noise(*size)
            torch.testing.assert_close(values(image, preprocess), transform(image), rtol=0, atol=1e-6)


def test_a_timm_model_of_many_channels_takes_no_pictures():
    preprocess, reason = Preprocess.from_timm({"input_size": (12, 224, 224)})
    assert preprocess is None
    assert "12 channels" in reason


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("vit", {}),
        ("clip", {}),
        ("clip", {"size": {"shortest_edge": 225}, "crop_size": {"height": 200, "width": 180}}),
        ("convnext", {"size": {"shortest_edge": 224}}),
        ("convnext", {"size": {"shortest_edge": 384}}),
        ("deit", {}),
        ("mobilevit", {"size": {"shortest_edge": 288}}),
        ("segformer", {}),
        ("levit", {}),
        ("poolformer", {}),
        ("bit", {}),
        ("mobilenet_v2", {}),
        ("efficientnet", {}),
        ("efficientnet", {"rescale_offset": True, "rescale_factor": 1 / 127.5, "include_top": False}),
        ("siglip", {}),
    ],
)
def test_pillow_processors_of_transformers_are_met(kind, options):
    transformers = pytest.importorskip("transformers")
    spelled = {"vit": "ViT", "clip": "CLIP", "convnext": "ConvNext", "deit": "DeiT", "mobilevit": "MobileViT"}
    spelled |= {"poolformer": "PoolFormer", "mobilenet_v2": "MobileNetV2", "efficientnet": "EfficientNet"}
    name = f"{spelled.get(kind, kind.capitalize())}ImageProcessorPil"
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    processor = getattr(transformers, name)(**options)
    preprocess, _ = Preprocess.from_hf(processor.to_dict())
    for size in ODD_SIZES[:5]:
        image = noise(*size)
        expected = processor(image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(values(image, preprocess), expected, rtol=0, atol=1e-5)


def test_old_and_unknown_configs_of_transformers():
    vit, note = Preprocess.from_hf({"feature_extractor_type": "ViTFeatureExtractor", "size": 224, "do_resize": True})
    assert (vit.size, vit.resize) == ((224, 224), "squash")
    assert "old config" in note
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224, "do_center_crop": True}
    clip, _ = Preprocess.from_hf({**old, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.25] * 3})
    assert (clip.size, clip.resize, clip.resize_to, clip.interpolation) == ((224, 224), "crop", 224, "bicubic")
    detr, _ = Preprocess.from_hf({"size": {"shortest_edge": 800, "longest_edge": 1333}, "do_pad": True})
    assert values(noise(640, 480), detr).shape == (3, 800, 1066)
    assert values(noise(640, 240), detr).shape == (3, 500, 1333)
    none, reason = Preprocess.from_hf({"size": {"max_height": 10, "max_width": 10}})
    assert none is None
    assert "max_height" in reason


# --- the record


def test_a_record_survives_json():
    record = Preprocess(
        (3, 4), "BGR", "letterbox", (5, 6), "bicubic", 1.0, (1.0, 2, 3), (4.0,), True, (7, 8, 9), "down", 5
    )
    assert Preprocess.from_json(json.loads(json.dumps(record.to_json()))) == record
    assert Preprocess.from_json(json.dumps(record.to_json())) == record
    with pytest.raises(UnknownName, match="did you mean size"):
        Preprocess.from_json({"sizes": [1, 1]})


def test_describe_says_everything_in_one_line():
    imagenet = Preprocess((224, 224), resize_to=256, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    assert imagenet.describe() == (
        "224x224 RGB: shorter side to 256 (bilinear), center crop; "
        "values 0..1 minus (0.485, 0.456, 0.406) over (0.229, 0.224, 0.225)"
    )
    assert Preprocess((96, 96), "L", "squash", scale=1.0, invert=True).describe() == (
        "96x96 L: both sides resized to it (bilinear); light and dark exchanged, values 0..255"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": "croop"}, "did you mean crop"),
        ({"channels": "rgb"}, "did you mean RGB"),
        ({"interpolation": "linear"}, "did you mean bilinear"),
        ({"mean": (1.0, 2.0)}, "one for each of the 3 channels"),
        ({"std": (0.0,)}, "must not be 0"),
        ({"size": (0, 4)}, "must be \\(height, width\\)"),
        ({"size": 224}, "must be \\(height, width\\)"),
        ({"resize_to": "big"}, "number of pixels"),
    ],
)
def test_a_record_that_makes_no_sense_is_refused(options, message):
    with pytest.raises((InputError, UnknownName), match=message):
        Preprocess(**{"size": (8, 8), **options})


def test_channels_scale_mean_std_and_invert():
    red = Image.new("RGB", (8, 8), (255, 10, 0))
    bgr = values(red, Preprocess((8, 8), "BGR", scale=1.0, mean=(104, 117, 123)))
    assert bgr[:, 0, 0].tolist() == [0 - 104, 10 - 117, 255 - 123]
    luma = values(red, Preprocess((8, 8), "L", scale=1.0, std=(2.0,)))
    assert luma.shape == (1, 8, 8)
    assert luma[0, 0, 0] == red.convert("L").getpixel((0, 0)) / 2
    assert values(red, Preprocess((8, 8), scale=1.0, invert=True))[:, 0, 0].tolist() == [0, 245, 255]


def test_letterbox_fills_with_what_it_says_after_inverting():
    x = values(Image.new("L", (8, 4), 255), Preprocess((8, 8), "L", "letterbox", scale=1.0, invert=True, fill=(114,)))
    assert x[0, :2].unique().tolist() == x[0, 6:].unique().tolist() == [114]
    assert x[0, 2:6].unique().tolist() == [0]


# --- geometry


GEOMETRIES = {
    "crop": Preprocess((64, 64), resize_to=80),
    "crop, all of the shorter side": Preprocess((64, 48)),
    "squash": Preprocess((64, 48), resize="squash"),
    "squash and crop": Preprocess((64, 64), resize="squash", resize_to=80),
    "letterbox": Preprocess((64, 64), resize="letterbox"),
    "letterbox, wide": Preprocess((40, 96), resize="letterbox"),
    "keep": Preprocess((64, 64), resize="keep", resize_to=64),
    "crop of less than there is": Preprocess((64, 64), resize_to=50),
}


def rotated_file(folder, image, orientation=6):
    """Stored on its side, with the EXIF tag that says how to turn it back."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = image.transpose(Image.Transpose.ROTATE_90) if orientation == 6 else image
    stored.save(folder / "turned.png", exif=exif)
    return folder / "turned.png"


@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_dot_in_a_rotated_picture_is_found_again(tmp_path, name):
    preprocess = GEOMETRIES[name]
    for x, y in [(150, 90), (120, 60), (190, 130)]:
        image = Image.new("RGB", (301, 187))
        image.paste((255, 255, 255), (x - 4, y - 4, x + 5, y + 5))  # center (x + .5, y + .5)
        inputs = read(rotated_file(tmp_path, image), preprocess)
        (picture,) = inputs.pictures
        assert picture.original.size == (301, 187)
        seen = inputs.tensor[0].mean(0).numpy().astype(float)
        grid_y, grid_x = np.mgrid[: seen.shape[0], : seen.shape[1]] + 0.5
        at_y, at_x = (seen * grid_y).sum() / seen.sum(), (seen * grid_x).sum() / seen.sum()
        sx, sy, tx, ty = picture.to_input
        assert abs((x + 0.5) * sx + tx - at_x) < 0.15
        assert abs((y + 0.5) * sy + ty - at_y) < 0.15
        back = picture.back(seen)
        assert back.shape == (187, 301)
        back = np.nan_to_num(back)
        grid_y, grid_x = np.mgrid[:187, :301] + 0.5
        assert abs((back * grid_x).sum() / back.sum() - (x + 0.5)) < 1
        assert abs((back * grid_y).sum() / back.sum() - (y + 0.5)) < 1


def reference_back(grid, picture):
    """`Picture.back` pixel by pixel, as slowly as it is written down."""
    (height, width), (in_height, in_width) = picture.original_size, picture.input_size
    sx, sy, tx, ty = picture.to_input
    result = np.full((height, width), np.nan)
    rows, columns = grid.shape
    for i in range(height):
        for j in range(width):
            x, y = (j + 0.5) * sx + tx, (i + 0.5) * sy + ty
            if not (0 <= x <= in_width and 0 <= y <= in_height):
                continue
            u = min(max(x / in_width * columns - 0.5, 0), columns - 1)
            v = min(max(y / in_height * rows - 0.5, 0), rows - 1)
            u0, v0 = int(u), int(v)
            u1, v1 = min(u0 + 1, columns - 1), min(v0 + 1, rows - 1)
            a, b = u - u0, v - v0
            top = (1 - a) * grid[v0, u0] + a * grid[v0, u1]
            result[i, j] = (1 - b) * top + b * ((1 - a) * grid[v1, u0] + a * grid[v1, u1])
    return result


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("grid", [None, (1, 1), (3, 5), (1, 4)])
def test_back_is_bilinear_and_nan_where_nothing_was_seen(name, grid):
    picture = read(noise(41, 27), GEOMETRIES[name]).pictures[0]
    coarse = RANDOM.normal(size=grid or picture.input_size)
    back = picture.back(coarse)
    np.testing.assert_allclose(back, reference_back(coarse, picture), atol=1e-12)
    assert np.isnan(back).any() == ("crop" in name)
    many = picture.back(np.stack([coarse, -coarse]).astype(np.float32))
    assert many.shape == (2, 27, 41)
    assert many.dtype == np.float32
    np.testing.assert_allclose(many[1], -back, atol=1e-5)


def test_back_takes_tensors_and_refuses_what_is_no_map():
    picture = read(noise(9, 9), TINY).pictures[0]
    assert picture.back(torch.ones(3, 4, 4, requires_grad=True)).shape == (3, 9, 9)
    with pytest.raises(InputError, match="must be"):
        picture.back(np.ones(4))


@pytest.mark.parametrize("name", GEOMETRIES)
def test_boxes_go_there_and_back(name):
    picture = read(noise(300, 180), GEOMETRIES[name]).pictures[0]
    box = (130.25, 70.5, 160, 100.75)
    there = picture.box_to_input(box)
    sx, sy, tx, ty = picture.to_input
    assert there == pytest.approx((130.25 * sx + tx, 70.5 * sy + ty, 160 * sx + tx, 100.75 * sy + ty))
    assert picture.box_to_original(there) == pytest.approx(box)
    everything = (-1000, -1000, 1000, 1000)
    assert picture.box_to_input(everything) == pytest.approx((0, 0, picture.input_size[1], picture.input_size[0]))
    assert picture.box_to_original((-1000, -1000, 1000, 1000)) == pytest.approx((0, 0, 300, 180))
    assert picture.box_to_original(picture.box_to_input(everything, clip=False), clip=False) == pytest.approx(
        everything
    )


def test_the_box_of_the_input_is_what_the_crop_shows():
    picture = read(noise(300, 100), Preprocess((50, 50))).pictures[0]
    assert picture.box_to_original((0, 0, 50, 50)) == pytest.approx((100, 0, 200, 100))
    seen = ~np.isnan(picture.back(np.ones((7, 7))))
    assert seen[:, 100:200].all()
    assert not seen[:, :100].any()
    assert not seen[:, 200:].any()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_pictures_are_upright(tmp_path, orientation, suffix):
    upright = Image.new("L", (40, 24), 0)
    upright.paste(255, (0, 0, 16, 8))  # bright corner at the top left
    turn = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    (upright if turn is None else upright.transpose(turn)).save(tmp_path / f"a.{suffix}", exif=exif)
    shown = read(tmp_path / f"a.{suffix}", TINY).pictures[0].original
    assert shown.size == (40, 24)
    assert np.abs(np.asarray(shown, int) - np.asarray(upright, int)).max() < 40


# --- kinds of files


def saved(folder, image, name="a.png", **options):
    image.save(folder / name, **options)
    return folder / name


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    grey = np.array([[0, 257], [32896, 65535]], np.uint16)
    for name in ("a.png", "a.tif"):
        inputs = read(saved(tmp_path, Image.fromarray(grey), name), Preprocess((2, 2), "L", scale=1.0))
        assert inputs.tensor[0, 0].tolist() == [[0, 1], [128, 255]]
        assert inputs.pictures[0].original.mode == "L"
        assert inputs.notes == [f"{name}: 16-bit grey, scaled from 0..65535 to 0..255"]


def test_thirty_two_bit_grey_says_which_range_was_taken(tmp_path):
    preprocess = Preprocess((1, 2), "L", scale=1.0)
    for pixels, expected, note in [
        (np.array([[0, 1]], np.float32), [0, 255], "0..1"),
        (np.array([[0, 200]], np.float32), [0, 200], "0..255"),
        (np.array([[-3, 7]], np.float32), [0, 255], "stretched from its own -3..7"),
        (np.array([[0, 65535]], np.int32), [0, 255], "0..65535"),
        (np.array([[0, 1]], np.int32), [0, 1], "0..255"),
    ]:
        inputs = read(saved(tmp_path, Image.fromarray(pixels), "a.tif"), preprocess)
        assert inputs.tensor.flatten().tolist() == expected
        assert note in inputs.notes[0]
    bad = saved(tmp_path, Image.fromarray(np.array([[0, np.nan]], np.float32)), "a.tif")
    with pytest.raises(InputError, match=r"a\.tif holds NaN"):
        read(bad, preprocess)


def test_transparency_is_shown_on_white_and_said(tmp_path):
    preprocess = Preprocess((1, 2), scale=1.0)
    rgba = Image.fromarray(np.array([[[255, 0, 0, 0], [10, 20, 30, 255]]], np.uint8))
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 10, 20, 30])
    palette.putpixel((1, 0), 1)
    key = Image.fromarray(np.array([[[255, 0, 0], [10, 20, 30]]], np.uint8))
    for file in (
        saved(tmp_path, rgba),
        saved(tmp_path, palette, "b.png", transparency=0),
        saved(tmp_path, palette, "b.gif", transparency=0),
        saved(tmp_path, key, "c.png", transparency=(255, 0, 0)),
    ):
        inputs = read(file, preprocess)
        assert inputs.tensor[0, :, 0].T.tolist() == [[255, 255, 255], [10, 20, 30]], file
        assert inputs.notes == [f"{file.name}: transparent parts are shown on white"]
        assert inputs.pictures[0].original.mode == "RGB"
    grey = read(saved(tmp_path, Image.fromarray(np.array([[[9, 0], [9, 255]]], np.uint8), "LA")), preprocess)
    assert grey.pictures[0].original.mode == "L"
    assert grey.tensor[0, 0, 0].tolist() == [255, 9]
    opaque = read(saved(tmp_path, noise(4, 4).convert("RGBA")), preprocess)
    assert opaque.notes == []


def test_palette_cmyk_grey_and_bilevel_files(tmp_path):
    image = noise(16, 16).resize((64, 64))
    cmyk = read(saved(tmp_path, image.convert("CMYK"), "a.jpg", quality=100, subsampling=0), TINY).pictures[0].original
    assert cmyk.mode == "RGB"
    assert np.abs(np.asarray(cmyk, int) - np.asarray(image, int)).mean() < 3
    palette = image.quantize(64)
    shown = read(saved(tmp_path, palette), TINY).pictures[0].original
    assert np.array_equal(np.asarray(shown), np.asarray(palette.convert("RGB")))
    for mode in ("L", "1"):
        grey = image.convert(mode)
        inputs = read(saved(tmp_path, grey), TINY)
        assert inputs.pictures[0].original.mode == "L"
        assert np.array_equal(np.asarray(inputs.pictures[0].original), np.asarray(grey.convert("L")))
        assert inputs.tensor.shape == (1, 3, 8, 8)  # the model takes color


def test_animations_show_their_first_frame_and_say_so(tmp_path):
    frames = [Image.new("L", (4, 4), value) for value in (10, 200)]
    file = saved(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:])
    inputs = read(file, Preprocess((4, 4), "L", scale=1.0))
    assert inputs.tensor.unique().tolist() == [10]
    assert inputs.notes == ["a.gif: the first frame of an animation"]
    pages = saved(tmp_path, frames[0], "a.tif", save_all=True, append_images=frames[1:])
    assert read(pages, TINY).notes == ["a.tif: the first page of several"]


def test_a_picture_handed_in_is_not_changed():
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    noise(20, 10).save(buffer, "png", exif=exif)
    image = Image.open(buffer)
    image.load()
    before = image.tobytes(), image.size, image.mode, dict(image.getexif())
    picture = read(image, TINY).pictures[0]
    assert picture.original.size == (10, 20)
    assert (image.tobytes(), image.size, image.mode, dict(image.getexif())) == before


# --- what is refused, each in one sentence


def sentence(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def png_header(width, height):
    """A PNG that claims to be that large, and holds nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_001, 13_000, 100_000])  # above our limit, above Pillow's two
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path, side):
    file = tmp_path / "bomb.png"
    file.write_bytes(png_header(side, side))
    with pytest.raises(InputError) as error:
        read(file, TINY)
    assert "bomb.png" in sentence(error)
    assert "more than the 100 million" in sentence(error)


def test_the_limit_on_pixels_can_be_set(tmp_path, monkeypatch):
    file = saved(tmp_path, noise(30, 20))
    monkeypatch.setattr(module, "MAX_PIXELS", 599)
    with pytest.raises(InputError, match="30x20 pixels, more than"):
        read(file, TINY)
    monkeypatch.setattr(module, "MAX_PIXELS", 600)
    read(file, TINY)


def test_a_thread_of_pixels_is_not_blown_up():
    with pytest.raises(InputError, match="too long and thin"):
        read(Image.new("L", (100_000, 1)), Preprocess((224, 224), resize_to=256))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.webp", "a.tif", "a.bmp"])
def test_a_truncated_file_is_refused(tmp_path, name):
    file = saved(tmp_path, noise(64, 64), name)
    whole = file.read_bytes()
    for part in (len(whole) // 2, 40, 10):
        file.write_bytes(whole[:part])
        with pytest.raises(InputError) as error:
            read(file, TINY)
        assert str(file) in sentence(error)
        assert "cut off" in sentence(error) or "damaged" in sentence(error) or "not a picture" in sentence(error)


def test_a_damaged_file_never_raises_anything_else(tmp_path):
    random = np.random.default_rng(1)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a.png", "a.jpg", "a.gif", "a.tif", "a.webp"):
        whole = saved(tmp_path, noise(24, 24), name, exif=exif).read_bytes()
        for _ in range(40):
            damaged = bytearray(whole)
            for at in random.integers(0, min(len(whole), 200), 4):
                damaged[at] = random.integers(0, 256)
            (tmp_path / name).write_bytes(damaged)
            try:
                read(tmp_path / name, TINY)
            except InputError as error:
                assert name in str(error)  # noqa: PT017 (most of the damage leaves a picture)


def test_damaged_exif_data_costs_the_rotation_only(tmp_path):
    file = tmp_path / "a.jpg"
    noise(20, 10).save(file, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05" + b"\xff" * 30)
    assert read(file, TINY).pictures[0].original.size == (20, 10)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"hello", "is not a picture"),
        ("a.png", b"hello", "is not a picture, though its name ends in .png"),
        ("a.png", b"\x89PNG\r\n\x1a\n", "is damaged"),
        ("a.png", b"", "is an empty file"),
        ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "is not a picture"),
    ],
)
def test_what_is_not_a_picture_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        read(tmp_path / name, TINY)
    assert message in sentence(error)
    assert str(tmp_path / name) in sentence(error)


def test_missing_files_folders_and_globs(tmp_path):
    saved(tmp_path, noise(4, 4), "holiday.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("hello")
    for images, message in [
        (tmp_path / "holidy.png", "no such file: .*; did you mean holiday.png"),
        (str(tmp_path / "nowhere" / "a.png"), "no such file: .*nowhere"),
        ("", "no such file"),
        ("a\0b", "no such file"),
        (tmp_path / "empty", "empty is empty"),
        (tmp_path / "texts", "texts holds 1 file but no picture"),
        (str(tmp_path / "*.jpg"), r"no file matches .*\*\.jpg"),
        ("https://example.org/a.png", "download it first"),
        ("data:image/png;base64,AAAA", "download it first"),
        ([], "it is empty"),
        (iter([]), "it is empty"),
    ]:
        with pytest.raises(InputError, match=message) as error:
            read(images, TINY)
        sentence(error)
        with pytest.raises(InputError, match=message):
            list(iterate(images, TINY, batch=2))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (None, "None is not a picture"),
        (3, "an int is not a picture"),
        (b"abc", "a bytes is not a picture"),
        ([1.0, 2.0], "a float is not a picture"),
        (io.BytesIO(b"abc"), "is not a picture"),
        (np.zeros((4, 4), np.int64), "image 0 is an int64 array of shape \\(4, 4\\): uint8"),
        (torch.zeros(3, 4, 4, dtype=torch.int32), "an int32 tensor"),
        (np.zeros((4, 4), bool), "a bool array"),
        (np.zeros((3, 4, 4), complex), "a complex128 array"),
        (np.array(["a", "b"]), "array of shape \\(2\\): uint8"),
        (np.zeros((0, 4, 4, 3), np.uint8), "empty array"),
        (np.zeros((4, 4)), "float array of shape \\(4, 4\\): floats are taken as what the model eats, \\(C, H, W\\)"),
        (np.zeros((1, 2, 3, 4, 4)), "float array of shape \\(1, 2, 3, 4, 4\\)"),
        (torch.zeros(()), "float tensor of shape \\(\\)"),
        (np.zeros((2, 3, 4, 5, 3), np.uint8), "a picture is \\(H, W\\) or \\(H, W, 3\\)"),
        (np.zeros((2, 5, 6, 7), np.uint8), "neither axis 1 nor the last one"),
        ({"pixels": 1}, "looked for under"),
        (object(), "an object is not a picture"),
        ((np.zeros((2, 3, 8, 8), np.float32), [1, 2, 3]), "2 pictures and 3 labels"),
    ],
)
def test_other_things_are_refused(images, message):
    with pytest.raises(InputError, match=message) as error:
        read(images, TINY)
    sentence(error)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_floats_that_are_no_numbers_are_refused(bad):
    x = np.zeros((3, 3, 4, 4))
    x[1, 2, 3, 0] = bad
    with pytest.raises(InputError, match=f"image 1 holds {'NaN' if np.isnan(bad) else 'an infinite value'}"):
        read(x, None)
    with pytest.raises(InputError, match="image 3 holds"):
        read([np.zeros((2, 3, 4, 4)), x], None)


def test_channel_counts():
    grey, color = torch.zeros(2, 1, 28, 28), torch.zeros(3, 32, 32)
    with pytest.raises(
        InputError, match=r"with 1 channel, but this model takes \(3, 224, 224\): pass \(N, 3, 224, 224\)"
    ):
        read(grey, None, input_shape=(3, 224, 224))
    with pytest.raises(InputError, match=r"but this model takes \(3, 8, 8\)"):
        read(grey, TINY)
    with pytest.raises(InputError, match="seem to be N, H, W, C, transpose"):
        read(torch.zeros(2, 32, 32, 3), None, input_shape=(3, 32, 32))
    assert read(color, None, input_shape=(3, 224, 224)).tensor.shape == (1, 3, 32, 32)  # another H and W is fine
    with pytest.raises(InputError, match=r"takes \(4, 8, 8\), which no picture can be turned into"):
        read(noise(8, 8), None, input_shape=(4, 8, 8))
    with pytest.raises(InputError, match=r"takes \(1, 8, 8\), but a picture becomes \(3, 8, 8\)"):
        read(noise(8, 8), TINY, input_shape=(1, 8, 8))


def test_pictures_without_a_record_need_one_or_a_shape():
    with pytest.raises(InputError, match=r"pass preprocess= .* or input_shape="):
        read(noise(8, 8), None)
    inputs = read([noise(8, 8), noise(9, 8)], None, input_shape=(1, 6, 7))
    assert inputs.tensor.shape == (2, 1, 6, 7)
    assert len(inputs.notes) == 1
    assert "preprocess= changes it" in inputs.notes[0]
    assert 0 <= inputs.tensor.min() < inputs.tensor.max() <= 1


# --- arrays and tensors


@pytest.mark.parametrize(
    ("array", "pictures"),
    [
        (np.zeros((5, 6), np.uint8), ["5x6 L"]),
        (np.zeros((5, 6, 1), np.uint8), ["5x6 L"]),
        (np.zeros((5, 6, 3), np.uint8), ["5x6 RGB"]),
        (np.zeros((3, 6, 3), np.uint8), ["3x6 RGB"]),
        (np.zeros((3, 6, 5), np.uint8), ["6x5 RGB"]),
        (np.zeros((7, 6, 5), np.uint8), ["6x5 L"] * 7),
        (np.zeros((2, 5, 6, 3), np.uint8), ["5x6 RGB"] * 2),
        (np.zeros((2, 5, 6, 1), np.uint8), ["5x6 L"] * 2),
        (np.zeros((2, 3, 5, 6), np.uint8), ["5x6 RGB"] * 2),
        (np.zeros((5, 6, 4), np.uint8), ["5x6 RGB"]),
        (torch.zeros(5, 6, dtype=torch.uint8), ["5x6 L"]),
        (torch.zeros(3, 5, 6, dtype=torch.uint8), ["5x6 RGB"]),
        (torch.zeros(3, 6, 3, dtype=torch.uint8), ["6x3 RGB"]),
        (torch.zeros(5, 6, 3, dtype=torch.uint8), ["5x6 RGB"]),
        (torch.zeros(7, 6, 5, dtype=torch.uint8), ["6x5 L"] * 7),
        (torch.zeros(2, 1, 5, 6, dtype=torch.uint8), ["5x6 L"] * 2),
        (torch.zeros(2, 5, 6, 3, dtype=torch.uint8), ["5x6 RGB"] * 2),
        ([np.zeros((5, 6), np.uint8), torch.zeros(3, 7, 7, dtype=torch.uint8)], ["5x6 L", "7x7 RGB"]),
    ],
)
def test_the_order_of_the_axes_of_pictures(array, pictures):
    inputs = read(array, TINY)
    assert [f"{p.original.height}x{p.original.width} {p.original.mode}" for p in inputs.pictures] == pictures
    assert [p.name for p in inputs.pictures] == [f"image {i}" for i in range(len(pictures))]


def test_pixels_land_where_they_were():
    pixels = RANDOM.integers(0, 256, (2, 6, 5, 3), np.uint8)
    preprocess = Preprocess((6, 5), scale=1.0)
    expected = torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32))
    for array in (pixels, torch.from_numpy(pixels).permute(0, 3, 1, 2), pixels.transpose(0, 3, 1, 2), list(pixels)):
        assert torch.equal(read(array, preprocess).tensor, expected)


def test_float_tensors_are_taken_as_they_are_and_copied():
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        x = torch.randn(2, 3, 5, 4).to(dtype).requires_grad_()
        y = x * 1
        inputs = read(y, TINY)
        assert inputs.tensor.dtype == torch.float32
        assert not inputs.tensor.requires_grad
        assert inputs.tensor.grad_fn is None
        assert torch.equal(inputs.tensor, x.detach().float())
        inputs.tensor.zero_()
        assert y.detach().abs().sum() > 0
    x = RANDOM.normal(size=(3, 5, 4)).astype(np.float32)
    x.flags.writeable = False
    inputs = read(x, None)
    assert torch.equal(inputs.tensor[0], torch.tensor(x))
    assert not np.shares_memory(inputs.tensor.numpy(), x)
    inputs = read(x[..., ::-1].astype(">f8"), None)  # strides and byte order as they come
    assert torch.equal(inputs.tensor[0], torch.tensor(x).flip(-1))
    assert inputs.pictures[0].original is None
    assert inputs.pictures[0].input_size == (5, 4)


def test_inputs_of_other_ranks_go_through_as_tensors():
    assert read(torch.zeros(3, 4, 8, 8), None, input_shape=(3, 4, 8, 8)).tensor.shape == (1, 3, 4, 8, 8)
    inputs = read(torch.zeros(5, 12), None, input_shape=(12,))
    assert inputs.tensor.shape == (5, 12)
    assert inputs.pictures[0].display().size == (12, 1)
    assert read(torch.zeros(2, 3, 4, 8, 8), None, input_shape=(3, 4, 8, 8)).pictures[0].display().size == (8, 8)


def test_different_sizes_do_not_go_into_one_batch():
    with pytest.raises(InputError, match=r"image 1 is \(3, 6, 6\) and image 0 \(3, 5, 5\)"):
        read([torch.zeros(3, 5, 5), torch.zeros(3, 6, 6)], None)
    keep = Preprocess((8, 8), resize="keep")
    mixed = [noise(8, 8), noise(8, 8), noise(9, 8), noise(8, 8)]
    with pytest.raises(InputError, match="one at a time"):
        read(mixed, keep)
    shapes = [tuple(i.tensor.shape) for i in iterate(mixed, keep, batch=3)]
    assert shapes == [(2, 3, 8, 8), (1, 3, 8, 9), (1, 3, 8, 8)]


# --- looking at tensors


def test_a_normalized_tensor_is_shown_as_the_picture_it_came_from():
    image = noise(8, 8)
    for preprocess in (
        Preprocess((8, 8), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        Preprocess((8, 8), "BGR", scale=1.0, mean=(104, 117, 123)),
        Preprocess((8, 8), invert=True),
    ):
        tensor = read(image, preprocess).tensor
        shown = read(tensor, preprocess).pictures[0].display()
        assert np.array_equal(np.asarray(shown), np.asarray(image))
    grey = read(read(image, Preprocess((8, 8), "L")).tensor, Preprocess((8, 8), "L")).pictures[0].display()
    assert np.array_equal(np.asarray(grey), np.asarray(image.convert("L")))


def test_a_tensor_of_unknown_scale_is_stretched():
    x = torch.tensor([[[-2.0, 0.0, 2.0]]])
    assert np.asarray(read(x, None).pictures[0].display()).tolist() == [[0, 128, 255]]
    assert np.asarray(read(torch.ones(3, 2, 2), None).pictures[0].display()).tolist() == [[[127] * 3] * 2] * 2
    two = read(torch.stack([x[0], x[0] * 3]), None)
    assert two.notes == ["inputs have 2 channels: the picture shown is their mean"]
    assert np.asarray(two.pictures[0].display()).tolist() == [[0, 128, 255]]
    five = read(x.repeat(5, 1, 1), None)
    assert np.asarray(five.pictures[0].display()).tolist() == [[0, 128, 255]]
    assert five.notes == ["inputs have 5 channels: the picture shown is their mean"]


def test_a_picture_is_shown_as_it_is():
    image = noise(20, 10)
    assert np.array_equal(np.asarray(read(image, TINY).pictures[0].display()), np.asarray(image))


# --- folders, lists, loaders


@pytest.fixture
def folder(tmp_path):
    for name, value in [("b/2.png", 3), ("b/1.PNG", 2), ("a/x/0.jpg", 0), ("a/1.bmp", 1), ("z.png", 4)]:
        file = tmp_path / "set" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 10 * value).save(file)
    (tmp_path / "set" / "b" / "notes.txt").write_text("not a picture")
    (tmp_path / "set" / ".hidden.png").write_text("not a picture either")
    return tmp_path / "set"


def test_folders_are_sorted_and_their_class_folders_are_labels(folder):
    inputs = read(folder, Preprocess((8, 8), "L", scale=0.1))
    assert [p.name for p in inputs.pictures] == ["a/1.bmp", "a/x/0.jpg", "b/1.PNG", "b/2.png", "z.png"]
    assert inputs.labels == ["a", "a", "b", "b", None]
    assert inputs.tensor[:, 0, 0, 0].round().tolist() == [1, 0, 2, 3, 4]


def test_links_are_followed_once(folder, tmp_path):
    (folder / "b" / "loop").symlink_to(folder)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cats").symlink_to(folder / "a")
    assert len(read(folder, TINY)) == 5
    assert read(tmp_path / "data", TINY).labels == ["cats", "cats"]


def test_globs_lists_and_names(folder, monkeypatch):
    assert [p.name for p in read(str(folder / "*" / "*"), TINY).pictures] == ["1.bmp", "1.PNG", "2.png"]
    assert [p.name for p in read(str(folder / "**" / "*.png"), TINY).pictures] == ["2.png", "z.png"]
    inputs = read([folder / "z.png", noise(4, 4), str(folder / "a"), (folder / "z.png", 7)], TINY)
    assert [p.name for p in inputs.pictures] == ["z.png", "image 1", "1.bmp", "x/0.jpg", "z.png"]
    assert inputs.labels == [None, None, None, "x", 7]
    monkeypatch.chdir(folder)
    Image.new("L", (8, 8)).save("a[1].png")  # a file of that name comes before the pattern
    assert read("a[1].png", TINY).pictures[0].name == "a[1].png"


def test_notes_about_many_pictures_are_one_sentence(tmp_path):
    for i in range(5):
        saved(tmp_path, Image.new("RGBA", (4, 4)), f"{i}.png")
    assert read(tmp_path, TINY).notes == ["0.png and 4 more: transparent parts are shown on white"]
    assert [i.notes for i in iterate(tmp_path, TINY, batch=4)] == [
        ["0.png and 3 more: transparent parts are shown on white"],
        ["4.png: transparent parts are shown on white"],
    ]


class Digits(torch.utils.data.Dataset):
    """Eleven samples whose pixels are their number."""

    def __init__(self, make):
        self.make = make

    def __len__(self):
        return 11

    def __getitem__(self, i):
        if i >= 11:
            raise RuntimeError("asked for a sample past the end")
        return self.make(i)


def sample(i):
    return torch.full((1, 4, 4), float(i))


@pytest.mark.parametrize(
    ("make", "labels"),
    [
        (lambda i: sample(i), None),
        (lambda i: (sample(i), i * i), [i * i for i in range(11)]),
        (lambda i: (sample(i), i * i, "path"), [i * i for i in range(11)]),
        (lambda i: (sample(i), torch.zeros(4, 4, dtype=torch.long)), None),
        (lambda i: (sample(i), 0.5 * i), None),
        (lambda i: {"pixel_values": sample(i), "labels": i}, list(range(11))),
        (lambda i: {"image": sample(i), "label": str(i)}, [str(i) for i in range(11)]),
        (lambda i: {"images": sample(i)}, None),
    ],
)
@pytest.mark.parametrize("batch", [1, 3, 4, 5, 100])
def test_loaders_come_out_in_the_batches_asked_for(make, labels, batch):
    loader = torch.utils.data.DataLoader(Digits(make), batch_size=4)
    parts = list(iterate(loader, None, batch=batch))
    assert [len(part) for part in parts] == [batch] * (11 // batch) + [11 % batch] * (11 % batch > 0)
    assert torch.cat([part.tensor for part in parts])[:, 0, 0, 0].tolist() == list(range(11))
    assert [label for part in parts for label in part.labels] == (labels or [None] * 11)
    assert [p.name for part in parts for p in part.pictures] == [f"image {i}" for i in range(11)]
    assert torch.equal(read(loader, None).tensor, torch.cat([part.tensor for part in parts]))
    assert read(Digits(make), None).labels == (labels or [None] * 11)  # the data set itself


def test_one_batch_of_a_loader_is_a_batch_with_labels():
    loader = torch.utils.data.DataLoader(Digits(lambda i: (sample(i), i)), batch_size=4)
    inputs = read(next(iter(loader)), None)
    assert inputs.tensor.shape == (4, 1, 4, 4)
    assert inputs.labels == [0, 1, 2, 3]
    assert len(read([sample(0), sample(1)], None)) == 2  # two tensors are two inputs


def test_labels_by_name_and_pil_data_sets():
    assert read((torch.zeros(2, 3, 8, 8), ["cat", "dog"]), None).labels == ["cat", "dog"]
    pictures = [(noise(9, 8), i) for i in range(3)]
    assert read(pictures, TINY).labels == [0, 1, 2]
    rows = [{"image": noise(9, 8), "label": i} for i in range(3)]
    assert read(rows, TINY).labels == [0, 1, 2]
    detection = ([torch.zeros(3, 8, 8)] * 2, [{"boxes": 1}] * 2)
    assert len(read(iter([detection]), None)) == 2


def test_iterating_reads_no_further_than_it_must():
    asked = []

    def endless():
        i = 0
        while True:
            asked.append(i)
            yield torch.full((4, 1, 2, 2), float(i))
            i += 1

    batches = iterate(endless(), None, batch=6)
    assert next(batches).tensor[:, 0, 0, 0].tolist() == [0, 0, 0, 0, 1, 1]
    assert asked == [0, 1]
    assert next(batches).tensor[:, 0, 0, 0].tolist() == [1, 1, 2, 2, 2, 2]
    assert asked == [0, 1, 2]


def test_iterating_a_large_array_copies_a_batch_at_a_time():
    x = np.zeros((10, 1, 2, 2), np.float32)
    batches = iterate(x, None, batch=4)
    first = next(batches)
    x[:] = 1
    assert first.tensor.sum() == 0
    assert first.tensor.untyped_storage().nbytes() == 4 * 4 * 4
    assert [int(part.tensor.sum()) for part in batches] == [16, 8]


def test_iterating_checks_its_batch_at_the_door():
    for batch in (0, -1, 1.5, True):
        with pytest.raises(InputError, match="batch must be"):
            iterate(noise(4, 4), TINY, batch=batch)


def test_iterating_gives_what_reading_gives(folder):
    whole = read(folder, TINY)
    parts = list(iterate(folder, TINY, batch=2))
    assert [len(part) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.tensor for part in parts]), whole.tensor)
    assert [label for part in parts for label in part.labels] == whole.labels


def test_originals_of_many_files_are_read_again_when_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "KEPT_PIXELS", 250)
    stored = [noise(10, 10) for _ in range(4)]
    for i, image in enumerate(stored):
        saved(tmp_path, image, f"{i}.png")
    pictures = read(tmp_path, TINY).pictures
    assert ["original" in vars(p) for p in pictures] == [True, True, False, False]
    for picture, image in zip(pictures, stored, strict=True):
        assert np.array_equal(np.asarray(picture.original), np.asarray(image))
        assert np.array_equal(np.asarray(pickle.loads(pickle.dumps(picture)).display()), np.asarray(image))
        assert np.array_equal(np.asarray(replace(picture, label="x").display()), np.asarray(image))
        assert picture.back(np.ones((2, 2))).shape == (10, 10)
    saved(tmp_path, noise(11, 10), "3.png")
    with pytest.raises(InputError, match=r"3\.png has changed"):
        pictures[3].display()
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = pictures[3].nothing_such


def test_results_in_one_line():
    inputs = read([noise(20, 10), (noise(10, 10), 3)], TINY)
    assert repr(inputs) == "<Inputs (2, 3, 8, 8) of image 0, image 1>"
    assert repr(inputs.pictures[0]) == "<Picture 'image 0': 10x20, seen as 8x8>"
    assert repr(inputs.pictures[1]) == "<Picture 'image 1': 10x10, seen as 8x8, label 3>"
    assert isinstance(inputs, Inputs)


def test_a_picture_can_be_made_by_hand():
    picture = Picture("a", noise(20, 10), (0.5, 0.5, 0.0, 0.0), (5, 10))
    assert picture.original_size == (10, 20)
    bare = Picture("a", None, (1.0, 1.0, 0.0, 0.0), (5, 10))
    assert bare.back(np.ones((5, 10))).shape == (5, 10)
    with pytest.raises(InputError, match="without anything"):
        bare.display()


def test_the_module_is_imported_without_torch():
    code = "import sys, innersight.images; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ}).returncode == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_tensors_stay_on_their_device():
    x = torch.rand(2, 3, 8, 8, device="cuda", requires_grad=True)
    inputs = read(x, TINY)
    assert inputs.tensor.device == x.device
    assert inputs.pictures[0].display().size == (8, 8)
    assert read(torch.zeros(2, 3, 8, 8, dtype=torch.uint8, device="cuda"), TINY).tensor.shape == (2, 3, 8, 8)
    assert inputs.pictures[0].back(x[0].detach()).shape == (3, 8, 8)


def test_photographs_of_the_shared_folder(shared_data):
    from torchvision.models import SqueezeNet1_1_Weights

    transform = SqueezeNet1_1_Weights.DEFAULT.transforms()
    preprocess, _ = Preprocess.from_torchvision(transform)
    files = sorted(shared_data("imagenet", "images").iterdir())[:5]
    inputs = read(files, preprocess)
    for x, file in zip(inputs.tensor, files, strict=True):
        assert torch.equal(x, transform(Image.open(file).convert("RGB")))
