"""The model card and the report of a live model that is saved: what `compress_checkpoint` writes, too."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import _core
from ..errors import CheckpointError, StorageError
from ..models.matrices import parameters_of
from .card import report_in, source_of, write_card
from .report import CompressionReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The attribute of the quantizer that a compressed model has.
_REPORT = "compression_report"


def keep_report(model: PreTrainedModel, report: CompressionReport) -> None:
    """Keeps the report of a live model with it, for the card that is written when it is saved."""
    setattr(model.hf_quantizer, _REPORT, report)


def write_live_card(model: PreTrainedModel, folder: Path) -> None:
    """Writes report, card and figure beside the weights that `model` was saved to in `folder`.

    A model that was loaded has the report of its own folder. Nothing is written where no report is of the model as it
    is: it was compressed by other programs or in several steps, or has other shapes since. The model is saved whether
    or not the system lets them be written; a warning says where it does not.
    """
    config: Any = model.config
    source = source_of(getattr(config, "_name_or_path", None))
    report: CompressionReport | None = getattr(model.hf_quantizer, _REPORT, None)
    if report is not None:
        name = None if source is None else _core.source_name(source)
        report = replace(report, source=name, bytes_before=None if source is None else _size(Path(source)))
    elif source is not None:
        try:
            report = report_in(Path(source))
        except CheckpointError:
            return
    if report is None or not _is_of(report, model):
        return
    try:
        write_card(folder, replace(report, bytes_after=_size(folder), carried=None), source)
    except StorageError as error:
        warnings.warn(f"the model is saved, but not its model card: {error}", stacklevel=4)


def _size(folder: Path) -> int | None:
    """Bytes of the weight files in a folder; None where there are none."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) or None


def _is_of(report: CompressionReport, model: PreTrainedModel) -> bool:
    """Whether a report is of the model as it is now."""
    config: Any = model.config
    specs = {matrix.name: matrix.spec for matrix in report.matrices}
    return report.parameters_after == parameters_of(model) and specs == config.quantization_config.specs
