"""Invalid inputs and destinations: a typed error names the tensor or the path, and nothing is written."""

import errno
import json
import os
import resource

import numpy as np
import pytest
import safetensors.numpy
from helpers.checkpoints import Checkpoint, config, decode, encode, listing, write_safetensors
from tqcompressor import NativeModel, errors
from tqcompressor.compression.checkpoint import compress_checkpoint, inspect

C_FC = "transformer.h.1.mlp.c_fc.weight"
SPECS = {"wte": ((1, 4), 2, "columns"), "h.1.mlp.c_fc": ((2, 4), 4, "both")}


@pytest.fixture
def refused(tmp_path):
    """Compresses a checkpoint or a directory, and checks the error and that nothing was written."""

    def check(source, error, words, configuration=None, destination="new/out", **options):
        if isinstance(source, Checkpoint):
            source = source.write(tmp_path / "in")
        before = listing(tmp_path)
        with pytest.raises(error) as caught:
            compress_checkpoint(source, tmp_path / destination, configuration or config(SPECS), **options)
        assert isinstance(caught.value, errors.TQError)
        for word in [words] if isinstance(words, str) else words:
            assert word in str(caught.value)
        assert listing(tmp_path) == before
        return caught.value

    return check


@pytest.mark.parametrize(("value", "name"), [(np.nan, "NaN"), (np.inf, "inf"), (-np.inf, "-inf")])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_non_finite_weights(refused, value, name, dtype):
    source = Checkpoint(dtype=dtype)
    weight = decode(*source.tensors[C_FC]).copy()
    weight[5, 30] = value
    source.tensors[C_FC] = encode(weight, dtype)
    refused(source, errors.NonFiniteError, [C_FC, name, "row 5", "column 30"])


@pytest.mark.parametrize("dtype", ["F64", "I64", "U8"])
def test_weights_of_another_dtype(refused, dtype):
    source = Checkpoint()
    source.tensors[C_FC] = encode(np.ones((8, 32)), dtype)
    refused(source, errors.DtypeError, [C_FC, dtype])


def test_unknown_dtype_option(refused):
    refused(Checkpoint(), errors.DtypeError, ["float64", "bfloat16"], dtype="float64")


def test_values_that_the_dtype_option_cannot_hold(refused):
    source = Checkpoint()
    source.tensors["transformer.ln_f.weight"] = encode(np.full(8, 1e6))
    refused(source, errors.DtypeError, ["transformer.ln_f.weight", "float16"], dtype="float16")


def test_block_that_does_not_divide(refused):
    specs = {"h.1.mlp.c_fc": ((3, 4), 1, "both")}
    refused(Checkpoint(), errors.ShapeError, ["h.1.mlp.c_fc", "(8, 32)", "(3, 4)"], config(specs))


def test_rank_too_large(refused):
    specs = {"h.1.mlp.c_fc": ((2, 4), 9, "both")}
    refused(Checkpoint(), errors.ShapeError, ["h.1.mlp.c_fc", "1 to 8", "got 9"], config(specs))


def test_pattern_that_matches_nothing(refused):
    specs = SPECS | {"h.7.*": ((2, 4), 1, "both")}
    refused(Checkpoint(), errors.ConfigError, ["h.7.*", "matches no matrix"], config(specs))


def test_part_of_a_fused_weight(refused):
    specs = {"h.0.attn.c_attn.q": ((2, 4), 1, "both")}
    refused(Checkpoint(), errors.ConfigError, ["h.0.attn.c_attn.weight", "all of its 3 parts"], config(specs))


def test_tied_head_as_a_matrix_of_its_own(refused):
    refused(Checkpoint(), errors.ConfigError, "tied to wte", config({"lm_head": ((2, 4), 1, "both")}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 5}, "newer tqcompressor (format 5), this one reads up to 4: upgrade"),
        ({"bits": 4}, "bits"),
        ({"quant_method": "gptq"}, "gptq"),
        ({"effort": "utmost"}, "effort"),
        ({"seed": -1}, "seed"),
        ({"specs": {}}, "specs"),
        ({"specs": {"wte": {"block": [1, 4]}}}, "rank"),
        ({"specs": {"wte": {"block": [1, 4], "rank": 1, "bits": 2}}}, "bits"),
    ],
)
def test_configs_that_cannot_be_followed(refused, change, words):
    refused(Checkpoint(), errors.ConfigError, words, config(SPECS) | change)


def test_unknown_recipe(refused):
    refused(Checkpoint(), errors.ConfigError, ["none-such", "tq-81m"], "none-such")


@pytest.mark.parametrize("threads", [0, -1])
def test_thread_counts_below_one(refused, threads):
    refused(Checkpoint(), errors.ConfigError, "threads", threads=threads)


def test_missing_tensor(refused):
    source = Checkpoint()
    del source.tensors[C_FC]
    refused(source, errors.CheckpointError, ["h.1.mlp.c_fc.weight", "missing"])


def test_shape_that_is_not_the_configs(refused):
    source = Checkpoint()
    source.config["vocab_size"] = 21
    refused(source, errors.CheckpointError, ["transformer.wte.weight", "[21, 8]", "[20, 8]"])


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1])
def test_truncated_file(refused, tmp_path, length):
    source = Checkpoint().write(tmp_path / "in")
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    refused(source, errors.CheckpointError, ["model.safetensors", "truncated"])


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        ({"shape": [8, 33]}, "[8, 33] is 1056 bytes long"),
        ({"shape": [2**62, 2**62]}, "no length in bytes"),
        ({"dtype": "F16"}, "the header lies"),
        ({"dtype": "F33"}, "unknown variant"),
        ({"data_offsets": [0, 1024]}, ""),
        ({"data_offsets": [2**63, 2**63 + 1024]}, "truncated"),
        ({"data_offsets": [1024, 0]}, "the header lies"),
        ({"shape": "wide"}, "invalid type"),
    ],
)
def test_header_that_lies(refused, tmp_path, lie, words):
    source = Checkpoint()
    directory = source.write(tmp_path / "in")
    write_safetensors(directory / "model.safetensors", source.tensors, **{C_FC: lie})
    refused(directory, errors.CheckpointError, ["model.safetensors", "transformer.", words])


@pytest.mark.parametrize("length", [2**63, 2**40, 10**9])
def test_header_length_that_lies(refused, tmp_path, length):
    source = Checkpoint().write(tmp_path / "in")
    weights = source / "model.safetensors"
    weights.write_bytes(length.to_bytes(8, "little") + weights.read_bytes()[8:])
    refused(source, errors.CheckpointError, "model.safetensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_pickle_checkpoint(refused, tmp_path, name):
    source = Checkpoint().write(tmp_path / "in")
    (source / "model.safetensors").rename(source / name)
    refused(source, errors.CheckpointError, ["only safetensors is read", name, "save_pretrained"])


def test_missing_shard(refused, tmp_path):
    source = Checkpoint().write(tmp_path / "in", shards=3)
    (source / "model-00002-of-00003.safetensors").unlink()
    refused(source, errors.CheckpointError, ["model-00002-of-00003.safetensors", "missing"])


def test_shard_names_that_lead_elsewhere(refused, tmp_path):
    source = Checkpoint().write(tmp_path / "in", shards=2)
    index = {"weight_map": {"transformer.wte.weight": "../elsewhere.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(source, errors.CheckpointError, ["transformer.wte.weight", "not a file name"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "JSON"),
        ("[]", "JSON object"),
        ('{"model_type": "mamba"}', 'got "mamba". Compress a model of another type in Python'),
        ("{}", "model_type"),
        ('{"model_type": "gpt2", "n_layer": "twelve"}', "n_layer"),
        ('{"model_type": "gpt2", "n_layer": 1e99}', "n_layer"),
        ('{"model_type": "gpt2", "quantization_config": {"quant_method": "tqcompressor"}}', "already compressed"),
        ('{"model_type": "gpt2", "quantization_config": {"quant_method": "awq"}}', "quantized by awq"),
    ],
)
def test_config_json_of_something_else(refused, tmp_path, text, words):
    source = Checkpoint().write(tmp_path / "in")
    (source / "config.json").write_text(text)
    refused(source, errors.CheckpointError, ["config.json", words])


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
# What a file that should be UTF-8 holds, and the words for it.
FOREIGN = [
    (lambda text: POINTER, "a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"),
    (lambda text: b"\xef\xbb\xbf" + text.encode(), "begins with a byte order mark (BOM): save it as UTF-8 without one"),
    (lambda text: text.encode("utf-16"), "UTF-16 text: save it as UTF-8"),
    (lambda text: text.encode("utf-16-le"), "UTF-16 text"),
    (lambda text: text.encode("utf-16-be"), "UTF-16 text"),
]


@pytest.mark.parametrize(("encode", "words"), FOREIGN)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_in_another_encoding(refused, tmp_path, name, encode, words):
    source = Checkpoint().write(tmp_path / "in", shards=2)
    (source / name).write_bytes(encode((source / name).read_text()))
    refused(source, errors.CheckpointError, [name, words])
    for read in (inspect, NativeModel.from_pretrained):
        with pytest.raises(errors.CheckpointError) as caught:
            read(source)
        assert name in str(caught.value) and words in str(caught.value)


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"])
@pytest.mark.parametrize(("encode", "words"), FOREIGN)
def test_files_beside_the_weights_in_another_encoding(tmp_path, name, encode, words):
    source = Checkpoint().write(tmp_path / "in")
    (source / "vocab.json").write_text('{"a": 0}')
    (source / "merges.txt").write_text("#version: 0.2\n")
    (source / name).write_bytes(encode('{"a": 0}'))
    with pytest.raises(errors.CheckpointError) as caught:
        NativeModel.from_pretrained(source).encode("a")
    assert name in str(caught.value) and words in str(caught.value)


def test_weights_that_are_a_pointer_of_git(refused, tmp_path):
    source = Checkpoint().write(tmp_path / "in")
    (source / "model.safetensors").write_bytes(POINTER)
    refused(source, errors.CheckpointError, ["model.safetensors", "git lfs pull"])
    source = Checkpoint().write(tmp_path / "shards", shards=2)
    (source / "model-00002-of-00002.safetensors").write_bytes(POINTER)
    refused(source, errors.CheckpointError, ["model-00002-of-00002.safetensors", "git lfs pull"])


@pytest.mark.parametrize(("encode", "words"), FOREIGN)
def test_configs_in_another_encoding(refused, tmp_path, encode, words):
    path = tmp_path / "config.json"
    path.write_bytes(encode(json.dumps(config(SPECS))))
    refused(Checkpoint(), errors.ConfigError, [str(path), words], path)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model.", "_orig_mod.module."])
def test_names_that_a_wrapper_has_prefixed(refused, tmp_path, prefix):
    source = Checkpoint()
    source.tensors = {prefix + name: tensor for name, tensor in source.tensors.items()}
    words = [f"names begin with '{prefix}'", f"name.removeprefix('{prefix}')"]
    refused(source, errors.CheckpointError, words)
    with pytest.raises(errors.CheckpointError) as caught:
        NativeModel.from_pretrained(tmp_path / "in")
    assert all(word in str(caught.value) for word in words)
    # The way out is one.
    file = tmp_path / "in" / "model.safetensors"
    renamed = {name.removeprefix(prefix): tensor for name, tensor in safetensors.numpy.load_file(file).items()}
    safetensors.numpy.save_file(renamed, file, {"format": "pt"})
    NativeModel.from_pretrained(tmp_path / "in")


@pytest.mark.parametrize("module", ["attn.c_attn", "mlp.c_fc", "mlp.c_proj"])
def test_weights_in_the_orientation_of_linear_layers(refused, tmp_path, module):
    source = Checkpoint()
    name = f"transformer.h.1.{module}.weight"
    source.tensors[name] = encode(source.values(name).T)
    words = [name, "the orientation of nn.Linear", "tensor.T.contiguous()"]
    refused(source, errors.CheckpointError, words)
    with pytest.raises(errors.CheckpointError) as caught:
        NativeModel.from_pretrained(tmp_path / "in")
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "GPT2Model", "GPT2ForSequenceClassification"])
def test_a_config_without_a_model_type(refused, tmp_path, name):
    source = Checkpoint()
    del source.config["model_type"]
    source.config["architectures"] = [name]
    words = ["config.json", f"architectures says {name}", 'add the line "model_type": "gpt2"']
    refused(source, errors.CheckpointError, words)
    with pytest.raises(errors.CheckpointError) as caught:
        NativeModel.from_pretrained(tmp_path / "in")
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("mask", ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias", "h.1.attn.bias"])
def test_masks_that_the_index_does_not_list(tmp_path, mask):
    source = Checkpoint()
    expected = inspect(source.write(tmp_path / "without", shards=2), config(SPECS))
    source.add(mask, (1, 1, 6, 6), prefix="")
    folder = source.write(tmp_path / "in", shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"][mask]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert inspect(folder, config(SPECS)).parameters_after == expected.parameters_after
    NativeModel.from_pretrained(folder)


def test_compressing_twice(refused, tmp_path):
    compress_checkpoint(Checkpoint().write(tmp_path / "first"), tmp_path / "in", config(SPECS))
    refused(tmp_path / "in", errors.CheckpointError, "already compressed by tqcompressor")
    with pytest.raises(errors.CheckpointError, match="already compressed"):
        inspect(tmp_path / "in", "tq-81m")


def test_destination_that_holds_something(refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("dear diary")
    error = refused(Checkpoint(), errors.DestinationError, ["out", "not empty"], destination="out")
    assert isinstance(error, FileExistsError)
    # `overwrite` replaces checkpoints only, not other folders such as a home directory.
    refused(Checkpoint(), errors.DestinationError, "no config.json", destination="out", overwrite=True)
    assert (tmp_path / "out" / "diary.txt").read_text() == "dear diary"


def test_destination_that_is_a_file(refused, tmp_path):
    (tmp_path / "out").write_text("")
    refused(Checkpoint(), errors.DestinationError, "not a directory", destination="out", overwrite=True)
    refused(Checkpoint(), errors.TQError, "out", destination="out/below")


@pytest.mark.parametrize("destination", ["in", "link", "."])
def test_destination_that_is_or_holds_the_source(refused, tmp_path, destination):
    (tmp_path / "link").symlink_to("in")
    (tmp_path / "config.json").write_text("{}")
    refused(Checkpoint(), errors.DestinationError, "source", destination=destination, overwrite=True)


def test_destination_that_leads_nowhere(refused, tmp_path):
    (tmp_path / "broken").symlink_to("none-such")
    (tmp_path / "far").symlink_to(tmp_path / "none" / "such")
    for destination in ("broken", "broken/out", "far", "far/below/out"):
        words = ["is a symbolic link to a place that does not exist", "remove it or make its target"]
        refused(Checkpoint(), errors.DestinationError, words, destination=destination)
    for destination in ("missing/../out", "missing/..", "missing/below/../../out"):
        words = ["there is no", "missing", "before '..'"]
        refused(Checkpoint(), errors.DestinationError, words, destination=destination)


def test_full_disk(tmpfs, tmp_path):
    place = tmpfs("size=64k")
    source = Checkpoint(width=64).write(tmp_path / "in")
    with pytest.raises(errors.StorageError) as caught:
        compress_checkpoint(source, place / "out", config(SPECS))
    assert caught.value.errno == errno.ENOSPC and str(place) in str(caught.value.filename)
    assert listing(place) == []


def test_read_only_disk(tmpfs, tmp_path):
    place = tmpfs("ro")
    with pytest.raises(errors.StorageError) as caught:
        compress_checkpoint(Checkpoint().write(tmp_path / "in"), place / "out", config(SPECS))
    assert caught.value.errno == errno.EROFS and str(place) in str(caught.value.filename)


def test_mount_point_as_destination(tmpfs, tmp_path):
    place = tmpfs("size=1m")
    with pytest.raises(errors.DestinationError, match="mount point"):
        compress_checkpoint(Checkpoint().write(tmp_path / "in"), place, config(SPECS))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_directory_without_permission(refused, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    error = refused(Checkpoint(), errors.StorageError, "closed", destination="closed/out")
    assert error.errno == errno.EACCES


def test_file_size_limit(tmp_path):
    """A simulated full disk, for systems that do not allow mounting a file system: writes fail."""
    source = Checkpoint().write(tmp_path / "in")
    before = listing(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(errors.StorageError) as caught:
            compress_checkpoint(source, tmp_path / "out", config(SPECS))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG and "model.safetensors" in str(caught.value.filename)
    assert listing(tmp_path) == before
