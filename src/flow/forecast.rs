//! How long will the answer be? Nobody knows; but answers to one tenant's requests resemble each
//! other. Per key a small decaying histogram of lengths is kept, and the forecast is a quantile of
//! it. Integers throughout: it decides about admission.

/// Buckets of a histogram: four per doubling, from 1 to 2^17 tokens, and one for all beyond.
const BUCKETS: usize = 69;
/// When a histogram holds this many answers, all its counts are halved: the last few dozen
/// answers weigh most, and a tenant that changes its habits is followed soon.
const ANSWERS_MAX: u32 = 128;
/// A key with fewer answers is judged by everybody's: a quantile of five is an accident.
const ANSWERS_MIN: u32 = 8;

/// Forecasts of output length per key (a tenant, or a tenant and a class: the owner hashes).
///
/// Memory is fixed: `keys_max` histograms. When a new key comes and all are in use, the one that
/// was observed longest ago makes room.
#[derive(Debug)]
pub struct OutputForecast {
    /// Sorted, so that a look-up is a binary search. Length 0 ..= `keys_max`.
    entries: Vec<Entry>,
    keys_max: usize,
    /// Every answer, whatever its key.
    everybody: Histogram,
    /// Counts observations: the entries' time.
    observed: u64,
}

#[derive(Debug)]
struct Entry {
    key: u64,
    /// `OutputForecast::observed` when this entry last was.
    last: u64,
    histogram: Histogram,
}

impl OutputForecast {
    /// Bytes of a key's histogram.
    pub const KEY_BYTES: usize = size_of::<Entry>();

    /// Room for this many keys, [`OutputForecast::KEY_BYTES`] each.
    pub fn new(keys_max: usize) -> OutputForecast {
        OutputForecast {
            entries: Vec::with_capacity(keys_max),
            keys_max,
            everybody: Histogram::default(),
            observed: 0,
        }
    }

    /// An answer of this many tokens ended, by itself or at its limit.
    pub fn observe(&mut self, key: u64, tokens: u32) {
        self.observed += 1;
        self.everybody.add(tokens);
        if self.keys_max == 0 {
            return;
        }
        let index = match self.entries.binary_search_by_key(&key, |entry| entry.key) {
            Ok(index) => index,
            Err(_) => self.insert(key),
        };
        let entry = &mut self.entries[index];
        entry.last = self.observed;
        entry.histogram.add(tokens);
    }

    /// The length that `permille` of 1,000 answers stay within, as a forecast for the next answer
    /// to this key, but at most `max_tokens`. Before any answer was seen: `max_tokens`.
    pub fn tokens(&self, key: u64, permille: u32, max_tokens: u32) -> u32 {
        let own = self.entries.binary_search_by_key(&key, |entry| entry.key).ok();
        let histogram = match own.map(|index| &self.entries[index].histogram) {
            Some(histogram) if histogram.answers >= ANSWERS_MIN => histogram,
            _ => &self.everybody,
        };
        histogram.quantile(permille).map_or(max_tokens, |tokens| tokens.min(max_tokens))
    }

    fn insert(&mut self, key: u64) -> usize {
        if self.entries.len() == self.keys_max {
            let ages = self.entries.iter().enumerate();
            let oldest = ages.min_by_key(|(_, entry)| entry.last).map(|(index, _)| index);
            self.entries.remove(oldest.expect("keys_max is not 0"));
        }
        let index = self.entries.partition_point(|entry| entry.key < key);
        self.entries.insert(index, Entry { key, last: 0, histogram: Histogram::default() });
        index
    }
}

#[derive(Debug)]
struct Histogram {
    /// Sum of `counts`. Range: 0 ..= [`ANSWERS_MAX`].
    answers: u32,
    counts: [u8; BUCKETS],
}

impl Default for Histogram {
    fn default() -> Histogram {
        Histogram { answers: 0, counts: [0; BUCKETS] }
    }
}

// A bucket's count never exceeds the sum, so the sum's bound is what makes u8 enough.
const _: () = assert!(ANSWERS_MAX <= u8::MAX as u32);

impl Histogram {
    fn add(&mut self, tokens: u32) {
        if self.answers == ANSWERS_MAX {
            self.answers = 0;
            for count in &mut self.counts {
                *count /= 2;
                self.answers += u32::from(*count);
            }
        }
        self.counts[bucket_of(tokens)] += 1;
        self.answers += 1;
    }

    /// The upper end of the bucket in which the quantile lies: a forecast errs to the long side,
    /// by a fifth on average. `None` when empty.
    fn quantile(&self, permille: u32) -> Option<u32> {
        let rank = (self.answers * permille.min(1000)).div_ceil(1000).max(1);
        let mut below = 0;
        let reached = self.counts.iter().position(|&count| {
            below += u32::from(count);
            below >= rank
        });
        reached.map(bucket_last)
    }
}

/// Lengths 0 and 1 share bucket 0, then four buckets cover each doubling (fewer below 8, where
/// there are not four lengths): the two bits behind the leading one select among them.
fn bucket_of(tokens: u32) -> usize {
    let tokens = tokens.max(1);
    let doubling = tokens.ilog2();
    let quarter =
        if doubling >= 2 { (tokens >> (doubling - 2)) & 3 } else { (tokens << (2 - doubling)) & 3 };
    ((doubling * 4 + quarter) as usize).min(BUCKETS - 1)
}

/// The longest length of a bucket.
fn bucket_last(bucket: usize) -> u32 {
    if bucket == BUCKETS - 1 {
        return u32::MAX;
    }
    let (doubling, quarter) = (bucket as u32 / 4, bucket as u32 % 4);
    // The next bucket begins at (4 + quarter + 1) quarters of 2^doubling.
    (((5 + quarter) << doubling).div_ceil(4) - 1).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_follow_each_other_without_gap_and_know_their_last_length() {
        for tokens in 1..200_000 {
            let bucket = bucket_of(tokens);
            let next = bucket_of(tokens + 1);
            assert!(next >= bucket);
            assert!(tokens <= bucket_last(bucket));
            if next > bucket {
                assert_eq!(bucket_last(bucket), tokens);
            }
        }
        assert_eq!(bucket_of(0), bucket_of(1));
        assert_eq!(bucket_of(u32::MAX), BUCKETS - 1);
    }

    #[test]
    fn before_any_answer_the_forecast_is_the_limit() {
        assert_eq!(OutputForecast::new(4).tokens(1, 900, 512), 512);
    }

    #[test]
    fn a_forecast_is_the_quantile_of_the_keys_own_answers() {
        let mut forecast = OutputForecast::new(4);
        for n in 0..100 {
            forecast.observe(1, if n % 10 == 0 { 1_000 } else { 100 });
            forecast.observe(2, 10);
        }
        let median = forecast.tokens(1, 500, u32::MAX);
        assert!((100..=125).contains(&median), "{median}");
        let tail = forecast.tokens(1, 990, u32::MAX);
        assert!((1_000..=1_250).contains(&tail), "{tail}");
        assert_eq!(forecast.tokens(1, 990, 300), 300);
        assert!((10..=12).contains(&forecast.tokens(2, 990, u32::MAX)));
    }

    #[test]
    fn a_key_with_few_answers_is_judged_by_everybodys() {
        let mut forecast = OutputForecast::new(4);
        for _ in 0..50 {
            forecast.observe(1, 100);
        }
        forecast.observe(2, 4);
        assert!((100..=125).contains(&forecast.tokens(2, 500, u32::MAX)));
        assert!((100..=125).contains(&forecast.tokens(3, 500, u32::MAX)));
    }

    #[test]
    fn habits_that_change_are_followed() {
        let mut forecast = OutputForecast::new(1);
        (0..1_000).for_each(|_| forecast.observe(1, 50));
        (0..200).for_each(|_| forecast.observe(1, 800));
        assert!(forecast.tokens(1, 500, u32::MAX) >= 800);
    }

    #[test]
    fn the_key_observed_longest_ago_makes_room() {
        let mut forecast = OutputForecast::new(2);
        for _ in 0..20 {
            forecast.observe(1, 10);
            forecast.observe(2, 100);
        }
        (0..20).for_each(|_| forecast.observe(3, 1_000));
        let keys: Vec<u64> = forecast.entries.iter().map(|entry| entry.key).collect();
        assert_eq!(keys, [2, 3]);
        OutputForecast::new(0).observe(1, 1);
    }
}
