//! The block pool: who holds which KV block.
//!
//! A block has as many references as sequences that name it in their tables (one today; a shared
//! prefix has more). Without references it is free, unless a step that names it is still at the
//! device: then it retires, and is free when that step completes.

use crate::message::BlockId;

/// The pool's accounts; the memory itself is the device's. Never allocates after construction.
///
/// Invariant (I6): free + retiring + referenced = total, and each block is in one of the three.
#[derive(Debug)]
pub struct BlockPool {
    /// References of each block.
    references: Vec<u32>,
    /// The last step that names each block, as told by the holders that gave it back.
    last_step: Vec<u64>,
    /// Free blocks; the one freed last is taken first: it may still be in a cache.
    free: Vec<BlockId>,
    /// Blocks without references that step `number` still names, at `number % depth`.
    retiring: Vec<Vec<BlockId>>,
    retiring_count: usize,
    /// The newest step that has completed. Steps complete in order.
    completed: u64,
}

impl BlockPool {
    /// A pool of `total` free blocks, for a device with up to `depth` steps in flight.
    pub fn new(total: u32, depth: usize) -> BlockPool {
        let blocks = total as usize;
        BlockPool {
            references: vec![0; blocks],
            last_step: vec![0; blocks],
            free: (0..total).rev().collect(),
            retiring: (0..depth).map(|_| Vec::with_capacity(blocks)).collect(),
            retiring_count: 0,
            completed: 0,
        }
    }

    /// How many blocks there are.
    pub fn total(&self) -> usize {
        self.references.len()
    }

    /// How many can be taken now.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// How many will be free once the steps in flight have completed.
    pub fn retiring(&self) -> usize {
        self.retiring_count
    }

    /// References of a block.
    pub fn references(&self, block: BlockId) -> u32 {
        self.references[block as usize]
    }

    /// Takes a free block. The taker holds its only reference.
    pub fn take(&mut self) -> Option<BlockId> {
        let block = self.free.pop()?;
        let index = block as usize;
        assert_eq!(self.references[index], 0, "block {block} was free and referenced");
        self.references[index] = 1;
        self.last_step[index] = 0;
        Some(block)
    }

    /// Adds a reference to a block that somebody holds.
    pub fn share(&mut self, block: BlockId) {
        let references = &mut self.references[block as usize];
        assert!(*references > 0, "block {block} is shared by nobody's holder");
        *references += 1;
    }

    /// Gives one reference back. `last_step` is the newest step in which the giver named the
    /// block, 0 if none.
    pub fn give(&mut self, block: BlockId, last_step: u64) {
        let index = block as usize;
        assert!(self.references[index] > 0, "block {block} was given back twice");
        self.references[index] -= 1;
        self.last_step[index] = self.last_step[index].max(last_step);
        if self.references[index] > 0 {
            return;
        }
        let last_step = self.last_step[index];
        if last_step > self.completed {
            let depth = self.retiring.len() as u64;
            assert!(last_step - self.completed <= depth, "step {last_step} is not in flight");
            self.retiring[(last_step % depth) as usize].push(block);
            self.retiring_count += 1;
        } else {
            self.free.push(block);
        }
    }

    /// Step `number` has completed: what waited for it is free.
    pub fn complete(&mut self, number: u64) {
        assert_eq!(number, self.completed + 1, "steps complete in order");
        self.completed = number;
        let depth = self.retiring.len() as u64;
        let done = &mut self.retiring[(number % depth) as usize];
        self.retiring_count -= done.len();
        self.free.append(done);
    }

    /// The newest step that has completed.
    pub fn completed(&self) -> u64 {
        self.completed
    }

    /// Checks the invariant, given how often each block occurs in the holders' tables (I6).
    pub fn check(&self, held: &[u32]) -> Result<(), String> {
        let mut idle = vec![0_u32; self.total()];
        for &block in self.free.iter().chain(self.retiring.iter().flatten()) {
            idle[block as usize] += 1;
        }
        for (block, &idle) in idle.iter().enumerate() {
            if self.references[block] != held[block] {
                let (counted, named) = (self.references[block], held[block]);
                return Err(format!("block {block}: {counted} references, {named} holders"));
            }
            if idle != u32::from(held[block] == 0) {
                return Err(format!("block {block}: idle {idle} times, {} holders", held[block]));
            }
        }
        if self.retiring_count != self.retiring.iter().map(Vec::len).sum::<usize>() {
            return Err(format!("{} retiring blocks are miscounted", self.retiring_count));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_block_named_by_a_step_in_flight_is_free_only_after_that_step() {
        let mut pool = BlockPool::new(2, 2);
        let (a, b) = (pool.take().unwrap(), pool.take().unwrap());
        assert_eq!(pool.take(), None);
        pool.give(a, 2);
        pool.give(b, 1);
        assert_eq!((pool.free(), pool.retiring()), (0, 2));
        pool.complete(1);
        assert_eq!((pool.free(), pool.retiring()), (1, 1));
        assert_eq!(pool.take(), Some(b));
        pool.complete(2);
        assert_eq!(pool.take(), Some(a));
    }

    #[test]
    fn a_shared_block_waits_for_the_newest_step_of_all_its_holders() {
        let mut pool = BlockPool::new(1, 2);
        let block = pool.take().unwrap();
        pool.share(block);
        pool.give(block, 2);
        assert_eq!(pool.references(block), 1);
        pool.give(block, 1);
        pool.complete(1);
        assert_eq!(pool.free(), 0, "the first holder named it in step 2");
        pool.complete(2);
        assert_eq!(pool.free(), 1);
    }

    #[test]
    #[should_panic(expected = "given back twice")]
    fn a_block_given_back_twice_is_noticed() {
        let mut pool = BlockPool::new(1, 1);
        let block = pool.take().unwrap();
        pool.give(block, 0);
        pool.give(block, 0);
    }

    proptest! {
        #[test]
        fn references_always_sum_to_holders(moves in prop::collection::vec(any::<u16>(), 1..400)) {
            let depth = 2;
            let mut pool = BlockPool::new(6, depth);
            let mut held: Vec<BlockId> = Vec::new();
            let mut submitted = 0_u64;
            for number in moves {
                match number % 5 {
                    0 | 1 => held.extend(pool.take()),
                    2 if !held.is_empty() => {
                        let block = held[usize::from(number / 5) % held.len()];
                        pool.share(block);
                        held.push(block);
                    }
                    3 if !held.is_empty() => {
                        let block = held.swap_remove(usize::from(number / 5) % held.len());
                        let named = if number % 2 == 0 { submitted } else { 0 };
                        pool.give(block, named);
                    }
                    _ if submitted - pool.completed() < depth as u64 => submitted += 1,
                    _ => pool.complete(pool.completed() + 1),
                }
                let mut holders = vec![0; pool.total()];
                held.iter().for_each(|&block| holders[block as usize] += 1);
                prop_assert_eq!(pool.check(&holders), Ok(()));
            }
        }
    }
}
