"""Reads ONNX files: nodes in an order that runs, weights as tensors, everything checked before anything is allocated.

    file = read(Path("model.onnx"))
    file.nodes[0].op, file.weights["conv1.weight"].shape

The protobuf is parsed by the `onnx` package, which runs no code of a file. Everything else is looked at by hand, since
its checker lets much through: sizes that do not match the data, external data outside of the file's folder, values
written twice, cycles, functions that unfold into millions of nodes.
"""

from __future__ import annotations

import ast
import heapq
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from innersight import errors
from innersight.formats.onnx_operators import Node

MAX_FILE = 1 << 31
"""Bytes that one protobuf can hold."""
MAX_NODES = 200_000
MAX_DEPTH = 20
"""Of graphs within graphs."""
_LONG = 200


@dataclass
class Body:
    """The graph within an If or a Loop; it reads the names of what is around it as well."""

    nodes: list[Node]
    weights: dict[str, torch.Tensor]
    inputs: list[str]
    outputs: list[str]

    def reads(self) -> set[str]:
        """Names that come from outside."""
        made = {*self.weights, *self.inputs, *(o for n in self.nodes for o in n.outputs)}
        return {i for n in self.nodes for i in (*n.inputs, *captured(n)) if i} - made | (set(self.outputs) - made)


def captured(n: Node) -> set[str]:
    """What the graphs within a node read from around it."""
    return set().union(*(v.reads() for v in n.attributes.values() if isinstance(v, Body)))


@dataclass(frozen=True)
class Input:
    """A graph's input as declared; sizes are None where the file leaves them open, `shape` is None without any."""

    name: str
    type: int
    shape: tuple[int | None, ...] | None


@dataclass
class File:
    """What an ONNX file holds.

    weights:   the initialisers, by name; of half precision as float32
    types:     ONNX's number for the type of each initialiser as it is stored
    metadata:  what the file says of itself, by key
    source:    the file's bytes, or nothing if it was opened from a model in memory
    """

    name: str
    opset: int
    nodes: list[Node]
    weights: dict[str, torch.Tensor]
    types: dict[str, int]
    inputs: list[Input]
    outputs: list[str]
    metadata: dict[str, str] = field(default_factory=dict)
    producer: str = ""
    notes: list[str] = field(default_factory=list)


def read(source: Any) -> File:
    """The file at a path, in bytes, or in an `onnx.ModelProto`.

    Raises InputError or Unsupported with one sentence on what is wrong; MissingPackage without the `onnx` package.
    """
    model, name, folder = parse(source)
    try:
        return _file(model, name, folder)
    except (errors.InnersightError, MemoryError):
        raise
    except Exception as error:  # of the protobuf's or NumPy's, about values that make no sense
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise errors.InputError(f"{name} is damaged: {first}") from error


def parse(source: Any) -> tuple[Any, str, Path | None]:
    """The protobuf, what it is called, and the folder its external data may lie in."""
    onnx = errors.need("onnx", "onnx", "reading ONNX files")
    if isinstance(source, onnx.ModelProto):
        return source, source.graph.name or "ONNX model", None
    if isinstance(source, (bytes, bytearray)):
        content, name, folder = bytes(source), "ONNX model", None
    else:
        path = Path(source).expanduser()
        if not path.is_file():
            raise errors.InputError(f"there is no file {path}")
        if path.stat().st_size > MAX_FILE:
            raise errors.InputError(
                f"{path} is over 2 GiB; an ONNX file of that size keeps its weights in a second file"
            )
        content, name, folder = path.read_bytes(), path.name, path.parent.resolve()
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:  # the protobuf's own
        raise errors.InputError(f"{name} is no ONNX file, or a damaged one: it cannot be parsed") from error
    if not model.HasField("graph") or not (model.graph.node or model.graph.output):
        raise errors.InputError(f"{name} is no ONNX file, or a damaged one: there is no graph in it")
    return model, name, folder


def _file(model: Any, name: str, folder: Path | None) -> File:
    if model.functions:
        model = _inlined(model, name)
    versions = {"ai.onnx" if not o.domain else o.domain: o.version for o in model.opset_import}
    opset = versions.get("ai.onnx", 1)
    reader = _Reader(name, folder, opset)
    graph = model.graph
    if graph.sparse_initializer:
        raise errors.Unsupported(f"{name} keeps weights as sparse tensors, which is not supported; export them dense")
    weights = {}
    for t in graph.initializer:
        if text(t.name) in weights:
            raise errors.InputError(f"{name} holds the weight {shown(t.name)!r} twice")
        weights[text(t.name)] = reader.tensor(t)
    inputs = [_input(v) for v in graph.input if text(v.name) not in weights]
    outputs = [text(v.name) for v in graph.output]
    if not outputs:
        raise errors.InputError(f"{name} has no output")
    nodes = [reader.node(n, 0) for n in graph.node]
    nodes = ordered(nodes, {*weights, *(i.name for i in inputs)}, outputs, name)
    named(nodes)
    return File(
        name, opset, nodes, weights, reader.types, inputs, outputs,
        {text(p.key): text(p.value) for p in model.metadata_props},
        shown(f"{text(model.producer_name)} {text(model.producer_version)}".strip()), reader.notes(),
    )  # fmt: skip


def _inlined(model: Any, name: str) -> Any:
    """The model with its local functions unfolded, unless they unfold without end."""
    import onnx.inliner

    bodies = {(f.domain, f.name): [(n.domain, n.op_type) for n in _every(f.node)] for f in model.functions}
    sizes: dict[tuple[str, str], int] = {}

    def size(key: tuple[str, str], within: tuple[tuple[str, str], ...]) -> int:
        if key not in bodies:
            return 1
        if key in within or len(within) > 100:
            raise errors.InputError(f"{name} defines the function {shown(key[1])!r} by itself")
        if key not in sizes:
            sizes[key] = sum(size(inner, (*within, key)) for inner in bodies[key])
        return sizes[key]

    if sum(size((n.domain, n.op_type), ()) for n in _every(model.graph.node)) > MAX_NODES:
        raise errors.InputError(f"the functions in {name} unfold to more than {MAX_NODES} nodes")
    return onnx.inliner.inline_local_functions(model)


def _every(nodes: Any) -> Iterator[Any]:
    for n in nodes:
        yield n
        for a in n.attribute:
            yield from _every(a.g.node)


def _input(value: Any) -> Input:
    if not value.type.HasField("tensor_type"):
        return Input(text(value.name), 0, None)
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        return Input(text(value.name), kind.elem_type, None)
    sizes = tuple(d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in kind.shape.dim)
    return Input(text(value.name), kind.elem_type, sizes)


def text(name: Any) -> str:
    """A name of the protobuf's, which hands out bytes where they are not UTF-8."""
    return name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else str(name)


def shown(name: Any) -> str:
    """The name as tables and sentences show it: printable, and not without end."""
    name = "".join(c if c.isprintable() else "?" for c in text(name)[:_LONG])
    return name if len(name) < _LONG else f"{name[: _LONG - 1]}…"


class _Reader:
    """Turns parts of the protobuf into tensors and plain values."""

    def __init__(self, name: str, folder: Path | None, opset: int):
        self.name, self.folder, self.opset = name, folder, opset
        self.types: dict[str, int] = {}
        self.count = 0

    def notes(self) -> list[str]:
        halves = {10: "float16", 16: "bfloat16"}
        if found := sorted({halves[t] for t in self.types.values() if t in halves}):
            return [f"its {found[0]} weights are computed with in float32, where gradients do not vanish"]
        return []

    def node(self, n: Any, depth: int) -> Node:
        self.count += 1
        if self.count > MAX_NODES:
            raise errors.InputError(f"{self.name} has more than {MAX_NODES} nodes")
        domain = "" if n.domain == "ai.onnx" else text(n.domain)
        op, inputs, outputs = text(n.op_type), tuple(map(text, n.input)), tuple(map(text, n.output))
        label = shown(text(n.name) or next((o for o in outputs if o), op))
        attributes = {text(a.name): self.attribute(a, f"{op} {label!r}", depth) for a in n.attribute}
        scope = {p.key: p.value for p in n.metadata_props} if hasattr(n, "metadata_props") else {}
        return Node(label, op, domain, inputs, outputs, attributes, self.opset, scope=_scope(scope))

    def attribute(self, a: Any, where: str, depth: int) -> Any:
        plain = {1: "f", 2: "i", 3: "s", 6: "floats", 7: "ints", 8: "strings"}
        if a.type in plain:
            value = getattr(a, plain[a.type])
            return list(value) if a.type > 5 else value
        if a.type == 4:
            return self.tensor(a.t, where)
        if a.type == 5:
            return self.body(a.g, where, depth + 1)
        raise errors.Unsupported(f"{where} has an attribute {a.name!r} of a kind that is not supported")

    def body(self, graph: Any, where: str, depth: int) -> Body:
        if depth > MAX_DEPTH:
            raise errors.InputError(f"{self.name} nests graphs deeper than {MAX_DEPTH}")
        weights = {text(t.name): self.tensor(t, where) for t in graph.initializer}
        nodes = [self.node(n, depth) for n in graph.node]
        inputs = [name for v in graph.input if (name := text(v.name)) not in weights]
        return Body(nodes, weights, inputs, [text(v.name) for v in graph.output])

    def tensor(self, t: Any, where: str = "") -> torch.Tensor:
        """The tensor, after a look at whether its data has the size that its shape says."""
        import onnx
        from onnx import numpy_helper

        label = where or f"the weight {shown(t.name)!r}"
        if t.data_type not in onnx.TensorProto.DataType.values() or t.data_type == 0:
            raise errors.InputError(f"{label} in {self.name} is of no known type ({t.data_type})")
        if t.data_type in (8, 14, 15):
            raise errors.Unsupported(f"{label} in {self.name} holds text or complex numbers, which is not supported")
        if any(d < 0 for d in t.dims) or len(t.dims) > 32:
            raise errors.InputError(f"{label} in {self.name} has the shape {list(t.dims)[:40]}")
        count = math.prod(t.dims)
        bits = _BITS.get(t.data_type) or 8 * onnx.helper.tensor_dtype_to_np_dtype(t.data_type).itemsize
        wanted = (count * bits + 7) // 8
        self.types[text(t.name) or label] = t.data_type
        if t.data_location == 1:
            raw = self.external(t, label, wanted)
            t = onnx.TensorProto(dims=t.dims, data_type=t.data_type, raw_data=raw)
        elif t.HasField("raw_data"):
            self.same(label, len(t.raw_data), wanted)
        else:
            held = {1: t.float_data, 11: t.double_data, 7: t.int64_data, 12: t.uint64_data, 13: t.uint64_data}
            stored = len(held.get(t.data_type, t.int32_data))
            needed = (count * bits + 7) // 8 if bits < 8 else count
            if stored != needed:
                raise errors.InputError(f"{label} in {self.name} holds {stored} numbers where its shape says {needed}")
        array = numpy_helper.to_array(t)
        return _torch(array, t.data_type, f"{label} in {self.name}")

    def same(self, label: str, have: int, wanted: int) -> None:
        if have != wanted:
            raise errors.InputError(f"{label} in {self.name} holds {have} bytes where its shape says {wanted}")

    def external(self, t: Any, label: str, wanted: int) -> bytes:
        """Data in a file of its own: a plain file in the model's folder, and no other."""
        entries = {e.key: e.value for e in t.external_data}
        location = text(entries.get("location", ""))[:4096]
        if self.folder is None:
            raise errors.InputError(f"{label} lies in a second file ({shown(location)!r}); open the model by its path")
        parts = re.split(r"[/\\]", location)
        if not location or ":" in location or "\0" in location or parts[0] == "" or ".." in parts:
            raise errors.InputError(
                f"{label} in {self.name} lies at {shown(location)!r}, which is not in the model's folder"
            )
        path = self.folder.joinpath(*parts)
        if path.resolve() != path or not path.is_file() or path.stat().st_nlink != 1:
            reason = "there is no such file" if not path.exists() else "links are not followed"
            raise errors.InputError(
                f"{label} in {self.name} lies in {shown(location)!r} beside the model, but {reason}"
            )
        try:
            offset, length = int(entries.get("offset") or 0), int(entries.get("length") or wanted)
        except ValueError:
            raise errors.InputError(
                f"{label} in {self.name} does not say where in {shown(location)!r} it begins"
            ) from None
        self.same(label, length, wanted)
        if offset < 0 or offset + wanted > path.stat().st_size:
            raise errors.InputError(
                f"{shown(location)!r} is too short for {label} of {self.name}; is it the right file?"
            )
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(wanted)


_BITS = {21: 4, 22: 4, 23: 4, 25: 2, 26: 2}  # types that share a byte


def _torch(array: np.ndarray, kind: int, where: str) -> torch.Tensor:
    """A tensor of a type that torch computes with."""
    if kind == 7 or kind in (1, 2, 3, 5, 6, 9, 11):
        return torch.from_numpy(np.array(array, order="C"))
    wider = {4: np.int32, 12: np.int64, 21: np.uint8, 22: np.int8, 25: np.uint8, 26: np.int8}
    if kind in wider:
        return torch.from_numpy(array.astype(wider[kind]))
    if kind == 13:
        if array.size and array.max() >= 1 << 63:
            raise errors.Unsupported(f"{where} holds numbers above 2^63, which is not supported")
        return torch.from_numpy(array.astype(np.int64))
    return torch.from_numpy(array.astype(np.float32))


# --- order and names -------------------------------------------------------------------------------------------------


def ordered(nodes: list[Node], given: set[str], outputs: Iterable[str], name: str) -> list[Node]:
    """The nodes that the outputs need, in an order that runs; as in the file, where that does."""
    maker: dict[str, int] = {}
    for i, n in enumerate(nodes):
        for o in filter(None, n.outputs):
            if o in maker or o in given:
                raise errors.InputError(f"{n.op} {n.name!r} in {name} makes {shown(o)!r}, which is there already")
            maker[o] = i
    needs = [{i for i in (*n.inputs, *captured(n)) if i} for n in nodes]
    for n, names in zip(nodes, needs, strict=True):
        if missing := sorted(v for v in names if v not in given and v not in maker):
            raise errors.InputError(f"{n.op} {n.name!r} in {name} reads {shown(missing[0])!r}, which nothing makes")
    for o in outputs:
        if o not in given and o not in maker:
            raise errors.InputError(f"{name} returns {shown(o)!r}, which nothing makes")
    wanted: set[int] = set()
    todo = [maker[o] for o in outputs if o in maker]
    while todo:
        i = todo.pop()
        if i not in wanted:
            wanted.add(i)
            todo += [maker[v] for v in needs[i] if v in maker]
    waits = {i: {maker[v] for v in needs[i] if v in maker} for i in wanted}
    readers: dict[int, list[int]] = {i: [] for i in wanted}
    for i, before in waits.items():
        for j in before:
            readers[j].append(i)
    left = {i: len(before) for i, before in waits.items()}
    ready = [i for i, count in left.items() if not count]
    heapq.heapify(ready)
    order = []
    while ready:
        i = heapq.heappop(ready)
        order.append(i)
        for j in readers[i]:
            left[j] -= 1
            if not left[j]:
                heapq.heappush(ready, j)
    if len(order) < len(wanted):
        stuck = nodes[min(i for i, count in left.items() if count)]
        raise errors.InputError(f"{stuck.op} {stuck.name!r} in {name} waits for its own result: the nodes form a cycle")
    read_ = {*outputs, *(v for i in wanted for v in needs[i])}
    for i in order:  # a mask of Dropout, say, that nobody reads
        kept = [o if o in read_ or k == 0 else "" for k, o in enumerate(nodes[i].outputs)]
        while kept and not kept[-1] and nodes[i].op not in ("Split", "If", "Loop"):
            kept.pop()
        nodes[i].outputs = tuple(kept)
    return [nodes[i] for i in order]


def named(nodes: list[Node]) -> None:
    """Give every node a name of its own: the module's that it was exported from, if the file says, else the file's."""
    last: dict[int, str] = {}
    run: list[int] = []
    for i, n in enumerate([*nodes, None]):
        if run and (n is None or n.scope != nodes[run[-1]].scope):
            last[run[-1]] = nodes[run[-1]].scope.rstrip(".")
            run = []
        if n is not None and n.scope:
            run.append(i)
    used: dict[str, int] = {}
    taken: set[str] = set()
    for i, n in enumerate(nodes):
        if not n.scope:
            stem, mark = n.name, "#"
        elif i in last and not n.scope.endswith("."):
            stem, mark = last[i], "_"
        else:
            stem, mark = f"{n.scope.rstrip('.')}.{n.op.lower()}".lstrip("."), "_"
        name, number = stem, used.get(stem, 0)
        if number:
            name = f"{stem}_{number}" if mark == "_" else f"{stem}#{number + 1}"
        while name in taken:
            number += 1
            name = f"{stem}_{number}" if mark == "_" else f"{stem}#{number + 1}"
        used[stem] = number + 1
        taken.add(name)
        n.name = name


def _scope(properties: Mapping[str, str]) -> str:
    """The module that torch's exporter wrote a node for: "layer1.0.conv1"; ends in "." if other modules are in it."""
    try:
        scopes, classes = (
            literal(properties.get(f"pkg.torch.onnx.{key}", ""), list) for key in ("name_scopes", "class_hierarchy")
        )
    except ValueError:
        return ""
    if len(scopes) < 2 or len(scopes) != len(classes):
        return ""
    if not all(isinstance(s, str) for s in (*scopes, *classes)):
        return ""
    path, kind = scopes[-2], classes[-2]
    leaf = kind.startswith("torch.nn.modules.") and not kind.startswith("torch.nn.modules.container")
    return path if leaf and path else f"{path}."


def literal(text: str, kind: type) -> Any:
    """A Python literal of such a type. Raises ValueError for anything else."""
    if not text or len(text) > 1 << 16 or text.count("[") + text.count("(") + text.count("{") > 5000:
        raise ValueError("no literal")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError) as error:
        raise ValueError("no literal") from error
    if not isinstance(value, kind):
        raise ValueError("another type")
    return value
