//! Loading settings from all places, right and wrong.

use super::*;
use crate::limits::Quota;
use crate::request::{Class, Name};

fn variables(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect()
}

fn from_file(text: &str) -> Result<Loaded, Problems> {
    load(Some(TomlFile { path: "f.toml", text }), [], &[])
}

fn flag(flag: &str, key: &str, value: &str) -> Flag {
    Flag { flag: flag.into(), key: key.into(), value: value.into() }
}

/// The one problem, as the user reads it.
fn complaint(result: Result<Loaded, Problems>) -> String {
    let problems = result.expect_err("this configuration is wrong");
    assert_eq!(problems.0.len(), 1, "{problems}");
    problems.0[0].to_string()
}

#[test]
fn without_anything_the_defaults_hold() {
    assert_eq!(load(None, [], &[]).unwrap().config, Config::default());
    assert_eq!(from_file("# nothing\n").unwrap().config, Config::default());
}

#[test]
fn the_command_line_beats_the_environment_and_that_beats_the_file() {
    let file = TomlFile {
        path: "f.toml",
        text: "[limits]\nrunning_max = 1\nparked_max = 1\nasks_max = 1\n",
    };
    let environment =
        variables(&[("FOREBAY_LIMITS_PARKED_MAX", "2"), ("FOREBAY_LIMITS_ASKS_MAX", "2")]);
    let flags = [flag("--set", "limits.asks_max", "3")];
    let limits = load(Some(file), environment, &flags).unwrap().config.limits;
    assert_eq!((limits.running_max, limits.parked_max, limits.asks_max), (1, 2, 3));
}

#[test]
fn every_kind_of_value_is_read_from_a_file() {
    let config = from_file(
        "[server]\nlisten = \"[::1]:0\"\n\
         [model]\nname = \"/m/x.gguf\"\n\
         [kv]\npool_bytes = \"1GiB\"\n\
         [compute]\nthreads = 3\nisa = \"avx2\"\n\
         [drain]\ndelay_ms = 5\ntimeout_ms = \"2m\"\n\
         [stream]\nwindow_tokens_max = 0x10\nstall_timeout_ms = \"30s\"\n\
         [runtime]\nio = \"epoll\"\nrecorder_file = \"/tmp/x\"\n\
         [limits]\nqueued_bytes_max = 1_500_000\n",
    )
    .unwrap()
    .config;
    assert_eq!(config.server.listen, "[::1]:0".parse().unwrap());
    assert_eq!(config.model, ModelName::Path("/m/x.gguf".into()));
    assert_eq!(config.kv.pool_bytes, Some(1 << 30));
    assert_eq!(
        config.compute,
        Compute { backend: Backend::Auto, threads: Some(3), isa: Isa::Avx2 }
    );
    assert_eq!(config.drain, Drain { delay_ms: 5, timeout_ms: 120_000 });
    assert_eq!(config.limits.stream_window_tokens_max, 16);
    assert_eq!(config.limits.stall_timeout_ms, 30_000);
    assert_eq!(config.runtime.io, Io::Epoll);
    assert_eq!(config.runtime.recorder_file, Some("/tmp/x".into()));
    assert_eq!(config.limits.queued_bytes_max, 1_500_000);
}

#[test]
fn auto_takes_a_setting_back_to_what_the_machine_decides() {
    let file = TomlFile { path: "f", text: "[kv]\npool_bytes = 1048576\n[compute]\nthreads = 1\n" };
    let flags = [flag("--kv-pool", "kv.pool_bytes", "auto")];
    let config = load(Some(file), [], &flags).unwrap().config;
    assert_eq!(config.kv.pool_bytes, None);
    assert_eq!(config.compute.threads, Some(1));
}

#[test]
fn a_wrong_value_is_reported_with_key_value_place_and_what_is_allowed() {
    assert_eq!(
        complaint(from_file("[compute]\n\nisa = \"sse\"\n")),
        "compute.isa = \"sse\" (f.toml line 3): must be one of auto, avx512, avx2, portable"
    );
    assert_eq!(
        complaint(load(None, variables(&[("FOREBAY_DRAIN_DELAY_MS", "soon")]), &[])),
        "drain.delay_ms = \"soon\" (environment variable FOREBAY_DRAIN_DELAY_MS): must be a time \
         (milliseconds, or such as 500ms, 60s, 5m) from 0ms to 24h"
    );
    assert_eq!(
        complaint(load(None, [], &[flag("--set", "kv.pool_bytes", "1KiB")])),
        "kv.pool_bytes = \"1KiB\" (flag --set): must be a size (bytes, or such as 512MiB) from \
         1MiB to 4TiB, or auto"
    );
}

#[test]
fn numbers_outside_their_range_and_of_the_wrong_kind_are_refused() {
    for value in ["0", "-1", "4097", "1.5", "true", "\"many\"", "99999999999999999999", "[64]"] {
        let said = complaint(from_file(&format!("[limits]\nrunning_max = {value}\n")));
        assert!(said.contains("must be a whole number from 1 to 4096"), "{said}");
    }
    for value in ["", "_1", "1_", "1 GiB?", "GiB", "1.5GiB", "+1", "18446744073709551616"] {
        let said = complaint(load(None, [], &[flag("--kv-pool", "kv.pool_bytes", value)]));
        assert!(said.contains("must be a size"), "{said}");
    }
}

#[test]
fn an_unknown_key_is_an_error_and_the_nearest_is_named() {
    let cases = [
        ("[limits]\nruning_max = 3\n", "limits.runing_max (f.toml line 2)", "limits.running_max?"),
        ("[server]\nport = 3\n", "server.port (f.toml line 2)", "called so"),
        ("listen = \"127.0.0.1:1\"\n", "listen (f.toml line 1)", "mean server.listen?"),
        ("[kv]\nthreads = 3\n", "kv.threads (f.toml line 2)", "mean compute.threads?"),
        ("[a.b]\nc = 1\n", "a.b (f.toml line 1)", "called so"),
    ];
    for (text, place, said) in cases {
        let complaint = complaint(from_file(text));
        assert!(complaint.starts_with(place) && complaint.contains(said), "{complaint}");
    }
    let said = complaint(load(None, variables(&[("FOREBAY_SERVER_LISTN", "x")]), &[]));
    assert!(said.contains("did you mean FOREBAY_SERVER_LISTEN?"), "{said}");
    let said = complaint(load(None, [], &[flag("--set", "limits.running", "x")]));
    assert!(said.contains("did you mean limits.running_max?"), "{said}");
}

#[test]
fn variables_that_are_no_settings_are_left_alone() {
    let others = variables(&[
        ("PATH", "/bin"),
        ("FOREBAY_LOG", "debug"),
        ("FOREBAY_CONFIG", "x.toml"),
        ("FOREBAY_TEST_SEED", "7"),
    ]);
    assert_eq!(load(None, others, &[]).unwrap().config, Config::default());
}

#[test]
fn an_address_that_others_could_reach_is_refused_with_the_reason() {
    for address in ["0.0.0.0:7070", "192.168.1.2:7070", "[::]:7070", "localhost:7070", "7070"] {
        let said = complaint(load(None, [], &[flag("--listen", "server.listen", address)]));
        assert!(said.contains("loopback") && said.contains("no keys yet"), "{said}");
    }
    for address in ["127.0.0.1:0", "127.8.0.1:1", "[::1]:7070"] {
        load(None, [], &[flag("--listen", "server.listen", address)]).unwrap();
    }
}

#[test]
fn contradictions_name_both_sides_and_where_each_came_from() {
    assert_eq!(
        complaint(from_file("[limits]\nstep_tokens_max = 32\nchunk_tokens_max = 32\n")),
        "limits.step_tokens_max = 32 (f.toml line 2): must be above limits.running_max = 64 \
         (default): a step holds one token of every running sequence, and some prefill"
    );
}

#[test]
fn what_follows_from_a_wrong_value_is_not_reported_on_top() {
    // The default of 512 would contradict the wrong value's partner.
    let said = complaint(from_file("[limits]\nstep_tokens_max = \"x\"\nchunk_tokens_max = 600\n"));
    assert!(said.starts_with("limits.step_tokens_max = \"x\""), "{said}");
}

#[test]
fn all_problems_come_at_once_in_the_order_of_the_file() {
    let problems = load(
        Some(TomlFile {
            path: "f.toml",
            text: "[runtime]\nio = \"poll\"\n[compute]\nisa = 7\nthreads = 0\n[x]\ny = 1\n",
        }),
        variables(&[("FOREBAY_MODEL_NAME", "gpt")]),
        &[flag("--listen", "server.listen", "0.0.0.0:1")],
    )
    .unwrap_err();
    let keys: Vec<_> = problems.0.iter().map(|problem| problem.key.as_str()).collect();
    let expected =
        ["runtime.io", "compute.isa", "compute.threads", "x.y", "model.name", "server.listen"];
    assert_eq!(keys, expected);
    assert!(problems.to_string().starts_with("the configuration has 6 problems:\n  runtime.io"));
}

#[test]
fn a_file_that_is_no_toml_is_reported_with_its_lines() {
    let problems = from_file("[limits]\nrunning_max 3\n[server\n").unwrap_err();
    assert!(!problems.0.is_empty());
    let lines: Vec<_> = problems.0.iter().map(|problem| problem.origin.clone()).collect();
    let at = |line| Origin::File { path: "f.toml".into(), line };
    assert!(lines.contains(&at(2)), "{problems}");
    // Whatever the bytes, it is an error or a configuration.
    for text in ["[", "=", "a=", "\u{0}", "[limits]\nrunning_max = 1\nrunning_max = 2\n"] {
        assert!(from_file(text).is_err(), "{text:?}");
    }
}

#[test]
fn the_effective_settings_read_back_as_the_same_configuration() {
    let flags = [
        flag("--set", "kv.pool_bytes", "3MiB"),
        flag("--set", "drain.delay_ms", "1500"),
        flag("--set", "compute.isa", "portable"),
        flag("--set", "limits.queued_bytes_max", "5000001"),
        flag("--model", "model.name", "./a \"b\".gguf"),
    ];
    let loaded = load(None, [], &flags).unwrap();
    let text = loaded.to_toml();
    assert_eq!(from_file(&text).unwrap().config, loaded.config, "{text}");
    assert!(text.contains("pool_bytes = \"3MiB\"") && text.contains("# flag --set"), "{text}");
}

#[test]
fn a_tenant_has_what_every_tenant_has_but_for_what_is_set_for_it_alone() {
    let file = TomlFile {
        path: "f.toml",
        text: "[tenant.acme]\nweight = 5\nclass_ceiling = \"default\"\n\
               [tenant.\"a.b \\\"c\\\"\"]\nstreams_max = 2\n\
               [tenants]\nrequests_per_second = 7\nstreams_max = 9\n",
    };
    let flags = [
        flag("--set", "tenant.acme.streams_max", "3"),
        flag("--set", "tenants.requests_burst", "70"),
        flag("--set", "tenant.acme.streams_max", "4"),
    ];
    let loaded = load(Some(file), [], &flags).unwrap();
    let quotas = &loaded.config.limits.quotas;
    let of_all =
        Quota { requests_per_second: 7, requests_burst: 70, streams_max: 9, ..Quota::UNLIMITED };
    let of = |name| quotas.of(&Name::new(name).unwrap());
    assert_eq!((quotas.tenant, of("other")), (of_all, of_all));
    let acme = Quota { weight: 5, class_ceiling: Class::Default, streams_max: 4, ..of_all };
    assert_eq!(of("acme"), acme);
    assert_eq!(of("a.b \"c\""), Quota { streams_max: 2, ..of_all });
    assert_eq!(quotas.named.len(), 2);
    let text = loaded.to_toml();
    assert_eq!(from_file(&text).unwrap().config, loaded.config, "{text}");
}

#[test]
fn wrong_settings_of_one_tenant_are_reported_as_they_were_written() {
    assert_eq!(
        complaint(from_file("[tenant.acme]\nweight = 0\n")),
        "tenant.acme.weight = \"0\" (f.toml line 2): must be a whole number from 1 to 1000"
    );
    let said = complaint(from_file("[tenant.acme]\n\nwait = 0\n"));
    assert!(said.starts_with("tenant.acme.wait (f.toml line 3): no setting"), "{said}");
    let said = complaint(from_file("[tenant]\nweight = 2\n"));
    assert!(said.starts_with("tenant.weight (f.toml line 2): no setting"), "{said}");
    let long = format!("tenant.{}.weight", "x".repeat(64));
    let said = complaint(load(None, [], &[flag("--set", &long, "2")]));
    assert!(said.contains("at most 63 bytes"), "{said}");
    let two = "[limits]\ntenants_max = 1\n[tenant.a]\nweight = 1\n[tenant.b]\nweight = 1\n";
    let said = complaint(from_file(two));
    assert!(
        said.starts_with("limits.tenants_max = 1 (f.toml line 2): must be at least 2"),
        "{said}"
    );
}

#[test]
fn a_quarter_of_the_free_memory_and_at_most_two_gibibytes_are_taken_unasked() {
    assert_eq!(Kv::automatic_bytes(4 << 30), 1 << 30);
    assert_eq!(Kv::automatic_bytes(64 << 30), 2 << 30);
}

#[test]
fn every_setting_is_described_with_its_default() {
    let text = describe_settings();
    assert!(text.contains("kv.pool_bytes"), "{text}");
    assert!(text.contains("must be one of auto, io_uring, epoll"), "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
}

proptest::proptest! {
    #[test]
    fn whatever_a_file_holds_it_is_a_configuration_or_a_list_of_problems(
        text in "[\\[\\]a-z_.=\" \n0-9#'{},-]{0,80}",
        key in "(limits|kv|server|stream)\\.[a-z_]{1,30}",
        value in ".{0,20}",
    ) {
        for text in [text, format!("{key} = {value}\n")] {
            if let Err(problems) = from_file(&text) {
                assert!(!problems.0.is_empty());
            }
        }
    }
}

#[test]
fn the_metrics_page_can_be_turned_off_and_is_for_this_machine_alone() {
    let listen = |value: &str| load(None, [], &[flag("--set", "metrics.listen", value)]);
    assert_eq!(listen("off").unwrap().config.metrics.listen, None);
    let address = listen("127.0.0.1:0").unwrap().config.metrics.listen;
    assert_eq!(address, Some("127.0.0.1:0".parse().unwrap()));
    assert!(listen("off").unwrap().to_toml().contains("listen = \"off\""));
    let said = complaint(listen("0.0.0.0:9464"));
    assert!(said.contains("loopback") && said.contains("off"), "{said}");
}
