"""Baselines: what a picture is compared with, the state in which it says nothing.

No baseline is neutral: a method that compares with one is blind to what the picture and the baseline have in common.

- "zero"     zero as the network sees it: for a picture normalized by mean and standard deviation the mean color, for
             values 0..1 black
- "mean"     the picture's own mean color, everywhere
- "blur"     the picture blurred, by a Gaussian with a standard deviation of a tenth of its longer side, mirrored at the
             edges
- a number, or one for each color channel, as the network sees them: black of a network that wants the mean and standard
             deviation of ImageNet is [-2.118, -2.036, -1.804]
- an array   `(C, H, W)` or `(1, C, H, W)`: a picture of your own, as the network sees it

Sturmfels, Lundberg, Lee: Visualizing the Impact of Feature Attribution Baselines, Distill 2020.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from innersight import errors
from innersight.methods import Look

if TYPE_CHECKING:  # a list of the methods needs no torch
    import torch

KINDS = ("zero", "mean", "blur")


def baseline(of: Look | torch.Tensor, kind: Any = "zero") -> torch.Tensor:
    """The baseline of each picture, in its shape.

    of:   the look at the pictures (whose "input.value" is read), or the pictures `(n, C, H, W)`
    kind: see above; text that holds a number or a list of them is read as that
    """
    x = of.value("input") if isinstance(of, Look) else of
    if isinstance(kind, str):
        kind = _spoken(kind)
    if not isinstance(kind, str):
        return _given(x, kind)
    if kind == "mean":
        return x.flatten(2).mean(2).reshape(*x.shape[:2], *[1] * (x.dim() - 2)).expand_as(x)
    return blurred(x, max(sides(x)) / 10) if kind == "blur" else x.new_zeros(()).expand_as(x)


def _spoken(kind: str) -> Any:
    """One of KINDS, or the numbers that a command line gave as text."""
    if kind in KINDS:
        return kind
    try:
        return json.loads(kind)
    except ValueError:
        pass
    if kind in ("black", "white", "gray", "grey"):
        raise errors.InputError(
            f"baseline {kind!r}: how pictures are normalized is not known here; give the color as the network sees it, "
            "one number for each channel (black after ImageNet's mean and std is [-2.118, -2.036, -1.804])"
        )
    raise errors.unknown("baseline", kind, KINDS, " (or give numbers or an array)")


def _given(x: torch.Tensor, kind: Any) -> torch.Tensor:
    import torch

    try:
        value = torch.as_tensor(kind, dtype=x.dtype, device=x.device).detach()
    except (TypeError, ValueError, RuntimeError):
        raise errors.InputError(f"{kind!r} is no baseline: give {', '.join(KINDS)}, a number or an array") from None
    shape = tuple(x.shape[1:])
    if value.numel() == 1:
        value = value.reshape(())
    elif tuple(value.shape) == shape[:1]:
        value = value.reshape(-1, *[1] * (len(shape) - 1))
    elif tuple(value.shape) not in (shape, (1, *shape)):
        raise errors.InputError(
            f"a baseline of shape {tuple(value.shape)} does not fit pictures {shape}: give one number, {shape[0]} "
            "numbers (one for each channel), or one picture for all"
        )
    if not bool(torch.isfinite(value).all()):
        raise errors.InputError("the baseline holds NaN or infinite numbers")
    return value.expand_as(x)


def blurred(x: torch.Tensor, sigma: float, edge: str = "mirror") -> torch.Tensor:
    """The pictures `(n, C, H, W)` under a Gaussian blur of that standard deviation in pixels."""
    down, across = (gaussian(side, sigma, edge)[0].to(x) for side in sides(x))
    return down @ x @ across.mT


def gaussian(side: int, sigma: float, edge: str = "mirror") -> tuple[torch.Tensor, torch.Tensor]:
    """A Gaussian blur of `side` pixels as a matrix (side, side), and its derivative by the standard deviation.

    edge: "mirror" repeats the picture backwards beyond its edges; "zero" has nothing there
    """
    import torch

    sigma = float(sigma)
    if sigma < 1e-2:  # the nearest neighbor has exp(-5000)
        return torch.eye(side, dtype=torch.float64), torch.zeros(side, side, dtype=torch.float64)
    reach = math.ceil(6 * sigma)
    d = torch.arange(-reach, reach + 1, dtype=torch.float64)
    e = torch.exp(-0.5 * (d / sigma) ** 2)
    w = e / e.sum()
    dw = w * (d**2 - (w * d**2).sum()) / sigma**3
    ring = 2 * side if edge == "mirror" else side + reach  # a picture and its mirror image recur; nothing does not

    def matrix(kernel: torch.Tensor) -> torch.Tensor:
        wound = torch.zeros(ring, dtype=torch.float64).index_add(0, d.long() % ring, kernel)
        near = wound[torch.arange(1 - side, side) % ring].unfold(0, side, 1).flip(0)  # from j to i
        mirrored = wound[torch.arange(1, 2 * side) % ring].unfold(0, side, 1)  # from the image of j to i
        return near + mirrored if edge == "mirror" else near

    return matrix(w), matrix(dw)


def sides(x: torch.Tensor) -> tuple[int, int]:
    """The height and width of what is a picture."""
    if x.dim() != 4:
        raise errors.Unsupported(f"only pictures (N, C, H, W) can be blurred; this input is {tuple(x.shape)}")
    return x.shape[2], x.shape[3]
