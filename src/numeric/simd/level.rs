//! Which instruction set is used: the best that the processor has, or what `TQCOMPRESSOR_ISA` names.

use std::sync::OnceLock;

use crate::error::{Error, Result};

/// The environment variable that caps what is used.
const VARIABLE: &str = "TQCOMPRESSOR_ISA";

/// A set of vector instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum InstructionSet {
    /// What every processor of the target has: SSE2 on x86-64. On AArch64 that is NEON, but only as the compiler uses it.
    Baseline,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// NEON, the vector instructions of AArch64, in kernels that are written for it.
    Neon,
}

impl InstructionSet {
    /// All, in the order of their worth.
    pub const ALL: [Self; 4] = [Self::Baseline, Self::Avx2, Self::Avx512, Self::Neon];

    /// Its name in `TQCOMPRESSOR_ISA`.
    #[must_use]
    pub fn name(self) -> &'static str {
        ["baseline", "avx2", "avx512", "neon"][self as usize]
    }

    /// Whether this processor has it.
    #[must_use]
    pub fn is_available(self) -> bool {
        match self {
            Self::Baseline => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            _ => cfg!(target_arch = "aarch64") && self == Self::Neon,
        }
    }

    /// Those of this processor.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|set| set.is_available())
    }
}

/// What is used, and what is wrong with the variable.
struct Choice {
    set: InstructionSet,
    problem: Option<String>,
}

/// Reads the variable once.
fn choice() -> &'static Choice {
    static CHOICE: OnceLock<Choice> = OnceLock::new();
    CHOICE.get_or_init(|| {
        let named = std::env::var_os(VARIABLE).map(|name| name.to_string_lossy().into_owned());
        chosen(named.as_deref().unwrap_or_default())
    })
}

/// The choice for a value of the variable; an empty one caps nothing.
fn chosen(named: &str) -> Choice {
    let best = InstructionSet::available().last().unwrap_or(InstructionSet::Baseline);
    match InstructionSet::available().find(|set| set.name() == named) {
        Some(set) => Choice { set, problem: None },
        None if named.is_empty() => Choice { set: best, problem: None },
        None => {
            let names: Vec<_> = InstructionSet::available().map(InstructionSet::name).collect();
            let problem = format!(
                "{VARIABLE}: expected one of {} (what this processor has), got \"{named}\": without the variable, {} is used",
                names.join(", "),
                best.name()
            );
            Choice { set: best, problem: Some(problem) }
        }
    }
}

/// The instruction set that kernels use. It does not change while the process runs.
///
/// The best one if the variable has no valid name, of which [`check`] tells.
#[inline]
#[must_use]
pub fn instruction_set() -> InstructionSet {
    #[cfg(test)]
    if let Some(set) = testing::given() {
        return set;
    }
    choice().set
}

/// The instruction set that kernels use.
///
/// # Errors
/// [`Error::Config`] if `TQCOMPRESSOR_ISA` has a name that is unknown, or of an instruction set that this processor lacks.
pub fn check() -> Result<InstructionSet> {
    match &choice().problem {
        None => Ok(instruction_set()),
        Some(problem) => Err(Error::Config(problem.clone())),
    }
}

/// Compiles a function once for each instruction set that is worth it, and calls that which [`instruction_set`] names.
///
/// Functions that it calls are compiled along with it only if they are `#[inline(always)]`.
macro_rules! dispatched {
    (
        $(#[$attribute:meta])*
        $visibility:vis fn $name:ident $(<$(const $constant:ident: $kind:ty),* $(,)?>)? ($($argument:ident: $type:ty),* $(,)?)
        $(-> $result:ty)? $body:block
    ) => {
        $(#[$attribute])*
        $visibility fn $name $(<$(const $constant: $kind),*>)? ($($argument: $type),*) $(-> $result)? {
            #[cfg(target_arch = "x86_64")]
            {
                use $crate::numeric::simd::level::{InstructionSet, instruction_set};

                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
                fn avx512 $(<$(const $constant: $kind),*>)? ($($argument: $type),*) $(-> $result)? $body

                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2 $(<$(const $constant: $kind),*>)? ($($argument: $type),*) $(-> $result)? $body

                match instruction_set() {
                    // SAFETY: the processor has what the instruction set names.
                    InstructionSet::Avx512 => return unsafe { avx512 $(::<$($constant),*>)? ($($argument),*) },
                    // SAFETY: the same.
                    InstructionSet::Avx2 => return unsafe { avx2 $(::<$($constant),*>)? ($($argument),*) },
                    InstructionSet::Baseline | InstructionSet::Neon => {}
                }
            }
            $body
        }
    };
}
pub(crate) use dispatched;

/// Runs on every instruction set of this processor.
#[cfg(test)]
pub(crate) mod testing {
    use std::cell::Cell;

    use super::InstructionSet;

    thread_local! {
        static GIVEN: Cell<Option<InstructionSet>> = const { Cell::new(None) };
    }

    /// What this thread uses in place of the process's choice.
    pub(super) fn given() -> Option<InstructionSet> {
        GIVEN.get()
    }

    /// The results of a function of this thread on each instruction set of the processor.
    pub(crate) fn on_each<T>(function: impl Fn() -> T) -> Vec<(InstructionSet, T)> {
        let run = |set| {
            GIVEN.set(Some(set));
            let result = function();
            GIVEN.set(None);
            (set, result)
        };
        InstructionSet::available().map(run).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_chooses_and_a_wrong_one_is_reported() {
        let best = chosen("").set;
        assert!(chosen("").problem.is_none() && best.is_available());
        for set in InstructionSet::ALL {
            let choice = chosen(set.name());
            assert_eq!(choice.problem.is_none(), set.is_available(), "{set:?}");
            assert_eq!(choice.set, if set.is_available() { set } else { best });
        }
        for wrong in ["AVX2", "avx3", "sse2", " avx2", "ä"] {
            let choice = chosen(wrong);
            let problem = choice.problem.expect("a problem");
            assert!(problem.contains(VARIABLE) && problem.contains(wrong) && problem.contains("baseline"), "{problem}");
            assert_eq!(choice.set, best);
        }
    }

    #[test]
    fn every_instruction_set_of_the_processor_is_tried() {
        let tried = testing::on_each(instruction_set);
        assert!(tried.len() > usize::from(cfg!(target_arch = "aarch64")));
        assert!(tried.iter().all(|(set, used)| set == used));
    }
}
