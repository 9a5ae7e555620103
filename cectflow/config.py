"""Configurations: small, frozen, strict objects that read from and write to YAML and JSON."""

from __future__ import annotations

import hashlib
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

__all__ = ["Config", "find_named_file", "list_named_files"]


# Not Self: beartype, which checks annotations in tests, refuses it in a method decorated alone.
ConfigT = TypeVar("ConfigT", bound="Config")


class Config(BaseModel):
    """Base of every configuration: frozen, unknown keys refused, values never coerced.

    A configuration is written beside what it produced, so that every result carries its recipe;
    :meth:`digest` names it in that chain.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, ser_json_inf_nan="constants"
    )
    added_later: ClassVar[frozenset[str]] = frozenset()
    """Fields that earlier files lack: None is left out of the digest, which stays what it was."""

    @classmethod
    def from_json(cls: type[ConfigT], text: str, *, source: str = "JSON text") -> ConfigT:
        """Configuration read from JSON.

        Parameters
        ----------
        text
            A JSON object.
        source
            What to call the text in an error, usually its path.

        Raises
        ------
        ValueError
            If a key is unknown or missing, or a value is of another type or out of range. The
            message lists every fault with its place in the file, and the keys that are known
            where one is not.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            faults = "; ".join(_describe_fault(cls, fault) for fault in error.errors())
            msg = f"{source} is no valid {cls.__name__}: {faults}"
            raise ValueError(msg) from None

    @classmethod
    def from_yaml(cls: type[ConfigT], path: Path) -> ConfigT:
        """Configuration read from a YAML file.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If the file is not YAML or not a valid configuration.
        """
        try:
            content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            msg = f"{path} is not YAML: {error}"
            raise ValueError(msg) from None
        # Through JSON: there a list is the only way to write a tuple, so strictness stays. What
        # JSON lacks (dates) becomes text, which the fields then refuse.
        return cls.from_json(json.dumps(content, default=str), source=str(path))

    def to_json(self) -> str:
        """The configuration as indented JSON."""
        return self.model_dump_json(indent=2) + "\n"

    def to_yaml(self) -> str:
        """The configuration as YAML, keys in the order of their declaration."""
        content: Any = self.model_dump(mode="json")
        return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)

    def digest(self) -> str:
        """Hexadecimal sha256 of the canonical JSON (sorted keys, no white space)."""
        content = self.model_dump(mode="json")
        for name in sorted(self.added_later):
            if content[name] is None:
                del content[name]
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, for which 1e-3 is a number too, as in YAML 1.2."""


class _Dumper(yaml.SafeDumper):
    """Writes what :class:`_Loader` reads back: a text 1e-3 in quotes."""


for _class in (_Loader, _Dumper):
    # With a signed exponent only: 1e10 is a PDB entry.
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]\d+$"),
        list("-+0123456789"),
    )


def list_named_files(folder: str) -> tuple[str, ...]:
    """Names of the YAML files that cectflow brings in a package folder, sorted.

    Parameters
    ----------
    folder
        ``recipes`` or ``policies``.
    """
    root = resources.files("cectflow") / folder
    names = (Path(entry.name) for entry in root.iterdir())
    return tuple(sorted(name.stem for name in names if name.suffix == ".yaml"))


def find_named_file(name_or_path: str, folder: str) -> Path:
    """Path of a YAML file given by path, or by the name under which cectflow brings it.

    Parameters
    ----------
    name_or_path
        ``demo``, or the path of a file of one's own.
    folder
        ``recipes`` or ``policies``.

    Raises
    ------
    ValueError
        If it is neither; the message lists the known names.
    """
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"} and path.is_file():
        return path
    if name_or_path in list_named_files(folder):
        return Path(str(resources.files("cectflow") / folder / f"{name_or_path}.yaml"))
    kind = {"recipes": "recipe", "policies": "policy"}[folder]
    msg = (
        f"unknown {kind} {name_or_path!r}: expected the path of a .yaml file, or one of "
        f"{', '.join(list_named_files(folder))}"
    )
    raise ValueError(msg)


def _describe_fault(config: type[Config], fault: ErrorDetails) -> str:
    place, what = fault["loc"], fault["msg"].removeprefix("Value error, ")
    if not place:  # the whole text, which is not repeated here
        return f"file: {what}"
    given = f" (given {fault['input']!r})" if _is_scalar(fault["input"]) else ""
    where = ".".join(str(part) for part in place)
    if fault["type"] == "extra_forbidden":
        known = ", ".join(_known_keys(config, place[:-1]))
        return f"{where}: no such key{given}, expected one of {known}"
    return f"{where}: {what}{given}"


def _known_keys(config: type[Config], place: tuple[int | str, ...]) -> tuple[str, ...]:
    """Keys of the configuration at a place within another."""
    for part in place:
        if isinstance(part, str) and part in config.model_fields:  # not an index, nor a union's tag
            config = _config_in(config.model_fields[part].annotation) or config
    return tuple(config.model_fields)


def _config_in(annotation: object) -> type[Config] | None:
    """The configuration that an annotation such as ``Part | None`` names."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation
    inner = (_config_in(argument) for argument in get_args(annotation))
    return next((found for found in inner if found is not None), None)


def _is_scalar(value: object) -> bool:
    return isinstance(value, str | int | float | bool) or value is None
