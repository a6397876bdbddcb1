"""One comparison: both networks over the same images, chunk by chunk."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from innersight import __version__, errors, storage, targets
from innersight.comparison import alignment
from innersight.comparison.alignment import Alignment, Pair, Place
from innersight.comparison.answers import Predicted, Reasons
from innersight.comparison.layers import LayerComparison, LayerTable, Sums, decibel, first, largest
from innersight.comparison.result import Comparison
from innersight.comparison.sides import Dump, Opened, Side, sides
from innersight.images import Inputs
from innersight.inquiry import Inquiry
from innersight.methods import find
from innersight.network import open as open_network
from innersight.results import Predictions, Provenance

THRESHOLD = 20.0  # dB: the noise is a tenth of the signal
PROBED = 16  # images that channels and leftover layers are matched on
PLACES = 32  # and places in each of their maps
SHOWN = 6  # channels of a layer that are kept to be looked at
KEPT = 8  # pictures whose two saliency maps are kept

Progress = Callable[[str, int, int], None]


def compare(
    a: Any,
    b: Any,
    images: Any = None,
    *,
    layers: str | Sequence[str] | None = None,
    method: str | None = "gradcam",
    target: Any = None,
    at: str | None = None,
    threshold: float = THRESHOLD,
    channels: str = "match",
    progress: Progress | None = None,
) -> Comparison:
    """How two networks differ, layer by layer, over all `images`; `a` is the reference.

    a, b:      what `innersight.open` takes, an opened Network, or tensors by name: a mapping or an .npz file, as
               `innersight.dump` or a device writes them, each (N, C, H, W), (N, H, W, C) or (N, K)
    images:    as for `Network.predict`; each network has them prepared its own way. Not needed for two dumps
    layers:    names in a (or b) to compare; default every layer that can be aligned
    method:    the saliency method that gives the reasons of both, None for none; default Grad-CAM
    target:    what the reasons are for; default the class that a predicts, in both networks
    at:        the layer of a whose maps the method reads; default the one it takes by itself
    threshold: decibel of signal to noise below which a layer counts as parted
    channels:  "match" finds channels that stand in another order in b, "index" compares them as they stand
    progress:  called with what is being done, how much of it is done, and of how much

    Raises InputError, UnknownName or Unsupported where something cannot be opened, read or compared at all.
    """
    if channels not in ("match", "index"):
        raise errors.unknown("way to pair channels", channels, ("match", "index"))
    if method is not None:
        find(method)
    side_a, side_b = sides(a, b, images)
    work = _Work(side_a, side_b, progress or (lambda *_: None), [])
    with ExitStack() as stack:
        for side in (side_a, side_b):
            stack.enter_context(side.session())
        aligned = alignment.align(side_a.places(), side_b.places())
        work.scale(aligned)
        work.refine(aligned, reorder=channels == "match")
        sums, predicted = work.measure(aligned, work.pick(aligned, layers))
        if not sums and predicted is None:
            raise errors.InputError(
                f"no layer of {side_a.name} could be aligned with one of {side_b.name}: no name, and no run of layers "
                "of the same kinds and shapes, is in both; nor can their answers be compared"
            )
        shown = work.shown(sums, predicted)
    reasons = work.reasons(aligned, predicted, method, target, at) if method is not None else None
    rows = [s.finish(shown.get(s.pair.a.name)) for s in sums]
    reads = work.reads(rows)
    return Comparison(
        a=side_a.name, b=side_b.name, layers=LayerTable({row.a: row for row in rows}),
        only_a=tuple(aligned.only_a), only_b=tuple(aligned.only_b),
        predictions=predicted, reasons=reasons, pictures=side_a.pictures or side_b.pictures or [],
        count=side_a.count, inputs_sqnr=work.inputs(), shown_picture=work.looked_at, threshold=threshold,
        divergence=first(rows, reads, threshold), largest=largest(rows, reads),
        provenance=Provenance(
            network=f"{side_a.name} and {side_b.name}", method=method, layer=None, seed=0,
            target=None if reasons is None else "; ".join(dict.fromkeys(reasons.targets)),
            options={"threshold": threshold, "channels": channels}, notes=tuple(dict.fromkeys(work.notes)),
            versions={"innersight": __version__, "torch": torch.__version__, "python": platform.python_version()},
        ),
    )  # fmt: skip


def dump(net: Any, images: Any, path: str | os.PathLike, layers: Sequence[str] | None = None) -> Path:
    """Write what every layer (or `layers`) answers to `images` into an .npz of name -> array, for `compare`.

    Arrays are float32 with channels first, (N, C, H, W) or (N, K); the file can be read by NumPy alone.
    """
    path = Path(path)
    if path.suffix.lower() != ".npz":
        raise errors.InputError(f"{path.name!r}: tensors by name are written to an .npz file")
    storage.check_place(path)
    net = open_network(net)
    side = Opened(net, net.read(images))
    names = [n for n in side.table if n not in side.odd] if layers is None else list(layers)
    net._refuse_too_much({name: side.table[name] for name in names}, side.count)
    parts: dict[str, list[np.ndarray]] = {}
    with side.session():
        size = side.size(names)
        for start in range(0, side.count, size):
            rows = range(start, min(start + size, side.count))
            for name, value in side.values(rows, names)[0].items():
                if value is not None:
                    parts.setdefault(name, []).append(value.float().cpu().numpy())
    arrays: dict[str, Any] = {name: np.concatenate(part) for name, part in parts.items() if name not in side.odd}
    if layers is not None and (odd := [name for name in names if name not in arrays]):
        raise errors.InputError(f"layer {odd[0]!r} cannot be written image by image: {side.odd[odd[0]]}")
    return storage.write_whole(path, lambda file: np.savez_compressed(file, **arrays))


def _goals(target: Any, predicted: Predicted | None, rows: range) -> list[Any]:
    """What is explained of these images in a and in b: the same class, as a logit or as a probability in both."""
    if isinstance(target, (list, np.ndarray, torch.Tensor)):
        target = list(target)[rows.start : rows.stop]
    if predicted is None:
        return [target, target]
    goals: list[Any] = [target, target]
    if target is None or isinstance(target, (str, int, list)):
        goals = list(predicted.goals(rows, target))
    kinds = predicted.a.kind, predicted.b.kind
    if kinds[0] != kinds[1] and (target is None or isinstance(target, (str, int, list))):
        goals[kinds.index("logits")] = targets.probability(goals[kinds.index("logits")])
    return goals


@dataclass
class _Work:
    """One comparison under way."""

    a: Side
    b: Side
    progress: Progress
    notes: list[str]
    looked_at: int = 0

    def __post_init__(self) -> None:
        if self.a.count != self.b.count:
            raise errors.InputError(f"{self.a.name} has {self.a.count} images and {self.b.name} {self.b.count}")
        for side, other in ((self.a, self.b), (self.b, self.a)):
            if isinstance(side, Dump):
                side.fit(other, self.notes)
        for letter, side in (("a", self.a), ("b", self.b)):
            if isinstance(side, Opened):
                self.notes += [f"{letter}: {note}" for note in (*side.net.notes, *side.inputs.notes)]
        if isinstance(self.a, Opened) and isinstance(self.b, Opened):
            sizes = [s.inputs.tensor.shape[1:] for s in (self.a, self.b)]
            if sizes[0] != sizes[1]:
                said = " and ".join("x".join(map(str, s)) for s in sizes)
                self.notes.append(
                    f"the inputs are {said}: maps are compared only where their sizes are equal, reasons on the picture"
                )

    def chunks(self, rows: Sequence[int], pairs: Sequence[Pair], what: str) -> Iterator[Any]:
        """Both networks over the images: rows, a's values, b's values, both answers, chunk by chunk."""
        names = [list(dict.fromkeys(p.a.name for p in pairs)), list(dict.fromkeys(p.b.name for p in pairs))]
        size = max(1, min(self.a.size(names[0]), self.b.size(names[1])))
        start = 0
        while start < len(rows):
            part = rows[start : start + size]
            try:
                (va, oa), (vb, ob) = self.a.values(part, names[0]), self.b.values(part, names[1])
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                size //= 2
                continue
            yield part, va, vb, oa, ob
            start += len(part)
            self.progress(what, start, len(rows))

    def inputs(self) -> float | None:
        """Signal to noise of what both networks are fed, in dB; None where that cannot be said."""
        if not (isinstance(self.a, Opened) and isinstance(self.b, Opened)):
            return None
        x, y = self.a.inputs.tensor, self.b.inputs.tensor
        if x.shape != y.shape:
            return None
        signal = noise = 0.0
        for p, q in zip(x, y, strict=True):  # one by one: a copy of all in double would be too much
            signal += float(p.double().square().sum())
            noise += float((p.double() - q.to(p.device).double()).square().sum())
        return float(decibel(signal, noise))

    # -- alignment by values

    def scale(self, aligned: Alignment) -> None:
        """Make the integers of a dump real, by what their counterparts state."""
        if isinstance(self.a, Dump):
            self.a.scale(self.b, {p.a.name: p.b.name for p in aligned.pairs}, self.notes)
        if isinstance(self.b, Dump):
            self.b.scale(self.a, {p.b.name: p.a.name for p in aligned.pairs}, self.notes)

    def refine(self, aligned: Alignment, reorder: bool) -> None:
        """Look at a sample of values: are channels in another order, does a name mislead, what is left?"""
        left_a = self._left(self.a, aligned.only_a)
        left_b = self._left(self.b, aligned.only_b)
        shapes = [{p.shape for p in side.places()} for side in (self.a, self.b)]
        names_a = [p.a.name for p in aligned.pairs] + [p.name for p in left_a if p.shape in shapes[1]]
        names_b = [p.b.name for p in aligned.pairs] + [p.name for p in left_b if p.shape in shapes[0]]
        sample_a, sample_b = self._samples(names_a, names_b)
        self._drop_odd(aligned)
        for pair in aligned.pairs:
            x, y = sample_a[pair.a.name], sample_b[pair.b.name]
            pair.match = alignment.same_values(x, y)
            if reorder:
                self._reorder(pair, x, y)
        alignment.by_values(aligned, left_a, left_b, sample_a, sample_b, min(self.a.count, PROBED), reorder)
        order = {place.name: i for i, place in enumerate(self.a.places())}
        aligned.pairs.sort(key=lambda pair: order[pair.a.name])

    def _left(self, side: Side, only: Sequence[tuple[str, str]]) -> list[Place]:
        names = {name for name, _ in only}
        return [p for p in side.places() if p.name in names]

    def _reorder(self, pair: Pair, x: np.ndarray, y: np.ndarray) -> None:
        order, match = alignment.match_channels(x, y)
        if order is not None:
            pair.order, pair.standing, pair.match = order, pair.match, match
            pair.how += "; channels of b matched by correlation"

    def _samples(self, names_a: Sequence[str], names_b: Sequence[str]) -> tuple[dict, dict]:
        """Layer -> (C, values): some places of some images, the same in both networks and in whatever order."""
        rows = self._probed()
        found: tuple[dict[str, list], dict[str, list]] = ({}, {})
        sizes = (self.a.size(names_a), self.b.size(names_b))
        size = max(1, min(sizes))
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            for side, names, kept in zip((self.a, self.b), (names_a, names_b), found, strict=True):
                values, _ = side.values(part, names)
                for name, value in values.items():
                    if value is None:
                        continue
                    v = value.flatten(2) if value.dim() > 2 else value[:, :, None]
                    at = torch.linspace(0, v.shape[2] - 1, min(PLACES, v.shape[2])).round().long().to(v.device)
                    kept.setdefault(name, []).append(v[:, :, at].float().cpu().numpy())
            self.progress("aligning", start + len(part), len(rows))
        joined = [
            {n: np.concatenate(p).transpose(1, 0, 2).reshape(p[0].shape[1], -1) for n, p in kept.items()}
            for kept in found
        ]
        for side, values_of in zip((self.a, self.b), joined, strict=True):
            for name in set(side.odd) & set(values_of):
                del values_of[name]
        return joined[0], joined[1]

    def _drop_odd(self, aligned: Alignment) -> None:
        """Take out layers whose values turned out not to be shared out among the images, as boxes of a detector."""
        aligned.pairs = [p for p in aligned.pairs if p.a.name not in self.a.odd and p.b.name not in self.b.odd]
        for side, only, paired in (
            (self.a, aligned.only_a, {p.a.name for p in aligned.pairs}),
            (self.b, aligned.only_b, {p.b.name for p in aligned.pairs}),
        ):
            known = {name for name, _ in only} | paired
            only += [(n, why) for n, why in side.odd.items() if n not in known]
            known |= set(side.odd)
            only += [(p.name, "its namesake is not comparable") for p in side.places() if p.name not in known]

    def _probed(self) -> list[int]:
        """The images that are looked at first: the same whichever order they come in."""
        if self.a.count <= PROBED:
            return list(range(self.a.count))
        side = next((s for s in (self.a, self.b) if isinstance(s, Opened)), None)
        if side is None:
            return list(range(PROBED))
        key = [hashlib.sha1(row.cpu().numpy().tobytes()).digest() for row in side.inputs.tensor]
        return sorted(sorted(range(self.a.count), key=key.__getitem__)[:PROBED])

    def pick(self, aligned: Alignment, layers: str | Sequence[str] | None) -> list[Pair]:
        """The layers that were asked for."""
        if layers is None:
            return aligned.pairs
        wanted = [layers] if isinstance(layers, str) else list(layers)
        if not wanted:
            raise errors.InputError("layers= is empty: name one or more, or leave it out for all")
        chosen = []
        why = dict([*aligned.only_b, *aligned.only_a])
        for name in wanted:
            pair = next((p for p in aligned.pairs if p.a.name == name), None)
            pair = pair or next((p for p in aligned.pairs if p.b.name == name), None)
            if pair is None and name in why:
                raise errors.InputError(f"layer {name!r} has no counterpart in the other network: {why[name]}")
            if pair is None:
                raise errors.unknown("layer", name, [p.a.name for p in aligned.pairs], " in both networks")
            chosen.append(pair)
        return [p for p in aligned.pairs if p in chosen]

    def reads(self, rows: Sequence[LayerComparison]) -> dict[str, list[str]]:
        """For each compared layer of a the nearest ones that it depends on; of a dump, as b's depends on them."""
        side, name = (
            (self.b, {r.b: r.a for r in rows}) if isinstance(self.a, Dump) else (self.a, {r.a: r.a for r in rows})
        )
        places = {p.name: p for p in side.places()}
        found: dict[str, list[str]] = {}
        for there in name:
            near: dict[str, None] = {}
            stack, seen = list(places[there].inputs), set()
            while stack:
                n = stack.pop(0)
                if n in seen:
                    continue
                seen.add(n)
                if n in name:
                    near[name[n]] = None
                elif n in places:
                    stack += places[n].inputs
            found[name[there]] = list(near)
        return found

    # -- the numbers

    def measure(self, aligned: Alignment, chosen: Sequence[Pair]) -> tuple[list[Sums], Predicted | None]:
        sums = [self._sums(p) for p in chosen]
        answers: list[list[np.ndarray]] = [[], []]
        for part, va, vb, oa, ob in self.chunks(range(self.a.count), chosen, "comparing"):
            for s in sums:
                x, y = va[s.pair.a.name], vb[s.pair.b.name]
                if x is not None and y is not None:
                    s.add(part, x, y)
            for side, output, rows in zip((self.a, self.b), (oa, ob), answers, strict=True):
                if (scores := self._scores(side, output)) is not None:
                    rows.append(scores)
        self._drop_odd(aligned)
        return [s for s in sums if s.pair in aligned.pairs], self._predicted(aligned, answers)

    def _sums(self, pair: Pair) -> Sums:
        steps = [
            ((side.net.quantisation or {}) if isinstance(side, Opened) else {}).get(name)
            for side, name in ((self.a, pair.a.name), (self.b, pair.b.name))
        ]
        return Sums(pair, self.a.count, steps[0], steps[1])

    def _scores(self, side: Side, output: Any) -> np.ndarray | None:
        if not isinstance(side, Opened):
            return None
        try:
            return side.net._scores(output).float().cpu().numpy()
        except errors.Unsupported:
            return None

    def _predicted(self, aligned: Alignment, answers: list[list[np.ndarray]]) -> Predicted | None:
        found: list[Predictions | None] = []
        for side, other, rows in zip((self.a, self.b), (self.b, self.a), answers, strict=True):
            if isinstance(side, Opened) and rows and len({r.shape[1] for r in rows}) == 1:
                kind = side.net._kind(side.inputs.tensor)
                found.append(
                    Predictions(
                        np.concatenate(rows), side.net.labels, side.inputs.pictures, kind, Provenance(side.name)
                    )
                )
            elif isinstance(side, Dump) and isinstance(other, Opened):
                found.append(self._dumped_answer(aligned, side, other))
            else:
                found.append(None)
        if found[0] is None or found[1] is None:
            who = [s.name for s, f in zip((self.a, self.b), found, strict=True) if f is None]
            self.notes.append(f"predictions are not compared: {' and '.join(who)} states no scores of classes")
            return None
        try:
            return Predicted.of(found[0], found[1], [p.name for p in found[0].pictures or found[1].pictures])
        except errors.Unsupported as error:
            self.notes.append(f"predictions are not compared: {error}")
            return None

    def _dumped_answer(self, aligned: Alignment, dump: Dump, other: Opened) -> Predictions | None:
        """The classes in a dump that holds the network's last layer."""
        for pair in reversed(aligned.pairs):
            theirs, ours = (pair.a, pair.b) if dump is self.b else (pair.b, pair.a)
            if theirs.outside and len(theirs.shape) == 1:
                logits = dump._one(ours.name, slice(None)).float().numpy()
                kind = other.net._kind(other.inputs.tensor)
                return Predictions(logits, other.net.labels, other.inputs.pictures, kind, Provenance(dump.name))
        return None

    def shown(
        self, sums: Sequence[Sums], predicted: Predicted | None
    ) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Layer -> channels, and their maps in both, of the picture on which the networks are furthest apart."""
        if predicted is not None and predicted.divergence.max() > 0:
            self.looked_at = int(predicted.divergence.argmax())
        else:
            noise = np.sum([s.share_of_noise() for s in sums], 0)
            self.looked_at = int(np.argmax(noise))
        found = {}
        for _, va, vb, _, _ in self.chunks([self.looked_at], [s.pair for s in sums], "looking"):
            for s in sums:
                pair = s.pair
                if len(pair.a.shape) != 3:
                    continue
                picked = s.shown(SHOWN)
                order = np.arange(pair.a.shape[0]) if pair.order is None else np.array(pair.order)
                maps = [v[0].float().cpu().numpy() for v in (va[pair.a.name], vb[pair.b.name])]
                found[pair.a.name] = (picked, maps[0][picked], maps[1][order[picked]])
        return found

    # -- reasons

    def reasons(
        self, aligned: Alignment, predicted: Predicted | None, method: str, target: Any, layer: str | None
    ) -> Reasons | None:
        if not (isinstance(self.a, Opened) and isinstance(self.b, Opened)):
            self.notes.append("reasons are not compared: a dump has no gradients and cannot be run")
            return None
        try:
            return self._reasons(self.a, self.b, aligned, predicted, method, target, layer)
        except errors.Unsupported as error:
            self.notes.append(f"reasons are not compared: {error}")
            return None

    def _reasons(
        self, a: Opened, b: Opened, aligned: Alignment, predicted: Predicted | None, method: str, target: Any,
        layer: str | None,
    ) -> Reasons:  # fmt: skip
        at: list[str | None] = [None, None]
        if "layer" in find(method).needs:
            at = self._reason_layers(a, b, aligned, layer)
        if target is None and predicted is not None:
            self.notes.append("reasons are for the class that a predicts, in both networks (target= changes it)")
        if predicted is not None and predicted.a.kind != predicted.b.kind:
            self.notes.append("one network ends in probabilities, so the reasons are for the probability in both")
        found = Reasons(method, at[0], at[1])
        for start in range(0, a.count, 16):
            rows = range(start, min(start + 16, a.count))
            goals = _goals(target, predicted, rows)
            maps = [
                side.net.explain(
                    Inputs(side.inputs.tensor[rows.start : rows.stop], side.inputs.pictures[rows.start : rows.stop]),
                    method=method, target=goal, layer=where,
                )
                for side, goal, where in zip((a, b), goals, at, strict=True)
            ]  # fmt: skip
            found.add(rows, maps[0], maps[1], None if predicted is None else predicted.same, KEPT)
            self.progress("explaining", rows.stop, a.count)
        return found

    def _reason_layers(self, a: Opened, b: Opened, aligned: Alignment, layer: str | None) -> list[str | None]:
        with a.net.engine.session():
            chosen, note = Inquiry(a.net, a.inputs.tensor[:1], None).layer(layer)
        if note:
            self.notes.append(f"reasons: {note.partition(' (')[0]}, of a (at= changes it)")
        partner = next((p.b.name for p in aligned.pairs if p.a.name == chosen.name), None)
        if partner is not None and b.table[partner].grid is not None:
            return [chosen.name, partner]
        with b.net.engine.session():
            other, _ = Inquiry(b.net, b.inputs.tensor[:1], None).layer(None)
        self.notes.append(f"reasons: {chosen.name} is not aligned, so b is looked at in {other.name}, its own last")
        return [chosen.name, other.name]
