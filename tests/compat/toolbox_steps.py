"""Steps of the challenge's toolbox, run unmodified with `cellmap_data` replaced by `cellmap_lightning.compat`.

Run as a program: ``python toolbox_steps.py FOLDER STEP...``. The environment needs both packages, and the zarr 3 of
ours; what the toolbox imports of zarr 2, and does not use in these steps, is filled in.
"""

import importlib
import pkgutil
import sys
import traceback
from pathlib import Path

STEPS = ("train", "train_all", "predict", "predict_test", "orthoplanes", "process", "package", "score")


def replace_cellmap_data():
    import zarr
    import zarr.errors
    import zarr.storage

    from cellmap_lightning import compat

    if not hasattr(zarr.errors, "PathNotFoundError"):
        zarr.errors.PathNotFoundError = FileNotFoundError
        zarr.DirectoryStore = zarr.storage.LocalStore
    for module in pkgutil.walk_packages(compat.__path__, f"{compat.__name__}."):
        name = f"cellmap_data{module.name.removeprefix(compat.__name__)}"
        sys.modules[name] = importlib.import_module(module.name)
    sys.modules["cellmap_data"] = compat


def run(step, folder):
    search = str(folder / "data/{dataset}/{dataset}.zarr/recon-1/{name}")
    predictions, processed = (str(folder / name / "{dataset}.zarr/{crop}") for name in ("predictions", "processed"))
    config = str(folder / "train_config.py")
    if step == "train":
        from cellmap_segmentation_challenge import train

        train(config)
        if not list((folder / "checkpoints").glob("*.pth")):
            raise RuntimeError("no checkpoint was written")
    elif step == "train_all":
        from cellmap_segmentation_challenge import train

        train(str(folder / "all_config.py"))
        if not list((folder / "checkpoints").glob("all_*.pth")):
            raise RuntimeError("no checkpoint was written")
    elif step in ("predict", "predict_test"):
        from cellmap_segmentation_challenge import predict

        crops = "3" if step == "predict" else "test"
        predict(config, crops=crops, output_path=predictions, overwrite=True, search_path=search)
    elif step == "orthoplanes":
        from cellmap_segmentation_challenge import predict

        config, output = str(folder / "slices_config.py"), str(folder / "orthoplanes/{dataset}.zarr/{crop}")
        predict(config, crops="3", output_path=output, overwrite=True, search_path=search)
    elif step == "process":
        from cellmap_segmentation_challenge import process

        given = {"crops": "3", "input_path": predictions, "output_path": processed, "overwrite": True}
        process(str(folder / "process_config.py"), max_workers=1, **given)
    elif step == "package":
        from cellmap_segmentation_challenge.utils.submission import package_submission

        package_submission(processed, str(folder / "submission.zarr"), overwrite=True, max_workers=1)
    elif step == "score":
        import json

        from cellmap_segmentation_challenge.utils.eval_utils.submission import score_submission

        scores = score_submission(str(folder / "submission.zip"), truth_path=str(folder / "truth.zarr"))
        print("SCORES " + json.dumps({"overall": scores["overall_score"], "classes": scores["label_scores"]}))


if __name__ == "__main__":
    where, *steps = sys.argv[1:]
    if steps[0] in ("train", "train_all", "predict", "predict_test", "orthoplanes", "process"):
        replace_cellmap_data()
    for name in steps:
        try:
            run(name, Path(where))
        except Exception:  # the step's own result
            traceback.print_exc()
            print(f"STEP {name} failed", flush=True)
            sys.exit(1)
        print(f"STEP {name} passed", flush=True)
