"""The configuration that ships with the checkpoints of tests/model/remote."""

from typing import Any, ClassVar

from transformers import LlamaConfig, PreTrainedConfig


class OwnConfig(PreTrainedConfig):
    """A text model of transformers and a tower of our own; `shape` says which interface the model imitates."""

    model_type = "own_vlm"
    sub_configs: ClassVar = {"text_config": LlamaConfig}

    def __init__(
        self, text_config: Any = None, image_token_id: int | None = None, vision: int = 32, **more: Any
    ) -> None:
        self.text_config = LlamaConfig(**text_config) if isinstance(text_config, dict) else text_config or LlamaConfig()
        self.image_token_id = image_token_id
        self.vision = vision
        super().__init__(**more)
