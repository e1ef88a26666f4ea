"""MMAU-Pro (arXiv 2508.13992): closed, instruction-following and open-ended questions about one or several clips."""

from nemo_mapo.evaluation.benchmarks.items import Layout

LAYOUT = Layout(
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
