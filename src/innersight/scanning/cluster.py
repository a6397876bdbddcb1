"""Counting blocks on a Ray cluster: tasks read images, one actor for each device runs the network.

    innersight.scan(net, "photos/", "out/", engine="ray")

The artefact is that of the local engine. Actors and tasks that die are replaced by Ray and do their blocks again, which
gives the same counts; a block is counted once, when it arrives here.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from innersight import errors
from innersight.scanning import engines, store
from innersight.scanning.plan import Plan

if TYPE_CHECKING:
    from innersight.network import Network
    from innersight.scanning.accumulators import Counts
    from innersight.scanning.data import Source

_LARGEST = 4  # 2 ** 4 blocks travel together at most: counts are large, and merge into fewer where they are made
_ROUNDS = 8  # so many groups for each actor at least, or the last ones would wait for each other


def on_ray(
    net: Network, source: Source, plan: Plan, wanted: Sequence[int]
) -> Iterator[tuple[dict[store.Node, Counts], dict[int, tuple]]]:  # fmt: skip
    """The counts and rows of the wanted blocks, in whatever order they are ready.

    A running Ray is used; otherwise the one that RAY_ADDRESS names, or one on this machine for as long as it takes.
    Every node must see the files of the data set under the same path. Raises Unsupported for data that can only be read
    from its beginning and for models that cannot be sent, InputError where Ray has too few CPUs free.
    """
    if source.item is None:
        raise errors.Unsupported(
            f"Ray reads images by their number, which {source.name} does not offer: hand in the data set itself, or "
            "use engine='local'"
        )
    if not wanted:
        return
    ray = errors.need("ray", "ray", "scanning on a cluster")
    errors.need("ray.data", "ray", "scanning on a cluster")
    started = not ray.is_initialized()
    if started:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
    context = ray.data.DataContext.get_current()
    bars, context.enable_progress_bars = context.enable_progress_bars, False
    try:
        for row in _dataset(ray, net, source, plan, wanted).iter_rows():
            yield pickle.loads(row["found"])
    except ray.exceptions.RayError as error:
        raise _plain(error) from error
    finally:
        context.enable_progress_bars = bars
        if started:
            ray.shutdown()


def devices(ray: Any, gpu: bool) -> tuple[int, int]:
    """How many actors run the network, and how many CPUs are left to read images."""
    free = ray.available_resources()
    cpus, gpus = int(free.get("CPU", 0)), int(free.get("GPU", 0))
    if gpu:
        if not gpus:
            raise errors.InputError("the network is on a GPU and Ray has none free: wait, or open it with device='cpu'")
        if not cpus:
            raise errors.InputError("Ray has no CPU free to read images: without one its actors would wait for ever")
        return gpus, cpus
    if cpus < 2:
        raise errors.InputError(
            f"Ray has {cpus} CPU{'s' * (cpus != 1)} free and a scan needs two, one to run the network and one to read "
            "images: without it its actors would wait for ever; start Ray with more, or use engine='local'"
        )
    return cpus - 1, 1


def _dataset(ray: Any, net: Network, source: Source, plan: Plan, wanted: Sequence[int]) -> Any:
    import torch

    gpu = net.device.type == "cuda"
    actors, readers = devices(ray, gpu)
    groups = grouped(wanted, actors)
    actors = min(actors, len(groups))
    net._report(0, len(wanted), f"blocks on {actors} actors of Ray, CPUs left to read: {readers}")
    model = _sent(ray, net)
    data = ray.put(source)
    numbers = ray.data.from_items([{"blocks": group} for group in groups], override_num_blocks=len(groups))
    read = numbers.map(
        _read,
        fn_kwargs={"data": data, "plan": plan, "preprocess": net.preprocess, "shape": net.input_shape},
        num_cpus=1,
    )
    return read.map_batches(
        _Counter, fn_constructor_kwargs={"model": model, "plan": plan, "threads": torch.get_num_threads()},
        batch_size=1, batch_format="numpy", compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=0 if gpu else 1, num_gpus=1 if gpu else None, max_restarts=-1, max_task_retries=-1,
    )  # fmt: skip


def grouped(wanted: Sequence[int], actors: int) -> list[list[int]]:
    """The blocks in groups that merge into one node each, where all of the node's blocks are wanted."""
    level = int(np.log2(max(len(wanted) / (_ROUNDS * actors), 1)).clip(0, _LARGEST))
    groups: dict[int, list[int]] = {}
    for block in wanted:
        groups.setdefault(block >> level, []).append(block)
    return list(groups.values())


def _sent(ray: Any, net: Network) -> Any:
    from innersight.formats import Opened

    opened = Opened(
        net.module, net.name, net.input_shape, net.preprocess, net.labels, list(net.notes), net.engine.call,
        net.engine.fixed_batch, net.quantisation,
    )  # fmt: skip
    try:
        return ray.put((opened, net._output, net.device.type))
    except Exception as error:  # pickle raises anything
        said = str(error).strip().splitlines()
        raise errors.Unsupported(
            f"{net.name} cannot be sent to other processes ({said[0] if said else type(error).__name__}): scan it in "
            "shards with engine='local' (shard=, merge=)"
        ) from error


def _read(row: dict[str, Any], data: Any, plan: Plan, preprocess: Any, shape: Any) -> dict[str, Any]:
    """A group of blocks, by number, with their images; without the pictures, which the network has no use for."""
    import ray

    source: Source = ray.get(data)
    end = source.size or 0
    blocks = {}
    for b in map(int, row["blocks"]):
        numbers = range(b * plan.block, min((b + 1) * plan.block, end))
        blocks[b] = [replace(sample, picture=None) for sample in source.samples(numbers, preprocess, shape)]
    return {"blocks": pickle.dumps(blocks)}


class _Counter:
    """Runs the network on one device."""

    def __init__(self, model: Any, plan: Plan, threads: int):
        import ray
        import torch

        from innersight.network import Network

        # As many as in the process that asks: sums in a convolution depend on how they are cut up.
        torch.set_num_threads(threads)
        opened, output, device = ray.get(model)
        opened.module.to(device)
        self.net, self.plan = Network(opened, output=output), plan

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        found = []
        for data in batch["blocks"]:
            with self.net.engine.session():
                blocks = [engines.measure(self.net, self.plan, b, s) for b, s in pickle.loads(data).items()]
            counts = store.joined({(0, block.number): block.counts for block in blocks})
            found.append(pickle.dumps((counts, {block.number: (block.rows, block.said) for block in blocks})))
        return {"found": np.array(found, dtype=object)}


def _plain(error: Exception) -> errors.InnersightError:
    """What Ray wrapped, or its own first line."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, errors.InnersightError):
            return inner
        cause = getattr(inner, "cause", None)
        inner = cause if isinstance(cause, BaseException) and cause is not inner else inner.__cause__
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return errors.InputError(f"Ray gave up: {lines[-1].strip() if lines else type(error).__name__}")
