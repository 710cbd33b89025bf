"""Reject inference where the truth is known: the oracle wins, weights stay finite, runs repeat, and no method reads what is hidden."""
import numpy as np
import pytest

from riskscore.core import RiskError, canonical_json
from riskscore.ranking import auc, auc_difference
from riskscore.rejects import (
    ACCEPTED,
    ORACLE,
    REWEIGHTED,
    augmentation_weights,
    earlier_policy,
    parcel,
    reject_experiment,
    reject_summary,
    reject_table,
)
from riskscore.segments import records


@pytest.fixture(scope='module')
def world():
    "A feature decides the risk only of those whom the earlier policy refused by another one."
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6000, 8)).astype(np.float32)
    x[rng.random(6000) < 0.1, 3] = np.nan
    odds = -2 + 0.8 * x[:, 0] + np.where(x[:, 1] > 0.5, 1 + 1.5 * x[:, 2], 0)
    y = rng.random(6000) < 1 / (1 + np.exp(-odds))
    return x, y, x[:, 1] <= 0.5


@pytest.fixture(scope='module')
def tried(world):
    return reject_experiment(*world)


def test_the_oracle_beats_the_accepted_only(tried):
    table = reject_table(tried)
    by_name = dict(zip(table['method'].tolist(), range(len(table['method'])), strict=True))
    assert table['auc_gain_low'][by_name[ORACLE]] > 0.02
    assert table['bad_rate_change_high'][by_name[ORACLE]] < 0
    assert table['stated_refused_low'][by_name[ACCEPTED]] > 1.3  # the refused are worse than the accepted let think
    assert 0.85 < table['stated_refused'][by_name[ORACLE]] < 1.18
    assert tried.true_factor > 1.3


def test_larger_factors_state_more_risk(tried):
    refused = ~tried.accepted
    stated = [tried.pds[f'Parcelling, factor {f}'][refused].mean() for f in ('1', '1.5', '2')]
    assert stated[0] < stated[1] < stated[2]


def test_all_pds_are_probabilities_of_the_rows_nobody_learnt_from(tried):
    assert len(tried.bad) == 1800
    for pd in tried.pds.values():
        assert len(pd) == 1800 and ((pd > 0) & (pd < 1)).all()


def test_figures_equal_the_definitions(tried):
    table = reject_table(tried, share=0.6)
    for i, (_, pd) in enumerate(tried.pds.items()):
        best = np.sort(np.argsort(pd, kind='stable')[:1080])
        assert table['bad_rate'][i] == pytest.approx(tried.bad[best].mean(), abs=1e-12)
        assert table['auc'][i] == pytest.approx(auc(tried.bad, pd), abs=1e-12)
        assert table['auc_gain'][i] == pytest.approx(auc_difference(tried.bad, pd, tried.pds[ACCEPTED]).value, abs=1e-12)
        assert table['bad_rate_change'][i] == pytest.approx(table['bad_rate'][i] - table['bad_rate'][1], abs=1e-12)


def test_paired_intervals_agree_with_the_bootstrap(tried):
    table, rng, n = reject_table(tried), np.random.default_rng(1), len(tried.bad)
    chosen = {name: np.isin(np.arange(n), np.argsort(tried.pds[name], kind='stable')[:round(0.7 * n)]) for name in (ORACLE, ACCEPTED)}
    change = tried.bad * (chosen[ORACLE].astype(float) - chosen[ACCEPTED]) / 0.7
    draws = [change[rng.integers(0, n, n)].mean() for _ in range(2000)]
    np.testing.assert_allclose([table['bad_rate_change_low'][0], table['bad_rate_change_high'][0]], np.quantile(draws, [0.025, 0.975]), atol=0.002)


def test_the_same_seed_gives_the_same_figures(world, tried):
    again = reject_experiment(*world)
    other = reject_experiment(*world, seed=1, factors=(1.0,))
    for name in tried.pds:
        np.testing.assert_array_equal(tried.pds[name], again.pds[name])
    assert list(other.pds) == [ORACLE, ACCEPTED, REWEIGHTED, 'Parcelling, factor 1']
    assert (other.bad != tried.bad).any()


def test_only_the_oracle_reads_the_outcomes_of_the_refused(world, tried):
    x, y, accepted = world
    lied = reject_experiment(x, np.where(accepted, y, ~y), accepted)
    for name in (ACCEPTED, REWEIGHTED, 'Parcelling, factor 1', 'Parcelling, factor 2'):
        np.testing.assert_array_equal(lied.pds[name], tried.pds[name])
    assert (lied.pds[ORACLE] != tried.pds[ORACLE]).any()


def test_weights_are_finite_and_bounded():
    rng = np.random.default_rng(2)
    p = np.r_[rng.random(1000), 0, 1, 1e-300]
    weights = augmentation_weights(p)
    assert np.isfinite(weights).all() and weights.min() >= 1 and weights.max() <= 20
    np.testing.assert_allclose(weights[p > 0.05], 1 / p[p > 0.05])
    for wrong in ([1.1], [-0.1], [np.nan]):
        with pytest.raises(RiskError, match='1 of 1'):
            augmentation_weights(wrong)


def test_parcels_leave_the_accepted_alone_and_stay_shares():
    rng = np.random.default_rng(3)
    pd, bad, accepted = rng.random(500), (rng.random(500) < 0.3).astype(float), rng.random(500) < 0.7
    hidden = np.where(accepted, bad, np.nan)
    for factor in (0.0, 1.0, 50.0):
        inferred = parcel(pd, hidden, accepted, factor)
        np.testing.assert_array_equal(inferred[accepted], bad[accepted])
        assert np.isfinite(inferred).all() and (inferred >= 0).all() and (inferred <= 1).all()
    assert parcel(pd, hidden, np.zeros(500, dtype=bool))[0] <= 1  # a band without any accepted leans on its pd


def test_the_earlier_policy_refuses_what_it_is_told_to_and_knows_what_it_is_told(world):
    x, y, _ = world
    for refused in (0.1, 0.3, 0.5):
        assert (~earlier_policy(x, y, refused=refused)).mean() == pytest.approx(refused, abs=0.001)
    weak, luck, clever = (earlier_policy(x, y, **how) for how in ({}, {'noise': 30.0}, {'hidden': 2.0}))
    assert y[~luck].mean() - y[luck].mean() < 0.05 < y[~weak].mean() - y[weak].mean() < y[~clever].mean() - y[clever].mean()
    codes = x.copy()
    codes[:, 2] = np.floor(np.abs(np.nan_to_num(codes[:, 2])))
    assert earlier_policy(codes, y, categorical=(2,)).sum() == 4200


def test_worlds_that_cannot_be_told_from_the_accepted_have_different_right_factors(world):
    x, y, _ = world
    worlds = {'known': 0.0, 'hidden': 0.8}
    tried = {name: reject_experiment(x, y, earlier_policy(x, y, hidden=h), factors=(1.0,)) for name, h in worlds.items()}
    assert tried['hidden'].true_factor > 1.5 * tried['known'].true_factor
    summary = reject_summary({name: reject_table(e) for name, e in tried.items()}, {name: e.true_factor for name, e in tried.items()})
    assert canonical_json(summary) and canonical_json(records(reject_table(tried['known'])))
    assert summary['lost']['hidden'] > 0


def test_a_policy_that_accepts_one_class_only_is_refused(world):
    x, y, _ = world
    with pytest.raises(RiskError, match='only goods or only bads'):
        reject_experiment(x, y, ~y)
