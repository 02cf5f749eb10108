"""Draw `timeline.png`: what runs when, without and with batches read ahead, and a scheme of the same with a GPU.

Run ``python docs/draw_timeline.py`` in the repository. The two panels above are measured: a loader over the synthetic
volume, without a cache so that reading takes its time, and a step that only waits, as the host does for a device. The
lowest panel is a scheme: its lengths are made up, its order follows from `prefetch` and `SideStream`.
"""

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cellmap_lightning import CellMapDataLoader, CellMapDataset
from cellmap_lightning.crops.options import ReadOptions
from cellmap_lightning.demo.synthetic import write_volume
from cellmap_lightning.loading.prefetch import prefetch

PATCH = {"shape": [32, 64, 64], "scale": [5.24, 4.0, 4.0]}
BATCHES, DEPTH, ROUNDS = 6, 2, 9
READ, COPY, STEP, WAIT, KEPT = "#e69f00", "#56b4e9", "#0072b2", "#dddddd", "#b8d4e8"
#: Row, first and last second, and the number of the batch.
Span = tuple[str, float, float, int]


class Recorder:
    """Does with batches what there is to do without a device, and writes down when."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.began = time.perf_counter()

    def bind(self) -> None:
        """Nothing belongs to the thread."""

    def copy(self, batch: Any) -> tuple[Any]:
        """The batch: there is no device."""
        return (batch,)

    def acquire(self, batch: Any) -> Any:
        """The batch."""
        return batch

    def record(self, row: str, number: int, call: Callable[[], Any]) -> Any:
        """The result of a call, whose time is written down."""
        start = time.perf_counter() - self.began
        result = call()
        self.spans.append((row, start, time.perf_counter() - self.began, number))
        return result


def reading(loader: Iterable[Any], recorder: Recorder) -> Iterator[Any]:
    """The loader's batches; the thread that requests one is recorded as reading."""
    batches = iter(loader)
    for number in range(BATCHES):
        yield recorder.record("read", number, partial(next, batches))


def measured(loader: CellMapDataLoader, step: Callable[[], None], ahead: bool) -> list[Span]:
    """One pass: what the main thread and the reading one did."""
    recorder = Recorder()
    source = partial(reading, loader, recorder)
    batches = prefetch(source, recorder, DEPTH) if ahead else source()
    with contextlib.closing(batches):
        for number in range(BATCHES):
            recorder.record("wait", number, partial(next, batches))
            recorder.record("step", number, step)
    return recorder.spans


def passes(folder: str) -> tuple[list[Span], list[Span]]:
    """A pass without and one with batches read ahead, those of median length."""
    torch.set_num_threads(1)
    volume = write_volume(Path(folder) / "volume.zarr")
    target = f"{volume.path}/recon-1/labels/groundtruth/crop2/[mito,er,nuc]"
    arrays = {"raw": PATCH}, {"labels": PATCH}
    with CellMapDataset(
        volume.raw_path,
        target,
        ["mito", "er", "nuc"],
        *arrays,
        is_train=True,
        read=ReadOptions(cache="none", max_workers=1),
    ) as dataset:
        loader = CellMapDataLoader(dataset, batch_size=4, samples_per_epoch=4 * BATCHES)
        list(loader)  # files come into the page cache
        reads = [end - start for row, start, end, _ in measured(loader, lambda: None, False) if row == "read"]
        # A step takes a quarter longer than reading its batch.
        step = partial(time.sleep, 1.25 * statistics.median(reads))
        found: dict[bool, list[list[Span]]] = {False: [], True: []}
        for _ in range(ROUNDS):
            for ahead, runs in found.items():
                runs.append(measured(loader, step, ahead))
    plain, ahead = (sorted(runs, key=lambda spans: spans[-1][2])[ROUNDS // 2] for runs in found.values())
    return plain, ahead


def bar(axes: Axes, row: float, start: float, end: float, color: str, text: str = "", height: float = 0.62) -> None:
    """A bar with a number in it, if there is room."""
    axes.barh(row, end - start, left=start, height=height, color=color, edgecolor="white", linewidth=1)
    if text:
        dark = color == STEP
        axes.text(
            (start + end) / 2, row, text, ha="center", va="center", fontsize=10, color="white" if dark else "black"
        )


def rows(axes: Axes, names: list[str]) -> None:
    """Names of rows, the first one on top; no frame."""
    axes.set_yticks(range(len(names)), names, fontsize=10)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def draw_measured(axes: Axes, spans: list[Span], ahead: bool, end: float) -> None:
    """Draw the tasks of the threads, in milliseconds."""
    for kind, begun, ended, number in spans:
        start, stop = 1e3 * begun, 1e3 * ended
        if kind == "wait":
            # Without a thread, the main thread reads while it waits for the batch.
            if ahead and stop - start > 0.004 * end:
                bar(axes, 0, start, stop, WAIT)
        elif kind == "read":
            bar(axes, int(ahead), start, stop, READ, str(number))
        else:
            bar(axes, 0, start, stop, STEP, str(number))
    rows(axes, ["main thread", "reading thread"] if ahead else ["main thread"])
    axes.set_xlim(0, end)
    last = 1e3 * max(stop for _, _, stop, _ in spans)
    what = f"batches read ahead, depth {DEPTH}" if ahead else "each batch read when it is asked for"
    axes.set_title(f"Measured, {what}: {BATCHES} batches in {last:.0f} ms", loc="left", fontsize=11)


def draw_scheme(axes: Axes) -> None:
    """A host that is one step ahead of the device, and what it keeps in the device's memory."""
    count, read, copy, step, launch = 6, 1.2, 0.5, 3.0, 0.4
    reads: list[tuple[float, float]] = []
    taken: list[float] = []
    starts: list[float] = []
    free = 0.0  # when the reading thread is free
    asked = [0.0, 0.0]  # when reading each batch was asked for: depth of them at the beginning
    for n in range(count):
        while len(reads) <= n:
            begin = max(free, asked[len(reads)])
            free = begin + read
            reads.append((begin, free))
        ready = reads[n][1] + copy
        # The host takes the next batch when the step before the last one has run.
        take = ready if n == 0 else max(ready, starts[n - 1] + launch, taken[-1])
        taken.append(take)
        asked.append(take)
        starts.append(max(ready, take, starts[-1] + step if starts else 0.0))
    here = 10.3
    for n in range(count):
        copied = reads[n][1] + copy
        bar(axes, 0, *reads[n], READ, str(n))
        bar(axes, 1, reads[n][1], copied, COPY, str(n))
        if n < 4:
            bar(axes, 2, starts[n], starts[n] + step, STEP, f"{n}: finish, step")
            axes.annotate(
                "", xy=(starts[n] + 0.03, 1.69), xytext=(copied, 1.31), annotation_clip=False,
                arrowprops={"arrowstyle": "-|>", "color": "#d55e00", "lw": 1.3, "shrinkA": 0, "shrinkB": 0},
            )  # fmt: skip
        lane = 3.2 + 0.42 * (n % 4)
        end = min(starts[n] + step, 13.7)
        bar(axes, lane, reads[n][1], min(taken[n], end), COPY, "", 0.36)
        bar(axes, lane, min(taken[n], end), end, KEPT, "", 0.36)
        axes.text(reads[n][1] + 0.08, lane, str(n), va="center", fontsize=9)
        if n < 4:
            bar(axes, 5.05, starts[n], end, "#999999", str(n), 0.36)
    axes.axvline(here, color="black", lw=1, ls="--", ymax=0.97)
    axes.text(
        13.85, 3.83,
        f"at the dashed line,\nof what travels:\n  depth = {DEPTH} queued\n+ 1 taken, to run next\n"
        "+ 1 dropped by the host,\n"
        "   kept until its step has run",
        fontsize=9.5, va="center",
    )  # fmt: skip
    axes.text(13.85, 5.05, "+ 1 finished", fontsize=9.5, va="center")
    axes.text(13.85, 1.5, "the step waits for the\nevent of its copy", fontsize=9.5, va="center", color="#d55e00")
    rows(axes, [])
    axes.set_yticks(
        [0, 1, 2, 3.83, 5.05],
        ["reading thread", "side stream: copy", "compute stream", "device memory:\nas it travels", "finished"],
        fontsize=10,
    )
    axes.set_xlim(0, 17.2)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.set_title(
        "A scheme, not measured: with a GPU the copies run on a stream of their own (the host is one step ahead)",
        loc="left", fontsize=11,
    )  # fmt: skip


def main() -> None:
    """Write the picture beside this file."""
    with tempfile.TemporaryDirectory() as folder:
        plain, ahead = passes(folder)
    figure = Figure(figsize=(12, 7.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(3, 1, height_ratios=[0.75, 1.15, 3.6])
    end = 1.02e3 * max(plain[-1][2], ahead[-1][2])
    draw_measured(panels[0], plain, False, end)
    draw_measured(panels[1], ahead, True, end)
    panels[1].set_xlabel("ms")
    handles = [
        panels[0].barh([0], [0], color=color, label=label)
        for color, label in (
            (READ, "read"),
            (STEP, "step"),
            (WAIT, "waiting"),
            (COPY, "copied, queued"),
            (KEPT, "taken, kept"),
        )
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=10)
    draw_scheme(panels[2])
    figure.savefig(Path(__file__).with_name("timeline.png"))


if __name__ == "__main__":
    main()
