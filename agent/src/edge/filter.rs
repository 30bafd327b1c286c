//! Wake filters: which requests never wake a machine. A copy of what the store has, so that a wake needs no query.

use crate::store::{Store, StoreError};
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock};
use tokio::sync::OnceCell;
use torpor_api::MachineId;
use torpor_api::http::{WakeAnswer, WakeFilter, WakeRule};

/// Most rules of one machine.
const MAX_RULES: usize = 64;
/// Longest text of a rule, and largest body of an answer, in bytes.
const MAX_TEXT_BYTES: usize = 256;
const MAX_BODY_BYTES: usize = 4096;

/// What a filter is asked about.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// Path without the query.
    pub path: &'a str,
    /// HTTP method.
    pub method: &'a str,
    /// `User-Agent`, empty without one.
    pub user_agent: &'a str,
    /// The client's address.
    pub source: IpAddr,
    /// Port in the guest.
    pub port: u16,
}

/// The filters of all machines.
#[derive(Default)]
pub struct Filters(OnceCell<RwLock<HashMap<MachineId, Arc<WakeFilter>>>>);

impl Filters {
    /// What a request to this machine is answered if it sleeps, unless the request may wake it.
    ///
    /// # Errors
    /// The store refuses.
    pub async fn answer(
        &self,
        store: &Store,
        machine: &MachineId,
        asked: Asked<'_>,
    ) -> Result<Option<WakeAnswer>, StoreError> {
        let filter = self.of(store, machine).await?;
        let found = filter
            .as_ref()
            .and_then(|filter| filter.rules.iter().find(|rule| matches(rule, asked)));
        Ok(found.map(|rule| rule.answer.clone()))
    }

    /// The machine's filter.
    ///
    /// # Errors
    /// The store refuses.
    pub async fn of(
        &self,
        store: &Store,
        machine: &MachineId,
    ) -> Result<Option<Arc<WakeFilter>>, StoreError> {
        let known = self.known(store).await?;
        Ok(known
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(machine)
            .cloned())
    }

    /// The store has this one now.
    ///
    /// # Errors
    /// The store refuses.
    pub async fn changed(
        &self,
        store: &Store,
        machine: &MachineId,
        filter: WakeFilter,
    ) -> Result<(), StoreError> {
        let known = self.known(store).await?;
        let mut known = known.write().unwrap_or_else(PoisonError::into_inner);
        if filter.rules.is_empty() {
            known.remove(machine);
        } else {
            known.insert(machine.clone(), Arc::new(filter));
        }
        Ok(())
    }

    async fn known(&self, store: &Store) -> Result<&RwLock<HashMap<MachineId, Arc<WakeFilter>>>, StoreError> {
        self.0
            .get_or_try_init(|| async {
                let filters = store.wake_filters().await?.into_iter();
                Ok(RwLock::new(
                    filters.map(|(id, filter)| (id, Arc::new(filter))).collect(),
                ))
            })
            .await
    }
}

/// Why a filter makes no sense; `None` if it does.
#[must_use]
pub fn flaw(filter: &WakeFilter) -> Option<String> {
    if filter.rules.len() > MAX_RULES {
        return Some(format!("a wake filter has at most {MAX_RULES} rules"));
    }
    filter.rules.iter().enumerate().find_map(|(n, rule)| {
        let texts = [&rule.path, &rule.user_agent].into_iter().flatten();
        let mut texts = texts.chain(&rule.methods).chain(&rule.sources);
        let named = rule.path.is_some()
            || rule.user_agent.is_some()
            || !rule.methods.is_empty()
            || !rule.sources.is_empty();
        let reason = if !named {
            "names no path, method, user agent or source"
        } else if texts.any(|text| text.is_empty() || text.len() > MAX_TEXT_BYTES) {
            "has a text that is empty or too long"
        } else if rule.methods.len() > 16 || rule.sources.len() > 64 {
            "names too many methods or sources"
        } else if rule.sources.iter().any(|source| network(source).is_none()) {
            "names a source that is no network such as 10.0.0.0/8"
        } else if !(200..=599).contains(&rule.answer.status) {
            "answers with a status that is not 200 to 599"
        } else if rule.answer.body.len() > MAX_BODY_BYTES {
            "answers with a body of more than 4096 bytes"
        } else if http::HeaderValue::from_str(&rule.answer.content_type).is_err() {
            "answers with a content type that is none"
        } else {
            return None;
        };
        Some(format!("rule {} {reason}", n + 1))
    })
}

fn matches(rule: &WakeRule, asked: Asked<'_>) -> bool {
    let path = rule.path.as_deref().is_none_or(|pattern| {
        if pattern.contains('*') {
            glob(pattern, asked.path)
        } else {
            asked.path.starts_with(pattern)
        }
    });
    let agent = rule.user_agent.as_deref().is_none_or(|pattern| {
        let (pattern, agent) = (
            pattern.to_ascii_lowercase(),
            asked.user_agent.to_ascii_lowercase(),
        );
        if pattern.contains('*') {
            glob(&pattern, &agent)
        } else {
            agent.contains(&pattern)
        }
    });
    let method = rule.methods.is_empty()
        || rule
            .methods
            .iter()
            .any(|method| method.eq_ignore_ascii_case(asked.method));
    let source = rule.sources.is_empty()
        || rule
            .sources
            .iter()
            .filter_map(|text| network(text))
            .any(|network| contains(network, asked.source));
    path && agent && method && source && rule.port.is_none_or(|port| port == asked.port)
}

/// Whether `*`, which stands for any text, can make the pattern the text. Takes time in proportion to both.
fn glob(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else {
        return false;
    };
    let mut parts: Vec<&str> = parts.collect();
    let Some(last) = parts.pop() else {
        return rest.is_empty();
    };
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

fn network(text: &str) -> Option<(IpAddr, u8)> {
    let (address, len) = match text.split_once('/') {
        Some((address, len)) => (address.parse().ok()?, Some(len.parse::<u8>().ok()?)),
        None => (text.parse::<IpAddr>().ok()?, None),
    };
    let most = if address.is_ipv4() { 32 } else { 128 };
    let len = len.unwrap_or(most);
    (len <= most).then_some((address, len))
}

fn contains((network, len): (IpAddr, u8), address: IpAddr) -> bool {
    match (network, address.to_canonical()) {
        (IpAddr::V4(network), IpAddr::V4(address)) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(len)).unwrap_or(0);
            u32::from(network) & mask == u32::from(address) & mask
        }
        (IpAddr::V6(network), IpAddr::V6(address)) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(len)).unwrap_or(0);
            u128::from(network) & mask == u128::from(address) & mask
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked<'a>(path: &'a str, user_agent: &'a str, source: &str) -> Asked<'a> {
        Asked {
            path,
            method: "GET",
            user_agent,
            source: source.parse().unwrap(),
            port: 80,
        }
    }

    #[test]
    fn everything_that_a_rule_names_must_match() {
        let rule = WakeRule {
            path: Some("/.env".to_owned()),
            methods: vec!["get".to_owned()],
            user_agent: Some("Scan".to_owned()),
            sources: vec!["10.0.0.0/8".to_owned(), "2001:db8::/32".to_owned()],
            port: Some(80),
            answer: WakeAnswer::default(),
        };
        for (path, agent, source, expected) in [
            ("/.env", "my-scanner/1", "10.1.2.3", true),
            ("/.env.bak", "SCAN", "2001:db8::1", true),
            ("/.env", "scan", "::ffff:10.0.0.1", true),
            ("/x/.env", "scan", "10.1.2.3", false),
            ("/.env", "curl", "10.1.2.3", false),
            ("/.env", "scan", "11.1.2.3", false),
        ] {
            assert_eq!(
                matches(&rule, asked(path, agent, source)),
                expected,
                "{path} {agent} {source}"
            );
        }
        let post = Asked {
            method: "POST",
            ..asked("/.env", "scan", "10.1.2.3")
        };
        assert!(!matches(&rule, post));
        let other = Asked {
            port: 81,
            ..asked("/.env", "scan", "10.1.2.3")
        };
        assert!(!matches(&rule, other));
    }

    #[test]
    fn a_star_stands_for_any_text() {
        for (pattern, text, expected) in [
            ("*.php", "/a/b.php", true),
            ("*.php", "/a/b.php5", false),
            ("/a/*/c", "/a/b/c", true),
            ("/a/*/c", "/a/c", false),
            ("*", "", true),
            ("/*a*a", "/a", false),
            ("/*a*a", "/aa", true),
        ] {
            assert_eq!(glob(pattern, text), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn a_filter_that_makes_no_sense_is_refused() {
        let of = |rule: WakeRule| flaw(&WakeFilter { rules: vec![rule] });
        let path = |text: &str| WakeRule {
            path: Some(text.to_owned()),
            ..WakeRule::default()
        };
        assert_eq!(of(path("/")), None);
        assert!(of(WakeRule::default()).is_some() && of(path("")).is_some());
        let answers = |status, body: String| WakeRule {
            answer: WakeAnswer {
                status,
                body,
                ..WakeAnswer::default()
            },
            ..path("/")
        };
        assert!(of(answers(101, String::new())).is_some());
        assert!(of(answers(200, "x".repeat(5000))).is_some());
        for source in ["10.0.0.0/33", "example.org", "::/129"] {
            let rule = WakeRule {
                sources: vec![source.to_owned()],
                ..WakeRule::default()
            };
            assert!(of(rule).is_some(), "{source}");
        }
    }
}
