//! From an [`ExecSpec`] to a [`Program`]: defaults, limits, PATH lookup.

use super::ExecError;
use crate::accounts::Account;
use crate::sys::spawn::Program;
use nix::unistd::Uid;
use std::collections::BTreeMap;
use std::ffi::CString;
use std::path::Path;
use torpor_api::guest::ExecSpec;
use torpor_api::limits::MAX_EXEC_BYTES;

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const WORKSPACE: &str = "/workspace";

/// A program and the user that it runs as.
#[derive(Debug)]
pub struct Command {
    /// What to run.
    pub program: Program,
    /// As whom.
    pub account: Account,
}

/// Fill in defaults and check limits.
pub fn prepare(spec: &ExecSpec, open_files: (u64, u64)) -> Result<Command, ExecError> {
    check_limits(spec)?;
    let account = Account::find(spec.user.as_deref().unwrap_or("root"))?;
    let env = environment(spec, &account);
    let path = env.get("PATH").map_or(DEFAULT_PATH, String::as_str);
    let name = spec
        .argv
        .first()
        .map(String::as_str)
        .filter(|name| !name.is_empty());
    let name = name.ok_or_else(|| ExecError::BadSpec("argv is empty".to_owned()))?;
    let candidates = candidates(name, path)
        .map(|c| terminated("argv", c))
        .collect::<Result<_, _>>()?;
    let argv = spec
        .argv
        .iter()
        .map(|arg| terminated("argv", arg.clone()))
        .collect::<Result<_, _>>()?;
    let cwd = terminated("cwd", working_directory(spec, &account)?)?;
    let env = env
        .into_iter()
        .map(|(key, value)| terminated("env", format!("{key}={value}")))
        .collect::<Result<_, _>>()?;
    let credentials = (account.credentials.uid != Uid::effective() || Uid::effective().is_root())
        .then(|| account.credentials.clone());
    Ok(Command {
        program: Program {
            candidates,
            argv,
            env,
            cwd,
            credentials,
            open_files,
        },
        account,
    })
}

fn check_limits(spec: &ExecSpec) -> Result<(), ExecError> {
    let bad = |message: String| Err(ExecError::BadSpec(message));
    let args = spec.argv.iter().map(|arg| arg.len() + 1).sum::<usize>();
    let env = spec
        .env
        .iter()
        .map(|(key, value)| key.len() + value.len() + 2)
        .sum::<usize>();
    if args + env > MAX_EXEC_BYTES {
        return bad(format!(
            "argv and env of {} bytes are over the limit of {MAX_EXEC_BYTES}",
            args + env
        ));
    }
    if let Some(key) = spec.env.keys().find(|key| key.is_empty() || key.contains('=')) {
        return bad(format!("{key:?} is no name of an environment variable"));
    }
    Ok(())
}

fn terminated(what: &str, text: String) -> Result<CString, ExecError> {
    CString::new(text).map_err(|_| ExecError::BadSpec(format!("{what} contains a NUL byte")))
}

fn environment(spec: &ExecSpec, account: &Account) -> BTreeMap<String, String> {
    let term = if spec.tty.is_some() {
        "xterm-256color"
    } else {
        "dumb"
    };
    let defaults = [
        ("PATH", DEFAULT_PATH),
        ("HOME", &account.home),
        ("USER", &account.name),
        ("LOGNAME", &account.name),
        ("SHELL", &account.shell),
        ("LANG", "C.UTF-8"),
        ("TERM", term),
    ];
    let mut env: BTreeMap<_, _> = defaults
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
    env.extend(spec.env.clone());
    env
}

/// The paths that `execvp` would try.
fn candidates(name: &str, path: &str) -> impl Iterator<Item = String> {
    let direct = name.contains('/').then(|| name.to_owned());
    let searched = if direct.is_some() { "" } else { path };
    let searched =
        searched
            .split(':')
            .filter(|_| !name.contains('/'))
            .map(move |directory| match directory {
                "" => format!("./{name}"),
                directory => format!("{directory}/{name}"),
            });
    direct.into_iter().chain(searched.collect::<Vec<_>>())
}

fn working_directory(spec: &ExecSpec, account: &Account) -> Result<String, ExecError> {
    match &spec.cwd {
        Some(cwd) if cwd.starts_with('/') => Ok(cwd.clone()),
        Some(cwd) => Err(ExecError::BadSpec(format!("cwd {cwd:?} is not absolute"))),
        None if Path::new(WORKSPACE).is_dir() => Ok(WORKSPACE.to_owned()),
        None if Path::new(&account.home).is_dir() => Ok(account.home.clone()),
        None => Ok("/".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(argv: &[&str]) -> ExecSpec {
        ExecSpec {
            argv: argv.iter().map(|arg| (*arg).to_owned()).collect(),
            ..ExecSpec::default()
        }
    }

    fn tried(name: &str, path: &str) -> Vec<String> {
        candidates(name, path).collect()
    }

    #[test]
    fn a_name_with_a_slash_is_not_searched_for() {
        assert_eq!(tried("./run", "/bin"), ["./run"]);
        assert_eq!(tried("sh", "/bin::/x"), ["/bin/sh", "./sh", "/x/sh"]);
    }

    #[test]
    fn the_given_environment_wins_over_the_defaults() {
        let mut spec = spec(&["x"]);
        spec.env.insert("PATH".to_owned(), "/only".to_owned());
        let program = prepare(&spec, (1, 1)).unwrap().program;
        assert!(program.env.contains(&CString::new("PATH=/only").unwrap()));
        assert!(program.env.contains(&CString::new("USER=root").unwrap()));
        assert_eq!(program.candidates, [CString::new("/only/x").unwrap()]);
    }

    #[test]
    fn specs_that_contradict_themselves_are_refused() {
        let mut env = spec(&["x"]);
        env.env.insert("A=B".to_owned(), String::new());
        let relative = ExecSpec {
            cwd: Some("tmp".to_owned()),
            ..spec(&["x"])
        };
        let huge = "x".repeat(MAX_EXEC_BYTES);
        for bad in [
            spec(&[]),
            spec(&[""]),
            spec(&["a\0b"]),
            spec(&[&huge]),
            env,
            relative,
        ] {
            assert!(
                matches!(prepare(&bad, (1, 1)), Err(ExecError::BadSpec(_))),
                "{:.80}",
                format!("{bad:?}")
            );
        }
    }
}
