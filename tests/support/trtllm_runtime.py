"""A Megatron decoder that plays TensorRT-LLM, by the same call and with its peculiarities: for tests without a GPU."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from nemo_mapo.config.model import ModelConfig
from nemo_mapo.models.audio_llm import AudioLLM
from nemo_mapo.rollout.trtllm.calls import EngineSampling


@dataclass
class _Row:
    """A completion under way."""

    ids: list[int]
    """Prompt and what was drawn."""
    log_probs: list[float]
    uniforms: Iterator[float]
    done: bool = False


class MegatronRuntime:
    """A `TrtllmEngine` with weights of its own, which only `update` changes and `unload` loses.

    Like TensorRT-LLM it reports log-probs after temperature and bad words over the whole vocabulary, and draws below
    top_p of the mass that is kept. Every token is a pass over whole rows.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        vocab_size: int,
        max_batch_size: int,
        max_prompt_embedding_table_size: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Build the decoder that `config` describes, with a head of its own."""
        untied = replace(config, decoder=replace(config.decoder, share_embeddings_and_output_weights=False))
        with torch.random.fork_rng(devices=[]):
            model = AudioLLM(untied, vocab_size=vocab_size, audio_token_id=0, sample_rate=16000, params_dtype=dtype)
        self._model = model.eval()
        self._max_batch_size = max_batch_size
        self._max_rows = max_prompt_embedding_table_size
        self._dtype = dtype
        self.is_loaded = False
        self.updates = 0

    @property
    def vocab_size(self) -> int:
        """See `TrtllmEngine`."""
        rows: int = self._model.vocab_size
        return rows

    @property
    def dtype(self) -> torch.dtype:
        """See `TrtllmEngine`."""
        return self._dtype

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        """See `TrtllmEngine`."""
        own = {name: value for name, value in self._model.language_model.state_dict().items() if value is not None}
        if differing := sorted(own.keys() ^ weights.keys()):
            raise ValueError(f"the engine and the update do not both have {differing[0]}")
        for name, value in weights.items():
            own[name].copy_(value)
        self.is_loaded = True
        self.updates += 1

    def unload(self) -> None:
        """See `TrtllmEngine`."""
        for parameter in self._model.parameters():
            parameter.data.fill_(torch.nan)
        self.is_loaded = False

    @torch.no_grad()
    def generate(
        self,
        *,
        batch_input_ids: Sequence[Tensor],
        sampling: EngineSampling,
        prompt_table: Float[Tensor, "rows hidden"] | None,
        prompt_tasks: str | None,
    ) -> Mapping[str, Tensor]:
        """See `TrtllmEngine`."""
        assert self.is_loaded, "the engine is not loaded"
        assert len(batch_input_ids) <= self._max_batch_size
        if prompt_table is not None:
            assert len(prompt_table) <= self._max_rows
            assert prompt_tasks is not None and prompt_tasks.split(",") == ["0"] * len(batch_input_ids)
        rows = [
            _Row(ids=ids.tolist(), log_probs=[], uniforms=_uniforms(int(seed)))
            for ids, seed in zip(batch_input_ids, sampling.random_seed, strict=True)
        ]
        for _ in range(sampling.max_new_tokens):
            live = [(number, row) for number, row in enumerate(rows) if not row.done]
            if not live:
                break
            logits = self._next_logits([row.ids for _, row in live], prompt_table)
            for (number, row), scores in zip(live, logits, strict=True):
                _draw(row, scores, number, sampling)
        return _answer(rows, [len(ids) for ids in batch_input_ids], sampling)

    def _next_logits(self, ids: list[list[int]], table: Tensor | None) -> Float[Tensor, "live vocab"]:
        vocabulary = self.vocab_size
        longest = max(map(len, ids))
        tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids])
        beyond = tokens >= vocabulary
        embeddings = self._model.language_model.embedding(tokens.masked_fill(beyond, 0), position_ids=None)
        if table is not None:
            looked_up = table[(tokens - vocabulary).clamp(min=0)].transpose(0, 1)
            embeddings = torch.where(beyond.T[..., None], looked_up.to(embeddings.dtype), embeddings)
        with self._model.session.forward(audio_key_mask=None):
            logits = self._model.language_model(tokens, None, None, decoder_input=embeddings)
        last = torch.tensor([len(row) - 1 for row in ids])
        last_logits: Tensor = self._model.whole_vocabulary(logits[torch.arange(len(ids)), last]).float()
        return last_logits


def _uniforms(seed: int) -> Iterator[float]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield float(torch.rand((), generator=generator, dtype=torch.float64))


def _draw(row: _Row, logits: Float[Tensor, " vocab"], number: int, sampling: EngineSampling) -> None:
    scores = logits / sampling.temperature
    scores[sampling.bad_words_list[number, 0].tolist()] = -torch.inf
    probabilities = torch.softmax(scores.double(), dim=-1)
    ranked, order = probabilities.sort(descending=True, stable=True)
    kept = ranked[: sampling.top_k] if sampling.top_k > 0 else ranked
    remaining = next(row.uniforms) * sampling.top_p * float(kept.sum())
    for place, probability in enumerate(kept.tolist()):
        remaining -= probability
        if remaining <= 0 or place == len(kept) - 1:
            break
    row.ids.append(int(order[place]))
    row.log_probs.append(float(kept[place].log()))
    row.done = row.ids[-1] in sampling.stop_words_list[number, 0]


def _answer(rows: list[_Row], prompt_lengths: list[int], sampling: EngineSampling) -> dict[str, Tensor]:
    longest = max(prompt_lengths) + sampling.max_new_tokens
    ids = torch.full((len(rows), 1, longest), sampling.pad_id, dtype=torch.int32)
    log_probs = torch.zeros(len(rows), 1, longest)
    for number, (row, prompt) in enumerate(zip(rows, prompt_lengths, strict=True)):
        ids[number, 0, : len(row.ids)] = torch.tensor(row.ids, dtype=torch.int32)
        log_probs[number, 0, prompt : len(row.ids)] = torch.tensor(row.log_probs)
    lengths = torch.tensor([[len(row.ids)] for row in rows], dtype=torch.int32)
    return {"output_ids": ids, "sequence_lengths": lengths, "log_probs": log_probs}
