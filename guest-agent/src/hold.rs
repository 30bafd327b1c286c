//! The hold: guest code that asks for the machine to stay awake.
//!
//! There is one; taking it again replaces it. It counts the guest's monotonic clock, so sleep does not use it up.
//! The host asks for it when a sliding lease runs out. Not its job: to keep anything awake.

use crate::wire;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use torpor_api::guest::{FrameType, GuestError, GuestRequest, GuestResponse, HoldState};

/// The socket in the run directory on which guest code asks.
pub const SOCKET: &str = "hold.sock";

/// Longest hold, so that a forgotten one ends.
const MAX_SECONDS: u64 = 7 * 86_400;
/// Most bytes of a reason.
const MAX_REASON_BYTES: usize = 256;

/// Who holds.
#[derive(Debug, Default)]
pub struct Holds(Mutex<Option<Hold>>);

#[derive(Debug)]
struct Hold {
    until: Instant,
    reason: String,
}

impl Holds {
    /// Hold for so long from now.
    pub fn take(&self, seconds: u64, reason: &str) -> GuestResponse {
        let until = Instant::now() + Duration::from_secs(seconds.min(MAX_SECONDS));
        let end = reason.floor_char_boundary(MAX_REASON_BYTES);
        let reason = reason.get(..end).unwrap_or_default().to_owned();
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Hold { until, reason });
        self.state()
    }

    /// Hold no more.
    pub fn release(&self) -> GuestResponse {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.state()
    }

    /// The hold, if there is one.
    pub fn state(&self) -> GuestResponse {
        let mut hold = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if hold.as_ref().is_some_and(|hold| hold.until <= now) {
            *hold = None;
        }
        GuestResponse::Held {
            hold: hold.as_ref().map(|hold| HoldState {
                remaining_ms: u64::try_from((hold.until - now).as_millis()).unwrap_or(u64::MAX),
                reason: hold.reason.clone(),
            }),
        }
    }
}

/// Ask the agent that serves in this guest, as the command line does: its answer for people.
///
/// # Errors
/// Why there is none, for people.
pub fn ask(socket: &Path, request: &GuestRequest) -> Result<String, String> {
    let text =
        |error: &dyn std::fmt::Display| format!("cannot ask the agent at {}: {error}", socket.display());
    let mut stream = UnixStream::connect(socket).map_err(|error| text(&error))?;
    let json = serde_json::to_vec(request).map_err(|error| text(&error))?;
    let frame = wire::frame(FrameType::Request, &json).map_err(|error| text(&error))?;
    stream.write_all(&frame).map_err(|error| text(&error))?;
    let (kind, len) = wire::read_header(&mut stream).map_err(|error| text(&error))?;
    let mut payload = vec![0; len];
    stream.read_exact(&mut payload).map_err(|error| text(&error))?;
    if kind == FrameType::Error {
        let refused: GuestError = serde_json::from_slice(&payload).map_err(|error| text(&error))?;
        return Err(refused.message);
    }
    match serde_json::from_slice(&payload).map_err(|error| text(&error))? {
        GuestResponse::Held { hold: Some(hold) } => Ok(format!(
            "held for {} s more{}{}",
            hold.remaining_ms.div_ceil(1000),
            if hold.reason.is_empty() { "" } else { ": " },
            hold.reason
        )),
        GuestResponse::Held { hold: None } => Ok("not held".to_owned()),
        other => Err(text(&format!("{other:?}"))),
    }
}
