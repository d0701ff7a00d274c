"""What the house test reads: our sources as trees, and who imports and uses what."""

import ast
import re
from functools import cache

from hallulib.files import project_root
from hallulib.stages import PACKAGE

ROOT = project_root()
MODULES = sorted(PACKAGE.rglob("*.py"))


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
    """Local name -> dotted origin, for all that a file imports from us, also inside functions."""
    names = {}
    for node in walk(path, ast.ImportFrom):
        if (node.module or "").split(".")[0] == "hallulib":
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in walk(path, ast.Import):
        ours = [alias for alias in node.names if alias.name.split(".")[0] == "hallulib"]
        names |= {alias.asname or alias.name: alias.name for alias in ours}
    return names


def our_imports(path):
    """Our modules that a file imports."""
    origins = imported_names(path).values()
    found = {origin if find_file(origin) else origin.rpartition(".")[0] for origin in origins}
    return found - {name_of(path), ""}


def their_imports(path):
    """Top-level modules of others that a file imports."""
    found = {alias.name.split(".")[0] for n in walk(path, ast.Import) for alias in n.names}
    found |= {n.module.split(".")[0] for n in walk(path, ast.ImportFrom) if not n.level}
    return found - {"hallulib"}


def find_closure(files):
    """These files and all of ours that they import, however deep."""
    todo, found = list(files), set()
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            todo += filter(None, map(find_file, our_imports(path)))
    return found


def root_name(node):
    """The name that a chain of attributes and items starts from, or None: a for a.b[c].d."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


CHANGES = {"append", "add", "clear", "extend", "insert", "pop", "remove", "setdefault", "update"}


def find_foreign_changes(path):
    """Lines of a file that change something which lives in another module of ours."""
    ours = imported_names(path)
    changed = []
    for node in ast.walk(parse(path)):
        targets = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = [t for t in node.targets if isinstance(t, ast.Attribute | ast.Subscript)]
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target] if not isinstance(node.target, ast.Name) else []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            targets = node.args[:1] if node.func.id in ("setattr", "delattr") else []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            # Only a constant's own methods: `pairs.append` of a local list is nobody's business.
            holder = node.func.value
            last = holder.id if isinstance(holder, ast.Name) else getattr(holder, "attr", "")
            targets = [holder] if node.func.attr in CHANGES and last.isupper() else []
        changed += [node.lineno for target in targets if root_name(target) in ours]
    return changed


def is_docstring(node, parents):
    """Whether a constant stands alone as a statement."""
    return isinstance(parents.get(node), ast.Expr)


def strings(path):
    """The texts in a source file that are no docstrings."""
    parents = {c: node for node in ast.walk(parse(path)) for c in ast.iter_child_nodes(node)}
    found = [node for node in walk(path, ast.Constant) if not is_docstring(node, parents)]
    return [node.value for node in found if isinstance(node.value, str)]


def public_definitions(path):
    """Public functions and classes at the top of a file, less those a decorator registers."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in parse(path).body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            calls = [d.func for d in node.decorator_list if isinstance(d, ast.Call)]
            if not any(isinstance(call, ast.Attribute) for call in calls):
                yield node


def used_names(path):
    """Names that a file uses; an import alone is no use, and a function is none of itself."""
    used = set()
    for top in parse(path).body:
        nodes = list(ast.walk(top))
        names = {node.id for node in nodes if isinstance(node, ast.Name)}
        names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        used |= names - {getattr(top, "name", "")}
    return used | {word for text in strings(path) for word in re.findall(r"\w+", text)}


def calls_in_loops(path, module, function):
    """Lines on which `module.function(...)` is called inside a loop over lines."""
    loops = walk(path, ast.For, ast.While, ast.ListComp, ast.GeneratorExp, ast.DictComp)
    lines = [loop for loop in loops if "line" in ast.unparse(loop).lower()]
    return [
        call.lineno for loop in lines for call in ast.walk(loop) if is_call(call, module, function)
    ]


def is_call(node, module, function):
    """Whether a node is `module.function(...)`."""
    called = node.func if isinstance(node, ast.Call) else None
    return isinstance(called, ast.Attribute) and ast.unparse(called) == f"{module}.{function}"
