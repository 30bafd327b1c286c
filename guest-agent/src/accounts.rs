//! Users and groups, read from `/etc/passwd` and `/etc/group` themselves: the agent is static, and
//! libc's lookups would load shared NSS modules.

use crate::sys::spawn::Credentials;
use nix::unistd::{Gid, Uid};
use std::collections::HashMap;
use std::io;
use std::path::Path;

/// Why a user is not known.
#[derive(Debug, thiserror::Error)]
pub enum AccountError {
    /// No such line.
    #[error("no user {0:?} in /etc/passwd")]
    Unknown(String),
    /// The file can't be read.
    #[error("cannot read {path}")]
    Read {
        /// File.
        path: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A user of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    /// Login name.
    pub name: String,
    /// Home directory.
    pub home: String,
    /// Login shell.
    pub shell: String,
    /// IDs, with supplementary groups.
    pub credentials: Credentials,
}

impl Account {
    /// Look a user up by name or, failing that, by numeric ID.
    pub fn find(name: &str) -> Result<Self, AccountError> {
        let passwd = read("/etc/passwd")?;
        let groups = read("/etc/group")?;
        parse(&passwd, &groups, name).ok_or_else(|| AccountError::Unknown(name.to_owned()))
    }
}

/// A file that is not there is an empty one: minimal images have neither.
fn read(path: &'static str) -> Result<String, AccountError> {
    match std::fs::read(Path::new(path)) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(source) => Err(AccountError::Read { path, source }),
    }
}

fn parse(passwd: &str, groups: &str, name: &str) -> Option<Account> {
    let entries = || passwd.lines().filter_map(parse_user);
    let by_id = || name.parse::<u32>().ok().map(Uid::from_raw);
    let mut account = entries()
        .find(|account| account.name == name)
        .or_else(|| by_id().and_then(|uid| entries().find(|account| account.credentials.uid == uid)))
        .or_else(|| (name == "root" || name == "0").then(superuser))?;
    account.credentials.groups = groups_of(groups, &account);
    Some(account)
}

/// Root exists even where no file says so.
fn superuser() -> Account {
    Account {
        name: "root".to_owned(),
        home: "/root".to_owned(),
        shell: "/bin/sh".to_owned(),
        credentials: Credentials {
            uid: Uid::from_raw(0),
            gid: Gid::from_raw(0),
            groups: Vec::new(),
        },
    }
}

fn parse_user(line: &str) -> Option<Account> {
    let mut fields = line.split(':');
    let name = fields.next().filter(|name| !name.is_empty())?.to_owned();
    let uid = Uid::from_raw(fields.nth(1)?.parse().ok()?);
    let gid = Gid::from_raw(fields.next()?.parse().ok()?);
    let home = fields
        .nth(1)
        .filter(|home| home.starts_with('/'))
        .unwrap_or("/")
        .to_owned();
    let shell = fields
        .next()
        .filter(|shell| !shell.is_empty())
        .unwrap_or("/bin/sh")
        .to_owned();
    Some(Account {
        name,
        home,
        shell,
        credentials: Credentials {
            uid,
            gid,
            groups: Vec::new(),
        },
    })
}

/// The primary group and every group that lists the user, each once.
fn groups_of(groups: &str, account: &Account) -> Vec<Gid> {
    let mut found = vec![account.credentials.gid];
    for line in groups.lines() {
        let mut fields = line.split(':');
        let gid = fields.nth(2).and_then(|gid| gid.parse().ok()).map(Gid::from_raw);
        let is_member = fields
            .next()
            .is_some_and(|members| members.split(',').any(|m| m == account.name));
        if let Some(gid) = gid
            && is_member
            && !found.contains(&gid)
        {
            found.push(gid);
        }
    }
    found
}

/// Names of user and group IDs, as they are at one moment.
#[derive(Debug, Default)]
pub struct Names {
    users: HashMap<u32, String>,
    groups: HashMap<u32, String>,
}

impl Names {
    /// Read them. What can't be read names nobody.
    pub fn read() -> Self {
        Self {
            users: names_by_id(&read("/etc/passwd").unwrap_or_default()),
            groups: names_by_id(&read("/etc/group").unwrap_or_default()),
        }
    }

    /// Name of a user ID.
    pub fn user(&self, uid: u32) -> Option<String> {
        self.users.get(&uid).cloned()
    }

    /// Name of a group ID.
    pub fn group(&self, gid: u32) -> Option<String> {
        self.groups.get(&gid).cloned()
    }
}

/// Both files have the name first and its ID third; the first line of an ID counts.
fn names_by_id(text: &str) -> HashMap<u32, String> {
    let mut names = HashMap::new();
    for line in text.lines() {
        let mut fields = line.split(':');
        if let Some(name) = fields.next().filter(|name| !name.is_empty())
            && let Some(id) = fields.nth(1).and_then(|id| id.parse().ok())
        {
            names.entry(id).or_insert_with(|| name.to_owned());
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\nbroken\nnoid:x:abc:1::/:/bin/sh\n\
        dev:x:1000:1000:Dev,,,:/home/dev:\n:x:5:5::/:\n7:x:70:70::relative:/bin/sh";
    const GROUP: &str = "root:x:0:\ndocker:x:998:dev,root\nbad\ndev:x:1000:dev\nwheel:x:10:devel,dev\n";

    #[test]
    fn a_user_gets_its_primary_and_every_listed_group_once() {
        let dev = parse(PASSWD, GROUP, "dev").unwrap();
        assert_eq!(dev.home, "/home/dev");
        assert_eq!(dev.shell, "/bin/sh");
        assert_eq!(dev.credentials.groups, [1000, 998, 10].map(Gid::from_raw));
    }

    #[test]
    fn a_name_wins_over_the_same_number_and_a_number_finds_a_user() {
        assert_eq!(
            parse(PASSWD, GROUP, "7").unwrap().credentials.uid,
            Uid::from_raw(70)
        );
        assert_eq!(parse(PASSWD, GROUP, "7").unwrap().home, "/");
        assert_eq!(parse(PASSWD, GROUP, "1000").unwrap().name, "dev");
    }

    #[test]
    fn broken_lines_name_nobody() {
        for name in ["broken", "noid", "", "nobody"] {
            assert_eq!(parse(PASSWD, GROUP, name), None, "{name:?}");
        }
    }

    #[test]
    fn ids_have_the_name_of_their_first_line() {
        let names = names_by_id("root:x:0:0::/:\ntoor:x:0:0::/:\n:x:5:\nbad:x:y:\ndev:x:1000:\n");
        assert_eq!(names.get(&0).map(String::as_str), Some("root"));
        assert_eq!((names.len(), names.contains_key(&1000)), (2, true));
    }

    #[test]
    fn root_needs_no_file() {
        assert_eq!(parse("", "", "root").unwrap().credentials.uid, Uid::from_raw(0));
    }
}
