//! What a run needs of whatever stands on the engine's front side: either a front core of the
//! simulator's own that speaks messages ([`super::front`]), or the real one with clients that
//! speak bytes ([`super::wire`]).

use forebay::base::Instant;

use crate::world::Seen;

pub trait Side {
    /// Has its turn; says whether it did anything.
    fn tick(&mut self, now: Instant) -> Result<bool, String>;

    /// When it has something to do by itself, later than now.
    fn next_timeout(&self, now: Instant) -> Option<Instant>;

    /// Nothing bad happens any more.
    fn become_calm(&mut self);

    /// The server drains.
    fn begin_drain(&mut self, now: Instant, until: Instant);

    /// Whether everything that was to be asked has been asked and has its end.
    fn is_over(&self) -> bool;

    /// Whether nothing at all is left, once it was drained.
    fn is_empty(&self) -> bool;

    /// Event batches that it sits on, if it can tell.
    fn batches_held(&self) -> usize;

    /// Checks what can be said of the links, given the batches that the engine has.
    fn check_links(&mut self, batches_idle: usize) -> Result<(), String>;

    /// Checks the links when everything is over and nobody has anything to do.
    fn check_links_at_end(&mut self) -> Result<(), String>;

    /// All tokens there can be, and the time in milliseconds that clients take to read them.
    fn work(&self) -> (u64, u64);

    /// Counts how requests ended.
    fn count(&self, seen: &mut Seen);

    /// Requests that the engine rejected, or its gate, by this side's own count; the simulator's
    /// own does not count.
    fn rejected(&self) -> Option<u64>;

    /// What is not over, a line each.
    fn pending(&self) -> Vec<String>;
}
