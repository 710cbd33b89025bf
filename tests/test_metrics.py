"""The metrics against scikit-learn, scipy, the definition of DeLong's variance, and the bootstrap."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk
from sklearn.linear_model import LogisticRegression

from riskscore.core import RiskError
from riskscore.metrics import METRICS, class_scores, confusion, cutoff_table, jeffreys_interval, metric, metric_set
from riskscore.ranking import auc, auc_difference, auc_interval, curve, equal_mass, gain_table, ks, pr_auc
from riskscore.reliability import brier, calibration_line, calibration_table, ece, ece_noise, log_loss, wilson_interval


@st.composite
def samples(draw, min_size=4):
    "Outcomes of both classes with pds that are often tied."
    n = draw(st.integers(min_size, 60))
    grid = draw(st.sampled_from([3, 10, 1000]))
    y = draw(st.lists(st.integers(0, 1), min_size=n, max_size=n).filter(lambda v: 1 < sum(v) < len(v) - 1))
    pd = draw(st.lists(st.integers(0, grid), min_size=n, max_size=n))
    return np.array(y), np.array(pd) / grid


def portfolio(n, seed, noise=0.0):
    "Applications whose true pds are known, and what two models of them say."
    rng = np.random.default_rng(seed)
    odds = rng.normal(-2.2, 1.0, n)
    y = (rng.random(n) < 1 / (1 + np.exp(-odds))).astype(int)
    return y, 1 / (1 + np.exp(-odds)), 1 / (1 + np.exp(-(odds + rng.normal(0, noise, n))))


@settings(max_examples=150, deadline=None)
@given(samples())
def test_equal_to_scikit_learn_and_scipy(sample):
    y, pd = sample
    assert auc(y, pd) == pytest.approx(sk.roc_auc_score(y, pd), abs=1e-12)
    assert pr_auc(y, pd) == pytest.approx(sk.average_precision_score(y, pd), abs=1e-12)
    assert brier(y, pd) == pytest.approx(sk.brier_score_loss(y, pd), abs=1e-12)
    assert log_loss(y, np.clip(pd, 0.01, 0.99)) == pytest.approx(sk.log_loss(y, np.clip(pd, 0.01, 0.99)), abs=1e-12)
    assert ks(y, pd).value == pytest.approx(stats.ks_2samp(pd[y == 1], pd[y == 0]).statistic, abs=1e-12)
    fpr, tpr, _ = sk.roc_curve(y, pd, drop_intermediate=False)
    np.testing.assert_allclose(curve(y, pd)['false_alarm'], fpr[1:])
    np.testing.assert_allclose(curve(y, pd)['recall'], tpr[1:])


@settings(max_examples=100, deadline=None)
@given(samples(), st.floats(0, 1))
def test_class_scores_equal_scikit_learn(sample, cut):
    y, pd = sample
    ours, flagged = class_scores(y, pd, cut), pd >= cut
    precision, recall, f1, _ = sk.precision_recall_fscore_support(y, flagged, labels=[0, 1], zero_division=0)
    for label in (0, 1):
        np.testing.assert_allclose([ours[f'precision_{label}'], ours[f'recall_{label}'], ours[f'f1_{label}']],
                                   [precision[label], recall[label], f1[label]])
    tn, fp, fn, tp = sk.confusion_matrix(y, flagged, labels=[0, 1]).ravel()
    assert confusion(y, pd, cut) == {'tp': tp, 'fp': fp, 'tn': tn, 'fn': fn}


def brute_force_variance(y, pd):
    "DeLong's variance from the full matrix of pairs."
    bads, goods = pd[y == 1], pd[y == 0]
    pairs = (bads[:, None] > goods) + 0.5 * (bads[:, None] == goods)
    return pairs.mean(1).var(ddof=1) / len(bads) + pairs.mean(0).var(ddof=1) / len(goods)


@settings(max_examples=100, deadline=None)
@given(samples())
def test_interval_is_delongs_definition(sample):
    y, pd = sample
    found = auc_interval(y, pd)
    margin = 1.959963984540054 * np.sqrt(brute_force_variance(y, pd))
    np.testing.assert_allclose(found, [found.value, max(found.value - margin, 0), min(found.value + margin, 1)], atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(samples(), st.randoms())
def test_order_of_rows_and_monotone_transforms_change_nothing(sample, random):
    y, pd = sample
    order = list(range(len(y)))
    random.shuffle(order)
    np.testing.assert_allclose(auc_interval(y, pd), auc_interval(y[order], np.exp(3 * pd[order])), atol=1e-12)
    for name, column in gain_table(y, pd).items():
        np.testing.assert_allclose(column, gain_table(y[order], pd[order])[name], err_msg=name)
    for name, column in calibration_table(y, pd).items():
        np.testing.assert_allclose(column, calibration_table(y[order], pd[order])[name], err_msg=name)


@settings(max_examples=60, deadline=None)
@given(samples(), st.integers(1, 20))
def test_bins_hold_everything_once_and_keep_ties_together(sample, bins):
    y, pd = sample
    index = equal_mass(pd, bins)
    assert set(index) == set(range(index.max() + 1)) and index.max() < bins
    assert all(len(set(index[pd == value])) == 1 for value in set(pd))
    assert (np.diff(index[np.argsort(pd, kind='stable')]) >= 0).all()
    table = gain_table(y, pd, bins)
    assert (table['count'].sum(), table['bad'].sum(), table['captured'][-1]) == (len(y), y.sum(), pytest.approx(1))


def test_bins_have_equal_sizes_without_ties():
    counts = np.bincount(equal_mass(np.random.default_rng(0).permutation(1003), 10))
    assert counts.min() >= 100 and counts.max() <= 101


def test_interval_and_difference_agree_with_the_bootstrap():
    y, true, noisy = portfolio(3000, seed=1, noise=1.0)
    rng, areas, differences = np.random.default_rng(2), [], []
    for _ in range(400):
        rows = rng.integers(0, len(y), len(y))
        areas.append(auc(y[rows], true[rows]))
        differences.append(areas[-1] - auc(y[rows], noisy[rows]))
    area, difference = auc_interval(y, true), auc_difference(y, true, noisy)
    np.testing.assert_allclose([area.low, area.high], np.quantile(areas, [0.025, 0.975]), atol=0.004)
    np.testing.assert_allclose([difference.low, difference.high], np.quantile(differences, [0.025, 0.975]), atol=0.004)
    assert difference.low > 0 and difference.p_value < 1e-6
    back = auc_difference(y, noisy, true)
    np.testing.assert_allclose([back.value, back.low, back.high], [-difference.value, -difference.high, -difference.low])


def test_interval_covers_the_truth_as_often_as_it_says():
    truth = np.mean([auc(*portfolio(200_000, seed)[:2]) for seed in range(5)])
    intervals = [auc_interval(*portfolio(2000, seed=1000 + seed)[:2]) for seed in range(500)]
    covered = np.mean([found.low <= truth <= found.high for found in intervals])
    assert 0.925 <= covered <= 0.975  # 0.95 give or take 2.5 standard errors


def test_noise_floor_is_what_true_probabilities_show():
    found, floors = zip(*((ece(y, pd), ece_noise(pd)) for y, pd, _ in (portfolio(2000, seed) for seed in range(100))), strict=True)
    assert np.mean(found) == pytest.approx(np.mean(floors), rel=0.06)


def test_calibration_line_is_logistic_regression_and_true_on_true_probabilities():
    y, true, noisy = portfolio(20_000, seed=3, noise=1.0)
    reference = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(np.log(noisy / (1 - noisy))[:, None], y)
    line = calibration_line(y, noisy)
    assert line['slope'] == pytest.approx(reference.coef_[0, 0], abs=1e-5) and line['slope_high'] < 1
    line = calibration_line(y, true)
    assert line['slope_low'] < 1 < line['slope_high'] and line['intercept_low'] < 0 < line['intercept_high']
    shifted = calibration_line(y, 1 / (1 + (1 - true) / true * np.exp(0.7)))
    assert shifted['intercept'] == pytest.approx(line['intercept'] + 0.7, abs=1e-9)
    assert shifted['slope'] == pytest.approx(line['slope'], abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(samples())
def test_calibration_line_never_fails(sample):
    line = calibration_line(*sample)
    assert np.isfinite(line['intercept']) or sample[1].min() == 0 or sample[1].max() == 1
    assert all(isinstance(value, float) for value in line.values())


def test_share_intervals_equal_scipy():
    for bad, count in [(0, 10), (3, 17), (10, 10), (812, 10_000)]:
        wilson = stats.binomtest(bad, count).proportion_ci(method='wilson')
        np.testing.assert_allclose(wilson_interval(bad, count), [wilson.low, wilson.high], atol=1e-12)
        beta = stats.beta(bad + 0.5, count - bad + 0.5)
        expected = [0 if bad == 0 else beta.ppf(0.025), 1 if bad == count else beta.ppf(0.975)]
        np.testing.assert_allclose(jeffreys_interval(bad, count), expected, atol=1e-9)


def test_true_pds_lie_in_the_intervals_of_their_bins():
    inside = np.concatenate([calibration_table(*portfolio(5000, seed)[:2])['inside'] for seed in range(40)])
    assert 0.92 <= inside.mean() <= 0.98


def test_metric_set_agrees_with_the_registry():
    y, pd, _ = portfolio(2000, seed=5)
    figures = metric_set(y, pd, cut=0.2)
    for name in METRICS:
        assert figures[name] == metric(name, y, pd, cut=0.2), name
    assert figures['auc_low'] < figures['auc'] < figures['auc_high'] and figures['rows'] == 2000
    table = cutoff_table(y, pd, [0.2])
    assert table['recall_1'][0] == figures['recall_1'] and table['bad_rate'][0] < figures['bad_rate']


def test_better_says_which_way_is_better():
    y, true, noisy = portfolio(50_000, seed=6, noise=1.5)
    for name in ('auc', 'gini', 'ks', 'pr_auc', 'brier', 'log_loss', 'ece'):
        assert METRICS[name].better * (metric(name, y, true) - metric(name, y, noisy)) > 0, name


@pytest.mark.parametrize('y, pd, message', [
    ([0, 0, 0], [0.1, 0.2, 0.3], 'all 3 are 0'),
    ([], [], 'no rows'),
    ([0, 1], [0.1, np.nan], 'missing or infinite, the first in row 2'),
    ([0, np.nan], [0.1, 0.2], 'neither 0 nor 1, the first in row 2'),
    ([0, 1, 1], [0.1, 0.2], 'one length'),
    ([0, 1], [-0.1, 0.2], 'outside 0 to 1'),
    (['a', 'b'], [0.1, 0.2], 'must be numbers'),
    ([[0, 1]], [[0.1, 0.2]], 'shapes'),
])
def test_bad_input_is_named(y, pd, message):
    for function in (metric_set, brier, ece, calibration_line, calibration_table, confusion):
        with pytest.raises(RiskError, match=message):
            function(y, pd)


def test_all_problems_are_reported_at_once():
    with pytest.raises(RiskError) as caught:
        metric_set([0, 2, 1], [0.1, np.inf, 1.5])
    assert len(caught.value.problems) == 3
