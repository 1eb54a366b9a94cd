//! Flow control: who may send how much, and what the near future is likely to cost.
//!
//! Core: any. Accounts are integers; [`estimate`] alone uses floating point, and hands out
//! integers.

pub mod credit;
pub mod link;

pub use credit::{CreditError, CreditWindow};
pub use link::{Census, Receiver, SendError, Sender, link};
