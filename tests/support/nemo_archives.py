"""`.nemo` files written by tests, member by member."""

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import torch


def nemo_archive(path: Path, members: Mapping[str, bytes]) -> Path:
    """Write an archive with these members: `nemo_archive(path, {"./model_config.yaml": b""})`."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return path


def saved(value: object) -> bytes:
    """What `torch.save` writes."""
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()
