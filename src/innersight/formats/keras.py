"""Keras models: `.keras` and `.h5` files of Keras 2 and 3, and keras.Model objects in memory, as torch networks.

Neither Keras nor TensorFlow is needed for a file. Its configuration is read as data, each layer becomes a torch call
under the name that the file gives it, and every value is `(N, C, H, W)`. Where the engines of Keras differ, TensorFlow
is followed. No code from a file is run: a `Lambda`, or a class that is not Keras's own, is refused by name, and
`custom=` says what stands for such a class.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from innersight.errors import InnersightError, InputError, Unsupported
from innersight.formats import Assumed, Opened
from innersight.formats.keras_file import Contents, Weight, configuration, read
from innersight.formats.keras_graph import Assembly, Layer, Model, operation_name, parse, refs_in
from innersight.formats.keras_layers import MAX_VALUE, Value
from innersight.preprocess import Preprocess

SIDE = 224
"""Height and width where the configuration leaves them open."""

Custom = Mapping[str, Callable[[dict[str, Any], list[torch.Tensor]], torch.nn.Module]]


def open_keras(source: Any, custom: Custom | None = None) -> Opened:
    """A Keras model from a file or from memory.

    source: a path to a `.keras`, `.h5` or `.hdf5` file; or a keras.Model. Of a functional or Sequential model, on any
            engine, a copy is made; a model of a class of its own is watched as the torch module that it is, if Keras
            runs on torch
    custom: class name -> a function of (configuration, weights) that returns the torch.nn.Module that stands for a
            layer of that class. Weights come as Keras made them, as tensors in Keras's axes; the module is called with
            pictures as `(N, C, H, W)`, vectors as `(N, K)`, and must answer in the same way. The same for the name of
            an activation of your own, called with ({}, [])

    Raises InputError for a file that is damaged or makes no sense, Unsupported for what is not known here (a layer, an
    operation, several inputs), MissingPackage without h5py.
    """
    if isinstance(source, Path):
        return _guarded(str(source), lambda: _opened(read(source), source.name, custom or {}))
    from innersight.formats.keras_live import open_live

    return open_live(source, custom or {})


def _guarded(what: str, make: Callable[[], Opened]) -> Opened:
    """`make()`, with every refusal beginning with what was opened."""
    try:
        return make()
    except InnersightError as error:
        said = str(error)
        if said.startswith(what) or type(error) not in (InputError, Unsupported):
            raise
        raise type(error)(f"{what}: {said}") from error
    except MemoryError as error:
        raise InputError(f"{what} asks for more memory than there is") from error
    except Exception as error:  # a configuration that is no Keras model's can be wrong in any way
        said = ascii((str(error).strip().splitlines() or [""])[0])[1:-1][:200]
        said = "it is nested too deeply" if isinstance(error, RecursionError) else said or type(error).__name__
        raise InputError(f"{what} has a configuration that cannot be understood: {said}") from error


def _opened(contents: Contents, name: str, custom: Custom) -> Opened:
    keras2 = not contents.version.startswith(("3", "4"))
    model = parse(contents.config)
    notes = [f"{model.kind} model of Keras {contents.version}" if contents.version else f"{model.kind} model of Keras"]
    shape, start, said = _entrance(model)
    notes += said
    graph = Assembly(model, contents, custom, keras2).graph(start).eval()
    preprocess, more = _preparation(model, shape)
    notes += more + _ending(model)
    return Opened(graph, name, input_shape=shape, preprocess=preprocess, notes=notes)


# --- the entrance ----------------------------------------------------------------------------------------------------


def _entrance(model: Model) -> tuple[tuple[int, ...], Callable[[torch.Tensor], Value], list[str]]:
    """(C, H, W) of an input, what the input layer makes of such a batch, and what was assumed."""
    sizes = _sizes(model)
    notes: list[str] = []
    if sizes is None:
        sizes = [None, None, None]
        notes.append("the file does not say its input size")
    if not 1 <= len(sizes) <= 4:
        raise Unsupported(f"the model takes inputs with {len(sizes)} axes; innersight explains networks of pictures")
    if len(sizes) == 1:
        return _from_vector(sizes[0])
    if len(sizes) == 2 and not _sequence(model):  # a grey picture without an axis for its one channel
        height, width = (n or SIDE for n in sizes)
        return (1, height, width), lambda x: Value(x.squeeze(1)), notes
    first = _channels_first(model)
    *space, channels = [*sizes[1:], sizes[0]] if first else sizes
    channels = channels or 3
    if None in space:
        side = _known_side(model)
        space = [n or side for n in space]
        notes.append(f"its input size is open; {'x'.join(map(str, space))} is assumed (input_shape= changes it)")
    shape = (channels, *(n or SIDE for n in space))
    if math.prod(shape) > MAX_VALUE:
        raise InputError(f"an input of {shape} is larger than any picture")
    if first:
        return shape, lambda x: Value(x), notes
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape) + 1)
    if form is None:
        return shape, lambda x: Value(x, True), notes
    return shape, lambda x: Value(x.contiguous(memory_format=form), True), notes


def _sizes(model: Model) -> list[int | None] | None:
    """The sizes of an input without the batch, in Keras's order."""
    layer = model.layers.get(model.inputs[0].layer)
    while layer is not None and layer.inner is not None:
        layer = layer.inner.layers.get(layer.inner.inputs[0].layer)
    config = layer.config if layer is not None else {}
    found = config.get("batch_shape") or config.get("batch_input_shape")
    if not found and model.kind == "Sequential":  # the first real layer may know it
        for other in model.layers.values():
            inner = other.inner
            while inner is not None and found is None:
                entry = inner.layers.get(inner.inputs[0].layer)
                found = entry.config.get("batch_shape") or entry.config.get("batch_input_shape") if entry else None
                inner = next((x.inner for x in inner.layers.values() if x.inner), None)
            if found or other.kind != "InputLayer":
                break
    if not isinstance(found, (list, tuple)) or len(found) < 2:
        return None
    sizes = list(found[1:])
    if not all(n is None or (type(n) is int and n > 0) for n in sizes):
        raise InputError(f"the input has the shape {found!r}; expected whole numbers")
    return sizes


def _from_vector(size: int | None) -> tuple[tuple[int, ...], Callable[[torch.Tensor], Value], list[str]]:
    """A network of vectors takes square pictures, if a vector is one written out row by row."""
    for channels in (1, 3):
        side = math.isqrt((size or 0) // channels)
        if size and side * side * channels == size:
            note = f"the model takes vectors of {size} numbers: {side}x{side} pictures, row by row"
            return (channels, side, side), lambda x: Value(x.movedim(1, -1).flatten(1)), [note]
    raise Unsupported(f"the model takes vectors of {size} numbers, which are no square pictures")


def _walk(model: Model) -> list[Layer]:
    """The layers in the order in which the input reaches them, those of inner models in their place."""
    readers: dict[str, list[Layer]] = {}
    for layer in model.layers.values():
        for call in layer.calls:
            for ref in refs_in((call.args, call.kwargs)):
                readers.setdefault(ref.layer, []).append(layer)
    found: dict[int, Layer] = {}
    pending = [ref.layer for ref in model.inputs]
    for name in pending:
        for layer in readers.get(name, []):
            if id(layer) in found:
                continue
            found[id(layer)] = layer
            pending.append(layer.name)
    return [leaf for x in found.values() for leaf in ([x] if x.inner is None else _walk(x.inner))]


def _channels_first(model: Model) -> bool:
    """Whether the input's channels come first, as the first layer that cares says."""
    turned = False
    for layer in _walk(model):
        if layer.kind == "Permute":
            turned ^= layer.config.get("dims") in ([2, 3, 1], [3, 1, 2], (2, 3, 1), (3, 1, 2))
        elif layer.config.get("data_format") in ("channels_first", "channels_last") and layer.kind != "Flatten":
            return (layer.config["data_format"] == "channels_first") != turned
        elif layer.kind in ("Dense", "Flatten", "Reshape"):
            break
    return False


def _sequence(model: Model) -> bool:
    """Whether the first layer that looks at neighbors does so along one axis."""
    for layer in _walk(model):
        if "1D" in layer.kind and layer.kind != "SpatialDropout1D":
            return True
        if layer.kind in ("Flatten", "Reshape") or "2D" in layer.kind or "3D" in layer.kind:
            return False
    return False


# --- how pictures are prepared ---------------------------------------------------------------------------------------

_BEHIND_THE_INPUT = ("Resizing", "CenterCrop", "InputLayer", "Identity", "Permute", "ZeroPadding2D")
_FAMILIES = (  # (name in keras.applications begins so, family, side, what its own preprocess_input does)
    ("mobilenetv3|MobilenetV3|MobileNetV3", "MobileNetV3", 224, ""),
    ("mobilenetv2", "MobileNetV2", 224, "tf"),
    ("mobilenet_", "MobileNet", 224, "tf"),
    ("inception_resnet_v2", "InceptionResNetV2", 299, "tf"),
    ("inception_v3", "InceptionV3", 299, "tf"),
    ("xception", "Xception", 299, "tf"),
    (r"resnet(50|101|152)v2", "ResNetV2", 224, "tf"),
    (r"resnet(50|101|152)$", "ResNet", 224, "caffe"),
    (r"vgg(16|19)$", "VGG", 224, "caffe"),
    (r"densenet(121|169|201)?$", "DenseNet", 224, "torch"),
    ("NASNet|nasnet", "NASNet", 224, "tf"),
    ("efficientnet|EfficientNet", "EfficientNet", 224, ""),
    ("convnext", "ConvNeXt", 224, ""),
)
_STYLES = {
    "tf": "scale 1/127.5, mean 1",
    "caffe": "channels BGR, scale 1, mean 103.939, 116.779, 123.68",
    "torch": "mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225",
}


def _family(model: Model) -> tuple[str, int, str] | None:
    """The family of keras.applications that the model, or one in it, is named after: family, side, style."""
    names = [model.name, *(layer.name for layer in model.layers.values() if layer.inner is not None)]
    for name in names:
        for pattern, family, side, style in _FAMILIES:
            if re.match(pattern, name):
                return family, side, style
    return None


def _known_side(model: Model) -> int:
    found = _family(model)
    return found[1] if found else SIDE


def _preparation(model: Model, shape: tuple[int, ...]) -> tuple[Preprocess | None, list[str]]:
    """What is done to a picture, and what was found or assumed of it."""
    first = next((x for x in _walk(model) if not _passes(x)), None)
    if first is not None and len(shape) == 3 and shape[0] in (1, 3):
        what = f"{first.kind if first.config.get('function') is None else 'the operation'} {first.name!r} at its front"
        if _of_pixels(first):
            return _record(shape, 1.0), [f"{what} is for pixels 0..255, so pictures are given as those"]
        if first.kind in ("Rescaling", "Normalization"):
            return _record(shape), [f"{what} is for values 0..1 (preprocess= changes it)"]
    preprocess, notes = prepared(shape)
    known = _family(model)
    if known is not None and known[2]:
        notes.append(f"{known[0]} of keras.applications, as its preprocess_input has it: {_STYLES[known[2]]}")
    return preprocess, notes


def prepared(shape: tuple[int, ...]) -> tuple[Preprocess | None, list[str]]:
    """What is assumed where nothing says how pictures are prepared, and a note of it."""
    if len(shape) != 3 or shape[0] not in (1, 3):
        return None, [f"an input of shape {shape} cannot be read from a picture file; give float batches (N, C, H, W)"]
    said = "nothing says how pictures are prepared: values 0..1 are assumed; preprocess= says another (scale 1: 0..255)"
    return _record(shape), [Assumed(said)]


def _record(shape: tuple[int, ...], scale: float = 1 / 255) -> Preprocess:
    return Preprocess((shape[1], shape[2]), channels="RGB" if shape[0] == 3 else "L", scale=scale)


def _passes(layer: Layer) -> bool:
    """Whether what is said of the layer's output holds for its input: it moves values, or mirrors the channels."""
    moves = layer.kind in _BEHIND_THE_INPUT or layer.kind.startswith("Random") or "Dropout" in layer.kind
    return moves or operation_name(layer) in ("get_item", "getitem", "cast")


def _of_pixels(layer: Layer) -> bool:
    """Whether a layer or an operation that scales its input is made for 0..255."""
    if layer.kind == "Rescaling":
        scale = np.asarray(layer.config.get("scale", 1.0), np.float64)
        return bool(np.abs(scale).max(initial=0) < 0.5)
    if layer.kind == "Normalization":
        mean = np.asarray(layer.config.get("mean") or 0.0, np.float64)
        variance = np.asarray(layer.config.get("variance") or 1.0, np.float64)
        return bool(max(np.abs(mean).max(initial=0), variance.max(initial=0)) > 2)
    name = operation_name(layer)
    numbers = [abs(n) for call in layer.calls for n in _numbers((call.args, call.kwargs))]
    if name in ("multiply", "mul"):
        return bool(numbers) and max(numbers) < 0.1
    return name in ("true_divide", "truediv", "divide", "subtract", "add", "bias_add") and max(numbers, default=0) > 50


def _numbers(tree: Any) -> list[float]:
    if isinstance(tree, (list, tuple)):
        return [n for item in tree for n in _numbers(item)]
    if isinstance(tree, dict):
        return [n for item in tree.values() for n in _numbers(item)]
    if isinstance(tree, np.ndarray):
        return [float(n) for n in tree.reshape(-1)[:1000]]
    return [float(tree)] if isinstance(tree, (int, float)) and not isinstance(tree, bool) else []


# --- the end ---------------------------------------------------------------------------------------------------------


def _ending(model: Model) -> list[str]:
    notes = []
    last: Layer | None = model.layers.get(model.outputs[0].layer)
    while last is not None and last.inner is not None:
        last = last.inner.layers.get(last.inner.outputs[0].layer)
    if last is not None:
        ending = last.config.get("activation") if last.kind != "Softmax" else "softmax"
        if ending in ("softmax", "sigmoid"):
            notes.append(f"its output is a {ending}: probabilities")
    if len(model.outputs) > 1:
        names = ", ".join(ref.layer for ref in model.outputs)
        notes.append(f"it has {len(model.outputs)} outputs ({names}); the first is explained (output= chooses)")
    return notes


# --- a functional model in memory ------------------------------------------------------------------------------------


def open_described(text: str, name: str, weights: list[Weight], version: str, custom: Custom) -> Opened:
    """A model from its configuration as JSON and its weights by layer."""
    contents = Contents(configuration(text, name), version, by_number=False, weights=weights)
    return _guarded(name, lambda: _opened(contents, name, custom))
