"""Tests that macOS and Windows cannot run, found by the system calls that their source uses.

Tests are written on Linux, where this module changes nothing. Elsewhere `conftest.py` skips a test whose source, the
fixtures and helpers of `tests/` included, uses a facility that the system does not have; the reason names it.
"""

import ast
import sys
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parent

#: Linux alone has these, or can use them safely: macOS aborts forked processes whose parent has threads.
LINUX = {
    "os.fork", "os.waitpid", "os.memfd_create", "processes.alive", "processes.children", "processes.descendants",
    "processes.left_behind", "/proc", "/dev/shm", "'fork'",
}  # fmt: skip
#: Linux and macOS have these, and Windows does not, or only for administrators.
POSIX = {
    "fcntl", "grp", "pty", "pwd", "resource", "os.getuid", "os.kill", "os.killpg", "os.mkfifo", "os.symlink", ".chmod",
    ".hardlink_to", ".symlink_to", "signal.SIGALRM", "signal.SIGCONT", "signal.SIGKILL", "signal.SIGSTOP",
    "signal.SIGTERM", "signal.SIGUSR1", "signal.alarm", "signal.pthread_kill", "processes.end", "processes.run",
    "processes.kill", "processes.started", "/dev/null", "/dev/zero", "'forkserver'",
}  # fmt: skip


#: As `sys.platform`.
PLATFORM = sys.platform


def missing_facilities(platform: str) -> set[str]:
    """Return the facilities that a system does not have."""
    if platform.startswith("linux"):
        return set()
    return LINUX | POSIX if platform == "win32" else LINUX


def importable(path: Path, platform: str | None = None) -> bool:
    """Return False for a module of tests whose first level uses a facility that the system does not have."""
    missing = missing_facilities(platform or PLATFORM)
    if not missing or not path.name.startswith("test_"):
        return True
    return not any(name in missing and not name.startswith("'") for name in _module(path).at_import)


def unmet(path: Path, function: str, platform: str | None = None) -> list[str]:
    """Return the facilities that a test uses and that the system does not have."""
    missing = missing_facilities(platform or PLATFORM)
    return sorted(used(path, function) & missing) if missing else []


def used(path: Path, function: str) -> set[str]:
    """Return the facilities that a test uses, itself or by its helpers and fixtures."""
    found: set[str] = set()
    seen, open_ = set(), [(path, function)]
    while open_:
        place = open_.pop()
        if place in seen:
            continue
        seen.add(place)
        module = _module(place[0])
        found |= module.facilities.get(place[1], set())
        open_ += module.references.get(place[1], ())
    return found


class _Module:
    """The definitions of a module: the facilities that each uses, and the definitions that it refers to.

    Attributes:
        facilities: the names of `LINUX` and `POSIX` in each definition.
        references: ``(file, definition)`` of `tests/` in each definition.
        at_import: the facilities of the first level, which are used when the module is imported.
    """

    def __init__(self, path: Path):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        self.facilities: dict[str, set[str]] = {}
        self.references: dict[str, list[tuple[Path, str]]] = {}
        self.at_import: set[str] = set()
        nodes: dict[str, list[ast.AST]] = {}
        names, modules = {}, {}
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tests":
                for alias in node.names:
                    file = TESTS.parent / Path(*(node.module or "").split("."), f"{alias.name}.py")
                    if file.exists():
                        modules[alias.asname or alias.name] = file
                    else:
                        names[alias.asname or alias.name] = (file.parent.with_suffix(".py"), alias.name)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                nodes.setdefault(node.name, []).append(node)
                self.at_import |= set().union(*map(_facilities, node.decorator_list))
                continue
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    nodes.setdefault(ast.unparse(target), []).append(node.value or node)
            self.at_import |= _facilities(node)
        names |= {name: (path, name) for name in nodes}
        for name, parts in nodes.items():
            self.facilities[name] = set().union(*map(_facilities, parts))
            self.references[name] = [r for part in parts for r in _references(part, names, modules)]


@cache
def _module(path: Path) -> _Module:
    return _Module(path)


def _facilities(node: ast.AST) -> set[str]:
    """Return the facilities in a piece of source: modules, their attributes, methods, and strings."""
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            found |= {alias.name for alias in part.names}
        elif isinstance(part, ast.ImportFrom):
            found.add(part.module or "")
        elif isinstance(part, ast.Attribute):
            found |= {f".{part.attr}", ast.unparse(part)}
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            found |= {f"'{part.value}'", *(name for name in ("/proc", "/dev/shm") if part.value.startswith(name))}
            found.add(part.value)
    return found & (LINUX | POSIX)


def _references(node: ast.AST, names: dict, modules: dict) -> list[tuple[Path, str]]:
    """Return the definitions of `tests/` that a piece of source names; a fixture is an argument."""
    found = []
    for part in ast.walk(node):
        name = part.id if isinstance(part, ast.Name) else part.arg if isinstance(part, ast.arg) else None
        if name in names:
            found.append(names[name])
        elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id in modules:
            found.append((modules[part.value.id], part.attr))
    # `processes` is written for what a system has; the facilities name those of its functions that need more.
    return [(file, definition) for file, definition in found if file.name != "processes.py"]
