"""Layers: the places in a run where a value can be read, and the table of them."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from innersight import errors

if TYPE_CHECKING:
    import torch

    from innersight.formats import Quantised
    from innersight.observe.geometry import AxisField, Layout, ReceptiveField
    from innersight.observe.observer import Node, Recording


@dataclass(frozen=True, repr=False)
class Layer:
    """One place in the run of a network.

    name:            as in `net.layers[name]`; follows torchvision's feature-extraction node names
    kind:            the class of the module (`Conv2d`) or the operation (`add`)
    shape:           of one image's output as the network holds it, without the batch
    grid:            `(C, H, W)` as it is shown, or None where the output has no place in the picture
    grid_note:       how it was brought to that grid, where it was not `(C, H, W)` already
    parameters:      how many numbers were learnt for it
    receptive_field: the part of the input that one of its values looks at; None if not known
    quantised:       scale, zero point and range of its integers; None where it has none
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    grid: tuple[int, int, int] | None
    grid_note: str
    parameters: int
    receptive_field: ReceptiveField | None
    node: Node = field(compare=False)
    layout: Layout | None = field(compare=False)
    _effective: Callable[..., Any] = field(compare=False)
    quantised: Quantised | None = None

    def __repr__(self) -> str:
        sees = "" if self.receptive_field is None or self.grid is None else f", sees {self.receptive_field}"
        integers = "" if self.quantised is None else f", {self.quantised}"
        return f"<Layer {self.name}: {self.kind}, {_output(self)}{sees}{integers}>"

    @property
    def spatial(self) -> bool:
        """Whether its values have a place in the picture."""
        return self.grid is not None

    def effective_receptive_field(self, images: Any = None, share: float = 0.9) -> tuple[int, int, int, int]:
        """The box `(top, left, bottom, right)` of the input that holds `share` of what moves the middle unit.

        Deep exact fields cover more than the picture; most of a unit's squared gradient comes from a smaller, roughly
        Gaussian part (Luo et al., Understanding the Effective Receptive Field, NeurIPS 2016). Averaged over `images`,
        by default noise.
        """
        return self._effective(self, images, share)

    @property
    def channel_axis(self) -> int:
        """Which dimension of its own value holds the channels; the last, if none is known to."""
        channel = None if self.layout is None else self.layout.channel
        return len(self.node.shape) - 1 if channel is None else channel

    def to_grid(self, value: torch.Tensor) -> torch.Tensor:
        """Its value as `(N, C, H, W)`, where it has a grid."""
        return value if self.layout is None or self.grid is None else self.layout.to_grid(value)

    def over_input(self, maps: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """Maps `(n, h, w)` on its grid as maps `(n, H, W)` over the input, each value at the middle of what it sees.

        The usual way, to stretch the grid from border to border, is right only where the units tile the picture.
        Without padding they keep away from the border (the 8x8 of the tutorial's second convolution by 7 of 28 pixels);
        with strided 3x3 convolutions they stand half a stride further up and left. Where the middle of the field is not
        known (it covers the whole picture by a gate or by attention), the grid is stretched.
        """
        field = self.receptive_field
        return over_input(maps, size, (None, None) if field is None else (field.y, field.x))

    def to_json(self) -> dict[str, Any]:
        f = self.receptive_field
        return {
            "name": self.name,
            "kind": self.kind,
            "shape": list(self.shape),
            "grid": None if self.grid is None else list(self.grid),
            "grid_note": self.grid_note or None,
            "parameters": self.parameters,
            "receptive_field": None if f is None else f.to_json(),
            "quantised": None if self.quantised is None else asdict(self.quantised),
        }


def over_input(
    maps: torch.Tensor, size: Sequence[int], axes: Sequence[AxisField | None] = (None, None)
) -> torch.Tensor:
    """Maps `(n, h, w)` over the input `(n, H, W)`: at the middles of these fields, or stretched."""
    rows, columns = (
        _weights(cells, pixels, axis).to(maps) for cells, pixels, axis in zip(maps.shape[-2:], size, axes, strict=True)
    )
    return rows @ maps @ columns.T


def _weights(cells: int, pixels: int, axis: AxisField | None) -> torch.Tensor:
    """(pixels, cells): bilinear between the middles of the cells; beyond the outermost cell it fades within a cell."""
    import torch

    jump, first = pixels / cells, pixels / cells / 2
    if axis is not None and axis.regular is not None and axis.regular.jump:
        jump = float(axis.regular.jump)
        first = float(axis.regular.start + axis.regular.size / 2)
    at = (torch.arange(pixels, dtype=torch.float64) + 0.5 - first) / jump
    beyond = torch.maximum(-0.5 - at, at - (cells - 0.5)).clamp(0, 1)
    near = (1 - (at.clamp(0, cells - 1)[:, None] - torch.arange(cells)).abs()).clamp(min=0)
    return near * (1 - beyond)[:, None]


class Layers(Mapping[str, Layer]):
    """The layers of a network in the order they run; prints as a table.

    Listed are operations that make new values. `layers[name]` also finds what is not listed: the value a module
    returned (`layer1`), views and copies (`flatten`).
    """

    def __init__(self, recording: Recording, make: Callable[[Node], Layer], parameters: int = 0):
        self.parameters = parameters  # of the whole network
        self._recording = recording
        self._make = make
        # Box arithmetic of a detector is no layer to look at: its rows are candidates, not images.
        self._listed = {n.name: n for n in recording.layers if n.shape and n.shape[0] % max(recording.batch, 1) == 0}
        self._made: dict[int, Layer] = {}

    def __getitem__(self, name: str) -> Layer:
        """The layer of that name; raises UnknownName with the nearest names."""
        if not isinstance(name, str):
            raise errors.InputError(
                f"a layer is asked for by its name, such as {next(iter(self), 'conv1')!r}, not by {name!r}"
            )
        node = self._recording.find(name)
        if node.index not in self._made:
            self._made[node.index] = self._make(node)
        return self._made[node.index]

    def get(self, name: str, default: Any = None) -> Any:
        """The layer of that name, or the default."""
        return self[name] if name in self else default  # noqa: SIM401  (UnknownName is no KeyError)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._recording.by_name or name in self._recording.aliases)

    def __iter__(self) -> Iterator[str]:
        return iter(self._listed)

    def __len__(self) -> int:
        return len(self._listed)

    def everything(self) -> list[Layer]:
        """Also what is not listed: views, copies, what is no image's."""
        return [self[node.name] for node in self._recording.nodes if node.kind != "input"]

    @property
    def spatial(self) -> list[str]:
        """Names of those whose values have a place in the picture."""
        return [name for name in self if self[name].spatial]

    def rows(self) -> list[tuple[str, ...]]:
        """The table: name, kind, output shape, receptive field, parameters."""
        return [row(layer) for layer in self.values()]

    def to_json(self) -> list[dict[str, Any]]:
        return [layer.to_json() for layer in self.values()]

    def __repr__(self) -> str:
        return f"<{len(self)} layers, {len(self.spatial)} of them with maps, {self.parameters:,} parameters>"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def __str__(self) -> str:
        rows = [HEADER, *self.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
        lines = [
            "  ".join(
                cell.rjust(w) if i == 6 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        lines.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join(line.rstrip() for line in lines)


HEADER = ("layer", "kind", "output", "receptive field", "stride", "centre", "parameters")


def row(layer: Layer) -> tuple[str, ...]:
    """What the table says of a layer, a cell for each of HEADER."""
    f = layer.receptive_field
    seen = (
        ("", "", "")
        if f is None or layer.grid is None
        else (str(f).partition(",")[0], _pair(f.stride), _pair(f.centre))
    )
    if f is not None and f.whole:
        seen = ("whole picture", "", "")
    kind = layer.kind if layer.quantised is None else f"{layer.kind} {layer.quantised.dtype}"
    return layer.name, kind, _output(layer), *seen, f"{layer.parameters:,}" if layer.parameters else ""


def _output(layer: Layer) -> str:
    shape = "x".join(map(str, layer.shape))
    if layer.grid is not None and layer.grid != layer.shape:
        shape += f" as {'x'.join(map(str, layer.grid))}"
    return shape


def _pair(values: tuple) -> str:
    a, b = (f"{float(v):g}" for v in values)
    return a if a == b else f"{a}, {b}"
