//! One connection of a session: frames both ways until it breaks or the process ends.
//!
//! Reading and writing have a task each, because neither may wait for the other: a process that fills its output
//! takes no input, and the other way round.

use super::{Driver, SessionEvent, next_order, output};
use crate::guest_client::GuestClientError;
use crate::guest_client::channel::{Channel, Frame, FrameReceiver, FrameSender, last_frame};
use crate::inside::{About, failed};
use crate::machine::fleet::Presence;
use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use torpor_api::activity::ActivitySource;
use torpor_api::guest::{Attached, FrameType, GuestResponse};

/// Frames that wait, at most, in each direction.
const QUEUE_LEN: usize = 4;

/// How a connection ended.
pub(super) enum End {
    /// The process ended, or nobody listens any more.
    Over,
    /// The machine fell asleep, or the guest closed.
    BrokenOff,
}

/// A frame that tells where a connection begins.
pub(super) fn greeting(frame: &Frame) -> Result<Attached, GuestClientError> {
    if frame.kind != FrameType::Attached {
        last_frame(frame)?;
        return Err(malformed("a session that begins with its end"));
    }
    serde_json::from_slice(&frame.payload).map_err(|_| malformed("an Attached frame that is none"))
}

fn malformed(what: &str) -> GuestClientError {
    GuestClientError::Protocol {
        what: what.to_owned(),
    }
}

impl Driver {
    /// Carry frames until the connection ends.
    pub(super) async fn converse(&mut self, presence: Presence, channel: Channel) -> End {
        let _at_work = self.is_work.then(|| presence.at_work());
        // From here on the session keeps no pause waiting.
        let gate = presence.leave();
        let (frames_in, mut incoming) = mpsc::channel(QUEUE_LEN);
        let (outgoing, frames_out) = mpsc::channel(QUEUE_LEN);
        let _reader = AbortOnDropHandle::new(tokio::spawn(read(channel.receiver, frames_in)));
        let _writer = AbortOnDropHandle::new(tokio::spawn(write(channel.sender, frames_out)));
        let mut writes = true;
        let events = self.events.clone();
        loop {
            let (has_due, has_room, has_frame) = (
                !self.due.is_empty(),
                self.input.has_room(),
                self.input.has_frame(),
            );
            tokio::select! {
                frame = incoming.recv(), if !has_due => {
                    let Some(Ok(frame)) = frame else { return End::BrokenOff };
                    gate.touch(ActivitySource::Sessions, self.inside.fleet.now_unix_ms());
                    if self.hear(frame) {
                        return End::Over;
                    }
                }
                permit = events.reserve(), if has_due => {
                    let (Ok(permit), Some(event)) = (permit, self.due.pop_front()) else { return End::Over };
                    permit.send(event);
                }
                permit = outgoing.reserve(), if has_frame && writes => {
                    // A writer that is gone has lost the connection, which the reader will say.
                    match permit {
                        Ok(permit) => if let Some(frame) = self.input.next_frame() {
                            permit.send(frame);
                        },
                        Err(_) => writes = false,
                    }
                }
                order = next_order(&mut self.orders), if has_room => {
                    if self.take(order) {
                        gate.touch(ActivitySource::Sessions, self.inside.fleet.now_unix_ms());
                    }
                }
                () = events.closed() => return End::Over,
            }
        }
    }

    /// Handle a frame of the guest; whether it was the last one.
    fn hear(&mut self, frame: Frame) -> bool {
        match frame.kind {
            FrameType::InputTaken => {
                if let Some((count, ended)) = frame.payload.split_first_chunk::<8>() {
                    self.input.taken(u64::from_le_bytes(*count), ended == [1]);
                }
                false
            }
            FrameType::Stdout | FrameType::Stderr => {
                self.offset += frame.payload.len() as u64;
                self.due.extend(output(frame.kind, frame.payload).map(Ok));
                false
            }
            _ => {
                let end = match last_frame(&frame) {
                    Ok(GuestResponse::Exited {
                        code: Some(code),
                        timed_out,
                        ..
                    }) => Ok(SessionEvent::Ended { code, timed_out }),
                    Ok(_) => Err(malformed("a session that ends without an exit code")),
                    Err(error) => Err(error),
                };
                self.due.push_back(end.map_err(failed(About::Process)));
                true
            }
        }
    }
}

async fn read(mut receiver: FrameReceiver, frames: mpsc::Sender<Result<Frame, GuestClientError>>) {
    loop {
        let frame = receiver.next().await;
        let is_last = frame.is_err();
        if frames.send(frame).await.is_err() || is_last {
            return;
        }
    }
}

async fn write(mut sender: FrameSender, mut frames: mpsc::Receiver<(FrameType, Bytes)>) {
    while let Some((kind, payload)) = frames.recv().await {
        if sender.send(kind, &payload).await.is_err() {
            return;
        }
    }
}
