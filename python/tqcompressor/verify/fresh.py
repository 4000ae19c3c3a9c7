"""What a model is and computes, as few values; `main` prints them for a checkpoint, in a fresh process."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Values of an output that are compared.
_VALUES = 64


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """The class of a model, its size, and some values of its first output for a fixed input."""
    import torch

    from ..evaluate.comparison import model_size
    from ..models.trial import example_inputs

    parameters, size = model_size(model)
    found: dict[str, Any] = {"class": type(model).__name__, "parameters": parameters, "bytes": size, "output": []}
    for inputs in example_inputs(model)[:1]:
        moved = {
            name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
            for name, value in inputs.items()
        }
        with torch.inference_mode():
            output: Any = model(**moved)
        values = output[0].float().reshape(-1)
        found["output"] = values[:: max(1, len(values) // _VALUES)].tolist()
    return found


def main() -> None:
    """Prints the fingerprint of the checkpoint that the arguments name, as JSON on the last line: DIR DTYPE DEVICE."""
    from ..utils.torch_utils import quiet_transformers
    from .subject import load

    source, dtype, device = sys.argv[1:]
    with quiet_transformers():
        print(json.dumps(fingerprint(load(source, dtype, device).model)))
