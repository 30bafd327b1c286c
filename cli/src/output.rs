//! Tables, times and sizes for people, and a standard output that may be closed.

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::{self, Write};
use std::time::Duration;
use torpor_api::http::{Machine, MachineStatus};
use torpor_api::{Lease, LeaseAction, LeaseMode};

/// Whoever read our output has stopped, as `head` does. No failure.
#[derive(Debug, thiserror::Error)]
#[error("standard output is closed")]
pub(crate) struct ClosedPipe;

/// Writes to standard output, and says so when nobody reads it.
pub(crate) fn print(bytes: &[u8]) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(ClosedPipe.into()),
        Err(error) => Err(error).context("cannot write to standard output"),
    }
}

/// Likewise a line.
pub(crate) fn print_line(line: &str) -> anyhow::Result<()> {
    print(format!("{line}\n").as_bytes())
}

/// The API's own body, which is JSON, with the newline that a shell wants.
pub(crate) fn print_json(body: &[u8]) -> anyhow::Result<()> {
    let mut text = body.to_vec();
    if !text.ends_with(b"\n") {
        text.push(b'\n');
    }
    print(&text)
}

/// Rows under headings, each column as wide as its widest cell.
pub(crate) fn table(headings: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows
            .iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count());
        cells
            .chain(headings.get(column).map(|heading| heading.len()))
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..headings.len()).map(width).collect();
    let mut text = String::new();
    let headings = headings
        .iter()
        .map(|heading| (*heading).to_owned())
        .collect::<Vec<_>>();
    for row in std::iter::once(&headings).chain(rows) {
        let cells = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"));
        let line = cells.collect::<Vec<_>>().join("  ");
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Names and values, one a line.
pub(crate) fn fields(rows: &[(&str, String)]) -> String {
    rows.iter()
        .map(|(name, value)| format!("{name:<10} {value}\n"))
        .collect()
}

/// `3m12s`: the two largest units.
pub(crate) fn short_duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (d, h, m, s) = (
        seconds / 86_400,
        seconds / 3600 % 24,
        seconds / 60 % 60,
        seconds % 60,
    );
    let two = |large: u64, large_unit, small: u64, small_unit| match small {
        0 => format!("{large}{large_unit}"),
        _ => format!("{large}{large_unit}{small}{small_unit}"),
    };
    match (d, h, m) {
        (0, 0, 0) => format!("{s}s"),
        (0, 0, m) => two(m, "m", s, "s"),
        (0, h, m) => two(h, "h", m, "m"),
        (d, h, _) => two(d, "d", h, "h"),
    }
}

/// `512M`, `2G`, `1536M`.
pub(crate) fn size_of_mib(mib: u32) -> String {
    if mib >= 1024 && mib.is_multiple_of(1024) {
        format!("{}G", mib / 1024)
    } else {
        format!("{mib}M")
    }
}

/// What is left of a lease, or its length while the machine is asleep, and what comes then.
pub(crate) fn lease_text(lease: Option<&Lease>) -> String {
    let Some(lease) = lease else {
        return "none".to_owned();
    };
    let action = match lease.policy.action {
        LeaseAction::Pause => "",
        LeaseAction::Destroy => ", then destroy",
    };
    let mode = match lease.policy.mode {
        LeaseMode::Absolute => "",
        LeaseMode::Sliding => " sliding",
    };
    match lease.remaining_ms {
        Some(ms) => format!("{} left{mode}{action}", short_duration(Duration::from_millis(ms))),
        None => format!(
            "{} when awake{mode}{action}",
            short_duration(Duration::from_secs(lease.policy.seconds))
        ),
    }
}

/// The status as the API writes it.
pub(crate) fn status_text(status: MachineStatus) -> &'static str {
    match status {
        MachineStatus::Starting => "starting",
        MachineStatus::Running => "running",
        MachineStatus::Pausing => "pausing",
        MachineStatus::Paused => "paused",
        MachineStatus::Waking => "waking",
        MachineStatus::Stopped => "stopped",
        MachineStatus::Deleting => "deleting",
    }
}

/// Name if it has one, else ID.
pub(crate) fn label(machine: &Machine) -> String {
    machine
        .name
        .as_ref()
        .map_or_else(|| machine.id.to_string(), ToString::to_string)
}

/// `2026-11-22T06:36:41.123Z`
pub(crate) fn utc(unix_ms: u64) -> String {
    let (seconds, ms) = (unix_ms / 1000, unix_ms % 1000);
    let (days, second_of_day) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil_date(days);
    let (h, m, s) = (second_of_day / 3600, second_of_day / 60 % 60, second_of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}.{ms:03}Z")
}

/// The Gregorian date so many days after 1970-01-01, counted in eras of 400 years that begin on a 1st of March.
fn civil_date(days_since_1970: u64) -> (u64, u64, u64) {
    const DAYS_0000_03_01_TO_1970: u64 = 719_468;
    const DAYS_PER_ERA: u64 = 146_097;
    let days = days_since_1970.saturating_add(DAYS_0000_03_01_TO_1970);
    let (era, day_of_era) = (days / DAYS_PER_ERA, days % DAYS_PER_ERA);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

/// A spinner with the elapsed time on standard error; nothing if that is no terminal.
pub(crate) fn spinner(what: &str) -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
        bar.set_style(style);
    }
    bar.set_message(what.to_owned());
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

/// A bar over bytes.
pub(crate) fn bar(what: &str, n_bytes: u64) -> ProgressBar {
    let bar = ProgressBar::new(n_bytes);
    if let Ok(style) = ProgressStyle::with_template("{msg} [{wide_bar}] {bytes}/{total_bytes} {eta}") {
        bar.set_style(style);
    }
    bar.set_message(what.to_owned());
    bar
}

/// Something that does not stop a command.
pub(crate) fn warn(what: &str) {
    let _ = writeln!(io::stderr().lock(), "warning: {what}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_no_line_ends_in_blanks() {
        let rows = [
            vec!["a".to_owned(), "running".to_owned()],
            vec!["long-name".to_owned(), String::new()],
        ];
        assert_eq!(
            table(&["NAME", "STATUS"], &rows),
            "NAME       STATUS\na          running\nlong-name\n"
        );
    }

    #[test]
    fn durations_show_their_two_largest_units() {
        for (seconds, text) in [
            (0, "0s"),
            (59, "59s"),
            (192, "3m12s"),
            (900, "15m"),
            (5400, "1h30m"),
            (86_399, "23h59m"),
            (90_000, "1d1h"),
        ] {
            assert_eq!(short_duration(Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn dates_are_right_at_the_odd_days() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (1_709_251_199, "2024-02-29T23:59:59.000Z"),
            (1_709_251_200, "2024-03-01T00:00:00.000Z"),
            (1_798_761_599, "2026-12-31T23:59:59.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(utc(seconds * 1000), text);
        }
    }

    #[test]
    fn sizes_are_gibibytes_where_they_are_whole() {
        assert_eq!(
            (size_of_mib(2048), size_of_mib(1536), size_of_mib(512)),
            ("2G".into(), "1536M".into(), "512M".into())
        );
    }
}
