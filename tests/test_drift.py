"""Drift: formulas against SciPy, counts that add up, a known rate of false alarms, hostile bytes, and real shifts."""
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import spatial, stats
from small_bundle import applications, small_contract

from riskscore.contract import Column, Contract, check_frame, load_contract
from riskscore.core import RiskError
from riskscore.datasets import read_frames
from riskscore.drift import DriftRule, count_frame, count_records, counts_from_bytes, histogram, judge_drift, stop_errors
from riskscore.reference import DriftReference, count_values, fit_reference, outside_cells, reference_from_bytes, unseen_cells
from riskscore.significance import (benjamini_hochberg, chi2_critical, chi2_sf, kolmogorov_critical, kolmogorov_sf, normal_critical, normal_sf, rise_sf,
                                    rise_z)

CONTRACTS = Path(__file__).resolve().parents[1] / 'data/contracts'


def contract_of(**kinds) -> Contract:
    "A contract of features of these kinds."
    return Contract('drift', {n: Column(n, k, levels=('N', 'Y') if k == 'flag' else ()) for n, k in kinds.items()})


MIXED = contract_of(amount='number', tail='number', half='number', term='integer', grade='integer', flag='flag', job='category', shop='category')


def mixed(rows: int, seed: int) -> dict[str, np.ndarray]:
    "Columns of every kind, without drift from seed to seed."
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, 41) ** 1.3
    return {
        'amount': np.round(rng.lognormal(9, 1, rows), -2), 'tail': rng.lognormal(0, 2.5, rows),
        'half': np.where(rng.random(rows) < 0.5, np.nan, rng.normal(size=rows)), 'term': rng.choice([6.0, 12, 24, 36], rows, p=[0.1, 0.5, 0.3, 0.1]),
        'grade': rng.poisson(30, rows) * 1.0, 'flag': (rng.random(rows) < 0.075) * 1.0,
        'job': rng.choice(np.array(['nurse', 'pilot', None], dtype=object), rows, p=[0.6, 0.35, 0.05]),
        'shop': np.array([f'shop {i}' for i in range(40)], dtype=object)[rng.choice(40, rows, p=weights / weights.sum())],
    }


HISTORY = mixed(20_000, 0)
REFERENCE = fit_reference(MIXED, HISTORY.__getitem__, pd=np.linspace(0.01, 0.9, 20_000), decision=np.resize(['approve', 'refer', 'decline'], 20_000))


def judged(reference: DriftReference, frame, rule=DriftRule()):  # noqa: B008
    "Verdict and its entries by column."
    verdict = judge_drift(reference, count_frame(reference, frame), rule)
    assert json.loads(json.dumps(verdict, allow_nan=False)) == verdict
    return verdict, {e['column']: e for e in verdict['columns']}


def edited(seed: int, rows: int = 1000, **columns):
    "A window in which some columns are replaced."
    return mixed(rows, seed) | columns


# ---------------------------------------------------------------- formulas

@pytest.mark.parametrize('df', [1, 2, 3, 9, 10, 57, 255, 1000])
def test_chi2_is_scipys(df):
    p = np.array([0.999, 0.5, 0.01, 1e-8, 1e-100])
    critical = np.array([chi2_critical(float(x), df) for x in p])
    np.testing.assert_allclose(critical, stats.chi2.isf(p, df), rtol=1e-8)
    np.testing.assert_allclose(chi2_sf(critical, df), p, rtol=1e-8)


def test_other_laws_are_scipys():
    d, n, m = np.array([0.01, 0.05, 0.1, 0.3]), 500, np.array([50, 200, 5000, 20_000])
    root = np.sqrt(n * m / (n + m))
    np.testing.assert_allclose(kolmogorov_sf(d, n, m), stats.kstwobign.sf((root + 0.12 + 0.11 / root) * d), rtol=1e-9)
    np.testing.assert_allclose(kolmogorov_sf(kolmogorov_critical(0.01, n, m), n, m), 0.01, rtol=1e-9)
    assert normal_sf(6.0) == pytest.approx(stats.norm.sf(6), rel=1e-12) and normal_critical(1e-9) == pytest.approx(stats.norm.isf(1e-9), rel=1e-9)
    p = np.random.default_rng(0).random(50) ** 3
    np.testing.assert_allclose(benjamini_hochberg(p), stats.false_discovery_control(p))


@given(st.integers(0, 300), st.integers(1, 5000), st.integers(0, 60), st.integers(1, 400))
def test_exact_rise_is_the_hypergeometric_tail(k_ref, more_ref, k_now, more_now):
    n, m = k_ref + more_ref, k_now + more_now
    assert rise_sf(k_ref, n, k_now, m) == pytest.approx(stats.hypergeom.sf(k_now - 1, n + m, k_ref + k_now, m), rel=1e-6)


def test_the_exact_tail_of_billions_is_bounded_from_above():
    "After 50,000 terms a geometric series stands for the rest."
    exact = normal_sf(25_000 / math.sqrt(1.25e9))
    assert exact < rise_sf(5 * 10**9, 10**10, 5 * 10**9 + 50_000, 10**10) < 1.1 * exact


def test_two_samples_within_the_kolmogorov_limit():
    "The limit keeps its rate from 50 rows on."
    rng = np.random.default_rng(4)
    for n in (50, 500):
        one, other = np.sort(rng.random((2000, 2000)), axis=1), np.sort(rng.random((2000, n)), axis=1)
        apart = [np.abs(np.searchsorted(a, b, side='right') / 2000 - np.arange(1, n + 1) / n).max() for a, b in zip(one[:700], other, strict=False)]
        assert 0.002 < np.mean(np.array(apart) > kolmogorov_critical(0.01, 2000, n)) < 0.02


# ---------------------------------------------------------------- the edge rule

values_with_ties = st.lists(st.sampled_from([-1.5, -0.0, 0.0, 0.5, 1.0, 2.0, 3.0, 1e6, -1e300, np.nan]) | st.floats(-10, 10), min_size=1, max_size=80)


@given(values_with_ties, values_with_ties)
def test_right_closed_cells(history, now):
    "The counts are those of numpy's histogram of the negated values, as numpy closes bins on the left."
    history, now = np.repeat(history, 12), np.array(now)
    column = fit_reference(contract_of(x='number'), lambda _: history).columns['x']
    known, edges = now[~np.isnan(now)], column.edges
    expected = np.histogram(-known, bins=np.concatenate([[-np.inf], -edges[::-1], [np.inf]]))[0][::-1] if len(edges) else [len(known)]
    counts = count_values(column, now)
    assert counts.tolist() == [*expected, np.isnan(now).sum()]
    assert counts[unseen_cells(column)].sum() == (0 if column.form == 'grid' else (~np.isin(known, history)).sum())
    np.testing.assert_array_equal(count_values(column, np.tile(now, 3000)), 3000 * counts)  # sorted or looked up one by one
    if column.form == 'grid':
        low, high = (np.quantile(history[~np.isnan(history)], q, method='inverted_cdf') for q in (0.001, 0.999))
        assert counts[outside_cells(column)].sum() == ((known < low) | (known > high)).sum()


def test_edges_are_the_exact_quantiles():
    "Numpy's inverted_cdf, but with whole-number ranks: floats put i / 500 of 20,000 one rank too high here and there."
    column, ordered = REFERENCE.columns['tail'], np.sort(HISTORY['tail'])
    assert np.isin(ordered[np.arange(1, 500) * 40 - 1], column.edges).all() and len(column.edges) <= 502
    np.testing.assert_array_equal(column.edges[list(column.tops)], ordered[np.arange(1, 10) * 2000 - 1])
    np.testing.assert_allclose(column.edges[list(column.tops)], np.quantile(HISTORY['tail'], np.arange(1, 10) / 10), rtol=5e-3)


def test_forms_of_columns():
    "Few values that repeat have a cell each, few rows fewer bins, and zero has one sign."
    def fitted(values, kind='number'):
        return fit_reference(contract_of(x=kind), lambda _: np.array(values, dtype=float)).columns['x']
    assert fitted(np.repeat(np.arange(50.0), 10)).form == 'values'
    assert fitted(np.repeat(np.arange(51.0), 10)).form == fitted(np.repeat(np.arange(40.0), 9)).form == 'grid'
    assert fitted([1.0], 'flag').form == 'values' and fitted([1.0], 'flag').points.tolist() == [0, 1]
    assert [len(fitted(np.arange(float(n))).tops) + 1 for n in (5, 60, 199, 200, 5000)] == [2, 3, 9, 10, 10]
    zeros = [fit_reference(contract_of(x='number'), lambda _, zero=zero: np.array([zero, 1.0] * 30)).to_bytes() for zero in (0.0, -0.0)]
    assert zeros[0] == zeros[1]


def test_distances_are_those_of_a_loop_and_of_scipy():
    frame = edited(5, tail=1.3 * mixed(1000, 5)['tail'])
    entries = judged(REFERENCE, frame)[1]
    tens = np.quantile(HISTORY['tail'], np.arange(1, 10) / 10, method='inverted_cdf')
    shares = []
    for values in (HISTORY['tail'], frame['tail']):
        counts = np.bincount(np.searchsorted(tens, values), minlength=10)
        shares.append((counts + 0.5) / (len(values) + 5))
    p, q = shares
    assert entries['tail']['psi'] == pytest.approx(sum((b - a) * math.log(b / a) for a, b in zip(p, q, strict=True)))
    assert entries['tail']['js'] == pytest.approx(spatial.distance.jensenshannon(p, q) ** 2)
    exact = stats.ks_2samp(HISTORY['tail'], frame['tail']).statistic
    assert exact - 1 / 250 <= entries['tail']['ks'] <= exact  # as the largest cell holds 0.2% of history, and not much more now
    assert entries['term']['ks'] == pytest.approx(stats.ks_2samp(HISTORY['term'], frame['term']).statistic)
    assert entries['job']['ks'] is None and entries['tail']['js'] <= entries['tail']['psi'] / 8


# ---------------------------------------------------------------- counts

def answers(rows, seed):
    rng = np.random.default_rng(seed)
    return rng.random(rows), rng.choice(np.array(['approve', 'refer', 'decline'], dtype=object), rows)


def records_of(frame):
    return [dict(zip(frame, row, strict=True)) for row in zip(*(v.tolist() for v in frame.values()), strict=True)]


@given(st.integers(0, 10**6), st.lists(st.integers(0, 40), min_size=1, max_size=6))
@settings(max_examples=30)
def test_counts_add_up_over_any_split_and_any_way_in(seed, sizes):
    rows = sum(sizes)
    frame, (pd, decision) = mixed(rows, seed), answers(rows, seed)
    whole = count_frame(REFERENCE, frame, pd, decision)
    parts, start = [], 0
    for i, size in enumerate(sizes):
        part, at = {n: v[start:start + size] for n, v in frame.items()}, slice(start, start + size)
        parts.append(count_frame(REFERENCE, part, pd[at], decision[at]) if i % 2 else count_records(REFERENCE, records_of(part), pd[at], decision[at].tolist()))
        start += size
    total = parts[0]
    for part in parts[1:]:
        total = part + total
    assert total == whole and counts_from_bytes(REFERENCE, total.to_bytes()) == whole
    assert (np.add.reduceat(whole.flat, REFERENCE.starts[:-1]) == rows).all()


def test_records_as_the_contract_types_them():
    contract = small_contract()
    frame = check_frame(contract, applications(300)).frame
    reference = fit_reference(contract, frame.__getitem__)
    assert list(reference.columns) == ['amount', 'income', 'tenure', 'job', 'channel', 'owner']
    watched = {n: frame[n] for n in reference.columns}
    assert count_records(reference, records_of(watched), [0.1] * 300, ['approve'] * 300) == count_frame(reference, frame)
    assert histogram(reference, count_frame(reference, frame), 'owner')['labels'] == ['N', 'Y', 'rare or unseen', 'missing']


def test_large_counts_survive_bytes():
    counts = count_frame(REFERENCE, mixed(300, 1))
    for factor in (1, 10**3, 10**6, 10**12):
        large = replace(counts, rows=counts.rows * factor, flat=counts.flat * factor)
        assert counts_from_bytes(REFERENCE, large.to_bytes()) == large
    hour = count_records(REFERENCE, records_of(mixed(128, 1)), [0.1] * 128, ['refer'] * 128)
    assert len(hour.to_bytes()) < 2 * 128 * len(REFERENCE.parts)


def test_windows_of_two_references_do_not_mix():
    other = fit_reference(MIXED, mixed(500, 9).__getitem__)
    mine, theirs = count_frame(REFERENCE, mixed(60, 1)), count_frame(other, mixed(60, 1))
    for wrong in (lambda: mine + theirs, lambda: judge_drift(REFERENCE, theirs), lambda: histogram(other, mine, 'job'),
                  lambda: counts_from_bytes(other, mine.to_bytes())):
        with pytest.raises(RiskError):
            wrong()


# ---------------------------------------------------------------- bytes

def test_reference_bytes_are_the_same_for_the_same_rows_in_any_order():
    order = np.random.default_rng(1).permutation(3000)
    frame = mixed(3000, 3)
    one = fit_reference(MIXED, frame.__getitem__)
    other = fit_reference(MIXED, lambda name: frame[name][order])
    assert one.to_bytes() == other.to_bytes() == reference_from_bytes(one.to_bytes()).to_bytes() and one.digest == other.digest


def test_a_read_reference_judges_alike():
    again, counts = reference_from_bytes(REFERENCE.to_bytes()), count_frame(REFERENCE, mixed(700, 8), *answers(700, 8))
    assert judge_drift(again, counts_from_bytes(again, counts.to_bytes())) == judge_drift(REFERENCE, counts)


def test_120_continuous_columns_fit_into_a_megabyte():
    column = fit_reference(contract_of(x='number'), lambda _: np.random.default_rng(0).normal(size=280_000)).columns['x']
    columns = {f'a column with a name {i}': replace(column, name=f'a column with a name {i}', effect=1.23456789012345, share_effect=1.0) for i in range(120)}
    assert 700_000 < len(DriftReference(280_000, columns, {}).to_bytes()) <= 1_000_000


@given(st.data())
@settings(max_examples=150)
def test_hostile_bytes_are_refused_or_harmless(data):
    "Bytes that are cut or changed give a RiskError, or something that can be judged."
    for good, read in ((SMALL.to_bytes(), reference_from_bytes), (SMALL_COUNTS.to_bytes(), lambda d: counts_from_bytes(SMALL, d))):
        place = data.draw(st.integers(0, len(good) - 1))
        cut = data.draw(st.booleans())
        bad = good[:place] if cut else good[:place] + data.draw(st.binary(min_size=1, max_size=8)) + good[place + data.draw(st.integers(0, 8)):]
        try:
            found = read(bad)
        except RiskError:
            continue
        assert not cut
        counts = count_frame(found, SMALL_FRAME) if isinstance(found, DriftReference) and set(found.columns) <= set(SMALL_FRAME) else None
        if counts is not None and all((c.form == 'levels') == (SMALL_FRAME[n].dtype.kind == 'O') for n, c in found.columns.items()):
            judge_drift(found, counts)


SMALL_FRAME = {n: v for n, v in mixed(90, 2).items() if n in ('term', 'half', 'job')}
SMALL = fit_reference(contract_of(half='number', term='integer', job='category'), SMALL_FRAME.__getitem__, decision=np.resize(['approve', 'refer'], 90))
SMALL_COUNTS = count_frame(SMALL, SMALL_FRAME, decision=np.resize(['approve', 'refer'], 90))


def test_bytes_that_almost_fit_are_refused():
    data, counts = SMALL.to_bytes(), SMALL_COUNTS.to_bytes()
    points = np.sort(SMALL.columns['half'].points)[:2].astype('<f8').tobytes()
    assert points in data
    swapped = points[8:] + points[:8]
    for wrong in (data + bytes(4), data.replace(points, swapped), data.replace(b'"rows":90', b'"rows":91'), data.replace(b'approve', b'improve')):
        with pytest.raises(RiskError):
            reference_from_bytes(wrong)
    for wrong in (counts[:-1] + b'\0', counts[:-1] + b'\xff', counts + b'\0', b''):
        with pytest.raises(RiskError):
            counts_from_bytes(SMALL, wrong)


@pytest.mark.parametrize('header', [
    b'[]', b'{}', b'{"rows":1,"columns":[],"answers":[]}', b'[' * 100_000, b'{"rows":1e99}', b'\xff\xfe',
    b'{"rows":1,"columns":[{"points":9999999999}],"answers":[]}',
    b'{"rows":1,"columns":["x"],"answers":[]}', b'{"rows":1,"columns":{"x":1},"answers":[]}', b'{"rows":true,"columns":[null],"answers":null}',
])
def test_headers_of_an_attacker(header):
    start = REFERENCE.to_bytes()[:18]
    for length in (len(header), 2**32 - 1, 0):
        with pytest.raises(RiskError, match='no drift reference'):
            reference_from_bytes(start + length.to_bytes(4, 'little') + header)


# ---------------------------------------------------------------- the rate of false alarms

def test_one_percent_of_columns_without_drift_are_alarmed():
    "Reference and window drawn anew; the rates are those of the contract, neither larger nor much smaller."
    alarms, flags, stops = [], 0, 0
    for seed in range(180):
        reference = fit_reference(MIXED, mixed(3000, 10_000 + seed).__getitem__)
        verdict, entries = judged(reference, mixed((50, 200, 1000, 6000)[seed % 4], 20_000 + seed))
        flags, stops = flags + verdict['flag'], stops + verdict['stop']
        alarms.append([(e['p'] < 0.01, (e['p_ks'] or 1) < 0.01, e['js'] > e['js_critical'], e['p_combined'] < 0.01) for e in entries.values()])
    rates = np.mean(alarms, axis=(0, 1))
    assert flags == stops == 0
    assert (rates < 0.015).all() and rates[0] > 0.003 and rates[3] > 0.003


@pytest.mark.parametrize('rows, share', [(50, 0.075), (100, 0.038), (200, 0.0193), (1000, 0.0039), (50, 0.001), (500, 0.42)])
def test_nearly_empty_bins_keep_the_rate(rows, share):
    "Exact: the probability of every count of a rare value, summed over those that alarm. By the index alone it was up to 2.6%."
    history = (np.arange(20_000) < 20_000 * share) * 1.0
    reference = fit_reference(contract_of(x='flag'), lambda _: history)
    probable = [k for k in range(rows + 1) if stats.binom.pmf(k, rows, share) > 1e-7]
    alarms = [judge_drift(reference, count_frame(reference, {'x': (np.arange(rows) < k) * 1.0}))['columns'][0]['p'] < 0.01 for k in probable]
    assert stats.binom.pmf(probable, rows, share)[alarms].sum() < 0.0135


def test_values_that_a_short_history_lacks_are_no_drift():
    "A long window finds levels and values that a short history did not hold; with a bin for the unseen nine of ten such columns were alarmed."
    contract, weights = contract_of(code='integer', town='category', x='number'), 1 / np.arange(1, 200) ** 1.5
    alarms = []
    for seed in range(100):
        rng, frames = np.random.default_rng(seed), []
        for rows in ((600, 4000), (40, 2000))[seed % 2]:
            drawn = rng.choice(199, rows, p=weights / weights.sum())
            towns = np.array([f'town {i}' for i in drawn], dtype=object)
            frames.append({'code': np.minimum(drawn, 60) * 1.0, 'town': towns, 'x': rng.normal(size=rows)})
        entries = judged(fit_reference(contract, frames[0].__getitem__), frames[1])[1]
        alarms.append([e['p'] < 0.01 for e in entries.values()])
        assert not any(e['broken'] for e in entries.values())
    assert np.mean(alarms) < 0.02


def bursts(rows, rng, mean=20, alike=0.6):
    "Rows in bursts whose members resemble each other."
    ends = np.cumsum(rng.geometric(1 / mean, size=2 * rows // mean + 50))
    burst = np.searchsorted(ends, np.arange(rows), side='right')
    return math.sqrt(alike) * rng.normal(size=burst.max() + 1)[burst] + math.sqrt(1 - alike) * rng.normal(size=rows)


def test_limits_are_multiplied_by_the_design_effect():
    frame = edited(1, tail=np.where(np.arange(1000) < 100, np.nan, mixed(1000, 1)['tail']))
    columns = {n: replace(c, effect=4.0, share_effect=9.0) for n, c in REFERENCE.columns.items()}
    wide, plain = judged(DriftReference(REFERENCE.rows, columns, {}), frame)[1], judged(REFERENCE, frame)[1]
    assert wide['tail']['psi_critical'] == pytest.approx(4 * plain['tail']['psi_critical'])
    assert wide['tail']['ks_critical'] == pytest.approx(3 * plain['tail']['ks_critical'], rel=0.02) and wide['tail']['p_ks'] > plain['tail']['p_ks']
    assert wide['half']['null']['errors'] == pytest.approx(plain['half']['null']['errors'] / 3)
    assert plain['tail']['broken'] and wide['tail']['null']['errors'] < plain['tail']['null']['errors']


def test_the_design_effect_makes_good_for_bursts():
    names = [f'c{i}' for i in range(10)]
    contract, rng = contract_of(**dict.fromkeys(names, 'number')), np.random.default_rng(1)
    rates = {}
    for timed in (True, False):
        history = {n: bursts(20_000, rng) for n in names}
        reference = fit_reference(contract, history.__getitem__, time=np.arange(20_000.0) if timed else None)
        verdicts = [judged(reference, {n: bursts(1000, rng) for n in names}) for _ in range(16)]
        rates[timed] = np.mean([e['p'] < 0.01 for _, entries in verdicts for e in entries.values()])
        assert ('assumed independent' in verdicts[0][0]['note']) is not timed
        assert not timed or not any(v['stop'] for v, _ in verdicts)
    assert rates[True] < 0.015 < 0.5 < rates[False]
    broken = {n: np.full(1000, np.nan) for n in names}
    assert judged(fit_reference(contract, history.__getitem__, time=np.arange(20_000.0)), broken)[0]['stop']


# ---------------------------------------------------------------- what is there is found

def test_nulls_that_jump_stop():
    values = mixed(1000, 1)['tail']
    values[np.random.default_rng(1).random(1000) < 0.8] = np.nan
    verdict, entries = judged(REFERENCE, edited(1, tail=values))
    assert verdict['broken'] == ['tail'] and verdict['stop'] and verdict['columns'][0]['column'] == 'tail'
    assert entries['tail']['null']['now'] == np.isnan(values).mean() and 'is missing in ' in entries['tail']['why'] and 'tail' in verdict['words']


def test_an_outlier_hides_nothing():
    calm, shifted = mixed(1000, 2)['half'], mixed(1000, 2)['half'] + 0.5
    shifted[np.flatnonzero(~np.isnan(shifted))[0]] = 1e6
    assert judged(REFERENCE, edited(2, half=shifted))[1]['half']['verdict'] != 'noise'
    assert judged(REFERENCE, edited(2, half=np.append(calm[1:], 1e6)))[1]['half']['verdict'] == 'noise'


@pytest.mark.parametrize('rows, change', [(5000, lambda f: {'tail': 2 * f['tail']}), (2500, lambda f: {'half': f['half'] + 0.2})])
def test_small_shifts_are_found_and_do_not_stop(rows, change):
    verdicts = [judged(REFERENCE, edited(seed, rows, **change(mixed(rows, seed)))) for seed in range(100, 110)]
    column = next(iter(change(mixed(1, 1))))
    assert sum(entries[column]['verdict'] in ('immaterial', 'material') for _, entries in verdicts) >= 9
    assert not any(v['stop'] for v, _ in verdicts)


def test_unseen_levels_values_and_units_stop():
    rows, rng = 400, np.random.default_rng(3)
    some = rng.random(rows) < 0.2
    base = mixed(rows, 3)
    changes = {'shop': ('unseen', np.where(some, 'new shop', base['shop'])), 'term': ('unseen', np.where(some, 13.0, base['term'])),
               'amount': ('outside', base['amount'] * 1000), 'tail': ('outside', base['tail'] * 1e6)}
    for column, (share, values) in changes.items():
        verdict, entries = judged(REFERENCE, edited(3, rows, **{column: values}))
        assert verdict['broken'] == [column] and verdict['stop'], column
        assert entries[column][share]['now'] - entries[column][share]['reference'] > 0.05 and entries[column][share]['errors'] > 5


def test_all_material_columns_are_ranked_and_named():
    frame = mixed(2000, 6)
    frame |= {'amount': frame['amount'] * 1.6, 'job': np.where(np.random.default_rng(6).random(2000) < 0.4, 'pilot', frame['job']), 'grade': frame['grade'] + 3}
    verdict, entries = judged(REFERENCE, frame)
    assert [e['column'] for e in verdict['columns'][:3]] == sorted(('amount', 'job', 'grade'), key=lambda n: -entries[n]['psi'])
    assert (verdict['material'], verdict['drift_share'], verdict['flag'], verdict['stop']) == (3, 3 / 8, 1, False)
    assert "'pilot' went from 3" in entries['job']['why'] and 'retraining' in verdict['words']
    assert judged(REFERENCE, frame, DriftRule(stop_on='material'))[0]['stop']
    dead = frame | {'half': np.full(2000, np.nan)}
    assert judged(REFERENCE, dead)[0]['stop'] and not judged(REFERENCE, dead, DriftRule(stop_on='never'))[0]['stop']


# ---------------------------------------------------------------- when a column is broken

def test_few_rows_give_no_verdict():
    noise = {'noise'}
    for rows, verdicts, share, stop in ((49, {'too few rows'}, None, False), (99, noise, None, False), (199, noise, 0.0, False), (200, noise, 0.0, True)):
        frame = edited(5, rows, tail=np.full(rows, np.nan))
        verdict, entries = judged(REFERENCE, frame)
        assert {e['verdict'] for n, e in entries.items() if n != 'tail'} == verdicts
        assert (share is None) == (verdict['drift_share'] is None) and verdict['stop'] is stop
        assert verdict['broken'] == ([] if rows < 50 else ['tail'])


def test_a_rise_of_less_than_five_points_is_not_broken():
    history, rows = np.where(np.arange(50_000) < 500, np.nan, 1.0), 20_000
    reference = fit_reference(contract_of(x='number'), lambda _: history)
    for share, broken in ((0.05, False), (0.0599, False), (0.0602, True)):
        entry = judged(reference, {'x': np.where(np.arange(rows) < share * rows, np.nan, 1.0)})[1]['x']
        assert entry['null']['errors'] > 5 and entry['broken'] is broken


def test_of_a_small_share_the_exact_tail_decides():
    "15 instead of 4 of 200 are more than five standard errors, and happen in one of 50,000 windows."
    history = np.where(np.arange(20_000) < 400, np.nan, 1.0)
    reference = fit_reference(contract_of(x='number'), lambda _: history)
    entry = judged(reference, {'x': np.where(np.arange(200) < 15, np.nan, 1.0)})[1]['x']
    assert rise_z(400, 20_000, 15, 200) > 5 > entry['null']['errors'] == pytest.approx(normal_critical(rise_sf(400, 20_000, 15, 200)))
    assert not entry['broken'] and entry['verdict'] == 'immaterial'
    assert judged(reference, {'x': np.where(np.arange(200) < 22, np.nan, 1.0)})[1]['x']['broken']


def test_looking_often_raises_the_limit():
    assert stop_errors(DriftRule(), 240) == 5 < stop_errors(DriftRule(looks_per_year=8760), 240) < stop_errors(DriftRule(looks_per_year=525_600), 240) < 7
    history = np.where(np.arange(20_000) < 2000, np.nan, 1.0)
    reference = fit_reference(contract_of(x='number'), lambda _: history)
    window = {'x': np.where(np.arange(200) < 45, np.nan, 1.0)}
    errors = judged(reference, window)[1]['x']['null']['errors']
    assert judged(reference, window)[0]['stop'] and not judged(reference, window, DriftRule(looks_per_year=1e9))[0]['stop'] and 5 < errors < 6


def test_a_window_that_grows_and_is_looked_at_again_and_again_does_not_stop():
    rule = DriftRule(looks_per_year=365 * 24)
    for day in range(6):
        window = count_frame(REFERENCE, mixed(0, 0))
        for hour in range(24):
            window = window + count_frame(REFERENCE, mixed(200, 1000 * day + hour))
            assert not judge_drift(REFERENCE, window, rule)['stop']


@pytest.mark.parametrize('watched, broken, stop', [(99, 1, True), (116, 1, True), (199, 1, True), (200, 1, False), (200, 2, True)])
def test_how_many_broken_columns_stop(watched, broken, stop):
    names = [f'c{i}' for i in range(watched)]
    reference = fit_reference(contract_of(**dict.fromkeys(names, 'number')), lambda _: np.arange(300.0))
    frame = {n: np.full(300, np.nan) if i < broken else np.arange(300.0) for i, n in enumerate(names)}
    assert judged(reference, frame)[0]['stop'] is stop


# ---------------------------------------------------------------- odd columns

@pytest.mark.parametrize('kind, history', [
    ('number', [np.nan] * 60), ('number', [1.0] * 60), ('number', [5.0]), ('number', np.arange(30.0)), ('flag', [np.nan] * 10), ('flag', [1.0] * 60),
    ('category', [None] * 60), ('category', ['a'] * 60), ('category', [f'l{i}' for i in range(1000)]), ('date', np.arange(19_000.0, 19_700)),
])
def test_odd_histories_are_judged(kind, history):
    "All null, constant, one row, all different, a thousand levels: any window gets a finite verdict."
    history = np.array(history, dtype=object if kind == 'category' else float)
    reference = fit_reference(contract_of(x=kind), lambda _: history)
    reference = reference_from_bytes(reference.to_bytes())
    null = None if kind == 'category' else np.nan
    other = ['b', 'c'] if kind == 'category' else [0.0, 1.0] if kind == 'flag' else [-7.5, 1e300]
    for window in ([], [null] * 300, other * 150, list(history), list(history) * 10):
        verdict, entries = judged(reference, {'x': np.array(window, dtype=history.dtype)})
        shares = histogram(reference, count_frame(reference, {'x': np.array(window, dtype=history.dtype)}), 'x')
        assert len(shares['labels']) == len(shares['now']) == len(shares['reference']) and verdict['rows'] == len(window)
        assert sum(shares['reference']) == pytest.approx(1) and sum(shares['now']) == pytest.approx(float(len(window) > 0))
    assert entries['x']['verdict'] in ('noise', 'too few rows')  # ten times history itself


def test_a_constant_column_that_comes_alive_is_broken_and_one_that_dies_too():
    reference = fit_reference(contract_of(x='number', y='number'), {'x': np.zeros(1000), 'y': np.random.default_rng(0).normal(size=1000)}.__getitem__)
    alive, dead = np.random.default_rng(1).normal(size=300), np.full(300, 99.0)
    assert judged(reference, {'x': alive, 'y': dead})[0]['broken'] == ['x', 'y']
    assert judged(reference, {'x': np.full(300, -0.0), 'y': np.random.default_rng(2).normal(size=300)})[0]['broken'] == []


def test_a_level_that_vanishes_is_drift():
    jobs = HISTORY['job'][:1000].copy()
    jobs[jobs == 'pilot'] = 'nurse'
    entry = judged(REFERENCE, edited(7, job=jobs))[1]['job']
    assert entry['verdict'] == 'material' and not entry['broken']


def test_temporal_columns_are_not_watched():
    contract = Contract('t', {'a': Column('a'), 'month': Column('month', temporal=True), 'when': Column('when', 'date', 'time')})
    assert list(fit_reference(contract, lambda _: np.arange(50.0)).columns) == ['a']


def test_answers_are_judged_beside():
    frame, pd = mixed(800, 3), np.random.default_rng(3).uniform(0.4, 0.9, 800)
    counts = count_frame(REFERENCE, frame, pd, np.array(['decline'] * 600 + ['approve'] * 200, dtype=object))
    verdict = judge_drift(REFERENCE, counts)
    assert [(e['column'], e['verdict']) for e in verdict['answers']] == [('pd', 'material'), ('decision', 'material')]
    assert verdict['approval']['now'] == 0.25 and verdict['approval']['reference'] == pytest.approx(1 / 3, abs=1e-4) and verdict['approval']['p'] < 1e-5
    assert not verdict['material'] and not verdict['stop']
    assert judge_drift(REFERENCE, count_frame(REFERENCE, frame))['approval'] is None


def test_nothing_heavy_is_imported():
    heavy = ['pandas', 'scipy', 'pyarrow', 'sklearn', 'lightgbm', 'matplotlib']
    code = f'import sys, riskscore.drift; found = set({heavy}) & set(sys.modules); sys.exit(str(found) if found else 0)'
    subprocess.run([sys.executable, '-c', code], check=True, env={**os.environ, 'PYTHONPATH': str(CONTRACTS.parents[1])})


# ---------------------------------------------------------------- real shifts

@pytest.fixture(scope='module')
def home_credit():
    "Reference of the train file, and the test file."
    folder = Path(os.environ.get('RISKSCORE_DATA', ''), 'home_credit_sample')
    if not (folder / 'application_train.csv.gz').exists():
        pytest.skip('RISKSCORE_DATA names no folder with the Home Credit sample')
    contract = load_contract(CONTRACTS / 'home_credit.yaml')
    tables = [whole(folder / f'application_{part}.csv.gz', contract) for part in ('train', 'test')]
    return fit_reference(contract, tables[0].__getitem__), tables[1]


def whole(path, contract):
    blocks = [batch.frame for batch in read_frames(path, contract)]
    return {n: np.concatenate([b[n] for b in blocks]) for n in blocks[0]}


def test_the_shift_of_home_credit_is_found_ranked_explained_and_does_not_stop(home_credit):
    reference, future = home_credit
    verdict, entries = judged(reference, future)
    assert (verdict['watched'], verdict['broken'], verdict['stop'], verdict['flag']) == (116, [], False, 0)
    assert entries['NAME_CONTRACT_TYPE']['verdict'] == 'material' and "'Revolving loans' went from 9.3% to 0.9%" in entries['NAME_CONTRACT_TYPE']['why']
    for amount in ('AMT_CREDIT', 'AMT_GOODS_PRICE', 'AMT_ANNUITY'):
        assert entries[amount]['verdict'] == 'immaterial' and entries[amount]['psi'] > 10 * entries[amount]['psi_critical']
    assert 'NAME_CONTRACT_TYPE' in [e['column'] for e in verdict['columns'][:4]]
    assert [e['psi'] for e in verdict['columns'][:4]] == sorted((e['psi'] for e in verdict['columns']), reverse=True)[:4]


def times(name, factor):
    return lambda f: f | {name: f[name] * factor}


def text(name, value):
    return lambda f: f | {name: np.full(len(f[name]), value, dtype=object)}


BLACK_SWAN = (times('AMT_INCOME_TOTAL', 10), text('NAME_EDUCATION_TYPE', 'Self-taught'), text('NAME_CONTRACT_TYPE', 'Barter'))


@pytest.mark.parametrize('rows', [200, 2000])
@pytest.mark.parametrize('changes, broken', [
    ((times('AMT_CREDIT', 1000),), {'AMT_CREDIT'}), ((times('EXT_SOURCE_2', np.nan),), {'EXT_SOURCE_2'}),
    (BLACK_SWAN, {'AMT_INCOME_TOTAL', 'NAME_EDUCATION_TYPE', 'NAME_CONTRACT_TYPE'}),
])
def test_shocks_of_home_credit_stop(home_credit, rows, changes, broken):
    reference, future = home_credit
    frame = {n: v[:rows] for n, v in future.items()}
    assert not judged(reference, frame)[0]['stop']
    for change in changes:
        frame = change(frame)
    verdict = judged(reference, frame)[0]
    assert verdict['stop'] and set(verdict['broken']) == broken and all(name in verdict['words'] for name in broken)


def test_no_month_of_pi_m5_stops(real_data):
    "Nor with a design effect; but late months are flagged."
    contract = load_contract(CONTRACTS / 'pi_m5.yaml')
    table = whole(real_data / 'pi_m5/Base_de_datos.xlsx', contract)
    days = table[contract.time.name]
    months = days.astype('datetime64[D]').astype('datetime64[M]')
    history = days <= np.quantile(days, 0.8)
    for time in (None, days[history]):
        reference = fit_reference(contract, lambda name: table[name][history], time=time)
        verdicts = [judged(reference, {n: v[months == month] for n, v in table.items()})[0] for month in np.unique(months)]
        assert len(verdicts) == 18 and sum(v['rows'] for v in verdicts) == len(days)
        assert not any(v['stop'] or v['broken'] for v in verdicts)
        assert any(v['flag'] for v in verdicts[-6:])
