//! Flow control: who may send how much, and what the near future is likely to cost.
//!
//! Core: any. Accounts are integers; [`estimate`] alone uses floating point, and hands out
//! integers.

pub mod breaker;
pub mod calendar;
pub mod credit;
pub mod estimate;
pub mod forecast;
pub mod gate;
pub mod link;
pub mod token_bucket;

pub use breaker::Breaker;
pub use calendar::Calendar;
pub use credit::{CreditError, CreditReturn, CreditWindow};
pub use estimate::{Load, LoadEstimator, RateEstimator, StepCost, StepLoad, StepTimeModel};
pub use forecast::OutputForecast;
pub use gate::{Closed, GateKeeper, GateReader, gate};
pub use link::{Census, Receiver, SendError, Sender, link};
pub use token_bucket::{Shortage, TokenBucket};
