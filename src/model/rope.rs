//! Rotary positions: how fast each pair of a head's values turns, for every supported scaling.
//!
//! All scalings reduce to one frequency a pair and one magnitude, none of which depends on the
//! position, so a backend needs nothing but this table.
//!
//! Core: none; it runs once, before the cores start.

use crate::model::config::ModelConfig;
use crate::model::gguf::{Gguf, GgufError};
use crate::model::quant;

/// How rotary frequencies are stretched for contexts longer than those of the first training.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All positions divided by `factor`.
    Linear {
        /// How much longer the context is.
        factor: f64,
    },
    /// Each frequency divided by its own factor, from the tensor `rope_freqs.weight`.
    Llama3,
    /// YaRN: fast pairs stay, slow pairs are divided by `factor`, those between are blended, and
    /// queries and keys are scaled up a little.
    Yarn {
        /// How much longer the context is.
        factor: f64,
        /// The context of the first training, in tokens.
        original_context: usize,
        /// Extra factor on the magnitude.
        attention_factor: f64,
        /// Pairs that turn more often than this within the original context stay.
        beta_fast: f64,
        /// Pairs that turn less often than this within it are divided.
        beta_slow: f64,
    },
}

/// The rotation of one head.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Radians by which pair i (values 2i and 2i+1) turns from one position to the next.
    pub frequencies: Vec<f64>,
    /// Multiplies sine and cosine; 1 except for YaRN.
    pub magnitude: f64,
}

impl Rope {
    pub(crate) fn new(config: &ModelConfig, gguf: &Gguf) -> Result<Rope, GgufError> {
        let (theta, dims) = (config.rope.theta, config.rope.dims);
        let plain = (0..dims / 2).map(|pair| theta.powf(-2.0 * pair as f64 / dims as f64));
        match config.rope.scaling {
            RopeScaling::None => Ok(Rope { frequencies: plain.collect(), magnitude: 1.0 }),
            RopeScaling::Linear { factor } => {
                let frequencies = plain.map(|frequency| frequency / factor).collect();
                Ok(Rope { frequencies, magnitude: 1.0 })
            }
            RopeScaling::Llama3 => {
                let factors = factors(gguf, dims / 2)?;
                let frequencies = plain.zip(factors).map(|(plain, factor)| plain / factor);
                Ok(Rope { frequencies: frequencies.collect(), magnitude: 1.0 })
            }
            RopeScaling::Yarn {
                factor,
                original_context,
                attention_factor,
                beta_fast,
                beta_slow,
            } => {
                // The pair that turns `beta` times within the original context.
                let pair_turning = |beta: f64| {
                    let context = original_context as f64;
                    dims as f64 * (context / (beta * std::f64::consts::TAU)).ln()
                        / (2.0 * theta.ln())
                };
                let low = pair_turning(beta_fast).floor().max(0.0);
                let high = pair_turning(beta_slow).ceil().min(dims as f64 - 1.0);
                let blend = |(pair, plain): (usize, f64)| {
                    let ramp = (pair as f64 - low) / (high - low).max(0.001);
                    let stretched = ramp.clamp(0.0, 1.0);
                    plain * (1.0 - stretched) + plain / factor * stretched
                };
                Ok(Rope {
                    frequencies: plain.enumerate().map(blend).collect(),
                    magnitude: attention_factor * (1.0 + 0.1 * factor.ln()),
                })
            }
        }
    }
}

impl Rope {
    /// (cosine, sine) of every rotated pair at every position from 0 on, as far as `turns` goes:
    /// computed in double precision, rounded once.
    pub fn turns(&self, turns: &mut [f32]) {
        let pairs_per_position = self.frequencies.len().max(1);
        for (index, turn) in turns.as_chunks_mut::<2>().0.iter_mut().enumerate() {
            let position = (index / pairs_per_position) as f64;
            let (sine, cosine) =
                (position * self.frequencies[index % pairs_per_position]).sin_cos();
            *turn = [(cosine * self.magnitude) as f32, (sine * self.magnitude) as f32];
        }
    }
}

/// Llama 3's factors.
fn factors(gguf: &Gguf, pairs: usize) -> Result<Vec<f64>, GgufError> {
    let name = "rope_freqs.weight";
    let missing = || GgufError::MissingTensor { name: name.into(), shape: vec![pairs] };
    let tensor = gguf.tensor(name).ok_or_else(missing)?;
    if tensor.columns() != pairs || !tensor.dtype.is_plain() {
        return Err(missing());
    }
    let mut factors = vec![0.0f32; pairs];
    quant::dequantize_row(tensor.dtype, tensor.row(0), &mut factors);
    let bad = factors.iter().find(|factor| !(factor.is_finite() && **factor > 0.0));
    if let Some(bad) = bad {
        return Err(GgufError::out_of_range(format!("a value of {name:?}"), bad, "above 0"));
    }
    Ok(factors.into_iter().map(f64::from).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::gguf::testing::{small_model, small_model_with};

    fn rope(extra: &[(&str, crate::model::gguf::testing::Meta)]) -> Rope {
        let gguf = Gguf::from_bytes(small_model_with(extra).bytes()).expect("valid");
        let config = gguf.config().expect("valid");
        config.rope(&gguf).expect("valid")
    }

    #[test]
    fn the_first_pair_turns_one_radian_a_position_and_later_ones_ever_less() {
        let rope = rope(&[]);
        assert_eq!(rope.frequencies[0], 1.0);
        assert!(rope.frequencies.windows(2).all(|pair| pair[1] < pair[0]));
        assert_eq!(rope.magnitude, 1.0);
    }

    #[test]
    fn linear_scaling_divides_every_frequency() {
        use crate::model::gguf::testing::Meta;
        let plain = rope(&[]);
        let linear = rope(&[
            ("llama.rope.scaling.type", Meta::Text("linear")),
            ("llama.rope.scaling.factor", Meta::F32(4.0)),
        ]);
        for (plain, linear) in plain.frequencies.iter().zip(&linear.frequencies) {
            assert_eq!(*linear, plain / 4.0);
        }
    }

    #[test]
    fn yarn_keeps_the_fast_pairs_and_stretches_the_slow_ones() {
        use crate::model::gguf::testing::Meta;
        let plain = rope(&[]);
        let yarn = rope(&[
            ("llama.rope.scaling.type", Meta::Text("yarn")),
            ("llama.rope.scaling.factor", Meta::F32(8.0)),
            ("llama.rope.scaling.original_context_length", Meta::U32(256)),
        ]);
        assert_eq!(yarn.frequencies[0], plain.frequencies[0]);
        let last = plain.frequencies.len() - 1;
        assert!((yarn.frequencies[last] - plain.frequencies[last] / 8.0).abs() < 1e-12);
        assert!((yarn.magnitude - 1.2079).abs() < 1e-3);
    }

    #[test]
    fn llama_3_factors_divide_each_frequency_by_its_own() {
        let mut file = small_model();
        file.tensor_f32("rope_freqs.weight", &[8], &[1.0, 1.0, 1.0, 1.0, 2.0, 4.0, 8.0, 8.0]);
        let gguf = Gguf::from_bytes(file.bytes()).expect("valid");
        let config = gguf.config().expect("valid");
        assert_eq!(config.rope.scaling, RopeScaling::Llama3);
        let scaled = config.rope(&gguf).expect("valid");
        let plain = rope(&[]);
        assert_eq!(scaled.frequencies[0], plain.frequencies[0]);
        assert_eq!(scaled.frequencies[5], plain.frequencies[5] / 4.0);
    }
}
