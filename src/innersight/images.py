"""Pictures in: files, arrays and loaders become the tensor a network eats, and maps find their way back to the picture.

    inputs = read("photos/", Preprocess((224, 224), resize_to=256))
    inputs.tensor                                       # (N, 3, 224, 224) float32
    inputs.pictures[0].back(map_on_the_input)           # (H0, W0), on the photograph as people see it

`Picture` is one picture with the geometry from its own pixels to the input's, `read` and `iterate` turn whatever was
handed in into pictures and a tensor, by the `Preprocess` record of what the model wants (`preprocess`).

Coordinates are pixel edges everywhere: x runs from 0 at the left edge of the first pixel to W at the right edge of the
last one, so that pixel i covers [i, i + 1] and its center is i + 0.5.
"""

from __future__ import annotations

import contextlib
import difflib
import glob
import math
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from innersight.errors import InputError
from innersight.preprocess import CHANNELS, MAX_PIXELS, Affine, Preprocess, as_text, positive_int

if TYPE_CHECKING:
    import torch

KEPT_PIXELS = 64_000_000
"""Originals of files stay in memory up to this many pixels in all; later ones are read again when looked at."""

SUFFIXES = frozenset(
    ".avif .bmp .dib .gif .ico .j2k .jfif .jp2 .jpe .jpeg .jpg .mpo .pbm .pcx .pgm .png .pnm .ppm .tga .tif .tiff "
    ".webp".split()
)
"""What counts as a picture when a folder is read."""

# Not every format that Pillow knows: EPS runs an interpreter on what is in the file.
FORMATS = "AVIF BMP DIB GIF ICO JPEG JPEG2000 MPO PCX PNG PPM TGA TIFF WEBP".split()

Box = tuple[float, float, float, float]


# --- one picture, and the way back to it -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture that was read, and the geometry from its own pixels to those of the input.

    name:          the file's name (below the folder that was read), or "image 3", counted from 0 as in the results
    original:      the picture as people see it: RGB or L, rotated as its EXIF data says; None for a float tensor
    to_input:      (sx, sy, tx, ty): x on the original is x * sx + tx on the input; pixel edges, see the module
    input_size:    (H, W) of the input
    label:         the name of the class folder it was in, or what the loader said; None if nothing did
    values:        the (C, H, W) that was handed in, where that was a float tensor or array
    preprocess:    how `values` are turned into a picture to look at, where that is known
    path:          the file
    original_size: (H0, W0); for a float tensor that of the input
    """

    name: str
    original: Image.Image | None
    to_input: Affine
    input_size: tuple[int, int]
    label: str | int | None = None
    values: Any = field(default=None, repr=False)
    preprocess: Preprocess | None = field(default=None, repr=False)
    path: str | None = field(default=None, repr=False)
    original_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.original_size is None:
            size = self.input_size if self.original is None else (self.original.height, self.original.width)
            object.__setattr__(self, "original_size", size)

    if not TYPE_CHECKING:  # a type checker would take any attribute for granted

        def __getattr__(self, name):
            # A folder of photographs does not fit into memory, so `forget` takes the decoded picture away from the
            # instance. Python comes here only for what is missing: then the file is read again, for every look anew.
            if name == "original" and self.__dict__.get("path"):
                image = _open(self.path, self.path, _Notes())
                if (image.height, image.width) != self.original_size:
                    raise InputError(f"{self.path} has changed since it was read: read it again")
                return image
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def forget(self) -> None:
        """Let go of the decoded picture; the file is read again when `original` is asked for."""
        if self.path is not None:
            self.__dict__.pop("original", None)

    def __repr__(self) -> str:
        height, width = self._size
        label = "" if self.label is None else f", label {self.label!r}"
        return f"<Picture {self.name!r}: {height}x{width}, seen as {self.input_size[0]}x{self.input_size[1]}{label}>"

    @property
    def _size(self) -> tuple[int, int]:
        assert self.original_size is not None  # __post_init__
        return self.original_size

    def display(self) -> Image.Image:
        """A picture to look at, RGB or L: the original, or what the float tensor shows.

        A tensor is brought back to 0..255 by its `preprocess`; without one its smallest value is drawn black and its
        largest white. If it has neither one nor three channels, their mean is drawn.
        """
        original = self.original
        if original is not None:
            return original
        if self.values is None:
            raise InputError(f"{self.name} came without anything to look at: read the picture again")
        values = _numpy(self.values).astype(np.float32, copy=False)
        values = values.reshape(-1, *self.input_size)
        if self.preprocess is not None and len(values) == CHANNELS[self.preprocess.channels]:
            pixels = _unnormalized(values, self.preprocess)
        else:
            if len(values) not in (1, 3):
                values = values.mean(0, keepdims=True)
            low, high = float(values.min()), float(values.max())
            pixels = (values - low) * (255 / (high - low)) if high > low else np.full_like(values, 127)
        pixels = np.rint(np.clip(pixels, 0, 255)).astype(np.uint8)
        return Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))

    def back(self, values: Any) -> np.ndarray:
        """A map over the input, drawn on the pixels of the original: (..., h, w) -> (..., H0, W0).

        The map may be coarser than the input (a CAM's grid): it is taken to cover it. Bilinear between the centers of
        its cells, constant beyond the outermost ones. NaN where the network did not see the original (outside the
        crop), so that "no evidence" and "not looked at" stay apart. float32, or float64 for float64.
        """
        grid = _numpy(values)
        if grid.ndim < 2 or 0 in grid.shape:
            raise InputError(f"a map to be put back on {self.name} must be (..., h, w), got {as_text(grid.shape)}")
        grid = grid.astype(np.float64 if grid.dtype == np.float64 else np.float32, copy=False)
        (height, width), (in_height, in_width), (sx, sy, tx, ty) = self._size, self.input_size, self.to_input
        y = (np.arange(height) + 0.5) * sy + ty
        x = (np.arange(width) + 0.5) * sx + tx
        result = _lerp(_lerp(grid, y / in_height, -2), x / in_width, -1)
        result[..., (y < 0) | (y > in_height), :] = np.nan
        result[..., (x < 0) | (x > in_width)] = np.nan
        return result

    def box_to_original(self, box: Sequence[float], *, clip: bool = True) -> Box:
        """(x0, y0, x1, y1) on the input -> on the original, cut to the original unless `clip=False`."""
        sx, sy, tx, ty = self.to_input
        x0, y0, x1, y1 = (float(v) for v in box)
        height, width = self._size
        there = (x0 - tx) / sx, (y0 - ty) / sy, (x1 - tx) / sx, (y1 - ty) / sy
        return _clipped(there, width, height) if clip else there

    def box_to_input(self, box: Sequence[float], *, clip: bool = True) -> Box:
        """(x0, y0, x1, y1) on the original -> on the input, cut to the input unless `clip=False`."""
        sx, sy, tx, ty = self.to_input
        x0, y0, x1, y1 = (float(v) for v in box)
        there = x0 * sx + tx, y0 * sy + ty, x1 * sx + tx, y1 * sy + ty
        return _clipped(there, self.input_size[1], self.input_size[0]) if clip else there


def _clipped(box: Box, width: int, height: int) -> Box:
    x0, y0, x1, y1 = box
    return min(max(x0, 0.0), width), min(max(y0, 0.0), height), min(max(x1, 0.0), width), min(max(y1, 0.0), height)


def _lerp(grid: np.ndarray, share: np.ndarray, axis: int) -> np.ndarray:
    """Values of `grid` along an axis at `share` of its length (0..1), linear between the centers of its cells."""
    last = grid.shape[axis] - 1
    at = np.clip(share * (last + 1) - 0.5, 0, last)
    low = np.minimum(at.astype(int), max(last - 1, 0))
    weight = (at - low).astype(grid.dtype)
    weight = weight.reshape(-1, *[1] * (-1 - axis))
    below = np.take(grid, low, axis)
    return below + weight * (np.take(grid, np.minimum(low + 1, last), axis) - below)


def _unnormalized(values: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    mean, std = (np.array(v, np.float32).reshape(-1, 1, 1) for v in (preprocess.mean, preprocess.std))
    pixels = (values * std + mean) / np.float32(preprocess.scale)
    if preprocess.invert:
        pixels = 255 - pixels
    return pixels[::-1] if preprocess.channels == "BGR" else pixels


def _numpy(values: Any) -> np.ndarray:
    """An array, or a tensor of any device, grad or not, as numpy."""
    return values.detach().cpu().float().numpy() if _is_tensor(values) else np.asarray(values)


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Inputs:
    """What goes into the network, and where it came from.

    tensor:   (N, C, H, W) float32, never the memory of what was handed in; on the device of a tensor handed in
    pictures: one for each of the N
    notes:    what was decided on the way in, a sentence each
    """

    tensor: torch.Tensor
    pictures: list[Picture]
    notes: list[str] = field(default_factory=list)

    @property
    def labels(self) -> list[str | int | None]:
        """The label of each picture: its class folder, what the loader said, or None."""
        return [picture.label for picture in self.pictures]

    def __len__(self) -> int:
        return len(self.pictures)

    def __repr__(self) -> str:
        return f"<Inputs {as_text(self.tensor.shape)} of {', '.join(p.name for p in self.pictures[:3])}" + (
            f" and {len(self) - 3} more>" if len(self) > 3 else ">"
        )


def read(images: Any, preprocess: Preprocess | None, *, input_shape: Sequence[int] | None = None) -> Inputs:
    """All of `images` as one batch.

    What `images` may be:

    - a path, a folder (recursive, sorted; the class folder becomes the label), a glob, a PIL image, a uint8 array:
      pictures, which are preprocessed
    - a float array or tensor (C, H, W) or (N, C, H, W): taken as it is, as what the model eats
    - what `read` returned: taken as it is
    - a list, a data set or an iterable of any of these; a DataLoader's batch may be the tensor, (tensor, labels) or a
      dict with "pixel_values", "image", "images" or "input"

    uint8 arrays: numpy's are read as (H, W), (H, W, C), (N, H, W, C), torch's as (H, W), (C, H, W), (N, C, H, W). If
    the axis that should be C is not 1, 3 or 4 long (grey, color, color and alpha) but the other one is 1 or 3, that one
    is taken; if neither is, three axes are N grey pictures (N, H, W). A choice against the usual order is noted.

    `input_shape` is (C, H, W) of the model: tensors must have its C and may have another H and W. Pictures need
    `preprocess`; without it they are brought to `input_shape` with values 0..1, and a note says so.

    Raises InputError, in one sentence, for whatever cannot be read; pictures of different input sizes are refused.
    """
    if isinstance(images, Inputs):
        return images
    reader = _Reader(preprocess, input_shape)
    blocks = list(reader.blocks(images))
    if not blocks:
        raise InputError(_nothing(images))
    first = blocks[0]
    for block in blocks:
        if block.tensor.shape[1:] != first.tensor.shape[1:]:
            raise InputError(
                f"{block.pictures[0].name} is {as_text(block.tensor.shape[1:])} and {first.pictures[0].name} "
                f"{as_text(first.tensor.shape[1:])} at the input, so they do not fit into one batch: hand them in one "
                f"at a time, or bring them to one size (preprocess= with resize='letterbox' does)"
            )
    return _joined(blocks, reader.notes)


def iterate(
    images: Any, preprocess: Preprocess | None, *, input_shape: Sequence[int] | None = None, batch: int
) -> Iterator[Inputs]:
    """`images` (see `read`) in batches of `batch`, in order; memory is bounded by a batch, whatever the loader's size.

    The last batch may be smaller, and so is one that is followed by an input of another size.
    """
    if not positive_int(batch):
        raise InputError(f"batch must be a whole number from 1 on, got {batch!r}")
    return _batches(_Reader(preprocess, input_shape, batch), images, batch)


class _Block(NamedTuple):
    tensor: torch.Tensor  # (n, C, H, W)
    pictures: list[Picture]


def _batches(reader: _Reader, images: Any, batch: int) -> Iterator[Inputs]:
    pending: list[_Block] = []
    some = False
    for block in reader.blocks(images):
        some = True
        if pending and block.tensor.shape[1:] != pending[0].tensor.shape[1:]:
            yield _joined(pending, reader.notes)
            pending = []
        pending.append(block)
        while sum(len(b.pictures) for b in pending) >= batch:
            missing = batch - sum(len(b.pictures) for b in pending[:-1])
            last = pending[-1]
            yield _joined([*pending[:-1], _Block(last.tensor[:missing], last.pictures[:missing])], reader.notes)
            rest = _Block(last.tensor[missing:], last.pictures[missing:])
            pending = [rest] if rest.pictures else []
        del block  # or a batch lives on while the next one is made
    if pending:
        yield _joined(pending, reader.notes)
    if not some:
        raise InputError(_nothing(images))


def _joined(blocks: Sequence[_Block], notes: _Notes) -> Inputs:
    import torch

    tensors = [block.tensor.to(blocks[0].tensor.device) for block in blocks]
    tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    return Inputs(tensor, [picture for block in blocks for picture in block.pictures], notes.take())


def _nothing(images: Any) -> str:
    return f"there are no pictures in this {type(images).__name__}: it is empty"


class _Notes:
    """Sentences about pictures, one each however many pictures they are about."""

    def __init__(self) -> None:
        self.about: dict[str, list[str]] = {}

    def add(self, sentence: str, name: str = "") -> None:
        names = self.about.setdefault(sentence, [])
        if name:
            names.append(name)

    def take(self) -> list[str]:
        about, self.about = self.about, {}
        return [f"{_some(names)}: {sentence}" if names else sentence for sentence, names in about.items()]


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


class _Reader:
    """Turns whatever was handed in into blocks of the input tensor, counting pictures as it goes."""

    def __init__(self, preprocess: Preprocess | None, input_shape: Sequence[int] | None, chunk: int | None = None):
        self.preprocess = preprocess
        self.input_shape = None if input_shape is None else tuple(input_shape)
        self.chunk = chunk
        self.notes = _Notes()
        self.count = 0
        self.kept = 0

    def blocks(self, images: Any, labels: Any = None) -> Iterator[_Block]:
        if isinstance(images, (str, os.PathLike)):
            yield from self.files(os.fspath(images), labels)
        elif isinstance(images, Image.Image):
            yield self.picture(images, _label(labels, 0, 1))
        elif isinstance(images, Mapping):
            yield from self.blocks(*_of_mapping(images))
        elif isinstance(images, (list, tuple)):
            pair = _with_labels(images)
            for item, label in [pair] if pair else _one_by_one(images, labels):
                yield from self.blocks(item, label)
        elif _is_tensor(images) or hasattr(images, "__array__"):
            yield from self.array(images, labels)
        else:
            for item in _items(images):
                yield from self.blocks(item)

    def next_name(self) -> str:
        return f"image {self.count}"

    # pictures

    def files(self, path: str | bytes, labels: Any) -> Iterator[_Block]:
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        for file, name, label in _find(path):
            if labels is not None:
                label = _label(labels, 0, 1)
            yield self.picture(_open(file, file, self.notes, name), label, name, os.path.abspath(file))

    def picture(self, image: Image.Image, label: Any, name: str = "", path: str | None = None) -> _Block:
        import torch

        if path is None:
            name = os.path.basename(str(getattr(image, "filename", "") or "")) or self.next_name()
            image = _upright(image, name, name, self.notes)
        preprocess = self.for_pictures(name)
        values, to_input = preprocess.apply(image, name)
        _, height, width = values.shape
        picture = Picture(name, image, to_input, (height, width), label, preprocess=preprocess, path=path)
        self.kept += image.width * image.height
        if self.kept > KEPT_PIXELS:
            picture.forget()
        self.count += 1
        return _Block(torch.from_numpy(values)[None], [picture])

    def for_pictures(self, name: str) -> Preprocess:
        shape = self.input_shape
        if self.preprocess is None:
            if shape is None:
                raise InputError(
                    f"{name} is a picture, and nothing says how this model wants its pictures: pass preprocess= "
                    f"(size, mean, std) or input_shape=(C, H, W), or hand in a float tensor (N, C, H, W)"
                )
            self.preprocess = Preprocess.for_shape(shape)
            self.notes.add(
                f"nothing says how this model wants its pictures; taken as {self.preprocess.describe()} "
                f"(preprocess= changes it)"
            )
        made = self.preprocess.shape[0]
        if shape is not None and (len(shape) != 3 or shape[0] != made):
            raise InputError(
                f"this model takes {as_text(shape)}, but a picture becomes {as_text(self.preprocess.shape)} by its "
                f"preprocess record: pass a preprocess= that fits, or a float tensor {as_text(('N', *shape))}"
            )
        return self.preprocess

    # arrays

    def array(self, array: Any, labels: Any) -> Iterator[_Block]:
        tensor = _is_tensor(array)
        if not tensor:
            array = np.asarray(array)
        what = "tensor" if tensor else "array"
        kind = str(array.dtype).removeprefix("torch.")
        shape = tuple(array.shape)
        if 0 in shape:
            raise InputError(f"{self.next_name()} is an empty {what} of shape {as_text(shape)}")
        if kind == "uint8":
            yield from self.pixels(_numpy_pixels(array), labels, torch_order=tensor)
        elif array.is_floating_point() if tensor else array.dtype.kind == "f":
            yield from self.floats(array, what, labels)
        else:
            raise InputError(
                f"{self.next_name()} is {_a(kind)} {what} of shape {as_text(shape)}: "
                f"uint8 (0..255) is read as a picture and float as what the model eats, convert it to one of them"
            )

    def pixels(self, array: np.ndarray, labels: Any, torch_order: bool) -> Iterator[_Block]:
        """uint8 pictures, see `read` for the order of their axes."""
        pictures, note = _as_pictures(array, torch_order, self.next_name())
        if note:
            self.notes.add(note)
        for i, pixels in enumerate(pictures):
            image = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))
            yield self.picture(image, _label(labels, i, len(pictures)))

    def floats(self, array: Any, what: str, labels: Any) -> Iterator[_Block]:
        single = self.check_floats(array, what)
        if single:
            array = array[None]
        total = len(array)
        chunk = self.chunk or total
        for start in range(0, total, chunk):
            values = _float32(array[start : start + chunk])
            self.check_finite(values)
            size = (values.shape[-2] if values.ndim > 2 else 1, values.shape[-1])
            pictures = []
            for i in range(len(values)):
                label = _label(labels, start + i, total)
                pictures.append(
                    Picture(
                        self.next_name(), None, (1.0, 1.0, 0.0, 0.0), size, label, values[i], preprocess=self.preprocess
                    )
                )
                self.count += 1
            if values.ndim == 4 and values.shape[1] not in (1, 3):
                self.notes.add(f"inputs have {values.shape[1]} channels: the picture shown is their mean")
            yield _Block(values, pictures)

    def check_floats(self, array: Any, what: str) -> bool:
        """Whether this is one input rather than a batch; refuses what the model cannot take."""
        name, shape = self.next_name(), tuple(array.shape)
        wanted = self.input_shape
        rank = 3 if wanted is None else len(wanted)
        axes = ("C", "H", "W") if rank == 3 or wanted is None else wanted
        if len(shape) not in (rank, rank + 1):
            raise InputError(
                f"{name} is a float {what} of shape {as_text(shape)}: floats are taken as what the model eats, "
                f"{as_text(axes)} or {as_text(('N', *axes))}; pass uint8 for a picture"
            )
        single = len(shape) == rank
        channels = shape[0] if single else shape[1]
        if wanted is None and self.preprocess is not None:
            wanted = self.preprocess.shape
        if wanted is not None and channels != wanted[0]:
            hint = f"pass {as_text(('N', *wanted))}"
            if rank == 3 and shape[-1] == wanted[0]:
                hint = f"its axes seem to be {'' if single else 'N, '}H, W, C, transpose them"
            raise InputError(
                f"{name} is a float {what} of shape {as_text(shape)} with {channels} channel{'s' * (channels != 1)}, "
                f"but this model takes {as_text(wanted)}: {hint}"
            )
        return single

    def check_finite(self, values: torch.Tensor) -> None:
        import torch

        # A sum tells at a fraction of the price; one that overflowed is looked into.
        if math.isfinite(float(values.sum())) or torch.isfinite(values).all():
            return
        bad = ~torch.isfinite(values).flatten(1).all(1)
        index = int(bad.nonzero()[0])
        nan = "NaN" if torch.isnan(values[index]).any() else "an infinite value"
        raise InputError(f"image {self.count + index} holds {nan} (in float32): a network can make nothing of it")


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")  # who has a tensor has imported it
    return torch is not None and isinstance(value, torch.Tensor)


def _numpy_pixels(array: Any) -> np.ndarray:
    return array.detach().cpu().numpy() if _is_tensor(array) else array


def _float32(array: Any) -> torch.Tensor:
    """A float32 copy without a graph."""
    import torch

    if _is_tensor(array):
        return array.detach().to(torch.float32, copy=True)
    with np.errstate(over="ignore"):  # what becomes infinite is refused with a sentence
        return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))


def _as_pictures(array: np.ndarray, torch_order: bool, name: str) -> tuple[np.ndarray, str]:
    """(N, H, W, C) of a uint8 array, and a note if its axes were not in the usual order."""
    if array.ndim == 2:
        return array[None, ..., None], ""
    if array.ndim not in (3, 4):
        raise InputError(
            f"{name} is a uint8 array of shape {as_text(array.shape)}: a picture is (H, W) or (H, W, 3), "
            f"a batch (N, H, W, 3)"
        )
    batch = array if array.ndim == 4 else array[None]
    first, last = np.moveaxis(batch, 1, -1), batch
    usual, other = (first, last) if torch_order else (last, first)
    if usual.shape[-1] in (1, 3, 4):
        return usual, ""
    if other.shape[-1] in (1, 3):
        axes = "(H, W, C)" if torch_order else "(C, H, W)"
        return other, f"uint8 {as_text(array.shape)} read as {axes} pictures"
    if array.ndim == 3:
        return array[..., None], f"uint8 {as_text(array.shape)} read as {len(array)} grey pictures (N, H, W)"
    raise InputError(
        f"{name} is a uint8 array of shape {as_text(array.shape)}, and neither axis 1 nor the last one is 1 or 3 long: "
        f"a batch of pictures is (N, H, W, 3)"
    )


# --- lists, data sets, loaders ---------------------------------------------------------------------------------------


IMAGE_KEYS = ("pixel_values", "image", "images", "img", "input")
LABEL_KEYS = ("labels", "label", "target", "targets", "y")


def _of_mapping(batch: Mapping[Any, Any]) -> tuple[Any, Any]:
    for key in IMAGE_KEYS:
        if key in batch:
            label = next((batch[k] for k in LABEL_KEYS if k in batch), None)
            return batch[key], _labels(label, strings=True)
    raise InputError(
        f"a batch is a dict with the keys {', '.join(map(str, batch))}: its pictures are looked for under "
        f"{', '.join(IMAGE_KEYS[:-1])} or {IMAGE_KEYS[-1]}"
    )


def _items(images: Any) -> Iterator[Any]:
    """What an iterable or a data set with `__getitem__` and `__len__` yields; a sentence for anything else."""
    scalar = images is None or isinstance(images, (bytes, bytearray, int, float, complex))
    if not scalar and not hasattr(images, "read"):  # an open file would yield its lines
        if hasattr(images, "__iter__"):
            return iter(images)
        if hasattr(images, "__getitem__") and hasattr(images, "__len__"):
            return (images[i] for i in range(len(images)))
    kind = "None" if images is None else _a(type(images).__name__)
    raise InputError(f"{kind} is not a picture: pass a path, a PIL image, an array, a tensor or a list of them")


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0].lower() in "aeio" else f"a {noun}"


def _with_labels(item: Sequence[Any]) -> tuple[Any, Any] | None:
    """(images, labels) if this is what a loader makes of a batch or a data set of a sample, else None: it is a list."""
    if len(item) < 2:
        return None
    images, *rest = item
    if not _picture_like(images):
        return None
    whole_batch = getattr(images, "ndim", 0) == 4
    labels = _labels(rest[0], strings=whole_batch)
    if labels is None and any(_picture_like(other) for other in rest):
        return None
    # Targets that are no class (masks, boxes, measurements), and what else comes with a sample, are not ours to keep.
    return (images, labels) if labels is not None or whole_batch or isinstance(item, tuple) else None


def _picture_like(value: Any) -> bool:
    if isinstance(value, (str, os.PathLike, Image.Image)):
        return True
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and _picture_like(value[0])
    if isinstance(value, Mapping):
        return any(key in value for key in IMAGE_KEYS)
    kind = str(getattr(value, "dtype", "")).removeprefix("torch.")
    return getattr(value, "ndim", 0) >= 3 - (kind == "uint8") and (kind == "uint8" or "float" in kind)


def _labels(value: Any, strings: bool = False) -> list[str | int] | None:
    """Classes by number (by name where `strings`), one for each picture; None if it is something else."""
    if _is_tensor(value) or isinstance(value, (np.ndarray, np.generic)):
        kind = str(value.dtype).removeprefix("torch.")
        if value.ndim > 1 or not kind.startswith(("int", "uint")):
            return None
        return [int(v) for v in value.reshape(-1).tolist()]
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    if strings and isinstance(value, str):
        return [value]
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, (int, str) if strings else int) for v in value):
        return list(value)
    return None


def _one_by_one(images: Sequence[Any], labels: Any) -> Iterator[tuple[Any, Any]]:
    for i, item in enumerate(images):
        label = _label(labels, i, len(images))
        yield item, None if label is None else [label]


def _label(labels: Any, i: int, total: int) -> Any:
    if labels is None:
        return None
    if len(labels) != total:
        raise InputError(f"a batch has {total} picture{'s' * (total != 1)} and {len(labels)} labels")
    return labels[i]


# --- files -----------------------------------------------------------------------------------------------------------


def _find(path: str) -> Iterator[tuple[str, str, str | None]]:
    """(file, name, label) of what a path, a folder or a glob stands for."""
    if re.match(r"[a-z][a-z0-9+.-]+://|data:", path, re.IGNORECASE):
        raise InputError(f"{path[:80]} is an address, and only files of this machine are read: download it first")
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        yield from _in_folder(path)
    elif os.path.exists(path):
        yield path, os.path.basename(path), None
    elif glob.has_magic(path):
        found = sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p))
        if not found:
            raise InputError(f"no file matches {path}")
        for file in [p for p in found if _known(p)] or found:
            yield file, os.path.basename(file), None
    else:
        raise InputError(f"no such file: {path or repr(path)}{_near(path)}")


def _near(path: str) -> str:
    folder, name = os.path.split(path)
    try:
        near = difflib.get_close_matches(name, os.listdir(folder or "."), n=3)
    except (OSError, ValueError):
        return ""
    return f"; did you mean {', '.join(near)}?" if near else ""


def _in_folder(folder: str) -> Iterator[tuple[str, str, str | None]]:
    files = sorted(_walk(folder, set()))
    pictures = [parts for parts in files if _known(parts[-1])]
    if not pictures:
        held = f"holds {len(files)} file{'s' * (len(files) != 1)} but no picture" if files else "is empty"
        raise InputError(f"the folder {folder} {held}; pictures end in .png, .jpg, .webp, .bmp, .tif, .gif and so on")
    for parts in pictures:
        yield os.path.join(folder, *parts), "/".join(parts), parts[0] if len(parts) > 1 else None


def _walk(folder: str, seen: set[str], *parts: str) -> Iterator[tuple[str, ...]]:
    """Files below a folder as parts of their path. Links are followed, once each: data sets are often made of them."""
    if (real := os.path.realpath(folder)) in seen:
        return
    seen.add(real)
    try:
        with os.scandir(folder) as found:
            entries = [entry for entry in found if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be read: {error.strerror}") from error
    for entry in entries:
        if entry.is_dir():
            yield from _walk(entry.path, seen, *parts, entry.name)
        elif entry.is_file():
            yield *parts, entry.name


def _known(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in SUFFIXES


def _open(path: str, shown: str, notes: _Notes, name: str = "") -> Image.Image:
    """A file as an upright RGB or L picture; `shown` is what errors call it, `name` what notes do."""
    if os.path.isfile(path) and not os.path.getsize(path):
        raise InputError(f"{shown} is an empty file")
    Image.init()
    try:
        # Not by its name: Pillow would map an uncompressed TIFF into memory, and garbles those that lie on their side.
        with open(path, "rb") as file, _quiet_pillow():
            with Image.open(file, formats=[f for f in FORMATS if f in Image.OPEN]) as image:
                return _upright(image, name or shown, shown, notes)
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(_too_large(shown, "")) from error
    except Image.UnidentifiedImageError as error:
        kind = f"not a picture, though its name ends in {Path(path).suffix}" if _known(path) else "not a picture"
        raise InputError(
            f"{shown} is {'damaged: only its first bytes are those of a picture' if _signed(path) else kind}"
        ) from error
    except Exception as error:  # what the readers raise on damaged headers is of every type
        if isinstance(error, OSError) and error.strerror:
            raise InputError(f"{shown} cannot be read: {error.strerror}") from error
        raise InputError(_damaged(shown, error)) from error


def from_bytes(data: bytes, name: str) -> Image.Image:
    """A picture that did not come as a file, upright, RGB or L; refused as a file would be."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        return _open(file.name, name, _Notes())


def _damaged(shown: str, error: Exception) -> str:
    cut_off = "truncated" in str(error).lower() or isinstance(error, EOFError)
    return f"{shown} is {'cut off' if cut_off else 'damaged'} and cannot be read to its end ({error})"


@contextlib.contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Without Pillow's warnings: they are about what it reads all the same, or about sizes that are refused here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _signed(path: str) -> bool:
    """Whether a file starts as the common picture files do."""
    with open(path, "rb") as file:
        start = file.read(12)
    signs = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*")
    return start.startswith(signs) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")


def _check_size(width: int, height: int, shown: str) -> None:
    if width * height > MAX_PIXELS:
        raise InputError(_too_large(shown, f"{width}x{height} pixels, "))
    if not width * height:
        raise InputError(f"{shown} has no pixels ({width}x{height})")


def _too_large(shown: str, size: str) -> str:
    return f"{shown} is {size}more than the {MAX_PIXELS / 1e6:g} million pixels that are read: make it smaller"


def _upright(image: Image.Image, name: str, shown: str, notes: _Notes) -> Image.Image:
    """A picture as people see it: decoded, turned as its EXIF data says, RGB or L with 8 bits. A copy."""
    _check_size(image.width, image.height, shown)
    with _quiet_pillow():
        try:
            # A frame that somebody sought is what they meant; a file is at its first one.
            if image.format != "MPO" and getattr(image, "is_animated", False):
                of = "page of several" if image.format == "TIFF" else "frame of an animation"
                position = image.tell()
                notes.add(f"the first {of}" if position == 0 else f"number {position + 1}, a {of}", name)
            image.load()
        except Exception as error:  # so it is with their pixels
            raise InputError(_damaged(shown, error)) from error
        try:
            image = ImageOps.exif_transpose(image)
        except Exception:  # and with their EXIF data, but the picture is there
            notes.add("its EXIF data cannot be read, so it is not rotated", name)
            image = image.copy()
        try:
            return _eight_bits(image, shown, lambda sentence: notes.add(sentence, name))
        except InputError:
            raise
        except (ValueError, OSError) as error:
            raise InputError(f"{shown} stores its colors as {image.mode}, which is not read: save it as RGB") from error


def _eight_bits(image: Image.Image, shown: str, note: Callable[[str], None]) -> Image.Image:
    if image.mode.startswith("I;16"):
        note("16-bit grey, scaled from 0..65535 to 0..255")
        return _grey(np.asarray(image) / 257)
    if image.mode in ("I", "F"):
        return _wide_grey(np.asarray(image), shown, note)
    grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            note("transparent parts are shown on white")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    wanted = "L" if grey else "RGB"
    return image if image.mode == wanted else image.convert(wanted)


def _wide_grey(values: np.ndarray, shown: str, note: Callable[[str], None]) -> Image.Image:
    """Grey of 32 bits, whose range no file says: 0..1 (floats), 0..255 and 0..65535 are known, others stretched."""
    low, high = float(values.min()), float(values.max())
    if not math.isfinite(low) or not math.isfinite(high):
        raise InputError(f"{shown} holds NaN or infinite pixels: save it without them")
    top = next((t for t in (1 if values.dtype.kind == "f" else 255, 255, 65535) if high <= t), None)
    if low < 0 or top is None:
        note(f"32-bit grey, stretched from its own {low:g}..{high:g} to 0..255")
        return _grey((values - low) * (255 / (high - low)))
    note(f"32-bit grey, read as 0..{top}")
    return _grey(values * (255 / top))


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(values).astype(np.uint8))
