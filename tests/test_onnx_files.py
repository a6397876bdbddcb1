"""Damaged and hostile ONNX files: one sentence each, nothing large allocated, nothing read from elsewhere."""

from __future__ import annotations

import itertools
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from innersight import errors
from innersight.formats import onnx_limits, onnx_plan
from innersight.formats.onnx import open_onnx
from innersight.formats.onnx_operators import OPERATORS

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

node = onnx.helper.make_node
info = onnx.helper.make_tensor_value_info


def build(nodes: list[Any], weights: dict[str, np.ndarray] | None = None, shape: Any = (1, 3, 8, 8), opset: int = 17,
          output: str = "y", functions: Any = ()) -> Any:  # fmt: skip
    kept = [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in (weights or {}).items()]
    made = [onnx.helper.make_empty_tensor_value_info(output)]
    graph = onnx.helper.make_graph(nodes, "graph", [info("x", 1, shape)], made, kept)
    versions = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("own", 1)]
    return onnx.helper.make_model(graph, opset_imports=versions, ir_version=10, functions=functions)


def small(**extra: Any) -> Any:
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((4, 3, 3, 3)).astype(np.float32), "m": np.ones((144, 2), np.float32)}
    nodes = [
        node("Conv", ["x", "w"], ["c"], name="conv"), node("Relu", ["c"], ["r"]), node("Flatten", ["r"], ["f"]),
        node("MatMul", ["f", "m"], ["y"]),
    ]  # fmt: skip
    return build(nodes, weights, **extra)


def refused(source: Any, match: str) -> str:
    """The one sentence that opening raises."""
    with pytest.raises(errors.InnersightError, match=match) as raised:
        open_onnx(source)
    said = str(raised.value)
    assert len(said) < 500
    assert "\n" not in said
    return said


# --- not a file of this kind -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"hello, world", b"\x08\x07", b"PK\x03\x04" + bytes(100), b"{}"])
def test_what_is_no_onnx_file_is_said_to_be_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert "model.onnx" in refused(path, "is no ONNX file, or a damaged one")


def test_a_cut_file_is_refused() -> None:
    content = small().SerializeToString()
    for end in range(1, len(content), 97):
        with pytest.raises(errors.InnersightError):
            open_onnx(content[:end])


def test_data_must_have_the_size_that_its_shape_says() -> None:
    model = small()
    model.graph.initializer[0].dims[0] = 1 << 40
    refused(model, r"the weight 'w' in graph holds 432 bytes where its shape says")
    model = small()
    model.graph.initializer[0].dims[0] = -4
    refused(model, "the weight 'w' in graph has the shape")
    model = small()
    model.graph.initializer[0].data_type = 77
    refused(model, "is of no known type")


def test_names_lead_somewhere_and_only_one_way() -> None:
    refused(build([node("Relu", ["x"], ["y"]), node("Neg", ["x"], ["y"])]), "makes 'y', which is there already")
    refused(build([node("Relu", ["nothing"], ["y"])]), "reads 'nothing', which nothing makes")
    refused(build([node("Relu", ["x"], ["z"])]), "returns 'y', which nothing makes")
    cycle = [node("Add", ["x", "b"], ["a"], name="first"), node("Relu", ["a"], ["b"]), node("Neg", ["b"], ["y"])]
    refused(build(cycle), "Add 'first' in graph waits for its own result: the nodes form a cycle")


def test_names_of_any_kind_are_shown_in_a_line() -> None:
    model = build([node("Relu", ["x"], ["r"], name="a\nb" * 1000), node("Neg", ["r"], ["y"])])
    (name, other) = (step.name for step in open_onnx(model).module.steps)
    assert name.startswith("a?ba?b")
    assert len(name) == 200
    assert other == "y"
    content = model.SerializeToString().replace(b"\x01r", b"\x01\xff")  # no UTF-8
    assert torch.equal(open_onnx(content).module(-torch.ones(1, 3, 8, 8)), torch.zeros(1, 3, 8, 8))
    assert len(refused(build([node("Relu", ["n" * 100_000], ["y"])]), "which nothing makes")) < 400


def test_nodes_out_of_order_are_sorted_and_unread_ones_left_out() -> None:
    nodes = [node("Neg", ["a"], ["y"]), node("Relu", ["x"], ["a"]), node("NoSuchThing", ["x"], ["unread"])]
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(open_onnx(build(nodes)).module(x), -x.relu())


# --- data in a second file -------------------------------------------------------------------------------------------


def external(folder: Path, location: str, **entries: Any) -> Path:
    model = small()
    weight = model.graph.initializer[0]
    data = weight.raw_data
    weight.ClearField("raw_data")
    weight.data_location = 1
    for key, value in {"location": location, **entries}.items():
        weight.external_data.add(key=key, value=str(value))
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    (folder / "data.bin").write_bytes(bytes(8) + data)
    return path


def test_data_beside_the_model_is_read(tmp_path: Path) -> None:
    found = open_onnx(external(tmp_path, "data.bin", offset=8, length=432))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(found.module(x), open_onnx(small()).module(x))
    assert any("agrees with ONNX Runtime" in note for note in found.notes)


@pytest.mark.parametrize("location", ["/etc/passwd", "../data.bin", "sub/../../data.bin", "C:\\data.bin", "", "file:x"])
def test_data_elsewhere_is_not_read(tmp_path: Path, location: str) -> None:
    refused(external(tmp_path, location), "which is not in the model's folder")


def test_links_missing_files_and_short_ones_are_not_followed(tmp_path: Path) -> None:
    refused(external(tmp_path, "missing.bin"), "there is no such file")
    refused(external(tmp_path, "data.bin", offset=9), "is too short for the weight 'w'")
    refused(external(tmp_path, "data.bin", offset=-8), "is too short for the weight 'w'")
    refused(external(tmp_path, "data.bin", offset="eight"), "does not say where")
    path = external(tmp_path, "link.bin")
    (tmp_path / "link.bin").symlink_to(tmp_path / "data.bin")
    refused(path, "links are not followed")
    path = external(tmp_path, "hard.bin")
    os.link(tmp_path / "data.bin", tmp_path / "hard.bin")
    refused(path, "links are not followed")


def test_bytes_have_no_folder(tmp_path: Path) -> None:
    refused(external(tmp_path, "data.bin").read_bytes(), "open the model by its path")


# --- files that ask for too much -------------------------------------------------------------------------------------

BIG = np.array([1 << 20, 1 << 20])


def _doubling(steps: int) -> list[Any]:
    names = ["x", *(f"v{i}" for i in range(steps - 1)), "y"]
    return [node("Concat", [a, a], [b], axis=1) for a, b in itertools.pairwise(names)]


def _hoarding() -> list[Any]:
    """A hundred values of 50 MB each, all kept for the sum at the end."""
    nodes = [node("Expand", ["x", "size"], [f"v{i}"]) for i in range(100)]
    nodes += [node("Neg", [f"v{i}"], [f"n{i}"]) for i in range(100)]
    return [*nodes, node("Sum", [f"n{i}" for i in range(100)], ["y"])]


BOMBS: dict[str, Callable[[], Any]] = {
    "ConstantOfShape": lambda: build(
        [node("ConstantOfShape", ["s"], ["c"]), node("Add", ["x", "c"], ["y"])], {"s": BIG}
    ),
    "Tile": lambda: build([node("Tile", ["x", "s"], ["y"])], {"s": np.array([1, 1, 1 << 20, 1 << 20])}),
    "Expand": lambda: build([node("Expand", ["x", "s"], ["y"])], {"s": np.array([1 << 30, 3, 8, 8])}),
    "Pad": lambda: build([node("Pad", ["x", "s"], ["y"])], {"s": np.array([0, 0, 1 << 30, 0, 0, 0, 1 << 30, 0])}),
    "Pad reflect": lambda: build(
        [node("Pad", ["x", "s"], ["y"], mode="reflect")], {"s": np.array([0, 0, 1 << 40, 0, 0, 0, 0, 0])}
    ),
    "Resize": lambda: build([node("Resize", ["x", "", "s"], ["y"])], {"s": np.array([1, 1, 1e8, 1e8], np.float32)}),
    "Resize to sides that are allowed each": lambda: build(
        [node("Resize", ["x", "", "", "s"], ["y"])], {"s": np.array([1, 3, 1 << 16, 1 << 16])}
    ),
    "Range": lambda: build(
        [node("Range", ["a", "b", "c"], ["r"]), node("Cast", ["r"], ["f"], to=1), node("Add", ["x", "f"], ["y"])],
        {"a": np.array(0), "b": np.array(1 << 40), "c": np.array(1)},
    ),
    "OneHot": lambda: build(
        [node("ArgMax", ["x"], ["i"], axis=1), node("OneHot", ["i", "d", "v"], ["y"])],
        {"d": np.array(1 << 40), "v": np.array([0, 1], np.float32)},
    ),
    "Concat": lambda: build(_doubling(40)),
    "outer product": lambda: build(
        [node("Transpose", ["k"], ["t"]), node("Mul", ["k", "t"], ["b"]), node("Add", ["x", "b"], ["y"])],
        {"k": np.ones((1, 1 << 18), np.float32)},
    ),
    "many values that all stay": lambda: build(_hoarding(), {"size": np.array([1, 3, 2048, 2048])}, (1, 3, 1, 1)),
    "an upsampling convolution": lambda: build(
        [node("ConvTranspose", ["x", "w"], ["y"], strides=[1 << 14, 1 << 14])],
        {"w": np.ones((3, 1, 1, 1), np.float32)},
    ),
}


@pytest.mark.parametrize("name", list(BOMBS))
def test_bombs_are_refused_before_they_take_memory(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(BOMBS[name](), "MiB|more than a picture can need|more memory than is allowed")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < onnx_limits.MAX_LIVE + onnx_limits.MAX_VALUE


def _loop(inner: list[Any] | None = None, trips: str = "", **weights: Any) -> Any:
    body = onnx.helper.make_graph(
        [node("Identity", ["going"], ["again"]), *(inner or [node("Neg", ["carried"], ["next"])])], "body",
        [info("trip", 7, []), info("going", 9, []), info("carried", 1, None)],
        [info("again", 9, []), info("next", 1, None)],
    )  # fmt: skip
    return build(
        [node("Loop", [trips, "yes", "x"], ["y"], name="round", body=body)], {"yes": np.array(True), **weights}
    )


@pytest.fixture
def few_trips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_plan, "MAX_TRIPS", 200)


@pytest.mark.usefixtures("few_trips")
def test_a_loop_without_end_is_stopped() -> None:
    refused(_loop(), "Loop 'round' goes round more than 200 times")
    refused(_loop(trips="n", n=np.array(1 << 60)), "Loop 'round' goes round more than 200 times")


@pytest.mark.usefixtures("few_trips")
def test_loops_within_loops_count_together() -> None:
    body = onnx.helper.make_graph(
        [node("Identity", ["g2"], ["again2"]), node("Neg", ["c2"], ["next2"])], "inner",
        [info("t2", 7, []), info("g2", 9, []), info("c2", 1, None)], [info("again2", 9, []), info("next2", 1, None)],
    )  # fmt: skip
    inner = [node("Loop", ["n", "yes", "carried"], ["next"], body=body)]
    refused(_loop(inner, trips="n", n=np.array(150)), "goes round more than 200 times")


def test_functions_that_unfold_without_end_are_refused() -> None:
    def function(name: str, calls: list[str]) -> Any:
        nodes = [node(c, ["a" if i == 0 else f"v{i - 1}"], [f"v{i}"], domain="own") for i, c in enumerate(calls)]
        nodes = nodes or [node("Relu", ["a"], ["v0"])]
        versions = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("own", 1)]
        return onnx.helper.make_function("own", name, ["a"], [f"v{max(len(calls) - 1, 0)}"], nodes, versions)

    chain = [function(f"f{i}", [f"f{i + 1}"] * 2) for i in range(40)] + [function("f40", [])]
    call = [node("f0", ["x"], ["y"], domain="own")]
    refused(build(call, functions=chain), "unfold to more than")
    refused(build(call, functions=[function("f0", ["f0"])]), "defines the function 'f0' by itself")
    x = torch.randn(1, 3, 8, 8)
    short = [function(f"f{i}", [f"f{i + 1}"] * 2) for i in range(36, 40)] + [function("f40", [])]
    found = open_onnx(build([node("f36", ["x"], ["y"], domain="own")], functions=short))
    assert torch.equal(found.module(x), x.relu())


# --- anything at all -------------------------------------------------------------------------------------------------


def _with_shapes() -> Any:
    """A file in which shapes, loops and indices are computed."""
    nodes = [
        node("Shape", ["x"], ["s"]), node("Slice", ["s", "zero", "two"], ["head"]),
        node("Concat", ["head", "minus"], ["to"], axis=0), node("Reshape", ["x", "to"], ["r"]),
        node("TopK", ["r", "k"], ["v", "i"]), node("Gather", ["r", "zero"], ["g"], axis=2),
        node("Concat", ["v", "g"], ["c"], axis=2), node("Pad", ["c", "pads"], ["p"]), node("Softmax", ["p"], ["y"]),
    ]  # fmt: skip
    weights = {"zero": np.array([0]), "two": np.array([2]), "minus": np.array([-1]), "k": np.array([5]),
               "pads": np.array([0, 0, 1, 0, 0, 2])}  # fmt: skip
    return build(nodes, weights)


def _outcome(content: bytes) -> str:
    """What became of a file: "opened", or the sentence that refused it."""
    try:
        found = open_onnx(content)
    except errors.InnersightError as error:
        assert "\n" not in str(error)  # noqa: PT017 - any sentence may come, but one
        return str(error)
    assert found.input_shape is not None
    return "opened"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [small, _with_shapes])
def test_damaged_bytes_run_or_are_refused_and_nothing_else(make: Callable[[], Any]) -> None:
    content = np.frombuffer(make().SerializeToString(), np.uint8)
    rng = np.random.default_rng(0)
    outcomes = []
    for _ in range(150):
        damaged = content.copy()
        damaged[rng.integers(0, len(content), rng.integers(1, 3))] = rng.integers(0, 256)
        outcomes.append(_outcome(damaged.tobytes()))
    assert len(set(outcomes)) > 5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [small, _with_shapes])
def test_damaged_parts_run_or_are_refused_and_nothing_else(make: Callable[[], Any]) -> None:
    """What still parses: other operators, other names, other numbers."""
    rng = np.random.default_rng(1)
    numbers = [-1, 0, 1, 2, 3, 7, 255, 1 << 20, 1 << 31, (1 << 63) - 1, -(1 << 63)]
    outcomes = []
    for _ in range(250):
        model = make()
        nodes, weights = model.graph.node, model.graph.initializer
        names = [name for n in nodes for name in (*n.input, *n.output)]
        for _ in range(rng.integers(1, 3)):
            n, t = nodes[rng.integers(len(nodes))], weights[rng.integers(len(weights))]
            kind = rng.integers(6)
            if kind == 0:
                n.op_type = str(rng.choice(sorted(OPERATORS)))
            elif kind == 1:
                n.input[rng.integers(len(n.input))] = str(rng.choice(names))
            elif kind == 2:
                name = str(rng.choice("axis axes pads strides kernel_shape group perm to k mode auto_pad".split()))
                value = [int(v) for v in rng.choice(numbers, rng.integers(1, 5))]
                n.attribute.append(onnx.helper.make_attribute(name, value if rng.integers(2) else value[0]))
            elif kind == 3 and t.raw_data and t.data_type == 7:
                t.raw_data = rng.choice(np.array(numbers, np.int64), len(t.raw_data) // 8).tobytes()
            elif kind == 4 and len(t.dims):
                t.dims[rng.integers(len(t.dims))] = int(rng.choice(numbers))
            else:
                sizes = model.graph.input[0].type.tensor_type.shape.dim
                sizes[rng.integers(len(sizes))].dim_value = int(rng.choice([0, 1, 2, 3, 4, 7, 300]))
        outcomes.append(_outcome(model.SerializeToString()))
    assert outcomes.count("opened") > 5
    assert len(set(outcomes)) > 30
