"""The run: rounds in which the systems take turns; bursts; requests in the middle of persisting."""
import concurrent.futures
import json
import os
import platform
import statistics
import sys
import threading
import time

from wakebench import counters, lasting
from wakebench.firecracker_side import FirecrackerSide
from wakebench.guests import GUESTS
from wakebench.torpor_side import TorporSide, server_timing

# A wake that reads more than this from the disk did not find its image in the page cache.
NOT_HOT_BYTES = 1 << 20
# What of a machine that sleeps may be kept besides its image.
KEPT = ("resident", "dozing")


def host_facts():
    with open("/proc/cpuinfo") as file:
        model = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    return {"kind": "host", "kernel": platform.release(), "cpu": model, "cores": os.cpu_count(),
            "mem_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20,
            "clock": "client's monotonic clock, connect to first byte", "unix_time": int(time.time())}


class Recorder:
    """Keeps the samples and writes each as it comes."""

    def __init__(self, path):
        self.samples, self.file = [], open(path, "w") if path else None

    def add(self, sample):
        self.samples.append(sample)
        if self.file:
            self.file.write(json.dumps(sample) + "\n")
            self.file.flush()

    def say(self, text):
        print(text, file=sys.stderr, flush=True)


def measure(options):
    recorder, guest = Recorder(options.out), GUESTS[options.guest]
    recorder.add({**host_facts(), "guest": options.guest, "rounds": options.rounds})
    sides = []
    try:
        recorder.say(f"starting the {options.guest} guest under Torpor")
        sides.append(TorporSide(guest))
        handlers = [os.path.abspath(handler) for handler in options.firecracker_uffd]
        ways = ("paused",) if options.cache == "resident" else ("fresh", "prestarted", "full", *handlers)
        for how in ways if options.firecracker else ():
            recorder.say(f"starting the same guest under Firecracker ({how})")
            sides.append(FirecrackerSide(guest, os.path.abspath(options.firecracker), how))
        # From here on whoever does not have its turn is asleep, so that no guest measures the others' idling.
        caches = ("hot", "cold") if options.cache == "both" else (options.cache,)
        for side in sides:
            put_to_sleep(recorder, side, caches[0])
        for cache in caches:
            for number in range(options.rounds):
                for side in sides:
                    one_cycle(recorder, side, cache, options.warm, options.asleep)
                recorder.say(f"{cache} round {number + 1} of {options.rounds}")
        if counters.SystemCalls.is_possible():
            recorder.add(sides[0].wake_counted(count_calls=True))
        else:
            recorder.say("this kernel does not trace system calls: none counted")
        if options.mid_persist:
            for _ in range(options.rounds):
                mid_persist(recorder, sides[0])
    finally:
        for side in sides:
            side.close()
    for count in options.burst:
        burst(recorder, guest, count)
    if options.cycles:
        lasting.cycles(recorder, guest, options.cycles)
    if options.clones:
        lasting.clones(recorder, guest, options.clones)
    return recorder.samples


def warm_median_ms(side, count):
    return statistics.median(side.request() for _ in range(count)) * 1e3


def put_to_sleep(recorder, side, cache):
    recorder.add({**side.pause(stays=cache == "resident"), "cache": cache})


def one_cycle(recorder, side, cache, warm_requests, asleep_s=0):
    """Of a machine that sleeps: a wake, warm requests to compare it with, and a pause."""
    if cache == "cold":
        side.evict()
    # Machines sleep for a while: what the wake before left to be made, and what the pause left to be torn down, is over.
    time.sleep(asleep_s)
    sample = side.wake_counted()
    woken_from = sample.get("detail", {}).get("stages", {}).get("from")
    if woken_from not in (None, cache if cache in KEPT else "image"):
        raise RuntimeError(f"the machine was woken from {woken_from} in a {cache} round: "
                           "see limits.resident_mem_mib and limits.dozing in /etc/torpor/torpord.toml")
    warm = warm_median_ms(side, warm_requests)
    from_disk = sample.get("costs", {}).get("vmm", {}).get("disk_read_bytes", 0)
    is_lost = cache == "hot" and from_disk > NOT_HOT_BYTES
    if is_lost:
        recorder.say(f"{from_disk >> 20} MiB had to come from the disk: the images of this run do not fit into memory")
    recorder.add({**sample, "cache": "lost" if is_lost else cache, "warm_ms": warm, "overhead_ms": sample["wake_ms"] - warm})
    put_to_sleep(recorder, side, cache)


def mid_persist(recorder, side):
    """A request while the image is being written: the intact VM has to answer at once."""
    warm = warm_median_ms(side, 8)
    side.machine.sh("dd if=/dev/urandom of=/dev/shm/churn bs=1M count=48 status=none")
    pid = side.machine.vmm_pid()
    pause = threading.Thread(target=_pause_quietly, args=(side,))
    pause.start()
    while not side.is_persisting(pid) and pause.is_alive():
        time.sleep(.0005)
    elapsed, answer = side.answer()
    pause.join()
    recorder.add({"kind": "mid-persist", "system": side.name, "warm_ms": warm, "wake_ms": elapsed * 1e3,
                  "stages_ms": server_timing(answer), "status": side.machine.status()})


def _pause_quietly(side):
    try:
        side.machine.pause()
    except Exception as error:  # a pause that a request overtakes is refused, which is what is wanted here
        print(f"pause overtaken: {error}", file=sys.stderr)


def burst(recorder, guest, count):
    """Machines that sleep, each with an image of its own, woken at once."""
    recorder.say(f"burst of {count}: starting the machines")
    sides = [TorporSide(guest)]
    try:
        snapshot = sides[0].machine.snapshot()
        for number in range(count):
            if number:
                sides.append(TorporSide(guest, snapshot["id"]))
            put_to_sleep(recorder, sides[-1], "hot")
            one_cycle(recorder, sides[-1], "hot", 1)
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            start = time.monotonic()
            samples = list(pool.map(lambda side: side.wake(), sides))
            whole = time.monotonic() - start
        for sample in samples:
            recorder.add({**sample, "kind": "burst", "concurrency": count, "whole_ms": whole * 1e3})
    finally:
        for side in sides:
            side.close()
