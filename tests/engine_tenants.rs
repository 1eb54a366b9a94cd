//! Tenants in the engine: quotas at the door, settled to the token at the end.

#[path = "common/engine.rs"]
mod bench;

use bench::{A, Bench, END, Told, Want};
use forebay::base::board::Tell;
use forebay::engine::tenants::{Tally, TenantStats};
use forebay::limits::{Limits, Quota, Quotas};
use forebay::message::SeqKey;
use forebay::request::{Class, FinishReason, Name, RejectReason};

fn limits(tenant: Quota) -> Limits {
    let quotas = Quotas { tenant, ..Quotas::default() };
    Limits { queued_requests_max: 8, quotas, ..Limits::tiny() }
}

fn of(tenant: &'static str) -> Want {
    Want { tenant, ..Want::default() }
}

fn answer_to(bench: &mut Bench, want: &Want) -> Told {
    let stream = bench.ask(want);
    bench.settle();
    bench.told(stream).remove(0)
}

fn is_granted(bench: &mut Bench, want: &Want) -> bool {
    matches!(answer_to(bench, want), Told::Grant(_))
}

fn tally(bench: &Bench, tenant: &str) -> Tally {
    let is_it = |stats: &TenantStats| stats.tenant.as_str() == tenant && stats.user == Name::EMPTY;
    bench.engine.tenants().find(is_it).expect("it has asked").tally
}

/// Serves a request to its end; the answers are `output` long.
fn serve(bench: &mut Bench, want: &Want, output: usize) {
    bench.accepted(want);
    for _ in 1..output {
        bench.step(A);
    }
    let token = if output == want.max_tokens as usize { A } else { END };
    bench.step(token);
    assert_eq!(bench.engine.pending().count(), 0);
}

#[test]
fn who_asks_too_often_is_refused_with_the_time_at_which_it_will_be_granted() {
    let quota = Quota { requests_per_second: 4, requests_burst: 2, ..Quota::UNLIMITED };
    let mut bench = Bench::new(&limits(quota), 8);
    assert!(is_granted(&mut bench, &of("a")) && is_granted(&mut bench, &of("a")));
    let told = answer_to(&mut bench, &of("a"));
    assert_eq!(told, Told::Reject(RejectReason::TenantRate, Some(250)));
    assert!(is_granted(&mut bench, &of("b")), "that is no matter of another tenant's");
    bench.pass_ms(249);
    assert!(!is_granted(&mut bench, &of("a")));
    bench.pass_ms(1);
    assert!(is_granted(&mut bench, &of("a")));
    let counters = bench.stats().counters;
    assert_eq!(counters.rejected[RejectReason::TenantRate as usize], 2);
    let mut named = Vec::new();
    bench.stats().tell(|number, value| named.push((number.name, value)));
    assert!(named.contains(&("engine_rejected_tenant_rate", 2)), "{named:?}");
    let tally = tally(&bench, "a");
    assert_eq!((tally.requests, tally.refused, tally.live), (5, 2, 3));
}

#[test]
fn a_bucket_that_needs_long_says_so_and_is_right() {
    let quota = Quota { requests_per_minute: 1, ..Quota::UNLIMITED };
    let limits = Limits { queue_ttl_ms: 1_000, ..limits(quota) };
    let mut bench = Bench::new(&limits, 8);
    assert!(is_granted(&mut bench, &of("a")));
    let told = answer_to(&mut bench, &of("a"));
    assert_eq!(told, Told::Reject(RejectReason::TenantRate, Some(60_000)));
    bench.pass_ms(59_999);
    assert!(!is_granted(&mut bench, &of("a")));
    bench.pass_ms(1);
    assert!(is_granted(&mut bench, &of("a")));
}

#[test]
fn a_refusal_by_anybody_else_costs_the_tenant_nothing() {
    let quota = Quota { requests_per_second: 1, ..Quota::UNLIMITED };
    let mut bench = Bench::new(&Limits { queued_requests_max: 1, ..limits(quota) }, 8);
    let (_, other) = bench.granted(&of("other"));
    let told = answer_to(&mut bench, &of("a"));
    assert!(matches!(told, Told::Reject(RejectReason::QueueFull, Some(_))), "{told:?}");
    bench.cancel(other);
    assert!(is_granted(&mut bench, &of("a")));
}

#[test]
fn streams_are_counted_from_grant_to_end_wherever_they_are() {
    let quota = Quota { streams_max: 3, ..Quota::UNLIMITED };
    let mut bench = Bench::new(&Limits { running_max: 2, ..limits(quota) }, 8);
    let (_, parks) = bench.accepted(&Want { window: 1, ..of("a") });
    bench.step(A);
    let (runs, _) = bench.accepted(&of("a"));
    let (_, granted) = bench.granted(&of("a"));
    assert_eq!((bench.stats().parked, bench.stats().running, bench.stats().granted), (1, 1, 1));
    let told = answer_to(&mut bench, &of("a"));
    let Told::Reject(RejectReason::TooManyStreams, Some(wait_ms)) = told else {
        panic!("{told:?}")
    };
    assert!(wait_ms >= 1);
    assert!(is_granted(&mut bench, &of("b")));
    bench.cancel(granted);
    assert!(is_granted(&mut bench, &of("a")));
    bench.cancel(parks);
    assert!(is_granted(&mut bench, &of("a")));
    bench.steps(A, 10);
    assert!(matches!(bench.told(runs).last(), Some(Told::Done(FinishReason::MaxTokens, _))));
    assert!(is_granted(&mut bench, &of("a")));
    assert!(!is_granted(&mut bench, &of("a")));
}

#[test]
fn a_class_above_the_ceiling_is_lowered_to_it_and_one_below_stays() {
    let quota = Quota { class_ceiling: Class::Default, ..Quota::UNLIMITED };
    let mut bench = Bench::new(&Limits { running_max: 1, ..limits(quota) }, 8);
    bench.accepted(&of("runs"));
    for class in [Class::System, Class::Default, Class::Bulk] {
        bench.accepted(&Want { class, ..of("a") });
    }
    assert_eq!(bench.stats().queued, [0, 0, 2, 1]);
    assert_eq!(bench.stats().counters.classes_lowered, 1);
}

#[test]
fn a_named_tenant_has_a_quota_of_its_own() {
    let named = Quota { streams_max: 1, ..Quota::UNLIMITED };
    let mut limits = limits(Quota::UNLIMITED);
    limits.quotas.named.push((Name::new("small").unwrap(), named));
    let mut bench = Bench::new(&limits, 8);
    assert!(is_granted(&mut bench, &of("small")) && !is_granted(&mut bench, &of("small")));
    assert!(is_granted(&mut bench, &of("other")) && is_granted(&mut bench, &of("other")));
}

#[test]
fn users_have_quotas_within_their_tenant_and_none_without_a_name() {
    let mut limits = limits(Quota { streams_max: 3, ..Quota::UNLIMITED });
    limits.quotas.user.streams_max = 1;
    let mut bench = Bench::new(&limits, 8);
    let by = |user| Want { user, ..of("a") };
    assert!(is_granted(&mut bench, &by("ann")) && !is_granted(&mut bench, &by("ann")));
    assert!(is_granted(&mut bench, &Want { user: "ann", ..of("b") }), "another ann");
    assert!(is_granted(&mut bench, &of("a")) && is_granted(&mut bench, &of("a")));
    assert!(!is_granted(&mut bench, &by("bob")), "the tenant has three");
}

#[test]
fn input_is_charged_by_the_estimate_and_corrected_when_the_tokens_are_known() {
    let quota = Quota { input_tokens_per_second: 1, input_tokens_burst: 100, ..Quota::UNLIMITED };
    let mut bench = Bench::new(&limits(quota), 8);
    let long = Want { prompt: 80, ..of("a") };
    let (stream, seq) = bench.granted(&long);
    assert!(!is_granted(&mut bench, &Want { prompt: 21, ..of("a") }));
    bench.submit(stream, seq, &Want { prompt: 10, ..of("a") });
    bench.settle();
    // 90 are left.
    assert!(!is_granted(&mut bench, &Want { prompt: 91, ..of("a") }));
    let (_, seq) = bench.granted(&Want { prompt: 90, ..of("a") });
    assert!(!is_granted(&mut bench, &of("a")));
    bench.cancel(seq);
    assert!(is_granted(&mut bench, &Want { prompt: 90, ..of("a") }), "it was never computed");
    assert_eq!(tally(&bench, "a").tokens_in, 10);
}

#[test]
fn output_beyond_the_forecast_becomes_a_debt_that_is_paid_before_the_next_grant() {
    let quota = Quota { output_tokens_per_second: 10, output_tokens_burst: 20, ..Quota::UNLIMITED };
    let mut bench = Bench::new(&limits(quota), 8);
    // Answers are of one token so far: that is what is foreseen.
    let want = Want { max_tokens: 30, ..of("a") };
    for _ in 0..4 {
        serve(&mut bench, &Want { max_tokens: 1, ..want.clone() }, 1);
        bench.pass_ms(2_000);
    }
    let (stream, seq) = bench.accepted(&want);
    assert!(is_granted(&mut bench, &want), "19 of 20 are there");
    for _ in 0..30 {
        bench.credit(seq, 1);
        bench.step(A);
    }
    assert!(matches!(bench.told(stream).last(), Some(Told::Done(FinishReason::MaxTokens, _))));
    // Of 20 tokens, 30 are used and one is kept for the stream that was granted: -11, and what
    // flowed in meanwhile. One more makes 12.
    let told = answer_to(&mut bench, &want);
    let Told::Reject(RejectReason::TenantRate, Some(wait_ms)) = told else { panic!("{told:?}") };
    assert!((1_100..=1_300).contains(&wait_ms), "{wait_ms}");
    bench.pass_ms(u64::from(wait_ms));
    assert!(is_granted(&mut bench, &want));
    assert_eq!(tally(&bench, "a").tokens_out, 34);
}

#[test]
fn what_was_foreseen_and_not_produced_comes_back_whatever_the_end() {
    let quota = Quota { output_tokens_per_second: 1, output_tokens_burst: 8, ..Quota::UNLIMITED };
    type End = fn(&mut Bench, SeqKey);
    let ends: [(&str, u32, End); 4] = [
        ("cancelled before it was submitted", 0, |bench, seq| bench.cancel(seq)),
        ("expired before it was submitted", 0, |bench, _| bench.pass_ms(5_000)),
        ("cancelled while it ran", 1, |bench, seq| {
            bench.step(A);
            bench.cancel(seq);
        }),
        ("short", 1, |bench, _| {
            bench.step(A);
            bench.step(END);
        }),
    ];
    for (what, produced, end) in ends {
        let mut bench = Bench::new(&limits(quota), 8);
        let want = Want { max_tokens: 8, ..of("a") };
        let (stream, seq) = bench.granted(&want);
        if produced > 0 {
            bench.submit(stream, seq, &want);
            bench.settle();
        }
        let one = Want { max_tokens: 1, ..of("a") };
        assert!(!is_granted(&mut bench, &one), "{what}: all is taken");
        end(&mut bench, seq);
        assert_eq!(bench.engine.pending().count(), 0, "{what}");
        let granted = (0..8).filter(|_| is_granted(&mut bench, &one)).count() as u32;
        assert_eq!(granted, 8 - produced, "{what}");
    }
}
