//! The table of all settings: the only place that knows a setting's name.

use super::value::{Allowed, Unit, Value};
use super::{Backend, Config, Graphs, Io, Isa};
use crate::limits::Policy;
use crate::request::Class;

/// A setting.
pub(super) struct Setting {
    /// `section.name`.
    pub key: &'static str,
    /// One line.
    pub about: &'static str,
    /// What it may be.
    pub allowed: Allowed,
    /// Puts an allowed value in its place.
    pub set: fn(&mut Config, Value),
    /// The value in force.
    pub get: fn(&Config) -> Value,
}

impl Setting {
    /// Its name in the environment.
    pub(super) fn variable(&self) -> String {
        format!("FOREBAY_{}", self.key.replace('.', "_").to_ascii_uppercase())
    }
}

/// A numeric setting: key, place in [`Config`], range, unit, one line.
macro_rules! number {
    ($key:literal, $($place:ident).+, $min:expr, $max:expr, $unit:ident, $about:literal) => {
        Setting {
            key: $key,
            about: $about,
            allowed: Allowed::Number { unit: Unit::$unit, min: $min, max: $max },
            set: |config, value| {
                // Out of reach otherwise: the range check has a number that fits the type.
                if let Value::Number(number) = value {
                    config.$($place).+ = number.try_into().expect("the range fits the type");
                }
            },
            get: |config| Value::Number(config.$($place).+.into()),
        }
    };
}

/// A setting that is one of a few words: key, place, the words with their values, one line.
macro_rules! choice {
    ($key:literal, $($place:ident).+, [$($word:literal => $value:expr),+], $about:literal) => {
        Setting {
            key: $key,
            about: $about,
            allowed: Allowed::Choice(&[$($word),+]),
            set: |config, value| {
                if let Value::Choice(index) = value {
                    config.$($place).+ = [$($value),+][index];
                }
            },
            get: |config| {
                let index = [$($value),+].iter().position(|v| *v == config.$($place).+);
                Value::Choice(index.expect("every value has a word"))
            },
        }
    };
}

/// A limit of a quota: key, place in [`crate::limits::Quotas`], one line.
macro_rules! quota {
    ($key:literal, $($place:ident).+, $about:literal) => {
        number!($key, limits.quotas.$($place).+, 0, 1 << 30, Count, $about)
    };
}

const DAY_MS: u64 = 24 * 3600 * 1000;

/// Every setting, in the order in which `forebay check` prints them: sections stay together.
pub(super) const SETTINGS: &[Setting] = &[
    Setting {
        key: "server.listen",
        about: "address of the native protocol; port 0 takes any free port",
        allowed: Allowed::LoopbackAddress,
        set: |config, value| {
            if let Value::Address(address) = value {
                config.server.listen = address;
            }
        },
        get: |config| Value::Address(config.server.listen),
    },
    Setting {
        key: "model.name",
        about: "a known name, a path to a GGUF file, or hf:OWNER/REPO/FILE.gguf",
        allowed: Allowed::Model,
        set: |config, value| {
            if let Value::Model(model) = value {
                config.model = model;
            }
        },
        get: |config| Value::Model(config.model.clone()),
    },
    Setting {
        key: "kv.pool_bytes",
        about: "size of the KV pool; auto: a quarter of what is free, at most 2GiB; most of a GPU",
        allowed: Allowed::NumberOrAuto { unit: Unit::Bytes, min: 1 << 20, max: 1 << 42 },
        set: |config, value| {
            config.kv.pool_bytes = if let Value::Number(bytes) = value { Some(bytes) } else { None }
        },
        get: |config| config.kv.pool_bytes.map_or(Value::Auto, Value::Number),
    },
    choice!("compute.backend", compute.backend,
        ["auto" => Backend::Auto, "cpu" => Backend::Cpu, "cuda" => Backend::Cuda],
        "on what the model runs; auto: a GPU where one can be used, else the CPU"),
    Setting {
        key: "compute.threads",
        about: "compute workers; auto: one a CPU",
        allowed: Allowed::NumberOrAuto { unit: Unit::Count, min: 1, max: 256 },
        set: |config, value| {
            config.compute.threads =
                if let Value::Number(threads) = value { Some(threads as usize) } else { None }
        },
        get: |config| config.compute.threads.map_or(Value::Auto, |n| Value::Number(n as u64)),
    },
    choice!("compute.isa", compute.isa,
        ["auto" => Isa::Auto, "avx512" => Isa::Avx512, "avx2" => Isa::Avx2,
         "portable" => Isa::Portable],
        "instruction-set path of the CPU backend"),
    number!("cuda.device", cuda.device, 0, 255, Count, "which GPU, as the driver counts them"),
    number!(
        "cuda.memory_percent",
        cuda.memory_percent,
        1,
        100,
        Count,
        "how much of the GPU's free memory may be taken"
    ),
    choice!("cuda.graphs", cuda.graphs, ["on" => Graphs::On, "off" => Graphs::Off],
        "whether decode steps are recorded once and started as one; off is slower"),
    Setting {
        key: "metrics.listen",
        about: "address of the metrics page (GET /metrics, for Prometheus), or off",
        allowed: Allowed::LoopbackAddressOrOff,
        set: |config, value| {
            config.metrics.listen =
                if let Value::Address(address) = value { Some(address) } else { None }
        },
        get: |config| config.metrics.listen.map_or(Value::Off, Value::Address),
    },
    choice!("runtime.io", runtime.io,
        ["auto" => Io::Auto, "io_uring" => Io::IoUring, "epoll" => Io::Epoll],
        "how sockets are driven"),
    Setting {
        key: "runtime.recorder_file",
        about: "where the flight recorders go on a panic, a stall or SIGUSR1: stderr or a path",
        allowed: Allowed::Output,
        set: |config, value| {
            if let Value::Output(file) = value {
                config.runtime.recorder_file = file;
            }
        },
        get: |config| Value::Output(config.runtime.recorder_file.clone()),
    },
    number!(
        "breaker.failures_max",
        limits.breaker_failures_max,
        0,
        1 << 16,
        Count,
        "failed steps in a row after which everybody is refused for a while; 0: off"
    ),
    number!(
        "breaker.open_ms",
        limits.breaker_open_ms,
        1,
        30_000,
        Millis,
        "for how long at first; twice as long each time that it helped nothing, at most 30 s"
    ),
    number!(
        "breaker.hung_step_ms",
        limits.hung_step_ms,
        1,
        DAY_MS,
        Millis,
        "a step that takes longer counts as hung: everybody is refused until it ends"
    ),
    number!(
        "drain.delay_ms",
        drain.delay_ms,
        0,
        DAY_MS,
        Millis,
        "after a signal, requests are still accepted this long"
    ),
    number!(
        "drain.timeout_ms",
        drain.timeout_ms,
        0,
        DAY_MS,
        Millis,
        "then, sequences may finish for this long before they are cancelled"
    ),
    number!(
        "scheduler.step_target_ms",
        limits.step_target_ms,
        1,
        DAY_MS,
        Millis,
        "a step in which somebody decodes takes no more prefill than ends by then, as predicted"
    ),
    choice!("scheduler.policy", limits.policy,
        ["priority" => Policy::Priority, "fcfs" => Policy::Fcfs, "fair" => Policy::Fair],
        "who is next: by class, then arrival; by arrival; or by class, then tenants' shares"),
    number!(
        "scheduler.ageing_ms",
        limits.ageing_ms,
        0,
        DAY_MS,
        Millis,
        "waiting this much longer makes up for one class less urgent; 0: nothing does"
    ),
    number!(
        "stream.window_tokens_max",
        limits.stream_window_tokens_max,
        1,
        1 << 16,
        Count,
        "largest credit window of a stream"
    ),
    number!(
        "stream.stall_timeout_ms",
        limits.stall_timeout_ms,
        1,
        DAY_MS,
        Millis,
        "a client that gives no credit for this long is cancelled"
    ),
    number!(
        "limits.connections_max",
        limits.connections_max,
        1,
        1 << 16,
        Count,
        "connections held open"
    ),
    number!(
        "limits.streams_per_connection_max",
        limits.streams_per_connection_max,
        1,
        1 << 16,
        Count,
        "streams open at once on one connection"
    ),
    number!(
        "limits.frame_bytes_max",
        limits.frame_bytes_max,
        1 << 10,
        64 << 20,
        Bytes,
        "largest frame a client may send"
    ),
    number!(
        "limits.ingest_bytes_max",
        limits.ingest_bytes_max,
        1 << 10,
        1 << 40,
        Bytes,
        "request bodies held between grant and submission"
    ),
    number!(
        "limits.asks_max",
        limits.asks_max,
        1,
        1 << 16,
        Count,
        "requests that may wait for admission's answer"
    ),
    number!(
        "limits.handshake_timeout_ms",
        limits.handshake_timeout_ms,
        1,
        DAY_MS,
        Millis,
        "a connection without a handshake by then is closed"
    ),
    number!(
        "limits.idle_timeout_ms",
        limits.idle_timeout_ms,
        1,
        7 * DAY_MS,
        Millis,
        "a connection without streams and frames for this long is closed"
    ),
    number!(
        "limits.queued_requests_max",
        limits.queued_requests_max,
        1,
        1 << 16,
        Count,
        "requests that wait in the queue"
    ),
    number!(
        "limits.queued_tokens_max",
        limits.queued_tokens_max,
        1,
        1 << 40,
        Count,
        "prompt tokens that wait in the queue"
    ),
    number!(
        "limits.queued_bytes_max",
        limits.queued_bytes_max,
        1 << 10,
        1 << 40,
        Bytes,
        "request bodies that wait in the queue"
    ),
    number!(
        "limits.ttft_target_ms",
        limits.ttft_target_ms,
        0,
        DAY_MS,
        Millis,
        "a request foreseen to wait longer for its first token is refused (bulk: never); 0: off"
    ),
    number!(
        "limits.queue_ttl_ms",
        limits.queue_ttl_ms,
        1,
        DAY_MS,
        Millis,
        "a request that has waited this long is evicted"
    ),
    number!("limits.running_max", limits.running_max, 1, 1 << 12, Count, "sequences in the batch"),
    number!(
        "limits.parked_max",
        limits.parked_max,
        0,
        1 << 16,
        Count,
        "admitted sequences out of the batch"
    ),
    number!(
        "limits.step_tokens_max",
        limits.step_tokens_max,
        1,
        1 << 16,
        Count,
        "tokens of one step, decode and prefill together"
    ),
    number!(
        "limits.chunk_tokens_max",
        limits.chunk_tokens_max,
        1,
        1 << 16,
        Count,
        "tokens of one sequence's prefill in one step"
    ),
    number!(
        "limits.context_max",
        limits.context_max,
        1,
        1 << 24,
        Count,
        "longest sequence; the model's own context when that is shorter"
    ),
    number!(
        "limits.tenants_max",
        limits.tenants_max,
        1,
        1 << 16,
        Count,
        "accounts of tenants, and of users where they have quotas; the longest at rest makes room"
    ),
    quota!(
        "tenants.requests_per_second",
        tenant.requests_per_second,
        "requests a tenant may have granted in a second; 0: any"
    ),
    quota!(
        "tenants.requests_burst",
        tenant.requests_burst,
        "requests at once after a rest; 0: those of a second"
    ),
    quota!(
        "tenants.requests_per_minute",
        tenant.requests_per_minute,
        "requests in a minute, all at once if need be; 0: any"
    ),
    quota!(
        "tenants.input_tokens_per_second",
        tenant.input_tokens_per_second,
        "prompt tokens in a second; 0: any"
    ),
    quota!(
        "tenants.input_tokens_burst",
        tenant.input_tokens_burst,
        "prompt tokens at once after a rest; 0: those of a second; longer prompts wait for all"
    ),
    quota!(
        "tenants.output_tokens_per_second",
        tenant.output_tokens_per_second,
        "output tokens in a second, foreseen at first and settled at the end; 0: any"
    ),
    quota!(
        "tenants.output_tokens_burst",
        tenant.output_tokens_burst,
        "output tokens at once after a rest; 0: those of a second"
    ),
    quota!(
        "tenants.streams_max",
        tenant.streams_max,
        "streams at once, queued, running and parked together; 0: any"
    ),
    number!("tenants.weight", limits.quotas.tenant.weight, 1, 1000, Count, "share beside others'"),
    choice!("tenants.class_ceiling", limits.quotas.tenant.class_ceiling,
        ["system" => Class::System, "interactive" => Class::Interactive,
         "default" => Class::Default, "bulk" => Class::Bulk],
        "most urgent class that a tenant may use: what asks for more is lowered to it"),
    quota!(
        "users.requests_per_second",
        user.requests_per_second,
        "requests a user within a tenant may have granted in a second; 0: any"
    ),
    quota!(
        "users.requests_burst",
        user.requests_burst,
        "requests at once after a rest; 0: those of a second"
    ),
    quota!(
        "users.output_tokens_per_second",
        user.output_tokens_per_second,
        "output tokens in a second; 0: any"
    ),
    quota!(
        "users.output_tokens_burst",
        user.output_tokens_burst,
        "output tokens at once after a rest; 0: those of a second"
    ),
    quota!("users.streams_max", user.streams_max, "streams at once; 0: any"),
];

/// The section of settings of one tenant: `tenant.NAME.SETTING` is [`tenants`](TENANTS)`.SETTING`
/// for that tenant alone.
pub(super) const TENANT: &str = "tenant";
/// The section of the settings of every tenant.
pub(super) const TENANTS: &str = "tenants";

/// Which setting a key means, and for whom.
pub(super) struct Found<'a> {
    /// Its index.
    pub index: usize,
    /// The setting.
    pub setting: &'static Setting,
    /// The name of the one tenant it is for, as it was written.
    pub tenant: Option<&'a str>,
}

/// The setting with this key. A tenant's name may have dots in it, a setting's has none.
pub(super) fn find(key: &str) -> Option<Found<'_>> {
    let one = key.strip_prefix(TENANT).and_then(|rest| rest.strip_prefix('.'));
    let one = one.and_then(|rest| rest.rsplit_once('.'));
    let of_all = one.map(|(_, name)| format!("{TENANTS}.{name}"));
    let wanted = of_all.as_deref().unwrap_or(key);
    let (index, setting) = SETTINGS.iter().enumerate().find(|(_, s)| s.key == wanted)?;
    Some(Found { index, setting, tenant: one.map(|(tenant, _)| tenant) })
}
