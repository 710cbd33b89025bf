"""Importance against scikit-learn and the shap package, on a model that knows a little."""
import lightgbm as lgb
import numpy as np
import pytest
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.inspection import permutation_importance as reference
from sklearn.metrics import roc_auc_score

from riskscore.importance import permutation_importance, shap_importance
from riskscore.trees import Trees

NAMES = ['strong', 'weak', 'noise', 'code', 'twin']


@pytest.fixture(scope='module')
def model():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(6000, 5)).astype(np.float32)
    matrix[:, 3] = rng.integers(0, 4, 6000)
    matrix[rng.random(6000) < 0.2, 1] = np.nan
    odds = 1.5 * matrix[:, 0] + 0.5 * np.nan_to_num(matrix[:, 1]) + np.array([0, 1, 0, -1])[matrix[:, 3].astype(int)] - 2
    y = (rng.random(6000) < 1 / (1 + np.exp(-odds))).astype(int)
    settings = {'objective': 'binary', 'num_leaves': 15, 'verbosity': -1, 'num_threads': 1, 'deterministic': True, 'seed': 1}
    return lgb.train(settings, lgb.Dataset(matrix, y, categorical_feature=[3], params={'verbosity': -1}), num_boost_round=60), matrix, y


class Fitted(ClassifierMixin, BaseEstimator):
    "The booster as scikit-learn wants it."

    def __init__(self, booster=None):
        self.booster = booster

    def fit(self, matrix, y):
        return self

    def predict(self, matrix):
        return self.booster.predict(matrix, num_threads=1)


def test_permutation_agrees_with_scikit_learn(model):
    booster, matrix, y = model
    ours = permutation_importance(Fitted(booster).predict, matrix, y, NAMES, rows=6000, repeats=5)
    theirs = reference(Fitted(booster), matrix, y, n_repeats=5, random_state=0, scoring=lambda e, m, t: roc_auc_score(t, e.predict(m)))
    for name, loss in zip(ours['feature'], ours['loss'], strict=True):
        assert loss == pytest.approx(theirs.importances_mean[NAMES.index(name)], abs=0.006), name
    assert ours['feature'][0] == 'strong' and set(ours['feature'][-2:]) == {'noise', 'twin'}


def test_same_seed_same_numbers_and_nothing_is_edited(model):
    booster, matrix, y = model
    before = matrix.copy()
    one, two = (permutation_importance(Fitted(booster).predict, matrix, y, NAMES, only=['weak'], rows=500, seed=3) for _ in range(2))
    assert one['loss'] == two['loss'] and one['spread'] == two['spread']
    np.testing.assert_array_equal(matrix, before)


@pytest.mark.filterwarnings('ignore:LightGBM binary classifier')
def test_contributions_are_those_of_the_shap_package(model):
    shap = pytest.importorskip('shap')
    booster, matrix, _ = model
    ours = shap_importance(Trees('lightgbm', booster.model_to_string()), matrix, NAMES, rows=6000)
    theirs = np.abs(shap.TreeExplainer(booster).shap_values(matrix)).mean(axis=0)
    np.testing.assert_allclose(ours['importance'], [theirs[NAMES.index(name)] for name in ours['feature']], atol=1e-9)
    assert ours['share'].sum() == pytest.approx(1)


def test_a_sample_gives_the_same_order_and_fifths_show_the_direction(model):
    booster, matrix, _ = model
    whole, part = (shap_importance(Trees('lightgbm', booster.model_to_string()), matrix, NAMES, categorical=[3], rows=rows) for rows in (6000, 1000))
    assert whole['feature'].tolist()[:3] == part['feature'].tolist()[:3] == ['strong', 'code', 'weak']
    np.testing.assert_allclose(part['importance'], whole['importance'], rtol=0.12, atol=0.01)
    at = {name: i for i, name in enumerate(part['feature'])}
    strong = [part[f'fifth_{n}'][at['strong']] for n in range(1, 6)]
    assert strong == sorted(strong) and np.isnan(part['missing'][at['strong']])
    assert np.isfinite(part['missing'][at['weak']]) and np.isnan(part['fifth_3'][at['code']])
