"""Entry point of every command: a Hydra program whose configuration is checked before its job runs.

Neither torch nor Lightning is imported before a job starts, so that ``--help`` answers at once.
"""

import logging
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cellmap_lightning.commands.arguments import check_groups, prepare_arguments
from cellmap_lightning.commands.config_keys import check_known, check_missing, rename_voxel_sizes
from cellmap_lightning.commands.config_values import check_model_shape, check_patch, check_targets
from cellmap_lightning.commands.file_errors import file_error_message, is_file_error
from cellmap_lightning.commands.help_text import register_help, version_text
from cellmap_lightning.commands.hydra_errors import HydraErrors
from cellmap_lightning.commands.messages import Stopped, stop
from cellmap_lightning.commands.override_form import as_overrides
from cellmap_lightning.commands.override_hints import NO_KEY, override_hints
from cellmap_lightning.commands.path_keys import check_paths
from cellmap_lightning.commands.private_run import contain_secrets, protect_logs, protect_run
from cellmap_lightning.commands.resolvers import CONFIGS, register_resolvers
from cellmap_lightning.commands.signals import ExitOnSignal
from cellmap_lightning.errors import CellMapError
from cellmap_lightning.runtime import interrupts

log = logging.getLogger(__name__)

# At import: launchers such as submitit unpickle the job in a new process, which imports this module and no other one.
register_resolvers()
register_help()


def run_command(
    name: str,
    job: Callable[[list[DictConfig]], Any],
    prepare: Callable[[DictConfig], list[DictConfig]] = lambda cfg: [cfg],
) -> Any:
    """Run a command under Hydra; errors that the user can act on are printed without a traceback.

    Args:
        name: the command, such as ``train``, which is also the name of its configuration.
        job: the work, called with the checked configurations.
        prepare: returns the configurations of the job from the one that Hydra composed.

    Returns:
        The result of the job.

    Raises:
        SystemExit: the command failed or was interrupted.
    """
    if "--version" in sys.argv[1:]:  # Hydra would print its own
        print(version_text())
        return None
    started = False
    errors = HydraErrors()

    def run(cfg: DictConfig) -> Any:
        nonlocal started
        started = True
        with errors.suspended(), ExitOnSignal():
            return _run_job(cfg, name, job, prepare)

    interrupts.install()
    # An alias of the command line; files are handled in `rename_voxel_sizes`.
    sys.argv[1:] = [re.sub(r"^\+{0,2}patch\.voxel_size=", "patch.scale=", a) for a in sys.argv[1:]]
    protect_logs(sys.argv[1:], name)
    try:
        sys.argv[1:] = prepare_arguments(name, sys.argv[1:], CONFIGS)
    except CellMapError as error:
        stop(str(error))
    main = hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=name)(run)
    try:
        with errors.installed():
            result = main()
        interrupts.settle()
        return result
    except KeyboardInterrupt:
        stop("interrupted", 130)
    except SystemExit as exit_:
        if isinstance(exit_, Stopped):
            sys.stderr.write(errors.text)  # of a callback that stopped while it handled an error
        elif exit_.code not in (0, None):
            _explain(name, errors, started)
        raise


def _explain(name: str, errors: HydraErrors, started: bool) -> None:
    """Print why Hydra exits without or between jobs: in the words of this package, or else those of Hydra."""
    if isinstance(errors.error, OSError) and is_file_error(errors.error):
        stop(file_error_message(errors.error))
    hints = [] if started else override_hints(name, sys.argv[1:])
    if errors.text and any(hint.startswith(NO_KEY) for hint in hints):
        # Hydra proposes to append the key, which would then be refused.
        stop("\n".join(hints))
    for text in (errors.text.rstrip("\n"), *hints):
        if text:
            print(text, file=sys.stderr)


def _run_job(
    cfg: DictConfig,
    name: str,
    job: Callable[[list[DictConfig]], Any],
    prepare: Callable[[DictConfig], list[DictConfig]],
) -> Any:
    """Check a configuration and run the job with it."""
    try:
        protect_run(cfg)
        check_groups(OmegaConf.to_container(cfg, resolve=False), CONFIGS)  # type: ignore[arg-type]
        rename_voxel_sizes(cfg, name)
        check_known(cfg, name)
        check_paths(cfg, name)
        check_patch(cfg, slices=name == "predict")
        configs = prepare(cfg)
        for config in configs:
            check_missing(config)
            check_targets(config)
            check_model_shape(config)
        return job(configs)
    except Exception as error:
        message = _message(error, _place(cfg))
        if message is not None:
            log.debug("traceback of the error", exc_info=error)
            stop(as_overrides(message, name))
        if contain_secrets(sys.argv[1:]):  # Hydra would print the arguments
            stop("".join(traceback.format_exception(error)))
        raise


def _place(cfg: DictConfig) -> str:
    """Return the file or folder that a command writes to."""
    for key in ("output", "out", "writer.output"):
        try:
            value = OmegaConf.select(cfg, key, throw_on_missing=False)
        except OmegaConfBaseException:
            continue  # it refers to a value that is not given
        if isinstance(value, str):
            return value
    return str(HydraConfig.get().runtime.output_dir)


def _message(error: Exception, place: str | None = None) -> str | None:
    """Return the message of an error that the user can act on; None for any other error.

    Args:
        error: the error.
        place: the file or folder that the command writes to.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, CellMapError):
            return str(cause)
        if isinstance(cause, OmegaConfBaseException):
            return _configuration_message(cause)
        if isinstance(cause, OSError) and is_file_error(cause):
            return file_error_message(cause, place)
        if type(cause).__name__ == "MisconfigurationException":  # Lightning's class, which is not imported here
            without = "; trainer=cpu runs without one" if "gpu backend" in str(cause) else ""
            return f"{str(cause).rstrip('.!') if without else cause}{without}"
        cause = cause.__cause__
    return _instantiation_message(error) if isinstance(error, InstantiationException) else None


def _configuration_message(error: OmegaConfBaseException) -> str:
    """Return the message of an error of OmegaConf; that of the package's own error where a resolver raised one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, CellMapError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    return str(error)


def _instantiation_message(error: InstantiationException) -> str:
    """Return one line with the key, the class and the error of an instantiation that failed."""
    key = re.search(r"full_key: (\S+)", str(error))
    target = re.search(r"'([\w.]+)'", str(error))
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    first_line = next(iter(str(cause).strip().splitlines()), "")
    where = f"{key[1]}: " if key else ""
    return f"{where}{target[1] if target else 'it'} cannot be created: {type(cause).__name__}: {first_line}"
