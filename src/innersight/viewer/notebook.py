"""The page in a notebook, in a frame of the cell: live where a widget can ask the kernel, else a report.

No port is needed, which is what fails in notebooks. Behind a live page stands a picture of what it began with: that is
what a notebook shows that is read without its kernel.
"""

from __future__ import annotations

import base64
import html
import importlib.util
import io
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from innersight import errors, storage
from innersight.viewer.bridge import widget
from innersight.viewer.report import METHODS, framed, written
from innersight.viewer.session import Session

MEGABYTES = 5  # a notebook keeps what its cells show
STILL_SIDE = 1200  # pixels
STILL_BYTES = 1 << 20
_SHOWN = 4  # pictures on it, each with its strongest maps of three layers


def in_notebook() -> bool:
    """Whether this runs in a notebook's kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config


class Page:
    """A page that shows itself: the last line of a cell, or `display(page)`.

    live: whether the kernel is asked for what it shows, which needs anywidget; False: a report, kept in the notebook
    """

    def __init__(
        self, session: Session, methods: Sequence[str] = METHODS, max_mb: float = MEGABYTES, height: int = 720,
        live: bool | None = None,
    ):  # fmt: skip
        self.session = session
        self.methods = tuple(methods)
        self.max_mb = max_mb
        self.height = height
        self.live = in_notebook() and importlib.util.find_spec("anywidget") is not None if live is None else live
        if not self.live:
            self._pictured()

    def _pictured(self) -> None:
        if not self.session.pictures:
            raise errors.InputError("a page in a notebook shows pictures: give images=")

    @cached_property
    def content(self) -> bytes:
        """The page, with its data in it."""
        self._pictured()
        return written(self.session, self.methods, int(self.max_mb * 1e6), lambda *_: None)

    def save(self, path: str | Path) -> Path:
        """Write it as a file that opens from disk."""
        return storage.write_whole(Path(path), lambda file: file.write(self.content))

    @cached_property
    def still(self) -> bytes | None:
        """A PNG of the first pictures, what is said of them, and what some layers make of them; None without any."""
        return _still(self.session) if self.session.pictures else None

    @cached_property
    def widget(self) -> Any:
        """The live page, as a widget."""
        return widget(self.session, framed(self.session.title), self._still()[-200:], self.height)

    def _still(self) -> str:
        return base64.b64encode(self.still or b"").decode()

    def close(self) -> None:
        """Cancel what a live page computes, and take it away."""
        if self.live:
            self.widget.bridge.close()
            self.widget.close()

    def __repr__(self) -> str:
        said = f"<Page {self.session.title}: {len(self.session.pictures)} pictures; .save('page.html') writes it"
        return f"{said}>" if self.live else f'{said}; live with pip install "innersight[notebook]">'

    def _repr_html_(self) -> str:
        # Scripts run, but in an origin of their own: nothing of the notebook can be reached from the frame.
        inside = html.escape(self.content.decode(), quote=True)
        return (f'<iframe sandbox="allow-scripts" srcdoc="{inside}" title="{html.escape(self.session.title)}" '
                f'style="width: 100%; height: {self.height}px; border: 1px solid #ccc"></iframe>')  # fmt: skip

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        """The report, and the picture for where no frame is shown: untrusted notebooks, GitHub."""
        return {"text/html": self._repr_html_(), "image/png": self._still(), "text/plain": repr(self)}

    def _ipython_display_(self) -> None:
        from IPython.display import display

        if not self.live:
            display(self._repr_mimebundle_(), raw=True)
            return
        # Two outputs: without a kernel nothing is shown in a widget's place, whatever else may be given there.
        if self.still:
            display({"image/png": self._still(), "text/plain": repr(self)}, raw=True)
        display(self.widget)


def _still(session: Session) -> bytes:
    from PIL import Image

    from innersight.draw import color, plots

    table = [layer for layer in session._table(0).values() if layer.grid and min(layer.grid[1:]) > 1]
    layers = [table[i] for i in sorted({len(table) // 8, len(table) // 2, len(table) - 1})] if table else []
    cells = []
    for i, entry in enumerate(session.manifest()["inputs"][:_SHOWN]):
        said = entry["predictions"][0]["top"][:3]
        below = "\n".join(
            f"{label}  {color.number(score) if chance is None else f'{chance:.1%}'}" for _, label, chance, score in said
        )
        picture = np.asarray(session.pictures[i].display().convert("RGB"))
        cells.append(plots.Cell(str(entry["name"]), picture, below))
        for name, maps in session.values(0, i, [layer.name for layer in layers]).items():
            channel = int(np.square(np.nan_to_num(maps)).mean((1, 2)).argmax())
            one = maps[channel]
            signed = bool(color.is_signed(maps))
            painted = color.paint(one, color.scale(one, signed=signed))
            cells.append(plots.Cell(name, painted, f"channel {channel} of {len(maps)}"))
    figure = plots.gallery(cells, title=session.title, columns=1 + len(layers))
    image = Image.open(io.BytesIO(plots.png(figure))).convert("RGB")
    side = STILL_SIDE
    while True:
        image.thumbnail((side, side))
        file = io.BytesIO()
        image.quantize(256).save(file, "PNG", optimize=True)
        if file.tell() <= STILL_BYTES:
            return file.getvalue()
        side = side * 4 // 5
