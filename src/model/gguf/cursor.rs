//! A reader over bytes that may be hostile: every read is checked against what is left.

use super::GgufError;

/// A position in a byte slice. Reads move it forward or fail and name what they wanted.
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Cursor<'a> {
        Cursor { bytes, position: 0 }
    }

    pub(super) fn position(&self) -> usize {
        self.position
    }

    pub(super) fn remaining(&self) -> usize {
        self.bytes.len() - self.position
    }

    /// The next `count` bytes. `count` is as the file claims it, so it may be anything.
    pub(super) fn take(
        &mut self,
        count: u64,
        what: impl FnOnce() -> String,
    ) -> Result<&'a [u8], GgufError> {
        let fits = usize::try_from(count).ok().filter(|&count| count <= self.remaining());
        let Some(count) = fits else {
            return Err(GgufError::Truncated {
                what: what(),
                offset: self.position,
                needed: count,
                available: self.remaining(),
            });
        };
        let taken = &self.bytes[self.position..self.position + count];
        self.position += count;
        Ok(taken)
    }

    fn array<const N: usize>(
        &mut self,
        what: impl FnOnce() -> String,
    ) -> Result<[u8; N], GgufError> {
        let mut value = [0; N];
        value.copy_from_slice(self.take(N as u64, what)?);
        Ok(value)
    }

    pub(super) fn u32(&mut self, what: impl FnOnce() -> String) -> Result<u32, GgufError> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, what: impl FnOnce() -> String) -> Result<u64, GgufError> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A string: its length in 8 bytes, then that many bytes.
    pub(super) fn string(
        &mut self,
        what: impl Fn() -> String,
        bytes_max: u64,
    ) -> Result<&'a [u8], GgufError> {
        let length = self.u64(|| format!("the length of {}", what()))?;
        if length > bytes_max {
            return Err(GgufError::TooLarge {
                what: format!("the length of {}", what()),
                found: length,
                max: bytes_max,
            });
        }
        self.take(length, what)
    }
}
