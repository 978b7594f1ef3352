"""Counts the package: `python tests/counts.py [FOLDER]`, of this checkout or of another one's."""

import ast
import statistics
import sys
from pathlib import Path

ROOT = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent / "dlf_ray")


def annotated(function):
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    every += [each for each in (arguments.vararg, arguments.kwarg) if each]
    typed = all(each.annotation or each.arg in ("self", "cls") for each in every)
    return typed and function.returns is not None


def share(part, whole):
    return f"{len(list(part))} of {len(whole)} ({len(list(part)) / len(whole):.0%})"


files = {path: path.read_text() for path in sorted(ROOT.rglob("*.py"))}
lines = {path: text.count("\n") for path, text in files.items()}
nodes = [node for text in files.values() for node in ast.walk(ast.parse(text))]
functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
sizes = sorted(node.end_lineno - node.lineno + 1 for node in functions)
public = [node for node in functions if not node.name.startswith("_")]

print(f"{len(files)} files, {sum(lines.values())} lines")
print(f"lines of a file: median {statistics.median(lines.values()):.0f}, largest", end=" ")
largest = sorted(lines, key=lambda path: -lines[path])[:5]
print(", ".join(f"{path.relative_to(ROOT)} {lines[path]}" for path in largest))
print(f"files above 500 lines: {sum(count > 500 for count in lines.values())}")
print(f"lines of a function: median {statistics.median(sizes):.0f}", end=", ")
print(f"p95 {sizes[int(0.95 * len(sizes))]}, longest {sizes[-1]}")
print("annotated functions:", share([node for node in functions if annotated(node)], functions))
for title, group in (("public functions", public), ("classes", classes)):
    print(f"{title} with a docstring:", share([n for n in group if ast.get_docstring(n)], group))
