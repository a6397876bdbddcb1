"""A Keras configuration and its weights as a `Graph`: which layer is called on what, under which name.

Keras writes a network as a list of layers, each with its calls; a model may be a layer of another. Here they become one
list of steps. What is in an inner model is called `base/conv1`; a second call of a layer is `conv1_1`, or the next
number that no layer of the file has.
"""

from __future__ import annotations

import heapq
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from innersight.errors import InputError, Unsupported
from innersight.formats.graph import Graph, Step
from innersight.formats.keras_file import Contents, Weight
from innersight.formats.keras_layers import LAYERS, OPERATIONS, Apply, Build, Value, channels_first, operation

MAX_LAYERS = 20_000
MAX_NESTING = 32


@dataclass(frozen=True)
class Ref:
    """What the call number `node` of a layer returned."""

    layer: str
    node: int = 0
    tensor: int = 0


@dataclass
class Call:
    """The arguments of one call of a layer: nested lists, with a Ref where a value goes."""

    args: list[Any]
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class Layer:
    """One entry of a model's list of layers.

    group: the folder of its weights in a `.keras` file; None for operations, which have none
    """

    name: str
    kind: str
    config: dict[str, Any]
    calls: list[Call]
    first: int = 0  # the number of its first call
    inner: Model | None = None
    operation: bool = False
    ours: bool = True  # False: of a package that is not Keras
    group: str = ""


@dataclass
class Model:
    name: str
    kind: str
    layers: dict[str, Layer]
    inputs: list[Ref]
    outputs: list[Ref]

    def leaves(self) -> Iterator[Layer]:
        for layer in self.layers.values():
            if layer.inner is None:
                yield layer
            else:
                yield from layer.inner.leaves()


# --- reading the configuration ---------------------------------------------------------------------------------------


def parse(entry: Mapping[str, Any], group: str = "", depth: int = 0) -> Model:
    """The model in a configuration. Raises InputError or Unsupported, naming what cannot be understood."""
    if depth > MAX_NESTING:
        raise InputError(f"models are nested more than {MAX_NESTING} deep")
    kind, config = entry.get("class_name"), entry.get("config")
    if isinstance(config, list):  # a Sequential of Keras 2.2 and before
        config = {"layers": config, "name": "sequential"}
    if not isinstance(config, dict) or not isinstance(config.get("layers"), list):
        if isinstance(kind, str) and kind not in ("Functional", "Model", "Sequential"):
            raise Unsupported(
                f"the model is of the class {kind!a}, whose code alone knows how its layers are connected; save a "
                "functional or Sequential model, or export it to ONNX: model.export(path, format='onnx')"
            )
        raise InputError("the configuration has no list of layers")
    if kind not in ("Functional", "Model", "Sequential"):
        raise Unsupported(
            f"the model is of the class {kind!a}, which is not Keras's own, so its code may do anything; save it "
            "as a functional or Sequential model, or export it to ONNX: model.export(path, format='onnx')"
        )
    entries = config["layers"]
    if len(entries) > MAX_LAYERS:
        raise InputError(f"there are {len(entries):,} layers, more than {MAX_LAYERS:,}")
    numbers: dict[str, int] = {}
    layers: dict[str, Layer] = {}
    for item in entries:
        layer = _layer(item, group, numbers, depth)
        if layer.name in layers:
            raise InputError(f"two layers are called {layer.name!r}")
        layers[layer.name] = layer
    name = str(config.get("name") or entry.get("name") or "model")
    if kind == "Sequential":
        return _sequential(name, config, layers)
    model = Model(name, "Functional", layers, _refs(config, "input_layers"), _refs(config, "output_layers"))
    _number(model)
    return model


def _sequential(name: str, config: Mapping[str, Any], layers: dict[str, Layer]) -> Model:
    chain = list(layers.values())
    if not chain:
        raise InputError(f"the Sequential {name!r} has no layers; build it and save it again")
    if chain[0].kind != "InputLayer":
        shape = config.get("build_input_shape") or chain[0].config.get("batch_input_shape")
        start = Layer(_free("input", layers), "InputLayer", {"batch_shape": shape}, [])
        chain.insert(0, start)
    for before, layer in itertools.pairwise(chain):
        layer.calls, layer.first = [Call([Ref(before.name)])], 0
    return Model(name, "Sequential", {x.name: x for x in chain}, [Ref(chain[0].name)], [Ref(chain[-1].name)])


def _free(name: str, taken: Any) -> str:
    """The name, or with the next number that makes it new."""
    if name not in taken:
        return name
    number = 1
    while f"{name}_{number}" in taken:
        number += 1
    return f"{name}_{number}"


def _snake(kind: str) -> str:
    name = re.sub(r"\W+", "", kind)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def _layer(entry: Any, group: str, numbers: dict[str, int], depth: int) -> Layer:
    if not isinstance(entry, dict) or not isinstance(entry.get("class_name"), str):
        raise InputError("an entry of the list of layers is no layer")
    kind, config = entry["class_name"], entry.get("config")
    inner_list = isinstance(config, list)
    if not isinstance(config, (dict, list)):
        raise InputError(f"the {kind} has no configuration")
    named = entry.get("name") if inner_list else config.get("name", entry.get("name"))  # type: ignore[union-attr]
    name = str(entry.get("name") or named or _snake(kind))
    module = entry.get("module")
    registered, _, plain = kind.rpartition(">")
    ours = not (registered and registered != "keras")
    if isinstance(module, str) and module.partition(".")[0] not in ("keras", "tf_keras", "tensorflow", "builtins"):
        ours = False
    if module is None and "module" in entry:
        ours = False
    is_model = plain in ("Functional", "Model", "Sequential") and ours
    settings = {} if inner_list else dict(config)
    operation = isinstance(module, str) and ".ops." in module
    if "module" not in entry and isinstance(_first(entry), dict):  # in an .h5 of Keras 3 its own settings tell
        operation = not is_model and "trainable" not in settings and _operation(plain) in OPERATIONS
    layer = Layer(name, plain, settings, [], operation=operation, ours=ours)
    if not operation:
        stem = _snake(plain)
        number = numbers.get(stem, 0)
        numbers[stem] = number + 1
        layer.group = f"{group}layers/{stem}_{number}" if number else f"{group}layers/{stem}"
    if is_model:
        layer.inner = parse({**entry, "class_name": plain}, f"{layer.group}/", depth + 1)
    layer.calls = [_call(node, layer) for node in _nodes(entry.get("inbound_nodes") or [])]
    return layer


def _first(entry: Mapping[str, Any]) -> Any:
    nodes = entry.get("inbound_nodes")
    return nodes[0] if isinstance(nodes, list) and nodes else None


def _nodes(nodes: Any) -> list[Any]:
    if not isinstance(nodes, list):
        raise InputError("the calls of a layer are no list")
    if nodes and isinstance(nodes[0], str):  # one flat [name, node, tensor, {...}]
        return [[nodes]]
    return nodes


def _call(node: Any, layer: Layer) -> Call:
    if isinstance(node, dict):
        return Call(_tree(node.get("args") or []), _tree(node.get("kwargs") or {}))
    if isinstance(node, list) and node and isinstance(node[0], str):
        node = [node]
    if not isinstance(node, list):
        raise InputError(f"{layer.kind} {layer.name!r} has a call that cannot be understood")
    given: list[Any] = []
    kwargs: dict[str, Any] = {}
    for item in node:
        if not isinstance(item, list) or len(item) < 3 or not isinstance(item[0], str):
            raise InputError(f"{layer.kind} {layer.name!r} has a call that cannot be understood")
        given.append(
            _constant(item[2]) if item[0] == "_CONSTANT_VALUE" else Ref(item[0], _whole(item[1]), _whole(item[2]))
        )
        if len(item) > 3 and isinstance(item[3], dict):
            kwargs |= {key: _tree2(value) for key, value in item[3].items()}
    return Call(given if len(given) == 1 else [given], kwargs)


def _whole(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise InputError(f"a call has the number {number!r}; expected a whole one")
    return number


def _tree(value: Any) -> Any:
    """Arguments as Keras 3 writes them, with Refs for its tensors."""
    if isinstance(value, list):
        return [_tree(v) for v in value]
    if not isinstance(value, dict):
        return value
    kind, config = value.get("class_name"), value.get("config")
    if kind == "__keras_tensor__" and isinstance(config, dict):
        history = config.get("keras_history")
        if not isinstance(history, list) or len(history) != 3 or not isinstance(history[0], str):
            raise InputError("a tensor of the configuration has no history")
        return Ref(history[0], _whole(history[1]), _whole(history[2]))
    if kind in ("__tensor__", "__numpy__") and isinstance(config, dict):
        return _constant(config.get("value"))
    if kind == "__slice__" and isinstance(config, dict):
        return slice(*(config.get(k) for k in ("start", "stop", "step")))
    if kind == "__tuple__":
        return [_tree(v) for v in (config.get("value", []) if isinstance(config, dict) else config or [])]
    if kind == "__ellipsis__":
        return ...
    return {key: _tree(v) for key, v in value.items()}


def _tree2(value: Any) -> Any:
    """Keyword arguments as Keras 2 writes them: a tensor is [name, node, tensor]."""
    if isinstance(value, list):
        if len(value) in (3, 4) and isinstance(value[0], str) and all(type(v) is int for v in value[1:3]):
            return _constant(value[2]) if value[0] == "_CONSTANT_VALUE" else Ref(value[0], value[1], value[2])
        if len(value) in (3, 4) and value[0] == "_CONSTANT_VALUE":
            return _constant(value[2])
        return [_tree2(v) for v in value]
    if not isinstance(value, dict):
        return value
    if set(value) >= {"start", "stop", "step"}:
        return slice(*(_tree2(value[k]) for k in ("start", "stop", "step")))
    if value.get("class_name") == "__ellipsis__":
        return ...
    return {key: _tree2(v) for key, v in value.items()}


def _constant(value: Any) -> Any:
    """A number as it is, an array as an array."""
    if not isinstance(value, list):
        return value
    array = np.asarray(value, np.float32)
    return array if array.dtype.kind in "fiub" else value


def _refs(config: Mapping[str, Any], key: str) -> list[Ref]:
    found = _ends(config.get(key))
    if not found:
        raise InputError(f"the model has no {key}")
    return found


def _ends(value: Any) -> list[Ref]:
    if isinstance(value, dict):
        return [ref for key in sorted(value) for ref in _ends(value[key])]
    if isinstance(value, list):
        if len(value) == 3 and isinstance(value[0], str):
            return [Ref(value[0], _whole(value[1]), _whole(value[2]))]
        return [ref for item in value for ref in _ends(item)]
    raise InputError("the inputs and outputs of the model cannot be understood")


def _number(model: Model) -> None:
    """Keras 2 counts the making of an inner model as its call 0, so that calls are counted from 1."""
    highest: dict[str, int] = {}
    every = [
        ref for layer in model.layers.values() for call in layer.calls for ref in refs_in((call.args, call.kwargs))
    ]
    for ref in [*every, *model.outputs]:
        highest[ref.layer] = max(highest.get(ref.layer, 0), ref.node)
    for layer in model.layers.values():
        if layer.calls and layer.kind != "InputLayer":
            layer.first = max(0, highest.get(layer.name, 0) - (len(layer.calls) - 1))


def refs_in(tree: Any) -> Iterator[Ref]:
    if isinstance(tree, Ref):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from refs_in(item)
    elif isinstance(tree, dict):
        for key in sorted(tree, key=str):
            yield from refs_in(tree[key])
    elif isinstance(tree, slice):
        yield from refs_in((tree.start, tree.stop, tree.step))


def _operation(kind: str) -> str:
    """The name in OPERATIONS of a class or function: ExpandDims, math.reduce_mean, __operators__.add."""
    name = kind.rpartition(".")[2].strip("_")
    return name.lower() if name.islower() else _snake(name)


# --- weights ---------------------------------------------------------------------------------------------------------

_MORE_WEIGHTS = (  # some of which do not matter once training is over
    "Normalization", "BatchNormalization", "BatchNormalizationV1", "SyncBatchNormalization",
)  # fmt: skip
_PARTS = {"query": "query_dense", "key": "key_dense", "value": "value_dense", "attention_output": "output_dense"}


class Shelf:
    """The weights of a file, handed out layer by layer and checked against the configuration."""

    def __init__(self, contents: Contents, model: Model):
        self.by_number = contents.by_number
        self.any = bool(contents.weights)
        self.places: dict[str, Weight] = {}
        self.own: dict[int, list[Weight]] = {}
        self.in_group: dict[str, list[str]] = {}
        if self.by_number:
            self.places = {w.path.replace("_layer_checkpoint_dependencies/", "layers/"): w for w in contents.weights}
            for path in self.places:
                if (group := re.match(r".*\blayers/[^/]+", path)) and "/seed_generator/" not in path:
                    self.in_group.setdefault(group[0], []).append(path)
        else:
            self._share_out(contents.weights, model)

    def _share_out(self, weights: Sequence[Weight], model: Model) -> None:
        """Give each weight to its layer; those of an inner model lie in one list, named after their layers."""
        by_layer: dict[str, list[Weight]] = {}
        for weight in weights:
            by_layer.setdefault(weight.owner, []).append(weight)
        for layer in model.layers.values():
            mine = by_layer.get(layer.name, [])
            if layer.inner is None:
                self.own[id(layer)] = mine
                continue
            leaves = list(layer.inner.leaves())
            names = {leaf.name for leaf in leaves}
            found: dict[str, dict[str, list[Weight]]] = {}
            for weight in mine:
                owner, rest = _owner(weight.path, names)
                found.setdefault(owner, {}).setdefault(rest, []).append(weight)
            for leaf in leaves:  # of several layers of one name, each takes the next
                self.own[id(leaf)] = [rows.pop(0) for rows in found.get(leaf.name, {}).values() if rows]

    def of(self, layer: Layer, path: str) -> Callable[[str, int, Sequence[int | None] | None], np.ndarray]:
        def fetch(names: str, index: int, shape: Sequence[int | None] | None) -> np.ndarray:
            weight = self._numbered(layer, names, index) if self.by_number else self._named(layer, names, index)
            label = names.rpartition("|")[2]
            if weight is None:
                why = "" if self.any else ": the file holds none at all, as of a model that was never built"
                raise InputError(f"{layer.kind} {path!r} has no weights {label!r} in the file{why}; save it again")
            if self.by_number and not _belongs(weight.owner, layer, names):
                raise InputError(f"{layer.kind} {path!r} would get the weights of {weight.owner!a}")
            value = weight.value
            fits = shape is None or (
                len(shape) == value.ndim and all(a in (None, b) for a, b in zip(shape, value.shape, strict=True))
            )
            if not fits:
                wanted = ", ".join("any" if n is None else str(n) for n in shape or ())
                raise InputError(
                    f"{layer.kind} {path!r} has weights {label!r} of shape {value.shape}; its configuration says "
                    f"({wanted})"
                )
            return value

        return fetch

    def left(self, layer: Layer, taken: int) -> str:
        """A weight of the layer that was not asked for: then it computes something else than is known here."""
        if layer.kind in _MORE_WEIGHTS:
            return ""
        own = self.in_group.get(layer.group, []) if self.by_number else [w.path for w in self.own.get(id(layer), [])]
        return own[-1] if len(own) > taken else ""

    def all_of(self, layer: Layer) -> list[np.ndarray]:
        if not self.by_number:
            return [w.value for w in self.own.get(id(layer), [])]
        found = [(p, w) for p, w in self.places.items() if p.startswith(f"{layer.group}/")]
        return [w.value for _, w in sorted(found, key=lambda pair: _numeric(pair[0]))]

    def _numbered(self, layer: Layer, names: str, index: int) -> Weight | None:
        part, _, last = names.partition("/")
        if not last:
            inner = "layer/" if layer.kind == "TimeDistributed" else ""
            return self.places.get(f"{layer.group}/{inner}vars/{index}")
        number = int(last == "bias")
        folder = _PARTS.get(part, part)
        return self.places.get(f"{layer.group}/{folder}/vars/{number}") or self.places.get(
            f"{layer.group}/_{folder}/vars/{number}"
        )

    def _named(self, layer: Layer, names: str, index: int) -> Weight | None:
        mine = self.own.get(id(layer), [])
        for name in names.split("|"):
            for weight in mine:
                if f"/{_clean(weight.path)}".endswith(f"/{name}"):
                    return weight
        # Weights that their layer did not name are called "variable" or the like: then their place tells.
        nameless = mine and all(re.fullmatch(r"[Vv]ariable(_\d+)?", _clean(w.path).rpartition("/")[2]) for w in mine)
        return mine[index] if nameless and index < len(mine) else None


def _belongs(owner: str, layer: Layer, names: str) -> bool:
    """Whether a group named after `owner` can hold these weights of a layer; files before Keras 3.8 do not say."""
    part = names.partition("/")[0]
    inner = layer.config.get("layer")
    config = inner.get("config") if isinstance(inner, dict) else None
    wrapped = config.get("name") if isinstance(config, dict) else None
    return owner in ("", layer.name, part, _PARTS.get(part), wrapped)


def _numeric(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split("/")]


def _clean(path: str) -> str:
    return re.sub(r":\d+$", "", path)


def _owner(path: str, names: set[str]) -> tuple[str, str]:
    """The layer in a weight's path that stands last, the longest of those, and what is behind it."""
    parts = _clean(path).split("/")
    for end in range(len(parts) - 1, 0, -1):
        for start in range(end):
            if (name := "/".join(parts[start:end])) in names:
                return name, "/".join(parts[end:])
    return "", path


# --- making the graph ------------------------------------------------------------------------------------------------


class Assembly:
    """Turns a parsed model into steps, constants and the modules of the user's own classes."""

    def __init__(self, model: Model, contents: Contents, custom: Mapping[str, Any], keras2: bool):
        self.model = model
        self.shelf = Shelf(contents, model)
        self.custom = custom
        self.keras2 = keras2
        self.steps: list[Step] = []
        self.constants: dict[Any, torch.Tensor] = {}
        self.modules: dict[str, nn.Module] = {}
        self.built: dict[int, tuple[Apply, list[tuple[str, Any]]]] = {}
        self.taken: set[str] = set()
        self.calls: dict[str, int] = {}

    def graph(self, start: Callable[[torch.Tensor], Value]) -> Graph:
        """The network as a module; `start` makes of the input tensor what Keras's input layer gives."""
        source, *others = self.model.inputs
        if others:
            names = ", ".join(ref.layer for ref in self.model.inputs)
            raise Unsupported(
                f"the model takes {len(others) + 1} inputs ({names}); innersight explains networks of one"
            )
        name = source.layer
        self.taken.add(name)
        key = (name, 0)
        self.steps.append(Step(name, "InputLayer", start, ("input",), (key,)))
        outputs = self._expand(self.model, "", [key])
        return self._finished(outputs)

    def _finished(self, outputs: list[Any]) -> Graph:
        graph = Graph(self.steps, "input", outputs, self.constants, finish=_outcome)
        for name, module in self.modules.items():  # under the layer's own name, which observers then see
            name = name.replace(".", "_")
            graph.add_module(f"custom_{name}" if hasattr(graph, name) else name, module)
        return graph

    def _expand(self, model: Model, prefix: str, given: list[Any]) -> list[Any]:
        """Add the steps of a model called on the values with these keys; the keys of what it returns."""
        if len(given) != len(model.inputs):
            raise InputError(f"the model {model.name!r} takes {len(model.inputs)} inputs and is called on {len(given)}")
        values: dict[Ref, Any] = dict(zip(model.inputs, given, strict=True))
        needed = self._needed(model)
        calls = [
            (layer, k + layer.first, call)
            for layer in model.layers.values()
            for k, call in enumerate(layer.calls)
            if (layer.name, k + layer.first) in needed
        ]
        for layer, node, call in self._in_order(calls, values, prefix):
            name = self._named(prefix, layer.name, model)
            read = list(refs_in((call.args, call.kwargs)))
            count = needed[layer.name, node]
            keys = self._add(layer, prefix, name, call, values, read, count)
            if len(keys) < count:
                raise InputError(f"{layer.kind} {name!r} returns {len(keys)} values, and {count} are read")
            for tensor, key in enumerate(keys):
                values[Ref(layer.name, node, tensor)] = key
        if missing := [ref for ref in model.outputs if ref not in values]:
            raise InputError(f"the model {model.name!r} returns {missing[0].layer!r}, which no layer makes")
        return [values[ref] for ref in model.outputs]

    def _in_order(
        self, calls: list[tuple[Layer, int, Call]], values: Mapping[Ref, Any], prefix: str
    ) -> Iterator[tuple[Layer, int, Call]]:
        """The calls as they are listed, but each behind those it reads from."""
        made = {(ref.layer, ref.node) for ref in values}
        number = {(layer.name, node): i for i, (layer, node, _) in enumerate(calls)}
        waits: list[set[tuple[str, int]]] = []
        readers: dict[tuple[str, int], list[int]] = {}
        for i, (_, _, call) in enumerate(calls):
            waits.append({(ref.layer, ref.node) for ref in refs_in((call.args, call.kwargs))} - made)
            for key in waits[i]:
                readers.setdefault(key, []).append(i)
        ready = [i for i, missing in enumerate(waits) if not missing]
        done = 0
        while ready:
            layer, node, call = calls[heapq.heappop(ready)]
            yield layer, node, call
            done += 1
            for i in readers.get((layer.name, node), ()):
                waits[i].discard((layer.name, node))
                if not waits[i]:
                    heapq.heappush(ready, i)
        if done < len(calls):
            i = next(i for i, missing in enumerate(waits) if missing)
            first = min(waits[i], key=lambda key: number.get(key, -1))
            layer = calls[i][0]
            raise InputError(
                f"{layer.kind} {prefix + layer.name!r} reads {first[0]!r}, which is missing or needs it in turn"
            )

    def _named(self, prefix: str, name: str, model: Model) -> str:
        """The layer's name; for a second call with the next number that neither a layer nor a call has."""
        full, number = prefix + name, self.calls.get(prefix + name, 0)
        found = full if not number else f"{full}_{number}"
        while number and (found in self.taken or found.removeprefix(prefix) in model.layers):
            number += 1
            found = f"{full}_{number}"
        self.calls[full] = number + 1
        self.taken.add(found)
        return found

    def _needed(self, model: Model) -> dict[tuple[str, int], int]:
        """The calls that the outputs depend on, and how many values each must hand out."""
        calls = {(x.name, k + x.first): call for x in model.layers.values() for k, call in enumerate(x.calls)}
        needed: dict[tuple[str, int], int] = {}
        pending = list(model.outputs)
        seen: set[Ref] = set()
        while pending:
            ref = pending.pop()
            if ref in seen:
                continue
            seen.add(ref)
            key = ref.layer, ref.node
            first = key not in needed
            needed[key] = max(needed.get(key, 0), ref.tensor + 1)
            if first and key in calls:
                pending += refs_in((calls[key].args, calls[key].kwargs))
        return needed

    def _add(
        self, layer: Layer, prefix: str, name: str, call: Call, values: dict[Ref, Any], read: list[Ref], count: int
    ) -> list[Any]:
        if len(self.steps) > MAX_LAYERS:
            raise InputError(f"there are more than {MAX_LAYERS:,} calls of layers")
        if layer.inner is not None:
            inner = self._expand(layer.inner, f"{name}/", [values[ref] for ref in read])
            keys = [(name, k) for k in range(len(inner))]
            for key, made in zip(keys, inner, strict=True):  # so that the model's own name means its output, too
                label = f"{name}:{key[1]}" if key[1] else name
                self.steps.append(Step(label, layer.inner.kind, _same, (made,), (key,)))
            return keys
        apply, weights = self._apply(layer, prefix)
        args, kwargs = _arguments(layer, call)
        order = {ref: i for i, ref in enumerate(dict.fromkeys(refs_in((args, kwargs))))}
        names = [w for w, _ in weights]
        if count > 64:
            raise InputError(f"{layer.kind} {name!r} would make {count} values")
        step = _Run(f"{layer.kind} {name!r}", apply, names, args, kwargs, order, count)
        keys = [(name, k) for k in range(count)]
        inputs = (*(values[ref] for ref in order), *(key for _, key in weights))
        kind = layer.kind if layer.kind not in _LAMBDAS else _operation(_function(layer))
        self.steps.append(Step(name, kind, step, inputs, tuple(keys)))
        return keys

    def _apply(self, layer: Layer, prefix: str) -> tuple[Apply, list[tuple[str, Any]]]:
        if id(layer) in self.built:
            return self.built[id(layer)]
        path = prefix + layer.name
        kept: dict[str, torch.Tensor] = {}
        if layer.kind in self.custom and not (layer.ours and layer.kind in LAYERS):
            apply = self._custom(layer, path)
        elif layer.operation or layer.kind in _LAMBDAS:
            apply = _operation_of(layer, path)
        elif layer.kind not in LAYERS or not layer.ours:
            raise Unsupported(_unknown(layer, path))
        else:
            if policy := _quantised(layer):
                raise Unsupported(
                    f"{layer.kind} {path!r} is quantised by Keras ({policy}), which is not known here; save the model "
                    "as it was before quantize()"
                )
            b = Build(path, layer.kind, layer.config, self.shelf.of(layer, path), self.keras2, self.custom)
            apply = LAYERS[layer.kind](b)
            kept = b.kept
            if more := self.shelf.left(layer, b.taken):
                raise Unsupported(f"{layer.kind} {path!r} has more weights than are known of its kind ({more!a})")
            self.modules |= {f"{path}/{name}": module for name, module in b.modules.items()}
        weights = [(name, (path, name)) for name in kept]
        self.constants |= {(path, name): tensor for name, tensor in kept.items()}
        self.built[id(layer)] = apply, weights
        return apply, weights

    def _custom(self, layer: Layer, path: str) -> Apply:
        weights = [torch.from_numpy(np.array(a, copy=True)) for a in self.shelf.all_of(layer)]
        try:
            made = self.custom[layer.kind](dict(layer.config), weights)
        except Exception as error:
            raise InputError(f"custom={{{layer.kind!r}: ...}} failed for {path!r}: {error!r}") from error
        if not isinstance(made, nn.Module):
            raise InputError(f"custom={{{layer.kind!r}: ...}} must return a torch.nn.Module, got {type(made).__name__}")
        made.eval()
        self.modules[path] = made

        def apply(_: Any, *values: Any, **__: Any) -> Value:
            flat = [v for v in _flat(values) if isinstance(v, Value)]
            moved = any(v.moved for v in flat)
            out = made(*(channels_first(v) if moved else v.tensor for v in flat))
            return Value(out, moved and out.dim() > 2)

        return apply


def _quantised(layer: Layer) -> str:
    """The name of a policy by which weights are kept as whole numbers with a scale; empty if it has none."""
    policy = layer.config.get("dtype")
    if isinstance(policy, dict):
        config = policy.get("config")
        name = config.get("name") if isinstance(config, dict) else None
        whole = str(policy.get("class_name")).startswith("Quantized")
        return str(name or policy.get("class_name")) if whole else ""
    return policy if isinstance(policy, str) and "_from_" in policy else ""


def _flat(tree: Any) -> Iterator[Any]:
    if isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _flat(item)
    else:
        yield tree


def _same(v: Any) -> Any:
    return v


def _outcome(value: Any) -> torch.Tensor:
    return value.tensor if isinstance(value, Value) else value


_LAMBDAS = ("TFOpLambda", "SlicingOpLambda", "InstanceMethod", "ClassMethod")


def _function(layer: Layer) -> str:
    if layer.kind == "SlicingOpLambda":
        return "getitem"
    found = layer.config.get("function") or layer.config.get("method_name") or ""
    return found if isinstance(found, str) else ""


def operation_name(layer: Layer) -> str:
    """The name in OPERATIONS of what an operation does; empty for a layer."""
    if layer.kind in _LAMBDAS:
        return _operation(_function(layer))
    return _operation(layer.kind) if layer.operation else ""


def _operation_of(layer: Layer, path: str) -> Apply:
    name = operation_name(layer)
    if name not in OPERATIONS:
        said = _function(layer) if layer.kind in _LAMBDAS else layer.kind
        raise Unsupported(
            f"the operation {said!a} ({path!r}) is not known here; export the model to ONNX instead, or write it "
            "with layers"
        )
    run = operation(name)
    if layer.kind in _LAMBDAS:
        if name == "gelu":  # tf.nn.gelu is exact unless told otherwise, keras.ops.gelu the other way round
            return lambda _, *args, **kwargs: run(*args, **{"approximate": False, **kwargs})
        return lambda _, *args, **kwargs: run(*args, **kwargs)
    stated = {k: _tree(v) for k, v in layer.config.items() if k != "trainable"}
    return lambda _, *args, **kwargs: run(*args, **{**stated, **kwargs})


def _unknown(layer: Layer, path: str) -> str:
    if layer.kind == "Lambda":
        return (
            f"Lambda {path!r} holds Python code of its author, which innersight does not run; replace it by layers, or "
            "export the model to ONNX: model.export(path, format='onnx')"
        )
    if layer.ours and layer.kind in ("LSTM", "GRU", "SimpleRNN", "RNN", "Bidirectional", "ConvLSTM2D", "TFSMLayer"):
        return f"{layer.kind} {path!r} is a kind of layer that innersight does not open; export the model to ONNX"
    return (
        f"{layer.kind!a} {path!r} is not a layer that innersight knows; say what stands for it with "
        f"custom={{{layer.kind!a}: make}}, where make(config, weights) returns a torch.nn.Module"
    )


def _arguments(layer: Layer, call: Call) -> tuple[list[Any], dict[str, Any]]:
    """What a layer is called with: of the keywords, those that matter to what it computes."""
    args, kwargs = list(call.args), dict(call.kwargs)
    if layer.operation or layer.kind in _LAMBDAS:
        kwargs.pop("name", None)
        return args, kwargs
    for name in ("inputs", "input", "x", "query"):
        if not args and name in kwargs:
            args = [kwargs.pop(name)]
    if layer.kind != "MultiHeadAttention":
        if any(True for _ in refs_in(kwargs)):
            raise Unsupported(f"{layer.kind} {layer.name!r} is called with further tensors, which is not known here")
        if layer.kind != "Softmax":
            kwargs = {}
    kwargs.pop("training", None)
    args = [a for a in args if any(True for _ in refs_in(a))]  # not `training`, given by position
    if not args:
        raise InputError(f"{layer.kind} {layer.name!r} is called on nothing")
    return args, kwargs


class _Run:
    """One call of a layer: puts the values read where its arguments have Refs, and its name before what goes wrong."""

    def __init__(self, title: str, apply: Apply, names: list[str], args: Any, kwargs: Any, order: Mapping[Ref, int],
                 count: int):  # fmt: skip
        self.title, self.apply, self.names, self.args, self.kwargs = title, apply, names, args, kwargs
        self.order, self.count = order, count
        plain = not kwargs and all(isinstance(a, Ref) for a in args)
        self.places = [order[a] for a in args] if plain else None

    def __call__(self, *given: Any) -> Any:
        values = given[: len(self.order)]
        weights = dict(zip(self.names, given[len(self.order) :], strict=True))
        try:
            if self.places is not None:
                made = self.apply(weights, *(values[i] for i in self.places))
            else:
                made = self.apply(weights, *self._fill(self.args, values), **self._fill(self.kwargs, values))
        except (InputError, Unsupported) as error:
            raise type(error)(f"{self.title}: {error}") from error
        if self.count == 1:
            return made[0] if isinstance(made, tuple) else made
        return made[: self.count]

    def _fill(self, tree: Any, values: Sequence[Any]) -> Any:
        if isinstance(tree, Ref):
            return values[self.order[tree]]
        if isinstance(tree, list):
            return [self._fill(item, values) for item in tree]
        if isinstance(tree, dict):
            return {key: self._fill(item, values) for key, item in tree.items()}
        if isinstance(tree, np.ndarray):
            like = next(v.tensor for v in values if isinstance(v, Value))
            return Value(torch.from_numpy(tree.copy()).to(like))
        return tree
