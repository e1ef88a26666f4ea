"""An endless stream of prompt batches whose position can be saved and found again exactly."""

from typing import Any

from torch.utils.data import DataLoader

from nemo_mapo.data.dataset import num_batches_per_epoch, skip_batches
from nemo_mapo.types import PromptBatch


class PromptStream:
    """Full batches of the training split, epoch after epoch, reshuffled each epoch."""

    def __init__(self, dataloader: DataLoader[PromptBatch], batch_size: int) -> None:
        self.dataloader = dataloader
        self.batch_size = batch_size
        self.batches_per_epoch = num_batches_per_epoch(dataloader)
        if self.batches_per_epoch == 0:
            raise ValueError(
                f"data.train_ds.batch_size={batch_size} exceeds the training split; use a smaller batch or more data"
            )
        self.epoch = 0
        self.batch = 0
        self._iterator: Any = None

    def __next__(self) -> PromptBatch:
        if self.batch == self.batches_per_epoch:
            self.epoch, self.batch, self._iterator = self.epoch + 1, 0, None
        if self._iterator is None:
            skip_batches(self.dataloader, self.epoch, self.batch)
            self._iterator = iter(self.dataloader)
        prompts: PromptBatch = next(self._iterator)
        self.batch += 1
        return prompts

    def state_dict(self) -> dict[str, int]:
        """Epoch and batches consumed in it."""
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the batches that `state` has consumed."""
        self.epoch, self.batch, self._iterator = state["epoch"], state["batch"], None
