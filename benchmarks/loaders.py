"""The speed of ours beside its peers: one table, from one run.

    python benchmarks/loaders.py --data FOLDER --python cellmap=/path/to/python

Every round measures each implementation once, each in a separate process (see `measure.py`); the figures are medians
over the rounds. Ratios are taken within a round, then their median: figures of another run or machine are not
comparable.
A peer whose environment is missing is left out, with one line that says so.
"""

import argparse
import datetime as dt
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from data import ensure
from implementations import IMPLEMENTATIONS
from measure import run


@dataclass(frozen=True)
class Run:
    """The measured loader; claims that need the same share it."""

    implementation: str
    patch: int = 64
    augment: str = "none"
    workers: int = 0

    def __str__(self):
        extra = "" if self.augment == "none" else f", {self.augment}"
        extra += f", {self.workers} workers" if self.workers else ""
        return f"{IMPLEMENTATIONS[self.implementation].title}, {self.patch}^3{extra}"


@dataclass(frozen=True)
class Target:
    """A ratio to reach: `at_least` times as fast as a peer, or `at_most` times its time.

    ``against`` is an implementation's name, or ``best``: the fastest peer except cellmap-data.
    """

    against: str
    at_least: float = 0
    at_most: float = 0
    strictly: bool = False

    def met(self, peer_over_ours):
        if self.at_most:
            return 1 / peer_over_ours <= self.at_most
        return peer_over_ours > self.at_least if self.strictly else peer_over_ours >= self.at_least


@dataclass(frozen=True)
class Claim:
    title: str
    ours: Run
    peers: tuple
    targets: tuple


CELLMAP = ("cellmap", "cellmap-old")
#: Limits, not peers: the bytes that must be written.
FLOORS = ("floor", "floor-reused", "floor-finished")
_ALL = ("cellmap", "monai", "tensorstore", "tensorstore-cached", "zarr")


def _peers(patch=64, augment="none", names=_ALL):
    return tuple(Run(name, patch, augment) for name in names)


CLAIMS = {
    "compact-64": Claim(
        "64³, compact",
        Run("ours"),
        (*_peers(), Run("floor"), Run("floor-reused")),
        (Target("cellmap", at_least=75), Target("best", at_least=5), Target("floor", at_most=1.25)),
    ),
    "finished-64": Claim(
        "64³, finished float32",
        Run("ours-finished"),
        (*_peers(), Run("floor-finished")),
        (Target("cellmap", at_least=20), Target("monai", at_least=1.5), Target("floor-finished", at_most=1.35)),
    ),
    "mirror-64": Claim(
        "64³, mirror + transpose, compact",
        Run("ours", augment="mirror"),
        (*_peers(augment="mirror"), Run("floor"), Run("floor-reused")),
        (Target("cellmap", at_least=60), Target("monai", at_least=15), Target("floor", at_most=1.6)),
    ),
    "rotate-64": Claim(
        "64³, any angle about z + mirror, finished",
        Run("ours-finished", augment="rotate"),
        _peers(augment="rotate"),
        (Target("cellmap", at_least=5), Target("monai", at_least=1.5)),
    ),
    "elastic-64": Claim(
        "64³, elastic + any angle about z + mirror, finished",
        Run("ours-finished", augment="elastic"),
        (*_peers(augment="elastic", names=("monai", "torchio")), Run("ours-finished", augment="rotate")),
        (Target("best", at_least=8), Target("ours-finished", at_most=2.5)),
    ),
    "elastic-128": Claim(
        "128³, elastic + any angle about z + mirror, finished",
        Run("ours-finished", patch=128, augment="elastic"),
        # TorchIO takes many seconds for each sample of this size.
        (*_peers(128, augment="elastic", names=("monai",)), Run("ours-finished", patch=128, augment="rotate")),
        (Target("best", at_least=8), Target("ours-finished", at_most=2.5)),
    ),
    "mirror-128": Claim(
        "128³, mirror + transpose, compact",
        Run("ours", patch=128, augment="mirror"),
        (*_peers(128, augment="mirror", names=("monai",)), Run("floor", patch=128), Run("floor-reused", patch=128)),
        (Target("monai", at_least=15), Target("floor", at_most=1.6)),
    ),
    "compact-128": Claim(
        "128³, compact",
        Run("ours", patch=128),
        (*_peers(128), Run("floor", patch=128), Run("floor-reused", patch=128)),
        (Target("cellmap", at_least=120), Target("monai", at_least=15), Target("floor", at_most=1.25)),
    ),
    "finished-128": Claim(
        "128³, finished float32",
        Run("ours-finished", patch=128),
        (*_peers(128), Run("floor-finished", patch=128)),
        (Target("cellmap", at_least=13), Target("monai", at_least=1.5), Target("floor-finished", at_most=1.35)),
    ),
    "workers-64": Claim(
        "64³, compact, two worker processes against our own threads",
        Run("ours", workers=2),
        (Run("ours"),),
        (Target("ours", at_most=1.5),),
    ),
    "uncached-zarr": Claim(
        "64³, finished, data ten times the cache, reader=zarr",
        Run("ours-tenth-zarr"),
        _peers(names=("zarr",)),
        (Target("zarr", at_most=1.15),),
    ),
    "uncached-tensorstore": Claim(
        "64³, finished, data ten times the cache, reader=tensorstore",
        Run("ours-tenth-tensorstore"),
        _peers(names=("tensorstore",)),
        (Target("tensorstore", at_most=1.15),),
    ),
    "whole-sample": Claim(
        "64³, finished, against cellmap-data 2025.6.21",
        Run("ours-finished"),
        _peers(names=("cellmap-old",)),
        (Target("cellmap-old", at_least=33.1, strictly=True),),
    ),
}


def measured(runs, volume_folder, pythons, rounds, seconds, warm_seconds):
    """The results of every run, a list of rounds; None without runs."""
    results = {run_: [] for run_ in runs}
    absent = {}
    cache_dir = tempfile.mkdtemp(prefix="cache-", dir=volume_folder)
    try:
        for number in range(1, rounds + 1):
            for run_ in runs:
                name = run_.implementation
                if name in absent:
                    results[run_].append(None)
                    continue
                result = run(
                    pythons.get(IMPLEMENTATIONS[name].python, sys.executable), name, volume_folder, cache_dir,
                    patch=run_.patch, augment=run_.augment, workers=run_.workers,
                    seconds=seconds, warm_seconds=warm_seconds,
                )  # fmt: skip
                good = "cpu_ms" in result
                results[run_].append(result if good else None)
                if "skipped" in result:
                    absent[name] = result["skipped"]
                    key = IMPLEMENTATIONS[name].python
                    _say(f"{IMPLEMENTATIONS[name].title} left out: {result['skipped']} (see --python {key}=...)")
                elif "unsupported" in result:
                    if number == 1:
                        _say(f"round {number}/{rounds}  {run_}: - ({result['unsupported']})")
                elif not good:
                    _say(f"round {number}/{rounds}  {run_}: FAILED: {result['failed']}")
                else:
                    _say(
                        f"round {number}/{rounds}  {run_}: {result['cpu_ms']:.3g} ms CPU, "
                        f"{result['samples_per_s']:.4g} samples/s"
                    )
    finally:
        shutil.rmtree(cache_dir, ignore_errors=True)
    return results


def _say(text):
    print(text, file=sys.stderr, flush=True)


def median_ms(rounds):
    found = [result["cpu_ms"] for result in rounds if result]
    return statistics.median(found) if found else None


def ratio(peer, ours):
    """The peer's time over ours, the median of the rounds that have both."""
    found = [p["cpu_ms"] / o["cpu_ms"] for p, o in zip(peer, ours, strict=True) if p and o]
    return statistics.median(found) if found else None


def _number(value, unit=""):
    if value is None:
        return "-"
    return (f"{value:.0f}" if value >= 99.5 else f"{value:#.3g}".rstrip(".")) + unit


def _judged(claim, results):
    """The row's ratios: to each peer, to the best but cellmap-data, and the targets with what was reached."""
    ours = results[claim.ours]
    ratios = {peer.implementation: ratio(results[peer], ours) for peer in claim.peers}
    others = {
        name: r
        for name, r in ratios.items()
        if r is not None and name not in (*CELLMAP, "ours", "ours-finished", *FLOORS)
    }
    best = min(others, key=others.get) if others else None
    texts, verdicts = [], []
    for target in claim.targets:
        name = best if target.against == "best" else target.against
        reached = ratios.get(name)
        whom = "best other" if target.against == "best" else IMPLEMENTATIONS[target.against].title
        if target.at_most:
            text = f"at most {target.at_most:g}x {whom}: {_number(reached and 1 / reached, 'x')}"
        else:
            text = f"{'above' if target.strictly else 'at least'} {target.at_least:g}x {whom}: {_number(reached, 'x')}"
        texts.append(text)
        verdicts.append(None if reached is None else target.met(reached))
    met = "no" if False in verdicts else "-" if None in verdicts else "yes"
    return ratios, best, "; ".join(texts), met


def table(claims, results):
    """The markdown table, and the verdict per claim."""
    peers = [name for name in (*_ALL, "torchio", "cellmap-old", *FLOORS) if any(
        results[peer] and median_ms(results[peer]) is not None for c in claims for peer in CLAIMS[c].peers
        if peer.implementation == name
    )]  # fmt: skip
    head = ["work", "ours ms", *(f"{IMPLEMENTATIONS[name].title} ms" for name in peers)]
    head += ["to cellmap-data", "to the best other", "target: reached", "met"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    verdicts = {}
    for key in claims:
        claim = CLAIMS[key]
        ratios, best, targets, met = _judged(claim, results)
        own = {peer.implementation: peer for peer in claim.peers}
        cells = [claim.title, _number(median_ms(results[claim.ours]))]
        cells += [_number(median_ms(results[own[name]])) if name in own else "" for name in peers]
        cells.append(_number(ratios.get("cellmap") or ratios.get("cellmap-old"), "x"))
        cells.append(f"{_number(ratios[best], 'x')} ({IMPLEMENTATIONS[best].title})" if best else "-")
        cells += [targets, met]
        lines.append("| " + " | ".join(cells) + " |")
        verdicts[key] = {"met": met, "targets": targets, "ratios": ratios}
    return "\n".join(lines), verdicts


def machine():
    """The machine of the figures."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": model, "cores": cores, "date": dt.datetime.now().astimezone().isoformat(timespec="minutes")}


def parse_pythons(pairs):
    """`KEY=PYTHON` of the command line; the keys are those of the implementations."""
    known = {chosen.python for chosen in IMPLEMENTATIONS.values()}
    found = {}
    for pair in pairs:
        key, _, python = pair.partition("=")
        if key not in known or not python:
            raise SystemExit(f"--python takes KEY=PYTHON, where KEY is one of {', '.join(sorted(known))}; got {pair!r}")
        found[key] = python
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the volume, which is written if it is not there")
    parser.add_argument("--python", action="append", default=[], metavar="KEY=PYTHON", help="interpreter of a peer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4, help="of each measurement")
    parser.add_argument("--warm-seconds", type=float, default=2)
    parser.add_argument("--only", action="append", choices=CLAIMS, help="this claim; may be given several times")
    parser.add_argument("--json", help="file for the raw numbers")
    args = parser.parse_args()
    pythons = parse_pythons(args.python)
    claims = [
        key
        for key in (args.only or CLAIMS)
        if args.only or key != "whole-sample" or "cellmap-old" in pythons  # a version that hardly anybody installs
    ]
    volume = ensure(args.data)
    wanted = [run_ for key in claims for run_ in (CLAIMS[key].ours, *CLAIMS[key].peers)]
    runs = list(dict.fromkeys(wanted))
    results = measured(runs, args.data, pythons, args.rounds, args.seconds, args.warm_seconds)
    text, verdicts = table(claims, results)
    print(f"CPU ms per sample, median of {args.rounds} rounds; 8 classes, batches of 4, page cache warm.\n")
    print(text, end="\n\n")
    used = {}
    for run_ in runs:
        for result in filter(None, results[run_]):
            used[IMPLEMENTATIONS[run_.implementation].title] = result["versions"]
    for title, found in used.items():
        print(f"- {title}: " + ", ".join(f"{name} {version}" for name, version in found.items()))
    here = machine()
    print(f"- {here['cpu']}, {here['cores']} cores; {here['date']}")
    if args.json:
        Path(args.json).write_text(
            json.dumps(
                {
                    "machine": here,
                    "volume": {k: v for k, v in volume.items() if k != "root"},
                    "arguments": {"rounds": args.rounds, "seconds": args.seconds, "warm_seconds": args.warm_seconds},
                    "runs": [{"run": vars(run_), "rounds": results[run_]} for run_ in runs],
                    "claims": verdicts,
                },
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
