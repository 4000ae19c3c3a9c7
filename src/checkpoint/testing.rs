//! Small checkpoints for tests.

use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use crate::family::Gpt2Geometry;
use crate::numeric::Float;

/// A checkpoint in memory, to be damaged and written.
pub(crate) struct Source {
    pub(crate) config: Value,
    pub(crate) tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)>,
}

impl Source {
    /// A GPT-2 with two layers, width 8, vocabulary 20, random weights, and names with `prefix`.
    pub(crate) fn tiny(prefix: &str, float: Float) -> Self {
        let config = json!({
            "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "dtype": float.name(),
            "n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 20, "n_positions": 6, "layer_norm_epsilon": 1e-05,
        });
        let geometry = Gpt2Geometry::from_config(config.as_object().unwrap()).unwrap();
        let mut source = Self { config, tensors: Vec::new() };
        for (name, shape) in geometry.tensors(false) {
            source.add(&format!("{prefix}{name}"), float, &shape);
        }
        source
    }

    /// Adds a tensor of pseudo-random values that depend on its name.
    pub(crate) fn add(&mut self, name: &str, float: Float, shape: &[usize]) {
        let mut state = name.bytes().fold(7u64, |state, byte| state.wrapping_mul(31).wrapping_add(u64::from(byte)));
        let next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        let values: Vec<f32> = std::iter::repeat_with(next).take(shape.iter().product()).collect();
        let mut bytes = Vec::new();
        float.downcast(&values, &mut bytes).unwrap();
        self.tensors.push((name.into(), float.dtype(), shape.into(), bytes));
    }

    pub(crate) fn tensor(&mut self, name: &str) -> &mut (String, Dtype, Vec<usize>, Vec<u8>) {
        self.tensors.iter_mut().find(|tensor| tensor.0 == name).unwrap()
    }

    /// The tensors' file.
    pub(crate) fn file(tensors: &[(String, Dtype, Vec<usize>, Vec<u8>)]) -> Vec<u8> {
        let views = tensors
            .iter()
            .map(|(name, dtype, shape, bytes)| (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
        safetensors::serialize(views, Some([("format".into(), "pt".into())].into())).unwrap()
    }

    /// Writes it as one file.
    pub(crate) fn write(&self, directory: &Path) {
        std::fs::create_dir_all(directory).unwrap();
        std::fs::write(directory.join("config.json"), self.config.to_string()).unwrap();
        std::fs::write(directory.join("model.safetensors"), Self::file(&self.tensors)).unwrap();
    }

    /// Writes it as two shards with an index.
    pub(crate) fn write_sharded(&self, directory: &Path) {
        self.write(directory);
        std::fs::remove_file(directory.join("model.safetensors")).unwrap();
        let mut map = serde_json::Map::new();
        for (number, tensors) in self.tensors.chunks(self.tensors.len().div_ceil(2)).enumerate() {
            let name = format!("model-0000{}-of-00002.safetensors", number + 1);
            std::fs::write(directory.join(&name), Self::file(tensors)).unwrap();
            map.extend(tensors.iter().map(|tensor| (tensor.0.clone(), name.as_str().into())));
        }
        let index = json!({"metadata": {"total_size": 0}, "weight_map": map});
        std::fs::write(directory.join("model.safetensors.index.json"), index.to_string()).unwrap();
    }
}
