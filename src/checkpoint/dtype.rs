//! The floating dtypes that checkpoints store, by safetensors' names.

use safetensors::Dtype;

use crate::error::{Error, Result};
use crate::numeric::Float;

impl Float {
    /// The safetensors dtype.
    #[must_use]
    pub fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::Bf16 => Dtype::BF16,
        }
    }

    /// The float of a safetensors dtype.
    ///
    /// # Errors
    /// [`Error::Dtype`] if it is none of the three.
    pub fn from_dtype(dtype: Dtype) -> Result<Self> {
        match dtype {
            Dtype::F32 => Ok(Self::F32),
            Dtype::F16 => Ok(Self::F16),
            Dtype::BF16 => Ok(Self::Bf16),
            other => Err(Error::Dtype { expected: "F32, F16 or BF16".into(), got: format!("{other:?}") }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dtypes_round_trip() {
        for float in [Float::F32, Float::F16, Float::Bf16] {
            assert_eq!(Float::from_dtype(float.dtype()).unwrap(), float);
        }
        assert!(Float::from_dtype(Dtype::F64).is_err());
    }
}
