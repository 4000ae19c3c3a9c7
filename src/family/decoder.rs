//! What each module of a decoder does, for the families that the native runtime computes.

use serde::Deserialize;

/// How a decoder normalises its hidden states.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Norm {
    /// `(x − mean) / √(variance + ε) · weight + bias`
    Layer,
    /// `x / √(mean of squares + ε) · weight`
    Rms,
}

/// The modules of a decoder by what they do. A block is `x + attention(norm(x))`, then `x + mlp(norm(x))`; the names
/// within it are those behind the number of the layer.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DecoderRoles {
    /// The embedding of positions; without one, queries and keys are rotated by their positions.
    pub position_embedding: Option<String>,
    /// The kind of all norms.
    pub norm: Norm,
    /// The norm before the attention.
    pub attention_norm: String,
    /// The maps to queries, keys and values: one that is fused, or the three.
    pub attention: Vec<String>,
    /// The map behind the attention.
    pub attention_output: String,
    /// The norm before the MLP.
    pub mlp_norm: String,
    /// The map to the hidden units, or that to their gates and that to what the gates are multiplied with.
    pub mlp: Vec<String>,
    /// The map from the hidden units.
    pub mlp_output: String,
    /// The norm behind the last block.
    pub last_norm: String,
}

impl DecoderRoles {
    /// Whether hidden units are products with a gate.
    #[must_use]
    pub fn gated(&self) -> bool {
        self.mlp.len() == 2
    }
}
