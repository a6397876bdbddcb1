"""Chains of ONNX operators that stand for one operation of the network, put together again.

Exporters write GELU as five operators, SiLU as two and a linear layer as a product and a sum; rules of relevance, and
people, look for the one operation. A chain is put together where nothing else reads what is between; its value is that
of its last node and has that node's name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from innersight.formats.onnx_operators import Node


def fused(nodes: list[Node], constants: Mapping[str, torch.Tensor], outputs: Iterable[str]) -> list[Node]:
    """The nodes with such chains as one node each, where their last one was."""
    chains = _Chains(nodes, constants, set(outputs))
    gone: set[int] = set()
    instead: dict[int, Node] = {}
    for n in nodes:
        starts = {"Erf": chains.gelu, "MatMul": chains.linear, "Sigmoid": chains.silu}
        whole = len(n.outputs) == 1 and len(n.inputs) == (2 if n.op == "MatMul" else 1)
        found = starts[n.op](n) if n.op in starts and whole and not n.domain else None
        if found is not None:
            parts, last, node = found
            gone.update(id(p) for p in parts)
            instead[id(last)] = node
    return [instead.get(id(n), n) for n in nodes if id(n) in instead or id(n) not in gone]


Chain = tuple[list[Node], Node, Node]
"""What disappears, its last node, and what stands there instead."""


class _Chains:
    def __init__(self, nodes: list[Node], constants: Mapping[str, torch.Tensor], outputs: set[str]):
        self.constants = constants
        self.outputs = outputs
        self.makers = {o: n for n in nodes for o in n.outputs if o}
        self.readers: dict[str, list[Node]] = {}
        for n in nodes:
            for i in _reads(n):
                self.readers.setdefault(i, []).append(n)

    def only_reader(self, n: Node, op: str) -> Node | None:
        """The one node that reads n's value, if it is such an operator."""
        readers = self.readers.get(n.outputs[0], [])
        if len(readers) != 1 or n.outputs[0] in self.outputs or len(n.outputs) != 1:
            return None
        return readers[0] if readers[0].op == op and not readers[0].domain and len(readers[0].inputs) == 2 else None

    def number(self, name: str) -> float | None:
        value = self.constants.get(name)
        return float(value.flatten()[0]) if value is not None and value.numel() == 1 else None

    def other(self, n: Node, name: str) -> str:
        """What a node of two inputs reads besides `name`."""
        return n.inputs[1] if n.inputs[0] == name else n.inputs[0]

    def by(self, n: Node | None, value: float) -> bool:
        """Whether a node of two inputs has that number for one of them."""
        return n is not None and any((v := self.number(i)) is not None and abs(v - value) < 1e-4 for i in n.inputs)

    def gelu(self, erf: Node) -> Chain | None:
        """x * (1 + erf(x / sqrt 2)) / 2, in any order of its products."""
        scaled = self.makers.get(erf.inputs[0])
        plus = self.only_reader(erf, "Add")
        if (
            scaled is None
            or len(scaled.inputs) != 2
            or len(self._read(scaled)) != 1
            or plus is None
            or not self.by(plus, 1.0)
        ):
            return None
        root = math.sqrt(2)
        down = scaled.op == "Div" and self.number(scaled.inputs[1]) is not None and self.by(scaled, root)
        if not down and not (scaled.op == "Mul" and self.by(scaled, 1 / root)):
            return None
        x = next(i for i in scaled.inputs if self.number(i) is None)
        product = self.only_reader(plus, "Mul")
        if product is None:
            return None
        with_x = self.other(product, plus.outputs[0])
        parts = [scaled, erf, plus, product]
        half = self.makers.get(with_x)
        if half is not None and half.op == "Mul" and x in half.inputs and self.by(half, 0.5):
            if len(self._read(half)) != 1:
                return None
            return [*parts, half], product, self._one(product, "Gelu", (x,))
        last = self.only_reader(product, "Mul")
        if last is None or not ((with_x == x and self.by(last, 0.5)) or (x in last.inputs and self.by(product, 0.5))):
            return None
        return [*parts, last], last, self._one(last, "Gelu", (x,))

    def linear(self, product: Node) -> Chain | None:
        """x W + b with constants W and b."""
        w = self.constants.get(product.inputs[1])
        plus = self.only_reader(product, "Add")
        if w is None or w.dim() != 2 or not w.is_floating_point() or plus is None:
            return None
        bias = self.other(plus, product.outputs[0])
        b = self.constants.get(bias)
        if b is None or tuple(b.shape) != (w.shape[1],) or (plus.opset < 7 and plus.get("broadcast")):
            return None
        return [product, plus], plus, self._one(plus, "MatMul", (*product.inputs, bias))

    def silu(self, sigmoid: Node) -> Chain | None:
        """x * sigmoid(x)."""
        product = self.only_reader(sigmoid, "Mul")
        if product is None or self.other(product, sigmoid.outputs[0]) != sigmoid.inputs[0]:
            return None
        return [sigmoid, product], product, self._one(product, "Swish", (sigmoid.inputs[0],))

    def _read(self, n: Node) -> list[Node]:
        return [] if n.outputs[0] in self.outputs else self.readers.get(n.outputs[0], [])

    def _one(self, last: Node, op: str, inputs: tuple[str, ...]) -> Node:
        opset = 24 if op in ("Gelu", "Swish") else last.opset
        return replace(last, op=op, inputs=inputs, attributes={}, opset=opset)


def _reads(n: Node) -> set[str]:
    from innersight.formats.onnx_file import captured

    return {i for i in (*n.inputs, *captured(n)) if i}
