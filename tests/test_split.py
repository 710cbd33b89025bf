"""History never knows the future: draws, borders, ties, and folds that learn from the past."""
import datetime as dt

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from generators import MONEY
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from riskscore.contract import load_contract, parse_contract
from riskscore.core import RiskError, digest_file
from riskscore.datasets import table_schema, table_writer
from riskscore.ingest import ingest
from riskscore.split import cv_folds, split_history


def contract_of(**split):
    return parse_contract({'name': 'loans', 'value': MONEY, 'split': split or {'by': 'random'}, 'columns': {
        'loan': {'kind': 'integer', 'role': 'id'}, 'job': {'kind': 'category'}, 'x': {}, 'signed': {'kind': 'date', 'role': 'time'},
        'bad': {'kind': 'flag', 'role': 'target', 'bad': 1}}})


def write_table(path, days, bad, group_rows: int = 10_000):
    "A typed table with these dates and outcomes."
    rows, contract = len(days), contract_of()
    dates = [None if d is None else dt.datetime(1970, 1, 1) + dt.timedelta(days=float(d)) for d in days]
    jobs = pa.array([['clerk', 'nurse', None][i % 3] for i in range(rows)]).dictionary_encode()
    outcomes = pa.array([str(int(b)) for b in bad]).dictionary_encode()
    columns = [pa.array(range(rows)), jobs, pa.array(np.arange(rows) / 7), pa.array(dates, pa.timestamp('ms')), outcomes]
    batch = pa.RecordBatch.from_arrays(columns, schema=table_schema(contract))
    with table_writer(path, batch.schema) as out:
        for start in range(0, rows, group_rows):
            out.write(batch.slice(start, group_rows))
    return path


def loans(path):
    return pq.ParquetFile(path).read().column('loan').to_pylist()


def split(tmp_path, table, contract, **options):
    "Summary, and the rows of history and future."
    summary = split_history(table, contract, tmp_path / 'history.parquet', tmp_path / 'future.parquet', **options)
    return summary, loans(tmp_path / 'history.parquet'), loans(tmp_path / 'future.parquet')


# ---------------------------------------------------------------- history and future

@pytest.mark.parametrize(('future', 'rows'), [(0.2, 6000), (0.5, 15_000), (7, 7), (29_990, 29_990)])
def test_a_draw_takes_exactly_what_was_asked_for(tmp_path, future, rows):
    table = write_table(tmp_path / 'table.parquet', np.zeros(30_000), np.arange(30_000) % 2)
    summary, history, later = split(tmp_path, table, contract_of(by='random', future=future, seed=42))
    assert (summary['future']['rows'], len(later), len(history)) == (rows, rows, 30_000 - rows)
    assert sorted(history + later) == list(range(30_000))
    assert history == sorted(history) and later == sorted(later), 'the order of the table is kept'


def test_a_draw_is_even_over_the_table(tmp_path):
    table = write_table(tmp_path / 'table.parquet', np.zeros(30_000), np.arange(30_000) % 2)
    taken = np.zeros(30_000)
    for seed in range(20):
        taken[split(tmp_path, table, contract_of(by='random', future=0.25, seed=seed))[2]] += 1
    thirds = taken.reshape(3, -1).sum(axis=1) / (20 * 10_000)
    assert np.abs(thirds - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 200_000)
    assert taken.var() == pytest.approx(20 * 0.25 * 0.75, rel=0.05), 'rows are drawn independently between seeds'


def test_a_draw_is_the_seed_and_not_the_layout_of_the_file(tmp_path):
    results = []
    for group_rows in (1000, 7000, 25_000):
        table = write_table(tmp_path / f'{group_rows}.parquet', np.zeros(25_000), np.arange(25_000) % 2, group_rows)
        results.append(split(tmp_path, table, contract_of(by='random', future=0.3, seed=1))[2])
    assert results[0] == results[1] == results[2]
    other = split(tmp_path, table, contract_of(by='random', future=0.3, seed=2))[2]
    assert other != results[0]


def test_equal_input_gives_equal_bytes(tmp_path):
    table = write_table(tmp_path / 'table.parquet', np.zeros(3000), np.arange(3000) % 2)
    digests = set()
    for _ in range(2):
        split(tmp_path, table, contract_of(by='random', future=0.3, seed=1))
        digests.add((digest_file(tmp_path / 'history.parquet'), digest_file(tmp_path / 'future.parquet')))
    assert len(digests) == 1


def test_values_and_types_pass_through(tmp_path):
    table = write_table(tmp_path / 'table.parquet', [1, None, 2, 3], [0, 1, 0, 1])
    split(tmp_path, table, contract_of(by='order', future=2))
    whole, parts = pq.ParquetFile(table).read(), [pq.ParquetFile(tmp_path / f'{n}.parquet').read() for n in ('history', 'future')]
    assert parts[0].schema == whole.schema
    assert [r for p in parts for r in p.to_pylist()] == whole.to_pylist()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(days=st.lists(st.integers(0, 12) | st.just(5) | st.just(5.5), min_size=4, max_size=60), future=st.floats(0.05, 0.95), data=st.data())
def test_by_time_the_future_is_later_and_a_date_stays_together(tmp_path, days, future, data):
    assume(len(set(np.floor(days))) > 1 and 0 < round(future * len(days)) < len(days))
    bad = data.draw(st.lists(st.integers(0, 1), min_size=len(days), max_size=len(days)))
    table = write_table(tmp_path / 'table.parquet', days, bad)
    try:
        summary, history, later = split(tmp_path, table, contract_of(by='time', future=future))
    except RiskError as error:
        assert 'so that both sides have good and bad outcomes' in str(error)
        return
    days = np.floor(days)
    assert max(days[i] for i in history) < min(days[i] for i in later)
    wanted, got = round(future * len(days)), len(later)
    for border in set(days) - {min(days)}:
        assert abs(sum(d >= border for d in days) - wanted) >= abs(got - wanted), 'no other border is nearer'
    assert summary['history']['last'] < summary['future']['first']


@pytest.mark.parametrize(('split_of', 'days', 'expected'), [
    ({'by': 'time', 'future': 0.5}, [1, None, 2, 3], r'1 rows have no signed, .*null: false.*set_aside'),
    ({'by': 'time', 'future': 0.5}, [1, 1, 1, 1], 'at least two different days'),
    ({'by': 'order', 'future': 4}, [1, 1, 2, 2], 'takes 4 of 4 rows'),
    ({'by': 'order', 'future': 0.1}, [1, 1, 2, 2], 'takes 0 of 4 rows'),
    ({'by': 'order', 'future': 1}, [1, 1, 2, 2], 'all 1 rows of the future are bad')])
def test_a_split_that_cannot_be_made_says_why(tmp_path, split_of, days, expected):
    table = write_table(tmp_path / 'table.parquet', days, [0, 1, 0, 1])
    contract = contract_of(**split_of)
    with pytest.raises(RiskError, match=expected):
        split(tmp_path, table, contract)
    assert [p.name for p in tmp_path.iterdir()] == ['table.parquet']


def test_wrong_shares_and_a_missing_table(tmp_path):
    table = write_table(tmp_path / 'table.parquet', [1, 1, 2, 2], [0, 1, 0, 1])
    for future, expected in ((0, 'must be a share'), (-0.2, 'must be a share'), (float('nan'), 'must be a share'), ('a lot', "got 'a lot'"),
                             (True, 'got True'), (2.5, 'whole number'), (float('inf'), 'whole number')):
        with pytest.raises(RiskError, match=expected):
            split(tmp_path, table, contract_of(by='order'), future=future)
    with pytest.raises(RiskError, match='Run the step that writes it again'):
        split(tmp_path, tmp_path / 'absent.parquet', contract_of(by='order'))


def test_real_loans_with_dates(tmp_path, real_data, root):
    contract = load_contract(root / 'data' / 'contracts' / 'pi_m5.yaml')
    ingest(real_data / 'pi_m5' / 'Base_de_datos.xlsx', contract, tmp_path / 'table.parquet')
    summary = split_history(tmp_path / 'table.parquet', contract, tmp_path / 'history.parquet', tmp_path / 'future.parquet')
    assert summary['history']['rows'] + summary['future']['rows'] == 10_763
    assert abs(summary['future']['rows'] / 10_763 - 0.2) < 0.01
    assert summary['history']['last'] < summary['future']['first']


# ---------------------------------------------------------------- folds

def test_stratified_folds_are_those_of_scikit_learn():
    from sklearn.model_selection import StratifiedKFold
    target = (np.random.default_rng(0).random(500) < 0.1).astype(float)
    expected = StratifiedKFold(5, shuffle=True, random_state=42).split(target[:, None], target)
    for fold, other in zip(cv_folds(target, {'by': 'stratified', 'folds': 5, 'seed': 42}), expected, strict=True):
        np.testing.assert_array_equal(fold[0], other[0])
        np.testing.assert_array_equal(fold[1], other[1])


@settings(max_examples=100)
@given(data=st.data(), count=st.integers(2, 5))
def test_folds_by_time_never_look_ahead(data, count):
    days = np.array(data.draw(st.lists(st.integers(0, 15), min_size=12, max_size=120)), dtype=float)
    target = np.array(data.draw(st.lists(st.integers(0, 1), min_size=len(days), max_size=len(days))), dtype=float)
    try:
        folds = cv_folds(target, {'by': 'time', 'folds': count}, days)
    except RiskError as error:
        assert 'Use fewer folds' in str(error)
        return
    assert len(folds) == count
    predicted = np.concatenate([valid for _, valid in folds])
    assert len(predicted) == len(set(predicted.tolist())), 'a row is predicted once'
    for learn, valid in folds:
        assert days[learn].max() < days[valid].min(), 'the past is earlier, and a date stays on one side'
        assert set(learn) == set(np.flatnonzero(days < days[valid].min())), 'all of the past is used'
        assert len(set(target[learn])) == len(set(target[valid])) == 2
    assert days[predicted].max() == days.max()


def test_folds_by_time_are_of_like_size():
    days = np.repeat(np.arange(600.0), 5)
    folds = cv_folds(np.arange(3000.0) % 2, {'by': 'time', 'folds': 5}, days)
    assert [len(valid) for _, valid in folds] == [500] * 5
    assert [len(learn) for learn, _ in folds] == [500, 1000, 1500, 2000, 2500]


@pytest.mark.parametrize(('target', 'cv', 'days', 'expected'), [
    ([0, 0, 1], {'folds': 2}, None, '2 good and 1 bad'),
    ([0, 1, 0, 1], {'folds': '2'}, None, "got '2'"),
    ([0, 1, 0, 1], {'by': 'time', 'folds': 2}, None, 'needs a date in every row'),
    ([0, 1, 0, 1], {'by': 'time', 'folds': 2}, [1, 2, np.nan, 3], 'needs a date in every row'),
    ([0, 1, 0, 1], {'by': 'time', 'folds': 2}, [1, 1, 1, 2], 'cannot make 2 folds by time'),
    ([0, 1, 0, 1, 1, 1], {'by': 'time', 'folds': 2}, [1, 1, 2, 2, 3, 3],
     r'fold 2: all 2 rows to predict \(1970-01-04 to 1970-01-04\) are bad')])
def test_folds_that_cannot_be_made_say_why(target, cv, days, expected):
    with pytest.raises(RiskError, match=expected):
        cv_folds(np.array(target, dtype=float), cv, None if days is None else np.array(days, dtype=float))
