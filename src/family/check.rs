//! Whether the tensors of a checkpoint are those of the model in its `config.json`.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::description::{Family, within_stack};
use super::geometry::Geometry;
use super::gpt2::Gpt2Geometry;

/// Tensors by bare name, with their stored names and shapes.
type Found<'a> = BTreeMap<String, (&'a str, &'a [usize])>;

impl Family {
    /// Checks a dense checkpoint's tensors, given by stored name and shape.
    ///
    /// Of GPT-2 every shape follows from `config.json`. Of other families the embedding and the head are compared with
    /// it, and every layer with the first one.
    ///
    /// # Errors
    /// A message that names the first tensor that is missing, has a wrong shape, or does not belong to the model.
    pub fn check<'a>(
        &self,
        model_type: &str,
        config: &Map<String, Value>,
        tensors: impl Iterator<Item = (&'a str, &'a [usize])>,
    ) -> Result<(), String> {
        let geometry = self.geometry(model_type, config)?;
        if model_type == "gpt2" {
            return Gpt2Geometry::from_config(config)?.check(geometry.head && !geometry.tied, tensors);
        }
        let mut found = Found::new();
        for (stored, shape) in tensors {
            if let Some((other, _)) = found.insert(self.bare(stored).into_owned(), (stored, shape)) {
                return Err(format!("tensors '{other}' and '{stored}' are the same weight under two names"));
            }
        }
        for name in self.required() {
            if !found.contains_key(name) {
                let why = format!("every model of type {model_type} has it");
                return Err(self.absent(name, &why, found.values().map(|(stored, _)| *stored)));
            }
        }
        self.check_ends(&geometry, &found)?;
        for (i, (prefix, count)) in geometry.layers.iter().enumerate() {
            // An encoder alone has no layers in the decoder's stack.
            if i == 0 || found.keys().any(|name| name.starts_with(prefix)) {
                self.check_stack(prefix, *count, &found)?;
            }
        }
        Ok(())
    }

    /// The token embedding and an output head of its own have the shape of `config.json`.
    fn check_ends(&self, geometry: &Geometry, found: &Found<'_>) -> Result<(), String> {
        let own_head = self.output_head.as_deref().filter(|_| !geometry.tied);
        for (module, needed) in [(self.token_embedding.as_deref(), false), (own_head, geometry.head)] {
            let Some(module) = module else { continue };
            let name = format!("{module}.weight");
            match found.get(&name) {
                None if needed => {
                    let why = "config.json asks for a head that is not tied";
                    return Err(self.absent(&name, why, found.values().map(|(stored, _)| *stored)));
                }
                Some((stored, shape)) => {
                    let expected = [geometry.vocabulary, geometry.width];
                    let fits = |(got, asked): (&usize, Option<usize>)| asked.is_none_or(|asked| asked == *got);
                    if shape.len() != 2 || !shape.iter().zip(expected).all(fits) {
                        let size = |size: Option<usize>| size.map_or("any".to_owned(), |size| size.to_string());
                        let asked = expected.map(size).join(", ");
                        return Err(format!("tensor '{stored}': config.json asks for shape [{asked}], got {shape:?}"));
                    }
                }
                None => {}
            }
        }
        Ok(())
    }

    /// All layers of a stack are there and have the tensors of the first one.
    fn check_stack(&self, prefix: &str, count: Option<usize>, found: &Found<'_>) -> Result<(), String> {
        let mut layers: BTreeMap<u64, BTreeMap<&str, (&str, &[usize])>> = BTreeMap::new();
        for (name, &(stored, shape)) in found {
            if let Some((number, within)) = within_stack(prefix, name) {
                layers.entry(number).or_default().insert(within, (stored, shape));
            }
        }
        let last = layers.last_key_value().map_or(0, |(&number, _)| number);
        let count = count.map_or(last + 1, |count| count as u64);
        let first = layers.get(&0).ok_or_else(|| format!("tensors '{prefix}0.…' are missing: no layers"))?;
        if let Some((number, tensors)) = layers.range(count..).next() {
            let stored = tensors.values().next().map_or("", |(stored, _)| stored);
            return Err(format!(
                "tensor '{stored}' does not belong to the model of config.json: it is in layer {number} of {count}"
            ));
        }
        let uneven = |within: &str| self.first_layer_only.iter().any(|name| name == within);
        let empty = BTreeMap::new();
        for number in 1..count {
            let tensors = layers.get(&number).unwrap_or(&empty);
            for (within, (_, expected)) in first.iter().filter(|(within, _)| !uneven(within)) {
                match tensors.get(within) {
                    None => {
                        let name = format!("{prefix}{number}.{within}");
                        let stored = found.values().map(|(stored, _)| *stored);
                        return Err(self.absent(&name, &format!("layer 0 of {count} has it"), stored));
                    }
                    Some((stored, shape)) if shape != expected => {
                        return Err(format!(
                            "tensor '{stored}': expected the shape {expected:?} of layer 0, got {shape:?}"
                        ));
                    }
                    Some(_) => {}
                }
            }
            let extra = tensors.iter().find(|(within, _)| !uneven(within) && !first.contains_key(*within));
            if let Some((_, (stored, _))) = extra {
                return Err(format!("tensor '{stored}' does not belong to the model: layer 0 has no such tensor"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Tensors = Vec<(String, Vec<usize>)>;

    fn llama(layers: usize) -> Tensors {
        let mut tensors: Tensors =
            vec![("model.embed_tokens.weight".into(), vec![20, 8]), ("model.norm.weight".into(), vec![8])];
        for layer in 0..layers {
            for (name, shape) in [
                ("self_attn.q_proj.weight", vec![8, 8]),
                ("mlp.up_proj.weight", vec![16, 8]),
                ("mlp.down_proj.weight", vec![8, 16]),
                ("input_layernorm.weight", vec![8]),
            ] {
                tensors.push((format!("model.layers.{layer}.{name}"), shape));
            }
        }
        tensors
    }

    fn check(model_type: &str, config: &str, tensors: &Tensors) -> Result<(), String> {
        let config: Value = serde_json::from_str(config).unwrap();
        let named = tensors.iter().map(|(name, shape)| (name.as_str(), shape.as_slice()));
        Family::of(model_type).unwrap().check(model_type, config.as_object().unwrap(), named)
    }

    const SMALL: &str = r#"{"num_hidden_layers":3,"hidden_size":8,"vocab_size":20,"tie_word_embeddings":true}"#;

    #[test]
    fn a_whole_model_passes_with_and_without_a_head_of_its_own() {
        check("llama", SMALL, &llama(3)).unwrap();
        // Without the number of layers, those that are there count.
        check("llama", "{}", &llama(2)).unwrap();
        let config = r#"{"architectures":["LlamaForCausalLM"],"num_hidden_layers":3,"vocab_size":20}"#;
        let mut with_head = llama(3);
        assert!(check("llama", config, &with_head).unwrap_err().contains("'lm_head.weight' is missing"));
        with_head.push(("lm_head.weight".into(), vec![20, 8]));
        check("llama", config, &with_head).unwrap();
    }

    #[test]
    fn every_fault_is_named() {
        for i in 0..llama(3).len() {
            let mut missing = llama(3);
            let (name, _) = missing.remove(i);
            let error = check("llama", SMALL, &missing).unwrap_err();
            // A tensor that only the first layer lacks does not belong in the second.
            let named = name.trim_start_matches("model.").replace("layers.0.", "layers.1.");
            assert!(
                error.contains(named.as_str()) || error.contains(name.trim_start_matches("model.")),
                "{name}: {error}"
            );
            let mut misshapen = llama(3);
            misshapen[i].1[0] += 1;
            let norm = name.ends_with("model.norm.weight");
            assert_eq!(check("llama", SMALL, &misshapen).is_err(), !norm, "{name}");
        }
        assert!(check("llama", SMALL, &llama(4)).unwrap_err().contains("layer 3 of 3"));
        assert!(check("llama", SMALL, &llama(0)).unwrap_err().contains("no layers"));
        let absurd = r#"{"num_hidden_layers":1000000000000000000}"#;
        assert!(check("llama", absurd, &llama(2)).unwrap_err().contains("'layers.2."));
        let mut twice = llama(3);
        twice.push(("embed_tokens.weight".into(), vec![20, 8]));
        assert!(check("llama", SMALL, &twice).unwrap_err().contains("two names"));
    }
}
