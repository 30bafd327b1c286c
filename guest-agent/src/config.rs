//! The command line.
//!
//! As PID 1 the kernel hands over whatever words of its own command line it does not know, so unknown
//! arguments are then remarked upon, never refused.

use crate::hold;
use std::path::PathBuf;
use torpor_api::guest::GuestRequest;

/// What `--help` prints.
pub const USAGE: &str = "\
torpor-guest: the agent inside a Torpor guest

  --listen vsock|unix:<path>   where to serve (default: vsock, port 1024)
  --no-init                    do not act as init, even as PID 1
  --run-dir <path>             where logs of background processes go (default: /run/torpor)
  --poweroff <program>         without being init: what a shutdown runs (default: /sbin/poweroff)
  --reboot <program>           without being init: what a reboot runs (default: /sbin/reboot)
  --version, --help

torpor-guest hold <duration> [reason]   keep the machine awake, if its lease slides (90s, 10m, 2h)
torpor-guest release                    no longer
torpor-guest held                       say who does
";

/// Where to serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// The agent's vsock port.
    Vsock,
    /// A unix socket.
    Unix(PathBuf),
}

/// What the process is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Serve.
    Serve(Config),
    /// Ask the agent that serves here.
    Ask {
        /// Its socket.
        socket: PathBuf,
        /// What.
        request: GuestRequest,
    },
    /// Print the usage.
    Help,
    /// Print the version.
    Version,
}

/// How to serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where.
    pub listen: Address,
    /// Act as init.
    pub init: bool,
    /// Where logs go.
    pub run_dir: PathBuf,
    /// What ends a machine that has another init.
    pub poweroff: String,
    /// What reboots a machine that has another init.
    pub reboot: String,
    /// Arguments that mean nothing to the agent.
    pub ignored: Vec<String>,
}

/// Read the arguments after the program's name.
///
/// # Errors
/// What is wrong with them, for people.
pub fn parse(args: impl Iterator<Item = String>, is_pid_1: bool) -> Result<Action, String> {
    let mut config = Config {
        listen: Address::Vsock,
        init: is_pid_1,
        run_dir: PathBuf::from("/run/torpor"),
        poweroff: "/sbin/poweroff".to_owned(),
        reboot: "/sbin/reboot".to_owned(),
        ignored: Vec::new(),
    };
    let mut args = args;
    let mut run_dir_request = None;
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--help" if !is_pid_1 => return Ok(Action::Help),
            "--version" if !is_pid_1 => return Ok(Action::Version),
            "hold" if !is_pid_1 => {
                let seconds = seconds(&value()?)?;
                let reason = args.by_ref().collect::<Vec<_>>().join(" ");
                run_dir_request = Some(GuestRequest::Hold { seconds, reason });
            }
            "release" if !is_pid_1 => run_dir_request = Some(GuestRequest::Release),
            "held" if !is_pid_1 => run_dir_request = Some(GuestRequest::HoldState),
            "--no-init" => config.init = false,
            "--listen" => config.listen = address(&value()?)?,
            "--run-dir" => config.run_dir = PathBuf::from(value()?),
            "--poweroff" => config.poweroff = value()?,
            "--reboot" => config.reboot = value()?,
            _ if is_pid_1 => config.ignored.push(arg),
            _ => return Err(format!("unknown argument {arg:?}")),
        }
    }
    Ok(match run_dir_request {
        Some(request) => Action::Ask {
            socket: config.run_dir.join(hold::SOCKET),
            request,
        },
        None => Action::Serve(config),
    })
}

/// `90`, `90s`, `10m`, `2h`.
fn seconds(text: &str) -> Result<u64, String> {
    let bad = || format!("{text:?} is no duration such as 90s, 10m or 2h");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_lowercase());
    let factor: u64 = match text.get(digits.len()..).unwrap_or_default() {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => return Err(bad()),
    };
    let number: u64 = digits.parse().map_err(|_| bad())?;
    number
        .checked_mul(factor)
        .filter(|seconds| *seconds > 0)
        .ok_or_else(bad)
}

fn address(text: &str) -> Result<Address, String> {
    match text.strip_prefix("unix:") {
        Some(path) if !path.is_empty() => Ok(Address::Unix(PathBuf::from(path))),
        None if text == "vsock" => Ok(Address::Vsock),
        _ => Err(format!("{text:?} is neither vsock nor unix:<path>")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(args: &[&str], is_pid_1: bool) -> Result<Action, String> {
        parse(args.iter().map(|arg| (*arg).to_owned()), is_pid_1)
    }

    #[test]
    fn pid_1_is_init_and_ignores_words_of_the_kernel() {
        let Ok(Action::Serve(config)) = parsed(&["splash", "--help", "--no-init"], true) else {
            panic!("refused");
        };
        assert_eq!(config.ignored, ["splash", "--help"]);
        assert!(!config.init);
    }

    #[test]
    fn a_hold_has_a_duration_and_a_reason() {
        let asked = parsed(&["--run-dir", "/x", "hold", "10m", "a", "build"], false);
        let request = GuestRequest::Hold {
            seconds: 600,
            reason: "a build".to_owned(),
        };
        let socket = PathBuf::from("/x/hold.sock");
        assert_eq!(asked, Ok(Action::Ask { socket, request }));
        for bad in [
            &["hold"][..],
            &["hold", "0"],
            &["hold", "1d"],
            &["hold", "x"],
            &["hold", "-1s"],
        ] {
            assert!(parsed(bad, false).is_err(), "{bad:?}");
        }
        assert!(matches!(parsed(&["release"], true), Ok(Action::Serve(_))));
    }

    #[test]
    fn a_service_refuses_what_it_does_not_know() {
        for bad in [
            &["splash"][..],
            &["--listen"],
            &["--listen", "tcp:1"],
            &["--listen", "unix:"],
        ] {
            assert!(parsed(bad, false).is_err(), "{bad:?}");
        }
        assert_eq!(parsed(&["--version"], false), Ok(Action::Version));
    }
}
