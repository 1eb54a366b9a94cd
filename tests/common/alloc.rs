//! An allocator that counts, thread by thread: so that a test can say that the engine's thread
//! allocates nothing, whatever the others do.
//!
//! A test binary installs it with
//!
//! ```text
//! #[path = "common/alloc.rs"]
//! mod alloc;
//! #[global_allocator]
//! static ALLOCATOR: alloc::CountingAllocator = alloc::CountingAllocator;
//! ```

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    // `const` and without a destructor: reading it allocates nothing and is allowed at any time,
    // even while the thread is being torn down.
    static COUNTS: Cell<Counts> = const { Cell::new(Counts { allocations: 0, bytes: 0 }) };
}

/// What a thread has asked of the allocator since it began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Allocations and reallocations.
    pub allocations: u64,
    /// Bytes of them; a reallocation counts with its new size.
    pub bytes: u64,
}

/// The system's allocator, with a count kept for the calling thread.
pub struct CountingAllocator;

fn count(bytes: usize) {
    COUNTS.with(|counts| {
        let Counts { allocations, bytes: so_far } = counts.get();
        counts.set(Counts { allocations: allocations + 1, bytes: so_far + bytes as u64 });
    });
}

// SAFETY: every call goes to `System` with unchanged arguments, so what `System` promises holds;
// counting neither allocates nor unwinds.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller's promises are those that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: as in `alloc`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size);
        // SAFETY: as in `alloc`; `memory` came from `System`, through this allocator.
        unsafe { System.realloc(memory, layout, size) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as in `realloc`.
        unsafe { System.dealloc(memory, layout) }
    }
}

/// What the calling thread has allocated so far.
pub fn counts() -> Counts {
    COUNTS.with(Cell::get)
}

/// Runs `work` and fails if this thread allocates meanwhile.
#[track_caller]
pub fn assert_allocates_nothing<R>(what: &str, work: impl FnOnce() -> R) -> R {
    let before = counts();
    let result = work();
    let after = counts();
    assert!(
        before == after,
        "{what} allocated {} times, {} bytes",
        after.allocations - before.allocations,
        after.bytes - before.bytes
    );
    result
}
