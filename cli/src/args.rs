//! The command line: every command with its help and examples; `options` has what each one takes.

mod options;
mod ssh;

pub(crate) use options::{
    Activity, Cp, Create, Doctor, Events, Exec, Expose, Fork, Grants, Hide, Import, Keep, Kill, Lease, Logs,
    OneMachine, Probe, Resume, Rm, Snapshots, Switch, Templates, Traffic, Url, Wake,
};

pub(crate) use ssh::{Ssh, SshKeys};

use clap::{Args, Parser, Subcommand, ValueEnum};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Machines that sleep with their memory and are awake before the next request notices.
#[derive(Debug, Parser)]
#[command(
    name = "torpor",
    version,
    after_help = "\
Examples:
  torpor create --name web --lease 15m --publish 8080
  torpor exec -d web -- python3 -m http.server 8080
  curl $(torpor url web)
  torpor pause web         # and the next curl wakes it

A machine is named by its name, its machine ID or any execution ID it ever had."
)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// How to reach torpord and how to print.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// What to print: a table for people, or the API's own JSON
    #[arg(long, short, global = true, value_enum, default_value_t = Format::Table)]
    output: Format,
    /// Short for --output json
    #[arg(long, global = true, conflicts_with = "output")]
    json: bool,
    /// Unix socket of torpord
    #[arg(
        long,
        global = true,
        env = "TORPOR_SOCKET",
        default_value = "/run/torpor/api.sock"
    )]
    pub(crate) socket: PathBuf,
    /// Address of torpord's API, for example http://127.0.0.1:7070, instead of the socket
    #[arg(long, global = true, env = "TORPOR_URL")]
    pub(crate) url: Option<String>,
    /// File that holds the bearer token for --url
    #[arg(long, global = true, env = "TORPOR_TOKEN_FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// The bearer token itself; set TORPOR_TOKEN rather than this, which other users can see
    #[arg(
        long,
        global = true,
        env = "TORPOR_TOKEN",
        hide_env_values = true,
        hide = true
    )]
    pub(crate) token: Option<String>,
}

impl Global {
    /// What to print.
    pub(crate) fn output(&self) -> Format {
        if self.json { Format::Json } else { self.output }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Table,
    Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Sdk {
    /// `morphcloud` from PyPI
    Morph,
    /// `nullspace-sdk` from PyPI
    Nullspace,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a machine and boot it
    #[command(after_help = "\
Examples:
  torpor create
  torpor create --snapshot before
  torpor create --name web --mem 512M --lease 15m --publish 8080
  torpor create --name db --disk 20G --publish-tcp 5432:postgres --no-wake http
  torpor create --lease 1h --on-expiry destroy --meta owner=ci")]
    Create(Create),
    /// List the machines
    #[command(
        visible_alias = "list",
        after_help = "Examples:\n  torpor ls\n  torpor ls -o json | jq -r .machines[].id"
    )]
    Ls,
    /// Show one machine; does not wake it
    #[command(after_help = "Examples:\n  torpor get web\n  torpor get web -o json | jq .lease")]
    Get(OneMachine),
    /// Put a machine to sleep with its memory
    #[command(after_help = "Examples:\n  torpor pause web")]
    Pause(OneMachine),
    /// Wake a machine, whatever its wake switches say
    #[command(
        visible_alias = "start",
        after_help = "\
Examples:
  torpor resume web
  torpor resume web --from-disk    # boot, and give up the memory"
    )]
    Resume(Resume),
    /// Delete machines with their disks
    #[command(
        visible_alias = "delete",
        after_help = "Examples:\n  torpor rm web\n  torpor rm -f web db"
    )]
    Rm(Rm),
    /// Take, list and delete snapshots: memory and disk of one instant
    #[command(
        subcommand,
        after_help = "\
Examples:
  torpor snapshot create web --name before
  torpor create --snapshot before --name again
  torpor snapshot rm before"
    )]
    Snapshot(Snapshots),
    /// Make machines that go on where this one is
    #[command(after_help = "Examples:\n  torpor fork web\n  torpor fork web -n 3 --lease 10m")]
    Fork(Fork),
    /// Run a command in a machine, waking it if need be
    #[command(after_help = "\
Examples:
  torpor exec web -- uname -a
  torpor exec web -u dev -w /workspace -e CI=1 -- make test
  torpor exec -d web -- python3 -m http.server 8080
  torpor exec -t web -- bash
  tar c src | torpor exec web -- tar x -C /workspace

Output comes as it is written, over pauses of the machine, too. Ctrl-C ends the command, a second one the waiting.
The exit code is the command's; 124 after --timeout, 125 if torpord refused, 126 if it could not be started.")]
    Exec(Exec),
    /// List the processes that commands started in a machine; does not wake it
    #[command(
        after_help = "Examples:\n  torpor ps web\n  torpor ps web -o json | jq .processes[0].exit_code"
    )]
    Ps(OneMachine),
    /// Signal a process in a machine, and everything that it started
    #[command(after_help = "Examples:\n  torpor kill web 412\n  torpor kill web 412 --signal 15")]
    Kill(Kill),
    /// Copy a file or a directory into a machine or out of it, waking it if need be
    #[command(after_help = "\
Examples:
  torpor cp model.bin web:/workspace/model.bin
  torpor cp ./src web:/workspace/        # becomes /workspace/src
  torpor cp web:/var/log/app.log .")]
    Cp(Cp),
    /// Say why a machine is awake or asleep, and who woke it; does not wake it
    #[command(after_help = "Examples:\n  torpor why web")]
    Why(OneMachine),
    /// Print where a machine's services are reached
    #[command(
        after_help = "Examples:\n  curl $(torpor url web)\n  torpor url web 8080\n  torpor url web postgres"
    )]
    Url(Url),
    /// Make a port of a machine reachable
    #[command(after_help = "\
Examples:
  torpor expose web 8080
  torpor expose web 8080 --name app
  torpor expose web 8080 --auth token       # then: torpor grant create web 8080
  torpor expose db 5432 --tcp")]
    Expose(Expose),
    /// Signed URLs of services that ask for a token
    #[command(
        subcommand,
        after_help = "\
Examples:
  torpor grant create web 8080 --for 1h
  torpor grant ls web 8080
  torpor grant revoke web 8080 GRANT"
    )]
    Grant(Grants),
    /// Take a service away again
    #[command(after_help = "Examples:\n  torpor hide web 8080\n  torpor hide web app")]
    Hide(Hide),
    /// Print the serial console of a machine; does not wake it
    #[command(after_help = "Examples:\n  torpor logs web\n  torpor logs -n 4K web")]
    Logs(Logs),
    /// Show or set when a machine falls asleep by itself
    #[command(after_help = "\
Examples:
  torpor lease web                          # show
  torpor lease web 15m                      # asleep 15 minutes from now
  torpor lease web 10m --sliding            # 10 minutes after the last activity
  torpor lease web 1h --on-expiry destroy
  torpor lease web --none                   # awake until told otherwise")]
    Lease(Lease),
    /// Show or set what counts as use of a machine with a sliding lease
    #[command(after_help = "\
Examples:
  torpor activity web                              # show
  torpor activity web --cpu off --outbound off     # only people keep it awake
  torpor activity web --cpu-floor 50               # busy is above half a processor
  torpor activity web --min-awake 2m               # no lease ends sooner after a wake")]
    Activity(Activity),
    /// Show or set how long a machine is kept that is not awake
    #[command(after_help = "\
Examples:
  torpor keep web             # show
  torpor keep web 7d          # deleted after a week in which nothing woke it
  torpor keep web --forever   # until it is deleted")]
    Keep(Keep),
    /// Show or set what may wake a machine
    #[command(after_help = "Examples:\n  torpor wake web\n  torpor wake web --http off --tcp off")]
    Wake(Wake),
    /// Print what happened, to one machine or to all
    #[command(
        after_help = "Examples:\n  torpor events\n  torpor events web -f\n  torpor events --after 120 -o json"
    )]
    Events(Events),
    /// List, import and delete templates
    #[command(
        subcommand,
        after_help = "\
Examples:
  torpor template ls
  skopeo copy docker://docker.io/library/python:3.12-slim oci:py:latest && torpor template import py --name python
  torpor template rm python"
    )]
    Template(Templates),
    /// List the templates of this host
    #[command(after_help = "Examples:\n  torpor templates")]
    Templates,
    /// Ask torpord how it is
    #[command(after_help = "Examples:\n  torpor status")]
    Status,
    /// Enter a machine by SSH; needs OpenSSH's client
    #[command(after_help = "\
Examples:
  torpor ssh web
  torpor ssh web -- df -h
  torpor ssh -L 8888:localhost:8888 -N web

Everybody else: ssh -p 2222 web@HOST, with a registered key or the machine's own (torpor ssh-key).")]
    Ssh(Ssh),
    /// Keys that open machines by SSH
    #[command(
        subcommand,
        name = "ssh-key",
        after_help = "Examples:\n  torpor ssh-key add ~/.ssh/id_ed25519.pub --name laptop\n  torpor ssh-key show web > web.key"
    )]
    SshKeys(SshKeys),
    /// Print what points an SDK at this host, for eval
    #[command(after_help = "\
Examples:
  eval \"$(torpor env morph)\"        # then: python3 my_agent.py, morphcloud instance list
  eval \"$(torpor env nullspace)\"    # then: nullspace doctor

Prints the API key, too: it is read from the file that torpord names, or from --token-file.")]
    Env {
        /// Which SDK
        sdk: Sdk,
    },
    /// Try what this host can do, and say what to do about what it can't
    #[command(after_help = "\
Examples:
  torpor doctor
  torpor doctor --probe kvm        # exit code 0 only if this KVM runs an unmodified kernel
  torpor doctor -o json")]
    Doctor(Doctor),
    /// Print shell completions
    #[command(after_help = "Examples:\n  torpor completions bash > /etc/bash_completion.d/torpor")]
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// One probe of doctor that could hang or be killed, run in a process of its own
    #[command(hide = true)]
    DoctorChild {
        /// Which probe
        probe: String,
    },
}

impl Command {
    /// Exit code when it fails; exec keeps the low ones for the command in the machine.
    pub(crate) fn failure_code(&self) -> u8 {
        match self {
            Self::Exec(_) => 125,
            Self::Ssh(_) => 255,
            _ => 1,
        }
    }
}

/// Pairs as the API takes them; the last of equal keys counts.
pub(crate) fn map_of(pairs: &[(String, String)]) -> BTreeMap<String, String> {
    pairs.iter().cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn every_visible_command_has_examples() {
        for command in Arguments::command()
            .get_subcommands()
            .filter(|command| !command.is_hide_set())
        {
            let help = command
                .get_after_help()
                .map(ToString::to_string)
                .unwrap_or_default();
            assert!(help.contains("Example"), "{} has none", command.get_name());
            assert!(help.contains(&format!("torpor {}", command.get_name())) || command.get_name() == "url");
        }
    }

    #[test]
    fn what_follows_the_machine_is_the_command_even_if_it_looks_like_ours() {
        let parsed = Arguments::parse_from(["torpor", "exec", "-w", "/", "web", "--", "ls", "-o", "json"]);
        let Command::Exec(exec) = parsed.command else {
            panic!("not exec")
        };
        assert_eq!(
            (exec.argv.join(" "), parsed.global.output()),
            ("ls -o json".to_owned(), Format::Table)
        );
    }

    #[test]
    fn lease_options_need_a_lease() {
        assert!(Arguments::try_parse_from(["torpor", "lease", "web", "--sliding"]).is_err());
        assert!(Arguments::try_parse_from(["torpor", "lease", "web", "5m", "--none"]).is_err());
        assert!(Arguments::try_parse_from(["torpor", "create", "--on-expiry", "pause"]).is_err());
    }
}
