"""What other runtimes make of a TFLite file, tensor by tensor, and what ours makes of it in the file's own axes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from innersight.formats import tflite, tflite_file
from innersight.formats.tflite_values import BACK

Read = Callable[[int], np.ndarray]


def micro(data: bytes, picture: np.ndarray) -> Read:
    """TFLite-Micro, as microcontrollers run it: number of a tensor -> its value."""
    runtime = pytest.importorskip("tflite_micro.python.tflite_micro.runtime", exc_type=ImportError)
    interpreter = runtime.Interpreter.from_bytes(
        data, intrepreter_config=runtime.InterpreterConfig.kPreserveAllTensors, arena_size=8 << 20
    )
    interpreter.set_input(picture, 0)
    interpreter.invoke()

    def read(index: int) -> np.ndarray:
        found = interpreter.GetTensor(index, 0)
        return np.asarray(found["tensor_data"] if isinstance(found, dict) else found)

    return read


def litert(data: bytes, picture: np.ndarray) -> Read:
    """LiteRT's reference kernels: number of a tensor -> its value."""
    runtime = pytest.importorskip("ai_edge_litert.interpreter", exc_type=ImportError)
    interpreter = runtime.Interpreter(
        model_content=data, experimental_op_resolver_type=runtime.OpResolverType.BUILTIN_REF,
        experimental_preserve_all_tensors=True,
    )  # fmt: skip
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], picture)
    interpreter.invoke()
    return interpreter.get_tensor


@dataclass
class Computed:
    """values: of each tensor that a run makes, in the file's axes; of quantised ones the stored integers."""

    file: tflite_file.TFLiteFile
    values: dict[int, np.ndarray]
    dtypes: dict[int, str]


def computed(data: bytes, picture: np.ndarray, arithmetic: str) -> Computed:
    """One run of ours. picture: as the file stores it, (N, H, W, C) or as it likes."""
    file = tflite_file.read(data, "the file")
    plan = tflite._Plan(file, "the file", arithmetic)
    graph = plan.graph()
    x = torch.from_numpy(np.array(picture)).float()
    if plan.input_scale is not None:
        x = (x - plan.input_scale.zero) * plan.input_scale.step
    if plan.input_turned:
        x = x.permute(0, 3, 1, 2)
    with torch.no_grad(), tflite._exactly(x.device):
        made = graph.run(x, keep=True)
    values, dtypes = {}, {}
    for index, value in plan.values.items():
        if value.constant or value.key == "input" or not isinstance(made.get(value.key), torch.Tensor):
            continue
        y = made[value.key]
        y = (y.permute(BACK) if value.turned else y).numpy()
        if value.scale is not None:
            y = np.round(y / value.scale.step) + value.scale.zero
        values[index], dtypes[index] = y, value.scale.dtype if value.scale is not None else "float32"
    return Computed(file, values, dtypes)
