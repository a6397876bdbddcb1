"""The command line: `innersight COMMAND ...`.

Results go to stdout; notes, progress and errors to stderr. It ends with 0, with 2 and one sentence for bad input, with
130 for an interrupt; a bug in innersight shows its traceback. With `--json` stdout holds one JSON object, of an error
too: {"error": the sentence, "kind": "UnknownName", "suggestions": [...]}.

Only click is imported at the top: help must not wait for torch.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from innersight import __version__, errors

if TYPE_CHECKING:
    from innersight.images import Inputs
    from innersight.methods import Method
    from innersight.network import Network
    from innersight.results import FeatureMaps, Maximization, Predictions, Saliency

# ---------------------------------------------------------------------------------------------------------------------
# How it ends


class Commands(click.Group):
    """The commands, and how whatever goes wrong ends."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of this file

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, complete_var: str | None = None,
             standalone_mode: bool = True, **extra: Any) -> Any:  # fmt: skip
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        args = list(sys.argv[1:] if args is None else args)
        as_json = "--json" in args
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a label the terminal cannot spell is no reason to stop
                stream.reconfigure(errors="backslashreplace")
        try:
            with warnings.catch_warnings():
                if not sys.warnoptions:
                    warnings.simplefilter("ignore")  # of the libraries, to programmers
                code = super().main(args, prog_name or "innersight", complete_var, False, **extra)
            sys.stdout.flush()  # a reader that has gone is noticed here
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            code = 2
        except (click.ClickException, errors.InnersightError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor will the flush at exit complain
                code = 0  # whoever read has read enough
            else:
                _refuse(error, as_json)
                code = 2
        except click.Abort:
            _say("innersight: interrupted")
            code = 130
        sys.exit(code if isinstance(code, int) else 0)


def _refuse(error: Exception, as_json: bool) -> None:
    said = _sentence(error)
    if as_json:
        record: dict[str, Any] = {"error": said, "kind": type(error).__name__}
        if isinstance(error, errors.UnknownName):
            record["suggestions"] = error.suggestions
        _print_json(record)
    _say(f"innersight: {said}")


def _sentence(error: Exception) -> str:
    if isinstance(error, click.UsageError):
        said = error.format_message()
        if isinstance(error, click.NoSuchOption):
            near = f"; did you mean {' or '.join(error.possibilities)}?" if error.possibilities else ""
            said = f"no such option {error.option_name}{near}"
        help_line = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        return said[:1].lower() + said[1:].rstrip(".") + help_line
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, OSError) and not isinstance(error, errors.InnersightError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return _as_options(" ".join(str(error).split()))


_FLAGS = {
    "output=": "--output-name ", "layers=": "--layer ", "trust=True": "--trust", "limit=None": "--limit 0",
    "resume=True": "--resume",
    "composite=": "--option composite=",
}  # fmt: skip
_NAMES = (
    "arch fuse weights labels layers? input_shape preprocess output device method target "
    "channel at composite root shard crops sensitivity max_mb scan data"
)
_KEYWORD = re.compile(rf"(?<![\w.-])(?:trust=True|limit=None|resume=True|(?:{'|'.join(_NAMES.split())})=)")


def _as_options(text: str) -> str:
    """A sentence of the library with its keywords as the options they are here.

    >>> _as_options("class 3 (labels= gives names); or pass trust=True")
    'class 3 (--labels gives names); or pass --trust'
    """
    named = _KEYWORD.sub(lambda k: _FLAGS.get(k[0]) or f"--{k[0][:-1].replace('_', '-')} ", text)
    return re.sub(r"(--[a-z-]+) (?=[ ,;:.)])", r"\1", named)


# ---------------------------------------------------------------------------------------------------------------------
# What is printed


def _say(text: str, **style: Any) -> None:
    """A line for people, on stderr."""
    from rich.console import Console

    with contextlib.suppress(BrokenPipeError):
        Console(stderr=True, markup=False, highlight=False, emoji=False).print(text, soft_wrap=True, **style)


def _notes(notes: Iterable[str]) -> None:
    for note in dict.fromkeys(notes):
        _say(f"note: {_as_options(note)}", style="dim")


def _print_json(record: Any) -> None:
    from innersight.results import jsonable

    click.echo(json.dumps(jsonable(record), ensure_ascii=False, allow_nan=False, indent=2))


@contextlib.contextmanager
def _doing(what: str, net: Network | None = None) -> Iterator[None]:
    """What takes its time: beside a spinner on a terminal, else a line now and then; with `net` counting its images."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        if net is not None:
            net.progress = lambda done, total, of: _plain_progress(what, done, total, of) if total > 16 else None
        yield
        return
    with console.status(what) as status:
        if net is not None:
            net.progress = lambda done, total, of: status.update(f"{what}: {done} of {total} {of}")
        yield


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = (),
           spare: Sequence[str] = ()) -> None:  # fmt: skip
    """Print a table, on a terminal no wider than that: `spare` columns go, first to last, before cells are folded."""
    from rich.console import Console

    columns = [[name, *cells] for name, *cells in zip(header, *rows, strict=True)]
    columns = [c for c in columns if any(c[1:])]
    console = Console(markup=False, highlight=False, emoji=False)

    def width() -> int:
        return sum(max(map(len, c)) + 2 for c in columns) - 2

    if not console.is_terminal:
        click.echo("\n".join(_aligned(columns, right)))
        return
    gone = []
    for name in spare:
        if width() > console.width and name in [c[0] for c in columns]:
            columns = [c for c in columns if c[0] != name]
            gone.append(name)
    console.print(_rich_table(columns, right))
    if gone:
        _notes([f"this terminal is too narrow for {' and '.join(gone)}; a wider one, a pipe and --json show more"])


def _aligned(columns: Sequence[Sequence[str]], right: Sequence[str]) -> Iterator[str]:
    padded = []
    for column in columns:
        w = max(map(len, column))
        column = [column[0], "-" * w, *column[1:]]
        padded.append([cell.rjust(w) if column[0] in right else cell.ljust(w) for cell in column])
    for row in zip(*padded, strict=True):
        yield "  ".join(row).rstrip()


def _rich_table(columns: Sequence[Sequence[str]], right: Sequence[str]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(Text(column[0]), justify="right" if column[0] in right else "left", overflow="fold")
    for row in zip(*(column[1:] for column in columns), strict=True):
        table.add_row(*map(Text, row))
    return table


# ---------------------------------------------------------------------------------------------------------------------
# What is asked for


class Shape(click.ParamType):
    """C,H,W or CxHxW."""

    name = "C,H,W"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = re.split(r"[,x ]+", value.strip("()[] "))
        if not all(p.isdecimal() and int(p) > 0 for p in parts):
            self.fail(f"{value!r} is no shape; write channels, height and width as 3,224,224 or 3x224x224", param, ctx)
        return tuple(map(int, parts))


@dataclass(frozen=True)
class Model:
    """The model that a command line names, not opened yet."""

    source: str
    preprocess: tuple[str, ...]
    labels: str | None
    options: Mapping[str, Any]

    def open(self) -> Network:
        """The network, with the user's word on preprocessing over the model's, field by field."""
        record = _preprocess_record(self.preprocess)
        with _doing(f"opening {self.source}"):
            import innersight

            return innersight.open(self.source, labels=self._labels(), preprocess=record or None, **self.options)

    def _labels(self) -> Any:
        if self.labels and "," in self.labels and not os.path.exists(self.labels):
            return [label.strip() for label in self.labels.split(",")]
        return self.labels


def _preprocess_record(given: Sequence[str]) -> dict[str, Any]:
    """`mean=0.5,0.5,0.5 std=0.2` or a file with that as JSON."""
    record: dict[str, Any] = {}
    for text in given:
        if "=" not in text or os.path.exists(text):
            try:
                part = json.loads(Path(text).read_text(encoding="utf-8"))
            except ValueError as error:
                raise errors.InputError(f"{text} holds no JSON: {error}") from error
            if not isinstance(part, dict):
                raise errors.InputError(f'{text} holds no JSON object like {{"size": [224, 224], "mean": [0.5]}}')
            record.update(part)
            continue
        for pair in re.split(r"[\s;]+|,(?=[a-z_]+=)", text.strip()):
            name, _, text = pair.partition("=")
            value = _field(text)
            if isinstance(value, str) and name not in ("channels", "resize", "interpolation", "crop_rounding"):
                raise errors.InputError(f"preprocess {name} is a number, or one for each channel, not {text!r}")
            record[name] = value
    return record


def _field(text: str) -> Any:
    """A value of a preprocess record: numbers (1/255 too), several of them as a list, else the word."""
    parts = [p for p in re.split(r"[,x](?=[\d.])", text.strip("()[]")) if p]
    try:
        numbers = [_number(p) for p in parts]
    except (ValueError, ZeroDivisionError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)
    return numbers if len(numbers) != 1 else numbers[0]


def _number(text: str) -> float | int:
    above, slash, below = text.partition("/")
    if slash:
        return float(above) / float(below)
    return int(text) if text.lstrip("+-").isdigit() else float(text)


def _on_model(
    images: bool = False, required: bool = True, as_json: bool = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """MODEL and how it is opened, as one argument `model`; IMAGE... where asked for; and --json."""
    names = ("weights", "arch", "input_shape", "output_name", "device", "trust", "arithmetic")
    options = [
        click.argument("model"),
        *([click.argument("images", nargs=-1, required=required, metavar="IMAGE...")] if images else []),
        click.option("--weights", metavar="FILE|none", help="For a model by name; 'none' leaves it untrained."),
        click.option("--arch", metavar="PKG.MOD:FACTORY", help="What network a file of weights is for."),
        click.option("--labels", metavar="FILE|A,B,...", help="Class names, in the order of the outputs."),
        click.option("--input-shape", type=Shape(), help="Of one input: 3,224,224 or 3x224x224."),
        click.option("--preprocess", multiple=True, metavar="KEY=VALUE...|FILE.json",
                     help="How pictures are prepared, over what the model says: 'mean=0.5,0.5,0.5 std=0.2'."),
        click.option("--output-name", metavar="NAME", help="Which of several outputs is the answer."),
        click.option("--device", metavar="cpu|cuda", help="Where to run."),
        click.option("--trust", is_flag=True, help="Allow files that run code when they are loaded."),
        click.option("--arithmetic", metavar="device|litert|float",
                     help="Of a quantised TFLite file: the device's integers (default), LiteRT's, or its float twin."),
        *([_json_option] if as_json else []),
    ]  # fmt: skip

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def gathered(model: str, labels: str | None, preprocess: tuple[str, ...], **rest: Any) -> None:
            opening = {name.removesuffix("_name"): rest.pop(name) for name in names}
            command(Model(model, preprocess, labels, opening), **rest)

        return functools.reduce(lambda decorated, option: option(decorated), reversed(options), gathered)

    return decorate


_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def _out_option(default: str) -> Callable[..., Any]:
    return click.option(
        "--out", "outs", multiple=True, type=click.Path(path_type=Path), default=(default,), metavar="FILE",
        help=f".png .pdf .svg a picture, .npz .safetensors the values; repeatable. Default: {default}.",
    )  # fmt: skip


def _split(given: Sequence[str]) -> list[str]:
    """Repeated options and comma lists as one list, each once."""
    return list(dict.fromkeys(part.strip() for text in given for part in text.split(",") if part.strip()))


def _check_outs(outs: Sequence[Path]) -> None:
    """Refuse what cannot be written before anything is computed for it."""
    from innersight import storage

    for path in outs:
        storage.check_suffix(path)
        storage.check_place(path)
        if not os.access(path.parent, os.W_OK):
            raise errors.InputError(f"cannot write {str(path)!r}: the folder {str(path.parent)!r} is read-only")


def _check_images(images: Sequence[str]) -> None:
    """Refuse a path that leads nowhere before a model is opened, perhaps downloaded, for it."""
    from innersight.images import _find

    for path in images:
        next(_find(path), None)


# ---------------------------------------------------------------------------------------------------------------------
# The commands


@click.group(cls=Commands, name="innersight", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="innersight %(version)s")
def main() -> None:
    """See inside a vision network.

    MODEL is torchvision:NAME, timm:NAME, hf:NAME, or a file: Keras (.keras, .h5), ONNX, TFLite, TorchScript,
    torch.export (.pt2), or weights (.safetensors, .pth) together with --arch. IMAGE is a picture, a folder or a glob;
    there may be several.

    \b
      innersight demo                       (start here)
      innersight layers  torchvision:resnet18
      innersight maps    torchvision:resnet18 dog.jpg --layer conv1 --out maps.png
      innersight explain torchvision:resnet18 dog.jpg --method gradcam --out heat.png

    Results go to stdout, notes to stderr. Exit code 0; 2 for bad input, with one sentence; 130 for an interrupt. With
    --json, errors are an object {"error": ...} on stdout, too.
    """


@main.command()
@click.option("--data", type=click.Choice(["digits", "mnist"]), default="digits", show_default=True,
              help="Those of scikit-learn, which need no network, or MNIST.")  # fmt: skip
@click.option("--root", type=click.Path(path_type=Path), metavar="DIR",
              help="Where the files of MNIST are; without it they are downloaded.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), default=Path("innersight-demo"), show_default=True,
              metavar="DIR", help="The folder that is written.")  # fmt: skip
@click.option("--epochs", type=click.IntRange(min=1), metavar="N", help="Default: as many as the data needs.")
@click.option("--seed", type=int, default=0, show_default=True)
@_json_option
def demo(out: Path, as_json: bool, **options: Any) -> None:
    """Train a small network on digits and look inside.

    Writes pictures, words, numbers and the weights into a folder: what the channels see, which digits depend on them,
    and what the network looked at in its worst mistakes.
    """
    with _doing("loading"):
        import innersight.demo as first_minutes

    with _stages(quiet=as_json) as progress:
        result = first_minutes.run(out=out, progress=progress, **options)
    if as_json:
        _print_json(result)
    else:
        for line in result.lines():
            click.echo(_wrapped(line))


def _wrapped(line: str) -> str:
    """A sentence in lines of the terminal's width; commands (indented) stay in one piece, to be copied."""
    if line.startswith(" ") or not sys.stdout.isatty():
        return line
    width = min(shutil.get_terminal_size().columns, 120)
    return textwrap.fill(line, width, subsequent_indent="  " if line.startswith("- ") else "")


@contextlib.contextmanager
def _stages(quiet: bool) -> Iterator[Callable[[str, int, int, str], None]]:
    """Called as progress(stage, done, total, text): bars on a terminal, else a line now and then."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Column

    console = Console(stderr=True, markup=False, highlight=False)
    if not console.is_terminal:
        yield _plain_progress if not quiet else lambda *_: None
        return
    text = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    columns = (
        TextColumn("{task.description}", markup=False, table_column=Column(min_width=8)), BarColumn(12),
        TimeElapsedColumn(), TextColumn("{task.fields[text]}", markup=False, style="dim", table_column=text),
    )  # fmt: skip
    tasks: dict[str, Any] = {}
    with Progress(*columns, console=console, expand=True) as bars:

        def progress(stage: str, done: int, total: int, text: str) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, text="")
            bars.update(tasks[stage], completed=done, total=total, text=text)

        yield progress


def _plain_progress(stage: str, done: int, total: int, text: str) -> None:
    if done in (0, total) or done % max(1, total // 10) == 0:
        count = f" {done}/{total}" if total > 1 else ""
        if text or done == total:
            _say(f"{stage}{count}{': ' if text else ''}{text}")


@main.command()
@click.option("--all", "everything", is_flag=True, help="Views and copies (flatten, permute, ...), too.")
@click.option("--effective", is_flag=True, help="Add the box of the input that holds 90% of a unit's squared gradient.")
@_on_model()
def layers(model: Model, everything: bool, effective: bool, as_json: bool) -> None:
    """The layers of MODEL, in the order they run.

    The receptive field is exact: the pixels of the input that one value depends on; stride and centre say how it
    moves. With --effective the smaller box that most of it comes from, on noise.
    """
    from innersight import layers as table

    net = model.open()
    with _doing(f"running {net.name}"):
        found = net.layers
        listed = _all_layers(found) if everything else list(found.values())
    boxes = _effective_boxes(listed) if effective else {}
    if as_json:
        rows = [layer.to_json() for layer in listed]
        if effective:
            rows = [{**row, "effective": boxes.get(row["name"])} for row in rows]
        parameters = sum(layer.parameters for layer in found.values())
        _print_json({**_about(net), "parameters": parameters, "layers": rows})
        return
    cells = [table.row(layer) for layer in listed]
    header: tuple[str, ...] = table.HEADER
    if effective:
        header = (*header[:6], "effective", *header[6:])
        cells = [(*row[:6], _box_size(boxes.get(row[0])), *row[6:]) for row in cells]
    _table(header, cells, right=("parameters",), spare=("centre", "kind", "stride"))
    click.echo(f"\n{net.name}: {repr(found).strip('<>')}")
    _notes(net.notes)


def _all_layers(found: Any) -> list[Any]:
    return found.everything()


def _effective_boxes(listed: Sequence[Any]) -> dict[str, tuple[int, ...]]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    spatial = [layer for layer in listed if layer.spatial]
    boxes = {}
    for layer in track(spatial, "effective fields", console=console, transient=True, disable=not console.is_terminal):
        with contextlib.suppress(errors.Unsupported):  # a layer without a gradient has none
            boxes[layer.name] = layer.effective_receptive_field()
    return boxes


def _box_size(box: Sequence[int] | None) -> str:
    return "" if box is None else f"{box[2] - box[0]}x{box[3] - box[1]}"


def _about(net: Network) -> dict[str, Any]:
    return {
        "network": net.name,
        "input_shape": net.input_shape,
        "classes": None if net.labels is None else len(net.labels),
        "preprocess": net.preprocess,
        "device": str(net.device),
        "notes": net.notes,
    }


@main.command()
@click.option("--layer", "names", multiple=True, metavar="NAME", help="Repeatable, or a comma list; 'all' for every "
              "layer with maps. Default: the first that has some.")  # fmt: skip
@click.option("--columns", type=click.IntRange(min=1), metavar="N", help="Of the grid; default about square.")
@click.option("--scale", type=click.Choice(["each", "shared"]), default="each", show_default=True,
              help="Every map on its own scale, or all of a layer on one.")  # fmt: skip
@click.option("--order", type=click.Choice(["index", "activation"]), default="index", show_default=True,
              help="By channel number, or the most active first.")  # fmt: skip
@click.option(
    "--limit",
    type=click.IntRange(min=0),
    metavar="N",
    default=256,
    show_default=True,
    help="Maps on a page; 0 for all.",
)
@click.option("--page", type=click.IntRange(min=1), metavar="N", default=1, show_default=True)
@_out_option("maps.png")
@_on_model(images=True)
def maps(model: Model, images: tuple[str, ...], names: tuple[str, ...], outs: tuple[Path, ...], limit: int,
         as_json: bool, **drawing: Any) -> None:  # fmt: skip
    """The feature maps of MODEL for each IMAGE, as a grid.

    A picture holds one layer for one image: of several, the names of the files say which (maps_conv1_0.png); a .pdf
    holds them all, a page each. .npz and .safetensors hold the values (innersight.load reads them).
    """
    _check_outs(outs)
    _check_images(images)
    net = model.open()
    wanted: Sequence[str] | None = _split(names)
    notes = []
    if not wanted:
        wanted = net.layers.spatial[:1]
        notes.append(f"layer {', '.join(wanted)}: the first with maps (layer= changes it; 'all' for every one)")
    elif wanted == ["all"]:
        wanted = None
    with _doing(f"running {net.name}", net):
        found = net.maps(list(images), layers=wanted)
    files = []
    for path in outs:
        with _doing(f"writing {path}"):
            files += found.save(path, **({} if _stored(path) else {**drawing, "limit": limit or None}))
    if as_json:
        _print_json({**found.to_json(), "files": files})
        return
    _print_maps(found)
    _wrote(files)
    _notes([*found.provenance.notes, *notes])


def _stored(path: Path) -> bool:
    from innersight.storage import STORED

    return path.suffix.lower() in STORED


def _print_maps(found: FeatureMaps) -> None:
    from innersight.draw.color import number

    rows = []
    for name, about in found.to_json()["layers"].items():
        count, *size = about["shape"][1:]
        dead = len(about.get("dead", ()))
        extremes = f"{number(about['minimum'])} to {number(about['maximum'])}"
        rows.append((name, f"{count:,}", "x".join(map(str, size)), extremes, str(dead) if dead else ""))
    _table(("layer", "maps", "size", "values", "all zero"), rows, right=("maps", "all zero"))


def _wrote(files: Iterable[Path]) -> None:
    for path in files:
        click.echo(f"wrote {path}")


@main.command()
@click.option("--method", "methods", multiple=True, default=("gradient",), metavar="NAME",
              help="Repeatable, or a comma list (`innersight methods`); several are drawn side by side. Default: "
              "gradient.")  # fmt: skip
@click.option("--target", metavar="CLASS", help="A class, by name or number; default the one that is predicted.")
@click.option("--against", metavar="CLASS|similar", help="Explain why the target and not this class; 'similar': and "
              "not the three classes whose scores are nearest (Finer-CAM).")  # fmt: skip
@click.option("--layer", "layers", multiple=True, metavar="NAME", help="For methods that look at one: repeatable, or a "
              "comma list; several are drawn side by side. Default: the last with a grid.")  # fmt: skip
@click.option("--fuse", type=click.Choice(["mean", "max"]), help="Make one map of those of several layers.")
@click.option("--option", "given", multiple=True, metavar="KEY=VALUE", help="An option of the method: relu=false.")
@click.option("--seed", type=int, help="For methods that draw random numbers.")
@click.option("--style", type=click.Choice(["heat", "spotlight", "map"]), default="heat", show_default=True,
              help="How the map lies over the picture; spotlight suits coarse maps.")  # fmt: skip
@click.option("--scale", type=click.Choice(["each", "shared"]), default="each", show_default=True,
              help="Every image on its own scale, or all of a method on one.")  # fmt: skip
@click.option("--smooth", type=click.FloatRange(min=0), default=0, metavar="PIXELS", help="Blur, for the eye only.")
@click.option("--boxes", "boxed", is_flag=True, help="Print and draw where the object is by its map: the box around "
              "the largest part above 20% of the maximum (after --smooth).")  # fmt: skip
@click.option(
    "--limit",
    type=click.IntRange(min=0),
    metavar="N",
    default=16,
    show_default=True,
    help="Images on a page; 0 for all.",
)
@click.option("--page", type=click.IntRange(min=1), metavar="N", default=1, show_default=True)
@_out_option("heat.png")
@_on_model(images=True)
def explain(model: Model, images: tuple[str, ...], methods: tuple[str, ...], target: str | None, against: str | None,
            layers: tuple[str, ...], fuse: str | None, given: tuple[str, ...], seed: int | None,
            outs: tuple[Path, ...], limit: int, boxed: bool, as_json: bool, **drawing: Any) -> None:  # fmt: skip
    """What in each IMAGE drove the decision of MODEL.

    Draws it over the picture and prints what the network predicts, what was explained and its score. Several methods
    or layers make one picture to compare them, and a file of values each (heat_gradcam.npz).
    """
    _check_outs(outs)
    _check_images(images)
    chosen = _methods(_split(methods))
    options = _method_options(chosen, given, seed)
    net = model.open()
    with _doing(f"running {net.name}", net):
        inputs = net.read(list(images))
        predictions = _predictions(net, inputs)
        found = _side_by_side(net.explain(
            inputs, method=[m.name for m in chosen], target=_target(target, against), layer=_one_or_more(layers),
            fuse=fuse, **options,
        ))  # fmt: skip
    drawing |= {"limit": limit or None, "boxes": int(boxed)}
    boxes = {name: s.boxes(smooth=drawing["smooth"], limit=_BOXES) for name, s in found.items()} if boxed else None
    files = [file for path in outs for file in _save_saliency(found, path, drawing)]
    if as_json:
        record = {"predictions": predictions, "saliency": found, "files": files}
        _print_json(record if boxes is None else {**record, "boxes": _box_records(found, boxes)})
        return
    _print_explained(found, predictions)
    _print_verdicts(found)
    if boxes is not None:
        _print_boxes(found, boxes)
    _wrote(files)
    _notes(_explain_notes(found, outs, limit, drawing["page"]))


def _one_or_more(layers: Sequence[str]) -> str | list[str] | None:
    names = _split(layers)
    return names if len(names) > 1 else names[0] if names else None


def _side_by_side(found: Mapping[str, Any]) -> dict[str, Saliency]:
    """The maps of several layers under a name each, "gradcam at layer4"."""
    flat: dict[str, Saliency] = {}
    for method, maps in found.items():
        several = isinstance(maps, Mapping)
        flat |= {f"{method} at {layer}": s for layer, s in maps.items()} if several else {method: maps}
    return flat


def _methods(names: Sequence[str]) -> list[Method]:
    from innersight.methods import find

    with _doing("loading"):
        return [find(name) for name in names]


def _method_options(methods: Sequence[Method], given: Sequence[str], seed: int | None) -> dict[str, Any]:
    """`relu=false` as the type of the method's own default; an option that none of them has is an error."""
    options: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise errors.InputError(f"--option takes KEY=VALUE, such as relu=false, not {text!r}")
        takers = [m for m in methods if name in m.options]
        if not takers:
            methods[0].check_options({name: value}) if len(methods) == 1 else _no_option(name, methods)
        options[name] = _typed(name, value, takers[0].options[name])
    if seed is not None:
        if any("seed" in m.options for m in methods):
            options["seed"] = seed
        else:
            _notes([f"no random numbers are drawn by {', '.join(m.name for m in methods)}, so --seed changes nothing"])
    return options


def _no_option(name: str, methods: Sequence[Method]) -> NoReturn:
    known = dict.fromkeys(option for m in methods for option in m.options)
    raise errors.unknown("option", name, known, f" of {', '.join(m.name for m in methods)}")


def _typed(name: str, text: str, default: Any) -> Any:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    try:
        if isinstance(default, bool):
            return words[text.lower()]
        if isinstance(default, int | float):
            return type(default)(text)
    except (KeyError, ValueError):
        what = "true or false" if isinstance(default, bool) else "a whole number"
        what = "a number" if isinstance(default, float) else what
        raise errors.InputError(f"option {name} is {what} (default {_shown(default)}), not {text!r}") from None
    if isinstance(default, str):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _shown(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | int | float | str) else str(value).lower()


def _target(target: str | None, against: str | None) -> Any:
    if against is None:
        return target
    from innersight.targets import difference, finer

    return finer(target) if against == "similar" else difference(target, against)


def _predictions(net: Network, images: Inputs) -> Predictions | None:
    """What the network says of the images; None where its answer is no class for an image (segmentation, boxes)."""
    try:
        return net.predict(images)
    except errors.InputError:
        raise
    except (errors.Unsupported, ValueError):
        return None


def _save_saliency(found: Mapping[str, Saliency], path: Path, drawing: Mapping[str, Any]) -> list[Path]:
    from innersight import results, storage

    with _doing(f"writing {path}"):
        if len(found) == 1 or _stored(path):
            files = []
            for name, saliency in found.items():
                place = path if len(found) == 1 else path.with_stem(f"{path.stem}_{_in_a_file_name(name)}")
                files += saliency.save(place, **({} if _stored(path) else drawing))
            return files
        return [storage.write_figures(path, [results.plot_comparison(found, **drawing)])]


def _in_a_file_name(name: str) -> str:
    """
    >>> _in_a_file_name("gradcam at model/conv_1")
    'gradcam_at_model_conv_1'
    """
    return re.sub(r"[^\w.-]+", "_", name)


def _print_explained(found: Mapping[str, Saliency], predictions: Predictions | None) -> None:
    first = next(iter(found.values()))
    scores = first.verdict.get("score") or [None] * len(first)
    rows = []
    for i, picture in enumerate(first.pictures):
        label, p = predictions.top(1)[i][0] if predictions is not None else ("", None)
        answer = "" if p is None else f"{label} {p:.3f}"
        score = "" if scores[i] is None else f"{scores[i]:#.4g}"
        rows.append((picture.name, answer, first.targets[i] if first.targets else "", score))
    _table(("image", "prediction", "target", "score"), rows, right=("score",))


_BOXES = 16  # no more of them for a picture in --json: a map of single pixels has thousands


def _print_verdicts(found: Mapping[str, Saliency]) -> None:
    """What the maps' own axioms say: over the images from the least to the greatest."""
    rows = []
    for name, saliency in found.items():
        for what, values in saliency.verdict.items():
            numbers = [v for v in values if v is not None] if isinstance(values, list) else []
            if what in ("score", "blank") or not numbers:
                continue
            ends = dict.fromkeys(f"{v:.3g}" for v in (min(numbers), max(numbers)))
            rows.append((name, what.replace("_", " "), " to ".join(ends)))
    if rows:
        click.echo()
        _table(("method", "verdict", "value"), rows, right=("value",))


def _box_records(found: Mapping[str, Saliency], boxes: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    return {
        name: [
            {"name": p.name, "boxes": [b._asdict() for b in row]}
            for p, row in zip(found[name].pictures, of_method, strict=True)
        ]
        for name, of_method in boxes.items()
    }


def _print_boxes(found: Mapping[str, Saliency], boxes: Mapping[str, Sequence[Any]]) -> None:
    rows = []
    for name, of_method in boxes.items():
        for picture, row in zip(found[name].pictures, of_method, strict=True):
            edges = [str(v) for v in row[0][:4]] if row else ["none", "", "", ""]
            rows.append((picture.name, name, *edges, f"{row[0].score:.2f}" if row else ""))
    click.echo()
    header = ("image", "method", "left", "top", "right", "bottom", "holds")
    _table(header, rows, right=header[2:])


def _explain_notes(found: Mapping[str, Saliency], outs: Sequence[Path], limit: int, page: int) -> Iterator[str]:
    for saliency in found.values():
        yield from saliency.provenance.notes
    count = len(next(iter(found.values())))
    if limit and count > limit and not all(map(_stored, outs)):
        yield f"the picture shows {limit} of {count} images, page {page} (--limit and --page change it)"


@main.command()
@click.option("--layer", metavar="NAME", help="The layer whose channels are asked for.")
@click.option("--channel", "channels", multiple=True, metavar="N", help="Repeatable, or a comma list: 0,7,12-15.")
@click.option("--target", "classes", multiple=True, metavar="CLASS", help="A class instead, by name or number; "
              "repeatable.")  # fmt: skip
@click.option("--at", metavar="everywhere|middle|Y,X", default="everywhere", show_default=True,
              help="The mean of the channel, or one unit of its grid.")  # fmt: skip
@click.option("--steps", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--parameterization", type=click.Choice(["fourier", "pixels"]), default="fourier", show_default=True,
              help="Frequencies, as photographs have them, or pixels kept small by --l2.")  # fmt: skip
@click.option("--l2", type=click.FloatRange(min=0), metavar="WEIGHT", help="For pixels; default 0.001.")
@click.option("--robust/--no-robust", default=True, show_default=True,
              help="Look at the picture a little moved, turned and scaled in each step.")  # fmt: skip
@click.option("--columns", type=click.IntRange(min=1), metavar="N", help="Of the grid; default about square.")
@_out_option("maximize.png")
@_on_model()
def maximize(model: Model, layer: str | None, channels: tuple[str, ...], classes: tuple[str, ...], at: str,
             outs: tuple[Path, ...], columns: int | None, as_json: bool, **options: Any) -> None:  # fmt: skip
    """The pictures that channels or classes of MODEL answer to most.

    Found by following the gradient from noise. Printed is how far each raises its unit above random pictures, in
    standard deviations, and above noise of the picture's own spectrum.
    """
    _check_outs(outs)
    numbers = _whole_numbers(channels)
    net = model.open()
    with _stages(quiet=as_json) as progress:
        net.progress = lambda done, total, _: progress("maximizing", done, total, "")
        found = net.maximize(
            layer, numbers or None, (list(classes) if len(classes) > 1 else classes[0]) if classes else None,
            at=_at(at), **options,
        )  # fmt: skip
    files = [file for path in outs for file in found.save(path, **({} if _stored(path) else {"columns": columns}))]
    if as_json:
        _print_json({**found.to_json(), "files": files})
        return
    _print_maximized(found)
    _wrote(files)
    _notes(found.provenance.notes)


def _whole_numbers(given: Sequence[str]) -> list[int]:
    """`7`, `0,7` and `12-15`, each as often as it is named."""
    numbers: list[int] = []
    for part in (p.strip() for text in given for p in text.split(",") if p.strip()):
        ends = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not ends:
            raise errors.InputError(f"--channel takes numbers such as 7, 0,7 or 12-15, not {part!r}")
        first = int(ends[1])
        last = first if ends[2] is None else int(ends[2])
        if last < first or last - first >= 100_000:
            raise errors.InputError(f"--channel {part}: from the lower number to the higher one")
        numbers += range(first, last + 1)
    return numbers


def _at(text: str) -> Any:
    parts = text.strip("() ").split(",")
    return tuple(int(p) for p in parts) if len(parts) == 2 and all(p.strip().isdigit() for p in parts) else text


def _print_maximized(found: Maximization) -> None:
    from innersight.draw.color import number

    rows: list[tuple[str, ...]] = []
    for i, unit in enumerate(found.units):
        said = {name: values[i] for name, values in found.verdict.items()}
        if said["dead"]:
            rows.append((unit, number(said["activation"]), "silent", "", ""))
            continue
        answer = f"{said['answer']} {said['probability']:.3f}" if "answer" in said else ""
        rises = [number(said[name]) for name in ("rise", "rise_over_same_spectrum")]
        rows.append((unit, number(said["activation"]), *rises, answer))
    header = ("picture of", "activation", "rise", "over its spectrum", "seen as")
    _table(header, rows, right=header[1:4])


@main.command()
@click.argument("model_a", metavar="MODEL_A")
@click.argument("model_b", metavar="MODEL_B")
@click.argument("images", nargs=-1, metavar="[IMAGE...]")
@click.option("--layer", "names", multiple=True, metavar="NAME", help="Compare these; repeatable, or a comma list. "
              "Default: every layer that can be aligned.")  # fmt: skip
@click.option("--method", default="gradcam", show_default=True, help="Gives the reasons of both; 'none' for none.")
@click.option("--target", metavar="CLASS", help="What the reasons are for; default the class that MODEL_A predicts.")
@click.option("--at", metavar="NAME", help="The layer of MODEL_A whose maps the method reads.")
@click.option("--threshold", type=float, default=20.0, show_default=True, metavar="DB",
              help="Signal to noise below which a layer counts as parted.")  # fmt: skip
@click.option("--channels", type=click.Choice(["match", "index"]), default="match", show_default=True,
              help="Find channels that stand in another order in MODEL_B, or compare them as they stand.")  # fmt: skip
@click.option("--out", "outs", multiple=True, type=click.Path(path_type=Path), default=("compare.html",),
              metavar="FILE", help="One page (.html), a plot (.png .pdf .svg), the layers (.csv), everything (.json); "
              "repeatable. Default: compare.html.")  # fmt: skip
@click.option("--weights", metavar="FILE|none", help="For models by name; 'none' leaves them untrained.")
@click.option("--weights-b", metavar="FILE|none", help="For MODEL_B, if others.")
@click.option("--arch", metavar="PKG.MOD:FACTORY", help="What network files of weights are for.")
@click.option("--arch-b", metavar="PKG.MOD:FACTORY", help="For MODEL_B, if another.")
@click.option("--labels", metavar="FILE|A,B,...", help="Class names, in the order of the outputs.")
@click.option("--input-shape", type=Shape(), help="Of one input: 3,224,224 or 3x224x224.")
@click.option("--input-shape-b", type=Shape(), help="For MODEL_B, if another.")
@click.option("--preprocess", multiple=True, metavar="KEY=VALUE...|FILE.json",
              help="How pictures are prepared, over what the models say: 'mean=0.5,0.5,0.5 std=0.2'.")  # fmt: skip
@click.option("--preprocess-b", multiple=True, metavar="KEY=VALUE...|FILE.json", help="For MODEL_B, if otherwise.")
@click.option("--device", metavar="cpu|cuda", help="Where to run.")
@click.option("--trust", is_flag=True, help="Allow files that run code when they are loaded.")
@_json_option
def compare(model_a: str, model_b: str, images: tuple[str, ...], names: tuple[str, ...], method: str,
            target: str | None, at: str | None, threshold: float, channels: str, outs: tuple[Path, ...], as_json: bool,
            **opening: Any) -> None:  # fmt: skip
    """Where MODEL_B parts from MODEL_A, layer by layer.

    Float against int8, one epoch against another, PyTorch against ONNX, a device's tensors (.npz of name -> array)
    against the host. Each model has the pictures prepared its own way. Printed are signal to noise and cosine of each
    layer, where the two part, and whether answers and reasons agree.
    """
    _check_compared(outs)
    _check_images(images)
    a, b = _opened_for(model_a, "", opening), _opened_for(model_b, "_b", opening)
    with _stages(quiet=as_json) as progress:
        from innersight.comparison import compare as compared

        found = compared(
            a, b, list(images) or None, layers=_split(names) or None, method=None if method == "none" else method,
            target=target, at=at, threshold=threshold, channels=channels,
            progress=lambda stage, done, total: progress(stage, done, total, ""),
        )  # fmt: skip
    files = []
    for path in outs:
        with _doing(f"writing {path}"):
            files += found.save(path)
    if as_json:
        _print_json({**found.to_json(), "files": files})
        return
    header = ("layer of a", "layer of b", "shape", "SQNR dB", "cosine", "range of a", "range of b", "saturated", "dead",
              "worst channels", "aligned by")  # fmt: skip
    spare = ("aligned by", "worst channels", "range of b", "range of a", "dead", "shape")
    _table(header, found.layers.rows(), right=("SQNR dB", "cosine"), spare=spare)
    click.echo()
    for line in found.words():
        click.echo(_wrapped(_as_options(line).replace("channels='index'", "--channels index")))
    _wrote(files)
    _notes(found.provenance.notes)


def _check_compared(outs: Sequence[Path]) -> None:
    from innersight import storage

    kinds = (".html", ".json", ".csv", *storage.DRAWN)
    for path in outs:
        if path.suffix.lower() not in kinds:
            raise errors.InputError(f"{path.name!r}: unknown suffix {path.suffix!r}; use {', '.join(kinds)}")
        storage.check_place(path)
        if not os.access(path.parent, os.W_OK):
            raise errors.InputError(f"cannot write {str(path)!r}: the folder {str(path.parent)!r} is read-only")


def _opened_for(source: str, which: str, opening: Mapping[str, Any]) -> Any:
    """The network, or the path of a file of tensors; `which` is "_b" for the options of the second model."""
    suffix = Path(source).suffix.lower()
    if suffix == ".npz":
        if not Path(source).is_file():
            raise errors.InputError(f"there is no file {source}")
        return source
    given = {}
    for name in ("weights", "arch", "input_shape", "preprocess"):
        given[name] = opening[name + which] or opening[name]
    if suffix in (".keras", ".h5", ".hdf5", ".onnx", ".tflite", ".pt2"):  # these bring network and weights along
        given["weights"] = opening["weights" + which] if which else None
        given["arch"] = opening["arch" + which] if which else None
    options = {"device": opening["device"], "trust": opening["trust"], **given}
    return Model(source, options.pop("preprocess"), opening["labels"], options).open()


_with_option = click.option(
    "--with", "other", metavar="MODEL_B", help="A second network on the same pictures, to compare."
)
_scan_option = click.option(
    "--scan", "scans", multiple=True, type=click.Path(path_type=Path), metavar="DIR",
    help="What innersight scan wrote of this network, or of the second: channels, images and findings of a data set.",
)  # fmt: skip
_explained_option = click.option(
    "--target", metavar="CLASS", help="What is explained; default the class that each network predicts."
)


@main.command()
@click.option("--method", "methods", multiple=True, metavar="NAME",
              help="Saliency maps to put in; repeatable, or a comma list. Default: "
              "gradcam,smoothgrad,integrated_gradients.")  # fmt: skip
@_explained_option
@_with_option
@_scan_option
@click.option("--title", metavar="TEXT", help="Of the page; default the network's name.")
@click.option("--max-mb", type=click.FloatRange(min=0.1), default=25.0, show_default=True, metavar="MB",
              help="The file is no larger; what is left out for it is said on the page.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), default="report.html", show_default=True, metavar="FILE")
@_on_model(images=True)
def report(model: Model, images: tuple[str, ...], methods: tuple[str, ...], target: str | None, other: str | None,
           scans: tuple[Path, ...], title: str | None, max_mb: float, out: Path, as_json: bool) -> None:  # fmt: skip
    """All about MODEL on these IMAGEs, as one page.

    Every layer's maps with their receptive fields, saliency maps with their verdicts, predictions: the page of
    `innersight view` with its data in it, one HTML file that needs no network, no server and no innersight.
    """
    from innersight import storage
    from innersight.viewer import report as page

    if out.suffix.lower() != ".html":
        raise errors.InputError(f"{out.name!r}: a report is a .html file")
    storage.check_place(out)
    _check_images(images)
    chosen = [m.name for m in _methods(_split(methods))] or list(page.METHODS)
    nets = [model.open(), *([] if other is None else [_second(model, other)])]
    with _stages(quiet=as_json) as progress:
        file = page.report(
            nets, list(images), out, methods=chosen, target=target, title=title, max_mb=max_mb, scan=scans or None,
            progress=lambda done, total, what: progress(what, done, total, ""),
        )  # fmt: skip
    size = file.stat().st_size
    if as_json:
        _print_json({"file": file, "bytes": size})
        return
    click.echo(f"wrote {file} ({size / 1e6:.1f} MB)")
    _notes(nets[0].notes)


@main.command()
@_explained_option
@_with_option
@_scan_option
@click.option("--data", metavar="DATA", help="The data set that was scanned, to look at its images.")
@click.option("--root", type=click.Path(path_type=Path), metavar="DIR", help="Where the files of mnist, cifar10 are.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, metavar="N", help="Default: any that is free.")
@click.option("--browser/--no-browser", default=True, help="Open the page in the browser.")
@_on_model(images=True, required=False, as_json=False)
def view(model: Model, images: tuple[str, ...], target: str | None, other: str | None, scans: tuple[Path, ...],
         data: str | None, root: Path | None, port: int, browser: bool) -> None:  # fmt: skip
    """Look into MODEL in the browser.

    Served on this machine alone, computed on demand. The address carries a token: other users and other web pages get
    nothing. Ctrl-C ends it.
    """
    from innersight.viewer import server

    if images:
        _check_images(images)
    nets = [model.open(), *([] if other is None else [_second(model, other)])]
    _notes(nets[0].notes)
    server.view(
        nets, list(images) or None, target=target, port=port, browser=browser, scan=scans or None, data=data, root=root,
        told=click.echo,
    )  # fmt: skip


def _second(model: Model, source: str) -> Network:
    """Another network, opened with what was said of the first that holds for both."""
    return replace(model, source=source).open()


@main.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR",
              help="The folder that is written.")  # fmt: skip
@click.option("--layer", "--layers", "names", multiple=True, metavar="NAME|KIND",
              help="Watch these, or all of a kind (Conv2d); repeatable, or a comma list. Default: every layer with "
              "channels.")  # fmt: skip
@click.option("--top", type=click.IntRange(min=1), default=9, show_default=True, metavar="K",
              help="Images that are kept for each channel.")  # fmt: skip
@click.option("--crops", type=click.IntRange(min=0), default=2048, show_default=True, metavar="N",
              help="Channels whose top images are cut out.")  # fmt: skip
@click.option("--sensitivity", metavar="LAYER", help="Remove the channels of this layer one by one, for every image.")
@click.option("--engine", default="local", show_default=True, metavar="ENGINES", help="Who does the work.")
@click.option("--resume", is_flag=True, help="Go on with what is in DIR.")
@click.option("--shard", metavar="I/N", help="Count the I-th of N parts alone, from 1; merge them later.")
@click.option("--merge", "shards", multiple=True, type=click.Path(path_type=Path), metavar="SHARD",
              help="Folder of a shard to take over; repeatable. What no shard counted is counted.")  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N images.")
@click.option("--root", type=click.Path(path_type=Path), metavar="DIR", help="Where the files of mnist, cifar10 are.")
@_on_model()
@click.argument("data")
def scan(model: Model, data: str, names: tuple[str, ...], shard: str | None, shards: tuple[Path, ...], out: Path,
         as_json: bool, **options: Any) -> None:  # fmt: skip
    """What a whole data set does in MODEL, kept in a folder.

    DATA is a folder of pictures (the class folder is the label), a list .csv or .parquet with the columns path and
    label, or mnist, cifar10, digits (the test part; mnist:train the other). For each channel of each layer: the images
    and places that excite it most, statistics, selectivity for classes; for each image its prediction; and what is
    worth looking at, in words. Killed at any moment, --resume goes on and nothing is counted twice.
    """
    import innersight

    part = _shard(shard)
    net = model.open()
    with _stages(quiet=as_json) as progress:
        net.progress = lambda done, total, of: progress(of, done, total or done + 1, "")
        found = innersight.scan(
            net, data, out, layers=_split(names) or None, shard=part, merge=shards, **options
        )  # fmt: skip
    if as_json:
        _print_json(found.to_json())
        return
    for line in found.words():
        click.echo(_wrapped(line))
    _notes(found.notes)


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.split("/")
    if len(parts) != 2 or not all(p.strip().isdecimal() for p in parts):
        raise errors.InputError(f"--shard takes I/N, such as 1/4, not {text!r}")
    return int(parts[0]), int(parts[1])


@main.command()
@click.argument("name", required=False)
@_json_option
def methods(name: str | None, as_json: bool) -> None:
    """The saliency methods, what they need and cost.

    With NAME: what that method does, and its options.
    """
    from innersight.methods import all_methods

    if name is not None:
        (method,) = _methods([name])
        _print_json(_method_record(method)) if as_json else _print_method(method)
        return
    with _doing("loading"):
        known = all_methods().values()
    if as_json:
        _print_json([_method_record(m) for m in known])
        return
    rows = [(m.name, m.family, ", ".join(m.needs), m.passes, m.paper) for m in known]
    _table(("method", "family", "needs", "passes", "paper"), rows, spare=("family",))


def _method_record(method: Method) -> dict[str, Any]:
    return {
        "name": method.name,
        "family": method.family,
        "summary": method.summary,
        "needs": method.needs,
        "passes": method.passes,
        "signed": method.signed,
        "options": method.options,
        "paper": method.paper,
    }


def _print_method(method: Method) -> None:
    click.echo(f"{method.name} ({method.family})\n\n{inspect.getdoc(method.function) or ''}\n")
    for name, default in method.options.items():
        click.echo(f"--option {name}={_shown(default)}")
    click.echo(f"{'' if not method.options else chr(10)}needs   {', '.join(method.needs) or 'the answer alone'}")
    click.echo(f"passes  {method.passes}\npaper   {method.paper}")
