"""Attention under the observer, against hooks and what models return themselves; its methods, against the papers."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import innersight
from innersight import errors
from innersight.methods import Look, find
from innersight.observe import attention, geometry, observer
from innersight.observe.attention import AttentionMap, TokenGrid, matrices, token_grid
from innersight.observe.passes import INPUT, Engine, Request
from innersight.testing import Residual, check_method, check_network, close, left_as_found, small_network

METHODS = ["attention_rollout", "attention_last", "attention_relevance", "attention_gradient"]


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sharp(module):
    """The same weights each time, so large that the attention is far from even."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in module.named_parameters():
            scale = 1.5 / p[0].numel() ** 0.5 if p.dim() > 1 else 0.1 if name.endswith("bias") else 0.0
            p.copy_(torch.randn(p.shape, generator=generator) * scale + (not scale))
    return module.eval()


def timm_vit(kind="vit", fused=True, **options):
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    small = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}
    made = (VisionTransformerDistilled if kind == "distilled" else VisionTransformer)(**(small | options))
    for module in made.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    return sharp(made)


VITS = {
    "class token": {},
    "registers": {"reg_tokens": 3},
    "mean of the patches": {"class_token": False, "global_pool": "avg"},
    "mean of the patches beside registers": {"class_token": False, "reg_tokens": 2, "global_pool": "avg"},
    "distilled": {"kind": "distilled"},
    "attention pooling": {"class_token": False, "global_pool": "map"},
}
# Which rows a score reads, and which columns are the picture, by hand: what the tests compare with.
ROWS = {
    "class token": [0],
    "registers": [0],
    "mean of the patches": range(16),
    "mean of the patches beside registers": range(2, 18),
    "distilled": [0, 1],
}
FIRST = {"class token": 1, "registers": 4, "mean of the patches": 0, "mean of the patches beside registers": 2,
         "distilled": 2}  # fmt: skip


def hf(impl, kind="ViT", **options):
    import transformers

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
             "image_size": 32, "patch_size": 8, "num_labels": 5}  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**(small | options))
    return sharp(getattr(transformers, f"{kind}ForImageClassification")._from_config(config, attn_implementation=impl))


def hooked(module, x, target):
    """(weights, gradients) of timm's unfused attention, by hooks on the dropout behind its softmax."""
    kept = []
    handles = [
        m.register_forward_hook(lambda _m, _i, out: (out.retain_grad(), kept.append(out))[0])
        for name, m in module.named_modules()
        if name.endswith("attn_drop")
    ]
    try:
        module(x)[:, target].sum().backward()
    finally:
        for handle in handles:
            handle.remove()
        module.zero_grad()
    return [a.detach() for a in kept], [a.grad for a in kept]


def read(module, x, how="gradient", target=1, **options):
    engine = Engine(module, **options)
    with engine.session():
        return engine.run(x, Request(attention=how, score=lambda out: out[:, target]))


def network(module, shape=(3, 32, 32)):
    return innersight.open(module, input_shape=shape)


# -- Opened attention is attention


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3},
        {"is_causal": True},
        {"attn_mask": noise(5, 7, seed=4)},
        {"attn_mask": noise(5, 7, seed=4) > 0},
        {"attn_mask": torch.arange(5)[:, None].expand(5, 7) > 0},  # a row that may look nowhere
        {"enable_gqa": True},
    ],
    ids=["plain", "scale", "causal", "float mask", "bool mask", "a row of no keys", "grouped queries"],
)
def test_opened_attention_equals_the_fused_with_its_gradients(options):
    heads = 2 if "enable_gqa" in options else 4
    given = [noise(3, h, t, 8, seed=s) for s, (h, t) in enumerate([(4, 5), (heads, 7), (heads, 7)])]
    results = []
    for attend in (F.scaled_dot_product_attention, observer.attend):
        own = [t.clone().requires_grad_() for t in given]
        out = attend(*own, **options)
        results.append([out, *torch.autograd.grad((out * noise(*out.shape, seed=9)).sum(), own)])
    for fused, opened in zip(*results, strict=True):
        assert close(opened.detach(), fused.detach(), 1e-5)


def test_opened_attention_drops_out_as_the_fused_does():
    q = noise(1, 1, 6, 4)
    torch.manual_seed(0)
    out = observer.attend(q, q, torch.ones(1, 1, 6, 4), dropout_p=0.5)
    assert (out[..., :1] == out).all()
    assert not torch.allclose(out, torch.ones_like(out))


@pytest.mark.parametrize("kind", VITS)
def test_a_network_with_opened_attention_answers_as_before(kind):
    module = timm_vit(**VITS[kind])
    x = noise(2, 3, 32, 32)
    with torch.no_grad():
        assert close(read(module, x, "value").output, module(x), 1e-5)


def test_other_layers_keep_their_names_where_attention_is_opened():
    module = timm_vit()
    x = noise(1, 3, 32, 32)
    with torch.no_grad():
        closed, opened = observer.learn(module, x), observer.learn(module, x, opened=True)
    names = [n.name for n in opened.nodes if ".scaled_dot_product_attention." not in n.name]
    assert names == [n.name for n in closed.nodes]
    assert len(opened.nodes) > len(closed.nodes)
    assert opened.find("blocks.1.attn").name == closed.find("blocks.1.attn").name
    shapes = {n.name: n.shape for n in closed.nodes}
    assert all(shapes[n.name] == n.shape for n in opened.nodes if n.name in shapes)


# -- What a pass brings back


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("kind", ["class token", "registers", "mean of the patches", "distilled"])
def test_attention_and_its_gradients_are_those_that_hooks_read(kind, fused):
    x = noise(3, 3, 32, 32)
    weights, gradients = hooked(timm_vit(**VITS[kind], fused=False), x, target=1)
    found = read(timm_vit(**VITS[kind], fused=fused), x).attention
    assert len(found) == len(weights) == 3
    for m, a, g in zip(found, weights, gradients, strict=True):
        assert m.value.shape == a.shape == (3, 2, a.shape[-1], a.shape[-1])
        assert float((m.value - a).abs().max()) < 1e-6
        assert g.abs().max() > 1e-3
        assert float((m.gradient - g).abs().max()) < 1e-6 * max(1.0, float(g.abs().max()))


def test_each_matrix_has_the_name_of_the_layer_that_makes_it():
    x = noise(1, 3, 32, 32)
    fused, unfused = timm_vit(), timm_vit(fused=False)
    names = [m.name for m in read(fused, x, "value").attention]
    assert names == [f"blocks.{i}.attn.scaled_dot_product_attention" for i in range(3)]
    assert all(name in network(fused).layers for name in names)
    assert [m.name for m in read(unfused, x, "value").attention] == [f"blocks.{i}.attn.softmax" for i in range(3)]


class Twice(nn.Module):
    """The same attention module, called twice."""

    def __init__(self, weights=False):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=not weights)
        self.head = nn.Linear(8, 4)
        self.weights = weights

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x.transpose(0, 1) if self.weights else x  # tokens first, images second
        returned = []
        for _ in range(2):
            y, w = self.attn(x, x, x, need_weights=self.weights, average_attn_weights=False)
            returned.append(w)
            x = x + y
        self.returned = returned
        return self.head(x.mean(0 if self.weights else 1))


@pytest.mark.parametrize("weights", [True, False], ids=["images and heads in one dimension", "fused"])
def test_multihead_attention_is_read_as_it_returns_its_weights(weights):
    x = noise(3, 3, 16, 16)
    told = sharp(Twice(weights=True))
    with torch.no_grad():
        told(x)
    module = sharp(Twice(weights=weights))
    found = read(module, x).attention
    assert [m.name for m in found] == (
        ["attn.softmax", "attn.softmax_1"] if weights
        else ["attn.scaled_dot_product_attention", "attn.scaled_dot_product_attention_1"]
    )  # fmt: skip
    for m, w in zip(found, told.returned, strict=True):
        assert m.value.shape == m.gradient.shape == (3, 2, 16, 16)
        assert close(m.value, w, 1e-5)


@pytest.mark.parametrize("impl", ["eager", "sdpa"])
def test_transformers_attention_is_what_it_returns_itself(impl):
    x = noise(2, 3, 32, 32)
    with torch.no_grad():
        own = hf("eager")(x, output_attentions=True).attentions
    engine = Engine(hf(impl))
    with engine.session():
        found = engine.run(x, Request(attention="gradient", score=lambda out: out.logits[:, 1])).attention
    assert len(found) == len(own) == 2
    for m, a in zip(found, own, strict=True):
        assert close(m.value, a, 1e-6 if impl == "eager" else 1e-5)
        assert m.gradient.abs().max() > 0


def test_gradients_are_those_of_finite_differences():
    module = timm_vit().double()
    x = noise(1, 3, 32, 32).double()
    engine = Engine(module)
    with engine.session():
        m = engine.run(x, Request(attention="gradient", score=lambda out: out[:, 3])).attention[0]
        name = "blocks.0.attn.scaled_dot_product_attention.softmax"
        bend = noise(*m.value.shape, seed=3).double()
        up, down = (
            engine.run(x, Request(attention="value", change={name: lambda a, s=s: a + s * bend})).output[0, 3]
            for s in (1e-5, -1e-5)
        )
    assert float((up - down) / 2e-5) == pytest.approx(float((m.gradient * bend).sum()), rel=1e-6)


def test_a_pass_brings_back_what_was_asked_for_and_no_more():
    module, x = timm_vit(), noise(2, 3, 32, 32)
    engine = Engine(module)
    score = {"score": lambda out: out[:, 0]}
    with engine.session():
        value = engine.run(x, Request(attention="value", **score))
        assert value.scores is None
        assert [m.gradient for m in value.attention] == [None] * 3
        last = engine.run(x, Request(attention="last", **score))
        assert [m.gradient is None for m in last.attention] == [True, True, False]
        every = engine.run(x, Request(attention="gradient", read=["blocks.1"], gradients=[INPUT, "blocks.0"], **score))
        plain = engine.run(x, Request(read=["blocks.1"], gradients=[INPUT, "blocks.0"], **score))
        short = engine.run(x, Request(attention="value", output=False))
        assert engine.run(x, Request()).attention == []
    assert set(every.values) == {"blocks.1"}
    assert set(every.gradients) == {INPUT, "blocks.0"}
    assert close(every.values["blocks.1"], plain.values["blocks.1"])
    assert all(close(every.gradients[g], plain.gradients[g]) for g in (INPUT, "blocks.0"))
    assert torch.equal(every.attention[2].gradient, last.attention[2].gradient)
    assert short.output is None
    assert torch.equal(short.attention[2].value, value.attention[2].value)


def test_a_layer_of_the_attention_may_be_asked_for_by_name_as_well():
    name = "blocks.2.attn.scaled_dot_product_attention.softmax"
    engine = Engine(timm_vit())
    with engine.session():
        passed = engine.run(noise(2, 3, 32, 32), Request(attention="value", read=[name]))
    assert torch.equal(passed.values[name], passed.attention[2].value)


def test_attention_costs_one_forward_and_leaves_the_model_as_found():
    module, x = timm_vit(), noise(2, 3, 32, 32)
    engine, count = Engine(module), []
    request = Request(attention="gradient", score=lambda out: out[:, 0])
    with left_as_found(module):
        with engine.session():
            engine.run(x, request)
        handle = module.norm.register_forward_hook(lambda *_: count.append(1))
        try:
            with engine.session():
                passed = engine.run(x, request)
        finally:
            handle.remove()
    assert len(count) == 1
    assert not any(t.requires_grad for m in passed.attention for t in (m.value, m.gradient))
    assert all(p.grad is None for p in module.parameters())


def test_a_batch_of_one_size_only_brings_back_the_images_that_were_given():
    x = noise(2, 3, 32, 32)
    for module in (timm_vit(), sharp(Twice(weights=True))):
        plain = read(module, x).attention
        filled = read(module, x, fixed_batch=5).attention
        for a, b in zip(plain, filled, strict=True):
            assert a.value.shape == b.value.shape
            assert close(b.value, a.value)
            assert close(b.gradient, a.gradient)


def test_what_is_read_is_not_changed_by_writes_behind_it():
    class Overwrites(Twice):
        def forward(self, x):
            x = self.embed(x).flatten(2).transpose(1, 2)
            a = torch.softmax(x @ x.transpose(1, 2), -1)
            y = a @ x
            a.zero_()
            return self.head((x + y).mean(1))

    module, x = sharp(Overwrites()), noise(2, 3, 16, 16)
    engine = Engine(module)
    with engine.session():
        (m,) = engine.run(x, Request(attention="value")).attention
    assert m.value.shape == (2, 1, 16, 16)
    assert torch.allclose(m.value.sum(-1), torch.ones(2, 1, 16))


def test_learning_inside_learning_opens_attention_for_the_inner_one_alone():
    module, x = timm_vit(), noise(1, 3, 32, 32)

    class Around(nn.Module):
        def forward(self, x):
            self.inner = observer.learn(module, x, opened=True)
            return x * 2

    around = Around()
    observer.learn(around, x)
    assert len(matrices(around.inner)) == 3


# -- Which tokens are the picture


def grid_of(module, size=(32, 32), name="the network"):
    with torch.no_grad():
        recording = observer.learn(module.eval(), noise(1, 3, *size), opened=True)
    return token_grid(recording, geometry.trace(recording), "attention_rollout", name)


@pytest.mark.parametrize("kind", VITS)
def test_special_tokens_are_told_from_the_picture(kind):
    first = FIRST.get(kind, 0)
    found = grid_of(timm_vit(**VITS[kind]))
    assert (found.count, found.special, found.grid) == (16 + first, tuple(range(first)), (4, 4))
    rows = torch.arange(16.0 + first)[None]
    assert torch.equal(found.to_grid(rows), rows[:, first:].reshape(1, 4, 4))


def test_rows_and_columns_of_a_picture_that_is_not_square():
    found = grid_of(timm_vit(img_size=(16, 40)), (16, 40))
    assert found.grid == (2, 5)
    assert torch.equal(found.to_grid(torch.arange(11.0)[None])[0], torch.arange(1.0, 11).reshape(2, 5))


def test_tokens_in_the_order_of_columns_and_class_tokens_at_the_end():
    class Other(Twice):
        def forward(self, x):
            x = self.embed(x).transpose(2, 3).flatten(2).transpose(1, 2)
            x = torch.cat([x, self.head.weight.new_zeros(1, 1, 8).expand(x.shape[0], -1, -1)], 1)
            return self.head((x + self.attn(x, x, x)[0])[:, -1])

    found = grid_of(Other(), (8, 16))
    assert (found.special, found.grid) == ((8,), (2, 4))
    assert torch.equal(found.to_grid(torch.arange(9.0)[None])[0], torch.arange(8.0).reshape(4, 2).T)


class DifferentialAttention(Twice):
    """Two attentions of the same tokens, one taken from the other."""

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        for _ in range(2):
            y = F.scaled_dot_product_attention(x, x, x) - 0.5 * F.scaled_dot_product_attention(x, -x, x)
            x = x + y
        return self.head(x.mean(1))


class Shrinking(Twice):
    def forward(self, x):
        x = self.embed(x)
        for _ in range(2):
            t = x.flatten(2).transpose(1, 2)
            t = t + self.attn(t, t, t, need_weights=False)[0]
            x = F.avg_pool2d(t.transpose(1, 2).unflatten(2, x.shape[2:]), 2)
        return self.head(x.mean((2, 3)))


class Convolving(Twice):
    def __init__(self):
        super().__init__()
        self.local = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = self.embed(x)
        for _ in range(2):
            t = x.flatten(2).transpose(1, 2)
            x = (t + self.attn(t, t, t, need_weights=False)[0]).transpose(1, 2).unflatten(2, x.shape[2:])
            x = x + self.local(x)
        return self.head(x.mean((2, 3)))


class Reducing(Twice):
    """Keys and values from a smaller map, as PVT has them."""

    def forward(self, x):
        x = self.embed(x)
        few = F.avg_pool2d(x, 2).flatten(2).transpose(1, 2)
        x = x.flatten(2).transpose(1, 2)
        return self.head((x + self.attn(x, few, few, need_weights=False)[0]).mean(1))


class TalkingHeads(Twice):
    def __init__(self):
        super().__init__()
        self.talk = nn.Conv2d(2, 2, 1)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        h = x.unflatten(2, (2, 4)).transpose(1, 2)
        a = self.talk((h @ h.transpose(-2, -1)).softmax(-1))
        return self.head((x + (a @ h).transpose(1, 2).flatten(2)).mean(1))


def swin():
    from torchvision.models import SwinTransformer

    return SwinTransformer([2, 2], 8, [2], [2], [4, 4], num_classes=5)


def xcit():
    from timm.models.xcit import Xcit

    return Xcit(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5, cls_attn_layers=1)


OVER_ALL = "attention_rollout is defined for attention over all tokens; "
REFUSED = {
    "a CNN": (Residual, "attention_rollout reads attention, and net has none"),
    "windows": (swin, OVER_ALL + "net attends within windows of 4x4 tokens (at 'features.1.0.attn.softmax')"),
    "channels": (xcit, OVER_ALL + "net attends between channels (at 'blocks.0.attn.softmax')"),
    "fewer tokens on the way": (
        Shrinking,
        OVER_ALL + "net has 64 of them at 'attn.scaled_dot_product_attention' and 16 at "
        "'attn.scaled_dot_product_attention_1'",
    ),
    "convolutions between": (Convolving, OVER_ALL + "net mixes them by conv2d as well ('local')"),
    "fewer keys": (Reducing, OVER_ALL + "net looks from 64 at 16 (at 'attn.scaled_dot_product_attention')"),
    "talking heads": (
        TalkingHeads,
        OVER_ALL + "net changes its attention between softmax and use, by conv2d (behind 'softmax')",
    ),
    "side by side": (
        DifferentialAttention,
        "attention_rollout is defined for attention layer after layer; net runs some side by side "
        "('scaled_dot_product_attention', 'scaled_dot_product_attention_1')",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_attention_over_all_tokens_is_refused_in_a_sentence(case):
    make, sentence = REFUSED[case]
    module = sharp(make())
    with pytest.raises(errors.Unsupported) as refused:
        grid_of(module, name="net")
    assert str(refused.value) == sentence
    with left_as_found(module), pytest.raises(errors.Unsupported, match="attention_relevance is defined|reads attent"):
        network(module).explain(noise(1, 3, 32, 32), "attention_relevance")


def test_softmaxes_that_weigh_no_values_are_no_attention():
    class Gate(nn.Module):
        def forward(self, x):
            x = x.flatten(2)
            return x * x.softmax(-1) + x.unflatten(2, (4, -1)).softmax(1).flatten(2)

    assert matrices(observer.learn(Gate(), noise(1, 3, 4, 8))) == []


# -- The methods, by hand


class Given(Look):
    """A look at matrices that are given."""

    def __init__(self, values, gradients, tokens):
        maps = [AttentionMap(str(i), v, g) for i, (v, g) in enumerate(zip(values, gradients, strict=True))]
        super().__init__({}, {}, torch.zeros(1), maps, tokens)
        self.notes = []

    def note(self, sentence):
        self.notes.append(sentence)


def pair(special=0):
    """Two patches side by side, behind `special` tokens."""
    cells = (geometry.Atom("y", 1), geometry.Atom("x", 2))
    dim = (geometry.Tokens(special, cells, 0),) if special else cells
    dims = ((geometry.Atom("n", 1),), (geometry.Atom("c", 1),), dim)
    layout = geometry.Layout(("n", "c", "t"), (1, 2), dims=dims)
    return TokenGrid(2 + special, tuple(range(special)), (1, 2), layout)


def one_head(*rows):
    return torch.tensor(rows)[None, None]


FIRST_A, SECOND_A = one_head([0.5, 0.5], [0.0, 1.0]), one_head([1.0, 0.0], [0.5, 0.5])


def test_rollout_of_two_tokens_by_hand():
    # (A1 + I)/2 = [3/4 1/4; 0 1], (A2 + I)/2 = [1 0; 1/4 3/4]; A2 A1 = [3/4 1/4; 3/16 13/16]
    reads_second = one_head([0.0, 0.0], [0.1, 0.0])
    look = Given([FIRST_A, SECOND_A], [None, reads_second], pair())
    assert find("attention_rollout").function(look).tolist() == [[[3 / 16, 13 / 16]]]
    assert find("attention_last").function(look).tolist() == [[[0.5, 0.5]]]
    assert look.notes == []


def test_where_every_token_is_read_the_map_is_the_mean_of_their_rows():
    look = Given([FIRST_A, SECOND_A], [None, torch.ones(1, 1, 2, 2)], pair())
    assert find("attention_rollout").function(look).tolist() == [[[15 / 32, 17 / 32]]]
    assert look.notes == ["the score is read from all tokens: the map is the mean of their rows"]


def test_relevance_of_two_tokens_by_hand():
    # (g A)+ of the first: [1 0; 0 2], so R1 = [2 0; 0 3]; of the second: [1 0; 0 1/2]; R2 = R1 + [2 0; 0 3/2]
    gradients = one_head([2.0, -4.0], [5.0, 2.0]), one_head([1.0, 9.0], [-3.0, 1.0])
    look = Given([FIRST_A, SECOND_A], gradients, pair())
    assert find("attention_relevance").function(look).tolist() == [[[(4 - 1) / 2, (4.5 - 1) / 2]]]
    # A g of the last: [1 0; -3/2 1/2]
    assert find("attention_gradient").function(look).tolist() == [[[0.5, 0.25]]]


def test_a_score_that_nothing_moves_is_read_as_usual_where_no_gradient_is_needed():
    still = torch.zeros(1, 1, 3, 3)
    a = one_head([0.2, 0.3, 0.5], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0])
    last = find("attention_last").function
    assert last(Given([a], [still], pair(special=1))).tolist() == [[pytest.approx([0.3, 0.5])]]
    assert last(Given([a[..., 1:, 1:]], [still[..., 1:, 1:]], pair())).tolist() == [[[0.5, 0.5]]]
    with pytest.raises(errors.Unsupported, match="does not depend on the attention"):
        find("attention_relevance").function(Given([a], [None], pair(special=1)))
    assert not find("attention_relevance").function(Given([a], [still], pair(special=1))).any()


# -- The methods, against the definitions worked out slowly from what hooks read


def slow_rollout(weights, head_fusion="mean", discard=0.0, keep_first=True):
    """As vit-explain does it, image by image (its rows, there divided along the wrong side, made to sum to 1)."""
    maps = []
    for image in range(len(weights[0])):
        result = torch.eye(weights[0].shape[-1])
        for a in weights:
            fused = {"mean": a[image].mean(0), "max": a[image].max(0)[0], "min": a[image].min(0)[0]}[head_fusion]
            flat = fused.clone().flatten()
            for i in flat.argsort()[: int(len(flat) * discard)].tolist():
                if i != 0 or not keep_first:
                    flat[i] = 0
            mixed = (flat.view_as(fused) + torch.eye(len(fused))) / 2
            for row in mixed:
                row /= row.sum()
            result = mixed @ result
        maps.append(result)
    return torch.stack(maps)


def slow_relevance(weights, gradients):
    maps = []
    for image in range(len(weights[0])):
        r = torch.eye(weights[0].shape[-1])
        for a, g in zip(weights, gradients, strict=True):
            heads = [(a[image, h] * g[image, h]).clamp(min=0) for h in range(a.shape[1])]
            r = r + sum(heads) / len(heads) @ r
        maps.append(r - torch.eye(len(r)))
    return torch.stack(maps)


def slow_gradient(weights, gradients):
    maps = []
    for image in range(len(weights[0])):
        r = torch.eye(weights[0].shape[-1])
        for a, g in zip(weights, gradients, strict=True):
            mixed = (a[image] * g[image]).mean(0).clamp(min=0) + torch.eye(len(r))
            r = mixed / mixed.sum(-1, keepdim=True) @ r
        maps.append(r)
    return torch.stack(maps)


def rows_of(relevance, kind):
    row = sum(relevance[:, i] for i in ROWS[kind]) / len(ROWS[kind])
    return row[:, FIRST[kind] :].reshape(-1, 4, 4)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("kind", ROWS)
def test_methods_are_what_their_papers_define(kind, fused):
    x = noise(3, 3, 32, 32)
    weights, gradients = hooked(timm_vit(**VITS[kind], fused=False), x, target=2)
    net = network(timm_vit(**VITS[kind], fused=fused))
    found = net.explain(x, METHODS, target=2)
    every = net.explain(x, "attention_gradient", target=2, layers="all")
    expected = {
        "attention_rollout": slow_rollout(weights),
        "attention_last": weights[-1].mean(1),
        "attention_relevance": slow_relevance(weights, gradients),
        "attention_gradient": (weights[-1] * gradients[-1]).mean(1).clamp(min=0),
    }
    for name, relevance in expected.items():
        assert close(found[name].coarse, rows_of(relevance, kind), 1e-5), name
    assert close(every.coarse, rows_of(slow_gradient(weights, gradients), kind), 1e-5)
    several = len(ROWS[kind]) > 1
    assert any("the mean of their rows" in note for note in every.provenance.notes) == several


@pytest.mark.parametrize("options", [{"head_fusion": "max"}, {"head_fusion": "min"}, {"discard": 0.6},
                                     {"head_fusion": "max", "discard": 0.9}], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", ["class token", "mean of the patches"])
def test_rollout_of_the_largest_weights(kind, options):
    x = noise(2, 3, 32, 32)
    weights, _ = hooked(timm_vit(**VITS[kind], fused=False), x, target=0)
    found = network(timm_vit(**VITS[kind])).explain(x, "attention_rollout", **options)
    slow = slow_rollout(weights, **options, keep_first=FIRST[kind] > 0)
    assert torch.allclose(slow.sum(-1), torch.ones(slow.shape[:2]))
    assert close(found.coarse, rows_of(slow, kind), 1e-5)


def test_the_query_of_an_attention_pooling_is_followed():
    x = noise(2, 3, 32, 32)
    module = timm_vit(**VITS["attention pooling"], fused=False)
    kept = []
    pool = module.attn_pool
    pool.fused_attn = True
    handles = [
        pool.q.register_forward_hook(lambda _m, _i, out: kept.append(out.detach())),
        pool.kv.register_forward_hook(lambda _m, _i, out: kept.append(out.detach())),
    ]
    weights, _ = hooked(module, x, target=0)
    for handle in handles:
        handle.remove()
    q, k = kept[0].view(-1, 1, 2, 8).transpose(1, 2), kept[1].view(2, 16, 2, 2, 8)[:, :, 0].transpose(1, 2)
    looks = (q @ k.transpose(-2, -1) * pool.scale).softmax(-1)
    found = network(module).explain(x, ["attention_rollout", "attention_last", "attention_relevance"])
    rollout = (looks.mean(1) @ slow_rollout(weights)).reshape(2, 4, 4)
    assert close(found["attention_rollout"].coarse, rollout, 1e-5)
    assert close(found["attention_last"].coarse, looks.mean(1).reshape(2, 4, 4), 1e-5)
    assert found["attention_rollout"].coarse.sum((1, 2)) == pytest.approx(1, abs=1e-6)
    assert found["attention_relevance"].coarse.max() > 0


def test_rows_of_rollout_sum_to_one():
    rollout = network(timm_vit(**VITS["mean of the patches"])).explain(noise(4, 3, 32, 32), "attention_rollout")
    assert rollout.coarse.sum((1, 2)) == pytest.approx(1, abs=1e-6)


def test_a_score_of_one_place_is_followed_from_the_token_of_that_place():
    class Dense(Twice):
        """One linear layer behind the attention says what is at each patch."""

        def forward(self, x):
            x = self.embed(x)
            t = x.flatten(2).transpose(1, 2)
            for _ in range(2):
                t = t + self.attn(t, t, t, need_weights=False)[0]
            return self.head(t).transpose(1, 2).unflatten(2, x.shape[2:])

    module, x = sharp(Dense()), noise(2, 3, 16, 16)
    told = sharp(Twice(weights=True))
    with torch.no_grad():
        told(x)
    s = network(module, (3, 16, 16)).explain(x, "attention_rollout", target=lambda out: out[:, 2, 1, 3])
    assert close(s.coarse, slow_rollout(told.returned)[:, 1 * 4 + 3].reshape(-1, 4, 4), 1e-5)
    assert not any("rows" in note for note in s.provenance.notes)


class LooksAtTheBrightest(nn.Module):
    """A class token whose attention goes to the patch of the largest mean, and to none besides."""

    def __init__(self):
        super().__init__()
        self.cls = nn.Parameter(torch.tensor([[[0.0, 0.0, 1.0]]]))

    def forward(self, x):
        means = F.avg_pool2d(x.mean(1, keepdim=True), 8)  # (n, 1, h, w)
        t = torch.cat([means, means * 0, means * 0 + 0.5], 1).flatten(2).transpose(1, 2)
        t = torch.cat([self.cls.expand(len(x), -1, -1), t], 1)
        for _ in range(2):
            # The class token is of the kind (., ., 1), the others (., ., 1/2): keys are the brightness of a patch.
            a = (t[..., 2:] * 1000 * t[..., :1].transpose(1, 2)).softmax(-1)
            t = t + F.pad(a @ t[..., :1], (1, 1))
        return t[:, 0]


@pytest.mark.parametrize("name", METHODS)
def test_the_one_patch_that_is_looked_at_is_found(name):
    net = network(LooksAtTheBrightest().eval(), (3, 32, 48))
    x = torch.zeros(2, 3, 32, 48)
    x[0, :, 8:16, 32:40] = 1
    x[1, :, 16:24, 8:16] = 1
    s = net.explain(x, name, target=1)
    expected = np.zeros((2, 4, 6))
    expected[0, 1, 4] = expected[1, 2, 1] = 1
    assert close(s.coarse / s.coarse.max((1, 2), keepdims=True), expected, 1e-6)
    assert s.values[0, 11:13, 35:37] == pytest.approx(s.values[0].max(), rel=1e-5)
    assert s.values[1, 19:21, 11:13] == pytest.approx(s.values[1].max(), rel=1e-5)
    assert np.abs(s.values[:, :4]).max() < 1e-6 * s.values.max()


# -- Through the front door


NETS = {
    "timm": lambda: network(timm_vit()),
    "distilled": lambda: network(timm_vit("distilled")),
    "registers": lambda: network(timm_vit(reg_tokens=3, fused=False)),
    "mean of the patches": lambda: network(timm_vit(class_token=False, global_pool="avg")),
    "attention pooling": lambda: network(timm_vit(class_token=False, global_pool="map")),
    "transformers, eager": lambda: network(hf("eager")),
    "transformers, sdpa": lambda: network(hf("sdpa", kind="Dinov2")),
    "torch.nn": lambda: small_network("tokens"),
}


def torchvision_vit():
    from torchvision.models import VisionTransformer

    module = sharp(VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5))
    return network(module)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("make", [*NETS.values(), torchvision_vit], ids=[*NETS, "torchvision"])
def test_attention_methods_keep_the_promises_of_all_methods(make, name):
    assert len(check_method(name, make())) == 8


def test_all_methods_share_one_pass():
    module = timm_vit()
    net = network(module)
    x = noise(2, 3, 32, 32)
    together = net.explain(x, [*METHODS, "gradient", "gradcam"])
    count = []
    handle = module.norm.register_forward_hook(lambda *_: count.append(1))
    try:
        net.explain(x, [*METHODS, "gradient", "gradcam"])
    finally:
        handle.remove()
    assert len(count) == 1
    for name, s in together.items():
        assert close(s.values, net.explain(x, name).values, 1e-5), name


def test_maps_are_laid_over_the_patches():
    s = network(timm_vit()).explain(noise(1, 3, 32, 32), "attention_rollout")
    middles = s.values[0][3:32:8, 3:32:8] + s.values[0][4:32:8, 4:32:8]  # to both sides of the middle of each patch
    assert s.values.shape == (1, 32, 32)
    assert s.coarse.shape == (1, 4, 4)
    assert np.abs(middles / 2 - s.coarse[0]).max() < 0.1 * s.coarse.max()


def test_a_rollout_does_not_depend_on_the_target_and_relevance_does():
    net = network(timm_vit())
    x = noise(2, 3, 32, 32)
    first, second = (net.explain(x, METHODS, target=t) for t in (0, 1))
    assert np.array_equal(first["attention_rollout"].values, second["attention_rollout"].values)
    for name in METHODS[2:]:
        assert not close(first[name].values, second[name].values, 1e-2)


def test_options_that_do_not_exist_are_refused():
    net = network(timm_vit())
    x = noise(1, 3, 32, 32)
    with pytest.raises(errors.InputError, match="head_fusion is 'mean', 'max' or 'min', not 'median'"):
        net.explain(x, "attention_rollout", head_fusion="median")
    with pytest.raises(errors.InputError, match="discard is a share, at least 0 and below 1, not 1.5"):
        net.explain(x, "attention_rollout", discard=1.5)
    with pytest.raises(errors.InputError, match="layers is 'last' or 'all', not 'first'"):
        net.explain(x, "attention_gradient", layers="first")


def test_networks_with_attention_pass_the_checks_of_all_networks():
    assert check_network(network(timm_vit(depth=2)))


def test_attention_of_an_exported_network_is_read_as_well(tmp_path):
    module = timm_vit()
    x = noise(2, 3, 32, 32)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=8)},))
    torch.export.save(program, tmp_path / "vit.pt2")
    net = innersight.open(tmp_path / "vit.pt2")
    for name in METHODS:
        expected = network(module).explain(x, name, target=1).coarse
        assert close(net.explain(x, name, target=1).coarse, expected, 1e-4), name


def test_a_copied_network_is_read_alike():
    module = timm_vit()
    a, b = (read(m, noise(1, 3, 32, 32)).attention for m in (module, copy.deepcopy(module)))
    assert all(torch.equal(p.value, q.value) for p, q in zip(a, b, strict=True))


def test_a_part_of_a_batch_is_that_part():
    m = AttentionMap("a", noise(3, 2, 4, 4), noise(3, 2, 4, 4, seed=1))
    part = m.of(slice(1, 2))
    assert torch.equal(part.value, m.value[1:2])
    assert torch.equal(part.gradient, m.gradient[1:2])
    assert attention.AttentionMap("a", m.value).of(slice(2)).gradient is None
