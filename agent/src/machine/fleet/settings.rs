//! What a fleet is configured with.

use std::time::Duration;
use torpor_api::http::Endpoints;

/// Bounds and addresses.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Longest wait of a request for a wake; the wake goes on after it.
    pub wake_timeout: Duration,
    /// Longest wait of a pause for requests in flight.
    pub drain_grace: Duration,
    /// Guest memory of all running machines together, in MiB.
    pub max_running_mem_mib: u32,
    /// A machine that nobody used for so long is put to sleep when another one waits for memory; `None` if none is.
    pub idle_before_pause: Option<Duration>,
    /// Most restores at a time: more of them take no less time, and each of them longer.
    pub max_restoring: usize,
    /// How long before a lease pauses a machine its memory is written ahead; `None` if it is not.
    pub pre_copy_before: Option<Duration>,
    /// Host part of service URLs.
    pub service_host: String,
    /// Whether HTTP services are reached with TLS.
    pub service_tls: bool,
    /// Where the APIs and the SSH gateway are reached.
    pub endpoints: Endpoints,
    /// Whether machines of a template begin with a restore once one of their shape has booted.
    pub warm_templates: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            wake_timeout: Duration::from_secs(30),
            drain_grace: Duration::from_secs(2),
            max_running_mem_mib: 1 << 20,
            idle_before_pause: None,
            max_restoring: 1024,
            pre_copy_before: None,
            service_host: "127.0.0.1".to_owned(),
            service_tls: false,
            endpoints: Endpoints::default(),
            warm_templates: false,
        }
    }
}
