"""No train/serve skew: one application gives the same bits, and the same refusals, as its row of a table.

Random contracts over all kinds, random expressions over the whole grammar, random values of every type; then all rows of the real tables.
"""
import csv
import datetime as dt
import gzip
import hashlib
import json
import struct
import subprocess
import sys
from pathlib import Path

import lightgbm as lgb
import numpy as np
import pytest
from generators import JUNK, contracts, examples, raw_values, tables
from hypothesis import given, settings
from hypothesis import strategies as st

from riskscore.bundle import Scorer
from riskscore.calibration import Calibration
from riskscore.contract import Checked, Contract, check_frame, check_record, load_contract, parse_contract
from riskscore.core import RiskError, frame_rows
from riskscore.datasets import read_frames
from riskscore.feature_sets import feature  # noqa: F401  # declares the features that contracts name
from riskscore.features import FeaturePlan, fit_plan, plan_from_json, plan_to_json
from riskscore.policy import Policy
from riskscore.synthetic import write_home_credit
from riskscore.trees import Trees

TABLE_RULES = {'unknown', 'missing'}


# ---------------------------------------------------------------- what is compared

def bits(value) -> object:
    "A typed value that can be compared to the bit; all nulls are alike."
    return value if value is None or isinstance(value, str) else 'null' if value != value else struct.pack('d', value)


def rows_of(raw: dict, missing: set = frozenset()) -> list[dict]:
    "A raw table as applications; of a null that is listed in `missing` the field is left out."
    rows = len(next(iter(raw.values())))
    return [{n: v[i] for n, v in raw.items() if (n, i) not in missing} for i in range(rows)]


def broken(checked, row: int) -> set:
    "Column, rule and severity of what is wrong with one row of a table."
    return {(v.column, v.rule, v.severity) for v in checked.violations if v.rule not in TABLE_RULES and row + 1 in v.rows}


def assert_same_reading(contract: Contract, raw: dict, records: list[dict]):
    "Typed values and violations of a table are those of its applications; gives the typed table and the typed applications."
    checked, typed = check_frame(contract, raw), []
    for i, record in enumerate(records):
        values, violations = check_record(contract, record)
        assert {n: bits(v) for n, v in values.items()} == {n: bits(c[i]) for n, c in checked.frame.items()}
        found = {(v.column, 'null' if v.rule == 'missing' else v.rule, v.severity) for v in violations}
        assert found == broken(checked, i)
        assert any(v.severity == 'hard' for v in violations) == checked.bad_rows[i]
        typed.append(values)
    return checked, typed


def assert_same_features(plan: FeaturePlan, frame: dict, records: list[dict]):
    "Features of a table, in blocks of any size, are to the bit those of its applications."
    matrix = plan.frame(frame)
    assert matrix.dtype == np.float32 and matrix.flags.c_contiguous and not np.isinf(matrix).any()
    assert b''.join(plan.record(r).tobytes() for r in records) == matrix.tobytes()
    for block in (1, 7):
        assert plan.frame(frame, block=block).tobytes() == matrix.tobytes()
    return matrix


def tiny_scorer(contract: Contract, plan: FeaturePlan, matrix: np.ndarray, seed: int = 0) -> Scorer:
    "A scorer with a model of random outcomes over rows of a table and noise, so that every feature may matter."
    rng = np.random.default_rng(seed)
    noise = rng.normal(0, 50, (60, len(plan.names))).astype(np.float32)
    noise[:, plan.categorical] = rng.integers(0, 4, (60, len(plan.categorical)))
    rows = np.concatenate([matrix, noise])
    outcome = (rng.random(len(rows)) < 0.5).astype(float)
    data = lgb.Dataset(rows, outcome, categorical_feature=plan.categorical, params={'verbosity': -1, 'min_data_in_bin': 1})
    settings_ = {'objective': 'binary', 'num_leaves': 4, 'min_data_in_leaf': 2, 'verbosity': -1, 'num_threads': 1, 'seed': seed}
    trees = Trees('lightgbm', lgb.train(settings_, data, 5).model_to_string())
    policy = Policy(0.4, 0.6, contract.value, contract.currency, contract.amount)
    return Scorer('test', contract, plan, trees, Calibration(0.1, 1.3), policy, {})


def assert_same_scores(scorer: Scorer, checked, records: list[dict]):
    "Scores of a table are to the bit those of its applications, and a row is bad when its application is refused."
    table = scorer.frame(checked.frame)
    for i, record in enumerate(records):
        if checked.bad_rows[i]:
            with pytest.raises(RiskError, match='does not fit the contract'):
                scorer.record(record)
            continue
        one = scorer.record(record)
        assert struct.pack('d', one['pd']) == struct.pack('d', table['pd'][i])
        assert (one['score'], one['decision']) == (table['score'][i], table['decision'][i])
        assert bits(float('nan') if one['value'] is None else one['value']) == bits(table['value'][i])


# ---------------------------------------------------------------- random contracts, expressions and values

@st.composite
def cases(draw, rows: int = 10, **options):
    contract = draw(contracts(**options))
    raw = draw(tables(contract, rows))
    nulls = [(n, i) for n, v in raw.items() for i, value in enumerate(v) if value is None]
    return contract, raw, set(draw(st.lists(st.sampled_from(nulls), unique=True))) if nulls else set()


@settings(max_examples=examples(80))
@given(cases())
def test_records_equal_rows(case):
    contract, raw, missing = case
    records = rows_of(raw, missing)
    checked, typed = assert_same_reading(contract, raw, records)
    plan = fit_plan(contract, [checked.frame])
    matrix = assert_same_features(plan, checked.frame, typed)
    again = plan_from_json(plan_to_json(plan))
    assert again.frame(checked.frame).tobytes() == matrix.tobytes()
    unseen = check_frame(contract, {n: v[::-1] for n, v in raw.items()}).frame
    assert_same_features(fit_plan(contract, [{n: v[:1] for n, v in checked.frame.items()}]), unseen, typed[::-1])


@settings(max_examples=examples(25))
@given(cases(derived=2))
def test_scores_of_records_equal_scores_of_rows(case):
    contract, raw, missing = case
    records = rows_of(raw, missing)
    checked = check_frame(contract, raw)
    plan = fit_plan(contract, [checked.frame])
    assert_same_scores(tiny_scorer(contract, plan, plan.frame(checked.frame)), checked, records)


EVERY_KIND = parse_contract({
    'name': 'kinds', 'value': {'approve': {'good': 1, 'bad': -1}, 'refer': {'good': 1, 'bad': -1}, 'decline': {'good': 0, 'bad': 0}},
    'columns': {
        'number': {'kind': 'number', 'range': [-50, 50], 'hard': [-100, 1e30], 'special': [7, 'XNA']},
        'integer': {'kind': 'integer', 'range': [0, None], 'special': [365243, '99']},
        'category': {'kind': 'category', 'levels': ['nurse', '1', '2.5'], 'special': [9]},
        'closed': {'kind': 'category', 'levels': ['nurse', '1', 'True'], 'closed': True},
        'flag': {'kind': 'flag', 'special': ['?', 9], 'null': False},
        'words': {'kind': 'flag', 'levels': ['N', 'Y']},
        'date': {'kind': 'date', 'range': ['2000-01-01', None], 'special': ['2199-12-31', 99991231]},
        'strict': {'kind': 'date', 'hard': [None, '2030-01-01'], 'null': False},
        'bad': {'kind': 'flag', 'role': 'target', 'bad': 1},
        'late': {'kind': 'category', 'role': 'excluded', 'null': False}},
    'derived': {'year': 'year(date)', 'ratio': 'number / integer', 'nurse': "category == 'nurse'", 'none': 'isnull(closed)'}})


@pytest.mark.parametrize('value', JUNK, ids=lambda v: f'{type(v).__name__} {str(v)[:30]!a}')
def test_every_odd_value_in_every_kind(value):
    "One odd value alone in a column, as a list and as an array of objects, reads as in an application."
    record = dict.fromkeys(EVERY_KIND.columns, value)
    array = np.empty(1, dtype=object)
    array[0] = value
    for raw in (dict.fromkeys(EVERY_KIND.columns, [value]), dict.fromkeys(EVERY_KIND.columns, array)):
        checked, typed = assert_same_reading(EVERY_KIND, raw, [record])
        assert_same_features(fit_plan(EVERY_KIND, [checked.frame]), checked.frame, typed)
        of_record = {v.column: (v.example, v.expected) for v in check_record(EVERY_KIND, record)[1]}
        assert of_record == {v.column: (v.example, v.expected) for v in checked.violations}
        assert all(v.message for v in checked.violations)


ARRAYS = {
    'bool': np.array([True, False]), 'int8': np.array([9, -1], np.int8), 'uint64': np.array([2**64 - 1, 9], np.uint64),
    'int64': np.array([365243, 2**53 + 1]), 'float16': np.array([0.1, np.nan, np.inf], np.float16),
    'float32': np.array([0.1, 9, np.nan, -np.inf, -0.0], np.float32), 'longdouble': np.array(['0.1', '1e4000', 'nan'], np.longdouble),
    'float64': np.array([0.1, 7.0, 365243.0, np.nan, np.inf, -0.0, 2.5, 1e300]), 'big-endian': np.array([7.0, 1.5], '>f8'),
    'strided': np.arange(20.0)[::3], 'reversed': np.arange(5)[::-1], 'text': np.array(['nurse', '1', '', 'XNA', '?']),
    'bytes': np.array([b'nurse', b'1']), 'complex': np.array([1 + 0j]), 'empty': np.array([]), 'no text': np.array([], 'U5'),
    'days': np.array(['2024-02-29', 'NaT', '1700-01-01', '2199-12-31'], 'M8[D]'), 'months': np.array(['2024-02', '1999-12'], 'M8[M]'),
    'nanoseconds': np.array(['2024-02-29T13:45:00.123456789', 'NaT'], 'M8[ns]'), 'far': np.array([10**17, -10**17, 10**12], 'M8[D]'),
    'hours': np.array([5, 'NaT'], 'm8[h]'), 'elapsed': np.array([5], 'm8[ns]'),
    'objects': np.array([1, 'nurse', None, 2.5, dt.date(2024, 2, 29), [1], {}], dtype=object),
}


@pytest.mark.filterwarnings('ignore:overflow encountered in cast')  # of 1e4000, which is then refused
@pytest.mark.parametrize('array', ARRAYS.values(), ids=ARRAYS)
def test_arrays_of_every_type(array):
    "A column of any array type reads as its elements do, be they numpy's scalars or Python's."
    raw = dict.fromkeys(EVERY_KIND.columns, array)
    assert_same_reading(EVERY_KIND, raw, [dict.fromkeys(EVERY_KIND.columns, v) for v in array])
    if array.dtype.kind not in 'mM':  # of dates tolist may make integers
        assert_same_reading(EVERY_KIND, raw, [dict.fromkeys(EVERY_KIND.columns, v) for v in array.tolist()])
        raw = dict.fromkeys(EVERY_KIND.columns, array.tolist())
        assert_same_reading(EVERY_KIND, raw, [dict.fromkeys(EVERY_KIND.columns, v) for v in array])


@settings(max_examples=examples(50))
@given(contracts(derived=0), st.data())
def test_tables_as_any_container(contract, data):
    "Lists, tuples and arrays of objects of the same values read alike."
    raw = data.draw(tables(contract))
    first = check_frame(contract, raw)
    arrays = {}
    for name, values in raw.items():
        arrays[name] = np.empty(len(values), dtype=object)
        for i, value in enumerate(values):
            arrays[name][i] = value
    for other in ({n: tuple(v) for n, v in raw.items()}, arrays):
        checked = check_frame(contract, other)
        assert [v.message for v in checked.violations] == [v.message for v in first.violations]
        assert all([bits(a) for a in checked.frame[n]] == [bits(b) for b in first.frame[n]] for n in contract.columns)


@settings(max_examples=examples(60))
@given(contracts(derived=0), st.data())
def test_a_missing_or_unknown_column_refuses_table_and_record(contract, data):
    raw = data.draw(tables(contract, max_rows=2))
    left = {n: v for n, v in raw.items() if n != data.draw(st.sampled_from(sorted(raw)))}
    left |= data.draw(st.sampled_from([{}, {'surprise': [1] * len(next(iter(raw.values())))}]))
    of_table = {(v.column, v.rule) for v in check_frame(contract, left).violations if v.rule in TABLE_RULES}
    for record in rows_of(left) if left else []:
        assert {(v.column, v.rule) for v in check_record(contract, record)[1] if v.rule in TABLE_RULES} == of_table


@settings(max_examples=examples(100))
@given(st.sampled_from(sorted(EVERY_KIND.columns)), st.data())
def test_equal_values_of_other_types_read_alike(name, data):
    "A number as Python's or numpy's integer or float is the same value."
    number = data.draw(st.integers(-2**53, 2**53) | st.sampled_from([0, 1, 7, 9, 99, 365243]))
    forms = [number, float(number), np.int64(number), np.float64(number), np.longdouble(number)]
    readings = [check_record(EVERY_KIND, {name: form}) for form in forms]
    assert len({bits(typed[name]) for typed, _ in readings}) == 1
    assert len({tuple((v.column, v.rule) for v in violations) for _, violations in readings}) == 1


@settings(max_examples=examples(100))
@given(st.data())
def test_reading_twice_changes_nothing(data):
    "A typed value is a raw value of the same meaning: what was read can be read again."
    name = data.draw(st.sampled_from(['number', 'integer', 'category', 'date']))
    value = data.draw(raw_values(EVERY_KIND.columns[name].kind))
    typed, violations = check_record(EVERY_KIND, {name: value})
    again, repeated = check_record(EVERY_KIND, {name: typed[name]})
    if not any(v.column == name and v.severity == 'hard' for v in violations):
        assert bits(again[name]) == bits(typed[name])
        assert {(v.column, v.rule) for v in repeated} == {(v.column, v.rule) for v in violations}


# ---------------------------------------------------------------- shapes, blocks, processes

def all_operations(name: str = 'x', other: str = 'y') -> dict[str, str]:
    "Every function and operator over two columns."
    one = ['log', 'log1p', 'exp', 'sqrt', 'floor', 'abs', 'isnull', 'year', 'month', 'day', 'weekday']
    two = ['min', 'max', 'mean', 'sum', 'std', 'count', 'coalesce']
    found = {f: f'{f}({name})' for f in one} | {f: f'{f}({name}, {other})' for f in two}
    found |= {f'op {o}': f'{name} {o} {other}' for o in ('+', '-', '*', '/', '<', '<=', '>', '>=', '==', '!=')}
    found |= {'neg': f'-{name}', 'where': f'where({name}, {other}, 2)'}
    return found | {'deep': f'exp(log({name} * {other}) / 3) + log1p(sqrt({other}))'}


def operations_plan() -> FeaturePlan:
    contract = parse_contract({'name': 'ops', 'value': EVERY_KIND.value, 'derived': all_operations(), 'columns': {'x': {}, 'y': {}}})
    return fit_plan(contract, [])


def hard_numbers(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    "Numbers of all sizes, with zeros of both signs, nulls, subnormals and ties."
    rng = np.random.default_rng(seed)
    special = np.array([0.0, -0.0, np.nan, 1.0, -1.0, 5e-324, 1.7e308, -1.7e308, 0.5, 710.0, -745.2, 1e-10, 2.0**53])
    def column():
        values = rng.normal(size=rows) * 10.0 ** rng.integers(-12, 13, rows)
        return np.where(rng.random(rows) < 0.3, rng.choice(special, rows), values)
    return {'x': column(), 'y': column()}


@pytest.mark.parametrize('rows', [*range(1, 66), 127, 128, 129, 2047, 2048, 2049, 4097])
def test_every_operation_for_every_length_of_array(rows):
    "Vectorised loops handle the last few elements differently: none of it may show."
    plan, table = operations_plan(), hard_numbers(rows, rows)
    matrix = plan.frame(table)
    one_by_one = np.concatenate([plan.frame({n: v[i:i + 1] for n, v in table.items()}) for i in range(rows)])
    assert matrix.tobytes() == one_by_one.tobytes()
    strided = {n: np.repeat(v, 3)[::3] for n, v in table.items()}
    unaligned = {n: np.frombuffer(b'\0' + v.tobytes(), dtype=np.uint8)[1:].view(np.float64) for n, v in table.items()}
    backwards = {n: v[::-1].copy()[::-1] for n, v in table.items()}
    for other in (strided, unaligned, backwards):
        assert plan.frame(other).tobytes() == matrix.tobytes()
    for block in (7, 2048):
        assert plan.frame(table, block=block).tobytes() == matrix.tobytes()


@pytest.mark.parametrize('ufunc', [np.log, np.log1p, np.exp, np.sqrt, np.floor], ids=lambda f: f.__name__)
def test_numpy_gives_one_value_in_contiguous_memory(ufunc):
    """The promise that the plan builds on: in contiguous memory a ufunc's value does not depend on length or place.

    It may depend on the stride: np.exp and np.log1p of a reversed array can differ in the last bit. So the plan computes in its own buffer.
    """
    values = hard_numbers(65)['x']
    with np.errstate(all='ignore'):
        alone = np.array([ufunc(values[i:i + 1])[0] for i in range(65)])
        for length in range(1, 66):
            np.testing.assert_array_equal(ufunc(values[:length]), alone[:length])
            np.testing.assert_array_equal(ufunc(values[65 - length:]), alone[65 - length:])
            np.testing.assert_array_equal(ufunc(values[:length, None])[:, 0], alone[:length])
            out = np.empty((3, length))
            np.testing.assert_array_equal(ufunc(np.tile(values[:length], (3, 1)), out=out), np.tile(alone[:length], (3, 1)))


def test_signed_zeros_are_one_value():
    "fmin(0.0, -0.0) is either, depending on the place in the array; the plan gives 0.0."
    plan = fit_plan(parse_contract({'name': 'z', 'value': EVERY_KIND.value, 'columns': {'x': {}, 'y': {}},
                                    'derived': {'low': 'min(x, y)', 'high': 'max(x, y)', 'product': 'x * -1', 'floor': 'floor(y)'}}), [])
    table = {'x': np.array([0.0, -0.0] * 40), 'y': np.array([-0.0, 0.0] * 40)}
    assert not np.signbit(plan.frame(table)).any()


PROGRAM = '''
import hashlib, json, sys
sys.path[:0] = json.loads(sys.argv[1])
from test_skew import hard_numbers, operations_plan
print(hashlib.sha256(operations_plan().frame(hard_numbers(3000)).tobytes()).hexdigest())
'''


def test_another_process_gives_the_same_bits():
    here = hashlib.sha256(operations_plan().frame(hard_numbers(3000)).tobytes()).hexdigest()
    done = subprocess.run([sys.executable, '-c', PROGRAM, json.dumps(sys.path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == here


def test_empty_tables():
    plan, empty = operations_plan(), {'x': np.array([]), 'y': np.array([])}
    assert plan.frame(empty).shape == (0, len(plan.names))
    checked = check_frame(EVERY_KIND, {n: [] for n in EVERY_KIND.columns})
    assert frame_rows(checked.frame) == 0 and not checked.violations
    scorer = tiny_scorer(EVERY_KIND, fit_plan(EVERY_KIND, [checked.frame]), np.empty((0, 12), dtype=np.float32))
    assert all(len(v) == 0 for v in scorer.frame(checked.frame).values())


# ---------------------------------------------------------------- real and synthetic rows

def plain_rows(path: Path) -> list[dict]:
    "A file as a client of the service would send it: numbers as numbers, words as text, an empty cell as null."
    if path.suffix == '.xlsx':
        from openpyxl import load_workbook
        cells = load_workbook(path, read_only=True).active.iter_rows(values_only=True)
        header = [str(name).strip() for name in next(cells)]
        return [dict(zip(header, map(number_or_text, row), strict=True)) for row in cells if any(v is not None for v in row)]
    with (gzip.open if path.suffix == '.gz' else open)(path, 'rt', encoding='utf-8', newline='') as file:
        return [{n: number_or_text(v) for n, v in row.items()} for row in csv.DictReader(file)]


def number_or_text(cell):
    "Numbers written as text, as spreadsheets also have them, become numbers."
    try:
        return float(cell) if isinstance(cell, str) else cell
    except ValueError:
        return cell or None


def assert_no_skew(contract: Contract, path: Path, score_every: int):
    "All rows of a file: as the pipeline reads them and as applications, to the bit."
    batches = list(read_frames(path, contract))
    frame = {n: np.concatenate([b.frame[n] for b in batches]) for n in contract.columns}
    bad = np.concatenate([b.bad_rows for b in batches])
    records = plain_rows(path)
    assert len(records) == len(bad)
    read = [check_record(contract, r) for r in records]
    assert [any(v.severity == 'hard' for v in violations) for _, violations in read] == bad.tolist()
    for name, column in frame.items():
        of_records = np.array([typed[name] for typed, _ in read], dtype=column.dtype)
        if column.dtype == np.float64:
            of_records, column = (np.where(np.isnan(v), np.nan, v).view(np.int64) for v in (of_records, column))  # all nulls are alike
        assert of_records.tolist() == column.tolist(), name
    plan = fit_plan(contract, [frame])
    matrix = plan.frame(frame)
    assert b''.join(plan.record(typed).tobytes() for typed, _ in read) == matrix.tobytes()
    assert plan.frame(frame, block=997).tobytes() == matrix.tobytes()
    scorer = tiny_scorer(contract, plan, matrix[:2000])
    some = range(0, len(records), score_every)
    checked = Checked({n: v[some] for n, v in frame.items()}, [], bad[some])
    assert_same_scores(scorer, checked, [records[i] for i in some])
    return len(records), len(plan.names)


REAL = {'home_credit': 'home_credit_sample/application_train.csv.gz', 'taiwan': 'taiwan/UCI_Credit_Card.csv',
        'pi_m5': 'pi_m5/Base_de_datos.xlsx'}


@pytest.mark.parametrize('name', REAL)
def test_all_rows_of_real_tables(name, real_data, root):
    rows, features = assert_no_skew(load_contract(root / f'data/contracts/{name}.yaml'), real_data / REAL[name], score_every=50)
    assert rows > 10_000 and features > 15


def test_synthetic_rows(tmp_path, root):
    write_home_credit(tmp_path / 'table.csv', 1_500, seed=5)
    rows, _ = assert_no_skew(load_contract(root / 'data/contracts/home_credit.yaml'), tmp_path / 'table.csv', score_every=3)
    assert rows == 1_500
