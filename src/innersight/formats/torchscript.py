"""TorchScript: a scripted or traced program, run operation by operation from Python so that it can be watched.

TorchScript's own interpreter runs below everything Python can observe, and hooks on the submodules of a traced model
never fire. So its graph is walked here: `prim::CallMethod` calls the submodule's counterpart, a real `nn.Module` at the
same path, and each `aten` operator is called from Python. The module tree of the program gives layers the names they
have in the original model. The same kernels run, so the values agree; that is checked on opening.
"""

from __future__ import annotations

import inspect
import io
import math
import operator
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from innersight.errors import InputError, Unsupported
from innersight.formats import Opened
from innersight.formats.aten import python_call
from innersight.observe.guard import as_found, seed
from innersight.observe.observer import tensors_in

Step = tuple[Callable[..., Any], tuple[str, ...], tuple[str, ...], tuple[str, ...]]


# A trace writes the second call of a module as `forward1`; an overloaded forward is `forward__0`.
_FORWARD = re.compile(r"forward(__)?\d*")


class _Unsupported(Exception):
    """A graph node that this interpreter does not know; its text is the node's kind."""


class _Block:
    """Straight-line code; a step is (function of module, values and inputs; inputs; outputs; values then dead)."""

    def __init__(self, inputs: tuple[str, ...], steps: list[Step], outputs: tuple[str, ...]):
        self.inputs = inputs
        self.steps = steps
        self.outputs = outputs

    def run(self, module: Scripted, outer: dict[str, Any], arguments: Iterable[Any]) -> tuple[Any, ...]:
        values = dict(outer)
        values.update(zip(self.inputs, arguments, strict=True))
        for function, inputs, outputs, dead in self.steps:
            result = function(module, values, *[values[i] for i in inputs])
            if len(outputs) == 1:
                values[outputs[0]] = result
            elif outputs:
                values.update(zip(outputs, result, strict=True))
            for name in dead:
                values.pop(name, None)
        return tuple(values[o] for o in self.outputs)


class Scripted(nn.Module):
    """One module of a TorchScript program: its parameters, its children by their names, its methods as `_Block`s.

    `opaque` names the operation that could not be interpreted, where the program's own code runs instead.
    """

    script: Any
    program: Any

    def __init__(self, script: Any, program: Any, functions: _Functions):
        super().__init__()
        object.__setattr__(self, "script", script)  # not children: their parameters are already ours
        object.__setattr__(self, "program", program)
        self.functions = functions
        self.methods: dict[str, _Block] = {}
        self.attributes: dict[str, Any] = {}  # what the program itself sets
        self.training = script.training
        for name, parameter in script._parameters.items():
            if parameter is not None and not isinstance(parameter, nn.Parameter):  # so it comes out of a file
                parameter = nn.Parameter(parameter, parameter.requires_grad)
            self.register_parameter(name, parameter)
        for name, buffer in script._buffers.items():
            self.register_buffer(name, buffer)
        for name, child in script._modules.items():
            self.add_module(name, _scripted(child, program._modules[name], functions))
        self.opaque = ""
        try:
            for method in filter(_FORWARD.fullmatch, program._c._method_names()):
                self._compiled(method)
        except _Unsupported as kind:
            self.opaque = str(kind)

    def _compiled(self, method: str) -> _Block:
        if method not in self.methods:
            graph = self.program._c._get_method(method).graph
            self.methods[method] = _compile(graph, list(graph.inputs()), list(graph.outputs()), self)
        return self.methods[method]

    def forward(self, *args: Any, method: str = "forward") -> Any:
        if not self.opaque:
            try:
                return self.run(method, args)
            except _Unsupported as kind:  # in a method that was compiled only now
                self.opaque = str(kind)
        return self.script(*args) if method == "forward" else getattr(self.script, method)(*args)

    def run(self, method: str, args: Iterable[Any]) -> Any:
        block, given = self._compiled(method), (self, *args)
        if len(given) < len(block.inputs):  # only from outside: within a program the defaults are written at the call
            arguments = self.program._c._get_method(method).schema.arguments
            given += tuple(a.default_value for a in arguments[len(given) :])
        results = block.run(self, {}, given)
        return results[0] if len(results) == 1 else results

    def value(self, name: str) -> Any:
        """An attribute of the program: a child, a tensor, or anything else it keeps."""
        for store in (self._modules, self._parameters, self._buffers, self.attributes):
            if name in store:
                return store[name]
        if name == "training":
            return self.training
        return self.script._c.getattr(name)

    def set_value(self, name: str, value: Any) -> None:
        if name in self._buffers:
            self._buffers[name] = value
        else:
            self.attributes[name] = value

    def extra_repr(self) -> str:
        return f"opaque: {self.opaque}" if self.opaque else ""


def _scripted(script: Any, program: Any, functions: _Functions) -> Scripted:
    """The counterpart of a script module, under the class name it had, by which the observer knows torch's layers."""
    home, _, name = _plain(script._c._type().qualified_name()).rpartition(".")
    return type(name, (Scripted,), {"__module__": home})(script, program, functions)


def _plain(qualified: str) -> str:
    """'__torch__.torch.nn.modules.conv.___torch_mangle_3.Conv2d' -> 'torch.nn.modules.conv.Conv2d'"""
    return re.sub(r"___torch_mangle_\d+\.", "", qualified).removeprefix("__torch__.")


class _Functions:
    """The free functions of a program, compiled at their first call."""

    def __init__(self, unit: Any):
        self.unit = unit
        self.compiled: dict[str, Callable[..., Any]] = {}
        self.as_traced = False  # keep the mode that a trace was made in, for the comparison with its own run
        self.traced_in_training = False  # found out by running it

    def __call__(self, qualified: str, module: Scripted) -> Callable[..., Any]:
        if qualified not in self.compiled:
            function = self.unit.find_function(qualified)
            if function is None:
                raise _Unsupported(f"prim::CallFunction of {_plain(qualified)}")
            self.compiled[qualified] = _eager(qualified, function) or self._interpreted(function, module)
        return self.compiled[qualified]

    def _interpreted(self, function: Any, module: Scripted) -> Callable[..., Any]:
        graph = function.graph
        block = _compile(graph, list(graph.inputs()), list(graph.outputs()), module)

        def call(*args: Any) -> Any:
            results = block.run(module, {}, args)
            return results[0] if len(results) == 1 else results

        return call


def _eager(qualified: str, function: Any) -> Callable[..., Any] | None:
    """torch's own function of that name, if it takes the same arguments: names and rules are a live model's."""
    home, _, name = _plain(qualified).rpartition(".")
    eager = getattr({"torch.nn.functional": F, "torch.functional": torch.functional}.get(home), name, None)
    if not inspect.isfunction(eager):
        return None
    parameters = inspect.signature(eager).parameters.values()
    positional = all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    same = [p.name for p in parameters] == [a.name for a in function.schema.arguments]
    return eager if positional and same else None


# --- compiling -------------------------------------------------------------------------------------------------------


def _compile(body: Any, inputs: list[Any], outputs: list[Any], module: Scripted) -> _Block:
    nodes = list(body.nodes())
    names_out = tuple(v.debugName() for v in outputs)
    last: dict[str, int] = {}
    own: set[str] = {v.debugName() for v in inputs}
    for i, node in enumerate(nodes):
        own |= {v.debugName() for v in node.outputs()}
        last.update(dict.fromkeys(_reads(node), i))
        last.update({v.debugName(): i for v in node.outputs() if v.debugName() not in last})
    dead: list[list[str]] = [[] for _ in nodes]
    for name in own.intersection(last) - set(names_out):
        dead[last[name]].append(name)  # frees maps as early as TorchScript itself would
    steps = []
    for node, gone in zip(nodes, dead, strict=True):
        ins = tuple(v.debugName() for v in node.inputs())
        outs = tuple(v.debugName() for v in node.outputs())
        steps.append((_step(node, module), ins, outs, tuple(gone)))
    return _Block(tuple(v.debugName() for v in inputs), steps, names_out)


def _reads(node: Any) -> Iterator[str]:
    yield from (v.debugName() for v in node.inputs())
    for block in node.blocks():
        for inner in block.nodes():
            yield from _reads(inner)
        yield from (v.debugName() for v in block.outputs())


def _step(node: Any, module: Scripted) -> Callable[..., Any]:
    """What one node does, as `function(module, values, *inputs) -> output` (a tuple for several outputs)."""
    kind = node.kind()
    if kind in _BUILDERS:
        return _BUILDERS[kind](node, module)
    name = kind.partition("::")[2]
    tensors = any(v.type().annotation_str in ("Tensor", "Optional[Tensor]") for v in node.inputs())
    if kind in _PLAIN or (not tensors and f"{name} (numbers)" in _PLAIN):
        function = _PLAIN.get(kind) or _PLAIN[f"{name} (numbers)"]
        return lambda _module, _values, *args: function(*args)
    if kind.startswith("prim::") or node.schema() == "(no schema)":
        raise _Unsupported(kind)
    return _operator(node)


def _operator(node: Any) -> Callable[..., Any]:
    """An operator of torch or of an extension, called from Python with its schema's keyword arguments as such."""
    schema = torch._C.parse_schema(node.schema())
    namespace, _, name = schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name, None)
    if packet is None:
        raise _Unsupported(schema.name)
    overload = getattr(packet, schema.overload_name or "default", None)
    positional = sum(not a.kwarg_only for a in schema.arguments)
    keywords = [a.name for a in schema.arguments[positional:]]
    several = len(list(node.outputs())) > 1
    call = python_call(overload) if overload is not None else packet

    def run(module: Scripted, _values: Any, *args: Any) -> Any:
        if name in ("batch_norm", "dropout") and type(module).__module__.startswith("torch.nn.modules"):
            args = _as_mode_says(name, args, module)
        result = call(*args[:positional], **dict(zip(keywords, args[positional:], strict=True)))
        return tuple(result) if several else result

    return run


def _as_mode_says(name: str, args: tuple[Any, ...], module: Scripted) -> tuple[Any, ...]:
    """A trace keeps the mode it was made in as a constant; here the layer's own mode decides, as in a live model."""
    place, statistics = (5, args[3]) if name == "batch_norm" else (2, 0)
    if not args[place] or module.training or statistics is None or module.functions.as_traced:
        return args
    module.functions.traced_in_training = True
    return (*args[:place], False, *args[place + 1 :])


def _constant(node: Any, _module: Scripted) -> Callable[..., Any]:
    value = node.output()
    if value.type().kind() == "FunctionType":
        constant = value.type().annotation_str
    else:
        constant = value.toIValue()
    if isinstance(constant, list):
        return lambda *_: list(constant)  # lists may be appended to
    return lambda *_: constant


def _attribute(node: Any, _module: Scripted) -> Callable[..., Any]:
    name = node.s("name")
    return lambda _m, _v, owner: owner.value(name) if isinstance(owner, Scripted) else getattr(owner, name)


def _set_attribute(node: Any, _module: Scripted) -> Callable[..., Any]:
    name = node.s("name")
    return lambda _m, _v, owner, value: owner.set_value(name, value)


def _method(node: Any, _module: Scripted) -> Callable[..., Any]:
    name = node.s("name")
    if next(node.inputs()).type().kind() != "ClassType" or "__torch__" not in next(node.inputs()).type().str():
        raise _Unsupported(f"prim::CallMethod of {name}")

    def call(_module: Scripted, _values: Any, owner: Any, *args: Any) -> Any:
        if not isinstance(owner, Scripted):
            return getattr(owner, name)(*args)
        if name == "forward":
            return owner(*args)
        return owner(*args, method=name) if _FORWARD.fullmatch(name) else owner.run(name, args)

    return call


def _function(node: Any, module: Scripted) -> Callable[..., Any]:
    function = module.functions(next(node.inputs()).type().annotation_str, module)
    return lambda _m, _v, _name, *args: function(*args)


def _inner(block: Any, module: Scripted) -> _Block:
    return _compile(block, list(block.inputs()), list(block.outputs()), module)


def _if(node: Any, module: Scripted) -> Callable[..., Any]:
    then, other = (_inner(b, module) for b in node.blocks())
    single = len(list(node.outputs())) == 1

    def run(module: Scripted, values: dict[str, Any], condition: Any) -> Any:
        results = (then if condition else other).run(module, values, ())
        return results[0] if single else results

    return run


def _loop(node: Any, module: Scripted) -> Callable[..., Any]:
    body = _inner(next(node.blocks()), module)
    single = len(list(node.outputs())) == 1

    def run(module: Scripted, values: dict[str, Any], trips: int, condition: Any, *carried: Any) -> Any:
        i = 0
        while i < trips and condition:
            condition, *rest = body.run(module, values, (i, *carried))
            carried = tuple(rest)
            i += 1
        return carried[0] if single else carried

    return run


def _tuple_unpack(node: Any, _module: Scripted) -> Callable[..., Any]:
    single = len(list(node.outputs())) == 1
    return lambda _m, _v, items: items[0] if single else tuple(items)


def _dict_construct(_node: Any, _module: Scripted) -> Callable[..., Any]:
    return lambda _m, _v, *items: dict(zip(items[::2], items[1::2], strict=True))


def _slice_of_tuple(node: Any, _module: Scripted) -> Callable[..., Any]:
    start, stop = node.i("beg"), node.i("end")
    return lambda _m, _v, items: items[start:stop]


def _isinstance(node: Any, _module: Scripted) -> Callable[..., Any]:
    kinds = [t.kind() for t in node.tys("types")]
    if unknown := [k for k in kinds if k not in _TYPES]:
        raise _Unsupported(f"prim::isinstance of {unknown[0]}")
    types = tuple(_TYPES[k] for k in kinds)
    return lambda _m, _v, value: isinstance(value, types) and not (isinstance(value, bool) and bool not in types)


_TYPES: dict[str, type] = {
    "TensorType": torch.Tensor, "NoneType": type(None), "BoolType": bool, "IntType": int, "FloatType": float,
    "StringType": str, "ListType": list, "TupleType": tuple, "DictType": dict, "AnyListType": list,
    "AnyTupleType": tuple,
}  # fmt: skip


def _raise(message: str, *_: Any) -> None:
    raise RuntimeError(message)


_BUILDERS: dict[str, Callable[[Any, Scripted], Callable[..., Any]]] = {
    "prim::Constant": _constant,
    "prim::GetAttr": _attribute,
    "prim::SetAttr": _set_attribute,
    "prim::CallMethod": _method,
    "prim::CallFunction": _function,
    "prim::If": _if,
    "prim::Loop": _loop,
    "prim::TupleUnpack": _tuple_unpack,
    "prim::ListUnpack": _tuple_unpack,
    "prim::TupleSlice": _slice_of_tuple,
    "prim::DictConstruct": _dict_construct,
    "prim::isinstance": _isinstance,
}


def _append(items: list[Any], item: Any) -> list[Any]:
    items.append(item)
    return items


def _extend(items: list[Any], more: Iterable[Any]) -> None:
    items.extend(more)


def _set_item(items: Any, index: Any, value: Any) -> Any:
    items[index] = value
    return items


def _sublist(items: Any, start: int | None, stop: int | None, step: int) -> Any:
    return items[start:stop:step]


def _tensor_of(number: Any) -> torch.Tensor:
    return torch.tensor(number)


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value


def _same(a: Any, b: Any) -> bool:
    return a is b or (not isinstance(a, torch.Tensor) and a == b)


# What is no operation on tensors. "name (numbers)" holds where no input is a tensor: aten::add adds integers, too.
_PLAIN: dict[str, Callable[..., Any]] = {
    "prim::ListConstruct": lambda *items: list(items),
    "prim::TupleConstruct": lambda *items: items,
    "prim::TupleIndex": operator.getitem,
    "prim::NumToTensor": _tensor_of,
    "prim::RaiseException": _raise,
    "prim::Uninitialized": lambda: None,
    "prim::unchecked_cast": lambda value: value,
    "prim::unchecked_unwrap_optional": lambda value: value,
    "prim::Print": lambda *_: None,
    "prim::dtype": lambda t: t.dtype,
    "prim::device": lambda t: t.device,
    "prim::type": lambda device: device.type,
    "prim::layout": lambda t: t.layout,
    "prim::is_cuda": lambda t: t.is_cuda,
    "prim::is_quantized": lambda t: t.is_quantized,
    "prim::is_nested": lambda t: t.is_nested,
    "prim::requires_grad": lambda t: t.requires_grad,
    "prim::shape": lambda t: list(t.shape),
    "prim::data": lambda t: t.data,
    "prim::max": lambda *numbers: max(*numbers),
    "prim::min": lambda *numbers: min(*numbers),
    "prim::abs (numbers)": abs,
    "prim::rangelist": lambda n: list(range(n)),
    "prim::StringIndex": operator.getitem,
    "aten::size": lambda t, *dim: t.size(*dim) if dim else list(t.size()),
    "aten::dim": lambda t: t.dim(),
    "aten::numel": lambda t: t.numel(),
    "aten::is_floating_point": lambda t: t.is_floating_point(),
    "aten::is_complex": lambda t: t.is_complex(),
    "aten::len": len,
    "aten::append": _append,
    "aten::extend": _extend,
    "aten::insert": lambda items, i, item: items.insert(i, item),
    "aten::pop": lambda items, i=-1: items.pop(i),
    "aten::list": list,
    "aten::__getitem__": operator.getitem,
    "aten::_set_item": _set_item,
    "aten::__contains__": operator.contains,
    "aten::keys": lambda d: list(d),
    "aten::values": lambda d: list(d.values()),
    "aten::items": lambda d: list(d.items()),
    "aten::__is__": _same,
    "aten::__isnot__": lambda a, b: not _same(a, b),
    "aten::__not__": operator.not_,
    "aten::__range_length": lambda start, stop, step: len(range(start, stop, step)),
    "aten::__derive_index": lambda i, start, step: start + i * step,
    "aten::Int": lambda v: int(v),
    "aten::Float": lambda v: float(v),
    "aten::Bool": lambda v: bool(v),
    "aten::IntImplicit": lambda v: int(v),
    "aten::FloatImplicit": lambda v: float(v),
    "aten::ScalarImplicit": _number,
    "aten::warn": lambda *_: None,
    "aten::format": lambda text, *args: text.format(*args),
    "aten::percentFormat": lambda text, *args: text % args,
    "aten::str": str,
    "aten::join": lambda sep, items: sep.join(items),
    "aten::is_scripting": lambda: True,
    "aten::is_autocast_enabled": lambda: False,
    # Without gradients the fused kernels of attention would run, which hide what happens inside.
    "aten::is_grad_enabled": lambda: True,
    "aten::set_grad_enabled": lambda _: None,
    "add (numbers)": operator.add,
    "add_ (numbers)": operator.iadd,
    "sub (numbers)": operator.sub,
    "mul (numbers)": operator.mul,
    "div (numbers)": operator.truediv,
    "floordiv (numbers)": operator.floordiv,
    "remainder (numbers)": operator.mod,
    "mathremainder (numbers)": math.fmod,
    "pow (numbers)": operator.pow,
    "neg (numbers)": operator.neg,
    "abs (numbers)": abs,
    "round (numbers)": round,
    "floor (numbers)": math.floor,
    "ceil (numbers)": math.ceil,
    "sqrt (numbers)": math.sqrt,
    "log (numbers)": math.log,
    "log2 (numbers)": math.log2,
    "exp (numbers)": math.exp,
    "eq (numbers)": operator.eq,
    "ne (numbers)": operator.ne,
    "lt (numbers)": operator.lt,
    "le (numbers)": operator.le,
    "gt (numbers)": operator.gt,
    "ge (numbers)": operator.ge,
    "__and__ (numbers)": operator.and_,
    "__or__ (numbers)": operator.or_,
    "__xor__ (numbers)": operator.xor,
    "and (numbers)": lambda a, b: a and b,
    "or (numbers)": lambda a, b: a or b,
    "slice (numbers)": _sublist,
    "copy (numbers)": list,
    "sum (numbers)": sum,
    "all (numbers)": all,
    "any (numbers)": any,
}


# --- opening ---------------------------------------------------------------------------------------------------------


@contextmanager
def _no_deprecation() -> Iterator[None]:
    """torch 2.15 advises authors of TorchScript to export instead; whoever opens a file cannot act on that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*`torch\.jit\.\w+` is deprecated")
        warnings.filterwarnings("ignore", message=r".*`torch\.jit\.\w+` is not supported")
        yield


_C: Any = torch._C  # what torch's own stubs say of its importers is out of date


def load(file: str | Path | io.BytesIO, device: Any = "cpu") -> tuple[Any, Any]:
    """The program in a file, and the unit that holds its free functions.

    Loading runs no pickled Python; the program itself can only call torch's operators.
    """
    unit = torch._C.CompilationUnit()
    place = torch.device(device)
    with zipfile.ZipFile(file) as records:
        traced = any("/traced_inputs" in name for name in records.namelist())  # else torch warns past Python
    if isinstance(file, io.BytesIO):
        program = _C.import_ir_module_from_buffer(unit, file.getvalue(), place, {}, traced)
    else:
        program = _C.import_ir_module(unit, str(file), place, {}, traced)
    return torch.jit._recursive.wrap_cpp_module(program), unit


def interpret(script: Any, program: Any = None, unit: Any = None) -> Scripted:
    """A module that runs a script module's program operation by operation, on the very same parameters.

    `program` and `unit` are what `load` returned for it; without them the script is saved to memory and read again,
    because a live one does not give away its free functions.

    >>> net = interpret(torch.jit.trace(model, example))
    >>> [name for name, _ in net.named_modules()]
    ['', 'conv1', 'bn1', 'relu', ...]
    """
    if program is None:
        buffer = io.BytesIO()
        with _no_deprecation():
            torch.jit.save(script, buffer)
        program, unit = load(buffer)
    return _scripted(script, program, _Functions(unit))


def open_torchscript(source: Path | torch.jit.ScriptModule, device: Any = None) -> Opened:
    """A `.pt` written by `torch.jit.save`, or a scripted or traced module in memory."""
    notes = []
    if isinstance(source, Path):
        name = source.name
        try:
            script, unit = load(source, device or "cpu")
        except RuntimeError as error:
            first = (str(error).strip().splitlines() or [""])[0]
            raise InputError(f"{source} is not a TorchScript program that this torch can load: {first}") from error
        program = script
    else:
        name = source.original_name
        script, program, unit = source, None, None
        if device is not None and any(t.device != torch.device(device) for t in source.state_dict().values()):
            buffer = io.BytesIO()
            with _no_deprecation():
                torch.jit.save(source, buffer)
            script, unit = load(buffer, device)  # a copy: the caller's stays where it is
            program = script
    try:
        module = interpret(script, program, unit)
    except RuntimeError as error:  # a live program that calls Python, which cannot be saved
        notes.append(
            f"it runs as one operation, because it cannot be taken apart: {str(error).strip().splitlines()[-1]}"
        )
        return Opened(script, name, notes=notes)
    if len(required := required_inputs(script)) != 1:
        raise Unsupported(
            f"{name}.forward needs {len(required)} inputs ({', '.join(required)}), innersight gives it one image batch"
        )
    traced = traced_shape(program if program is not None else script)
    return Opened(module, name, input_shape=traced[1:] if traced else None, notes=notes)


def compare(opened: Opened) -> Opened:
    """Run both on noise, ours and TorchScript's own: the agreement is noted, and where there is none the original runs.

    Also finds a program that was traced with its batch size in it, which then takes one image at a time.
    """
    module = opened.module
    assert isinstance(module, Scripted)
    assert opened.input_shape is not None
    script: Any = module.script
    device = next((t.device for t in module.state_dict().values()), torch.device("cpu"))
    noise = torch.rand((2, *opened.input_shape), generator=torch.Generator().manual_seed(0)).to(device)

    def run(network: nn.Module, batch: torch.Tensor) -> list[torch.Tensor]:
        kept = [(buffer, buffer.clone()) for buffer in module.buffers()]  # both networks have the same ones
        try:
            with as_found(network), torch.no_grad(), torch.jit.optimized_execution(False):
                seed(network)
                return [t for t in tensors_in(network(batch)) if t.is_floating_point()]
        finally:
            for buffer, value in kept:  # batch norm writes its statistics without a trace in the tensor's version
                buffer.copy_(value)

    ours = run(module, noise[:1])
    if module.functions.traced_in_training:
        opened.notes.append("the program was traced in training mode; it is explained in evaluation mode")
    module.functions.as_traced = True
    same, theirs = run(module, noise[:1]), run(script, noise[:1])
    module.functions.as_traced = False
    error = max((_difference(a, b) for a, b in zip(same, theirs, strict=True)), default=0.0)
    for path, part in module.named_modules():
        if isinstance(part, Scripted) and part.opaque:
            opened.notes.append(
                f"{path or 'the program'} runs as one operation: {part.opaque} cannot be watched from Python"
            )
    if error > 1e-3:
        module.opaque = "all of it"
        opened.notes.append(
            f"it runs as one operation: taken apart it differed from TorchScript's run by {error:.1g} of the output"
        )
    else:
        opened.notes.append(f"run operation by operation; TorchScript's own run differs by {error:.1g} of the output")
    try:
        both = run(module, noise)
        fits = all(len(b) == 2 and _difference(b[:1], a) < 1e-3 for a, b in zip(ours, both, strict=True) if a.dim())
    except Exception:  # whatever a shape written into the program breaks
        fits = False
    if not fits:
        opened.fixed_batch = 1
        opened.notes.append("the program was traced for a batch of 1, so images go through it one at a time")
    return opened


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.shape != b.shape:
        return math.inf
    scale = b.abs().max().item() if b.numel() else 0.0
    return (a - b).abs().max().item() / scale if scale else float((a != b).any())


def traced_shape(program: Any) -> tuple[int, ...] | None:
    """The shape `(N, C, H, W)` of the example a program was traced with; None for a scripted one."""
    inputs = list(program._c._get_method("forward").graph.inputs())
    if len(inputs) == 2 and inputs[1].isCompleteTensor():
        return tuple(inputs[1].type().sizes())
    traced = program._c._retrieve_traced_inputs()
    example = traced["forward"] if "forward" in traced else ()  # noqa: SIM401 - a ScriptDict has no get
    only = next(iter(example)) if len(example) == 1 else None
    return tuple(only.shape) if isinstance(only, torch.Tensor) else None


def required_inputs(program: Any) -> list[str]:
    """Names of the inputs `forward` cannot do without."""
    arguments = program._c._get_method("forward").schema.arguments[1:]
    return [a.name for a in arguments if not a.has_default_value()]
