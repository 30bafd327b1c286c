"""Images that lie over a template's: less to write, less room, and memory that machines share after they have slept."""
import pathlib

import torpor
from test_sleep_and_wake import wake_and_check

IMAGE, BASE = "memory.img", "memory.base"


def size(machine, name):
    return (machine.directory / name).stat().st_blocks * 512


def mapped_inodes(machine):
    """Files that the VMM of a running machine has mapped."""
    maps = pathlib.Path(f"/proc/{machine.vmm_pid()}/maps").read_text()
    return {int(line.split()[4]) for line in maps.splitlines()}


def test_machines_of_one_template_have_its_pages_once(machine_factory):
    # The first machine of a template leaves the image behind that later ones begin with.
    machine_factory()
    machines = [machine_factory(services=[{"port": torpor.SERVICE_PORT}]) for _ in range(2)]
    for machine in machines:
        machine.start_counter()
    states = [torpor.fetch(machine.url("/check")) for machine in machines]
    for machine in machines:
        machine.pause()
    first, second = (machine.directory / BASE for machine in machines)
    assert first.stat().st_ino == second.stat().st_ino
    for machine in machines:
        persist = machine.events("machine.paused")[-1]["detail"]["persist"]
        print(f"base {size(machine, BASE) / 1e6:.1f} MB, own image {size(machine, IMAGE) / 1e6:.1f} MB, "
              f"written by the first pause {persist['written_bytes'] / 1e6:.1f} MB")
        # What the guest changed, what lies close between, and the table: nothing of it twice.
        assert persist["written_bytes"] < size(machine, IMAGE) * 1.05
        assert size(machine, IMAGE) < persist["written_pages"] * 4096 * 1.3 + (4 << 20)
    for _ in range(2):
        states = [wake_and_check(machine, state) for machine, state in zip(machines, states)]
        base = first.stat().st_ino
        assert all(base in mapped_inodes(machine) for machine in machines), "a wake took nothing of the base"
        for machine in machines:
            machine.pause()
    both = torpor.disk_bytes(*(machine.directory for machine in machines))
    assert both < sum(torpor.disk_bytes(machine.directory) for machine in machines) - size(machines[0], BASE) / 2


def test_an_image_without_what_it_lies_over_is_not_woken_from(machine_factory):
    machine_factory()
    machine = machine_factory(services=[{"port": torpor.SERVICE_PORT}])
    machine.start_counter()
    state = torpor.fetch(machine.url("/check"))
    machine.pause()
    base, aside = machine.directory / BASE, machine.directory / "aside"
    base.rename(aside)
    status, _, body = torpor.request(machine.url())
    assert status == 500 and b'"image_corrupt"' in body, (status, body)
    assert machine.status() == "paused"
    aside.rename(base)
    machine.resume()
    wake_and_check(machine, state)
