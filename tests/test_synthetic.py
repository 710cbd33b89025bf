"""Synthetic Home Credit: the shape of the real table, the same rows again, a truth that is calibrated, a difficulty that is realistic.

Where RISKSCORE_DATA holds the real sample, shares, quantiles, correlations and the power of single columns are compared with it.
"""
import csv
import gzip
import os
import re
import subprocess
import sys
from pathlib import Path

import lightgbm as lgb
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from riskscore.contract import check_frame, load_contract
from riskscore.core import RiskError
from riskscore.ranking import auc
from riskscore.synthetic import HOME_CREDIT_COLUMNS, home_credit, write_home_credit

BLOCK = 8192
NULLS = {'AMT_GOODS_PRICE': 0.001, 'NAME_TYPE_SUITE': 0.004, 'OWN_CAR_AGE': 0.660, 'OCCUPATION_TYPE': 0.313, 'EXT_SOURCE_1': 0.564,
         'EXT_SOURCE_2': 0.002, 'EXT_SOURCE_3': 0.198, 'APARTMENTS_AVG': 0.507, 'BASEMENTAREA_MODE': 0.585, 'YEARS_BEGINEXPLUATATION_MEDI': 0.488,
         'YEARS_BUILD_AVG': 0.665, 'COMMONAREA_AVG': 0.699, 'ELEVATORS_MODE': 0.533, 'ENTRANCES_AVG': 0.503, 'FLOORSMAX_AVG': 0.498,
         'FLOORSMIN_AVG': 0.678, 'LANDAREA_AVG': 0.594, 'LIVINGAPARTMENTS_MEDI': 0.684, 'LIVINGAREA_AVG': 0.502, 'NONLIVINGAPARTMENTS_AVG': 0.694,
         'NONLIVINGAREA_AVG': 0.552, 'FONDKAPREMONT_MODE': 0.684, 'HOUSETYPE_MODE': 0.502, 'TOTALAREA_MODE': 0.483, 'WALLSMATERIAL_MODE': 0.508,
         'EMERGENCYSTATE_MODE': 0.474, 'OBS_30_CNT_SOCIAL_CIRCLE': 0.003, 'AMT_REQ_CREDIT_BUREAU_YEAR': 0.135}  # of all 307,511 rows


def columns(rows: int, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    "Applicants as arrays (NaN and None where null), and their true probabilities."
    blocks = list(home_credit(rows, seed))
    table = pa.Table.from_batches([b.applications for b in blocks])
    arrays = {name: np.asarray(table[name].to_pylist(), object if table[name].type == pa.string() else float) for name in table.column_names}
    return arrays, np.concatenate([b.truth['true_pd'].to_numpy() for b in blocks])


@pytest.fixture(scope='module')
def sample():
    return columns(5 * BLOCK, 7)


def null_share(values: np.ndarray) -> float:
    return float(np.mean([v is None for v in values]) if values.dtype == object else np.isnan(values).mean())


# ---------------------------------------------------------------- shape

def test_columns_are_those_of_the_contract(root):
    contract = load_contract(root / 'data/contracts/home_credit.yaml')
    assert HOME_CREDIT_COLUMNS == list(contract.columns)
    assert len(HOME_CREDIT_COLUMNS) == 122


def test_nothing_breaks_the_contract(root, sample):
    contract = load_contract(root / 'data/contracts/home_credit.yaml')
    checked = check_frame(contract, {name: values[:BLOCK] for name, values in sample[0].items()})
    assert [v.message for v in checked.violations if v.severity == 'hard'] == []
    assert sum(v.count for v in checked.violations) < 0.001 * BLOCK * 122


def test_null_shares(sample):
    table, _ = sample
    found = {name: null_share(values) for name, values in table.items()}
    assert {n: (found[n], share) for n, share in NULLS.items() if abs(found[n] - share) > 0.015} == {}
    families = ('_AVG', '_MODE', '_MEDI', 'AMT_REQ', '_CIRCLE')
    assert [n for n, share in found.items() if share > 0.001 and n not in NULLS and not any(f in n for f in families)] == []


def test_columns_that_are_missing_together(sample):
    table, _ = sample
    missing = {name: np.isnan(values) for name, values in table.items() if values.dtype != object}
    for family in (['APARTMENTS_AVG', 'APARTMENTS_MODE', 'APARTMENTS_MEDI'], [n for n in missing if n.startswith('AMT_REQ')],
                   [n for n in missing if n.endswith('_SOCIAL_CIRCLE')]):
        assert all((missing[name] == missing[family[0]]).all() for name in family)
    housed = np.array([v is not None for v in table['EMERGENCYSTATE_MODE']])
    assert all(missing[name][~housed].all() for name in missing if name.endswith(('_AVG', '_MODE', '_MEDI')))


def test_special_codes_and_families(sample):
    table, _ = sample
    jobless = table['DAYS_EMPLOYED'] == 365243
    assert (jobless == (table['ORGANIZATION_TYPE'] == 'XNA')).all()
    assert 0.15 < jobless.mean() < 0.21 and all(v is None for v in table['OCCUPATION_TYPE'][jobless])
    single = np.isin(table['NAME_FAMILY_STATUS'], ['Single / not married', 'Separated', 'Widow'])
    assert np.nanmax(np.abs(table['CNT_FAM_MEMBERS'] - table['CNT_CHILDREN'] - np.where(single, 1, 2))) == 0
    assert (np.isnan(table['OWN_CAR_AGE']) == (table['FLAG_OWN_CAR'] == 'N')).all()
    documents = sum(table[f'FLAG_DOCUMENT_{n}'] for n in range(2, 22))
    assert (documents == 1).mean() > 0.85 and documents.max() <= 4


@pytest.mark.slow
def test_rare_levels_occur_and_stay_rare():
    found = {name: 0 for name in ('XNA', 'Unknown', 'Maternity leave')}
    places = {'XNA': 'CODE_GENDER', 'Unknown': 'NAME_FAMILY_STATUS', 'Maternity leave': 'NAME_INCOME_TYPE'}
    for block in home_credit(40 * BLOCK, seed=1):
        for level, column in places.items():
            found[level] += block.applications[column].to_pylist().count(level)
    assert all(0 < count < 40 for count in found.values()), found


# ---------------------------------------------------------------- the same rows again

@pytest.mark.parametrize('suffix', ['.csv', '.csv.gz', '.parquet'])
def test_same_seed_same_bytes(tmp_path, suffix):
    for name in ('a', 'b'):
        write_home_credit(tmp_path / f'{name}{suffix}', 300, 3, tmp_path / f'{name}.truth{suffix}')
    for part in ('', '.truth'):
        assert (tmp_path / f'a{part}{suffix}').read_bytes() == (tmp_path / f'b{part}{suffix}').read_bytes()
    write_home_credit(tmp_path / f'c{suffix}', 300, 4)
    assert (tmp_path / f'a{suffix}').read_bytes() != (tmp_path / f'c{suffix}').read_bytes()


@pytest.mark.parametrize('rows', [1, 100, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK])
def test_a_small_request_begins_a_larger_one(rows):
    large = pa.Table.from_batches([b.applications for b in home_credit(2 * BLOCK + 5, seed=9)])
    small = list(home_credit(rows, seed=9))
    assert pa.Table.from_batches([b.applications for b in small]).equals(large.slice(0, rows))
    assert [b.truth['SK_ID_CURR'] for b in small] == [b.applications['SK_ID_CURR'] for b in small]


def test_numbers_are_unique_and_rise(sample):
    ids = sample[0]['SK_ID_CURR']
    assert ids[0] >= 100_002 and (np.diff(ids) > 0).all()


def test_formats_hold_the_same(tmp_path):
    for suffix in ('.csv', '.csv.gz', '.parquet'):
        write_home_credit(tmp_path / f'table{suffix}', 500, 2)
    assert gzip.decompress((tmp_path / 'table.csv.gz').read_bytes()) == (tmp_path / 'table.csv').read_bytes()
    with open(tmp_path / 'table.csv', newline='') as file:
        text = list(csv.DictReader(file))
    for row, values in zip(text, pq.read_table(tmp_path / 'table.parquet').to_pylist(), strict=True):
        assert row == {name: '' if v is None else str(v) for name, v in values.items()}


def test_text_is_written_as_in_the_real_file(tmp_path):
    write_home_credit(tmp_path / 'table.csv', 2000)
    lines = (tmp_path / 'table.csv').read_text().splitlines()
    assert all(line.count('"') in (0, 2, 4) for line in lines)
    rows = list(csv.DictReader(lines))
    assert 'Spouse, partner' in {row['NAME_TYPE_SUITE'] for row in rows} and 'Stone, brick' in {row['WALLSMATERIAL_MODE'] for row in rows}
    forms = {'DAYS_BIRTH': r'-\d+', 'AMT_INCOME_TOTAL': r'\d+\.\d', 'DAYS_REGISTRATION': r'-?\d+\.0', 'FLAG_MOBIL': '[01]',
             'EXT_SOURCE_2': r'0\.\d+|', 'ELEVATORS_MODE': r'[01]\.\d{1,4}|', 'CNT_FAM_MEMBERS': r'\d+\.0'}
    for name, form in forms.items():
        assert all(re.fullmatch(form, row[name]) for row in rows), name


# ---------------------------------------------------------------- the truth

def test_true_probabilities_are_calibrated(sample):
    table, truth = sample
    for part in np.array_split(np.argsort(truth), 20):
        error = (table['TARGET'][part].sum() - truth[part].sum()) / np.sqrt((truth[part] * (1 - truth[part])).sum())
        assert abs(error) < 4
    assert 0.075 < truth.mean() < 0.086 and truth.min() > 0 and truth.max() < 1


def test_truth_ranks_as_it_should(sample):
    table, truth = sample
    assert 0.78 < auc(table['TARGET'], truth) < 0.81


def test_truth_is_in_no_column(sample):
    table, truth = sample
    power = [abs(np.corrcoef(np.nan_to_num(v), truth)[0, 1]) for n, v in table.items() if v.dtype != object and np.nanstd(v) and n != 'TARGET']
    assert max(power) < 0.6


def coded(table: dict[str, np.ndarray]) -> tuple[np.ndarray, list[int]]:
    "A matrix for LightGBM and the places of its categories."
    names = [n for n in table if n not in ('SK_ID_CURR', 'TARGET')]
    texts = [i for i, n in enumerate(names) if table[n].dtype == object]
    return np.column_stack([np.unique([str(v) for v in table[n]], return_inverse=True)[1] if table[n].dtype == object else table[n]
                            for n in names]), texts


def boosted(features: np.ndarray, target: np.ndarray, categories: list[int], rounds: int) -> lgb.Booster:
    settings = {'objective': 'binary', 'learning_rate': 0.05, 'num_leaves': 15, 'min_data_in_leaf': 60, 'feature_fraction': 0.3,
                'lambda_l2': 10, 'num_threads': 1, 'seed': 1, 'verbose': -1}
    return lgb.train(settings, lgb.Dataset(features, target, categorical_feature=categories), rounds)


def test_difficulty_is_realistic(sample):
    table, truth = sample
    features, categories = coded(table)
    model = boosted(features[:20_000], table['TARGET'][:20_000], categories, 150)
    found, best = (auc(table['TARGET'][20_000:], p) for p in (model.predict(features[20_000:], num_threads=1), truth[20_000:]))
    assert 0.72 < found < 0.80
    assert best - found > 0.015


# ---------------------------------------------------------------- cost and mistakes

def peak(rows: int, path: Path) -> int:
    "Peak memory of a fresh process that writes so many rows, in kB."
    code = (f'from riskscore.synthetic import write_home_credit; write_home_credit({str(path)!r}, {rows}); import sys\n'
            "assert 'pandas' not in sys.modules\n"
            "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))")
    return int(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='peak memory is read from /proc')
def test_memory_does_not_grow_with_rows(tmp_path):
    assert peak(16 * BLOCK, tmp_path / 'four.csv') <= 1.1 * peak(4 * BLOCK, tmp_path / 'one.csv')


@pytest.mark.parametrize(('name', 'rows', 'seed', 'says'), [
    ('t.csv', 0, 1, 'at least 1 row'), ('t.csv', -5, 1, 'at least 1 row'), ('t.csv', 5, -1, 'seed -1'), ('t.xlsx', 5, 1, '.csv.gz'), ('t', 5, 1, '.csv')])
def test_mistakes_are_named_and_leave_nothing(tmp_path, name, rows, seed, says):
    with pytest.raises(RiskError, match=re.escape(says)):
        write_home_credit(tmp_path / name, rows, seed, tmp_path / 'truth.parquet')
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- beside the real sample

@pytest.fixture(scope='module')
def real():
    path = Path(os.environ.get('RISKSCORE_DATA', ''), 'home_credit_sample/application_train.csv.gz')
    if not path.is_file():
        pytest.skip('RISKSCORE_DATA names no folder with the Home Credit sample')
    table = pyarrow.csv.read_csv(path, convert_options=pyarrow.csv.ConvertOptions(strings_can_be_null=True, null_values=['']))
    return {name: np.asarray(table[name].to_pylist(), object if table[name].type == pa.string() else float) for name in table.column_names}


def test_same_columns_and_types_as_the_real_file(real, sample):
    assert list(real) == HOME_CREDIT_COLUMNS
    assert [n for n in real if (real[n].dtype == object) != (sample[0][n].dtype == object)] == []


def test_null_shares_are_those_of_the_real_file(real, sample):
    gaps = {n: null_share(sample[0][n]) - null_share(real[n]) for n in real}
    assert {n: g for n, g in gaps.items() if abs(g) > 0.015} == {}


def test_levels_and_their_shares(real, sample):
    for name in (n for n in real if real[n].dtype == object):
        levels = sorted({v for v in [*real[name], *sample[0][name]] if v is not None})
        shares = [np.array([(table[name] == level).mean() for level in levels]) for table in (real, sample[0])]
        assert np.abs(shares[0] - shares[1]).sum() / 2 < 0.03, name
        assert {level for level, share in zip(levels, shares[0], strict=True) if share > 0.001} <= set(sample[0][name]), name


def test_distributions(real, sample):
    far = {}
    for name in (n for n in real if real[n].dtype != object and n != 'SK_ID_CURR'):
        a, b = (np.sort(table[name][~np.isnan(table[name])]) for table in (real, sample[0]))
        grid = np.unique(np.r_[a, b])
        far[name] = np.abs(np.searchsorted(a, grid, 'right') / len(a) - np.searchsorted(b, grid, 'right') / len(b)).max()
    assert {n: d for n, d in far.items() if d > 0.09} == {}
    assert np.mean(list(far.values())) < 0.025


def ranks(values: np.ndarray) -> np.ndarray:
    "Mid-ranks."
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - count / 2)[place]


def correlation(table: dict[str, np.ndarray], a: str, b: str) -> float:
    "Rank correlation where both are known."
    known = ~np.isnan(table[a]) & ~np.isnan(table[b])
    return float(np.corrcoef(ranks(table[a][known]), ranks(table[b][known]))[0, 1])


def test_correlations(real, sample):
    names = [n for n in real if real[n].dtype != object and n != 'SK_ID_CURR' and not n.endswith(('_MODE', '_MEDI')) and np.unique(real[n]).size > 10]
    pairs = [(a, b) for i, a in enumerate(names) for b in names[:i]]
    found = np.array([[correlation(table, a, b) for table in (real, sample[0])] for a, b in pairs])
    strong = np.abs(found[:, 0]) > 0.15
    assert strong.sum() > 80
    assert (np.sign(found[strong, 0]) == np.sign(found[strong, 1])).all()
    assert np.abs(found[:, 0] - found[:, 1]).max() < 0.2 and np.abs(found[:, 0] - found[:, 1]).mean() < 0.03


def test_power_of_single_columns(real, sample):
    apart = {}
    for name in (n for n in real if real[n].dtype != object and n not in ('SK_ID_CURR', 'TARGET') and np.nanstd(real[n])):
        power = [auc(table['TARGET'][known], table[name][known]) for table in (real, sample[0]) for known in [~np.isnan(table[name])]]
        apart[name] = power[1] - power[0]
    assert {n: d for n, d in apart.items() if abs(d) > 0.06} == {}
    strongest = sorted((n for n in apart), key=lambda n: -abs(auc(sample[0]['TARGET'][~np.isnan(sample[0][n])], sample[0][n][~np.isnan(sample[0][n])]) - 0.5))
    assert set(strongest[:3]) == {'EXT_SOURCE_1', 'EXT_SOURCE_2', 'EXT_SOURCE_3'}


def test_no_row_is_a_real_one(real, sample):
    "Scores with all their digits: an equal value would be a copy."
    for name in ('EXT_SOURCE_1', 'EXT_SOURCE_2'):
        assert not set(real[name][~np.isnan(real[name])]) & set(sample[0][name][~np.isnan(sample[0][name])])


@pytest.mark.slow
def test_a_model_that_has_both_can_tell_them_apart(real, sample):
    "No target: the figure that the notebook reports, so that it stays true. A far higher one would mean that something blatant broke."
    rows = len(real['TARGET'])
    both = {n: np.concatenate([real[n], sample[0][n][:rows]]) for n in real}
    features, categories = coded(both)
    synthetic = np.repeat([0.0, 1.0], rows)
    train = np.random.default_rng(0).random(2 * rows) < 0.6
    model = boosted(features[train], synthetic[train], categories, 300)
    assert auc(synthetic[~train], model.predict(features[~train], num_threads=1)) < 0.95
