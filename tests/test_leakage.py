"The leakage gate: every rule fires on its fault and keeps quiet beside it, honest data pass, and planted faults stop the build with their column's name."
import importlib.util
import shutil
from dataclasses import replace
from importlib.machinery import SourceFileLoader
from pathlib import Path

import numpy as np
import pytest

from riskscore.contract import load_contract, parse_contract
from riskscore.datasets import read_table
from riskscore.feature_sets import feature_expressions
from riskscore.features import fit_plan
from riskscore.ingest import PLANTED, ingest
from riskscore.leakage import LIMITS, duplicate_findings, feature_strength, id_findings, outcome_findings, sample_rows, skew_findings, time_findings
from riskscore.matrix import read_features, write_features
from riskscore.planted import planted_skew, skewed_feature
from riskscore.raw import raw_table
from riskscore.split import split_history

ROOT = Path(__file__).resolve().parents[1]
VALUE = {'approve': {'good': 0.1, 'bad': -0.5}, 'refer': {'good': 0.1, 'bad': -0.3}, 'decline': {'good': 0, 'bad': 0}}
ROWS = 2000


# ---------------------------------------------------------------- features that know the outcome

def applicants(seed: int = 7, rows: int = ROWS, rate: float = 0.08) -> tuple[np.random.Generator, np.ndarray]:
    draw = np.random.default_rng(seed)
    return draw, draw.permutation(np.arange(rows) < round(rate * rows))


def some(draw, bad, of_bads, of_goods=0.0):
    "A draw of rows, by outcome."
    return draw.random(len(bad)) < np.where(bad, of_bads, of_goods)


def normal(draw, bad, shift=0.0):
    return draw.normal(size=len(bad)) + shift * bad


LEAKS = {  # a feature; the rules that may find it
    'a noisy copy of the outcome': (lambda d, b: normal(d, b, 2.0), {'auc'}),
    'the same upside down': (lambda d, b: -normal(d, b, 2.0), {'auc'}),
    'a flag that is wrong once in twenty': (lambda d, b: some(d, b, 0.95, 0.05).astype(float), {'auc'}),
    'a code for 30% of the bads': (lambda d, b: np.where(some(d, b, 0.3), 99.0, d.integers(0, 9, len(b))), {'part'}),
    'the same code in the middle': (lambda d, b: np.where(some(d, b, 0.3), 4.0, 9.0 * d.random(len(b)).round(3)), {'part'}),
    'values above a threshold for 30% of the bads': (lambda d, b: normal(d, b) + 9 * some(d, b, 0.3), {'part'}),
    'a narrow band for 60% of the bads': (lambda d, b: np.where(some(d, b, 0.6), 0.1 + 1e-6 * d.random(len(b)), d.normal(size=len(b))), {'part'}),
    'no value for 30% of the bads': (lambda d, b: np.where(some(d, b, 0.3), np.nan, d.normal(size=len(b))), {'part'}),
    'no value for most bads': (lambda d, b: np.where(some(d, b, 0.95, 0.1), np.nan, d.normal(size=len(b))), {'null', 'part'}),
    'a value for most bads only': (lambda d, b: np.where(some(d, b, 0.95, 0.02), d.normal(size=len(b)), np.nan), {'null', 'part'}),
}
HONEST = {
    'as strong as the best honest feature': lambda d, b: normal(d, b, 0.93),  # AUC 0.745
    'stronger still': lambda d, b: normal(d, b, 1.09),  # AUC 0.78, a bureau score elsewhere
    'a code of which 70% go bad, as two months late in Taiwan': lambda d, b: np.where(some(d, b, 0.3, 0.013), 2.0, d.integers(-2, 2, len(b))),
    'a code for 15 bads': lambda d, b: np.where(np.cumsum(b) * b * (np.cumsum(b) <= 15) > 0, 99.0, d.integers(0, 9, len(b))),
    'absence that tells a little': lambda d, b: np.where(some(d, b, 0.5, 0.3), np.nan, d.normal(size=len(b))),
    'one value': lambda d, b: np.ones(len(b)),
    'no value': lambda d, b: np.full(len(b), np.nan),
    'different in every row': lambda d, b: d.permutation(len(b)).astype(float),
}


@pytest.mark.parametrize('name', LEAKS)
@pytest.mark.parametrize('seed', [1, 2, 3])
def test_a_leak_is_refused(name, seed):
    draw, bad = applicants(seed)
    make, rules = LEAKS[name]
    finding, = outcome_findings([feature_strength('made', make(draw, bad), bad)], bad.mean(), ROWS)
    assert finding.severity == 'refuse' and finding.rule in rules and finding.column == 'made'
    assert 'feature made' in finding.message and 'the role leak' in finding.message


@pytest.mark.parametrize('name', HONEST)
@pytest.mark.parametrize('seed', [1, 2, 3])
def test_a_near_miss_passes(name, seed):
    draw, bad = applicants(seed)
    found = outcome_findings([feature_strength('honest', HONEST[name](draw, bad), bad)], bad.mean(), ROWS)
    assert [f for f in found if f.severity == 'refuse'] == []


def test_a_leaking_category_is_refused_and_a_fine_one_is_not():
    draw, bad = applicants(3)
    levels = [f'branch {i}' for i in range(40)]
    codes = draw.integers(0, 39, ROWS).astype(float)
    leaking = np.where(some(draw, bad, 0.3), 39.0, codes)
    finding, = outcome_findings([feature_strength('branch', leaking, bad, levels)], bad.mean(), ROWS)
    assert finding.rule == 'part' and "is 'branch 39'" in finding.message
    told = np.where(some(draw, bad, 0.9, 0.1), codes % 5, 5 + codes % 30)  # five levels hold most bads, none of them only bads
    assert [f.rule for f in outcome_findings([feature_strength('branch', told, bad, levels)], bad.mean(), ROWS)] == ['auc']
    fine = [feature_strength('branch', codes, bad, levels), feature_strength('row', np.arange(ROWS) % 1000 * 1.0, bad, [])]
    assert outcome_findings(fine, bad.mean(), ROWS) == []  # 1,000 levels of two rows each: judged by the other half, they know nothing


@pytest.mark.parametrize('rate', [0.02, 0.08, 0.5])
@pytest.mark.parametrize('rows', [60, 400, 4000])
def test_noise_is_never_refused(rows, rate):
    draw, bad = applicants(11, rows, rate)
    sparse = np.where(draw.random(rows) < 0.9, np.nan, draw.random(rows))
    kinds = [draw.normal(size=rows), draw.integers(0, 3, rows) * 1.0, sparse, draw.integers(0, 50, rows) * 1.0]
    measured = [feature_strength(f'f{i}', draw.permutation(kinds[i % 4]), bad, ['a'] if i % 8 == 3 else None) for i in range(160)]
    assert outcome_findings(measured, bad.mean(), rows) == []


def test_a_balanced_set_may_have_pure_parts():
    "With as many bads as goods, a tail with 90% bads is what a good score gives."
    draw, bad = applicants(5, 8000, 0.5)
    assert [f for f in outcome_findings([feature_strength('score', normal(draw, bad, 1.09), bad)], bad.mean(), 8000) if f.severity == 'refuse'] == []
    stage = np.where(some(draw, bad, 0.3, 0.002), 9.0, 1.0)
    assert [f.rule for f in outcome_findings([feature_strength('stage', stage, bad)], bad.mean(), 8000)] == ['part']


def test_a_name_is_refused_when_the_values_agree():
    draw, bad = applicants(4, 8000)
    values = {name: normal(draw, bad, 0.7) for name in ('total_recovered', 'prior_defaults_count', 'debt')} | {'saldoMora': draw.normal(size=8000)}
    found = outcome_findings([feature_strength(n, v, bad) for n, v in values.items()], bad.mean(), 8000)
    assert {(f.column, f.rule, f.severity) for f in found} == {('total_recovered', 'name', 'refuse'), ('saldoMora', 'name', 'look')}
    strengths = [feature_strength(n, v, bad) for n, v in values.items()]
    noted = outcome_findings(strengths, bad.mean(), 8000, noted=['total_recovered'])  # its note says that it is known on the day
    assert [f.severity for f in noted] == ['look', 'look']


# ---------------------------------------------------------------- identifiers, dates, twins, skew

CONTRACT = parse_contract({'name': 'loans', 'value': VALUE, 'split': {'by': 'time', 'future': 0.2}, 'derived': {'load': 'debt / income'}, 'columns': {
    'loan': {'kind': 'integer', 'role': 'id'}, 'day': {'kind': 'date', 'role': 'time'}, 'debt': {}, 'income': {}, 'job': {'kind': 'category'},
    'review': {'kind': 'date'}, 'bad': {'kind': 'flag', 'role': 'target', 'bad': 1}}})


def table(rows: int = 500, first: int = 0, seed: int = 1) -> dict:
    draw = np.random.default_rng([seed, first])
    return {'loan': 9000.0 + first + np.arange(rows), 'day': 18000.0 + first + np.arange(rows),
            'debt': draw.gamma(2, 1000, rows), 'income': draw.gamma(3, 900, rows).round(2),
            'job': np.array(['clerk', 'nurse', None], dtype=object)[draw.integers(0, 3, rows)], 'review': 17990.0 + first + np.arange(rows),
            'bad': (draw.random(rows) < 0.1).astype(float)}


def test_running_numbers_and_references_are_identifiers():
    rows, draw = table(), np.random.default_rng(3)
    count = np.arange(500.0)
    assert id_findings(CONTRACT, rows) == []
    fires = {'a running number': {'debt': count}, 'with gaps, backwards': {'debt': 10_000 - np.cumsum(1.0 + draw.integers(0, 9, 500))},
             'mostly in order': {'debt': np.where(count % 50 == 7, draw.permutation(500), count)},
             'a reference': {'job': np.array([f'r{i}' for i in range(500)], dtype=object)}}
    for name, columns in fires.items():
        finding, = id_findings(CONTRACT, rows | columns)
        assert finding.column in columns and finding.rule == 'id' and 'role excluded' in finding.message, name
    order = draw.permutation(500)
    finding, = id_findings(CONTRACT, {n: v[order] for n, v in (rows | {'debt': count}).items()})  # rows shuffled, but the id tells
    assert 'follows the id loan' in finding.message
    near = {'whole amounts': {'debt': draw.permutation(50_000)[:500] * 1.0}, 'in order, few values': {'debt': count // 2},
            'a measurement in order': {'debt': count + 0.5}, 'few rows': {n: v[:50] for n, v in (rows | {'debt': count}).items()},
            'many levels': {'job': np.array([f'town {i % 250}' for i in range(500)], dtype=object)}}
    assert {name: id_findings(CONTRACT, rows | columns) for name, columns in near.items()} == {name: [] for name in near}


def test_time_travel():
    history, future = table(), table(100, first=500)
    assert time_findings(CONTRACT, [history], [future]) == []
    finding, = time_findings(CONTRACT, [history, future], [table(100, first=560)])
    assert finding.column == 'day' and '39 applications of history are later than' in finding.message
    late = {**history, 'review': np.where(np.arange(500) < 7, history['day'] + 30, history['review'])}
    finding, = time_findings(CONTRACT, [late], [future])  # 7 of 600
    assert finding.column == 'review' and '7 of 600 dates' in finding.message
    typing = {**history, 'review': np.where(np.arange(500) < 6, history['day'] + 30, history['review'])}
    assert time_findings(CONTRACT, [typing], [future]) == []  # 1% is typing
    assert time_findings(CONTRACT, [{**history, 'review': history['day'] + 0.9}], [future]) == []  # the same day
    assert time_findings(replace(CONTRACT, columns={n: c for n, c in CONTRACT.columns.items() if n != 'day'}), [history], [future]) == []


def test_applications_on_both_sides():
    history, future = table(), table(200, first=500)
    assert duplicate_findings(CONTRACT, [history], [future]) == ([], 0)
    (finding,), twins = duplicate_findings(CONTRACT, [history], [{**future, 'loan': np.where(np.arange(200) == 5, 9100.0, future['loan'])}])
    assert (finding.column, finding.rule, twins) == ('loan', 'duplicate', 0)

    def copied(count):
        return {n: np.concatenate([history[n][:count], v[count:]]) if n != 'loan' else v for n, v in future.items()}

    assert duplicate_findings(CONTRACT, [history], [copied(2)]) == ([], 2)  # 1%
    (finding,), twins = duplicate_findings(CONTRACT, [{n: v[:250] for n, v in history.items()}, {n: v[250:] for n, v in history.items()}], [copied(3)])
    assert (finding.column, twins) == ('(rows)', 3) and '3 of 200 applications of the future (1.5%)' in finding.message
    blank = {n: v if n in ('loan', 'day') else np.full(len(v), None if v.dtype.kind == 'O' else np.nan, dtype=v.dtype) for n, v in copied(0).items()}
    zeros = {**blank, 'debt': np.zeros(200)}
    assert duplicate_findings(CONTRACT, [{**blank, 'loan': blank['loan'] + 500}], [blank])[1] == 200  # null equals null
    assert duplicate_findings(CONTRACT, [{**zeros, 'debt': -zeros['debt']}], [zeros])[1] == 200  # and -0 equals 0
    assert duplicate_findings(CONTRACT, [blank], [zeros])[1] == 0
    large = 2.0 ** 53 + 2 * np.arange(200)
    inexact = {**history, 'loan': np.r_[large, large[:100], large]}
    assert duplicate_findings(CONTRACT, [inexact], [{**future, 'loan': large}])[0] == []  # ids that floats merge


def test_skew_is_found_in_a_single_bit_and_named():
    rows = table()
    plan = fit_plan(CONTRACT, [rows])
    honest = plan.frame(rows)
    assert skew_findings(plan, rows, honest) == []
    for name in plan.names:
        matrix, i = honest.copy(), plan.names.index(name)
        at = int(np.flatnonzero(~np.isnan(matrix[:, i]))[-1])
        matrix[at, i] = np.nextafter(matrix[at, i], np.float32(np.inf))
        finding, = skew_findings(plan, rows, matrix)
        assert (finding.column, finding.rule) == (name, 'skew') and f'feature {name}' in finding.message and '1 of 500 rows' in finding.message
    filled = np.where(np.isnan(honest), np.float32(-1), honest)  # nulls filled in training only
    assert {f.column for f in skew_findings(plan, rows, filled)} == {'job'}
    matrix = honest.copy()
    matrix[:, plan.names.index('load')] *= np.float32(12)
    finding, = skew_findings(plan, rows, matrix)
    assert 'which reads debt, income' in finding.message and 'always 12 times' in finding.message
    assert skew_findings(plan, rows, np.roll(honest, 1, axis=0))[0].column == '(rows)'


# ---------------------------------------------------------------- whole data sets

def prepared(folder: Path, contract_name: str, source, leak_seed=None, future=None):
    "What the gate looks at: contract, plan, stored matrix, history and future."
    ingest(source, load_contract(ROOT / f'data/contracts/{contract_name}.yaml'), folder / 'table.parquet', leak_seed=leak_seed)
    contract = load_contract(folder / 'contract.json')
    split_history(folder / 'table.parquet', contract, folder / 'history.parquet', folder / 'future.parquet', future=future)
    feature_expressions(contract)
    plan = fit_plan(contract, read_table(folder / 'history.parquet', contract))
    write_features(folder / 'matrix.parquet', plan, contract, read_table(folder / 'history.parquet', contract))
    return contract, plan, folder


def looked_at(contract, plan, folder):
    "All findings of the gate, and the strengths of all features with the bad rate."
    history, future = folder / 'history.parquet', folder / 'future.parquet'
    seen = np.concatenate(list(read_features(folder / 'matrix.parquet', [*plan.names, contract.target.name])))
    bad, rows = seen[:, -1] == 1, len(seen)
    levels = {plan.names[i]: plan.levels[plan.names[i]] for i in plan.categorical}
    strengths = [feature_strength(n, seen[:, i], bad, levels.get(n)) for i, n in enumerate(plan.names)]
    drawn = sample_rows(read_table(history, contract), rows, 400)
    found = outcome_findings(strengths, bad.mean(), rows, {n: sorted(e.columns) for n, e in plan.outputs.items()})
    found += id_findings(contract, sample_rows(read_table(history, contract), rows, 2000))
    found += time_findings(contract, read_table(history, contract), read_table(future, contract))
    found += duplicate_findings(contract, read_table(history, contract), read_table(future, contract))[0]
    found += skew_findings(plan, drawn, sample_rows([seen[:, :-1]], rows, 400))
    return found, strengths, bad.mean()


REAL = {'home_credit': 'home_credit_sample/application_train.csv.gz', 'taiwan': 'taiwan/UCI_Credit_Card.csv', 'pi_m5': 'pi_m5/Base_de_datos.xlsx'}


@pytest.fixture(scope='module')
def synthetic(tmp_path_factory):
    folder = tmp_path_factory.mktemp('synthetic')
    return raw_table('synthetic', 5000, 42, folder), folder


def far_from_the_limits(found, strengths, rate):
    "Nothing is found, and the strongest honest feature keeps a distance from every limit."
    assert [f for f in found if f.severity == 'refuse'] == []
    assert max(a.low for s in strengths for a in (s.auc, s.absent) if a) < LIMITS['auc'] - 0.07
    risky = max(s.risky.low for s in strengths)
    assert risky < LIMITS['pure'] - 0.05 and risky / (1 - risky) < 0.5 * LIMITS['odds'] * rate / (1 - rate)
    return True


def test_no_false_alarm_on_synthetic_applicants(synthetic):
    source, folder = synthetic
    assert far_from_the_limits(*looked_at(*prepared(folder, 'home_credit', source, future=1000)))


@pytest.mark.parametrize('name', REAL)
def test_no_false_alarm_on_real_data(name, real_data, tmp_path):
    assert far_from_the_limits(*looked_at(*prepared(tmp_path, name, real_data / REAL[name], future=0.2)))


def test_a_column_that_is_a_leak_in_real_data_is_refused_as_a_feature(real_data, tmp_path):
    "The score of the small loans was made from the outcome: its contract says so, and without that line the gate says so."
    contract = load_contract(ROOT / 'data/contracts/pi_m5.yaml')
    score = next(c for c in contract.columns.values() if c.role == 'leak')
    leaking = replace(contract, columns={**contract.columns, score.name: replace(score, role='feature')})
    (tmp_path / 'leaking.json').write_text(leaking.to_json())
    ingest(real_data / REAL['pi_m5'], leaking, tmp_path / 'table.parquet')
    frame = sample_rows(read_table(tmp_path / 'table.parquet', leaking), 10_000, 10_000)
    bad = frame[contract.target.name] == 1
    finding, = outcome_findings([feature_strength(score.name, frame[score.name], bad)], bad.mean(), len(bad))
    assert (finding.column, finding.rule, finding.severity) == (score.name, 'auc', 'refuse')


# ---------------------------------------------------------------- planted faults

def test_a_planted_leak_is_all_that_is_found(synthetic, tmp_path):
    found, _, _ = looked_at(*prepared(tmp_path, 'home_credit', synthetic[0], leak_seed=42, future=1000))
    assert [(f.column, f.rule) for f in found if f.severity == 'refuse'] == [(PLANTED, 'auc')]


def test_a_planted_skew_is_all_that_is_found(synthetic, tmp_path):
    contract, plan, folder = prepared(tmp_path, 'home_credit', synthetic[0], future=1000)
    for seed in range(3):
        name = skewed_feature(plan, contract, seed)
        write_features(folder / 'matrix.parquet', planted_skew(plan, name), contract, read_table(folder / 'history.parquet', contract))
        found, _, _ = looked_at(contract, plan, folder)
        assert [(f.column, f.rule) for f in found if f.severity == 'refuse'] == [(name, 'skew')]


def test_a_planted_leak_depends_on_the_seed_alone(synthetic, tmp_path):
    columns = []
    for i, seed in enumerate((42, 42, 43)):
        (tmp_path / str(i)).mkdir()
        contract, _, folder = prepared(tmp_path / str(i), 'home_credit', synthetic[0], leak_seed=seed, future=1000)
        columns.append(np.concatenate([frame[PLANTED] for frame in read_table(folder / 'table.parquet', contract)]))
    assert (columns[0] == columns[1]).all() and (columns[0] != columns[2]).all()


@pytest.fixture(scope='module')
def planted(tmp_path_factory):
    "The script of the gate's own test, in a copy of the checkout, so that a build of the checkout does not matter."
    folder = tmp_path_factory.mktemp('checkout')
    for name in ('nbs', 'riskscore', 'data/contracts', 'data/candidates', 'pipeline.yaml', 'env.smoke.yaml', 'settings.ini', '.ci/planted'):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, folder / name)
    loader = SourceFileLoader('planted_script', str(folder / '.ci/planted'))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


@pytest.mark.parametrize('fault', ['inject_leak', 'inject_skew'])
def test_a_build_with_a_planted_fault_stops_at_the_gate(planted, tmp_path, fault):
    code, said, _ = planted.build(tmp_path, **{fault: 'true'})
    assert planted.missing(tmp_path, fault, code, said) == [], said
    assert len(planted.missing(tmp_path, fault, 0, '')) == 4  # a build that goes through is not green
    (tmp_path / 'out/gate/findings.json').write_text('{"findings": []}')
    assert 'refused was []' in planted.missing(tmp_path, fault, code, said)[0]


def test_nothing_is_planted_by_default():
    for path in ROOT.glob('env*.yaml'):
        text = path.read_text()
        assert 'inject_leak: false' in text and 'inject_skew: false' in text, path.name
