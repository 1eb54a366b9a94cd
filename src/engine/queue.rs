//! The queue: accepted sequences in the order in which they will be admitted. Class first, then
//! arrival of the *ask*: how long a front core took to tokenise changes nobody's place.
//!
//! One doubly linked list per class, threaded through the sequence table: a cancel in the middle
//! costs as much as one at the head. What it may hold is bounded by the ledger
//! ([`super::admission`]), not here.

use crate::request::Class;

use super::sequence::{NONE, SequenceTable};

#[derive(Clone, Copy, Debug)]
struct List {
    head: u32,
    tail: u32,
    len: u32,
}

#[derive(Debug)]
pub(super) struct Queue {
    lists: [List; Class::ALL.len()],
}

impl Queue {
    pub fn new() -> Queue {
        Queue { lists: [List { head: NONE, tail: NONE, len: 0 }; Class::ALL.len()] }
    }

    pub fn len(&self) -> usize {
        self.lists.iter().map(|list| list.len as usize).sum()
    }

    /// How many sequences of each class wait, most urgent first.
    pub fn lens(&self) -> [u32; Class::ALL.len()] {
        self.lists.map(|list| list.len)
    }

    /// Who is next.
    pub fn head(&self) -> Option<u32> {
        self.lists.iter().map(|list| list.head).find(|&head| head != NONE)
    }

    /// Puts a sequence in its place and returns how many are ahead of it. Walks from the tail:
    /// those behind are asks that came later and were tokenised sooner.
    pub fn push(&mut self, sequences: &mut SequenceTable, index: u32) -> u32 {
        let (class, arrival) = (sequences[index].class as usize, sequences[index].arrival);
        let mut behind = 0;
        let mut next = NONE;
        let mut previous = self.lists[class].tail;
        while previous != NONE && sequences[previous].arrival > arrival {
            next = previous;
            previous = sequences[previous].previous;
            behind += 1;
        }
        (sequences[index].previous, sequences[index].next) = (previous, next);
        self.link(sequences, class, previous, next, index, index);
        self.lists[class].len += 1;
        let more_urgent: u32 = self.lists[..class].iter().map(|list| list.len).sum();
        more_urgent + self.lists[class].len - 1 - behind
    }

    /// Takes a sequence out, wherever it stands.
    pub fn remove(&mut self, sequences: &mut SequenceTable, index: u32) {
        let class = sequences[index].class as usize;
        let (previous, next) = (sequences[index].previous, sequences[index].next);
        self.link(sequences, class, previous, next, next, previous);
        (sequences[index].previous, sequences[index].next) = (NONE, NONE);
        self.lists[class].len -= 1;
    }

    /// Makes `after` follow `previous`, and `before` precede `next`.
    fn link(
        &mut self,
        sequences: &mut SequenceTable,
        class: usize,
        previous: u32,
        next: u32,
        after: u32,
        before: u32,
    ) {
        match previous {
            NONE => self.lists[class].head = after,
            previous => sequences[previous].next = after,
        }
        match next {
            NONE => self.lists[class].tail = before,
            next => sequences[next].previous = before,
        }
    }

    /// The sequences of a class in order.
    pub fn iter<'a>(
        &self,
        sequences: &'a SequenceTable,
        class: Class,
    ) -> impl Iterator<Item = u32> + use<'a> {
        let mut at = self.lists[class as usize].head;
        std::iter::from_fn(move || {
            let index = at;
            (index != NONE).then(|| {
                at = sequences[index].next;
                index
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn order(queue: &Queue, sequences: &SequenceTable) -> Vec<u32> {
        Class::ALL.iter().flat_map(|&class| queue.iter(sequences, class)).collect()
    }

    #[test]
    fn class_counts_before_arrival_and_arrival_before_submission() {
        let mut sequences = SequenceTable::new(4, 0);
        let mut queue = Queue::new();
        for (index, class) in
            [Class::Bulk, Class::Default, Class::Default, Class::System].into_iter().enumerate()
        {
            sequences[index as u32].class = class;
            sequences[index as u32].arrival = index as u64;
        }
        assert_eq!(queue.push(&mut sequences, 0), 0);
        assert_eq!(queue.push(&mut sequences, 2), 0);
        assert_eq!(queue.push(&mut sequences, 1), 0, "it asked before, and submits after");
        assert_eq!(queue.push(&mut sequences, 3), 0);
        assert_eq!(order(&queue, &sequences), [3, 1, 2, 0]);
        queue.remove(&mut sequences, 3);
        queue.remove(&mut sequences, 2);
        assert_eq!(order(&queue, &sequences), [1, 0]);
        assert_eq!(queue.head(), Some(1));
        assert_eq!(queue.lens(), [0, 0, 1, 1]);
    }

    proptest! {
        #[test]
        fn the_queue_agrees_with_a_sorted_list(
            moves in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let mut sequences = SequenceTable::new(64, 0);
            let mut queue = Queue::new();
            let mut model: Vec<(Class, u64, u32)> = Vec::new();
            for number in moves {
                if number % 3 == 0 && !model.is_empty() {
                    let (_, _, index) = model.remove(usize::from(number) % model.len());
                    queue.remove(&mut sequences, index);
                    sequences.give(index);
                } else if let Some(index) = sequences.take() {
                    let class = Class::ALL[usize::from(number) % 4];
                    let arrival = u64::from(number.reverse_bits()) * 64 + u64::from(index);
                    sequences[index].class = class;
                    sequences[index].arrival = arrival;
                    let position = queue.push(&mut sequences, index);
                    model.push((class, arrival, index));
                    model.sort_unstable();
                    let place = model.iter().position(|entry| entry.2 == index).unwrap();
                    prop_assert_eq!(position as usize, place);
                }
                let expected: Vec<u32> = model.iter().map(|entry| entry.2).collect();
                prop_assert_eq!(order(&queue, &sequences), expected);
                prop_assert_eq!(queue.len(), model.len());
                prop_assert_eq!(queue.head(), model.first().map(|entry| entry.2));
            }
        }
    }
}
