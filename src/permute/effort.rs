//! Effort levels of the permutation search.

use crate::error::{Error, Result};

/// How much time the permutation search takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Effort {
    /// Norm sort, alternating assignment and a very short annealing.
    #[default]
    Fast,
    /// [`Fast`](Self::Fast) and a longer annealing.
    Balanced,
    /// [`Balanced`](Self::Balanced) and two annealings about fifteen times as long.
    Best,
}

impl Effort {
    /// Every level, with the name that configurations use.
    pub const NAMES: [(&'static str, Self); 3] =
        [("fast", Self::Fast), ("balanced", Self::Balanced), ("best", Self::Best)];

    /// Reads a configuration's name for it.
    ///
    /// # Errors
    /// [`Error::Config`] if the name is none of [`Self::NAMES`].
    pub fn from_name(name: &str) -> Result<Self> {
        Self::NAMES
            .iter()
            .find(|(known, _)| *known == name)
            .map(|&(_, effort)| effort)
            .ok_or_else(|| Error::Config(format!("effort: expected \"fast\", \"balanced\" or \"best\", got {name:?}")))
    }

    /// The name that configurations use.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::NAMES[self as usize].0
    }
}
