"""MNIST: 70,000 handwritten digits, from local IDX files wherever they lie, or by download.

(Y. LeCun, L. Bottou, Y. Bengio, P. Haffner: Gradient-Based Learning Applied to Document Recognition, 1998.)
"""

from __future__ import annotations

import gzip
import os
import queue
import socket
import threading
import time
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import numpy as np

from innersight.data import Digits, preprocess
from innersight.errors import InputError

TRAIN = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
PATIENCE = 10.0  # seconds until a server that does not answer counts as no network
MOST = 1_000_000  # more images than any set of this form has; a header that promises more is broken


def load(root: str | Path | None = None, download: bool = True) -> Digits:
    """MNIST with its own test set. `root` holds the four IDX files, gzipped or not: in itself, in `raw` or in
    `MNIST/raw`, where torchvision puts them; nothing is written where they are found.

    Where they are not, torchvision downloads them to `root` (None: a cache folder of the user).
    """
    import torch

    folder = Path(root).expanduser() if root is not None else _cache()
    found = _find(folder)
    if found is None:
        if not download:
            raise InputError(f"MNIST is not in {str(folder)!r}; {_HOW}")
        _download(folder)
        found = _find(folder)
        if found is None:  # the download says that it succeeded
            raise InputError(f"MNIST was downloaded to {str(folder)!r} but is not there; {_HOW}")

    def read(names: tuple[str, str]) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = (read_idx(found[name]) for name in names)
        _check(images, labels, found[names[0]], found[names[1]])
        pixels = torch.from_numpy(images)[:, None].to(torch.float32).div_(255)
        return pixels, torch.from_numpy(labels).long()

    (train_images, train_labels), (test_images, test_labels) = read(TRAIN), read(TEST)
    return Digits(
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        name="mnist",
        note=f"MNIST from {str(found[TRAIN[0]].parent)!r}: {len(train_labels):,} images of 28x28 pixels to train, "
        f"and its own {len(test_labels):,} test images, by other writers",
        preprocess=preprocess(),
        epochs=2,
    )


_HOW = f"--root names a folder that holds {', '.join((*TRAIN, *TEST))}, gzipped or not"


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "innersight"


def _find(root: Path) -> dict[str, Path] | None:
    """Name -> file, from the first folder that has all four."""
    if root.exists() and not root.is_dir():
        raise InputError(f"{str(root)!r} is a file; {_HOW}")
    for folder in (root, root / "raw", root / "MNIST" / "raw"):
        # Of two, the archive: torchvision checks its sum, but may have been interrupted while it unpacked.
        files = {
            name: path for name in (*TRAIN, *TEST) for path in (folder / name, folder / f"{name}.gz") if path.is_file()
        }
        if len(files) == 4:
            return files
    return None


def read_idx(path: Path) -> np.ndarray:
    """The bytes of an IDX file of images `(N, H, W)` or labels `(N,)`, uint8; gzip is recognized by content."""
    try:
        with _open(path) as file:
            head = file.read(4)
            if len(head) == 4 and head not in (b"\0\0\x08\x01", b"\0\0\x08\x03"):
                raise InputError(
                    f"{str(path)!r} is not an IDX file of MNIST: it begins with 0x{head.hex()}, "
                    "images with 0x00000803 and labels with 0x00000801"
                )
            dimensions = head[3] if len(head) == 4 else 0
            sizes = file.read(4 * dimensions)
            if not dimensions or len(sizes) < 4 * dimensions:
                raise InputError(f"{str(path)!r} is truncated: its header is not whole; download it again")
            shape = tuple(int(n) for n in np.frombuffer(sizes, ">u4"))
            if shape[0] > MOST or shape[1:] not in ((), (28, 28)):
                raise InputError(
                    f"{str(path)!r} is not MNIST: its header promises {'x'.join(map(str, shape))} values, "
                    "expected are N labels or Nx28x28 pixels"
                )
            promised = int(np.prod(shape, dtype=np.int64))
            values = file.read(promised + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise InputError(f"{str(path)!r} is truncated or damaged: gzip cannot unpack it; download it again") from None
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read: {error.strerror or error}") from None
    if len(values) != promised:
        held = f"only {len(values):,}" if len(values) < promised else "more"
        raise InputError(
            f"{str(path)!r} is {'truncated' if len(values) < promised else 'damaged'}: its header promises "
            f"{promised:,} bytes and it holds {held}; download it again"
        )
    return np.frombuffer(bytearray(values), np.uint8).reshape(shape)  # a bytearray, as torch wants it writable


def _open(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return cast(IO[bytes], gzip.open(path)) if packed else path.open("rb")


def _check(images: np.ndarray, labels: np.ndarray, images_path: Path, labels_path: Path) -> None:
    for values, path, dimensions, what in ((images, images_path, 3, "images"), (labels, labels_path, 1, "labels")):
        if values.ndim != dimensions:
            raise InputError(f"{str(path)!r} does not hold {what}; was it exchanged with another of the four files?")
    if len(images) != len(labels) or not len(images):
        raise InputError(f"{str(images_path)!r} holds {len(images)} images, {str(labels_path)!r} {len(labels)} labels")
    if labels.max() > 9:
        raise InputError(f"{str(labels_path)!r} holds the label {labels.max()}; those of MNIST are 0 to 9")


def _download(root: Path) -> None:
    from torchvision import datasets

    mirror = _answering(datasets.MNIST.mirrors, datasets.MNIST.resources[1][0])
    if mirror is None:
        raise InputError(f"MNIST is not in {str(root)!r} and there is no network to download it; {_HOW}")
    # torchvision names its folder after the class, so the class with this one mirror is called MNIST again.
    one_mirror = type("MNIST", (datasets.MNIST,), {"mirrors": [mirror]})
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _timeout(PATIENCE):
            one_mirror(root, download=True)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"MNIST is not in {str(root)!r} and its download failed ({reason}); {_HOW}") from None


def _answering(mirrors: Sequence[str], file: str) -> str | None:
    """The first of the mirrors to offer `file`, or None after PATIENCE.

    Asked in threads that nobody waits for: looking up a name and trying all its addresses in turn can take minutes
    behind a firewall that drops packets, and no socket's timeout covers that.
    """
    answers: queue.Queue[str | None] = queue.Queue()

    def ask(mirror: str) -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(mirror + file, method="HEAD"), timeout=PATIENCE):
                answers.put(mirror)
        except Exception:  # whatever it is, this mirror does not serve us
            answers.put(None)

    for mirror in mirrors:
        threading.Thread(target=ask, args=(mirror,), daemon=True).start()
    deadline = time.monotonic() + PATIENCE
    for _ in mirrors:
        try:
            answer = answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return None
        if answer is not None:
            return answer
    return None


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
