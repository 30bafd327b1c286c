"""What must not be lost: torpord killed, a VMM killed, a full disk, a flipped bit, a guest that ends."""
import contextlib
import os
import pathlib
import random
import subprocess
import threading
import time

import pytest
import torpor


def answers(machine):
    """The machine's state in RAM, through whatever it takes; None while it can't be had."""
    with contextlib.suppress(OSError, torpor.ApiFailure):
        return torpor.fetch(machine.url("/check"))


def in_background(function):
    def quietly():
        with contextlib.suppress(Exception):
            function()
    thread = threading.Thread(target=quietly)
    thread.start()
    return thread


def assert_same_life(machine, before):
    after = torpor.wait_for(lambda: answers(machine), "the machine answers", 60)
    assert after["nonce"] == before["nonce"] == after["tmpfs"], "the memory is not the one that slept"
    assert after["count"] > before["count"]
    assert machine.status() == "running"
    return after


def vmm_pid(machine):
    """PID of the VMM that runs a machine; a scope of its own must hold it, or it would die with torpord."""
    pid = machine.vmm_pid()
    cgroup = pathlib.Path(f"/proc/{pid}/cgroup").read_text()
    assert "/torpor-vmm-" in cgroup and ".scope" in cgroup, cgroup
    return pid


def running_vmms():
    """PIDs of VMMs that run a machine; blank ones of the pool are not among them."""
    return {torpor.vmm_pid(record.parent.name) for record in torpor.EXECUTIONS.glob("exe_*/execution.json")}


def test_killing_torpord_leaves_running_machines_running(counter):
    before, execution = torpor.fetch(counter.url("/check")), counter.get()["execution_id"]
    pid = vmm_pid(counter)
    torpor.kill_torpord()
    assert counter.status() == "running"
    assert counter.get()["execution_id"] == execution and vmm_pid(counter) == pid
    assert_same_life(counter, before)
    counter.pause()
    assert_same_life(counter, before)


@pytest.mark.parametrize("delay_ms", [0, 100, 800, 2000])
def test_killing_torpord_while_pausing_loses_nothing(counter, delay_ms):
    before = torpor.fetch(counter.url("/check"))
    pause = in_background(counter.pause)
    time.sleep(delay_ms / 1000)
    torpor.kill_torpord()
    pause.join()
    assert counter.status() in ("running", "paused")
    assert_same_life(counter, before)
    counter.pause()
    assert counter.status() == "paused"
    assert_same_life(counter, before)


@pytest.mark.parametrize("delay_ms", [0, 100, 800])
def test_killing_torpord_while_waking_loses_nothing(counter, delay_ms):
    before = torpor.fetch(counter.url("/check"))
    counter.pause()
    wake = in_background(lambda: torpor.fetch(counter.url()))
    time.sleep(delay_ms / 1000)
    torpor.kill_torpord()
    wake.join()
    assert counter.status() in ("running", "paused")
    assert_same_life(counter, before)


def test_a_lease_that_ends_while_torpord_is_down_fires_late(counter):
    torpor.call("PUT", f"/v1/machines/{counter.id}/lease", {"lease": {"seconds": 4, "action": "pause"}})
    subprocess.run(["systemctl", "stop", "torpord"], check=True)
    time.sleep(5)
    subprocess.run(["systemctl", "start", "torpord"], check=True)
    torpor.wait_for_torpord()
    torpor.wait_for(lambda: counter.status() == "paused", "the lease fires after the restart")


@contextlib.contextmanager
def nearly_full_disk(leave_bytes):
    filler = torpor.STATE_DIR / "filler"
    space = os.statvfs(torpor.STATE_DIR)
    with open(filler, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, space.f_bavail * space.f_frsize - leave_bytes)
    try:
        yield
    finally:
        filler.unlink()


def test_a_full_disk_fails_the_pause_and_the_machine_runs_on(counter):
    before = torpor.fetch(counter.url("/check"))
    with nearly_full_disk(leave_bytes=6 << 20):
        with pytest.raises(torpor.ApiFailure) as failure:
            counter.pause()
        assert (failure.value.status, failure.value.code) == (507, "disk_full")
        assert counter.status() == "running"
        assert counter.get()["last_error"]["code"] == "disk_full"
        before = assert_same_life(counter, before)
    counter.pause()
    assert counter.status() == "paused" and "last_error" not in counter.get()
    assert_same_life(counter, before)


def flip_bit(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << random.randrange(8)]))


def offset_of(path, needle):
    """Where a text stands in a large file."""
    output = subprocess.run(["grep", "-abo", "-m", "1", needle, path], capture_output=True, check=True).stdout
    return int(output.split(b":")[0])


def test_a_flipped_bit_in_guest_memory_never_reaches_the_guest(machine_factory):
    machine = machine_factory(services=[{"port": torpor.SERVICE_PORT}])
    before = machine.start_counter(pattern_mib=16)
    machine.pause()
    image = machine.directory / "memory.img"
    flip_bit(image, offset_of(image, f"TORPOR-PATTERN-{before['nonce']}") + 48)
    status, _, body = torpor.request(machine.url("/check"))
    assert status in (500, 502), (status, body)
    torpor.wait_for(lambda: machine.get().get("last_error", {}).get("code") == "image_corrupt", "the cause is told")
    assert machine.status() in ("stopped", "paused")
    machine.resume(**{"from": "disk"})
    assert machine.status() == "running"
    assert machine.sh("cat /workspace/disk-nonce") == before["nonce"], "the disk is still there"


@pytest.mark.parametrize("offset", [0, 20, 4096 + 100])
def test_a_flipped_bit_in_header_or_state_refuses_the_wake(counter, offset):
    counter.pause()
    flip_bit(counter.directory / "memory.img", offset)
    status, _, body = torpor.request(counter.url())
    assert status == 500 and b'"image_corrupt"' in body, (status, body)
    assert counter.status() == "paused"
    with pytest.raises(torpor.ApiFailure) as failure:
        counter.resume()
    assert failure.value.code == "image_corrupt"


def test_a_killed_vmm_is_reported_and_boots_from_its_disk(counter):
    counter.sh("echo kept > /workspace/kept && sync")
    os.kill(vmm_pid(counter), 9)
    torpor.wait_for(lambda: counter.status() == "stopped", "the loss is seen")
    assert counter.events("machine.memory_lost")
    counter.resume(**{"from": "disk"})
    assert counter.sh("cat /workspace/kept") == "kept\n"


def test_guest_shutdown_stops_and_guest_reboot_boots_again(counter):
    counter.exec("sh", "-c", "kill -TERM 1", background=True)
    torpor.wait_for(lambda: counter.status() == "stopped", "the guest powers off")
    counter.resume(**{"from": "disk"})
    assert counter.status() == "running"


def test_a_paused_machine_leaves_no_process(counter):
    pid = vmm_pid(counter)
    assert pid in running_vmms()
    counter.pause()
    assert not running_vmms()
    assert not pathlib.Path(f"/proc/{pid}").exists()


def test_deleting_in_any_state_frees_everything(machine_factory):
    machine = machine_factory(services=[{"port": torpor.SERVICE_PORT}])
    machine.start_counter()
    machine.pause()
    machine.delete()
    assert not machine.directory.exists()
    other = machine_factory()
    pause = in_background(other.pause)
    torpor.call("DELETE", f"/v1/machines/{other.id}")
    pause.join()
    assert not other.directory.exists()
