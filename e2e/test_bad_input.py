"""Every bad request is a 4xx with a stable code, and loses nothing."""
import http.client
import json

import pytest
import torpor

CREATE_REFUSALS = [
    ({"unknown": 1}, "invalid_request"),
    ({"vcpus": 0}, "invalid_request"),
    ({"vcpus": 9}, "invalid_request"),
    ({"vcpus": -1}, "invalid_request"),
    ({"vcpus": "two"}, "invalid_request"),
    ({"mem_mib": 127}, "invalid_request"),
    ({"mem_mib": 1 << 40}, "invalid_request"),
    ({"disk_mib": 1}, "invalid_request"),
    ({"name": "../../etc/passwd"}, "invalid_request"),
    ({"name": "a" * 200}, "invalid_request"),
    ({"name": ""}, "invalid_request"),
    ({"template": "no-such"}, "template_not_found"),
    ({"template": "../base"}, "invalid_request"),
    ({"lease": {"seconds": -5, "action": "pause"}}, "invalid_request"),
    ({"lease": {"seconds": 0, "action": "pause"}}, "invalid_request"),
    ({"lease": {"seconds": 10, "action": "explode"}}, "invalid_request"),
    ({"lease": {"seconds": 10, "action": "destroy"}, "wake": {"http": True}}, "auto_resume_needs_pause"),
    ({"services": [{"port": 0}]}, "invalid_request"),
    ({"services": [{"port": 70000}]}, "invalid_request"),
    ({"services": [{"port": 80}, {"port": 80}]}, "invalid_request"),
    ({"services": [{"port": port} for port in range(1, 80)]}, "invalid_request"),
    ({"metadata": {"k": "v" * 100_000}}, "invalid_request"),
]


def assert_shape(failure, code):
    assert 400 <= failure.status < 500, failure
    assert failure.code == code, failure
    assert set(failure.body) == {"error", "code", "retryable", "suggested_action", "request_id"}
    assert failure.body["request_id"] and failure.body["suggested_action"]


@pytest.mark.parametrize("spec,code", CREATE_REFUSALS)
def test_a_bad_create_is_refused_and_leaves_no_machine(spec, code):
    before = torpor.call("GET", "/v1/machines")["machines"]
    with pytest.raises(torpor.ApiFailure) as failure:
        torpor.call("POST", "/v1/machines", spec)
    assert_shape(failure.value, code)
    assert torpor.call("GET", "/v1/machines")["machines"] == before


@pytest.mark.parametrize("method,path,body,code", [
    ("POST", "/v1/machines", b"{", "invalid_request"),
    ("POST", "/v1/machines", b"[]", "invalid_request"),
    ("POST", "/v1/machines", b"\xff\xfe", "invalid_request"),
    ("POST", "/v1/machines", b'{"metadata":{"a":"' + b"x" * (2 << 20) + b'"}}', "body_too_large"),
    ("GET", "/v1/machines/mch_nope", None, "machine_not_found"),
    ("GET", "/v1/machines/..%2f..%2fetc%2fpasswd", None, "machine_not_found"),
    ("DELETE", "/v1/machines/%00", None, "machine_not_found"),
    ("GET", "/v1/no/such/route", None, "route_not_found"),
    ("PUT", "/v1/machines", None, "method_not_allowed"),
    ("GET", "/v1/machines?limit=-1", None, "invalid_request"),
], ids=lambda value: value[:40] if isinstance(value, str) else "body")
def test_a_bad_request_has_a_stable_code(method, path, body, code):
    with pytest.raises(torpor.ApiFailure) as failure:
        torpor.call(method, path, body)
    assert_shape(failure.value, code)


def tcp(headers):
    connection = http.client.HTTPConnection("127.0.0.1", 7070, timeout=30)
    connection.request("GET", "/v1/machines", headers=headers)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic abc"},
                                     {"Authorization": "Bearer "}])
def test_tcp_needs_the_token(headers):
    status, body = tcp(headers)
    assert (status, body["code"]) == (401, "unauthorized")


def test_tcp_with_the_token_answers():
    token = open("/etc/torpor/token").read().strip()
    assert tcp({"Authorization": f"Bearer {token}"})[0] == 200


def test_names_are_unique_and_exec_is_checked(machine_factory):
    machine = machine_factory(name="only-one")
    with pytest.raises(torpor.ApiFailure) as failure:
        torpor.call("POST", "/v1/machines", {"name": "only-one"})
    assert_shape(failure.value, "name_conflict")
    for body in ({}, {"argv": ["a"], "shell": "b"}, {"argv": ["a"], "bogus": 1}, {"argv": ["x" * 300_000]}):
        with pytest.raises(torpor.ApiFailure) as failure:
            torpor.call("POST", f"/v1/machines/{machine.id}/exec", body)
        assert_shape(failure.value, "invalid_request")
    with pytest.raises(torpor.ApiFailure) as failure:
        machine.exec("/no/such/program")
    assert (failure.value.status, failure.value.code) == (502, "exec_failed")
    with pytest.raises(torpor.ApiFailure) as failure:
        machine.exec("sleep", "60", timeout_ms=500)
    assert (failure.value.status, failure.value.code) == (504, "exec_timeout")
    assert machine.exec("sh", "-c", "exit 7")["exit_code"] == 7
