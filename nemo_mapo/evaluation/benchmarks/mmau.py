"""MMAU, test-mini and test (arXiv 2410.19168): the layout of mmau-test-mini.json and mmau-test.json.

The answers of the test split are withheld: its file has empty ones.
"""

from nemo_mapo.evaluation.benchmarks.items import Layout

LAYOUT = Layout(
    name="mmau",
    title="MMAU",
    fields={"audio": "audio_id", "prediction": "model_prediction"},
    groups=("task", "difficulty", "category", "sub-category"),
    tables=(("task",), ("difficulty",), ("category",), ("category", "sub-category")),
    sizes={"test-mini": 1000, "test": 9000},
)
