"""The scorecard: its bins are monotone, its points add up to the score, and its SQL gives Python's points on every row of every table."""
import re
import sqlite3
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pytest
from generators import NAMES, contracts, examples, portfolio, tables
from hypothesis import given, settings
from hypothesis import strategies as st

from riskscore.additive import Additive, Term, additive_from_bytes
from riskscore.binning import BinRules, fit_bins
from riskscore.calibration import Calibration, fit_calibration, sigmoid
from riskscore.contract import check_frame, load_contract, parse_contract
from riskscore.datasets import read_frames
from riskscore.feature_sets import feature  # noqa: F401  # declares the features that contracts name
from riskscore.features import feature_meanings, fit_plan
from riskscore.monotone import constrain, sweep
from riskscore.policy import score_points
from riskscore.ranking import auc
from riskscore.scorecard import card_points, fit_card, points_table, with_points
from riskscore.scorecard_sql import scorecard_sql, sql_features
from riskscore.sources import read_raw
from riskscore.synthetic import write_home_credit

REAL = {'home_credit': 'home_credit_sample/application_train.csv.gz', 'taiwan': 'taiwan/UCI_Credit_Card.csv', 'pi_m5': 'pi_m5/Base_de_datos.xlsx'}


# ---------------------------------------------------------------- a table in SQLite

def stored(value, numeric: bool):
    "A raw value as a database holds it: numbers as numbers, everything else as text."
    if isinstance(value, str) and numeric and re.fullmatch(r'\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*', value):
        return float(value)
    if isinstance(value, int | float | str | type(None)):
        return float(value) if isinstance(value, int) and abs(value) > 2**62 else value
    return float(value) if isinstance(value, Decimal | np.number) else str(value)


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def in_sqlite(contract, columns: dict[str, list]) -> sqlite3.Connection:
    "A database with the table `applications`."
    base = sqlite3.connect(':memory:')
    wanted = [c for c in contract.columns if c in columns]
    base.execute(f'CREATE TABLE applications ({", ".join(map(quoted, wanted))})')
    numeric = [contract.columns[c].kind in ('number', 'integer') for c in wanted]
    rows = ([stored(v, n) for v, n in zip(row, numeric, strict=True)] for row in zip(*(columns[c] for c in wanted), strict=True))
    base.executemany(f'INSERT INTO applications VALUES ({", ".join("?" * len(wanted))})', rows)
    return base


def about(plan, directions=()):
    levels = {i: len(plan.levels[plan.outputs[plan.names[i]].args[0]]) for i in plan.categorical}
    return SimpleNamespace(names=tuple(plan.names), levels=levels, directions=directions)


def assert_sql_equals_python(contract, plan, card, matrix, raw) -> int:
    "Points and scores of all rows; gives the number of different scores."
    score = 600 - np.rint((card.margin(matrix) + np.log(50)) / np.log(2) * 20)
    rows = in_sqlite(contract, raw).execute(scorecard_sql(card, plan, contract, 'applications')).fetchall()
    assert len(rows) == len(matrix)
    different = np.flatnonzero(np.array([r[-1] for r in rows]) != score)
    assert not len(different), f'{len(different)} rows differ, the first is {different[0]}'
    assert (score_points(Calibration(0.0, 1.0).pd(card.margin(matrix))) == score).all()
    return len(np.unique(score))


def assert_card_of(source, contract, least_auc: float, most_rows: int | None = None):
    "Fits a card on a table and compares it with its SQL on every row."
    frames = [b.frame for b in read_frames(source, contract)]
    frame = {n: np.concatenate([f[n] for f in frames])[:most_rows] for n in frames[0]}
    tables_ = [b.table.to_pydict() for b in read_raw(source, nulls=contract.nulls, known=contract.columns)]
    raw = {n: [v for t in tables_ for v in t[n]][:most_rows] for n in tables_[0]}
    constrained, bad = constrain(contract, fit_plan(contract, [frame])), frame[contract.target.name]
    plan = constrained.plan
    matrix = plan.frame(frame)
    directions = tuple(constrained.directions.get(name, 0) for name in plan.names)
    fitted = fit_card(matrix, bad, about(plan, directions), {}, only=sql_features(plan, contract))
    card = with_points(fitted.additive, fit_calibration(fitted.additive.margin(matrix), bad))
    moved = sweep(contract, lambda f: card.margin(plan.frame(f)), frame, rows=50)
    assert sum(moved['steps']) > 0 and sum(moved['violations']) == 0
    assert assert_sql_equals_python(contract, plan, card, matrix, raw) > 20
    assert auc(bad, card.margin(matrix)) > least_auc
    table = points_table(card, fitted.bins, plan, feature_meanings(contract))
    assert all((table['rows'][table['feature'] == b.feature].sum()) == len(bad) for b in fitted.bins)
    return fitted, card, matrix, bad


# ---------------------------------------------------------------- whole tables

def test_synthetic_table(root, tmp_path):
    "20,000 synthetic applicants: the same scores, better than one feature alone, and stored as numbers that read back."
    write_home_credit(tmp_path / 'raw.csv', 20_000, seed=7)
    contract = load_contract(root / 'data/contracts/home_credit.yaml')
    fitted, card, matrix, bad = assert_card_of(tmp_path / 'raw.csv', contract, 0.70)
    best = fitted.bins[0]
    assert auc(bad, card.margin(matrix)) > 0.01 + auc(bad, -best.encode(matrix[:, card.names.index(best.feature)]))
    assert abs(auc(bad, card.margin(matrix)) - auc(bad, fitted.additive.margin(matrix))) < 0.003
    again = additive_from_bytes('scorecard', card.to_bytes())
    assert (again.margin(matrix) == card.margin(matrix)).all()
    assert (card.contributions(matrix).sum(axis=1) - card.margin(matrix)).__abs__().max() < 1e-9


@pytest.mark.parametrize('name', REAL)
def test_real_tables(root, real_data, name):
    contract = load_contract(root / f'data/contracts/{name}.yaml')
    assert_card_of(real_data / REAL[name], contract, {'home_credit': 0.74, 'taiwan': 0.76, 'pi_m5': 0.66}[name])


@pytest.mark.parametrize('seed', range(8))
def test_portfolios(seed):
    "Odd names, special codes, flags of any two words, categories: each a table whose outcome depends on its columns."
    content, raw = portfolio(seed, 3_000)
    contract = parse_contract(content)
    frame = check_frame(contract, raw).frame
    plan, bad = fit_plan(contract, [frame]), frame[contract.target.name]
    matrix = plan.frame(frame)
    fitted = fit_card(matrix, bad, about(plan), {}, only=sql_features(plan, contract))
    assert len(fitted.bins) >= 1
    assert_sql_equals_python(contract, plan, with_points(fitted.additive), matrix, raw)


# ---------------------------------------------------------------- any contract, expression and value

@st.composite
def cards(draw, plan, names):
    "A card with random edges and points over some features."
    terms = []
    for name in names:
        points = st.integers(-60, 60).map(lambda p: -p * float(np.log(2)) / 20)
        if name in plan.levels and plan.outputs[name].op == 'column':
            count = len(plan.levels[name]) + 1
            terms.append(Term(name, 'levels', (), tuple(draw(points) for _ in range(count)), draw(points)))
            continue
        edge = st.floats(-150, 150) | st.sampled_from([0.0, 1.0, 0.1, 1e-6, 1e6]) | st.floats(-1e12, 1e12)
        edges = sorted(set(draw(st.lists(edge.filter(lambda v: v == 0 or abs(v) > 1e-15), max_size=4))))
        terms.append(Term(name, 'steps', tuple(edges), tuple(draw(points) for _ in range(len(edges) + 1)), draw(points)))
    return with_points(Additive('scorecard', plan.names, -4.0, terms))


@settings(max_examples=examples(60))
@given(contracts(), st.data())
def test_random_contracts(contract, data):
    "Expressions over the whole grammar that SQL can write give the same bins for sensible values, nulls and special codes."
    raw = data.draw(tables(contract))
    kept = {n: [v if isinstance(v, int | float | str) and not isinstance(v, bool) and v == v and abs(v if not isinstance(v, str) else 0) < 1e300
                and _storable(v) else None for v in values] for n, values in raw.items()}
    frame = check_frame(contract, kept)
    good = ~frame.bad_rows
    plan = fit_plan(contract, [frame.frame])
    matrix = plan.frame(frame.frame)
    names = [n for n in sql_features(plan, contract) if plan.outputs[n].columns <= set(kept)]
    card = data.draw(cards(plan, names))
    wanted = 600 - np.rint((card.margin(matrix) + np.log(50)) / np.log(2) * 20)
    columns = {n: kept.get(n, [None] * len(good)) for n in contract.columns}
    rows = in_sqlite(contract, columns).execute(scorecard_sql(card, plan, contract, 'applications')).fetchall()
    for i in np.flatnonzero(good):
        assert rows[i][-1] == wanted[i], (i, {n: v[i] for n, v in kept.items()}, plan.outputs)


def _storable(value) -> bool:
    "Can a database hold this text, and does it read a number as Python does?"
    return not isinstance(value, str) or not ('\x00' in value or any('\ud800' <= c <= '\udfff' for c in value))


@settings(max_examples=examples(100))
@given(st.floats(allow_nan=False, allow_infinity=False, width=32).filter(lambda v: v == 0 or 1e-20 < abs(v) < 1e20), st.booleans())
def test_edges_on_the_doubles_around_them(edge, between):
    "A double lies in the bin of its float32, also where the two differ, as SQLite reads the number."
    edge = float(edge) if not between else float(np.nextafter(np.float64(edge), np.inf))
    contract = parse_contract({'name': 'x', 'value': {d: {'good': 0, 'bad': 0} for d in ('approve', 'refer', 'decline')},
                               'columns': {'x': {}, 'bad': {'kind': 'flag', 'role': 'target', 'bad': 1}}})
    below = np.float32(edge)
    doubles = [edge]
    for step in (-2, -1, 0, 1, 2):
        f = below
        for _ in range(abs(step)):
            f = np.nextafter(f, np.float32(np.inf * np.sign(step)))
        half = (float(f) + float(np.nextafter(f, np.float32(np.inf)))) / 2
        doubles += [float(f), half, float(np.nextafter(half, -np.inf)), float(np.nextafter(half, np.inf))]
    raw = {'x': doubles}
    plan = fit_plan(contract, [])
    card = with_points(Additive('scorecard', ['x'], -4.0, [Term('x', 'steps', (edge,), (0.0, -0.7), 0.0)]))
    assert_sql_equals_python(contract, plan, card, plan.frame(check_frame(contract, raw).frame), raw)


def test_hostile_names_are_data():
    "Quotes, semicolons and comment signs in names of tables, columns, features and levels."
    level = "x'); DROP TABLE applications; --"
    contract = parse_contract({
        'name': 'hostile', 'value': {d: {'good': 0, 'bad': 0} for d in ('approve', 'refer', 'decline')}, 'rare': {'min_count': 1},
        'columns': {'id': {'kind': 'integer', 'role': 'id'}, 'a"; DROP TABLE applications; --': {'kind': 'category'}, "b'": {},
                    'bad': {'kind': 'flag', 'role': 'target', 'bad': 1}},
        'derived': {'score"': "col(\"b'\") * 2", 'SCORE"': "col(\"b'\") * 3"}})
    raw = {'id': [1, 2, 3], 'a"; DROP TABLE applications; --': [level, "o'k", None], "b'": [1.0, 2.0, None], 'bad': [0, 1, 0]}
    frame = check_frame(contract, raw).frame
    plan = fit_plan(contract, [frame])
    terms = [Term(n, 'steps', (2.5,), (0.0, -0.7), 0.3) for n in ('score"', 'SCORE"')]
    terms.append(Term(plan.names[0], 'levels', (), (0.5, -0.5, 0.0), 1.0))
    assert assert_sql_equals_python(contract, plan, with_points(Additive('scorecard', plan.names, -4.0, terms)), plan.frame(frame), raw) == 3
    base = in_sqlite(contract, raw)
    base.execute(scorecard_sql(with_points(Additive('scorecard', plan.names, -4.0, terms)), plan, contract, 'applications')).fetchall()
    assert base.execute('SELECT count(*) FROM applications').fetchone() == (3,)


# ---------------------------------------------------------------- bins and points

@settings(max_examples=examples(100))
@given(st.integers(0, 10**6), st.sampled_from([-1, 0, 1]), st.integers(2, 10), st.sampled_from([30, 300, 3000]), st.booleans())
def test_bins_are_monotone(seed, direction, most, rows, ties):
    "Weights run one way, the given one; every bin has enough rows; counts add up; edges part the values as they were counted."
    rng = np.random.default_rng(seed)
    x = rng.normal(size=rows).astype(np.float32)
    x = np.round(x, 0 if ties else 6)
    x[rng.random(rows) < rng.choice([0, 0.1, 0.9])] = np.nan
    bad = (rng.random(rows) < sigmoid(rng.choice([-1, 0, 1]) * np.nan_to_num(x) + np.sin(3 * np.nan_to_num(x)) - 1)).astype(np.float64)
    if not 0 < bad.sum() < rows:
        return
    rules = BinRules(max_bins=most)
    bins = fit_bins('x', x, bad, direction=direction, rules=rules)
    steps = np.diff(bins.woe[:-1])
    assert (steps < 0).all() if direction == 1 else (steps > 0).all() if direction == -1 else (steps < 0).all() or (steps > 0).all()
    assert sum(bins.rows) == rows and sum(bins.bad) == bad.sum() and len(bins.rows) - 1 <= most
    if len(bins.edges):
        assert min(bins.rows[:-1]) >= max(50, 0.02 * rows)
    assert (np.bincount(bins.index(x), minlength=len(bins.rows)) == bins.rows).all()
    levels = fit_bins('c', np.abs(np.round(x * 2)).astype(np.float32), bad, levels=4, rules=rules)
    assert sum(levels.rows) == rows and len(levels.groups) == 5


def test_direction_of_the_contract_holds_in_a_sweep():
    "The pd never falls when a column rises that may not make it fall, whatever history says."
    rng = np.random.default_rng(3)
    x = rng.normal(size=(6_000, 3)).astype(np.float32)
    bad = (rng.random(6_000) < sigmoid(0.7 * x[:, 0] - 0.7 * x[:, 1] + 0.5 * x[:, 2] - 2)).astype(np.float64)
    given_ = SimpleNamespace(names=('up', 'wrong', 'free'), levels={}, directions=(1, 1, 0))
    card = with_points(fit_card(x, bad, given_, {}).additive)
    for i in (0, 1):
        sweep = np.repeat(x[:200], 50, axis=0)
        sweep[:, i] = np.tile(np.linspace(-5, 5, 50), 200)
        assert (np.diff(card.margin(sweep).reshape(200, 50), axis=1) >= -1e-12).all()
    assert 'wrong' not in card_points(card)[1]


@pytest.mark.parametrize('name', [n for n in NAMES if '"' in n or "'" in n])
def test_feature_names_in_the_table(name):
    contract = parse_contract({'name': 'x', 'value': {d: {'good': 0, 'bad': 0} for d in ('approve', 'refer', 'decline')},
                               'columns': {name: {}, 'bad': {'kind': 'flag', 'role': 'target', 'bad': 1}}})
    assert sql_features(fit_plan(contract, []), contract) == [name]


def test_dates_and_logarithms_stay_outside():
    contract = parse_contract({'name': 'x', 'value': {d: {'good': 0, 'bad': 0} for d in ('approve', 'refer', 'decline')},
                               'columns': {'a': {}, 'when': {'kind': 'date'}, 'bad': {'kind': 'flag', 'role': 'target', 'bad': 1}},
                               'derived': {'log': 'log(a)', 'month': 'month(when)', 'huge': 'a * 1e300', 'constant': '1 + 1', 'root': 'sqrt(a)'}})
    assert sql_features(fit_plan(contract, []), contract) == ['a', 'huge', 'root']
