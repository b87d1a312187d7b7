"""A recipe's file as its author wrote it: its comments, its spelling of numbers, and its keys by line."""

from __future__ import annotations

import contextlib
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from .read import find_recipe, load_yaml, read_tree

INDICATORS = ("|", ">")  # that a text over several lines begins with
WIDTH = 120  # of a line, where a mapping is written as {a: 1, b: 2}


@dataclass
class Entry:
    """What stands under a key: `inner` of a mapping, else `text`, the value as it is spelt in the file."""

    text: str = ""
    inner: dict[str, Entry] | None = None
    flow: bool = False  # a mapping in braces
    above: list[str] = field(default_factory=list)  # comments on lines of their own before the key
    beside: str = ""  # the comment behind the value


def standalone(path: Path, kind: str) -> str:
    """The text of a recipe's file with all that it extends merged in, and the comments of all these files.

    Where a value is replaced, the comment that stood behind it goes with it.
    """
    files = _line(path, kind)
    if len(files) == 1:
        return path.read_text()
    heads: list[str] = []
    merged, base = Entry(inner={}), ""
    for file in reversed(files):
        text = file.read_text()
        head = _head(text)
        heads = [*head, *([f"# {file.stem} extends {base}, which is merged in here:"] if base else []), *heads]
        merged, base = _laid(merged, _entry(text, text.splitlines(), yaml.compose(text), len(head))), file.stem
    assert merged.inner is not None
    merged.inner.pop("extends", None)
    body = "".join(f"{line}\n" for line in [*heads, *_lines(merged.inner, "")])
    wanted = read_tree(path, kind)
    with contextlib.suppress(yaml.YAMLError):
        if yaml.safe_load(body) == wanted:
            return body
    # Anchors and other rare YAML: right values without the comments between them.
    return "".join(f"{line}\n" for line in heads) + yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True)


def repeated_keys(path: Path) -> list[str]:
    """Keys that stand twice in a mapping of the file: YAML takes the last of them and says nothing."""
    return [key for key, times in _counted(yaml.compose(path.read_text())).items() if times > 1]


def _line(path: Path, kind: str) -> list[Path]:
    """The file, the one that it extends, and so on."""
    base = load_yaml(path).get("extends")
    return [path, *(_line(find_recipe(str(base), kind), kind) if base else [])]


def _counted(node: yaml.Node | None, where: str = "") -> dict[str, int]:
    """How often each dotted key stands in the mappings below a node."""
    counts: dict[str, int] = {}
    if not isinstance(node, yaml.MappingNode):
        return counts
    for key, value in node.value:
        name = f"{where}{key.value}"
        counts[name] = counts.get(name, 0) + 1
        counts |= _counted(value, f"{name}.")
    return counts


def _head(text: str) -> list[str]:
    """The lines of comment that a file opens with."""
    lines = text.splitlines()
    return lines[: next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))]


def _entry(text: str, lines: list[str], node: yaml.Node | None, head: int) -> Entry:
    """What a node of the file is. head: lines that the file opens with, which are no key's comment."""
    if node is None:  # a file of comments alone
        return Entry(inner={})
    if not isinstance(node, yaml.MappingNode):
        return Entry(_spelt(text, node))
    inner = {}
    for key, value in node.value:
        entry = inner[_spelt(text, key)] = _entry(text, lines, value, head)
        if not node.flow_style:
            entry.above, entry.beside = _above(lines, key.start_mark.line, head), _beside(lines, key, value)
        if entry.flow:
            entry.above += re.findall(r"\s(#.*)$", _spelt(text, value), re.M)
    return Entry(inner=inner, flow=bool(node.flow_style))


def _spelt(text: str, node: yaml.Node) -> str:
    """The value as the file has it, without the comments that follow it on lines of their own."""
    column, spelt = node.start_mark.column, text[node.start_mark.index : node.end_mark.index].rstrip()
    if getattr(node, "style", None) in ("|", ">"):  # of a text over lines the first has its indicator alone
        indicator, _, words = spelt.partition("\n")
        return f"{indicator}\n{textwrap.dedent(words)}"
    lines = (" " * column + spelt).splitlines()
    while len(lines) > 1 and (not lines[-1].strip() or lines[-1].lstrip().startswith("#")):
        lines.pop()
    return textwrap.dedent("\n".join(lines))


def _above(lines: list[str], at: int, head: int) -> list[str]:
    first = at
    while first > head and lines[first - 1].lstrip().startswith("#"):
        first -= 1
    return [line.strip() for line in lines[first:at]]


def _beside(lines: list[str], key: yaml.Node, value: yaml.Node) -> str:
    mark = key.end_mark if _is_block(value) else value.end_mark
    comment = re.match(r"[:\s]*(#.*)", lines[mark.line][mark.column :]) if mark.line < len(lines) else None
    return comment[1] if comment else ""


def _is_block(node: yaml.Node) -> bool:
    """Whether it is a list or a mapping that is written over lines, key by key."""
    return isinstance(node, yaml.CollectionNode) and not node.flow_style


def _laid(base: Entry, over: Entry) -> Entry:
    """`over` laid on `base`, mapping by mapping, as `merge` does it."""
    above = over.above or base.above
    if base.inner is None or over.inner is None:
        return Entry(over.text, over.inner, over.flow, above, over.beside)
    inner = dict(base.inner)
    for key, entry in over.inner.items():
        inner[key] = _laid(inner[key], entry) if key in inner else entry
    return Entry("", inner, over.flow and (base.flow or not base.inner), above, over.beside or base.beside)


def _lines(entries: dict[str, Entry], indent: str) -> Iterator[str]:
    for name, entry in entries.items():
        yield from (indent + comment for comment in entry.above)
        start, behind = f"{indent}{name}:", f"  {entry.beside}" if entry.beside else ""
        if (line := _on_one_line(entry, len(start) + 1)) is not None:
            yield f"{start} {line}".rstrip() + behind
            continue
        if entry.inner is not None:
            yield start + behind
            yield from _lines(entry.inner, indent + "  ")
            continue
        text = entry.text if entry.text.startswith(INDICATORS) else f"\n{entry.text}"
        first, _, rest = text.partition("\n")
        yield f"{start} {first}".rstrip() + behind
        yield from textwrap.indent(rest, indent + "  ").splitlines()


def _on_one_line(entry: Entry, before: int = 0) -> str | None:
    """The value behind `before` characters; None where it is written over lines, or does not fit on one."""
    if entry.inner is None:
        return None if entry.text.startswith(("- ", *INDICATORS)) else " ".join(entry.text.split("\n"))
    inner = {k: _on_one_line(e) for k, e in entry.inner.items() if not e.above and not e.beside}
    if not entry.flow or len(inner) < len(entry.inner) or None in inner.values():
        return None
    line = "{" + ", ".join(f"{name}: {text}" for name, text in inner.items()) + "}"
    return line if before + len(line) <= WIDTH else None
