//! Peers that do not keep to the protocol.

use super::client::{Agent, Connection, eventually, shell};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use std::io::{Read, Write};
use std::net::Shutdown;
use torpor_api::guest::{ExecSpec, FrameType, GuestError, GuestErrorCode, GuestRequest};

/// Send bytes as they are and read until the agent closes.
fn throw(agent: &Agent, bytes: &[u8]) -> Vec<u8> {
    let mut stream = agent.connect().0;
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    answer
}

fn refusal(answer: &[u8]) -> GuestError {
    assert_eq!(answer[0], FrameType::Error as u8);
    serde_json::from_slice(&answer[5..]).unwrap()
}

#[test]
fn frames_that_are_none_are_refused_and_the_agent_lives() {
    let agent = Agent::start();
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let deep_op = format!(r#"{{"op":"exec","env":{deep}}}"#);
    for payload in [
        "",
        "{",
        "null",
        "[]",
        r#"{"op":"fly"}"#,
        r#"{"op":"probe","port":65536}"#,
        &deep,
        &deep_op,
    ] {
        let mut frame = vec![1];
        frame.extend(u32::try_from(payload.len()).unwrap().to_le_bytes());
        frame.extend(payload.as_bytes());
        assert_eq!(
            refusal(&throw(&agent, &frame)).code,
            GuestErrorCode::BadRequest,
            "{payload:.40}"
        );
    }
    let oversized = [&[1u8][..], &(1u32 << 20 | 1).to_le_bytes()].concat();
    assert!(refusal(&throw(&agent, &oversized)).message.contains("limit"));
    assert!(refusal(&throw(&agent, &[99, 0, 0, 0, 0])).message.contains("99"));
    assert!(
        refusal(&throw(&agent, &[4, 0, 0, 0, 0]))
            .message
            .contains("Stdin")
    );
    assert_eq!(
        throw(&agent, &[1, 10, 0, 0, 0, b'{']),
        b"",
        "a truncated frame gets no answer"
    );
    assert_eq!(throw(&agent, &[]), b"");
    assert!(agent.is_alive());
}

#[test]
fn random_bytes_never_end_the_agent() {
    let agent = Agent::start();
    let mut runner = TestRunner::new(Config {
        cases: 300,
        failure_persistence: None,
        ..Config::default()
    });
    let noise = proptest::collection::vec(any::<u8>(), 0..200);
    runner
        .run(&noise, |bytes| {
            throw(&agent, &bytes);
            Ok(())
        })
        .unwrap();
    assert!(agent.is_alive());
}

#[test]
fn random_frames_in_an_exec_never_end_the_agent() {
    let agent = Agent::start();
    let mut runner = TestRunner::new(Config {
        cases: 150,
        failure_persistence: None,
        ..Config::default()
    });
    let frames = proptest::collection::vec((0u8..17, proptest::collection::vec(any::<u8>(), 0..9)), 0..6);
    let spec = ExecSpec {
        stdin: true,
        timeout_ms: Some(5000),
        ..shell("cat")
    };
    runner
        .run(&(frames, any::<bool>()), |(frames, cut)| {
            let mut connection = agent.connect().request(&GuestRequest::Exec(spec.clone()));
            for (kind, payload) in frames {
                let len = u32::try_from(payload.len()).unwrap() + u32::from(cut);
                let frame = [&[kind][..], &len.to_le_bytes(), &payload].concat();
                if connection.0.write_all(&frame).is_err() {
                    break;
                }
            }
            let _ = connection.0.shutdown(Shutdown::Write);
            let _ = connection.0.read_to_end(&mut Vec::new());
            Ok(())
        })
        .unwrap();
    assert!(agent.is_alive());
    eventually("no process is left", || agent.children().is_empty());
}

#[test]
fn frames_that_an_exec_does_not_take_end_it_with_an_error() {
    let agent = Agent::start();
    for (kind, payload) in [
        (FrameType::Stdin, &b"x"[..]),
        (FrameType::Data, b"x"),
        (FrameType::Request, b"{}"),
        (FrameType::Resize, br#"{"rows":1,"cols":1}"#),
        (FrameType::Signal, b"123"),
        (FrameType::Signal, &[0, 0, 0, 0]),
    ] {
        let mut connection = agent.connect().request(&GuestRequest::Exec(shell("sleep 1000")));
        connection.send(kind, payload);
        assert_eq!(
            connection.outcome().unwrap_err().code,
            GuestErrorCode::BadRequest,
            "{kind:?}"
        );
    }
    eventually("their processes are killed", || agent.children().is_empty());
}

#[test]
fn a_crowd_of_silent_peers_keeps_nobody_from_being_answered() {
    let agent = Agent::start();
    let silent: Vec<Connection> = (0..400)
        .map(|_| {
            let mut connection = agent.connect();
            let _ = connection.0.write_all(&[1, 200]);
            connection
        })
        .collect();
    assert!(agent.is_alive());
    drop(silent);
    assert!(agent.is_alive());
}

#[test]
fn a_peer_that_never_finishes_its_request_is_let_go() {
    let agent = Agent::start();
    let mut connection = agent.connect();
    connection.0.write_all(&[1, 200]).unwrap();
    assert_eq!(connection.0.read_to_end(&mut Vec::new()).unwrap(), 0);
}

#[test]
fn more_operations_than_the_cap_are_refused_while_quick_ones_are_answered() {
    let agent = Agent::start();
    let running: Vec<_> = (0..256)
        .map(|_| {
            agent
                .connect()
                .request(&GuestRequest::Exec(shell("exec sleep 1000")))
        })
        .collect();
    let mut running: Vec<Connection> = running;
    for connection in &mut running {
        connection.started();
    }
    assert_eq!(agent.shell("true").outcome.unwrap_err().code, GuestErrorCode::Os);
    assert!(agent.is_alive());
    drop(running);
    eventually("room is made", || agent.shell("true").outcome.is_ok());
}
