"""Samples to draw, and look-ups in the figures and pages drawn of them."""

import json
from html.parser import HTMLParser

import numpy as np

from cellmap_lightning.visualization.figures import SheetSample

CLASSES = ["mito", "er", "ves"]


def sample(shape=(6, 12, 16), scale=(50.0, 4.6, 4.6), classes=3, target=True, prediction=True, header="jrc_x crop 1"):
    """Return noise with one box a class, each in other slices; boxes [z, y, x] start at (1 + c, 2, 3 * c)."""
    rng = np.random.default_rng(0)
    raw = rng.normal(0.5, 0.1, shape).astype(np.float32)
    masks = np.zeros((classes, *shape), dtype=np.float32)
    for c in range(classes):
        masks[(c, *((slice(1 + c, 5),) if len(shape) == 3 else ()), slice(2, 8), slice(3 * c, 3 * c + 3))] = 1
    return SheetSample(raw, masks if target else None, 0.9 * masks if prediction else None, scale, header)


def by_gid(axes, gid):
    return [artist for artist in axes.get_children() if artist.get_gid() == gid]


def labels(figure):
    return [axes.get_label() for axes in figure.axes]


def texts(figure):
    return [text.get_text() for text in figure.texts] + [
        text.get_text() for legend in figure.legends for text in legend.get_texts()
    ]


def panel(figure, label):
    return next(axes for axes in figure.axes if axes.get_label() == label)


def nm_per_inch(axes, scale):
    """Return the nm per inch of a panel, vertically and horizontally."""
    (x0, x1), (y1, y0) = axes.get_xlim(), axes.get_ylim()
    box, inches = axes.get_position(), axes.figure.get_size_inches()
    return (y1 - y0) * scale[0] / (box.height * inches[1]), (x1 - x0) * scale[1] / (box.width * inches[0])


class Page(HTMLParser):
    """The tags of a page and the JSON in it."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.data, self._json = [], None, False
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._json = dict(attributes).get("type") == "application/json"

    def handle_data(self, data):
        if self._json:
            self.data, self._json = json.loads(data), False

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]
