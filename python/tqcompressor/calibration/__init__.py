"""Second moments of a model's activations and gradients on a text, and their file.

May import `errors`, `_core`, `utils`, `config`, `data` and `models`. The file is read and written without torch.
"""

from .calibration import Calibration

__all__ = ["Calibration"]
