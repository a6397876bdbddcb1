"""The observer: names, what counts as a layer, and values that equal what the model really held."""

from __future__ import annotations

import copy
import importlib
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as nn_module
from torch.utils.checkpoint import checkpoint

from innersight import errors
from innersight.observe import observer
from innersight.observe.observer import Tap
from innersight.observe.passes import Engine, Request


def learnt(module: nn.Module, x: torch.Tensor, **options: Any) -> observer.Recording:
    return observer.learn(module.eval(), x, **options)


def names_of(module: nn.Module, x: torch.Tensor) -> list[str]:
    return [n.name for n in learnt(module, x).nodes if n.name != "input"]


def read(module: nn.Module, x: torch.Tensor, *names: str) -> dict[str, torch.Tensor]:
    engine = Engine(module)
    with engine.session():
        return engine.run(x, Request(read=names)).values


class Fn(nn.Module):
    """A network that is one function of itself and the picture."""

    def __init__(self, forward: Callable[..., Any], **children: Any):
        super().__init__()
        self.fn = forward
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x: torch.Tensor) -> Any:
        return self.fn(self, x)


def picture(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*(shape or (1, 3, 8, 8)), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# Names


def test_each_call_of_a_reused_module_is_a_layer_of_its_own():
    net = Fn(lambda m, x: m.pool(F.relu(m.b(m.pool(F.relu(m.a(x)))))),
             a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 5, 1), pool=nn.MaxPool2d(2))  # fmt: skip
    x = picture(1, 3, 10, 10)
    assert names_of(net, x) == ["a", "relu", "pool", "b", "relu_1", "pool_1"]
    values = read(net, x, "pool", "pool_1")
    first = F.max_pool2d(F.relu(net.a(x)), 2)
    assert torch.equal(values["pool"], first)
    assert torch.equal(values["pool_1"], F.max_pool2d(F.relu(net.b(first)), 2))


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        (lambda h: h + 1, "add"), (lambda h: 1 + h, "add"), (lambda h: h.add_(1), "add"), (lambda h: h.add(1), "add"),
        (lambda h: 1 - h, "sub"), (lambda h: torch.rsub(h, 1), "rsub"), (lambda h: 2 / (h + 9), "div"),
        (lambda h: h**2, "pow"), (lambda h: 2**h, "pow"), (lambda h: -h, "neg"), (lambda h: abs(h), "abs"),
        (lambda h: h @ h.mT, "matmul"), (lambda h: h.__imul__(2), "mul"), (lambda h: h / 2, "div"),
        (lambda h: F.max_pool2d(h, 2), "max_pool2d"),
        (lambda h: F.max_pool2d(h, 2, return_indices=True)[0], "max_pool2d"),
        (lambda h: torch.ops.aten.relu.default(h), "relu"), (lambda h: torch.relu_(h), "relu"),
        (lambda h: h.relu(), "relu"), (lambda h: F.interpolate(h, scale_factor=2), "interpolate"),
        (lambda h: torch.cat([h, h], 1), "cat"), (lambda h: F.softmax(h, 1), "softmax"),
    ],
)  # fmt: skip
def test_an_operation_goes_by_its_plain_name_however_it_is_written(operation, name):
    net = Fn(lambda m, x: operation(m.c(x)), c=nn.Conv2d(3, 3, 1))
    assert [n.name for n in learnt(net, picture()).layers][-1] == name


@pytest.mark.parametrize("write", ["iadd", "augmented slice", "out", "setitem"])
def test_in_place_spellings_are_seen_and_change_nothing_that_was_read(write):
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = m.c(x)
        if write == "iadd":
            h += 1
        elif write == "augmented slice":
            h[:, :2] += 1
        elif write == "out":
            torch.mul(h, 3, out=h)
        else:
            h[:, 0] = 7
        return h * 1

    net, x = Fn(forward, c=nn.Conv2d(3, 4, 1)), picture()
    with torch.no_grad():
        before = net.c(x)
        after = net(x)
    last = learnt(net, x).nodes[-1]
    values = read(net, x, "c", last.name)
    assert torch.equal(values["c"], before)
    assert torch.equal(values[last.name], after)
    assert not torch.equal(before, after)


def test_a_module_that_runs_two_operations_gives_its_name_to_what_it_returns():
    net = Fn(lambda m, x: m.c(x), c=nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"))
    assert names_of(net, picture()) == ["c.pad", "c"]
    assert torch.equal(read(net, picture(), "c")["c"], net.c(picture()))


def test_a_module_under_two_names_can_be_found_by_both():
    net = Fn(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Conv2d(3, 3, 1))
    net.b = net.a
    recording = learnt(net, picture())
    assert [n.name for n in recording.layers] == ["a", "relu", "a_1"]
    assert recording.find("a").name == "a"
    assert recording.find("b_1").name == "a_1"


def test_a_container_is_another_name_for_what_it_returned():
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), nn.Sequential(nn.Conv2d(4, 4, 1), nn.Identity()))
    recording = learnt(net, picture())
    assert recording.find("0").name == "0.1"
    assert recording.find("1").name == "1.0"


def test_an_operation_never_takes_the_name_of_a_module():
    net = Fn(lambda m, x: m.relu_1(F.relu(F.relu(x))), relu_1=nn.Conv2d(3, 3, 1))
    names = names_of(net, picture())
    assert len(set(names)) == len(names) == 3


def test_an_unknown_layer_is_refused_with_the_nearest_names():
    recording = learnt(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), picture())
    with pytest.raises(errors.UnknownName, match="no layer '00' in this network"):
        recording.find("00")


# What torchvision lists and is no value that descends from the picture.
BOOKKEEPING = "size getattr eq ne floordiv getitem dim _assert mul sub".split()


@pytest.mark.parametrize("arch", ["resnet18", "densenet121", "googlenet", "mobilenet_v3_small"])
def test_names_are_those_of_torchvisions_feature_extraction(arch):
    import torchvision
    from torchvision.models.feature_extraction import get_graph_node_names

    options = {"init_weights": False} if arch == "googlenet" else {}
    net = torchvision.models.get_model_builder(arch)(weights=None, **options).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # train and eval differ in GoogLeNet
        theirs = get_graph_node_names(net)[1]
    recording = learnt(net, picture(1, 3, 64, 64))
    missing = [n for n in theirs if n != "x" and n not in recording.by_name and n not in recording.aliases]
    assert [n for n in missing if n.rpartition(".")[2].split("_")[0] not in BOOKKEEPING] == []


# ---------------------------------------------------------------------------------------------------------------------
# Values equal what the model held


def hooked(module: nn.Module, x: torch.Tensor) -> tuple[Any, dict[str, list[torch.Tensor]]]:
    """What plain hooks see, copied at once (without the copy, in-place operations would change it behind them)."""
    seen: dict[str, list[torch.Tensor]] = {}

    def hook_for(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if (t := observer.first_tensor(output)) is not None:
                seen.setdefault(path, []).append(t.detach().clone())

        return hook

    handles = [m.register_forward_hook(hook_for(p)) for p, m in module.named_modules() if p]
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            return module(x.clone()), seen
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for handle in handles:
            handle.remove()


ARCHITECTURES = [
    ("torchvision", "resnet18", 48), ("torchvision", "squeezenet1_1", 48), ("torchvision", "mobilenet_v3_small", 48),
    ("torchvision", "shufflenet_v2_x0_5", 48), ("torchvision", "efficientnet_b0", 48),
    ("torchvision", "densenet121", 48), ("torchvision", "googlenet", 48), ("torchvision", "mnasnet0_5", 48),
    ("torchvision", "regnet_y_400mf", 48), ("timm", "vit_tiny_patch16_224", 224), ("timm", "convnext_atto", 48),
    ("timm", "ghostnet_050", 48), ("timm", "coat_lite_tiny", 224), ("timm", "levit_128s", 224),
]  # fmt: skip


@pytest.mark.parametrize(("family", "arch", "size"), ARCHITECTURES)
def test_every_value_a_hook_can_see_is_read_bit_for_bit(family, arch, size):
    torch.manual_seed(0)
    if family == "timm":
        net = pytest.importorskip("timm").create_model(arch, pretrained=False).eval()
    else:
        import torchvision

        options = {"init_weights": False} if arch == "googlenet" else {}
        net = torchvision.models.get_model_builder(arch)(weights=None, **options).eval()
    x = picture(1, 3, size, size)
    expected, seen = hooked(net, x)
    engine = Engine(net)
    with engine.session():
        recording = engine.recording(x)
        nodes = {p: [recording.nodes[i] for i in calls] for p, calls in recording.aliases.items()}
        passed = engine.run(x, Request(read=[n.name for calls in nodes.values() for n in calls if n.kind != "input"]))
    assert torch.equal(passed.output, expected)
    for path, values in seen.items():
        if path not in nodes:  # the k of q, k, v: the second value of one operation has no name of its own
            assert isinstance(net.get_submodule(path), nn.Identity), path
            continue
        assert len(nodes[path]) == len(values), path
        for node, value in zip(nodes[path], values, strict=True):
            if node.kind != "input":
                assert torch.equal(passed.values[node.name], value), node.name


def test_relu_in_place_behind_a_sum_does_not_change_what_was_read():
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        a = m.bn(m.c(x))
        a += x
        return m.relu(a)

    net = Fn(forward, c=nn.Conv2d(3, 3, 1), bn=nn.BatchNorm2d(3), relu=nn.ReLU(inplace=True)).eval()
    x = picture()
    kept: dict[str, torch.Tensor] = {}
    net.bn.register_forward_hook(lambda *args: kept.update(bn=args[2].detach()))  # as usual: wrong
    with torch.no_grad():
        net(x)
        bn = net.bn(net.c(x)).clone()
    values = read(net, x, "bn", "add", "relu")
    assert torch.equal(values["bn"], bn)
    assert torch.equal(values["add"], bn + x)
    assert torch.equal(values["relu"], (bn + x).relu())


def test_a_write_through_a_view_does_not_change_what_was_read():
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = m.c(x)
        top, rest = h.chunk(2, 1)
        top.mul_(2)
        h.view(-1)[0] = 5
        return F.relu(rest + top)

    net, x = Fn(forward, c=nn.Conv2d(3, 4, 1)), picture()
    with torch.no_grad():
        h = net.c(x)
    values = read(net, x, "c", "mul", "add", "chunk")
    assert torch.equal(values["c"], h)
    assert torch.equal(values["chunk"], h[:, :2])
    assert torch.equal(values["mul"], h[:, :2] * 2)
    assert values["add"].flatten()[0] == 5 + h[0, 2, 0, 0]


def test_what_reads_a_tensor_written_through_a_view_descends_from_the_write():
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = m.c(x)
        y = h[:, :1]
        y.add_(1)
        return h.relu()

    nodes = {n.name: n for n in learnt(Fn(forward, c=nn.Conv2d(3, 4, 1)), picture()).nodes}
    assert nodes["add"].index in nodes["relu"].inputs
    assert nodes["c"].index in nodes["relu"].inputs


def test_a_kept_value_overwritten_where_nobody_can_see_is_refused():
    net = Fn(lambda m, x: hidden_write(m.c(x)), c=nn.Conv2d(3, 3, 1))
    with pytest.raises(errors.Unsupported, match=r"'c' was overwritten by an operation that cannot be watched"):
        read(net, picture(), "c")


def hidden_write(h: torch.Tensor) -> torch.Tensor:
    with torch._C.DisableTorchFunction():
        h.mul_(2)
    return h + 0


def test_a_dtype_the_caller_casts_to_is_read_in_it():
    net, x = Fn(lambda m, x: m.c(x).relu(), c=nn.Conv2d(3, 3, 1)), picture()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        expected = net(x)
        values = read(net, x, "c", "relu")
    assert values["c"].dtype == torch.bfloat16
    assert torch.equal(values["relu"], expected)


# ---------------------------------------------------------------------------------------------------------------------
# Stopping early


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x + 1


def test_nothing_behind_the_last_wanted_layer_runs():
    net = nn.Sequential(Counted(), Counted(), Counted())
    engine = Engine(net)
    with engine.session():
        engine.recording(picture())
        passed = engine.run(picture(), Request(read=["1.add"], output=False))
    assert [m.calls for m in net] == [2, 2, 1]
    assert passed.output is None
    assert torch.equal(passed.values["1.add"], picture() + 1 + 1)


@pytest.mark.parametrize("catch", [Exception, BaseException])
def test_a_model_that_catches_errors_cannot_catch_the_early_stop(catch):
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        try:
            h = m.a(x)
        except catch:
            m.b.calls += 100
            h = torch.zeros_like(x)
        return m.b(h)

    net = Fn(forward, a=Counted(), b=Counted())
    engine = Engine(net)
    with engine.session():
        engine.recording(picture())
        passed = engine.run(picture(), Request(read=["a.add"], output=False))
    assert torch.equal(passed.values["a.add"], picture() + 1)
    assert passed.output is None
    if catch is Exception:
        assert net.b.calls == 1


# ---------------------------------------------------------------------------------------------------------------------
# Models that are not one straight line


def test_a_model_that_takes_another_path_is_learnt_anew():
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = m.a(x)
        return m.b(h).relu() if h.mean() > 0 else m.c(h).sigmoid().sqrt()

    net = Fn(forward, a=nn.Identity(), b=nn.Conv2d(3, 3, 1), c=nn.Conv2d(3, 3, 1))
    engine = Engine(net)
    x = picture().abs()
    with engine.session():
        for sign, name in ((1, "b"), (-1, "c"), (1, "b"), (-1, "c")):
            values = engine.run(sign * x, Request(read=[name])).values
            assert torch.equal(values[name], getattr(net, name)(sign * x))
    with engine.session(), pytest.raises(errors.UnknownName):
        engine.run(x, Request(read=["nonsense"]))


class Experts(nn.Module):
    """Both experts run the same operations; which one depends on the picture."""

    def __init__(self, kwargs: bool = False, buffers: bool = False):
        super().__init__()
        self.kwargs = kwargs
        for name in "ab":
            weight = torch.randn(3, 3, 1, 1, generator=torch.Generator().manual_seed(ord(name)))
            if buffers:
                self.register_buffer(name, weight)
            else:
                setattr(self, name, nn.Parameter(weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.a if x.mean() > 0 else self.b
        h = F.conv2d(x, weight=weight) if self.kwargs else F.conv2d(x, weight)
        return h.relu()


@pytest.mark.parametrize("options", [{}, {"kwargs": True}, {"buffers": True}])
def test_an_expert_of_the_same_operations_is_told_from_the_other(options):
    net = Experts(**options).eval()
    x = picture().abs()
    recording = observer.learn(net, x)
    taps = {recording.find("relu").index: Tap(keep=True)}
    observer.run(net, recording, [x], taps)
    with pytest.raises(observer.Diverged):
        observer.run(net, recording, [-x], taps)


def test_names_of_an_expert_are_its_own():
    experts = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(2))
    net = Fn(lambda m, x: m.experts[int(x.mean() > 0)](x), experts=experts)
    engine, x = Engine(net), picture().abs()
    with engine.session():
        assert torch.equal(engine.run(x, Request(read=["experts.1"])).values["experts.1"], experts[1](x))
        with pytest.raises(errors.UnknownName, match=r"experts\.1"):
            engine.run(-x, Request(read=["experts.1"]))
        assert torch.equal(engine.run(-x, Request(read=["experts.0"])).values["experts.0"], experts[0](-x))


def test_a_path_that_depends_on_the_batch_is_learnt_for_that_batch():
    net = Fn(lambda m, x: torch.cat([m.c(one) for one in x.split(1)]), c=nn.Conv2d(3, 2, 1))
    values = read(net, picture(3, 3, 8, 8), "c_2")
    assert torch.equal(values["c_2"], net.c(picture(3, 3, 8, 8)[2:]))


def test_a_model_that_never_does_the_same_twice_is_refused_unless_nothing_inside_is_asked_for():
    count = iter(range(1000))

    def forward(_m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        for _ in range(next(count)):
            x = x.relu()
        return x + 1

    with pytest.raises(errors.Unsupported, match="something else each time"):
        read(Fn(forward), picture(), "add")
    assert torch.equal(Engine(Fn(forward)).run(picture(), Request()).output, picture().relu() + 1)


def test_behind_the_last_layer_asked_for_the_model_may_go_where_it_likes():
    net = Fn(lambda m, x: m.a(x).relu() if x.sum() > 0 else m.a(x).sigmoid().sqrt(), a=nn.Conv2d(3, 3, 1))
    x = picture().abs()
    recording = observer.learn(net, x)
    with torch.no_grad():
        output, runner = observer.run(net, recording, [-x], {recording.find("a").index: Tap(keep=True)})
        assert torch.equal(output, net(-x))
        assert torch.equal(runner.values[recording.find("a").index], net.a(-x))


def test_a_value_kept_is_safe_from_what_an_unknown_path_writes():
    net = Fn(lambda m, x: m.a(x).relu() if x.sum() > 0 else m.a(x).mul_(0), a=nn.Conv2d(3, 3, 1))
    x = picture().abs()
    recording = observer.learn(net, x)
    with torch.no_grad():
        _, runner = observer.run(net, recording, [-x], {recording.find("a").index: Tap(keep=True)})
        assert torch.equal(runner.values[recording.find("a").index], net.a(-x))


def test_a_buffer_made_anew_in_each_run_is_no_sign_of_another_path():
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = m.a(x) + m.memory
        m.memory = h.mean().detach()
        return h.relu()

    net = Fn(forward, a=nn.Conv2d(3, 3, 1))
    net.register_buffer("memory", torch.zeros(()))
    engine = Engine(net)
    with engine.session():
        for _ in range(4):
            assert engine.run(picture(), Request(read=["a", "relu"])).values["relu"].min() >= 0


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def test_multihead_attention_is_open():
    class Block(nn.Module):
        def __init__(self, weights: bool):
            super().__init__()
            self.weights = weights
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attn(x, x, x, need_weights=self.weights)[0]

    x = picture(1, 5, 8)
    names = names_of(Block(weights=True), x)
    assert "attn.softmax" in names
    assert "attn.linear" in names
    assert "attn.scaled_dot_product_attention" in names_of(Block(weights=False), x)


def test_attention_in_eval_without_gradients_equals_the_unfused_run_exactly():
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = picture(1, 5, 8)
    expected, seen = hooked(net, x)
    engine = Engine(net)
    with engine.session(), torch.no_grad():
        passed = engine.run(x, Request(read=["self_attn", "linear1"]))
    assert torch.equal(passed.output, expected)
    assert torch.equal(passed.values["self_attn"], seen["self_attn"][0])
    assert torch.equal(passed.values["linear1"], seen["linear1"][0])
    with torch.no_grad():
        torch.testing.assert_close(passed.output, net(x), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Where nothing can be watched


def scripted(what: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and found in many a file
        return torch.jit.script(what)


def doubled(h: torch.Tensor) -> torch.Tensor:
    return (h * 2).relu()


def test_layers_behind_a_scripted_activation_are_still_layers():
    act = scripted(doubled)
    net = Fn(lambda m, x: m.d(act(m.c(x))), c=nn.Conv2d(3, 4, 1), d=nn.Conv2d(4, 2, 1)).eval()
    recording = learnt(net, picture())
    assert [n.name for n in recording.layers] == ["c", "d.opaque", "d"]
    values = read(net, picture(), "c", "d.opaque", "d")
    with torch.no_grad():
        c = net.c(picture())
        assert torch.equal(values["c"], c)
        assert torch.equal(values["d.opaque"], (c * 2).relu())
        assert torch.equal(values["d"], net(picture()))


def test_what_a_scripted_part_made_is_not_confused_with_its_neighbour_of_the_same_shape():
    act = scripted(doubled)

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = m.c(x)
        return h + act(h)

    net = Fn(forward, c=nn.Conv2d(3, 4, 1))
    values = read(net, picture(), "opaque", "add", "c")
    with torch.no_grad():
        c = net.c(picture())
    assert torch.equal(values["opaque"], (c * 2).relu())
    assert torch.equal(values["add"], c + (c * 2).relu())


def test_a_scripted_part_at_the_very_end_can_be_read():
    act = scripted(doubled)
    net = Fn(lambda m, x: act(m.c(x)), c=nn.Conv2d(3, 4, 1))
    values = read(net, picture(), "opaque")
    with torch.no_grad():
        assert torch.equal(values["opaque"], net(picture()))


def test_a_scripted_submodule_is_one_opaque_layer_that_reads_what_it_was_given():
    part = scripted(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()).eval())
    net = Fn(lambda m, x: m.d(m.part(m.c(x))), c=nn.Conv2d(3, 4, 1), part=part, d=nn.Conv2d(4, 2, 1)).eval()
    recording = learnt(net, picture())
    assert [n.kind for n in recording.layers] == ["layer", "opaque", "layer"]
    opaque = recording.layers[1]
    assert recording.find("part") is opaque
    assert [recording.nodes[i].name for i in opaque.inputs] == ["c"]
    values = read(net, picture(), "part", "d")
    with torch.no_grad():
        assert torch.equal(values["part"], part(net.c(picture())))
        assert torch.equal(values["d"], net(picture()))


def test_a_scripted_submodule_in_train_mode_is_put_back():
    part = scripted(nn.Sequential(nn.BatchNorm2d(3)).train())
    net = Fn(lambda m, x: m.part(x).relu(), part=part).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    read(net, picture(4, 3, 8, 8), "relu")
    assert part.training
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_what_functorch_made_is_opaque_and_what_follows_is_right(transform):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch._decomp.decompositions_for_jvp")

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = m.c(x)
        if transform == "vmap":
            g = torch.vmap(lambda one: one.relu() * 2)(h)
        elif transform == "grad":
            g = torch.func.grad(lambda z: (z**2).sum())(h)
        else:
            g = torch.func.jvp(torch.sin, (h,), (torch.ones_like(h),))[1]
        return m.d(g)

    net, x = Fn(forward, c=nn.Conv2d(3, 4, 1), d=nn.Conv2d(4, 2, 1)).eval(), picture()
    recording = learnt(net, x)
    assert {"c", "d"} <= {n.name for n in recording.layers}
    engine = Engine(net)
    with engine.session():
        passed = engine.run(x, Request(read=[n.name for n in recording.layers]))
    assert torch.equal(passed.output, net(x))
    assert torch.equal(passed.values["c"], net.c(x))
    assert torch.equal(passed.values["d"], net(x))
    assert not any(torch._C._functorch.is_functorch_wrapped_tensor(v) for v in passed.values.values())


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_inside_of_a_checkpoint_is_seen(reentrant):
    net = Fn(lambda m, x: checkpoint(lambda h: m.b(m.a(h)).relu(), x, use_reentrant=reentrant),
             a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 4, 1))  # fmt: skip
    values = read(net, picture(), "a", "b")
    assert torch.equal(values["a"], net.a(picture()))


def test_a_traced_graph_module_is_seen_as_the_eager_one_is():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 2, 1)))
    traced = torch.fx.symbolic_trace(net)
    assert names_of(traced, picture()) == names_of(net, picture())


def test_constants_of_the_model_are_no_layers():
    table = torch.ones(1, 3, 8, 8)

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.zeros(1, 3, 8, 8))
            self.register_buffer("table", table.clone())
            self.plain = table.clone()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + (self.position * 2 + self.table.relu() + self.plain.sigmoid())

    assert names_of(Positions(), picture()) == ["add"]


# ---------------------------------------------------------------------------------------------------------------------
# More than one observer, more than one thread


def test_nested_observers_see_the_same():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 2, 1)))
    inner: list[observer.Recording] = []

    def watched(m: nn.Module, x: torch.Tensor) -> Any:
        inner.append(observer.learn(m, x, call=lambda m, y: m(y)))
        return m(x)

    alone = [n.name for n in observer.learn(net, picture()).nodes]
    outer = observer.learn(net, picture(), call=watched)
    assert [n.name for n in inner[0].nodes] == alone
    clean = [n.name for n in outer.nodes if n.path or n.kind == "layer"]
    assert [n for n in clean if not n.endswith("_1")] == [n for n in alone if n != "input"]


def test_a_run_inside_a_run_reads_the_same():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True))
    x = picture()
    recording = observer.learn(net, x)
    index = recording.find("0").index
    found: list[torch.Tensor] = []

    def watched(m: nn.Module, y: torch.Tensor) -> Any:
        output, runner = observer.run(m, recording, [y], {index: Tap(keep=True)})
        found.append(runner.values[index])
        return output

    with torch.no_grad():
        _, runner = observer.run(net, recording, [x], {index: Tap(keep=True)}, call=watched)
        assert torch.equal(found[0], net[0](x))
        assert torch.equal(runner.values[index], net[0](x))


def test_two_threads_on_one_model_each_read_their_own():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1)).train()
    reference = copy.deepcopy(net).eval()
    wrong: list[str] = []

    def work(seed: int) -> None:
        try:
            x = picture(2, 3, 8, 8, seed=seed)
            for _ in range(10):
                values = read(net, x, "0", "1", "3")
                with torch.no_grad():
                    good = torch.equal(values["1"], reference[:2](x)) and torch.equal(values["3"], reference(x))
                if not good or set(values) != {"0", "1", "3"}:
                    wrong.append(f"thread {seed}")
        except BaseException as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(s,)) for s in (1, 2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []
    assert all(m.training for m in net.modules())
    assert not nn_module._global_forward_hooks
    assert not nn_module._global_forward_pre_hooks


def test_a_hook_of_the_user_that_changes_the_output_is_seen_as_what_it_does():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    net[0].register_forward_hook(lambda *args: args[2] * 2)
    values = read(net, picture(), "0", "mul", "1")
    with torch.no_grad():
        assert torch.equal(values["mul"], net[0](picture()))
        assert torch.equal(values["0"] * 2, values["mul"])
        assert torch.equal(values["1"], net(picture()))


# ---------------------------------------------------------------------------------------------------------------------
# Other formats' interpreters


def test_an_interpreter_names_its_operations():
    class Interpreter(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = observer.call_as("first/conv", F.relu, x)
            h = observer.call_as("second", F.pad, h, (1, 1), leaf=False)
            return observer.call_as("sum", torch.add, h, 1)

    recording = learnt(Interpreter(), picture())
    assert [n.name for n in recording.layers] == ["first/conv", "second.pad", "sum"]
    assert recording.find("second").name == "second.pad"
