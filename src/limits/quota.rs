//! What a tenant, or one of its users, may take.

use crate::request::{Class, Name};

/// What one account may take. A limit of 0 is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    /// Requests granted in a second.
    pub requests_per_second: u32,
    /// Requests granted at once after a rest; 0: those of a second.
    pub requests_burst: u32,
    /// Requests granted in a minute, all at once if need be.
    pub requests_per_minute: u32,
    /// Prompt tokens in a second.
    pub input_tokens_per_second: u32,
    /// Prompt tokens at once after a rest; 0: those of a second. A longer prompt waits for all of
    /// them and leaves a debt.
    pub input_tokens_burst: u32,
    /// Output tokens in a second. A request is charged with a forecast, and with the rest, or less
    /// what it did not use, at its end.
    pub output_tokens_per_second: u32,
    /// Output tokens at once after a rest; 0: those of a second. As with prompts.
    pub output_tokens_burst: u32,
    /// Streams at once: from grant to end, whether queued, running or parked.
    pub streams_max: u32,
    /// Its share beside others'. At least 1.
    pub weight: u32,
    /// The most urgent class it may use: what asks for more is lowered to it.
    pub class_ceiling: Class,
}

impl Quota {
    /// Whatever it likes, and an equal share.
    pub const UNLIMITED: Quota = Quota {
        requests_per_second: 0,
        requests_burst: 0,
        requests_per_minute: 0,
        input_tokens_per_second: 0,
        input_tokens_burst: 0,
        output_tokens_per_second: 0,
        output_tokens_burst: 0,
        streams_max: 0,
        weight: 1,
        class_ceiling: Class::System,
    };
}

/// Everybody's quotas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quotas {
    /// Of a tenant that is not named.
    pub tenant: Quota,
    /// Of those that are, sorted by name.
    pub named: Vec<(Name, Quota)>,
    /// Of each user within its tenant; [`Quota::UNLIMITED`]: users are not told apart.
    pub user: Quota,
}

impl Quotas {
    /// A tenant's.
    pub fn of(&self, tenant: &Name) -> Quota {
        match self.named.binary_search_by(|(name, _)| name.cmp(tenant)) {
            Ok(at) => self.named[at].1,
            Err(_) => self.tenant,
        }
    }
}

impl Default for Quotas {
    fn default() -> Quotas {
        Quotas { tenant: Quota::UNLIMITED, named: Vec::new(), user: Quota::UNLIMITED }
    }
}
