"""Adds audio tokens to a text LLM's tokenizer, and clips to its chat template."""

import json
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from nemo_mapo.data.tokenizer import ASSISTANT, AUDIO, AUDIO_END, AUDIO_START, END, PAD, SALM_AUDIO, USER
from nemo_mapo.models.modular_audio_gpt import PromptLayout

_CLIP: Final = "CLIP"
_WITH_CLIPS: Final = (
    "{%- set flat = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message.content is string or message.content is none -%}"
    "{%- set flat.messages = flat.messages + [message] -%}"
    "{%- else -%}"
    "{%- set turn = namespace(text='') -%}"
    "{%- for part in message.content -%}"
    "{%- set turn.text = turn.text + ('" + _CLIP + "' if part.type == 'audio' else part.text) -%}"
    "{%- endfor -%}"
    "{%- set flat.messages = flat.messages + [dict(message, content=turn.text)] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = flat.messages -%}"
)
"""Before a template that takes a message's content as text: clips become their placeholder."""
_PROBE: Final = "Probe"
SALM_TEMPLATES: Final = {
    "qwen": (
        "{%- for message in messages -%}"
        "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
    )
}
"""NeMo's prompt formats as chat templates."""


def with_audio_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Add the audio tokens, and turn tokens that the tokenizer lacks; returns the new ids.

    The chat template stays the decoder's and now accepts clips; the token with which it ends an answer becomes
    eos_token. Without a template, turns have the format of the embedded run.

    Raises:
        ValueError: a template whose answers do not end with a token at which generation can stop.
    """
    if tokenizer.chat_template is not None:
        return _with_template(tokenizer, [AUDIO_START, AUDIO, AUDIO_END])
    new = _added(tokenizer, [PAD, END, USER, ASSISTANT, AUDIO_START, AUDIO, AUDIO_END])
    tokenizer.pad_token, tokenizer.eos_token = PAD, END
    return new


def with_salm_tokens(tokenizer: PreTrainedTokenizerBase, prompt_format: str) -> list[int]:
    """Add the placeholder of NeMo's SALM, with the id that NeMo gives it, and format turns as its prompt format does.

    Returns the new ids.
    """
    tokenizer.chat_template = SALM_TEMPLATES[prompt_format]
    return _with_template(tokenizer, [SALM_AUDIO])


def with_layout_tokens(tokenizer: PreTrainedTokenizerBase, layout: PromptLayout) -> list[int]:
    """Add the placeholder, and lay turns out as NeMo's ModularAudioGPT was trained on them; returns the new ids.

    An answer ends with the tokenizer's eos_token. A system message is refused: NeMo's layout has no place for one.
    """
    bos = tokenizer.bos_token if layout.starts_with_bos else ""
    before, after, gap, clip, start = map(
        json.dumps, (layout.before, layout.after, layout.gap, SALM_AUDIO, str(bos or ""))
    )
    first = f"{clip} * message.content.count({clip}) + " if layout.clips_first else ""
    question = f"message.content.replace({clip}, '')" if layout.clips_first else "message.content"
    tokenizer.chat_template = (
        "{%- for message in messages -%}"
        "{%- if message.role == 'user' -%}"
        f"{{{{ {first}{start} + {before} + {question} + {after} }}}}"
        "{%- elif message.role == 'assistant' -%}"
        f"{{{{ {gap} + message.content + {json.dumps(str(tokenizer.eos_token))} }}}}"
        "{%- else -%}{{ raise_exception('this model has no system message') }}{%- endif -%}"
        "{%- endfor -%}"
    )
    return _with_template(tokenizer, [SALM_AUDIO])


def _with_template(tokenizer: PreTrainedTokenizerBase, clip: list[str]) -> list[int]:
    tokenizer.eos_token = _end_of_turn(tokenizer)
    lacks_padding = tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token
    new = _added(tokenizer, [*clip, *([PAD] if lacks_padding else [])])
    if lacks_padding:
        tokenizer.pad_token = PAD
    tokenizer.chat_template = _WITH_CLIPS.replace(_CLIP, "".join(clip)) + str(tokenizer.chat_template)
    return new


def _added(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> list[int]:
    before = len(tokenizer)
    # By position: whether to replace those that it has is called differently in transformers 4 and 5.
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)}, False)
    return list(range(before, len(tokenizer)))


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that the chat template puts behind an answer; a tokenizer's eos_token may be that of a document."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    rendered: Any = tokenizer.apply_chat_template(turns, tokenize=False)
    after = str(rendered).rpartition(_PROBE)[2].lstrip()
    control: set[str] = {token.content for token in tokenizer.added_tokens_decoder.values()}
    ends = [token for token in control if after.startswith(token)]
    if not ends:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r}: its chat template ends an answer with {after!r}, which begins with "
            "none of its added tokens; generation could not stop. Take the tokenizer of a chat model"
        )
    return max(ends, key=len)
