//! GPT-2's hyperparameters, from `config.json`.

use serde_json::{Map, Value};

/// The nonlinearity between the two linear maps of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x/2 · (1 + tanh(√(2/π)·(x + 0.044715·x³)))`
    GeluTanh,
    /// `x/2 · (1 + erf(x/√2))`
    Gelu,
    /// `max(x, 0)`
    Relu,
    /// `x · sigmoid(x)`
    Silu,
    /// `tanh(x)`
    Tanh,
}

impl Activation {
    /// The names of transformers.
    const NAMES: [(&'static str, Self); 8] = [
        ("gelu_new", Self::GeluTanh),
        ("gelu_pytorch_tanh", Self::GeluTanh),
        ("gelu_fast", Self::GeluTanh),
        ("gelu", Self::Gelu),
        ("relu", Self::Relu),
        ("silu", Self::Silu),
        ("swish", Self::Silu),
        ("tanh", Self::Tanh),
    ];
}

/// A GPT-2's hyperparameters. Missing keys have transformers' defaults.
#[derive(Clone, Debug, PartialEq)]
pub struct Gpt2Config {
    /// `n_layer`
    pub layers: usize,
    /// `n_embd`
    pub width: usize,
    /// `n_head`
    pub heads: usize,
    /// `n_inner`, by default `4·n_embd`
    pub inner: usize,
    /// `vocab_size`
    pub vocabulary: usize,
    /// `n_positions`: the longest sequence
    pub positions: usize,
    /// `activation_function`
    pub activation: Activation,
    /// `layer_norm_epsilon`
    pub epsilon: f32,
    /// `scale_attn_weights`: scores are divided by the root of a head's width
    pub scale_scores: bool,
    /// `scale_attn_by_inverse_layer_idx`: and by the number of the layer
    pub scale_by_layer: bool,
    /// Whether `architectures` names a model with a language-model head.
    pub language_model: bool,
    /// `bos_token_id`
    pub begin_token: Option<u32>,
    /// `eos_token_id`, where generation stops: that of `generation_config.json` where there is one
    pub end_tokens: Vec<u32>,
}

impl Gpt2Config {
    /// Reads a `config.json`, and a `generation_config.json` if there is one; `geometry` is what shapes follow from, and
    /// `language_model` whether there is a head.
    ///
    /// # Errors
    /// The key whose value is of the wrong type or unknown, in words.
    pub(super) fn new(
        config: &Map<String, Value>,
        generation: Option<&Map<String, Value>>,
        geometry: &crate::family::Gpt2Geometry,
        language_model: bool,
    ) -> Result<Self, String> {
        let given = |key: &str| config.get(key).filter(|value| !value.is_null());
        let flag = |key: &str, default: bool| {
            given(key).map_or(Ok(default), |value| {
                value.as_bool().ok_or_else(|| format!("{key}: expected true or false, got {value}"))
            })
        };
        let heads = match given("n_head") {
            None => 12,
            Some(value) => value.as_u64().and_then(|heads| usize::try_from(heads).ok()).unwrap_or(0),
        };
        if heads == 0 || !geometry.width.is_multiple_of(heads) {
            return Err(format!("n_head: expected a number that divides n_embd = {}, got {heads}", geometry.width));
        }
        let activation = given("activation_function").map_or("gelu_new", |value| value.as_str().unwrap_or(""));
        let known = Activation::NAMES.iter().find(|(name, _)| *name == activation);
        let &(_, activation) = known.ok_or_else(|| {
            let names: Vec<_> = Activation::NAMES.iter().map(|(name, _)| *name).collect();
            format!("activation_function: expected one of {}, got {activation:?}", names.join(", "))
        })?;
        let epsilon = given("layer_norm_epsilon").map_or(Some(1e-5), Value::as_f64).filter(|epsilon| *epsilon >= 0.0);
        if geometry.cross_attention {
            return Err("add_cross_attention: the native runtime has no cross-attention".into());
        }
        Ok(Self {
            layers: geometry.layers,
            width: geometry.width,
            heads,
            inner: geometry.inner,
            vocabulary: geometry.vocabulary,
            positions: geometry.positions,
            language_model,
            activation,
            epsilon: epsilon.ok_or("layer_norm_epsilon: expected a number of at least 0")? as f32,
            scale_scores: flag("scale_attn_weights", true)?,
            scale_by_layer: flag("scale_attn_by_inverse_layer_idx", false)?,
            begin_token: given("bos_token_id").map(|value| token("bos_token_id", value)).transpose()?,
            end_tokens: match generation.filter(|generation| generation.contains_key("eos_token_id")) {
                Some(generation) => {
                    end_tokens(generation).map_err(|words| format!("generation_config.json: {words}"))?
                }
                None => end_tokens(config)?,
            },
        })
    }
}

/// `eos_token_id`, a token or several, of a `config.json` or a `generation_config.json`.
fn end_tokens(config: &Map<String, Value>) -> Result<Vec<u32>, String> {
    match config.get("eos_token_id") {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(all)) => all.iter().map(|value| token("eos_token_id", value)).collect(),
        Some(value) => Ok(vec![token("eos_token_id", value)?]),
    }
}

fn token(key: &str, value: &Value) -> Result<u32, String> {
    let token = value.as_u64().and_then(|token| u32::try_from(token).ok());
    token.ok_or_else(|| format!("{key}: expected a token, got {value}"))
}
