//! Times on the wire: ISO 8601 in UTC, with milliseconds.

use std::time::{Duration, SystemTime};

/// The last second of the year 9999, past which no client reads.
const LAST_UNIX_MS: u64 = 253_402_300_799_000;

pub(super) fn iso(unix_ms: u64) -> String {
    let since_1970 = Duration::from_millis(unix_ms.min(LAST_UNIX_MS));
    humantime::format_rfc3339_millis(SystemTime::UNIX_EPOCH + since_1970).to_string()
}
