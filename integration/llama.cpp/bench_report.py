"""What bench.sh prints, from the JSON lines of llama-bench, each with the label "cold" or "loaded".

    bench_report.py lines RESULTS          each measurement in a line
    bench_report.py table RESULTS          Markdown: tokens a second and ratios to f16 and q4_0
    bench_report.py plot  RESULTS OUT.svg  decode speed against depth
"""
import json
import statistics
import sys


def read(path):
    """[(test, depth, label, type, tokens a second)]; a test is "pp128" or "tg32"."""
    with open(path) as lines:
        for line in map(json.loads, lines):
            test = f"pp{line['n_prompt']}" if line["n_prompt"] else f"tg{line['n_gen']}"
            yield test, line["n_depth"], line["label"], line["type_k"], statistics.median(line["samples_ts"])


def table(results):
    rows = {}
    for test, depth, label, kind, speed in results:
        rows.setdefault((test, depth, label), {})[kind] = speed
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row))
    print("| test | depth | factors | " + " | ".join(kinds) + " | dq4 / f16 | dq4 / q4_0 | dq3 / dq4 |")
    print("|---" * (len(kinds) + 6) + "|")
    for (test, depth, label), row in sorted(rows.items()):
        # Caches without factors were measured once, among the cold ones.
        others = rows.get((test, depth, "cold"), {})
        row = {kind: speed for kind, speed in others.items() if not kind.startswith("dq")} | row
        ratio = lambda a, b: f"{row[a] / row[b]:.2f}" if a in row and b in row else ""
        cells = [f"{row[kind]:.1f}" if kind in row else "" for kind in kinds]
        cells += [ratio("dq4", "f16"), ratio("dq4", "q4_0"), ratio("dq3", "dq4")]
        print(f"| {test} | {depth} | {label} | " + " | ".join(cells) + " |")


def plot(results, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = {}
    for test, depth, label, kind, speed in results:
        if test.startswith("tg") and label == "cold":
            curves.setdefault(kind, []).append((depth, speed))
    for kind, points in curves.items():
        pyplot.plot(*zip(*sorted(points)), marker="o", label=kind)
    pyplot.xlabel("tokens in the cache")
    pyplot.ylabel("decoded tokens a second")
    pyplot.ylim(bottom=0)
    pyplot.legend()
    pyplot.savefig(path)


def main(what, path, *rest):
    results = list(read(path))
    if what == "lines":
        for test, depth, label, kind, speed in results:
            print(f"{kind}, {label}: {test} at depth {depth}: {speed:.1f} tokens a second")
    elif what == "table":
        table(results)
    else:
        plot(results, *rest)


main(*sys.argv[1:])
