use std::sync::Arc;

use super::*;
use crate::message::SeqKey;

const BOUNDS: Bounds = Bounds {
    vocab: 100,
    kv_blocks: 40,
    rows_max: 8,
    step_tokens_max: 256,
    context_max: 512,
    sampled_rows_max: 8,
};

fn seq(slot: u32) -> SeqKey {
    SeqKey { slot, generation: 1 }
}

fn setup(slot: u16, sampling: SamplingParams) -> SlotSetup {
    let (history_start, history_count, history_prompt_count) = (0, 0, 0);
    SlotSetup {
        slot,
        seq: seq(slot.into()),
        sampling: Arc::new(sampling),
        history_start,
        history_count,
        history_prompt_count,
    }
}

/// Rows of (token count, position, samples), each with blocks of its own.
fn plan(rows: &[(u32, u32, bool)]) -> StepPlan {
    let mut plan = StepPlan::default();
    for (slot, &(token_count, position, sample)) in rows.iter().enumerate() {
        plan.setups.push(setup(slot as u16, SamplingParams::default()));
        let block_count = (position + token_count).div_ceil(BLOCK_POSITIONS as u32);
        let (token_start, block_start) = (plan.tokens.len() as u32, plan.blocks.len() as u32);
        plan.rows.push(PlanRow {
            seq: seq(slot as u32),
            slot: slot as u16,
            sample,
            token_start,
            token_count,
            position,
            block_start,
            block_count,
        });
        plan.tokens.extend((0..token_count).map(|token| 10 * slot as u32 + token % 10));
        plan.blocks.extend((0..block_count).map(|block| 5 * slot as u32 + block));
    }
    plan
}

fn prepared(group: usize, plan: &StepPlan) -> (Arrays, LaunchSizes) {
    let mut arrays = Arrays::new(BOUNDS, group);
    let sizes = arrays.prepare(plan).expect("a valid plan");
    (arrays, sizes)
}

#[test]
fn tokens_lie_behind_one_another_with_their_positions_and_places() {
    let (arrays, sizes) = prepared(3, &plan(&[(1, 70, true), (66, 2, false)]));
    assert_eq!(arrays.step, abi::fb_step { tokens: 67, rows: 2, sampled: 1, reserved: 0 });
    assert_eq!((sizes.tokens, sizes.sampled, sizes.splits), (67, 1, 1));
    assert!(!sizes.is_recorded);
    assert_eq!(arrays.token_ids[..3], [0, 10, 11]);
    assert_eq!(arrays.token_slots[..2], [0, 1]);
    assert_eq!(arrays.positions[..3], [70, 2, 3]);
    // Position 70 is place 6 of the row's second block; the other row begins in block 5 and goes
    // on in block 6.
    assert_eq!(arrays.kv_places[..2], [64 + 6, 5 * 64 + 2]);
    assert_eq!(arrays.kv_places[66], 6 * 64 + 3);
    assert_eq!(
        (arrays.sampled_rows[..].to_vec(), arrays.sampled_tokens.clone()),
        (vec![0], vec![0])
    );
    assert_eq!((arrays.rows[0].sampled, arrays.rows[1].sampled), (0, NONE));
    assert_eq!((arrays.rows[1].token_start, arrays.rows[1].block_start), (1, 2));
}

#[test]
fn a_rows_tiles_cover_its_tokens_once() {
    for group in [1, 3, 4, 16] {
        let (arrays, sizes) =
            prepared(group, &plan(&[(37, 0, true), (1, 9, true), (100, 0, false)]));
        let tile_tokens = memory::tile_tokens(group) as u32;
        let mut covered = vec![0; 3];
        let tiles = arrays.tiles.iter().chain(&arrays.prefill_tiles);
        for tile in tiles.filter(|tile| tile.row != NONE) {
            let row = &arrays.rows[tile.row as usize];
            assert_eq!(tile.token_start, covered[tile.row as usize]);
            covered[tile.row as usize] += tile_tokens.min(row.token_count - tile.token_start);
        }
        assert_eq!(covered, [37, 1, 100]);
        assert_eq!(sizes.prefill_tiles, arrays.prefill_tiles.len());
        for four in arrays.prefill_tiles.chunks(4) {
            assert_eq!(four.len(), 4);
            assert!(four.iter().all(|tile| [four[0].row, NONE].contains(&tile.row)));
        }
    }
}

#[test]
fn a_decode_step_is_padded_to_a_recorded_size_with_what_nobody_reads() {
    let (arrays, sizes) = prepared(3, &plan(&[(1, 300, true), (1, 0, true), (1, 64, true)]));
    let LaunchSizes { tokens, tiles, sampled, splits, is_recorded, .. } = sizes;
    assert_eq!((tokens, tiles, sampled, splits, is_recorded), (4, 4, 4, 2, true));
    assert_eq!(arrays.step, abi::fb_step { tokens: 3, rows: 3, sampled: 3, reserved: 0 });
    assert_eq!((arrays.tiles[3].row, arrays.kv_places[3]), (NONE, NONE));
    assert_eq!((arrays.sampled_rows[3], arrays.sampled_tokens[3]), (NONE, NONE));
}

#[test]
fn a_step_with_a_chunk_or_a_row_that_does_not_sample_is_launched_as_it_is() {
    assert!(!prepared(3, &plan(&[(2, 0, true)])).1.is_recorded);
    assert!(!prepared(3, &plan(&[(1, 0, false)])).1.is_recorded);
    assert!(!prepared(3, &plan(&[])).1.is_recorded);
}

#[test]
fn a_slots_sampling_state_stays_until_it_is_set_up_again() {
    let mut arrays = Arrays::new(BOUNDS, 3);
    let mut first = plan(&[(1, 0, true), (1, 0, true)]);
    let logit_bias = vec![(7, 1.5), (100, 9.0), (8, -1.0)];
    let sampling = SamplingParams {
        logit_bias,
        temperature: 0.5,
        logprobs: Some(0),
        repetition_penalty: 1.5,
        ..Default::default()
    };
    first.setups[1] = setup(1, sampling);
    arrays.prepare(&first).expect("valid");
    assert!(arrays.has_new_biases);
    let slot = arrays.slots[1];
    assert_eq!((slot.temperature, slot.logprobs, slot.bias_count), (0.5, 1, 2));
    let biases = &arrays.biases[slot.bias_start as usize..][..2];
    assert_eq!((biases[0].token, biases[1].token), (7, 8), "token 100 does not exist");
    assert_eq!(arrays.setups.iter().map(|setup| setup.slot).collect::<Vec<_>>(), [1]);

    let mut second = plan(&[(1, 1, true), (1, 1, true)]);
    second.setups.clear();
    arrays.prepare(&second).expect("valid");
    assert!(!arrays.has_new_biases && arrays.setups.is_empty());
    assert_eq!(arrays.slots[1].temperature, 0.5);
}

#[test]
fn a_broken_plan_is_refused_and_leaves_no_trace() {
    let mut arrays = Arrays::new(BOUNDS, 3);
    let mut broken = plan(&[(1, 0, true)]);
    broken.tokens[0] = 100;
    assert_eq!(arrays.prepare(&broken), Err(StepFailure::InvalidPlan));
    let mut more = plan(&[(1, 0, true)]);
    more.blocks.resize(8 * 8 + 1, 0);
    assert_eq!(arrays.prepare(&more), Err(StepFailure::InvalidPlan), "more blocks than have room");
    let mut history = plan(&[(1, 0, true)]);
    history.history.resize(8 * 512 + 1, 0);
    assert_eq!(arrays.prepare(&history), Err(StepFailure::InvalidPlan));
    let mut without = plan(&[(1, 0, true)]);
    without.setups.clear();
    assert_eq!(arrays.prepare(&without), Err(StepFailure::InvalidPlan), "the slot has no owner");
}
