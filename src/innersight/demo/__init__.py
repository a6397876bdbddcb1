"""The first five minutes: train the tutorial's small network on real digits, look inside, and say what is there.

`run` is what `innersight demo` does. Its claims are measured (`study`): channels are removed, not estimated to matter;
what never fires is counted over all held-out images; where a mistake was looked at is checked by painting that part
over. They go to findings.json as numbers, to the pictures (`figures`), and in words (`words`) to the page that shows
both (`page`).
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import innersight
from innersight import data as digit_sets
from innersight import errors, storage
from innersight.demo import figures, page, words
from innersight.demo.study import CLASSES, Progress, measure, numbers

if TYPE_CHECKING:
    from innersight.data import Digits
    from innersight.data.small_cnn import SimpleCNN, TrainResult

STAGES = ("data", "train", "channels", "mistakes", "pictures")


def run(
    out: str | Path,
    data: str = "digits",
    root: str | Path | None = None,
    seed: int = 0,
    epochs: int | None = None,
    progress: Progress | None = None,
) -> DemoResult:
    """Train the small network, look inside, and write pictures, words, numbers and weights into the folder `out`.

    data:     "digits" (scikit-learn's, works offline) or "mnist"; `root` is the folder of the MNIST files
    epochs:   of training; None: 20 for the digits, 2 for MNIST
    progress: called as progress(stage, done, total, text): the stages are STAGES in this order, each begins with
              done=0 and ends with done=total; text says in a few words what is being done, it may be empty

    The folder is made if need be; files of an earlier demo are replaced, others stay. Everything is written at the end,
    each file whole, so that an interrupt leaves no half of it. The findings depend on the data, the seed and the epochs
    alone. Raises InputError where the folder cannot be written, the data not be read.
    """
    from innersight.data import small_cnn

    began = time.perf_counter()
    say: Progress = progress or (lambda *_: None)
    say("data", 0, 1, f"reading {data}")
    digits = digit_sets.load(data, root)
    say("data", 1, 1, digits.note)
    folder = _writable(out)
    with small_cnn.one_thread():  # sums in one order, so that the numbers are the same on any number of cores
        model, trained = _train(digits, seed, digits.epochs if epochs is None else epochs, say)
        net = innersight.open(
            model, preprocess=digits.preprocess, input_shape=(1, 28, 28), labels=[str(k) for k in range(CLASSES)]
        )
        study = measure(net, digits, len(trained.history), seed, say)
        files = figures.draw(net, study, say)
        files["layers.txt"] = f"{net.layers}\n".encode()
        files["report.html"] = _report(net, digits)
    files["weights.safetensors"] = _weights(model, digits, trained.accuracy, seed)
    findings = words.findings(study)
    files["findings.json"] = numbers(study, findings)
    files["index.html"] = page.render(study, net).encode()
    for name, content in files.items():
        storage.write_whole(folder / name, partial(_put, content))
    return DemoResult(
        folder, digits.note, study.reading.accuracy, tuple(folder / name for name in files), tuple(findings),
        time.perf_counter() - began,
    )  # fmt: skip


def _report(net: innersight.Network, digits: Digits) -> bytes:
    """The viewer's page on one held-out image of each digit."""
    from innersight.viewer.notebook import Page
    from innersight.viewer.session import Session

    labels = digits.test_labels.tolist()
    shown = digits.test_images[[labels.index(k) for k in range(CLASSES)]]
    return Page(Session([net], shown, title=f"A small CNN on {digits.name}")).content


def _put(content: bytes, file: IO[bytes]) -> None:
    file.write(content)


@dataclass(frozen=True)
class DemoResult:
    """What a demo came to.

    data:     which images it used, a sentence
    accuracy: the share of the held-out images that are read right
    files:    all it wrote; index.html shows the pictures with the words
    findings: what one learns, a sentence each; findings.json has the numbers
    seconds:  how long everything took
    """

    out: Path
    data: str
    accuracy: float
    files: tuple[Path, ...]
    findings: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As JSON knows it; the numbers behind the findings are in findings.json."""
        return {
            "data": self.data,
            "accuracy": self.accuracy,
            "findings": list(self.findings),
            "files": [str(f) for f in self.files],
            "next": self.commands,
            "seconds": round(self.seconds, 1),
        }

    @property
    def commands(self) -> list[str]:
        """What to try next with the weights that were written."""
        return words.commands(self.out)

    def lines(self) -> list[str]:
        """What the command prints."""
        return [
            f"Data: {self.data}.",
            *(f"- {sentence}" for sentence in self.findings),
            f"{len(self.files)} files in {self.out} after {self.seconds:.0f} s; open {self.out / 'index.html'}",
            "Next:",
            *(f"  {command}" for command in self.commands),
        ]


def _writable(out: str | Path) -> Path:
    """The folder, made and tried, before minutes are spent on what could not be written."""
    folder = Path(out).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = "it is a file" if folder.is_file() else (error.strerror or str(error)).lower()
        raise errors.InputError(
            f"the demo cannot write into the folder {str(folder)!r}: {reason}; name another with --out"
        ) from error
    return folder


def _train(digits: Digits, seed: int, epochs: int, say: Progress) -> tuple[SimpleCNN, TrainResult]:
    import torch

    from innersight.data import small_cnn

    def step(now: small_cnn.Step) -> None:
        held_out = "" if now.accuracy is None else f", {words.percent(now.accuracy)} of the held-out images right"
        say("train", now.step, now.steps, f"epoch {now.epoch} of {now.epochs}, loss {now.loss:.3f}{held_out}")

    say("train", 0, 1, "")
    with torch.random.fork_rng(devices=[]):  # a new module draws weights from the global state; `train` draws its own
        model = small_cnn.SimpleCNN()
    trained = small_cnn.train(model, digits.train, digits.test, epochs=epochs, seed=seed, progress=step)
    return model.eval(), trained


def _weights(model: SimpleCNN, digits: Digits, accuracy: float, seed: int) -> bytes:
    from innersight.data import small_cnn

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "weights.safetensors")
        small_cnn.save_weights(model, path, data=digits.name, accuracy=accuracy, seed=seed)
        return Path(path).read_bytes()
