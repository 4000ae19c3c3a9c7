"""Loads a model of transformers as the class that saved it."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedModel


def load_pretrained(source: Any, **options: Any) -> PreTrainedModel:
    """The model of a checkpoint or hub id, of the class that its config names, or else the base model without a head.

    `options` are those of `from_pretrained`.
    """
    config = transformers.AutoConfig.from_pretrained(source)
    names = [name for name in config.architectures or () if hasattr(transformers, name)]
    kind: Any = getattr(transformers, names[0]) if names else transformers.AutoModel
    model: PreTrainedModel = kind.from_pretrained(source, **options)
    return model
