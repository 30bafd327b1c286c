//! One machine as a login sees it: processes, forwarded connections, files; all over [`crate::inside`], so that
//! what lasts outlives pauses.

mod files;
mod process;

use super::refusal;
use crate::inside::Inside;
use crate::inside::processes::Command;
use crate::machine::fleet::Fleet;
use crate::machine::fleet::WakeSource;
use async_trait::async_trait;
use files::GuestFiles;
use process::Hangup;
use std::sync::Arc;
use torpor_ssh::{Files, Guest, Login, Process, ProcessOrder, Program, Refusal, Stream};

/// Like a login does: at home, and with the user's own shell, which the guest agent puts into `SHELL`.
const AT_HOME: &str = "cd 2>/dev/null || cd /; ";

/// A machine that somebody is logged in to.
pub(super) struct LoggedIn {
    fleet: Fleet,
    inside: Inside,
    login: Login,
}

impl LoggedIn {
    pub(super) fn new(fleet: &Fleet, login: &Login) -> Self {
        Self {
            fleet: fleet.clone(),
            inside: fleet.inside(login.machine.clone(), WakeSource::Ssh),
            login: login.clone(),
        }
    }

    fn command(&self, order: ProcessOrder) -> Command {
        let mut argv = vec!["/bin/sh".to_owned(), "-c".to_owned()];
        match order.program {
            Program::Shell => argv.push(format!("{AT_HOME}exec \"${{SHELL:-/bin/sh}}\" -l")),
            Program::CommandLine(line) => {
                argv.push(format!("{AT_HOME}exec \"${{SHELL:-/bin/sh}}\" -c \"$1\""));
                argv.extend(["sh".to_owned(), line]);
            }
        }
        let mut env: std::collections::BTreeMap<_, _> = order.env.into_iter().collect();
        let client = self.login.client;
        env.insert(
            "SSH_CLIENT".to_owned(),
            format!("{} {} 22", client.ip(), client.port()),
        );
        if let Some(terminal) = &order.terminal
            && !terminal.term.is_empty()
            && !terminal.term.contains('\0')
        {
            env.insert("TERM".to_owned(), terminal.term.clone());
        }
        Command {
            argv,
            env,
            user: Some(self.login.user.clone()),
            stdin: true,
            tty: order.terminal.map(|terminal| terminal.size),
            // However long it waits for somebody, it is no work.
            idle: true,
            ..Command::default()
        }
    }
}

#[async_trait]
impl Guest for LoggedIn {
    async fn start(&self, order: ProcessOrder) -> Result<Process, Refusal> {
        let session = self.inside.open(self.command(order)).await.map_err(refusal)?;
        let hangup = Hangup::new(&self.fleet, &self.login.machine, &session);
        Ok(process::halves(session, hangup))
    }

    async fn connect(&self, host: &str, port: u16) -> Result<Box<dyn Stream>, Refusal> {
        let stream = self.inside.connect(host, port).await.map_err(refusal)?;
        Ok(Box::new(stream))
    }

    async fn files(&self) -> Result<Arc<dyn Files>, Refusal> {
        Ok(Arc::new(GuestFiles::new(
            self.inside.clone(),
            self.login.user.clone(),
        )))
    }
}
