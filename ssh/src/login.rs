//! What an SSH user name means.
//!
//! | user name | machine | user in the guest | credential |
//! |---|---|---|---|
//! | `web` | `web` | root | a key or password |
//! | `dev@web` | `web` | `dev` | a key or password |
//! | `web:KEY`, `dev@web:KEY` | `web` | root, `dev` | the API key in the name; any key or none |
//!
//! With a certificate the name is the user in the guest, and the certificate names the machine.

use std::fmt;

/// Longest user name in bytes: a machine's name, a user's and an API key.
const MAX_BYTES: usize = 1024;

/// A user name, taken apart.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct LoginName<'a> {
    /// Machine ID, alias or name, as written.
    pub(crate) machine: &'a str,
    /// User in the guest.
    pub(crate) user: Option<&'a str>,
    /// API key.
    pub(crate) api_key: Option<&'a str>,
}

impl<'a> LoginName<'a> {
    /// `None`: nobody has such a name.
    pub(crate) fn parse(text: &'a str) -> Option<Self> {
        if text.len() > MAX_BYTES {
            return None;
        }
        let (name, api_key) = match text.split_once(':') {
            Some((name, key)) => (name, Some(key)),
            None => (text, None),
        };
        let (user, machine) = match name.rsplit_once('@') {
            Some((user, machine)) => (Some(user), machine),
            None => (None, name),
        };
        let is_empty =
            machine.is_empty() || user.is_some_and(str::is_empty) || api_key.is_some_and(str::is_empty);
        (!is_empty).then_some(Self {
            machine,
            user,
            api_key,
        })
    }
}

impl fmt::Debug for LoginName<'_> {
    /// Without the API key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoginName")
            .field("machine", &self.machine)
            .field("user", &self.user)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(text: &str) -> Option<(Option<&str>, &str, Option<&str>)> {
        LoginName::parse(text).map(|name| (name.user, name.machine, name.api_key))
    }

    #[test]
    fn a_name_is_taken_apart_at_the_first_colon_and_the_last_at_before_it() {
        assert_eq!(parts("web"), Some((None, "web", None)));
        assert_eq!(parts("dev@web"), Some((Some("dev"), "web", None)));
        assert_eq!(parts("web:k:e@y"), Some((None, "web", Some("k:e@y"))));
        assert_eq!(parts("a@b@web:k"), Some((Some("a@b"), "web", Some("k"))));
    }

    #[test]
    fn names_with_empty_parts_and_endless_names_are_nobodys() {
        for bad in ["", ":key", "web:", "@web", "dev@", "dev@:k", &"x".repeat(2000)] {
            assert_eq!(parts(bad), None, "{bad:.40}");
        }
    }

    #[test]
    fn an_api_key_is_never_printed() {
        let name = LoginName::parse("web:secret").unwrap();
        assert!(!format!("{name:?}").contains("secret"));
    }
}
