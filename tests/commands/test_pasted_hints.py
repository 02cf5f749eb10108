"""Hints of commands can be pasted: with the prefix of their settings, and without repeats."""

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from cellmap_lightning.commands.override_form import as_overrides
from cellmap_lightning.commands.program import _message
from cellmap_lightning.commands.resolvers import register_resolvers
from cellmap_lightning.crops.unannotated import refuse_unannotated
from cellmap_lightning.errors import CellMapKeyError, CellMapValueError
from cellmap_lightning.evaluation.challenge import listed_crops
from tests.commands.test_cli import run_forked
from tests.evaluation.test_challenge import manifest, row


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("or too_coarse=upsample", "or data.too_coarse=upsample"),
        ("set unannotated_classes=unknown for", "set data.unannotated_classes=unknown for"),
        ("set leakage=warn:\n  a", "set data.leakage=warn:\n  a"),
        ("set missing_raw=warn; missing_raw=mask", "set data.missing_raw=warn; data.missing_raw=mask"),
        ("split=stratified, or split=train", "data.split=stratified, or split=train"),
        ("data.leakage=warn and my_split=blocks", "data.leakage=warn and my_split=blocks"),
        ("pass overwrite=True or pad=False", "pass overwrite=true or pad=false"),
    ],
)
def test_settings_of_the_data_have_their_prefix(text, expected):
    assert as_overrides(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("as with key='labels'; dtype='float32' stores", "as with writer.key=labels; writer.dtype=float32 stores"),
        ("activation='sigmoid' (or 'softmax') converts", "writer.activation=sigmoid (or 'softmax') converts"),
        ("and dtype=uint8 stores", "and writer.dtype=uint8 stores"),
        ("writer.dtype=uint8, my_key='a'", "writer.dtype=uint8, my_key='a'"),
        ("check_context=False disables", "writer.check_context=false disables"),
    ],
)
def test_settings_of_the_writer_have_their_prefix_in_predictions(text, expected):
    assert as_overrides(text, "predict") == expected
    assert "writer." in text or "writer." not in as_overrides(text, "train")


def test_a_command_names_its_setting_with_the_prefix(volume, tmp_path):
    settings = [f"data.csv_path={volume.csv_path}", "data.classes=[mito,qqq]", "patch.shape=[8,16,16]"]
    settings += ["patch.scale=[10.48,8,8]", "data.unannotated_classes=error"]
    code, text = run_forked(*settings, cwd=tmp_path, command="preview")
    assert code == 1
    assert "data.unannotated_classes=unknown" in text


@pytest.mark.parametrize("crops", [[557, 999], ["999"], "crop999", 999])
def test_crops_that_are_not_listed_name_the_setting_that_was_given(tmp_path, crops):
    path = manifest(tmp_path, row(557, "mito", (8, 8, 8), (4, 4, 4), (8, 8, 8)))
    with pytest.raises(CellMapKeyError, match=r"^crops: '(crop)?999' matches nothing"):
        listed_crops(path, crops)


@pytest.mark.parametrize(
    ("nowhere", "listed", "hint"),
    [
        (["mito_a", "mito_b", "mito_c"], ["mito"], "(did you mean 'mito'?)"),
        (["mitos", "vess", "nucc", "golgis"], ["mito", "ves", "nuc", "golgi"], "'mito' and 'ves' and 'nuc'?)"),
        (["mitos", "vess"], ["mito", "ves"], "(did you mean 'mito' and 'ves'?)"),
    ],
)  # fmt: skip
def test_at_most_three_suggestions_without_repeats(nowhere, listed, hint):
    with pytest.raises(CellMapValueError) as caught:
        refuse_unannotated("train", nowhere, listed)
    text = str(caught.value)
    assert text.count("did you mean") == 1
    assert hint in text


@pytest.mark.parametrize("content", ["mito,1,\n", "er,1,\n", "nuc,1,\n"])
def test_errors_of_resolvers_are_their_own_sentence(tmp_path, content):
    (tmp_path / "classes.csv").write_text(content)
    register_resolvers()
    cfg = OmegaConf.create({"data": {"_target_": "dict", "classes": f"${{classes:{tmp_path}/classes.csv,qqq}}"}})
    with pytest.raises(Exception, match="qqq") as caught:
        instantiate(cfg.data)
    assert "interpolation" in str(caught.value)
    message = _message(caught.value)
    assert message is not None
    assert message.startswith(f"{tmp_path}/classes.csv has no class 'qqq'")
    assert "interpolation" not in message
    assert "full_key" not in message
