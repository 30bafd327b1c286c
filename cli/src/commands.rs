//! One function per command; each ends in an exit code.

mod copy;
mod doctor;
mod env;
mod events;
mod exec;
mod grants;
mod host;
mod inside;
mod machines;
mod policy;
mod services;
mod snapshots;
mod ssh;
mod templates;

use crate::args::{Arguments, Command, Format};
use crate::client::{CallError, Client, segment};
use crate::output;
use bytes::Bytes;
use clap::CommandFactory;
use http::Method;
use torpor_api::http::Machine;

/// What every command needs.
struct Context {
    client: Client,
    format: Format,
}

impl Context {
    async fn machine(&self, name: &str) -> Result<Machine, CallError> {
        let body = self.client.call(Method::GET, &path(name)).await?;
        self.client.read(&body)
    }

    /// Prints the API's own answer, or what `text` makes of it.
    fn show<F>(&self, body: &Bytes, text: F) -> anyhow::Result<()>
    where
        F: FnOnce() -> Result<String, CallError>,
    {
        match self.format {
            Format::Json => output::print_json(body),
            Format::Table => output::print(text()?.as_bytes()),
        }
    }
}

/// Path of a machine that the user named.
fn path(machine: &str) -> String {
    format!("/v1/machines/{}", segment(machine))
}

/// Runs a command and answers with its exit code.
pub(crate) async fn run(arguments: Arguments) -> anyhow::Result<u8> {
    let Arguments { global, command } = arguments;
    match &command {
        Command::Completions { shell } => return completions(*shell),
        Command::DoctorChild { probe } => return Ok(doctor::child(probe)),
        Command::Doctor(doctor) => return doctor::run(&global, doctor).await,
        _ => {}
    }
    let context = Context {
        client: Client::new(&global)?,
        format: global.output(),
    };
    match command {
        Command::Create(create) => machines::create(&context, create).await,
        Command::Ls => machines::list(&context).await,
        Command::Get(one) => machines::get(&context, &one.machine).await,
        Command::Pause(one) => machines::pause(&context, &one.machine).await,
        Command::Resume(resume) => machines::resume(&context, &resume).await,
        Command::Rm(rm) => machines::remove(&context, &rm).await,
        Command::Snapshot(snapshots) => snapshots::run(&context, snapshots).await,
        Command::Fork(fork) => snapshots::fork(&context, &fork).await,
        Command::Exec(exec) => exec::run(&context, exec).await,
        Command::Ps(one) => inside::ps(&context, &one.machine).await,
        Command::Kill(kill) => inside::kill(&context, &kill).await,
        Command::Cp(cp) => copy::cp(&context, &cp).await,
        Command::Why(one) => inside::why(&context, &one.machine).await,
        Command::Url(url) => services::url(&context, &url).await,
        Command::Expose(expose) => services::expose(&context, expose).await,
        Command::Grant(grants) => grants::run(&context, grants).await,
        Command::Hide(hide) => services::hide(&context, &hide).await,
        Command::Logs(logs) => host::logs(&context, &logs).await,
        Command::Lease(lease) => policy::lease(&context, &lease).await,
        Command::Activity(activity) => policy::activity(&context, &activity).await,
        Command::Keep(keep) => policy::keep(&context, &keep).await,
        Command::Wake(wake) => policy::wake(&context, &wake).await,
        Command::Events(events) => events::run(&context, &events).await,
        Command::Env { sdk } => env::run(&context, &global, sdk).await,
        Command::Ssh(ssh) => ssh::connect(&context, ssh).await,
        Command::SshKeys(keys) => ssh::keys(&context, keys).await,
        Command::Template(command) => templates::run(&context, command).await,
        Command::Templates => host::templates(&context).await,
        Command::Status => host::status(&context).await,
        // Answered above, since they need no torpord.
        Command::Doctor(_) | Command::Completions { .. } | Command::DoctorChild { .. } => Ok(0),
    }
}

fn completions(shell: clap_complete::Shell) -> anyhow::Result<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "torpor", &mut script);
    output::print(&script)?;
    Ok(0)
}
