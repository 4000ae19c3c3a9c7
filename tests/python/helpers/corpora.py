"""The held-out text of the tiny GPT-2, invented texts, and their tokens by a naive oracle."""

from pathlib import Path

TINY = Path(__file__).parents[2] / "data" / "tiny-gpt2"
HELD_OUT = TINY / "heldout.txt"
END = "<|endoftext|>"


def oracle(tokenizer, texts):
    """Every token of the corpus, document by document, by the tokenizer's own call."""
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    tokens = []
    for text in texts:
        for document in text.split(END) if end else [text]:
            if document.strip():
                tokens += [*tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"], *end]
    return tokens


def packed(blocks):
    """All tokens of the blocks in order, after checks that every block satisfies the contract."""
    for block in blocks:
        assert set(block) == {"input_ids"}
        assert str(block["input_ids"].dtype) == "torch.int64" and block["input_ids"].shape == (blocks.seq_len,)
    return [int(token) for block in blocks for token in block["input_ids"]]


def write(folder, **texts):
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_bytes(text.encode())
    return [folder / f"{name}.txt" for name in texts]
