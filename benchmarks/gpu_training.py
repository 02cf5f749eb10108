"""Trainings on a GPU from end to end: steps per second, and seconds that each step waits for its batch.

    python benchmarks/gpu_training.py

One command, within 135 seconds on its own clock: what does not fit is named as left out. Needs a CUDA device,
Lightning, MONAI and no network; the volume is written to a temporary folder. It writes a JSON and, where matplotlib is
there, a PNG; elsewhere ``--plot-json FILE`` draws the PNG from the JSON. ``--device cpu`` runs the same code small, to
test this program: its figures say nothing about a GPU.

`Trainer.fit` of a MONAI U-Net (3D, bf16-mixed), and of a network of one layer, which starves for data, on patches of
64, 96 and 128 voxels a side with 8 classes, mirrored, and rotated with elastic deformation:

- **batch**: one finished batch on the device, again and again: the speed without any loading.
- **off**: read by the host, copied and finished within the step.
- **ahead**: read by the host, copied on a side stream.
- **device**: gathered from voxels on the device within the step (``cache=device``).
- **device ahead**: the same on a side stream.

Beside it, the samples per second of the loader alone, also with rotation only, the CPU time of the host per sample, and
the bytes that are held on the device against the prediction.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

import lightning as L
import torch
from data import ensure
from gpu_streams import MIB, Clock, Cpu, Cuda
from loaders import machine
from torch import nn

from cellmap_lightning import CellMapDataLoader, CellMapDataModule, LoaderOptions
from cellmap_lightning.callbacks import StreamPrefetch
from cellmap_lightning.loading.resident_decision import resident_bytes
from cellmap_lightning.loading.resident_reader import ResidentReader
from cellmap_lightning.resident.device_cache import DeviceCache
from cellmap_lightning.resident.gather import GATHER_BYTES

CLASSES = 8
MIRRORED = {"mirror": {"axes": {"z": 0.5, "y": 0.5, "x": 0.5}}}
ROTATED = {**MIRRORED, "rotate": {"axes": {"z": [-180, 180], "y": [-15, 15], "x": [-15, 15]}}}
#: With control points 32 voxels apart, each displaced by up to 8.
SPATIAL = {
    "mirrored": MIRRORED,
    "rotated": ROTATED,
    "rotated + elastic": {**ROTATED, "elastic": {"spacing": 256, "magnitude": 64}},
}
#: Those of the trainings; the loader alone is measured with all.
TRAINED = ("mirrored", "rotated + elastic")
#: Cache and prefetching of each mode; the first one has no loader.
MODES = {
    "batch": None,
    "off": ("disk", False),
    "ahead": ("disk", True),
    "device": ("device", False),
    "device ahead": ("device", True),
}
#: Steps before the measurement begins.
WARM_STEPS = 4
NO_GPU = "run on the CPU to test the program: these figures say nothing about a GPU"


class Starving(nn.Module):
    """One convolution of one voxel: hardly any compute."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv3d(1, CLASSES, 1)

    def forward(self, raw):
        return self.layer(raw)


def unet(widths):
    from monai.networks.nets import UNet

    return UNet(3, 1, CLASSES, channels=widths, strides=(2,) * (len(widths) - 1), num_res_units=1)


class Training(L.LightningModule):
    """Binary cross entropy over annotated voxels."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def training_step(self, batch, batch_idx):
        target = batch["labels"]
        known = ~target.isnan()
        loss = nn.functional.binary_cross_entropy_with_logits(
            self.network(batch["raw"]), target.nan_to_num(0.0), reduction="none"
        )
        return (loss * known).sum() / known.sum().clamp(min=1)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-4)


class Steps(L.Callback):
    """Counts steps for some seconds after the first ones.

    Args:
        backend: the device.
        waiting: the waits of the data module; None without one.
        seconds: length of the measurement.
    """

    def __init__(self, backend, waiting, seconds):
        self.backend, self.waiting, self.seconds = backend, waiting, seconds
        self.steps, self.began, self.result = 0, None, None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps += 1
        if self.steps == WARM_STEPS:
            self.backend.synchronize()
            self.began = time.perf_counter(), time.process_time()
            self.before = self.waiting - type(self.waiting)() if self.waiting else None
        elif self.began and time.perf_counter() - self.began[0] >= self.seconds:
            self.backend.synchronize()
            count = self.steps - WARM_STEPS
            self.result = {
                "steps": count,
                "steps_per_s": count / (time.perf_counter() - self.began[0]),
                "host_cpu_ms_per_step": 1e3 * (time.process_time() - self.began[1]) / count,
            }
            if self.waiting:
                waited = self.waiting - self.before
                self.result |= {"waited_s_per_step": waited.waited / count, "moved_s_per_step": waited.moved / count}
            trainer.should_stop = True


class Repeated(torch.utils.data.IterableDataset):
    """One batch for ever."""

    def __init__(self, batch):
        self.batch = batch

    def __iter__(self):
        while True:
            yield dict(self.batch)


def fit(backend, network, seconds, data, ahead, batch=None):
    """Train for some seconds; return what `Steps` measured."""
    torch.manual_seed(0)
    cuda = backend.device.type == "cuda"
    counted = Steps(backend, None if batch is not None else data.waiting, seconds)
    callbacks = [counted] if batch is not None else [counted, StreamPrefetch(enabled=ahead)]
    trainer = L.Trainer(
        accelerator="gpu" if cuda else "cpu", devices=1, precision="bf16-mixed" if cuda else "32-true", max_epochs=1,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0, callbacks=callbacks,
    )  # fmt: skip
    if batch is not None:
        loader = torch.utils.data.DataLoader(Repeated(batch), batch_size=None)
        trainer.fit(Training(network), loader)
    else:
        trainer.fit(Training(network), data)
    return counted.result


def module(volume, edge, batch_size, spatial, cache, limit=None):
    patch = {"shape": [edge] * 3, "scale": [volume["scale"]] * 3}
    target = f"{volume['root']}/{volume['crops'][0]['path']}/[{','.join(volume['classes'])}]"
    return CellMapDataModule(
        classes=volume["classes"], input_arrays={"raw": patch}, target_arrays={"labels": patch},
        datasets={"train": [{"raw": f"{volume['root']}/raw", "gt": target}]}, batch_size=batch_size,
        batches_per_epoch=1_000_000, spatial_transforms=SPATIAL[spatial], cache=cache, device_cache_bytes=limit, seed=1,
    )  # fmt: skip


def warm(data, count=200):
    """Decode what random samples show, so that the host's cache holds it."""
    dataset = data.train_dataset
    for first in range(0, count, data.batch_size):
        dataset.read(dataset.draw(range(first, first + data.batch_size), True, 1))


# ----------------------------------------------------------------------------------------------------------- sections
def memory(backend, clock, volume, cases):
    """Bytes on the device: of the voxels, and the most while a batch is gathered and finished, against predictions."""
    rows = []
    for edge, batch_size in cases:
        if clock.left("memory") < 2:
            clock.leave_out("memory", f"{edge}^3")
            continue
        data = module(volume, edge, batch_size, "rotated", "disk")
        with data:
            data.setup("fit")
            dataset = data.train_dataset
            predicted = resident_bytes(dataset)
            backend.synchronize()
            backend.forget()
            before, _ = backend.held()
            cache = DeviceCache(backend.device, predicted)
            reader = ResidentReader(dataset, cache, pin=backend.device.type == "cuda")
            for number in range(30):
                batch = reader.read(dataset.draw(range(number * batch_size, (number + 1) * batch_size), True, 1))
                batch.layout = dataset.layout
                del batch.finish()["idx"], batch
            backend.synchronize()
            held, _ = backend.held()
            # The rest of the samples need no more uploads: voxels, one batch in both forms, and temporary memory.
            batch = reader.read(dataset.draw(range(batch_size), True, 1))
            batch.layout = dataset.layout
            finished = batch.finish()
            backend.synchronize()
            most, _ = backend.most()
            del finished, batch
            sizes = dataset.batch_memory(batch_size)
            limit = predicted + sizes.total_bytes + sizes.compact.total_bytes + GATHER_BYTES
            rows.append(
                {
                    "edge": edge, "batch_size": batch_size, "predicted_mib": predicted / MIB,
                    "counted_mib": cache.nbytes / MIB, "uploaded_mib": cache.uploaded / MIB,
                    "held_mib": (held - before) / MIB, "most_mib": (most - before) / MIB, "limit_mib": limit / MIB,
                }
            )  # fmt: skip
            cache.close()
            backend.synchronize()
            rows[-1]["left_mib"] = (backend.held()[0] - before) / MIB
        row = rows[-1]
        print(
            f"memory  {edge}^3: voxels {row['held_mib']:.0f} MiB, predicted {row['predicted_mib']:.0f}; at most "
            f"{row['most_mib']:.0f}, predicted {row['limit_mib']:.0f}; {row['left_mib']:.1f} left after close",
            flush=True,
        )
    return rows


def loader(backend, clock, volume, cases):
    """Samples per second of the loader alone, finished on the device."""
    rows = []
    for (edge, batch_size), spatial in ((case, spatial) for case in cases for spatial in SPATIAL):
        if clock.left("loader") < 1:
            clock.leave_out("loader", f"{edge}^3, {spatial}")
            continue
        data = module(volume, edge, batch_size, spatial, "disk")
        with data:
            data.setup("fit")
            warm(data, 100)
            row = {"edge": edge, "batch_size": batch_size, "spatial": spatial}
            for mode in ("host", "device"):
                cache = DeviceCache(backend.device, 1 << 40) if mode == "device" else None
                pin = backend.device.type == "cuda"
                made = CellMapDataLoader(
                    data.train_dataset, batch_size, samples_per_epoch=1 << 30, finish=False, pin_memory=pin,
                    options=LoaderOptions(resident=cache),
                )  # fmt: skip
                began, count = None, 0
                for number, batch in enumerate(made):
                    finished = batch.to(backend.device).finish()
                    del finished
                    if number == 10:  # memory and most chunks are there
                        backend.synchronize()
                        began = time.perf_counter(), time.process_time()
                    elif began:
                        count += batch_size
                        if time.perf_counter() - began[0] > min(1.0, max(0.2, clock.left("loader") / 12)):
                            break
                backend.synchronize()
                row[mode] = {
                    "samples_per_s": count / (time.perf_counter() - began[0]),
                    "host_cpu_ms": 1e3 * (time.process_time() - began[1]) / count,
                }
                made.close()
                if cache is not None:
                    cache.close()
            rows.append(row)
            print(
                f"loader  {edge}^3 {spatial}: host {row['host']['samples_per_s']:.0f}, device "
                f"{row['device']['samples_per_s']:.0f} samples/s; CPU {row['host']['host_cpu_ms']:.2f} and "
                f"{row['device']['host_cpu_ms']:.2f} ms",
                flush=True,
            )
    return rows


def training(backend, clock, volume, cases, networks, least=0.2):
    """Steps per second, for each network, size, augmentation and mode; ``least`` seconds must be left for each."""
    rows = []
    plan = [(edge, size, spatial, network) for edge, size in cases for spatial in TRAINED for network in networks]
    ahead = len(plan)
    for edge, batch_size, spatial, network in plan:
        what = f"{edge}^3, {spatial}, {network}"
        # A fit takes a second beside its measurement.
        seconds = clock.left("training") / ahead / len(MODES) - 1
        ahead -= 1
        if seconds < least:
            clock.leave_out("training", what)
            continue
        seconds = min(3.0, max(0.1, seconds))
        row = {"edge": edge, "batch_size": batch_size, "spatial": spatial, "network": network, "modes": {}}
        try:
            for cache in ("disk", "device"):
                with module(volume, edge, batch_size, spatial, cache) as data:
                    data.setup("fit")
                    warm(data)
                    if cache == "disk":
                        batch = data.train_dataset.read(data.train_dataset.draw(range(batch_size), True, 1)).finish()
                        batch = {name: tensor.to(backend.device) for name, tensor in batch.items()}
                        row["modes"]["batch"] = fit(backend, networks[network](), seconds, data, False, batch)
                        del batch
                    for mode, how in MODES.items():
                        if how and how[0] == cache:
                            row["modes"][mode] = fit(backend, networks[network](), seconds, data, how[1])
                    if cache == "device":
                        row["device_cache_mib"] = data.residents.cache.nbytes / MIB
        except torch.OutOfMemoryError:
            clock.leave_out("training", what, "out of memory")
            backend.forget()
            continue
        rows.append(row)
        best = row["modes"]["batch"]["steps_per_s"]
        print(
            f"training  {what}: {best:.1f} steps/s on one batch; "
            + ", ".join(
                f"{mode} {found['steps_per_s'] / best:.2f} x ({1e3 * found['waited_s_per_step']:.1f} ms waited)"
                for mode, found in row["modes"].items()
                if mode != "batch"
            ),
            flush=True,
        )
    return rows


def table(rows):
    """Steps per second as Markdown."""
    lines = ["| patch | augmentation | network | " + " | ".join(MODES) + " |", "|" + "---|" * (3 + len(MODES))]
    for row in rows:
        cells = []
        for mode in MODES:
            found = row["modes"][mode]
            waited = found.get("waited_s_per_step")
            cells.append(f"{found['steps_per_s']:.1f}" + ("" if waited is None else f" ({1e3 * waited:.1f} ms)"))
        lines.append(f"| {row['edge']}³ | {row['spatial']} | {row['network']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "Steps per second, and milliseconds that a step waits for its batch."])


def judge(sections):
    """Each claim with what was reached."""
    found = {}
    if sections["memory"]:
        rows = sections["memory"]
        found["memory"] = {
            "target": "voxels and the most that is held at most 2 % above the prediction, nothing left after close",
            "met": all(
                r["held_mib"] <= 1.02 * r["predicted_mib"] + 4
                and r["most_mib"] <= 1.02 * r["limit_mib"] + 4
                and r["left_mib"] < 4
                for r in rows
            ),
            "worst": max(r["most_mib"] / r["limit_mib"] for r in rows),
        }
    if sections["training"]:
        share = {
            mode: min(
                r["modes"][mode]["steps_per_s"] / r["modes"]["batch"]["steps_per_s"]
                for r in sections["training"]
                if r["network"] == "U-Net"
            )
            for mode in list(MODES)[1:]
        }
        found["training"] = {
            "target": "the U-Net trains at 0.95 of the speed on one batch, or more, with device ahead",
            "met": share["device ahead"] >= 0.95, "lowest_share_of_one_batch": share,
        }  # fmt: skip
    return found


# ------------------------------------------------------------------------------------------------------------ picture
def draw(result, path):
    """Steps per second of each mode as a share of those on one batch, one panel per network and augmentation."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = result["sections"]["training"]
    networks = list(dict.fromkeys(r["network"] for r in rows))
    figure, grid = plt.subplots(
        len(TRAINED), max(1, len(networks)), figsize=(11, 7), layout="constrained", squeeze=False, sharey=True
    )
    colors = {"off": "#e69f00", "ahead": "#0072b2", "device": "#56b4e9", "device ahead": "#009e73"}
    for y, spatial in enumerate(TRAINED):
        for x, network in enumerate(networks):
            axes = grid[y][x]
            chosen = [r for r in rows if (r["network"], r["spatial"]) == (network, spatial)]
            for number, (mode, color) in enumerate(colors.items()):
                shares = [r["modes"][mode]["steps_per_s"] / r["modes"]["batch"]["steps_per_s"] for r in chosen]
                places = [i + 0.2 * (number - 1.5) for i in range(len(chosen))]
                axes.bar(places, shares, 0.18, color=color, label=mode)
            axes.axhline(1, color="#d55e00", lw=0.8, ls="--")
            steps = [r["modes"]["batch"]["steps_per_s"] for r in chosen]
            names = [f"{r['edge']}³\n{s:.0f} steps/s" for r, s in zip(chosen, steps, strict=True)]
            axes.set_xticks(range(len(chosen)), names)
            axes.set_title(f"{network}, {spatial}", fontsize=10)
            axes.grid(axis="y", alpha=0.3)
            axes.set_axisbelow(True)
            if x == 0:
                axes.set_ylabel("steps/s over those on one batch")
    if rows:
        figure.legend(*grid[0][0].get_legend_handles_labels(), frameon=False, ncols=4, loc="outside lower center")
    device = result["device"]
    title = f"{device['name']}, torch {device['torch']}, {result['machine']['date'][:10]}"
    figure.suptitle(title + (f"\n{NO_GPU}" if device["type"] == "cpu" else ""), fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def try_to_draw(result, path):
    try:
        draw(result, path)
    except ImportError:
        print(f"no matplotlib here: draw with --plot-json {path.with_suffix('.json')}")
        return
    print(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only tests this program")
    parser.add_argument("--seconds", type=float, default=135, help="that all of it may take")
    parser.add_argument("--out", help="folder for the JSON and the PNG; by default benchmarks/results")
    parser.add_argument("--plot-json", metavar="FILE", help="draw the PNG of this JSON beside it, and measure nothing")
    args = parser.parse_args()
    if args.plot_json:
        source = Path(args.plot_json)
        try_to_draw(json.loads(source.read_text()), source.with_suffix(".png"))
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device here, so trainings on one cannot be measured.", file=sys.stderr)
        raise SystemExit(2)
    small = args.device == "cpu"
    if small and not args.out:
        parser.error("--device cpu needs --out: its figures do not belong to the results")
    if small:
        print(f"Note: {NO_GPU}.")
    backend = Cpu() if small else Cuda()
    backend.forget()
    # What is not shared out is for writing the volume and the results.
    clock = Clock(args.seconds, {"volume": 0.14, "memory": 0.07, "loader": 0.11, "training": 0.64})
    cases = ((16, 2), (24, 1)) if small else ((64, 8), (96, 4), (128, 2))
    networks = {"U-Net": lambda: unet((4, 8)) if small else unet((32, 64, 128, 256)), "one layer": Starving}
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CELLMAP_CACHE_DIR"] = f"{folder}/cache"
        size = {"raw_size": 96, "crop_size": 64} if small else {"raw_size": 320, "crop_size": 224}
        volume = ensure(folder, levels=1, classes=CLASSES, **size)
        sections = {
            "memory": memory(backend, clock, volume, cases),
            "loader": loader(backend, clock, volume, cases),
            "training": training(backend, clock, volume, cases, networks, -1e9 if small else 0.2),
        }
    result = {
        "machine": machine(), "device": backend.describe(), "modes": {mode: str(how) for mode, how in MODES.items()},
        "says_something_about_a_gpu": not small, "sections": sections, "left_out": clock.left_out,
        "verdicts": {} if small else judge(sections), "seconds": clock.spent(),
    }  # fmt: skip
    target = Path(args.out) if args.out else Path(__file__).with_name("results")
    target.mkdir(parents=True, exist_ok=True)
    name = "cpu-no-gpu" if small else "-".join(result["device"]["name"].lower().split())
    path = target / f"gpu_training-{result['machine']['date'][:10]}-{name}.json"
    path.write_text(json.dumps(result, indent=1))
    print(table(sections["training"]))
    for key, verdict in result["verdicts"].items():
        print(f"{key}: {json.dumps(verdict)}")
    print(f"{len(clock.left_out)} left out, {clock.spent():.0f} s\n{path}")
    try_to_draw(result, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
