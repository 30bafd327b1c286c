//! What `ssh` and `ssh-key` take.

use clap::{Args, Subcommand};
use std::path::PathBuf;

#[derive(Debug, Args)]
pub(crate) struct Ssh {
    /// User in the machine
    #[arg(long, short = 'l', default_value = "root")]
    pub(crate) user: String,
    /// Forward a local port into the machine, as ssh -L does; may be repeated
    #[arg(long = "forward", short = 'L', value_name = "[HOST:]PORT:HOST:PORT")]
    pub(crate) forwards: Vec<String>,
    /// Run nothing, only forward
    #[arg(long, short = 'N', conflicts_with_all = ["command", "tty"])]
    pub(crate) no_command: bool,
    /// Take a terminal even for a command
    #[arg(long, short = 't')]
    pub(crate) tty: bool,
    /// Name, machine ID or execution ID
    pub(crate) machine: String,
    /// A command line; a shell if there is none
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SshKeys {
    /// Print the private key and the password that open one machine
    #[command(after_help = "Examples:\n  torpor ssh-key show web > web.key && chmod 600 web.key")]
    Show {
        /// Name, machine ID or execution ID
        machine: String,
        /// Print the password instead of the key
        #[arg(long)]
        password: bool,
    },
    /// Give a machine another key and password
    #[command(after_help = "Examples:\n  torpor ssh-key rotate web")]
    Rotate {
        /// Name, machine ID or execution ID
        machine: String,
    },
    /// Register a public key that opens every machine
    #[command(after_help = "Examples:\n  torpor ssh-key add ~/.ssh/id_ed25519.pub --name laptop")]
    Add {
        /// File with the public key
        file: PathBuf,
        /// A name for people; the key's comment if not given
        #[arg(long)]
        name: Option<String>,
    },
    /// List the registered keys
    #[command(visible_alias = "list", after_help = "Examples:\n  torpor ssh-key ls")]
    Ls,
    /// Forget a registered key
    #[command(after_help = "Examples:\n  torpor ssh-key rm sshkey_…")]
    Rm {
        /// Its ID
        id: String,
    },
}
