//! Execs without a terminal.

use super::client::{Agent, argv, eventually, runs, shell};
use std::time::{Duration, Instant};
use torpor_api::guest::{ExecSpec, FrameType, GuestErrorCode, GuestRequest, GuestResponse};

#[test]
fn output_and_exit_code_come_back_on_their_own_streams() {
    let ran = Agent::start().shell("echo out; echo err >&2; exit 7");
    assert_eq!(
        (ran.stdout.as_slice(), ran.stderr.as_slice()),
        (&b"out\n"[..], &b"err\n"[..])
    );
    assert_eq!(ran.code(), 7);
}

#[test]
fn a_death_by_signal_is_128_and_the_signal() {
    let agent = Agent::start();
    assert_eq!(agent.shell("kill -TERM $$").code(), 143);
    assert_eq!(agent.shell("kill -34 $$").code(), 162);
}

#[test]
fn a_pipeline_of_a_shell_gives_its_last_status() {
    let ran = Agent::start().shell("seq 1 100000 | grep 7 | wc -l; false");
    assert_eq!(ran.text().trim(), "40951");
    assert_eq!(ran.code(), 1);
}

#[test]
fn processes_start_with_default_signals_and_no_stray_descriptors() {
    let agent = Agent::start();
    let status = agent.exec(&argv(&["cat", "/proc/self/status"])).text();
    for (field, value) in [("SigBlk", 0), ("SigIgn", 0)] {
        let line = status.lines().find(|line| line.starts_with(field)).unwrap();
        let set = u64::from_str_radix(line.split_whitespace().nth(1).unwrap(), 16).unwrap();
        // 32 and 33 belong to libc, and nobody else can change them.
        assert_eq!(set & !(0b11 << 31), value, "{line}");
    }
    // The fourth is the directory that `ls` reads.
    assert_eq!(agent.exec(&argv(&["ls", "/proc/self/fd"])).text(), "0\n1\n2\n3\n");
    assert_eq!(agent.exec(&argv(&["cat"])).stdout, b"");
}

#[test]
fn environment_and_directory_have_defaults_and_can_be_set() {
    let agent = Agent::start();
    let mut spec = shell("echo $HOME $USER $LANG $A; pwd");
    spec.env.insert("A".to_owned(), "b c".to_owned());
    spec.cwd = Some("/usr/bin".to_owned());
    assert_eq!(agent.exec(&spec).text(), "/root root C.UTF-8 b c\n/usr/bin\n");
    let mut spec = argv(&["only-here"]);
    std::fs::write(agent.path("only-here"), "#!/bin/sh\necho found\n").unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(agent.path("only-here"), mode).unwrap();
    spec.env.insert(
        "PATH".to_owned(),
        format!("/nowhere:{}:/bin:/usr/bin", agent.directory.path().display()),
    );
    assert_eq!(agent.exec(&spec).text(), "found\n");
}

#[test]
fn another_user_has_its_ids_groups_and_home() {
    let agent = Agent::start();
    let mut spec = shell("id -u; id -g; id -G; echo $USER; cat /etc/shadow");
    spec.user = Some("nobody".to_owned());
    spec.cwd = Some("/".to_owned());
    let ran = agent.exec(&spec);
    assert_eq!(ran.text(), "65534\n65534\n65534\nnobody\n");
    assert_eq!(ran.code(), 1, "nobody must not read /etc/shadow");
}

#[test]
fn what_cannot_be_started_says_why() {
    let agent = Agent::start();
    let no_such_user = ExecSpec {
        user: Some("nobody-at-all".to_owned()),
        ..argv(&["true"])
    };
    let no_such_directory = ExecSpec {
        cwd: Some("/no/such".to_owned()),
        ..argv(&["true"])
    };
    for (spec, code, operand) in [
        (
            argv(&["no-such-program"]),
            GuestErrorCode::ExecFailed,
            "no-such-program",
        ),
        (argv(&["/etc/passwd"]), GuestErrorCode::ExecFailed, "/etc/passwd"),
        (argv(&[]), GuestErrorCode::BadRequest, "argv"),
        (no_such_user, GuestErrorCode::NotFound, "nobody-at-all"),
        (no_such_directory, GuestErrorCode::NotFound, "/no/such"),
    ] {
        let error = agent.exec(&spec).outcome.unwrap_err();
        assert_eq!(error.code, code, "{error}");
        assert!(error.message.contains(operand), "{error}");
    }
    assert_eq!(agent.shell("true").code(), 0);
}

#[test]
fn ten_mebibytes_of_binary_input_come_back_unchanged() {
    let agent = Agent::start();
    let input: Vec<u8> = (0..10u32 << 20)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13).to_le_bytes()[0])
        .collect();
    let spec = ExecSpec {
        stdin: true,
        ..argv(&["cat"])
    };
    let connection = agent.connect().request(&GuestRequest::Exec(spec));
    let mut writer = super::client::Connection(connection.0.try_clone().unwrap());
    let sent = input.clone();
    let writing = std::thread::spawn(move || {
        for chunk in sent.chunks(300_000) {
            writer.send(FrameType::Stdin, chunk);
        }
        writer.send(FrameType::StdinEof, &[]);
    });
    let ran = connection.finish();
    writing.join().unwrap();
    assert_eq!(ran.code(), 0);
    assert!(
        ran.stdout == input,
        "{} bytes of {} came back",
        ran.stdout.len(),
        input.len()
    );
}

#[test]
fn a_process_that_does_not_want_its_input_ends_normally() {
    let agent = Agent::start();
    let spec = ExecSpec {
        stdin: true,
        ..shell("exec <&-; echo done")
    };
    let mut connection = agent.connect().request(&GuestRequest::Exec(spec));
    let _ = connection.try_send(FrameType::Stdin, &vec![0; 1 << 20]);
    let ran = connection.finish();
    assert_eq!((ran.text().as_str(), ran.code()), ("done\n", 0));
}

#[test]
fn a_time_out_kills_grandchildren_too() {
    let agent = Agent::start();
    let spec = ExecSpec {
        timeout_ms: Some(300),
        ..shell("sleep 1000 & echo $!; sleep 1000")
    };
    let started = Instant::now();
    let ran = agent.exec(&spec);
    assert!(
        matches!(
            ran.outcome,
            Ok(GuestResponse::Exited {
                code: Some(137),
                timed_out: true,
                ..
            })
        ),
        "{ran:?}"
    );
    assert!(started.elapsed() >= Duration::from_millis(300));
    let grandchild = ran.text().trim().parse().unwrap();
    eventually("the grandchild ends", || !runs(grandchild));
}

#[test]
fn a_time_out_fires_while_client_and_process_block_each_other() {
    let agent = Agent::start();
    let spec = ExecSpec {
        timeout_ms: Some(300),
        ..shell("yes")
    };
    let mut connection = agent.connect().request(&GuestRequest::Exec(spec));
    let pid = connection.started();
    eventually("the process is killed though nobody reads its output", || {
        !runs(pid)
    });
    assert!(matches!(
        connection.outcome(),
        Ok(GuestResponse::Exited { timed_out: true, .. })
    ));
}

#[test]
fn a_client_that_goes_takes_the_group_with_it() {
    let agent = Agent::start();
    let mut connection = agent
        .connect()
        .request(&GuestRequest::Exec(shell("sleep 1000 & echo $!; sleep 1000")));
    let pid = connection.started();
    let (_, line) = connection.receive().unwrap();
    let grandchild = String::from_utf8(line).unwrap().trim().parse().unwrap();
    drop(connection);
    eventually("the group ends", || !runs(pid) && !runs(grandchild));
}

#[test]
fn a_server_started_with_an_ampersand_neither_delays_the_answer_nor_dies_of_its_output() {
    let agent = Agent::start();
    let marker = agent.path("wrote");
    let script = format!(
        "(while [ ! -e {0}.go ]; do sleep 0.05; done; echo late && echo later && touch {0}; sleep 1000) & echo $!",
        marker.display()
    );
    let started = Instant::now();
    let ran = agent.shell(&script);
    assert!(
        started.elapsed() < Duration::from_secs(10),
        "the answer waited for the server"
    );
    assert_eq!(ran.code(), 0);
    let server = ran.text().trim().parse().unwrap();
    std::fs::write(agent.path("wrote.go"), "").unwrap();
    eventually("the server survives writing", || marker.exists());
    assert!(runs(server));
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(i32::try_from(server).unwrap()),
        nix::sys::signal::SIGKILL,
    )
    .unwrap();
}

#[test]
fn everything_written_before_the_end_arrives_even_if_something_holds_the_pipe() {
    let agent = Agent::start();
    let ran = agent.shell("sleep 5 & head -c 3000000 /dev/zero; echo end");
    assert_eq!(ran.stdout.len(), 3_000_004);
}

#[test]
fn signals_of_the_client_reach_the_group_and_only_groups_of_execs_can_be_signalled() {
    let agent = Agent::start();
    let spec = shell("trap 'echo got; exit 3' USR1; echo ready; while :; do sleep 0.05; done");
    let mut connection = agent.connect().request(&GuestRequest::Exec(spec.clone()));
    connection.started();
    assert_eq!(connection.receive().unwrap().1, b"ready\n");
    connection.send(FrameType::Signal, &10u32.to_le_bytes());
    let ran = connection.finish();
    assert_eq!((ran.text().as_str(), ran.code()), ("got\n", 3));

    let mut connection = agent.connect().request(&GuestRequest::Exec(spec));
    let pid = connection.started();
    assert_eq!(connection.receive().unwrap().1, b"ready\n");
    agent.ask(&GuestRequest::SignalGroup { pid, signal: 10 }).unwrap();
    assert_eq!(connection.finish().code(), 3);
    for (pid, signal, code) in [
        (pid, 9, GuestErrorCode::NotFound),
        (1, 9, GuestErrorCode::NotFound),
        (0, 9, GuestErrorCode::NotFound),
        (u32::MAX, 9, GuestErrorCode::NotFound),
        (std::process::id(), 9, GuestErrorCode::NotFound),
        (pid, 0, GuestErrorCode::BadRequest),
        (pid, 65, GuestErrorCode::BadRequest),
    ] {
        let error = agent.ask(&GuestRequest::SignalGroup { pid, signal }).unwrap_err();
        assert_eq!(error.code, code, "{pid} {signal}: {error}");
    }
}

#[test]
fn a_hundred_execs_at_once_keep_their_output_apart() {
    let agent = Agent::start();
    std::thread::scope(|scope| {
        for i in 0..100 {
            let agent = &agent;
            scope.spawn(move || {
                let ran = agent.shell(&format!("echo {i}; cat /proc/self/stat >/dev/null; exit {i}"));
                assert_eq!((ran.text(), ran.code()), (format!("{i}\n"), i));
            });
        }
    });
}

#[test]
fn zombies_and_orphans_are_reaped_and_descriptors_do_not_pile_up() {
    let agent = Agent::start();
    let descriptors = || {
        std::fs::read_dir(format!("/proc/{}/fd", agent.pid()))
            .unwrap()
            .count()
    };
    agent.shell("true");
    eventually("the first exec is cleaned up", || agent.children().is_empty());
    let before = descriptors();
    for _ in 0..50 {
        // An orphan that ends after its parent did.
        assert_eq!(agent.shell("(sleep 0.01 &) ; exit 0").code(), 0);
        let _ = agent.exec(&argv(&["no-such-program"]));
    }
    eventually("nothing is left", || agent.children().is_empty());
    eventually("descriptors are back", || descriptors() <= before + 1);
}
