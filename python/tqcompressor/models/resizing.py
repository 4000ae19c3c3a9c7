"""Resizing the token embeddings of a model that may be compressed."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError
from ..modules.build import CompressedModule


def resize_token_embeddings(
    model: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **options: Any
) -> Any:
    """The method of transformers, for a model whose embeddings or output layer may be compressed.

    Rows of a factored matrix are not stored one by one, so that none can be added or left out. Raises `ConfigError`,
    before anything is changed, where a compressed matrix would get another number of rows.
    """
    matrices = (model.get_input_embeddings(), model.get_output_embeddings())
    compressed = [module for module in matrices if isinstance(module, CompressedModule)]
    for module in compressed:
        rows: Any = module.num_embeddings if hasattr(module, "num_embeddings") else module.out_features
        wanted = rows if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
        if wanted != rows:
            name = next(name for name, each in model.named_modules() if each is module)
            raise ConfigError(
                f"resize_token_embeddings: {name} is compressed and has {rows} rows, {wanted} are asked for: call "
                "model.dequantize() first, resize, and compress again"
            )
    if compressed:
        # As many rows as before.
        return matrices[0]
    return type(model).resize_token_embeddings(model, new_num_tokens, pad_to_multiple_of, *args, **options)
