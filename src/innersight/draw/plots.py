"""Figures: grids of feature maps, saliency beside its picture, bars. The only importer of matplotlib, without pyplot.

Maps are drawn as one tiled image, laid out in whole pixels: each value is a square of n x n pixels of the file, and two
thousand maps take no longer than sixteen.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from innersight import errors
from innersight.draw import color

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 200
MARGIN = 28
MOSAIC = 1350  # the width in pixels that a grid is zoomed to
LARGEST = 2600  # and the width beyond which its maps are shrunk
TILE = 300  # no single map is drawn wider
INK, FAINT = "#1d1d1f", "#666a70"
NEGATIVE, POSITIVE = "#2f6fb5", "#c8452f"  # as in the diverging color map

ORDERS = ("index", "activation")
SCALES = ("each", "shared")

# ---------------------------------------------------------------------------------------------------------------------
# Paper


class Sheet:
    """A figure laid out in pixels from its top left corner."""

    def __init__(self, width: float, height: float):
        from matplotlib.figure import Figure

        self.width, self.height = math.ceil(width), math.ceil(height)
        self.figure = Figure(figsize=(self.width / DPI, self.height / DPI), dpi=DPI, facecolor="white")

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        box = (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        ax = self.figure.add_axes(box)
        ax.tick_params(labelsize=5.5, length=2, width=0.5, pad=1.5, colors=FAINT)
        for spine in ax.spines.values():
            spine.set_linewidth(0.5)
            spine.set_color("#9a9a9a")
        return ax

    def image(self, left: float, top: float, pixels: np.ndarray) -> Axes:
        """An image, one of its pixels to one of the sheet's."""
        ax = self.axes(left, top, pixels.shape[1], pixels.shape[0])
        ax.imshow(pixels, interpolation="nearest", aspect="auto")
        ax.set_axis_off()
        return ax

    def text(self, left: float, top: float, text: str, points: float = 6.5, **options: Any) -> None:
        options = {"color": INK, "va": "top", "linespacing": 1.25, **options}
        x, y = left / self.width, 1 - top / self.height
        self.figure.text(x, y, plain(text), fontsize=points, parse_math=False, **options)

    def heading(self, heading: Heading) -> None:
        self.text(MARGIN, MARGIN, heading.title, 8.5, weight="bold")
        self.text(MARGIN, MARGIN + heading.title_height, heading.notes, 6.5, color=FAINT)


@dataclass(frozen=True)
class Heading:
    """Title and small print, wrapped to a width; `height` is what they take of the sheet."""

    title: str
    notes: str

    @classmethod
    def wrapped(cls, title: str, notes: Sequence[str], width: float) -> Heading:
        title = textwrap.fill(plain(title), max(10, letters(width, 9.5)))
        return cls(title, textwrap.fill(" · ".join(plain(n) for n in notes if n), max(10, letters(width, 6.5))))

    @property
    def title_height(self) -> float:
        return 34 * (self.title.count("\n") + 1)

    @property
    def height(self) -> float:
        return self.title_height + (24 * (self.notes.count("\n") + 1) if self.notes else 0) + 14


def letters(width: float, points: float) -> int:
    """How many letters of a size fit into a width in pixels."""
    return int(width / (0.58 * points * DPI / 72))


def shorten(text: str, width: float, points: float = 6.5) -> str:
    """A text cut in its middle to fit a width in pixels, so that the ends, which tell names apart, stay."""
    text = plain(text).replace("\n", " ")
    room = max(5, letters(width, points))
    return text if len(text) <= room else f"{text[: (room - 1) // 2]}…{text[-(room // 2) :]}"


def plain(text: object) -> str:
    """A text that the font can show: other signs become □, line breaks stay."""
    glyphs = _glyphs()
    return "".join(c if c == "\n" or ord(c) in glyphs else "□" for c in str(text))


def _glyphs() -> frozenset[int]:
    global _known_glyphs
    if _known_glyphs is None:
        from matplotlib import font_manager

        font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
        _known_glyphs = frozenset(code for code in font.get_charmap() if code >= 32)
    return _known_glyphs


_known_glyphs: frozenset[int] | None = None


def write(figures: Sequence[Figure], file: str | IO[bytes], suffix: str) -> None:
    """Figures into one file: ".png" and ".svg" hold one, ".pdf" a page for each."""
    import matplotlib

    with matplotlib.rc_context({"savefig.bbox": None, "svg.hashsalt": "innersight", "svg.fonttype": "path"}):
        if suffix == ".pdf":
            from matplotlib.backends.backend_pdf import PdfPages

            with PdfPages(file, metadata={"CreationDate": None}) as pages:
                for figure in figures:
                    pages.savefig(figure, dpi=figure.dpi)
            return
        (figure,) = figures
        metadata = {"Software": "innersight"} if suffix == ".png" else {"Date": None, "Creator": "innersight"}
        figure.savefig(file, format=suffix[1:], dpi=figure.dpi, metadata=metadata)


def png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    write([figure], buffer, ".png")
    return buffer.getvalue()


def _figure(ax: Axes) -> Figure:
    return ax.figure.figure  # of a subfigure: the whole


def fit(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """An image (h, w, 3) uint8 in the size that fits a box: small ones in whole squares, large ones resampled."""
    from PIL import Image

    h, w = pixels.shape[:2]
    factor = min(width / w, height / h)
    if factor >= 4:  # pixels that are to be seen
        return pixels.repeat(int(factor), 0).repeat(int(factor), 1)
    size = max(1, round(w * factor)), max(1, round(h * factor))
    how = Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(pixels).resize(size, how))


# ---------------------------------------------------------------------------------------------------------------------
# Feature maps


@dataclass(frozen=True)
class Selection:
    """The channels of one page: their numbers, in words which they are, and how many come on pages before."""

    channels: np.ndarray
    text: str
    before: int = 0

    def row_names(self, columns: int) -> list[str]:
        """What stands beside rows of maps without numbers: the first one's channel, or its rank if out of order."""
        first = range(0, len(self.channels), columns)
        if (np.diff(self.channels) == 1).all():
            return [str(self.channels[i]) for i in first]
        return [f"#{self.before + i + 1}" for i in first]


def select(maps: np.ndarray, *, order: str = "index", limit: int | None = 256, page: int = 1) -> Selection:
    """Which of maps (C, ...) a page shows; order "activation" is by root mean square, the largest first."""
    if order not in ORDERS:
        raise errors.unknown("order", order, ORDERS)
    if limit is not None and limit < 1:
        raise errors.InputError(f"limit={limit}: at least one map; limit=None for all of them")
    count = len(maps)
    channels = np.arange(count)
    if order == "activation":
        flat = maps.reshape(count, -1)
        strength = np.square(np.where(np.isfinite(flat), flat, 0), dtype=np.float64).mean(axis=1)
        channels = np.argsort(-strength, kind="stable")
    size = limit or max(1, count)
    pages = max(1, math.ceil(count / size))
    if not 1 <= page <= pages:
        raise errors.InputError(f"page {page} does not exist: {count} maps by {size} make {plural(pages, 'page')}")
    chosen = channels[(page - 1) * size : page * size]
    if order == "activation":
        which = "most active first (root mean square)"
        text = which if pages == 1 else f"{which}: {(page - 1) * size + 1} to {(page - 1) * size + len(chosen)}"
    else:
        text = f"channels {chosen[0]} to {chosen[-1]}" if pages > 1 else ""
    if pages > 1:
        text += f" of {count}, page {page} of {pages}"
    return Selection(chosen, text, (page - 1) * size)


def plural(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def maps(
    values: np.ndarray,
    *,
    title: str,
    notes: Sequence[str] = (),
    picture: np.ndarray | None = None,
    caption: str = "",
    columns: int | None = None,
    scale: str = "each",
    order: str = "index",
    limit: int | None = 256,
    page: int = 1,
    saturated: np.ndarray | None = None,
    ax: Axes | None = None,
) -> Figure:
    """The feature maps (C, h, w) of one image as a grid, beside the picture (H, W, 3) that they come from.

    saturated: (C, h, w) bool, the values of a quantised layer that are cut off at an end of its range; marked
    """
    if scale not in SCALES:
        raise errors.unknown("scale", scale, SCALES)
    if columns is not None and columns < 1:
        raise errors.InputError(f"columns={columns}: at least one")
    if not values.size:
        raise errors.InputError(f"{title}: there is nothing to draw in maps of shape {values.shape}")
    selection = select(values, order=order, limit=limit, page=page)
    grid = _Grid.of(values, selection, columns, scale, saturated)
    notes = [*notes, grid.text, selection.text, grid.text_dead]
    if saturated is not None and saturated.any():
        share = f"{100 * saturated.mean():.2g}" if saturated.mean() >= 1e-4 else "<0.01"
        notes.append(
            f"{share}% of the values are cut off at an end of the range ({_SATURATED[grid.scales[0].signed][0]})"
        )
    title = f"{title}: {plural(len(values), 'map')} of {values.shape[1]}x{values.shape[2]}"
    if ax is not None:
        grid.draw(ax, aspect="equal")
        ax.set_title(plain(title), fontsize=8, parse_math=False)
        return _figure(ax)

    shown = fit(picture, 280, 280) if picture is not None else None
    left = MARGIN + (shown.shape[1] + 36 if shown is not None else 0) + (0 if grid.labelled else 52)
    height, width = grid.mosaic.shape[:2]
    total = left + width + 24 + 20 + 120
    heading = Heading.wrapped(title, notes, total - 2 * MARGIN)
    top = MARGIN + heading.height + (0 if grid.labelled else 22)
    picture_height = shown.shape[0] + 60 if shown is not None else 0
    sheet = Sheet(total, top + max(height, picture_height, 160) + MARGIN)
    sheet.heading(heading)
    first = grid.first_row  # the picture's upper edge in line with the first row of maps
    if shown is not None:
        sheet.image(MARGIN, top + first, shown)
        sheet.text(MARGIN, top + first + shown.shape[0] + 8, shorten(caption, shown.shape[1] + 30), color=FAINT)
    grid.draw(sheet.axes(left, top, width, height))
    bar = min(height - first, 420)
    grid.draw_bar(sheet.axes(left + width + 24, top + first, 20, max(bar, 90)))
    return sheet.figure


@dataclass(frozen=True)
class _Grid:
    """A mosaic of maps and what belongs around it."""

    mosaic: np.ndarray
    corners: np.ndarray  # (n, 2): top and left pixel of each map
    tile: tuple[int, int]  # height and width of a map in pixels
    columns: int
    selection: Selection
    scales: list[color.Scale]
    shared: color.Scale | None
    colors: str
    labelled: bool  # each map has its number above it
    text: str

    @classmethod
    def of(
        cls, values: np.ndarray, selection: Selection, columns: int | None, how: str,
        saturated: np.ndarray | None = None,
    ) -> _Grid:  # fmt: skip
        signed = color.is_signed(values)
        peak = max(map(abs, color.extremes(values)))
        chosen = values[selection.channels]
        scales = color.scales(chosen, signed=signed, reference=peak)
        shared = color.scale(values, signed=signed) if how == "shared" else None
        n, h, w = chosen.shape
        columns = min(columns or color.near_square(n, h, w), n)

        shrink = max(1, math.ceil(columns * w / LARGEST))
        if shrink > 1:
            chosen = _block_mean(chosen, shrink)
            h, w = chosen.shape[1:]
        zoom = max(1, min(MOSAIC // (columns * w), TILE // max(h, w)))
        tile = h * zoom, w * zoom
        labelled = tile[1] >= 9 * len(str(selection.channels.max())) + 4 and n <= 600
        gap = (20, 6) if labelled else (max(1, tile[0] // 12), max(1, tile[1] // 12))

        colors = color.colors_for(signed)
        positions = np.stack([(shared or s)(m) for s, m in zip(scales, chosen, strict=True)])
        painted = color.paint_positions(positions, colors)
        if saturated is not None:
            cut = saturated[selection.channels]
            painted[_block_any(cut, shrink) if shrink > 1 else cut] = _SATURATED[signed][1]
        if zoom > 1:  # here already, so that the stroke through a dead map stays thin
            painted = painted.repeat(zoom, 1).repeat(zoom, 2)
        for i, s in enumerate(scales):
            if s.blank:
                painted[i] = color.dead(*tile)
        return cls(
            mosaic=color.tile(painted, columns, gap=gap),
            corners=color.corners(n, *tile, columns, gap=gap),
            tile=tile,
            columns=columns,
            selection=selection,
            scales=scales,
            shared=shared,
            colors=colors,
            labelled=labelled,
            text=_scale_text(shared, signed, scales) + (f" · shrunk {shrink}x" if shrink > 1 else ""),
        )

    @property
    def first_row(self) -> int:
        return int(self.corners[0, 0])

    @property
    def text_dead(self) -> str:
        dead = [s for s in self.scales if s.blank]
        if not dead:
            return ""
        zero = all(s.blank == "all zero" for s in dead)
        return f"{len(dead)} {'all zero' if zero else 'without a pattern'} (gray, struck through)"

    def draw(self, ax: Axes, aspect: str = "auto") -> None:
        ax.imshow(self.mosaic, interpolation="nearest", aspect=aspect)  # type: ignore[arg-type]  # mypy: a Literal
        for spine in ax.spines.values():
            spine.set_visible(False)
        if self.labelled:
            ax.set_xticks([])
            ax.set_yticks([])
            self._draw_labels(ax)
            return
        rows = self.corners[:: self.columns, 0] + self.tile[0] / 2
        every = max(1, math.ceil(22 / (self.tile[0] + 1)))
        ax.set_yticks(rows[::every], self.selection.row_names(self.columns)[::every])
        lefts = self.corners[: self.columns, 1] + self.tile[1] / 2
        every = max(1, math.ceil(52 / (self.tile[1] + 1)))
        ax.set_xticks(lefts[::every], [f"+{i}" for i in range(0, self.columns, every)])
        # numbers without ticks: a tick would run a shade into the outermost maps
        ax.tick_params(length=0, pad=3, labeltop=True, labelbottom=False)

    def _draw_labels(self, ax: Axes) -> None:
        ranges = self.tile[1] >= 150
        size = 5.5 if self.tile[1] >= 60 else 4.5
        inches = ax.get_window_extent().width / ax.figure.dpi
        size *= min(1, inches * DPI / self.mosaic.shape[1])  # smaller in somebody's small axes
        if size < 3:
            return
        for channel, scale, (top, left) in zip(self.selection.channels, self.scales, self.corners, strict=True):
            options: dict[str, Any] = {"va": "bottom", "color": INK, "fontsize": size}
            ax.text(left - 0.5, top - 1.5, str(channel), **options)
            if ranges:
                right = left + self.tile[1] - 0.5
                options["color"] = FAINT
                ax.text(right, top - 1.5, _range_text(self.shared, scale), ha="right", **options)

    def draw_bar(self, ax: Axes) -> None:
        ramp = np.linspace(1, 0, 256, dtype=np.float32)[:, None]
        ax.imshow(color.paint_positions(ramp, self.colors), aspect="auto", extent=(0, 1, 0, 1))
        ax.yaxis.tick_right()
        ax.set_xticks([])
        if self.shared:
            low, high = color.number(self.shared.low), color.number(self.shared.high)
        elif self.scales[0].signed:
            low, high = "-99.5%", "+99.5%"
        else:
            low, high = "0" if all(s.low == 0 for s in self.scales if not s.blank) else "low", "99.5%"
        signed = self.scales[0].signed
        ax.set_yticks([0, 0.5, 1] if signed else [0, 1], [low, "0", high] if signed else [low, high])


def _scale_text(shared: color.Scale | None, signed: bool, scales: Sequence[color.Scale]) -> str:
    if shared is not None:
        return f"one scale for all: {shared}"
    if signed:
        return "each map on its own scale: ± the 99.5th percentile of |value|"
    offset = any(s.low != 0 for s in scales if not s.blank)
    return f"each map on its own scale: 0{' (or its lowest, if far from 0)' if offset else ''} to its 99.5th percentile"


def _range_text(shared: color.Scale | None, scale: color.Scale) -> str:
    """What stands above a map: the end of its own scale, or its largest value where one scale is shared."""
    if scale.blank:
        return "0" if scale.blank == "all zero" else scale.blank.partition(",")[0]
    if shared is not None:
        return f"max {color.number(scale.maximum)}"
    if scale.signed:
        return f"±{color.number(scale.high)}"
    return f"{color.number(scale.low)} to {color.number(scale.high)}"


# What saturated values are painted in, with the diverging color map or the other: no color of either.
_SATURATED = {True: ("yellow", (255, 212, 0)), False: ("cyan", (0, 194, 255))}


def _block_any(marks: np.ndarray, by: int) -> np.ndarray:
    return _block_mean(marks.astype(np.float32), by) > 0


def _block_mean(maps: np.ndarray, by: int) -> np.ndarray:
    n, h, w = maps.shape
    h, w = max(1, h // by), max(1, w // by)
    by_h, by_w = maps.shape[1] // h, maps.shape[2] // w
    return maps[:, : h * by_h, : w * by_w].reshape(n, h, by_h, w, by_w).mean((2, 4))


def vector(
    values: np.ndarray,
    *,
    title: str,
    notes: Sequence[str] = (),
    picture: np.ndarray | None = None,
    caption: str = "",
    ax: Axes | None = None,
) -> Figure:
    """The values (K,) of a layer without a grid as bars, the largest named."""
    title = f"{title}: {plural(len(values), 'value')}, {' to '.join(map(color.number, color.extremes(values)))}"
    if ax is not None:
        _bars(ax, values)
        ax.set_title(plain(title), fontsize=8, parse_math=False)
        return _figure(ax)
    shown = fit(picture, 280, 280) if picture is not None else None
    left = MARGIN + (shown.shape[1] + 36 if shown is not None else 0) + 70
    heading = Heading.wrapped(title, notes, left + 1000 - MARGIN)
    top = MARGIN + heading.height
    sheet = Sheet(left + 1000 + MARGIN, top + 340 + 60 + MARGIN)
    sheet.heading(heading)
    if shown is not None:
        sheet.image(MARGIN, top, shown)
        sheet.text(MARGIN, top + shown.shape[0] + 8, shorten(caption, shown.shape[1] + 30), color=FAINT)
    _bars(sheet.axes(left, top + 10, 1000, 330), values)
    return sheet.figure


def _bars(ax: Axes, values: np.ndarray) -> None:
    at = np.arange(len(values))
    low, high = color.extremes(values)
    positive = POSITIVE if low < 0 else "#4d5663"  # a sign is worth a color only where there are two
    if len(values) <= 200:
        ax.bar(at, values, color=np.where(values < 0, NEGATIVE, positive), width=0.8)
    else:  # a thousand bars are a slow way to draw a line
        ax.fill_between(at, np.minimum(values, 0), step="mid", color=NEGATIVE, linewidth=0)
        ax.fill_between(at, np.maximum(values, 0), step="mid", color=positive, linewidth=0)
    ax.axhline(0, color=FAINT, linewidth=0.5)
    ax.set_xlim(-0.7, len(values) - 0.3)
    room = 0.12 * (max(high, 0) - min(low, 0)) or 1
    ax.set_ylim(min(low, 0) - (room if low < 0 else 0), max(high, 0) + (room if high > 0 or low == 0 else 0))
    ax.set_xlabel("channel", fontsize=6.5, color=FAINT, labelpad=2)
    ax.spines[["top", "right"]].set_visible(False)
    named: list[int] = []
    for i in np.argsort(-np.nan_to_num(np.abs(values)), kind="stable")[:20]:
        if values[i] and len(named) < 3 and all(abs(i - j) > len(values) / 25 for j in named):
            named.append(i)
            up = bool(values[i] > 0)
            options: dict[str, Any] = {"ha": "center", "va": "bottom" if up else "top", "fontsize": 5.5, "color": INK}
            ax.annotate(str(i), (i, values[i]), (0, 1 if up else -1), textcoords="offset points", **options)


# ---------------------------------------------------------------------------------------------------------------------
# Saliency


@dataclass(frozen=True)
class Panel:
    """One picture of a saliency figure, (h, w, 3) uint8, and its scale if it shows values.

    boxes: (left, top, right, bottom) in shares of the picture's sides
    """

    caption: str
    pixels: np.ndarray
    scale: color.Scale | None = None
    boxes: Sequence[tuple[float, float, float, float]] = ()


def saliency(rows: Sequence[Sequence[Panel]], *, title: str, notes: Sequence[str] = (), style: str = "heat") -> Figure:
    """Rows of panels (the picture, then a map for each method), each map above a bar of what its colors mean."""
    across = max(map(len, rows))
    box = 460 if across <= 3 else max(260, 1650 // across)
    lines, blocks = len(rows), 1
    if across == 2 and len(rows) > 3:  # two images side by side, or the sheet becomes a ribbon
        lines, blocks = math.ceil(len(rows) / 2), 2
    images = [[fit(p.pixels, box, box) for p in row] for row in rows]
    heights = [max(i.shape[0] for row in images[k * blocks : (k + 1) * blocks] for i in row) for k in range(lines)]
    caption, bar, gap = 30, 44, 24
    block = across * box + (across - 1) * gap
    width = 2 * MARGIN + blocks * block + (blocks - 1) * 3 * gap
    heading = Heading.wrapped(title, notes, width - 2 * MARGIN)
    top = MARGIN + heading.height
    sheet = Sheet(width, top + sum(heights) + lines * (caption + bar) + (lines - 1) * gap + MARGIN - 8)
    sheet.heading(heading)
    for line in range(lines):
        for b, (row, shown) in enumerate(
            zip(rows[line * blocks : (line + 1) * blocks], images[line * blocks : (line + 1) * blocks], strict=True)
        ):
            left = MARGIN + b * (block + 3 * gap)
            for panel, pixels in zip(row, shown, strict=True):
                sheet.text(left, top, shorten(panel.caption, box), va="top")
                _draw_boxes(sheet.image(left, top + caption, pixels), panel.boxes, pixels.shape[:2])
                if panel.scale is not None:
                    _draw_bar(sheet, left, top + caption + pixels.shape[0] + 8, pixels.shape[1], panel.scale, style)
                left += box + gap
        top += heights[line] + caption + bar + gap
    return sheet.figure


def _draw_bar(sheet: Sheet, left: float, top: float, width: int, scale: color.Scale, style: str) -> None:
    if scale.blank:
        sheet.text(left, top, shorten(f"blank: {scale.blank}", width + 20, 5.5), 5.5, color=FAINT)
        return
    width = max(width, 120)
    sheet.image(left, top, bar(scale, style, width))
    marks = {0.0: scale.low, 1.0: scale.high} | ({0.5: 0.0} if scale.signed else {})
    for at, value in marks.items():
        side = {0.0: "left", 0.5: "center", 1.0: "right"}[at]
        sheet.text(left + at * width, top + 13, color.number(value), 5.5, color=FAINT, ha=side)


def bar(scale: color.Scale, style: str, width: int = 256, height: int = 10) -> np.ndarray:
    """The colors of a scale from low to high as they look over a gray picture, (height, width, 3) uint8."""
    ramp = np.broadcast_to(np.linspace(scale.low, scale.high, width, dtype=np.float32), (height, width))
    behind = 255 if style == "spotlight" else 128
    return color.overlay(np.full((height, width, 3), behind, np.uint8), ramp, scale, style=style)


def _draw_boxes(ax: Axes, boxes: Sequence[tuple[float, float, float, float]], size: Sequence[int]) -> None:
    """Boxes on an image of (h, w) pixels: white between two dark lines, to be seen on whatever lies below."""
    from matplotlib.patches import Rectangle

    height, width = size
    for n, (left, top, right, bottom) in enumerate(boxes):
        place = (left * width - 0.5, top * height - 0.5), (right - left) * width, (bottom - top) * height
        wide = 1.3 if n == 0 else 0.8  # the largest, which is the object's
        for color_, line in ((INK, wide + 1.2), ("white", wide)):
            ax.add_patch(Rectangle(*place, fill=False, edgecolor=color_, linewidth=line, joinstyle="miter"))


def saliency_on(ax: Axes, panel: Panel) -> Figure:
    """One panel into somebody's axes."""
    ax.imshow(panel.pixels, interpolation="nearest")
    _draw_boxes(ax, panel.boxes, panel.pixels.shape[:2])
    ax.set_axis_off()
    ax.set_title(plain(panel.caption), fontsize=8, parse_math=False)
    return _figure(ax)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures that were found


@dataclass(frozen=True)
class Cell:
    """One picture of a gallery, (h, w, 3) uint8, with a line above it and some below."""

    caption: str
    pixels: np.ndarray
    below: str


def gallery(cells: Sequence[Cell], *, title: str, notes: Sequence[str] = (), columns: int | None = None) -> Figure:
    """Pictures side by side, each between its caption and what is said of it."""
    if columns is not None and columns < 1:
        raise errors.InputError(f"columns={columns}: at least one")
    columns = min(columns or color.near_square(len(cells)), len(cells))
    box = int(np.clip(1650 // columns, 150, 460))
    shown = [fit(c.pixels, box, box) for c in cells]
    line, gap = 28, 24
    under = 20 * max(c.below.count("\n") + 1 for c in cells) + 6
    rows = [range(k, min(k + columns, len(cells))) for k in range(0, len(cells), columns)]
    heights = [max(shown[i].shape[0] for i in row) for row in rows]
    width = max(2 * MARGIN + columns * box + (columns - 1) * gap, 700)
    heading = Heading.wrapped(title, notes, width - 2 * MARGIN)
    top = MARGIN + heading.height
    sheet = Sheet(width, top + sum(heights) + len(rows) * (line + under) + (len(rows) - 1) * gap + MARGIN)
    sheet.heading(heading)
    for row, height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            left = MARGIN + column * (box + gap)
            sheet.text(left, top, shorten(cells[i].caption, box))
            sheet.image(left, top + line, shown[i])
            below = top + line + shown[i].shape[0] + 6
            said = "\n".join(shorten(text, box + gap // 2, 5.5) for text in cells[i].below.split("\n"))
            sheet.text(left, below, said, 5.5, color=FAINT)
        top += height + line + under + gap
    return sheet.figure


# ---------------------------------------------------------------------------------------------------------------------
# Sensitivity


def changes(
    values: np.ndarray, *, title: str, notes: Sequence[str] = (), unit: str, limit: int = 20, ax: Axes | None = None
) -> Figure:
    """Bars of the channels whose removal changes the score most, (N, C): the mean over the images, a dot for each."""
    mean = values.mean(0, dtype=np.float64)
    chosen = np.argsort(-np.abs(mean), kind="stable")[:limit]
    chosen = chosen[np.argsort(mean[chosen], kind="stable")]
    notes = [*notes, f"the {len(chosen)} largest of {plural(len(mean), 'channel')}" if len(chosen) < len(mean) else ""]
    if len(values) > 1:
        notes.append(f"bars: mean of {len(values)} images" + ("; dots: each image" if len(values) <= 50 else ""))
    if ax is not None:
        _draw_changes(ax, values, mean, chosen, unit)
        ax.set_title(plain(title), fontsize=8, parse_math=False)
        return _figure(ax)
    heading = Heading.wrapped(title, notes, 1000)
    top = MARGIN + heading.height
    height = max(120, 27 * len(chosen))
    sheet = Sheet(1000 + 2 * MARGIN, top + height + 70 + MARGIN)
    sheet.heading(heading)
    _draw_changes(sheet.axes(MARGIN + 130, top, 850, height), values, mean, chosen, unit)
    return sheet.figure


def _draw_changes(ax: Axes, values: np.ndarray, mean: np.ndarray, chosen: np.ndarray, unit: str) -> None:
    at = np.arange(len(chosen))
    ax.barh(at, mean[chosen], color=np.where(mean[chosen] < 0, NEGATIVE, POSITIVE), height=0.72)
    if 1 < len(values) <= 50:
        ax.plot(values[:, chosen].T, at[:, None].repeat(len(values), 1), ".", color=INK, markersize=2, alpha=0.5)
    ax.axvline(0, color=FAINT, linewidth=0.5)
    ax.set_yticks(at, [f"channel {c}" for c in chosen])
    ax.set_ylim(len(chosen) - 0.4, -0.6)
    ax.set_xlabel(plain(unit), fontsize=6.5, color=FAINT, parse_math=False)
    ax.spines[["top", "right"]].set_visible(False)


def matrix(
    values: np.ndarray,
    *,
    title: str,
    rows: Sequence[str],
    notes: Sequence[str] = (),
    limit: int = 40,
    ax: Axes | None = None,
) -> Figure:
    """Images x channels (N, C) as a heat map centerd on zero: the `limit` channels with the largest changes."""
    strength = np.square(values, dtype=np.float64).mean(0)
    chosen = np.sort(np.argsort(-strength, kind="stable")[:limit])
    scale = color.scale(values[:, chosen], signed=True)
    pixels = color.paint(values[:, chosen], scale)
    notes = [*notes, f"scale {scale}"]
    if len(chosen) < values.shape[1]:
        notes.append(f"the {len(chosen)} channels that matter most of {values.shape[1]}")
    n, c = pixels.shape[:2]
    if ax is None:
        cell = max(4, min(30, 1250 // c)), max(2, min(30, 1600 // n))
        heading = Heading.wrapped(title, notes, max(c * cell[0] + 240, 700))
        top = MARGIN + heading.height
        sheet = Sheet(max(MARGIN + 200 + c * cell[0] + 150, 760), top + max(n * cell[1], 90) + 70 + MARGIN)
        sheet.heading(heading)
        ax = sheet.axes(MARGIN + 200, top, c * cell[0], n * cell[1])
        _value_bar(sheet.axes(MARGIN + 200 + c * cell[0] + 24, top, 20, max(90, min(n * cell[1], 300))), scale)
    else:
        ax.set_title(plain(title), fontsize=8, parse_math=False)
    ax.imshow(pixels, interpolation="nearest", aspect="auto")
    every = max(1, math.ceil(c / 45))
    ax.set_xticks(range(0, c, every), [str(i) for i in chosen[::every]], rotation=90)
    every = max(1, math.ceil(n / 45))
    ax.set_yticks(range(0, n, every), [shorten(r, 190, 5.5) for r in rows[::every]], parse_math=False)
    ax.set_xlabel("channel removed", fontsize=6.5, color=FAINT)
    return _figure(ax)


def _value_bar(ax: Axes, scale: color.Scale) -> None:
    ramp = np.linspace(1, 0, 256, dtype=np.float32)[:, None]
    ax.imshow(color.paint_positions(ramp, color.colors_for(scale.signed)), aspect="auto", extent=(0, 1, 0, 1))
    ax.yaxis.tick_right()
    ax.set_xticks([])
    low, high = color.number(scale.low), color.number(scale.high)
    ax.set_yticks([0, 0.5, 1] if scale.signed else [0, 1], [low, "0", high] if scale.signed else [low, high])


# ---------------------------------------------------------------------------------------------------------------------
# Numbers in a grid


@dataclass(frozen=True)
class Table:
    """A table whose cells have the colors of their values (R, C): confusions, changes of each class by channel.

    texts:  what stands in the cells; "" leaves one empty
    muted:  (R, C) bool, cells that stay gray because they are no part of the scale (the diagonal of a confusion matrix)
    colors: name of the color map; None: the one for values of this sign
    """

    caption: str
    values: np.ndarray
    texts: Sequence[Sequence[str]]
    rows: Sequence[str]
    columns: Sequence[str]
    scale: color.Scale
    across: str = ""
    down: str = ""
    muted: np.ndarray | None = None
    colors: str | None = None


def tables(parts: Sequence[Table], *, title: str, notes: Sequence[str] = ()) -> Figure:
    """Tables one below the other, each beside the bar of its colors."""
    cells = [(int(np.clip(1400 / len(p.columns), 46, 76)), 46 if len(p.columns) <= 12 else 34) for p in parts]
    widths = [c * len(p.columns) for p, (c, _) in zip(parts, cells, strict=True)]
    heights = [c * len(p.rows) for p, (_, c) in zip(parts, cells, strict=True)]
    left, above, below = MARGIN + 76, 78, 46
    width = max(left + max(widths) + 24 + 18 + 90, 900)
    heading = Heading.wrapped(title, notes, width - 2 * MARGIN)
    top: float = MARGIN + heading.height
    sheet = Sheet(width, top + sum(heights) + len(parts) * (above + below))
    sheet.heading(heading)
    for part, (cell, _), w, h in zip(parts, cells, widths, heights, strict=True):
        sheet.text(MARGIN, top, part.caption, va="top")
        _draw_table(sheet.axes(left, top + above, w, h), part, points=6.5 if cell >= 60 else 5)
        bar = sheet.axes(left + w + 24, top + above, 18, min(h, 300))
        _table_bar(bar, part)
        top += above + h + below
    return sheet.figure


def _draw_table(ax: Axes, table: Table, points: float) -> None:
    pixels = color.paint(table.values, table.scale, table.colors)
    if table.muted is not None:
        pixels[table.muted] = 232
    ax.imshow(pixels, interpolation="nearest", aspect="auto")
    rows, columns = table.values.shape
    ax.set_xticks(range(columns), [plain(c) for c in table.columns])
    ax.set_yticks(range(rows), [plain(r) for r in table.rows])
    ax.tick_params(top=True, bottom=False, labeltop=True, labelbottom=False, length=0, labelsize=6)
    ax.xaxis.set_label_position("top")
    ax.set_xlabel(plain(table.across), fontsize=6, color=FAINT, labelpad=2)
    ax.set_ylabel(plain(table.down), fontsize=6, color=FAINT, labelpad=2)
    for at in np.arange(1, rows) - 0.5:
        ax.axhline(at, color="white", linewidth=0.6)
    for at in np.arange(1, columns) - 0.5:
        ax.axvline(at, color="white", linewidth=0.6)
    dark = color.gray(pixels.astype(np.float32))[..., 0] < 130
    for r, c in np.ndindex(rows, columns):
        if text := table.texts[r][c]:
            options: dict[str, Any] = {"ha": "center", "va": "center", "color": "white" if dark[r, c] else INK}
            ax.text(c, r, plain(text), fontsize=points, parse_math=False, **options)


def _table_bar(ax: Axes, table: Table) -> None:
    colors = table.colors or color.colors_for(table.scale.signed)
    ramp = np.linspace(1, 0, 256, dtype=np.float32)[:, None]
    if table.scale.blank:
        ramp[:] = table.scale.zero
    ax.imshow(color.paint_positions(ramp, colors), aspect="auto", extent=(0, 1, 0, 1))
    ax.yaxis.tick_right()
    ax.set_xticks([])
    low, high = color.number(table.scale.low), color.number(table.scale.high)
    if table.scale.blank:
        ax.set_yticks([0.5], [low])
    else:
        marks = {0.0: low, 1.0: high} | ({0.5: "0"} if table.scale.signed else {})
        ax.set_yticks(list(marks), list(marks.values()))
