"""Run in vLLM's environment: give a tiny Qwen Omni directory the processor that vLLM reads it with.

`python make_processor.py DIR FAMILY`; the parts for sight are never used.
"""

import json
import sys
from pathlib import Path

from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5OmniProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3OmniMoeProcessor,
    WhisperFeatureExtractor,
)

directory, family = Path(sys.argv[1]), sys.argv[2]
audio = {"audio_token": "<|audio|>", "audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>"}
unseen = ("image_token", "video_token", "vision_bos_token", "vision_eos_token")
tokenizer = PreTrainedTokenizerFast(
    tokenizer_file=str(directory / "tokenizer.json"),
    eos_token="<|end|>",
    pad_token="<|pad|>",
    unk_token="<|unknown|>",
    extra_special_tokens=audio | dict.fromkeys(unseen, "<|user|>"),
)
classes = {"qwen2_5_omni": Qwen2_5OmniProcessor, "qwen3_omni_moe": Qwen3OmniMoeProcessor}
kept = (directory / "preprocessor_config.json").read_text()
tokenizer.save_pretrained(directory)
classes[family](
    image_processor=Qwen2VLImageProcessor(),
    video_processor=Qwen2VLVideoProcessor(),
    feature_extractor=WhisperFeatureExtractor.from_pretrained(directory),
    tokenizer=tokenizer,
    chat_template="{{ messages }}",
).save_pretrained(directory)
(directory / "preprocessor_config.json").write_text(kept)
# Fields of the published configs that transformers' class does not write.
config = json.loads((directory / "config.json").read_text())
config["thinker_config"]["vision_config"] |= {"image_size": 32, "apply_vit_abs_pos_embed": True}
(directory / "config.json").write_text(json.dumps(config))
