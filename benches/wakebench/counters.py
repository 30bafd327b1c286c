"""What a wake costs besides time: processor time, page faults, bytes read, system calls."""
import collections
import os
import pathlib

TRACING = pathlib.Path("/sys/kernel/tracing")
SYS_IOCTL = 16


def vmm_pids():
    """All torpor-vmm processes, blank ones too."""
    return [int(entry.name) for entry in pathlib.Path("/proc").iterdir()
            if entry.name.isdigit() and _comm(entry) == "torpor-vmm"]


def _comm(process):
    try:
        return (process / "comm").read_text().strip()
    except OSError:
        return ""


def kib_fields(path):
    """The `Name:  123 kB` lines of a file of procfs."""
    found = (line.split() for line in path.read_text().splitlines())
    return {words[0][:-1]: int(words[1]) for words in found if words[-1] == "kB"}


def of_process(pid):
    """Counters of a process from its beginning: milliseconds on a processor, in the kernel's ticks, page faults that it
    took itself (KVM's and userfaultfd's for the guest are among them), bytes that it read from files and of those from
    the disk, reads. Nothing of one that has ended."""
    process = pathlib.Path("/proc", str(pid))
    try:
        stat = (process / "stat").read_text().rpartition(")")[2].split()
        io = dict(line.split(": ") for line in (process / "io").read_text().splitlines())
    except OSError:
        return {}
    return {"cpu_ms": (int(stat[11]) + int(stat[12])) * 1000 // os.sysconf("SC_CLK_TCK"),
            "minor_faults": int(stat[7]), "major_faults": int(stat[9]),
            "read_bytes": int(io["rchar"]), "disk_read_bytes": int(io["read_bytes"]), "reads": int(io["syscr"])}


def difference(after, before):
    return {name: value - before.get(name, 0) for name, value in after.items()}


class SystemCalls:
    """Counts the system calls of processes, and of threads that they start, by the kernel's own trace. It slows what it
    counts, so a wake that is counted is not one that is timed."""

    def __init__(self, pids):
        self.pids = pids

    @staticmethod
    def is_possible():
        return (TRACING / "events/raw_syscalls/sys_enter/enable").exists()

    def __enter__(self):
        self.threads = {int(task): pid for pid in self.pids for task in os.listdir(f"/proc/{pid}/task")}
        for name, value in (("tracing_on", 0), ("buffer_size_kb", 8192), ("options/event-fork", 1), ("trace", ""),
                            ("set_event_pid", " ".join(map(str, self.threads))),
                            ("events/raw_syscalls/sys_enter/enable", 1), ("tracing_on", 1)):
            (TRACING / name).write_text(str(value))
        return self

    def __exit__(self, *_):
        for name, value in (("tracing_on", 0), ("events/raw_syscalls/sys_enter/enable", 0), ("set_event_pid", "")):
            (TRACING / name).write_text(str(value))

    def stop(self):
        """So that what comes after the first byte is not counted."""
        (TRACING / "tracing_on").write_text("0")

    def counts(self, pid):
        """System calls of a process, and the ioctls among them; of threads that have ended, too."""
        numbers = collections.Counter()
        for line in (TRACING / "trace").read_text().splitlines():
            head, _, call = line.partition(" sys_enter: NR ")
            if call and self._process_of(int(head.split("[")[0].rpartition("-")[2])) == pid:
                numbers[int(call.split()[0])] += 1
        return {"syscalls": sum(numbers.values()), "ioctls": numbers[SYS_IOCTL]}

    def _process_of(self, thread):
        known = self.threads.get(thread)
        if known:
            return known
        # Begun since: whoever has it now.
        return next((pid for pid in self.pids if os.path.exists(f"/proc/{pid}/task/{thread}")), None)
