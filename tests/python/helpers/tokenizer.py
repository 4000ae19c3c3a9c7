"""A tokenizer that needs no download: one token for every printable character, split at characters."""

import string

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def save_tokenizer(directory):
    """Saves a tokenizer of 102 tokens, the end of text being number 0, as `AutoTokenizer` loads it."""
    vocabulary = {"<|endoftext|>": 0, "<unk>": 1}
    for character in string.printable:
        vocabulary.setdefault(character, len(vocabulary))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        model_max_length=32,
    )
    fast.save_pretrained(directory)
    return fast
