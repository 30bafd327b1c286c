"""Machines that keep their VMM while they sleep, but not their memory: a restore that was done ahead, and as safe."""
import os
import pathlib
import signal

import pytest
import torpor
from test_resident import lives, pause, woken_from
from test_sleep_and_wake import wake_and_check


def anonymous_mib(pid):
    rollup = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Anonymous:")) >> 10


def pause_until_it_dozes(machine):
    """Put it to sleep; its VMM's process."""
    awake = anonymous_mib(torpor.vmm_pid(machine.get()["execution_id"]))
    _, pid = pause(machine)
    torpor.wait_for(lambda: anonymous_mib(pid) < 10, f"a VMM that held {awake} MiB gives them back")
    # It is done when it sleeps.
    torpor.wait_for(lambda: all("S (sleeping)" in task.read_text() for task in
                                pathlib.Path(f"/proc/{pid}/task").glob("*/status")), "the VMM is at rest")
    return pid


@pytest.fixture(scope="module")
def one_may_doze(configured_for_all):
    configured_for_all(dozing=1)


@pytest.fixture
def dozing(one_may_doze, counter):
    return counter


def test_twenty_wakes_lose_nothing_and_nothing_is_held_meanwhile(dozing):
    state = torpor.fetch(dozing.url("/check"))
    processes = set()
    for _ in range(20):
        processes.add(pause_until_it_dozes(dozing))
        assert torpor.call("GET", "/v1/healthz")["pools"]["sleepers"] == {"resident": 0, "resident_mem_mib": 0, "dozing": 1}
        state = wake_and_check(dozing, state)
        assert woken_from(dozing) == "dozing"
    assert len(processes) == 1


def test_a_wake_at_any_moment_of_falling_asleep_loses_nothing(dozing):
    state = torpor.fetch(dozing.url("/check"))
    for _ in range(10):
        pause(dozing)
        state = wake_and_check(dozing, state)
        assert woken_from(dozing) == "dozing"


def test_what_has_left_the_page_cache_is_restored_from_the_disk(dozing):
    state = torpor.fetch(dozing.url("/check"))
    pid = pause_until_it_dozes(dozing)
    for name in ("memory.img", "memory.base"):
        if (dozing.directory / name).exists():
            image = os.open(dozing.directory / name, os.O_RDONLY)
            os.posix_fadvise(image, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(image)
    state = wake_and_check(dozing, state)
    assert woken_from(dozing) == "image" and not lives(pid)
    pause_until_it_dozes(dozing)
    wake_and_check(dozing, state)
    assert woken_from(dozing) == "dozing"


def test_the_machine_that_was_paused_longest_ago_makes_room(dozing, machine_factory):
    state = torpor.fetch(dozing.url("/check"))
    first = pause_until_it_dozes(dozing)
    second = machine_factory()
    assert second.sh("echo here").strip() == "here"
    pause_until_it_dozes(second)
    torpor.wait_for(lambda: not lives(first), "the first VMM ends")
    wake_and_check(dozing, state)
    assert woken_from(dozing) == "image"
    assert second.sh("echo here").strip() == "here"
    assert woken_from(second) == "dozing"


def test_what_was_resident_dozes_when_its_time_is_over(configured, counter):
    configured(dozing=1, resident_mem_mib=600, resident_s=2)
    state = torpor.fetch(counter.url("/check"))
    pause_until_it_dozes(counter)
    wake_and_check(counter, state)
    assert woken_from(counter) == "dozing"


def test_neither_a_vmm_nor_a_torpord_that_dies_meanwhile_costs_memory(dozing):
    state = torpor.fetch(dozing.url("/check"))
    pid = pause_until_it_dozes(dozing)
    os.kill(pid, signal.SIGKILL)
    torpor.wait_for(lambda: not lives(pid), "the VMM is gone")
    assert dozing.status() == "paused"
    state = wake_and_check(dozing, state)
    assert woken_from(dozing) == "image"
    pid = pause_until_it_dozes(dozing)
    n_pauses = len(dozing.events("machine.paused"))
    torpor.kill_torpord()
    assert dozing.status() == "paused"
    torpor.wait_for(lambda: not lives(pid), "the next torpord ends the VMM")
    assert len(dozing.events("machine.paused")) == n_pauses
    wake_and_check(dozing, state)
    assert woken_from(dozing) == "image"


def test_whatever_else_is_done_with_it_finds_its_files_as_they_should_be(dozing, machine_factory):
    state = torpor.fetch(dozing.url("/check"))
    pause_until_it_dozes(dozing)
    snapshot = dozing.snapshot()
    fork = machine_factory(snapshot=snapshot["id"], services=[{"port": torpor.SERVICE_PORT}])
    assert wake_and_check(fork, state)["count"] == state["count"] + 1
    state = wake_and_check(dozing, state)
    assert woken_from(dozing) == "dozing"
    # The image is the snapshot's now, too, so this pause writes another one.
    pause_until_it_dozes(dozing)
    state = wake_and_check(dozing, state)
    pid = pause_until_it_dozes(dozing)
    dozing.resume(**{"from": "disk"})
    assert not lives(pid)
    assert dozing.sh("cat /workspace/disk-nonce") == state["nonce"]
    pid = pause_until_it_dozes(dozing)
    torpor.call("DELETE", f"/v1/machines/{dozing.id}")
    assert not lives(pid) and not dozing.directory.exists()
