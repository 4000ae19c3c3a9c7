"""Random changes of every file that is read: each is taken, or refused with an error of this package."""

import json

import numpy as np
import pytest
from helpers.checkpoints import Checkpoint, config
from helpers.fuzzing import changed_bytes, changed_json, changed_tensors, fuzz
from tqcompressor import _core, compress_checkpoint
from tqcompressor.calibration.calibration import Calibration
from tqcompressor.compression.checkpoint import inspect
from tqcompressor.config.recipes import resolve_config
from tqcompressor.config.tq_config import TQConfig
from tqcompressor.data.text import read_passages, read_text
from tqcompressor.distillation.stages import STAGED_RECIPES, resolve_staged_recipe
from tqcompressor.distillation.teacher_file import TeacherFile
from tqcompressor.utils.atomic_io import WholeFile

SPECS = {"wte": {"rank": 2}, "h.0.mlp.c_fc": {"block": [2, 4], "rank": 2, "permute": "both"}}


def checkpoint(folder, **options):
    return Checkpoint(layers=1).write(folder / "model", **options)


def opened(folder):
    """Reads a dense checkpoint in every way."""

    def read():
        checkpoint = _core.Checkpoint.open(folder)
        checkpoint.plan(TQConfig(SPECS))
        runtime = _core.Runtime.load(folder, 1, None)
        runtime.logits([[1, 2]])

    return read


def weights(folder):
    source = checkpoint(folder)
    return source / "model.safetensors", changed_tensors, opened(source)


def configuration(folder):
    source = checkpoint(folder)
    return source / "config.json", changed_json, opened(source)


def index(folder):
    source = checkpoint(folder, shards=2)
    return source / "model.safetensors.index.json", changed_json, opened(source)


def generation(folder):
    source = checkpoint(folder)
    path = source / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [1, 2], "bos_token_id": 1}))
    return path, changed_json, opened(source)


def compressed(folder, name):
    out = folder / "out"
    compress_checkpoint(checkpoint(folder), out, config({}) | {"specs": SPECS})

    def read():
        found = inspect(out)
        str(found), found.to_json()
        _core.Runtime.load(out, 1, None).logits([[1, 2]])

    return out / name, changed_tensors if name.endswith("safetensors") else changed_json, read


def compressed_weights(folder):
    return compressed(folder, "model.safetensors")


def compressed_configuration(folder):
    return compressed(folder, "config.json")


def report(folder):
    return compressed(folder, "compression_report.json")


def calibration(folder):
    path = folder / "calibration.safetensors"
    moments = {"input.h.0.mlp.c_fc": np.eye(3, dtype=np.float32), "input.wte": np.ones(4, np.float32)}
    Calibration(moments, tokens=5, seed=1, sensitivity=False, model_type="gpt2").save(path)
    return path, changed_tensors, lambda: Calibration.load(path)


def teacher(folder):
    path = folder / "teacher.safetensors"
    contents = TeacherFile(2, 3, 2, 1.0, 11, "text", "a model", "digest")
    with WholeFile(path) as file:
        writer = contents.writer(file)
        for name, spec in contents.tensors().items():
            writer.write(name, np.ones(spec.shape, spec.dtype))
    return path, changed_tensors, lambda: TeacherFile.read(path)


def recipe(folder):
    path = folder / "recipe.json"
    TQConfig(SPECS | {"h.*.attn.*": {"terms": [{"rank": 1}, {"block": [2, 2], "rank": 1}]}}).to_json(path)

    def read():
        resolve_config(path).to_json()
        resolve_staged_recipe(path).to_json()
        _core.read_config(path.read_text(encoding="utf-8"))

    return path, changed_json, read


def staged_recipe(folder):
    path = folder / "staged.json"
    path.write_text(STAGED_RECIPES["tq-81m-staged"].to_json())

    def read():
        resolve_staged_recipe(path).samples_of_stages(100)

    return path, changed_json, read


def tokenised(folder):
    def read():
        tokenizer = _core.Tokenizer.load(folder)
        tokens = tokenizer.encode("He looked at\n the <end> \u00e9\U0001f600")
        tokenizer.decode([*tokens, 0, 1, 10**6], True)
        tokenizer.decode_stream(False).push([*tokens, 0, 3])

    return read


def parts_of_tokenizer(folder, name):
    characters = [*"Helo kdath\n<n>", "\u0120", "\u010a", "\u00c3", "\u00a9"]
    vocabulary = {
        token: number for number, token in enumerate(dict.fromkeys(["<|endoftext|>", *characters, "He", "lo"]))
    }
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nH e\nl o\n", encoding="utf-8")
    special = {"bos_token": {"content": "<|endoftext|>"}, "eos_token": "<|endoftext|>", "add_prefix_space": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(special | {"tokenizer_class": "GPT2Tokenizer"}))
    return folder / name, changed_bytes if name.endswith("txt") else changed_json, tokenised(folder)


def vocabulary(folder):
    return parts_of_tokenizer(folder, "vocab.json")


def merges(folder):
    return parts_of_tokenizer(folder, "merges.txt")


def tokenizer_configuration(folder):
    return parts_of_tokenizer(folder, "tokenizer_config.json")


def whole_tokenizer(folder):
    vocabulary = {token: number for number, token in enumerate([*"Helo kdat", "He", "<unk>"])}
    content = {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": "BatchLongest",
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "H",
        },
        "added_tokens": [
            {
                "id": 12,
                "content": "<end>",
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [["H", "e"]],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder / "tokenizer.json", changed_json, tokenised(folder)


def text(folder):
    path = folder / "text.jsonl"
    path.write_text('{"text": "The old man looked."}\n{"text": "caf\u00e9"}\n', encoding="utf-8")

    def read():
        read_text(path)
        read_passages(path)

    return path, changed_bytes, read


TARGETS = [
    *(weights, configuration, index, generation, compressed_weights, compressed_configuration, report, calibration),
    *(teacher, recipe, staged_recipe, vocabulary, merges, tokenizer_configuration, whole_tokenizer, text),
]
# Python reports a head that differs from the embedding; here it is one of many faults.
pytestmark = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.__name__)
def test_every_change_is_taken_or_refused_with_an_error_of_ours(tmp_path, target):
    taken = fuzz(*target(tmp_path), inputs=200)
    # Changes that are always refused at the first check would test little.
    assert taken > 0


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.__name__)
def test_a_hundred_thousand_changes(tmp_path, target):
    assert fuzz(*target(tmp_path), inputs=100_000) > 0
