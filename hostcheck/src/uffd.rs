//! userfaultfd: a missing page, met by the kernel in a system call, filled from user space.
//!
//! A restored machine's memory is filled that way, and KVM meets missing pages in kernel mode. The faulting read runs
//! in a thread of its own and the process is a child, since a fault that nobody fills waits for ever.

use crate::supervise::{self, Outcome, step};
use crate::{Finding, sys};
use std::io::{Read, Write};
use std::thread;
use std::time::Duration;

pub(crate) const CHILD: &str = "uffd";
const LIMIT: Duration = Duration::from_secs(10);
const FAULT_PATIENCE: Duration = Duration::from_secs(5);

pub(crate) fn check() -> Finding {
    let report = supervise::run(CHILD, LIMIT);
    let at = report
        .last_step
        .map(|step| format!(" at '{step}'"))
        .unwrap_or_default();
    let what_to_do = "Run as root (CAP_SYS_PTRACE), or set vm.unprivileged_userfaultfd=1; the kernel needs CONFIG_USERFAULTFD.";
    match report.outcome {
        Outcome::Passed => Finding::ok(
            "userfaultfd",
            "a page missed in kernel mode was filled from user space",
        ),
        Outcome::Failed(why) | Outcome::Died(why) => {
            Finding::no("userfaultfd", format!("failed{at}: {why}"), what_to_do)
        }
        Outcome::Hung => Finding::no("userfaultfd", format!("hung{at}"), what_to_do),
    }
}

pub(crate) fn run() -> Result<(), String> {
    step("create");
    let uffd = sys::Userfaultfd::open().map_err(|error| format!("cannot create it: {error}"))?;
    step("register");
    let page = sys::Page::map().map_err(|error| format!("cannot map a page: {error}"))?;
    uffd.register(&page)
        .map_err(|error| format!("cannot register a page: {error}"))?;
    step("read(2) into a missing page");
    let (mut reader, mut writer) = std::io::pipe().map_err(|error| format!("cannot make a pipe: {error}"))?;
    writer
        .write_all(b"torpor")
        .map_err(|error| format!("cannot write to a pipe: {error}"))?;
    thread::scope(|scope| {
        let reading = scope.spawn(|| page.read_into(&mut reader));
        let filled = uffd.fill_one(&page, b'.', FAULT_PATIENCE);
        if let Err(error) = filled {
            // The reader waits for ever; only the end of the process ends it.
            supervise::report(Err(format!("no fault came or it could not be filled: {error}")));
            std::process::exit(1);
        }
        match reading.join() {
            Ok(Ok(6)) => Ok(()),
            Ok(Ok(n_read)) => Err(format!("the read brought {n_read} bytes instead of 6")),
            Ok(Err(error)) => Err(format!("the read failed: {error}")),
            Err(_) => Err("the reading thread panicked".to_owned()),
        }
    })?;
    step("compare");
    let mut found = [0; 8];
    page.load(&mut found);
    let mut rest = Vec::new();
    drop(writer);
    // An empty pipe whose writer is gone ends at once.
    let _ = reader.read_to_end(&mut rest);
    if &found == b"torpor.." {
        Ok(())
    } else {
        Err(format!("the page holds {found:?}"))
    }
}
