//! What the user sees while a model is fetched.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};

/// Whether fetching a model is shown. All of it goes to standard error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// A bar on a terminal, one line a stage elsewhere.
    Show,
    /// Nothing.
    Quiet,
}

impl Progress {
    /// One line for the user.
    pub(super) fn say(self, text: &str) {
        if self == Progress::Show {
            eprintln!("forebay: {text}");
        }
    }

    /// A stage of `total` bytes begins.
    pub(super) fn stage(self, what: &str, total: u64) -> Meter {
        if self == Progress::Quiet {
            return Meter(ProgressBar::hidden());
        }
        if !std::io::stderr().is_terminal() {
            eprintln!("forebay: {what} ({:.1} MB)", total as f64 / 1e6);
            return Meter(ProgressBar::hidden());
        }
        let template = "{msg:.bold} {bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        let style = ProgressStyle::with_template(template).expect("a constant template");
        Meter(ProgressBar::new(total).with_style(style).with_message(what.to_owned()))
    }
}

/// The bar of one stage; gone when dropped.
pub(super) struct Meter(ProgressBar);

impl Meter {
    /// So many bytes are done in all.
    pub(super) fn at(&self, bytes: u64) {
        self.0.set_position(bytes);
    }

    /// So many bytes more are done.
    pub(super) fn add(&self, bytes: u64) {
        self.0.inc(bytes);
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
