"""The main job: sleep with memory, wake on the first request, again and again."""
import concurrent.futures
import time

import pytest
import torpor


def assert_same_life(before, after, host_before, host_after):
    """One process went on: its counter, its nonce in RAM, on tmpfs and on disk, and both clocks."""
    assert after["count"] == before["count"] + 1
    assert after["nonce"] == before["nonce"] == after["tmpfs"] == after["disk"]
    assert after["pid"] == before["pid"]
    assert after["pattern_ok"]
    assert host_before - 0.05 <= after["wall"] <= host_after + 0.05, "the wall clock is off by more than 50 ms"


def wake_and_check(machine, before):
    host_before = time.time()
    after = torpor.fetch(machine.url("/check"))
    assert_same_life(before, after, host_before, time.time())
    return after


def test_fifty_cycles_lose_nothing_and_do_not_grow(machine_factory):
    machine = machine_factory(mem_mib=256, services=[{"port": torpor.SERVICE_PORT}])
    machine.start_counter(pattern_mib=16)
    state = torpor.fetch(machine.url("/check"))
    size_at_two = None
    for cycle in range(1, 51):
        paused = machine.pause()
        assert paused["status"] == "paused", f"cycle {cycle}"
        assert "execution_id" not in paused
        state = wake_and_check(machine, state)
        if cycle == 2:
            size_at_two = torpor.disk_bytes(machine.directory)
    machine.pause()
    size_at_end = torpor.disk_bytes(machine.directory)
    print(f"image directory: {size_at_two >> 20} MiB after cycle 2, {size_at_end >> 20} MiB after cycle 50")
    # The guest itself touches a few more pages over time; a chain of diffs would be tens of times this.
    assert size_at_end <= size_at_two * 1.10, (size_at_two, size_at_end)


def test_the_monotonic_clock_does_not_count_the_sleep(counter):
    before = torpor.fetch(counter.url())
    counter.pause()
    time.sleep(5)
    host_before = time.time()
    after = torpor.fetch(counter.url())
    assert host_before - 0.05 <= after["wall"] <= time.time() + 0.05
    awake = after["wall"] - before["wall"] - 5
    assert 0 < after["monotonic"] - before["monotonic"] < awake + 1


def test_a_thousand_requests_cause_one_restore(counter):
    before = torpor.fetch(counter.url())
    counter.pause()
    url = counter.url()
    with concurrent.futures.ThreadPoolExecutor(1000) as pool:
        answers = list(pool.map(lambda _: torpor.fetch(url, timeout=240), range(1000)))
    counts = sorted(answer["count"] for answer in answers)
    assert counts == list(range(before["count"] + 1, before["count"] + 1001))
    assert {answer["nonce"] for answer in answers} == {before["nonce"]}
    assert len(counter.events("machine.woken")) == 1


def test_a_short_lease_pauses_and_a_request_wakes(machine_factory):
    machine = machine_factory(services=[{"port": torpor.SERVICE_PORT}])
    before = machine.start_counter()
    lease = torpor.call("PUT", f"/v1/machines/{machine.id}/lease", {"lease": {"seconds": 10, "action": "pause"}})
    assert 0 < lease["remaining_ms"] <= 10_000
    torpor.wait_for(lambda: machine.status() == "paused", "the lease pauses the machine", 60)
    status, headers, _ = torpor.request(machine.url())
    assert status == 200
    assert "torpor-wake;dur=" in headers["Server-Timing"]
    after = machine.get()
    assert after["status"] == "running"
    assert after["lease"]["seconds"] == 10, "the policy survives a wake"
    assert torpor.wait_for(lambda: machine.status() == "paused", "the lease begins anew after a wake", 60)
    assert torpor.fetch(machine.url())["nonce"] == before["nonce"]


def test_a_destroy_lease_deletes(machine_factory):
    machine = machine_factory(lease={"seconds": 1, "action": "destroy"})

    def gone():
        try:
            return machine.status() == "deleting" and None
        except torpor.ApiFailure as failure:
            return failure.code == "machine_not_found"
    torpor.wait_for(gone, "the lease destroys the machine")
    assert not machine.directory.exists()


def test_reads_never_wake(counter):
    counter.pause()
    torpor.call("GET", "/v1/machines")
    counter.get()
    counter.events()
    torpor.call("GET", f"/v1/machines/{counter.id}/logs?bytes=1000")
    torpor.call("GET", "/v1/healthz")
    assert counter.status() == "paused"


def test_wake_disabled_answers_503_as_documented(counter):
    torpor.call("PATCH", f"/v1/machines/{counter.id}/wake", {"http": False})
    counter.pause()
    status, headers, body = torpor.request(counter.url())
    assert status == 503
    assert headers["Retry-After"] == "5"
    assert b'"machine_paused_auto_resume_disabled"' in body
    assert counter.status() == "paused"
    torpor.call("PATCH", f"/v1/machines/{counter.id}/wake", {"http": True})
    assert torpor.fetch(counter.url())["count"] > 1


def test_every_id_stays_an_alias(counter):
    first = counter.get()["execution_id"]
    counter.pause()
    counter.resume()
    second = counter.get()["execution_id"]
    assert first != second
    for alias in (first, second, counter.id):
        assert torpor.call("GET", f"/v1/machines/{alias}")["id"] == counter.id
    counter.delete()
    for alias in (first, second, counter.id):
        with pytest.raises(torpor.ApiFailure) as failure:
            torpor.call("GET", f"/v1/machines/{alias}")
        assert failure.value.code == "machine_not_found"


def test_exec_wakes_a_paused_machine(counter):
    counter.pause()
    assert counter.sh("cat /dev/shm/nonce") == torpor.fetch(counter.url())["nonce"]


def test_request_bodies_and_heads_arrive_unchanged(counter):
    counter.pause()
    body = bytes(range(256)) * 4096
    status, _, text = torpor.request(counter.url("/a%2Fb?x=%20"), "POST", body, {"X-Odd": "a b", "Host": "h:1"})
    assert status == 200
    import json
    import zlib
    seen = json.loads(text)
    assert (seen["bytes"], seen["crc"]) == (len(body), zlib.crc32(body))
    assert ["Host", "h:1"] in seen["headers"] and ["X-Odd", "a b"] in seen["headers"]


@pytest.mark.parametrize("shape", [(1, 128), (2, 512), (4, 4096)])
def test_other_shapes_sleep_and_wake(machine_factory, shape):
    vcpus, mem_mib = shape
    machine = machine_factory(vcpus=vcpus, mem_mib=mem_mib, services=[{"port": torpor.SERVICE_PORT}])
    machine.start_counter(pattern_mib=8)
    assert int(machine.sh("nproc")) == vcpus
    state = torpor.fetch(machine.url("/check"))
    for _ in range(2):
        machine.pause()
        state = wake_and_check(machine, state)
