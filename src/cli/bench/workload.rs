//! What the load generator asks for, and when: all of it follows from the options and the seed.

use std::str::FromStr;

use crate::base::Prng;
use crate::request::TokenId;

/// How long prompts or outputs are, in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lengths {
    /// All the same.
    Fixed(u32),
    /// Evenly from the first to the second.
    Uniform(u32, u32),
    /// Exponential around this mean, at least 1 and at most eight times the mean: many short ones
    /// and a long tail, as conversations have.
    Exponential(u32),
}

impl FromStr for Lengths {
    type Err = String;

    fn from_str(text: &str) -> Result<Lengths, String> {
        let wrong = || format!("{text:?} must be N, N..M or exp:N, with numbers from 1 to 1048576");
        let number = |text: &str| -> Result<u32, String> {
            let number = text.parse().map_err(|_| wrong())?;
            if (1..=1 << 20).contains(&number) { Ok(number) } else { Err(wrong()) }
        };
        if let Some(mean) = text.strip_prefix("exp:") {
            return Ok(Lengths::Exponential(number(mean)?));
        }
        match text.split_once("..") {
            Some((low, high)) => {
                let (low, high) = (number(low)?, number(high)?);
                if low <= high { Ok(Lengths::Uniform(low, high)) } else { Err(wrong()) }
            }
            None => Ok(Lengths::Fixed(number(text)?)),
        }
    }
}

impl Lengths {
    /// The largest that can be drawn.
    pub fn max(self) -> u32 {
        match self {
            Lengths::Fixed(n) | Lengths::Uniform(_, n) => n,
            Lengths::Exponential(mean) => mean.saturating_mul(8),
        }
    }

    fn draw(self, prng: &mut Prng) -> u32 {
        match self {
            Lengths::Fixed(n) => n,
            Lengths::Uniform(low, high) => prng.between(low.into(), high.into()) as u32,
            Lengths::Exponential(mean) => {
                let drawn = (exponential(prng) * f64::from(mean)).round() as u32;
                drawn.clamp(1, self.max())
            }
        }
    }
}

/// A draw from the exponential distribution of mean 1.
fn exponential(prng: &mut Prng) -> f64 {
    // 53 random bits in (0, 1]: the logarithm of 0 is never taken.
    let uniform = ((prng.next_u64() >> 11) + 1) as f64 / (1u64 << 53) as f64;
    -uniform.ln()
}

/// When requests arrive.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arrivals {
    /// So many are always in progress: the next begins when one ends.
    Closed(u32),
    /// So many a second on average, at random moments (a Poisson process), whatever the server
    /// does.
    Open(f64),
}

/// The requests of one run, in order.
#[derive(Clone, Debug)]
pub struct Workload {
    prompt: Lengths,
    output: Lengths,
    vocab: u32,
    context: u32,
    gaps: Prng,
    lengths: Prng,
    tokens: Prng,
    rate: f64,
    next_arrival_s: f64,
}

/// One request to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// Its prompt.
    pub prompt: Vec<TokenId>,
    /// How many tokens it wants; end-of-text is ignored.
    pub output_tokens: u32,
}

impl Workload {
    /// A workload for a model with this vocabulary and context.
    pub fn new(
        prompt: Lengths,
        output: Lengths,
        arrivals: Arrivals,
        seed: u64,
        vocab: u32,
        context: u32,
    ) -> Workload {
        let mut prng = Prng::new(seed);
        let rate = if let Arrivals::Open(rate) = arrivals { rate } else { 0.0 };
        // One generator for each purpose: another distribution of lengths leaves the arrivals as
        // they were, so that two runs can be compared.
        let (gaps, lengths, tokens) = (prng.fork(), prng.fork(), prng.fork());
        Workload {
            prompt,
            output,
            vocab,
            context,
            gaps,
            lengths,
            tokens,
            rate,
            next_arrival_s: 0.0,
        }
    }

    /// The next request. Prompts are random ids, so no two share a prefix; ids below a sixteenth
    /// of the vocabulary are left out, for there lie the control tokens.
    pub fn job(&mut self) -> Job {
        let output = self.output.draw(&mut self.lengths).min(self.context.saturating_sub(1).max(1));
        let room = self.context.saturating_sub(output).max(1);
        let prompt = self.prompt.draw(&mut self.lengths).min(room);
        let low = u64::from(self.vocab / 16);
        let high = u64::from(self.vocab.max(1) - 1);
        let tokens = &mut self.tokens;
        let prompt = (0..prompt).map(|_| tokens.between(low, high) as TokenId).collect();
        Job { prompt, output_tokens: output }
    }

    /// When the next request of an open loop arrives, in nanoseconds from the start.
    pub fn arrival_ns(&mut self) -> u64 {
        self.next_arrival_s += exponential(&mut self.gaps) / self.rate;
        (self.next_arrival_s * 1e9) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload(prompt: &str, output: &str, rate: f64, seed: u64) -> Workload {
        let lengths = |text: &str| text.parse().unwrap();
        Workload::new(lengths(prompt), lengths(output), Arrivals::Open(rate), seed, 49_152, 8192)
    }

    #[test]
    fn lengths_are_read_and_nonsense_is_not() {
        assert_eq!("128".parse(), Ok(Lengths::Fixed(128)));
        assert_eq!("16..256".parse(), Ok(Lengths::Uniform(16, 256)));
        assert_eq!("exp:64".parse(), Ok(Lengths::Exponential(64)));
        for wrong in ["", "0", "-1", "5..", "9..3", "exp:", "exp:0", "1.5", "1048577", "a..b"] {
            assert!(wrong.parse::<Lengths>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_run_and_another_seed_another() {
        let run = |seed| {
            let mut workload = workload("1..50", "exp:20", 10.0, seed);
            (0..20).map(|_| (workload.job(), workload.arrival_ns())).collect::<Vec<_>>()
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
    }

    #[test]
    fn other_lengths_leave_the_arrivals_as_they_were() {
        let arrivals = |prompt: &str| {
            let mut workload = workload(prompt, "8", 10.0, 3);
            let arrival = |_| {
                workload.job();
                workload.arrival_ns()
            };
            (0..50).map(arrival).collect::<Vec<_>>()
        };
        assert_eq!(arrivals("10"), arrivals("exp:100"));
    }

    #[test]
    fn arrivals_are_in_order_and_have_the_rate_asked_for() {
        let mut workload = workload("1", "1", 50.0, 7);
        let times: Vec<u64> = (0..20_000).map(|_| workload.arrival_ns()).collect();
        assert!(times.is_sorted());
        // 20,000 gaps of an exponential distribution: their mean is off by under 4 % with a
        // probability of 1 - 10^-8 (its deviation is 1/sqrt(20,000) = 0.7 %).
        let rate = 20_000.0 / (times[19_999] as f64 / 1e9);
        assert!((48.0..52.0).contains(&rate), "{rate}");
        // A Poisson process is bursty: many gaps are far shorter than the mean.
        let short = times.windows(2).filter(|pair| pair[1] - pair[0] < 2_000_000).count();
        assert!((1_500..2_300).contains(&short), "{short}"); // 1 - e^-0.1 = 9.5 % of 20,000
    }

    #[test]
    fn drawn_lengths_keep_their_range_and_mean() {
        let mut prng = Prng::new(5);
        let mut draw = |lengths: Lengths| -> Vec<u32> {
            (0..20_000).map(|_| lengths.draw(&mut prng)).collect()
        };
        let uniform = draw(Lengths::Uniform(10, 20));
        assert_eq!((uniform.iter().min(), uniform.iter().max()), (Some(&10), Some(&20)));
        let exponential = draw(Lengths::Exponential(100));
        assert!(exponential.iter().all(|length| (1..=800).contains(length)));
        let mean = exponential.iter().map(|&length| f64::from(length)).sum::<f64>() / 20_000.0;
        assert!((96.0..104.0).contains(&mean), "{mean}");
    }

    #[test]
    fn a_job_fits_the_context_and_uses_ordinary_tokens_only() {
        let mut long = Workload::new(
            Lengths::Fixed(1000),
            Lengths::Fixed(900),
            Arrivals::Closed(1),
            0,
            160,
            1000,
        );
        let job = long.job();
        assert_eq!((job.prompt.len(), job.output_tokens), (100, 900));
        assert!(job.prompt.iter().all(|token| (10..160).contains(token)));
        for (vocab, context) in [(0, 0), (1, 1), (1, 2)] {
            let lengths = Lengths::Fixed(5);
            let arrivals = Arrivals::Closed(1);
            let job = Workload::new(lengths, lengths, arrivals, 0, vocab, context).job();
            assert!(!job.prompt.is_empty() && job.output_tokens > 0);
        }
    }
}
