"""Targets: what is explained becomes one number an image; what cannot be is refused in a sentence."""

from __future__ import annotations

import re
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from innersight import errors, targets
from innersight.targets import Classes, box, difference, embedding, mask, probability, resolve

LABELS = ("tench, Tinca tinca", "goldfish", "crane", "Great White", "crane", "sea lion, seal", "hood, seal")
MAIN = torch.tensor([[1.0, 5.0, 2.0, 0.0, 3.0, -1.0, 4.0], [9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
ALL = [0, 1]


def scores(
    target: Any, main: torch.Tensor = MAIN, raw: Any = None, part: list[int] | None = None, **options: Any
) -> list:
    rows = list(range(len(main))) if part is None else part
    goal = resolve(target, options.pop("count", len(rows)), Classes(options.pop("labels", LABELS)), **options)
    return goal.score(main if raw is None else raw, main, rows).tolist()


def texts(target: Any, main: torch.Tensor = MAIN, **options: Any) -> list[str]:
    return resolve(target, len(main), Classes(LABELS), **options).texts(main, list(range(len(main))))


# ---------------------------------------------------------------------------------------------------------------------
# Classes


@pytest.mark.parametrize(
    ("target", "index"),
    [
        (1, 1), ("1", 1), ("goldfish", 1), ("GOLDFISH", 1), ("great white", 3), ("tench", 0),
        ("Tinca Tinca", 0), ("tench, Tinca tinca", 0), (np.int64(2), 2), (torch.tensor(3), 3), ("sea lion", 5),
    ],
)  # fmt: skip
def test_a_class_by_number_name_or_synonym(target, index):
    assert scores(target) == MAIN[:, index].tolist()
    assert texts(target) == [LABELS[index]] * 2


@pytest.mark.parametrize(
    ("target", "error", "said"),
    [
        ("crane", errors.UnknownName, "2 classes are called 'crane'; say which by number: 2, 4"),
        ("seal", errors.UnknownName, "'seal' names 2 classes; say which by number: 5 (sea lion, seal), 6 (hood, seal)"),
        ("goldfsh", errors.UnknownName, "no class 'goldfsh' in this network; did you mean goldfish"),
        (7, errors.UnknownName, "class 7 is out of range: the network has 7 outputs, numbered 0 to 6"),
        (-8, errors.UnknownName, "class -8 is out of range"),
        (2.7, errors.InputError, "2.7 is no class; give a class by number or name"),
        ([1, 2, 3], errors.InputError, "3 targets were given for 2 images; give one, or one for each"),
        ((1, 2), errors.InputError, "a tuple is no target: difference(a, b)"),
        ([difference(1, 2), 0], errors.InputError, "is no class"),
    ],
)  # fmt: skip
def test_what_names_no_class_is_refused_in_a_sentence(target, error, said):
    with pytest.raises(error, match=re.escape(said)):
        scores(target)


def test_names_are_of_no_use_without_labels():
    with pytest.raises(errors.UnknownName, match="states no class names; give the number of the class"):
        scores("goldfish", labels=None)
    assert scores("2", labels=None) == [2.0, 2.0]
    assert resolve(2, 1, Classes()).texts(MAIN[:1], [0]) == ["class 2"]


def test_digits_that_are_labels_are_names():
    assert Classes(("3", "1", "2")).index("3", 3) == 0


def test_by_default_the_predicted_class_is_explained_image_by_image():
    assert scores(None) == [5.0, 9.0]
    assert texts(None) == ["goldfish", "tench, Tinca tinca"]


def test_the_prediction_is_settled_by_the_first_pass_over_an_image():
    goal = resolve(None, 2, Classes(LABELS))
    assert goal.score(MAIN, MAIN, [0, 1]).tolist() == [5.0, 9.0]  # classes 1 and 0
    changed = MAIN[[1, 0, 0]].flip(1)  # other classes would win now
    assert goal.score(changed, changed, [1, 0, 0]).tolist() == [6.0, -1.0, -1.0]


def test_one_target_for_each_image_in_any_order_of_rows():
    assert scores([1, "tench"]) == [5.0, 9.0]
    assert scores([1, None]) == [5.0, 9.0]
    assert scores(np.array([1, 0])) == [5.0, 9.0]
    assert scores([1, 6], MAIN[[1, 0, 0]], part=[1, 0, 0], count=2) == [6.0, 5.0, 5.0]


def test_one_output_is_a_class_of_its_own():
    one = torch.tensor([[0.0], [2.0]])
    assert scores(None, one) == [0.0, 2.0]
    assert scores(0, one[:, 0]) == [0.0, 2.0]
    assert scores(probability(0), one) == pytest.approx([0.5, 1 / (1 + np.exp(-2))])


# ---------------------------------------------------------------------------------------------------------------------
# Weightings of several


def test_a_difference_is_one_score_minus_the_other():
    assert scores(difference("goldfish", 2)) == [3.0, -1.0]
    assert scores(difference(None, 0)) == [4.0, 0.0]
    assert scores(difference([1, 2], [0, 0])) == [4.0, -7.0]
    assert texts(difference(None, "goldfish"))[1] == "tench, Tinca tinca and not goldfish"


def test_a_probability_is_that_of_the_softmax():
    assert scores(probability(1)) == pytest.approx(MAIN.softmax(1)[:, 1].tolist())
    assert scores(probability()) == pytest.approx(MAIN.softmax(1).amax(1).tolist())
    assert scores(difference(probability(1), probability(0)))[0] == pytest.approx(
        float(MAIN.softmax(1)[0, 1] - MAIN.softmax(1)[0, 0])
    )
    assert texts(probability("goldfish")) == ["probability of goldfish"] * 2


def test_a_score_can_be_differentiated():
    main = MAIN.clone().requires_grad_()
    total = resolve(difference(1, 2), 2, Classes()).score(main, main, ALL).sum()
    expected = torch.zeros_like(main)
    expected[:, 1], expected[:, 2] = 1, -1
    assert torch.equal(torch.autograd.grad(total, main)[0], expected)


# ---------------------------------------------------------------------------------------------------------------------
# Segmentation

DENSE = torch.zeros(1, 3, 4, 4)
DENSE[0, 1, :3] = 2.0
DENSE[0, 2, 3, :] = 4.0


def test_a_class_of_a_segmentation_is_averaged_where_it_is_predicted():
    assert scores(None, DENSE) == [2.0]
    assert scores(2, DENSE) == [4.0]
    assert scores(0, DENSE) == [0.0]


def test_a_mask_is_the_mean_over_a_region():
    region = np.zeros((8, 8), bool)
    region[4:] = True
    assert scores(mask(region, 1), DENSE) == [1.0]
    assert scores(mask(region), DENSE) == [2.0]  # class 2 leads there
    assert scores(mask(torch.tensor(region)[None], 2), DENSE) == [2.0]
    goal = resolve(mask(region), 1, Classes(("a", "b", "c")))
    assert goal.texts(DENSE, [0]) == ["c in the mask"]


@pytest.mark.parametrize(
    ("where", "main", "error", "said"),
    [
        (np.zeros((4, 4)), DENSE, errors.InputError, "marks at least one pixel"),
        (np.ones(4), DENSE, errors.InputError, "a mask is a boolean array (H, W) or (N, H, W)"),
        (np.ones((3, 4, 4)), DENSE, errors.InputError, "3 masks were given for 1 images"),
        (np.ones((4, 4)), MAIN[:1], errors.Unsupported, "this network answers (1, 7)"),
        (np.eye(64)[:1].repeat(64, 0) * np.eye(64)[1], DENSE, errors.InputError, "marks at least one pixel"),
    ],
)
def test_masks_that_cannot_be_used(where, main, error, said):
    with pytest.raises(error, match=re.escape(said)):
        scores(mask(where), main)


def test_a_mask_smaller_than_a_value_of_the_output():
    tiny = np.zeros((64, 64), bool)
    tiny[1, 1] = True
    with pytest.raises(errors.InputError, match="marks less than one value of the network's output"):
        scores(mask(tiny), DENSE)


# ---------------------------------------------------------------------------------------------------------------------
# Detection

FOUND = [
    {
        "boxes": torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 40.0, 40.0], [0.0, 0.0, 12.0, 12.0]]),
        "scores": torch.tensor([0.9, 0.6, 0.5]),
        "labels": torch.tensor([1, 2, 3]),
    }
]


def detection(target: Any, raw: Any = FOUND, labels: tuple[str, ...] | None = ("no", "cat", "dog", "bird")) -> list:
    return scores(target, targets.main_tensor(raw)[0], raw=raw, labels=labels)


def test_a_box_means_the_object_that_overlaps_it_most():
    assert detection(box((0, 0, 11, 10))) == pytest.approx([0.9])
    assert detection(box((0, 0, 30, 30))) == pytest.approx([0.5])
    assert detection(box((0, 0, 40, 40), "dog")) == pytest.approx([0.6])
    assert detection(box((0, 0, 11, 10), 3), labels=None) == pytest.approx([0.5])


def test_a_detector_answers_with_the_best_object_of_each_class():
    main, note = targets.main_tensor(FOUND, count=5)
    assert main.tolist() == [pytest.approx([0, 0.9, 0.6, 0.5, 0])]
    assert note.startswith("detections")
    assert detection(None) == pytest.approx([0.9])
    assert detection("dog") == pytest.approx([0.6])
    nothing = [{k: v[:0] for k, v in FOUND[0].items()}]
    assert targets.main_tensor(nothing, count=3)[0].tolist() == [[0, 0, 0]]
    unlabelled = [{k: v for k, v in FOUND[0].items() if k != "labels"}]
    assert targets.main_tensor(unlabelled)[0].tolist() == [pytest.approx([0.9])]


@pytest.mark.parametrize(
    ("where", "of", "raw", "error", "said"),
    [
        ((100, 100, 120, 120), None, FOUND, errors.InputError, "the network detects no object that overlaps the box"),
        ((20, 20, 40, 40), "cat", FOUND, errors.InputError, "the network detects no cat that overlaps the box"),
        ((10, 10, 0, 0), None, FOUND, errors.InputError, "a box is (left, top, right, bottom)"),
        ((1, 2, 3), None, FOUND, errors.InputError, "a box is (left, top, right, bottom)"),
        (5, None, FOUND, errors.InputError, "a box is (left, top, right, bottom)"),
        ("here", None, FOUND, errors.InputError, "a box is (left, top, right, bottom)"),
        ((0, 0, 5, 5), None, MAIN, errors.Unsupported, "a box is a target for a detector"),
        ((0, 0, 5, 5), None, [{k: v[:0] for k, v in FOUND[0].items()}], errors.InputError, "found 0 objects"),
    ],
)
def test_boxes_that_cannot_be_used(where, of, raw, error, said):
    with pytest.raises(error, match=re.escape(said)):
        detection(box(where, of), raw)


def test_the_score_of_an_object_reaches_a_real_detectors_input():
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

    from innersight.observe.passes import Engine, Request

    torch.manual_seed(0)
    net = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, box_score_thresh=0.0, box_detections_per_img=5, min_size=96, max_size=96,
        num_classes=4,
    ).eval()  # fmt: skip
    x = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    goal = resolve(box((0, 0, 96, 96)), 1, Classes())
    engine = Engine(net, call=lambda m, x: m(list(x)))
    with engine.session():
        passed = engine.run(x, Request(gradients=["input"], score=lambda raw: goal.score(raw, x, [0])))
    gradient = passed.gradients["input"]
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 0
    assert 0 < float(passed.scores[0]) <= 1


# ---------------------------------------------------------------------------------------------------------------------
# Embeddings and functions


def test_an_embedding_is_a_cosine():
    main = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    assert scores(embedding([1.0, 0.0]), main) == pytest.approx([0.6, 1.0])
    assert scores(embedding(np.array([[0, 1], [0, 1]])), main) == pytest.approx([0.8, 0.0])
    assert scores(embedding(torch.tensor([1.0, 0.0], requires_grad=True)), main) == pytest.approx([0.6, 1.0])
    with pytest.raises(errors.InputError, match="the embedding has 3 numbers, the network's output 2"):
        scores(embedding([1, 2, 3]), main)
    with pytest.raises(errors.InputError, match=r"a vector \(D,\) or one for each of the 2 images"):
        scores(embedding(np.ones((3, 2))), main)


def test_any_function_of_the_output():
    assert scores(lambda out: out.sum(1)) == MAIN.sum(1).tolist()
    assert scores(lambda out: out[:, :1]) == MAIN[:, 0].tolist()
    assert scores(lambda raw: raw["a"][:, 0], raw={"a": MAIN}) == MAIN[:, 0].tolist()
    assert texts(torch.linalg.vector_norm)[0] == "linalg_vector_norm"
    assert texts(lambda out: out.sum(1)) == ["the target function"] * 2


@pytest.mark.parametrize(("fn", "got"), [(lambda o: o, "shape (2, 7)"), (lambda o: 3, "int"),  # noqa: ARG005
                                         (lambda o: o.sum(), "shape ()")])  # fmt: skip
def test_a_function_that_returns_something_else_is_refused(fn, got):
    said = rf"must return one number an image, a tensor \(2,\); it returned {re.escape(got)}"
    with pytest.raises(errors.InputError, match=said):
        scores(fn)


# ---------------------------------------------------------------------------------------------------------------------
# The answer among what a network returns

Named = namedtuple("Named", ["features", "logits"])


@dataclass
class Data:
    hidden: torch.Tensor
    pred: torch.Tensor
    nothing: None = None


SMALL = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "output",
    [
        MAIN, (MAIN,), [MAIN], {"logits": MAIN}, {"aux": SMALL, "out": MAIN}, (torch.zeros(2), MAIN, SMALL),
        Named(SMALL, MAIN), Data(SMALL, MAIN), {"meta": (), "heads": {"x": MAIN}}, ("text", [MAIN, SMALL]),
        {"ids": torch.arange(2), "anything": MAIN}, {"a": torch.arange(2), "b": [torch.arange(3)], "c": (MAIN,)},
    ],
    ids=lambda o: type(o).__name__,
)  # fmt: skip
def test_the_answer_is_found(output):
    assert targets.main_tensor(output)[0] is MAIN


def test_a_choice_among_outputs_is_said():
    assert targets.main_tensor(MAIN)[1] == targets.main_tensor((MAIN,))[1] == ""
    assert targets.main_tensor((SMALL, MAIN))[1] == (
        "the network returns 0, 1; '0' is taken as its answer (output= changes it)"
    )


def test_the_answer_of_a_transformers_output_is_its_logits():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    out = outputs.ImageClassifierOutput(loss=None, logits=MAIN, hidden_states=(SMALL,))
    main, note = targets.main_tensor(out)
    assert main is MAIN
    assert "'logits' is taken as its answer (output= changes it)" in note
    assert targets.main_tensor(outputs.BaseModelOutput(last_hidden_state=SMALL))[0] is SMALL


def test_another_output_can_be_chosen():
    output = {"logits": SMALL, "second": MAIN, "third": (MAIN,)}
    assert targets.main_tensor(output, "second") == (MAIN, "the answer is output 'second', as chosen")
    assert targets.main_tensor((SMALL, MAIN), 1)[0] is MAIN
    assert targets.main_tensor(output, "third")[0] is MAIN
    with pytest.raises(errors.UnknownName, match="no output 'fourth' of this network"):
        targets.main_tensor(output, "fourth")


@pytest.mark.parametrize("output", [None, 3, "text", [], {}, {"a": "b"}, (torch.arange(3),)])
def test_an_output_without_numbers_is_refused(output):
    with pytest.raises(errors.Unsupported, match="the network returned"):
        targets.main_tensor(output)


def test_an_answer_that_names_no_class_is_refused():
    with pytest.raises(errors.Unsupported, match=re.escape("the answer has shape (2, 5, 7), which names no class")):
        scores(0, torch.zeros(2, 5, 7))
