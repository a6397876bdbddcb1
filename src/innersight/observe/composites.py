"""Tables of backward rules: layer-wise relevance propagation, guided backprop and their like.

Bach et al., On Pixel-Wise Explanations by Layer-Wise Relevance Propagation, 2015; Montavon et al., Layer-Wise Relevance
Propagation: An Overview, 2019 (composites, gamma); Ali et al., XAI for Transformers, 2022 (softmax and norms as
constants); Achtibat et al., AttnLRP, 2024; Springenberg et al., Striving for Simplicity, 2015 (guided backprop); Zeiler
and Fergus, Visualizing and Understanding Convolutional Networks, 2014 (deconvolution); Zhang et al., Top-down Neural
Attention by Excitation Backprop, 2016.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from innersight import errors
from innersight.observe.observer import Const, Node, Recording
from innersight.observe.surrogates import (
    CONSTANT,
    CONVOLUTIONS,
    OWN,
    PRODUCTS,
    Entry,
    Linear,
    Op,
    Rules,
    Side,
    Surrogate,
    Terms,
    Way,
    affine_of,
    linear_map,
    measured,
    statistics,
    surrogate,
)

# ---------------------------------------------------------------------------------------------------------------------
# Linear maps


def _signed(value: torch.Tensor) -> torch.Tensor:
    """1 or -1; zero counts as positive."""
    return torch.where(value < 0, -1.0, 1.0).to(value)


def _parts(linear: Linear, x: torch.Tensor, positive: bool = True) -> torch.Tensor:
    """What all positive (or all negative) products of an input and a weight sum to, without the bias."""
    up, down = linear.weight.clamp(min=0), linear.weight.clamp(max=0)
    if not positive:
        up, down = down, up
    out = linear.call(x.clamp(min=0), up)
    return out + linear.call(x.clamp(max=0), down) if bool((x.detach() < 0).any()) else out


def _bias(op: Op, linear: Linear, positive: bool | None = None) -> torch.Tensor | float:
    """The bias, if biases take part; its positive or negative part."""
    if linear.bias is None or not op.rules.bias:
        return 0.0
    return linear.bias if positive is None else linear.bias.clamp(min=0) if positive else linear.bias.clamp(max=0)


def _terms(z: torch.Tensor, through: torch.Tensor, bias: torch.Tensor | float, rest: str = "epsilon") -> Terms:
    terms = {"input": through, rest: z - through.detach() - bias}
    return terms if isinstance(bias, float) else terms | {"bias": bias}


@surrogate
def epsilon(op: Op) -> Terms:
    """By contribution, less what epsilon takes where a sum is small."""
    linear, x = op.linear, op.inputs[0]
    assert linear is not None
    through = linear.call(x, linear.weight)
    bias = 0.0 if linear.bias is None else linear.bias
    z = through.detach() + bias
    keep = z.abs() / (z.abs() + op.rules.epsilon) if op.rules.epsilon else torch.ones_like(z)
    terms = {"input": through * keep, "epsilon": z * (1 - keep)}
    return terms if isinstance(bias, float) else terms | {"bias": bias * keep}


@surrogate
def zplus(op: Op) -> Terms:
    """By positive contributions alone."""
    linear, x = op.linear, op.inputs[0]
    assert linear is not None
    with torch.no_grad():
        z = linear(x)
    through, bias = _parts(linear, x), _bias(op, linear, positive=True)
    scale = z / (through.detach() + bias + op.rules.epsilon)
    if isinstance(bias, torch.Tensor):
        return _terms(z, through * scale, bias * scale)
    alone = z * (through.detach() == 0) if linear.bias is not None else 0.0  # a sum that is nothing but its bias
    return _terms(z, through * scale, alone)


@surrogate
def alpha_beta(op: Op) -> Terms:
    """alpha times by positive contributions, less beta times by negative ones.

    A sum without negative parts takes nothing back: it passes alpha times what it has.
    """
    linear, x, rules = op.linear, op.inputs[0], op.rules
    assert linear is not None
    with torch.no_grad():
        z = linear(x)
    up, down = _parts(linear, x), _parts(linear, x, positive=False)
    up_bias, down_bias = _bias(op, linear, True), _bias(op, linear, False)
    up_scale = rules.alpha * z / (up.detach() + up_bias + rules.epsilon)
    down_scale = rules.beta * z / (down.detach() + down_bias - rules.epsilon)
    bias = up_bias * up_scale - down_bias * down_scale if isinstance(up_bias, torch.Tensor) else 0.0
    return _terms(z, up * up_scale - down * down_scale, bias, "other")


@surrogate
def gamma(op: Op) -> Terms:
    """By contribution, those with the sign of the sum counting 1 + gamma times."""
    linear, x, g = op.linear, op.inputs[0], op.rules.gamma
    assert linear is not None
    through = linear.call(x, linear.weight)
    z = through.detach() if linear.bias is None else through.detach() + linear.bias
    up = _parts(linear, x)
    more = torch.where(z > 0, up, through - up)  # what is not positive is negative, and the greater part where z < 0
    own = _bias(op, linear)
    bias: torch.Tensor | float = 0.0
    if isinstance(own, torch.Tensor):
        bias = own + g * torch.where(z > 0, own.clamp(min=0), own.clamp(max=0))
    through = through + g * more
    total = through.detach() + bias
    scale = z / (total + op.rules.epsilon * _signed(total))
    return _terms(z, through * scale, bias * scale if isinstance(bias, torch.Tensor) else bias)


@surrogate
def contrast(op: Op) -> Terms:
    """By positive contributions, less by those that would be positive were the weights negated: evidence of its own."""
    linear, x, small = op.linear, op.inputs[0], op.rules.epsilon
    assert linear is not None
    with torch.no_grad():
        z = linear(x)
    up, down = _parts(linear, x), _parts(linear, x, positive=False)
    return _terms(z, up * (z / (up.detach() + small)) - down * (z / (down.detach() - small)), 0.0, "other")


# -- the first layer: relevance goes to the grain


def _at_first(op: Op) -> tuple[Side, Linear]:
    linear = op.linear
    assert op.side is not None
    assert linear is not None
    return op.side, linear


def _first(op: Op, spread: torch.Tensor, total: torch.Tensor) -> Terms:
    """`spread`, a function of the grain, shares out what `total` was divided by."""
    linear = op.linear
    assert linear is not None
    with torch.no_grad():
        z = linear(op.inputs[0])
        divisor = total + op.rules.epsilon * _signed(total)
    return {"input": spread * (z / divisor), "epsilon": z * (1 - total / divisor)}


@surrogate
def flat(op: Op) -> Terms:
    """The same for each pixel that is read."""
    side, linear = _at_first(op)
    ones = torch.ones_like(linear.weight)
    return _first(op, linear.call(side.grain, ones), linear.call(side.inside, ones))


@surrogate
def w2(op: Op) -> Terms:
    """By the squares of the weights, whatever the picture is."""
    side, linear = _at_first(op)
    squares = linear.weight.square()
    return _first(op, linear.call(side.grain, squares), linear.call(side.inside, squares))


@surrogate
def zbox(op: Op) -> Terms:
    """By contribution, counted from the end of the picture's range that speaks most against it."""
    side, linear = _at_first(op)
    x, weight = op.inputs[0].detach(), linear.weight
    up, down = weight.clamp(min=0), weight.clamp(max=0)

    def spread(grain: torch.Tensor | float) -> torch.Tensor:
        lowest = linear.call(side.low * grain, up) + linear.call(side.high * grain, down)
        return linear.call(x * grain, weight) - lowest

    return _first(op, spread(side.grain), spread(1.0).detach())


# ---------------------------------------------------------------------------------------------------------------------
# Everything else


@surrogate
def affine(op: Op) -> Terms:
    """A sum: constants that are added keep their share."""
    out = op(*op.inputs)
    with torch.no_grad():
        constants = op(*[torch.zeros_like(i) for i in op.inputs])
    return {"input": out - constants, "constant": constants}


def additive(op: Op) -> Way | Surrogate:
    """A sum is its own rule, unless constants are among what is added."""
    operands = op.args[0] if op.args and isinstance(op.args[0], (tuple, list)) else op.args[:2]
    operands = [*operands, *(op.kwargs.get(k) for k in ("input", "other", "tensors", "value") if k in op.kwargs)]
    plain = [o for o in operands if isinstance(o, (torch.Tensor, float, int)) and not isinstance(o, bool)]
    return affine if any(isinstance(o, torch.Tensor) or o != 0 for o in plain) else OWN


def padding(op: Op) -> Way | Surrogate:
    value = op.arg(2 if op.name == "constant_pad_nd" else 3, "value", None)
    return affine if value else OWN


def choosing(op: Op) -> Way | Surrogate:
    """The greater of two takes all; a constant that wins keeps it."""
    other = op.arg(1, "other")
    return winner if isinstance(other, torch.Tensor) and len(op.inputs) == 1 else OWN


def integers(op: Op) -> Way | Surrogate:
    """Integers in the place of their float twin: it has all the relevance, and rounding its share."""
    return rounding if op.varies(0, "twin") else CONSTANT


@surrogate
def rounding(op: Op) -> Terms:
    twin = op.inputs[0]
    return {"input": twin, "constant": op.output - twin.detach()}


@measured("constant")
def winner(op: Op) -> Terms:
    return op(*op.inputs)


@surrogate
def ratio(op: Op) -> Terms:
    """f(x) as x times a constant: nothing is lost. Near zero that constant is the derivative."""
    x = op.inputs[0]
    small = x.detach().abs() < 1e-6
    factor = op.output / torch.where(small, 1, x.detach())
    if bool(small.any()):
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(op(at).sum(), at)
        factor = torch.where(small, slope, factor)
    return x * factor.detach()


def clamped(op: Op) -> Way | Surrogate:
    return OWN if is_relu(op) else ratio


def is_relu(op: Op) -> bool:
    """Whether a clamp is max(x, 0)."""
    if op.name in ("relu", "relu_"):
        return True
    low, high = op.arg(1, "min"), op.arg(2, "max")
    if op.name == "threshold":
        low, high = op.arg(1, "threshold"), None
        return low == 0 and op.arg(2, "value") == 0
    return op.name in ("clamp", "clip", "clamp_min") and isinstance(low, (int, float)) and low == 0 and high is None


@surrogate
def half(op: Op) -> Terms:
    """A product of two signals: half of it to each."""
    first, second = op.inputs
    return (op(first, second.detach()) + op(first.detach(), second)) / 2


def product(op: Op) -> Way | Surrogate:
    if len(op.inputs) > 2:
        raise errors.Unsupported(
            f"there is no rule for a product of {len(op.inputs)} signals (layer {op.layer!r}, {op.name}); write it as "
            "products of two"
        )
    return half if len(op.inputs) == 2 else OWN


def product_and_sum(op: Op) -> Way | Surrogate:
    """A matrix product and what is added to it."""
    if op.varies(1, "batch1" if op.name == "baddbmm" else "tensor1") and len(op.inputs) > 1:
        return half_and_sum if op.varies(2, "batch2" if op.name == "baddbmm" else "tensor2") else affine
    return affine


@surrogate
def half_and_sum(op: Op) -> Terms:
    *added, first, second = op.inputs
    through = (op(*added, first, second.detach()) + op(*added, first.detach(), second)) / 2
    with torch.no_grad():
        constants = op(*[torch.zeros_like(i) for i in op.inputs])
    return {"input": through - constants, "constant": constants}


def quotient(op: Op) -> Way | Surrogate:
    """What is divided by counts as a constant."""
    return OWN if not op.varies(1, "other") else numerator if op.varies(0, "input") else CONSTANT


@surrogate
def numerator(op: Op) -> Terms:
    return op(op.inputs[0], op.inputs[1].detach())


def power(op: Op) -> Way | Surrogate:
    """x^n as x times a constant; a root, or what is below a fraction line, is a constant."""
    exponent = op.arg(1, "exponent")
    if not op.varies(0, "input") or not isinstance(exponent, (int, float)) or exponent < 1:
        return CONSTANT
    return OWN if exponent == 1 else ratio


@surrogate
def gate(op: Op) -> Terms:
    """A gated linear unit: the gate is a constant."""
    signal, by = op.inputs[0].chunk(2, op.arg(1, "dim", -1))
    return signal * by.detach().sigmoid()


# -- norms: the spread is a constant, the mean is not


def _normalized(x: torch.Tensor, dims: tuple[int, ...], eps: float) -> torch.Tensor:
    centered = x - x.mean(dims, keepdim=True)
    return centered * (centered.detach().square().mean(dims, keepdim=True) + eps).rsqrt()


def _scaled(value: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> Terms:
    value = value if weight is None else value * weight
    return value if bias is None else {"input": value, "bias": bias}


def _channels(value: Any, x: torch.Tensor) -> Any:
    return None if value is None else value.view(1, -1, *[1] * (x.dim() - 2))


@surrogate
def layer_norm(op: Op) -> Terms:
    x, shape = op.inputs[0], op.arg(1, "normalized_shape")
    dims = tuple(range(-len(shape), 0))
    return _scaled(_normalized(x, dims, op.arg(4, "eps", 1e-5)), op.arg(2, "weight"), op.arg(3, "bias"))


@surrogate
def group_norm(op: Op) -> Terms:
    x, groups = op.inputs[0], op.arg(1, "num_groups")
    parts = x.reshape(x.shape[0], groups, -1)
    value = _normalized(parts, (2,), op.arg(4, "eps", 1e-5)).reshape(x.shape)
    return _scaled(value, _channels(op.arg(2, "weight"), x), _channels(op.arg(3, "bias"), x))


@surrogate
def instance_norm(op: Op) -> Terms:
    x, weight, bias = op.inputs[0], op.arg(3, "weight"), op.arg(4, "bias")
    eps = op.arg(7, "eps", 1e-5)
    if not op.arg(5, "use_input_stats", True):
        mean, var = op.arg(1, "running_mean"), op.arg(2, "running_var")
        scale = (var + eps).rsqrt() * (1 if weight is None else weight)
        shift = -mean * scale + (0 if bias is None else bias)
        return _scaled(x, _channels(scale, x), _channels(shift, x))
    value = _normalized(x, tuple(range(2, x.dim())), eps)
    return _scaled(value, _channels(weight, x), _channels(bias, x))


@surrogate
def batch_norm(op: Op) -> Terms:
    x = op.inputs[0]
    norm = statistics(op.func, op.args, op.kwargs)
    if norm.fixed:
        scale, shift = affine_of(norm)
        return {"input": x * _channels(scale, x), "bias": _channels(shift, x)}
    value = _normalized(x, tuple(d for d in range(x.dim()) if d != 1), norm.eps)
    return _scaled(value, _channels(norm.weight, x), _channels(norm.bias, x))


def batch_norm_or_folded(op: Op) -> Way | Surrogate:
    return linear_map(op) if op.folded is not None else batch_norm


@surrogate
def rms_norm(op: Op) -> Terms:
    x, shape, weight, eps = op.inputs[0], op.arg(1, "normalized_shape"), op.arg(2, "weight"), op.arg(3, "eps")
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    dims = tuple(range(-len(shape), 0))
    return _scaled(x * (x.detach().square().mean(dims, keepdim=True) + eps).rsqrt(), weight, None)


@surrogate
def unit(op: Op) -> Terms:
    """Division by the vector's own length."""
    x = op.inputs[0].detach()
    p, dim, eps = op.arg(1, "p", 2.0), op.arg(2, "dim", 1), op.arg(3, "eps", 1e-12)
    return op.inputs[0] / x.norm(p, dim, keepdim=True).clamp(min=eps)


@measured("softmax")
def softmax(op: Op) -> Terms:
    """The plain gradient, which in terms of G is the rule of AttnLRP."""
    return op(*op.inputs)


@measured("other")
def plain(op: Op) -> Terms:
    """The plain gradient; what it does not keep is booked."""
    return op(*op.inputs)


@surrogate
def at_the_logits(op: Op) -> Terms:
    """Probabilities stand for the scores they are made from."""
    x = op.inputs[0]
    return {"input": x, "other": op.output - x.detach()}


# ---------------------------------------------------------------------------------------------------------------------
# The tables

_HOMOGENEOUS = """
    contiguous clone to float double half bfloat16 type type_as cpu cuda copy copy_ detach alias data real requires_grad
    lift_fresh dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout native_dropout
    view view_as reshape reshape_as flatten unflatten ravel _unsafe_view unsafe_view permute transpose swapaxes swapdims
    t T mT H mH adjoint movedim moveaxis squeeze unsqueeze expand expand_as broadcast_to repeat tile repeat_interleave
    roll flip fliplr flipud rot90 unbind chunk split split_with_sizes tensor_split unsafe_chunk unsafe_split hsplit
    vsplit dsplit getitem setitem select narrow slice index_select gather take_along_dim take masked_select index_put
    index_add index_copy scatter scatter_add diagonal diag diag_embed tril triu unfold fold im2col col2im as_strided
    pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle view_as_real view_as_complex
    relu leaky_relu prelu rrelu abs neg positive mean sum nansum nanmean amax amin median sort topk cumsum
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d lp_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d _adaptive_avg_pool2d fractional_max_pool2d max_unpool2d interpolate upsample upsample_nearest
    upsample_bilinear grid_sample zero fill nan_to_num roi_align ps_roi_align roi_pool
    fft ifft fft2 ifft2 fftn ifftn rfft irfft rfft2 irfft2 fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_rfft fft_irfft
    """  # fmt: skip
_CONSTANTS = """
    sigmoid hardsigmoid log_sigmoid logsigmoid softplus exp exp2 log log2 log10 sqrt rsqrt reciprocal var std var_mean
    std_mean norm vector_norm linalg_vector_norm matrix_norm linalg_norm logsumexp cos sign floor ceil round trunc
    argmax argmin argsort eq ne lt le gt ge logical_and logical_or logical_not logical_xor isnan isfinite isinf cdist
    cosine_similarity pairwise_distance log_softmax softmin count_nonzero any all floordiv floor_divide remainder fmod
    int long bool one_hot histc searchsorted bucketize heaviside expit
    """
_RATIOS = """
    gelu silu swish hardswish mish elu selu celu tanh relu6 hardtanh softsign softshrink hardshrink tanhshrink
    sin sinh asinh atan erf local_response_norm square
    """


def _same(names: str, entry: Entry) -> dict[str, Entry]:
    return dict.fromkeys(names.split(), entry)


RELEVANCE: Mapping[str, Entry] = {
    **_same(_HOMOGENEOUS, OWN),
    **_same(_CONSTANTS, CONSTANT),
    **_same(_RATIOS, ratio),
    **_same(" ".join([*CONVOLUTIONS, *PRODUCTS]), linear_map),
    **_same("add sub rsub cat concat concatenate stack hstack vstack dstack subtract", additive),
    **_same("where masked_fill masked_scatter", affine),
    **_same("addcmul baddbmm", product_and_sum),
    **_same("pad constant_pad_nd", padding),
    **_same("maximum minimum fmax fmin max min", choosing),
    **_same("clamp clip clamp_min clamp_max threshold", clamped),
    **_same("mul multiply dot mv bilinear", product),
    **_same("div divide true_divide", quotient),
    **_same("pow float_power", power),
    "exact": integers,
    "glu": gate,
    "layer_norm": layer_norm,
    "group_norm": group_norm,
    "instance_norm": instance_norm,
    "batch_norm": batch_norm_or_folded,
    "rms_norm": rms_norm,
    "normalize": unit,
    "softmax": CONSTANT,
}
ATTENTION: Mapping[str, Entry] = {**RELEVANCE, "softmax": softmax}


# -- rectifiers


@surrogate
def guided(op: Op) -> Terms:
    """The gradient, where it and the input are positive."""
    return op(*op.inputs) * (op.multiplier > 0)


@surrogate
def deconvolution(op: Op) -> Terms:
    """The gradient that arrives, where it is positive, whatever the input was."""
    return op.inputs[0] * (op.multiplier > 0)


def _rectifiers(rule: Surrogate) -> dict[str, Entry]:
    def clamped(op: Op) -> Way | Surrogate:
        return rule if is_relu(op) or op.arg(1, "min") == 0 else OWN

    def bounded(op: Op) -> Way | Surrogate:
        return rule if op.arg(1, "min_val", -1.0) == 0 else OWN

    return {**_same("relu relu6", rule), **_same("clamp clip clamp_min threshold", clamped), "hardtanh": bounded}


GUIDED = Rules("guided backprop", _rectifiers(guided), OWN, fold=False, books=False, meets="guided")
DECONVOLUTION = Rules("deconvolution", _rectifiers(deconvolution), OWN, fold=False, books=False, meets="deconvolution")

# ---------------------------------------------------------------------------------------------------------------------
# Composites


def _composite(name: str, conv: Surrogate, dense: Surrogate, first: Surrogate | None = None, **options: Any) -> Rules:
    return Rules(name, RELEVANCE, None, conv, dense, first, ends=at_the_logits, **options)


COMPOSITES: Mapping[str, Rules] = {
    rules.name: rules
    for rules in (
        _composite("epsilon", epsilon, epsilon),
        _composite("epsilon_plus", zplus, epsilon),
        _composite("epsilon_plus_flat", zplus, epsilon, flat),
        _composite("epsilon_plus_w2", zplus, epsilon, w2),
        _composite("epsilon_gamma", gamma, epsilon),
        _composite("epsilon_gamma_flat", gamma, epsilon, flat),
        _composite("epsilon_gamma_box", gamma, epsilon, zbox),
        _composite("epsilon_alpha2_beta1", alpha_beta, epsilon),
        _composite("epsilon_alpha2_beta1_flat", alpha_beta, epsilon, flat),
        _composite("zplus", zplus, zplus),
        _composite("alpha2_beta1", alpha_beta, alpha_beta),
        _composite("gamma", gamma, gamma),
        _composite("cp", gamma, gamma),
        replace(_composite("attnlrp", gamma, epsilon), table=ATTENTION),
    )
}
EXCITATION = _composite("excitation backprop", zplus, zplus, flat, epsilon=1e-12, bias=False)
CONTRASTIVE = replace(EXCITATION, name="contrastive excitation backprop", last=contrast)


def composite(name: str, **options: Any) -> Rules:
    """The composite of that name, "auto" for one that fits the network; `options` are fields of `Rules`."""
    if name == "auto":
        return _ByArchitecture("auto", RELEVANCE, given=tuple(sorted(options.items())))
    if name not in COMPOSITES:
        raise errors.unknown("composite", name, ["auto", *COMPOSITES])
    return replace(COMPOSITES[name], **options)


_SIGNED = frozenset("gelu silu elu selu celu mish hardswish leaky_relu prelu rrelu tanh softsign swish glu".split())


@dataclass(frozen=True)
class _ByArchitecture(Rules):
    """Becomes one of the composites when it sees the network.

    The rule of positive contributions divides by what may be nothing where a negative sum is passed on, by activations
    that are not rectifiers or by layers without one (the bottlenecks of depthwise networks): benchmarks/books.py.
    """

    given: tuple[tuple[str, Any], ...] = ()

    def choose(self, recording: Recording) -> tuple[Rules, str]:
        convolutions = [n for n in recording.nodes if n.op in CONVOLUTIONS]
        dense = [n for n in recording.nodes if n.op == "linear"]
        tokens = len(dense) > 3 and any(len(n.shape) > 2 for n in dense)
        if tokens and all(map(_is_patch_embedding, convolutions)):
            name, why = "cp", "the network is made of tokens"
        elif any(map(_is_depthwise, convolutions)):
            name, why = "epsilon_gamma_flat", "the network has depthwise convolutions"
        elif signed := next((n.op for n in recording.nodes if n.op in _SIGNED), ""):
            name, why = "epsilon_gamma_flat", f"the network passes negative values on ({signed})"
        else:
            name, why = "epsilon_plus_flat", "the network is made of convolutions and rectifiers"
        return composite(name, **dict(self.given)), f"composite {name}, since {why}; composite= changes it"


def _weight_shape(node: Node) -> tuple[int, ...]:
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    return weight.shape if isinstance(weight, Const) else ()


def _is_depthwise(node: Node) -> bool:
    groups = node.kwargs.get("groups", node.args[6] if len(node.args) > 6 else 1)
    shape = _weight_shape(node)
    return isinstance(groups, int) and groups > 1 and len(shape) > 2 and shape[1] == 1


def _is_patch_embedding(node: Node) -> bool:
    stride = node.kwargs.get("stride", node.args[3] if len(node.args) > 3 else 1)
    kernel = _weight_shape(node)[2:]
    strides = tuple(stride) if isinstance(stride, (tuple, list)) else (stride,) * len(kernel)
    return bool(kernel) and max(kernel) > 1 and (strides * len(kernel))[: len(kernel)] == kernel
