use std::collections::BTreeMap;
use std::fs;

use safetensors::Dtype;
use serde_json::json;

use super::*;
use crate::checkpoint::testing::Source;

const SPECS: &str = r#"{"specs":{
    "wte":{"block":[1,4],"rank":2,"permute":"columns"},
    "h.0.attn.c_attn":{"block":[2,4],"rank":3},
    "h.1.mlp.c_fc":{"block":[2,4],"rank":8,"permute":"rows"},
    "h.0.mlp.c_fc":{"rank":5},
    "h.0.mlp.c_proj":{"rank":3},
    "wpe":{"rank":4},
    "score":{"block":[4,1],"rank":4,"permute":"none"}},"effort":"fast"}"#;

fn source(prefix: &str, float: Float) -> Source {
    let mut source = Source::tiny(prefix, float);
    source.add("score.weight", float, &[3, 8]);
    source
}

fn compress(from: &Path, to: &Path, options: &Options) -> Result<Report> {
    let config = TQConfig::from_json(SPECS).unwrap();
    compress_checkpoint(
        &Checkpoint::open(from)?,
        to,
        &config,
        Fits::Made(&Calibration::new()),
        options,
        &Progress::default(),
    )
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn tensors(directory: &Path) -> Tensors {
    let mut tensors = BTreeMap::new();
    for name in names(directory).iter().filter(|name| name.ends_with(".safetensors")) {
        let file = fs::read(directory.join(name)).unwrap();
        for (name, view) in safetensors::SafeTensors::deserialize(&file).unwrap().tensors() {
            tensors.insert(name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()));
        }
    }
    tensors
}

fn floats(tensors: &Tensors, name: &str) -> Vec<f32> {
    let (dtype, shape, bytes) = &tensors[name];
    let mut values = vec![0.0; shape.iter().product()];
    Float::from_dtype(*dtype).unwrap().upcast(bytes, &mut values);
    values
}

fn indices(tensors: &Tensors, name: &str) -> Option<Vec<usize>> {
    let (dtype, _, bytes) = tensors.get(name)?;
    assert_eq!(*dtype, Dtype::I64);
    Some(bytes.as_chunks::<8>().0.iter().map(|bytes| i64::from_le_bytes(*bytes) as usize).collect())
}

/// The dense in × out matrix that a stored term computes with, from the definition of the forward pass.
fn dense(tensors: &Tensors, term: &str, kind: Kind) -> Vec<f32> {
    let shape = |which| tensors[&format!("{term}.{which}")].1.clone();
    let values = |which| floats(tensors, &format!("{term}.{which}"));
    let (m, n, permuted): (_, _, Box<dyn Fn(usize, usize) -> f32>) = if tensors.contains_key(&format!("{term}.A")) {
        let ([rank, m1, n1], [_, m2, n2]) = (shape("A")[..].try_into().unwrap(), shape("B")[..].try_into().unwrap());
        let (a, b) = (values("A"), values("B"));
        let entry = move |i: usize, j: usize| {
            let product = |k| a[(k * m1 + i / m2) * n1 + j / n2] * b[(k * m2 + i % m2) * n2 + j % n2];
            (0..rank).map(product).sum()
        };
        (m1 * m2, n1 * n2, Box::new(entry))
    } else {
        let ([rows, rank], [_, columns]) =
            (shape("left")[..].try_into().unwrap(), shape("right")[..].try_into().unwrap());
        let (left, right) = (values("left"), values("right"));
        let on_rows = tensors.contains_key(&format!("{term}.input_permutation"));
        let product = move |i: usize, j: usize| (0..rank).map(|k| left[i * rank + k] * right[k * columns + j]).sum();
        let (left, right) = (values("left"), values("right"));
        let entry = move |i: usize, j: usize| match on_rows {
            true if i < rank => right[i * columns + j],
            true => product(i - rank, j),
            false if j < rank => left[i * rank + j],
            false => product(i, j - rank),
        };
        (rows + if on_rows { rank } else { 0 }, columns + if on_rows { 0 } else { rank }, Box::new(entry))
    };
    let rows = indices(tensors, &format!("{term}.input_permutation")).unwrap_or_else(|| (0..m).collect());
    let columns = indices(tensors, &format!("{term}.output_permutation")).unwrap_or_else(|| (0..n).collect());
    let mut dense = vec![0.0; m * n];
    for (position, &gathered) in rows.iter().enumerate() {
        for (j, &from) in columns.iter().enumerate() {
            // flat[output_permutation[j]] is output j; x[input_permutation[position]] goes in at `position`, and an
            // embedding looks up position input_permutation[id].
            let (at, row) = if kind == Kind::Embedding { (gathered, position) } else { (position, gathered) };
            dense[row * n + j] = permuted(at, from);
        }
    }
    dense
}

#[test]
fn stored_factors_stand_for_their_matrices_and_the_rest_is_bit_for_bit() {
    for prefix in ["transformer.", ""] {
        let root = tempfile::tempdir().unwrap();
        let (from, to) = (root.path().join("from"), root.path().join("to"));
        source(prefix, Float::F32).write(&from);
        let report = compress(&from, &to, &Options::default()).unwrap();
        let (before, after) = (tensors(&from), tensors(&to));
        let checkpoint = Checkpoint::open(&from).unwrap();
        let plan = Plan::for_checkpoint(&checkpoint, &TQConfig::from_json(SPECS).unwrap()).unwrap();
        assert_eq!(plan.jobs.len(), 9);
        for (job, matrix) in plan.jobs.iter().zip(&report.matrices) {
            let module = format!("{}{}", job.matrix.stored_module(), job.matrix.part());
            let dense = dense(&after, &module, job.matrix.kind);
            let exact = checkpoint.matrix(&job.matrix).unwrap();
            let energy =
                |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v) * f64::from(v)).sum::<f64>();
            let lost = energy(&mut exact.iter().zip(&dense).map(|(x, y)| x - y)) / energy(&mut exact.iter().copied());
            assert!((lost - matrix.lost_energy.unwrap()).abs() < 1e-5, "{module}: {lost} {matrix:?}");
            assert!(lost < 0.8, "{module}: {lost}");
            let (rows, columns) = match job.spec.as_kronecker() {
                Some(spec) => (spec.permute.rows(), spec.permute.columns()),
                None => (job.matrix.rows <= job.matrix.columns, job.matrix.rows > job.matrix.columns),
            };
            assert_eq!(after.contains_key(&format!("{module}.input_permutation")), rows);
            assert_eq!(after.contains_key(&format!("{module}.output_permutation")), columns);
        }
        for tensor in &report.untouched {
            assert_eq!(after[&tensor.tensor], before[&tensor.tensor]);
        }
        assert_eq!(after[&format!("{prefix}wte.weight")], (Dtype::U8, vec![1], vec![0]));
        let dense_left = plan.jobs.iter().filter(|job| after.contains_key(&job.matrix.tensor)).count();
        assert_eq!(dense_left, 1, "only the guard keeps the name of a compressed weight");
        let counted: usize = after
            .values()
            .filter(|(dtype, ..)| *dtype == Dtype::F32)
            .map(|(_, shape, _)| shape.iter().product::<usize>())
            .sum();
        assert_eq!(counted, report.parameters_after);
        assert_eq!(report.bytes_after.unwrap(), fs::metadata(to.join("model.safetensors")).unwrap().len());
        assert_eq!(names(root.path()), ["from", "to"]);
    }
}

#[test]
fn files_go_along_and_the_config_is_resolved() {
    let root = tempfile::tempdir().unwrap();
    let (from, to) = (root.path().join("from"), root.path().join("to"));
    source("transformer.", Float::F32).write(&from);
    for name in [
        "tokenizer.json",
        "merges.txt",
        "README.md",
        "pytorch_model.bin",
        "training_args.bin",
        ".hidden",
        "x.index.json",
    ] {
        fs::write(from.join(name), name).unwrap();
    }
    fs::create_dir(from.join("onnx")).unwrap();
    compress(&from, &to, &Options { dtype: Some(Float::Bf16), ..Options::default() }).unwrap();
    assert_eq!(
        names(&to),
        ["compression_report.json", "config.json", "merges.txt", "model.safetensors", "tokenizer.json"]
    );
    let config: Value = serde_json::from_slice(&fs::read(to.join("config.json")).unwrap()).unwrap();
    assert_eq!(
        (&config["dtype"], &config["n_layer"], &config["layer_norm_epsilon"]),
        (&json!("bfloat16"), &json!(2), &json!(1e-5))
    );
    let quantization = &config["quantization_config"];
    assert_eq!(quantization["specs"]["h.0.attn.c_attn.q"], json!({"block": [2, 4], "rank": 3, "permute": "both"}));
    assert_eq!(quantization["quant_method"], "tqcompressor");
    // The resolved configuration is one that this crate reads.
    TQConfig::from_json(&quantization.to_string()).unwrap();
    let floating = |dtype: &Dtype| !matches!(dtype, Dtype::I64 | Dtype::U8);
    assert!(tensors(&to).values().all(|(dtype, ..)| !floating(dtype) || *dtype == Dtype::BF16));
    let report: Value = serde_json::from_slice(&fs::read(to.join("compression_report.json")).unwrap()).unwrap();
    assert_eq!(report["matrices"].as_array().unwrap().len(), 9);
    assert!(report["matrices"][0]["lost_energy"].is_number() && report["matrices"][0].get("kind").is_none());
    // What was compressed is not compressed again.
    let again = compress(&to, &root.path().join("again"), &Options::default()).unwrap_err().to_string();
    assert!(again.contains("already compressed"), "{again}");
}

#[test]
fn threads_shards_and_runs_give_the_same_tensors() {
    let root = tempfile::tempdir().unwrap();
    source("transformer.", Float::F16).write_sharded(&root.path().join("from"));
    let run = |to: &str, threads: usize, max_shard_bytes: u64| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let options = Options { max_shard_bytes, ..Options::default() };
        pool.install(|| compress(&root.path().join("from"), &root.path().join(to), &options)).unwrap();
        tensors(&root.path().join(to))
    };
    let one = run("one", 1, u64::MAX);
    assert_eq!(run("four", 4, u64::MAX), one);
    assert_eq!(run("sharded", 2, 1000), one);
    for name in ["model.safetensors", "config.json"] {
        assert_eq!(
            fs::read(root.path().join("one").join(name)).unwrap(),
            fs::read(root.path().join("four").join(name)).unwrap()
        );
    }
    assert!(root.path().join("sharded/model.safetensors.index.json").exists());
}

#[test]
fn a_stored_tied_head_goes_only_if_it_is_the_embedding() {
    let root = tempfile::tempdir().unwrap();
    let mut source = source("transformer.", Float::F32);
    source.add("lm_head.weight", Float::F32, &[20, 8]);
    source.write(&root.path().join("differs"));
    compress(&root.path().join("differs"), &root.path().join("apart"), &Options::default()).unwrap();
    assert_eq!(tensors(&root.path().join("apart"))["lm_head.weight"].2, source.tensor("lm_head.weight").3);
    let config: Value = serde_json::from_slice(&fs::read(root.path().join("apart/config.json")).unwrap()).unwrap();
    assert_eq!(config["tie_word_embeddings"], false);

    let embedding = source.tensor("transformer.wte.weight").3.clone();
    source.tensor("lm_head.weight").3 = embedding;
    source.write(&root.path().join("same"));
    let report = compress(&root.path().join("same"), &root.path().join("to"), &Options::default()).unwrap();
    assert!(!tensors(&root.path().join("to")).contains_key("lm_head.weight"));
    assert!(report.untouched.iter().all(|tensor| tensor.tensor != "lm_head.weight"));

    // An untied head is a weight of its own, whatever its values.
    source.config["tie_word_embeddings"] = json!(false);
    source.write(&root.path().join("untied"));
    compress(&root.path().join("untied"), &root.path().join("to2"), &Options::default()).unwrap();
    assert!(tensors(&root.path().join("to2")).contains_key("lm_head.weight"));
}

#[test]
fn whatever_fails_nothing_is_left() {
    let root = tempfile::tempdir().unwrap();
    let (from, to) = (root.path().join("from"), root.path().join("deep/to"));
    let mut source = source("transformer.", Float::F32);
    let bytes = source.tensor("transformer.h.1.ln_1.weight").3.clone();
    source.tensor("transformer.h.1.ln_1.weight").3[..4].copy_from_slice(&1e30f32.to_le_bytes());
    source.write(&from);
    // The last thing to fail: a value that the asked dtype cannot hold, found while tensors are being written.
    let error = compress(&from, &to, &Options { dtype: Some(Float::F16), ..Options::default() }).unwrap_err();
    assert!(
        error.to_string().contains("'transformer.h.1.ln_1.weight'") && error.to_string().contains("float16"),
        "{error}"
    );
    assert_eq!(names(root.path()), ["from"]);

    source.tensor("transformer.h.1.ln_1.weight").3 = bytes;
    source.tensor("transformer.h.1.mlp.c_fc.weight").3[..4].copy_from_slice(&f32::INFINITY.to_le_bytes());
    source.write(&from);
    let error = compress(&from, &to, &Options::default()).unwrap_err();
    assert!(
        error.to_string().contains("'transformer.h.1.mlp.c_fc.weight'") && error.to_string().contains("inf"),
        "{error}"
    );
    assert_eq!(names(root.path()), ["from"]);

    let progress = Progress::default();
    progress.cancel();
    let config = TQConfig::from_json(SPECS).unwrap();
    let error = compress_checkpoint(
        &Checkpoint::open(&from).unwrap(),
        &to,
        &config,
        Fits::Made(&Calibration::new()),
        &Options::default(),
        &progress,
    )
    .unwrap_err();
    assert!(matches!(error, Error::Cancelled));
    assert_eq!(names(root.path()), ["from"]);
}

#[test]
fn destinations_that_hold_something_are_safe() {
    let root = tempfile::tempdir().unwrap();
    let from = root.path().join("parent/from");
    source("transformer.", Float::F32).write(&from);
    let overwrite = Options { overwrite: true, ..Options::default() };
    let refused = |to: &Path, options: &Options, words: &str| {
        let error = compress(&from, to, options).unwrap_err();
        assert!(matches!(error, Error::Destination { .. }) && error.to_string().contains(words), "{error}");
    };
    let other = root.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("diary.txt"), "dear").unwrap();
    refused(&other, &Options::default(), "not empty");
    refused(&other, &overwrite, "no config.json");
    refused(&from, &overwrite, "the source itself");
    refused(&other.join("diary.txt"), &overwrite, "not a directory");
    fs::write(root.path().join("parent/config.json"), "{}").unwrap();
    refused(&root.path().join("parent"), &overwrite, "the source's weights");
    // Elsewhere, links need rights that a user may not have.
    #[cfg(unix)]
    {
        let alias = root.path().join("alias");
        std::os::unix::fs::symlink(&from, &alias).unwrap();
        refused(&alias, &overwrite, "the source itself");
        fs::remove_file(alias).unwrap();
    }
    assert_eq!(names(&other), ["diary.txt"]);
    assert_eq!(names(&from), ["config.json", "model.safetensors"]);

    // Below the source, into an empty directory, and over an older result.
    compress(&from, &from.join("out"), &Options::default()).unwrap();
    let out = root.path().join("out");
    fs::create_dir(&out).unwrap();
    compress(&from, &out, &Options::default()).unwrap();
    for foreign in ["notes.txt", "data.bin", ".git/HEAD"] {
        let (path, first) = (out.join(foreign), foreign.split('/').next().unwrap());
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, "mine").unwrap();
        refused(&out, &overwrite, &format!("'{first}'"));
        assert_eq!(fs::read(&path).unwrap(), b"mine");
        fs::remove_file(&path).unwrap();
    }
    fs::remove_dir(out.join(".git")).unwrap();
    fs::write(out.join("model-00001-of-00002.safetensors"), "").unwrap();
    compress(&from, &out, &overwrite).unwrap();
    assert!(!out.join("model-00001-of-00002.safetensors").exists() && out.join("model.safetensors").exists());
    assert_eq!(names(root.path()), ["other", "out", "parent"]);
}
