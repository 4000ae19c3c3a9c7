"""The quality of a model: perplexity of a text, accuracy on last words, cosine of embeddings, a table of student and
teacher.

Perplexities are comparable only under one convention. Here the text is preceded by the tokenizer's begin-of-text token,
every token of the text is scored exactly once, and no window is longer than the context length. With
`stride == context` this is lm-eval's `loglikelihood_rolling`.

May import `errors`, `utils` and `data`. torch is imported inside the functions that use it.
"""

from ..data.text import read_passages, read_text
from .comparison import compare, model_size, score
from .embeddings import embedding_cosine
from .results import Comparison, EmbeddingResult, LastWordResult, ModelScore, PerplexityResult, WindowResult
from .scoring import last_word_accuracy, mean_window_perplexity, perplexity

__all__ = [
    "Comparison",
    "EmbeddingResult",
    "LastWordResult",
    "ModelScore",
    "PerplexityResult",
    "WindowResult",
    "compare",
    "embedding_cosine",
    "last_word_accuracy",
    "mean_window_perplexity",
    "model_size",
    "perplexity",
    "read_passages",
    "read_text",
    "score",
]
