"""MMAR (arXiv 2505.13032): the layout of MMAR-meta.json.

A few published answers are not among their choices (they name two, or are worded differently).
"""

from nemo_mapo.evaluation.benchmarks.items import Layout

LAYOUT = Layout(
    name="mmar",
    title="MMAR",
    fields={"audio": "audio_path", "prediction": "model_prediction"},
    groups=("modality", "category", "sub-category"),
    tables=(("modality",), ("category",), ("category", "sub-category")),
    sizes={"MMAR": 1000},
)
