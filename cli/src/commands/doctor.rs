//! `doctor`: what `torpor-hostcheck` tries, and whether torpord answers, as lines for people or JSON.
//!
//! The exit code is 0 only if everything that was asked about, and is needed, works. A torpord that does not answer
//! counts only when it was asked about by name: before the installation there is none.

use crate::args::{Doctor, Format, Global, Probe};
use crate::client::{CallError, Client};
use crate::output;
use http::Method;
use serde::Serialize;
use torpor_hostcheck::{Finding, Verdict};

#[derive(Serialize)]
struct Report<'a> {
    ok: bool,
    findings: &'a [Finding],
}

/// Runs the probe of a supervised child in this process.
pub(super) fn child(probe: &str) -> u8 {
    torpor_hostcheck::child(probe)
}

/// Tries, prints and answers with the exit code.
pub(super) async fn run(global: &Global, doctor: &Doctor) -> anyhow::Result<u8> {
    let all = doctor.probe == Probe::All;
    let mut findings = Vec::new();
    for probe in [
        Probe::Kernel,
        Probe::Kvm,
        Probe::Uffd,
        Probe::Tap,
        Probe::Nft,
        Probe::Cgroup,
        Probe::Disk,
        Probe::Torpord,
    ] {
        if all || probe == doctor.probe {
            let found = match probe {
                Probe::Torpord => vec![torpord(global, all).await],
                other => try_host(other, doctor),
            };
            if global.output() == Format::Table {
                output::print(lines(&found).as_bytes())?;
            }
            findings.extend(found);
        }
    }
    let ok = findings.iter().all(|finding| finding.verdict != Verdict::No);
    if global.output() == Format::Json {
        output::print_json(&serde_json::to_vec_pretty(&Report {
            ok,
            findings: &findings,
        })?)?;
    }
    Ok(u8::from(!ok))
}

fn try_host(probe: Probe, doctor: &Doctor) -> Vec<Finding> {
    match probe {
        Probe::Kernel => torpor_hostcheck::kernel(),
        Probe::Kvm => torpor_hostcheck::kvm(),
        Probe::Uffd => torpor_hostcheck::userfaultfd(),
        Probe::Tap => torpor_hostcheck::tap(),
        Probe::Nft => torpor_hostcheck::nftables(),
        Probe::Cgroup => torpor_hostcheck::cgroup(),
        Probe::Disk => torpor_hostcheck::disk(&doctor.state_dir),
        Probe::All | Probe::Torpord => Vec::new(),
    }
}

async fn torpord(global: &Global, one_of_many: bool) -> Finding {
    const CHECK: &str = "torpord";
    let asked = match Client::new(global) {
        Ok(client) => client.call(Method::GET, "/v1/healthz").await,
        Err(error) => Err(error),
    };
    match asked {
        Ok(_) => Finding::ok(CHECK, "it answers"),
        Err(error @ CallError::Unreachable { .. }) if one_of_many => {
            Finding::info(CHECK, format!("{error}; it may not be installed or started yet"))
        }
        Err(error) => Finding::no(CHECK, error.to_string(), error.suggested_action()),
    }
}

fn lines(findings: &[Finding]) -> String {
    let mut text = String::new();
    for finding in findings {
        let verdict = match finding.verdict {
            Verdict::Ok => "ok",
            Verdict::No => "no",
            Verdict::Info => "info",
        };
        text.push_str(&format!(
            "{verdict:<4}  {:<20}  {}\n",
            finding.check, finding.meaning
        ));
        if let Some(what_to_do) = &finding.what_to_do {
            text.push_str(&format!("{:28}what to do: {what_to_do}\n", ""));
        }
    }
    text
}
