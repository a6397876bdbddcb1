"""What all tests share: one thread, a private matplotlib folder, and the way to the folder of real data."""

from __future__ import annotations

import getpass
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

# Before torch and matplotlib are imported: several test processes share few cores, and nothing is written to the home
# folder. The matplotlib folder is the same in every run, since its font cache takes seconds to build.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if "MPLCONFIGDIR" not in os.environ:
    folder = Path(tempfile.gettempdir()) / f"innersight-matplotlib-{getpass.getuser()}"
    folder.mkdir(exist_ok=True)
    os.environ["MPLCONFIGDIR"] = str(folder)

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Callable[..., Path]:
    """`shared_data("mnist", "raw")` is that path in the folder of real data; without it the test is skipped.

    The folder is INNERSIGHT_DATA, or `shared/data` beside the checkout.
    """
    root = Path(os.environ.get("INNERSIGHT_DATA") or REPOSITORY.parent / "shared" / "data")

    def find(*parts: str) -> Path:
        path = root.joinpath(*parts)
        if not path.exists():
            pytest.skip(f"no {'/'.join(parts)} in the folder of real data (set INNERSIGHT_DATA)")
        return path

    return find
