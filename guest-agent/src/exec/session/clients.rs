//! Clients of a session: who joins, who leaves, and what each is sent.

use super::super::client::{Client, Role};
use super::super::link::{Filled, Link};
use super::super::table::{Arrival, Wish};
use super::{Expected, PEER_CLOSED, RETURN_PATIENCE, Session};
use crate::errors::Failed;
use crate::exec::ExecError;
use crate::wire;
use nix::poll::PollFlags;
use std::os::unix::net::UnixStream;
use std::time::Instant;
use torpor_api::guest::{AttachSpec, GuestErrorCode, GuestResponse};

impl Session<'_> {
    /// Take the client that started the process.
    pub fn begin_with(&mut self, socket: UnixStream, keep: bool) -> Result<(), ExecError> {
        let link = Link::new(socket).map_err(ExecError::os("make the connection non-blocking"))?;
        let role = if keep { Role::Starter } else { Role::Owner };
        let mut client = Client::new(link, role, true, 0);
        client
            .greet(self.process.pid(), self.process.serial, (0, false))
            .map_err(|error| ExecError::Protocol(error.to_string()))?;
        self.clients.push(client);
        Ok(())
    }

    /// Take in whoever attaches, and what others want.
    pub(super) fn admit_arrivals(&mut self) {
        let mut waiting = Vec::new();
        for Arrival { mut socket, wish } in self.process.take_arrivals() {
            let outcome = match wish {
                Wish::Join(spec) => {
                    self.join(socket, &spec);
                    continue;
                }
                // Where there is no room for input there is none for an end that follows it either.
                wish @ (Wish::Input(_) | Wish::InputEnd) if !self.wants_input() => {
                    waiting.push(Arrival { socket, wish });
                    continue;
                }
                Wish::Input(bytes) => self.take_input(&bytes),
                Wish::InputEnd => self.take_input_end(),
                Wish::Resize(size) => self.resize(size),
            };
            let outcome = outcome.map(|()| GuestResponse::Done);
            wire::finish(&mut socket, outcome.map_err(|error| Failed::from(error).0));
        }
        self.process.put_back(waiting);
        self.end_input_if_done();
    }

    fn join(&mut self, mut socket: UnixStream, spec: &AttachSpec) {
        let (begin, end, input) = {
            let state = self.process.state();
            (state.output.begin(), state.output.end(), state.input)
        };
        if spec.offset > end {
            let message = format!("offset {} is past the output's end at {end}", spec.offset);
            return wire::finish(&mut socket, Err(wire::error(GuestErrorCode::BadRequest, message)));
        }
        let Ok(link) = Link::new(socket) else { return };
        let mut client = Client::new(link, Role::Guest, spec.input, spec.offset.max(begin));
        if client
            .greet(self.process.pid(), self.process.serial, input)
            .is_err()
        {
            return;
        }
        if spec.input {
            // What another connection still holds would come twice.
            for other in &mut self.clients {
                other.feeds = false;
                other.link.discard_input();
            }
        }
        self.expected = None;
        self.clients.push(client);
    }

    /// Send everybody what is new; and, when there will be nothing more, the end.
    pub(super) fn serve_clients(&mut self) {
        let last = self.is_drained().then(|| wire::outcome(Ok(self.response())));
        let mut index = 0;
        while let Some(client) = self.clients.get_mut(index) {
            let caught_up = client.catch_up(&self.process.state());
            let is_gone = !matches!(caught_up, Ok(Filled::Open));
            if !is_gone
                && let Some(last) = &last
                && client.cursor >= self.process.state().output.end()
            {
                client.answer(last);
            }
            let is_done = client.is_answered && !client.link.has_output();
            if is_gone {
                self.lose(index);
            } else if is_done {
                self.clients.remove(index);
            } else {
                index += 1;
            }
        }
    }

    /// Tell everybody the same end, as far as their sockets take it at once.
    pub(super) fn answer_all(&mut self, last: &[u8]) {
        for client in &mut self.clients {
            client.answer(last);
        }
        self.clients.clear();
    }

    pub(super) fn hear_client(&mut self, index: usize, events: PollFlags) {
        let Some(client) = self.clients.get_mut(index) else {
            return;
        };
        let gone = PollFlags::POLLHUP | PollFlags::POLLERR | PEER_CLOSED;
        if events.intersects(gone)
            || (events.contains(PollFlags::POLLIN) && client.link.fill() == Filled::Closed)
        {
            return self.lose(index);
        }
        if let Err(error) = self.handle_frames(index)
            && let Some(mut client) = (index < self.clients.len()).then(|| self.clients.remove(index))
        {
            client.answer(&wire::outcome(Err(Failed::from(error).0)));
            if client.role == Role::Owner {
                self.kill();
            }
        }
    }

    /// A client is gone.
    fn lose(&mut self, index: usize) {
        let client = self.clients.remove(index);
        match client.role {
            Role::Owner => self.kill(),
            Role::Starter | Role::Guest if self.clients.is_empty() => {
                self.expected = Some(Expected {
                    cursor: client.cursor,
                    until: Instant::now() + RETURN_PATIENCE,
                });
            }
            Role::Starter | Role::Guest => {}
        }
    }
}
