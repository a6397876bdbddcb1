"""What the demo says is true: each number is computed again here, by plain torch on the weights that it wrote."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import innersight
from innersight import data as digit_sets
from innersight import demo, errors
from innersight.data.small_cnn import SimpleCNN, load_weights
from innersight.demo import figures, page, words
from innersight.demo import study as measured
from innersight.draw import color, plots

EACH = 12  # held-out images of each digit, so that the tests are quick
PICTURES = (
    "confusion maps_conv1 maps_eight maps_relu maps_pool maps_relu_1 maps_pool_1 removed_conv1 removed_conv2 firing "
    "saliency_right saliency_worst"
).split()


@pytest.fixture(scope="module")
def digits():
    whole = digit_sets.load("digits")
    some = torch.cat([(whole.test_labels == k).nonzero()[:EACH, 0] for k in range(10)]).sort().values
    return replace(
        whole, test_images=whole.test_images[some], test_labels=whole.test_labels[some], note="some <digits> & others"
    )


@pytest.fixture(scope="module")
def done(digits, tmp_path_factory):
    """A demo that was run: result, folder, its numbers, the progress it told, and its network as plain torch."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    out.mkdir(parents=True)
    (out / "mine.txt").write_text("keep me")
    (out / "index.html").write_text("of an earlier demo")
    told = []
    random = torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digit_sets, "load", lambda _name, _root: digits)
        result = demo.run(out, epochs=3, seed=1, progress=lambda *step: told.append(step))
    assert torch.equal(random, torch.get_rng_state())
    model = SimpleCNN()
    load_weights(model, out / "weights.safetensors")
    found = json.loads((out / "findings.json").read_text())
    return SimpleNamespace(result=result, out=out, told=told, model=model.eval(), found=found)


@pytest.fixture(scope="module")
def logits(done, digits):
    with torch.no_grad():
        return done.model(digits.test_images)


def forward(model, x, removed=None, layer=None):
    """The network by hand, with one channel after a ReLU set to zero."""
    first = F.relu(model.conv1(x))
    if layer == "relu":
        first = first * (torch.arange(16) != removed).float()[:, None, None]
    second = F.relu(model.conv2(F.max_pool2d(first, 2)))
    if layer == "relu_1":
        second = second * (torch.arange(32) != removed).float()[:, None, None]
    x = F.max_pool2d(second, 2).flatten(1)
    third = F.relu(model.fc1(x))
    fourth = F.relu(model.fc2(third))
    return {"relu": first, "relu_1": second, "relu_2": third, "relu_3": fourth}, model.fc3(fourth)


# ---------------------------------------------------------------------------------------------------------------------
# The numbers


def test_accuracy_and_confusions_are_those_of_a_plain_loop(done, digits, logits):
    confusion = [[0] * 10 for _ in range(10)]
    for true, row in zip(digits.test_labels.tolist(), logits, strict=True):
        confusion[true][int(row.argmax())] += 1
    assert done.found["confusion"] == confusion
    right = sum(confusion[k][k] for k in range(10))
    assert (done.found["right"], done.found["held_out"]) == (right, 10 * EACH)
    assert done.result.accuracy == pytest.approx(right / (10 * EACH))
    assert 0.8 < done.result.accuracy < 1, "three epochs learn the digits, and leave mistakes to look at"
    confused = {(c["true"], c["read_as"]): c["times"] for c in done.found["confused"]}
    assert confused == {(t, p): confusion[t][p] for t in range(10) for p in range(10) if t != p and confusion[t][p]}
    assert list(confused.values()) == sorted(confused.values(), reverse=True)


def test_unsure_answers_are_counted(done, digits, logits):
    sure = logits.double().softmax(1).max(1).values
    wrong = logits.argmax(1) != digits.test_labels
    unsure = {"below": 0.9, "answers": int((sure < 0.9).sum()), "mistakes": int(((sure < 0.9) & wrong).sum())}
    assert done.found["unsure"] == unsure


def test_what_fires_is_what_a_plain_forward_pass_leaves_above_zero(done, digits):
    with torch.no_grad():
        layers, _ = forward(done.model, digits.test_images)
    for name, values in layers.items():
        fires = values.flatten(2) > 0 if values.dim() == 4 else values[:, :, None] > 0
        images = fires.any(2).sum(0)
        found = done.found["firing"][name]
        assert found["images"] == images.tolist()
        assert found["never"] == (images == 0).nonzero()[:, 0].tolist()
        assert found["nearly_never"] == ((images > 0) & (images < 0.01 * len(values))).nonzero()[:, 0].tolist()
        assert found["largest"] == pytest.approx(values.movedim(1, 0).flatten(1).max(1).values.tolist(), rel=1e-5)
        share = fires.double().mean(2)
        cells = [share[digits.test_labels == k].mean(0).tolist() for k in range(10)]
        np.testing.assert_allclose(found["share_of_cells_by_digit"], cells, rtol=1e-5, atol=1e-12)
    assert done.found["firing"]["relu_2"]["never"], "some units of fc1 are silent, or this test proves little"
    with torch.no_grad():
        paper = F.relu(done.model.conv1(torch.zeros(1, 1, 28, 28)))[0]
    assert done.found["fire_on_paper"] == (paper.amax((1, 2)) > 0).nonzero()[:, 0].tolist()


@pytest.mark.parametrize(("layer", "channels"), [("relu", range(16)), ("relu_1", range(0, 32, 3))])
def test_removing_a_channel_is_zeroing_it_by_hand(done, digits, logits, layer, channels):
    found = done.found["removed"][layer]
    x, labels = digits.test_images, digits.test_labels
    assert found["images_by_digit"] == [EACH] * 10
    own = logits[torch.arange(len(labels)), labels]
    right = (logits.argmax(1) == labels).double()
    for channel in channels:
        with torch.no_grad():
            _, without = forward(done.model, x, channel, layer)
        for k in range(10):
            of = labels == k
            assert found["score"][k] == pytest.approx(float(own[of].mean()), rel=1e-4)
            change = float((without[of, k] - own[of]).double().mean())
            assert found["change_of_score"][k][channel] == pytest.approx(change, abs=2e-5)
            loss = float(((without[of].argmax(1) == k).double() - right[of]).mean())
            assert found["change_of_accuracy"][k][channel] == pytest.approx(loss, abs=1e-6)
    for k, channel in enumerate(found["depends_most_on"]):
        assert found["change_of_score"][k][channel] == min(found["change_of_score"][k]) < 0


def test_removing_what_never_fires_changes_nothing(done):
    for layer, removed in done.found["removed"].items():
        for channel in done.found["firing"][layer]["never"]:
            assert all(abs(row[channel]) < 1e-5 for row in removed["change_of_score"]), "but for rounding"
            assert all(row[channel] == 0 for row in removed["change_of_accuracy"])


def test_the_worst_mistakes_are_the_most_confident(done, digits, logits):
    probabilities = logits.double().softmax(1)
    sure, predicted = probabilities.max(1)
    wrong = (predicted != digits.test_labels).nonzero()[:, 0].tolist()
    worst = sorted(wrong, key=lambda i: -float(sure[i]))[:5]
    assert [look["index"] for look in done.found["looks"]] == worst
    for look in done.found["looks"]:
        i = look["index"]
        assert (look["true"], look["predicted"]) == (int(digits.test_labels[i]), int(predicted[i]))
        assert look["rival"] == look["true"]
        assert look["probability"] == pytest.approx(float(sure[i]), rel=1e-4)
        assert look["probability_true"] == pytest.approx(float(probabilities[i, look["true"]]), rel=1e-3)


def grad_cam(model, x, of, minus=None):
    """(8, 8) after conv2's ReLU, by autograd."""
    maps = F.relu(model.conv2(F.max_pool2d(F.relu(model.conv1(x[None])), 2))).detach().requires_grad_()
    y = F.max_pool2d(maps, 2).flatten(1)
    scores = model.fc3(F.relu(model.fc2(F.relu(model.fc1(y)))))[0]
    score = scores[of] - (scores[minus] if minus is not None else 0)
    (gradient,) = torch.autograd.grad(score, maps)
    return F.relu((gradient.mean((2, 3), keepdim=True) * maps).sum(1))[0].detach().double()


def test_the_place_of_the_evidence_is_where_the_units_look(done, digits):
    """The middles of the 8 units lie at pixels 7, 9 ... 21. Laid over the picture, a unit is a bump of mass 2 about its
    middle, and the outermost ones hold their cell and fade, with mass 3. Of those at 13 and 15 an eighth lies beyond
    the middle of the picture."""
    mass = torch.tensor([3, 2, 2, 2, 2, 2, 2, 3], dtype=torch.float64)
    before = mass * torch.tensor([1, 1, 1, 7 / 8, 1 / 8, 0, 0, 0], dtype=torch.float64)
    for look in done.found["looks"]:
        x = digits.test_images[look["index"]]
        for name, minus in (("cam", None), ("contrast", look["rival"])):
            cam = grad_cam(done.model, x, look["predicted"], minus)
            total = float(mass @ cam @ mass)
            upper, left = float(before @ cam @ mass) / total, float(mass @ cam @ before) / total
            words = [f"{'upper' if upper > 0.5 else 'lower'}"] * (max(upper, 1 - upper) >= 0.6)
            words += [f"{'left' if left > 0.5 else 'right'}"] * (max(left, 1 - left) >= 0.6)
            found = look[name]
            assert found["words"].split()[:-1] == words
            if not words:
                continue
            rows = before if "upper" in words else mass - before if "lower" in words else mass
            columns = before if "left" in words else mass - before if "right" in words else mass
            assert found["share"] == pytest.approx(float(rows @ cam @ columns) / total, abs=1e-4)


def test_painting_over_is_done_by_hand(done, digits):
    tried = [look for look in done.found["looks"] if look["cam"]["box"]]
    assert tried
    for look in tried:
        x = digits.test_images[look["index"]]
        words, painted, opposite = look["cam"]["words"].split(), x.clone(), x.clone()
        here, there = slice(0, 14), slice(14, 28)
        rows = (here, there) if "upper" in words else (there, here) if "lower" in words else (slice(None),) * 2
        columns = (here, there) if "left" in words else (there, here) if "right" in words else (slice(None),) * 2
        painted[0, rows[0], columns[0]] = 0
        opposite[0, rows[1], columns[1]] = 0
        with torch.no_grad():
            scores = done.model(torch.stack([x, painted, opposite]))
        own = scores[:, look["predicted"]].double()
        assert look["painted"] == pytest.approx(float(own[0] - own[1]), abs=1e-4)
        assert look["opposite"] == pytest.approx(float(own[0] - own[2]), abs=1e-4)
        assert look["instead"][0] == int(scores[1].argmax())
        assert look["instead"][1] == pytest.approx(float(scores[1].softmax(0).max()), rel=1e-4)


def test_the_share_on_ink_is_that_of_the_plain_gradient(done, digits, logits):
    def gradient(i):
        x = digits.test_images[i : i + 1].clone().requires_grad_()
        (g,) = torch.autograd.grad(done.model(x)[0].max(), x)
        ink = x.detach()[0, 0] > 0.5
        g = g[0, 0].abs().double()
        return float((g * ink).sum() / g.sum()), float(ink.double().mean())

    for look in done.found["looks"]:
        assert (look["ink"], look["covered"]) == pytest.approx(gradient(look["index"]), rel=1e-4)
    right = (logits.argmax(1) == digits.test_labels).nonzero()[:, 0].tolist()
    means = np.mean([gradient(i) for i in right], axis=0)
    on_ink = done.found["gradient_on_ink"]
    assert (on_ink["share"], on_ink["picture"]) == pytest.approx(tuple(means), rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# The words


def test_sentences_say_the_numbers(done):
    said, found = "\n".join(done.result.findings), done.found
    assert found["findings"] == list(done.result.findings)
    assert f"{found['right']} of {found['held_out']}" in said
    first = found["confused"][0]
    assert re.search(rf"an? {first['true']} read as an? {first['read_as']} \(", said)
    for k in range(10):
        conv1, conv2 = (found["removed"][layer] for layer in ("relu", "relu_1"))
        a, b = conv1["depends_most_on"][k], conv2["depends_most_on"][k]
        score, less = conv1["score"][k], conv1["score"][k] + conv1["change_of_score"][k][a]
        assert f"Digit {k} depends most on conv1 channel {a} (without it: score {score:.1f} to {less:.1f}," in said
        assert f" and conv2 channel {b} (" in said
    for layer, name in (("relu_2", "fc1"), ("relu_3", "fc2")):
        fires = found["firing"][layer]
        assert f"{len(fires['never'])} of the {len(fires['images'])} of {name}" in said
    for look in found["looks"]:
        assert f"Held-out image {look['index']}, a" in said


def test_silent_channels_are_named():
    cells = np.zeros((10, 4))
    some = measured.Firing("relu", 200, np.array([200, 0, 1, 0]), np.ones(4), cells)
    assert words.silent(some) == (
        "conv1: channels 1 and 3 never fire in any of the 200 held-out images, so they could be cut out without "
        "changing an answer to one of them; channel 2 fires in only 1 of them."
    )
    one = measured.Firing("relu_1", 200, np.array([200, 0]), np.ones(2), cells)
    assert "conv2: channel 1 never fires in any of the 200 held-out images, so it could be cut out" in words.silent(one)
    none = measured.Firing("relu_1", 200, np.array([200, 150]), np.ones(2), cells)
    assert words.silent(none).endswith("each fires somewhere in at least 75.0% of the held-out images.")


def test_a_network_without_mistakes_shows_its_least_sure_answers(done, digits, logits, monkeypatch):
    monkeypatch.setattr(measured, "MOST_REMOVED", 2)
    net = innersight.open(done.model, input_shape=(1, 28, 28), preprocess=digits.preprocess)
    believed = replace(digits, test_labels=logits.argmax(1))
    study = measured.measure(net, believed, 3, 1, lambda *_: None)
    top = logits.double().softmax(1).topk(2, 1)
    least = top.values[:, 0].argsort()[:5].tolist()
    assert [look.index for look in study.looks] == least
    assert [look.rival for look in study.looks] == top.indices[least, 1].tolist()
    said = "\n".join(words.findings(study))
    assert f"There is no mistake among {10 * EACH} images" in said
    assert "read right with only" in said
    assert "confused" not in said
    assert words.which(study) == "the first 2 held-out images"
    assert study.dependence["relu"].images.tolist() == [2] * 10
    text = page.render(study, net)
    assert "Its least sure answers" in text
    assert "the first 2 held-out images of each digit" in text
    assert "Each channel was removed alone, on the first 2 held-out images of each digit" in said


def test_shares_are_never_rounded_to_a_certainty():
    said = [words.percent(v) for v in (0, 0.0001, 0.98873, 0.9994, 0.99999, 1.0)]
    assert said == ["0%", "under 0.1%", "98.9%", "over 99.9%", "over 99.9%", "100%"]


def test_wilson_interval_is_that_of_the_literature():
    """R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    assert measured.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert measured.wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert measured.wilson(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)
    assert measured.wilson(29, 29) == pytest.approx((0.8830, 1), abs=1e-4)


@pytest.mark.parametrize(
    ("cells", "words", "share", "box"),
    [
        ({(0, 0): 1}, "upper left quarter", 1, (0, 0, 2, 2)),
        ({(3, 3): 3, (0, 0): 1}, "lower right quarter", 0.75, (2, 2, 4, 4)),
        ({(3, 0): 1, (3, 3): 1}, "lower half", 1, (2, 0, 4, 4)),
        ({(0, 3): 1, (3, 3): 1}, "right half", 1, (0, 2, 4, 4)),
        ({(0, 0): 1, (3, 3): 1}, "", 0.5, None),
        ({}, "", 0, None),
    ],
)
def test_place(cells, words, share, box):
    values = np.zeros((4, 4), np.float32)
    for at, value in cells.items():
        values[at] = value
    assert measured.place(values) == measured.Place(words, share, box)


# ---------------------------------------------------------------------------------------------------------------------
# The files


def test_the_files_are_there_and_open(done):
    names = {f"{name}.png" for name in (*PICTURES, "example")}
    names |= {"layers.txt", "weights.safetensors", "findings.json", "index.html", "report.html"}
    assert {f.name for f in done.result.files} == names
    assert {f.name for f in done.out.iterdir()} == {*names, "mine.txt"}
    assert (done.out / "mine.txt").read_text() == "keep me"
    for name in PICTURES:
        with Image.open(done.out / f"{name}.png") as picture:
            picture.load()
            assert picture.width >= 900
            assert np.asarray(picture.convert("L")).std() > 10
    assert "conv2   Conv2d     32x8x8    14x14" in (done.out / "layers.txt").read_text()


def test_the_page_shows_every_picture_and_every_word_safely(done):
    page = (done.out / "index.html").read_text()
    for name in PICTURES:
        assert f'<img src="{name}.png" alt="' in page
    assert "some &lt;digits&gt; &amp; others" in page
    assert "<digits>" not in page
    assert "<script" not in page
    assert set(re.findall(r"(?:src|href)=\"([^\"]*)\"", page)) == {*(f"{name}.png" for name in PICTURES), "report.html"}
    tags = re.findall(r"<(/?)(\w+)", page.split("</head>")[1])
    opened = []
    for end, tag in tags:
        if tag == "img":
            continue
        if not end:
            opened.append(tag)
        elif tag != "html" or opened:
            assert opened.pop() == tag
    assert not opened


def test_the_weights_open_as_the_printed_commands_say(done, digits, logits):
    net = innersight.open(str(done.out / "weights.safetensors"), arch=measured.ARCH)
    np.testing.assert_allclose(net.predict(digits.test_images).logits, logits, atol=1e-5)
    lines = done.result.lines()
    commands = lines[lines.index("Next:") + 1 :]
    assert commands[0].strip() == f"innersight layers {done.out / 'weights.safetensors'} --arch {measured.ARCH}"
    assert all(str(done.out / "weights.safetensors") in c and measured.ARCH in c for c in commands)
    assert lines[0] == "Data: some <digits> & others."


def test_the_example_picture_is_the_digit_of_the_maps(done, digits):
    net = innersight.open(str(done.out / "weights.safetensors"), arch=measured.ARCH)
    answer = net.predict(str(done.out / "example.png")).classes[0]
    with Image.open(done.out / "example.png") as picture:
        pixels = torch.from_numpy(np.asarray(picture).copy()) / 255
    index = int((digits.test_images[:, 0] - pixels).abs().amax((1, 2)).argmin())
    assert (digits.test_images[index, 0] - pixels).abs().max() <= 0.5 / 255 + 1e-6
    assert answer == 2 == int(digits.test_labels[index])


def test_to_json_is_json(done):
    again = json.loads(json.dumps(done.result.to_json()))
    assert again["accuracy"] == done.result.accuracy
    assert again["findings"] == list(done.result.findings)
    assert again["next"][0].startswith("innersight layers ")


def test_progress_goes_through_the_stages(done):
    stages = list(dict.fromkeys(step[0] for step in done.told))
    assert tuple(stages) == demo.STAGES
    for stage in stages:
        counts = [(n, total) for s, n, total, _ in done.told if s == stage]
        assert counts[0][0] == 0
        assert counts[-1][0] == counts[-1][1]
        assert [n for n, _ in counts] == sorted(n for n, _ in counts)
    assert all(isinstance(text, str) for *_, text in done.told)


# ---------------------------------------------------------------------------------------------------------------------
# Again, interrupted, refused


@pytest.fixture
def quick(monkeypatch, digits):
    """Runs without drawing."""
    monkeypatch.setattr(digit_sets, "load", lambda _name, _root: digits)
    monkeypatch.setattr(plots, "png", lambda _figure: b"drawn elsewhere")
    for name in ("_draw_confusion", "_draw_maps", "_draw_removed", "_draw_firing", "_draw_right", "_draw_worst"):
        monkeypatch.setattr(figures, name, lambda *_, **__: None)


@pytest.mark.usefixtures("quick")
def test_the_same_seed_finds_the_same(done, tmp_path):
    demo.run(tmp_path, epochs=3, seed=1)
    for name in ("findings.json", "index.html", "layers.txt", "example.png"):
        assert (tmp_path / name).read_bytes() == (done.out / name).read_bytes(), name
    load_weights(again := SimpleCNN(), tmp_path / "weights.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), done.model.parameters(), strict=True))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("stage", ["train", "pictures"])
def test_an_interrupt_leaves_no_half_of_a_demo(tmp_path, stage):
    (tmp_path / "index.html").write_text("of an earlier demo")

    def stop(now, done, _total, _text):
        if now == stage and done:
            raise KeyboardInterrupt

    before = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        demo.run(tmp_path, epochs=1, progress=stop)
    assert [f.name for f in tmp_path.iterdir()] == ["index.html"]
    assert (tmp_path / "index.html").read_text() == "of an earlier demo"
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("inside", ["", "below"])
def test_a_folder_that_cannot_be_written_is_refused_before_training(monkeypatch, digits, tmp_path, inside):
    monkeypatch.setattr(digit_sets, "load", lambda _name, _root: digits)
    monkeypatch.setattr(demo, "_train", lambda *_: pytest.fail("trained for nothing"))
    place = tmp_path / "file"
    place.write_text("mine")
    with pytest.raises(errors.InputError, match=r"the demo cannot write into the folder '.*file.*': .*; name another"):
        demo.run(place / inside if inside else place)
    assert place.read_text() == "mine"


def test_what_cannot_be_read_is_refused_before_a_folder_is_made(tmp_path):
    with pytest.raises(errors.UnknownName, match="no data set 'letters'"):
        demo.run(tmp_path / "new", data="letters")
    with pytest.raises(errors.InputError, match="read no folder"):
        demo.run(tmp_path / "new", root=tmp_path)
    assert not (tmp_path / "new").exists()


def test_the_cells_of_a_table_have_the_colors_of_their_values():
    values = np.array([[-2.0, 0.0, 1.0], [0.5, 2.0, -1.0]])
    scale = color.Scale(-2, 2, True, -2, 2)
    muted = np.array([[False, False, False], [False, False, True]])
    table = plots.Table("caption", values, [["-2", "", "1"], ["", "x", ""]], "ab", "cde", scale, muted=muted)
    figure = plots.tables([table], title="title", notes=["note"])
    drawn = figure.axes[0].images[0].get_array()
    expected = color.paint(values, scale)
    expected[1, 2] = 232
    np.testing.assert_array_equal(drawn, expected)
    texts = {tuple(map(round, t.get_position())): (t.get_text(), t.get_color()) for t in figure.axes[0].texts}
    assert texts == {(0, 0): ("-2", "white"), (2, 0): ("1", plots.INK), (1, 1): ("x", "white")}
    bar = figure.axes[1]
    marks = {tick: text.get_text() for tick, text in zip(bar.get_yticks(), bar.get_yticklabels(), strict=True)}
    assert marks == {0: "-2", 0.5: "0", 1: "2"}
