"""A tokenizer that needs no download: one token for every printable character, split at characters."""

import string

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
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


_PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_LLAMA3 = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How published models of Llama's family split a text before its bytes are paired.
BYTE_LEVEL_RULES = {
    "words": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "a space before": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]),
    "groups of digits": pre_tokenizers.Sequence([pre_tokenizers.Split(_LLAMA3, "isolated"), _PLAIN]),
    "nothing": _PLAIN,
}


def save_byte_tokenizer(directory, rule):
    """Saves a tokenizer of pairs of bytes, 262 tokens, the end of text being number 0."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: number for number, token in enumerate([*special, *pre_tokenizers.ByteLevel.alphabet()])}
    merges = [("h", "e"), ("t", "he"), ("1", "2")]
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer, tokenizer.normalizer, tokenizer.decoder = rule, normalizers.NFC(), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special[:2]])
    tokenizer.add_special_tokens([AddedToken(special[2], normalized=False, lstrip=True)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[1], eos_token=special[0])
    fast.save_pretrained(directory)
    return fast
