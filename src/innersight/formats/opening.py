"""One door for every source: `open_source` finds the format and puts the user's word over what the source says."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from innersight.errors import InputError
from innersight.formats import Assumed, Opened

if TYPE_CHECKING:
    import torch

    from innersight.preprocess import Preprocess

KERAS, ONNX, TFLITE = (".keras", ".h5", ".hdf5"), (".onnx",), (".tflite",)
ZOOS = ("torchvision", "timm", "hf")


def open_source(
    source: Any,
    *,
    arch: str | torch.nn.Module | Callable[[], torch.nn.Module] | None = None,
    weights: str | Path | None = None,
    labels: Sequence[str] | Mapping[int, str] | str | Path | None = None,
    input_shape: Sequence[int] | None = None,
    preprocess: Preprocess | Mapping[str, Any] | Any = None,
    device: str | torch.device | None = None,
    trust: bool = False,
    custom: Mapping[str, Any] | None = None,
    arithmetic: str | None = None,
) -> Opened:
    """Open a network from a module, a function, a zoo's name or a file.

    source:      torch.nn.Module (live, compiled, wrapped, scripted, traced), torch.export.ExportedProgram, any
                 function of a float32 array (N, C, H, W); "torchvision:NAME", "timm:NAME", "hf:NAME" or "hf:FOLDER";
                 a path to a TorchScript or exported program, to a Keras, ONNX or TFLite file, or to weights
                 (.safetensors, .pth, ...) with `arch`; a keras.Model or an onnx.ModelProto in memory
    arch:        what weights are for: "package.module:factory", "torchvision:NAME", "timm:NAME", a module, a class
    weights:     a file for a zoo's name or a module; "none" for an untrained network of a zoo
    labels:      class names in order, or by index, or a file of them (.txt a line each, .json)
    input_shape: one input, (C, H, W), over what the model says
    preprocess:  a `Preprocess`, a mapping of its fields (without a size, over what the model says), or a preset of
                 torchvision
    device:      where to run; by default where the model is. A model in memory that lies elsewhere is copied
    trust:       whether code in a file may run
    custom:      for Keras: class name -> what stands for a layer of that class, see `formats.keras`
    arithmetic:  for quantised files: whose integers are computed, see `formats.tflite`

    Raises InputError, UnknownName, Unsupported, UntrustedFile or MissingPackage, each with one sentence.
    """
    place = _device(device)
    opened = _opened(source, arch, weights, place, trust, _given(custom=custom, arithmetic=arithmetic))
    _move(opened, place, ours=isinstance(source, (str, Path)) or arch is not None or weights is not None)
    if labels is not None:
        opened.labels = read_labels(labels)
        opened.notes.append(f"{len(opened.labels)} labels as given")
    partial = dict(preprocess) if isinstance(preprocess, Mapping) and "size" not in preprocess else None
    if preprocess is not None and partial is None:
        opened.preprocess = _preprocess(preprocess)
        opened.input_shape = opened.preprocess.shape if input_shape is None else None
    if input_shape is not None:
        _reshape(opened, _shape(input_shape))
    if opened.input_shape is None:
        _find_shape(opened)
    if partial is not None:  # over what the model says, field by field
        stated = opened.preprocess or _for_shape(opened.input_shape or ())
        opened.preprocess = _preprocess({**stated.to_json(), **partial})
    if preprocess is not None and opened.preprocess is not None:
        opened.notes = [note for note in opened.notes if not isinstance(note, Assumed)]
        opened.notes.append(f"pictures are prepared as asked: {opened.preprocess.describe()}")
    return _checked(opened)


def _for_shape(shape: Sequence[int]) -> Preprocess:
    from innersight.preprocess import Preprocess

    return Preprocess.for_shape(shape)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _opened(source: Any, arch: Any, weights: Any, device: Any, trust: bool, options: dict[str, Any]) -> Opened:
    import torch

    if isinstance(source, (str, Path)) and not (isinstance(source, str) and source.partition(":")[0] in ZOOS):
        path = Path(source).expanduser()
        if path.suffix.lower() in (*KERAS, *ONNX, *TFLITE) and path.exists():
            return _opened_deployed(path, arch, weights, options)
    if _is_keras(source):
        from innersight.formats.keras import open_keras

        return open_keras(source, **_only(options, "custom", "a Keras model"))
    _only(options, "", "this source")
    if type(source).__name__ == "ModelProto" and type(source).__module__.partition(".")[0] == "onnx":
        from innersight.formats.onnx import open_onnx

        return open_onnx(source)

    if isinstance(source, str) and source.partition(":")[0] in ZOOS and ":" in source:
        if arch is not None:
            raise InputError(f"{source} names its architecture, so arch= has no place; weights= takes a file for it")
        from innersight.formats.zoos import open_named

        return open_named(source, weights, trust)
    if isinstance(source, (str, Path)):
        return _opened_file(Path(source).expanduser(), arch, weights, device, trust)
    if arch is not None:
        raise InputError("arch= says what a weights file is for; this source is no file")
    if isinstance(source, torch.jit.ScriptModule):
        from innersight.formats.torchscript import open_torchscript

        return open_torchscript(source, device)
    if isinstance(source, torch.export.ExportedProgram):
        from innersight.formats.exported import open_exported

        return open_exported(source, device)
    if isinstance(source, torch.nn.Module):
        if weights is not None:
            return _with_weights(source, Path(weights).expanduser(), trust)
        from innersight.formats.torch import open_module

        return open_module(source)
    if callable(source):
        if isinstance(source, type):
            raise InputError(f"{source.__name__} is a class, expected a network: open {source.__name__}(...)")
        from innersight.formats.function import open_function

        return open_function(source)
    raise InputError(
        f"cannot open a {type(source).__name__}; expected a torch module, a function, a zoo's name or a file"
    )


def _is_keras(source: Any) -> bool:
    return any(c.__module__.partition(".")[0] in ("keras", "tensorflow", "tf_keras") for c in type(source).__mro__)


def _only(options: dict[str, Any], known: str, what: str) -> dict[str, Any]:
    """The options, all of which must be known for such a source."""
    if others := [name for name in options if name != known]:
        kinds = {"custom": "Keras models", "arithmetic": "TFLite files"}
        raise InputError(f"{others[0]}= is for {kinds[others[0]]}; {what} has no use for it")
    return options


def _opened_deployed(path: Path, arch: Any, weights: Any, options: dict[str, Any]) -> Opened:
    """A file that holds a network and its weights as another library runs them."""
    if arch is not None or weights is not None:
        raise InputError(f"{path} brings its network and weights along; open it without arch= and weights=")
    if path.is_dir():
        raise InputError(f"{path} is a folder, expected a file")
    suffix = path.suffix.lower()
    if suffix in KERAS:
        from innersight.formats.keras import open_keras

        return open_keras(path, **_only(options, "custom", f"{path.name}"))
    if suffix in ONNX:
        from innersight.formats.onnx import open_onnx

        return open_onnx(path, **_only(options, "", f"{path.name}"))
    from innersight.formats.tflite import open_tflite

    return open_tflite(path, **_only(options, "arithmetic", f"{path.name}"))


def _opened_file(path: Path, arch: Any, weights: Any, device: Any, trust: bool) -> Opened:
    if not path.exists():
        named = "" if path.suffix or len(path.parts) > 1 else f'; a model by name reads "torchvision:{path}"'
        raise InputError(f"there is no file {path}{named}")
    from innersight.formats.weights import SUFFIXES, kind_of

    if not path.is_dir() and path.suffix.lower() not in SUFFIXES:
        known = ", ".join((*KERAS, *ONNX, *TFLITE, *SUFFIXES))
        raise InputError(f"{path} has the suffix {path.suffix or '(none)'}; expected one of {known}")
    kind = kind_of(path)
    if kind in ("torchscript", "exported"):
        if arch is not None or weights is not None:
            raise InputError(f"{path} brings its network and weights along; open it without arch= and weights=")
        if kind == "torchscript":
            from innersight.formats.torchscript import open_torchscript

            return open_torchscript(path, device)
        from innersight.formats.exported import open_exported

        return open_exported(path, device, trust)
    if weights is not None:
        raise InputError(f"{path} is a file of weights already, so weights= has no place; arch= says what they are for")
    return _with_weights(arch, path, trust)


def _with_weights(arch: Any, path: Path, trust: bool) -> Opened:
    """The weights in a file, in the architecture they are for."""
    from torch import nn

    from innersight.formats.torch import open_module, unwrap
    from innersight.formats.weights import build, matched, put_into, read, state_in

    if isinstance(arch, str) and arch.partition(":")[0] in ZOOS:
        from innersight.formats.zoos import open_named

        return open_named(arch, path, trust)
    held = read(path, trust)
    if arch is None and isinstance(held, Mapping):  # a trusted checkpoint may keep the whole network under a name
        held = next((v for k, v in held.items() if isinstance(v, nn.Module) and k in ("model", "net", "module")), held)
    if arch is None and isinstance(held, nn.Module):
        opened = open_module(held)
        opened.notes.append(f"{path.name} held the whole network; code from the file was run (trust=True)")
        return opened
    if arch is None:
        raise InputError(
            f'{path} holds weights alone; say what network they are for with arch="package.module:factory" '
            'or arch="torchvision:NAME"'
        )
    state, notes = state_in(held, path)
    module, name = build(arch)
    module, more = unwrap(module)
    state, renamed = matched(state, module.state_dict())
    put_into(module, state, path, name)
    opened = open_module(module)
    opened.name = name
    opened.notes += [f"weights from {path}", *notes, *more, *renamed]
    return opened


# --- the user's word over the source's -------------------------------------------------------------------------------


def read_labels(labels: Sequence[str] | Mapping[int, str] | str | Path) -> list[str]:
    """Class names in order: from a list, from {index: name}, or from a file of either (.json) or of lines (.txt)."""
    given: Any = labels
    if isinstance(labels, (str, Path)):
        path = Path(labels).expanduser()
        if not path.is_file():
            raise InputError(f"there is no file {path} with labels; labels= takes a list of names or a file of them")
        try:
            text = path.read_text(encoding="utf-8")
            given = json.loads(text) if path.suffix.lower() == ".json" else text.splitlines()
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise InputError(f"{path} is not a list of labels: {error}") from error
        if isinstance(given, list) and given and given[-1] == "":
            given = given[:-1]
    if isinstance(given, Mapping):
        try:
            names = {int(index): str(name) for index, name in given.items()}
        except ValueError:
            raise InputError("labels given by name must be keyed by the class's index: {0: 'cat', 1: 'dog'}") from None
        return [names.get(i, str(i)) for i in range(max(names, default=-1) + 1)]
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise InputError(f"labels must be a list of names, got {type(given).__name__}")
    return [str(name) for name in given]


def _preprocess(given: Any) -> Preprocess:
    from innersight.preprocess import Preprocess

    if isinstance(given, Preprocess):
        return given
    if isinstance(given, Mapping):
        return Preprocess.from_json(given)
    record, reason = Preprocess.from_torchvision(given)
    if record is None:
        raise InputError(f"preprocess= takes an innersight Preprocess, its record or a preset of torchvision: {reason}")
    return record


def _shape(given: Sequence[int]) -> tuple[int, ...]:
    try:
        shape = tuple(int(side) for side in given)
    except (TypeError, ValueError):
        shape = ()
    if len(shape) < 3 or any(side < 1 for side in shape):
        raise InputError(f"input_shape must be (C, H, W), positive whole numbers, got {given!r}")
    return shape


def _reshape(opened: Opened, shape: tuple[int, ...]) -> None:
    """Take pictures at another size than the model's own: the margin of its crop grows or shrinks along."""
    known = opened.preprocess
    opened.input_shape = shape
    if known is None or known.shape == shape:
        return
    if len(shape) != 3 or shape[0] != known.shape[0]:
        opened.preprocess = None
        opened.notes.append("the model's preprocessing does not fit input_shape=; preprocess= says another")
        return
    by = min(shape[1] / known.size[0], shape[2] / known.size[1])
    to = known.resize_to
    resized = None if to is None else round(to * by) if isinstance(to, int) else (round(to[0] * by), round(to[1] * by))
    opened.preprocess = dataclasses.replace(known, size=shape[1:], resize_to=resized)
    opened.notes.append(f"pictures are brought to {shape[1]}x{shape[2]} instead of {known.size[0]}x{known.size[1]}")


def _find_shape(opened: Opened) -> None:
    from innersight.formats.function import Function
    from innersight.formats.torch import guess_input_shape

    if isinstance(opened.module, Function):
        opened.notes.append("its input size is that of the images it is given; without images, input_shape= says it")
        return
    opened.input_shape, note = guess_input_shape(opened.module, opened.call)
    opened.notes.append(note)


def _checked(opened: Opened) -> Opened:
    from innersight.formats.torchscript import Scripted, compare

    return compare(opened) if isinstance(opened.module, Scripted) else opened


def _device(device: Any) -> Any:
    import torch

    if device is None:
        return None
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"no device {device!r}: {str(error).splitlines()[0]}") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"no device {str(place)!r} here: torch finds no CUDA; use device='cpu'")
    return place


def _move(opened: Opened, device: Any, ours: bool) -> None:
    """Bring the network to the device; one that belongs to the caller is copied first."""
    if device is None:
        return
    here = {t.device for t in (*opened.module.parameters(), *opened.module.buffers())}
    if all(place.type == device.type and (device.index is None or place == device) for place in here):
        return
    if not ours:
        opened.module = copy.deepcopy(opened.module)
        opened.notes.append(f"a copy runs on {device}; the model itself stays on {', '.join(map(str, here))}")
    opened.module = opened.module.to(device)
