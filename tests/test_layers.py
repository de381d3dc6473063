"""A room of the package imports only rooms below it; what it names in strings (registries) it does not know."""

import ast
from pathlib import Path

import ibkit

PACKAGE = Path(ibkit.__file__).parent
# Lowest first. Rooms of one line do not import each other.
LAYERS = (
    ("errors",),
    ("fields", "progress"),
    ("registry", "device"),
    ("runs",),
    ("pocket.world",),
    ("pocket.draw",),
    ("model",),
    ("adapt",),
    ("data",),
    ("scorers",),
    ("train",),
    ("methods",),
    ("presets",),
    ("evaluate",),
    ("experiments",),
    ("report",),
    ("pocket.build",),
    ("shell",),
    ("params",),
    ("job",),
    ("cli",),
    ("__main__",),
)
ORDER = {room: i for i, rooms in enumerate(LAYERS) for room in rooms}


def room_of(module: str) -> str | None:
    """The longest room that a module of the package lies in; None for the package itself and its namespaces."""
    parts = module.removeprefix("ibkit").strip(".").split(".")
    names = [".".join(parts[:n]) for n in (2, 1)]
    return next((name for name in names if name in ORDER), None)


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, module) of every import of the package in a file, inside of functions too, but for type checkers only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ibkit"):
            found += [(node.lineno, f"{node.module}.{name.name}") for name in node.names]
        elif isinstance(node, ast.Import):
            found += [(node.lineno, name.name) for name in node.names if name.name.startswith("ibkit.")]
    return found


def test_imports_flow_down():
    wrong, rooms = [], set()
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        own = room_of(module)
        rooms.add(own)
        for line, imported in imports(path):
            other = room_of(imported)
            if own and other and own != other and ORDER[other] >= ORDER[own]:
                wrong.append(f"{path.relative_to(PACKAGE)}:{line} imports {imported}: {other} is not below {own}")
    assert not wrong, "\n" + "\n".join(wrong)
    assert rooms - {None} == ORDER.keys()  # every room is there, and every module but the package's own lies in one


def test_no_file_is_too_long_to_read():
    """The drawing of the pocket world is one long list of shapes."""
    files = sorted(PACKAGE.rglob("*.py"))
    lengths = {path.relative_to(PACKAGE).as_posix(): len(path.read_text().splitlines()) for path in files}
    assert {name: n for name, n in lengths.items() if n > 450 and name != "pocket/draw.py"} == {}
