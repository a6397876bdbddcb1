"""Weights in files, and the architectures they are for. Nothing in a file is run unless it is trusted."""

from __future__ import annotations

import copy
import importlib
import os
import pickle
import random
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from innersight.errors import InputError, UntrustedFile, unknown
from innersight.observe.guard import as_found

SUFFIXES = (".safetensors", ".pth", ".pt", ".th", ".bin", ".ckpt", ".tar", ".pt2")
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params")
PREFIXES = ("module.", "model.", "net.", "network.")


def kind_of(path: Path) -> str:
    """What a file is by its content: "safetensors", "checkpoint", "torchscript" or "exported".

    Raises InputError for anything else, saying what it looks like.
    """
    if not path.exists():
        raise InputError(f"there is no file {path}")
    if path.is_dir():
        raise InputError(f"{path} is a folder, expected a model file; a folder of transformers opens as hf:{path}")
    with path.open("rb") as file:
        head = file.read(64)
    if zipfile.is_zipfile(path):
        return _kind_of_zip(path)
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return "safetensors"
    if head[:1] == b"\x80" or b"ustar" in head:
        return "checkpoint"
    raise InputError(f"{path} is not a model file: {_looks(head)}")


def _kind_of_zip(path: Path) -> str:
    with zipfile.ZipFile(path) as file:
        names = [name.partition("/")[2] or name for name in file.namelist()]
    if "archive_format" in names or "serialized_exported_program.json" in names:
        return "exported"
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        return "torchscript"
    if "data.pkl" in names:
        return "checkpoint"
    if "config.json" in names and any(name.endswith(".weights.h5") for name in names):
        raise InputError(f"{path} is a Keras file: rename it to .keras")
    raise InputError(f"{path} is a zip file without a model in it (first entry: {names[0] if names else 'none'})")


def _looks(head: bytes) -> str:
    if not head:
        return "it is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, the real file has not been fetched (git lfs pull)"
    if head.startswith(b"\x89HDF"):
        return "it is an HDF5 file: a Keras model is opened by the suffix .h5"
    if head[:64].lstrip()[:1] == b"<":
        return "it looks like a web page, so the download went wrong"
    if head.startswith(b"PK"):
        return "it is a zip file cut short"
    return f"it begins with {head[:8]!r}"


# --- reading ---------------------------------------------------------------------------------------------------------


def read(path: Path, trust: bool = False) -> Any:
    """What a weights file holds, on the CPU: a mapping of names to tensors as a rule, a module only if `trust`.

    A `.pth` is read with `weights_only=True`. One that holds anything else than tensors and plain values raises
    UntrustedFile, which names the class; `trust=True` unpickles it and thereby runs the code it names.
    """
    kind = kind_of(path)
    if kind == "safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise InputError(f"{path} is not a safetensors file, or a damaged one: {error}") from error
    if path.suffix == ".safetensors":
        raise InputError(f"{path} is called .safetensors but is a {_WORDS[kind]}; rename it to .{_SUFFIX[kind]}")
    if kind != "checkpoint":
        raise InputError(f"{path} is a {_WORDS[kind]} and brings its network along; open it by itself, without arch=")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about how a file was written, which its reader cannot change
            return torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        if wanted := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UntrustedFile(
                f"{path} holds a {wanted[1]}, not only tensors; save model.state_dict() instead, or pass trust=True, "
                "which runs code from the file"
            ) from None
        raise InputError(f"{path} is damaged or no PyTorch file: {_first_line(error)}") from error
    except (RuntimeError, EOFError, OSError, AttributeError, ImportError, ValueError, KeyError) as error:
        raise InputError(f"{path} could not be read: {_first_line(error)}") from error


_WORDS = {"checkpoint": "PyTorch checkpoint", "torchscript": "TorchScript program", "exported": "torch.export program"}
_SUFFIX = {"checkpoint": "pth", "torchscript": "pt", "exported": "pt2"}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def state_in(held: Any, path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors by name in what a file held: wrappers such as {"state_dict": ...} are opened, and said."""
    notes = []
    for _ in range(3):
        if isinstance(held, nn.Module):
            held = held.state_dict()
        inner = [
            key for key in WRAPPERS if isinstance(held, Mapping) and isinstance(held.get(key), (Mapping, nn.Module))
        ]
        if not inner:
            break
        notes.append(f"weights taken from {inner[0]!r} in {path.name}")
        held = held[inner[0]]
    tensors = {k: v for k, v in held.items() if isinstance(v, torch.Tensor)} if isinstance(held, Mapping) else {}
    if not tensors:
        what = f"keys {', '.join(map(str, list(held)[:5]))}" if isinstance(held, Mapping) else type(held).__name__
        raise InputError(f"{path} holds no weights by name but {what}; expected a state dict")
    return tensors, notes


def matched(state: Mapping[str, torch.Tensor], expected: Iterable[str]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """`state` under the names the network uses: prefixes of wrappers (DataParallel, torch.compile, Lightning) go."""
    names = set(expected)
    state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    notes = []
    for _ in PREFIXES:
        if names & state.keys():
            break
        found = [p for p in PREFIXES if any(key.startswith(p) for key in state)]
        if not found:
            break
        state = {key.removeprefix(found[0]): value for key, value in state.items()}
        notes.append(f"prefix {found[0]!r} taken off the weights' names")
    return dict(state), notes


def put_into(module: nn.Module, state: Mapping[str, torch.Tensor], path: Path, name: str) -> None:
    """Load a state dict, or say key by key how it does not fit."""
    own = module.state_dict()
    # Counters that old checkpoints lack, and training heads of GoogLeNet and Inception, do not change what is computed.
    optional = re.compile(r".*num_batches_tracked$|aux(1|2|_classifier|logits)?\.|AuxLogits\.")
    missing = [k for k in own if k not in state and not optional.match(k)]
    unexpected = [k for k in state if k not in own and not optional.match(k)]
    shapes = [
        f"{k} ({by(state[k].shape)} in the file, {by(own[k].shape)} in the network)" for k in mismatched(state, own)
    ]
    refuse(path, name, missing, unexpected, shapes)
    module.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)


def refuse(path: Path, name: str, missing: list[str], unexpected: list[str], shapes: list[str]) -> None:
    """Raise InputError if a file does not fit a network, with the first keys of each kind."""
    kinds = (("it lacks", missing), ("the network has no", unexpected), ("other shapes in", shapes))
    problems = [f"{what} {few(keys)}" for what, keys in kinds if keys]
    if problems:
        raise InputError(f"{path} does not fit {name}: {'; '.join(problems)}")


def mismatched(state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> list[str]:
    def lazy(tensor: torch.Tensor) -> bool:
        return nn.parameter.is_lazy(tensor)

    return [k for k in own if k in state and not lazy(own[k]) and own[k].shape != state[k].shape]


def by(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "a number"


def few(items: list[str], most: int = 3) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


# --- architectures ---------------------------------------------------------------------------------------------------


@contextmanager
def seeded() -> Iterator[None]:
    """A network built inside has the same initial weights every time, and nobody's random state moves."""
    with as_found(nn.Identity()):
        torch.default_generator.manual_seed(0)
        random.seed(0)
        yield


def build(arch: str | nn.Module | Callable[[], nn.Module]) -> tuple[nn.Module, str]:
    """The network that `arch` names or makes, with fresh weights, and its name.

    arch: "package.module:factory" (importable, from the working directory too), a function or class that is called
          without arguments, or a module, of which a copy is taken
    """
    if isinstance(arch, nn.Module):
        return copy.deepcopy(arch), type(arch).__name__
    name = arch if isinstance(arch, str) else getattr(arch, "__name__", type(arch).__name__)
    factory = _found(arch) if isinstance(arch, str) else arch
    if isinstance(factory, nn.Module):
        return copy.deepcopy(factory), name
    if not callable(factory):
        raise InputError(
            f"arch={name} is a {type(factory).__name__}; expected a class or function that makes a network"
        )
    try:
        with seeded():
            module = factory()
    except TypeError as error:
        raise InputError(f"arch={name} could not be called without arguments: {_first_line(error)}") from error
    if not isinstance(module, nn.Module):
        raise InputError(f"arch={name} made a {type(module).__name__}, expected a torch.nn.Module")
    return module, name


def _found(arch: str) -> Any:
    home, colon, attribute = arch.partition(":")
    if not (home and colon and attribute):
        raise InputError(f"arch={arch!r} must read package.module:factory, such as torchvision.models:resnet18")
    sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(home)
    except ImportError as error:
        raise InputError(f"arch={arch!r}: cannot import {home} ({_first_line(error)})") from error
    finally:
        sys.path.remove(os.getcwd())
    for name in attribute.split("."):
        if not hasattr(found, name):
            names = [n for n in dir(found) if not n.startswith("_") and callable(getattr(found, n))]
            raise unknown("factory", name, names, f" in {home}")
        found = getattr(found, name)
    return found
