"""A whole data set through a network: what every channel answers to, and where the network errs.

    found = innersight.scan(net, "photos/", "out/")
    found.channels(); found.top("conv2", 7); found.findings()

accumulators  what is counted, and how two counts become one
plan          which layers and which counts, settled by the first image
data          data sets as numbered images
engines       the network over a block of images, in this process
cluster       on many machines, by Ray
store         counts on disk while they grow; a kill loses next to nothing
tables        what a finished scan leaves
reader        `Scan`, which reads it
training      scans at chosen steps of a training; `change` between two of them, `board` for TensorBoard
"""

from __future__ import annotations

import itertools
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from innersight import __version__, errors
from innersight.scanning.reader import Scan

if TYPE_CHECKING:
    from innersight.network import Network
    from innersight.scanning.data import Sample, Source
    from innersight.scanning.plan import Plan
    from innersight.scanning.store import Parts

__all__ = ["Scan", "scan"]

ENGINES = ("local", "ray")


def scan(
    net: Any,
    data: Any,
    out: str | os.PathLike,
    *,
    layers: str | Sequence[str] | None = None,
    top: int = 9,
    engine: str = "local",
    root: str | os.PathLike | None = None,
    limit: int | None = None,
    shard: tuple[int, int] | None = None,
    resume: bool = False,
    merge: Sequence[str | os.PathLike] = (),
    sensitivity: str | None = None,
    crops: int = 2048,
    every: float | None = None,
) -> Scan:
    """Run a data set once through a network and keep what every channel did, in the folder `out`.

    net:         a Network, or what `innersight.open` takes
    data:        a folder, a list in CSV or Parquet, "mnist", a torch Dataset or DataLoader, ..., see `scanning.data`
    layers:      names, or kinds ("Conv2d"); default every layer that has channels
    top:         how many images are kept for each channel
    engine:      "local": in this process, images being read by threads; "ray": on a cluster, see `scanning.cluster`
    root:        where the files of "mnist" and "cifar10" are
    limit:       only the first so many images
    shard:       (i, n): the i-th of n parts, i from 1; a folder of its own for each, then `merge`
    resume:      go on with what is in `out`
    merge:       folders of shards of this scan; what none of them counted is counted
    sensitivity: a layer whose channels are removed one by one for every image
    crops:       for how many channels the top images are cut out
    every:       seconds between writes; default as often as takes a twentieth of the time

    The same data and network give the same files to the byte, in one go or killed and resumed, whole or in shards (on
    one kind of machine, with one number of threads: sums in a convolution depend on both). Memory does not grow with
    the number of images. Raises InputError, Unsupported or UnknownName in a sentence.
    """
    from innersight.network import open as open_network
    from innersight.scanning import store
    from innersight.scanning.data import open_data

    if engine not in ENGINES:
        raise errors.unknown("engine", engine, ENGINES)
    for package in ("pyarrow", "sklearn"):
        errors.need(package, "scan", "scanning a data set")
    _check(top, limit, shard, crops)
    net = open_network(net)
    source = open_data(data, root).limited(limit)
    folder = Path(out)
    _check_folder(folder, resume or bool(merge))
    names = [layers] if isinstance(layers, str) else layers
    manifest, plan = _planned(net, source, names, top, sensitivity, crops)
    manifest["shard"] = None if shard is None else f"{shard[0]}/{shard[1]}"
    there = store.read_manifest(folder)
    if there is not None:
        plan = _agreed(folder, manifest, there)
        if there["complete"]:
            store.remove_parts(folder)
            return Scan(folder)
    else:
        with store.plain_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        store.write_json(folder / "manifest.json", manifest)
    with store.Parts(folder, every) as parts:
        for other in merge:
            _absorb(parts, Path(other), manifest)
        wanted = _wanted(source, plan, parts, shard)
        _count(net, source, plan, parts, wanted, engine)
        if shard is not None:
            return Scan(folder)
        _finish(folder, net, source, plan, parts, manifest, crops)
    store.remove_parts(folder)
    return Scan(folder)


def _check(top: int, limit: int | None, shard: tuple[int, int] | None, crops: int) -> None:
    for name, value, least in (("top", top, 1), ("limit", limit, 1), ("crops", crops, 0)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise errors.InputError(f"{name} must be a whole number from {least} on, got {value!r}")
    if shard is not None:
        fits = isinstance(shard, (tuple, list)) and len(shard) == 2 and all(isinstance(v, int) for v in shard)
        if not fits or not 1 <= shard[0] <= shard[1]:
            raise errors.InputError(f"shard must be (i, n), the i-th of n parts, i from 1 to n; got {shard!r}")


def _check_folder(folder: Path, goes_on: bool) -> None:
    from innersight.scanning import store

    if folder.exists() and not folder.is_dir():
        raise errors.InputError(f"{str(folder)!r} is a file; a scan is written into a folder")
    if not folder.is_dir():
        return
    there = store.read_manifest(folder)
    if there is not None and not goes_on:
        state = "complete" if there["complete"] else "unfinished"
        raise errors.InputError(
            f"there is a scan in {str(folder)!r} ({state}): go on with resume=True, or name another folder"
        )
    if there is None and any(not name.startswith(".") for name in os.listdir(folder)):
        raise errors.InputError(f"{str(folder)!r} is not empty and holds no scan: name another folder")


def _planned(
    net: Network, source: Source, layers: Sequence[str] | None, top: int, sensitivity: str | None, crops: int
) -> tuple[dict[str, Any], Plan]:  # fmt: skip
    """The manifest, and the plan in it."""
    import torch

    from innersight.scanning import plan, store

    first = _first(net, source)
    assert first.values is not None
    made = plan.make(
        net, source, net._to_model(first.values), layers=layers, top=top, sensitivity=sensitivity, notes=first.notes
    )
    preprocess = net.preprocess.to_json() if net.preprocess is not None else None
    return {
        "kind": "innersight scan", "format": store.FORMAT, "complete": False, "shard": None,
        "versions": {"innersight": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "network": {"name": net.name, "weights": store.model_hash(net.module), "preprocess": preprocess,
                    "input": list(first.values.shape[1:]), "device": net.device.type},
        "data": source.to_json(), "plan": made.to_json(), "crops": crops, "notes": list(net.notes), "summary": None,
    }, made  # fmt: skip


def _first(net: Network, source: Source) -> Sample:
    """The first image that can be read."""
    numbers: Iterable[int] = itertools.count() if source.size is None else range(source.size)
    if source.size == 0:
        raise errors.InputError(f"the data set {source.name} is empty")
    first = None
    for sample in source.samples(numbers, net.preprocess, net.input_shape):
        if sample.values is not None:
            return sample
        first = first or sample
    why = "it is empty" if first is None else f"none of its images can be read; of the first: {first.problem}"
    raise errors.InputError(f"nothing to scan in {source.name}: {why}")


def _agreed(folder: Path, mine: dict[str, Any], there: dict[str, Any]) -> Plan:
    """The plan that is there, if it is the same scan. How images are batched is as it was begun."""
    from innersight.results import jsonable
    from innersight.scanning import store
    from innersight.scanning.plan import Plan

    parts = ("network", "data", "plan", "crops", "shard", "versions")
    here = {k: jsonable(mine[k]) for k in parts}
    here["plan"]["batch"] = there["plan"]["batch"]
    if here["shard"] is None and there["shard"] is not None:
        raise errors.InputError(
            f"{str(folder)!r} holds shard {there['shard']} of a scan: go on with shard=, or merge it elsewhere"
        )
    if found := store.difference(here, {k: there[k] for k in parts}):
        raise errors.InputError(f"the scan in {str(folder)!r} is another one, it differs in {found}")
    mine["plan"] = there["plan"]
    return Plan.from_json(there["plan"])


def _absorb(parts: Parts, folder: Path, manifest: dict[str, Any]) -> None:
    from innersight.results import jsonable
    from innersight.scanning import store

    there = store.read_manifest(folder) if folder.is_dir() else None
    if there is None:
        raise errors.InputError(f"there is no shard of a scan in {str(folder)!r}")
    if there["complete"]:
        raise errors.InputError(
            f"the scan in {str(folder)!r} is complete already; shards to merge are made with shard="
        )
    same = ("network", "data", "plan", "crops", "versions")
    if found := store.difference({k: jsonable(manifest[k]) for k in same}, {k: there[k] for k in same}):
        raise errors.InputError(f"{str(folder)!r} is no shard of this scan, it differs in {found}")
    with store.Parts(folder) as other:
        parts.absorb(other)


def _wanted(source: Source, plan: Plan, parts: Parts, shard: tuple[int, int] | None) -> Iterable[int]:
    """The blocks that are still to be counted."""
    if source.size is None:
        if shard is not None:
            raise errors.InputError("shards need a data set that knows how many images it has; this loader does not")
        return (b for b in itertools.count() if not parts.has(b))
    total = -(-source.size // plan.block)
    i, n = shard or (1, 1)
    return [b for b in range(total * (i - 1) // n, total * i // n) if not parts.has(b)]


def _count(
    net: Network, source: Source, plan: Plan, parts: Parts, wanted: Iterable[int], engine: str
) -> None:  # fmt: skip
    from innersight.scanning import cluster, engines

    done, total = len(parts.blocks()), 0 if source.size is None else source.size
    if engine == "ray":
        for counts, rows in cluster.on_ray(net, source, plan, list(wanted)):
            parts.take(counts, rows)
            done += len(rows)
            net._report(min(done * plan.block, total), total, "images")
    else:
        for block in engines.local(net, source, plan, wanted):
            parts.add(block)
            done += 1
            net._report(min(done * plan.block, total or done * plan.block), total, "images")
    parts.flush()


def _finish(
    folder: Path, net: Network, source: Source, plan: Plan, parts: Parts, manifest: dict[str, Any], crops: int
) -> None:  # fmt: skip
    from innersight.scanning import findings, store, tables

    counts = parts.fold()
    notes = tables.write(folder, net, source, plan, parts, counts, manifest["network"]["input"], crops)
    channels = [tables.of_layer(counts, i) for i in range(len(plan.layers))]
    findings.write(folder, net, source, plan, channels, counts)
    manifest["notes"] = [*manifest["notes"], *notes]
    manifest["summary"] = _summary(folder)
    manifest["complete"] = True
    store.write_json(folder / "manifest.json", manifest)


def _summary(folder: Path) -> dict[str, Any]:
    import pyarrow.parquet as parquet

    images = parquet.ParquetFile(folder / "images.parquet")
    accuracy = None
    if "correct" in images.schema_arrow.names:
        right = [v for v in images.read(["correct"])["correct"].to_pylist() if v is not None]
        accuracy = sum(right) / len(right) if right else None
    skipped = parquet.ParquetFile(folder / "skipped.parquet").metadata.num_rows
    return {"images": images.metadata.num_rows, "skipped": skipped, "accuracy": accuracy}
