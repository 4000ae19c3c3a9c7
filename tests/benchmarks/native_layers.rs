//! The native runtime's layers one by one: dense, by the factors, by the matrix, and by what the cost model chooses.
//!
//! `cargo bench --bench native_layers [-- TASK]` prints one JSON array, an object for each layer and number of rows. TASK is
//! a JSON object with any of `layers`, `repeats`, `threads` and `quick`. Times are medians of interleaved turns. A single
//! row finds its weights in memory and not in a cache, as in a whole model.

use std::time::Instant;

use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};
use serde::Deserialize;
use serde_json::{Value, json};
use tqcompressor::permute::Permutation;
use tqcompressor::runtime::{Linear, Strategy, ThreadPool};
use tqcompressor::spec::KroneckerShape;

const ROWS: [usize; 6] = [1, 16, 64, 128, 256, 512];
/// Bytes of weights that no cache holds.
const WEIGHTS: usize = 1 << 29;
const QUICK_WEIGHTS: usize = 1 << 20;

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Task {
    layers: Vec<String>,
    repeats: usize,
    threads: usize,
    quick: bool,
}

impl Default for Task {
    fn default() -> Self {
        Self { layers: ["c_fc", "c_proj", "head"].map(String::from).into(), repeats: 7, threads: 2, quick: false }
    }
}

/// A layer of GPT-2 small as the recipe `tq-81m` compresses it. The head is tied to the embedding.
fn shape(layer: &str, quick: bool) -> KroneckerShape {
    let (inputs, outputs, block, rank) = match (layer, quick) {
        ("c_fc", false) => (768, 3072, (2, 4), 4),
        ("c_fc", true) => (96, 384, (2, 4), 4),
        ("c_proj", false) => (3072, 768, (4, 2), 4),
        ("c_proj", true) => (384, 96, (4, 2), 4),
        ("head", false) => (768, 50257, (4, 1), 1),
        ("head", true) => (96, 512, (4, 1), 1),
        (other, _) => panic!("layers: expected c_fc, c_proj or head, got {other:?}"),
    };
    KroneckerShape::new(inputs, outputs, block, rank).expect("the block divides the layer")
}

fn main() {
    // `cargo bench` adds `--bench`.
    let task = std::env::args().skip(1).find(|argument| argument != "--bench");
    let task: Task = task.map_or_else(Task::default, |json| serde_json::from_str(&json).expect("a task in JSON"));
    let pool = ThreadPool::new(task.threads).expect("the threads start");
    let rows: Vec<_> = task.layers.iter().flat_map(|layer| measure_layer(layer, &task, &pool)).collect();
    println!("{}", Value::from(rows));
}

fn measure_layer(layer: &str, task: &Task, pool: &ThreadPool) -> Vec<Value> {
    let shape = shape(layer, task.quick);
    let (inputs, outputs) = (shape.rows(), shape.columns());
    let mut random = Random(Xoshiro256PlusPlus::seed_from_u64(0));
    let (dense_bytes, factor_bytes) = (4 * inputs * outputs, 4 * shape.parameters());
    let measure_rows = |rows: usize| {
        let x = random.values(rows * inputs);
        let copies = |bytes: usize| {
            let weights = if task.quick { QUICK_WEIGHTS } else { WEIGHTS };
            1 + if rows == 1 { weights / bytes } else { 0 }
        };
        let dense: Vec<_> = (0..copies(dense_bytes)).map(|_| random.dense(inputs, outputs)).collect();
        let factored: Vec<_> = (0..copies(factor_bytes)).map(|_| random.kronecker(shape, layer == "head")).collect();
        let calls = [
            (&dense, Strategy::Cheapest),
            (&factored, Strategy::Factors),
            (&factored, Strategy::Matrix),
            (&factored, Strategy::Cheapest),
        ];
        let mut turns = vec![Vec::new(); calls.len()];
        // The first turn is not counted.
        for turn in 0..=task.repeats {
            for ((layers, strategy), seconds) in calls.iter().zip(&mut turns) {
                let start = Instant::now();
                for layer in *layers {
                    std::hint::black_box(layer.forward_by(&x, rows, *strategy, pool));
                }
                if turn > 0 {
                    seconds.push(start.elapsed().as_secs_f64() / layers.len() as f64);
                }
            }
        }
        let medians: Vec<f64> = turns.into_iter().map(median).collect();
        let [dense, factors, matrix, cheapest] = medians[..] else { unreachable!("one for each call") };
        json!({
            "native layer": format!("{layer} {inputs}×{outputs}"),
            "rows": rows,
            "dense ms": 1e3 * dense,
            "factors ms": 1e3 * factors,
            "matrix ms": 1e3 * matrix,
            "cheapest ms": 1e3 * cheapest,
            "dense / chosen": dense / cheapest,
            "chosen / better": cheapest / factors.min(matrix),
            "dense GB/s": dense_bytes as f64 / dense / 1e9,
            "factors GB/s": factor_bytes as f64 / factors / 1e9,
        })
    };
    ROWS.map(measure_rows).into()
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    let middle = seconds.len() / 2;
    if seconds.len() % 2 == 1 { seconds[middle] } else { seconds[middle - 1].midpoint(seconds[middle]) }
}

struct Random(Xoshiro256PlusPlus);

impl Random {
    /// Uniform values in (−1, 1).
    fn values(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| (self.0.next_u64() >> 40) as f32 / (1_u32 << 23) as f32 - 1.0).collect()
    }

    fn permutation(&mut self, length: usize) -> Permutation {
        let mut indices: Vec<usize> = (0..length).collect();
        for last in (1..length).rev() {
            indices.swap(last, (self.0.next_u64() % (last as u64 + 1)) as usize);
        }
        Permutation::new(indices).expect("indices that were swapped")
    }

    fn dense(&mut self, inputs: usize, outputs: usize) -> Linear {
        Linear::dense(&self.values(inputs * outputs), inputs, outputs).expect("as many values as its shape says")
    }

    /// In the recipe, the tokens of a head keep their order.
    fn kronecker(&mut self, shape: KroneckerShape, ordered: bool) -> Linear {
        let (a, b) = (self.values(shape.rank * shape.blocks()), self.values(shape.rank * shape.block_entries()));
        let p = self.permutation(shape.rows());
        let q = if ordered { Permutation::identity(shape.columns()) } else { self.permutation(shape.columns()) };
        Linear::kronecker(shape, &a, &b, &p, &q).expect("factors of this shape")
    }
}
