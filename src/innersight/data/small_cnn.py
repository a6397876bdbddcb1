"""The small network of the PyTorch tutorial, its training and its weights on disk."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from innersight import errors

BATCH = 64
LEARNING_RATE = 3e-3  # of AdamW, at the top of the cycle
ROTATE, ZOOM, SHIFT = 10.0, 0.1, 2.0  # augmentation: degrees, share of the size, pixels; each up to this, both ways


class SimpleCNN(nn.Module):
    """Two convolutions and three linear layers: `(N, 1, 28, 28)` -> logits `(N, 10)`.

    Written as tutorials are: `F.relu` is a function and the one `pool` is called twice, which is what tools that hook
    modules stumble over.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(16, 32, 5)
        self.fc1 = nn.Linear(32 * 4 * 4, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


@dataclass(frozen=True)
class Step:
    """How far a training is, after a batch.

    step, steps:   batches done, of all there will be in all epochs
    epoch, epochs: the epoch the batch belongs to, from 1
    loss:          mean over the epoch so far
    accuracy:      on the held-out images, after the last batch of an epoch; else None
    """

    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float
    accuracy: float | None


@dataclass(frozen=True)
class Epoch:
    """What an epoch came to: mean training loss, and accuracy on the held-out images."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class TrainResult:
    """history: an `Epoch` each; accuracy: the last one's, on the held-out images; seconds: how long it took."""

    history: tuple[Epoch, ...]
    accuracy: float
    seconds: float


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread meanwhile.

    The batches are too small to gain from a second, and where other programs hold the cores, threads that wait for each
    other cost far more: 250 s instead of 7 were seen. It also makes the weights independent of the number of cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def train(
    model: SimpleCNN,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    epochs: int,
    seed: int,
    progress: Callable[[Step], None] | None = None,
) -> TrainResult:
    """Train `model` from scratch on (images, labels), and measure it on those of `test` after each epoch.

    The starting weights are drawn from `seed` too, so that the result depends on nothing else; the global random state
    is neither read nor changed. `progress` is called after every batch. At its end `model` has no gradients.
    """
    if epochs < 1:
        raise errors.InputError(f"training takes at least one epoch, not {epochs}")
    images, labels = train
    device = model.conv1.weight.device
    random = torch.Generator().manual_seed(seed)
    draw_weights(model, random)
    per_epoch = math.ceil(len(images) / BATCH)
    steps = epochs * per_epoch
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)

    start = time.perf_counter()
    step, history = 0, []
    for epoch in range(1, epochs + 1):
        total, seen = 0.0, 0
        for chosen in torch.randperm(len(images), generator=random).split(BATCH):
            x, y = jitter(images[chosen], random).to(device), labels[chosen].to(device)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step, total, seen = step + 1, total + loss.item() * len(chosen), seen + len(chosen)
            last = step == epoch * per_epoch
            if last:
                history.append(Epoch(total / seen, accuracy(model, test)))
            if progress is not None:
                progress(Step(step, steps, epoch, epochs, total / seen, history[-1].accuracy if last else None))
    optimizer.zero_grad()
    return TrainResult(tuple(history), history[-1].accuracy, time.perf_counter() - start)


@torch.no_grad()
def draw_weights(model: nn.Module, random: torch.Generator) -> None:
    """Give every convolution and linear layer new weights, distributed as PyTorch's own, but drawn from `random`."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            bound = 1 / math.sqrt(layer.weight[0].numel())
            for parameter in layer.parameters():
                parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=random))


def jitter(images: Tensor, random: torch.Generator) -> Tensor:
    """The images `(N, C, H, W)`, each a little turned, scaled and shifted at random; empty (0) where it was outside."""
    turn, zoom, right, down = torch.rand(4, len(images), generator=random) * 2 - 1
    angle = turn * math.radians(ROTATE)
    cos, sin = angle.cos() / (1 + zoom * ZOOM), angle.sin() / (1 + zoom * ZOOM)
    height, width = images.shape[2:]
    # affine_grid counts positions from -1 to 1, so that a pixel is 2 / size wide.
    x_row = torch.stack([cos, -sin, right * SHIFT * 2 / width], dim=1)
    y_row = torch.stack([sin, cos, down * SHIFT * 2 / height], dim=1)
    grid = F.affine_grid(torch.stack([x_row, y_row], dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


@torch.no_grad()
def accuracy(model: nn.Module, test: tuple[Tensor, Tensor]) -> float:
    """The share of `test`, (images, labels), whose largest logit is the label's."""
    device = next(model.parameters()).device
    images, labels = test
    right = sum(
        int((model(x.to(device)).argmax(1) == y.to(device)).sum())
        for x, y in zip(images.split(1000), labels.split(1000), strict=True)
    )
    return right / len(labels)


def save_weights(model: SimpleCNN, path: str | Path, *, data: str, accuracy: float, seed: int) -> None:
    """Write the weights as safetensors, and with them the data set they learned, their accuracy and the seed.

    `innersight.open(path, arch="innersight.data.small_cnn:SimpleCNN")` opens the file.
    """
    from safetensors.torch import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    about = {"data": data, "accuracy": repr(accuracy), "seed": str(seed), "arch": f"{__name__}:SimpleCNN"}
    save_file(tensors, path, metadata=about)


def load_weights(model: SimpleCNN, path: str | Path) -> Mapping[str, str]:
    """Read weights into `model`; what comes back is what `save_weights` wrote beside them, as text."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise errors.InputError(f"no weights at {str(path)!r}: there is no such file")
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (the file is no mapping)
    except SafetensorError as error:
        raise errors.InputError(f"{str(path)!r} is not a whole safetensors file ({error})") from None
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    # Compared first, since load_state_dict would leave a model half loaded.
    differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if differing:
        raise errors.InputError(f"{str(path)!r} does not hold weights of SimpleCNN: {', '.join(differing)} differ")
    model.load_state_dict(tensors)
    return about
