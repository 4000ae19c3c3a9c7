//! The JSON of a matrix's spec.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value, json};

use super::grouped::RowGroup;
use super::kronecker::{KroneckerSpec, Permute};
use super::matrix::{MatrixSpec, TermSpec};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KroneckerFields {
    block: (usize, usize),
    rank: usize,
    #[serde(default, deserialize_with = "given")]
    permute: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LowRankFields {
    rank: usize,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GroupedFields {
    groups: Vec<(usize, usize)>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MixedFields {
    terms: Vec<Value>,
}

/// A key that may be missing but not null.
pub(crate) fn given<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    T::deserialize(deserializer).map(Some)
}

/// Reads a matrix's spec: `{"block", "rank", "permute"}`, `{"rank"}` for low rank, `{"groups"}` for low rank by
/// groups of rows, or `{"terms"}` for a sum.
///
/// # Errors
/// A message that names the wrong key.
pub fn matrix_spec(value: Value) -> Result<MatrixSpec, String> {
    if value.get("groups").is_some() {
        let GroupedFields { groups } = serde_json::from_value(value).map_err(|error| error.to_string())?;
        if groups.is_empty() {
            return Err("groups: expected at least one, got none".into());
        }
        for (rows, rank) in &groups {
            positive("groups", *rows.min(rank))?;
        }
        let groups = groups.into_iter().map(|(rows, rank)| RowGroup { rows, rank }).collect();
        return Ok(TermSpec::Grouped(groups).into());
    }
    if value.get("terms").is_none() {
        return Ok(term_spec(value)?.into());
    }
    let fields: MixedFields = serde_json::from_value(value).map_err(|error| error.to_string())?;
    if fields.terms.len() < 2 {
        return Err(format!("terms: expected at least two, got {}", fields.terms.len()));
    }
    let terms = fields.terms.into_iter().map(term_spec).collect::<Result<_, _>>()?;
    MatrixSpec::new(terms).map_err(|error| error.to_string())
}

fn term_spec(value: Value) -> Result<TermSpec, String> {
    if !value.is_object() {
        return Err(format!("expected a JSON object, got {value}"));
    }
    if value.get("block").is_none() {
        let fields: LowRankFields = serde_json::from_value(value).map_err(|error| error.to_string())?;
        positive("rank", fields.rank)?;
        return Ok(TermSpec::LowRank { rank: fields.rank });
    }
    let fields: KroneckerFields = serde_json::from_value(value).map_err(|error| error.to_string())?;
    positive("rank", fields.rank)?;
    positive("block", fields.block.0.min(fields.block.1))?;
    let permute = fields.permute.as_deref().map_or(Ok(Permute::default()), Permute::from_name);
    let permute = permute.map_err(|error| error.to_string())?;
    Ok(TermSpec::Kronecker(KroneckerSpec { block: fields.block, rank: fields.rank, permute }))
}

fn positive(name: &str, value: usize) -> Result<(), String> {
    if value == 0 { Err(format!("{name}: expected an integer from 1, got 0")) } else { Ok(()) }
}

/// The inverse of [`matrix_spec`].
#[must_use]
pub fn matrix_spec_json(spec: &MatrixSpec) -> Map<String, Value> {
    let term = |term: &TermSpec| match term {
        TermSpec::Kronecker(KroneckerSpec { block: (m2, n2), rank, permute }) => {
            json!({"block": [m2, n2], "rank": rank, "permute": permute.name()})
        }
        TermSpec::LowRank { rank } => json!({"rank": rank}),
        TermSpec::Grouped(groups) => {
            json!({"groups": groups.iter().map(|group| [group.rows, group.rank]).collect::<Vec<_>>()})
        }
    };
    let value = match spec.terms() {
        [one] => term(one),
        many => json!({"terms": many.iter().map(term).collect::<Vec<_>>()}),
    };
    match value {
        Value::Object(object) => object,
        _ => unreachable!("both are objects"),
    }
}

impl Serialize for MatrixSpec {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        matrix_spec_json(self).serialize(serializer)
    }
}
