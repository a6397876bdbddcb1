"""The picture that an ONNX file takes: its shape and type, noise in its kind, and how pictures are prepared for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from innersight import errors
from innersight.formats import Assumed
from innersight.formats.onnx_file import File, captured, literal
from innersight.formats.onnx_quantised import Grid
from innersight.preprocess import Preprocess


@dataclass(frozen=True)
class Picture:
    """The input of a file: its name, its sizes as (N, C, H, W), and whether the file has the channels last."""

    name: str
    type: int
    batch: int | None
    sizes: tuple[int | None, int | None, int | None]
    last: bool
    grid: Grid | None = None


_REAL = {1: "float32", 10: "float16", 11: "float64", 16: "bfloat16"}
WHOLE = {2: (0, 255), 3: (-128, 127), 4: (0, 65535), 5: (-32768, 32767), 6: (0, 255), 7: (0, 255)}


def picture_of(file: File) -> tuple[Picture, list[str]]:
    used = {i for n in file.nodes for i in (*n.inputs, *captured(n))} | set(file.outputs)
    inputs = [i for i in file.inputs if i.name in used]
    if len(inputs) != 1:
        names = ", ".join(i.name for i in inputs) or "none"
        raise errors.Unsupported(
            f"{file.name} takes {len(inputs)} inputs ({names}); innersight explains networks of one image input"
        )
    found = inputs[0]
    if found.type not in _REAL and found.type not in WHOLE:
        raise errors.Unsupported(f"the input {found.name!r} of {file.name} holds no numbers that a picture has")
    if found.shape is not None and len(found.shape) != 4:
        raise errors.Unsupported(
            f"the input {found.name!r} of {file.name} has {len(found.shape)} dimensions; "
            "innersight explains networks of one image input, (N, C, H, W) or (N, H, W, C)"
        )
    batch, *sizes = found.shape or (None, None, None, None)
    last = sizes[2] in (1, 3, 4) and sizes[0] not in (1, 3, 4)
    if last:
        sizes = [sizes[2], sizes[0], sizes[1]]
    notes = []
    if last:
        notes.append("its input has the channels last; pictures go in as (N, C, H, W) all the same and are turned")
    if found.type in _REAL and found.type != 1:
        notes.append(f"its input is declared {_REAL[found.type]}; it is run in float32")
    return Picture(found.name, found.type, batch, tuple(sizes), last), notes  # type: ignore[arg-type]


def noise(picture: Picture, shape: Sequence[int], count: int = 1, seed: int = 0) -> torch.Tensor:
    """Inputs of noise, in whole numbers where the file wants those."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((count, *shape), generator=generator)
    if picture.type in WHOLE:
        low, high = (max(v, -255) if v < 0 else min(v, 255) for v in WHOLE[picture.type])
        x = (torch.sigmoid(x) * (high - low) + low).round()
        x = x if picture.grid is None else picture.grid.real(x)
    return x


def told(
    file: File, picture: Picture, shape: tuple[int, ...], constants: dict[str, Any]
) -> tuple[Preprocess | None, list[str] | None, list[str]]:
    """Preprocessing and labels, as far as the file says, and what is assumed."""
    notes = []
    labels = None
    for key in ("classes", "names", "labels", "classlabels_strings", "class_names"):
        if key in file.metadata and (labels := _labels(file.metadata[key])):
            notes.append(f"{len(labels)} labels from the file's metadata ({key})")
            break
    if shape[0] not in (1, 3):
        return None, labels, notes
    stated = Preprocess.for_shape(shape)
    said = {k.rpartition(".")[2]: v for k, v in file.metadata.items()}
    if "BitmapPixelFormat" in said or "NominalPixelRange" in said:
        bgr = said.get("BitmapPixelFormat", "").lower().startswith("bgr") and shape[0] == 3
        wide = "255" in said.get("NominalPixelRange", "")
        stated = replace(stated, channels="BGR" if bgr else stated.channels, scale=1.0 if wide else 1 / 255)
        notes.append(f"pictures are prepared as the file's metadata says: {stated.describe()}")
        return stated, labels, notes
    first, wide = _scaled_first(file, picture.name, constants)
    if picture.grid is not None:
        stated, why = _of_grid(stated, picture.grid), "as its input's integers stand for"
    elif picture.type in WHOLE:
        low = -128.0 if picture.type == 3 else 0.0
        stated, why = replace(stated, scale=1.0, mean=(-low,)), "since its input is whole numbers"
    elif wide:
        stated, why = replace(stated, scale=1.0), f"since the file itself goes on with {first}"
    else:
        why = f"though the file itself goes on with {first}" if first else "without mean and std"
    values = stated.describe().rpartition("; ")[2]
    note = f"the file does not say how its pictures are prepared; {values} are assumed, {why}; preprocess= says another"
    notes.append(note if picture.grid is not None else Assumed(note))
    return stated, labels, notes


def _scaled_first(file: File, name: str, constants: dict[str, Any]) -> tuple[str, bool]:
    """What shifts or scales the input first, if something does, and whether its numbers are those of pixels 0..255."""
    names = {name}
    for n in file.nodes:
        if not names & set(n.inputs):
            continue
        if n.op in ("Identity", "Transpose", "Cast"):
            names.add(n.outputs[0])
            continue
        by = [constants[i] for i in n.inputs if i in constants and constants[i].is_floating_point()]
        if n.op not in ("Sub", "Add", "Mul", "Div") or not by or not by[0].numel():
            return "", False
        size = float(by[0].abs().max())
        wide = size >= 16 if n.op in ("Sub", "Div", "Add") else size <= 1 / 16
        return f"{n.op} {n.name!r}", wide
    return "", False


def _of_grid(stated: Preprocess, grid: Grid) -> Preprocess:
    """Pictures for an input whose integers stand for 0..255, -1..1 or (by default) 0..1."""
    low, high = (grid.step * (end - grid.null) for end in (grid.lo, grid.hi))
    if high > 128:
        return replace(stated, scale=1.0)
    return replace(stated, scale=1 / 127.5, mean=(1.0,)) if low < -0.5 and high < 1.5 else stated


def _labels(text: str) -> list[str] | None:
    if not text.lstrip().startswith(("{", "[", "(")):
        names = text.split(",") if "," in text else text.splitlines()
        return [name.strip() for name in names] if len(names) > 1 else None
    try:
        found = literal(text, object)
    except ValueError:
        return None
    if isinstance(found, dict) and all(isinstance(k, int) and 0 <= k < 1 << 20 for k in found):
        return [str(found.get(i, i)) for i in range(max(found, default=-1) + 1)]
    return [str(v) for v in found] if isinstance(found, (list, tuple)) else None


def fed(picture: Picture, x: torch.Tensor) -> np.ndarray:
    kinds = {1: np.float32, 10: np.float16, 11: np.float64, 2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16,
             6: np.int32, 7: np.int64}  # fmt: skip
    x = x if picture.grid is None else picture.grid.integers(x)
    array = (x.permute(0, 2, 3, 1) if picture.last else x).contiguous().numpy()
    return array.astype(kinds[picture.type])
