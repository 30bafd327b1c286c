//! Which target a request means: fixed by the listener, or named by the host.
//!
//! Parsing only. Whether a machine of that name exists is the waker's to say.

use crate::waker::Target;
use http::{Request, header};

/// How one listener finds targets.
#[derive(Debug, Clone)]
pub(crate) enum Route {
    /// Everything goes to the service behind this port.
    Service { listen_port: u16 },
    /// `<port>-<machine>.<domain>`; the domain in lower case without a leading dot.
    HostName { domain: String },
}

/// A request that names no machine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("host {host:?} is not <port>-<machine>.{domain}")]
pub(crate) struct UnknownHost {
    host: String,
    domain: String,
}

const MAX_SHOWN_HOST_CHARS: usize = 128;

impl Route {
    pub(crate) fn target<B>(&self, request: &Request<B>) -> Result<Target, UnknownHost> {
        match self {
            Self::Service { listen_port } => Ok(Target::Service {
                listen_port: *listen_port,
            }),
            Self::HostName { domain } => {
                let host = host_of(request);
                parse_host(&host, domain).ok_or_else(|| UnknownHost {
                    host: host.chars().take(MAX_SHOWN_HOST_CHARS).collect(),
                    domain: domain.clone(),
                })
            }
        }
    }
}

/// The request's host without its port. An absolute-form target outranks the header (RFC 9112, 3.2.2).
fn host_of<B>(request: &Request<B>) -> String {
    if let Some(host) = request.uri().host() {
        return host.to_ascii_lowercase();
    }
    let mut hosts = request.headers().get_all(header::HOST).iter();
    let (Some(host), None) = (hosts.next(), hosts.next()) else {
        return String::new();
    };
    let host = String::from_utf8_lossy(host.as_bytes()).to_ascii_lowercase();
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name.to_owned(),
        Some(_) | None => host,
    }
}

fn parse_host(host: &str, domain: &str) -> Option<Target> {
    let host = host.strip_suffix('.').unwrap_or(host);
    let label = host.strip_suffix(domain)?.strip_suffix('.')?;
    let (port, machine) = label.split_once('-')?;
    let canonical = port.bytes().all(|b| b.is_ascii_digit()) && !port.starts_with('0');
    let port: u16 = port.parse().ok().filter(|_| canonical)?;
    let in_alphabet = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_';
    (!machine.is_empty() && machine.bytes().all(in_alphabet)).then(|| Target::HostName {
        port,
        machine: machine.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route() -> Route {
        Route::HostName {
            domain: "torpor.test".to_owned(),
        }
    }

    fn target_of(uri: &str, hosts: &[&str]) -> Option<(u16, String)> {
        let mut request = Request::builder().uri(uri);
        for host in hosts {
            request = request.header("host", *host);
        }
        match route().target(&request.body(()).unwrap()) {
            Ok(Target::HostName { port, machine }) => Some((port, machine)),
            Ok(Target::Service { .. }) => panic!("a host name became a service"),
            Err(_) => None,
        }
    }

    #[test]
    fn a_host_names_port_and_machine_whatever_its_case_and_port() {
        let web = Some((8080, "web-1".to_owned()));
        assert_eq!(target_of("/", &["8080-web-1.torpor.test"]), web);
        assert_eq!(target_of("/", &["8080-WEB-1.Torpor.Test:7080"]), web);
        assert_eq!(target_of("/", &["8080-web-1.torpor.test."]), web);
        let id = "mch_abcdefghijklmnopqrst";
        assert_eq!(
            target_of("/", &[&format!("80-{id}.torpor.test")]),
            Some((80, id.to_owned()))
        );
    }

    #[test]
    fn an_absolute_target_outranks_the_header() {
        let uri = "http://1-a.torpor.test:99/x";
        assert_eq!(target_of(uri, &["2-b.torpor.test"]), Some((1, "a".to_owned())));
    }

    #[test]
    fn anything_else_is_no_target() {
        for host in [
            "",
            "torpor.test",
            ".torpor.test",
            "web.torpor.test",
            "8080-.torpor.test",
            "-web.torpor.test",
            "0-web.torpor.test",
            "080-web.torpor.test",
            "+80-web.torpor.test",
            "65536-web.torpor.test",
            "80-web.eviltorpor.test.example",
            "80-webtorpor.test",
            "80-a.b.torpor.test",
            "80-a/../b.torpor.test",
            "80-a%00.torpor.test",
            "[::1]:80",
        ] {
            assert_eq!(target_of("/", &[host]), None, "{host:?}");
        }
        assert_eq!(target_of("/", &[]), None);
        assert_eq!(target_of("/", &["1-a.torpor.test", "2-b.torpor.test"]), None);
    }
}
