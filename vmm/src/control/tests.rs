//! The connection itself, with a machine that is never built.

use super::*;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use std::thread::JoinHandle;
use tempfile::TempDir;
use torpor_ipc::Datagram;

const TIMEOUT_MS: u16 = 20_000;

struct Bench {
    dir: TempDir,
    server: JoinHandle<Result<i32, ControlError>>,
}

impl Bench {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = torpor_ipc::listen_at(&dir.path().join("control.sock")).unwrap();
        let server = std::thread::spawn(move || serve(listener, Confinement::None));
        Self { dir, server }
    }

    fn connect(&self) -> OwnedFd {
        torpor_ipc::connect_to(&self.dir.path().join("control.sock")).unwrap()
    }

    fn quit(self) {
        let client = self.connect();
        send(&client, r#"{"id":99,"method":"quit"}"#);
        assert_eq!(self.server.join().unwrap().unwrap(), 0);
    }
}

fn send(client: &OwnedFd, text: &str) {
    torpor_ipc::send(client, text.as_bytes(), &[]).unwrap();
}

fn receive(client: &OwnedFd) -> Result<Datagram, IpcError> {
    let mut fds = [PollFd::new(client.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut fds, TIMEOUT_MS).unwrap(), 1, "no answer");
    torpor_ipc::receive(client)
}

fn reply(client: &OwnedFd) -> (u64, Outcome) {
    match serde_json::from_slice(&receive(client).unwrap().bytes).unwrap() {
        Message::Reply { id, outcome } => (id, outcome),
        Message::Event { event } => panic!("{event:?}"),
    }
}

#[test]
fn an_unreadable_request_is_refused_by_its_number_and_the_connection_goes_on() {
    let bench = Bench::start();
    let client = bench.connect();
    for request in [
        r#"{"id":7,"method":"dance"}"#,
        r#"{"id":7,"method":"persist","generation":-1}"#,
    ] {
        send(&client, request);
        let (id, outcome) = reply(&client);
        assert!(
            matches!(
                &outcome,
                Outcome::Err(VmmError {
                    code: VmmErrorCode::BadRequest,
                    ..
                })
            ),
            "{outcome:?}"
        );
        assert_eq!(id, 7);
    }
    send(&client, r#"{"id":8,"method":"status"}"#);
    assert!(matches!(reply(&client), (8, Outcome::Ok(Reply::Status { .. }))));
    bench.quit();
}

#[test]
fn a_datagram_without_a_number_ends_its_connection_and_no_other() {
    let bench = Bench::start();
    for text in ["noise", r#"{"method":"status"}"#, r#"{"id":"seven"}"#] {
        let client = bench.connect();
        send(&client, text);
        assert!(matches!(receive(&client), Err(IpcError::Closed)), "{text}");
    }
    bench.quit();
}

#[test]
fn only_a_listener_that_is_none_ends_the_process() {
    let (a, _b) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .unwrap();
    assert!(listener_is_unusable(&torpor_ipc::accept(&a).unwrap_err()));
    let file = tempfile::tempfile().unwrap();
    assert!(listener_is_unusable(&torpor_ipc::accept(&file).unwrap_err()));
    for source in [
        Errno::EMFILE,
        Errno::ENFILE,
        Errno::ECONNABORTED,
        Errno::ENOMEM,
        Errno::EINTR,
    ] {
        let operation = "accept";
        assert!(
            !listener_is_unusable(&IpcError::Os { operation, source }),
            "{source}"
        );
    }
    assert!(!listener_is_unusable(&IpcError::WouldBlock));
}
