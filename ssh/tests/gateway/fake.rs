//! A backend without machines: processes and files of this host, logins from a list.

use async_trait::async_trait;
use bytes::Bytes;
use std::collections::HashMap;
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command};
use tokio::sync::watch;
use torpor_api::guest::WindowSize;
use torpor_api::{ErrorCode, MachineId};
use torpor_ssh::*;

/// What the tests set and look at.
pub struct Fake {
    pub machine: MachineId,
    pub home: tempfile::TempDir,
    /// Fingerprint of a key that opens the machine.
    pub fingerprints: Vec<String>,
    pub password: String,
    pub api_key: String,
    /// The wake switch is off and the machine asleep.
    pub asleep: bool,
    /// Wakes wait for `true`.
    pub awake: watch::Sender<bool>,
    pub wakes: AtomicUsize,
    pub logins: AtomicUsize,
    /// Signals and sizes that processes were sent.
    pub told: Arc<std::sync::Mutex<Vec<String>>>,
}

impl Fake {
    pub fn new() -> Self {
        Self {
            machine: MachineId::generate(),
            home: tempfile::tempdir().unwrap(),
            fingerprints: Vec::new(),
            password: "the password".to_owned(),
            api_key: "the-api-key".to_owned(),
            asleep: false,
            awake: watch::Sender::new(true),
            wakes: AtomicUsize::new(0),
            logins: AtomicUsize::new(0),
            told: Arc::default(),
        }
    }
}

#[async_trait]
impl Backend for Fake {
    async fn log_in(&self, attempt: LoginAttempt<'_>) -> Result<Login, Denied> {
        self.logins.fetch_add(1, Ordering::SeqCst);
        let by = match attempt.credential {
            Credential::ApiKey(key) if key == self.api_key => "api_key",
            Credential::Password(password) if password == self.password => "password",
            Credential::PublicKey(key) if self.fingerprints.contains(&key.fingerprint) => "key",
            Credential::Certificate(_) => "certificate",
            _ => return Err(Denied::Unknown),
        };
        if attempt.machine != "web" && attempt.machine != self.machine.as_str() {
            return Err(Denied::Unknown);
        }
        if self.asleep {
            return Err(Denied::Asleep);
        }
        Ok(Login {
            machine: self.machine.clone(),
            user: attempt.user.unwrap_or("root").to_owned(),
            by,
            client: attempt.client,
        })
    }

    async fn wake(&self, login: &Login) -> Result<Arc<dyn Guest>, Refusal> {
        self.wakes.fetch_add(1, Ordering::SeqCst);
        self.awake.subscribe().wait_for(|awake| *awake).await.unwrap();
        if login.user == "refused" {
            return Err(Refusal::new(ErrorCode::CapacityExceeded, "the host is full"));
        }
        Ok(Arc::new(FakeGuest {
            home: self.home.path().to_str().unwrap().to_owned(),
            user: login.user.clone(),
            told: Arc::clone(&self.told),
        }))
    }
}

struct FakeGuest {
    home: String,
    user: String,
    told: Arc<std::sync::Mutex<Vec<String>>>,
}

#[async_trait]
impl Guest for FakeGuest {
    async fn start(&self, order: ProcessOrder) -> Result<Process, Refusal> {
        let line = match order.program {
            Program::Shell => "exec sh".to_owned(),
            Program::CommandLine(line) => line,
        };
        let mut command = match &order.terminal {
            Some(_) => {
                let mut command = Command::new("script");
                command.args(["-qec", &line, "/dev/null"]);
                command
            }
            None => {
                let mut command = Command::new("sh");
                command.args(["-c", &line]);
                command
            }
        };
        let env: HashMap<_, _> = order.env.into_iter().collect();
        let mut child = command
            .envs(env)
            .env(
                "TERM",
                order.terminal.map_or("dumb".to_owned(), |terminal| terminal.term),
            )
            .env("FAKE_USER", &self.user)
            .current_dir(&self.home)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| Refusal::new(ErrorCode::ExecFailed, error.to_string()))?;
        let input = FakeInput {
            stdin: child.stdin.take(),
            told: Arc::clone(&self.told),
        };
        let output = FakeOutput {
            stdout: child.stdout.take(),
            stderr: child.stderr.take(),
            child,
        };
        Ok(Process {
            input: Box::new(input),
            output: Box::new(output),
        })
    }

    async fn connect(&self, host: &str, port: u16) -> Result<Box<dyn Stream>, Refusal> {
        let stream = tokio::net::TcpStream::connect((host, port)).await;
        let stream =
            stream.map_err(|error| Refusal::new(ErrorCode::ServiceUnreachable, error.to_string()))?;
        Ok(Box::new(stream))
    }

    async fn files(&self) -> Result<Arc<dyn Files>, Refusal> {
        Ok(Arc::new(FakeFiles(self.home.clone())))
    }
}

struct FakeInput {
    stdin: Option<ChildStdin>,
    told: Arc<std::sync::Mutex<Vec<String>>>,
}

#[async_trait]
impl ProcessInput for FakeInput {
    async fn write(&mut self, bytes: Bytes) -> Result<(), Refusal> {
        let stdin = self
            .stdin
            .as_mut()
            .ok_or(Refusal::new(ErrorCode::Internal, "closed"))?;
        let written = stdin.write_all(&bytes).await;
        written.map_err(|error| Refusal::new(ErrorCode::Internal, error.to_string()))
    }
    async fn close(&mut self) -> Result<(), Refusal> {
        self.stdin = None;
        Ok(())
    }
    async fn resize(&mut self, size: WindowSize) -> Result<(), Refusal> {
        self.told
            .lock()
            .unwrap()
            .push(format!("{}x{}", size.cols, size.rows));
        Ok(())
    }
    async fn signal(&mut self, signal: u32) -> Result<(), Refusal> {
        self.told.lock().unwrap().push(format!("signal {signal}"));
        Ok(())
    }
}

struct FakeOutput {
    stdout: Option<ChildStdout>,
    stderr: Option<ChildStderr>,
    child: Child,
}

#[async_trait]
impl ProcessOutput for FakeOutput {
    async fn next(&mut self) -> Result<ProcessEvent, Refusal> {
        use std::os::unix::process::ExitStatusExt;
        let mut buffers = (vec![0; 32 << 10], vec![0; 32 << 10]);
        while self.stdout.is_some() || self.stderr.is_some() {
            let (out, n) = tokio::select! {
                n = read(&mut self.stdout, &mut buffers.0) => (true, n),
                n = read(&mut self.stderr, &mut buffers.1) => (false, n),
            };
            match (out, n) {
                (true, 0) => self.stdout = None,
                (false, 0) => self.stderr = None,
                (true, n) => return Ok(ProcessEvent::Stdout(Bytes::copy_from_slice(&buffers.0[..n]))),
                (false, n) => return Ok(ProcessEvent::Stderr(Bytes::copy_from_slice(&buffers.1[..n]))),
            }
        }
        let status = self.child.wait().await.unwrap();
        Ok(match (status.code(), status.signal()) {
            (Some(code), _) => ProcessEvent::Exited {
                code: u32::try_from(code).unwrap(),
            },
            (None, signal) => ProcessEvent::Killed {
                signal: u32::try_from(signal.unwrap()).unwrap(),
            },
        })
    }
}

async fn read(from: &mut Option<impl tokio::io::AsyncRead + Unpin>, into: &mut [u8]) -> usize {
    match from {
        Some(from) => from.read(into).await.unwrap_or(0),
        None => std::future::pending().await,
    }
}

/// Files of this host.
struct FakeFiles(String);

fn failed(error: std::io::Error) -> FileError {
    match error.kind() {
        ErrorKind::NotFound => FileError::NotFound(error.to_string()),
        ErrorKind::PermissionDenied => FileError::Denied(error.to_string()),
        _ => FileError::Failed(error.to_string()),
    }
}

fn attributes(found: &std::fs::Metadata) -> Attributes {
    let kind = found.file_type();
    Attributes {
        kind: match () {
            () if kind.is_file() => FileKind::File,
            () if kind.is_dir() => FileKind::Directory,
            () if kind.is_symlink() => FileKind::Symlink,
            () => FileKind::Other,
        },
        size: found.len(),
        mode: found.mode() & 0o7777,
        uid: found.uid(),
        gid: found.gid(),
        accessed_unix_s: u32::try_from(found.atime()).unwrap(),
        modified_unix_s: u32::try_from(found.mtime()).unwrap(),
    }
}

#[async_trait]
impl Files for FakeFiles {
    async fn home(&self) -> Result<String, FileError> {
        Ok(self.0.clone())
    }
    async fn stat(&self, path: &str, follow: bool) -> Result<Attributes, FileError> {
        let found = if follow {
            std::fs::metadata(path)
        } else {
            std::fs::symlink_metadata(path)
        };
        found.map(|found| attributes(&found)).map_err(failed)
    }
    async fn list(&self, path: &str) -> Result<Vec<DirectoryEntry>, FileError> {
        let entry = |entry: std::io::Result<std::fs::DirEntry>| {
            let entry = entry?;
            Ok(DirectoryEntry {
                name: entry.file_name().into_string().unwrap(),
                attributes: attributes(&entry.path().symlink_metadata()?),
            })
        };
        std::fs::read_dir(path)
            .and_then(|entries| entries.map(entry).collect())
            .map_err(failed)
    }
    async fn open(&self, path: &str, order: OpenOrder) -> Result<(), FileError> {
        let mut options = std::fs::OpenOptions::new();
        options
            .read(order.read)
            .write(order.write)
            .create(order.create)
            .truncate(order.truncate)
            .mode(order.mode.unwrap_or(0o644));
        if order.exclusive {
            options.create_new(true);
        }
        options.open(path).map(drop).map_err(failed)
    }
    async fn read(&self, path: &str, offset: u64, len: u32) -> Result<Bytes, FileError> {
        let mut file = std::fs::File::open(path).map_err(failed)?;
        file.seek(SeekFrom::Start(offset)).map_err(failed)?;
        let mut bytes = Vec::new();
        file.take(len.into()).read_to_end(&mut bytes).map_err(failed)?;
        Ok(bytes.into())
    }
    async fn write(&self, path: &str, place: Place, bytes: Bytes) -> Result<(), FileError> {
        let mut options = std::fs::OpenOptions::new();
        options.write(true).append(place == Place::End);
        let mut file = options.open(path).map_err(failed)?;
        if let Place::At(offset) = place {
            file.seek(SeekFrom::Start(offset)).map_err(failed)?;
        }
        file.write_all(&bytes).map_err(failed)
    }
    async fn set_attributes(&self, path: &str, new: NewAttributes) -> Result<(), FileError> {
        let file = std::fs::File::options().append(true).open(path).map_err(failed)?;
        if let Some(size) = new.size {
            file.set_len(size).map_err(failed)?;
        }
        if let Some(mode) = new.mode {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(failed)?;
        }
        if let Some((_, modified)) = new.times_unix_s {
            let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(modified.into());
            file.set_modified(time).map_err(failed)?;
        }
        Ok(())
    }
    async fn make_dir(&self, path: &str, _: Option<u32>) -> Result<(), FileError> {
        std::fs::create_dir(path).map_err(failed)
    }
    async fn remove_file(&self, path: &str) -> Result<(), FileError> {
        std::fs::remove_file(path).map_err(failed)
    }
    async fn remove_dir(&self, path: &str) -> Result<(), FileError> {
        std::fs::remove_dir(path).map_err(failed)
    }
    async fn rename(&self, from: &str, to: &str, replace: bool) -> Result<(), FileError> {
        if !replace && std::fs::symlink_metadata(to).is_ok() {
            return Err(FileError::Failed(format!("{to} is there")));
        }
        std::fs::rename(from, to).map_err(failed)
    }
    async fn symlink(&self, target: &str, path: &str) -> Result<(), FileError> {
        std::os::unix::fs::symlink(target, path).map_err(failed)
    }
    async fn read_link(&self, path: &str) -> Result<String, FileError> {
        let target = std::fs::read_link(path).map_err(failed)?;
        Ok(target.to_str().unwrap().to_owned())
    }
    async fn resolve(&self, path: &str) -> Result<String, FileError> {
        let path = std::path::Path::new(path);
        let resolved = match path.canonicalize() {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let parent = path.parent().unwrap().canonicalize().map_err(failed)?;
                parent.join(path.file_name().unwrap())
            }
            other => other.map_err(failed)?,
        };
        Ok(resolved.to_str().unwrap().to_owned())
    }
}
