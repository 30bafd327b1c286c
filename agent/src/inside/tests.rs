//! The inside of simulated machines that run the real guest agent: connections end with every execution, the agent
//! and its processes go on.

use super::files::WriteOptions;
use super::processes::Command;
use super::session::{Session, SessionEvent};
use crate::machine::error::MachineError;
use crate::machine::fleet::{PolicyRule, Settings, WakeSource};
use crate::machine::tests::World;
use bytes::Bytes;
use serde_json::json;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::Duration;
use torpor_api::guest::{FileAttributes, WindowSize};
use torpor_api::http::{ExecRequest, MachineStatus, PatchWake};
use torpor_api::{ErrorCode, MachineId};

/// The agent's program, built if it is not there.
fn agent_program() -> PathBuf {
    static PROGRAM: std::sync::OnceLock<PathBuf> = std::sync::OnceLock::new();
    let program = PROGRAM.get_or_init(|| {
        // <target>/debug/deps/<this program>
        let target = std::env::current_exe()
            .unwrap()
            .ancestors()
            .nth(3)
            .unwrap()
            .to_owned();
        let built = std::process::Command::new(env!("CARGO"))
            .args(["build", "--quiet", "-p", "torpor-guest", "--target-dir"])
            .arg(&target)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .status()
            .unwrap();
        assert!(built.success(), "torpor-guest does not build");
        target.join("debug/torpor-guest")
    });
    program.clone()
}

/// A machine whose guest is a real agent.
pub(crate) struct Lab {
    pub(crate) world: World,
    agent: Child,
    pub(crate) id: MachineId,
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
    }
}

impl Lab {
    pub(crate) async fn new() -> Self {
        Self::over(World::new()).await
    }

    /// Whose pauses wait for nobody.
    async fn hasty() -> Self {
        let settings = Settings {
            drain_grace: Duration::from_millis(1),
            ..Settings::default()
        };
        Self::over(World::with(settings)).await
    }

    async fn over(world: World) -> Self {
        let at = |name: &str| world.directory.path().join(name);
        let agent = std::process::Command::new(agent_program())
            .arg("--no-init")
            .arg("--run-dir")
            .arg(at("run"))
            .arg("--listen")
            .arg(format!("unix:{}", at("agent.sock").display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        world.host.run_agent(&at("agent.sock"));
        let id = world.create_from(json!({ "cwd": "/" })).await.unwrap();
        let lab = Self { world, agent, id };
        while lab.inside().metrics().await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        lab
    }

    pub(crate) fn inside(&self) -> super::Inside {
        self.world.fleet.inside(self.id.clone(), WakeSource::Api)
    }

    pub(crate) async fn pause(&self) {
        self.world.pause(&self.id).await.unwrap();
    }

    pub(crate) async fn status(&self) -> MachineStatus {
        self.world.status(&self.id).await
    }

    async fn open(&self, command: Command) -> Session {
        self.inside().open(command).await.unwrap()
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.world
            .directory
            .path()
            .join(name)
            .to_str()
            .unwrap()
            .to_owned()
    }
}

fn with_input(line: &str) -> Command {
    Command {
        stdin: true,
        ..Command::shell(line)
    }
}

/// Output until it holds so many bytes.
async fn output(session: &mut Session, len: usize) -> Vec<u8> {
    let mut got = Vec::new();
    while got.len() < len {
        match next(session).await {
            SessionEvent::Stdout(bytes) => got.extend(bytes),
            other => panic!("{other:?} after {} of {len} bytes", got.len()),
        }
    }
    got
}

async fn next(session: &mut Session) -> SessionEvent {
    let event = tokio::time::timeout(Duration::from_secs(60), session.events.next()).await;
    event
        .expect("no event")
        .expect("no more events")
        .expect("an error")
}

fn code<T: std::fmt::Debug>(outcome: Result<T, MachineError>) -> ErrorCode {
    outcome.expect_err("should be refused").code
}

#[tokio::test]
async fn a_command_runs_to_its_end_with_its_input_output_and_code() {
    let lab = Lab::new().await;
    let command = Command::shell("cat; echo err >&2; exit 3");
    let ran = lab.inside().run(command, Some("in ä".into())).await.unwrap();
    assert_eq!(
        (&ran.stdout[..], &ran.stderr[..], ran.code),
        ("in ä".as_bytes(), &b"err\n"[..], 3)
    );
    let much = Bytes::from(vec![b'x'; 4 << 20]);
    let ran = lab
        .inside()
        .run(Command::shell("wc -c; cat"), Some(much.clone()))
        .await
        .unwrap();
    assert_eq!(ran.stdout, b"4194304\n");
    let ran = lab
        .inside()
        .run(Command::shell("cat"), Some(much.clone()))
        .await
        .unwrap();
    assert!(ran.stdout == much && !ran.truncated);
    let deaf = lab
        .inside()
        .run(Command::shell("exec 0<&-; echo bye"), Some(much))
        .await
        .unwrap();
    assert_eq!(deaf.stdout, b"bye\n");
    let ran = lab
        .inside()
        .run(Command::shell("head -c 9000000 /dev/zero"), None)
        .await
        .unwrap();
    assert_eq!((ran.stdout.len(), ran.truncated, ran.code), (8 << 20, true, 0));
    let missing = Command::argv(vec!["/no/such".to_owned()]);
    assert_eq!(code(lab.inside().run(missing, None).await), ErrorCode::ExecFailed);
}

#[tokio::test]
async fn a_command_that_runs_out_of_time_is_killed_and_one_whose_caller_goes_too() {
    let lab = Lab::new().await;
    let request = ExecRequest {
        shell: Some("sleep 600".to_owned()),
        timeout_ms: Some(50),
        ..ExecRequest::default()
    };
    assert_eq!(code(lab.inside().exec(request).await), ErrorCode::ExecTimeout);
    let inside = lab.inside();
    let running = tokio::spawn(async move { inside.run(Command::shell("sleep 600"), None).await });
    let started = async || {
        let processes = lab.inside().processes().await.unwrap();
        processes
            .into_iter()
            .rev()
            .find(|process| process.argv.contains(&"sleep 600".to_owned()))
            .unwrap()
    };
    while !started().await.running {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    running.abort();
    while started().await.running {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(started().await.exit_code, Some(137));
}

#[tokio::test]
async fn a_session_goes_on_after_any_number_of_pauses_with_every_byte_in_order() {
    let lab = Lab::new().await;
    let mut session = lab
        .open(with_input(
            "while read line; do echo got $line; done; echo end >&2; exit 4",
        ))
        .await;
    for round in 0..5 {
        session.input.write(format!("line {round} ü\n").into()).await;
        let expected = format!("got line {round} ü\n");
        assert_eq!(output(&mut session, expected.len()).await, expected.as_bytes());
        lab.pause().await;
        assert_eq!(
            lab.status().await,
            MachineStatus::Paused,
            "an idle session kept it awake"
        );
    }
    // Input wakes; so does its end.
    session.input.write(Bytes::from_static(b"last\n")).await;
    assert_eq!(output(&mut session, 9).await, b"got last\n");
    lab.pause().await;
    session.input.close().await;
    assert_eq!(
        next(&mut session).await,
        SessionEvent::Stderr(Bytes::from_static(b"end\n"))
    );
    assert_eq!(
        next(&mut session).await,
        SessionEvent::Ended {
            code: 4,
            timed_out: false
        }
    );
    assert!(session.events.next().await.is_none());
}

#[tokio::test]
async fn a_stream_that_is_cut_by_pauses_loses_nothing() {
    let lab = Lab::new().await;
    let mut session = lab.open(with_input("cat")).await;
    let sent: Vec<u8> = (0..600_000u32).flat_map(u32::to_le_bytes).collect();
    let writer = {
        let (input, sent) = (session.input.clone(), sent.clone());
        tokio::spawn(async move {
            for chunk in sent.chunks(10_000) {
                input.write(chunk.to_vec().into()).await;
            }
            input.close().await;
        })
    };
    let mut got = Vec::new();
    for cut in [1, 300_000, 1_000_000, 1_700_000] {
        let more = cut - got.len().min(cut);
        got.extend(output(&mut session, more).await);
        // What is on its way in both directions is cut off; the writer wakes it again.
        let _ = lab.world.pause(&lab.id).await;
    }
    // If all input was taken before the last pause, nothing of the session wakes it.
    lab.world.resume(&lab.id).await.unwrap();
    while let SessionEvent::Stdout(bytes) = next(&mut session).await {
        got.extend(bytes);
    }
    writer.await.unwrap();
    assert!(got == sent, "{} of {} bytes, or others", got.len(), sent.len());
}

#[tokio::test]
async fn a_command_run_to_its_end_survives_a_pause() {
    let lab = Lab::new().await;
    let go = lab.path("go");
    let inside = lab.inside();
    let line = format!("echo before; while [ ! -e {go} ]; do sleep 0.02; done; echo after");
    let running = tokio::spawn(async move { inside.run(Command::shell(&line), None).await });
    while lab
        .inside()
        .processes()
        .await
        .unwrap()
        .iter()
        .all(|process| process.output.1 == 0)
    {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    lab.pause().await;
    std::fs::write(&go, "").unwrap();
    lab.world.resume(&lab.id).await.unwrap();
    assert_eq!(running.await.unwrap().unwrap().stdout, b"before\nafter\n");
}

#[tokio::test]
async fn input_wakes_only_where_the_switch_is_on() {
    let lab = Lab::new().await;
    let mut session = lab.open(with_input("cat")).await;
    let off = PatchWake {
        api: Some(false),
        ..PatchWake::default()
    };
    lab.world
        .fleet
        .patch_wake(&lab.id, off, crate::machine::fleet::PolicyRule::DestroyOrWake)
        .await
        .unwrap();
    lab.pause().await;
    session.input.write(Bytes::from_static(b"early\n")).await;
    assert_eq!(
        code(
            lab.inside()
                .exec(ExecRequest {
                    shell: Some("true".to_owned()),
                    ..ExecRequest::default()
                })
                .await
        ),
        ErrorCode::AutoResumeDisabled
    );
    assert_eq!(lab.status().await, MachineStatus::Paused);
    assert_eq!(code(lab.inside().metrics().await), ErrorCode::MachineNotReady);
    assert_eq!(code(lab.inside().processes().await), ErrorCode::MachineNotReady);
    lab.world.resume(&lab.id).await.unwrap();
    assert_eq!(output(&mut session, 6).await, b"early\n");
}

#[tokio::test]
async fn a_terminal_is_opened_resized_and_kept_over_a_pause() {
    let lab = Lab::new().await;
    let command = Command {
        tty: Some(WindowSize { rows: 30, cols: 90 }),
        ..Command::shell("stty size; read a; stty size; exit 9")
    };
    let mut session = lab.open(command).await;
    assert_eq!(output(&mut session, 7).await, b"30 90\r\n");
    lab.pause().await;
    session.input.resize(WindowSize { rows: 50, cols: 200 }).await;
    assert_eq!(lab.status().await, MachineStatus::Paused, "a resize woke it");
    session.input.write(Bytes::from_static(b"\n")).await;
    assert_eq!(output(&mut session, 10).await, b"\r\n50 200\r\n");
    assert_eq!(
        next(&mut session).await,
        SessionEvent::Ended {
            code: 9,
            timed_out: false
        }
    );
}

#[tokio::test]
async fn background_processes_are_listed_read_fed_and_killed_also_after_a_pause() {
    let lab = Lab::new().await;
    let inside = lab.inside();
    let pid = inside
        .start(with_input(
            "echo up; read x; echo got $x; echo err >&2; sleep 600",
        ))
        .await
        .unwrap();
    lab.pause().await;
    inside.write_stdin(pid, b"word\n", true).await.unwrap();
    let logs = loop {
        let logs = inside.logs(pid, 0).await.unwrap();
        if logs.end == 16 {
            break logs;
        }
    };
    assert_eq!(
        (&logs.stdout[..], &logs.stderr[..]),
        (&b"up\ngot word\n"[..], &b"err\n"[..])
    );
    assert_eq!((logs.output.len(), logs.exit_code), (16, None));
    let later = inside.logs(pid, 3).await.unwrap();
    assert_eq!((later.begin, &later.output), (3, &logs.output[3..].to_vec()));
    assert!(inside.process(pid).await.unwrap().running);
    inside.kill(pid, 9).await.unwrap();
    while inside.process(pid).await.unwrap().running {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(code(inside.process(1).await), ErrorCode::ProcessNotFound);
    assert_eq!(code(inside.kill(1, 9).await), ErrorCode::ProcessNotFound);
    assert_eq!(code(inside.logs(1, 0).await), ErrorCode::ProcessNotFound);
}

#[tokio::test]
async fn files_go_in_and_out_and_wake() {
    let lab = Lab::new().await;
    let inside = lab.inside();
    let path = lab.path("d/ä/file");
    lab.pause().await;
    let contents: Vec<u8> = (0..1u32 << 20).flat_map(u32::to_le_bytes).collect();
    let chunks: Vec<_> = contents
        .chunks(70_000)
        .map(|chunk| Ok::<_, MachineError>(Bytes::copy_from_slice(chunk)))
        .collect();
    let written = inside
        .upload_stream(&path, WriteOptions::default(), futures_util::stream::iter(chunks))
        .await;
    assert_eq!(written, Ok(4 << 20));
    let mut download = inside.download(&path, (5, None), None).await.unwrap();
    let mut got = Vec::new();
    while let Some(bytes) = download.next().await.unwrap() {
        got.extend(bytes);
    }
    assert!(got == contents[5..]);
    let mode = FileAttributes {
        mode: Some(0o600),
        ..FileAttributes::default()
    };
    inside.set_attributes(&path, mode, None).await.unwrap();
    let entry = inside.stat(&path, false, None).await.unwrap();
    assert_eq!((entry.size, entry.mode), (4 << 20, 0o600));
    inside.rename(&path, &lab.path("d/z"), None).await.unwrap();
    let page = inside.list(&lab.path("d"), 1, (0, 10), None).await.unwrap();
    assert_eq!(
        page.entries
            .iter()
            .map(|entry| entry.name.as_str())
            .collect::<Vec<_>>(),
        ["z", "ä"]
    );
    assert!(inside.exists(&lab.path("d/z"), None).await.unwrap());
    assert_eq!(
        code(inside.remove(&lab.path("d"), false, None).await),
        ErrorCode::FileConflict
    );
    inside.remove(&lab.path("d"), true, None).await.unwrap();
    assert!(!inside.exists(&lab.path("d/z"), None).await.unwrap());
    assert_eq!(
        code(inside.download(&path, (0, None), None).await.map(drop)),
        ErrorCode::FileNotFound
    );
    assert_eq!(
        code(inside.list("relative", 1, (0, 10), None).await),
        ErrorCode::InvalidRequest
    );
}

#[tokio::test]
async fn files_in_transit_go_on_after_pauses() {
    let lab = Lab::hasty().await;
    let inside = lab.inside();
    let path = lab.path("large");
    let contents: Vec<u8> = (0..4u32 << 20).flat_map(u32::to_le_bytes).collect();
    let mut upload = inside.upload(&path, WriteOptions::default()).await.unwrap();
    for (n, piece) in contents.chunks(300_000).enumerate() {
        upload.write(piece).await.unwrap();
        if n % 16 == 7 {
            lab.pause().await;
        }
    }
    lab.pause().await;
    assert_eq!(upload.finish().await, Ok(contents.len() as u64));
    assert!(
        std::fs::read(&path).unwrap() == contents,
        "bytes were lost or doubled"
    );

    let mut download = inside.download(&path, (7, Some(15 << 20)), None).await.unwrap();
    let mut got = Vec::new();
    let mut n_pauses = 0;
    while let Some(bytes) = download.next().await.unwrap() {
        got.extend(bytes);
        if got.len() > n_pauses * (4 << 20) {
            lab.pause().await;
            n_pauses += 1;
        }
    }
    assert!(got == contents[7..][..15 << 20], "bytes were lost or doubled");
    assert_eq!((n_pauses, lab.world.host.n_restores()), (4, 8));
}

#[tokio::test]
async fn an_upload_whose_file_was_touched_meanwhile_or_that_began_in_a_file_fails_with_the_pause() {
    let lab = Lab::hasty().await;
    let inside = lab.inside();
    let path = lab.path("file");
    let append = WriteOptions {
        append: true,
        ..WriteOptions::default()
    };
    for (options, touched) in [(append, false), (WriteOptions::default(), true)] {
        let mut upload = inside.upload(&path, options).await.unwrap();
        for _ in 0..2 {
            upload.write(b"some bytes").await.unwrap();
        }
        lab.pause().await;
        if touched {
            std::fs::write(&path, vec![0; 1000]).unwrap();
        }
        let error = upload.finish().await.unwrap_err();
        assert_eq!(error.code, ErrorCode::GuestUnreachable, "touched: {touched}");
    }
}

#[tokio::test]
async fn a_transfer_wakes_only_where_the_switch_is_on() {
    let lab = Lab::hasty().await;
    let mut upload = lab
        .inside()
        .upload(&lab.path("file"), WriteOptions::default())
        .await
        .unwrap();
    for _ in 0..2 {
        upload.write(b"some bytes").await.unwrap();
    }
    let off = PatchWake {
        api: Some(false),
        ..PatchWake::default()
    };
    let rule = PolicyRule::DestroyOrWake;
    lab.world.fleet.patch_wake(&lab.id, off, rule).await.unwrap();
    lab.pause().await;
    assert_eq!(code(upload.finish().await), ErrorCode::AutoResumeDisabled);
    assert_eq!(lab.status().await, MachineStatus::Paused);
}

#[tokio::test]
async fn an_empty_file_ends_at_once() {
    let lab = Lab::new().await;
    std::fs::write(lab.path("empty"), "").unwrap();
    let mut download = lab
        .inside()
        .download(&lab.path("empty"), (0, None), None)
        .await
        .unwrap();
    assert_eq!(download.next().await.unwrap(), None);
    assert_eq!(download.next().await.unwrap(), None);
}

#[tokio::test]
async fn a_session_ends_with_an_error_when_its_machine_is_deleted() {
    let lab = Lab::new().await;
    let mut session = lab.open(with_input("cat")).await;
    lab.pause().await;
    lab.world.delete(&lab.id).await.unwrap();
    let event = tokio::time::timeout(Duration::from_secs(10), session.events.next())
        .await
        .unwrap();
    assert_eq!(code(event.unwrap()), ErrorCode::MachineNotFound);
}
