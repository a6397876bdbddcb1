"""innersight: see inside a vision network.

    import innersight
    net = innersight.open("torchvision:resnet50")
    net.maps("dog.jpg", layers=["conv1"]).save("maps.png")
    net.explain("dog.jpg", method="gradcam").save("why.png")

Names are imported on first use: `import innersight` alone loads neither torch nor a plotting library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "open": "innersight.network",
    "Network": "innersight.network",
    "Preprocess": "innersight.preprocess",
    "load": "innersight.results",
    "compare": "innersight.comparison",
    "dump": "innersight.comparison",
    "Comparison": "innersight.comparison",
    "report": "innersight.viewer.report",
    "view": "innersight.viewer.server",
    "scan": "innersight.scanning",
    "Scan": "innersight.scanning",
    "Training": "innersight.scanning.training",
    "InnersightError": "innersight.errors",
}
_MODULES = ("errors", "images", "targets", "results", "testing", "methods")
__all__ = ["__version__", *_HOME, *_MODULES]

if TYPE_CHECKING:
    from innersight import errors as errors
    from innersight import images as images
    from innersight import methods as methods
    from innersight import results as results
    from innersight import targets as targets
    from innersight import testing as testing
    from innersight.comparison import Comparison as Comparison
    from innersight.comparison import compare as compare
    from innersight.comparison import dump as dump
    from innersight.errors import InnersightError as InnersightError
    from innersight.network import Network as Network
    from innersight.network import open as open
    from innersight.preprocess import Preprocess as Preprocess
    from innersight.results import load as load
    from innersight.scanning import Scan as Scan
    from innersight.scanning import scan as scan
    from innersight.scanning.training import Training as Training
    from innersight.viewer.report import report as report
    from innersight.viewer.server import view as view


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"innersight.{name}")
    raise AttributeError(f"module 'innersight' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
