"Training: the features file, the binned Dataset, folds, margins and search, on tables that are small, odd or real."
import os
import subprocess
import sys
from pathlib import Path

import lightgbm as lgb
import numpy as np
import pytest

import riskscore.feature_sets  # noqa: F401  # the features that contracts name
from riskscore.boosting import LightGBM, default_params
from riskscore.candidates import FAMILIES, Candidate, compare, family, leaderboard
from riskscore.contract import load_contract, parse_contract
from riskscore.core import RiskError
from riskscore.datasets import open_table, read_table
from riskscore.features import feature_expressions, fit_plan
from riskscore.ingest import ingest
from riskscore.matrix import DATASET_PARAMS, prepare_dataset, read_features, write_features
from riskscore.models import cross_validate, train
from riskscore.monotone import constrain, sweep
from riskscore.ranking import auc
from riskscore.split import cv_folds
from riskscore.tuning import search
from riskscore.synthetic import write_home_credit

ROOT = Path(__file__).parents[1]
VALUE = {'approve': {'good': 1, 'bad': -5}, 'refer': {'good': 0.9, 'bad': -3}, 'decline': {'good': 0, 'bad': 0}}


def contract_of(columns, **more):
    return parse_contract({'name': 'test', 'amount': None, 'value': VALUE, 'columns': columns} | more)


def loans(rows, seed=0, blocks=3):
    "A contract and typed rows of a table whose risk grows with x and is higher in one branch."
    rng = np.random.default_rng(seed)
    x, branch = rng.normal(size=rows), rng.choice(['north', 'south', 'far, "away"'], rows)
    bad = (rng.random(rows) < 1 / (1 + np.exp(2 - x - (branch == 'south')))).astype(float)
    bad[:2] = 0, 1
    frame = {'the {id}': np.array([f'A{i}' for i in range(rows)], dtype=object), 'income, net': np.where(rng.random(rows) < 0.2, np.nan, x),
             'constant': np.ones(rows), 'año': rng.integers(0, 5, rows).astype(float), 'branch': branch.astype(object), 'bad': bad}
    contract = contract_of({'the {id}': {'kind': 'category', 'role': 'id'}, 'income, net': {'kind': 'number'}, 'constant': {'kind': 'number'},
                            'año': {'kind': 'integer'}, 'branch': {'kind': 'category'}, 'bad': {'kind': 'flag', 'role': 'target', 'bad': '1'}})
    parts = np.array_split(np.arange(rows), blocks)
    return contract, [{name: values[part] for name, values in frame.items()} for part in parts]


def prepared(folder, contract, frames):
    plan = fit_plan(contract, frames)
    write_features(folder / 'features.parquet', plan, contract, frames)
    return plan, prepare_dataset(folder / 'features.parquet', plan, contract.target.name, folder / 'features.bin')


@pytest.fixture(scope='module')
def synthetic(tmp_path_factory):
    "3,000 synthetic applications as a typed table."
    folder = tmp_path_factory.mktemp('synthetic')
    contract = load_contract(ROOT / 'data/contracts/home_credit.yaml')
    write_home_credit(folder / 'raw.parquet', 3_000)
    ingest(folder / 'raw.parquet', contract, folder / 'table.parquet')
    return contract, folder / 'table.parquet'


def test_the_features_file_holds_what_the_plan_gives(tmp_path, synthetic):
    contract, table = synthetic
    plan = fit_plan(contract, read_table(table, contract))
    assert write_features(tmp_path / 'f.parquet', plan, contract, read_table(table, contract, batch_rows=700)) == 3_000
    expected = np.vstack([plan.frame(frame) for frame in read_table(table, contract)])
    np.testing.assert_array_equal(np.vstack(list(read_features(tmp_path / 'f.parquet', plan.names))), expected)
    stored = open_table(tmp_path / 'f.parquet').read([contract.id.name, contract.target.name])
    typed = next(read_table(table, contract))
    for name in stored.column_names:
        np.testing.assert_array_equal(stored.column(name).to_pylist(), typed[name])


def test_the_streamed_dataset_is_the_one_made_in_memory(tmp_path, synthetic):
    contract, table = synthetic
    plan = fit_plan(contract, read_table(table, contract))
    write_features(tmp_path / 'f.parquet', plan, contract, read_table(table, contract, batch_rows=900))
    data = prepare_dataset(tmp_path / 'f.parquet', plan, contract.target.name, tmp_path / 'f.bin')
    matrix = np.vstack(list(read_features(tmp_path / 'f.parquet', plan.names)))
    memory = lgb.Dataset(matrix, data.target, categorical_feature=plan.categorical, params=DATASET_PARAMS)
    params = default_params(3_000, len(plan.names)) | {'verbosity': -1, 'num_threads': 1, 'objective': 'binary', 'deterministic': True, 'seed': 1}
    models = [lgb.train(params | DATASET_PARAMS, d, 30).predict(matrix) for d in (data.open(), memory)]
    np.testing.assert_array_equal(*models)


def test_row_groups_of_any_size_are_read_in_order(tmp_path):
    contract, frames = loans(40_000, blocks=4)
    plan, data = prepared(tmp_path, contract, frames)
    assert open_table(tmp_path / 'features.parquet').num_row_groups > 1
    np.testing.assert_array_equal(data.target, np.concatenate([f['bad'] for f in frames]))
    np.testing.assert_array_equal(data.open().get_label(), data.target)
    np.testing.assert_array_equal(np.vstack(list(read_features(data.features, plan.names))), np.vstack([plan.frame(f) for f in frames]))


def test_odd_column_names_reach_the_model(tmp_path):
    contract, frames = loans(500)
    plan, data = prepared(tmp_path, contract, frames)
    model = train(LightGBM(), data, cv_folds(data.target, contract.cv), default_params(500, len(plan.names)))
    assert list(model.importance) != plan.names and set(model.importance) == {'income, net', 'constant', 'año', 'branch'}
    assert model.predictor.booster.feature_name() == ['income_net', 'constant', 'año', 'branch']


def test_margins_are_those_of_the_model_that_left_the_row_out(tmp_path):
    contract, frames = loans(900)
    plan, data = prepared(tmp_path, contract, frames)
    folds = cv_folds(data.target, contract.cv)
    params = default_params(900, 4)
    cv, matrix = cross_validate(LightGBM(), data, folds, params, seed=7), np.vstack([plan.frame(f) for f in frames])
    fixed = {'objective': 'binary', 'deterministic': True, 'force_row_wise': True, 'seed': 7, 'num_threads': 1}
    for learn, check in folds:
        booster = lgb.train(params | DATASET_PARAMS | fixed, data.open().subset(learn.tolist()), cv.rounds)
        np.testing.assert_allclose(cv.margins[check], booster.predict(matrix[check], raw_score=True), rtol=1e-9)
    assert np.isfinite(cv.margins).all()


@pytest.mark.parametrize('name', ['lightgbm', 'logistic', 'scorecard', 'forest'])
def test_a_fold_does_not_see_the_rows_it_predicts(tmp_path, name):
    "Outcomes of the rows of a fold are turned round: its model stays the same."
    contract, frames = loans(900, blocks=1)
    _, data = prepared(tmp_path, contract, frames)
    folds = cv_folds(data.target, contract.cv)
    (tmp_path / 'turned').mkdir()
    turned = frames[0]['bad'].copy()
    turned[folds[0][1]] = 1 - turned[folds[0][1]]
    _, other = prepared(tmp_path / 'turned', contract, [frames[0] | {'bad': turned}])
    params = family(name).defaults(900, 4)
    margins = [cross_validate(family(name), d, folds, params, max_rounds=25).margins[folds[0][1]] for d in (data, other)]
    np.testing.assert_array_equal(*margins)


def test_folds_in_time_leave_the_first_rows_without_a_margin(tmp_path):
    contract, frames = loans(1_200)
    _, data = prepared(tmp_path, contract, frames)
    folds = cv_folds(data.target, {'by': 'time', 'folds': 3}, np.arange(1_200.0))
    model = train(LightGBM(), data, folds, default_params(1_200, 4))
    known = np.concatenate([check for _, check in folds])
    assert np.isfinite(model.margins[known]).all() and np.isnan(np.delete(model.margins, known)).all()
    assert known.min() > 0 and [fold['rows'] for fold in model.folds] == [len(check) for _, check in folds]


@pytest.mark.parametrize('rows', [12, 40])
def test_a_tiny_table_trains(tmp_path, rows):
    contract, frames = loans(rows, blocks=1)
    frames[0]['bad'] = (np.arange(rows) % 2).astype(float)
    plan, data = prepared(tmp_path, contract, frames)
    model = train(LightGBM(), data, cv_folds(data.target, {'folds': 3}), default_params(rows, len(plan.names)))
    assert np.isfinite(model.predictor.margin(plan.frame(frames[0]))).all()
    assert sum(model.importance.values()) <= 1 + 1e-9


def test_a_table_with_nothing_to_learn_from_trains(tmp_path):
    contract = contract_of({'x': {'kind': 'number'}, 'bad': {'kind': 'flag', 'role': 'target', 'bad': '1'}})
    frame = {'x': np.full(300, np.nan), 'bad': (np.arange(300) % 5 == 0).astype(float)}
    plan, data = prepared(tmp_path, contract, [frame])
    model = train(LightGBM(), data, cv_folds(data.target, {'folds': 5}), default_params(300, 1))
    np.testing.assert_allclose(1 / (1 + np.exp(-model.predictor.margin(plan.frame(frame)))), 0.2, atol=1e-6)


@pytest.mark.parametrize(('outcomes', 'message'), [
    ([0.0] * 50, 'all 50 rows of history are good'), ([1.0] * 50, 'are bad'), ([0.0, 1.0] * 24 + [np.nan] * 2, 'unknown in 2 of 50')])
def test_outcomes_that_teach_nothing_are_refused(tmp_path, outcomes, message):
    contract = contract_of({'x': {'kind': 'number'}, 'bad': {'kind': 'flag', 'role': 'target', 'bad': '1'}})
    frame = {'x': np.arange(50.0), 'bad': np.array(outcomes)}
    with pytest.raises(RiskError, match=message):
        prepared(tmp_path, contract, [frame])
    assert not (tmp_path / 'features.bin').exists()


def test_a_missing_features_file_is_named(tmp_path):
    contract, frames = loans(50)
    with pytest.raises(RiskError, match='nowhere.parquet'):
        prepare_dataset(tmp_path / 'nowhere.parquet', fit_plan(contract, frames), 'bad', tmp_path / 'f.bin')


def test_a_fold_without_bads_is_named(tmp_path):
    contract, frames = loans(300, blocks=1)
    _, data = prepared(tmp_path, contract, frames)
    good = np.flatnonzero(data.target == 0)
    with pytest.raises(RiskError, match='fold 2: 0 bad among 10 rows to predict'):
        cross_validate(LightGBM(), data, [(np.arange(150), np.arange(150, 300)), (np.arange(150), good[:10])], {})
    with pytest.raises(RiskError, match='no folds'):
        cross_validate(LightGBM(), data, [], {})


@pytest.mark.parametrize('params', [{'num_leafs': 8}, {'seed': 1}, {'min_data': 5}, {'min_data_in_bin': 1}, {'learning_rate': -1}])
def test_parameters_that_do_not_hold_are_refused(tmp_path, params):
    contract, frames = loans(300)
    _, data = prepared(tmp_path, contract, frames)
    with pytest.raises(RiskError, match=next(iter(params))):
        search(LightGBM(), data, cv_folds(data.target, contract.cv), params=params, n_trials=1)


def test_the_search_begins_at_the_default_moved_into_the_space(tmp_path):
    contract, frames = loans(300)
    _, data = prepared(tmp_path, contract, frames)
    space = {'num_leaves': [2], 'lambda_l2': {'low': 20, 'high': 30}, 'lambda_l1': {'low': 0.5, 'high': 1.0}}
    found = search(LightGBM(), data, cv_folds(data.target, contract.cv), params={'learning_rate': 0.2}, space=space, n_trials=1)
    assert found.trials[0].params == {'num_leaves': 2, 'lambda_l2': 20, 'lambda_l1': 0.5}
    assert found.params['learning_rate'] == 0.2 and found.params['bagging_fraction'] == 0.8


def test_hopeless_trials_are_pruned_and_a_better_one_is_kept(tmp_path):
    contract, frames = loans(2_000)
    _, data = prepared(tmp_path, contract, frames)
    space = {'lambda_l2': {'low': 1.0, 'high': 1e6, 'log': True}}
    found = search(LightGBM(), data, cv_folds(data.target, contract.cv), params={'lambda_l2': 1e6, 'learning_rate': 0.1}, space=space, n_trials=10)
    assert {trial.state for trial in found.trials} == {'complete', 'pruned'}
    assert found.chosen > 0 and found.params['lambda_l2'] < 1e6
    assert found.cv.rounds == found.trials[found.chosen].rounds and np.isfinite(found.cv.margins).all()


def test_an_interrupt_ends_a_search_at_once(tmp_path):
    contract, frames = loans(300)
    _, data = prepared(tmp_path, contract, frames)

    def stop(trial):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(LightGBM(), data, cv_folds(data.target, contract.cv), report=stop)


TWICE = '''
import hashlib, sys
from pathlib import Path
sys.path.insert(0, 'tests')
from test_models import *
contract, table, folder, threads = load_contract('data/contracts/home_credit.yaml'), sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
plan = fit_plan(contract, read_table(table, contract))
write_features(folder / 'f.parquet', plan, contract, read_table(table, contract))
data = prepare_dataset(folder / 'f.parquet', plan, contract.target.name, folder / 'f.bin', threads)
folds = cv_folds(data.target, contract.cv)
found = search(LightGBM(), data, folds, params={'learning_rate': 0.1}, n_trials=3, threads=threads)
model = train(LightGBM(), data, folds, found.params, cv=found.cv, threads=threads)
print(hashlib.sha256(model.predictor.to_bytes() + model.margins.tobytes() + repr(found.trials).encode()).hexdigest())
'''


def test_same_inputs_same_bytes(tmp_path, synthetic):
    "In two processes, in two folders, with another hash seed, and with another number of threads."
    digests = []
    for i, threads in enumerate((1, 2)):
        (tmp_path / str(i)).mkdir()
        done = subprocess.run([sys.executable, '-c', TWICE, str(synthetic[1]), str(tmp_path / str(i)), str(threads)], cwd=ROOT, text=True,
                              capture_output=True, env=os.environ | {'PYTHONHASHSEED': str(i), 'PYTHONPATH': str(ROOT)})
        assert done.returncode == 0, done.stderr
        digests.append(done.stdout.split()[-1])
    assert digests[0] == digests[1]


@pytest.mark.parametrize('name', ['home_credit', 'taiwan', 'pi_m5'])
def test_feature_sets_fit_the_contracts_that_name_them(name):
    contract = load_contract(ROOT / f'data/contracts/{name}.yaml')
    found = feature_expressions(contract)
    protected = {column.name for column in contract.columns.values() if column.role in ('protected', 'leak', 'target', 'id')}
    assert found and not {column for expression in found.values() for column in expression.columns} & protected


@pytest.mark.slow
def test_default_parameters_rank_real_applications(tmp_path, real_data):
    contract = load_contract(ROOT / 'data/contracts/home_credit.yaml')
    ingest(real_data / 'home_credit_sample/application_train.csv.gz', contract, tmp_path / 'table.parquet')
    _, data = prepared(tmp_path, contract, list(read_table(tmp_path / 'table.parquet', contract)))
    folds = cv_folds(data.target, {'folds': 5, 'seed': 42})
    cv = cross_validate(LightGBM(), data, folds, default_params(len(data.target), len(data.names)), threads=2)
    assert auc(data.target, cv.margins) > 0.749


@pytest.mark.parametrize('name', ['lightgbm', 'scorecard'])
def test_the_contract_is_kept_on_every_step_of_a_sweep(tmp_path, synthetic, name):
    "Features are computed anew for each step; without the contract's directions the trees break them."
    contract, table = synthetic
    frames = list(read_table(table, contract))
    found = constrain(contract, fit_plan(contract, frames))
    write_features(tmp_path / 'f.parquet', found.plan, contract, frames)
    frame = {column: np.concatenate([f[column] for f in frames]) for column in frames[0]}
    broken = {}
    for directions in (found.directions, {}):
        data = prepare_dataset(tmp_path / 'f.parquet', found.plan, contract.target.name, tmp_path / 'f.bin', directions=directions)
        model = family(name).fit(data, family(name).defaults(3_000, len(data.names)), 150, 1, 1)
        table_ = sweep(contract, lambda f, model=model: model.margin(found.plan.frame(f)), frame, rows=40, points=25)
        broken[bool(directions)] = sum(table_['violations'])
    assert len(found.directions) > 10 and sum(table_['steps']) > 3_000
    assert broken[True] == 0 and (broken[False] > 0 or name == 'scorecard')  # bins are monotone in either case, in the direction of the data


def test_candidates_are_compared_on_the_figure_that_was_asked_for(tmp_path):
    contract, frames = loans(1_500)
    _, data = prepared(tmp_path, contract, frames)
    folds = cv_folds(data.target, contract.cv)
    wishes = [Candidate(name, family(name), {}, None) for name in ('lightgbm', 'logistic', 'scorecard', 'forest')]
    entries = compare(wishes, data, folds, by='recall_0', robust=True, tune='none', cut=0.3)
    table = leaderboard(entries, data, robust=True)
    assert sorted(table['candidate']) == ['forest', 'lightgbm', 'logistic', 'scorecard']
    assert table['merit'] == sorted(table['merit'], reverse=True)
    np.testing.assert_allclose(table['merit'], np.subtract(table['mean'], table['deviation']))
    assert table['behind_low'][0] is None and all(low < high for low, high in zip(table['behind_low'][1:], table['behind_high'][1:], strict=True))
    assert set(FAMILIES) == {'lightgbm', 'logistic', 'scorecard', 'forest', 'xgboost', 'catboost', 'network'}


def test_what_a_search_keeps_was_validated_as_it_is(tmp_path):
    "The default lies outside the space: what is kept, its rounds and its margins are of the same parameters."
    contract, frames = loans(1_500)
    _, data = prepared(tmp_path, contract, frames)
    folds, space = cv_folds(data.target, contract.cv), {'lambda_l1': {'low': 50.0, 'high': 60.0}}
    found = search(LightGBM(), data, folds, params={'learning_rate': 0.1}, space=space, n_trials=2)
    again = cross_validate(LightGBM(), data, folds, found.params)
    assert found.params['lambda_l1'] >= 50 and again.rounds == found.cv.rounds
    np.testing.assert_array_equal(again.margins, found.cv.margins)
    entry = compare([Candidate('odd', LightGBM(), {'learning_rate': 0.1}, space)], data, folds, n_trials=2)[0]
    assert entry.params == found.params
    assert entry.predictor.to_bytes() == LightGBM().fit(data, found.params, found.cv.rounds, 42, 1).to_bytes()


@pytest.mark.parametrize('name', ['sigmoid', 'boosting', 'linear_tree', 'monotone_constraints_method', 'interaction_constraints', 'num_class', 'data'])
def test_settings_that_would_change_what_a_margin_means_are_closed(name):
    with pytest.raises(RiskError, match=f"no parameter '{name}'"):
        LightGBM().check([name])


def test_a_family_that_breaks_directions_cannot_win(tmp_path, synthetic):
    contract, table = synthetic
    frames = list(read_table(table, contract))
    found = constrain(contract, fit_plan(contract, frames))
    write_features(tmp_path / 'f.parquet', found.plan, contract, frames)
    data = prepare_dataset(tmp_path / 'f.parquet', found.plan, contract.target.name, tmp_path / 'f.bin', directions=found.directions)
    free = family('scorecard')
    free.monotone = False
    folds = cv_folds(data.target, {'folds': 3, 'seed': 1})
    entries = compare([Candidate('free', free, {}, None), Candidate('weak', family('lightgbm'), {'num_leaves': 2, 'learning_rate': 1.0}, None)], data, folds,
                      tune=None)
    assert [e.candidate.name for e in entries] == ['weak', 'free']
    assert leaderboard(entries, data)['eligible'] == [True, False]
