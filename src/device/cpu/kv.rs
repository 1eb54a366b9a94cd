//! The paged KV cache: how keys and values lie in a block.
//!
//! A block holds 64 positions of all layers. The part of one (layer, kv head) is contiguous: first
//! its keys, `[pair of dims][position][2]`, then its values, `[pair of positions][dim][2]`, all
//! bf16. So both products of attention read rows of pairs: queries times keys sums over pairs of
//! dims, probabilities times values over pairs of positions.
#![allow(unsafe_code)]

use std::io;

use crate::device::cpu::memory::Region;
use crate::device::cpu::rows::bf16_from;
use crate::message::{BLOCK_POSITIONS, BlockId};

/// Offsets within a block, in pairs of bf16.
#[derive(Clone, Copy, Debug)]
pub struct KvLayout {
    layers: usize,
    kv_heads: usize,
    head_dim: usize,
    /// `head_dim` rounded up to a multiple of 32; what is added stays zero.
    padded_dim: usize,
}

impl KvLayout {
    /// The layout for a model's shape.
    pub fn new(layers: usize, kv_heads: usize, head_dim: usize) -> KvLayout {
        KvLayout { layers, kv_heads, head_dim, padded_dim: head_dim.next_multiple_of(32) }
    }

    /// Values of a head as stored.
    pub fn padded_dim(&self) -> usize {
        self.padded_dim
    }

    /// Pairs that hold the keys of one (layer, kv head); its values take as many.
    fn half_pairs(&self) -> usize {
        self.padded_dim / 2 * BLOCK_POSITIONS
    }

    /// Pairs of a block.
    pub fn block_pairs(&self) -> usize {
        self.layers * self.kv_heads * 2 * self.half_pairs()
    }

    /// Bytes of a block.
    pub fn block_bytes(&self) -> u64 {
        self.block_pairs() as u64 * 4
    }

    fn part(&self, layer: usize, head: usize) -> usize {
        (layer * self.kv_heads + head) * 2 * self.half_pairs()
    }
}

/// The pool of KV blocks.
pub struct KvPool {
    layout: KvLayout,
    blocks: u32,
    pairs: Region<u32>,
}

/// Keys and values of one (layer, kv head) in a block.
#[derive(Clone, Copy, Debug)]
pub struct KvPart {
    /// Keys: `padded_dim / 2` lines of [`BLOCK_POSITIONS`] pairs.
    pub keys: *mut u32,
    /// Values: `BLOCK_POSITIONS / 2` lines of `padded_dim` pairs.
    pub values: *mut u32,
}

impl KvPool {
    /// A pool of `blocks` blocks, not backed by memory yet: see [`KvPool::back`].
    ///
    /// # Errors
    /// When the system refuses the memory.
    pub fn new(layout: KvLayout, blocks: u32) -> io::Result<KvPool> {
        let pairs = layout.block_pairs().checked_mul(blocks as usize);
        let pairs = pairs.ok_or(io::Error::from(io::ErrorKind::OutOfMemory))?;
        let pairs = Region::new(pairs)?;
        Ok(KvPool { layout, blocks, pairs })
    }

    /// Makes the system back the pool with memory from this byte on, and returns where to go on,
    /// `None` at the end. Steps may run meanwhile: what is in the memory stays.
    pub fn back(&self, from_byte: usize) -> Option<usize> {
        self.pairs.back(from_byte)
    }

    /// How keys and values lie in a block.
    pub fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// Blocks in the pool.
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Bytes taken from the system.
    pub fn mapped_bytes(&self) -> u64 {
        self.pairs.mapped_bytes()
    }

    /// Where the keys and values of one (layer, kv head) lie in a block.
    ///
    /// # Panics
    /// When there is no such block, layer or head.
    pub fn part(&self, block: BlockId, layer: usize, head: usize) -> KvPart {
        assert!(layer < self.layout.layers && head < self.layout.kv_heads);
        let at = block as usize * self.layout.block_pairs() + self.layout.part(layer, head);
        let half = self.layout.half_pairs();
        KvPart { keys: self.pairs.at(at, half), values: self.pairs.at(at + half, half) }
    }

    /// Writes one position's key and value. Values that are no finite bf16 are stored as zero: a
    /// probability of zero times them must be zero for whoever gets the block next.
    ///
    /// # Safety
    /// Nobody else uses this (block, layer, head) at this position or its neighbour (the other
    /// one of positions 2i and 2i + 1) meanwhile.
    ///
    /// # Panics
    /// When there is no such block, layer, head or position, or `key` and `value` are no heads.
    pub unsafe fn write(
        &self,
        (block, layer, head): (BlockId, usize, usize),
        position: usize,
        key: &[f32],
        value: &[f32],
    ) {
        let layout = &self.layout;
        assert!(position < BLOCK_POSITIONS);
        assert!(key.len() == layout.head_dim && value.len() == layout.head_dim);
        let part = self.part(block, layer, head);
        for (pair, key) in key.as_chunks::<2>().0.iter().enumerate() {
            let bits = u32::from(stored(key[0])) | u32::from(stored(key[1])) << 16;
            // SAFETY: line `pair` < padded_dim / 2 of the part's keys, a position below 64.
            unsafe { part.keys.add(pair * BLOCK_POSITIONS + position).write(bits) };
        }
        // SAFETY: line `position / 2` < 32 of the part's values.
        let line = unsafe { part.values.add(position / 2 * layout.padded_dim) };
        for (dim, value) in value.iter().enumerate() {
            let bits = u32::from(stored(*value));
            // SAFETY: `dim` < padded_dim is inside the line. An even position clears its
            // neighbour: whatever an earlier owner left there must stay finite.
            unsafe {
                let pair = line.add(dim);
                let is_second = position % 2 == 1;
                pair.write(if is_second { pair.read() & 0xffff | bits << 16 } else { bits });
            }
        }
    }
}

/// A value as the cache stores it.
#[inline(always)]
fn stored(value: f32) -> u16 {
    let bits = bf16_from(value);
    if bits & 0x7f80 == 0x7f80 { 0 } else { bits }
}
