//! `forebay plan`: where what runs and how much memory it takes at most, without serving.

use std::path::Path;

use serde_json::json;

use super::Failure;
use super::args;
use super::models::print;
use super::pull::{self, Progress};
use super::server::{LoadedModel, Sizing};
use crate::device::BackendDescription;
use crate::engine::{ACCOUNT_BYTES, SEQUENCE_BYTES};
use crate::flow::calendar::CALENDAR_BYTES;
use crate::front::net::NetSettings;
use crate::front::{CONNECTION_BYTES, REPLY_BYTES_MAX, STREAM_BYTES};
use crate::limits::{Envelope, Limits, Lowered, ModelShape, Sizes};
use crate::protocol::HEADER_BYTES;
use crate::runtime::topology::CoreMap;
use crate::runtime::{Probe, probe};

/// `SO_RCVBUF` of the native protocol's connections; the kernel doubles it. Left to itself it
/// would grow to megabytes a connection for a client that sends faster than we read.
pub(super) const RECEIVE_BUFFER_BYTES: u32 = 64 << 10;

/// What follows from a model's size in the tokenizer: id to text, text to id and the merges, in
/// hash tables that are at most half empty, and twice the bytes of every token.
const TOKENIZER_BYTES_PER_TOKEN: u64 = 512;

/// Code and data of the program and its libraries, the executor's own buffers (glommio takes
/// 10 MiB), and what the allocator holds back from what loading gave back.
const PROGRAM_BYTES: u64 = 96 << 20;

/// What a thread touches of its stack.
const STACK_BYTES: u64 = 256 << 10;

/// Prints the plan for a configuration.
pub(super) fn plan(args: &args::Plan) -> Result<(), Failure> {
    let config = super::settings::load(&args.settings)?.config;
    let path = pull::ensure(&config.model, Progress::Show)?;
    let probe = probe();
    let planned = super::server::plan(&config, &path, &probe)?;
    if args.json {
        return print(&as_json(&planned.limits, &planned.envelope));
    }
    print(&format!("{probe}\n\n{}\n\n{}", planned.map, planned.envelope))?;
    if let Some(notice) = context_notice(&config.limits, &planned.limits, planned.lowered) {
        print(&format!("\n{notice}"))?;
    }
    let free = probe.memory.available_bytes;
    if planned.envelope.process_bytes() > free {
        print(&format!("\n{}", too_large(&planned.envelope, free)))?;
    }
    Ok(())
}

fn as_json(limits: &Limits, envelope: &Envelope) -> String {
    let bounds: Vec<_> = envelope
        .bounds()
        .iter()
        .map(|bound| {
            json!({
                "name": bound.name,
                "count": bound.count,
                "each_bytes": bound.each_bytes,
                "bytes": bound.bytes(),
                "kind": bound.kind.name(),
                "reason": bound.reason,
            })
        })
        .collect();
    let plan = json!({
        "context_tokens": limits.context_max,
        "device_bytes": envelope.device_bytes(),
        "process_bytes": envelope.process_bytes(),
        "kernel_bytes": envelope.kernel_bytes(),
        "bounds": bounds,
    });
    serde_json::to_string_pretty(&plan).expect("plain values")
}

/// What is worth saying when the context in force is not the one that was asked for.
pub(super) fn context_notice(
    asked: &Limits,
    fitted: &Limits,
    lowered: Option<Lowered>,
) -> Option<String> {
    let (asked, context) = (asked.context_max, fitted.context_max);
    match lowered? {
        // The default is longer than many models' context: nothing to worry about.
        Lowered::ToModelContext if asked == Limits::default().context_max => None,
        Lowered::ToModelContext => {
            Some(format!("limits.context_max = {asked}: the model was made for {context} tokens"))
        }
        Lowered::ToPool => Some(format!(
            "limits.context_max = {asked}: the KV pool holds {context} tokens; kv.pool_bytes \
             would have to be larger"
        )),
    }
}

pub(super) fn too_large(envelope: &Envelope, free_bytes: u64) -> String {
    format!(
        "under full load this can take {}, and {} are free: lower kv.pool_bytes or the limits",
        crate::limits::show_bytes(envelope.process_bytes()),
        crate::limits::show_bytes(free_bytes)
    )
}

/// The envelope of a server with this model on this backend.
pub(super) fn envelope(
    sizing: &Sizing,
    model: &LoadedModel,
    backend: &BackendDescription,
    file: &Path,
) -> Envelope {
    let shape = ModelShape {
        layers: model.config.layers as u64,
        kv_heads: model.config.kv_heads as u64,
        head_dim: model.config.head_dim as u64,
        vocab: model.config.vocab as u64,
        hidden: model.config.hidden as u64,
        ffn: model.config.ffn as u64,
        context: model.config.context as u64,
        longest_token_bytes: model.tokens.longest_bytes() as u64,
    };
    let sizes = Sizes {
        fronts: sizing.map.fronts() as u64,
        depth: backend.depth as u64,
        kv_blocks: sizing.kv_blocks.into(),
        kv_block_bytes: backend.kv_block_bytes,
        weight_bytes: backend.weight_bytes,
        workspace_bytes: backend.workspace_bytes,
        history_bytes: backend.history_bytes,
        on_device: backend.on_device,
        host_bytes: backend.host_bytes,
        calendar_bytes: CALENDAR_BYTES as u64,
        sequence_bytes: SEQUENCE_BYTES as u64,
        account_bytes: ACCOUNT_BYTES as u64,
        stream_bytes: STREAM_BYTES as u64,
        connection_bytes: CONNECTION_BYTES as u64,
        receive_piece_bytes: NetSettings::default().receive_piece_bytes.into(),
        reply_bytes: 2 * REPLY_BYTES_MAX as u64,
        // A TOKENS frame has two counts and a length besides its header.
        frame_overhead_bytes: HEADER_BYTES as u64 + 8,
        kernel_receive_bytes: 2 * u64::from(RECEIVE_BUFFER_BYTES),
        tokenizer_bytes: shape.vocab * TOKENIZER_BYTES_PER_TOKEN,
        file_bytes: std::fs::metadata(file).map_or(0, |meta| meta.len()),
        threads: threads(&sizing.map),
        stack_bytes: STACK_BYTES,
        program_bytes: PROGRAM_BYTES,
    };
    Envelope::new(&sizing.limits, &shape, &sizes)
}

/// Executors and workers, and those that wait for signals, for stalls and for whoever reads the
/// metrics (whose page of some 50 KB is within what the allocator may take).
fn threads(map: &CoreMap) -> u64 {
    (map.executors.len() + map.workers.len() + 3) as u64
}

/// The core map for a configuration on this machine.
pub(super) fn core_map(config: &crate::config::Config, probe: &Probe) -> CoreMap {
    let settings = crate::runtime::topology::Settings {
        workers: config.compute.threads,
        // More front cores need the handing over of connections: not built yet.
        fronts: Some(1),
        ..Default::default()
    };
    CoreMap::new(&probe.cpus, &settings)
}
