//! The error type: the operation, what was expected and what came.

use std::path::PathBuf;

/// Short form of a result with this crate's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Every error of this crate, with the facts that a user needs to fix it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An array or a factor shape does not fit: wrong number of dimensions, a block that does not divide, a rank too
    /// large.
    #[error("{operation}: expected {expected}, got {got}")]
    Shape {
        /// The argument or operation.
        operation: &'static str,
        /// The accepted shape, or the condition on it.
        expected: String,
        /// The shape received.
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
    /// A label outside the vocabulary.
    #[error("labels: expected 0 to {}, or the ignored index, got {label} at row {row}", vocabulary - 1)]
    Label {
        /// The offending label.
        label: i64,
        /// Its row.
        row: usize,
        /// Size of the vocabulary, at least 1.
        vocabulary: usize,
    },
    /// An invalid token or probability of a teacher.
    #[error("{problem} at row {row}")]
    SoftLabel {
        /// What is wrong.
        problem: String,
        /// The row of logits.
        row: usize,
    },
    /// An unsupported dtype.
    #[error("expected dtype {expected}, got {got}")]
    Dtype {
        /// The accepted dtypes.
        expected: String,
        /// The dtype received.
        got: String,
    },
    /// Indices that are not a permutation.
    #[error("not a permutation of {length} elements: {problem}")]
    Permutation {
        /// Number of elements.
        length: usize,
        /// The first entry that is out of range or repeated.
        problem: String,
    },
    /// An invalid configuration or argument: unknown keys, a pattern that matches nothing, a newer format.
    #[error("{0}")]
    Config(String),
    /// An unreadable checkpoint: a truncated file, a wrong header, another format, a missing tensor.
    #[error("{}: {problem}", path.display())]
    Checkpoint {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A destination that must not be overwritten.
    #[error("{}: {problem}", path.display())]
    Destination {
        /// The destination.
        path: PathBuf,
        /// The reason.
        problem: String,
    },
    /// An error of the operating system.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The error that the system reported.
        source: std::io::Error,
    },
    /// The caller cancelled the job.
    #[error("cancelled")]
    Cancelled,
    /// A result beyond the range of float32.
    #[error("{what} is beyond the range of float32: the largest value of the matrix is {largest:e}; scale it down")]
    Overflow {
        /// The result.
        what: &'static str,
        /// The largest magnitude of the matrix that it was computed from.
        largest: f32,
    },
    /// A numerical routine did not converge.
    #[error("{operation} did not converge")]
    Convergence {
        /// The routine.
        operation: &'static str,
    },
    /// Any other error, with the name of the tensor that it concerns.
    #[error("tensor '{tensor}': {source}")]
    InTensor {
        /// The tensor's name.
        tensor: String,
        /// The error.
        source: Box<Error>,
    },
}

impl Error {
    /// Adds the name of the tensor.
    #[must_use]
    pub fn in_tensor(self, tensor: &str) -> Self {
        match self {
            // Cancelling concerns no tensor, and the innermost name is the most specific.
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
