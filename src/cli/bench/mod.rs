//! `forebay bench`: a load generator over the native protocol.

mod report;
mod tally;
mod workload;
