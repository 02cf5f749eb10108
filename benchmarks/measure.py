"""One measurement: one process that does nothing else, and prints one line of JSON.

    python benchmarks/measure.py ours --data FOLDER --patch 64 --seconds 4

CPU time is user + system of the whole process tree over a window, after a warm-up. Memory is what the tree's processes
hold for themselves, pages of files left out, above what they held when everything was imported. Works on Linux.

`run` starts such a process with any interpreter, for the programs beside this one.
"""

import argparse
import contextlib
import gc
import importlib
import importlib.metadata
import json
import math
import os
import platform
import resource
import signal
import subprocess
import time
import warnings
from pathlib import Path

from data import describe
from implementations import AUGMENTS, IMPLEMENTATIONS, NotSupported, Work

TICK = os.sysconf("SC_CLK_TCK")
#: Samples after which caches are nearly complete.
WARM_SAMPLES = 1500
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


def _stat(pid):
    """The fields of a process after its name, or None when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def descendants(pid):
    """Processes that a process started, and those that these started."""
    children = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(entry.name)):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, open_ = [], [pid]
    while open_:
        started = children.get(open_.pop(), [])
        found += started
        open_ += started
    return found


def end_descendants(pid):
    for child in descendants(pid):
        with contextlib.suppress(OSError):
            os.kill(child, signal.SIGKILL)


def cpu_seconds():
    """User + system of this process, of its descendants, and of those of them that have ended."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        used = resource.getrusage(who)
        total += used.ru_utime + used.ru_stime
    for child in descendants(os.getpid()):
        if fields := _stat(child):
            total += sum(map(int, fields[11:15])) / TICK
    return total


def own_memory():
    """Bytes of the process tree that belong to no file; what several processes share counts once."""
    total = 0
    for pid in (os.getpid(), *descendants(os.getpid())):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return total


def versions(packages):
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "?"
    return found


def tensors(batch):
    """Return the tensors of a batch by name; also of a compact one, whose stored values are counted, not trained on."""
    return getattr(batch, "tensors", batch)


def check(batch, work, compact):
    """Refuse batches that cannot be what was asked for.

    Raises:
        ValueError: shapes, types or values are not plausible.
    """
    import torch

    raw, labels = (tensors(batch)[name] for name in ("raw", "labels"))
    side = (work.patch,) * 3
    channels = len(work.names)
    per_sample = (*side, 2 * math.ceil(channels / 8)) if compact else (channels, *side)
    if tuple(raw.shape) != (work.batch, 1, *side):
        raise ValueError(f"raw has the shape {tuple(raw.shape)}")
    if tuple(labels.shape) != (work.batch, *per_sample):
        raise ValueError(f"labels have the shape {tuple(labels.shape)}")
    if raw.dtype != torch.uint8 if compact else not raw.is_floating_point():
        raise ValueError(f"raw is {raw.dtype}")
    grey = raw.float() / (255 if compact else 1)
    # Where a peer turns its patch out of what it has read, it says NaN.
    unknown = bool(grey.isnan().any())
    if unknown and work.augment not in ("rotate", "elastic"):
        raise ValueError("raw has NaN")
    grey = grey[~grey.isnan()]
    if not (0.2 < float(grey.mean()) < 0.8 and float(grey.min()) >= 0 and float(grey.max()) <= 1):
        raise ValueError(f"raw has the mean {float(grey.mean()):.3f}, from {float(grey.min())} to {float(grey.max())}")
    if compact:
        if labels.dtype != torch.uint8:
            raise ValueError(f"labels are {labels.dtype}")
        present, known = labels[..., 0::2], labels[..., 1::2]
        if bool((present & ~known).any()) or not bool(known.any()):
            raise ValueError("labels have bits that are present and not known, or none that is known")
        return {"raw_mean": round(float(grey.mean()), 4)}
    values = labels.float()
    values = values[~values.isnan()]
    if not bool(((values == 0) | (values == 1)).all()):
        raise ValueError("labels hold other values than 0 and 1")
    return {"raw_mean": round(float(grey.mean()), 4), "label_mean": round(float(values.mean()), 4)}


def _imported(needs):
    for need in needs:
        module, _, name = need.partition(":")
        loaded = importlib.import_module(module)
        if name:
            getattr(loaded, name)


def _window(batches, work, seconds):
    cpu, began, samples = cpu_seconds(), time.perf_counter(), 0
    while samples < 3 * work.batch or time.perf_counter() - began < seconds:
        next(batches)
        samples += work.batch
    took = time.perf_counter() - began
    return {
        "cpu_ms": 1e3 * (cpu_seconds() - cpu) / samples,
        "samples_per_s": samples / took,
        "samples": samples,
    }


def _trace(batches, work, samples, every):
    """Memory after the warm-up, and after every so many samples."""
    gc.collect()
    trace, drawn = [own_memory()], 0
    while drawn < samples:
        for _ in range(-(-every // work.batch)):
            next(batches)
            drawn += work.batch
        trace.append(own_memory())
    return {"samples": drawn, "every": -(-every // work.batch) * work.batch, "memory_bytes": trace}


def measure(args):
    """The output of `main`."""
    chosen = IMPLEMENTATIONS[args.implementation]
    try:
        _imported(chosen.needs)
    except Exception as e:  # a broken library may raise anything
        return {"skipped": f"{type(e).__name__}: {e}".splitlines()[0]}
    import torch

    torch.set_num_threads(1)
    work = Work(
        describe(args.data, args.name),
        args.patch,
        args.batch,
        args.augment,
        args.classes,
        args.crops,
        args.workers,
        args.seed,
        dict(option.split("=", 1) for option in args.option),
    )
    gc.collect()
    imported, cpu, began = own_memory(), cpu_seconds(), time.perf_counter()
    try:
        source = chosen.build(work)
    except NotSupported as e:
        return {"unsupported": str(e)}
    constructed = time.perf_counter()
    batches = iter(source.batches)
    batch = next(batches)
    first = time.perf_counter()
    result = {
        "construct_s": constructed - began,
        "first_batch_s": first - began,
        "first_batch_cpu_s": cpu_seconds() - cpu,
        "types": {name: str(tensors(batch)[name].dtype) for name in ("raw", "labels")},
        **check(batch, work, chosen.compact),
        "versions": versions(chosen.packages),
    }
    if args.seconds > 0 or args.draw:
        began, samples = time.perf_counter(), 0
        most = 3 * args.warm_seconds if args.warm_samples is None else math.inf
        least = (WARM_SAMPLES if chosen.keeps else 0) if args.warm_samples is None else args.warm_samples
        while (past := time.perf_counter() - began) < args.warm_seconds or (samples < least and past < most):
            batch = next(batches)
            samples += work.batch
        result |= check(batch, work, chosen.compact)
        if args.draw:
            result |= _trace(batches, work, args.draw, args.every)
        else:
            result |= _window(batches, work, args.seconds)
    result["memory_mb"] = (own_memory() - imported) / 1e6
    result["memory_imported_mb"] = imported / 1e6
    batches = batch = None
    source.close()
    return result


def run(python, implementation, data, cache_dir, timeout=300, **arguments):
    """One measurement in a separate process.

    Args:
        python: interpreter.
        implementation: name in `IMPLEMENTATIONS`.
        data: folder of the volume.
        cache_dir: where ours may keep what it decoded.
        timeout: seconds after which the process and its descendants are ended.
        arguments: further ones of the command line; ``option`` is a dict.

    Returns:
        what was printed; or ``failed``, and why.
    """
    command = [str(python), str(Path(__file__).resolve()), implementation, "--data", str(data)]
    for name, value in arguments.items():
        if name == "option":
            for pair in value.items():
                command += ["--option", "=".join(map(str, pair))]
        elif value is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    environment = {**os.environ, **_ONE_THREAD, "CELLMAP_CACHE_DIR": str(cache_dir)}
    try:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
        )
    except OSError as e:
        return {"skipped": str(e)}
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"failed": f"nothing after {timeout:.0f} s"}
    finally:
        if process.poll() is None:
            end_descendants(process.pid)
            process.kill()
            process.communicate()
    found = [line for line in out.splitlines() if line.startswith("{")]
    if not found:
        said = [line for line in err.splitlines() if line.strip()]
        return {"failed": said[-1] if said else f"ended with {process.returncode}"}
    return json.loads(found[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("implementation", choices=IMPLEMENTATIONS)
    parser.add_argument("--data", required=True, help="folder that data.py wrote to")
    parser.add_argument("--name", default="volume", help="of the volume in it")
    parser.add_argument("--patch", type=int, default=64, help="voxels a side")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--augment", choices=AUGMENTS, default="none")
    parser.add_argument("--classes", type=int, default=8)
    parser.add_argument("--crops", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="worker processes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4, help="length of the window; 0: the first batch only")
    parser.add_argument("--warm-seconds", type=float, default=2)
    parser.add_argument(
        "--warm-samples", type=int, help="at least, however long it takes; else as many as three warm-ups allow"
    )
    parser.add_argument("--draw", type=int, default=0, help="samples, instead of a window: memory is followed")
    parser.add_argument("--every", type=int, default=1000, help="samples from one look at the memory to the next")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="for the implementation")
    warnings.filterwarnings("ignore")
    result = measure(parser.parse_args())
    print(json.dumps(result), flush=True)
    # Only what this process started, and without the exit handlers of libraries, which wait for their workers.
    end_descendants(os.getpid())
    os._exit(0)


if __name__ == "__main__":
    main()
