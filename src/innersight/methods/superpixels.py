"""Methods that hide whole segments of the picture: superpixels, the cells of a grid, or regions of your own.

All need the score alone, so they explain any function. They share three options:

segments: "slic" (superpixels of scikit-image), "grid" (cells), or an array `(H, W)` with a number for each region
count:    about how many segments
fill:     what a hidden segment shows: "segment" (its own mean color), or a kind of `baselines.baseline`
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from innersight import errors
from innersight.methods import Look, method
from innersight.methods.baselines import baseline
from innersight.methods.perturbation import at_least, picture, scores_of

if TYPE_CHECKING:  # a list of the methods needs no torch
    import torch

# ---------------------------------------------------------------------------------------------------------------------
# Segments


class _Segments:
    """One picture in segments: which of them show is a row of bools `(M,)`; `points(rows)` are the pictures they leave.

    labels: (H, W), 0 to M - 1
    """

    def __init__(self, look: Look, segments: Any, count: int, fill: Any):
        import torch

        self.x = picture(look)
        at_least(2, count=count)
        labels = _labels(look, self.x[0], segments, count)
        self.labels = torch.unique(labels, return_inverse=True)[1].to(self.x.device)
        self.count = int(self.labels.max()) + 1
        if self.count < 2:
            raise errors.InputError("the segments are one single region; two or more can be told apart")
        self.fill = self._own_mean() if isinstance(fill, str) and fill == "segment" else baseline(self.x, fill)

    def _own_mean(self) -> torch.Tensor:
        flat, where = self.x[0].flatten(1), self.labels.flatten()  # (C, H W)
        sums = flat.new_zeros(len(flat), self.count).index_add(1, where, flat)
        return (sums / where.bincount(minlength=self.count))[:, where].reshape(self.x.shape)

    def points(self, rows: torch.Tensor) -> torch.Tensor:
        shows = rows.to(self.x.device)[:, self.labels]  # (k, H, W)
        return self.x.where(shows[:, None], self.fill)

    def scores(self, look: Look, rows: torch.Tensor) -> torch.Tensor:
        return scores_of(look, len(rows), lambda part: self.points(rows[part.start : part.stop]))

    def painted(self, values: torch.Tensor) -> torch.Tensor:
        """(1, H, W): each pixel the value of its segment."""
        return values.to(self.labels.device)[self.labels][None]


def _labels(look: Look, x: torch.Tensor, segments: Any, count: int) -> torch.Tensor:
    """(H, W) whole numbers, one for each segment, from one picture (C, H, W)."""
    import torch

    size = tuple(x.shape[1:])
    if isinstance(segments, str):
        if segments == "slic":
            labels = _slic(x, count)
            if bool((labels != labels[0, 0]).any()):
                return labels
            look.note("SLIC finds no superpixels in this picture (it is noise), so it was cut into cells")
        elif segments != "grid":
            raise errors.unknown("segments", segments, ("slic", "grid"), " (or give an array of labels (H, W))")
        rows = min(size[0], max(1, round(math.sqrt(count * size[0] / size[1]))))
        columns = min(size[1], max(1, round(count / rows)))
        down, right = (torch.arange(side) * n // side for side, n in zip(size, (rows, columns), strict=True))
        return down[:, None] * columns + right
    labels = torch.as_tensor(segments).cpu()
    if tuple(labels.shape) != size or labels.is_floating_point():
        raise errors.InputError(
            f"segments are whole numbers, one for each pixel of the input {size}; given were {tuple(labels.shape)} "
            f"{str(labels.dtype).removeprefix('torch.')}"
        )
    return labels


def _slic(x: torch.Tensor, count: int) -> torch.Tensor:
    """Superpixels (Achanta et al. 2012), each channel of the input spread over 0..1; color is compared in Lab."""
    import torch

    segmentation = errors.need("skimage.segmentation", "segments", "the segmentation into superpixels")
    x = x.cpu().double()
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    spread = (x - low) / (high - low).clamp(min=1e-12)
    if len(x) == 1:
        spread = spread.expand(3, -1, -1)  # a gray picture is compared in Lab, too
    labels = segmentation.slic(
        spread.permute(1, 2, 0).numpy(), n_segments=count, compactness=10 if len(spread) == 3 else 0.1, sigma=1,
        start_label=0, channel_axis=-1,
    )  # fmt: skip
    return torch.from_numpy(labels)


# ---------------------------------------------------------------------------------------------------------------------
# LIME


@method(
    family="perturbation",
    reads=("input.value",),
    visits=("score",),
    passes="1,000 forwards",
    unit="score gained when the segment shows",
    paper='Ribeiro, Singh, Guestrin: "Why Should I Trust You?", KDD 2016 (arXiv:1602.04938)',
)
def lime(
    look: Look,
    segments: Any = "slic",
    count: int = 50,
    samples: int = 1000,
    distance: str = "cosine",
    kernel_width: float | None = None,
    alpha: float = 1.0,
    fill: Any = "segment",
    seed: int = 0,
) -> torch.Tensor:
    """How much each segment adds to the score in a linear model of it around the picture.

    Ridge regression on random halves of the segments, weighted by how near they are to the whole picture, as the
    authors' `lime_image` has it; that one cuts by quickshift and explains probabilities. `r2` in the verdict says how
    much of the score's (weighted) variance the linear model has.

    segments, count: "slic", "grid" or an array (H, W) of labels; about how many
    samples:      random choices of segments that show, the whole picture first
    distance:     to the whole picture: "cosine", or "l2", the root of how many are hidden
    kernel_width: of the weight exp(-d² / (2 width²)); default 0.25, for "l2" 0.75 times the root of their number
    alpha:        of the ridge
    fill:         what is hidden shows: "segment" (its mean color), "zero", "blur", a number, ...
    """
    import torch

    at_least(2, samples=samples)
    at_least(0, alpha=alpha)
    cut = _Segments(look, segments, count, fill)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(samples, cut.count, generator=generator) < 0.5
    rows[0] = True
    shown = rows.double().mean(1)
    if distance == "cosine":
        away, width = 1 - shown.sqrt(), 0.25
    elif distance == "l2":
        away, width = (cut.count * (1 - shown)).sqrt(), 0.75 * math.sqrt(cut.count)
    else:
        raise errors.unknown("distance", distance, ("cosine", "l2"))
    width = width if kernel_width is None else kernel_width
    if width <= 0:
        raise errors.InputError(f"kernel_width={kernel_width}: it must be above 0")
    weights = (-(away**2) / (2 * width**2)).exp()
    effects, r2 = _ridge(rows.double(), cut.scores(look, rows), weights, alpha)
    look.say(r2=r2, segments=cut.count)
    return cut.painted(effects)


def _ridge(z: torch.Tensor, y: torch.Tensor, weights: torch.Tensor, alpha: float) -> tuple[torch.Tensor, float]:
    """The coefficients (M,) of weighted ridge regression with a free intercept, and its weighted R²."""
    import torch

    share = weights / weights.sum()
    z, y = z - share @ z, y - share @ y
    normal = (z.T * weights) @ z + alpha * torch.eye(z.shape[1], dtype=z.dtype)
    effects = torch.linalg.lstsq(normal, (z.T @ (weights * y))[:, None], driver="gelsd").solution[:, 0]
    total = share @ y**2
    return effects, float(1 - share @ (y - z @ effects) ** 2 / total) if total > 0 else 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Shapley values


@method(
    family="perturbation",
    reads=("input.value",),
    visits=("score",),
    passes="2,048 forwards, fewer for 10 segments or less: 2^segments",
    unit="share of the score",
    paper="Lundberg, Lee: A Unified Approach to Interpreting Model Predictions, NeurIPS 2017 (arXiv:1705.07874)",
)
def kernel_shap(
    look: Look, segments: Any = "slic", count: int = 50, samples: int = 2048, fill: Any = "zero", seed: int = 0
) -> torch.Tensor:
    """Each segment's share of the score: its Shapley value in the game of which segments show.

    The values of all segments sum to the score less that of the picture with everything hidden; each pixel has the
    value of its segment. Exact where all choices of segments are affordable; else least squares under that constraint
    over pairs of opposite choices, drawn by their Shapley weight (Covert, Lee: Improving KernelSHAP, AISTATS 2021),
    where the authors' package runs through the smallest and largest choices first.

    segments, count: "slic", "grid" or an array (H, W) of labels; about how many
    samples: choices of segments that show
    fill:    what is hidden shows: "zero", "blur", a number, "segment" (its own mean color), ...
    """
    import torch

    cut = _Segments(look, segments, count, fill)
    m = cut.count
    exact = 2**m <= samples
    if not exact and samples < 4 * m:
        raise errors.InputError(f"{samples} samples are too few for {m} segments: take {4 * m} or more")
    rows, weights = _all_coalitions(m) if exact else _pairs(m, samples // 2, seed)
    ends = torch.tensor([[False], [True]]).expand(2, m)
    nothing, everything, *_ = scores = cut.scores(look, torch.cat([ends, rows]))
    total = everything - nothing
    z, y = rows.double(), scores[2:] - nothing
    # Values that sum to `total`: equal shares, and what is left over lies at right angles to (1, ..., 1).
    basis = torch.linalg.qr(torch.cat([torch.ones(m, 1), torch.eye(m)[:, 1:]], 1).double())[0][:, 1:]
    x, rest = z @ basis, y - z.mean(1) * total
    inverse = torch.linalg.pinv((x.T * weights) @ x, hermitian=True)
    solved = inverse @ (x.T @ (weights * rest))
    values = total / m + basis @ solved
    error = 0.0
    if not exact:
        pairs = len(rows) // 2
        pull = (x * (rest - x @ solved)[:, None]).unflatten(0, (2, pairs)).sum(0)  # of each pair on the solution
        spread = basis @ (inverse @ (pull.T @ pull) @ inverse) @ basis.T * pairs / max(pairs - m + 1, 1)
        error = float(spread.diagonal().mean().sqrt() / values.std(unbiased=False).clamp(min=1e-30))
    look.say(
        completeness_error=(values.sum() - total).abs() / total.abs().clamp(min=1e-12),
        standard_error=error, baseline_score=nothing, segments=m,
    )  # fmt: skip
    return cut.painted(values)


def _all_coalitions(m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every choice of segments but none and all, with its Shapley kernel weight."""
    import torch

    numbers = torch.arange(1, 2**m - 1)
    rows = (numbers[:, None] >> torch.arange(m)) & 1
    weight = torch.tensor([0.0, *((m - 1) / (math.comb(m, k) * k * (m - k)) for k in range(1, m))], dtype=torch.float64)
    return rows.bool(), weight[rows.sum(1)]


def _pairs(m: int, pairs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(2 pairs, M) choices, sizes drawn by their Shapley weight, in the second half each one's opposite."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    sizes = torch.arange(1, m).double()
    drawn = 1 + torch.multinomial(1 / (sizes * (m - sizes)), pairs, replacement=True, generator=generator)
    order = torch.rand(pairs, m, generator=generator).argsort(1).argsort(1)
    rows = order < drawn[:, None]
    return torch.cat([rows, ~rows]), torch.ones(2 * pairs, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# The smallest region


@method(
    family="perturbation",
    reads=("input.value",),
    visits=("score",),
    signed=False,
    passes="for each segment of the region as many forwards as there are segments",
    unit="1 where hiding changes the decision",
    paper="Vermeire et al.: Explainable Image Classification with Evidence Counterfactual, PAA 2022 (arXiv:2004.07511)",
)
def minimal_region(look: Look, segments: Any = "slic", count: int = 50, fill: Any = "blur") -> torch.Tensor:
    """A smallest set of segments whose hiding changes what the network decides: 1 there, 0 elsewhere.

    Segment by segment the one is hidden that lowers the score most, those before it hidden, until the decision changes
    (Martens, Provost, SEDC 2014, without stepping back); then every segment is shown again that can be: none of the
    region can be left out. Smaller regions may exist. For a class that the network does not predict, or a target that
    is no decision, until the score is half-way down to that of the picture with everything hidden. Where nothing does,
    the region is the whole picture, `flipped` in the verdict is 0 and a note says so.

    segments, count: "slic", "grid" or an array (H, W) of labels; about how many
    fill: what is hidden shows: "blur", "zero", a number, "segment" (its own mean color), ...
    """
    import torch

    cut = _Segments(look, segments, count, fill)
    tried = _trial(look, cut)
    region: list[int] = []
    flips = False
    while tried is not None and not flips and len(region) < cut.count:
        rest = [i for i in range(cut.count) if i not in region]
        scores, flipped = tried([[*region, i] for i in rest])
        flips = bool(flipped.any())
        region.append(rest[int(scores.where(flipped | (not flips), torch.inf).argmin())])
    while tried is not None and flips and len(region) > 1:
        scores, flipped = tried([[j for j in region if j != i] for i in region])
        if not flipped.any():
            break
        del region[int(scores.where(flipped, torch.inf).argmin())]
    if not flips:
        look.note("hiding the whole picture does not change the decision, so its region is all of it")
        region = list(range(cut.count))
    values = torch.zeros(cut.count)
    values[region] = 1
    painted = cut.painted(values)
    look.say(flipped=flips, area=painted.mean(), segments=len(region))
    return painted


def _trial(
    look: Look, cut: _Segments
) -> Callable[[list[list[int]]], tuple[torch.Tensor, torch.Tensor]] | None:  # fmt: skip
    """What becomes of the score and the decision when each of these sets of segments is hidden; None where it is known
    that no set changes it.
    """
    import torch

    decides = look.holds is not None and bool(look.holds[0])
    half = math.nan
    if not decides:
        nothing = float(cut.scores(look, torch.zeros(1, cut.count, dtype=torch.bool))[0])
        half = (float(look.scores[0]) + nothing) / 2
        if nothing >= float(look.scores[0]):
            return None
        look.note(
            "the network does not decide for the target, so the region is one that takes its score half-way down to "
            "that of the picture with everything hidden"
        )

    def tried(hidden: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.ones(len(hidden), cut.count, dtype=torch.bool)
        for row, which in zip(rows, hidden, strict=True):
            row[which] = False
        scores, flipped = [], []
        for _, seen in look.visit(len(rows), lambda part: cut.points(rows[part.start : part.stop])):
            holds = seen.holds if decides else seen.scores >= half
            assert holds is not None
            scores.append(seen.scores.cpu())
            flipped.append(~holds.cpu())
        return torch.cat(scores), torch.cat(flipped)

    return tried
