"""What is in a `.keras` or `.h5` file, read where it can do no harm: in a process of its own, with limits.

HDF5's library hangs for ever on some damaged files, and holds the interpreter while it does; a small file may also
declare gigabytes. So `read` starts `python -m innersight.formats.keras_file`, which imports neither torch nor Keras,
writes the configuration and the weights as plain numbers, and is ended when it takes too long or too much. No code of
a file is run, nothing is unpickled, nothing is extracted; links that lead out of the file are not followed.
"""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import h5py
    import numpy as np

MAX_TEXT = 64 << 20  # bytes of configuration
MAX_ARRAY = 2 << 30  # bytes of one weight
MAX_WEIGHTS = 8 << 30  # bytes of all of them
MAX_MEMBERS = 10_000  # of a zip archive
MAX_OBJECTS = 200_000  # groups and datasets
MAX_DEPTH = 64
MAX_MEMORY = 6 << 30  # of the reading process, which holds one weight at a time (and the file, if it is an archive)
SECONDS, BYTES_PER_SECOND = 20, 10 << 20  # how long reading may take: so long, and for its size


@dataclass
class Weight:
    """One array: where it stood (`layers/conv2d/vars/0` or `conv1/kernel:0`) and the layer its group is named after."""

    path: str
    value: np.ndarray
    owner: str = ""


@dataclass
class Contents:
    """A file's configuration, Keras version and weights.

    by_number: the weights stand by class and number (`.keras`); otherwise by layer name (`.h5`)
    """

    config: dict[str, Any]
    version: str
    by_number: bool
    weights: list[Weight] = field(default_factory=list)


class Refused(Exception):
    """Why a file is not read, to go behind its name in a sentence."""


def read(path: Path, seconds: float | None = None) -> Contents:
    """The contents of a file, read by a process of its own that has `seconds` to do it.

    Raises InputError for a file that is damaged, too large or no Keras model, MissingPackage without h5py.
    """
    from innersight.errors import InputError, need

    if importlib.util.find_spec("h5py") is None:  # looked for, not imported: the other process needs it
        need("h5py", "keras", "reading Keras files")
    if seconds is None:
        seconds = SECONDS + path.stat().st_size / BYTES_PER_SECOND
    with tempfile.TemporaryDirectory(prefix="innersight-") as folder:
        command = [sys.executable, "-P", "-m", __name__, str(path.resolve()), folder, str(math.ceil(seconds))]
        environment = {**os.environ, "HDF5_USE_FILE_LOCKING": "FALSE", "HDF5_PLUGIN_PRELOAD": "::"}
        package = str(Path(__file__).resolve().parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        try:
            done = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            raise InputError(
                f"{path} could not be read within {seconds:g} s, as happens with damaged HDF5 files; "
                "save the model again"
            ) from None
        except OSError as error:
            raise InputError(f"{path} could not be read: no process could be started for it ({error})") from error
        answer = Path(folder, "contents.json")
        if done.returncode or not answer.is_file():
            raise InputError(
                f"{path} could not be read as a Keras model: it is damaged (reading it ended with code "
                f"{done.returncode}); save the model again"
            )
        try:
            found = json.loads(answer.read_text(encoding="utf-8", errors="replace"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} could not be read as a Keras model: {ascii(str(error))[1:-1]}") from None
        if "refused" in found:
            raise InputError(f"{path} {found['refused']}")
        return Contents(
            configuration(found["config"], path), found["version"], found["by_number"], _arrays(found, Path(folder))
        )


def configuration(text: str, path: Path | str) -> dict[str, Any]:
    """The JSON object in a file's text. Raises InputError where it is none."""
    from innersight.errors import InputError

    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        said = "it is nested too deeply" if isinstance(error, RecursionError) else ascii(str(error))[1:-1]
        raise InputError(f"{path} has a configuration that cannot be read: {said}; save the model again") from None
    if not isinstance(config, dict):
        raise InputError(
            f"{path} has a configuration that is no model: expected an object, got {type(config).__name__}"
        )
    return config


def _arrays(found: dict[str, Any], folder: Path) -> list[Weight]:
    import numpy as np

    flat = np.fromfile(folder / "weights", np.float32)
    weights, start = [], 0
    for path, owner, shape in found["weights"]:
        end = start + math.prod(shape)
        weights.append(Weight(path, flat[start:end].reshape(shape), owner))
        start = end
    return weights


# --- the reading process ---------------------------------------------------------------------------------------------


def extract(path: Path, out: io.BufferedIOBase) -> dict[str, Any]:
    """The configuration (as text), version and weights of a file; `out` receives the weights' numbers, float32.

    Raises Refused, or whatever h5py makes of a damaged file.
    """
    if zipfile.is_zipfile(path):
        return _extract_archive(path, out)
    import h5py

    try:
        file = h5py.File(path, "r")
    except OSError:
        raise Refused("is neither an HDF5 file nor a .keras archive, or it is damaged; save the model again") from None
    with file:
        return _extract_h5(file, out)


def _extract_archive(path: Path, out: io.BufferedIOBase) -> dict[str, Any]:
    import h5py

    with zipfile.ZipFile(path) as archive:
        members = archive.namelist()
        if len(members) > MAX_MEMBERS or len(set(members)) < len(members):
            raise Refused("is no .keras archive: it has too many members, or two of one name")
        if "config.json" not in members:
            raise Refused("is a zip archive without config.json, so no .keras model")
        config = _member(archive, "config.json", MAX_TEXT).decode("utf-8", "replace")
        version = ""
        if "metadata.json" in members:
            version = _version(_member(archive, "metadata.json", MAX_TEXT))
        if "model.weights.h5" not in members:
            kinds = [m for m in members if m.startswith("model.weights")]
            raise Refused(
                f"keeps its weights as {ascii(kinds[0])[1:-1]}, which is not read here; save it with model.save(path) "
                "as one file" if kinds else "holds no weights (model.weights.h5)"
            )  # fmt: skip
        content = io.BytesIO(_member(archive, "model.weights.h5", MAX_WEIGHTS))
    writer = _Writer(out)
    with h5py.File(content, "r") as file:
        entries = [writer.write(path, owner, dataset) for path, owner, dataset in _numbered(file)]
    return {"config": config, "version": version, "by_number": True, "weights": entries}


def _version(metadata: bytes) -> str:
    try:
        found = json.loads(metadata)["keras_version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return found[:40] if isinstance(found, str) else ""


def _member(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    info = archive.getinfo(name)
    if info.flag_bits & 1:
        raise Refused("is encrypted")
    if info.file_size > limit or info.file_size > 1000 * info.compress_size + (4 << 20):
        raise Refused(f"declares {info.file_size:,} bytes for {name}, more than can be right")
    with archive.open(info) as member:
        content = member.read(info.file_size + 1)
    if len(content) != info.file_size:
        raise Refused(f"holds another {name} than it declares")
    return content


def _numbered(file: h5py.File) -> Iterator[tuple[str, str, h5py.Dataset]]:
    """Every weight below `layers`, with its path and, where the file says it, the layer's name."""
    import h5py

    count = 0
    pending: list[tuple[str, Any, str]] = [("", file, "")]
    while pending:
        path, item, owner = pending.pop()
        count += 1
        if count > MAX_OBJECTS or path.count("/") > MAX_DEPTH:
            raise Refused("holds more groups than any model has")
        if isinstance(item, h5py.Dataset):
            yield path, owner, item
            continue
        if path.endswith("/vars") and "name" in item.attrs:
            owner = _text(item.attrs["name"])
        for name in sorted(item):
            if not path and name in ("optimizer", "_optimizer", "metrics", "loss_tracker", "compile_metrics"):
                continue  # the state of training
            pending.append((f"{path}/{name}".lstrip("/"), _hard(item, name), owner if path.endswith("/vars") else ""))


def _hard(group: h5py.Group, name: str) -> Any:
    import h5py

    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise Refused(f"holds a link ({name!a}) that leads elsewhere; weights must be in the file itself")
    item = group.get(name)
    if not isinstance(item, (h5py.Group, h5py.Dataset)):
        raise Refused(f"holds {name!a}, which is neither a group nor a dataset")
    return item


def _extract_h5(file: h5py.File, out: io.BufferedIOBase) -> dict[str, Any]:
    if "model_config" not in file.attrs:
        if "layer_names" in file.attrs or "layers" in file or "_layer_checkpoint_dependencies" in file:
            raise Refused(
                "holds weights alone, without the network they are for; build the model in Keras, load_weights(), and "
                "save it whole with model.save('model.keras')"
            )
        raise Refused("is an HDF5 file without model_config, so no Keras model")
    config = _text(file.attrs["model_config"])
    if len(config) > MAX_TEXT:
        raise Refused(f"has a configuration of {len(config):,} characters, more than any model's")
    version = _text(file.attrs["keras_version"])[:40] if "keras_version" in file.attrs else ""
    writer, entries = _Writer(out), []
    group = _hard(file, "model_weights") if "model_weights" in file else None
    for layer in [] if group is None else _names(group, "layer_names"):
        own = _walk(group, layer)
        for name in _names(own, "weight_names"):
            entries.append(writer.write(name, layer, _walk(own, name)))
            if len(entries) > MAX_OBJECTS:
                raise Refused("holds more weights than any model has")
    return {"config": config, "version": version, "by_number": False, "weights": entries}


def _walk(group: h5py.Group, path: str) -> Any:
    parts = [part for part in path.split("/") if part]
    if len(parts) > MAX_DEPTH:
        raise Refused("holds more groups than any model has")
    item = group
    for part in parts:
        if part == "." or part not in item:
            raise Refused(f"lacks the weights {path!a} that it lists")
        item = _hard(item, part)
    return item


def _names(group: h5py.Group, name: str) -> list[str]:
    """A list of names; long ones are kept in pieces: weight_names0, weight_names1, ..."""
    pieces = [name] if name in group.attrs else []
    while not pieces or (pieces[0] != name):
        piece = f"{name}{len(pieces)}"
        if piece not in group.attrs:
            break
        pieces.append(piece)
    return [_text(item) for piece in pieces for item in group.attrs[piece].reshape(-1).tolist()]


def _text(value: Any) -> str:
    import numpy as np

    if isinstance(value, np.ndarray):
        value = value.reshape(-1).tolist()
        value = value[0] if value else ""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


class _Writer:
    """Writes weights as float32, one after the other, within the limits."""

    def __init__(self, out: io.BufferedIOBase):
        self.out = out
        self.total = 0

    def write(self, path: str, owner: str, dataset: Any) -> tuple[str, str, list[int]]:
        import h5py
        import numpy as np

        label = ascii(path)
        if not isinstance(dataset, h5py.Dataset):
            raise Refused(f"has a group where the weights {label} should be")
        if dataset.is_virtual or dataset.external:
            raise Refused(f"keeps the weights {label} in another file; weights must be in the file itself")
        if dataset.dtype.kind not in "fiub" or dataset.shape is None:
            raise Refused(f"holds weights {label} of type {dataset.dtype}; expected numbers")
        size = math.prod(dataset.shape) * max(dataset.dtype.itemsize, 4)
        stored = dataset.id.get_storage_size()
        if size > MAX_ARRAY or (size > 4 << 20 and size > 1000 * stored):
            raise Refused(f"declares {size:,} bytes for {label} and holds {stored:,}: more than can be right")
        self.total += size
        if self.total > MAX_WEIGHTS:
            raise Refused(f"holds more than {MAX_WEIGHTS >> 30} GiB of weights")
        value = np.ascontiguousarray(dataset[()], np.float32)
        self.out.write(value.tobytes() if value.size < 1 << 20 else value.data)
        return path, owner, list(dataset.shape)


def _main(path: str, folder: str, seconds: str) -> None:
    try:  # on systems without limits, the caller's clock remains
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 1))
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY + 2 * os.path.getsize(path),) * 2)
    except (ImportError, OSError, ValueError):
        pass
    try:
        with open(os.path.join(folder, "weights"), "wb") as out:
            found = extract(Path(path), out)
    except Refused as refused:
        found = {"refused": str(refused)}
    except MemoryError:
        found = {"refused": "asks for more memory than a model can need"}
    except Exception as error:  # h5py and zipfile raise a dozen kinds on damaged files
        said = ascii((str(error).strip().splitlines() or [""])[0])[1:-1][:200]
        found = {"refused": f"is damaged: {said or type(error).__name__}; save the model again"}
    with open(os.path.join(folder, "contents.json"), "w", encoding="utf-8", errors="replace") as answer:
        json.dump(found, answer)


if __name__ == "__main__":
    _main(*sys.argv[1:])
