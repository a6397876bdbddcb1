"""ONNX files: what is opened answers what ONNX Runtime answers, and is explained as the torch module it came from."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import innersight
from innersight import errors, testing
from innersight.formats.onnx import agreement, open_onnx

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

TOLERANCE = 1e-5


def export(
    module: nn.Module, path: Path, size: tuple[int, ...] = (3, 64, 64), batch: str | None = "n", **options: Any
) -> Path:
    """Write a module with the TorchScript exporter; with `batch`, for any number of pictures."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = {"x": {0: batch}} if batch else None
        torch.onnx.export(
            module.eval(), (torch.randn(1, *size),), str(path), dynamo=False, input_names=["x"], dynamic_axes=axes,
            **{"opset_version": 17, **options},
        )  # fmt: skip
    return path


def trained(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights and statistics as after a training."""
    torch.manual_seed(seed)
    for m in module.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            m.reset_parameters()
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    return module.eval()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("onnx")


@pytest.fixture(scope="session")
def resnet(folder: Path) -> tuple[nn.Module, Path]:
    import torchvision

    module = trained(torchvision.models.resnet18(weights=None, num_classes=10))
    return module, export(module, folder / "resnet18.onnx")


@pytest.fixture(scope="session")
def pictures() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def opened(path: Path) -> innersight.Network:
    return innersight.open(str(path))


def worst(path: Any, **options: Any) -> float:
    values = agreement(path, **options)
    assert len(values) > 1
    return max(values.values())


# --- files on disk ---------------------------------------------------------------------------------------------------


def test_squeezenet_of_caffe_is_the_network_of_the_torch_file(shared_data: Callable[..., Path]) -> None:
    import torchvision

    path = shared_data("onnx", "SqueezeNet_fp32_upcast.onnx")
    assert worst(path) < TOLERANCE
    net = opened(path)
    assert any("agrees with ONNX Runtime within" in note for note in net.notes)
    assert net.input_shape == (3, 224, 224)
    module = torchvision.models.squeezenet1_1(weights=None)
    module.load_state_dict(torch.load(shared_data("torch", "squeezenet1_1_imagenet.pth"), weights_only=True))
    x = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        want = module.eval()((x - mean) / std).softmax(1).numpy()
    caffe = (x * 255).flip(1) - torch.tensor([104.0, 117.0, 123.0]).reshape(1, 3, 1, 1)
    assert np.abs(net.predict(caffe).logits.reshape(1, -1) - want).max() < TOLERANCE
    assert "fire9/expand3x3_1" in net.layers


def test_mnist_of_cntk_says_how_its_pictures_are_prepared(shared_data: Callable[..., Path]) -> None:
    path = shared_data("onnx", "mnist_cntk.onnx")
    assert worst(path) < TOLERANCE
    net = opened(path)
    assert net.preprocess is not None
    assert net.preprocess.channels == "L"
    assert net.preprocess.scale == 1.0
    assert net.engine.fixed_batch is None
    testing.check_network(net)


# --- exports ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "squeezenet1_1"])
def test_every_value_of_a_torchvision_export_equals_onnx_runtime(folder: Path, name: str) -> None:
    import torchvision

    module = trained(getattr(torchvision.models, name)(weights=None, num_classes=10))
    path = export(module, folder / f"{name}.onnx")
    assert worst(path) < TOLERANCE
    assert worst(path, optimised=True, x=torch.randn(2, 3, 64, 64)) < TOLERANCE


@pytest.mark.parametrize("name", list(testing.NETWORKS))
def test_small_networks_export_and_pass_every_check(folder: Path, name: str) -> None:
    make, size = testing.NETWORKS[name]
    torch.manual_seed(0)
    module = make().eval()
    if name == "several_outputs":

        class Both(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = make()

            def forward(self, x: torch.Tensor) -> Any:
                made = self.inner(x)
                return made["features"], made["logits"]

        module = Both().eval()
    path = export(module, folder / f"{name}.onnx", size)
    assert worst(path) < TOLERANCE
    net = innersight.open(str(path), output=1 if name == "several_outputs" else None)
    assert not net.engine.recording(net._sample()).gaps
    testing.check_network(net)
    x = torch.randn(2, *size)
    with torch.no_grad():
        want = module(x)
    want = want[1] if isinstance(want, tuple) else want
    assert testing.close(net.predict(x).logits, want.numpy())


def test_an_export_of_dynamo_shows_the_modules_it_was_written_from(folder: Path) -> None:
    pytest.importorskip("onnxscript")
    module = trained(testing.NETWORKS["residual"][0]())
    path = folder / "dynamo.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (torch.randn(1, 3, 16, 16),), str(path), dynamo=True, verbose=False)
    assert worst(path) < TOLERANCE
    net = opened(path)
    names = list(net.layers)
    assert {"relu", "conv2", "add", "relu_1", "fc"} <= set(names)
    assert net.engine.fixed_batch is None
    testing.check_network(net)


def test_names_are_those_of_the_file_and_every_one_is_unique(resnet: tuple[nn.Module, Path]) -> None:
    net = opened(resnet[1])
    names = list(net.layers)
    assert names[:4] == ["/conv1/Conv", "/relu/Relu", "/maxpool/MaxPool", "/layer1/layer1.0/conv1/Conv"]
    assert len(names) == len(set(names))
    assert net.layers["/layer1/layer1.0/conv1/Conv"].kind == "Conv"
    assert net.layers["/conv1/Conv"].receptive_field.size == (7, 7)


def test_maps_and_gradients_are_those_of_the_torch_module(
    resnet: tuple[nn.Module, Path], pictures: torch.Tensor
) -> None:
    module, path = resnet
    a, b = innersight.open(module, input_shape=(3, 64, 64)), opened(path)
    testing.check_network(b, pictures)
    assert testing.close(b.predict(pictures).logits, a.predict(pictures).logits)
    for ours, theirs in (("/relu/Relu", "relu"), ("/layer2/layer2.0/Add", "layer2.0.add"), ("/fc/Gemm", "fc")):
        assert testing.close(b.maps(pictures, [ours])[ours], a.maps(pictures, [theirs])[theirs])


@pytest.mark.parametrize("method", ["gradient", "gradcam", "lrp", "deeplift", "ablationcam", "occlusion"])
def test_explanations_are_those_of_the_torch_module(
    resnet: tuple[nn.Module, Path], pictures: torch.Tensor, method: str
) -> None:
    module, path = resnet
    a, b = innersight.open(module, input_shape=(3, 64, 64)), opened(path)
    want, got = (net.explain(pictures[:1], method=method, target=3).values for net in (a, b))
    assert testing.close(got, want, 1e-4)


@pytest.mark.parametrize("name", ["gated", "tokens", "channels_last"])
def test_chains_of_operators_are_explained_as_the_operation_they_stand_for(folder: Path, name: str) -> None:
    """GELU, SiLU and linear layers come apart in an export; relevance is that of the module all the same."""
    make, size = testing.NETWORKS[name]
    torch.manual_seed(0)
    module = make().eval()
    a, b = innersight.open(module, input_shape=size), opened(export(module, folder / f"chains_{name}.onnx", size))
    x = torch.randn(1, *size, generator=torch.Generator().manual_seed(5))
    # The biases that FullGrad reads are cut otherwise in attention: q, k and v have one in the module.
    more = ["attention_rollout", "attention_relevance"] if name == "tokens" else ["fullgrad"]
    for method in ["lrp", "deeplift", "excitation_backprop", *more]:
        want, got = (net.explain(x, method=method, target=1).values for net in (a, b))
        assert testing.close(got, want, 1e-4), method


# --- inputs and batches ----------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """Written for one picture: a constant class token, a reshape to (1, ...)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).relu().reshape(1, 4, 49).transpose(1, 2)
        x = torch.cat([self.token, x], 1)
        return self.head(x.mean(1))


def test_a_file_for_one_picture_runs_in_batches_where_that_is_equal(folder: Path) -> None:
    module = Fixed().eval()
    net = opened(export(module, folder / "fixed.onnx", (3, 16, 16), batch=None))
    assert net.engine.fixed_batch is None
    assert any("one picture at a time; it runs in batches" in note for note in net.notes)
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        want = torch.cat([module(one) for one in x.split(1)])
    assert testing.close(net.predict(x).logits, want.numpy())


def test_a_file_whose_answer_depends_on_the_batch_runs_one_by_one(folder: Path) -> None:
    class Mixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x - x.mean()).mean((2, 3))

    module = Mixed()
    net = opened(export(module, folder / "mixed.onnx", (3, 8, 8)))
    assert net.engine.fixed_batch == 1
    x = torch.randn(2, 3, 8, 8)
    want = torch.cat([module(one) for one in x.split(1)])
    assert testing.close(net.predict(x).logits, want.numpy())


def build(nodes: list[Any], inputs: Any, outputs: list[str], weights: dict[str, np.ndarray] | None = None,
          opset: int = 17, **options: Any) -> Any:  # fmt: skip
    """A model of nodes; inputs are (name, type, shape)."""
    declared = [onnx.helper.make_tensor_value_info(*i) for i in inputs]
    made = [onnx.helper.make_empty_tensor_value_info(o) for o in outputs]
    kept = [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in (weights or {}).items()]
    graph = onnx.helper.make_graph(nodes, "graph", declared, made, kept)
    versions = [
        onnx.helper.make_opsetid("", opset),
        *(onnx.helper.make_opsetid(d, 1) for d in options.get("domains", ())),
    ]
    return onnx.helper.make_model(graph, opset_imports=versions, ir_version=8)


node = onnx.helper.make_node


def _conv(seed: int = 0, channels: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"w": rng.standard_normal((4, channels, 3, 3)).astype(np.float32)}


def test_channels_last_are_turned() -> None:
    turn = node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2])
    conv = node("Conv", ["t", "w"], ["y"], name="conv")
    model = build([turn, conv], [("x", 1, ["n", 8, 9, 3])], ["y"], _conv())
    found = open_onnx(model)
    assert found.input_shape == (3, 8, 9)
    assert any("channels last" in note for note in found.notes)
    x = torch.randn(2, 3, 8, 9)
    assert torch.allclose(found.module(x), F.conv2d(x, torch.from_numpy(_conv()["w"])), atol=1e-5)
    assert max(agreement(model).values()) < TOLERANCE


def test_channels_last_without_a_transpose_are_turned_all_the_same() -> None:
    model = build([node("ReduceMean", ["x"], ["y"], axes=[1, 2], keepdims=0)], [("x", 1, [1, 8, 9, 3])], ["y"])
    found = open_onnx(model)
    x = torch.randn(2, 3, 8, 9)
    assert torch.allclose(found.module(x), x.mean((2, 3)), atol=1e-6)


def test_half_precision_is_computed_in_float32() -> None:
    weights = {"w": _conv()["w"].astype(np.float16)}
    model = build([node("Conv", ["x", "w"], ["y"])], [("x", 10, ["n", 3, 8, 8])], ["y"], weights)
    found = open_onnx(model)
    assert any("float16" in note for note in found.notes)
    x = torch.randn(1, 3, 8, 8)
    assert torch.allclose(found.module(x), F.conv2d(x, torch.from_numpy(weights["w"]).float()), atol=1e-5)


def test_an_open_size_is_assumed_and_said() -> None:
    found = open_onnx(build([node("Conv", ["x", "w"], ["y"])], [("x", 1, ["n", "c", "h", "w0"])], ["y"], _conv()))
    assert found.input_shape == (3, 224, 224)
    assert any("leaves its input's size open" in note and "input_shape=" in note for note in found.notes)


def test_labels_come_from_metadata_and_are_never_run() -> None:
    model = build([node("Conv", ["x", "w"], ["y"])], [("x", 1, [1, 3, 8, 8])], ["y"], _conv())
    onnx.helper.set_model_props(model, {"names": "{0: 'cat', 1: 'dog'}", "classes": "__import__('os').system('x')"})
    assert open_onnx(model).labels == ["cat", "dog"]


def test_a_file_that_scales_its_pictures_itself_says_so() -> None:
    weights = {**_conv(), "mean": np.full((1, 3, 1, 1), 120, np.float32)}
    nodes = [node("Sub", ["x", "mean"], ["s"], name="center"), node("Conv", ["s", "w"], ["y"])]
    model = build(nodes, [("x", 1, [1, 3, 8, 8])], ["y"], weights)
    net = innersight.open(model)
    assert net.preprocess is not None
    assert net.preprocess.scale == 1.0
    assert any("values 0..255 are assumed, since the file itself goes on with Sub 'center'" in n for n in net.notes)


def test_where_the_answer_is_the_number_of_a_class_the_scores_are_shown() -> None:
    nodes = [node("Conv", ["x", "w"], ["c"]), node("ArgMax", ["c"], ["y"], axis=1)]
    found = open_onnx(build(nodes, [("x", 1, ["n", 3, 8, 8])], ["y"], _conv()))
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(found.module(x), F.conv2d(x, torch.from_numpy(_conv()["w"])), atol=1e-5)
    assert any("the scores before it are shown" in note for note in found.notes)


def test_integers_as_input_take_pixels() -> None:
    cast = node("Cast", ["x"], ["f"], to=1)
    model = build([cast, node("Conv", ["f", "w"], ["y"])], [("x", 2, [1, 3, 8, 8])], ["y"], _conv())
    found = open_onnx(model)
    assert found.preprocess is not None
    assert found.preprocess.scale == 1.0
    assert any("agrees with ONNX Runtime" in note for note in found.notes)


def test_branches_and_loops_are_run() -> None:
    """If on a shape, and a Loop of three rounds that doubles."""
    info = onnx.helper.make_tensor_value_info
    then = onnx.helper.make_graph([node("Relu", ["x"], ["a"])], "then", [], [info("a", 1, None)])
    other = onnx.helper.make_graph([node("Neg", ["x"], ["b"])], "else", [], [info("b", 1, None)])
    body = onnx.helper.make_graph(
        [node("Add", ["carried", "carried"], ["next"]), node("Identity", ["going"], ["again"])], "body",
        [info("trip", 7, []), info("going", 9, []), info("carried", 1, None)],
        [info("again", 9, []), info("next", 1, None)],
    )  # fmt: skip
    nodes = [
        node("Shape", ["x"], ["shape"]),
        node("Gather", ["shape", "two"], ["height"]),
        node("Greater", ["height", "four"], ["large"]),
        node("If", ["large"], ["chosen"], then_branch=then, else_branch=other),
        node("Loop", ["three", "", "chosen"], ["y"], body=body),
    ]
    weights = {"two": np.array(2), "four": np.array(4), "three": np.array(3)}
    model = build(nodes, [("x", 1, ["n", 3, "h", "h"])], ["y"], weights)
    found = open_onnx(model)
    large, small = torch.randn(1, 3, 8, 8), torch.randn(1, 3, 3, 3)
    assert torch.allclose(found.module(large), large.relu() * 8)
    assert torch.allclose(found.module(small), -small * 8)


def test_shape_arithmetic_is_no_layer_and_follows_the_input(folder: Path) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return F.interpolate(y, size=(x.shape[2] // 2, x.shape[3] // 2), mode="bilinear").reshape(x.shape[0], -1)

    module = Flat().eval()
    path = folder / "flat.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = {"x": {0: "n", 2: "h", 3: "w"}}
        torch.onnx.export(
            module, (torch.randn(1, 3, 16, 16),), str(path), dynamo=False, input_names=["x"], dynamic_axes=axes
        )
    net = opened(path)
    assert {layer.kind for layer in net.layers.values()} <= {"Conv", "Resize", "Reshape"}
    for side in (16, 20):
        x = torch.randn(2, 3, side, side)
        for _ in range(2):
            with torch.no_grad():
                assert torch.allclose(net.module(x), module(x), atol=1e-5)
        assert worst(path, x=x) < TOLERANCE


# --- quantised -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def quantised(folder: Path) -> Callable[[str, bool], Path]:
    """The residual network of `testing`, quantised on noise; (format, signed and per channel) -> path."""
    from onnxruntime import quantization as q

    source = export(trained(testing.NETWORKS["residual"][0]()), folder / "to_quantise.onnx", (3, 16, 16))

    class Noise(q.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter([{"x": np.random.default_rng(i).standard_normal((1, 3, 16, 16)).astype(np.float32)}
                              for i in range(8)])  # fmt: skip

        def get_next(self) -> Any:
            return next(self.left, None)

    def make(kind: str, signed: bool) -> Path:
        path = folder / f"{kind}_{signed}.onnx"
        if not path.exists():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                q.quantize_static(
                    str(source), str(path), Noise(), quant_format=q.QuantFormat[kind], per_channel=signed,
                    activation_type=q.QuantType.QInt8 if signed else q.QuantType.QUInt8, weight_type=q.QuantType.QInt8,
                )  # fmt: skip
        return path

    return make


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("signed", [False, True])
def test_quantised_operators_are_equal_to_the_last_bit(quantised: Callable[[str, bool], Path], signed: bool) -> None:
    path = quantised("QOperator", signed)
    assert worst(path) == 0
    assert worst(path, x=torch.randn(3, 3, 16, 16) * 2, optimised=True) == 0
    net = opened(path)
    assert any("to the last bit" in note for note in net.notes)
    assert not net.engine.recording(net._sample()).gaps  # so that channels and patches are followed, not run whole
    testing.check_network(net, gradient=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("signed", [False, True])
def test_qdq_is_within_one_step(quantised: Callable[[str, bool], Path], signed: bool) -> None:
    path = quantised("QDQ", signed)
    net = opened(path)
    assert any("one step off" in note for note in net.notes)
    assert not net.engine.recording(net._sample()).gaps
    step = 1.01 / 255 * 2  # of the largest value: at most half of the range of the integers
    assert worst(path) < step
    testing.check_network(net, gradient=False)


@pytest.mark.filterwarnings("ignore")
def test_ranges_taken_as_the_network_runs_are_those_of_onnx_runtime(
    quantised: Callable[[str, bool], Path], folder: Path
) -> None:
    from onnxruntime import quantization as q

    source = quantised("QOperator", False).parent / "to_quantise.onnx"
    q.quantize_dynamic(str(source), str(folder / "dynamic.onnx"), weight_type=q.QuantType.QUInt8)
    assert worst(folder / "dynamic.onnx") < 1e-6
    net, twin = opened(folder / "dynamic.onnx"), opened(source)
    assert net.engine.fixed_batch == 1  # the range is that of the whole batch
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert testing.close(net.predict(x).logits, twin.predict(x).logits, 0.02)
    ours, theirs = (n.explain(x, method="gradient", target=1).values for n in (net, twin))
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.5  # a ReLU near zero opens in one and not in the other


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_layer_shows_real_numbers_and_has_its_twins_slope(quantised: Callable[[str, bool], Path]) -> None:
    path = quantised("QOperator", False)
    found = open_onnx(path)
    assert found.quantisation
    net, twin = opened(path), opened(path.parent / "to_quantise.onnx")
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    name = next(n for n in net.layers if net.layers[n].kind == "QLinearConv")
    values = net.maps(x, [name])[name]
    steps = values / found.quantisation[name].scale[0]
    assert np.abs(steps - steps.round()).max() < 1e-3
    ours, theirs = (n.explain(x, method="gradient", target=1).values for n in (net, twin))
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.8


@pytest.mark.filterwarnings("ignore")
def test_a_saturated_score_still_has_a_gradient() -> None:
    q = {"s": np.array(0.1, np.float32), "z": np.array(0, np.int8), "small": np.array(1e-3, np.float32)}
    weights = {**q, "w": np.ones((192, 2), np.int8), "one": np.array(1, np.float32)}
    nodes = [
        node("Flatten", ["x"], ["f"]), node("QuantizeLinear", ["f", "s", "z"], ["q"]),
        node("QLinearMatMul", ["q", "s", "z", "w", "one", "z", "small", "z"], ["m"]),
        node("DequantizeLinear", ["m", "small", "z"], ["y"]),
    ]  # fmt: skip
    found = open_onnx(build(nodes, [("x", 1, ["n", 3, 8, 8])], ["y"], weights))
    x = torch.full((1, 3, 8, 8), 0.5, requires_grad=True)
    y = found.module(x)
    assert testing.close(y.detach(), [[0.127, 0.127]])
    (g,) = torch.autograd.grad(y[0, 0], x)
    assert torch.allclose(g, torch.ones_like(g))


# --- what is refused -------------------------------------------------------------------------------------------------


def test_what_is_not_known_is_refused_by_name_before_anything_runs() -> None:
    nodes = [node("Conv", ["x", "w"], ["c"]), node("LSTM", ["c"], ["y"], name="the_lstm", hidden_size=3)]
    with pytest.raises(errors.Unsupported, match="LSTM 'the_lstm' is an operator that is not supported"):
        open_onnx(build(nodes, [("x", 1, [1, 3, 8, 8])], ["y"], _conv()))
    nodes = [node("Conv", ["x", "w"], ["c"]), node("Own", ["c"], ["y"], name="mine", domain="my.domain")]
    with pytest.raises(errors.Unsupported, match="Own 'mine' is from the domain 'my.domain'"):
        open_onnx(build(nodes, [("x", 1, [1, 3, 8, 8])], ["y"], _conv(), domains=["my.domain"]))
    with pytest.raises(errors.Unsupported, match="is random"):
        open_onnx(build([node("RandomNormalLike", ["x"], ["y"])], [("x", 1, [1, 3, 8, 8])], ["y"]))


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build([node("Conv", ["x", "w"], ["y"])], [("x", 1, [1, 3, 8, 8])], ["y"], _conv())
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert any("ONNX Runtime is not installed" in note for note in open_onnx(model).notes)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(errors.MissingPackage, match=r'needs onnx: pip install "innersight\[onnx\]"'):
        open_onnx(model)


def test_one_image_input_is_wanted() -> None:
    two = [("x", 1, [1, 3, 8, 8]), ("z", 1, [1, 3, 8, 8])]
    with pytest.raises(errors.Unsupported, match=r"takes 2 inputs \(x, z\); innersight explains networks of one"):
        open_onnx(build([node("Add", ["x", "z"], ["y"])], two, ["y"]))
    with pytest.raises(errors.Unsupported, match="has 2 dimensions"):
        open_onnx(build([node("Relu", ["x"], ["y"])], [("x", 1, [1, 3])], ["y"]))


def test_an_input_of_another_size_is_refused_in_a_sentence(resnet: tuple[nn.Module, Path]) -> None:
    with pytest.raises(errors.InputError, match=r"takes \(3, 64, 64\): pass \(N, 3, 64, 64\)"):
        opened(resnet[1]).predict(torch.randn(1, 1, 64, 64))
    fixed = open_onnx(build([node("Flatten", ["x"], ["f"]), node("MatMul", ["f", "m"], ["y"])],
                            [("x", 1, ["n", 3, 8, 8])], ["y"], {"m": np.ones((192, 2), np.float32)}))  # fmt: skip
    with pytest.raises(RuntimeError, match="MatMul 'y': "):
        fixed.module(torch.randn(1, 3, 9, 9))
