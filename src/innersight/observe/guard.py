"""Leave a model, and torch's random state, as they were found: on success, on error and on interrupt."""

from __future__ import annotations

import random
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# Two threads on one model in train mode would race on its flags: one request at a time per model.
_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_locks_lock = threading.Lock()


def _lock(module: nn.Module) -> threading.RLock:
    with _locks_lock:
        return _locks.setdefault(module, threading.RLock())


@contextmanager
def as_found(module: nn.Module) -> Iterator[None]:
    """Run the body on `module` in eval mode, with own random state, and put back everything the body changed.

    Covers each module's own `training` flag, buffers (written to, replaced, added or removed), the random state of
    Python, NumPy and torch, and grad and inference mode. Parameters, `.grad`, `requires_grad` and hooks are not
    touched in the first place. May be entered again inside itself.
    """
    with _lock(module):
        training = [m for m in module.modules() if getattr(m, "training", False)]  # frozen TorchScript has no flag
        buffers = [(m, _buffers_of(m)) for m in module.modules() if _has_buffers(m)]
        random_state = _random_state(module)
        try:
            for m in training:
                m.training = False  # train() would change children too, and some models override it
            with torch.inference_mode(False):
                yield
        finally:
            for m in training:
                m.training = True
            for m, before in buffers:
                _put_back_buffers(m, before)
            _restore_random_state(random_state)


def _has_buffers(module: nn.Module) -> bool:
    return not isinstance(module, torch.jit.ScriptModule) and bool(module._buffers)


def _buffers_of(module: nn.Module) -> dict[str, tuple[torch.Tensor | None, torch.Tensor | None]]:
    return {name: (b, None if b is None else b.detach().clone()) for name, b in module._buffers.items()}


def _put_back_buffers(module: nn.Module, before: dict) -> None:
    for name in [n for n in module._buffers if n not in before]:
        del module._buffers[name]
    for name, (buffer, copy) in before.items():
        if module._buffers.get(name) is not buffer:
            module._buffers[name] = buffer
        # Values are compared, not versions: batch_norm writes its statistics without counting it as a write.
        if buffer is not None and not torch.equal(buffer, copy):
            with torch.no_grad(), torch.inference_mode(buffer.is_inference()):
                buffer.copy_(copy)


def _random_state(module: nn.Module) -> dict[str, Any]:
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    numpy = sys.modules.get("numpy")
    return {
        "python": random.getstate(),
        "numpy": numpy.random.get_state() if numpy else None,
        "torch": torch.get_rng_state(),
        "cuda": (device, torch.cuda.get_rng_state(device)) if device.type == "cuda" else None,
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    if state["numpy"] is not None:
        sys.modules["numpy"].random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        device, cuda = state["cuda"]
        torch.cuda.set_rng_state(cuda, device)


def seed(module: nn.Module, value: int = 0) -> None:
    """Start the model's own draws, if it makes any, from the same place in every run. Only inside `as_found`."""
    torch.default_generator.manual_seed(value)
    device = next((p.device for p in module.parameters()), None)
    if device is not None and device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(value)
