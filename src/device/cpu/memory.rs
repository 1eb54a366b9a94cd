//! Memory of the backend: mapped once, on huge pages where the system gives them, shared by the
//! workers, each of which writes parts that no other touches meanwhile.
#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::io;
use std::marker::PhantomData;
use std::ptr::NonNull;

/// Types for which all-zero bytes are a value, any bytes written by kernels are too, and nothing
/// need be dropped.
///
/// # Safety
/// All of that must be true of the implementor.
pub unsafe trait Plain: Copy + Send + Sync + 'static {}

// SAFETY: integers and floats have no invalid bit patterns and no drop glue.
unsafe impl Plain for u8 {}
// SAFETY: as for u8.
unsafe impl Plain for u16 {}
// SAFETY: as for u8.
unsafe impl Plain for u32 {}
// SAFETY: as for u8.
unsafe impl Plain for f32 {}

/// A fixed run of values in memory of its own, zero at first. Shared by reference between
/// threads: whoever writes says which part, and promises to be alone there.
pub struct Region<T: Plain> {
    start: NonNull<T>,
    len: usize,
    mapped_bytes: usize,
    holds: PhantomData<T>,
}

// SAFETY: a region owns its memory and T is plain data; writes through a shared reference are
// unsafe calls whose callers keep them disjoint.
unsafe impl<T: Plain> Send for Region<T> {}
// SAFETY: as for Send.
unsafe impl<T: Plain> Sync for Region<T> {}

/// Huge pages of x86-64 and of most aarch64 kernels.
const HUGE_PAGE_BYTES: usize = 2 << 20;

impl<T: Plain> Region<T> {
    /// Maps room for `len` zeroes. Memory below half a huge page is not rounded up to one.
    ///
    /// # Errors
    /// When the system refuses the memory, or its size overflows.
    pub fn new(len: usize) -> io::Result<Region<T>> {
        let too_large = || io::Error::new(io::ErrorKind::OutOfMemory, "the size overflows");
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(too_large)?.max(1);
        let unit = if bytes >= HUGE_PAGE_BYTES / 2 { HUGE_PAGE_BYTES } else { 4096 };
        let mapped_bytes = bytes.checked_next_multiple_of(unit).ok_or_else(too_large)?;
        // SAFETY: an anonymous private mapping at an address of the kernel's choice touches no
        // memory that exists. Safe allocation cannot ask for huge pages.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapped_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the range is the mapping just made; the advice changes only its page size. A
        // refusal costs speed, not correctness, so the result is not looked at.
        unsafe { libc::madvise(start, mapped_bytes, libc::MADV_HUGEPAGE) };
        let start = NonNull::new(start.cast::<T>()).expect("a mapping is never at address zero");
        Ok(Region { start, len, mapped_bytes, holds: PhantomData })
    }

    /// Maps room for `len` zeroes and makes the system back it with memory now.
    ///
    /// # Errors
    /// When the system refuses the memory, or its size overflows.
    pub fn backed(len: usize) -> io::Result<Region<T>> {
        let mut region = Region::new(len)?;
        region.prefault();
        Ok(region)
    }

    /// Values in it.
    #[expect(clippy::len_without_is_empty, reason = "nobody asks")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Bytes taken from the system.
    pub fn mapped_bytes(&self) -> u64 {
        self.mapped_bytes as u64
    }

    /// Makes the system back the whole region with memory now rather than at first use.
    pub fn prefault(&mut self) {
        let bytes = self.start.as_ptr().cast::<u8>();
        for offset in (0..self.mapped_bytes).step_by(4096) {
            // SAFETY: the offset is inside the mapping, which `&mut self` has to itself. The write
            // is volatile because it stores what is there already and must happen all the same.
            unsafe { bytes.add(offset).write_volatile(bytes.add(offset).read()) };
        }
    }

    /// Makes the system back a piece of the region with memory, from this byte (of a page's start)
    /// on, and returns where the next one begins; `None` at the end, or where the system cannot do
    /// it ahead (Linux before 5.14: then the first use of each page does). What is in the memory
    /// stays, whoever writes to it meanwhile.
    pub fn back(&self, from_byte: usize) -> Option<usize> {
        /// Some milliseconds of the kernel's work.
        const PIECE_BYTES: usize = 16 << 20;
        let bytes = PIECE_BYTES.min(self.mapped_bytes.checked_sub(from_byte)?);
        if bytes == 0 {
            return None;
        }
        // SAFETY: the range is inside the mapping. The advice makes pages present as a write would
        // and leaves their contents alone; no safe call can ask for that.
        let result = unsafe {
            let start = self.start.as_ptr().cast::<u8>().add(from_byte);
            libc::madvise(start.cast(), bytes, libc::MADV_POPULATE_WRITE)
        };
        (result == 0).then_some(from_byte + bytes)
    }

    /// All of it.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: the memory is mapped, `len` values long, valid as T (plain) and borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }

    /// The values from `at`, `len` of them.
    ///
    /// # Safety
    /// Nobody writes to them while the slice lives.
    ///
    /// # Panics
    /// When the range is not inside the region.
    pub unsafe fn slice(&self, at: usize, len: usize) -> &[T] {
        self.check(at, len);
        // SAFETY: in range (checked), valid as T, and not written meanwhile (the caller's word).
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().add(at), len) }
    }

    /// The values from `at`, `len` of them, to write.
    ///
    /// # Safety
    /// Nobody else reads or writes them while the slice lives.
    ///
    /// # Panics
    /// When the range is not inside the region.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice_mut(&self, at: usize, len: usize) -> &mut [T] {
        self.check(at, len);
        // SAFETY: in range (checked), valid as T, and the caller's alone (the caller's word).
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().add(at), len) }
    }

    /// Where the values from `at` lie, of which `len` may be used through the pointer.
    ///
    /// # Panics
    /// When the range is not inside the region.
    pub fn at(&self, at: usize, len: usize) -> *mut T {
        self.check(at, len);
        // SAFETY: the result is inside the mapping or at its end.
        unsafe { self.start.as_ptr().add(at) }
    }

    fn check(&self, at: usize, len: usize) {
        let in_range = at.checked_add(len).is_some_and(|end| end <= self.len);
        assert!(in_range, "{at} + {len} is outside a region of {}", self.len);
    }
}

impl<T: Plain> Drop for Region<T> {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `new`; slices borrow the region, so none is left.
        let result = unsafe { libc::munmap(self.start.as_ptr().cast(), self.mapped_bytes) };
        debug_assert_eq!(result, 0, "unmapping a mapping of our own cannot fail");
    }
}

/// A value that several threads hold and that one of them uses at a time, by agreement on stages
/// and tiles rather than by a lock.
pub struct Staged<T>(UnsafeCell<T>);

// SAFETY: access is by unsafe calls whose callers keep writers alone; the value itself moves
// between threads, hence `T: Send`, and is read by several at once, hence `T: Sync`.
unsafe impl<T: Send + Sync> Sync for Staged<T> {}

impl<T> Staged<T> {
    /// Takes the value in.
    pub fn new(value: T) -> Staged<T> {
        Staged(UnsafeCell::new(value))
    }

    /// The value.
    ///
    /// # Safety
    /// Nobody writes to it while the reference lives.
    pub unsafe fn get(&self) -> &T {
        // SAFETY: the caller's word.
        unsafe { &*self.0.get() }
    }

    /// The value, to write.
    ///
    /// # Safety
    /// Nobody else uses it while the reference lives.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn get_mut(&self) -> &mut T {
        // SAFETY: the caller's word.
        unsafe { &mut *self.0.get() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_starts_as_zeroes_and_keeps_what_is_written() {
        let mut region = Region::<f32>::new(1_000_000).expect("memory");
        region.prefault();
        assert!(region.as_mut_slice().iter().all(|&value| value == 0.0));
        region.as_mut_slice()[999_999] = 2.5;
        // SAFETY: nobody else has the region.
        assert_eq!(unsafe { region.slice(999_998, 2) }, [0.0, 2.5]);
        assert_eq!(region.mapped_bytes() % 4096, 0);
    }

    #[test]
    #[should_panic(expected = "outside a region")]
    fn a_range_past_the_end_is_caught_before_the_memory_is_touched() {
        let region = Region::<u8>::new(10).expect("memory");
        // SAFETY: nobody else has the region.
        unsafe { region.slice(8, 3) };
    }

    #[test]
    fn a_size_that_overflows_is_an_error() {
        assert!(Region::<f32>::new(usize::MAX / 2).is_err());
    }
}
