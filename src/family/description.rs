//! The description of a family of models, and how it classifies stored names.
//!
//! A *bare* name has no base prefix. `AutoModel` saves bare names, models with a head save prefixed names.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::sync::LazyLock;

use indexmap::IndexMap;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::decoder::DecoderRoles;
use super::geometry::{Geometry, optional_flag, optional_number};
use super::matrix::{Kind, Matrix};
use crate::error::{Error, Result};

/// The layout of checkpoints of some `model_type`s of transformers.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Family {
    /// `model_type` → whether the output head is the token embedding where `config.json` does not say it.
    model_types: IndexMap<String, bool>,
    /// The prefix of the base model's names in models with a head: "transformer.".
    pub base_prefix: String,
    /// The module of the token embedding, bare: "wte".
    pub token_embedding: Option<String>,
    /// The output head, which may share its weight with the token embedding: "lm_head".
    pub output_head: Option<String>,
    /// Parts of the names of model classes that have the output head.
    #[serde(default)]
    head_of: Vec<String>,
    /// Whether `tie_word_embeddings` ties more than the head: its bias, the embeddings of an encoder and a decoder.
    #[serde(default)]
    ties_more: bool,
    /// The key of `config.json` with the width of the token embedding, where there is one.
    width: Option<String>,
    /// Parts of stored names and what transformers makes of them on loading, in order.
    #[serde(default)]
    renamed: Vec<(String, String)>,
    /// Modules outside the layers that hold a matrix, and the prefixes of stacks of layers, in model order.
    modules: IndexMap<String, Entry>,
    /// Modules of a layer that hold a matrix, in model order.
    layer: IndexMap<String, Kind>,
    /// Tensors that not every layer has.
    #[serde(default)]
    pub(super) first_layer_only: Vec<String>,
    /// Tensors of a layer that are not weights: causal masks that old versions of transformers stored among the
    /// weights. Today's versions rebuild the masks and ignore the stored ones.
    #[serde(default)]
    ignored: Vec<String>,
    /// Tensors outside the layers that every model of the family has, bare.
    required: Vec<String>,
    /// What each module does, in families that the native runtime computes.
    pub decoder: Option<DecoderRoles>,
    /// The order in which the model uses its tensors, as prefixes of their names; by default that of the modules.
    #[serde(default)]
    order: Order,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Entry {
    Module(Kind),
    /// A stack of layers, and the keys of `config.json` with their number; the first that is there counts.
    Stack {
        count: Vec<String>,
    },
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Order {
    top: Vec<String>,
    layer: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    /// Last component of a module's name → number of equal parts → their names.
    fused: HashMap<String, BTreeMap<usize, Vec<String>>>,
    /// Linear heads for tasks, which models of any family may have.
    task_heads: Vec<String>,
    families: Vec<Family>,
}

static TABLE: LazyLock<Table> =
    LazyLock::new(|| serde_json::from_str(include_str!("families.json")).expect("the table is well formed"));

/// The names of the parts of a fused weight `(rows, columns)`, in × out: q, k and v of a `c_attn` of shape `d × 3d`; k
/// and v in cross-attention, where the shape is `d × 2d`. `None` for a module that is not fused.
///
/// # Errors
/// [`Error::Shape`] for a fused module of another shape.
pub fn fused_parts(module: &str, kind: Kind, rows: usize, columns: usize) -> Result<Option<&'static [String]>> {
    let last = module.rsplit('.').next().unwrap_or(module);
    // Only GPT-2 and its relatives fuse weights this way, and they use `Conv1D`. A linear layer of that name may be
    // anything, so it is not split.
    let Some(counts) = TABLE.fused.get(last).filter(|_| kind == Kind::Conv1d) else { return Ok(None) };
    let parts = counts.iter().find(|&(&count, _)| rows > 0 && columns == count * rows);
    parts.map(|(_, parts)| Some(parts.as_slice())).ok_or_else(|| Error::Shape {
        operation: "fused weight",
        expected: counts.keys().map(|count| format!("({rows}, {count}·{rows})")).collect::<Vec<_>>().join(" or "),
        got: format!("({rows}, {columns})"),
    })
}

/// The module of a matrix and, if the module is fused, the name of the part: "h.0.attn.c_attn.q" is
/// `("h.0.attn.c_attn", Some("q"))`.
#[must_use]
pub fn split_part(matrix: &str) -> (&str, Option<&str>) {
    let Some((module, part)) = matrix.rsplit_once('.') else { return (matrix, None) };
    let last = module.rsplit('.').next().unwrap_or(module);
    let fused = TABLE.fused.get(last).is_some_and(|counts| counts.values().flatten().any(|known| known == part));
    if fused { (module, Some(part)) } else { (matrix, None) }
}

/// The `model_type`s that have a description.
pub fn model_types() -> impl Iterator<Item = &'static str> {
    TABLE.families.iter().flat_map(|family| family.model_types.keys().map(String::as_str))
}

impl Family {
    /// The description of a `model_type`.
    ///
    /// # Errors
    /// A message that names the families that have a description, and the way for all others.
    pub fn of(model_type: &str) -> Result<&'static Self, String> {
        TABLE.families.iter().find(|family| family.model_types.contains_key(model_type)).ok_or_else(|| {
            let known = model_types().map(|name| format!("\"{name}\"")).collect::<Vec<_>>().join(", ");
            format!(
                "model_type: expected one of {known}, got \"{model_type}\". Compress a model of another type in Python: \
                 model = AutoModel.from_pretrained(...); tqcompressor.compress(model, ...); model.save_pretrained(...)"
            )
        })
    }

    /// The message for a config without a `model_type`; `architectures` may say which one it is.
    #[must_use]
    pub fn without_model_type(architectures: Option<&Value>) -> String {
        let first = architectures.and_then(|all| all.get(0)).and_then(Value::as_str).unwrap_or_default();
        // "GPT2LMHeadModel" is of the type "gpt2", "XLMRobertaModel" of "xlm-roberta".
        let plain = |name: &str| name.to_ascii_lowercase().replace(['-', '_'], "");
        match model_types().filter(|name| plain(first).starts_with(&plain(name))).max_by_key(|name| name.len()) {
            Some(name) => {
                format!("model_type is missing; architectures says {first}: add the line \"model_type\": \"{name}\",")
            }
            None => Self::of("none").expect_err("no family has that name"),
        }
    }

    /// The message for a tensor, given by its bare name, that `config.json` asks for and that is not among the `stored`
    /// ones.
    #[must_use]
    pub fn missing<'a>(&self, name: &str, shape: &[usize], stored: impl Iterator<Item = &'a str>) -> String {
        self.absent(name, &format!("config.json asks for it, shape {shape:?}"), stored)
    }

    /// The message for a tensor that is not there, with the reason why it should be.
    #[must_use]
    pub fn absent<'a>(&self, name: &str, why: &str, mut stored: impl Iterator<Item = &'a str>) -> String {
        let message = format!("tensor '{name}' is missing ({why})");
        let prefix = |stored: &'a str| {
            let prefix = stored.strip_suffix(name)?;
            let prefix = prefix.strip_suffix(&self.base_prefix).unwrap_or(prefix);
            prefix.ends_with('.').then_some(prefix)
        };
        match stored.find_map(prefix) {
            None => message,
            Some(prefix) => format!(
                "{message}, but '{prefix}{name}' or the like is there: names begin with '{prefix}', which a wrapper such as \
                 torch.compile or DataParallel has added. Save the model inside the wrapper, or rename the tensors: \
                 safetensors.torch.save_file({{name.removeprefix('{prefix}'): tensor for name, tensor in \
                 safetensors.torch.load_file(FILE).items()}}, FILE, {{'format': 'pt'}})"
            ),
        }
    }

    /// The message for a tensor of another shape than `config.json` asks for.
    #[must_use]
    pub fn misshapen(&self, stored: &str, expected: &[usize], got: &[usize]) -> String {
        let message = format!("tensor '{stored}': config.json asks for shape {expected:?}, got {got:?}");
        let transposed = got.iter().rev().eq(expected) && self.kind_of(stored) == Some(Kind::Conv1d);
        if !transposed {
            return message;
        }
        format!(
            "{message}: that is the orientation of nn.Linear (out × in), but this model stores in × out (Conv1D). Transpose \
             the weight of every {}: tensor.T.contiguous()",
            self.maps().join(", ")
        )
    }

    /// The modules of a layer that are `Conv1D`s, by their names in it.
    fn maps(&self) -> Vec<&str> {
        self.layer.iter().filter(|(_, kind)| **kind == Kind::Conv1d).map(|(name, _)| name.as_str()).collect()
    }

    /// A stored name as in a live model, without the base prefix.
    #[must_use]
    pub fn bare<'a>(&self, stored: &'a str) -> Cow<'a, str> {
        let mut name = Cow::Borrowed(stored);
        for (from, to) in &self.renamed {
            if name.contains(from) {
                name = Cow::Owned(name.replacen(from, to, 1));
            }
        }
        match name {
            Cow::Borrowed(name) => Cow::Borrowed(name.strip_prefix(&self.base_prefix).unwrap_or(name)),
            Cow::Owned(name) => Cow::Owned(name.strip_prefix(&self.base_prefix).unwrap_or(&name).to_owned()),
        }
    }

    /// Whether this is the weight of the token embedding.
    #[must_use]
    pub fn is_token_embedding(&self, stored: &str) -> bool {
        self.token_embedding.as_deref().is_some_and(|module| self.bare(stored).strip_suffix(".weight") == Some(module))
    }

    /// Whether `tie_word_embeddings` ties the output head and nothing else.
    #[must_use]
    pub fn ties_head_alone(&self) -> bool {
        !self.ties_more
    }

    /// Whether this is the weight of the output head.
    #[must_use]
    pub fn is_output_head(&self, stored: &str) -> bool {
        self.output_head.as_deref().is_some_and(|module| self.bare(stored).strip_suffix(".weight") == Some(module))
    }

    /// The kind of the module of a stored weight; `None` for tensors that are not matrices (biases, layer norms,
    /// unknown names).
    #[must_use]
    pub fn kind_of(&self, stored: &str) -> Option<Kind> {
        let bare = self.bare(stored);
        let module = bare.strip_suffix(".weight")?;
        match self.modules.get(module) {
            Some(Entry::Module(kind)) => Some(*kind),
            _ if TABLE.task_heads.iter().any(|head| head == module) => Some(Kind::Linear),
            _ => self.layer.get(self.layer_of(module)?.1).copied(),
        }
    }

    /// The prefixes of the stacks of layers, with the keys of their numbers of layers.
    fn stacks(&self) -> impl Iterator<Item = (&str, &[String])> {
        self.modules.iter().filter_map(|(prefix, entry)| match entry {
            Entry::Stack { count } => Some((prefix.as_str(), count.as_slice())),
            Entry::Module(_) => None,
        })
    }

    /// The prefix of the first stack of layers: "h.".
    #[must_use]
    pub fn layer_prefix(&self) -> &str {
        self.stacks().next().map_or("", |(prefix, _)| prefix)
    }

    /// Splits the bare name "h.3.mlp.c_fc" into `(3, "mlp.c_fc")`.
    #[must_use]
    pub fn layer_of<'a>(&self, bare: &'a str) -> Option<(u64, &'a str)> {
        self.stacks().find_map(|(prefix, _)| within_stack(prefix, bare))
    }

    /// Whether a tensor is stored but not used: see `ignored`.
    #[must_use]
    pub fn is_ignored(&self, stored: &str) -> bool {
        self.layer_of(&self.bare(stored)).is_some_and(|(_, within)| self.ignored.iter().any(|name| name == within))
    }

    /// A sort key that puts stored names in the order in which the model uses them: embeddings, layers by number, the
    /// final norm, heads, all others by name.
    #[must_use]
    pub fn model_order(&self, stored: &str) -> (usize, u64, usize, String) {
        fn position<'a>(mut prefixes: impl ExactSizeIterator<Item = &'a String>, name: &str) -> usize {
            let count = prefixes.len();
            // A module "wte" is the prefix of "wte.weight", not of "wte_norm.weight".
            let begins = |prefix: &String| {
                name.strip_prefix(prefix.as_str()).is_some_and(|rest| prefix.ends_with('.') || rest.starts_with('.'))
            };
            prefixes.position(begins).unwrap_or(count)
        }
        let top = |name: &str| match self.order.top.as_slice() {
            [] => position(self.modules.keys(), name),
            prefixes => position(prefixes.iter(), name),
        };
        let name = self.bare(stored);
        match self.layer_of(&name) {
            Some((number, within)) => {
                let inner = match self.order.layer.as_slice() {
                    [] => position(self.layer.keys(), within),
                    prefixes => position(prefixes.iter(), within),
                };
                (top(&name), number, inner, within.to_owned())
            }
            None => (top(&name), 0, 0, name.into_owned()),
        }
    }

    /// The bare names of the tensors outside the layers that every model of the family has.
    pub(super) fn required(&self) -> impl Iterator<Item = &str> {
        self.required.iter().map(String::as_str)
    }

    /// What `config.json` says of a model's size and head.
    ///
    /// # Errors
    /// A message that names the key with a value of the wrong type.
    pub fn geometry(&self, model_type: &str, config: &Map<String, Value>) -> Result<Geometry, String> {
        let layers = self.stacks().map(|(prefix, keys)| {
            let number = keys.iter().find_map(|key| optional_number(config, key).transpose()).transpose()?;
            Ok((prefix.to_owned(), number))
        });
        let tied = optional_flag(config, "tie_word_embeddings")?
            .unwrap_or_else(|| self.model_types.get(model_type).copied().unwrap_or(false));
        let architectures = config.get("architectures").and_then(Value::as_array);
        let head = |name: &str| self.head_of.iter().any(|part| name.contains(part));
        Ok(Geometry {
            layers: layers.collect::<Result<_, String>>()?,
            vocabulary: optional_number(config, "vocab_size")?,
            width: self.width.as_deref().map_or(Ok(None), |key| optional_number(config, key))?,
            tied: tied && self.output_head.is_some(),
            head: architectures.is_some_and(|all| all.iter().filter_map(Value::as_str).any(head)),
        })
    }
}

/// Splits "h.3.mlp.c_fc" into `(3, "mlp.c_fc")` for the prefix "h.".
pub(super) fn within_stack<'a>(prefix: &str, bare: &'a str) -> Option<(u64, &'a str)> {
    let (number, within) = bare.strip_prefix(prefix)?.split_once('.')?;
    Some((number.parse().ok()?, within))
}

impl Matrix {
    /// The matrices of a weight: one, or the parts of a fused weight. `stored` and `bare` are its name with and without
    /// the base prefix.
    ///
    /// # Errors
    /// [`Error::Shape`], in the tensor, if it is not two-dimensional or its shape does not suit its fused parts.
    pub fn all_of(stored: &str, bare: &str, shape: &[usize], kind: Kind) -> Result<Vec<Self>> {
        let &[first, second] = shape else {
            let error = Error::Shape {
                operation: "weight",
                expected: "two dimensions".into(),
                got: format!("{} dimensions", shape.len()),
            };
            return Err(error.in_tensor(stored));
        };
        let (rows, columns) = if kind == Kind::Linear { (second, first) } else { (first, second) };
        let module = bare.strip_suffix(".weight").unwrap_or(bare);
        let matrix = |name: String, columns: usize, first_column: usize| Self {
            name,
            module: module.to_owned(),
            tensor: stored.to_owned(),
            kind,
            rows,
            columns,
            first_column,
        };
        let parts = fused_parts(module, kind, rows, columns).map_err(|error| error.in_tensor(stored))?;
        Ok(match parts {
            None => vec![matrix(module.to_owned(), columns, 0)],
            Some(parts) => {
                let width = columns / parts.len();
                let part = |(i, part): (usize, &String)| matrix(format!("{module}.{part}"), width, i * width);
                parts.iter().enumerate().map(part).collect()
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpt2() -> &'static Family {
        Family::of("gpt2").unwrap()
    }

    #[test]
    fn weights_of_every_head_are_known_with_and_without_the_prefix() {
        for (name, kind) in [
            ("wte.weight", Kind::Embedding),
            ("transformer.wpe.weight", Kind::Embedding),
            ("transformer.h.11.attn.c_attn.weight", Kind::Conv1d),
            ("h.0.mlp.c_proj.weight", Kind::Conv1d),
            ("transformer.h.2.crossattention.q_attn.weight", Kind::Conv1d),
            ("lm_head.weight", Kind::Linear),
            ("score.weight", Kind::Linear),
            ("classifier.weight", Kind::Linear),
            ("qa_outputs.weight", Kind::Linear),
            ("multiple_choice_head.summary.weight", Kind::Linear),
        ] {
            assert_eq!(gpt2().kind_of(name), Some(kind), "{name}");
        }
        for name in
            ["wte", "h.0.ln_1.weight", "h.0.attn.c_attn.bias", "h.x.mlp.c_fc.weight", "other.weight", "h.0.attn.bias"]
        {
            assert_eq!(gpt2().kind_of(name), None, "{name}");
        }
    }

    #[test]
    fn fused_attention_is_three_matrices_and_a_linear_weight_is_transposed() {
        let parts =
            Matrix::all_of("transformer.h.0.attn.c_attn.weight", "h.0.attn.c_attn.weight", &[8, 24], Kind::Conv1d)
                .unwrap();
        let seen: Vec<_> =
            parts.iter().map(|m| (m.name.as_str(), m.part(), m.rows, m.columns, m.first_column)).collect();
        assert_eq!(
            seen,
            [
                ("h.0.attn.c_attn.q", ".q", 8, 8, 0),
                ("h.0.attn.c_attn.k", ".k", 8, 8, 8),
                ("h.0.attn.c_attn.v", ".v", 8, 8, 16)
            ]
        );
        assert_eq!(parts[0].stored_module(), "transformer.h.0.attn.c_attn");
        let cross = Matrix::all_of(
            "h.0.crossattention.c_attn.weight",
            "h.0.crossattention.c_attn.weight",
            &[8, 16],
            Kind::Conv1d,
        )
        .unwrap();
        assert_eq!(cross.iter().map(Matrix::part).collect::<Vec<_>>(), [".k", ".v"]);
        let head = &Matrix::all_of("score.weight", "score.weight", &[5, 8], Kind::Linear).unwrap()[0];
        assert_eq!((head.rows, head.columns, head.name.as_str()), (8, 5, "score"));
    }

    #[test]
    fn misshapen_weights_are_refused_by_name() {
        for shape in [&[8, 25][..], &[8], &[2, 2, 2], &[0, 0]] {
            let message = Matrix::all_of("h.0.attn.c_attn.weight", "h.0.attn.c_attn.weight", shape, Kind::Conv1d)
                .unwrap_err()
                .to_string();
            assert!(message.contains("h.0.attn.c_attn.weight"), "{message}");
        }
    }

    #[test]
    fn order_is_the_models_and_layers_count_as_numbers() {
        let ordered = [
            "transformer.wte.weight",
            "transformer.wpe.weight",
            "transformer.h.2.attn.c_attn.weight",
            "transformer.h.2.attn.c_proj.weight",
            "transformer.h.2.mlp.c_fc.weight",
            "transformer.h.10.ln_1.weight",
            "transformer.ln_f.weight",
            "lm_head.weight",
            "unknown",
        ];
        let mut sorted = ordered;
        sorted.sort_unstable();
        sorted.sort_by_key(|name| gpt2().model_order(name));
        assert_eq!(sorted, ordered);
    }

    #[test]
    fn parts_of_fused_weights_are_told_from_modules_by_their_names() {
        for (name, module, part) in [
            ("h.0.attn.c_attn.q", "h.0.attn.c_attn", Some("q")),
            ("c_attn.v", "c_attn", Some("v")),
            ("h.0.mlp.c_fc", "h.0.mlp.c_fc", None),
            ("h.0.attn.c_attn.x", "h.0.attn.c_attn.x", None),
            ("layer.0.query.q", "layer.0.query.q", None),
            ("wte", "wte", None),
        ] {
            assert_eq!(split_part(name), (module, part));
        }
        assert_eq!(fused_parts("c_attn", Kind::Linear, 8, 24).unwrap(), None);
    }

    #[test]
    fn a_family_without_a_description_is_refused_by_name() {
        let message = Family::of("mamba").unwrap_err();
        assert!(message.contains("\"gpt2\"") && message.contains("\"mamba\""), "{message}");
    }

    #[test]
    fn only_masks_count_as_masks() {
        assert!(gpt2().is_ignored("h.3.attn.bias") && gpt2().is_ignored("transformer.h.3.attn.masked_bias"));
        assert!(
            !gpt2().is_ignored("h.3.attn.c_attn.bias")
                && !gpt2().is_ignored("attn.bias")
                && !gpt2().is_ignored("h.3.mlp.c_fc.bias")
        );
    }
}
