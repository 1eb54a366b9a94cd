//! Metadata values: read in place, decoded when asked for.

use super::GgufError;
use super::cursor::Cursor;

/// The type of a metadata value, or of an array's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ValueType {
    /// One byte.
    U8,
    /// One signed byte.
    I8,
    /// Two bytes.
    U16,
    /// Two bytes, signed.
    I16,
    /// Four bytes.
    U32,
    /// Four bytes, signed.
    I32,
    /// Single precision.
    F32,
    /// One byte, 0 or 1.
    Bool,
    /// A length in eight bytes, then UTF-8.
    String,
    /// A type, a count, then the elements.
    Array,
    /// Eight bytes.
    U64,
    /// Eight bytes, signed.
    I64,
    /// Double precision.
    F64,
}

impl ValueType {
    /// All types, at their numbers in the file.
    const ALL: [ValueType; 13] = [
        ValueType::U8,
        ValueType::I8,
        ValueType::U16,
        ValueType::I16,
        ValueType::U32,
        ValueType::I32,
        ValueType::F32,
        ValueType::Bool,
        ValueType::String,
        ValueType::Array,
        ValueType::U64,
        ValueType::I64,
        ValueType::F64,
    ];

    pub(super) fn from_number(number: u32, key: &str) -> Result<ValueType, GgufError> {
        let found = usize::try_from(number).ok().and_then(|number| ValueType::ALL.get(number));
        found.copied().ok_or_else(|| {
            GgufError::out_of_range(
                format!("the type number of metadata {key}"),
                number,
                "from 0 (u8) to 12 (f64)",
            )
        })
    }

    /// Bytes of one value; `None` for strings and arrays.
    pub(super) fn bytes(self) -> Option<u64> {
        match self {
            ValueType::U8 | ValueType::I8 | ValueType::Bool => Some(1),
            ValueType::U16 | ValueType::I16 => Some(2),
            ValueType::U32 | ValueType::I32 | ValueType::F32 => Some(4),
            ValueType::U64 | ValueType::I64 | ValueType::F64 => Some(8),
            ValueType::String | ValueType::Array => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            ValueType::U8 => "u8",
            ValueType::I8 => "i8",
            ValueType::U16 => "u16",
            ValueType::I16 => "i16",
            ValueType::U32 => "u32",
            ValueType::I32 => "i32",
            ValueType::F32 => "f32",
            ValueType::Bool => "a boolean",
            ValueType::String => "a string",
            ValueType::Array => "an array",
            ValueType::U64 => "u64",
            ValueType::I64 => "i64",
            ValueType::F64 => "f64",
        }
    }
}

/// A metadata value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value<'a> {
    /// Any unsigned integer type.
    Unsigned(u64),
    /// Any signed integer type.
    Signed(i64),
    /// `f32` or `f64`.
    Float(f64),
    /// A boolean.
    Bool(bool),
    /// Text.
    Text(&'a str),
    /// An array.
    Array(Array<'a>),
}

impl<'a> Value<'a> {
    /// What it is, for messages.
    pub fn describe(&self) -> String {
        match self {
            Value::Unsigned(value) => format!("the integer {value}"),
            Value::Signed(value) => format!("the integer {value}"),
            Value::Float(value) => format!("the number {value}"),
            Value::Bool(value) => format!("the boolean {value}"),
            Value::Text(text) => format!("the string {}", super::error::shown(text)),
            Value::Array(array) => {
                format!("an array of {} values, each {}", array.len(), array.element.name())
            }
        }
    }

    /// The integer, of whatever type, unless it is negative.
    pub fn as_unsigned(&self) -> Option<u64> {
        match *self {
            Value::Unsigned(value) => Some(value),
            Value::Signed(value) => u64::try_from(value).ok(),
            _ => None,
        }
    }

    /// The number, of whatever type.
    pub fn as_float(&self) -> Option<f64> {
        match *self {
            Value::Float(value) => Some(value),
            Value::Unsigned(value) => Some(value as f64),
            Value::Signed(value) => Some(value as f64),
            _ => None,
        }
    }

    /// One scalar out of its bytes, as many as its type has.
    fn scalar(of: ValueType, bytes: &[u8]) -> Option<Value<'a>> {
        Some(match of {
            ValueType::U8 => Value::Unsigned(u64::from(*bytes.first()?)),
            ValueType::I8 => Value::Signed(i64::from(*bytes.first()? as i8)),
            ValueType::U16 => Value::Unsigned(u16::from_le_bytes(bytes.try_into().ok()?).into()),
            ValueType::I16 => Value::Signed(i16::from_le_bytes(bytes.try_into().ok()?).into()),
            ValueType::U32 => Value::Unsigned(u32::from_le_bytes(bytes.try_into().ok()?).into()),
            ValueType::I32 => Value::Signed(i32::from_le_bytes(bytes.try_into().ok()?).into()),
            ValueType::U64 => Value::Unsigned(u64::from_le_bytes(bytes.try_into().ok()?)),
            ValueType::I64 => Value::Signed(i64::from_le_bytes(bytes.try_into().ok()?)),
            ValueType::F32 => Value::Float(f32::from_le_bytes(bytes.try_into().ok()?).into()),
            ValueType::F64 => Value::Float(f64::from_le_bytes(bytes.try_into().ok()?)),
            ValueType::Bool => Value::Bool(*bytes.first()? != 0),
            ValueType::String | ValueType::Array => return None,
        })
    }
}

/// An array in place. Its extent was checked when the file was parsed; elements are decoded as
/// they are read, so an array costs no memory, whatever length it claims.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Array<'a> {
    element: ValueType,
    len: usize,
    bytes: &'a [u8],
}

impl<'a> Array<'a> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The type of its elements.
    pub fn element(&self) -> ValueType {
        self.element
    }

    /// Its numbers and booleans, in order; nothing when the elements are strings.
    pub fn scalars(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        let element = self.element;
        let width = element.bytes().map_or(usize::MAX, |bytes| bytes as usize);
        self.bytes.chunks_exact(width).filter_map(move |bytes| Value::scalar(element, bytes))
    }

    /// Its strings, in order, as the bytes they are; nothing when the elements are not strings.
    pub fn strings(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let mut cursor = Cursor::new(self.bytes);
        let mut left = if self.element == ValueType::String { self.len } else { 0 };
        std::iter::from_fn(move || {
            left = left.checked_sub(1)?;
            cursor.string(String::new, u64::MAX).ok()
        })
    }
}

/// Moves `cursor` past a value of type `of`, checking it.
pub(super) fn skip(cursor: &mut Cursor<'_>, of: ValueType, key: &str) -> Result<(), GgufError> {
    let what = || format!("the value of metadata {key}");
    match of {
        ValueType::String => {
            let text = cursor.string(what, u64::MAX)?;
            if std::str::from_utf8(text).is_err() {
                return Err(GgufError::malformed(what(), "must be valid UTF-8"));
            }
        }
        ValueType::Array => skip_array(cursor, key)?,
        scalar => {
            cursor.take(scalar.bytes().unwrap_or(0), what)?;
        }
    }
    Ok(())
}

fn skip_array(cursor: &mut Cursor<'_>, key: &str) -> Result<(), GgufError> {
    let what = || format!("the array of metadata {key}");
    let number = cursor.u32(|| format!("the element type of metadata {key}"))?;
    let element = ValueType::from_number(number, key)?;
    let count = cursor.u64(|| format!("the element count of metadata {key}"))?;
    match element {
        ValueType::Array => Err(GgufError::unsupported(
            format!("an array of arrays in metadata {key}"),
            "arrays hold numbers, booleans or strings",
        )),
        ValueType::String => {
            // Each string has at least its eight bytes of length: a larger count cannot be true,
            // and is refused before it is walked.
            if count > cursor.remaining() as u64 / 8 {
                return Err(GgufError::Truncated {
                    what: what(),
                    offset: cursor.position(),
                    needed: count.saturating_mul(8),
                    available: cursor.remaining(),
                });
            }
            for index in 0..count {
                cursor.string(|| format!("string {index} of metadata {key}"), u64::MAX)?;
            }
            Ok(())
        }
        scalar => {
            let bytes = count.saturating_mul(scalar.bytes().unwrap_or(1));
            cursor.take(bytes, what).map(|_| ())
        }
    }
}

/// Decodes a value that [`skip`] accepted.
pub(super) fn decode(of: ValueType, bytes: &[u8]) -> Option<Value<'_>> {
    let mut cursor = Cursor::new(bytes);
    match of {
        ValueType::String => {
            let text = cursor.string(String::new, u64::MAX).ok()?;
            Some(Value::Text(std::str::from_utf8(text).ok()?))
        }
        ValueType::Array => {
            let element = ValueType::from_number(cursor.u32(String::new).ok()?, "").ok()?;
            let len = usize::try_from(cursor.u64(String::new).ok()?).ok()?;
            Some(Value::Array(Array { element, len, bytes: &bytes[cursor.position()..] }))
        }
        scalar => Value::scalar(scalar, bytes),
    }
}
