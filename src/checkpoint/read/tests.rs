use serde_json::json;

use std::fs;

use super::super::files::INDEX_FILE;
use super::super::testing::Source;
use super::*;

/// Writes a tiny checkpoint after `change`, and the words with which it is refused.
fn refusal(change: impl FnOnce(&mut Source)) -> String {
    let directory = tempfile::tempdir().unwrap();
    let mut source = Source::tiny("transformer.", Float::F32);
    change(&mut source);
    source.write(directory.path());
    Checkpoint::open(directory.path()).unwrap_err().to_string()
}

#[test]
fn one_file_and_shards_read_the_same_in_model_order() {
    let directory = tempfile::tempdir().unwrap();
    let mut source = Source::tiny("", Float::Bf16);
    source.add("h.0.attn.bias", Float::F32, &[1, 1, 6, 6]);
    source.write(&directory.path().join("one"));
    source.write_sharded(&directory.path().join("two"));
    let one = Checkpoint::open(&directory.path().join("one")).unwrap();
    let two = Checkpoint::open(&directory.path().join("two")).unwrap();
    assert_eq!(one.tensors().keys().collect::<Vec<_>>(), two.tensors().keys().collect::<Vec<_>>());
    assert_eq!(one.tensors().keys().next().unwrap(), "wte.weight");
    assert!(!one.tensors().contains_key("h.0.attn.bias"), "masks are no weights");
    for (name, tensor) in one.tensors() {
        assert_eq!(one.bytes(tensor), two.bytes(&two.tensors()[name]), "{name}");
        let before = one.bytes(tensor).to_vec();
        one.release(tensor);
        assert_eq!(one.bytes(tensor), before, "released pages come back");
    }
    assert!(two.weight_bytes() > one.weight_bytes() && one.tied());
}

#[test]
fn a_linear_weight_is_transposed_and_a_fused_one_is_cut() {
    let directory = tempfile::tempdir().unwrap();
    let mut source = Source::tiny("transformer.", Float::F16);
    source.add("score.weight", Float::F16, &[3, 8]);
    source.write(directory.path());
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    for (name, kind) in [("score.weight", Kind::Linear), ("transformer.h.1.attn.c_attn.weight", Kind::Conv1d)] {
        let tensor = &checkpoint.tensors()[name];
        let mut stored = vec![0.0; tensor.elements()];
        Float::F16.upcast(checkpoint.bytes(tensor), &mut stored);
        for matrix in Matrix::all_of(name, &checkpoint.family().bare(name), &tensor.shape, kind).unwrap() {
            let values = checkpoint.matrix(&matrix).unwrap();
            for i in 0..matrix.rows {
                for j in 0..matrix.columns {
                    let at = if kind == Kind::Linear { j * 8 + i } else { i * 24 + matrix.first_column + j };
                    assert_eq!(values[i * matrix.columns + j], stored[at]);
                }
            }
        }
    }
}

#[test]
fn non_finite_values_are_named_by_row_and_column() {
    let directory = tempfile::tempdir().unwrap();
    let mut source = Source::tiny("transformer.", Float::F32);
    source.tensor("transformer.wte.weight").3[(3 * 8 + 5) * 4..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    source.write(directory.path());
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    checkpoint.check_finite("transformer.wpe.weight").unwrap();
    let message = checkpoint.check_finite("transformer.wte.weight").unwrap_err().to_string();
    assert!(message.contains("'transformer.wte.weight'") && message.contains("NaN at row 3, column 5"), "{message}");
}

#[test]
fn what_does_not_fit_the_config_is_refused_by_name() {
    type Change<'a> = &'a dyn Fn(&mut Source);
    let cases: [(Change<'_>, &str); 12] = [
        (&|s| s.tensors.retain(|t| !t.0.ends_with("h.1.mlp.c_fc.weight")), "'h.1.mlp.c_fc.weight' is missing"),
        (&|s| s.config["vocab_size"] = json!(21), "'transformer.wte.weight': config.json asks for shape [21, 8]"),
        (&|s| s.config["n_layer"] = json!(1), "'transformer.h.1."),
        (&|s| s.config["n_layer"] = json!("2"), "n_layer"),
        (&|s| s.config["model_type"] = json!("mamba"), "got \"mamba\". Compress a model of another type in Python"),
        (&|s| s.config["quantization_config"] = json!({"quant_method": "tqcompressor"}), "already compressed"),
        (&|s| s.config["quantization_config"] = json!({"quant_method": "gptq"}), "quantized by gptq"),
        (&|s| s.config["tie_word_embeddings"] = json!(false), "'lm_head.weight' is missing"),
        (&|s| s.config = json!([]), "expected a JSON object"),
        (&|s| s.config["model_type"] = json!(null), "add the line \"model_type\": \"gpt2\""),
        (
            &|s| {
                s.config["model_type"] = json!(null);
                s.config["architectures"] = json!(["MambaForCausalLM"]);
            },
            "got \"none\". Compress a model of another type in Python",
        ),
        (&|s| s.tensor("transformer.h.1.mlp.c_fc.weight").2.reverse(), "the orientation of nn.Linear"),
    ];
    for (change, words) in cases {
        let message = refusal(change);
        assert!(message.contains(words), "{message}");
    }
}

#[test]
fn a_prefix_that_a_wrapper_has_added_is_named_with_the_way_to_strip_it() {
    for wrapper in ["_orig_mod.", "module.", "model.", "_orig_mod.module."] {
        for base in ["", "transformer."] {
            let message = refusal(|source| {
                for tensor in &mut source.tensors {
                    tensor.0 = format!("{wrapper}{base}{}", tensor.0.strip_prefix("transformer.").unwrap());
                }
            });
            assert!(message.contains(&format!("names begin with '{wrapper}'")), "{message}");
            assert!(message.contains(&format!("name.removeprefix('{wrapper}')")), "{message}");
        }
    }
    let message = refusal(|source| source.tensors.retain(|tensor| tensor.0 != "transformer.wte.weight"));
    assert!(message.contains("'wte.weight' is missing") && !message.contains("prefix"), "{message}");
}

#[test]
fn a_tied_head_is_compared_when_weights_are_used_and_its_ends_for_a_list_of_names() {
    let directory = tempfile::tempdir().unwrap();
    let mut source = Source::tiny("transformer.", Float::F32);
    // Several of the pieces that are compared at a time.
    let (rows, width) = (8192, 8);
    source.config["vocab_size"] = json!(rows);
    source.tensors.retain(|tensor| !tensor.0.ends_with("wte.weight"));
    source.add("transformer.wte.weight", Float::F32, &[rows, width]);
    let embedding = source.tensor("transformer.wte.weight").3.clone();
    for (row, seen) in [(0, true), (rows / 2, false), (rows - 1, true)] {
        let mut bytes = embedding.clone();
        bytes[row * width * 4 + 3] ^= 0x80;
        source.tensors.retain(|tensor| tensor.0 != "lm_head.weight");
        source.tensors.push(("lm_head.weight".into(), Dtype::F32, vec![rows, width], bytes));
        source.write(directory.path());
        let whole = Checkpoint::open(directory.path()).unwrap();
        assert!(whole.warning.get().is_none(), "opening reads no weights");
        assert!(!whole.tied() && whole.warning().is_some());
        let names = Checkpoint::open_for_names(directory.path()).unwrap();
        assert_eq!(names.tied(), !seen, "row {row}");
        assert!(Checkpoint::open_any(directory.path()).unwrap().warning.get().is_none());
    }
}

#[test]
fn a_head_beside_the_embedding_is_tied_only_if_the_values_are_equal() {
    let directory = tempfile::tempdir().unwrap();
    let opened = |source: &Source| {
        source.write(directory.path());
        let checkpoint = Checkpoint::open(directory.path()).unwrap();
        (checkpoint.tied(), checkpoint.warning().map(str::to_owned))
    };
    for float in [Float::F32, Float::F16, Float::Bf16] {
        let mut source = Source::tiny("transformer.", float);
        let embedding = source.tensor("transformer.wte.weight").3.clone();
        let mut values = vec![0.0; embedding.len() / float.size()];
        float.upcast(&embedding, &mut values);
        for head in [Float::F32, float] {
            let mut bytes = Vec::new();
            head.downcast(&values, &mut bytes).unwrap();
            source.tensors.retain(|tensor| tensor.0 != "lm_head.weight");
            source.tensors.push(("lm_head.weight".into(), head.dtype(), vec![20, 8], bytes));
            assert_eq!(opened(&source), (true, None));
            // The last value alone differs.
            let last = source.tensor("lm_head.weight").3.last_mut().unwrap();
            *last ^= 0x80;
            let (tied, warning) = opened(&source);
            assert!(!tied && warning.unwrap().contains("'lm_head.weight' differs from 'transformer.wte.weight'"));
            source.config["tie_word_embeddings"] = json!(false);
            assert_eq!(opened(&source), (false, None));
            source.config["tie_word_embeddings"] = json!(true);
        }
    }
}

#[test]
fn masks_may_be_in_a_shard_or_in_its_index_alone() {
    let root = tempfile::tempdir().unwrap();
    let mut source = Source::tiny("transformer.", Float::F32);
    source.write_sharded(root.path());
    let expected: Vec<_> = Checkpoint::open(root.path()).unwrap().tensors().keys().cloned().collect();
    let index = fs::read(root.path().join(INDEX_FILE)).unwrap();
    let masks = ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias", "transformer.h.1.attn.bias"];
    for mask in masks {
        source.add(mask, Float::F32, &[1, 1, 6, 6]);
    }
    source.write_sharded(root.path());
    let read = || Checkpoint::open(root.path()).map(|read| read.tensors().keys().cloned().collect::<Vec<_>>());
    assert_eq!(read().unwrap(), expected);
    // The index of before lists no mask, and puts some tensors in the other shard.
    let mut listed: Value = serde_json::from_slice(&fs::read(root.path().join(INDEX_FILE)).unwrap()).unwrap();
    for mask in masks {
        listed["weight_map"].as_object_mut().unwrap().remove(mask).unwrap();
    }
    fs::write(root.path().join(INDEX_FILE), listed.to_string()).unwrap();
    assert_eq!(read().unwrap(), expected);
    // An index that lists masks which no shard holds.
    for tensor in masks {
        source.tensors.retain(|stored| stored.0 != tensor);
    }
    source.write_sharded(root.path());
    let mut listed: Value = serde_json::from_slice(&index).unwrap();
    for mask in masks {
        listed["weight_map"][mask] = json!("model-00001-of-00002.safetensors");
    }
    fs::write(root.path().join(INDEX_FILE), listed.to_string()).unwrap();
    assert_eq!(read().unwrap(), expected);
}

#[test]
fn damaged_directories_are_refused_in_words() {
    let root = tempfile::tempdir().unwrap();
    let source = Source::tiny("transformer.", Float::F32);
    let damaged = |change: &dyn Fn(&Path)| {
        let directory = root.path().join("sharded");
        source.write_sharded(&directory);
        change(&directory);
        let message = Checkpoint::open(&directory).unwrap_err().to_string();
        fs::remove_dir_all(directory).unwrap();
        message
    };
    let shard = "model-00002-of-00002.safetensors";
    type Change<'a> = &'a dyn Fn(&Path);
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n";
    let utf16: Vec<u8> = "{}".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let cases: [(Change<'_>, &str); 13] = [
        (&|d| fs::write(d.join(shard), pointer).unwrap(), "a Git LFS pointer"),
        (&|d| fs::write(d.join(INDEX_FILE), pointer).unwrap(), "a Git LFS pointer"),
        (&|d| fs::write(d.join("config.json"), "\u{feff}{}").unwrap(), "byte order mark"),
        (&|d| fs::write(d.join("config.json"), &utf16).unwrap(), "UTF-16"),
        (&|d| fs::write(d.join(INDEX_FILE), &utf16).unwrap(), "UTF-16"),
        (&|d| fs::remove_file(d.join(shard)).unwrap(), "this shard is missing"),
        (
            &|d| fs::copy(d.join("model-00001-of-00002.safetensors"), d.join(shard)).map(drop).unwrap(),
            "is missing; the index puts it here",
        ),
        (&|d| File::options().write(true).open(d.join(shard)).unwrap().set_len(900).unwrap(), "truncated"),
        (&|d| fs::write(d.join(INDEX_FILE), "{}").unwrap(), "weight_map"),
        (
            &|d| fs::write(d.join(INDEX_FILE), r#"{"weight_map":{"a":"../x.safetensors"}}"#).unwrap(),
            "tensor 'a': its shard",
        ),
        (&|d| fs::remove_file(d.join("config.json")).unwrap(), "no such file"),
        (&|d| fs::write(d.join("config.json"), "{").unwrap(), "expected a JSON object"),
        (&|d| fs::remove_file(d.join(INDEX_FILE)).unwrap(), "found only model-00001-of-00002.safetensors"),
    ];
    for (change, words) in cases {
        let message = damaged(change);
        assert!(message.contains(words), "{message}");
    }
}

#[test]
fn pickles_and_other_places_are_refused_with_advice() {
    let root = tempfile::tempdir().unwrap();
    let message = || Checkpoint::open(root.path()).unwrap_err().to_string();
    assert!(message().contains("found no weights"));
    fs::write(root.path().join("pytorch_model.bin"), b"").unwrap();
    assert!(
        message().contains("only safetensors is read, found pytorch_model.bin")
            && message().contains("save_pretrained")
    );
    let absent = Checkpoint::open(&root.path().join("absent")).unwrap_err().to_string();
    assert!(absent.contains("no such directory"), "{absent}");
    let file = Checkpoint::open(&root.path().join("pytorch_model.bin")).unwrap_err().to_string();
    assert!(file.contains("expected a directory"), "{file}");
}
