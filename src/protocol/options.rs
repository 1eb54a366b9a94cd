//! A request's options: how to choose tokens and when to stop, as a list of tagged values.
//!
//! Tagged, so that a request that wants the defaults sends nothing, and a later minor addition
//! needs no new frame. What is wrong here is wrong with one request, never with the connection.

use std::borrow::Cow;

use super::bytes::{Reader, put_f32, put_u16, put_u32, put_u64};
use super::request::BodyError;
use crate::request::{STOP_STRING_BYTES_MAX, STOP_STRINGS_MAX, SamplingParams};

/// Everything about a request that is neither its prelude nor its prompt.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RequestOptions {
    /// How to choose tokens.
    pub sampling: SamplingParams,
    /// Text that ends the output where it appears; not part of the output. At most
    /// [`STOP_STRINGS_MAX`], each of 1 to [`STOP_STRING_BYTES_MAX`] bytes of UTF-8.
    pub stop: Vec<Box<[u8]>>,
    /// Go on past the end-of-text token.
    pub ignore_eos: bool,
}

const TEMPERATURE: u8 = 1;
const TOP_K: u8 = 2;
const TOP_P: u8 = 3;
const MIN_P: u8 = 4;
const REPETITION_PENALTY: u8 = 5;
const FREQUENCY_PENALTY: u8 = 6;
const PRESENCE_PENALTY: u8 = 7;
const SEED: u8 = 8;
const LOGPROBS: u8 = 9;
const IGNORE_EOS: u8 = 10;
const LOGIT_BIAS: u8 = 16;
const STOP: u8 = 17;

/// Options that may be given once: their tags are below this, so that a bit set holds them.
const SINGLE_TAGS: u8 = 17;

fn name(tag: u8) -> &'static str {
    match tag {
        TEMPERATURE => "temperature",
        TOP_K => "top_k",
        TOP_P => "top_p",
        MIN_P => "min_p",
        REPETITION_PENALTY => "repetition_penalty",
        FREQUENCY_PENALTY => "frequency_penalty",
        PRESENCE_PENALTY => "presence_penalty",
        SEED => "seed",
        LOGPROBS => "logprobs",
        IGNORE_EOS => "ignore_eos",
        LOGIT_BIAS => "logit_bias",
        STOP => "stop",
        _ => "unknown option",
    }
}

impl RequestOptions {
    /// Appends what differs from the defaults.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let sampling = &self.sampling;
        let usual = SamplingParams::default();
        let mut float = |tag: u8, value: f32, default: f32| {
            if value != default {
                out.push(tag);
                put_u16(out, 4);
                put_f32(out, value);
            }
        };
        float(TEMPERATURE, sampling.temperature, usual.temperature);
        float(TOP_P, sampling.top_p, usual.top_p);
        float(MIN_P, sampling.min_p, usual.min_p);
        float(REPETITION_PENALTY, sampling.repetition_penalty, usual.repetition_penalty);
        float(FREQUENCY_PENALTY, sampling.frequency_penalty, usual.frequency_penalty);
        float(PRESENCE_PENALTY, sampling.presence_penalty, usual.presence_penalty);
        if sampling.top_k != usual.top_k {
            out.push(TOP_K);
            put_u16(out, 4);
            put_u32(out, sampling.top_k);
        }
        if sampling.seed != usual.seed {
            out.push(SEED);
            put_u16(out, 8);
            put_u64(out, sampling.seed);
        }
        if let Some(count) = sampling.logprobs {
            out.extend_from_slice(&[LOGPROBS, 1, 0, count]);
        }
        if self.ignore_eos {
            out.extend_from_slice(&[IGNORE_EOS, 0, 0]);
        }
        // A list beyond its bound is cut by no one: the length field could not hold 8,192 biases,
        // so the encoder sends one entry more than allowed and the server says what is wrong.
        let biases = &sampling.logit_bias;
        let biases = &biases[..biases.len().min(SamplingParams::LOGIT_BIAS_MAX + 1)];
        if !biases.is_empty() {
            out.push(LOGIT_BIAS);
            put_u16(out, (biases.len() * 8) as u16);
            for &(token, bias) in biases {
                put_u32(out, token);
                put_f32(out, bias);
            }
        }
        for stop in self.stop.iter().take(STOP_STRINGS_MAX + 1) {
            let stop = &stop[..stop.len().min(STOP_STRING_BYTES_MAX + 1)];
            out.push(STOP);
            put_u16(out, stop.len() as u16);
            out.extend_from_slice(stop);
        }
    }

    /// Reads and checks all options.
    pub fn decode(bytes: &[u8]) -> Result<RequestOptions, BodyError> {
        let mut options = RequestOptions::default();
        let mut seen = 0u32;
        let mut reader = Reader::new(bytes);
        while reader.rest_bytes() > 0 {
            let cut = || BodyError(Cow::Borrowed("the options end in the middle of an option"));
            let tag = reader.u8().ok_or_else(cut)?;
            let length = reader.u16().ok_or_else(cut)?;
            let value = reader.take(usize::from(length)).ok_or_else(cut)?;
            if tag < SINGLE_TAGS {
                if seen & (1 << tag) != 0 {
                    return Err(BodyError(format!("{} is given twice", name(tag)).into()));
                }
                seen |= 1 << tag;
            }
            options.read_one(tag, value)?;
        }
        options.sampling.check().map_err(|message| BodyError(message.into()))?;
        Ok(options)
    }

    fn read_one(&mut self, tag: u8, value: &[u8]) -> Result<(), BodyError> {
        let sampling = &mut self.sampling;
        let mut reader = Reader::new(value);
        let fits = match tag {
            TEMPERATURE => reader.f32().map(|x| sampling.temperature = x),
            TOP_K => reader.u32().map(|x| sampling.top_k = x),
            TOP_P => reader.f32().map(|x| sampling.top_p = x),
            MIN_P => reader.f32().map(|x| sampling.min_p = x),
            REPETITION_PENALTY => reader.f32().map(|x| sampling.repetition_penalty = x),
            FREQUENCY_PENALTY => reader.f32().map(|x| sampling.frequency_penalty = x),
            PRESENCE_PENALTY => reader.f32().map(|x| sampling.presence_penalty = x),
            SEED => reader.u64().map(|x| sampling.seed = x),
            LOGPROBS => reader.u8().map(|x| sampling.logprobs = Some(x)),
            IGNORE_EOS => {
                self.ignore_eos = true;
                Some(())
            }
            LOGIT_BIAS => return self.read_biases(reader),
            STOP => return self.read_stop(value),
            _ => {
                let message = format!("option {tag} is not part of version 1");
                return Err(BodyError(message.into()));
            }
        };
        fits.and_then(|()| reader.finish(())).ok_or_else(|| {
            BodyError(format!("{} does not have the length its type has", name(tag)).into())
        })
    }

    fn read_biases(&mut self, mut reader: Reader<'_>) -> Result<(), BodyError> {
        if !reader.rest_bytes().is_multiple_of(8) {
            return Err(BodyError("logit_bias must be pairs of a token and a number".into()));
        }
        if reader.rest_bytes() / 8 > SamplingParams::LOGIT_BIAS_MAX {
            return Err(BodyError("logit_bias must have at most 300 entries".into()));
        }
        while let (Some(token), Some(bias)) = (reader.u32(), reader.f32()) {
            self.sampling.logit_bias.push((token, bias));
        }
        Ok(())
    }

    fn read_stop(&mut self, value: &[u8]) -> Result<(), BodyError> {
        if self.stop.len() == STOP_STRINGS_MAX {
            return Err(BodyError("there may be at most 16 stop strings".into()));
        }
        if value.is_empty() || value.len() > STOP_STRING_BYTES_MAX {
            return Err(BodyError("a stop string must have 1 to 256 bytes".into()));
        }
        if std::str::from_utf8(value).is_err() {
            return Err(BodyError("a stop string must be UTF-8".into()));
        }
        self.stop.push(value.into());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(bytes: &[u8]) -> String {
        RequestOptions::decode(bytes).unwrap_err().0.into_owned()
    }

    #[test]
    fn defaults_need_no_bytes() {
        let mut out = Vec::new();
        RequestOptions::default().encode(&mut out);
        assert!(out.is_empty());
        assert_eq!(RequestOptions::decode(&[]), Ok(RequestOptions::default()));
    }

    #[test]
    fn every_option_survives_the_way() {
        let options = RequestOptions {
            sampling: SamplingParams {
                temperature: 0.5,
                top_k: 40,
                top_p: 0.9,
                min_p: 0.05,
                repetition_penalty: 1.5,
                frequency_penalty: -0.5,
                presence_penalty: 0.25,
                seed: u64::MAX,
                logprobs: Some(20),
                logit_bias: vec![(3, -100.0), (7, 1.0)],
            },
            stop: vec![b"\n\n".to_vec().into(), "ende".as_bytes().into()],
            ignore_eos: true,
        };
        let mut out = Vec::new();
        options.encode(&mut out);
        assert_eq!(RequestOptions::decode(&out), Ok(options));
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert_eq!(error(&[TEMPERATURE, 4]), "the options end in the middle of an option");
        assert_eq!(error(&[TEMPERATURE, 2, 0, 0, 0]), {
            "temperature does not have the length its type has"
        });
        assert_eq!(error(&[99, 0, 0]), "option 99 is not part of version 1");
        assert_eq!(error(&[IGNORE_EOS, 0, 0, IGNORE_EOS, 0, 0]), "ignore_eos is given twice");
        assert_eq!(error(&[IGNORE_EOS, 1, 0, 0]), {
            "ignore_eos does not have the length its type has"
        });
        assert_eq!(error(&[LOGPROBS, 1, 0, 21]), "logprobs must be at most 20");
        assert_eq!(error(&[STOP, 0, 0]), "a stop string must have 1 to 256 bytes");
        assert_eq!(error(&[STOP, 1, 0, 0xff]), "a stop string must be UTF-8");
        let mut nan = vec![TOP_P, 4, 0];
        nan.extend_from_slice(&f32::NAN.to_le_bytes());
        assert_eq!(error(&nan), "top_p must be above 0 and at most 1");
    }

    #[test]
    fn lists_beyond_their_bounds_are_refused_not_cut() {
        let mut options = RequestOptions::default();
        options.sampling.logit_bias = vec![(1, 0.5); 10_000];
        let mut out = Vec::new();
        options.encode(&mut out);
        assert_eq!(error(&out), "logit_bias must have at most 300 entries");
        let options = RequestOptions { stop: vec![b"x"[..].into(); 17], ..Default::default() };
        out.clear();
        options.encode(&mut out);
        assert_eq!(error(&out), "there may be at most 16 stop strings");
        let options = RequestOptions { stop: vec![[b'x'; 999][..].into()], ..Default::default() };
        out.clear();
        options.encode(&mut out);
        assert_eq!(error(&out), "a stop string must have 1 to 256 bytes");
    }
}
