//! Numbers on show: what a core has counted and where it stands, by name, where anybody can read
//! them at any time.
//!
//! A core tells its numbers in one place ([`Tell`]); STATS_REPLY, the metrics page and `forebay
//! top` all read the same board, so that no number has a twin.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number's name and meaning. Units come last in the name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Number {
    /// As STATS_REPLY has it.
    pub name: &'static str,
    /// What it does from one reading to the next.
    pub kind: Kind,
    /// One line.
    pub help: &'static str,
}

/// What a number does from one reading to the next, and which others it belongs with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Goes up and down.
    Gauge,
    /// Only grows.
    Counter,
    /// One of several gauges that differ in a label: `name` is family, `_`, value.
    GaugeOf(Label),
    /// One of several counters that differ in a label.
    CounterOf(Label),
    /// Part of a histogram.
    Histogram {
        /// The name without its end.
        family: &'static str,
        /// Which part.
        part: Part,
    },
}

/// What tells a family's numbers apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label {
    /// What is counted.
    pub family: &'static str,
    /// By what.
    pub label: &'static str,
    /// Which of them.
    pub value: &'static str,
}

/// A part of a histogram; they come in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Observations up to this, as `sum` counts them.
    Le(u64),
    /// All observations.
    Count,
    /// Their sum.
    Sum,
}

/// Has numbers to show.
pub trait Tell {
    /// Tells each of them, always the same ones in the same order.
    fn tell(&self, put: impl FnMut(Number, u64));
}

/// A core's numbers. One writer; each number is true by itself, but two of them may be of different
/// turns.
#[derive(Debug)]
pub struct Board {
    numbers: Vec<Number>,
    values: Vec<AtomicU64>,
}

impl Board {
    /// A board for what `T` tells, showing what a fresh one would.
    pub fn new<T: Tell + Default>() -> Board {
        let (mut numbers, mut values) = (Vec::new(), Vec::new());
        T::default().tell(|number, value| {
            numbers.push(number);
            values.push(AtomicU64::new(value));
        });
        Board { numbers, values }
    }

    /// Shows new numbers, from whatever the board was made for.
    pub fn show(&self, told: &impl Tell) {
        let mut places = self.values.iter();
        told.tell(|_, value| {
            // Relaxed: nothing is concluded from one number about another.
            places.next().expect("as many as at the start").store(value, Ordering::Relaxed);
        });
    }

    /// The numbers as last shown.
    pub fn read(&self) -> impl Iterator<Item = (Number, u64)> + '_ {
        let values = self.values.iter().map(|value| value.load(Ordering::Relaxed));
        self.numbers.iter().copied().zip(values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Two(u64, u64);

    impl Tell for Two {
        fn tell(&self, mut put: impl FnMut(Number, u64)) {
            put(Number { name: "one", kind: Kind::Gauge, help: "" }, self.0);
            put(Number { name: "two", kind: Kind::Counter, help: "" }, self.1);
        }
    }

    #[test]
    fn a_board_shows_what_it_was_last_told() {
        let board = Board::new::<Two>();
        let shown = || board.read().map(|(number, value)| (number.name, value)).collect::<Vec<_>>();
        assert_eq!(shown(), [("one", 0), ("two", 0)]);
        board.show(&Two(3, 4));
        assert_eq!(shown(), [("one", 3), ("two", 4)]);
    }
}
