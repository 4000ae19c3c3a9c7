"""A table of model sizes, perplexities and last-word accuracies: the student beside its teacher."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING

from ..utils.progress import ProgressOption
from .results import Comparison, ModelScore
from .scoring import last_word_accuracy, perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | PathLike[str],
    *,
    name: str = "model",
    passages: Sequence[str] | PathLike[str] | None = None,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    progress: ProgressOption = None,
) -> ModelScore:
    """One row of a `Comparison`: the model's size, its `perplexity` on `text` and, when there are `passages`, its
    `last_word_accuracy` on them. Arguments and errors are those of these functions."""
    parameters, size = model_size(model)
    result = perplexity(
        model, tokenizer, text, context=context, stride=stride, batch_size=batch_size, progress=progress
    )
    words = None
    if passages is not None:
        words = last_word_accuracy(model, tokenizer, passages, batch_size=batch_size, progress=progress)
    return ModelScore(name, parameters, size, result, words)


def compare(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | PathLike[str],
    *,
    names: tuple[str, str] = ("student", "teacher"),
    passages: Sequence[str] | PathLike[str] | None = None,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    progress: ProgressOption = None,
) -> Comparison:
    """Both models scored on the same text, in one table: the student's row first.

    Args:
        student: The compressed model. It shares the teacher's tokenizer.
        teacher: The model that it was compressed from.
        tokenizer: The tokenizer of both.
        text: What the `perplexity` is of: a str is the text itself, a `pathlib.Path` is a UTF-8 file.
        names: The names of the rows, the student's first.
        passages: What `last_word_accuracy` is measured on; None leaves it out.
        context: As in `perplexity`.
        stride: As in `perplexity`.
        batch_size: As in `perplexity`.
        progress: As in `perplexity`.

    Example:
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> teacher = AutoModelForCausalLM.from_pretrained("tests/data/tiny-gpt2")
        >>> student = AutoModelForCausalLM.from_pretrained("tests/data/tiny-gpt2").float()
        >>> tokenizer = AutoTokenizer.from_pretrained("tests/data/tiny-gpt2")
        >>> table = compare(student, teacher, tokenizer, "He looked at her, and she looked at the door.")
        >>> [(row.name, row.bytes) for row in table.rows]
        [('student', 21157888), ('teacher', 10578944)]
    """
    return Comparison(
        tuple(
            score(
                model,
                tokenizer,
                text,
                name=name,
                passages=passages,
                context=context,
                stride=stride,
                batch_size=batch_size,
                progress=progress,
            )
            for name, model in zip(names, (student, teacher), strict=True)
        )
    )


def model_size(model: PreTrainedModel) -> tuple[int, int]:
    """`(parameters, bytes)` of a live model.

    Parameters are the elements of its floating-point tensors, and eight-bit weights without their scales; bytes are
    those of everything that would be saved, the integer permutations included. A tensor that several modules share
    counts once.
    """
    import torch

    state = model.state_dict()
    codes = {name for name, tensor in state.items() if tensor.dtype == torch.int8}
    scales = {f"{name}_scale" for name in codes}
    distinct = {(tensor.data_ptr(), tensor.shape): (name, tensor) for name, tensor in state.items()}
    parameters = sum(
        tensor.numel()
        for name, tensor in distinct.values()
        if name in codes or (tensor.is_floating_point() and name not in scales)
    )
    return parameters, sum(tensor.nbytes for _, tensor in distinct.values())
