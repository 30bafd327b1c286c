"""Fixtures of the end-to-end tests. They need the virtual host (or a bare-metal one) and fail without it."""
import pytest
import torpor


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
