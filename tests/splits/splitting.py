"""Splits, and lists of crops to divide."""

from tests.conftest import INPUTS, TARGETS
from tests.make import make_split

GT = "recon-1/labels/groundtruth"
RAW = "recon-1/em/fibsem-uint8"
CLASSES = ["mito", "er", "nuc", "pm", "ves"]


def split(csv_path=None, **kwargs):
    # Datasets here are links to one volume.
    given = {"classes": CLASSES, "input_arrays": INPUTS, "target_arrays": TARGETS, "pad": True, "leakage": "ignore"}
    return make_split(csv_path, **(given | kwargs))
