"""Matured outcomes against predictions: the false-alarm promise, what is found and how soon, and outcomes that count exactly once.

The promise is held in two ways: exactly, by taking the expectation of the next e-value over both outcomes at states that random histories
lead to; and by simulation.
"""
import json
import threading
from dataclasses import replace

import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from small_bundle import applications, small_bundle, small_contract
from test_postgres import cluster  # noqa: F401 a server of the tests' own

from riskscore import matured
from riskscore.anytime import CalibrationTest, RankingTest, from_state, log_bet, state_of, verdict_of
from riskscore.bundle import load_bundle
from riskscore.calibration import sigmoid
from riskscore.chain import now
from riskscore.contract import check_frame
from riskscore.core import RiskError, canonical_json
from riskscore.matured import watch_outcomes
from riskscore.money import column_parts
from riskscore.performance import estimate_performance, pd_histogram, performance_reference, reference_performance
from riskscore.ranking import auc
from riskscore.reliability import wilson_interval
from riskscore.store import open_store

ALPHA, TOLERANCE = 0.01, 0.15
NAMES = ['a', 'b', 'c', 'd']


def logit(p):
    return np.log(p / (1 - p))


# ---------------------------------------------------------------- the promise, exactly

@given(st.floats(1e-6, 1 - 1e-6), st.floats(-9, 9), st.floats(0, 1), st.floats(-1, 1))
def test_no_bet_is_expected_to_win_anywhere_in_the_band(pd, belief, tolerance, place):
    log_odds = logit(pd)
    p = sigmoid(np.array(log_odds + place * tolerance))
    win, lose = (np.exp(log_bet(np.array(log_odds), np.array(belief), np.array(y), tolerance)) for y in (1, 0))
    assert p * win + (1 - p) * lose <= 1 + 1e-9
    edge = sigmoid(np.array(log_odds + np.sign(belief) * tolerance))
    if abs(belief) > tolerance:  # and at the edge it is fair: nothing is given away
        assert edge * win + (1 - edge) * lose == pytest.approx(1, abs=1e-9)


def grown(test, seed, count):
    "The test after a history that leads somewhere: calm, then wrong, with columns that matter."
    rng = np.random.default_rng(seed)
    parts = rng.normal(0, 0.5, (count, len(test.columns)))
    pd = sigmoid(-2.5 + parts.sum(axis=1))
    truth = sigmoid(logit(pd) + rng.choice([-1, 0, 1]) * (np.arange(count) > count / 2) - rng.choice([0, 2]) * parts[:, 0])
    test.add(pd, rng.random(count) < truth, parts)
    return test


@pytest.mark.parametrize('seed', range(12))
def test_the_next_e_value_of_calibration_is_never_expected_to_rise(seed):
    rng = np.random.default_rng(100 + seed)
    held = json.dumps(state_of(grown(CalibrationTest(ALPHA, TOLERANCE, NAMES), seed, 30 + 40 * seed)))
    now = np.exp(from_state(json.loads(held)).course.log_e)
    for place in (-1, -0.3, 0, 1):
        parts = rng.normal(0, 1, len(NAMES))
        pd = sigmoid(np.array(-2 + parts.sum()))
        p, after = sigmoid(logit(pd) + place * TOLERANCE), []
        for bad in (0, 1):
            test = from_state(json.loads(held))
            test.add(pd, bad, parts)
            after.append(np.exp(test.course.log_e))
        assert (1 - p) * after[0] + p * after[1] <= now * (1 + 1e-9)


@pytest.mark.parametrize('seed', range(8))
def test_the_next_e_value_of_ranking_is_expected_to_stay_at_the_edge(seed):
    rng = np.random.default_rng(seed)
    test = RankingTest(ALPHA, 0.05)
    pd = rng.uniform(0.01, 0.3, 200)
    test.add(pd, rng.random(200) < 0.1 + 0.5 * (pd < 0.1), 0.75)
    test.add(0.1, int(not test.open[1]), 0.75)  # the open block is closed, whatever it was
    test.open = [[], []]
    held, now = json.dumps(state_of(test)), np.exp(test.course.log_e)
    right, wrong = (from_state(json.loads(held)) for _ in range(2))
    right.add([0.1, 0.2], [0, 1], 0.75)
    wrong.add([0.2, 0.1], [0, 1], 0.75)
    assert 0.7 * np.exp(right.course.log_e) + 0.3 * np.exp(wrong.course.log_e) == pytest.approx(now, rel=1e-9)
    assert 0.8 * np.exp(right.course.log_e) + 0.2 * np.exp(wrong.course.log_e) < now


# ---------------------------------------------------------------- the promise, by simulation

def streams(count, outcomes, truth, seed, change=0, cut=1.0, spread=0.4):
    "Alarms of so many streams, and how often a z-test after each outcome would have accused; `truth` gives log-odds from those of the model and the parts."
    rng = np.random.default_rng(seed)
    test, sums, accused = CalibrationTest(ALPHA, TOLERANCE, NAMES, (count,)), np.zeros((2, count)), np.zeros(count, dtype=bool)
    pool = rng.normal(0, spread, (60_000, len(NAMES)))
    pool = pool[sigmoid(-2.6 + pool.sum(axis=1)) < cut]
    for n in range(outcomes):
        parts = pool[rng.integers(0, len(pool), count)]
        log_odds = -2.6 + parts.sum(axis=1)
        pd, true = sigmoid(log_odds), truth(log_odds, parts) if n >= change else log_odds
        bad = rng.random(count) < sigmoid(true)
        test.add(pd[None], bad[None], parts[None])
        sums += np.stack([bad - pd, pd * (1 - pd)])
        accused |= (n >= 29) & (np.abs(sums[0]) > 2.5758 * np.sqrt(sums[1]))
    return test.course.alarm_at, accused


def upper(alarms):
    "One-sided 95% Clopper-Pearson bound of a share."
    return stats.beta.ppf(0.95, (alarms > 0).sum() + 1, (alarms == 0).sum()) if (alarms == 0).any() else 1.0


EDGES = {'inside': lambda log_odds, parts: log_odds, 'upper edge': lambda log_odds, parts: log_odds + TOLERANCE,
         'lower edge': lambda log_odds, parts: log_odds - TOLERANCE,
         'worst for a column': lambda log_odds, parts: log_odds - TOLERANCE * np.sign(parts[:, 0])}


@pytest.mark.parametrize('edge', ['upper edge', 'worst for a column'])
def test_sound_streams_are_not_accused_though_looked_at_after_every_outcome(edge):
    alarms, accused = streams(400, 200, EDGES[edge], 1)
    assert upper(alarms) <= ALPHA
    assert accused.mean() > 0.04  # the same streams, tested over and over in the usual way


@pytest.mark.slow
@pytest.mark.parametrize('edge', list(EDGES))
def test_two_thousand_streams_of_five_thousand_outcomes_keep_the_promise(edge):
    alarms, accused = streams(2000, 5000, EDGES[edge], 2)
    assert upper(alarms) <= ALPHA
    assert accused.mean() > 0.15


@pytest.mark.slow
def test_order_keeps_the_promise_at_the_edge():
    rng, alarms = np.random.default_rng(3), []
    for _ in range(1000):
        test = RankingTest(ALPHA, 0.03)
        bad = rng.random(3000) < 0.1
        test.add(rng.normal(bad * stats.norm.ppf(0.67) * np.sqrt(2)), bad, 0.70)  # an AUC of 0.67 exactly
        alarms.append(int(test.course.alarm_at))
    assert upper(np.array(alarms)) <= ALPHA


# ---------------------------------------------------------------- what is found

def test_a_reversed_relation_is_found_with_outcomes_of_the_approved_only():
    """One of four columns, an effect of ± 0.8 log-odds a standard deviation, approved below a pd of 15%, after 600 calm outcomes.

    Measured with 400 streams: half are found within 167 outcomes of the change, 90% within 262.
    """
    alarms, _ = streams(20, 2400, lambda log_odds, parts: log_odds - 2 * parts[:, 0], 4, change=600, cut=0.15, spread=0.8)
    delay = alarms - 600
    assert (delay > 0).all()
    assert np.median(delay) < 300 and np.quantile(delay, 0.9) < 500


def test_the_view_that_pays_names_what_has_changed():
    rng = np.random.default_rng(5)
    parts = rng.normal(0, 0.8, (2600, len(NAMES)))
    log_odds = -2.6 + parts.sum(axis=1)
    test = CalibrationTest(ALPHA, TOLERANCE, NAMES)
    test.add(sigmoid(log_odds), rng.random(2600) < sigmoid(log_odds - 2 * parts[:, 2] * (np.arange(2600) > 500)), parts)
    told = verdict_of(test)
    assert told['alarm'] and told['alarm_at'] > 500
    assert 'c' in told['suspects'][0]['view'].split() and told['suspects'][0]['family'] == 'column'


def test_a_reversed_order_is_found_and_a_better_one_is_not():
    rng = np.random.default_rng(6)
    bad = rng.random(4000) < 0.1
    good_order = rng.normal(bad * 1.5)
    test = RankingTest(ALPHA, 0.03)
    test.add(good_order, bad, 0.70)
    assert not test.course.alarm_at
    test.add(-good_order, bad, 0.70)
    assert test.course.alarm_at


def test_an_estimate_without_outcomes_is_blind_to_what_the_test_sees():
    rng = np.random.default_rng(7)
    pd = rng.beta(1, 9, 6000)
    history = rng.random(6000) < pd
    reference = performance_reference(pd, history)
    estimate = estimate_performance(reference, pd_histogram(reference, pd))
    assert estimate['auc'] == pytest.approx(auc(history, pd), abs=0.01) and 'cannot see' in estimate['note']
    turned = rng.random(6000) < np.sort(pd)[::-1][np.argsort(np.argsort(pd))]  # the safest carry the largest risk; the estimate reads no outcome
    assert auc(turned, pd) < 0.4
    test = CalibrationTest(ALPHA, TOLERANCE)
    test.add(pd[:1500], turned[:1500])
    assert test.course.alarm_at


@given(st.integers(0, 10_000), st.floats(0.01, 0.99))
@settings(max_examples=20)
def test_history_below_a_cut_off_is_what_a_plain_look_gives(seed, cut):
    rng = np.random.default_rng(seed)
    pd = rng.choice([0.01, 0.05, 0.2, 0.2, 0.5, 0.9], 300) if seed % 2 else rng.beta(1, 4, 300)
    bad = (rng.random(300) < pd).astype(float)
    found, below = reference_performance(performance_reference(pd, bad), cut), pd < cut
    assert found['rows'] == pytest.approx(below.sum(), abs=1)
    if seed % 2 and below.any():
        assert found['bad_rate'] == pytest.approx(bad[below].mean()) and found['pd_mean'] == pytest.approx(pd[below].mean())
        if 0 < bad[below].sum() < below.sum():
            assert found['auc'] == pytest.approx(auc(bad[below], pd[below]))


# ---------------------------------------------------------------- out of the log

@pytest.fixture(scope='module')
def scorer(tmp_path_factory):
    return load_bundle(small_bundle(tmp_path_factory.mktemp('bundle'), explains=True))


@pytest.fixture(params=['sqlite', 'postgresql'])
def store(request, tmp_path):
    "An empty store of either kind."
    opened = open_store(f'sqlite:///{tmp_path}/log.db' if request.param == 'sqlite' else request.getfixturevalue('cluster').database())
    yield opened
    opened.close()


def at(n, day=1):
    return f'2026-01-{day:02d}T{n // 3600:02d}:{n // 60 % 60:02d}:{n % 60:02d}.000000Z'


def decide(store, scorer, count, seed=0):
    "Decisions and applications in the log; gives the approved ids and their pds, in order."
    raw = applications(count, seed, target=False)
    answers = scorer.frame(check_frame(small_contract(), raw).frame)
    ids = [f'{seed:08x}{n:024x}' for n in range(count)]
    rows = [dict(writer=f'w{seed}', seq=n + 1, request_id=ids[n], received_at=at(n), status='scored', decision=str(answers['decision'][n]),
                 pd=float(answers['pd'][n]), score=int(answers['score'][n]), model_version=scorer.version, policy_version='p', content_digest='',
                 answer='{}', mac='') for n in range(count)]
    with store.write() as connection:
        connection.execute(store.tables['decisions'].insert(), rows)
        connection.execute(store.tables['applications'].insert(), [
            dict(request_id=ids[n], salt='', content=canonical_json({name: values[n] for name, values in raw.items()})) for n in range(count)])
    approved = answers['decision'] == 'approve'
    return [i for i, yes in zip(ids, approved, strict=True) if yes], answers['pd'][approved], {n: np.array(v, dtype=object)[approved] for n, v in raw.items()}


def report(store, ids, bads, day, version=1):
    with store.write() as connection:
        connection.execute(store.tables['outcomes'].insert(), [
            dict(request_id=i, version=version, bad=int(b), observed_at=at(0), received_at=at(n, day), actor='desk')
            for n, (i, b) in enumerate(zip(ids, bads, strict=True))])


UNTIL = {'until': '2026-02-01T00:00:00.000000Z'}


def test_outcomes_of_the_log_are_what_the_tests_are_given(store, scorer):
    ids, pd, raw = decide(store, scorer, 400)
    bads = np.random.default_rng(1).random(len(ids)) < pd
    report(store, ids[::-1], bads[::-1], 10)  # in another order than they were decided
    found = watch_outcomes(store, scorer, **UNTIL)
    columns, parts, _ = column_parts(scorer, check_frame(small_contract(), raw).frame)
    test = CalibrationTest(0.005, TOLERANCE, found['columns'])
    test.add(pd, bads, parts[:, [columns.index(name) for name in found['columns']]])
    assert found['columns'] and found['calibration'] == verdict_of(test)
    assert (found['outcomes'], found['waiting'], found['alarm']) == (len(ids), 0, False)
    assert found['observed']['expected'] == pytest.approx(pd.mean()) and found['observed']['bad'] == bads.sum()
    low, high = wilson_interval([bads.sum()], [len(bads)])
    assert (found['observed']['low'], found['observed']['high']) == (low[0], high[0])


def test_a_restart_between_looks_changes_no_digit(tmp_path, scorer):
    stores = [open_store(f'sqlite:///{tmp_path}/{name}.db') for name in ('whole', 'pieces')]
    for opened in stores:
        ids, pd, _ = decide(opened, scorer, 300)
        report(opened, ids, np.random.default_rng(2).random(len(ids)) < pd, 10)
    whole = watch_outcomes(stores[0], scorer, **UNTIL)
    for n in (40, 41, 120, 999):
        stores[1].close()
        stores[1] = open_store(f'sqlite:///{tmp_path}/pieces.db')
        last = watch_outcomes(stores[1], scorer, until=at(n, 10))
    assert last['outcomes'] == whole['outcomes'] and 0 < last['new'] < whole['new']
    assert last['calibration'] == whole['calibration'] and last['observed'] == whole['observed']
    for opened in stores:
        opened.close()


def test_each_outcome_counts_once_while_several_look(store, scorer):
    ids, pd, _ = decide(store, scorer, 200)
    report(store, ids, np.zeros(len(ids)), 10)
    found, errors = [], []

    def look():
        try:
            found.append(watch_outcomes(store, scorer, **UNTIL))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert {one['outcomes'] for one in found} == {len(ids)} and sum(one['new'] for one in found) == len(ids)


def test_a_look_that_another_overtakes_begins_again(tmp_path, scorer, monkeypatch):
    opened = open_store(f'sqlite:///{tmp_path}/log.db')
    ids, pd, _ = decide(opened, scorer, 100)
    report(opened, ids, np.zeros(len(ids)), 10)
    feed, overtaken = matured._feed, []

    def slow(*arguments):
        if not overtaken:
            overtaken.append(True)
            watch_outcomes(opened, scorer, **UNTIL)
        feed(*arguments)

    monkeypatch.setattr(matured, '_feed', slow)
    found = watch_outcomes(opened, scorer, **UNTIL)
    assert overtaken and (found['outcomes'], found['new']) == (len(ids), 0)
    opened.close()


def test_only_approved_decisions_of_this_model_whose_window_has_elapsed_count(tmp_path, scorer):
    opened = open_store(f'sqlite:///{tmp_path}/log.db')
    ids, pd, _ = decide(opened, scorer, 300)
    with opened.write() as connection:
        d = opened.tables['decisions']
        connection.execute(d.update().where(d.c.request_id == ids[0]).values(model_version='another'))
        connection.execute(d.update().where(d.c.request_id == ids[1]).values(decision='refer'))
        connection.execute(d.update().where(d.c.request_id == ids[2]).values(received_at=at(0, 20)))
    report(opened, ids, np.zeros(len(ids)), 25)
    found = watch_outcomes(opened, scorer, outcome_days=20, until='2026-01-31T00:00:00.000000Z')
    assert (found['outcomes'], found['waiting']) == (len(ids) - 3, 1)
    found = watch_outcomes(opened, scorer, outcome_days=20, until='2026-02-10T00:00:00.000000Z')
    assert (found['outcomes'], found['new'], found['waiting']) == (len(ids) - 2, 1, 0)
    opened.close()


def test_a_correction_shows_in_the_figures_and_not_in_the_bets(tmp_path, scorer):
    opened = open_store(f'sqlite:///{tmp_path}/log.db')
    ids, pd, _ = decide(opened, scorer, 300)
    report(opened, ids, np.zeros(len(ids)), 10)
    first = watch_outcomes(opened, scorer, **UNTIL)
    report(opened, ids[:50], np.ones(50), 11, version=2)
    second = watch_outcomes(opened, scorer, until='2026-02-02T00:00:00.000000Z')
    assert (second['new'], second['calibration']) == (0, first['calibration'])
    assert (second['corrected'], second['observed']['bad']) == (50, 50)
    opened.close()


def test_an_erased_application_counts_for_level_only_and_other_settings_begin_anew(tmp_path, scorer):
    opened = open_store(f'sqlite:///{tmp_path}/log.db')
    ids, pd, _ = decide(opened, scorer, 300)
    report(opened, ids, np.ones(len(ids)), 10)
    with opened.write() as connection:
        connection.execute(opened.tables['applications'].delete())
    found = watch_outcomes(opened, scorer, **UNTIL)
    assert found['alarm'] and found['columns'] == [] and 'has changed' in found['words']
    again = watch_outcomes(opened, scorer, tolerance=0.3, **UNTIL)
    assert (again['new'], again['settings']['tolerance']) == (len(ids), 0.3)
    assert again['calibration']['e_value'] < found['calibration']['e_value']
    with pytest.raises(RiskError, match='0 or more'):
        watch_outcomes(opened, scorer, outcome_days=-1)
    opened.close()


def test_a_state_of_other_bettors_begins_anew(tmp_path, scorer, caplog):
    opened = open_store(f'sqlite:///{tmp_path}/log.db')
    ids, pd, _ = decide(opened, scorer, 120)
    report(opened, ids, np.zeros(len(ids)), 10)
    first, k = watch_outcomes(opened, scorer, **UNTIL), opened.tables['kept']
    with opened.write() as connection:
        held = json.loads(connection.scalar(sa.select(k.c.value)))
        held['calibration']['course']['log_capital'].append(0.0)
        connection.execute(k.update().values(value=json.dumps(held)))
    again = watch_outcomes(opened, scorer, **UNTIL)
    assert again == first and 'begin anew' in caplog.text
    assert watch_outcomes(opened, scorer, **UNTIL)['new'] == 0
    opened.close()


def test_the_reference_auc_is_that_of_those_who_were_approved(tmp_path, scorer):
    rng = np.random.default_rng(8)
    history = rng.beta(1, 3, 20_000)
    reference = performance_reference(history, rng.random(20_000) < history)
    opened = open_store(f'sqlite:///{tmp_path}/log.db')
    ids, pd, _ = decide(opened, scorer, 400)
    report(opened, ids, np.zeros(len(ids)), 10)
    found = watch_outcomes(opened, replace(scorer, performance=reference), **UNTIL)
    region = reference_performance(reference, scorer.policy.approve_below)['auc']
    assert abs(found['ranking']['reference'] - region) < 0.1 < reference_performance(reference)['auc'] - found['ranking']['reference']
    assert found['reference'] == 'of history'
    opened.close()


def test_outcomes_that_are_being_stored_are_waited_for(tmp_path):
    store, told = open_store(f'sqlite:///{tmp_path}/log.db'), []
    thread = threading.Thread(target=lambda: told.append(matured._settled(store)))
    with store.write():
        thread.start()
        thread.join(0.1)
        last = now()  # an outcome may be stored with this time
    thread.join()
    assert told[0] >= last
    store.close()
