//! Times on the wire: ISO 8601, written in UTC with milliseconds, read as any client writes them.

use std::time::{Duration, SystemTime};

/// The last second of the year 9999, past which no client reads.
const LAST_UNIX_MS: u64 = 253_402_300_799_000;

pub(super) fn iso(unix_ms: u64) -> String {
    let since_1970 = Duration::from_millis(unix_ms.min(LAST_UNIX_MS));
    humantime::format_rfc3339_millis(SystemTime::UNIX_EPOCH + since_1970).to_string()
}

/// The microseconds since 1970 of a time in RFC 3339, with any offset; `None` for what is none.
pub(super) fn unix_us(text: &str) -> Option<i128> {
    let (local, offset_seconds) = split_offset(text)?;
    // Python writes a blank where RFC 3339 has a T, if it is told to; humantime takes both.
    let local = humantime::parse_rfc3339_weak(&format!("{local}Z")).ok()?;
    let since_1970 = local.duration_since(SystemTime::UNIX_EPOCH).ok()?;
    let local_us = i128::try_from(since_1970.as_micros()).ok()?;
    Some(local_us - i128::from(offset_seconds) * 1_000_000)
}

/// What stands before the offset, and how many seconds that is east of Greenwich.
fn split_offset(text: &str) -> Option<(&str, i64)> {
    if let Some(local) = text.strip_suffix(['Z', 'z']) {
        return Some((local, 0));
    }
    let (local, offset) = text.split_at_checked(text.len().checked_sub(6)?)?;
    let (sign, clock) = match offset.split_at_checked(1)? {
        ("+", clock) => (1, clock),
        ("-", clock) => (-1, clock),
        _ => return None,
    };
    let (hours, minutes) = clock.split_once(':')?;
    let number = |text: &str, most: i64| -> Option<i64> {
        let digits = text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_digit());
        text.parse().ok().filter(|number| digits && *number <= most)
    };
    Some((
        local,
        sign * (number(hours, 23)? * 3600 + number(minutes, 59)? * 60),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_the_same_however_it_is_written() {
        let at = 1_700_000_000_500_000;
        assert_eq!(iso(1_700_000_000_500), "2023-11-14T22:13:20.500Z");
        for text in [
            "2023-11-14T22:13:20.500Z",
            "2023-11-14T22:13:20.5Z",
            "2023-11-14T22:13:20.500000+00:00",
            "2023-11-15T03:43:20.500+05:30",
            "2023-11-14T14:13:20.500-08:00",
            "2023-11-14 22:13:20.500+00:00",
        ] {
            assert_eq!(unix_us(text), Some(at), "{text}");
        }
        for text in [
            "",
            "yesterday",
            "2023-11-14",
            "2023-11-14T22:13:20",
            "2023-11-14T22:13:20+0530",
            "2023-11-14T22:13:20+24:00",
            "2023-11-14T22:13:20+05:+1",
            "é+05:30",
            "1700000000",
        ] {
            assert_eq!(unix_us(text), None, "{text}");
        }
    }
}
