"""One YAML file -> plain data, as a person means it: YAML 1.2's whole numbers, and no key twice."""

import re
from pathlib import Path
from typing import Any

_INT, _MERGE = "tag:yaml.org,2002:int", "tag:yaml.org,2002:merge"


def read_yaml(file: Path) -> Any:
    """What the file holds; JSON is YAML. Raises ValueError, with what is wrong and where, for all that cannot be read.

    To YAML 1.1, which the yaml package reads, the positions 4:20 are the number 260 and 010 is 8; of a key that is
    given twice it keeps the last.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key in (key for key, _ in node.value if isinstance(key.value, str) and key.tag != _MERGE):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    rules_of = yaml.SafeLoader.yaml_implicit_resolvers.items()
    Loader.yaml_implicit_resolvers = {first: [rule for rule in rules if rule[0] != _INT] for first, rules in rules_of}
    Loader.add_implicit_resolver(_INT, re.compile(r"^-?(?:0|[1-9][0-9]*)$"), list("-0123456789"))
    try:
        return yaml.load(file.read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{file} is not YAML: {error}") from error
