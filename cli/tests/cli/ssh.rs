//! `ssh` against a torpord of canned answers and an ssh that only tells what it was given.

use super::support::{FakeTorpord, stderr, stdout};
use std::os::unix::fs::PermissionsExt;

const GATEWAY: &str = r#"{"host":"127.0.0.1","port":2222,"host_key":"ssh-ed25519 AAAA"}"#;
const KEY: &str =
    r#"{"private_key":"THE KEY\n","public_key":"ssh-ed25519 BBBB","fingerprint":"SHA256:x","password":"pw"}"#;

fn torpord() -> FakeTorpord {
    FakeTorpord::answering(&[
        ("GET /v1/ssh", 200, GATEWAY),
        ("GET /v1/machines/web/ssh-key", 200, KEY),
        ("POST /v1/machines/web/ssh-key", 200, KEY),
    ])
}

#[test]
fn ssh_is_run_with_the_machines_key_and_the_gateways_host_key_and_its_exit_code_is_passed_on() {
    let torpord = torpord();
    let directory = tempfile::tempdir().unwrap();
    let script = r#"#!/bin/sh
echo "$@"
for word in "$@"; do case "$word" in
  IdentityFile=*) stat -c %a "${word#*=}"; cat "${word#*=}";;
  UserKnownHostsFile=*) cat "${word#*=}";;
esac; done
exit 7
"#;
    let ssh = directory.path().join("ssh");
    std::fs::write(&ssh, script).unwrap();
    std::fs::set_permissions(&ssh, std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!(
        "{}:{}",
        directory.path().display(),
        std::env::var("PATH").unwrap()
    );
    let mut command = torpord.command(&["ssh", "-L", "1:localhost:2", "web", "--", "df", "-h"]);
    let output = command.env("PATH", path).output().unwrap();
    let said = stdout(&output);
    assert_eq!(output.status.code(), Some(7), "{}", stderr(&output));
    assert!(
        said.contains("-p 2222 ") && said.contains("-L 1:localhost:2 "),
        "{said}"
    );
    assert!(said.contains("-- root@web@127.0.0.1 df -h\n"), "{said}");
    assert!(said.contains("600\nTHE KEY\n"), "{said}");
    assert!(said.contains("[127.0.0.1]:2222 ssh-ed25519 AAAA\n"), "{said}");
}

#[test]
fn a_machines_key_and_password_are_printed_as_they_are() {
    let torpord = torpord();
    assert_eq!(stdout(&torpord.run(&["ssh-key", "show", "web"])), "THE KEY\n");
    assert_eq!(
        stdout(&torpord.run(&["ssh-key", "show", "web", "--password"])),
        "pw\n"
    );
    assert_eq!(stdout(&torpord.run(&["ssh-key", "rotate", "web"])), "SHA256:x\n");
}
