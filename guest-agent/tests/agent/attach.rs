//! Processes that outlive their clients: kept, listed, attached to, read, signalled.

use super::client::{Agent, Connection, argv, eventually, runs, shell};
use torpor_api::guest::{
    AttachSpec, Attached, ExecSpec, FrameType, GuestErrorCode, GuestRequest, GuestResponse, ProcessEntry,
    ProcessOrder, WindowSize,
};

fn kept(spec: ExecSpec) -> GuestRequest {
    GuestRequest::Exec(ExecSpec { keep: true, ..spec })
}

fn background(agent: &Agent, spec: ExecSpec) -> u32 {
    let spec = ExecSpec {
        background: true,
        ..spec
    };
    match agent.exec(&spec).outcome {
        Ok(GuestResponse::Exited { pid, code: None, .. }) => pid,
        other => panic!("{other:?}"),
    }
}

fn attached(connection: &mut Connection) -> Attached {
    let (kind, payload) = connection.receive().unwrap();
    assert_eq!(kind, FrameType::Attached, "{}", String::from_utf8_lossy(&payload));
    serde_json::from_slice(&payload).unwrap()
}

fn attach(agent: &Agent, spec: AttachSpec) -> Connection {
    agent.connect().request(&GuestRequest::Attach(spec))
}

fn logs(agent: &Agent, pid: u32) -> super::client::Ran {
    attach(
        agent,
        AttachSpec {
            pid,
            ..AttachSpec::default()
        },
    )
    .finish()
}

fn entry(agent: &Agent, pid: u32) -> ProcessEntry {
    match agent.ask(&GuestRequest::Processes) {
        Ok(GuestResponse::Processes { processes }) => {
            processes.into_iter().rev().find(|p| p.pid == pid).unwrap()
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_background_process_answers_at_once_and_its_logs_and_code_are_kept() {
    let agent = Agent::start();
    let pid = background(&agent, shell("echo out; echo err >&2; sleep 0.3; exit 7"));
    assert!(entry(&agent, pid).running);
    eventually("it ends", || !entry(&agent, pid).running);
    eventually("its logs are whole", || {
        logs(&agent, pid).code_if_ended() == Some(7)
    });
    let ran = logs(&agent, pid);
    assert_eq!(
        (ran.stdout.as_slice(), ran.stderr.as_slice()),
        (&b"out\n"[..], &b"err\n"[..])
    );
    let entry = entry(&agent, pid);
    assert_eq!(
        (entry.exit_code, entry.output, entry.background),
        (Some(7), (0, 8), true)
    );
    assert_eq!(entry.argv[0], "/bin/sh");
}

#[test]
fn a_time_out_never_kills_a_background_process() {
    let agent = Agent::start();
    let timed = |timeout_ms, spec| ExecSpec {
        timeout_ms: Some(timeout_ms),
        ..spec
    };
    let pid = background(&agent, timed(50, argv(&["sleep", "1000"])));
    // Another process's time-out of the same length passes meanwhile.
    let ran = agent.exec(&timed(200, argv(&["sleep", "1000"])));
    assert!(matches!(
        ran.outcome,
        Ok(GuestResponse::Exited { timed_out: true, .. })
    ));
    assert!(runs(pid));
    // And no time-out at all is what zero means.
    assert_eq!(agent.exec(&timed(0, shell("sleep 0.2; echo on"))).text(), "on\n");
    agent.ask(&GuestRequest::SignalGroup { pid, signal: 9 }).unwrap();
    eventually("it is killed", || entry(&agent, pid).exit_code == Some(137));
}

#[test]
fn a_kept_process_outlives_its_client_and_no_byte_is_lost_in_either_direction() {
    let agent = Agent::start();
    let spec = ExecSpec {
        stdin: true,
        ..argv(&["cat"])
    };
    let mut first = agent.connect().request(&kept(spec));
    let begun = attached(&mut first);
    assert_eq!((begun.offset, begun.input_offset), (0, 0));
    first.send(FrameType::Stdin, b"one ");
    assert_eq!(first.output(4), b"one ");
    drop(first);
    let again = |offset| AttachSpec {
        pid: begun.pid,
        serial: Some(begun.serial),
        offset,
        follow: true,
        input: true,
    };
    // Two at once: the later one has the input.
    let mut watcher = attach(
        &agent,
        AttachSpec {
            input: false,
            ..again(0)
        },
    );
    attached(&mut watcher);
    let mut second = attach(&agent, again(2));
    let joined = attached(&mut second);
    assert_eq!((joined.offset, joined.input_offset), (2, 4));
    assert_eq!(second.output(2), b"e ");
    second.send(FrameType::Stdin, b"two");
    second.send(FrameType::StdinEof, &[]);
    let ran = second.finish();
    assert_eq!((ran.text().as_str(), ran.code()), ("two", 0));
    assert_eq!(watcher.finish().text(), "one two");
    // An ended process is read as it was.
    assert_eq!(attach(&agent, again(4)).finish().text(), "two");
}

#[test]
fn output_that_comes_while_nobody_is_attached_waits_for_the_client() {
    let agent = Agent::start();
    let mut first = agent
        .connect()
        .request(&kept(shell("read x </dev/null; seq 1 300000; echo end")));
    let begun = attached(&mut first);
    let mut got = first.output(1000);
    drop(first);
    let mut whole: Vec<u8> = (1..=300_000)
        .flat_map(|i| format!("{i}\n").into_bytes())
        .collect();
    whole.extend(b"end\n");
    for cut in [5000, 700_000, 1_500_000] {
        let spec = AttachSpec {
            pid: begun.pid,
            serial: Some(begun.serial),
            offset: got.len() as u64,
            follow: true,
            input: false,
        };
        let mut connection = attach(&agent, spec);
        assert_eq!(
            attached(&mut connection).offset,
            got.len() as u64,
            "bytes were dropped"
        );
        let more = cut - got.len();
        got.extend(connection.output(more));
    }
    let spec = AttachSpec {
        pid: begun.pid,
        offset: got.len() as u64,
        follow: true,
        ..AttachSpec::default()
    };
    let rest = attach(&agent, spec).finish();
    got.extend(rest.stdout);
    assert!(got == whole, "{} of {} bytes", got.len(), whole.len());
}

#[test]
fn a_flood_in_the_background_is_bounded_and_does_not_stop() {
    let agent = Agent::start();
    let pid = background(&agent, shell("head -c 5000000 /dev/zero; echo end"));
    eventually("it ends although nobody reads", || {
        logs(&agent, pid).code_if_ended() == Some(0)
    });
    let mut connection = attach(
        &agent,
        AttachSpec {
            pid,
            ..AttachSpec::default()
        },
    );
    let offset = attached(&mut connection).offset;
    let ran = connection.finish();
    assert!(offset > 3_000_000 && ran.stdout.len() > 500_000);
    assert_eq!(offset + ran.stdout.len() as u64, 5_000_004);
    assert!(ran.stdout.ends_with(b"end\n"));
}

#[test]
fn a_terminal_is_kept_resized_and_attached_to_again() {
    let agent = Agent::start();
    let spec = ExecSpec {
        stdin: true,
        tty: Some(WindowSize { rows: 30, cols: 90 }),
        ..shell("stty size; read a; stty size; read b; echo bye:$a:$b")
    };
    let mut first = agent.connect().request(&kept(spec));
    let begun = attached(&mut first);
    assert_eq!(first.output(7), b"30 90\r\n");
    drop(first);
    let spec = AttachSpec {
        pid: begun.pid,
        offset: 7,
        follow: true,
        input: true,
        ..AttachSpec::default()
    };
    let mut second = attach(&agent, spec);
    attached(&mut second);
    second.send(FrameType::Resize, br#"{"rows":50,"cols":200}"#);
    second.send(FrameType::Stdin, "ä\n".as_bytes());
    assert_eq!(second.output(12), "ä\r\n50 200\r\n".as_bytes());
    assert_eq!(
        entry(&agent, begun.pid).tty,
        Some(WindowSize { rows: 50, cols: 200 })
    );
    second.send(FrameType::Stdin, b"x\n");
    assert!(second.finish().text().ends_with("bye:ä:x\r\n"));
}

#[test]
fn a_kill_reaches_a_group_whose_leader_has_ended() {
    let agent = Agent::start();
    let pid = background(&agent, shell("sleep 1000 >/dev/null 2>&1 & echo $!"));
    eventually("the leader ends", || entry(&agent, pid).exit_code == Some(0));
    eventually("its output is whole", || {
        logs(&agent, pid).code_if_ended().is_some()
    });
    let child: u32 = logs(&agent, pid).text().trim().parse().unwrap();
    assert!(runs(child));
    agent.ask(&GuestRequest::SignalGroup { pid, signal: 9 }).unwrap();
    eventually("the child is killed", || !runs(child));
    let again = agent.ask(&GuestRequest::SignalGroup { pid, signal: 9 });
    assert_eq!(again.unwrap_err().code, GuestErrorCode::NotFound);
}

#[test]
fn input_can_be_given_by_somebody_who_does_not_join() {
    let agent = Agent::start();
    let pid = background(
        &agent,
        ExecSpec {
            stdin: true,
            ..shell("read a; echo got:$a; cat; echo end")
        },
    );
    let tell = |what| agent.ask(&GuestRequest::Tell { pid, what });
    tell(ProcessOrder::Input("w6QK".to_owned())).unwrap();
    tell(ProcessOrder::Input("eA==".to_owned())).unwrap();
    tell(ProcessOrder::InputEnd).unwrap();
    eventually("it ends", || logs(&agent, pid).code_if_ended() == Some(0));
    assert_eq!(logs(&agent, pid).text(), "got:ä\nxend\n");
    assert_eq!(
        tell(ProcessOrder::InputEnd).unwrap_err().code,
        GuestErrorCode::BadRequest
    );
    let deaf = background(&agent, shell("sleep 1000"));
    for what in [
        ProcessOrder::Input("eA==".to_owned()),
        ProcessOrder::Resize(WindowSize { rows: 1, cols: 1 }),
    ] {
        let error = agent.ask(&GuestRequest::Tell { pid: deaf, what }).unwrap_err();
        assert_eq!(error.code, GuestErrorCode::BadRequest, "{error}");
    }
    agent
        .ask(&GuestRequest::SignalGroup { pid: deaf, signal: 9 })
        .unwrap();
}

#[test]
fn what_is_not_there_or_makes_no_sense_is_refused() {
    let agent = Agent::start();
    let pid = background(&agent, shell("echo x; sleep 1000"));
    let ask = |spec| attach(&agent, spec).outcome().unwrap_err().code;
    let spec = AttachSpec {
        pid,
        follow: true,
        ..AttachSpec::default()
    };
    assert_eq!(
        ask(AttachSpec {
            pid: 1,
            ..spec.clone()
        }),
        GuestErrorCode::NotFound
    );
    assert_eq!(
        ask(AttachSpec {
            serial: Some(99),
            ..spec.clone()
        }),
        GuestErrorCode::NotFound
    );
    assert_eq!(
        ask(AttachSpec {
            offset: 1 << 40,
            ..spec
        }),
        GuestErrorCode::BadRequest
    );
    agent.ask(&GuestRequest::SignalGroup { pid, signal: 9 }).unwrap();
}

#[test]
fn a_hold_is_taken_shown_and_released() {
    let agent = Agent::start();
    let ask = |request: &GuestRequest| match agent.ask(request) {
        Ok(GuestResponse::Held { hold }) => hold,
        other => panic!("{other:?}"),
    };
    assert_eq!(ask(&GuestRequest::HoldState), None);
    let hold = GuestRequest::Hold {
        seconds: 600,
        reason: "a build".to_owned(),
    };
    ask(&hold);
    let held = ask(&GuestRequest::HoldState).unwrap();
    assert!(held.remaining_ms <= 600_000 && held.remaining_ms > 500_000 && held.reason == "a build");
    let inside = |words: &[&str]| {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_torpor-guest"))
            .arg("--run-dir")
            .arg(agent.path("run"))
            .args(words)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(inside(&["held"]).ends_with(": a build\n"));
    assert_eq!(
        inside(&["hold", "2m", "a", "test"]),
        "held for 120 s more: a test\n"
    );
    assert_eq!(ask(&GuestRequest::HoldState).unwrap().reason, "a test");
    assert_eq!(inside(&["release"]), "not held\n");
    assert_eq!(ask(&GuestRequest::HoldState), None);
    assert_eq!(ask(&GuestRequest::Release), None);
    // The socket for everybody is not the host's.
    let mut stranger = Connection::to(&agent.path("run/hold.sock")).request(&GuestRequest::Processes);
    assert_eq!(stranger.receive().unwrap().0, FrameType::Error);
}

#[test]
fn output_of_a_process_that_ended_while_its_client_was_cut_off_is_all_there() {
    const LEN: usize = 300_000;
    let agent = Agent::start();
    let mut cut_off = agent
        .connect()
        .request(&kept(shell(&format!("sleep 0.2; head -c {LEN} /dev/zero"))));
    let pid = attached(&mut cut_off).pid;
    drop(cut_off);
    eventually("it ends", || !entry(&agent, pid).running);
    eventually("all of it is read", || {
        entry(&agent, pid).output == (0, LEN as u64)
    });
    assert_eq!(agent.exec(&argv(&["true"])).text(), "");
    let ran = logs(&agent, pid);
    assert_eq!((ran.stdout.len(), ran.code_if_ended()), (LEN, Some(0)));
    for _ in 0..8 {
        agent.exec(&argv(&["true"]));
    }
    let (begin, end) = entry(&agent, pid).output;
    assert!(end - begin <= 64 << 10, "only the last ones keep so much");
}
