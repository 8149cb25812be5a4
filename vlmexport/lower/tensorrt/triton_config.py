"""Triton's ``config.pbtxt``: the messages of its ``ModelConfig`` that the repository uses, written and read strictly.

Names, numbers and types follow ``model_config.proto`` of triton-inference-server/common; a test compares them with the
protobuf of ``tritonclient``. What is not listed here is refused on reading, as is what Triton itself would refuse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from vlmexport.errors import ArtifactError
from vlmexport.manifest import TensorSpec

# numpy dtype name -> Triton's, with its number.
TYPES: dict[str, tuple[str, int]] = {
    "bool": ("TYPE_BOOL", 1),
    "uint8": ("TYPE_UINT8", 2),
    "int8": ("TYPE_INT8", 6),
    "int32": ("TYPE_INT32", 8),
    "int64": ("TYPE_INT64", 9),
    "float16": ("TYPE_FP16", 10),
    "float32": ("TYPE_FP32", 11),
}
ENUMS: dict[str, tuple[tuple[str, int], ...]] = {
    "DataType": (("TYPE_INVALID", 0), *TYPES.values()),
    "Kind": (("KIND_AUTO", 0), ("KIND_GPU", 1), ("KIND_CPU", 2), ("KIND_MODEL", 3)),
}
# message -> (number, name, type); * marks lists, map<> maps from strings.
MESSAGES: dict[str, tuple[tuple[int, str, str], ...]] = {
    "ModelInput": ((1, "name", "string"), (2, "data_type", "DataType"), (4, "dims", "int64*"), (8, "optional", "bool")),
    "ModelOutput": ((1, "name", "string"), (2, "data_type", "DataType"), (3, "dims", "int64*")),
    "ModelInstanceGroup": ((2, "count", "int32"), (4, "kind", "Kind"), (5, "profile", "string*")),
    "ModelParameter": ((1, "string_value", "string"),),
    "Step": (
        (1, "model_name", "string"),
        (2, "model_version", "int64"),
        (3, "input_map", "map<string>"),
        (4, "output_map", "map<string>"),
    ),
    "ModelEnsembling": ((1, "step", "Step*"),),
    "StrategyDirect": (),
    "ModelSequenceBatching": ((1, "max_sequence_idle_microseconds", "uint64"), (3, "direct", "StrategyDirect")),
    "ModelConfig": (
        (1, "name", "string"),
        (2, "platform", "string"),
        (4, "max_batch_size", "int32"),
        (5, "input", "ModelInput*"),
        (6, "output", "ModelOutput*"),
        (7, "instance_group", "ModelInstanceGroup*"),
        (8, "default_model_filename", "string"),
        (13, "sequence_batching", "ModelSequenceBatching"),
        (14, "parameters", "map<ModelParameter>"),
        (15, "ensemble_scheduling", "ModelEnsembling"),
        (17, "backend", "string"),
    ),
}
_PACKAGE = "vlmexport_triton"
_FIELD = descriptor_pb2.FieldDescriptorProto
_SCALARS: dict[str, Any] = {
    "string": _FIELD.TYPE_STRING,
    "int64": _FIELD.TYPE_INT64,
    "int32": _FIELD.TYPE_INT32,
    "uint64": _FIELD.TYPE_UINT64,
    "bool": _FIELD.TYPE_BOOL,
}


def model_config(**fields: Any) -> Any:
    """A ``ModelConfig`` message of `fields`; lists and maps of messages are given as dicts."""
    return _message_class()(**fields)


def tensor(spec: TensorSpec) -> dict[str, Any]:
    """An input or output of a configuration: symbolic sizes are -1, the batch axis is one like the others.

    Raises `ArtifactError` for a dtype that Triton has no name for, and for scalars, which it does not take.
    """
    if spec.dtype not in TYPES or not spec.dims:
        raise ArtifactError(f"{spec.name} is {spec.dtype} {list(spec.dims)}, which Triton's configuration cannot say")
    dims = [d if isinstance(d, int) else -1 for d in spec.dims]
    return {"name": spec.name, "data_type": TYPES[spec.dtype][1], "dims": dims}


def parameters(values: Mapping[str, str]) -> dict[str, Any]:
    """Named strings for a model's own code."""
    return {name: _message_class("ModelParameter")(string_value=value) for name, value in values.items()}


def config_text(config: Any) -> str:
    """A ``ModelConfig`` as the text of ``config.pbtxt``."""
    return str(text_format.MessageToString(config))


def read_config(text: str, origin: str) -> Any:
    """Parse ``config.pbtxt``; raises `ArtifactError`, naming `origin` and the line, for what the messages lack."""
    try:
        return text_format.Parse(text, _message_class()())
    except text_format.ParseError as error:
        raise ArtifactError(f"{origin}:{str(error).splitlines()[0]}") from error


def described(tensors: Sequence[Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and dims of the inputs or outputs of a configuration, by name."""
    names = {number: name for name, number in ENUMS["DataType"]}
    return {t.name: (names[t.data_type], tuple(t.dims)) for t in tensors}


@cache
def _message_class(name: str = "ModelConfig") -> Any:
    pool = _pool()
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}"))


@cache
def _pool() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name=f"{_PACKAGE}.proto", package=_PACKAGE, syntax="proto3")
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for value, number in values:
            enum.value.add(name=value, number=number)
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, field, kind in fields:
            _add_field(message, number, field, kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool


def _add_field(message: Any, number: int, name: str, kind: str) -> None:
    repeated = kind.endswith("*") or kind.startswith("map<")
    label = _FIELD.LABEL_REPEATED if repeated else _FIELD.LABEL_OPTIONAL
    if kind.startswith("map<"):
        entry = message.nested_type.add(name=f"{name.title().replace('_', '')}Entry")
        entry.options.map_entry = True
        _add_field(entry, 1, "key", "string")
        _add_field(entry, 2, "value", kind[4:-1])
        path = f".{_PACKAGE}.{message.name}.{entry.name}"
        message.field.add(name=name, number=number, label=label, type=_FIELD.TYPE_MESSAGE, type_name=path)
        return
    base = kind.removesuffix("*")
    if base in _SCALARS:
        message.field.add(name=name, number=number, label=label, type=_SCALARS[base])
        return
    what = _FIELD.TYPE_ENUM if base in ENUMS else _FIELD.TYPE_MESSAGE
    message.field.add(name=name, number=number, label=label, type=what, type_name=f".{_PACKAGE}.{base}")
