//! Torpor's SSH gateway: one listener for all machines, with no sshd in any of them.
//!
//! It knows no machine. Whom it may let in, and what runs where, it asks of a [`Backend`]. It answers the banner
//! and the login at once, and holds the channel while the machine wakes.
//!
//! | module | owns |
//! |---|---|
//! | `gateway` | [`Gateway`]: the listener, bounds on connections, shutdown |
//! | `connection` | one client: login, and which channels it opens |
//! | `login` | what a user name means |
//! | `limiter` | how often somebody may guess |
//! | `session` | one session channel: a command, a shell, or the files |
//! | `sftp` | the SFTP protocol over [`Files`] |
//! | `forward` | one forwarded TCP connection |
//! | `backend` | the [`Backend`] trait and what passes through it |
//! | `keys` | key files and key pairs |
//! | `authority` | [`Authority`]: short-lived user certificates |

#![forbid(unsafe_code)]

mod authority;
mod backend;
mod connection;
mod forward;
mod gateway;
mod keys;
mod limiter;
mod login;
mod session;
mod sftp;

pub use authority::{Authority, CertificateError, CertificateOrder, Claims};
pub use backend::{
    Attributes, Backend, Credential, Denied, DirectoryEntry, FileError, FileKind, Files, Guest, Login,
    LoginAttempt, NewAttributes, OpenOrder, Place, Process, ProcessEvent, ProcessInput, ProcessOrder,
    ProcessOutput, Program, Refusal, Stream, Terminal,
};
pub use gateway::{Gateway, GatewayConfig, GatewayError};
pub use keys::{KeyError, KeyPair, PublicKeyText, load_or_create_key};
pub use russh::keys::ssh_key::PrivateKey;
