//! The options of each command.

use crate::parse::{self, Publish};
use clap::{Args, Subcommand, ValueEnum};
use std::path::PathBuf;
use std::time::Duration;
use torpor_api::http::{GrantTransport, ServiceAuth};
use torpor_api::{LeaseAction, LeaseMode, LeasePolicy, MachineName};

#[derive(Debug, Args)]
pub(crate) struct OneMachine {
    /// Name, machine ID or execution ID
    pub(crate) machine: String,
}

#[derive(Debug, Args)]
pub(crate) struct Create {
    /// A label of its own: a-z, 0-9 and -, beginning with a letter
    #[arg(long)]
    pub(crate) name: Option<MachineName>,
    /// What to start from
    #[arg(long, default_value = "base")]
    pub(crate) template: String,
    /// Go on from a snapshot, whose shape it has, instead
    #[arg(long, value_name = "SNAPSHOT", conflicts_with_all = ["template", "vcpus", "mem", "disk"])]
    pub(crate) snapshot: Option<String>,
    /// Number of vCPUs
    #[arg(long, default_value_t = 1)]
    pub(crate) vcpus: u8,
    /// Guest memory
    #[arg(long, default_value = "256M", value_name = "SIZE", value_parser = parse::size_mib)]
    pub(crate) mem: u32,
    /// Size of the disk; the template's own if not given
    #[arg(long, value_name = "SIZE", value_parser = parse::size_mib)]
    pub(crate) disk: Option<u32>,
    /// How long it stays awake
    #[arg(long, value_name = "DURATION", value_parser = parse::duration)]
    pub(crate) lease: Option<Duration>,
    #[command(flatten)]
    pub(crate) lease_options: LeaseOptions,
    /// Delete it when it was not awake for so long
    #[arg(long, value_name = "DURATION", value_parser = parse::duration)]
    pub(crate) keep: Option<Duration>,
    /// Make an HTTP port reachable, with a name if given; may be repeated
    #[arg(long, value_name = "PORT[:NAME]", value_parser = parse::publish)]
    pub(crate) publish: Vec<Publish>,
    /// Likewise for a raw TCP port
    #[arg(long, value_name = "PORT[:NAME]", value_parser = parse::publish)]
    pub(crate) publish_tcp: Vec<Publish>,
    /// Traffic that must not wake it
    #[arg(long, value_enum, value_name = "KIND", value_delimiter = ',')]
    pub(crate) no_wake: Vec<Traffic>,
    /// Free key and value; may be repeated
    #[arg(long = "meta", value_name = "KEY=VALUE", value_parser = parse::pair)]
    pub(crate) metadata: Vec<(String, String)>,
    /// Environment variable of its commands; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse::pair)]
    pub(crate) env: Vec<(String, String)>,
    /// Working directory of its commands [template's default: /workspace]
    #[arg(long, value_name = "DIR")]
    pub(crate) cwd: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct LeaseOptions {
    /// What happens when the lease runs out
    #[arg(long, value_enum, value_name = "ACTION", requires = "lease")]
    on_expiry: Option<OnExpiry>,
    /// Activity moves the deadline
    #[arg(long, requires = "lease")]
    sliding: bool,
}

impl LeaseOptions {
    /// The policy for a lease of that length.
    pub(crate) fn policy(&self, length: Duration) -> LeasePolicy {
        LeasePolicy {
            seconds: length.as_secs(),
            action: match self.on_expiry {
                None | Some(OnExpiry::Pause) => LeaseAction::Pause,
                Some(OnExpiry::Destroy) => LeaseAction::Destroy,
            },
            mode: if self.sliding {
                LeaseMode::Sliding
            } else {
                LeaseMode::Absolute
            },
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnExpiry {
    Pause,
    Destroy,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Traffic {
    Http,
    Ssh,
    Tcp,
    Api,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Snapshots {
    /// Take a snapshot of a running or paused machine
    #[command(
        after_help = "Examples:\n  torpor snapshot create web\n  torpor snapshot create web --name before --keep 7d"
    )]
    Create {
        /// Name, machine ID or execution ID
        machine: String,
        /// A label of its own: a-z, 0-9 and -, beginning with a letter
        #[arg(long)]
        name: Option<MachineName>,
        /// What it holds, in your words; a snapshot that has it already is printed instead
        #[arg(long)]
        digest: Option<String>,
        /// Delete it when it was not used for so long
        #[arg(long, value_name = "DURATION", value_parser = parse::duration)]
        keep: Option<Duration>,
        /// Free key and value; may be repeated
        #[arg(long = "meta", value_name = "KEY=VALUE", value_parser = parse::pair)]
        metadata: Vec<(String, String)>,
    },
    /// List the snapshots
    #[command(
        visible_alias = "list",
        after_help = "Examples:\n  torpor snapshot ls\n  torpor snapshot ls web"
    )]
    Ls {
        /// Only those of this machine
        machine: Option<String>,
    },
    /// Delete snapshots; machines that were made from them keep what they have
    #[command(
        visible_alias = "delete",
        after_help = "Examples:\n  torpor snapshot rm before"
    )]
    Rm {
        /// Names or snapshot IDs
        #[arg(required = true)]
        snapshots: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Templates {
    /// List the templates of this host
    #[command(visible_alias = "list", after_help = "Examples:\n  torpor template ls")]
    Ls,
    /// Make a template from a root-file-system tarball, a directory or an image; on the host itself, as root
    #[command(after_help = "\
Examples:
  torpor template import rootfs.tar.gz --name alpine --size 1G
  torpor template import ./image-layout --name app     # as skopeo copy … oci:image-layout writes it
  docker save app:1 -o app.tar && torpor template import app.tar --name app")]
    Import(Import),
    /// Delete templates that no machine and no snapshot needs; on the host itself, as root
    #[command(visible_alias = "delete", after_help = "Examples:\n  torpor template rm app")]
    Rm {
        /// Names
        #[arg(required = true)]
        names: Vec<MachineName>,
        /// Where imported templates are
        #[arg(long, default_value = "/var/lib/torpor/templates", hide_short_help = true)]
        templates_dir: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Import {
    /// Tarball (plain, gzip or zstd), directory, image layout, or what `docker save` wrote
    pub(crate) source: PathBuf,
    /// Name of the template: a-z, 0-9 and -, beginning with a letter
    #[arg(long)]
    pub(crate) name: MachineName,
    /// Size of its disk
    #[arg(long, default_value = "4G", value_name = "SIZE", value_parser = parse::size_mib)]
    pub(crate) size: u32,
    /// Environment variable of its machines' commands, over what an image says; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse::pair)]
    pub(crate) env: Vec<(String, String)>,
    /// Working directory of its machines' commands, instead of what an image says
    #[arg(long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// A shell command line that its machines begin with, instead of what an image says; empty for none
    #[arg(long, value_name = "COMMAND")]
    pub(crate) entrypoint: Option<String>,
    /// What it holds
    #[arg(long, default_value = "")]
    pub(crate) description: String,
    /// Where imported templates are
    #[arg(long, default_value = "/var/lib/torpor/templates", hide_short_help = true)]
    pub(crate) templates_dir: PathBuf,
    /// The template that kernel and agent are taken from
    #[arg(
        long,
        default_value = "/usr/share/torpor/templates/base",
        hide_short_help = true
    )]
    pub(crate) base: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Fork {
    /// Name, machine ID or execution ID
    pub(crate) machine: String,
    /// How many
    #[arg(long, short = 'n', default_value_t = 1)]
    pub(crate) count: u32,
    /// How long each stays awake; as long as the source if not given
    #[arg(long, value_name = "DURATION", value_parser = parse::duration)]
    pub(crate) lease: Option<Duration>,
    #[command(flatten)]
    pub(crate) lease_options: LeaseOptions,
    /// Keep the snapshot that they are made from
    #[arg(long)]
    pub(crate) keep_snapshot: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Resume {
    /// Name, machine ID or execution ID
    pub(crate) machine: String,
    /// Boot from the disk and give up the memory
    #[arg(long)]
    pub(crate) from_disk: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Rm {
    /// A machine that does not exist is no failure
    #[arg(long, short)]
    pub(crate) force: bool,
    /// Names, machine IDs or execution IDs
    #[arg(required = true)]
    pub(crate) machines: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Exec {
    /// Answer with the PID at once and let the command run on
    #[arg(long, short, visible_alias = "background")]
    pub(crate) detach: bool,
    /// Working directory
    #[arg(long, short = 'w', value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// User in the machine
    #[arg(long, short)]
    pub(crate) user: Option<String>,
    /// Set an environment variable; may be repeated
    #[arg(long, short, value_name = "KEY=VALUE", value_parser = parse::pair)]
    pub(crate) env: Vec<(String, String)>,
    /// Kill the command after so long [never; 30s with --json]
    #[arg(long, value_name = "DURATION", value_parser = parse::duration)]
    pub(crate) timeout: Option<Duration>,
    /// Read standard input and pass it on; a pipe or a file is passed on anyway
    #[arg(long = "stdin", short = 'i')]
    pub(crate) with_stdin: bool,
    /// Run it under a terminal, and pass keys on as they are
    #[arg(long, short = 't', conflicts_with_all = ["detach", "json"])]
    pub(crate) tty: bool,
    /// Do not pass standard input on, even if it is a pipe or a file
    #[arg(long, short = 'n', conflicts_with_all = ["with_stdin", "tty"])]
    pub(crate) no_stdin: bool,
    /// Name, machine ID or execution ID
    pub(crate) machine: String,
    /// Program and arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) argv: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Url {
    /// Name, machine ID or execution ID
    pub(crate) machine: String,
    /// Port or name of one service
    pub(crate) service: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Expose {
    /// Name, machine ID or execution ID
    pub(crate) machine: String,
    /// Port in the machine
    #[arg(value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) port: u16,
    /// Name of the service
    #[arg(long)]
    pub(crate) name: Option<MachineName>,
    /// Raw TCP instead of HTTP
    #[arg(long)]
    pub(crate) tcp: bool,
    /// What a request must show: nothing, the API's bearer token, or the token of a signed URL
    #[arg(long, value_enum, default_value_t = Auth::None, conflicts_with = "tcp")]
    pub(crate) auth: Auth,
    /// Longest wait of a request for a wake; the host's own if not given
    #[arg(long, value_name = "DURATION", value_parser = parse::duration)]
    pub(crate) wake_deadline: Option<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Auth {
    None,
    ApiKey,
    Token,
}

impl From<Auth> for ServiceAuth {
    fn from(auth: Auth) -> Self {
        match auth {
            Auth::None => Self::None,
            Auth::ApiKey => Self::ApiKey,
            Auth::Token => Self::Token,
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Grants {
    /// Make a signed URL of a service, and print it
    #[command(
        after_help = "Examples:\n  torpor grant create web 8080\n  torpor grant create web app --for 10m --transport websocket"
    )]
    Create {
        /// Name, machine ID or execution ID
        machine: String,
        /// Port or name of the service
        service: String,
        /// How long it is good, from 1m to 1d [1h]
        #[arg(long = "for", value_name = "DURATION", value_parser = parse::duration)]
        expires: Option<Duration>,
        /// What it is good for
        #[arg(long, value_enum, default_value_t = Transport::Any)]
        transport: Transport,
    },
    /// List the grants of a service and how they were used
    #[command(visible_alias = "list", after_help = "Examples:\n  torpor grant ls web 8080")]
    Ls {
        /// Name, machine ID or execution ID
        machine: String,
        /// Port or name of the service
        service: String,
    },
    /// Take signed URLs back
    #[command(after_help = "Examples:\n  torpor grant revoke web 8080 GRANT")]
    Revoke {
        /// Name, machine ID or execution ID
        machine: String,
        /// Port or name of the service
        service: String,
        /// IDs of grants
        #[arg(required = true)]
        grants: Vec<String>,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Transport {
    Any,
    Http,
    Websocket,
}

impl From<Transport> for GrantTransport {
    fn from(transport: Transport) -> Self {
        match transport {
            Transport::Any => Self::Any,
            Transport::Http => Self::Http,
            Transport::Websocket => Self::Websocket,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct Hide {
    /// Name, machine ID or execution ID
    pub(crate) machine: String,
    /// Port or name of the service
    pub(crate) service: String,
}

#[derive(Debug, Args)]
pub(crate) struct Logs {
    /// Print only so many bytes from the end
    #[arg(long, short = 'n', value_name = "SIZE", value_parser = parse::size_bytes)]
    pub(crate) bytes: Option<u64>,
    /// Name, machine ID or execution ID
    pub(crate) machine: String,
}

#[derive(Debug, Args)]
pub(crate) struct Lease {
    /// Name, machine ID or execution ID
    pub(crate) machine: String,
    /// Length, counted from now
    #[arg(value_name = "DURATION", value_parser = parse::duration)]
    pub(crate) lease: Option<Duration>,
    #[command(flatten)]
    pub(crate) options: LeaseOptions,
    /// Take the lease away
    #[arg(long, conflicts_with = "lease")]
    pub(crate) none: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Activity {
    /// Name, machine ID or execution ID
    pub(crate) machine: String,
    /// Requests and payload through the proxy
    #[arg(long, value_enum)]
    pub(crate) proxy: Option<Switch>,
    /// Calls of the API, commands and SSH sessions
    #[arg(long, value_enum)]
    pub(crate) sessions: Option<Switch>,
    /// What the machine itself exchanges with the world outside
    #[arg(long, value_enum)]
    pub(crate) outbound: Option<Switch>,
    /// Busy processors
    #[arg(long, value_enum)]
    pub(crate) cpu: Option<Switch>,
    /// Holds that code inside takes (torpor-guest hold)
    #[arg(long, value_enum)]
    pub(crate) hold: Option<Switch>,
    /// Share of one processor above which it counts as busy
    #[arg(long, value_name = "PERCENT")]
    pub(crate) cpu_floor: Option<u16>,
    /// No lease ends sooner after a start or a wake; 0 for none
    #[arg(long, value_name = "DURATION", value_parser = parse::duration_or_zero)]
    pub(crate) min_awake: Option<Duration>,
}

#[derive(Debug, Args)]
pub(crate) struct Keep {
    /// Name, machine ID or execution ID
    pub(crate) machine: String,
    /// Delete it when it was not awake for so long; counted from now if it is asleep
    #[arg(value_name = "DURATION", value_parser = parse::duration)]
    pub(crate) keep: Option<Duration>,
    /// Keep it until it is deleted
    #[arg(long, conflicts_with = "keep")]
    pub(crate) forever: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Wake {
    /// Name, machine ID or execution ID
    pub(crate) machine: String,
    /// Requests that never wake it: a JSON file {"rules": [...]}, - for standard input
    #[arg(long, value_name = "FILE", conflicts_with_all = ["http", "ssh", "tcp", "api"])]
    pub(crate) filter: Option<PathBuf>,
    /// HTTP and WebSocket requests
    #[arg(long, value_enum)]
    pub(crate) http: Option<Switch>,
    /// SSH logins
    #[arg(long, value_enum)]
    pub(crate) ssh: Option<Switch>,
    /// Raw TCP connections
    #[arg(long, value_enum)]
    pub(crate) tcp: Option<Switch>,
    /// Exec, files and other calls that need the machine
    #[arg(long, value_enum)]
    pub(crate) api: Option<Switch>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    On,
    Off,
}

#[derive(Debug, Args)]
pub(crate) struct Kill {
    /// Name, machine ID or execution ID
    pub(crate) machine: String,
    /// PID in the machine
    pub(crate) pid: u32,
    /// Number of the signal
    #[arg(long, short, default_value_t = 9)]
    pub(crate) signal: i32,
}

#[derive(Debug, Args)]
pub(crate) struct Cp {
    /// A file here, or MACHINE:/PATH
    pub(crate) from: String,
    /// MACHINE:/PATH, or a file or directory here
    pub(crate) to: String,
}

#[derive(Debug, Args)]
pub(crate) struct Events {
    /// Only this machine's
    pub(crate) machine: Option<String>,
    /// Go on as more happens
    #[arg(long, short)]
    pub(crate) follow: bool,
    /// Begin after this offset
    #[arg(long, default_value_t = 0)]
    pub(crate) after: u64,
}

#[derive(Debug, Args)]
pub(crate) struct Doctor {
    /// What to try
    #[arg(long, value_enum, default_value_t = Probe::All)]
    pub(crate) probe: Probe,
    /// Directory whose disk is tried
    #[arg(long, default_value = "/var/lib/torpor")]
    pub(crate) state_dir: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Probe {
    All,
    Kvm,
    Uffd,
    Tap,
    Nft,
    Cgroup,
    Disk,
    Kernel,
    Torpord,
}
