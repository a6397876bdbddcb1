"""What a model can be opened from: one file a format, each with one function source -> `Opened`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from innersight.preprocess import Preprocess


@dataclass(frozen=True)
class Quantised:
    """How a quantised layer's numbers are kept: a real value is `scale * (q - zero_point)`, q an integer in lo..hi.

    scale:      one number (a step between two values), for weights one a channel
    zero_point: the integer that stands for 0
    dtype:      "int8", "uint8", "int16"
    lo, hi:     the smallest and greatest integer that the layer can answer, its fused activation included: a value
                there is saturated (at the zero point of a fused ReLU: cut off)
    """

    scale: tuple[float, ...]
    zero_point: int
    dtype: str
    lo: int
    hi: int

    @property
    def range(self) -> tuple[float, float]:
        """The real values of `lo` and `hi`."""
        return self.scale[0] * (self.lo - self.zero_point), self.scale[0] * (self.hi - self.zero_point)

    def integers(self, values: Any) -> Any:
        """The stored integers of real values: an array or a tensor of any shape, still of floating type."""
        return (values / self.scale[0]).round() + self.zero_point

    def __str__(self) -> str:
        return f"{self.dtype}, scale {self.scale[0]:.3g}, zero point {self.zero_point}"


class Assumed(str):
    """A note on how pictures are prepared where the source does not say.

    Beside another network that does say, and takes the same input, that one's word is taken for both.
    """


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
    quantisation: layer name -> how its values are quantised; None where the source is not quantised
    """

    module: torch.nn.Module
    name: str
    input_shape: tuple[int, ...] | None = None
    preprocess: Preprocess | None = None
    labels: Sequence[str] | None = None
    notes: list[str] = field(default_factory=list)
    call: Callable[[torch.nn.Module, torch.Tensor], Any] | None = None
    fixed_batch: int | None = None
    quantisation: Mapping[str, Quantised] | None = None
