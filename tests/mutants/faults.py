"""The small faults that are put into the package: what can be made wrong in an expression or a statement.

Each rule yields what a node could be instead, or None where a statement is left out. Faults that nobody could mind are
not made: in annotations, docstrings, messages, decorators, assertions and logging.
"""

import ast
import copy
from collections.abc import Iterator

Place = tuple[ast.AST, str, int | None]
"""A node's parent, its field there, and its index if that is a list."""

_COMPARED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_REVERSED = {ast.Lt: ast.Gt, ast.LtE: ast.GtE, ast.Gt: ast.Lt, ast.GtE: ast.LtE}
_CALCULATED = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr, ast.MatMult: ast.Mult,
}  # fmt: skip
_CALLED = {"min": "max", "max": "min", "any": "all", "all": "any"}
_DROPPED = ("sorted", "reversed", "abs", "frozenset", "set")
_METHODS = {
    "startswith": "endswith", "endswith": "startswith", "partition": "rpartition", "rpartition": "partition",
    "add": "discard", "append": "count", "floor": "ceil", "isfile": "isdir", "is_file": "is_dir", "is_dir": "is_file",
}  # fmt: skip
_DROPPED_METHODS = (
    "strip",
    "lstrip",
    "rstrip",
    "lower",
    "upper",
    "casefold",
    "removeprefix",
    "removesuffix",
    "resolve",
)
_KEYED_METHODS = ("get", "pop", "setdefault", "startswith", "endswith", "removeprefix", "removesuffix")
_LARGE = 100
"""A number above it is a limit, which nobody minds a little more or less of."""
_SPOKEN_METHODS = ("debug", "info", "warning", "error", "exception")
_SPOKEN_CALLS = ("TypeVar", "NewType", "cast", "assert_never", "overload")


def places(node: ast.AST, path: tuple[ast.AST, ...] = ()) -> Iterator[tuple[ast.AST, Place, tuple[ast.AST, ...]]]:
    """Yield the nodes below one that may be made wrong, each with where it is, and all nodes that it is in."""
    path = (*path, node)
    for name, value in ast.iter_fields(node):
        if _is_left_alone(node, name):
            continue
        for index, inner in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(inner, ast.AST) and not _is_spoken(inner):
                yield inner, (node, name, index), path
                yield from places(inner, path)


def _is_left_alone(node: ast.AST, name: str) -> bool:
    """Whether what a field of a node holds is for readers, or for the type checker."""
    match node:
        case ast.Raise() | ast.AnnAssign() if name in ("exc", "cause", "annotation", "target"):
            return True
        case ast.ClassDef() if name in ("bases", "keywords") or any("Protocol" in ast.unparse(b) for b in node.bases):
            return True
    return name in ("annotation", "returns", "decorator_list", "type_comment", "ctx")


def _is_spoken(node: ast.AST) -> bool:
    """Whether a node is text for people, a type, or an assertion."""
    match node:
        case ast.JoinedStr() | ast.Assert() | ast.Import() | ast.ImportFrom() | ast.Pass():
            return True
        case ast.Expr(value=ast.Constant()) | ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return True
        case ast.Assign(targets=[ast.Name(id=name)]) if name in ("__slots__", "__all__"):
            return True
        case ast.Assign(targets=[ast.Name(id=name)], value=ast.BinOp(op=ast.BitOr()) | ast.Subscript()):
            return name.lstrip("_")[:1].isupper() and not name.isupper()  # another name of a type
        case ast.Call(func=ast.Name(id=name)) if name in _SPOKEN_CALLS:
            return True
        case ast.Call(func=ast.Attribute(attr=name)) if name in _SPOKEN_METHODS:
            return True
        case ast.Expr(value=ast.Call() as call) | ast.Assign(value=ast.Call() as call):
            return _is_spoken(call)
        case ast.match_case(pattern=ast.MatchAs(pattern=None, guard=None)):  # assert_never(...)
            return all(map(_is_spoken, node.body))
    return False


def faults(node: ast.AST, place: Place) -> Iterator[ast.AST | None]:
    """Yield what could wrongly be in the place of a node; None leaves out a statement, argument or element."""
    match node:
        case ast.stmt():
            yield from _of_statement(node)
        case ast.Compare():
            yield from _of_comparison(node)
        case ast.BoolOp(op=op, values=values):
            yield _with(node, op=ast.Or() if isinstance(op, ast.And) else ast.And())
            for i in range(len(values)):
                rest = [value for j, value in enumerate(values) if j != i]
                yield _with(node, values=rest) if len(rest) > 1 else rest[0]
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert(), operand=operand):
            yield operand
        case ast.BinOp(left=left, op=op, right=right):
            if not any(isinstance(side, ast.JoinedStr) for side in (left, right)):
                yield _with(node, op=_CALCULATED[type(op)]())
                yield left
                yield right
        case ast.Constant():
            yield from _of_constant(node, place)
        case ast.Call():
            yield from _of_call(node)
        case ast.Subscript(slice=ast.Slice(lower=lower, upper=upper) as cut):
            if lower is not None:
                yield _with(node, slice=_with(cut, lower=None))
            if upper is not None:
                yield _with(node, slice=_with(cut, upper=None))
        case ast.IfExp(body=body, orelse=orelse):
            yield _with(node, body=orelse, orelse=body)
            yield body
            yield orelse
        case ast.comprehension(ifs=[_, *_]):
            yield _with(node, ifs=node.ifs[1:])
            yield _with(node, ifs=[_negated(node.ifs[0]), *node.ifs[1:]])
        case ast.keyword(arg=str()):
            if not _is_text(node.value):
                yield None
    match place[0]:
        case ast.Tuple(ctx=ast.Load()) | ast.List() | ast.Set() if isinstance(
            node, ast.Constant | ast.Name | ast.Starred
        ):
            yield None


def _of_statement(node: ast.stmt) -> Iterator[ast.AST | None]:
    match node:
        case ast.If(test=test, body=body, orelse=orelse):
            yield _with(node, test=_negated(test))
            yield _with(node, test=ast.Constant(True))
            yield _with(node, test=ast.Constant(False))
            if orelse:
                yield _with(node, body=orelse, orelse=body)
        case ast.While(test=test) if not isinstance(test, ast.Constant):
            yield _with(node, test=ast.Constant(False))
        case ast.Return(value=value) if value is not None:
            yield from (ast.Return(value=other) for other in _instead(value))
        case ast.Raise() | ast.AugAssign() | ast.Delete() | ast.Expr():
            yield None
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield None
        case ast.Continue():
            yield ast.Break()
            yield None
        case ast.Break():
            yield ast.Continue()
            yield None
        case ast.Try(handlers=handlers, finalbody=final):
            if handlers and final:
                yield _with(node, finalbody=[])
            if final and not handlers:
                yield _with(node, finalbody=[ast.Pass()])
        case ast.For():
            yield None


def _instead(value: ast.expr) -> Iterator[ast.expr]:
    """Yield what could be returned instead of a value."""
    match value:
        case ast.Constant(value=None | ""):
            return
        case ast.Constant():
            yield ast.Constant(None)
        case ast.Compare() | ast.BoolOp() | ast.UnaryOp(op=ast.Not()):
            yield _negated(value)
            yield ast.Constant(True)
            yield ast.Constant(False)
        case ast.List() | ast.ListComp():
            yield ast.List(elts=[], ctx=ast.Load())
        case ast.Dict() | ast.DictComp():
            yield ast.Dict(keys=[], values=[])
        case ast.Call(func=ast.Name(id="tuple")):
            yield ast.Tuple(elts=[], ctx=ast.Load())
        case _:
            yield ast.Constant(None)


def _of_comparison(node: ast.Compare) -> Iterator[ast.AST]:
    for i, op in enumerate(node.ops):
        for table in (_COMPARED, _REVERSED):
            if type(op) in table:
                yield _with(node, ops=[*node.ops[:i], table[type(op)](), *node.ops[i + 1 :]])


def _of_constant(node: ast.Constant, place: Place) -> Iterator[ast.AST]:
    match node.value:
        case bool(value):
            yield ast.Constant(not value)
        case int(value) if value > _LARGE:
            yield ast.Constant(value * 2)
            yield ast.Constant(value // 2)
        case int(value) | float(value):
            yield ast.Constant(value + 1)
            yield ast.Constant(value - 1)
        case str(value) if _is_key(place):
            yield ast.Constant(value + "x")
            if len(value) > 1:
                yield ast.Constant(value[:-1])


def _is_key(place: Place) -> bool:
    """Whether a text is compared or looked up, not shown."""
    match place:
        case (ast.Subscript(), "slice", _) | (ast.Compare(), _, _):
            return True
        case (ast.Call(func=ast.Attribute(attr=name)), "args", _):
            return name in _KEYED_METHODS
        case (ast.Tuple() | ast.Set() as parent, "elts", _):
            return all(isinstance(e, ast.Constant | ast.Name) for e in parent.elts)
        case (ast.Dict(), "keys", _):
            return True
    return False


def _of_call(node: ast.Call) -> Iterator[ast.AST]:
    match node:
        case ast.Call(func=ast.Name(id=name)) if name in _CALLED:
            yield _with(node, func=ast.Name(id=_CALLED[name], ctx=ast.Load()))
        case ast.Call(func=ast.Name(id=name), args=[inner]) if name in _DROPPED:
            empty = ast.Call(func=ast.Name(id="list", ctx=ast.Load()), args=[inner], keywords=[])
            yield inner if name == "abs" else empty
        case ast.Call(func=ast.Name(id="dict"), args=[inner], keywords=[]):
            yield inner
        case ast.Call(func=ast.Attribute(value=value, attr=name)):
            if name in _METHODS:
                yield _with(node, func=_with(node.func, attr=_METHODS[name]))
            elif name in _DROPPED_METHODS:
                yield value
            elif name == "get" and len(node.args) == 2:
                yield _with(node, args=node.args[:1])


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _negated(test: ast.expr) -> ast.expr:
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return test.operand
    return ast.UnaryOp(op=ast.Not(), operand=test)


def _with(node: ast.AST, **fields: object) -> ast.AST:
    other = copy.copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    return other
