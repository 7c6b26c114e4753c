"""Translate Python formulas to JavaScript, so that the page computes what the library computes.

Only the Python that the formulas use is supported: arithmetic, comparisons, conditions, sums over
generators, and dataclasses with properties. Anything else raises a SyntaxError with its line.
"""

from __future__ import annotations

import ast
import inspect
import json
from types import ModuleType
from typing import NoReturn

OPERATORS: dict[type[ast.AST], str] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.Pow: "**",
    ast.And: "&&", ast.Or: "||", ast.Not: "!", ast.USub: "-",
    ast.Eq: "===", ast.NotEq: "!==", ast.Is: "===", ast.IsNot: "!==",
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=",
}  # fmt: skip
PLAIN_CALLS = {"max": "Math.max", "min": "Math.min", "round": "Math.round", "tuple": ""}


def translate(module: ModuleType, *, leave_out: tuple[str, ...] = ()) -> str:
    """Translate the constants, dataclasses and functions of a module.

    Args:
      module: The module. Its imports are assumed to be translated already.
      leave_out: Functions and methods to skip.

    Returns:
      JavaScript.

    Raises:
      SyntaxError: The module uses unsupported Python.
    """
    tree = ast.parse(inspect.getsource(module))
    lines: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            lines.append(f"const {name} = {json.dumps(getattr(module, name))};")
        elif isinstance(node, ast.ClassDef):
            lines.append(_class(node, leave_out))
        elif isinstance(node, ast.FunctionDef) and node.name not in leave_out:
            lines.append(_function(node, f"function {node.name}", self_name=None))
        elif not isinstance(node, (ast.Import, ast.ImportFrom, ast.Expr, ast.FunctionDef)):
            _refuse(node)
    return "\n\n".join(lines)


# -------------------------------------------------------------------------------------------------
# Definitions
# -------------------------------------------------------------------------------------------------


def _class(node: ast.ClassDef, leave_out: tuple[str, ...]) -> str:
    fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
    names = [each.target.id for each in fields if isinstance(each.target, ast.Name)]
    defaults = [
        f"{name}: {_expression(each.value)}"
        for name, each in zip(names, fields, strict=True)
        if each.value is not None
    ]
    body = [f"constructor(values) {{ Object.assign(this, {{ {', '.join(defaults)} }}, values); }}"]
    for each in node.body:
        if isinstance(each, ast.FunctionDef) and each.name not in leave_out:
            is_property = any(
                isinstance(d, ast.Name) and d.id == "property" for d in each.decorator_list
            )
            body.append(
                _function(each, f"{'get ' if is_property else ''}{each.name}", self_name="self")
            )
    return f"class {node.name} {{\n" + "\n".join(f"  {line}" for line in body) + "\n}"


def _function(node: ast.FunctionDef, head: str, self_name: str | None) -> str:
    arguments = node.args.args[1:] if self_name else node.args.args
    first_default = len(arguments) - len(node.args.defaults)
    parameters = [
        each.arg
        if i < first_default
        else f"{each.arg} = {_expression(node.args.defaults[i - first_default])}"
        for i, each in enumerate(arguments)
    ]
    known = {each.arg for each in arguments}
    body = [line for statement in node.body for line in _statement(statement, known)]
    return f"{head}({', '.join(parameters)}) {{ {' '.join(body)} }}"


def _statement(node: ast.stmt, known: set[str]) -> list[str]:
    match node:
        case ast.Expr(value=ast.Constant(value=str())):
            return []  # a docstring
        case ast.Return(value=ast.expr() as value):
            return [f"return {_expression(value)};"]
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            return [_assignment([name], _expression(value), known)]
        case ast.Assign(targets=[ast.Tuple(elts=names)], value=value):
            return [_assignment([_name(each) for each in names], _expression(value), known)]
        case ast.If(test=test, body=body, orelse=orelse):
            # As in Python, names assigned in a branch stay defined after it.
            inner = [_assigned(each) for each in (*body, *orelse)]
            fresh = sorted({name for names in inner for name in names} - known)
            known |= set(fresh)
            declared = [f"let {', '.join(fresh)};"] if fresh else []
            then = " ".join(line for each in body for line in _statement(each, known))
            other = " ".join(line for each in orelse for line in _statement(each, known))
            return [
                *declared,
                f"if ({_expression(test)}) {{ {then} }}"
                + (f" else {{ {other} }}" if other else ""),
            ]
    _refuse(node)


def _assigned(node: ast.stmt) -> list[str]:
    names = node.targets if isinstance(node, ast.Assign) else []
    return [each.id for each in names if isinstance(each, ast.Name)]


def _assignment(names: list[str], value: str, known: set[str]) -> str:
    new = [name for name in names if name not in known]
    if new and len(new) != len(names):
        raise SyntaxError(f"{names}: assigns new and existing names in one statement")
    known |= set(names)
    target = names[0] if len(names) == 1 else f"[{', '.join(names)}]"
    return f"{'let ' if new else ''}{target} = {value};"


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else _refuse(node)


# -------------------------------------------------------------------------------------------------
# Expressions
# -------------------------------------------------------------------------------------------------


def _expression(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=value):
            return json.dumps(value)
        case ast.Name(id="self"):
            return "this"
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=ast.Name(id="arithmetic"), attr=name):
            return name
        case ast.Attribute(value=value, attr=name):
            return f"{_expression(value)}.{name}"
        case ast.BinOp(left=left, op=ast.FloorDiv(), right=right):
            return f"Math.floor({_expression(left)} / {_expression(right)})"
        case ast.BinOp(left=left, op=op, right=right):
            return f"({_expression(left)} {_operator(op, node)} {_expression(right)})"
        case ast.UnaryOp(op=op, operand=operand):
            return f"{_operator(op, node)}{_expression(operand)}"
        case ast.BoolOp(op=op, values=values):
            return "(" + f" {_operator(op, node)} ".join(map(_expression, values)) + ")"
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            return f"({_expression(left)} {_operator(op, node)} {_expression(right)})"
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return f"({_expression(test)} ? {_expression(body)} : {_expression(orelse)})"
        case ast.Tuple(elts=values) | ast.List(elts=values):
            return f"[{', '.join(map(_expression, values))}]"
        case ast.Dict(keys=keys, values=values):
            pairs = [
                f"{_expression(k)}: {_expression(v)}"
                for k, v in zip(keys, values, strict=True)
                if k
            ]
            return f"{{ {', '.join(pairs)} }}"
        case ast.Subscript(value=value, slice=index):
            return f"({_expression(value)})[{_expression(index)}]"
        case ast.GeneratorExp(elt=element, generators=[each]):
            return _generator(element, each)
        case ast.DictComp(key=key, value=value, generators=[each]):
            return f"Object.fromEntries({_generator(ast.Tuple(elts=[key, value]), each)})"
        case ast.Call():
            return _call(node)
    _refuse(node)


def _generator(element: ast.expr, each: ast.comprehension) -> str:
    names = (
        [_name(n) for n in each.target.elts]
        if isinstance(each.target, ast.Tuple)
        else [_name(each.target)]
    )
    parameter = f"([{', '.join(names)}])" if len(names) > 1 else f"({names[0]})"
    text = _expression(each.iter)
    for condition in each.ifs:
        text += f".filter({parameter} => {_expression(condition)})"
    return f"{text}.map({parameter} => {_expression(element)})"


def _call(node: ast.Call) -> str:
    positional = [_expression(each) for each in node.args]
    named = ", ".join(f"{each.arg}: {_expression(each.value)}" for each in node.keywords)
    match node.func:
        case ast.Name(id="sum"):
            return f"{positional[0]}.reduce((x, y) => x + y, 0)"
        case ast.Name(id="len"):
            return f"{positional[0]}.length"
        case ast.Name(id=name) if name in PLAIN_CALLS:
            return f"{PLAIN_CALLS[name]}({', '.join(positional)})"
        case ast.Attribute(value=table, attr="get"):
            return f"({_expression(table)}[{positional[0]}] ?? {positional[1]})"
        case ast.Attribute(value=table, attr="items"):
            return f"Object.entries({_expression(table)})"
        case ast.Attribute(value=ast.Name(id="dataclasses"), attr="replace"):
            return f"new {positional[0]}.constructor({{ ...{positional[0]}, {named} }})"
        case ast.Name(id=name) if named and name[0].isupper():
            return f"new {name}({{ {named} }})"
        case _ if not named:
            return f"{_expression(node.func)}({', '.join(positional)})"
    _refuse(node)


def _operator(op: ast.AST, node: ast.expr) -> str:
    return OPERATORS.get(type(op)) or _refuse(node)


def _refuse(node: ast.AST) -> NoReturn:
    where = f"line {getattr(node, 'lineno', '?')}"
    raise SyntaxError(f"{where}: {type(node).__name__} has no translation: {ast.unparse(node)}")
