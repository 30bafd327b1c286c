"""A host with too little memory for its machines: they take turns, make room for each other, or are told so."""
import json
import time

import pytest
import sdk
import torpor

IDLE_S = 2


def test_machines_make_room_for_each_other_and_a_full_host_says_so(configured, counter, machine_factory):
    counter.pause()
    other = machine_factory(services=[{"port": torpor.SERVICE_PORT}])
    configured(max_running_mem_mib=300, pause_idle_after_s=IDLE_S)
    time.sleep(IDLE_S)
    assert torpor.fetch(counter.url())
    paused = torpor.wait_for(lambda: other.events("machine.paused"), "the other machine makes room")
    assert paused[0]["actor"] == "room"
    why = torpor.call("GET", f"/v1/machines/{other.id}/why")["because"]
    assert "to make room" in why, why

    configured(max_running_mem_mib=300, wake_timeout_s=3)
    assert counter.status() == "running"
    status, headers, body = torpor.request(other.url())
    answer = json.loads(body)
    assert (status, answer["code"], answer["retryable"]) == (503, "capacity_exceeded", True)
    assert int(headers["Retry-After"]) > 0
    with pytest.raises(torpor.ApiFailure, match="capacity_exceeded"):
        machine_factory()
    assert other.status() == "paused"
    counter.pause()
    assert other.sh("echo awake").strip() == "awake"


def test_both_sdks_are_told_in_their_own_words(configured):
    configured(max_running_mem_mib=300)
    sdk.use("nullspace")
    from nullspace import Machine
    from nullspace.errors import QuotaExceededError
    with pytest.raises(QuotaExceededError) as full:
        Machine.create(template="base", memory_mb=512)
    assert (full.value.code, full.value.retryable) == ("capacity_exceeded", True)
    sdk.use("morph")
    from morphcloud.api import ApiError, MorphCloudClient
    with pytest.raises(ApiError) as full:
        MorphCloudClient().instances.start("base")
    assert (full.value.status_code, full.value.error_code) == (503, "capacity_exceeded")
