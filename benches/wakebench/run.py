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
from wakebench.torpor_side import TorporSide


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
        for prestarted in (False, True) if options.firecracker else ():
            recorder.say(f"starting the same guest under Firecracker ({'pre-started' if prestarted else 'fresh'})")
            sides.append(FirecrackerSide(guest, os.path.abspath(options.firecracker), prestarted))
        for cache in ("hot", "cold") if options.cache == "both" else (options.cache,):
            for number in range(options.rounds):
                for side in sides:
                    one_cycle(recorder, side, cache, options.warm, options.asleep)
                recorder.say(f"{cache} round {number + 1} of {options.rounds}")
        if counters.SystemCalls.is_possible():
            sides[0].pause()
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


def one_cycle(recorder, side, cache, warm_requests, asleep_s=0):
    warm = warm_median_ms(side, warm_requests)
    recorder.add({**side.pause(), "cache": cache})
    if cache == "cold":
        side.evict()
    # Machines sleep for a while: what the wake before left to be made, and what this pause left to be torn down, is over.
    time.sleep(asleep_s)
    sample = side.wake_counted()
    recorder.add({**sample, "cache": cache, "warm_ms": warm, "overhead_ms": sample["wake_ms"] - warm})


def mid_persist(recorder, side):
    """A request while the image is being written: the intact VM has to answer at once."""
    warm = warm_median_ms(side, 8)
    side.machine.sh("dd if=/dev/urandom of=/dev/shm/churn bs=1M count=48 status=none")
    pause = threading.Thread(target=_pause_quietly, args=(side,))
    pause.start()
    while side.machine.status() != "pausing" and pause.is_alive():
        pass
    elapsed = side.request() * 1e3
    pause.join()
    recorder.add({"kind": "mid-persist", "system": side.name, "warm_ms": warm, "wake_ms": elapsed,
                  "status": side.machine.status()})


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
            one_cycle(recorder, sides[-1], "hot", 1)
            sides[-1].pause()
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            start = time.monotonic()
            samples = list(pool.map(lambda side: side.wake(), sides))
            whole = time.monotonic() - start
        for sample in samples:
            recorder.add({**sample, "kind": "burst", "concurrency": count, "whole_ms": whole * 1e3})
    finally:
        for side in sides:
            side.close()
