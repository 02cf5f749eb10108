"""A resumed run reads the samples of an uninterrupted one: bit for bit, and each once."""

import datetime as dt
import hashlib
import itertools

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from cellmap_lightning import CellMapDataLoader, CellMapError
from cellmap_lightning.callbacks import StreamPrefetch
from cellmap_lightning.loading.options import LoaderOptions
from tests.runs import module, task, trainer

pytestmark = [
    pytest.mark.usefixtures("quiet_lightning", "no_threads_left"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory.*exists:UserWarning"),
]


class Seen(L.Callback):
    """The samples of each step whose optimizer has stepped, one hash each."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, run, pl_module, outputs, batch, batch_idx):
        hashes = [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:12] for row in batch["raw"]]
        self.steps.append((run.current_epoch, batch_idx, hashes))

    @property
    def samples(self):
        return [sample for _, _, hashes in self.steps for sample in hashes]


class StopError(Exception):
    """The end of a run, in the middle."""


class StopAfter(L.Callback):
    """Ends a run after so many steps; what is saved is what was saved until then."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_start(self, run, pl_module, batch, batch_idx):
        if run.global_step * max(1, run.accumulate_grad_batches) >= self.steps:
            raise StopError


POINTS = {
    "each step": {"every_n_train_steps": 1},
    "each second step": {"every_n_train_steps": 2},
    "epoch": {"save_on_train_epoch_end": True},
    "validation": {"save_on_train_epoch_end": False},
}
EPOCHS, BATCHES = 3, 4


def run(
    volume, folder, *, point="each step", stop=None, ckpt=None, ahead=0, ending=None, batch=2, options=None, **given
):
    """Train, perhaps until it is stopped: what was seen."""
    seen = Seen()
    keep = ModelCheckpoint(folder, "kept", enable_version_counter=False, save_top_k=1, **POINTS[point])
    callbacks = [seen, keep]
    if ahead:
        callbacks.append(StreamPrefetch(enabled=True, depth=ahead))
    if stop is not None:
        callbacks.append(StopAfter(stop))
    limits = {"max_epochs": EPOCHS} if ending is None else {"max_epochs": None, "max_steps": ending}
    if "samples_per_epoch" not in given:
        given["batches_per_epoch"] = given.get("batches_per_epoch", BATCHES)
    with module(volume, batch_size=batch, val_samples=2, **given) as data:
        train = trainer(
            folder, callbacks=callbacks, enable_checkpointing=True, num_sanity_val_steps=0, **limits | (options or {})
        )
        try:
            train.fit(task(), data, ckpt_path=ckpt, weights_only=True)
        except StopError:
            assert stop is not None
    return seen


@pytest.fixture(scope="module")
def whole(volume, tmp_path_factory):
    """A run that was never stopped."""
    import logging
    import warnings

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen = run(volume, tmp_path_factory.mktemp("whole"))
    assert len(seen.steps) == EPOCHS * BATCHES
    assert len(set(seen.samples)) == EPOCHS * BATCHES * 2
    return seen


def rows():
    """Return the interruptions to test: a few of each kind, and all of them in the slow tests."""
    for point, stop, ending in itertools.product(POINTS, (1, 3, 4, 6, 9), ("max_epochs", "max_steps")):
        for workers, ahead in ((0, 0), (0, 2), (2, 0), (2, 2)):
            if workers and (stop, point) not in ((6, "each step"), (9, "validation"), (4, "epoch")):
                continue  # worker processes change nothing in where a run stops
            plain = (workers, ahead) == (0, 0) and stop in (4, 6)
            always = plain or ((workers, ahead) == (2, 2) and ending == "max_epochs") or (ahead and stop == 3)
            yield pytest.param(point, stop, ending, workers, ahead, marks=[] if always else pytest.mark.slow)


@pytest.mark.parametrize(("point", "stop", "ending", "workers", "ahead"), list(rows()))
def test_stream_continues(volume, tmp_path, whole, point, stop, ending, workers, ahead):
    ending = EPOCHS * BATCHES if ending == "max_steps" else None
    options = {"num_workers": workers, "ahead": ahead, "point": point, "ending": ending}
    before = run(volume, tmp_path, stop=stop, **options)
    assert len(before.steps) == stop
    kept = tmp_path / "kept.ckpt"
    found = kept.exists()
    after = run(volume, tmp_path, ckpt=kept if found else None, **options)
    done = {"each step": stop, "each second step": stop - stop % 2}.get(point, stop - stop % BATCHES)
    assert found == (done > 0)
    assert before.steps[:done] + after.steps == whole.steps


@pytest.mark.parametrize("accumulate", [2, 3])
def test_with_accumulated_gradients(volume, tmp_path, whole, accumulate):
    options = {"options": {"accumulate_grad_batches": accumulate}}
    run(volume, tmp_path, stop=6, **options)
    after = run(volume, tmp_path, ckpt=tmp_path / "kept.ckpt", **options)
    assert after.samples == whole.samples[-len(after.samples) :]
    assert after.steps == whole.steps[-len(after.steps) :]


def test_validation_in_the_middle_of_an_epoch(volume, tmp_path, whole):
    options = {"point": "validation", "options": {"val_check_interval": 3}}
    run(volume, tmp_path, stop=8, **options)  # last validated after 3 of the second 4
    after = run(volume, tmp_path, ckpt=tmp_path / "kept.ckpt", **options)
    assert after.steps == whole.steps[7:]


@pytest.mark.cover(2)
@pytest.mark.parametrize("batch", [1, 3, 4, 8])
@pytest.mark.parametrize("stop", [2, 4, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 7))])
@pytest.mark.parametrize("said", ["samples", "batches"])
def test_with_another_batch_size(volume, tmp_path, whole, batch, stop, said):
    """At the same global sample, each once, through to the end; Lightning's count of batches follows.

    ``batches`` per epoch of another size make epochs of another length.
    """
    run(volume, tmp_path, stop=stop)
    length = {"samples_per_epoch": BATCHES * 2, "batches_per_epoch": None} if said == "samples" else {}
    validated = []

    class Validated(L.Callback):
        def on_validation_end(self, run, pl_module):
            validated.append(run.current_epoch)

    seen = Seen()
    with module(volume, batch_size=batch, val_samples=2, **{"batches_per_epoch": BATCHES} | length) as data:
        train = trainer(tmp_path, callbacks=[seen, Validated()], num_sanity_val_steps=0, max_epochs=EPOCHS)
        train.fit(task(), data, ckpt_path=tmp_path / "kept.ckpt", weights_only=True)
    # No sample that was seen comes again, and none is left out but for the incomplete batch at the end of an epoch.
    order = {sample: number for number, sample in enumerate(stream(volume, 8 * 4 * EPOCHS))}
    numbers = [order[sample] for sample in seen.samples]
    assert numbers == sorted(set(numbers))
    gaps = [b - a - 1 for a, b in itertools.pairwise([stop * 2 - 1, *numbers])]
    assert max(gaps) < batch
    if 8 % batch == 0 and said == "samples" and stop * 2 % batch == 0:
        assert seen.samples == whole.samples[stop * 2 :]
    assert validated == sorted({epoch for epoch, _, _ in seen.steps})
    assert validated[-1] == EPOCHS - 1


def stream(volume, count):
    """The samples of the seed in their order."""
    with module(volume) as data:
        data.setup("fit")
        loader = CellMapDataLoader(data.train_dataset, 1, samples_per_epoch=count)
        return [hashlib.sha256(b["raw"][0].numpy().tobytes()).hexdigest()[:12] for b in loader]


def test_plain_loop_continues(volume):
    with module(volume) as data:
        data.setup("fit")

        def loader(size=2, **kwargs):
            return CellMapDataLoader(data.train_dataset, size, samples_per_epoch=8, **kwargs)

        def idx(batches):
            return [i for batch in batches for i in batch["idx"].tolist()]

        first = loader()
        whole = idx(first) + idx(first) + idx(first)
        assert first.state_dict() == {"epoch": 3, "first": 24, "samples": 0, "count": 8, "given": -1}
        for done in range(12):
            stopped = loader()
            seen = 0
            while seen < done:
                for _ in stopped:
                    seen += 1
                    if seen == done:
                        break
            state = stopped.state_dict()
            other = loader(num_workers=done % 2)
            other.load_state_dict(state)
            assert other.state_dict() == state
            rest = [idx(other) for _ in range(4)]
            assert list(itertools.chain(*rest))[: 24 - 2 * done] == whole[2 * done :]
        # On two ranks that were one, and with other batches.
        stopped = loader()
        steps = iter(stopped)
        next(steps)
        ranks = [loader(1, options=LoaderOptions(rank=rank, world=2)) for rank in (0, 1)]
        for rank in ranks:
            rank.load_state_dict(stopped.state_dict())
        pairs = list(zip(*[idx(rank) for rank in ranks], strict=True))
        assert [i for pair in pairs for i in pair] == whole[2:8]
        with pytest.raises(CellMapError, match="lacks first"):
            loader().load_state_dict({"epoch": 1, "samples": 4})


def test_ranks_that_do_not_divide_the_remaining_samples(volume):
    """Every rank reads as many batches, so that none waits for another for ever."""
    with module(volume) as data:
        data.setup("fit")
        for world in (2, 3, 4):
            ranks = [
                CellMapDataLoader(
                    data.train_dataset, 1, samples_per_epoch=16, options=LoaderOptions(rank=r, world=world)
                )
                for r in range(world)
            ]
            for rank in ranks:
                rank.load_state_dict({"epoch": 2, "first": 32, "samples": 6})
            seen = [[i for b in rank for i in b["idx"].tolist()] for rank in ranks]
            assert {len(s) for s in seen} == {10 // world}


def test_checkpoint_for_evaluation_changes_no_position(volume, tmp_path, whole):
    """`validate(ckpt_path=...)` and a fresh fit on the same module begin at the beginning."""
    run(volume, tmp_path, stop=6)
    seen = Seen()
    with module(volume, batches_per_epoch=BATCHES, val_samples=2) as data:
        train = trainer(tmp_path, callbacks=[seen], num_sanity_val_steps=0, max_epochs=EPOCHS)
        train.validate(task(), data, ckpt_path=tmp_path / "kept.ckpt", weights_only=True, verbose=False)
        train.fit(task(), data)
    assert seen.steps == whole.steps


def test_a_checkpoint_saved_in_the_middle_of_a_step(volume, tmp_path, whole):
    """As Lightning's handler of SIGUSR1 does: the step that had not ended is done again, with its samples."""

    class InTheMiddle(L.Callback):
        def __init__(self, hook):
            setattr(self, hook, self.save)

        def save(self, run, *_, **__):
            if (run.current_epoch, run.fit_loop.batch_idx + 1) == (1, 2) and not (tmp_path / "mid.ckpt").exists():
                run.save_checkpoint(tmp_path / "mid.ckpt")

    for hook in ("on_train_batch_start", "on_before_backward", "on_before_optimizer_step"):
        (tmp_path / "mid.ckpt").unlink(missing_ok=True)
        with module(volume, batches_per_epoch=BATCHES, val_samples=2) as data:
            trainer(tmp_path, callbacks=[InTheMiddle(hook)], num_sanity_val_steps=0, max_epochs=EPOCHS).fit(
                task(), data
            )
        seen = Seen()
        with module(volume, batches_per_epoch=BATCHES, val_samples=2) as data:
            train = trainer(tmp_path, callbacks=[seen], num_sanity_val_steps=0, max_epochs=EPOCHS)
            train.fit(task(), data, ckpt_path=tmp_path / "mid.ckpt", weights_only=True)
        assert seen.samples == whole.samples[(BATCHES + 1) * 2 :], hook


def test_weights_and_optimizer_are_those_of_a_run_that_never_stopped(volume, tmp_path):
    def weights(stop=None, ckpt=None):
        keep = ModelCheckpoint(tmp_path, "kept", enable_version_counter=False, every_n_train_steps=1)
        callbacks = [keep] + ([StopAfter(stop)] if stop else [])
        model = task()
        with module(volume, batches_per_epoch=BATCHES, val_samples=2) as data:
            train = trainer(
                tmp_path, callbacks=callbacks, enable_checkpointing=True, num_sanity_val_steps=0, max_epochs=2
            )
            try:
                train.fit(model, data, ckpt_path=ckpt, weights_only=True)
            except StopError:
                assert stop
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    expected = weights()
    weights(stop=5)
    assert torch.equal(weights(ckpt=tmp_path / "kept.ckpt"), expected)


class Written(L.Callback):
    """A callback that writes the samples of each rank to a file per process."""

    def __init__(self, folder, name):
        self.folder, self.name = folder, name

    def on_train_batch_end(self, run, pl_module, outputs, batch, batch_idx):
        hashes = [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:12] for row in batch["raw"]]
        with (self.folder / f"{self.name}-{run.global_rank}").open("a") as file:
            print(*hashes, file=file)


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_with_other_ranks(volume, tmp_path, whole, before, after):
    """Stopped in the middle of an epoch on some ranks, resumed on others: one stream of global batches."""

    def fit(name, world, steps, ckpt=None):
        strategy = DDPStrategy(process_group_backend="gloo", start_method="fork", timeout=dt.timedelta(seconds=300))
        keep = ModelCheckpoint(tmp_path, "kept", enable_version_counter=False, every_n_train_steps=1)
        with module(volume, batch_size=2 // world, samples_per_epoch=8, batches_per_epoch=None) as data:
            trainer(
                tmp_path, devices=world, strategy=strategy if world > 1 else "auto", enable_checkpointing=True,
                callbacks=[Written(tmp_path, name), keep, StreamPrefetch(enabled=True)], limit_val_batches=0,
                max_epochs=EPOCHS, max_steps=steps, num_sanity_val_steps=0,
            ).fit(task(), data, ckpt_path=ckpt, weights_only=True)  # fmt: skip
        ranks = [(tmp_path / f"{name}-{rank}").read_text().splitlines() for rank in range(world)]
        return [sorted(" ".join(batch).split()) for batch in zip(*ranks, strict=True)]

    expected = [sorted(hashes) for _, _, hashes in whole.steps]
    assert fit("before", before, 6) == expected[:6]
    assert fit("after", after, -1, tmp_path / "kept.ckpt") == expected[6:]
