//! Joining a process that runs, and reading what is kept of one that does not.

use super::table::{Arrival, Process};
use super::{ExecError, Execs};
use crate::errors::Failed;
use crate::wire;
use std::io::Write;
use std::os::unix::net::UnixStream;
use torpor_api::guest::{AttachSpec, Attached, FrameType, GuestResponse};

/// Most bytes of one frame.
const CHUNK_BYTES: usize = 64 << 10;

impl Execs {
    /// Serve an attach; a client that follows is handed to the process's session.
    pub fn attach(&self, mut socket: UnixStream, spec: AttachSpec) {
        let Some(process) = self.table.find(spec.pid, spec.serial) else {
            let error = Failed::from(ExecError::NoProcess(spec.pid));
            return wire::finish(&mut socket, Err(error.0));
        };
        let mut arrival = Arrival { socket, spec };
        if arrival.spec.follow {
            match process.join(arrival) {
                Ok(()) => return,
                Err(back) => arrival = back,
            }
        }
        // A peer that is gone doesn't want it.
        let _ = send_kept(&process, &mut arrival);
    }
}

fn send_kept(process: &Process, arrival: &mut Arrival) -> std::io::Result<()> {
    let (mut offset, input_offset) = {
        let state = process.state();
        (arrival.spec.offset.max(state.output.begin()), state.input_offset)
    };
    let attached = Attached {
        pid: process.pid(),
        serial: process.serial,
        offset,
        input_offset,
    };
    let json = serde_json::to_vec(&attached)?;
    let frame = |kind, bytes: &[u8]| wire::frame(kind, bytes).map_err(std::io::Error::other);
    arrival.socket.write_all(&frame(FrameType::Attached, &json)?)?;
    // Bounded, because a process may write faster than a client reads.
    let end = process.state().output.end();
    // Asked for before the output: what ended by now has written all that it will.
    let code = {
        let state = process.state();
        state.exit_code().filter(|_| state.is_over())
    };
    while offset < end {
        let Some((kind, bytes)) = process.state().output.chunk(offset, CHUNK_BYTES) else {
            break;
        };
        offset += bytes.len() as u64;
        arrival.socket.write_all(&frame(kind, &bytes)?)?;
    }
    let timed_out = process.state().timed_out;
    let pid = process.pid();
    wire::finish(
        &mut arrival.socket,
        Ok(GuestResponse::Exited { pid, code, timed_out }),
    );
    Ok(())
}
