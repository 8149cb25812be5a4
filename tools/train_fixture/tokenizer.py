"""The tokenizer and processor of the bundled model: byte-level BPE with single digits (llama.cpp's `smollm`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import Idefics3ImageProcessorPil, Idefics3Processor, PreTrainedTokenizerFast

from tools.train_fixture.design import PHASES, TILE, TOKENS_PER_TILE, VOCABULARY
from vlmexport.calibrate.synthetic import TRAIN_SEEDS, WORDS, scene

UNKNOWN: Final = "<|endoftext|>"
BOS: Final = "<|im_start|>"
PAD: Final = "<|im_end|>"
FAKE: Final = "<fake_token_around_image>"
IMAGE: Final = "<image>"
GLOBAL: Final = "<global-img>"
EOS: Final = "<end_of_utterance>"
ROW_COLUMN: Final = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
SPECIAL: Final = (UNKNOWN, BOS, PAD, FAKE, IMAGE, GLOBAL, EOS, *ROW_COLUMN)
# Tasks whose answers are spelled from what is seen; they must not become tokens of their own.
SPELLED: Final = frozenset({"word", "number", "code", "cell"})

# Any part that is not an image is text: llama.cpp replaces images by parts of another type that carry their marker
# as text, so both sides render the same prompt.
CHAT_TEMPLATE: Final = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def build_processor() -> Idefics3Processor:
    """Return the processor: tiles of `TILE` pixels, the longest edge two tiles, never an unsplit image.

    llama.cpp always splits (at least one tile plus the overview), so the setting avoids every size at which
    transformers would not.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
        padding_side="right",
    )
    image_processor = Idefics3ImageProcessorPil(
        do_image_splitting=True,
        size={"longest_edge": 2 * TILE},
        max_image_size={"longest_edge": TILE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return Idefics3Processor(image_processor, tokenizer, image_seq_len=TOKENS_PER_TILE, chat_template=CHAT_TEMPLATE)


def train_tokenizer() -> Tokenizer:
    """Train the BPE merges on questions and answers of the training seeds; exactly `VOCABULARY` tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise ValueError(f"the corpus gives {tokenizer.get_vocab_size()} tokens instead of {VOCABULARY}")
    if len(tokenizer.encode("\n\n").ids) != 1:
        raise ValueError('"\\n\\n" is not one token; llama.cpp looks it up as one')
    return tokenizer


def _corpus() -> Iterator[str]:
    for seed in TRAIN_SEEDS[:4000]:
        yield "\n\n"
        for question in scene(seed, PHASES[0].mix).questions:
            yield f"User:{question.text}"
            yield f"First image: {question.text} Second image:"
            yield "Assistant:" if question.task in SPELLED else f"Assistant:{question.answer}"
    yield from (" " + word.lower() for word in WORDS)
