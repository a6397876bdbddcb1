"""Ray on two nodes gives what one process gives, also when its workers are killed in the middle."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import innersight
from innersight import errors
from innersight.scanning import cluster, engines, store
from innersight.scanning.data import open_data
from test_scan import Small, bytes_of

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of Ray, to its own programmers

COUNT = 500


def network(module=None):
    return innersight.open((module or Small()).eval(), input_shape=(1, 8, 8))


def pictures():
    generator = np.random.default_rng(0)
    return generator.integers(0, 255, (COUNT, 8, 8)).astype(np.uint8), generator.integers(0, 10, COUNT)


@pytest.fixture(scope="module")
def two_nodes():
    """A cluster of two nodes with two logical CPUs each, on this machine."""
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    store = {"num_cpus": 2, "object_store_memory": 100 << 20}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = Cluster(initialize_head=True, head_node_args={**store, "include_dashboard": False})
        made.add_node(**store)
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        ray.init(
            address=made.address, log_to_driver=False, logging_level="error",
            runtime_env={"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}},
        )  # fmt: skip
        yield made
        ray.shutdown()
        made.shutdown()


@pytest.fixture(scope="module")
def locally(tmp_path_factory):
    return innersight.scan(network(), pictures(), tmp_path_factory.mktemp("local") / "out")


@pytest.mark.usefixtures("two_nodes")
def test_two_nodes_give_the_same_bytes(locally, tmp_path):
    assert len(ray.nodes()) == 2
    said = []
    net = network()
    net.progress = lambda done, total, of: said.append((done, total, of))
    found = innersight.scan(net, pictures(), tmp_path / "out", engine="ray")
    assert bytes_of(found.folder) == bytes_of(locally.folder)
    assert (0, 8, "blocks on 3 actors of Ray, CPUs left to read: 1") in said
    assert (COUNT, COUNT, "images") in said


class Deadly:
    """Images that kill whoever reads number 300 for the first time."""

    def __init__(self, flag):
        self.flag, (self.pixels, self.labels) = str(flag), pictures()

    def __len__(self):
        return COUNT

    def __getitem__(self, i):
        if i == 300:
            die_once(self.flag)
        return self.pixels[i], int(self.labels[i])


class DeadlySmall(Small):
    """A network that kills its process at the second batch for the first time."""

    flag = ""

    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 5 and self.flag:
            die_once(self.flag)
        return super().forward(x)


def die_once(flag):
    try:
        os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def rows(scan):
    return scan.channels().fillna(-1), scan.images().fillna(-1)


@pytest.mark.usefixtures("two_nodes")
def test_a_reader_and_an_actor_killed_in_the_middle(locally, tmp_path):
    flag = tmp_path / "reader"
    source = open_data(pictures())
    deadly = Deadly(flag)
    data = cluster.replace(source, item=lambda i: (*deadly[i][:1], "", deadly[i][1]))
    found = innersight.scan(network(), data, tmp_path / "one", engine="ray")
    assert flag.exists()
    assert bytes_of(found.folder) == bytes_of(locally.folder)

    module = DeadlySmall()
    net = network(module)  # it has learnt its layers before it is sent
    net.layers  # noqa: B018
    module.flag, module.calls = str(tmp_path / "actor"), -100  # not here
    net.progress = None
    sent = cluster._sent

    def armed(r, n):
        module.calls = 0
        try:
            return sent(r, n)
        finally:
            module.calls = -10_000

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "_sent", armed)
        other = innersight.scan(net, pictures(), tmp_path / "two", engine="ray")
    assert (tmp_path / "actor").exists()
    for a, b in zip(rows(other), rows(locally), strict=True):
        assert (a == b).all().all()


@pytest.mark.usefixtures("two_nodes")
def test_what_ray_cannot_do_is_said(tmp_path):
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.rand(9, 1, 8, 8)))
    with pytest.raises(errors.Unsupported, match="by their number"):
        innersight.scan(network(), loader, tmp_path / "a", engine="ray")
    net = network()
    net.module.lock = __import__("threading").Lock()
    with pytest.raises(errors.Unsupported, match="cannot be sent to other processes"):
        innersight.scan(net, pictures(), tmp_path / "b", engine="ray")


def test_ray_without_a_cpu_for_reading_is_refused_before_it_starves():
    class Ray:
        def __init__(self, **free):
            self.available_resources = lambda: free

    assert cluster.devices(Ray(CPU=4.0), gpu=False) == (3, 1)
    assert cluster.devices(Ray(CPU=4.0, GPU=2.0), gpu=True) == (2, 4)
    with pytest.raises(errors.InputError, match="has 1 CPU free and a scan needs two"):
        cluster.devices(Ray(CPU=1.0), gpu=False)
    with pytest.raises(errors.InputError, match="no CPU free"):
        cluster.devices(Ray(GPU=1.0), gpu=True)
    with pytest.raises(errors.InputError, match="Ray has none free"):
        cluster.devices(Ray(CPU=8.0), gpu=True)


def test_groups_merge_into_the_nodes_of_the_tree():
    groups = cluster.grouped(range(100), actors=2)
    assert [b for group in groups for b in group] == list(range(100))
    assert {len(group) for group in groups} == {4}
    assert all(group[0] % 4 == 0 for group in groups)
    some = cluster.grouped([0, 1, 2, 5, 6, 7] * 1, actors=3)
    assert some == [[0], [1], [2], [5], [6], [7]]
    net, source = network(), open_data(pictures())
    plan = innersight.scanning._planned(net, source, None, 9, None, 0)[1]
    blocks = list(engines.local(net, source, plan, [0, 1, 2, 3, 5]))
    nodes = store.joined({(0, b.number): b.counts for b in blocks})
    assert set(nodes) == {(2, 0), (0, 5)}
