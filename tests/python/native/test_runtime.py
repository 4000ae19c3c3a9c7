"""The native runtime against transformers: logits, greedy tokens, sampling, scores, for checkpoints of every kind."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import transformers
from helpers.models import tiny_model
from helpers.native import (
    HEAD_SPECS,
    PROMPTS,
    SPECS,
    TEXT,
    TINY,
    compressed,
    largest_difference,
    reference,
    torch_logits,
)
from tqcompressor import NativeModel, _core, errors, evaluate
from tqcompressor.native.tokens import TextStreams

CONTEXT = 256


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints of one random model, dense and with specs of every kind."""
    return compressed(tiny_model(n_positions=CONTEXT), SPECS, tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def trained():
    return NativeModel.from_pretrained(TINY)


@pytest.mark.parametrize("name", ["dense", *SPECS])
def test_logits_are_those_of_transformers(folders, name):
    model = reference(folders[name])
    native = NativeModel.from_pretrained(folders[name], threads=2)
    assert (native.parameters, native.bytes) == evaluate.model_size(model)
    for tokens in ([5], [3, 1, 4, 1, 5], list(range(1, 60))):
        ours = native.logits([tokens])[0]
        assert largest_difference(ours, torch_logits(model, tokens)) < 1e-4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["dense", "small blocks", "low rank", "mixed"])
def test_half_precision_weights_are_read_as_they_are(folders, name, dtype, tmp_path):
    reference(folders[name]).to(getattr(torch, dtype)).save_pretrained(tmp_path)
    native, model = NativeModel.from_pretrained(tmp_path), reference(tmp_path)
    assert native.bytes < 0.7 * NativeModel.from_pretrained(folders[name]).bytes
    assert largest_difference(native.logits([range(1, 40)])[0], torch_logits(model, list(range(1, 40)))) < 1e-4


def test_rounded_activations_change_far_less_than_rounded_weights(trained):
    """At up to eight tokens activations are rounded for products with eight-bit weights, at more they are not."""
    rounded = NativeModel.from_pretrained(TINY, dtype="int8")
    tokens = trained.encode(TEXT[:1000])

    def divergence(p, q):
        p, q = torch.from_numpy(p).log_softmax(-1), torch.from_numpy(q).log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())

    for first in range(0, 32, 8):
        part = tokens[first : first + 16]
        few, many, floats = (
            model.logits([part[:n]])[0][:8] for model, n in ((rounded, 8), (rounded, 16), (trained, 8))
        )
        assert not np.array_equal(few, many)
        assert divergence(many, few) < 1e-3 * divergence(floats, many)


@pytest.mark.parametrize(
    ("name", "tokens"), [("dense", 200), ("small blocks", 200), ("large blocks", 60), ("low rank", 60), ("mixed", 60)]
)
def test_greedy_generation_is_token_for_token_that_of_transformers(folders, name, tokens):
    model, native = reference(folders[name]), NativeModel.from_pretrained(folders[name])
    widest = max(map(len, PROMPTS))
    padded = torch.tensor([[0] * (widest - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (widest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    expected = model.generate(
        padded, attention_mask=mask, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    ours = native.generate_tokens(PROMPTS, max_new_tokens=tokens, eos_token_id=[])
    assert ours == expected[:, widest:].tolist()
    assert native.generate_tokens(PROMPTS[1:2], max_new_tokens=tokens, eos_token_id=[]) == ours[1:2]


def test_padding_on_either_side_changes_nothing(folders):
    model, native = reference(folders["mixed"]), NativeModel.from_pretrained(folders["mixed"])
    mask = np.zeros((4, 20), int)
    mask[0, 13:], mask[1, :4], mask[2] = 1, 1, 1
    ids = np.random.default_rng(0).integers(0, native.vocab_size, mask.shape)
    ours = native.logits(np.where(mask, ids, -100), mask)
    positions = torch.tensor(np.maximum(mask.cumsum(1) - 1, 0))
    for row in range(3):
        with torch.no_grad():
            expected = model(
                input_ids=torch.tensor(ids[row : row + 1]),
                attention_mask=torch.tensor(mask[row : row + 1]),
                position_ids=positions[row : row + 1],
            ).logits[0]
        own = mask[row].astype(bool)
        assert largest_difference(ours[row, own], expected.numpy()[own]) < 1e-4
        assert not ours[row, ~own].any()
    assert not ours[3].any()


def test_a_bare_model_and_a_head_of_its_own(tmp_path):
    tiny_model("GPT2Model").save_pretrained(tmp_path / "bare")
    found = compressed(tiny_model(tie_word_embeddings=False), {"head": HEAD_SPECS}, tmp_path)
    for folder in (tmp_path / "bare", *found.values()):
        native, model = NativeModel.from_pretrained(folder), reference(folder)
        assert largest_difference(native.logits([range(30)])[0], torch_logits(model, list(range(30)))) < 1e-4
        assert native.parameters == evaluate.model_size(model)[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"activation_function": "gelu"},
        {"activation_function": "relu"},
        {"activation_function": "silu"},
        {"activation_function": "tanh"},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"n_inner": 40, "layer_norm_epsilon": 0.1},
    ],
    ids=str,
)
def test_the_config_is_followed(tmp_path, changes):
    model = tiny_model(**changes)
    model.save_pretrained(tmp_path)
    ours = NativeModel.from_pretrained(tmp_path).logits([range(32)])[0]
    assert largest_difference(ours, torch_logits(model, list(range(32)))) < 1e-4


def test_generation_ends_after_an_end_token(trained):
    (whole,) = trained.generate_tokens([[5, 6]], max_new_tokens=20, eos_token_id=[])
    end = whole[7]
    assert trained.generate_tokens([[5, 6]], max_new_tokens=20, eos_token_id=[end]) == [whole[: whole.index(end) + 1]]
    assert trained.generate_tokens([[5, 6]], max_new_tokens=0) == [[]]
    assert [len(tokens) for tokens in trained.generate_tokens([[5] * 120, [5]], eos_token_id=[])] == [8, 8]


@pytest.mark.parametrize(("generation", "expected"), [({}, [7]), ({"eos_token_id": [3, 9]}, [3, 9])], ids=str)
def test_generation_config_says_where_texts_end(tmp_path, generation, expected):
    tiny_model(eos_token_id=7).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    assert NativeModel.from_pretrained(tmp_path)._runtime.eos_token_id == expected


def test_prompts_that_are_too_many_for_one_pass_continue_as_alone(trained):
    # 2,400 tokens, and a pass reads 2,048.
    prompts = np.random.default_rng(0).integers(8192, size=(20, 120)).tolist()
    found = trained.generate_tokens(prompts, max_new_tokens=3, eos_token_id=[])
    assert found == [trained.generate_tokens([prompt], max_new_tokens=3, eos_token_id=[])[0] for prompt in prompts]


def test_sampling_depends_on_the_seed_alone(trained):
    options = {"max_new_tokens": 30, "temperature": 1.0, "top_k": 50, "top_p": 0.95}
    prompts = [trained.encode(text) for text in ("He looked", "The", "It was a dark night")]
    found = trained.generate_tokens(prompts, seed=3, **options)
    for threads in (1, 2, 3):
        again = NativeModel.from_pretrained(TINY, threads=threads)
        assert again.generate_tokens(prompts, seed=3, **options) == found
    for number, prompt in enumerate(prompts):
        assert trained.generate_tokens([prompt], seed=3 + number, **options) == found[number : number + 1]
    assert trained.generate_tokens(prompts, seed=4, **options) != found


def test_samples_are_distributed_as_the_logits_say(trained):
    prompt, count, temperature = trained.encode("He looked at the"), 600, 1.5
    logits = trained.logits([prompt])[0, -1] / temperature
    probabilities = np.exp(logits - logits.max())
    order = np.argsort(-logits)
    options = {"max_new_tokens": 1, "temperature": temperature, "eos_token_id": []}
    kept = order[:4]
    drawn = [token for (token,) in trained.generate_tokens([prompt] * count, top_k=4, **options)]
    shares = probabilities[kept] / probabilities[kept].sum()
    found = np.array([drawn.count(token) for token in kept])
    assert found.sum() == count
    assert (np.abs(found - count * shares) < 5 * np.sqrt(count * shares)).all()
    whole = probabilities[order] / probabilities.sum()
    kept = set(order[: int((np.cumsum(whole) < 0.3).sum()) + 1].tolist())
    drawn = {token for (token,) in trained.generate_tokens([prompt] * 100, top_p=0.3, **options)}
    assert drawn <= kept and len(drawn) > 1
    greedy = trained.generate_tokens([prompt], max_new_tokens=20)
    assert trained.generate_tokens([prompt], max_new_tokens=20, temperature=1.0, top_k=1) == greedy
    assert trained.generate_tokens([prompt], max_new_tokens=20, temperature=1.0, top_p=1e-9) == greedy


@pytest.mark.parametrize(("context", "stride"), [(None, None), (64, 64), (50, 7)])
def test_perplexity_is_that_of_torch(trained, context, stride):
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    expected = evaluate.perplexity(reference(TINY), tokenizer, TEXT[:3000], context=context, stride=stride)
    seen = []
    result = trained.perplexity(
        TEXT[:3000], context=context, stride=stride, progress=lambda done, total: seen.append((done, total))
    )
    assert result.negative_log_likelihood == pytest.approx(expected.negative_log_likelihood, rel=1e-5)
    for field in ("tokens", "words", "bytes", "context", "stride"):
        assert getattr(result, field) == getattr(expected, field)
    assert seen == sorted(seen) and seen[-1] == (result.tokens, result.tokens)


def test_last_words_are_those_of_torch(trained):
    words = TEXT.split()
    passages = [" ".join(words[begin : begin + 4 + 9 * begin // 100]) for begin in range(0, 1500, 60)]
    # A passage whose last word the model predicts.
    passages.append("He looked at the" + trained.generate("He looked at the", max_new_tokens=8).rpartition(" ")[0])
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    expected = evaluate.last_word_accuracy(reference(TINY), tokenizer, passages)
    result = trained.last_word_accuracy(passages)
    assert 0 < result.accuracy == expected.accuracy
    assert math.log(result.perplexity) == pytest.approx(math.log(expected.perplexity), rel=1e-5)


def test_tokens_are_those_of_transformers(trained):
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    text = TEXT + "<|endoftext|> naïve  \u00e9\u4e16\U0001f600\n\n\t don't 12345 <|endoftext|>"
    tokens = trained.encode(text)
    assert tokens == tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert trained.decode(tokens) == text == tokenizer.decode(tokens)
    skipped = tokenizer.decode(tokens, skip_special_tokens=True)
    assert trained.decode(tokens, skip_special_tokens=True) == skipped


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ("whole", None),
        ("whole", {"tokenizer_class": "PreTrainedTokenizerFast"}),
        (
            "whole",
            {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": {"__type": "AddedToken", "content": "the"}},
        ),
        ("whole", {"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>", "bos_token": "!", "pad_token": '"'}),
        ("parts", None),
        ("parts", {"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>", "bos_token": "!", "pad_token": '"'}),
    ],
    ids=str,
)
def test_the_files_of_a_tokenizer_mean_what_they_mean_to_transformers(tmp_path, files, named):
    whole = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    if files == "whole":
        shutil.copy(TINY / "tokenizer.json", tmp_path)
    else:
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in whole["model"]["merges"]]
        (tmp_path / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]), encoding="utf-8")
        (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    if named is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    ours = _core.Tokenizer.load(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = TEXT[:2000] + "<|endoftext|>the end!"
    assert ours.encode(text) == theirs(text, add_special_tokens=False, verbose=False)["input_ids"]
    for token, expected in ((ours.bos_token_id, theirs.bos_token_id), (ours.eos_token_id, theirs.eos_token_id)):
        # Tokens that transformers adds to the vocabulary have no row in the model.
        assert token == (None if expected is None or expected >= len(whole["model"]["vocab"]) else expected)


def test_streams_give_whole_characters_and_all_of_the_text(trained):
    pieces = [[], []]
    text = "naïve \u4e16\u754c \U0001f600\U0001f468\u200d\U0001f469<|endoftext|> end"
    streams = TextStreams(trained._tokenizer, 2, lambda prompt, piece: pieces[prompt].append(piece))
    for token in trained.encode(text):
        streams.add([(1, token), (0, token)])
    plain = text.replace("<|endoftext|>", "")
    assert len(pieces[0]) > 5 and pieces[0] == pieces[1] and "".join(pieces[0]) == plain
    assert not any("\ufffd" in piece for piece in pieces[0])
    # An incomplete character at the end of a text is passed on when the text is complete.
    cut = [trained.encode("end \U0001f600")[:-1]]
    streams = TextStreams(trained._tokenizer, 1, lambda prompt, piece: pieces[prompt].append(piece))
    pieces[0].clear()
    streams.add([(0, token) for token in cut[0]])
    assert "".join(pieces[0]).strip() == "end"
    streams.finish([trained.decode(cut[0])])
    assert "".join(pieces[0]) == trained.decode(cut[0]) and "".join(pieces[0]).endswith("\ufffd")
    # At a high temperature, parts of characters are drawn.
    told = {0: "", 1: ""}

    def stream(prompt, piece):
        told[prompt] += piece

    found = trained.generate(["He", "She"], temperature=40.0, max_new_tokens=100, seed=1, streamer=stream)
    assert [told[0], told[1]] == found and any("\ufffd" in text for text in found)


def test_streams_decode_every_token_once(trained):
    tokenizer = trained._tokenizer
    pushed, decoded = [], []

    class Stream:
        def __init__(self, skip_special_tokens):
            self._stream = tokenizer.decode_stream(skip_special_tokens)

        def push(self, tokens):
            pushed.append(len(tokens))
            return self._stream.push(tokens)

    class Tokenizer:
        encode, decode_stream = tokenizer.encode, Stream

        def decode(self, tokens, skip_special_tokens):
            decoded.append(len(tokens))
            return tokenizer.decode(tokens, skip_special_tokens)

    native = NativeModel(trained._directory, trained._runtime)
    vars(native)["_tokenizer"] = Tokenizer()
    native.generate(["He", "She"], max_new_tokens=100, temperature=1.0, streamer=lambda prompt, piece: None)
    # Every token is decoded once in the stream and once in the whole text, however many tokens a call adds.
    assert sum(pushed) == sum(decoded) and len(decoded) == 2


def test_texts_are_continued(trained):
    tokens = trained.encode("He looked at")
    (expected,) = trained.generate_tokens([tokens], max_new_tokens=12)
    assert trained.generate("He looked at", max_new_tokens=12) == trained.decode(expected)
    (begun,) = trained.generate_tokens([[0]], max_new_tokens=12)
    found = trained.generate(["He looked at", ""], max_new_tokens=12)
    assert found == [trained.decode(expected), trained.decode(begun, skip_special_tokens=True)]
    assert trained.generate([]) == []


def test_what_a_stream_raises_ends_the_generation(trained):
    def stream(prompt, piece):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        trained.generate("He looked at", streamer=stream)


def test_a_checkpoint_without_a_tokenizer_still_takes_tokens(folders):
    native = NativeModel.from_pretrained(folders["dense"])
    assert len(native.generate_tokens([[1, 2]], max_new_tokens=3, eos_token_id=[])[0]) == 3
    with pytest.raises(errors.CheckpointError, match=r"neither 'tokenizer\.json' nor 'vocab\.json'"):
        native.generate("text")
