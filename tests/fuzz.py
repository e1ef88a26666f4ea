"""Seeded hostile input: `python tests/fuzz.py [--seed N] [--configs N] [--manifests N]`, or `make fuzz`.

Mutated configs go through the loader of the command line, mutated manifests through the check of a split. Each must be
accepted or refused with an error for users, within ten seconds of CPU time; what is absurd must be refused.
"""

import argparse
import contextlib
import gzip
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MOST_SECONDS = 10
SAMPLE = ROOT / "data" / "lhotse_manifests"
VALUES = (
    *("nan", "inf", "-inf", "1e38", "-1", "0", "0.5", "true", "false", "null", "''", "' '", "text", "???", "[]", "{}"),
    *(
        "[1,2]",
        "{a: 1}",
        "[null]",
        "[[[]]]",
        "1_0",
        "0x10",
        "'1'",
        "99999999999999999999",
        "1e-400",
        "${seed}",
        "${nowhere}",
    ),
    *(
        "${oc.env:NO_SUCH}",
        "${data.tokenizer}",
        "${.}",
        "'\\t'",
        "a=b",
        "a,b",
        "[",
        "}",
        '"',
        "é",
        "\u202e",
        "../../..",
        "/dev/zero",
        "a" * 300,
    ),
    *(
        "[-1,0]",
        "{type: nemo}",
        "[{type: lhotse, cuts_path: x, wieght: 2}]",
        "${required:}",
        "{'': 1}",
        "[1,2,3,4,5,6,7,8,9]",
    ),
)
YAMLS = (
    *(
        "a: &a [*a]",
        "a: [",
        "\t",
        "- 1",
        "{",
        "x: !!python/object/apply:os.system [id]",
        "seed: !!bool maybe",
        "seed: !!timestamp now",
        "seed: !!int x",
        "defaults: [no]",
        "defaults: 3",
    ),
    *("defaults: [/model: null]", "seed: [", "seed: 1\nseed: 2", "? [a, b]\n: c", "a: " + "[" * 2000, "null", "3", ""),
    "a: &a [1,1,1,1,1,1,1,1,1]\n"
    + "".join(f"{y}: &{y} [{','.join(['*' + x] * 9)}]\n" for x, y in zip("abcdefgh", "bcdefghi", strict=True)),
    *(
        "model: null",
        "data: {train_ds: null}",
        "objective: {eta: .nan}",
        "trainer: {mapo: {max_steps: 1e3}}",
        "%YAML 9",
    ),
    *(
        "objective: ${objective}",
        "seed: ${data.train_ds.seed}\ndata: {train_ds: {seed: '${seed}'}}",
        "---\n---\n",
        "a: b: c",
    ),
)
ABSURD_CONFIGS = (
    *(
        "objective.fail_threshold=nan",
        "model.optim.lr=1e38",
        "model.optim.sched.min_lr=0.5",
        "exp_manager.explicit_log_dir=''",
    ),
    *("model=null", "objective=null", "data=null", "trainer.mapo.max_steps=0", "model.decoder.num_layers=true"),
    *("objective.eta=inf", "seed=true", "seed=-1", "rollout.sampling.temperature=nan", "data.train_ds.shuffle=1"),
    *("data.train_ds.max_duration=inf", "rewards.terms.accuracy.weight=inf", "rewards.judge.base_url=nowhere"),
    "data.train_ds.input_cfg=[{type: lhotse, cuts_path: x, wieght: 2}]",
    "data.train_ds.input_cfg=[{type: lhotse, cuts_path: x, weight: true}]",
    *("data.train_ds.min_duration=40", "model.optim.betas=[1,1]", "model.target_layers=[true]", "trainer.devices=0"),
)


class Outcomes(Counter[str]):
    """How often input was accepted, refused, crashed or took too long; and the bad ones, to be repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.bad: list[str] = []

    def note(self, what: str, work: Callable[[], object], refusals: type[Exception]) -> bool:
        """Do it; whether it was accepted."""
        started = time.process_time()
        try:
            with _limited():
                work()
            self["accepted"] += 1
            return True
        except refusals:
            self["refused"] += 1
        except TimeoutError:
            self._bad("hangs", what)
        except Exception as error:
            self._bad("tracebacks", f"{what}: {type(error).__name__}: {error}"[:500])
        finally:
            self["slowest_milliseconds"] = max(
                self["slowest_milliseconds"], round(1000 * (time.process_time() - started))
            )
        return False

    def _bad(self, kind: str, what: str) -> None:
        self[kind] += 1
        self.bad.append(f"{kind}: {what}")


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def fuzz_configs(count: int, seed: int) -> Outcomes:
    """Mutated overrides and files of a config group."""
    from nemo_mapo.config.compose import compose
    from nemo_mapo.config.explain import keys_of
    from nemo_mapo.config.load import ConfigError, load
    from nemo_mapo.config.run import RunConfig

    keys = sorted(set(keys_of(RunConfig)))
    draw, outcomes = random.Random(seed), Outcomes()
    primary = ROOT / "conf" / "train_mapo.yaml"
    with tempfile.TemporaryDirectory() as folder:
        mine = Path(folder, "experiment", "mine.yaml")
        mine.parent.mkdir()
        for _ in range(count):
            overrides = [_override(draw, keys) for _ in range(draw.randint(1, 3))]
            text = ""
            if draw.random() < 0.3:
                text = _text(draw, keys)
                mine.write_text(text)
                overrides.append("experiment=mine")
            places = [Path(folder)] if text else []
            outcomes.note(
                f"{overrides} {text[:200]!r}",
                lambda o=overrides, p=places: load(compose(primary, o, search_path=p), RunConfig),
                ConfigError,
            )
        for absurd in ABSURD_CONFIGS:
            if outcomes.note(absurd, lambda o=absurd: load(compose(primary, [o]), RunConfig), ConfigError):
                outcomes._bad("absurd_accepted", absurd)
    return outcomes


def _override(draw: random.Random, keys: list[str]) -> str:
    key = draw.choice(keys)
    if draw.random() < 0.2:
        cut = draw.randrange(len(key) + 1)
        key = key[:cut] + draw.choice(["", "x", ".", "/", "@", "~", " ", "é"]) + key[cut + 1 :]
    sign = draw.choice(["", "", "", "", "+", "++", "~"])
    return f"{sign}{key}={draw.choice(VALUES)}" if draw.random() < 0.95 else f"{sign}{key}"


def _text(draw: random.Random, keys: list[str]) -> str:
    header = draw.choice(["# @package _global_\n", ""])
    if draw.random() < 0.5:
        return header + draw.choice(YAMLS)
    *sections, last = draw.choice(keys).split(".")
    lines = [f"{'  ' * depth}{name}:" for depth, name in enumerate(sections)]
    text = "\n".join([*lines, f"{'  ' * len(sections)}{last}: {draw.choice(VALUES)}"])
    if draw.random() < 0.3:
        cut = draw.randrange(len(text))
        text = text[:cut] + draw.choice(["\n", ":", "[", "&", "*", "\t", "'", "\x07"]) + text[cut:]
    return header + text


def fuzz_manifests(count: int, seed: int) -> Outcomes:
    """Mutated Lhotse and NeMo manifests; what is accepted is read by Lhotse too."""
    from nemo_mapo.config.data import DatasetConfig
    from nemo_mapo.data.manifests import example_from_cut, load_cuts, validate_manifest

    draw, outcomes = random.Random(seed), Outcomes()
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(shutil.copytree(SAMPLE, Path(folder, "corpus")))
        cuts = gzip.decompress((SAMPLE / "cuts_train.jsonl.gz").read_bytes()).decode()
        lhotse = [json.loads(line) for line in cuts.splitlines()]
        nemo = [json.loads(line) for line in (SAMPLE / "nemo_train.json").read_text().splitlines()]

        def check(kind: str, content: bytes) -> None:
            path = corpus / "mutated.jsonl"
            path.write_bytes(content)
            item = {"type": kind, ("cuts_path" if kind == "lhotse" else "manifest_filepath"): str(path)}
            validate_manifest(DatasetConfig(input_cfg=(item,)))
            if kind == "lhotse":
                for cut in load_cuts(path):
                    example_from_cut(cut)
                    cut.load_audio()

        for _ in range(count):
            kind, records = draw.choice([("lhotse", lhotse), ("nemo", nemo)])
            content = _manifest(draw, records)
            outcomes.note(f"{kind} {content[:400]!r}", lambda k=kind, c=content: check(k, c), ValueError)
        for kind, absurd in _absurd_manifests(lhotse, nemo):
            if outcomes.note(f"{kind} {absurd[:400]!r}", lambda k=kind, c=absurd: check(k, c), ValueError):
                outcomes._bad("absurd_accepted", f"{kind} {absurd[:400]!r}")
    return outcomes


WRONG: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1e38,
    float("nan"),
    float("inf"),
    "",
    "x",
    [],
    {},
    [None],
    {"a": 1},
    "\x00",
    "pipe:id",
    10**30,
)


def _manifest(draw: random.Random, records: list[dict[str, Any]]) -> bytes:
    changed = json.loads(json.dumps(records))
    for _ in range(draw.randint(1, 2)):
        holder = draw.choice(changed)
        for name in ("recording", "sources", "supervisions", "custom"):
            inner = holder.get(name) if isinstance(holder, dict) else None
            if draw.random() < 0.4 and inner:
                holder = inner[0] if isinstance(inner, list) else inner
        if isinstance(holder, dict) and holder:
            key = draw.choice([*sorted(holder), "unknown"])
            if draw.random() < 0.25:
                holder.pop(key, None)
            else:
                holder[key] = draw.choice(WRONG)
    content = "".join(json.dumps(record) + "\n" for record in changed).encode()
    if draw.random() < 0.3:
        cut = draw.randrange(len(content))
        content = (
            content[:cut]
            + draw.choice([b"", b"\n", b"\n\n", b"\xff", b"\x00", b'"', b"{", b"[" * 3000])
            + content[cut:]
        )
    return content


def _absurd_manifests(lhotse: list[dict[str, Any]], nemo: list[dict[str, Any]]) -> Iterator[tuple[str, bytes]]:
    yield "lhotse", b"\n".join(json.dumps(record).encode() + b"\n" for record in lhotse)
    for kind, records in (("lhotse", lhotse), ("nemo", nemo)):
        for wrong in (True, -1, 1e38, float("nan"), "2.0", None):
            yield kind, json.dumps(records[0] | {"duration": wrong}).encode()
        yield kind, (json.dumps(records[0]) + "\n").encode() * 2
        yield kind, b"\xef\xbb\xbf" + json.dumps(records[0]).encode()
    for wrong in (True, -1, 0, "16000", 8000, None):
        yield (
            "lhotse",
            json.dumps(lhotse[0] | {"recording": lhotse[0]["recording"] | {"sampling_rate": wrong}}).encode(),
        )
    for wrong in (16000, 64000, True, -1):
        yield "lhotse", json.dumps(lhotse[0] | {"recording": lhotse[0]["recording"] | {"num_samples": wrong}}).encode()
    for kind in ("MixedCut", "MultiCut", None):
        yield "lhotse", json.dumps(lhotse[0] | {"type": kind}).encode()
    yield "lhotse", json.dumps(lhotse[0] | lhotse[0]["custom"]).encode()
    longer = {"num_samples": 16000, "duration": 1.0}
    yield "lhotse", json.dumps(lhotse[0] | {"duration": 1.0, "recording": lhotse[0]["recording"] | longer}).encode()


def main() -> None:
    """Report the outcomes; exit with 1 if anything crashed, hung or was wrongly accepted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--configs", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--manifests", type=int, default=300, help="(default: %(default)s)")
    arguments = parser.parse_args()
    bad: list[str] = []
    for name, fuzz, count in (
        ("configs", fuzz_configs, arguments.configs),
        ("manifests", fuzz_manifests, arguments.manifests),
    ):
        outcomes = fuzz(count, arguments.seed)
        print(f"{name}: {dict(outcomes)}")
        bad += outcomes.bad
    print("\n".join(bad))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
