"""How fast a volume is predicted, and in how much memory, beside MONAI's sliding window in memory.

    python benchmarks/prediction.py

Each measurement is a process of its own with one torch thread. The identity model shows what everything but the model
costs: ours reads stored chunks, blends and writes compressed ones; MONAI's blends an array that is in memory already
(`infer`), or reads it first and writes the result as ours does (`read, infer, write`). A convolution shows how two
processes share the work. Memory is the highest of what belongs to the process and to no file, sampled every 5 ms, above
what it was when everything had been imported and the model had run once.
"""

import argparse
import importlib
import json
import math
import os
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


def volume(folder, length):
    """A raw volume of smooth noise, written once."""
    from cellmap_lightning.volumes.writer import write_multiscale

    path = Path(folder) / f"raw{length}.zarr"
    if not path.exists():
        rng = np.random.default_rng(0)
        small = rng.integers(0, 256, (length // 4,) * 3).astype(np.uint8)
        data = small.repeat(4, 0).repeat(4, 1).repeat(4, 2)
        write_multiscale(path, data, scale=SCALE, translation=(0, 0, 0), chunks=(64, 64, 64))
    return path


def own_memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


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


def model_of(name):
    import lightning as L
    import torch

    class Model(L.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.network = torch.nn.Identity()
            if name == "convolution":
                self.network = torch.nn.Sequential(
                    torch.nn.Conv3d(1, 8, 3, padding=1), torch.nn.Conv3d(8, 1, 3, padding=1)
                )

        def forward(self, x):
            x = self.network(x)
            return x.sigmoid() if name == "convolution" else x

        def predict_step(self, batch, batch_idx):
            return self(batch["raw"])

    model = Model().eval()
    with torch.inference_mode():
        model(torch.zeros(1, 1, *PATCH))
    return model


def ours(path, out, model, blend, world, block_mb):
    import datetime as dt

    import lightning as L
    from lightning.pytorch.strategies import DDPStrategy

    from cellmap_lightning import CellMapDataModule
    from cellmap_lightning.callbacks import PredictionWriter

    data = CellMapDataModule(
        ["a"], {"raw": {"shape": PATCH, "scale": SCALE}}, datasets={"predict": [{"raw": str(path)}]}, batch_size=4,
        max_workers=1,
    )  # fmt: skip
    strategy = DDPStrategy(process_group_backend="gloo", start_method="fork", timeout=dt.timedelta(seconds=600))
    writer = PredictionWriter(str(out), blend, block_mb=block_mb)
    run = L.Trainer(
        accelerator="cpu", devices=world, strategy=strategy if world > 1 else "auto", logger=False, callbacks=[writer],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with data:
        run.predict(model, datamodule=data)
    return writer.redundancy


def monai(path, out, model, blend):
    """Seconds of the inference alone."""
    import torch
    import zarr
    from monai.inferers import sliding_window_inference

    from cellmap_lightning.volumes.writer import write_multiscale

    raw = torch.from_numpy(zarr.open_array(str(path / "s0"), mode="r")[...]).to(torch.float32)[None, None] / 255
    began = time.perf_counter()
    with torch.inference_mode():
        mode = "gaussian" if blend == "gaussian" else "constant"
        found = sliding_window_inference(raw, PATCH, 4, model, overlap=0.5 if blend == "gaussian" else 0.25, mode=mode)
    seconds = time.perf_counter() - began
    levels = 1 + max(0, int(math.log2(raw.shape[2] / 32)))
    stored = (found[0, 0] * 255).round().to(torch.uint8).numpy()
    write_multiscale(out, stored, scale=SCALE, translation=(0, 0, 0), levels=levels)
    return seconds


def one(task):
    """One measurement."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    path = volume(task["folder"], task["length"])
    model = model_of(task["model"])
    # Imported before the clock starts.
    for name in ("lightning.pytorch.strategies", "cellmap_lightning.datamodule", "monai.inferers"):
        importlib.import_module(name)
    from cellmap_lightning.callbacks import PredictionWriter  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        os.environ["CELLMAP_CACHE_DIR"] = f"{folder}/cache"
        with Peak() as peak:
            began = time.perf_counter()
            if task["who"] == "ours":
                extra = {"redundancy": ours(
                    path, f"{folder}/out.zarr", model, task["blend"], task["world"], task["block_mb"]
                )}  # fmt: skip
            else:
                extra = {"infer": monai(path, f"{folder}/out.zarr", model, task["blend"])}
            seconds = time.perf_counter() - began
    print("RESULT " + json.dumps({**task, **extra, "seconds": seconds, "peak_mb": peak.mb}))


def measure(**task):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, __file__, "--one", json.dumps(task)], capture_output=True, text=True, env=env, check=False
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(done.stderr)
    return json.loads(lines[-1][7:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 384], help="edges of the volumes")
    parser.add_argument("--block-mb", type=float, default=64)
    parser.add_argument("--folder", help="where volumes are written; a temporary folder by default")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(json.loads(args.one))
        return
    with tempfile.TemporaryDirectory() as temporary:
        common = {"folder": args.folder or temporary, "block_mb": args.block_mb, "world": 1}
        for length in args.lengths:  # so that no measurement writes its own
            volume(common["folder"], length)
        voxels = {length: length**3 / 1e6 for length in args.lengths}
        print("identity: million voxels per second, and peak MB above the model's own")
        for blend in ("trim", "average", "gaussian"):
            for length in args.lengths:
                found = measure(who="ours", model="identity", blend=blend, length=length, **common)
                said = f"{blend:<9} {length:>5}^3  ours {voxels[length] / found['seconds']:6.2f}"
                said += f" ({found['peak_mb']:5.0f} MB, {found['redundancy']:.2f} patches for each without blocks)"
                if blend != "trim":
                    peer = measure(who="monai", model="identity", blend=blend, length=length, **common)
                    said += f"   MONAI infer {voxels[length] / peer['infer']:6.2f}, read, infer, write"
                    said += f" {voxels[length] / peer['seconds']:6.2f} ({peer['peak_mb']:5.0f} MB)"
                print(said, flush=True)
        length = args.lengths[min(1, len(args.lengths) - 1)]
        task = {"who": "ours", "model": "convolution", "blend": "trim", "length": length}
        alone, two = (measure(**task, **common | {"world": world})["seconds"] for world in (1, 2))
        print(f"convolution, {length}^3: {alone:.1f} s with one process, {two:.1f} s with two: {alone / two:.2f}x")


if __name__ == "__main__":
    main()
