"""What a scan costs beside the bare model with the same reader, and that its memory does not grow with the data.

    python benchmarks/scanning.py [--images 192] [--rounds 3] [--sizes 1000,5000,20000,50000]

Throughput: ResNet-18 on JPEG files of 256x256 pixels, every convolution watched, top 9 kept; bare is a loop that reads
the same files by the same threads and runs the model, as it comes and channels-last. Ratios of medians of interleaved
rounds, of the time on the clock and of the CPU's time. Memory: the small CNN of the demo with all its layers, each size
in a process of its own; the peak resident set, and by how much it exceeds that of the smallest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import innersight
from innersight.scanning import _planned, engines, store
from innersight.scanning.data import open_data


def pictures(folder: Path, count: int) -> None:
    generator = np.random.default_rng(0)
    for i in range(count):
        coarse = generator.integers(0, 255, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(coarse).resize((256, 256), Image.Resampling.BICUBIC).save(folder / f"{i:04}.jpg", quality=90)


def throughput(images: int, rounds: int) -> dict[str, dict[str, float]]:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = resnet18(weights=None).eval()
    net = innersight.open(model, input_shape=(3, 224, 224), preprocess={"size": [224, 224], "resize_to": 256})
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "pictures"
        folder.mkdir()
        pictures(folder, images)
        source = open_data(folder)
        _, plan = _planned(net, source, ["Conv2d"], 9, None, 0)

        def bare(layout: torch.memory_format) -> None:
            batch = []
            for sample in source.samples(range(images), net.preprocess, net.input_shape):
                batch.append(sample.values)
                if len(batch) == plan.batch or sample.index == images - 1:
                    with torch.no_grad():
                        model(torch.cat(batch).to(memory_format=layout))
                    batch = []

        def scan() -> None:
            place = Path(root) / f"out{time.monotonic_ns()}"
            place.mkdir()
            blocks = range(-(-images // plan.block))
            with store.Parts(place) as parts:
                for block in engines.local(net, source, plan, blocks):
                    parts.add(block)

        jobs = {
            "bare": lambda: bare(torch.contiguous_format),
            "bare, channels-last": lambda: bare(torch.channels_last),
            "scan": scan,
        }
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
        for _ in range(rounds):
            for name, job in jobs.items():
                wall, cpu = time.perf_counter(), time.process_time()
                job()
                seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: {"wall": statistics.median(w for w, _ in times), "cpu": statistics.median(c for _, c in times)}
        for name, times in seconds.items()
    }


class Generated:
    """As many images of 28x28 pixels as are asked for, none of them kept."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.rand((1, 28, 28), generator=torch.Generator().manual_seed(i)), i % 10


def memory(count: int) -> dict[str, float]:
    """In this process: run once each."""
    from innersight.data.small_cnn import SimpleCNN

    torch.manual_seed(0)
    net = innersight.open(SimpleCNN().eval(), input_shape=(1, 28, 28))
    with tempfile.TemporaryDirectory() as root:
        start = time.perf_counter()
        found = innersight.scan(net, Generated(count), Path(root) / "out", crops=64)
        seconds = time.perf_counter() - start
        size = sum(f.stat().st_size for f in found.folder.rglob("*") if f.is_file())
    status = Path("/proc/self/status").read_text()  # not getrusage: its peak is handed on from parent to child
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    return {"images": count, "seconds": seconds, "peak_mb": peak, "artefact_mb": size / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", default="1000,5000,20000,50000")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.one:
        print(json.dumps(memory(given.one)))
        return
    if given.images:
        found = throughput(given.images, given.rounds)
        for name in found:
            wall, cpu = (found[name][kind] for kind in ("wall", "cpu"))
            of = [f"{found[b][kind] / found[name][kind]:.2f}" for b in list(found)[:2] for kind in ("wall", "cpu")]
            print(f"{name:20} {given.images / wall:6.1f} images/s, {given.images / cpu:6.1f} a CPU second; of "
                  f"bare {of[0]} (CPU {of[1]}), of bare channels-last {of[2]} (CPU {of[3]})", flush=True)  # fmt: skip
    for size in filter(None, given.sizes.split(",")):
        command = [sys.executable, __file__, "--one", size]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        one = json.loads(done.stdout.splitlines()[-1])
        print(f"{one['images']:6} images: peak {one['peak_mb']:.0f} MB, {one['images'] / one['seconds']:.0f} images/s, "
              f"artefact {one['artefact_mb']:.1f} MB", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
