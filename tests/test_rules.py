"""Backward rules, by cases worked by hand, by twins that must agree, and by books that must close."""

import gc
import math
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

from innersight import errors
from innersight.observe import composites, rules
from innersight.observe.composites import COMPOSITES, CONTRASTIVE, DECONVOLUTION, EXCITATION, GUIDED, composite
from innersight.observe.passes import INPUT, Engine, Request
from innersight.observe.surrogates import OWN, Rules, surrogate
from innersight.testing import NETWORKS, left_as_found, small_network


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(make, seed=0):
    """A module with random weights, statistics as after training, and parameters that require gradients."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = make()
        for m in module.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.normal_(m.bias, std=0.2)
                m.running_mean.normal_(std=0.3)
                m.running_var.uniform_(0.5, 1.5)
    return module.eval()


class Fn(nn.Module):
    """A function as a network; submodules by keyword."""

    def __init__(self, fn, **parts):
        super().__init__()
        self.fn = fn
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.fn(self, x)


def first(output):
    return output.reshape(len(output), -1)[:, 0]


def ruled(module, x, chosen="epsilon", score=first, layers=(), baseline=None, engine=None, **options):
    engine = engine or Engine(module)
    chosen = COMPOSITES[chosen] if isinstance(chosen, str) else chosen
    with engine.session():
        return rules.run(engine, x, replace(chosen, **options), score, layers=layers, baseline=baseline)


def row(*values):
    return torch.tensor([values], dtype=torch.float32)


def linear(weight, bias=None):
    weight = torch.tensor(weight, dtype=torch.float32)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight.data = weight
    if bias is not None:
        layer.bias.data = torch.tensor(bias, dtype=torch.float32)
    return layer


# -- worked by hand

H1 = Fn(lambda m, x: m.b(F.relu(m.a(x))), a=linear([[1, 1], [1, -1]], [0, 1]), b=linear([[2, -1]], [1]))


@pytest.mark.parametrize(
    ("name", "options", "relevance", "bias"),
    [
        ("epsilon", {"epsilon": 0.0}, (3, 3), 0),
        ("zplus", {"epsilon": 0.0}, (4, 4 / 3), 2 / 3),
        ("zplus", {"epsilon": 0.0, "bias": False}, (9 / 2, 3 / 2), 0),
        ("gamma", {"epsilon": 0.0, "gamma": 1.0}, (132 / 35, 62 / 35), 16 / 35),
        ("alpha2_beta1", {"epsilon": 1e-12}, (7, 34 / 3), -5 / 3),
    ],
)
def test_two_layers_worked_by_hand(name, options, relevance, bias):
    r = ruled(H1, row(3, 1), name, **options)
    assert r.scores.tolist() == [6]
    torch.testing.assert_close(r.relevance, row(*relevance))
    assert float(r.shares["bias"]) == pytest.approx(bias, abs=1e-6)
    assert float(sum(r.shares.values())) == pytest.approx(6, abs=1e-5)


def test_a_unit_without_negative_parts_passes_alpha_times_what_it_has():
    r = ruled(H1, row(3, 1), "alpha2_beta1", epsilon=1e-12)
    assert float(r.shares["other"]) == pytest.approx(6 - 55 / 3 + 5 / 3, abs=1e-4)  # relevance made, booked


def test_a_sum_is_split_by_contribution_not_copied():
    a, s = linear([[1, 1], [1, -1]], [0, 1]), torch.tensor([0.5, 1.0]) * torch.tensor([-1.0, 2.0])

    def forward(m, x):
        h = F.relu(m.a(x))
        return F.relu(h + s * h).sum(1, keepdim=True)

    r = ruled(Fn(forward, a=a), row(3, 1), epsilon=0.0)
    assert r.scores.tolist() == [11]
    torch.testing.assert_close(r.relevance, row(21 / 2, -5 / 2))
    assert float(r.shares["bias"]) == pytest.approx(3)


@pytest.mark.parametrize(("x", "relevance"), [((2, 0), (1, 0)), ((2, 3), (2 / (1 + math.exp(-3)) + 3, 3))])
def test_a_gate_takes_nothing_and_a_product_of_signals_is_halved(x, relevance):
    gated = Fn(lambda _, x: x[:, :1] * x[:, 1:].sigmoid() + x[:, :1] * x[:, 1:])
    torch.testing.assert_close(ruled(gated, row(*x)).relevance, row(*relevance))


@pytest.mark.parametrize("relu", [F.relu, lambda t: F.relu(t.clone(), inplace=True), lambda t: t.clamp(min=0),
                                  lambda t: t.clone().clamp_(0), nn.ReLU(inplace=True), F.relu6])  # fmt: skip
def test_guided_backprop_and_deconvolution_worked_by_hand(relu):
    net = Fn(lambda _, x: relu(x[:, :1] - x[:, 1:]) - relu(x[:, 1:]))
    x = row(3, 1)
    engine = Engine(net)
    with engine.session():
        plain = engine.run(x, Request(gradients=[INPUT], score=first)).gradients[INPUT]
    assert plain.tolist() == [[1, -2]]
    assert ruled(net, x, GUIDED).multiplier.tolist() == [[1, -1]]
    assert ruled(net, x, DECONVOLUTION).multiplier.tolist() == [[1, -1]]


def test_deconvolution_looks_at_what_comes_back_alone():
    net = Fn(lambda _, x: F.relu(x[:, :1]) + 2 * F.relu(x[:, 1:]))
    assert ruled(net, row(-1, 3), DECONVOLUTION).multiplier.tolist() == [[1, 2]]
    assert ruled(net, row(-1, 3), GUIDED).multiplier.tolist() == [[0, 2]]


def test_relu6_blocks_at_its_ceiling_when_guided():
    net = Fn(lambda _, x: F.relu6(x).sum(1, keepdim=True))
    assert ruled(net, row(7, 3), GUIDED).multiplier.tolist() == [[0, 1]]
    assert ruled(net, row(7, 3), DECONVOLUTION).multiplier.tolist() == [[1, 1]]


def test_without_a_rectifier_guided_backprop_says_that_it_is_the_gradient():
    net = Fn(lambda _, x: F.gelu(x).sum(1, keepdim=True))
    r = ruled(net, row(1, -2), GUIDED)
    x = row(1, -2).requires_grad_()
    torch.testing.assert_close(r.multiplier, torch.autograd.grad(F.gelu(x).sum(), x)[0])
    assert any("plain gradient" in n for n in r.notes)
    assert not ruled(H1, row(3, 1), GUIDED).notes


def test_attnlrp_passes_a_softmax_as_published():
    """R_i = x_i (R_i - s_i sum R), where R is what arrives at the softmax's output."""
    w = torch.tensor([1.0, -2.0, 0.5])
    net = Fn(
        lambda _, x: (x.softmax(1) * w).sum(1, keepdim=True),
    )
    x = row(0.3, -1.0, 0.8)
    s = x.softmax(1)
    arrives = s * w
    r = ruled(net, x, "attnlrp")
    torch.testing.assert_close(r.relevance, x * (arrives - s * arrives.sum()))
    assert float(r.shares["softmax"] + r.shares["input"]) == pytest.approx(float(r.scores), rel=1e-5)


def test_under_cp_attention_weights_are_constants():
    q, v = noise(1, 1, 4, 6), linear(noise(6, 6).tolist())

    def forward(m, x):
        return m.v(F.scaled_dot_product_attention(x + q[0], x, x)).sum((1, 2)).unsqueeze(1)

    x = noise(1, 4, 6, seed=3)
    weights = ((x + q[0]) @ x.transpose(1, 2) / math.sqrt(6)).softmax(-1)
    expected = x * (weights.transpose(1, 2) @ v.weight.sum(0).expand(1, 4, 6))
    r = ruled(Fn(forward, v=v), x, "epsilon", epsilon=0.0)
    torch.testing.assert_close(r.relevance, expected)
    assert float(r.relevance.sum()) == pytest.approx(float(r.scores), rel=1e-4)


# -- twins


def both(first_fn, second_fn, x, chosen, **parts):
    a, b = ruled(Fn(first_fn, **parts), x, chosen), ruled(Fn(second_fn, **parts), x, chosen)
    assert torch.equal(a.scores, b.scores)
    return a.relevance, b.relevance


@pytest.mark.parametrize("chosen", [COMPOSITES["epsilon"], COMPOSITES["zplus"], COMPOSITES["gamma"], GUIDED])
def test_in_place_equals_functional(chosen):
    conv, norm = made(lambda: nn.Conv2d(3, 6, 3, padding=1)), made(lambda: nn.BatchNorm2d(6))
    again = made(lambda: nn.Conv2d(6, 6, 1))

    def functional(m, x):
        h = F.hardswish(m.norm(m.conv(x)) + 0.1)
        a = m.again(h) + h
        a = torch.cat([a[:, :1] * 2, a[:, 1:]], 1)
        kept = F.relu(a[:, 2:3])
        a = torch.cat([a[:, :3], F.hardswish(a[:, 3:])], 1) + kept
        return F.relu(a.clamp(min=0.3) - 0.4).mean((2, 3))

    def in_place(m, x):
        h = m.norm(m.conv(x))
        alias = h.view(h.shape)
        h += 0.1
        F.hardswish(alias, inplace=True)
        a = m.again(h)
        a += h
        a[:, 0].mul_(2)
        kept = F.relu(a[:, 2:3])
        F.hardswish(a[:, 3:], inplace=True)
        a.add_(kept).clamp_(min=0.3)
        a -= 0.4
        return F.relu(a, inplace=True).mean((2, 3))

    one, two = both(functional, in_place, noise(2, 3, 8, 8), chosen, conv=conv, norm=norm, again=again)
    assert float(one.abs().max()) > 0
    assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["zplus", "gamma", "alpha2_beta1", "epsilon_plus_flat", "epsilon_gamma_box"])
@pytest.mark.parametrize("layer", ["conv", "linear", "transposed"])
def test_a_batch_norm_behind_a_linear_layer_is_made_part_of_it(name, layer):
    make = {"conv": lambda: nn.Conv2d(3, 6, 3, groups=3), "linear": lambda: nn.Linear(8, 6),
            "transposed": lambda: nn.ConvTranspose2d(3, 6, 3)}[layer]  # fmt: skip
    inner = made(make)
    norm = made(lambda: (nn.BatchNorm1d if layer == "linear" else nn.BatchNorm2d)(6), seed=1)
    scale = norm.weight.data / (norm.running_var + norm.eps).sqrt()
    folded = made(make)
    dim = 1 if layer == "transposed" else 0
    shape = [-1 if d == dim else 1 for d in range(inner.weight.dim())]
    folded.weight.data = inner.weight.data * scale.view(shape)
    folded.bias.data = (inner.bias.data - norm.running_mean) * scale + norm.bias.data
    x = noise(2, 8) if layer == "linear" else noise(2, 3, 6, 6)
    one = ruled(Fn(lambda m, x: m.norm(m.inner(x)).relu().flatten(1), inner=inner, norm=norm), x, name)
    two = ruled(Fn(lambda m, x: m.inner(x).relu().flatten(1), inner=folded), x, name)
    torch.testing.assert_close(one.relevance, two.relevance, rtol=1e-4, atol=1e-5 * float(two.relevance.abs().max()))
    assert any(k in one.met for k in ("zplus", "gamma", "alpha_beta", "flat", "zbox", "epsilon"))
    assert "batch_norm" not in one.met


def test_a_batch_norm_that_cannot_be_made_part_is_an_affine_map():
    net = made(lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)))
    net(noise(1, 3, 6, 6))
    x = noise(1, 3, 6, 6)
    r = ruled(net, x, epsilon=0.0)
    scale = net[0].weight / (net[0].running_var + net[0].eps).sqrt()
    inner = ruled(net[1:], net[0](x).detach(), epsilon=0.0)
    torch.testing.assert_close(r.multiplier, inner.multiplier * scale.view(1, 3, 1, 1))
    assert float(r.closure) < 1e-5


def test_a_convolution_read_twice_keeps_its_batch_norm_apart():
    conv, norm = made(lambda: nn.Conv2d(3, 4, 3)), made(lambda: nn.BatchNorm2d(4))
    net = Fn(lambda m, x: (lambda h: (m.norm(h) + h).mean((2, 3)))(m.conv(x)), conv=conv, norm=norm)
    r = ruled(net, noise(2, 3, 6, 6), "zplus", layers=["conv"])
    assert r.met["batch_norm"] == 1
    assert float(r.closure.max()) < 1e-5
    assert r.layers["conv"][1].shape == (2, 4, 4, 4)


def test_hard_sigmoid_by_hand_is_a_gate_like_the_operation():
    conv = made(lambda: nn.Conv2d(3, 4, 1))
    for gate in (lambda h: F.relu6(h + 3) / 6, lambda h: F.relu6(h + 3.0, inplace=True).div_(6),
                 lambda h: (h + 3).clamp_(0, 6).div_(6)):  # fmt: skip
        one, two = both(
            lambda m, x, gate=gate: (m.conv(x) * gate(m.conv(x).mean((2, 3), keepdim=True))).mean((2, 3)),
            lambda m, x: (m.conv(x) * F.hardsigmoid(m.conv(x).mean((2, 3), keepdim=True))).mean((2, 3)),
            noise(2, 3, 5, 5), COMPOSITES["zplus"], conv=conv,
        )  # fmt: skip
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("end", [lambda z: z.softmax(1), lambda z: z.log_softmax(1), torch.sigmoid,
                                 lambda z: z.softmax(1).view(len(z), -1).clone(),
        lambda z: z.softmax(1).topk(1, 1).values])  # fmt: skip
def test_a_network_that_answers_with_probabilities_is_explained_by_its_scores(end):
    net = Fn(lambda _, x: end(torch.cat([H1(x), x[:, :1]], 1)))
    r = ruled(net, row(3, 1))
    torch.testing.assert_close(r.relevance, ruled(H1, row(3, 1)).relevance)
    assert any("probabilities" in n for n in r.notes)
    assert float(sum(r.shares.values())) == pytest.approx(float(r.scores), abs=1e-5)


# -- the first layer

PICTURE = (noise(2, 3, 8, 8).sigmoid() * 0.8 + 0.1)  # fmt: skip
MEAN, STD = torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1), torch.tensor([0.2, 0.3, 0.25]).view(1, 3, 1, 1)


def stem(seed=0, padding=1):
    return made(lambda: nn.Conv2d(3, 5, 3, padding=padding), seed), made(lambda: nn.Linear(5, 2), seed)


@pytest.mark.parametrize("name", ["flat", "w2", "zbox"])
def test_first_layer_rules_give_the_published_shares(name):
    """R_i = sum_j share_ij R_j, with the sums written out over every input and output."""
    layer = made(lambda: nn.Linear(4, 3))
    x, low, high = row(0.5, -0.2, 0.0, 0.9), -1.0, 1.5
    net = Fn(lambda m, x: m.layer(x).sum(1, keepdim=True), layer=layer)
    first_rule = getattr(composites, name)
    r = ruled(net, x, replace(COMPOSITES["epsilon"], first=first_rule, epsilon=0.0, low=low, high=high))
    w, z = layer.weight.detach(), layer(x).detach()[0]
    up, down = w.clamp(min=0), w.clamp(max=0)
    share = {"flat": torch.ones_like(w), "w2": w**2, "zbox": x * w - low * up - high * down}[name]
    torch.testing.assert_close(r.relevance[0], (share / share.sum(1, keepdim=True) * z[:, None]).sum(0))
    assert float(r.relevance[0, 2]) != 0  # a pixel that is zero


@pytest.mark.parametrize("name", ["epsilon_plus_flat", "epsilon_gamma_box", "epsilon_plus_w2"])
def test_the_first_layer_is_found_behind_what_only_prepares_the_picture(name):
    conv, head = stem()
    plain = Fn(lambda m, x: m.head(m.conv(x).relu().mean((2, 3))), conv=conv, head=head)
    normalized = (PICTURE - MEAN) / STD
    low, high = ((torch.tensor([v] * 3) - MEAN.flatten()) / STD.flatten() for v in (0.0, 1.0))
    expected = ruled(plain, normalized, name, low=tuple(low.tolist()), high=tuple(high.tolist()))
    unpadded = made(lambda: nn.Conv2d(3, 5, 3))
    unpadded.load_state_dict(conv.state_dict())

    def tail(m, h):
        return m.head(m.conv(h).relu().mean((2, 3)))

    def in_place(m, x):
        x.sub_(MEAN).div_(STD)
        return tail(m, x)

    def functional(m, x):
        return tail(m, ((x - MEAN) / STD).float().contiguous())

    def batch_normed(m, x):
        return tail(m, F.batch_norm(x, MEAN.flatten(), STD.flatten() ** 2, eps=0.0))

    def parts(m, x):
        return tail(m, torch.cat([(c - a) / s for c, a, s in zip(x.split(1, 1), MEAN[0], STD[0], strict=True)], 1))

    for prepared in (in_place, functional, batch_normed, parts):
        r = ruled(Fn(prepared, conv=conv, head=head), PICTURE, name, low=0.0, high=1.0)
        torch.testing.assert_close(r.relevance, expected.relevance, rtol=1e-3, atol=1e-5)
        assert not r.notes
    last = Fn(lambda m, x: functional(m, x.permute(0, 3, 1, 2)), conv=conv, head=head)
    r = ruled(last, PICTURE.permute(0, 2, 3, 1).contiguous(), name, low=0.0, high=1.0)
    if name != "epsilon_gamma_box":  # bounds are given for each channel of dimension 1
        torch.testing.assert_close(r.relevance.permute(0, 3, 1, 2), expected.relevance, rtol=1e-3, atol=1e-5)
    padded = Fn(lambda m, x: tail(m, F.pad((x - MEAN) / STD, (1, 1, 1, 1))), conv=unpadded, head=head)
    torch.testing.assert_close(
        ruled(padded, PICTURE, name, low=0.0, high=1.0).relevance, expected.relevance, rtol=1e-3, atol=1e-5
    )


def test_where_the_picture_is_lost_the_first_layers_rule_is_not_applied_and_that_is_said():
    conv, head = stem()
    net = Fn(lambda m, x: m.head(m.conv(x.square()).relu().mean((2, 3))), conv=conv, head=head)
    r = ruled(net, PICTURE, "epsilon_plus_flat")
    torch.testing.assert_close(r.relevance, ruled(net, PICTURE, "epsilon_plus").relevance)
    assert any("'square' (square)" in n for n in r.notes)


def test_where_a_channel_alone_is_changed_in_place_the_range_is_no_longer_known():
    conv, head = stem()

    def forward(m, x):
        x[:, 0].mul_(3)
        return m.head(m.conv(x).relu().mean((2, 3)))

    r = ruled(Fn(forward, conv=conv, head=head), PICTURE, "epsilon_gamma_box")
    assert "zbox" not in r.met
    assert any("'mul' (mul)" in n for n in r.notes)


def test_the_range_of_the_picture_is_by_default_its_own():
    conv, head = stem()
    net = Fn(lambda m, x: m.head(m.conv(x).relu().mean((2, 3))), conv=conv, head=head)
    one = ruled(net, PICTURE[:1], "epsilon_gamma_box")
    low, high = (tuple(v.tolist()) for v in (PICTURE[0].amin((1, 2)), PICTURE[0].amax((1, 2))))
    torch.testing.assert_close(
        one.relevance, ruled(net, PICTURE[:1], "epsilon_gamma_box", low=low, high=high).relevance
    )


# -- books


class Mixed(nn.Module):
    """What recent networks are made of: norms of all kinds, gates, attention in windows, concatenation of constants."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Hardswish(inplace=True))
        self.pre = nn.BatchNorm2d(8)
        self.dw = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.gate = nn.Conv2d(8, 8, 1)
        self.group, self.instance = nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.rms = nn.RMSNorm(8)
        self.glu = nn.Linear(8, 16)
        self.token, self.table = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 17, 8))
        self.scale = nn.Parameter(torch.full((8,), 0.5))
        self.up, self.head = nn.ConvTranspose2d(8, 4, 2, 2), nn.Linear(12, 3)
        self.mha = nn.MultiheadAttention(8, 2)
        for p in self.parameters():
            if p.dim() == 1:
                p.data += 0.1 * torch.randn(p.shape)

    def forward(self, x):
        x = self.stem((x - 0.2) / 0.5)
        h = self.dw(F.relu(self.pre(x)))
        h = h * self.gate(h.mean((2, 3), keepdim=True)).sigmoid() + x
        h = F.gelu(self.group(h)) + F.elu(self.instance(h), inplace=True)
        h = F.local_response_norm(h, 3)
        t = h.permute(0, 2, 3, 1)
        n, side, _, c = t.shape
        w = t.view(n, 2, side // 2, 2, side // 2, c).transpose(2, 3).reshape(n * 4, -1, c)  # windows
        q, k, v = self.qkv(self.norm(w)).chunk(3, -1)
        w = w + self.scale * self.proj((q @ k.transpose(1, 2) / c**0.5 - 0.1).softmax(-1) @ v)
        t = w.reshape(n, 2, 2, side // 2, side // 2, c).transpose(2, 3).reshape(n, side * side, c)
        t = torch.cat([self.token.expand(n, -1, -1), t[:, :16]], 1) + self.table
        t = t + F.glu(self.glu(self.rms(t)))
        s = t.transpose(0, 1)
        t = t + self.mha(s, s, s)[0].transpose(0, 1)
        maps = self.up(F.normalize(t[:, 1:].transpose(1, 2).reshape(n, c, 4, 4), dim=1))
        pooled = F.max_pool2d(F.leaky_relu(maps, 0.1), 2).amax((2, 3))
        return self.head(torch.cat([pooled, torch.tanh(t[:, 0])], 1))


KINDS = {name: make for name, (make, _) in NETWORKS.items()} | {"mixed": Mixed}


def kind(name):
    return made(Mixed) if name == "mixed" else small_network(name).module


def main(output):
    output = output["logits"] if isinstance(output, dict) else output
    return output[:, 1]


CHECKED = [*COMPOSITES.values(), EXCITATION, CONTRASTIVE]


@pytest.mark.parametrize("chosen", CHECKED, ids=lambda r: r.name)
@pytest.mark.parametrize("network", KINDS)
def test_the_books_close_and_a_batch_equals_one_by_one(network, chosen):
    """Relative to the greatest of the score and the shares: a score near zero may be the sum of large shares."""
    net, x = kind(network), noise(3, 3, 16, 16, seed=5)
    engine = Engine(net)
    together = ruled(net, x, chosen, main, engine=engine)
    assert float(together.closure.max()) < 1e-4
    with torch.no_grad():
        torch.testing.assert_close(together.scores, main(net(x)), rtol=1e-5, atol=1e-6)
    for i in range(3):
        alone = ruled(net, x[i : i + 1], chosen, main, engine=engine)
        size = float(alone.relevance.abs().max())
        torch.testing.assert_close(alone.relevance[0], together.relevance[i], rtol=1e-3, atol=1e-4 * size)
        largest = max(abs(float(v)) for v in alone.shares.values())
        for share, value in alone.shares.items():
            assert float(value) == pytest.approx(float(together.shares[share][i]), rel=1e-3, abs=1e-4 * largest)


def test_relevance_lost_without_a_booking_shows_in_the_closure():
    @surrogate
    def lossy(op):
        return op(*op.inputs) / 2

    broken = replace(COMPOSITES["epsilon"], table={**COMPOSITES["epsilon"].table, "relu": lossy})
    assert float(ruled(H1, row(3, 1), broken).closure) > 0.3


def test_relevance_is_linear_in_what_is_explained():
    net, x = kind("mixed"), noise(2, 3, 16, 16)
    a, b, both_of_them = (
        ruled(net, x, "epsilon_plus_flat", score).relevance
        for score in (lambda o: o[:, 0], lambda o: o[:, 2], lambda o: o[:, 0] - 2 * o[:, 2])
    )
    torch.testing.assert_close(both_of_them, a - 2 * b, rtol=1e-3, atol=1e-4 * float(a.abs().max()))


def test_on_relu_networks_epsilon_is_gradient_times_input():
    net, x = kind("residual"), noise(2, 3, 16, 16)
    engine = Engine(net)
    with engine.session():
        gradient = engine.run(x, Request(gradients=[INPUT], score=main)).gradients[INPUT]
    torch.testing.assert_close(ruled(net, x, "epsilon", main, epsilon=0.0).relevance, gradient * x)


def test_values_and_multipliers_of_layers_are_handed_out():
    r = ruled(H1, row(3, 1), "epsilon", layers=["relu", "a"], epsilon=0.0)
    value, multiplier = r.layers["relu"]
    assert value.tolist() == [[4, 3]]
    assert multiplier.tolist() == [[2, -1]]
    assert (r.layers["a"][0] * r.layers["a"][1]).tolist() == [[8, -3]]


def test_a_layers_value_is_that_before_it_was_overwritten():
    net = Fn(lambda m, x: m.b(m.a(x).mul_(2).relu_()), a=H1.a, b=H1.b)
    r = ruled(net, row(-3, 1), "epsilon", layers=["a"])
    assert r.layers["a"][0].tolist() == [[-2, -3]]


def test_between_a_convolution_and_its_batch_norm_there_is_no_relevance_to_hand_out():
    net = small_network("residual").module
    with pytest.raises(errors.Unsupported, match="ask for 'bn1'"):
        ruled(net, noise(1, 3, 16, 16), "zplus", main, layers=["conv1"])


# -- batches


def test_images_are_run_alone_where_the_batch_is_not_to_be_told_from_what_it_is_merged_with():
    class Interleaved(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            n = len(x)
            t = x.view(n, 3, 4).transpose(0, 1).reshape(3 * n, 4)  # the image runs fastest
            return self.b(F.gelu(self.a(t)).view(3, n, 4).transpose(0, 1).sum(1))

    net, x = made(Interleaved), noise(3, 12)
    together = ruled(net, x, "gamma")
    for i in range(3):
        alone = ruled(net, x[i : i + 1], "gamma")
        torch.testing.assert_close(alone.relevance[0], together.relevance[i])
        for share in together.shares:
            torch.testing.assert_close(alone.shares[share][0], together.shares[share][i], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_network_of_one_fixed_batch_size_is_explained_as_any(size):
    net, x = kind("residual"), noise(2, 3, 16, 16)
    expected = ruled(net, x, "epsilon_plus_flat", main)

    def call(module, batch):
        assert len(batch) == size
        return module(batch)

    if size < len(x):
        x, expected = x[:1], ruled(net, x[:1], "epsilon_plus_flat", main)
    r = ruled(net, x, "epsilon_plus_flat", main, engine=Engine(net, call=call, fixed_batch=size))
    torch.testing.assert_close(r.relevance, expected.relevance, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(r.shares["bias"], expected.shares["bias"], rtol=1e-4, atol=1e-6)


def test_a_network_that_takes_one_image_alone_is_explained():
    net = Fn(lambda m, x: m.b(F.relu(m.a(x.view(1, 2)))), a=H1.a, b=H1.b)
    r = ruled(net, row(3, 1), "zplus")
    torch.testing.assert_close(r.relevance, row(4, 4 / 3))


# -- with a baseline


@surrogate
def rescale(op):
    x, base = op.inputs[0], op.baseline[0]
    difference = x.detach() - base
    slope = (op(x.detach()) - op(base)) / torch.where(difference == 0, 1, difference)
    return x * torch.where(difference == 0, 0, slope)


RESCALE = Rules("rescale", {"relu": rescale}, OWN, fold=False, books=False)


@pytest.mark.parametrize("relu", [F.relu, lambda t: F.relu(t, inplace=True)])
def test_rules_compare_with_what_the_operation_read_on_the_baseline(relu):
    net = Fn(lambda _, x: relu(x[:, :1] - 1) + x[:, 1:])
    x = torch.tensor([[3.0, 2.0], [0.0, 5.0]])
    r = ruled(net, x, RESCALE, baseline=torch.zeros(1, 2))
    assert r.relevance.tolist() == [[2, 2], [0, 5]]
    assert r.baseline_scores.tolist() == [0, 0]
    assert r.closure.tolist() == [0, 0]
    for size in (1, 2, 3):
        one = ruled(net, x[:1], RESCALE, baseline=torch.zeros(1, 2), engine=Engine(net, fixed_batch=size))
        assert one.relevance.tolist() == [[2, 2]]


def test_with_a_baseline_differences_sum_to_the_difference_of_the_scores():
    def make():
        layers = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 3), nn.ReLU(inplace=True)
        return nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))

    net = made(make)
    x, base = noise(2, 3, 8, 8), noise(2, 3, 8, 8, seed=1)
    r = ruled(net, x, RESCALE, main, baseline=base)
    torch.testing.assert_close(r.relevance.sum((1, 2, 3)), r.scores - r.baseline_scores, rtol=1e-4, atol=1e-5)


# -- what cannot be


def test_an_operation_without_a_rule_is_named():
    net = Fn(lambda m, x: m.b(torch.erfinv(m.a(x) / 9)), a=H1.a, b=H1.b)
    with left_as_found(net), pytest.raises(errors.Unsupported, match=r"'erfinv' \(layer 'erfinv'\).*gradient_x_input"):
        ruled(net, row(3, 1))
    assert ruled(net, row(3, 1), GUIDED).multiplier.abs().sum() > 0


class Own(torch.autograd.Function):
    @staticmethod
    def forward(_ctx, x):
        return x * 2

    @staticmethod
    def backward(_ctx, g):
        return g * 2


def scripted(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(module)


@pytest.mark.parametrize(
    ("inner", "says"),
    [
        (lambda: scripted(nn.Sequential(nn.Linear(2, 2), nn.ReLU())), "cannot be watched"),
        (lambda: Fn(lambda _, x: Own.apply(x)), "OwnBackward"),
        (lambda: Fn(lambda _, x: torch.utils.checkpoint.checkpoint(F.gelu, x, use_reentrant=False)), "checkpoint"),
    ],
)
def test_what_rules_cannot_enter_is_refused_and_nothing_is_left_behind(inner, says):
    net = Fn(lambda m, x: m.b(F.relu(m.inner(m.a(x)))), a=H1.a, b=H1.b, inner=inner())
    for chosen in (COMPOSITES["epsilon"], GUIDED):
        with left_as_found(net), pytest.raises(errors.Unsupported, match=says):
            ruled(net, row(3, 1), chosen)


def test_library_operations_with_a_backward_of_their_own_are_no_strangers():
    import torchvision

    boxes = torch.tensor([[0.0, 0.0, 0.0, 4.0, 4.0]])
    net = Fn(lambda _, x: F.relu(torchvision.ops.roi_align(F.relu(x), boxes, 2)).sum((2, 3)))
    x = noise(1, 3, 6, 6)
    r = ruled(net, x)
    assert float(r.closure) < 1e-5
    assert float(r.relevance.sum()) == pytest.approx(float(r.scores), rel=1e-5)


def test_a_score_that_no_relevance_leads_to_is_refused():
    net = Fn(lambda m, x: m.b(m.a(x)).exp() + 1, a=H1.a, b=H1.b)
    with pytest.raises(errors.Unsupported, match=r"what 'exp' \(exp\) returns counts as a constant"):
        ruled(net, row(3, 1))


def test_products_of_more_than_two_signals_are_refused():
    net = Fn(lambda _, x: torch.einsum("ni,ni,ni->n", x, x, x).unsqueeze(1))
    with pytest.raises(errors.Unsupported, match="3 signals"):
        ruled(net, row(3, 1))


def test_what_the_model_keeps_out_of_the_gradient_stays_out():
    def forward(m, x):
        with torch.no_grad():
            scale = m.a(x).mean()
        return m.b(F.relu(m.a(x))) * scale + m.b(x.detach())

    r = ruled(Fn(forward, a=H1.a, b=H1.b), row(3, 1), epsilon=0.0)
    torch.testing.assert_close(r.relevance, row(3, 3) * 3.5)
    assert float(r.closure) < 1e-5


def test_a_picture_written_into_a_part_of_a_constant_is_followed():
    def padded(m, x):
        canvas = x.new_zeros(len(x), 3)
        part = canvas[:, :2]
        part.copy_(x)
        return m.b(F.relu(m.a(canvas[:, :2]))) + canvas[:, 2:]

    r = ruled(Fn(padded, a=H1.a, b=H1.b), row(3, 1), "zplus")
    torch.testing.assert_close(r.relevance, row(4, 4 / 3))
    assert float(r.closure) < 1e-5


# -- nothing left behind


def failing(_output):
    raise ZeroDivisionError


@pytest.mark.parametrize("chosen", [COMPOSITES["epsilon_gamma_box"], COMPOSITES["attnlrp"], GUIDED])
def test_the_model_is_left_as_found_also_when_it_fails(chosen):
    net = made(Mixed).train()
    x = noise(2, 3, 16, 16)
    given = x.clone()
    with left_as_found(net):
        ruled(net, x, chosen, main)
    assert torch.equal(x, given)
    for wrong in (failing, lambda output: output.nonsense):
        with left_as_found(net), pytest.raises((ZeroDivisionError, AttributeError)):
            ruled(net, x, chosen, wrong)
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_no_map_waits_for_the_garbage_collector():
    net, x = made(Mixed), noise(2, 3, 16, 16)
    engine = Engine(net)

    def living():
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    for chosen in (COMPOSITES["epsilon_gamma_box"], COMPOSITES["attnlrp"], GUIDED):
        ruled(net, x, chosen, main, engine=engine)
        gc.collect()
        gc.disable()
        try:
            before = living()
            for _ in range(2):
                ruled(net, x, chosen, main, engine=engine, layers=["norm"])
            with pytest.raises(ZeroDivisionError):
                ruled(net, x, chosen, failing, engine=engine)
            assert living() == before
        finally:
            gc.enable()


# -- which composite


def test_the_composite_is_chosen_by_the_architecture():
    def becomes(net, size=16, **options):
        engine = Engine(net)
        with engine.session():
            return rules.run(engine, noise(1, 3, size, size), composite("auto", **options), main)

    def chosen(module):
        return becomes(made(module)).rules.name

    convolutional, tokens = becomes(kind("residual")), becomes(kind("tokens"))
    assert (convolutional.rules.name, tokens.rules.name) == ("epsilon_plus_flat", "cp")
    assert "the network is made of tokens; composite=" in tokens.notes[0]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    assert chosen(lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), *head)) == "epsilon_plus_flat"
    assert chosen(lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.SiLU(), *head)) == "epsilon_gamma_flat"
    depthwise = becomes(made(lambda: nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.Conv2d(3, 6, 1), nn.ReLU(), *head)))
    assert depthwise.rules.name == "epsilon_gamma_flat"
    assert "depthwise" in depthwise.notes[0]
    told = becomes(kind("mixed"), bias=False, epsilon=0.01)
    assert (told.rules.bias, told.rules.epsilon) == (False, 0.01)
    assert hash(composite("auto", epsilon=0.1)) == hash(composite("auto", epsilon=0.1))
    with pytest.raises(errors.UnknownName, match="did you mean epsilon_plus"):
        composite("epsilon_pluss")
