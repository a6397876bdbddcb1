"""Methods that hide parts of the picture and watch the score: windows, random grids, one smooth mask.

All but extremal perturbation need the score alone, so they explain any function. What is hidden shows `fill` instead:
a kind of `baselines.baseline`, "zero" (of the input: the mean color of a normalized picture), "blur", a number, ...
Those that draw random numbers draw them point by point from `seed`: how points are packed changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from innersight import errors
from innersight.methods import Look, method
from innersight.methods.baselines import baseline, blurred

if TYPE_CHECKING:  # a list of the methods needs no torch
    import torch


def picture(look: Look) -> torch.Tensor:
    """The one picture `(1, C, H, W)`, in single precision at least."""
    x = look.value("input")
    if x.dim() != 4:
        raise errors.Unsupported(f"parts are hidden in pictures (N, C, H, W); this input is {tuple(x.shape)}")
    return x if x.element_size() > 4 else x.float()


def scores_of(look: Look, count: int, make: Callable[[range], torch.Tensor]) -> torch.Tensor:
    """(count,): the scores of these versions of the picture, in double precision on the CPU."""
    import torch

    return torch.cat([seen.scores.cpu().double() for _, seen in look.visit(count, make)])


def at_least(lowest: float, **options: float) -> None:
    for name, value in options.items():
        if not value >= lowest:
            raise errors.InputError(f"{name}={value}: it must be {lowest} or more")


# ---------------------------------------------------------------------------------------------------------------------
# Occlusion


@method(
    family="perturbation",
    reads=("input.value",),
    visits=("patches",),
    passes="1 forward, and a part of one for each window (169 by default)",
    unit="loss of score when hidden",
    paper="Zeiler, Fergus: Visualizing and Understanding Convolutional Networks, ECCV 2014 (arXiv:1311.2901)",
)
def occlusion(look: Look, window: Any = None, stride: Any = None, fill: Any = "zero") -> torch.Tensor:
    """How much score is lost where a window slid over the picture hides it, mean over the windows that cover a pixel.

    The paper shows the score for each place of the window; the mean over windows is what Captum makes of it, whose last
    windows reach over the border where ours stop at it.

    window: its side in pixels, or (height, width); default a seventh of the picture
    stride: how far it moves, one number or (down, right); default half a window. The last window ends at the border
    fill:   what it shows: "zero", "blur", a number, ...
    """
    import torch

    x = picture(look)
    size = x.shape[-2:]
    window = _pair("window", window, [math.ceil(side / 7) for side in size])
    window = [min(w, side) for w, side in zip(window, size, strict=True)]
    stride = _pair("stride", stride, [math.ceil(w / 2) for w in window])
    if any(s > w for s, w in zip(stride, window, strict=True)):
        raise errors.InputError(f"a stride of {max(stride)} leaves gaps between windows of {min(window)} pixels")
    tops, lefts = (
        [*range(0, side - w, s), side - w] for side, w, s in zip(size, window, stride, strict=True)
    )  # fmt: skip
    boxes = [(top, left, *window) for top in tops for left in lefts]
    hidden = torch.cat([scores.cpu().double() for _, scores in look.patched(boxes, baseline(x, fill))])
    lost = (look.scores.cpu().double() - hidden).reshape(len(tops), len(lefts))
    rows, columns = (
        torch.stack([(torch.arange(side) >= a) & (torch.arange(side) < a + w) for a in starts]).double()
        for side, w, starts in zip(size, window, (tops, lefts), strict=True)
    )
    return ((rows.T @ lost @ columns) / (rows.T.sum(1, keepdim=True) * columns.sum(0)))[None]


def _pair(name: str, given: Any, default: Sequence[int]) -> list[int]:
    values = default if given is None else [given, given] if isinstance(given, int) else given
    if not isinstance(values, Sequence) or len(values) != 2 or not all(isinstance(v, int) and v > 0 for v in values):
        raise errors.InputError(f"{name}={given!r}: give a number of pixels, or two (down, right)")
    return list(values)


# ---------------------------------------------------------------------------------------------------------------------
# RISE

_ROUND = 256  # masks between two looks at whether the map has settled


@method(
    family="perturbation",
    reads=("input.value",),
    visits=("score",),
    passes="256 to 4,000 forwards, until the map has settled",
    unit="mean score while the pixel shows, less the mean",
    paper="Petsiuk, Das, Saenko: RISE, BMVC 2018 (arXiv:1806.07421)",
)
def rise(
    look: Look,
    masks: int = 4000,
    error: float = 0.1,
    grid: int = 7,
    share: float = 0.5,
    centered: bool = True,
    fill: Any = "zero",
    seed: int = 0,
) -> torch.Tensor:
    """How much higher the score is while a pixel shows, over random masks; stops when the map has settled.

    Masks as the authors': a random grid, enlarged bilinearly, shifted by less than a cell; the map is the sum of the
    masks, each times its score, over their number and `share`. The paper explains a probability, of which most masks
    leave nothing (`target=targets.probability()`). Other scores stand on an offset that would drown the map in noise of
    the masks, so each score is taken less the mean of all: in expectation the published map less a constant.

    masks:    the most that are tried
    error:    the standard error at which the map has settled, as a share of the map's own standard deviation
    grid:     cells a side of the random grid
    share:    of its cells that show
    centered: False is the published map to the letter
    fill:     what the others show: "zero", "blur", a number, ...
    """
    import torch

    at_least(1, masks=masks, grid=grid)
    if not 0 < share < 1:
        raise errors.InputError(f"share={share}: it is between 0 (nothing shows) and 1 (everything)")
    x = picture(look)
    size = x.shape[-2:]
    blank = baseline(x, fill)
    generator = torch.Generator().manual_seed(seed)
    cells = [math.ceil(side / grid) for side in size]
    down, right = (_enlarging(grid, (grid + 1) * cell).to(x) for cell in cells)
    made: list[Any] = [0, None]  # the masks that were made last, and the number of the first

    def make(part: range) -> torch.Tensor:
        each = []
        for _ in part:
            shows = (torch.rand(grid, grid, generator=generator) < share).to(x)
            top, left = (int(torch.randint(cell, (), generator=generator)) for cell in cells)
            each.append(down[top : top + size[0]] @ shows @ right[left : left + size[1]].T)
        made[:] = part.start, torch.stack(each)
        return blank + made[1][:, None] * (x - blank)

    def parts() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for part, seen in look.visit(masks, make):
            for start, stop in _rounds(part):
                yield seen.scores[start - part.start : stop - part.start], made[1][start - made[0] : stop - made[0]]

    tally = _Tally(share, centered)
    for scores, shown in parts():
        tally.update(scores, shown)
        if tally.count % _ROUND == 0 and tally.error() <= error:
            break
    look.say(masks=tally.count, standard_error=tally.error(), settled=tally.error() <= error)
    return tally.map()[None]


def _enlarging(cells: int, size: int) -> torch.Tensor:
    """(size, cells): bilinear enlargement of one side, mirrored at the middle of the outer cells, as skimage does."""
    import torch

    at = ((torch.arange(size, dtype=torch.float64) + 0.5) * cells / size - 0.5).abs()
    at = torch.minimum(at, 2 * (cells - 1) - at).clamp(min=0)
    return (1 - (at[:, None] - torch.arange(cells)).abs()).clamp(min=0)


def _rounds(part: range) -> Iterator[tuple[int, int]]:
    """The part, cut where a round ends: when to stop must not depend on how points are packed."""
    start = part.start
    while start < part.stop:
        stop = min(part.stop, (start // _ROUND + 1) * _ROUND)
        yield start, stop
        start = stop


class _Tally:
    """The sums of RISE: scores, masks, and the spread of score times mask, which tells the error of their mean.

    The error is that of the map up to a constant. With T = score (mask - its mean over the pixels) / share for each
    mask, the map is the mean of T, and the variance of T over the masks, mean of all pixels, is the mean of its squares
    less that of the map's; the squares need one number a mask, its variance over the pixels.
    """

    def __init__(self, share: float, centered: bool):
        self.share = share
        self.centered = centered
        self.count = 0
        self.score = 0.0
        self.sums: Any = 0  # (2, H, W): masks times score, masks
        self.squares: Any = 0  # (3,): variance of the mask, times score, times score squared

    def update(self, scores: torch.Tensor, masks: torch.Tensor) -> None:
        import torch

        score, flat = scores.to(masks), masks.flatten(1)
        powers = torch.stack([torch.ones_like(score), score, score**2]).cpu().double()
        self.count += len(scores)
        self.score += float(powers[1].sum())
        self.sums = self.sums + (torch.stack([score, torch.ones_like(score)]) @ flat).cpu().double()
        self.squares = self.squares + powers @ flat.var(1, unbiased=False).cpu().double()
        self.shape = masks.shape[1:]

    @property
    def offset(self) -> float:
        return self.score / self.count if self.centered else 0.0

    def map(self) -> torch.Tensor:
        weighted, shown = self.sums
        return ((weighted - self.offset * shown) / (self.count * self.share)).reshape(self.shape)

    def error(self) -> float:
        """The standard error of the map (root of its mean square), as a share of the map's standard deviation."""
        none, once, twice = (float(s) for s in self.squares)
        square = (twice - 2 * self.offset * once + self.offset**2 * none) / (self.count * self.share**2)
        spread = float(self.map().var(unbiased=False))
        if square <= 0 or self.count < 2:
            return 0.0 if self.count > 1 else math.inf
        return math.sqrt(max(square / spread - 1, 0) / (self.count - 1)) if spread > 0 else math.inf


# ---------------------------------------------------------------------------------------------------------------------
# Sobol indices


@method(
    family="perturbation",
    reads=("input.value",),
    visits=("score",),
    signed=False,
    passes="3,936 forwards: 32 x (11 x 11 cells + 2)",
    unit="share of the score's variance",
    paper="Fel et al.: Look at the Variance! Sobol-based Sensitivity Analysis, NeurIPS 2021 (arXiv:2111.04138)",
)
def sobol(look: Look, grid: int = 11, designs: int = 32, fill: Any = "zero", seed: int = 0) -> torch.Tensor:
    """How much of the score's variance a cell has a part in, alone or with others, when all cells are dimmed at random.

    Total-order Sobol indices by Jansen's estimator over a scrambled Sobol sequence; cells lie over the picture as they
    are, the authors' code smooths them. The variance is that of both sets of masks, theirs of the first alone.

    grid:    cells a side
    designs: masks for each cell, a power of two
    fill:    what a cell is dimmed to: "zero", "blur", a number, ...
    """
    import torch
    from torch.nn.functional import interpolate

    at_least(2, grid=grid, designs=designs)
    if designs & (designs - 1):
        raise errors.InputError(f"designs={designs}: a Sobol sequence is even only at powers of two (16, 32, 64, ...)")
    x = picture(look)
    size = x.shape[-2:]
    shape = [min(grid, side) for side in size]
    cells = shape[0] * shape[1]
    drawn = torch.quasirandom.SobolEngine(2 * cells, scramble=True, seed=seed).draw(designs)
    first, second = drawn[:, :cells], drawn[:, cells:]
    blank = baseline(x, fill)

    def make(part: range) -> torch.Tensor:
        values = []
        for i in part:
            which, n = divmod(i, designs)
            value = (second if which == 1 else first)[n].clone()
            if which > 1:
                value[which - 2] = second[n, which - 2]
            values.append(value.reshape(shape))
        return blank + interpolate(torch.stack(values)[:, None].to(x), size) * (x - blank)

    scores = scores_of(look, designs * (cells + 2), make).reshape(-1, designs)
    variance = scores[:2].var()
    moved = (scores[2:] - scores[0]) ** 2 / 2  # (cells, designs)
    total = moved.mean(1) / variance if variance > 0 else moved.mean(1)
    error = (moved.var(1) / designs).mean().sqrt() / moved.mean(1).std().clamp(min=1e-30)
    look.say(standard_error=error, variance=variance)
    return interpolate(total.reshape(1, 1, *shape), size)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Extremal perturbation

_STEPS = 800  # of the authors' code, whose rates these are
_RATE, _MOMENTUM, _WEIGHT, _GROWTH = 0.01, 0.9, 300.0, 1.0035
_LEVELS, _COLDNESS = 8, 20.0
_REWARD = 40.0  # what the way from everything hidden to the whole picture counts: as in the logits they had


@method(
    family="perturbation",
    reads=("input.value",),
    visits=("input.gradient",),
    signed=False,
    passes="300 forwards and backwards for each area",
    unit="1 where the picture shows",
    paper="Fong, Patrick, Vedaldi: Extremal Perturbations and Smooth Masks, ICCV 2019 (arXiv:1910.08485)",
)
def extremal_perturbation(
    look: Look, area: Any = 0.1, steps: int = 300, fill: Any = "blur", mirror: bool = False
) -> torch.Tensor:
    """The smooth mask of a given area through which the score is highest, everything else blurred.

    Mask and blur are in proportion to the picture as the authors have them at 224 pixels (cells of 7, bumps of 21, blur
    of up to 20), and the score is scaled to their range, so that its units do not matter. Their 800 steps are walked in
    `steps` longer ones; more find masks with a higher score. The area is that of the picture, theirs counts a margin
    around it, too. `masked_score` in the verdict is the score of what shows, `area` the area it came to.

    area:   share of the picture that shows; of several, `[0.05, 0.1, 0.2]`, the map is the mean mask
    steps:  of the search
    fill:   what is hidden shows: "blur", the more the less the mask is there, or a fixed "zero", number, ...
    mirror: show the picture mirrored at every other step, as the authors' code does
    """
    import torch

    areas = [float(a) for a in (area if isinstance(area, Sequence) else [area])]
    if not areas or not all(0 < a < 1 for a in areas):
        raise errors.InputError(f"area={area}: a share of the picture between 0 and 1, or several")
    at_least(1, steps=steps)
    x = picture(look)
    size = x.shape[-2:]
    scale = min(size) / 224
    cell = max(1, round(7 * scale))
    near = _nearness(size, cell, max(21 * scale, 1.0)).to(x)
    blur = [20 * scale * (1 - i / (_LEVELS - 1)) for i in range(_LEVELS - 1)]
    levels = torch.cat([*([blurred(x, s) for s in blur] if str(fill) == "blur" else [baseline(x, fill)]), x])
    order = torch.linspace(0, 1, near[0].numel()).to(x)
    wanted = torch.stack([(order > 1 - a).to(x) for a in areas])  # how the mask's values lie when sorted

    def points(mask: torch.Tensor) -> torch.Tensor:
        at = mask[:, None] * (len(levels) - 1) - torch.arange(len(levels)).to(x)[:, None, None]
        return torch.einsum("alhw,lchw->achw", (1 - at.abs()).clamp(min=0), levels)

    bumps = torch.ones(len(areas), *(math.ceil(side / cell) for side in size)).to(x)
    speed = torch.zeros_like(bumps)
    ends = torch.tensor([0.0, 1.0]).to(x)[:, None, None].expand(2, *size)
    hidden, whole = scores_of(look, 2, lambda part: points(ends[part.start : part.stop])).tolist()
    reward = _REWARD / abs(whole - hidden) if whole != hidden else 1.0
    weight, pace = _WEIGHT, _STEPS / steps
    for step in range(steps):
        bumps.requires_grad_()
        with torch.enable_grad():
            mask = _smooth_max(bumps, near, cell)
            shown = points(mask)
        slope = _slope(look, shown.detach(), turned=mirror and step % 2 == 0)
        with torch.enable_grad():
            off = ((mask.flatten(1).sort(1)[0] - wanted) ** 2).mean(1).sum()
            (uphill,) = torch.autograd.grad(reward * (slope * shown).sum() - weight * off, bumps)
        speed = _MOMENTUM * speed + (1 - _MOMENTUM) * uphill if step else uphill
        bumps = (bumps.detach() + _RATE * pace * speed).clamp(0, 1)
        weight *= _GROWTH**pace
    mask = _smooth_max(bumps, near, cell)
    kept = scores_of(look, len(areas), lambda part: points(mask[part.start : part.stop]))
    look.say(area=mask.mean(), masked_score=kept.mean())
    return mask.mean(0, keepdim=True)


def _slope(look: Look, points: torch.Tensor, turned: bool) -> torch.Tensor:
    """The gradient of the score at each of these points."""
    import torch

    points = points.flip(-1) if turned else points
    found = look.visit(len(points), lambda part: points[part.start : part.stop], "input.gradient")
    slope = torch.cat([seen.gradient("input") for _, seen in found]).to(points)
    return slope.flip(-1) if turned else slope


def _nearness(size: Sequence[int], cell: int, sigma: float) -> torch.Tensor:
    """((2r + 1)², H, W): how near each pixel is to the middle of each cell around its own, 1 within half of sigma."""
    import torch

    reach = 1 + math.ceil(sigma / cell)
    away = []  # per side (2r + 1, pixels)
    for side in size:
        at = torch.arange(side)
        middles = (at // cell + torch.arange(-reach, reach + 1)[:, None] + 0.5) * cell - 0.5
        away.append(at - middles)
    distance = (away[0][:, None, :, None] ** 2 + away[1][None, :, None, :] ** 2).sqrt()
    return torch.exp(-2 * (distance / sigma - 0.5).clamp(min=0) ** 2).flatten(0, 1)


def _smooth_max(bumps: torch.Tensor, near: torch.Tensor, cell: int) -> torch.Tensor:
    """Masks (a, H, W) from bumps (a, h, w): at each pixel the smooth maximum of the bumps around it."""
    import torch

    height, width = near.shape[1:]
    reach = (math.isqrt(len(near)) - 1) // 2
    around = torch.nn.functional.unfold(bumps[:, None], 2 * reach + 1, padding=reach)
    around = around.reshape(len(bumps), len(near), *bumps.shape[1:])
    around = around.repeat_interleave(cell, 2).repeat_interleave(cell, 3)[:, :, :height, :width] * near
    return (around * (_COLDNESS * around).softmax(1)).sum(1).clamp(0, 1)
