"""Random contracts, expressions and values for property tests, and a slow reading of expressions to compare with.

An expression is a nested tuple here: ('number', 2.0), ('column', name), ('level', category, level), ('isnull', category),
or (function or operator, operand, …). `text` writes it as a contract would, `slow` computes it for one row in plain Python.
"""
import datetime as dt
import keyword
import math
import os
from decimal import Decimal
from fractions import Fraction

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from riskscore.contract import Contract, parse_contract
from riskscore.core import RiskError
from riskscore.expressions import MAX_NODES
from riskscore.features import feature_expressions

MONEY = {'approve': {'good': 0.1, 'bad': -0.5}, 'refer': {'good': 0.05, 'bad': -0.1, 'fixed': -1.0}, 'decline': {'good': 0, 'bad': 0}}
NAMES = ['age', 'salario_neto', 'mes año', 'default.payment', 'días de atraso', 'class', 'say "hi"', "it's", 'back\\slash', '収入', 'None',
         '=1+1', 'a-b', 'x', 'Ω', '1', 'col', 'mean', 'tab\there', 'null', 'ß', ' edge ', '😀']
LEVELS = ['nurse', 'clerk', '1', '2', 'España', 'a "b"', 'XNA', '0.5', 'true', 'None', ' ']
UNARY = ('neg', 'abs', 'log', 'log1p', 'exp', 'sqrt', 'floor', 'isnull')
BINARY = {'add': '+', 'sub': '-', 'mul': '*', 'div': '/', 'lt': '<', 'le': '<=', 'gt': '>', 'ge': '>=', 'eq': '==', 'ne': '!='}
MANY = ('min', 'max', 'count', 'mean', 'sum', 'std')
DATE_PARTS = ('year', 'month', 'day', 'weekday')
NAN = float('nan')


def examples(count: int) -> int:
    "How many examples a property gets: RISKSCORE_EXAMPLES times as many where time is plenty."
    return count * int(os.environ.get('RISKSCORE_EXAMPLES', '1'))


# ---------------------------------------------------------------- contracts

def limits(low: float, high: float, whole: bool = False):
    "A range with open or closed ends, lowest first."
    end = st.none() | (st.integers(int(low), int(high)) if whole else st.floats(low, high))
    return st.tuples(end, end).map(lambda ends: sorted(ends) if None not in ends else list(ends))


def days(low: str, high: str):
    "Dates as ISO text."
    return st.dates(dt.date.fromisoformat(low), dt.date.fromisoformat(high)).map(dt.date.isoformat)


@st.composite
def columns(draw, kind=None):
    "The settings of one feature column, as YAML would give them."
    kind = kind or draw(st.sampled_from(['number', 'integer', 'category', 'flag', 'date']))
    found = {'kind': kind, 'role': draw(st.sampled_from(['feature'] * 4 + ['protected', 'excluded', 'leak']))}
    if kind in ('number', 'integer'):
        found |= {'range': draw(limits(-100, 100, kind == 'integer')), 'hard': draw(limits(-1000, 1000, kind == 'integer'))}
        found['special'] = draw(st.lists(st.sampled_from([365243, -1, 0, 7, 0.5, 'XNA', '99', 1e9]), max_size=3, unique_by=str))
    elif kind == 'date':
        ends = draw(st.tuples(days('1950-01-01', '2000-01-01'), days('2000-01-02', '2100-01-01')))
        found |= {'range': list(ends), 'hard': [None, draw(st.none() | days('2100-01-02', '2150-01-01'))]}
        found['special'] = draw(st.lists(st.sampled_from(['1900-01-01', '2199-12-31', 99991231, -1, 'never']), max_size=3, unique=True))
    elif kind == 'category':
        found |= {'levels': draw(st.lists(st.sampled_from(LEVELS), max_size=5, unique=True)),
                  'special': draw(st.lists(st.sampled_from(['XNA', 9, 'nurse', 0.5]), max_size=2, unique=True))}
        found['closed'] = bool(found['levels']) and draw(st.booleans())
    else:
        found |= {'levels': draw(st.sampled_from([['0', '1'], ['N', 'Y'], ['Y', 'N'], [1, 2], ['a b', 'Ñ']])),
                  'special': draw(st.lists(st.sampled_from(['?', 9, 0.5]), max_size=1))}
    found['null'] = draw(st.sampled_from([True, True, False]))
    return {k: v for k, v in found.items() if v not in ([], [None, None]) or k == 'levels' and kind == 'flag'}


@st.composite
def contents(draw, derived: int = 3, kinds: tuple[str, ...] = ()):
    "A contract as plain types: columns of many kinds and names, roles, derived features."
    names = draw(st.lists(st.sampled_from(NAMES), min_size=max(2, len(kinds)), max_size=7, unique=True))
    wanted = [*kinds, *[None] * (len(names) - len(kinds))]
    table = {name: draw(columns(kind)) for name, kind in zip(names, wanted, strict=True)}
    table[names[0]] |= {'role': 'feature'}
    table['bad'] = draw(st.sampled_from([
        {'kind': 'flag', 'role': 'target', 'bad': 1, 'null': False}, {'kind': 'category', 'role': 'target', 'levels': ['paid', 'late'], 'bad': 'late'},
        {'kind': 'integer', 'role': 'target', 'bad': 0}]))
    numbers = [n for n, c in table.items() if c['kind'] in ('number', 'integer', 'flag') and c['role'] not in ('target', 'leak')]
    dates = [n for n, c in table.items() if c['kind'] == 'date' and c['role'] != 'leak']
    categories = {n: c.get('levels') or LEVELS for n, c in table.items() if c['kind'] == 'category' and c['role'] not in ('target', 'leak')}
    for settings in (c for c in table.values() if c['role'] == 'feature'):
        ordered = settings['kind'] != 'category'
        directions = {'mutable': ['up', 'down', 'any'] if ordered else ['any'], 'monotone': ['up', 'down'] if ordered else []}
        settings |= {key: value for key, options in directions.items() if (value := draw(st.sampled_from([None, *options])))}
    features = {}
    for i in range(draw(st.integers(0, derived))):
        tree = draw(trees(numbers, categories, dates).filter(lambda t: len(text(t)) <= 2000))
        features[f'feature {i}'] = text(tree)
        numbers.append(f'feature {i}')
    amount = draw(st.sampled_from([None, *(n for n, c in table.items() if c['kind'] in ('number', 'integer') and c['role'] != 'target')]))
    found = {'name': 'generated', 'value': MONEY, 'rare': {'min_count': draw(st.integers(0, 3))}, 'amount': amount, 'derived': features,
             'columns': table}
    assume(not _too_large(found))
    return found


def _too_large(content: dict) -> bool:
    "Does a feature stand for more operations than an expression may have? The standard deviation of dates does."
    try:
        feature_expressions(parse_contract(content))
    except RiskError as error:
        return f'{MAX_NODES:,} operations' in str(error)
    return False


def contracts(**settings):
    "Random contracts, parsed."
    return contents(**settings).map(parse_contract)


# ---------------------------------------------------------------- raw values

class Odd:
    "An object of a user's own that cannot be hashed or compared."
    __hash__ = None

    def __eq__(self, other):
        raise TypeError('not comparable')


_WEST, _EAST = dt.timezone(dt.timedelta(hours=-14)), dt.timezone(dt.timedelta(hours=2))
JUNK = [
    None, NAN, '', 'abc', ' ', '365243', '99', 'XNA', '2020-13-01', '2020-01-01T00:00:00+25:00', 'nan', 'inf', '1e5', '\ud800',
    'long ' * 50, True, False, np.True_, np.False_, b'1', bytearray(b'x'), [1], [], (),
    (1, 2), {}, {'a': 1}, {1}, frozenset(), Odd(), object, 1j,
    10**400, -10**400, 10**4000, 2**53 + 1, 2**63, -2**63, Decimal('1.5'), Decimal('NaN'), Fraction(1, 3),
    0.0, -0.0, 5e-324, 1.8e308, -1e308, math.inf, -math.inf, 1e16, 1e22, 0.1 + 0.2,
    np.float64(0.25), np.float32(0.1), np.float16(2.5), np.longdouble('0.1'), np.longdouble('1e4000'), np.float64('nan'), np.float32('inf'),
    np.int8(7), np.uint64(2**64 - 1), np.int64(365243), np.str_('nurse'), np.str_(''), np.bytes_(b'x'),
    np.datetime64('2024-02-29'), np.datetime64('NaT'), np.datetime64('2024-02-29T13:45:00.123456789'), np.datetime64(10**17, 'D'),
    np.datetime64('1700-01-01'), np.timedelta64(5, 'D'), np.timedelta64(5, 'ns'), np.timedelta64('NaT'), dt.timedelta(5), dt.time(3),
    dt.date(2024, 2, 29), dt.date(1, 1, 1), dt.datetime(2024, 2, 29, 13, 45, 0, 1), dt.datetime(9999, 12, 31, tzinfo=_WEST),
    dt.datetime(2024, 3, 31, 2, 30, tzinfo=_EAST), np.array(5.0), np.array([1.0, 2.0]), np.array([]), np.array('x'),
]

SENSIBLE = {
    'number': st.floats(-120, 120) | st.integers(-1100, 1100) | st.floats(allow_nan=False, allow_infinity=False),
    'integer': st.integers(-1100, 1100) | st.integers(-120, 120).map(float) | st.sampled_from([365243, -1, 0, 7, 2**53 + 1]),
    'category': st.sampled_from(LEVELS) | st.integers(0, 10) | st.sampled_from([1.0, 0.5, 9, 9.0]) | st.text(max_size=5),
    'flag': st.sampled_from(['0', '1', 0, 1, 1.0, 'N', 'Y', 2, 'a b', 'Ñ', '?', 9, True, False]),
    'date': days('1900-01-01', '2199-12-31') | st.dates(dt.date(1850, 1, 1), dt.date(2250, 1, 1)) | st.integers(-26000, 85000)
            | st.datetimes(dt.datetime(1899, 12, 30), dt.datetime(2200, 1, 3))
            | st.sampled_from(['2020-01-01T12:00', 'never', 99991231, 20240115]),
}


def raw_values(kind: str):
    "A raw value of a field: mostly one that its kind can hold, sometimes anything."
    return st.integers(0, 5).flatmap(lambda i: st.sampled_from(JUNK) if i == 0 else SENSIBLE[kind])


@st.composite
def tables(draw, contract: Contract, max_rows: int = 12):
    "A raw table as a mapping of columns to lists; some columns are missing."
    rows = draw(st.integers(1, max_rows))
    present = [c for c in contract.columns.values() if draw(st.integers(0, 9)) or c.required]
    return {c.name: draw(st.lists(raw_values(c.kind), min_size=rows, max_size=rows)) for c in present} or {'bad': [1] * rows}


# ---------------------------------------------------------------- expressions

@st.composite
def trees(draw, numbers, categories=None, dates=(), depth: int = 4, wide: bool = True):
    "A random expression over given columns, from the whole grammar; `wide` functions do not nest, as their size would explode."
    categories = categories or {}
    leaf = (st.floats(-1e6, 1e6) | st.sampled_from([0.0, 1.0, -1.0, 2.0, 100.0, 1e300])).map(lambda v: ('number', v))
    if numbers:
        leaf |= st.sampled_from(numbers).map(lambda n: ('column', n))
    choices = ['leaf']
    choices += ['level', 'isnull category'] if categories else []
    choices += ['date part', 'date'] if dates else []
    choices += ['unary', 'binary', 'binary', 'where', 'coalesce'] if depth else []
    choices += ['many'] if depth and wide else []
    match draw(st.sampled_from(choices)):
        case 'leaf':
            return draw(leaf)
        case 'level':
            name = draw(st.sampled_from(sorted(categories)))
            return draw(st.sampled_from(['level', 'not level'])), name, draw(st.sampled_from(categories[name]))
        case 'isnull category':
            return 'isnull', ('column', draw(st.sampled_from(sorted(categories))))
        case 'date part':
            return draw(st.sampled_from(DATE_PARTS)), ('column', draw(st.sampled_from(dates)))
        case 'date':
            return 'column', draw(st.sampled_from(dates))
        case 'many':
            size = draw(st.integers(1, 3))
            return draw(st.sampled_from(MANY)), *(draw(trees(numbers, categories, dates, 1, wide=False)) for _ in range(size))
        case shape:
            ops = {'unary': UNARY, 'binary': tuple(BINARY), 'where': ('where',), 'coalesce': ('coalesce',)}[shape]
            size = {'unary': 1, 'binary': 2, 'where': 3, 'coalesce': 2}[shape]
            return draw(st.sampled_from(ops)), *(draw(trees(numbers, categories, dates, depth - 1, wide)) for _ in range(size))


def text(tree) -> str:
    "An expression as a contract writes it."
    op, *operands = tree
    if op == 'number':
        return repr(operands[0])
    if op == 'column':
        return _column(operands[0])
    if op in ('level', 'not level'):
        return f'({_column(operands[0])} {"==" if op == "level" else "!="} {operands[1]!r})'
    parts = [text(o) for o in operands]
    if op in BINARY:
        return f'({parts[0]} {BINARY[op]} {parts[1]})'
    return f'(-{parts[0]})' if op == 'neg' else f'{op}({", ".join(parts)})'


def _column(name: str) -> str:
    "A column by its bare name where Python's grammar allows, and by col(...) elsewhere."
    return name if name.isidentifier() and name.isascii() and not keyword.iskeyword(name) else f'col({name!r})'


def slow(tree, row) -> float:
    "The value of an expression for one row, by its meaning and step by step; NaN is null. Categories are text or None."
    op, *operands = tree
    if op == 'number':
        return float(operands[0])
    if op == 'column':
        return row[operands[0]]
    if op in ('level', 'not level'):
        value = row[operands[0]]
        return NAN if value is None else float((value == operands[1]) == (op == 'level'))
    values = [slow(o, row) for o in operands]
    known = [v for v in values if v is not None and v == v]
    if op in _SKIPPING:
        return _finite(lambda: _SKIPPING[op](values, known))
    if op == 'where':
        return NAN if values[0] != values[0] else values[1] if values[0] != 0 else values[2]
    if len(known) < len(values):
        return NAN
    return _finite(lambda: _PLAIN[op](*values))


def _finite(compute) -> float:
    "What is not finite or cannot be computed is null."
    try:
        value = float(compute())
    except (ZeroDivisionError, ValueError, OverflowError):
        return NAN
    return value if math.isfinite(value) else NAN


def _numpy(ufunc):
    "Logarithm and exponential by numpy's scalar: math.exp differs from np.exp in the last bit of 5% of values."
    def compute(x):
        with np.errstate(all='ignore'):
            return float(ufunc(np.float64(x)))
    return compute


def _sum(known) -> float:
    "From left to right, each step finite; Python's own sum compensates from 3.12 on."
    total = 0.0
    for v in known:
        total = _finite(lambda a=total, b=v: a + b)
    return total


def _mean(known) -> float:
    return _sum(known) / len(known) if known else NAN


def _std(values) -> float:
    centre = _finite(lambda: _mean([v for v in values if v == v]))
    squares = [_finite(lambda d=v - centre: d * d) for v in values]
    return math.sqrt(_finite(lambda: _mean([s for s in squares if s == s])))


def _moment(days_: float) -> dt.datetime:
    return dt.datetime(1970, 1, 1) + dt.timedelta(days=math.floor(days_))


_SKIPPING = {
    'isnull': lambda values, known: len(known) == 0, 'count': lambda values, known: len(known),
    'coalesce': lambda values, known: values[0] if values[0] == values[0] else values[1],
    'min': lambda values, known: min(known, default=NAN), 'max': lambda values, known: max(known, default=NAN),
    'mean': lambda values, known: _mean(known),
    'sum': lambda values, known: _sum(known) if known else NAN, 'std': lambda values, known: _std(values),
}
_PLAIN = {
    'add': lambda a, b: a + b, 'sub': lambda a, b: a - b, 'mul': lambda a, b: a * b, 'div': lambda a, b: a / b, 'neg': lambda a: -a,
    'lt': lambda a, b: a < b, 'le': lambda a, b: a <= b, 'gt': lambda a, b: a > b, 'ge': lambda a, b: a >= b,
    'eq': lambda a, b: a == b, 'ne': lambda a, b: a != b, 'abs': abs, 'sqrt': math.sqrt, 'floor': math.floor,
    'log': _numpy(np.log), 'log1p': _numpy(np.log1p), 'exp': _numpy(np.exp),
    'year': lambda d: _moment(d).year, 'month': lambda d: _moment(d).month,
    'day': lambda d: _moment(d).day, 'weekday': lambda d: _moment(d).weekday(),
}


# ---------------------------------------------------------------- whole portfolios, by a seed

def portfolio(seed: int, rows: int) -> tuple[dict, dict[str, list]]:
    "A contract over columns of every kind, with odd names, and a table that fits it, whose outcome depends on the columns."
    rng = np.random.default_rng(seed)
    names = rng.permutation(NAMES).tolist()
    kinds = ['number', 'number', 'integer', 'category', 'flag', 'date',
             *rng.choice(['number', 'integer', 'category', 'flag', 'date'], rng.integers(0, 5)).tolist()]
    table, raw, risk = {}, {}, rng.normal(0, 0.3, rows)
    for kind in kinds:
        name = names.pop()
        table[name], raw[name], effect = _column_of(kind, rows, rng)
        risk += rng.choice([-1, 1]) * rng.uniform(0.3, 1.2) * effect
    roles = {k: [n for n, c in table.items() if c['kind'] == k] for k in kinds}
    table |= {'loan id': {'kind': 'integer', 'role': 'id'}, 'asked': {'kind': 'date', 'role': 'time'},
              'sum': {'kind': 'number', 'hard': [0, None], 'null': False}}
    start = dt.date(2021, 1, 1)
    raw |= {'loan id': list(range(1000, 1000 + rows)), 'asked': [(start + dt.timedelta(days=int(d))).isoformat() for d in np.sort(rng.integers(0, 1200, rows))],
            'sum': np.round(rng.lognormal(8, 1, rows), 2).tolist()}
    good, bad = [['0', '1'], ['1', '0'], ['paid', 'late'], ['N', 'S']][rng.integers(4)]
    table['outcome'] = {'kind': rng.choice(['flag', 'category']).item(), 'role': 'target', 'levels': [good, bad], 'bad': bad}
    raw['outcome'] = np.where(rng.random(rows) < 1 / (1 + np.exp(1.3 - 1.5 * risk)), bad, good).tolist()
    if rng.random() < 0.5:
        table['score of the bureau'] = {'kind': 'number', 'role': 'leak'}
        raw['score of the bureau'] = risk.round(3).tolist()
    return {'name': f'generated_{seed}', 'title': 'Generated', 'value': MONEY, 'currency': 'EUR', 'amount': [None, 'sum'][rng.integers(2)],
            'rare': {'min_count': int(rng.integers(0, 30))}, 'derived': _derived(roles, table), 'columns': table,
            'split': {'by': rng.choice(['random', 'time', 'order']).item(), 'future': 0.25},
            'cv': {'by': rng.choice(['stratified', 'time']).item(), 'folds': 3, 'seed': 1}}, raw


def _column_of(kind: str, rows: int, rng) -> tuple[dict, list, np.ndarray]:
    "Settings, raw values and effect on the risk of one column."
    effect = rng.normal(size=rows)
    words = {'words': {'en': 'Something', 'es': 'Algo'}, 'group': rng.choice(['a', 'b']).item()}
    if kind in ('number', 'integer'):
        scale, shift = 10.0 ** rng.integers(-2, 6), rng.choice([0, 5])
        values = (effect + shift) * scale
        values = np.rint(values * 100 / scale) if kind == 'integer' else values.round(6)
        settings, values = {'range': [float(v) for v in np.quantile(values, [0.01, 0.99])], 'special': [-999999, 'unknown']}, values.tolist()
        values = ['unknown' if u < 0.01 else -999999 if u < 0.05 else v for v, u in zip(values, rng.random(rows), strict=True)]
    elif kind == 'category':
        levels = rng.permutation([v for v in LEVELS if v.strip() and v != 'XNA' and v != 'None']).tolist()[:rng.integers(3, 8)]
        share = rng.dirichlet(np.full(len(levels), 0.8))
        codes = rng.choice(len(levels), rows, p=share)
        effect, values = rng.normal(size=len(levels))[codes], [levels[c] for c in codes]
        settings = {'levels': levels[:-1] if rng.random() < 0.5 else levels, 'special': ['XNA']}
    elif kind == 'flag':
        levels = [['0', '1'], ['N', 'Y'], ['no es', 'sí es']][rng.integers(3)]
        values, settings = [levels[int(e > 0)] for e in effect], {'levels': levels}
    else:
        values = [(dt.date(1990, 6, 1) + dt.timedelta(days=int(1000 * e))).isoformat() for e in effect]
        settings = {'range': ['1980-01-01', '2000-12-31'], 'temporal': True}
    nulls = rng.random(rows) < rng.choice([0, 0.02, 0.5])
    settings |= {} if nulls.any() or 'special' in settings else {'null': False}
    return {'kind': kind, **settings, **words}, [None if n else v for v, n in zip(values, nulls, strict=True)], np.where(nulls, 0, effect)


def _derived(roles: dict[str, list[str]], table: dict) -> dict[str, str]:
    "A feature of each sort."
    a, b = (_column(n) for n in roles['number'][:2])
    whole, flag, date, word = (_column(roles[k][0]) for k in ('integer', 'flag', 'date', 'category'))
    level = table[roles['category'][0]]['levels'][0]
    return {'ratio': f'{a} / {b}', 'log size': f'log1p(abs({whole}))', 'none': f'isnull({word})', 'is it': f'{word} == {level!r}',
            'month': f'month({date})', 'spread': f'std({a}, {b}, {whole})', 'both': f'where({flag} == 1, {a}, coalesce({b}, 0))',
            'again': 'col("ratio") * col("month")'}
