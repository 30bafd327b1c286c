//! Probes in a process of their own.
//!
//! A broken KVM hangs a thread in the kernel, or kills the process. So the parent starts its own program again with
//! the hidden command [`COMMAND`] and the probe's name, reads the steps that the child prints, and kills it when its
//! time is over. One thread reads; the parent waits on the channel.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// The hidden command that a program using this crate passes on to [`crate::child`].
pub const COMMAND: &str = "doctor-child";

const MAX_STDERR_BYTES: u64 = 4096;

/// How a supervised probe ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It works.
    Passed,
    /// It said why not.
    Failed(String),
    /// It was killed by a signal, or exited without a word.
    Died(String),
    /// It did nothing for its time.
    Hung,
}

/// A probe's outcome and the last step that it began.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Report {
    pub(crate) outcome: Outcome,
    pub(crate) last_step: Option<String>,
}

/// Tells the parent which step begins.
pub(crate) fn step(name: &str) {
    let mut stdout = std::io::stdout().lock();
    // Without a parent nobody needs to know.
    let _ = writeln!(stdout, "step {name}").and_then(|()| stdout.flush());
}

/// Turns a probe's result into the child's last line and exit code.
pub(crate) fn report(result: Result<(), String>) -> u8 {
    let mut stdout = std::io::stdout().lock();
    let (line, code) = match result {
        Ok(()) => ("passed".to_owned(), 0),
        Err(why) => (format!("failed {}", why.replace('\n', " ")), 1),
    };
    let _ = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
    code
}

/// Runs a probe in a child of this very program for at most `limit`.
pub(crate) fn run(probe: &str, limit: Duration) -> Report {
    let died = |why: String| Report {
        outcome: Outcome::Died(why),
        last_step: None,
    };
    let program = match std::env::current_exe() {
        Ok(program) => program,
        Err(error) => return died(format!("cannot find this program: {error}")),
    };
    let mut command = Command::new(program);
    command.arg(COMMAND).arg(probe);
    supervise(&mut command, limit).unwrap_or_else(|error| died(format!("cannot start a child: {error}")))
}

fn supervise(command: &mut Command, limit: Duration) -> std::io::Result<Report> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let (send, lines) = mpsc::channel();
    if let Some(stdout) = child.stdout.take() {
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if send.send(line).is_err() {
                    return;
                }
            }
        });
    }
    let deadline = Instant::now() + limit;
    let mut last_step = None;
    let outcome = loop {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => match line.split_once(' ') {
                Some(("step", name)) => last_step = Some(name.to_owned()),
                Some(("failed", why)) => break Outcome::Failed(why.to_owned()),
                _ if line == "passed" => break Outcome::Passed,
                _ => {}
            },
            Err(mpsc::RecvTimeoutError::Timeout) => break Outcome::Hung,
            Err(mpsc::RecvTimeoutError::Disconnected) => break Outcome::Died(last_words(&mut child)),
        }
    };
    // It may be gone already. A child stuck in the kernel is not waited for.
    let _ = child.kill();
    if outcome != Outcome::Hung {
        let _ = child.wait();
    }
    Ok(Report { outcome, last_step })
}

/// How a child that closed its output ended.
fn last_words(child: &mut Child) -> String {
    let mut said = String::new();
    if let Some(stderr) = child.stderr.take() {
        // What can't be read was not said.
        let _ = stderr.take(MAX_STDERR_BYTES).read_to_string(&mut said);
    }
    match child.wait() {
        Ok(status) => format!("{status} {}", said.trim()).trim().to_owned(),
        Err(error) => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, limit: Duration) -> Report {
        supervise(Command::new("sh").args(["-c", script]), limit).unwrap()
    }

    #[test]
    fn a_probe_passes_fails_dies_or_hangs_and_its_last_step_is_known() {
        let long = Duration::from_secs(30);
        assert_eq!(shell("echo passed", long).outcome, Outcome::Passed);
        let failed = shell(
            "echo step one; echo step two x; echo failed no such thing; exit 1",
            long,
        );
        assert_eq!(failed.outcome, Outcome::Failed("no such thing".to_owned()));
        assert_eq!(failed.last_step.as_deref(), Some("two x"));
        let died = shell("echo step one; kill -9 $$", long);
        assert!(
            matches!(&died.outcome, Outcome::Died(why) if why.contains('9')),
            "{died:?}"
        );
        assert_eq!(died.last_step.as_deref(), Some("one"));
        let hung = shell("echo step one; exec sleep 60", Duration::from_millis(300));
        assert_eq!(
            (hung.outcome, hung.last_step.as_deref()),
            (Outcome::Hung, Some("one"))
        );
    }
}
