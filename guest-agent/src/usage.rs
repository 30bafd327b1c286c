//! Figures of the guest's usage, and which TCP ports are listened on; all read from `/proc`.

use crate::errors::{Failed, os};
use nix::sys::statvfs::statvfs;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use torpor_api::guest::GuestResponse;

/// `USER_HZ` is 100 on every Linux of this architecture.
const US_PER_TICK: u64 = 10_000;
/// `TCP_LISTEN` as `/proc/net/tcp` prints it.
const LISTEN: &str = "0A";

/// Usage figures.
pub fn metrics() -> Result<GuestResponse, Failed> {
    let read = |path| fs::read_to_string(path).map_err(|error| os(&format!("cannot read {path}"), &error));
    let stat = read("/proc/stat")?;
    let cpu_busy_us = busy_ticks(&stat).saturating_mul(US_PER_TICK);
    let (interval_us, interval_busy_us) = interval(cpu_busy_us);
    let (net_rx_bytes, net_tx_bytes) = net_bytes(&read("/proc/net/dev")?);
    let meminfo = read("/proc/meminfo")?;
    let total = meminfo_bytes(&meminfo, "MemTotal:");
    let root = statvfs("/").map_err(|errno| os("cannot stat the root file system", &errno.into()))?;
    let (fragment, blocks): (u64, u64) = (root.fragment_size(), root.blocks());
    Ok(GuestResponse::Metrics {
        cpu_busy_us,
        cpus: u32::try_from(cpu_count(&stat)).unwrap_or(u32::MAX),
        interval_us,
        interval_busy_us,
        net_rx_bytes,
        net_tx_bytes,
        mem_used_bytes: total.saturating_sub(meminfo_bytes(&meminfo, "MemAvailable:")),
        mem_total_bytes: total,
        disk_used_bytes: blocks.saturating_sub(root.blocks_free()).saturating_mul(fragment),
        disk_total_bytes: blocks.saturating_mul(fragment),
    })
}

/// user + nice + system + irq + softirq; idle, I/O wait and what the host took away are not busy.
fn busy_ticks(stat: &str) -> u64 {
    let line = stat
        .lines()
        .find_map(|line| line.strip_prefix("cpu "))
        .unwrap_or_default();
    let ticks: Vec<u64> = line
        .split_whitespace()
        .map_while(|field| field.parse().ok())
        .collect();
    [0, 1, 2, 5, 6]
        .iter()
        .filter_map(|&i| ticks.get(i))
        .fold(0, |sum, n| sum.saturating_add(*n))
}

fn cpu_count(stat: &str) -> usize {
    let is_cpu = |line: &&str| {
        line.strip_prefix("cpu")
            .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    stat.lines().filter(is_cpu).count()
}

/// The time since the question before, and what the CPUs did in it. Of two questions close together the second
/// gets a share of since boot rather than of nothing.
fn interval(busy_us: u64) -> (u64, u64) {
    const SHORTEST: Duration = Duration::from_millis(100);
    static BEFORE: Mutex<Option<(Instant, u64)>> = Mutex::new(None);
    let now = Instant::now();
    let mut before = BEFORE.lock().unwrap_or_else(PoisonError::into_inner);
    match *before {
        Some((at, busy)) if now.duration_since(at) >= SHORTEST => {
            *before = Some((now, busy_us));
            let us = u64::try_from(now.duration_since(at).as_micros()).unwrap_or(u64::MAX);
            (us, busy_us.saturating_sub(busy))
        }
        Some(_) => (uptime_us(), busy_us),
        None => {
            *before = Some((now, busy_us));
            (uptime_us(), busy_us)
        }
    }
}

fn uptime_us() -> u64 {
    let up = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    up.map_or(0, |up| {
        let us = up
            .tv_sec()
            .saturating_mul(1_000_000)
            .saturating_add(up.tv_nsec() / 1000);
        u64::try_from(us).unwrap_or(0)
    })
}

/// Received and sent by every interface but loopback.
fn net_bytes(dev: &str) -> (u64, u64) {
    dev.lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(name, _)| name.trim() != "lo")
        .fold((0, 0), |(rx, tx), (_, figures)| {
            let figures: Vec<u64> = figures
                .split_whitespace()
                .map_while(|figure| figure.parse().ok())
                .collect();
            let of = |index: usize| figures.get(index).copied().unwrap_or(0);
            (rx.saturating_add(of(0)), tx.saturating_add(of(8)))
        })
}

fn meminfo_bytes(meminfo: &str, key: &str) -> u64 {
    let value = meminfo.lines().find_map(|line| line.strip_prefix(key));
    let kib = value.and_then(|value| value.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

/// Does anything listen on this TCP port, on any address of either family?
pub fn probe(port: u16) -> Result<GuestResponse, Failed> {
    let mut listening = false;
    for path in ["/proc/net/tcp", "/proc/net/tcp6"] {
        match File::open(path) {
            Ok(file) => listening = listening || listens(BufReader::new(file), port),
            // A kernel without that family.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(os(&format!("cannot open {path}"), &error).into()),
        }
    }
    Ok(GuestResponse::Probed { listening })
}

/// The kernel prints listening sockets first, so the first line in another state ends the search; a
/// busy server has thousands of those.
fn listens(table: impl BufRead, port: u16) -> bool {
    table
        .lines()
        .skip(1)
        .map_while(Result::ok)
        .map_while(|line| {
            let mut fields = line.split_whitespace();
            let local = fields.nth(1)?.rsplit(':').next()?.to_owned();
            (fields.nth(1)? == LISTEN).then_some(local)
        })
        .any(|local| u16::from_str_radix(&local, 16) == Ok(port))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "  sl  local_address rem_address   st tx_queue rx_queue\n\
        0: 0100007F:0016 00000000:0000 0A 00000000:00000000 00:00000000\n\
        1: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000\n\
        2: 020011AC:0050 010011AC:D431 06 00000000:00000000 00:00000000\n";

    #[test]
    fn only_listening_sockets_count() {
        assert!(listens(TABLE.as_bytes(), 8080));
        assert!(listens(TABLE.as_bytes(), 22));
        assert!(!listens(TABLE.as_bytes(), 80));
        assert!(!listens("".as_bytes(), 80));
        assert!(!listens("head\ngarbage\n".as_bytes(), 80));
    }

    #[test]
    fn waiting_and_stolen_time_is_not_busy() {
        assert_eq!(
            busy_ticks("cpu  1 2 4 100 100 8 16 100 100 100\ncpu0 9 9 9\n"),
            31
        );
        assert_eq!(busy_ticks("nonsense"), 0);
    }

    #[test]
    fn network_figures_leave_loopback_out() {
        let dev = "Inter-|   Receive  |  Transmit\n face |bytes packets\n    lo: 5 1 0 0 0 0 0 0 5 1\n  eth0: 70 1 0 0 0 0 0 0 90 2\n eth1:1 2 3 4 5 6 7 8 9\n";
        assert_eq!(net_bytes(dev), (71, 99));
        assert_eq!(net_bytes(""), (0, 0));
    }

    #[test]
    fn cpus_are_counted_without_their_sum() {
        assert_eq!(cpu_count("cpu  1 2\ncpu0 1\ncpu1 1\ncpufreq\nintr 5\n"), 2);
    }

    #[test]
    fn memory_figures_are_in_bytes() {
        assert_eq!(
            meminfo_bytes("MemTotal:  2 kB\nMemAvailable: 1 kB\n", "MemAvailable:"),
            1024
        );
        assert_eq!(meminfo_bytes("", "MemTotal:"), 0);
    }
}
