"""The examples of docs/api.md, run in their order as a reader would run them."""
import contextlib
import io
import os
import pathlib
import re
import subprocess

import pytest
import torpor

PAGE = (pathlib.Path(__file__).parent.parent / "docs/api.md").read_text()
# What the page says that `curl` stands for; an answer that is an error fails the example.
STANDS_FOR = re.search(r"`curl` stands for `curl ([^`]+)`", PAGE)[1]
CURL = f'curl() {{ command curl --silent --show-error --fail-with-body {STANDS_FOR} "$@"; }}\n'


def blocks():
    """(language, code, the heading above) of every block; without a language it is shell."""
    heading = ""
    for part in re.finditer(r"^## ([^\n]+)$|^```(\w*)\n(.*?)^```$", PAGE, re.M | re.S):
        if part[1]:
            heading = part[1]
        else:
            yield part[2] or "sh", part[3], heading


def checked(call):
    """The page's `call`, which returns an error like any other answer."""
    def checked_call(*request):
        answer = call(*request)
        assert not {"error", "code"} <= set(answer or ()), f"{request}: {answer}"
        return answer
    return checked_call


@pytest.fixture
def machines_of_the_page():
    before = {machine["id"] for machine in torpor.call("GET", "/v1/machines")["machines"]}
    yield
    for machine in torpor.call("GET", "/v1/machines")["machines"]:
        if machine["id"] not in before:
            torpor.call("DELETE", f"/v1/machines/{machine['id']}")
    for snapshot in torpor.call("GET", "/v1/snapshots")["snapshots"]:
        if snapshot.get("name") == "ready":
            torpor.call("DELETE", f"/v1/snapshots/{snapshot['id']}")


def test_every_example_of_the_page_runs(machines_of_the_page, tmp_path):
    (tmp_path / "notes.txt").write_text("remember the milk\n")
    names, n_run = {}, 0
    for language, code, heading in blocks():
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(code, f"docs/api.md, {heading or 'introduction'}", "exec"), names)
            if not heading:
                names["call"] = checked(names["call"])
        else:
            done = subprocess.run(["sh", "-ec", CURL + code], cwd=tmp_path, env=os.environ,
                                  capture_output=True, text=True, timeout=240, check=False)
            assert done.returncode == 0, f"{heading}: {code}{done.stdout}{done.stderr}"
        n_run += 1
    assert n_run >= 15, "the page has lost its examples"
