"""Reasons why a file cannot be read as a checkpoint."""

#: First bytes of torch's checkpoints: zip archives, and the pickles of versions before 1.6.
_MAGIC = (b"PK\x03\x04", b"\x80")


def unreadable(first: bytes, error: Exception) -> str:
    """Return the reason why a checkpoint cannot be read, without torch's advice to run code from it.

    Args:
        first: the first bytes of the file.
        error: the error of torch.
    """
    if not first.startswith(_MAGIC):
        return f"is not a checkpoint: it begins with {first!r}; give a .ckpt file that a training has saved"
    if "weights_only" in str(error):
        detail = next(
            (line.strip() for line in str(error).splitlines() if "Unsupported" in line or "GLOBAL" in line), ""
        )
        return (
            f"holds objects that could run code when they are loaded, and is not read{f' ({detail})' if detail else ''}"
        )
    return f"is damaged, or not a checkpoint: {str(error).splitlines()[0]}"
