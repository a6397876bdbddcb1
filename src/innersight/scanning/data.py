"""Data sets as a scan reads them: numbered images, each with its label, read again at will.

    source = open_data("photos/")          # a folder (the class folder is the label), a glob, a list in CSV or Parquet,
                                           # "mnist", "cifar10", a torch data set or loader, arrays, a Hugging Face set
    for sample in source.samples(range(64), preprocess, input_shape): ...

What cannot be read becomes a sample that says why, and the others go on.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from innersight import errors, images

if TYPE_CHECKING:
    import torch

    from innersight.preprocess import Preprocess

NAMED = ("mnist", "cifar10", "digits")


@dataclass(frozen=True)
class Sample:
    """One image of the data set.

    values:  (1, C, H, W), what the network eats; None if it cannot be read, `problem` says why
    picture: with its geometry
    label:   as the data set has it: a class by name or number, None
    notes:   what was decided on the way in
    """

    index: int
    name: str
    label: str | int | None = None
    values: torch.Tensor | None = None
    picture: images.Picture | None = None
    problem: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """A data set.

    kind, name: for people: "folder", "photos"
    size:       how many images; None if only reading to the end tells
    item:       number -> (image, name, label), image being anything that `images.read` takes; None where the data set
                can only be read from its beginning
    walk:       reads from the beginning: each image as `item` returns it
    classes:    names of the classes by number; None if they have none
    labelled:   whether images have labels, as far as is known
    threads:    how many may read at once
    identity:   tells one data set from another
    """

    kind: str
    name: str
    size: int | None
    item: Callable[[int], tuple[Any, str, Any]] | None = None
    walk: Callable[[], Iterable[tuple[Any, str, Any]]] | None = None
    classes: tuple[str, ...] | None = None
    labelled: bool = True
    threads: int = 1
    identity: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "name": self.name, "images": self.size, "identity": self.identity,
                "classes": None if self.classes is None else list(self.classes)}  # fmt: skip

    def limited(self, limit: int | None) -> Source:
        """The first `limit` images."""
        if limit is None or (self.size is not None and limit >= self.size):
            return self
        walk = None if self.walk is None else lambda walk=self.walk: itertools.islice(walk(), limit)
        return replace(self, size=limit, walk=walk, identity=f"{self.identity} first {limit}")

    def samples(
        self, numbers: Iterable[int], preprocess: Preprocess | None, input_shape: Sequence[int] | None = None
    ) -> Iterator[Sample]:
        """The images of these numbers (ascending), read ahead by threads; memory holds 64 of them at most."""

        def read(number: int, given: tuple[Any, str, Any] | None = None) -> Sample:
            return _read(self, number, given, preprocess, input_shape)

        if self.item is not None:
            yield from _ahead(read, ((n,) for n in numbers), self.threads)
        else:
            yield from _ahead(read, self._walked(numbers), 1)

    def _walked(self, numbers: Iterable[int]) -> Iterator[tuple[int, Any]]:
        assert self.walk is not None
        wanted = iter(numbers)
        number = next(wanted, None)
        if number is None:
            return
        at = -1
        try:
            for at, given in enumerate(self.walk()):
                if at == number:
                    yield at, given
                    number = next(wanted, None)
                    if number is None:
                        return
        except (errors.InnersightError, OSError):
            raise
        except Exception as error:  # a loader dies with whatever its data set raised
            raise errors.InputError(
                f"the loader failed behind image {at} ({_first_line(error)}); hand in the data set itself, and images "
                "that cannot be read are skipped and listed"
            ) from error


def _ahead(read: Callable[..., Sample], calls: Iterator[tuple], threads: int, most: int = 64) -> Iterator[Sample]:
    """`read` of each call, in order; what is drawn from `calls` is drawn in one thread of its own, too."""
    with ThreadPoolExecutor(threads, thread_name_prefix="innersight-read") as readers, ThreadPoolExecutor(1) as drawer:
        waiting: deque[Future] = deque()
        end = object()
        draw: Future | None = drawer.submit(next, calls, end)
        try:
            while True:
                while draw is not None and len(waiting) < most and (not waiting or draw.done()):
                    call: Any = draw.result()
                    if call is end:
                        draw = None
                    else:
                        waiting.append(readers.submit(read, *call))
                        draw = drawer.submit(next, calls, end)
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            for future in (*waiting, *([draw] if draw is not None else [])):
                future.cancel()


def _read(
    source: Source, number: int, given: tuple[Any, str, Any] | None, preprocess: Any, input_shape: Any
) -> Sample:  # fmt: skip
    name, label = f"image {number}", None
    try:
        if given is None:
            assert source.item is not None
            given = source.item(number)
        item, name, label = given[0], given[1] or name, given[2]
        inputs = images.read(item, preprocess, input_shape=input_shape)
        if len(inputs) != 1:
            raise errors.InputError(f"{name} holds {len(inputs)} images, one is expected")
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:  # a data set's own code raises anything
        said = str(error) if isinstance(error, errors.InnersightError) else _first_line(error)
        return Sample(number, name, plain(label), problem=said)
    picture = inputs.pictures[0]
    label = plain(label if label is not None else picture.label)
    return Sample(
        number, name, label, inputs.tensor, replace(picture, name=name, label=label), notes=tuple(inputs.notes)
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def plain(label: Any) -> str | int | None:
    """A label as a word or a whole number; None for what names no class (masks, boxes, measurements)."""
    if hasattr(label, "item"):
        try:
            label = label.item()
        except (ValueError, RuntimeError, TypeError):  # several numbers
            return None
    if isinstance(label, bool) or not isinstance(label, (str, int)):
        return None
    return label


# --- opening ---------------------------------------------------------------------------------------------------------


def open_data(data: Any, root: str | os.PathLike | None = None) -> Source:
    """The data set that `data` stands for.

    data: a folder, a glob, a file `.csv`, `.tsv` or `.parquet` with the columns path and label; "mnist", "cifar10" or
          "digits" (test part; "mnist:train" the other), `root` being where their files are; a torch Dataset or
          DataLoader; a Hugging Face Dataset; anything with a length and numbered items; a pair (images, labels); any
          iterable of images or batches that begins anew each time

    Raises InputError in one sentence for what is none.
    """
    if isinstance(data, Source):
        return data
    if isinstance(data, (str, os.PathLike)):
        return _of_path(os.fspath(data), root)
    if root is not None:
        raise errors.InputError("root= says where the files of a data set named by a word are; leave it out here")
    torch = sys.modules.get("torch")  # who has a loader has imported it
    if torch is not None and isinstance(data, torch.utils.data.DataLoader):
        return _of_loader(data)
    features = getattr(data, "features", None)
    if isinstance(features, Mapping) and hasattr(data, "column_names"):
        return _of_hugging_face(data, features)
    if isinstance(data, tuple) and len(data) == 2 and hasattr(data[0], "shape") and hasattr(data[1], "__len__"):
        return _of_pair(*data)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, Mapping):
        return _of_items(data)
    if isinstance(data, Iterator):
        raise errors.InputError(
            f"{_a(data)} can be read only once, and a scan goes back to the images that excite a channel: hand in the "
            "data set or the loader that it comes from"
        )
    if hasattr(data, "__iter__") and not isinstance(data, (Mapping, bytes)):
        return _of_iterable(data, None)
    raise errors.InputError(
        f"{_a(data)} is no data set: pass a folder, a list in CSV or Parquet, {', '.join(NAMED)}, a torch Dataset or "
        "DataLoader, or a Hugging Face Dataset"
    )


def _a(value: Any) -> str:
    kind = type(value).__name__
    return f"an {kind}" if kind[0].lower() in "aeio" else f"a {kind}"


def _identity(names: Iterable[str], labels: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for name, label in zip(names, labels, strict=True):
        digest.update(f"{name}\0{label}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _of_files(kind: str, name: str, files: Sequence[tuple[str, str, Any]]) -> Source:
    labels = [label for _, _, label in files]
    known = sorted({str(label) for label in labels if label is not None})
    words = any(isinstance(label, str) for label in labels)
    return Source(
        kind, name, len(files), item=lambda n: files[n], classes=tuple(known) if words else None,
        labelled=any(label is not None for label in labels), threads=max(2, min(8, os.cpu_count() or 2)),
        identity=_identity((f[1] for f in files), labels),
    )  # fmt: skip


def _of_path(path: str, root: str | os.PathLike | None) -> Source:
    word, _, part = path.partition(":")
    if word in NAMED and not os.path.exists(path):
        return _of_name(word, part or "test", root)
    if root is not None:
        raise errors.InputError(f"root= says where the files of {', '.join(NAMED)} are; leave it out for {path!r}")
    suffix = Path(path).suffix.lower()
    if suffix in (".csv", ".tsv", ".parquet", ".pq") and os.path.isfile(path):
        return _of_list(Path(path))
    found = list(images._find(path))
    folder = os.path.isdir(os.path.expanduser(path))
    return _of_files("folder" if folder else "files", Path(path).name or path, found)


PATHS = ("path", "file", "filename", "file_name", "image", "filepath", "image_path")
LABELS = ("label", "class", "target", "y", "labels", "category")


def _of_list(path: Path) -> Source:
    columns = _columns_of_csv(path) if path.suffix.lower() in (".csv", ".tsv") else _columns_of_parquet(path)
    names = {name.strip().lower(): name for name in columns}
    key = next((names[p] for p in PATHS if p in names), None)
    if key is None:
        raise errors.InputError(
            f"{path.name} has the columns {', '.join(columns) or '(none)'}: one called {PATHS[0]} (or "
            f"{', '.join(PATHS[1:])}) must name the pictures"
        )
    of_label = next((names[p] for p in LABELS if p in names), None)
    paths = columns[key]
    labels = [None] * len(paths) if of_label is None else [_cell(v) for v in columns[of_label]]
    if not paths:
        raise errors.InputError(f"{path.name} lists no pictures")
    if bad := next((p for p in paths if not isinstance(p, str)), None):
        raise errors.InputError(f"{path.name}: the column {key} holds {bad!r} where the path of a picture is expected")
    files = [(str(path.parent / p), p, label) for p, label in zip(paths, labels, strict=True)]
    return _of_files("list", path.name, files)


def _cell(value: Any) -> str | int | None:
    if value is None or value == "":
        return None
    return int(value) if isinstance(value, str) and value.isdecimal() else plain(value)


def _columns_of_csv(path: Path) -> dict[str, list]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            header = next(rows, [])
            columns: dict[str, list] = {name: [] for name in header}
            for row in rows:
                if row and len(row) != len(header):
                    raise errors.InputError(
                        f"{path.name} line {rows.line_num} has {len(row)} fields, its header {len(header)}"
                    )
                for name, value in zip(header, row, strict=False):
                    columns[name].append(value)
            return columns
    except (UnicodeDecodeError, csv.Error) as error:
        raise errors.InputError(f"{path.name} cannot be read as a table: {error}") from error


def _columns_of_parquet(path: Path) -> dict[str, list]:
    parquet = errors.need("pyarrow.parquet", "scan", "reading a list of pictures in Parquet")
    try:
        table = parquet.read_table(path)
    except Exception as error:  # Arrow's errors have many types
        raise errors.InputError(f"{path.name} cannot be read as Parquet: {_first_line(error)}") from error
    wanted = [n for n in table.column_names if n.strip().lower() in (*PATHS, *LABELS)]
    return {name: table[name].to_pylist() if name in wanted else [] for name in table.column_names}


def _of_name(word: str, part: str, root: str | os.PathLike | None) -> Source:
    if part not in ("test", "train"):
        raise errors.InputError(f"{word} has the parts test and train, not {part!r}")
    if word == "digits":
        from innersight.data import digits

        held = digits.load()
        inputs, numbers = held.test if part == "test" else held.train
        pixels = (inputs[:, 0] * 255).round().byte().numpy()
        return _of_arrays(f"digits:{part}", pixels, numbers.numpy(), tuple("0123456789"))
    if root is None:
        raise errors.InputError(f"{word} needs root=: the folder where its files are (nothing is downloaded)")
    if word == "mnist":
        from innersight.data import mnist

        found = mnist._find(Path(root).expanduser())
        if found is None:
            raise errors.InputError(
                f"MNIST is not in {os.fspath(root)!r}: root= names the folder of its four IDX files"
            )
        names = mnist.TEST if part == "test" else mnist.TRAIN
        array, labels = (mnist.read_idx(found[n]) for n in names)
        return _of_arrays(f"mnist:{part}", array, labels, tuple("0123456789"))
    from torchvision.datasets import CIFAR10

    try:
        cifar = CIFAR10(os.path.expanduser(os.fspath(root)), train=part == "train", download=False)
    except RuntimeError as error:  # it checks the files' sums, and only then reads them
        raise errors.InputError(
            f"CIFAR-10 is not in {os.fspath(root)!r}: root= names the folder that holds cifar-10-batches-py"
        ) from error
    return _of_arrays(f"cifar10:{part}", cifar.data, np.asarray(cifar.targets), tuple(cifar.classes))


def _of_arrays(name: str, pixels: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> Source:
    return Source(
        "data set", name, len(pixels), item=lambda n: (pixels[n], "", int(labels[n])), classes=classes, threads=2,
        identity=hashlib.sha256(np.ascontiguousarray(pixels).tobytes() + labels.tobytes()).hexdigest(),
    )  # fmt: skip


def _of_pair(pictures: Any, labels: Any) -> Source:
    if len(pictures) != len(labels):
        raise errors.InputError(f"there are {len(pictures)} images and {len(labels)} labels")
    return Source(
        "arrays", "arrays", len(pictures), item=lambda n: (pictures[n], "", labels[n]),
        identity=f"{len(pictures)} images",
    )  # fmt: skip


def _of_items(data: Any) -> Source:
    labelled = not hasattr(data, "ndim")  # an array holds images alone; of a list of samples the first will tell
    return Source(
        "data set", type(data).__name__, len(data), item=lambda n: _item(data[n]),
        classes=_named(data), labelled=labelled, identity=f"{type(data).__name__} of {len(data)}",
    )  # fmt: skip


def _item(sample: Any) -> tuple[Any, str, Any]:
    image, label = _parted(sample)
    return image, "", label


def _parted(sample: Any) -> tuple[Any, Any]:
    """The image and the label of a sample (a pair, a dict, an image alone)."""
    if isinstance(sample, Mapping):
        key = next((k for k in images.IMAGE_KEYS if k in sample), None)
        if key is None:
            raise errors.InputError(
                f"a sample is a dict with the keys {', '.join(map(str, sample))}: its picture is looked for under "
                f"{', '.join(images.IMAGE_KEYS)}"
            )
        return sample[key], next((sample[k] for k in images.LABEL_KEYS if k in sample), None)
    if isinstance(sample, (tuple, list)) and len(sample) > 1:
        return sample[0], sample[1]
    return (sample[0] if isinstance(sample, (tuple, list)) and len(sample) == 1 else sample), None


def _of_hugging_face(data: Any, features: Mapping[str, Any]) -> Source:
    key = next((k for k in images.LABEL_KEYS if k in features), None)
    names = getattr(features.get(key), "names", None) if key else None
    return Source(
        "Hugging Face data set", str(getattr(getattr(data, "info", None), "dataset_name", None) or type(data).__name__),
        len(data), item=lambda n: _item(data[n]), classes=None if names is None else tuple(names),
        labelled=key is not None, identity=str(getattr(data, "_fingerprint", "") or len(data)),
    )  # fmt: skip


def _of_loader(loader: Any) -> Source:
    from torch.utils.data import RandomSampler

    if isinstance(getattr(loader, "sampler", None), RandomSampler):
        raise errors.InputError(
            "this DataLoader shuffles, so its images have no fixed number to go on from or to come back to: "
            "build it with shuffle=False"
        )
    data, size = loader.dataset, None
    if hasattr(data, "__len__"):
        size = len(data)
        if loader.drop_last and loader.batch_size:
            size -= size % loader.batch_size
    return _of_iterable(loader, size, _named(data), f"loader of {type(data).__name__}")


def _named(data: Any) -> tuple[str, ...] | None:
    """The names of its classes, where a torch data set says them."""
    classes = getattr(data, "classes", None)
    words = isinstance(classes, (list, tuple)) and all(isinstance(c, str) for c in classes)
    return tuple(classes) if words and classes else None


def _of_iterable(data: Any, size: int | None, classes: tuple[str, ...] | None = None, name: str = "") -> Source:
    def walk() -> Iterator[tuple[Any, str, Any]]:
        for batch in data:
            for image, label in _rows(batch):
                yield image, "", label

    name = name or type(data).__name__
    return Source("loader", name, size, walk=walk, classes=classes, identity=f"{name} {size}")


def _rows(batch: Any) -> Iterator[tuple[Any, Any]]:
    """A batch of a loader as samples; what holds one image alone is one sample."""
    if isinstance(batch, list) and batch and _are_samples(batch):
        for sample in batch:
            yield _parted(sample)
        return
    pictures, labels = _parted(batch)
    if getattr(pictures, "ndim", 0) != 4:
        yield pictures, labels
        return
    each = hasattr(labels, "__len__") and getattr(labels, "ndim", 1) > 0 and len(labels) == len(pictures)
    for i in range(len(pictures)):
        yield pictures[i], labels[i] if each else None


def _are_samples(batch: list) -> bool:
    """Whether a list is one of samples, as a loader without collating hands on, not [images, labels]."""
    first, second = batch[0], batch[1] if len(batch) > 1 else batch[0]
    if getattr(first, "ndim", 0) == 4:
        return False
    return not hasattr(first, "ndim") or getattr(second, "ndim", 0) == first.ndim
