"""Files that torch unpickles, looked at before anybody opens them for good."""

import io
import pickle
from pathlib import Path

import torch


def refuse_pickled_code(content: Path | io.BytesIO, where: str) -> None:
    """ValueError, naming the class, if what `torch.save` wrote holds more than tensors and plain values, or is damaged.

        refuse_pickled_code(Path("common.pt"), "common.pt")

    Args:
        content: a file, or a stream at its beginning.
        where: begins the message.
    """
    try:
        torch.load(content, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        named = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "global" in line]
        raise ValueError(
            f"{where} holds more than tensors and plain values, or is damaged, and is not read: "
            f"{named[0] if named else str(error).splitlines()[0]}"
        ) from error
