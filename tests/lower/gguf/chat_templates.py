"""Chat templates in the manner of published vision-language models: each hands images over in a way of its own."""

from __future__ import annotations

from tests.tiny import CHAT_TEMPLATE
from vlmexport.demo import model_dir
from vlmexport.lower.gguf.template import ImagePlace

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
IMAGE = ImagePlace("<image>")

# SmolVLM, Idefics3: what follows the role depends on whether an image comes first; strings are not known at all.
FIRST_PART = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# Qwen2-VL: strings and parts, special tokens around the image token.
STRINGS_AND_PARTS = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' or 'image' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Gemma 3: trims texts, refuses turns that do not alternate; its processor writes line breaks around images.
TRIMMED = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] if messages[0]['content'] is string -%}
    {%- set first_user_prefix = (first_user_prefix or messages[0]['content'][0]['text']) + '\\n\\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- else -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""
# LLaVA 1.5: all images of a message before its texts, wherever they stand.
IMAGES_FIRST = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% else %}{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
BUNDLED = (model_dir() / "chat_template.jinja").read_text(encoding="utf-8")

# name -> (template, what it writes for an image, whether llama.cpp needs a rewrite)
TEMPLATES: dict[str, tuple[str, ImagePlace, bool]] = {
    "bundled": (BUNDLED, IMAGE, False),
    "tiny": (CHAT_TEMPLATE, IMAGE, True),
    "first part": (FIRST_PART, IMAGE, True),
    "strings and parts": (STRINGS_AND_PARTS, ImagePlace("<|vision_start|><|image_pad|><|vision_end|>"), False),
    "trimmed": (TRIMMED, ImagePlace("<start_of_image>", "\n\n", "\n\n"), True),
    "images first": (IMAGES_FIRST, IMAGE, True),
}
