"""Memory that is written ahead of a lease's end: the pause has less to write, and all of it is not much more than without."""
import statistics

import torpor
from test_sleep_and_wake import wake_and_check

LEASE_S, AHEAD_S, CYCLES = 6, 3, 4
CHURN_MIB = 24


def cycle(machine, state):
    """Wake it, have it change some memory, and let its lease put it to sleep; its state, and what the pause tells of its writing."""
    def set_lease(seconds):
        torpor.call("PUT", f"/v1/machines/{machine.id}/lease", {"lease": {"seconds": seconds, "action": "pause"}})
    # A wake begins the window anew, and what comes before the pause may take longer than that.
    set_lease(600)
    state = wake_and_check(machine, state)
    machine.sh(f"dd if=/dev/urandom of=/dev/shm/churn bs=1M count={CHURN_MIB} status=none")
    n_pauses = len(machine.events("machine.paused"))
    set_lease(LEASE_S)
    paused = torpor.wait_for(lambda: machine.events("machine.paused")[n_pauses:], "the lease pauses the machine", 60)
    return state, paused[0]["detail"]["persist"]


def test_writing_ahead_takes_work_from_the_pause_and_adds_less_than_half(configured, counter):
    state = torpor.fetch(counter.url("/check"))
    counter.pause()
    written = {}
    for ahead_s in (None, AHEAD_S):
        if ahead_s:
            configured(pre_copy_before_s=ahead_s)
        persists = []
        for _ in range(CYCLES):
            state, persist = cycle(counter, state)
            persists.append(persist)
        written[ahead_s] = persists
    plain = statistics.median(persist["written_bytes"] for persist in written[None])
    in_pause = statistics.median(persist["written_bytes"] for persist in written[AHEAD_S])
    ahead = statistics.median(persist["pre_copied_bytes"] for persist in written[AHEAD_S])
    print(f"written by a pause {plain / 1e6:.1f} MB; with writing ahead {ahead / 1e6:.1f} MB before it and {in_pause / 1e6:.1f} MB "
          f"by it, {(ahead + in_pause) / plain:.2f} times as much")
    assert all(persist["pre_copied_bytes"] == 0 for persist in written[None])
    assert in_pause < plain / 2
    assert ahead + in_pause <= plain * 1.5
    # What was written ahead is what the machine wakes from.
    wake_and_check(counter, state)
