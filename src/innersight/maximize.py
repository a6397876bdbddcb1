"""Activation maximization: the picture that a class or a channel answers to most.

    net.maximize(target="goldfish").save("goldfish.png")            # the class model
    net.maximize("layer3", channel=[7, 12, 40]).save("seen.png")    # what channels look for

A picture is found by following the gradient of one unit's activation with respect to the input. Left to itself that
finds noise, which excites a unit as no photograph would. Three things keep it to patterns (Olah, Mordvintsev and
Schubert, Feature Visualization, Distill 2017): the steps are taken in frequencies, scaled as those of photographs
are; colors are taken along the axes in which photographs' colors vary independently; and every step looks at the
picture a little moved, turned and scaled.
"""

from __future__ import annotations

import itertools
import math
import operator
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from innersight import __version__, errors, results, targets
from innersight.formats.function import Function
from innersight.observe.passes import INPUT, Request
from innersight.preprocess import CHANNELS, Preprocess

if TYPE_CHECKING:
    from innersight.layers import Layer
    from innersight.network import Network

PARAMETERIZATIONS = ("fourier", "pixels")
STARTS = 16  # random pictures that a unit which does not answer is tried on before it is called dead
FADE = 0.2  # how fast frequencies that the unit does not ask for fade: the decay of AdamW
RAISED = 2.0  # a rise below this many standard deviations is not one
RANDOM, SAME_SPECTRUM = 32, 16  # how many pictures an activation is compared with
SHIFT, ZOOM, TURN = 0.05, 0.1, 10.0  # each up to this, both ways: share of the side, share of the size, degrees

# How the colors of ImageNet's photographs vary: the axes (columns) and the variance along each. Published with the
# color augmentation of Krizhevsky et al., ImageNet classification with deep convolutional neural networks, 2012.
COLOR_AXES = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
COLOR_VARIANCE = (0.2175, 0.0188, 0.0045)


def maximize(
    net: Network,
    layer: str | None = None,
    channel: int | Sequence[int] | None = None,
    target: Any = None,
    *,
    at: str | tuple[int, int] = "everywhere",
    steps: int = 256,
    seed: int = 0,
    parameterization: str = "fourier",
    robust: bool = True,
    l2: float | None = None,
    learning_rate: float | None = None,
) -> results.Maximization:
    """The picture that a class (`target`) or a channel of a layer answers to most, and how far it raises it.

    layer, channel: the unit; several channels give several pictures: `net.maximize("conv2", channel=[7, 8])`
    target:   a class, or a list of them, or another target of `innersight.targets`, instead of a layer
    at:       "everywhere": the mean of the channel over its grid (of tokens: those of the picture); "middle", or
              (y, x): one unit of it
    steps:    how many gradients are followed, by Adam; what the unit does not ask for fades meanwhile
    seed:     of the start and of the moves: the same seed finds the same picture (to the bit on a CPU)
    parameterization: "fourier", see `innersight.maximize`; "pixels": the input itself, from zero, by `l2` kept small:
              with robust=False the class model of Simonyan, Vedaldi and Zisserman, 2013, the picture I that maximizes
              score(I) - l2 * |I|^2 (their I is the normalized input; it is kept within the values a picture can have)
    robust:   look at the picture a little moved, turned and scaled in each step; without it, it becomes noise
    l2:       for "pixels"; default 0.001 (the paper gives none)
    learning_rate: default 0.05 (for "pixels": of the normalized input); it falls to zero with the steps

    The result's verdict compares the activation with that on random pictures (`rise`, in standard deviations of
    theirs) and on noise of the picture's own spectrum. Units that are silent at every start are noted and marked; if
    no other was asked for, Unsupported is raised. UnknownName for a layer, channel or class that does not exist.
    """
    shape = _check(net, steps, parameterization, l2, learning_rate)
    pixels = parameterization == "pixels"
    settings = _Settings(
        steps=steps,
        seed=seed,
        pixels=pixels,
        robust=bool(robust),
        l2=(1e-3 if l2 is None else float(l2)) if pixels else 0.0,
        learning_rate=float(learning_rate) if learning_rate is not None else 0.05,
    )
    with net.engine.session(), torch.enable_grad():  # all of it: what is made in inference mode has no gradient
        canvas, notes = _canvas(net, shape)
        blank = net._to_model(canvas.to_input(torch.full((1, *shape), 0.5)))  # gray
        goal = _goal(net, blank, layer, channel, target, at)
        search = _Search(net, goal, canvas, settings, blank)
        found, history, dead = search.run()
        verdict = search.verdict(found, dead)
    notes = [*net.notes, *notes, *goal.notes, *(goal.silent(k) for k in np.flatnonzero(dead).tolist())]
    notes += [
        f"{goal.texts[k]} was not raised: it ends {rise:.2g} standard deviations above random pictures; another seed "
        "or more steps may"
        for k, rise in enumerate(verdict["rise"])
        if rise < RAISED
    ]
    options = {"at": at, "channel": goal.channels, "steps": steps, "parameterization": parameterization,
               "robust": settings.robust, "learning_rate": settings.learning_rate}  # fmt: skip
    return results.Maximization(
        values=canvas.to_picture(found.cpu()).movedim(1, -1).contiguous().numpy(),
        inputs=found.cpu().numpy(),
        units=goal.texts,
        history=history.numpy(),
        verdict=verdict,
        provenance=results.Provenance(
            network=net.name, method="maximize", layer=goal.layer, target=goal.target, seed=seed,
            options={k: v for k, v in options.items() if v is not None} | ({"l2": settings.l2} if pixels else {}),
            notes=tuple(dict.fromkeys(notes)),
            versions={"innersight": __version__, "torch": torch.__version__, "python": platform.python_version()},
        ),
    )  # fmt: skip


@dataclass(frozen=True)
class _Settings:
    steps: int
    seed: int
    pixels: bool
    robust: bool
    l2: float
    learning_rate: float

    def random(self, purpose: int) -> torch.Generator:
        """A generator of its own for each purpose, so that more steps do not change what is drawn for another."""
        return torch.Generator().manual_seed((8 * int(self.seed) + purpose) % 2**63)


def _check(
    net: Network, steps: int, parameterization: str, l2: float | None, learning_rate: float | None
) -> tuple[int, int, int]:
    if isinstance(net.module, Function):
        raise errors.Unsupported(
            "maximize follows gradients, which a plain function does not offer: open the model itself"
        )
    if parameterization not in PARAMETERIZATIONS:
        raise errors.unknown("parameterization", parameterization, PARAMETERIZATIONS)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise errors.InputError(f"steps={steps!r}: a whole number from 1 on")
    for name, value in (("l2", l2), ("learning_rate", learning_rate)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise errors.InputError(f"{name}={value!r}: a number from 0 on")
    if l2 is not None and parameterization != "pixels":
        raise errors.InputError("l2= is for parameterization='pixels'; frequencies are kept small by their own scale")
    shape = net.input_shape
    if shape is None:
        raise errors.InputError(f"the input size of {net.name} is not known: open it with input_shape=(C, H, W)")
    if len(shape) != 3:
        raise errors.Unsupported(f"pictures (C, H, W) can be found, and {net.name} takes {tuple(shape)}")
    return (int(shape[0]), int(shape[1]), int(shape[2]))


# ---------------------------------------------------------------------------------------------------------------------
# What is maximized


@dataclass(frozen=True)
class _Goal:
    """What is maximized, for each of several pictures.

    of:      the node where it is read; None: the output
    score:   (value there, part) -> one number for each row; `part` says which of the goals each row is for
    answers: whether the value there names a class
    """

    texts: list[str]
    layer: str | None
    channels: list[int] | None
    target: str | None
    of: str | None
    score: Callable[[Any, Sequence[int]], torch.Tensor]
    at: tuple[int, int] | None = None
    answers: bool = False
    notes: tuple[str, ...] = ()

    def silent(self, k: int) -> str:
        """What is said of a unit that nothing was found for."""
        return (
            f"{self.texts[k]} answers to none of {STARTS + 1} random starts: its gradient is zero at each, so there is "
            f"no way up{'' if self.at is None else ' (the whole channel has more: at=' + repr('everywhere') + ')'}"
        )


def _goal(net: Network, blank: torch.Tensor, layer: Any, channel: Any, target: Any, at: Any) -> _Goal:
    if target is not None:
        if layer is not None or channel is not None:
            raise errors.InputError("maximize a class (target=) or a channel (layer=, channel=), not both at once")
        if at != "everywhere":
            raise errors.InputError("at= is a place on the grid of a layer; a class (target=) has none")
        return _class_goal(net, blank, target)
    if layer is None:
        raise errors.InputError(
            "nothing to maximize: name a class (target='dog') or a channel (layer='conv2', channel=7)"
        )
    return _channel_goal(net._layers_for(blank)[layer], channel, at)


def _channel_goal(layer: Layer, channel: Any, at: Any) -> _Goal:
    count = _channel_count(layer)
    axis = layer.channel_axis
    channels = _channels(channel, layer, count)
    place = _place(at, layer)
    index = torch.tensor(channels)

    def score(value: torch.Tensor, part: Sequence[int]) -> torch.Tensor:
        maps = layer.to_grid(value) if layer.grid is not None else value.movedim(axis, 1)
        rows = torch.arange(maps.shape[0], device=maps.device)
        unit = maps[rows, index.to(maps.device)[_fill(part, len(rows))]]
        if place is not None:
            return unit[:, place[0], place[1]]
        return unit.flatten(1).mean(1) if unit.dim() > 1 else unit

    where = "" if place is None else f" at ({place[0]}, {place[1]})"
    texts = [f"{layer.name} channel {c}{where}" for c in channels]
    return _Goal(texts, layer.name, channels, None, layer.name, score, place)


def _channel_count(layer: Layer) -> int:
    if layer.grid is not None:
        return layer.grid[0]
    if not layer.node.shapes or not layer.shape:
        raise errors.Unsupported(f"layer {layer.name!r} has no channels")
    return int(layer.node.shape[layer.channel_axis])


def _channels(channel: Any, layer: Layer, count: int) -> list[int]:
    if channel is None:
        raise errors.InputError(f"say which channel of {layer.name}: channel= one of 0 to {count - 1}, or a list")
    several = channel.tolist() if hasattr(channel, "tolist") else channel
    try:
        numbers = [operator.index(c) for c in (several if isinstance(several, (list, tuple, range)) else [several])]
    except TypeError:
        raise errors.InputError(f"channel={channel!r}: a whole number, or a list of them") from None
    if not numbers:
        raise errors.InputError("channel= is empty: name one or more")
    for c in numbers:
        if not 0 <= c < count:
            raise errors.UnknownName(
                f"channel {c} is out of range: {layer.name} has {count} channels, numbered 0 to {count - 1}"
            )
    return numbers


def _place(at: Any, layer: Layer) -> tuple[int, int] | None:
    """The unit (y, x) on the layer's grid; None: all of them."""
    if isinstance(at, str) and at == "everywhere":
        return None
    if layer.grid is None:
        raise errors.Unsupported(f"layer {layer.name!r} has no place in the picture, so leave at= out")
    _, height, width = layer.grid
    if isinstance(at, str) and at == "middle":
        return height // 2, width // 2
    try:
        y, x = (operator.index(v) for v in at)
    except (TypeError, ValueError):
        raise errors.InputError(f"at={at!r}: 'everywhere', 'middle' or (y, x) on the layer's grid") from None
    if not (0 <= y < height and 0 <= x < width):
        raise errors.InputError(f"at=({y}, {x}) is outside of the {height}x{width} grid of {layer.name}")
    return y, x


def _class_goal(net: Network, blank: torch.Tensor, target: Any) -> _Goal:
    several = target.tolist() if hasattr(target, "tolist") else target
    if isinstance(several, list):
        if not several:
            raise errors.InputError("target= is empty: name one class or more")
        if None in several:
            raise errors.InputError("there is no picture yet, so no class is predicted: name each class")
    count = len(several) if isinstance(several, list) else 1
    goal = targets.resolve(several, count, net._classes)
    before = None if callable(target) or isinstance(target, targets.Target) else _before_softmax(net, blank)

    def score(output: Any, part: Sequence[int]) -> torch.Tensor:
        main = net._main(output)
        return goal.score(output, main, _fill(part, main.shape[0]))

    net._learn(blank)
    output = _value(net, blank, before, lambda value: value)
    main = net._main(output)
    for k in range(count):  # what is wrong with a target shows here, before the first step
        score(output, [k])
    texts = [goal.texts(main, [k])[0] for k in range(count)]
    notes = () if before is None else (f"the class score is the one before the softmax, at {before}",)
    return _Goal(texts, None, None, ", ".join(texts), before, score, answers=main.dim() == 2, notes=notes)


def _before_softmax(net: Network, blank: torch.Tensor) -> str | None:
    """The node with the class scores, where the network's last operation makes probabilities of them.

    Simonyan et al. maximize the score: the probability can be raised by making the other classes less likely.
    """
    if net._output is not None:
        return None
    recording = net._learn(blank)
    if len(recording.outputs) != 1:
        return None
    node = recording.nodes[recording.outputs[0].node]
    while (before := recording.handed_on(node)) is not None:
        node = before
    if node.op not in ("softmax", "log_softmax") or len(node.shape) != 2 or len(node.inputs) != 1:
        return None
    scores = recording.nodes[node.inputs[0]]
    return scores.name if scores.shape == node.shape and scores.kind != "input" else None


def _fill(part: Sequence[int], rows: int) -> list[int]:
    """Which goal each row is for; rows beyond them only fill up a fixed batch."""
    return [part[min(i, len(part) - 1)] for i in range(rows)]


def _value(net: Network, x: torch.Tensor, of: str | None, make: Callable[[Any], Any]) -> Any:
    """What `make` makes of the value of a layer (None: of the output) for a batch, without gradients."""
    if of is None:
        return make(net.engine.run(x, Request()).output)
    return net.engine.run(x, Request(read=[of], reduce={of: make}, output=False)).values[of]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures, inputs, and the frequencies they are made of


@dataclass(frozen=True)
class Canvas:
    """The pictures a network can be given, (C, H, W) with values 0..1, and the inputs it makes of them.

    shape:       (C, H, W)
    scale, shift: for each channel: input = picture * scale + shift
    flip:        the network takes the channels from last to first (BGR)
    """

    shape: tuple[int, int, int]
    scale: torch.Tensor
    shift: torch.Tensor
    flip: bool = False

    @classmethod
    def of(cls, shape: tuple[int, int, int], preprocess: Preprocess | None) -> Canvas:
        """That of a network with this preprocessing; without one, inputs are taken to be 0..1."""
        channels = shape[0]
        if preprocess is None:
            return cls(shape, torch.ones(channels, 1, 1), torch.zeros(channels, 1, 1))
        mean, std = (torch.tensor(v).expand(channels).reshape(-1, 1, 1) for v in (preprocess.mean, preprocess.std))
        whole = 255 * preprocess.scale
        scale, shift = torch.full_like(std, whole) / std, -mean / std
        if preprocess.invert:
            scale, shift = -scale, shift + scale
        return cls(shape, scale, shift, preprocess.channels == "BGR")

    def to_input(self, picture: torch.Tensor) -> torch.Tensor:
        picture = picture.flip(-3) if self.flip else picture
        return picture * self.scale.to(picture) + self.shift.to(picture)

    def to_picture(self, x: torch.Tensor) -> torch.Tensor:
        picture = ((x.float() - self.shift.to(x.device)) / self.scale.to(x.device)).clamp(0, 1)
        return picture.flip(-3) if self.flip else picture

    def inside(self, x: torch.Tensor) -> torch.Tensor:
        """An input with the values brought within those that a picture can have."""
        ends = torch.stack([self.shift, self.shift + self.scale]).to(x)
        return torch.maximum(torch.minimum(x, ends.amax(0)), ends.amin(0))

    # frequencies

    @property
    def spectrum_shape(self) -> tuple[int, int, int, int]:
        """Of what `paint` takes: real and imaginary parts of the frequencies (C, H, W // 2 + 1, 2)."""
        channels, height, width = self.shape
        return channels, height, width // 2 + 1, 2

    def frequency_scale(self) -> torch.Tensor:
        """(H, W // 2 + 1): one over the frequency, as in photographs, so that white noise becomes pixels of variance 1.

        Field, Relations between the statistics of natural images and the response properties of cortical cells, 1987.
        """
        _, height, width = self.shape
        frequency = (torch.fft.fftfreq(height)[:, None].square() + torch.fft.rfftfreq(width).square()).sqrt()
        scale = 1 / frequency.clamp(min=1 / max(height, width))
        mirrored = torch.full((width // 2 + 1,), 4.0)  # most columns stand for their mirror image, too
        mirrored[0] = 1.0
        if width % 2 == 0:
            mirrored[-1] = 1.0
        return scale / ((scale.square() * mirrored).sum() / (height * width)).sqrt()

    def colors(self) -> torch.Tensor:
        """(C, C): from channels that vary independently to those of photographs, with a mean variance of 1."""
        if self.shape[0] != 3:
            return torch.eye(self.shape[0])
        axes, variance = torch.tensor(COLOR_AXES), torch.tensor(COLOR_VARIANCE)
        return axes * (variance / variance.mean()).sqrt()

    def paint(self, spectrum: torch.Tensor) -> torch.Tensor:
        """Pictures (N, C, H, W) in 0..1 of spectra (N, *spectrum_shape): frequencies, colors, the logistic function."""
        _, height, width = self.shape
        scaled = torch.view_as_complex(spectrum) * self.frequency_scale().to(spectrum.device)
        planes = torch.fft.irfft2(scaled, s=(height, width), norm="ortho")
        return torch.einsum("ij,njyx->niyx", self.colors().to(planes), planes).sigmoid()


def _canvas(net: Network, shape: tuple[int, int, int]) -> tuple[Canvas, list[str]]:
    known = net.preprocess
    if known is not None and CHANNELS[known.channels] == shape[0]:
        return Canvas.of(shape, known), []
    note = "nothing says which values the inputs of this network have; taken as 0..1 (preprocess= changes it)"
    return Canvas.of(shape, None), [note]


def moved(pictures: torch.Tensor, move: torch.Tensor) -> torch.Tensor:
    """The inputs (N, C, H, W) all shifted, turned and scaled by one `move`, four numbers from -1 to 1, in their size.

    Beyond the border the picture is mirrored, so that no edge is there to be seen.
    """
    right, down, turn, zoom = move.tolist()
    height, width = pictures.shape[-2:]
    size, angle = math.exp(-zoom * math.log1p(ZOOM)), math.radians(turn * TURN)
    cos, sin = size * math.cos(angle), size * math.sin(angle)
    # affine_grid counts from -1 to 1 along each side, so a turn of what is not square has the sides in it
    theta = [[cos, -sin * height / width, 2 * SHIFT * right], [sin * width / height, cos, 2 * SHIFT * down]]
    grid = F.affine_grid(torch.tensor([theta], device=pictures.device), [1, 1, height, width], align_corners=False)
    grid = grid.expand(len(pictures), -1, -1, -1)
    return F.grid_sample(pictures, grid, padding_mode="reflection", align_corners=False)


def same_spectrum(picture: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """A picture (C, H, W) with the frequencies and colors of this one at places drawn by chance, cut to 0..1."""
    size = picture.shape[-2:]
    noise = torch.fft.rfft2(torch.randn(size, generator=random))
    phase = noise / noise.abs().clamp(min=1e-12)
    phase[0, 0] = 1  # the mean stays
    return torch.fft.irfft2(torch.fft.rfft2(picture) * phase, s=size).clamp(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# The search


class _Search:
    """Finds the pictures and compares them; inside of a session."""

    def __init__(self, net: Network, goal: _Goal, canvas: Canvas, settings: _Settings, blank: torch.Tensor):
        self.net, self.goal, self.canvas, self.settings, self.blank = net, goal, canvas, settings, blank

    def _together(self, count: int, request: Request) -> int:
        """How many inputs go into one pass; the blank one stands for all, without their memory."""
        return self.net.engine.chunk_size(self.blank.expand(count, *self.blank.shape[1:]), request)

    def run(self) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """Inputs (K, C, H, W), activations by step (K, steps) and which are dead (K,)."""
        count, steps = len(self.goal.texts), self.settings.steps
        size = self._together(count, self._request(range(count)))
        found, history = self.blank.float().repeat(count, 1, 1, 1), torch.zeros(count, steps)
        starts, which = self._starts(count, size)
        alive = torch.tensor([k for k in range(count) if which[k] is not None])
        if not len(alive):
            raise errors.Unsupported(self.goal.silent(0) + (f"; nor do the {count - 1} others" if count > 1 else ""))
        done = 0

        def climb(part: torch.Tensor, _: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            here = torch.stack([starts[which[k]] for k in part.tolist()])
            return part, *self._climb(here, part.tolist(), done, len(alive))

        for part, x, activations in self.net.engine.chunks(alive, climb, size):
            found[part.to(found.device)], history[part] = x, activations
            done += len(part)
        return found, history, np.array([w is None for w in which])

    def _request(self, part: Sequence[int]) -> Request:
        score = self.goal.score
        return Request(gradients=[INPUT], of=self.goal.of, score=lambda value: score(value, part))

    def _gradient(self, x: torch.Tensor, part: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores (n,) of inputs, and their gradient."""
        passed = self.net.engine.run(x, self._request(part))
        gradient = passed.gradients[INPUT]
        assert passed.scores is not None
        if gradient is None:
            raise errors.Unsupported(
                f"{self.goal.texts[part[0]]} does not depend on the picture in a way that has a gradient (a detector "
                "that found nothing, a step function), so there is no way up"
            )
        if not bool(torch.isfinite(gradient).all()):
            raise errors.Unsupported(
                f"the gradient of {self.goal.texts[part[0]]} is NaN or infinite, so there is no way up"
            )
        return passed.scores.float(), gradient

    # the start

    def _draw(self, random: torch.Generator) -> torch.Tensor:
        """A spectrum that makes a picture with the contrast of a photograph."""
        return torch.randn(self.canvas.spectrum_shape, generator=random)

    def _input(self, leaf: torch.Tensor) -> torch.Tensor:
        """What the network is given: of spectra, or of the pixels as they are."""
        return leaf if self.settings.pixels else self.canvas.to_input(self.canvas.paint(leaf))

    def _starts(self, count: int, size: int) -> tuple[list[torch.Tensor], list[int | None]]:
        """What a search may start from, and for each unit the first of them at which it is not silent, if there is one.

        First what is nearly gray, then random pictures with the contrast of photographs.
        """
        random, canvas, pixels = self.settings.random(0), self.canvas, self.settings.pixels
        starts: list[torch.Tensor] = []
        which: list[int | None] = [None] * count
        silent = list(range(count))
        while silent and len(starts) <= STARTS:
            drawn = self._draw(random)
            if pixels:
                drawn = canvas.to_input(canvas.paint(drawn[None]))[0]
            drawn = (drawn if starts else 0 * drawn if pixels else 0.01 * drawn).to(self.net.device)
            for k in range(0, len(silent), size):
                part = silent[k : k + size]
                x = self._input(drawn[None].expand(len(part), *drawn.shape))
                _, gradient = self._gradient(self.net._to_model(x), part)
                for unit, moves in zip(part, (gradient != 0).flatten(1).any(1).tolist(), strict=True):
                    which[unit] = len(starts) if moves else None
            starts.append(drawn)
            silent = [k for k in silent if which[k] is None]
        return starts, which

    # the way up

    def _climb(
        self, start: torch.Tensor, part: Sequence[int], before: int, total: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs (n, C, H, W) and activations (n, steps) from where each starts."""
        s, net = self.settings, self.net
        moves = torch.rand((s.steps, 4), generator=s.random(1)) * 2 - 1
        leaf = start.detach().clone().requires_grad_()
        adam = _Adam(leaf, 0.0 if s.pixels else FADE)
        activations = torch.zeros(len(part), s.steps)
        for step in range(s.steps):
            x = self._input(leaf)
            seen = moved(x, moves[step]) if s.robust else x
            scores, gradient = self._gradient(net._to_model(seen.detach()), part)
            up = (seen * gradient.to(seen)).sum() - s.l2 * x.square().sum()
            (slope,) = torch.autograd.grad(up, leaf)
            with torch.no_grad():
                adam.up(slope, s.learning_rate * _fall(step / s.steps))
                if s.pixels:
                    leaf.copy_(self.canvas.inside(leaf))
            activations[:, step] = scores.cpu()
            net._report(before * s.steps + (step + 1) * len(part), total * s.steps, "steps")
        with torch.no_grad():
            return self._input(leaf).detach(), activations

    # what it is worth

    def verdict(self, found: torch.Tensor, dead: np.ndarray) -> dict[str, Any]:
        """The activation on each picture beside those on random pictures and on noise of the same spectrum."""
        goals = range(len(found))
        own = np.array([self._activations([found[k]], [k])[0, 0] for k in goals])
        by_chance = self._activations(self._random_inputs(), goals)
        noise = np.full((SAME_SPECTRUM, len(found)), np.nan)
        for k in np.flatnonzero(~dead).tolist():
            noise[:, k] = self._activations(self._same_spectrum(found[k]), [k])[:, 0]
        verdict: dict[str, Any] = {
            "activation": own.tolist(),
            "random_mean": by_chance.mean(0).tolist(),
            "random_std": by_chance.std(0, ddof=1).tolist(),
            "rise": np.where(dead, np.nan, _rise(own, by_chance)).tolist(),
            "rise_over_same_spectrum": _rise(own, noise).tolist(),
            "dead": dead.tolist(),
        }
        return verdict | self._answers(found)

    def _random_inputs(self) -> Iterator[torch.Tensor]:
        random = self.settings.random(2)
        for _ in range(RANDOM):
            yield self.canvas.to_input(self.canvas.paint(self._draw(random)[None]))[0]

    def _same_spectrum(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        picture, random = self.canvas.to_picture(x.cpu()), self.settings.random(3)
        for _ in range(SAME_SPECTRUM):
            yield self.canvas.to_input(same_spectrum(picture, random))

    def _activations(self, inputs: Iterable[torch.Tensor], goals: Sequence[int]) -> np.ndarray:
        """(inputs, goals): the activation of each unit on each input; inputs are taken as many at a time as fit."""
        score = self.goal.score

        def all_goals(value: Any) -> torch.Tensor:
            return torch.stack([score(value, [k]) for k in goals], 1)

        parts = (_value(self.net, x, self.goal.of, all_goals) for x in self._batches(inputs))
        return torch.cat([p.float().cpu() for p in parts]).double().numpy()

    def _answers(self, found: torch.Tensor) -> dict[str, list]:
        """What the network says to each picture, where it answers with classes."""
        net, of = self.net, self.goal.of
        if not self.goal.answers:
            return {}
        logits = torch.cat([_value(net, x, of, net._scores) for x in self._batches(found)])
        kind = "logits" if of is not None else net._kind(self.blank)
        top = results.Predictions(logits.float().cpu().numpy(), net.labels, kind=kind).top(1)
        return {"answer": [t[0][0] for t in top], "probability": [t[0][1] for t in top]}

    def _batches(self, inputs: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        rest, size = iter(inputs), self._together(RANDOM, Request())
        while batch := list(itertools.islice(rest, size)):
            yield self.net._to_model(torch.stack(batch))


class _Adam:
    """Adam with decoupled decay (Loshchilov and Hutter, ICLR 2019), uphill.

    Not torch's: its optimizers import the compiler, which takes seconds and ends the interpreter where TensorFlow has
    been imported. The usual eps would slow down the gradient of a mean over many units, which is small beside it.
    """

    def __init__(self, leaf: torch.Tensor, decay: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-20):
        self.leaf, self.decay, self.betas, self.eps, self.steps = leaf, decay, betas, eps, 0
        self.mean, self.square = torch.zeros_like(leaf), torch.zeros_like(leaf)

    def up(self, slope: torch.Tensor, rate: float) -> None:
        self.steps += 1
        first, second = self.betas
        self.leaf.mul_(1 - rate * self.decay)
        self.mean.lerp_(slope, 1 - first)
        self.square.mul_(second).addcmul_(slope, slope, value=1 - second)
        size = (self.square / (1 - second**self.steps)).sqrt_().add_(self.eps)
        self.leaf.addcdiv_(self.mean, size, value=rate / (1 - first**self.steps))


def _fall(share: float) -> float:
    """The learning rate over the steps: it stays up for the first half and then falls from 1 to 0."""
    return 1.0 if share < 0.5 else 0.5 * (1 + math.cos(2 * math.pi * (share - 0.5)))


def _rise(own: np.ndarray, others: np.ndarray) -> np.ndarray:
    """How many standard deviations of the others' activations (n, K) each of (K,) is above their mean."""
    above = own - others.mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(above == 0, 0.0, above / others.std(0, ddof=1))
