"""A reward of the user's own: named by path, imported for this run only, and never a silent zero."""

import re
import sys
from pathlib import Path

import pytest

import nemo_mapo
from nemo_mapo.config.rewards import TAKEN_NAMES, CustomTerm, RewardsConfig
from nemo_mapo.rewards.combined import build_rewards, score
from nemo_mapo.rewards.custom import RewardError
from nemo_mapo.rewards.protocol import RewardSample
from nemo_mapo.types import Clip, Example

EXAMPLE = Example(
    id="q1",
    question="which?",
    choices=("dog", "cat"),
    answer="dog",
    task="t",
    clips=(Clip(path="dog.wav", start_seconds=0.5, duration_seconds=2.0),),
)
SAMPLES = [
    RewardSample(text=f"<think>it barks.</think>{answer}", example=EXAMPLE, finished=True, num_tokens=count)
    for answer, count in (("dog", 10), ("cat", 30))
]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write a module `my_pkg.rewards` outside of the repository, on the import path."""

    def write(text):
        (tmp_path / "my_pkg").mkdir()
        (tmp_path / "my_pkg" / "__init__.py").write_text("")
        (tmp_path / "my_pkg" / "rewards.py").write_text(text)
        return RewardsConfig(terms={"accuracy": {"type": "accuracy", "weight": 2.0}, "length": LENGTH})

    monkeypatch.syspath_prepend(str(tmp_path))
    yield write
    for name in ("my_pkg", "my_pkg.rewards"):
        sys.modules.pop(name, None)


LENGTH = {"type": "custom", "path": "my_pkg.rewards:length", "weight": 0.5}


def test_a_users_function_gets_the_completions_and_adds_its_weighted_value(package):
    config = package(
        "def length(samples, at_most):\n"
        "    assert [s.example.clips[0].path for s in samples] == ['dog.wav', 'dog.wav']\n"
        "    assert all(s.finished and s.text.startswith('<think>') and s.example.answer == 'dog' for s in samples)\n"
        "    return [min(0.0, 1 - s.num_tokens / at_most) for s in samples]\n"
    )
    config.terms["length"].arguments["at_most"] = 20
    table = score(SAMPLES, config)
    assert table.by_reward == {"accuracy": [1.0, 0.0], "length": [0.0, -0.5]}
    assert table.total == [2.0, -0.25]
    assert config.weights == {"accuracy": 2.0, "length": 0.5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "my_pkg.rewards has no length"),
        ("def length(samples:", "cannot import my_pkg.rewards (SyntaxError"),
        ("import no_such_thing", "cannot import my_pkg.rewards (ModuleNotFoundError: No module named 'no_such_thing')"),
        ("raise OSError('no disk')", "cannot import my_pkg.rewards (OSError: no disk)"),
        ("length = 3", "length is a int, not a function"),
        ("def length(): return []", "called as length(samples), which its signature does not allow"),
        ("def length(samples, at_most): return []", "its signature does not allow (missing a required argument"),
    ],
)
def test_a_function_that_cannot_be_had_is_an_error_when_rewards_are_built(package, text, message):
    config = package(text)
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        build_rewards(config)
    assert "rewards.terms.length.path=my_pkg.rewards:length" in str(refused.value)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (
            "1 / 0",
            r"rewards.terms.length \(my_pkg.rewards:length\) raised ZeroDivisionError at .*rewards.py:1: division",
        ),
        ("None", "returned a NoneType for 2 completions"),
        ("[0.0]", "returned a list of 1 for 2 completions"),
        ("'ab'", "returned a str"),
        ("[None, 0.0]", "returned None for a completion of q1: return a finite number"),
        ("[0.0, float('nan')]", "returned nan for a completion of q1"),
        ("[0.0, float('inf')]", "returned inf for a completion of q1"),
        ("['1', '0']", "returned '1' for a completion of q1"),
    ],
)
def test_anything_but_one_number_per_completion_is_an_error_that_names_the_reward(package, returned, message):
    config = package(f"def length(samples): return {returned}\n")
    with pytest.raises(RewardError, match=message):
        score(SAMPLES, config)


@pytest.mark.parametrize("path", ["my_pkg.rewards", "my_pkg/rewards.py:length", "my_pkg:a.b", ":length", "a b:c"])
def test_a_path_is_module_colon_function(path):
    with pytest.raises(ValueError, match="give module and function"):
        CustomTerm(weight=1.0, path=path)


@pytest.mark.parametrize("name", ["format", "total", "reward_mean", "Length", "a.b"])
def test_a_name_that_is_taken_or_no_word_is_refused(name):
    with pytest.raises(ValueError, match=r"taken by a shipped reward or metric|pattern"):
        RewardsConfig(terms={name: LENGTH})


def test_every_metric_of_rollouts_that_is_no_reward_is_a_name_that_is_taken():
    sources = [path.read_text() for path in Path(nemo_mapo.__file__).parent.rglob("*.py")]
    found = {name for text in sources for name in re.findall(r'"rollout/([a-z_]+)"', text)}
    assert found - {"accuracy", "format", "consistency"} <= TAKEN_NAMES


def test_a_recorded_config_names_no_code():
    config = RewardsConfig(terms={"length": LENGTH})
    assert list(config.terms) == ["length"] and list(config.without_code.terms) == []
    assert list(config.accuracy_only.terms) == ["accuracy"]


def test_the_shipped_example_prefers_completions_as_short_as_their_clips_allow(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(nemo_mapo.__file__).parents[1] / "examples"))
    term = {"type": "custom", "path": "own_rewards:brief", "weight": 0.5, "arguments": {"seconds_per_token": 0.1}}
    reward = build_rewards(RewardsConfig(terms={"brief": term}))["brief"]
    cut = RewardSample(text="", example=EXAMPLE, finished=False, num_tokens=1)
    # 2 s of audio allow 20 tokens.
    assert list(reward([*SAMPLES, cut])) == [1.0, 0.5, 0.0]
