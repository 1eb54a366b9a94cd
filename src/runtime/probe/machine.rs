//! Kernel, container, memory and CPUs, as /proc and /sys tell them.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use rustix::system::uname;
use rustix::thread::{CpuSet, sched_getaffinity};

use super::super::topology::Cpus;

/// The running kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// 6 of 6.12.
    pub major: u32,
    /// 12 of 6.12.
    pub minor: u32,
    /// As `uname -r` prints it.
    pub release: String,
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.release)
    }
}

pub(super) fn kernel() -> Kernel {
    parse_release(&uname().release().to_string_lossy())
}

fn parse_release(release: &str) -> Kernel {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0));
    let (major, minor) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    Kernel { major, minor, release: release.to_owned() }
}

/// Whether a seccomp filter is in force.
pub(super) fn seccomp() -> bool {
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("Seccomp:"));
    line.is_some_and(|mode| mode.trim() == "2")
}

/// What kind of container this seems to be. A hint for messages, nothing is decided by it.
pub(super) fn container() -> Option<&'static str> {
    if std::env::var_os("KUBERNETES_SERVICE_HOST").is_some() {
        return Some("Kubernetes");
    }
    if Path::new("/.dockerenv").exists() {
        return Some("Docker");
    }
    if Path::new("/run/.containerenv").exists() {
        return Some("Podman");
    }
    let init = fs::read_to_string("/proc/1/cgroup").unwrap_or_default();
    ["docker", "containerd", "lxc"].iter().any(|name| init.contains(name)).then_some("a container")
}

/// Memory as the process may use it: the machine's, or its control group's where that is less.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// All there is.
    pub total_bytes: u64,
    /// What can be had without pushing anything out.
    pub available_bytes: u64,
}

pub(super) fn memory() -> Memory {
    let machine = parse_meminfo(&fs::read_to_string("/proc/meminfo").unwrap_or_default());
    Groups::of_this_process()
        .levels_of("memory")
        .iter()
        .filter_map(|level| group_memory(level))
        .fold(machine, |least, group| Memory {
            total_bytes: least.total_bytes.min(group.total_bytes),
            available_bytes: least.available_bytes.min(group.available_bytes),
        })
}

fn parse_meminfo(text: &str) -> Memory {
    let kib = |name: &str| -> Option<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().ok()
    };
    let total_bytes = kib("MemTotal").unwrap_or(0) << 10;
    // Before Linux 3.14 there was no MemAvailable.
    let available_bytes = kib("MemAvailable").or_else(|| kib("MemFree")).unwrap_or(0) << 10;
    Memory { total_bytes, available_bytes }
}

/// The limit of one control group, if it has one.
fn group_memory(level: &Path) -> Option<Memory> {
    let number = |names: [&str; 2]| -> Option<u64> {
        let text = names.iter().find_map(|name| fs::read_to_string(level.join(name)).ok())?;
        text.trim().parse().ok()
    };
    let total_bytes = number(["memory.max", "memory.limit_in_bytes"])?;
    let used = number(["memory.current", "memory.usage_in_bytes"])?;
    // Part of what is used is cache that goes when memory is wanted.
    let stat = fs::read_to_string(level.join("memory.stat")).unwrap_or_default();
    let cache = stat.lines().find_map(|line| {
        let line = line.strip_prefix("total_").unwrap_or(line);
        line.strip_prefix("inactive_file ")?.trim().parse::<u64>().ok()
    });
    let used = used.saturating_sub(cache.unwrap_or(0));
    Some(Memory { total_bytes, available_bytes: total_bytes.saturating_sub(used) })
}

pub(super) fn cpus() -> Cpus {
    let allowed: Vec<usize> = match sched_getaffinity(None) {
        Ok(set) => (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect(),
        // More than 1024 CPUs: the first ones will do.
        Err(_) => (0..std::thread::available_parallelism().map_or(1, usize::from)).collect(),
    };
    let groups = Groups::of_this_process();
    let levels = groups.levels_of("cpu");
    let quota_millicpus = levels.iter().filter_map(|level| group_quota(level)).min();
    Cpus { allowed: if allowed.is_empty() { vec![0] } else { allowed }, quota_millicpus }
}

/// The CPU quota of one control group in thousandths of a CPU, if it has one.
fn group_quota(level: &Path) -> Option<u64> {
    let per_mille = |quota: &str, period: &str| -> Option<u64> {
        let (quota, period) =
            (quota.trim().parse::<u64>().ok()?, period.trim().parse::<u64>().ok()?);
        quota.checked_mul(1000)?.checked_div(period)
    };
    if let Ok(text) = fs::read_to_string(level.join("cpu.max")) {
        // "max 100000" is no quota: "max" is no number.
        let (quota, period) = text.trim().split_once(' ')?;
        return per_mille(quota, period);
    }
    // "-1" is no quota: not a u64.
    let quota = fs::read_to_string(level.join("cpu.cfs_quota_us")).ok()?;
    let period = fs::read_to_string(level.join("cpu.cfs_period_us")).ok()?;
    per_mille(&quota, &period)
}

/// The control groups that a process is in, and where they are mounted.
struct Groups {
    mount: PathBuf,
    /// The lines of /proc/self/cgroup: `0::/path` (version 2), `4:cpu,cpuacct:/path` (version 1).
    memberships: String,
}

impl Groups {
    fn of_this_process() -> Groups {
        let memberships = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        Groups { mount: PathBuf::from("/sys/fs/cgroup"), memberships }
    }

    /// The folders of a controller's groups, from ours up to the root: each may set a limit.
    fn levels_of(&self, controller: &str) -> Vec<PathBuf> {
        let mut levels = Vec::new();
        for line in self.memberships.lines() {
            let mut fields = line.splitn(3, ':').skip(1);
            let (Some(names), Some(path)) = (fields.next(), fields.next()) else { continue };
            let root = match names {
                "" => self.mount.clone(),
                _ if names.split(',').any(|name| name == controller) => self.mount.join(controller),
                _ => continue,
            };
            // In a container the path may name a group that only the host sees; the container's
            // own is then at the root, which is looked at in any case.
            let path = Path::new(path.trim_start_matches('/'));
            levels.extend(path.ancestors().map(|above| root.join(above)));
        }
        levels
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_of_all_sorts_are_understood() {
        let version = |release| {
            let kernel = parse_release(release);
            (kernel.major, kernel.minor)
        };
        assert_eq!(version("6.18.44-fc-v669"), (6, 18));
        assert_eq!(version("5.15"), (5, 15));
        assert_eq!(version("7.0-rc1"), (7, 0));
        assert_eq!(version("strange"), (0, 0));
    }

    #[test]
    fn memory_is_what_the_kernel_calls_available() {
        let text = "MemTotal:       8000 kB\nMemFree:   100 kB\nMemAvailable:    5000 kB\n";
        let expected = Memory { total_bytes: 8000 << 10, available_bytes: 5000 << 10 };
        assert_eq!(parse_meminfo(text), expected);
        assert_eq!(parse_meminfo(""), Memory { total_bytes: 0, available_bytes: 0 });
    }

    fn write(root: &Path, file: &str, text: &str) {
        let path = root.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn the_tightest_group_on_the_way_up_counts_in_version_2() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), "a/b/cpu.max", "max 100000\n");
        write(root.path(), "a/cpu.max", "250000 100000\n");
        write(root.path(), "a/b/memory.max", "1000\n");
        write(root.path(), "a/b/memory.current", "700\n");
        write(root.path(), "a/b/memory.stat", "anon 300\ninactive_file 200\n");
        write(root.path(), "a/memory.max", "max\n");
        let groups = Groups { mount: root.path().into(), memberships: "0::/a/b\n".to_owned() };
        let quotas: Vec<_> =
            groups.levels_of("cpu").iter().map(|level| group_quota(level)).collect();
        assert_eq!(quotas, [None, Some(2500), None]);
        let memories: Vec<_> =
            groups.levels_of("memory").iter().map(|level| group_memory(level)).collect();
        let limited = Memory { total_bytes: 1000, available_bytes: 500 };
        assert_eq!(memories, [Some(limited), None, None]);
    }

    #[test]
    fn version_1_has_a_folder_for_each_controller() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), "cpu/docker/x/cpu.cfs_quota_us", "150000\n");
        write(root.path(), "cpu/docker/x/cpu.cfs_period_us", "100000\n");
        write(root.path(), "cpu/cpu.cfs_quota_us", "-1\n");
        write(root.path(), "cpu/cpu.cfs_period_us", "100000\n");
        let memberships = "7:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n".to_owned();
        let groups = Groups { mount: root.path().into(), memberships };
        let quotas: Vec<_> =
            groups.levels_of("cpu").iter().filter_map(|level| group_quota(level)).collect();
        assert_eq!(quotas, [1500]);
        assert_eq!(groups.levels_of("memory").len(), 3);
    }

    #[test]
    fn nonsense_in_control_groups_is_no_limit() {
        let root = tempfile::tempdir().unwrap();
        for text in ["", "x", "100000", "100000 0", "-5 100", "99999999999999999999 1"] {
            write(root.path(), "cpu.max", text);
            assert_eq!(group_quota(root.path()), None, "{text}");
        }
    }
}
