"""`torch.export` programs (`.pt2`): a flat graph of aten operators, run with the module paths it was written from."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from innersight.errors import InputError, Unsupported, UntrustedFile
from innersight.formats import Opened
from innersight.formats.aten import python_call
from innersight.observe.observer import call_as


class Scope(NamedTuple):
    """One module call that a node ran in; a module called twice has two keys."""

    key: str
    path: str
    kind: str  # the module's class


@dataclass
class _Operation:
    name: str
    call: Callable[..., Any]
    args: Any
    kwargs: Any
    dead: tuple[str, ...]  # values nobody reads afterwards

    def run(self, values: dict[str, Any]) -> Any:
        def value(node: fx.Node) -> Any:
            return values[node.name]

        result = self.call(*fx.node.map_arg(self.args, value), **fx.node.map_arg(self.kwargs, value))
        values[self.name] = result
        for name in self.dead:
            values.pop(name, None)
        return result


@dataclass
class _ModuleCall:
    """What ran within one call of a module."""

    path: str
    leaf: bool
    steps: list[_Operation | _ModuleCall]
    result: str

    def run(self, values: dict[str, Any]) -> Any:
        return call_as(self.path, self._steps, values, leaf=self.leaf)

    def _steps(self, values: dict[str, Any]) -> Any:
        for step in self.steps:
            step.run(values)
        return values.get(self.result)


class Exported(nn.Module):
    """Runs an exported graph node by node, each within the module call it came from; parameters keep their names."""

    def __init__(self, graph: fx.GraphModule):
        super().__init__()
        self._parameters.update(graph._parameters)
        self._buffers.update(graph._buffers)
        self._modules.update(graph._modules)
        nodes = list(graph.graph.nodes)
        self.inputs = [n.name for n in nodes if n.op == "placeholder"]
        self.constants = {n.name: n.target for n in nodes if n.op == "get_attr"}
        (self.result,) = (n.args[0] for n in nodes if n.op == "output")
        operations = [n for n in nodes if n.op == "call_function"]
        scopes = dict(zip(operations, _scopes(operations), strict=True))
        paths = {s.path for stack in scopes.values() for s in stack} | {name for name, _ in self.named_modules()}
        self.parents = {path.rpartition(".")[0] for path in paths}
        last = {read.name: n.name for n in nodes for read in (n, *n.all_input_nodes)}
        dead: dict[str, list[str]] = {}
        for name, reader in last.items():
            dead.setdefault(reader, []).append(name)
        self.plan = list(self._plan(operations, scopes, dead, 0))

    def _plan(self, nodes: Iterable[fx.Node], scopes: dict[fx.Node, list[Scope]], dead: dict[str, list[str]],
              depth: int) -> Iterator[_Operation | _ModuleCall]:  # fmt: skip
        def scope(node: fx.Node) -> Scope | None:
            return scopes[node][depth] if depth < len(scopes[node]) else None

        for call, run in itertools.groupby(nodes, scope):
            group = list(run)
            if call is None:
                for n in group:
                    function = python_call(n.target) if isinstance(n.target, torch._ops.OpOverload) else n.target
                    yield _Operation(n.name, function, n.args, n.kwargs, tuple(dead.get(n.name, ())))  # type: ignore[arg-type]
                continue
            inside = set(group)
            results = [n for n in group if any(user not in inside for user in n.users)]
            leaf = call.kind.startswith("torch.nn.modules.") and call.path not in self.parents
            steps = list(self._plan(group, scopes, dead, depth + 1))
            yield _ModuleCall(call.path, leaf, steps, (results or group)[-1].name)

    def forward(self, *args: torch.Tensor) -> Any:
        values: dict[str, Any] = dict(zip(self.inputs, args, strict=True))
        for name, target in self.constants.items():
            values[name] = _attribute(self, target)
        for step in self.plan:
            step.run(values)
        result = fx.node.map_arg(self.result, lambda node: values[node.name])
        return result[0] if isinstance(result, (tuple, list)) and len(result) == 1 else result


def _attribute(module: nn.Module, target: str) -> Any:
    path, _, name = target.rpartition(".")
    return getattr(module.get_submodule(path), name)


def _scopes(nodes: Iterable[fx.Node]) -> Iterator[list[Scope]]:
    """The module calls around each node, outermost first and without the root."""
    stack: list[Scope] = []
    for node in nodes:
        found = node.meta.get("nn_module_stack")
        if found is not None:  # the items of a tuple, written on loading, belong where the tuple was made
            entries = [Scope(key, _path(path), _class(kind)) for key, (path, kind) in found.items()]
            stack = [scope for scope in entries if scope.path]
        yield stack


def _path(written: str) -> str:
    """'L['self'].layer1._modules['0'].conv1' and 'layer1.0.conv1@1' both mean layer1.0.conv1."""
    path = re.sub(
        r"\._modules\['([^']+)'\]|\['([^']+)'\]|\[(\d+)\]", lambda m: "." + next(filter(None, m.groups())), written
    )
    return re.sub(r"^L\.self\.?", "", path).partition("@")[0]


def _class(kind: Any) -> str:
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def to_evaluation(graph: fx.GraphModule) -> bool:
    """Put layers that were exported in training mode into evaluation mode; true if there were any.

    An exported graph holds the mode as a constant. Left alone, batch norm would use and change its statistics.
    """
    places = {
        "aten::batch_norm": (5, "batchnorm"),
        "aten::dropout": (2, "dropout"),
        "aten::feature_dropout": (2, "dropout"),
    }
    found = False
    for node, stack in list(zip(graph.graph.nodes, _scopes(graph.graph.nodes), strict=True)):
        if node.op != "call_function" or not stack or not stack[-1].kind.startswith("torch.nn.modules."):
            continue
        name = node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""
        place, family = places.get(name, (0, ""))
        if place and family in stack[-1].kind and node.args[place] is True and node.args[3:4] != (None,):
            node.update_arg(place, False)
            found = True
        elif name == "aten::add_" and node.args[0].op == "get_attr" and "batchnorm" in stack[-1].kind:
            graph.graph.erase_node(node)  # the count of batches seen
    return found


def open_exported(source: Path | torch.export.ExportedProgram, device: Any = None, trust: bool = False) -> Opened:
    """A program written by `torch.export.save`, or one in memory.

    Raises UntrustedFile for a file that holds more than tensors and operators (see `load`).
    """
    program = load(source, trust) if isinstance(source, Path) else source
    if device is not None and torch.device(device).type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, torch.device(device))
    graph = program.module(check_guards=False)
    notes = []
    if to_evaluation(graph):
        notes.append("the program was exported in training mode; it is explained in evaluation mode")
    inputs = [n for n in graph.graph.nodes if n.op == "placeholder" and isinstance(n.meta.get("val"), torch.Tensor)]
    if len(inputs) != 1:
        names = ", ".join(n.name for n in inputs) or "none"
        raise Unsupported(
            f"this program takes {len(inputs)} tensors ({names}); innersight explains networks of one image input"
        )
    sizes = list(inputs[0].meta["val"].shape)
    shape = tuple(int(s) if isinstance(s, int) else s.node.hint for s in sizes)
    batch = sizes[0] if isinstance(sizes[0], int) else None
    if batch is not None:
        notes.append(f"the program was exported for batches of {batch}, so images go through it {batch} at a time")
    name = source.name if isinstance(source, Path) else "exported program"
    return Opened(Exported(graph), name, input_shape=shape[1:], notes=notes, fixed_batch=batch)


# --- what may be in a file -------------------------------------------------------------------------------------------

_RECORDS = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/\w+|extra/.*|models/\w+\.json|data/weights/weight_\d+|"
    r"data/constants/tensor_\d+|data/(weights|constants)/\w+_config\.json|data/sample_inputs/\w+\.pt"
)
_SYMBOLS = (
    "Symbol positive nonnegative integer True False Max Min Mod PythonMod FloorDiv CleanDiv CeilDiv ModularIndexing "
    "Where CeilToInt FloorToInt TruncToInt RoundToInt TruncToFloat ToFloat IntTrueDiv FloatTrueDiv PowByNatural "
    "FloatPow LShift RShift Identity Eq Ne Lt Le Gt Ge And Or Not Integer Float Rational Add Mul Pow evaluate"
).replace(" ", "|")
_EXPRESSION = re.compile(
    rf"(?:[\s+\-*/%(),=<>&|~]|\d++(?:\.\d*+)?|'[a-z]+\d+'|\b[a-z]{{1,2}}\d+\b|\b(?:{_SYMBOLS})\b)*"
)
_ARITHMETIC = frozenset(
    "getitem add sub mul truediv floordiv mod pow neg pos abs eq ne lt le gt ge and_ or_ not_ xor lshift rshift".split()
)


def load(path: Path, trust: bool = False) -> torch.export.ExportedProgram:
    """The program in a `.pt2` file, after a look at what is in it.

    `torch.export.load` unpickles whatever it is given, evaluates symbolic sizes as Python and looks operators up by
    name from `torch` on, so a file can run code. A program of tensors and operators needs none of that: a file which
    holds only those is loaded from a copy of what was checked, any other raises UntrustedFile unless `trust`.
    """
    if trust:
        return _load(path, path)
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(copy, "w") as target:
        root = source.namelist()[0].partition("/")[0]
        for record in source.infolist():
            name, content = record.filename.removeprefix(f"{root}/"), source.read(record)
            if problem := _problem(name, content):
                raise UntrustedFile(
                    f"{path} could run code when loaded ({problem}); if you trust it, open it with trust=True"
                )
            target.writestr(record.filename, content)
    copy.seek(0)
    return _load(copy, path)


def _load(file: Any, path: Path) -> torch.export.ExportedProgram:
    try:
        return torch.export.load(file)
    except Exception as error:  # written by another version, damaged, or no exported program at all
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} could not be loaded as an exported program: {first}") from error


def _problem(record: str, content: bytes) -> str:
    """What in this record is more than tensors and operators; empty if nothing is."""
    if not _RECORDS.fullmatch(record):
        return f"it holds {record}"
    if record.startswith("data/sample_inputs/") and content:
        try:
            torch.load(io.BytesIO(content), weights_only=True)
        except Exception:
            return f"{record} is a pickle of more than tensors"
    if record.endswith(".json"):
        return next(_problems(json.loads(content), ""), "")
    return ""


def _problems(value: Any, key: str) -> Iterator[str]:
    """Walk a program's JSON and yield what does not belong into one."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if key == "range_constraints" and not _EXPRESSION.fullmatch(name):
                yield f"a size named {name!r}"
            if name in ("metadata", "guards_code"):  # shown to people; guards are not built
                continue
            yield from _problems(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _problems(inner, key)
    elif isinstance(value, str):
        if key == "expr_str" and not _EXPRESSION.fullmatch(value):
            yield f"the size {value!r}"
        elif key in ("target", "as_operator") and not _is_operator(value):
            yield f"it calls {value}"
        elif key in ("in_spec", "out_spec") and re.search(r"defaultdict|enum", value):
            yield "an argument type that imports modules"
        elif re.search(r"name|fqn", key) and re.search(r"[\"'\\\n\r]", value):
            yield f"the name {value!r}"
    elif key == "use_pickle" and value:
        yield "a pickled tensor"


def _is_operator(target: str) -> bool:
    """An operator that torch or an imported extension registered, or plain arithmetic."""
    home, _, name = target.partition(".")
    if home == "_operator":
        return name in _ARITHMETIC
    if home == "math":
        return callable(getattr(math, name, None))
    if re.fullmatch(r"torch\.sym_\w+", target):
        return True
    parts = target.split(".")
    if parts[:2] != ["torch", "ops"] or len(parts) not in (4, 5):
        return False
    found: Any = torch.ops
    for part in parts[2:]:
        found = getattr(found, part, None)
    return isinstance(found, (torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch._ops.HigherOrderOperator))
