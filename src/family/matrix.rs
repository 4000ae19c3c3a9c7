//! A matrix that can be compressed: its name, its position among the tensors, and its storage order.

use serde::Deserialize;

use crate::error::{Error, Result};

/// The operation of a module with its weight, which also determines the storage order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// transformers' `Conv1D`: a linear map, stored in × out.
    Conv1d,
    /// `nn.Linear`: a linear map, stored out × in.
    Linear,
    /// `nn.Embedding`: a table, stored vocabulary × dimension.
    Embedding,
}

impl Kind {
    const NAMES: [(&'static str, Self); 3] =
        [("conv1d", Self::Conv1d), ("linear", Self::Linear), ("embedding", Self::Embedding)];

    /// Parses the name used in Python.
    ///
    /// # Errors
    /// [`Error::Config`] unless it is "conv1d", "linear" or "embedding".
    pub fn from_name(name: &str) -> Result<Self> {
        Self::NAMES.iter().find(|(known, _)| *known == name).map(|&(_, kind)| kind).ok_or_else(|| {
            Error::Config(format!("kind: expected \"conv1d\", \"linear\" or \"embedding\", got {name:?}"))
        })
    }

    /// The name used in Python.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::NAMES[self as usize].0
    }
}

/// One matrix that can be compressed: a whole weight, or the column range of a fused one, in in × out orientation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Matrix {
    /// Its name in configurations and reports: "wte", "h.1.mlp.c_fc", "h.0.attn.c_attn.q".
    pub name: String,
    /// The bare name of its module: "h.0.attn.c_attn".
    pub module: String,
    /// The stored name of its tensor: "transformer.h.0.attn.c_attn.weight".
    pub tensor: String,
    /// The kind of the module.
    pub kind: Kind,
    /// Rows: in features, or the vocabulary.
    pub rows: usize,
    /// Columns: out features, or the embedding dimension.
    pub columns: usize,
    /// Its first column in the in × out tensor; not 0 only for the later parts of a fused weight.
    pub first_column: usize,
}

impl Matrix {
    /// The matrix's number of parameters.
    #[must_use]
    pub fn parameters(&self) -> usize {
        self.rows.saturating_mul(self.columns)
    }

    /// The suffix of the module's name for its part of a fused weight: "" or ".q", ".k", ".v".
    #[must_use]
    pub fn part(&self) -> &str {
        &self.name[self.module.len()..]
    }

    /// The stored name of its module, with the prefix of the checkpoint.
    #[must_use]
    pub fn stored_module(&self) -> &str {
        self.tensor.strip_suffix(".weight").unwrap_or(&self.tensor)
    }
}
