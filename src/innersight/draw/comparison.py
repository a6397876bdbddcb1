"""Figures of two networks side by side: signal to noise along the depth, maps of both and their difference, reasons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from innersight import errors
from innersight.draw import color, plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINE = 27  # pixels of a row
TOP = 100.0  # dB: rounding of float32 lies about here; beyond it the scale says nothing more
A, B = "#3b6fb0", "#c9742a"  # blue and orange: told apart by all eyes, and by their lightness


def overview(c: Any, *, limit: int | None = 120, page: int = 1) -> Figure:
    """Signal to noise, cosine and saturation of each layer, one below the other in the order they run."""
    everything = list(c.layers.values())
    chosen = plots.select(np.zeros((len(everything), 1)), limit=limit, page=page)
    rows = [everything[i] for i in chosen.channels]
    quantised = any(s is not None for r in rows for s in r.saturation)
    names = 330
    widths = [460, 300, *([240] if quantised else [])]
    gap = 46
    total = plots.MARGIN + names + sum(widths) + gap * len(widths) + plots.MARGIN
    notes = [
        f"{c.count} image{'s' * (c.count != 1)}; a is the reference",
        f"dashed: {c.threshold:g} dB" + ("" if c.divergence is None else f"; they part at {c.divergence.layer.a}"),
        chosen.text.replace("channels", "layers"),
    ]
    heading = plots.Heading.wrapped(f"{c.a} (a) and {c.b} (b), layer by layer", notes, total - 2 * plots.MARGIN)
    top = plots.MARGIN + heading.height + 34
    height = LINE * len(rows)
    sheet = plots.Sheet(total, top + height + 74 + plots.MARGIN)
    sheet.heading(heading)
    left = plots.MARGIN + names
    axes = []
    for width in widths:
        axes.append(sheet.axes(left, top, width, height))
        left += width + gap
    at = np.arange(len(rows))
    for ax in axes:
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.set_yticks(at, [""] * len(rows))
        ax.tick_params(axis="y", length=0)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_axisbelow(True)
        ax.grid(axis="x", color="#e6e6e4", linewidth=0.5)
        if c.divergence is not None and c.divergence.layer in rows:
            y = rows.index(c.divergence.layer)
            ax.axhspan(y - 0.5, y + 0.5, color="#fbe9c6", zorder=0)
    labels = [plots.shorten(r.a if r.a == r.b else f"{r.a} | {r.b}", names - 10, 5.5) for r in rows]
    axes[0].set_yticks(at, labels, parse_math=False)
    _draw_ratio(axes[0], rows, at, c.threshold)
    _draw_cosine(axes[1], rows, at)
    if quantised:
        _draw_saturation(axes[2], rows, at)
    return sheet.figure


def _draw_ratio(ax: Any, rows: Sequence[Any], at: np.ndarray, threshold: float) -> None:
    db = np.array([r.sqnr for r in rows])
    finite = np.isfinite(db)
    high = max(threshold + 10, min(TOP, float(db[finite].max(initial=0)) + 5))
    low = min(0.0, max(-40.0, float(db[finite].min(initial=0)) - 3))
    shown = np.clip(np.where(np.isnan(db), low, db), low, high)
    ax.hlines(at, low, shown, color="#d3d8de", linewidth=1.2)
    marks: dict[str, Any] = {"linestyle": "none", "markersize": 3.4, "clip_on": False}
    below, equal = db < threshold, db == np.inf
    ax.plot(shown[~below & ~equal], at[~below & ~equal], "o", color=A, label="at or above the threshold", **marks)
    ax.plot(shown[below], at[below], "D", color=B, label="below it", **marks)
    ax.plot(shown[equal], at[equal], "o", markerfacecolor="white", color=A, label="equal in both", **marks)
    ax.axvline(threshold, color=plots.INK, linewidth=0.6, linestyle=(0, (4, 3)))
    ax.set_xlim(low, high)
    ax.set_xlabel("signal to noise, dB", fontsize=6.5, color=plots.FAINT)
    _legend(ax)


def _draw_cosine(ax: Any, rows: Sequence[Any], at: np.ndarray) -> None:
    far = np.array([1 - r.cosine for r in rows])
    shown = np.clip(np.nan_to_num(far, nan=2.0), 1e-10, 2)
    ax.set_xscale("log")
    low = 10.0 ** math.floor(math.log10(max(shown[far > 0].min(initial=1e-2), 1e-10)))
    high = 10.0 ** math.ceil(math.log10(max(float(shown.max(initial=low)), 10 * low)))
    ax.set_xlim(max(low, 1e-10), high)
    exact = far <= 0
    marks: dict[str, Any] = {"linestyle": "none", "markersize": 3.4, "clip_on": False}
    ax.plot(shown[~exact], at[~exact], "o", color=A, **marks)
    ax.plot(np.full(exact.sum(), max(low, 1e-10)), at[exact], "o", markerfacecolor="white", color=A, **marks)
    ax.set_xlabel("1 - cosine (hollow: cosine is 1)", fontsize=6.5, color=plots.FAINT)


def _draw_saturation(ax: Any, rows: Sequence[Any], at: np.ndarray) -> None:
    for side, (letter, paint, move) in enumerate((("a", A, -0.18), ("b", B, 0.18))):
        share = [r.saturation[side] for r in rows]
        if any(s is not None for s in share):
            values = [100 * (s or 0) for s in share]
            ax.barh(at + move, values, height=0.34, color=paint, label=letter, hatch="" if side == 0 else "////",
                    edgecolor="white", linewidth=0)  # fmt: skip
    ax.set_xlim(left=0)
    ax.set_xlabel("saturated values, %", fontsize=6.5, color=plots.FAINT)
    _legend(ax)


def _legend(ax: Any) -> None:
    ax.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=5.5, frameon=False, borderpad=0.1, handletextpad=0.2,
        columnspacing=1,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# One layer


def layer(c: Any, row: Any, *, scale: str = "each") -> Figure:
    """The worst channels of a layer: a and b on one scale, and b - a on a diverging one around zero."""
    if scale not in plots.SCALES:
        raise errors.unknown("scale", scale, plots.SCALES)
    title = row.a if row.a == row.b else f"{row.a} (a) and {row.b} (b)"
    title += f": {'equal in both' if row.equal else f'{row.sqnr:.1f} dB of signal to noise'}"
    if row.shown is None:
        return _channels(c, row, title)
    channels, a, b = row.shown
    both = [np.stack(pair) for pair in zip(a, b, strict=True)]
    signed = color.is_signed(np.stack(both))
    shared = color.scale(np.stack(both), signed=signed) if scale == "shared" else None
    largest = color.scale(b - a, signed=True) if scale == "shared" else None
    name = c.pictures[c.shown_picture].name if c.pictures else f"image {c.shown_picture}"
    of = "one for all channels shown" if shared else "one a channel"
    notes = [
        name,
        "a and b on one scale" + (f", {of}" if len(channels) > 1 else ""),
        "b - a: red where b is higher, blue where it is lower, its own scale",
        f"the {len(channels)} worst of {row.shape[0]} channels" if len(channels) > 1 else "",
    ]
    box, gap, caption, bar, side = 250, 30, 26, 42, 190
    total = 2 * plots.MARGIN + side + 3 * box + 2 * gap
    heading = plots.Heading.wrapped(title, notes, total - 2 * plots.MARGIN)
    top = plots.MARGIN + heading.height
    drawn = []
    for k, (x, y) in enumerate(zip(a, b, strict=True)):
        one = shared or color.scale(both[k], signed=signed)
        apart = largest or color.scale(y - x, signed=True)
        panels = [(color.paint(v, s), s) for v, s in ((x, one), (y, one), (y - x, apart))]
        fitted = [(plots.fit(p, box, box), s) for p, s in panels]
        drawn.append([(color.dead(*p.shape[:2]) if s.blank else p, s) for p, s in fitted])
    heights = [max(30, *(p.shape[0] for p, _ in panels)) for panels in drawn]
    sheet = plots.Sheet(total, top + caption + sum(h + bar + 14 for h in heights) + plots.MARGIN)
    sheet.heading(heading)
    for i, said in enumerate(("a", "b", "b - a")):
        sheet.text(plots.MARGIN + side + i * (box + gap), top, said, weight="bold")
    top += caption
    picture = _small(c.pictures[c.shown_picture]) if c.pictures and heights[0] >= 200 else None
    if picture is not None:
        sheet.image(plots.MARGIN, top + 84, plots.fit(picture, side - 30, heights[0] - 90))
    db = row.channel_sqnr
    for k, (panels, height) in enumerate(zip(drawn, heights, strict=True)):
        channel = int(channels[k])
        other = "" if row.order is None else f"\n{row.order[channel]} in b"
        ratio = "equal" if db[channel] == np.inf else f"{db[channel]:.1f} dB"
        sheet.text(plots.MARGIN, top, f"channel {channel}{other}\n{ratio} over all\nimages")
        for i, (pixels, s) in enumerate(panels):
            left = plots.MARGIN + side + i * (box + gap)
            sheet.image(left, top, pixels)
            plots._draw_bar(sheet, left, top + pixels.shape[0] + 6, pixels.shape[1], s, "map")
        top += height + bar + 14
    return sheet.figure


def _channels(c: Any, row: Any, title: str) -> Figure:
    """A layer without maps: the signal to noise of each of its channels."""
    heading = plots.Heading.wrapped(title, [f"{row.shape[0]} channels, {c.count} images"], 1000)
    top = plots.MARGIN + heading.height
    sheet = plots.Sheet(1000 + 2 * plots.MARGIN, top + 300 + 70 + plots.MARGIN)
    sheet.heading(heading)
    ax = sheet.axes(plots.MARGIN + 70, top, 900, 290)
    db = row.channel_sqnr
    at = np.arange(len(db))
    finite = np.isfinite(db)
    ax.plot(at[finite], db[finite], "o", color=A, markersize=2.5)
    ax.axhline(c.threshold, color=plots.INK, linewidth=0.6, linestyle=(0, (4, 3)))
    if not finite.all():
        sheet.text(plots.MARGIN + 80, top + 4, f"{(~finite).sum()} channels are equal or zero in a: not drawn", 5.5)
    ax.set_xlabel("channel", fontsize=6.5, color=plots.FAINT)
    ax.set_ylabel("signal to noise, dB", fontsize=6.5, color=plots.FAINT)
    ax.spines[["top", "right"]].set_visible(False)
    return sheet.figure


# ---------------------------------------------------------------------------------------------------------------------
# Reasons


def reasons(c: Any) -> Figure:
    """The pictures on which the two saliency maps are least alike: the picture, a's map, b's map."""

    def says(panel: Any, answer: str) -> str:
        return f", says {answer}" if answer and not panel.caption.endswith(f": {answer}") else ""

    rows = []
    for i, (a, b) in c.reasons.kept.items():
        alike = f"correlation {c.reasons.correlation[i]:.2f}".replace("nan", "unknown")
        panels = [s._panel(0, which, "heat", None, 0) for s, which in ((a, "a"), (b, "b"))]
        said = ["", ""] if c.predictions is None else [c.predictions.label(k, i) for k in (0, 1)]
        panels = [plots.Panel(f"{p.caption}{says(p, t)}", p.pixels, p.scale) for p, t in zip(panels, said, strict=True)]
        picture = _small(a.pictures[0])
        if picture is None:
            picture = np.full((32, 32, 3), 128, np.uint8)
        rows.append([plots.Panel(f"{a.pictures[0].name}: {alike}", picture), *panels])
    r = c.reasons
    notes = [
        f"a is {c.a}, b is {c.b}",
        f"compared on {r.grid}",
        "each map on its own scale",
        f"the {len(rows)} least alike of {len(r.correlation)}" if len(r.correlation) > len(rows) else "",
    ]
    return plots.saliency(rows, title=f"Reasons by {r.method}{r._at()}", notes=notes)


def _small(picture: Any) -> np.ndarray | None:
    """The picture (H, W, 3) with at most 640 pixels a side; None if there is nothing to look at."""
    try:
        image = picture.display().convert("RGB")
    except (errors.InputError, OSError):  # came without pixels, or its file has gone since
        return None
    image.thumbnail((640, 640))
    return np.asarray(image)
