"""Network: what an opened model can be asked. Reads pictures, resolves names, cuts batches, hands out results."""

from __future__ import annotations

import copy
import html
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from innersight import __version__, errors, images, results, targets
from innersight.formats import Assumed, Opened
from innersight.formats.function import Function
from innersight.inquiry import Answer, Inquiry, Question
from innersight.layers import Layer, Layers
from innersight.maximize import maximize
from innersight.methods import Method, all_methods, find
from innersight.observe import geometry
from innersight.observe.observer import Node, Recording
from innersight.observe.passes import INPUT, Engine, Pass, Request, free_memory


def open(
    source: Any,
    *,
    arch: Any = None,
    weights: str | None = None,
    labels: Sequence[str] | str | None = None,
    input_shape: Sequence[int] | None = None,
    preprocess: Any = None,
    output: str | int | None = None,
    device: str | torch.device | None = None,
    trust: bool = False,
    custom: Mapping[str, Any] | None = None,
    arithmetic: str | None = None,
) -> Network:
    """Open a model: `innersight.open("torchvision:resnet50")`, a module in memory, a file.

    source:      a torch.nn.Module, any callable, "torchvision:NAME", "timm:NAME", "hf:NAME", or a file: TorchScript,
                 torch.export `.pt2`, `.keras`, `.h5`, `.onnx`, `.tflite`, weights (`.safetensors`, `.pth`) together
                 with `arch`; a keras.Model in memory
    arch:        for weights: "package.module:factory", or the factory itself
    weights:     for models by name: a file, or "none" for an untrained network; default the library's own
    labels:      class names in the order of the outputs, or a file with one a line; default what the model states
    input_shape: (C, H, W) of one input; default what the model states
    preprocess:  an `images.Preprocess`, or a mapping with its fields; default what the model states
    output:      which of several outputs is the answer
    device:      "cpu", "cuda", ...; default where the model is
    trust:       allow files that run code when loaded
    custom:      for Keras: class name -> what stands for a layer of your own, see `innersight.formats.keras`
    arithmetic:  for TFLite: "device" (default: the integers of the device), or see `innersight.formats.tflite`

    What was chosen is listed in `Network.notes`. Raises InputError, UnknownName, UntrustedFile or MissingPackage with
    one sentence on what to do.
    """
    from innersight.formats.opening import open_source

    if isinstance(source, Network):
        return source
    opened = open_source(
        source, arch=arch, weights=weights, labels=labels, input_shape=input_shape, preprocess=preprocess,
        device=device, trust=trust, custom=custom, arithmetic=arithmetic,
    )  # fmt: skip
    return Network(opened, output=output)


class Network:
    """An opened model. Made by `innersight.open`.

    name, input_shape, preprocess, labels: what it is called, takes and answers
    notes: what was chosen for you, a sentence each, with the keyword that changes it
    quantisation: layer name -> scale, zero point and range of a quantised layer (`formats.Quantised`); None if none is
    progress: if set, called with how much of a request is done, of how much, and of what ("images", "points")
    """

    def __init__(self, opened: Opened, output: str | int | None = None):
        self.name = opened.name
        self.input_shape = None if opened.input_shape is None else tuple(opened.input_shape)
        self.preprocess = opened.preprocess
        self.labels = None if opened.labels is None else tuple(opened.labels)
        self.notes = list(opened.notes)
        self.quantisation = opened.quantisation
        self.module = opened.module
        self.progress: Callable[[int, int, str], None] | None = None
        self._output = output
        self.engine = Engine(self.module, call=opened.call, fixed_batch=opened.fixed_batch)
        parameter = next((p for p in self.module.parameters() if p.is_floating_point()), None)
        self.device = parameter.device if parameter is not None else torch.device("cpu")
        self._dtype = parameter.dtype if parameter is not None else torch.float32
        self._layers: dict[tuple[int, ...], Layers] = {}
        self._geometry: dict[int, list] = {}
        self._cam_layers: dict[int, str] = {}

    def _with_module(self, module: torch.nn.Module) -> Network:
        """The same network with another module in its place."""
        opened = Opened(
            module, self.name, self.input_shape, self.preprocess, self.labels, list(self.notes),
            self.engine.call, self.engine.fixed_batch, self.quantisation,
        )  # fmt: skip
        return Network(opened, output=self._output)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.input_shape)) if self.input_shape else "any"
        classes = f", {len(self.labels)} classes" if self.labels else ""
        return f"<Network {self.name}: input {shape}{classes}, on {self.device}>"

    def _repr_html_(self) -> str:
        """In a notebook: what it is, what was chosen for it, its layers, and where to look further."""
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        table = self.layers._repr_html_() if self.input_shape else ""
        return (
            f"<p><b>{html.escape(repr(self).strip('<>'))}</b></p><ul>{notes}</ul>{table}"
            "<p><code>innersight.view(net, images)</code> shows what it does with pictures.</p>"
        )

    # -- layers

    @property
    def layers(self) -> Layers:
        """The table of layers at the network's own input size; `net.layers["conv1"]` is one of them."""
        known = self._layers.get(self.input_shape or ())
        return known if known is not None else self._layers_for(self._sample())

    def _sample(self) -> torch.Tensor:
        """One input of noise, always the same: what the network is learnt from where no picture is at hand."""
        if self.input_shape is None:
            raise errors.InputError(f"the input size of {self.name} is not known: open it with input_shape=(C, H, W)")
        shape = (1, *self.input_shape)
        return self._to_model(torch.randn(shape, generator=torch.Generator().manual_seed(0)))

    def _to_model(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.device, self._dtype)

    def _layers_for(self, x: torch.Tensor) -> Layers:
        key = tuple(x.shape[1:])
        if key not in self._layers:
            with self.engine.session():
                recording = self._learn(x)
            parameters = sum(p.numel() for p in self.module.parameters())
            self._layers[key] = Layers(recording, lambda node: self._layer(recording, node), parameters)
        return self._layers[key]

    def _learn(self, x: torch.Tensor) -> Recording:
        """What the network does with such an input; an input it cannot take gets a sentence."""
        try:
            return self.engine.recording(x)
        except errors.InnersightError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            wants = ""
            if self.input_shape is not None:
                differs = tuple(x.shape[1:]) != self.input_shape
                takes = f"it takes (N, {', '.join(map(str, self.input_shape))})"
                wants = f"; {takes}" if differs else "; input_shape= does not fit this network"
            said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise errors.InputError(
                f"{self.name} cannot run on an input of shape {tuple(x.shape)}{wants} (it said: {said})"
            ) from error

    def _geometry_of(self, recording: Recording) -> list:
        if id(recording) not in self._geometry:
            self._geometry[id(recording)] = geometry.trace(recording)
        return self._geometry[id(recording)]

    def _layer(self, recording: Recording, node: Node) -> Layer:
        found = self._geometry_of(recording)[node.index]
        layout = found.layout if found is not None else None
        grid = None
        if layout is not None and layout.spatial:
            grid = tuple(layout.to_grid(torch.empty(node.shape, device="meta")).shape[1:])
        return Layer(
            name=node.name,
            kind=node.module or node.op,
            shape=tuple(node.shape[1:]),
            grid=grid,
            grid_note=layout.note if layout is not None else "",
            parameters=node.parameters,
            receptive_field=found.receptive_field if found is not None else None,
            node=node,
            layout=layout,
            _effective=self._effective_field,
            quantised=(self.quantisation or {}).get(node.name),
        )

    def _effective_field(self, layer: Layer, pictures: Any, share: float) -> tuple[int, int, int, int]:
        if layer.grid is None:
            raise errors.Unsupported(f"layer {layer.name!r} has no place in the picture, so no receptive field either")
        if pictures is None:
            generator = torch.Generator().manual_seed(0)
            x = self._to_model(torch.randn((8, *self._sample().shape[1:]), generator=generator))
        else:
            x = self.read(pictures).tensor
        channels, height, width = layer.grid
        # Random signs: the gradients of a sum over channels would cancel where channels oppose each other.
        signs = torch.randint(0, 2, (channels,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
        signs = signs.to(x)

        def score(value: torch.Tensor) -> torch.Tensor:
            return layer.to_grid(value)[:, :, height // 2, width // 2] @ signs

        energy = np.zeros(x.shape[-2:])
        for passed in self._passes(x, Request(gradients=[INPUT], of=layer.name, score=score)):
            g = passed.gradients[INPUT]
            if g is not None:
                energy += g.double().square().sum((0, 1)).cpu().numpy()
        return geometry.effective_box(energy, share)

    # -- passes

    def read(self, pictures: Any) -> images.Inputs:
        """Pictures as the network takes them; hand the result to several questions and files are read once.

        pictures: a path, folder, glob, PIL image or array, a list of them, a float batch `(N, C, H, W)`, or a loader.
        """
        if pictures is None:
            raise errors.InputError("no images were given")
        inputs = images.read(pictures, self.preprocess, input_shape=self.input_shape)
        return replace(
            inputs, tensor=self._to_model(inputs.tensor)
        )  # what was handed in may go to another network, too

    def _passes(self, x: torch.Tensor, request: Request, size: int | None = None) -> Iterable[Pass]:
        """The request over the whole batch, chunk by chunk within the memory budget."""
        with self.engine.session():
            self._learn(x[:1])
            size = size or self.engine.chunk_size(x, request)
            done = 0
            for passed in self.engine.chunks(x, lambda part, _: self.engine.run(part, request), size):
                yield passed
                done = min(done + size, len(x))
                self._report(done, len(x))

    def _report(self, done: int, total: int, what: str = "images") -> None:
        if self.progress is not None:
            self.progress(done, total, what)

    def _main(self, output: Any) -> torch.Tensor:
        main, note = targets.main_tensor(output, self._output, len(self.labels) if self.labels else None)
        if note and note not in self.notes:
            self.notes.append(note)
        classes = main.shape[1] if main.dim() in (2, 4) else None
        if self.labels and classes not in (None, len(self.labels)) and not note.startswith("detections"):
            raise errors.InputError(
                f"there are {len(self.labels)} labels for the {classes} outputs of {self.name}: labels= must name each"
            )
        return main

    @property
    def _classes(self) -> targets.Classes:
        return targets.Classes(self.labels)

    def _provenance(
        self,
        inputs: images.Inputs,
        method: str | None = None,
        layer: Any = None,
        target: Any = None,
        options: Mapping[str, Any] | None = None,
        notes: Sequence[str] = (),
    ) -> results.Provenance:
        return results.Provenance(
            network=self.name, method=method, layer=layer, target=target, options=dict(options or {}), seed=0,
            notes=tuple(dict.fromkeys([*self.notes, *inputs.notes, *notes])),
            versions={"innersight": __version__, "torch": torch.__version__, "python": platform.python_version()},
        )  # fmt: skip

    # -- questions

    def predict(self, images: Any) -> results.Predictions:
        """What the network answers: `.top(5)` labels and probabilities, `.logits` the raw output `(N, K)`.

        images: a path, folder, glob, PIL image or array, a list of them, a float batch `(N, C, H, W)`, or a loader.
        """
        inputs = self.read(images)
        rows = [self._scores(p.output).float().cpu() for p in self._passes(inputs.tensor, Request())]
        logits = _stacked(rows).numpy()
        return results.Predictions(
            logits=logits, labels=self.labels, pictures=inputs.pictures, kind=self._kind(inputs.tensor),
            provenance=self._provenance(inputs),
        )  # fmt: skip

    def _scores(self, output: Any) -> torch.Tensor:
        """(n, K): a score for each class."""
        return targets.class_scores(self._main(output)).detach()

    def _kind(self, x: torch.Tensor) -> str:
        """Whether the network answers with probabilities: its own last operation makes them, or it detects."""
        recording = self.engine.recording(x)
        for ref in recording.outputs[:1]:
            node = recording.nodes[ref.node]
            while (before := recording.handed_on(node)) is not None:
                node = before
            if node.op in ("softmax", "sigmoid", "hardsigmoid"):
                return "probabilities"
        return "probabilities" if any(note.startswith("detections") for note in self.notes) else "logits"

    def maps(self, images: Any, layers: str | Sequence[str] | None = None) -> results.FeatureMaps:
        """The feature maps of `layers` (default: every layer that has some), `(N, C, H, W)` arrays by name.

        Runs no further than the last layer asked for. Tokens and channels-last layers are turned to that grid; layers
        without a place in the picture keep their own shape. Raises UnknownName for a layer that does not exist.
        """
        inputs = self.read(images)
        x = inputs.tensor
        table = self._layers_for(x)
        names = table.spatial if layers is None else [layers] if isinstance(layers, (str, int)) else list(layers)
        if not names and layers is not None:
            raise errors.InputError("layers= is empty: name one or more, or leave it out for every layer with maps")
        if not names:
            raise errors.Unsupported(
                f"{self.name} has no layer with maps over the picture; name layers= to read others"
            )
        chosen = {name: table[name] for name in names}
        self._refuse_too_much(chosen, len(x))
        parts: dict[str, list[np.ndarray]] = {name: [] for name in chosen}
        for passed in self._passes(x, Request(read=list(chosen), output=False)):
            for name, layer in chosen.items():
                parts[name].append(_numpy(layer.to_grid(passed.values[name])))
        notes = [f"{name}: {layer.grid_note}" for name, layer in chosen.items() if layer.grid_note]
        return results.FeatureMaps(
            {name: np.concatenate(part) if len(part) > 1 else part[0] for name, part in parts.items()},
            inputs.pictures, {name: layer.to_json() for name, layer in chosen.items()},
            self._provenance(inputs, layer=tuple(chosen), notes=notes),
        )  # fmt: skip

    def _refuse_too_much(self, chosen: Mapping[str, Layer], count: int) -> None:
        need = 4 * count * sum(int(np.prod(layer.shape)) for layer in chosen.values())
        free = free_memory("cpu")
        if need > 0.8 * free:
            raise errors.InputError(
                f"the maps of {len(chosen)} layers for {count} images take {need / 2**30:.1f} GiB and only "
                f"{free / 2**30:.1f} GiB are free: ask for fewer layers (layers=) or fewer images"
            )

    def explain(
        self,
        images: Any,
        method: str | Sequence[str] = "gradient",
        target: Any = None,
        layer: str | Sequence[str] | None = None,
        fuse: str | None = None,
        **options: Any,
    ) -> Any:
        """What drove the decision: a `Saliency`, or a dict of them where `method` or `layer` is a list.

        method: a name of `innersight methods`, or several; they share passes
        target: what is explained, see `innersight.targets`; default the class that is predicted, image by image
        layer:  for methods that look at one; default the last layer that everything passes through, which is stated.
                Of several, each has its own map: {layer: Saliency}, {method: {layer: Saliency}} for several methods
        fuse:   "mean" or "max" makes one map of those of several layers, see `results.fused`
        options: the method's own

        Raises UnknownName for an unknown method, layer, class or option (with the nearest), Unsupported where this
        network does not offer what the method needs.
        """
        methods = [find(m) for m in ([method] if isinstance(method, str) else method)]
        if not methods:
            raise errors.InputError("method= is empty: name one or more (innersight methods lists them)")
        _check_options(methods, options)
        if isinstance(self.module, Function) and (blind := [m for m in methods if m.needs]):
            others = ", ".join(m.name for m in all_methods().values() if not m.needs)
            raise errors.Unsupported(
                f"{blind[0].name} needs {_what(blind[0].needs)}, which a plain function does not offer"
                + (f"; without there are: {others}" if others else "")
            )
        if fuse is not None and (layer is None or isinstance(layer, str)):
            raise errors.InputError("fuse= makes one map of several layers: name them with layer=[...]")
        inputs = self.read(images)
        inquiry = Inquiry(self, inputs.tensor, target)
        names = [layer] if layer is None or isinstance(layer, str) else list(layer)
        if not names:
            raise errors.InputError("layer= is empty: name one or more, or leave it out for the last with a grid")
        chosen: list[tuple[Layer | None, str]] = [(None, "")]
        if any("layer" in m.needs for m in methods):
            chosen = [inquiry.layer(name) for name in names]
        else:
            for name in filter(None, names):
                self._layers_for(inputs.tensor)[name]  # one that does not exist is an error, even where none is needed
        questions = [
            Question(m, {k: v for k, v in options.items() if k in m.options}, at)
            for m in methods
            for at, _ in (chosen if "layer" in m.needs else [(None, "")])
        ]
        why = {at.name: note for at, note in chosen if at is not None and note}
        answers = zip(questions, inquiry.answer(questions), strict=True)
        maps = [(q, self._saliency(inputs, inquiry, target, q, answer, why)) for q, answer in answers]
        found: dict[str, Any] = {}
        for m in methods:
            of_layers = {q.layer.name if q.layer else "": s for q, s in maps if q.method is m}
            if fuse is not None and len(of_layers) > 1:
                found[m.name] = results.fused(of_layers.values(), how=fuse)
            else:
                single = layer is None or isinstance(layer, str) or "layer" not in m.needs
                found[m.name] = next(iter(of_layers.values())) if single or fuse else of_layers
        return found[methods[0].name] if isinstance(method, str) else found

    def _saliency(
        self, inputs: images.Inputs, inquiry: Inquiry, target: Any, question: Question, answer: Answer,
        why: Mapping[str, str],
    ) -> results.Saliency:  # fmt: skip
        method, at = question.method, question.layer.name if question.layer else None
        maps, coarse = answer.laid_out(question, inquiry.x.shape[-2:])
        values = _numpy(maps)
        notes = [*filter(None, [why.get(at or "")]), *answer.notes, *_blank(method.name, inputs.pictures, values)]
        return results.Saliency(
            values=values, pictures=inputs.pictures, signed=method.signed or bool((values < 0).any()),
            unit=method.unit, targets=inquiry.texts, verdict=_verdict(values, inquiry.scores) | answer.said,
            coarse=None if coarse is None else _numpy(coarse),
            provenance=self._provenance(
                inputs, method.name, at, _said(target, inquiry.texts), question.options, notes,
            ),
        )  # fmt: skip

    maximize = maximize  # a function of the network, with its options and its docstring

    def sensitivity(self, images: Any, layer: str, target: Any = None) -> results.Sensitivity:
        """The exact change of the target's score when each channel of `layer` is removed (set to zero).

        `values[n, c]` is the score of image n without channel c minus the score with it: negative where the channel
        speaks for the target. Only what follows the layer is run again. Zeroing a channel as in Desai and Ramaswamy,
        Ablation-CAM, WACV 2020; layers without channels (vectors) lose one unit at a time.

        target: as in `explain`; "predicted" means the class predicted with every channel in place
        """
        inputs = self.read(images)
        x = inputs.tensor
        chosen = self._layers_for(x)[layer]
        if not chosen.node.shapes or len(chosen.shape) < 1:
            raise errors.Unsupported(f"layer {layer!r} has no channels")
        inquiry = Inquiry(self, x, target)
        values, base, skips = [], [], True
        with self.engine.session():
            self._learn(x[:1])
            for i in range(len(x)):
                score, without, skipped = inquiry.without_channels(i, chosen)
                values.append((without.cpu() - score).numpy())
                base.append(score)
                skips &= skipped
                self._report(i + 1, len(x))
        note = () if skips else (f"{self.name} cannot be run from the middle, so each removal was a whole run",)
        return results.Sensitivity(
            values=np.stack(values), layer=layer, scores=np.array(base, dtype=np.float32), targets=inquiry.texts,
            pictures=inputs.pictures,
            provenance=self._provenance(inputs, "sensitivity", layer, _said(target, inquiry.texts), notes=note),
        )  # fmt: skip


def prepared_alike(networks: Sequence[Network]) -> list[Network]:
    """Networks to be looked at side by side; what one says of its pictures holds for others that do not say.

    A float file seldom says what it takes, its int8 twin does. Only where both take the same input.
    """
    found = []
    for net in networks:
        guess = next((note for note in net.notes if isinstance(note, Assumed)), None)
        others = (o for o in networks if o.input_shape == net.input_shape and o.preprocess is not None)
        other = next((o for o in others if not any(isinstance(note, Assumed) for note in o.notes)), None)
        if guess is not None and other is not None:
            net = copy.copy(net)
            net.preprocess = other.preprocess
            said = f"pictures are prepared as for {other.name}, since this one does not say; preprocess= changes it"
            net.notes = [said if note is guess else note for note in net.notes]
        found.append(net)
    return found


def _check_options(methods: Sequence[Method], options: Mapping[str, Any]) -> None:
    """Every option is one of some method; with the nearest names where it is none."""
    for name in options:
        if not any(name in m.options for m in methods):
            methods[0].check_options({name: options[name]})


def _what(needs: Sequence[str]) -> str:
    said = {"gradient": "gradients", "layer": "inner layers", "attention": "attention"}
    return " and ".join(said[n] for n in needs)


def _stacked(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Batches of scores as one; a detector has as many classes as it found, so rows may differ in length."""
    width = max(r.shape[1] for r in rows)
    return torch.cat([torch.nn.functional.pad(r, (0, width - r.shape[1])) for r in rows])


def _numpy(value: torch.Tensor) -> np.ndarray:
    return value.detach().float().cpu().contiguous().numpy()


def _said(target: Any, texts: Sequence[str]) -> str:
    """The target as provenance keeps it."""
    return "the predicted class" if target is None else ", ".join(dict.fromkeys(texts))


def _blank(method: str, pictures: Sequence[images.Picture], values: np.ndarray) -> list[str]:
    """A map that says nothing is an answer that has to be said: all zero, or the same everywhere."""
    flat = values.reshape(len(values), -1)
    low, high = flat.min(1), flat.max(1)
    notes = []
    for what, where in [
        ("zero everywhere: nothing speaks for the target", (low == 0) & (high == 0)),
        ("the same everywhere: it tells no place from another", (low == high) & (low != 0)),
    ]:
        names = [p.name for p, here in zip(pictures, where, strict=True) if here]
        notes += [f"the {method} map of {', '.join(names)} is {what}"] if names else []
    return notes


def _verdict(values: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
    """What the map's own evidence is: the score that was explained, and whether anything speaks for it at all."""
    flat = np.abs(values.reshape(len(values), -1))
    return {"score": [float(s) for s in scores], "blank": [bool(m == 0) for m in flat.max(1)]}
