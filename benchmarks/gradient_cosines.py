"""Which mask points where: cosines of masked policy gradients to the gradient of the held-out probability of the truth.

    python benchmarks/gradient_cosines.py RUN [--checkpoint start] [--prompts 24] [--decide yes no]

For one batch of rollouts of a checkpoint (or the start) of a run, the policy gradient at ratio 1 under every signal and
under an oracle, which weights the words that decide and nothing else: an upper bound for masks that have to find them.
The truth is read off the manifest's completions by choice, on questions of the test split; the rollouts answer those of
the validation split. Seconds for the embedded model; no training, no seeds of training.
"""

import argparse
from pathlib import Path

from nemo_mapo.console import quiet_upstream
from nemo_mapo.platform import hide_cuda_devices

hide_cuda_devices()
quiet_upstream()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from nemo_mapo.config.analysis import AnalysisConfig  # noqa: E402
from nemo_mapo.config.objective import ObjectiveConfig  # noqa: E402
from nemo_mapo.data.sequences import response_mask, row_slices, select_rows, token_batch  # noqa: E402
from nemo_mapo.data.tokenizer import SpecialTokens  # noqa: E402
from nemo_mapo.embedded.warm_start import start_embedded  # noqa: E402
from nemo_mapo.evaluation.grounding.analyse import Subject, asker  # noqa: E402
from nemo_mapo.evaluation.grounding.causal import belief_rows, completion_rows  # noqa: E402
from nemo_mapo.evaluation.grounding.run import START, OpenedRun, open_run  # noqa: E402
from nemo_mapo.objective.advantages import group_advantages  # noqa: E402
from nemo_mapo.objective.masks import relevance_mask  # noqa: E402
from nemo_mapo.platform import initialize_parallel, install_cpu_host  # noqa: E402
from nemo_mapo.rows import Group, completions_of, training_rows  # noqa: E402
from nemo_mapo.training.contrast import audio_contrast  # noqa: E402
from nemo_mapo.training.scoring import score_groups  # noqa: E402
from nemo_mapo.training.signals import token_signals, token_signals_in_parts  # noqa: E402
from nemo_mapo.types import TokenBatch  # noqa: E402

GROUP_SIZE = 8
ROWS = 16
SIGNALS = ("delta_entropy", "kl", "jsd", "log_ratio")


def main() -> None:
    """Print a line per mask."""
    arguments = _arguments()
    install_cpu_host()
    initialize_parallel()
    config = AnalysisConfig(max_items=arguments.prompts, batch_size=arguments.prompts)
    asked, held_out = (
        open_run(arguments.run, arguments.checkpoint, split=split, config=config, warm_starter=start_embedded)
        for split in ("validation", "test")
    )
    subject = asked.subject
    rollouts = _rollouts(asked)
    sequences = token_batch(training_rows(rollouts), pad_id=SpecialTokens.from_tokenizer(subject.tokenizer).pad_id)
    rewards = torch.tensor(score_groups(rollouts, subject.rewards).total)
    advantages = group_advantages(rewards, GROUP_SIZE, use_std=True, epsilon=ObjectiveConfig().advantage_epsilon)
    truth = _truth_gradient(subject, held_out)
    print(f"{len(rewards)} completions, {int((advantages != 0).sum())} with an advantage")
    print(f"{'mask':28} {'cosine':>7} {'share of weight on ' + ' '.join(arguments.decide):>28}")
    decides = _decides(rollouts, subject, arguments.decide)
    for name, mask in _masks(subject, sequences, decides).items():
        gradient = _policy_gradient(subject, sequences, advantages, mask)
        cosine = torch.nn.functional.cosine_similarity(gradient, truth, dim=0)
        print(f"{name:28} {float(cosine):7.3f} {float((mask * decides).sum() / mask.sum()):28.3f}")


def _rollouts(asked: OpenedRun) -> list[Group]:
    subject = asked.subject
    (problems,) = asked.batches
    seeds = torch.arange(len(problems) * GROUP_SIZE)
    subject.policy.eval()
    prompts = [problem.prompt for problem in problems]
    drawn = subject.backend.generate(prompts, subject.sampling, group_size=GROUP_SIZE, seeds=seeds)
    return [problem.answered(completions) for problem, completions in zip(problems, drawn, strict=True)]


def _masks(subject: Subject, sequences: TokenBatch, decides: Tensor) -> dict[str, Tensor]:
    """Weights of the completion tokens, by mask."""
    batching, cfg = subject.reference.batching, ObjectiveConfig()
    kept = response_mask(sequences.completion_lengths, decides.shape[1])
    signals = token_signals_in_parts(subject.policy, sequences, head_reduction=None, batching=batching)
    found = {"uniform": kept.float()}
    for kind in SIGNALS:
        values = audio_contrast(subject.policy, subject.reference, sequences, signals.log_probs, kind, batching)
        if values is None:
            values = subject.reference.text_entropy(sequences) - signals.entropy_nats
        for tau, normalize in ((cfg.tau_base, False), (cfg.tau_base, True), (0.1, False)):
            name = f"{kind}, tau {tau:g}{', normalised' if normalize else ''}"
            found[name] = relevance_mask(values, kept, tau_base=tau, clip=cfg.mask_clip, normalize=normalize)
    return found | {"oracle: deciding words": decides.float()}


def _decides(rollouts: list[Group], subject: Subject, words: list[str]) -> Tensor:
    ids = [one.token_ids.tolist() for one in completions_of(rollouts)]
    rows = [torch.tensor([subject.tokenizer.decode([token]).strip() in words for token in row]) for row in ids]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _policy_gradient(subject: Subject, sequences: TokenBatch, advantages: Tensor, mask: Tensor) -> Tensor:
    """Of -L_PG at ratio 1: mean over completions of A sum omega log pi / sum omega; the direction of a step."""
    total = _zeros(subject)
    for rows in row_slices(len(advantages), ROWS):
        part = select_rows(sequences, rows)
        log_probs = token_signals(
            subject.policy, part, head_reduction=None, batching=subject.reference.batching
        ).log_probs
        weights = mask[rows, : log_probs.shape[1]]
        gains = advantages[rows] * (weights * log_probs).sum(1) / weights.sum(1).clamp(min=1e-9)
        total += _gradient(subject, gains.sum() / len(advantages))
    return total


def _truth_gradient(subject: Subject, held_out: OpenedRun) -> Tensor:
    """Of the mean probability of the right choice's completion."""
    (problems,) = held_out.batches
    tokenizer = subject.tokenizer
    if not held_out.subject.completions:
        raise SystemExit("the test manifest gives no 'completions' by choice: use data=synthetic_prior_shift")
    given, template = held_out.subject.completions, subject.rewards.template
    rows = belief_rows(asker(subject)(problems), given, template, tokenizer)
    prompts = [problem.prompt for problem in problems]
    sequences = token_batch(completion_rows(prompts, rows), pad_id=SpecialTokens.from_tokenizer(tokenizer).pad_id)
    question, right = torch.tensor(rows.question), torch.tensor(rows.truth)
    total = _zeros(subject)
    for asked in range(len(prompts)):
        own = (question == asked).nonzero().flatten().tolist()
        part = select_rows(sequences, own)
        log_probs = token_signals(
            subject.policy, part, head_reduction=None, batching=subject.reference.batching
        ).log_probs
        total += _gradient(subject, log_probs.sum(1).softmax(0)[right[own]].sum() / len(prompts))
    return total


def _parameters(subject: Subject) -> list[Tensor]:
    return [parameter for parameter in subject.policy.parameters() if parameter.requires_grad]


def _zeros(subject: Subject) -> Tensor:
    return torch.zeros(sum(parameter.numel() for parameter in _parameters(subject)))


def _gradient(subject: Subject, value: Tensor) -> Tensor:
    parameters = _parameters(subject)
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return torch.cat(
        [
            torch.zeros(parameter.numel()) if gradient is None else gradient.flatten()
            for gradient, parameter in zip(found, parameters, strict=True)
        ]
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory of examples/train_mapo.py")
    parser.add_argument(
        "--checkpoint", default=START, metavar="NAME", help="below RUN/checkpoints (default: the start)"
    )
    parser.add_argument("--prompts", type=int, default=24, help="questions of either split (default: %(default)s)")
    parser.add_argument("--decide", nargs="+", default=["yes", "no"], metavar="WORD", help="(default: yes no)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
