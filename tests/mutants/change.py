"""A mistake as a pattern of syntax and what it becomes: names around it may change, it is found.

A pattern is an expression or a statement. `_a`, `_b`, ... stand for any expression, the same one
wherever the same letter stands, in what it becomes too. In a call `...` stands for all arguments
that are not named. `pass` in a call's place drops the statement. Of C the text counts, without
its spaces.
"""

import ast
import re
from collections.abc import Iterator
from typing import Any

from mutants.draw import replaced, with_

ANY = re.compile("_[a-z]")
REST = "..."  # the key of a call's other arguments
Found = dict[str, Any]


def changed(text: str, where: str, old: str, new: str) -> str:
    """`text` with `old` become `new` in the function `where` (`Class.method`; "": anywhere).

    ValueError unless there is just one such place.
    """
    pattern, other = parsed(old), parsed(new)
    places = [(node, found) for node in scope(text, where) if (found := match(pattern, node))]
    if len(places) != 1:
        raise ValueError(f"`{old}` is found {len(places)} times in {where}, must be once")
    node, found = places[0]
    return replaced(text, node, filled(other, found))


def parsed(pattern: str) -> ast.AST:
    """An expression, or another statement."""
    (statement,) = ast.parse(pattern).body
    return statement.value if isinstance(statement, ast.Expr) else statement


def scope(text: str, where: str) -> Iterator[ast.AST]:
    """What stands in a function or method, inner ones included."""
    top: ast.AST = ast.parse(text)
    for name in filter(None, where.split(".")):
        inner = [n for n in ast.walk(top) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        named = [n for n in inner if n.name == name]
        if len(named) != 1:
            raise ValueError(f"{where}: `{name}` is found {len(named)} times, must be once")
        top = named[0]
    return ast.walk(top)


def match(pattern: Any, node: Any, known: Found | None = None) -> Found | None:
    """What the letters of `pattern` stand for in `node`, with what was `known`; else None."""
    known = {"": None} if known is None else known  # never empty, so that it counts as true
    if isinstance(pattern, ast.Name) and ANY.fullmatch(pattern.id):
        if not isinstance(node, ast.expr):
            return None
        before = known.setdefault(pattern.id, node)
        return known if shape(before) == shape(node) else None
    if isinstance(pattern, list):
        if not isinstance(node, list) or len(pattern) != len(node):
            return None
        parts = zip(pattern, node, strict=True)
        return known if all(match(a, b, known) for a, b in parts) else None
    if not isinstance(pattern, ast.AST):
        return known if pattern == node else None
    if type(pattern) is not type(node) or isinstance(pattern, ast.expr_context):
        return known if isinstance(pattern, ast.expr_context) else None
    if isinstance(pattern, ast.Call) and any(is_rest(a) for a in pattern.args):
        return match_call(pattern, node, known)
    fields = ((getattr(pattern, f), getattr(node, f)) for f in pattern._fields)
    return known if all(match(a, b, known) for a, b in fields) else None


def match_call(pattern: ast.Call, node: ast.Call, known: Found) -> Found | None:
    """A call of which only some arguments are named."""
    first = [a for a in pattern.args if not is_rest(a)]
    by_name = {k.arg: k.value for k in node.keywords}
    named = {k.arg: k.value for k in pattern.keywords}
    if len(node.args) < len(first) or not named.keys() <= by_name.keys():
        return None
    pairs = [(pattern.func, node.func), *zip(first, node.args, strict=False)]
    pairs += [(value, by_name[name]) for name, value in named.items()]
    known[REST] = node.args[len(first) :], [k for k in node.keywords if k.arg not in named]
    return known if all(match(a, b, known) for a, b in pairs) else None


def filled(pattern: Any, found: Found) -> Any:
    """`pattern` with what its letters stand for."""
    if isinstance(pattern, list):
        return [filled(part, found) for part in pattern]
    if isinstance(pattern, ast.Name) and pattern.id in found:
        return found[pattern.id]
    if not isinstance(pattern, ast.AST):
        return pattern
    if isinstance(pattern, ast.Call) and any(is_rest(a) for a in pattern.args):
        args, keywords = found[REST]
        first = [a for a in pattern.args if not is_rest(a)]
        pattern = with_(pattern, args=[*first, *args], keywords=[*pattern.keywords, *keywords])
    return with_(pattern, **{f: filled(getattr(pattern, f), found) for f in pattern._fields})


def is_rest(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is ...


def shape(node: ast.AST) -> str:
    """A node without its place, and whether it is read or written."""
    return re.sub(r"(Load|Store|Del)\(\)", "", ast.dump(node))


def changed_c(text: str, where: str, old: str, new: str) -> str:
    """The same of C: the text `old` in the function `where`, its spaces left out of account."""
    begins = re.search(rf"^(?!}}|/\*)[^\n;]*\b{where}\((?=[^;{{]*\{{)", text, re.MULTILINE)
    if begins is None:
        raise ValueError(f"`{where}` is not found")
    end = text.index("\n}\n", begins.start())
    body = text[begins.start() : end]
    tokens = re.findall(r"\w+|[^\w\s]", old)
    found = [*re.finditer(r"\s*".join(map(re.escape, tokens)), body)]
    if len(found) != 1:
        raise ValueError(f"`{old}` is found {len(found)} times in {where}, must be once")
    (place,) = found
    body = body[: place.start()] + new + body[place.end() :]
    return text[: begins.start()] + body + text[end:]
