"""Try the observer on every architecture of torchvision and on one of each timm module: `make sweep`.

For each, with random weights: the output under the observer equals the plain output, every value that a forward hook
can see equals what the hook sees, the input has a finite gradient (or the refusal is clear), removing channels of a
layer and running only what follows gives what whole runs give, and the model is left as it was found, from train mode.
Results are appended to a JSON-lines file, so that a broken run is taken up where it stopped; the table of them all is
written to the documentation.

    python benchmarks/sweep.py [--family torchvision|timm] [--only NAME] [--out docs/sweep.md] [--again]
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from innersight import errors, targets
from innersight.observe import observer
from innersight.observe.passes import Engine, Request
from innersight.observe.replay import Replay

LARGEST = 150_000_000  # parameters; larger ones do not fit beside others into a common machine
PICTURES = [(3, s, s) for s in (96, 128, 224, 256, 288, 384)]
VIDEOS = [(3, 8, 112, 112), (3, 16, 112, 112), (3, 14, 224, 224), (3, 16, 224, 224)]
SKIPPED = {
    "quantization": "torchvision's quantized twins run integer kernels that no function mode sees; "
    "they have the layers of the float architectures above",
    "optical_flow": "RAFT takes two pictures",
}

# ---------------------------------------------------------------------------------------------------------------------
# Which models


def torchvision_models() -> Iterator[str]:
    import torchvision

    for name in torchvision.models.list_models():
        builder = torchvision.models.get_model_builder(name)
        if not any(f".{left_out}" in builder.__module__ for left_out in SKIPPED):
            yield f"torchvision:{name}"


# Small variants are called so; the first word that fits decides.
_SMALL = "test_ atto femto pico zepto nano _xxt xxs _xxsmall xsmall _xs _tiny _t0 _b0 _s0 _u1 _050 _035 mini _18 18 _s_ small _s tiny 12 14 16 lite base"  # noqa: E501
_SMALL_WORDS = _SMALL.split()[1:]


def timm_models() -> Iterator[str]:
    """The smallest architecture of each timm module, as far as names tell and the parameters confirm."""
    import timm

    for module in sorted(timm.list_modules()):
        names = sorted(timm.list_models(module=module))
        if names:
            yield f"timm:{smallest(names)}"


def smallest(names: list[str]) -> str:
    import timm

    def rank(name: str) -> int:
        return next((i for i, word in enumerate(_SMALL_WORDS) if word in name), len(_SMALL_WORDS))

    best, fewest = names[0], float("inf")
    for name in sorted(names, key=rank)[:4]:
        try:
            with torch.device("meta"):
                count = sum(p.numel() for p in timm.create_model(name, pretrained=False).parameters())
        except Exception:  # not every architecture can be built without memory; then the name decides
            count = LARGEST - 1
        if count < fewest:
            best, fewest = name, count
    return best


def build(name: str) -> nn.Module:
    family, _, arch = name.partition(":")
    if family == "timm":
        import timm

        return timm.create_model(arch, pretrained=False)
    import torchvision

    builder = torchvision.models.get_model_builder(arch)
    options: dict[str, Any] = {"weights": None}
    if ".detection" in builder.__module__:  # untrained detectors are sure of nothing: let them answer all the same
        few = {"detections_per_img": 10, "box_detections_per_img": 10}
        low = {"score_thresh": 0.0, "box_score_thresh": 0.0}
        box = "rcnn" in arch
        options |= {"weights_backbone": None, "min_size" if box else "_": 128, "max_size" if box else "_": 160}
        options |= {k: v for k, v in (few | low).items() if k.startswith("box") == box}
        options.pop("_", None)
    elif ".segmentation" in builder.__module__:
        options |= {"weights_backbone": None, "aux_loss": True} if "lraspp" not in arch else {"weights_backbone": None}
    elif arch in ("googlenet", "inception_v3"):
        options["init_weights"] = True
    return builder(**options)


# ---------------------------------------------------------------------------------------------------------------------
# One model


def is_detector(module: nn.Module) -> bool:
    return ".detection" in type(module).__module__


def call_of(module: nn.Module) -> Callable[..., Any] | None:
    return (lambda m, x: m(list(x))) if is_detector(module) else None


def plain(module: nn.Module, x: torch.Tensor) -> Any:
    call = call_of(module)
    with torch.no_grad():
        return call(module, x.clone()) if call else module(x.clone())


def fitting_input(module: nn.Module, shapes: list[tuple[int, ...]]) -> torch.Tensor:
    """A random picture of the smallest size the model takes."""
    problem: Exception | None = None
    for shape in shapes:
        x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        x = x.sigmoid() if is_detector(module) else x
        try:
            if all(t.numel() for t in observer.tensors_in(plain(module, x))):
                return x
        except Exception as error:
            problem = error
    raise RuntimeError("no input size fits") from problem


def shapes_for(name: str, module: nn.Module) -> list[tuple[int, ...]]:
    if ".video" in type(module).__module__:
        return VIDEOS
    cfg = getattr(module, "pretrained_cfg", None) or {}
    own = [tuple(cfg["input_size"])] if name.startswith("timm:") and cfg.get("input_size") else []
    return own if cfg.get("fixed_input_size") else [(own[0][0] if own else 3, *s[1:]) for s in PICTURES] + own


def hooked(module: nn.Module, x: torch.Tensor) -> tuple[Any, dict[str, list[torch.Tensor]]]:
    """The plain output and what a hook on each module sees, copied at once, one value a call."""
    seen: dict[str, list[torch.Tensor]] = {}

    def hook_for(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            t = observer.first_tensor(output)
            if t is not None:
                seen.setdefault(path, []).append(t.detach().clone())

        return hook

    handles = [m.register_forward_hook(hook_for(p)) for p, m in module.named_modules() if p]
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return plain(module, x), seen
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for handle in handles:
            handle.remove()


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if torch.equal(a, b) or not a.numel():
        return 0.0
    if not a.is_floating_point():
        return float("inf")
    return float((a.double() - b.double()).abs().nan_to_num(float("inf")).max())


def state(module: nn.Module) -> dict[str, Any]:
    """Everything about a model, and about torch, that must be the same behind a pass."""
    hooks = "_forward_hooks _forward_pre_hooks _backward_hooks _backward_pre_hooks".split()
    return {
        "values": {k: v.clone() for k, v in module.state_dict().items()},
        "objects": [id(t) for t in (*module.parameters(), *module.buffers())],
        "training": [m.training for m in module.modules()],
        "hooks": [len(getattr(m, h)) for m in module.modules() for h in hooks],
        "global hooks": len(nn.modules.module._global_forward_hooks) + len(nn.modules.module._global_forward_pre_hooks),
        "gradients": [(p.requires_grad, p.grad is None) for p in module.parameters()],
        "random": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
    }


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Which entries of the state differ."""

    def same(key: str) -> bool:
        a, b = before[key], after[key]
        if key == "random":
            return torch.equal(a, b)
        if key == "values":
            return a.keys() == b.keys() and all(difference(a[k], b[k]) == 0 for k in a)
        return a == b

    return [key for key in before if not same(key)]


def score(output: Any) -> torch.Tensor:
    main, _ = targets.main_tensor(output)
    return main.flatten(1)[:, :10].sum(1) if main.dim() > 1 else main


def examine(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    module = build(name).eval()
    parameters = sum(p.numel() for p in module.parameters())
    if parameters > LARGEST:
        return {"skipped": f"{parameters / 1e6:.0f}M parameters"}
    x = fitting_input(module, shapes_for(name, module))
    bare, (expected, seen) = plain(module, x), hooked(module, x)
    module.train()
    before = state(module)
    started = time.perf_counter()
    engine = Engine(module, call=call_of(module))
    with engine.session():
        recording = engine.recording(x)
        names = {n.index: n.name for n in recording.nodes if n.kind != "sink" and n.name != "input" and n.shapes}
        wanted = {i for calls in recording.aliases.values() for i in calls} & names.keys()
        read = engine.run(x, Request(read=[names[i] for i in sorted(wanted)]))
        gradient = input_gradient(engine, x)
        replayed = "" if is_detector(module) else replay(engine, x, recording)
    seconds = time.perf_counter() - started
    result: dict[str, Any] = {"input": list(x.shape[1:]), "parameters": parameters, "layers": len(recording.layers)}
    pairs = list(zip(observer.tensors_in(read.output), observer.tensors_in(expected), strict=True))
    fused = list(zip(observer.tensors_in(read.output), observer.tensors_in(bare), strict=True))
    compared, unseen, worst = 0, 0, 0.0
    for path, values in seen.items():
        calls = recording.aliases.get(path, [])
        for k, value in enumerate(values):
            if k >= len(calls):
                unseen += 1
                continue
            if calls[k] in names:
                compared += 1
                worst = max(worst, difference(read.values[names[calls[k]]], value))
    return result | {
        "maps": compared,
        "unseen": unseen,
        "output": max((difference(a, b) for a, b in pairs), default=0.0),
        "output_fused": max((difference(a, b) for a, b in fused), default=0.0),
        "difference": worst,
        "gradient": gradient,
        "replay": replayed,
        "state": ", ".join(changed(before, state(module))) or "unchanged",
        "seconds": round(seconds, 2),
    }


def input_gradient(engine: Engine, x: torch.Tensor) -> str:
    try:
        gradient = engine.run(x, Request(gradients=["input"], score=score)).gradients["input"]
    except errors.InnersightError as refusal:
        return f"refused: {refusal}"
    if gradient is None:
        return "none"
    return "finite" if bool(torch.isfinite(gradient).all()) else "NOT FINITE"


def replay(engine: Engine, x: torch.Tensor, recording: observer.Recording) -> str:
    """Two channels of a layer two thirds down the network removed: by replay, and by whole runs."""
    layers = [n for n in recording.layers if n.parameters and not n.inplace]
    if not layers:
        return "no layer"
    layer = layers[len(layers) * 2 // 3]
    runs = Replay(engine, x, layer.name)
    axis = 1 if runs.value.dim() > 3 and layer.op != "linear" else runs.value.dim() - 1
    channels = range(min(2, runs.value.shape[axis]))
    found = list(observer.tensors_in(runs.run(runs.without(channels, axis))))
    worst = 0.0
    for index, channel in enumerate(channels):
        value = runs.without([channel], axis)
        whole = engine.run(x, Request(change={layer.name: lambda _, v=value: v.clone()})).output  # type: ignore[misc]
        for a, b in zip(found, observer.tensors_in(whole), strict=True):
            scale = float(b.abs().max()) or 1.0
            worst = max(worst, difference(a.narrow(0, index * b.shape[0], b.shape[0]), b) / scale)
    return f"{worst:.0e}" + ("" if runs.skips else " whole") + ("" if runs.together else " alone")


# ---------------------------------------------------------------------------------------------------------------------
# All of them


def work(names: list[str], log: Path) -> None:
    """Examine one after the other; what has begun is written down too, so that a model that kills us is known."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in names:
        append(log, {"name": name, "begun": True})
        try:
            result = examine(name)
        except Exception as error:
            traceback.print_exc()
            result = {"failed": f"{type(error).__name__}: {error}"[:300]}
        append(log, {"name": name, **result})
        print(name, json.dumps(result), flush=True)
        gc.collect()


def append(log: Path, entry: dict[str, Any]) -> None:
    with log.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def results_in(log: Path) -> dict[str, dict[str, Any]]:
    """The last word on each model; one that was begun and never ended took the process with it."""
    results: dict[str, dict[str, Any]] = {}
    for line in log.read_text().splitlines() if log.exists() else ():
        entry = json.loads(line)
        results[entry.pop("name")] = {"failed": "the process died"} if entry.get("begun") else entry
    return results


def good(r: dict[str, Any]) -> bool:
    return (
        "failed" not in r and "skipped" not in r and r["output"] == 0 and r["difference"] == 0
        and r["output_fused"] <= 1e-5 and r["state"] == "unchanged" and r["gradient"] != "NOT FINITE"
        and (not r["replay"] or r["replay"] == "no layer" or float(r["replay"].split()[0]) <= 1e-3)
    )  # fmt: skip


def table(results: dict[str, dict[str, Any]]) -> str:
    run = {n: r for n, r in results.items() if "skipped" not in r}
    done = [r for r in run.values() if "failed" not in r]

    def count(condition: Callable[[dict], bool]) -> str:
        return f"{sum(map(condition, done))} of {len(run)}"

    lines = [
        "# The sweep",
        "",
        "Every architecture of torchvision (classification, segmentation, detection, video) and one of each timm",
        "module, with random weights, on one CPU thread: `make sweep` (benchmarks/sweep.py) writes this page.",
        "",
        f"torch {torch.__version__.partition('+')[0]}: {len(run)} architectures run,",
        f"{len(results) - len(run)} left out for their size.",
        "",
        f"- observed without failure: {len(done)} of {len(run)}",
        f"- output equal bit for bit: {count(lambda r: not r['output'])} (fused attention off in the plain run)",
        f"- output within 1e-5 of the plain run as it is: {count(lambda r: r['output_fused'] <= 1e-5)}",
        f"- every map equal to what a hook sees: {count(lambda r: not r['difference'])}, "
        f"{sum(r['maps'] for r in done):,} module outputs compared; of the "
        f"{sum(r['layers'] for r in done):,} layers observed, functional operations are out of a hook's reach",
        f"- finite gradient of the input: {count(lambda r: r['gradient'] == 'finite')}; "
        f"clearly refused: {count(lambda r: r['gradient'].startswith('refused'))}; "
        f"none, since the answer does not depend on the picture: {count(lambda r: r['gradient'] == 'none')}",
        f"- two channels of a layer removed by running only what follows it, within 1e-3 of whole runs: "
        f"{count(lambda r: r['replay'][:1].isdigit() and float(r['replay'].split()[0]) <= 1e-3)} "
        f"({sum('whole' in r['replay'] for r in done)} of them could not skip, "
        f"{sum('alone' in r['replay'] for r in done)} could not be batched; detectors were not tried)",
        f"- model, buffers, flags, hooks and random state unchanged, from train mode: "
        f"{count(lambda r: r['state'] == 'unchanged')}",
        "",
        "Left out: " + "; ".join(f"{k} ({v})" for k, v in SKIPPED.items()) + ".",
        "",
        "| model | input | layers | maps compared | largest difference | output | gradient | replay | state | s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, r in sorted(results.items()):
        if "skipped" in r or "failed" in r:
            why = f"left out: {r['skipped']}" if "skipped" in r else f"FAILED: {r['failed']}"
            lines.append(f"| {name} | {why} | | | | | | | | |")
            continue
        output = "equal" if not r["output_fused"] else f"equal; fused {r['output_fused']:.0e}"
        output = output if not r["output"] else f"{r['output']:.1e}"
        shape = "x".join(map(str, r["input"]))
        lines.append(
            f"| {name} | {shape} | {r['layers']} | {r['maps']} | {r['difference']:.2g} | {output} | {r['gradient']} "
            f"| {r['replay']} | {r['state']} | {r['seconds']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--family", choices=("torchvision", "timm"))
    parser.add_argument("--only", help="the one architecture of this name")
    parser.add_argument("--out", type=Path, default=Path("docs/sweep.md"))
    parser.add_argument("--log", type=Path, default=Path("build/sweep.jsonl"), help="results so far")
    parser.add_argument("--again", action="store_true", help="also repeat what failed or differed")
    parser.add_argument("--worker", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.log.parent.mkdir(parents=True, exist_ok=True)
    if options.worker is not None:
        work(options.worker, options.log)
        return 0
    if options.only:
        family = options.family or "torchvision"
        names = [options.only if ":" in options.only else f"{family}:{options.only}"]
    else:
        found = {"torchvision": torchvision_models, "timm": timm_models}
        names = [n for f, list_of in found.items() if options.family in (None, f) for n in list_of()]
    done = {} if options.only else results_in(options.log)
    todo = [n for n in names if n not in done or (options.again and not good(done[n]) and "skipped" not in done[n])]
    while todo:  # a fresh process for every few, since memory is not given back; and for the one behind a crash
        begin = [sys.executable, __file__, "--log", str(options.log), "--worker", *todo[:10]]
        before = len(options.log.read_text().splitlines()) if options.log.exists() else 0
        if subprocess.run(begin).returncode == 0:
            todo = todo[10:]
            continue
        ended = {json.loads(line)["name"] for line in options.log.read_text().splitlines()[before:]}
        todo = [n for n in todo if n not in ended] if ended else []
    results = results_in(options.log)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(table(results))
    bad = [n for n in names if n in results and "skipped" not in results[n] and not good(results[n])]
    print(f"{len(names)} architectures, {len(bad)} to look at: {', '.join(bad) or 'none'}; table in {options.out}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
