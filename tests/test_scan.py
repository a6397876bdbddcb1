"""A scan against plain numpy over all maps, killed, resumed, in shards, in any order."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import innersight
from innersight import errors, storage
from innersight.scanning import accumulators, engines, store
from innersight.scanning.data import open_data
from innersight.scanning.engines import Block
from innersight.scanning.plan import Plan, Watched

COUNT = 200  # images: three blocks of 64 and a rest


class Small(nn.Module):
    """Convolutions, a channel that is dead, two that are alike, a vector, ten classes."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.conv1 = nn.Conv2d(1, 6, 3)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2)
        self.fc = nn.Linear(8, 10)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.4)
            self.conv1.weight[2] = self.conv1.weight[1] * 2  # alike, but for a factor
            self.conv1.bias[2] = self.conv1.bias[1] * 2
            self.conv2.weight[3], self.conv2.bias[3] = 0, -1  # dead behind the ReLU

    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="session")
def digits():
    datasets = pytest.importorskip("sklearn.datasets")
    bunch = datasets.load_digits()
    pixels = (bunch.images[:COUNT] * 15).astype(np.uint8)
    return pixels, bunch.target[:COUNT]


def network():
    return innersight.open(Small().eval(), input_shape=(1, 8, 8))


def values(digits):
    return torch.from_numpy(digits[0].astype(np.float32) / 255)[:, None]


@pytest.fixture(scope="session")
def maps(digits):
    """Layer -> (N, C, H, W), by plain torch."""
    net, x = Small().eval(), values(digits)
    with torch.no_grad():
        one = net.conv1(x)
        two = F.relu(one)
        three = net.conv2(two)
        four = F.relu(three)
        five = four.mean((2, 3))
        last = net.fc(five)
    vectors = {"mean": five, "fc": last}
    found = {"conv1": one, "relu": two, "conv2": three, "relu_1": four}
    found |= {name: v[:, :, None, None] for name, v in vectors.items()}
    return {name: v.double().numpy() for name, v in found.items()}


@pytest.fixture(scope="session")
def whole(digits, tmp_path_factory):
    """An uninterrupted scan."""
    return innersight.scan(network(), digits, tmp_path_factory.mktemp("whole") / "out", sensitivity="relu_1")


def bytes_of(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(Path(folder).rglob("*")) if f.is_file()}


# --- against numpy ---------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_all_maps_at_once(whole, maps):
    table = whole.channels()
    assert whole.layers == list(maps)
    for layer, value in maps.items():
        rows = table[table["layer"] == layer]
        cells = np.moveaxis(value, 1, 0).reshape(value.shape[1], -1)
        assert (rows["cells"] == cells.shape[1]).all()
        np.testing.assert_allclose(rows["mean"], cells.mean(1), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(rows["std"], cells.std(1), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(rows["min"], cells.min(1), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(rows["max"], cells.max(1), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(rows["zeros"], (cells == 0).mean(1))
        np.testing.assert_allclose(rows["fires"], (value.max((2, 3)) > 0).mean(0))


def test_quantiles_are_within_a_bin_of_all_sampled_cells(whole, maps):
    table = whole.channels()
    for layer in ("conv2", "relu_1", "mean", "fc"):  # no more than 16 cells: every one of them is sampled
        cells = np.moveaxis(maps[layer], 1, 0).reshape(maps[layer].shape[1], -1)
        for name, share in (("q01", 0.01), ("q25", 0.25), ("median", 0.5), ("q95", 0.95)):
            exact = np.quantile(cells, share, axis=1, method="inverted_cdf")
            found = table[table["layer"] == layer][name].to_numpy()
            assert (np.abs(found - exact) <= 0.25 * np.abs(exact) + 2**-10).all(), (layer, name)


def test_tops_are_the_strongest_cells_of_the_strongest_images(whole, maps):
    for layer in ("conv1", "relu_1", "fc"):
        for channel in (0, 1, 3):
            value = maps[layer][:, channel]
            strength = value.reshape(len(value), -1).max(1).astype(np.float32)
            order = sorted(range(len(value)), key=lambda i: (-strength[i], i))[:9]
            top = whole.top(layer, channel)
            assert list(top["image"]) == order
            np.testing.assert_allclose(top["value"], strength[order], rtol=1e-5, atol=1e-6)
            for _, row in top.iterrows():
                assert value[row["image"], row["y"], row["x"]] == pytest.approx(row["value"], rel=1e-5, abs=1e-6)


def test_boxes_are_what_the_unit_can_see(whole, digits):
    """Pixels outside of a top's box change nothing there, pixels inside do."""
    net = Small().eval()
    for _, row in whole.top("relu_1", 0).head(3).iterrows():
        x = values(digits)[[row["image"]]].requires_grad_()
        net.conv2(F.relu(net.conv1(x)))[0, 0, row["y"], row["x"]].backward()
        seen = x.grad[0, 0].abs() > 0
        box = [int(row[n]) for n in ("top", "left", "bottom", "right")]
        inside = torch.zeros_like(seen)
        inside[box[0] : box[2], box[1] : box[3]] = True
        assert not bool((seen & ~inside).any())
        assert bool(seen[box[0], box[1] : box[3]].any())
        assert bool(seen[box[2] - 1, box[1] : box[3]].any())


def test_class_means_selectivity_and_correlation(whole, maps, digits):
    labels = digits[1]
    for layer in ("relu", "relu_1", "fc"):
        means = maps[layer].mean((2, 3))  # (N, C)
        by_class = np.stack([means[labels == k].mean(0) for k in range(10)])
        np.testing.assert_allclose(whole.class_means(layer).to_numpy(), by_class, rtol=1e-4, atol=1e-6)
        between = sum((labels == k).sum() * (by_class[k] - means.mean(0)) ** 2 for k in range(10))
        with np.errstate(invalid="ignore"):
            eta = between / ((means - means.mean(0)) ** 2).sum(0)
            wanted = np.corrcoef(means.T)
        inside = len(means) - len(np.unique(labels))
        epsilon = np.clip(1 - (1 - eta) * (len(means) - 1) / inside, 0, 1)
        np.testing.assert_allclose(whole.channels(layer)["selectivity"], epsilon, atol=1e-4)
        np.testing.assert_allclose(whole.correlation(layer), wanted, atol=1e-4)
    nearest = whole.channels("conv1")
    assert nearest["nearest"][1] == 2
    assert nearest["correlation"][1] == pytest.approx(1, abs=1e-5)


def test_predictions_confusion_and_embeddings(whole, maps, digits):
    logits = maps["fc"][:, :, 0, 0]
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    images, labels = whole.images(), digits[1]
    assert [int(p) for p in images["prediction"]] == list(logits.argmax(1))
    np.testing.assert_allclose(images["confidence"], shares.max(1), rtol=1e-5)
    np.testing.assert_allclose(images["loss"], -np.log(shares[np.arange(COUNT), labels]), rtol=1e-4, atol=1e-6)
    assert [int(r) for r in images["runner_up"]] == list(np.argsort(-logits, 1)[:, 1])
    confusion = whole.confusion()
    for a in confusion.index:
        for b in confusion.columns:
            assert confusion.loc[a, b] == ((labels == int(a)) & (logits.argmax(1) == int(b))).sum()
    assert confusion.to_numpy().sum() == COUNT
    assert whole.manifest["plan"]["embedding"] == "mean"
    np.testing.assert_allclose(whole.embeddings(), maps["mean"][:, :, 0, 0], rtol=1e-3, atol=1e-3)
    assert whole.manifest["summary"]["accuracy"] == pytest.approx((logits.argmax(1) == labels).mean())
    assert "200 images" in repr(whole)


def test_sensitivity_is_removal_by_hand(whole, digits):
    net, x, labels = Small().eval(), values(digits), torch.from_numpy(digits[1])
    with torch.no_grad():
        last = F.relu(net.conv2(F.relu(net.conv1(x))))
        clean = net.fc(last.mean((2, 3))).gather(1, labels[:, None])[:, 0]
        for channel in range(8):
            without = last.clone()
            without[:, channel] = 0
            change = net.fc(without.mean((2, 3))).gather(1, labels[:, None])[:, 0] - clean
            wanted = [float(change[labels == k].mean()) for k in range(10)]
            np.testing.assert_allclose(whole.sensitivity()[channel], wanted, atol=1e-5)


def test_crops_show_the_true_receptive_field(whole, digits):
    """The strip's first tile is the box of the first top, enlarged; JPEG takes a little away."""
    top = whole.top("relu_1", 0).iloc[0]
    y0, x0, y1, x1 = (int(top[n]) for n in ("top", "left", "bottom", "right"))
    pixels = digits[0][top["image"]][y0:y1, x0:x1]
    tile = np.asarray(whole.strip("relu_1", 0).convert("L"))[:64, :64]
    wanted = np.asarray(Image.fromarray(pixels).resize((64, 64), Image.Resampling.NEAREST))
    assert y1 - y0 == x1 - x0
    assert np.abs(tile.astype(float) - wanted).mean() < 6
    with pytest.raises(errors.InputError, match="never changes"):
        whole.strip("relu_1", 3)


# --- bins ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=50))
def test_a_value_lies_between_the_edges_of_its_bin(numbers):
    v = np.array(numbers, np.float32)
    at = accumulators.bins(v)
    low, high = accumulators.edges()[at].T
    v[np.abs(v) < 2.0**-128] = 0
    inner = np.abs(v) < 2.0**16
    assert ((low <= v) & (v <= high))[inner].all()
    assert (at[v > 0] > at[v <= 0].max(initial=-1)).all()
    beyond = ~inner
    assert set(at[beyond]) <= {0, accumulators.BINS - 1}


def test_sampled_cells_are_distinct_and_spread():
    for cells in (17, 24, 49, 64, 100, 3136):
        found = np.stack([accumulators.positions(i, cells) for i in range(300)])
        assert all(len(set(row)) == 16 for row in found)
        assert found.max() < cells
        share = np.bincount(found.ravel(), minlength=cells) * cells / found.size
        if cells < 1000:
            assert share.min() > 0.5
            assert share.max() < 2
    assert list(accumulators.positions(3, 9)) == list(range(9))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_maps_are_read_as_they_lie(layout):
    """Ties go to the first cell, zeros of both signs count, many chunks or one."""
    x = torch.randint(-2, 3, (5, 7, 40, 31), generator=torch.Generator().manual_seed(0)).float() / 2
    x[x == 0] *= -1
    x[1, 2] = -1
    found = accumulators.look(x.to(memory_format=layout), list(range(5)))
    flat = x.flatten(2).double().numpy()
    first = flat.argmax(-1)
    assert (found["at_y"] * 31 + found["at_x"] == first).all()
    assert (found["high"] == flat.max(-1)).all()
    assert (found["low"] == flat.min(-1)).all()
    assert (found["zeros"] == (flat == 0).sum(-1)).all()
    np.testing.assert_allclose(found["mean"], flat.mean(-1), atol=1e-6)
    np.testing.assert_allclose(found["spread"], flat.var(-1), atol=1e-6)
    for i in range(5):
        assert (found["sample"][i] == flat[i][:, accumulators.positions(i, 40 * 31)]).all()


def test_what_is_not_finite_is_counted_and_left_out():
    x = torch.tensor([[[[1.0, float("inf")], [float("nan"), 3.0]]], [[[2.0, 0.0], [0.0, -2.0]]]])
    counts = accumulators.count([accumulators.look(x, [0, 1])], 1, np.array([0, 1]), 3, None, 0, True)
    assert counts["nonfinite"] == [2]
    assert counts["cells"] == [6]
    assert counts["sum"][0] == pytest.approx(4)
    assert counts["square"][0] == pytest.approx(1 + 9 + 4 + 4)
    assert (counts["low"][0], counts["high"][0]) == (-2, 3)
    assert counts["top_image"][:, 0].tolist() == [0, 1, -1]
    assert counts["histogram"].sum() == 6


# --- any order, any part ---------------------------------------------------------------------------------------------

PLAN = Plan(layers=(Watched("a", "Conv2d", (3, 4, 4)),), batch=4, block=4, top=3, classes=("x", "y"))


def block(number, images=4):
    """Counts and rows of random images of a block, full of ties."""
    generator = np.random.default_rng(number)
    maps = torch.from_numpy(generator.integers(-2, 3, (images, 3, 4, 4)).astype(np.float32) / 3)
    ids = np.arange(images) + 4 * number
    looks = [accumulators.look(maps, ids.tolist())]
    counts = accumulators.count(looks, 3, ids, 3, generator.integers(0, 2, images), 2, True)
    rows = {"image": ids, "label": np.zeros(images, np.int32)}
    return Block(number, {f"0/{k}": v for k, v in counts.items()}, rows, {"names": [], "labels": [], "skipped": []})


def folded(folder):
    with store.Parts(folder, every=0) as parts:
        return parts.fold()


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 13), st.randoms(use_true_random=False), st.data())
def test_blocks_in_any_order_on_any_shard_fold_to_the_same_bits(total, random, data):
    import tempfile

    order = list(range(total))
    random.shuffle(order)
    shard_of = data.draw(st.lists(st.integers(0, 2), min_size=total, max_size=total))
    with tempfile.TemporaryDirectory() as root:
        folders = [Path(root) / name for name in ("straight", "0", "1", "2", "merged")]
        for folder in folders:
            folder.mkdir()
        with store.Parts(folders[0], every=0) as straight:
            for b in range(total):
                straight.add(block(b))
            wanted = straight.fold()
        for b in order:
            with store.Parts(folders[1 + shard_of[b]], every=random.choice([0, 1e9])) as shard:
                shard.add(block(b))
        with store.Parts(folders[4], every=0) as merged:
            taken = 0
            for folder in random.sample(folders[1:4], 3):
                with store.Parts(folder) as shard:
                    taken += merged.absorb(shard)
                    assert merged.absorb(shard) == 0  # nothing is counted twice
            assert taken == total
            assert merged.blocks() == set(range(total))
            assert len(list((folders[4] / "parts" / "counts").glob("*.safetensors"))) == bin(total).count("1")
        assert same(folded(folders[4]), wanted)


def test_a_parent_makes_its_children_void_and_half_written_files_go(tmp_path):
    with store.Parts(tmp_path, every=0) as parts:
        for b in range(4):
            parts.add(block(b))
        wanted = parts.fold()
    counts = tmp_path / "parts" / "counts"
    assert [f.name for f in counts.iterdir()] == ["02-00000000.safetensors"]
    with store.Parts(tmp_path / "other", every=0) as other:  # as if killed behind writing the parent
        other.add(block(1))
    (tmp_path / "other/parts/counts/00-00000001.safetensors").rename(counts / "00-00000001.safetensors")
    (counts / ".00-00000009.safetensors.abc").write_bytes(b"half")
    assert same(folded(tmp_path), wanted)
    assert [f.name for f in counts.iterdir()] == ["02-00000000.safetensors"]


def test_the_count_of_nothing_changes_nothing():
    one = block(3).counts
    nothing = accumulators.empty(3, 3, 2, True)
    merged = accumulators.merge({f"0/{k}": v for k, v in nothing.items()}, one)
    assert same(merged, one)


def test_shards_merged_are_the_whole_to_the_byte(whole, digits, tmp_path):
    shards = [tmp_path / f"shard{i}" for i in (1, 2, 3)]
    for i in (3, 1):  # in any order, one of them by whoever merges
        part = innersight.scan(network(), digits, shards[i - 1], shard=(i, 3), sensitivity="relu_1")
        assert not part.complete
        assert f"shard {i}/3" in repr(part)
        with pytest.raises(errors.InputError, match="not complete"):
            part.channels()
    merge = [shards[2], shards[0]]
    merged = innersight.scan(network(), digits, tmp_path / "merged", merge=merge, sensitivity="relu_1")
    assert bytes_of(merged.folder) == bytes_of(whole.folder)


def test_a_shard_of_another_network_is_refused(digits, tmp_path):
    other = Small()
    with torch.no_grad():
        other.fc.bias += 1
    innersight.scan(innersight.open(other.eval(), input_shape=(1, 8, 8)), digits, tmp_path / "a", shard=(1, 2))
    with pytest.raises(errors.InputError, match="no shard of this scan, it differs in network weights"):
        innersight.scan(network(), digits, tmp_path / "b", merge=[tmp_path / "a"])
    with pytest.raises(errors.InputError, match="is another one, it differs in"):
        innersight.scan(network(), digits, tmp_path / "a", shard=(1, 2), resume=True)


# --- killed ----------------------------------------------------------------------------------------------------------

FORKS = """
import os, signal, sys
import numpy as np, torch
from sklearn.datasets import load_digits
import innersight
from innersight import storage
from test_scan import COUNT, Small

torch.set_num_threads(1)
bunch = load_digits()
digits = (bunch.images[:COUNT] * 15).astype(np.uint8), bunch.target[:COUNT]
write_whole = storage.write_whole

def scan_until(limit):  # killed in the middle of the limit-th file (odd), or when it has its name (even)
    at = 0

    def dying(path, write):
        nonlocal at
        at += 1

        def half(file):
            write(file)
            file.flush()
            if at == limit and limit % 2:
                os.kill(os.getpid(), signal.SIGKILL)

        write_whole(path, half)
        if at == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        return path

    storage.write_whole = dying
    net = innersight.open(Small().eval(), input_shape=(1, 8, 8))
    innersight.scan(net, digits, sys.argv[1], resume=True, every=0, sensitivity="relu_1")
    os._exit(0)

for limit in [*range(1, 13), 20, 33, 47, 10**9]:
    pid = os.fork()
    if not pid:
        scan_until(limit)
    code = os.waitstatus_to_exitcode(os.wait()[1])
    print(limit, code, flush=True)
    if code != -signal.SIGKILL:
        sys.exit(code)
"""


def test_killed_in_the_middle_of_many_writes_and_resumed_is_the_same_to_the_byte(whole, tmp_path):
    """kill -9 at the 1st, 2nd, 3rd ... file that is written, each time going on with what the last one left."""
    command = [sys.executable, "-c", FORKS, str(tmp_path / "out")]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" -9") >= 8
    assert bytes_of(tmp_path / "out") == bytes_of(whole.folder)


def test_resume_counts_only_what_is_missing(digits, tmp_path, monkeypatch):
    counted, measure = [], engines.measure
    monkeypatch.setattr(engines, "measure", lambda *a: counted.append(a[2]) or measure(*a))
    pixels, labels = digits

    class Data:
        def __len__(self):
            return COUNT

        def __getitem__(self, i):
            if stop and i == 150:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.2)
            return pixels[i], int(labels[i])

    stop = True
    with pytest.raises(KeyboardInterrupt):
        innersight.scan(network(), Data(), tmp_path / "out", crops=0)
    stop = False
    assert counted[0] == 0
    done = len(counted)
    with pytest.raises(errors.InputError, match="go on with resume=True"):
        innersight.scan(network(), Data(), tmp_path / "out", crops=0)
    found = innersight.scan(network(), Data(), tmp_path / "out", crops=0, resume=True)
    assert found.complete
    assert sorted(counted) == [0, 1, 2, 3]  # each block once
    assert 1 <= done < 4
    assert list(found.images()["image"]) == list(range(COUNT))
    assert innersight.scan(network(), Data(), tmp_path / "out", crops=0, resume=True).complete


def test_a_full_disk_is_one_sentence_and_the_artefact_goes_on(whole, digits, tmp_path, monkeypatch):
    out, real, left = tmp_path / "out", os.replace, [4]

    def full(a, b):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(a))
        return real(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "replace", full)
        with pytest.raises(errors.InputError, match=r"is full; what was counted before is kept") as caught:
            innersight.scan(network(), digits, out, every=0, sensitivity="relu_1")
    assert "\n" not in str(caught.value)
    assert not any(f.name.startswith(".") for f in out.rglob("*"))
    found = innersight.scan(network(), digits, out, resume=True, sensitivity="relu_1")
    assert bytes_of(found.folder) == bytes_of(whole.folder)


def test_two_scans_in_one_folder_are_refused(tmp_path):
    with store.Parts(tmp_path):
        with pytest.raises(errors.InputError, match="another scan is writing"):
            store.Parts(tmp_path).__enter__()


# --- data ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(digits, tmp_path):
    """Pictures in class folders, one of them damaged, one no picture at all."""
    root = tmp_path / "pictures"
    for i in range(12):
        place = root / str(digits[1][i])
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits[0][i]).save(place / f"{i:02}.png")
    (root / "0" / "bad.png").write_bytes((root / "0" / "00.png").read_bytes()[:60])
    (root / "1" / "text.jpg").write_text("no picture")
    return root


def test_unreadable_images_are_skipped_listed_and_counted(folder, tmp_path):
    found = innersight.scan(network(), folder, tmp_path / "out")
    skipped = found.skipped()
    assert sorted(skipped["name"]) == ["0/bad.png", "1/text.jpg"]
    assert "cut off" in skipped[skipped["name"] == "0/bad.png"]["reason"].iloc[0]
    images = found.images()
    assert len(images) == 12
    assert (images["label"] == images["name"].str[0]).all()
    assert sorted(set(images["image"]) | set(skipped["image"])) == list(range(14))
    assert found.manifest["summary"]["skipped"] == 2
    assert "12 images (2 skipped)" in repr(found)


def sources(digits, folder):
    """The same twelve pictures, in every way a data set comes in, in the folder's order."""
    files = sorted(f for f in folder.rglob("*.png") if f.name != "bad.png")
    numbers = [int(f.stem) for f in files]
    pixels, labels = digits[0][numbers], digits[1][numbers]
    tensors = torch.from_numpy(pixels.astype(np.float32) / 255)[:, None], torch.from_numpy(labels)
    listed = folder.parent / "list.csv"
    listed.write_text("path,label\n" + "".join(f"{f.relative_to(folder.parent)},{f.parent.name}\n" for f in files))
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"label": labels, "file": [str(f.relative_to(folder.parent)) for f in files]})
    pyarrow.parquet.write_table(table, folder.parent / "list.parquet")

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(zip(pixels, labels.tolist(), strict=True))

    class Rows(list):
        column_names, features = ["image", "label"], {"image": None, "label": None}

    loader = torch.utils.data.DataLoader
    dataset = torch.utils.data.TensorDataset(*tensors)
    yield "csv", listed
    yield "parquet", folder.parent / "list.parquet"
    yield "torch Dataset", dataset
    yield "loader", loader(dataset, batch_size=5)
    yield "samples", loader(list(zip(pixels, labels.tolist(), strict=True)), batch_size=5, collate_fn=list)
    yield "stream", loader(Stream(), batch_size=None, collate_fn=lambda sample: sample)
    yield "arrays", (pixels, labels)
    yield "list of files", [(str(f), int(f.parent.name)) for f in files]
    yield "Hugging Face rows", Rows({"image": Image.open(f), "label": int(f.parent.name)} for f in files)


def test_every_kind_of_data_set_gives_the_same(digits, folder, tmp_path):
    for bad in (folder / "0" / "bad.png", folder / "1" / "text.jpg"):
        bad.unlink()
    wanted = innersight.scan(network(), folder, tmp_path / "folder")
    (folder / "0" / "bad.png").unlink(missing_ok=True)
    for name, data in sources(digits, folder):
        found = innersight.scan(network(), data, tmp_path / name.replace(" ", "-"))
        assert found.manifest["summary"] == wanted.manifest["summary"], name
        assert (found.channels().fillna(-1) == wanted.channels().fillna(-1)).all().all(), name
        assert list(found.images()["label"]) == list(wanted.images()["label"]), name
        if name not in ("torch Dataset", "loader"):  # of float tensors the input is cut out, not the file's picture
            assert bytes_of(found.folder / "crops") == bytes_of(wanted.folder / "crops"), name


def test_data_sets_by_name(shared_data, tmp_path):
    source = open_data("digits")
    assert source.size == 355
    mnist = open_data("mnist", shared_data("mnist"))
    assert mnist.size == 10_000
    assert [mnist.item(i)[2] for i in range(5)] == [7, 2, 1, 0, 4]
    assert [open_data("mnist:train", shared_data("mnist")).item(i)[2] for i in range(5)] == [5, 0, 4, 1, 9]
    with pytest.raises(errors.InputError, match="needs root="):
        open_data("mnist")
    with pytest.raises(errors.InputError, match="CIFAR-10 is not in"):
        open_data("cifar10", tmp_path)


def test_cifar10_by_name(tmp_path, monkeypatch):
    """A small one in CIFAR's own layout; its sums are put where torchvision keeps those of the real files."""
    import hashlib
    import pickle

    from torchvision.datasets import CIFAR10

    place = tmp_path / "cifar-10-batches-py"
    place.mkdir()
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (6, 3072), np.uint8)

    def kept(name, content):
        data = pickle.dumps(content)
        (place / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    names = [f"class {i}" for i in range(10)]
    test = kept("test_batch", {"data": pixels, "labels": [3, 1, 4, 1, 5, 9]})
    train = [kept(f"data_batch_{i}", {"data": pixels[:2] // i, "labels": [i, i + 1]}) for i in range(1, 6)]
    meta, digest = kept("batches.meta", {"label_names": names})
    monkeypatch.setattr(CIFAR10, "test_list", [test])
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "meta", {"filename": meta, "key": "label_names", "md5": digest})
    source = open_data("cifar10", tmp_path)
    assert (source.size, source.classes) == (6, tuple(names))
    image, _, label = source.item(2)
    assert label == 4
    assert (image == pixels[2].reshape(3, 32, 32).transpose(1, 2, 0)).all()  # stored by planes
    more = open_data("cifar10:train", tmp_path)
    assert [more.item(i)[2] for i in range(more.size)] == [1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
    (place / "test_batch").write_bytes(b"another file")
    with pytest.raises(errors.InputError, match="CIFAR-10 is not in"):
        open_data("cifar10", tmp_path)


def test_a_hugging_face_data_set(digits, tmp_path):
    datasets = pytest.importorskip("datasets")
    pixels, labels = digits[0][:20], digits[1][:20]
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=[f"number {i}" for i in range(10)])}
    rows = {"image": [Image.fromarray(p) for p in pixels], "label": labels.tolist()}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    source = open_data(data)
    assert source.classes == tuple(features["label"].names)
    found = innersight.scan(network(), data, tmp_path / "hf")
    wanted = innersight.scan(network(), (pixels, labels), tmp_path / "arrays")
    assert (found.channels("conv1")["mean"] == wanted.channels("conv1")["mean"]).all()


def test_labels_find_their_classes(digits, tmp_path):
    """By name in whatever order, by number, by order where the names say nothing; never by chance."""
    pixels, labels = digits
    words = "zero one two three four five six seven eight nine".split()

    def label_of(data, names=None):
        net = innersight.open(Small().eval(), input_shape=(1, 8, 8), labels=names)
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        return innersight.scan(net, data, place, crops=0, limit=20)

    class Named:
        classes = sorted(words)

        def __len__(self):
            return 20

        def __getitem__(self, i):
            return pixels[i], self.classes.index(words[labels[i]])

    assert list(label_of(Named(), words).images()["label"]) == [words[k] for k in labels[:20]]
    found = label_of(Named())
    assert list(found.images()["label"]) == [words[k] for k in labels[:20]]  # the data set names the ten outputs
    odd = label_of(Named(), [f"class {i}" for i in range(10)])
    assert any("in their order" in note for note in odd.notes)

    class Three(Named):
        classes = ("cat", "dog", "emu")

        def __getitem__(self, i):
            return pixels[i], i % 3

    three = label_of(Three(), words)
    assert three.images()["label"].isna().all()
    assert three.manifest["summary"]["accuracy"] is None
    assert any("name none of the network's 10 classes" in note for note in three.notes)


def test_what_is_no_data_set_is_refused(digits, tmp_path):
    shuffled = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(values(digits)), shuffle=True)
    bad = tmp_path / "bad.csv"
    bad.write_text("name,label\na.png,1\n")
    for data, said in [
        (shuffled, "shuffles"),
        (iter([1]), "only once"),
        (3, "no data set"),
        (bad, "one called path"),
        (tmp_path / "none", "no such file"),
        ((digits[0], digits[1][:5]), "200 images and 5 labels"),
    ]:
        with pytest.raises(errors.InputError, match=said):
            innersight.scan(network(), data, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(errors.InputError, match="none of its images can be read; of the first"):
        innersight.scan(network(), [np.zeros((2, 2), np.int64)], tmp_path / "out")
    with pytest.raises(errors.UnknownName, match="did you mean conv2, conv1"):
        innersight.scan(network(), digits, tmp_path / "out", layers=["conv"])
    with pytest.raises(errors.UnknownName, match="no engine 'slurm'"):
        innersight.scan(network(), digits, tmp_path / "out", engine="slurm")
    with pytest.raises(errors.InputError, match="not empty and holds no scan"):
        innersight.scan(network(), digits, tmp_path)


def test_an_image_that_the_network_makes_nan_of_is_skipped(digits, tmp_path):
    class Log(Small):
        def forward(self, x):
            return super().forward(x) + torch.log(x.flatten(1).sum(1, keepdim=True))  # of an empty picture: -inf

    class Root(Small):
        def forward(self, x):
            return super().forward(x) + torch.sqrt(x.flatten(1).mean(1, keepdim=True) - 1e-3)

    pixels = digits[0][:70].copy()
    pixels[13] = 0
    net = innersight.open(Root().eval(), input_shape=(1, 8, 8))
    found = innersight.scan(net, (pixels, digits[1][:70]), tmp_path / "out", layers=["conv1", "fc"])
    assert list(found.skipped()["image"]) == [13]
    assert "NaN" in found.skipped()["reason"][0]
    assert len(found.images()) == 69
    assert (found.channels("conv1")["images"] == 69).all()
    net = innersight.open(Log().eval(), input_shape=(1, 8, 8))
    found = innersight.scan(net, (pixels, digits[1][:70]), tmp_path / "log", crops=0)
    rows = found.channels().set_index("layer").loc["log"]
    assert rows["nonfinite"] == 1
    assert np.isfinite(rows["mean"])


def test_layers_by_kind_and_a_loader_of_unknown_length(digits, tmp_path):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter((p, int(k)) for p, k in zip(*digits, strict=True))

    data = torch.utils.data.DataLoader(Endless(), batch_size=None, collate_fn=lambda s: s)
    found = innersight.scan(network(), data, tmp_path / "out", layers="Conv2d", crops=0)
    assert found.layers == ["conv1", "conv2"]
    assert found.manifest["summary"]["images"] == COUNT
    limited = innersight.scan(network(), data, tmp_path / "limited", layers="Conv2d", crops=0, limit=70)
    assert limited.manifest["summary"]["images"] == 70


# --- the command line ------------------------------------------------------------------------------------------------


def run(*args):
    from click.testing import CliRunner

    from innersight.cli import main

    return CliRunner().invoke(main, [str(a) for a in args], catch_exceptions=False)


@pytest.fixture
def model(tmp_path):
    file = tmp_path / "small.safetensors"
    from safetensors.torch import save_file

    save_file(Small().state_dict(), file)
    return [file, "--arch", "test_scan:Small", "--input-shape", "1,8,8"]


def test_the_command(folder, model, tmp_path):
    made = run("scan", *model, folder, "--out", tmp_path / "out", "--json")
    assert made.exit_code == 0, made.output
    record = json.loads(made.stdout)
    assert record["complete"]
    assert record["summary"]["images"] == 12
    again = run("scan", *model, folder, "--out", tmp_path / "out")
    assert again.exit_code == 2
    assert "go on with --resume" in again.stderr
    assert run("scan", *model, folder, "--out", tmp_path / "out", "--resume").exit_code == 0
    for i in (1, 2):
        part = run("scan", *model, folder, "--out", tmp_path / f"s{i}", "--shard", f"{i}/2")
        assert part.exit_code == 0, part.output
    shards = ["--merge", tmp_path / "s1", "--merge", tmp_path / "s2"]
    merged = run("scan", *model, folder, "--out", tmp_path / "merged", *shards)
    assert merged.exit_code == 0, merged.output
    assert bytes_of(tmp_path / "merged") == bytes_of(tmp_path / "out")


def test_the_command_refuses_in_one_sentence(folder, model, tmp_path):
    for args, said in [
        ([tmp_path / "none"], "no such file"),
        ([folder, "--shard", "5"], "--shard takes I/N"),
        ([folder, "--shard", "3/2"], "i from 1 to n"),
        ([folder, "--layer", "nothing"], "no layer 'nothing'"),
        ([folder, "--merge", tmp_path / "no"], "no shard of a scan"),
        ([folder, "--engine", "spark"], "no engine 'spark'"),
        (["mnist"], "needs --root"),
    ]:
        found = run("scan", *model, *args, "--out", tmp_path / "out2")
        assert found.exit_code == 2, (args, found.output)
        assert said in found.stderr, found.stderr
        assert found.stderr.strip().count("\n") == found.stderr.count("note:"), found.stderr
