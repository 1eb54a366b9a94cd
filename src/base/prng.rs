//! A seeded generator: the same seed gives the same run, on every machine. For simulation, tests
//! and jitter; never for secrets.

/// xoshiro256++ (Blackman and Vigna), seeded through SplitMix64. Integers only: a probability is
/// a [`Ratio`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prng {
    state: [u64; 4],
}

/// `numerator` in `denominator`: a probability without rounding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ratio {
    /// At most `denominator`.
    pub numerator: u64,
    /// At least 1.
    pub denominator: u64,
}

impl Ratio {
    /// It never happens.
    pub const NEVER: Ratio = Ratio { numerator: 0, denominator: 1 };

    /// `n` in a hundred.
    pub const fn percent(n: u64) -> Ratio {
        assert!(n <= 100);
        Ratio { numerator: n, denominator: 100 }
    }
}

impl Prng {
    /// A generator for this seed. All seeds are good ones, 0 too.
    pub const fn new(seed: u64) -> Prng {
        let mut stream = seed;
        let mut state = [0; 4];
        let mut i = 0;
        while i < state.len() {
            stream = stream.wrapping_add(0x9e37_79b9_7f4a_7c15);
            state[i] = split_mix(stream);
            i += 1;
        }
        // Of the four outputs at most one is 0 (the mix is a bijection), so the state is never
        // the all-zero one, which would yield zeros for ever.
        Prng { state }
    }

    /// 64 random bits.
    pub const fn next_u64(&mut self) -> u64 {
        let [a, b, c, d] = self.state;
        let result = a.wrapping_add(d).rotate_left(23).wrapping_add(a);
        let (c, d) = (c ^ a, d ^ b);
        self.state = [a ^ d, b ^ c, c ^ (b << 17), d.rotate_left(45)];
        result
    }

    /// A number below `bound`, all equally likely.
    ///
    /// # Panics
    /// When `bound` is 0.
    pub const fn below(&mut self, bound: u64) -> u64 {
        assert!(bound > 0, "no number is below 0");
        // Lemire: the high half of a 128-bit product. Products whose low half is below
        // 2^64 mod bound would make some results likelier than others, and are drawn again.
        let uneven = bound.wrapping_neg() % bound;
        loop {
            let product = self.next_u64() as u128 * bound as u128;
            if product as u64 >= uneven {
                return (product >> 64) as u64;
            }
        }
    }

    /// A number from `low` to `high`, both included.
    ///
    /// # Panics
    /// When `low` is above `high`.
    pub const fn between(&mut self, low: u64, high: u64) -> u64 {
        assert!(low <= high, "an empty range has no number");
        let span = high - low;
        if span == u64::MAX { self.next_u64() } else { low + self.below(span + 1) }
    }

    /// An index below `len`, for slices.
    ///
    /// # Panics
    /// When `len` is 0.
    pub const fn index(&mut self, len: usize) -> usize {
        self.below(len as u64) as usize
    }

    /// Whether something of this probability happens now.
    pub const fn chance(&mut self, ratio: Ratio) -> bool {
        self.below(ratio.denominator) < ratio.numerator
    }

    /// Puts the items in a random order, all orders equally likely.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.index(last + 1));
        }
    }

    /// Another generator, independent of what this one yields next: so that one consumer's draws
    /// do not shift another's.
    pub const fn fork(&mut self) -> Prng {
        Prng::new(self.next_u64())
    }
}

const fn split_mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_always_gives_the_same_numbers() {
        let mut one = Prng::new(42);
        let mut other = Prng::new(42);
        let numbers: [u64; 8] = std::array::from_fn(|_| one.next_u64());
        assert_eq!(numbers, std::array::from_fn(|_| other.next_u64()));
        assert_ne!(numbers, std::array::from_fn(|_| one.next_u64()));
        let mut next = Prng::new(43);
        assert_ne!(numbers, std::array::from_fn(|_| next.next_u64()));
    }

    #[test]
    fn the_generator_is_the_published_one() {
        // First outputs of xoshiro256++ from the state {1, 2, 3, 4}, as published with it.
        let mut prng = Prng { state: [1, 2, 3, 4] };
        let outputs: [u64; 4] = std::array::from_fn(|_| prng.next_u64());
        assert_eq!(outputs, [41_943_041, 58_720_359, 3_588_806_011_781_223, 3_591_011_842_654_386]);
        // First output of SplitMix64 from seed 0.
        assert_eq!(split_mix(0x9e37_79b9_7f4a_7c15), 0xe220_a839_7b1d_cdaf);
    }

    #[test]
    fn numbers_below_a_bound_are_below_it_and_even() {
        let mut prng = Prng::new(1);
        let mut counts = [0_u32; 6];
        for _ in 0..60_000 {
            counts[prng.below(6) as usize] += 1;
        }
        // Standard deviation 91: five of them on either side.
        assert!(counts.iter().all(|&count| (9_540..=10_460).contains(&count)), "{counts:?}");
        assert!((0..100).all(|_| prng.below(1) == 0));
    }

    #[test]
    fn ranges_include_both_ends() {
        let mut prng = Prng::new(2);
        let draws: Vec<u64> = (0..200).map(|_| prng.between(5, 7)).collect();
        assert!((5..=7).all(|n| draws.contains(&n)) && draws.iter().all(|n| (5..=7).contains(n)));
        assert_eq!(prng.between(9, 9), 9);
        prng.between(0, u64::MAX);
    }

    #[test]
    fn chances_keep_to_their_ratio() {
        let mut prng = Prng::new(3);
        let hits = (0..10_000).filter(|_| prng.chance(Ratio::percent(25))).count();
        assert!((2_280..=2_720).contains(&hits), "{hits}");
        assert!((0..100).all(|_| !prng.chance(Ratio::NEVER)));
        assert!((0..100).all(|_| prng.chance(Ratio::percent(100))));
    }

    #[test]
    fn a_shuffle_keeps_the_items_and_moves_them() {
        let mut items: Vec<u32> = (0..100).collect();
        Prng::new(4).shuffle(&mut items);
        assert_ne!(items, (0..100).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..100).collect::<Vec<_>>());
        Prng::new(5).shuffle::<u8>(&mut []);
    }
}
