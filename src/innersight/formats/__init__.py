"""What a model can be opened from: one file a format, each with one function source -> `Opened`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from innersight.preprocess import Preprocess


@dataclass
class Opened:
    """A model as it came out of its source, and what the source says of it.

    module:      the network; called with one float tensor `(N, *input_shape)`, or as `call` says
    name:        what it is called in titles and provenance: "torchvision:resnet18", "SimpleCNN"
    input_shape: one input without the batch, `(C, H, W)`; None where the source does not say
    preprocess:  what the model wants done to a picture; None where the source does not say
    labels:      class names by output index
    notes:       what was chosen or found on opening, a sentence each, with the keyword that changes it
    call:        how a batch is handed to the module and what it answers, where that is not module(batch):
                 `call(module, batch) -> output`
    fixed_batch: the only batch size the module takes, if there is one
    """

    module: torch.nn.Module
    name: str
    input_shape: tuple[int, ...] | None = None
    preprocess: Preprocess | None = None
    labels: Sequence[str] | None = None
    notes: list[str] = field(default_factory=list)
    call: Callable[[torch.nn.Module, torch.Tensor], Any] | None = None
    fixed_batch: int | None = None
