//! Receive buffers that the kernel writes into while we are elsewhere.
#![allow(unsafe_code)] // memory shared with the kernel cannot be a `&mut [u8]` of ours

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

/// One buffer of equal size for each place of the connection table, in one allocation. Pages that
/// no connection has used yet cost nothing: large zeroed allocations are mapped lazily.
pub(super) struct ReceiveBuffers {
    memory: NonNull<u8>,
    layout: Layout,
    piece_bytes: usize,
    count: usize,
    /// Set when a receive may still be under way at the end: then the memory is never freed.
    leaked: bool,
}

impl ReceiveBuffers {
    /// `count` and `piece_bytes` are at least 1.
    pub(super) fn new(count: usize, piece_bytes: usize) -> ReceiveBuffers {
        let bytes = count.checked_mul(piece_bytes).expect("bounds were checked by Net::new");
        let layout = Layout::from_size_align(bytes, 64).expect("bounds were checked by Net::new");
        assert!(bytes > 0);
        // SAFETY: a `Vec` would claim, as its owner, that nobody else writes to it; the kernel
        // will. The layout's size is not zero, asserted above.
        let memory = unsafe { alloc_zeroed(layout) };
        let Some(memory) = NonNull::new(memory) else { handle_alloc_error(layout) };
        ReceiveBuffers { memory, layout, piece_bytes, count, leaked: false }
    }

    pub(super) fn piece_bytes(&self) -> usize {
        self.piece_bytes
    }

    pub(super) fn bytes(&self) -> usize {
        self.layout.size()
    }

    /// Where the kernel may write [`ReceiveBuffers::piece_bytes`] for this place.
    pub(super) fn target(&self, slot: u32) -> *mut u8 {
        assert!((slot as usize) < self.count);
        // SAFETY: the index is below `count` (just asserted), so the offset lies within the
        // allocation of `count * piece_bytes` bytes, which is far below isize::MAX.
        unsafe { self.memory.as_ptr().add(slot as usize * self.piece_bytes) }
    }

    /// The first `length` bytes of a place's buffer.
    ///
    /// # Safety
    /// No receive into this place is under way, nor is one started while the slice lives.
    pub(super) unsafe fn filled(&self, slot: u32, length: usize) -> &[u8] {
        assert!(length <= self.piece_bytes);
        // SAFETY: `target` is within the allocation and `length` bytes from there still are
        // (asserted); the memory was zeroed, so every byte is initialised; by this function's own
        // precondition nobody writes to it while the slice lives.
        unsafe { std::slice::from_raw_parts(self.target(slot), length) }
    }

    /// Gives the memory up for good: some receive into it could not be seen to its end.
    pub(super) fn leak(&mut self) {
        self.leaked = true;
    }
}

impl Drop for ReceiveBuffers {
    fn drop(&mut self) {
        if !self.leaked {
            // SAFETY: allocated in `new` with this layout, and freed here only. No receive is
            // under way: the owner reaps them all first, or calls `leak`.
            unsafe { dealloc(self.memory.as_ptr(), self.layout) };
        }
    }
}
