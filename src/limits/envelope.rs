//! The memory envelope: what every bound costs in bytes, and the sum that nothing exceeds (I9).
//!
//! A line is always a count times a size, so that a reader can check it. Sizes of types are
//! handed in ([`Sizes`]): this file may not lean on the folders that own them.

use std::fmt;

use super::Limits;
use crate::base::Recorder;
use crate::message::{
    BLOCK_POSITIONS, ControlMessage, EVENT_BATCHES, Event, Logprob, PlanRow, RequestMessage,
    Sampled, SlotSetup, Submission,
};
use crate::request::{STOP_STRING_BYTES_MAX, STOP_STRINGS_MAX, SamplingParams, TokenId};

/// What of a model decides about memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelShape {
    /// Layers.
    pub layers: u64,
    /// Key and value heads a layer.
    pub kv_heads: u64,
    /// Values of a head.
    pub head_dim: u64,
    /// Entries of the vocabulary.
    pub vocab: u64,
    /// Width of the residual stream.
    pub hidden: u64,
    /// Width of the feed-forward's inner layer.
    pub ffn: u64,
    /// Longest sequence that the model was made for, in tokens.
    pub context: u64,
    /// Bytes of text of the longest token.
    pub longest_token_bytes: u64,
}

impl ModelShape {
    /// Bytes of one KV block: keys and values of [`BLOCK_POSITIONS`] positions in every layer,
    /// `element_bytes` a value.
    pub fn kv_block_bytes(&self, element_bytes: u64) -> u64 {
        2 * self.layers * self.kv_heads * self.head_dim * BLOCK_POSITIONS as u64 * element_bytes
    }
}

/// Sizes that the folders which own the types or the memory hand in, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Front cores.
    pub fronts: u64,
    /// Steps that may be in flight.
    pub depth: u64,
    /// KV blocks in the pool.
    pub kv_blocks: u64,
    /// One KV block, all layers.
    pub kv_block_bytes: u64,
    /// Weights as held in memory.
    pub weight_bytes: u64,
    /// The backend's step workspace, sampling state included.
    pub workspace_bytes: u64,
    /// Penalty histories that are taken as they are used; 0 where they are in the workspace.
    pub history_bytes: u64,
    /// Whether those three are in memory of a device of its own.
    pub on_device: bool,
    /// What a backend with a device takes of the process's memory.
    pub host_bytes: u64,
    /// The engine's calendar of refused clients.
    pub calendar_bytes: u64,
    /// A sequence in the engine's table, its fixed part.
    pub sequence_bytes: u64,
    /// A tenant's or user's account, with all that the engine keeps for it.
    pub account_bytes: u64,
    /// A stream in a front core's table, its fixed part.
    pub stream_bytes: u64,
    /// A connection in a front core's table, its fixed part.
    pub connection_bytes: u64,
    /// What a connection may have read and not worked off.
    pub receive_piece_bytes: u64,
    /// Replies (all that is not output) that a connection may hold for a client that does not
    /// read.
    pub reply_bytes: u64,
    /// Header of a frame.
    pub frame_overhead_bytes: u64,
    /// What the kernel may hold of a connection's input.
    pub kernel_receive_bytes: u64,
    /// Tokenizer, token table and chat template.
    pub tokenizer_bytes: u64,
    /// The model's file, mapped while it is loaded.
    pub file_bytes: u64,
    /// Threads besides the main one: each has a stack, of which little is ever touched.
    pub threads: u64,
    /// What of a thread's stack is touched at most.
    pub stack_bytes: u64,
    /// The program's own code and data, and what its libraries allocate at start.
    pub program_bytes: u64,
}

/// When a line's memory is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// At start, in full, each page touched.
    Prefaulted,
    /// At start, in full, in the device's own memory: not part of the process's.
    Device,
    /// At start, as far as it is used.
    Reserved,
    /// Under load, never above the line.
    OnDemand,
    /// Before the first request is served, and given back then.
    Loading,
    /// By the kernel for our sockets: not part of the process's resident size.
    Kernel,
}

impl Kind {
    /// The word in the table.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Prefaulted => "prefaulted",
            Kind::Device => "device",
            Kind::Reserved => "at start",
            Kind::OnDemand => "under load",
            Kind::Loading => "loading",
            Kind::Kernel => "kernel",
        }
    }
}

/// One line of the envelope.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bound {
    /// What it is for.
    pub name: &'static str,
    /// How many.
    pub count: u64,
    /// Bytes of each.
    pub each_bytes: u64,
    /// When it is taken.
    pub kind: Kind,
    /// Which limits the count and the size come from.
    pub reason: &'static str,
}

impl Bound {
    /// Count times size; stays at the largest number there is instead of wrapping.
    pub fn bytes(&self) -> u64 {
        self.count.saturating_mul(self.each_bytes)
    }
}

/// All lines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Envelope {
    bounds: Vec<Bound>,
}

const fn size<T>() -> u64 {
    size_of::<T>() as u64
}

const TOKEN: u64 = size::<TokenId>();
const TOP: u64 = SamplingParams::TOP_LOGPROBS_MAX as u64 * size::<(TokenId, f32)>();

impl Envelope {
    /// The envelope of these limits, with a model of this shape. `limits.context_max` is the
    /// context in force (see [`Limits::fitted`]).
    pub fn new(limits: &Limits, shape: &ModelShape, sizes: &Sizes) -> Envelope {
        let mut bounds = device_bounds(sizes);
        bounds.extend(engine_bounds(limits, shape, sizes));
        bounds.extend(front_bounds(limits, shape, sizes));
        bounds.extend(program_bounds(sizes));
        bounds.retain(|bound| bound.bytes() > 0);
        Envelope { bounds }
    }

    /// The lines, in data order.
    pub fn bounds(&self) -> &[Bound] {
        &self.bounds
    }

    /// The process's own memory at most: what its peak resident size is compared with. The
    /// model's file is unmapped before load can come.
    pub fn process_bytes(&self) -> u64 {
        let always = self.sum(|kind| matches!(kind, Kind::Prefaulted | Kind::Reserved));
        let later = self.sum(|kind| kind == Kind::OnDemand);
        always.saturating_add(later.max(self.sum(|kind| kind == Kind::Loading)))
    }

    /// What is taken of a device's own memory.
    pub fn device_bytes(&self) -> u64 {
        self.sum(|kind| kind == Kind::Device)
    }

    /// What the kernel holds for our sockets at most.
    pub fn kernel_bytes(&self) -> u64 {
        self.sum(|kind| kind == Kind::Kernel)
    }

    fn sum(&self, counts: impl Fn(Kind) -> bool) -> u64 {
        let bounds = self.bounds.iter().filter(|bound| counts(bound.kind));
        bounds.fold(0, |sum, bound| sum.saturating_add(bound.bytes()))
    }
}

fn device_bounds(sizes: &Sizes) -> Vec<Bound> {
    let kind = if sizes.on_device { Kind::Device } else { Kind::Prefaulted };
    let staging = "pinned for the device; its driver";
    vec![
        line("weights", 1, sizes.weight_bytes, kind, "the model, repacked"),
        line("KV pool", sizes.kv_blocks, sizes.kv_block_bytes, kind, "kv.pool_bytes, by 64 tokens"),
        line("workspace", 1, sizes.workspace_bytes, kind, "step_tokens_max and running_max"),
        line(
            "penalty histories",
            1,
            sizes.history_bytes,
            Kind::OnDemand,
            "running_max, by the vocabulary",
        ),
        line("staging", 1, sizes.host_bytes, Kind::Reserved, staging),
    ]
}

/// A token on its way out: id, text, log-probability and alternatives.
fn token_bytes(shape: &ModelShape) -> u64 {
    TOKEN + size::<Logprob>() + TOP + shape.longest_token_bytes
}

fn line(
    name: &'static str,
    count: u64,
    each_bytes: u64,
    kind: Kind,
    reason: &'static str,
) -> Bound {
    Bound { name, count, each_bytes, kind, reason }
}

fn engine_bounds(limits: &Limits, shape: &ModelShape, sizes: &Sizes) -> Vec<Bound> {
    let sequences = u64::from(limits.sequences_max());
    let table = u64::from(limits.context_max).div_ceil(BLOCK_POSITIONS as u64);
    let stop_bytes = (STOP_STRINGS_MAX * (STOP_STRING_BYTES_MAX + size_of::<Box<[u8]>>())) as u64;
    let sampling =
        size::<SamplingParams>() + SamplingParams::LOGIT_BIAS_MAX as u64 * size::<(TokenId, f32)>();
    let admitted = u64::from(limits.running_max) + u64::from(limits.parked_max);
    let window = u64::from(limits.stream_window_tokens_max);
    let held_text = STOP_STRING_BYTES_MAX as u64 + shape.longest_token_bytes;
    let accounts = u64::from(limits.tenants_max) + 2;
    vec![
        line(
            "sequence table",
            sequences,
            sizes.sequence_bytes + table * TOKEN + size::<Submission>(),
            Kind::Reserved,
            "queued + running + parked",
        ),
        line("calendar", 1, sizes.calendar_bytes, Kind::Reserved, "clients told when to come back"),
        line(
            "prompts and outputs",
            sequences,
            // A vector that grows may have room for twice what is in it.
            2 * u64::from(limits.context_max) * TOKEN,
            Kind::OnDemand,
            "every sequence at context_max",
        ),
        line(
            "sampling and stops",
            sequences,
            sampling + stop_bytes,
            Kind::OnDemand,
            "300 biases and 16 stop strings each",
        ),
        line(
            "unsent output",
            admitted,
            window * token_bytes(shape) + held_text,
            Kind::OnDemand,
            "a window of tokens a stream",
        ),
        line("accounts", accounts, sizes.account_bytes, Kind::Reserved, "tenants_max + 2 shared"),
        line(
            "step boxes",
            sizes.depth + 1,
            step_bytes(limits),
            Kind::Reserved,
            "depth + 1 steps with results",
        ),
        line(
            "event batches",
            sizes.fronts * EVENT_BATCHES as u64,
            batch_bytes(limits, shape),
            Kind::Reserved,
            "4 a front core",
        ),
        line(
            "rings",
            sizes.fronts,
            u64::from(limits.asks_max) * size::<RequestMessage>() * 2
                + 2 * sequences * size::<ControlMessage>(),
            Kind::Reserved,
            "asks_max; control for all sequences",
        ),
    ]
}

fn step_bytes(limits: &Limits) -> u64 {
    let (running, context) = (u64::from(limits.running_max), u64::from(limits.context_max));
    let table = context.div_ceil(BLOCK_POSITIONS as u64);
    let row = size::<PlanRow>() + size::<SlotSetup>() + size::<Sampled>() + TOP;
    // Block tables, and the history of every row that changes its slot with penalties on.
    running * (row + (table + context) * TOKEN) + u64::from(limits.step_tokens_max) * TOKEN
}

fn batch_bytes(limits: &Limits, shape: &ModelShape) -> u64 {
    // Answers and changes of state of every sequence; one token a row, and with it the text that
    // a stop string held back.
    let events = 2 * u64::from(limits.sequences_max()) * size::<Event>();
    let held_text = STOP_STRING_BYTES_MAX as u64 + shape.longest_token_bytes;
    events + u64::from(limits.running_max) * (token_bytes(shape) + held_text)
}

fn front_bounds(limits: &Limits, shape: &ModelShape, sizes: &Sizes) -> Vec<Bound> {
    let fronts = sizes.fronts;
    let connections = u64::from(limits.connections_max);
    let sequences = u64::from(limits.sequences_max());
    // Those that wait to ask are at most as many as there are connections.
    let streams = connections + u64::from(limits.asks_max) + sequences;
    let window = u64::from(limits.stream_window_tokens_max);
    let window_bytes = window * (token_bytes(shape) + sizes.frame_overhead_bytes);
    vec![
        line(
            "connections",
            fronts * connections,
            // The piece that is being received, one held back, and half a frame.
            sizes.connection_bytes + 3 * sizes.receive_piece_bytes,
            Kind::Reserved,
            "each with three pieces of input",
        ),
        line(
            "replies",
            fronts * connections,
            // In two buffers, each with room to grow.
            2 * sizes.reply_bytes,
            Kind::OnDemand,
            "for clients that do not read",
        ),
        line(
            "streams",
            fronts * streams,
            sizes.stream_bytes,
            Kind::Reserved,
            "connections + asks + sequences",
        ),
        line(
            "egress",
            fronts * sequences,
            2 * window_bytes,
            Kind::OnDemand,
            "a window of frames a stream",
        ),
        line("ingest", fronts, limits.ingest_bytes_max, Kind::OnDemand, "ingest_bytes_max"),
        line(
            "tokenising",
            fronts,
            limits.ingest_bytes_max + TEMPLATE_BYTES_MAX,
            Kind::OnDemand,
            "texts of all bodies, one render",
        ),
        line(
            "kernel, input",
            fronts * connections,
            sizes.kernel_receive_bytes,
            Kind::Kernel,
            "SO_RCVBUF, doubled by the kernel",
        ),
        line(
            "kernel, output",
            fronts * sequences,
            // The kernel accounts for about twice the bytes of small sends.
            2 * window_bytes,
            Kind::Kernel,
            "a window of frames a stream",
        ),
    ]
}

/// What the rendering of one conversation may take (its budget in `model/template.rs`).
const TEMPLATE_BYTES_MAX: u64 = 64 << 20;

fn program_bounds(sizes: &Sizes) -> Vec<Bound> {
    let at_start = Kind::Reserved;
    let recorder = Recorder::BYTES as u64;
    vec![
        line("flight recorders", sizes.fronts + 2, recorder, at_start, "4,096 events a core"),
        line("tokenizer", 1, sizes.tokenizer_bytes, at_start, "vocabulary, merges, template"),
        line("threads", sizes.threads, sizes.stack_bytes, at_start, "what of a stack is touched"),
        line("program", 1, sizes.program_bytes, at_start, "code, libraries, allocator"),
        line("model file", 1, sizes.file_bytes, Kind::Loading, "mapped until it is repacked"),
    ]
}

/// Bytes in the largest binary unit that leaves at least one whole unit.
pub fn show_bytes(bytes: u64) -> String {
    let units = [("GiB", 1u64 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    match units.into_iter().find(|&(_, unit)| bytes >= unit) {
        Some((name, unit)) => {
            let tenths = u128::from(bytes) * 10 / u128::from(unit);
            format!("{}.{} {name}", tenths / 10, tenths % 10)
        }
        None => format!("{bytes} B"),
    }
}

impl fmt::Display for Envelope {
    /// A table for people: one line a bound, then the sums.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for bound in &self.bounds {
            let product = match bound.count {
                1 => String::new(),
                count => format!("{count} x {}", show_bytes(bound.each_bytes)),
            };
            let (name, kind) = (bound.name, bound.kind.name());
            let bytes = show_bytes(bound.bytes());
            writeln!(f, "{name:<20} {bytes:>11} {product:>18}  {kind:<10} {}", bound.reason)?;
        }
        if self.device_bytes() > 0 {
            writeln!(f, "{:<20} {:>11}", "device", show_bytes(self.device_bytes()))?;
        }
        writeln!(f, "{:<20} {:>11}", "process, at most", show_bytes(self.process_bytes()))?;
        write!(f, "{:<20} {:>11}", "kernel, at most", show_bytes(self.kernel_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> ModelShape {
        // SmolLM2-135M.
        ModelShape {
            layers: 30,
            kv_heads: 3,
            head_dim: 64,
            vocab: 49_152,
            hidden: 576,
            ffn: 1536,
            context: 8192,
            longest_token_bytes: 81,
        }
    }

    fn sizes() -> Sizes {
        Sizes {
            fronts: 1,
            depth: 1,
            kv_blocks: 100,
            kv_block_bytes: shape().kv_block_bytes(2),
            weight_bytes: 100 << 20,
            workspace_bytes: 32 << 20,
            history_bytes: 0,
            on_device: false,
            host_bytes: 0,
            calendar_bytes: 25_000,
            sequence_bytes: 512,
            account_bytes: 512,
            stream_bytes: 256,
            connection_bytes: 256,
            receive_piece_bytes: 4096,
            reply_bytes: 1 << 14,
            frame_overhead_bytes: 20,
            kernel_receive_bytes: 1 << 17,
            tokenizer_bytes: 20 << 20,
            file_bytes: 98 << 20,
            threads: 4,
            stack_bytes: 1 << 17,
            program_bytes: 16 << 20,
        }
    }

    #[test]
    fn a_kv_block_of_the_default_model_is_1440_kib_in_16_bits() {
        assert_eq!(shape().kv_block_bytes(2), 1440 << 10);
    }

    fn bytes_of(envelope: &Envelope, name: &str) -> u64 {
        envelope.bounds().iter().find(|bound| bound.name == name).unwrap().bytes()
    }

    #[test]
    fn the_sums_are_the_lines_and_the_kernel_is_apart() {
        let envelope = Envelope::new(&Limits::default(), &shape(), &sizes());
        let sum = |kind: Kind| -> u64 {
            envelope.bounds().iter().filter(|b| b.kind == kind).map(Bound::bytes).sum()
        };
        assert_eq!(envelope.kernel_bytes(), sum(Kind::Kernel));
        let always = sum(Kind::Prefaulted) + sum(Kind::Reserved);
        assert_eq!(envelope.process_bytes(), always + sum(Kind::OnDemand));
        assert_eq!(bytes_of(&envelope, "KV pool"), 100 * (1440 << 10));
        assert_eq!(bytes_of(&envelope, "kernel, input"), 1024 << 17);
    }

    #[test]
    fn what_is_in_a_devices_memory_is_not_the_processs() {
        let sizes = Sizes { on_device: true, host_bytes: 1 << 20, ..sizes() };
        let with = Envelope::new(&Limits::default(), &shape(), &sizes);
        let without = Envelope::new(&Limits::default(), &shape(), &super::tests::sizes());
        let moved = sizes.weight_bytes + sizes.workspace_bytes + 100 * sizes.kv_block_bytes;
        assert_eq!(with.device_bytes(), moved);
        assert_eq!(with.process_bytes(), without.process_bytes() - moved + (1 << 20));
        assert_eq!(without.device_bytes(), 0);
    }

    #[test]
    fn a_large_file_counts_in_place_of_the_load_that_comes_after_it() {
        let small = Envelope::new(&Limits::default(), &shape(), &sizes());
        let sizes = Sizes { file_bytes: 1 << 40, ..sizes() };
        let large = Envelope::new(&Limits::default(), &shape(), &sizes);
        let on_demand = |bound: &&Bound| bound.kind == Kind::OnDemand;
        let load: u64 = small.bounds().iter().filter(on_demand).map(Bound::bytes).sum();
        assert_eq!(large.process_bytes(), small.process_bytes() - load + (1 << 40));
    }

    #[test]
    fn every_limit_that_costs_memory_is_in_the_sum() {
        let total = |limits: &Limits| {
            let envelope = Envelope::new(limits, &shape(), &sizes());
            envelope.process_bytes() + envelope.kernel_bytes()
        };
        let base = total(&Limits::default());
        let grown = |change: fn(&mut Limits)| {
            let mut limits = Limits::default();
            change(&mut limits);
            assert!(total(&limits) > base, "{limits:?}");
        };
        grown(|l| l.connections_max += 1);
        grown(|l| l.ingest_bytes_max += 1);
        grown(|l| l.asks_max += 1);
        grown(|l| l.stream_window_tokens_max += 1);
        grown(|l| l.queued_requests_max += 1);
        grown(|l| l.running_max += 1);
        grown(|l| l.parked_max += 1);
        grown(|l| l.step_tokens_max += 1);
        grown(|l| l.context_max += 1);
        grown(|l| l.tenants_max += 1);
    }

    #[test]
    fn absurd_bounds_stay_absurd_instead_of_wrapping() {
        let sizes = Sizes { kv_blocks: u64::MAX, ..sizes() };
        let envelope = Envelope::new(&Limits::default(), &shape(), &sizes);
        assert_eq!(envelope.process_bytes(), u64::MAX);
    }

    #[test]
    fn the_table_has_a_line_a_bound_and_two_sums() {
        let envelope = Envelope::new(&Limits::default(), &shape(), &sizes());
        let text = envelope.to_string();
        assert_eq!(text.lines().count(), envelope.bounds().len() + 2);
        assert!(text.contains("100 x 1.4 MiB"), "{text}");
        assert!(text.lines().all(|line| line.len() <= 100), "{text}");
    }

    #[test]
    fn bytes_are_shown_in_the_largest_unit_that_fits() {
        let cases = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1536, "1.5 KiB"),
            (1 << 20, "1.0 MiB"),
            (2_147_483_648, "2.0 GiB"),
            (u64::MAX, "17179869183.9 GiB"),
        ];
        for (bytes, expected) in cases {
            assert_eq!(show_bytes(bytes), expected);
        }
    }
}
