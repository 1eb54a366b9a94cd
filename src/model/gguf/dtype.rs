//! Tensor element types: which exist, how large their blocks are, which ones are run.

use std::fmt;

/// How a tensor's values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of a single.
    Bf16,
    /// 32 values: a half-precision scale, then signed bytes.
    Q8_0,
    /// 32 values: a half-precision scale, then nibbles around 8.
    Q4_0,
    /// 32 values: a half-precision scale and minimum, then nibbles.
    Q4_1,
    /// A type that GGUF has and this program does not run, by its number in the file. Such a
    /// tensor is found and measured, so that the refusal can name it.
    Unsupported(u8),
}

/// One type of the format: number in the file, name, values a block, bytes a block.
struct Format {
    number: u32,
    name: &'static str,
    values: usize,
    bytes: usize,
}

const fn format(number: u32, name: &'static str, values: usize, bytes: usize) -> Format {
    Format { number, name, values, bytes }
}

/// Every type number in use, with the size of its block, in order of number. Numbers that are
/// not here were withdrawn from the format or came after this list; their tensors cannot be
/// measured, so a file with one is refused.
const FORMATS: &[Format] = &[
    format(0, "F32", 1, 4),
    format(1, "F16", 1, 2),
    format(2, "Q4_0", 32, 2 + 16),
    format(3, "Q4_1", 32, 4 + 16),
    format(6, "Q5_0", 32, 2 + 4 + 16),
    format(7, "Q5_1", 32, 4 + 4 + 16),
    format(8, "Q8_0", 32, 2 + 32),
    format(9, "Q8_1", 32, 4 + 32),
    format(10, "Q2_K", 256, 84),
    format(11, "Q3_K", 256, 110),
    format(12, "Q4_K", 256, 144),
    format(13, "Q5_K", 256, 176),
    format(14, "Q6_K", 256, 210),
    format(15, "Q8_K", 256, 292),
    format(16, "IQ2_XXS", 256, 66),
    format(17, "IQ2_XS", 256, 74),
    format(18, "IQ3_XXS", 256, 98),
    format(19, "IQ1_S", 256, 50),
    format(20, "IQ4_NL", 32, 18),
    format(21, "IQ3_S", 256, 110),
    format(22, "IQ2_S", 256, 82),
    format(23, "IQ4_XS", 256, 136),
    format(24, "I8", 1, 1),
    format(25, "I16", 1, 2),
    format(26, "I32", 1, 4),
    format(27, "I64", 1, 8),
    format(28, "F64", 1, 8),
    format(29, "IQ1_M", 256, 56),
    format(30, "BF16", 1, 2),
    format(34, "TQ1_0", 256, 54),
    format(35, "TQ2_0", 256, 66),
    format(39, "MXFP4", 32, 17),
];

impl DType {
    /// The types that are run, for messages.
    pub const SUPPORTED: &'static str = "F32, F16, BF16, Q8_0, Q4_0 and Q4_1 are";

    /// The type with this number in the file; `None` when the format has no such number.
    pub fn from_number(number: u32) -> Option<DType> {
        let format = FORMATS.iter().find(|format| format.number == number)?;
        Some(match format.number {
            0 => DType::F32,
            1 => DType::F16,
            2 => DType::Q4_0,
            3 => DType::Q4_1,
            8 => DType::Q8_0,
            30 => DType::Bf16,
            other => DType::Unsupported(other as u8),
        })
    }

    /// The type's number in the file.
    pub fn number(self) -> u32 {
        match self {
            DType::F32 => 0,
            DType::F16 => 1,
            DType::Q4_0 => 2,
            DType::Q4_1 => 3,
            DType::Q8_0 => 8,
            DType::Bf16 => 30,
            DType::Unsupported(number) => u32::from(number),
        }
    }

    fn format(self) -> &'static Format {
        let number = self.number();
        FORMATS.iter().find(|format| format.number == number).unwrap_or(&FORMATS[0])
    }

    /// The type's name as tools print it.
    pub fn name(self) -> &'static str {
        self.format().name
    }

    /// Values in a block: 1 for the plain types.
    pub fn block_values(self) -> usize {
        self.format().values
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        self.format().bytes
    }

    /// Whether the program can run weights of this type.
    pub fn is_supported(self) -> bool {
        !matches!(self, DType::Unsupported(_))
    }

    /// Whether each value stands for itself (no shared scale).
    pub fn is_plain(self) -> bool {
        matches!(self, DType::F32 | DType::F16 | DType::Bf16)
    }

    /// Bytes of `values` values in a row; `None` when they do not fill whole blocks, or when the
    /// product does not fit.
    pub fn row_bytes(self, values: usize) -> Option<usize> {
        let block = self.block_values();
        if !values.is_multiple_of(block) {
            return None;
        }
        (values / block).checked_mul(self.block_bytes())
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_of_the_format_maps_to_a_type_and_back() {
        for format in FORMATS {
            let dtype = DType::from_number(format.number).expect("listed");
            assert_eq!(dtype.number(), format.number);
            assert_eq!(dtype.name(), format.name);
        }
        assert_eq!(DType::from_number(4), None);
        assert_eq!(DType::from_number(u32::MAX), None);
    }

    #[test]
    fn rows_are_measured_in_whole_blocks() {
        assert_eq!(DType::Q4_1.row_bytes(576), Some(18 * 20));
        assert_eq!(DType::Q8_0.row_bytes(33), None);
        assert_eq!(DType::F32.row_bytes(usize::MAX), None);
    }
}
