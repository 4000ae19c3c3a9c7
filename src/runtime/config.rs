//! The hyperparameters of a decoder, from the `config.json` of any family that the runtime computes.

use serde_json::{Map, Value};

use super::rotary::Rotary;
use crate::family::{Gpt2Geometry, given, optional_flag, optional_number};

/// The `model_type`s that the runtime computes.
const MODEL_TYPES: [&str; 4] = ["gpt2", "llama", "mistral", "qwen2"];

/// A nonlinearity of the hidden units.
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

    /// Reads the value of `key`.
    fn from_config(config: &Map<String, Value>, key: &str, default: &str) -> Result<Self, String> {
        let name = given(config, key).map_or(default, |value| value.as_str().unwrap_or(""));
        let known = Self::NAMES.iter().find(|(known, _)| *known == name);
        known.map(|&(_, activation)| activation).ok_or_else(|| {
            let names: Vec<_> = Self::NAMES.iter().map(|(name, _)| *name).collect();
            format!("{key}: expected one of {}, got {name:?}", names.join(", "))
        })
    }
}

/// Which linear maps of a block have a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Biases {
    /// The maps to queries, keys and values.
    pub attention: bool,
    /// The map behind the attention.
    pub attention_output: bool,
    /// The maps to the hidden units and from them.
    pub mlp: bool,
}

/// A decoder's hyperparameters. Missing keys have transformers' defaults.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderConfig {
    /// The number of blocks.
    pub layers: usize,
    /// Values of a hidden state.
    pub width: usize,
    /// Query heads.
    pub heads: usize,
    /// Heads of keys and values; as many query heads share each as divide among them.
    pub key_value_heads: usize,
    /// Values of one head.
    pub head_width: usize,
    /// Hidden units of an MLP.
    pub inner: usize,
    /// Tokens.
    pub vocabulary: usize,
    /// The longest sequence.
    pub positions: usize,
    /// The nonlinearity of the MLPs.
    pub activation: Activation,
    /// The `ε` of the norms.
    pub epsilon: f32,
    /// How queries and keys are rotated; `None` if an embedding of positions is added to that of tokens.
    pub rotary: Option<Rotary>,
    /// Which maps have a bias.
    pub biases: Biases,
    /// Scores are divided by the root of a head's width.
    pub scale_scores: bool,
    /// And by the number of the layer.
    pub scale_by_layer: bool,
    /// The number of tokens that a token sees, itself included, or `None` for all before it, in each of the first layers;
    /// the last one counts for all other layers.
    pub windows: Vec<Option<usize>>,
    /// Whether `architectures` names a model with a language-model head.
    pub language_model: bool,
    /// `bos_token_id`
    pub begin_token: Option<u32>,
    /// `eos_token_id`, where generation stops: that of `generation_config.json` where there is one
    pub end_tokens: Vec<u32>,
}

/// What missing keys of a Llama's relatives mean to transformers.
struct Defaults {
    vocabulary: usize,
    inner: usize,
    key_value_heads: Option<usize>,
    positions: usize,
    window: Option<usize>,
    begin_token: Option<u32>,
    end_token: Option<u32>,
}

impl DecoderConfig {
    /// The number of tokens that a token sees in a layer, itself included; `None` for all before it.
    #[must_use]
    pub fn window(&self, layer: usize) -> Option<usize> {
        self.windows.get(layer).or(self.windows.last()).copied().flatten()
    }

    /// Reads the `config.json` of a `model_type`, and a `generation_config.json` if there is one; `language_model` is
    /// whether there is a head.
    ///
    /// # Errors
    /// The key whose value is of the wrong type, unknown or not supported, in words.
    pub(super) fn new(
        model_type: &str,
        config: &Map<String, Value>,
        generation: Option<&Map<String, Value>>,
        language_model: bool,
    ) -> Result<Self, String> {
        let read = match model_type {
            "gpt2" => Self::gpt2(config)?,
            "llama" | "mistral" | "qwen2" => Self::llama(model_type, config)?,
            other => {
                let known = MODEL_TYPES.map(|name| format!("\"{name}\"")).join(", ");
                return Err(format!(
                    "the native runtime computes models of the types {known}, got model_type \"{other}\": load it with \
                     torch (engine torch; AutoModelForCausalLM)"
                ));
            }
        };
        let end_tokens = match generation.filter(|generation| generation.contains_key("eos_token_id")) {
            Some(generation) => {
                end_tokens(generation, &[]).map_err(|words| format!("generation_config.json: {words}"))?
            }
            None => end_tokens(config, &read.end_tokens)?,
        };
        let begin_token = match config.get("bos_token_id") {
            None => read.begin_token,
            Some(Value::Null) => None,
            Some(value) => Some(token("bos_token_id", value)?),
        };
        Ok(Self { language_model, begin_token, end_tokens, ..read })
    }

    fn gpt2(config: &Map<String, Value>) -> Result<Self, String> {
        let geometry = Gpt2Geometry::from_config(config)?;
        let heads = optional_number(config, "n_head")?.unwrap_or(12);
        if !geometry.width.is_multiple_of(heads) {
            return Err(format!("n_head: expected a number that divides n_embd = {}, got {heads}", geometry.width));
        }
        if geometry.cross_attention {
            return Err("add_cross_attention: the native runtime has no cross-attention".into());
        }
        Ok(Self {
            layers: geometry.layers,
            width: geometry.width,
            heads,
            key_value_heads: heads,
            head_width: geometry.width / heads,
            inner: geometry.inner,
            vocabulary: geometry.vocabulary,
            positions: geometry.positions,
            activation: Activation::from_config(config, "activation_function", "gelu_new")?,
            epsilon: epsilon(config, "layer_norm_epsilon", 1e-5)?,
            rotary: None,
            biases: Biases { attention: true, attention_output: true, mlp: true },
            scale_scores: optional_flag(config, "scale_attn_weights")?.unwrap_or(true),
            scale_by_layer: optional_flag(config, "scale_attn_by_inverse_layer_idx")?.unwrap_or(false),
            windows: vec![None],
            language_model: false,
            begin_token: None,
            end_tokens: Vec::new(),
        })
    }

    /// A Llama and its relatives, whose `config.json`s have the same keys.
    fn llama(model_type: &str, config: &Map<String, Value>) -> Result<Self, String> {
        let llama = Defaults {
            vocabulary: 32_000,
            inner: 11_008,
            key_value_heads: None,
            positions: 2048,
            window: None,
            begin_token: Some(1),
            end_token: Some(2),
        };
        let window = Some(4096);
        let defaults = match model_type {
            "mistral" => Defaults { inner: 14_336, key_value_heads: Some(8), positions: 131_072, window, ..llama },
            "qwen2" => Defaults {
                vocabulary: 151_936,
                inner: 22_016,
                key_value_heads: Some(32),
                positions: 32_768,
                window,
                begin_token: None,
                end_token: None,
            },
            _ => llama,
        };
        let number = |key, default| Ok::<_, String>(optional_number(config, key)?.unwrap_or(default));
        let flag = |key| Ok::<_, String>(optional_flag(config, key)?.unwrap_or(false));
        let (width, layers) = (number("hidden_size", 4096)?, number("num_hidden_layers", 32)?);
        let heads = number("num_attention_heads", 32)?;
        let default = defaults.key_value_heads.filter(|_| !config.contains_key("num_key_value_heads")).unwrap_or(heads);
        let key_value_heads = number("num_key_value_heads", default)?;
        if !heads.is_multiple_of(key_value_heads) {
            return Err(format!(
                "num_key_value_heads: expected a number that divides num_attention_heads = {heads}, got {key_value_heads}"
            ));
        }
        let head_width = match optional_number(config, "head_dim")? {
            Some(width) => width,
            None if width.is_multiple_of(heads) => width / heads,
            None => {
                return Err(format!(
                    "num_attention_heads: expected a number that divides hidden_size = {width} or a head_dim beside it, got \
                     {heads}"
                ));
            }
        };
        let positions = number("max_position_embeddings", defaults.positions)?;
        let biases = match model_type {
            // The other types have no such keys: transformers ignores them there.
            "llama" => {
                let (attention, mlp) = (flag("attention_bias")?, flag("mlp_bias")?);
                Biases { attention, attention_output: attention, mlp }
            }
            other => Biases { attention: other == "qwen2", attention_output: false, mlp: false },
        };
        Ok(Self {
            layers,
            width,
            heads,
            key_value_heads,
            head_width,
            inner: number("intermediate_size", defaults.inner)?,
            vocabulary: number("vocab_size", defaults.vocabulary)?,
            positions,
            activation: Activation::from_config(config, "hidden_act", "silu")?,
            epsilon: epsilon(config, "rms_norm_eps", 1e-6)?,
            rotary: Some(Rotary::from_config(config, head_width, positions)?),
            biases,
            scale_scores: true,
            scale_by_layer: false,
            windows: windows(model_type, config, layers, defaults.window)?,
            language_model: false,
            begin_token: defaults.begin_token,
            end_tokens: defaults.end_token.into_iter().collect(),
        })
    }
}

/// Why the runtime does not compute the model of a `config.json`; `None` if it does.
#[must_use]
pub fn refusal(config: &Map<String, Value>) -> Option<String> {
    let model_type = config.get("model_type").and_then(Value::as_str).unwrap_or("none");
    DecoderConfig::new(model_type, config, None, false).err()
}

/// The window of each layer. Llama ignores the keys, every layer of a Mistral has one, and Qwen2 has flags for it.
fn windows(
    model_type: &str,
    config: &Map<String, Value>,
    layers: usize,
    default: Option<usize>,
) -> Result<Vec<Option<usize>>, String> {
    let default = default.filter(|_| !config.contains_key("sliding_window"));
    let window = |key| Ok::<_, String>(optional_number(config, key)?.or(default));
    match model_type {
        "mistral" => Ok(vec![window("sliding_window")?]),
        "qwen2" => {
            let in_use = optional_flag(config, "use_sliding_window")?.unwrap_or(false);
            let window = if in_use { window("sliding_window")? } else { None };
            let Some(types) = given(config, "layer_types") else {
                let first = given(config, "max_window_layers").map_or(Some(28), Value::as_u64);
                let first = first.ok_or("max_window_layers: expected a number of layers")?;
                let without = window.map_or(0, |_| layers.min(usize::try_from(first).unwrap_or(layers)));
                let with = (without < layers).then_some(window);
                return Ok(std::iter::repeat_n(None, without).chain(with).collect());
            };
            let types = types.as_array().filter(|types| types.len() == layers);
            let types = types.ok_or_else(|| format!("layer_types: expected a list of {layers} names"))?;
            let of = |name: &Value| match (name.as_str(), window) {
                (Some("full_attention"), _) => Ok(None),
                (Some("sliding_attention"), Some(window)) => Ok(Some(window)),
                (Some("sliding_attention"), None) => {
                    Err("layer_types: sliding_attention needs use_sliding_window and sliding_window".to_owned())
                }
                _ => Err(format!("layer_types: expected full_attention or sliding_attention, got {name}")),
            };
            types.iter().map(of).collect()
        }
        _ => Ok(vec![None]),
    }
}

fn epsilon(config: &Map<String, Value>, key: &str, default: f64) -> Result<f32, String> {
    let epsilon = given(config, key).map_or(Some(default), Value::as_f64).filter(|epsilon| *epsilon >= 0.0);
    epsilon.map(|epsilon| epsilon as f32).ok_or_else(|| format!("{key}: expected a number of at least 0"))
}

/// `eos_token_id`, a token or several, of a `config.json` or a `generation_config.json`.
fn end_tokens(config: &Map<String, Value>, default: &[u32]) -> Result<Vec<u32>, String> {
    match config.get("eos_token_id") {
        None => Ok(default.to_vec()),
        Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(all)) => all.iter().map(|value| token("eos_token_id", value)).collect(),
        Some(value) => Ok(vec![token("eos_token_id", value)?]),
    }
}

fn token(key: &str, value: &Value) -> Result<u32, String> {
    let token = value.as_u64().and_then(|token| u32::try_from(token).ok());
    token.ok_or_else(|| format!("{key}: expected a token, got {value}"))
}
