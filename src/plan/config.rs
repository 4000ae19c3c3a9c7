//! `TQConfig` in JSON: the spec of each matrix, the effort of the search, and the seed.

use indexmap::IndexMap;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::permute::Effort;
use crate::spec::{MatrixSpec, given, matrix_spec, matrix_spec_json};

/// The newest format that this version reads. Format 1 has Kronecker sums only; format 2 adds low rank and sums of
/// several terms; format 3 adds groups of rows, format 4 eight-bit weights. A configuration is written in the oldest format
/// that can express it.
pub const FORMAT_VERSION: u64 = 4;

/// A configuration: patterns, each with the spec of the matrices that it matches, in order.
#[derive(Clone, Debug, PartialEq)]
pub struct TQConfig {
    /// Pattern → spec. The first pattern that matches a matrix decides.
    pub specs: IndexMap<String, MatrixSpec>,
    /// The effort of the permutation search.
    pub effort: Effort,
    /// The seed of the search, the same for every matrix.
    pub seed: u64,
    /// With eight-bit weights: the modules whose dense matrices have them, beside all factors. Those of a compressed
    /// checkpoint are named one by one; what is yet to be compressed has none.
    pub int8: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Fields {
    #[serde(default, deserialize_with = "given")]
    quant_method: Option<String>,
    // Read first: see `from_json`.
    #[serde(default, rename = "format_version", deserialize_with = "given")]
    _format_version: Option<u64>,
    specs: Map<String, Value>,
    #[serde(default, deserialize_with = "given")]
    effort: Option<String>,
    #[serde(default)]
    seed: u64,
    #[serde(default, deserialize_with = "given")]
    dtype: Option<String>,
    #[serde(default, deserialize_with = "given")]
    dense: Option<Vec<String>>,
}

impl TQConfig {
    /// Reads the JSON of a configuration. `effort` and `seed` are optional; unknown keys are errors.
    ///
    /// ```
    /// use tqcompressor::plan::TQConfig;
    /// let config = TQConfig::from_json(
    ///     r#"{"quant_method": "tqcompressor", "format_version": 1,
    ///         "specs": {"h.*.mlp.c_fc": {"block": [2, 4], "rank": 4, "permute": "both"}}}"#,
    /// )?;
    /// assert_eq!(config.specs["h.*.mlp.c_fc"].as_kronecker().unwrap().block, (2, 4));
    /// # Ok::<(), tqcompressor::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`] naming the invalid key or pattern. The message for a newer `format_version` says to upgrade.
    pub fn from_json(text: &str) -> Result<Self> {
        let value: Value = serde_json::from_str(text)
            .map_err(|error| Error::Config(format!("the configuration is not JSON: {error}")))?;
        // serde would also read a struct from an array.
        if !value.is_object() {
            return Err(Error::Config(format!("configuration: expected a JSON object, got {value}")));
        }
        // Check the version first: a newer format may have keys that are unknown here.
        match value.get("format_version") {
            None => {}
            Some(version) => match version.as_u64() {
                Some(1..=FORMAT_VERSION) => {}
                Some(newer) if newer > FORMAT_VERSION => {
                    return Err(Error::Config(format!(
                        "written by a newer tqcompressor (format {newer}), this one reads up to {FORMAT_VERSION}: upgrade"
                    )));
                }
                _ => {
                    return Err(Error::Config(format!(
                        "format_version: expected 1 to {FORMAT_VERSION}, got {version}"
                    )));
                }
            },
        }
        let fields: Fields =
            serde_json::from_value(value).map_err(|error| Error::Config(format!("configuration: {error}")))?;
        if let Some(method) = fields.quant_method.filter(|method| method != "tqcompressor") {
            return Err(Error::Config(format!("quant_method: expected \"tqcompressor\", got {method:?}")));
        }
        if let Some(dtype) = fields.dtype.as_ref().filter(|dtype| *dtype != "int8") {
            return Err(Error::Config(format!("dtype: expected \"int8\", got {dtype:?}")));
        }
        if fields.dense.is_some() && fields.dtype.is_none() {
            return Err(Error::Config("dense: expected with \"dtype\": \"int8\" only".into()));
        }
        if fields.specs.is_empty() && fields.dtype.is_none() {
            return Err(Error::Config("specs: expected at least one pattern, got none".into()));
        }
        if fields.specs.contains_key("") {
            return Err(Error::Config("specs: expected patterns that are not empty, got \"\"".into()));
        }
        let specs = fields.specs.into_iter().map(|(pattern, value)| {
            let spec =
                matrix_spec(value).map_err(|words| Error::Config(format!("specs: pattern {pattern:?}: {words}")))?;
            Ok((pattern, spec))
        });
        Ok(Self {
            specs: specs.collect::<Result<_>>()?,
            effort: fields.effort.as_deref().map_or(Ok(Effort::default()), Effort::from_name)?,
            seed: fields.seed,
            int8: fields.dtype.map(|_| fields.dense.unwrap_or_default()),
        })
    }

    /// The oldest format that can express it: 1 for Kronecker sums only, 4 with eight-bit weights, 3 with groups of rows,
    /// 2 otherwise.
    #[must_use]
    pub fn format_version(&self) -> u64 {
        if self.int8.is_some() {
            return 4;
        }
        let of = |spec: &MatrixSpec| match spec.as_kronecker() {
            Some(_) => 1,
            None => 2 + u64::from(spec.is_grouped()),
        };
        self.specs.values().map(of).max().unwrap_or(1)
    }

    /// Its JSON, with every key.
    #[must_use]
    pub fn to_value(&self) -> Value {
        let specs: Map<String, Value> =
            self.specs.iter().map(|(pattern, spec)| (pattern.clone(), Value::Object(matrix_spec_json(spec)))).collect();
        let mut value = json!({
            "quant_method": "tqcompressor",
            "format_version": self.format_version(),
            "specs": specs,
            "effort": self.effort.name(),
            "seed": self.seed,
        });
        if let Some(dense) = &self.int8 {
            value["dtype"] = "int8".into();
            value["dense"] = dense.clone().into();
        }
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Permute;

    const WHOLE: &str = r#"{"quant_method":"tqcompressor","format_version":1,
        "specs":{"wte":{"block":[1,4],"rank":1,"permute":"columns"},"a*":{"block":[2,4],"rank":4,"permute":"both"}},
        "effort":"fast","seed":7}"#;

    #[test]
    fn json_round_trips_in_order() {
        let config = TQConfig::from_json(WHOLE).unwrap();
        assert_eq!(config.specs.keys().collect::<Vec<_>>(), ["wte", "a*"]);
        assert_eq!((config.effort, config.seed), (Effort::Fast, 7));
        assert_eq!(config.specs["wte"].as_kronecker().unwrap().permute, Permute::Columns);
        assert_eq!(config.to_value(), serde_json::from_str::<Value>(WHOLE).unwrap());
        assert_eq!(TQConfig::from_json(&config.to_value().to_string()).unwrap(), config);
    }

    #[test]
    fn low_rank_and_mixed_sums_round_trip_in_format_2() {
        let json = r#"{"specs":{"a":{"rank":3},"b":{"terms":[{"rank":2},{"block":[2,4],"rank":4,"permute":"rows"}]}}}"#;
        let config = TQConfig::from_json(json).unwrap();
        assert_eq!(config.specs["a"], MatrixSpec::low_rank(3));
        assert_eq!(config.specs["b"].terms().len(), 2);
        assert_eq!((config.format_version(), TQConfig::from_json(WHOLE).unwrap().format_version()), (2, 1));
        assert_eq!(TQConfig::from_json(&config.to_value().to_string()).unwrap(), config);
    }

    #[test]
    fn groups_round_trip_in_format_3() {
        let config = TQConfig::from_json(r#"{"specs":{"wte":{"groups":[[12,3],[20,1]]},"a":{"rank":2}}}"#).unwrap();
        assert!(config.specs["wte"].is_grouped() && !config.specs["a"].is_grouped());
        assert_eq!(config.format_version(), 3);
        assert_eq!(TQConfig::from_json(&config.to_value().to_string()).unwrap(), config);
    }

    #[test]
    fn eight_bit_weights_round_trip_in_format_4() {
        for (specs, dense, expected) in [
            (r#"{"a":{"rank":2}}"#, r#","dense":["b","c"]"#, vec!["b", "c"]),
            (r#"{"a":{"rank":2}}"#, "", vec![]),
            ("{}", r#","dense":["wte"]"#, vec!["wte"]),
        ] {
            let config = TQConfig::from_json(&format!(r#"{{"specs":{specs},"dtype":"int8"{dense}}}"#)).unwrap();
            assert_eq!(config.int8.as_ref().unwrap(), &expected);
            assert_eq!(config.format_version(), 4);
            assert_eq!(TQConfig::from_json(&config.to_value().to_string()).unwrap(), config);
        }
    }

    #[test]
    fn effort_seed_and_permute_have_defaults() {
        let config = TQConfig::from_json(r#"{"specs":{"wte":{"block":[1,4],"rank":1}}}"#).unwrap();
        let permute = config.specs["wte"].as_kronecker().unwrap().permute;
        assert_eq!((config.effort, config.seed, permute), (Effort::Fast, 0, Permute::Both));
    }

    #[test]
    fn every_fault_is_named() {
        let spec = r#""specs":{"wte":{"block":[1,4],"rank":1}}"#;
        for (json, words) in [
            ("[", "not JSON"),
            ("[]", "configuration"),
            ("{}", "specs"),
            (r#"{"specs":{}}"#, "at least one pattern"),
            (&format!("{{{spec},\"bits\":4}}"), "bits"),
            (
                &format!("{{{spec},\"format_version\":5,\"new\":1}}"),
                "newer tqcompressor (format 5), this one reads up to 4: upgrade",
            ),
            (&format!("{{{spec},\"format_version\":0}}"), "format_version: expected 1"),
            (&format!("{{{spec},\"format_version\":\"1\"}}"), "format_version: expected 1"),
            (&format!("{{{spec},\"quant_method\":\"gptq\"}}"), "quant_method"),
            (&format!("{{{spec},\"effort\":\"utmost\"}}"), "utmost"),
            (&format!("{{{spec},\"seed\":-1}}"), "-1"),
            (&format!("{{{spec},\"dtype\":\"int4\"}}"), "dtype: expected \"int8\", got \"int4\""),
            (&format!("{{{spec},\"dense\":[]}}"), "dense: expected with"),
            (&format!("{{{spec},\"dtype\":\"int8\",\"dense\":\"a\"}}"), "invalid type"),
            (r#"{"specs":{"h.*":{"block":[1,4]}}}"#, r#"pattern "h.*": missing field `rank`"#),
            (r#"{"specs":{"h.*":{"block":[1,4,2],"rank":1}}}"#, r#"pattern "h.*""#),
            (r#"{"specs":{"h.*":{"block":[1,4],"rank":-1}}}"#, r#"pattern "h.*""#),
            (r#"{"specs":{"h.*":{"block":[1,4],"rank":1,"shape":2}}}"#, "shape"),
            (r#"{"specs":{"h.*":{"rank":1,"permute":"rows"}}}"#, "permute"),
            (r#"{"specs":{"h.*":{"terms":[{"rank":1}]}}}"#, "at least two"),
            (r#"{"specs":{"h.*":{"terms":[{"rank":1},{"terms":[]}]}}}"#, "terms"),
            (r#"{"specs":{"h.*":{"terms":[{"rank":1},2]}}}"#, "expected a JSON object, got 2"),
            (r#"{"specs":{"h.*":{"groups":[]}}}"#, "groups: expected at least one"),
            (r#"{"specs":{"h.*":{"groups":[[8,0]]}}}"#, "groups: expected an integer from 1"),
            (r#"{"specs":{"h.*":{"groups":[[8,2,1]]}}}"#, r#"pattern "h.*""#),
            (r#"{"specs":{"h.*":{"groups":[[8,2]],"rank":1}}}"#, "rank"),
            (r#"{"specs":{"h.*":{"terms":[{"rank":1},{"groups":[[8,2]]}]}}}"#, "groups"),
            (r#"{"specs":{"h.*":[[1,4],1,"both"]}}"#, "expected a JSON object"),
            (r#"["tqcompressor",1,{"h.*":{"rank":1}},"fast",0]"#, "expected a JSON object"),
            (r#"{"specs":{"h.*":{"rank":0}}}"#, "rank: expected an integer from 1, got 0"),
            (r#"{"specs":{"h.*":{"block":[0,4],"rank":1}}}"#, "block: expected an integer from 1, got 0"),
            (r#"{"specs":{"":{"rank":1}}}"#, "not empty"),
            (&format!("{{{spec},\"effort\":null}}"), "null"),
            (&format!("{{{spec},\"format_version\":null}}"), "format_version: expected 1"),
            (r#"{"specs":{"h.*":{"block":[1,4],"rank":1,"permute":"all"}}}"#, r#"pattern "h.*": permute"#),
        ] {
            let error = TQConfig::from_json(json).unwrap_err();
            assert!(matches!(error, Error::Config(_)) && error.to_string().contains(words), "{json}: {error}");
        }
    }
}
