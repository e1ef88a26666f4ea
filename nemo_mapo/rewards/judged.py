"""Verdicts of a judge model: requested concurrently, cached, and never made up."""

import hashlib
import json
import logging
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TypeVar

from nemo_mapo.config.rewards import JudgeConfig
from nemo_mapo.console import Unavailable
from nemo_mapo.rewards.judge import ChatModel, JudgeError, JudgeUnreachable, OpenAIClient

logger = logging.getLogger(__name__)

Verdict = TypeVar("Verdict")
_FEWEST_FAILURES = 8
"""Failed prompts in a row before a judge counts as down, if few prompts are asked at a time."""
_SHOWN_REASONS = 3
_SHOWN_CHARACTERS = 200
_MARKUP = "*_`\"'#> \t\n"
"""Around a word that is set in bold, quoted or a heading."""
_SAID_FIRST = re.compile(r"(YES|NO)(?=$|[.,:;!\n\u2013\u2014-])", re.IGNORECASE)
_SAID = re.compile(r"\b(YES|NO)\b")


class RewardsUnavailable(Unavailable):
    """Too many verdicts are missing; the batch was not trained on."""


class VerdictCache:
    """Cache of replies by prompt, in a file of JSON lines that processes and runs may share.

    Whole lines are appended; a line that was truncated during writing is ignored and requested again.
    """

    def __init__(self, path: Path) -> None:
        """Read the file; ValueError names an invalid line."""
        self._path = path
        self._lock = threading.Lock()
        self._replies: dict[str, str] = {}
        if path.exists():
            text = path.read_text(encoding="utf-8")
            for number, line in enumerate(text.splitlines(), start=1):
                self._read(line, number)
            if text and not text.endswith("\n"):
                with path.open("a", encoding="utf-8") as file:
                    file.write("\n")

    def get(self, key: str) -> str | None:
        """The reply to a question that was asked before."""
        return self._replies.get(key)

    def put(self, key: str, reply: str) -> None:
        """Remember a reply."""
        with self._lock:
            self._replies[key] = reply
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "reply": reply}) + "\n")

    def _read(self, line: str, number: int) -> None:
        try:
            record = json.loads(line)
            self._replies[record["key"]] = record["reply"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if line.startswith('{"key"') and not line.endswith("}"):
                # The beginning of a record whose writer was killed.
                return
            raise ValueError(f"{self._path}:{number}: not a remembered verdict ({error}); delete the line") from error


class _Outage:
    """Counts consecutive prompts for which the judge could not be reached; a single one may be the prompt's fault."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._in_a_row = 0
        self._lock = threading.Lock()

    @property
    def is_certain(self) -> bool:
        """Whether to stop asking."""
        return self._in_a_row >= self._most

    def count(self, *, failed: bool) -> None:
        """Note how a request ended."""
        with self._lock:
            self._in_a_row = self._in_a_row + 1 if failed else 0


class Judge:
    """Asks a chat model the same kind of question about many texts."""

    def __init__(self, model: ChatModel, *, concurrency: int, remembered: VerdictCache | None = None) -> None:
        self._model = model
        self._concurrency = concurrency
        self._remembered = remembered

    def ask(self, system: str, prompts: Sequence[str], parse: Callable[[str], Verdict | None]) -> list[Verdict | None]:
        """A verdict for each prompt, in order; None if the judge cannot be reached or `parse` finds no verdict.

        Replies with a verdict are cached; equal prompts are asked once. If more consecutive prompts than are asked
        at a time have used up their attempts, the rest are given up, because each would take as long.
        """
        distinct = list(dict.fromkeys(prompts))
        reasons: list[str] = []
        outage = _Outage(most=max(2 * self._concurrency, _FEWEST_FAILURES))
        with ThreadPoolExecutor(max_workers=self._concurrency, thread_name_prefix="judge") as pool:
            found = dict(
                zip(
                    distinct,
                    pool.map(lambda prompt: self._ask(system, prompt, parse, outage, reasons), distinct),
                    strict=True,
                )
            )
        missing = sum(found[prompt] is None for prompt in prompts)
        if missing:
            said = "; ".join(dict.fromkeys(reasons[:_SHOWN_REASONS])) or "it was given up after an outage"
            logger.warning(f"{missing} of {len(prompts)} verdicts of {self._model.name} are missing, such as: {said}")
        return [found[prompt] for prompt in prompts]

    def _ask(
        self,
        system: str,
        prompt: str,
        parse: Callable[[str], Verdict | None],
        outage: "_Outage",
        reasons: list[str],
    ) -> Verdict | None:
        key = hashlib.sha256(json.dumps([self._model.name, system, prompt]).encode()).hexdigest()
        reply = None if self._remembered is None else self._remembered.get(key)
        if reply is not None:
            return parse(reply)
        if outage.is_certain:
            return None
        try:
            reply = self._model.chat(system, prompt)
        except JudgeError as error:
            reasons.append(str(error))
            outage.count(failed=isinstance(error, JudgeUnreachable))
            return None
        outage.count(failed=False)
        verdict = parse(reply)
        if verdict is None:
            reasons.append(f"no verdict in the reply {reply[:_SHOWN_CHARACTERS]!r}")
        elif self._remembered is not None:
            self._remembered.put(key, reply)
        return verdict


@cache
def judge_of(config: JudgeConfig, cache_file: str | None) -> Judge:
    """The judge that a config names; one per process, with its cache."""
    remembered = None if cache_file is None else VerdictCache(Path(cache_file))
    return Judge(OpenAIClient(config), concurrency=config.concurrency, remembered=remembered)


def yes_or_no(reply: str) -> bool | None:
    """The verdict of a reply that says YES or NO, alone or with an explanation; None if it says neither, or both.

    Bold, quotes and headings are ignored. The verdict is the first word of the reply if it is set off from the rest, or
    else the one in capitals; if the other word is in capitals too, there is no verdict.
    """
    plain = re.sub(r"[*_`\"']", "", reply).strip(_MARKUP)
    said = set(_SAID.findall(plain))
    if first := _SAID_FIRST.match(plain):
        said.add(first.group().upper())
    return said == {"YES"} if len(said) == 1 else None


def unit_score(reply: str) -> float | None:
    """A plain number from 0 to 1 and nothing else, except bold and quotes; None otherwise."""
    text = reply.strip(_MARKUP)
    if not text.replace(".", "", 1).isdecimal() or not text.isascii():
        return None
    value = float(text)
    return value if value <= 1 else None
