"""Reading a Keras file in this process, for files that a test wrote itself."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np

from innersight.errors import InputError
from innersight.formats import keras_file


def read_here(path: Path) -> keras_file.Contents:
    """As `keras_file.read`, without the child process."""
    out = io.BytesIO()
    try:
        found = keras_file.extract(path, out)
    except keras_file.Refused as refused:
        raise InputError(f"{path} {refused}") from None
    flat = np.frombuffer(out.getvalue(), np.float32).copy()
    weights, start = [], 0
    for name, owner, shape in found["weights"]:
        end = start + math.prod(shape)
        weights.append(keras_file.Weight(name, flat[start:end].reshape(shape), owner))
        start = end
    config = keras_file.configuration(found["config"], path)
    return keras_file.Contents(config, found["version"], found["by_number"], weights)
