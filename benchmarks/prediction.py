"""Speed and memory of predictions beside MONAI's sliding window and cellmap-data's writer.

    python benchmarks/prediction.py --python cellmap=PYTHON --report FILE.md --plot FILE.png

Each measurement is a separate process with one torch thread; in a round all of them are measured once, and figures
are medians over the rounds. The identity model shows what everything but the model costs. Ours reads stored chunks,
blends, and writes compressed ones and their pyramid. MONAI's sliding window blends an array that is in memory already
(`infer`), or reads it first and writes the result and its pyramid as ours does (`whole`). cellmap-data's writer reads
stored chunks and writes the middles of patches, those that ours keeps with `trim`, side by side: float32, without a
pyramid, single-threaded. It leaves out the last patch along each axis, so its speed is that of the voxels that it
writes. PYTHON is the interpreter of its environment (see the README here); without it that row is left out.

Blocks are as large as `--block-mb` allows, and those of small volumes smaller. With the `--block-mb` of 32 that is
measured too they are not, so that memory is the same for any volume.

A small U-Net shows how two processes share the work: with their start, and from the first batch of the slower one to
its last block.

What was written is removed when everything is measured: for minutes after many files were removed, ext4 takes ten times
as long to create one.

Memory is the highest of what belongs to the process and to no file, sampled every 5 ms, above what it was when
everything had been imported and the model had run once. CPU time is user + system.
"""

import argparse
import datetime as dt
import importlib
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np

PATCH = (64, 64, 64)
SCALE = (8.0, 8.0, 8.0)
BATCH = 4
OVERLAP = {"trim": 0.25, "average": 0.25, "gaussian": 0.5}
SLAB = 64
#: MiB of blocks with which the memory of volumes of all sizes is compared.
SMALL_BLOCKS = 32
WRITER = "cellmap_lightning.prediction.prediction_writer"


def volume(folder, length):
    """A raw volume of smooth noise, written slab by slab, once."""
    from cellmap_lightning.io.writer import codec_of, create_level, multiscale_attributes, write_group

    path = Path(folder) / f"raw{length}.zarr"
    if not path.exists():
        rng = np.random.default_rng(0)
        draft = path.with_suffix(".draft")
        write_group(draft)
        codec = codec_of("zstd", 2)
        level = create_level(draft / "s0", (length,) * 3, np.uint8, (64, 64, 64), 2, codec)
        for z in range(0, length, SLAB):
            small = rng.integers(0, 256, (SLAB // 4, length // 4, length // 4)).astype(np.uint8)
            level[z : z + SLAB] = small.repeat(4, 0).repeat(4, 1).repeat(4, 2)
        write_group(draft, multiscale_attributes("raw", SCALE, (0, 0, 0), 1))
        draft.rename(path)
    return path


def own_memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def cpu_seconds():
    """Of this process and of those that it waited for."""
    return sum(
        r.ru_utime + r.ru_stime for r in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


class Peak:
    """The highest memory while it is open, above that at its beginning."""

    def __enter__(self):
        self.base = self.most = own_memory()
        self.going = True
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self):
        while self.going:
            self.most = max(self.most, own_memory())
            time.sleep(0.005)

    def __exit__(self, *_):
        self.going = False
        self.thread.join()

    @property
    def mb(self):
        return (self.most - self.base) / 1e6


def network(name):
    """The identity, or a small U-Net: two levels, 8 and 16 channels."""
    import torch
    from torch import nn

    if name == "identity":
        return nn.Identity()

    def block(a, b):
        return nn.Sequential(nn.Conv3d(a, b, 3, padding=1), nn.ReLU(), nn.Conv3d(b, b, 3, padding=1), nn.ReLU())

    class UNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.fine, self.coarse, self.up, self.out = block(1, 8), block(8, 16), block(24, 8), nn.Conv3d(8, 1, 1)

        def forward(self, x):
            fine = self.fine(x)
            coarse = self.coarse(nn.functional.max_pool3d(fine, 2))
            return self.out(self.up(torch.cat([fine, nn.functional.interpolate(coarse, scale_factor=2)], 1))).sigmoid()

    torch.manual_seed(0)
    return UNet().eval()


def ours(task, path, out):
    import lightning as L
    from lightning.pytorch.strategies import DDPStrategy

    from cellmap_lightning import CellMapDataModule
    from cellmap_lightning.callbacks import make_prediction_writer

    class Model(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network(task["model"])

        def predict_step(self, batch, batch_idx):
            return self.network(batch["raw"])

    class Note(L.Callback):
        def teardown(self, trainer, pl_module, stage):
            Path(f"{out}.{trainer.global_rank}").write_text(str(writer.summary.seconds))

    world = task["world"]
    data = CellMapDataModule(
        ["a"], {"raw": {"shape": PATCH, "scale": SCALE}}, datasets={"predict": [{"raw": str(path)}]}, batch_size=BATCH
    )
    strategy = DDPStrategy(process_group_backend="gloo", start_method="fork", timeout=dt.timedelta(seconds=600))
    writer = make_prediction_writer(str(out), blend=task["blend"], block_size_mb=task["block_size_mb"])
    run = L.Trainer(
        accelerator="cpu", devices=world, strategy=strategy if world > 1 else "auto", logger=False,
        callbacks=[writer, Note()], enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with data:
        run.predict(Model(), datamodule=data)
    seconds = max(float(Path(f"{out}.{rank}").read_text()) for rank in range(world))
    return {"redundancy": writer.redundancy, "inner": seconds}


def monai(task, path, out):
    import torch
    import zarr
    from monai.inferers import sliding_window_inference

    from cellmap_lightning.io.writer import write_multiscale

    raw = torch.from_numpy(zarr.open_array(str(path / "s0"), mode="r")[...]).to(torch.float32)[None, None] / 255
    blend, model = task["blend"], network(task["model"])
    began, cpu = time.perf_counter(), cpu_seconds()
    with torch.inference_mode():
        mode = "gaussian" if blend == "gaussian" else "constant"
        found = sliding_window_inference(raw, PATCH, BATCH, model, overlap=OVERLAP[blend], mode=mode)
    inner, inner_cpu = time.perf_counter() - began, cpu_seconds() - cpu
    levels = 1 + max(0, int(math.log2(raw.shape[2] / 32)))
    stored = (found[0, 0] * 255).round().to(torch.uint8).numpy()
    write_multiscale(out, stored, scale=SCALE, translation=(0, 0, 0), levels=levels)
    return {"inner": inner, "inner_cpu": inner_cpu}


def cellmap(task, path, out):
    from cellmap_data import CellMapDatasetWriter

    context = round(OVERLAP["trim"] * PATCH[0] / 2)
    kept = [n - 2 * context for n in PATCH]
    bounds = {"labels": dict.fromkeys("zyx", (0.0, task["length"] * SCALE[0]))}
    model = network(task["model"])
    writer = CellMapDatasetWriter(
        str(path), str(out), ["a"], {"raw": {"shape": PATCH, "scale": SCALE}},
        {"labels": {"shape": kept, "scale": SCALE}}, bounds, raw_value_transforms=lambda raw: raw / 255,
    )  # fmt: skip
    inner = (slice(context, -context),) * 3
    for batch in writer.loader(batch_size=BATCH):
        writer[batch["idx"]] = {"labels": model(batch["raw"])[..., *inner]}
    return {"voxels": len(writer.writer_indices) * math.prod(kept)}


def one(task):
    """One measurement."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    path = Path(task["folder"]) / f"raw{task['length']}.zarr"
    needs = {
        "ours": ["lightning.pytorch.strategies", "cellmap_lightning.datamodule", WRITER],
        "monai": ["monai.inferers", "zarr", "cellmap_lightning.io.writer"],
        "cellmap": ["cellmap_data"],
    }
    for name in needs[task["who"]]:  # before the clock starts
        importlib.import_module(name)
    with torch.inference_mode():
        network(task["model"])(torch.zeros(1, 1, *PATCH))
        os.environ["CELLMAP_CACHE_DIR"] = f"{task['out']}/cache"
        work = {"ours": ours, "monai": monai, "cellmap": cellmap}[task["who"]]
        with Peak() as peak:
            began, cpu = time.perf_counter(), cpu_seconds()
            found = work(task, path, Path(task["out"]) / "out.zarr")
            seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu
    voxels = {"voxels": task["length"] ** 3}
    print("RESULT " + json.dumps({**task, **voxels, **found, "seconds": seconds, "cpu": cpu, "peak_mb": peak.mb}))


def measure(python, outputs, **task):
    task["out"] = tempfile.mkdtemp(dir=outputs)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    if task["who"] == "cellmap":
        env.pop("PYTHONPATH", None)
    done = subprocess.run(
        [python, __file__, "--one", json.dumps(task)], capture_output=True, text=True, env=env, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(done.stderr)
    return json.loads(lines[-1][7:])


class Figures:
    """Every measurement of a run."""

    def __init__(self):
        self.all = []

    def of(self, **which):
        return [f for f in self.all if all(f[k] == v for k, v in which.items())]

    def median(self, key, **which):
        return statistics.median(f[key] for f in self.of(**which))

    def speed(self, key="seconds", **which):
        """Million voxels per second."""
        return statistics.median(f["voxels"] / 1e6 / f[key] for f in self.of(**which))

    def ratio(self, mine, theirs, key="seconds", their_key=None):
        """Factors of speed against the other, round by round."""
        pairs = zip(self.of(**mine), self.of(**theirs), strict=True)
        return statistics.median((a["voxels"] / a[key]) / (b["voxels"] / b[their_key or key]) for a, b in pairs)


def tasks(args, peer):
    """The measurements of a round."""
    common = {"model": "identity", "world": 1, "block_size_mb": args.block_size_mb}
    for length in args.lengths:
        for blend in ("trim", "average", "gaussian"):
            if length > args.compared and blend == "gaussian":
                continue
            yield {"who": "ours", "blend": blend, "length": length, **common}
            if blend != "gaussian":
                yield {"who": "ours", "blend": blend, "length": length, **common, "block_size_mb": SMALL_BLOCKS}
            if blend != "trim" and length <= args.compared:
                yield {"who": "monai", "blend": blend, "length": length, **common}
        if peer and length <= args.peer_length:
            yield {"who": "cellmap", "blend": "trim", "length": length, **common}
    for world in (1, 2):
        yield common | {
            "who": "ours", "blend": "trim", "length": args.shared_length, "model": "unet", "world": world
        }  # fmt: skip


def report(figures, args):
    """The tables."""
    yield (
        "| volume | | ours, Mvoxel/s | MONAI infer | MONAI whole | ours / infer | ours / whole | CPU, ours / whole | "
        "peak MB: ours | MONAI | patches, blocks / whole |"
    )
    yield "|" + "---|" * 11
    for length in args.lengths:
        for blend in ("trim", "average", "gaussian"):
            mine, theirs = (
                {"who": w, "blend": blend, "length": length, "model": "identity", "block_size_mb": args.block_size_mb}
                for w in ("ours", "monai")
            )
            if not figures.of(**mine):
                continue
            row = [f"{length}³", blend, f"{figures.speed(**mine):.1f}"]
            if figures.of(**theirs):
                row += [f"{figures.speed('inner', **theirs):.1f}", f"{figures.speed(**theirs):.1f}"]
                row += [f"{figures.ratio(mine, theirs, 'seconds', 'inner'):.2f}", f"{figures.ratio(mine, theirs):.2f}"]
                row += [f"{1 / figures.ratio(mine, theirs, 'cpu'):.2f}"]
            else:
                row += [""] * 5
            row += [f"{figures.median('peak_mb', **mine):.0f}"]
            row += [f"{figures.median('peak_mb', **theirs):.0f}" if figures.of(**theirs) else ""]
            row += [f"{figures.median('redundancy', **mine):.2f}"]
            yield "| " + " | ".join(row) + " |"
    yield ""
    for length in args.lengths:
        peer = {"who": "cellmap", "length": length}
        if figures.of(**peer):
            mine = {
                "who": "ours", "blend": "trim", "length": length, "model": "identity",
                "block_size_mb": args.block_size_mb,
            }  # fmt: skip
            speed, peak = figures.speed(**peer), figures.median("peak_mb", **peer)
            fast, cheap = figures.ratio(mine, peer), figures.ratio(mine, peer, "cpu")
            yield (
                f"cellmap-data's writer, {length}³: {speed:.1f} Mvoxel/s, {peak:.0f} MB; ours with trim is {fast:.2f} "
                f"times as fast, {cheap:.2f} times by CPU time"
            )
    yield ""
    yield f"With block_size_mb={SMALL_BLOCKS}:"
    yield ""
    yield "| volume | trim: peak MB | Mvoxel/s | patches, blocks / whole | average: peak MB | Mvoxel/s | patches |"
    yield "|" + "---|" * 7
    for length in args.lengths:
        row = [f"{length}³"]
        for blend in ("trim", "average"):
            small = {
                "who": "ours",
                "blend": blend,
                "length": length,
                "model": "identity",
                "block_size_mb": SMALL_BLOCKS,
            }
            row += [f"{figures.median('peak_mb', **small):.0f}", f"{figures.speed(**small):.1f}"]
            row += [f"{figures.median('redundancy', **small):.2f}"]
        yield "| " + " | ".join(row) + " |"
    yield ""
    alone, two = ({"who": "ours", "model": "unet", "world": world} for world in (1, 2))
    yield (
        f"U-Net, {args.shared_length}³: {figures.median('seconds', **alone):.1f} s with one process and "
        f"{figures.median('seconds', **two):.1f} s with two, {figures.ratio(two, alone):.2f} times as fast; from the "
        f"first batch to the last block {figures.ratio(two, alone, 'inner'):.2f} times"
    )


def draw(figures, args, file):
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    _, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    mb, small = args.block_size_mb, SMALL_BLOCKS
    lines = [
        ("ours", "average", mb, "ours, average", "C0", "o-"), ("ours", "gaussian", mb, "ours, gaussian", "C0", "s--"),
        ("ours", "average", small, f"ours, average, block_size_mb={small}", "C0", "o:"),
        ("ours", "trim", mb, "ours, trim", "C2", "^-"),
        ("ours", "trim", small, f"ours, trim, block_size_mb={small}", "C2", "^:"),
        ("monai", "average", mb, "MONAI, average", "C1", "o-"),
        ("monai", "gaussian", mb, "MONAI, gaussian", "C1", "s--"),
        ("cellmap", "trim", mb, "cellmap-data", "C3", "d-"),
    ]  # fmt: skip
    for who, blend, block_size_mb, label, color, style in lines:
        which = {"who": who, "blend": blend, "model": "identity", "block_size_mb": block_size_mb}
        lengths = [n for n in args.lengths if figures.of(**which, length=n)]
        if not lengths:
            continue
        peaks = [figures.median("peak_mb", **which, length=n) for n in lengths]
        speeds = [figures.speed(**which, length=n) for n in lengths]
        left.plot(lengths, peaks, style, color=color, label=label)
        right.plot(lengths, speeds, style, color=color, label=label)
    whole = [4 * n**3 / 1e6 for n in args.lengths]
    left.plot(args.lengths, whole, ":", color="grey", label="the volume in float32")
    left.set(ylabel="peak memory, MB", title="Memory above the model's own")
    right.set(ylabel="million voxels per second", title="Identity model: read, blend, write", ylim=(0, None))
    left.set_yscale("log")
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.set_xticks(args.lengths, [f"{n}³" for n in args.lengths])
        ax.set_xlabel("volume")
        ax.grid(alpha=0.3)
    left.legend(fontsize=8)  # of both
    plt.savefig(file, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024], help="edges of the volumes")
    parser.add_argument("--compared", type=int, default=512, help="the longest that MONAI predicts, in memory")
    parser.add_argument("--peer-length", type=int, default=256, help="the longest that cellmap-data predicts")
    parser.add_argument("--shared-length", type=int, default=256, help="what two processes share")
    parser.add_argument("--block-mb", type=float, default=256, help="MiB of blocks, but in the table of small ones")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where volumes are written and left; a temporary folder by default")
    parser.add_argument("--python", action="append", default=[], metavar="cellmap=PYTHON", help="cellmap-data's")
    parser.add_argument("--report", help="a file for the tables")
    parser.add_argument("--plot", help="a PNG")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(json.loads(args.one))
        return
    if args.block_size_mb == SMALL_BLOCKS:
        parser.error(f"--block-mb {SMALL_BLOCKS} is measured anyway")
    peer = dict(given.split("=", 1) for given in args.python).get("cellmap")
    figures, began = Figures(), time.time()
    with tempfile.TemporaryDirectory() as temporary, tempfile.TemporaryDirectory(dir=args.folder) as outputs:
        folder = args.folder or temporary
        for length in {*args.lengths, args.shared_length}:  # so that no measurement writes its own
            volume(folder, length)
        for number in range(args.rounds):
            for task in tasks(args, peer):
                python = peer if task["who"] == "cellmap" else sys.executable
                found = measure(python, outputs, folder=folder, **task)
                figures.all.append(found)
                print(
                    f"{number + 1}: {task['who']:<8} {task['model']:<9} {task['blend']:<9} {task['length']:>5}^3 "
                    f"x{task['world']} {task['block_size_mb']:g} MiB {found['seconds']:7.2f} s, "
                    f"cpu {found['cpu']:7.2f} s, {found['peak_mb']:6.0f} MB",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
    rows = [
        (f"{args.rounds} rounds in {time.time() - began:.0f} s on {os.cpu_count()} cores ({platform.machine()}), load "
         f"at the end {os.getloadavg()[2]:.1f}; block_size_mb={args.block_size_mb:g}"), "", *report(figures, args),
    ]  # fmt: skip
    print("\n".join(rows))
    if args.report:
        Path(args.report).write_text("\n".join(rows) + "\n", encoding="utf-8")
    if args.plot:
        draw(figures, args, args.plot)


if __name__ == "__main__":
    main()
