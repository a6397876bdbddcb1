"""A network, asked: maps, predictions, sensitivity; what it states, and what it refuses in one sentence."""

import dataclasses
import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import innersight
from innersight import errors, targets
from innersight.data.small_cnn import SimpleCNN
from innersight.formats import Opened
from innersight.network import Network
from innersight.observe.passes import Request
from innersight.testing import NETWORKS, check_network, close, left_as_found, small_network


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def simple_cnn():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SimpleCNN().eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_every_small_network_keeps_what_a_network_promises(name):
    done = check_network(small_network(name))
    assert "captured equals direct" in done
    assert "the gradient equals finite differences" in done


def test_the_tutorial_network_keeps_what_a_network_promises():
    assert check_network(innersight.open(simple_cnn()))


def test_a_check_fails_where_a_property_does_not_hold():
    class Counts(nn.Module):
        """Depends on the other images of its batch."""

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3)

        def forward(self, x):
            x = self.conv(x)
            return (x - x.mean(0, keepdim=True) + x.mean()).mean((2, 3))

    with pytest.raises(AssertionError, match="a batch equals one by one"):
        check_network(innersight.open(Counts(), input_shape=(3, 8, 8)))


# -- Layers


def test_layers_of_the_tutorial_network():
    net = innersight.open(simple_cnn())
    assert list(net.layers) == [
        "conv1",
        "relu",
        "pool",
        "conv2",
        "relu_1",
        "pool_1",
        "fc1",
        "relu_2",
        "fc2",
        "relu_3",
        "fc3",
    ]
    conv1 = net.layers["conv1"]
    assert conv1.shape == (16, 24, 24)
    assert conv1.parameters == 16 * 25 + 16
    assert sum(layer.parameters for layer in net.layers.values()) == sum(p.numel() for p in net.module.parameters())
    # worked by hand: 5x5; pool 2x2 -> 6x6 stride 2; conv 5x5 at stride 2 -> 14x14; pool -> 16x16 stride 4
    sizes = [tuple(map(int, net.layers[n].receptive_field.size)) for n in ("conv1", "pool", "conv2", "pool_1")]
    assert sizes == [(5, 5), (6, 6), (14, 14), (16, 16)]
    assert tuple(map(int, net.layers["pool_1"].receptive_field.stride)) == (4, 4)
    assert net.layers["conv2"].receptive_field.box(0, 0) == (0, 0, 14, 14)
    assert net.layers["fc1"].grid is None
    table = str(net.layers)
    assert "conv1" in table
    assert "16x24x24" in table
    assert "416" in table


def test_the_effective_field_lies_inside_the_exact_one():
    net = innersight.open(simple_cnn())
    layer = net.layers["conv2"]
    top, left, bottom, right = layer.effective_receptive_field()
    exact = layer.receptive_field.box(layer.grid[1] // 2, layer.grid[2] // 2)
    assert exact[0] <= top < bottom <= exact[2]
    assert exact[1] <= left < right <= exact[3]
    with pytest.raises(errors.Unsupported, match="fc1"):
        net.layers["fc1"].effective_receptive_field()


def test_a_module_is_found_by_its_own_name_and_near_misses_are_suggested():
    net = small_network("tokens")
    assert net.layers["blocks.1"].grid == (16, 4, 4)
    assert "class token" in net.layers["blocks.1"].grid_note
    with pytest.raises(errors.UnknownName, match="no layer 'block.1' in this network; did you mean blocks.1"):
        net.layers["block.1"]


# -- Maps


def test_maps_are_what_the_layers_put_out():
    module = simple_cnn()
    net = innersight.open(module)
    x = noise(3, 1, 28, 28)
    maps = net.maps(x, layers=["conv1", "relu", "pool_1", "fc3"])
    with torch.no_grad():
        conv1 = module.conv1(x)
        np.testing.assert_array_equal(maps["conv1"], conv1)
        np.testing.assert_array_equal(maps["relu"], conv1.relu())
        assert close(maps["fc3"], module(x))
    assert maps["pool_1"].shape == (3, 32, 4, 4)
    assert set(net.maps(x)) == {"conv1", "relu", "pool", "conv2", "relu_1", "pool_1"}


def test_tokens_and_channels_last_layers_come_as_maps():
    x = noise(2, 3, 16, 16)
    net = small_network("tokens")
    tokens = net.maps(x, layers="blocks.0")["blocks.0"]
    assert tokens.shape == (2, 16, 4, 4)
    with net.engine.session(), torch.no_grad():
        m = net.module
        direct = torch.cat([m.cls.expand(2, -1, -1), m.embed(x).flatten(2).transpose(1, 2)], 1) + m.pos
        direct = m.blocks[0](direct)[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    assert close(tokens, direct)
    net = small_network("channels_last")
    maps = net.maps(x, layers=["stem", "norm", "add"])
    assert maps["norm"].shape == (2, 8, 8, 8)
    with torch.no_grad():
        assert close(maps["norm"], net.module.norm(net.module.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def test_chunks_of_one_image_give_the_same_as_one_batch():
    net = small_network("residual")
    x = noise(5, 3, 16, 16)
    whole = net.explain(x, method=["gradient", "gradcam"])
    maps = net.maps(x, layers="conv2")["conv2"]
    net.engine.budget = 1
    assert close(net.maps(x, layers="conv2")["conv2"], maps)
    for name, saliency in net.explain(x, method=["gradient", "gradcam"]).items():
        assert close(saliency.values, whole[name].values)
        assert saliency.targets == whole[name].targets


def test_what_was_read_serves_several_networks_unchanged():
    net = small_network("residual")
    inputs = net.read(noise(1, 3, 16, 16))
    before = inputs.tensor
    net._with_module(small_network("residual").module.double()).predict(inputs)
    assert inputs.tensor is before
    assert before.dtype == torch.float32


def test_an_error_between_two_passes_leaves_the_model_as_it_was(monkeypatch):
    net = small_network("residual")
    net.module.train()
    net.engine.budget = 1  # one image a pass
    monkeypatch.setattr("innersight.inquiry._Answering", lambda *_: 1 / 0)
    with left_as_found(net.module):
        with pytest.raises(ZeroDivisionError) as held:  # the error, and with it every frame
            net.explain(noise(3, 3, 16, 16))
        assert net.module.training
        assert held.value is not None


def test_maps_that_nobody_holds_are_freed_at_once():
    """A run that stops early leaves by an exception, whose frames must not keep what was read until a collection."""
    net = innersight.open(simple_cnn())
    net.layers["relu"]
    gc.collect()
    gc.disable()
    try:
        with net.engine.session():
            passed = net.engine.run(noise(1, 1, 28, 28), Request(read=["relu"], output=False))
        kept = weakref.ref(passed.values["relu"])
        del passed
        assert kept() is None
    finally:
        gc.enable()


def test_maps_that_do_not_fit_into_memory_are_refused_before_the_run(monkeypatch):
    net = small_network("residual")
    monkeypatch.setattr("innersight.network.free_memory", lambda _device: 1000)
    with pytest.raises(errors.InputError, match="only 0.0 GiB are free: ask for fewer layers"):
        net.maps(noise(2, 3, 16, 16))


# -- Predictions


def test_predictions_are_the_softmax_of_the_output():
    net = innersight.open(simple_cnn(), labels=list("abcdefghij"))
    x = noise(2, 1, 28, 28)
    p = net.predict(x)
    with torch.no_grad():
        expected = net.module(x).softmax(1).numpy()
    assert close(p.probabilities, expected)
    assert p.top(1)[0][0] == ("abcdefghij"[expected[0].argmax()], pytest.approx(expected[0].max()))


def test_a_network_that_ends_in_softmax_answers_with_probabilities():
    net = innersight.open(nn.Sequential(simple_cnn(), nn.Softmax(1)), input_shape=(1, 28, 28))
    p = net.predict(noise(2, 1, 28, 28))
    assert p.kind == "probabilities"
    assert close(p.probabilities, p.logits)


def test_of_several_outputs_the_choice_is_stated_and_can_be_changed():
    net = small_network("several_outputs")
    x = noise(1, 3, 16, 16)
    assert net.predict(x).logits.shape == (1, 4)
    assert any("'logits' is taken as its answer (output= changes it)" in n for n in net.notes)

    @dataclasses.dataclass
    class Answer:
        scores: torch.Tensor
        logits: torch.Tensor

    class Two(nn.Module):
        def forward(self, x):
            x = x.mean((2, 3))
            return Answer(x * 2, x)

    assert close(innersight.open(Two(), input_shape=(3, 4, 4)).predict(x).logits, x.mean((2, 3)))
    assert close(innersight.open(Two(), input_shape=(3, 4, 4), output="scores").predict(x).logits, 2 * x.mean((2, 3)))


def test_a_network_of_one_batch_size_answers_for_the_images_that_were_given():
    module = small_network("residual").module
    net = Network(Opened(module, "two at a time", (3, 16, 16), fixed_batch=2))
    x = noise(3, 3, 16, 16)
    free = small_network("residual")
    assert close(net.predict(x).logits, free.predict(x).logits)
    assert close(net.maps(x, "conv2")["conv2"], free.maps(x, "conv2")["conv2"])
    many, expected = (n.explain(x, ["gradient", "gradcam"], target=[0, 1, None]) for n in (net, free))
    for name, saliency in many.items():
        assert close(saliency.values, expected[name].values)
        assert saliency.targets == expected[name].targets
    assert close(net.sensitivity(x, "conv1").values, free.sensitivity(x, "conv1").values)


class Detector(nn.Module):
    """Finds two objects of class 1 and one of class 2; their scores are means over parts of the picture."""

    def forward(self, x):
        def found(image):
            scores = torch.stack([image[0].mean(), image[1, :4].mean(), image[2].mean()]).sigmoid()
            boxes = torch.tensor([[0.0, 0, 8, 8], [0, 0, 8, 4], [4, 4, 8, 8]])
            return {"boxes": boxes, "labels": torch.tensor([1, 1, 2]), "scores": scores}

        return [found(image) for image in x]


def test_a_detector_answers_with_the_best_object_of_each_class():
    net = innersight.open(Detector(), input_shape=(3, 8, 8), labels=["nothing", "dog", "cat"])
    x = noise(2, 3, 8, 8)
    found = Detector()(x)
    p = net.predict(x)
    assert p.kind == "probabilities"
    for row, d in zip(p.logits, found, strict=True):
        np.testing.assert_allclose(row, [0, d["scores"][:2].max(), d["scores"][2]])
    s = net.explain(x, target="cat", channels=True)
    cat = torch.stack([d["scores"][2] for d in found])
    np.testing.assert_allclose(s.values[:, 2], (cat * (1 - cat) / 64)[:, None, None].expand(2, 8, 8), rtol=1e-5)
    assert not s.values[:, :2].any()
    at = net.explain(x, target=targets.box((0, 0, 8, 4)), channels=True)
    assert at.values[:, 1, :4].all()
    assert not at.values[:, [0, 2]].any()
    with pytest.raises(errors.InputError, match="overlaps the box"):
        net.explain(x, target=targets.box((20, 20, 30, 30)))


# -- Sensitivity


@pytest.mark.parametrize("layer", ["conv1", "relu", "pool", "conv2", "fc1"])
def test_sensitivity_is_the_score_without_the_channel_minus_the_score_with_it(layer):
    module = simple_cnn()
    net = innersight.open(module)
    x = noise(2, 1, 28, 28)
    s = net.sensitivity(x, layer, target=3)
    with torch.no_grad():
        base = module(x)[:, 3]
        assert close(s.scores, base)
        for channel in (0, 2, s.values.shape[1] - 1):
            values = dict.fromkeys([layer], channel)

            def remove(value, channel=channel):
                value = value.clone()
                value[:, channel] = 0
                return value

            with net.engine.session():
                without = net.engine.run(x, Request(change=dict.fromkeys(values, remove))).output[:, 3]
            np.testing.assert_allclose(s.values[:, channel], without - base, atol=2e-6)


def test_sensitivity_of_a_linear_head_is_worked_by_hand():
    """Over average pooling and a linear head, a channel's removal costs exactly its weight times its mean."""
    net = small_network("gated")
    x = noise(2, 3, 16, 16)
    values = net.maps(x, layers="mul")["mul"].mean((2, 3))
    weight = net.module.head.weight.detach().numpy()
    s = net.sensitivity(x, "mul", target=1)
    np.testing.assert_allclose(s.values, -values * weight[1], atol=1e-6)


def test_sensitivity_of_tokens_removes_channels_not_tokens():
    net = small_network("tokens")
    s = net.sensitivity(noise(2, 3, 16, 16), "blocks.0")
    assert s.values.shape == (2, 16)
    assert np.abs(s.values).max() > 0


def test_sensitivity_keeps_to_the_class_that_was_predicted():
    net = innersight.open(simple_cnn())
    x = noise(2, 1, 28, 28)
    predicted = net.predict(x).classes
    by_name = net.sensitivity(x, "conv1", target=[int(c) for c in predicted])
    np.testing.assert_array_equal(net.sensitivity(x, "conv1").values, by_name.values)


# -- What is refused


def test_nan_names_the_first_layer_that_made_one():
    module = simple_cnn()
    with torch.no_grad():
        module.conv2.weight[0, 0, 0, 0] = float("nan")
    net = innersight.open(module)
    for ask in (net.predict, net.explain, lambda x: net.sensitivity(x, "conv1"), lambda x: net.maps(x, "pool_1")):
        with pytest.raises(errors.InputError, match="NaN .*the first layer to produce one is 'conv2'"):
            ask(noise(1, 1, 28, 28))


def test_a_wrong_number_of_channels_or_size_says_what_the_network_takes():
    net = innersight.open(simple_cnn())
    with pytest.raises(errors.InputError, match=r"\(N, 1, 28, 28\)|\(1, 28, 28\)"):
        net.predict(noise(1, 3, 28, 28))
    with pytest.raises(errors.InputError, match=r"cannot run on an input of shape .*it takes \(N, 1, 28, 28\)"):
        net.predict(noise(1, 1, 30, 33))


def test_a_network_with_two_inputs_is_refused_in_a_sentence():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, image, depth):
            return self.conv(image) + depth

    with pytest.raises(errors.InnersightError, match="image.*depth"):
        innersight.open(Two(), input_shape=(3, 8, 8)).predict(noise(1, 3, 8, 8))


def test_an_unknown_class_is_refused_with_what_there_is():
    net = innersight.open(simple_cnn(), labels=["tench", "goldfish", *map(str, range(8))])
    x = noise(1, 1, 28, 28)
    with pytest.raises(errors.UnknownName, match="no class 'tensh'.* did you mean tench"):
        net.explain(x, target="tensh")
    with pytest.raises(errors.UnknownName, match="class 10 is out of range: the network has 10 outputs"):
        net.explain(x, target=10)


def test_labels_that_do_not_fit_the_outputs_are_refused():
    net = innersight.open(simple_cnn(), labels=["zero", "one"])
    with pytest.raises(errors.InputError, match="there are 2 labels for the 10 outputs"):
        net.predict(noise(1, 1, 28, 28))


def test_preprocessing_is_laid_over_what_is_known_field_by_field():
    net = innersight.open(simple_cnn(), input_shape=(1, 28, 28), preprocess={"mean": 0.1307, "std": 0.3081})
    assert (net.preprocess.size, net.preprocess.channels) == ((28, 28), "L")
    assert net.preprocess.mean == (0.1307,)
    white = net.read(np.full((28, 28), 255, np.uint8)).tensor
    np.testing.assert_allclose(white, (1 - 0.1307) / 0.3081, rtol=1e-5)
    assert any("prepared as asked" in note for note in net.notes)


def test_a_layer_is_asked_for_by_name_and_an_input_shape_that_does_not_fit_is_said_to_be_wrong():
    net = innersight.open(simple_cnn())
    x = noise(1, 1, 28, 28)
    for ask in (lambda: net.layers[0], lambda: net.maps(x, layers=3)):
        with pytest.raises(errors.InputError, match="asked for by its name, such as 'conv1'"):
            ask()
    with pytest.raises(errors.InputError, match="layers= is empty"):
        net.maps(x, layers=[])
    with pytest.raises(errors.InnersightError, match="input_shape"):
        innersight.open(simple_cnn(), input_shape=(1, 8, 8)).layers  # noqa: B018


def test_a_map_that_tells_no_place_from_another_is_said_to_be_one():
    net = small_network("gated")
    s = net.explain(noise(1, 3, 16, 16), "gradcam", layer="sigmoid", relu=False)
    assert any("gradcam map of image 0 is the same everywhere" in note for note in s.provenance.notes)


@pytest.mark.parametrize(
    "fail",
    [
        lambda net, x: net.maps(x, layers=["nothing"]),
        lambda net, x: net.explain(x, target=lambda _out: 1 / 0),
        lambda net, x: net.explain(x, target=99),
        lambda net, x: net.sensitivity(x, "nothing"),
    ],
)
def test_an_error_leaves_the_model_as_it_was_in_train_mode_too(fail):
    net = small_network("residual")
    net.module.train()
    with left_as_found(net.module), pytest.raises((errors.InnersightError, ZeroDivisionError)):
        fail(net, noise(2, 3, 16, 16))


def test_an_empty_list_of_layers_or_methods_is_refused():
    net, x = small_network("residual"), noise(1, 3, 16, 16)
    with pytest.raises(errors.InputError, match="layer= is empty"):
        net.explain(x, "gradcam", layer=[])
    with pytest.raises(errors.InputError, match="method= is empty"):
        net.explain(x, [])


def test_a_notebook_shows_what_a_network_is():
    net = small_network(next(iter(NETWORKS)))
    net.notes.append("<chosen>")
    shown = net._repr_html_()
    assert all(name in shown for name in net.layers)
    assert "&lt;chosen&gt;" in shown
