"""Seconds from constructing dataset and loader to the first batch, with empty caches.

    python benchmarks/first_batch.py --data FOLDER --python cellmap=/path/to/python

Imports are not counted, and the files are in the page cache. Each measurement of ours begins with an empty cache.
"""

import argparse
import statistics
import sys
import tempfile

from data import ensure
from implementations import IMPLEMENTATIONS
from loaders import machine, parse_pythons
from measure import run

TARGET = 2.0
COMPARED = ("ours-finished", "cellmap")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the volume, which is written if it is not there")
    parser.add_argument("--python", action="append", default=[], metavar="KEY=PYTHON", help="interpreter of a peer")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    pythons = parse_pythons(args.python)
    ensure(args.data)
    work = [(patch, name) for patch in (64, 128) for name in COMPARED]
    results = {key: [] for key in work}
    versions, absent = {}, set()
    # The first pass brings the files into the page cache, and is not counted.
    for number in range(args.rounds + 1):
        for patch, name in work:
            if name in absent:
                continue
            with tempfile.TemporaryDirectory(prefix="cache-", dir=args.data) as empty:
                python = pythons.get(IMPLEMENTATIONS[name].python, sys.executable)
                result = run(python, name, args.data, empty, patch=patch, seconds=0)
            if "first_batch_s" not in result:
                absent.add(name)
                why = result.get("skipped") or result.get("failed")
                print(f"{IMPLEMENTATIONS[name].title} left out: {why}", file=sys.stderr)
                continue
            versions[name] = result["versions"]
            if number:
                results[patch, name].append(result)
    print(
        f"Seconds to the first batch of 4, 8 classes; median of {args.rounds} (slowest), target below {TARGET:g} s.\n"
    )
    print("| patch | implementation | constructed after s | first batch after s | CPU s | met |")
    print("|---|---|---|---|---|---|")
    for (patch, name), rounds in results.items():
        if not rounds:
            continue
        first = [r["first_batch_s"] for r in rounds]
        built = statistics.median(r["construct_s"] for r in rounds)
        cpu = statistics.median(r["first_batch_cpu_s"] for r in rounds)
        met = ("yes" if max(first) < TARGET else "no") if name.startswith("ours") else ""
        print(
            f"| {patch}³ | {IMPLEMENTATIONS[name].title} | {built:.3f} | "
            f"{statistics.median(first):.2f} ({max(first):.2f}) | {cpu:.2f} | {met} |"
        )
    print()
    for name, found in versions.items():
        print(f"- {IMPLEMENTATIONS[name].title}: " + ", ".join(f"{k} {v}" for k, v in found.items()))
    here = machine()
    print(f"- {here['cpu']}, {here['cores']} cores; {here['date']}")


if __name__ == "__main__":
    main()
