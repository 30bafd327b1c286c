//! After a restore: the wall clock is the host's again, and the random generator differs from that of
//! every other restore of the same image.
//!
//! Order: the clock first, since everything that was woken reads it; then the pool, which is reseeded
//! before the host gets its answer and lets anything in.

use crate::sys::random::{MAX_ENTROPY, stir};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime, clock_settime};
use std::fs::File;
use std::io;
use torpor_api::guest::GuestResponse;

/// Smaller steps are noise of the channel and would only disturb the clock.
const STEP_THRESHOLD_NS: i64 = 1_000_000;
const NS_PER_S: i64 = 1_000_000_000;
/// Less would not tell two forks apart.
const MIN_ENTROPY: usize = 16;

/// Why a resync failed.
#[derive(Debug, thiserror::Error)]
pub enum ResyncError {
    /// Not base64, or not so many bytes.
    #[error("entropy is not {MIN_ENTROPY} to {MAX_ENTROPY} bytes of base64: {0}")]
    BadEntropy(String),
    /// Not a time that a clock can have.
    #[error("{0} ns is no wall-clock time")]
    BadTime(u64),
    /// The clock could not be read or set.
    #[error("cannot step the wall clock")]
    Clock(#[source] io::Error),
    /// The pool could not be stirred.
    #[error("cannot reseed the random generator")]
    Random(#[source] io::Error),
}

/// Step the clock if it is off, stir the pool. `random` is `/dev/random`, opened before the restore.
pub fn resync(random: Option<&File>, wall_unix_ns: u64, entropy: &str) -> Result<GuestResponse, ResyncError> {
    let wall_ns = i64::try_from(wall_unix_ns).map_err(|_| ResyncError::BadTime(wall_unix_ns))?;
    let entropy = BASE64_STANDARD
        .decode(entropy)
        .map_err(|error| ResyncError::BadEntropy(error.to_string()))?;
    if !(MIN_ENTROPY..=MAX_ENTROPY).contains(&entropy.len()) {
        return Err(ResyncError::BadEntropy(format!("{} bytes", entropy.len())));
    }
    let step_ns = step(wall_ns)?;
    match random {
        Some(random) => stir(random, &entropy).map_err(ResyncError::Random)?,
        None => stir(&File::open("/dev/random").map_err(ResyncError::Random)?, &entropy)
            .map_err(ResyncError::Random)?,
    }
    let wall_unix_ns = u64::try_from(now_ns()?).map_err(|_| ResyncError::BadTime(0))?;
    Ok(GuestResponse::Resynced {
        step_ns,
        wall_unix_ns,
    })
}

fn step(wall_ns: i64) -> Result<i64, ResyncError> {
    let off_ns = step_for(wall_ns, now_ns()?);
    if off_ns == 0 {
        return Ok(0);
    }
    let time = TimeSpec::new(wall_ns / NS_PER_S, wall_ns % NS_PER_S);
    clock_settime(ClockId::CLOCK_REALTIME, time).map_err(|errno| ResyncError::Clock(errno.into()))?;
    Ok(off_ns)
}

/// By how much to step, in nanoseconds.
fn step_for(wall_ns: i64, now_ns: i64) -> i64 {
    let off_ns = wall_ns.saturating_sub(now_ns);
    if off_ns.saturating_abs() <= STEP_THRESHOLD_NS {
        0
    } else {
        off_ns
    }
}

fn now_ns() -> Result<i64, ResyncError> {
    let now = clock_gettime(ClockId::CLOCK_REALTIME).map_err(|errno| ResyncError::Clock(errno.into()))?;
    Ok(now
        .tv_sec()
        .saturating_mul(NS_PER_S)
        .saturating_add(now.tv_nsec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_stepped_for_a_bad_request() {
        for (wall, entropy) in [
            (u64::MAX, "AAAAAAAAAAAAAAAAAAAAAA=="),
            (1, "?"),
            (1, ""),
            (1, "AAAA"),
        ] {
            assert!(matches!(
                resync(None, wall, entropy),
                Err(ResyncError::BadEntropy(_) | ResyncError::BadTime(_))
            ));
        }
    }

    #[test]
    fn only_a_clock_that_is_off_by_more_than_the_threshold_is_stepped() {
        assert_eq!(step_for(5_000_000, 4_000_000), 0);
        assert_eq!(step_for(4_000_000, 5_000_000), 0);
        assert_eq!(step_for(5_000_001, 4_000_000), 1_000_001);
        assert_eq!(step_for(4_000_000, 5_000_001), -1_000_001);
        assert_eq!(step_for(i64::MAX, -1), i64::MAX);
    }
}
