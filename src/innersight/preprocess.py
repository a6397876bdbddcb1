"""What a model wants of a picture: size, channels, values, as its torchvision, timm or transformers config says it.

    wanted = Preprocess((224, 224), resize_to=256, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    values, to_input = wanted.apply(image)               # (3, 224, 224) float32, and where its pixels went

A record is plain values (`to_json`), and `describe` says in one line what is done.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from PIL import Image

from innersight.errors import InputError, unknown

MAX_PIXELS = 100_000_000
"""Pictures with more pixels are refused, by their header, before anything is decoded."""

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
CHANNELS = {"RGB": 3, "BGR": 3, "L": 1}
RESIZE = ("crop", "squash", "letterbox", "keep")

Affine = tuple[float, float, float, float]


@dataclass(frozen=True)
class Preprocess:
    """What a model wants of a picture: its size, channels and values.

    size:          (H, W) the model takes. For `resize="keep"`: the size assumed where no picture is at hand
    channels:      "RGB", "BGR" or "L" (one grey channel; color is brought to luma)
    resize:        "crop": keep the proportions, cover the size, cut what is over; "squash": both sides to the size;
                   "letterbox": keep the proportions, fit inside, fill around; "keep": keep the proportions and cut
                   nothing, so the input is as large as the picture makes it (segmentation and detection)
    resize_to:     what the picture is resized to before the cut around the center: the length of the shorter side, or
                   the (H, W) to cover, to squash to, or to fit into. None: `size`, nothing more is cut than must be
    interpolation: nearest, bilinear, bicubic, lanczos, box or hamming: Pillow's, so smaller means antialiased
    scale:         pixels 0..255 times this, ...
    mean:          ... minus this, for each channel or one for all, in the order of `channels`, ...
    std:           ... over this
    invert:        dark on light turned into light on dark (pixel = 255 - pixel) before the scale
    fill:          0..255, what surrounds a picture that is smaller than `size`, as the model sees it
    crop_rounding: where half a pixel of margin goes: "even" as torchvision and timm do it, "down" as transformers does
    longest:       for "keep": the longer side is made no longer than this

    >>> Preprocess((224, 224), resize_to=256).describe()
    '224x224 RGB: shorter side to 256 (bilinear), center crop; values 0..1'
    """

    size: tuple[int, int]
    channels: str = "RGB"
    resize: str = "crop"
    resize_to: int | tuple[int, int] | None = None
    interpolation: str = "bilinear"
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    invert: bool = False
    fill: tuple[int, ...] = (0,)
    crop_rounding: str = "even"
    longest: int | None = None

    def __post_init__(self) -> None:
        for name in ("size", "resize_to", "mean", "std", "fill"):
            value = getattr(self, name)
            if isinstance(value, (list, np.ndarray)):
                object.__setattr__(self, name, tuple(value))
            elif name in ("mean", "std", "fill") and not isinstance(value, tuple):
                object.__setattr__(self, name, (value,))
        self._check()

    def _check(self) -> None:
        choices: tuple[tuple[str, str, Iterable[str]], ...] = (
            ("channels", self.channels, CHANNELS),
            ("resize", self.resize, RESIZE),
            ("interpolation", self.interpolation, RESAMPLING),
            ("crop_rounding", self.crop_rounding, ("even", "down")),
        )
        for name, value, known in choices:
            if value not in tuple(known):
                raise unknown(name, value, known, " in preprocess")
        sizes = [("size", self.size)]
        if isinstance(self.resize_to, tuple):
            sizes.append(("resize_to", self.resize_to))
        for name, pair in sizes:
            if not (isinstance(pair, tuple) and len(pair) == 2 and all(positive_int(side) for side in pair)):
                raise InputError(f"preprocess {name} must be (height, width) in pixels, got {pair!r}")
        for name, side in (("resize_to", self.resize_to), ("longest", self.longest)):
            if not (side is None or isinstance(side, tuple) or positive_int(side)):
                raise InputError(f"preprocess {name} must be a number of pixels, got {side!r}")
        for name, values in (("mean", self.mean), ("std", self.std), ("fill", self.fill)):
            if len(values) not in (1, CHANNELS[self.channels]):
                raise InputError(
                    f"preprocess {name} must hold one number or one for each of the {CHANNELS[self.channels]} channels "
                    f"({self.channels}), got {len(values)}"
                )
        if not self.scale or not all(self.std):
            raise InputError("preprocess scale and std must not be 0")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what comes out."""
        return (CHANNELS[self.channels], *self.size)

    def describe(self) -> str:
        """What is done to a picture, in one line for people."""
        height, width = self.size
        to = self.resize_to
        whole = f"{to[0]}x{to[1]}" if isinstance(to, tuple) else to
        cut = ", center crop" if to else ""
        if self.resize == "crop":
            how = f"shorter side to {whole}" if isinstance(to, int) else f"resized to cover {whole or 'it'}"
            how += f" ({self.interpolation}), center crop"
        elif self.resize == "squash":
            how = f"both sides resized to {whole or 'it'} ({self.interpolation}){cut}"
        elif self.resize == "letterbox":
            how = f"fit inside {whole or 'it'} ({self.interpolation}), filled with {_numbers(self.fill)}"
        else:
            how = f"shorter side to {whole} ({self.interpolation})" if to else "as large as it is"
            how += f", longer side at most {self.longest}" if self.longest else ""
        start = f"{height}x{width} {self.channels}" if self.resize != "keep" else f"{self.channels} of any size"
        values = f"values 0..{255 * self.scale:g}"
        values += f" minus {_numbers(self.mean)}" if any(self.mean) else ""
        values += f" over {_numbers(self.std)}" if any(s != 1 for s in self.std) else ""
        return f"{start}: {how}; {'light and dark exchanged, ' if self.invert else ''}{values}"

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain values; `from_json` reads it."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any] | str) -> Preprocess:
        """The record that `to_json` wrote, as a dictionary or as text."""
        values = json.loads(record) if isinstance(record, str) else dict(record)
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise unknown("field", name, known, " in a preprocess record")
        if "size" not in values:
            raise InputError('a preprocess record needs "size": [height, width]')
        return cls(**values)

    @classmethod
    def for_shape(cls, input_shape: Sequence[int]) -> Preprocess:
        """What is assumed where nothing says how a model of that (C, H, W) wants its pictures: values 0..1, no mean."""
        if len(input_shape) != 3 or input_shape[0] not in (1, 3):
            raise InputError(
                f"this model takes {as_text(input_shape)}, which no picture can be turned into: "
                f"pass a float tensor {as_text(('N', *input_shape))}"
            )
        channels, height, width = (int(side) for side in input_shape)
        return cls((height, width), channels="L" if channels == 1 else "RGB")

    @classmethod
    def from_torchvision(cls, transform: Any) -> tuple[Preprocess | None, str]:
        """The record of a `weights.transforms()` of torchvision, and a note.

        The note says what the record leaves open, "" for nothing; with None it is the reason why there is no record.
        """
        kind = type(transform).__name__
        if kind == "ObjectDetection" and type(transform).__module__.startswith("torchvision."):
            return cls((480, 640), resize="keep"), "the detector resizes pictures itself"
        if kind not in ("ImageClassification", "SemanticSegmentation"):
            return None, f"{kind} is not one of torchvision's presets for single pictures"
        if not all(hasattr(transform, name) for name in ("resize_size", "mean", "std", "interpolation")):
            return None, f"this {kind} does not say how it resizes and normalizes"
        interpolation = str(getattr(transform.interpolation, "value", transform.interpolation))
        if interpolation not in RESAMPLING:
            return None, f"interpolation {interpolation!r} is not known here"
        resize_to = _side_or_pair(transform.resize_size)
        if kind == "ImageClassification":
            size, resize = _pair(transform.crop_size), "squash" if isinstance(resize_to, tuple) else "crop"
        elif isinstance(resize_to, tuple):
            size, resize = resize_to, "squash"
        else:
            size, resize = _pair(resize_to or 520), "keep"
        record = cls(
            size,
            resize=resize,
            resize_to=resize_to,
            interpolation=interpolation,
            mean=tuple(transform.mean),
            std=tuple(transform.std),
        )
        return record, ""

    @classmethod
    def from_timm(cls, config: Mapping[str, Any]) -> tuple[Preprocess | None, str]:
        """The record of timm's evaluation transform for a `pretrained_cfg` or a resolved data config, and a note.

        What the config leaves out is timm's default. The note is as for `from_torchvision`.
        """
        config = _mapping(config)
        channels, height, width = config.get("input_size") or (3, 224, 224)
        if channels not in (1, 3):
            return None, f"it takes {channels} channels, which no picture has"
        interpolation = config.get("interpolation") or "bicubic"
        if interpolation not in RESAMPLING:
            return None, f"interpolation {interpolation!r} is not known here"
        mean = tuple(config.get("mean") or (0.485, 0.456, 0.406))
        std = tuple(config.get("std") or (0.229, 0.224, 0.225))
        if len(mean) not in (1, channels) or len(std) not in (1, channels):
            return None, f"its mean and std hold {len(mean)} and {len(std)} numbers for {channels} channels"
        crop = config.get("crop_pct") or 0.875
        mode = config.get("crop_mode") or "center"
        whole = math.floor(height / crop), math.floor(width / crop)
        record = cls(
            (height, width),
            channels="L" if channels == 1 else "RGB",
            resize={"squash": "squash", "border": "letterbox"}.get(mode, "crop"),
            # timm takes another road for inputs that are not square; its rounding differs
            resize_to=whole[0] if mode == "center" and whole[0] == whole[1] else whole,
            interpolation=interpolation,
            mean=mean,
            std=std,
            fill=tuple(round(255 * m) for m in mean) if mode == "border" else (0,),
        )
        return record, ""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> tuple[Preprocess | None, str]:
        """The record of a transformers image processor (its `to_dict()` or preprocessor_config.json), and a note.

        The note is as for `from_torchvision`. transformers' Pillow processors are matched; its torchvision ones
        resize tensors, which differs by a rounding of the pixel values.
        """
        config = _mapping(config)
        geometry, note = _hf_geometry(config)
        if geometry is None:
            return None, note
        resample = config.get("resample")
        names = {int(number): name for name, number in RESAMPLING.items()}
        if resample is not None and int(resample) not in names:
            return None, f"resample={resample} is not known here"
        scale, mean, std = _hf_values(config)
        if not {len(mean), len(std)} <= {1, 3}:
            return None, "its mean and std are not those of a color picture"
        if config.get("do_pad"):
            note = "; ".join(filter(None, [note, "the padding of its processor is left out"]))
        record = cls(
            channels="BGR" if config.get("do_flip_channel_order") else "RGB",
            interpolation=names[2 if resample is None else int(resample)],
            scale=scale,
            mean=mean,
            std=std,
            crop_rounding="down",
            **geometry,
        )
        return record, note

    def apply(self, image: Image.Image, name: str = "the picture") -> tuple[np.ndarray, Affine]:
        """The input (C, H, W) float32 made of an RGB or L picture, and (sx, sy, tx, ty) from its pixels to the input's.

        `name` is what an error calls it.
        """
        (width, height), (left, top), (out_width, out_height) = self._layout(*image.size)
        if width * height > MAX_PIXELS or out_width * out_height > MAX_PIXELS:
            raise InputError(
                f"{name} is {image.width}x{image.height} pixels, too long and thin for {self.describe()}: "
                f"cut it, or use resize='letterbox' in preprocess="
            )
        affine = (width / image.width, height / image.height, float(-left), float(-top))
        image = image.convert("L" if self.channels == "L" else "RGB")
        if image.size != (width, height):
            image = image.resize((width, height), RESAMPLING[self.interpolation])
        pixels = np.asarray(image).reshape(height, width, -1)
        pixels = pixels[max(top, 0) : top + out_height, max(left, 0) : left + out_width]
        if self.channels == "BGR":
            pixels = pixels[..., ::-1]
        if self.invert:
            pixels = 255 - pixels
        if pixels.shape[:2] != (out_height, out_width):
            canvas = np.empty((out_height, out_width, pixels.shape[2]), np.uint8)
            canvas[:] = self.fill
            y, x = max(-top, 0), max(-left, 0)
            canvas[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
            pixels = canvas
        # Divided, not multiplied, by the exact 255: so the values are torchvision's to the last bit.
        values = pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(1 / self.scale)
        mean, std = (np.array(v, np.float32).reshape(-1, 1, 1) for v in (self.mean, self.std))
        return np.ascontiguousarray((values - mean) / std), affine

    def _layout(self, width: int, height: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """(w, h) of the resized picture, (left, top) of the input in it (negative: filled), (W, H) of the input."""
        resized = self._resized(width, height)
        if self.resize == "keep":
            return resized, (0, 0), resized
        out = self.size[1], self.size[0]
        left, top = (self._margin(have, want) for have, want in zip(resized, out, strict=True))
        return resized, (left, top), out

    def _margin(self, have: int, want: int) -> int:
        if have < want:
            return -((want - have) // 2)
        return (have - want) // 2 if self.crop_rounding == "down" else round((have - want) / 2)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """(w, h) before the cut; the roundings are those of torchvision (one side given) and timm (two)."""
        to = self.resize_to
        if self.resize == "keep":
            return self._kept(width, height)
        if self.resize == "crop" and (isinstance(to, int) or (to is None and self.size[0] == self.size[1])):
            return _shorter_side_to(to if isinstance(to, int) else self.size[0], width, height)
        if isinstance(to, int):  # in the proportions of the input
            to_height, to_width = (round(side * to / min(self.size)) for side in self.size)
        else:
            to_height, to_width = to or self.size
        if self.resize == "squash":
            return to_width, to_height
        ratios = height / to_height, width / to_width
        ratio = min(ratios) if self.resize == "crop" else max(ratios)
        return max(round(width / ratio), 1), max(round(height / ratio), 1)

    def _kept(self, width: int, height: int) -> tuple[int, int]:
        shorter, longer = sorted((width, height))
        to = shorter if self.resize_to is None else min(_pair(self.resize_to))
        if self.longest is None or longer / shorter * to <= self.longest:
            return _shorter_side_to(to, width, height)
        # As transformers' detectors round it.
        exact = self.longest * shorter / longer
        short, long = max(round(exact), 1), max(int(exact * longer / shorter), 1)
        return (short, long) if width < height else (long, short)


def _shorter_side_to(side: int, width: int, height: int) -> tuple[int, int]:
    """(w, h) with the shorter one `side` long, as torchvision rounds the longer one: down."""
    if width <= height:
        return side, int(side * height / width)
    return int(side * width / height), side


def _hf_geometry(config: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """`size`, `resize`, `resize_to` and `longest` of a transformers image processor; None and a reason if unknown."""
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
    crop = config.get("crop_size") if config.get("do_center_crop") else None
    cut = None if crop is None else _hf_size(crop)
    note = ""
    if config.get("do_resize") is False:
        if cut is not None:
            return None, "its processor crops without resizing"
        return {"size": (480, 640), "resize": "keep"}, "pictures keep their size"
    size = config.get("size")
    if isinstance(size, (int, float)):
        by_side = ("CLIP", "ConvNext", "Levit", "MobileNet", "MobileViT", "PoolFormer", "Bit")
        key = "shortest_edge" if kind.startswith(by_side) else "square"
        note = f"size={size} of an old config read as the {'shorter side' if key != 'square' else 'square'}"
        size = {"shortest_edge": int(size)} if key != "square" else {"height": int(size), "width": int(size)}
    size = {name: int(side) for name, side in _mapping(size or {}).items() if side}
    side = size.get("shortest_edge")
    if side and config.get("crop_pct") and cut is None and side >= 384:  # ConvNeXt: whole pictures from there on
        return {"size": (side, side), "resize": "squash"}, note
    if side and config.get("crop_pct"):
        return {"size": cut or (side, side), "resize_to": int(side / config["crop_pct"])}, note
    if side and kind.startswith("Levit"):
        side = int(256 / 224 * side)
    if side and cut:
        return {"size": cut, "resize_to": side}, note
    if side:
        return {"size": (side, side), "resize": "keep", "resize_to": side, "longest": size.get("longest_edge")}, note
    if "height" in size and "width" in size:
        whole = size["height"], size["width"]
        return {"size": cut or whole, "resize": "squash", "resize_to": whole if cut else None}, note
    return None, f"its processor resizes in a way that is not known here (size={config.get('size')!r})"


def _hf_values(config: Mapping[str, Any]) -> tuple[float, tuple[float, ...], tuple[float, ...]]:
    """Scale, mean and std of a transformers image processor."""
    scale = 1.0 if config.get("do_rescale") is False else float(config.get("rescale_factor") or 1 / 255)
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    # MobileViT carries a mean that it does not use, and nothing that says so.
    normalizes = config.get("do_normalize", "image_mean" in config and "do_flip_channel_order" not in config)
    if normalizes:
        mean, std = _many(config.get("image_mean", 0.5)), _many(config.get("image_std", 0.5))
    if config.get("rescale_offset"):  # EfficientNet: x * scale - 1
        mean = tuple(m + 1 for m in mean)
    if config.get("include_top"):  # EfficientNet again: over std a second time
        std = tuple(s * t for s, t in zip(std, _many(config.get("image_std", 1.0)), strict=True))
    return scale, mean, std


def _hf_size(size: Any) -> tuple[int, int]:
    if isinstance(size, (int, float)):
        return int(size), int(size)
    size = _mapping(size)
    both = size.get("shortest_edge")
    return int(size.get("height") or both), int(size.get("width") or both)


def _mapping(config: Any) -> dict[str, Any]:
    """A plain dictionary of a config, whichever class of its library holds it."""
    if isinstance(config, Mapping):
        return dict(config)
    for name in ("to_dict", "_asdict"):
        if hasattr(config, name):
            return dict(getattr(config, name)())
    return dict(getattr(config, "__dict__", {}) or config)


def _many(value: Any) -> tuple[float, ...]:
    return tuple(float(v) for v in value) if isinstance(value, Iterable) else (float(value),)


def _pair(side: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(side, int):
        return side, side
    return (int(side[0]), int(side[1])) if len(side) == 2 else (int(side[0]), int(side[0]))


def _side_or_pair(size: int | Sequence[int] | None) -> int | tuple[int, int] | None:
    if size is None or isinstance(size, int):
        return size
    return _pair(size) if len(size) == 2 else int(size[0])


def positive_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and int(value) > 0


def _numbers(values: Sequence[float]) -> str:
    texts = [f"{v:.4g}" for v in values]
    return texts[0] if len(set(texts)) == 1 else f"({', '.join(texts)})"


def as_text(shape: Iterable[Any]) -> str:
    return f"({', '.join(str(side) for side in shape)})"
