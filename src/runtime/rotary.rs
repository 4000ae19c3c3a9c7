//! Rotary embeddings of positions: pairs of a head's values are turned by angles that grow with the position.

use std::f32::consts::PI;

use serde_json::{Map, Value};

use super::kernels::turn;
use super::thread_pool::ThreadPool;
use crate::family::given;

/// Values that one task turns.
const PIECE: usize = 1 << 14;

/// The angle of each pair of values for one position. Value `i` of a head is paired with value `i + width/2`.
#[derive(Clone, Debug, PartialEq)]
pub struct Rotary {
    /// In radians a position, half as many as a head has values.
    frequencies: Vec<f32>,
}

/// The cosine and the sine of each pair's angle, for the positions of some tokens.
pub(super) struct Turns {
    /// Pairs of a head.
    pairs: usize,
    cosines: Vec<f32>,
    sines: Vec<f32>,
}

impl Rotary {
    /// Reads `rope_parameters`, or the older `rope_scaling` and `rope_theta`, as transformers does: the types `default`,
    /// `linear` and `llama3`. Everything is rounded as there, since angles of thousands of radians show every rounding.
    ///
    /// # Errors
    /// The key whose value is of the wrong type or not supported, in words.
    pub(super) fn from_config(
        config: &Map<String, Value>,
        head_width: usize,
        positions: usize,
    ) -> Result<Self, String> {
        let none = Map::new();
        let mut source = ("rope_parameters", &none);
        // The older key goes before the newer one.
        for key in ["rope_scaling", "rope_parameters"] {
            if let Some(value) = given(config, key) {
                let object = value.as_object().ok_or_else(|| format!("{key}: expected an object, got {value}"))?;
                if !object.is_empty() {
                    source = (key, object);
                    break;
                }
            }
        }
        let (name, parameters) = source;
        let value = |key: &str| given(parameters, key);
        let positive = |key: &str, value: &Value| {
            let number = value.as_f64().filter(|number| *number > 0.0 && number.is_finite());
            number.map(|number| number as f32).ok_or_else(|| format!("{key}: expected a positive number, got {value}"))
        };
        let needed = |key: &str| {
            let value = value(key).ok_or_else(|| format!("{name}.{key}: expected a positive number, got none"))?;
            positive(&format!("{name}.{key}"), value)
        };
        if let Some((key, _)) = parameters.iter().find(|(_, value)| value.is_object()) {
            return Err(format!("{name}.{key}: the native runtime has no rotations that differ by the layer"));
        }
        let partial = value("partial_rotary_factor").or_else(|| given(config, "partial_rotary_factor"));
        if let Some(factor) = partial.filter(|factor| factor.as_f64() != Some(1.0)) {
            return Err(format!("partial_rotary_factor: the native runtime rotates whole heads (1.0), got {factor}"));
        }
        if !head_width.is_multiple_of(2) {
            return Err(format!("head_dim: expected an even number, whose halves are rotated, got {head_width}"));
        }
        let theta = value("rope_theta").or_else(|| given(config, "rope_theta"));
        let theta = theta.map_or(Ok(10_000.0), |value| positive("rope_theta", value))?;
        let plain = (0..head_width).step_by(2).map(|i| {
            let exponent = i as f32 / head_width as f32;
            f64::from(theta).powf(f64::from(exponent)) as f32
        });
        let mut frequencies: Vec<f32> = plain.map(f32::recip).collect();
        let kind = value("rope_type").or_else(|| value("type"));
        match kind.map_or(Some("default"), Value::as_str) {
            Some("default") => {}
            Some("linear") => {
                let factor = needed("factor")?;
                frequencies.iter_mut().for_each(|frequency| *frequency /= factor);
            }
            Some("llama3") => {
                let (factor, low, high) = (needed("factor")?, needed("low_freq_factor")?, needed("high_freq_factor")?);
                let key = "original_max_position_embeddings";
                let context = given(config, key).or_else(|| value(key));
                let context = context.map_or(Ok(positions as f32), |value| positive(key, value))?;
                for frequency in &mut frequencies {
                    let length = 2.0 * PI / *frequency;
                    if length > context / low {
                        *frequency /= factor;
                    } else if length >= context / high {
                        // Between the two, from one to the other.
                        let smooth = (context / length - low) / (high - low);
                        *frequency = (1.0 - smooth) * (*frequency / factor) + smooth * *frequency;
                    }
                }
            }
            _ => {
                let got = kind.map_or("none".to_owned(), Value::to_string);
                return Err(format!("{name}.rope_type: expected default, linear or llama3, got {got}"));
            }
        }
        Ok(Self { frequencies })
    }

    /// The turns for the positions of some tokens.
    ///
    /// # Cost
    /// A cosine and a sine for each pair and token.
    pub(super) fn turns(&self, positions: impl Iterator<Item = usize>) -> Turns {
        let (mut cosines, mut sines) = (Vec::new(), Vec::new());
        for position in positions {
            for frequency in &self.frequencies {
                let (sine, cosine) = f64::from(position as f32 * frequency).sin_cos();
                cosines.push(cosine as f32);
                sines.push(sine as f32);
            }
        }
        Turns { pairs: self.frequencies.len(), cosines, sines }
    }
}

impl Turns {
    /// Turns the first `heads` heads of each row of `width` values in place, one row for every token.
    pub(super) fn apply(&self, rows: &mut [f32], width: usize, heads: usize, pool: &ThreadPool) {
        let (pairs, at_a_time) = (self.pairs, (PIECE / width).max(1));
        let pieces = rows.chunks_mut(at_a_time * width);
        let angles = self.cosines.chunks(at_a_time * pairs).zip(self.sines.chunks(at_a_time * pairs));
        pool.for_each(pieces.zip(angles), |(rows, (cosines, sines))| {
            let angles = cosines.chunks_exact(pairs).zip(sines.chunks_exact(pairs));
            for (row, (cosines, sines)) in rows.chunks_exact_mut(width).zip(angles) {
                for head in row.chunks_exact_mut(2 * pairs).take(heads) {
                    turn(head, cosines, sines);
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::testing::noise;

    fn rotary(config: Value, head_width: usize) -> Result<Rotary, String> {
        Rotary::from_config(config.as_object().unwrap(), head_width, 64)
    }

    proptest! {
        #[test]
        fn heads_are_multiplied_by_rotations(
            pairs in 1..40_usize, heads in 1..4_usize, others in 0..3_usize, positions in prop::collection::vec(0..9000_usize, 1..5),
            theta in 10.0..1e6_f64, seed in any::<u64>(),
        ) {
            let rotary = rotary(json!({"rope_theta": theta}), 2 * pairs).unwrap();
            let width = (heads + others) * 2 * pairs;
            let before = noise(positions.len() * width, seed);
            let mut after = before.clone();
            let turns = rotary.turns(positions.iter().copied());
            turns.apply(&mut after, width, heads, &ThreadPool::new(2).unwrap());
            for (t, position) in positions.iter().enumerate() {
                for (i, value) in after[t * width..][..width].iter().enumerate() {
                    let (head, at) = (i / (2 * pairs), i % (2 * pairs));
                    let x = |at: usize| f64::from(before[t * width + head * 2 * pairs + at]);
                    if head >= heads {
                        prop_assert_eq!(f64::from(*value), x(at));
                        continue;
                    }
                    let angle = *position as f64 * theta.powf(-((at % pairs) as f64) / pairs as f64);
                    let (sine, cosine) = angle.sin_cos();
                    let exact = if at < pairs {
                        x(at) * cosine - x(at + pairs) * sine
                    } else {
                        x(at) * cosine + x(at - pairs) * sine
                    };
                    // Angles are rounded to f32, as in transformers.
                    prop_assert!((f64::from(*value) - exact).abs() < 1e-5 + 3e-7 * *position as f64, "{value} {exact}");
                }
            }
        }
    }

    #[test]
    fn scaled_frequencies_are_those_of_the_formulas() {
        let plain = rotary(json!({}), 8).unwrap().frequencies;
        for key in ["rope_scaling", "rope_parameters"] {
            for kind in ["type", "rope_type"] {
                let scaled = rotary(json!({key: {kind: "linear", "factor": 4.0}}), 8).unwrap().frequencies;
                assert_eq!(scaled, plain.iter().map(|frequency| frequency / 4.0).collect::<Vec<_>>());
            }
        }
        let llama3 = json!({"rope_parameters": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        }});
        let found = rotary(llama3, 8).unwrap().frequencies;
        // Wave lengths of 6.3, 63, 628 and 6,283 beside 128 / 4 and 128 / 1.
        let smooth = (128.0 / (2.0 * PI / plain[1]) - 1.0) / 3.0;
        let between = (1.0 - smooth) * plain[1] / 8.0 + smooth * plain[1];
        assert_eq!((found[0], found[2], found[3]), (plain[0], plain[2] / 8.0, plain[3] / 8.0));
        assert!((found[1] - between).abs() < 1e-8 && between < plain[1]);
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (config, width, words) in [
            (
                json!({"rope_scaling": {"type": "yarn", "factor": 2.0}}),
                8,
                "rope_scaling.rope_type: expected default, linear or llama3, got \"yarn\"",
            ),
            (json!({"rope_parameters": {"rope_type": "dynamic"}}), 8, "got \"dynamic\""),
            (json!({"rope_parameters": {"rope_type": 3}}), 8, "got 3"),
            (json!({"rope_parameters": {"rope_type": "linear"}}), 8, "rope_parameters.factor"),
            (json!({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}), 8, "low_freq_factor"),
            (json!({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}), 8, "full_attention"),
            (json!({"rope_parameters": {"rope_theta": -1}}), 8, "rope_theta: expected a positive number, got -1"),
            (json!({"rope_theta": "big"}), 8, "rope_theta"),
            (json!({"partial_rotary_factor": 0.5}), 8, "partial_rotary_factor"),
            (json!({"rope_parameters": {"partial_rotary_factor": 0.25}}), 8, "partial_rotary_factor"),
            (json!({"rope_parameters": 4}), 8, "rope_parameters: expected an object"),
            (json!({}), 7, "head_dim: expected an even number"),
        ] {
            let message = rotary(config, width).unwrap_err();
            assert!(message.contains(words), "{words}: {message}");
        }
    }
}
