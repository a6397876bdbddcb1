"""The artefact of a scan on disk: what it is made of while it grows, and the tables it becomes.

    out/manifest.json              versions, network and hash of its weights, preprocessing, data, plan, state
    out/parts/counts/LEVEL-NUMBER  while it grows: the counts of 2 ** LEVEL blocks, written whole, never changed
    out/parts/rows/BLOCK           the rows of a block's images
    out/channels.parquet images.parquet skipped.parquet tops.parquet confusion.parquet classes.parquet
    out/statistics.safetensors embeddings.safetensors crops/LAYER/CHANNEL.jpg findings.json

Two complete neighbours (2n, 2n + 1) of one level become their parent, which is written before they are removed. A kill
leaves each file whole or absent, a parent makes its children void, and the blocks that nothing covers are those still
to do. The result is the fold of the few nodes that are left, from left to right. So sums are added up along one fixed
tree, whatever the order in which blocks were counted, and by whom.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from innersight import errors, storage
from innersight.scanning import accumulators

if TYPE_CHECKING:
    from innersight.scanning.accumulators import Counts
    from innersight.scanning.engines import Block

FORMAT = 1
_SHARE = 0.05  # of the time may go into writing counts before a kill would cost anything

Node = tuple[int, int]


class Parts:
    """The counts and rows of a scan while it grows. Use as a context: another process cannot write here meanwhile.

    every: seconds between writes; default as often as takes a twentieth of the time, so that a kill costs little
    """

    def __init__(self, folder: Path, every: float | None = None):
        self.folder = folder
        self.every = every
        self.counts, self.rows = folder / "parts" / "counts", folder / "parts" / "rows"
        self._new: dict[Node, Counts] = {}
        self._new_rows: dict[int, tuple[dict[str, np.ndarray], dict[str, Any]]] = {}
        self._void: set[Node] = set()
        self._on_disk: set[Node] = set()
        self._written = time.monotonic()
        self._cost = 0.0
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> Parts:
        with plain_errors(self.folder):
            for place in (self.counts, self.rows):
                place.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.folder)
            self._on_disk = set(_nodes(self.counts))
            for file in self.folder.rglob(".*.*.*"):  # what a kill left half written
                file.unlink(missing_ok=True)
            for node in [n for n in self._on_disk if self._above(n)]:
                self._remove(node)
        return self

    def __exit__(self, *error: object) -> None:
        try:
            if self.folder.exists():
                self.flush()
        except errors.InputError:
            if error[0] is None:
                raise
        finally:
            if self._lock is not None:
                self._lock.close()

    def _above(self, node: Node) -> bool:
        """Whether something that is there covers it."""
        level, number = node
        return any((up, number >> (up - level)) in self._there for up in range(level + 1, 64))

    @property
    def _there(self) -> set[Node]:
        return (self._on_disk - self._void) | set(self._new)

    def has(self, block: int) -> bool:
        return (0, block) in self._there or self._above((0, block))

    def blocks(self) -> set[int]:
        """The blocks that are counted."""
        return {b for level, number in self._there for b in range(number << level, (number + 1) << level)}

    def add(self, block: Block) -> None:
        """A block that was counted; written to disk now or soon."""
        self.take({(0, block.number): block.counts}, {block.number: (block.rows, block.said)})

    def take(self, counts: Mapping[Node, Counts], rows: Mapping[int, tuple[dict, dict]]) -> None:
        """The nodes of blocks that were counted, none of which is here yet, and their rows."""
        self._new_rows |= rows
        for node, of_node in counts.items():
            self._join(node, of_node)
        if time.monotonic() - self._written >= (self._cost / _SHARE if self.every is None else self.every):
            self.flush()

    def _join(self, node: Node, counts: Counts) -> None:
        level, number = node
        while (other := (level, number ^ 1)) in self._there:
            there = self._new.pop(other) if other in self._new else self._read(other)
            if other in self._on_disk:
                self._void.add(other)
            left, right = (counts, there) if other[1] > number else (there, counts)
            counts = accumulators.merge(left, right)
            level, number = level + 1, number >> 1
        self._new[level, number] = counts

    def flush(self) -> None:
        """Everything to disk; rows first, then counts, then what those make void goes."""
        start = time.monotonic()
        with plain_errors(self.folder):
            for block, (rows, said) in list(self._new_rows.items()):
                storage.store(self._rows_of(block), rows, said)
                del self._new_rows[block]
            for node, counts in list(self._new.items()):
                storage.store(self._file(node), counts, {})
                self._on_disk.add(node)
                del self._new[node]
            for node in list(self._void):
                self._remove(node)
        self._written = time.monotonic()
        self._cost = self._written - start

    def _remove(self, node: Node) -> None:
        self._file(node).unlink(missing_ok=True)
        self._on_disk.discard(node)
        self._void.discard(node)

    def absorb(self, other: Parts) -> int:
        """Take over the blocks that another part of the same scan has and this one lacks; how many they are."""
        taken = 0
        for level, number in sorted(other._there, key=lambda n: n[1] << n[0]):
            mine = self.blocks()
            blocks = range(number << level, (number + 1) << level)
            if all(b in mine for b in blocks):
                continue
            if inside := [n for n in self._there if n[0] < level and n[1] >> (level - n[0]) == number]:
                self._void |= {n for n in inside if n in self._on_disk}
                self._new = {n: c for n, c in self._new.items() if n not in inside}
            for b in blocks:
                self._new_rows[b] = other.rows_of(b)
            self._join((level, number), other._read((level, number)))
            self.flush()
            taken += sum(b not in mine for b in blocks)
        return taken

    def fold(self) -> Counts:
        """The counts of all blocks, which must be there without a gap."""
        nodes = sorted(self._there, key=lambda n: n[1] << n[0])
        return reduce(accumulators.merge, (self._new.get(n) or self._read(n) for n in nodes))

    def rows_of(self, block: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        return self._new_rows[block] if block in self._new_rows else storage.read(self._rows_of(block))

    def _read(self, node: Node) -> Counts:
        return storage.read(self._file(node))[0]

    def _file(self, node: Node) -> Path:
        return self.counts / f"{node[0]:02}-{node[1]:08}.safetensors"

    def _rows_of(self, block: int) -> Path:
        return self.rows / f"{block:08}.safetensors"


def joined(nodes: dict[Node, Counts]) -> dict[Node, Counts]:
    """The same counts, complete neighbours merged."""
    level = 0
    while any(n[0] >= level for n in nodes):
        for number in sorted(n for lev, n in nodes if lev == level and not n & 1):
            if (level, number + 1) in nodes:
                left, right = nodes.pop((level, number)), nodes.pop((level, number + 1))
                nodes[level + 1, number >> 1] = accumulators.merge(left, right)
        level += 1
    return nodes


def _nodes(folder: Path) -> Iterator[Node]:
    for file in folder.glob("*.safetensors"):
        if found := re.fullmatch(r"(\d+)-(\d+)", file.stem):
            yield int(found[1]), int(found[2])


def _locked(folder: Path) -> IO[bytes]:
    """A lock that the system lets go of when the process ends, however it ends."""
    file = (folder / "parts" / "lock").open("ab")
    try:
        import fcntl
    except ImportError:  # Windows
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise errors.InputError(
            f"another scan is writing into {str(folder)!r}: wait for it, or give each shard a folder of its own"
        ) from None
    return file


@contextlib.contextmanager
def plain_errors(folder: Path) -> Iterator[None]:
    """A full disk, or one that cannot be written to, as a sentence that says what of the scan is left."""
    try:
        yield
    except errors.InnersightError as error:
        if _full(error.__cause__):
            raise errors.InputError(_full_disk(folder)) from error
        raise
    except OSError as error:
        said = _full_disk(folder) if _full(error) else f"cannot write into {str(folder)!r}: {error.strerror or error}"
        raise errors.InputError(said) from error


def _full(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _full_disk(folder: Path) -> str:
    return (
        f"the disk of {str(folder)!r} is full; what was counted before is kept there whole: free some space and go on "
        "with resume=True"
    )


# --- the manifest ----------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a scan; None if there is none. Raises InputError for what is none of ours."""
    file = folder / "manifest.json"
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise errors.InputError(f"{str(file)!r} is no manifest of a scan: {error}") from error
    if not isinstance(found, dict) or found.get("kind") != "innersight scan":
        raise errors.InputError(f"{str(file)!r} is no manifest of a scan")
    if found.get("format") != FORMAT:
        raise errors.InputError(
            f"{str(folder)!r} was written in format {found.get('format')}, this version reads {FORMAT}: scan again"
        )
    return found


def write_json(path: Path, value: Any) -> None:
    from innersight.results import jsonable

    text = json.dumps(jsonable(value), ensure_ascii=False, allow_nan=False, indent=1)
    with plain_errors(path.parent):
        storage.write_whole(path, lambda file: file.write(text.encode()))


def difference(mine: Mapping[str, Any], theirs: Mapping[str, Any], path: str = "") -> str:
    """Where two manifests part, in words; "" if nowhere."""
    for key in dict.fromkeys([*mine, *theirs]):
        a, b = mine.get(key), theirs.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            if found := difference(a, b, f"{path}{key} "):
                return found
        elif a != b:
            return f"{path}{key} ({_short(b)} there, {_short(a)} here)"
    return ""


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def model_hash(module: Any) -> str:
    """SHA-256 over the names, shapes and bytes of the weights and buffers."""
    import hashlib

    import torch

    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()


def remove_parts(folder: Path) -> None:
    shutil.rmtree(folder / "parts", ignore_errors=True)


# --- tables ----------------------------------------------------------------------------------------------------------


def write_table(path: Path, columns: Mapping[str, Any]) -> None:
    """Columns as one Parquet file, whole or not at all."""
    pyarrow = errors.need("pyarrow", "scan", "writing tables")
    write_tables(path, [pyarrow.table(dict(columns))])


def write_tables(path: Path, tables: Iterable[Any]) -> None:
    """Tables of one schema as one Parquet file, one in memory at a time."""
    parquet = errors.need("pyarrow.parquet", "scan", "writing tables")

    def write(file: IO[bytes]) -> None:
        writer = None
        try:
            for table in tables:
                writer = writer or parquet.ParquetWriter(file, table.schema)
                writer.write_table(table)
        finally:
            if writer is not None:
                with contextlib.suppress(OSError):  # a full disk has said so already
                    writer.close()

    with plain_errors(path.parent):
        storage.write_whole(path, write)


def write_rows_as_tensor(path: Path, name: str, parts: Iterable[np.ndarray], count: int, width: int) -> None:
    """(count, width) float16 as a safetensors file, one part in memory at a time."""
    size = count * width * 2
    header = json.dumps({name: {"dtype": "F16", "shape": [count, width], "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)

    def write(file: IO[bytes]) -> None:
        file.write(len(header).to_bytes(8, "little") + header)
        for part in parts:
            file.write(np.ascontiguousarray(part, np.float16).tobytes())

    with plain_errors(path.parent):
        storage.write_whole(path, write)


def is_empty(folder: Path) -> bool:
    return not any(name not in (".DS_Store",) for name in os.listdir(folder))
