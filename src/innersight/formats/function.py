"""Any function of images as a network: one operation, nothing inside, no gradient."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from innersight.errors import InputError, Unsupported
from innersight.formats import Opened


class Function(nn.Module):
    """A function of a NumPy batch, float32 `(N, C, H, W)` to `(N, K)`, as a module.

    What it answers becomes a new tensor that does not know where it came from: no gradient gets past it.
    """

    def __init__(self, function: Callable[[np.ndarray], Any]):
        super().__init__()
        self.function = function

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        images = batch.detach().cpu().numpy().copy()  # the function may write into what it is given
        with torch.no_grad(), torch._C.DisableTorchFunction():  # one operation, even if it uses torch inside
            answer = self.function(images)
        return _scores(answer, len(images), self.extra_repr()).to(batch.device)

    def extra_repr(self) -> str:
        return getattr(self.function, "__qualname__", type(self.function).__name__)


def _scores(answer: Any, n: int, name: str) -> torch.Tensor:
    try:
        array = answer.detach().cpu().numpy() if isinstance(answer, torch.Tensor) else np.asarray(answer)
        scores = torch.from_numpy(np.array(array, dtype=np.float32))
    except (TypeError, ValueError) as error:
        raise Unsupported(f"{name} returned {type(answer).__name__}, which is no array of numbers (N, K)") from error
    if scores.dim() == 1 and len(scores) == n:
        scores = scores[:, None]  # one score for each image
    if scores.dim() < 2 or len(scores) != n:
        raise Unsupported(
            f"{name} returned {tuple(scores.shape)} for {n} images; expected (N, K), a row of scores for each"
        )
    return scores


def open_function(function: Callable[[np.ndarray], Any]) -> Opened:
    """A black box: for what needs neither layers nor gradients (occlusion, RISE, LIME, ...)."""
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        raise InputError(f"{_name(function)} must take one argument, a float32 array (N, C, H, W)") from None
    except ValueError:  # built-in code without a signature
        pass
    notes = ["a plain function: no layers inside it and no gradient; it is given float32 arrays (N, C, H, W)"]
    return Opened(Function(function), _name(function), notes=notes)


def _name(function: Callable) -> str:
    return getattr(function, "__name__", type(function).__name__)
