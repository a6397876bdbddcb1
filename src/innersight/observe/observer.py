"""Watch a torch model run, operation by operation, without touching the model.

Two modes do the work. `learn` runs the model once and writes down every torch call: its name, what it read, what it
made. `Runner` goes through the same calls again by position, with nothing to look up, and reads, cuts or changes what
was asked for. Should a call differ from what was learnt, it raises `Diverged` instead of reading the wrong place.

Names follow torchvision's feature-extraction nodes: the module path for what a `torch.nn` layer returns
(`layer1.0.conv1`), `path.operation` for everything else (`layer1.0.add`), with `_1`, `_2` for repeats.
"""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode

from innersight import errors

# ---------------------------------------------------------------------------------------------------------------------
# What a recording holds


@dataclass(frozen=True)
class Ref:
    """Stands, in a node's arguments, for a tensor that descends from the model's input."""

    node: int
    output: int = 0


@dataclass(frozen=True)
class Const:
    """Stands, in a node's arguments, for any other tensor: a weight, a table, a constant."""

    shape: tuple[int, ...]
    parameter: bool = False


@dataclass
class Node:
    """One operation on something that descends from the input.

    kind: "input"; "layer" (a new floating tensor); "view" (shares memory with what it read); "copy" (same values
    elsewhere or in another shape); "inner" (on the way to a layer's exact value: a float twin, sums of integers);
    "opaque" (made where nothing can be watched); "sink" (leaves tensors: `.item()`); "other" (integers, booleans,
    vectors).
    """

    index: int
    op: str
    path: str
    kind: str
    inputs: tuple[int, ...]
    args: tuple
    kwargs: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...]
    itemsize: int
    inplace: bool
    position: int
    parameters: int = 0
    partial: bool = False  # written into part of what another live tensor holds, or into what the model keeps
    base: int | None = None  # the node whose memory this one shares (a view) or writes into
    slot: int | None = None  # opaque: which tensor of the call at `position`, the first to read it (None: not yet read)
    name: str = ""
    owner: str = ""  # the torch.nn leaf module that returned this value, if one did
    module: str = ""  # that module's class

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shapes[0] if self.shapes else ()


@dataclass
class Call:
    """One torch call of the run, watched or not: what a second run must do again at this position."""

    func: Callable
    held: tuple[tuple[int | str, int], ...] = ()  # (argument, id) of weights: two experts may run the same operations
    node: int | None = None
    writes: bool = False
    grad_mode: bool = False


@dataclass
class Recording:
    """What one run did: every call in order, a node for each that descends from the input, and their names."""

    calls: list[Call]
    nodes: list[Node]
    aliases: dict[str, list[int]]
    inputs: list[int]
    outputs: tuple[Ref, ...]
    batch: int
    by_name: dict[str, Node] = field(default_factory=dict)
    gaps: bool = False  # tensors turned up that no operation was seen to make, so `inputs` of nodes may lack some
    opened: bool = False  # scaled_dot_product_attention was run as the operations it stands for

    @property
    def layers(self) -> list[Node]:
        return [n for n in self.nodes if n.kind in ("layer", "opaque")]

    def handed_on(self, node: Node) -> Node | None:
        """The node whose value a node hands on, as it is or as integers; None for one that computes."""
        if node.op == "exact" and isinstance(node.args[0], Ref):
            return self.nodes[node.args[0].node]
        same = node.kind in ("view", "copy") or (node.kind == "inner" and node.op == "clamp")
        return self.nodes[node.inputs[0]] if same and node.inputs else None

    def bottlenecks(self) -> list[Node]:
        """The nodes that every path from the input to the first output passes through, in run order."""
        if not self.outputs:
            return []
        last = self.outputs[0].node
        upstream = {last}
        for node in reversed(self.nodes[: last + 1]):
            if node.index in upstream:
                upstream.update(node.inputs)
        # A node is on every path if as many paths lead through it as there are at all (exact: Python's integers).
        before = dict.fromkeys(self.inputs, 1)
        behind = dict.fromkeys(upstream, 0) | {last: 1}
        for node in self.nodes[: last + 1]:
            if node.index in upstream and node.inputs:
                before[node.index] = sum(before.get(i, 0) for i in node.inputs)
        for node in reversed(self.nodes[: last + 1]):
            if node.index in upstream:
                for i in node.inputs:
                    behind[i] += behind[node.index]
        every = before.get(last, 0)
        return [n for n in self.nodes if n.index in upstream and before.get(n.index, 0) * behind[n.index] == every]

    def find(self, name: str) -> Node:
        """The node of that name; the name of a module means the value it returned (its last call has `_N`)."""
        if node := self.by_name.get(name):
            return node
        if name in self.aliases:
            return self.nodes[self.aliases[name][0]]
        stem, _, number = name.rpartition("_")
        if stem in self.aliases and number.isdigit() and 0 < int(number) < len(self.aliases[stem]):
            return self.nodes[self.aliases[stem][int(number)]]
        names = [n.name for n in self.layers] + list(self.aliases)
        raise errors.unknown("layer", name, dict.fromkeys(names), " in this network")


# ---------------------------------------------------------------------------------------------------------------------
# Reading a torch call

# Calls that make nothing new of the picture, or only shape. They are counted, so that positions hold, and pass through.
_QUIET = frozenset(
    "size dim ndimension numel nelement is_contiguous is_floating_point is_complex stride storage_offset element_size "
    "get_device data_ptr untyped_storage storage requires_grad_ retain_grad register_hook share_memory_ is_pinned "
    "_assert _assert_async __len__ __repr__ __format__ __hash__ sym_size sym_numel sym_stride is_tensor "
    "_has_compatible_shallow_copy_type is_same_size result_type can_cast is_grad_enabled _set_grad_enabled "
    "set_grad_enabled _assert_tensor_metadata".split()
)
_GRAD_MODE = frozenset({"_set_grad_enabled", "set_grad_enabled"})
# Made from a tensor's shape alone: what they return does not descend from the picture.
_FACTORIES = ("_like", "new_")
# The same values elsewhere, in another type or another shape: resolvable by name, but no layer of its own.
_COPIES = frozenset(
    "contiguous clone to to_copy float double half bfloat16 type type_as cpu cuda reshape view flatten unflatten "
    "detach alias dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout "
    "native_dropout expand expand_as repeat repeat_interleave tile masked_fill setitem copy requires_grad lift_fresh "
    "roll flip stack unbind split chunk tensor_split split_with_sizes index_select squeeze unsqueeze transpose permute "
    "movedim swapaxes T mT data real getitem nan_to_num".split()
)
# Where `inplace` stands when it is given by position.
_INPLACE_SLOT = {
    **dict.fromkeys("relu relu6 silu hardswish hardsigmoid mish selu".split(), 1),
    **dict.fromkeys("leaky_relu elu celu".split(), 2),
    **dict.fromkeys("hardtanh threshold dropout alpha_dropout dropout1d dropout2d dropout3d".split(), 3),
    "rrelu": 4,
}
_INPLACE_DUNDERS = frozenset(
    "__iadd__ __isub__ __imul__ __itruediv__ __ifloordiv__ __ipow__ __iand__ __ior__ __ixor__ __imod__ "
    "__ilshift__ __irshift__ __imatmul__ __setitem__".split()
)
_RENAMED = {"max_pool1d_with_indices": "max_pool1d", "max_pool2d_with_indices": "max_pool2d",
            "max_pool3d_with_indices": "max_pool3d", "truediv": "div", "_to_copy": "to",
            "adaptive_max_pool2d_with_indices": "adaptive_max_pool2d", "_convolution": "convolution",
            "_safe_softmax": "softmax"}  # fmt: skip


def raw_name(func: Callable) -> str:
    """The name a torch call goes by: `add_`, `__iadd__`, `conv2d`; of an attribute read, the attribute's.

    `x.data = y` is a write like any other: `set_data_`.
    """
    name = getattr(func, "__name__", None) or type(func).__name__
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", name)
    if name == "__set__" and getattr(getattr(func, "__self__", None), "__name__", "") == "data":
        return "set_data_"
    return name.partition(".")[0]  # conv2d.default


def op_name(name: str) -> str:
    """The operation's common name: `add_`, `__iadd__` and `__radd__` are all `add`."""
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
        if name[:1] in ("r", "i") and name[1:] in _OPERATORS:
            name = name[1:]
    elif name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    return _RENAMED.get(name, name)


_OPERATORS = frozenset(
    "add sub mul truediv floordiv div pow matmul mod and or xor lshift rshift".split()
)  # what r and i may stand before


def written(name: str, args: tuple, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """The tensor a call writes into, if it writes into one that exists."""
    if isinstance(kwargs.get("out"), torch.Tensor):
        return kwargs["out"]
    slot = _INPLACE_SLOT.get(name)
    by_name = name in _INPLACE_DUNDERS or (name.endswith("_") and not name.endswith("__"))
    by_argument = kwargs.get("inplace") is True or (slot is not None and args[slot : slot + 1] == (True,))
    target = (args[0] if args else kwargs.get("input")) if by_name or by_argument else None
    return target if isinstance(target, torch.Tensor) else None


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested tuples, lists and dicts, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif hasattr(value, "__dataclass_fields__"):
        for item in value.__dataclass_fields__:
            yield from tensors_in(getattr(value, item, None))


def map_tensors(value: Any, fn: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with every tensor in it changed; of a kind this does not know, only what is known inside."""
    if isinstance(value, torch.Tensor):
        return fn(value)
    if isinstance(value, (tuple, list)):
        return like(value, [map_tensors(v, fn) for v in value])
    if isinstance(value, Mapping):
        return like(value, {k: map_tensors(v, fn) for k, v in value.items()})
    return value


def like(value: Any, items: Any) -> Any:
    """`items` as the kind of collection that `value` is."""
    if isinstance(items, dict):
        return type(value)(**items) if all(isinstance(k, str) for k in items) else items
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def first_tensor(value: Any) -> torch.Tensor | None:
    if isinstance(value, torch.Tensor):
        return value
    return next(tensors_in(value), None)


def with_first(value: Any, new: torch.Tensor) -> Any:
    """`value` with its first tensor replaced; named tuples of torch stay what they are."""
    if isinstance(value, torch.Tensor):
        return new
    items = list(value)
    items[0] = with_first(items[0], new)
    if isinstance(value, list):
        return items
    return type(value)(items) if type(value).__module__ == "torch.return_types" else tuple(items)


def storage_key(tensor: torch.Tensor) -> int | None:
    """Equal for tensors that share memory; None for those that have none of their own (sparse, nested)."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


def version(tensor: torch.Tensor) -> int | None:
    """Torch's count of in-place writes; inference tensors keep none."""
    try:
        return tensor._version
    except RuntimeError:
        return None


# `F.multi_head_attention_forward` reaches a mode as one call. A copy of the function whose globals deny the mode runs
# its inside under it: its linear, softmax and attention calls then arrive one by one, and nothing global is patched.
_ATTENTION = F.multi_head_attention_forward
_ATTENTION_OPEN = types.FunctionType(
    _ATTENTION.__code__,
    {**_ATTENTION.__globals__, **dict.fromkeys(
        ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), lambda *_: False)},
    _ATTENTION.__name__, _ATTENTION.__defaults__, _ATTENTION.__closure__,
)  # fmt: skip
_ATTENTION_OPEN.__kwdefaults__ = _ATTENTION.__kwdefaults__


def _run_under(mode: TorchFunctionMode, fn: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    _push_mode(mode)  # not `with mode:`, which would run the observer's own enter and exit in the middle of a run
    try:
        return fn(*args, **kwargs)
    finally:
        _pop_mode()


def _run_attention_under(mode: TorchFunctionMode, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    return _run_under(mode, _ATTENTION_OPEN, args, kwargs)


FUSED = "scaled_dot_product_attention"


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What `F.scaled_dot_product_attention` computes, as operations of their own: its weights can be read."""
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    scores = torch.matmul(query * (query.shape[-1] ** -0.5 if scale is None else scale), key.transpose(-2, -1))
    if is_causal:
        past = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(past.logical_not(), -torch.inf)
    if attn_mask is None:
        weights = torch.softmax(scores, -1)
    else:
        hides = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(attn_mask.logical_not(), -torch.inf) if hides else scores + attn_mask
        weights = torch._safe_softmax(scores, -1)  # a row that may look nowhere: zeros, not NaN
    if dropout_p:
        weights = F.dropout(weights, dropout_p)
    return torch.matmul(weights, value)


# ---------------------------------------------------------------------------------------------------------------------
# Learning

_learning = threading.local()


def call_as(path: str, fn: Callable, *args: Any, leaf: bool = True, kind: str = "", **kwargs: Any) -> Any:
    """Run `fn` as the part of the network called `path`; with `leaf` what it returns is the layer of that name.

    kind: what the layer is called in tables ("Conv2D"); by default the operation.

    For interpreters of other formats, which have operations but no modules. Costs nothing unless a run is learnt.
    """
    learner: _Learner | None = getattr(_learning, "learner", None)
    if learner is None:
        return fn(*args, **kwargs)
    entered = [(watching, watching.enter(path)) for watching in learner.and_outer()]
    out = None
    try:
        out = fn(*args, **kwargs)
        return out
    finally:
        for watching, depth in entered:
            watching.leave(depth, out, leaf=path if leaf else "", kind=kind)


class _Learner(TorchFunctionMode):
    """Writes down a run. Module paths come from process-wide hooks that heed only this thread and these modules."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.thread = threading.get_ident()
        self.outer: _Learner | None = getattr(_learning, "learner", None)
        self.paths: dict[int, list[str]] = {}
        for path, m in module.named_modules(remove_duplicate=False):
            self.paths.setdefault(id(m), []).append(path)
        self.calls: list[Call] = []
        self.nodes: list[Node] = []
        self.aliases: dict[str, list[int]] = {}
        self.scope: list[tuple[str, int]] = [("", 0)]  # (module path, first node of that call)
        self.marks: dict[int, tuple[weakref.ref, tuple[Ref, ...]]] = {}
        self.sharing: dict[int, list[weakref.ref]] = {}
        # Kept, not only their ids: a model may replace them as it runs, and ids are used again.
        self.constants = {id(t): t for m in module.modules() for t in _tensors_held(m)}
        self.weights = {id(t): t for m in module.modules() for t in _weights_of(m)}
        self.unplaced: set[int] = set()  # opaque nodes that nothing has read yet
        self.gaps = False
        self.opened = False
        self.batch = 0
        self.check: Callable[[Node, torch.Tensor], None] | None = None

    def and_outer(self) -> Iterator[_Learner]:
        """This one and those around it, where a run is learnt inside another."""
        yield self
        if self.outer is not None:
            yield from self.outer.and_outer()

    # -- who descends from the input

    def mark(self, tensor: torch.Tensor, refs: tuple[Ref, ...]) -> None:
        ref = weakref.ref(tensor)
        self.marks[id(tensor)] = ref, refs
        if (key := storage_key(tensor)) is not None:
            self.sharing.setdefault(key, []).append(ref)

    def refs(self, tensor: torch.Tensor) -> tuple[Ref, ...] | None:
        """The nodes a tensor descends from: () for one made from constants alone, None for one never seen."""
        entry = self.marks.get(id(tensor))
        return entry[1] if entry and entry[0]() is tensor else None

    def add_input(self, tensor: torch.Tensor) -> int:
        node = self.add("input", "input", (), (), {}, [tensor], False, -1)
        self.batch = self.batch or (tensor.shape[0] if tensor.dim() else 1)
        self.mark(tensor, (Ref(node.index),))
        return node.index

    def add(self, op: str, kind: str, inputs: tuple, args: tuple, kwargs: dict, outs: list, inplace: bool,
            position: int) -> Node:  # fmt: skip
        node = Node(
            len(self.nodes), op, self.scope[-1][0], kind, inputs, args, kwargs,
            tuple(tuple(t.shape) for t in outs), outs[0].element_size() if outs else 0, inplace, position,
        )  # fmt: skip
        self.nodes.append(node)
        return node

    # -- modules

    def enter(self, path: str) -> int:
        self.scope.append((path, len(self.nodes)))
        return len(self.scope)

    def leave(self, depth: int, output: Any, leaf: str, kind: str) -> None:
        path, first = self.scope[depth - 1]
        del self.scope[depth - 1 :]
        tensor = first_tensor(output)
        refs = self.refs(tensor) if tensor is not None else None
        if refs and refs[-1].output == 0:  # what an operation returned besides cannot be read under its name
            node = self.nodes[refs[-1].node]
            self.aliases.setdefault(path, []).append(node.index)
            if leaf and node.index >= first and node.path == path and node.kind != "input":
                node.owner, node.module = leaf, kind
                if node.op == "exact":
                    for inside in self.nodes[first : node.index]:
                        inside.kind = "inner" if inside.kind == "layer" else inside.kind
                        node.parameters += inside.parameters

    def before(self, module: nn.Module, _args: Any) -> None:
        if threading.get_ident() == self.thread and (paths := self.paths.get(id(module))) and paths[0]:
            self.enter(paths[0])

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() != self.thread:
            return
        paths = self.paths.get(id(module))
        if not paths or not paths[0]:
            return
        depth = len(self.scope)
        while depth > 1 and self.scope[depth - 1][0] != paths[0]:  # calls that ended in an exception left no event
            depth -= 1
        if depth == 1:
            return
        if isinstance(module, torch.jit.ScriptModule):
            with torch._C.DisableTorchFunction():
                self.opaque(args, output)
        leaf = type(module).__module__.startswith("torch.nn.modules") and next(module.children(), None) is None
        self.leave(depth, output, paths[0] if leaf else "", type(module).__name__ if leaf else "")
        for other in paths[1:]:  # the same module under a second name
            if paths[0] in self.aliases:
                self.aliases[other] = self.aliases[paths[0]]

    def opaque(self, args: Any, output: Any) -> None:
        """A scripted part of the network: its inside cannot be seen, what it made can."""
        outs = [t for t in tensors_in(output) if t.is_floating_point() and self.refs(t) is None]
        inputs = tuple(dict.fromkeys(r.node for t in tensors_in(args) for r in self.refs(t) or ()))
        if outs and inputs:
            self.add_opaque(inputs, outs)

    def add_opaque(self, inputs: tuple[int, ...], outs: list[torch.Tensor]) -> tuple[Ref, ...]:
        node = self.add("opaque", "opaque", inputs, (), {}, outs, False, len(self.calls))
        self.unplaced.add(node.index)
        for k, t in enumerate(outs):
            self.mark(t, (Ref(node.index, k),))
        if self.check is not None:
            self.check(node, outs[0])
        return (Ref(node.index),)

    def place(self, refs: tuple[Ref, ...], position: int, slot: int) -> None:
        """No call made an opaque value: it will be found again as this tensor of the call that first reads it."""
        for ref in refs:
            if ref.output == 0 and ref.node in self.unplaced:
                self.unplaced.discard(ref.node)
                self.nodes[ref.node].position, self.nodes[ref.node].slot = position, slot

    # -- operations

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _ATTENTION:
            return _run_attention_under(self, args, kwargs)
        name = raw_name(func)
        if self.opened and name == FUSED:
            return self.attend(args, kwargs)
        call = Call(func, grad_mode=name in _GRAD_MODE)
        position = len(self.calls)
        self.calls.append(call)
        if name in _QUIET:
            return func(*args, **kwargs)
        target = written(name, args, kwargs)
        call.writes = target is not None or (name == "batch_norm" and _updates_statistics(args, kwargs))
        given = (*enumerate(args), *kwargs.items())
        call.held = tuple((where, id(a)) for where, a in given if id(a) in self.weights)
        with torch._C.DisableTorchFunction():  # an outer observer has no business with our own calls
            read = self.reads(args, kwargs, position)
        out = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            self.note(call, name, func, args, kwargs, read, target, out, position)
        return out

    def attend(self, args: tuple, kwargs: dict) -> torch.Tensor:
        """Attention opened: what comes out has the name that the closed call has, so other names stay what they are."""
        path = f"{self.scope[-1][0]}.{FUSED}".lstrip(".")
        depth = self.enter(path)
        out = None
        try:
            out = _run_under(self, attend, args, kwargs)
            return out
        finally:
            with torch._C.DisableTorchFunction():
                self.leave(depth, out, leaf=path, kind="")

    def reads(self, args: tuple, kwargs: dict, position: int) -> list[Ref]:
        found: dict[Ref, None] = {}
        for slot, t in enumerate(tensors_in((args, kwargs))):
            refs = self.refs(t)
            if refs is None:
                refs = self.origin(t)
            if self.unplaced:
                self.place(refs, position, slot)
            found.update(dict.fromkeys(refs))
        return list(found)

    def origin(self, t: torch.Tensor) -> tuple[Ref, ...]:
        """What a tensor that turned up unannounced descends from, as far as can be told."""
        if id(t) in self.constants or isinstance(t, nn.Parameter):
            return ()
        self.gaps = True
        return self.add_opaque((), [t]) if self.unseen(t) else ()

    def unseen(self, t: torch.Tensor) -> bool:
        """Made of the picture where no operation was seen: by a scripted function, or below Python."""
        return t.is_floating_point() and t.dim() >= 2 and t.shape[0] == self.batch and not _inside_transform(t)

    def note(self, call: Call, name: str, func: Callable, args: tuple, kwargs: dict, read: list[Ref],
             target: torch.Tensor | None, out: Any, position: int) -> None:  # fmt: skip
        outs = [target] if target is not None else list(tensors_in(out))
        made_of_shape = name.endswith(_FACTORIES[0]) or name.startswith(_FACTORIES[1])
        if not read or made_of_shape or any(_inside_transform(t) for t in outs):
            for t in outs:
                if target is None or self.refs(t) is None:
                    self.mark(t, ())
            return
        op = op_name(name)
        if not outs:
            if name != "__get__" and not _is_attribute(func):
                self.add(op, "sink", tuple(r.node for r in read), (), {}, [], False, position)
            return
        first = outs[0]
        keys = {k for t in tensors_in((args, kwargs)) if (k := storage_key(t)) is not None}
        shares = storage_key(first) in keys
        if not first.is_floating_point() or first.dim() < 2:
            kind = "view" if shares and target is None else "other"
        elif target is None and shares:
            kind = "view"
        else:
            kind = "copy" if op in _COPIES else "layer"
        inputs = tuple(dict.fromkeys(r.node for r in read))
        lends = (t for t in tensors_in((args, kwargs)) if storage_key(t) == storage_key(first) and self.refs(t))
        base = next((self.refs(t) for t in lends), None) if shares or target is not None else None
        node = self.add(op, kind, inputs, self.freeze(args), self.freeze(kwargs), outs, target is not None, position)
        node.parameters = sum(t.numel() for t in tensors_in((args, kwargs)) if isinstance(t, nn.Parameter))
        node.base = base[-1].node if base else None
        call.node = node.index
        for k, t in enumerate(outs):
            self.mark(t, (Ref(node.index, k),))
        if target is not None:
            self.spread(target, Ref(node.index))
        if self.check is not None:
            self.check(node, first)

    def spread(self, target: torch.Tensor, ref: Ref) -> None:
        """After a write, every live tensor on the same memory descends from it too."""
        self.nodes[ref.node].partial |= id(target) in self.constants  # the model's own memory
        for other_ref in self.sharing.get(storage_key(target) or -1, ()):
            other = other_ref()
            if other is None or other is target:
                continue
            same = (other.shape, other.stride(), other.storage_offset()) == (
                target.shape, target.stride(), target.storage_offset())  # fmt: skip
            old = () if same else self.refs(other) or ()
            self.nodes[ref.node].partial |= not same
            self.marks[id(other)] = other_ref, (*old, ref)

    def freeze(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            refs = self.refs(value)
            return refs[-1] if refs else Const(tuple(value.shape), isinstance(value, nn.Parameter))
        if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
            return tuple(self.freeze(v) for v in value)
        if isinstance(value, dict):
            return {k: self.freeze(v) for k, v in value.items()}
        return value

    def forget_replaced(self, module: nn.Module) -> None:
        """A buffer that the model makes anew in each run tells nothing about the path."""
        lasting = {id(t) for m in module.modules() for t in _weights_of(m)}
        for call in self.calls:
            if call.held:
                call.held = tuple((where, key) for where, key in call.held if key in lasting)

    def finish(self, inputs: list[int], output: Any) -> Recording:
        outputs: list[Ref] = []
        for slot, t in enumerate(tensors_in(output)):
            refs = self.refs(t)
            if refs is None:
                refs = self.origin(t)
            self.place(refs, len(self.calls), slot)
            outputs += refs[-1:]
        self.name_nodes()
        by_name = {node.name: node for node in self.nodes}
        return Recording(
            self.calls, self.nodes, self.aliases, inputs, tuple(outputs), self.batch, by_name, self.gaps, self.opened
        )  # fmt: skip

    def name_nodes(self) -> None:
        used: dict[str, int] = {}
        taken: set[str] = set()
        for node in self.nodes:
            stem = node.owner or (f"{node.path}.{node.op}" if node.path else node.op)
            name, number = stem, used.get(stem, 0)
            if number:
                name = f"{stem}_{number}"
            used[stem] = number + 1
            while name in taken:  # a module may be called `relu_1` as well
                name = f"{stem}_{used[stem]}"
                used[stem] += 1
            node.name = name
            taken.add(name)


def _inside_transform(t: torch.Tensor) -> bool:
    """Whether this is one of functorch's stand-ins, which mean nothing outside their `vmap` or `grad`."""
    return torch._C._functorch.is_functorch_wrapped_tensor(t)


def _weights_of(module: nn.Module) -> Iterator[torch.Tensor]:
    if not isinstance(module, torch.jit.ScriptModule):  # which makes new objects of its weights each time
        yield from module.parameters(recurse=False)
        yield from module.buffers(recurse=False)


def _tensors_held(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.buffers(recurse=False)
    if not isinstance(module, torch.jit.ScriptModule):
        yield from (t for v in vars(module).values() for t in tensors_in(v) if not isinstance(v, nn.Module))


def _is_attribute(func: Callable) -> bool:
    return getattr(func, "__name__", "") in ("__get__", "__set__")


def _updates_statistics(args: tuple, kwargs: dict) -> bool:
    return bool(kwargs.get("training", args[5] if len(args) > 5 else False))


def learn(
    module: nn.Module,
    *inputs: torch.Tensor,
    call: Callable[..., Any] | None = None,
    check: Callable[[Node, torch.Tensor], None] | None = None,
    grad: bool = False,
    opened: bool = False,
) -> Recording:
    """Run `module(*inputs)` (or `call(module, *inputs)`) once and write down what it did.

    `check(node, value)` is called behind every operation. Some models go another way when gradients are recorded; with
    `grad` they are. With `opened`, fused attention is run as `attend`, so that its weights are layers. The caller has
    put the model into the state it shall run in.
    """
    learner = _Learner(module)
    learner.check = check
    learner.opened = opened
    before = nn.modules.module.register_module_forward_pre_hook(learner.before)
    after = nn.modules.module.register_module_forward_hook(learner.after, always_call=True)
    _learning.learner = learner
    try:
        with torch.set_grad_enabled(grad):  # clones: the model may write into what it is given
            plain = [t.clone() if t.is_inference() else t.detach() for t in inputs]
            own = [t.requires_grad_(grad and t.is_floating_point()).clone() for t in plain]
        nodes = [learner.add_input(t) for t in own]
        with torch.set_grad_enabled(grad), learner:
            output = call(module, *own) if call else module(*own)
        with torch._C.DisableTorchFunction():
            learner.forget_replaced(module)
            return learner.finish(nodes, output)
    finally:
        _learning.learner = learner.outer
        before.remove()
        after.remove()


# ---------------------------------------------------------------------------------------------------------------------
# Running again, by position


class Diverged(BaseException):
    """The model took another path than the one that was learnt. Not an Exception: models catch those."""


class _Stop(BaseException):
    """Everything that was asked for has been seen."""


class CannotCut(BaseException):
    """The gradient of this node needs a graph that begins at the input.

    The value is a view or was made unseen, or the part it is in will be computed once more, by a checkpoint.
    """


@dataclass
class Tap:
    """What to do at one node: keep its value (plain, reduced or live in the graph), note its gradient, change it."""

    keep: bool = False
    live: bool = False
    gradient: bool = False
    reduce: Callable[[torch.Tensor], Any] | None = None
    change: Callable[[torch.Tensor], torch.Tensor] | None = None


class _Leaf(torch.autograd.Function):
    """Makes a value, where it lies, the start of the graph: what arrives for it goes to `leaf`.

    In place, so that callers who ignore what an in-place operation returns are followed too, and no map is copied.
    """

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, _leaf: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(value)
        return value

    @staticmethod
    def backward(_ctx: Any, *gradients: Any) -> Any:
        return None, gradients[0]


def _recomputed() -> bool:
    """Whether what runs now is kept for the backward pass otherwise than by being kept, as in a checkpoint."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


_ENDS = (_Stop, Diverged, CannotCut)


class Runner(TorchFunctionMode):
    """Runs a learnt model again and does what the taps say.

    taps:  {node index: Tap}
    stop:  end the run when the last tap has been served
    cut:   call position up to which nothing is recorded for autograd; default the earliest gradient tap

    Raises `Diverged`, if the model goes another way before the last tap, or `CannotCut` out of the run; and again at
    every later call, if the model catches even those.
    """

    def __init__(self, recording: Recording, taps: Mapping[int, Tap], stop: bool = False, cut: int | None = None):
        super().__init__()
        self.recording = recording
        self.calls = recording.calls
        self.length = len(self.calls)
        self.position = 0
        wanted = [(recording.nodes[n], tap) for n, tap in taps.items()]
        self.taps = {node.position: (node, tap) for node, tap in wanted if node.slot is None}
        self.arrivals: dict[int, list[tuple[Node, Tap]]] = {}  # opaque values: read where they are first used
        for node, tap in wanted:
            if node.slot is not None:
                self.arrivals.setdefault(node.position, []).append((node, tap))
        self.last = max((*self.taps, *self.arrivals), default=-1) if stop else self.length
        # Behind the last tap the model may go where it likes: what was asked for has been seen.
        self.tail = max((*self.taps, *self.arrivals), default=-1)
        self.ended: BaseException | None = None
        gradients = [node.position for node, tap in wanted if tap.gradient]
        self.cut = min(gradients, default=-1) if cut is None else cut
        self.whole = cut is not None  # the graph begins at the input, not at the earliest gradient tap
        self.values: dict[int, Any] = {}
        self.edges: dict[int, Any] = {}
        self.live: dict[int, torch.Tensor] = {}
        self._kept: dict[int, list[int]] = {}  # storage -> nodes whose kept value lies there
        self._versions: dict[int, int | None] = {}

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.ended is not None:
            raise self.ended
        if func is _ATTENTION:
            return _run_attention_under(self, args, kwargs)
        if self.recording.opened and raw_name(func) == FUSED:
            return _run_under(self, attend, args, kwargs)
        position = self.position
        self.position = position + 1
        if position > self.tail:
            if self._kept:
                self._protect(func, args, kwargs)
            return func(*args, **kwargs)
        try:
            call = self._expected(position, func, args, kwargs)
            if position in self.arrivals:
                self.arrive(position, (args, kwargs))
                if position >= self.last:
                    raise _Stop
            if position in self.taps:
                return self._tapped(position, call, func, args, kwargs)
        except (*_ENDS, errors.InnersightError) as ended:
            self.ended = ended
            raise
        if call.writes and self._kept:
            self._protect(func, args, kwargs)
        return self._run(position, call, func, args, kwargs)

    def _expected(self, position: int, func: Callable, args: tuple, kwargs: dict) -> Call:
        if position >= self.length:
            raise Diverged
        call = self.calls[position]
        if func is not call.func and func != call.func:
            raise Diverged
        for where, key in call.held:
            given = kwargs.get(where) if isinstance(where, str) else args[where] if where < len(args) else None
            if id(given) != key:
                raise Diverged
        return call

    def _run(self, position: int, call: Call, func: Callable, args: tuple, kwargs: dict) -> Any:
        # Grad mode is switched around the single call: left off, it would override the model's own no_grad.
        if position > self.cut or call.grad_mode or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        torch._C._set_grad_enabled(False)
        try:
            return func(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(True)

    def arrive(self, position: int, given: Any) -> None:
        """Serve the opaque values that the call at this position is the first to read."""
        tensors = list(tensors_in(given))
        for node, tap in self.arrivals[position]:
            assert node.slot is not None
            if node.slot >= len(tensors) or tensors[node.slot].shape[1:] != node.shape[1:]:
                raise Diverged
            if tap.change is not None:
                raise errors.Unsupported(
                    f"layer {node.name!r} was made by code that cannot be watched, so it can be read but not changed"
                )
            self._serve(node, tap, tensors[node.slot])

    def _tapped(self, position: int, call: Call, func: Callable, args: tuple, kwargs: dict) -> Any:
        node, tap = self.taps[position]
        if call.writes and self._kept:
            self._protect(func, args, kwargs)
        out = self._run(position, call, func, args, kwargs)
        target = written(raw_name(func), args, kwargs) if call.writes else None
        value = target if target is not None else first_tensor(out)
        if value is None:
            raise Diverged
        new = self._serve(node, tap, value)
        if position >= self.last:
            raise _Stop
        if new is value:
            return out
        return new if out is None else with_first(out, new)

    def _serve(self, node: Node, tap: Tap, value: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunction():  # an outer observer, or this one, has no business with our own calls
            return self._served(node, tap, value)

    def _served(self, node: Node, tap: Tap, value: torch.Tensor) -> torch.Tensor:
        if tap.change is not None:
            if torch.is_grad_enabled() and _recomputed():
                raise errors.Unsupported(f"layer {node.name!r} lies in a checkpoint, which would undo a change to it")
            new = tap.change(value)
            if node.inplace:
                with torch.no_grad():
                    value.copy_(new)
            else:
                value = new
        if tap.gradient:
            value = self._gradient_here(node, value)
        if tap.live:
            self.live[node.index] = value
        if tap.reduce is not None:
            self.values[node.index] = tap.reduce(value.detach())
        elif tap.keep:
            kept = value.detach()
            self.values[node.index] = kept
            self._versions[node.index] = version(kept)
            if (key := storage_key(kept)) is not None:
                self._kept.setdefault(key, []).append(node.index)
        return value

    def _gradient_here(self, node: Node, value: torch.Tensor) -> torch.Tensor:
        if not value.is_floating_point():
            raise errors.Unsupported(f"layer {node.name!r} holds integers, which have no gradient")
        if value.requires_grad:
            # The edge stays at this value whatever is written in place behind it; retain_grad would move along.
            self.edges[node.index] = torch.autograd.graph.get_gradient_edge(value)
            return value
        replaced = value._is_view()  # a view cannot be made a leaf where it lies
        if (replaced or node.slot is not None or _recomputed()) and not self.whole:
            raise CannotCut
        if value.is_inference() or node.slot is not None or (replaced and node.inplace):
            raise errors.Unsupported(
                f"the network computes {node.name!r} without recording a graph (no_grad, inference_mode or scripted "
                "code), so no gradient can be taken there; take a layer before or behind it"
            )
        with torch.enable_grad():
            if replaced:
                leaf = value.detach().requires_grad_()
                value = leaf.clone()  # a leaf itself may not be written in place
            else:
                leaf = torch.empty((), dtype=value.dtype, device=value.device).expand(value.shape).requires_grad_()
                value = _Leaf.apply(value, leaf)
                for index in self._kept.get(storage_key(value) or -1, ()):  # it counted as a write, and was none
                    self._versions[index] = version(self.values[index])
        self.edges[node.index] = leaf
        return value

    def _protect(self, func: Callable, args: tuple, kwargs: dict) -> None:
        """Copy on write: what was kept is copied just before an in-place operation would change it."""
        target = written(raw_name(func), args, kwargs)
        if target is None:
            return
        with torch._C.DisableTorchFunction():
            for index in self._kept.pop(storage_key(target) or -1, ()):
                self.values[index] = self.values[index].clone()
                self._versions[index] = version(self.values[index])

    def finish(self) -> None:
        """Check that the run was the one that was learnt and that nothing kept was changed unseen."""
        for index, noted in self._versions.items():
            if noted is not None and version(self.values[index]) != noted:
                name = self.recording.nodes[index].name
                raise errors.Unsupported(f"layer {name!r} was overwritten by an operation that cannot be watched")


def run(
    module: nn.Module,
    recording: Recording,
    inputs: Iterable[torch.Tensor],
    taps: Mapping[int, Tap],
    stop: bool = False,
    call: Callable[..., Any] | None = None,
    runner: type[Runner] = Runner,
    **options: Any,
) -> tuple[Any, Runner]:
    """One watched run: the model's output (None if it was stopped early) and the runner with what it kept.

    Raises `Diverged` where the model does other than it did when it was learnt, `CannotCut` where a gradient needs a
    graph that begins at the input.
    """
    mode = runner(recording, taps, stop, **options)
    if stop and mode.last < 0:
        return None, mode
    output = None
    try:
        with mode:
            output = call(module, *inputs) if call else module(*inputs)
    except (*_ENDS, Exception):
        if mode.ended is None:
            raise
    if isinstance(mode.ended, _Stop):
        output = None  # the model may have caught it and answered all the same
        mode.ended = None  # it holds the frames, they hold the runner: every map kept would wait for the collector
    elif mode.ended is not None:
        raise mode.ended
    elif mode.position <= mode.tail and mode.position != mode.length:
        raise Diverged
    elif mode.length in mode.arrivals:
        mode.arrive(mode.length, output)
    with torch._C.DisableTorchFunction():
        mode.finish()
    return output, mode
