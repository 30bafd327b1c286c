//! A torpord of canned answers on a unix socket, and the command run against it.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use tempfile::TempDir;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

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

    /// A torpord that opens one WebSocket and says this over it, once it has been told something.
    pub(crate) fn streaming(what: &str, said: Vec<u8>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("api.sock")).unwrap();
        let asked: Arc<Mutex<Vec<Asked>>> = Arc::default();
        let (record, what) = (Arc::clone(&asked), what.to_owned());
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let (asked, key) = read_upgrade(&mut reader);
            assert_eq!(asked, what);
            let accept = derive_accept_key(key.as_bytes());
            write!(
                stream,
                "HTTP/1.1 101 x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: {accept}\r\n\r\n"
            )
            .unwrap();
            let body = read_message(&mut reader);
            record.lock().unwrap().push(Asked { what, body });
            stream.write_all(&said).unwrap();
            // Until the command has closed its end.
            let _ = std::io::copy(&mut reader, &mut std::io::sink());
        });
        Self { directory, asked }
    }

    /// The one request that there was.
    pub(crate) fn asked_once(&self) -> Asked {
        let asked = self.asked();
        assert_eq!(asked.len(), 1, "{asked:?}");
        asked.into_iter().next().unwrap()
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

/// Method and path of an upgrade, and its key.
fn read_upgrade(reader: &mut impl BufRead) -> (String, String) {
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let what = line.trim_end().trim_end_matches(" HTTP/1.1").to_owned();
    let mut key = String::new();
    while !line.trim().is_empty() {
        line.clear();
        reader.read_line(&mut line).unwrap();
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("sec-websocket-key")
        {
            value.trim().clone_into(&mut key);
        }
    }
    (what, key)
}

/// A client's first message, which is short of 64 KiB.
fn read_message(reader: &mut impl Read) -> String {
    let mut head = [0; 2];
    reader.read_exact(&mut head).unwrap();
    let mut len = usize::from(head[1] & 127);
    if len == 126 {
        let mut long = [0; 2];
        reader.read_exact(&mut long).unwrap();
        len = u16::from_be_bytes(long).into();
    }
    let mut mask = [0; 4];
    reader.read_exact(&mut mask).unwrap();
    let mut payload = vec![0; len];
    reader.read_exact(&mut payload).unwrap();
    let unmasked = payload
        .iter()
        .zip(mask.iter().cycle())
        .map(|(byte, mask)| byte ^ mask);
    String::from_utf8(unmasked.collect()).unwrap()
}

/// One frame of a server, of at most 125 bytes or less than 64 KiB.
pub(crate) fn frame(head: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![head];
    match u8::try_from(payload.len()) {
        Ok(len) if len < 126 => frame.push(len),
        _ => {
            frame.push(126);
            frame.extend(u16::try_from(payload.len()).unwrap().to_be_bytes());
        }
    }
    frame.extend(payload);
    frame
}

pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}
