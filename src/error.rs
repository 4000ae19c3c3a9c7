//! The one error type: what was being done, what was expected, what came instead.

use std::path::PathBuf;

/// Short form of a result with this crate's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, with the facts that a user needs to mend it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An array or a factor shape does not fit: wrong number of dimensions, a block that does not divide, a rank too large.
    #[error("{operation}: expected {expected}, got {got}")]
    Shape {
        /// What was being done.
        operation: &'static str,
        /// The shape, or the condition on it, that would have been accepted.
        expected: String,
        /// The shape that came.
        got: String,
    },
    /// A weight holds NaN or an infinity.
    #[error("expected finite values, got {value} at row {row}, column {column}")]
    NonFinite {
        /// The offending value.
        value: f32,
        /// Its row.
        row: usize,
        /// Its column.
        column: usize,
    },
    /// A label that is not in the vocabulary.
    #[error("labels: expected 0 to {}, or the ignored index, got {label} at row {row}", vocabulary - 1)]
    Label {
        /// The offending label.
        label: i64,
        /// Its row.
        row: usize,
        /// Entries of the vocabulary, at least one.
        vocabulary: usize,
    },
    /// A token or a probability of a teacher that cannot be.
    #[error("{problem} at row {row}")]
    SoftLabel {
        /// What is wrong.
        problem: String,
        /// The row of logits that it belongs to.
        row: usize,
    },
    /// A dtype that is not handled.
    #[error("expected dtype {expected}, got {got}")]
    Dtype {
        /// The accepted dtypes.
        expected: String,
        /// The dtype that came.
        got: String,
    },
    /// A permutation that is not one.
    #[error("not a permutation of {length} elements: {problem}")]
    Permutation {
        /// How many elements it should permute.
        length: usize,
        /// The first entry that is out of range or repeated.
        problem: String,
    },
    /// A configuration that cannot be followed: unknown keys, a pattern that matches nothing, a newer format.
    #[error("{0}")]
    Config(String),
    /// A checkpoint that cannot be read: truncated, lying header, not safetensors, a missing tensor.
    #[error("{}: {problem}", path.display())]
    Checkpoint {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A destination that must not be written to: it exists and is not empty.
    #[error("{}: {problem}", path.display())]
    Destination {
        /// The destination.
        path: PathBuf,
        /// Why nothing is written there.
        problem: String,
    },
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// The caller asked to stop.
    #[error("cancelled")]
    Cancelled,
    /// A numerical routine did not converge.
    #[error("{operation} did not converge")]
    Convergence {
        /// The routine.
        operation: &'static str,
    },
    /// Any of the above, in a named tensor.
    #[error("tensor '{tensor}': {source}")]
    InTensor {
        /// The tensor's name.
        tensor: String,
        /// What is wrong with it.
        source: Box<Error>,
    },
}

impl Error {
    /// Names the tensor that the error came from.
    #[must_use]
    pub fn in_tensor(self, tensor: &str) -> Self {
        match self {
            // A cancelled job is nobody's fault, and the innermost name is the most exact one.
            Self::Cancelled | Self::InTensor { .. } => self,
            other => Self::InTensor { tensor: tensor.to_owned(), source: Box::new(other) },
        }
    }

    /// Wraps an operating system error with the path it concerns.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}
