"""Arrays opened with TensorStore."""

import json
import os
from typing import Any

from cellmap_lightning.errors import CellMapValueError, ChunkError
from cellmap_lightning.io.ngff import ArrayInfo
from cellmap_lightning.io.store import Remote, StorePath

#: The processes that used TensorStore: this one, or one that it was forked from.
_processes: set[int] = set()


def open_tensorstore(info: ArrayInfo, label: str) -> Any:
    """Open an array with TensorStore.

    Args:
        info: the array.
        label: name of the array, for messages.

    Raises:
        ChunkError: TensorStore was used before this process was forked; its threads do not survive that.
        CellMapValueError: a store, or an option of it, that is not supported here.
    """
    import tensorstore

    check_process(label)
    driver = "zarr3" if info.zarr_format == 3 else "zarr"
    return tensorstore.open({"driver": driver, "kvstore": kvstore(info.path)}, open=True, read=True).result()


def check_process(label: str) -> None:
    """Check that TensorStore works in this process, and record that it is used.

    Args:
        label: name of the array, for messages.

    Raises:
        ChunkError: it was used before this process was forked; its threads do not survive that.
    """
    if _processes - {os.getpid()}:
        raise ChunkError(
            f"{label}: TensorStore was used in the process that this one was forked from, "
            "and does not work in both; start worker processes with multiprocessing_context='forkserver' or "
            "'spawn', or use reader='zarr'"
        )
    _processes.add(os.getpid())


def kvstore(path: StorePath) -> dict[str, Any]:
    """Return TensorStore's JSON specification of the store that holds an array.

    Raises:
        CellMapValueError: see `open_tensorstore`.
    """
    if not isinstance(path, Remote):
        return {"driver": "file", "path": str(path)}
    options = json.loads(path.options)
    bucket, _, inside = path.url.partition("://")[2].partition("/")
    if path.protocol in ("http", "https") and not options:
        return {"driver": "http", "base_url": path.url}
    if path.protocol in ("gs", "gcs") and not options:
        return {"driver": "gcs", "bucket": bucket, "path": inside}
    if path.protocol in ("s3", "s3a") and set(options) <= {"anon", "profile", "endpoint_url"}:
        spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": inside}
        if options.get("endpoint_url"):
            spec |= {"endpoint": options["endpoint_url"], "aws_region": "us-east-1"}
        if options.get("profile"):
            spec["aws_credentials"] = {"type": "profile", "profile": options["profile"]}
        elif options.get("anon") or path.is_open:
            spec["aws_credentials"] = {"type": "anonymous"}
        return spec
    raise CellMapValueError(
        f"{path}: reader='tensorstore' reads s3:// (with anon, profile and endpoint_url), gs:// and http:// "
        f"without options; storage_options has {sorted(options)}: use reader='zarr'"
    )
