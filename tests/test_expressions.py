"""Expressions against an independent slow reading of them, against calendars and exact fractions; hostile text and trees; the compiler."""
import ast
import datetime as dt
import json
import math
import statistics
import sys
import time
from fractions import Fraction

import numpy as np
import pytest
from generators import BINARY, DATE_PARTS, MANY, UNARY, examples, slow, text, trees
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import riskscore.expressions as language
from riskscore.contract import parse_contract
from riskscore.core import RiskError
from riskscore.expressions import (
    FUNCTIONS, LEAVES, MAX_DEPTH, MAX_NODES, OPERATIONS, Expr, as_expr, col, compile_program, from_json, parse, trace,
)
from riskscore.features import FeaturePlan, feature_expressions, plan_from_json

NUMBERS, DATES, CATEGORIES = ['a', 'b', 'mes año'], ['on', 'seen at'], {'job': ['nurse', 'España', "it's"], 'home type': ['1', 'own']}
CONTRACT = {'name': 'x', 'value': {d: {'good': 1, 'bad': -1} for d in ('approve', 'refer', 'decline')},
            'columns': {n: {'kind': 'number'} for n in NUMBERS} | {n: {'kind': 'date'} for n in DATES}
            | {n: {'kind': 'category', 'levels': levels} for n, levels in CATEGORIES.items()}}
WHOLE_LANGUAGE = trees(NUMBERS, CATEGORIES, DATES)
ordinary = st.floats(-1e3, 1e3) | st.integers(-5, 5).map(float)
numbers = st.sampled_from([math.nan, 0.0, -0.0, 1.0, -1.0, 1e-300, 1e200, -1e308, 5e-324, 2.0**53]) | ordinary
ROWS = st.lists(st.fixed_dictionaries(
    {n: numbers for n in NUMBERS} | {n: st.just(math.nan) | st.floats(-25567, 84005) | st.integers(-25567, 84005).map(float) for n in DATES}
    | {n: st.none() | st.sampled_from([*levels, 'unseen']) for n, levels in CATEGORIES.items()}), min_size=1, max_size=9)


def compute(expression: Expr, **columns) -> np.ndarray:
    "An expression over columns of numbers."
    rows = np.array(list(columns.values()), dtype=float)
    return compile_program([expression], [('column', name) for name in columns]).run(rows)[0]


def resolved(source: str) -> Expr:
    "An expression as a contract declares it."
    return feature_expressions(parse_contract(CONTRACT | {'derived': {'f': source}}))['f']


def declared(tree) -> Expr:
    "A generated expression as a contract declares it; the few that are too long or too large are passed over."
    source = text(tree)
    try:
        return resolved(source)
    except RiskError as error:
        assume(len(source) <= 2000 and f'{MAX_NODES:,} operations' not in str(error))
        raise


def frame_of(rows: list[dict]) -> dict:
    return {n: np.array([r[n] for r in rows], dtype=object if n in CATEGORIES else float) for n in rows[0]}


# ---------------------------------------------------------------- meaning

@settings(max_examples=examples(150))
@given(WHOLE_LANGUAGE, ROWS)
def test_equal_to_a_slow_reading(tree, rows):
    "Every operation of the grammar, to the bit, as plain Python computes it step by step for one row."
    plan = FeaturePlan({'f': declared(tree)}, {})
    with np.errstate(over='ignore'):
        expected = np.array([slow(tree, row) for row in rows]).astype(np.float32) + np.float32(0)
    expected[~np.isfinite(expected)] = np.nan
    np.testing.assert_array_equal(plan.frame(frame_of(rows))[:, 0], expected, err_msg=text(tree))


def test_the_generator_covers_the_grammar():
    "Otherwise the test above would prove less than it says."
    generated = {*UNARY, *BINARY, *MANY, *DATE_PARTS, 'where', 'coalesce'}
    assert set(FUNCTIONS) <= generated
    assert set(OPERATIONS) <= generated | {'filled'}
    assert set(LEAVES) == {'column', 'level', 'missing', 'number'}


def every_day() -> tuple[list[dt.date], np.ndarray]:
    first = dt.date(1900, 1, 1)
    days = [first + dt.timedelta(days=i) for i in range((dt.date(2200, 1, 1) - first).days)]
    return days, np.array([(d - dt.date(1970, 1, 1)).days for d in days], dtype=float)


@pytest.mark.parametrize('of_day', [0.0, 0.5, 1 - 2**-20])
def test_date_parts_of_every_day_of_three_centuries(of_day):
    days, numbers_ = every_day()
    for part in DATE_PARTS:
        expected = [d.weekday() if part == 'weekday' else getattr(d, part) for d in days]
        np.testing.assert_array_equal(compute(parse(f'{part}(d)'), d=numbers_ + of_day), expected)


def test_date_parts_are_exact_in_32_bits():
    "Years, months and days survive the plan's rounding."
    days, numbers_ = every_day()
    plan = FeaturePlan({'year': resolved('year(on)'), 'day': resolved('day(on)')}, {})
    matrix = plan.frame({'on': numbers_})
    assert matrix[:, 0].tolist() == [d.year for d in days] and matrix[:, 1].tolist() == [d.day for d in days]


samples = st.lists(st.none() | st.floats(-1e6, 1e6), min_size=1, max_size=12)


@settings(max_examples=examples(100))
@given(samples)
def test_statistics_skip_nulls(sample):
    "Against exact fractions and the standard library."
    names = [f'c{i}' for i in range(len(sample))]
    columns = {n: [math.nan if v is None else v] for n, v in zip(names, sample, strict=True)}
    known = [v for v in sample if v is not None]
    result = {f: float(compute(parse(f'{f}({", ".join(names)})'), **columns)[0]) for f in MANY}
    assert result['count'] == len(known)
    if not known:
        assert all(math.isnan(v) for f, v in result.items() if f != 'count')
        return
    size = max(map(abs, known))
    exact = sum(map(Fraction, known))
    assert (result['min'], result['max']) == (min(known), max(known))
    assert abs(Fraction(result['sum']) - exact) <= Fraction(size) * Fraction(len(known), 2**50)
    assert abs(Fraction(result['mean']) - exact / len(known)) <= Fraction(size) * Fraction(len(known), 2**50)
    assert result['std'] == pytest.approx(statistics.pstdev(map(Fraction, known)), rel=1e-6, abs=size * 1e-9 + 1e-150)


@given(st.permutations(['a', 'b', 'c']))
def test_sums_run_in_the_order_written(order):
    values = {'a': [1e16], 'b': [-1e16], 'c': [1.0]}
    left_to_right = 0.0
    for name in order:
        left_to_right += values[name][0]
    assert compute(parse(f'sum({", ".join(order)})'), **values)[0] == left_to_right
    assert compute(parse(' + '.join(order)), **values)[0] == left_to_right


@pytest.mark.parametrize('source, a, b, expected', [
    ('a / b', 1, 0, None), ('a / b > 2', 1, 0, None), ('isnull(a / b)', 1, 0, 1), ('coalesce(a / b, 5)', 1, 0, 5), ('log(a)', -1, 0, None),
    ('log(b)', 1, 0, None), ('exp(a)', 1e4, 0, None), ('a * a > 2', 1e200, 0, None), ('1 / (a * a)', 1e200, 0, None),
    ('min(a * a, 3)', 1e200, 0, 3), ('a - b', 1e308, -1e308, None), ('sqrt(a)', -1, 0, None),
    ('a + b', None, 1, None), ('min(a, b)', None, 1, 1), ('max(a, b)', None, None, None), ('a == b', None, None, None),
    ('a != b', 1, None, None),
    ('a <= b', 1, 1, 1), ('a < b', 1, 1, 0), ('a > b', 2, 1, 1), ('a >= b', 0, 1, 0),
    ('where(a, 1, 2)', None, 0, None), ('where(a, 1, 2)', 0, 0, 2), ('where(a > 0, b, 2)', 1, None, None),
    ('where(a > 0, b, 2)', -1, None, 2),
    ('count(a, b)', None, 1, 1), ('mean(a, b)', None, None, None), ('sum(a, b)', None, 2, 2), ('std(a, b)', 3, None, 0),
    ('std(a, b)', 1, 3, 1),
    ('abs(-a)', 2, 0, 2), ('floor(-a)', 1.5, 0, -2), ('- - a', 1, 0, 1), ('a - -b', 1, 2, 3), ('--a', 1, 0, 1),
    ('2 - a * b / 2', 2, 3, -1), ('(2 - a) * b', 1, 3, 3), ('a - b - 1', 5, 2, 2), ('a / b / 2', 8, 2, 2), ('1e3 + a', 1, 0, 1001),
    ('0x10 + a', 1, 0, 17), ('1_000 + a', 0, 0, 1000), ('.5 * a', 2, 0, 1), ('a * 100000000000000000000000', 1, 0, 1e23),
])
def test_meaning_by_hand(source, a, b, expected):
    result = compute(parse(source), a=[math.nan if a is None else a], b=[math.nan if b is None else b])[0]
    assert math.isnan(result) if expected is None else result == expected


@pytest.mark.parametrize('source, expected', [
    ("job == 'nurse'", [1, 0, 0, None]), ("job != 'nurse'", [0, 1, 1, None]), ('isnull(job)', [0, 0, 0, 1]),
    ('count(job, a)', [1, 1, 1, 0]),
    ("(job == 'nurse') + (job == 'España')", [1, 1, 0, None]), ("coalesce(job == 'nurse', 0)", [1, 0, 0, 0]),
    ("where(job == 'nurse', 1, 2)", [1, 2, 2, None]), ("'nurse' == job", 'RiskError'), ('job + 1', 'RiskError'), ('job == 1', 'RiskError'),
    ("a == 'nurse'", 'RiskError'), ("job == 'nurs'", 'RiskError'), ("job > 'nurse'", 'RiskError'), ('min(job, 1)', 'RiskError'),
    ("job == 'unknown' 'level'", 'RiskError'), ('isnull(jobb)', 'RiskError'),
])
def test_categories(source, expected):
    rows = [{'a': math.nan, 'job': job} for job in ('nurse', 'España', 'unseen', None)]
    if expected == 'RiskError':
        with pytest.raises(RiskError):
            resolved(source)
        return
    result = FeaturePlan({'f': resolved(source)}, {}).frame(frame_of(rows))[:, 0]
    np.testing.assert_array_equal(result, [math.nan if v is None else v for v in expected])


# ---------------------------------------------------------------- hostile text

HOSTILE = [
    '__import__("os").system("touch owned")', '().__class__.__bases__[0].__subclasses__()', 'open("owned", "w")', 'eval("1")', 'exec("1")',
    'print(1)', 'a.b', 'a[0]', 'a.__class__', '[a for a in b]', '{a: b}', '{a}', '[a]', '(a, b)', 'lambda: a', 'a if b else c', 'a and b',
    'not a', '~a', '+a', 'a ** 2', 'a % 2', 'a // 2', 'a @ b', 'a << 1', 'a | b', 'a is b', 'a in b', 'a < b < c', 'a<b>c', 'a!=b!=c',
    'f"{a}"', 'a := 1', '(a := 1)', 'await a', 'yield a', '*a', 'mean(*a)', 'mean(x=a)', 'mean(**a)', 'mean()', 'log()', 'log(a, b)',
    'where(a)', 'where(a, b, c, d)', 'col(a)', 'col("a", "b")', 'col()', 'col(1)', 'mean(a)(b)', '"text"', "'a' + 'b'", "'a' == 'b'",
    'True', 'None', '...', '1j', "b'x'", '1e999', '9' * 400, '9' * 1900, 'a; b', 'a\nb', 'a = 1', 'import os', '', ' ', '#', 'a #', '\\',
    '\x00', 'a\x00', '\ud800', '😀', 'a b', '1a', '((((', '))))', '1 if 1 else', 'a == == b', 'col("' + 'x' * 1900 + '")',
    '(' * 900 + 'a' + ')' * 900, '-' * 1900 + 'a', 'abs(' * 400 + 'a' + ')' * 400, 'a+' * 900 + 'a', 'a' * 2001, 'min(' + 'a,' * 900 + 'a)',
    'std(' * 20 + 'a' + ',a)' * 20, 'year(' * 50 + 'a' + ')' * 50, 'mean(' + ','.join(['a'] * 600) + ')',
    'std(' + ','.join(['a'] * 300) + ')',
]
HARMLESS = {'a #', 'col("' + 'x' * 1900 + '")'}


@pytest.mark.parametrize('source', HOSTILE, ids=lambda s: repr(s)[:40])
def test_hostile_text_is_refused_in_words(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begin = time.perf_counter()
    if source in HARMLESS:
        parse(source)
    else:
        with pytest.raises(RiskError, match='Cannot read the expression|may have .* operations') as caught:
            parse(source)
        assert 20 < len(str(caught.value)) < 1500
    assert time.perf_counter() - begin < 5
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('value', [None, 5, 1.5, [], {}, b'a', object()])
def test_what_is_no_text_is_refused(value):
    with pytest.raises(RiskError, match='Cannot read the expression'):
        parse(value)


PIECES = st.sampled_from([
    *FUNCTIONS, *BINARY.values(), 'a', 'b', 'col("a")', '(', ')', ',', '1', '2.5', "'x'", '-', '.', '[', ']', ' ', 'if', 'lambda', '=',
    ':', '"',
    '\n', 'None', '**', '0x', '1e', '\\', '#', '{', '}', '__class__', 'é', '!'])


@settings(max_examples=examples(250))
@given(st.text(max_size=60) | st.lists(PIECES, max_size=25).map(''.join) | st.lists(PIECES, max_size=15).map(' '.join))
def test_any_text_gives_a_tree_or_a_risk_error(source):
    try:
        tree = parse(source)
    except RiskError:
        return
    assert from_json(json.loads(json.dumps(tree.to_json()))).key == tree.key
    assert set(op for op in flat(tree.to_json())) <= {*OPERATIONS, *LEAVES}


def flat(tree: list) -> list[str]:
    "All operations of a tree in JSON."
    found, waiting = [], [tree]
    while waiting:
        node = waiting.pop()
        found.append(node[0])
        waiting += [a for a in node[1:] if isinstance(a, list)]
    return found


def test_nothing_in_the_module_can_run_text():
    "The parser is Python's, in the mode that only makes a syntax tree."
    source = ast.parse(open(language.__file__, encoding='utf-8').read())
    called = {n.func.id for n in ast.walk(source) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert not called & {'eval', 'exec', 'compile', '__import__', 'open', 'globals', 'locals', 'vars', 'setattr', 'delattr'}
    looked_up = [n for n in ast.walk(source) if isinstance(n, ast.Call) and getattr(n.func, 'id', '') == 'getattr']
    assert all('_OPERATORS' in ast.unparse(n) for n in looked_up)


# ---------------------------------------------------------------- Python functions

@pytest.mark.parametrize('function, source', [
    (lambda a, b: a + b * 2, 'a + b * 2'), (lambda a, b: 2 - a / b, '2 - a / b'), (lambda a: 1 / a, '1 / a'),
    (lambda a: -abs(a), '-abs(a)'),
    (lambda a, b: (a > b) * 1, '(a > b) * 1'), (lambda a, b: (a != b) + (a == 2), '(a != b) + (a == 2)'), (lambda a: 2 < a, 'a > 2'),
    (lambda a, b: language.where(a <= b, a, language.coalesce(b, 0)), 'where(a <= b, a, coalesce(b, 0))'),
    (lambda a, b: language.std(a, b) + language.mean(a, 1) + language.total(b), 'std(a, b) + mean(a, 1) + sum(b)'),
    (lambda a, b: language.minimum(a, b, 0) - language.maximum(a, b), 'min(a, b, 0) - max(a, b)'),
    (lambda d: language.year(d) * 12 + language.month(d), 'year(d) * 12 + month(d)'), (lambda job: job == 'nurse', "job == 'nurse'"),
    (lambda a: np.float64(2) * a + np.int64(3), '2 * a + 3'), (lambda a: sum([a, a]), '0 + a + a'),
    (lambda a: np.float32(0.5) / a, '0.5 / a'),
])
def test_a_traced_function_is_the_parsed_text(function, source):
    assert trace(function).key == parse(source).key


def branches(a):
    if a > 1:
        return a
    return 0


@pytest.mark.parametrize('function, words', [
    (branches, 'truth value'), (lambda a, b: a and b, 'truth value'), (lambda a: not a, 'truth value'),
    (lambda a: a > 1 > 0, 'truth value'),
    (lambda a: max(a, 1), 'truth value'), (lambda a: math.log(a), 'no expression'), (lambda a: np.log(a), 'no expression'),
    (lambda a: a ** 2, 'no expression'), (lambda a: a[0], 'no expression'), (lambda a: float(a), 'no expression'),
    (lambda a: 'text', 'Text'), (lambda a: None, 'finite numbers'), (lambda a: a + 'x', 'Text'), (lambda a: a + math.inf, 'finite'),
    (lambda a: a * 10**400, 'finite'), (lambda a: a + True, 'finite'),
    (lambda a: (a + 1) == 'x', 'column'), (lambda a: a < 'x', 'by == or !='), (lambda a: [a], 'finite'), (lambda a: a + None, 'finite'),
    (lambda a: language.mean(), 'at least one'), (lambda a: a in [1], 'truth value'), (lambda a: {a: 1}, 'no expression'),
])
def test_what_cannot_be_traced_is_said(function, words):
    with pytest.raises(RiskError, match=words):
        trace(function)


# ---------------------------------------------------------------- JSON, size and depth

@settings(max_examples=examples(40))
@given(WHOLE_LANGUAGE, ROWS)
def test_json_round_trip(tree, rows):
    expression = declared(tree)
    stored = json.dumps(expression.to_json(), allow_nan=False)
    again = from_json(json.loads(stored))
    assert again.key == expression.key and json.dumps(again.to_json()) == stored
    assert (again.size, again.depth, again.columns) == (expression.size, expression.depth, expression.columns)
    frame = frame_of(rows)
    assert FeaturePlan({'f': again}, {}).frame(frame).tobytes() == FeaturePlan({'f': expression}, {}).frame(frame).tobytes()


values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5) | st.sampled_from([*OPERATIONS, *LEAVES]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2), max_leaves=8)


@settings(max_examples=examples(150))
@given(st.lists(values, max_size=4) | values)
def test_any_json_gives_a_tree_or_a_risk_error(content):
    try:
        tree = from_json(content)
    except RiskError:
        return
    assert isinstance(tree, Expr) and set(flat(tree.to_json())) <= {*OPERATIONS, *LEAVES}


@pytest.mark.parametrize('content', [
    ['add', ['column', 'a']], ['add', ['column', 'a'], ['column', 'b'], ['column', 'c']], ['neg', 5], ['neg', 'a'], ['column'],
    ['column', 5],
    ['column', 'a', 'b'], ['level', 'a'], ['level', 'a', 5], ['level', ['column', 'a'], 'x'], ['number', 'a'], ['number', True], ['number'],
    ['number', float('nan')], ['number', float('inf')], ['number', 10**400], ['mean', ['column', 'a']], ['os.system', 'ls'],
    ['__class__', ['column', 'a']], [], {}, None, 'a', 5, [[]], [['add']],
])
def test_trees_that_are_none(content):
    with pytest.raises(RiskError):
        from_json(content)


def nested(levels: int, op: str = 'neg') -> list:
    tree: list = ['column', 'a']
    for _ in range(levels):
        tree = [op, tree]
    return tree


def test_depth_is_bounded():
    "Deep trees work up to the limit and are refused beyond it, by RiskError and never by RecursionError."
    deepest = from_json(nested(MAX_DEPTH - 1))
    assert deepest.depth == MAX_DEPTH
    assert compute(deepest, a=[1.0])[0] == (-1) ** (MAX_DEPTH - 1)
    assert from_json(deepest.to_json()).key == deepest.key
    for levels in (MAX_DEPTH, 500, 990, 10_000, 200_000):
        with pytest.raises(RiskError):
            from_json(nested(levels))
    for opening in ('[', '{"a":', '["neg",'):
        with pytest.raises(RiskError, match='no feature plan'):
            plan_from_json('{"version":1,"levels":{},"outputs":[["f",' + opening * 100_000)


def test_depth_is_bounded_for_python_too():
    widest = MAX_DEPTH - 1
    assert compute(parse('+'.join(['a'] * (widest + 1))), a=[1.0])[0] == widest + 1
    columns = {f'c{i}': [1.0] for i in range(250)}
    assert compute(language.total(*map(col, columns)), **columns)[0] == 250
    for function in (language.minimum, language.total, language.mean, language.count):
        with pytest.raises(RiskError, match='deep'):
            function(*[col(f'c{i}') for i in range(400)])


def test_size_is_bounded_where_parts_are_shared():
    "std(std(...)) doubles many times over: its 30 characters stood for billions of nodes."
    begin = time.perf_counter()
    for source in ('std(std(std(std(std(std(a,b),b),b),b),b),b)', 'month(month(month(month(d))))', 'mean(' * 15 + 'a' + ',a)' * 15):
        with pytest.raises(RiskError, match=f'{MAX_NODES:,} operations'):
            parse(source)
    doubled = col('a')
    with pytest.raises(RiskError, match='operations'):
        for _ in range(100):
            doubled = doubled * doubled
    derived = {'d0': 'a'} | {f'd{i}': f'd{i - 1} * d{i - 1}' for i in range(1, 40)}
    with pytest.raises(RiskError, match='operations'):
        feature_expressions(parse_contract(CONTRACT | {'derived': derived}))
    assert time.perf_counter() - begin < 20


def test_wide_statistics_fit():
    "What a data scientist writes fits: 24 months of payments."
    columns = {f'm{i}': [float(i)] for i in range(24)}
    assert compute(language.std(*map(col, columns)), **columns)[0] == pytest.approx(statistics.pstdev(range(24)))


# ---------------------------------------------------------------- the compiler

def subtrees(expression: Expr) -> set:
    "Distinct subtrees, by their JSON."
    found, waiting = set(), [expression.to_json()]
    while waiting:
        node = waiting.pop()
        found.add(json.dumps(node))
        waiting += [a for a in node[1:] if isinstance(a, list)]
    return found


@settings(max_examples=examples(25))
@given(st.lists(WHOLE_LANGUAGE, min_size=1, max_size=4))
def test_equal_parts_are_computed_once_and_in_order(found):
    expressions = [declared(t) for t in found] * 2
    plan = FeaturePlan({f'f{i}': e for i, e in enumerate(expressions)}, {})
    program = plan._program
    distinct = set().union(*map(subtrees, expressions))
    assert program.slots == len(distinct)
    filled = set(range(program.inputs + len(program.numbers)))
    for _, out, operands in program.steps:
        read = {i for slots in operands for i in (range(slots.start, slots.stop) if isinstance(slots, slice) else slots.tolist())}
        assert read <= filled, 'a step reads what no step before it has written'
        assert not filled & set(range(out.start, out.stop)), 'a slot is written twice'
        filled |= set(range(out.start, out.stop))
    assert filled == set(range(program.slots))
    assert program.outputs.tolist() == program.outputs.tolist()[:len(found)] * 2


def test_many_features_are_few_calls():
    "100 ratios are one call, whatever their columns."
    columns = [f'c{i}' for i in range(101)]
    program = compile_program([col(a) / col(b) for a, b in zip(columns, columns[1:], strict=False)], [('column', c) for c in columns])
    assert len(program.steps) == 1
    inputs = np.arange(1.0, 102)[:, None] * [[1, 2, 3]]
    np.testing.assert_array_equal(program.run(inputs), inputs[:-1] / inputs[1:])


def test_running_changes_no_input_and_keeps_no_state():
    program = compile_program([parse('a + b'), parse('max(a, 2)'), col('a')], [('column', 'a'), ('column', 'b')])
    inputs = np.array([[1.0, np.nan, -0.0], [2.0, 1.0, 0.0]])
    before = inputs.copy()
    first = program.run(inputs)
    first_copy = first.copy()
    program.run(inputs * 7)
    np.testing.assert_array_equal(inputs, before)
    np.testing.assert_array_equal(first, first_copy)


def test_no_warning_reaches_the_user(recwarn):
    numbers_ = np.array([[0.0, -1.0, 1e308, np.nan, 5e-324, -1e308]] * 2)
    sources = [f'{f}(a)' for f in ('log', 'log1p', 'exp', 'sqrt', 'floor', 'year', 'weekday')]
    sources += ['a / b', 'a * b', 'a + b', 'a - b', 'a < b', 'std(a, b)']
    compile_program([parse(s) for s in sources], [('column', 'a'), ('column', 'b')]).run(numbers_)
    FeaturePlan({'f': parse('a * 1e300')}, {}).frame({'a': numbers_[0]})
    assert not recwarn.list


def test_numbers_of_every_type():
    for value in (2, 2.0, np.int8(2), np.uint64(2), np.float32(2), np.float64(2), 10**23, sys.float_info.max, 2**1023):
        assert as_expr(value).args == (float(value),)
    for value in (True, np.True_, math.nan, math.inf, -math.inf, 10**400, np.float32('inf'), 1j, None, [], np.array([1.0])):
        with pytest.raises(RiskError, match='finite numbers'):
            as_expr(value)
