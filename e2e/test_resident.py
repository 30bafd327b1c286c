"""Machines that keep their VMM while they sleep, because the operator gave RAM for it: woken without a restore, and as safe."""
import os
import pathlib
import signal
import time

import pytest
import torpor
from test_sleep_and_wake import wake_and_check


def lives(pid):
    return pathlib.Path(f"/proc/{pid}/exe").exists()


def pause(machine):
    """Put it to sleep; the execution that went to sleep and its VMM's process."""
    execution = machine.get()["execution_id"]
    pid = torpor.vmm_pid(execution)
    assert machine.pause()["status"] == "paused"
    return execution, pid


def woken_from(machine):
    return machine.events("machine.woken")[-1]["detail"]["stages"]["from"]


def was_resident(machine):
    return woken_from(machine) == "resident"


@pytest.fixture(scope="module")
def two_may_stay(configured_for_all):
    configured_for_all(resident_mem_mib=600, resident_s=600)


@pytest.fixture
def resident(two_may_stay, counter):
    return counter


def test_twenty_wakes_without_a_restore_lose_nothing(resident):
    state = torpor.fetch(resident.url("/check"))
    executions, processes = set(), set()
    for _ in range(20):
        execution, pid = pause(resident)
        assert lives(pid)
        executions.add(execution)
        processes.add(pid)
        state = wake_and_check(resident, state)
        assert was_resident(resident)
    assert len(executions) == 20 and len(processes) == 1
    for execution in executions:
        assert torpor.call("GET", f"/v1/machines/{execution}")["id"] == resident.id


def test_neither_clock_of_the_guest_sees_the_sleep(resident):
    before = torpor.fetch(resident.url())
    pause(resident)
    time.sleep(5)
    host_before = time.time()
    after = torpor.fetch(resident.url())
    assert was_resident(resident)
    assert host_before - 0.05 <= after["wall"] <= time.time() + 0.05
    awake = after["wall"] - before["wall"] - 5
    assert 0 < after["monotonic"] - before["monotonic"] < awake + 1
    # Its timers go on, too.
    begun = time.time()
    resident.sh("sleep 2")
    assert 1.9 < time.time() - begun < 8


def test_the_machine_that_was_paused_longest_ago_makes_room(resident, machine_factory):
    state = torpor.fetch(resident.url("/check"))
    _, first = pause(resident)
    others = [machine_factory() for _ in range(2)]
    pids = [pause(other)[1] for other in others]
    torpor.wait_for(lambda: not lives(first), "the first VMM ends")
    assert all(lives(pid) for pid in pids)
    wake_and_check(resident, state)
    assert not was_resident(resident)
    assert others[1].sh("echo here").strip() == "here"
    assert was_resident(others[1])


def test_a_vmm_is_kept_no_longer_than_configured_and_none_that_is_too_large(configured, counter):
    configured(resident_mem_mib=600, resident_s=3)
    state = torpor.fetch(counter.url("/check"))
    execution, pid = pause(counter)
    assert lives(pid)
    directory = torpor.EXECUTIONS / execution
    torpor.wait_for(lambda: not lives(pid) and not directory.exists(), "the VMM and its directory go", 30)
    state = wake_and_check(counter, state)
    assert not was_resident(counter)
    configured(resident_mem_mib=100)
    _, pid = pause(counter)
    assert not lives(pid)
    wake_and_check(counter, state)


def test_a_vmm_that_dies_asleep_costs_no_memory(resident):
    state = torpor.fetch(resident.url("/check"))
    _, pid = pause(resident)
    os.kill(pid, signal.SIGKILL)
    torpor.wait_for(lambda: not lives(pid), "the VMM is gone")
    assert resident.status() == "paused"
    wake_and_check(resident, state)
    assert not was_resident(resident)


def test_torpord_that_dies_meanwhile_or_is_restarted_costs_no_memory(resident, configured):
    state = torpor.fetch(resident.url("/check"))
    _, pid = pause(resident)
    torpor.kill_torpord()
    assert resident.status() == "paused"
    state = wake_and_check(resident, state)
    _, pid = pause(resident)
    configured(resident_mem_mib=600, resident_s=600)
    assert not lives(pid), "a torpord that ends leaves no VMM of a machine that sleeps"
    wake_and_check(resident, state)


def test_whatever_else_is_done_with_it_finds_its_files_as_they_should_be(resident, machine_factory):
    state = torpor.fetch(resident.url("/check"))
    _, pid = pause(resident)
    snapshot = resident.snapshot()
    fork = machine_factory(snapshot=snapshot["id"], services=[{"port": torpor.SERVICE_PORT}])
    assert wake_and_check(fork, state)["count"] == state["count"] + 1
    state = wake_and_check(resident, state)
    assert was_resident(resident)
    # The image is the snapshot's now, too, so this pause writes another one.
    pause(resident)
    state = wake_and_check(resident, state)
    assert wake_and_check(machine_factory(snapshot=snapshot["id"], services=[{"port": torpor.SERVICE_PORT}]),
                          {**state, "count": state["count"] - 2})
    _, pid = pause(resident)
    resident.resume(**{"from": "disk"})
    assert not lives(pid)
    assert resident.sh("cat /workspace/disk-nonce") == state["nonce"]
    _, pid = pause(resident)
    assert lives(pid)
    torpor.call("DELETE", f"/v1/machines/{resident.id}")
    assert not lives(pid) and not resident.directory.exists()
