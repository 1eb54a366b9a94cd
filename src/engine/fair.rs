//! Fair shares: whose turn it is, by what each tenant was served.
//!
//! The virtual token counter of Sheng et al. ("Fairness in Serving Large Language Models", 2024),
//! with weights. A tenant's counter says what it was served: an input token counts
//! [`INPUT_COST`] and an output token [`OUTPUT_COST`], divided by the tenant's weight; a prompt
//! when it is admitted, an output token when it is produced. Call a tenant *backlogged* in a class
//! while it has somebody queued there. Within a class, next comes the longest waiting request of
//! the backlogged tenant with the least counter. A tenant that becomes backlogged is lifted to the
//! least counter of those that are, if its own is below: what it did not use while it had nothing
//! to ask for is gone, and cannot be claimed all at once.
//!
//! **How far two tenants can be apart.** Each class has a *floor*: the greatest counter at which a
//! tenant was ever picked in it, or to which one was lifted. Then
//!
//! 1. *Every tenant that is backlogged in the class has at least the floor.* Whoever is picked has
//!    the least counter of all, so when the floor becomes that, nobody is below it; likewise when
//!    it becomes the least of the backlogged by a lift, to which the newcomer is lifted too. In
//!    between counters only grow, and the floor stays. By the same, the floor never falls.
//! 2. *A tenant that asks in this class alone has at most the floor and what it was served since
//!    it was last picked or lifted*: at that moment it stood at the floor, and that has not fallen.
//!    Since then it was served the prompt of that pick, if it was one, and the output of the
//!    sequences it had admitted. With sequences of at most L tokens and A admitted that is less
//!    than `Shares::served_max`: U = (L + 2 A L) / weight.
//!
//! So of two tenants f and g backlogged in the class, by 2 and 1, `f - g <= U_f`, and by symmetry
//! their counters are never further apart than the greater of U_f and U_g. Over any time in which
//! both are backlogged, what they were served (by weight) differs by at most twice that, however
//! long it is and whatever anybody else asks for. What a tenant is served in other classes counts
//! as well, and comes on top: it has had that already.
//!
//! Turns say who is next, not who comes in: a flood can still fill the queue, unless
//! `tenants.streams_max` bounds what one tenant has there.
//!
//! Nobody starves as long as there are finitely many tenants: every pick makes a counter larger,
//! so after so many each other tenant is above the one that waits.

use crate::request::Class;

/// What a token of a prompt counts.
pub const INPUT_COST: u64 = 1;
/// What a token of output counts: it costs a row of a step for itself, reads all weights with few
/// others, and holds its sequence's blocks for as long.
pub const OUTPUT_COST: u64 = 2;

/// A token that counts 1, with weight 1. Divided by weights up to 1,000 it loses less than a
/// thousandth; 2^44 of them fit a counter, which are 50 years at 10,000 tokens a second.
pub const UNIT: u64 = 1 << 20;

/// Bytes of a tenant's share.
pub(super) const BYTES: usize = size_of::<Share>();

#[derive(Clone, Copy, Debug)]
struct Share {
    served: u64,
    weight: u32,
}

/// The counters of all accounts, by the account's index.
#[derive(Debug)]
pub(super) struct Shares {
    shares: Vec<Share>,
    floors: [u64; Class::ALL.len()],
}

impl Shares {
    /// Room for so many accounts.
    pub fn new(accounts_max: usize) -> Shares {
        let nobody = Share { served: 0, weight: 1 };
        Shares { shares: vec![nobody; accounts_max], floors: [0; Class::ALL.len()] }
    }

    /// The account is another one's from now on.
    pub fn begin(&mut self, account: u32, weight: u32) {
        self.shares[account as usize] = Share { served: 0, weight: weight.max(1) };
    }

    /// What it was served.
    pub fn served(&self, account: u32) -> u64 {
        self.shares[account as usize].served
    }

    /// It becomes backlogged in a class; `least` of those that are has that counter.
    pub fn join(&mut self, account: u32, class: Class, least: Option<u64>) {
        let floor = &mut self.floors[class as usize];
        debug_assert!(least.is_none_or(|least| least >= *floor), "somebody is below the floor");
        *floor = least.unwrap_or(*floor).max(*floor);
        let share = &mut self.shares[account as usize];
        share.served = share.served.max(*floor);
    }

    /// It was picked in a class, with a prompt of so many tokens. `is_fair`: because it had the
    /// least counter.
    pub fn pick(&mut self, account: u32, class: Class, prompt_tokens: u32, is_fair: bool) {
        if is_fair {
            let floor = &mut self.floors[class as usize];
            *floor = self.shares[account as usize].served.max(*floor);
        }
        self.serve(account, u64::from(prompt_tokens) * INPUT_COST);
    }

    /// A token was produced for it.
    pub fn produce(&mut self, account: u32) {
        self.serve(account, OUTPUT_COST);
    }

    fn serve(&mut self, account: u32, cost: u64) {
        let share = &mut self.shares[account as usize];
        share.served = share.served.saturating_add(cost * UNIT / u64::from(share.weight));
    }

    /// Nobody backlogged is below it; see the module's documentation.
    pub fn floor(&self, class: Class) -> u64 {
        self.floors[class as usize]
    }

    /// The most that an account can be served between two picks, with sequences of up to
    /// `context` tokens and `admitted_max` of them admitted: U of the module's documentation.
    pub fn served_max(&self, account: u32, context: u32, admitted_max: u32) -> u64 {
        let (context, admitted) = (u64::from(context), u64::from(admitted_max));
        let cost = context * INPUT_COST + context * admitted * OUTPUT_COST;
        cost.saturating_mul(UNIT) / u64::from(self.shares[account as usize].weight)
    }
}
