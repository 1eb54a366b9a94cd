//! Which role runs on which CPU: decided once, from the CPUs we may use and the settings.

use std::fmt;

/// The CPUs that the process may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cpus {
    /// Numbers of the CPUs that its affinity allows, ascending, at least one.
    pub allowed: Vec<usize>,
    /// CPU time per second that its control group allows, in thousandths of a CPU.
    pub quota_millicpus: Option<u64>,
}

impl Cpus {
    /// How many CPUs' worth of time there is: at least 1.
    pub fn usable(&self) -> usize {
        let quota = self.quota_millicpus.map_or(u64::MAX, |milli| milli.div_ceil(1000).max(1));
        self.allowed.len().min(usize::try_from(quota).unwrap_or(usize::MAX)).max(1)
    }

    /// Whether a quota gives us less than the CPUs we see. Then others run on the same CPUs, we do
    /// not know on which, and a thread must stay free to move.
    fn is_shared(&self) -> bool {
        self.usable() < self.allowed.len()
    }
}

/// What the user decides about the map. The defaults decide by the number of CPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// The device computes elsewhere (a GPU): no compute workers.
    pub device_is_elsewhere: bool,
    /// Front cores, from 1 to [`FRONTS_MAX`].
    pub fronts: Option<usize>,
    /// Compute workers.
    pub workers: Option<usize>,
    /// Leave every thread free to move between the CPUs.
    pub unpinned: bool,
}

/// More front cores than this were never needed: one serves tens of thousands of frames a second.
pub const FRONTS_MAX: usize = 8;

/// Thread names have to be static.
const FRONT_NAMES: [&str; FRONTS_MAX] =
    ["front-0", "front-1", "front-2", "front-3", "front-4", "front-5", "front-6", "front-7"];

/// What a core does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Owns connections. The first one also accepts for all.
    Front(u8),
    /// Owns the ledger.
    Engine,
    /// Runs steps.
    Device,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Role::Front(number) => write!(f, "front {number}"),
            Role::Engine => f.write_str("engine"),
            Role::Device => f.write_str("device"),
        }
    }
}

/// An executor's thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecutorPlace {
    /// Its thread's name.
    pub name: &'static str,
    /// What runs on it.
    pub roles: Vec<Role>,
    /// The CPU it is pinned to.
    pub cpu: Option<usize>,
}

/// The whole map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CoreMap {
    /// Executors, front cores first.
    pub executors: Vec<ExecutorPlace>,
    /// One entry for each compute worker: the CPU it is pinned to.
    pub workers: Vec<Option<usize>>,
}

impl CoreMap {
    /// The map for these CPUs.
    ///
    /// Every role needs little (under a quarter of a CPU at full load), so a CPU of its own costs
    /// the compute workers more than it gives the role as long as there are few:
    ///
    /// | CPUs | device here (CPU backend) | device elsewhere (GPU) |
    /// |---|---|---|
    /// | to 4 | one executor, not pinned, beside a worker on each CPU | one executor |
    /// | to 8 | one executor on a CPU of its own | front, engine and device a CPU each |
    /// | more | a front core for each 16 CPUs; engine and device, which take turns at depth 1, together | a front core for each 8, at least 2; engine; device |
    ///
    /// Workers get all CPUs that no executor has to itself. With more front cores than the
    /// table's, the executors are separate as in its last row.
    pub fn new(cpus: &Cpus, settings: &Settings) -> CoreMap {
        let usable = cpus.usable();
        let executors = executors(usable, settings);
        let pinned = !settings.unpinned && !cpus.is_shared();
        // The executors' CPUs come first. Too few for all: nobody has one to himself.
        let apart = usable > 4 && executors.len() < usable;
        let mut free = cpus.allowed.iter().copied().take(usable);
        let executors = executors
            .into_iter()
            .map(|(name, roles)| {
                let cpu = if apart { free.next() } else { None };
                ExecutorPlace { name, roles, cpu: cpu.filter(|_| pinned) }
            })
            .collect();
        let left: Vec<usize> = free.collect();
        let default = if settings.device_is_elsewhere { 0 } else { left.len() };
        let count = settings.workers.unwrap_or(default);
        let worker_cpu = |worker: usize| left.get(worker % left.len()).copied();
        // More workers than CPUs are the user's wish, and the scheduler's business.
        let pins_workers = pinned && count <= left.len();
        let workers = (0..count).map(|w| worker_cpu(w).filter(|_| pins_workers)).collect();
        CoreMap { executors, workers }
    }

    /// How many front cores there are.
    pub fn fronts(&self) -> usize {
        let roles = self.executors.iter().flat_map(|e| &e.roles);
        roles.filter(|role| matches!(role, Role::Front(_))).count()
    }
}

fn executors(usable: usize, settings: &Settings) -> Vec<(&'static str, Vec<Role>)> {
    let elsewhere = settings.device_is_elsewhere;
    let by_table = match (usable, elsewhere) {
        (..=8, _) => 1,
        (_, true) => (usable / 8).clamp(2, FRONTS_MAX),
        (_, false) => (usable / 16).clamp(1, FRONTS_MAX),
    };
    let fronts = settings.fronts.unwrap_or(by_table).clamp(1, FRONTS_MAX);
    let together = fronts == 1 && (usable <= 4 || usable <= 8 && !elsewhere);
    if together {
        return vec![("core", vec![Role::Front(0), Role::Engine, Role::Device])];
    }
    let mut executors: Vec<_> =
        (0..fronts).map(|i| (FRONT_NAMES[i], vec![Role::Front(i as u8)])).collect();
    if elsewhere {
        executors.push(("engine", vec![Role::Engine]));
        executors.push(("device", vec![Role::Device]));
    } else {
        executors.push(("engine", vec![Role::Engine, Role::Device]));
    }
    executors
}

impl fmt::Display for CoreMap {
    /// One line for each executor, one for the workers.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let on = |cpu: Option<usize>| match cpu {
            Some(cpu) => format!("CPU {cpu}"),
            None => "any CPU".to_owned(),
        };
        for executor in &self.executors {
            let roles: Vec<String> = executor.roles.iter().map(Role::to_string).collect();
            writeln!(f, "{:<8} {:<9} {}", executor.name, on(executor.cpu), roles.join(", "))?;
        }
        match self.workers.as_slice() {
            [] => write!(f, "workers  none"),
            workers if workers.contains(&None) => {
                write!(f, "workers  any CPU   {}", workers.len())
            }
            workers => {
                let cpus: Vec<usize> = workers.iter().flatten().copied().collect();
                write!(f, "workers  CPU {}: {}", ranges(&cpus), workers.len())
            }
        }
    }
}

/// `0-3,6` for 0, 1, 2, 3, 6.
fn ranges(numbers: &[usize]) -> String {
    let mut parts: Vec<(usize, usize)> = Vec::new();
    for &number in numbers {
        match parts.last_mut() {
            Some((_, last)) if *last + 1 == number => *last = number,
            _ => parts.push((number, number)),
        }
    }
    let show = |&(first, last): &(usize, usize)| {
        if first == last { first.to_string() } else { format!("{first}-{last}") }
    };
    parts.iter().map(show).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpus(count: usize) -> Cpus {
        Cpus { allowed: (0..count).collect(), quota_millicpus: None }
    }

    fn gpu() -> Settings {
        Settings { device_is_elsewhere: true, ..Settings::default() }
    }

    #[test]
    fn every_role_runs_exactly_once_and_no_cpu_is_promised_twice() {
        for count in 1..=64 {
            for settings in [Settings::default(), gpu()] {
                let map = CoreMap::new(&cpus(count), &settings);
                let roles: Vec<Role> =
                    map.executors.iter().flat_map(|e| e.roles.iter().copied()).collect();
                let once = |role| roles.iter().filter(|r| **r == role).count() == 1;
                assert!(once(Role::Engine) && once(Role::Device), "{count}: {map}");
                assert!((0..map.fronts()).all(|i| once(Role::Front(i as u8))), "{count}: {map}");
                let mut taken: Vec<usize> = map.executors.iter().filter_map(|e| e.cpu).collect();
                taken.extend(map.workers.iter().flatten());
                let promised = taken.len();
                taken.sort_unstable();
                taken.dedup();
                assert_eq!(taken.len(), promised, "{count}: {map}");
                assert!(taken.iter().all(|cpu| *cpu < count));
                assert_eq!(map.workers.is_empty(), settings.device_is_elsewhere);
            }
        }
    }

    #[test]
    fn more_cpus_never_mean_fewer_workers_or_front_cores() {
        for settings in [Settings::default(), gpu()] {
            let maps: Vec<CoreMap> =
                (1..=64).map(|count| CoreMap::new(&cpus(count), &settings)).collect();
            assert!(maps.windows(2).all(|w| w[0].workers.len() <= w[1].workers.len()));
            assert!(maps.windows(2).all(|w| w[0].fronts() <= w[1].fronts()));
        }
    }

    #[test]
    fn few_cpus_share_one_executor_that_may_move_between_the_workers() {
        for count in 1..=4 {
            let map = CoreMap::new(&cpus(count), &Settings::default());
            assert_eq!((map.executors.len(), map.executors[0].cpu), (1, None));
            assert_eq!(map.workers, (0..count).map(Some).collect::<Vec<_>>());
        }
        let map = CoreMap::new(&cpus(2), &Settings::default());
        let shown = "core     any CPU   front 0, engine, device\nworkers  CPU 0-1: 2";
        assert_eq!(map.to_string(), shown);
    }

    #[test]
    fn the_table_of_the_documentation_holds() {
        let shape = |count, settings: &Settings| {
            let map = CoreMap::new(&cpus(count), settings);
            (map.fronts(), map.executors.len(), map.workers.len())
        };
        let here = Settings::default();
        let shapes: Vec<_> = [4, 5, 8, 9, 16, 64].map(|n| shape(n, &here)).into();
        assert_eq!(shapes, [(1, 1, 4), (1, 1, 4), (1, 1, 7), (1, 2, 7), (1, 2, 14), (4, 5, 59)]);
        let shapes: Vec<_> = [4, 5, 8, 9, 24, 64].map(|n| shape(n, &gpu())).into();
        assert_eq!(shapes, [(1, 1, 0), (1, 3, 0), (1, 3, 0), (2, 4, 0), (3, 5, 0), (8, 10, 0)]);
    }

    #[test]
    fn under_a_quota_threads_stay_free_to_move() {
        let quota = |milli| Cpus { allowed: (0..64).collect(), quota_millicpus: Some(milli) };
        let map = CoreMap::new(&quota(1500), &Settings::default());
        assert_eq!((map.executors.len(), map.workers.clone()), (1, vec![None, None]));
        assert_eq!(quota(0).usable(), 1);
        let map = CoreMap::new(&quota(64_000), &Settings::default());
        assert!(map.workers.iter().all(Option::is_some));
        let map = CoreMap::new(&quota(12_000), &Settings::default());
        assert!(map.executors.iter().all(|e| e.cpu.is_none()));
        assert_eq!(map.workers.len(), 10);
    }

    #[test]
    fn affinity_decides_which_cpus_and_settings_how_many() {
        let some = Cpus { allowed: vec![3, 4, 5, 9, 11, 12], quota_millicpus: None };
        let map = CoreMap::new(&some, &Settings::default());
        let shown = "core     CPU 3     front 0, engine, device\nworkers  CPU 4-5,9,11-12: 5";
        assert_eq!(map.to_string(), shown);
        let two = Settings { fronts: Some(2), workers: Some(2), ..Settings::default() };
        let map = CoreMap::new(&some, &two);
        assert_eq!(map.executors.iter().map(|e| e.cpu).collect::<Vec<_>>(), [3, 4, 5].map(Some));
        assert_eq!(map.workers, [9, 11].map(Some));
        let many = Settings { workers: Some(9), unpinned: true, ..Settings::default() };
        assert_eq!(CoreMap::new(&some, &many).workers, vec![None; 9]);
        let crowded = Settings { fronts: Some(8), ..Settings::default() };
        let map = CoreMap::new(&some, &crowded);
        assert_eq!((map.fronts(), map.workers.len()), (8, 6));
        assert!(map.executors.iter().all(|e| e.cpu.is_none()));
    }
}
