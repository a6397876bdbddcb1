"""What comes out: feature maps, saliency, predictions, sensitivity: values, where they come from, and how they look.

Results are frozen data. `repr` is one line, `plot` draws and returns the result (`.figure` is what it drew; a notebook
shows it), `save` writes by suffix: .png .pdf .svg a picture, .npz .safetensors the values with their provenance, which
`load` reads again. A record is plain arrays and JSON: no file of ours runs code when it is opened.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from innersight import errors, localize, storage
from innersight.draw import color

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

    from innersight.images import Picture

FORMAT = 1  # of the record; a reader refuses a later one
KEPT_SIDE = 1024  # pictures are kept with a result up to this many pixels a side
SHOWN_SIDE = 640  # and drawn into figures from no more than this


# ---------------------------------------------------------------------------------------------------------------------
# Provenance


@dataclass(frozen=True)
class Provenance:
    """How a result came about; with the images it can be computed again from this alone.

    network:  the name the network was opened by
    options:  the method's options, as they were used
    notes:    what was chosen without being asked for, a sentence each, with the keyword that changes it
    versions: of the packages that computed it
    """

    network: str = ""
    method: str | None = None
    layer: str | tuple[str, ...] | None = None
    target: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As JSON knows it."""
        return {f.name: jsonable(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Provenance:
        """The provenance that `to_json` wrote; what a later version added is left aside."""
        known = {f.name: data[f.name] for f in dataclasses.fields(cls) if f.name in data}
        known["notes"] = tuple(known.get("notes", ()))
        if isinstance(known.get("layer"), list):
            known["layer"] = tuple(known["layer"])
        return cls(**known)


def jsonable(value: Any) -> Any:
    """Anything as JSON can hold it: arrays as lists, numbers that are none as null, strange objects as their text."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes):
        return [jsonable(v) for v in value]
    if hasattr(value, "to_json"):
        return jsonable(value.to_json())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return str(value)


# ---------------------------------------------------------------------------------------------------------------------
# What all results share


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """A result: arrays, the pictures they belong to, and their provenance."""

    KIND: ClassVar[str] = ""

    if TYPE_CHECKING:  # each kind has both

        @property
        def pictures(self) -> list[Picture]: ...
        @property
        def provenance(self) -> Provenance: ...

    @property
    def figure(self) -> Figure | None:
        """What `plot` drew last (the first of several); None before."""
        return self.figures[0] if self.figures else None

    @property
    def figures(self) -> list[Figure]:
        """All that `plot` drew last."""
        return list(self.__dict__.get("_figures", ()))

    def _drawn(self, *figures: Figure) -> Self:
        # the last drawing is no part of the frozen data: no field, and never compared, saved or sent
        self.__dict__["_figures"] = figures
        return self

    def to_json(self) -> dict[str, Any]:
        """A summary for machines: shapes, ranges and provenance, without the values."""
        summary = {"result": self.KIND, "summary": repr(self), **self._summary()}
        return jsonable({**summary, "provenance": self.provenance})

    def _summary(self) -> dict[str, Any]:
        raise NotImplementedError

    def _arrays(self) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def _about(self) -> dict[str, Any]:
        """What `_restored` needs besides the arrays; becomes JSON."""
        raise NotImplementedError

    @classmethod
    def _restored(cls, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any], **common: Any) -> Self:
        raise NotImplementedError

    def record(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The result as named arrays and one JSON object, for disk and for sending; `from_record` reads it.

        Pictures go along as far as drawing needs them: at most 1024 pixels a side.
        """
        arrays = self._arrays()
        pictures = []
        for i, picture in enumerate(self.pictures):
            small = reduced(picture, KEPT_SIDE)
            if small is not None:
                arrays[f"pictures/{i}"] = np.asarray(small.original)
            pictures.append(
                {
                    "name": picture.name,
                    "to_input": (small or picture).to_input,
                    "input_size": picture.input_size,
                    "label": picture.label,
                    "size": picture.original_size,
                }
            )
        head = {"innersight": FORMAT, "result": self.KIND, "provenance": self.provenance}
        return arrays, jsonable({**head, "pictures": pictures, **self._about()})

    def save(self, path: str | os.PathLike, **drawing: Any) -> list[Path]:
        """Write by suffix: .png .pdf .svg what `plot(**drawing)` draws; .npz .safetensors the values, for `load`.

        Returns the files written.
        """
        path = Path(path)
        if path.suffix.lower() in storage.STORED:
            if drawing:
                raise errors.InputError(f"{', '.join(drawing)}: for pictures only; {path.suffix} holds the values")
            return [storage.store(path, *self.record())]
        storage.check_suffix(path)
        return self._save_drawn(path, **drawing)

    def _save_drawn(self, path: Path, **drawing: Any) -> list[Path]:
        storage.check_place(path)
        before = self.figures
        self.plot(**drawing)  # type: ignore[attr-defined]
        figures = self.figures
        self._drawn(*before)
        return [storage.write_figures(path, figures)]

    def _repr_html_(self) -> str:
        if self.figures:
            from innersight.draw import plots

            inside = "".join(_img(plots.png(f), f.get_figwidth() * 100) for f in self.figures[:8])
        else:
            inside = self._html()
        return f"<div><p><code>{html.escape(repr(self))}</code></p>{inside}</div>"

    def _html(self) -> str:
        return ""


def _of(provenance: Provenance) -> str:
    return f" of {provenance.network}" if provenance.network else ""


def _range(*arrays: np.ndarray) -> str:
    ends = [color.extremes(a) for a in arrays if a.size]
    if not ends:
        return "no values"
    missing = sum(int(np.isnan(a).sum()) for a in arrays if a.dtype.kind == "f")
    text = f"{color.number(min(e[0] for e in ends))} to {color.number(max(e[1] for e in ends))}"
    return f"{text}, {missing} NaN" if missing else text


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _img(data: bytes, width: float) -> str:
    return f'<img style="max-width:100%" width="{width:.0f}" src="data:image/png;base64,{_base64(data)}">'


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _pick(index: int, count: int) -> int:
    if not -count <= index < count:
        there = f"there are 0 to {count - 1}" if count > 1 else f"there is {'only 0' if count else 'none'}"
        raise errors.InputError(f"no image {index}: {there}")
    return index % count


def _check_pictures(values: np.ndarray, pictures: Sequence[Picture], what: str) -> None:
    if len(values) != len(pictures):
        raise ValueError(f"{what} for {len(values)} images, but {len(pictures)} pictures")


def _check_targets(values: np.ndarray, targets: Sequence[str]) -> None:
    if targets and len(values) != len(targets):
        raise ValueError(f"{len(targets)} targets for {len(values)} images")


def reduced(picture: Picture, side: int) -> Picture | None:
    """The picture with at most `side` pixels a side and its geometry with it; None if there is nothing to look at."""
    from PIL import Image

    from innersight.images import Picture

    try:
        original = picture.display()
    except (errors.InputError, OSError):  # came without pixels, or its file has gone since
        return None
    if original.mode not in ("L", "RGB"):
        original = original.convert("RGB")
    w, h = original.size
    if max(w, h) > side:
        factor = side / max(w, h)
        small = max(1, round(w * factor)), max(1, round(h * factor))
        original = original.resize(small, Image.Resampling.LANCZOS, reducing_gap=3.0)
    sx, sy, tx, ty = picture.to_input
    to_input = (sx * w / original.width, sy * h / original.height, tx, ty)
    return Picture(picture.name, original, to_input, picture.input_size, picture.label)


def _pixels(picture: Picture, side: int) -> np.ndarray | None:
    small = reduced(picture, side)
    return None if small is None or small.original is None else np.asarray(small.original.convert("RGB"))


# ---------------------------------------------------------------------------------------------------------------------
# Feature maps


@dataclass(frozen=True, eq=False, repr=False)
class FeatureMaps(Result, Mapping[str, np.ndarray]):
    """What layers put out: a mapping from a layer's name to its values, (N, C, H, W) as a rule.

    Layers without a grid hold (N, K), those of video (N, C, T, H, W).
    layers: what is known of each layer, by name

    >>> maps["conv1"].shape                                             # doctest: +SKIP
    (1, 16, 24, 24)
    """

    KIND: ClassVar[str] = "FeatureMaps"

    arrays: Mapping[str, np.ndarray]
    pictures: list[Picture]
    layers: Mapping[str, Any] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        for name, values in self.arrays.items():
            _check_pictures(values, self.pictures, name)

    __eq__ = object.__eq__  # a mapping of arrays has no truth value to compare by
    __hash__ = object.__hash__

    def __getitem__(self, layer: str) -> np.ndarray:
        if layer in self.arrays:
            return self.arrays[layer]
        raise errors.unknown("layer", layer, self.arrays, " among these maps")

    def __contains__(self, layer: object) -> bool:
        return layer in self.arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def __repr__(self) -> str:
        shown = [f"{name} {_times(v.shape[1:])}" for name, v in self.items()]
        names = ", ".join(shown if len(shown) <= 3 else [shown[0], "...", shown[-1]])
        head = (
            f"FeatureMaps{_of(self.provenance)}: {_count(len(self), 'layer')} for {_count(len(self.pictures), 'image')}"
        )
        return f"<{head} ({names}), {_range(*self.values())}>"

    def plot(
        self,
        layer: str | None = None,
        *,
        image: int = 0,
        columns: int | None = None,
        scale: str = "each",
        order: str = "index",
        limit: int | None = 256,
        page: int = 1,
        ax: Axes | None = None,
    ) -> FeatureMaps:
        """Draw the maps of one image as a grid, a figure for each layer (None: all that can be drawn).

        columns: of the grid; None makes it about square
        scale:   "each": every map on its own scale; "shared": all maps of the layer on one, with a bar
        order:   "index", or "activation": the most active first (root mean square)
        limit, page: at most this many maps on a page, and which page; limit=None draws all
        ax:      matplotlib axes to draw the grid of one layer into, instead of a new figure
        """
        image = _pick(image, len(self.pictures))
        names = self._drawable(layer)
        if ax is not None and len(names) != 1:
            raise errors.InputError(f"one set of axes holds one layer: name one of {', '.join(names[:8])}")
        options = {"columns": columns, "scale": scale, "order": order, "limit": limit, "page": page, "ax": ax}
        pixels = _pixels(self.pictures[image], SHOWN_SIDE)
        return self._drawn(*(self._plot_layer(name, image, pixels, options) for name in names))

    def _drawable(self, layer: str | None) -> list[str]:
        if layer is None:
            return [name for name, values in self.items() if values.ndim in (2, 4)] or list(self)
        self[layer]  # or the error that names the nearest
        return [layer]

    def _plot_layer(self, name: str, image: int, pixels: np.ndarray | None, options: dict[str, Any]) -> Figure:
        from innersight.draw import plots

        values, picture = self[name][image], self.pictures[image]
        notes = [self.provenance.network, f"{picture.name} ({image + 1} of {len(self.pictures)})"]
        common: dict[str, Any] = {"title": name, "notes": notes, "picture": pixels, "caption": picture.name}
        kept = (self.layers.get(name) or {}).get("quantised")
        if kept is not None:
            notes.append(f"{kept['dtype']}, scale {color.number(kept['scale'][0])}, zero point {kept['zero_point']}")
        if values.ndim == 3:
            return plots.maps(values, saturated=None if kept is None else saturated(values, kept), **common, **options)
        if values.ndim == 1:
            return plots.vector(values, **common, ax=options["ax"])
        raise errors.InputError(
            f"layer {name!r} holds {_times(values.shape)} values an image; "
            "what can be drawn is channels x height x width, or a vector"
        )

    def _save_drawn(self, path: Path, **drawing: Any) -> list[Path]:
        """One file for each layer and image: maps_conv1.png, maps_relu.png; PDF: one file with a page for each.

        With one layer and one image the file is called as asked.
        """
        storage.check_place(path)
        layer = drawing.pop("layer", None)
        images = [_pick(drawing.pop("image"), len(self.pictures))] if "image" in drawing else range(len(self.pictures))
        names = self._drawable(layer)
        parts = dict(zip(names, _file_parts(names), strict=True)) if len(names) > 1 else {}
        before, written, pages = self.figures, [], []
        try:
            for i in images:
                for name in names:
                    self.plot(name, image=i, **drawing)
                    if path.suffix.lower() == ".pdf":
                        pages += self.figures
                        continue
                    stem = [path.stem, *([parts[name]] if parts else []), *([str(i)] if len(images) > 1 else [])]
                    written.append(storage.write_figures(path.with_stem("_".join(stem)), self.figures))
        finally:
            self._drawn(*before)
        return [*written, storage.write_figures(path, pages)] if pages else written

    def _summary(self) -> dict[str, Any]:
        return {"images": [p.name for p in self.pictures], "layers": {n: self._layer_summary(n) for n in self}}

    def _layer_summary(self, name: str) -> dict[str, Any]:
        values = self[name]
        low, high = color.extremes(values)
        summary = {"shape": values.shape, "minimum": low, "maximum": high, "mean": float(values.mean(dtype=np.float64))}
        if values.ndim >= 3:
            inner = tuple(range(2, values.ndim))
            silent = ~(values != 0).any(inner)
            summary["dead"] = np.flatnonzero(silent.all(0))  # channels that are zero everywhere, for all images
        return summary

    def _arrays(self) -> dict[str, np.ndarray]:
        return {f"values/{name}": values for name, values in self.items()}

    def _about(self) -> dict[str, Any]:
        return {"names": list(self), "layers": self.layers}

    @classmethod
    def _restored(cls, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any], **common: Any) -> Self:
        values = {name: arrays[f"values/{name}"] for name in about["names"]}
        return cls(values, layers=about.get("layers") or {}, **common)

    def _html(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{_times(v.shape)}</td><td>{html.escape(_range(v))}</td></tr>"
            for name, v in list(self.items())[:40]
        )
        more = f"<p>and {len(self) - 40} more layers</p>" if len(self) > 40 else ""
        return f"<table><tr><th>layer</th><th>shape</th><th>values</th></tr>{rows}</table>{more}"


def saturated(values: np.ndarray, kept: Mapping[str, Any]) -> np.ndarray:
    """Which values of a quantised layer are cut off at an end of its range; the zeros of a fused ReLU are not.

    kept: the layer's quantisation as its record holds it: scale, zero_point, lo, hi
    """
    whole = np.rint(values / kept["scale"][0]) + kept["zero_point"]
    above, below = whole >= kept["hi"], whole <= kept["lo"]
    return above if kept["lo"] == kept["zero_point"] else above | below


def _file_parts(names: Sequence[str]) -> list[str]:
    """Layer names as parts of file names, no two alike."""
    parts: list[str] = []
    for name in names:
        part = re.sub(r"[^\w.-]+", "_", name).strip("._") or "layer"
        same = sum(p == part or p.startswith(f"{part}~") for p in parts)
        parts.append(f"{part}~{same + 1}" if same else part)
    return parts


# ---------------------------------------------------------------------------------------------------------------------
# Saliency


@dataclass(frozen=True, eq=False, repr=False)
class Saliency(Result):
    """What in the images drove the target: maps over the input, raw and signed as the method defines them.

    values:  (N, H, W) on the input; (N, C, H, W) if color channels were kept
    signed:  whether below zero means "against the target"
    targets: what was explained, in words, for each image
    verdict: what the map's own evidence is worth, "reference" is the size beside which values count as nothing
    coarse:  (N, h, w), the map of an inner layer on its own grid, before it was laid over the input
    unit:    what a value says, for the scale
    """

    KIND: ClassVar[str] = "Saliency"

    values: np.ndarray
    pictures: list[Picture]
    signed: bool
    provenance: Provenance = field(default_factory=Provenance)
    targets: list[str] = field(default_factory=list)
    verdict: Mapping[str, Any] = field(default_factory=dict)
    coarse: np.ndarray | None = None
    unit: str = ""

    def __post_init__(self) -> None:
        if self.values.ndim not in (3, 4):
            raise ValueError(f"saliency is (N, H, W) or (N, C, H, W), not {self.values.shape}")
        _check_pictures(self.values, self.pictures, "saliency")
        _check_targets(self.values, self.targets)

    def __repr__(self) -> str:
        p = self.provenance
        layer = f" at {_layer_text(p)}" if p.layer else ""
        names = list(dict.fromkeys(self.targets))
        target = f" for {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else ""
        size = f"{_count(len(self.values), 'image')} of {_times(self.values.shape[1:])}"
        return f"<Saliency {p.method or ''}{_of(p)}{layer}{target}: {size}, {_range(self.values)}>"

    @property
    def grid(self) -> tuple[int, int] | None:
        """(h, w) of the layer's own grid, for maps of inner layers."""
        return None if self.coarse is None else (self.coarse.shape[1], self.coarse.shape[2])

    @property
    def maps(self) -> np.ndarray:
        """(N, H, W): kept color channels brought to one map, by their sum if signed, by the largest otherwise."""
        if self.values.ndim == 3:
            return self.values
        return self.values.sum(1) if self.signed else self.values.max(1)

    def scale(self, image: int | None = None, *, smooth: float = 0) -> color.Scale:
        """The scale an image is drawn with, or all images together (None).

        Values at most a millionth of verdict["reference"] (1 if it says nothing, the size of an ordinary score) are
        drawn blank, not stretched until they glow.
        """
        maps = self.maps if image is None else self.maps[_pick(image, len(self.pictures))][None]
        maps = np.stack([color.smooth(m, smooth) for m in maps]) if smooth else maps
        return color.scale(maps, signed=self.signed, reference=float(self.verdict.get("reference", 1.0)))

    def overlay(self, style: str = "heat", *, scale: str = "each", smooth: float = 0) -> list[Image.Image]:
        """Each map on its original picture, in the original's size.

        style:  "heat": colors over the dimmed gray picture, the more opaque the higher; "spotlight": the picture, lit
                where the map is high (best for coarse maps); "map": the colors alone
        scale:  "each" image on its own scale, or one "shared" by all
        smooth: standard deviation of a blur in pixels of the input, for the eye only
        """
        from PIL import Image

        shared = self._shared(scale, smooth)
        return [
            Image.fromarray(self._overlay(i, p, style, shared or self.scale(i, smooth=smooth), smooth))
            for i, p in enumerate(self.pictures)
        ]

    def mask(self, threshold: float | None = None, method: str = "max", *, smooth: float = 0) -> list[np.ndarray]:
        """Where each picture speaks for the target: (H0, W0) bool, on the original picture as people see it.

        threshold, method: "max": at least this share of the maximum on the picture, default 0.2 (Zhou et al., Learning
            Deep Features for Discriminative Localization, CVPR 2016); "energy": the fewest pixels that hold this share
            of all positive values, default 0.5; "percentile": what exceeds it, default 95 (Simonyan et al., 2013)
        smooth: standard deviation of a blur in pixels of the input; maps that mark single pixels need some

        False outside of what the network saw, and everywhere for a map that tells no place from another.
        """
        value = localize.check(threshold, method)
        return [localize.mask(self._evidence(i, smooth), value, method) for i in range(len(self))]

    def boxes(
        self,
        threshold: float | None = None,
        method: str = "max",
        *,
        smooth: float = 0,
        limit: int | None = None,
    ) -> list[list[localize.Box]]:
        """For each picture the boxes around the connected parts of its `mask`, the largest part first.

        The first is the object's box by Zhou et al., CVPR 2016. On the original picture, in pixels: (left, top, right,
        bottom, score), the score being the share of all positive values that the part holds. No box for a map that
        tells no place from another. After `load` of a result of large pictures: on the picture as it was kept.

        limit: at most this many for a picture
        """
        value = localize.check(threshold, method)
        if limit is not None and limit < 1:
            raise errors.InputError(f"limit={limit}: at least one box; limit=None for all of them")
        found = []
        for i in range(len(self)):
            evidence = self._evidence(i, smooth)
            found.append(localize.boxes(evidence, localize.mask(evidence, value, method), limit))
        return found

    def _evidence(self, i: int, smooth: float) -> np.ndarray:
        """(H0, W0): a map on its original picture; zero if there is nothing in it."""
        if self.scale(i).blank:
            height, width = self.pictures[i].original_size or self.pictures[i].input_size
            return np.zeros((height, width), np.float32)
        return self.pictures[i].back(color.smooth(self.maps[i], smooth))

    def _shared(self, scale: str, smooth: float) -> color.Scale | None:
        from innersight.draw import plots

        if scale not in plots.SCALES:
            raise errors.unknown("scale", scale, plots.SCALES)
        return self.scale(smooth=smooth) if scale == "shared" else None

    def _overlay(self, i: int, picture: Picture, style: str, scale: color.Scale, smooth: float) -> np.ndarray:
        values = picture.back(color.smooth(self.maps[i], smooth))
        try:
            pixels = np.asarray(picture.display().convert("RGB"))
        except errors.InputError:
            pixels = np.full((*values.shape, 3), 128, np.uint8)  # nothing to look at: the map over plain gray
        return color.overlay(pixels, values, scale, style=style)

    def plot(
        self,
        *,
        style: str = "heat",
        scale: str = "each",
        smooth: float = 0,
        boxes: int = 0,
        limit: int | None = 16,
        page: int = 1,
        ax: Axes | None = None,
    ) -> Saliency:
        """Draw each picture beside its overlay, with the scale below; options as in `overlay`.

        boxes: draw this many of `boxes(smooth=smooth)` on each picture; True for the largest one
        limit, page: at most this many images on a page, and which page
        ax: matplotlib axes to draw the overlay of a single image into, instead of a new figure
        """
        if ax is None:
            name = self.provenance.method or "saliency"
            return self._drawn(_saliency_figure({name: self}, style, scale, smooth, boxes, limit, page))
        from innersight.draw import plots

        if len(self.pictures) != 1:
            raise errors.InputError(
                f"one set of axes holds one image, and there are {len(self.pictures)}: pick one by [i]"
            )
        name = self.provenance.method or "saliency"
        panel = self._panel(0, name, style, self._shared(scale, smooth), smooth, boxes)
        return self._drawn(plots.saliency_on(ax, panel))

    def __getitem__(self, image: int) -> Saliency:
        """The result for one image alone."""
        i = _pick(image, len(self.pictures))
        one = slice(i, i + 1)
        verdict = {k: v[one] if isinstance(v, list) and len(v) == len(self) else v for k, v in self.verdict.items()}
        return dataclasses.replace(
            self, values=self.values[one], pictures=self.pictures[one], targets=self.targets[one], verdict=verdict,
            coarse=None if self.coarse is None else self.coarse[one],
        )  # fmt: skip

    def __iter__(self) -> Iterator[Saliency]:
        return (self[i] for i in range(len(self)))

    def __len__(self) -> int:
        return len(self.values)

    def _panel(self, i: int, name: str, style: str, shared: color.Scale | None, smooth: float, boxes: int = 0) -> Any:
        from innersight.draw import plots

        scale = shared or self.scale(i, smooth=smooth)
        picture = reduced(self.pictures[i], SHOWN_SIDE) or self.pictures[i]
        caption = f"{name}: {self.targets[i]}" if self.targets else name
        return plots.Panel(
            caption, self._overlay(i, picture, style, scale, smooth), scale, self._shares(i, smooth, boxes)
        )

    def _shares(self, i: int, smooth: float, limit: int) -> tuple[tuple[float, float, float, float], ...]:
        """Boxes of one picture in shares of its sides, for drawing on it in any size."""
        if not limit:
            return ()
        height, width = self.pictures[i].original_size or self.pictures[i].input_size
        found = self[i].boxes(smooth=smooth, limit=int(limit))[0]
        return tuple((b.left / width, b.top / height, b.right / width, b.bottom / height) for b in found)

    def _summary(self) -> dict[str, Any]:
        maps = self.maps
        images = []
        for i, picture in enumerate(self.pictures):
            low, high = color.extremes(maps[i])
            y, x = np.unravel_index(int(np.argmax(np.nan_to_num(np.abs(maps[i])))), maps[i].shape)
            images.append(
                {
                    "name": picture.name,
                    "target": self.targets[i] if self.targets else None,
                    "minimum": low,
                    "maximum": high,
                    "sum": float(maps[i].sum(dtype=np.float64)),
                    "peak": {"y": y, "x": x},  # on the input
                    "scale": str(self.scale(i)),
                }
            )
        about = {"shape": self.values.shape, "signed": self.signed, "unit": self.unit, "grid": self.grid}
        return {**about, "images": images, "verdict": self.verdict}

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"values": self.values} | ({} if self.coarse is None else {"coarse": self.coarse})

    def _about(self) -> dict[str, Any]:
        names = ("signed", "targets", "verdict", "unit")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def _restored(cls, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any], **common: Any) -> Self:
        rest = {name: about[name] for name in ("signed", "targets", "verdict", "unit")}
        return cls(arrays["values"], coarse=arrays.get("coarse"), **rest, **common)

    def _html(self) -> str:
        out = []
        for i in range(min(6, len(self))):
            panel = self._panel(i, self.pictures[i].name, "heat", None, 0)
            caption = html.escape(f"{panel.caption}, {panel.scale}")
            out.append(f'<figure style="display:inline-block;margin:4px">{_thumbnail(panel.pixels)}')
            out.append(f"<figcaption>{caption}</figcaption></figure>")
        return "".join(out)


def _thumbnail(pixels: np.ndarray) -> str:
    from PIL import Image

    from innersight.draw import plots

    buffer = io.BytesIO()
    shown = plots.fit(pixels, 220, 220)
    Image.fromarray(shown).save(buffer, "PNG")
    return _img(buffer.getvalue(), shown.shape[1])


def _layer_text(provenance: Provenance) -> str:
    layer = provenance.layer
    return layer if isinstance(layer, str) else ", ".join(layer or ())


FUSIONS: dict[str, Any] = {"mean": np.mean, "max": np.max}


def fused(maps: Iterable[Saliency], how: str = "mean") -> Saliency:
    """One map of those of several layers, each brought to 1 at its largest value first, image by image.

    how: "mean", as pytorch-grad-cam; "max", value by value (Jiang et al., LayerCAM, IEEE TIP 2021)
    """
    maps = list(maps)
    if how not in FUSIONS:
        raise errors.unknown("way to fuse layers", how, FUSIONS)
    if len({s.values.shape for s in maps}) != 1:
        raise errors.InputError("maps to fuse must be of the same images, all with or all without color channels")
    each = []
    for s in maps:
        top = np.abs(s.values).reshape(len(s.values), -1).max(1)
        each.append(s.values / np.where(top > 0, top, 1).reshape(-1, *[1] * (s.values.ndim - 1)))
    layers = [layer for s in maps for layer in ([s.provenance.layer] if isinstance(s.provenance.layer, str) else [])]
    notes = tuple(dict.fromkeys(note for s in maps for note in s.provenance.notes))
    return dataclasses.replace(
        maps[0], values=FUSIONS[how](np.stack(each), axis=0), coarse=None, signed=any(s.signed for s in maps),
        unit=f"{how} over {len(maps)} layers, each brought to 1",
        provenance=dataclasses.replace(maps[0].provenance, layer=tuple(layers), notes=notes),
    )  # fmt: skip


def plot_comparison(
    results: Mapping[str, Saliency],
    *,
    style: str = "heat",
    scale: str = "each",
    smooth: float = 0,
    boxes: int = 0,
    limit: int | None = 16,
    page: int = 1,
) -> Figure:
    """Several methods side by side: a row for each image, its picture first, then a map for each of `results`."""
    if not results:
        raise errors.InputError("nothing to compare: no results")
    sizes = {len(s) for s in results.values()}
    if len(sizes) > 1:
        raise errors.InputError(f"results to compare must be of the same images, not of {sizes} images")
    return _saliency_figure(results, style, scale, smooth, boxes, limit, page)


def _saliency_figure(
    results: Mapping[str, Saliency], style: str, scale: str, smooth: float, boxes: int, limit: int | None, page: int
) -> Figure:
    from innersight.draw import plots

    first = next(iter(results.values()))
    chosen = plots.select(np.zeros((len(first), 1)), limit=limit, page=page)
    shared = {name: s._shared(scale, smooth) for name, s in results.items()}
    rows = []
    for i in chosen.channels:
        picture = first.pictures[i]
        pixels = _pixels(picture, SHOWN_SIDE)
        row = [] if pixels is None else [plots.Panel(picture.name, pixels)]
        row += [s._panel(i, name, style, shared[name], smooth, boxes) for name, s in results.items()]
        rows.append(row)
    notes = [
        _style_text(style, {s.signed for s in results.values()}),
        "each map on its own scale" if scale == "each" else "one scale a method",
    ]
    notes += [f"{name}: {s.unit}" if len(results) > 1 else f"values: {s.unit}" for name, s in results.items() if s.unit]
    notes.append("box: around the largest connected part above 20% of the maximum" if boxes else "")
    notes += [f"smoothed by {smooth:g} pixels" if smooth else "", chosen.text.replace("channels", "images")]
    if len(results) == 1:
        layer = _layer_text(first.provenance)
        names = ", ".join(dict.fromkeys(first.targets))
        target = f" for {names if len(names) <= 60 else f'{len(set(first.targets))} targets'}" if names else ""
        title = f"{next(iter(results))}{_of(first.provenance)}{f' at {layer}' if layer else ''}{target}"
    else:
        title = f"{len(results)} methods{_of(first.provenance)}"
    return plots.saliency(rows, title=title, notes=notes, style=style)


def _style_text(style: str, signed: set[bool]) -> str:
    """What color or light says in a figure of maps with a sign (True), without (False), or of both kinds."""
    if style == "spotlight":
        return f"light: {'what speaks for the target, ' if True in signed else ''}0 to the 99.5th percentile"
    windows = [
        text for kind, text in ((False, "0 to the 99.5th percentile"), (True, "± that of |value|")) if kind in signed
    ]
    window = "± the 99.5th percentile of |value|" if signed == {True} else ", or ".join(windows)
    sides = " (blue against the target, red for it)" if True in signed else ""
    return f"{'color' if style == 'map' else 'color and opacity'}: {window}{sides}"


# ---------------------------------------------------------------------------------------------------------------------
# Predictions


@dataclass(frozen=True, eq=False, repr=False)
class Predictions(Result):
    """What the network answers: its raw output and, by the softmax, probabilities.

    logits: (N, K), the output as it came
    labels: class names by output index; None: the indices stand for themselves
    kind:   "logits", or "probabilities" if the network's own last operation makes them
    """

    KIND: ClassVar[str] = "Predictions"

    logits: np.ndarray
    labels: Sequence[str] | None = None
    pictures: list[Picture] = field(default_factory=list)
    kind: str = "logits"
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        if self.logits.ndim != 2:
            raise ValueError(f"predictions are (N, K), not {self.logits.shape}")
        if self.kind not in ("logits", "probabilities"):
            raise ValueError(f"kind is logits or probabilities, not {self.kind!r}")
        if self.pictures:
            _check_pictures(self.logits, self.pictures, "predictions")

    @property
    def probabilities(self) -> np.ndarray:
        """(N, K): the softmax of the logits, the logistic function for a single output, or the output as it is."""
        if self.kind == "probabilities":
            return self.logits
        x = self.logits.astype(np.float64)
        if x.shape[1] == 1:
            return (0.5 * (1 + np.tanh(x / 2))).astype(np.float32)
        e = np.exp(x - x.max(1, keepdims=True))
        return (e / e.sum(1, keepdims=True)).astype(np.float32)

    @property
    def classes(self) -> np.ndarray:
        """(N,): the index of the largest output of each image."""
        return self.logits.argmax(1)

    def label(self, index: int) -> str:
        """The name of a class, or its number where it has none."""
        return str(self.labels[index]) if self.labels is not None and index < len(self.labels) else f"class {index}"

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """For each image its k most probable classes, the most probable first: (label, probability)."""
        probabilities = self.probabilities
        order = np.argsort(-self.logits, axis=1, kind="stable")[:, : max(0, k)]
        return [[(self.label(c), float(p[c])) for c in row] for p, row in zip(probabilities, order, strict=True)]

    def __len__(self) -> int:
        return len(self.logits)

    def _names(self) -> list[str]:
        return [p.name for p in self.pictures] or [f"image {i}" for i in range(len(self))]

    def __repr__(self) -> str:
        n, k = self.logits.shape
        head = f"Predictions{_of(self.provenance)}: {_count(n, 'image')}, {k} class{'' if k == 1 else 'es'}"
        first = "; ".join(f"{t[0][0]} {t[0][1]:.3f}" for t in self.top(1)[:3] if t)
        return f"<{head}, {self.kind} {_range(self.logits)}; {first}{'; ...' if n > 3 else ''}>"

    def __str__(self) -> str:
        """A table: each image and its five most probable classes."""
        names = self._names()
        tops = self.top(5)
        cells = [[f"{label} {p:.3f}" for label, p in row] for row in tops]
        widths = [max((len(row[j]) for row in cells), default=0) for j in range(max(map(len, cells), default=0))]
        name_width = max(map(len, names), default=0)
        lines = (
            f"{name:<{name_width}}  " + "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True))
            for name, row in zip(names, cells, strict=True)
        )
        return "\n".join(line.rstrip() for line in lines)

    def plot(self, *, image: int = 0, ax: Axes | None = None) -> Predictions:
        """Draw the outputs of one image as bars, the largest three with their number."""
        from innersight.draw import plots

        i = _pick(image, len(self))
        label, p = self.top(1)[i][0]
        pixels = _pixels(self.pictures[i], SHOWN_SIDE) if self.pictures else None
        notes = [self.provenance.network, f"{label} {p:.3f}"]
        title = f"{self.kind} for {self._names()[i]}"
        common: dict[str, Any] = {"picture": pixels, "caption": self._names()[i], "ax": ax}
        return self._drawn(plots.vector(self.logits[i], title=title, notes=notes, **common))

    def _summary(self) -> dict[str, Any]:
        images = [
            {"name": name, "top": [{"label": label, "probability": p} for label, p in top]}
            for name, top in zip(self._names(), self.top(5), strict=True)
        ]
        for row, index in zip(images, self.classes, strict=True):
            row["class"] = index
        return {"shape": self.logits.shape, "kind": self.kind, "images": images}

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"logits": self.logits}

    def _about(self) -> dict[str, Any]:
        return {"labels": None if self.labels is None else list(self.labels), "kind": self.kind}

    @classmethod
    def _restored(cls, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any], **common: Any) -> Self:
        return cls(arrays["logits"], labels=about["labels"], kind=about["kind"], **common)

    def _html(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td>"
            + "".join(f"<td>{html.escape(label)} {p:.3f}</td>" for label, p in top)
            + "</tr>"
            for name, top in list(zip(self._names(), self.top(5), strict=True))[:40]
        )
        return f"<table>{rows}</table>"


# ---------------------------------------------------------------------------------------------------------------------
# Sensitivity


@dataclass(frozen=True, eq=False, repr=False)
class Sensitivity(Result):
    """How the target's score changes when a channel of a layer is removed: measured, not estimated.

    values: (N, C), the score without the channel minus the score with it: below zero, the channel speaks for the target
    scores: (N,), the score with all channels
    """

    KIND: ClassVar[str] = "Sensitivity"

    values: np.ndarray
    layer: str
    scores: np.ndarray
    pictures: list[Picture] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.scores.shape != self.values.shape[:1]:
            raise ValueError(f"sensitivity is (N, C) with (N,) scores, not {self.values.shape} and {self.scores.shape}")
        if self.pictures:
            _check_pictures(self.values, self.pictures, "sensitivity")
        _check_targets(self.values, self.targets)

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        names = list(dict.fromkeys(self.targets))
        target = f" for {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else ""
        n, c = self.values.shape
        size = f"{_count(c, 'channel')}, {_count(n, 'image')}"
        return f"<Sensitivity{_of(self.provenance)} at {self.layer}{target}: {size}, {_range(self.values)}>"

    def top(self, k: int = 5, *, image: int | None = None) -> list[tuple[int, float]]:
        """The k channels whose removal changes the score most: (channel, change), in one image or in the mean."""
        if image is None:
            change = self.values.mean(0, dtype=np.float64)
        else:
            change = self.values[_pick(image, len(self))]
        order = np.argsort(-np.abs(change), kind="stable")[: max(0, k)]
        return [(int(c), float(change[c])) for c in order]

    def plot(self, *, kind: str = "bars", limit: int | None = None, ax: Axes | None = None) -> Sensitivity:
        """Draw the channels that matter most.

        kind:  "bars": the mean over the images, with a dot for each; "matrix": images x channels as a heat map
        limit: at most this many channels; None: 20 bars, 40 columns
        """
        from innersight.draw import plots

        names = list(dict.fromkeys(self.targets))
        target = f" · score: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}" if names else ""
        title = f"Sensitivity{_of(self.provenance)} at {self.layer}{target}"
        mean = color.number(float(self.scores.mean(dtype=np.float64)))
        notes = [f"{'mean score' if len(self) > 1 else 'score'} with all channels: {mean}"]
        unit = "change of the score when the channel is removed"
        if kind == "bars":
            notes.append("below zero: the channel speaks for the target")
            return self._drawn(
                plots.changes(self.values, title=title, notes=notes, unit=unit, limit=limit or 20, ax=ax)
            )
        if kind != "matrix":
            raise errors.unknown("kind", kind, ("bars", "matrix"))
        notes.append(f"{unit}; blue: it speaks for the target")
        rows = [p.name for p in self.pictures] or [f"image {i}" for i in range(len(self))]
        return self._drawn(plots.matrix(self.values, title=title, rows=rows, notes=notes, limit=limit or 40, ax=ax))

    def _summary(self) -> dict[str, Any]:
        top = [{"channel": c, "change": v} for c, v in self.top(10)]
        names = [p.name for p in self.pictures]
        images = [
            {
                "name": names[i] if names else None,
                "target": self.targets[i] if self.targets else None,
                "score": self.scores[i],
                "top": [{"channel": c, "change": v} for c, v in self.top(5, image=i)],
            }
            for i in range(len(self))
        ]
        return {"layer": self.layer, "shape": self.values.shape, "top": top, "images": images}

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"values": self.values, "scores": self.scores}

    def _about(self) -> dict[str, Any]:
        return {"layer": self.layer, "targets": self.targets}

    @classmethod
    def _restored(cls, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any], **common: Any) -> Self:
        return cls(arrays["values"], about["layer"], arrays["scores"], targets=about["targets"], **common)

    def _html(self) -> str:
        rows = "".join(f"<tr><td>channel {c}</td><td>{color.number(v)}</td></tr>" for c, v in self.top(10))
        return f"<table><tr><th></th><th>change of the score without it</th></tr>{rows}</table>"


# ---------------------------------------------------------------------------------------------------------------------
# Maximization


@dataclass(frozen=True, eq=False, repr=False)
class Maximization(Result):
    """Pictures that classes or channels answer to most, and how far they raise them.

    values:  (K, H, W, 3 or 1), the pictures, 0..1
    inputs:  (K, C, H, W), the same as the network takes them: `net.predict(found.inputs)`
    units:   what each is the picture of, in words
    history: (K, steps), the activation in each step of the search
    verdict: for each picture its "activation", the "rise" of that over random pictures with the spectrum and the
             colors of photographs ("random_mean", "random_std") in standard deviations of theirs, the same over noise
             of the picture's own spectrum ("rise_over_same_spectrum"), and whether the unit is "dead": silent at
             every start, so that its picture is gray. Of classes also the network's "answer" to the picture and its
             "probability".
    """

    KIND: ClassVar[str] = "Maximization"

    values: np.ndarray
    inputs: np.ndarray
    units: list[str]
    history: np.ndarray
    verdict: Mapping[str, Any] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)  # none: they are made, not read
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        counts = {len(self.values), len(self.inputs), len(self.units), len(self.history)}
        if self.values.ndim != 4 or len(counts) != 1:
            raise ValueError(f"pictures are (K, H, W, C), not {self.values.shape}, with a unit and a history for each")

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Maximization:
        """The result for one picture alone."""
        i = _pick(index, len(self))
        one = slice(i, i + 1)
        return dataclasses.replace(
            self, values=self.values[one], inputs=self.inputs[one], units=self.units[one], history=self.history[one],
            verdict={k: v[one] for k, v in self.verdict.items()},
        )  # fmt: skip

    def __iter__(self) -> Iterator[Maximization]:
        return (self[i] for i in range(len(self)))

    @property
    def images(self) -> list[Image.Image]:
        """The pictures alone, without labels; of inputs with neither one nor three channels their mean."""
        from PIL import Image

        shown = self.values if self.values.shape[3] in (1, 3) else self.values.mean(3, keepdims=True)
        pixels = np.rint(255 * shown).astype(np.uint8)
        return [Image.fromarray(p[..., 0] if p.shape[2] == 1 else p) for p in pixels]

    def __repr__(self) -> str:
        rise = np.array([r for r in self._said("rise") if r is not None], float)
        rise = rise[~np.isnan(rise)]
        ends = dict.fromkeys(color.number(r) for r in (rise.min(), rise.max())) if rise.size else {}
        raised = f", raised {' to '.join(ends)} standard deviations above random pictures" if ends else ""
        dead = f", {sum(self._said('dead'))} dead" if any(self._said("dead")) else ""
        names = f"{', '.join(self.units[:3])}{', ...' if len(self) > 3 else ''}"
        size = f"{_count(len(self), 'picture')} of {_times(self.values.shape[1:3])}"
        return f"<Maximization{_of(self.provenance)} for {names}: {size}{raised}{dead}>"

    def _said(self, name: str) -> list[Any]:
        return list(self.verdict.get(name) or [None] * len(self))

    def plot(
        self, *, columns: int | None = None, limit: int | None = 64, page: int = 1, ax: Axes | None = None
    ) -> Maximization:
        """Draw the pictures as a grid, each with its activation and rise below it.

        limit, page: at most this many pictures on a page, and which page
        ax: matplotlib axes to draw a single picture into, instead of a new figure
        """
        from innersight.draw import plots

        chosen = plots.select(np.zeros((len(self), 1)), limit=limit, page=page)
        if ax is not None:
            if len(self) != 1:
                raise errors.InputError(
                    f"one set of axes holds one picture, and there are {len(self)}: pick one by [i]"
                )
            caption = f"{self.units[0]}: {self._caption(0)}"
            return self._drawn(plots.saliency_on(ax, plots.Panel(caption, self._pixels(0))))
        p, layer = self.provenance, _layer_text(self.provenance)
        cells = [
            plots.Cell(self.units[i].removeprefix(f"{layer} "), self._pixels(i), self._caption(i))
            for i in chosen.channels
        ]
        what = layer or ("the classes" if len(self) > 1 else self.units[0])
        notes = [
            "below each its activation, and how far it rises above that on random pictures with the spectrum and the "
            "colors of photographs, in standard deviations (in brackets: above noise with the picture's own spectrum)",
            chosen.text.replace("channels", "pictures"),
        ]
        title = f"What {what}{_of(p)} answer{'' if what == 'the classes' else 's'} to most"
        return self._drawn(plots.gallery(cells, title=title, notes=notes, columns=columns))

    def _pixels(self, i: int) -> np.ndarray:
        if self._said("dead")[i]:
            return color.dead(*self.values.shape[1:3])
        return np.asarray(self[i].images[0].convert("RGB"))

    def _caption(self, i: int) -> str:
        if self._said("dead")[i]:
            return "silent at every start"
        names = ("activation", "rise", "rise_over_same_spectrum", "probability")
        numbers = {name: self._said(name)[i] for name in names}
        known = {name: color.number(v) for name, v in numbers.items() if v is not None and not math.isnan(v)}
        parts = [known.get("activation", "")]
        if "rise" in known:
            over = known.get("rise_over_same_spectrum")
            parts.append(f"rise {known['rise']}{f' ({over})' if over else ''}")
        said = f"\nseen as {self._said('answer')[i]}, p {known['probability']}" if "probability" in known else ""
        return " · ".join(filter(None, parts)) + said

    def _summary(self) -> dict[str, Any]:
        pictures = [
            {"unit": unit, **{name: values[i] for name, values in self.verdict.items()}}
            for i, unit in enumerate(self.units)
        ]
        return {"shape": self.values.shape, "steps": self.history.shape[1], "pictures": pictures}

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"values": self.values, "inputs": self.inputs, "history": self.history}

    def _about(self) -> dict[str, Any]:
        return {"units": self.units, "verdict": self.verdict}

    @classmethod
    def _restored(cls, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any], **common: Any) -> Self:
        return cls(
            arrays["values"], arrays["inputs"], about["units"], arrays["history"], verdict=about["verdict"], **common
        )

    def _html(self) -> str:
        out = []
        for i in range(min(12, len(self))):
            caption = html.escape(f"{self.units[i]}, {self._caption(i)}")
            out.append(f'<figure style="display:inline-block;margin:4px">{_thumbnail(self._pixels(i))}')
            out.append(f"<figcaption>{caption}</figcaption></figure>")
        return "".join(out)


# ---------------------------------------------------------------------------------------------------------------------
# From records

KINDS: dict[str, type[Result]] = {
    kind.KIND: kind for kind in (FeatureMaps, Saliency, Predictions, Sensitivity, Maximization)
}


def load(path: str | os.PathLike) -> Any:
    """A result that was saved as .npz or .safetensors; runs nothing that is in the file."""
    path = Path(path)
    arrays, about = storage.read(path)
    try:
        return from_record(arrays, about)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, errors.InnersightError):
            raise
        raise errors.InputError(f"{path.name!r} is no result of innersight, or parts of it are missing") from error


def from_record(arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> Any:
    """The result that `record` took apart."""
    from PIL import Image

    from innersight.images import Picture

    if about["innersight"] > FORMAT:
        raise errors.InputError("this result was saved by a later version of innersight: update innersight")
    kind = KINDS[about["result"]]
    pictures = []
    for i, p in enumerate(about["pictures"]):
        kept = arrays.get(f"pictures/{i}")
        original = None if kept is None else Image.fromarray(kept)
        size = None if original is not None or not p["size"] else tuple(p["size"])
        to_input, input_size = tuple(p["to_input"]), tuple(p["input_size"])
        pictures.append(Picture(p["name"], original, to_input, input_size, p["label"], original_size=size))
    return kind._restored(arrays, about, pictures=pictures, provenance=Provenance.from_json(about["provenance"]))
