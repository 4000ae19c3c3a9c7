//! The tensors and shapes that the `config.json` of a GPT-2 determines.

use serde_json::{Map, Value};

use super::description::Family;
use super::geometry::{optional_flag, optional_number};
use super::matrix::Kind;

/// The keys of a GPT-2 `config.json` that determine shapes. Missing keys get transformers' defaults.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpt2Geometry {
    /// `n_layer`
    pub layers: usize,
    /// `n_embd`
    pub width: usize,
    /// `vocab_size`
    pub vocabulary: usize,
    /// `n_positions`
    pub positions: usize,
    /// `n_inner`, by default `4·n_embd`
    pub inner: usize,
    /// `add_cross_attention`
    pub cross_attention: bool,
}

fn family() -> &'static Family {
    Family::of("gpt2").expect("GPT-2 has a description")
}

impl Gpt2Geometry {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// A message that names the key with a value of the wrong type.
    pub fn from_config(config: &Map<String, Value>) -> Result<Self, String> {
        let number = |key, default| Ok::<_, String>(optional_number(config, key)?.unwrap_or(default));
        let width = number("n_embd", 768)?;
        Ok(Self {
            layers: number("n_layer", 12)?,
            width,
            vocabulary: number("vocab_size", 50257)?,
            positions: number("n_positions", 1024)?,
            inner: number("n_inner", width.saturating_mul(4))?,
            cross_attention: optional_flag(config, "add_cross_attention")?.unwrap_or(false),
        })
    }

    /// The bare names and shapes of all required tensors, of a model with or without an output head of its own. The
    /// iterator is lazy, so that a `config.json` with 10¹⁸ layers fails at the first missing tensor.
    pub fn tensors(&self, own_head: bool) -> impl Iterator<Item = (String, Vec<usize>)> + '_ {
        let d = self.width;
        let top = [("wte.weight", vec![self.vocabulary, d]), ("wpe.weight", vec![self.positions, d])];
        let last = [("ln_f.weight", vec![d]), ("ln_f.bias", vec![d])];
        let head = own_head.then(|| ("lm_head.weight", vec![self.vocabulary, d]));
        top.into_iter()
            .chain(last)
            .chain(head)
            .map(|(name, shape)| (name.to_owned(), shape))
            .chain((0..self.layers).flat_map(|layer| self.layer(layer)))
    }

    fn layer(&self, number: usize) -> Vec<(String, Vec<usize>)> {
        let d = self.width;
        let mut norms = vec!["ln_1", "ln_2"];
        let mut maps = vec![
            ("attn.c_attn", d, d.saturating_mul(3)),
            ("attn.c_proj", d, d),
            ("mlp.c_fc", d, self.inner),
            ("mlp.c_proj", self.inner, d),
        ];
        if self.cross_attention {
            norms.push("ln_cross_attn");
            maps.extend([
                ("crossattention.c_attn", d, d.saturating_mul(2)),
                ("crossattention.q_attn", d, d),
                ("crossattention.c_proj", d, d),
            ]);
        }
        let norms = norms.into_iter().flat_map(|norm| [(norm, "weight", vec![d]), (norm, "bias", vec![d])]);
        let maps = maps
            .into_iter()
            .flat_map(|(map, rows, columns)| [(map, "weight", vec![rows, columns]), (map, "bias", vec![columns])]);
        norms.chain(maps).map(|(module, which, shape)| (format!("h.{number}.{module}.{which}"), shape)).collect()
    }

    /// Checks a checkpoint's tensors, given by stored name and shape, of a model with or without an output head of its
    /// own.
    ///
    /// # Errors
    /// A message that names the first tensor that is missing, has a wrong shape, or does not belong to the model.
    pub fn check<'a>(
        &self,
        own_head: bool,
        tensors: impl Iterator<Item = (&'a str, &'a [usize])>,
    ) -> Result<(), String> {
        let family = family();
        let mut found = std::collections::HashMap::new();
        let tensors: Vec<_> = tensors.collect();
        for &(stored, shape) in &tensors {
            if let Some((other, _)) = found.insert(family.bare(stored), (stored, shape)) {
                return Err(format!("tensors '{other}' and '{stored}' are the same weight under two names"));
            }
        }
        let mut promised = std::collections::HashSet::new();
        for (name, expected) in self.tensors(own_head) {
            match found.get(name.as_str()) {
                None => return Err(family.missing(&name, &expected, tensors.iter().map(|(stored, _)| *stored))),
                Some((stored, shape)) if *shape != expected => {
                    return Err(family.misshapen(stored, &expected, shape));
                }
                Some(_) => promised.insert(name),
            };
        }
        let mut rest: Vec<_> = found.iter().filter(|(name, _)| !promised.contains(&***name)).collect();
        rest.sort_unstable();
        for (name, (stored, shape)) in rest {
            let fits = match family.kind_of(stored) {
                // A head has the width of the model and any number of outputs.
                Some(Kind::Linear) if family.is_output_head(name) => **shape == [self.vocabulary, self.width],
                Some(Kind::Linear) => shape.len() == 2 && shape[1] == self.width,
                Some(_) => false,
                None => family.layer_of(name).is_none_or(|(layer, _)| layer < self.layers as u64),
            };
            if !fits {
                return Err(format!(
                    "tensor '{stored}' of shape {shape:?} does not belong to the model of config.json"
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(json: &str) -> Result<Gpt2Geometry, String> {
        Gpt2Geometry::from_config(serde_json::from_str::<Value>(json).unwrap().as_object().unwrap())
    }

    const SMALL: &str = r#"{"n_layer":2,"n_embd":4,"vocab_size":10,"n_positions":6,"add_cross_attention":true}"#;

    #[test]
    fn defaults_are_gpt2_small() {
        let small = geometry("{}").unwrap();
        assert_eq!((small.layers, small.width, small.inner), (12, 768, 3072));
        // GPT-2 small has 124,439,808 published parameters, the tied head counted once.
        let count: usize = small.tensors(false).map(|(_, shape)| shape.iter().product::<usize>()).sum();
        assert_eq!(count, 124_439_808);
    }

    #[test]
    fn values_of_the_wrong_type_are_named() {
        for (json, key) in [
            (r#"{"n_layer":"12"}"#, "n_layer"),
            (r#"{"n_embd":-1}"#, "n_embd"),
            (r#"{"n_embd":0}"#, "n_embd"),
            (r#"{"add_cross_attention":1}"#, "add_cross_attention"),
        ] {
            assert!(geometry(json).unwrap_err().starts_with(key));
        }
    }

    #[test]
    fn a_whole_model_passes_and_every_fault_is_named() {
        let small = geometry(SMALL).unwrap();
        let whole: Vec<(String, Vec<usize>)> =
            small.tensors(false).map(|(name, shape)| (format!("transformer.{name}"), shape)).collect();
        let check = |tensors: &[(String, Vec<usize>)]| {
            small.check(false, tensors.iter().map(|(name, shape)| (name.as_str(), shape.as_slice())))
        };
        check(&whole).unwrap();
        for i in 0..whole.len() {
            let mut missing = whole.clone();
            let (name, _) = missing.remove(i);
            assert!(check(&missing).unwrap_err().contains(&*family().bare(&name)));
            let mut misshapen = whole.clone();
            misshapen[i].1[0] += 1;
            assert!(check(&misshapen).unwrap_err().contains(&name));
        }
        for (name, shape, word) in [
            ("wte.weight", vec![10, 4], "two names"),
            ("transformer.h.2.mlp.c_fc.weight", vec![4, 16], "does not belong"),
            ("transformer.h.2.ln_1.bias", vec![4], "does not belong"),
            ("lm_head.weight", vec![11, 4], "does not belong"),
            ("score.weight", vec![3, 5], "does not belong"),
        ] {
            let mut extra = whole.clone();
            extra.push((name.into(), shape));
            assert!(check(&extra).unwrap_err().contains(word), "{name}");
        }
        let mut heads = whole.clone();
        heads.extend([
            ("score.weight".into(), vec![3, 4]),
            ("lm_head.weight".into(), vec![10, 4]),
            ("other".into(), vec![]),
        ]);
        check(&heads).unwrap();
    }

    #[test]
    fn an_untied_language_model_needs_its_head() {
        let has_head = |own| geometry("{}").unwrap().tensors(own).any(|(name, _)| name == "lm_head.weight");
        assert!(has_head(true) && !has_head(false));
        let tensors: Vec<_> = geometry(SMALL).unwrap().tensors(false).collect();
        let check = |config: &str| {
            let config: Value = serde_json::from_str(config).unwrap();
            let named = tensors.iter().map(|(name, shape)| (name.as_str(), shape.as_slice()));
            family().check("gpt2", config.as_object().unwrap(), named)
        };
        check(SMALL).unwrap();
        let untied = r#""architectures":["GPT2LMHeadModel"],"tie_word_embeddings":false}"#;
        let untied = format!("{},{untied}", SMALL.trim_end_matches('}'));
        assert!(check(&untied).unwrap_err().contains("'lm_head.weight' is missing"));
        check(&untied.replace("LMHead", "")).unwrap();
        assert!(check(r#"{"tie_word_embeddings":1}"#).unwrap_err().starts_with("tie_word_embeddings"));
    }

    #[test]
    fn an_absurd_layer_count_costs_nothing() {
        let absurd = geometry(r#"{"n_layer":1000000000000000000,"n_embd":9000000000000000000}"#).unwrap();
        assert!(absurd.check(false, std::iter::empty()).unwrap_err().contains("wte.weight"));
    }
}
