//! A host of a test's own: a network and a mount namespace, so that nothing of the real host is touched and what a
//! failed test leaves behind goes with them. Needs root.

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// Run `test` on a thread of its own in new namespaces, to its end.
pub(crate) fn in_namespaces(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
        mount(
            None::<&str>,
            "/",
            None::<&str>,
            MsFlags::MS_PRIVATE | MsFlags::MS_REC,
            None::<&str>,
        )
        .unwrap();
        test();
    });
    thread.join().unwrap();
}

/// On the thread that calls, because its namespaces are its own.
pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}
