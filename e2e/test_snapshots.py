"""Snapshots and forks of a real guest: memory and disk of one instant, the source unaffected, identities distinct."""
import subprocess

import pytest
import torpor
from torpor import SERVICE_PORT, ApiFailure, Machine, call, fetch

STATE = torpor.STATE_DIR / "snapshots"


def adopt(info):
    machine = Machine.__new__(Machine)
    machine.info, machine.id = info, info["id"]
    return machine


@pytest.fixture(scope="module")
def source():
    machine = Machine(services=[{"port": SERVICE_PORT}])
    machine.start_counter()
    yield machine
    machine.delete()


@pytest.fixture(scope="module")
def snapshot(source):
    """Taken when the counter stood at what `at` says."""
    at = fetch(source.url("/check"))
    before = source.get()
    taken = call("POST", f"/v1/machines/{source.id}/snapshots", {"name": "e2e", "digest": "e2e-digest"})
    after = source.get()
    assert taken["status"] == "ready" and taken["size_bytes"] > 1 << 20
    assert (after["status"], after["execution_id"]) == ("running", before["execution_id"])
    assert taken["execution_id"] == before["execution_id"]
    source.sh("echo later > /workspace/later; sync")
    assert fetch(source.url("/check"))["count"] == at["count"] + 1
    return taken, at


def check_goes_on(machine, at):
    state = fetch(machine.url("/check"))
    assert state["count"] == at["count"] + 1, "the counter did not go on at the snapshot's instant"
    assert (state["nonce"], state["pid"]) == (at["nonce"], at["pid"])
    assert state["tmpfs"] == state["disk"] == at["nonce"]
    assert machine.exec("cat", "/workspace/later")["exit_code"] != 0, "the disk is of another instant"


def test_a_machine_goes_on_from_a_snapshot_and_the_source_does_not_notice(source, snapshot):
    taken, at = snapshot
    other = Machine(snapshot="e2e", services=[{"port": SERVICE_PORT}])
    try:
        assert other.get()["snapshot_id"] == taken["id"] and other.id != source.id
        check_goes_on(other, at)
        # Its first pause makes the image its own.
        other.pause()
        assert fetch(other.url())["count"] == at["count"] + 2
        assert abs(float(other.sh("date +%s.%N")) - float(subprocess.check_output(["date", "+%s.%N"]))) < 2
    finally:
        other.delete()
    assert fetch(source.url())["nonce"] == at["nonce"]


def test_the_same_digest_answers_the_same_snapshot_and_a_restart_keeps_it(source, snapshot):
    taken, at = snapshot
    again = call("POST", f"/v1/machines/{source.id}/snapshots", {"digest": "e2e-digest"})
    assert again["id"] == taken["id"]
    found = call("GET", "/v1/snapshots?digest=e2e-digest")["snapshots"]
    assert [one["id"] for one in found] == [taken["id"]]
    torpor.kill_torpord()
    assert source.status() == "running"
    other = Machine(snapshot=taken["id"], services=[{"port": SERVICE_PORT}])
    try:
        check_goes_on(other, at)
    finally:
        other.delete()


def test_forks_have_distinct_randomness_and_their_own_disk(source):
    command = "cat /proc/sys/kernel/random/uuid; head -c 16 /dev/urandom | od -An -tx1; python3 -c 'import uuid; print(uuid.uuid4())'"
    before = fetch(source.url())["count"]
    forked = call("POST", f"/v1/machines/{source.id}/fork", {"count": 3})
    forks = [adopt(info) for info in forked["machines"]]
    try:
        assert len({machine.id for machine in [source, *forks]}) == 4
        lines = [machine.sh(command).split("\n") for machine in [source, *forks]]
        for column in range(3):
            assert len({line[column] for line in lines}) == 4, lines
        for number, machine in enumerate(forks):
            assert fetch(machine.url())["count"] == before + 1
            machine.sh(f"echo {number} > /workspace/own; sync")
        assert [machine.sh("cat /workspace/own").strip() for machine in forks] == ["0", "1", "2"]
        assert source.exec("cat", "/workspace/own")["exit_code"] != 0
        assert fetch(source.url())["count"] == before + 1
    finally:
        for machine in forks:
            machine.delete()


def test_a_paused_machine_is_not_woken_by_its_snapshot(source):
    count = fetch(source.url())["count"]
    source.pause()
    wakes = source.get()["wakes"]
    taken = call("POST", f"/v1/machines/{source.id}/snapshots", {})
    assert (source.status(), source.get()["wakes"]) == ("paused", wakes)
    assert "execution_id" not in taken
    image = torpor.STATE_DIR / "machines" / source.id / "memory.img"
    assert image.stat().st_nlink >= 2
    assert fetch(source.url())["count"] == count + 1
    # The next pause leaves the snapshot's image alone.
    source.pause()
    assert image.stat().st_nlink == 1
    other = Machine(snapshot=taken["id"], services=[{"port": SERVICE_PORT}])
    try:
        assert fetch(other.url())["count"] == count + 1
    finally:
        other.delete()
    call("DELETE", f"/v1/snapshots/{taken['id']}")
    assert not (STATE / taken["id"]).exists()


def test_a_deleted_snapshot_is_gone_and_its_machines_are_not(source, snapshot):
    taken, at = snapshot
    other = Machine(snapshot=taken["id"], services=[{"port": SERVICE_PORT}])
    try:
        call("DELETE", f"/v1/snapshots/{taken['id']}")
        with pytest.raises(ApiFailure) as refused:
            call("GET", f"/v1/snapshots/{taken['id']}")
        assert refused.value.code == "snapshot_not_found"
        with pytest.raises(ApiFailure) as refused:
            Machine(snapshot=taken["id"])
        assert refused.value.code == "snapshot_not_found"
        other.pause()
        check_goes_on(other, at)
    finally:
        other.delete()
    assert not (STATE / taken["id"]).exists()
