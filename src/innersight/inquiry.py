"""Inquiry: one request for saliency. These images, this target; it runs what the methods ask for, in as few passes as
that takes: one over the pictures as they are for all methods together, then what each asks for beyond it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from innersight import errors, layers, targets
from innersight.layers import Layer, Layers
from innersight.methods import Look, Method
from innersight.observe.attention import TokenGrid, token_grid
from innersight.observe.observer import Recording
from innersight.observe.passes import INPUT, Pass, Request, free_memory
from innersight.observe.patches import Patches
from innersight.observe.replay import Replay, zeroed_at

if TYPE_CHECKING:
    from innersight.network import Network

_CACHED = 8 << 20  # bytes of one layer's value in a batch that a CPU's caches hold


@dataclass(frozen=True)
class Question:
    """One map that is wanted: by which method, with which options, at which layer."""

    method: Method
    options: Mapping[str, Any]
    layer: Layer | None = None

    @property
    def on_layer(self) -> bool:
        """Whether the method's map has the layer's own grid; those that go on to the input have the input's."""
        return bool({"layer", "attention"} & set(self.method.needs)) and "rules" not in self.method.visits


@dataclass
class Answer:
    """What a method said of all images of the request.

    maps:  a part for each time it was called, `(n, H, W)` or as it likes
    said:  name -> one number for each image (None where it said nothing)
    """

    maps: list[torch.Tensor] = field(default_factory=list)
    said: dict[str, list[float | None]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def laid_out(self, question: Question, size: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The maps over the input, and on the layer's own grid where they have one."""
        value = torch.cat(self.maps)
        if not question.on_layer:
            return value, None
        over = question.layer.over_input if question.layer is not None else layers.over_input
        return over(value, size), value


class Inquiry:
    """One request: images `x` `(N, C, H, W)` and what is explained.

    texts, scores: what is explained of each image, in words, and its score; known once `answer` has run
    """

    def __init__(self, net: Network, x: torch.Tensor, target: Any):
        self.net = net
        self.engine = net.engine
        self.x = x
        self.goal = targets.resolve(target, len(x), targets.Classes(net.labels))
        self._texts: dict[int, str] = {}
        self._scores: list[torch.Tensor] = []
        self._tokens: TokenGrid | None = None

    @property
    def texts(self) -> list[str]:
        return [self._texts[i] for i in range(len(self.x))]

    @property
    def scores(self) -> np.ndarray:
        return torch.cat(self._scores).numpy()

    # -- the pictures as they are

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Every question's answer, with one pass over the pictures for all of them."""
        reads = {r: q for q in questions for r in q.method.reads}
        at = {q.layer.name: q.layer for q in questions if q.layer is not None}
        removed = [self._removed(q.layer) for q in questions if q.layer is not None and "channels" in q.method.visits]
        request = Request(
            read=[*_if("input.value" in reads, INPUT), *_if("layer.value" in reads, *at), *removed],
            gradients=[*_if("input.gradient" in reads, INPUT), *_if("layer.gradient" in reads, *at)],
            attention="gradient" if "attention.gradient" in reads else "last" if "attention.value" in reads else "",
        )
        answers = [Answer() for _ in questions]
        with self.engine.session():
            self.net._learn(self.x[:1])
            self._tokens = self._token_grid(questions)
            start = 0
            # A pass under rules holds on to as much as one with gradients, and sees all images of the clean pass.
            ruled = any("rules" in q.method.visits for q in questions)
            size = self.engine.chunk_size(self.x, replace(request, gradients=[INPUT]) if ruled else request)
            for passed in self._clean(request, size):
                assert passed.scores is not None
                rows = range(start, start + len(passed.scores))
                shared: dict[Any, Any] = {}
                for question, answer in zip(questions, answers, strict=True):
                    parts = [range(i, i + 1) for i in rows] if question.method.one_by_one else [rows]
                    for part in parts:
                        look = _Answering(self, question, answer, part, passed, part.start - start, shared)
                        answer.maps.append(question.method.function(look, **question.options).detach().float())
                start = rows.stop
                self._scores.append(passed.scores.float().cpu())
                self.net._report(start, len(self.x))
        return answers

    def _token_grid(self, questions: Sequence[Question]) -> TokenGrid | None:
        """Where the tokens of the attention lie, if a question is about attention."""
        about = [q.method.name for q in questions if "attention" in q.method.needs]
        if not about:
            return None
        recording = self.engine.recording(self.x, opened=True)
        return token_grid(recording, self.net._geometry_of(recording), about[0], self.net.name)

    def _clean(self, request: Request, size: int) -> Iterator[Pass]:
        start = 0

        def score(output: Any) -> torch.Tensor:
            main = self.net._main(output)
            rows = range(start, start + main.shape[0])
            part = [min(i, len(self.x) - 1) for i in rows]  # images that only fill up a fixed batch
            value = self.goal.score(output, main, part)
            self._texts.update(zip(rows, self.goal.texts(main.detach(), part), strict=True))
            return value

        for passed in self.run(self.x, request, score, size=size):
            yield passed
            assert passed.scores is not None
            start += len(passed.scores)

    # -- passes

    def run(
        self, x: torch.Tensor, request: Request, score: Callable[[Any], torch.Tensor], count: int | None = None,
        size: int | None = None,
    ) -> Iterator[Pass]:  # fmt: skip
        """The request on images or points, in parts that fit the memory; each pass with its scores.

        count: of how many points these are a part
        size:  of the parts; default what fits
        """
        request = replace(request, score=score)
        if size is None:
            size = self.engine.chunk_size(x if count is None else x[:1].expand(count, *x.shape[1:]), request)
        for passed in self.engine.chunks(x, lambda part, _: self.engine.run(part, request, count or 1), size):
            if passed.scores is None:  # no gradient was asked for, so nothing was differentiated
                with torch.no_grad():
                    passed.scores = score(passed.output)
            yield passed

    def score_of(self, image: int) -> Callable[[Any], torch.Tensor]:
        """The score of outputs whose rows are all versions of that image."""

        def score(output: Any) -> torch.Tensor:
            main = self.net._main(output)
            return self.goal.score(output, main, [image] * main.shape[0])

        return score

    def holds(self, output: Any, images: Sequence[int]) -> torch.Tensor | None:
        """(n,): whether each row of the output, a version of that image, decides for what is explained."""
        with torch.no_grad():
            return self.goal.holds(output, self.net._main(output), images)

    def _removed(self, layer: Layer) -> str:
        """Where the channels of a layer are taken away, to the same effect."""
        return zeroed_at(self.engine.recording(self.x), layer.name, layer.channel_axis)

    def without_channels(
        self, image: int, layer: Layer, value: torch.Tensor | None = None
    ) -> tuple[float, torch.Tensor, bool]:
        """The image's score, its scores (C,) with each channel of the layer at zero, whether only a part was run.

        value: the value of the layer where they are taken away, for this image `(1, ...)`, if it is known
        """
        axis = layer.channel_axis
        replay = Replay(self.engine, self.x[image : image + 1], self._removed(layer), value)
        score = self.score_of(image)
        output = replay.run(replay.value)
        base = score(output).float()
        if bool(torch.isnan(base).any()):  # a whole run names the layer
            self.engine.run(self.x[image : image + 1], Request())
        self._texts[image] = self.goal.texts(self.net._main(output).detach()[:1], [image])[0]
        alive = replay.value.movedim(axis, 0).flatten(1).any(1).nonzero().flatten().tolist()  # the others are gone
        room = (self.engine.budget or free_memory(self.x.device) // 4) / max(replay.image_bytes(), 1)
        small = max(32, _CACHED // max(replay.value.numel() * replay.value.element_size(), 1))
        step = int(max(1, min(room, small, 256)) if self.x.device.type == "cpu" else max(1, min(room, 256)))
        scores = base[:1].repeat(layer.node.shape[axis])
        for start in range(0, len(alive), step):
            part = alive[start : start + step]
            scores[part] = score(replay.run(replay.without(part, axis))).float()
        return float(base[0]), scores, replay.skips

    def scaled(self, image: int, layer: Layer, factors: Sequence[float]) -> torch.Tensor:
        """The image's scores (k,) with the layer's value multiplied by each of the factors."""
        replay = Replay(self.engine, self.x[image : image + 1], layer.name)
        values = torch.cat([replay.value * f for f in factors], replay.batch_dim)
        return self.score_of(image)(replay.run(values)).float()

    # -- the layer that is looked at

    def layer(self, name: str | None) -> tuple[Layer, str]:
        """The layer that a CAM looks at, and why it."""
        if self.x.dim() != 4:
            raise errors.Unsupported(
                f"maps of inner layers are made for pictures (N, C, H, W); this input is {tuple(self.x.shape)}: "
                "the methods that read the input's gradient take it"
            )
        table = self.net._layers_for(self.x)
        if name is not None:
            layer = table[name]
            if layer.grid is None:
                near = [n for n in table.spatial if n.rpartition(".")[0] == name.rpartition(".")[0]] or table.spatial
                raise errors.Unsupported(
                    f"layer {name!r} {layer.shape} has no place in the picture; layers with maps are "
                    f"{', '.join(near[-3:])}"
                )
            return layer, ""
        recording = self.engine.recording(self.x)
        if id(recording) not in self.net._cam_layers:
            self.net._cam_layers[id(recording)] = self._last_layer(table, recording)
        layer = table[self.net._cam_layers[id(recording)]]
        return layer, f"layer {layer.name}: the last with a grid that everything passes through (layer= changes it)"

    def _last_layer(self, table: Layers, recording: Recording) -> str:
        """The last layer with a grid that every path passes through."""
        trunk = [
            n.name
            for n in recording.bottlenecks()
            if n.kind == "layer" and "pool" not in n.op and (g := table[n.name].grid) is not None and min(g[1:]) > 1
        ]
        if not trunk:
            raise errors.Unsupported(
                f"{self.net.name} has no layer with a grid that everything passes through; name one with layer="
            )
        if recording.outputs and (main := self.net._geometry_of(recording)[recording.outputs[0].node]) is not None:
            dense = main.layout is not None and main.layout.spatial
            if dense:  # a segmentation: not its answer, but the deepest maps it is made from
                smallest = min(np.prod(table[n].grid[1:]) for n in trunk)  # type: ignore[index]
                deep = [n for n in trunk if np.prod(table[n].grid[1:]) == smallest]  # type: ignore[index]
                return max(deep, key=lambda n: (table[n].grid[0], deep.index(n)))  # type: ignore[index]
        candidates = trunk[-8:]
        if not any(table[n].grid_note for n in candidates):
            return candidates[-1]
        # Tokens: behind the last attention the patches no longer reach a class token, and their gradient is zero. Where
        # they go on through a norm, its output is looked at: a norm takes no notice of scale, so in front of it
        # activation times gradient sums to zero.
        index = {table[n].node.index: n for n in candidates}
        norms = {
            index[i]: n.name
            for n in recording.layers
            if n.op in ("layer_norm", "rms_norm") and table[n.name].spatial
            for i in n.inputs
            if i in index
        }
        request = Request(gradients=[*candidates, *norms.values()])
        with self.engine.session():
            for passed in self.run(self.x[:1], request, self.score_of(0)):
                for name in reversed(candidates):
                    for looked_at in filter(None, (norms.get(name), name)):
                        gradient = passed.gradients[looked_at]
                        if gradient is not None and bool(table[looked_at].to_grid(gradient).any()):
                            return looked_at
        return candidates[-1]


def _if(wanted: bool, *names: str) -> tuple[str, ...]:
    return names if wanted else ()


class _Answering(Look):
    """The look of one method at some images of a request, which runs what the method asks for."""

    def __init__(
        self, inquiry: Inquiry, question: Question, answer: Answer, rows: range, passed: Pass, first: int, shared: dict
    ):
        here = slice(first, first + len(rows))  # where these images are in the pass
        assert passed.scores is not None
        values, gradients = _grids(question, question.method.reads, passed, here)
        attention = [m.of(here) for m in passed.attention] if "attention" in question.method.needs else ()
        images = [rows.start - first + i for i in range(len(passed.scores))]

        def holds() -> torch.Tensor | None:
            decided = inquiry.holds(passed.output, images)
            return None if decided is None else decided[here]

        scores = passed.scores[here].detach().float()
        super().__init__(values, gradients, scores, attention, inquiry._tokens, holds)
        self._inquiry = inquiry
        self._question = question
        self._answer = answer
        self._rows = rows
        self._passed = passed
        self._first = first
        self._images = len(images)
        self._shared = shared

    def visit(
        self, count: int, make: Callable[[range], torch.Tensor], *reads: str
    ) -> Iterator[tuple[range, Look]]:  # fmt: skip
        inquiry, layer = self._inquiry, self._question.layer
        names = {"input": INPUT, "layer": layer.name if layer else ""}
        asked = [r.split(".") for r in reads if r != "score"]
        request = Request(
            read=[INPUT, *(names[of] for of, what in asked if what == "value" and of == "layer")],
            gradients=[names[of] for of, what in asked if what == "gradient"],
        )
        (image,) = self._rows
        score = inquiry.score_of(image)
        x = inquiry.x[image : image + 1]
        size = inquiry.engine.chunk_size(x.expand(count, *x.shape[1:]), request)
        for start in range(0, count, size):
            part = range(start, min(start + size, count))
            for passed in inquiry.run(make(part).to(x), request, score, count):
                assert passed.scores is not None
                done = range(part.start, part.start + len(passed.scores))
                part = range(done.stop, part.stop)
                values, gradients = _grids(self._question, ("input.value", *reads), passed, slice(None))
                inquiry.net._report(done.stop, count, "points")
                holds = partial(inquiry.holds, passed.output, [image] * len(done))
                yield done, Look(values, gradients, passed.scores.detach().float(), holds=holds)

    def patched(self, boxes: Sequence[tuple[int, int, int, int]], fill: torch.Tensor) -> Iterator[tuple[range, Any]]:
        (image,) = self._rows
        inquiry = self._inquiry
        score = inquiry.score_of(image)
        patches = Patches(inquiry.engine, inquiry.x[image : image + 1], fill)
        for part, output in patches.parts(boxes):
            inquiry.net._report(part.stop, len(boxes), "patches")
            with torch.no_grad():
                yield part, score(output).float()
        for sentence in patches.notes if not patches.skips else ():
            self.note(sentence)

    def under(self, rules: Any, baseline: torch.Tensor | None = None, keep: Callable[..., Any] | None = None) -> Any:
        from innersight.observe import rules as backward_rules

        inquiry, rows = self._inquiry, self._rows
        key = (rules, rows)
        again = baseline is not None or keep is not None  # then it is this method's own
        ruled = None if again else self._shared.get(key)
        if ruled is None:
            table = inquiry.net._layers_for(inquiry.x)

            def score(output: Any) -> torch.Tensor:
                main = inquiry.net._main(output)
                return inquiry.goal.score(output, main, [min(i, rows.stop - 1) for i in rows])

            def on_grid(node: Any, taken: torch.Tensor) -> Any:
                layer = table.get(node.name)  # attention, opened, holds more than is listed
                return keep(layer, layer.to_grid(taken)) if keep and layer and layer.spatial else None

            x = inquiry.x[rows.start : rows.stop]
            ruled = backward_rules.run(
                inquiry.engine, x, rules, score, baseline, keep=None if keep is None else on_grid
            )
            if not again:
                self._shared[key] = ruled
        for sentence in ruled.notes:
            self.note(sentence)
        return ruled

    def without_channels(self) -> torch.Tensor:
        (image,) = self._rows
        assert self._question.layer is not None
        value, images = self._passed.values.get(self._inquiry._removed(self._question.layer)), self._images
        if value is not None:  # windows share the dimension of the images
            value = value[self._first : self._first + 1] if len(value) == images else None
        _, scores, skips = self._inquiry.without_channels(image, self._question.layer, value)
        if not skips:
            self.note(f"{self._inquiry.net.name} cannot be run from the middle, so each removal was a whole run")
        return scores

    def scaled(self, factors: Sequence[float]) -> torch.Tensor:
        (image,) = self._rows
        assert self._question.layer is not None
        return self._inquiry.scaled(image, self._question.layer, factors)

    def once(self, function: Callable[..., Any], *args: Any) -> Any:
        key = (function, self._rows, None if self._question.layer is None else self._question.layer.name, args)
        if key not in self._shared:
            self._shared[key] = function(self, *args)
        return self._shared[key]

    def say(self, **numbers: Any) -> None:
        total = len(self._inquiry.x)
        for name, value in numbers.items():
            row = self._answer.said.setdefault(name, [None] * total)
            each = np.broadcast_to(torch.as_tensor(value).detach().float().cpu().numpy(), (len(self._rows),))
            for i, number in zip(self._rows, each, strict=True):
                row[i] = float(number)

    def note(self, sentence: str) -> None:
        if sentence not in self._answer.notes:
            self._answer.notes.append(sentence)


def _grids(question: Question, reads: Sequence[str], passed: Pass, here: slice) -> tuple[dict, dict]:
    """The values and gradients of a pass as a method sees them."""
    layer = question.layer
    found: dict[str, dict[str, torch.Tensor]] = {"value": {}, "gradient": {}}
    for of, what in (r.split(".") for r in reads if r.startswith(("input.", "layer."))):
        name = INPUT if of == "input" or layer is None else layer.name
        value = (passed.values if what == "value" else passed.gradients)[name]
        if value is None:
            raise errors.Unsupported(
                f"the score does not depend on {name!r} in a way that has a gradient (a detector that found "
                "nothing, a step function), so no map can be made from it"
            )
        found[what][of] = (value if name == INPUT or layer is None else layer.to_grid(value)).detach()[here]
    return found["value"], found["gradient"]
