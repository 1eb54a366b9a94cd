//! A table of fixed capacity whose places are used again, with ids that a late user cannot confuse.

pub use crate::front::ConnId;

/// 24 bits: with slot (32) and kind of operation (8) a generation fits the 64 bits that io_uring
/// hands back with a completion.
const GENERATION_MASK: u32 = (1 << 24) - 1;

enum Place<T> {
    Free { generation: u32, next: Option<u32> },
    Used { generation: u32, value: T },
}

/// The table. Free places are used again last-in first-out, so that a server with few connections
/// keeps touching the same few places (and the receive buffers that belong to them).
pub(super) struct Slots<T> {
    places: Vec<Place<T>>,
    capacity: u32,
    free: Option<u32>,
    used: u32,
}

impl<T> Slots<T> {
    pub(super) fn new(capacity: u32) -> Slots<T> {
        Slots { places: Vec::with_capacity(capacity as usize), capacity, free: None, used: 0 }
    }

    pub(super) fn used(&self) -> u32 {
        self.used
    }

    pub(super) fn capacity(&self) -> u32 {
        self.capacity
    }

    pub(super) fn is_full(&self) -> bool {
        self.used == self.capacity
    }

    /// Gives the value back when the table is full.
    pub(super) fn insert(&mut self, value: T) -> Result<ConnId, T> {
        if self.is_full() {
            return Err(value);
        }
        self.used += 1;
        let Some(slot) = self.free else {
            self.places.push(Place::Used { generation: 0, value });
            return Ok(ConnId { slot: self.places.len() as u32 - 1, generation: 0 });
        };
        let place = &mut self.places[slot as usize];
        let Place::Free { generation, next } = *place else {
            unreachable!("the free list holds free places only")
        };
        self.free = next;
        *place = Place::Used { generation, value };
        Ok(ConnId { slot, generation })
    }

    pub(super) fn get(&self, id: ConnId) -> Option<&T> {
        match self.places.get(id.slot as usize) {
            Some(Place::Used { generation, value }) if *generation == id.generation => Some(value),
            _ => None,
        }
    }

    pub(super) fn get_mut(&mut self, id: ConnId) -> Option<&mut T> {
        match self.places.get_mut(id.slot as usize) {
            Some(Place::Used { generation, value }) if *generation == id.generation => Some(value),
            _ => None,
        }
    }

    pub(super) fn remove(&mut self, id: ConnId) -> Option<T> {
        self.get(id)?;
        let next_generation = id.generation.wrapping_add(1) & GENERATION_MASK;
        let freed = Place::Free { generation: next_generation, next: self.free };
        self.free = Some(id.slot);
        self.used -= 1;
        match std::mem::replace(&mut self.places[id.slot as usize], freed) {
            Place::Used { value, .. } => Some(value),
            Place::Free { .. } => unreachable!("get() found it used"),
        }
    }

    /// The id of whoever uses the place now.
    pub(super) fn id_at(&self, slot: u32) -> Option<ConnId> {
        match self.places.get(slot as usize) {
            Some(Place::Used { generation, .. }) => Some(ConnId { slot, generation: *generation }),
            _ => None,
        }
    }

    /// Places that were ever used: every id has its slot below this.
    pub(super) fn places(&self) -> u32 {
        self.places.len() as u32
    }

    /// Bytes of the table itself.
    pub(super) fn bytes(&self) -> usize {
        self.capacity as usize * size_of::<Place<T>>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_dead_once_its_place_was_given_away() {
        let mut slots = Slots::new(2);
        let a = slots.insert('a').unwrap();
        let b = slots.insert('b').unwrap();
        assert_eq!(slots.insert('c'), Err('c'));
        assert_eq!(slots.remove(a), Some('a'));
        let c = slots.insert('c').unwrap();
        assert_eq!((c.slot, slots.get(a), slots.get(b)), (a.slot, None, Some(&'b')));
        assert_eq!(slots.remove(a), None);
        assert_eq!((slots.get(c), slots.used(), slots.places()), (Some(&'c'), 2, 2));
    }

    #[test]
    fn generations_wrap_within_24_bits() {
        let mut slots = Slots::new(1);
        slots.insert(0).unwrap();
        slots.remove(ConnId { slot: 0, generation: 0 }).unwrap();
        if let Place::Free { generation, .. } = &mut slots.places[0] {
            *generation = GENERATION_MASK;
        }
        let last = slots.insert(1).unwrap();
        assert_eq!(last.generation, GENERATION_MASK);
        slots.remove(last).unwrap();
        assert_eq!(slots.insert(2).unwrap().generation, 0);
    }
}
