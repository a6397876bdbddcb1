"""A PyTorch module in memory: unwrapped, and asked what it says of itself."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from innersight.errors import InputError, Unsupported
from innersight.formats import Opened
from innersight.observe.guard import as_found
from innersight.observe.observer import first_tensor
from innersight.preprocess import Preprocess

# Sides that are tried, in this order, where nothing says what a network takes: ImageNet's first, then the small sets'.
SIDES = {1: (28, 32, 64, 96, 128, 224, 256), 3: (224, 32, 64, 96, 128, 299, 256, 384, 512, 28)}
CLIPS = ((16, 112, 112), (16, 224, 224), (8, 64, 64), (32, 224, 224))
LENGTHS = (128, 256, 512, 1024, 4096)
DETECTOR_SIZE = (480, 640)


def open_module(module: nn.Module) -> Opened:
    """A network as it is in memory; nothing of it is changed or copied.

    Raises Unsupported for one whose forward cannot do with a single input.
    """
    module, notes = unwrap(module)
    if any(p.is_meta for p in module.parameters()):
        raise Unsupported(
            f"{type(module).__name__} is on the meta device: it has shapes but no values; load its weights first"
        )
    opened = Opened(module, type(module).__name__, notes=notes)
    for describe in (_detector, _timm, _transformers):
        describe(opened)
    if opened.call is None:
        check_one_input(module)
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    if dtype != torch.float32:
        opened.call = _in_dtype(dtype, opened.call)
        notes.append(
            f"its weights are {str(dtype).removeprefix('torch.')}; images are turned into that before they enter"
        )
    return opened


def unwrap(module: nn.Module) -> tuple[nn.Module, list[str]]:
    """The network inside `torch.compile`, `DataParallel` and `DistributedDataParallel`, and notes that say so."""
    notes = []
    while True:
        kind = type(module).__name__
        if kind == "OptimizedModule" and isinstance(getattr(module, "_orig_mod", None), nn.Module):
            module = module._orig_mod  # type: ignore[assignment]
            notes.append("taken out of torch.compile: the network itself is looked at, not its compiled code")
        elif isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
            notes.append(f"taken out of {kind}")
        else:
            return module, notes


def check_one_input(module: nn.Module) -> None:
    """Refuse a network that cannot run on one tensor alone, naming what its forward asks for."""
    kind = type(module).__name__
    if getattr(module.forward, "__name__", "") == "_forward_unimplemented":
        raise Unsupported(f"{kind} has no forward, so it cannot be run; open the network that uses it")
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # built-in code without a signature
        return
    required = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]  # fmt: skip
    if len(required) > 1:
        raise Unsupported(
            f"{kind}.forward needs {len(required)} inputs ({', '.join(required)}), one image batch is given: "
            "wrap it in a module that supplies the others"
        )


def _in_dtype(dtype: torch.dtype, call: Callable | None) -> Callable[[nn.Module, torch.Tensor], Any]:
    run = call or (lambda module, batch: module(batch))
    return lambda module, batch: run(module, batch.to(dtype))


# --- what a model says of itself -------------------------------------------------------------------------------------


def _detector(opened: Opened) -> None:
    """torchvision's detectors take a list of pictures of any size, 0..1, and normalize and resize them themselves."""
    if not any(c.__module__.startswith("torchvision.models.detection.") for c in type(opened.module).__mro__):
        return
    opened.call = lambda module, batch: module(list(batch))
    opened.input_shape = (3, *DETECTOR_SIZE)
    opened.preprocess = Preprocess(DETECTOR_SIZE, resize="keep")
    opened.notes.append(
        "a torchvision detector: pictures go in as they are, 0..1, and it resizes and normalizes them itself; "
        f"input {_by(opened.input_shape)} assumed where there is no picture, input_shape= changes it"
    )


def _timm(opened: Opened) -> None:
    config = getattr(opened.module, "pretrained_cfg", None) or getattr(opened.module, "default_cfg", None)
    if not (isinstance(config, Mapping) and "input_size" in config):
        return
    opened.input_shape = tuple(config["input_size"])
    opened.preprocess, note = Preprocess.from_timm(config)
    opened.notes += [f"timm: {note}"] if note else []
    opened.name = config.get("architecture") or opened.name
    opened.labels = _imagenet_labels(opened.module)


def _imagenet_labels(module: nn.Module) -> list[str] | None:
    """ImageNet's class names where timm knows that the head is one of ImageNet's."""
    if "timm" not in sys.modules:
        return None
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(module)
    if not subset:
        return None
    info = ImageNetInfo(subset)
    return [info.index_to_description(i) for i in range(info.num_classes())]


def _transformers(opened: Opened) -> None:
    module = opened.module
    config = getattr(module, "config", None)
    if not any(c.__module__.startswith("transformers.modeling_utils") for c in type(module).__mro__) or config is None:
        return
    parameters = inspect.signature(module.forward).parameters
    kind = type(module).__name__
    if "pixel_values" not in parameters:
        raise Unsupported(f"{kind} takes no pictures: its forward has {', '.join(list(parameters)[:3])}")
    if "input_ids" in parameters:
        raise Unsupported(f"{kind} needs text and a picture together; open its vision part, such as model.vision_model")
    opened.call = lambda module, batch: module(pixel_values=batch)
    side = getattr(config, "image_size", None)
    if side:
        height, width = (side, side) if isinstance(side, int) else tuple(side)[-2:]
        opened.input_shape = (getattr(config, "num_channels", 3), height, width)
    names = dict(getattr(config, "id2label", None) or {})
    if names and any(name != f"LABEL_{i}" for i, name in names.items()):  # those are placeholders
        opened.labels = [str(names.get(i, i)) for i in range(max(names) + 1)]


# --- finding an input size -------------------------------------------------------------------------------------------


def guess_input_shape(module: nn.Module, call: Callable | None = None) -> tuple[tuple[int, ...], str]:
    """The first likely input shape `(C, H, W)` on which the network runs, and a note that it was found by trying.

    The number of channels is that of the first convolution (or of a patch embedding); a network which begins with a
    linear layer is given a square picture of that many pixels, else a vector. The network is left as it was.

    Raises InputError if none fits.
    """
    device = next((t.device for t in _tensors(module)), torch.device("cpu"))
    tried: list[str] = []
    reason = ""
    for shape in dict.fromkeys(_candidates(module)):
        noise = torch.rand((1, *shape), generator=torch.Generator().manual_seed(0)).to(device)
        try:
            with as_found(module), torch.no_grad():
                output = first_tensor(call(module, noise) if call else module(noise))
        except Exception as error:  # whatever a network raises for a size that does not fit it
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        else:
            # x.view(-1, 400) makes several rows of one picture that is too large, and no error
            if output is None or output.dim() == 0 or output.shape[0] == 1:
                return shape, f"input {_by(shape)} was found by trying which size it runs on; input_shape= changes it"
            reason = f"one image became {output.shape[0]} rows of output"
        tried.append(_by(shape))
    raise InputError(
        f"no input size found that {type(module).__name__} runs on (tried {', '.join(tried)}; the last: {reason}); "
        "give input_shape=(C, H, W)"
    )


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _candidates(module: nn.Module) -> Iterator[tuple[int, ...]]:
    everything: list[Any] = list(module.modules())
    weights = [(m, m.weight) for m in everything if isinstance(getattr(m, "weight", None), torch.Tensor)]
    layers = [(m, w) for m, w in weights if w.dim() >= 2 and type(m).__name__ != "Embedding"]
    if layers and layers[0][1].dim() == 2 and not any(w.dim() > 2 for _, w in layers):
        yield from _flat(layers[0][1].shape[1])
        return
    convolutions = [(m, w) for m, w in layers if w.dim() > 2]
    axes = convolutions[0][1].dim() - 2 if convolutions else 2
    found = [getattr(m, "in_channels", w.shape[1]) for m, w in convolutions if w.dim() - 2 == axes]
    for channels in dict.fromkeys([*found[:1], *[c for c in (3, 1) if c in found or not found]]):
        if axes == 3:
            yield from ((channels, *clip) for clip in CLIPS)
        elif axes == 1:
            yield from ((channels, length) for length in LENGTHS)
        else:
            yield from ((channels, *said) for said in _sizes_said(module))
            yield from ((channels, side, side) for side in SIDES.get(channels, SIDES[3]))


def _sizes_said(module: nn.Module) -> Iterator[tuple[int, int]]:
    """What the network, or a part such as a patch embedding, keeps under the usual names."""
    for part in module.modules():
        for name in ("image_size", "img_size"):
            side = getattr(part, name, None)
            if isinstance(side, int) and side > 0:
                yield side, side
            elif isinstance(side, (tuple, list)) and len(side) == 2 and all(isinstance(s, int) for s in side):
                yield side[0], side[1]


def _flat(features: int) -> Iterator[tuple[int, ...]]:
    for channels in (1, 3):
        side = round((features / channels) ** 0.5)
        if side * side * channels == features and side > 1:
            yield channels, side, side
    yield (features,)


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
