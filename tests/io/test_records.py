"""Small measurements that are cached between runs: none is stale, and none that is damaged is used."""

import json

import pytest

from cellmap_lightning.inspection.kept import clear, listing
from cellmap_lightning.io.records import DamagedRecordError, sealed, unsealed

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
