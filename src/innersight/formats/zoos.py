"""Networks by name: torchvision:NAME, timm:NAME, hf:NAME, with the library's weights, a file's, or none."""

from __future__ import annotations

import inspect
import logging
import re
import socket
import sys
import threading
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from innersight.errors import InputError, Unsupported, need, unknown
from innersight.formats import Opened
from innersight.formats.torch import open_module
from innersight.formats.weights import by, few, matched, mismatched, put_into, read, refuse, seeded, state_in
from innersight.preprocess import Preprocess

TIMEOUT = 10  # seconds without a byte before a download is given up


def open_named(source: str, weights: str | Path | None = None, trust: bool = False) -> Opened:
    """A network of a model zoo.

    weights: None, the library's default weights, from its cache or by download; "none", an untrained network with the
             same initial values every time; the name of another set of weights (torchvision); or a file
    """
    zoo, _, name = source.partition(":")
    if zoo not in ZOOS:
        raise unknown("model zoo", zoo, ZOOS)
    return ZOOS[zoo](name, weights, trust)


def _untrained(opened: Opened, source: str) -> Opened:
    opened.notes.insert(0, f'{source} is untrained (weights="none"): its answers and maps mean nothing')
    return opened


def _no_weights(source: str, where: str, reason: object = "") -> InputError:
    because = f" ({str(reason).strip().splitlines()[0][:150]})" if str(reason).strip() else ""
    return InputError(
        f"the weights of {source} are not in {where} and cannot be downloaded{because}; "
        'give weights="FILE" for a file of them, or weights="none" for an untrained network'
    )


def _from_file(
    build: Callable[..., nn.Module], weights: str | Path, source: str, trust: bool
) -> tuple[nn.Module, int | None, list[str]]:
    """The network with a file's weights; (module, its number of classes if it is not the usual one, notes)."""
    path = Path(weights).expanduser()
    state, notes = state_in(read(path, trust), path)
    with seeded():
        module = build()
    own = module.state_dict()
    state, more = matched(state, own)
    wrong = mismatched(state, own)
    count = None
    heads = {state[k].shape[0] for k in wrong if state[k].shape[1:] == own[k].shape[1:]}
    if len(heads) == 1 and all(state[k].shape[1:] == own[k].shape[1:] for k in wrong):
        (count,) = heads  # only the head differs: the same network trained on other classes
        with seeded():
            module = build(num_classes=count)
        notes.append(f"the weights are for {count} classes, so the network was built with that many")
    put_into(module, state, path, source)
    return module, count, [f"weights from {path}", *notes, *more]


# --- torchvision -----------------------------------------------------------------------------------------------------


def open_torchvision(name: str, weights: str | Path | None, trust: bool) -> Opened:
    import torchvision.models as zoo

    source = f"torchvision:{name}"
    if name not in zoo.list_models():
        raise unknown("torchvision model", name, zoo.list_models())
    choices = zoo.get_model_weights(name)
    preset = getattr(choices, "DEFAULT", None)
    if preset is not None and type(preset.transforms()).__name__ == "OpticalFlow":
        raise Unsupported(
            f"{source} takes two pictures and returns how the first moves into the second; innersight gives it one"
        )

    def build(**options: Any) -> nn.Module:
        accepted = inspect.signature(zoo.get_model_builder(name)).parameters
        fixed = {"weights_backbone": None, "init_weights": True}  # no download by the way, and no warning
        options = {k: v for k, v in fixed.items() if k in accepted} | options
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torchvision to its own authors
            return zoo.get_model(name, progress=False, **({"weights": None} | options))

    count: int | None = None
    notes: list[str] = []
    if weights == "none":
        with seeded():
            module = build()
    elif weights is None or str(weights) in choices.__members__:
        chosen = preset if weights is None else choices[str(weights)]
        if chosen is None:
            raise InputError(f'torchvision has no weights for {name}; give weights="FILE" or weights="none"')
        preset = chosen
        _fetch(chosen.url, source)
        with _quick():
            module = build(weights=chosen, **({"quantize": True} if "backend" in chosen.meta else {}))
        notes.append(f"weights {chosen}")
    else:
        module, count, notes = _from_file(build, weights, source, trust)
    opened = open_module(module)
    opened.name = source
    opened.notes += notes
    if preset is not None:
        _torchvision_preset(opened, preset, count, chosen=weights is None or str(weights) in choices.__members__)
    return _untrained(opened, source) if weights == "none" else opened


def _torchvision_preset(opened: Opened, preset: Any, count: int | None, chosen: bool) -> None:
    transform = preset.transforms()
    categories = preset.meta.get("categories")
    if count is not None and count != len(categories or ()):
        opened.notes.append(f"{count} classes without names; labels= gives them")
    else:
        opened.labels = categories
    if not chosen:
        of_labels = " and labels" if opened.labels else ""
        opened.notes.append(
            f"preprocessing{of_labels} are those of {preset} where preprocess= and labels= do not say otherwise"
        )
    if type(transform).__name__ == "VideoClassification":
        frames = max(16, preset.meta.get("min_temporal_size", 1))
        opened.input_shape = (3, frames, *transform.crop_size)
        opened.notes.append(f"it takes clips: pass a float tensor (N, 3, {frames}, H, W), normalized")
        return
    preprocess, note = Preprocess.from_torchvision(transform)
    if preprocess is not None:
        opened.preprocess = preprocess
        opened.input_shape = preprocess.shape
    if note and opened.call is None:
        opened.notes.append(note)


def _fetch(url: str, source: str) -> None:
    """Bring a file into torch.hub's cache unless it is there."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    target = folder / Path(urllib.parse.urlparse(url).path).name
    if target.exists():
        return
    if not reachable(url):
        raise _no_weights(source, str(folder))
    digest = re.search(r"-([a-f0-9]{8,})\.", target.name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _quick():
            torch.hub.download_url_to_file(url, str(target), digest[1] if digest else None, progress=False)
    except (OSError, RuntimeError) as error:
        raise _no_weights(source, str(folder), error) from error


# --- timm ------------------------------------------------------------------------------------------------------------


def open_timm(name: str, weights: str | Path | None, trust: bool) -> Opened:
    timm = need("timm", "timm", "opening timm models")
    source = f"timm:{name}"
    if not name.startswith("hf-hub:") and not timm.is_model(name):
        raise unknown("timm model", name, timm.list_models())

    def build(**options: Any) -> nn.Module:
        return timm.create_model(name, **options)

    count: int | None = None
    notes: list[str] = []
    if weights == "none":
        with seeded():
            module = build()
    elif weights is None:
        with _hub():
            try:
                module = build(pretrained=True)
            except Exception as error:  # each way to the hub fails in its own way
                raise _no_weights(source, "the cache", error) from error
    else:
        module, count, notes = _from_file(build, weights, source, trust)
    opened = open_module(module)
    opened.name = source
    opened.notes += notes
    if count is not None:
        opened.labels = None
        opened.notes.append(f"{count} classes without names; labels= gives them")
    return _untrained(opened, source) if weights == "none" else opened


# --- transformers ----------------------------------------------------------------------------------------------------


def open_transformers(name: str, weights: str | Path | None, trust: bool) -> Opened:
    transformers = need("transformers", "hf", "opening hf: models")
    source = f"hf:{name}"
    folder = Path(name).expanduser()
    local = folder.is_dir()
    if local and not (folder / "config.json").exists():
        raise InputError(f"{folder} has no config.json; expected a folder written by save_pretrained")
    where = str(folder) if local else name
    options = {"trust_remote_code": trust}
    with _hub(needed=not local):
        try:
            config = transformers.AutoConfig.from_pretrained(where, **options)
        except Exception as error:
            if "trust_remote_code" in str(error):
                raise InputError(
                    f"{source} brings code of its own; if you trust it, open it with trust=True"
                ) from error
            raise _no_weights(source, "the cache", error) from error
        kind = _transformers_class(transformers, config)
        notes: list[str] = []
        with seeded():
            if weights == "none":
                make = getattr(kind, "from_config", None) or kind._from_config
                module = make(config)
            elif weights is None:
                try:
                    module, report = kind.from_pretrained(where, output_loading_info=True, **options)
                except Exception as error:
                    raise _no_weights(source, str(folder) if local else "the cache", error) from error
                if report["missing_keys"]:
                    missing = few(sorted(report["missing_keys"]))
                    notes.append(f"its weights lack {missing}, which are random: what depends on them means nothing")
            else:
                path = Path(weights).expanduser()
                state, notes = state_in(read(path, trust), path)
                module, report = kind.from_pretrained(
                    None, config=config, state_dict=state, output_loading_info=True, ignore_mismatched_sizes=True
                )
                wrong = [f"{key} ({by(file)} in the file, {by(own)} in the network)"
                         for key, file, own in sorted(report["mismatched_keys"])]  # fmt: skip
                refuse(path, source, sorted(report["missing_keys"]), sorted(report["unexpected_keys"]), wrong)
                notes.insert(0, f"weights from {path}")
        opened = open_module(module.eval())
        opened.name = f"hf:{folder.name}" if local else source
        opened.notes += notes
        try:
            processor, _ = transformers.image_processing_utils.BaseImageProcessor.get_image_processor_dict(where)
        except Exception:  # a folder or a repository may come without one
            processor = None
    if processor is None:
        opened.notes.append("it comes without an image processor; preprocess= says how its pictures are prepared")
    else:
        opened.preprocess, note = Preprocess.from_hf(processor)
        opened.notes += [f"image processor: {note}"] if note else []
    if opened.preprocess is not None and opened.input_shape is None:
        opened.input_shape = opened.preprocess.shape
    return _untrained(opened, source) if weights == "none" else opened


def _transformers_class(transformers: Any, config: Any) -> Any:
    """The class a model was saved as, else the one for image classification."""
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    automatic = transformers.AutoModelForImageClassification
    if getattr(config, "auto_map", None):  # code of its own, that was trusted
        return automatic
    try:
        return automatic._model_mapping[type(config)]
    except KeyError:
        raise Unsupported(f"transformers has no image classifier of the kind {config.model_type}") from None


ZOOS: dict[str, Callable[[str, str | Path | None, bool], Opened]] = {
    "torchvision": open_torchvision,
    "timm": open_timm,
    "hf": open_transformers,
}


# --- the way to the weights ------------------------------------------------------------------------------------------


def reachable(url: str, seconds: float = 4) -> bool:
    """Whether the host of a URL, or the proxy in front of it, answers soon."""
    parts = urllib.parse.urlparse(url)
    proxy = None if urllib.request.proxy_bypass(parts.hostname or "") else urllib.request.getproxies().get(parts.scheme)
    target = urllib.parse.urlparse(proxy if proxy and "//" in proxy else f"//{proxy}" if proxy else url)
    answered = threading.Event()

    def connect() -> None:
        try:
            port = target.port or (80 if target.scheme == "http" else 443)
            socket.create_connection((target.hostname or "", port), timeout=seconds).close()
            answered.set()
        except OSError:
            pass
        finally:
            done.set()

    done = threading.Event()
    threading.Thread(target=connect, daemon=True).start()  # looking a name up has no time limit of its own
    done.wait(seconds)
    return answered.is_set()


@contextmanager
def _quick() -> Iterator[None]:
    """Downloads inside give up when nothing comes for a while."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextmanager
def _hub(needed: bool = True) -> Iterator[None]:
    """Let huggingface_hub use its cache alone where its host cannot be reached, instead of trying again and again."""
    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before, quiet = constants.HF_HUB_OFFLINE, are_progress_bars_disabled()
    bars: Any = sys.modules.get("transformers.utils.logging")
    drawn = bars is not None and bars.is_progress_bar_enabled()
    loggers = [logging.getLogger(name) for name in ("timm", "transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    constants.HF_HUB_OFFLINE = before or not needed or not reachable(constants.ENDPOINT)
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    if not quiet:
        disable_progress_bars()
    if drawn:
        bars.disable_progress_bar()
    try:
        with _quick():
            yield
    finally:
        constants.HF_HUB_OFFLINE = before
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not quiet:
            enable_progress_bars()
        if drawn:
            bars.enable_progress_bar()
