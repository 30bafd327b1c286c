//! A torpord of canned answers on a unix socket, and the command run against it.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use tempfile::TempDir;

/// One request as it came: method and path, and the body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) what: String,
    pub(crate) body: String,
}

/// A torpord that answers from a table of (method and path, status, body).
pub(crate) struct FakeTorpord {
    directory: TempDir,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl FakeTorpord {
    pub(crate) fn answering(answers: &[(&str, u16, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("api.sock")).unwrap();
        let asked: Arc<Mutex<Vec<Asked>>> = Arc::default();
        let record = Arc::clone(&asked);
        let answers: Vec<(String, u16, String)> = answers
            .iter()
            .map(|(what, status, body)| ((*what).to_owned(), *status, (*body).to_owned()))
            .collect();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let asked = answer(stream.unwrap(), &answers);
                record.lock().unwrap().push(asked);
            }
        });
        Self { directory, asked }
    }

    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = torpor(arguments);
        command.env("TORPOR_SOCKET", self.directory.path().join("api.sock"));
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }
}

/// The command without a torpord of its own.
pub(crate) fn torpor(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_torpor"));
    command.args(arguments).stdin(Stdio::null());
    for name in ["TORPOR_SOCKET", "TORPOR_URL", "TORPOR_TOKEN", "TORPOR_TOKEN_FILE"] {
        command.env_remove(name);
    }
    command
}

fn answer(mut stream: UnixStream, answers: &[(String, u16, String)]) -> Asked {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let what = line.trim_end().trim_end_matches(" HTTP/1.1").to_owned();
    let mut len_bytes = 0;
    loop {
        line.clear();
        reader.read_line(&mut line).unwrap();
        if line.trim().is_empty() {
            break;
        }
        if let Some(len) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            len_bytes = len.trim().parse().unwrap();
        }
    }
    let mut body = vec![0; len_bytes];
    reader.read_exact(&mut body).unwrap();
    let (status, text) = answers
        .iter()
        .find(|(wanted, ..)| *wanted == what)
        .map_or((404, "{}"), |(_, status, body)| (*status, body.as_str()));
    write!(
        stream,
        "HTTP/1.1 {status} x\r\nContent-Length: {}\r\n\r\n{text}",
        text.len()
    )
    .unwrap();
    Asked {
        what,
        body: String::from_utf8(body).unwrap(),
    }
}

pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}
