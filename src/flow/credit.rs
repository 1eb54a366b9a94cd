//! A credit window: how much one side may still send before the other has made room again.
//!
//! All arithmetic on credits is here. A window never goes below zero and never above its capacity;
//! whoever would make it so is told, and nothing changes.

use std::error::Error;
use std::fmt;

/// Credits to send, out of a fixed number.
///
/// Invariant: `available <= capacity`, hence `outstanding() = capacity - available` is what was
/// taken and not yet given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CreditWindow {
    capacity: usize,
    /// Range: 0 ..= `capacity`.
    available: usize,
}

impl CreditWindow {
    /// A window with all of its credits available.
    pub const fn full(capacity: usize) -> CreditWindow {
        CreditWindow { capacity, available: capacity }
    }

    /// A window whose first credits are still to be given.
    pub const fn empty(capacity: usize) -> CreditWindow {
        CreditWindow { capacity, available: 0 }
    }

    /// How many credits there are in all.
    pub const fn capacity(&self) -> usize {
        self.capacity
    }

    /// How many can be taken now.
    pub const fn available(&self) -> usize {
        self.available
    }

    /// How many were taken and not given back.
    pub const fn outstanding(&self) -> usize {
        self.capacity - self.available
    }

    /// Takes `n` credits, all or none. Returns whether it did.
    #[must_use = "without the credits nothing may be sent"]
    pub const fn take(&mut self, n: usize) -> bool {
        let enough = n <= self.available;
        if enough {
            self.available -= n;
        }
        enough
    }

    /// Takes up to `n` credits and returns how many.
    #[must_use = "so many may be sent, and no more"]
    pub const fn take_up_to(&mut self, n: usize) -> usize {
        let taken = if n < self.available { n } else { self.available };
        self.available -= taken;
        taken
    }

    /// Gives `n` credits back, all or none: an error when more would be available than there are,
    /// which says that the giver's account is wrong.
    pub const fn give(&mut self, n: usize) -> Result<(), CreditError> {
        let outstanding = self.outstanding();
        if n > outstanding {
            return Err(CreditError { given: n, outstanding });
        }
        self.available += n;
        Ok(())
    }
}

/// More credits were given back than had been taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CreditError {
    /// How many were given.
    pub given: usize,
    /// How many there were to give back.
    pub outstanding: usize,
}

impl fmt::Display for CreditError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} credits given back while {} were out", self.given, self.outstanding)
    }
}

impl Error for CreditError {}

/// The receiving side's half of a window: gathers what was consumed, and says when it is worth
/// telling the sender.
///
/// One message for every credit would cost as much as the traffic it steers. Half a window a time
/// is the least often that still lets the sender go on with the other half meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CreditReturn {
    /// Range: 0 ..= the window's capacity, below `threshold` between calls.
    gathered: usize,
    /// At least 1.
    threshold: usize,
}

impl CreditReturn {
    /// For a window of this capacity: returns come in halves of it.
    pub const fn new(capacity: usize) -> CreditReturn {
        let half = capacity / 2;
        CreditReturn { gathered: 0, threshold: if half == 0 { 1 } else { half } }
    }

    /// Notes `n` credits as consumed. Returns how many to give to the sender now; 0 when it is not
    /// time yet.
    #[must_use = "what is due must be given to the sender"]
    pub const fn gather(&mut self, n: usize) -> usize {
        self.gathered += n;
        if self.gathered >= self.threshold { self.flush() } else { 0 }
    }

    /// What is gathered, to be given to the sender now. For the receiver that runs dry.
    #[must_use = "what is due must be given to the sender"]
    pub const fn flush(&mut self) -> usize {
        std::mem::replace(&mut self.gathered, 0)
    }

    /// Consumed, and not yet given to the sender.
    pub const fn gathered(&self) -> usize {
        self.gathered
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credits_are_taken_all_or_none() {
        let mut window = CreditWindow::full(3);
        assert!(window.take(2));
        assert!(!window.take(2));
        assert_eq!((window.available(), window.outstanding()), (1, 2));
        assert_eq!(window.take_up_to(5), 1);
        assert!(window.take(0));
        assert!(!window.take(1));
    }

    #[test]
    fn a_window_never_grows_above_its_capacity() {
        let mut window = CreditWindow::full(3);
        assert!(window.take(1));
        assert_eq!(window.give(2), Err(CreditError { given: 2, outstanding: 1 }));
        assert_eq!(window.available(), 2, "nothing of a wrong gift is kept");
        assert_eq!(window.give(1), Ok(()));
        assert_eq!(window.give(usize::MAX), Err(CreditError { given: usize::MAX, outstanding: 0 }));
    }

    #[test]
    fn credits_are_returned_by_half_windows() {
        let mut due = CreditReturn::new(8);
        assert_eq!(due.gather(3), 0);
        assert_eq!(due.gather(1), 4);
        assert_eq!(due.gather(1), 0);
        assert_eq!(due.flush(), 1);
        assert_eq!(due.flush(), 0);
        let mut smallest = CreditReturn::new(1);
        assert_eq!(smallest.gather(1), 1);
        assert_eq!(smallest.gather(0), 0);
    }
}
