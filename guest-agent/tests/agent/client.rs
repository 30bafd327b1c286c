//! An agent of its own for each test, and a client that speaks frames.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};
use torpor_api::guest::{
    ExecSpec, FrameType, GuestError, GuestRequest, GuestResponse, HEADER_LEN, decode_header, encode_header,
};

/// A running agent; it ends with the test.
pub struct Agent {
    pub directory: tempfile::TempDir,
    pub process: Child,
}

impl Agent {
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// With a wrapper program in front, such as `setpriv`.
    pub fn start_with(wrapper: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        for name in ["poweroff", "reboot"] {
            let script = format!("#!/bin/sh\necho {name} > {}/ended\n", directory.path().display());
            std::fs::write(at(name), script).unwrap();
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            std::fs::set_permissions(at(name), mode).unwrap();
        }
        let words: Vec<&str> = wrapper
            .iter()
            .copied()
            .chain([env!("CARGO_BIN_EXE_torpor-guest")])
            .collect();
        let process = Command::new(words[0])
            .args(&words[1..])
            .arg("--no-init")
            .arg("--listen")
            .arg(format!("unix:{}", at("agent.sock").display()))
            .arg("--run-dir")
            .arg(at("run"))
            .arg("--poweroff")
            .arg(at("poweroff"))
            .arg("--reboot")
            .arg(at("reboot"))
            .spawn()
            .unwrap();
        let agent = Self { directory, process };
        eventually("the agent listens", || {
            UnixStream::connect(agent.socket()).is_ok()
        });
        agent
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("agent.sock")
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    pub fn connect(&self) -> Connection {
        Connection::to(&self.socket())
    }

    /// Send a request and take the one answer.
    pub fn ask(&self, request: &GuestRequest) -> Result<GuestResponse, GuestError> {
        self.connect().request(request).outcome()
    }

    pub fn exec(&self, spec: &ExecSpec) -> Ran {
        self.connect().request(&GuestRequest::Exec(spec.clone())).finish()
    }

    pub fn shell(&self, script: &str) -> Ran {
        self.exec(&shell(script))
    }

    pub fn is_alive(&self) -> bool {
        matches!(self.ask(&GuestRequest::Ping), Ok(GuestResponse::Pong { .. }))
    }

    /// PIDs whose parent is the agent, with their state letter.
    pub fn children(&self) -> Vec<(u32, char)> {
        let processes = std::fs::read_dir("/proc").unwrap().flatten();
        let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        pids.filter_map(|pid| {
            let (state, parent) = state_of(pid)?;
            (parent == self.pid()).then_some((pid, state))
        })
        .collect()
    }

    pub fn wait(&mut self) -> ExitStatus {
        self.process.wait().unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(i32::try_from(self.pid()).unwrap()), Signal::SIGTERM);
        let _ = self.process.wait();
    }
}

/// State letter and parent of a process.
pub fn state_of(pid: u32) -> Option<(char, u32)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit(") ").next()?.split(' ');
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

/// Is it there and not a zombie?
pub fn runs(pid: u32) -> bool {
    state_of(pid).is_some_and(|(state, _)| state != 'Z')
}

/// Wait for a predicate; half a minute is for a machine under load.
pub fn eventually(what: &str, mut predicate: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !predicate() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub fn argv(words: &[&str]) -> ExecSpec {
    ExecSpec {
        argv: words.iter().map(|word| (*word).to_owned()).collect(),
        ..ExecSpec::default()
    }
}

pub fn shell(script: &str) -> ExecSpec {
    argv(&["/bin/sh", "-c", script])
}

/// What an exec produced.
#[derive(Debug)]
pub struct Ran {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub outcome: Result<GuestResponse, GuestError>,
}

impl Ran {
    pub fn code(&self) -> i32 {
        match &self.outcome {
            Ok(GuestResponse::Exited { code: Some(code), .. }) => *code,
            other => panic!("no exit: {other:?}"),
        }
    }

    /// The code, or nothing if the process still runs.
    pub fn code_if_ended(&self) -> Option<i32> {
        match &self.outcome {
            Ok(GuestResponse::Exited { code, .. }) => *code,
            other => panic!("no exit: {other:?}"),
        }
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.stdout.clone()).unwrap()
    }
}

pub struct Connection(pub UnixStream);

impl Connection {
    pub fn to(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        Self(stream)
    }

    pub fn request(mut self, request: &GuestRequest) -> Self {
        self.send(FrameType::Request, &serde_json::to_vec(request).unwrap());
        self
    }

    pub fn send(&mut self, kind: FrameType, payload: &[u8]) {
        self.try_send(kind, payload).unwrap();
    }

    pub fn try_send(&mut self, kind: FrameType, payload: &[u8]) -> std::io::Result<()> {
        self.0.write_all(&encode_header(kind, payload.len()).unwrap())?;
        self.0.write_all(payload)
    }

    /// The next frame; `None` at the end of the connection.
    pub fn receive(&mut self) -> Option<(FrameType, Vec<u8>)> {
        let mut header = [0; HEADER_LEN];
        self.0.read_exact(&mut header).ok()?;
        let (kind, len) = decode_header(header).unwrap();
        let mut payload = vec![0; len];
        self.0.read_exact(&mut payload).unwrap();
        Some((kind, payload))
    }

    pub fn started(&mut self) -> u32 {
        let (kind, payload) = self.receive().unwrap();
        assert_eq!(kind, FrameType::Started, "{}", String::from_utf8_lossy(&payload));
        u32::from_le_bytes(payload.try_into().unwrap())
    }

    /// Exactly so many bytes of output, or as many more as came with the last of them.
    pub fn output(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < len {
            match self.receive().expect("the connection ended") {
                (FrameType::Stdout | FrameType::Stderr, more) => bytes.extend(more),
                (FrameType::InputTaken, _) => {}
                (other, payload) => panic!("{other:?} {}", String::from_utf8_lossy(&payload)),
            }
        }
        bytes.truncate(len);
        bytes
    }

    /// Output up to the last frame.
    pub fn finish(mut self) -> Ran {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            match self.receive().expect("the connection ended without an answer") {
                (FrameType::Stdout | FrameType::Data, bytes) => stdout.extend(bytes),
                (FrameType::Stderr, bytes) => stderr.extend(bytes),
                (FrameType::Started | FrameType::Attached | FrameType::InputTaken, _) => {}
                (FrameType::Response, json) => {
                    let outcome = Ok(serde_json::from_slice(&json).unwrap());
                    return Ran {
                        stdout,
                        stderr,
                        outcome,
                    };
                }
                (FrameType::Error, json) => {
                    let outcome = Err(serde_json::from_slice(&json).unwrap());
                    return Ran {
                        stdout,
                        stderr,
                        outcome,
                    };
                }
                (other, _) => panic!("unexpected {other:?}"),
            }
        }
    }

    pub fn outcome(self) -> Result<GuestResponse, GuestError> {
        self.finish().outcome
    }
}
