//! What the host asks about the machine as a whole.

use super::client::{Agent, eventually, shell, state_of};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use std::time::SystemTime;
use torpor_api::guest::{ExecSpec, GuestErrorCode, GuestRequest, GuestResponse};

#[test]
fn a_ping_is_answered_with_the_version() {
    let version = env!("CARGO_PKG_VERSION").to_owned();
    assert_eq!(
        Agent::start().ask(&GuestRequest::Ping),
        Ok(GuestResponse::Pong { version })
    );
}

#[test]
fn a_probe_sees_a_listener_of_either_family_come_and_go() {
    let agent = Agent::start();
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let listener = std::net::TcpListener::bind(address).unwrap();
        let probe = GuestRequest::Probe {
            port: listener.local_addr().unwrap().port(),
        };
        assert_eq!(
            agent.ask(&probe),
            Ok(GuestResponse::Probed { listening: true }),
            "{address}"
        );
        drop(listener);
        assert_eq!(
            agent.ask(&probe),
            Ok(GuestResponse::Probed { listening: false }),
            "{address}"
        );
    }
}

#[test]
fn metrics_are_plausible() {
    let Ok(GuestResponse::Metrics {
        cpu_busy_us,
        mem_used_bytes,
        mem_total_bytes,
        disk_used_bytes,
        disk_total_bytes,
        cpus,
        interval_us,
        ..
    }) = Agent::start().ask(&GuestRequest::Metrics)
    else {
        panic!("no metrics");
    };
    assert!(cpu_busy_us > 0 && cpus > 0 && interval_us > 0);
    assert!(mem_used_bytes > 0 && mem_used_bytes < mem_total_bytes);
    assert!(disk_used_bytes > 0 && disk_used_bytes < disk_total_bytes);
}

#[test]
fn file_systems_are_flushed() {
    assert_eq!(
        Agent::start().ask(&GuestRequest::Quiesce),
        Ok(GuestResponse::Done)
    );
}

fn resync(wall_unix_ns: u64, entropy: &str) -> GuestRequest {
    GuestRequest::Resync {
        wall_unix_ns,
        entropy: entropy.to_owned(),
    }
}

/// Without the right to set the clock, so that no defect can turn the build machine's.
fn powerless() -> Agent {
    Agent::start_with(&["setpriv", "--bounding-set", "-sys_time,-sys_admin"])
}

#[test]
fn a_resync_that_may_not_set_the_clock_says_so() {
    let error = powerless()
        .ask(&resync(1_000_000_000, &BASE64_STANDARD.encode([7; 32])))
        .unwrap_err();
    assert_eq!(error.code, GuestErrorCode::Os);
    assert!(error.message.contains("clock"), "{error}");
}

#[test]
fn a_resync_without_entropy_or_with_an_impossible_time_is_refused() {
    let agent = powerless();
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap()
        .as_nanos();
    let now = u64::try_from(now).unwrap();
    let fresh = BASE64_STANDARD.encode([7; 32]);
    for request in [
        resync(now, ""),
        resync(now, "no base64!"),
        resync(now, "AAAA"),
        resync(u64::MAX, &fresh),
    ] {
        assert_eq!(agent.ask(&request).unwrap_err().code, GuestErrorCode::BadRequest);
    }
}

#[test]
fn a_shutdown_is_answered_and_then_left_to_the_other_init() {
    for (reboot, expected) in [(false, "poweroff\n"), (true, "reboot\n")] {
        let mut agent = Agent::start();
        assert_eq!(
            agent.ask(&GuestRequest::Shutdown { reboot }),
            Ok(GuestResponse::Done)
        );
        assert!(agent.wait().success());
        assert_eq!(std::fs::read_to_string(agent.path("ended")).unwrap(), expected);
    }
}

#[test]
fn an_idle_agent_sleeps_in_every_thread() {
    let agent = Agent::start();
    assert_eq!(
        agent
            .exec(&ExecSpec {
                background: true,
                ..shell("true")
            })
            .stdout,
        b""
    );
    let ticks = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/schedstat", agent.pid())).unwrap();
        stat.split(' ').next().unwrap().parse::<u64>().unwrap()
    };
    eventually("the agent sleeps", || {
        state_of(agent.pid()).is_some_and(|(state, _)| state == 'S')
    });
    let before = ticks();
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert!(ticks() - before < 50_000_000, "the agent spins");
}
