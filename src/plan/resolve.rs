//! A configuration resolved against the tensors of a model: matrix names replace every pattern.

use glob::{MatchOptions, Pattern};
use serde::Serialize;

use super::config::TQConfig;
use crate::checkpoint::read::Checkpoint;
use crate::error::{Error, Result};
use crate::family::{Kind, Matrix};
use crate::spec::MatrixSpec;

/// A tensor of the model to plan for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Input {
    /// Its stored name.
    pub name: String,
    /// Its name without the base model's prefix.
    pub bare: String,
    /// Its shape as stored.
    pub shape: Vec<usize>,
    /// The kind of its module, if it is a weight that can be compressed.
    pub kind: Option<Kind>,
    /// Its number of parameters.
    pub parameters: usize,
}

/// One matrix and its spec.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// The matrix.
    pub matrix: Matrix,
    /// Its spec.
    pub spec: MatrixSpec,
    /// Its parameters after compression.
    pub parameters: usize,
}

/// A tensor that is not compressed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Untouched {
    /// Its stored name.
    pub tensor: String,
    /// Its shape as stored.
    pub shape: Vec<usize>,
    /// Its number of parameters.
    pub parameters: usize,
}

/// A resolved configuration: every matrix is validated, nothing is computed yet.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The configuration with matrix names in place of patterns, in model order.
    pub config: TQConfig,
    /// The matrices to compress, in model order.
    pub jobs: Vec<Job>,
    /// The tensors that are not compressed, in model order.
    pub untouched: Vec<Untouched>,
    /// Parameters before compression. A tied head does not count: it is the token embedding.
    pub parameters_before: usize,
    /// Parameters after compression.
    pub parameters_after: usize,
}

/// The tensors of a model and the structure of its names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Model {
    /// Its tensors in model order, without those tied to others.
    pub inputs: Vec<Input>,
    /// The prefix of the base model's names, optional in patterns: "transformer.".
    pub base_prefix: String,
    /// Pairs of bare module names, where the first module shares the weight of the second: `("lm_head", "wte")`.
    pub tied: Vec<(String, String)>,
}

impl Model {
    /// The tensors of a checkpoint.
    #[must_use]
    pub fn of_checkpoint(checkpoint: &Checkpoint) -> Self {
        let family = checkpoint.family();
        let tied = |name: &str| checkpoint.tied() && family.is_output_head(name);
        let inputs = checkpoint.tensors().iter().filter(|(name, _)| !tied(name)).map(|(name, tensor)| Input {
            name: name.clone(),
            bare: family.bare(name).into_owned(),
            shape: tensor.shape.clone(),
            kind: family.kind_of(name),
            parameters: tensor.parameters(),
        });
        Self {
            inputs: inputs.collect(),
            base_prefix: family.base_prefix.clone(),
            tied: family
                .output_head
                .clone()
                .zip(family.token_embedding.clone())
                .filter(|_| checkpoint.tied())
                .into_iter()
                .collect(),
        }
    }

    /// The matrices that match one of `patterns`, in model order; all matrices for `None`.
    ///
    /// # Errors
    /// [`Error::Config`] for a malformed pattern, a pattern without a match, or a fused weight that matches only in
    /// part; [`Error::Shape`], in the tensor, for a weight that is not a matrix.
    pub fn matrices(&self, patterns: Option<&[String]>) -> Result<Vec<Matrix>> {
        let Some(patterns) = patterns else {
            let each = self.inputs.iter().map(Input::matrices).collect::<Result<Vec<_>>>()?;
            return Ok(each.into_iter().flatten().collect());
        };
        let mut rules = Rules::new(patterns.iter().map(|pattern| (pattern, ())), "matrices", self)?;
        let mut matched = Vec::new();
        for input in &self.inputs {
            matched.extend(rules.matched(input)?.into_iter().map(|(matrix, ())| matrix));
        }
        rules.check_all_matched()?;
        Ok(matched)
    }
}

impl Input {
    fn matrices(&self) -> Result<Vec<Matrix>> {
        self.kind.map_or(Ok(Vec::new()), |kind| Matrix::all_of(&self.name, &self.bare, &self.shape, kind))
    }
}

impl Plan {
    /// Resolves `config` against the tensors of a model.
    ///
    /// # Errors
    /// [`Error::Config`] for a malformed pattern, a pattern without a match, or a fused weight that would be compressed
    /// only in part; [`Error::Shape`], in the matrix, for a block that does not divide it or a rank that is too large.
    pub fn resolve(model: &Model, config: &TQConfig) -> Result<Self> {
        let mut rules = Rules::new(config.specs.iter(), "specs", model)?;
        let mut plan = Self {
            config: TQConfig { specs: indexmap::IndexMap::new(), ..config.clone() },
            jobs: Vec::new(),
            untouched: Vec::new(),
            parameters_before: 0,
            parameters_after: 0,
        };
        for input in &model.inputs {
            plan.parameters_before += input.parameters;
            let asked = rules.matched(input)?;
            if asked.is_empty() {
                plan.parameters_after += input.parameters;
                let (tensor, shape) = (input.name.clone(), input.shape.clone());
                plan.untouched.push(Untouched { tensor, shape, parameters: input.parameters });
            }
            for (matrix, spec) in asked {
                if spec.is_grouped() && matrix.kind != Kind::Embedding {
                    return Err(Error::Config(format!(
                        "specs: '{}' is no embedding, and only those have groups of rows",
                        matrix.name
                    )));
                }
                let parameters = spec.parameters(matrix.rows, matrix.columns);
                let parameters = parameters.map_err(|error| error.in_tensor(&matrix.name))?;
                plan.parameters_after += parameters;
                plan.config.specs.insert(matrix.name.clone(), spec.clone());
                plan.jobs.push(Job { matrix, spec: spec.clone(), parameters });
            }
        }
        rules.check_all_matched()?;
        Ok(plan)
    }

    /// Resolves `config` against a checkpoint.
    ///
    /// # Errors
    /// As [`resolve`](Self::resolve); [`Error::Dtype`], in the tensor, for a weight to compress that is not
    /// floating-point.
    pub fn for_checkpoint(checkpoint: &Checkpoint, config: &TQConfig) -> Result<Self> {
        let plan = Self::resolve(&Model::of_checkpoint(checkpoint), config)?;
        plan.jobs.iter().try_for_each(|job| checkpoint.stored(&job.matrix).map(drop))?;
        Ok(plan)
    }
}

/// `*` also matches dots, and a leading dot has no special meaning: names are not paths.
const OPTIONS: MatchOptions =
    MatchOptions { case_sensitive: true, require_literal_separator: false, require_literal_leading_dot: false };

/// Patterns, each with the spec of the matrices that it matches. The first match decides.
struct Rules<'a, T> {
    rules: Vec<Rule<'a, T>>,
    /// The name of the patterns in errors.
    what: &'static str,
    model: &'a Model,
}

struct Rule<'a, T> {
    pattern: &'a str,
    glob: Pattern,
    asks: T,
    matched: bool,
}

impl<'a, T: Copy> Rules<'a, T> {
    fn new(patterns: impl Iterator<Item = (&'a String, T)>, what: &'static str, model: &'a Model) -> Result<Self> {
        let rule = |(pattern, asks): (&'a String, T)| {
            let glob = Pattern::new(pattern)
                .map_err(|error| Error::Config(format!("{what}: pattern {pattern:?}: {}", error.msg)))?;
            Ok(Rule { pattern: pattern.as_str(), glob, asks, matched: false })
        };
        Ok(Self { rules: patterns.map(rule).collect::<Result<_>>()?, what, model })
    }

    /// The matrices of a tensor that match a pattern, with the spec of the first match: all matrices of the tensor or
    /// none.
    fn matched(&mut self, input: &Input) -> Result<Vec<(Matrix, T)>> {
        let matrices = input.matrices()?;
        let parts = matrices.len();
        let mut asked = Vec::with_capacity(parts);
        for matrix in matrices {
            if let Some(asks) = self.first_match(&matrix) {
                asked.push((matrix, asks));
            }
        }
        if !asked.is_empty() && asked.len() < parts {
            let names: Vec<_> = asked.iter().map(|(matrix, _)| matrix.name.as_str()).collect();
            return Err(Error::Config(format!(
                "tensor '{}' is fused: compress all of its {parts} parts or none, got only {}",
                input.name,
                names.join(", ")
            )));
        }
        Ok(asked)
    }

    /// The spec of the first rule that matches the matrix. Every rule that matches is marked.
    fn first_match(&mut self, matrix: &Matrix) -> Option<T> {
        let mut names = Vec::with_capacity(8);
        for name in [&matrix.name, &matrix.module] {
            for prefix in ["", &self.model.base_prefix] {
                names.push(format!("{prefix}{name}"));
                names.push(format!("{prefix}{name}.weight"));
            }
        }
        let mut first = None;
        for rule in &mut self.rules {
            if names.iter().any(|name| rule.glob.matches_with(name, OPTIONS)) {
                rule.matched = true;
                first.get_or_insert(rule.asks);
            }
        }
        first
    }

    fn check_all_matched(&self) -> Result<()> {
        let Some(rule) = self.rules.iter().find(|rule| !rule.matched) else { return Ok(()) };
        let tied = self.model.tied.iter().find(|(head, _)| rule.glob.matches_with(head, OPTIONS));
        let hint = tied.map_or(String::new(), |(head, source)| {
            format!(" ({head} is tied to {source}: compressing {source} compresses both)")
        });
        Err(Error::Config(format!("{}: pattern {:?} matches no matrix{hint}", self.what, rule.pattern)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::Family;

    fn input(name: &str, shape: &[usize]) -> Input {
        let family = Family::of("gpt2").unwrap();
        let (bare, kind) = (family.bare(name).into_owned(), family.kind_of(name));
        Input { name: name.into(), bare, shape: shape.into(), kind, parameters: shape.iter().product() }
    }

    fn model(tied_head: bool) -> Model {
        let mut inputs = vec![input("transformer.wte.weight", &[40, 8])];
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
        let mut tied = vec![("lm_head".to_owned(), "wte".to_owned())];
        if !tied_head {
            tied.clear();
            inputs.push(input("lm_head.weight", &[40, 8]));
        }
        Model { inputs, base_prefix: "transformer.".into(), tied }
    }

    fn resolve(specs: &str, tied: bool) -> Result<Plan> {
        Plan::resolve(&model(tied), &TQConfig::from_json(&format!("{{\"specs\":{specs}}}")).unwrap())
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
        // A fused weight matches by its module, or by the names of all its parts.
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
        assert_eq!(Plan::resolve(&model(true), &plan.config).unwrap(), plan);
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
            (r#"{"h.1.mlp.c_proj":{"groups":[[16,2],[16,1]]}}"#, "'h.1.mlp.c_proj' is no embedding"),
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
        // An untied head is a matrix like any other, in × out.
        let untied = resolve(r#"{"lm_head":{"block":[2,4],"rank":2}}"#, false).unwrap();
        assert_eq!((untied.jobs[0].matrix.rows, untied.jobs[0].matrix.columns), (8, 40));
    }
}
