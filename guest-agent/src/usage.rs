//! Figures of the guest's usage, and which TCP ports are listened on; all read from `/proc`.

use crate::errors::{Failed, os};
use nix::sys::statvfs::statvfs;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use torpor_api::guest::GuestResponse;

/// `USER_HZ` is 100 on every Linux of this architecture.
const US_PER_TICK: u64 = 10_000;
/// `TCP_LISTEN` as `/proc/net/tcp` prints it.
const LISTEN: &str = "0A";

/// Usage figures.
pub fn metrics() -> Result<GuestResponse, Failed> {
    let read = |path| fs::read_to_string(path).map_err(|error| os(&format!("cannot read {path}"), &error));
    let stat = read("/proc/stat")?;
    let meminfo = read("/proc/meminfo")?;
    let total = meminfo_bytes(&meminfo, "MemTotal:");
    let root = statvfs("/").map_err(|errno| os("cannot stat the root file system", &errno.into()))?;
    let (fragment, blocks): (u64, u64) = (root.fragment_size(), root.blocks());
    Ok(GuestResponse::Metrics {
        cpu_busy_us: busy_ticks(&stat).saturating_mul(US_PER_TICK),
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
    fn memory_figures_are_in_bytes() {
        assert_eq!(
            meminfo_bytes("MemTotal:  2 kB\nMemAvailable: 1 kB\n", "MemAvailable:"),
            1024
        );
        assert_eq!(meminfo_bytes("", "MemTotal:"), 0);
    }
}
