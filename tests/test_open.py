"""Every way to open a network: what it says of itself, what is refused, and that it computes what the original does."""

from __future__ import annotations

import io
import json
import pickle
import random
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from innersight.errors import InputError, UnknownName, Unsupported, UntrustedFile
from innersight.formats.opening import open_source
from innersight.formats.torch import guess_input_shape
from innersight.formats.torchscript import Scripted, interpret
from innersight.observe.observer import learn

torchvision = pytest.importorskip("torchvision")


class Small(nn.Module):
    """Functional calls, a pool used twice, batch norm, dropout, a circular convolution: 1x28x28 to 10."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular")
        self.bn = nn.BatchNorm2d(4)
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1)
        self.drop = nn.Dropout()
        self.fc = nn.Linear(6 * 49, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(F.relu(self.bn(self.conv1(x))))
        x = self.pool(F.relu(self.conv2(x) + 1))
        return self.fc(self.drop(x.flatten(1)))


class Branching(nn.Module):
    """What only a script keeps: a loop, a condition on the values, lists, tuples, an argument with a default."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)])

    def forward(self, x: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        for layer in self.layers:
            x = torch.relu(layer(x))
            if bool(x.mean() > 0.01):
                x = x * scale
            else:
                x = x - 1
            seen.append(x)
        seen = seen + [x]  # noqa: RUF005 - as a script says it
        for i in range(len(seen)):
            x = x + seen[i] / (i + 1)
        low, high = torch.aminmax(x.flatten(2), dim=2)
        return high - low


class Pair(nn.Module):
    def forward(self, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return image * mask


def small(seed: int = 0) -> Small:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Small()
        model.bn.running_mean.uniform_(-1, 1)
        return model.eval()


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def run(opened, batch: torch.Tensor) -> torch.Tensor:
    opened.module.eval()
    with torch.no_grad():
        return opened.call(opened.module, batch) if opened.call else opened.module(batch)


def state_of(model: nn.Module) -> list:
    tensors = [(k, v.clone(), v._version) for k, v in model.state_dict().items()]
    return [*((k, v.tolist(), n) for k, v, n in tensors), [(m, m.training) for m in model.modules()]]


def layer_names(module: nn.Module, batch: torch.Tensor) -> list[str]:
    return [node.name for node in learn(module.eval(), batch).layers]


@pytest.fixture
def jit():
    """torch.jit, whose functions warn that they are deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield torch.jit


# --- a module in memory ----------------------------------------------------------------------------------------------


def test_a_module_is_itself_and_left_as_found():
    model = small().train()
    before, generator = state_of(model), torch.get_rng_state()
    opened = open_source(model)
    assert opened.module is model
    assert opened.input_shape == (1, 28, 28)
    assert any("found by trying" in note and "input_shape=" in note for note in opened.notes)
    assert state_of(model) == before
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1)), (3, 224, 224)),
        (lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2 * 30 * 30, 5)), (3, 32, 32)),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 5)), (1, 28, 28)),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 5)), (3, 32, 32)),
        (lambda: nn.Sequential(nn.Linear(17, 5)), (17,)),
        (lambda: nn.Sequential(nn.Conv3d(3, 2, 3), nn.AdaptiveAvgPool3d(1)), (3, 16, 112, 112)),
    ],
)
def test_input_shape_is_the_first_likely_one_that_runs(model, shape):
    assert guess_input_shape(model())[0] == shape


def test_a_size_that_makes_several_rows_of_one_picture_is_not_taken():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3, padding=1)
            self.fc = nn.Linear(2 * 32 * 32, 5)

        def forward(self, x):
            return self.fc(self.conv(x).view(-1, 2 * 32 * 32))  # 224 would give 49 rows and no error

    assert guess_input_shape(Rows())[0] == (3, 32, 32)


def test_no_input_shape_is_a_sentence_that_names_the_way_out():
    with pytest.raises(
        InputError, match=r"no input size found that Sequential runs on .* give input_shape=\(C, H, W\)"
    ):
        open_source(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(7, 5)))
    shape = (3, 5, 9)
    assert open_source(nn.Sequential(nn.Conv2d(3, 2, 3)), input_shape=shape).input_shape == shape
    with pytest.raises(InputError, match="positive whole numbers"):
        open_source(small(), input_shape=(1, 0, 28))


def test_wrappers_come_off_and_it_is_said():
    model = small()
    opened = open_source(nn.DataParallel(torch.compile(model, backend="eager")))
    assert opened.module is model
    assert any("DataParallel" in note for note in opened.notes)
    assert any("torch.compile" in note for note in opened.notes)


def test_a_model_of_two_inputs_is_refused_by_name():
    with pytest.raises(Unsupported, match=r"Pair.forward needs 2 inputs \(image, mask\)"):
        open_source(Pair())
    with pytest.raises(Unsupported, match="has no forward"):
        open_source(nn.ModuleList([nn.Conv2d(3, 3, 3)]))


def test_half_precision_models_take_float_pictures():
    opened = open_source(small().to(torch.bfloat16))
    assert run(opened, noise(2, 1, 28, 28)).shape == (2, 10)
    assert any("bfloat16" in note for note in opened.notes)


def test_another_device_gets_a_copy():
    model = small()
    assert open_source(model, device="cpu").module is model
    with pytest.raises(InputError, match="no device 'gpu'"):
        open_source(model, device="gpu")


def test_labels_come_from_lists_mappings_and_files(tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\n", encoding="utf-8")
    (tmp_path / "names.json").write_text('{"1": "dog", "0": "cat"}', encoding="utf-8")
    for labels in (["cat", "dog"], {1: "dog", 0: "cat"}, tmp_path / "names.txt", str(tmp_path / "names.json")):
        assert open_source(small(), labels=labels).labels == ["cat", "dog"]
    with pytest.raises(InputError, match="there is no file"):
        open_source(small(), labels="nothing.txt")


def test_preprocess_and_input_shape_are_the_users_word():
    opened = open_source("torchvision:resnet18", weights="none", input_shape=(3, 64, 64))
    assert opened.input_shape == (3, 64, 64)
    assert opened.preprocess.size == (64, 64)
    assert opened.preprocess.resize_to == round(256 * 64 / 224)
    opened = open_source(small(), preprocess={"size": [28, 28], "channels": "L", "invert": True})
    assert opened.preprocess.invert
    assert opened.input_shape == (1, 28, 28)


@pytest.mark.parametrize("source", [3, None, nn.Conv2d])
def test_what_is_no_network_is_said(source):
    with pytest.raises(InputError, match="expected a"):
        open_source(source)


# --- functions -------------------------------------------------------------------------------------------------------


def test_a_function_is_one_operation_without_gradient():
    model = small()

    def predict(images: np.ndarray) -> np.ndarray:
        assert images.dtype == np.float32
        with torch.no_grad():
            scores = model(torch.from_numpy(images)).numpy()
        images[:] = 0  # its own copy
        return scores

    opened = open_source(predict, input_shape=(1, 28, 28))
    batch = noise(3, 1, 28, 28).requires_grad_()
    scores = opened.module(batch)
    assert torch.equal(scores, model(batch))
    assert not scores.requires_grad
    assert batch.detach().sum() > 0
    assert any("no layers inside it and no gradient" in note for note in opened.notes)
    assert any("input_shape=" in note for note in open_source(predict).notes)


@pytest.mark.parametrize("answer", [lambda _: "cat", lambda _: np.zeros(7), lambda _: np.zeros((5, 2))])
def test_a_function_that_answers_something_else_is_told(answer):
    with pytest.raises(Unsupported, match=r"\(N, K\)"):
        open_source(answer, input_shape=(1, 4, 4)).module(noise(2, 1, 4, 4))


def test_a_function_of_two_arguments_is_refused():
    with pytest.raises(InputError, match="must take one argument"):
        open_source(lambda x, y: x + y)


# --- zoos ------------------------------------------------------------------------------------------------------------


def test_torchvision_untrained_is_the_same_every_time_and_says_so():
    generator = torch.get_rng_state(), random.getstate()
    first, second = (open_source("torchvision:squeezenet1_1", weights="none") for _ in range(2))
    assert (torch.get_rng_state() == generator[0]).all()
    assert random.getstate() == generator[1]
    for a, b in zip(first.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(a, b)
    assert "untrained" in first.notes[0]
    assert first.input_shape == (3, 224, 224)
    assert first.labels[0] == "tench"
    assert first.preprocess.mean == (0.485, 0.456, 0.406)
    assert any("preprocess=" in note for note in first.notes)


def test_without_cache_and_network_one_sentence_names_both_ways_out(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("innersight.formats.zoos.reachable", lambda *_: False)
    for source in ("torchvision:resnet18", "timm:resnet18", "hf:somebody/something"):
        with pytest.raises(InputError, match=r'weights="FILE".*weights="none"') as error:
            open_source(source)
        assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_default_weights_come_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("innersight.formats.zoos.reachable", lambda *_: pytest.fail("asked the network"))
    weights = torchvision.models.get_model_weights("squeezenet1_1").DEFAULT
    model = torchvision.models.squeezenet1_1()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(model.state_dict(), tmp_path / "hub" / "checkpoints" / weights.url.rpartition("/")[2])
    opened = open_source("torchvision:squeezenet1_1")
    batch = noise(1, 3, 64, 64)
    assert torch.equal(run(opened, batch), run(open_source(model, input_shape=(3, 64, 64)), batch))
    assert opened.labels[0] == "tench"


def test_a_file_for_other_classes_changes_the_head(tmp_path):
    torch.save(torchvision.models.resnet18(num_classes=7).state_dict(), tmp_path / "w.pth")
    opened = open_source("torchvision:resnet18", weights=tmp_path / "w.pth")
    assert opened.module.fc.out_features == 7
    assert opened.labels is None
    assert any("7 classes" in note for note in opened.notes)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("r3d_18", (3, 16, 112, 112)),
        ("lraspp_mobilenet_v3_large", (3, 520, 520)),
        ("fasterrcnn_mobilenet_v3_large_320_fpn", (3, 480, 640)),
        ("quantized_mobilenet_v2", (3, 224, 224)),
    ],
)
def test_torchvision_of_other_kinds(name, shape):
    assert open_source(f"torchvision:{name}", weights="none").input_shape == shape


def test_detectors_are_called_with_a_list():
    opened = open_source("torchvision:ssdlite320_mobilenet_v3_large", weights="none")
    answers = run(opened, noise(2, 3, 64, 64))
    assert [sorted(a) for a in answers] == [["boxes", "labels", "scores"]] * 2


def test_optical_flow_takes_two_pictures():
    with pytest.raises(Unsupported, match="takes two pictures"):
        open_source("torchvision:raft_small")


@pytest.mark.parametrize(
    ("source", "near"), [("torchvision:resnet81", "resnet18"), ("timm:resnet1818", "resnet18"), ("timm:vit_tny", "vit")]
)
def test_unknown_names_bring_the_nearest(source, near):
    with pytest.raises(UnknownName, match=f"no {source.partition(':')[0]} model .*{near}"):
        open_source(source, weights="none")


def test_timm_says_what_its_config_says():
    opened = open_source("timm:vit_tiny_patch16_224", weights="none")
    assert opened.input_shape == (3, 224, 224)
    assert opened.preprocess.mean == (0.5, 0.5, 0.5)
    assert opened.labels[0].startswith("tench")
    assert "untrained" in opened.notes[0]
    again = open_source(opened.module)  # a live one says the same
    assert (again.input_shape, again.preprocess, again.labels) == (opened.input_shape, opened.preprocess, opened.labels)


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory) -> Path:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("vit")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        id2label={0: "cat", 1: "dog", 2: "bird"}, label2id={"cat": 0, "dog": 1, "bird": 2},
    )  # fmt: skip
    transformers.utils.logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.ViTForImageClassification(config).save_pretrained(folder)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "resample": 3,
                 "do_normalize": True, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5],
                 "do_rescale": True, "rescale_factor": 1 / 255, "do_resize": True}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    return folder


def test_a_folder_of_transformers(hf_folder):
    import transformers

    generator = torch.get_rng_state()
    opened = open_source(f"hf:{hf_folder}")
    assert torch.equal(torch.get_rng_state(), generator)
    assert opened.labels == ["cat", "dog", "bird"]
    assert opened.input_shape == (3, 32, 32)
    assert opened.preprocess.mean == (0.1, 0.2, 0.3)
    assert opened.preprocess.interpolation == "bicubic"
    batch = noise(2, 3, 32, 32)
    direct = transformers.ViTForImageClassification.from_pretrained(hf_folder).eval()
    with torch.no_grad():
        assert torch.equal(run(opened, batch).logits, direct(pixel_values=batch).logits)
    from_file = open_source(f"hf:{hf_folder}", weights=hf_folder / "model.safetensors")
    assert torch.equal(run(from_file, batch).logits, run(opened, batch).logits)
    assert "untrained" in open_source(f"hf:{hf_folder}", weights="none").notes[0]


def test_weights_that_transformers_would_make_up_are_named(hf_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((hf_folder / name).read_bytes())
    state = load_file(hf_folder / "model.safetensors")
    save_file({k: v for k, v in state.items() if not k.startswith("classifier")}, tmp_path / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    opened = open_source(f"hf:{tmp_path}")
    assert any("lack classifier.bias, classifier.weight, which are random" in note for note in opened.notes)
    with pytest.raises(InputError, match=r"it lacks classifier.bias, classifier.weight"):
        open_source(f"hf:{hf_folder}", weights=tmp_path / "model.safetensors")


def test_a_folder_without_config(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match=r"no config.json"):
        open_source(f"hf:{tmp_path}")


# --- files of weights ------------------------------------------------------------------------------------------------


def test_wrappers_and_prefixes_of_checkpoints_come_off(tmp_path):
    from safetensors.torch import save_file

    model, batch = small(), noise(2, 1, 28, 28)
    state = model.state_dict()
    files = {
        "plain.pth": state,
        "wrapped.ckpt": {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}},
        "compiled.pt": {"model": {f"_orig_mod.{k}": v for k, v in state.items()}},
        "lightning.ckpt": {"state_dict": {f"model._orig_mod.{k}": v for k, v in state.items()}},
        "old.th": {k: v for k, v in state.items() if "num_batches_tracked" not in k},
    }
    for name, held in files.items():
        torch.save(held, tmp_path / name)
    torch.save(state, tmp_path / "legacy.bin", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "plain.safetensors")
    for name in (*files, "legacy.bin", "plain.safetensors"):
        opened = open_source(tmp_path / name, arch=Small)
        assert torch.equal(run(opened, batch), run(open_source(model), batch)), name
        assert opened.name == "Small"
    assert any("'module.'" in note for note in open_source(tmp_path / "wrapped.ckpt", arch=Small).notes)


def test_arch_is_found_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "mynets_for_test.py").write_text(
        "from torch import nn\ndef tiny():\n    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1))\n"
        "def broken(width): pass\nnumber = 3\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1))
    torch.save(model.state_dict(), "w.pth")
    opened = open_source("w.pth", arch="mynets_for_test:tiny")
    assert torch.equal(opened.module[0].weight, model[0].weight)
    assert sys.path == path
    for arch, words in {
        "mynets_for_test:tin": "did you mean tiny",
        "mynets_for_test:number": "is a int",
        "mynets_for_test:broken": "could not be called without arguments",
        "no_such_package:tiny": "cannot import no_such_package",
        "mynets_for_test": "must read package.module:factory",
    }.items():
        with pytest.raises((InputError, UnknownName), match=words):
            open_source("w.pth", arch=arch)


def test_what_does_not_fit_is_named_key_by_key(tmp_path):
    state = small().state_dict()
    state["fc.weight"] = torch.zeros(3, 294)
    state["extra"] = state.pop("conv1.bias")
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(InputError) as error:
        open_source(tmp_path / "w.pth", arch=Small)
    text = str(error.value)
    assert "it lacks conv1.bias" in text
    assert "the network has no extra" in text
    assert "fc.weight (3x294 in the file, 10x294 in the network)" in text


def test_weights_without_an_architecture(tmp_path):
    torch.save(small().state_dict(), tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"holds weights alone.*arch="):
        open_source(tmp_path / "w.pth")


class Bomb:
    fired = False

    def __reduce__(self):
        return (Bomb.fire, ())

    @staticmethod
    def fire():
        Bomb.fired = True
        return {}


def test_a_pickled_model_needs_trust(tmp_path):
    model = small()
    torch.save(model, tmp_path / "whole.pth")
    with pytest.raises(UntrustedFile, match=r"holds a .*Small, .*trust=True, which runs code from the file"):
        open_source(tmp_path / "whole.pth")
    opened = open_source(tmp_path / "whole.pth", trust=True)
    batch = noise(2, 1, 28, 28)
    assert torch.equal(run(opened, batch), model(batch))
    torch.save({"state_dict": small().state_dict(), "more": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(UntrustedFile):
        open_source(tmp_path / "bomb.pth", arch=Small)
    assert not Bomb.fired


def test_files_that_are_not_what_their_suffix_claims(tmp_path):
    whole = tmp_path / "whole.pth"
    torch.save(small().state_dict(), whole)
    contents = {
        "text.pth": b"hello",
        "empty.pt": b"",
        "text.safetensors": b"hello world",
        "page.pth": b"<!DOCTYPE html><html>",
        "pointer.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "cut.pth": whole.read_bytes()[:2000],
        "renamed.safetensors": whole.read_bytes(),
        "garbage.pth": b"\x80\x02garbage",
        "list.pth": pickle.dumps([1, 2]),
    }
    words = {"empty.pt": "empty", "page.pth": "web page", "pointer.safetensors": "LFS", "cut.pth": "cut short",
             "renamed.safetensors": "rename it to .pth"}  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=words.get(name, name)) as error:
            open_source(tmp_path / name, arch=Small)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="there is no file"):
        open_source(tmp_path / "nothing.pth")
    with pytest.raises(InputError, match="a model by name reads"):
        open_source("resnet18")


@pytest.mark.parametrize("suffix", [".onnx", ".keras", ".h5", ".tflite"])
def test_files_that_are_not_what_they_are_called_get_one_sentence(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"x")
    with pytest.raises(InputError, match=f"model{suffix}") as error:
        open_source(path)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="without arch="):
        open_source(path, arch=Small)
    with pytest.raises(InputError, match="has no use for it"):
        open_source(path, **({"custom": {}} if suffix in (".onnx", ".tflite") else {"arithmetic": "float"}))


def test_real_checkpoints(shared_data: Callable[..., Path]):
    path = shared_data("torch", "squeezenet1_1_imagenet.pth")
    zoo = open_source("torchvision:squeezenet1_1", weights=path)
    file = open_source(path, arch="torchvision:squeezenet1_1")
    bare = open_source(str(path), arch="torchvision.models:squeezenet1_1")
    assert zoo.labels == file.labels
    batch = noise(1, 3, 224, 224)
    assert torch.equal(run(zoo, batch), run(file, batch))
    assert torch.equal(run(zoo, batch), run(bare, batch))
    with pytest.raises(InputError, match=r"does not fit torchvision:resnet18: it lacks conv1.weight"):
        open_source(path, arch="torchvision:resnet18")
    with pytest.raises(InputError, match=r"the network has no layer1.2.conv1.weight"):
        open_source(shared_data("torch", "cifar10_resnet20-12fca82f.th"), arch="torchvision:resnet18")


# --- TorchScript -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "way"),
    [("Small", "trace"), ("Small", "script"), ("vit", "trace"), ("vit", "script"), ("resnet18", "trace"),
     ("resnet18", "script"), ("mobilenet_v3_small", "script")],
)  # fmt: skip
def test_torchscript_is_the_same_network_with_the_same_names(model, way, jit, tmp_path):
    if model == "Small":
        eager, batch = small(), noise(2, 1, 28, 28)
    elif model == "vit":
        eager = torchvision.models.VisionTransformer(
            image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5
        )
        nn.init.normal_(eager.heads.head.weight)  # zero at first
        batch = noise(2, 3, 32, 32)
    else:
        eager, batch = torchvision.models.get_model(model), noise(2, 3, 64, 64)
    eager.eval()
    program = jit.script(eager) if way == "script" else jit.trace(eager, batch[:1], check_trace=False)
    jit.save(program, tmp_path / "model.pt")
    for source in (program, tmp_path / "model.pt"):
        shape = tuple(batch.shape[1:])
        opened = open_source(source, input_shape=None if way == "trace" else shape)
        assert opened.input_shape == shape  # a trace remembers its example
        batches = batch[: opened.fixed_batch]
        with torch.no_grad():
            expected = eager(batches)
        if model == "vit":  # whose fused attention rounds differently
            torch.testing.assert_close(run(opened, batches), expected, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(run(opened, batches), expected)
            assert any("TorchScript's own run differs by 0 " in note for note in opened.notes)
        assert not [m for m in opened.module.modules() if getattr(m, "opaque", "")]
        assert layer_names(opened.module, batches) == layer_names(eager, batches)


def test_scripted_control_flow_is_walked(jit):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        eager = Branching().eval()
    opened = open_source(jit.script(eager), input_shape=(3, 8, 8))
    for scale in (0.0, 1.0, 30.0):  # both branches
        batch = noise(1, 3, 8, 8) * scale
        assert torch.equal(run(opened, batch), run(open_source(eager, input_shape=(3, 8, 8)), batch))


def test_gradients_of_a_program_are_those_of_the_model(jit):
    eager = torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8, num_classes=3
    ).eval()
    nn.init.normal_(eager.heads.head.weight)
    batch = noise(1, 3, 16, 16).requires_grad_()
    module = interpret(jit.script(eager)).eval()
    (ours,) = torch.autograd.grad(module(batch)[0, 1], batch)
    (theirs,) = torch.autograd.grad(eager(batch)[0, 1], batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_trace_in_training_mode_is_explained_in_evaluation_mode(jit):
    eager, batch = small(), noise(2, 1, 28, 28)
    program = jit.trace(eager.train(), batch[:1], check_trace=False)
    before = {k: v.clone() for k, v in eager.state_dict().items()}
    opened = open_source(program)
    assert any("traced in training mode" in note for note in opened.notes)
    assert all(torch.equal(v, before[k]) for k, v in eager.state_dict().items())
    assert opened.fixed_batch is None
    eager.eval()
    with torch.no_grad():
        assert torch.equal(run(opened, batch), eager(batch))


def test_a_batch_written_into_a_trace_is_found(jit):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)

        def forward(self, x):
            return self.conv(x).view(int(x.shape[0]), 2 * 36)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = jit.trace(Fixed(), noise(1, 1, 8, 8))
    opened = open_source(program)
    assert opened.fixed_batch == 1
    assert any("one at a time" in note for note in opened.notes)


def test_what_cannot_be_interpreted_stays_one_operation(jit, monkeypatch):
    from innersight.formats import torchscript

    monkeypatch.delitem(torchscript._PLAIN, "aten::append")
    monkeypatch.delattr(torch.ops.aten, "append", raising=False)
    eager = nn.Sequential(nn.Conv2d(3, 3, 1), Branching()).eval()
    monkeypatch.setitem(torchscript._BUILDERS, "aten::append", _unknown)
    opened = open_source(jit.script(eager), input_shape=(3, 8, 8))
    assert any("1 runs as one operation: aten::append" in note for note in opened.notes)
    batch = noise(1, 3, 8, 8)
    assert torch.equal(run(opened, batch), run(open_source(eager, input_shape=(3, 8, 8)), batch))
    assert isinstance(opened.module, Scripted)


def _unknown(node, _module):
    from innersight.formats.torchscript import _Unsupported

    raise _Unsupported(node.kind())


def test_a_program_of_two_inputs_is_refused(jit):
    with pytest.raises(Unsupported, match=r"Pair.forward needs 2 inputs \(image, mask\)"):
        open_source(jit.script(Pair()))


def test_a_program_takes_no_architecture(jit, tmp_path):
    jit.save(jit.script(small()), tmp_path / "model.pt")
    with pytest.raises(InputError, match="brings its network and weights along"):
        open_source(tmp_path / "model.pt", arch=Small)


# --- torch.export ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "small.pt2"
    sizes = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    torch.export.save(torch.export.export(small(), (noise(2, 1, 28, 28),), dynamic_shapes=sizes), path)
    return path


def test_an_exported_program_is_the_same_network_with_the_same_names(exported):
    opened, eager, batch = open_source(exported), small(), noise(3, 1, 28, 28)
    assert opened.input_shape == (1, 28, 28)
    assert opened.fixed_batch is None
    assert torch.equal(run(opened, batch), run(open_source(eager), batch))
    assert layer_names(opened.module, batch) == layer_names(eager, batch)
    assert dict(opened.module.named_parameters()).keys() == dict(eager.named_parameters()).keys()


def test_resnet18_exported_keeps_its_names_and_its_batch():
    eager, batch = torchvision.models.resnet18().eval(), noise(1, 3, 32, 32)
    opened = open_source(torch.export.export(eager, (batch,)))
    assert opened.fixed_batch == 1
    assert opened.input_shape == (3, 32, 32)
    with torch.no_grad():
        assert torch.equal(run(opened, batch), eager(batch))
    assert layer_names(opened.module, batch) == layer_names(eager, batch)


def test_a_program_exported_in_training_mode_is_explained_in_evaluation_mode():
    eager, batch = small(), noise(2, 1, 28, 28)
    opened = open_source(torch.export.export(eager.train(), (batch,)))
    before = {k: v.clone() for k, v in eager.state_dict().items()}
    answer = run(opened, batch)
    assert all(torch.equal(v, before[k]) for k, v in eager.state_dict().items())
    with torch.no_grad():
        assert torch.equal(answer, eager.eval()(batch))
    assert any("exported in training mode" in note for note in opened.notes)


def test_an_exported_program_of_two_inputs_is_refused():
    with pytest.raises(Unsupported, match=r"takes 2 tensors \(image, mask\)"):
        open_source(torch.export.export(Pair(), (noise(2, 2), noise(2, 2))))


def altered(source: Path, target: Path, change: Callable[[dict], None] | None = None, **records: bytes) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        for name in old.namelist():
            content = old.read(name)
            if change and name.endswith("models/model.json"):
                program = json.loads(content)
                change(program)
                content = json.dumps(program).encode()
            if name not in records:
                new.writestr(name, records.pop(name.rpartition("/")[2].replace(".", "_"), content))
        for name, content in records.items():
            new.writestr(f"{root}/{name}", content)
    return target


def test_exported_files_that_would_run_code_need_trust(exported, tmp_path):
    def graph(program: dict) -> dict:
        return program["graph_module"]["graph"]

    def call(target: str) -> Callable[[dict], None]:
        return lambda program: graph(program)["nodes"][0].update(target=target)

    def size(program: dict) -> None:
        graph(program)["tensor_values"]["x"]["sizes"][0]["as_expr"]["expr_str"] = "__import__('os').getcwd()"

    def name(program: dict) -> None:
        program["graph_module"]["signature"]["input_specs"][0]["parameter"]["parameter_name"] = 'a"); import os #'

    assert open_source(altered(exported, tmp_path / "same.pt2")).input_shape == (1, 28, 28)
    changes = [call("torch.os.system"), call("torch.ops.load_library.__call__"), call("#extension"), size, name]
    for i, change in enumerate(changes):
        with pytest.raises(UntrustedFile, match="trust=True"):
            open_source(altered(exported, tmp_path / f"{i}.pt2", change))
    buffer = io.BytesIO()
    torch.save(Bomb(), buffer)
    with pytest.raises(UntrustedFile, match="pickle"):  # torch.export.load itself would unpickle it
        open_source(altered(exported, tmp_path / "inputs.pt2", model_pt=buffer.getvalue()))
    with pytest.raises(UntrustedFile, match="aotinductor"):
        open_source(altered(exported, tmp_path / "so.pt2", **{"data/aotinductor/model/code.so": b""}))
    assert not Bomb.fired


def test_a_zip_that_is_no_model(tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.pt2", "w") as file:
        file.writestr("a.txt", "x")
    with pytest.raises(InputError, match="without a model in it"):
        open_source(tmp_path / "photos.pt2")
