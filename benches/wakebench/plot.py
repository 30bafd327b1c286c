"""The stages of the median wake as an SVG bar per system."""
import statistics

# Sums of the other stages.
SUMS = {"torpor-wake", "wake"}
COLOURS = ["#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#bbbbbb"]
WIDTH, ROW, LEFT = 900, 46, 190


def median_stages(samples, system):
    """Ordered (stage, median ms) pairs; what no stage names is 'guest and network'."""
    wakes = [s for s in samples if s.get("kind") == "wake" and s["system"] == system and s.get("cache") == "hot"]
    names = list(dict.fromkeys(name for wake in wakes for name in wake["stages_ms"] if name not in SUMS))
    stages = [(name, statistics.median(wake["stages_ms"].get(name, 0) for wake in wakes)) for name in names]
    whole = statistics.median(wake["wake_ms"] for wake in wakes)
    return [*stages, ("guest and network", max(0, whole - sum(ms for _, ms in stages)))]


def write_stages(samples, path):
    systems = list(dict.fromkeys(s["system"] for s in samples if s.get("kind") == "wake" and s.get("cache") == "hot"))
    rows = [(system, median_stages(samples, system)) for system in systems]
    longest = max(sum(ms for _, ms in stages) for _, stages in rows)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{ROW * len(rows) + 20}" '
             f'font-family="sans-serif" font-size="12">']
    for index, (system, stages) in enumerate(rows):
        y, x = 10 + index * ROW, LEFT
        parts.append(f'<text x="4" y="{y + 18}">{system}</text>')
        for number, (name, ms) in enumerate(stages):
            width = ms / longest * (WIDTH - LEFT - 80)
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="26" '
                         f'fill="{COLOURS[number % len(COLOURS)]}"><title>{name}: {ms:.1f} ms</title></rect>')
            if width > 60:
                parts.append(f'<text x="{x + 3:.1f}" y="{y + 17}" fill="#fff">{name[:int(width / 7)]}</text>')
            x += width
        parts.append(f'<text x="{x + 4:.1f}" y="{y + 17}">{sum(ms for _, ms in stages):.0f} ms</text>')
    with open(path, "w") as file:
        file.write("\n".join([*parts, "</svg>", ""]))
