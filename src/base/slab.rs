//! A table of fixed size whose keys outlive their entries safely: a key names a slot *and* which
//! of its occupants is meant, so a late message for one that is gone finds nothing instead of its
//! successor.

/// Names one entry of one [`Slab`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlabKey {
    /// Index into the table.
    pub slot: u32,
    /// Which occupant of the slot. Wraps after 2^32 of them.
    pub generation: u32,
}

/// A table with room for a fixed number of entries. All memory is taken at construction; insert,
/// remove and look-up take constant time.
#[derive(Debug)]
pub struct Slab<T> {
    slots: Vec<Slot<T>>,
    /// Slots in use. Range: 0 ..= `slots.len()`.
    len: usize,
    /// Free slots, chained from the one free for longest to the one freed last: so that a slot
    /// rests as long as possible, and generations are used up evenly. `NONE` when there is none.
    free_first: u32,
    free_last: u32,
}

#[derive(Debug)]
struct Slot<T> {
    generation: u32,
    state: State<T>,
}

#[derive(Debug)]
enum State<T> {
    Used(T),
    /// The next slot of the free chain, or `NONE`.
    Free(u32),
}

/// No slot: a table has fewer than 2^32 - 1.
const NONE: u32 = u32::MAX;

impl<T> Slab<T> {
    /// A table with room for `capacity` entries.
    ///
    /// # Panics
    /// When `capacity` does not fit below 2^32 - 1.
    pub fn new(capacity: usize) -> Slab<T> {
        let count = u32::try_from(capacity).ok().filter(|&count| count < NONE);
        let count = count.expect("a slab numbers its slots with 32 bits");
        let next = |slot| if slot + 1 < count { slot + 1 } else { NONE };
        let slots = (0..count).map(|slot| Slot { generation: 0, state: State::Free(next(slot)) });
        Slab {
            slots: slots.collect(),
            len: 0,
            free_first: if count > 0 { 0 } else { NONE },
            free_last: count.wrapping_sub(1),
        }
    }

    /// Adds an entry, or hands it back when the table is full.
    pub fn insert(&mut self, value: T) -> Result<SlabKey, T> {
        match self.vacant_key() {
            Some(key) => {
                self.occupy(key, value);
                Ok(key)
            }
            None => Err(value),
        }
    }

    /// Adds an entry that holds its own key. Returns `None`, without calling `make`, when the
    /// table is full.
    pub fn insert_with(&mut self, make: impl FnOnce(SlabKey) -> T) -> Option<SlabKey> {
        let key = self.vacant_key()?;
        self.occupy(key, make(key));
        Some(key)
    }

    /// The key that the next insert will return; `None` when the table is full.
    pub fn vacant_key(&self) -> Option<SlabKey> {
        let slot = self.slots.get(self.free_first as usize)?;
        Some(SlabKey { slot: self.free_first, generation: slot.generation })
    }

    fn occupy(&mut self, key: SlabKey, value: T) {
        let slot = &mut self.slots[key.slot as usize];
        let State::Free(next) = std::mem::replace(&mut slot.state, State::Used(value)) else {
            unreachable!("slot {} is on the free chain and in use", key.slot)
        };
        self.free_first = next;
        if next == NONE {
            self.free_last = NONE;
        }
        self.len += 1;
    }

    /// Takes an entry out; `None` when the key's entry is gone already.
    pub fn remove(&mut self, key: SlabKey) -> Option<T> {
        self.get(key)?;
        let slot = &mut self.slots[key.slot as usize];
        let State::Used(value) = std::mem::replace(&mut slot.state, State::Free(NONE)) else {
            unreachable!("slot {} was in use a moment ago", key.slot)
        };
        slot.generation = slot.generation.wrapping_add(1);
        match self.slots.get_mut(self.free_last as usize) {
            Some(last) => last.state = State::Free(key.slot),
            None => self.free_first = key.slot,
        }
        self.free_last = key.slot;
        self.len -= 1;
        Some(value)
    }

    /// The key's entry, unless it is gone.
    pub fn get(&self, key: SlabKey) -> Option<&T> {
        match self.slots.get(key.slot as usize) {
            Some(Slot { generation, state: State::Used(value) })
                if *generation == key.generation =>
            {
                Some(value)
            }
            _ => None,
        }
    }

    /// The key's entry, unless it is gone.
    pub fn get_mut(&mut self, key: SlabKey) -> Option<&mut T> {
        match self.slots.get_mut(key.slot as usize) {
            Some(Slot { generation, state: State::Used(value) })
                if *generation == key.generation =>
            {
                Some(value)
            }
            _ => None,
        }
    }

    /// Whether the key's entry is still there.
    pub fn contains(&self, key: SlabKey) -> bool {
        self.get(key).is_some()
    }

    /// All entries with their keys, by slot.
    pub fn iter(&self) -> impl Iterator<Item = (SlabKey, &T)> {
        self.slots.iter().enumerate().filter_map(|(index, slot)| match &slot.state {
            State::Used(value) => {
                Some((SlabKey { slot: index as u32, generation: slot.generation }, value))
            }
            State::Free(_) => None,
        })
    }

    /// All entries with their keys, by slot.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (SlabKey, &mut T)> {
        self.slots.iter_mut().enumerate().filter_map(|(index, slot)| match &mut slot.state {
            State::Used(value) => {
                Some((SlabKey { slot: index as u32, generation: slot.generation }, value))
            }
            State::Free(_) => None,
        })
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether there is no room for another.
    pub fn is_full(&self) -> bool {
        self.len == self.slots.len()
    }

    /// How many entries there can be.
    pub fn capacity(&self) -> usize {
        self.slots.len()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Copy, Debug)]
    enum Act {
        Insert,
        /// Of the keys ever handed out, the one with this index (modulo their number).
        Remove(usize),
        Look(usize),
    }

    fn act() -> impl Strategy<Value = Act> {
        prop_oneof![
            Just(Act::Insert),
            any::<usize>().prop_map(Act::Remove),
            any::<usize>().prop_map(Act::Look),
        ]
    }

    proptest! {
        #[test]
        fn a_slab_is_a_map_of_the_keys_that_were_not_removed(
            capacity in 0..6_usize,
            acts in proptest::collection::vec(act(), 0..200),
        ) {
            let mut slab = Slab::new(capacity);
            let mut model = BTreeMap::new();
            let mut keys: Vec<SlabKey> = Vec::new();
            for (number, act) in acts.into_iter().enumerate() {
                match act {
                    Act::Insert => match slab.insert(number) {
                        Ok(key) => {
                            prop_assert!(!keys.contains(&key), "a key is never used twice");
                            keys.push(key);
                            model.insert(key, number);
                        }
                        Err(back) => {
                            prop_assert_eq!((back, model.len()), (number, capacity));
                        }
                    },
                    Act::Remove(index) if !keys.is_empty() => {
                        let key = keys[index % keys.len()];
                        prop_assert_eq!(slab.remove(key), model.remove(&key));
                    }
                    Act::Look(index) if !keys.is_empty() => {
                        let key = keys[index % keys.len()];
                        prop_assert_eq!(slab.get(key), model.get(&key));
                    }
                    Act::Remove(_) | Act::Look(_) => {}
                }
                prop_assert!(slab.iter().map(|(key, value)| (key, *value)).eq(model.clone()));
                prop_assert_eq!(slab.len(), model.len());
                prop_assert_eq!(slab.is_full(), model.len() == capacity);
                prop_assert_eq!(slab.vacant_key().is_none(), slab.is_full());
            }
        }
    }

    #[test]
    fn an_old_key_does_not_reach_the_slots_next_occupant() {
        let mut slab = Slab::new(1);
        let old = slab.insert("old").unwrap();
        assert_eq!(slab.remove(old), Some("old"));
        let new = slab.insert("new").unwrap();
        assert_eq!(old.slot, new.slot);
        assert_eq!(slab.get(old), None);
        assert_eq!(slab.get_mut(old), None);
        assert_eq!(slab.remove(old), None);
        assert_eq!(slab.get(new), Some(&"new"));
    }

    #[test]
    fn a_full_table_hands_the_entry_back() {
        let mut slab = Slab::new(2);
        slab.insert(1).unwrap();
        slab.insert(2).unwrap();
        assert!(slab.is_full());
        assert_eq!(slab.insert(3), Err(3));
        assert_eq!(slab.insert_with(|_| unreachable!("there is no room")), None);
        assert_eq!(Slab::new(0).insert(1), Err(1));
    }

    #[test]
    fn the_slot_that_rested_longest_is_used_next() {
        let mut slab = Slab::new(3);
        let keys: Vec<SlabKey> = (0..3).map(|n| slab.insert(n).unwrap()).collect();
        for slot in [1, 0, 2] {
            slab.remove(keys[slot]);
        }
        let slots: Vec<u32> = (0..3).map(|n| slab.insert(n).unwrap().slot).collect();
        assert_eq!(slots, [1, 0, 2]);
    }

    #[test]
    fn an_entry_may_hold_its_own_key() {
        let mut slab = Slab::new(2);
        slab.insert_with(|key| key).unwrap();
        let key = slab.insert_with(|key| key).unwrap();
        assert_eq!(slab.get(key), Some(&key));
        assert!(slab.iter().all(|(key, held)| key == *held));
        slab.iter_mut().for_each(|(_, held)| held.generation = 7);
        assert_eq!(slab.iter().filter(|(_, held)| held.generation == 7).count(), slab.len());
    }

    #[test]
    fn generations_wrap() {
        let mut slab = Slab::new(1);
        slab.slots[0].generation = u32::MAX;
        let last = slab.insert(1).unwrap();
        slab.remove(last);
        assert_eq!(slab.insert(2).unwrap().generation, 0);
        assert!(!slab.contains(last));
    }
}
