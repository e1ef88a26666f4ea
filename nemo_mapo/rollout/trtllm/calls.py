"""The engine call: TensorRT-LLM's inputs and outputs, and our sampling in its terms."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemo_mapo.config.run import SamplingConfig

NO_TOKEN: Final = -42
"""End and pad id of a call: no token (NeMo-Aligner's trick). Completions end at stop words, which count as a part of
them; TensorRT-LLM leaves an end id out of the length."""


@dataclass(frozen=True, kw_only=True)
class EngineSampling:
    """Fields of `tensorrt_llm.runtime.SamplingConfig`, in its names."""

    max_new_tokens: int
    temperature: float
    top_k: int
    """0 is off."""
    top_p: float
    random_seed: Int[Tensor, " batch"]
    """int64."""
    stop_words_list: npt.NDArray[np.int32]
    """`[batch, 2, words]`; see `word_list`."""
    bad_words_list: npt.NDArray[np.int32]
    """The same, of tokens that are never drawn."""
    end_id: int = NO_TOKEN
    pad_id: int = NO_TOKEN
    num_beams: int = 1
    output_sequence_lengths: bool = True
    output_log_probs: bool = True
    return_dict: bool = True


@runtime_checkable
class TrtllmEngine(Protocol):
    """An engine in this process whose weights can be replaced."""

    @property
    def vocab_size(self) -> int:
        """Rows of the engine's vocabulary; larger ids are rows of the prompt table."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Type of the prompt table."""
        ...

    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Load the engine, building it the first time, with these weights (`exported_weights`) in it.

        Raises:
            ValueError: the engine cannot take one of them; it names the tensor.
        """
        ...

    def generate(
        self,
        *,
        batch_input_ids: Sequence[Int[Tensor, "_"]],
        sampling: EngineSampling,
        prompt_table: Float[Tensor, "rows hidden"] | None,
        prompt_tasks: str | None,
    ) -> Mapping[str, Tensor]:
        """`tensorrt_llm.runtime.ModelRunner.generate`, under its names.

        Args:
            batch_input_ids: int32 prompts without padding; id vocab_size + r stands for row r of `prompt_table`.
            sampling: of all of them.
            prompt_table: embeddings; None if no prompt has any.
            prompt_tasks: "0,0,...", one per prompt: all share the one table.

        Returns:
            `output_ids` `[batch, 1, time]`, prompts as they were given with their completions behind them, then
            `sampling.pad_id`; `sequence_lengths` `[batch, 1]` of prompt and completion; `log_probs` `[batch, 1, time]`
            of the drawn tokens at their places in `output_ids`, nats, under the distribution after temperature and bad
            words over the whole vocabulary: top-k and top-p do not renormalise it.
        """
        ...

    def unload(self) -> None:
        """Release the engine's device memory until the next `update`; does nothing if it is not loaded."""
        ...


def engine_sampling(
    sampling: SamplingConfig,
    *,
    seeds: Int[Tensor, " batch"],
    stop_ids: Sequence[int],
    forbidden_ids: Sequence[int],
) -> EngineSampling:
    """Our sampling of one engine batch; temperature 0 is top-k 1.

    The config refuses what TensorRT-LLM does differently: its repetition penalty counts the prompt, and its minimum
    length considers only the end id.
    """
    assert (sampling.repetition_penalty, sampling.min_new_tokens) == (1.0, 0), "the config demands it"
    greedy = sampling.temperature == 0
    return EngineSampling(
        max_new_tokens=sampling.max_new_tokens,
        temperature=1.0 if greedy else sampling.temperature,
        top_k=1 if greedy else sampling.top_k,
        top_p=1.0 if greedy else sampling.top_p,
        random_seed=seeds.to("cpu", torch.int64),
        stop_words_list=word_list(stop_ids, len(seeds)),
        bad_words_list=word_list(forbidden_ids, len(seeds)),
    )


def word_list(ids: Sequence[int], batch: int) -> npt.NDArray[np.int32]:
    """Words of one token each as TensorRT-LLM takes them, the same for every row: int32 `[batch, 2, words]`.

    The first line has the words' tokens one after the other, the second where each word ends.
    """
    words = np.array([ids, range(1, len(ids) + 1)], dtype=np.int32)
    return np.repeat(words[None], batch, axis=0)
