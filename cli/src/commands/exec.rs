//! `exec`: a command in a machine, with its output, its exit code and what is piped in.
//!
//! For people it is streamed (`stream`); JSON and a command that is left to itself are one call and one answer.

mod stream;
mod terminal;

use super::{Context, path};
use crate::args::{Exec, Format, map_of};
use crate::output;
use anyhow::{Context as _, bail};
use http::Method;
use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::time::Duration;
use torpor_api::http::{ExecRequest, ExecResult, StreamOpen};

/// Most standard input that is passed on; with JSON's escapes it stays below the API's bound on a body.
const MAX_STDIN_BYTES: u64 = 512 << 10;

/// Runs the command; the exit code is the command's own.
pub(super) async fn run(context: &Context, exec: Exec) -> anyhow::Result<u8> {
    if exec.detach || context.format == Format::Json {
        at_once(context, exec).await
    } else {
        as_it_runs(context, exec).await
    }
}

async fn as_it_runs(context: &Context, exec: Exec) -> anyhow::Result<u8> {
    let wanted = stream::Wanted {
        stdin: !exec.no_stdin && (exec.with_stdin || exec.tty || is_piped()?),
        tty: exec.tty,
    };
    let path = format!("{}/exec/stream", path(&exec.machine));
    let mut command = request_of(exec)?;
    if wanted.tty
        && let Ok(term) = std::env::var("TERM")
    {
        command.env.entry("TERM".to_owned()).or_insert(term);
    }
    let open = StreamOpen::Start {
        command,
        tty: wanted.tty.then(terminal::size),
        stdin: wanted.stdin,
    };
    let socket = context.client.socket(&path).await?;
    stream::run(socket, open, wanted).await
}

async fn at_once(context: &Context, exec: Exec) -> anyhow::Result<u8> {
    let stdin = match (exec.with_stdin, exec.no_stdin) {
        (_, true) => None,
        (true, false) => Some(read_stdin()?),
        (false, false) => piped_stdin()?,
    };
    let (path, detach) = (format!("{}/exec", path(&exec.machine)), exec.detach);
    let request = ExecRequest {
        stdin,
        ..request_of(exec)?
    };
    let answer = context.client.call_with(Method::POST, &path, &request).await?;
    let result: ExecResult = context.client.read(&answer)?;
    match context.format {
        Format::Json => output::print_json(&answer)?,
        Format::Table if detach => output::print_line(&result.pid.to_string())?,
        Format::Table => {}
    }
    Ok(result.exit_code.map_or(0, stream::exit_status))
}

fn request_of(exec: Exec) -> anyhow::Result<ExecRequest> {
    let timeout_ms = exec
        .timeout
        .map(|timeout: Duration| timeout.as_millis())
        .map(u64::try_from);
    Ok(ExecRequest {
        argv: exec.argv,
        shell: None,
        env: map_of(&exec.env),
        cwd: exec.workdir,
        user: exec.user,
        stdin: None,
        timeout_ms: timeout_ms.transpose().context("the timeout is too long")?,
        background: exec.detach,
    })
}

/// Whether something is piped in: a pipe, a socket or a file, but no terminal or /dev/null.
fn is_piped() -> anyhow::Result<bool> {
    let stdin = io::stdin();
    if stdin.is_terminal() {
        return Ok(false);
    }
    let Ok(own) = stdin.as_fd().try_clone_to_owned() else {
        return Ok(false);
    };
    let kind = File::from(own)
        .metadata()
        .context("cannot look at standard input")?
        .file_type();
    Ok(kind.is_fifo() || kind.is_file() || kind.is_socket())
}

fn piped_stdin() -> anyhow::Result<Option<String>> {
    if !is_piped()? {
        return Ok(None);
    }
    Ok(Some(read_stdin()?).filter(|text| !text.is_empty()))
}

fn read_stdin() -> anyhow::Result<String> {
    let mut bytes = Vec::new();
    let mut bounded = io::stdin().lock().take(MAX_STDIN_BYTES + 1);
    bounded
        .read_to_end(&mut bytes)
        .context("cannot read standard input")?;
    if bytes.len() as u64 > MAX_STDIN_BYTES {
        bail!(
            "standard input is longer than {} KiB\n  what to do: Put it into a file in the machine first.",
            MAX_STDIN_BYTES >> 10
        );
    }
    let text = String::from_utf8(bytes);
    text.context("standard input is not UTF-8 text\n  what to do: Encode it, for example with base64.")
}
