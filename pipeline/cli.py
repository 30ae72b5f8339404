"""Command line and YAML to a frozen dataclass: the only file that knows OmegaConf."""

import difflib
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, cast, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

_TYPE_NAMES = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "true or false",
    float | None: "number or null",
    int | None: "integer or null",
    list[str]: "list of text",
}


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


Schema = TypeVar("Schema", bound=_Dataclass)


class ConfigError(Exception):
    """What was asked for is no configuration; the text is the line that the user reads."""


@dataclass(frozen=True)
class Key:
    """One leaf of a schema; `name` is its dotted path."""

    name: str
    kind: Any
    default: Any
    help: str


def load(schema: type[Schema], argv: Sequence[str]) -> Schema:
    """Merge schema <- each `--config FILE` <- each `key=value` into one object.

    Text arrives verbatim: nothing is interpolated, and on the command line nothing is unquoted.
    Other types are read as YAML reads them. Exits with status 2 and one line on stderr when a key,
    a type or a rule does not hold, and with status 0 after `--help`.
    """
    if "-h" in argv or "--help" in argv:
        sys.stdout.write(help_text(schema))
        raise SystemExit(0)
    try:
        return _merge(schema, argv)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None


def help_text(schema: type[Schema]) -> str:
    """Return what `--help` prints: every key by group, with its type, default and meaning."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    lines = [
        f"usage: {Path(sys.argv[0]).name} [--config FILE] [key=value ...]",
        "",
        *textwrap.wrap(_summary(schema), width),
        *textwrap.wrap(
            "Defaults give way to --config FILE (YAML; may be repeated), files to key=value.", width
        ),
    ]
    groups = _groups(schema)
    group = ""
    lines.append("")
    for key in _keys(schema).values():
        path = key.name.rpartition(".")[0]
        if path != group:
            group = path
            lines += ["", *textwrap.wrap(f"{group}: {_summary(groups[group])}", width)]
        head = f"{key.name} ({_TYPE_NAMES[key.kind]}; default {_shown(key.default)})"
        lines += textwrap.wrap(head, width, initial_indent="  ", subsequent_indent="    ")
        lines += textwrap.wrap(key.help, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines) + "\n"


def key_table(schema: type[Schema]) -> str:
    """Return the Markdown table of every key, as the README holds it."""
    rows = []
    for key in _keys(schema).values():
        # A bare bar would end the cell, a bare `<output>` be swallowed as an HTML tag.
        default = _shown(key.default).replace("|", r"\|")
        meaning = key.help.replace("|", r"\|").replace("<", r"\<")
        rows.append(f"| `{key.name}` | {_TYPE_NAMES[key.kind]} | `{default}` | {meaning} |")
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows])


def _merge(schema: type[Schema], argv: Sequence[str]) -> Schema:
    keys = _keys(schema)
    files, arguments = _sort(argv)
    settings = [
        *(pair for file in files for pair in _read_file(file, schema)),
        *(_read_argument(argument, schema) for argument in arguments),
    ]
    config = OmegaConf.structured(schema)
    for name, value in settings:
        try:
            # Frozen dataclasses become read-only nodes: merging copies, setting would be refused.
            config = OmegaConf.merge(config, _nested(name, _literal(keys[name], value)))
        except OmegaConfBaseException:
            raise _wrong_type(keys[name], value) from None
    try:
        return cast("Schema", OmegaConf.to_object(config))
    except MissingMandatoryValue as error:
        raise ConfigError(f"a key without a default is not set: {_first_line(error)}") from None
    except ValueError as error:  # a rule of the schema
        raise ConfigError(str(error)) from None


def _sort(argv: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Split the arguments into files of `--config` and `key=value` settings."""
    files, settings = [], []
    rest = iter(argv)
    for argument in rest:
        option, _, value = argument.partition("=")
        if option == "--config":
            path = value or next(rest, "")
            if not path:
                raise ConfigError("--config needs a file")
            files.append(Path(path))
        elif argument.startswith("-"):
            raise ConfigError(f"unknown option {option}; there are --config FILE and --help")
        else:
            settings.append(argument)
    return files, settings


def _read_file(path: Path, schema: type[Schema]) -> Iterator[tuple[str, Any]]:
    """Yield the settings of a YAML file, nested or dotted."""
    try:
        content = OmegaConf.load(path)
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--config {path} is not UTF-8 text") from None
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        line = f", line {place.line + 1}" if place else ""
        problem = getattr(error, "problem", None) or _first_line(error)
        raise ConfigError(f"--config {path} is not YAML{line}: {problem}") from None
    values = OmegaConf.to_container(content, resolve=False)
    if not isinstance(values, Mapping):
        raise ConfigError(f"--config {path} must hold keys and values")
    yield from _flatten(values, schema, "")


def _flatten(
    values: Mapping[Any, Any], schema: type[Schema], prefix: str
) -> Iterator[tuple[str, Any]]:
    keys, groups = _keys(schema), _groups(schema)
    for part, value in values.items():
        name = f"{prefix}{part}"
        if name in keys:
            yield name, value
        elif name in groups and (value is None or isinstance(value, Mapping)):
            yield from _flatten(value or {}, schema, f"{name}.")
        else:
            raise _no_such_key(name, schema)


def _read_argument(argument: str, schema: type[Schema]) -> tuple[str, Any]:
    name, separator, text = argument.partition("=")
    keys = _keys(schema)
    if not separator:
        raise ConfigError(f"expected key=value, got {argument!r}")
    if name not in keys:
        raise _no_such_key(name, schema)
    if keys[name].kind is str:
        return name, text
    try:
        return name, yaml.safe_load(text)
    except yaml.YAMLError:
        raise _wrong_type(keys[name], text) from None


def _literal(key: Key, value: Any) -> Any:
    """Return `value` so that OmegaConf takes it as it stands; refuse what it would turn into text.

    YAML reads an unquoted revision of digits as a number, and `1e10` would come back altered.
    """
    if value == "???":
        raise ConfigError(f"{key.name} cannot be '???': it is OmegaConf's sign for a missing value")
    if key.kind is str and not isinstance(value, str):
        raise ConfigError(f"{key.name} must be text, got {value!r}: put it in quotes")
    if key.kind == list[str]:
        if not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise _wrong_type(key, value)
        return [_escaped(item) for item in value]
    if isinstance(value, str):
        if key.kind is not str and "${" in value:  # no interpolation here either
            raise _wrong_type(key, value)
        return _escaped(value)
    return value


def _escaped(text: str) -> str:
    """Return `text` with OmegaConf's interpolation switched off: `${` and backslashes before it."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def _nested(name: str, value: Any) -> dict[str, Any]:
    for part in reversed(name.split(".")):
        value = {part: value}
    return cast("dict[str, Any]", value)


def _keys(schema: type[_Dataclass], prefix: str = "") -> dict[str, Key]:
    """Return every leaf of `schema` by its dotted name, in the order of the source."""
    keys: dict[str, Key] = {}
    kinds = get_type_hints(schema)
    for item in fields(schema):
        name, kind = f"{prefix}{item.name}", kinds[item.name]
        if is_dataclass(kind):
            keys |= _keys(cast("type[_Dataclass]", kind), f"{name}.")
        else:
            default = item.default if item.default_factory is MISSING else item.default_factory()
            keys[name] = Key(name, kind, default, item.metadata.get("help", ""))
    return keys


def _groups(schema: type[_Dataclass], prefix: str = "") -> dict[str, type[_Dataclass]]:
    """Return every nested dataclass of `schema` by its dotted name."""
    groups: dict[str, type[_Dataclass]] = {}
    kinds = get_type_hints(schema)
    for item in fields(schema):
        name, kind = f"{prefix}{item.name}", kinds[item.name]
        if is_dataclass(kind):
            groups[name] = cast("type[_Dataclass]", kind)
            groups |= _groups(groups[name], f"{name}.")
    return groups


def _shown(default: Any) -> str:
    """Return a default as one would write it after `key=`."""
    if isinstance(default, str):
        return default or '""'
    if isinstance(default, list):
        return f"[{', '.join(default)}]"
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return "none: it must be set" if default is MISSING else str(default)


def _summary(schema: type[_Dataclass]) -> str:
    return (schema.__doc__ or "").partition("\n")[0]


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _wrong_type(key: Key, value: Any) -> ConfigError:
    name = _TYPE_NAMES[key.kind]
    article = "" if name.startswith(("text", "true")) else "an " if name[0] in "aeiou" else "a "
    example = ", like [a,b]" if key.kind == list[str] else ""
    got = "null" if value is None else repr(value)
    return ConfigError(f"{key.name} must be {article}{name}{example}, got {got}")


def _no_such_key(name: str, schema: type[Schema]) -> ConfigError:
    names = list(_keys(schema))
    if name in _groups(schema):
        members = ", ".join(key for key in names if key.startswith(f"{name}."))
        return ConfigError(f"{name} is a group of keys: {members}")
    last = {known.rpartition(".")[2]: known for known in names}
    word = name.rpartition(".")[2]
    near = (
        ([last[word]] if word in last else [])
        or difflib.get_close_matches(name, names, n=1)
        or [last[match] for match in difflib.get_close_matches(word, last, n=1)]
    )
    hint = f"did you mean {near[0]}?" if near else "--help lists them all"
    return ConfigError(f"unknown key {name}; {hint}")
