//! One session channel: a command, a shell or the files.
//!
//! Requests of the client come as messages, in order; [`crate::connection`] has answered them already. One task
//! per channel, in which reading never waits for writing: what the client sends is taken off the connection
//! into a queue of at most [`MAX_QUEUED_BYTES`], because a channel that is not read stalls all others of its
//! connection. Everything that a process wrote is sent before its exit status.

use crate::backend::{
    Guest, ProcessEvent, ProcessInput, ProcessOrder, ProcessOutput, Program, Refusal, Terminal,
};
use crate::sftp;
use bytes::Bytes;
use russh::server::{Handle, Msg};
use russh::{Channel, ChannelMsg, ChannelReadHalf, ChannelWriteHalf, Sig};
use std::sync::Arc;
use tokio::sync::{Semaphore, mpsc};
use torpor_api::guest::WindowSize;

/// Name of the subsystem for files.
pub(crate) const SFTP: &str = "sftp";
/// Most bytes that wait for a process.
const MAX_QUEUED_BYTES: usize = 8 << 20;
/// Most variables, and most bytes of a name and of a value.
const MAX_ENV: (usize, usize, usize) = (64, 128, 4096);
/// Most bytes that may come before a client says what to run.
const MAX_EARLY_BYTES: usize = 64 << 10;
/// Exit code of what could not be started; OpenSSH's own for its failures.
const FAILED: u32 = 255;
/// Number of the data type of standard error.
const STDERR: u32 = 1;

/// What a client asked for before it said what to run.
#[derive(Default)]
struct Prelude {
    env: Vec<(String, String)>,
    terminal: Option<Terminal>,
    early: Vec<Bytes>,
    ended: bool,
}

enum Start {
    Program(Program),
    Files,
}

/// Whether a variable may be set. The machine is the client's own: only the size matters.
pub(crate) fn takes_variable(name: &str, value: &str) -> bool {
    let is_name = name
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    let (_, max_name, max_value) = MAX_ENV;
    is_name && (1..=max_name).contains(&name.len()) && value.len() <= max_value && !value.contains('\0')
}

/// Serves the channel until it is closed.
pub(crate) async fn run(mut channel: Channel<Msg>, handle: Handle, guest: Arc<dyn Guest>) {
    let mut prelude = Prelude::default();
    let Some(start) = prelude.read(&mut channel).await else {
        return;
    };
    match start {
        Start::Program(program) => {
            let order = ProcessOrder {
                program,
                env: std::mem::take(&mut prelude.env),
                terminal: prelude.terminal.take(),
            };
            run_process(channel, handle, guest, order, prelude).await;
        }
        Start::Files => match guest.files().await {
            Ok(files) => {
                let id = channel.id();
                // Dropping the stream closes the channel, which comes after the status.
                let mut stream = channel.into_stream();
                sftp::run(&mut stream, files).await;
                // scp takes the lack of a status for a failure; a client that is gone needs none.
                let _ = handle.exit_status_request(id, 0).await;
                let _ = handle.close(id).await;
            }
            Err(refusal) => {
                tracing::info!(%refusal, "no SFTP");
                let (_, write) = channel.split();
                fail(&write, &refusal).await;
            }
        },
    }
}

impl Prelude {
    /// What the client wants to run; `None` if it left first.
    async fn read(&mut self, channel: &mut Channel<Msg>) -> Option<Start> {
        let mut early_bytes = 0;
        loop {
            match channel.wait().await? {
                ChannelMsg::SetEnv {
                    variable_name,
                    variable_value,
                    ..
                } if self.env.len() < MAX_ENV.0 && takes_variable(&variable_name, &variable_value) => {
                    self.env.push((variable_name, variable_value));
                }
                ChannelMsg::RequestPty {
                    term,
                    col_width,
                    row_height,
                    ..
                } => {
                    self.terminal = Some(Terminal {
                        term,
                        size: window(row_height, col_width),
                    });
                }
                ChannelMsg::WindowChange {
                    col_width,
                    row_height,
                    ..
                } => {
                    if let Some(terminal) = &mut self.terminal {
                        terminal.size = window(row_height, col_width);
                    }
                }
                ChannelMsg::RequestShell { .. } => return Some(Start::Program(Program::Shell)),
                ChannelMsg::Exec { command, .. } => {
                    let line = String::from_utf8_lossy(&command).into_owned();
                    return Some(Start::Program(Program::CommandLine(line)));
                }
                ChannelMsg::RequestSubsystem { name, .. } if name == SFTP => return Some(Start::Files),
                ChannelMsg::Data { data } => {
                    early_bytes += data.len();
                    if early_bytes > MAX_EARLY_BYTES {
                        return None;
                    }
                    self.early.push(data);
                }
                ChannelMsg::Eof => self.ended = true,
                ChannelMsg::Close => return None,
                _ => {}
            }
        }
    }
}

/// A terminal of no size has the usual one, as for a client that has no terminal itself.
fn window(rows: u32, cols: u32) -> WindowSize {
    let or = |n: u32, usual| match u16::try_from(n) {
        Ok(0) => usual,
        Ok(n) => n,
        Err(_) => u16::MAX,
    };
    WindowSize {
        rows: or(rows, 24),
        cols: or(cols, 80),
    }
}

enum Input {
    Bytes(Bytes),
    End,
    Resize(WindowSize),
    Signal(u32),
}

async fn run_process(
    channel: Channel<Msg>,
    handle: Handle,
    guest: Arc<dyn Guest>,
    order: ProcessOrder,
    prelude: Prelude,
) {
    let (read, write) = channel.split();
    let process = match guest.start(order).await {
        Ok(process) => process,
        Err(refusal) => return fail(&write, &refusal).await,
    };
    let (queue, queued) = mpsc::unbounded_channel();
    for bytes in prelude.early {
        let _ = queue.send(Input::Bytes(bytes));
    }
    if prelude.ended {
        let _ = queue.send(Input::End);
    }
    let room = Arc::new(Semaphore::new(MAX_QUEUED_BYTES));
    let fed = feed(process.input, queued, Arc::clone(&room));
    let fed = async {
        fed.await;
        // Nobody takes input any more; the output tells how it ends.
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = take(read, queue, room) => {}
        () = fed => {}
        () = deliver(process.output, &write, &handle) => {}
    }
}

/// Takes what the client sends off the connection; ends when the channel is closed.
async fn take(mut read: ChannelReadHalf, queue: mpsc::UnboundedSender<Input>, room: Arc<Semaphore>) {
    while let Some(message) = read.wait().await {
        let input = match message {
            ChannelMsg::Data { data } => {
                let n = u32::try_from(data.len()).unwrap_or(u32::MAX);
                // Given back by `feed`; the semaphore is never closed.
                if let Ok(permit) = room.acquire_many(n).await {
                    permit.forget();
                }
                Input::Bytes(data)
            }
            ChannelMsg::Eof => Input::End,
            ChannelMsg::WindowChange {
                col_width,
                row_height,
                ..
            } => Input::Resize(window(row_height, col_width)),
            ChannelMsg::Signal { signal } => match number(&signal) {
                Some(number) => Input::Signal(number),
                None => continue,
            },
            ChannelMsg::Close => return,
            _ => continue,
        };
        // A process that takes no more input has dropped the queue.
        let _ = queue.send(input);
    }
}

/// Hands what was taken to the process, in order, until it takes no more.
async fn feed(
    mut process: Box<dyn ProcessInput>,
    mut queued: mpsc::UnboundedReceiver<Input>,
    room: Arc<Semaphore>,
) {
    let mut takes_bytes = true;
    while let Some(input) = queued.recv().await {
        let outcome = match input {
            Input::Bytes(bytes) => {
                room.add_permits(bytes.len());
                if takes_bytes {
                    process.write(bytes).await
                } else {
                    Ok(())
                }
            }
            Input::End => process.close().await,
            Input::Resize(size) => process.resize(size).await,
            Input::Signal(signal) => process.signal(signal).await,
        };
        if let Err(refusal) = outcome {
            tracing::debug!(%refusal, "process takes no input");
            // What is sent after this is thrown away, so that the connection does not stall.
            takes_bytes = false;
        }
    }
}

/// Sends what the process says, and at its end how it ended.
async fn deliver(mut process: Box<dyn ProcessOutput>, write: &ChannelWriteHalf<Msg>, handle: &Handle) {
    loop {
        let sent = match process.next().await {
            Ok(ProcessEvent::Stdout(bytes)) => write.data_bytes(bytes).await,
            Ok(ProcessEvent::Stderr(bytes)) => write.extended_data_bytes(STDERR, bytes).await,
            Ok(ProcessEvent::Exited { code }) => return end(write, code).await,
            Ok(ProcessEvent::Killed { signal }) => {
                let told =
                    handle.exit_signal_request(write.id(), name(signal), false, String::new(), String::new());
                // A client that is gone needs no signal.
                let _ = told.await;
                return close(write).await;
            }
            Err(refusal) => return fail(write, &refusal).await,
        };
        if sent.is_err() {
            return;
        }
    }
}

async fn fail(write: &ChannelWriteHalf<Msg>, refusal: &Refusal) {
    let text = format!("torpor: {refusal}\r\n");
    let _ = write.extended_data_bytes(STDERR, Bytes::from(text)).await;
    end(write, FAILED).await;
}

async fn end(write: &ChannelWriteHalf<Msg>, code: u32) {
    // A client that is gone needs no status.
    let _ = write.exit_status(code).await;
    close(write).await;
}

async fn close(write: &ChannelWriteHalf<Msg>) {
    let _ = write.eof().await;
    let _ = write.close().await;
}

/// Signals of RFC 4254 and their numbers on Linux.
fn number(signal: &Sig) -> Option<u32> {
    Some(match signal {
        Sig::HUP => 1,
        Sig::INT => 2,
        Sig::QUIT => 3,
        Sig::ILL => 4,
        Sig::ABRT => 6,
        Sig::FPE => 8,
        Sig::KILL => 9,
        Sig::USR1 => 10,
        Sig::SEGV => 11,
        Sig::PIPE => 13,
        Sig::ALRM => 14,
        Sig::TERM => 15,
        Sig::Custom(name) => match name.as_str() {
            "USR2" => 12,
            "CONT" => 18,
            "STOP" => 19,
            "TSTP" => 20,
            "WINCH" => 28,
            _ => return None,
        },
    })
}

fn name(number: u32) -> Sig {
    match number {
        1 => Sig::HUP,
        2 => Sig::INT,
        3 => Sig::QUIT,
        4 => Sig::ILL,
        6 => Sig::ABRT,
        8 => Sig::FPE,
        9 => Sig::KILL,
        10 => Sig::USR1,
        11 => Sig::SEGV,
        13 => Sig::PIPE,
        14 => Sig::ALRM,
        15 => Sig::TERM,
        12 => Sig::Custom("USR2".to_owned()),
        7 => Sig::Custom("BUS".to_owned()),
        other => Sig::Custom(format!("{other}@torpor")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_signal_that_has_a_name_keeps_its_number() {
        for n in [1, 2, 3, 4, 6, 8, 9, 10, 11, 12, 13, 14, 15] {
            assert_eq!(number(&name(n)), Some(n));
        }
        assert_eq!(number(&Sig::Custom("NONE".to_owned())), None);
    }

    #[test]
    fn hostile_window_sizes_and_variables_are_bounded() {
        assert_eq!(
            window(0, u32::MAX),
            WindowSize {
                rows: 24,
                cols: u16::MAX
            }
        );
        assert!(takes_variable("LC_ALL", "C.UTF-8"));
        for (name, value) in [("", "x"), ("A=B", "x"), ("A", "\0"), ("é", "x")] {
            assert!(!takes_variable(name, value), "{name:?}={value:?}");
        }
        assert!(!takes_variable("A", &"x".repeat(5000)));
    }
}
