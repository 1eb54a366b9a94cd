//! How much memory there is to be had: the machine's, or the container's when that is less.

use std::fs;
use std::path::{Path, PathBuf};

/// Bytes of memory that this process may still take: `MemAvailable`, or less where a control
/// group allows less. `None` where the system does not say.
pub(super) fn free_memory() -> Option<u64> {
    let available = available(&fs::read_to_string("/proc/meminfo").ok()?)?;
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limits = group_files(&groups).into_iter().filter_map(|(max, used)| group_free(&max, &used));
    Some(limits.fold(available, u64::min))
}

fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

/// Files with limit and use of each group that this process is in, from itself up to the root:
/// a limit anywhere on the way counts. Inside a container the own group is mounted as the root,
/// which is why the root is always among them.
fn group_files(groups: &str) -> Vec<(PathBuf, PathBuf)> {
    let mut files = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next())
        else {
            continue;
        };
        let (root, max, used) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max", "memory.current"),
            list if list.split(',').any(|controller| controller == "memory") => {
                ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
            }
            _ => continue,
        };
        for folder in Path::new(path.trim_start_matches('/')).ancestors() {
            let folder = Path::new(root).join(folder);
            files.push((folder.join(max), folder.join(used)));
        }
    }
    files
}

fn group_free(max: &Path, used: &Path) -> Option<u64> {
    let number = |path| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    // "max" is no number: no limit. Version 1 says "no limit" with a huge number, which is as good.
    Some(number(max)?.saturating_sub(number(used)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_says_how_much_is_available() {
        let text = "MemTotal:       24683520 kB\nMemFree: 1 kB\nMemAvailable:   23623680 kB\n";
        assert_eq!(available(text), Some(23_623_680 * 1024));
        assert_eq!(available("MemTotal: 1 kB\n"), None);
        assert_eq!(available("MemAvailable: many\n"), None);
        assert!(free_memory().is_some_and(|bytes| bytes > 1 << 20));
    }

    #[test]
    fn limits_of_all_groups_up_to_the_root_count() {
        let paths = |groups: &str| -> Vec<String> {
            let files = group_files(groups).into_iter();
            files.map(|(max, _)| max.to_str().unwrap().to_owned()).collect()
        };
        assert_eq!(
            paths("0::/a/b\n"),
            [
                "/sys/fs/cgroup/a/b/memory.max",
                "/sys/fs/cgroup/a/memory.max",
                "/sys/fs/cgroup/memory.max"
            ]
        );
        let first = "/sys/fs/cgroup/memory/x/memory.limit_in_bytes";
        assert_eq!(paths("4:cpu,memory:/x\n2:pids:/x\n")[0], first);
        assert_eq!(paths("nonsense\n\n"), [""; 0]);
    }

    #[test]
    fn a_group_without_a_number_has_no_limit() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::write(&path, text).unwrap();
            path
        };
        let (used, max) = (file("used", "300\n"), file("max", "1000\n"));
        assert_eq!(group_free(&max, &used), Some(700));
        assert_eq!(group_free(&used, &max), Some(0));
        assert_eq!(group_free(&file("none", "max\n"), &used), None);
        assert_eq!(group_free(Path::new("/nonexistent"), &used), None);
    }
}
