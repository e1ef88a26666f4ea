"""Names of the splits, and where each lies in a directory of manifests."""

from pathlib import Path

SPLITS = ("train", "validation", "test")


def manifest_path(directory: Path, split: str) -> Path:
    """The cuts of a split: `manifest_path(Path("data/mine"), "train")` is `data/mine/cuts_train.jsonl.gz`."""
    return directory / f"cuts_{split}.jsonl.gz"


def tokenizer_path(directory: Path) -> Path:
    """The tokenizer that was made for the text of these manifests."""
    return directory / "tokenizer"
