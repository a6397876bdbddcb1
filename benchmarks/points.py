"""What folding, channels-last and the size of a chunk give where a network is run at many points of one picture.

    python benchmarks/points.py [--models resnet18,...] [--kinds gradients,values] [--rounds 5] [--threads 2]
                                [--processor] [--memory]

Ratios to the unit: a forward (values) or a forward and a backward to the input with frozen parameters (gradients), by
hand, once for each point. Each call of ours opens a session of its own, so that it holds folding the weights and the
comparison with a plain run. With `--processor` the time is that of the processor, which other programs on the machine
disturb less; take one thread for it, since idle ones wait busily.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peers import Subject, subject
from torch import nn

from innersight.observe.passes import INPUT, Engine, Request

COUNT = {"gradients": 50, "values": 200}
MODELS = ["resnet18", "resnet50", "mobilenet_v3_large", "vgg16"]


def noise(s: Subject, part: range) -> torch.Tensor:
    """These points around the picture, the same for everybody and made in no time."""
    if "noise" not in s.__dict__:
        s.__dict__["noise"] = 0.1 * torch.randn(16, *s.x.shape[1:], generator=torch.Generator().manual_seed(0))
    return torch.cat([s.x + s.__dict__["noise"][i % 16] * (1 + i / 1000) for i in part])


def by_hand(s: Subject, model: nn.Module, points: torch.Tensor, gradients: bool) -> torch.Tensor:
    if not gradients:
        with torch.no_grad():
            return model(points)[:, s.target]
    points = points.requires_grad_()
    return torch.autograd.grad(model(points)[:, s.target].sum(), points)[0]


def torch_in(batch: int) -> Callable[[Subject, bool, int], torch.Tensor]:
    def run(s: Subject, gradients: bool, count: int) -> torch.Tensor:
        parts = [range(i, min(i + batch, count)) for i in range(0, count, batch)]
        return sum(by_hand(s, s.model, noise(s, part), gradients).sum(0) for part in parts)  # type: ignore[return-value]

    return run


def ours(folded: bool) -> Callable[[Subject, bool, int], torch.Tensor]:
    def run(s: Subject, gradients: bool, count: int) -> torch.Tensor:
        engine = s.__dict__.setdefault("engine", Engine(s.model))  # learnt once, as in `net`
        request = Request(gradients=[INPUT] if gradients else [], score=lambda output: output[:, s.target])
        every, total = s.x.expand(count, *s.x.shape[1:]), torch.zeros(())
        with engine.session():
            size = engine.chunk_size(every, request)
            for passed in engine.chunks(
                every,
                lambda _, part: engine.run(noise(s, range(part.start, part.stop)), request, count if folded else 1),
                size,
            ):
                total = total + (passed.gradients[INPUT] if gradients else passed.output[:, s.target]).sum(0)
        return total

    return run


def captum(batch: int | None) -> Callable[[Subject, bool, int], torch.Tensor]:
    def run(s: Subject, gradients: bool, count: int) -> torch.Tensor:
        from captum.attr import IntegratedGradients

        if not gradients:
            raise NotImplementedError
        attribution = IntegratedGradients(s.model)
        return attribution.attribute(s.x, target=s.target, n_steps=count, internal_batch_size=batch).detach()

    return run


CANDIDATES: dict[str, Callable[[Subject, bool, int], torch.Tensor]] = {
    "torch, one at a time": torch_in(1),
    "torch, 8 at a time": torch_in(8),
    "torch, 16 at a time": torch_in(16),
    "innersight, points=1": ours(folded=False),
    "innersight": ours(folded=True),
    "Captum, 8 at a time": captum(8),
    "Captum, all at once": captum(None),
}


def frozen(model: str) -> Subject:
    s = subject(model, 1)
    s.model.requires_grad_(False)
    return s


def measure(model: str, kind: str, rounds: int, clock: Callable[[], float], only: list[str]) -> None:
    s, gradients, count = frozen(model), kind == "gradients", COUNT[kind]
    times: dict[str, list[float]] = {}
    sums: dict[str, torch.Tensor] = {}
    for r in range(rounds + 1):  # the first, of 8 points, is for warming up
        for who in only:
            gc.collect()
            start = clock()
            try:
                sums[who] = CANDIDATES[who](s, gradients, count if r else 8)
            except NotImplementedError:
                continue
            times.setdefault(who, []).append(clock() - start)
    unit = times[only[0]][1:]
    for who, spent in times.items():
        median = statistics.median(a / b for a, b in zip(spent[1:], unit, strict=True))
        apart = ""
        if not who.startswith("Captum"):
            apart = f"  {float((sums[who] - sums[only[0]]).abs().max() / sums[only[0]].abs().max()):.0e} apart"
        print(f"{model:20} {kind:10} {who:24} {median:.2f} ({min(spent[1:]) / min(unit):.2f}){apart}", flush=True)


def memory(model: str, kind: str, who: str) -> None:
    """MB above what was there before the call; in a process of its own."""
    import torchvision

    x = torch.randn(1, 3, 224, 224)
    s = Subject(model, torchvision.models.get_model(model).eval().requires_grad_(False), x, [], "", by_hand)
    s.__dict__["target"] = 3
    if who.startswith("Captum"):
        import captum.attr  # noqa: F401
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    CANDIDATES[who](s, kind == "gradients", COUNT[kind])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{model:20} {kind:10} {who:24} {(peak - before) / 2**20:.0f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--kinds", default="gradients,values")
    parser.add_argument(
        "--who", default=",".join(c.replace(", ", "; ") for c in CANDIDATES), help="the first is the unit"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--points", type=int, help=f"default {COUNT}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processor", action="store_true", help="measure the processor's time")
    parser.add_argument("--memory", action="store_true", help="the peak of memory of each, instead of time")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    who = [c.replace("; ", ", ") for c in options.who.split(",")]
    if options.points:
        COUNT.update(dict.fromkeys(COUNT, options.points))
    if options.one:
        memory(*options.one.split("|"))
        return
    for model in options.models.split(","):
        for kind in options.kinds.split(","):
            if not options.memory:
                clock = time.process_time if options.processor else time.perf_counter
                measure(model, kind, options.rounds, clock, who)
                continue
            for one in who:
                if kind == "gradients" or not one.startswith("Captum"):
                    subprocess.run(
                        [sys.executable, __file__, f"--threads={options.threads}", "--one", f"{model}|{kind}|{one}"],
                        check=True,
                    )


if __name__ == "__main__":
    main()
