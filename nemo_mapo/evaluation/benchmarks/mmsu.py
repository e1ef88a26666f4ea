"""MMSU (arXiv 2506.04779): one field per choice; two-choice questions are padded with null, in any place."""

from nemo_mapo.evaluation.benchmarks.items import Layout

LAYOUT = Layout(
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
