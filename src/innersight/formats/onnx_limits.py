"""What a file may make of itself while it is opened: each value's size is known before it is allocated.

A few nodes are enough to ask for petabytes: Expand, Tile, Pad, Resize, Range, or forty times Concat(x, x).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

MAX_VALUE = 1 << 29
"""Bytes that one value may take, for one picture, ..."""
MAX_GROWTH = 1024
"""... unless that is more than so many times the input's bytes, and more than MIN_VALUE."""
MIN_VALUE = 1 << 26
MAX_CONSTANT = 1 << 29
"""Bytes that one constant may take which a file computes instead of holding it."""
MAX_LIVE = 1 << 31
"""Bytes of all values that wait for a reader, for one picture."""
MAX_RUN = MAX_VALUE << 3
"""Bytes that an operator which can make any size may ask for in a later run, of pictures of any size and number."""


_bound = threading.local()


@contextmanager
def strict(most: int) -> Iterator[None]:
    """Within this, operators that can make any size may ask for so many bytes."""
    before = bound()
    _bound.most = most
    try:
        yield
    finally:
        _bound.most = before


def bound() -> int:
    return getattr(_bound, "most", MAX_RUN)


class Limited(TorchDispatchMode):
    """Every operation is run on shapes alone first; one that would make too much raises ValueError."""

    def __init__(self, most: int | None = None):
        super().__init__()
        self.most = MAX_VALUE if most is None else most

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        for tensor in self.foreseen(func, args, kwargs):
            check(tensor.numel() * tensor.element_size(), self.most)
        return func(*args, **kwargs)

    def foreseen(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Iterable[torch.Tensor]:
        planned = {**kwargs, "device": torch.device("meta")} if "device" in kwargs else kwargs
        try:
            given, named = tree_map_only(torch.Tensor, _shape_of, (args, planned))
            made = func(*given, **named)
        except (NotImplementedError, RuntimeError, TypeError, ValueError):
            return ()  # its size depends on values, or it will fail for itself
        found = made if isinstance(made, (tuple, list)) else (made,)
        return [t for t in found if isinstance(t, torch.Tensor)]


def _shape_of(t: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def check(size: int, most: int) -> None:
    if size > most:
        raise ValueError(
            f"it makes a value of {size / 2**20:,.0f} MiB, more than the {most / 2**20:,.0f} MiB allowed here"
        )


def most(x: torch.Tensor) -> int:
    """Bytes that one value may take in a run of these pictures."""
    size = x[:1].numel() * x.element_size()
    return len(x) * min(MAX_VALUE, MIN_VALUE + MAX_GROWTH * size)


def live(values: Iterable[Any]) -> int:
    """Bytes of the tensors among the values, memory that several share counted once."""
    memory = {}
    for v in values:
        if isinstance(v, torch.Tensor):
            memory[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
    return sum(memory.values())
