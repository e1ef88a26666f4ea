"""Checks, before anything is built, that a run's start policy was trained on the run's data."""

from typing import get_args

from transformers import PreTrainedTokenizerBase

from nemo_mapo.config.data import DatasetConfig
from nemo_mapo.config.run import RunConfig
from nemo_mapo.config.start import WAYS_OUT
from nemo_mapo.data.manifests import cut_ids
from nemo_mapo.data.prompts import encode_prompt, prefill
from nemo_mapo.rewards.templates import Template, opening_tag
from nemo_mapo.types import Example, Wording


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
    """ValueError if training cuts are not among those of the warm start, with their number."""
    if config.warm_start is None or config.pretrained_checkpoint.restore_from_path is not None:
        return
    taught = cut_ids(DatasetConfig(input_cfg=({"type": "lhotse", "cuts_path": config.warm_start.cuts_path},)))
    trained = {name for phase in config.data.train_ds.in_phases() for name in cut_ids(phase.split)}
    if foreign := sorted(trained - taught):
        raise ValueError(
            f"{len(foreign)} of {len(trained)} cuts of data.train_ds ({foreign[0]}, ...) are not in "
            f"warm_start.cuts_path={config.warm_start.cuts_path}: the start would describe sounds other than these. "
            f"Drop it with ~warm_start, and {WAYS_OUT}"
        )
