"""The proof of a result before it is shipped: checks of a checkpoint on disk, from its files to its perplexity.

`checks` has each of them once. Two things run them: `verify_checkpoint`, which is `tqcompressor verify`, and pytest, by
`pytest --pyargs tqcompressor.verify --tq-model DIR`: `plugin` adds its options and fixtures, `suite` its tests.

May import `errors`, `_core`, `utils`, `config`, `data`, `evaluate`, `models`, `compression`, `native` and
`distillation`. torch and transformers are imported inside the functions that use them, since pytest imports the plugin
in every run.
"""

from .results import CheckResult, VerificationReport
from .runner import verify_checkpoint

__all__ = ["CheckResult", "VerificationReport", "verify_checkpoint"]
