"""How long innersight takes for the main jobs, as ratios to a bare run and beside its peers: `make benchmark`.

    python benchmarks/run.py [--quick] [--models resnet18,...] [--jobs maps,...] [--batches 1,8] [--memory]
                             [--log results.json] [--out docs/benchmarks.md]

All candidates of a job run in one process, in turn, for several rounds; what is reported are ratios to the job's unit,
which hold from machine to machine where seconds do not. Before that, each candidate's values are compared with those
of plain torch. With `--memory` each runs once more in a process of its own, for its peak of memory (on Linux).
With `--log` results are kept, and what is there is not measured again: hours of measuring can be done in pieces.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import explaining  # noqa: F401  (adds its jobs to JOBS)
import numpy as np
import torch
from peers import JOBS, Candidate, Job, NotOffered, Run, Subject, arrays, subject
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

MODELS = {
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "vgg16": "VGG-16",
    "mobilenet_v3_large": "MobileNetV3",
    "vit_b_16": "ViT-B/16",
}
SMALL = ["resnet18", "mobilenet_v3_large"]
THREADS = 2
LONG = 3.0  # seconds of a call that needs no more warming up than the one whose values are compared
TOLERANCE = 1e-5  # of the largest value
# Batches say something where arithmetic outweighs calls; ViT's would take longer than they tell.
BATCHED = [("resnet18", "maps"), ("resnet18", "gradient"), ("resnet50", "gradient"), ("resnet50", "gradcam")]
PACKAGES = ["torch", "torchvision", "captum", "grad-cam", "torchlens", "zennit"]


@dataclass
class Row:
    """One candidate on one network: its ratios to the unit, or why there are none.

    median: of the rounds' ratios; best: its fastest call over the unit's fastest call
    error:  largest difference from the reference, over the reference's largest value; None where none was compared
    memory: MB above what was there before the call
    first:  seconds of the call whose values were compared
    """

    candidate: Candidate
    median: float | None = None
    best: float | None = None
    error: float | None = None
    memory: float | None = None
    first: float = 0.0
    refusal: str = ""


@dataclass
class Result:
    """One job on one network with one batch size, over so many rounds."""

    job: Job
    model: str
    batch: int
    rounds: int
    rows: list[Row] = field(default_factory=list)

    @property
    def key(self) -> str:
        return f"{self.job.key},{self.model},{self.batch}"

    @property
    def title(self) -> str:
        return MODELS[self.model] + (f", batch {self.batch}" if self.batch > 1 else "")


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def prepare(job: Job, s: Subject) -> tuple[list[Row], list[Run | None]]:
    """Every candidate set up, run once, and its values compared."""
    rows: list[Row] = []
    runs: list[Run | None] = []
    found: list[list[np.ndarray] | None] = []
    for candidate in job.candidates:
        row, run, values = Row(candidate), None, None
        if candidate.only == "batch 1" and len(s.x) > 1:
            row.refusal = "run with batch 1 only, for its length"
        elif candidate.only == "small networks" and s.name not in SMALL:
            row.refusal = "run on small networks only, for its length"
        else:
            try:
                run = candidate.prepare(s)
                with run.around():
                    start = time.perf_counter()
                    result = run.call()
                    row.first = time.perf_counter() - start
                values = arrays(run.values(result)) if run.values else None
                del result
            except NotOffered as refusal:
                row.refusal, run = str(refusal), None
            except Exception as error:  # a peer that fails is a row, not the end
                row.refusal, run = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}", None
        rows.append(row)
        runs.append(run)
        found.append(values)
    reference = found[job.reference]
    for row, run, values in zip(rows, runs, found, strict=True):
        if values is not None and run is not None and reference is not None:
            row.error = difference(values, stretched(reference) if run.scaled else reference)
    return rows, runs


def difference(values: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> float:
    if [v.shape for v in values] != [r.shape for r in right]:
        return float("inf")
    return max(float(np.abs(v - r).max() / np.abs(r).max()) for v, r in zip(values, right, strict=True))


def stretched(maps: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Each image's map from 0 to 1."""
    low = [m - m.min((1, 2), keepdims=True) for m in maps]
    return [m / m.max((1, 2), keepdims=True) for m in low]


def measure(job: Job, s: Subject, rounds: int, least: float, tick: object) -> list[Row]:
    """`rounds` rounds in which every candidate gets its turn, in an order that changes; see `Row`.

    Without rounds it is the call whose values are compared that counts: for what takes minutes.
    """
    rows, runs = prepare(job, s)
    times: list[list[float]] = [[] for _ in rows]
    timed = [i for i, run in enumerate(runs) if run is not None]
    if not rounds:
        for i in timed:
            rows[i].median = rows[i].best = rows[i].first / rows[timed[0]].first
        return rows
    repeats = 1
    warm = rows[timed[0]].first < LONG  # a round for warming up, and to learn how long the unit takes
    for r in range(rounds + warm):
        shift = r % len(timed)
        for i in [timed[0], *timed[1 + shift :], *timed[1 : 1 + shift]]:
            run = runs[i]
            assert run is not None
            times[i].append(fastest(run, repeats, least))
            tick()  # type: ignore[operator]
        if r == 0 and warm:
            repeats = int(max(1, min(10, least / times[0][0])))
    for i in timed:
        kept, unit = times[i][warm:], times[0][warm:]
        rows[i].median = statistics.median(a / b for a, b in zip(kept, unit, strict=True))
        rows[i].best = min(kept) / min(unit)
    return rows


def fastest(run: Run, repeats: int, least: float) -> float:
    """Seconds of the fastest of some calls; what takes long is called once or twice, what takes nothing more often."""
    gc.collect()
    best, spent, calls = float("inf"), 0.0, 0
    with run.around():
        while calls < repeats and (calls < 2 or spent < 3 * least):
            start = time.perf_counter()
            result = run.call()
            took = time.perf_counter() - start
            del result
            best, spent, calls = min(best, took), spent + took, calls + 1
    return best


def peak_memory(job: Job, model: str, batch: int, index: int) -> float | None:
    """MB that one candidate's call needs above what its process held before it, in a process of its own."""
    command = [sys.executable, __file__, "--one", f"{job.key},{model},{batch},{index}"]
    done = subprocess.run(command, capture_output=True, text=True)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def run_one(job: str, model: str, batch: str, index: str) -> None:
    s = subject(model, int(batch), calibrated=False)
    run = JOBS[job].candidates[int(index)].prepare(s)
    with run.around():
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not hold what the call needs
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        before = resident("VmRSS")
        result = run.call()
        peak = resident("VmHWM")
    del result
    print(max(0.0, (peak - before) / 2**20))


def resident(name: str) -> int:
    """Bytes of this process's memory: VmRSS now, VmHWM at its peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(f"{name}:")))


# ---------------------------------------------------------------------------------------------------------------------
# Telling


def keep(log: Path, results: Sequence[Result]) -> None:
    told = {
        r.key: {"rounds": r.rounds, "rows": {_who(row.candidate): _numbers(row) for row in r.rows}} for r in results
    }
    log.write_text(json.dumps(told, indent=1))


def kept(log: Path) -> list[Result]:
    """What was measured before; candidates that did not exist then are rows that say so."""
    found = []
    for key, told in json.loads(log.read_text()).items() if log.is_file() else ():
        job, model, batch = key.split(",")
        result = Result(JOBS[job], model, int(batch), told["rounds"])
        for candidate in JOBS[job].candidates:
            numbers = told["rows"].get(_who(candidate), {"refusal": "not measured"})
            result.rows.append(Row(candidate, **numbers))
        found.append(result)
    return found


def _who(candidate: Candidate) -> str:
    return f"{candidate.who}: {candidate.setting}"


def _numbers(row: Row) -> dict[str, object]:
    return {f.name: getattr(row, f.name) for f in fields(row) if f.name != "candidate"}


def cell(row: Row) -> str:
    return "—" if row.median is None else f"{row.median:.2f} ({row.best:.2f})"


def remarks(results: Sequence[Result]) -> list[str]:
    """What a table of ratios does not say: who did not take part, and whose values differ."""
    said: dict[str, list[str]] = {}
    for result in results:
        for row in result.rows:
            who = f"{row.candidate.who}, {row.candidate.setting}"
            if row.refusal:
                said.setdefault(f"{who}: {row.refusal}", []).append(result.title)
            elif row.error is not None and not row.error <= TOLERANCE:
                how = "differ in shape" if row.error == float("inf") else f"differ by {row.error:.0e} of the largest"
                said.setdefault(f"{who}: its values {how}", []).append(result.title)
    return [f"{text} ({', '.join(where)})" for text, where in said.items()]


def by_job(results: Sequence[Result]) -> dict[str, list[Result]]:
    return {key: found for key in JOBS if (found := [r for r in results if r.job.key == key])}


def show(results: Sequence[Result], console: Console) -> None:
    for key, found in by_job(results).items():
        table = Table(title=f"{JOBS[key].title}. {JOBS[key].text}", title_justify="left")
        table.add_column("who")
        table.add_column("how")
        for result in found:
            table.add_column(result.title, justify="right")
        for rows in zip(*(result.rows for result in found), strict=True):
            table.add_row(rows[0].candidate.who, rows[0].candidate.setting, *map(cell, rows))
        console.print(table)
        for remark in remarks(found):
            console.print(f"  {remark}")


def markdown(results: Sequence[Result]) -> str:
    rounds = sorted({r.rounds for r in results})
    over = f"{rounds[0]}" if len(rounds) == 1 else f"{rounds[0] or 1} to {rounds[-1]}"
    lines = [
        "# Benchmarks",
        "",
        f"Written by `benchmarks/run.py {' '.join(sys.argv[1:])}`. Ratios of wall time; the first row of each table is "
        "the unit. A cell holds the "
        f"median over {over} interleaved rounds and, in brackets, the fastest call over the unit's fastest call, "
        "which other programs on the machine disturb least. Batch 1 where nothing else is said, 224x224, random "
        "weights, BatchNorm statistics from one pass over noise.",
        "",
        "Before timing, the values of candidates are compared with the job's reference where their definitions agree; "
        f"each table says whether that was so. Equal means within {TOLERANCE:g} of the largest value; what differs by "
        "more is listed. Wrapping models, leaving hooks, tracing graphs and learning the network is done once, outside "
        "of the time.",
        "",
        f"{platform.machine()}, {os.cpu_count()} CPU cores, {THREADS} threads; " + ", ".join(versions()) + ".",
    ]
    for key, found in by_job(results).items():
        lines += ["", f"## {JOBS[key].title}", "", JOBS[key].text, ""]
        lines += table_lines(found, cell)
        compared = any(row.error is not None for result in found for row in result.rows)
        lines += ["", "Values were compared." if compared else "Values were not compared."]
        if any(row.memory is not None for result in found for row in result.rows):
            lines += ["", "Peak memory above what was there before the call, MB:", ""]
            lines += table_lines(found, lambda row: "—" if row.memory is None else f"{row.memory:.0f}")
        if notes := remarks(found):
            lines += ["", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def table_lines(found: Sequence[Result], say: object) -> list[str]:
    lines = ["| | | " + " | ".join(r.title for r in found) + " |", "|---|---|" + "---:|" * len(found)]
    for rows in zip(*(result.rows for result in found), strict=True):
        cells = " | ".join(say(row) for row in rows)  # type: ignore[operator]
        lines.append(f"| {rows[0].candidate.who} | {rows[0].candidate.setting} | {cells} |")
    return lines


def versions() -> list[str]:
    import innersight

    found = [f"innersight {innersight.__version__}", f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} not installed")
    return found


# ---------------------------------------------------------------------------------------------------------------------


def chosen(given: str | None, known: Sequence[str], what: str) -> list[str]:
    names = given.split(",") if given else list(known)
    if wrong := [n for n in names if n not in known]:
        raise SystemExit(f"no {what} {wrong[0]!r}; there are {', '.join(known)}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds on ResNet-18, batch 1")
    parser.add_argument("--models", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--jobs", help=f"of {', '.join(JOBS)}")
    parser.add_argument("--batches", default="1,8", help="1, 8 or both; 8 is run where it says something")
    parser.add_argument("--rounds", type=int, default=7, help="0: one call each, for what takes minutes")
    parser.add_argument("--memory", action="store_true", help="each candidate's peak of memory, too")
    parser.add_argument("--log", type=Path, help="a file of results, which is gone on with")
    parser.add_argument("--out", type=Path, help="a Markdown file for the tables")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # the peers'
    torch.set_num_threads(THREADS)
    if options.one:
        run_one(*options.one.split(","))
        return
    models = chosen(options.models or ("resnet18" if options.quick else None), list(MODELS), "model")
    jobs = chosen(options.jobs, list(JOBS), "job")
    batches = chosen("1" if options.quick else options.batches, ["1", "8"], "batch size")
    rounds, least = (2, 0.0) if options.quick else (options.rounds, 0.3)
    console = Console()
    results = kept(options.log) if options.log else []
    done = {r.key for r in results}
    bar = [SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.completed} calls"), TimeElapsedColumn()]
    for batch in map(int, batches):
        for model in models:
            wanted = [j for j in jobs if batch == 1 or (model, j) in BATCHED]
            wanted = [j for j in wanted if f"{j},{model},{batch}" not in done]
            s = subject(model, batch) if wanted else None
            for key in wanted:
                assert s is not None
                result = Result(JOBS[key], model, batch, rounds)
                with Progress(*bar, console=console, transient=True) as progress:
                    task = progress.add_task(f"{result.title}: {JOBS[key].title}")
                    result.rows = measure(JOBS[key], s, rounds, least, lambda t=task, p=progress: p.advance(t))
                if options.memory:
                    for index, row in enumerate(result.rows):
                        row.memory = None if row.refusal else peak_memory(JOBS[key], model, batch, index)
                results.append(result)
                if options.log:  # each time: an interrupted run leaves what it has
                    keep(options.log, results)
                if options.out:
                    options.out.write_text(markdown(results))
                console.print(f"{result.title}, {JOBS[key].title}: done")
    results.sort(key=lambda r: (r.batch, list(MODELS).index(r.model)))
    if options.out:
        options.out.write_text(markdown(results))
    show(results, console)


if __name__ == "__main__":
    main()
