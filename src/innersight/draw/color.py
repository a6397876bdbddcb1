"""Values to colors: scales that say what they show, color maps that add nothing, overlays, mosaics. Arrays only.

A scale is a window of values. It is taken from the values (99.5th percentile, so that one hot pixel does not darken the
rest), is symmetric around zero where the values have a sign, and says in words what it clips. A map without evidence is
blank and the scale says why: noise of 1e-9 is never stretched until it glows.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from innersight import errors

PERCENTILE = 99.5
NEGLIGIBLE = 1e-6  # of the reference: what float32 sums of a few thousand terms cannot tell from zero

STYLES = ("heat", "spotlight", "map")
UNDERLAY = 0.6  # how much of the gray picture's light stays under a heat map
SHADOW = 0.1  # how much of the picture's light stays where a spotlight does not fall

# ---------------------------------------------------------------------------------------------------------------------
# Scales


@dataclass(frozen=True)
class Scale:
    """A window of values, `low` to `high`, that is spread over a color map; called, it gives positions 0..1.

    signed:           symmetric around zero: zero is the middle of a diverging color map
    minimum, maximum: the extremes of the values it was taken from
    clipped:          the share of those values that lie outside the window
    blank:            why nothing is drawn ("all zero"), or ""
    """

    low: float
    high: float
    signed: bool
    minimum: float
    maximum: float
    clipped: float = 0.0
    blank: str = ""

    @property
    def zero(self) -> float:
        """The position where a map with nothing to show is drawn: the middle if signed, else the start."""
        return 0.5 if self.signed else 0.0

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Positions 0..1 (float32) of the values; NaN stays NaN; all at `zero` if the scale is blank."""
        values = np.asarray(values, np.float32)
        if self.blank or not self.high > self.low:
            return np.where(np.isnan(values), np.float32(np.nan), np.float32(self.zero))
        # halves, because high - low of a float32 map can exceed what float32 holds
        position = (values / 2 - self.low / 2) / (self.high / 2 - self.low / 2)
        return np.clip(position, 0, 1, out=position)

    def weight(self, values: np.ndarray) -> np.ndarray:
        """How much each value has to say, 0..1: the distance from zero (signed) or from `low`; NaN stays NaN."""
        position = self(values)
        return np.abs(2 * position - 1) if self.signed else position

    def __str__(self) -> str:
        if self.blank:
            return f"blank: {self.blank}"
        window = f"{number(self.low)} to {number(self.high)}"
        if not self.clipped:
            return window
        share = f"{100 * self.clipped:.2g}" if self.clipped >= 1e-4 else "<0.01"
        return f"{window} ({share}% clipped, extremes {number(self.minimum)} to {number(self.maximum)})"


def number(value: float) -> str:
    """Three significant digits, as short as they get.

    >>> number(0.1), number(-12345.0), number(1.234e-9)
    ('0.1', '-12300', '1.23e-09')
    """
    if value and math.isfinite(value) and 1e3 <= abs(value) < 1e6:
        digits = len(str(int(abs(value)))) - 3
        return str(round(int(value), -digits))
    return f"{value + 0.0:.3g}"


def is_signed(values: np.ndarray) -> bool:
    """Whether negative values are more than rounding."""
    low, high = extremes(values)
    return bool(low < 0 and -low > NEGLIGIBLE * max(high, 0.0))


def extremes(values: np.ndarray) -> tuple[float, float]:
    """The smallest and the largest finite value; (0, 0) where there is none."""
    if values.size:
        low, high = float(np.min(values)), float(np.max(values))
        if math.isfinite(low) and math.isfinite(high):
            return low, high
        values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)


def scale(values: np.ndarray, *, signed: bool | None = None, reference: float | None = None) -> Scale:
    """The scale of one map, or of many that share it.

    Signed values: ±(99.5th percentile of |value|). Others: 0 to the 99.5th percentile; from the first percentile if
    even that is more than half of it (a map on an offset would be all bright). Where that percentile says nothing
    (a few hot cells in a silent map), the window reaches to the extreme. `signed=None` looks for negative values.
    A map whose largest magnitude is at most a millionth of `reference` is blank; so is one value everywhere.
    """
    values = np.asarray(values)
    return scales(values.reshape(1, -1), signed=is_signed(values) if signed is None else signed, reference=reference)[0]


def scales(maps: np.ndarray, *, signed: bool, reference: float | None = None) -> list[Scale]:
    """The scale of each of `maps` (n, ...) on its own, as `scale` has it."""
    rows = np.asarray(maps).reshape(len(maps), -1)
    if rows.dtype not in (np.float32, np.float64):
        rows = rows.astype(np.float32)
    if not rows.shape[1] or not np.isfinite(rows).all():
        return [_scale(row[np.isfinite(row)], signed, reference) for row in rows]
    lows, highs = rows.min(1), rows.max(1)
    if signed:
        bounds = np.percentile(np.abs(rows), (0, PERCENTILE), axis=1)
    else:
        bounds = np.percentile(rows, (1, PERCENTILE), axis=1)
    return [
        _window(row, float(low), float(high), float(first), float(last), signed, reference)
        for row, low, high, first, last in zip(rows, lows, highs, *bounds, strict=True)
    ]


def _scale(row: np.ndarray, signed: bool, reference: float | None) -> Scale:
    if not row.size:
        return Scale(0, 0, signed, 0, 0, blank="no finite values")
    return scales(row[None], signed=signed, reference=reference)[0]


def _window(
    row: np.ndarray, minimum: float, maximum: float, first: float, last: float, signed: bool, reference: float | None
) -> Scale:
    peak = max(abs(minimum), abs(maximum))
    blank = ""
    if peak == 0:
        blank = "all zero"
    elif reference and peak <= NEGLIGIBLE * reference:
        blank = f"at most {number(peak)}, negligible beside {number(reference)}"
    elif minimum == maximum:
        blank = f"{number(minimum)} everywhere"
    if blank:
        return Scale(minimum, maximum, signed, minimum, maximum, blank=blank)
    extreme = peak if signed else maximum
    if last < 0.01 * abs(extreme):  # a few hot cells in a silent map
        last = extreme
    if signed:
        low = -last
    elif minimum < -NEGLIGIBLE * peak:  # called unsigned although it is not: nothing is hidden
        low = min(first, 0.0)
    else:
        low = first if first > last / 2 else 0.0
    if not last > low:
        low, last = minimum, maximum
    clipped = float(np.count_nonzero((row < low) | (row > last)) / row.size)
    return Scale(low, last, signed, minimum, maximum, clipped)


# ---------------------------------------------------------------------------------------------------------------------
# Color maps


# Lightness, chroma and hue (degrees) in OKLab, from the middle outwards. Blue is negative and red positive in both;
# red-green blind eyes tell blue from red, and lightness alone says how far from zero.
_DIVERGING = {
    "bluered": (  # on paper: zero is nearly white
        (0.975, 0, 0),
        [(0.84, 0.075, 240), (0.62, 0.145, 250), (0.33, 0.11, 260)],
        [(0.84, 0.085, 45), (0.62, 0.185, 30), (0.33, 0.12, 22)],
    ),
    "bluered_dark": (  # over a dimmed picture: zero is nearly black
        (0.17, 0, 0),
        [(0.42, 0.12, 258), (0.66, 0.14, 245), (0.90, 0.06, 225)],
        [(0.42, 0.14, 28), (0.68, 0.18, 42), (0.92, 0.11, 90)],
    ),
}

SEQUENTIAL, SEQUENTIAL_OVERLAY = "magma", "embers"
DIVERGING, DIVERGING_OVERLAY = "bluered", "bluered_dark"


def colors_for(signed: bool, *, overlay: bool = False) -> str:
    """The name of the color map for values with or without a sign, on paper or over a picture."""
    if signed:
        return DIVERGING_OVERLAY if overlay else DIVERGING
    return SEQUENTIAL_OVERLAY if overlay else SEQUENTIAL


@functools.cache
def table(name: str) -> np.ndarray:
    """A color map, ours or matplotlib's, (n, 3) uint8; n is 255 if it diverges, so that the middle one is zero."""
    if name in _DIVERGING:
        colors = _diverging(*_DIVERGING[name])
    elif name == SEQUENTIAL_OVERLAY:
        # inferno without its dark quarter: over a dimmed picture black would be a shadow, not a low value
        import matplotlib

        colors = matplotlib.colormaps["inferno"](np.linspace(0.25, 1, 256))[:, :3]
    else:
        import matplotlib

        if name not in matplotlib.colormaps:
            raise errors.unknown("color map", name, [*_DIVERGING, SEQUENTIAL_OVERLAY, *matplotlib.colormaps])
        colors = matplotlib.colormaps[name](np.linspace(0, 1, 256))[:, :3]
    out = np.rint(255 * np.clip(colors, 0, 1)).astype(np.uint8)
    out.flags.writeable = False  # shared by everybody who asks
    return out


def _diverging(middle: tuple, blue: list, red: list) -> np.ndarray:
    """Two arms of 127 colors around one, each in steps of equal perceived difference."""

    def arm(stops: list) -> np.ndarray:
        lch = np.array([middle, *stops], float)
        hue = np.radians(lch[:, 2])
        lab = np.stack([lch[:, 0], lch[:, 1] * np.cos(hue), lch[:, 1] * np.sin(hue)], 1)
        fine = np.linspace(0, len(lab) - 1, 2000)
        lab = np.stack([np.interp(fine, range(len(lab)), lab[:, i]) for i in range(3)], 1)
        length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(lab, axis=0), axis=1))])
        equal = np.linspace(0, length[-1], 128)
        return np.stack([np.interp(equal, length, lab[:, i]) for i in range(3)], 1)

    return _oklab_to_srgb(np.concatenate([arm(blue)[::-1], arm(red)[1:]]))


def _oklab_to_srgb(lab: np.ndarray) -> np.ndarray:
    """Björn Ottosson, A perceptual color space for image processing, 2020; (n, 3) to sRGB in 0..1."""
    lms = lab @ np.array(
        [[1, 1, 1], [0.3963377774, -0.1055613458, -0.0894841775], [0.2158037573, -0.0638541728, -1.2914855480]]
    )
    linear = lms**3 @ np.array(
        [
            [4.0767416621, -1.2684380046, -0.0041960863],
            [-3.3077115913, 2.6097574011, -0.7034186147],
            [0.2309699292, -0.3413193965, 1.7076147010],
        ]
    )
    linear = np.clip(linear, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def paint(values: np.ndarray, scale: Scale, colors: str | None = None) -> np.ndarray:
    """Values (..., h, w) as colors (..., h, w, 3) uint8; NaN is hatched gray."""
    return paint_positions(scale(values), colors or colors_for(scale.signed))


def paint_positions(positions: np.ndarray, colors: str) -> np.ndarray:
    """Positions 0..1 (..., h, w) as colors (..., h, w, 3) uint8; NaN is hatched gray."""
    lut = table(colors)
    missing = np.isnan(positions)
    index = np.rint(np.where(missing, 0, positions) * (len(lut) - 1)).astype(np.uint8)
    out = lut[index]
    if missing.any():
        gray = np.where(hatch(*positions.shape[-2:]), np.uint8(150), np.uint8(120))
        out[missing] = np.broadcast_to(gray, positions.shape)[missing][:, None]
    return out


def hatch(height: int, width: int, top: int = 0) -> np.ndarray:
    """Diagonal stripes, a sixth of them True, in a width that fits the picture; (height, width) bool."""
    period = max(6, width // 30)
    y, x = np.ogrid[top : top + height, :width]
    return (x + y) % period < max(1, period // 6)


# ---------------------------------------------------------------------------------------------------------------------
# Over a picture


def overlay(
    picture: np.ndarray, values: np.ndarray, scale: Scale, *, style: str = "heat", colors: str | None = None
) -> np.ndarray:
    """A map laid over its picture; picture (H, W, 3) or (H, W) uint8, values (H, W) -> (H, W, 3) uint8.

    style "heat": colors over the picture in dimmed gray, with an opacity of sqrt(|value|), so that zero shows the
    picture alone. "spotlight": the picture itself, as bright as the map is high, no color map; with signed values
    only the positive ones shine. "map": the colors alone.
    Where values are NaN (not seen by the network) the picture is dark and hatched.
    """
    if style not in STYLES:
        raise errors.unknown("style", style, STYLES)
    if picture.shape[:2] != values.shape:
        raise errors.InputError(f"a map of {values.shape} does not fit a picture of {picture.shape[:2]}")
    if style == "map":
        return paint(values, scale, colors)
    colors = colors or colors_for(scale.signed, overlay=True)
    out = np.empty((*values.shape, 3), np.uint8)
    band = max(1, 2**20 // max(1, values.shape[1]))  # a photograph of 50 megapixels needs no gigabytes of floats
    for top in range(0, len(values), band):
        rows = slice(top, top + band)
        out[rows] = _overlay(picture[rows], values[rows], scale, style, colors, top)
    return out


def _overlay(picture: np.ndarray, values: np.ndarray, scale: Scale, style: str, colors: str, top: int) -> np.ndarray:
    rgb = (picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, axis=2)).astype(np.float32)
    position = scale(values)
    unseen = np.isnan(position)
    position[unseen] = 0
    if style == "heat":
        under, lut = np.float32(UNDERLAY) * gray(rgb), table(colors).astype(np.float32)
        distance = np.abs(2 * position - 1) if scale.signed else position
        out = lut[np.rint(position * (len(lut) - 1)).astype(np.uint8)]
        out = under + np.sqrt(distance)[..., None] * (out - under)
    else:
        light = (np.clip(2 * position - 1, 0, 1) if scale.signed else position) ** np.float32(0.7)
        out = rgb * (SHADOW + (1 - SHADOW) * light)[..., None]
    if unseen.any():
        stripes = np.where(hatch(values.shape[0], values.shape[1], top), np.float32(28), np.float32(0))
        dark = np.float32(0.25 if style == "heat" else 0) * gray(rgb)[..., 0] + stripes
        out[unseen] = dark[unseen][:, None]
    return np.rint(np.clip(out, 0, 255)).astype(np.uint8)


def gray(rgb: np.ndarray) -> np.ndarray:
    """The picture without its colors, (H, W, 3) -> (H, W, 1), by the luma of Rec. 601."""
    return rgb @ np.array([[0.299], [0.587], [0.114]], np.float32)


def smooth(values: np.ndarray, sigma: float) -> np.ndarray:
    """A map (h, w) blurred by a Gaussian of `sigma` cells, mirrored at its borders; for display only."""
    if sigma <= 0:
        return values
    reach = max(1, math.ceil(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    out = np.asarray(values, np.float64)
    for axis in (0, 1):
        padded = np.pad(out, [(reach, reach) if a == axis else (0, 0) for a in (0, 1)], mode="symmetric")
        size = out.shape[axis]
        out = sum(k * np.take(padded, range(i, i + size), axis) for i, k in enumerate(kernel))
    return out.astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Many maps in one picture


def near_square(count: int, height: int = 1, width: int = 1) -> int:
    """How many columns make a mosaic of `count` tiles about square; rather wider if that fills the last row.

    >>> near_square(16), near_square(8), near_square(7), near_square(2048)
    (4, 4, 3, 64)
    """
    square = max(1, math.ceil(math.sqrt(count * height / width)))
    for columns in range(square, square + square // 2 + 1):
        if count % columns == 0:
            return columns
    return min(count, square)


def tile(
    images: np.ndarray, columns: int, *, zoom: int = 1, gap: tuple[int, int] = (1, 1), fill: int = 255
) -> np.ndarray:
    """Images (n, h, w, 3) uint8 side by side in rows of `columns`, as one image.

    Each pixel becomes a square of `zoom` pixels. `gap` is (above each row, between columns) in pixels of the result;
    `corners` says where each image lies.
    """
    n, h, w = images.shape[:3]
    rows = math.ceil(n / columns)
    size = (rows * (h * zoom + gap[0]), columns * (w * zoom + gap[1]) - gap[1])
    out = np.full((*size, 3), fill, np.uint8)
    for image, (top, left) in zip(images, corners(n, h, w, columns, zoom=zoom, gap=gap), strict=True):
        big = image.repeat(zoom, 0).repeat(zoom, 1) if zoom > 1 else image
        out[top : top + h * zoom, left : left + w * zoom] = big
    return out


def corners(n: int, h: int, w: int, columns: int, *, zoom: int = 1, gap: tuple[int, int] = (1, 1)) -> np.ndarray:
    """The (top, left) pixel of each of n images in the mosaic that `tile` makes, (n, 2)."""
    row, column = np.divmod(np.arange(n), columns)
    return np.stack([row * (h * zoom + gap[0]) + gap[0], column * (w * zoom + gap[1])], axis=1)


def dead(height: int, width: int) -> np.ndarray:
    """What is drawn in place of a map with nothing in it: light gray with one stroke, (height, width, 3) uint8."""
    out = np.full((height, width, 3), 214, np.uint8)
    steps = np.arange(max(height, width))
    y = (height - 1 - steps * height // len(steps)).clip(0)
    x = (steps * width // len(steps)).clip(max=width - 1)
    out[y, x] = 150
    return out
