"""The programs in `benchmarks/`: their logic, not their figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def run(program, *arguments):
    # Without the GPU, also where there is one.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "benchmarks" / program, *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=590, env=env)


def test_gpu_streams_without_a_gpu_is_an_error():
    done = run("gpu_streams.py")
    assert done.returncode == 2
    assert done.stderr == "There is no CUDA device here, so streams cannot be measured.\n"
    assert done.stdout == ""


def test_gpu_streams_on_the_cpu(tmp_path):
    """All of its code that needs no stream, and a result that does not pass for one."""
    done = run("gpu_streams.py", "--device", "cpu", "--quick", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "say nothing about streams" in done.stdout
    (path,) = tmp_path.glob("gpu_streams-*-cpu-no-streams.json")
    assert path.with_suffix(".png").stat().st_size > 10_000
    result = json.loads(path.read_text())
    assert result["says_something_about_streams"] is False
    assert "say nothing about streams" in result["device"]["note"]
    assert result["verdicts"] == {}
    assert result["machine"]["date"]
    assert result["seconds"] > 0
    sections = result["sections"]
    assert [(r["engine"], r["depth"], r["batches"], r["mismatches"]) for r in sections["corruption"]] == [
        ("ReadAhead", depth, 200, 0) for depth in (1, 2, 3, 4)
    ]
    assert {(r["form"], r["finished_mib"], r["regime"]) for r in sections["overlap"]} == {
        (form, size, regime)
        for form in ("compact", "finished")
        for size in (1, 2)
        for regime in ("long", "synced", "equal", "bare")
    }
    for row in sections["overlap"]:
        assert set(row["step_s"]) == {"resident", "on", "off", "original"}
        for figures in (*row["step_s"].values(), *row["over_resident"].values(), row["off_over_on"]):
            assert 0 < figures["low"] <= figures["median"] <= figures["high"]
            assert figures["rounds"] == 2
    # 3 of 36 bytes per voxel travel: raw and two bytes of bits, for float32 of raw and eight classes.
    assert {r["form"]: round(r["finished_mib"] / r["queued_mib"]) for r in sections["overlap"]} == {
        "compact": 12,
        "finished": 1,
    }
    assert [r["streams"] for r in sections["streams"]] == [1, 2, 4]
    assert len(sections["memory"]) == 16
    # Sections that need a device are named.
    assert [text.split(" (")[0] for text in result["left_out"]] == [
        "corruption: the control NotKept",
        "corruption: the control NotAwaited",
    ]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The volume on which loaders are measured."""
    folder = tmp_path_factory.mktemp("measured")
    done = run("data.py", str(folder), "--raw-size", "96", "--crop-size", "64", "--classes", "3", "--levels", "1")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("implementation", ["ours", "ours-finished", "floor", "floor-reused", "floor-finished"])
def test_our_loaders_are_measured(measured, implementation):
    """The rows of this package and of the limits; the program itself checks the batches."""
    done = run(
        "measure.py", implementation, "--data", str(measured), "--patch", "24", "--classes", "3", "--seconds", "0.1",
        "--warm-seconds", "0.1", "--warm-samples", "4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (
        result["types"]
        == {
            "ours": {"raw": "torch.uint8", "labels": "torch.uint8"},
            "ours-finished": {"raw": "torch.float32", "labels": "torch.float32"},
            "floor-reused": {"raw": "torch.uint8", "labels": "torch.uint8"},
            "floor": {"raw": "torch.uint8", "labels": "torch.uint8"},
            "floor-finished": {"raw": "torch.float32", "labels": "torch.float32"},
        }[implementation]
    )
    assert result["cpu_ms"] > 0


def test_case_that_does_not_fit_is_named(tmp_path):
    done = run("gpu_streams.py", "--device", "cpu", "--quick", "--minutes", "0.3", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert result["sections"]["overlap"] == []
    assert "overlap: 1 MiB, compact (no time was left)" in result["left_out"]
    assert "overlap: 2 MiB, finished (no time was left)" in result["left_out"]


@pytest.mark.slow
def test_executor():
    done = run("executor.py", "--rounds", "2")
    assert done.returncode == 0, done.stderr
    assert "Target: access takes at most 1/33.1" in done.stdout
    assert "| 9 tasks, new / persistent |" in done.stdout


@pytest.fixture
def gpu_streams(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_streams

    return gpu_streams


def rows(ratios, regime="equal"):
    return [
        {
            "form": "compact", "regime": regime, "finished_mib": size,
            "off_over_on": {"median": ratio, "low": ratio - 0.005, "high": ratio + 0.005, "rounds": 5},
        }
        for size, ratio in ratios.items()
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ratios", "start", "pays"),
    [
        ({10: 1.0, 30: 1.0, 100: 1.1, 300: 1.4}, "100 MiB is right", 100),
        ({10: 1.2, 30: 1.2, 100: 1.3, 300: 1.4}, "100 MiB is too high: prefetch gains from 10 MiB", 10),
        ({10: 0.8, 30: 1.2, 100: 1.3, 300: 1.4}, "100 MiB is a compromise", 30),
        ({10: 0.8, 30: 0.9, 100: 0.9, 300: 1.4}, "100 MiB is too low: prefetch loses 2 % at 100 MiB", 300),
        ({10: 1.0, 30: 1.0, 100: 1.0, 300: 1.0}, "100 MiB is not supported", None),
        ({100: 1.3, 300: 1.4}, "100 MiB is right: prefetch gains from there on, and not below (one side", 100),
    ],
)
def test_threshold_verdict(gpu_streams, ratios, start, pays):
    assert gpu_streams.threshold_verdict(rows(ratios)).startswith(start)
    assert gpu_streams.pays_from(rows(ratios), "equal") == pays


def test_a_gain_has_to_hold_in_every_round(gpu_streams):
    found = rows({100: 1.1})
    found[0]["off_over_on"]["low"] = 0.99
    assert gpu_streams.pays_from(found, "equal") is None


def test_shortened_search_reaches_no_target(gpu_streams):
    def judged(batches, mismatches):
        real = {"engine": "SideStream", "depth": 1, "batches": batches, "mismatches": mismatches}
        control = {"engine": "NotKept", "depth": 2, "batches": 1000, "mismatches": 5}
        sections = {"corruption": [real, control], "overlap": [], "streams": [], "memory": []}
        return gpu_streams.judge(sections)["corruption"]

    assert judged(10_000, 0)["met"]
    assert judged(10_000, 0)["controls_find_something"] == {"NotKept": True}
    assert not judged(9_000, 0)["met"]
    assert not judged(10_000, 1)["met"]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_streams_on_a_gpu(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "gpu_streams.py", "--quick", "--out", tmp_path]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=590, env=env)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    controls = [r for r in json.loads(path.read_text())["sections"]["corruption"] if r["engine"] != "SideStream"]
    assert len(controls) == 2


def test_gpu_training_without_a_gpu_is_an_error():
    done = run("gpu_training.py")
    assert done.returncode == 2
    assert done.stderr == "There is no CUDA device here, so trainings on one cannot be measured.\n"
    assert done.stdout == ""


@pytest.mark.slow
def test_gpu_training_on_the_cpu(tmp_path):
    """All of its code, and a result that does not pass for one of a GPU."""
    done = run("gpu_training.py", "--device", "cpu", "--seconds", "60", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("gpu_training-*-cpu-no-gpu.json")
    assert path.with_suffix(".png").stat().st_size > 10_000
    result = json.loads(path.read_text())
    assert result["says_something_about_a_gpu"] is False
    assert result["verdicts"] == {}
    sections = result["sections"]
    for row in sections["memory"]:
        assert row["counted_mib"] == row["predicted_mib"] >= row["uploaded_mib"] > 0
    assert len(sections["loader"]) == 4
    assert {(r["edge"], r["spatial"], r["network"]) for r in sections["training"]} == {
        (edge, spatial, network)
        for edge in (16, 24)
        for spatial in ("mirrored", "rotated")
        for network in ("U-Net", "one layer")
    }
    for row in sections["training"]:
        assert set(row["modes"]) == {"batch", "off", "ahead", "device", "device ahead"}
        assert row["device_cache_mib"] > 0
        assert all(found["steps_per_s"] > 0 for found in row["modes"].values())


def trained(share, edge=64):
    modes = {mode: {"steps_per_s": 10 * share} for mode in ("off", "ahead", "device", "device ahead")}
    return {"edge": edge, "network": "U-Net", "modes": {"batch": {"steps_per_s": 10}} | modes}


def held(over, left=0):
    return {"held_mib": 1000, "predicted_mib": 1000, "most_mib": 3000 * over, "limit_mib": 3000, "left_mib": left}


@pytest.mark.parametrize(
    ("memory", "training", "met"),
    [
        ([held(1)], [trained(1), trained(0.96, 96)], (True, True)),
        ([held(1), held(1.1)], [trained(1), trained(0.9, 96)], (False, False)),
        ([held(1, left=100)], [trained(1)], (False, True)),
    ],
)
def test_verdicts_on_trainings(monkeypatch, memory, training, met):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_training

    found = gpu_training.judge({"memory": memory, "training": training})
    assert (found["memory"]["met"], found["training"]["met"]) == met
    assert gpu_training.judge({"memory": [], "training": []}) == {}
