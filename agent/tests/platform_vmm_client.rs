//! The client of the control protocol against VMMs that misbehave, over a socket pair.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

use std::os::fd::OwnedFd;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use torpor_agent::vmm_client::{VmmClient, VmmClientError, VmmEvents};
use torpor_api::vmm::{
    Event, FdRole, Message, Outcome, PersistStats, Reply, Request, RequestFrame, VmmError, VmmErrorCode,
};

fn connect() -> (VmmClient, VmmEvents, OwnedFd) {
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .unwrap();
    fcntl(&ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    let (client, events) = VmmClient::from_socket(ours).unwrap();
    (client, events, theirs)
}

/// Take the next request off the socket without holding the runtime up.
async fn next_request(vmm: &OwnedFd) -> (RequestFrame, Vec<OwnedFd>) {
    let vmm = vmm.try_clone().unwrap();
    let received = tokio::task::spawn_blocking(move || torpor_ipc::receive(&vmm).unwrap());
    let datagram = received.await.unwrap();
    (serde_json::from_slice(&datagram.bytes).unwrap(), datagram.fds)
}

fn send(vmm: &OwnedFd, message: &Message) {
    torpor_ipc::send(vmm, &serde_json::to_vec(message).unwrap(), &[]).unwrap();
}

fn done(id: u64) -> Message {
    Message::Reply {
        id,
        outcome: Outcome::Ok(Reply::Done),
    }
}

fn durable(generation: u64) -> Event {
    let stats = PersistStats {
        generation,
        ..PersistStats::default()
    };
    Event::PersistDone { stats }
}

#[tokio::test]
async fn replies_find_their_requests_in_any_order_and_descriptors_travel_along() {
    let (client, _events, vmm) = connect();
    let image: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
    let serve = async {
        let (first, fds) = next_request(&vmm).await;
        assert_eq!((first.fds, fds.len()), (vec![FdRole::Image], 1));
        let (second, _) = next_request(&vmm).await;
        assert_eq!(
            (&first.request, &second.request),
            (&Request::Persist { generation: 4 }, &Request::FirstByte)
        );
        send(&vmm, &done(second.id));
        send(&vmm, &done(999));
        let error = VmmError {
            code: VmmErrorCode::DiskFull,
            message: "no room".to_owned(),
        };
        let outcome = Outcome::Err(error);
        send(
            &vmm,
            &Message::Reply {
                id: first.id,
                outcome,
            },
        );
    };
    let fds = [(FdRole::Image, &image)];
    let (persisted, first_byte, ()) =
        tokio::join!(biased; client.persist(4, &fds), client.first_byte(), serve);
    first_byte.unwrap();
    assert!(
        matches!(&persisted, Err(VmmClientError::Refused { method: "persist", source })
            if source.code == VmmErrorCode::DiskFull),
        "{persisted:?}"
    );
}

#[tokio::test]
async fn requests_fail_at_once_when_the_vmm_is_gone_before_or_after_them() {
    let (client, mut events, vmm) = connect();
    let serve = async {
        next_request(&vmm).await;
        drop(vmm);
    };
    let (frozen, ()) = tokio::join!(client.freeze(), serve);
    assert!(
        matches!(frozen, Err(VmmClientError::Gone { method: "freeze" })),
        "{frozen:?}"
    );
    client.closed().await;
    assert!(client.is_closed() && events.next().await.is_none());
    assert!(matches!(
        client.status().await,
        Err(VmmClientError::Gone { method: "status" })
    ));
    client.quit().await.unwrap();
}

#[tokio::test]
async fn what_was_said_before_the_end_is_heard() {
    let (_client, mut events, vmm) = connect();
    send(&vmm, &Message::Event { event: durable(1) });
    drop(vmm);
    assert_eq!(events.next().await, Some(durable(1)));
    assert_eq!(events.next().await, None);
}

#[tokio::test]
async fn a_datagram_that_is_no_message_and_a_flood_of_events_end_the_connection() {
    let (client, _events, vmm) = connect();
    torpor_ipc::send(&vmm, b"{\"type\":\"nonsense\"}", &[]).unwrap();
    client.closed().await;

    let (client, mut events, vmm) = connect();
    for generation in 0..17 {
        send(
            &vmm,
            &Message::Event {
                event: durable(generation),
            },
        );
    }
    client.closed().await;
    assert_eq!(
        events.next().await,
        Some(durable(0)),
        "what fitted is still there"
    );
}

#[tokio::test]
async fn a_reply_of_another_kind_than_the_requests_is_an_error() {
    let (client, _events, vmm) = connect();
    let serve = async {
        let (frame, _) = next_request(&vmm).await;
        send(&vmm, &done(frame.id));
    };
    let (frozen, ()) = tokio::join!(client.freeze(), serve);
    assert!(
        matches!(
            frozen,
            Err(VmmClientError::UnexpectedReply { method: "freeze", .. })
        ),
        "{frozen:?}"
    );
}

#[tokio::test]
async fn the_last_clone_ends_the_connection_and_none_before_it() {
    let (client, mut events, vmm) = connect();
    let twin = client.clone();
    drop(client);
    send(&vmm, &Message::Event { event: durable(1) });
    assert_eq!(events.next().await, Some(durable(1)));
    drop(twin);
    assert_eq!(events.next().await, None);
    let ended = tokio::task::spawn_blocking(move || torpor_ipc::receive(&vmm));
    assert!(matches!(ended.await.unwrap(), Err(torpor_ipc::IpcError::Closed)));
}
