"""Compressed checkpoints in transformers: each pitfall in a process of its own, grouped where the set-up is the same.

Numbers in names are those of the pitfalls that a naive integration falls into.
"""

import pytest
from helpers.processes import run_script

# What most scripts begin with: a dense and a compressed checkpoint, and the logits of the latter.
PREPARE = """
import sys, hashlib, pathlib, torch, transformers, tqcompressor
from tqcompressor.in_place import compress
from helpers.models import CONFIG, agree, first_output, some_ids, tiny_model
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

def digest(directory):
    return hashlib.sha256(pathlib.Path(directory, "model.safetensors").read_bytes()).hexdigest()
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A directory with checkpoints `dense`, `compressed` (tied), `untied`, `base` (no head), and what they give."""
    import torch
    from helpers.models import CONFIG, first_output, some_ids, tiny_model
    from tqcompressor.in_place import compress

    directory = tmp_path_factory.mktemp("checkpoints")
    model = tiny_model()
    base = tiny_model("GPT2Model")
    base.load_state_dict(model.transformer.state_dict())
    untied = tiny_model(tie_word_embeddings=False)
    untied.transformer.load_state_dict(base.state_dict())
    model.save_pretrained(directory / "dense")
    with_head = CONFIG.replace(specs={**CONFIG.specs, "lm_head": CONFIG.specs["wte"]})
    for name, each, config in [("compressed", model, CONFIG), ("untied", untied, with_head), ("base", base, CONFIG)]:
        compress(each, config)
        each.save_pretrained(directory / name)
        torch.save(first_output(each, some_ids()), directory / f"{name}.pt")
    return directory


@pytest.mark.parametrize(
    "imports",
    [
        "import tqcompressor, transformers",
        "import transformers, tqcompressor",
        "import transformers.modeling_utils, tqcompressor",
        "import tqcompressor.transformers_integration as integration; integration.register()",
    ],
)
def test_loading_works_whichever_is_imported_first(checkpoints, imports):
    run_script(
        imports
        + """
import sys, torch
from transformers import AutoModelForCausalLM
from helpers.models import agree, first_output, some_ids
model = AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/compressed")
assert agree(first_output(model, some_ids()), torch.load(f"{sys.argv[1]}/compressed.pt"))
""",
        checkpoints,
    )


def test_importing_the_package_imports_neither_torch_nor_transformers():
    output = run_script(
        """
import sys, types, tqcompressor
assert not {"torch", "transformers", "safetensors", "tqdm"} & sys.modules.keys()
from tqcompressor import _import_hook
_import_hook.install()
ours = lambda: [finder for finder in sys.meta_path if type(finder).__module__ == "tqcompressor._import_hook"]
assert len(ours()) == 1
import transformers.quantizers.auto as registry
# The import system is as it was, and so is the module.
assert not ours()
assert "tqcompressor" in registry.AUTO_QUANTIZER_MAPPING
assert type(registry.__loader__).__name__ == type(registry.__spec__.loader).__name__ == "SourceFileLoader"
# A version of transformers that does not fit is told of, and works.
del sys.modules["tqcompressor.transformers_integration"], tqcompressor.transformers_integration
del registry.register_quantizer
_import_hook.install()
print("still here")
"""
    )
    assert "cannot register with this version of transformers" in output and "still here" in output


def test_4_without_the_package_loading_raises_and_names_it(checkpoints):
    output = run_script(
        """
import sys, transformers
for cls, name in [("AutoModelForCausalLM", "compressed"), ("AutoModel", "compressed"), ("AutoModel", "base")]:
    try:
        getattr(transformers, cls).from_pretrained(f"{sys.argv[1]}/{name}")
    except RuntimeError as error:
        print("raised", error)
assert "tqcompressor" not in sys.modules
""",
        checkpoints,
    )
    assert output.count("raised") == output.count("MISMATCH   |") == 3
    assert "wte.weight" in output and "Unknown quantization type, got tqcompressor" in output


def test_saving_round_trips_bit_for_bit_in_one_file_or_many(checkpoints, tmp_path):
    """Pitfalls 2 (tied head), 3 (buffers), 8 (metadata)."""
    run_script(
        PREPARE
        + """
from safetensors import safe_open
directory, out = sys.argv[1:]
for name in ("compressed", "untied", "base"):
    model = (AutoModel if name == "base" else AutoModelForCausalLM).from_pretrained(f"{directory}/{name}")
    model.save_pretrained(f"{out}/{name}")
    assert digest(f"{out}/{name}") == digest(f"{directory}/{name}"), name
    configs = [pathlib.Path(parent, name, "config.json").read_text() for parent in (directory, out)]
    assert configs[0] == configs[1], name
with safe_open(f"{directory}/compressed/model.safetensors", "pt") as file:
    assert file.metadata() == {"format": "pt"}
    shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    assert file.get_tensor("transformer.wte.weight").tolist() == [0]
assert not any(key.startswith("lm_head") for key in shapes)
assert [key for key, shape in shapes.items() if shape == (1,)] == ["transformer.wte.weight"]
assert not any(104 in shape for key, shape in shapes.items() if not key.endswith("_permutation"))

model = AutoModelForCausalLM.from_pretrained(f"{directory}/compressed")
model.save_pretrained(f"{out}/sharded", max_shard_size="20KB")
assert len(list(pathlib.Path(out, "sharded").glob("*.safetensors"))) > 2
model = AutoModelForCausalLM.from_pretrained(f"{out}/sharded")
assert agree(first_output(model, some_ids()), torch.load(f"{directory}/compressed.pt"))
model.save_pretrained(f"{out}/whole")
assert digest(f"{out}/whole") == digest(f"{directory}/compressed")
""",
        checkpoints,
        tmp_path,
    )


def test_1_2_3_and_7_loading_into_every_class_says_nothing_and_is_exact(checkpoints):
    run_script(
        PREPARE
        + """
directory = sys.argv[1]
logits, hidden = (torch.load(f"{directory}/{name}.pt") for name in ("compressed", "base"))
for name, cls, expected in [
    ("compressed", AutoModelForCausalLM, logits),
    ("untied", AutoModelForCausalLM, torch.load(f"{directory}/untied.pt")),
    ("compressed", AutoModel, hidden),
    ("base", AutoModel, hidden),
    ("base", AutoModelForCausalLM, logits),
]:
    model, info = cls.from_pretrained(f"{directory}/{name}", output_loading_info=True)
    assert not any(info.values()), (name, cls, info)
    assert agree(first_output(model, some_ids()), expected), (name, cls)
    assert not model.training and all(parameter.requires_grad for parameter in model.parameters())

# A head that the checkpoint has not, and one that the class has not.
for name in ("compressed", "base", "untied"):
    model, info = AutoModelForSequenceClassification.from_pretrained(
        f"{directory}/{name}", num_labels=3, output_loading_info=True
    )
    assert info["missing_keys"] == {"score.weight"}, info
    assert agree(first_output(model.transformer, some_ids()), hidden)
    assert torch.isfinite(model.score.weight).all() and model.score.weight.std() > 0
    assert not any(spec.startswith("lm_head") for spec in model.config.quantization_config.specs)

# Nothing that transformers does later goes through the `weight` that modules do not have.
model = AutoModelForCausalLM.from_pretrained(f"{directory}/compressed")
model.init_weights()
model.tie_weights()
assert agree(first_output(model, some_ids()), logits)
assert model.lm_head.A is model.transformer.wte.A
model = AutoModelForCausalLM.from_pretrained(f"{directory}/compressed", config=model.config)
assert agree(first_output(model, some_ids()), logits)
from transformers.quantizers.auto import AutoQuantizationConfig
assert AutoQuantizationConfig.from_pretrained(f"{directory}/compressed").specs == model.config.quantization_config.specs
""",
        checkpoints,
    )


def test_6_dtypes_generation_pipeline_compiling_and_training(checkpoints, tmp_path):
    run_script(
        PREPARE
        + """
directory, out = sys.argv[1:]
logits, ids = torch.load(f"{directory}/compressed.pt"), some_ids()
load = lambda **options: AutoModelForCausalLM.from_pretrained(f"{directory}/compressed", **options)
largest = logits.abs().max()
for dtype in (torch.bfloat16, torch.float16):
    for model in (load().to(dtype), load(dtype=dtype), load().half().float().to(dtype)):
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert model.transformer.wte.input_permutation.dtype == torch.int64
        assert (first_output(model, ids).float() - logits).abs().max() < 0.1 * largest
    model.save_pretrained(f"{out}/{dtype}")
    again, expected = AutoModelForCausalLM.from_pretrained(f"{out}/{dtype}").state_dict(), model.state_dict()
    assert again.keys() == expected.keys() and all(torch.equal(again[name], expected[name]) for name in again)

model = load()
for options in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
    options["attention_mask"] = torch.ones_like(ids)
    cached, plain = (model.generate(ids, max_new_tokens=12, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)
with torch.autocast("cpu", dtype=torch.bfloat16):
    assert (first_output(model, ids) - logits).abs().max() < 0.1 * largest
compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
with torch.no_grad():
    assert torch.allclose(compiled(ids, use_cache=False).logits, logits, atol=1e-4 * largest)

from helpers.tokenizer import save_tokenizer
model.save_pretrained(f"{out}/text")
save_tokenizer(f"{out}/text")
generator = transformers.pipeline("text-generation", f"{out}/text")
assert type(generator.model.transformer.wte).__name__ == "KroneckerEmbedding"
(result,) = generator("a b c", max_new_tokens=4, do_sample=False)
assert result["generated_text"].startswith("a b c") and len(result["generated_text"]) > 5

# Every factor learns, tied ones from both ends, with gradient checkpointing and through Trainer.
model.train()
model.gradient_checkpointing_enable()
model(ids, labels=ids).loss.backward()
assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.parameters())
options = {"max_steps": 2, "save_steps": 2, "per_device_train_batch_size": 2}
arguments = transformers.TrainingArguments(f"{out}/run", report_to=[], use_cpu=True, disable_tqdm=True, **options)
data = [{"input_ids": row, "labels": row} for row in ids] * 2
before = model.transformer.wte.A.detach().clone()
trainer = transformers.Trainer(model, arguments, train_dataset=data)
trainer.train()
assert not torch.equal(model.transformer.wte.A, before) and model.lm_head.A is model.transformer.wte.A
again = AutoModelForCausalLM.from_pretrained(f"{out}/run/checkpoint-2").eval()
assert agree(first_output(again, ids), first_output(model.eval(), ids))
""",
        checkpoints,
        tmp_path,
    )


def test_dequantize_gives_a_stock_model_that_needs_no_package(checkpoints, tmp_path):
    run_script(
        PREPARE
        + """
directory, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(f"{directory}/compressed")
dense = model.dequantize()
dense.save_pretrained(f"{out}/stock")
half = AutoModelForCausalLM.from_pretrained(f"{directory}/untied").dequantize(torch.bfloat16)
assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
half.save_pretrained(f"{out}/half")
assert half.lm_head.weight is not half.transformer.wte.weight
""",
        checkpoints,
        tmp_path,
    )
    run_script(
        """
import sys, torch, json, pathlib, transformers
directory, out = sys.argv[1:]
model, info = transformers.AutoModelForCausalLM.from_pretrained(f"{out}/stock", output_loading_info=True)
assert not any(info.values()) and "tqcompressor" not in sys.modules
assert "quantization_config" not in json.loads(pathlib.Path(out, "stock", "config.json").read_text())
stock = transformers.AutoModelForCausalLM.from_pretrained(f"{directory}/dense")
assert [type(module) for module in model.modules()] == [type(module) for module in stock.modules()]
ids = torch.randint(1, 104, (2, 9), generator=torch.Generator().manual_seed(0))
logits = torch.load(f"{directory}/compressed.pt")
assert torch.allclose(model(ids).logits, logits, atol=1e-4 * logits.abs().max())
half = transformers.AutoModelForCausalLM.from_pretrained(f"{out}/half")
assert half.dtype == torch.bfloat16
logits = torch.load(f"{directory}/untied.pt")
assert (half(ids).logits - logits).abs().max() < 0.1 * logits.abs().max()
""",
        checkpoints,
        tmp_path,
    )


def test_compressing_while_loading(checkpoints, tmp_path):
    run_script(
        PREPARE
        + """
directory, out = sys.argv[1:]
for config in (CONFIG, CONFIG.to_dict()):
    model = AutoModelForCausalLM.from_pretrained(f"{directory}/dense", quantization_config=config)
    assert agree(first_output(model, some_ids()), torch.load(f"{directory}/compressed.pt"))
model.save_pretrained(f"{out}/saved")
assert digest(f"{out}/saved") == digest(f"{directory}/compressed")
assert model.half().dequantize().dtype == torch.float16
# A config beside one that the checkpoint has already is ignored, with a warning.
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = AutoModelForCausalLM.from_pretrained(
        f"{directory}/compressed", quantization_config=tqcompressor.TQConfig()
    )
assert any("already has a `quantization_config`" in str(warning.message) for warning in caught)
assert agree(first_output(model, some_ids()), torch.load(f"{directory}/compressed.pt"))
from tqcompressor.errors import ConfigError
try:
    AutoModelForCausalLM.from_pretrained(
        f"{directory}/dense", quantization_config=tqcompressor.TQConfig({"nothing": {"block": [1, 4], "rank": 1}})
    )
except ConfigError as error:
    assert "nothing" in str(error)
else:
    raise AssertionError("no error")
try:
    config = transformers.LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    transformers.LlamaForCausalLM(config).save_pretrained(f"{out}/llama")
    AutoModelForCausalLM.from_pretrained(f"{out}/llama", quantization_config=CONFIG)
except ConfigError as error:
    assert '"wte" matches no matrix' in str(error)
else:
    raise AssertionError("no error")
""",
        checkpoints,
        tmp_path,
    )


def test_devices_and_memory(checkpoints, tmp_path):
    run_script(
        PREPARE
        + """
directory, out = sys.argv[1:]
logits = torch.load(f"{directory}/compressed.pt")
for device_map in ("cpu", "auto", {"": "cpu"}):
    model = AutoModelForCausalLM.from_pretrained(f"{directory}/compressed", device_map=device_map)
    assert agree(first_output(model, some_ids()), logits)
model = AutoModelForCausalLM.from_pretrained(f"{directory}/compressed", device_map="meta")
assert all(tensor.is_meta for tensor in model.state_dict().values())
assert model.lm_head(model.transformer.wte(some_ids().to("meta"))).shape == logits.shape
assert type(model.lm_head).__name__ == "KroneckerHead" and model.lm_head.A is model.transformer.wte.A
with torch.device("meta"):
    model = AutoModelForCausalLM.from_pretrained(f"{directory}/compressed", device_map="cpu")
assert agree(first_output(model, some_ids()), logits)
# Blocks offloaded to disk are brought back when they run.
blocks = {"transformer.wte": "cpu", "lm_head": "cpu", "transformer.wpe": "cpu", "transformer.ln_f": "cpu",
          "transformer.drop": "cpu", "transformer.h.0": "cpu", "transformer.h.1": "disk"}
model = AutoModelForCausalLM.from_pretrained(f"{directory}/compressed", device_map=blocks, offload_folder=out)
assert agree(first_output(model, some_ids()), logits)
""",
        checkpoints,
        tmp_path,
    )


def test_loading_takes_no_more_memory_than_the_checkpoint_and_200_mb(tmp_path):
    import torch
    from helpers.models import tiny_model
    from tqcompressor.in_place import compress

    model = tiny_model(n_embd=768, n_layer=4, vocab_size=50256)
    compress(model, {"specs": {"wte": {"block": [1, 4], "rank": 1, "permute": "none"}}}, effort="fast")
    model.save_pretrained(tmp_path)
    assert model.dtype == torch.float32
    del model
    output = run_script(
        """
import sys, os, torch, transformers, tqcompressor, tqcompressor.transformers_integration, pathlib
import transformers.models.gpt2.modeling_gpt2
from transformers import AutoModelForCausalLM

def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

before = peak()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print("PEAK", peak() - before, pathlib.Path(sys.argv[1], "model.safetensors").stat().st_size)
""",
        tmp_path,
    )
    used, size = map(int, output.split("PEAK")[1].split()[:2])
    assert size > 150e6
    assert used < size + 200e6


def test_5_checkpoints_that_are_not_what_their_config_says(checkpoints, tmp_path):
    """Missing factors, factors of other shapes, too many of them, indices that permute nothing, newer formats."""
    run_script(
        PREPARE
        + """
import json, shutil
from safetensors.torch import load_file, save_file
from tqcompressor.errors import CheckpointError, ConfigError
directory, out = sys.argv[1:]

def altered(change_tensors=lambda tensors: None, change_config=lambda config: None):
    target = pathlib.Path(out, "altered")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(f"{directory}/compressed", target)
    tensors = load_file(target / "model.safetensors")
    change_tensors(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    change_config(config)
    (target / "config.json").write_text(json.dumps(config))
    return target

def refused(error_type, *words, load=lambda target: AutoModelForCausalLM.from_pretrained(target), **changes):
    try:
        load(altered(**changes))
    except error_type as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError(words)

for name in ("wte.A", "wte.input_permutation", "h.0.attn.c_attn.k.B", "h.1.mlp.c_fc.output_permutation",
             "h.1.mlp.c_fc.bias"):
    drop = lambda tensors: tensors.pop(f"transformer.{name}")
    refused(CheckpointError, name, "missing", change_tensors=drop)
    # The same without headers to look at.
    refused(
        CheckpointError, name, "missing",
        load=lambda target: transformers.GPT2LMHeadModel.from_pretrained(
            None, config=transformers.AutoConfig.from_pretrained(target),
            state_dict=load_file(target / "model.safetensors")),
        change_tensors=drop)
# The guard is not missed.
altered(change_tensors=lambda tensors: tensors.pop("transformer.wte.weight"))
AutoModelForCausalLM.from_pretrained(f"{out}/altered")

def lies(error_type, *words, change):
    refused(error_type, *words, change_config=lambda config: change(config["quantization_config"]["specs"]))

lies(CheckpointError, "h.1.mlp.c_fc", "does not ask", change=lambda s: s.pop("h.1.mlp.c_fc"))
lies(CheckpointError, "h.0.mlp.c_fc.A", "missing", change=lambda s: s.update({"h.0.mlp.c_fc": s["h.1.mlp.c_fc"]}))
lies(CheckpointError, "h.1.mlp.c_fc.A", "shape", change=lambda s: s["h.1.mlp.c_fc"].update(rank=3))
lies(CheckpointError, "wte.A", "shape", change=lambda s: s["wte"].update(block=[4, 2]))
lies(ConfigError, "h.7.mlp.c_fc", change=lambda s: s.update({"h.7.mlp.c_fc": s["h.1.mlp.c_fc"]}))
lies(ConfigError, "h.*.mlp.c_fc", "patterns", change=lambda s: s.update({"h.*.mlp.c_fc": s["wte"]}))
lies(ConfigError, "c_attn", "all or none", change=lambda s: s.pop("h.0.attn.c_attn.q"))
for key, value, message in [("format_version", 3, "newer tqcompressor (format 3)"), ("blok", 2, "blok")]:
    refused(ConfigError, message, change_config=lambda config: config["quantization_config"].update({key: value}))
for values in (0, 1000):
    refused(CheckpointError, "wte.input_permutation", "not a permutation",
            change_tensors=lambda tensors: tensors["transformer.wte.input_permutation"].fill_(values))
""",
        checkpoints,
        tmp_path,
    )
