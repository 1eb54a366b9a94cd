//! Which instruction-set path runs.

use std::fmt;

/// An instruction-set path. All paths give the same bits in the integer GEMMs and in every
/// element-wise routine; those that multiply bf16 pairs (attention, F16/BF16/F32 weights) differ
/// between [`Isa::Avx512Bf16`], [`Isa::Avx512`] and [`Isa::Avx2`] on one side and
/// [`Isa::Portable`] on the other only in rounding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust, vectorised by the compiler for the build's baseline.
    Portable,
    /// 256-bit integers and fused multiply-add.
    Avx2,
    /// 512-bit with byte dot products (VNNI); bf16 pairs as in [`Isa::Avx2`].
    Avx512,
    /// [`Isa::Avx512`] and bf16 dot products.
    Avx512Bf16,
}

impl Isa {
    /// The best path this machine has.
    pub fn best() -> Isa {
        let mut paths = Isa::available();
        paths.pop().expect("the portable path is everywhere")
    }

    /// All paths this machine has, slowest first.
    pub fn available() -> Vec<Isa> {
        let all = [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16];
        all.into_iter().filter(|isa| isa.is_available()).collect()
    }

    /// Whether this machine has it.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => Isa::Avx512.is_available() && is_x86_feature_detected!("avx512bf16"),
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512-vnni",
            Isa::Avx512Bf16 => "avx512-vnni-bf16",
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_path_is_available_and_last_in_the_list() {
        assert!(Isa::best().is_available());
        assert_eq!(Isa::available().last(), Some(&Isa::best()));
        assert_eq!(Isa::available()[0], Isa::Portable);
    }
}
