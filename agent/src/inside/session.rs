//! A process that somebody is with, for as long as both like, over any number of pauses.
//!
//! A session is a task between two bounded channels and a connection to the guest that is made anew after every
//! wake, from where it broke off: output by its absolute offset, input by what the guest has taken. An idle
//! session keeps nothing awake. While the machine sleeps, input for the process wakes it (if the wake switch of
//! the one who asks is on); output comes when anybody has. Payload counts as activity, and so does a command
//! without a terminal while somebody waits for it.
//!
//! Dropping [`SessionEvents`] ends the session and leaves the process; its output is kept in the guest.

mod connection;
mod input;

use super::processes::Command;
use super::{About, Inside, failed};
use crate::guest_client::channel::Channel;
use crate::machine::error::MachineError;
use crate::machine::fleet::Presence;
use bytes::Bytes;
use connection::End;
use input::Input;
use std::collections::VecDeque;
use tokio::sync::mpsc;
use torpor_api::guest::{AttachSpec, Attached, FrameType, WindowSize};
use torpor_api::{ErrorCode, ExecutionId};

/// Events and orders that wait, at most.
const QUEUE_LEN: usize = 16;
/// How often a session is taken up again within one execution before its guest counts as broken.
const TRIES_PER_EXECUTION: u32 = 5;

/// What comes from a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionEvent {
    /// Standard output, or the terminal.
    Stdout(Bytes),
    /// Standard error.
    Stderr(Bytes),
    /// So many bytes of output are no longer kept.
    Lost(u64),
    /// It ended; the last event.
    Ended {
        /// Exit code, or 128 + signal.
        code: i32,
        /// It was killed because its time was up.
        timed_out: bool,
    },
}

/// What is sent to a process.
#[derive(Debug)]
enum Order {
    Write(Bytes),
    Close,
    Resize(WindowSize),
    Signal(u32),
}

/// A process, and the ways to and from it.
pub struct Session {
    /// PID in the guest.
    pub pid: u32,
    /// Tells processes apart that had the same PID.
    pub serial: u64,
    /// To it.
    pub input: SessionInput,
    /// From it.
    pub events: SessionEvents,
}

/// To a process. Dropping it changes nothing.
#[derive(Debug, Clone)]
pub struct SessionInput(mpsc::Sender<Order>);

/// From a process.
#[derive(Debug)]
pub struct SessionEvents(mpsc::Receiver<Result<SessionEvent, MachineError>>);

impl SessionEvents {
    /// The next event. `None` after the last one, which is an end or an error.
    pub async fn next(&mut self) -> Option<Result<SessionEvent, MachineError>> {
        self.0.recv().await
    }
}

impl SessionInput {
    /// Bytes for standard input; waits for room. What a process that ended does not take is no error.
    pub async fn write(&self, bytes: Bytes) {
        self.tell(Order::Write(bytes)).await;
    }

    /// End standard input.
    pub async fn close(&self) {
        self.tell(Order::Close).await;
    }

    /// The terminal has another size.
    pub async fn resize(&self, size: WindowSize) {
        self.tell(Order::Resize(size)).await;
    }

    /// Signal the process's group.
    pub async fn signal(&self, signal: u32) {
        self.tell(Order::Signal(signal)).await;
    }

    async fn tell(&self, order: Order) {
        // Refused only by a session that is over.
        let _ = self.0.send(order).await;
    }
}

impl Inside {
    /// Start a process and be with it.
    ///
    /// # Errors
    /// The wake's, `exec_failed`, or `guest_unreachable`.
    pub async fn open(&self, command: Command) -> Result<Session, MachineError> {
        let is_work = command.tty.is_none() && !command.idle;
        let mut spec = self.spec(command).await?;
        spec.keep = true;
        let feeds = spec.stdin;
        let presence = self.presence("exec").await?;
        let (channel, attached) = presence
            .during(async {
                let channel = presence.guest.exec(spec).await.map_err(failed(About::Exec))?;
                greeted(channel, About::Exec).await
            })
            .await?;
        Ok(self.begin(presence, channel, &attached, feeds, is_work))
    }

    /// Be with a process that was started before, from an offset of its output on.
    ///
    /// # Errors
    /// The wake's, `process_not_found`, or `guest_unreachable`.
    pub async fn attach(&self, spec: AttachSpec) -> Result<Session, MachineError> {
        let presence = self.presence("attach").await?;
        let feeds = spec.input;
        let spec = AttachSpec { follow: true, ..spec };
        let (channel, attached) = presence
            .during(async {
                let channel = presence
                    .guest
                    .attach(spec)
                    .await
                    .map_err(failed(About::Process))?;
                greeted(channel, About::Process).await
            })
            .await?;
        Ok(self.begin(presence, channel, &attached, feeds, false))
    }

    fn begin(
        &self,
        presence: Presence,
        channel: Channel,
        attached: &Attached,
        feeds: bool,
        is_work: bool,
    ) -> Session {
        let (orders, inbox) = mpsc::channel(QUEUE_LEN);
        let (outbox, events) = mpsc::channel(QUEUE_LEN);
        let driver = Driver {
            inside: self.clone(),
            pid: attached.pid,
            serial: attached.serial,
            feeds,
            is_work,
            offset: attached.offset,
            input: Input::new(attached.input_offset),
            due: VecDeque::new(),
            orders: Some(inbox),
            events: outbox,
            tries: (presence.execution().clone(), 0),
        };
        tokio::spawn(driver.run(presence, channel));
        Session {
            pid: attached.pid,
            serial: attached.serial,
            input: SessionInput(orders),
            events: SessionEvents(events),
        }
    }
}

/// The first frame of a session's connection.
async fn greeted(mut channel: Channel, about: About) -> Result<(Channel, Attached), MachineError> {
    let frame = channel.receiver.next().await.map_err(failed(about))?;
    let attached = connection::greeting(&frame).map_err(failed(about))?;
    Ok((channel, attached))
}

/// The task's own state.
struct Driver {
    inside: Inside,
    pid: u32,
    serial: u64,
    feeds: bool,
    is_work: bool,
    /// Bytes of output that came.
    offset: u64,
    input: Input,
    /// Events for which there was no room yet.
    due: VecDeque<Result<SessionEvent, MachineError>>,
    /// Gone when nobody can give orders any more.
    orders: Option<mpsc::Receiver<Order>>,
    events: mpsc::Sender<Result<SessionEvent, MachineError>>,
    tries: (ExecutionId, u32),
}

impl Driver {
    async fn run(mut self, presence: Presence, channel: Channel) {
        let mut next = Some((presence, channel));
        while let Some((presence, channel)) = next.take() {
            match self.converse(presence, channel).await {
                End::Over => break,
                End::BrokenOff => next = self.taken_up_again().await,
            }
        }
        // Whoever still listens gets what is due.
        for event in std::mem::take(&mut self.due) {
            if self.events.send(event).await.is_err() {
                return;
            }
        }
    }

    /// A connection to the process in whatever execution comes next; `None` if there will be none.
    async fn taken_up_again(&mut self) -> Option<(Presence, Channel)> {
        loop {
            let presence = match self.awake().await? {
                Ok(presence) => presence,
                Err(error) => return self.give_up(error),
            };
            if self.tries.0 != *presence.execution() {
                self.tries = (presence.execution().clone(), 0);
            }
            self.tries.1 += 1;
            if self.tries.1 > TRIES_PER_EXECUTION {
                let message = "the guest agent breaks off every connection";
                return self.give_up(MachineError::new(ErrorCode::GuestUnreachable, message));
            }
            let spec = AttachSpec {
                pid: self.pid,
                serial: Some(self.serial),
                offset: self.offset,
                follow: true,
                input: self.feeds,
            };
            let joined = presence
                .during(async {
                    let channel = presence
                        .guest
                        .attach(spec)
                        .await
                        .map_err(failed(About::Process))?;
                    greeted(channel, About::Process).await
                })
                .await;
            match joined {
                Ok((channel, attached)) => {
                    self.resume_at(&attached);
                    return Some((presence, channel));
                }
                // It fell asleep again, or its agent is not there yet.
                Err(error) if error.code == ErrorCode::GuestUnreachable => {}
                Err(error) => return self.give_up(error),
            }
        }
    }

    fn resume_at(&mut self, attached: &Attached) {
        if attached.offset > self.offset {
            self.due
                .push_back(Ok(SessionEvent::Lost(attached.offset - self.offset)));
            self.offset = attached.offset;
        }
        self.input
            .begin_again(attached.input_offset, attached.input_ended);
    }

    fn give_up<T>(&mut self, error: MachineError) -> Option<T> {
        self.due.push_back(Err(error));
        None
    }

    /// Wait until the machine runs, or wake it for the process's input; `None` if nobody listens any more.
    async fn awake(&mut self) -> Option<Result<Presence, MachineError>> {
        let mut may_wake = true;
        let (inside, events) = (self.inside.clone(), self.events.clone());
        loop {
            if may_wake && self.input.is_wanting() {
                let woken = tokio::select! {
                    woken = inside.presence("input") => woken,
                    () = events.closed() => return None,
                };
                match woken {
                    // It stays asleep until somebody else wakes it, or there is more input.
                    Err(error) if error.code != ErrorCode::MachineNotFound => may_wake = false,
                    outcome => return Some(outcome),
                }
            }
            let has_room = self.input.has_room();
            tokio::select! {
                presence = inside.fleet.presence_when_awake(&inside.machine) => return Some(presence),
                order = next_order(&mut self.orders), if has_room => {
                    may_wake |= self.take(order);
                }
                permit = events.reserve(), if !self.due.is_empty() => {
                    let (Ok(permit), Some(event)) = (permit, self.due.pop_front()) else { return None };
                    permit.send(event);
                }
                () = events.closed() => return None,
            }
        }
    }

    /// Note an order; whether it is a reason to wake.
    fn take(&mut self, order: Option<Order>) -> bool {
        match order {
            Some(Order::Write(bytes)) => self.input.write(&bytes),
            Some(Order::Close) => self.input.close(),
            Some(Order::Signal(signal)) => self.input.signal(signal),
            // A window that changes its size is nobody at the keys.
            Some(Order::Resize(size)) => {
                self.input.resize(size);
                return false;
            }
            None => {
                self.orders = None;
                return false;
            }
        }
        true
    }
}

/// The next order; never, once there can be none.
async fn next_order(orders: &mut Option<mpsc::Receiver<Order>>) -> Option<Order> {
    match orders {
        Some(orders) => orders.recv().await,
        None => std::future::pending().await,
    }
}

/// The payload of a frame that carries output.
fn output(kind: FrameType, payload: Bytes) -> Option<SessionEvent> {
    match kind {
        FrameType::Stdout => Some(SessionEvent::Stdout(payload)),
        FrameType::Stderr => Some(SessionEvent::Stderr(payload)),
        _ => None,
    }
}
