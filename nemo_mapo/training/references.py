"""The start policy, serving both references with one set of weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from nemo_mapo.data.prompts import without_audio
from nemo_mapo.data.tokenizer import SpecialTokens
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.models.layout import MicroBatching
from nemo_mapo.models.lora import adapters_off, is_adapter
from nemo_mapo.ranks import device
from nemo_mapo.rows import Row, TokenSignals
from nemo_mapo.training.signals import token_signals_in_parts


class FrozenReference:
    """pi_ref (hears the audio; KL penalty) and pi_textref (does not; differential entropy) in one set of weights.

    Either a frozen copy of the start policy, or the policy itself, which without its adapters equals its start; if
    encoder or projector are trained beside the adapters, a copy of them is kept.
    """

    def __init__(
        self,
        model: AudioLLM,
        special: SpecialTokens,
        *,
        keep_placeholders: bool,
        batching: MicroBatching,
        adapted: bool = False,
        offload: bool = False,
    ) -> None:
        """Take a copy, which is frozen here, or an `adapted` policy; `offload` keeps a copy in host memory."""
        self.model = model if adapted else model.eval().requires_grad_(False)
        self.special = special
        self.keep_placeholders = keep_placeholders
        self.batching = batching
        self.adapted = adapted
        self.offload = offload
        self._uses = 0
        self._start = [
            (parameter, parameter.detach().clone())
            for name, parameter in model.named_parameters()
            if adapted and parameter.requires_grad and not is_adapter(name)
        ]

    @contextmanager
    def start_policy(self) -> Iterator[AudioLLM]:
        """The policy as it started, without gradient, within the block."""
        adapters = adapters_off(self.model) if self.adapted else nullcontext()
        with torch.no_grad(), adapters, self._on_device() if self.offload else self._with_start_weights():
            yield self.model

    @contextmanager
    def _with_start_weights(self) -> Iterator[None]:
        """Swap out what is trained beside adapters; the outermost of nested blocks restores it."""
        trained = [parameter.data for parameter, _ in self._start]
        try:
            for parameter, start in self._start:
                parameter.data = start
            yield
        finally:
            for (parameter, _), data in zip(self._start, trained, strict=True):
                parameter.data = data

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Move an offloaded copy to the device; the outermost of nested blocks moves it back."""
        self._uses += 1
        self.model.to(device())
        try:
            yield
        finally:
            self._uses -= 1
            if self._uses == 0:
                self.model.to("cpu")

    def log_probs(self, rows: Sequence[Row]) -> list[Float[Tensor, "_"]]:
        """log pi_ref of each completion token given text and audio, nats."""
        return [one.log_probs for one in self._signals(rows)]

    def text_entropy(self, rows: Sequence[Row]) -> list[Float[Tensor, "_"]]:
        """H(pi_textref) in nats at each completion token, over the full vocabulary at temperature 1.

        The audio span and its markers are dropped and completions move forward with their prompts, so that not even
        the clip's length is seen; with `keep_placeholders` the positions stay, without audio behind them.
        """
        return [one.entropy_nats for one in self._signals(self.text_rows(rows))]

    def text_log_probs(self, rows: Sequence[Row]) -> list[Float[Tensor, "_"]]:
        """log pi_textref of each completion token in nats, read as `text_entropy` is."""
        return [one.log_probs for one in self._signals(self.text_rows(rows))]

    def text_rows(self, rows: Sequence[Row]) -> list[Row]:
        """The rows as the text-only reference reads them."""
        return [
            replace(
                row, prompt=row.prompt.unheard() if self.keep_placeholders else without_audio(row.prompt, self.special)
            )
            for row in rows
        ]

    def _signals(self, rows: Sequence[Row]) -> list[TokenSignals]:
        with self.start_policy() as model:
            return token_signals_in_parts(model, rows, head_reduction=None, batching=self.batching)


class OwnReference(FrozenReference):
    """The present policy in place of its start: its predictions without the audio."""

    def __init__(self, policy: AudioLLM, special: SpecialTokens, *, batching: MicroBatching) -> None:
        """Nothing is copied or frozen."""
        super().__init__(policy, special, keep_placeholders=False, batching=batching, adapted=True)

    @contextmanager
    def start_policy(self) -> Iterator[AudioLLM]:
        """The policy itself, adapters and all, without gradient."""
        with torch.no_grad():
            yield self.model
