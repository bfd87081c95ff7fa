"""The expression of data.where: Python's syntax for comparisons, evaluated by pyarrow's kernels, column by column.

    similarity >= 0.28 and punsafe < 0.5 and min(width, height) >= 64 and len(caption) >= 5

Python's own parser reads the text; nothing of it is executed. What is not listed here is refused: names are fields, and
there is no call but those of FUNCTIONS. A comparison with a missing value is neither true nor false; `and`, `or` and
`not` take it as unknown (Kleene's logic, as SQL does), so a sample whose outcome stays unknown is not chosen.
"""

import ast
import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from keyword import iskeyword
from typing import TYPE_CHECKING, Any, NamedTuple

from data.checks import did_you_mean, one_line
from data.selection.fields import NUMBER, TEXT, TRUTH, kind_of

if TYPE_CHECKING:
    import pyarrow as pa

FUNCTIONS = ("min", "max", "abs", "len", "lower", "field")
COMPARISONS: dict[type, str] = {
    ast.Eq: "equal", ast.NotEq: "not_equal", ast.Lt: "less", ast.LtE: "less_equal", ast.Gt: "greater",
    ast.GtE: "greater_equal",
}  # fmt: skip
SIGNS: dict[type, str] = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
# The sign where the sides change places, and the one under a `not`.
MIRRORED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
NEGATED = {"<": ">=", "<=": ">", ">": "<=", ">=": "<"}
ARITHMETIC: dict[type, str] = {ast.Add: "add", ast.Sub: "subtract", ast.Mult: "multiply", ast.Div: "divide"}
# A longer expression is not parsed.
LONGEST = 4000
SYNTAX = (
    "write comparisons such as `similarity >= 0.28`, `status == 'success'`, `license in ('mit', 'cc0')`, `punsafe is "
    f"None`, joined by and, or, not; with + - * / and {', '.join(f'{name}()' for name in FUNCTIONS)}"
)


class Value(NamedTuple):
    """A part of an expression: its kind, '' where no sample has a value, and its column or constant."""

    kind: str
    column: Any


class Threshold(NamedTuple):
    """A comparison with a number.  of: what is compared, a field or an expression over fields.  op: <, <=, > or >=."""

    of: str
    op: str
    number: float


class Where:
    """An expression over the fields of samples.

    text: as it was given.  fields: the names of the fields in it.
    Raises: ValueError if it is no expression of this kind.
    """

    def __init__(self, text: str) -> None:
        self.text, self.fields = text.strip(), set[str]()
        if len(text) > LONGEST:
            raise ValueError(f"where={one_line(text)} has {len(text)} characters, more than {LONGEST}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that `is` stands beside a constant, which is refused below
                # Several lines, as a block of YAML has them, are one expression in brackets.
                source = f"({self.text}\n)" if "\n" in self.text else self.text
                self._tree = ast.parse(source, mode="eval").body
            self._check(self._tree)
        except SyntaxError as error:
            raise self._fault(f"{error.msg} at character {error.offset}") from None
        except (RecursionError, MemoryError):
            raise self._fault("it is nested too deeply") from None
        except ValueError as error:
            if isinstance(error, _Refused):
                raise self._fault(str(error)) from None
            raise self._fault(one_line(str(error))) from None

    def check_kinds(self, kinds: Mapping[str, str]) -> None:
        """Evaluate the expression on no sample at all.  kinds: of the fields, all of which are in it.

        Raises: ValueError if a field is compared with a value of another kind.
        """
        import pyarrow as pa

        types = {NUMBER: pa.float64(), TEXT: pa.string(), TRUTH: pa.bool_(), "": pa.null()}
        self.evaluate(pa.table({name: pa.nulls(0, types[kinds[name]]) for name in self.fields}))

    def evaluate(self, table: "pa.Table") -> "pa.BooleanArray":
        """For each row true, false, or null where a missing field leaves it open.  table: has all fields.

        Raises: ValueError if a field is compared with a value of another kind.
        """
        import pyarrow as pa

        return self._of_kind(table, TRUTH, pa.bool_())

    def numbers(self, table: "pa.Table") -> "pa.DoubleArray":
        """For each row the number that an expression such as that of a Threshold gives, or null.

        table: has all fields.  Raises: ValueError if it gives no number.
        """
        import pyarrow as pa

        return self._of_kind(table, NUMBER, pa.float64())

    def parts(self) -> list["Where"]:
        """The conditions that `and` joins, each by itself.  Raises: ValueError if they are nested too deeply."""
        if not (isinstance(self._tree, ast.BoolOp) and isinstance(self._tree.op, ast.And)):
            return [self]
        try:
            return [Where(ast.unparse(part)) for part in self._tree.values]
        except RecursionError:
            raise self._fault("it is nested too deeply") from None

    def thresholds(self) -> list[Threshold]:
        """The comparisons with a number, in their order; those under a `not` turned round, which means the same.

        Raises: ValueError if they are nested too deeply.
        """
        try:
            return list(dict.fromkeys(_thresholds(self._tree, False)))
        except RecursionError:
            raise self._fault("it is nested too deeply") from None

    def _of_kind(self, table: "pa.Table", kind: str, type_: "pa.DataType") -> Any:
        """The column of a value that must be of this kind."""
        import pyarrow as pa

        try:
            value = _Evaluation(table).of(self._tree)
            if value.kind not in (kind, ""):
                raise _Refused(f"it gives a {value.kind}, not {'a ' * (kind != TRUTH)}{kind}")
        except _Refused as error:
            raise self._fault(str(error)) from None
        except RecursionError:
            raise self._fault("it is nested too deeply") from None
        column = value.column.cast(type_, safe=False)
        if isinstance(column, pa.Scalar):
            column = pa.array([column.as_py()] * table.num_rows, type_)
        return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column

    def _fault(self, what: str) -> ValueError:
        return ValueError(f"where={one_line(self.text, 200)}: {what}; {SYNTAX}")

    def _check(self, node: ast.AST) -> None:
        """Look at every part, and note the fields. Raises: _Refused for a part that is not known."""
        check: Callable[[Any], list[ast.AST]] | None = getattr(self, f"_{type(node).__name__.lower()}", None)
        if check is None:
            raise _Refused(f"`{_source(node)}` is not known here")
        for part in check(node):
            self._check(part)

    def _boolop(self, node: ast.BoolOp) -> list[ast.AST]:
        return [*node.values]

    def _unaryop(self, node: ast.UnaryOp) -> list[ast.AST]:
        if not isinstance(node.op, (ast.Not, ast.USub, ast.UAdd)):
            raise _Refused(f"`{_source(node)}` is not known here")
        return [node.operand]

    def _binop(self, node: ast.BinOp) -> list[ast.AST]:
        if isinstance(node.op, (ast.BitAnd, ast.BitOr)):
            raise _Refused(f"`{_source(node)}`: write and, or")
        if type(node.op) not in ARITHMETIC:
            raise _Refused(f"`{_source(node)}` is not known here")
        return [node.left, node.right]

    def _compare(self, node: ast.Compare) -> list[ast.AST]:
        parts: list[ast.AST] = [node.left]
        for op, right in zip(node.ops, node.comparators, strict=True):
            if isinstance(op, (ast.Is, ast.IsNot)):
                if not _is_none(right):
                    raise _Refused(f"`{_source(node)}`: `is` stands before None alone; write ==")
            elif isinstance(op, (ast.In, ast.NotIn)) and isinstance(right, (ast.Tuple, ast.List, ast.Set)):
                if not right.elts or not all(isinstance(e, ast.Constant) and e.value is not None for e in right.elts):
                    raise _Refused(f"`{_source(node)}`: list numbers or texts after `in`")
                parts += right.elts
            else:
                parts.append(right)
        return parts

    def _constant(self, node: ast.Constant) -> list[ast.AST]:
        if type(node.value) not in (int, float, str, bool):
            raise _Refused(f"`{_source(node)}` is no number or text" + "; write `is None`" * (node.value is None))
        if isinstance(node.value, int) and abs(node.value) > 10**300:
            raise _Refused(f"`{_source(node)}` is too large")
        if isinstance(node.value, str):
            node.value.encode()  # raises for half of a surrogate pair
        return []

    def _name(self, node: ast.Name) -> list[ast.AST]:
        self.fields.add(node.id)
        return []

    def _call(self, node: ast.Call) -> list[ast.AST]:
        name = node.func.id if isinstance(node.func, ast.Name) else _source(node.func)
        if name not in FUNCTIONS:
            raise _Refused(f"no function '{one_line(name)}'{did_you_mean(name, FUNCTIONS)}")
        least, most = (2, 100) if name in ("min", "max") else (1, 1)
        if node.keywords or not least <= len(node.args) <= most:
            raise _Refused(f"`{_source(node)}`: {name}() takes {'two or more values' if most > 1 else 'one value'}")
        if name == "field":
            if not (isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str)):
                raise _Refused(f"`{_source(node)}`: write the name of the field in quotes")
            self.fields.add(node.args[0].value)
            return []
        return [*node.args]


class _Refused(ValueError):
    """What is wrong in an expression, without the expression."""


class _Evaluation:
    """Evaluates a checked expression over a table."""

    def __init__(self, table: "pa.Table") -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        self.table, self.pa, self.pc = table, pa, pc

    def of(self, node: ast.AST) -> Value:
        """The value of a part. Raises: _Refused."""
        value: Value = getattr(self, f"_{type(node).__name__.lower()}")(node)
        return value

    def _boolop(self, node: ast.BoolOp) -> Value:
        join = self.pc.and_kleene if isinstance(node.op, ast.And) else self.pc.or_kleene
        first, *rest = (self._as(TRUTH, value) for value in node.values)
        for column in rest:
            first = join(first, column)
        return Value(TRUTH, first)

    def _unaryop(self, node: ast.UnaryOp) -> Value:
        if isinstance(node.op, ast.Not):
            return Value(TRUTH, self.pc.invert(self._as(TRUTH, node.operand)))
        number = self._as(NUMBER, node.operand)
        return Value(NUMBER, self.pc.negate(number) if isinstance(node.op, ast.USub) else number)

    def _binop(self, node: ast.BinOp) -> Value:
        # As floating point: whole numbers could overflow.
        left, right = (self._floating(self._as(NUMBER, part)) for part in (node.left, node.right))
        return Value(NUMBER, self._known(getattr(self.pc, ARITHMETIC[type(node.op)])(left, right)))

    def _compare(self, node: ast.Compare) -> Value:
        found, left = None, node.left
        for op, right in zip(node.ops, node.comparators, strict=True):
            column = self._compare_two(node, op, left, right)
            found, left = column if found is None else self.pc.and_kleene(found, column), right
        return Value(TRUTH, found)

    def _compare_two(self, node: ast.Compare, op: ast.cmpop, left: ast.expr, right: ast.expr) -> Any:
        if isinstance(op, (ast.Is, ast.IsNot)):
            missing = self.pc.is_null(self.of(left).column)
            return missing if isinstance(op, ast.Is) else self.pc.invert(missing)
        if isinstance(op, (ast.In, ast.NotIn)):
            inside = self._is_in(node, left, right)
            return inside if isinstance(op, ast.In) else self.pc.invert(inside)
        (a, x), (b, y) = self.of(left), self.of(right)
        if a and b and a != b:
            raise _Refused(f"`{_source(node)}` compares a {a} with a {b}")
        if not a or not b:  # no sample has a value
            return self._unknown()
        return getattr(self.pc, COMPARISONS[type(op)])(*self._alike(x, y))

    def _is_in(self, node: ast.Compare, left: ast.expr, right: ast.expr) -> Any:
        """Whether a value is one of a list, or a text is part of another."""
        if isinstance(right, (ast.Tuple, ast.List, ast.Set)):
            kind, column = self.of(left)
            values = [self.of(element) for element in right.elts]
            if any(value.kind != kind for value in values) and kind:
                raise _Refused(f"`{_source(node)}` looks for a {kind} among others")
            hits = [self.pc.equal(*self._alike(column, value.column)) for value in values] if kind else []
            hits = hits or [self._unknown()]
            found = hits[0]
            for hit in hits[1:]:
                found = self.pc.or_kleene(found, hit)
            return found
        if not (isinstance(left, ast.Constant) and isinstance(left.value, str)):
            raise _Refused(f"`{_source(node)}`: before `in` stands a text in quotes, or after it a list in brackets")
        return self.pc.match_substring(self._as(TEXT, right), left.value)

    def _constant(self, node: ast.Constant) -> Value:
        value: Any = node.value
        if type(value) is int and abs(value) >= 2**63:
            value = float(value)
        kind = {bool: TRUTH, str: TEXT}.get(type(value), NUMBER)
        return Value(kind, self.pa.scalar(value))

    def _name(self, node: ast.Name) -> Value:
        return self._field(node.id)

    def _call(self, node: ast.Call) -> Value:
        assert isinstance(node.func, ast.Name)
        name = node.func.id
        if name == "field":
            return self._field(node.args[0].value)  # type: ignore[attr-defined]
        if name == "len":
            return Value(NUMBER, self.pc.utf8_length(self._as(TEXT, node.args[0])))
        if name == "lower":
            return Value(TEXT, self.pc.utf8_lower(self._as(TEXT, node.args[0])))
        if name == "abs":
            return Value(NUMBER, self.pc.abs(self._as(NUMBER, node.args[0])))
        element_wise = self.pc.min_element_wise if name == "min" else self.pc.max_element_wise
        numbers = self._alike(*(self._as(NUMBER, part) for part in node.args))
        return Value(NUMBER, element_wise(*numbers, skip_nulls=False))

    def _field(self, name: str) -> Value:
        column = self.table[name]
        if column.type == self.pa.uint64():  # beside int64 neither could hold both
            column = self._floating(column)
        return Value(kind_of(column.type), column)

    def _as(self, kind: str, node: ast.AST) -> Any:
        """The column or constant of a part that must be of this kind."""
        value = self.of(node)
        if value.kind not in (kind, ""):
            raise _Refused(f"`{_source(node)}` is a {value.kind}, where a {kind} is needed")
        types = {NUMBER: self.pa.float64(), TEXT: self.pa.string(), TRUTH: self.pa.bool_()}
        return value.column if value.kind else value.column.cast(types[kind])

    def _alike(self, *columns: Any) -> list[Any]:
        """Floating point where one is: Arrow alone refuses whole numbers beside it that are not exact in it."""
        if not any(self.pa.types.is_floating(column.type) for column in columns):
            return list(columns)
        return [self._floating(c) if self.pa.types.is_integer(c.type) else c for c in columns]

    def _floating(self, column: Any) -> Any:
        return column.cast(self.pa.float64(), safe=False)

    def _unknown(self) -> Any:
        return self.pa.nulls(self.table.num_rows, self.pa.bool_())

    def _known(self, column: Any) -> Any:
        """NaN, as of 0 / 0, is a missing value."""
        missing = self.pa.scalar(None, self.pa.float64())
        return self.pc.if_else(self.pc.is_nan(column), missing, column)


def reference(field: str) -> str:
    """How an expression names a field."""
    return field if field.isidentifier() and not iskeyword(field) else f"field({field!r})"


def _thresholds(node: ast.AST, negated: bool) -> Iterator[Threshold]:
    if isinstance(node, ast.BoolOp):
        for part in node.values:
            yield from _thresholds(part, negated)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield from _thresholds(node.operand, not negated)
    elif isinstance(node, ast.Compare):
        sides: list[ast.AST] = [node.left, *node.comparators]
        for op, (left, right) in zip(node.ops, pairwise(sides), strict=True):
            sign, a, b = SIGNS.get(type(op)), _number(left), _number(right)
            if sign and (a is None) != (b is None):
                number, of = (b, left) if a is None else (a, right)
                sign = sign if a is None else MIRRORED[sign]
                yield Threshold(_name_of(of), NEGATED[sign] if negated else sign, number)  # type: ignore[arg-type]


def _number(node: ast.AST) -> float | None:
    """The number that is written, with its sign."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        number = _number(node.operand)
        return -number if number is not None and isinstance(node.op, ast.USub) else number
    return float(node.value) if isinstance(node, ast.Constant) and type(node.value) in (int, float) else None  # type: ignore[arg-type]


def _name_of(node: ast.AST) -> str:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "field":
        return reference(node.args[0].value)  # type: ignore[attr-defined]
    return ast.unparse(node)


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _source(node: ast.AST) -> str:
    return one_line(ast.unparse(node))
