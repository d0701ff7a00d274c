"""What the house test reads: our sources as trees, and who imports and uses what."""

import ast
import re
from functools import cache

from hallulib.files import project_root
from hallulib.stages import PACKAGE

ROOT = project_root()
MODULES = sorted(PACKAGE.rglob("*.py"))
CHANGES = {"append", "add", "clear", "extend", "insert", "pop", "remove", "setdefault", "update"}


@cache
def parse(path):
    """The syntax tree of a source file."""
    return ast.parse(path.read_text("utf-8"))


def walk(path, *kinds):
    """The nodes of these kinds in a source file."""
    return [node for node in ast.walk(parse(path)) if isinstance(node, kinds)]


def name_of(path):
    """hallulib.dpo.pairs for hallulib/dpo/pairs.py; hallulib.dpo for its __init__."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module):
    """The part of the house: "dpo" for hallulib.dpo.pairs."""
    return (module.split(".") + ["__init__"])[1]


def find_file(module):
    """The file of one of our modules, or None."""
    base = ROOT.joinpath(*module.split("."))
    found = [path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()]
    return found[0] if found else None


@cache
def imported_names(path):
    """Local name -> dotted origin, for all that a file imports, also inside functions."""
    froms = [(node.module or "", node) for node in walk(path, ast.ImportFrom)]
    names = {a.asname or a.name: f"{module}.{a.name}" for module, n in froms for a in n.names}
    return names | {a.asname or a.name: a.name for n in walk(path, ast.Import) for a in n.names}


def our_imports(path):
    """Our modules that a file imports."""
    ours = [name for name in imported_names(path).values() if name.split(".")[0] == "hallulib"]
    found = {name if find_file(name) else name.rpartition(".")[0] for name in ours}
    return found - {name_of(path), ""}


def their_imports(path):
    """Top-level modules of others that a file imports."""
    return {name.split(".")[0] for name in imported_names(path).values()} - {"hallulib"}


def find_closure(files):
    """These files and all of ours that they import, however deep."""
    todo, found = list(files), set()
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            todo += filter(None, map(find_file, our_imports(path)))
    return found


def find_foreign_changes(path):
    """Lines of a file that change something which lives in another module of ours."""
    origins, changed = imported_names(path), []
    ours = {name for name, origin in origins.items() if origin.startswith("hallulib")}
    for node in walk(path, ast.Attribute, ast.Subscript, ast.Call):
        target = None
        if not isinstance(node, ast.Call):
            target = None if isinstance(node.ctx, ast.Load) else node
        elif ast.unparse(node.func) in ("setattr", "delattr"):
            target = node.args[0]
        elif isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
            # Only a constant's own methods: `pairs.append` of a local list is nobody's business.
            constant = ast.unparse(node.func.value).rpartition(".")[2].isupper()
            target = node.func.value if constant else None
        if target and re.split(r"\W", ast.unparse(target))[0] in ours:
            changed.append(node.lineno)
    return changed


def strings(path):
    """The texts in a source file that are no docstrings."""
    alone = {id(node.value) for node in walk(path, ast.Expr)}
    found = [node.value for node in walk(path, ast.Constant) if id(node) not in alone]
    return [text for text in found if isinstance(text, str)]


def public_definitions(path):
    """Names of public functions and classes at the top of a file, less those that a decorator
    registers."""
    for node in parse(path).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            calls = [d.func for d in node.decorator_list if isinstance(d, ast.Call)]
            registered = any(isinstance(call, ast.Attribute) for call in calls)
            if not node.name.startswith("_") and not registered:
                yield node.name


def used_names(path):
    """Names that a file uses; an import alone is no use, and a function is none of itself."""
    used = set()
    for top in parse(path).body:
        names = {getattr(node, "id", getattr(node, "attr", "")) for node in ast.walk(top)}
        used |= names - {getattr(top, "name", "")}
    return used | {word for text in strings(path) for word in re.findall(r"\w+", text)}


def calls(path, *names):
    """The calls of these functions in a source file, as calls(path, "json.loads")."""
    return [node for node in walk(path, ast.Call) if ast.unparse(node.func) in names]
