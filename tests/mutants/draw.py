"""Single faults drawn with a seed: small changes of the syntax tree where numbers are computed.

Never changed: docstrings, annotations, texts, what is raised, decorators, classes' fields, and the
`strict=` of `zip` (a check that never speaks where lengths agree).
"""

import ast
import copy
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from mutants.trial import ROOT, Mutant

# Each file with the tests that look at it, the most relevant first.
TESTS: dict[str, tuple[str, ...]] = {
    f"{file}.py": tuple(f"test_{name}.py" for name in tests.split())
    for file, tests in {
        "dpo/losses": "dpo_losses direct",
        "dpo/train": "direct lora finished",
        "dpo/reference": "direct",
        "dpo/filtered": "filtered",
        "rlhf/losses": "rlhf_losses ppo_equations ppo",
        "rlhf/ppo": "ppo ppo_equations ppo_passes invariants",
        "rlhf/rollout": "ppo ppo_passes finite_tasks invariants",
        "rlhf/reward": "reward ppo",
        "rlhf/best_of_n": "best_of_n",
        "shared/kl": "kl_and_logprobs rlhf_losses kl_meter",
        "shared/models/logprobs": "kl_and_logprobs packing cost",
        "shared/models/ops": "ops attention packing cpu generation",
        "shared/models/cost": "cost lora",
        "shared/models/sequences": "kl_and_logprobs packing models direct",
        "shared/models/packing": "packing kl_and_logprobs ops cost",
        "shared/models/attention": "attention packing",
        "shared/models/lora": "lora ppo_passes",
        "shared/cpu/kernels": "ops cpu packing lora",
        "shared/training/fit": "fit rlhf_losses direct ppo",
        "shared/training/finished": "finished lora direct",
        "shared/data/pairs": "preferences finite_tasks",
        "shared/data/preferences": "preferences finite_tasks",
        "shared/data/batches": "direct reward oracles",
        "shared/data/listing": "exact optimum infinite_data kl_meter",
        "shared/generation/hf": "generation packing best_of_n",
        "shared/generation/decoding": "generation packing",
        "benchmarks/evaluation/statistics": "statistics frontier control results",
        "benchmarks/evaluation/metrics": "metrics results",
        "benchmarks/evaluation/frontier": "frontier finite_tasks",
        "benchmarks/evaluation/optimum": "optimum finite_tasks",
        "benchmarks/evaluation/exact": "finite_tasks",
        "benchmarks/evaluation/evaluate": "kl_meter invariants finite_tasks pipeline",
        "benchmarks/results/methods": "results pipeline finite_tasks",
        "benchmarks/results/matched": "results pipeline",
        "benchmarks/results/limits": "results pipeline finite_tasks",
        "benchmarks/results/reward_model": "results pipeline",
        "benchmarks/results/costs": "results pipeline",
        "benchmarks/pipeline/compare": "pipeline plan",
    }.items()
}

ARITHMETIC = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
}
COMPARISON = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.GtE),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
SWAPPED = {
    "sum": "mean", "mean": "sum", "min": "max", "max": "min", "minimum": "maximum",
    "maximum": "minimum", "argmax": "argmin", "argmin": "argmax", "any": "all", "all": "any",
    "exp": "expm1", "expm1": "exp", "logsigmoid": "sigmoid", "ceil": "floor",
}  # fmt: skip
REMOVED = {
    "detach", "clamp", "abs", "masked_fill", "exp", "log", "sqrt", "softmax", "log_softmax",
    "sigmoid", "cumsum", "sort", "float", "double", "flip", "eval", "item", "mean", "var",
}  # fmt: skip
EITHER_WAY = {"minimum", "maximum", "min", "max", "transpose"}  # of two arguments
Change = tuple[ast.AST, ast.AST]  # a node, and what stands in its place


class Site(NamedTuple):
    """One possible change of one file."""

    file: str
    function: str
    kind: str
    text: str  # of the whole file, changed
    old: str  # the changed lines, on one
    new: str

    @property
    def name(self) -> str:
        """The change without its line number, so that a change elsewhere does not rename it."""
        return (
            f"{self.file} {self.function}: {self.new if self.new != 'pass' else f'no {self.old}'}"
        )


def drawn(seed: int, count: int) -> list[Mutant]:
    """`count` mutants, each site as likely as any other; the same for a seed and the same code.

    A change elsewhere in the code adds or removes sites and leaves the order of the rest. The few
    sites that share a name, where a line stands twice in a function, are left out.
    """

    def place(site: Site) -> str:
        return hashlib.sha256(f"{seed} {site.name} {site.kind}".encode()).hexdigest()

    every = every_site()
    names = Counter(site.name for site in every)
    alone = (site for site in sorted(every, key=place) if names[site.name] == 1)
    sound = (site for site in alone if parses(site.text))
    return [Mutant(s.name, s.file, s.text, TESTS[s.file]) for s in itertools.islice(sound, count)]


@cache
def every_site() -> list[Site]:
    """All changes of all files."""
    return [
        site for file in TESTS for site in sites(file, (ROOT / file).read_text(encoding="utf-8"))
    ]


def parses(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def line_of(mutant: Mutant) -> tuple[str, str]:
    """The lines that changed, before and after."""
    return difference((ROOT / mutant.file).read_text(encoding="utf-8"), mutant.text)


def sites(file: str, text: str) -> Iterator[Site]:
    """Every change of one file, whether it parses or not."""
    for function in (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)):
        for kind, (node, other) in changes(function):
            if ast.dump(node) == ast.dump(other):  # equal arguments, exchanged
                continue
            changed = replaced(text, node, other)
            yield Site(file, function.name, kind, changed, *difference(text, changed))


def changes(function: ast.FunctionDef) -> Iterator[tuple[str, Change]]:
    """Every change inside one function; inner functions are visited on their own."""
    for default in [*function.args.defaults, *function.args.kw_defaults]:
        if isinstance(default, ast.Constant):
            yield from (("default", (default, c)) for c in constants(default))
    known = {argument.arg for argument in ast.walk(function.args) if isinstance(argument, ast.arg)}
    for statement in function.body[1 if ast.get_docstring(function) else 0 :]:
        for node in meaning(statement):
            yield from deletions(node, known)
            yield from expressions(node)


def meaning(node: ast.AST) -> Iterator[ast.AST]:
    """`node` and what is below it, without annotations, inner functions and what is raised."""
    if isinstance(node, ast.FunctionDef):
        return
    yield node
    for name, value in ast.iter_fields(node):
        below = value if isinstance(value, list) else [value]
        text = isinstance(node, ast.Raise | ast.JoinedStr) or name in (
            "annotation",
            "decorator_list",
        )
        check = isinstance(node, ast.keyword) and node.arg == "strict"
        if not text and not check:
            for child in below:
                if isinstance(child, ast.AST):
                    yield from meaning(child)


def deletions(node: ast.AST, known: set[str]) -> Iterator[tuple[str, Change]]:
    """Statements that can go and leave every name bound."""
    gone = isinstance(node, ast.AugAssign | ast.Raise | ast.Break)
    gone |= isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    if isinstance(node, ast.Assign):
        names = {n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)
                 and isinstance(n.ctx, ast.Store)}  # fmt: skip
        gone |= names <= known
        known |= names
    if gone:
        yield "deleted", (node, ast.Pass())


def expressions(node: ast.AST) -> Iterator[tuple[str, Change]]:
    """What one expression could have been by mistake."""
    match node:
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in ARITHMETIC:
            yield "arithmetic", (node, with_(node, op=ARITHMETIC[type(op)]()))
        case ast.Compare(ops=[op]):
            for other in COMPARISON[type(op)]:
                yield "comparison", (node, with_(node, ops=[other()]))
        case ast.BoolOp(op=op):
            other = ast.Or() if isinstance(op, ast.And) else ast.And()
            yield "boolean", (node, with_(node, op=other))
        case ast.UnaryOp(operand=operand):
            yield "unary", (node, operand)
        case ast.IfExp(body=body, orelse=orelse):
            yield "branches", (node, with_(node, body=orelse, orelse=body))
        case ast.If(test=test) | ast.While(test=test):
            yield "condition", (test, ast.UnaryOp(ast.Not(), test))
        case ast.Constant():
            yield from (("constant", (node, other)) for other in constants(node))
        case ast.Call():
            yield from calls(node)


def constants(node: ast.Constant) -> Iterator[ast.Constant]:
    """Another number or truth value; texts and None stay."""
    if isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node.value, int):
        yield ast.Constant(node.value + 1)
        if node.value > 0:
            yield ast.Constant(node.value - 1)
    elif isinstance(node.value, float):
        yield ast.Constant(2 * node.value if node.value else 1.0)


def calls(node: ast.Call) -> Iterator[tuple[str, Change]]:
    """Another function, no function, other arguments."""
    name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
    if isinstance(node.func, ast.Name):
        name = node.func.id
    if name in SWAPPED and isinstance(node.func, ast.Attribute):
        yield "function", (node, with_(node, func=with_(node.func, attr=SWAPPED[name])))
    elif name in ("min", "max"):
        yield "function", (node, with_(node, func=ast.Name(SWAPPED[name], ast.Load())))
    if name in REMOVED and isinstance(node.func, ast.Attribute):
        module = isinstance(node.func.value, ast.Name) and node.func.value.id in (
            "np",
            "torch",
            "F",
        )
        if not module:
            yield "removed", (node, node.func.value)
        elif len(node.args) == 1:
            yield "removed", (node, node.args[0])
    plain = not any(isinstance(a, ast.Starred) for a in node.args)
    if plain and len(node.args) >= 2 and name not in EITHER_WAY:
        first, second, *rest = node.args
        yield "arguments", (node, with_(node, args=[second, first, *rest]))
    for keyword in node.keywords:
        if keyword.arg not in (None, "strict"):
            others = [k for k in node.keywords if k is not keyword]
            yield "keyword", (node, with_(node, keywords=others))


def with_(node: ast.AST, **fields: object) -> ast.AST:
    """A copy of `node` with other fields."""
    other = copy.copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


def replaced(text: str, node: ast.AST, other: ast.AST) -> str:
    """`text` with `other` written where `node` stands, in parentheses where they could matter."""
    lines = [line.encode() for line in text.splitlines(keepends=True)]  # columns count bytes
    start = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
    end = sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset
    written = ast.unparse(other)
    atom = ast.Name | ast.Constant | ast.Attribute | ast.Call | ast.Subscript | ast.stmt
    if not isinstance(other, atom):
        written = f"({written})"
    whole = b"".join(lines)
    return (whole[:start] + written.encode() + whole[end:]).decode()


def difference(text: str, changed: str) -> tuple[str, str]:
    """The lines that differ, before and after, each joined to one."""
    old, new = text.splitlines(), changed.splitlines()
    first = next(n for n, (a, b) in enumerate(zip(old, new, strict=False)) if a != b)
    pairs = zip(old[::-1], new[::-1], strict=False)
    last = next(n for n, (a, b) in enumerate(pairs) if a != b)
    before, after = old[first : len(old) - last], new[first : len(new) - last]
    return " ".join(map(str.strip, before)), " ".join(map(str.strip, after))
