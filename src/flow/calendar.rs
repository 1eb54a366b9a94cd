//! The calendar: places promised to those who were refused.
//!
//! "Come back in 3 seconds" is honest only if there is a place in 3 seconds. So a refusal books
//! one: for this client (a tenant and its user), at this time, good for one request. Who comes
//! back as told is let in before newcomers, and needs to show nothing for it: the booking is
//! found by who asks. Who comes early finds no booking that is due, and so gains nothing; who
//! comes up to [`LATE_MS`] late still has it.
//!
//! The horizon is cut into slots of [`SLOT_MS`], and a slot holds as many places as are served in
//! that time: so those who come back do not come all at once. The places of one client are so far
//! apart that every client with places has the same share of them: who asks more often gets places
//! further ahead, and no more of them.
//!
//! A place that nobody comes for must not stand empty. Places are kept free only around their
//! time, and only for as many as come, going by how many came of late: with clients that never
//! come back, that is soon nobody.
//!
//! Bounded: so many bookings, none further ahead than [`HORIZON_MS`]. Whoever finds the calendar
//! full is told not to come back, which is honest too.

use crate::base::{FixedVec, Instant};

/// Nobody is promised a place further ahead: what is measured now says little about then.
pub const HORIZON_MS: u64 = 30_000;
/// A booking can be used this long after its time.
pub const LATE_MS: u64 = 30_000;
/// Bookings in all: at ten requests a second the horizon has room for 300. For a server that takes
/// less than 30 ms a request the horizon is nearer: as far as so many places reach.
pub const BOOKINGS_MAX: usize = 1_024;

/// What the horizon is cut into.
pub const SLOT_MS: u64 = 100;
/// Slots that are counted at once: the horizon and the time that places are kept, and no fewer
/// than that or two times would share a slot; a power of two.
const SLOTS: usize = 512;
const _: () = assert!(SLOTS as u64 * SLOT_MS > HORIZON_MS + KEPT_MS + 2 * SWEEP_MS + SLOT_MS);

/// A place is kept free from so long before its time,
const AHEAD_MS: u64 = 200;
/// until so long after it: a client that takes longer for its way finds its place by luck, as the
/// queue has some slack for it, but not empty.
const KEPT_MS: u64 = 2_000;
/// How often bookings are looked through for those whose time is over.
const SWEEP_MS: u64 = 100;
/// Of [`Calendar::shown`]: it is in 1/1024, and follows about the last 32 bookings.
const SHOWN_PARTS: u64 = 1_024;
const SHOWN_OVER: u64 = 32;

/// Bytes of the calendar, for the memory envelope.
pub const CALENDAR_BYTES: usize = size_of::<Calendar>()
    + BOOKINGS_MAX * (size_of::<Booking>() + size_of::<Holder>())
    + SLOTS * size_of::<Slot>();

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Booking {
    /// For whom.
    client: u64,
    due: Instant,
    /// Nobody has come in time. It can still be used, but nothing is kept free for it.
    is_missed: bool,
}

/// A client with bookings that are not missed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Holder {
    client: u64,
    /// How many: at least 1.
    bookings: u32,
    /// From when on the latest was free.
    last: Instant,
}

/// A part of the horizon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Slot {
    /// Bookings that are not missed.
    bookings: u32,
    /// The latest of them.
    last: Instant,
}

/// What became of the bookings so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// Places promised.
    pub booked: u64,
    /// Clients that came as told and were let in.
    pub kept: u64,
    /// Clients that came as told and were refused again.
    pub broken: u64,
    /// Places that nobody came for in time. Some are kept or broken later.
    pub missed: u64,
    /// Refusals without a place, for want of one.
    pub full: u64,
}

/// See the [module's documentation](self).
#[derive(Debug)]
pub struct Calendar {
    /// In no order: at most [`BOOKINGS_MAX`], so that looking through them all takes less than a
    /// microsecond or two, and only while there are any.
    bookings: FixedVec<Booking>,
    /// Whose those are that are not missed.
    holders: FixedVec<Holder>,
    /// What falls into each slot, at the slot's number modulo their number.
    slots: Box<[Slot; SLOTS]>,
    /// Of [`SHOWN_PARTS`] bookings, how many were come for, of late.
    shown: u64,
    swept: Instant,
    counts: Kept,
}

impl Calendar {
    /// An empty calendar. Half of all are believed to come back, until they have been seen to.
    pub fn new() -> Calendar {
        Calendar {
            bookings: FixedVec::new(BOOKINGS_MAX),
            holders: FixedVec::new(BOOKINGS_MAX),
            slots: Box::new([Slot::default(); SLOTS]),
            shown: SHOWN_PARTS / 2,
            swept: Instant::ZERO,
            counts: Kept::default(),
        }
    }

    /// Books the next place from `wait_ns` on, places being `apart_ns` apart, and returns its time.
    pub fn book(
        &mut self,
        client: u64,
        wait_ns: u64,
        apart_ns: u64,
        now: Instant,
    ) -> Option<Instant> {
        self.sweep(now);
        let place = self.place(client, wait_ns, apart_ns, now);
        let Some((due, from)) = place.filter(|_| self.make_room()) else {
            self.counts.full += 1;
            return None;
        };
        self.bookings.push(Booking { client, due, is_missed: false }).expect("there is room");
        let slot = &mut self.slots[slot_at(due)];
        slot.bookings += 1;
        slot.last = if slot.bookings == 1 { due } else { slot.last.max(due) };
        match self.holders.iter_mut().find(|holder| holder.client == client) {
            Some(holder) => {
                holder.bookings += 1;
                holder.last = holder.last.max(from);
            }
            None => {
                let holder = Holder { client, bookings: 1, last: from };
                self.holders.push(holder).expect("no more than bookings");
            }
        }
        self.counts.booked += 1;
        Some(due)
    }

    /// The first free place for this client, and from when on it was free: its next one is counted
    /// from there, whoever else shares the slot.
    fn place(
        &self,
        client: u64,
        wait_ns: u64,
        apart_ns: u64,
        now: Instant,
    ) -> Option<(Instant, Instant)> {
        let own = self.holders.iter().find(|holder| holder.client == client);
        // Each of those with places has the same share, and a quarter of one is left for whoever
        // comes next: one client alone must not fill the calendar.
        let shares = 4 * self.holders.len() as u64 + 1;
        let share_ns = apart_ns.saturating_mul(shares) / 4;
        let after_own = own.map_or(now, |own| own.last.plus_ns(share_ns));
        let earliest = now.plus_ns(wait_ns).max(after_own);
        let reach_ns = wait_ns.saturating_add(apart_ns.saturating_mul(BOOKINGS_MAX as u64));
        let last = now.plus_ns(reach_ns.min(HORIZON_MS * 1_000_000));
        let mut from = earliest;
        // Time to serve that is not given away. What is over from one slot serves the next, but
        // no more than one place.
        let mut free_ns = 0_u64;
        while from <= last {
            let end = Instant::ZERO.plus_ms((from.ms_since(Instant::ZERO) / SLOT_MS + 1) * SLOT_MS);
            let slot = self.slots[slot_at(from)];
            let taken_ns = u64::from(slot.bookings).saturating_mul(apart_ns);
            free_ns = free_ns.min(apart_ns) + SLOT_MS * 1_000_000;
            if free_ns >= taken_ns.saturating_add(apart_ns) {
                let after_last = match slot.bookings {
                    0 => from,
                    _ => slot.last.plus_ns(apart_ns),
                };
                let due = from.max(after_last).min(Instant::from_ns(end.as_ns() - 1));
                return (due <= last).then_some((due, from));
            }
            free_ns = free_ns.saturating_sub(taken_ns);
            from = end;
        }
        None
    }

    /// Makes room for a booking, if need be in place of one that was missed.
    fn make_room(&mut self) -> bool {
        if self.bookings.is_full() {
            let missed = self.bookings.iter().position(|other| other.is_missed);
            missed.map(|at| self.bookings.swap_remove(at)).is_some()
        } else {
            true
        }
    }

    /// A booking is used or missed: it takes up its place no longer.
    fn release(&mut self, booking: Booking) {
        self.slots[slot_at(booking.due)].bookings -= 1;
        let at = self.holders.iter().position(|holder| holder.client == booking.client);
        let at = at.expect("it has a booking");
        self.holders[at].bookings -= 1;
        if self.holders[at].bookings == 0 {
            self.holders.swap_remove(at);
        }
    }

    /// Whether this client has a place that is due.
    pub fn has_place(&self, client: u64, now: Instant) -> bool {
        self.find(client, now).is_some()
    }

    /// The client's earliest booking, if that is due.
    fn find(&self, client: u64, now: Instant) -> Option<usize> {
        let is_own = |other: &Booking| other.client == client && now <= other.due.plus_ms(LATE_MS);
        let own = self.bookings.iter().enumerate().filter(|(_, other)| is_own(other));
        let (at, booking) = own.min_by_key(|(_, booking)| booking.due)?;
        (booking.due <= now).then_some(at)
    }

    /// The client came as told, and was let in or not; its booking is used up.
    pub fn settle(&mut self, client: u64, is_let_in: bool, now: Instant) {
        let Some(at) = self.find(client, now) else { return };
        let booking = self.bookings.swap_remove(at);
        if !booking.is_missed {
            self.release(booking);
        }
        self.shown += (SHOWN_PARTS - self.shown).div_ceil(SHOWN_OVER);
        match is_let_in {
            true => self.counts.kept += 1,
            false => self.counts.broken += 1,
        }
    }

    /// The client was let in without a place that is due: that counts as its last one, if it has
    /// any. So trying again and again before its time wins an early entry, and not one more.
    pub fn charge(&mut self, client: u64) {
        let open = self.bookings.iter().enumerate();
        let own = open.filter(|(_, booking)| booking.client == client && !booking.is_missed);
        let Some((at, _)) = own.max_by_key(|(_, booking)| booking.due) else { return };
        let booking = self.bookings.swap_remove(at);
        self.release(booking);
        // Its next place is counted from those that it still has.
        let left = self.bookings.iter().filter(|other| other.client == client && !other.is_missed);
        let last = left.map(|other| other.due).max();
        let holder = self.holders.iter_mut().find(|holder| holder.client == client);
        if let Some((holder, last)) = holder.zip(last) {
            holder.last = last;
        }
    }

    /// How many places are to be kept free of newcomers now.
    pub fn kept_free(&mut self, now: Instant) -> u32 {
        self.sweep(now);
        let soon = now.plus_ms(AHEAD_MS);
        let expected = |booking: &&Booking| !booking.is_missed && booking.due <= soon;
        let count = self.bookings.iter().filter(expected).count() as u64;
        ((count * self.shown + SHOWN_PARTS / 2) / SHOWN_PARTS) as u32
    }

    /// What became of the bookings.
    pub fn counts(&self) -> Kept {
        self.counts
    }

    /// Forgets bookings whose time is over, and notes whose place nobody came for.
    fn sweep(&mut self, now: Instant) {
        if now.ms_since(self.swept) < SWEEP_MS || self.bookings.is_empty() {
            return;
        }
        self.swept = now;
        for at in 0..self.bookings.len() {
            let booking = self.bookings[at];
            if !booking.is_missed && now > booking.due.plus_ms(KEPT_MS) {
                self.bookings[at].is_missed = true;
                self.release(booking);
                // Rounded up, or it would never be nobody.
                self.shown -= self.shown.div_ceil(SHOWN_OVER);
                self.counts.missed += 1;
            }
        }
        self.bookings.retain(|booking| now <= booking.due.plus_ms(LATE_MS));
    }
}

/// Where a time's slot is counted.
fn slot_at(time: Instant) -> usize {
    (time.ms_since(Instant::ZERO) / SLOT_MS) as usize % SLOTS
}

impl Default for Calendar {
    fn default() -> Calendar {
        Calendar::new()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: u64 = 1_000_000;

    fn at_ms(ms: u64) -> Instant {
        Instant::ZERO.plus_ms(ms)
    }

    #[test]
    fn each_place_is_later_than_the_one_before_it() {
        let mut calendar = Calendar::new();
        let mut book = |client| calendar.book(client, 500 * MS, 100 * MS, at_ms(1_000)).unwrap();
        assert_eq!([book(1), book(2), book(1)], [at_ms(1_500), at_ms(1_600), at_ms(1_725)]);
        assert_eq!(book(3), at_ms(1_800));
    }

    #[test]
    fn a_place_is_there_from_its_time_on_for_its_client_alone_and_once() {
        let mut calendar = Calendar::new();
        calendar.book(1, 500 * MS, 0, at_ms(0));
        assert!(!calendar.has_place(1, at_ms(499)), "too early");
        assert!(!calendar.has_place(2, at_ms(500)), "somebody else");
        assert!(calendar.has_place(1, at_ms(30_500)), "half a minute late");
        calendar.settle(1, true, at_ms(600));
        assert!(!calendar.has_place(1, at_ms(600)), "used");
        assert_eq!(calendar.counts(), Kept { booked: 1, kept: 1, ..Kept::default() });
    }

    #[test]
    fn whoever_comes_too_early_keeps_the_place_and_gains_none() {
        let mut calendar = Calendar::new();
        calendar.book(1, 500 * MS, 0, at_ms(0));
        calendar.settle(1, false, at_ms(100));
        assert!(calendar.has_place(1, at_ms(500)));
        calendar.book(2, 500 * MS, 0, at_ms(0));
        assert!(!calendar.has_place(1, at_ms(30_501)), "over");
    }

    #[test]
    fn an_entry_before_the_time_is_charged_to_the_last_place() {
        let mut calendar = Calendar::new();
        for wait_ms in [500, 900] {
            calendar.book(1, wait_ms * MS, 0, at_ms(0));
        }
        calendar.charge(1);
        calendar.charge(2);
        assert!(calendar.has_place(1, at_ms(500)));
        calendar.settle(1, true, at_ms(500));
        assert!(!calendar.has_place(1, at_ms(900)));
    }

    #[test]
    fn an_entry_that_was_charged_does_not_put_off_the_next_place() {
        let mut calendar = Calendar::new();
        let first = calendar.book(1, 0, 100 * MS, at_ms(0)).unwrap();
        for _ in 0..100 {
            calendar.book(1, 0, 100 * MS, at_ms(0));
            calendar.charge(1);
        }
        let next = calendar.book(1, 0, 100 * MS, at_ms(0)).unwrap();
        assert!(next.ms_since(first) <= 200, "{next:?}");
    }

    #[test]
    fn a_place_further_ahead_than_the_horizon_is_not_promised() {
        let mut calendar = Calendar::new();
        assert_eq!(calendar.book(1, 30_001 * MS, 0, at_ms(0)), None);
        for _ in 0..=300 {
            assert!(calendar.book(1, 0, 80 * MS, at_ms(0)).is_some());
        }
        assert_eq!(calendar.book(1, 0, 80 * MS, at_ms(0)), None);
        assert_eq!(calendar.counts().full, 2);
    }

    #[test]
    fn who_asks_more_often_gets_places_further_ahead_and_no_more_of_them() {
        let mut calendar = Calendar::new();
        let mut last = [at_ms(0); 2];
        for _ in 0..10 {
            last[1] = calendar.book(1, 0, 20 * MS, at_ms(0)).unwrap();
            for _ in 0..5 {
                last[0] = calendar.book(0, 0, 20 * MS, at_ms(0)).unwrap();
            }
        }
        assert!(last[0] >= at_ms(49 * 40), "fifty places, each after one of the other's");
        assert!(last[1] <= at_ms(10 * 40 + 100), "{last:?}");
    }

    #[test]
    fn a_slot_holds_as_many_places_as_are_served_in_its_time() {
        for apart_ms in [3, 20, 99, 100, 101, 250, 1_000] {
            let mut calendar = Calendar::new();
            let dues: Vec<_> =
                (0..20).map(|client| calendar.book(client, 0, apart_ms * MS, at_ms(0))).collect();
            let dues: Vec<_> = dues.into_iter().map(Option::unwrap).collect();
            assert!(dues.is_sorted(), "{apart_ms}: {dues:?}");
            let (first, last) = (dues[0], dues[19]);
            let spread_ms = last.ms_since(first);
            assert!(spread_ms.abs_diff(19 * apart_ms) <= 100 + apart_ms, "{apart_ms}: {dues:?}");
        }
    }

    #[test]
    fn places_are_kept_free_around_their_time_for_as_many_as_come() {
        let mut calendar = Calendar::new();
        for client in 0..8 {
            calendar.book(client, 1_000 * MS, 0, at_ms(0));
        }
        assert_eq!(calendar.kept_free(at_ms(700)), 0, "not yet");
        assert_eq!(calendar.kept_free(at_ms(800)), 4, "half of them are believed to come");
        assert_eq!(calendar.kept_free(at_ms(3_100)), 0, "nobody came");
        assert_eq!(calendar.counts().missed, 8);
        assert!(calendar.has_place(3, at_ms(3_100)), "late, and still good");
    }

    #[test]
    fn what_is_kept_free_follows_how_many_came() {
        let (mut faithful, mut faithless) = (Calendar::new(), Calendar::new());
        for round in 0..200 {
            let now = at_ms(10_000 * round);
            for calendar in [&mut faithful, &mut faithless] {
                calendar.book(round, 0, 0, now);
            }
            faithful.settle(round, true, now);
        }
        let now = at_ms(10_000 * 200);
        for calendar in [&mut faithful, &mut faithless] {
            for client in 0..100 {
                calendar.book(client, 0, 0, now);
            }
        }
        assert_eq!(faithful.kept_free(now), 100);
        assert_eq!(faithless.kept_free(now), 0);
    }

    proptest! {
        #[test]
        fn every_booking_is_kept_broken_or_over_and_the_bounds_hold(
            moves in prop::collection::vec((0_u8..5, 0_u64..8, 0_u64..3_000), 0..300),
        ) {
            let (mut calendar, mut now) = (Calendar::new(), at_ms(0));
            for (what, client, ms) in moves {
                now = now.plus_ms(ms);
                match what {
                    0 | 1 => {
                        if let Some(due) = calendar.book(client, ms * MS, 10 * MS, now) {
                            prop_assert!(due >= now && due.ms_since(now) <= HORIZON_MS);
                        }
                    }
                    2 => {
                        let had = calendar.has_place(client, now);
                        let before = calendar.bookings.len();
                        calendar.settle(client, true, now);
                        prop_assert_eq!(before - calendar.bookings.len(), usize::from(had));
                    }
                    3 => calendar.charge(client),
                    _ => prop_assert!(calendar.kept_free(now) as usize <= calendar.bookings.len()),
                }
                let Kept { booked, kept, broken, .. } = calendar.counts();
                prop_assert!(booked >= kept + broken + calendar.bookings.len() as u64);
                let open = calendar.bookings.iter().filter(|booking| !booking.is_missed).count();
                let held: u32 = calendar.holders.iter().map(|holder| holder.bookings).sum();
                let slots: u64 = calendar.slots.iter().map(|slot| u64::from(slot.bookings)).sum();
                prop_assert_eq!((held as usize, slots as usize), (open, open));
                prop_assert!(calendar.shown <= SHOWN_PARTS);
            }
        }
    }
}
