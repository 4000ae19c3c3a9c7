//! Which tensor is what in a GPT-2 checkpoint, by its name.
//!
//! Names are those of transformers' GPT-2 with any head. A *bare* name has no base prefix `transformer.`: `AutoModel`
//! saves bare names, every model with a head saves prefixed ones.

use crate::error::{Error, Result};

/// The prefix that models with a head put before the names of the base model.
pub const BASE_PREFIX: &str = "transformer.";

/// The output head that may share its weight with the token embedding.
pub const TIED_HEAD: &str = "lm_head.weight";

/// The token embedding.
pub const TOKEN_EMBEDDING: &str = "wte.weight";

/// What a module does with its weight, which also says how the weight is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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

    /// Reads the name that the Python side uses.
    ///
    /// # Errors
    /// [`Error::Config`] if it is none of "conv1d", "linear", "embedding".
    pub fn from_name(name: &str) -> Result<Self> {
        Self::NAMES.iter().find(|(known, _)| *known == name).map(|&(_, kind)| kind).ok_or_else(|| {
            Error::Config(format!("kind: expected \"conv1d\", \"linear\" or \"embedding\", got {name:?}"))
        })
    }

    /// The name that the Python side uses.
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
    /// What the module does with it.
    pub kind: Kind,
    /// Rows: in features, or the vocabulary.
    pub rows: usize,
    /// Columns: out features, or the dimension.
    pub columns: usize,
    /// Where its columns begin in the in × out tensor; not 0 only for the later parts of a fused weight.
    pub first_column: usize,
}

impl Matrix {
    /// The matrix's number of parameters.
    #[must_use]
    pub fn parameters(&self) -> usize {
        self.rows.saturating_mul(self.columns)
    }

    /// The part of a fused weight that it is, as a suffix of the module's name: "" or ".q", ".k", ".v".
    #[must_use]
    pub fn part(&self) -> &str {
        &self.name[self.module.len()..]
    }

    /// The stored name of its module, with the prefix that the checkpoint uses.
    #[must_use]
    pub fn stored_module(&self) -> &str {
        self.tensor.strip_suffix(".weight").unwrap_or(&self.tensor)
    }
}

/// A stored name without the base prefix.
#[must_use]
pub fn bare(stored: &str) -> &str {
    stored.strip_prefix(BASE_PREFIX).unwrap_or(stored)
}

/// The kind of the module that a stored weight belongs to, or `None` for tensors that are not a matrix (biases,
/// layer norms, unknown names).
#[must_use]
pub fn kind_of(stored: &str) -> Option<Kind> {
    let module = bare(stored).strip_suffix(".weight")?;
    match module {
        "wte" | "wpe" => return Some(Kind::Embedding),
        "lm_head" | "score" | "classifier" | "qa_outputs" | "multiple_choice_head.summary" => {
            return Some(Kind::Linear);
        }
        _ => {}
    }
    let (_, within) = layer(module)?;
    let conv1d = matches!(
        within,
        "attn.c_attn"
            | "attn.c_proj"
            | "crossattention.c_attn"
            | "crossattention.q_attn"
            | "crossattention.c_proj"
            | "mlp.c_fc"
            | "mlp.c_proj"
    );
    conv1d.then_some(Kind::Conv1d)
}

/// Splits "h.3.mlp.c_fc" into `(3, "mlp.c_fc")`.
#[must_use]
pub fn layer(bare: &str) -> Option<(u64, &str)> {
    let (number, within) = bare.strip_prefix("h.")?.split_once('.')?;
    Some((number.parse().ok()?, within))
}

/// Whether a tensor is a causal mask that old versions of transformers stored among the weights. Today's rebuild it
/// and ignore the stored one.
#[must_use]
pub fn is_mask(stored: &str) -> bool {
    layer(bare(stored)).is_some_and(|(_, within)| {
        matches!(within, "attn.bias" | "attn.masked_bias" | "crossattention.bias" | "crossattention.masked_bias")
    })
}

/// The matrices that a weight holds: one, or the parts of a fused `c_attn` (`d × 3d`: q, k, v; in cross-attention
/// `d × 2d`: k, v).
///
/// # Errors
/// [`Error::Shape`] in the tensor if it is not two-dimensional, or a `c_attn` whose width is neither.
pub fn matrices(stored: &str, shape: &[usize], kind: Kind) -> Result<Vec<Matrix>> {
    let &[first, second] = shape else {
        let error = Error::Shape {
            operation: "weight",
            expected: "two dimensions".into(),
            got: format!("{} dimensions", shape.len()),
        };
        return Err(error.in_tensor(stored));
    };
    let (rows, columns) = if kind == Kind::Linear { (second, first) } else { (first, second) };
    let module = bare(stored).strip_suffix(".weight").unwrap_or(bare(stored));
    let matrix = |part: &str, columns: usize, first_column: usize| Matrix {
        name: format!("{module}{part}"),
        module: module.to_owned(),
        tensor: stored.to_owned(),
        kind,
        rows,
        columns,
        first_column,
    };
    if kind != Kind::Conv1d || !(module == "c_attn" || module.ends_with(".c_attn")) {
        return Ok(vec![matrix("", columns, 0)]);
    }
    let parts: &[&str] = if rows > 0 && columns == 3 * rows {
        &[".q", ".k", ".v"]
    } else if rows > 0 && columns == 2 * rows {
        &[".k", ".v"]
    } else {
        let error = Error::Shape {
            operation: "fused c_attn",
            expected: format!("({rows}, 3·{rows}), or (d, 2·d) in cross-attention"),
            got: format!("({rows}, {columns})"),
        };
        return Err(error.in_tensor(stored));
    };
    Ok(parts.iter().enumerate().map(|(i, part)| matrix(part, rows, i * rows)).collect())
}

/// A sort key that puts stored names in the order in which the model uses them: embeddings, layers by number, the
/// final layer norm, heads, anything else by name.
#[must_use]
pub fn model_order(stored: &str) -> (usize, u64, usize, &str) {
    const LAYER: [&str; 11] = [
        "ln_1.",
        "attn.c_attn.",
        "attn.c_proj.",
        "attn.",
        "ln_2.",
        "crossattention.c_attn.",
        "crossattention.q_attn.",
        "crossattention.c_proj.",
        "ln_cross_attn.",
        "mlp.c_fc.",
        "mlp.c_proj.",
    ];
    const TOP: [&str; 8] =
        ["wte.", "wpe.", "h.", "ln_f.", "lm_head.", "multiple_choice_head.", "score.", "classifier."];
    let position = |prefixes: &[&str], name: &str| {
        prefixes.iter().position(|prefix| name.starts_with(prefix)).unwrap_or(prefixes.len())
    };
    let name = bare(stored);
    match layer(name) {
        Some((number, within)) => (position(&TOP, "h."), number, position(&LAYER, within), within),
        None => (position(&TOP, name), 0, 0, name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
            assert_eq!(kind_of(name), Some(kind), "{name}");
        }
        for name in
            ["wte", "h.0.ln_1.weight", "h.0.attn.c_attn.bias", "h.x.mlp.c_fc.weight", "other.weight", "h.0.attn.bias"]
        {
            assert_eq!(kind_of(name), None, "{name}");
        }
    }

    #[test]
    fn fused_attention_is_three_matrices_and_a_linear_weight_is_transposed() {
        let parts = matrices("transformer.h.0.attn.c_attn.weight", &[8, 24], Kind::Conv1d).unwrap();
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
        let cross = matrices("h.0.crossattention.c_attn.weight", &[8, 16], Kind::Conv1d).unwrap();
        assert_eq!(cross.iter().map(Matrix::part).collect::<Vec<_>>(), [".k", ".v"]);
        let head = &matrices("score.weight", &[5, 8], Kind::Linear).unwrap()[0];
        assert_eq!((head.rows, head.columns, head.name.as_str()), (8, 5, "score"));
    }

    #[test]
    fn misshapen_weights_are_refused_by_name() {
        for shape in [&[8, 25][..], &[8], &[2, 2, 2], &[0, 0]] {
            let message = matrices("h.0.attn.c_attn.weight", shape, Kind::Conv1d).unwrap_err().to_string();
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
        sorted.sort_by_key(|name| model_order(name));
        assert_eq!(sorted, ordered);
    }

    #[test]
    fn only_masks_count_as_masks() {
        assert!(is_mask("h.3.attn.bias") && is_mask("transformer.h.3.attn.masked_bias"));
        assert!(!is_mask("h.3.attn.c_attn.bias") && !is_mask("attn.bias") && !is_mask("h.3.mlp.c_fc.bias"));
    }
}
