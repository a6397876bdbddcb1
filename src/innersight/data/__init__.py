"""Handwritten digits to learn with: what `innersight demo` trains its small network on.

digits     1,797 images that ship with scikit-learn; works offline
mnist      the 70,000 of MNIST, from local files or by download
small_cnn  the network of the PyTorch tutorial, its training and its weights on disk
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from innersight import errors

if TYPE_CHECKING:
    import torch

    from innersight.preprocess import Preprocess

NAMES = ("digits", "mnist")


@dataclass(frozen=True, eq=False, repr=False)
class Digits:
    """Handwritten digits 0 to 9, white on black, in a part to train on and a part that is held out.

    train_images, test_images: float32 `(N, 1, 28, 28)`, 0 (paper) to 1 (ink), as the network takes them
    train_labels, test_labels: int64 `(N,)`
    name:       "digits" or "mnist"
    note:       a sentence for people: which images these are and how they were split
    preprocess: brings a picture file to the same form
    epochs:     how long `small_cnn.train` should train on them
    """

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    name: str
    note: str
    preprocess: Preprocess
    epochs: int

    @property
    def train(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.train_images, self.train_labels

    @property
    def test(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.test_images, self.test_labels

    def __repr__(self) -> str:
        height, width = self.train_images.shape[2:]
        return (
            f"Digits({self.name!r}: {len(self.train_labels):,} to train, {len(self.test_labels):,} held out, "
            f"{height}x{width}, 0..1)"
        )


def load(name: str, root: str | Path | None = None) -> Digits:
    """The data set `name`, "digits" or "mnist"; `root` is the folder of the MNIST files.

    >>> load("digits")
    Digits('digits': 1,442 to train, 355 held out, 28x28, 0..1)
    """
    if name == "digits":
        if root is not None:
            raise errors.InputError(
                f"the digits come with scikit-learn and read no folder, but root is {str(root)!r}; "
                "leave it out, or ask for the data set mnist"
            )
        from innersight.data import digits

        return digits.load()
    if name == "mnist":
        from innersight.data import mnist

        return mnist.load(root)
    raise errors.unknown("data set", name, NAMES)


def preprocess() -> Preprocess:
    """What turns a picture of a digit, white on black, into an input of a network trained on these sets."""
    from innersight.preprocess import Preprocess

    return Preprocess(size=(28, 28), channels="L", resize="letterbox", interpolation="bicubic")
