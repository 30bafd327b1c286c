//! Joining a process that runs, and reading what is kept of one that does not.

use super::table::{Arrival, Process, Wish};
use super::{ExecError, Execs};
use crate::errors::Failed;
use crate::wire;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use std::io::Write;
use std::os::unix::net::UnixStream;
use torpor_api::guest::{AttachSpec, Attached, FrameType, GuestResponse, ProcessOrder};

/// Most bytes of one frame.
const CHUNK_BYTES: usize = 64 << 10;

impl Execs {
    /// Serve an attach; a client that follows is handed to the process's session.
    pub fn attach(&self, mut socket: UnixStream, spec: AttachSpec) {
        let Some(process) = self.table.find(spec.pid, spec.serial) else {
            let error = Failed::from(ExecError::NoProcess(spec.pid));
            return wire::finish(&mut socket, Err(error.0));
        };
        if spec.follow {
            let wish = Wish::Join(spec.clone());
            match process.hand_over(Arrival { socket, wish }) {
                Ok(()) => return,
                Err(back) => socket = back.socket,
            }
        }
        // A peer that is gone doesn't want it.
        let _ = send_kept(&process, &mut socket, spec.offset);
    }

    /// Serve an order to a process: by its session, or not at all.
    pub fn tell(&self, mut socket: UnixStream, pid: u32, what: ProcessOrder) {
        let refuse = |socket: &mut UnixStream, error| wire::finish(socket, Err(Failed::from(error).0));
        let Some(process) = self.table.find(pid, None) else {
            return refuse(&mut socket, ExecError::NoProcess(pid));
        };
        let wish = match what {
            ProcessOrder::Input(base64) => match BASE64_STANDARD.decode(base64) {
                Ok(bytes) => Wish::Input(bytes),
                Err(error) => {
                    let error = ExecError::Protocol(format!("input is not base64: {error}"));
                    return refuse(&mut socket, error);
                }
            },
            ProcessOrder::InputEnd => Wish::InputEnd,
            ProcessOrder::Resize(size) => Wish::Resize(size),
        };
        if let Err(mut back) = process.hand_over(Arrival { socket, wish }) {
            let error = ExecError::BadSpec(format!("process {pid} has ended"));
            refuse(&mut back.socket, error);
        }
    }
}

fn send_kept(process: &Process, socket: &mut UnixStream, offset: u64) -> std::io::Result<()> {
    let (mut offset, input) = {
        let state = process.state();
        (offset.max(state.output.begin()), state.input)
    };
    let attached = Attached {
        pid: process.pid(),
        serial: process.serial,
        offset,
        input_offset: input.0,
        input_ended: input.1,
    };
    let json = serde_json::to_vec(&attached)?;
    let frame = |kind, bytes: &[u8]| wire::frame(kind, bytes).map_err(std::io::Error::other);
    socket.write_all(&frame(FrameType::Attached, &json)?)?;
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
        socket.write_all(&frame(kind, &bytes)?)?;
    }
    let timed_out = process.state().timed_out;
    let pid = process.pid();
    wire::finish(socket, Ok(GuestResponse::Exited { pid, code, timed_out }));
    Ok(())
}
