"""What must not grow: the thousandth cycle against the second, and ten awake clones against one."""
import os
import pathlib
import time

from wakebench import counters
from wakebench.torpor_side import TorporSide, torpor


def cycles(recorder, guest, count):
    """Pause and wake one machine `count` times; a sample for every cycle, with what torpord and the disk hold."""
    recorder.say(f"{count} cycles of one machine")
    side = TorporSide(guest)
    try:
        for number in range(1, count + 1):
            pause, wake = side.pause(), side.wake()
            recorder.add({"kind": "cycle", "system": side.name, "cycle": number, "pause_ms": pause["pause_ms"],
                          "wake_ms": wake["wake_ms"], "persisted_bytes": pause["persist"]["written_bytes"],
                          "image_bytes": torpor.disk_bytes(side.machine.directory), **torpord_holds()})
            if number % 100 == 0:
                recorder.say(f"cycle {number} of {count}")
    finally:
        side.close()


def torpord_holds():
    """Resident memory and open descriptors of torpord."""
    process = pathlib.Path("/proc", str(torpor.torpord_pid()))
    status = counters.kib_fields(process / "status")
    return {"torpord_rss_kib": status["VmRSS"], "torpord_fds": len(os.listdir(process / "fd"))}


def clones(recorder, guest, count):
    """Memory of one awake clone of a snapshot, and of `count` of them, each having answered a request after a wake: first from
    the snapshot's image, then each from one that it has written itself."""
    recorder.say(f"{count} clones of one snapshot")
    source = TorporSide(guest)
    made = []

    def add(image):
        # What the wake itself needed is given back by then.
        time.sleep(2)
        awake = [side for side in made if side.machine.status() == "running"]
        holds = [vmm_holds(side) for side in awake]
        recorder.add({"kind": "clones", "system": source.name, "image": image, "clones": len(awake),
                      "images_bytes": torpor.disk_bytes(*(side.machine.directory for side in made)),
                      **{name: sum(one[name] for one in holds) for name in holds[0]}})
    try:
        source.pause()
        source.wake()
        snapshot = source.machine.snapshot()
        source.pause()
        for _ in range(count):
            made.append(TorporSide(guest, snapshot["id"]))
            add("the snapshot's")
        for side in made:
            side.pause()
        for side in made:
            side.wake()
            side.pause()
        for side in made:
            side.wake()
            add("their own")
    finally:
        for side in [*made, source]:
            side.close()


def vmm_holds(side):
    """Memory of a machine's VMM in KiB: its share of what it maps, all of it, what is its alone, and what of that is
    not guest memory."""
    process = pathlib.Path("/proc", str(side.machine.vmm_pid()))
    kib = counters.kib_fields(process / "smaps_rollup")
    return {"pss_kib": kib["Pss"], "rss_kib": kib["Rss"], "private_kib": kib["Private_Dirty"] + kib["Private_Clean"],
            "vmm_private_kib": _private_outside_guest(process)}


def _private_outside_guest(process):
    """Guest memory is what is mapped from the image, and what is in neither forks nor dumps (`dc`, `dd`)."""
    total, private, path = 0, 0, ""
    for line in (process / "smaps").read_text().splitlines():
        words = line.split()
        if words[0] in ("Private_Clean:", "Private_Dirty:"):
            private += int(words[1])
        elif words[0] == "VmFlags:":
            is_guest = "memory." in path or {"dc", "dd"} <= set(words)
            total += 0 if is_guest else private
        elif not words[0].endswith(":"):
            private, path = 0, words[5] if len(words) > 5 else ""
    return total
