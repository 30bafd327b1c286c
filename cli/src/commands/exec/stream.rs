//! A command as it runs: its output as it comes, keys and pipes to it, signals, its exit code.
//!
//! It goes on over pauses of its machine. Ctrl-C ends the command; a second one ends waiting for it. Whoever closes our
//! standard output ends it as a pipe would.

use super::terminal::{self, RawKeys};
use crate::client::{CallError, Incoming, Outgoing};
use crate::output::{self, ClosedPipe};
use bytes::Bytes;
use std::io::{self, Read, Write};
use std::pin::Pin;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::Sleep;
use tokio_tungstenite::tungstenite::Message;
use torpor_api::guest::WindowSize;
use torpor_api::http::{StreamEvent, StreamOpen, StreamOrder};

const SIGINT: u32 = 2;
const SIGPIPE: u32 = 13;
const SIGTERM: u32 = 15;
/// As shells say that a signal ended something.
const INTERRUPTED: u8 = 130;
const TIMED_OUT: u8 = 124;
/// How long a command may take to end when its output has nowhere to go.
const PIPE_PATIENCE: Duration = Duration::from_secs(5);
const CHUNK_BYTES: usize = 64 << 10;
/// First byte of a binary message.
const STDERR: u8 = 2;

/// What the command gets from here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wanted {
    /// Standard input.
    pub(super) stdin: bool,
    /// A terminal.
    pub(super) tty: bool,
}

/// Signals that concern a command that runs elsewhere.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    resized: Signal,
}

impl Signals {
    fn catch() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            resized: signal(SignalKind::window_change())?,
        })
    }
}

/// Runs the command to its end; the exit code is the command's own.
pub(super) async fn run(
    (mut outgoing, mut incoming): (Outgoing, Incoming),
    open: StreamOpen,
    wanted: Wanted,
) -> anyhow::Result<u8> {
    let mut signals = Signals::catch()?;
    outgoing.send(order(&open)).await;
    let keys = if wanted.tty { RawKeys::take() } else { None };
    let mut input = wanted.stdin.then(read_stdin);
    let mut interrupted = false;
    // Since nobody reads our output.
    let mut unheard: Option<Pin<Box<Sleep>>> = None;
    let code = loop {
        tokio::select! {
            message = incoming.next() => match hear(message?)? {
                Heard::Something => {}
                Heard::NobodyListens if unheard.is_none() => {
                    outgoing.send(order(&StreamOrder::Signal { signal: SIGPIPE })).await;
                    unheard = Some(Box::pin(tokio::time::sleep(PIPE_PATIENCE)));
                }
                Heard::NobodyListens => {}
                Heard::End(_) if unheard.is_some() => return Err(ClosedPipe.into()),
                Heard::End(code) => break code,
            },
            () = async {
                match unheard.as_mut() {
                    Some(patience) => patience.await,
                    None => std::future::pending().await,
                }
            } => return Err(ClosedPipe.into()),
            chunk = next_chunk(&mut input) => {
                let message = chunk.map_or_else(|| order(&StreamOrder::StdinEnd), Message::Binary);
                outgoing.send(message).await;
            }
            _ = signals.interrupt.recv() => {
                if std::mem::replace(&mut interrupted, true) {
                    break INTERRUPTED;
                }
                outgoing.send(order(&StreamOrder::Signal { signal: SIGINT })).await;
            }
            _ = signals.terminate.recv() => {
                outgoing.send(order(&StreamOrder::Signal { signal: SIGTERM })).await;
            }
            _ = signals.resized.recv(), if wanted.tty => {
                let WindowSize { rows, cols } = terminal::size();
                outgoing.send(order(&StreamOrder::Resize { rows, cols })).await;
            }
        }
    };
    drop(keys);
    Ok(code)
}

fn order<T: serde::Serialize>(order: &T) -> Message {
    // Plain structs of numbers and strings.
    Message::Text(serde_json::to_string(order).unwrap_or_default().into())
}

enum Heard {
    Something,
    NobodyListens,
    End(u8),
}

fn hear(message: Option<Message>) -> anyhow::Result<Heard> {
    let Some(message) = message else {
        anyhow::bail!("torpord closed the connection before the command ended");
    };
    if let Message::Binary(bytes) = message {
        let (kind, bytes) = bytes.split_first().unwrap_or((&0, &[]));
        return pass_on(*kind, bytes);
    }
    let text = message.into_text().unwrap_or_default();
    Ok(match serde_json::from_str(&text)? {
        StreamEvent::Exit {
            exit_code, timed_out, ..
        } => {
            if timed_out {
                output::warn("the command's time was up");
            }
            Heard::End(if timed_out {
                TIMED_OUT
            } else {
                exit_status(exit_code)
            })
        }
        StreamEvent::Error { error } => return Err(CallError::Api(error).into()),
        StreamEvent::Lost { bytes } => {
            output::warn(&format!("{bytes} bytes of output are lost"));
            Heard::Something
        }
        StreamEvent::Started { .. } | StreamEvent::Stdout { .. } | StreamEvent::Stderr { .. } => {
            Heard::Something
        }
    })
}

fn pass_on(kind: u8, bytes: &[u8]) -> anyhow::Result<Heard> {
    if kind == STDERR {
        // A closed stderr is nobody's concern.
        let _ = io::stderr().lock().write_all(bytes);
        return Ok(Heard::Something);
    }
    match output::print(bytes) {
        Err(error) if error.is::<ClosedPipe>() => Ok(Heard::NobodyListens),
        outcome => outcome.map(|()| Heard::Something),
    }
}

/// One that does not fit is an error of its own.
pub(super) fn exit_status(code: i32) -> u8 {
    u8::try_from(code).unwrap_or(255)
}

/// A thread reads, because standard input can't be read without blocking; it ends with the process.
fn read_stdin() -> mpsc::Receiver<Bytes> {
    let (chunks, input) = mpsc::channel(4);
    std::thread::spawn(move || {
        let mut stdin = io::stdin().lock();
        let mut buffer = vec![0; CHUNK_BYTES];
        loop {
            match stdin.read(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => return,
                Ok(len) => {
                    let chunk = Bytes::copy_from_slice(buffer.get(..len).unwrap_or_default());
                    if chunks.blocking_send(chunk).is_err() {
                        return;
                    }
                }
            }
        }
    });
    input
}

/// The next bytes of standard input, and `None` once at its end.
async fn next_chunk(input: &mut Option<mpsc::Receiver<Bytes>>) -> Option<Bytes> {
    let Some(chunks) = input else {
        return std::future::pending().await;
    };
    let chunk = chunks.recv().await;
    if chunk.is_none() {
        *input = None;
    }
    chunk
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(event: &StreamEvent) -> anyhow::Result<Heard> {
        hear(Some(order(event)))
    }

    #[test]
    fn the_exit_code_is_the_commands_own() {
        for (exit_code, timed_out, expected) in
            [(0, false, 0), (7, false, 7), (137, false, 137), (137, true, 124)]
        {
            let event = StreamEvent::Exit { exit_code, timed_out };
            assert!(matches!(heard(&event), Ok(Heard::End(code)) if code == expected));
        }
    }

    #[test]
    fn a_refusal_keeps_its_code_and_a_broken_connection_is_no_success() {
        let error = torpor_api::ApiError::new(torpor_api::ErrorCode::ExecFailed, "no such program");
        let failed = heard(&StreamEvent::Error { error }).err().unwrap();
        let api = failed.downcast_ref::<CallError>().unwrap();
        assert_eq!(api.exec_exit_code(), Some(126));
        assert!(hear(None).is_err());
    }
}
