use std::path::Path;

use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;
use safetensors::Dtype;
use serde_json::json;

use super::linear::{Linear, Part, StoredTerm};
use super::order::Order;
use super::rows::{Rows, Weights};
use super::*;
use crate::checkpoint::read::Checkpoint;
use crate::checkpoint::testing::Source;
use crate::compress::{Calibration, Fits, Options, compress_checkpoint, expand_checkpoint};
use crate::error::{Error, Result};
use crate::family::{Kind, Matrix};
use crate::fit::{self, Norm};
use crate::kron::{KroneckerSum, MatrixView};
use crate::numeric::Float;
use crate::numeric::int8::{Quantized, Scales, dequantize, quantize};
use crate::permute::{Decomposition, Effort, Permutation, decompose};
use crate::plan::TQConfig;
use crate::progress::{Parallelism, Progress};
use crate::spec::{KroneckerShape, KroneckerSpec, Permute};
use crate::testing::noise;

/// A compressed checkpoint with every kind of term: both orders of contraction, large blocks, pivots on rows and
/// columns, sums, parts, and embeddings.
const SPECS: &str = r#"{"specs":{
    "wte":{"block":[4,2],"rank":3},
    "wpe":{"rank":4},
    "h.0.attn.c_attn":{"block":[2,4],"rank":3},
    "h.0.attn.c_proj":{"terms":[{"rank":2},{"block":[2,2],"rank":2},{"block":[4,4],"rank":1,"permute":"rows"}]},
    "h.0.mlp.c_fc":{"block":[2,4],"rank":5},
    "h.0.mlp.c_proj":{"block":[4,2],"rank":5,"permute":"rows"},
    "h.1.attn.c_attn.*":{"rank":3},
    "h.1.mlp.c_fc":{"block":[4,16],"rank":2},
    "h.1.mlp.c_proj":{"rank":3}},"effort":"fast"}"#;

fn pool() -> ThreadPool {
    ThreadPool::new(2).unwrap()
}

fn load(directory: &Path) -> Result<Decoder> {
    Decoder::load(directory, &Progress::default())
}

fn logits(model: &Decoder, tokens: &[u32], pool: &ThreadPool) -> Vec<f32> {
    let mut cache = model.cache(tokens.len()).unwrap();
    let hidden = model.forward(&[tokens], &mut [&mut cache], None, pool, &Progress::default()).unwrap();
    model.logits(&hidden, pool)
}

fn largest_difference(x: &[f32], y: &[f32]) -> f32 {
    assert_eq!(x.len(), y.len());
    x.iter().zip(y).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

/// Writes a dense checkpoint whose weights are what those of the compressed one stand for.
fn expanded(source: &Source, config: &TQConfig, directory: &Path) {
    let mut dense = Source { config: source.config.clone(), tensors: source.tensors.clone() };
    let original = tempfile::tempdir().unwrap();
    source.write(original.path());
    let checkpoint = Checkpoint::open(original.path()).unwrap();
    let plan = crate::plan::Plan::for_checkpoint(&checkpoint, config).unwrap();
    for job in &plan.jobs {
        let Matrix { rows, columns, first_column, kind, .. } = job.matrix;
        let values = checkpoint.matrix(&job.matrix).unwrap();
        let view = MatrixView::new(&values, rows, columns).unwrap();
        let (norm, progress) = (Norm::frobenius(), Progress::default());
        let fit = fit::fit(view, &job.spec, &norm, Effort::Fast, 0, Parallelism::Sequential, &progress).unwrap().terms;
        let (_, _, shape, bytes) = dense.tensor(&job.matrix.tensor);
        let width = shape[1];
        assert_ne!(kind, Kind::Linear);
        for i in 0..rows {
            for j in 0..columns {
                let value: f32 = fit.iter().map(|term| term.to_dense()[i * columns + j]).sum();
                let at = 4 * (i * width + first_column + j);
                bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
            }
        }
    }
    dense.write(directory);
}

#[test]
fn a_compressed_model_computes_what_its_factors_stand_for() {
    let folder = tempfile::tempdir().unwrap();
    let [from, to, dense] = ["source", "compressed", "dense"].map(|name| folder.path().join(name));
    for prefix in ["", "transformer."] {
        let source = Source::tiny(prefix, Float::F32);
        source.write(&from);
        let config = TQConfig::from_json(SPECS).unwrap();
        let options = Options { overwrite: true, ..Options::default() };
        let opened = Checkpoint::open(&from).unwrap();
        let made = Fits::Made(&Calibration::new());
        compress_checkpoint(&opened, &to, &config, made, &options, &Progress::default()).unwrap();
        expanded(&source, &config, &dense);
        let (compressed, dense) = (load(&to).unwrap(), load(&dense).unwrap());
        // Of the two orders between c_fc and c_proj one is left.
        assert_eq!((compressed.blocks[0].expansion.gathers(), compressed.blocks[0].projection.gathers()), (2, 1));
        for length in 1..=6 {
            let tokens: Vec<u32> = (0..length).map(|i| (7 * i + length) % 20).collect();
            let (ours, theirs) = (logits(&compressed, &tokens, &pool()), logits(&dense, &tokens, &pool()));
            let scale = theirs.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
            assert!(largest_difference(&ours, &theirs) < 1e-5 * scale, "{length} tokens");
        }
    }
}

#[test]
fn an_eight_bit_model_computes_what_it_expands_to_and_loading_makes_the_same_of_floats() {
    let folder = tempfile::tempdir().unwrap();
    let [from, floats, codes, dense] = ["source", "floats", "codes", "dense"].map(|name| folder.path().join(name));
    let groups = r#"{"specs":{"wte":{"groups":[[9,3],[11,2]]},"h.1.mlp.c_fc":{"rank":3}}}"#;
    for specs in [SPECS, groups, r#"{"specs":{},"dtype":"int8"}"#] {
        Source::tiny("transformer.", Float::F32).write(&from);
        let opened = Checkpoint::open(&from).unwrap();
        let config = TQConfig::from_json(specs).unwrap();
        let floats = if config.specs.is_empty() { &from } else { &floats };
        for (to, int8) in [(floats, false), (&codes, true)].into_iter().skip(usize::from(floats == &from)) {
            let options = Options { overwrite: true, int8, ..Options::default() };
            let made = Fits::Made(&Calibration::new());
            compress_checkpoint(&opened, to, &config, made, &options, &Progress::default()).unwrap();
        }
        let wide = Options { overwrite: true, dtype: Some(Float::F32), ..Options::default() };
        expand_checkpoint(&Checkpoint::open_any(&codes).unwrap(), &dense, &wide, &Progress::default()).unwrap();
        let model = load(&codes).unwrap();
        let quantized = Decoder::load_as(floats, true, &Progress::default()).unwrap();
        let already = Decoder::load_as(&codes, true, &Progress::default()).unwrap();
        let expanded = load(&dense).unwrap();
        for length in [1_u32, 2, 5, 6] {
            let tokens: Vec<u32> = (0..length).map(|i| (7 * i + length) % 20).collect();
            let own = logits(&model, &tokens, &pool());
            assert_eq!(own, logits(&quantized, &tokens, &pool()));
            assert_eq!(own, logits(&already, &tokens, &ThreadPool::new(1).unwrap()));
            let theirs = logits(&expanded, &tokens, &pool());
            let scale = theirs.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
            // Activations are rounded to 16 bits, too.
            assert!(largest_difference(&own, &theirs) < 1e-4 * scale, "{specs}: {length} tokens");
        }
        assert_eq!(model.size().parameters, load(floats).unwrap().size().parameters);
        assert!(model.size().bytes < load(floats).unwrap().size().bytes);
    }
}

#[test]
fn spoiled_scales_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let [from, to] = ["source", "codes"].map(|name| folder.path().join(name));
    Source::tiny("", Float::F32).write(&from);
    let config =
        TQConfig::from_json(r#"{"specs":{"wte":{"rank":3},"h.0.mlp.c_fc":{"block":[2,4],"rank":2}}}"#).unwrap();
    let options = Options { int8: true, ..Options::default() };
    let opened = Checkpoint::open(&from).unwrap();
    let made = Fits::Made(&Calibration::new());
    compress_checkpoint(&opened, &to, &config, made, &options, &Progress::default()).unwrap();
    let whole = std::fs::read(to.join("model.safetensors")).unwrap();
    let read = safetensors::SafeTensors::deserialize(&whole).unwrap();
    type Stored = (String, Dtype, Vec<usize>, Vec<u8>);
    type Change<'a> = &'a dyn Fn(&mut Vec<Stored>, usize);
    let tensors: Vec<Stored> = read
        .tensors()
        .into_iter()
        .map(|(name, view)| (name, view.dtype(), view.shape().to_vec(), view.data().to_vec()))
        .collect();
    for name in ["wte.left", "wpe.codes", "h.1.attn.c_attn.codes", "h.0.mlp.c_fc.A"] {
        let scale = format!("{name}_scale");
        let spoiled = |change: Change<'_>| {
            let mut tensors = tensors.clone();
            let at = tensors.iter().position(|tensor| tensor.0 == scale).unwrap();
            change(&mut tensors, at);
            std::fs::write(to.join("model.safetensors"), Source::file(&tensors)).unwrap();
            let loading = load(&to).unwrap_err().to_string();
            let dense = folder.path().join("dense");
            let opened = Checkpoint::open_any(&to).unwrap();
            let expanding = expand_checkpoint(&opened, &dense, &Options::default(), &Progress::default()).unwrap_err();
            assert!(!dense.exists());
            (loading, expanding.to_string())
        };
        let each: [(Change<'_>, &str); 5] = [
            (&|tensors, at| drop(tensors.remove(at)), "missing"),
            (&|tensors, at| tensors[at].1 = Dtype::F16, "BF16"),
            (&|tensors, at| tensors[at].3[..2].copy_from_slice(&half::bf16::NAN.to_le_bytes()), "NaN"),
            (&|tensors, at| tensors[at].3[..2].copy_from_slice(&half::bf16::INFINITY.to_le_bytes()), "inf"),
            (
                &|tensors, at| {
                    tensors[at].2.push(1);
                },
                "shape",
            ),
        ];
        for (change, words) in each {
            let (loading, expanding) = spoiled(change);
            for message in [loading, expanding] {
                assert!(message.contains(words) && message.contains(&scale), "{name}: {words}: {message}");
            }
        }
    }
}

#[test]
fn tokens_one_by_one_or_in_company_give_the_logits_of_all_at_once() {
    let folder = tempfile::tempdir().unwrap();
    Source::tiny("", Float::F16).write(folder.path());
    let model = load(folder.path()).unwrap();
    let (pool, progress) = (pool(), Progress::default());
    let sequences: [&[u32]; 4] = [&[1, 2, 3, 4, 5, 6], &[], &[19], &[7, 7, 0]];
    let mut caches: Vec<_> = sequences.iter().map(|tokens| model.cache(tokens.len()).unwrap()).collect();
    let mut references: Vec<_> = caches.iter_mut().collect();
    let together = model.forward(&sequences, &mut references, None, &pool, &progress).unwrap();
    let mut first = 0;
    for tokens in sequences {
        let mut cache = model.cache(tokens.len()).unwrap();
        for token in tokens {
            let one = std::slice::from_ref(token);
            let hidden = model.forward(&[one], &mut [&mut cache], None, &pool, &progress).unwrap();
            assert!(largest_difference(&hidden, &together[first..first + 8]) < 1e-5);
            first += 8;
        }
        assert_eq!(cache.len(), tokens.len());
    }
}

#[test]
fn results_do_not_depend_on_threads() {
    let folder = tempfile::tempdir().unwrap();
    Source::tiny("", Float::Bf16).write(folder.path());
    let model = load(folder.path()).unwrap();
    let results = [1, 2, 5].map(|threads| {
        let (pool, progress) = (ThreadPool::new(threads).unwrap(), Progress::default());
        let sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 0.9, seed: 3 };
        let generated = model
            .generate(
                &[&[1], &[2, 3]],
                &Continuation { most: 4, end_tokens: &[], sampling },
                |_, _| {},
                &pool,
                &progress,
            )
            .unwrap();
        let scores = model.score(&[&[1, 2, 3, 4], &[5, 6]], &[3, 1], &pool, &progress).unwrap();
        let names = ["h.0.mlp.c_proj".to_owned(), "lm_head".to_owned()];
        let moments = model.input_moments(&[&[1, 2, 3], &[4]], &names, usize::MAX, &pool, &progress).unwrap();
        (generated, scores, moments)
    });
    assert!(results[0] == results[1] && results[0] == results[2]);
    assert_eq!(results[0].0[0].len(), 4);
}

#[test]
fn moments_are_means_of_outer_products_in_the_layers_own_order() {
    let folder = tempfile::tempdir().unwrap();
    let [from, to] = ["source", "compressed"].map(|name| folder.path().join(name));
    Source::tiny("", Float::F32).write(&from);
    let config = TQConfig::from_json(r#"{"specs":{"h.0.mlp.c_fc":{"block":[2,4],"rank":8}}}"#).unwrap();
    let opened = Checkpoint::open(&from).unwrap();
    let made = Fits::Made(&Calibration::new());
    compress_checkpoint(&opened, &to, &config, made, &Options::default(), &Progress::default()).unwrap();
    let names: Vec<_> = ["h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_proj"].map(str::to_owned).to_vec();
    let sequences: [&[u32]; 2] = [&[1, 2, 3, 4], &[5, 6, 7]];
    let (pool, progress) = (pool(), Progress::default());
    // The first c_fc has full rank, so both models compute the same.
    let [ours, dense] = [&to, &from].map(|directory| {
        load(directory).unwrap().input_moments(&sequences, &names, usize::MAX, &pool, &progress).unwrap()
    });
    for (ours, dense) in ours.iter().zip(&dense) {
        assert!(largest_difference(ours, dense) < 1e-4);
    }
    let model = load(&from).unwrap();
    for room in [0, 8 * 8 * 8, 8 * 8 * 9] {
        assert_eq!(model.input_moments(&sequences, &names, room, &pool, &progress).unwrap(), dense, "in a file or not");
    }
    let mut exact = vec![0.0_f64; 64];
    let mut observe = |readers: &[String], x: &[f32]| {
        for x in x.chunks_exact(8).filter(|_| readers == ["h.0.attn.c_proj"]) {
            for (i, sum) in exact.iter_mut().enumerate() {
                *sum += f64::from(x[i / 8]) * f64::from(x[i % 8]) / 7.0;
            }
        }
        Ok(())
    };
    let mut caches: Vec<_> = sequences.iter().map(|tokens| model.cache(tokens.len()).unwrap()).collect();
    let mut references: Vec<_> = caches.iter_mut().collect();
    model.forward(&sequences, &mut references, Some(&mut observe), &pool, &progress).unwrap();
    let exact: Vec<f32> = exact.iter().map(|&value| value as f32).collect();
    assert!(largest_difference(&dense[1], &exact) < 1e-5);
}

#[test]
fn what_cannot_be_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let damaged = |change: &dyn Fn(&mut Source)| {
        let mut source = Source::tiny("", Float::F32);
        change(&mut source);
        source.write(folder.path());
        load(folder.path()).unwrap_err().to_string()
    };
    let quantized = |specs: serde_json::Value| json!({"quant_method": "tqcompressor", "specs": specs});
    type Change<'a> = Box<dyn Fn(&mut Source) + 'a>;
    let cases: [(Change<'_>, &str); 11] = [
        (Box::new(|source| source.tensors.retain(|tensor| tensor.0 != "h.1.mlp.c_fc.bias")), "h.1.mlp.c_fc.bias"),
        (Box::new(|source| source.tensor("ln_f.weight").2 = vec![2, 4]), "ln_f.weight"),
        (Box::new(|source| source.config["n_head"] = json!(3)), "n_head"),
        (Box::new(|source| source.config["n_layer"] = json!(3)), "h.2."),
        (Box::new(|source| source.config["n_layer"] = json!(1)), "h.1."),
        (Box::new(|source| source.config["activation_function"] = json!("mish")), "mish"),
        (Box::new(|source| source.config["add_cross_attention"] = json!(true)), "cross"),
        (Box::new(|source| source.tensor("wte.weight").3[..4].copy_from_slice(&f32::NAN.to_le_bytes())), "wte.weight"),
        (Box::new(|source| source.add("transformer.wpe.weight", Float::F32, &[6, 8])), "two names"),
        (Box::new(|source| source.config["quantization_config"] = quantized(json!({"wte": {"rank": 2}}))), "wte.left"),
        (
            Box::new(|source| source.config["quantization_config"] = quantized(json!({"h.7.mlp.c_fc": {"rank": 2}}))),
            "h.7.mlp.c_fc",
        ),
    ];
    for (change, words) in cases {
        let message = damaged(&*change);
        assert!(message.contains(words), "{words}: {message}");
    }
    Source::tiny("", Float::F32).write(folder.path());
    let model = load(folder.path()).unwrap();
    let (pool, progress) = (pool(), Progress::default());
    let generate = |prompt: &[u32], most, sampling: Sampling| {
        let continuation = Continuation { most, end_tokens: &[], sampling };
        model.generate(&[prompt], &continuation, |_, _| {}, &pool, &progress).unwrap_err()
    };
    let hot = Sampling { temperature: f64::NAN, ..Sampling::GREEDY };
    let none = Sampling { top_p: 0.0, ..Sampling::GREEDY };
    for (error, words) in [
        (generate(&[], 1, Sampling::GREEDY), "prompt"),
        (generate(&[20], 1, Sampling::GREEDY), "0 to 19"),
        (generate(&[1, 2, 3], 4, Sampling::GREEDY), "context of 6"),
        (generate(&[1], 1, hot), "temperature"),
        (generate(&[1], 1, none), "top_p"),
        (model.score(&[&[1, 2]], &[2], &pool, &progress).unwrap_err(), "scored"),
        (model.score(&[&[1, 20]], &[1], &pool, &progress).unwrap_err(), "0 to 19"),
        (model.score(&[&[1; 8]], &[1], &pool, &progress).unwrap_err(), "at most 6"),
        (model.input_moments(&[&[1]], &["wte".into()], 0, &pool, &progress).unwrap_err(), "wte"),
    ] {
        assert!(matches!(error, Error::Config(_)) && error.to_string().contains(words), "{words}: {error}");
    }
    progress.cancel();
    assert!(matches!(generate(&[1], 2, Sampling::GREEDY), Error::Cancelled));
}

#[test]
fn what_is_empty_gives_nothing() {
    let folder = tempfile::tempdir().unwrap();
    Source::tiny("", Float::F32).write(folder.path());
    let model = load(folder.path()).unwrap();
    let (pool, progress) = (pool(), Progress::default());
    assert!(logits(&model, &[], &pool).is_empty());
    assert!(model.score(&[&[3]], &[0], &pool, &progress).unwrap().is_empty());
    assert!(model.score(&[], &[], &pool, &progress).unwrap().is_empty());
    let none = Continuation { most: 0, end_tokens: &[], sampling: Sampling::GREEDY };
    assert_eq!(model.generate(&[&[1]], &none, |_, _| {}, &pool, &progress).unwrap(), [[0_u32; 0]]);
}

#[test]
fn generation_stops_at_an_end_token_and_tells_of_every_token() {
    let folder = tempfile::tempdir().unwrap();
    Source::tiny("", Float::F32).write(folder.path());
    let model = load(folder.path()).unwrap();
    let (pool, progress) = (pool(), Progress::default());
    let told = std::sync::Mutex::new(Vec::new());
    let run = |end: &[u32]| {
        let tell = |prompt, token| told.lock().unwrap().push((prompt, token));
        let continuation = Continuation { most: 5, end_tokens: end, sampling: Sampling::GREEDY };
        model.generate(&[&[1], &[2]], &continuation, tell, &pool, &progress).unwrap()
    };
    let whole = run(&[]);
    let mut tokens = vec![1];
    for token in &whole[0] {
        let row = logits(&model, &tokens, &pool);
        assert_eq!(generate::most_probable(&row[row.len() - 20..]), *token as usize);
        tokens.push(*token);
    }
    told.lock().unwrap().clear();
    let stopped = run(&whole[0][1..2]);
    let first = whole[0].iter().position(|token| *token == whole[0][1]).unwrap();
    assert_eq!(stopped[0], whole[0][..=first]);
    let of_first: Vec<_> = told.lock().unwrap().iter().filter(|told| told.0 == 0).map(|told| told.1).collect();
    assert_eq!(of_first, stopped[0]);
}

/// Small integers, whose products are added up without rounding.
fn integers(length: usize, seed: u64) -> Vec<f32> {
    noise(length, seed).into_iter().map(|value| (3.5 * value).trunc()).collect()
}

fn shuffled(length: usize, seed: u64) -> Permutation {
    let keys = noise(length, seed);
    let mut indices: Vec<usize> = (0..length).collect();
    indices.sort_by(|&i, &j| keys[i].total_cmp(&keys[j]));
    Permutation::new(indices).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn every_strategy_gives_the_dense_product(
        m1 in 1..8_usize, n1 in 1..8_usize, m2 in 1..8_usize, n2 in 1..8_usize, rank in 1..4_usize,
        count in prop::sample::select(vec![1, 2, 5, 40]), threads in 1..4_usize, seed in any::<u64>(),
    ) {
        let rank = rank.min(m1 * n1).min(m2 * n2);
        let shape = KroneckerShape::new(m1 * m2, n1 * n2, (m2, n2), rank).unwrap();
        let (m, n) = (shape.rows(), shape.columns());
        let (a, b) = (integers(rank * m1 * n1, seed), integers(rank * m2 * n2, seed ^ 1));
        let (p, q) = (shuffled(m, seed ^ 2), shuffled(n, seed ^ 3));
        let sum = KroneckerSum { shape, a: a.clone(), b: b.clone(), lost_energy: 0.0 };
        let w = Decomposition { sum, row_permutation: Some(p.clone()), column_permutation: Some(q.clone()) }.to_dense();
        let x = integers(count * m, seed ^ 4);
        let entry = |at: usize| (0..m).map(|i| x[at / n * m + i] * w[i * n + at % n]).sum::<f32>();
        let expected: Vec<f32> = (0..count * n).map(entry).collect();
        let pool = ThreadPool::new(threads).unwrap();
        let linear = Linear::kronecker(shape, &a, &b, &p, &q).unwrap();
        for strategy in [kronecker::Strategy::Factors, kronecker::Strategy::Matrix, kronecker::Strategy::Cheapest] {
            prop_assert_eq!(&linear.forward_by(&x, count, strategy, &pool), &expected);
        }
        prop_assert_eq!(Linear::dense(&w, m, n).unwrap().forward(&x, count, &pool), expected);
    }

    #[test]
    fn products_with_rows_are_those_of_the_dense_matrix(
        rows in 1..70_usize, length in 1..200_usize, count in 1..30_usize, stored in 0..4_usize, seed in any::<u64>(),
    ) {
        let values = noise(rows * length, seed);
        let (weights, values) = match [DType::F32, DType::F16, DType::BF16].get(stored) {
            Some(&dtype) => {
                let weights = Tensor::from_vec(values, (rows, length), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
                let values = weights.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
                (Weights::from(weights), values)
            }
            None => {
                let Quantized { codes, scales } = quantize(&values, rows, length, Scales::Rows).unwrap();
                let scales: Vec<_> = scales.into_iter().map(half::bf16::to_f32).collect();
                let values = dequantize(&codes, &scales, rows, length, Scales::Rows);
                let codes: Vec<u8> = codes.into_iter().map(i8::cast_unsigned).collect();
                let codes = Tensor::from_vec(codes, (rows, length), &Device::Cpu).unwrap();
                let weights = Weights::int8(codes, Tensor::from_vec(scales, (rows, 1), &Device::Cpu).unwrap());
                (weights, values.chunks(length).map(<[f32]>::to_vec).collect())
            }
        };
        let x = noise(count * length, seed ^ 1);
        let part = Part { columns: rows, terms: vec![StoredTerm::Dense(Rows::new(&weights).unwrap())] };
        let mut linear = Linear {
            rows: length,
            columns: rows,
            parts: vec![part],
            outputs: Order::default(),
            bias: noise(rows, seed ^ 2),
        };
        let order = order::Order::new((0..rows).rev());
        linear.put_outputs_in(&order);
        let y = linear.forward(&x, count, &pool());
        for (y, x) in y.chunks_exact(rows).zip(x.chunks_exact(length)) {
            // Few vectors are rounded to 16 bits for products with eight-bit weights.
            let rounding = if stored == 3 { largest_difference(x, &vec![0.0; length]) / 65534.0 } else { 0.0 };
            for (p, &y) in y.iter().enumerate() {
                let i = order.at(p);
                let exact: f64 = values[i].iter().zip(x).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                let exact = exact + f64::from(noise(rows, seed ^ 2)[i]);
                let most = 1e-4 + rounding * values[i].iter().map(|value| value.abs()).sum::<f32>();
                prop_assert!((f64::from(y) - exact).abs() < f64::from(most));
            }
        }
    }
}

#[test]
fn a_sum_that_is_made_first_gives_what_its_factors_give() {
    let (m, n) = (24, 48);
    let matrix = noise(m * n, 5);
    for (block, rank) in [((2, 4), 8), ((4, 2), 8), ((12, 16), 4), ((1, 4), 4)] {
        let spec = KroneckerSpec { block, rank, permute: Permute::Both };
        let sequential = Parallelism::Sequential;
        let found = decompose(&matrix, (m, n), &spec, Effort::Fast, 0, sequential, &Progress::default()).unwrap();
        let dense = found.to_dense();
        let sum = &found.sum;
        let (p, q) = (found.row_permutation.as_ref().unwrap(), found.column_permutation.as_ref().unwrap());
        let linear = Linear::kronecker(sum.shape, &sum.a, &sum.b, p, q).unwrap();
        // Few vectors go by the factors; as many as are cheaper to multiply by the matrix go by that.
        for count in [1, 2, 7, 2000] {
            let x = noise(count * m, 9);
            let y = linear.forward(&x, count, &pool());
            for (x, y) in x.chunks_exact(m).zip(y.chunks_exact(n)) {
                for (j, &y) in y.iter().enumerate() {
                    let exact: f32 = (0..m).map(|i| x[i] * dense[i * n + j]).sum();
                    assert!((y - exact).abs() < 1e-4, "{block:?} {count}: {y} {exact}");
                }
            }
        }
        let mut column = vec![0.0; m];
        linear.add_column(5, &mut column);
        let exact: Vec<f32> = (0..m).map(|i| dense[i * n + 5]).collect();
        assert!(largest_difference(&column, &exact) < 1e-5);
    }
}

#[test]
fn a_linear_map_of_other_lengths_is_refused() {
    let shape = KroneckerShape::new(6, 4, (2, 2), 1).unwrap();
    let (p, q) = (Permutation::identity(6), Permutation::identity(4));
    let refused = |result: Result<Linear>| result.unwrap_err().to_string();
    assert!(refused(Linear::dense(&[0.0; 5], 2, 3)).starts_with("W: expected values of shape [2, 3], got 5 values"));
    let short = refused(Linear::kronecker(shape, &[0.0; 6], &[0.0; 3], &p, &q));
    assert!(short.starts_with("B: expected values of shape [1, 2, 2], got 3 values"), "{short}");
    let exchanged = refused(Linear::kronecker(shape, &[0.0; 6], &[0.0; 4], &q, &p));
    assert!(exchanged.starts_with("p: expected a permutation of 6, got one of 4"), "{exchanged}");
}
