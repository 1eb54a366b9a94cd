//! Containers that never grow: what does not fit comes back to the caller, who has to have an
//! answer. They take their memory when they are made and none afterwards.

use std::collections::VecDeque;
use std::collections::vec_deque;
use std::ops::{Deref, DerefMut};

/// A list with room for a fixed number of items. Reads like a slice.
#[derive(Debug, PartialEq, Eq)]
pub struct FixedVec<T> {
    /// Length 0 ..= `capacity`; its own capacity is at least that, and never changes.
    items: Vec<T>,
    capacity: usize,
}

impl<T> FixedVec<T> {
    /// An empty list with room for `capacity` items.
    pub fn new(capacity: usize) -> FixedVec<T> {
        FixedVec { items: Vec::with_capacity(capacity), capacity }
    }

    /// Appends an item, or hands it back when there is no room.
    pub fn push(&mut self, item: T) -> Result<(), T> {
        if self.is_full() {
            return Err(item);
        }
        self.items.push(item);
        Ok(())
    }

    /// Takes the last item off.
    pub fn pop(&mut self) -> Option<T> {
        self.items.pop()
    }

    /// Takes an item out and closes the gap: keeps the order, takes time in the length.
    ///
    /// # Panics
    /// When there is no such item.
    pub fn remove(&mut self, index: usize) -> T {
        self.items.remove(index)
    }

    /// Takes an item out and puts the last one in its place: constant time, another order.
    ///
    /// # Panics
    /// When there is no such item.
    pub fn swap_remove(&mut self, index: usize) -> T {
        self.items.swap_remove(index)
    }

    /// Keeps the items that `keep` says to, in their order.
    pub fn retain(&mut self, keep: impl FnMut(&T) -> bool) {
        self.items.retain(keep);
    }

    /// Drops all items from this index on.
    pub fn truncate(&mut self, len: usize) {
        self.items.truncate(len);
    }

    /// Drops all items.
    pub fn clear(&mut self) {
        self.items.clear();
    }

    /// Whether there is no room for another.
    pub fn is_full(&self) -> bool {
        self.items.len() == self.capacity
    }

    /// How many items there can be.
    pub fn capacity(&self) -> usize {
        self.capacity
    }
}

impl<T> Deref for FixedVec<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.items
    }
}

impl<T> DerefMut for FixedVec<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.items
    }
}

impl<'a, T> IntoIterator for &'a FixedVec<T> {
    type Item = &'a T;
    type IntoIter = std::slice::Iter<'a, T>;

    fn into_iter(self) -> Self::IntoIter {
        self.items.iter()
    }
}

/// A queue with room for a fixed number of items, open at both ends.
#[derive(Debug, PartialEq, Eq)]
pub struct FixedDeque<T> {
    /// Length 0 ..= `capacity`; its own capacity is at least that, and never changes.
    items: VecDeque<T>,
    capacity: usize,
}

impl<T> FixedDeque<T> {
    /// An empty queue with room for `capacity` items.
    pub fn new(capacity: usize) -> FixedDeque<T> {
        FixedDeque { items: VecDeque::with_capacity(capacity), capacity }
    }

    /// Adds an item at the back, or hands it back when there is no room.
    pub fn push_back(&mut self, item: T) -> Result<(), T> {
        if self.is_full() {
            return Err(item);
        }
        self.items.push_back(item);
        Ok(())
    }

    /// Adds an item at the front, or hands it back when there is no room.
    pub fn push_front(&mut self, item: T) -> Result<(), T> {
        if self.is_full() {
            return Err(item);
        }
        self.items.push_front(item);
        Ok(())
    }

    /// Takes the first item off.
    pub fn pop_front(&mut self) -> Option<T> {
        self.items.pop_front()
    }

    /// Takes the last item off.
    pub fn pop_back(&mut self) -> Option<T> {
        self.items.pop_back()
    }

    /// The first item.
    pub fn front(&self) -> Option<&T> {
        self.items.front()
    }

    /// The first item.
    pub fn front_mut(&mut self) -> Option<&mut T> {
        self.items.front_mut()
    }

    /// The last item.
    pub fn back(&self) -> Option<&T> {
        self.items.back()
    }

    /// The item with this index, counted from the front.
    pub fn get(&self, index: usize) -> Option<&T> {
        self.items.get(index)
    }

    /// The item with this index, counted from the front.
    pub fn get_mut(&mut self, index: usize) -> Option<&mut T> {
        self.items.get_mut(index)
    }

    /// Takes an item out and closes the gap: keeps the order, takes time in the distance to the
    /// nearer end.
    pub fn remove(&mut self, index: usize) -> Option<T> {
        self.items.remove(index)
    }

    /// Keeps the items that `keep` says to, in their order.
    pub fn retain(&mut self, keep: impl FnMut(&T) -> bool) {
        self.items.retain(keep);
    }

    /// Drops all items.
    pub fn clear(&mut self) {
        self.items.clear();
    }

    /// All items from front to back.
    pub fn iter(&self) -> vec_deque::Iter<'_, T> {
        self.items.iter()
    }

    /// All items from front to back.
    pub fn iter_mut(&mut self) -> vec_deque::IterMut<'_, T> {
        self.items.iter_mut()
    }

    /// How many items there are.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Whether there is no room for another.
    pub fn is_full(&self) -> bool {
        self.items.len() == self.capacity
    }

    /// How many items there can be.
    pub fn capacity(&self) -> usize {
        self.capacity
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_list_hands_the_item_back_and_keeps_its_memory() {
        let mut list = FixedVec::new(2);
        assert_eq!((list.push(1), list.push(2), list.push(3)), (Ok(()), Ok(()), Err(3)));
        assert_eq!(*list, [1, 2]);
        let memory = list.items.capacity();
        list.clear();
        assert_eq!(list.push(4), Ok(()));
        assert_eq!(list.items.capacity(), memory);
    }

    #[test]
    fn a_full_queue_hands_the_item_back_at_either_end() {
        let mut queue = FixedDeque::new(2);
        assert_eq!((queue.push_back(1), queue.push_front(0)), (Ok(()), Ok(())));
        assert_eq!((queue.push_back(2), queue.push_front(3)), (Err(2), Err(3)));
        assert_eq!(
            (queue.pop_front(), queue.pop_back(), queue.pop_back()),
            (Some(0), Some(1), None)
        );
    }

    #[test]
    fn room_for_nothing_is_room_for_nothing() {
        assert_eq!(FixedVec::new(0).push(1), Err(1));
        assert_eq!(FixedDeque::new(0).push_back(1), Err(1));
    }
}
