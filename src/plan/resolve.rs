//! A configuration resolved against the tensors of a model: every pattern replaced by the matrices that it names.

use glob::{MatchOptions, Pattern};
use serde::Serialize;

use super::config::TQConfig;
use crate::checkpoint::names::{self, BASE_PREFIX, Kind, Matrix, TIED_HEAD};
use crate::checkpoint::read::Checkpoint;
use crate::error::{Error, Result};
use crate::spec::MatrixSpec;

/// A tensor that a plan is made over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Input {
    /// Its stored name.
    pub name: String,
    /// Its shape as stored.
    pub shape: Vec<usize>,
    /// The kind of its module, if it is a weight that may be compressed.
    pub kind: Option<Kind>,
    /// Its number of parameters.
    pub parameters: usize,
}

/// One matrix and what will become of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// The matrix.
    pub matrix: Matrix,
    /// What the configuration asks of it.
    pub spec: MatrixSpec,
    /// Its parameters when done.
    pub parameters: usize,
}

/// A tensor that stays as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Untouched {
    /// Its stored name.
    pub tensor: String,
    /// Its shape as stored.
    pub shape: Vec<usize>,
    /// Its number of parameters.
    pub parameters: usize,
}

/// A configuration resolved: every matrix validated, nothing computed yet.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The configuration with concrete matrix names for patterns, in model order.
    pub config: TQConfig,
    /// The matrices to compress, in model order.
    pub jobs: Vec<Job>,
    /// The tensors that stay as they are, in model order.
    pub untouched: Vec<Untouched>,
    /// Parameters now. A tied head does not count: it is the token embedding.
    pub parameters_before: usize,
    /// Parameters when done.
    pub parameters_after: usize,
}

impl Plan {
    /// Resolves `config` against the tensors of a model. `tied_head` says that the output head is the token embedding,
    /// so that it is neither counted nor a matrix of its own.
    ///
    /// # Errors
    /// [`Error::Config`] for a pattern that is malformed or matches nothing, or a `c_attn` of which only a part would
    /// be compressed; [`Error::Shape`], in the matrix, for a block that does not divide it or a rank too large.
    pub fn resolve(inputs: &[Input], tied_head: bool, config: &TQConfig) -> Result<Self> {
        let mut inputs: Vec<&Input> = inputs.iter().filter(|input| !(tied_head && input.name == TIED_HEAD)).collect();
        inputs.sort_by(|left, right| names::model_order(&left.name).cmp(&names::model_order(&right.name)));
        let mut rules = Vec::with_capacity(config.specs.len());
        for (pattern, spec) in &config.specs {
            let glob = Pattern::new(pattern)
                .map_err(|error| Error::Config(format!("specs: pattern {pattern:?}: {}", error.msg)))?;
            rules.push(Rule { pattern, glob, spec, matched: false });
        }

        let mut plan = Self {
            config: TQConfig { specs: indexmap::IndexMap::new(), ..config.clone() },
            jobs: Vec::new(),
            untouched: Vec::new(),
            parameters_before: 0,
            parameters_after: 0,
        };
        for input in inputs {
            plan.parameters_before += input.parameters;
            let matrices =
                input.kind.map_or(Ok(Vec::new()), |kind| names::matrices(&input.name, &input.shape, kind))?;
            let parts = matrices.len();
            let asked: Vec<_> = matrices
                .into_iter()
                .filter_map(|matrix| first_match(&mut rules, &matrix).map(|spec| (matrix, spec)))
                .collect();
            if asked.is_empty() {
                plan.parameters_after += input.parameters;
                let (tensor, shape) = (input.name.clone(), input.shape.clone());
                plan.untouched.push(Untouched { tensor, shape, parameters: input.parameters });
            } else if asked.len() < parts {
                let names: Vec<_> = asked.iter().map(|(matrix, _)| matrix.name.as_str()).collect();
                return Err(Error::Config(format!(
                    "tensor '{}' is fused: compress all of its {parts} parts or none, got only {}",
                    input.name,
                    names.join(", ")
                )));
            }
            for (matrix, spec) in asked {
                let parameters = spec.parameters(matrix.rows, matrix.columns);
                let parameters = parameters.map_err(|error| error.in_tensor(&matrix.name))?;
                plan.parameters_after += parameters;
                plan.config.specs.insert(matrix.name.clone(), spec.clone());
                plan.jobs.push(Job { matrix, spec, parameters });
            }
        }
        if let Some(rule) = rules.iter().find(|rule| !rule.matched) {
            let hint = if tied_head && rule.glob.matches_with(TIED_HEAD.trim_end_matches(".weight"), OPTIONS) {
                " (lm_head is tied to wte: compressing wte compresses both)"
            } else {
                ""
            };
            return Err(Error::Config(format!("specs: pattern {:?} matches no matrix{hint}", rule.pattern)));
        }
        Ok(plan)
    }

    /// Resolves `config` against a checkpoint.
    ///
    /// # Errors
    /// As [`resolve`](Self::resolve); [`Error::Dtype`] in a tensor that would be compressed and is not floating.
    pub fn for_checkpoint(checkpoint: &Checkpoint, config: &TQConfig) -> Result<Self> {
        let inputs: Vec<_> = checkpoint
            .tensors()
            .iter()
            .map(|(name, tensor)| Input {
                name: name.clone(),
                shape: tensor.shape.clone(),
                kind: names::kind_of(name),
                parameters: tensor.parameters(),
            })
            .collect();
        let plan = Self::resolve(&inputs, checkpoint.tied(), config)?;
        plan.jobs.iter().try_for_each(|job| checkpoint.stored(&job.matrix).map(drop))?;
        Ok(plan)
    }
}

/// `*` matches across dots and a leading dot is nothing special: names are not paths.
const OPTIONS: MatchOptions =
    MatchOptions { case_sensitive: true, require_literal_separator: false, require_literal_leading_dot: false };

struct Rule<'a> {
    pattern: &'a str,
    glob: Pattern,
    spec: &'a MatrixSpec,
    matched: bool,
}

/// The spec of the first rule that matches the matrix; every rule that does is marked.
fn first_match(rules: &mut [Rule<'_>], matrix: &Matrix) -> Option<MatrixSpec> {
    let mut names = Vec::with_capacity(8);
    for name in [&matrix.name, &matrix.module] {
        for prefix in ["", BASE_PREFIX] {
            names.push(format!("{prefix}{name}"));
            names.push(format!("{prefix}{name}.weight"));
        }
    }
    let mut first = None;
    for rule in rules {
        if names.iter().any(|name| rule.glob.matches_with(name, OPTIONS)) {
            rule.matched = true;
            first.get_or_insert_with(|| rule.spec.clone());
        }
    }
    first
}

#[cfg(test)]
mod tests {
    use super::*;

    fn input(name: &str, shape: &[usize]) -> Input {
        Input { name: name.into(), shape: shape.into(), kind: names::kind_of(name), parameters: shape.iter().product() }
    }

    fn model() -> Vec<Input> {
        let mut inputs = vec![input("lm_head.weight", &[40, 8]), input("transformer.wte.weight", &[40, 8])];
        for layer in 0..4 {
            for (name, shape) in [
                ("attn.c_attn.bias", &[24][..]),
                ("attn.c_attn.weight", &[8, 24]),
                ("mlp.c_fc.weight", &[8, 32]),
                ("mlp.c_proj.weight", &[32, 8]),
            ] {
                inputs.push(input(&format!("transformer.h.{layer}.{name}"), shape));
            }
        }
        inputs
    }

    fn resolve(specs: &str, tied: bool) -> Result<Plan> {
        Plan::resolve(&model(), tied, &TQConfig::from_json(&format!("{{\"specs\":{specs}}}")).unwrap())
    }

    fn names(plan: &Plan) -> Vec<&str> {
        plan.jobs.iter().map(|job| job.matrix.name.as_str()).collect()
    }

    const SPEC: &str = r#"{"block":[2,4],"rank":2}"#;

    #[test]
    fn patterns_match_any_form_of_a_name() {
        for pattern in [
            "h.*[13579].mlp.c_fc",
            "transformer.h.*[13579].mlp.c_fc",
            "h.*[13579].mlp.c_fc.weight",
            "transformer.h.*[13579].mlp.c_fc.weight",
            "*[13579].*c_fc",
        ] {
            let plan = resolve(&format!("{{{pattern:?}:{SPEC}}}"), true).unwrap();
            assert_eq!(names(&plan), ["h.1.mlp.c_fc", "h.3.mlp.c_fc"], "{pattern}");
        }
        // A fused weight is matched by its module, or by the names of all its parts.
        for pattern in ["h.0.attn.c_attn", "h.0.attn.c_attn.?"] {
            let plan = resolve(&format!("{{{pattern:?}:{SPEC}}}"), true).unwrap();
            assert_eq!(names(&plan), ["h.0.attn.c_attn.q", "h.0.attn.c_attn.k", "h.0.attn.c_attn.v"], "{pattern}");
        }
    }

    #[test]
    fn the_first_pattern_decides_and_the_resolved_config_is_concrete_and_equivalent() {
        let other = r#"{"block":[4,2],"rank":1}"#;
        let plan = resolve(&format!(r#"{{"h.2.mlp.c_proj":{other},"*mlp*":{SPEC}}}"#), true).unwrap();
        assert_eq!(plan.jobs.len(), 8);
        assert_eq!(plan.config.specs["h.2.mlp.c_proj"].as_kronecker().unwrap().block, (4, 2));
        assert_eq!(plan.config.specs["h.1.mlp.c_proj"].as_kronecker().unwrap().block, (2, 4));
        assert_eq!(Plan::resolve(&model(), true, &plan.config).unwrap(), plan);
    }

    #[test]
    fn parameters_are_counted_over_the_whole_model() {
        let plan = resolve(r#"{"wte":{"block":[1,4],"rank":1}}"#, true).unwrap();
        let layers = 4 * (24 + 8 * 24 + 2 * 8 * 32);
        assert_eq!((plan.parameters_before, plan.parameters_after), (320 + layers, 80 + 4 + layers));
        assert_eq!(plan.untouched.len(), 16);
        let untied = resolve(r#"{"wte":{"block":[1,4],"rank":1}}"#, false).unwrap();
        assert_eq!((untied.parameters_before, untied.parameters_after), (640 + layers, 404 + layers));
        assert_eq!(untied.untouched.last().unwrap().tensor, "lm_head.weight");
    }

    #[test]
    fn misfits_are_refused_by_name() {
        for (specs, words) in [
            (r#"{"h.9.*":{"block":[2,4],"rank":2}}"#, r#"pattern "h.9.*" matches no matrix"#),
            (r#"{"h.0.ln_1":{"block":[1,1],"rank":1}}"#, r#"pattern "h.0.ln_1" matches no matrix"#),
            (r#"{"lm_head":{"block":[2,4],"rank":2}}"#, "lm_head is tied to wte"),
            (r#"{"[":{"block":[2,4],"rank":2}}"#, r#"pattern "[""#),
            (r#"{"h.0.*c_attn.q":{"block":[2,4],"rank":2}}"#, "compress all of its 3 parts or none"),
        ] {
            let error = resolve(specs, true).unwrap_err();
            assert!(matches!(error, Error::Config(_)) && error.to_string().contains(words), "{error}");
        }
        for (specs, words) in [
            (r#"{"h.1.mlp.c_fc":{"block":[3,4],"rank":2}}"#, "block"),
            (r#"{"h.1.mlp.c_fc":{"block":[2,4],"rank":9}}"#, "rank"),
        ] {
            let message = resolve(specs, true).unwrap_err().to_string();
            assert!(message.contains("'h.1.mlp.c_fc'") && message.contains(words), "{message}");
        }
        // Untied, the head is a matrix like any other, in × out.
        let untied = resolve(r#"{"lm_head":{"block":[2,4],"rank":2}}"#, false).unwrap();
        assert_eq!((untied.jobs[0].matrix.rows, untied.jobs[0].matrix.columns), (8, 40));
    }
}
