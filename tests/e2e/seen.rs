//! What a server shows of itself to whoever asks.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use forebay::request::FinishReason;

use crate::rig::{FLAVOURS, Rig, ask, exactly, stat};

fn fetch(address: SocketAddr) -> String {
    let mut socket = TcpStream::connect(address).unwrap();
    socket.write_all(b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n").unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    answer
}

/// A metric's value, by its name and labels, the model's name among them left out.
fn metric(page: &str, name: &str) -> f64 {
    let plain = page.replace("model_name=\"smollm2-135m\",", "");
    let plain = plain.replace("{model_name=\"smollm2-135m\"}", "");
    let line = plain.lines().find_map(|line| line.strip_prefix(&format!("{name} ")));
    line.unwrap_or_else(|| panic!("{name} is not in {page}")).parse().unwrap()
}

#[test]
fn the_metrics_page_and_the_stats_frame_tell_the_same_of_what_happened() {
    for flavour in FLAVOURS {
        let rig = Rig::start_with(flavour, |config| {
            config.metrics.listen = Some("127.0.0.1:0".parse().unwrap());
        });
        let client = rig.connect();
        let answer = ask(&client, exactly("Once upon a time", 5));
        assert_eq!(answer.done().finish, FinishReason::MaxTokens);
        rig.wait_until_idle();
        let address = rig.server().metrics_address().unwrap();
        let page = fetch(address);
        for (name, wanted) in [
            ("vllm:num_requests_running", 0.0),
            ("vllm:num_requests_waiting", 0.0),
            ("vllm:kv_cache_usage_perc", 0.0),
            ("vllm:generation_tokens_total", 5.0),
            ("vllm:request_success_total{finished_reason=\"length\"}", 1.0),
            ("vllm:time_to_first_token_seconds_count", 1.0),
            ("vllm:inter_token_latency_seconds_count", 4.0),
            ("vllm:e2e_request_latency_seconds_bucket{le=\"+Inf\"}", 1.0),
            ("forebay_front_requests_done_total", 1.0),
            ("forebay_engine_finished_total{reason=\"max_tokens\"}", 1.0),
            ("forebay_engine_step_foreseen_total", 5.0),
        ] {
            assert_eq!(metric(&page, name), wanted, "{name}");
        }
        let blocks = stat(&client, "engine_kv_blocks_total");
        assert_eq!(metric(&page, "forebay_engine_kv_blocks_total"), blocks as f64);
        let device_s = stat(&client, "engine_device_ns") as f64 / 1e9;
        assert_eq!(metric(&page, "forebay_engine_device_seconds_total"), device_s);
        rig.end();
        assert!(TcpStream::connect(address).is_err(), "the door closes with the server");
    }
}
