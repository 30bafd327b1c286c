//! Execs under a terminal.

use super::client::{Agent, Connection, argv, eventually, runs, shell};
use torpor_api::guest::{ExecSpec, FrameType, GuestRequest, WindowSize};

const SIZE: WindowSize = WindowSize { rows: 33, cols: 111 };

fn terminal(agent: &Agent, spec: ExecSpec) -> Connection {
    let spec = ExecSpec {
        tty: Some(SIZE),
        stdin: true,
        ..spec
    };
    agent.connect().request(&GuestRequest::Exec(spec))
}

/// Read output until it contains `wanted`.
fn expect(connection: &mut Connection, wanted: &str) -> String {
    let mut seen = String::new();
    while !seen.contains(wanted) {
        match connection.receive().expect("the connection ended") {
            (FrameType::Stdout, bytes) => seen.push_str(&String::from_utf8_lossy(&bytes)),
            (FrameType::Started, _) => {}
            (kind, payload) => panic!("{kind:?} {} after {seen:?}", String::from_utf8_lossy(&payload)),
        }
    }
    seen
}

#[test]
fn a_terminal_echoes_has_its_size_and_can_be_resized() {
    let agent = Agent::start();
    let mut connection = terminal(
        &agent,
        shell("stty size; read line; stty size; echo got:$line; exit 4"),
    );
    expect(&mut connection, "33 111");
    connection.send(FrameType::Resize, br#"{"rows":50,"cols":200}"#);
    connection.send(FrameType::Stdin, b"hello\n");
    let seen = expect(&mut connection, "got:hello");
    assert!(seen.contains("hello\r\n50 200"), "no echo or size: {seen:?}");
    assert_eq!(connection.finish().code(), 4);
}

#[test]
fn a_terminal_is_the_controlling_one_and_its_interrupt_key_works() {
    let agent = Agent::start();
    let mut connection = terminal(&agent, shell("tty; echo on >/dev/tty; exec sleep 1000"));
    let seen = expect(&mut connection, "on\r\n");
    assert!(seen.contains("/dev/pts/"), "{seen:?}");
    connection.send(FrameType::Stdin, b"\x03");
    assert_eq!(connection.finish().code(), 130);
}

#[test]
fn the_end_of_input_is_the_end_of_file_of_a_terminal() {
    let agent = Agent::start();
    let mut connection = terminal(&agent, argv(&["cat"]));
    connection.send(FrameType::Stdin, b"line\n");
    expect(&mut connection, "line\r\nline\r\n");
    connection.send(FrameType::StdinEof, &[]);
    assert_eq!(connection.finish().code(), 0);
}

#[test]
fn a_terminal_that_closes_hangs_up_what_runs_on_it() {
    let agent = Agent::start();
    let mut connection = terminal(&agent, shell("echo ready; sleep 1000"));
    let pid = connection.started();
    expect(&mut connection, "ready");
    drop(connection);
    eventually("the shell ends", || !runs(pid));
}

#[test]
fn all_output_of_a_terminal_arrives_before_the_end() {
    let agent = Agent::start();
    let ran = terminal(&agent, shell("seq 1 20000")).finish();
    assert!(ran.text().ends_with("20000\r\n"));
    assert_eq!(ran.text().lines().count(), 20_000);
}
