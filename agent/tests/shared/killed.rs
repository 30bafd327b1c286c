//! A torpord that is killed.

use super::own_host::runtime;

/// A life of torpord that ends as by SIGKILL: its tasks stop where they are, and what `work` forgets is not
/// cleaned up.
pub(crate) fn until_killed<T: Send>(work: impl AsyncFnOnce() -> T + Send) -> T {
    let live = || {
        let runtime = runtime();
        let result = runtime.block_on(work());
        runtime.shutdown_background();
        result
    };
    std::thread::scope(|scope| scope.spawn(live).join().unwrap())
}
