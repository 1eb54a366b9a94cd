//! A stream's credit on its way from the client to the engine.

/// Where the credit of one stream is, in tokens.
///
/// The engine may hold no more than the window less what it produced and the kernel has not
/// taken: so what a stream can have in this program's buffers is bounded by the window, however
/// generous its client is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StreamCredit {
    /// The largest window. Never 0.
    window: u32,
    /// Given by the client, kept back here.
    kept: u32,
    /// With the engine: tokens that it may still produce.
    engine: u32,
    /// Produced, not yet taken by the kernel.
    untaken: u32,
}

impl StreamCredit {
    /// The client gave `first`, at most `window`, and all of it goes to the engine.
    pub(super) fn new(window: u32, first: u32) -> StreamCredit {
        assert!(first <= window, "a first credit of {first} tokens in a window of {window}");
        StreamCredit { window, kept: 0, engine: first, untaken: 0 }
    }

    /// The client gives more. `false`, and nothing changes, when it has more than the window
    /// outstanding then.
    #[must_use]
    pub(super) fn give(&mut self, tokens: u32) -> bool {
        let outstanding = u64::from(self.kept) + u64::from(self.engine) + u64::from(tokens);
        if outstanding > u64::from(self.window) {
            return false;
        }
        self.kept += tokens;
        true
    }

    /// The engine produced `tokens`. `false` when it had no credit for them.
    #[must_use]
    pub(super) fn produced(&mut self, tokens: u32) -> bool {
        if tokens > self.engine {
            return false;
        }
        self.engine -= tokens;
        self.untaken += tokens;
        self.check();
        true
    }

    /// The kernel took `tokens`.
    pub(super) fn taken(&mut self, tokens: u32) {
        assert!(tokens <= self.untaken, "{tokens} tokens taken of {self:?}");
        self.untaken -= tokens;
    }

    /// Credit that should go to the engine now; it counts as gone. 0 while the engine has more
    /// than half a window: credits travel in few, larger messages.
    pub(super) fn take_due(&mut self) -> u32 {
        if self.engine > self.window / 2 {
            return 0;
        }
        let due = self.kept.min(self.window - self.engine - self.untaken);
        self.kept -= due;
        self.engine += due;
        self.check();
        due
    }

    fn check(&self) {
        assert!(self.engine + self.untaken <= self.window, "beyond the window: {self:?}");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_client_cannot_have_more_than_the_window_outstanding() {
        let mut credit = StreamCredit::new(8, 8);
        assert!(!credit.give(1));
        assert!(credit.produced(3));
        assert!(credit.give(3));
        assert!(!credit.give(1));
        assert!(!credit.give(u32::MAX));
    }

    #[test]
    fn what_the_kernel_has_not_taken_holds_credit_back() {
        let mut credit = StreamCredit::new(8, 8);
        assert!(credit.produced(8));
        assert!(credit.give(8));
        assert_eq!(credit.take_due(), 0);
        credit.taken(2);
        assert_eq!(credit.take_due(), 2);
        credit.taken(6);
        assert_eq!(credit.take_due(), 6);
        assert!(credit.produced(8));
        assert!(!credit.produced(1), "no credit left");
    }

    proptest! {
        #[test]
        fn credit_is_neither_lost_nor_made(
            steps in prop::collection::vec((0..4u8, 0..12u32), 0..200),
        ) {
            let (mut credit, window) = (StreamCredit::new(10, 4), 10);
            let (mut given, mut engine, mut produced, mut taken) = (4u64, 4u64, 0u64, 0u64);
            for (what, n) in steps {
                let n64 = u64::from(n);
                match what {
                    0 => {
                        let fits = given - produced + n64 <= window;
                        prop_assert_eq!(credit.give(n), fits);
                        given += if fits { n64 } else { 0 };
                    }
                    1 if n64 <= engine - produced => {
                        prop_assert!(credit.produced(n));
                        produced += n64;
                    }
                    2 if n64 <= produced - taken => {
                        credit.taken(n);
                        taken += n64;
                    }
                    _ => engine += u64::from(credit.take_due()),
                }
                prop_assert!(engine <= given);
                prop_assert!(engine - taken <= window);
            }
            credit.taken((produced - taken) as u32);
            prop_assert!(credit.produced((engine - produced) as u32));
            credit.taken((engine - produced) as u32);
            prop_assert_eq!(engine + u64::from(credit.take_due()), given);
        }
    }
}
