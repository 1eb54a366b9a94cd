//! The queue: accepted sequences, and which of them is admitted next.
//!
//! | `scheduler.policy` | next is |
//! |---|---|
//! | `priority` | of the class whose turn it is, whoever asked first |
//! | `fcfs` | whoever asked first, whatever the class |
//! | `fair` | of that class, of the tenant whose turn it is (`fair.rs`), whoever asked first |
//!
//! What counts is the arrival of the *ask*: how long a front core took to tokenise changes nobody's
//! place.
//!
//! **Whose turn it is among classes: ageing.** The most urgent class, but a less urgent one has
//! waited for its turn when its oldest has waited `scheduler.ageing_ms` longer, for each class in
//! between. In other words: a request ranks as if it had come that much later for each class that
//! it is below the top, and the class with the first in rank is next. That rank never changes. So
//! no request is passed by one that comes more than `ageing_ms` times the number of classes between
//! them after it: those that can pass it are finitely many, and nobody starves, whatever comes in.
//! (Under `fair` the class has its turn and the tenants in it share it; there nobody starves since
//! no tenant does.) With an ageing of 0 the more urgent class always comes first, and can starve
//! others.
//!
//! Doubly linked lists, one for each class and (under `fair`) tenant, threaded through the sequence
//! table: a cancel in the middle costs as much as one at the head. Who is next is found by a look
//! at each tenant that waits. What the queue may hold is bounded by the ledger
//! ([`super::admission`]), not here.

use crate::limits::{Limits, Policy};
use crate::request::Class;

use super::fair::Shares;
use super::sequence::{NONE, Sequence, SequenceTable};

const CLASSES: usize = Class::ALL.len();

/// Bytes of an account's lists, and of its place among those that wait.
pub(super) const FLOW_BYTES: usize = size_of::<[List; CLASSES]>() + CLASSES * size_of::<u32>();

#[derive(Clone, Copy, Debug)]
struct List {
    head: u32,
    tail: u32,
    len: u32,
    /// If it is not empty: its place in `Queue::backlogged`.
    place: u32,
}

impl List {
    const EMPTY: List = List { head: NONE, tail: NONE, len: 0, place: NONE };
}

#[derive(Debug)]
pub(super) struct Queue {
    policy: Policy,
    ageing_ns: u64,
    /// By flow and class. A flow is an account under `fair`; otherwise there is only one.
    lists: Vec<[List; CLASSES]>,
    /// The flows with somebody in the list of a class, in no order.
    backlogged: [Vec<u32>; CLASSES],
    lens: [u32; CLASSES],
}

impl Queue {
    /// An empty queue, for so many accounts.
    pub fn new(limits: &Limits, accounts_max: usize) -> Queue {
        let flows = if limits.policy == Policy::Fair { accounts_max } else { 1 };
        Queue {
            policy: limits.policy,
            ageing_ns: limits.ageing_ms.saturating_mul(1_000_000),
            lists: vec![[List::EMPTY; CLASSES]; flows],
            backlogged: std::array::from_fn(|_| Vec::with_capacity(flows)),
            lens: [0; CLASSES],
        }
    }

    pub fn len(&self) -> usize {
        self.lens.iter().sum::<u32>() as usize
    }

    /// How many sequences of each class wait, most urgent first.
    pub fn lens(&self) -> [u32; CLASSES] {
        self.lens
    }

    /// Whether tenants take turns.
    pub fn is_fair(&self) -> bool {
        self.policy == Policy::Fair
    }

    /// Whether the class of a request says anything about its place.
    pub fn knows_classes(&self) -> bool {
        self.policy != Policy::Fcfs
    }

    /// Who is next.
    pub fn head(&self, sequences: &SequenceTable, shares: &Shares) -> Option<u32> {
        let of_class = |class: usize| {
            let heads = self.backlogged[class].iter().map(|&flow| {
                let head = self.lists[flow as usize][class].head;
                (shares.served(flow), sequences[head].arrival, head)
            });
            let (_, _, oldest) = heads.clone().min_by_key(|&(_, arrival, _)| arrival)?;
            let (_, _, first) = heads.min()?;
            Some((self.rank(&sequences[oldest]), first))
        };
        (0..CLASSES).filter_map(of_class).min().map(|(_, index)| index)
    }

    /// The order of precedence among heads of classes: the least is next.
    fn rank(&self, sequence: &Sequence) -> (u64, u64) {
        let class = sequence.class as u64;
        let first = match (self.policy, self.ageing_ns) {
            (Policy::Fcfs, _) => 0,
            (_, 0) => class,
            (_, ageing_ns) => {
                let later_ns = class.saturating_mul(ageing_ns);
                sequence.times.arrived.as_ns().saturating_add(later_ns)
            }
        };
        (first, sequence.arrival)
    }

    fn flow_of(&self, sequence: &Sequence) -> usize {
        if self.is_fair() { sequence.bill.tenant as usize } else { 0 }
    }

    /// Puts a sequence in its place and returns how many are ahead of it. Walks from the tail:
    /// those behind are asks that came later and were tokenised sooner.
    pub fn push(&mut self, sequences: &mut SequenceTable, shares: &mut Shares, index: u32) -> u32 {
        let (class, arrival) = (sequences[index].class, sequences[index].arrival);
        let flow = self.flow_of(&sequences[index]);
        if self.lists[flow][class as usize].len == 0 {
            self.join(shares, flow, class);
        }
        let mut behind = 0;
        let mut next = NONE;
        let mut previous = self.lists[flow][class as usize].tail;
        while previous != NONE && sequences[previous].arrival > arrival {
            next = previous;
            previous = sequences[previous].previous;
            behind += 1;
        }
        (sequences[index].previous, sequences[index].next) = (previous, next);
        let list = &mut self.lists[flow][class as usize];
        link(list, sequences, previous, next, index, index);
        list.len += 1;
        self.lens[class as usize] += 1;
        let own = list.len - 1 - behind;
        match self.is_fair() {
            true => self.turns_before(class, flow as u32, own),
            false => own + self.before(sequences, index),
        }
    }

    /// A flow becomes backlogged in a class.
    fn join(&mut self, shares: &mut Shares, flow: usize, class: Class) {
        let backlogged = &mut self.backlogged[class as usize];
        if self.policy == Policy::Fair {
            let least = backlogged.iter().map(|&flow| shares.served(flow)).min();
            shares.join(flow as u32, class, least);
        }
        self.lists[flow][class as usize].place = backlogged.len() as u32;
        backlogged.push(flow as u32);
    }

    /// Of the one flow, how many of other classes come before a sequence. Walks along those who
    /// are placed otherwise than by their class.
    fn before(&self, sequences: &SequenceTable, index: u32) -> u32 {
        let (rank, class) = (self.rank(&sequences[index]), sequences[index].class as usize);
        let is_before = |other: u32| self.rank(&sequences[other]) < rank;
        let mut count = 0;
        for (other, list) in self.lists[0].iter().enumerate().filter(|(other, _)| *other != class) {
            let is_urgent = other < class;
            let mut at = if is_urgent { list.tail } else { list.head };
            let mut passed = 0;
            while at != NONE && is_before(at) != is_urgent {
                at = if is_urgent { sequences[at].previous } else { sequences[at].next };
                passed += 1;
            }
            count += if is_urgent { list.len - passed } else { passed };
        }
        count
    }

    /// About how many turns come before that of a flow which has `own` queued before it: the more
    /// urgent classes, and with each of its own turns one of every other flow that has as many.
    pub fn turns_before(&self, class: Class, flow: u32, own: u32) -> u32 {
        let class = class as usize;
        let others = self.backlogged[class].iter().filter(|&&other| other != flow);
        let turns = others.map(|&other| self.lists[other as usize][class].len.min(own + 1));
        self.lens[..class].iter().sum::<u32>() + own + turns.sum::<u32>()
    }

    /// How many a flow has queued in a class.
    pub fn len_of(&self, class: Class, flow: u32) -> u32 {
        self.lists[flow as usize][class as usize].len
    }

    /// Takes a sequence out, wherever it stands.
    pub fn remove(&mut self, sequences: &mut SequenceTable, index: u32) {
        let class = sequences[index].class as usize;
        let flow = self.flow_of(&sequences[index]);
        let (previous, next) = (sequences[index].previous, sequences[index].next);
        let list = &mut self.lists[flow][class];
        link(list, sequences, previous, next, next, previous);
        (sequences[index].previous, sequences[index].next) = (NONE, NONE);
        list.len -= 1;
        self.lens[class] -= 1;
        if list.len == 0 {
            let place = std::mem::replace(&mut list.place, NONE) as usize;
            self.backlogged[class].swap_remove(place);
            if let Some(&moved) = self.backlogged[class].get(place) {
                self.lists[moved as usize][class].place = place as u32;
            }
        }
    }

    /// The sequences of a class; of each flow in order.
    pub fn iter<'a>(
        &'a self,
        sequences: &'a SequenceTable,
        class: Class,
    ) -> impl Iterator<Item = u32> + use<'a> {
        let flows = self.backlogged[class as usize].iter();
        flows.flat_map(move |&flow| {
            let mut at = self.lists[flow as usize][class as usize].head;
            std::iter::from_fn(move || {
                let index = at;
                (index != NONE).then(|| {
                    at = sequences[index].next;
                    index
                })
            })
        })
    }

    /// The flows that wait in a class.
    pub fn backlogged(&self, class: Class) -> &[u32] {
        &self.backlogged[class as usize]
    }
}

/// Makes `after` follow `previous`, and `before` precede `next`.
fn link(
    list: &mut List,
    sequences: &mut SequenceTable,
    previous: u32,
    next: u32,
    after: u32,
    before: u32,
) {
    match previous {
        NONE => list.head = after,
        previous => sequences[previous].next = after,
    }
    match next {
        NONE => list.tail = before,
        next => sequences[next].previous = before,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::base::Instant;
    use crate::engine::tenants::Bill;

    fn limits(policy: Policy, ageing_ms: u64) -> Limits {
        Limits { policy, ageing_ms, ..Limits::tiny() }
    }

    fn order(queue: &Queue, sequences: &SequenceTable) -> Vec<u32> {
        Class::ALL.iter().flat_map(|&class| queue.iter(sequences, class)).collect()
    }

    /// Takes all out as they are next.
    fn drained(queue: &mut Queue, sequences: &mut SequenceTable, shares: &mut Shares) -> Vec<u32> {
        let mut order = Vec::new();
        while let Some(index) = queue.head(sequences, shares) {
            queue.remove(sequences, index);
            let Sequence { bill, class, prompt_tokens, .. } = &sequences[index];
            shares.pick(bill.tenant, *class, *prompt_tokens, queue.is_fair());
            order.push(index);
        }
        order
    }

    /// Sequences of these classes, tenants and arrivals in milliseconds, all in the queue.
    fn queued(limits: &Limits, of: &[(Class, u32, u64)]) -> (Queue, SequenceTable, Shares) {
        let mut sequences = SequenceTable::new(of.len() as u32, 0);
        let (mut queue, mut shares) = (Queue::new(limits, 8), Shares::new(8));
        for (index, &(class, tenant, ms)) in (0..).zip(of) {
            let sequence = &mut sequences[index];
            (sequence.class, sequence.arrival, sequence.prompt_tokens) = (class, index.into(), 10);
            sequence.times.arrived = Instant::ZERO.plus_ms(ms);
            sequence.bill = Bill { tenant, ..Bill::NONE };
            queue.push(&mut sequences, &mut shares, index);
        }
        (queue, sequences, shares)
    }

    #[test]
    fn class_counts_before_arrival_and_arrival_before_submission() {
        let mut sequences = SequenceTable::new(4, 0);
        let mut shares = Shares::new(1);
        let mut queue = Queue::new(&limits(Policy::Priority, 0), 1);
        for (index, class) in
            [Class::Bulk, Class::Default, Class::Default, Class::System].into_iter().enumerate()
        {
            sequences[index as u32].class = class;
            sequences[index as u32].arrival = index as u64;
        }
        assert_eq!(queue.push(&mut sequences, &mut shares, 0), 0);
        assert_eq!(queue.push(&mut sequences, &mut shares, 2), 0);
        let position = queue.push(&mut sequences, &mut shares, 1);
        assert_eq!(position, 0, "it asked before, and submits after");
        assert_eq!(queue.push(&mut sequences, &mut shares, 3), 0);
        assert_eq!(order(&queue, &sequences), [3, 1, 2, 0]);
        queue.remove(&mut sequences, 3);
        queue.remove(&mut sequences, 2);
        assert_eq!(order(&queue, &sequences), [1, 0]);
        assert_eq!(queue.head(&sequences, &shares), Some(1));
        assert_eq!(queue.lens(), [0, 0, 1, 1]);
    }

    #[test]
    fn a_request_passes_a_more_urgent_one_that_came_later_by_the_ageing_time_a_class() {
        let of = [
            (Class::Bulk, 0, 0),
            (Class::Default, 0, 90),
            (Class::Default, 0, 110),
            (Class::System, 0, 290),
            (Class::System, 0, 310),
        ];
        let (mut queue, mut sequences, mut shares) = queued(&limits(Policy::Priority, 100), &of);
        assert_eq!(drained(&mut queue, &mut sequences, &mut shares), [1, 3, 0, 2, 4]);
        let (mut queue, mut sequences, mut shares) = queued(&limits(Policy::Priority, 0), &of);
        assert_eq!(drained(&mut queue, &mut sequences, &mut shares), [3, 4, 1, 2, 0]);
        let (mut queue, mut sequences, mut shares) = queued(&limits(Policy::Fcfs, 100), &of);
        assert_eq!(drained(&mut queue, &mut sequences, &mut shares), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn tenants_take_turns_within_a_class_by_what_they_were_served() {
        let of = [
            (Class::Default, 1, 0),
            (Class::Default, 1, 0),
            (Class::Default, 1, 0),
            (Class::Bulk, 2, 0),
            (Class::Default, 2, 0),
            (Class::Default, 2, 0),
            (Class::System, 1, 0),
        ];
        let (mut queue, mut sequences, mut shares) = queued(&limits(Policy::Fair, 0), &of);
        assert_eq!(queue.turns_before(Class::Default, 3, 0), 1 + 2, "one of each tenant first");
        shares.begin(2, 2);
        let order = drained(&mut queue, &mut sequences, &mut shares);
        // The first tenant has had its turn in the class above, at 10; the second stands at 0, and
        // counts half.
        assert_eq!(order, [6, 4, 5, 0, 1, 2, 3]);
    }

    proptest! {
        #[test]
        fn the_queue_agrees_with_a_sorted_list(
            moves in prop::collection::vec(any::<u8>(), 0..200),
            policy in prop_oneof![Just(Policy::Priority), Just(Policy::Fcfs)],
            ageing_ms in 0..4_u64,
        ) {
            let limits = limits(policy, ageing_ms);
            let mut sequences = SequenceTable::new(64, 0);
            let (mut queue, mut shares) = (Queue::new(&limits, 1), Shares::new(1));
            let mut model: Vec<((u64, u64), u32)> = Vec::new();
            for number in moves {
                if number % 3 == 0 && !model.is_empty() {
                    let (_, index) = model.remove(usize::from(number) % model.len());
                    queue.remove(&mut sequences, index);
                    sequences.give(index);
                } else if let Some(index) = sequences.take() {
                    let class = Class::ALL[usize::from(number) % 4];
                    let arrival = u64::from(number.reverse_bits()) * 64 + u64::from(index);
                    // Who asked later did not come earlier.
                    let ms = arrival / 2048;
                    sequences[index].class = class;
                    sequences[index].arrival = arrival;
                    sequences[index].times.arrived = Instant::ZERO.plus_ms(ms);
                    let position = queue.push(&mut sequences, &mut shares, index);
                    let first = match (policy, ageing_ms) {
                        (Policy::Fcfs, _) => 0,
                        (_, 0) => class as u64,
                        _ => ms + ageing_ms * class as u64,
                    };
                    model.push(((first, arrival), index));
                    model.sort_unstable();
                    let place = model.iter().position(|entry| entry.1 == index).unwrap();
                    prop_assert_eq!(position as usize, place);
                }
                let mut listed = order(&queue, &sequences);
                let mut expected: Vec<u32> = model.iter().map(|entry| entry.1).collect();
                if (policy, ageing_ms) == (Policy::Priority, 0) {
                    prop_assert_eq!(&listed, &expected);
                }
                listed.sort_unstable();
                expected.sort_unstable();
                prop_assert_eq!(listed, expected);
                prop_assert_eq!(queue.len(), model.len());
                let next = queue.head(&sequences, &shares);
                prop_assert_eq!(next, model.first().map(|entry| entry.1));
            }
        }

        #[test]
        fn backlogged_tenants_are_never_further_apart_than_what_one_pick_brings(
            moves in prop::collection::vec((0..5_u32, 1..40_u32, any::<bool>()), 0..300),
        ) {
            let mut sequences = SequenceTable::new(64, 0);
            let limits = limits(Policy::Fair, 0);
            let (mut queue, mut shares) = (Queue::new(&limits, 5), Shares::new(5));
            (0..5).for_each(|tenant| shares.begin(tenant, 1 + tenant));
            let class = Class::Default;
            for (arrival, (tenant, prompt_tokens, picks)) in (0..).zip(moves) {
                if picks && let Some(index) = queue.head(&sequences, &shares) {
                    queue.remove(&mut sequences, index);
                    let tenant = sequences[index].bill.tenant;
                    shares.pick(tenant, class, sequences[index].prompt_tokens, true);
                    sequences.give(index);
                } else if let Some(index) = sequences.take() {
                    let sequence = &mut sequences[index];
                    sequence.bill = Bill { tenant, ..Bill::NONE };
                    (sequence.class, sequence.arrival) = (class, arrival);
                    sequence.prompt_tokens = prompt_tokens;
                    queue.push(&mut sequences, &mut shares, index);
                }
                for &one in queue.backlogged(class) {
                    let over = shares.served(one).checked_sub(shares.floor(class));
                    // No output here: U is the longest prompt.
                    let most = shares.served_max(one, 40, 0);
                    prop_assert!(over.is_some_and(|over| over <= most), "{over:?} {most}");
                }
            }
        }
    }
}
