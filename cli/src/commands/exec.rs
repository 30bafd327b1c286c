//! `exec`: a command in a machine, with its output, its exit code and what is piped in.

use super::{Context, path};
use crate::args::{Exec, Format, map_of};
use crate::output;
use anyhow::{Context as _, bail};
use http::Method;
use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::time::Duration;
use torpor_api::http::{ExecRequest, ExecResult};

/// Most standard input that is passed on; with JSON's escapes it stays below the API's bound on a body.
const MAX_STDIN_BYTES: u64 = 512 << 10;

/// Runs the command; the exit code is the command's own.
pub(super) async fn run(context: &Context, exec: Exec) -> anyhow::Result<u8> {
    let stdin = match (exec.with_stdin, exec.no_stdin) {
        (_, true) => None,
        (true, false) => Some(read_stdin()?),
        (false, false) => piped_stdin()?,
    };
    let timeout_ms = exec
        .timeout
        .map(|timeout: Duration| timeout.as_millis())
        .map(u64::try_from);
    let request = ExecRequest {
        argv: exec.argv,
        shell: None,
        env: map_of(&exec.env),
        cwd: exec.workdir,
        user: exec.user,
        stdin,
        timeout_ms: timeout_ms.transpose().context("the timeout is too long")?,
        background: exec.detach,
    };
    let path = format!("{}/exec", path(&exec.machine));
    let answer = context.client.call_with(Method::POST, &path, &request).await?;
    let result: ExecResult = context.client.read(&answer)?;
    match context.format {
        Format::Json => output::print_json(&answer)?,
        Format::Table if exec.detach => output::print_line(&result.pid.to_string())?,
        Format::Table => pass_on(&result)?,
    }
    Ok(exit_code(result.exit_code))
}

fn pass_on(result: &ExecResult) -> anyhow::Result<()> {
    let mut stderr = io::stderr().lock();
    // A closed stderr is nobody's concern.
    let _ = stderr.write_all(result.stderr.as_bytes());
    if result.truncated {
        let _ = writeln!(stderr, "torpor: the output was too long and is cut off");
    }
    output::print(result.stdout.as_bytes())
}

/// A background command has none yet; one that does not fit is an error of its own.
fn exit_code(code: Option<i32>) -> u8 {
    code.map_or(0, |code| u8::try_from(code).unwrap_or(255))
}

/// Standard input if something is piped into it: a pipe, a socket or a file, but no terminal or /dev/null.
fn piped_stdin() -> anyhow::Result<Option<String>> {
    let stdin = io::stdin();
    if stdin.is_terminal() {
        return Ok(None);
    }
    let Ok(own) = stdin.as_fd().try_clone_to_owned() else {
        return Ok(None);
    };
    let kind = File::from(own)
        .metadata()
        .context("cannot look at standard input")?
        .file_type();
    if !(kind.is_fifo() || kind.is_file() || kind.is_socket()) {
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
