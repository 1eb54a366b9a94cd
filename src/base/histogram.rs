//! Histograms in whole numbers: how often what was seen was at most so much.

/// Makes a struct of histograms with fixed bounds and the names of their parts:
/// `field: Histogram<LENGTH> = "name", "unit", unit's worth, [bounds in units], "help";`.
///
/// A bound's name is `name_le_BOUND_unit`; values are observed and summed in what a unit is worth.
#[cfg(feature = "server")] // whoever builds without the cores has none
macro_rules! histograms {
    ($(#[$meta:meta])* $all:ident {
        $($(#[$about:meta])* $field:ident: $count:literal = $name:literal,
            $unit:literal of $worth:literal $sum_unit:literal,
            [$($bound:literal)*], $help:literal;)+
    }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct $all {
            $($(#[$about])* pub $field: $crate::base::histogram::Histogram<$count>,)+
        }

        impl Default for $all {
            fn default() -> $all {
                use $crate::base::histogram::Histogram;
                $all { $($field: Histogram::new(&[$($bound * $worth),*]),)+ }
            }
        }

        impl $crate::base::board::Tell for $all {
            fn tell(&self, mut put: impl FnMut($crate::base::board::Number, u64)) {
                use $crate::base::board::{Kind, Number, Part};
                $({
                    const NAMES: [&str; $count] =
                        [$(concat!($name, "_le_", $bound, "_", $unit)),*];
                    let number = |name, part| {
                        let kind = Kind::Histogram { family: $name, part };
                        Number { name, kind, help: $help }
                    };
                    let mut below = 0;
                    for (at, (bound, count)) in self.$field.buckets().enumerate() {
                        below += count;
                        put(number(NAMES[at], Part::Le(bound)), below);
                    }
                    put(number(concat!($name, "_count"), Part::Count), self.$field.count());
                    let sum = concat!($name, "_sum_", $sum_unit);
                    put(number(sum, Part::Sum), self.$field.sum());
                })+
            }
        }
    };
}
#[cfg(feature = "server")]
pub(crate) use histograms;

/// Counts of what was seen, by size. Fixed memory; observing takes some nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Histogram<const N: usize> {
    /// Rising.
    bounds: &'static [u64; N],
    /// Observations up to the bound and above the one before it.
    counts: [u64; N],
    count: u64,
    sum: u64,
}

impl<const N: usize> Histogram<N> {
    /// Nothing seen yet.
    pub const fn new(bounds: &'static [u64; N]) -> Histogram<N> {
        Histogram { bounds, counts: [0; N], count: 0, sum: 0 }
    }

    /// Counts `value`.
    pub fn observe(&mut self, value: u64) {
        let at = self.bounds.partition_point(|&bound| bound < value);
        // Above the last bound there is only the count of all.
        if let Some(count) = self.counts.get_mut(at) {
            *count += 1;
        }
        self.count += 1;
        self.sum = self.sum.saturating_add(value);
    }

    /// Each bound with how many were up to it and above the one before.
    pub fn buckets(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.bounds.iter().copied().zip(self.counts)
    }

    /// How many values were seen.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Their sum.
    pub fn sum(&self) -> u64 {
        self.sum
    }
}

#[cfg(all(test, feature = "server"))]
mod tests {
    use crate::base::board::Tell;

    histograms! {
        Test {
            /// Times.
            wait: 3 = "wait", "ms" of 1000 "us", [1 2 5], "how long it waited";
        }
    }

    #[test]
    fn a_value_counts_for_the_first_bound_that_it_does_not_exceed() {
        let mut test = Test::default();
        for us in [0, 1000, 1001, 2000, 5000, 5001, u64::MAX] {
            test.wait.observe(us);
        }
        let mut told = Vec::new();
        test.tell(|number, value| told.push((number.name, value)));
        let at_most = [("wait_le_1_ms", 2), ("wait_le_2_ms", 4), ("wait_le_5_ms", 5)];
        assert_eq!(told[..3], at_most);
        assert_eq!(told[3..], [("wait_count", 7), ("wait_sum_us", u64::MAX)]);
    }
}
