"""The handwritten digits that ship with scikit-learn: real, small, and there without a network."""

from __future__ import annotations

import numpy as np

from innersight import errors
from innersight.data import Digits, preprocess

HELD_OUT = 5  # every fifth image of each digit


def load() -> Digits:
    """1,797 digits of 8x8 pixels, enlarged to 28x28; every fifth of each class is held out.

    The split is by counting, not by chance, so that it is the same with every seed and version. The file runs through
    its 13 writers, hence each of them is in both parts: the accuracy is for new digits by known hands.
    (E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.)
    """
    datasets = errors.need("sklearn.datasets", "demo", "reading the digits that ship with scikit-learn")
    import torch
    from torch.nn import functional as F

    bunch = datasets.load_digits()
    small = torch.from_numpy(np.asarray(bunch.images / 16, dtype=np.float32))[:, None]  # (1797, 1, 8, 8), 0..1
    # Bicubic interpolation overshoots beside sharp edges, which no scanned pixel could.
    images = F.interpolate(small, size=(28, 28), mode="bicubic", antialias=True).clamp(0, 1)
    labels = torch.from_numpy(np.asarray(bunch.target, dtype=np.int64))
    held_out = torch.from_numpy(_count_within_class(labels.numpy()) % HELD_OUT == HELD_OUT - 1)
    return Digits(
        train_images=images[~held_out],
        train_labels=labels[~held_out],
        test_images=images[held_out],
        test_labels=labels[held_out],
        name="digits",
        note=f"scikit-learn's handwritten digits, {len(labels):,} images of 8x8 pixels enlarged to 28x28; every fifth "
        f"of each class, {int(held_out.sum())} in all, is held out (the same 13 writers are in both parts)",
        preprocess=preprocess(),
        epochs=20,
    )


def _count_within_class(labels: np.ndarray) -> np.ndarray:
    """How many of the same class came before: [3, 5, 3, 3] -> [0, 0, 1, 2]."""
    count = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        where = labels == label
        count[where] = np.arange(where.sum())
    return count
