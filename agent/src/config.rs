//! torpord's configuration: one TOML file, every key optional, unknown keys refused.

use crate::machine::fleet::Settings;
use crate::machine::hypervisor::{PlatformConfig, SleeperLimits};
use serde::Deserialize;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;
use torpor_api::http::{Endpoints, SshEndpoint};

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The file is no TOML, or has a key that does not exist.
    #[error("cannot understand the configuration {}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where, and what.
        #[source]
        source: toml::de::Error,
    },
    /// A value makes no sense.
    #[error("configuration key {key} is {value}, and {rule}")]
    Value {
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
        /// What it has to be.
        rule: &'static str,
    },
}

/// The whole file.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Store, machines and imported templates.
    pub state_dir: PathBuf,
    /// Sockets and what runs.
    pub run_dir: PathBuf,
    /// Where templates are looked for, first match wins.
    pub template_dirs: Vec<PathBuf>,
    /// The VMM's executable.
    pub vmm_path: PathBuf,
    /// The API's listeners.
    pub api: ApiConfig,
    /// The proxy's listeners.
    pub proxy: ProxySection,
    /// The SSH gateway.
    pub ssh: SshSection,
    /// Bounds.
    pub limits: LimitsConfig,
    /// How machines begin.
    pub templates: TemplatesConfig,
}

/// `[api]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ApiConfig {
    /// Path of the unix socket.
    pub unix_socket: PathBuf,
    /// Address of the TCP listener; `""` for none.
    #[serde(deserialize_with = "optional_address")]
    pub tcp_listen: Option<SocketAddr>,
    /// Address of the listener for the `morphcloud` SDK; `""` for none.
    #[serde(deserialize_with = "optional_address")]
    pub morph_listen: Option<SocketAddr>,
    /// Address of the listener for the `nullspace-sdk`; `""` for none.
    #[serde(deserialize_with = "optional_address")]
    pub nullspace_listen: Option<SocketAddr>,
    /// File with the bearer token of the TCP listeners.
    pub token_file: PathBuf,
}

impl ApiConfig {
    /// Something is served over TCP, so there has to be a token.
    #[must_use]
    pub fn needs_token(&self) -> bool {
        [self.tcp_listen, self.morph_listen, self.nullspace_listen]
            .iter()
            .any(Option::is_some)
    }
}

/// `[proxy]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProxySection {
    /// Address on which services are exposed.
    pub listen_ip: IpAddr,
    /// Address of the listener that routes by host name; `""` for none.
    #[serde(deserialize_with = "optional_address")]
    pub http_listen: Option<SocketAddr>,
    /// Likewise, TLS only; needs a certificate.
    #[serde(deserialize_with = "optional_address")]
    pub https_listen: Option<SocketAddr>,
    /// Domain of those host names, as in `8080-web.torpor.test`.
    pub domain: String,
    /// Certificate chain in PEM. With it every HTTP listener takes TLS, too; read again when it changes.
    pub tls_cert_file: Option<PathBuf>,
    /// Its key in PEM.
    pub tls_key_file: Option<PathBuf>,
}

/// `[templates]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TemplatesConfig {
    /// Whether the first machine of a template and shape leaves a snapshot from which the next ones begin.
    pub warm: bool,
}

impl Default for TemplatesConfig {
    fn default() -> Self {
        Self { warm: true }
    }
}

/// `[ssh]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SshSection {
    /// Address of the gateway; `""` for none.
    #[serde(deserialize_with = "optional_address")]
    pub listen: Option<SocketAddr>,
}

/// `[limits]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsConfig {
    /// Longest boot in seconds.
    pub boot_timeout_s: u64,
    /// Longest wait of a request for a wake, in seconds.
    pub wake_timeout_s: u64,
    /// Longest wait of a pause for requests in flight, in milliseconds.
    pub drain_grace_ms: u64,
    /// Guest memory of all running machines together, in MiB; the host's memory if not given.
    pub max_running_mem_mib: Option<u32>,
    /// With it, a machine that nobody used for so many seconds is put to sleep when another one waits for memory.
    pub pause_idle_after_s: Option<u64>,
    /// With it, what a machine has changed is written to its image so many seconds before its lease pauses it, too.
    pub pre_copy_before_s: Option<u64>,
    /// Most machines that run at a time.
    pub max_running: u16,
    /// Most machines that are restored at a time, the others wait their turn; twice the processors if not given.
    pub max_restoring: Option<u16>,
    /// Most sleeping machines to which clients keep connections open; past it the oldest loses them.
    pub max_parked: u16,
    /// Blank VMMs kept ready for each of the shapes used last; a wake that finds none waits until one is made.
    pub blank_vmms: u8,
    /// Guest memory, in MiB, of machines that keep their VMM and their memory in RAM while they sleep, besides that of running
    /// ones: they wake without a restore. 0 for none.
    pub resident_mem_mib: u64,
    /// How long a machine that sleeps keeps them, in seconds.
    pub resident_s: u64,
    /// Most machines that keep their VMM while they sleep, but not their memory: a few MiB each, for a restore that is done ahead.
    pub dozing: u16,
    /// Largest console log of a machine in KiB.
    pub console_limit_kib: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state_dir: "/var/lib/torpor".into(),
            run_dir: "/run/torpor".into(),
            template_dirs: vec![
                "/var/lib/torpor/templates".into(),
                "/usr/share/torpor/templates".into(),
            ],
            vmm_path: "/usr/libexec/torpor/torpor-vmm".into(),
            api: ApiConfig::default(),
            proxy: ProxySection::default(),
            ssh: SshSection::default(),
            limits: LimitsConfig::default(),
            templates: TemplatesConfig::default(),
        }
    }
}

impl Default for ApiConfig {
    fn default() -> Self {
        Self {
            unix_socket: "/run/torpor/api.sock".into(),
            tcp_listen: Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 7070)),
            morph_listen: Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 7071)),
            nullspace_listen: Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 7072)),
            token_file: "/etc/torpor/token".into(),
        }
    }
}

impl Default for ProxySection {
    fn default() -> Self {
        Self {
            listen_ip: IpAddr::V4(Ipv4Addr::LOCALHOST),
            http_listen: None,
            https_listen: None,
            tls_cert_file: None,
            tls_key_file: None,
            domain: "localhost".to_owned(),
        }
    }
}

impl Default for SshSection {
    fn default() -> Self {
        Self {
            listen: Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 2222)),
        }
    }
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            boot_timeout_s: 60,
            wake_timeout_s: 30,
            drain_grace_ms: 2000,
            max_running_mem_mib: None,
            pause_idle_after_s: None,
            pre_copy_before_s: None,
            max_restoring: None,
            max_running: 256,
            max_parked: 256,
            blank_vmms: 2,
            resident_mem_mib: 0,
            resident_s: 300,
            dozing: 0,
            console_limit_kib: 1024,
        }
    }
}

fn optional_address<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<SocketAddr>, D::Error> {
    let text = String::deserialize(from)?;
    if text.is_empty() {
        Ok(None)
    } else {
        text.parse().map(Some).map_err(serde::de::Error::custom)
    }
}

impl Config {
    /// The configuration in this file.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        let config: Self = toml::from_str(&text).map_err(|source| ConfigError::Parse {
            path: path.to_owned(),
            source,
        })?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let proxy = &self.proxy;
        if proxy.tls_cert_file.is_some() != proxy.tls_key_file.is_some()
            || (proxy.https_listen.is_some() && proxy.tls_cert_file.is_none())
        {
            return Err(ConfigError::Value {
                key: "proxy.tls_cert_file",
                value: format!("{:?}", proxy.tls_cert_file),
                rule: "goes with proxy.tls_key_file, and proxy.https_listen needs both",
            });
        }
        let limits = &self.limits;
        let positive = [
            ("limits.boot_timeout_s", limits.boot_timeout_s),
            ("limits.wake_timeout_s", limits.wake_timeout_s),
            ("limits.max_running", limits.max_running.into()),
            ("limits.max_restoring", limits.max_restoring.map_or(1, u64::from)),
            ("limits.resident_s", limits.resident_s),
            ("limits.console_limit_kib", limits.console_limit_kib),
        ];
        for (key, value) in positive {
            if !(1..=u64::from(u32::MAX)).contains(&value) {
                return Err(ConfigError::Value {
                    key,
                    value: value.to_string(),
                    rule: "has to be 1 or more",
                });
            }
        }
        for (key, path) in [
            ("state_dir", &self.state_dir),
            ("run_dir", &self.run_dir),
            ("vmm_path", &self.vmm_path),
        ] {
            if !path.is_absolute() {
                let value = path.display().to_string();
                return Err(ConfigError::Value {
                    key,
                    value,
                    rule: "has to be an absolute path",
                });
            }
        }
        Ok(())
    }

    /// The part for the platform.
    #[must_use]
    pub fn platform(&self) -> PlatformConfig {
        PlatformConfig {
            state_dir: self.state_dir.clone(),
            run_dir: self.run_dir.clone(),
            template_dirs: self.template_dirs.clone(),
            vmm_path: self.vmm_path.clone(),
            boot_timeout: Duration::from_secs(self.limits.boot_timeout_s),
            console_limit_bytes: self.limits.console_limit_kib.saturating_mul(1024),
            max_slots: self.limits.max_running,
            max_parked: self.limits.max_parked,
            blank_vmms: self.limits.blank_vmms,
            sleepers: SleeperLimits {
                resident_mem_mib: self.limits.resident_mem_mib,
                resident_for: Duration::from_secs(self.limits.resident_s),
                dozing: self.limits.dozing,
            },
        }
    }

    fn endpoints(&self) -> Endpoints {
        let url = |address: SocketAddr| format!("http://{}:{}", host_of(address.ip()), address.port());
        Endpoints {
            native: self.api.tcp_listen.map(url),
            morph: self.api.morph_listen.map(url),
            nullspace: self.api.nullspace_listen.map(url),
            ssh: self.ssh.listen.map(|address| SshEndpoint {
                host: host_of(address.ip()),
                port: address.port(),
            }),
            token_file: self.api.token_file.clone(),
        }
    }

    /// A certificate is for names, so what has one is reached by name.
    fn service_host(&self) -> String {
        match self.proxy.tls_cert_file {
            Some(_) => self.proxy.domain.clone(),
            None => host_of(self.proxy.listen_ip),
        }
    }

    /// The part for the fleet.
    #[must_use]
    pub fn fleet(&self) -> Settings {
        let host_mib = || host_memory_mib().unwrap_or(1 << 20);
        Settings {
            wake_timeout: Duration::from_secs(self.limits.wake_timeout_s),
            drain_grace: Duration::from_millis(self.limits.drain_grace_ms),
            max_running_mem_mib: self.limits.max_running_mem_mib.unwrap_or_else(host_mib),
            idle_before_pause: self.limits.pause_idle_after_s.map(Duration::from_secs),
            max_restoring: self
                .limits
                .max_restoring
                .map_or_else(twice_the_processors, usize::from),
            pre_copy_before: self.limits.pre_copy_before_s.map(Duration::from_secs),
            service_host: self.service_host(),
            service_tls: self.proxy.tls_cert_file.is_some(),
            warm_templates: self.templates.warm,
            endpoints: self.endpoints(),
        }
    }
}

/// What clients on this host write into a URL.
#[must_use]
pub fn host_of(listen_ip: IpAddr) -> String {
    match listen_ip {
        address if address.is_unspecified() => "127.0.0.1".to_owned(),
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("[{address}]"),
    }
}

fn twice_the_processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from) * 2
}

fn host_memory_mib() -> Option<u32> {
    let bytes = nix::sys::sysinfo::sysinfo().ok()?.ram_total();
    u32::try_from(bytes >> 20).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_packaged_file_shows_the_defaults() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../packaging/torpord.toml");
        assert_eq!(Config::read(Path::new(path)).unwrap(), Config::default());
    }

    #[test]
    fn unknown_keys_and_senseless_values_are_refused() {
        for bad in [
            "colour = 1",
            "[api]\nport = 1",
            "state_dir = 'relative'",
            "[limits]\nwake_timeout_s = 0",
            "x",
        ] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("torpord.toml");
            std::fs::write(&path, bad).unwrap();
            assert!(Config::read(&path).is_err(), "{bad} was accepted");
        }
    }
}
