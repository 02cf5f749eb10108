"""The counter-based generator: golden values, and streams that share no numbers."""

import itertools
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cellmap_lightning.runtime import rng as draws
from cellmap_lightning.runtime.rng import hashes, uniforms

WORD = 2**64
PURPOSES = {"PLACE": 0, "TURN": 1, "VALUES": 2, "ORDER": 3, "AUGMENT": 4, "INDEX": 5, "HIDE": 6, "SHUFFLE": 7}
#: Purposes of spatial transforms, and the first number of each for the seed 42 and the counter 7.
SPATIAL = {
    "STRETCH": (16, 15670984112450682168),
    "ELASTIC": (17, 11310732297062558305),
    "SLIP": (18, 2809489777087877488),
    "MISALIGN": (19, 2210291576417530629),
    "CONTROLS": (20, 7628624212101775764),
    "SECTIONS": (21, 1595101504518418200),
}
#: Numbers of SplitMix64 for the seed 1234567 that Rosetta Code prints under "Pseudo-random numbers/Splitmix64".
PUBLISHED = [
    6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
]  # fmt: skip


def mix(z):
    """Compute the finalizer of SplitMix64 (Sebastiano Vigna, https://prng.di.unimi.it/splitmix64.c) in integers."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def splitmix64(state, count):
    """Return the numbers of that generator from a state on."""
    return [mix((state + number * 0x9E3779B97F4A7C15) % WORD) for number in range(1, count + 1)]


def expected(seed, purpose, counter, count):
    """Compute the steps of the generator: one from the seed, one per purpose, one per counter, then the numbers."""
    key = splitmix64(seed % WORD, 1)[0]
    key = splitmix64(key, purpose + 1)[-1]
    state = mix((key + counter * 0x9E3779B97F4A7C15) % WORD)
    return splitmix64(state, count)


def test_the_reference_is_the_published_generator():
    assert splitmix64(1234567, 5) == PUBLISHED


@pytest.mark.parametrize("seed", [0, 1, 42, 1234567, 2**63, 2**64 - 1, -1])
@pytest.mark.parametrize("purpose", PURPOSES.values())
def test_numbers_are_those_of_the_published_generator(seed, purpose):
    counters = [0, 1, 2, 1000, 2**40, 2**63 - 1]
    numbers = hashes(seed, purpose, counters, 5)
    assert (numbers.shape, numbers.dtype) == ((6, 5), np.uint64)
    assert numbers.tolist() == [expected(seed, purpose, counter, 5) for counter in counters]


def test_golden_values():
    """Other values here would change what published seeds draw."""
    assert {name: getattr(draws, name) for name in PURPOSES} == PURPOSES
    assert [hashes(42, purpose, [7], 1).item() for purpose in PURPOSES.values()] == [
        14808682078577182586, 12587075601515356177, 14534463790008378013, 529605850751679415, 9813369376722873973,
        7033332218125851424, 12970617002456150944, 16117206247781139197,
    ]  # fmt: skip
    assert uniforms(42, draws.PLACE, [0, 7], 2).tolist() == [
        [0.3695633893045993, 0.530675788515123],
        [0.8027802640620267, 0.11843442608166288],
    ]


def test_golden_values_of_spatial_transforms():
    numbers = {name: getattr(draws, name) for name in SPATIAL}
    assert {name: (purpose, hashes(42, purpose, [7], 1).item()) for name, purpose in numbers.items()} == SPATIAL


def test_uniforms_are_the_upper_53_bits():
    numbers = [expected(3, draws.TURN, counter, 4) for counter in range(100)]
    assert uniforms(3, draws.TURN, range(100), 4).tolist() == [[n // 2**11 / 2**53 for n in row] for row in numbers]


def test_streams_of_different_purposes_seeds_and_counters_share_no_number():
    """Nor at another counter or index, as would happen if the purpose were added to the counter."""
    streams = {
        (seed, purpose): set(hashes(seed, purpose, range(500), 8).ravel().tolist())
        for seed in (0, 1, 42)
        for purpose in (*PURPOSES.values(), *(number for number, _ in SPATIAL.values()))
    }
    assert all(len(stream) == 500 * 8 for stream in streams.values())
    for one, other in itertools.combinations(streams, 2):
        assert not streams[one] & streams[other], (one, other)


def test_every_use_has_a_separate_purpose():
    """Frequencies are counted over the positions that training draws, so the two share a purpose."""
    package, call = Path(draws.__file__).parents[1], re.compile(r"\b(?:hashes|uniforms)\(\s*[\w.]+, (\w+),")
    uses = [
        (purpose, file.name)
        for file in package.rglob("*.py")
        for purpose in call.findall(file.read_text(encoding="utf-8"))
        if purpose.isupper()
    ]
    files = Counter(purpose for purpose, _ in set(uses))
    # `SLIP` and `MISALIGN` are alternatives in one call.
    spatial = set(SPATIAL) - {"SLIP", "MISALIGN"}
    assert files == dict.fromkeys((*PURPOSES, *spatial), 1) | {"PLACE": 2}
