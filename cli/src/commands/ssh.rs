//! `ssh`: OpenSSH with the right address, key and host key; `ssh-key`: who may enter.

use super::{Context, path};
use crate::args::{Ssh, SshKeys};
use crate::client::segment;
use crate::output;
use anyhow::Context as _;
use http::Method;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use torpor_api::http::{MachineSshKey, NewSshKey, SshGateway, SshKey, SshKeyList};

/// Runs ssh until it ends; the exit code is its own, 255 if it could not connect.
pub(super) async fn connect(context: &Context, asked: Ssh) -> anyhow::Result<u8> {
    let gateway = context.client.call(Method::GET, "/v1/ssh").await?;
    let gateway: SshGateway = context.client.read(&gateway)?;
    let key: MachineSshKey = machine_key(context, Method::GET, &asked.machine).await?;
    // Readable for its owner alone, and gone with this command.
    let directory = tempfile::tempdir().context("cannot make a directory for the key")?;
    let (key_file, hosts_file) = (directory.path().join("key"), directory.path().join("known_hosts"));
    write_private(&key_file, &key.private_key)?;
    write_private(&hosts_file, &known_hosts_line(&gateway))?;
    let mut ssh = Command::new("ssh");
    ssh.args(options(&asked, &gateway, &key_file, &hosts_file));
    let status = tokio::task::spawn_blocking(move || ssh.status())
        .await?
        .context("cannot run ssh: install the package openssh-client")?;
    Ok(status
        .code()
        .and_then(|code| u8::try_from(code).ok())
        .unwrap_or(255))
}

fn known_hosts_line(gateway: &SshGateway) -> String {
    format!("[{}]:{} {}\n", gateway.host, gateway.port, gateway.host_key)
}

fn options(asked: &Ssh, gateway: &SshGateway, key: &Path, hosts: &Path) -> Vec<String> {
    let mut words = vec!["-p".to_owned(), gateway.port.to_string()];
    for option in [
        format!("IdentityFile={}", key.display()),
        "IdentitiesOnly=yes".to_owned(),
        format!("UserKnownHostsFile={}", hosts.display()),
        "StrictHostKeyChecking=yes".to_owned(),
        // The name of the host is that of every machine, so nothing of the user's settings for it fits.
        "PreferredAuthentications=publickey".to_owned(),
        "LogLevel=ERROR".to_owned(),
    ] {
        words.extend(["-o".to_owned(), option]);
    }
    for forward in &asked.forwards {
        words.extend(["-L".to_owned(), forward.clone()]);
    }
    if asked.no_command {
        words.push("-N".to_owned());
    }
    if asked.tty {
        words.push("-t".to_owned());
    }
    words.push("--".to_owned());
    words.push(format!("{}@{}@{}", asked.user, asked.machine, gateway.host));
    words.extend(asked.command.iter().cloned());
    words
}

fn write_private(path: &Path, text: &str) -> anyhow::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let file = std::fs::File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("cannot write {}", path.display()))
}

async fn machine_key(context: &Context, method: Method, machine: &str) -> anyhow::Result<MachineSshKey> {
    let answer = context
        .client
        .call(method, &format!("{}/ssh-key", path(machine)))
        .await?;
    Ok(context.client.read(&answer)?)
}

/// Shows, makes and registers keys.
pub(super) async fn keys(context: &Context, asked: SshKeys) -> anyhow::Result<u8> {
    match asked {
        SshKeys::Show { machine, password } => {
            let at = format!("{}/ssh-key", path(&machine));
            let answer = context.client.call(Method::GET, &at).await?;
            context.show(&answer, || {
                let key: MachineSshKey = context.client.read(&answer)?;
                Ok(if password {
                    format!("{}\n", key.password)
                } else {
                    key.private_key
                })
            })?;
        }
        SshKeys::Rotate { machine } => {
            let at = format!("{}/ssh-key", path(&machine));
            let answer = context.client.call(Method::POST, &at).await?;
            context.show(&answer, || {
                let key: MachineSshKey = context.client.read(&answer)?;
                Ok(format!("{}\n", key.fingerprint))
            })?;
        }
        SshKeys::Add { file, name } => {
            let public_key =
                std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
            let body = NewSshKey { name, public_key };
            let answer = context
                .client
                .call_with(Method::POST, "/v1/ssh-keys", &body)
                .await?;
            context.show(&answer, || {
                let key: SshKey = context.client.read(&answer)?;
                Ok(format!("{}\n", key.id))
            })?;
        }
        SshKeys::Ls => {
            let answer = context.client.call(Method::GET, "/v1/ssh-keys").await?;
            context.show(&answer, || {
                let list: SshKeyList = context.client.read(&answer)?;
                Ok(list.ssh_keys.iter().map(line).collect())
            })?;
        }
        SshKeys::Rm { id } => {
            let at = format!("/v1/ssh-keys/{}", segment(&id));
            context.client.call(Method::DELETE, &at).await?;
            output::print_line(&format!("{id} removed"))?;
        }
    }
    Ok(0)
}

fn line(key: &SshKey) -> String {
    format!("{}  {}  {}\n", key.id, key.fingerprint, key.name)
}
