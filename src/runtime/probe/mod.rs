//! The start-up probe: what this machine, its kernel and its container allow, tried under the
//! live seccomp filter rather than guessed. Every denial says what it costs and what allows it.

mod machine;
mod uring;

use std::fmt;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

pub use machine::{Kernel, Memory};
pub use uring::RingModes;

use super::topology::Cpus;
use super::{Flavour, sched};

/// Something that is denied: the program runs without it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denial {
    /// What, and how we know.
    pub what: String,
    /// What it costs.
    pub costs: &'static str,
    /// What would allow it.
    pub remedy: String,
}

/// A resource limit of the process. `None` is no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// What holds now.
    pub now: Option<u64>,
    /// What held when the process started.
    pub before: Option<u64>,
    /// As far as an ordinary user may raise it.
    pub hard: Option<u64>,
}

impl Limit {
    /// Raises the limit as far as it goes.
    fn raise(resource: Resource) -> Limit {
        let Rlimit { current: before, maximum: hard } = getrlimit(resource);
        // Refused or not, what counts is what holds afterwards.
        let _ = setrlimit(resource, Rlimit { current: hard, maximum: hard });
        Limit { now: getrlimit(resource).current, before, hard }
    }

    /// Whether this much is allowed.
    pub fn allows(&self, amount: u64) -> bool {
        self.now.is_none_or(|limit| limit >= amount)
    }
}

/// What the probe found.
#[derive(Clone, Debug)]
pub struct Probe {
    /// How rings can be made, or why they cannot.
    pub io_uring: Result<RingModes, Denial>,
    /// Bytes that may be locked in memory: raised to the hard limit.
    pub locked_bytes: Limit,
    /// Open descriptors: raised to the hard limit.
    pub descriptors: Limit,
    /// The running kernel.
    pub kernel: Kernel,
    /// Whether executor threads get short scheduler slices.
    pub short_slices: Result<(), Denial>,
    /// What kind of container this seems to be.
    pub container: Option<&'static str>,
    /// A seccomp filter is in force.
    pub seccomp: bool,
    /// Memory.
    pub memory: Memory,
    /// CPUs.
    pub cpus: Cpus,
}

/// Looks at everything once. Takes some milliseconds, makes threads (all gone on return) and raises
/// the limits on descriptors and locked memory as far as the process may.
pub fn probe() -> Probe {
    let locked_bytes = Limit::raise(Resource::Memlock);
    let descriptors = Limit::raise(Resource::Nofile);
    let kernel = machine::kernel();
    let seccomp = machine::seccomp();
    let container = machine::container();
    Probe {
        io_uring: uring::probe(seccomp, container, &locked_bytes),
        locked_bytes,
        descriptors,
        short_slices: short_slices(&kernel),
        container,
        seccomp,
        memory: machine::memory(),
        cpus: machine::cpus(),
        kernel,
    }
}

fn short_slices(kernel: &Kernel) -> Result<(), Denial> {
    // On a thread of its own, whose slice ends with it.
    let tried = std::thread::spawn(|| sched::request_slice(sched::EXECUTOR_SLICE_NS)).join();
    let Ok(Err(error)) = tried else { return Ok(()) };
    let (what, remedy) = if error.kind() == std::io::ErrorKind::Unsupported {
        let what = format!("short scheduler slices: Linux {kernel} ignores them");
        (what, "Linux 6.12 or newer".to_owned())
    } else {
        let what = format!("short scheduler slices: sched_setattr fails ({error})");
        (what, "allow sched_getattr and sched_setattr in the seccomp profile".to_owned())
    };
    let costs = "on machines of up to 4 CPUs tokens may leave some milliseconds late while the \
                 compute workers are busy";
    Err(Denial { what, costs, remedy })
}

impl Probe {
    /// What executors and sockets are to run on.
    pub fn flavour(&self) -> Flavour {
        if self.io_uring.is_ok() { Flavour::IoUring } else { Flavour::Epoll }
    }

    /// Everything that is denied, worst first.
    pub fn denials(&self) -> impl Iterator<Item = &Denial> {
        self.io_uring.as_ref().err().into_iter().chain(self.short_slices.as_ref().err())
    }

    /// Whether this many descriptors may be open, and if not, what to do.
    ///
    /// # Errors
    /// The denial, for the configuration to be refused with.
    pub fn check_descriptors(&self, needed: u64) -> Result<(), Denial> {
        if self.descriptors.allows(needed) {
            return Ok(());
        }
        Err(Denial {
            what: format!(
                "{needed} descriptors: the limit is {}",
                show_limit(self.descriptors.now)
            ),
            costs: "connections beyond the limit are refused",
            remedy: "raise it (ulimit -Hn, LimitNOFILE= in systemd, --ulimit nofile= in Docker) \
                     or set connections_max lower"
                .to_owned(),
        })
    }
}

fn show_limit(limit: Option<u64>) -> String {
    limit.map_or("unlimited".to_owned(), |limit| limit.to_string())
}

fn show_bytes(bytes: u64) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..0x10_0000 => format!("{} KiB", bytes >> 10),
        0x10_0000..0x4000_0000 => format!("{} MiB", bytes >> 20),
        _ => format!("{}.{} GiB", bytes >> 30, ((bytes % (1 << 30)) * 10) >> 30),
    }
}

impl fmt::Display for Probe {
    /// One line for each thing, then three for each denial.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "kernel       Linux {}", self.kernel)?;
        if let Some(container) = self.container {
            write!(f, ", in {container}")?;
        }
        writeln!(f, "{}", if self.seccomp { ", seccomp filter in force" } else { "" })?;
        let modes = self.io_uring.as_ref().map_or("", |modes| modes.describe());
        writeln!(f, "sockets      {}{modes}", self.flavour().name())?;
        let Cpus { allowed, quota_millicpus } = &self.cpus;
        write!(f, "CPUs         {}", allowed.len())?;
        match quota_millicpus {
            Some(milli) => writeln!(f, ", quota {}.{:02}", milli / 1000, milli % 1000 / 10)?,
            None => writeln!(f)?,
        }
        writeln!(
            f,
            "memory       {} free of {}",
            show_bytes(self.memory.available_bytes),
            show_bytes(self.memory.total_bytes)
        )?;
        let locked = self.locked_bytes.now.map_or("unlimited".to_owned(), show_bytes);
        write!(f, "limits       {} descriptors", show_limit(self.descriptors.now))?;
        write!(f, ", {locked} locked memory")?;
        for denial in self.denials() {
            write!(f, "\n{denial}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "denied       {}", self.what)?;
        writeln!(f, "  it costs   {}", self.costs)?;
        write!(f, "  to allow   {}", self.remedy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_finds_a_machine_it_can_run_on() {
        let probe = probe();
        assert!(!probe.cpus.allowed.is_empty() && probe.cpus.allowed.is_sorted());
        assert!(probe.memory.available_bytes > 0);
        assert!(probe.memory.available_bytes <= probe.memory.total_bytes);
        assert!(probe.kernel.major >= 4);
        assert_eq!(probe.descriptors.now, probe.descriptors.hard);
        let printed = probe.to_string();
        assert_eq!(printed.lines().count(), 5 + 3 * probe.denials().count(), "{printed}");
        assert!(probe.check_descriptors(16).is_ok());
        if let Some(limit) = probe.descriptors.now {
            let denial = probe.check_descriptors(limit + 1).unwrap_err();
            assert!(denial.what.contains(&limit.to_string()));
        }
    }

    #[test]
    fn bytes_are_shown_in_the_unit_that_fits() {
        let shown: Vec<_> = [1023, 1024, 8 << 20, 3 << 29].map(show_bytes).into();
        assert_eq!(shown, ["1023 B", "1 KiB", "8 MiB", "1.5 GiB"]);
    }
}
