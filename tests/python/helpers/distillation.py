"""A staged recipe for a very small model, and a text that such a model can learn."""

import random

from tqcompressor import KroneckerSpec, TQConfig
from tqcompressor.distillation.stages import Stage, StagedRecipe

RECIPE = StagedRecipe(
    (
        Stage("half", TQConfig({"wte": KroneckerSpec((1, 2), 1, "columns")}, effort="fast")),
        Stage("feed-forward", TQConfig({"h.1.mlp.c_fc": KroneckerSpec((2, 4), 4)}, effort="fast"), share=2),
        Stage("quarter", TQConfig({"wte": KroneckerSpec((1, 4), 1, "columns")}, effort="fast")),
    )
)


def letters(count, seed=0):
    """Text that a small model can learn: every letter has three possible successors."""
    generator = random.Random(seed)
    text, letter = [], 0
    for _ in range(count):
        letter = (3 * letter + generator.choice((1, 2, 5))) % 26
        text.append(chr(97 + letter))
    return "".join(text)
