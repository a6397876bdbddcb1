"""compare.html: a comparison as one file that needs no other, without scripts."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from innersight.draw import comparison, plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --faint: #5f646b; --paper: #fbfbfa; --line: #d9d9d6; --card: #fff;
        --mark: #fbe9c6 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e6; --faint: #a3a7ad; --paper: #17181a; --line: #3a3c40; --card: #202225; --mark: #4a3a12 }
}
body { margin: 0 auto; padding: 1.5rem; max-width: 88rem; background: var(--paper); color: var(--ink);
       font: 1rem/1.55 system-ui, sans-serif }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line) }
p, ul { max-width: 56rem } li { margin: .35rem 0; overflow-wrap: anywhere }
figure { margin: 1rem 0 } figcaption { color: var(--faint); font-size: .9rem; max-width: 56rem }
img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; border: 1px solid var(--line) }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; background: var(--card) }
table { border-collapse: collapse; font-size: .85rem; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem; border-bottom: 1px solid var(--line) }
th { white-space: nowrap; background: var(--card) }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td.name { font-family: ui-monospace, monospace; font-size: .8rem; overflow-wrap: anywhere; min-width: 10rem }
td.short { white-space: nowrap }
tr.mark td { background: var(--mark) }
.note { color: var(--faint); font-size: .9rem }
summary { cursor: pointer; margin: .4rem 0 }
"""

DRAWN = 4  # layers whose maps are drawn
LISTED = 300  # images
_SHORT = ("shape", "range of a", "range of b", "saturated", "dead")  # cells that stay in one line


def render(c: Any) -> str:
    """The page of a `Comparison`."""
    title = f"{c.a} and {c.b}"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{html.escape(title)}, compared</h1>\n"
        + _list(c.words())
        + _overview(c)
        + _table(c)
        + _maps(c)
        + _answers(c)
        + _reasons(c)
        + _unaligned(c)
        + _notes(c)
        + "</main>\n</body>\n</html>\n"
    )


def _p(text: str, kind: str = "") -> str:
    return f"<p{f' class={kind}' if kind else ''}>{html.escape(text)}</p>\n"


def _list(items: Sequence[str]) -> str:
    return "<ul>\n" + "".join(f"<li>{html.escape(i)}</li>\n" for i in items) + "</ul>\n"


def _figure(figure: Figure, caption: str) -> str:
    data = base64.b64encode(plots.png(figure)).decode("ascii")
    width = round(figure.get_figwidth() * 130)
    return (
        f'<figure><img width="{width}" alt="{html.escape(caption)}" src="data:image/png;base64,{data}">\n'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>\n"
    )


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str], names: Sequence[str],
          marked: Sequence[bool] = ()) -> str:  # fmt: skip
    kinds = ["number" if h in numbers else "name" if h in names else "short" if h in _SHORT else "" for h in header]
    head = "".join(
        f'<th scope="col"{f" class={k}" if k == "number" else ""}>{html.escape(h)}</th>'
        for h, k in zip(header, kinds, strict=True)
    )
    body = []
    for i, row in enumerate(rows):
        cells = "".join(
            f"<td{f' class={k}' if k else ''}>{html.escape(cell)}</td>" for cell, k in zip(row, kinds, strict=True)
        )
        body.append(f"<tr{' class=mark' if marked and marked[i] else ''}>{cells}</tr>\n")
    return (
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>{"".join(body)}</tbody></table></div>\n'
    )


def _overview(c: Any) -> str:
    said = (
        "Signal to noise is 10 log10 of the sum of a squared over the sum of (a - b) squared, over all images, places "
        "and channels: 20 dB means that the difference is a tenth of the signal, and each bit is worth about 6 dB. A "
        "cosine of 1 is the same direction whatever the length."
    )
    pages = -(-len(c.layers) // 120)
    drawn = "".join(
        _figure(comparison.overview(c, page=k + 1), "Each layer's agreement, in the order a runs them")
        for k in range(min(pages, 5))
    )
    return "<h2>Along the depth</h2>\n" + _p(said) + drawn


def _table(c: Any) -> str:
    from innersight.comparison.layers import HEADER

    rows = c.layers.rows()
    keep = [i for i in range(len(HEADER)) if any(r[i] for r in rows)]
    parts = [c.divergence is not None and r is c.divergence.layer for r in c.layers.values()]
    return (
        "<h2>Layer by layer</h2>\n"
        + _p(
            "Saturated: values at an end of what a quantised layer can answer. Dead: channels with one value "
            "everywhere. Worst channels: those with least signal to noise, in dB."
        )
        + _rows(
            [HEADER[i] for i in keep], [[r[i] for i in keep] for r in rows], ("SQNR dB", "cosine"),
            ("layer of a", "layer of b"), parts,
        )
    )  # fmt: skip


def _maps(c: Any) -> str:
    """The layers where something happens: where they part, where most is lost, the worst, the last."""
    with_maps = [r for r in c.layers.values() if r.shown is not None]
    wanted = [d.layer for d in (c.divergence, c.largest) if d is not None]
    wanted += sorted((r for r in with_maps if not r.equal), key=lambda r: r.sqnr)[:1] + with_maps[-1:]
    chosen = [r for r in dict.fromkeys(wanted) if r in with_maps][:DRAWN]
    if not chosen:
        return ""
    picture = c.pictures[c.shown_picture].name if c.pictures else f"image {c.shown_picture}"
    why = "where the answers are furthest apart" if c.predictions is not None else "on which the layers differ most"
    return (
        "<h2>Maps of both</h2>\n"
        + _p(f"Of {picture}, the picture {why}.")
        + "".join(_figure(comparison.layer(c, r), f"{r.a}: a, b and their difference on one picture") for r in chosen)
    )


def _answers(c: Any) -> str:
    p = c.predictions
    if p is None:
        return ""
    order = sorted(range(len(p)), key=lambda i: (p.same[i], -p.divergence[i], i))[:LISTED]
    rows = [
        (
            p.names[i] if i < len(p.names) else f"image {i}",
            f"{p.label(0, i)} {p.probability(0, i):.3f}", f"{p.label(1, i)} {p.probability(1, i):.3f}",
            "" if p.same[i] else "differs", f"{p.change[i]:+.3f}", f"{p.divergence[i]:.4f}", f"{p.kl[i]:.4f}",
            "tie" if p.tied[i] else "", *_reason_cells(c, i),
        )
        for i in order
    ]  # fmt: skip
    header = ("image", "a says", "b says", "answer", "change", "Jensen-Shannon", "Kullback-Leibler", "tie",
              "reasons correlate", "ranks")  # fmt: skip
    keep = [i for i in range(len(header)) if any(r[i] for r in rows)]
    said = (
        f"{p.how[0].upper()}{p.how[1:]}. Change: of the probability of a's class, in b. Jensen-Shannon divergence in "
        "bits: 0 equal, 1 disjoint. Kullback-Leibler divergence of b from a in bits; a probability below 1e-6 in b "
        "counts as that."
    )
    more = f"The {LISTED} furthest apart of {len(p)}." if len(p) > LISTED else ""
    return (
        "<h2>Answers</h2>\n" + _p(said) + (_p(more, "note") if more else "")
        + _rows([header[i] for i in keep], [[r[i] for i in keep] for r in rows],
                ("change", "Jensen-Shannon", "Kullback-Leibler", "reasons correlate", "ranks"), (),
                [not p.same[i] for i in order])
    )  # fmt: skip


def _reason_cells(c: Any, i: int) -> tuple[str, str]:
    if c.reasons is None or i >= len(c.reasons.correlation):
        return "", ""
    values = c.reasons.correlation[i], c.reasons.rank[i]
    return tuple("blank" if np.isnan(v) else f"{v:.2f}" for v in values)  # type: ignore[return-value]


def _reasons(c: Any) -> str:
    r = c.reasons
    if r is None or not r.kept:
        return ""
    return (
        "<h2>Reasons</h2>\n"
        + _p(
            f"Maps by {r.method}{r._at()}, both for the same target, compared on {r.grid}. A correlation says how "
            "alike two maps are, not which of them is right."
        )
        + _figure(comparison.reasons(c), "The pictures on which the two maps are least alike")
    )


def _unaligned(c: Any) -> str:
    parts = []
    for which, name, only in (("a", c.a, c.only_a), ("b", c.b, c.only_b)):
        if only:
            rows = _rows(("layer", "why"), only, (), ("layer",))
            parts.append(
                f"<details><summary>{len(only)} of {html.escape(name)} ({which})</summary>\n{rows}</details>\n"
            )
    return "<h2>Layers without a counterpart</h2>\n" + "".join(parts) if parts else ""


def _notes(c: Any) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in c.provenance.versions.items())
    return "<h2>Notes</h2>\n" + _list([*c.provenance.notes, f"Made with {versions}."])
