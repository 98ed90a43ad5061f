"""
Keeps copies equal. The scripts are single files that run when copied alone, so what they share stands in each of them:
above a function, class or constant that is a copy there is the line

    # Copied from train_dreambooth_lipschitz.py

`python utils/copies.py` fails where a copy differs from its source, or where two scripts have the same text
without the line; `python utils/copies.py --write`, part of `make style`, copies again. Comments right above the source
are part of it.
"""

import argparse
import ast
import re
import sys
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).parents[1]
MARK = re.compile(r"# Copied from (\S+\.py)")


class Block(NamedTuple):
    """A statement of a module with the comments right above it: its first line, the one after its last, its text."""

    first: int
    end: int
    text: str
    source: str | None = None


def names_of(node: ast.stmt) -> str | None:
    """What a statement defines: a function, a class, the names that it assigns to. Of an `if` its condition."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return node.name
    if isinstance(node, ast.Assign):
        return ", ".join(ast.unparse(target).strip("()") for target in node.targets)
    if isinstance(node, ast.If) and "__name__" not in ast.unparse(node.test):
        return f"if {ast.unparse(node.test)}"
    return None


def blocks(code: str) -> dict[str, Block]:
    """The definitions of a module by name; that of a constant in several statements goes on to the last of them."""
    lines, found = code.splitlines(), {}
    for node in ast.parse(code).body:
        name = names_of(node)
        if isinstance(node, ast.AugAssign) and ast.unparse(node.target) in found:
            name = ast.unparse(node.target)
            first, source = found[name].first, found[name].source
        elif name is None:
            continue
        else:
            first = min([node.lineno, *(line.lineno for line in getattr(node, "decorator_list", []))]) - 1
            source = None
            while first and lines[first - 1].startswith("#") and source is None:
                first -= 1
                mark = MARK.fullmatch(lines[first])
                source = mark and mark[1]
        text = lines[first : node.end_lineno]
        found[name] = Block(first, node.end_lineno, "\n".join(text[1:] if source else text), source)
    return found


def update(code: str, sources: dict[str, str]) -> tuple[str, list[str]]:
    """The module with its copies made anew, and what was wrong with them."""
    known = {name: blocks(text) for name, text in sources.items()}
    lines, wrong = code.splitlines(), []
    for name, block in reversed(blocks(code).items()):
        if block.source is None:
            same = [file for file, there in known.items() if name in there and there[name].text == block.text]
            wrong += [f"{name} is the same as in {file}: put `# Copied from {file}` above it" for file in same]
        elif name not in known.get(block.source, {}):
            wrong.append(f"{name} is said to be copied from {block.source}, which has none")
        elif known[block.source][name].text != block.text:
            wrong.append(f"{name} differs from {block.source}")
            lines[block.first + 1 : block.end] = known[block.source][name].text.splitlines()
    return "\n".join(lines) + "\n", wrong[::-1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares what the scripts share.")
    parser.add_argument("--write", action="store_true", help="Update copies that differ from their source.")
    write = parser.parse_args().write
    paths = sorted([*ROOT.glob("*.py"), *ROOT.glob("examples/*/*.py")])
    modules = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    sources = {mark for code in modules.values() for mark in re.findall(rf"(?m)^{MARK.pattern}$", code)}
    faults = []
    for name, code in modules.items():
        others = {source: modules.get(source, "") for source in sources if source != name}
        copied, wrong = update(code, others if MARK.search(code) else {})
        if write and copied != code:
            (ROOT / name).write_text(copied, encoding="utf-8")
            wrong = update(copied, others)[1]
        faults += [f"{name}: {line}" for line in wrong]
    if faults:
        sys.exit("\n".join([*faults, "" if write else "`make style` copies again."]).strip())


if __name__ == "__main__":
    main()
