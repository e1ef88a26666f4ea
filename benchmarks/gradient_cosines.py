"""Which mask points where: cosines of masked policy gradients to the gradient of the held-out probability of the truth.

    python benchmarks/gradient_cosines.py RUN [--checkpoint start] [--prompts 24] [--decide yes no]

For one batch of rollouts of a checkpoint (or the start) of a run, the policy gradient at ratio 1 under every signal and
under an oracle, which weights the words that decide and nothing else: an upper bound for masks that have to find them.
The truth is read off the manifest's completions by choice, on questions of the test split; the rollouts answer those of
the validation split. Seconds for the embedded model; no training, no seeds of training.
"""

import argparse
from functools import partial
from pathlib import Path

from nemo_mapo.console import quiet_upstream
from nemo_mapo.platform import hide_cuda_devices

hide_cuda_devices()
quiet_upstream()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from nemo_mapo.config.analysis import AnalysisConfig  # noqa: E402
from nemo_mapo.config.objective import ObjectiveConfig  # noqa: E402
from nemo_mapo.embedded.warm_start import start_embedded  # noqa: E402
from nemo_mapo.evaluation.grounding.analyse import Subject  # noqa: E402
from nemo_mapo.evaluation.grounding.causal import belief_rows, completion_rows  # noqa: E402
from nemo_mapo.evaluation.grounding.run import START, OpenedRun, open_run  # noqa: E402
from nemo_mapo.models.layout import in_parts  # noqa: E402
from nemo_mapo.objective.advantages import group_advantages  # noqa: E402
from nemo_mapo.objective.masks import relevance_mask  # noqa: E402
from nemo_mapo.platform import initialize_parallel, install_cpu_host  # noqa: E402
from nemo_mapo.rows import Group, Row, completions_of, training_rows  # noqa: E402
from nemo_mapo.training.contrast import audio_contrast  # noqa: E402
from nemo_mapo.training.scoring import score_groups  # noqa: E402
from nemo_mapo.training.signals import token_signals, token_signals_in_parts  # noqa: E402

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
    rows = training_rows(rollouts)
    rewards = torch.tensor(score_groups(rollouts, subject.rewards).total)
    advantages = group_advantages(rewards, GROUP_SIZE, use_std=True, epsilon=ObjectiveConfig().advantage_epsilon)
    truth = _truth_gradient(subject, held_out)
    print(f"{len(rewards)} completions, {int((advantages != 0).sum())} with an advantage")
    print(f"{'mask':28} {'cosine':>7} {'share of weight on ' + ' '.join(arguments.decide):>28}")
    decides = _decides(rollouts, subject, arguments.decide)
    for name, mask in _masks(subject, rows, decides).items():
        gradient = _policy_gradient(subject, rows, advantages, mask)
        cosine = torch.nn.functional.cosine_similarity(gradient, truth, dim=0)
        weights = torch.cat(mask)
        print(f"{name:28} {float(cosine):7.3f} {float((weights * torch.cat(decides)).sum() / weights.sum()):28.3f}")


def _rollouts(asked: OpenedRun) -> list[Group]:
    subject = asked.subject
    (problems,) = asked.batches
    seeds = torch.arange(len(problems) * GROUP_SIZE)
    subject.policy.eval()
    prompts = [problem.prompt for problem in problems]
    drawn = subject.backend.generate(prompts, subject.sampling, group_size=GROUP_SIZE, seeds=seeds)
    return [problem.answered(completions) for problem, completions in zip(problems, drawn, strict=True)]


def _masks(subject: Subject, rows: list[Row], decides: list[Tensor]) -> dict[str, list[Tensor]]:
    """Weights of every row's completion tokens, by mask."""
    batching, cfg = subject.reference.batching, ObjectiveConfig()
    signals = token_signals_in_parts(subject.policy, rows, head_reduction=None, batching=batching)
    found = {"uniform": [torch.ones(len(row.token_ids)) for row in rows]}
    for kind in SIGNALS:
        values = audio_contrast(subject.policy, subject.reference, rows, dict(enumerate(signals)), kind, batching)
        if values is None:
            entropies = subject.reference.text_entropy(rows)
            values = [unheard - one.entropy_nats for unheard, one in zip(entropies, signals, strict=True)]
        for tau, normalize in ((cfg.tau_base, False), (cfg.tau_base, True), (0.1, False)):
            name = f"{kind}, tau {tau:g}{', normalised' if normalize else ''}"
            masked = partial(relevance_mask, tau_base=tau, clip=cfg.mask_clip, normalize=normalize)
            found[name] = [masked(one[None], torch.ones(1, len(one), dtype=torch.bool))[0] for one in values]
    return found | {"oracle: deciding words": decides}


def _decides(rollouts: list[Group], subject: Subject, words: list[str]) -> list[Tensor]:
    ids = [one.token_ids.tolist() for one in completions_of(rollouts)]
    return [torch.tensor([float(subject.tokenizer.decode([token]).strip() in words) for token in row]) for row in ids]


def _policy_gradient(subject: Subject, rows: list[Row], advantages: Tensor, mask: list[Tensor]) -> Tensor:
    """Of -L_PG at ratio 1: mean over completions of A sum omega log pi / sum omega; the direction of a step."""
    total = _zeros(subject)
    for part in in_parts(list(zip(rows, advantages, mask, strict=True)), ROWS):
        read = _log_probs(subject, [row for row, _, _ in part])
        gains = [
            advantage * (weights * log_probs).sum() / weights.sum().clamp(min=1e-9)
            for log_probs, (_, advantage, weights) in zip(read, part, strict=True)
        ]
        total += _gradient(subject, torch.stack(gains).sum() / len(advantages))
    return total


def _truth_gradient(subject: Subject, held_out: OpenedRun) -> Tensor:
    """Of the mean probability of the right choice's completion."""
    (problems,) = held_out.batches
    tokenizer = subject.tokenizer
    if not held_out.subject.completions:
        raise SystemExit("the test manifest gives no 'completions' by choice: use data=synthetic_prior_shift")
    given, template = held_out.subject.completions, subject.rewards.template
    rows = belief_rows(subject.ask(problems), given, template, tokenizer)
    prompts = [problem.prompt for problem in problems]
    learned = completion_rows(prompts, rows)
    question, right = torch.tensor(rows.question), torch.tensor(rows.truth)
    total = _zeros(subject)
    for asked in range(len(prompts)):
        own = (question == asked).nonzero().flatten().tolist()
        totals = torch.stack([one.sum() for one in _log_probs(subject, [learned[number] for number in own])])
        total += _gradient(subject, totals.softmax(0)[right[own]].sum() / len(prompts))
    return total


def _log_probs(subject: Subject, rows: list[Row]) -> list[Tensor]:
    signals = token_signals(subject.policy, rows, head_reduction=None, batching=subject.reference.batching)
    return [one.log_probs for one in signals]


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
