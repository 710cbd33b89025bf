"""Segments: lights against exact tests, planted drift by month, the missing as a segment, and honesty about many looks."""
import datetime as dt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from riskscore.contract import Column
from riskscore.core import RiskError, canonical_json
from riskscore.metrics import jeffreys_interval, metric_set
from riskscore.segments import Segments, calibration_light, grade_of, records, segment_of, segment_table, suspicious, vintage_table, worded

NUMBER = Column('amount', 'number')


def portfolio(n, seed, shift=0.0):
    "Applications with true pds, whose outcomes happen at pds shifted by `shift` log-odds."
    rng = np.random.default_rng(seed)
    odds = rng.normal(-2.2, 1, n)
    return rng.random(n) < 1 / (1 + np.exp(-(odds + shift))), 1 / (1 + np.exp(-odds)), rng


# ---------------------------------------------------------------- cutting

def test_the_missing_are_a_segment_of_their_own():
    values = np.r_[np.arange(100.0), np.full(30, np.nan)]
    found = segment_of(NUMBER, values, bands=4)
    assert found.names[-1] == 'missing' and len(found.names) == 5
    assert np.bincount(found.place).tolist() == [25, 25, 25, 25, 30]
    words = segment_of(Column('job', 'category'), np.array(['x', None, 'y', 'x'], dtype=object))
    assert words.names == ('x', 'y', 'missing') and words.place.tolist() == [0, 2, 1, 0]
    flags = segment_of(Column('car', 'flag', levels=('no', 'yes')), np.array([1, 0, np.nan, 1]))
    assert flags.names == ('no', 'yes', 'missing') and flags.place.tolist() == [1, 0, 2, 1]
    assert segment_of(Column('job', 'category'), np.array([None, None], dtype=object)).names == ('missing',)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.none(), st.floats(-1e9, 1e9), st.sampled_from([0.0, 1.0])), min_size=1, max_size=80), st.integers(1, 8),
       st.sampled_from(['number', 'integer', 'date']))
def test_each_application_is_in_one_segment_and_bands_are_in_order(values, bands, kind):
    numbers = np.array([np.nan if v is None else v for v in values])
    numbers = np.mod(np.floor(numbers), 80_000) if kind == 'date' else numbers
    found = segment_of(Column('x', kind), numbers, bands)
    assert len(found.place) == len(values) and found.place.min() >= 0 and found.place.max() == len(found.names) - 1
    known = np.isfinite(numbers)
    assert (np.isin(found.place, [len(found.names) - 1]) == ~known).all() or known.all()
    order = np.argsort(numbers[known], kind='stable')
    assert (np.diff(found.place[known][order]) >= 0).all()
    assert len(set(found.place[known])) <= bands


def test_grades_double_the_odds():
    edges = 1 / (1 + 50 / 2.0 ** np.arange(6))  # 50:1, 25:1, 12.5:1, …
    assert grade_of(edges).place.tolist() == [0, 1, 2, 3, 4, 5]
    assert grade_of(edges * 1.05).place.tolist() == [1, 2, 3, 4, 5, 6]
    assert grade_of(np.array([0.0, 1.0])).place.tolist() == [0, 6]


# ---------------------------------------------------------------- lights

def test_lights_agree_with_the_intervals_and_with_exact_tests():
    bad, count = np.arange(0, 60), np.full(60, 400)
    for pd in (0.02, 0.05, 0.1):
        found = calibration_light(bad, count, np.full(60, pd))
        low, high = jeffreys_interval(bad, count)
        np.testing.assert_array_equal((found['light'] == 'green'), (low <= pd) & (pd <= high))
        low, high = jeffreys_interval(bad, count, 0.99)
        np.testing.assert_array_equal((found['light'] != 'red'), (low <= pd) & (pd <= high))
        exact = np.array([stats.binomtest(int(k), 400, pd).pvalue for k in bad])
        assert (found['light'] == 'red')[exact < 0.004].all() and (found['light'] == 'green')[exact > 0.09].all()
    assert set(calibration_light(bad, count, np.full(60, 0.05))['finding'][:5]) == {'pd too high'}


def test_a_true_pd_is_rarely_amber_and_more_rarely_red():
    rng = np.random.default_rng(0)
    for count, pd in ((300, 0.03), (1000, 0.08), (5000, 0.2)):
        lights = calibration_light(rng.binomial(count, pd, 4000), np.full(4000, count), np.full(4000, pd))['light']
        assert 0.02 < (lights != 'green').mean() < 0.075
        assert (lights == 'red').mean() < 0.02


def test_grades_of_a_pd_that_is_too_low_turn_red():
    y, pd, _ = portfolio(30_000, 1)
    assert 'red' not in segment_table(y, pd, grade_of(pd))['light']
    y, pd, _ = portfolio(30_000, 1, shift=0.5)
    table = segment_table(y, pd, grade_of(pd))
    assert (table['light'] == 'red')[table['count'] > 2000].all() and set(table['finding']) <= {'pd too low', ''}


# ---------------------------------------------------------------- tables

def test_a_table_repeats_the_metrics_of_each_segment():
    y, pd, rng = portfolio(3000, 2)
    segments = segment_of(NUMBER, rng.normal(size=3000), bands=3)
    table = segment_table(y, pd, segments)
    for i in range(3):
        rows = segments.place == i
        whole = metric_set(y[rows], pd[rows])
        for ours, name in (('count', 'rows'), ('pd', 'pd_mean'), *((name, name) for name in ('bad', 'bad_rate', 'auc', 'auc_low', 'ks', 'ece'))):
            assert table[ours][i] == pytest.approx(whole[name], abs=1e-12)
    assert canonical_json(records(table))


def test_small_segments_are_pooled_and_one_class_has_no_auc():
    y = np.r_[np.tile([0, 1], 100), np.zeros(150), np.tile([0, 1], 30)]
    table = segment_table(y, np.full(410, 0.4), Segments(tuple('abcd'), np.repeat([0, 1, 2, 3], [200, 150, 30, 30])))
    assert table['segment'].tolist() == ['a', 'b', '2 small ones'] and table['count'].tolist() == [200, 150, 60]
    assert np.isnan(table['auc'][1]) and records(table)[1]['auc'] is None
    alone = segment_table(y, np.full(410, 0.4), Segments(tuple('ab'), (np.arange(410) >= 400).astype(int)))
    assert alone['segment'].tolist() == ['a', 'b']  # a single small one keeps its name


def test_many_looks_name_what_was_planted_and_nothing_else():
    y, pd, rng = portfolio(12_000, 3)
    columns = {f'c{i}': segment_of(NUMBER, rng.normal(size=12_000)) for i in range(60)}
    clean = {name: segment_table(y, pd, segments) for name, segments in columns.items()}
    assert sum((table['light'] == 'red').sum() for table in clean.values()) > 0  # 300 looks: some are red by chance
    assert len(suspicious(clean)['column']) == 0
    y = y | ((columns['c7'].place == 2) & (rng.random(12_000) < 0.05))
    planted = suspicious({name: segment_table(y, pd, segments) for name, segments in columns.items()})
    assert planted['column'].tolist() == ['c7'] and planted['finding'].tolist() == ['pd too low']


# ---------------------------------------------------------------- time

def days(first, n):
    "Days since 1970, ten applications a day."
    return (dt.date.fromisoformat(first) - dt.date(1970, 1, 1)).days + np.arange(n) / 10


def test_a_planted_drift_is_seen_in_its_month():
    y, pd, rng = portfolio(3650, 4)
    times = days('2025-01-01', 3650)
    late = times >= days('2025-10-01', 1)[0]
    worse = vintage_table(times, y | (late & (rng.random(3650) < 0.12)), pd)  # from October on more go bad
    assert worse['segment'].tolist() == [f'2025-{m:02d}' for m in range(1, 13)]
    assert worse['count'].tolist() == [10 * d for d in (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)]
    assert (worse['p_value'][9:] < 1e-4).all() and (worse['p_value'][:9] > 1e-3).all()
    assert set(worse['finding'][9:]) == {'pd too low'} and (worse['psi'] < 0.15).all()  # 310 a month: chance alone reaches 0.11
    moved = vintage_table(times, y, np.where(late, np.minimum(pd * 2.2, 1), pd))  # and here others come, by their score
    assert (moved['psi'][9:] > 0.25).all() and (moved['psi'][:9] < 0.15).all()
    assert (moved['psi'][9:] > moved['psi_chance'][9:]).all() and set(moved['finding'][9:]) == {'pd too high'}
    assert vintage_table(times, y, pd, by='quarter')['segment'].tolist() == ['2025 Q1', '2025 Q2', '2025 Q3', '2025 Q4']
    assert vintage_table(times, y, pd, by='year')['segment'].tolist() == ['2025']


def test_psi_without_drift_stays_below_what_chance_reaches():
    above = total = 0
    for seed in range(30):
        y, pd, _ = portfolio(3650, 50 + seed)
        table = vintage_table(days('2025-01-01', 3650), y, pd)
        above, total = above + int((table['psi'][1:] > table['psi_chance'][1:]).sum()), total + 11
    assert above / total < 0.1  # 5% is stated; the months share their first one, so it scatters


def test_dates_that_are_missing_and_periods_that_do_not_exist_are_refused():
    y, pd, _ = portfolio(100, 5)
    with pytest.raises(RiskError, match='have no date'):
        vintage_table(np.r_[np.nan, days('2025-01-01', 99)], y, pd)
    with pytest.raises(RiskError, match='month, quarter, year'):
        vintage_table(days('2025-01-01', 100), y, pd, by='moon')


def test_words_hide_what_is_not_known():
    y, pd, _ = portfolio(500, 6)
    cells = worded(segment_table(y, pd, Segments(('a', 'b'), (np.arange(500) == 0).astype(int))), {'segment': ('S', ''), 'auc': ('AUC', '.2f')})
    assert cells['S'] == ['a', 'b'] and cells['AUC'][1] == '–' and '(' in cells['AUC'][0]
