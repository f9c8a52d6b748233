"""Values as the command line reads them, YAML in files and behind flags; what is given twice is refused."""

from __future__ import annotations

from typing import IO, Any

import yaml


class OptionError(ValueError):
    """An unknown option, or a value that does not fit; one sentence."""


# Options whose value is one path or glob of records; by the library's names.
_FILES = ("train_file", "eval_file", "references", "reward_check")


def twice(name: str, first: str, second: str) -> OptionError:
    """The error for what is given a second time, where the last would win in silence.

    Args:
        name: the option or key, as it was written, behind its file where it has one. first, second: the values.
    """
    option = name.rpartition(" ")[2].lstrip("-").replace("-", "_")
    way = "; a glob takes several files ('data/*.jsonl')" if option in _FILES else ""
    return OptionError(f"{name}: expected once, got {first} and {second}{way}")


class _Loader(yaml.SafeLoader):
    """Of two entries with one key, YAML forbids the second and `yaml.SafeLoader` drops the first."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        found: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: dict[Any, yaml.Node] = {}
        for key, value in found.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue  # what `<<` brings is there to be overridden
            name = self.construct_object(key)
            if name in seen:
                raise twice(key.value, self._text(seen[name]), self._text(value))
            seen[name] = value
        return found

    def _text(self, node: yaml.Node) -> str:
        text = "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
        text = node.value if isinstance(node, yaml.ScalarNode) else text
        # A flag's value has one line, and no name.
        return f"{text} (line {node.start_mark.line + 1})" if self.name != "<unicode string>" else text


def read_mapping(path: str) -> dict[str, Any]:
    """What a YAML file holds; {} of an empty one.

    Raises:
        OptionError: no mapping, malformed YAML (line and column), a key twice in one mapping.
        OSError: the file cannot be read.
    """
    with open(path, encoding="utf-8") as file:
        try:
            found = _load(file)
        except OptionError as error:
            raise OptionError(f"{path}: {error}") from None
        except (yaml.YAMLError, ValueError) as error:  # a date or a number that is none is a bare ValueError
            raise OptionError(f"{path}: malformed YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict | None):
        raise OptionError(f"{path}: expected options as `name: value`, got {type(found).__name__}")
    return found or {}


def read_value(text: str, flag: str) -> Any:
    """A flag's value, as YAML where it is that, else as the text it is.

    Raises:
        OptionError: a mapping that has a key twice.
    """
    try:
        return _load(text)
    except OptionError as error:
        raise OptionError(f"{flag}: {error}") from None
    except (yaml.YAMLError, ValueError):  # "2024-13-45" is no date
        return text


def _load(source: str | IO[str]) -> Any:
    return yaml.load(source, _Loader)
