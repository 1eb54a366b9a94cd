//! A bounded queue from one thread to one other, without locks.
//!
//! Two counters describe the queue: `tail` counts the items ever pushed, `head` those ever popped.
//! Each has one writer, publishes with a Release store, and is read by the other side with an
//! Acquire load. The halves are not `Clone` and every operation takes `&mut self`, so "one
//! producer, one consumer" is a fact of the types and not a rule to remember.
//!
//! What makes it fast is what it does *not* read: each side keeps the far counter as last seen
//! and looks again only when that says full (or empty). In a queue that is neither, a line of
//! cache changes hands once per lap instead of once per item. For the same reason a batch of
//! nothing stores nothing: whoever polls an idle ring must not take the line from the other side.

#![allow(unsafe_code)]

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::error::Error;
use std::fmt;
use std::mem::MaybeUninit;
use std::ops::Deref;
use std::ptr::{self, NonNull};
use std::slice;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use crossbeam_utils::CachePadded;

use super::sync::{Arc, AtomicBool, AtomicUsize, UnsafeCell};

/// Largest capacity: beyond it a byte count of slots could overflow.
pub const CAPACITY_MAX: usize = 1 << 32;

type Slot<T> = UnsafeCell<MaybeUninit<T>>;

/// Makes a ring that holds up to `capacity` items, and returns its two ends.
///
/// Memory: `capacity` rounded up to a power of two, times the size of an item, plus three padded
/// lines; see [`ring_bytes`]. Nothing is allocated afterwards.
///
/// # Panics
/// When `capacity` is 0 or above [`CAPACITY_MAX`]: both are a mistake in the program.
pub fn ring<T: Send>(capacity: usize) -> (Producer<T>, Consumer<T>) {
    assert!((1..=CAPACITY_MAX).contains(&capacity), "a ring cannot hold {capacity} items");
    let slots = Slots::new(capacity.next_power_of_two());
    let shared = Arc::new(Shared {
        head: CachePadded::new(AtomicUsize::new(0)),
        tail: CachePadded::new(AtomicUsize::new(0)),
        slots,
        capacity,
        producer_gone: AtomicBool::new(false),
        consumer_gone: AtomicBool::new(false),
    });
    let producer = Producer { shared: Arc::clone(&shared), tail: 0, head_seen: 0 };
    let consumer = Consumer { shared, head: 0, tail_seen: 0 };
    (producer, consumer)
}

/// Bytes that a ring of `capacity` items of type `T` occupies, for the memory envelope.
pub const fn ring_bytes<T>(capacity: usize) -> usize {
    capacity.next_power_of_two() * size_of::<T>() + size_of::<Shared<T>>() + 2 * size_of::<usize>()
}

/// The slots' memory. It begins on a line of cache, which a `Box` of slots does not: an item of
/// half a line would lie in two every other time, and cost two lines on their way to the far side.
struct Slots<T> {
    first: NonNull<Slot<T>>,
    /// A power of two, at least 1.
    len: usize,
}

// SAFETY: it owns its slots as a box does; they hold `T` or nothing.
unsafe impl<T: Send> Send for Slots<T> {}

impl<T> Slots<T> {
    /// Bytes of a line of cache.
    const LINE: usize = 64;

    fn new(len: usize) -> Slots<T> {
        let layout = Slots::<T>::layout(len);
        let first = match layout.size() {
            0 => NonNull::dangling(),
            // SAFETY: the size is not zero. Safe code cannot ask for an alignment that is not a
            // type's own.
            _ => NonNull::new(unsafe { alloc(layout) }.cast::<Slot<T>>())
                .unwrap_or_else(|| handle_alloc_error(layout)),
        };
        for at in 0..len {
            // SAFETY: the layout has room for `len` slots at their alignment, and this one has not
            // been written before. (A slot's cell may have a state of its own, as loom's has.)
            unsafe { first.add(at).write(UnsafeCell::new(MaybeUninit::uninit())) };
        }
        Slots { first, len }
    }

    fn layout(len: usize) -> Layout {
        let slots = Layout::array::<Slot<T>>(len).expect("below CAPACITY_MAX slots");
        slots.align_to(Slots::<T>::LINE).expect("a small power of two")
    }
}

impl<T> Deref for Slots<T> {
    type Target = [Slot<T>];

    #[inline(always)]
    fn deref(&self) -> &[Slot<T>] {
        // SAFETY: `new` made `len` slots there, which live as long as this does; whoever changes
        // what is in them does so through their cells.
        unsafe { slice::from_raw_parts(self.first.as_ptr(), self.len) }
    }
}

impl<T> Drop for Slots<T> {
    fn drop(&mut self) {
        let layout = Slots::<T>::layout(self.len);
        // SAFETY: `new` wrote `len` slots there, allocated with this very layout unless it is of
        // size zero; nobody else has them, and they are not used again. Items in them are dropped
        // by `Shared`, not by their slots.
        unsafe {
            ptr::slice_from_raw_parts_mut(self.first.as_ptr(), self.len).drop_in_place();
            if layout.size() > 0 {
                dealloc(self.first.as_ptr().cast(), layout);
            }
        }
    }
}

struct Shared<T> {
    /// Items ever popped, modulo 2^64. Written by the consumer alone.
    /// Range: `tail - capacity ..= tail`; the slots of `head .. tail` hold items.
    head: CachePadded<AtomicUsize>,
    /// Items ever pushed, modulo 2^64. Written by the producer alone.
    /// Range: `head ..= head + capacity`.
    tail: CachePadded<AtomicUsize>,
    /// Item number i lies in slot `i % slots.len()`. The length is a power of two, so that the
    /// remainder is a mask and stays right when the counters wrap; `slots.len() >= capacity`.
    slots: Slots<T>,
    /// How many items may be in the ring at once: at least 1.
    capacity: usize,
    /// Set once, when the producer is dropped; its last `tail` is published before.
    producer_gone: AtomicBool,
    /// Set once, when the consumer is dropped.
    consumer_gone: AtomicBool,
}

// SAFETY: the cells are what keeps this from being Sync by itself. Only the one Producer writes a
// slot, and only while it lies outside `head..tail`; only the one Consumer reads it, and only
// while it lies inside. The Release stores of `tail` and `head` and the Acquire loads of the other
// side put the write before the read, and the read before the next write. Items move from thread
// to thread, hence `T: Send`; no `&T` is ever shared, hence no `T: Sync`.
unsafe impl<T: Send> Sync for Shared<T> {}

/// Where item number `counter` lies. Takes the slots and not what they lie in: a loop over many
/// then keeps their address and number in registers, where behind the `Arc` they would have to be
/// read again after every item, which for all the compiler knows may have overwritten them.
#[inline(always)]
fn slot<T>(slots: &[Slot<T>], counter: usize) -> &Slot<T> {
    let index = counter & (slots.len() - 1);
    debug_assert!(index < slots.len());
    // SAFETY: a ring's slots are never empty (capacity is at least 1) and their number is a power
    // of two, so the masked index is below it. Unchecked because the bound check is a tenth of the
    // cost of a push, and the compiler cannot know of the power of two.
    unsafe { slots.get_unchecked(index) }
}

impl<T> Drop for Shared<T> {
    fn drop(&mut self) {
        // Relaxed: both handles are gone, and the reference count ordered all that they did.
        let tail = self.tail.load(Relaxed);
        let mut head = self.head.load(Relaxed);
        while head != tail {
            // SAFETY: `head..tail` holds initialised items, and `&mut self` says that nobody
            // else is left to touch them. Each is dropped once, since `head` moves on.
            slot(&self.slots, head).with_mut(|slot| unsafe { (*slot).assume_init_drop() });
            head = head.wrapping_add(1);
        }
    }
}

/// The end that items go into. There is exactly one; it may move to another thread.
pub struct Producer<T> {
    shared: Arc<Shared<T>>,
    /// Items pushed. Ahead of `shared.tail` only inside a batch (or after an iterator panicked
    /// in one): the next store publishes them.
    tail: usize,
    /// `shared.head` as last seen. Range: `tail - capacity ..= shared.head`: there may be more
    /// room than it says, never less.
    head_seen: usize,
}

impl<T> Producer<T> {
    /// Puts an item in, or hands it back when the ring is full or nobody will ever take it out.
    #[inline]
    pub fn push(&mut self, item: T) -> Result<(), PushError<T>> {
        if self.is_abandoned() {
            return Err(PushError::Abandoned(item));
        }
        if self.free_seen() == 0 && self.free() == 0 {
            return Err(PushError::Full(item));
        }
        // SAFETY: there is room, so this slot is outside `head..tail`: the consumer is done with it
        // (Acquire in `free`) and will not look at it before `tail` says so. Safe code has no cell
        // that two threads may use in turn without a lock or a flag per slot.
        slot(&self.shared.slots, self.tail).with_mut(|slot| unsafe { (*slot).write(item) });
        self.tail = self.tail.wrapping_add(1);
        self.publish();
        Ok(())
    }

    /// Puts in what `items` yields until that ends or the ring is full, and shows all of it to
    /// the consumer at once. Returns how many. What does not fit is not taken from the iterator;
    /// nothing is when the ring is abandoned.
    pub fn push_batch(&mut self, items: &mut impl Iterator<Item = T>) -> usize {
        if self.is_abandoned() {
            return 0;
        }
        let begin = self.tail;
        // What was free when last seen comes first. Looked at again, there may be more; but only
        // what was published can be popped, so this ends after `capacity` items at the latest.
        while self.free_seen() > 0 || self.free() > 0 {
            if !self.fill_seen(items) {
                break;
            }
        }
        // Not `begin`: an iterator that panicked may have left items of an earlier batch.
        if self.tail != self.shared.tail.load(Relaxed) {
            self.publish();
        }
        self.tail.wrapping_sub(begin)
    }

    /// Writes items as long as there are any and there was room when last seen. Returns whether
    /// there may be more.
    #[inline]
    fn fill_seen(&mut self, items: &mut impl Iterator<Item = T>) -> bool {
        let mut next = self.tail;
        let end = next.wrapping_add(self.free_seen());
        let slots = &*self.shared.slots;
        while next != end {
            let Some(item) = items.next() else { return false };
            // SAFETY: as in `push`: `next` is at most `free_seen` ahead of `tail` as it was.
            slot(slots, next).with_mut(|slot| unsafe { (*slot).write(item) });
            next = next.wrapping_add(1);
            // Here and not behind the loop: should the iterator panic, what it gave is counted.
            self.tail = next;
        }
        true
    }

    /// How many items fit right now. Only the consumer can change that, and only upwards.
    pub fn free(&mut self) -> usize {
        // Acquire pairs with the consumer's Release in `Consumer::publish`: it has read the slots
        // below this `head`, so they may be written again.
        self.head_seen = self.shared.head.load(Acquire);
        self.free_seen()
    }

    /// Whether the consumer is gone: pushing has become pointless.
    #[inline]
    pub fn is_abandoned(&self) -> bool {
        // Acquire pairs with the Release in the consumer's drop: what it did before is visible.
        self.shared.consumer_gone.load(Acquire)
    }

    /// How many items the ring can hold.
    pub fn capacity(&self) -> usize {
        self.shared.capacity
    }

    #[inline(always)]
    fn free_seen(&self) -> usize {
        self.shared.capacity - self.tail.wrapping_sub(self.head_seen)
    }

    #[inline(always)]
    fn publish(&mut self) {
        // Release pairs with the consumer's Acquire in `Consumer::len`: the items are written.
        self.shared.tail.store(self.tail, Release);
    }
}

impl<T> Drop for Producer<T> {
    fn drop(&mut self) {
        // Covers items of a batch whose iterator panicked: they are written and must be dropped.
        self.publish();
        // Release pairs with the Acquire in `Consumer::is_abandoned`: whoever sees the flag sees
        // the last `tail` too.
        self.shared.producer_gone.store(true, Release);
    }
}

impl<T> fmt::Debug for Producer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Producer").field("capacity", &self.shared.capacity).finish_non_exhaustive()
    }
}

/// The end that items come out of. There is exactly one; it may move to another thread.
/// Dropping it drops what the ring holds.
pub struct Consumer<T> {
    shared: Arc<Shared<T>>,
    /// Items popped. Ahead of `shared.head` only while a [`Batch`] is out.
    head: usize,
    /// `shared.tail` as last seen. Range: `head ..= shared.tail`: there may be more items than it
    /// says, never fewer.
    tail_seen: usize,
}

impl<T> Consumer<T> {
    /// Takes the oldest item out.
    #[inline]
    pub fn pop(&mut self) -> Option<T> {
        if self.tail_seen == self.head && self.is_empty() {
            return None;
        }
        // SAFETY: `head < tail`, so the slot holds an item whose write happened before (Acquire in
        // `len`), and the producer will not write there again before `head` says so. `head` moves
        // on, so the item is read out exactly once.
        let item =
            slot(&self.shared.slots, self.head).with(|slot| unsafe { (*slot).assume_init_read() });
        self.head = self.head.wrapping_add(1);
        // Release pairs with the Acquire in `Producer::free`: the slot is read.
        self.shared.head.store(self.head, Release);
        Some(item)
    }

    /// Up to `limit` items, oldest first. Their room goes back to the producer all at once, when
    /// the batch is dropped. What was not taken out of the batch stays in the ring.
    pub fn pop_batch(&mut self, limit: usize) -> Batch<'_, T> {
        let mut left = self.tail_seen.wrapping_sub(self.head);
        if left < limit {
            left = self.len();
        }
        let Consumer { shared, head, .. } = self;
        Batch {
            slots: &shared.slots,
            published: &shared.head,
            next: *head,
            head,
            left: left.min(limit),
        }
    }

    /// How many items there are to pop. Only the producer can change that, and only upwards.
    pub fn len(&mut self) -> usize {
        // Acquire pairs with the Release in `Producer::publish`: the items below this `tail` are
        // written.
        self.tail_seen = self.shared.tail.load(Acquire);
        self.tail_seen.wrapping_sub(self.head)
    }

    /// Whether there is nothing to pop.
    pub fn is_empty(&mut self) -> bool {
        self.len() == 0
    }

    /// Whether the producer is gone. What it pushed can still be popped: the end of the stream
    /// is "abandoned, and *then* nothing to pop", asked in that order.
    pub fn is_abandoned(&self) -> bool {
        // Acquire pairs with the Release in the producer's drop.
        self.shared.producer_gone.load(Acquire)
    }

    /// How many items the ring can hold.
    pub fn capacity(&self) -> usize {
        self.shared.capacity
    }
}

impl<T> Drop for Consumer<T> {
    fn drop(&mut self) {
        // First the flag, so that no more comes in than what is on its way already; an item that
        // slips in behind the last pop is dropped with the ring. Release: see
        // `Producer::is_abandoned`.
        self.shared.consumer_gone.store(true, Release);
        while self.pop().is_some() {}
    }
}

impl<T> fmt::Debug for Consumer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Consumer").field("capacity", &self.shared.capacity).finish_non_exhaustive()
    }
}

/// Items on their way out of a ring; see [`Consumer::pop_batch`].
///
/// Forgetting a batch instead of dropping it is harmless: the producer learns of the room at
/// the next batch, or with the next item.
pub struct Batch<'a, T> {
    slots: &'a [Slot<T>],
    /// What the producer sees.
    published: &'a AtomicUsize,
    /// The consumer's own count. Follows `next` item by item, so that a forgotten batch repeats
    /// none; it is not read back, which would put a store's way to memory and back between items.
    head: &'a mut usize,
    /// The item to be taken next.
    next: usize,
    /// Items that may still be taken. Range: 0 ..= what the ring held when the batch was made.
    left: usize,
}

impl<T> Iterator for Batch<'_, T> {
    type Item = T;

    #[inline]
    fn next(&mut self) -> Option<T> {
        self.left = self.left.checked_sub(1)?;
        // SAFETY: as in `Consumer::pop`: at least `left` items were there when the batch was made,
        // and nobody else can have taken one since: the batch borrows the consumer.
        let item = slot(self.slots, self.next).with(|slot| unsafe { (*slot).assume_init_read() });
        self.next = self.next.wrapping_add(1);
        *self.head = self.next;
        Some(item)
    }

    #[inline]
    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl<T> ExactSizeIterator for Batch<'_, T> {}

impl<T> Drop for Batch<'_, T> {
    #[inline]
    fn drop(&mut self) {
        if self.next != self.published.load(Relaxed) {
            // Release pairs with the Acquire in `Producer::free`: the slots are read.
            self.published.store(self.next, Release);
        }
    }
}

impl<T> fmt::Debug for Batch<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Batch").field("left", &self.left).finish_non_exhaustive()
    }
}

/// Why an item did not go in. It comes back.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum PushError<T> {
    /// There is no room now.
    Full(T),
    /// The consumer is gone: there will never be any.
    Abandoned(T),
}

impl<T> PushError<T> {
    /// The item that did not go in.
    pub fn into_item(self) -> T {
        match self {
            PushError::Full(item) | PushError::Abandoned(item) => item,
        }
    }
}

impl<T> fmt::Debug for PushError<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PushError::Full(_) => "Full(..)",
            PushError::Abandoned(_) => "Abandoned(..)",
        })
    }
}

impl<T> fmt::Display for PushError<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PushError::Full(_) => "the ring is full",
            PushError::Abandoned(_) => "the ring's consumer is gone",
        })
    }
}

impl<T> Error for PushError<T> {}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn items_come_out_in_the_order_they_went_in_for_every_small_capacity() {
        for capacity in 1..=9 {
            let (mut producer, mut consumer) = ring(capacity);
            let (mut pushed, mut popped) = (0_u32, 0_u32);
            for round in 0..200 {
                for _ in 0..round % (capacity + 2) {
                    match producer.push(pushed) {
                        Ok(()) => pushed += 1,
                        Err(error) => assert_eq!(error, PushError::Full(pushed)),
                    }
                }
                for _ in 0..round % (capacity + 1) {
                    match consumer.pop() {
                        Some(item) => {
                            assert_eq!(item, popped);
                            popped += 1;
                        }
                        None => assert_eq!(popped, pushed),
                    }
                }
            }
            assert!(pushed > 20 * capacity as u32);
        }
    }

    #[test]
    fn exactly_as_many_items_fit_as_the_capacity_says() {
        for capacity in 1..=17 {
            let (mut producer, mut consumer) = ring(capacity);
            assert_eq!(producer.free(), capacity);
            assert_eq!(producer.push_batch(&mut (0..)), capacity);
            assert_eq!(producer.free(), 0);
            assert_eq!(producer.push(99), Err(PushError::Full(99)));
            assert_eq!(consumer.len(), capacity);
            assert_eq!(consumer.pop(), Some(0));
            assert_eq!(producer.push(99), Ok(()));
        }
    }

    #[test]
    fn counters_may_wrap() {
        let (mut producer, mut consumer) = ring::<u8>(3);
        let start = usize::MAX - 1;
        (producer.tail, producer.head_seen) = (start, start);
        (consumer.head, consumer.tail_seen) = (start, start);
        producer.shared.tail.store(start, Relaxed);
        producer.shared.head.store(start, Relaxed);
        for lap in 0..8 {
            assert_eq!(producer.push_batch(&mut [lap, lap + 1, lap + 2, lap + 3].into_iter()), 3);
            assert_eq!(consumer.pop_batch(9).collect::<Vec<_>>(), [lap, lap + 1, lap + 2]);
        }
    }

    #[test]
    fn a_full_ring_gives_the_item_back_and_an_abandoned_one_says_so() {
        let (mut producer, consumer) = ring(1);
        assert_eq!(producer.push(Box::new(1)), Ok(()));
        assert_eq!(producer.push(Box::new(2)), Err(PushError::Full(Box::new(2))));
        drop(consumer);
        assert!(producer.is_abandoned());
        assert_eq!(producer.push(Box::new(3)), Err(PushError::Abandoned(Box::new(3))));
        assert_eq!(producer.push_batch(&mut [Box::new(4)].into_iter()), 0);
    }

    #[test]
    fn what_was_pushed_before_the_producer_went_can_still_be_popped() {
        let (mut producer, mut consumer) = ring(4);
        producer.push(1).unwrap();
        producer.push(2).unwrap();
        drop(producer);
        assert!(consumer.is_abandoned());
        assert_eq!((consumer.pop(), consumer.pop(), consumer.pop()), (Some(1), Some(2), None));
    }

    #[test]
    fn every_item_is_dropped_exactly_once() {
        let witness = std::sync::Arc::new(());
        let (mut producer, mut consumer) = ring(5);
        for _ in 0..5 {
            producer.push(witness.clone()).unwrap();
        }
        drop(consumer.pop());
        assert_eq!(std::sync::Arc::strong_count(&witness), 5);
        drop(consumer);
        assert_eq!(std::sync::Arc::strong_count(&witness), 1, "the consumer drops what is left");
        drop(producer);

        let (mut producer, consumer) = ring(5);
        producer.push_batch(&mut std::iter::repeat_n(witness.clone(), 3));
        drop(producer);
        assert_eq!(std::sync::Arc::strong_count(&witness), 4, "the consumer may still want them");
        drop(consumer);
        assert_eq!(std::sync::Arc::strong_count(&witness), 1);
    }

    #[test]
    fn a_batch_frees_its_room_when_it_is_dropped_and_keeps_what_it_did_not_yield() {
        let (mut producer, mut consumer) = ring(4);
        producer.push_batch(&mut (0..4));
        let mut batch = consumer.pop_batch(3);
        assert_eq!(batch.len(), 3);
        assert_eq!(batch.next(), Some(0));
        assert_eq!(producer.free(), 0, "not before the batch ends");
        drop(batch);
        assert_eq!(producer.free(), 1);
        assert_eq!(consumer.pop_batch(usize::MAX).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(producer.free(), 4);
    }

    #[test]
    fn a_forgotten_batch_loses_and_repeats_nothing() {
        let (mut producer, mut consumer) = ring(2);
        producer.push_batch(&mut [String::from("a"), String::from("b")].into_iter());
        let mut batch = consumer.pop_batch(2);
        assert_eq!(batch.next().as_deref(), Some("a"));
        std::mem::forget(batch);
        assert_eq!(producer.free(), 0);
        drop(consumer.pop_batch(0));
        assert_eq!(producer.free(), 1, "also a batch of nothing shows what was popped");
        assert_eq!(consumer.pop().as_deref(), Some("b"));
        assert_eq!(producer.free(), 2);
    }

    #[test]
    fn an_iterator_that_panics_in_a_batch_leaves_the_ring_sound() {
        let (mut producer, mut consumer) = ring(4);
        let mut yielded = 0;
        let mut failing = std::iter::from_fn(|| {
            yielded += 1;
            assert!(yielded < 3, "as planned");
            Some(Box::new(yielded))
        });
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            producer.push_batch(&mut failing)
        }));
        assert!(caught.is_err());
        assert_eq!((consumer.len(), producer.push_batch(&mut std::iter::empty())), (0, 0));
        assert_eq!(consumer.len(), 2, "also a batch of nothing shows what was pushed");
        producer.push(Box::new(7)).unwrap();
        let items: Vec<i32> = consumer.pop_batch(9).map(|item| *item).collect();
        assert_eq!(items, [1, 2, 7], "what was taken from the iterator is in the ring");
    }

    #[test]
    fn items_without_size_and_large_ones_pass_too() {
        let (mut producer, mut consumer) = ring::<()>(3);
        assert_eq!(producer.push_batch(&mut std::iter::repeat(())), 3);
        assert_eq!(consumer.pop_batch(9).count(), 3);
        let (mut producer, mut consumer) = ring::<[u64; 100]>(2);
        producer.push([7; 100]).unwrap();
        assert_eq!(consumer.pop(), Some([7; 100]));
    }

    #[test]
    #[should_panic(expected = "cannot hold 0 items")]
    fn a_ring_without_room_is_refused() {
        let _ends = ring::<u8>(0);
    }
}
