"""adapter_config.json: what peft's file says of an adapter, whatever its method.

What only one method knows (`r`, `lora_alpha`, `oft_block_size`, ...) is in `data`, which that method reads.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_build.errors import SourceError
from lora_build.files.formats.json_object import parse_object

CONFIG_NAME = "adapter_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """An adapter_config.json.

    Attributes:
        peft_type: PEFT's name of the method, such as LORA.
        data: all that the file says.
    """

    peft_type: str
    data: Mapping[str, Any]

    @classmethod
    def parse(cls, text: str, where: str = CONFIG_NAME) -> "AdapterConfig":
        """Return the config of a text.

        Raises:
            SourceError: it is no JSON object, or names no method; says `where`.
        """
        data = parse_object(text, where)
        peft_type = data.get("peft_type")
        if not isinstance(peft_type, str):
            raise SourceError(f"{where}: has no peft_type")
        return cls(peft_type=peft_type, data=data)

    @property
    def task_type(self) -> str | None:
        """The task that it was trained for, such as SEQ_CLS, which says what head its model has."""
        found = self.data.get("task_type")
        return found if isinstance(found, str) else None

    @property
    def trained_class(self) -> str | None:
        """The class of transformers that it was trained as, which peft notes where there is no task."""
        noted = self.data.get("auto_mapping")
        if not isinstance(noted, dict) or not str(noted.get("parent_library")).startswith("transformers."):
            return None
        name = str(noted.get("base_model_class"))
        return name if name.isidentifier() and not name.startswith("_") else None

    @property
    def saved_modules(self) -> tuple[str, ...]:
        """The names of modules that were trained and saved whole (`modules_to_save`)."""
        return tuple(str(name) for name in self.data.get("modules_to_save") or ())

    @property
    def layer_replication(self) -> Any:
        """The ranges of the base's layers that its model is made of, as they are written; None for the base's own."""
        return self.data.get("layer_replication") or None

    @property
    def keeps_ties(self) -> bool:
        """Whether training changed alike all modules that share a tensor (`ensure_weight_tying`)."""
        return bool(self.data.get("ensure_weight_tying"))
