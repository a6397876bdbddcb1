"""The command line: what it prints and writes, and that bad input gets exit code 2 and one sentence."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from innersight.cli import _as_options, _preprocess_record, main

MODELS = """
import torch
from torch import nn
import torch.nn.functional as F

class Tiny(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.fc = nn.Linear(8, classes)

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        return self.fc(x.mean((2, 3)))

class Wider(Tiny):
    def __init__(self):
        super().__init__()
        self.conv2 = nn.Conv2d(6, 16, 3, padding=1)
        self.fc = nn.Linear(16, 4)
        self.extra = nn.Linear(4, 4)

class Broken(Tiny):
    def forward(self, x):
        return super().forward(torch.log(-1 - x.abs()))

class Two(Tiny):
    def forward(self, x, prior):
        return super().forward(x) + prior

class Several(Tiny):
    def forward(self, x):
        y = super().forward(x)
        return {"logits": y, "negative": -y}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as users have it (code and weights), a black box that unpickles, and pictures, good and bad."""
    import torch
    from safetensors.torch import save_file

    place = tmp_path_factory.mktemp("cli")
    (place / "cli_models.py").write_text(MODELS)
    spec = importlib.util.spec_from_file_location("cli_models", place / "cli_models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["cli_models"] = module  # what --arch imports, from whichever folder the tests run in
    generator = torch.Generator().manual_seed(3)
    state = {k: torch.randn(v.shape, generator=generator) * 0.3 for k, v in module.Tiny().state_dict().items()}
    save_file(state, place / "tiny.safetensors")
    torch.save(module.Tiny(), place / "pickled.pth")
    rng = np.random.default_rng(0)
    for name, size in (("dog.png", (40, 30)), ("cat.jpg", (30, 48))):
        Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(place / name)
    (place / "pictures").mkdir()
    Image.open(place / "dog.png").save(place / "pictures" / "one.png")
    Image.open(place / "dog.png").rotate(180).save(place / "pictures" / "two.png")
    (place / "empty").mkdir()
    (place / "notes.png").write_text("no picture at all\n")
    (place / "cut.jpg").write_bytes((place / "cat.jpg").read_bytes()[:400])
    Image.new("1", (20_000, 20_000)).save(place / "huge.png")
    return place


def model(factory: str) -> tuple[str, ...]:
    return ("tiny.safetensors", "--arch", f"cli_models:{factory}", "--input-shape", "3x16x16")


MODEL = (*model("Tiny"), "--labels", "dog,cat,bird,fish")


@pytest.fixture
def run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`run("maps", *MODEL, "dog.png")` in a folder with links to the files; returns click's result."""
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)

    def invoke(*args: str) -> Result:
        return CliRunner().invoke(main, [str(a) for a in args], catch_exceptions=False)

    return invoke


def ok(result: Result) -> Result:
    assert result.exit_code == 0, result.output
    return result


def shell(*args: str, cwd: Path | None = None, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, capture_output=True, text=True, encoding="utf-8", check=False, **options
    )


# ---------------------------------------------------------------------------------------------------------------------
# Help


def test_help_of_every_command_loads_neither_torch_nor_numpy_and_takes_under_half_a_second() -> None:
    code = """
        import sys, time
        from innersight.cli import main
        for args in [[], *([name] for name in main.commands)]:
            try:
                main([*args, "--help"])
            except SystemExit as end:
                assert end.code == 0
        heavy = {"torch", "numpy", "PIL", "matplotlib", "rich"} & set(sys.modules)
        assert not heavy, heavy
        assert time.process_time() < 0.5, time.process_time()  # time.process_time counts the start of Python, too
    """
    done = shell("-c", textwrap.dedent(code))
    assert done.returncode == 0, done.stderr
    for name in main.commands:
        assert f"Usage: innersight {name} " in done.stdout


def test_commands_are_listed_in_the_order_one_meets_them(run) -> None:
    listed = re.findall(r"^  (\w+)  ", ok(run("--help")).output.partition("Commands:")[2], re.MULTILINE)
    order = "demo layers maps explain maximize compare report view scan methods"
    assert listed == order.split()


def test_the_module_runs_as_a_program() -> None:
    done = shell("-m", "innersight", "--version")
    assert (done.returncode, done.stdout.split()[0]) == (0, "innersight")


def test_choices_are_those_that_the_drawing_has() -> None:
    from innersight.draw import color, plots
    from innersight.results import FUSIONS

    choices = {p.name: tuple(p.type.choices) for p in main.commands["explain"].params if hasattr(p.type, "choices")}
    assert choices == {"style": tuple(color.STYLES), "scale": tuple(plots.SCALES), "fuse": tuple(FUSIONS)}
    choices = {p.name: tuple(p.type.choices) for p in main.commands["maps"].params if hasattr(p.type, "choices")}
    assert choices == {"order": tuple(plots.ORDERS), "scale": tuple(plots.SCALES)}


# ---------------------------------------------------------------------------------------------------------------------
# demo


def test_demo_runs_with_its_options_and_prints_what_it_found(run, monkeypatch: pytest.MonkeyPatch) -> None:
    from innersight import demo

    asked = {}

    def stub(progress, **options):
        asked.update(options)
        for step in range(21):
            progress("train", step, 20, f"epoch {step}")
        found = ("the two is read as a seven",)
        return demo.DemoResult(Path("there"), "digits that are none", 0.5, (Path("there/index.html"),), found, 2.0)

    monkeypatch.setattr(demo, "run", stub)
    result = ok(run("demo", "--data", "mnist", "--root", "files", "--out", "there", "--epochs", "2", "--seed", "5"))
    assert asked == {"out": Path("there"), "data": "mnist", "root": Path("files"), "epochs": 2, "seed": 5}
    assert "- the two is read as a seven" in result.stdout
    assert result.stderr.splitlines()[-1] == "train 20/20: epoch 20"
    assert len(result.stderr.splitlines()) == 11

    result = ok(run("demo", "--json"))
    assert asked == {"out": Path("innersight-demo"), "data": "digits", "root": None, "epochs": None, "seed": 0}
    assert json.loads(result.stdout)["accuracy"] == 0.5
    assert not result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# layers


def test_layers_prints_the_table_and_totals_and_says_on_stderr_what_was_chosen(run) -> None:
    result = ok(run("layers", *MODEL))
    lines = result.stdout.splitlines()
    assert lines[0].split()[:3] == ["layer", "kind", "output"]
    row = next(line for line in lines if line.startswith("conv2 "))
    assert row.split() == ["conv2", "Conv2d", "8x8x8", "8x8", "2", "0.5", "440"]
    assert "644 parameters" in lines[-1]
    assert all(line.startswith("note: ") for line in result.stderr.splitlines())
    assert "weights from tiny.safetensors" in result.stderr


def test_layers_as_json_with_effective_fields_inside_the_exact_ones(run) -> None:
    record = json.loads(ok(run("layers", *MODEL, "--json", "--effective")).stdout)
    assert record["input_shape"] == [3, 16, 16]
    assert record["classes"] == 4
    assert record["parameters"] == 644
    rows = {row["name"]: row for row in record["layers"]}
    assert next(iter(rows)) == "conv1"
    assert rows["conv2"]["receptive_field"]["size"] == [8, 8]
    top, left, bottom, right = rows["conv2"]["effective"]
    assert 0 < bottom - top <= 8
    assert 0 < right - left <= 8
    assert rows["fc"]["effective"] is None


def test_layers_all_lists_views_too(run) -> None:
    few = json.loads(ok(run("layers", "torchvision:squeezenet1_1", "--weights", "none", "--json")).stdout)["layers"]
    every = json.loads(ok(run("layers", "torchvision:squeezenet1_1", "--weights", "none", "--json", "--all")).stdout)
    names = [row["name"] for row in every["layers"]]
    assert set(names) > {row["name"] for row in few}
    assert "flatten" in names


# ---------------------------------------------------------------------------------------------------------------------
# maps


def test_maps_of_the_first_layer_are_drawn_and_said(run) -> None:
    result = ok(run("maps", *MODEL, "dog.png"))
    assert re.search(r"^conv1 +6 +16x16 +-?\d", result.stdout, re.MULTILINE)
    assert result.stdout.splitlines()[-1] == "wrote maps.png"
    assert "layer conv1: the first with maps (--layer changes it" in result.stderr
    with Image.open("maps.png") as picture:
        assert picture.format == "PNG"
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 50


def test_maps_of_several_layers_and_images_go_into_a_file_each_and_values_into_one(run) -> None:
    import innersight

    args = ("pictures", "--layer", "conv1,relu", "--layer", "conv2", "--out", "m.png", "--out", "m.npz")
    result = ok(run("maps", *MODEL, *args, "--columns", "3", "--scale", "shared", "--order", "activation"))
    files = [line.removeprefix("wrote ") for line in result.stdout.splitlines() if line.startswith("wrote ")]
    pictures = [f"m_{layer}_{i}.png" for layer in ("conv1", "relu", "conv2") for i in (0, 1)]
    assert sorted(files) == sorted([*pictures, "m.npz"])
    for file in pictures:
        with Image.open(file) as picture:
            picture.load()
    maps = innersight.load("m.npz")
    assert {name: values.shape for name, values in maps.items()} == {
        "conv1": (2, 6, 16, 16), "relu": (2, 6, 16, 16), "conv2": (2, 8, 8, 8)
    }  # fmt: skip
    np.testing.assert_array_equal(maps["relu"], np.maximum(maps["conv1"], 0))


def test_maps_of_all_layers_as_one_pdf_and_as_json(run) -> None:
    result = ok(run("maps", *MODEL, "dog.png", "--layer", "all", "--out", "m.pdf", "--json"))
    record = json.loads(result.stdout)
    assert record["files"] == ["m.pdf"]
    assert Path("m.pdf").read_bytes()[:4] == b"%PDF"
    assert set(record["layers"]) >= {"conv1", "relu", "pool", "conv2", "relu_1", "pool_1"}
    assert record["layers"]["conv1"]["shape"] == [1, 6, 16, 16]
    assert record["provenance"]["notes"]
    assert not result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# explain


def test_explain_prints_prediction_target_and_score_and_draws(run) -> None:
    import innersight

    result = ok(run("explain", *MODEL, "dog.png", "cat.jpg", "--target", "bird"))
    net = innersight.open(MODEL[0], arch=MODEL[2], input_shape=(3, 16, 16), labels=["dog", "cat", "bird", "fish"])
    predictions = net.predict(["dog.png", "cat.jpg"])
    for i, name in enumerate(("dog.png", "cat.jpg")):
        (label, p), *_ = predictions.top(1)[i]
        (row,) = (line for line in result.stdout.splitlines() if line.startswith(name))
        assert row.split() == [name, label, f"{p:.3f}", "bird", f"{predictions.logits[i, 2]:#.4g}"]
    assert result.stdout.splitlines()[-1] == "wrote heat.png"
    with Image.open("heat.png") as picture:
        assert picture.format == "PNG"


def test_explain_with_several_methods_makes_one_comparison_and_a_file_of_values_each(run) -> None:
    import innersight

    args = (
        "--method",
        "gradcam,gradient",
        "--layer",
        "conv2",
        "--option",
        "relu=false",
        "--out",
        "h.png",
        "--out",
        "h.npz",
    )
    ok(run("explain", *MODEL, "dog.png", *args))
    assert {p.name for p in Path().glob("h[._]*")} == {"h.png", "h_gradcam.npz", "h_gradient.npz"}
    cam = innersight.load("h_gradcam.npz")
    assert cam.provenance.layer == "conv2"
    assert cam.provenance.options == {"relu": False}
    net = innersight.open(MODEL[0], arch=MODEL[2], input_shape=(3, 16, 16))
    direct = net.explain("dog.png", method="gradcam", layer="conv2", relu=False)
    np.testing.assert_allclose(cam.values, direct.values, rtol=1e-5, atol=1e-6)


def test_explain_at_several_layers_names_each_map_by_method_and_layer(run) -> None:
    import innersight

    layers = ("--layer", "conv1,conv2", "--layer", "relu")
    args = ("--method", "gradcam,gradient", *layers, "--out", "h.png", "--out", "h.npz", "--json")
    record = json.loads(ok(run("explain", *MODEL, "dog.png", *args)).stdout)
    heads = ["gradcam at conv1", "gradcam at conv2", "gradcam at relu", "gradient"]
    assert list(record["saliency"]) == heads
    stems = ["h_gradcam_at_conv1", "h_gradcam_at_conv2", "h_gradcam_at_relu", "h_gradient"]
    assert record["files"] == ["h.png", *(f"{stem}.npz" for stem in stems)]
    net = innersight.open(MODEL[0], arch=MODEL[2], input_shape=(3, 16, 16))
    direct = net.explain("dog.png", "gradcam", layer=["conv1", "conv2", "relu"])
    for stem, layer in zip(stems, direct, strict=False):
        np.testing.assert_allclose(innersight.load(f"{stem}.npz").values, direct[layer].values, rtol=1e-5, atol=1e-7)


def test_explain_fuses_layers_into_one_map(run) -> None:
    import innersight

    args = ("--method", "gradcam", "--layer", "conv1,conv2", "--fuse", "max", "--out", "h.npz", "--json")
    record = json.loads(ok(run("explain", *MODEL, "dog.png", *args)).stdout)
    assert record["files"] == ["h.npz"]
    net = innersight.open(MODEL[0], arch=MODEL[2], input_shape=(3, 16, 16))
    direct = net.explain("dog.png", "gradcam", layer=["conv1", "conv2"], fuse="max")
    np.testing.assert_allclose(innersight.load("h.npz").values, direct.values, rtol=1e-5, atol=1e-7)


def test_explain_against_a_class_scores_the_difference(run) -> None:
    def score(*args: str) -> float:
        record = json.loads(ok(run("explain", *MODEL, "dog.png", *args, "--json")).stdout)
        return record["saliency"]["gradient"]["verdict"]["score"][0]

    both = score("--target", "dog", "--against", "fish")
    assert both == pytest.approx(score("--target", "dog") - score("--target", "3"), rel=1e-5)
    others = sum(score("--target", c) for c in ("0", "1", "2", "3")) - score("--target", "dog")
    similar = score("--target", "dog", "--against", "similar")
    assert similar == pytest.approx(score("--target", "dog") - 0.6 * others / 3, rel=1e-4)


def test_explain_as_json_holds_predictions_saliency_and_files(run) -> None:
    result = ok(run("explain", *MODEL, "dog.png", "--method", "gradcam", "--out", "h.safetensors", "--json"))
    record = json.loads(result.stdout)
    assert record["files"] == ["h.safetensors"]
    assert record["predictions"]["images"][0]["name"] == "dog.png"
    assert record["saliency"]["gradcam"]["provenance"]["method"] == "gradcam"
    assert not result.stderr


def test_an_output_can_be_chosen(run) -> None:
    def logits(*args: str) -> float:
        record = json.loads(ok(run("explain", *model("Several"), "dog.png", "--target", "1", *args, "--json")).stdout)
        return record["saliency"]["gradient"]["verdict"]["score"][0]

    assert logits("--output-name", "negative") == pytest.approx(-logits())


def test_preprocessing_changes_what_the_network_sees(run) -> None:
    def mean(*args: str) -> float:
        record = json.loads(ok(run("maps", *MODEL, "dog.png", "--json", "--out", "m.npz", *args)).stdout)
        return record["layers"]["conv1"]["mean"]

    assert mean() == mean("--preprocess", "mean=0 std=1")
    said = ok(run("maps", *MODEL, "dog.png", "--preprocess", "mean=0.5,0.5,0.5 std=0.25")).stderr
    assert re.search(r"prepared as asked: 16x16 RGB.*minus 0\.5.*over 0\.25", said)
    assert mean() != mean("--preprocess", "mean=0.5,0.5,0.5 std=0.25")
    Path("p.json").write_text('{"mean": [0.5, 0.5, 0.5], "std": 0.25}')
    assert mean("--preprocess", "p.json") == mean("--preprocess", "mean=0.5,0.5,0.5", "--preprocess", "std=0.25")


def test_preprocess_pairs_are_read_as_numbers_lists_and_words() -> None:
    given = ["mean=.5,.5,.5,std=0.2", "size=224x256 resize=squash", "scale=1/255; invert=true resize_to=none"]
    assert _preprocess_record(given) == {
        "mean": [0.5, 0.5, 0.5], "std": 0.2, "size": [224, 256], "resize": "squash", "scale": 1 / 255, "invert": True,
        "resize_to": None,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# methods


def test_methods_lists_every_method_with_its_paper(run) -> None:
    from innersight.methods import all_methods

    lines = ok(run("methods")).stdout.splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(all_methods())
    assert "arXiv:1312.6034" in next(line for line in lines if line.startswith("gradient "))
    record = json.loads(ok(run("methods", "--json")).stdout)
    assert [m["name"] for m in record] == list(all_methods())
    assert record[0]["options"] == {"channels": False}


def test_methods_with_a_name_explains_it_and_its_options(run) -> None:
    said = ok(run("methods", "gradcam")).stdout
    assert "--option relu=true" in said
    assert "Selvaraju" in said
    assert "Where a layer holds evidence" in said


# ---------------------------------------------------------------------------------------------------------------------
# Bad input

BAD = {
    "no such model file": (["layers", "tinny.safetensors"], "no file tinny.safetensors"),
    "no such zoo model": (["layers", "torchvision:resnet81"], "did you mean resnet18"),
    "a file that is no model": (["layers", "notes.png"], "notes.png has the suffix .png"),
    "weights that do not fit": (
        ["layers", "tiny.safetensors", "--arch", "cli_models:Wider"],
        r"does not fit .*Wider: it lacks extra\.weight.*conv2\.weight \(8x6x3x3 in the file, 16x6x3x3",
    ),
    "a pickle that needs trust": (["layers", "pickled.pth", "--input-shape", "3,16,16"], "--trust"),
    "an arch that is not there": (["layers", "tiny.safetensors", "--arch", "cli_models:Tinny"], "did you mean Tiny"),
    "a device that is not there": (["layers", *MODEL, "--device", "warp"], "no device 'warp'"),
    "no such picture": (["maps", *MODEL, "dig.png"], "no such file: dig.png; did you mean dog.png"),
    "no such glob": (["maps", *MODEL, "*.webp"], r"no file matches \*\.webp"),
    "an empty folder": (["explain", *MODEL, "empty"], "the folder empty is empty"),
    "not a picture": (["maps", *MODEL, "notes.png"], "notes.png is not a picture"),
    "a truncated picture": (["maps", *MODEL, "cut.jpg"], "cut.jpg is .*(cut off|damaged)"),
    "a huge picture": (["explain", *MODEL, "huge.png"], "huge.png is .*more than"),
    "an unknown layer": (["maps", *MODEL, "dog.png", "--layer", "conv3"], "no layer 'conv3'.*did you mean conv"),
    "an unknown layer to explain": (["explain", *MODEL, "dog.png", "--layer", "covn1"], "did you mean conv1"),
    "one layer to fuse": (
        ["explain", *MODEL, "dog.png", "--method", "gradcam", "--layer", "conv1", "--fuse", "max"],
        "--fuse makes one map of several layers: name them with --layer",
    ),
    "an unknown class": (["explain", *MODEL, "dog.png", "--target", "brid"], "no class 'brid'.*did you mean bird"),
    "a class out of range": (["explain", *MODEL, "dog.png", "--target", "9"], "4 outputs, numbered 0 to 3"),
    "an unknown method": (["explain", *MODEL, "dog.png", "--method", "gradcan"], "did you mean gradcam"),
    "an unknown method to list": (["methods", "gradcan"], "did you mean gradcam"),
    "an unknown option": (
        ["explain", *MODEL, "dog.png", "--method", "gradcam", "--option", "rule=1"],
        "no option 'rule' of method 'gradcam'; (did you mean|there is only) relu",
    ),
    "an unknown option of several": (
        ["explain", *MODEL, "dog.png", "--method", "gradcam,layercam", "--option", "rule=1"], "no option 'rule'.*relu"
    ),
    "an option of another type": (
        ["explain", *MODEL, "dog.png", "--method", "gradcam", "--option", "relu=maybe"], "relu is true or false"
    ),
    "an option without a value": (["explain", *MODEL, "dog.png", "--option", "channels"], "KEY=VALUE"),
    "NaN in the output": (
        ["explain", *model("Broken"), "dog.png"], "NaN.*log"
    ),
    "a model with two inputs": (
        ["explain", *model("Two"), "dog.png"], "prior|two inputs"
    ),
    "an unknown suffix": (["explain", *MODEL, "dog.png", "--out", "h.gif"], "unknown suffix '.gif'"),
    "no suffix": (["maps", *MODEL, "dog.png", "--out", "maps"], "unknown suffix ''"),
    "no folder to write to": (["maps", *MODEL, "dog.png", "--out", "no/m.png"], "there is no folder 'no'"),
    "a folder as output": (["maps", *MODEL, "dog.png", "--out", "dir.png"], "it is a folder"),
    "labels without a file": (["layers", *MODEL[:-1], "none.txt"], "no file none.txt"),
    "preprocessing unheard of": (["maps", *MODEL, "dog.png", "--preprocess", "maen=0.5"], "did you mean mean"),
    "preprocessing that is no number": (["maps", *MODEL, "dog.png", "--preprocess", "mean=grey"], "mean is a number"),
    "preprocessing from a file that is not JSON": (["maps", *MODEL, "dog.png", "--preprocess", "notes.png"], "no JSON"),
    "preprocessing from a file that is not there": (["maps", *MODEL, "dog.png", "--preprocess", "no.json"], "no.json"),
    "an output that is not there": (
        ["explain", *model("Several"), "dog.png", "--output-name", "negatve"], "did you mean negative"
    ),
    "a page that is not there": (["maps", *MODEL, "dog.png", "--page", "7"], "page 7 does not exist"),
    "a shape that is none": (["layers", *MODEL[:3], "--input-shape", "big"], "'big' is no shape"),
    "a missing argument": (["maps", "tiny.safetensors"], "missing argument 'IMAGE...'"),
    "an unknown flag": (["maps", *MODEL, "dog.png", "--colums", "3"], "--columns"),
    "an unknown command": (["explian", *MODEL], "explian"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_2_and_one_sentence(run, case: str) -> None:
    args, pattern = BAD[case]
    Path("dir.png").mkdir()
    before = set(Path().rglob("*"))
    result = run(*args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("innersight: ")
    assert re.search(pattern, line), line
    assert set(Path().rglob("*")) - {Path("__pycache__")} == before  # nothing half-written stays behind


@pytest.mark.parametrize("case", ["an unknown layer", "an unknown suffix", "a missing argument"])
def test_errors_as_json_are_an_object_on_stdout(run, case: str) -> None:
    args, pattern = BAD[case]
    result = run(*args, "--json")
    assert result.exit_code == 2
    record = json.loads(result.stdout)
    assert re.search(pattern, record["error"])
    assert result.stderr == f"innersight: {record['error']}\n"
    if record["kind"] == "UnknownName":
        assert "conv2" in record["suggestions"]


def test_the_output_is_checked_before_the_model_is_opened(run) -> None:
    result = run("maps", "torchvision:resnet50", "dog.png", "--out", "m.gif")
    assert "unknown suffix" in result.stderr
    result = run("maps", "torchvision:resnet50", "dig.png")
    assert "no such file: dig.png" in result.stderr


def test_an_existing_file_survives_a_failure(run, monkeypatch: pytest.MonkeyPatch) -> None:
    from innersight.draw import plots

    ok(run("maps", *MODEL, "dog.png"))
    before = Path("maps.png").read_bytes()

    def fail(_figures, file, _suffix):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plots, "write", fail)
    result = run("maps", *MODEL, "dog.png")
    assert result.exit_code == 2
    assert "No space left on device" in result.stderr
    assert Path("maps.png").read_bytes() == before
    assert not [p for p in Path().iterdir() if p.name.startswith(".maps")]


def test_a_pickle_opens_when_it_is_trusted(run) -> None:
    result = ok(run("layers", "pickled.pth", "--input-shape", "3,16,16", "--trust"))
    assert "conv2" in result.stdout


def test_a_bug_shows_its_traceback(run, monkeypatch: pytest.MonkeyPatch) -> None:
    import innersight.network

    def bug(*_args, **_options):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(innersight.network, "open", bug)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        run("layers", *MODEL)


def test_a_seed_that_nothing_draws_from_is_said(run) -> None:
    result = ok(run("explain", *MODEL, "dog.png", "--seed", "1"))
    assert "--seed changes nothing" in result.stderr


def test_keywords_of_the_library_are_said_as_options() -> None:
    said = (
        'say what they are for with arch="a.b:c"; open it with input_shape=(C, H, W), labels= or trust=True '
        "(layer= changes it)"
    )
    assert _as_options(said) == (
        'say what they are for with --arch "a.b:c"; open it with --input-shape (C, H, W), --labels or --trust '
        "(--layer changes it)"
    )
    assert _as_options("it has no weights= of my-output= kind, output= has") == (
        "it has no --weights of my-output= kind, --output-name has"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The world outside


def test_an_interrupt_ends_with_130_and_a_short_line() -> None:
    program = """
        import sys, time, types
        def opening(*_args, **_options):
            print("here", flush=True)
            time.sleep(60)
        sys.modules["innersight.network"] = types.SimpleNamespace(open=opening)
        from innersight.cli import main
        main(["layers", "x"])
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert (out, err.strip()) == ("", "innersight: interrupted")


@pytest.mark.skipif(os.name == "nt", reason="pipes break otherwise there")
def test_a_reader_that_leaves_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "innersight", "--help"],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writer)
    assert done.stderr == ""


def on_terminal(program: str, columns: int) -> tuple[str, str]:
    """What a program prints on a terminal of so many columns, without its bold, and what on stderr."""
    pty = pytest.importorskip("pty")
    here, terminal = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm", "NO_COLOR": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment, stdin=subprocess.DEVNULL, stdout=terminal,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(terminal)
    said = b""
    try:
        while part := os.read(here, 65536):
            said += part
    except OSError:  # what Linux says at the end
        pass
    errors = process.communicate(timeout=20)[1]
    os.close(here)
    return re.sub(r"\x1b\[1?0?m", "", said.decode()), errors


TABLE = """
    from innersight.cli import _table
    rows = [("features.12.expand3x3_activation", "Conv2d", "256x13x13", "16", "440"), ("fc", "[bold]", "4", "", "")]
    _table(("layer", "kind", "output", "stride", "parameters"), rows, right=("parameters",), spare=("kind", "stride"))
"""


def test_a_table_fits_a_narrow_terminal_and_says_what_is_left_out() -> None:
    table, errors = on_terminal(TABLE, 50)
    assert max(map(len, table.splitlines())) <= 50
    assert "440" in table
    assert "\x1b" not in table  # bold was taken away, colors there are none
    assert "kind" not in table
    assert " ".join(errors.split()) == (
        "note: this terminal is too narrow for kind and stride; a wider one, a pipe and --json show more"
    )


def test_a_wide_terminal_gets_every_column_and_cells_as_they_are() -> None:
    table, errors = on_terminal(TABLE, 100)
    assert table.split()[:5] == ["layer", "kind", "output", "stride", "parameters"]
    assert "[bold]" in table
    assert errors == ""
