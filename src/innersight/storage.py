"""Files of results: arrays with one JSON object, read and written, and figures; each file whole or not at all.

No file of ours runs code when it is opened.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from innersight import errors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAWN = (".png", ".pdf", ".svg")
STORED = (".npz", ".safetensors")


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The named arrays and the JSON object that `store` wrote; runs nothing that is in the file."""
    if not path.is_file():
        raise errors.InputError(f"no file {str(path)!r}" if not path.is_dir() else f"{str(path)!r} is a folder")
    if path.suffix.lower() not in STORED:
        raise errors.InputError(f"results are loaded from {' and '.join(STORED)} files, not from {path.name!r}")
    try:
        return (_read_npz if path.suffix.lower() == ".npz" else _read_safetensors)(path)
    except errors.InnersightError:
        raise
    except Exception as error:  # each broken byte raises something else
        raise errors.InputError(f"{path.name!r} cannot be read: it is broken or no {path.suffix} file") from error


def _read_npz(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    try:
        with (
            path.open("rb") as opened,
            np.load(opened, allow_pickle=False) as file,
        ):  # np.load forgets to close a bad one
            arrays = {name: file[name] for name in file.files}
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise errors.InputError(f"{path.name!r} holds pickled objects, which could run code: not loaded") from None
        raise
    except (OSError, zipfile.BadZipFile) as error:
        raise errors.InputError(f"{path.name!r} cannot be read: {error}") from error
    if "innersight" not in arrays:
        raise errors.InputError(
            f"{path.name!r} is no result of innersight: it says nothing of where its values are from"
        )
    return arrays, json.loads(str(arrays.pop("innersight")))


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        about = (file.metadata() or {}).get("innersight")
        if about is None:
            raise errors.InputError(
                f"{path.name!r} is no result of innersight: it says nothing of where its values are from"
            )
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(about)  # noqa: SIM118 - not a mapping


def store(path: Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> Path:
    """Write named arrays and one JSON object, by suffix."""
    text = json.dumps(about, ensure_ascii=False, allow_nan=False)
    if path.suffix.lower() == ".npz":
        named: dict[str, Any] = {"innersight": np.array(text), **arrays}
        return write_whole(path, lambda file: np.savez_compressed(file, **named))

    def write(file: IO[bytes]) -> None:
        from safetensors.numpy import save

        tensors = {name: np.ascontiguousarray(a) for name, a in arrays.items()}
        file.write(save(tensors, metadata={"innersight": text}))

    return write_whole(path, write)


def write_figures(path: Path, figures: Sequence[Figure]) -> Path:
    from innersight.draw import plots

    suffix = path.suffix.lower()
    if suffix != ".pdf" and len(figures) != 1:
        raise errors.InputError(f"{suffix} holds one figure and there are {len(figures)}: use .pdf, or name a layer")
    return write_whole(path, lambda file: plots.write(figures, file, suffix))


def check_suffix(path: Path) -> None:
    if path.suffix.lower() not in (*DRAWN, *STORED):
        kinds = f"{', '.join(DRAWN)} for a picture, {', '.join(STORED)} for the values"
        raise errors.InputError(f"{path.name!r}: unknown suffix {path.suffix!r}; use {kinds}")


def check_place(path: Path) -> None:
    """Refuse a place that cannot be written to before anything is drawn for it."""
    if path.is_dir():
        raise errors.InputError(f"cannot write {str(path)!r}: it is a folder")
    if not path.parent.is_dir():
        raise errors.InputError(f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}; make it first")


def write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> Path:
    """Write a file whole or not at all."""
    check_place(path)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            write(file)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # a temporary file is for its owner alone
        os.replace(temporary, path)
    except OSError as error:
        raise errors.InputError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
    return path
