"""Identities of models and of value transforms, the same in every process and run."""

import hashlib
from typing import Any

import lightning as L
import torch


def model_fingerprint(module: L.LightningModule) -> str:
    """Return the class of a model and a hash of its weights: the same in every process and run."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(f"{flat.dtype} {list(value.shape)}".encode())
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return f"{type(module).__qualname__} {digest.hexdigest()[:16]}"


def transform_name(transform: Any) -> str:
    """Return the name of a value transform; its repr may hold an address, which differs between processes."""
    if not callable(transform):
        return str(transform)
    named = transform if hasattr(transform, "__qualname__") else type(transform)
    return f"{named.__module__}.{named.__qualname__}"
