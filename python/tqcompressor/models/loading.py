"""Loads a model of transformers as the class that saved it."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedModel


def model_class(source: Any) -> Any:
    """The class of transformers that saved a checkpoint, `AutoModel` where the config names none."""
    config = transformers.AutoConfig.from_pretrained(source)
    names = [name for name in config.architectures or () if hasattr(transformers, name)]
    return getattr(transformers, names[0]) if names else transformers.AutoModel


def load_pretrained(source: Any, **options: Any) -> PreTrainedModel:
    """The model of a checkpoint or hub id, of its `model_class`; `options` are those of `from_pretrained`."""
    model: PreTrainedModel = model_class(source).from_pretrained(source, **options)
    return model
