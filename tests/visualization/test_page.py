"""HTML pages: every slice, and text from names that cannot run scripts."""

import base64
import io
import os
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.visualization.figures.page import write_page
from cellmap_lightning.visualization.figures.samples import SheetSample
from cellmap_lightning.visualization.figures.slices import contrast_limits
from tests.visualization.drawings import Page

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def samples():
    rng = np.random.default_rng(0)
    raw = rng.normal(0.5, 0.1, (5, 12, 16)).astype(np.float32)
    target = np.zeros((2, *raw.shape), np.float32)
    target[0, 1:4, 2:8, 3:9] = 1
    target[1, 3, 6:10, 5:15] = 1
    target[:, :, :, :2] = np.nan
    return [SheetSample(raw, target, 0.9 * np.nan_to_num(target), (50, 4, 4), "jrc_x/crop1 <b> & \u00b5")]


def covered(path, shape):
    """Return the voxels inside a path of whole-voxel outlines, by the parity of the edges to the left of each."""
    crossings = np.zeros((shape[0], shape[1] + 1), int)
    for line in path.split("Z")[:-1]:
        points = [tuple(map(int, p.split())) for p in line.lstrip("M").split("L")]
        for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
            assert x0 == x1 or y0 == y1
            if x0 == x1:
                crossings[min(y0, y1) : max(y0, y1), x0] += 1
    return crossings.cumsum(axis=1)[:, :-1] % 2 == 1


def test_page_has_every_slice(samples, tmp_path):
    write_page(
        samples, ["mito", "</script>er"], tmp_path / "a" / "page.html", title="t", links=[("https://n", "napari")]
    )
    page = Page(tmp_path / "a" / "page.html")
    (slices,) = page.data
    (sample,) = samples
    assert len(slices) == 5
    low, high = contrast_limits(sample.raw)
    for z, shapes in enumerate(slices):
        image = Image.open(io.BytesIO(base64.b64decode(shapes["raw"].removeprefix("data:image/png;base64,"))))
        grey = (np.clip((sample.raw[z] - low) / (high - low), 0, 1) * 255).round()
        assert np.array_equal(np.asarray(image), grey)
        for c in range(2):
            assert np.array_equal(covered(shapes["target"].get(str(c), ""), (12, 16)), sample.target[c, z] == 1)
            assert np.array_equal(
                covered(shapes["prediction"].get(str(c), ""), (12, 16)), sample.prediction[c, z] > 0.5
            )
        assert np.array_equal(covered(shapes["unknown"]["all"], (12, 16)), np.isnan(sample.target[:, z]).all(axis=0))
    # Nothing is loaded from other addresses, and names are text.
    assert not page.of("link")
    assert not any("src" in a or "href" in a for tag, a in page.tags if tag not in ("a", "img"))
    assert [a["href"] for a in page.of("a")] == ["https://n"]
    assert not any(a.get("src", "").startswith("http") for a in page.of("img"))
    assert len(page.of("script")) == 2
    (slider,) = [a for a in page.of("input") if a["type"] == "range"]
    assert (slider["min"], slider["max"], slider["value"]) == ("0", "4", "3")
    assert not page.of("b")


def decoded(address):
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/png;base64,")))))


def test_targets_in_colours_lie_over_raw(samples, tmp_path):
    """Each slice has the picture of the target, and no outlines of it; the prediction has outlines."""
    (plain,) = samples
    picture = np.zeros((*plain.raw.shape, 4), np.float32)
    picture[:, 2:5, 3:7] = (1, 0, 0, 1)
    picture[:, 6:8, 3:7] = (0, 0, 1, 0.5)
    write_page([replace(plain, pictures={"target": picture})], ["mito", "er"], tmp_path / "page.html")
    (slices,) = Page(tmp_path / "page.html").data
    assert any(shapes["prediction"] for shapes in slices)
    for shapes in slices:
        assert set(shapes["pictures"]) == {"target"}
        assert "target" not in shapes
        shown, grey = decoded(shapes["pictures"]["target"]).astype(int), decoded(shapes["raw"]).astype(int)
        assert (shown[2:5, 3:7] == (255, 0, 0)).all()
        np.testing.assert_allclose(shown[6:8, 3:7, 2], 127.5 + grey[6:8, 3:7] / 2, atol=1)
        np.testing.assert_array_equal(shown[9:], grey[9:, :, None].repeat(3, 2))


@pytest.mark.parametrize(
    "name",
    [
        "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "' onmouseover='alert(1)", "</title><b>x</b>",
        "</style></section><iframe>", "a&amp;<!-- <script>", "</code><svg onload=alert(1)>", "\\u003cscript>",
    ],
)  # fmt: skip
@pytest.mark.parametrize("where", ["title", "class", "header", "command", "address"])
def test_names_on_a_page_are_text(samples, tmp_path, name, where):
    """Names of datasets, crops and classes come from folders: as tags or attributes they could run scripts."""

    def page(text):
        sample = replace(samples[0], header=text if where == "header" else "header")
        write_page(
            [sample], ["mito", text if where == "class" else "er"], tmp_path / "page.html",
            title=text if where == "title" else "title",
            links=[(text if where == "address" else "https://n", text if where == "command" else "napari")],
        )  # fmt: skip
        return Page(tmp_path / "page.html")

    plain, named = page("plain"), page(name)
    where_href = {"href": name} if where == "address" else {}
    assert [(t, a | where_href if t == "a" else a) for t, a in plain.tags] == named.tags
    assert named.data == plain.data


def test_invalid_samples_are_refused(samples, tmp_path):
    with pytest.raises(CellMapValueError, match="at least one sample"):
        write_page([], [], tmp_path / "page.html")
    wrong = SheetSample(samples[0].raw, samples[0].target[..., 1:], None, (1, 1, 1))
    with pytest.raises(CellMapValueError, match="Sample 0 of the page: target must have one channel"):
        write_page([wrong], ["a", "b"], tmp_path / "page.html")


def test_slider_in_a_browser(samples, tmp_path):
    """In headless Chromium, the page follows when the slider is moved and a class switched off."""
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next((path for name in names if name and (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("Chromium is not installed; CHROMIUM=path names one")
    write_page(samples, ["mito", "er"], tmp_path / "page.html", title="t")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    move = """<script>
      const slider = document.querySelector('input[type=range]');
      slider.value = 1; slider.dispatchEvent(new Event('input'));
      const box = document.getElementById('class-1'); box.checked = false; box.dispatchEvent(new Event('change'));
    </script></body>"""
    (tmp_path / "moved.html").write_text(text.replace("</body>", move), encoding="utf-8")

    def opened(name):
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
        command += ["--dump-dom", (tmp_path / name).as_uri()]
        process = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        (tmp_path / "dom.html").write_text(process.stdout, encoding="utf-8")
        return Page(tmp_path / "dom.html"), process.stdout

    slices = Page(tmp_path / "page.html").data[0]
    for name, z, shown in (("page.html", 3, ("0", "1")), ("moved.html", 1, ("0",))):
        page, text = opened(name)
        assert {a["src"] for a in page.of("img")} == {slices[z]["raw"]}
        assert f"<output>{z}</output>" in text
        for kind in ("target", "prediction"):
            drawn = {a["data-c"]: a.get("d", "") for a in page.of("path") if a.get("data-kind") == kind}
            expected = {c: slices[z][kind].get(c, "") if c in shown else "" for c in ("0", "1")}
            assert drawn == expected
        hatched = {a["d"] for a in page.of("path") if a.get("data-kind") == "unknown"}
        assert hatched == {slices[z]["unknown"]["all"]}
