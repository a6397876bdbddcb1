"""ONNX files (`.onnx`), run by torch: each node is the layer of its name, and can be watched, changed and explained.

    net = innersight.open("model.onnx")

Constants and the arithmetic of shapes are worked out when the file is opened, or once for each input shape, and are no
layers. What remains are the operators of `onnx_operators.py`, one a layer. Where ONNX Runtime is installed its answer
is compared on opening; `agreement` compares every value of a file.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from innersight import errors
from innersight.formats import Opened
from innersight.formats.graph import Graph
from innersight.formats.onnx_file import File, parse, read
from innersight.formats.onnx_operators import Node
from innersight.formats.onnx_picture import Picture, fed, noise, picture_of, told
from innersight.formats.onnx_plan import Plan, first_line
from innersight.formats.onnx_trial import limited_run

MAX_COMPARED = 1 << 28
"""Bytes of a file up to which ONNX Runtime is asked on opening."""


def open_onnx(source: Path | bytes | Any) -> Opened:
    """An ONNX file by its path, its bytes, or an `onnx.ModelProto`.

    The module takes (N, C, H, W) floats, also for a file that wants its channels last, and answers what the file's
    outputs are. Whole batches are run where the file is right with them, which is tried; otherwise one at a time.

    Raises InputError for a damaged file or one that asks for too much, Unsupported for operators and inputs that are
    not known here, MissingPackage without the `onnx` package. Each is one sentence.
    """
    file = read(source)
    try:
        return _opened(file, source)
    except errors.InnersightError:
        raise
    except Exception as error:  # nodes without the inputs that they must have, and the like
        raise errors.InputError(f"{file.name} is damaged: {first_line(error)}") from error


def _opened(file: File, source: Any) -> Opened:
    picture, notes = picture_of(file)
    plan = Plan(file, picture)
    graph = plan.graph()
    picture = replace(picture, grid=plan.grids.get(picture.name))
    shape, output, more = _tried(graph, plan.nodes, file, picture)
    notes += file.notes + plan.notes + more
    fixed, batch_notes = _batches(graph, picture, shape, output, plan.nodes if plan.loose else None)
    notes += batch_notes
    preprocess, labels, why = told(file, picture, shape, plan.constants)
    notes += why
    if len(graph.outputs) > 1:
        notes.append(
            f"it answers {len(graph.outputs)} values ({', '.join(map(str, graph.outputs))}); output= picks one"
        )
    notes += plan.said()
    stored = {str(k): plan.stored(k, v) for k, v in zip(graph.outputs, output, strict=True) if k in file.outputs}
    notes += compared(source, picture, noise(picture, shape), stored, plan.stepped)
    graph.known.clear()
    opened = Opened(graph, file.name, shape, preprocess, labels, notes, fixed_batch=fixed)
    opened.quantisation = plan.quantised or None
    return opened


# --- the first runs ---------------------------------------------------------------------------------------------------

_SIDES = (224, 32, 28, 64, 96, 128, 160, 192, 256, 299, 320, 384, 416, 512, 640)


def _tried(
    graph: Graph, nodes: dict[str, Node], file: File, picture: Picture
) -> tuple[tuple[int, int, int], tuple, list[str]]:
    """The input shape with which the file runs, what it answered, and what was assumed."""
    channels, height, width = picture.sizes
    notes = []
    count = picture.batch or 1
    wanted = [channels] if channels else [_channels(file, picture.name) or 3]
    if not channels and wanted[0] == 3:
        wanted.append(1)
    tries = [
        (c, height or side, width or side) for c in wanted for side in (_SIDES if not (height and width) else (0,))
    ]
    problem: Exception | None = None
    for shape in tries:
        try:
            output = limited_run(graph, nodes, noise(picture, shape, count))
        except errors.InnersightError as error:
            raise type(error)(f"{file.name} cannot be run: {error}") from error
        except (RuntimeError, MemoryError) as error:
            problem = problem or error
            continue
        if None in picture.sizes:
            notes.append(f"the file leaves its input's size open; {shape} is assumed, input_shape= says another")
        return shape, output, notes
    said = "not enough memory" if problem is None else first_line(problem)
    raise errors.InputError(f"{file.name} cannot be run on its own input shape {tries[0]}: {said}") from problem


def _channels(file: File, name: str) -> int | None:
    for n in file.nodes:
        if n.op == "Conv" and n.inputs[0] == name and n.inputs[1] in file.weights:
            w = file.weights[n.inputs[1]]
            return w.shape[1] * n.get("group", 1) if w.dim() > 1 else None
    return None


def _batches(
    graph: Graph, picture: Picture, shape: tuple[int, ...], single: tuple, nodes: dict[str, Node] | None
) -> tuple[int | None, list[str]]:
    """The only batch size, if there is one, and what to say of it: two pictures together must be as each alone."""
    if picture.batch not in (None, 1):
        return picture.batch, [f"the file was written for batches of {picture.batch}, so pictures go through it so"]
    x = torch.cat([noise(picture, shape), noise(picture, shape, seed=1)])

    def run(x: torch.Tensor) -> dict[Any, Any]:
        return graph.run(x) if nodes is None else dict(zip(graph.outputs, limited_run(graph, nodes, x), strict=True))

    written = "the file was written for one picture at a time" if picture.batch else "its answers depend on the batch"
    alone = [f"{written}, so pictures go through it one by one"]
    try:
        with torch.no_grad():
            second, both = run(x[1:]), run(x)
    except Exception:
        return 1, alone
    for key, first in zip(graph.outputs, single, strict=True):
        together = both[key]
        if not isinstance(together, torch.Tensor) or together.dim() == 0 or together.shape[0] != 2 * first.shape[0]:
            return 1, alone
        if not _near(together, torch.cat([first, second[key]])):
            return 1, alone
    if picture.batch:
        return None, ["the file was written for one picture at a time; it runs in batches, which was found to be equal"]
    return None, []


def _near(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> bool:
    if a.shape != b.shape:
        return False
    return difference(a.double().numpy(), b.double().numpy()) <= tolerance


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """max|a - b| / max|b|; what is not finite has to stand in the same places."""
    if a.shape != b.shape:
        return math.inf
    a, b = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(b)
    if not finite.all() or not np.isfinite(a).all():
        if not np.array_equal(np.where(finite, 0, b), np.where(finite, 0, a), equal_nan=True):
            return math.inf
        a, b = a[finite], b[finite]
    return float(np.abs(a - b).max(initial=0) / max(np.abs(b).max(initial=0), 1e-30))


# --- ONNX Runtime ----------------------------------------------------------------------------------------------------


def _session(model: Any, folder: Path | None, optimised: bool = True) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def compared(source: Any, picture: Picture, x: torch.Tensor, output: dict[str, Any], stepped: bool) -> list[str]:
    """What ONNX Runtime says to the same noise, in a sentence."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        return ["ONNX Runtime is not installed, so its answers were not compared"]
    if picture.type == 16 or not output:
        return ["its answers were not compared with ONNX Runtime"]
    model, _name, folder = (source, "", None) if isinstance(source, (bytes, bytearray)) else _bytes(source)
    size = len(model)
    if size > MAX_COMPARED:
        return [f"at {size / 2**20:.0f} MiB it was not compared with ONNX Runtime; onnx.agreement(path) does"]
    try:
        x = x if picture.batch is None or picture.batch == len(x) else noise(picture, x.shape[1:], picture.batch)
        answers = _session(bytes(model), folder).run(list(output), {picture.name: fed(picture, x)})
        worst = max(difference(o.double().numpy(), a) for o, a in zip(output.values(), answers, strict=True))
    except Exception as error:
        said = first_line(error)
        return [f"ONNX Runtime could not run it, so its answers were not compared ({said[:120]})"]
    if worst == 0:
        return ["agrees with ONNX Runtime to the last bit"]
    if worst <= (5e-2 if stepped else 1e-3):
        return [f"agrees with ONNX Runtime within {worst:.0e} of the largest output"]
    return [f"differs from ONNX Runtime by {worst:.0e} of the largest output on noise: take its answers with care"]


def _bytes(source: Any) -> tuple[bytes, str, Path | None]:
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        return path.read_bytes(), path.name, path.parent.resolve()
    return source.SerializeToString(), "", None


def agreement(source: Path | bytes | Any, x: Any = None, optimised: bool = False) -> dict[str, float]:
    """For every value of a file: how far it is from ONNX Runtime's, as max|a - b| / max|b|.

    source: as for `open_onnx`
    x:      (N, C, H, W) pictures; default one of noise
    optimised: with ONNX Runtime's own optimizations, which leave few values to compare

    Raises MissingPackage without onnxruntime, and what `open_onnx` raises.

    >>> worst = max(agreement("model.onnx").values())  # doctest: +SKIP
    """
    errors.need("onnxruntime", "test", "comparing with ONNX Runtime")
    file = read(source)
    picture, _notes = picture_of(file)
    plan = Plan(file, picture)
    graph = plan.graph()
    picture = replace(picture, grid=plan.grids.get(picture.name))
    if x is None:
        shape, _output, _more = _tried(graph, plan.nodes, file, picture)
        x = noise(picture, shape, picture.batch or 1)
    x = torch.as_tensor(x)
    ours = {name: np.asarray(plan.stored(name, value)) for name, value in observed(graph, x).items()}
    model, _name, folder = parse(source)
    import onnx

    model = onnx.ModelProto.FromString(model.SerializeToString())
    had = {o.name for o in model.graph.output}
    made = [o for n in model.graph.node for o in n.output if o and o in ours and o not in had]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in made)
    session = _session(model.SerializeToString(), folder, optimised)
    names = [o.name for o in session.get_outputs() if o.name in ours]
    theirs = session.run(names, {picture.name: fed(picture, x)})
    return {name: difference(ours[name], np.asarray(value)) for name, value in zip(names, theirs, strict=True)}


def observed(graph: Graph, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every value that a run makes, by its name in the file."""
    with torch.no_grad():
        values = graph.run(x, keep=True)
    return {k: v.detach() for k, v in values.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
