"""Which layer of one network is which of another: by name, by order between names, then by what they answer.

Two files of one network rarely list the same layers: a converter folds BatchNorm and ReLU into the convolution before
them, names gain prefixes and operation types, axes turn. So layers are taken in blocks, a layer that computes and the
elementwise ones behind it that nobody else reads, and of two blocks the values at the same place are paired: behind the
activation, and in front of it. Only equal shapes are paired. `align` looks at names, kinds and shapes; `match_channels`
and `same_values` at sampled values.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

_FAMILIES = {
    "conv": "conv conv1d conv2d conv3d convtranspose2d conv2dtranspose conv_transpose2d transpose_conv convtranspose "
            "conv_2d depthwise_conv_2d depthwiseconv2d depthwise_conv2d separableconv2d qlinearconv convinteger",
    "linear": "linear dense gemm matmul fully_connected innerproduct addmm qlinearmatmul einsum einsumdense",
    "norm": "batch_norm batchnorm batchnorm1d batchnorm2d batchnormalization layer_norm layernorm layernormalization "
            "group_norm groupnorm groupnormalization instance_norm instancenorm2d instancenormalization "
            "local_response_norm lrn rms_norm frozenbatchnorm2d batchnormact2d",
    "activation": "relu relu6 relu_ relu6_ hardtanh hardtanh_ clip clamp clamp_ leaky_relu leakyrelu prelu elu selu "
                  "celu gelu silu silu_ swish mish hardswish hard_swish hardsigmoid hard_sigmoid sigmoid logistic tanh "
                  "softplus activation relu_n1_to_1 thresholdedrelu rectifier",
    "same": "dropout dropout_ dropout2d identity quantize dequantize quantizelinear dequantizelinear fake_quantize "
            "gaussiannoise spatialdropout2d contiguous clone cast",
    "pool": "max_pool2d maxpool2d maxpool maxpooling2d max_pool_2d avg_pool2d avgpool2d averagepool averagepooling2d "
            "average_pool_2d",
    "global pool": "adaptive_avg_pool2d adaptiveavgpool2d globalaveragepool globalaveragepooling2d mean reducemean "
                   "adaptive_max_pool2d adaptivemaxpool2d globalmaxpool globalmaxpooling2d reduce_max",
    "add": "add add_ iadd sum",
    "mul": "mul mul_ multiply",
    "cat": "cat concat concatenate concatenation",
    "softmax": "softmax log_softmax logsoftmax",
    "shape": "reshape flatten squeeze transpose permute view unsqueeze expand",
    "pad": "pad zeropadding2d zeropad2d padv2 mirror_pad",
    "input": "input inputlayer",
}  # fmt: skip
_FAMILY = {kind: family for family, kinds in _FAMILIES.items() for kind in kinds.split()}
_FOLLOWS = ("norm", "activation", "same")  # elementwise: a converter may fold it into what it reads


def family(kind: str) -> str:
    """What kind of layer this is, whatever the library calls it: Conv2d, CONV_2D and Conv are "conv"; "" if unknown."""
    return _FAMILY.get(kind.lower().removeprefix("aten::"), "")


@dataclass(frozen=True)
class Place:
    """A layer as the alignment sees it.

    shape:   of one image's value with its channels first: (C, H, W), (C, T), (C,)
    inputs:  the listed layers that it reads, views passed over
    outside: whether something beside listed layers reads it (the network's answer)
    known:   whether it is known what it reads; of a file of tensors it is not
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    inputs: tuple[str, ...] = ()
    outside: bool = False
    known: bool = True

    @property
    def family(self) -> str:
        return family(self.kind)


@dataclass
class Pair:
    """Two layers that are taken for the same.

    how:      in words
    order:    for each channel of a, which of b; None: as they stand
    match:    the mean correlation of their channels over the sample, so ordered; None: not looked at
    standing: the same with channels as they stand, where they were reordered
    """

    a: Place
    b: Place
    how: str
    order: tuple[int, ...] | None = None
    match: float | None = None
    standing: float | None = None


@dataclass
class Alignment:
    """The pairs in a's order, and what has no partner: (name, why)."""

    pairs: list[Pair] = field(default_factory=list)
    only_a: list[tuple[str, str]] = field(default_factory=list)
    only_b: list[tuple[str, str]] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------------------------------
# Names


# What exporters append to say which operation of a layer it is. Without it the layer's own name is left.
_OPERATION = re.compile(
    r"(conv2d|conv|conv2d_fold|depthwise|depthwise_fold|biasadd|fusedbatchnormv3|batchnorm|batchnormalization|matmul|gemm"
    r"|relu6?|add_fold|clip|avgpool|maxpool|averagepool|globalaveragepool|mean|softmax|convolution|readvariableop|resource|activation)(_\d+)?"
)
_WRAPPER = re.compile(
    r"statefulpartitionedcall(_\d+)?|model(_\d+)?|functional(_\d+)?|sequential(_\d+)?|main|module|net"
)


def spellings(name: str) -> list[str]:
    """A layer's name as other libraries may spell it, the surest first.

    >>> spellings("/layer1/layer1.0/conv1/Conv")
    ['/layer1/layer1.0/conv1/Conv', 'layer1.0.conv1.conv', 'layer1.0.conv1']
    >>> spellings("model/conv1/Conv2D;model/re_lu/Relu")[1:]
    ['model.conv1.conv2d', 'conv1.conv2d', 'conv1', 'model.re_lu.relu', 're_lu.relu', 're_lu']
    """
    found = [name]
    for part in name.split(";"):
        path = [word for word in re.sub(r":\d+$", "", part.strip()).lower().split("/") if word]
        while len(path) > 1 and _WRAPPER.fullmatch(path[0]):
            found.append(".".join(path))
            path = path[1:]
        words: list[str] = []
        for word in path:
            if words and (word == words[-1] or word.startswith(words[-1] + ".")):
                words[-1] = word  # ONNX: a module below the path of the module it is in
            else:
                words.append(word)
        found.append(".".join(words))
        while len(words) > 1 and (operation := _OPERATION.fullmatch(words[-1])):
            words = words[:-1]
            found += [".".join(words) + (operation[2] or ""), ".".join(words)]
    return [s for s in dict.fromkeys(found) if s]


# ---------------------------------------------------------------------------------------------------------------------
# Blocks


@dataclass
class _Block:
    members: list[Place]

    @property
    def families(self) -> list[str]:
        return [p.family for p in self.members if p.family != "same"]

    @property
    def signature(self) -> tuple:
        return self.members[0].family, self.members[-1].shape

    def at(self, point: str) -> Place | None:
        """The value "before" the activation, or "behind" it; None if the block has no activation."""
        first = next((i for i, p in enumerate(self.members) if i and p.family == "activation"), None)
        if point == "before":
            return self.members[-1 if first is None else first - 1]
        return None if first is None else self.members[-1]


def _blocks(places: Sequence[Place]) -> list[_Block]:
    readers: dict[str, int] = {}
    for place in places:
        for name in place.inputs:
            readers[name] = readers.get(name, 0) + 1
    of: dict[str, _Block] = {}
    blocks = []
    for place in places:
        (before,) = place.inputs if len(place.inputs) == 1 else ("",)
        block = of.get(before)
        last = block.members[-1] if block else None
        if (
            place.family in _FOLLOWS and block and last and last.name == before
            and readers[before] == 1 and not last.outside and last.shape == place.shape
        ):  # fmt: skip
            block.members.append(place)
        else:
            block = _Block([place])
            blocks.append(block)
        of[place.name] = block
    return blocks


def _paired(a: _Block, b: _Block, how: str) -> list[Pair]:
    """The members of two blocks that hold the same value."""
    if len(a.members) == len(b.members) and (a.families == b.families or len(a.members) == 1):
        return [Pair(p, q, how) for p, q in zip(a.members, b.members, strict=True)]
    before, behind = (a.at("before"), b.at("before")), (a.at("behind"), b.at("behind"))
    assert before[0]
    assert before[1]
    if behind[0] and behind[1]:
        return [Pair(before[0], before[1], _folded(how, a, b)), Pair(behind[0], behind[1], how)]
    if behind[0] or behind[1]:
        return [Pair(behind[0] or before[0], behind[1] or before[1], _folded(how, a, b))]
    return [Pair(before[0], before[1], _folded(how, a, b))]


def _folded(how: str, a: _Block, b: _Block) -> str:
    for longer, shorter, which in ((a, b, "b"), (b, a, "a")):
        if len(longer.members) > len(shorter.members):
            more = [p.name for p in longer.members[1:] if p.family not in [q.family for q in shorter.members[1:]]]
            return f"{how}; {which} has {', '.join(more)} folded in" if more else how
    return how


# ---------------------------------------------------------------------------------------------------------------------
# Alignment by names and order


def align(a: Sequence[Place], b: Sequence[Place]) -> Alignment:
    """Pairs of layers of two networks, each in the order it runs, by names, kinds and shapes."""
    known = all(p.known for p in (*a, *b))  # of tensors by name nothing is folded into anything
    blocks_a, blocks_b = (_blocks(places) if known else [_Block([p]) for p in places] for places in (a, b))
    found: dict[int, tuple[int, str]] = {}  # block of a -> block of b, how
    why: dict[str, str] = {}  # layer without a counterpart -> the reason, where it is known
    _by_name(blocks_a, blocks_b, found, why)
    _by_order(blocks_a, blocks_b, found)
    result = Alignment()
    for i, (j, how) in sorted(found.items()):
        pairs = [p for p in _paired(blocks_a[i], blocks_b[j], how) if p.a.shape == p.b.shape]
        result.pairs += pairs
        if pairs:
            whole = pairs[0].b.name, pairs[0].a.name
            for members, name, which in ((blocks_a[i].members, whole[0], "b"), (blocks_b[j].members, whole[1], "a")):
                why |= {p.name: f"{which} computes it in one with {name}" for p in members if p.name not in why}
    _list_left(result, a, b, why)
    return result


def _list_left(result: Alignment, a: Sequence[Place], b: Sequence[Place], why: dict[str, str]) -> None:
    there_a, there_b = {p.a.name for p in result.pairs}, {p.b.name for p in result.pairs}
    shapes_a, shapes_b = ({p.shape for p in places} for places in (a, b))
    result.pairs.sort(key=lambda p: [x.name for x in a].index(p.a.name))
    result.only_a = [(p.name, why.get(p.name) or _why(p, shapes_b)) for p in a if p.name not in there_a]
    result.only_b = [(p.name, why.get(p.name) or _why(p, shapes_a)) for p in b if p.name not in there_b]


def _why(place: Place, shapes: Iterable[tuple[int, ...]]) -> str:
    size = "x".join(map(str, place.shape))
    if place.shape not in shapes:
        return f"no layer of shape {size} in the other"
    return f"no counterpart of {place.kind or 'shape'} {size} by name, order or values"


def _fits(a: _Block, b: _Block) -> bool:
    fa, fb = a.members[0].family, b.members[0].family
    return a.members[-1].shape == b.members[-1].shape and (fa == fb or not fa or not fb)


def _by_name(
    blocks_a: list[_Block], blocks_b: list[_Block], found: dict[int, tuple[int, str]], clashes: dict[str, str]
) -> None:
    """Blocks of which a member has the same name, then a name that can be spelt the same."""
    depth = 1
    spelt_a = [[spellings(p.name) for p in block.members] for block in blocks_a]
    spelt_b = [[spellings(p.name) for p in block.members] for block in blocks_b]
    while depth <= max((len(s) for block in (*spelt_a, *spelt_b) for s in block), default=0):
        taken = {j for j, _ in found.values()}
        index: dict[str, list[int]] = {}
        for j, members in enumerate(spelt_b):
            if j not in taken:
                for s in {s for spelt in members for s in spelt[:depth]}:
                    index.setdefault(s, []).append(j)
        for i, members in enumerate(spelt_a):
            if i in found:
                continue
            for s in (s for spelt in members for s in spelt[:depth]):
                there = [j for j in index.get(s, ()) if j not in taken]
                fitting = [j for j in there if _fits(blocks_a[i], blocks_b[j])]
                if len(fitting) == 1:
                    j = fitting[0]
                    same = any(p.name == q.name for p in blocks_a[i].members for q in blocks_b[j].members)
                    found[i] = j, "same name" if same else f"name, spelt {s!r} in both"
                    taken.add(j)
                    break
                if there and depth == 1:
                    clashes |= _clashes(blocks_a[i], blocks_b[there[0]])
        depth += 1


def _clashes(a: _Block, b: _Block) -> dict[str, str]:
    """Layers of one name and two shapes."""
    shapes = {p.name: p.shape for p in b.members}
    found = {}
    for p in a.members:
        if p.name in shapes and p.shape != shapes[p.name]:
            sizes = ["x".join(map(str, shape)) for shape in (p.shape, shapes[p.name])]
            found[p.name] = f"{p.name!r} is {sizes[0]} in a and {sizes[1]} in b"
    return found


def _by_order(blocks_a: list[_Block], blocks_b: list[_Block], found: dict[int, tuple[int, str]]) -> None:
    """Between layers that are aligned by name: those of the same kind and shape, in the same order."""
    anchors = _increasing([(i, j) for i, (j, _) in sorted(found.items())])
    taken = {j for j, _ in found.values()}
    bounds = [(-1, -1), *anchors, (len(blocks_a), len(blocks_b))]
    for (i0, j0), (i1, j1) in pairwise(bounds):
        rows = [i for i in range(i0 + 1, i1) if i not in found]
        columns = [j for j in range(j0 + 1, j1) if j not in taken]
        for i, j in _common(rows, columns, lambda i, j: _fits(blocks_a[i], blocks_b[j])):
            between = [blocks_a[k].members[-1].name for k in (i0, i1) if 0 <= k < len(blocks_a)]
            where = f" between {' and '.join(between)}" if len(between) == 2 else ""
            what = "order, kind and shape" if blocks_a[i].members[0].family and blocks_b[j].members[0].family else (
                "order and shape"
            )  # fmt: skip
            found[i] = j, f"{what}{where}"
            taken.add(j)


def _increasing(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The longest part of pairs, sorted by the first, in which the second rises too."""
    ends: list[int] = []
    at: list[int] = []
    before: list[int] = []
    for k, (_, j) in enumerate(pairs):
        place = bisect_left(ends, j)
        ends[place:] = [j]
        before.append(at[place - 1] if place else -1)
        at[place:] = [k]
    out = []
    k = at[-1] if at else -1
    while k >= 0:
        out.append(pairs[k])
        k = before[k]
    return out[::-1]


def _common(rows: Sequence[int], columns: Sequence[int], fits: Callable[[int, int], bool]) -> list[tuple[int, int]]:
    """The longest common subsequence of two runs of blocks."""
    n, m = len(rows), len(columns)
    best = np.zeros((n + 1, m + 1), int)
    same = np.array([[fits(i, j) for j in columns] for i in rows], bool).reshape(n, m)
    for i in range(n - 1, -1, -1):
        for j in range(m - 1, -1, -1):
            best[i, j] = max(best[i + 1, j], best[i, j + 1], best[i + 1, j + 1] + 1 if same[i, j] else 0)
    out, i, j = [], 0, 0
    while i < n and j < m:
        if same[i, j] and best[i, j] == best[i + 1, j + 1] + 1:
            out.append((rows[i], columns[j]))
            i, j = i + 1, j + 1
        elif best[i + 1, j] >= best[i, j + 1]:
            i += 1
        else:
            j += 1
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Alignment by values


SURE = 0.9  # correlation from which two channels count as the same one
OWN = 0.7  # and from which nobody looks for another
AFFORDED = 20_000_000_000  # multiplications for finding channels in layers that are left over
FEWEST = 16  # values of a channel below which a correlation says nothing


def standardised(values: np.ndarray) -> np.ndarray:
    """Rows (C, n) with mean 0 and length 1; constant rows are zero."""
    x = values.astype(np.float64)
    x = x - x.mean(1, keepdims=True)
    length = np.sqrt((x * x).sum(1, keepdims=True))
    floor = 1e-7 * np.abs(values).max(1, keepdims=True, initial=0) * np.sqrt(values.shape[1])
    return np.divide(x, length, out=np.zeros_like(x), where=length > floor)


def same_values(a: np.ndarray, b: np.ndarray) -> float | None:
    """The mean correlation of channels as they stand, (C, n) each; None if no channel of both varies."""
    p, q = standardised(a), standardised(b)
    live = p.any(1) | q.any(1)
    return float((p * q).sum(1)[live].mean()) if live.any() and a.shape[1] > 1 else None


def by_values(
    aligned: Alignment,
    left_a: Sequence[Place],
    left_b: Sequence[Place],
    sample_a: dict[str, np.ndarray],
    sample_b: dict[str, np.ndarray],
    images: int,
    reorder: bool,
) -> None:
    """Pair what names and order left over, or paired with something else, by what it answers in the sample (C, n).

    Two layers are the same if they have one shape, their channels (in some order) correlate by 0.9 in the mean, and the
    difference holds less than a fifth of the energy: scores and their softmax are not. Of few values, whose correlation
    says nothing, the difference must be below a hundredth.
    """
    weak = [
        p
        for p in aligned.pairs
        if p.match is None or p.match < OWN or _agreement(p, sample_a[p.a.name], sample_b[p.b.name]) < 0.5
    ]
    free_a = {p.name: p for p in [*left_a, *(w.a for w in weak)] if p.name in sample_a}
    free_b = {p.name: p for p in [*left_b, *(w.b for w in weak)] if p.name in sample_b}
    norms_a, norms_b = (
        {name: np.sort(np.linalg.norm(samples[name].astype(np.float64), axis=1)) for name in free}
        for samples, free in ((sample_a, free_a), (sample_b, free_b))
    )
    paired = {w.a.name for w in weak} | {w.b.name for w in weak}  # whose channels have been looked at already
    candidates, cost = [], 0
    for p in free_a.values():
        for q in free_b.values():
            if p.shape != q.shape:
                continue
            x, y = sample_a[p.name], sample_b[q.name]
            if np.square(norms_a[p.name] - norms_b[q.name]).sum() > 0.2 * np.square(norms_a[p.name]).sum():
                continue  # in no order of the channels can they be near enough
            cost += len(x) ** 2 * x.shape[1]
            moved = reorder and p.name not in paired and q.name not in paired and cost < AFFORDED
            order, match = match_channels(x, y) if moved else (None, same_values(x, y))
            found = Pair(p, q, "", order, match)
            agreement = _agreement(found, x, y)
            if agreement >= 0.99 or (x.shape[1] >= FEWEST and match is not None and match >= SURE and agreement >= 0.8):
                candidates.append((agreement, found))
    for agreement, c in sorted(candidates, key=lambda found: -found[0]):
        if c.a.name not in free_a or c.b.name not in free_b:
            continue
        before = [w for w in weak if w in aligned.pairs and (w.a.name == c.a.name or w.b.name == c.b.name)]
        held = max((_agreement(w, sample_a[w.a.name], sample_b[w.b.name]) for w in before), default=0.0)
        if held >= agreement:  # it is that pair, or no better
            continue
        alike = "" if c.match is None else f": correlation {c.match:.3f}"
        c.how = f"values{alike} over {images} image{'s' * (images != 1)}"
        for w in before[:1]:
            c.how += f"; by {w.how} it would be {w.a.name} and {w.b.name}, which differ"
        if c.order is not None:
            c.how += "; channels of b matched by correlation"
        aligned.pairs = [w for w in aligned.pairs if w not in before] + [c]
        for w in before:  # what lost its partner is free again
            aligned.only_a += [(w.a.name, "its namesake answers as another layer does")] * (w.a.name != c.a.name)
            aligned.only_b += [(w.b.name, "its namesake answers as another layer does")] * (w.b.name != c.b.name)
        aligned.only_a = [(n, why) for n, why in aligned.only_a if n != c.a.name]
        aligned.only_b = [(n, why) for n, why in aligned.only_b if n != c.b.name]
        del free_a[c.a.name], free_b[c.b.name]


def _agreement(pair: Pair, x: np.ndarray, y: np.ndarray) -> float:
    """One less the difference's share of the energy, over a sample of both (C, n)."""
    y = y if pair.order is None else y[list(pair.order)]
    energy, noise = (float(np.square(v, dtype=np.float64).sum()) for v in (x, x - y))
    return 1 - noise / energy if energy else 0.0


def match_channels(a: np.ndarray, b: np.ndarray) -> tuple[tuple[int, ...] | None, float | None]:
    """For each channel of a the one of b that answers the same, (C, n) each, and how well they then correlate.

    A channel that its own namesake answers as well as any other stays. The others are matched one to one, best first;
    below 0.9 none counts as found, and unless four in five are, none is moved: some always agree by chance. None: they
    stand as they should, or cannot be told apart.
    """
    own = same_values(a, b)
    if a.shape[0] < 2 or a.shape[1] < FEWEST:
        return None, own
    p, q = standardised(a), standardised(b)
    at_home, live = (p * q).sum(1), p.any(1)
    if (at_home >= OWN)[live].all():
        return None, own
    matrix = p.astype(np.float32) @ q.astype(np.float32).T
    count = len(matrix)
    order = np.full(count, -1)
    stay = np.flatnonzero(at_home >= np.minimum(SURE, matrix.max(1) - 0.1))
    order[stay] = stay
    off = live & (order < 0)
    matrix[:, stay] = -1
    if not off.any() or (matrix[off].max(1) >= SURE).mean() < 0.8:
        return None, own
    near = np.argwhere((matrix >= SURE) & (order < 0)[:, None])
    taken = set(stay.tolist())
    for i, j in near[np.argsort(-matrix[near[:, 0], near[:, 1]], kind="stable")].tolist():
        if order[i] < 0 and j not in taken:
            order[i] = j
            taken.add(j)
    if (order[off] >= 0).mean() < 0.8:
        return None, own
    left = [j for j in range(count) if j not in taken]
    for i in map(int, np.flatnonzero(order < 0)):  # nobody's: where they stand, or what is left in order
        order[i] = left.pop(left.index(i)) if i in left else -1
    for i in np.flatnonzero(order < 0):
        order[i] = left.pop(0)
    if (order == np.arange(count)).all():
        return None, own
    return tuple(int(j) for j in order), same_values(a, b[order])
