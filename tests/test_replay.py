"""Replay: running only what follows a layer gives what the whole network gives, channel by channel."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from innersight.observe import observer
from innersight.observe.passes import Engine, Request
from innersight.observe.replay import Replay, zeroed_at


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


def conv(i: int, o: int, k: int = 1, **options: Any) -> nn.Conv2d:
    torch.manual_seed(i * 31 + o)
    return nn.Conv2d(i, o, k, **options)


def one_by_one(engine: Engine, x: torch.Tensor, values: list[torch.Tensor], layer: str) -> list[Any]:
    """The oracle: the whole network for each value alone."""
    return [engine.run(x, Request(change={layer: lambda _, v=v: v.clone()})).output for v in values]


def compare(module: nn.Module, x: torch.Tensor, layer: str, axis: int = 1, tolerance: float = 1e-5,
            channels: int = 5, **options: Any) -> Replay:  # fmt: skip
    """Remove channels of `layer` by replay and by whole runs; the same must come out. Returns the replay."""
    engine = Engine(module.eval(), **options)
    with engine.session():
        replay = Replay(engine, x, layer)
        count = min(channels, replay.value.shape[axis])
        batch = replay.without(range(count), axis)
        each = list(batch.split(replay.value.shape[replay.batch_dim], replay.batch_dim))
        found = replay.run(batch)
        again = replay.run(batch)
        expected = one_by_one(engine, x, each, layer)
        clean = next(observer.tensors_in(engine.run(x, Request()).output))
    assert len(each) == count
    for index, output in enumerate(expected):
        for got, repeated, want in zip(*(observer.tensors_in(o) for o in (found, again, output)), strict=True):
            assert torch.equal(got, repeated)
            scale = float(want.float().abs().max()) or 1.0
            rows = want.shape[0]
            difference = (got[index * rows : (index + 1) * rows] - want).abs().max()
            assert float(difference) <= tolerance * scale, (layer, index)
    assert any(not torch.equal(clean, next(observer.tensors_in(o))) for o in expected), "removal changes nothing"
    return replay


@pytest.mark.parametrize("read_behind", [False, True])
def test_a_known_value_spares_the_run_where_nothing_else_is_read(monkeypatch, read_behind):
    """`read_behind`: a shortcut around the layer is read as well, so the image has to be run for it."""
    first, second, head = conv(3, 4), conv(4, 4), nn.Linear(4, 5)

    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(net.first(x))
        g = net.second(h)
        return net.head((g + h if read_behind else torch.relu(g)).mean((2, 3)))

    engine = Engine(Fn(forward, first=first, second=second, head=head).eval())
    runs = []
    own = Replay._clean_run
    monkeypatch.setattr(Replay, "_clean_run", lambda self, x: runs.append(x) or own(self, x))
    with engine.session():
        for seed in (1, 2, 3):
            x = picture(seed=seed)
            value = engine.run(x, Request(read=["second"])).values["second"]
            replay = Replay(engine, x, "second", value)
            batch = replay.without(range(4), 1)
            expected = torch.cat(one_by_one(engine, x, list(batch.split(1)), "second"))
            assert torch.allclose(replay.run(batch), expected, atol=1e-6)
    assert len(runs) == (3 if read_behind else 1)


def pooled(net: Any, x: torch.Tensor) -> torch.Tensor:
    return net.head(F.adaptive_avg_pool2d(F.max_pool2d(torch.relu(net.first(x)), 2), 1).flatten(1))


def averaged(net: Any, x: torch.Tensor) -> torch.Tensor:
    return net.head(net.first(x).mean((2, 3)))


def over_channels(net: Any, x: torch.Tensor) -> torch.Tensor:
    return net.head(net.first(x).mean((1, 2))[:, :4])


def read_twice(net: Any, x: torch.Tensor) -> torch.Tensor:
    h = net.first(x)
    return net.head(F.adaptive_avg_pool2d(torch.relu(h), 1).flatten(1) + h.mean((2, 3)))


def shifted(net: Any, x: torch.Tensor) -> torch.Tensor:
    return net.head(F.adaptive_avg_pool2d(torch.sigmoid(net.first(x)), 1).flatten(1))


@pytest.mark.parametrize(
    ("forward", "where"),
    [(pooled, "adaptive_avg_pool2d"), (averaged, "mean"), (over_channels, "first"), (read_twice, "first"),
     (shifted, "first")],
)  # fmt: skip
def test_channels_are_taken_away_where_least_is_left_to_run(forward, where):
    engine, x = Engine(Fn(forward, first=conv(3, 4), head=nn.Linear(4, 5)).eval()), picture()
    with engine.session():
        assert zeroed_at(engine.recording(x), "first", 1) == where
        early, late = Replay(engine, x, "first"), Replay(engine, x, where)
        expected = torch.cat(one_by_one(engine, x, list(early.without(range(4), 1).split(1)), "first"))
        assert torch.allclose(late.run(late.without(range(4), 1)), expected, atol=1e-6)


def torchvision_model(name: str, **options: Any) -> nn.Module:
    import torchvision

    torch.manual_seed(0)
    net = torchvision.models.get_model_builder(name)(weights=None, **options).eval()
    for m in net.modules():  # untrained nets answer nearly nothing: scales that let a difference show
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.8, 1.6)
            nn.init.uniform_(m.bias, -0.2, 0.5)
    return net


@pytest.mark.parametrize(
    ("name", "layer", "size", "options"),
    [
        ("resnet18", "layer2.0.conv1", 64, {}),
        ("resnet18", "layer3.1.add", 64, {}),
        ("resnet18", "layer1.0.bn2", 64, {}),
        ("mobilenet_v3_small", "features.4.block.1.1", 64, {}),
        ("mobilenet_v3_small", "features.9.block.2.scale_activation", 64, {}),
        ("densenet121", "features.denseblock3.denselayer2.conv2", 64, {}),
        ("googlenet", "inception4a.branch2.1.conv", 64, {"init_weights": False}),
        ("shufflenet_v2_x0_5", "stage3.1.branch2.0", 64, {}),
        ("squeezenet1_1", "features.6.cat", 64, {}),
        ("efficientnet_b0", "features.3.0.block.2.fc1", 64, {}),
        ("mnasnet0_5", "layers.9", 64, {}),
        ("regnet_y_400mf", "trunk_output.block2.block2-0.f.b", 64, {}),
        ("convnext_tiny", "features.5.2.block.0", 64, {}),
    ],
)
def test_removing_channels_equals_whole_runs(name, layer, size, options):
    assert compare(torchvision_model(name, **options), picture(1, 3, size, size), layer).skips


@pytest.mark.parametrize("layer", ["features.3.1.attn.linear_1", "features.5.2.attn.linear", "features.3.0.norm1"])
def test_windows_that_share_a_dimension_with_the_batch(layer):
    from torchvision.models.swin_transformer import SwinTransformer

    torch.manual_seed(0)
    net = SwinTransformer(patch_size=[4, 4], embed_dim=12, depths=[1, 2, 1], num_heads=[1, 2, 2], window_size=[4, 4],
                          num_classes=7)  # fmt: skip
    net.head.weight.data.mul_(50)
    for number, replacement in (("3.1", "3.1"), ("5.2", "5.0")):
        layer = layer.replace(number, replacement)
    replay = compare(net, picture(1, 3, 64, 64), layer, axis=-1)
    assert replay.skips


@pytest.mark.parametrize("layer", ["blocks.0.norm1", "blocks.1.attn.qkv", "blocks.1.add", "patch_embed.proj"])
def test_tokens(layer):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=3, num_classes=5)
    assert compare(net, picture(1, 3, 48, 48), layer, axis=1 if "proj" in layer else -1).skips


def test_tokens_with_the_batch_in_the_second_place():
    torch.manual_seed(0)
    attn = nn.MultiheadAttention(8, 2)

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = m.a(x).flatten(2).permute(2, 0, 1)  # (HW, N, C)
        h = m.norm(h)
        return m.head((h + m.attn(h, h, h)[0]).mean(0))

    net = Fn(forward, a=conv(3, 8), norm=nn.LayerNorm(8), attn=attn, head=nn.Linear(8, 3))
    for layer in ("a", "norm", "attn.linear", "add"):
        replay = compare(net, picture(1, 3, 4, 4), layer, axis=1 if layer == "a" else 2)
        assert replay.skips
        assert replay.batch_dim == (0 if layer == "a" else 1)


def test_a_dimension_merged_with_the_batch_in_the_other_order_is_not_trusted():
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[0]
        gate = m.g(x).permute(2, 3, 0, 1).reshape(-1, 4)  # (H W N, C): the batch varies fastest
        h = m.a(x).permute(2, 3, 0, 1).reshape(-1, 4)
        return m.head((gate * h).reshape(8, 8, n, 4).mean((0, 1)))

    net = Fn(forward, a=conv(3, 4), g=conv(3, 4, 3, padding=1), head=nn.Linear(4, 3))
    for layer in ("a", "g"):
        compare(net, picture(), layer)


# ---------------------------------------------------------------------------------------------------------------------
# In place


def residual(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    h = F.relu(m.a(x), inplace=True)
    b = m.b(h)
    b += h
    F.relu(b, inplace=True)  # what it returns is ignored
    return m.head(b).mean((2, 3))


def part_of_a_prefix(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    h = m.a(x)
    h[:, :1].mul_(2)
    return m.head(m.b(x) * h).mean((2, 3))


def part_behind_the_layer(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    h, g = m.a(x), m.b(x)
    g[:, 1:3] += h[:, :2]
    return m.head(g * h).mean((2, 3))


def canvas(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    h, g = m.a(x), m.b(x)
    board = x.new_zeros(x.shape[0], 4, *x.shape[2:])
    board[:, :2] = h[:, :2]
    board[:, 2:] = g[:, 2:]
    return m.head(board).mean((2, 3))


def view_before_the_write(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    h = m.a(x)
    top = h[:, :2]
    h.add_(m.b(x))
    return m.head(torch.cat([top, h[:, 2:]], 1)).mean((2, 3))


def chunks_in_place(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    top, rest = m.a(x).chunk(2, 1)
    top.mul_(2)
    rest.sigmoid_()
    g = m.b(x)
    return m.head(torch.cat([top * g[:, :2], rest], 1)).mean((2, 3))


def reshaped_in_place(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    h = m.a(x)
    s = h.mean((2, 3))
    s.unsqueeze_(-1).unsqueeze_(-1)
    return m.head(m.b(x) * s).mean((2, 3))


def into_the_models_buffer(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    h = m.a(x)
    m.memory[:] = h.mean((0, 2, 3))
    return m.head(m.b(x) * m.memory[None, :, None, None]).mean((2, 3))


@pytest.mark.parametrize("layer", ["a", "b"])
@pytest.mark.parametrize(
    "forward",
    [residual, part_of_a_prefix, part_behind_the_layer, canvas, view_before_the_write, chunks_in_place,
     reshaped_in_place, into_the_models_buffer],
)  # fmt: skip
def test_in_place_operations_before_at_and_behind_the_layer(forward, layer):
    net = Fn(forward, a=conv(3, 4), b=conv(4 if forward is residual else 3, 4), head=conv(4, 3))
    net.register_buffer("memory", torch.full((4,), 7.0))
    compare(net, picture(), layer)
    assert torch.equal(net.memory, torch.full((4,), 7.0))


@pytest.mark.parametrize("layer", ["mul", "add", "relu", "relu_1"])
def test_the_layer_itself_works_in_place(layer):
    if layer == "mul":
        compare(Fn(part_of_a_prefix, a=conv(3, 4), b=conv(3, 4), head=conv(4, 3)), picture(), "mul", channels=1)
    else:
        compare(Fn(residual, a=conv(3, 4), b=conv(4, 4), head=conv(4, 3)), picture(), layer)


# ---------------------------------------------------------------------------------------------------------------------
# Models with ways of their own


def test_a_number_read_before_the_layer_is_the_right_one():
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = m.a(x)
        return m.head(m.b(x) * h.abs().mean().item()).mean((2, 3))

    net = Fn(forward, a=conv(3, 4), b=conv(3, 4), head=conv(4, 3))
    assert compare(net, picture(), "b").skips


def test_a_number_read_behind_the_layer_is_each_images_own():
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = m.a(x)
        return m.head(m.b(x) * h.abs().mean().item()).mean((2, 3))

    assert not compare(Fn(forward, a=conv(3, 4), b=conv(3, 4), head=conv(4, 3)), picture(), "a").skips


def test_a_path_that_depends_on_the_changed_value_is_followed():
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = m.a(x)
        return m.head(h).mean((2, 3)) if h[:, 2].abs().sum() > 0 else m.other(h.relu()).amax((2, 3))

    compare(Fn(forward, a=conv(3, 4), head=conv(4, 3), other=conv(4, 3)), picture(), "a")


def test_a_recording_of_another_image_is_not_trusted_where_the_path_depends_on_the_image():
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:  # both ways have the same operations
        first, second = m.a(x), m.b(x)
        gate = first if x.sum() > 0 else second
        return m.head(gate.relu() * 2).mean((2, 3))

    net = Fn(forward, a=conv(3, 4), b=conv(3, 4), head=conv(4, 3)).eval()
    x = picture().abs()
    engine = Engine(net)
    with engine.session():
        engine.recording(x)
        replay = Replay(engine, -x, "b")
        batch = replay.without(range(4), 1)
        expected = one_by_one(engine, -x, list(batch.split(1)), "b")
        torch.testing.assert_close(replay.run(batch), torch.cat(expected))


@pytest.mark.parametrize("layer", ["a", "b"])
def test_a_path_that_depends_on_the_size_of_the_batch(layer):
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = m.a(x)
        h = m.b(h) if x.shape[0] == 1 else m.b(h).relu()
        return m.head(h).mean((2, 3))

    replay = compare(Fn(forward, a=conv(3, 4), b=conv(4, 4), head=conv(4, 3)), picture(), layer)
    assert not replay.together


@pytest.mark.parametrize("mix", ["mean", "batch norm", "attention"])
def test_a_model_that_mixes_the_images_of_a_batch_sees_one_at_a_time(mix):
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = m.a(x)
        if mix == "mean":
            h = h - h.mean((0, 2, 3), keepdim=True)
        elif mix == "batch norm":
            h = F.batch_norm(h, None, None, training=True)
        else:  # (N, N): every image looks at every other
            h = ((h.flatten(1) @ h.flatten(1).T).softmax(1) @ h.flatten(1)).view_as(h)
        return m.head(h.relu()).mean((2, 3))

    replay = compare(Fn(forward, a=conv(3, 4), head=conv(4, 3)), picture(), "a")
    assert not replay.together


def test_a_model_that_takes_one_image_only():
    net = Fn(lambda m, x: m.head(m.a(x).view(1, 4, 8, 8).relu()).mean((2, 3)), a=conv(3, 4), head=conv(4, 3))
    assert not compare(net, picture(), "a").together


def test_a_network_of_one_batch_size():
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[0] == 2
        return m.head(m.a(x).relu()).mean((2, 3))

    net = Fn(forward, a=conv(3, 5), head=conv(5, 3)).eval()
    engine = Engine(net, fixed_batch=2)
    x = picture()
    with engine.session():
        replay = Replay(engine, x, "a")
        found = replay.run(replay.without(range(5), 1))
    with torch.no_grad():
        a = net.a(x)
        for channel in range(5):
            without = a.clone()
            without[:, channel] = 0
            expected = net.head(without.relu()).mean((2, 3))
            torch.testing.assert_close(found[channel], expected[0])
    assert not replay.skips


def test_addresses_within_the_batch_are_not_repeated():
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        mask = m.a(x) > 0
        h = m.b(x)
        n, *where = mask.nonzero(as_tuple=True)
        out = torch.zeros(x.shape[0], 4)
        out.index_put_((n, where[0]), h[mask], accumulate=True)
        return m.head(out[:, :, None, None])[..., 0, 0]

    net = Fn(forward, a=conv(3, 4), b=conv(3, 4), head=conv(4, 3))
    for layer in ("a", "b"):
        compare(net, picture(), layer)


def test_scripted_parts_mean_whole_runs():
    def vector(h: torch.Tensor) -> torch.Tensor:
        return h.mean(dim=[1, 2, 3])  # one number an image: nothing that looks like a layer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fn = torch.jit.script(vector)
    net = Fn(lambda m, x: m.head(m.b(x) * fn(m.a(x))[:, None, None, None]).mean((2, 3)), a=conv(3, 4), b=conv(3, 4),
             head=conv(4, 3))  # fmt: skip
    for layer in ("a", "b"):
        assert not compare(net, picture(), layer).skips


def test_numbers_that_left_torch_and_came_back_mean_whole_runs():
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        gate = torch.from_numpy(m.a(x).detach().numpy().mean((2, 3)))
        return m.head(m.b(x) * gate[:, :, None, None]).mean((2, 3))

    net = Fn(forward, a=conv(3, 4), b=conv(3, 4), head=conv(4, 3))
    for layer in ("a", "b"):
        assert not compare(net, picture(), layer).skips


def test_random_layers_before_the_layer_stay_as_they_fell():
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return m.head(m.b(F.dropout(m.a(x), 0.5, training=True))).mean((2, 3))

    compare(Fn(forward, a=conv(3, 4), b=conv(4, 4), head=conv(4, 3)), picture(), "b")


class Answer(NamedTuple):
    logits: torch.Tensor
    extra: list[torch.Tensor]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("kind", [dict, tuple, list, Answer])
def test_outputs_of_any_make_come_back_as_a_batch(kind, together):
    def forward(m: nn.Module, x: torch.Tensor) -> Any:
        h = m.a(x)
        if not together:
            h = h * (h - h.mean(0)).abs().mean().add(1).item()
        logits = m.head(h).mean((2, 3))
        if kind is dict:
            return {"logits": logits, "extra": [x, h]}
        return Answer(logits, [x, h]) if kind is Answer else kind((logits, [x, h]))

    net = Fn(forward, a=conv(3, 4), head=conv(4, 3)).eval()
    engine = Engine(net)
    with engine.session():
        replay = Replay(engine, picture(), "a")
        output = replay.run(replay.without(range(4), 1))
    assert type(output) is kind
    assert [t.shape[0] for t in observer.tensors_in(output)] == [4, 4, 4]
    assert replay.together is together


def test_detections_come_back_as_a_list():
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = conv(3, 4), conv(4, 1)

        def forward(self, x: torch.Tensor) -> list[dict[str, torch.Tensor]]:
            heat = self.head(self.a(x))[:, 0]
            out = []
            for one in heat:
                where = (one > one.mean()).nonzero()
                out.append({"boxes": torch.cat([where, where + 1], 1).float(), "scores": one[one > one.mean()]})
            return out

    engine = Engine(Detector().eval())
    with engine.session():
        replay = Replay(engine, picture(), "a")
        batch = replay.without(range(4), 1)
        found = replay.run(batch)
        expected = [o for one in one_by_one(engine, picture(), list(batch.split(1)), "a") for o in one]
    assert len(found) == 4
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a["boxes"], b["boxes"])
        torch.testing.assert_close(a["scores"], b["scores"])


def test_what_precedes_the_layer_does_not_run_again():
    net = Fn(lambda m, x: m.head(m.b(m.a(x))).mean((2, 3)), a=conv(3, 4), b=conv(4, 4), head=conv(4, 3)).eval()
    engine = Engine(net)
    with engine.session():
        replay = Replay(engine, picture(), "b")
        ran = []

        class Count(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                ran.append(func.overloadpacket.__name__)
                return func(*args, **(kwargs or {}))

        batch = replay.without(range(4), 1)
        with Count():
            replay.run(batch)
    assert ran.count("convolution") == 1
    assert replay.image_bytes() < sum(p.numel() for p in net.parameters()) * 4 + 4 * 8 * 8 * 4 * 20


@pytest.mark.parametrize("layer", ["attn.linear", "attn.linear_1", "attn.scaled_dot_product_attention", "a"])
def test_attention_that_merges_tokens_and_batch_with_the_batch_running_fastest(layer):
    torch.manual_seed(0)

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = m.a(x).flatten(2).transpose(1, 2)
        return m.head(m.attn(h, h, h, need_weights=False)[0].amax(1))

    net = Fn(forward, a=conv(3, 8), attn=nn.MultiheadAttention(8, 2, batch_first=True), head=nn.Linear(8, 3))
    assert compare(net, picture(1, 3, 4, 4), layer, axis=1 if layer == "a" else -1).skips


@pytest.mark.parametrize("layer", ["a", "b"])
def test_data_that_is_set_is_a_write(layer):
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = m.a(x)
        y = h.clone()
        y.data = h.data * 2
        return m.head(y * m.b(x)).mean((2, 3))

    compare(Fn(forward, a=conv(3, 4), b=conv(3, 4), head=conv(4, 3)), picture(), layer)


def test_a_layer_with_the_batch_elsewhere_in_a_network_that_cannot_be_skipped_through():
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        gate = torch.from_numpy(m.a(x).detach().numpy().mean((1, 2, 3)))
        h = m.norm(m.a(x).flatten(2).permute(2, 0, 1))  # (HW, N, C)
        return m.head(h.amax(0) * gate[:, None])

    net = Fn(forward, a=conv(3, 8), norm=nn.LayerNorm(8), head=nn.Linear(8, 3))
    assert not compare(net, picture(1, 3, 4, 4), "norm", axis=2).together
