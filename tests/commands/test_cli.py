"""``cellmap-train`` from the command line, in a separate process or a fork."""

import csv
import functools
import gc
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from tests import processes
from tests.commands.terminals import pseudo_terminal, read_terminal

COMMAND = Path(sys.executable).with_name("cellmap-train")


def run(*arguments, cwd, timeout=400, **env):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return processes.run([COMMAND, *arguments], timeout, cwd=cwd, env=env)


#: Imported before a fork: what most commands would import in each of them.
IMPORTED = (
    "lightning", "monai.networks.nets", "matplotlib.figure", "matplotlib.backends.backend_agg", "PIL.PngImagePlugin",
    "s3fs", "cellmap_lightning.callbacks", "cellmap_lightning.commands.train", "cellmap_lightning.commands.predict",
    "cellmap_lightning.datamodule", "cellmap_lightning.training.report", "cellmap_lightning.training.task",
    "cellmap_lightning.visualization.figures.sheet",
)  # fmt: skip


@functools.cache
def prepare_forks():
    """Import what the commands need, and compose a configuration, for which Hydra finds its plugins."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    from cellmap_lightning.commands.resolvers import CONFIGS, register_resolvers

    for name in IMPORTED:
        if importlib.util.find_spec(name.partition(".")[0]):
            import_module(name)
    register_resolvers()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIGS.resolve()), version_base="1.3"):
        hydra.compose("train", overrides=["data.classes=[mito,er]"], return_hydra_config=True)
    GlobalHydra.instance().clear()


def run_forked(*arguments, cwd, command="train", columns=None):
    """Run a command in a fork of this process, which has imported torch and Lightning already and saves seconds.

    With ``columns`` its output is a terminal of this width.
    """
    import warnings

    import hydra._internal.utils

    prepare_forks()
    main = import_module(f"cellmap_lightning.commands.{command}_command").main
    sys.stdout.flush()
    sys.stderr.flush()
    master, terminal = pseudo_terminal(columns) if columns else (None, None)
    child = os.fork()
    if child == 0:
        code = 99
        # What other tests have left: finalizers of S3 would wait a second each for threads that are not here.
        gc.freeze()
        try:
            out = terminal or os.open(cwd / "stderr.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            if terminal is not None:
                os.close(master)
                for name in ("COLUMNS", "LINES", "CI", "NO_COLOR"):
                    os.environ.pop(name, None)
                os.environ["TERM"] = "xterm"
            os.dup2(out, 2)
            os.dup2(out, 1)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            os.chdir(cwd)
            torch.set_num_threads(1)  # the threads of libgomp are not here, and would be waited for
            warnings.resetwarnings()
            # Hydra takes the tracer of coverage.py for a debugger, under which it prints tracebacks.
            hydra._internal.utils.is_under_debugger = lambda: False
            sys.argv = [f"cellmap-{command}", *arguments]
            try:
                main()
                code = 0
            except SystemExit as e:
                code = e.code if isinstance(e.code, int) else 98
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    text = None
    if terminal is not None:
        os.close(terminal)
        text = read_terminal(master)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), (cwd / "stderr.txt").read_text() if text is None else text


def small(volume, *more):
    return [
        f"data.csv_path={volume.csv_path}",
        "data.classes=[mito,er]",
        "patch.shape=[8,16,16]",
        "patch.scale=[10.48,8,8]",
        "data.batch_size=2",
        "data.batches_per_epoch=3",
        "data.val_samples=4",
        "model.channels=[4,8]",
        "model.strides=[2]",
        "trainer=cpu",
        "trainer.max_epochs=2",
        "trainer.log_every_n_steps=1",
        *more,
    ]


def test_help_imports_neither_torch_nor_lightning(tmp_path):
    code = (
        "import sys, json\n"
        "sys.argv = ['cellmap-train', '--help']\n"
        "from cellmap_lightning.commands.train_command import main\n"
        "try:\n    main()\nexcept SystemExit as e:\n    assert not e.code\n"
        "print(json.dumps([m for m in ('torch', 'lightning', 'zarr', 'monai') if m in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
    assert "experiment: " in done.stdout
    assert "demo, " in done.stdout


def test_import_is_lazy():
    code = (
        "import sys, cellmap_lightning\nassert 'torch' not in sys.modules\n"
        "cellmap_lightning.CellMapDataset\n"
        "import cellmap_lightning.loading.dataloader\n"
        "print([m for m in ('lightning', 'hydra', 'monai', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_files_of_a_run(volume, tmp_path):
    done = run(*small(volume, "compare_untrained=true", "hydra.run.dir=out"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for line in ("class", "mito", "er ", "mean", "results in"):
        assert line in done.stdout
    assert "untrained" in done.stdout
    assert "constant" in done.stdout
    out = tmp_path / "out"
    for name in ("checkpoints/best.ckpt", "checkpoints/last.ckpt", "config.yaml", "curves.png", "samples.png"):
        assert (out / name).stat().st_size > 0
    with (out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"train/loss", "val/loss", "val/dice", "val/dice_mito", "val/dice_er"} <= set(rows[0])
    checkpoint = torch.load(out / "checkpoints/best.ckpt", weights_only=True)
    assert checkpoint["cellmap_config"]["data"]["classes"] == ["mito", "er"]
    assert "${" not in (out / "config.yaml").read_text()


@pytest.mark.slow
def test_softmax_target(volume, tmp_path):
    done = run(
        *small(volume, "+data.target_arrays.labels.kind=labels", "trainer.max_epochs=1", "hydra.run.dir=out"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "mean" in done.stdout
    assert (tmp_path / "out" / "samples.png").exists()


def test_ctrl_c_prints_how_to_continue(volume, tmp_path):
    with processes.started(
        [COMMAND, *small(volume, "trainer.max_epochs=10000", "hydra.run.dir=out")], cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:  # fmt: skip
        last = tmp_path / "out" / "checkpoints" / "last.ckpt"
        deadline = time.monotonic() + 120
        while not last.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert (
        "interrupted; the same command with hydra.run.dir=out resume=auto continues from the newest checkpoint"
        in errors
    )
    assert "Traceback" not in errors


def test_sweep(volume, tmp_path):
    code, text = run_forked(
        "-m", *small(volume, "task.dice_weight=0,1", "trainer.max_epochs=1", "hydra.sweep.dir=sweep"), cwd=tmp_path
    )
    assert code == 0, text
    assert sorted(p.parent.name for p in (tmp_path / "sweep").glob("*/samples.png")) == ["0", "1"]
    rows = [line.split() for line in text.split("\nruns\n")[1].splitlines()]
    assert rows[0] == ["run", "task.dice_weight", "val/dice", "mito", "er"]
    assert [row[:2] for row in rows[1:3]] == [["0", "0"], ["1", "1"]]


@pytest.mark.slow
def test_cross_validation_sweep_over_challenge_folders(volume, tmp_path):
    (tmp_path / "data" / "jrc_a").mkdir(parents=True)
    (tmp_path / "data" / "jrc_a" / "jrc_a.zarr").symlink_to(volume.path)
    overrides = [argument for argument in small(volume) if not argument.startswith("data.csv_path")]
    done = run(
        "-m", *overrides, "data.search_path=data", "data.split=kfold", "data.n_folds=3", "data.fold=0,1,2",
        "trainer.fast_dev_run=true", "hydra.sweep.dir=sweep", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("class  train") == 3
    assert "split.csv" in done.stdout
    validates = []
    for fold in range(3):
        with (tmp_path / "sweep" / str(fold) / "split.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 5
        validates += [row["target"].split("/")[-2] for row in rows if row["usage"] == "validate"]
    assert sorted(validates) == [f"crop{n}" for n in range(1, 6)]
    # One of them again, by the CSV that it left.
    again = [f"data.csv_path={tmp_path}/sweep/2/split.csv", "trainer.fast_dev_run=true", "hydra.run.dir=again"]
    code, text = run_forked(*overrides, *again, cwd=tmp_path)
    assert code == 0, text
    assert (tmp_path / "again" / "split.csv").read_text() == (tmp_path / "sweep" / "2" / "split.csv").read_text()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["data.split=stratifed"], ["Error: split must be one of csv, random,", "did you mean 'stratified'?"]),
        (
            ["data.split=kfold", "data.n_folds=6"],
            ["n_folds=6 needs at least 6 crops that do not overlap, got 5"],
        ),
        (["data.split=kfold", "data.fold=5"], ["fold must be in [0, 5) with n_folds=5, got 5"]),
        (["data.only_crops=[crop9]"], ["only_crops: 'crop9' matches nothing; did you mean 'crop"]),
        ([], ["data.classes is required: set it with data.classes=...", "data.csv_path is required"]),
        (["data.batchsize=4"], ["Error: There is no 'data.batchsize'; ", "did you mean 'data.batch_size'?"]),
        (["trainer.max_epoch=4"], ["Error: There is no 'trainer.max_epoch'", "did you mean 'trainer.max_epochs'?"]),
        (["dta.batch_size=3"], ["did you mean 'data.batch_size'?"]),
        (["data.batch_size=0"], ["batch_size must be a whole number of at least 1, got 0"]),
        (["data.batch_size=four"], ["batch_size must be a whole number of at least 1, got 'four'"]),
        (
            ["+data.batchsize=4"],
            ["data.batchsize: CellMapDataModule has no argument 'batchsize'; did you mean 'batch_size'?"],
        ),
        (
            ["experiment=demo", "data.cache=dsk"],
            ["Error: cache must be one of auto, device, disk, memory, chunks, none, got 'dsk'"],
        ),
        (["experiment=demo", "data.reader=zar"], ["Error: reader must be one of zarr, tensorstore, got 'zar'"]),
        (
            ["experiment=demo", "data.intensity_transforms.contrast=1.5"],
            ["Error: intensity_transforms.contrast must be [lowest, highest], none below 0, got 1.5"],
        ),
        (["experiment=dmo"], ["Could not find 'experiment/dmo'", "demo"]),
        (["model=resnet"], ["Could not find 'model/resnet'", "unet"]),
        (["data.csv_path=nowhere.csv"], ["the CSV of crops nowhere.csv does not exist"]),
        (["patch.scale=[1,1,1]"], ["crops for 'train' cannot be used", "5.24x finer along z"]),
        (["patch.shape=[8,15,16]"], ["patch.shape=[8, 15, 16]: 15 is not a multiple of 2", "14 and 16 are"]),
        (["patch.shape=16"], ["Error: patch.shape=16 is a single number; give three lengths", "[16, 16, 16]"]),
        (["patch.scale=[-8,8,8]"], ["Error: patch.scale=[-8, 8, 8]: the voxel size along z is -8"]),
        (["trainer=gpu"], ["No supported gpu backend found; trainer=cpu runs without one"]),
        (["data.batch_size=2", "-m", "seed=1"], ["-m comes first: cellmap-train -m"]),
        (
            ["patch.shape=[8,16]"],
            [
                "patch.shape=[8, 16] has two lengths",
                "give three lengths (z, y, x), such as [8, 16, 16]",
                "model=unet2d",
            ],
        ),
        (["data.pad=false", "patch.shape=[8,900,16]"], ["use a smaller patch, or pad=true"]),
        (["data.classes=[mito,golgi]"], ["no crop for 'train' annotates 'golgi'"]),
        (["task.class_weights=balanced"], ["class_weights must be"]),
        (["trainer.max_epochs=abc"], ["Error: trainer.max_epochs must be int, got 'abc'"]),
        (["trainer.precision=17"], ["Error: trainer: lightning.pytorch.trainer.trainer.Trainer cannot be created: "]),
        (["trainer.strategy=dpp"], ["dpp"]),
        (["task.optimizer.lr=fast"], ["Error: task.optimizer.lr must be float, got 'fast'"]),
        (
            ["task.optimizer.lr=-1"],
            ["Error: the optimizer cannot be created with {'lr': -1, 'weight_decay': 0.0001}: "],
        ),
        (["task.dice_weight=abc"], ["Error: dice_weight must be in [0, 1], got 'abc'"]),
        (["model.channels=abc"], ["Error: "]),
        (["data.spatial_transforms.mirror.axes.x=2"], ["probability for x must be in [0, 1], got 2"]),
    ],
    ids=lambda a: (a[0] if a else "nothing") if isinstance(a, list) and (not a or "=" in a[0]) else "",
)
def test_invalid_overrides_are_reported_without_traceback(volume, tmp_path, arguments, expected):
    overrides = [
        a for a in small(volume) if arguments and not any(a.split("=")[0] == b.split("=")[0] for b in arguments)
    ]
    code, text = run_forked(*overrides, *arguments, cwd=tmp_path)
    assert code == (2 if "-m" in arguments else 1), text  # the exit status of argparse
    for part in expected:
        assert part in text
    assert "Traceback" not in text
    assert len([line for line in text.splitlines() if line.strip() and not line[:1].isdigit()]) <= 20


EXPERIMENT = "# @package _global_\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (EXPERIMENT + "pach: {shape: [8, 16, 16]}\n", "Error: there is no 'pach'; did you mean 'patch'?"),
        (EXPERIMENT + "batch_size: 4\n", "there is no 'batch_size'; did you mean 'data.batch_size'?"),
        (EXPERIMENT + "run: {nmae: mito}\n", "there is no 'run.nmae'; did you mean 'run.name'?"),
        (EXPERIMENT + "patch: {shpe: [8, 16, 16]}\n", "there is no 'patch.shpe'; did you mean 'patch.shape'?"),
        (EXPERIMENT + "rate: 0.1\n", "there is no 'rate'"),
        (EXPERIMENT + "data: {input_arrays: {raw: {shpe: 1}}}\n", "input_arrays.raw has no 'shpe'"),
        (EXPERIMENT + "callbacks: {mine: {retry_policy: 3}}\n", "callbacks.mine has no _target_"),
        (EXPERIMENT + "patch: {scale: [9, 9, 9], voxel_size: [8, 8, 8]}\n", "patch has scale and voxel_size"),
        ("name: mito\n", "sets experiment.name and so on, which nothing reads: the first line of its file must be"),
    ],
)
def test_invalid_experiments_are_reported_without_traceback(volume, tmp_path, text, expected):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "mito.yaml").write_text(text)
    overrides = [a for a in small(volume) if not a.startswith("patch.scale")]
    code, output = run_forked("--config-dir", "mine", "experiment=mito", *overrides, cwd=tmp_path)
    assert code == 1
    assert expected in output
    assert "Traceback" not in output


def test_interpolated_keys_and_voxel_size_alias(volume, tmp_path):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "mito.yaml").write_text(
        EXPERIMENT + "rate: 0.002\npatch: {voxel_size: [10.48, 8, 8]}\ntask: {optimizer: {lr: '${rate}'}}\n"
        "data: {input_arrays: {raw: {voxel_size: [20.96, 16, 16]}}}\n"
    )
    overrides = [a for a in small(volume) if not a.startswith("patch.scale")]
    command = ["--config-dir", "mine", "experiment=mito", *overrides, "trainer.fast_dev_run=true", "hydra.run.dir=out"]
    code, output = run_forked(*command, cwd=tmp_path)
    assert code == 0, output
    used = OmegaConf.load(tmp_path / "out" / "config.yaml")
    assert used.patch == {"shape": [8, 16, 16], "scale": [10.48, 8, 8]}
    assert used.data.target_arrays.labels.scale == [10.48, 8, 8]
    assert used.data.input_arrays.raw.scale == [20.96, 16, 16]
    assert used.task.optimizer.lr == 0.002
    code, output = run_forked(*command, "patch.voxel_size=[20.96,16,16]", cwd=tmp_path)
    assert code == 0, output
    assert OmegaConf.load(tmp_path / "out" / "config.yaml").patch.scale == [20.96, 16, 16]


def test_sweep_returns_the_monitored_metric(volume, tmp_path):
    callback = "+hydra.callbacks.returned._target_=hydra.experimental.callbacks.LogJobReturnCallback"
    overrides = small(volume, "trainer.max_epochs=1", "hydra.sweep.dir=sweep")
    code, output = run_forked("-m", callback, *overrides, cwd=tmp_path)
    assert code == 0, output
    (returned,) = re.findall(r"Succeeded with return value: (\S+)", output)
    with (tmp_path / "sweep" / "0" / "metrics.csv").open() as file:
        (measured,) = [row["final_val/dice"] for row in csv.DictReader(file) if row["final_val/dice"]]
    assert float(returned) == pytest.approx(float(measured))


@pytest.mark.parametrize("more", [[], ["callbacks=none_of_them"]], ids=["checkpoints", "no callbacks"])
def test_unknown_monitor(volume, tmp_path, more):
    (tmp_path / "mine" / "callbacks").mkdir(parents=True)
    (tmp_path / "mine" / "callbacks" / "none_of_them.yaml").write_text("nothing: null\n")
    code, output = run_forked(
        "--config-dir", "mine", *small(volume, "trainer.max_epochs=1", "monitor=val/dise", *more), cwd=tmp_path
    )
    assert code == 1
    assert "Error: monitor=val/dise is not measured; did you mean 'val/dice'?" in output
    assert not list(tmp_path.glob("**/*.ckpt"))  # no step was trained
    assert "Traceback" not in output


@pytest.mark.skipif(sys.gettrace() is not None, reason="Hydra prints tracebacks under a tracer")
def test_invalid_override_in_a_separate_process(tmp_path):
    done = run("data.batchsize=4", cwd=tmp_path)
    assert done.returncode == 1
    assert "did you mean 'data.batch_size'?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_submitit_sweep(volume, tmp_path):
    """Jobs are pickled and run in new processes, as through Slurm."""
    done = run(
        "-m", *small(volume, "trainer.max_epochs=1", "data.seed=1,2", "run.name=two"), "hydra/launcher=submitit_local",
        "hydra.launcher.timeout_min=5", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for number in (0, 1):
        assert (tmp_path / f"multirun/two/{number}/checkpoints/best.ckpt").exists()
