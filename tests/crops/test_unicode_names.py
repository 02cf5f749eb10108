"""Names of classes in another Unicode form than the one on disk, as macOS writes them: both look alike."""

import unicodedata

import pytest

from cellmap_lightning import CellMapDataset
from cellmap_lightning.crops.spelling import meant, other_spellings
from cellmap_lightning.errors import CellMapError
from cellmap_lightning.validation import did_you_mean
from tests.foreign import cube, ramp, write_image

ARRAY = {"shape": [16] * 3, "scale": [8] * 3}
FORMS = [("NFD", "NFC"), ("NFC", "NFD")]


@pytest.mark.parametrize(("stored", "given"), FORMS)
@pytest.mark.parametrize("bracket", ["stored", "given"])
def test_the_error_names_the_form(tmp_path, stored, given, bracket):
    there, asked = (unicodedata.normalize(form, "zell\u00e4") for form in (stored, given))
    write_image(tmp_path / "v.zarr" / "em", ramp())
    write_image(tmp_path / "v.zarr" / "crop1" / there, cube())
    target = f"{tmp_path}/v.zarr/crop1/[{there if bracket == 'stored' else asked}]"
    with pytest.raises(CellMapError) as caught:
        CellMapDataset(str(tmp_path / "v.zarr" / "em"), target, [asked], ARRAY, ARRAY)
    # A bracket as stored is another spelling of the requested class; any other one names what is not there.
    both = f"(in the Unicode form {stored}, which looks alike), and classes has"
    text = both if bracket == "stored" else f"differs in its Unicode form ({stored}): rename it, or copy the name"
    assert text in str(caught.value)
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(("stored", "given"), FORMS)
@pytest.mark.parametrize("name", ["zell\u00e4", "\u00e9chantillon", "\u30ac"])
def test_suggestions_do_not_repeat_the_name(stored, given, name):
    there, asked = unicodedata.normalize(stored, name), unicodedata.normalize(given, name)
    for text in (meant([asked], [there, "er"]), did_you_mean(asked, [there, "er"])):
        assert text.startswith(f"; the name there differs in its Unicode form ({stored})")
    assert other_spellings([asked], [there]) == {asked: there}
