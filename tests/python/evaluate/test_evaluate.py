"""Perplexity and last words against oracles that score one token at a time, by the definition in the docstring."""

import copy
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tqcompressor import evaluate
from tqcompressor.errors import ConfigError, MissingDependencyError, TextError

TINY = Path(__file__).parents[2] / "data" / "tiny-gpt2"
TEXT = (TINY / "heldout.txt").read_text(encoding="utf-8")[:400]


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model():
    """Two narrow layers with a context of 16 and weights large enough for uneven predictions."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=8192, n_positions=16, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5
    )
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def trained():
    return transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


def log_probability(model, tokens, target):
    """`ln p(target | tokens)`, from a pass over just these tokens."""
    with torch.no_grad():
        return float(torch.log_softmax(model(torch.tensor([tokens])).logits[0, -1].double(), -1)[target])


def oracle(model, sequence, context, stride):
    """Sum over `sequence[1:]`; the window of each token is worked out from its own position."""
    last, total = len(sequence) - 1, 0.0
    for position in range(1, last + 1):
        moves = max(0, math.ceil((position - context) / stride))
        begin = max(0, min(context + moves * stride, last) - context)
        total -= log_probability(model, sequence[begin:position], sequence[position])
    return total


@pytest.mark.parametrize(("context", "stride"), [(16, 16), (16, 8), (16, 5), (12, 1), (1, 1), (7, 3)])
def test_perplexity_is_the_oracles(model, tokenizer, context, stride):
    ids = tokenizer(TEXT, verbose=False)["input_ids"]
    expected = oracle(model, [tokenizer.bos_token_id, *ids], context, stride)
    result = evaluate.perplexity(model, tokenizer, TEXT, context=context, stride=stride)
    assert result.tokens == len(ids)
    assert result.negative_log_likelihood == pytest.approx(expected, rel=1e-5)
    assert (result.context, result.stride) == (context, stride)


def test_a_text_shorter_than_the_context_is_one_window(model, tokenizer):
    ids = tokenizer("Two words")["input_ids"]
    assert 2 <= len(ids) < 16
    expected = oracle(model, [tokenizer.bos_token_id, *ids], 16, 8)
    assert evaluate.perplexity(model, tokenizer, "Two words").negative_log_likelihood == pytest.approx(expected)


def test_without_a_begin_token_the_first_token_is_only_context(model):
    plain = transformers.PreTrainedTokenizerFast(tokenizer_file=str(TINY / "tokenizer.json"))
    assert plain.bos_token_id is None and plain.eos_token_id is None
    ids = plain(TEXT, verbose=False)["input_ids"]
    result = evaluate.perplexity(model, plain, TEXT, stride=8)
    assert result.tokens == len(ids) - 1
    assert result.negative_log_likelihood == pytest.approx(oracle(model, ids, 16, 8), rel=1e-5)


def test_a_stride_of_the_whole_context_is_lm_evals_rolling_loglikelihood(model, tokenizer):
    utilities = pytest.importorskip("lm_eval.utils")
    ids = tokenizer(TEXT, verbose=False)["input_ids"]
    windows = utilities.get_rolling_token_windows(
        token_list=ids, prefix_token=tokenizer.eos_token_id, max_seq_len=16, context_len=1
    )
    expected = 0.0
    for before, targets in map(utilities.make_disjoint_window, windows):
        tokens = [*before, *targets]
        for index, target in enumerate(targets, len(before)):
            expected -= log_probability(model, tokens[:index], target)
    result = evaluate.perplexity(model, tokenizer, TEXT, stride=16)
    assert result.negative_log_likelihood == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 1000])
def test_the_batch_size_does_not_change_the_result(model, tokenizer, batch_size):
    expected = evaluate.perplexity(model, tokenizer, TEXT, stride=3)
    result = evaluate.perplexity(model, tokenizer, TEXT, stride=3, batch_size=batch_size)
    assert result.negative_log_likelihood == pytest.approx(expected.negative_log_likelihood, rel=1e-6)
    assert result.tokens == expected.tokens


def test_normalisations_follow_from_the_sum():
    result = evaluate.PerplexityResult(
        negative_log_likelihood=24 * math.log(2), tokens=8, words=6, bytes=12, context=16, stride=8, seconds=0.0
    )
    assert result.perplexity == pytest.approx(8)
    assert result.word_perplexity == pytest.approx(16)
    assert result.bits_per_byte == pytest.approx(2)


def test_words_and_bytes_are_those_of_the_text(model, tokenizer):
    text = "Voilà  un café,\nfort."
    result = evaluate.perplexity(model, tokenizer, text)
    assert (result.words, result.bytes) == (4, len(text) + 2)


def test_the_trained_checkpoint_predicts_held_out_text(trained, tokenizer):
    text = evaluate.read_text(TINY / "heldout.txt")[:8_000]
    result = evaluate.perplexity(trained, tokenizer, text, stride=128)
    # A uniform guess over the vocabulary would be 8192, the text's own token frequencies 590.
    assert 80 < result.perplexity < 140
    closer = evaluate.perplexity(trained, tokenizer, text, stride=32)
    assert closer.perplexity < result.perplexity
    assert closer.tokens == result.tokens


def test_the_model_is_left_in_the_mode_it_was_in(model, tokenizer):
    model.train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    try:
        noisy = [evaluate.perplexity(model, tokenizer, TEXT).negative_log_likelihood for _ in range(2)]
        assert noisy[0] == noisy[1], "dropout was not switched off"
        assert [module.training for module in model.modules()] == before
    finally:
        model.eval()


def test_progress_counts_every_token(model, tokenizer):
    seen = []
    result = evaluate.perplexity(model, tokenizer, TEXT, progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, result.tokens) and seen[-1] == (result.tokens, result.tokens)
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    ("text", "options", "error", "message"),
    [
        ("", {}, TextError, "empty"),
        (" \n\t", {}, TextError, "empty"),
        ("a", {}, TextError, "fewer than 2 tokens"),
        (TEXT, {"stride": 0}, ConfigError, "stride: expected an integer from 1 to 16"),
        (TEXT, {"stride": -4}, ConfigError, "got -4"),
        (TEXT, {"stride": 17}, ConfigError, "got 17"),
        (TEXT, {"stride": 9, "context": 8}, ConfigError, "stride: expected an integer from 1 to 8"),
        (TEXT, {"context": 0}, ConfigError, "context: expected an integer from 1 to 16"),
        (TEXT, {"context": 17}, ConfigError, "got 17"),
        (TEXT, {"batch_size": 0}, ConfigError, "batch_size"),
    ],
)
def test_perplexity_refuses(model, tokenizer, text, options, error, message):
    with pytest.raises(error, match=message):
        evaluate.perplexity(model, tokenizer, text, **options)


def test_without_torch_the_error_says_what_to_install(model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependencyError, match=r"pip install \"tqcompressor\[hf\]\""):
        evaluate.perplexity(model, tokenizer, TEXT)


def last_word_oracle(model, tokenizer, passage):
    """Whether the last word is found, and its negative log-likelihood; one token at a time, no padding."""
    head = passage.strip()[: passage.strip().rindex(" ")]
    tokens = tokenizer(passage.strip(), verbose=False)["input_ids"]
    right, total = True, 0.0
    for index in range(len(tokenizer(head, verbose=False)["input_ids"]), len(tokens)):
        # All targets of a passage share one window, cut so that the last target still fits.
        before = tokens[max(0, len(tokens) - 1 - model.config.n_positions) : index]
        with torch.no_grad():
            scores = torch.log_softmax(model(torch.tensor([before])).logits[0, -1].double(), -1)
        right &= int(scores.argmax()) == tokens[index]
        total -= float(scores[tokens[index]])
    return right, total


@pytest.fixture(scope="module")
def passages(trained, tokenizer):
    """Beginnings of paragraphs of many lengths, one above the context; the model predicts the last one's last word."""
    paragraphs = (TINY / "heldout.txt").read_text(encoding="utf-8").split("\n\n")
    long_ones = [paragraph.split() for paragraph in paragraphs if len(paragraph.split()) > 200][:9]
    found = [" ".join(words[: 5 + 7 * index]) for index, words in enumerate(long_ones)] + [" ".join(long_ones[0])]
    ids = tokenizer("He looked at the", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(8):
            ids = torch.cat([ids, trained(ids).logits[:, -1:].argmax(-1)], -1)
    generated = tokenizer.decode(ids[0])
    return [*found, generated[: generated.rindex(" ")]]


@pytest.fixture(scope="module")
def expected(trained, tokenizer, passages):
    return [last_word_oracle(trained, tokenizer, passage) for passage in passages]


@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_last_words_are_the_oracles_whatever_the_padding(trained, tokenizer, passages, expected, batch_size):
    result = evaluate.last_word_accuracy(trained, tokenizer, passages, batch_size=batch_size)
    assert result.passages == len(passages)
    assert 0 < result.accuracy < 1
    assert result.accuracy == sum(right for right, _ in expected) / len(passages)
    assert math.log(result.perplexity) == pytest.approx(sum(total for _, total in expected) / len(passages), rel=1e-5)


@pytest.mark.parametrize(
    ("passages", "message"),
    [
        ([], "no passages"),
        (["two words", " one "], "passage 2 has no word"),
        (["so " + "x" * 2000], "its last word has"),
    ],
)
def test_last_words_refuse(trained, tokenizer, passages, message):
    with pytest.raises(TextError, match=message):
        evaluate.last_word_accuracy(trained, tokenizer, passages)


def test_compare_counts_shared_tensors_once(trained, tokenizer):
    half = copy.deepcopy(trained).half()
    table = evaluate.compare(half, trained, tokenizer, TEXT, passages=["He looked at her"], stride=16)
    student, teacher = table.rows
    assert teacher.parameters == student.parameters == 5_289_472
    assert (teacher.bytes, student.bytes) == (4 * 5_289_472, 2 * 5_289_472)
    assert json.loads(table.to_json())["models"][1]["text"]["perplexity"] == teacher.text.perplexity
    lines = str(table).splitlines()
    assert lines[2].startswith("student ") and lines[3].startswith("teacher ")
    assert "5,289,472" in lines[3] and "21,157,888" in lines[3]
    assert f"{teacher.perplexity:.2f}" in lines[3] and "%" in lines[2]


def test_figures_that_are_not_finite_are_null_in_json():
    result = evaluate.PerplexityResult(1e9, tokens=10, words=5, bytes=40, context=16, stride=8, seconds=0.0)
    assert result.perplexity == math.inf
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["perplexity"] is None


def test_files_are_scored_as_their_texts(trained, tokenizer, tmp_path):
    text, passages = tmp_path / "text.txt", tmp_path / "passages.txt"
    text.write_text(TEXT, encoding="utf-8")
    passages.write_text("He looked at her\n", encoding="utf-8")
    score = evaluate.score(trained, tokenizer, text, passages=passages)
    assert score.perplexity == evaluate.perplexity(trained, tokenizer, TEXT).perplexity
    assert score.last_word.passages == 1
    with pytest.raises(TextError, match=r"pathlib\.Path"):
        evaluate.perplexity(trained, tokenizer, str(text))


def test_read_text_keeps_the_text_as_it_is(tmp_path):
    path = tmp_path / "wiki.test.raw"
    path.write_bytes("\ufeff = Title = \n\r\n <unk> caf\u00e9 \x0c end".encode())
    assert evaluate.read_text(path) == " = Title = \n\r\n <unk> caf\u00e9 \x0c end"


def test_read_text_says_where_it_is_not_utf8(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9 noir")
    with pytest.raises(TextError, match=r"latin\.txt: not UTF-8 at byte 3"):
        evaluate.read_text(path)


def test_read_passages_in_both_forms(tmp_path):
    lines = tmp_path / "passages.txt"
    lines.write_text("First passage here\n\n  second\x0cone \n", encoding="utf-8")
    assert evaluate.read_passages(lines) == ["First passage here", "second\x0cone"]
    objects = tmp_path / "passages.jsonl"
    objects.write_text('{"text": "First passage here"}\n{"text": "second\\none", "domain": null}\n', encoding="utf-8")
    assert evaluate.read_passages(objects) == ["First passage here", "second\none"]


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "no passages"), ("{}\n", "line 1"), ('\n["text"]\n', "line 2"), ('{"text": "x"\n', "line 1 is not JSON")],
)
def test_read_passages_refuses(tmp_path, content, message):
    path = tmp_path / "passages.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(TextError, match=message):
        evaluate.read_passages(path)


def published_perplexity(model, tokenizer, text, context):
    """The loop of transformers' "Perplexity of fixed-length models", whose labels leave out the first token."""
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
    losses = []
    for begin in range(0, ids.shape[1], context):
        window = ids[:, begin : begin + context]
        if window.shape[1] > 1:
            with torch.no_grad():
                losses.append(model(window, labels=window).loss)
    return float(torch.exp(torch.stack(losses).mean()))


@pytest.mark.parametrize(("context", "characters"), [(16, 400), (16, 60), (7, 333), (2, 50), (3, 400)])
def test_the_mean_over_windows_is_that_of_published_figures(model, tokenizer, context, characters):
    text = TEXT[:characters]
    result = evaluate.mean_window_perplexity(model, tokenizer, text, context=context, batch_size=3)
    assert result.perplexity == pytest.approx(published_perplexity(model, tokenizer, text, context), rel=1e-5)
    tokens = len(tokenizer(text, verbose=False)["input_ids"])
    # A last window of one token has nothing to score.
    assert (result.tokens, result.windows, result.context) == (tokens, -(-(tokens - 1) // context), context)


def test_a_last_window_of_one_token_does_not_count(model, tokenizer):
    ids = tokenizer(TEXT, verbose=False)["input_ids"]
    context = next(length for length in range(2, 17) if len(ids) % length == 1)
    result = evaluate.mean_window_perplexity(model, tokenizer, TEXT, context=context)
    assert result.windows == len(ids) // context
    assert result.perplexity == pytest.approx(published_perplexity(model, tokenizer, TEXT, context), rel=1e-5)


def test_the_mean_over_windows_refuses_what_perplexity_does(model, tokenizer):
    for context in (1, 17):
        with pytest.raises(ConfigError, match="context"):
            evaluate.mean_window_perplexity(model, tokenizer, TEXT, context=context)
    with pytest.raises(TextError):
        evaluate.mean_window_perplexity(model, tokenizer, " ")


def test_the_cosine_of_embeddings_is_that_of_mean_pooled_texts(model, tokenizer):
    torch.manual_seed(1)
    other = transformers.GPT2LMHeadModel(model.config).eval()
    texts = ["He looked at her.", "No.", "She looked at the door and went, and did not say a word to anybody there."]
    cosines = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :16]
        with torch.no_grad():
            pooled = [each.transformer(ids).last_hidden_state.mean(1) for each in (model, other)]
        cosines.append(float(torch.nn.functional.cosine_similarity(*pooled)))
    result = evaluate.embedding_cosine(other, model, tokenizer, "\n\n".join(texts) + "\n \n", batch_size=2)
    assert result.texts == 3
    assert result.cosine == pytest.approx(sum(cosines) / 3, abs=1e-5)
    assert result.smallest == pytest.approx(min(cosines), abs=1e-5)
    assert evaluate.embedding_cosine(other, model, tokenizer, "\n".join(texts), num_samples=2).texts == 2


def test_embeddings_need_a_model_of_text_and_a_text(model, tokenizer):
    with pytest.raises(TextError, match="empty"):
        evaluate.embedding_cosine(model, model, tokenizer, "\n \n")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    images = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=8, patch_size=4))
    with pytest.raises(ConfigError, match="expected a model of text, got one of pixel_values"):
        evaluate.embedding_cosine(images, model, tokenizer, "a text")
