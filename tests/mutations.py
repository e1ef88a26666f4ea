"""Plant one known fault after the other and see that a test fails: `python tests/mutations.py [name ...]`.

The faults are the traps of the method that other code has fallen into, and what goes wrong when a model is split. Each
is planted in a copy of the repository; this one is not touched. Takes about a quarter of a minute per fault and core.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
COPIED = (
    *("nemo_mapo", "benchmarks", "examples", "tests", "conf", "docs", "data/lhotse_manifests"),
    *("Makefile", "pyproject.toml", "constraints.txt", "constraints-next.txt", "CONTRIBUTING.md", "README.md"),
)
LAYOUTS = "tests/distributed/test_layouts.py"
GATHERED = "tests/distributed/test_gathered_weights.py"
LONGEST_SECONDS = 900
NOTICED, SURVIVED = "noticed ", "SURVIVED"
TESTS_FAILED = 1
"""Exit status of pytest when it ran and a test failed; anything else above 0 is a broken command."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A change of one place that must not go unnoticed."""

    name: str
    file: str
    right: str
    """As the code is; stands in the file exactly once."""
    wrong: str
    tests: tuple[str, ...]
    """pytest arguments; at least one test of these fails."""


FAULTS = (
    Fault(
        name="rubrics: items without a right answer leave the denominator",
        file="nemo_mapo/evaluation/benchmarks/rubrics.py",
        right='        "score": sum(score.value for score in scores) / len(scores),\n',
        wrong='        "score": sum(score.value for score in scores) / max(len(right), 1),\n',
        tests=("tests/unit/evaluation/test_rubrics.py", "-k", "all_items_count"),
    ),
    Fault(
        name="baselines: VPPO compares the policy with itself in the wrong direction",
        file="nemo_mapo/objective/dependency.py",
        right="k3_kl(old_log_probs.detach(), text_only_log_probs, response_mask)",
        wrong="k3_kl(text_only_log_probs, old_log_probs.detach(), response_mask)",
        tests=("tests/unit/objective/test_dependency.py",),
    ),
    Fault(
        name="baselines: PAPO's term is minimised",
        file="nemo_mapo/objective/mapo.py",
        right="loss = loss - cfg.perception_weight * perception",
        wrong="loss = loss + cfg.perception_weight * perception",
        tests=("tests/unit/objective/test_perception.py",),
    ),
    Fault(
        name="causal listening: the prompt's last position stays deaf or hearing whatever token it draws",
        file="nemo_mapo/rollout/deaf.py",
        right="queries[:, -1] = self.deaf.includes(chosen, torch.zeros_like(chosen))",
        wrong="pass",
        tests=("tests/integration/test_deaf.py",),
    ),
    Fault(
        name="causal listening: a shared prompt's audio is not blocked",
        file="nemo_mapo/attention/shared.py",
        right="_after_prompt(blocked.keys[0, prompt], blocked.keys[0, own], group.completions)",
        wrong="_after_prompt(blocked.keys[0, prompt] & False, blocked.keys[0, own], group.completions)",
        tests=("tests/unit/attention/test_blocked.py",),
    ),
    Fault(
        name="config: true counts as a number",
        file="nemo_mapo/config/fields.py",
        right="Count = Annotated[int, Strict(), ",
        wrong="Count = Annotated[int, ",
        tests=("tests/unit/config/test_fields.py",),
    ),
    Fault(
        name="config: files that name files grow without bound",
        file="nemo_mapo/config/input_cfg.py",
        right="        self._count += len(value)\n",
        wrong="",
        tests=("tests/unit/config/test_input_cfg.py",),
    ),
    Fault(
        name="config: the rank that says nothing ends first",
        file="nemo_mapo/config/command_line.py",
        right="    time.sleep(_HEAD_START_SECONDS)\n",
        wrong="",
        tests=("tests/unit/config/test_command_line.py",),
    ),
    Fault(
        name="manifests: what Lhotse stumbles over goes unseen",
        file="nemo_mapo/data/entries.py",
        right="    _check_with_lhotse(record, where)\n",
        wrong="",
        tests=("tests/unit/data/test_manifests.py",),
    ),
    Fault(
        name="manifests: a file longer than its recording goes unseen",
        file="nemo_mapo/data/entries.py",
        right="abs(recorded - header.duration_seconds)",
        wrong="recorded - header.duration_seconds",
        tests=("tests/unit/data/test_manifests.py",),
    ),
    Fault(
        name="config: an unknown key is dropped",
        file="nemo_mapo/config/base.py",
        right='extra="forbid"',
        wrong='extra="ignore"',
        tests=("tests/unit/config/test_compose.py",),
    ),
    Fault(
        name="config: a section without an option has its defaults",
        file="nemo_mapo/config/overrides.py",
        right="            composed[key] = None\n",
        wrong="            pass\n",
        tests=("tests/unit/config/test_compose.py",),
    ),
    Fault(
        name="importers: the second clip of a question may be in another split",
        file="nemo_mapo/data/importers/prepare.py",
        right="            digests=(audio.digest, *(one.digest for one in further)),\n",
        wrong="            digests=(audio.digest,),\n",
        tests=("tests/unit/data/importers/test_prepare.py", "-k", "two_clips"),
    ),
    Fault(
        name="checkpoint: the best is removed with the old ones",
        file="nemo_mapo/training/checkpoint.py",
        right="                if old.name not in best:\n",
        wrong="                if True:\n",
        tests=("tests/unit/training/test_checkpoint.py", "-k", "best"),
    ),
    Fault(
        name="data: the size of the shuffle buffer is not handed on",
        file="nemo_mapo/data/dataset.py",
        right='        "shuffle_buffer_size": config.shuffle_buffer_size,\n',
        wrong="",
        tests=("tests/unit/data/test_nemo_corpora.py", "-k", "buffer"),
    ),
    Fault(
        name="training: an error of supervised training names a key of MAPO",
        file="nemo_mapo/training/loop.py",
        right='key=f"{config.trainer.loop_name}.max_skipped_steps"',
        wrong='key="trainer.mapo.max_skipped_steps"',
        tests=("tests/integration/test_sft.py", "-k", "own_section"),
    ),
    Fault(
        name="text: every prompt copies the vocabulary",
        file="nemo_mapo/data/plain_text.py",
        right="_control_tokens_of(tokenizer, len(tokenizer.added_tokens_decoder))",
        wrong="_control_tokens_of(tokenizer, len(tokenizer))",
        tests=("tests/unit/data/test_plain_text.py", "-k", "vocabulary"),
    ),
    Fault(
        name="text: control tokens in a question become control tokens",
        file="nemo_mapo/data/plain_text.py",
        right="    for parts in ([text], pieces):\n",
        wrong="    return ids\n    for parts in ([text], pieces):\n",
        tests=("tests/unit/data/test_plain_text.py",),
    ),
    Fault(
        name="http: a trickle outlives the time-out",
        file="nemo_mapo/http_client.py",
        right="                _shut_down(connected)\n\n    def __enter__",
        wrong="                pass\n\n    def __enter__",
        tests=("tests/unit/test_http_client.py", "-k", "time_however"),
    ),
    Fault(
        name="judge: a reply that says both words is a verdict",
        file="nemo_mapo/rewards/judged.py",
        right='    return said == {"YES"} if len(said) == 1 else None\n',
        wrong='    return "YES" in said if said else None\n',
        tests=("tests/unit/rewards/test_judged.py", "-k", "both_words"),
    ),
    Fault(
        name="audio: a copy over full scale is clipped",
        file="nemo_mapo/data/importers/audio.py",
        right="            samples = samples * (_LARGEST / peak)\n",
        wrong="            pass\n",
        tests=("tests/unit/data/importers/test_prepare.py", "-k", "full_scale"),
    ),
    Fault(
        name="audio: a clip shorter than the encoder takes reaches it",
        file="nemo_mapo/data/dataset.py",
        right="            self.audio_tokens(len(waveform))\n",
        wrong="            pass\n",
        tests=("tests/unit/data/test_dataset.py", "-k", "cannot_take"),
    ),
    Fault(
        name="ranks: every rank appends to metrics.jsonl",
        file="nemo_mapo/training/records.py",
        right="        if not is_main_rank():\n            return\n        lines =",
        wrong="        lines =",
        tests=("tests/unit/training/test_run_directory.py", "-k", "ranks_other_than"),
    ),
    Fault(
        name="rows: signals of packed rows stand in the order of the packs",
        file="nemo_mapo/models/layout.py",
        right="    return [found[number] for number in range(len(found))]\n",
        wrong="    return list(found.values())\n",
        tests=("tests/unit/models/test_layout.py", "-k", "order_of_the_rows"),
    ),
    Fault(
        name="checkpoints: a flipped bit is loaded",
        file="nemo_mapo/checksums.py",
        right="        if checksum(directory / name) != expected:\n",
        wrong="        if False:\n",
        tests=("tests/unit/training/test_checkpoint.py", "-k", "flipped"),
    ),
    Fault(
        name="checkpoints: a full disk leaves half a checkpoint",
        file="nemo_mapo/training/checkpoint.py",
        right="            shutil.rmtree(unfinished, ignore_errors=True)\n        raise",
        wrong="            pass\n        raise",
        tests=("tests/unit/training/test_checkpoint.py", "-k", "full_disk"),
    ),
    Fault(
        name="processes: Megatron's helper process outlives a killed run",
        file="nemo_mapo/platform.py",
        right="    _report_writes_through_a_file()\n    world_size",
        wrong="    world_size",
        tests=("tests/unit/training/test_checkpoint.py", "-k", "stays_behind"),
    ),
    Fault(
        name="processes: what a run forks outlives it",
        file="nemo_mapo/processes.py",
        right="        library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)\n",
        wrong="        pass\n",
        tests=("tests/unit/test_processes.py", "-k", "outlives"),
    ),
    Fault(
        name="baselines: CISPO's weight carries a gradient",
        file="nemo_mapo/objective/cispo.py",
        right="0.0)).detach().exp()",
        wrong="0.0)).exp()",
        tests=("tests/unit/objective/test_cispo.py",),
    ),
    Fault(
        name="baselines: the entropy mask counts padding",
        file="nemo_mapo/objective/entropy_mask.py",
        right="lengths = response_mask.sum(-1, keepdim=True)",
        wrong="lengths = torch.ones_like(response_mask).sum(-1, keepdim=True)",
        tests=("tests/unit/objective/test_entropy_mask.py",),
    ),
    Fault(
        name="sft: a run is as long as trainer.mapo says",
        file="nemo_mapo/training/prompts.py",
        right="split, limit = config.data.train_ds, config.trainer.loop.max_steps",
        wrong="split, limit = config.data.train_ds, config.trainer.mapo.max_steps",
        tests=("tests/integration/test_sft.py",),
    ),
    Fault(
        name="data: a group goes to the split of each of its questions",
        file="nemo_mapo/data/importers/prepare.py",
        right="members = [Member(group=one.group,",
        wrong="members = [Member(group=one.digest,",
        tests=("tests/unit/data/importers/test_grouping.py",),
    ),
    Fault(
        name="templates: a completion is read without the tag that its prompt opens",
        file="nemo_mapo/data/prompts.py",
        right="[*prefill(prompt.token_ids.tolist(), tokenizer), *token_ids]",
        wrong="[*token_ids]",
        tests=("tests/unit/data/test_reasoning_templates.py",),
    ),
    Fault(
        name="templates: the gate is shifted by what the prompt has begun",
        file="nemo_mapo/training/scoring.py",
        right="row[len(start) :]",
        wrong="row[: len(row) - len(start)]",
        tests=("tests/unit/data/test_reasoning_templates.py",),
    ),
    Fault(
        name="answers: a denied statement counts",
        file="nemo_mapo/rewards/answers.py",
        right="        if DENIAL.search(CLAUSE_END",
        wrong="        if False and DENIAL.search(CLAUSE_END",
        tests=("tests/unit/rewards/test_answers.py",),
    ),
    Fault(
        name="answers: the first of several statements counts",
        file="nemo_mapo/rewards/answers.py",
        right="last = statements[-1]",
        wrong="last = statements[0]",
        tests=("tests/unit/rewards/test_answers.py",),
    ),
    Fault(
        name="prompts: the exchanged control is asked without the instruction",
        file="nemo_mapo/evaluation/grounding/controls.py",
        right="audio_tokens(len(clip)), tokenizer, wording)",
        wrong="audio_tokens(len(clip)), tokenizer, Wording())",
        tests=("tests/unit/evaluation/grounding/test_controls.py",),
    ),
    Fault(
        name="metrics: a maximum is averaged over steps and ranks",
        file="nemo_mapo/types.py",
        right="merged[name] = Maximum(max(",
        wrong="merged[name] = (max(",
        tests=("tests/unit/objective/test_objective_metrics.py",),
    ),
    Fault(
        name="rows: every prompt of a batch hears the first clip",
        file="nemo_mapo/models/layout.py",
        right="number = {name: row for row, name in enumerate(clips)}",
        wrong="number = {name: 0 for row, name in enumerate(clips)}",
        tests=("tests/unit/models/test_layout.py",),
    ),
    Fault(
        name="1 policy gradient: the all-reduce over vocabulary shards counted again in the backward pass",
        file="nemo_mapo/objective/logprobs.py",
        right="        grad_log_probs = grad_log_probs.masked_fill(impossible, 0.0)\n",
        wrong="        grad_log_probs = grad_log_probs.masked_fill(impossible, 0.0) * (1 if ctx.whole else 2)\n",
        tests=("tests/numerics/test_objective_vocab_parallel.py",),
    ),
    Fault(
        name="2 attention captured without causal mask",
        file="nemo_mapo/attention/mass.py",
        right="is_causal=aligned and time_q > 1",
        wrong="is_causal=False",
        tests=("tests/unit/attention/test_mass.py",),
    ),
    Fault(
        name="2 attention captured without segment boundaries",
        file="nemo_mapo/attention/core.py",
        right="bounds = packed.cu_seqlens_q.tolist()",
        wrong="bounds = [0, query.shape[0]]",
        tests=("tests/unit/attention/test_core.py",),
    ),
    Fault(
        name="3 audio keys of a packed row misaligned",
        file="nemo_mapo/attention/core.py",
        right="audio[:, start:end]",
        wrong="audio[:, : end - start]",
        tests=("tests/unit/attention/test_core.py",),
    ),
    Fault(
        name="3 frames of a packed row's clips in the wrong places",
        file="nemo_mapo/models/audio_llm.py",
        right="    rows = clips[wanted > 0]\n",
        wrong="    rows = clips[wanted > 0].flip(0)\n",
        tests=(LAYOUTS, "-k", "packed"),
    ),
    Fault(
        name="4 reference passes without packing boundaries",
        file="nemo_mapo/models/audio_llm.py",
        right="    bounds = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)\n",
        wrong=(
            "    if not torch.is_grad_enabled():\n        lengths = lengths.sum(0, keepdim=True)\n"
            "    bounds = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)\n"
        ),
        tests=("tests/distributed/test_inference.py", "-k", "packed"),
    ),
    Fault(
        name="5 signals read at the token instead of the position that predicts it",
        file="nemo_mapo/models/layout.py",
        right="first=start + len(row.prompt) - 1,",
        wrong="first=start + len(row.prompt),",
        tests=("tests/unit/models/test_layout.py",),
    ),
    Fault(
        name="6 eta = 0 cannot run without a mass",
        file="nemo_mapo/objective/mapo.py",
        right="    if cfg.eta > 0 and inputs.audio_mass is None:\n",
        wrong="    if inputs.audio_mass is None:\n",
        tests=("tests/numerics/test_objective_mapo_loss.py",),
    ),
    Fault(
        name="7 head maximum of this rank's heads",
        file="nemo_mapo/attention/session.py",
        right="return largest if head_group is None else",
        wrong="return largest if True else",
        tests=(LAYOUTS, "-k", "tensor and 2 and not data and not pipeline and not recompute"),
    ),
    Fault(
        name="7 every rank's largest head gets the gradient of the maximum",
        file="nemo_mapo/attention/session.py",
        right="        return grads[0] * won, None\n",
        wrong="        return grads[0], None\n",
        tests=(LAYOUTS, "-k", "tensor and 2 and not data and not pipeline and not recompute"),
    ),
    Fault(
        name="8 boolean mask added to the scores",
        file="nemo_mapo/attention/mass.py",
        right="        attn_mask=visible,\n        scale=scale,\n",
        wrong="        attn_mask=visible.to(query.dtype),\n        scale=scale,\n",
        tests=("tests/unit/attention",),
    ),
    Fault(
        name="9 selective recompute of a target layer's attention",
        file="nemo_mapo/models/decoder.py",
        right="            self.checkpoint_core_attention = False\n",
        wrong="            pass\n",
        tests=(LAYOUTS, "-k", "selective and not experts"),
    ),
    Fault(
        name="9 full recompute of target layers",
        file="nemo_mapo/config/model.py",
        right="        first_target = self.resolved_target_layers[0]\n",
        wrong="        first_target = self.decoder.num_layers\n",
        tests=(LAYOUTS, "-k", "full and not tensor and not pipeline"),
    ),
    Fault(
        name="data parallel: denominators of this rank's rows",
        file="nemo_mapo/training/actor.py",
        right="global_sequences = sum(gather_over_data_parallel(len(rows)))",
        wrong="global_sequences = len(rows)",
        tests=(LAYOUTS, "-k", "data and not tensor and not experts and not packed"),
    ),
    Fault(
        name="first step: log pi_old follows the gradient",
        file="nemo_mapo/models/layout.py",
        right='remembered["old_log_probs"] = log_probs.detach()',
        wrong='remembered["old_log_probs"] = log_probs',
        tests=(LAYOUTS, "-k", "without_an_old_policy_pass and padded"),
    ),
    Fault(
        name="first step: rows of later steps are not read before the update",
        file="nemo_mapo/training/scoring.py",
        right="else len(completions) // self.optimizer_steps",
        wrong="else len(completions)",
        tests=("tests/unit/training/test_scoring.py", "-k", "update_comes_before"),
    ),
    Fault(
        name="micro-batches: loss averaged instead of summed",
        file="nemo_mapo/training/actor.py",
        right="        scale = len(parts) * parallel_state",
        wrong="        scale = 1 * parallel_state",
        tests=(LAYOUTS, "-k", "micro-batches"),
    ),
    Fault(
        name="sequence parallel: norms see their own positions only",
        file="nemo_mapo/models/decoder.py",
        right="        self.weight.sequence_parallel = config.sequence_parallel",
        wrong="        self.weight.sequence_parallel = False",
        tests=(LAYOUTS, "-k", "sequence and not experts and not packed and not pipeline and not data"),
    ),
    Fault(
        name="pipeline parallel: layers counted from the stage's first",
        file="nemo_mapo/upstream/megatron.py",
        right="        layer_number += get_transformer_layer_offset(config)\n",
        wrong="        layer_number += 0\n",
        tests=(LAYOUTS, "-k", "pipeline and not tensor and not packed and not recompute and not experts"),
    ),
    Fault(
        name="vocabulary padding can be drawn and weighs in the softmax",
        file="nemo_mapo/models/audio_llm.py",
        right="            logits[..., max(real, 0) :] = -torch.inf\n",
        wrong="            logits[..., max(real, 0) :] += 0.0\n",
        tests=(LAYOUTS, "-k", "tensor and 4"),
    ),
    Fault(
        name="gathered weights: gate and up change places",
        file="nemo_mapo/models/tensors.py",
        right="        shards: list[ShardedTensor] = entry.build()\n",
        wrong=(
            "        gate, up = entry.build()\n"
            "        shards = [replace(gate, data=up.data), replace(up, data=gate.data)]\n"
        ),
        tests=(GATHERED, "-k", "tied and tensor and 2 and sequence"),
    ),
    Fault(
        name="gathered weights: the rows that pad the vocabulary stay",
        file="nemo_mapo/models/tensors.py",
        right="    return whole if rows is None else whole[:rows]\n",
        wrong="    return whole\n",
        tests=(GATHERED, "-k", "tied and tensor and 2 and sequence"),
    ),
    Fault(
        name="gathered weights: experts counted from the rank's first",
        file="nemo_mapo/models/tensors.py",
        right='numbers = [*map(str, shard.global_offset[:axes]), ""]',
        wrong='numbers = [*map(str, shard.global_offset[:1]), *_NUMBER.findall(name)[1:], ""]',
        tests=(GATHERED, "-k", "experts and expert and 2 and not pipeline"),
    ),
    Fault(
        name="untrusted: a manifest may name a command",
        file="nemo_mapo/data/sources.py",
        right="str) or kind not in allowed:\n",
        wrong="str) or kind not in (*allowed, 'command'):\n",
        tests=("tests/unit/test_untrusted.py", "-k", "manifest"),
    ),
    Fault(
        name="untrusted: a path beyond the lines that were checked is opened as it is",
        file="nemo_mapo/data/nemo_types.py",
        right='        refuse_unsafe_path(audio_path, f"manifest {self.path}")\n',
        wrong="",
        tests=("tests/unit/data/test_nemo_corpora.py", "-k", "beyond"),
    ),
    Fault(
        name="data: lines of a tarred corpus without a member are passed over, as in NeMo",
        file="nemo_mapo/data/archives.py",
        right="    if members:\n        raise",
        wrong="    if False:\n        raise",
        tests=("tests/unit/data/test_nemo_corpora.py", "-k", "lost"),
    ),
    Fault(
        name="untrusted: a recorded config may name code",
        file="nemo_mapo/training/finished_run.py",
        right="    return replace(config, rewards=config.rewards.without_code)\n",
        wrong="    return config\n",
        tests=("tests/unit/training/test_run_directory.py", "-k", "no_code"),
    ),
    Fault(
        name="rewards: what a user's function returns is taken as it is",
        file="nemo_mapo/rewards/custom.py",
        right="        if not isinstance(value, Real) or not math.isfinite(value):\n",
        wrong="        if value is None:\n",
        tests=("tests/unit/rewards/test_custom.py", "-k", "one_number"),
    ),
    Fault(
        name="untrusted: a checkpoint is opened before it is looked at",
        file="nemo_mapo/training/checkpoint.py",
        right="    refuse_code(path)\n",
        wrong="    pass\n",
        tests=("tests/unit/test_untrusted.py", "-k", "common_part"),
    ),
    Fault(
        name="untrusted: a NeMo config may compute what it builds",
        file="nemo_mapo/models/nemo_files.py",
        right="        if _is_computed(value):\n",
        wrong="        if False:\n",
        tests=("tests/unit/test_untrusted.py", "-k", "hides_what_it_builds"),
    ),
    Fault(
        name="untrusted: a NeMo config may reach another module through one of NeMo's",
        file="nemo_mapo/models/nemo_files.py",
        right='found.__module__.startswith("nemo.")',
        wrong="True",
        tests=("tests/unit/test_untrusted.py", "-k", "class_of_nemo"),
    ),
    Fault(
        name="shared prompts: a completion sees its neighbours",
        file="nemo_mapo/attention/shared.py",
        right="    return SharedPrompt(start=first.begin, prompt=prompt, completions=lengths)\n",
        wrong="    return SharedPrompt(start=first.begin, prompt=prompt, completions=(sum(lengths),))\n",
        tests=("tests/unit/attention/test_shared.py",),
    ),
    Fault(
        name="shared prompts: positions go on from one completion to the next",
        file="nemo_mapo/attention/session.py",
        right="rotations[self._positions]",
        wrong="rotations[: len(self._positions)]",
        tests=("tests/unit/models/test_shared_prompts.py",),
    ),
    Fault(
        name="shared prompts: a completion is read one position late",
        file="nemo_mapo/models/layout.py",
        right="first=end + last - first, tokens",
        wrong="first=end + last - first + 1, tokens",
        tests=("tests/unit/models/test_shared_prompts.py",),
    ),
    Fault(
        name="shared prompts: completions give the prompt no gradient",
        file="nemo_mapo/attention/shared.py",
        right="prompt.expand(len(lengths), *prompt.shape)",
        wrong="prompt.detach().expand(len(lengths), *prompt.shape)",
        tests=("tests/unit/attention/test_shared.py",),
    ),
    Fault(
        name="shared prompts: the gradient of a prompt counted once per completion",
        file="nemo_mapo/attention/shared.py",
        right="prompt.expand(len(lengths), *prompt.shape)",
        wrong="(len(lengths) * prompt - (len(lengths) - 1) * prompt.detach()).expand(len(lengths), *prompt.shape)",
        tests=("tests/unit/attention/test_shared.py",),
    ),
    Fault(
        name="rollouts: a completion that moves to a free slot leaves its keys behind",
        file="nemo_mapo/rollout/kv_cache.py",
        right="                memory[: self.end, free] = memory[: self.end, movers]\n",
        wrong="                pass\n",
        tests=("tests/integration/test_generation.py", "-k", "neighbours or behaviour_log_probs"),
    ),
    Fault(
        name="rollouts: a completion attends to a neighbour's keys",
        file="nemo_mapo/attention/mass.py",
        right="        key.transpose(1, 2),\n        value.transpose(1, 2),\n        attn_mask=visible,\n",
        wrong="        key.transpose(1, 2).roll(1, 0),\n        value.transpose(1, 2),\n        attn_mask=visible,\n",
        tests=("tests/integration/test_generation.py", "-k", "behaviour_log_probs"),
    ),
    Fault(
        name="rollouts: the token just drawn left out of its own softmax",
        file="nemo_mapo/attention/mass.py",
        right="    visible = (segment_ids == segment_ids[:, -1:])[:, None, None]\n",
        wrong="    visible = (segment_ids == segment_ids[:, -1:])[:, None, None]\n    visible[..., -1] = False\n",
        tests=("tests/integration/test_generation.py", "-k", "behaviour_log_probs"),
    ),
    Fault(
        name="rollouts: a linear without gradient forgets its bias",
        file="nemo_mapo/models/linears.py",
        right="        return output + bias, None\n",
        wrong="        return output, None\n",
        tests=("tests/unit/models/test_linears.py",),
    ),
    Fault(
        name="rollouts: TensorRT-LLM's log-probs taken for those of the distribution drawn from",
        file="nemo_mapo/rollout/trtllm/scoring.py",
        right="        drawn_from = reported + restriction(",
        wrong="        drawn_from = reported + 0 * restriction(",
        tests=("tests/integration/test_trtllm.py", "-k", "sampled_completions"),
    ),
    Fault(
        name="rollouts: every prompt looks at the first clip's rows of the table",
        file="nemo_mapo/rollout/trtllm/prompt_table.py",
        right="vocab_size + starts[clip] + torch.arange(counts[clip])",
        wrong="vocab_size + torch.arange(counts[clip])",
        tests=("tests/integration/test_trtllm.py", "-k", "greedy_completions"),
    ),
    Fault(
        name="rollouts: the engine's difference from the policy is hidden",
        file="nemo_mapo/rollout/trtllm/scoring.py",
        right="model=reported + plain - of_token",
        wrong="model=plain",
        tests=("tests/integration/test_trtllm.py", "-k", "old_ones_are_seen"),
    ),
    Fault(
        name="Hugging Face: transformers 5's rope_parameters ignored",
        file="nemo_mapo/models/hf/config.py",
        right='        stated.get("rope_parameters") or {},\n',
        wrong="",
        tests=("tests/unit/models/test_hf_config.py",),
    ),
    Fault(
        name="Hugging Face: Llama 3's rope scaling left out of the decoder",
        file="nemo_mapo/models/decoder.py",
        right='rope_scaling=config.rope_scaling == "llama3"',
        wrong="rope_scaling=False",
        tests=("tests/integration/test_hf_decoders.py", "-k", "logits"),
    ),
    Fault(
        name="LoRA: a model without adapters takes a checkpoint's base without a word",
        file="nemo_mapo/training/checkpoint.py",
        right="named_parameters()) and has_adapters(path):",
        wrong="named_parameters()) and not path:",
        tests=("tests/integration/test_evaluate.py", "-k", "with_adapters"),
    ),
    Fault(
        name="LoRA: adapters of a start are merged with another alpha",
        file="nemo_mapo/training/policies.py",
        right="add_lora(adapted.language_model, adapters, seed=0)",
        wrong="add_lora(adapted.language_model, LoraConfig(rank=adapters.rank), seed=0)",
        tests=("tests/integration/test_sft.py", "-k", "any_checkpoint_with_adapters"),
    ),
    Fault(
        name="LoRA: each rank's experts start with the adapters of the first ones",
        file="nemo_mapo/models/lora.py",
        right="{first + int(expert[1])} {target}",
        wrong="{int(expert[1])} {target}",
        tests=("tests/distributed/test_lora.py", "-k", "experts_of_two_ranks"),
    ),
    Fault(
        name="LoRA: the reference hears with the encoder as it is trained now",
        file="nemo_mapo/training/references.py",
        right="                parameter.data = start\n",
        wrong="                pass\n",
        tests=("tests/unit/training/test_references.py", "-k", "beside_adapters"),
    ),
    Fault(
        name="several clips: each is laid out with as many placeholders as the first",
        file="nemo_mapo/data/prompts.py",
        right="[one] * next(filled) if",
        wrong="[one] * counts[0] if",
        tests=("tests/unit/data/test_qwen_prompts.py",),
    ),
    Fault(
        name="SALM: an adapter is added with weight 1",
        file="nemo_mapo/models/salm.py",
        right="torch.addmm(weight.to(dtype), b, a, alpha=self.lora_scale)",
        wrong="torch.addmm(weight.to(dtype), b, a)",
        tests=("tests/unit/models/test_salm.py",),
    ),
    Fault(
        name="ModularAudioGPT: an adapter is added with alpha, not alpha / rank",
        file="nemo_mapo/models/modular_audio_gpt.py",
        right="return float(rank if alpha is None else alpha) / rank",
        wrong="return float(rank if alpha is None else alpha)",
        tests=("tests/integration/test_modular_audio_gpt.py", "-k", "alpha_over_rank"),
    ),
    Fault(
        name="from parts: new tokens begin with the rows that fill the vocabulary up",
        file="nemo_mapo/training/assemble.py",
        right="    grown[list(new_ids)] = mean\n",
        wrong="",
        tests=("tests/integration/test_assemble.py", "-k", "mean"),
    ),
    Fault(
        name="from parts: a clip keeps the positions of Whisper's padding",
        file="nemo_mapo/models/whisper.py",
        right="[frames[: self._num_positions(len(one))] for",
        wrong="[frames for",
        tests=("tests/integration/test_assemble.py", "-k", "padding"),
    ),
    Fault(
        name="kept encodings: those of earlier weights are given",
        file="nemo_mapo/models/encoded_clips.py",
        right="        if weights != self._weights:",
        wrong="        if not self._weights:",
        tests=("tests/unit/models/test_encoded_clips.py",),
    ),
    Fault(
        name="Hugging Face: gate and up of fused experts exchanged",
        file="nemo_mapo/models/hf/files.py",
        right='"gate_up_proj": ("gate_proj", "up_proj")',
        wrong='"gate_up_proj": ("up_proj", "gate_proj")',
        tests=("tests/integration/test_hf_decoders.py", "-k", "fused"),
    ),
    Fault(
        name="pages: text is put into templates as it is",
        file="nemo_mapo/reports/pages.py",
        right="autoescape=True",
        wrong="autoescape=False",
        tests=("tests/unit/reports/test_report_samples.py",),
    ),
    Fault(
        name="pages: a chart's text can end its script element",
        file="nemo_mapo/reports/charts.py",
        right="""text.replace("<", "\\\\u003c")""",
        wrong="text",
        tests=("tests/unit/reports/test_report_charts.py",),
    ),
    Fault(
        name="statistics: no width where all answers are right or wrong",
        file="nemo_mapo/statistics.py",
        right="    if not _binary(values):\n        return _bootstrap",
        wrong="    if values:\n        return _bootstrap",
        tests=("tests/unit/test_statistics.py",),
    ),
    Fault(
        name="statistics: equal seeds exclude every difference",
        file="nemo_mapo/statistics.py",
        right="    if deviation <= _SAME * max(1.0, abs(mean)):",
        wrong="    if mean in (-1.0, 0.0, 1.0):",
        tests=("tests/unit/test_statistics.py",),
    ),
    Fault(
        name="statistics: equal ratings have an interval of no width",
        file="nemo_mapo/statistics.py",
        right="    if max(values) - min(values) <= _SAME:",
        wrong="    if not values:",
        tests=("tests/unit/test_statistics.py",),
    ),
    Fault(
        name="report: no live page while open questions are validated",
        file="nemo_mapo/training/records.py",
        right='if any(name.startswith("val/") for name in metrics):',
        wrong='if "val/accuracy" in metrics:',
        tests=("tests/unit/training/test_records.py",),
    ),
    Fault(
        name="statistics: intervals over seeds leave the range of a share",
        file="nemo_mapo/statistics.py",
        right="scale, back, slope = _SCALES[within]",
        wrong='scale, back, slope = _SCALES["real"]',
        tests=("tests/unit/test_statistics.py",),
    ),
    Fault(
        name="vLLM: the servers' version is not looked at after generation",
        file="nemo_mapo/rollout/vllm/fleet.py",
        right="        self._check_version(server, version)\n        if server.updates",
        wrong="        if server.updates",
        tests=("tests/vllm/test_servers.py", "-k", "in_the_middle_of_a_request"),
    ),
    Fault(
        name="vLLM: experts keep the layout of a first load at a reload on a CPU",
        file="nemo_mapo/rollout/vllm/plugin/nemo_mapo_reload.py",
        right="                module.quant_method.moe_kernel = None\n",
        wrong="                pass\n",
        tests=("tests/vllm/test_native_audio.py", "-k", "qwen3_omni_moe and before_and_after"),
    ),
    Fault(
        name="vLLM: tensors of several types share a piece, whose bytes cannot be taken apart",
        file="nemo_mapo/rollout/vllm/weights.py",
        right=" or tensor.dtype != next(iter(bucket.values())).dtype",
        wrong="",
        tests=("tests/unit/rollout/test_weight_transfer.py", "-k", "every_tensor"),
    ),
    Fault(
        name="vLLM: a server that serves other weights than it was sent is used",
        file="nemo_mapo/rollout/vllm/fleet.py",
        right="        if not nats <= self._alarm:\n",
        wrong="        if False:\n",
        tests=("tests/vllm/test_servers.py", "-k", "other_than_the_policys"),
    ),
    Fault(
        name="vLLM: embeddings of the neighbour's clip",
        file="nemo_mapo/models/audio_llm.py",
        right="self._embed(tokens, tokens == self.audio_token_id, sequence, audio, audio_row)",
        wrong="self._embed(tokens, tokens == self.audio_token_id, sequence, audio, audio_row.roll(4, 0))",
        tests=("tests/vllm/test_embeddings.py",),
    ),
    Fault(
        name="vLLM: log-probs of the model instead of the distribution sampled from",
        file="nemo_mapo/rollout/vllm/process.py",
        right='"--logprobs-mode": "processed_logprobs"',
        wrong='"--logprobs-mode": "raw_logprobs"',
        tests=("tests/vllm/test_embeddings.py",),
    ),
    Fault(
        name="vLLM: a tied head keeps its old weights",
        file="nemo_mapo/rollout/vllm/weights.py",
        right="                    yield copies[theirs], part\n",
        wrong="                    pass\n",
        tests=("tests/vllm/test_embeddings.py",),
    ),
    Fault(
        name="log-probs of engine and training compared under different distributions",
        file="nemo_mapo/rollout/scoring.py",
        right="            self.sampling,\n            generated=",
        wrong="            SamplingConfig(),\n            generated=",
        tests=("tests/integration/test_drawn_log_probs.py",),
    ),
)


def main() -> None:
    """Plant and test; exit with 1 where a fault survives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of names; all faults without")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="faults at a time (default: cores)")
    arguments = parser.parse_args()
    wanted = tuple(arguments.names)
    chosen = [fault for fault in FAULTS if not wanted or fault.name.startswith(wanted)]
    missed = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        outcomes = tqdm(pool.map(outcome, chosen), total=len(chosen), unit="fault")
        for fault, said in zip(chosen, outcomes, strict=True):
            tqdm.write(f"{said}  {fault.name}")
            missed += [] if said == NOTICED else [fault.name]
    sys.exit(f"{len(missed)} of {len(chosen)} faults went unnoticed" if missed else 0)


def outcome(fault: Fault) -> str:
    """NOTICED if a test fails with the fault planted; if pytest could not run, what it said last."""
    with tempfile.TemporaryDirectory() as folder:
        for name in COPIED:
            source, target = ROOT / name, Path(folder, name)
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, target)
        planted = Path(folder, fault.file)
        planted.write_text(with_fault(planted.read_text(), fault))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *fault.tests]
        # vLLM's environment is not copied.
        vllm = {"NEMO_MAPO_VLLM_PYTHON": str(ROOT / ".venv-vllm" / "bin" / "python")}
        environment = vllm | os.environ
        try:
            finished = subprocess.run(
                command,
                cwd=folder,
                capture_output=True,
                text=True,
                check=False,
                env=environment,
                timeout=LONGEST_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return f"tests did not end within {LONGEST_SECONDS} s: "
    if finished.returncode == 0:
        return SURVIVED
    return NOTICED if finished.returncode == TESTS_FAILED else f"{finished.stdout[-2000:]}{finished.stderr[-2000:]}"


def with_fault(text: str, fault: Fault) -> str:
    """The file with the fault in it; ValueError where its place is not found exactly once."""
    if text.count(fault.right) != 1:
        raise ValueError(f"{fault.name}: {fault.file} has {text.count(fault.right)} places like {fault.right!r}")
    return text.replace(fault.right, fault.wrong)


if __name__ == "__main__":
    main()
