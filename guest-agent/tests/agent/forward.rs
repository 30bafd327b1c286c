//! Connections that the agent makes on somebody's behalf.

use super::client::{Agent, Connection, eventually};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use torpor_api::guest::{FrameType, GuestRequest};

fn listener() -> (TcpListener, u16) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

fn forward(agent: &Agent, port: u16) -> Connection {
    agent.connect().request(&GuestRequest::Forward {
        address: Ipv4Addr::LOCALHOST.into(),
        port,
    })
}

fn forwarded(agent: &Agent) -> (Connection, TcpStream) {
    let (listener, port) = listener();
    let mut connection = forward(agent, port);
    let (served, _) = listener.accept().unwrap();
    assert_eq!(connection.receive(), Some((FrameType::Data, Vec::new())));
    (connection, served)
}

#[test]
fn bytes_go_both_ways_and_each_end_of_file_is_passed_on() {
    let agent = Agent::start();
    let (mut connection, mut served) = forwarded(&agent);
    let sent: Vec<u8> = (0..300_000u32).map(|n| n.to_le_bytes()[0]).collect();
    connection.send(FrameType::Data, &sent);
    connection.send(FrameType::DataEof, &[]);
    let mut got = Vec::new();
    served.read_to_end(&mut got).unwrap();
    assert_eq!(got, sent);
    served.write_all(b"answer").unwrap();
    drop(served);
    assert_eq!(connection.receive(), Some((FrameType::Data, b"answer".to_vec())));
    assert_eq!(connection.receive(), Some((FrameType::DataEof, Vec::new())));
    assert_eq!(connection.receive(), None);
}

#[test]
fn a_client_that_goes_takes_the_connection_with_it() {
    let agent = Agent::start();
    let (connection, mut served) = forwarded(&agent);
    drop(connection);
    assert_eq!(served.read(&mut [0; 8]).unwrap_or(0), 0);
}

#[test]
fn a_port_that_refuses_and_a_frame_of_another_operation_end_it() {
    let agent = Agent::start();
    let (closed, port) = listener();
    drop(closed);
    let (kind, payload) = forward(&agent, port).receive().unwrap();
    assert_eq!(kind, FrameType::Error, "{}", String::from_utf8_lossy(&payload));
    let (mut connection, mut served) = forwarded(&agent);
    // Refused at its head, perhaps before the rest of it is sent.
    let _ = connection.try_send(FrameType::Stdin, b"x");
    assert_eq!(served.read(&mut [0; 8]).unwrap_or(0), 0);
    eventually("the agent lives on", || agent.is_alive());
}
