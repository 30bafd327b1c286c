"""Fixtures of the end-to-end tests. They need the virtual host (or a bare-metal one) and fail without it."""
import pathlib
import subprocess

import pytest
import torpor

CONFIG = pathlib.Path("/etc/torpor/torpord.toml")


def restart_with(text):
    CONFIG.write_text(text)
    subprocess.run(["systemctl", "restart", "torpord"], check=True)
    torpor.wait_for_torpord()


def configuring():
    before = CONFIG.read_text()

    def change(**limits):
        kept = [line for line in before.splitlines() if line.split(" = ")[0] not in limits]
        where = kept.index("[limits]") + 1
        kept[where:where] = [f"{key} = {value}" for key, value in limits.items()]
        restart_with("\n".join(kept) + "\n")
    yield change
    restart_with(before)


@pytest.fixture
def configured():
    """Restart torpord with these limits; the configuration as it was comes back at the end."""
    yield from configuring()


@pytest.fixture(scope="module")
def configured_for_all():
    """The same for all tests of a file: a restart takes some ten seconds in the virtual host."""
    yield from configuring()


@pytest.fixture
def machine_factory():
    made = []

    def make(**spec):
        machine = torpor.Machine(**spec)
        made.append(machine)
        return machine
    yield make
    for machine in made:
        machine.delete()


@pytest.fixture
def counter(machine_factory):
    """A running machine with counter.py on port 8080."""
    machine = machine_factory(services=[{"port": torpor.SERVICE_PORT}])
    machine.start_counter()
    return machine
