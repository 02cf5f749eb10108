"""The state of a data module in a checkpoint: normalization, meaning of the values, and positions of its loaders."""

from collections.abc import Mapping
from typing import Any

from cellmap_lightning.checkpointing.data_match import RECORD, check_state, data_record
from cellmap_lightning.loading.run import Run
from cellmap_lightning.loading.trainer_steps import TrainingSteps, training_loaders

#: Key of the classes that no crop of the training annotates, in the state of a data module.
UNANNOTATED = "unannotated"


def data_state(data: Any) -> dict[str, Any]:
    """Return the state of a `CellMapDataModule`, as plain values.

    Keys: ``normalization``, ``{normalization_key: [offset, factor]}`` of each volume; ``trained_on``, see
    `data_record`; while training also ``unannotated``, the classes that no crop of the training annotates, and
    ``positions``, the states of its training loaders.
    """
    affine = {path: list(affine) for path, affine in data.splits.normalization.items()}
    state: dict[str, Any] = {"normalization": affine, RECORD: data_record(data)}
    train = data.splits.built.get("train")
    if train is not None and data.classes is not None:
        state[UNANNOTATED] = [name for name, crops in train.annotated_in().items() if crops == 0]
    loaders = training_loaders(data.trainer)
    counts = [loader.options.steps for loader in loaders]
    if any(isinstance(steps, TrainingSteps) and steps.data is data for steps in counts):
        state["positions"] = [loader.state_dict() for loader in loaders]
    return state


def load_data_state(data: Any, state: Mapping[str, Any]) -> None:
    """Restore the state of a `CellMapDataModule`.

    The positions are applied by its first training loader, and only in a training.

    Args:
        data: the data module.
        state: see `data_state`.

    Raises:
        CellMapValueError: the checkpoint was trained with other classes, inputs or values; see `check_data`.
    """
    check_state(state, data)
    data.resume_positions = list(state.get("positions", ())) if Run(data.trainer).is_fit else []
    data.unannotated = tuple(state.get(UNANNOTATED, ()))
    affine = state.get("normalization", {})
    data.splits.restore_normalization(
        {path: (float(offset), float(factor)) for path, (offset, factor) in affine.items()}
    )
