//! The client of the guest agent against the real agent over a unix socket, and against guests that misbehave.
//!
//! A thread plays the VMM's part: the `CONNECT` handshake, then bytes both ways.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

#[path = "../shared/command.rs"]
mod command;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use command::run_to_end;
use tokio::io::AsyncReadExt as _;
use torpor_agent::guest_client::files::WriteOptions;
use torpor_agent::guest_client::{GuestClient, GuestClientError};
use torpor_api::guest::{
    ExecSpec, FileType, FrameType, GuestErrorCode, GuestRequest, GuestResponse, HEADER_LEN, MAX_PAYLOAD,
    encode_header,
};

/// The agent's program, built if it is not there.
fn agent_program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        // <target>/debug/deps/<this program>
        let target = std::env::current_exe()
            .unwrap()
            .ancestors()
            .nth(3)
            .unwrap()
            .to_owned();
        let built = Command::new(env!("CARGO"))
            .args(["build", "--quiet", "-p", "torpor-guest", "--target-dir"])
            .arg(&target)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .status()
            .unwrap();
        assert!(built.success(), "torpor-guest does not build");
        target.join("debug/torpor-guest")
    })
}

/// A running agent behind a handshake.
struct Guest {
    dir: tempfile::TempDir,
    agent: Child,
    client: GuestClient,
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
    }
}

impl Guest {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (socket, agent_socket) = (dir.path().join("vsock.sock"), dir.path().join("agent.sock"));
        let listener = UnixListener::bind(&socket).unwrap();
        let agent = Command::new(agent_program())
            .arg("--no-init")
            .arg("--run-dir")
            .arg(dir.path().join("run"))
            .arg("--listen")
            .arg(format!("unix:{}", agent_socket.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let agent_socket = agent_socket.clone();
                std::thread::spawn(move || forward(client.unwrap(), &agent_socket));
            }
        });
        let client = GuestClient::new(&socket);
        Self { dir, agent, client }
    }

    async fn ready() -> Self {
        let guest = Self::start();
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        guest.client.wait_ready(deadline).await.unwrap();
        guest
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }
}

fn forward(client: UnixStream, agent_socket: &Path) {
    let mut from_client = BufReader::new(client.try_clone().unwrap());
    let mut line = String::new();
    from_client.read_line(&mut line).unwrap();
    assert_eq!(line, "CONNECT 1024\n");
    // As the guest's kernel does while nothing listens: the connection is reset before an OK.
    let Ok(agent) = UnixStream::connect(agent_socket) else {
        return;
    };
    (&client).write_all(b"OK 1073741824\n").unwrap();
    let (mut to_agent, mut from_agent) = (agent.try_clone().unwrap(), agent);
    let up = std::thread::spawn(move || {
        let _ = std::io::copy(&mut from_client, &mut to_agent);
        let _ = to_agent.shutdown(Shutdown::Write);
    });
    let _ = std::io::copy(&mut from_agent, &mut &client);
    let _ = client.shutdown(Shutdown::Both);
    up.join().unwrap();
}

fn shell(line: &str) -> ExecSpec {
    ExecSpec {
        argv: ["sh", "-c", line].map(str::to_owned).to_vec(),
        cwd: Some("/".to_owned()),
        timeout_ms: Some(60_000),
        ..ExecSpec::default()
    }
}

#[tokio::test]
async fn a_command_runs_to_its_end_and_one_that_does_not_start_says_why() {
    let guest = Guest::ready().await;
    let ran = run_to_end(&guest.client, shell("echo out; echo err >&2; exit 3"))
        .await
        .unwrap();
    assert_eq!(ran, (Some(3), b"out\n".to_vec(), b"err\n".to_vec()));
    let missing = ExecSpec {
        argv: vec!["/no/such".to_owned()],
        ..shell("")
    };
    let missing = run_to_end(&guest.client, missing).await;
    assert!(
        matches!(&missing, Err(GuestClientError::Refused { source }) if source.code == GuestErrorCode::ExecFailed),
        "{missing:?}"
    );
}

#[tokio::test]
async fn files_go_in_and_out_whole_and_directories_can_be_worked_with() {
    let guest = Guest::ready().await;
    let content: Vec<u8> = (0..3 * MAX_PAYLOAD + 17)
        .map(|n| u8::try_from(n % 251).unwrap())
        .collect();
    let (file, dir) = (guest.path("a/b/file"), guest.path("a/b"));
    let mut write = guest
        .client
        .write_file(
            file.clone(),
            WriteOptions {
                mode: Some(0o600),
                ..WriteOptions::default()
            },
        )
        .await
        .unwrap();
    write.write(&content).await.unwrap();
    assert_eq!(write.finish().await.unwrap(), content.len() as u64);
    let mut read = Vec::new();
    let reader = guest
        .client
        .read_file(file.clone(), 0, None, None)
        .await
        .unwrap()
        .into_reader();
    Box::pin(reader).read_to_end(&mut read).await.unwrap();
    assert!(read == content, "{} bytes came back", read.len());
    let mut part = guest
        .client
        .read_file(file.clone(), 10, Some(5), None)
        .await
        .unwrap();
    assert_eq!(part.next_chunk().await.unwrap().unwrap(), &content[10..15]);
    assert_eq!(part.next_chunk().await.unwrap(), None);

    let entry = guest.client.stat(file.clone(), false, None).await.unwrap();
    assert_eq!(
        (entry.size, entry.mode & 0o777, entry.file_type),
        (content.len() as u64, 0o600, FileType::File)
    );
    let change = async |json: serde_json::Value| {
        let request: GuestRequest = serde_json::from_value(json).unwrap();
        guest.client.change_files("change", &request).await
    };
    change(serde_json::json!({ "op": "file_move", "from": file, "to": guest.path("a/b/other") }))
        .await
        .unwrap();
    change(serde_json::json!({ "op": "make_dir", "path": guest.path("a/b/c/d") }))
        .await
        .unwrap();
    let mut listing = guest.client.list(dir.clone(), 1, (0, None), None).await.unwrap();
    let entries = listing.next().await.unwrap().unwrap();
    let names: Vec<_> = entries.iter().map(|entry| entry.name.as_str()).collect();
    assert_eq!(names, ["c", "other"]);
    assert_eq!(listing.next().await.unwrap(), Err(false));
    let missing = guest
        .client
        .read_file(file, 0, None, None)
        .await
        .unwrap()
        .next_chunk()
        .await;
    assert!(
        matches!(missing, Err(GuestClientError::Refused { .. })),
        "{missing:?}"
    );
    change(serde_json::json!({ "op": "file_remove", "path": dir, "recursive": true }))
        .await
        .unwrap();
    assert!(guest.client.stat(dir, false, None).await.is_err());
}

#[tokio::test]
async fn figures_and_probes_are_answered() {
    let guest = Guest::ready().await;
    let metrics = guest.client.metrics().await.unwrap();
    assert!(metrics.mem_used_bytes > 0 && metrics.mem_used_bytes < metrics.mem_total_bytes);
    let listener = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    assert!(guest.client.probe(port).await.unwrap());
    drop(listener);
    assert!(!guest.client.probe(port).await.unwrap());
}

/// A guest that reads the request and then does as told.
fn scripted(
    act: impl Fn(&mut UnixStream, GuestRequest) + Send + 'static,
) -> (tempfile::TempDir, GuestClient) {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("vsock.sock")).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut greeting = [0; 13];
            stream.read_exact(&mut greeting).unwrap();
            stream.write_all(b"OK 1\n").unwrap();
            let mut header = [0; HEADER_LEN];
            stream.read_exact(&mut header).unwrap();
            let mut json = vec![0; usize::from(header[1]) | usize::from(header[2]) << 8];
            stream.read_exact(&mut json).unwrap();
            act(&mut stream, serde_json::from_slice(&json).unwrap());
        }
    });
    let client = GuestClient::new(&dir.path().join("vsock.sock"));
    (dir, client)
}

fn frame(kind: FrameType, payload: &[u8]) -> Vec<u8> {
    [&encode_header(kind, payload.len()).unwrap()[..], payload].concat()
}

#[tokio::test]
async fn a_resync_brings_the_wall_clock_of_its_sending_and_fresh_entropy() {
    let (_dir, client) = scripted(|stream, request| {
        let GuestRequest::Resync {
            wall_unix_ns,
            entropy,
        } = request
        else {
            panic!("{request:?}");
        };
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap();
        let age = now.as_nanos() - u128::from(wall_unix_ns);
        assert!(age < 1_000_000_000, "sent {age} ns ago");
        assert_eq!(entropy.len(), 44, "32 bytes in base64");
        let response = GuestResponse::Resynced {
            step_ns: 5,
            wall_unix_ns,
        };
        stream
            .write_all(&frame(
                FrameType::Response,
                &serde_json::to_vec(&response).unwrap(),
            ))
            .unwrap();
    });
    let mut channel = client.knock().await.unwrap();
    assert_eq!(client.resync(&mut channel).await.unwrap().step_ns, 5);
}

#[tokio::test]
async fn a_guest_that_breaks_the_protocol_is_told_apart_from_one_that_is_gone() {
    let huge = [2, 0xff, 0xff, 0xff, 0xff].to_vec();
    let done = serde_json::to_vec(&GuestResponse::Done).unwrap();
    let cases: [(Vec<u8>, bool); 6] = [
        (huge, true),
        (vec![99, 0, 0, 0, 0], true),
        (frame(FrameType::Response, b"{"), true),
        (frame(FrameType::Stdout, b"out of place"), true),
        (frame(FrameType::Response, &done), true),
        (vec![2, 10, 0], false),
    ];
    for (answer, is_broken) in cases {
        let (_dir, client) = scripted(move |stream, _| stream.write_all(&answer).unwrap());
        let error = client.ping().await.unwrap_err();
        match error {
            GuestClientError::Protocol { .. } => assert!(is_broken),
            GuestClientError::Closed => assert!(!is_broken),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_guest_that_never_answers_is_given_up_after_the_limit() {
    let (_dir, client) = scripted(|_, _| std::thread::park());
    let error = client.quiesce(Duration::from_millis(50)).await.unwrap_err();
    assert!(
        matches!(
            error,
            GuestClientError::TimedOut {
                operation: "quiesce",
                ..
            }
        ),
        "{error:?}"
    );
}

#[tokio::test]
async fn no_vmm_and_no_agent_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("vsock.sock");
    let client = GuestClient::new(&socket);
    assert!(matches!(
        client.ping().await,
        Err(GuestClientError::Connect { .. })
    ));
    let listener = UnixListener::bind(&socket).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            // Read the line, so that closing is no reset.
            stream.unwrap().read_exact(&mut [0; 13]).unwrap();
        }
    });
    let error = client.ping().await.unwrap_err();
    assert!(
        matches!(error, GuestClientError::NotListening { port: 1024, .. }),
        "{error:?}"
    );
}
