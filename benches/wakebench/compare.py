"""Summaries and ratios of results."""
import json
import statistics


def load(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


def percentile(values, share):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def groups(samples, kind, field):
    """Values of a field by (system, cache), for samples of a kind that have it."""
    found = {}
    for sample in samples:
        if sample.get("kind") == kind and field in sample:
            found.setdefault((sample["system"], sample.get("cache", "")), []).append(sample[field])
    return found


ROWS = [("wake", "warm_ms"), ("wake", "wake_ms"), ("wake", "overhead_ms"), ("wake", "cpu_ms"), ("pause", "freeze_ms"),
        ("pause", "pause_ms"), ("pause", "written_bytes"), ("pause", "changed_bytes"), ("mid-persist", "wake_ms"), ("burst", "wake_ms")]


def print_summary(samples):
    host = samples[0]
    print(f"host: {host['cpu']}, {host['cores']} cores, Linux {host['kernel']}; guest: {host['guest']}")
    print(f"{'kind':<12}{'figure':<15}{'system':<25}{'cache':<6}{'n':>4}{'p50':>14}{'p95':>14}{'max':>14}")
    for kind, field in ROWS:
        for (system, cache), values in sorted(groups(samples, kind, field).items()):
            print(f"{kind:<12}{field:<15}{system:<25}{cache:<6}{len(values):>4}{statistics.median(values):>14.2f}"
                  f"{percentile(values, .95):>14.2f}{max(values):>14.2f}")
    print_counts(samples)
    print_lasting(samples)
    for field in ("overhead_ms", "freeze_ms"):
        kind = "wake" if field == "overhead_ms" else "pause"
        found = groups(samples, kind, field)
        for (system, cache), values in sorted(found.items()):
            ours = found.get(("torpor", cache))
            if system != "torpor" and ours:
                ratio = statistics.median(values) / max(statistics.median(ours), 1e-6)
                print(f"{field}, {cache}: Torpor is {ratio:.1f}x below {system}")


def print_counts(samples):
    """What the counted wake did, and the faults of the last timed one."""
    for sample in (sample for sample in samples if sample.get("kind") == "counted wake"):
        for name, cost in sample["costs"].items():
            print(f"a wake, {name}: {cost['syscalls']} system calls, {cost['ioctls']} of them ioctls; "
                  f"{cost['minor_faults']} minor and {cost['major_faults']} major faults; {cost['read_bytes']} bytes read, "
                  f"{cost['disk_read_bytes']} of them from the disk")
        if sample["pages"]:
            print(f"a wake, guest memory up to the first byte: {sample['pages']}")


# Cycles at either end that are compared. The first is left out: it has no working set.
ENDS = 10


def print_lasting(samples):
    """What the last cycles cost against the first ones, and what many clones hold against one."""
    cycles = [sample for sample in samples if sample.get("kind") == "cycle"]
    for field in (name for name in cycles[0] if name not in ("kind", "system", "cycle")) if cycles else ():
        first = statistics.median(sample[field] for sample in cycles[1:ENDS + 1])
        last = statistics.median(sample[field] for sample in cycles[-ENDS:])
        print(f"cycles 2-{ENDS + 1} against the last {ENDS} of {len(cycles)}: {field} {first:.1f} -> {last:.1f}")
    for count in sorted({sample["concurrency"] for sample in samples if sample.get("kind") == "burst"}):
        waits = [s["wake_ms"] for s in samples if s.get("kind") == "burst" and s["concurrency"] == count]
        alone = statistics.median(s["wake_ms"] for s in samples if s.get("kind") == "wake" and s["system"] == "torpor")
        share = percentile(waits, .99) / (alone * count / samples[0]["cores"])
        print(f"{count} woken at once: all answered, p99 {percentile(waits, .99):.0f} ms, "
              f"{share:.2f} of {count} single wakes on {samples[0]['cores']} cores")
    clones = [sample for sample in samples if sample.get("kind") == "clones"]
    # Samples of before there were layers are all of the snapshot's image.
    for image in dict.fromkeys(sample.get("image", "the snapshot's") for sample in clones):
        one, *_, many = [sample for sample in clones if sample.get("image", "the snapshot's") == image]
        for field in ("pss_kib", "rss_kib", "private_kib", "vmm_private_kib"):
            print(f"{many['clones']} awake clones against one, from {image} image: {field} {one[field]} -> {many[field]} "
                  f"({many[field] / one[field]:.1f}x)")


def print_ratios(old_path, new_path):
    """Medians of NEW over OLD for every figure that both have."""
    old, new = load(old_path), load(new_path)
    for kind, field in ROWS:
        before, after = groups(old, kind, field), groups(new, kind, field)
        for key in sorted(before.keys() & after.keys()):
            a, b = statistics.median(before[key]), statistics.median(after[key])
            print(f"{kind:<12}{field:<15}{key[0]:<25}{key[1]:<6}{a:>12.2f} -> {b:>12.2f}  x{b / a if a else 0:.3f}")
    return 0
