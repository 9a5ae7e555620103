"""Exported torch programs as files: :func:`check_program` tells whether one is safe to load.

``torch.export.load`` runs code that a crafted file brings along (read in torch 2.13): it unpickles
weights, constants and example inputs, evaluates ``guards_code`` and the text of symbolic shapes as
Python, and looks up any attribute of torch as an operator, ``torch.os.system`` included. MLflow's
own check (3.17) looks at the pickles only. So here everything is refused that is not known to be
harmless; what cectflow exports passes. torch is not imported.
"""

from __future__ import annotations

import ast
import io
import json
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["check_program"]

MAX_TEXT = 64 << 20
"""Bytes of the largest JSON record that is read: hundreds of times that of our networks."""

RECORDS = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/(?:version|serialization_id)"
    r"|models/model\.json|data/sample_inputs/model\.pt"
    r"|data/(?:weights/(?:weight_\d+|model_weights_config\.json)"
    r"|constants/(?:tensor_\d+|model_constants_config\.json))"
)
CHECKPOINT_RECORDS = re.compile(
    r"data\.pkl|byteorder|version|\.format_version|\.storage_alignment|data/\d+"
    r"|\.data/serialization_id"
)
GLOBALS = {"torch._utils _rebuild_tensor_v2", "collections OrderedDict"}
STORAGE = re.compile(r"torch [A-Z][A-Za-z0-9]*Storage")
IMPORTING = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "BUILD", "EXT1", "EXT2", "EXT4"}
"""Pickle instructions that call or import, besides GLOBAL and REDUCE; tensors need none."""

OPERATOR = re.compile(
    r"torch\.ops\.aten\.(?!(?:save|from_file)\.)(?:[A-Za-z][A-Za-z0-9_]*|_[a-z][a-z0-9_]*"
    r"|__(?:and|or|xor)__)\.[A-Za-z][A-Za-z0-9_]*"
    r"|_operator\.(?:add|sub|mul|floordiv|truediv|mod|neg|pow|eq|ne|lt|le|gt|ge|and_|or_|getitem)"
    r"|torch\.sym_[a-z]+|math\.(?:ceil|floor|trunc)"
)
"""Without the two operators that open files by name."""
FREE_TEXT = {"stack_trace", "nn_module_stack", "torch_fn", "source_fn_stack"}
"""Of ``metadata``, which torch keeps for messages."""
TEXT = re.compile(r"[\w.+-]*", re.ASCII)
STRING_ARGUMENT = re.compile(r"[\w.+>, -]*", re.ASCII)
CONTAINERS = {"builtins.tuple", "builtins.list", "builtins.dict", None}

SHAPE_NAMES = {
    "Symbol", "Integer", "Mul", "Add", "Pow", "Max", "Min", "Rational", "true", "false",
    "Eq", "Ne", "Equality", "Unequality", "GreaterThan", "LessThan", "StrictGreaterThan",
    "StrictLessThan", "FloorDiv", "ModularIndexing", "Where", "PythonMod", "Mod", "CleanDiv",
    "CeilToInt", "FloorToInt", "CeilDiv", "IntTrueDiv", "PowByNatural", "L", "inf",
}  # fmt: skip
SHAPE_NODES = (
    ast.Expression, ast.Call, ast.Name, ast.Load, ast.Constant, ast.keyword, ast.BinOp, ast.UnaryOp,
    ast.BoolOp, ast.Compare, ast.Subscript, ast.Attribute, ast.operator, ast.unaryop, ast.boolop,
    ast.cmpop,
)  # fmt: skip


def check_program(path: Path) -> None:
    """Refuse a ``model.pt2`` that holds anything which torch would run as code.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        Naming the record and what is wrong with it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check_archive(archive)
    except zipfile.BadZipFile:
        msg = f"{path} is no exported torch program: expected the archive of torch.export.save"
        raise ValueError(msg) from None
    except _UnsafeError as error:
        msg = (
            f"{path} is refused, since loading it could run code: {error}; cectflow reads no "
            f"pickles, and programs only as torch.export.save writes them: export the network again"
        )
        raise ValueError(msg) from None


class _UnsafeError(Exception):
    """What in an archive is not known to be harmless."""


def _check_archive(archive: zipfile.ZipFile) -> None:
    records = _records(archive, RECORDS)
    if "models/model.json" not in records:
        msg = "it holds no models/model.json"
        raise _UnsafeError(msg)
    for kind, prefix in (("weights", "weight_"), ("constants", "tensor_")):
        _check_payload(archive, records, kind, prefix)
    _check_graph(_read_json(archive, records, "models/model.json"))
    if "data/sample_inputs/model.pt" in records:
        _check_checkpoint(archive.read(records["data/sample_inputs/model.pt"]))


def _records(
    archive: zipfile.ZipFile, known: re.Pattern[str], *, where: str = ""
) -> dict[str, zipfile.ZipInfo]:
    """Records by name without their common folder; none unknown, compressed or there twice."""
    records: dict[str, zipfile.ZipInfo] = {}
    folders = {info.filename.partition("/")[0] for info in archive.infolist()}
    for info in archive.infolist():
        name = info.filename.partition("/")[2]
        if len(folders) != 1 or not known.fullmatch(name) or name in records:
            msg = f"record {where}{info.filename!r} is unknown, or there twice"
            raise _UnsafeError(msg)
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            msg = f"record {where}{info.filename!r} is compressed or encrypted"
            raise _UnsafeError(msg)
        records[name] = info
    return records


def _read_json(archive: zipfile.ZipFile, records: dict[str, zipfile.ZipInfo], name: str) -> Any:
    info = records.get(name)
    if info is None:
        msg = f"it holds no {name}"
        raise _UnsafeError(msg)
    if info.file_size > MAX_TEXT:
        msg = f"{name} has {info.file_size} bytes, at most {MAX_TEXT} are read"
        raise _UnsafeError(msg)
    try:
        return json.loads(archive.read(info))
    except (ValueError, RecursionError):
        msg = f"{name} is no JSON"
        raise _UnsafeError(msg) from None


def _check_payload(
    archive: zipfile.ZipFile, records: dict[str, zipfile.ZipInfo], kind: str, prefix: str
) -> None:
    """Every tensor is raw bytes, none a pickle."""
    name = f"data/{kind}/model_{kind}_config.json"
    content = _read_json(archive, records, name)
    entries = content.get("config") if isinstance(content, dict) else None
    if not isinstance(entries, dict):
        msg = f"{name} has no table `config`"
        raise _UnsafeError(msg)
    for tensor, entry in entries.items():
        stored = entry.get("path_name") if isinstance(entry, dict) else None
        is_raw = isinstance(stored, str) and stored.startswith(prefix)
        is_raw = is_raw and f"data/{kind}/{stored}" in records
        if not is_raw or entry.get("use_pickle") is not False:
            msg = f"{name}: {tensor!r} is a pickle or not in the file"
            raise _UnsafeError(msg)


def _check_checkpoint(content: bytes) -> None:
    """Example inputs: the one pickle that torch.export.save writes; it may build tensors only."""
    name = "data/sample_inputs/model.pt"
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            # TorchScript has a record constants.pkl, which torch.load would take for its own.
            records = _records(archive, CHECKPOINT_RECORDS, where=f"{name}: ")
            if "data.pkl" not in records:
                msg = f"{name} is a pickle"
                raise _UnsafeError(msg)
            instructions = list(pickletools.genops(archive.read(records["data.pkl"])))
    except (zipfile.BadZipFile, ValueError):
        msg = f"{name} is a pickle"
        raise _UnsafeError(msg) from None
    for instruction, argument, _ in instructions:
        known = argument in GLOBALS or STORAGE.fullmatch(str(argument))
        if instruction.name in IMPORTING or (instruction.name == "GLOBAL" and not known):
            msg = f"the pickle {name} asks for {argument or instruction.name}"
            raise _UnsafeError(msg)


def _check_graph(content: Any) -> None:
    for key, text in _texts(content):
        if key in FREE_TEXT:
            continue
        if key == "target":
            harmless = OPERATOR.fullmatch(text) is not None
        elif key in {"expr_str", "guards_code"}:
            harmless = _is_shape_arithmetic(text)
        elif key in {"in_spec", "out_spec"}:
            harmless = _is_plain_tree(text)
        else:
            harmless = (STRING_ARGUMENT if key == "as_string" else TEXT).fullmatch(text) is not None
            # The bounds of sizes are kept under keys such as 4*s34.
            harmless = harmless or (key == "key" and _is_shape_arithmetic(text))
        if not harmless:
            msg = f"models/model.json: {key} is {text[:100]!r}"
            raise _UnsafeError(msg)


def _texts(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text of a JSON document below its key; keys are texts as well."""
    pending = [(key, content)]
    while pending:
        key, value = pending.pop()
        if isinstance(value, str):
            yield key, value
        elif isinstance(value, list):
            pending += [(key, each) for each in value]
        elif isinstance(value, dict):
            for name, each in value.items():
                yield "key", name
                pending.append((name, each))


def _is_shape_arithmetic(text: str) -> bool:
    """Whether a text computes with sizes of the inputs and nothing else."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return all(_is_arithmetic_node(node) for node in ast.walk(tree))


def _is_arithmetic_node(node: ast.AST) -> bool:
    if isinstance(node, ast.Name):
        return node.id in SHAPE_NAMES or re.fullmatch(r"[a-z]\d+", node.id) is not None
    if isinstance(node, ast.Attribute):
        return node.attr in {"size", "stride"}
    if isinstance(node, ast.Constant):
        is_name = isinstance(node.value, str) and node.value.isidentifier()
        return is_name or isinstance(node.value, int | float)
    return isinstance(node, SHAPE_NODES)


def _is_plain_tree(text: str) -> bool:
    """Whether inputs and outputs are arranged in tuples, lists and dictionaries only."""
    try:
        pending = [json.loads(text)]
    except (ValueError, RecursionError):
        return False
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            known = {"type", "context", "children_spec"} >= set(value)
            if not known or value.get("type") not in CONTAINERS:
                return False
            pending += [value.get("children_spec"), value.get("context")]
        elif isinstance(value, list):
            pending += value
        elif isinstance(value, str) and not re.fullmatch(r'[\w", \[\]]*', value, re.ASCII):
            return False
    return True
