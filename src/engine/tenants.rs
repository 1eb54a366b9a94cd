//! Tenants: who may take how much, and who has taken what.
//!
//! An account is kept for every tenant that asks, and, where users have quotas, for every user of a
//! tenant, in a table of fixed size. A request is charged to both, or to neither: all of their
//! buckets are looked at first, and only when none of them stands in the way is it taken from each.
//!
//! **What is charged.** A request, when it is granted. Its prompt by the estimate of the ask; what
//! that was too high comes back when the prompt's tokens are known, and all of it if the request is
//! never admitted. Its output by a forecast (what three of four answers to this tenant stay within,
//! and at most what it asked for); at the end the account is settled: what was not produced comes
//! back, what was produced beyond it becomes a debt, which the next refills pay before anything
//! else is granted. So over any time a tenant gets its rate, and what can be off is what its own
//! streams of the moment overran.
//!
//! **More than a burst.** A prompt, or a forecast, that is larger than the whole bucket could never
//! be taken from it. It is let in when the bucket is full, and leaves a debt.
//!
//! **Who makes room.** When the table is full, the account that has rested longest. One with
//! streams or with a debt stays, or both could be got rid of by a flood of made-up names; so do
//! those that the configuration names. When nobody can make room, newcomers share one account (one
//! for tenants, one for users), which has the quota of a single one.

use crate::base::Instant;
use crate::flow::{OutputForecast, Shortage, TokenBucket};
use crate::limits::{Limits, Quota, Quotas};
use crate::message::Ask;
use crate::request::{Class, Name};

use super::EngineCore;
use super::fair::{self, Shares};
use super::queue;
use super::sequence::NONE;

/// Of 1,000 answers, those that the forecast should cover. It only sets how many streams a tenant
/// with a bound on output gets going at once: what it pays is settled to the token.
const FORECAST_PERMILLE: u32 = 750;

/// Parts of a request in the bucket of a minute: one flows in a second for each request that a
/// minute may have.
const MINUTE_PARTS: u64 = 60;

/// The account that tenants share for whom there is no room, and that for users.
const SHARED_BY_TENANTS: u32 = 0;
const SHARED_BY_USERS: u32 = 1;
const SHARED: usize = 2;

/// Bytes of an account, with its place in the order of names, its forecast, its share and its lists
/// in the queue.
pub(super) const BYTES: usize = size_of::<Account>()
    + size_of::<u32>()
    + OutputForecast::KEY_BYTES
    + fair::BYTES
    + queue::FLOW_BYTES;

/// Whose account it is. A tenant's own has no user.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Owner {
    tenant: Name,
    user: Name,
}

/// A bucket that also gives what is larger than itself.
#[derive(Clone, Debug)]
struct Meter {
    bucket: TokenBucket,
    burst: u64,
}

impl Meter {
    fn new(rate: u64, burst: u64, now: Instant) -> Option<Meter> {
        // Debt needs no bound of its own: it is what streams produced that had been granted.
        let full = || Meter { bucket: TokenBucket::new(rate, burst, u64::MAX, now), burst };
        (rate > 0).then(full)
    }

    /// A rate by second, with the burst of a second if none is named.
    fn by_second(rate: u32, burst: u32, now: Instant) -> Option<Meter> {
        Meter::new(rate.into(), if burst == 0 { rate } else { burst }.into(), now)
    }

    fn wait_ns(&mut self, n: u64, now: Instant) -> u64 {
        match self.bucket.wait_ns(n.min(self.burst), now) {
            Ok(ns) | Err(Shortage::Wait { ns }) => ns,
            Err(Shortage::Never) => unreachable!("no more than the burst, at a rate above 0"),
        }
    }

    fn debt(&mut self, now: Instant) -> u64 {
        self.bucket.debt(now)
    }
}

/// All that is measured of one account; `None` has no limit.
#[derive(Clone, Debug)]
struct Meters {
    second: Option<Meter>,
    minute: Option<Meter>,
    input: Option<Meter>,
    output: Option<Meter>,
}

impl Meters {
    fn new(quota: &Quota, now: Instant) -> Meters {
        let minute = u64::from(quota.requests_per_minute);
        Meters {
            second: Meter::by_second(quota.requests_per_second, quota.requests_burst, now),
            minute: Meter::new(minute, minute * MINUTE_PARTS, now),
            input: Meter::by_second(quota.input_tokens_per_second, quota.input_tokens_burst, now),
            output: Meter::by_second(
                quota.output_tokens_per_second,
                quota.output_tokens_burst,
                now,
            ),
        }
    }

    /// Each meter with what the request takes of it.
    fn with(&mut self, bill: &Bill) -> [(&mut Option<Meter>, u64); 4] {
        [
            (&mut self.second, 1),
            (&mut self.minute, MINUTE_PARTS),
            (&mut self.input, bill.input.into()),
            (&mut self.output, bill.output.into()),
        ]
    }

    /// Until all of them have what the request takes.
    fn wait_ns(&mut self, bill: &Bill, now: Instant) -> u64 {
        let waits = self
            .with(bill)
            .into_iter()
            .map(|(meter, n)| meter.as_mut().map_or(0, |meter| meter.wait_ns(n, now)));
        waits.max().unwrap_or(0)
    }

    fn charge(&mut self, bill: &Bill, now: Instant) {
        for (meter, n) in self.with(bill) {
            if let Some(meter) = meter {
                meter.bucket.charge(n, now);
            }
        }
    }

    fn has_debt(&mut self, now: Instant) -> bool {
        let mut both = [&mut self.input, &mut self.output].into_iter().flatten();
        both.any(|meter| meter.debt(now) > 0)
    }
}

/// Settles what was charged with what was used.
fn settle(meter: &mut Option<Meter>, charged: u32, used: u32, now: Instant) {
    let Some(Meter { bucket, .. }) = meter else { return };
    match charged.checked_sub(used) {
        Some(over) => bucket.refund(over.into(), now),
        None => bucket.charge((used - charged).into(), now),
    }
}

/// What was counted for an account since it was opened, and what it holds now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Asks, granted or not.
    pub requests: u64,
    /// Those refused by the engine, or evicted.
    pub refused: u64,
    /// Prompt tokens of requests that were admitted.
    pub tokens_in: u64,
    /// Output tokens.
    pub tokens_out: u64,
    /// Streams now: granted, queued or admitted.
    pub live: u32,
    /// Streams admitted now: running, waiting for a slot or parked.
    pub admitted: u32,
}

#[derive(Debug)]
struct Account {
    owner: Owner,
    /// Stays, whatever happens.
    pinned: bool,
    streams_max: u32,
    class_ceiling: Class,
    meters: Meters,
    tally: Tally,
    /// Neighbours in the list of those that rest.
    previous: u32,
    next: u32,
}

impl Account {
    fn new(owner: Owner, quota: &Quota, pinned: bool, now: Instant) -> Account {
        Account {
            owner,
            pinned,
            streams_max: quota.streams_max,
            class_ceiling: quota.class_ceiling,
            meters: Meters::new(quota, now),
            tally: Tally::default(),
            previous: NONE,
            next: NONE,
        }
    }
}

/// Who pays for a request, and what was charged for it so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bill {
    /// The tenant's account; [`NONE`] for no bill at all.
    pub tenant: u32,
    /// The user's, if it has one.
    pub user: u32,
    /// Prompt tokens charged.
    pub input: u32,
    /// Output tokens charged.
    pub output: u32,
}

impl Bill {
    /// Nobody's.
    pub const NONE: Bill = Bill { tenant: NONE, user: NONE, input: 0, output: 0 };

    fn accounts(&self) -> impl Iterator<Item = usize> + use<> {
        [self.tenant, self.user].into_iter().filter(|&at| at != NONE).map(|at| at as usize)
    }
}

/// What an account does not allow now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It has as many streams as it may, so many.
    Streams(u32),
    /// A bucket has too little; in this time it will have enough if nobody else takes any.
    Rate { wait_ns: u64 },
}

/// All accounts. Never allocates after construction.
#[derive(Debug)]
pub(super) struct Tenants {
    /// The shared ones, then those of the table: named ones first, which are never dropped.
    accounts: Vec<Account>,
    accounts_max: usize,
    /// Those of the table, by owner.
    by_owner: Vec<u32>,
    /// Accounts that rest (no stream, and not pinned), from the one that rests longest on.
    rest_first: u32,
    rest_last: u32,
    quotas: Quotas,
    forecast: OutputForecast,
    /// What each account was served, for its turn.
    pub shares: Shares,
    /// Asks for which there was no account but a shared one.
    pub shared_asks: u64,
}

impl Tenants {
    /// The named tenants' accounts, and room for others, `limits.tenants_max` in all.
    pub fn new(limits: &Limits) -> Tenants {
        let mut quotas = limits.quotas.clone();
        quotas.named.sort_unstable_by_key(|(name, _)| *name);
        let accounts_max = SHARED + (limits.tenants_max as usize).max(quotas.named.len());
        let mut accounts = Vec::with_capacity(accounts_max);
        for quota in [&quotas.tenant, &quotas.user] {
            accounts.push(Account::new(Owner::default(), quota, true, Instant::ZERO));
        }
        for (tenant, quota) in &quotas.named {
            let owner = Owner { tenant: *tenant, user: Name::EMPTY };
            accounts.push(Account::new(owner, quota, true, Instant::ZERO));
        }
        // They are sorted by name, and so by owner.
        let mut by_owner = Vec::with_capacity(accounts_max);
        by_owner.extend(SHARED as u32..accounts.len() as u32);
        let mut shares = Shares::new(accounts_max);
        shares.begin(SHARED_BY_TENANTS, quotas.tenant.weight);
        for (at, (_, quota)) in (SHARED as u32..).zip(&quotas.named) {
            shares.begin(at, quota.weight);
        }
        Tenants {
            accounts,
            accounts_max,
            by_owner,
            rest_first: NONE,
            rest_last: NONE,
            quotas,
            forecast: OutputForecast::new(accounts_max),
            shares,
            shared_asks: 0,
        }
    }

    /// How many accounts there can be: their indices are below this.
    pub fn accounts_max(&self) -> usize {
        self.accounts_max
    }

    /// The accounts that an ask goes to, opened if they are new. Counts the ask.
    pub fn bill_for(&mut self, ask: &Ask, now: Instant) -> Bill {
        let owner = Owner { tenant: ask.tenant, user: Name::EMPTY };
        let tenant = self.find_or_open(owner, NONE, now);
        let has_user = ask.user != Name::EMPTY && self.quotas.user != Quota::UNLIMITED;
        let user = match has_user {
            true => self.find_or_open(Owner { user: ask.user, ..owner }, tenant, now),
            false => NONE,
        };
        let bill = Bill { tenant, user, ..Bill::NONE };
        bill.accounts().for_each(|at| self.accounts[at].tally.requests += 1);
        bill
    }

    /// The class that a request is treated as.
    pub fn class_for(&self, bill: &Bill, asked: Class) -> Class {
        asked.max(self.accounts[bill.tenant as usize].class_ceiling)
    }

    /// What the request would be charged, unless somebody who pays for it may not have it now.
    /// Takes nothing.
    pub fn quote(
        &mut self,
        ask: &Ask,
        bill: Bill,
        context: u32,
        now: Instant,
    ) -> Result<Bill, Refusal> {
        let mut bill = Bill { input: ask.input_tokens.min(context), ..bill };
        if bill.accounts().any(|at| self.accounts[at].meters.output.is_some()) {
            let most = if ask.max_tokens == 0 { context } else { ask.max_tokens.min(context) };
            bill.output = self.forecast.tokens(key_of(&ask.tenant), FORECAST_PERMILLE, most);
        }
        let mut wait_ns = 0;
        for at in bill.accounts() {
            let Account { streams_max, tally, meters, .. } = &mut self.accounts[at];
            if *streams_max > 0 && tally.live >= *streams_max {
                return Err(Refusal::Streams(tally.live));
            }
            wait_ns = wait_ns.max(meters.wait_ns(&bill, now));
        }
        if wait_ns == 0 { Ok(bill) } else { Err(Refusal::Rate { wait_ns }) }
    }

    /// Charges what was quoted: a stream begins.
    pub fn charge(&mut self, bill: &Bill, now: Instant) {
        for at in bill.accounts() {
            if self.accounts[at].tally.live == 0 {
                self.stop_resting(at as u32);
            }
            self.accounts[at].tally.live += 1;
            self.accounts[at].meters.charge(bill, now);
        }
    }

    /// The prompt has so many tokens, and not more than was charged.
    pub fn shrink(&mut self, bill: &mut Bill, prompt_tokens: u32, now: Instant) {
        let input = bill.input.min(prompt_tokens);
        for at in bill.accounts() {
            settle(&mut self.accounts[at].meters.input, bill.input, input, now);
        }
        bill.input = input;
    }

    /// The request is admitted: its prompt will be computed. `is_fair`: because it was its
    /// tenant's turn.
    pub fn admit(&mut self, bill: &Bill, class: Class, prompt_tokens: u32, is_fair: bool) {
        self.shares.pick(bill.tenant, class, prompt_tokens, is_fair);
        for at in bill.accounts() {
            let tally = &mut self.accounts[at].tally;
            tally.admitted += 1;
            tally.tokens_in += u64::from(prompt_tokens);
        }
    }

    /// A token was produced for it.
    pub fn produce(&mut self, bill: &Bill) {
        self.shares.produce(bill.tenant);
        bill.accounts().for_each(|at| self.accounts[at].tally.tokens_out += 1);
    }

    /// The ask, or the request before it was admitted, was refused.
    pub fn refuse(&mut self, bill: &Bill) {
        bill.accounts().for_each(|at| self.accounts[at].tally.refused += 1);
    }

    /// An answer ended by itself or at its limit.
    pub fn observe(&mut self, bill: &Bill, output_tokens: u32) {
        let tenant = &self.accounts[bill.tenant as usize].owner.tenant;
        self.forecast.observe(key_of(tenant), output_tokens);
    }

    /// The stream is over: it used what it was `admitted` with, or nothing. Empties the bill, so
    /// that nothing is settled twice.
    pub fn settle(&mut self, bill: &mut Bill, admitted: Option<(u32, u32)>, now: Instant) {
        let bill = std::mem::replace(bill, Bill::NONE);
        let (input, output) = admitted.unwrap_or((0, 0));
        for at in bill.accounts() {
            let Account { meters, tally, pinned, .. } = &mut self.accounts[at];
            settle(&mut meters.input, bill.input, input, now);
            settle(&mut meters.output, bill.output, output, now);
            tally.admitted -= u32::from(admitted.is_some());
            tally.live -= 1;
            if tally.live == 0 && !*pinned {
                self.rest(at as u32);
            }
        }
    }

    fn find_or_open(&mut self, owner: Owner, keep: u32, now: Instant) -> u32 {
        let by_owner = |at: &u32| self.accounts[*at as usize].owner.cmp(&owner);
        match self.by_owner.binary_search_by(by_owner) {
            Ok(place) => {
                let at = self.by_owner[place];
                let account = &self.accounts[at as usize];
                if account.tally.live == 0 && !account.pinned {
                    self.stop_resting(at);
                    self.rest(at);
                }
                at
            }
            Err(_) => self.open(owner, keep, now),
        }
    }

    /// Opens an account, if need be in the place of one that rests, but not of `keep`.
    fn open(&mut self, owner: Owner, keep: u32, now: Instant) -> u32 {
        let is_user = owner.user != Name::EMPTY;
        let quota = if is_user { &self.quotas.user } else { &self.quotas.tenant };
        let weight = quota.weight;
        let account = Account::new(owner, quota, false, now);
        let at = if self.accounts.len() < self.accounts_max {
            self.accounts.push(account);
            self.accounts.len() as u32 - 1
        } else if let Some(at) = self.dispensable(keep, now) {
            self.stop_resting(at);
            let place = self.place(&self.accounts[at as usize].owner);
            self.by_owner.remove(place);
            self.accounts[at as usize] = account;
            at
        } else {
            self.shared_asks += 1;
            return if is_user { SHARED_BY_USERS } else { SHARED_BY_TENANTS };
        };
        self.shares.begin(at, weight);
        let place = self.place(&owner);
        self.by_owner.insert(place, at);
        self.rest(at);
        at
    }

    /// Where the owner is among the owners, or would be.
    fn place(&self, owner: &Owner) -> usize {
        self.by_owner.partition_point(|&at| self.accounts[at as usize].owner < *owner)
    }

    /// The account that has rested longest and owes nothing.
    fn dispensable(&mut self, keep: u32, now: Instant) -> Option<u32> {
        let mut at = self.rest_first;
        while at != NONE && (at == keep || self.accounts[at as usize].meters.has_debt(now)) {
            at = self.accounts[at as usize].next;
        }
        (at != NONE).then_some(at)
    }

    /// Puts an account at the end of those that rest.
    fn rest(&mut self, at: u32) {
        let last = std::mem::replace(&mut self.rest_last, at);
        let account = &mut self.accounts[at as usize];
        (account.previous, account.next) = (last, NONE);
        match last {
            NONE => self.rest_first = at,
            last => self.accounts[last as usize].next = at,
        }
    }

    fn stop_resting(&mut self, at: u32) {
        let account = &mut self.accounts[at as usize];
        if account.pinned {
            return;
        }
        let (previous, next) = (account.previous, account.next);
        (account.previous, account.next) = (NONE, NONE);
        match previous {
            NONE => self.rest_first = next,
            previous => self.accounts[previous as usize].next = next,
        }
        match next {
            NONE => self.rest_last = previous,
            next => self.accounts[next as usize].previous = previous,
        }
    }

    /// Checks that the accounts' streams are those that these bills say, all in their lists.
    pub fn check<'a>(&self, bills: impl Iterator<Item = (&'a Bill, bool)>) -> Result<(), String> {
        let mut held = vec![(0, 0); self.accounts.len()];
        for (bill, admitted) in bills {
            for at in bill.accounts() {
                held[at].0 += 1;
                held[at].1 += u32::from(admitted);
            }
        }
        let mut resting = Vec::new();
        let mut at = self.rest_first;
        while at != NONE && resting.len() <= self.accounts.len() {
            resting.push(at as usize);
            at = self.accounts[at as usize].next;
        }
        for (at, account) in self.accounts.iter().enumerate() {
            let counted = (account.tally.live, account.tally.admitted);
            if counted != held[at] {
                return Err(format!("account {at} has {:?} streams, counts {counted:?}", held[at]));
            }
            let rests = usize::from(!account.pinned && account.tally.live == 0);
            if resting.iter().filter(|&&other| other == at).count() != rests {
                return Err(format!("account {at} does not rest {rests} times: {resting:?}"));
            }
        }
        let owners = self.by_owner.iter().map(|&at| &self.accounts[at as usize].owner);
        if !owners.is_sorted_by(|a, b| a < b) || self.by_owner.len() + SHARED != self.accounts.len()
        {
            return Err(format!("accounts are out of order: {:?}", self.by_owner));
        }
        Ok(())
    }
}

/// A tenant's key in the forecast: FNV-1a of its name, so that what is known of a tenant outlives
/// its account. Should two names ever meet, they share a forecast, no more.
fn key_of(tenant: &Name) -> u64 {
    tenant.as_str().bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// An account as [`EngineCore::tenants`] shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TenantStats {
    /// The tenant; empty for the one of requests that name none.
    pub tenant: Name,
    /// The user, or empty for the tenant's own account.
    pub user: Name,
    /// This is one of the two accounts that are shared by those for whom there was no room.
    pub is_shared: bool,
    /// What was counted for it.
    pub tally: Tally,
    /// What a tenant was served, in tokens of a prompt at weight 1, and what it was lifted by
    /// (`fair.rs`).
    pub served: u64,
}

impl EngineCore {
    /// What each account has counted; those that were shared and never used are left out. A tenant
    /// that has rested long may be gone, and its counts with it.
    pub fn tenants(&self) -> impl Iterator<Item = TenantStats> + '_ {
        let accounts = self.tenants.accounts.iter().enumerate().map(|(at, account)| TenantStats {
            tenant: account.owner.tenant,
            user: account.owner.user,
            is_shared: at < SHARED,
            tally: account.tally,
            served: self.tenants.shares.served(at as u32) / fair::UNIT,
        });
        accounts.filter(|stats| !stats.is_shared || stats.tally.requests > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::StreamKey;

    fn ask(tenant: &str, user: &str) -> Ask {
        Ask {
            stream: StreamKey { front: 0, slot: 0, generation: 0 },
            class: Class::Default,
            tenant: Name::new(tenant).unwrap(),
            user: Name::new(user).unwrap(),
            input_bytes: 10,
            input_tokens: 10,
            max_tokens: 10,
            deadline: None,
            window_tokens: 1,
        }
    }

    fn limits(tenant: Quota, user: Quota) -> Limits {
        let quotas = Quotas { tenant, user, named: Vec::new() };
        Limits { tenants_max: 2, quotas, ..Limits::tiny() }
    }

    fn at_ms(ms: u64) -> Instant {
        Instant::ZERO.plus_ms(ms)
    }

    fn begin(tenants: &mut Tenants, ask: &Ask, now: Instant) -> Result<Bill, Refusal> {
        let bill = tenants.bill_for(ask, now);
        let bill = tenants.quote(ask, bill, 512, now)?;
        tenants.charge(&bill, now);
        Ok(bill)
    }

    fn names(tenants: &Tenants) -> Vec<&str> {
        let owner = |&at: &u32| &tenants.accounts[at as usize].owner;
        tenants.by_owner.iter().map(|at| owner(at).tenant.as_str()).collect()
    }

    #[test]
    fn the_account_that_has_rested_longest_makes_room_and_one_with_streams_never_does() {
        let mut tenants = Tenants::new(&limits(Quota::UNLIMITED, Quota::UNLIMITED));
        let mut bill = begin(&mut tenants, &ask("a", ""), at_ms(0)).unwrap();
        for name in ["b", "c", "d"] {
            let mut bill = begin(&mut tenants, &ask(name, ""), at_ms(0)).unwrap();
            tenants.settle(&mut bill, None, at_ms(0));
            assert_eq!(names(&tenants), ["a", name]);
        }
        tenants.settle(&mut bill, None, at_ms(0));
        let _ = tenants.bill_for(&ask("d", ""), at_ms(0));
        let _ = tenants.bill_for(&ask("e", ""), at_ms(0));
        assert_eq!(names(&tenants), ["d", "e"], "d was asked for later than a");
        assert_eq!(tenants.shared_asks, 0);
        tenants.check(std::iter::empty()).unwrap();
    }

    #[test]
    fn debt_keeps_an_account_as_streams_do_and_who_finds_no_room_shares_one() {
        let quota = Quota { output_tokens_per_second: 10, streams_max: 1, ..Quota::UNLIMITED };
        let mut tenants = Tenants::new(&limits(quota, Quota::UNLIMITED));
        let mut owes = begin(&mut tenants, &ask("owes", ""), at_ms(0)).unwrap();
        tenants.admit(&owes, Class::Default, 10, false);
        tenants.settle(&mut owes, Some((10, 20)), at_ms(0));
        let runs = begin(&mut tenants, &ask("runs", ""), at_ms(0)).unwrap();
        let shared = begin(&mut tenants, &ask("new", ""), at_ms(0)).unwrap();
        assert_eq!((shared.tenant, tenants.shared_asks), (SHARED_BY_TENANTS, 1));
        let second = begin(&mut tenants, &ask("newer", ""), at_ms(0));
        assert_eq!(second, Err(Refusal::Streams(1)), "they have one account's quota together");
        assert_eq!(names(&tenants), ["owes", "runs"]);
        let bills = [(&runs, false), (&shared, false)];
        tenants.check(bills.into_iter()).unwrap();
        // Ten tokens beyond the bucket: paid in a second.
        let _ = tenants.bill_for(&ask("new", ""), at_ms(1_000));
        assert_eq!(names(&tenants), ["new", "runs"]);
    }

    #[test]
    fn a_tenant_is_not_dropped_to_make_room_for_its_own_user() {
        let quota = Quota { streams_max: 1, ..Quota::UNLIMITED };
        let limits = Limits { tenants_max: 1, ..limits(Quota::UNLIMITED, quota) };
        let mut tenants = Tenants::new(&limits);
        let bill = tenants.bill_for(&ask("a", "ann"), at_ms(0));
        assert_eq!((bill.tenant, bill.user), (SHARED as u32, SHARED_BY_USERS));
    }

    #[test]
    fn what_the_user_may_not_have_is_not_taken_from_the_tenant() {
        let tenant = Quota { requests_per_second: 1, requests_burst: 2, ..Quota::UNLIMITED };
        let user = Quota { requests_per_second: 1, ..Quota::UNLIMITED };
        let mut tenants = Tenants::new(&Limits { tenants_max: 3, ..limits(tenant, user) });
        begin(&mut tenants, &ask("a", "ann"), at_ms(0)).unwrap();
        let wait_ns = 1_000_000_000;
        for _ in 0..5 {
            let again = begin(&mut tenants, &ask("a", "ann"), at_ms(0));
            assert_eq!(again, Err(Refusal::Rate { wait_ns }));
        }
        begin(&mut tenants, &ask("a", "bob"), at_ms(0)).unwrap();
        begin(&mut tenants, &ask("a", "cat"), at_ms(0)).unwrap_err();
    }

    #[test]
    fn a_minute_has_its_requests_whatever_the_second() {
        let quota = Quota { requests_per_minute: 3, ..Quota::UNLIMITED };
        let mut tenants = Tenants::new(&limits(quota, Quota::UNLIMITED));
        for _ in 0..3 {
            begin(&mut tenants, &ask("a", ""), at_ms(0)).unwrap();
        }
        let next = begin(&mut tenants, &ask("a", ""), at_ms(0));
        assert_eq!(next, Err(Refusal::Rate { wait_ns: 20_000_000_000 }));
        begin(&mut tenants, &ask("a", ""), at_ms(20_000)).unwrap();
        begin(&mut tenants, &ask("a", ""), at_ms(20_000)).unwrap_err();
    }

    #[test]
    fn a_prompt_longer_than_the_burst_waits_for_all_of_it_and_leaves_a_debt() {
        let quota = Quota { input_tokens_per_second: 4, ..Quota::UNLIMITED };
        let mut tenants = Tenants::new(&limits(quota, Quota::UNLIMITED));
        let mut bill = begin(&mut tenants, &ask("a", ""), at_ms(0)).unwrap();
        let later = begin(&mut tenants, &ask("a", ""), at_ms(0));
        assert_eq!(later, Err(Refusal::Rate { wait_ns: 2_500_000_000 }), "10 tokens at 4 a second");
        tenants.shrink(&mut bill, 6, at_ms(0));
        let later = begin(&mut tenants, &ask("a", ""), at_ms(0));
        assert_eq!(later, Err(Refusal::Rate { wait_ns: 1_500_000_000 }), "it was shorter");
        tenants.settle(&mut bill, None, at_ms(0));
        begin(&mut tenants, &ask("a", ""), at_ms(0)).unwrap();
    }

    #[test]
    fn output_is_charged_by_what_answers_were_like_and_settled_by_what_it_was() {
        let quota =
            Quota { output_tokens_per_second: 1, output_tokens_burst: 100, ..Quota::UNLIMITED };
        let mut tenants = Tenants::new(&limits(quota, Quota::UNLIMITED));
        let long = Ask { max_tokens: 0, ..ask("a", "") };
        let mut bill = begin(&mut tenants, &long, at_ms(0)).unwrap();
        assert_eq!(bill.output, 512, "nothing is known: all that the context holds");
        begin(&mut tenants, &long, at_ms(0)).unwrap_err();
        tenants.admit(&bill, Class::Default, 10, false);
        tenants.observe(&bill, 40);
        tenants.settle(&mut bill, Some((10, 40)), at_ms(0));
        // 60 are left, and a forecast of 40 to 47 comes out of them.
        let bill = begin(&mut tenants, &long, at_ms(0)).unwrap();
        assert!((40..48).contains(&bill.output), "{}", bill.output);
        begin(&mut tenants, &long, at_ms(0)).unwrap_err();
    }
}
