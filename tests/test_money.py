"A change in money: parts that sum to the change, for every family, with rules, nulls, ties and samples of any size."
import json
from dataclasses import replace

import lightgbm as lgb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_bundle import VALUE, applications, small_contract

from riskscore.additive import Additive, Term
from riskscore.bundle import load_bundle, write_bundle
from riskscore.calibration import Calibration, sigmoid
from riskscore.candidates import FAMILIES
from riskscore.contract import check_frame
from riskscore.core import RiskError
from riskscore.features import fit_plan
from riskscore.matrix import prepare_dataset, write_features
from riskscore.money import AMOUNTS, attribute, column_parts, reference_parts
from riskscore.policy import Policy, compile_knockouts
from riskscore.reasons import fit_reasons
from riskscore.trees import Trees

RULES = [{'name': 'dear', 'when': 'amount > 900', 'decision': 'decline', 'words': {'en': 'too much', 'es': 'demasiado'}},
         {'name': 'new', 'when': 'tenure < 2', 'decision': 'refer', 'words': {'en': 'too new', 'es': 'muy reciente'}}]
CONTRACT = replace(small_contract(), knockouts=RULES)
FIGURES = ('log_odds', 'approval_rate', 'expected_loss')


def frame(rows, seed, **changes):
    "Applications; named columns are changed by functions of their values."
    typed = check_frame(CONTRACT, applications(rows, seed)).frame
    return typed | {name: change(typed[name]) for name, change in changes.items()}


def bundle(folder, model=None, plan=None, explains=True):
    "A bundle with rules, of the model given or of LightGBM."
    typed = frame(800, 1)
    plan = plan or fit_plan(CONTRACT, [typed])
    features = plan.frame(typed)
    if model is None:
        data = lgb.Dataset(features, typed['bad'], categorical_feature=plan.categorical, params={'verbosity': -1})
        booster = lgb.train({'objective': 'binary', 'num_leaves': 7, 'verbosity': -1, 'num_threads': 1, 'seed': 1, 'min_data_in_leaf': 5}, data, 20)
        model = Trees('lightgbm', booster.model_to_string())
    policy = Policy(0.3, 0.6, VALUE, 'EUR', 'amount', compile_knockouts(CONTRACT))
    reasons = fit_reasons(CONTRACT, plan, features, model.contributions(features)) if explains else None
    return load_bundle(write_bundle(folder, model, plan, Calibration(-0.1, 1.3), policy, CONTRACT, {}, {}, reasons))


@pytest.fixture(scope='module')
def scorer(tmp_path_factory):
    return bundle(tmp_path_factory.mktemp('bundle'))


def consistent(found):
    "Every figure's parts sum to its change, which is that between its ends."
    for name in FIGURES:
        figure = found[name]
        assert sum(figure['parts'].values()) == pytest.approx(figure['change'], abs=1e-9)
        assert figure['now'] - figure['reference'] == pytest.approx(figure['change'], abs=1e-9)


def loss(scorer, typed):
    "Expected loss per application, plainly."
    answers = scorer.frame(typed)
    return float(np.where(answers['decision'] == 'approve', 0.5 * answers['pd'] * typed['amount'], 0).mean())


# ---------------------------------------------------------------- sums

def test_the_figures_are_those_of_the_decisions(scorer):
    then, now = frame(700, 2), frame(450, 3, income=lambda v: v * 0.6, amount=lambda v: v * 1.2)
    found = attribute(scorer, then, now)
    consistent(found)
    for typed, side in ((then, 'reference'), (now, 'now')):
        answers = scorer.frame(typed)
        assert found['approval_rate'][side] == pytest.approx((answers['decision'] == 'approve').mean(), abs=1e-12)
        assert found['expected_loss'][side] == pytest.approx(loss(scorer, typed), abs=1e-9)
        assert found['log_odds'][side] == pytest.approx((-0.1 + 1.3 * scorer.predictor.margin(scorer.plan.frame(typed))).mean(), abs=1e-9)
    assert found['expected_loss']['parts'][AMOUNTS] > 0 > found['approval_rate']['parts']['rule dear']
    assert next(iter(found['log_odds']['parts'])) == 'income'
    assert (found['currency'], found['rows'], found['note']) == ('EUR', {'reference': 700, 'now': 450}, '')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "Features of history, as families want them."
    folder, typed = tmp_path_factory.mktemp('data'), frame(600, 1)
    plan = fit_plan(CONTRACT, [typed])
    write_features(folder / 'f.parquet', plan, CONTRACT, [typed])
    return plan, prepare_dataset(folder / 'f.parquet', plan, 'bad', folder / 'f.bin')


@pytest.mark.parametrize('name', [pytest.param(n, marks=pytest.mark.slow) if n == 'network' else n for n in FAMILIES])
def test_parts_sum_for_every_family(name, data, tmp_path):
    if module := {'xgboost': 'xgboost', 'catboost': 'catboost', 'network': 'torch'}.get(name):
        pytest.importorskip(module)
    plan, history = data
    family = FAMILIES[name]()
    quick = {'network': {'epochs': 2, 'width': 16}, 'forest': {'n_estimators': 10}}.get(name, {})
    model = family.fit(history, family.defaults(600, len(plan.names)) | quick, 2, 1, 1)
    scorer = bundle(tmp_path / 'models', model, plan)
    then, now = frame(300, 2), frame(170, 3, income=lambda v: v * 0.5)
    names, parts, log_odds = column_parts(scorer, then)
    features = plan.frame(then)
    assert log_odds == pytest.approx(-0.1 + 1.3 * model.margin(features), abs=1e-6)
    assert set(names) <= set(CONTRACT.columns)
    consistent(attribute(scorer, then, now))


@given(st.integers(0, 10_000), st.integers(1, 130), st.integers(1, 130), st.floats(0.3, 3), st.sampled_from([0.0, 1e-9, 0.05, 0.3, 0.9, 1.0]))
@settings(max_examples=25)
def test_parts_sum_whatever_the_samples_and_the_cut_off(scorer, seed, one, other, factor, cut):
    then, now = frame(one, seed), frame(other, seed + 1, income=lambda v: v * factor)
    now['amount'] = np.where(np.random.default_rng(seed).random(other) < 0.3, np.nan, now['amount'])
    judged = replace(scorer, policy=replace(scorer.policy, approve_below=cut, decline_from=max(cut, 0.6)))
    consistent(attribute(judged, then, now))


# ---------------------------------------------------------------- rules that a reader relies on

def test_nothing_changed_is_nothing_attributed(scorer):
    then = frame(300, 2)
    order = np.random.default_rng(0).permutation(300)
    shuffled = {name: values[order] for name, values in then.items()}
    found = attribute(scorer, then, shuffled)
    doubled = attribute(scorer, then, {name: np.concatenate([values, values]) for name, values in then.items()})
    for name in FIGURES:
        assert all(abs(x) < 1e-9 for answer in (found, doubled) for x in answer[name]['parts'].values())


def test_order_in_the_file_means_nothing_even_with_many_ties(tmp_path):
    typed = frame(400, 1)
    plan = fit_plan(CONTRACT, [typed])
    steps = Additive('scorecard', plan.names, -1.5, [Term('income', 'steps', (1500.0,), (0.8, 0.0), 0.4), Term('tenure', 'steps', (10.0,), (0.8, 0.0), 0.0)])
    scorer = bundle(tmp_path, steps, plan)
    then, now, order = frame(333, 4), frame(250, 5, income=lambda v: v * 0.5), np.random.default_rng(1).permutation(250)
    one, other = attribute(scorer, then, now), attribute(scorer, then, {name: values[order] for name, values in now.items()})
    for name in FIGURES:
        assert one[name]['parts'] == pytest.approx(other[name]['parts'], abs=1e-9)


def line(tmp_path, terms, cut):
    "A model that is a sum of straight lines, without rules."
    contract = small_contract()
    plan = fit_plan(contract, [check_frame(contract, applications(400, 1)).frame])
    model = Additive('logistic', plan.names, 0.0, [Term(name, 'lines', (0.0, 1000.0), (0.0, 1000.0 * slope), 0.0) for name, slope in terms.items()])
    return load_bundle(write_bundle(tmp_path, model, plan, Calibration(-4.0, 1.0), Policy(cut, cut, VALUE, 'EUR', None), contract, {}, {}))


def sample(rng, rows, **columns):
    contract = small_contract()
    typed = check_frame(contract, applications(rows, 1)).frame
    return typed | {name: rng.normal(*where, rows).clip(0, 1000).round() for name, where in columns.items()}


def test_columns_that_cancel_get_their_opposite_shares(tmp_path):
    scorer, rng = line(tmp_path, {'income': 0.01, 'tenure': 0.01}, 0.5), np.random.default_rng(0)
    then = sample(rng, 4000, income=(200, 40), tenure=(200, 40))
    now = then | {'income': then['income'] + 20, 'tenure': (then['tenure'] - 20)}
    found = attribute(scorer, then, now)
    consistent(found)
    assert found['log_odds']['change'] == pytest.approx(0, abs=1e-6)
    assert found['log_odds']['parts']['income'] == pytest.approx(0.2, abs=1e-6)
    parts = found['approval_rate']['parts']
    assert parts['income'] + parts['tenure'] == pytest.approx(0, abs=1e-9)
    alone = attribute(scorer, then, then | {'income': then['income'] + 20})['approval_rate']['change']
    assert parts['income'] == pytest.approx(alone, rel=0.15) and alone < -0.1


def test_a_shift_of_one_column_is_the_work_of_that_column_and_what_smoothing_leaves_is_small(tmp_path):
    scorer, rng = line(tmp_path, {'income': 0.01, 'tenure': 0.01}, 0.5), np.random.default_rng(0)
    then, now = sample(rng, 5000, income=(200, 40), tenure=(200, 40)), sample(rng, 3000, income=(240, 40), tenure=(200, 40))
    found = attribute(scorer, then, now)
    consistent(found)
    for name in FIGURES:
        change, parts = found[name]['change'], found[name]['parts']
        assert parts['income'] == pytest.approx(change, rel=0.12) and abs(parts['tenure']) < 0.12 * abs(change)


def test_the_loss_of_a_straight_line_is_found_by_hand(tmp_path):
    scorer, rng = line(tmp_path, {'income': 0.01}, 1.0), np.random.default_rng(0)  # everybody is approved, each counts 1
    then = sample(rng, 500, income=(200, 0))
    now = then | {'income': then['income'] + 100}
    found = attribute(scorer, then, now)['expected_loss']
    assert [found['reference'], found['now']] == pytest.approx((0.5 * sigmoid(np.array([-2.0, -1.0]))).tolist(), abs=1e-9)
    assert found['parts']['income'] == pytest.approx(found['change'], abs=1e-12) and found['parts'][AMOUNTS] == 0


def test_a_feature_of_two_columns_is_shared_by_what_each_does(scorer, tmp_path):
    then = frame(500, 2)
    names, parts, log_odds = column_parts(scorer, then)
    assert 'burden' in scorer.plan.names and 'burden' not in names and {'amount', 'income'} <= set(names)
    equal = bundle(tmp_path, scorer.predictor, scorer.plan, explains=False)
    others, halves, same = column_parts(equal, then)
    assert others == names and same == pytest.approx(log_odds, abs=1e-12)
    assert halves.sum(axis=1) == pytest.approx(parts.sum(axis=1), abs=1e-9) and not np.allclose(halves, parts)
    found = attribute(equal, then, frame(300, 3))
    consistent(found)
    assert 'shared equally' in found['note']


# ---------------------------------------------------------------- what is kept

def test_what_is_kept_of_a_sample_serves_as_well_as_the_sample(scorer):
    then, now = frame(400, 2), frame(300, 3, income=lambda v: v * 0.7)
    kept = json.loads(json.dumps(reference_parts(scorer, then)))
    assert attribute(scorer, kept, now) == attribute(scorer, then, now)
    back = attribute(scorer, now, kept)
    assert back['log_odds']['parts'] == pytest.approx({n: -x for n, x in attribute(scorer, kept, now)['log_odds']['parts'].items()})


def test_samples_of_another_model_or_policy_are_refused(scorer):
    kept = reference_parts(scorer, frame(100, 2))
    stricter = replace(scorer, policy=replace(scorer.policy, approve_below=0.1))
    with pytest.raises(RiskError, match='Compute them again'):
        attribute(stricter, kept, frame(100, 3))
    with pytest.raises(RiskError, match='empty'):
        attribute(scorer, kept, {name: values[:0] for name, values in frame(10, 3).items()})
