"""Torpor as the system under test: machines over the native API, requests through the proxy."""
import contextlib
import pathlib
import sys
import time

from wakebench import cache, counters
from wakebench.guests import first_byte

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "e2e"))
import torpor  # noqa: E402  (the tests' client)


def server_timing(answer):
    """Stages of a Server-Timing header in milliseconds."""
    stages = {}
    for line in answer.split(b"\r\n\r\n")[0].decode(errors="replace").split("\r\n"):
        name, _, value = line.partition(":")
        if name.lower() == "server-timing":
            for entry in value.split(","):
                key, _, duration = entry.strip().partition(";dur=")
                stages[key] = float(duration or 0)
    return stages


class TorporSide:
    """One machine that is paused and woken again and again."""
    name = "torpor"

    def __init__(self, guest, snapshot=None):
        self.guest, self.cycle, self.vmm = guest, 0, None
        kind = "http" if guest.answer.startswith(b"HTTP") else "tcp"
        services = [{"port": guest.port, "kind": kind}]
        if snapshot:
            self.machine = torpor.Machine(snapshot=snapshot, services=services)
        else:
            self.machine = torpor.Machine(mem_mib=guest.mem_mib, services=services)
            self._start_server()
        self.address = ("127.0.0.1", self.machine.service(guest.port)["listen_port"])
        torpor.wait_for(self._answers, "the guest's server answers", 300)

    def _start_server(self):
        if self.guest.prepare:
            self.machine.sh(self.guest.prepare, timeout_ms=600_000)
        self.machine.exec("sh", "-c", self.guest.command, background=True, timeout_ms=None)

    def _answers(self):
        try:
            return first_byte(self.address, self.guest, time.monotonic)
        except (OSError, RuntimeError):
            return None

    def is_persisting(self, pid):
        """Whether the machine's VMM `pid` writes its image now: a thread of that name does it."""
        names = pathlib.Path("/proc", str(pid), "task").glob("*/comm")
        return any(name.read_text() == "persist\n" for name in names)

    def answer(self):
        """Seconds to the first byte, and the answer."""
        return first_byte(self.address, self.guest, time.monotonic)

    def request(self):
        return self.answer()[0]

    def pause(self, stays=False):
        """Pause to durable; the sample says what it took and wrote. Whether the VMM `stays` is torpord's configuration."""
        self.vmm = self.machine.vmm_pid()
        start = time.monotonic()
        self.machine.pause()
        elapsed = time.monotonic() - start
        detail = self.machine.events("machine.paused")[-1]["detail"]
        persist = detail["persist"]
        return {"kind": "pause", "system": self.name, "cycle": self.cycle, "pause_ms": elapsed * 1e3,
                "freeze_ms": detail["freeze_us"] / 1e3, "written_bytes": persist["written_bytes"],
                "changed_bytes": persist["written_pages"] * 4096, **detail}

    def asleep(self):
        """What its VMM holds while it sleeps, if it has one, in KiB: memory that no file has, and page tables of the process."""
        process = pathlib.Path("/proc", str(self.vmm))
        if not process.exists():
            return {}
        kib = counters.kib_fields(process / "smaps_rollup") | counters.kib_fields(process / "status")
        return {"asleep_kib": {"anonymous": kib["Anonymous"], "page_tables": kib["VmPTE"]}}

    def evict(self):
        images = [self.machine.directory / name for name in ("memory.img", "memory.base")]
        cache.evict([image for image in images if image.exists()])

    def wake(self):
        """Wake it by a request; nothing else is done meanwhile."""
        self.cycle += 1
        elapsed, answer = first_byte(self.address, self.guest, time.monotonic)
        return {"kind": "wake", "system": self.name, "cycle": self.cycle, "wake_ms": elapsed * 1e3,
                "stages_ms": server_timing(answer)}

    def wake_counted(self, count_calls=False):
        """The same while nobody else does anything. The sample says what its VMM and torpord did for it up to the first
        byte, and, if the wake is one for counting and not for timing, their system calls."""
        n_told = len(self.machine.events("machine.first_byte"))
        asleep = self.asleep()
        torpord, blanks = torpor.torpord_pid(), counters.vmm_pids()
        before = {pid: counters.of_process(pid) for pid in [torpord, *blanks]}
        with counters.SystemCalls([torpord, *blanks]) if count_calls else contextlib.nullcontext() as calls:
            sample = self.wake()
            if calls:
                calls.stop()
            after = {pid: counters.of_process(pid) for pid in [torpord, *counters.vmm_pids()]}
            pid = self.machine.vmm_pid()
            costs = {name: counters.difference(after[of], before.get(of, {}))
                     for name, of in (("vmm", pid), ("torpord", torpord))}
            if calls:
                costs = {"vmm": costs["vmm"] | calls.counts(pid), "torpord": costs["torpord"] | calls.counts(torpord)}
        told = torpor.wait_for(lambda: self.machine.events("machine.first_byte")[n_told:], "the first byte is told of", 30)
        woken = self.machine.events("machine.woken")[-1]["detail"]
        return {**sample, **asleep, "kind": "counted wake" if count_calls else "wake", "pages": told[-1]["detail"].get("pages"),
                "cpu_ms": sum(cost["cpu_ms"] for cost in costs.values()), "costs": costs, "detail": woken}

    def close(self):
        self.machine.delete()
