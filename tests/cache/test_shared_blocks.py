"""Blocks and arenas of anonymous shared memory."""

import contextlib
import multiprocessing
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from cellmap_lightning.cache.shared_memory import Arena, SharedBlock
from tests.cache.region_files import FORK, KEY, LAYOUT, put

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes share memory so on Linux only"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


# -- memory


def look_into(block, queue):
    memory = np.frombuffer(block.buffer, np.uint8)
    queue.put(memory[:4].tolist())
    memory[0] = 9


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_blocks_are_shared_with_forked_and_spawned_processes(method):
    context = multiprocessing.get_context(method)
    block = SharedBlock(10000)
    memory = np.frombuffer(block.buffer, np.uint8)
    memory[:4] = [1, 2, 3, 4]
    queue = context.Queue()
    process = context.Process(target=look_into, args=(block, queue))
    process.start()
    assert queue.get(timeout=120) == [1, 2, 3, 4]
    process.join(60)
    assert memory[0] == 9


def shared_memory():
    """Open files and mappings of blocks in this process."""
    found = []
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the folder itself, while it was listed
            found.append(str(file.readlink()))
    maps = Path("/proc/self/maps").read_text().splitlines()
    return sum("memfd:cellmap" in f for f in found), sum("memfd:cellmap" in m for m in maps)


def test_nothing_of_a_block_is_left_after_it_is_closed():
    before = shared_memory()
    block = SharedBlock(1 << 20)
    copy = pickle.loads(pickle.dumps(block))
    array = np.frombuffer(block.buffer, np.uint8)
    assert shared_memory()[1] == before[1] + 2
    block.close()
    copy.close()
    assert shared_memory()[1] == before[1] + 1
    assert array[0] == 0, "a reader of it may still read it"
    del array
    assert shared_memory() == before


@pytest.mark.parametrize("closed", [True, False])
def test_nothing_of_an_arena_is_left(closed):
    """Closed or forgotten."""
    before = shared_memory()
    for _ in range(3):
        arena = Arena(LAYOUT.nbytes)
        mapped = arena.attach(KEY, LAYOUT, 0)
        with mapped.lock((0, 0, 0)):
            put(mapped, (0, 0, 0), 3)
        if closed:
            arena.close()
        del arena, mapped
        assert shared_memory() == before


def test_an_arena_after_a_forgotten_one_locks_its_own_file():
    """Both may have had the same file descriptor."""
    forgotten = Arena(LAYOUT.nbytes)
    with forgotten.attach(KEY, LAYOUT, 0).lock((0, 0, 0)):
        pass
    del forgotten
    arena = Arena(LAYOUT.nbytes)
    mine, theirs = FORK.Pipe()

    def child():
        mapped = arena.attach(KEY, LAYOUT, 0)
        theirs.send("begins")
        with mapped.lock((0, 0, 0)):
            theirs.send("has it")

    with arena.attach(KEY, LAYOUT, 0).lock((0, 0, 0)):
        process = FORK.Process(target=child)
        process.start()
        assert mine.recv() == "begins"
        assert not mine.poll(0.1)
    assert mine.poll(120)
    process.join(120)
    arena.close()
