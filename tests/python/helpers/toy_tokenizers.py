"""Tokenizers of every kind, trained in the test on a few words."""

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

WORDS = (
    "the cat sat on the mat, and the dog didn't; 12345 dogs' tails - café naïve 日本語 Übermut\n\n  in (brackets).\n"
)


def _trained(model, trainer, normalizer=None, pre_tokenizer=None):
    made = tokenizers.Tokenizer(model)
    if normalizer is not None:
        made.normalizer = normalizer
    if pre_tokenizer is not None:
        made.pre_tokenizer = pre_tokenizer
    made.train_from_iterator([WORDS * 20], trainer)
    return made


def _byte_level(**options):
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    return _trained(models.BPE(), trainer, pre_tokenizer=pre_tokenizers.ByteLevel(**options))


def gpt2():
    return _byte_level(add_prefix_space=False)


def prefix_space():
    """As RoBERTa's: a text begins with a space."""
    return _byte_level(add_prefix_space=True)


def digits_in_threes():
    """As Llama 3's: at most three digits, and a mark before a word is part of it."""
    pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    steps = [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    return _trained(models.BPE(), trainer, pre_tokenizer=pre_tokenizers.Sequence(steps))


def bert():
    """WordPiece of lower case without accents; a word of more than 100 characters is one unknown token."""
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[MASK]"], show_progress=False)
    made = _trained(
        models.WordPiece(unk_token="[UNK]"), trainer, normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    )
    made.decoder = decoders.WordPiece()
    return made


def unigram():
    """As T5's and XLM-R's: SentencePiece, every word with a space before it."""
    trainer = trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    return _trained(models.Unigram(), trainer, normalizer, pre_tokenizers.Metaspace())


def stripped():
    """As ALBERT's: white space at both ends of a text is removed."""
    trainer = trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Lowercase()])
    return _trained(models.Unigram(), trainer, normalizer, pre_tokenizers.Metaspace())


def llama():
    """As Llama 2's: no pre-tokenizer, and a space before every text."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
    )
    # Merges are learned inside words; the tokenizer then has no pre-tokenizer.
    made = _trained(
        models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True),
        trainer,
        normalizer,
        pre_tokenizers.Metaspace(),
    )
    made.pre_tokenizer = None
    return made


KINDS = [gpt2, prefix_space, digits_in_threes, bert, unigram, stripped, llama]
