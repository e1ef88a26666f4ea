"""MMAR (arXiv 2505.13032): the layout of MMAR-meta.json and, since 2026-02, MMAR-meta.jsonl.

In the first a few answers are not among their choices; in the second four items have an empty choice.
"""

from nemo_mapo.evaluation.benchmarks.items import Layout

LAYOUT = Layout(
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
