"""Whether a run has a start, and one that was taught what the run trains on; checked before anything is built."""

from pathlib import Path
from typing import get_args

from transformers import PreTrainedTokenizerBase

from nemo_mapo.config.data import DatasetConfig
from nemo_mapo.config.run import RunConfig
from nemo_mapo.data.manifests import cut_ids
from nemo_mapo.data.prompts import encode_prompt, prefill
from nemo_mapo.rewards.templates import Template, opening_tag
from nemo_mapo.types import Example, Wording

_WAYS_OUT = (
    "teach the policy first (python examples/sft.py data=..., then pretrained_checkpoint.restore_from_path="
    "RUN/checkpoints/step_N), or give another checkpoint there"
)


def check_start_given(config: RunConfig) -> None:
    """ValueError for a run that would silently begin with random weights."""
    given = config.warm_start is not None or config.pretrained_checkpoint.restore_from_path is not None
    if given or config.model.from_scratch:
        return
    if config.supervised:
        raise ValueError(
            "this run would start from random weights: set pretrained_checkpoint.restore_from_path (made by "
            "examples/import_hf.py or examples/assemble.py from public models), or model.from_scratch=true"
        )
    raise ValueError(
        "this run has neither a warm start nor pretrained_checkpoint.restore_from_path, and random weights earn no "
        f"reward to learn from: {_WAYS_OUT}; model.from_scratch=true starts from random weights all the same"
    )


def check_prefill(tokenizer: PreTrainedTokenizerBase, wording: Wording, template: Template) -> None:
    """ValueError if prompts begin completions with a tag that `template` does not begin with, or with no reasoning."""
    example = Example(id="example", question="", choices=(), answer="", task="")
    begun = tokenizer.decode(prefill(encode_prompt(example, 0, tokenizer, wording), tokenizer)).strip()
    if begun in ("", opening_tag(template)):
        return
    fitting = [name for name in get_args(Template) if opening_tag(name) == begun]
    way_out = (
        f"set rewards.template to {' or '.join(fitting)}" if fitting else "take a chat template that leaves it open"
    )
    raise ValueError(
        f"data.tokenizer={tokenizer.name_or_path!r}: its chat template begins every completion with {begun!r}, which "
        f"rewards.template={template} does not, so none would be in format: {way_out}"
    )


def check_start_fits(config: RunConfig) -> None:
    """ValueError if training cuts are none of those that the warm start was taught on, with their number."""
    if config.warm_start is None or config.pretrained_checkpoint.restore_from_path is not None:
        return
    if not Path(config.warm_start.cuts_path).is_file():
        raise ValueError(
            f"warm_start.cuts_path={config.warm_start.cuts_path}: no such manifest. Drop it with ~warm_start, and "
            f"{_WAYS_OUT}"
        )
    taught = cut_ids(DatasetConfig(input_cfg=({"type": "lhotse", "cuts_path": config.warm_start.cuts_path},)))
    trained = {name for phase in config.data.train_ds.in_phases() for name in cut_ids(phase.split)}
    if foreign := sorted(trained - taught):
        raise ValueError(
            f"{len(foreign)} of {len(trained)} cuts of data.train_ds ({foreign[0]}, ...) are not in "
            f"warm_start.cuts_path={config.warm_start.cuts_path}: the start would describe other sounds than these. "
            f"Drop it with ~warm_start, and {_WAYS_OUT}"
        )
