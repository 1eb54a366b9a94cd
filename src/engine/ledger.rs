//! The ledger: what the queue holds, what it may hold, and how fast it drains.

use crate::base::Instant;
use crate::limits::Limits;
use crate::request::Class;

/// What a request occupies of the queue's bounds. It is estimated high when the request asks, and
/// from then on only ever shrinks: to the prompt's tokens when those are known, to nothing when
/// the request is admitted or ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Permit {
    class: Class,
    requests: u32,
    tokens: u32,
    bytes: u32,
}

impl Permit {
    /// Prompt tokens that it allows.
    pub fn tokens(&self) -> u32 {
        self.tokens
    }
}

/// A bound that stands in a request's way, and by how much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shortage {
    /// The request alone is over the bound: it can never come in.
    Forever,
    /// So many requests must leave first.
    Requests(u64),
    /// So many prompt tokens must leave first.
    Tokens(u64),
    /// So many bytes must leave first.
    Bytes(u64),
}

/// The sum of all permits, kept below its bounds.
#[derive(Debug)]
pub struct Ledger {
    requests_max: u32,
    tokens_max: u64,
    bytes_max: u64,
    requests: u32,
    tokens: u64,
    bytes: u64,
    /// Requests and prompt tokens of each class.
    by_class: [(u32, u64); Class::ALL.len()],
}

impl Ledger {
    /// An empty ledger with the queue's bounds.
    pub fn new(limits: &Limits) -> Ledger {
        Ledger {
            requests_max: limits.queued_requests_max,
            tokens_max: limits.queued_tokens_max,
            bytes_max: limits.queued_bytes_max,
            requests: 0,
            tokens: 0,
            bytes: 0,
            by_class: Default::default(),
        }
    }

    /// Grants a permit for a request, or says what is short when places for `kept_free` other
    /// requests must be left.
    pub fn take(
        &mut self,
        class: Class,
        tokens: u32,
        bytes: u32,
        kept_free: u32,
    ) -> Result<Permit, Shortage> {
        let (new_tokens, new_bytes) = (u64::from(tokens), u64::from(bytes));
        if new_tokens > self.tokens_max || new_bytes > self.bytes_max {
            return Err(Shortage::Forever);
        }
        let requests = self.requests.saturating_add(kept_free);
        if requests >= self.requests_max {
            return Err(Shortage::Requests(u64::from(requests + 1 - self.requests_max)));
        }
        if self.tokens + new_tokens > self.tokens_max {
            return Err(Shortage::Tokens(self.tokens + new_tokens - self.tokens_max));
        }
        if self.bytes + new_bytes > self.bytes_max {
            return Err(Shortage::Bytes(self.bytes + new_bytes - self.bytes_max));
        }
        self.requests += 1;
        self.tokens += new_tokens;
        self.bytes += new_bytes;
        self.by_class[class as usize].0 += 1;
        self.by_class[class as usize].1 += new_tokens;
        Ok(Permit { class, requests: 1, tokens, bytes })
    }

    /// Shrinks a permit to the tokens that the prompt really has. Never enlarges it.
    pub fn shrink(&mut self, permit: &mut Permit, tokens: u32) {
        let surplus = permit.tokens.saturating_sub(tokens);
        permit.tokens -= surplus;
        self.tokens -= u64::from(surplus);
        self.by_class[permit.class as usize].1 -= u64::from(surplus);
    }

    /// Takes a permit back. Giving an empty one back changes nothing.
    pub fn give(&mut self, permit: &mut Permit) {
        self.requests -= permit.requests;
        self.tokens -= u64::from(permit.tokens);
        self.bytes -= u64::from(permit.bytes);
        self.by_class[permit.class as usize].0 -= permit.requests;
        self.by_class[permit.class as usize].1 -= u64::from(permit.tokens);
        *permit = Permit::default();
    }

    /// Requests, prompt tokens and bytes that hold permits.
    pub fn held(&self) -> (u32, u64, u64) {
        (self.requests, self.tokens, self.bytes)
    }

    /// Requests and prompt tokens that come before a newcomer of this class.
    pub fn ahead_of(&self, class: Class) -> (u32, u64) {
        let not_after = &self.by_class[..=class as usize];
        not_after.iter().fold((0, 0), |sum, held| (sum.0 + held.0, sum.1 + held.1))
    }

    /// Checks that these permits are all there are and that the bounds hold.
    pub fn check<'a>(&self, permits: impl Iterator<Item = &'a Permit>) -> Result<(), String> {
        let mut sum = (0_u32, 0_u64, 0_u64);
        for permit in permits {
            sum.0 += permit.requests;
            sum.1 += u64::from(permit.tokens);
            sum.2 += u64::from(permit.bytes);
        }
        if sum != self.held() {
            return Err(format!("permits sum to {sum:?}, the ledger says {:?}", self.held()));
        }
        if self.ahead_of(Class::Bulk) != (sum.0, sum.1) {
            return Err(format!("the classes hold {:?}", self.by_class));
        }
        let within =
            sum.0 <= self.requests_max && sum.1 <= self.tokens_max && sum.2 <= self.bytes_max;
        if within { Ok(()) } else { Err(format!("the queue is over its bounds: {sum:?}")) }
    }
}

/// How fast the queue drains, from the departures seen.
///
/// Integer averages over about the last eight departures.
#[derive(Debug, Default)]
pub struct DrainMeter {
    /// Average time between departures while somebody waited. 0 until the first.
    interval_ns: u64,
    /// Average prompt tokens and bytes of a departing request.
    tokens: u64,
    bytes: u64,
    /// When the running interval began; `None` while the queue is empty.
    since: Option<Instant>,
    /// Departures at that very moment: one step may admit several.
    together: u64,
}

/// Believed before anything has been measured.
const WAIT_UNKNOWN_NS: u64 = 1_000_000_000;
/// The newest observation's weight in an average is one in so many.
const AVERAGE_OVER: u64 = 8;

impl DrainMeter {
    /// Somebody came into the queue.
    pub fn handle_arrival(&mut self, now: Instant) {
        if self.since.is_none() {
            self.since = Some(now);
            self.together = 0;
        }
    }

    /// Somebody left the queue, for whatever reason; `left` are still in it.
    pub fn handle_departure(&mut self, now: Instant, permit: &Permit, left: u32) {
        average(&mut self.tokens, u64::from(permit.tokens));
        average(&mut self.bytes, u64::from(permit.bytes));
        self.together += 1;
        let Some(since) = self.since else { return };
        let elapsed_ns = now.ns_since(since);
        if elapsed_ns > 0 {
            average(&mut self.interval_ns, elapsed_ns / self.together);
            self.since = Some(now);
            self.together = 0;
        }
        if left == 0 {
            self.since = None;
        }
    }

    /// How long until `departures` more have left. The running interval counts when it is longer
    /// than the average: a queue that has stopped draining says so.
    pub fn wait_ns(&self, now: Instant, departures: u64) -> Option<u64> {
        self.apart_ns(now).map(|apart_ns| apart_ns.saturating_mul(departures))
    }

    /// Time between two departures as believed now; `None` while nothing is known.
    pub fn apart_ns(&self, now: Instant) -> Option<u64> {
        let since_last_ns = self.since.map_or(0, |since| now.ns_since(since));
        (self.interval_ns > 0).then(|| self.interval_ns.max(since_last_ns))
    }

    /// How long until there is room for what is short; `None`: never.
    pub fn room_ns(&self, now: Instant, shortage: Shortage) -> Option<u64> {
        let departures = match shortage {
            Shortage::Forever => return None,
            Shortage::Requests(requests) => requests,
            Shortage::Tokens(tokens) => tokens.div_ceil(self.tokens.max(1)),
            Shortage::Bytes(bytes) => bytes.div_ceil(self.bytes.max(1)),
        };
        Some(self.wait_ns(now, departures).unwrap_or(WAIT_UNKNOWN_NS))
    }
}

/// Moves an average towards what was observed; the first observation is taken as it is.
fn average(average: &mut u64, observed: u64) {
    *average = match *average {
        0 => observed,
        old => (old * (AVERAGE_OVER - 1)).saturating_add(observed) / AVERAGE_OVER,
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn at_ms(ms: u64) -> Instant {
        Instant::ZERO.plus_ms(ms)
    }

    #[test]
    fn a_permit_only_shrinks_and_the_ledger_follows() {
        let mut ledger = Ledger::new(&Limits::tiny());
        let mut permit = ledger.take(Class::Default, 400, 900, 0).unwrap();
        assert_eq!(ledger.held(), (1, 400, 900));
        ledger.shrink(&mut permit, 120);
        ledger.shrink(&mut permit, 500);
        assert_eq!((permit.tokens(), ledger.held()), (120, (1, 120, 900)));
        assert_eq!(ledger.check([&permit].into_iter()), Ok(()));
        ledger.give(&mut permit);
        ledger.give(&mut permit);
        assert_eq!(ledger.held(), (0, 0, 0));
    }

    #[test]
    fn each_bound_of_the_queue_refuses_and_says_how_much_is_short() {
        let limits = Limits::tiny();
        let mut ledger = Ledger::new(&limits);
        assert_eq!(ledger.take(Class::Default, 1025, 1, 0), Err(Shortage::Forever));
        assert_eq!(ledger.take(Class::Default, 1, 8193, 0), Err(Shortage::Forever));
        ledger.take(Class::Default, 1000, 8000, 0).unwrap();
        assert_eq!(ledger.take(Class::Default, 30, 1, 0), Err(Shortage::Tokens(6)));
        assert_eq!(ledger.take(Class::Default, 1, 200, 0), Err(Shortage::Bytes(8)));
        for _ in 1..limits.queued_requests_max {
            ledger.take(Class::Default, 1, 1, 0).unwrap();
        }
        assert_eq!(ledger.take(Class::Default, 1, 1, 0), Err(Shortage::Requests(1)));
        assert_eq!(ledger.take(Class::Default, 1, 1, 2), Err(Shortage::Requests(3)));
    }

    #[test]
    fn the_time_until_there_is_room_follows_the_drain() {
        let mut meter = DrainMeter::default();
        let permit = Permit { class: Class::Default, requests: 1, tokens: 100, bytes: 400 };
        assert_eq!(meter.room_ns(at_ms(0), Shortage::Requests(1)), Some(1000 * MS), "a guess");
        meter.handle_arrival(at_ms(0));
        for n in 1..=10 {
            meter.handle_departure(at_ms(20 * n), &permit, 4);
        }
        let now = at_ms(200);
        assert_eq!(meter.room_ns(now, Shortage::Requests(1)), Some(20 * MS));
        assert_eq!(meter.room_ns(now, Shortage::Tokens(250)), Some(60 * MS), "3 must leave");
        assert_eq!(meter.room_ns(now, Shortage::Forever), None);
        assert_eq!(meter.wait_ns(at_ms(700), 2), Some(1000 * MS), "nobody has left for 500 ms");
    }

    #[test]
    fn several_that_leave_together_share_the_interval() {
        let mut meter = DrainMeter::default();
        let permit = Permit { class: Class::Default, requests: 1, tokens: 1, bytes: 1 };
        meter.handle_arrival(at_ms(0));
        for n in 1..=200 {
            for _ in 0..4 {
                meter.handle_departure(at_ms(40 * n), &permit, 9);
            }
        }
        assert_eq!(meter.wait_ns(at_ms(8000), 1), Some(10 * MS));
    }

    #[test]
    fn time_without_anybody_waiting_does_not_count() {
        let mut meter = DrainMeter::default();
        let permit = Permit { class: Class::Default, requests: 1, tokens: 1, bytes: 1 };
        for n in 0..10 {
            meter.handle_arrival(at_ms(100_000 * n));
            meter.handle_departure(at_ms(100_000 * n + 5), &permit, 0);
        }
        assert_eq!(meter.wait_ns(at_ms(2_000_000), 1), Some(5 * MS));
    }
}
