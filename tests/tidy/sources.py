"""The product's own modules, as the tidy tests read them: parsed, never imported."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src"


@dataclass(frozen=True)
class Module:
    """One file. ``name`` is what is imported."""

    name: str
    path: Path
    text: str
    tree: ast.Module

    @property
    def docstring(self) -> str:
        return ast.get_docstring(self.tree) or ""

    def imports(self) -> Iterator[str]:
        """Every module named by an import, wherever in the file it stands; ``from x import y`` gives ``x.y`` too."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.name} imports relatively"
                yield str(node.module)
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def modules() -> tuple[Module, ...]:
    """All modules of the product, packages' own files among them."""
    found = []
    for path in sorted(SOURCES.rglob("*.py")):
        parts = path.relative_to(SOURCES).with_suffix("").parts
        text = path.read_text(encoding="utf-8")
        name = ".".join(parts).removesuffix(".__init__")
        found.append(Module(name, path, text, ast.parse(text)))
    assert len(found) > 50
    return tuple(found)
