"""YAML files of flags, read as they are typed: `010` stays 010, `no` stays no, 2e-5 is a number."""

import re

from rlhf.user_error import UserError

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def read_yaml(path: str) -> list[tuple[str, object, str]]:
    """The settings of a file, as (key, value, where): text, a list of texts, a dict, or None for null.

    Raises:
        UserError: for a file that cannot be read, is no mapping, or has a key twice.
    """
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            root = yaml.compose(file, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: {getattr(error, 'strerror', None) or 'it is no text in UTF-8'}") from error
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        raise UserError(f"{path}{f':{mark.line + 1}' if mark else ''}: no YAML: {problem or error}") from error
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"--config {path}: expected `flag: value` lines")
    found = {}
    for key, node in root.value:
        where, name = f"{path}:{key.start_mark.line + 1}", str(key.value)
        if name in found:
            raise UserError(f"{where}: {name} is there twice; keep one")
        try:
            found[name] = (name, _value(node, top=True), where)
        except RecursionError as error:
            raise UserError(f"{where}: {name} holds itself") from error
    return list(found.values())


def _value(node, top=False):
    """A node's value; at the top scalars stay text, inside of a dict they are what JSON would make of them."""
    if node.id == "sequence":
        return [_value(item, top) for item in node.value]
    if node.id == "mapping":
        return {str(key.value): _value(item) for key, item in node.value}
    kind = node.tag.rpartition(":")[2]
    if kind == "null":
        return None
    if top or node.style:
        return node.value
    if kind == "bool":
        return node.value.lower() in ("true", "yes", "on")
    if NUMBER.fullmatch(node.value):
        return float(node.value) if re.search("[.eE]", node.value) else int(node.value)
    return node.value
