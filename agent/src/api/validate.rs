//! Bounds of fields, from [`torpor_api::limits`].

use super::error::{Failure, cut};
use crate::machine::fleet::check_lease_and_wake;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::ops::RangeInclusive;
use torpor_api::activity::ActivityPolicy;
use torpor_api::http::{
    CreateMachine, CreateSnapshot, ExecRequest, ForkMachine, PatchService, PatchSnapshot, ServiceAuth,
    ServiceKind, ServiceSpec,
};
use torpor_api::{LeasePolicy, MachineName, limits};

fn within<T: PartialOrd + Display>(field: &str, value: T, range: &RangeInclusive<T>) -> Result<(), Failure> {
    if range.contains(&value) {
        return Ok(());
    }
    let (least, most) = (range.start(), range.end());
    Err(Failure::invalid(format!(
        "{field} is {value}, and has to be {least} to {most}"
    )))
}

pub(super) fn shape(vcpus: Option<u8>, mem_mib: Option<u32>, disk_mib: Option<u32>) -> Result<(), Failure> {
    if let Some(vcpus) = vcpus {
        within("vcpus", vcpus, &limits::VCPUS)?;
    }
    if let Some(disk_mib) = disk_mib {
        within("disk_mib", disk_mib, &limits::DISK_MIB)?;
    }
    mem_mib.map_or(Ok(()), |mem_mib| within("mem_mib", mem_mib, &limits::MEM_MIB))
}

pub(super) fn create(body: &CreateMachine) -> Result<(), Failure> {
    within("vcpus", body.vcpus, &limits::VCPUS)?;
    within("mem_mib", body.mem_mib, &limits::MEM_MIB)?;
    if let Some(disk_mib) = body.disk_mib {
        within("disk_mib", disk_mib, &limits::DISK_MIB)?;
    }
    if body.template.parse::<MachineName>().is_err() {
        return Err(Failure::invalid(format!(
            "template {:?} is not a name",
            cut(&body.template)
        )));
    }
    if let Some(lease) = body.lease {
        self::lease(lease)?;
    }
    if let Some(wake) = body.wake {
        check_lease_and_wake(body.lease, wake)?;
    }
    body.activity.as_ref().map_or(Ok(()), activity)?;
    retention(body.retention_seconds)?;
    services(&body.services)?;
    environment(&body.env)?;
    directory(body.cwd.as_deref())?;
    metadata(&body.metadata)
}

/// What is said of a snapshot.
pub(super) fn snapshot(body: &CreateSnapshot) -> Result<(), Failure> {
    if let Some(digest) = &body.digest
        && (digest.is_empty() || digest.len() > limits::MAX_DIGEST || digest.contains(char::is_control))
    {
        return Err(Failure::invalid(format!(
            "digest is not 1 to {} bytes long, or has control characters",
            limits::MAX_DIGEST
        )));
    }
    retention(body.retention_seconds)?;
    metadata(&body.metadata)
}

pub(super) fn activity(policy: &ActivityPolicy) -> Result<(), Failure> {
    within(
        "cpu_floor_percent",
        policy.cpu_floor_percent,
        &limits::CPU_FLOOR_PERCENT,
    )?;
    within(
        "min_awake_seconds",
        policy.min_awake_seconds,
        &(0..=limits::MAX_MIN_AWAKE_SECONDS),
    )
}

pub(super) fn retention(seconds: Option<u64>) -> Result<(), Failure> {
    seconds.map_or(Ok(()), |seconds| {
        within("retention_seconds", seconds, &limits::RETENTION_SECONDS)
    })
}

pub(super) fn patch_snapshot(body: &PatchSnapshot) -> Result<(), Failure> {
    retention(body.retention_seconds.flatten())?;
    body.metadata.as_ref().map_or(Ok(()), metadata)
}

pub(super) fn fork(body: &ForkMachine) -> Result<(), Failure> {
    within("count", body.count, &limits::FORKS)?;
    if let Some(lease) = body.lease {
        self::lease(lease)?;
    }
    if let Some(wake) = body.wake {
        check_lease_and_wake(body.lease, wake)?;
    }
    body.metadata.as_ref().map_or(Ok(()), metadata)
}

pub(super) fn lease(lease: LeasePolicy) -> Result<(), Failure> {
    within("lease.seconds", lease.seconds, &limits::LEASE_SECONDS)
}

fn services(services: &[ServiceSpec]) -> Result<(), Failure> {
    if services.len() > limits::MAX_SERVICES {
        return Err(Failure::invalid(format!(
            "a machine exposes at most {} services",
            limits::MAX_SERVICES
        )));
    }
    let mut names = BTreeSet::new();
    for spec in services {
        service(spec)?;
        let name = spec
            .name
            .as_ref()
            .map_or_else(|| format!("port-{}", spec.port), ToString::to_string);
        if !names.insert(name.clone()) {
            return Err(Failure::invalid(format!("two services are named {name}")));
        }
    }
    Ok(())
}

pub(super) fn service(spec: &ServiceSpec) -> Result<(), Failure> {
    within("port", spec.port, &(1..=u16::MAX))?;
    if let Some(wake_deadline_ms) = spec.wake_deadline_ms {
        within("wake_deadline_ms", wake_deadline_ms, &limits::WAKE_DEADLINE_MS)?;
    }
    if spec.kind == ServiceKind::Tcp && spec.auth != ServiceAuth::None {
        return Err(Failure::invalid("a TCP service has no place for a token"));
    }
    Ok(())
}

pub(super) fn patch_service(patch: &PatchService) -> Result<(), Failure> {
    match patch.wake_deadline_ms {
        None | Some(0) => Ok(()),
        Some(wake_deadline_ms) => within("wake_deadline_ms", wake_deadline_ms, &limits::WAKE_DEADLINE_MS),
    }
}

pub(super) fn metadata(metadata: &BTreeMap<String, String>) -> Result<(), Failure> {
    let (most_pairs, most_key, most_value) = limits::MAX_METADATA;
    if metadata.len() > most_pairs {
        return Err(Failure::invalid(format!(
            "metadata has at most {most_pairs} keys"
        )));
    }
    for (key, value) in metadata {
        if key.is_empty() || key.len() > most_key {
            return Err(Failure::invalid(format!(
                "metadata key {:?} is not 1 to {most_key} bytes long",
                cut(key)
            )));
        }
        if value.len() > most_value {
            return Err(Failure::invalid(format!(
                "metadata.{} is longer than {most_value} bytes",
                cut(key)
            )));
        }
    }
    Ok(())
}

fn environment(env: &BTreeMap<String, String>) -> Result<(), Failure> {
    let len_bytes: usize = env.iter().map(|(key, value)| key.len() + value.len() + 2).sum();
    if len_bytes > limits::MAX_EXEC_BYTES {
        return Err(Failure::invalid(format!(
            "the environment is {len_bytes} bytes, at most {}",
            limits::MAX_EXEC_BYTES
        )));
    }
    if env.values().any(|value| value.contains('\0')) {
        return Err(Failure::invalid("a NUL character is in the environment"));
    }
    let bad = |key: &&String| key.is_empty() || key.contains(['=', '\0']);
    match env.keys().find(bad) {
        Some(key) => Err(Failure::invalid(format!(
            "env key {:?} is empty or has a '=' or a NUL character",
            cut(key)
        ))),
        None => Ok(()),
    }
}

fn directory(cwd: Option<&str>) -> Result<(), Failure> {
    match cwd {
        Some(cwd) if !cwd.starts_with('/') || cwd.contains('\0') => {
            Err(Failure::invalid("cwd is not an absolute path"))
        }
        Some(_) | None => Ok(()),
    }
}

/// Longest exec; a longer one runs in the background.
const EXEC_TIMEOUT_MS: RangeInclusive<u64> = 1..=86_400_000;

pub(super) fn exec(body: &ExecRequest) -> Result<(), Failure> {
    match (&body.shell, body.argv.first()) {
        (None, None) => return Err(Failure::invalid("argv and shell are both missing")),
        (Some(_), Some(_)) => return Err(Failure::invalid("argv and shell exclude each other")),
        (None, Some(program)) if program.is_empty() => return Err(Failure::invalid("argv[0] is empty")),
        (Some(_), None) | (None, Some(_)) => {}
    }
    let env = body.env.iter().flat_map(|(key, value)| [key, value]);
    let texts = || {
        body.argv
            .iter()
            .chain(&body.shell)
            .chain(&body.cwd)
            .chain(&body.user)
    };
    if texts().chain(env.clone()).any(|text| text.contains('\0')) {
        return Err(Failure::invalid(
            "a NUL character is in the command, its environment, directory or user",
        ));
    }
    let len_bytes: usize = texts().chain(env).map(|text| text.len() + 1).sum();
    if len_bytes > limits::MAX_EXEC_BYTES {
        let most = limits::MAX_EXEC_BYTES;
        return Err(Failure::invalid(format!(
            "command and environment are {len_bytes} bytes, at most {most}"
        )));
    }
    environment(&body.env)?;
    directory(body.cwd.as_deref())?;
    match body.timeout_ms {
        Some(timeout_ms) => within("timeout_ms", timeout_ms, &EXEC_TIMEOUT_MS),
        None => Ok(()),
    }
}
