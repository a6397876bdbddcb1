"""The exceptions of innersight.

    InnersightError                 anything that innersight itself refuses; its text is one sentence for the user
    ├── InputError (ValueError)     a picture, a file or an option that cannot be used
    │   └── UntrustedFile           a file that would run code when loaded: needs trust=True
    ├── UnknownName (LookupError)   no such layer, class, method or model; the nearest names are suggested
    ├── Unsupported (TypeError)     this model cannot do what was asked, and why
    └── MissingPackage (ImportError)  an optional package, with the line that installs it

Each also is the built-in type named behind it, so callers need not know ours.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class InnersightError(Exception):
    """Base of what innersight refuses; the command line prints its text and exits with 2."""

    def __str__(self) -> str:  # LookupError's own str() would quote the sentence
        return str(self.args[0]) if self.args else ""


class InputError(InnersightError, ValueError):
    """A picture, a file or an option that cannot be used."""


class UntrustedFile(InputError):
    """A file that runs code when it is loaded, opened without `trust=True`."""


class UnknownName(InnersightError, LookupError):
    """A name that does not exist here; `suggestions` holds the nearest ones."""

    def __init__(self, message: str, suggestions: Iterable[str] = ()):
        super().__init__(message)
        self.suggestions = list(suggestions)


class Unsupported(InnersightError, TypeError):
    """Something this model cannot do."""


class MissingPackage(InnersightError, ImportError):
    """An optional package that is not installed."""


def unknown(what: str, name: object, names: Iterable[str], where: str = "") -> UnknownName:
    """The error for a name that is not among `names`: near misses first, else the first few there are.

    >>> str(unknown("layer", "con1", ["conv1", "relu"], " in this network"))
    "no layer 'con1' in this network; did you mean conv1?"
    """
    names = list(names)
    lower = {n.lower(): n for n in reversed(names)}
    wanted = str(name).lower()
    near = [lower[n] for n in difflib.get_close_matches(wanted, lower, n=3, cutoff=0.6)]
    near += [n for n in names if wanted in n.lower() and n not in near][: 3 - len(near)]
    if near:
        hint = f"did you mean {', '.join(near)}?"
    elif len(names) == 1:
        hint = f"there is only {names[0]}"
    elif names:
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        hint = f"there are {', '.join(names[:8])}{more}"
    else:
        hint = "there are none"
    return UnknownName(f"no {what} {str(name)!r}{where}; {hint}", near)


def need(package: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional package, or say which line installs it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        root = package.partition(".")[0]
        if (error.name or "").partition(".")[0] not in ("", root):
            raise  # the package is there but broken: its own error says more
        raise MissingPackage(f'{purpose} needs {root}: pip install "innersight[{extra}]"', name=root) from None
