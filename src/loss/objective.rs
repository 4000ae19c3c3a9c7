//! The objective of a distillation loss.

use crate::error::{Error, Result};

/// The direction of a Kullback–Leibler divergence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// `KL(teacher ‖ student)`: the student covers all that the teacher finds likely.
    Forward,
    /// `KL(student ‖ teacher)`: the student avoids all that the teacher finds unlikely.
    Reverse,
}

/// `divergence · KL_T + cross_entropy · CE`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Objective {
    pub(super) temperature: f64,
    pub(super) divergence: f64,
    pub(super) cross_entropy: f64,
    pub(super) direction: Direction,
}

impl Objective {
    /// Temperatures outside this range flatten all logits, or leave only the largest.
    const TEMPERATURES: std::ops::RangeInclusive<f64> = 1e-4..=1e4;

    /// An objective of two weights. A term of weight 0 is not computed, and its input is not read.
    ///
    /// # Errors
    /// [`Error::Config`] if the temperature is not between 1e-4 and 1e4, or a weight is negative or not finite.
    pub fn new(temperature: f64, divergence: f64, cross_entropy: f64, direction: Direction) -> Result<Self> {
        if !Self::TEMPERATURES.contains(&temperature) {
            return Err(Error::Config(format!("temperature: expected a number from 1e-4 to 1e4, got {temperature}")));
        }
        for (name, weight) in [("divergence", divergence), ("cross_entropy", cross_entropy)] {
            if !(0.0..f64::INFINITY).contains(&weight) {
                return Err(Error::Config(format!("{name}: expected a weight of at least 0, got {weight}")));
            }
        }
        Ok(Self { temperature, divergence, cross_entropy, direction })
    }

    /// `alpha·T²·KL(teacher ‖ student at T) + (1 − alpha)·CE` (Hinton, Vinyals and Dean, arXiv 1503.02531). The factor
    /// `T²` keeps the gradient of the first term about equally large at every temperature.
    ///
    /// # Errors
    /// [`Error::Config`] if `alpha` is not between 0 and 1, or the temperature is refused.
    pub fn distillation(temperature: f64, alpha: f64) -> Result<Self> {
        if !(0.0..=1.0).contains(&alpha) {
            return Err(Error::Config(format!("alpha: expected a number from 0 to 1, got {alpha}")));
        }
        Self::new(temperature, alpha * temperature * temperature, 1.0 - alpha, Direction::Forward)
    }
}
