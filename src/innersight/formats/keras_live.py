"""A keras.Model in memory: read like a file where its configuration says all, else watched as the torch module it is.

Nothing of Keras is imported here: what is needed is asked of the object itself.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from innersight.errors import InputError, Unsupported
from innersight.formats import Opened
from innersight.formats.keras import SIDE, Custom, open_described, prepared
from innersight.formats.keras_file import Weight

ROOTS = ("keras", "tf_keras")


def open_live(model: Any, custom: Custom) -> Opened:
    """A copy of a functional or Sequential model; if Keras runs on torch, else the model itself, watched as it runs.

    That is a model of a class of its own, or one with layers that are not known here. Raises Unsupported for those on
    another engine, InputError for what is no model or was never built.
    """
    if not hasattr(model, "layers") or not hasattr(model, "to_json"):
        raise InputError(f"a {type(model).__name__} of Keras is no model; open a keras.Model that holds it")
    text = _described(model)
    if text is None:
        return _open_watched(model)
    watchable = isinstance(model, nn.Module) and len(getattr(model, "inputs", ())) == 1
    try:
        opened = open_described(text, str(model.name), list(_weights(model)), _version(model), custom)
    except Unsupported as refused:  # a layer of one's own, a Lambda: its code is here already, and may be run
        if not watchable:
            raise
        opened = _open_watched(model)
        opened.notes.append(f"it is not copied as other functional models are: {refused}")
        return opened
    opened.notes.append("a copy of the model in memory as it is now; later changes to it are not seen")
    return opened


def _described(model: Any) -> str | None:
    """The configuration as JSON, if it says how the layers are connected."""
    try:
        text = model.to_json()
        entry = json.loads(text)
    except (NotImplementedError, TypeError, ValueError, AttributeError, RuntimeError):
        return None
    config = entry.get("config")
    own = any(c.__name__ == entry.get("class_name") and c.__module__.partition(".")[0] in ROOTS
              for c in type(model).__mro__[:1])  # fmt: skip
    return text if own and isinstance(config, Mapping) and config.get("layers") else None


def _version(model: Any) -> str:
    root = next((c.__module__.partition(".")[0] for c in type(model).__mro__ if _of_keras(c)), "keras")
    return str(getattr(sys.modules.get(root), "__version__", ""))


def _of_keras(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ROOTS


def _weights(model: Any) -> Iterator[Weight]:
    for layer in model.layers:
        for variable in layer.weights:
            yield Weight(getattr(variable, "path", None) or variable.name, as_array(variable), layer.name)


def as_array(variable: Any) -> np.ndarray:
    """The numbers of a Keras variable of any engine."""
    value = variable.numpy() if hasattr(variable, "assign") and not hasattr(variable, "path") else variable.value
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", torch.float32).numpy()
    return np.asarray(value, np.float32)


# --- a class of its own, on torch ------------------------------------------------------------------------------------


class Watched(nn.Module):
    """A Keras model that runs on torch, called with channels first; its layers are found under their attributes' names.

    Keras keeps its layers in lists of its own, which torch does not see as modules; here all are registered by path.
    The deepest come first, so that a layer is called by its whole path.
    """

    def __init__(self, model: Any, last: bool):
        super().__init__()
        self.__dict__["model"] = model  # not a module of its own: what it computes itself has no name in front
        self.last = last
        for path, layer in reversed(list(_paths(model))):
            layer.torch_params  # noqa: B018  made when first asked for: now, not in the midst of a run
            self.add_module(path, layer)
        self.add_module("_torch_params", model.torch_params)

    def forward(self, x: torch.Tensor) -> Any:
        model: Any = self.model
        made = model(x.movedim(1, -1) if self.last else x, training=False)
        values = list(made.values()) if isinstance(made, Mapping) else made
        if isinstance(values, (list, tuple)):
            return tuple(self._turned(v) for v in values)
        return self._turned(values)

    def _turned(self, value: torch.Tensor) -> torch.Tensor:
        return value.movedim(-1, 1) if self.last and value.dim() > 3 else value

    def __deepcopy__(self, memo: dict[int, Any]) -> Watched:
        try:
            return Watched(copy.deepcopy(self.model, memo), self.last)
        except TypeError as error:  # Keras copies by writing and reading, and reads registered classes alone
            kind = type(self.model).__name__
            raise Unsupported(
                f"Keras cannot copy {kind}, since it does not know the class again; put "
                "@keras.saving.register_keras_serializable() above it, or move the model itself to the device"
            ) from error


def _paths(layer: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every layer inside, under the name of the attribute, list or model that holds it."""
    seen: set[int] = set()
    names = _attributes(layer)
    for inner in getattr(layer, "_layers", []):
        if id(inner) in seen or not isinstance(inner, nn.Module):
            continue
        seen.add(id(inner))
        path = f"{prefix}{names.get(id(inner), inner.name)}".replace(".", "_")
        yield path, inner
        yield from _paths(inner, f"{path}/")


def _attributes(layer: Any) -> dict[int, str]:
    names: dict[int, str] = {}
    if type(layer).__module__.partition(".")[0] in ROOTS and hasattr(layer, "_nodes_by_depth"):
        return names  # a functional model: its layers' own names
    for name, value in {**getattr(layer, "_modules", {}), **vars(layer)}.items():
        if name.startswith("_"):
            continue
        if isinstance(value, nn.Module):
            names.setdefault(id(value), name)
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                names.setdefault(id(item), f"{name}/{i}")
        elif isinstance(value, Mapping):
            for key, item in value.items():
                names.setdefault(id(item), f"{name}/{key}")
    return names


def _open_watched(model: Any) -> Opened:
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise Unsupported(
            f"{kind} is a class of its own, whose code alone knows how its layers are connected, and Keras does not "
            "run on torch here: set KERAS_BACKEND=torch before Keras is imported, or export the model to ONNX with "
            "model.export('model.onnx', format='onnx')"
        )
    shape = _input_shape(model)
    keras = sys.modules.get("keras")
    last = keras is None or keras.config.image_data_format() != "channels_first"
    notes = [f"{kind} is watched as it runs on torch (Keras {_version(model)}); it is the model itself, not a copy"]
    if len(shape) != 3:
        raise Unsupported(f"{kind} takes inputs of shape {shape}; innersight explains networks of pictures")
    if None in shape:
        notes.append(f"its input size is open; {SIDE} is assumed (input_shape= changes it)")
    sizes = tuple(n or SIDE for n in shape)
    input_shape = (sizes[2], *sizes[:2]) if last else sizes
    module = Watched(model, last)
    x = torch.zeros((1, *input_shape), device=next(module.parameters(), torch.empty(0)).device, requires_grad=True)
    try:
        with torch.enable_grad():
            made = module(x)
    except (RuntimeError, ValueError, TypeError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{kind} cannot run on an input of shape {tuple(x.shape)} (it said: {said})") from error
    first = made[0] if isinstance(made, tuple) else made
    if not isinstance(first, torch.Tensor):
        raise Unsupported(f"{kind} returns a {type(first).__name__}, expected tensors")
    reached = first.requires_grad and torch.autograd.grad(first.sum(), x, allow_unused=True)[0] is not None
    if not reached:
        notes.append("no gradient reaches its input (a layer leaves torch), so methods without gradients remain")
    preprocess, more = prepared(input_shape)
    return Opened(module, str(model.name), input_shape, preprocess, notes=[*notes, *more])


def _input_shape(model: Any) -> tuple[int | None, ...]:
    """One input without the batch, in Keras's order. Raises InputError for a model that has never been called."""
    shapes = getattr(model, "_build_shapes_dict", None) or {}
    shape = next(iter(shapes.values()), None) or getattr(model, "input_shape", None)
    if isinstance(shape, (list, tuple)) and len(shape) == 1 and isinstance(shape[0], (list, tuple)):
        shape = shape[0]
    if not isinstance(shape, (list, tuple)) or not all(n is None or isinstance(n, int) for n in shape):
        raise InputError(
            f"{type(model).__name__} has never been called on one picture, so it has no weights yet; call it once"
        )
    return tuple(shape[1:])
