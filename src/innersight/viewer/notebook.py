"""The page in a notebook: a report in a frame of the cell, which needs no port and is kept with the notebook."""

from __future__ import annotations

import html
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from innersight import errors, storage
from innersight.viewer.report import METHODS, written
from innersight.viewer.session import Session

MEGABYTES = 5  # a notebook keeps what its cells show


def in_notebook() -> bool:
    """Whether this runs in a notebook's kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config


class Page:
    """A report that shows itself: the last line of a cell, or `display(page)`."""

    def __init__(
        self, session: Session, methods: Sequence[str] = METHODS, max_mb: float = MEGABYTES, height: int = 720
    ):
        if not session.pictures:
            raise errors.InputError("a page in a notebook shows pictures: give images=")
        self.session = session
        self.methods = tuple(methods)
        self.max_mb = max_mb
        self.height = height

    @cached_property
    def content(self) -> bytes:
        """The page, with its data in it."""
        return written(self.session, self.methods, int(self.max_mb * 1e6), lambda *_: None)

    def save(self, path: str | Path) -> Path:
        """Write it as a file that opens from disk."""
        return storage.write_whole(Path(path), lambda file: file.write(self.content))

    def __repr__(self) -> str:
        return f"<Page {self.session.title}: {len(self.session.pictures)} pictures; .save('page.html') writes it>"

    def _repr_html_(self) -> str:
        # Scripts run, but in an origin of their own: nothing of the notebook can be reached from the frame.
        inside = html.escape(self.content.decode(), quote=True)
        return (f'<iframe sandbox="allow-scripts" srcdoc="{inside}" title="{html.escape(self.session.title)}" '
                f'style="width: 100%; height: {self.height}px; border: 1px solid #ccc"></iframe>')  # fmt: skip
