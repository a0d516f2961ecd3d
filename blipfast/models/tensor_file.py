"""Tensors written as safetensors, for every file of ours."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write `path`, which whoever may read other new files may read. OSError if it cannot be written: a full disk."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written ({error})") from error
    mask = os.umask(0)  # safetensors' own permissions are for the owner alone
    os.umask(mask)
    with suppress(OSError):  # not every network disk has permissions
        path.chmod(0o666 & ~mask)
