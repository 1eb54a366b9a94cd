//! Where everything but weights and KV lies in the device's memory: one arena, taken at start.
//! Plain arithmetic, so that a plan can be made without a device.

use crate::device::cuda::abi;
use crate::device::cuda::pack::TILE_ROWS;
use crate::message::BLOCK_POSITIONS;
use crate::model::ModelConfig;
use crate::request::SamplingParams;

/// Token counts of steps for which launches are recorded; steps of other sizes between are padded
/// to the next one.
pub const GRAPH_TOKENS: [usize; 9] = [1, 2, 4, 8, 16, 24, 32, 48, 64];

/// The recorded size that a decode step of `tokens` is padded to; `None` when it is larger.
pub fn padded(tokens: usize) -> Option<usize> {
    GRAPH_TOKENS.into_iter().find(|&size| size >= tokens)
}

// What both sides of `abi.h` must agree on.
const _: () = assert!(abi::FB_BLOCK_POSITIONS as usize == BLOCK_POSITIONS);
const _: () = assert!(abi::FB_TOP_MAX == SamplingParams::TOP_LOGPROBS_MAX as u32);

/// Positions in a split of attention.
pub const SPLIT_POSITIONS: usize = BLOCK_POSITIONS * abi::FB_SPLIT_BLOCKS as usize;
/// Tokens that a product's widest tile takes: buffers are rounded up to it, so that a kernel may
/// read a whole tile.
const TOKENS_MULTIPLE: usize = 64;
/// Where arrays begin: whole cache lines of the device.
const ALIGNMENT: usize = 256;
/// Biases of a slot.
pub const BIASES: usize = SamplingParams::LOGIT_BIAS_MAX;

/// Hands out places one behind the other.
#[derive(Default)]
pub struct Places {
    end: usize,
}

impl Places {
    /// Room for `count` values of type `T`.
    pub fn take<T>(&mut self, count: usize) -> Place {
        self.take_bytes(count * size_of::<T>())
    }

    /// Room for so many bytes.
    pub fn take_bytes(&mut self, bytes: usize) -> Place {
        let at = self.end.next_multiple_of(ALIGNMENT);
        self.end = at + bytes;
        Place { at, bytes }
    }

    /// Bytes taken, in whole cache lines.
    pub fn bytes(&self) -> usize {
        self.end.next_multiple_of(ALIGNMENT)
    }
}

/// A part of the arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// First byte.
    pub at: usize,
    /// How many.
    pub bytes: usize,
}

/// How large steps may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepSizes {
    /// Batch slots, and rows of a step.
    pub rows: usize,
    /// Tokens of a step.
    pub tokens: usize,
    /// Rows of a step that sample.
    pub sampled: usize,
    /// Positions of a sequence.
    pub context: usize,
}

/// What a step uploads, laid out as it lies on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Upload {
    pub step: Place,
    pub rows: Place,
    pub slots: Place,
    pub sampled_rows: Place,
    pub sampled_tokens: Place,
    pub setups: Place,
    pub tiles: Place,
    pub prefill_tiles: Place,
    pub token_ids: Place,
    pub token_slots: Place,
    pub positions: Place,
    pub kv_places: Place,
    /// Last of what every step has; as much of it as is used is copied.
    pub blocks: Place,
    /// Only in steps that set up slots with penalties.
    pub history: Place,
    /// Only in steps that set up slots with biases.
    pub biases: Place,
    pub bytes: usize,
}

impl Upload {
    /// The layout for steps of these sizes.
    pub fn new(sizes: &StepSizes, tile_tokens: usize) -> Upload {
        let mut places = Places::default();
        let tokens = room(sizes.tokens);
        let sampled = room(sizes.sampled);
        let blocks = sizes.context.div_ceil(BLOCK_POSITIONS);
        Upload {
            step: places.take::<abi::fb_step>(1),
            rows: places.take::<abi::fb_row>(sizes.rows),
            slots: places.take::<abi::fb_slot>(sizes.rows),
            sampled_rows: places.take::<u32>(sampled),
            sampled_tokens: places.take::<u32>(sampled),
            setups: places.take::<abi::fb_slot_setup>(sizes.rows),
            tiles: places.take::<abi::fb_query_tile>(tiles_max(sizes.rows)),
            prefill_tiles: places.take::<abi::fb_query_tile>(prefill_tiles_max(
                (sizes.rows, sizes.tokens),
                tile_tokens,
            )),
            token_ids: places.take::<u32>(tokens),
            token_slots: places.take::<u32>(tokens),
            positions: places.take::<u32>(tokens),
            kv_places: places.take::<u32>(tokens),
            blocks: places.take::<u32>(sizes.rows * blocks),
            history: places.take::<u32>(sizes.rows * sizes.context),
            biases: places.take::<abi::fb_bias>(sizes.rows * BIASES),
            bytes: places.bytes(),
        }
    }
}

/// Query tiles that one block of the kernel for long rows takes.
pub const PREFILL_TILES: usize = 4;

/// Query tiles of rows that have one: a padded step has a tile a token.
pub fn tiles_max(rows: usize) -> usize {
    room(rows)
}

/// Query tiles of longer rows: each may have a last one that is partly filled, and a group that is.
pub fn prefill_tiles_max((rows, tokens): (usize, usize), tile_tokens: usize) -> usize {
    (tokens / tile_tokens + rows * (1 + PREFILL_TILES)).next_multiple_of(PREFILL_TILES)
}

/// Tokens, or rows, that there is room for: whole tiles of the widest kernel, and every padded
/// step.
fn room(count: usize) -> usize {
    count.next_multiple_of(TOKENS_MULTIPLE)
}

/// Everything that steps work on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workspace {
    pub upload: Upload,
    pub uploaded: Place,
    /// The residual stream.
    pub x: Place,
    /// Normed, as a product's input; also the sampled rows'.
    pub normed: Place,
    pub queries: Place,
    pub partial_o: Place,
    pub partial_ml: Place,
    pub attended: Place,
    /// The feed-forward's inner layer.
    pub inner: Place,
    pub logits: Place,
    pub results: Place,
    pub counts: Place,
    pub last_tokens: Place,
    pub rope: Place,
    pub bytes: usize,
}

impl Workspace {
    /// The layout for steps of these sizes of this model.
    pub fn new(config: &ModelConfig, sizes: &StepSizes) -> Workspace {
        let upload = Upload::new(sizes, tile_tokens(config.group()));
        let mut places = Places::default();
        let tokens = room(sizes.tokens);
        let sampled = room(sizes.sampled);
        let splits = splits(sizes.context);
        let query = config.query_width();
        Workspace {
            upload,
            uploaded: places.take_bytes(upload.bytes),
            x: places.take::<f32>(tokens * config.hidden),
            normed: places.take::<u16>(tokens.max(sampled) * config.hidden),
            queries: places.take::<u16>(tokens * query),
            partial_o: places.take::<f32>(tokens * query * splits),
            partial_ml: places.take::<f32>(tokens * config.heads * splits * 2),
            attended: places.take::<u16>(tokens * query),
            inner: places.take::<u16>(tokens * config.ffn),
            logits: places.take::<f32>(sampled * config.vocab),
            results: places.take::<abi::fb_sampled>(sampled),
            counts: places.take::<u32>(sizes.rows * config.vocab),
            last_tokens: places.take::<u32>(sizes.rows),
            rope: places.take::<f32>(sizes.context * config.rope.dims),
            bytes: places.bytes(),
        }
    }
}

impl Workspace {
    /// Bytes of the host's side of uploads and results.
    pub fn staging_bytes(&self) -> u64 {
        (self.upload.bytes + self.results.bytes) as u64
    }
}

/// Splits of a sequence of so many positions.
pub fn splits(positions: usize) -> usize {
    positions.div_ceil(SPLIT_POSITIONS)
}

/// Tokens of a query tile: its rows are tokens times the query heads of a kv head.
pub fn tile_tokens(group: usize) -> usize {
    (TILE_ROWS / group).max(1)
}

/// Bytes of one KV block of a model, all layers.
pub fn kv_block_bytes(config: &ModelConfig) -> u64 {
    (config.layers * config.kv_heads * 2 * BLOCK_POSITIONS * config.head_dim * 2) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_follow_one_another_on_cache_lines_and_never_overlap() {
        let mut places = Places::default();
        let taken = [places.take::<u32>(3), places.take_bytes(0), places.take::<u64>(40)];
        assert_eq!(taken.map(|place| place.at), [0, 256, 256]);
        assert_eq!(places.bytes(), 768);
    }

    #[test]
    fn every_decode_step_up_to_the_largest_graph_has_a_padded_size() {
        assert_eq!(padded(1), Some(1));
        assert_eq!(padded(3), Some(4));
        assert_eq!(padded(17), Some(24));
        assert_eq!(padded(64), Some(64));
        assert_eq!(padded(65), None);
        for tokens in 1..=64 {
            assert!(padded(tokens).is_some_and(|size| room(tokens) >= size));
        }
    }

    #[test]
    fn a_tile_has_sixteen_queries_at_most_and_a_token_at_least() {
        assert_eq!([1, 3, 4, 8, 16].map(tile_tokens), [16, 5, 4, 2, 1]);
        assert_eq!([1, 256, 257, 8192].map(splits), [1, 1, 2, 32]);
    }
}
