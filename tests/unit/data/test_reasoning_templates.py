"""Chat templates as models have them: what the prompt begins and what the completion says are one text."""

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from nemo_mapo.config.data import TargetConfig
from nemo_mapo.config.objective import ObjectiveConfig
from nemo_mapo.config.rewards import RewardsConfig
from nemo_mapo.config.run import RolloutConfig, SamplingConfig
from nemo_mapo.data.prompts import encode_prompt, prefill
from nemo_mapo.data.tokenizer import SPECIAL_TOKENS, SpecialTokens
from nemo_mapo.pos_gate.gate import pos_token_gate
from nemo_mapo.pos_gate.tagger import build_chain_tagger
from nemo_mapo.rewards.templates import INSTRUCTIONS, opening_tag, reasoning_words, split_completion
from nemo_mapo.rollout.completions import Drawn, completed
from nemo_mapo.rows import Problem, Prompt
from nemo_mapo.training.scoring import RolloutScorer, rollout_metrics, score_groups
from nemo_mapo.training.start_check import check_prefill
from nemo_mapo.training.targets import TargetRows
from nemo_mapo.types import Example, Wording

EXAMPLE = Example(id="a", question="how deep?", choices=("low", "high"), answer="low", task="tone")
TAGS = ("<think>", "</think>", "<reasoning>", "</reasoning>", "<answer>", "</answer>")
WORDS = ("<|im_start|>", "user", "assistant", "i", "hear", "a", "hum", "so", "it", "seems", "low.", "low", "high")
TURNS = "{% for m in messages %}<|im_start|> {{ m.role }} how deep <|im_end|> {% endfor %}<|im_start|> assistant "
ENDINGS = {
    "opens the reasoning": "<think>\n",
    "no thinking": "",
    "thinking switched off": "<think>\n\n</think>\n\n",
    "opens reasoning of its own": "<reasoning>",
}


def tokenizer_of(ending: str) -> PreTrainedTokenizerFast:
    pad, end, *span = SPECIAL_TOKENS["qwen3_omni_moe"]
    tokens = [pad, end, *span, *TAGS, *WORDS, "<unk>"]
    words = Tokenizer(WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=pad, eos_token=end, additional_special_tokens=[*span]
    )
    made.add_tokens([*TAGS])
    made.chat_template = TURNS + ENDINGS[ending]
    return made


def groups_of(tokenizer, said: str):
    prompt = Prompt(id=EXAMPLE.id, token_ids=torch.tensor(encode_prompt(EXAMPLE, 0, tokenizer, Wording())))
    ids = tokenizer.encode(said, add_special_tokens=False)
    drawn = Drawn(token_ids=(*ids, tokenizer.eos_token_id), sampling_log_probs=(0.0,) * (len(ids) + 1), stopped=True)
    completion = completed(drawn, prompt, tokenizer, weight_version=0)
    return [Problem(prompt=prompt, example=EXAMPLE).answered([completion])]


REWARDS = RewardsConfig()


@pytest.mark.parametrize(
    ("ending", "said", "template", "scores"),
    [
        ("opens the reasoning", "so it seems low. </think> low", "think", (1.0, 1.0, 1.0)),
        ("opens the reasoning", "so it seems low. </think> <answer> low </answer>", "think_answer", (1.0, 1.0, 1.0)),
        ("opens the reasoning", "<think> so it seems low. </think> low", "think", (1.0, 0.0, None)),
        ("opens the reasoning", "low", "think", (0.0, 0.0, 0.0)),
        ("no thinking", "<think> so it seems low. </think> low", "think", (1.0, 1.0, 1.0)),
        ("no thinking", "so it seems low. </think> low", "think", (1.0, 0.0, None)),
        ("no thinking", "<reasoning> so it seems low. </reasoning> <answer> low </answer>", "reasoning", (1.0,) * 3),
        ("no thinking", "<think> so it seems low. </think> <answer> low </answer>", "think_answer", (1.0,) * 3),
        ("opens reasoning of its own", "so it seems low. </reasoning> <answer> low </answer>", "reasoning", (1.0,) * 3),
        ("thinking switched off", "low", "think", (1.0, 0.0, 0.0)),
    ],
)
def test_rewards_read_prompt_and_completion_as_one_text(ending, said, template, scores):
    table = score_groups(groups_of(tokenizer_of(ending), said), replace(REWARDS, template=template))
    found = table.by_reward
    for name, expected in zip(("accuracy", "format", "consistency"), scores, strict=True):
        if expected is not None:
            assert found[name] == [expected], name


def test_words_of_the_reasoning_are_those_of_the_whole_text():
    groups = groups_of(tokenizer_of("opens the reasoning"), "so it seems low. </think> low")
    table = score_groups(groups, REWARDS)
    assert rollout_metrics(groups, table)["rollout/reasoning_words"] == 4
    (off,) = groups_of(tokenizer_of("thinking switched off"), "so it seems low.")
    assert reasoning_words(off.completions[0].text) == 0


def test_the_gate_of_a_completion_is_that_of_the_whole_text_without_what_the_prompt_began():
    tokenizer, tagger = tokenizer_of("opens the reasoning"), build_chain_tagger()
    ids = tokenizer.encode("i hear a hum so it seems low. </think> low", add_special_tokens=False)
    begun = prefill(encode_prompt(EXAMPLE, 0, tokenizer, Wording()), tokenizer)
    assert tokenizer.decode(begun) == "<think>"
    whole = pos_token_gate([*begun, *ids], tokenizer, ["NOUN", "VERB", "ADJ"], tagger)
    assert whole.fallback is None and not any(whole.gate[: len(begun)]) and any(whole.gate)
    said = groups_of(tokenizer, tokenizer.decode(ids))
    objective = ObjectiveConfig(pos_tags=("NOUN", "VERB", "ADJ"))
    special = SpecialTokens.from_tokenizer(tokenizer)
    rollout = RolloutConfig(sampling=SamplingConfig())
    scorer = RolloutScorer(tokenizer, special, tagger, REWARDS, objective, rollout, optimizer_steps=1)
    gate, _ = scorer._gate(said)
    assert gate[0].tolist() == [*whole.gate[len(begun) :], False]


@pytest.mark.parametrize("ending", ENDINGS)
def test_only_a_tag_at_the_very_end_of_the_prompt_begins_the_completion(ending):
    tokenizer = tokenizer_of(ending)
    asked = Wording(instruction=INSTRUCTIONS["think"])
    begun = prefill(encode_prompt(EXAMPLE, 0, tokenizer, asked), tokenizer)
    assert tokenizer.decode(begun).split() == ENDINGS[ending].split()


@pytest.mark.parametrize(
    ("ending", "template", "way_out"),
    [
        ("opens the reasoning", "reasoning", "think or think_answer"),
        ("opens reasoning of its own", "think", "reasoning"),
        ("thinking switched off", "think", "leaves it open"),
    ],
)
def test_a_template_that_no_completion_could_follow_is_refused_with_the_way_out(ending, template, way_out):
    with pytest.raises(ValueError, match=f"rewards.template={template} does not.*{way_out}"):
        check_prefill(tokenizer_of(ending), Wording(), template)


@pytest.mark.parametrize(
    ("ending", "template"), [("opens the reasoning", "think_answer"), ("no thinking", "reasoning")]
)
def test_a_template_that_fits_what_the_prompt_begins_is_taken(ending, template):
    check_prefill(tokenizer_of(ending), Wording(), template)


def test_a_template_that_strips_thinking_from_earlier_turns_leaves_it_in_what_is_learned():
    """Targets follow the prompt as tokens; the template never sees them, so it cannot strip them."""
    tokenizer = tokenizer_of("no thinking")
    tokenizer.chat_template = TURNS.replace("how deep", "{{ (m.content | string).split('</think>')[-1] }}")
    reasoned = replace(EXAMPLE, reasoning="so it seems low.")
    prompt = encode_prompt(EXAMPLE, 0, tokenizer, Wording())
    target = TargetRows(TargetConfig(), "think", tokenizer).ids(reasoned, prompt)
    assert split_completion(tokenizer.decode(target[:-1]), "think").reasoning == "so it seems low."


@pytest.mark.parametrize("template", ["think", "reasoning"])
def test_what_is_learned_does_not_open_again_what_the_prompt_opened(template):
    ending = {"think": "opens the reasoning", "reasoning": "opens reasoning of its own"}[template]
    tokenizer = tokenizer_of(ending)
    prompt = encode_prompt(EXAMPLE, 0, tokenizer, Wording())
    target = TargetRows(TargetConfig(), template, tokenizer).ids(replace(EXAMPLE, reasoning="so it seems low."), prompt)
    begun = tokenizer.decode(prefill(prompt, tokenizer))
    assert begun == opening_tag(template) and opening_tag(template) not in tokenizer.decode(target)
    assert split_completion(begun + tokenizer.decode(target[:-1]), template).answer == "low"
