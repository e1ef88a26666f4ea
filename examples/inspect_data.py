"""Write a page with samples of a corpus: questions, choices, players and spectrograms."""

import argparse
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from nemo_mapo.console import quiet_upstream

quiet_upstream()

from lhotse.cut import Cut  # noqa: E402
from tqdm import tqdm  # noqa: E402

from nemo_mapo.config.data import DatasetConfig, PromptConfig  # noqa: E402
from nemo_mapo.data.dataset import load_waveform  # noqa: E402
from nemo_mapo.data.manifests import example_from_cut, load_cuts, validate_manifest  # noqa: E402
from nemo_mapo.data.nemo_types import read_cuts  # noqa: E402
from nemo_mapo.data.prompts import encode_prompt, shown_prompt  # noqa: E402
from nemo_mapo.data.tokenizer import load_tokenizer  # noqa: E402
from nemo_mapo.reports.data_page import ClipSample, write_data_page  # noqa: E402
from nemo_mapo.rewards.templates import INSTRUCTIONS, prompt_wording  # noqa: E402
from nemo_mapo.types import Example  # noqa: E402

PromptReader = Callable[[Example], tuple[tuple[str, bool], ...]]


def main() -> None:
    """Choose cuts, read their audio and write the page."""
    arguments = _arguments()
    try:
        cuts = list(_cuts(arguments.input, arguments.first))
        if arguments.task is not None:
            cuts = [(split, cut) for split, cut in cuts if _example(cut).task == arguments.task]
        if not cuts:
            raise ValueError(
                f"{arguments.input}: no question" + (f" of task {arguments.task}" if arguments.task else "")
            )
        chosen = _choose(cuts, arguments.samples, arguments.seed)
        read_prompt = _prompt_reader(arguments)
        samples = [_sample(split, cut, read_prompt) for split, cut in tqdm(chosen, desc="reading audio", unit="clip")]
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_data_page(arguments.output, title=f"Data in {arguments.input}", facts=_facts(cuts), samples=samples)
    print(f"written: {arguments.output}")


def _cuts(path: Path, first: int) -> Iterator[tuple[str, Cut]]:
    """Cuts with the name of their split; from a file of `input_cfg` items only the first, because archives are read."""
    if path.suffix in (".yaml", ".yml"):
        config = DatasetConfig(input_cfg=str(path), check_cuts=first)
        validate_manifest(config, open_ended=True)
        yield from ((path.stem, cut) for cut in islice(read_cuts(config.items), first))
        return
    for manifest in _manifests(path):
        yield from ((_split(manifest), cut) for cut in load_cuts(manifest))


def _example(cut: Cut) -> Example:
    return example_from_cut(cut, open_ended=True)


def _manifests(path: Path) -> list[Path]:
    found = sorted(path.glob("cuts_*.jsonl*")) if path.is_dir() else [path]
    if not found:
        raise ValueError(
            f"{path}: no cuts_*.jsonl.gz in this directory: give a manifest, or what prepare_data.py wrote"
        )
    return found


def _split(path: Path) -> str:
    return path.name.split(".")[0].removeprefix("cuts_")


def _choose(cuts: list[tuple[str, Cut]], count: int, seed: int) -> list[tuple[str, Cut]]:
    """Draw `count` cuts, as evenly over splits and tasks as there are cuts."""
    groups: dict[tuple[str, str], list[tuple[str, Cut]]] = defaultdict(list)
    for split, cut in cuts:
        groups[split, _example(cut).task].append((split, cut))
    generator = random.Random(seed)
    shuffled = [generator.sample(group, len(group)) for group in groups.values()]
    rounds = (group[turn] for turn in range(count) for group in shuffled if turn < len(group))
    chosen = [pair for pair, _ in zip(rounds, range(count), strict=False)]
    return sorted(chosen, key=lambda pair: (pair[0], _example(pair[1]).task, pair[1].id))


def _prompt_reader(arguments: argparse.Namespace) -> PromptReader:
    """Maps an example to the pieces of its prompt, with the clip as one placeholder; none without a tokenizer."""
    if arguments.tokenizer is None:
        return lambda example: ()
    tokenizer = load_tokenizer(arguments.tokenizer)
    config = PromptConfig(system=arguments.system, instruction=arguments.instruction)
    wording = prompt_wording(config, arguments.template)
    return lambda example: shown_prompt(encode_prompt(example, 1, tokenizer, wording), tokenizer)


def _sample(split: str, cut: Cut, read_prompt: PromptReader) -> ClipSample:
    example = _example(cut)
    return ClipSample(
        id=example.id,
        split=split,
        task=example.task,
        question=example.question,
        choices=example.choices,
        answer=example.answer,
        samples=load_waveform(cut).numpy(),
        sample_rate=cut.sampling_rate,
        prompt=read_prompt(example),
    )


def _facts(cuts: list[tuple[str, Cut]]) -> list[tuple[str, str]]:
    splits = Counter(split for split, _ in cuts)
    tasks = Counter(_example(cut).task for _, cut in cuts)
    seconds = sorted(cut.duration for _, cut in cuts)
    facts = [(f"Questions, {split}", f"{count:,}") for split, count in splits.items()]
    facts += [(f"Questions, {task}", f"{count:,}") for task, count in tasks.most_common(4)]
    return [
        *facts,
        ("Seconds per clip, median", f"{seconds[len(seconds) // 2]:.1f}"),
        ("Longest", f"{seconds[-1]:.1f}"),
    ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "input",
        type=Path,
        help="a cuts manifest, a directory of them, or a YAML file of input_cfg items",
    )
    parser.add_argument("--output", type=Path, default=Path("data_page.html"), help="default: data_page.html")
    parser.add_argument("--samples", type=int, default=16, help="clips on the page (default 16)")
    parser.add_argument("--first", type=int, default=2000, help="cuts read from a YAML file (default 2000)")
    parser.add_argument("--task", help="show only this task")
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="also show each prompt as a model with this tokenizer reads it"
    )
    parser.add_argument("--template", choices=sorted(INSTRUCTIONS), default="think",
                        help="reasoning template that the prompt asks for (default: %(default)s)")  # fmt: skip
    parser.add_argument("--instruction", metavar="TEXT", default="template", help="data.prompt.instruction")
    parser.add_argument("--system", metavar="TEXT", help="data.prompt.system")
    parser.add_argument("--seed", type=int, default=0, help="seed for choosing clips (default 0)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
