"""ONNX operators against the specification's own node tests, and against ONNX Runtime on random attributes."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from innersight import errors
from innersight.formats.onnx_file import read
from innersight.formats.onnx_plan import operators, results, run, supported

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

# What is known to come out otherwise, and why.
OTHERWISE = {
    "test_attention_3d_causal_bf16": "computed in float32",
    "test_attention_4d_causal_bf16": "computed in float32",
    "test_celu_bfloat16": "computed in float32",
    "test_bitwise_not_3d": "unsigned 16 bits are held in 32",
    "test_quantizelinear_uint16": "unsigned 16 bits are held in 32",
    "test_resize_downsample_scales_linear_align_corners": "as ONNX Runtime has it",
    "test_resize_downsample_scales_cubic_align_corners": "as ONNX Runtime has it",
    "test_reduce_max_empty_set": "nothing to reduce",
    "test_reduce_max_empty_set_bool": "nothing to reduce",
    "test_reduce_min_empty_set": "nothing to reduce",
    "test_training_dropout": "never in training",
    "test_training_dropout_default": "never in training",
    "test_training_dropout_default_mask": "never in training",
    "test_training_dropout_mask": "never in training",
}
# Operators that are not for networks of pictures, or not yet there.
REFUSED = """
    Adagrad Adam ArrayFeatureExtractor Attention Bernoulli Binarizer BitCast BlackmanWindow CausalConvWithState Col2Im
    DFT FlexAttention GRU HammingWindow HannWindow ImageDecoder LSTM LabelEncoder LinearAttention MelWeightMatrix
    Momentum NegativeLogLikelihoodLoss Optional OptionalGetElement OptionalHasElement QuantizeLinear RNN RoiAlign
    RotaryEmbedding STFT Scan SequenceConstruct SequenceEmpty SoftmaxCrossEntropyLoss SplitToSequence SwiGLU
    TensorScatter TfIdfVectorizer TreeEnsemble Unique Gradient Adam RegexFullMatch StringConcat StringNormalizer
    StringSplit
    """.split()


def _tensor(value: Any) -> torch.Tensor:
    value = np.asarray(value) if isinstance(value, (np.generic, int, float)) else value
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf" or value.dtype.itemsize > 8:
        raise errors.Unsupported("text, a sequence, or a number of less than 8 bits")
    wider = {np.dtype(np.uint16): np.int32, np.dtype(np.uint32): np.int64, np.dtype(np.uint64): np.int64}
    half = np.float32 if value.dtype == np.float16 else value.dtype
    return torch.from_numpy(np.array(value, dtype=wider.get(value.dtype, half)))


def _computed(model: Any, inputs: Any) -> list[torch.Tensor]:
    file = read(model)
    values: dict[str, Any] = dict(file.weights)
    values.update((i.name, _tensor(v)) for i, v in zip(model.graph.input, inputs, strict=False))
    for n in file.nodes:
        supported(n)
    for n in file.nodes:
        made = results(run(n, [values[i] if i else None for i in n.inputs], values))
        values.update((name, v) for name, v in zip(n.outputs, made, strict=False) if name)
    return [values[o] for o in file.outputs]


def _cases() -> list[Any]:
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [c for c in collect_testcases(None) if "_expanded" not in c.name and c.model is not None]


@pytest.mark.filterwarnings("ignore")
def test_the_specifications_own_node_tests_come_out_right() -> None:
    right, wrong, refused, other_types = 0, [], set(), 0
    for case in _cases():
        try:
            fine = True
            for inputs, outputs in case.data_sets:
                for got, want in zip(_computed(case.model, inputs), outputs, strict=True):
                    got, want = np.asarray(got, np.float64), np.asarray(want).astype(np.float64)
                    limits = {"rtol": max(case.rtol, 1e-3), "atol": max(case.atol, 1e-5), "equal_nan": True}
                    fine &= got.shape == want.shape and np.allclose(got, want, **limits)
            right += fine
            if not fine:
                wrong.append(case.name)
        except errors.Unsupported as error:
            operator = str(error).partition(" ")[0]
            if operator[0].isupper():
                refused.add(operator)
            else:
                other_types += 1
        except (RuntimeError, IndexError):
            wrong.append(case.name)
    assert set(wrong) <= set(OTHERWISE)
    assert refused <= set(REFUSED)
    version = tuple(int(part) for part in onnx.__version__.split(".")[:2])
    if version >= (1, 23):
        assert right >= 940
    assert other_types < 250


def test_the_documentation_lists_the_operators() -> None:
    text = (Path(__file__).parent.parent / "docs" / "onnx.md").read_text(encoding="utf-8")
    listed = re.search(r"<!-- operators -->(.*)<!-- /operators -->", text, re.DOTALL)
    assert listed is not None
    own, contrib = (re.findall(r"\w+", part) for part in listed[1].split("Of `com.microsoft`:"))
    assert (own, contrib) == operators()


# --- random attributes, against ONNX Runtime -------------------------------------------------------------------------


def _node_model(op: str, inputs: dict[str, np.ndarray], attributes: dict[str, Any], opset: int, blank: int = 0) -> Any:
    names = list(inputs)
    order = [names[0], *[""] * blank, *names[1:]]
    node = onnx.helper.make_node(op, order, ["y"], **attributes)
    declared = [onnx.helper.make_tensor_value_info(names[0], 1, inputs[names[0]].shape)]
    kept = [onnx.numpy_helper.from_array(inputs[name], name) for name in names[1:]]
    graph = onnx.helper.make_graph([node], "one", declared, [onnx.helper.make_empty_tensor_value_info("y")], kept)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)


def _compare(
    op: str, inputs: dict[str, np.ndarray], attributes: dict[str, Any], opset: int = 17, blank: int = 0
) -> bool:
    """Whether ONNX Runtime takes the case; if it does, the values have to be equal."""
    model = _node_model(op, inputs, attributes, opset, blank)
    first = next(iter(inputs))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        (want,) = session.run(None, {first: inputs[first]})
    except Exception:
        return False
    if not want.size:
        return False
    (got,) = _computed(model, [inputs[first]])
    assert tuple(got.shape) == want.shape, (attributes, inputs[first].shape)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-4, atol=1e-5, err_msg=str((op, attributes)))
    return True


def _noise(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def _some(rng: np.random.Generator, low: int, high: int, count: int) -> list[int]:
    return [int(v) for v in rng.integers(low, high, count)]


def _padding(rng: np.random.Generator) -> dict[str, Any]:
    kind = rng.integers(0, 4)
    if kind == 0:
        return {"auto_pad": "SAME_UPPER"}
    if kind == 1:
        return {"auto_pad": "SAME_LOWER"}
    return {"pads": _some(rng, 0, 3, 4)} if kind == 2 else {"pads": _some(rng, 0, 3, 2) * 2}


def test_convolutions_equal_onnx_runtime() -> None:
    rng = np.random.default_rng(0)
    done = 0
    for _ in range(80):
        groups, out, inner = (int(v) for v in rng.integers(1, 4, 3))
        kernel = _some(rng, 1, 4, 2)
        x = _noise(rng, 2, groups * inner, *_some(rng, 5, 12, 2))
        w, b = _noise(rng, groups * out, inner, *kernel), _noise(rng, groups * out)
        attributes = {"group": groups, "strides": _some(rng, 1, 4, 2), "dilations": _some(rng, 1, 3, 2)}
        done += _compare("Conv", {"x": x, "w": w, "b": b}, {**attributes, **_padding(rng)})
    assert done > 40  # ONNX Runtime takes no dilations with auto_pad


def test_transposed_convolutions_equal_onnx_runtime() -> None:
    rng = np.random.default_rng(1)
    done = 0
    for _ in range(120):
        groups, out, inner = (int(v) for v in rng.integers(1, 4, 3))
        kernel, strides = _some(rng, 1, 5, 2), _some(rng, 1, 4, 2)
        x = _noise(rng, 1, groups * inner, *_some(rng, 3, 8, 2))
        w, b = _noise(rng, groups * inner, out, *kernel), _noise(rng, groups * out)
        attributes = {"group": groups, "strides": strides, "dilations": _some(rng, 1, 3, 2), **_padding(rng)}
        if rng.integers(0, 2):
            attributes["output_padding"] = [int(rng.integers(0, s)) for s in strides]
        if rng.integers(0, 3) == 0:
            attributes.pop("pads", None)
            attributes["output_shape"] = _some(rng, 6, 16, 2)
        done += _compare("ConvTranspose", {"x": x, "w": w, "b": b}, attributes)
    assert done > 60


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool", "LpPool"])
def test_pools_equal_onnx_runtime(op: str) -> None:
    rng = np.random.default_rng(2)
    done = 0
    for _ in range(120):
        kernel = _some(rng, 1, 5, 2)
        attributes = {"kernel_shape": kernel, "strides": _some(rng, 1, 4, 2), **_padding(rng)}
        if op == "AveragePool":
            attributes["count_include_pad"] = int(rng.integers(0, 2))
        if op != "LpPool":
            attributes["ceil_mode"] = int(rng.integers(0, 2))
            attributes["dilations"] = _some(rng, 1, 3, 2)
        done += _compare(op, {"x": _noise(rng, 2, 3, *_some(rng, 6, 12, 2))}, attributes, opset=19)
    assert done > 60


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
def test_pads_equal_onnx_runtime(mode: str) -> None:
    rng = np.random.default_rng(3)
    done = 0
    for _ in range(30):
        pads = np.array([0, *_some(rng, -1, 3, 3), 0, *_some(rng, -1, 3, 3)], np.int64)
        inputs = {"x": _noise(rng, 1, 4, *_some(rng, 5, 8, 2)), "pads": pads}
        if mode == "constant":
            inputs["fill"] = np.array(0.5, np.float32)
        done += _compare("Pad", inputs, {"mode": mode}, opset=19)
    assert done > 15


def test_resizing_equals_onnx_runtime() -> None:
    rng = np.random.default_rng(4)
    coordinates = "half_pixel pytorch_half_pixel align_corners asymmetric half_pixel_symmetric".split()
    done = 0
    for _ in range(200):
        x = _noise(rng, 1, 2, *_some(rng, 3, 9, 2))
        mode = str(rng.choice(["nearest", "linear", "cubic"]))
        attributes: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": str(rng.choice(coordinates))}
        if mode == "nearest":
            attributes["nearest_mode"] = str(rng.choice(["floor", "round_prefer_floor", "round_prefer_ceil", "ceil"]))
        if mode != "nearest":
            attributes["antialias"] = int(rng.integers(0, 2))
            attributes["exclude_outside"] = int(mode == "cubic" and rng.integers(0, 2))
        if rng.integers(0, 2):
            factors = np.array([1, 1, *rng.choice([0.5, 0.75, 1.5, 2.0, 3.0, 0.6], 2)], np.float32)
            done += _compare("Resize", {"x": x, "scales": factors}, attributes, opset=19, blank=1)
        else:
            sizes = np.array([1, 2, *_some(rng, 2, 14, 2)], np.int64)
            done += _compare("Resize", {"x": x, "sizes": sizes}, attributes, opset=19, blank=2)
    assert done > 120
