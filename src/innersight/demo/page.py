"""index.html: the demo's pictures beside what they say."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from innersight.demo import words
from innersight.demo.study import CLASSES, FEEDS, SURE

if TYPE_CHECKING:
    from innersight.demo.study import Study
    from innersight.network import Network

_STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --faint: #5f646b; --paper: #fbfbfa; --line: #d9d9d6; --card: #fff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e6; --faint: #a3a7ad; --paper: #17181a; --line: #3a3c40; --card: #202225 }
}
body { margin: 0 auto; padding: 1.5rem; max-width: 78rem; background: var(--paper); color: var(--ink);
       font: 1rem/1.55 system-ui, sans-serif }
h1 { font-size: 1.7rem; line-height: 1.25; margin: .5rem 0 }
h2 { font-size: 1.25rem; margin: 3rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line) }
p, ul, ol { max-width: 46rem } li { margin: .35rem 0 }
.pair { display: grid; grid-template-columns: minmax(0, 3fr) minmax(17rem, 2fr); gap: 0 2rem; align-items: start;
        margin: 1.2rem 0 }
@media (max-width: 56rem) { .pair { grid-template-columns: minmax(0, 1fr) } }
figure { margin: 1rem 0 } figcaption { color: var(--faint); font-size: .9rem; max-width: 46rem }
img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; border: 1px solid var(--line) }
@media (prefers-color-scheme: dark) { img { filter: brightness(.9) } }
pre { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .7rem 1rem;
      font-size: .85rem; line-height: 1.4 }
table { border-collapse: collapse; font-size: .92rem; display: block; overflow-x: auto }
th, td { text-align: left; vertical-align: bottom; padding: .25rem .8rem .25rem 0;
         border-bottom: 1px solid var(--line) }
.lead { font-size: 1.1rem } .note { color: var(--faint); font-size: .9rem }
"""


def render(study: Study, net: Network) -> str:
    sections = [
        _page_reading(study),
        _page_maps(study, net),
        _page_removed(study),
        _page_firing(study),
        _page_looks(study),
        _page_next(),
    ]
    title = f"Inside a small network that reads {'MNIST' if study.digits.name == 'mnist' else 'handwritten digits'}"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n"
        + _p(
            "Two convolutions and three linear layers, trained from scratch in "
            f"{study.epochs} epoch{'s' * (study.epochs != 1)} (seed {study.seed}). Images: {study.digits.note}.",
            "lead",
        )
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def _p(text: str, kind: str = "") -> str:
    return f"<p{f' class={kind}' if kind else ''}>{html.escape(text)}</p>\n"


def _list(items: Sequence[str], tag: str = "ul") -> str:
    return f"<{tag}>\n" + "".join(f"<li>{html.escape(i)}</li>\n" for i in items) + f"</{tag}>\n"


def _figure(name: str, caption: str) -> str:
    image = f'<a href="{name}"><img src="{name}" alt="{html.escape(caption)}"></a>'
    return f"<figure>{image}\n<figcaption>{html.escape(caption)}</figcaption></figure>\n"


def _pair(figure: str, words: str) -> str:
    return f'<div class="pair">{figure}<div>{words}</div></div>\n'


def _page_reading(study: Study) -> str:
    caption = "Rows: the digit that was written. Columns: the digit that was read. Colored cells are mistakes."
    said = _list(words.about_reading(study))
    return "<h2>How well it reads</h2>\n" + _pair(_figure("confusion.png", caption), said)


def _page_maps(study: Study, net: Network) -> str:
    k = study.reading.labels[study.example]
    maps, paper = study.maps, study.paper
    cut = float((maps["conv1"] <= 0).mean())
    follow = _follow(maps["conv1"][0], study.digits.test_images[study.example, 0].numpy())
    filters = (
        f"A map is what one channel answers all over the picture, here for {words.a(k)}. Each of the 16 filters of "
        "conv1 looks at 5x5 pixels: its map is red where it answers above zero, blue where below. See which side or "
        "which direction of a stroke lights up."
    )
    same = (
        f"{_channels(follow)}: the map looks like the digit itself (correlation with the ink above 0.8)."
        if follow
        else "None of the maps looks like the digit itself (correlation with the ink above 0.8)."
    )
    empty = (
        f"{_channels(paper)}: above zero on an empty picture, too, by a positive bias; there red means paper."
        if paper
        else "On an empty picture no channel answers above zero."
    )
    relu = f"The ReLU sets all below zero to zero, here {cut:.0%} of the values. What is left says where a pattern is."
    eight = "The eight channels that answer this digit most, strongest first."
    pool = (
        "Pooling keeps the largest of each 2x2 values: 24x24 becomes 12x12. Where exactly a stroke ran is lost, and a "
        "shift by a pixel matters less from here on."
    )
    relu_1 = (
        "conv2 combines all 16 maps, and each of its values depends on 14x14 pixels: wide enough for an end, a bend or "
        "a crossing of strokes. A gray map with a stroke through it is zero everywhere for this digit."
    )
    pool_1 = "After the second pooling 32 maps of 4x4 are left, 512 numbers. The linear layers decide from these alone."
    table = (
        "What each layer sees: 'receptive field' is how many pixels of the input one value depends on, 'stride' how "
        "far apart its neighbors look, 'centre' where the first of them does."
    )
    return (
        "<h2>What its layers make of a digit</h2>\n"
        + _pair(_figure("maps_conv1.png", "conv1, before the ReLU"), _p(filters) + _list([same, empty]))
        + _pair(_figure("maps_relu.png", "after the first ReLU"), _p(relu))
        + _pair(_figure("maps_eight.png", "the eight most active maps after the first ReLU"), _p(eight))
        + _pair(_figure("maps_pool.png", "after the first pooling"), _p(pool))
        + _pair(_figure("maps_relu_1.png", "conv2 after its ReLU"), _p(relu_1))
        + _pair(_figure("maps_pool_1.png", "after the second pooling"), _p(pool_1))
        + _p(table)
        + f"<pre>{html.escape(str(net.layers))}</pre>\n"
    )


def _channels(numbers: Sequence[int]) -> str:
    return f"Channel{'s' * (len(numbers) != 1)} {words.listed(numbers)}"


def _follow(maps: np.ndarray, picture: np.ndarray) -> list[int]:
    """The channels of conv1 (C, 24, 24) whose map looks like the picture that it was made from."""
    edge = (picture.shape[0] - maps.shape[1]) // 2
    ink = picture[edge:-edge, edge:-edge].ravel()
    return [c for c, m in enumerate(maps) if m.std() > 0 and np.corrcoef(m.ravel(), ink)[0, 1] > 0.8]


def _page_removed(study: Study) -> str:
    how = (
        "To learn what a channel is worth, it is removed: set to zero, and the rest of the network is run again, on "
        f"{words.which(study)} of each digit. Nothing is estimated. A blue cell: the digit's own score falls without "
        "the channel, so the channel speaks for it. Red: the score rises, the channel speaks against it."
    )
    figures = "".join(
        _figure(f"removed_{FEEDS[layer]}.png", f"{FEEDS[layer]}: its channels removed one at a time")
        for layer in study.dependence
    )
    rest = [*(words.redundant(found) for found in study.dependence.values()), words.alone(study)]
    return (
        "<h2>Which channels each digit depends on</h2>\n" + _p(how) + figures + _strongest_table(study) + _list(rest)
        + _p("A score can fall far and the answer stay right: only the order of the ten scores decides.", "note")
    )  # fmt: skip


def _strongest_table(study: Study) -> str:
    """The three channels of each layer that each digit depends on most, and how well it is read without the first."""
    head = ["digit"]
    for layer in study.dependence:
        head += [
            f"{FEEDS[layer]}: the three channels without which its score falls most",
            "read right without the first",
        ]
    rows = []
    for k in range(CLASSES):
        row = [str(k)]
        for found in study.dependence.values():
            three = [c for c in np.argsort(found.change[k], kind="stable")[:3] if found.change[k, c] < 0]
            row.append(", ".join(f"{c} ({words.signed(found.change[k, c], 1) or 0})" for c in three) or "none")
            row.append(words.read_right(found, k, three[0]) if three else "")
        rows.append(row)
    return (
        "<table>\n<tr>" + "".join(f'<th scope="col">{html.escape(text)}</th>' for text in head) + "</tr>\n"
        + "".join(f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in row)}</tr>\n" for row in rows)
        + "</table>\n"
    )  # fmt: skip


def _page_firing(study: Study) -> str:
    said = [s for s in words.about_channels(study) if "fire" in s]
    hint = (
        "No gradient passes a ReLU where it is zero, so what never fires on the training images has stopped learning. "
        "If there is much of it, a smaller learning rate or another seed may help, or a smaller network does as well."
    )
    caption = "The share of each channel's map that is above zero. A column of zeros is a channel that never fires."
    return "<h2>Which channels never fire</h2>\n" + _list(said) + _figure("firing.png", caption) + _p(hint)


def _page_looks(study: Study) -> str:
    share, covered = study.ink
    maps = (
        "The gradient (Simonyan, Vedaldi, Zisserman 2013) shows which pixels would change the score most if they were "
        "changed a little. Grad-CAM (Selvaraju et al. 2017) shows where the maps of conv2 speak for the answer, "
        "coarsely: each of its values stands for 14x14 pixels."
    )
    ink = (
        f"Where the answer is right, {share:.0%} of the gradient lies on ink, which covers {covered:.0%} of the "
        f"picture: {'more' if share > covered else 'no more'} than its share, and paper counts, too. What is not there "
        "tells digits apart as well: a 3 is an 8 whose left side is open."
    )
    right = _pair(_figure("saliency_right.png", "One digit of each kind that was read right"), _p(maps) + _p(ink))
    looks = [
        f"{words.headline(look)}: {words.looked(look)} {look.ink:.0%} of the gradient lies on ink, which covers "
        f"{look.covered:.0%} of the picture."
        for look in study.looks
    ]
    none = study.reading.right.all()
    head = (
        "There is no mistake among the held-out images. These are the answers with the least confidence."
        if none
        else "The last column asks what speaks for the answer and against the true digit."
    )
    caution = (
        "A map is a hint, not a proof. That is why the part it points at was painted over as paper, and the opposite "
        "part for comparison: the map is borne out if the score falls more without the first."
    )
    return (
        "<h2>What it looked at</h2>\n" + right + f"<h2>{html.escape(words.worst_title(study))}</h2>\n" + _p(head)
        + _figure("saliency_worst.png", "Pictures with what was read, and what spoke for it")
        + _list(looks, "ol") + _p(caution)
    )  # fmt: skip


def _page_next() -> str:
    ideas = [
        "Look at the mistakes first: would you have read them right? Where a person would not, no network can help.",
        "Give it more examples of what it confuses, or train longer (--epochs), and see which findings stay. Another "
        "--seed shows which were chance: channel numbers will change, and weak findings may vanish.",
        f"Let a person look at answers below {SURE:.0%}: above and in findings.json is what that would catch.",
    ]
    commands = "\n".join(words.commands(Path()))
    return (
        "<h2>What one might do next</h2>\n" + _list(ideas) + _p("In this folder:")
        + f"<pre>{html.escape(commands)}</pre>\n"
        + '<p><a href="report.html">Look around yourself</a>: every map of ten digits, with what each value sees.</p>\n'
        + _p("All numbers are in findings.json; weights.safetensors holds the network.", "note")
    )  # fmt: skip
