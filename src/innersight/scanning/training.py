"""The same maps and statistics while a network is trained: a scan of a fixed set of images at chosen steps.

    watch = innersight.Training(model, (images, labels), "run/", every=100, tensorboard=True)
    for batch in loader:
        ...                                              # a step of yours
        watch.step()

    lightning.Trainer(callbacks=[watch.lightning()])     # or
    model.fit(x, y, callbacks=[watch.keras()])

    print(watch.compare(100, 900))                       # what changed in between

    run/step-00000100/                   a scan, which `innersight.Scan` reads
    run/step-00000100/weights.safetensors, maps.safetensors
    run/tensorboard/events.out.tfevents...

A step is made in a hidden folder and renamed when it is whole. Training goes on as if nothing had been asked: the modes
of layers, BatchNorm's statistics, random numbers, gradients and the optimizer are as they were.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from innersight import errors
from innersight.comparison import Comparison
from innersight.scanning import board, change, store
from innersight.scanning.reader import Scan

if TYPE_CHECKING:
    import torch

    from innersight.network import Network
    from innersight.results import FeatureMaps
    from innersight.scanning.data import Source

MAP_BYTES = 256 << 20
"""Maps of a step are kept of fewer images where they would take more than this."""
_PLACE, _PART, _OLD = "step-{:08}", ".step-{:08}.part", ".step-{:08}.old"


class Training:
    """Scans a network at chosen steps of its training.

    model:       what is trained: a torch.nn.Module (a LightningModule, a compiled or wrapped one, too) or a keras.Model
    data:        what is scanned each time, as in `innersight.scan`; a few hundred images are enough
    out:         a folder of its own for this run
    every:       steps from one scan to the next
    steps:       instead: the steps themselves, (0, 1, 10, 100, 1000)
    layers:      names or kinds ("Conv2d"); default every layer that has channels
    images:      how many of the first images' maps are kept with each step; 0 for none
    crops:       for how many channels the top images are cut out
    tensorboard: write scalars and pictures of the maps for TensorBoard, into OUT/tensorboard or the folder named
    labels, input_shape, preprocess, custom, output: as in `innersight.open`

    count:       the step that training is at
    scans:       step -> Scan, of this and earlier runs in that folder; complete ones alone
    failed:      step -> why it could not be scanned

    What is wrong from the start raises InputError, Unsupported, UnknownName or MissingPackage here, or when training
    begins. What goes wrong later (a full disk, data that is gone) is a warning, once for each reason, and training
    goes on.
    """

    def __init__(
        self,
        model: Any,
        data: Any,
        out: str | os.PathLike,
        *,
        every: int = 1000,
        steps: Iterable[int] | None = None,
        layers: str | Sequence[str] | None = None,
        images: int = 4,
        crops: int = 0,
        tensorboard: bool | str | os.PathLike = False,
        labels: Any = None,
        input_shape: Sequence[int] | None = None,
        preprocess: Any = None,
        custom: Mapping[str, Any] | None = None,
        output: str | int | None = None,
    ):
        for package in ("pyarrow", "pandas", "sklearn"):
            errors.need(package, "training", "watching a training")
        from innersight.scanning.data import open_data

        self.every = _whole("every", every, 1)
        self.steps = None if steps is None else frozenset(_whole("one of steps", n, 0) for n in steps)
        self.images, self.crops = _whole("images", images, 0), _whole("crops", crops, 0)
        self.model, self.data = model, data
        self.layers = [layers] if isinstance(layers, str) else layers
        self._opening = {"labels": labels, "input_shape": input_shape, "preprocess": preprocess, "custom": custom,
                         "output": output}  # fmt: skip
        self._keras = _is_keras(model)
        self.source = open_data(data)
        self.folder = Path(out)
        self.count = 0
        self.failed: dict[int, str] = {}
        self._told: set[str] = set()
        if self.folder.exists() and not self.folder.is_dir():
            raise errors.InputError(f"{str(out)!r} is a file; steps are written into a folder")
        with store.plain_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.board: board.Board | None = None
        if tensorboard:
            self.board = board.Board(self.folder / "tensorboard" if tensorboard is True else Path(tensorboard))
        self.scans = self._found()
        self._before = max(self.scans, default=-1)  # of an earlier run
        if not _is_lazy(model):
            self._check()

    def __repr__(self) -> str:
        when = f"every {self.every} steps" if self.steps is None else f"at steps {change.listed(sorted(self.steps))}"
        done = f"scanned: {change.listed(list(self.scans))}" if self.scans else "none scanned yet"
        failed = f", failed: {change.listed(list(self.failed))}" if self.failed else ""
        return f"<Training {str(self.folder)!r}: {when}; {done}{failed}>"

    # -- while it runs

    def step(self, number: int | None = None) -> Scan | None:
        """To be called behind each step of a training loop; the scan, where one was due.

        number: which step that was, if the loop counts itself (after a resume, say); default one more than before

        Nothing that goes wrong in a scan is raised: it is a warning, and in `failed`.
        """
        before = self.count
        self.count = before + 1 if number is None else _whole("the step", number, 0)
        if self.count < before:  # the loop began anew
            before = self.count - 1
        if not self._due(before, self.count):
            return None
        try:
            return self.at(self.count)
        except Exception as error:  # whatever it is, the training of the user is worth more
            self._fail(self.count, error)
            return None

    def at(self, step: int) -> Scan | None:
        """Scan now, as this step; one that is there is replaced. `at(0)` before the loop scans the untrained network.

        None in all processes of a distributed training but the first. Raises in a sentence what goes wrong.
        """
        from innersight.scanning import scan

        step = _whole("the step", step, 0)
        if not _first_process():
            return None
        place, part = self._place(step), self.folder / _PART.format(step)
        if step <= self._before:
            self._tell(
                f"{str(self.folder)!r} holds steps up to {self._before} of an earlier run; they stay until they are "
                "scanned again (name another folder if this is another training)"
            )
        try:
            with _undisturbed(self.model, self.data), self._plain(part, place):
                shutil.rmtree(part, ignore_errors=True)
                net = self._network()
                found = scan(net, self._source(net), part, layers=self.layers, crops=self.crops)
                self._write_weights(net, part)
                maps = self._write_maps(net, part, found)
                self._publish(part, step)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        self.scans = dict(sorted({**self.scans, step: Scan(place)}.items()))
        self.failed.pop(step, None)
        if self.board is not None:
            with self._plain(self.board.folder, self.board.folder):
                self.board.write(self.scans[step], maps, step)
        return self.scans[step]

    def _due(self, before: int, now: int) -> bool:
        """Whether a chosen step lies behind `before` and up to `now`: several may be taken at once."""
        if self.steps is not None:
            return any(before < n <= now for n in self.steps)
        return before < 0 or now // self.every > before // self.every

    def _begin(self, step: int) -> None:
        """Training begins at this step: 0, or where it is resumed."""
        self.count = step
        if self._due(step - 1, step) and (step == 0 or step not in self.scans):
            self.at(step)

    def _fail(self, step: int, error: Exception) -> None:
        said = str(error) if isinstance(error, errors.InnersightError) else _first_line(error)
        self.failed[step] = said
        what = "scanned" if step not in self.scans else "written for TensorBoard"
        self._tell(f"step {step} was not {what}, and training goes on: {said}", said.replace(_PLACE.format(step), ""))

    def _tell(self, text: str, once: str = "") -> None:
        if (once or text) not in self._told:
            self._told.add(once or text)
            warnings.warn(text, UserWarning, stacklevel=4)

    @contextlib.contextmanager
    def _plain(self, part: Path, place: Path) -> Iterator[None]:
        """What goes wrong, in words that fit here: nothing of an unfinished step is kept."""
        try:
            yield
        except Exception as error:
            if _full(error):
                raise errors.InputError(
                    f"the disk of {str(self.folder)!r} is full; the steps that are there are whole, of this one "
                    "nothing is kept"
                ) from error
            if isinstance(error, OSError):
                raise errors.InputError(f"cannot write {str(place)!r}: {error.strerror or error}") from error
            if isinstance(error, errors.InnersightError) and str(part) in str(error):
                raise errors.InputError(str(error).replace(str(part), str(place))) from error
            raise

    # -- the network and its data

    def _network(self) -> Network:
        """The model as it is now."""
        import innersight

        _check_whole(self.model)
        opening = dict(self._opening)
        if opening["input_shape"] is None and opening["preprocess"] is None and not self._keras:
            opening["input_shape"] = _shape_of_data(self.source)
        return innersight.open(self.model, **opening)

    def _source(self, net: Network) -> Source:
        """The data; those of a Keras model may be as `fit` takes them."""
        return _as_fed(self.source, net.input_shape) if self._keras else self.source

    def _check(self) -> None:
        """Say now what would go wrong at every step."""
        from innersight.scanning import _planned

        with _undisturbed(self.model, self.data):
            net = self._network()
            _planned(net, self._source(net), self.layers, 9, None, self.crops)

    def _first_images(self, net: Network, count: int) -> Any:
        """The first images that can be read, of one size, as the network takes them; None if there are none."""
        import torch

        from innersight.images import Inputs

        source = self._source(net)
        numbers = range(count if source.size is None else min(count, source.size))
        samples = [s for s in source.samples(numbers, net.preprocess, net.input_shape) if s.values is not None]
        alike = [s for s in samples if s.values.shape == samples[0].values.shape]  # type: ignore[union-attr]
        if not alike:
            return None
        values, pictures = [s.values for s in alike], [s.picture for s in alike]
        return Inputs(net._to_model(torch.cat(values)), pictures)  # type: ignore[arg-type]

    # -- on disk

    def _place(self, step: int) -> Path:
        return self.folder / _PLACE.format(step)

    def _found(self) -> dict[int, Scan]:
        """The complete steps; one that was being replaced when a kill came is put back."""
        for old in self.folder.glob(".step-*.old"):
            place = self.folder / old.name[1:].removesuffix(".old")
            if not place.exists():
                old.rename(place)
        scans = {}
        for manifest in self.folder.glob("step-*/manifest.json"):
            number = re.fullmatch(r"step-(\d{8,})", manifest.parent.name)
            scan = Scan(manifest.parent) if number else None
            if number and scan is not None and scan.complete:
                scans[int(number[1])] = scan
        return dict(sorted(scans.items()))

    def _publish(self, part: Path, step: int) -> None:
        place, old = self._place(step), self.folder / _OLD.format(step)
        shutil.rmtree(old, ignore_errors=True)
        if place.exists():
            place.rename(old)
        part.rename(place)
        shutil.rmtree(old, ignore_errors=True)

    def _write_weights(self, net: Network, part: Path) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        file = part / "weights.safetensors"
        try:
            save_file(_weights(net.module), file)
            file.chmod((part / "manifest.json").stat().st_mode)  # a library's own temporary file is for its owner alone
        except SafetensorError as error:
            found = re.search(r"\(os error (\d+)\)", str(error))
            if found is None:
                raise
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from error

    def _write_maps(self, net: Network, part: Path, found: Scan) -> FeatureMaps | None:
        names = [name for name in found.layers if net.layers[name].spatial] or found.layers
        one = 4 * sum(int(np.prod(net.layers[name].shape)) for name in names)
        count = min(self.images, max(1, MAP_BYTES // max(one, 1)))
        inputs = self._first_images(net, count) if count else None
        if inputs is None:
            return None
        maps = net.maps(inputs, layers=names)
        maps.save(part / "maps.safetensors")
        return maps

    # -- what changed

    def compare(self, a: int, b: int, images: int = 64, **options: Any) -> change.Change:
        """What changed from step `a` to step `b`.

        Layers side by side over the first `images` of the data, see `innersight.compare`, which takes the `options`;
        and every channel over all of the data, from the scans of both steps (`.channels`). The network is taken from
        `model` as it is built, the weights from the folder. Raises UnknownName for a step that is not there.
        """
        import innersight

        scans = [self._scan(step) for step in (a, b)]
        with _undisturbed(self.model, self.data):
            nets = [self._at_step(step) for step in (a, b)]
            inputs = self._first_images(nets[0], _whole("images", images, 1))
            if inputs is None:
                raise errors.InputError(f"none of the first {images} images of {self.source.name} can be read")
            found = innersight.compare(nets[0], nets[1], inputs, **options)
        same = {f.name: getattr(found, f.name) for f in fields(Comparison)}
        return change.Change(**same, channels=change.channels(*scans), scans=(scans[0], scans[1]))

    def _scan(self, step: int) -> Scan:
        if step not in self.scans:
            raise errors.unknown("step", step, map(str, self.scans), f" in {str(self.folder)!r}")
        return self.scans[step]

    def _at_step(self, step: int) -> Network:
        """The network with the weights of a step; the model that is trained is left alone."""
        from safetensors.torch import load_file

        from innersight.formats.keras_live import Watched

        net = self._network()
        fresh = self._keras and not isinstance(net.module, Watched)  # read anew, though its arrays may be Keras's own
        module = net.module if fresh else _copied(net.module)
        now = module.state_dict()
        weights = load_file(self._place(step) / "weights.safetensors")
        weights = {name: v.to(now[name].device) if name in now else v for name, v in weights.items()}
        others = {name: v for name, v in now.items() if not _is_tensor(v)}
        try:
            module.load_state_dict({**others, **weights}, assign=fresh)
        except (RuntimeError, KeyError) as error:
            raise errors.InputError(
                f"the weights of step {step} in {str(self.folder)!r} are not those of this model ({_first_line(error)})"
            ) from error
        other = net._with_module(module)
        other.name = f"{net.name} at step {step}"
        return other

    # -- callbacks

    def lightning(self) -> Any:
        """A callback for Lightning's Trainer, of `lightning.pytorch` and of `pytorch_lightning`.

        It scans at step 0 and behind each chosen step by `trainer.global_step`, which counts optimizer steps: batches
        whose gradients are only gathered are none.
        """
        watch = self

        class Watching(*_lightning_callbacks()):  # type: ignore[misc]
            def on_train_start(self, trainer: Any, pl_module: Any) -> None:
                inside = _unwrapped(watch.model)
                if not any(module is inside for module in pl_module.modules()):
                    raise errors.InputError(
                        f"this trainer trains a {type(pl_module).__name__}, and the {type(inside).__name__} that is "
                        "watched is no part of it: hand the same model to innersight.Training"
                    )
                watch._begin(trainer.global_step)

            def on_train_batch_end(self, trainer: Any, *_args: Any) -> None:
                if trainer.global_step != watch.count:
                    watch.step(trainer.global_step)

        return Watching()

    def keras(self) -> Any:
        """A callback for `model.fit`, of Keras 3 on any engine and of tf_keras.

        It scans at step 0 and behind each chosen step as the optimizer counts them.
        """
        if not self._keras:
            raise errors.InputError(
                f"keras() is for a keras.Model, and a {type(self.model).__name__} is watched: call step() in its loop"
            )
        watch = self
        root = next(r for r in (c.__module__.partition(".")[0] for c in type(self.model).__mro__) if r in _KERAS)

        class Watching(sys.modules[root].callbacks.Callback):  # type: ignore[misc]
            def on_train_begin(self, logs: Any = None) -> None:  # noqa: ARG002
                if watch.model is not self.model and all(watch.model is not m for m in _inner(self.model)):
                    raise errors.InputError(
                        f"fit() trains {self.model.name!r}, and {watch.model.name!r}, which is watched, is no part of "
                        "it: hand the same model to innersight.Training"
                    )
                optimizer = self.model.optimizer
                self.start, self.batches = int(optimizer.iterations), 0
                self.gathered = getattr(optimizer, "gradient_accumulation_steps", None) or 1
                watch._begin(self.start)

            def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
                self.last = -1

            def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
                self.batches += batch - self.last  # several steps may be one execution
                self.last = batch
                now = self.start + self.batches // self.gathered
                if now != watch.count:
                    if watch._due(watch.count, now) and hasattr(self.model, "jax_state_sync"):
                        self.model.jax_state_sync()  # JAX's trainer holds the weights itself meanwhile
                    watch.step(now)

        return Watching()


_KERAS = ("keras", "tf_keras")


def _whole(name: str, value: Any, least: int) -> int:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        raise errors.InputError(f"{name} must be a whole number from {least} on, got {value!r}")
    return int(value)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _full(error: BaseException | None) -> bool:
    """Whether a full disk is behind it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__
    return False


# --- the model -------------------------------------------------------------------------------------------------------


def _is_keras(model: Any) -> bool:
    """Whether it is a Keras model; refuses what is neither that nor a torch module."""
    import torch

    from innersight.formats import opening

    if opening._is_keras(model):
        return True
    if isinstance(model, torch.nn.Module) and not isinstance(model, torch.jit.ScriptModule):
        return False
    raise errors.InputError(
        f"a {type(model).__name__} is not trained in this process: pass the torch.nn.Module or the keras.Model that is"
    )


def _is_lazy(model: Any) -> bool:
    """Whether it has no weights before it has seen its first batch."""
    from torch import nn

    if _of_torch(model):
        return any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters())
    return not getattr(model, "built", True)


def _of_torch(model: Any) -> bool:
    import torch

    from innersight.formats import opening

    return isinstance(model, torch.nn.Module) and not opening._is_keras(model)


def _unwrapped(model: Any) -> Any:
    from innersight.formats.torch import unwrap

    return unwrap(model)[0] if _of_torch(model) else model


def _check_whole(model: Any) -> None:
    """Refuse a model of which each process holds a part."""
    if _of_torch(model) and any(
        type(p).__name__ in ("DTensor", "FlatParameter") or hasattr(p, "ds_id") for p in model.parameters()
    ):
        raise errors.Unsupported(
            f"the weights of this {type(model).__name__} are shared out among processes (FSDP, DeepSpeed), so that "
            "none of them can run it alone: watch a training with DDP, or scan its checkpoints"
        )


def _first_process() -> bool:
    import torch.distributed as distributed

    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies, so that tied weights are written as often as they are named."""
    state = module.state_dict()
    return {name: v.detach().cpu().contiguous().clone() for name, v in state.items() if _is_tensor(v)}


def _copied(module: torch.nn.Module) -> torch.nn.Module:
    import copy

    # A LightningModule knows its trainer, and that the data: not to be copied.
    attached = [m.__dict__.get(name) for m in module.modules() for name in ("_trainer", "_fabric")]
    memo: dict[int, Any] = {id(one): None for one in attached if one is not None}
    try:
        return copy.deepcopy(module, memo)
    except errors.InnersightError:
        raise
    except Exception as error:  # tensors of a graph, open files, locks: each raises its own
        raise errors.Unsupported(
            f"this {type(module).__name__} cannot be copied ({_first_line(error)}), so two of its steps cannot be set "
            "side by side here: load weights.safetensors of each into a model and call innersight.compare"
        ) from error


def _inner(model: Any) -> list[Any]:
    """The layers and models inside of a Keras model."""
    flat = getattr(model, "_flatten_layers", None)
    return list(flat()) if flat is not None else []


def _lightning_callbacks() -> list[type]:
    """Lightning's Callback, of both its names where both are in use: each trainer asks for its own."""
    names = ("lightning.pytorch", "pytorch_lightning")
    if not any(name in sys.modules for name in names):
        try:
            import lightning.pytorch  # noqa: F401
        except ImportError:
            errors.need("pytorch_lightning", "training", "a callback for Lightning")
    return list(dict.fromkeys(sys.modules[name].Callback for name in names if name in sys.modules))


# --- nothing is disturbed --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _undisturbed(model: Any, data: Any) -> Iterator[None]:
    """Leave training as it was, and draw the same random numbers at each step (data may be cropped at random)."""
    import torch

    with contextlib.ExitStack() as stack:
        stack.enter_context(_random_as_found(data))
        if _of_torch(model):
            from innersight.observe import guard

            inside = _unwrapped(model)
            stack.enter_context(_attributes_as_found(inside))
            stack.enter_context(guard.as_found(inside))
        for device in ("cpu", "cuda"):  # a cast that is cached without a graph would cost the weights their gradient
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextlib.contextmanager
def _random_as_found(data: Any) -> Iterator[None]:
    import torch

    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    own = getattr(data, "generator", None)  # of a loader, which may be the one that training draws from, too
    generators = [torch.default_generator, *(torch.cuda.default_generators[i] for i in cuda)]
    generators += [own] if isinstance(own, torch.Generator) else []
    before = random.getstate(), np.random.get_state(), [g.get_state() for g in generators]
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    random.seed(0)
    np.random.seed(0)
    for g in generators:
        g.manual_seed(0)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        for g, state in zip(generators, before[2], strict=True):
            g.set_state(state)
        if mps is not None:
            torch.mps.set_rng_state(mps)


@contextlib.contextmanager
def _attributes_as_found(module: torch.nn.Module) -> Iterator[None]:
    """Put back what a forward sets on its own module: counters, the last features."""
    before = [(m, dict(m.__dict__)) for m in module.modules()]
    try:
        yield
    finally:
        for m, attributes in before:
            now = m.__dict__
            for name in now.keys() - attributes.keys():
                del now[name]
            now.update({name: v for name, v in attributes.items() if name not in now or now[name] is not v})


# --- data ------------------------------------------------------------------------------------------------------------


def _shape_of_data(source: Source) -> tuple[int, ...] | None:
    """(C, H, W) of the first image if it is floats, which are taken as they are; None if the model must say."""
    try:
        first: Any = source.item(0) if source.item is not None else next(iter(source.walk()))  # type: ignore[misc]
    except Exception:  # whatever it is, the scan says it better
        return None
    shape = tuple(getattr(first[0], "shape", ()))
    return shape if len(shape) == 3 and "float" in str(first[0].dtype) else None


def _as_fed(source: Source, input_shape: Sequence[int] | None) -> Source:
    """Floats (H, W, C) as (C, H, W), labels one-hot as numbers: what Keras's `fit` takes."""
    channels = None if input_shape is None or len(input_shape) != 3 else input_shape[0]

    def turned(given: tuple[Any, str, Any]) -> tuple[Any, str, Any]:
        image, name, label = given
        shape = tuple(getattr(image, "shape", ()))
        if len(shape) == 3 and shape[2] == channels != shape[0] and "float" in str(image.dtype):
            image = image.permute(2, 0, 1) if _is_tensor(image) else np.moveaxis(np.asarray(image), -1, 0)
        return image, name, _number(label)

    item, walk = source.item, source.walk
    return replace(
        source, item=None if item is None else lambda n: turned(item(n)),
        walk=None if walk is None else lambda: (turned(given) for given in walk()),
    )  # fmt: skip


def _number(label: Any) -> Any:
    if not hasattr(label, "shape"):
        return label
    values = label.detach().cpu().numpy() if _is_tensor(label) else np.asarray(label)
    if values.size == 1:
        value = values.reshape(())[()].item()
        return int(value) if isinstance(value, float) and value.is_integer() else value
    hot = values.ndim == 1 and ((values == 0) | (values == 1)).all() and values.sum() == 1
    return int(values.argmax()) if hot else None
