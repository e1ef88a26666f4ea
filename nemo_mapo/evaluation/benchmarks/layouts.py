"""The layouts of published benchmarks' files, and of your own questions, by name."""

from nemo_mapo.evaluation.benchmarks import own
from nemo_mapo.evaluation.benchmarks.items import Layout

_REVISED = "2025-05-15"
"""v05.15.25 corrected questions and answers: scores before and after it are not comparable."""
_TEST_MINI = {
    "9f18fda99f8dbc2bc5ecd6323fb5063309f54969810b5c6f1caeb3b8d904cf1c": "2025-08-09",
    "3940399a013d5f6d528ad4f5d1701cce29cdb5b19ccd4e6ab2800e0665dd6ac9": "2025-06-23",
    "5c63fe8f2de12e848be146e48436567c2022fe84ea0012da560003c30a24b2b7": "2025-06-23",
    "0bbabee60dcbd76815948394ac2dd31c41d18ab1215fe6fd6f93e0e510f78d7a": "2025-05-30",
    "e0042de8b99492539b0a17997b6c12fff90a6d42a47ad5fd8801c80dcb52b405": "2025-05-24",
    "157f1968a686c9e7ffb3669e13296349af72afe78af19c049e5d459ccb59d402": "2025-05-22",
    "cc59d9e3fad1a675f311f341b53b05079b94e735e5bc8992ac881ebeda2976f5": "2025-05-19",
    "cafecebbb4e48b9eb83fd88916911a853245379812e08f118984510340b2dc5b": "2025-05-18",
    "ea9f3f53085a2dfcf9ea7f5b2fca76a6634cd212af084bbb4cd8bf22c8903537": "2025-05-16",
    "9da96f00e43890adfbac3628b7b0dab3a32a6d6ec2d0a800b892ee261d35b818": "2025-05-16",
    "d35ec10bc3097fc605661b0eed00a487da74a6e7d9e23736567312c632347400": "2025-05-15",
    "e8cc09223b497191781756212cb616315690aaa6ea7ac359db1b65d97d1e2433": "2025-03-25",
    "ed2fd6b6c24ebec1a5a496de5d767e7ebfe79556044d8f0d8bd00ad0cf02d623": "2025-01-28",
    "850c2794664d53c1f7e7e2bcf35744b9ab4e60debad2156d67efd6956220affa": "2024-12-09",
    "1b6d31d0b70c2944a064a5de0147435427af0bcd3167eff175daa8bd5321e9d3": "2024-10-29",
    "a5006730ccb3fbf1fc72016774413b9b4a596bb00ce8f37796d9d30979b46192": "2024-10-25",
    "bef649e4bdeb436779a929ccdb9caa3f5144899bd087fc05e23065268ba888cc": "2024-10-23",
}
"""Day on which a mmau-test-mini.json with this SHA-256 was published in the benchmark's repository."""

_MMAU = Layout(
    name="mmau",
    title="MMAU",
    fields={"audio": "audio_id", "prediction": "model_output"},
    groups=("task", "difficulty", "category", "sub-category"),
    tables=(("task",), ("difficulty",), ("category",), ("category", "sub-category")),
    sizes={"test-mini": 1000, "test": 9000},
    other_predictions=("model_prediction",),
    versions={
        digest: f"test-mini of {date}, {'v05.15.25 or later' if date >= _REVISED else 'before v05.15.25'}"
        for digest, date in _TEST_MINI.items()
    },
    string_match=True,
)
"""MMAU, test-mini and test (arXiv 2410.19168); the answers of the test split are withheld: its file has empty ones."""

_MMAR = Layout(
    name="mmar",
    title="MMAR",
    fields={"audio": "audio_path", "prediction": "answer_prediction"},
    groups=("modality", "category", "sub-category"),
    tables=(("modality",), ("category",), ("category", "sub-category")),
    sizes={"MMAR": 1000},
    other_predictions=("model_prediction",),
    versions={
        "1c9a343e7bebf1037482b935c54eacd43cc63df7b2c668724b5560caf1f84fad": "of 2026-02-16, with rubrics",
        "7240ecca11b252c782ef44d4d19f711dd9b8424656a2bc3f92c548e318d25cee": "of 2025-05-11",
    },
    string_match=True,
)
"""MMAR (arXiv 2505.13032): MMAR-meta.json, in which a few answers are not among their choices, and since 2026-02
MMAR-meta.jsonl, in which four items have an empty choice."""

_MMSU = Layout(
    name="mmsu",
    title="MMSU",
    fields={"audio": "audio_path", "answer": "answer_gt", "prediction": "response"},
    choices=("choice_a", "choice_b", "choice_c", "choice_d"),
    groups=("category", "sub-category", "sub-sub-category", "task_name"),
    tables=(
        ("category",),
        ("category", "sub-category"),
        ("category", "sub-category", "sub-sub-category"),
        ("task_name",),
    ),
    sizes={"MMSU": 5000},
)
"""MMSU (arXiv 2506.04779): one field per choice; two-choice questions are padded with null, in any position."""

_MMAU_PRO = Layout(
    name="mmau_pro",
    title="MMAU-Pro",
    fields={
        "audio": "audio_path",
        "prediction": "model_output",
        "part": "category",
        "rule": "task_identifier",
        "arguments": "kwargs",
    },
    groups=("category", "length_type", "perceptual_skills", "reasoning_skills"),
    tables=(("part",), ("category",), ("length_type",), ("perceptual_skills",), ("reasoning_skills",)),
    sizes={"test": 5305},
    parts={"open": "open", "instruction following": "instruction"},
)
"""MMAU-Pro (arXiv 2508.13992): closed, instruction-following and open-ended questions about one or several clips."""

LAYOUTS = {layout.name: layout for layout in (_MMAU, _MMAR, _MMSU, _MMAU_PRO, own.LAYOUT)}
