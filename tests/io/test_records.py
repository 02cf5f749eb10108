"""Small measurements that are cached between runs: none is stale, and none that is damaged is used."""

import json
import os
import subprocess
import sys
import time

import pytest

from cellmap_lightning.inspection.cached_files import clear, listing
from cellmap_lightning.io.records import DamagedRecordError, RecordKey, recall, sealed, unsealed

CONTENTS = [
    {},
    {"a": 1, "b": [0.1, -1e300, None, True]},
    {"Größe": 'a "} quoted', "x": {"checksum": "", "content": {}}},
]


@pytest.mark.parametrize("content", CONTENTS)
def test_a_sealed_text_is_json_and_gives_its_content(content):
    text = sealed(content)
    assert unsealed(text) == unsealed(f"\n{text}\n") == content
    assert json.loads(text)["content"] == content


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("damage", ["cut", "changed", "added", "lost", "zeroed"])
def test_damage_anywhere_is_noticed(content, damage):
    text = sealed(content)
    for at in range(len(text)):
        changed = {
            "cut": text[:at],
            "changed": text[:at] + chr(ord(text[at]) ^ 1) + text[at + 1 :],
            "added": text[:at] + "7" + text[at:],
            "lost": text[:at] + text[at + 1 :],
            "zeroed": text[:at] + "\0" * (len(text) - at),
        }[damage]
        with pytest.raises(DamagedRecordError):
            unsealed(changed)


@pytest.mark.parametrize("text", ["", "{}", "null", "[]", '{"checksum": "", "content": {}}', "\udcff", "[" * 100_000])
def test_unsealed_texts_are_refused(text):
    with pytest.raises(ValueError, match="not a sealed record"):
        unsealed(text)


@pytest.mark.parametrize("body", ["[]", "{", '"text"', "[" * 100_000])
def test_a_right_checksum_of_something_else(body):
    from cellmap_lightning.io.records import _checksum

    with pytest.raises(DamagedRecordError, match="its content is"):
        unsealed(f'{{"checksum": "{_checksum(body)}", "content": {body}}}')


def test_records_of_the_first_version_are_listed_and_removed(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(folder))
    folder.mkdir()
    (folder / f"{'ab' * 16}.json").write_text(json.dumps({"of": "/data/old", "mean": 1.0}))
    (folder / "notes.json").write_text("mine")
    assert "1 measurements" in listing()
    clear()
    assert [p.name for p in folder.iterdir()] == ["notes.json"]


WRITER = """
import sys, json
from cellmap_lightning.io.records import RecordKey, remember
key = RecordKey("test", ("a",), "volume")
print("ready", flush=True)
number = 0
while True:
    number += 1
    remember(key, "stamp", {"writer": int(sys.argv[1]), "number": number, "padding": "x" * 20_000})
"""


def test_writers_that_are_killed_at_any_moment(tmp_path, monkeypatch):
    """Records are read whole while two processes write one and are killed."""
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path / "cache"))
    key = RecordKey("test", ("a",), "volume")
    contents = []
    for round_ in range(4):
        writers = [
            subprocess.Popen([sys.executable, "-c", WRITER, str(n)], stdout=subprocess.PIPE, text=True)
            for n in range(2)
        ]  # fmt: skip
        for writer in writers:
            assert writer.stdout.readline() == "ready\n"
        end = time.monotonic() + 0.1 + 0.03 * round_
        while time.monotonic() < end:
            if key.path.exists():
                contents.append(recall(key, lambda: "stamp", dict))
        for writer in writers:
            writer.kill()
            writer.wait()
            writer.stdout.close()
        assert recall(key, lambda: "stamp", dict) is not None
    assert len(contents) > 10
    assert all(one is not None and len(one["padding"]) == 20_000 for one in contents)
    for draft in (tmp_path / "cache").glob(".*"):
        os.utime(draft, (1, 1))
    clear()
    assert not list((tmp_path / "cache").iterdir())
