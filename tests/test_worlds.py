"""Worlds: each does exactly what its file says to a synthetic table and nothing else, on any day in any order, and says in words what is wrong with it."""
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from riskscore.contract import Contract, check_frame, check_record, load_contract
from riskscore.core import RiskError
from riskscore.effects import EFFECTS, Day, Effect, relation
from riskscore.oracle import Oracle
from riskscore.synthetic import home_credit
from riskscore.worlds import ACTIONS, Expected, World, learn_relations, load_world, parse_world

ROWS = 4000
ROOT = Path(__file__).parent.parent
WORLDS = sorted(p.stem for p in (ROOT / 'data/worlds').glob('*.yaml'))
CALM_DAYS, LATE = (0, 19), 200  # before anything happens, and long after
BUREAU = [f'EXT_SOURCE_{i}' for i in (1, 2, 3)] + [f'AMT_REQ_CREDIT_BUREAU_{span}' for span in ('HOUR', 'DAY', 'WEEK', 'MON', 'QRT', 'YEAR')]
MONEY = ['AMT_INCOME_TOTAL', 'AMT_CREDIT', 'AMT_ANNUITY', 'AMT_GOODS_PRICE']


@pytest.fixture(scope='module')
def contract() -> Contract:
    return load_contract(ROOT / 'data/contracts/home_credit.yaml')


@pytest.fixture(scope='module')
def bank(contract) -> Day:
    "Applicants as they are without any world."
    block = next(home_credit(ROWS, 11))
    table = block.applications
    raw = {n: c.to_pylist() if pa.types.is_string(c.type) else c.to_numpy(zero_copy_only=False).astype(float)
           for n, c in zip(table.schema.names, table.columns, strict=True)}
    frame = check_frame(contract, raw).frame
    for values in frame.values():
        values.flags.writeable = False  # who edits in place fails
    truth = block.truth['true_pd'].to_numpy().copy()
    truth.flags.writeable = False
    return Day(frame, truth, np.arange(ROWS))


@pytest.fixture(scope='module')
def worlds(contract) -> dict[str, World]:
    return {name: load_world(ROOT / f'data/worlds/{name}.yaml', contract) for name in WORLDS}


def same(a, b) -> bool:
    return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == 'f')


def differing(bank: Day, day: Day) -> set[str]:
    "What of a day is not as the bank has it, row by row of its source."
    found = {n for n, v in day.frame.items() if not same(v, bank.frame[n][day.source])}
    if day.truth is not None and not same(day.truth, bank.truth[day.source]):
        found.add('truth')
    if not np.array_equal(day.source, np.arange(ROWS)):
        found.add('rows')
    return found


def raw_value(column, value):
    "A typed value as an application sends it."
    if value is None or value != value:
        return None
    return column.levels[int(value)] if column.kind == 'flag' else value


def log_odds(p):
    return np.log(p / (1 - p))


# ---------------------------------------------------------------- the worlds that come with the project

TOUCHED = {
    'nothing': set(), 'recession': {'AMT_INCOME_TOTAL', 'truth', 'TARGET'}, 'inflation': set(MONEY), 'new_channel': {'rows', 'SK_ID_CURR'},
    'dead_bureau_feed': set(BUREAU), 'unit_change': {'AMT_INCOME_TOTAL', 'AMT_CREDIT'}, 'unseen_categories': {'OCCUPATION_TYPE', 'ORGANIZATION_TYPE'},
    'black_swan': {'AMT_INCOME_TOTAL', 'NAME_EDUCATION_TYPE', 'NAME_CONTRACT_TYPE'}, 'concept_flip': {'truth', 'TARGET'},
    'fraud_ring': {'rows', 'truth', 'SK_ID_CURR', 'TARGET', 'AMT_INCOME_TOTAL', 'AMT_CREDIT', 'AMT_ANNUITY'}, 'seasonal_mix': {'rows', 'SK_ID_CURR'},
    'one_outlier': {'AMT_INCOME_TOTAL'}, 'fairness_drift': {'truth', 'TARGET'},
    'perfect_storm': {*BUREAU, 'AMT_INCOME_TOTAL', 'truth', 'TARGET', 'rows', 'SK_ID_CURR'},
}
ACTS_ON = {'one_outlier': 20, 'fraud_ring': 25, 'seasonal_mix': 40, 'perfect_storm': 40}


def test_all_worlds_of_the_plan_are_there(worlds):
    assert set(worlds) == set(TOUCHED) and len(worlds) == 14
    assert {e.what for w in worlds.values() for e in w.effects} == set(EFFECTS) - {'shift'}
    assert {w.expected.action for w in worlds.values()} == set(ACTIONS)
    assert len({w.seed for w in worlds.values()}) == len(worlds)
    for name, world in worlds.items():
        assert world.name == name and re.fullmatch(r'[A-Z][^.]+\.', world.sentence), name


@pytest.mark.parametrize('name', WORLDS)
def test_a_world_touches_what_it_says_and_nothing_else(worlds, bank, name):
    world = worlds[name]
    for day in CALM_DAYS:
        assert differing(bank, world.apply(day, bank.frame, bank.truth)) == set()
    assert differing(bank, world.apply(ACTS_ON.get(name, LATE), bank.frame, bank.truth)) == TOUCHED[name]
    ends = [e.start + e.days for e in world.effects if e.days]
    if len(ends) == len(world.effects) > 0:
        assert differing(bank, world.apply(max(ends), bank.frame, bank.truth)) == set()
        assert differing(bank, world.apply(max(ends) - 1, bank.frame, bank.truth)) != set()


@pytest.mark.parametrize('name', WORLDS)
def test_a_day_is_the_same_in_any_order_and_another_with_another_seed(worlds, bank, name):
    def bytes_of(day):
        return [repr(v.tolist()) for v in (*(day.frame[n] for n in sorted(TOUCHED[name] & set(day.frame))), day.truth, day.source)]

    day, world = ACTS_ON.get(name, 60), worlds[name]
    first = bytes_of(world.apply(day, bank.frame, bank.truth))
    world.apply(day + 1, bank.frame, bank.truth)
    assert bytes_of(world.apply(day, bank.frame, bank.truth)) == first
    drawn = name not in ('nothing', 'inflation', 'dead_bureau_feed', 'unit_change', 'black_swan')  # these change everybody alike
    other = bytes_of(replace(world, seed=99).apply(day, bank.frame, bank.truth))
    assert (other != first) == drawn
    if drawn:
        assert bytes_of(world.apply(day - 1, bank.frame, bank.truth)) != first


@pytest.mark.parametrize('name', WORLDS)
def test_what_a_world_gives_is_a_typed_frame_that_the_service_accepts(contract, worlds, bank, name):
    "The contract reads the same values back, nothing is refused, and the ids stay apart."
    day = worlds[name].apply(ACTS_ON.get(name, LATE), bank.frame, bank.truth)
    assert list(day.frame) == list(bank.frame)
    touched = [n for n in day.frame if n in TOUCHED[name]]
    for column in touched:
        values = day.frame[column]
        assert values.dtype == bank.frame[column].dtype and len(values) == len(day.source) == len(day.truth)
    raw = {n: day.frame[n] for n in touched if n != 'TARGET'}
    narrow = replace(contract, columns={n: contract.columns[n] for n in raw})
    checked = check_frame(narrow, raw)
    assert all(v.severity == 'soft' for v in checked.violations) and not checked.bad_rows.any()
    assert all(same(checked.frame[n], raw[n]) for n in raw)
    assert len(set(day.frame['SK_ID_CURR'].tolist())) == len(day.source)
    assert ((day.truth > 0) & (day.truth < 1)).all() and (np.diff(day.source) >= 0).all()
    for row in (0, len(day.source) // 2, -1):
        record = {c.name: raw_value(c, day.frame[c.name][row]) for c in contract.columns.values() if c.role != 'target'}
        assert not [v.message for v in check_record(contract, record)[1] if v.severity == 'hard']


def test_inflation_and_unit_change_multiply(worlds, bank):
    day = worlds['inflation'].apply(LATE, bank.frame, bank.truth)
    for name in MONEY:
        np.testing.assert_array_equal(day.frame[name], bank.frame[name] * 1.6)
    half = worlds['inflation'].apply(34, bank.frame, bank.truth)  # the 15th of 30 days
    np.testing.assert_allclose(half.frame['AMT_CREDIT'], bank.frame['AMT_CREDIT'] * 1.3, rtol=1e-12)
    day = worlds['unit_change'].apply(20, bank.frame, bank.truth)
    np.testing.assert_array_equal(day.frame['AMT_CREDIT'], bank.frame['AMT_CREDIT'] * 1000)


def test_a_recession_lowers_incomes_and_doubles_odds_step_by_step(worlds, bank):
    for day, strength in ((20, 1 / 30), (34, 0.5), (49, 1), (LATE, 1)):
        out = worlds['recession'].apply(day, bank.frame, bank.truth)
        np.testing.assert_allclose(out.frame['AMT_INCOME_TOTAL'], bank.frame['AMT_INCOME_TOTAL'] * (1 - 0.25 * strength))
        np.testing.assert_allclose(log_odds(out.truth) - log_odds(bank.truth), np.log(2) * strength, atol=1e-9)


def test_fairness_drift_is_about_one_group(worlds, bank):
    out = worlds['fairness_drift'].apply(LATE, bank.frame, bank.truth)
    women = bank.frame['CODE_GENDER'] == 'F'
    np.testing.assert_allclose((log_odds(out.truth) - log_odds(bank.truth))[women], np.log(2.5), atol=1e-9)
    assert same(out.truth[~women], bank.truth[~women]) and same(out.frame['TARGET'][~women], bank.frame['TARGET'][~women])


def test_a_dead_feed_is_all_null_and_unseen_codes_hit_their_share(worlds, bank):
    out = worlds['dead_bureau_feed'].apply(20, bank.frame, bank.truth)
    assert all(np.isnan(out.frame[name]).all() for name in BUREAU)
    out = worlds['unseen_categories'].apply(20, bank.frame, bank.truth)
    for name, levels in (('OCCUPATION_TYPE', {'ISCO-2', 'ISCO-5', 'ISCO-7'}), ('ORGANIZATION_TYPE', {'NACE-C', 'NACE-G'})):
        before, after = bank.frame[name], out.frame[name]
        given = np.array([v is not None for v in before])
        hit = np.array([v in levels for v in after])
        assert set(after[hit]) == levels and not hit[~given].any()
        assert hit[given].mean() == pytest.approx(0.6, abs=4 * (0.24 / given.sum()) ** 0.5)
        assert same(after[~hit], before[~hit])


def test_one_outlier_is_one(worlds, bank):
    out = worlds['one_outlier'].apply(20, bank.frame, bank.truth)
    moved = out.frame['AMT_INCOME_TOTAL'] != bank.frame['AMT_INCOME_TOTAL']
    assert out.frame['AMT_INCOME_TOTAL'][moved].tolist() == [117_000_000]


def test_a_fraud_ring_is_the_same_application_again(worlds, bank):
    out = worlds['fraud_ring'].apply(25, bank.frame, bank.truth)
    originals, counts = np.unique(out.source, return_counts=True)
    assert set(counts) == {1, 21} and originals.tolist() == list(range(ROWS))
    assert (counts == 21).mean() == pytest.approx(0.01, abs=4 * (0.0099 / ROWS) ** 0.5)
    copy = np.r_[False, np.diff(out.source) == 0]
    assert set(out.truth[copy]) == {0.7} and same(out.truth[~copy], bank.truth)
    assert out.frame['TARGET'][copy].mean() == pytest.approx(0.7, abs=4 * (0.21 / copy.sum()) ** 0.5)
    change = out.frame['AMT_INCOME_TOTAL'] / bank.frame['AMT_INCOME_TOTAL'][out.source] - 1
    assert (np.abs(change[copy]) <= 0.02 + 1e-12).all() and (change[copy] != 0).any() and not change[~copy].any()


def test_another_mix_follows_its_weights_and_keeps_the_number(worlds, bank):
    out = worlds['seasonal_mix'].apply(40, bank.frame, bank.truth)
    assert len(out.source) == ROWS
    name = 'NAME_CONTRACT_TYPE'
    effect = replace(worlds['seasonal_mix'].effects[0], ramp=0)
    out = replace(worlds['seasonal_mix'], effects=(effect,)).apply(40, bank.frame, bank.truth)
    before = (bank.frame[name] == 'Revolving loans').mean()
    assert (out.frame[name] == 'Revolving loans').mean() == pytest.approx(2 * before / (1 + before), abs=1.5 / ROWS)
    young = worlds['new_channel'].apply(20, bank.frame, bank.truth).frame['DAYS_BIRTH']
    assert young.mean() > bank.frame['DAYS_BIRTH'].mean() + 1000 and len(young) == ROWS


def test_a_flip_turns_what_a_column_carries_upside_down(contract, bank):
    column = contract.columns['EXT_SOURCE_3']
    score = bank.frame['EXT_SOURCE_3']
    world = World('flip', '', contract, 0, (Effect('flip', ('EXT_SOURCE_3',)),))
    learnt = learn_relations(world, bank.frame, bank.truth)
    out = learnt.apply(0, bank.frame, bank.truth)
    points, after = (np.array(relation(column, score, truth)) for truth in (bank.truth, out.truth))
    known = ~np.isnan(score)
    before_odds, after_odds = log_odds(bank.truth)[known], log_odds(out.truth)[known]
    assert np.corrcoef(score[known], before_odds)[0, 1] < -0.5 and np.corrcoef(score[known], after_odds)[0, 1] > 0.5
    assert np.polyfit(points[:, 1], after[:, 1], 1)[0] == pytest.approx(-1, abs=0.05)  # straight lines between bands
    ended = replace(learnt, effects=(replace(learnt.effects[0], amount=0.5),)).apply(0, bank.frame, bank.truth)
    assert abs(np.corrcoef(score[known], log_odds(ended.truth)[known])[0, 1]) < 0.05
    column, jobs = contract.columns['OCCUPATION_TYPE'], bank.frame['OCCUPATION_TYPE']
    learnt = learn_relations(replace(world, effects=(Effect('flip', (column.name,)),)), bank.frame, bank.truth)
    before, turned = (relation(column, jobs, truth) for truth in (bank.truth, learnt.apply(0, bank.frame, bank.truth).truth))
    gap = {level: turned[level] + before[level] for level in before}
    np.testing.assert_allclose(list(gap.values()), next(iter(gap.values())), atol=1e-9)  # but for the mean, exactly
    assert same(out.truth[~known], bank.truth[~known])


def test_the_declared_flip_is_that_of_the_generator(worlds, bank):
    "What the file says a score carries has the slope 1 in the true log-odds, other columns aside."
    effect, score = worlds['concept_flip'].effects[0], bank.frame['EXT_SOURCE_3']
    points = np.array(effect.by)
    known = (score >= points[0, 0]) & (score <= points[-1, 0])
    part = np.interp(score[known], *points.T)
    others = [np.nan_to_num(bank.frame[n][known]) for n in ('EXT_SOURCE_1', 'EXT_SOURCE_2', 'DAYS_BIRTH')]
    design = np.column_stack([part, np.ones(known.sum()), np.isnan(bank.frame['EXT_SOURCE_1'][known]), bank.frame['CODE_GENDER'][known] == 'M', *others])
    slope = np.linalg.lstsq(design.astype(float), log_odds(bank.truth)[known], rcond=None)[0][0]
    assert slope == pytest.approx(1, abs=0.1)
    out = worlds['concept_flip'].apply(20, bank.frame, bank.truth)
    np.testing.assert_allclose((log_odds(out.truth) - log_odds(bank.truth))[known], -2 * part, atol=1e-9)


# ---------------------------------------------------------------- outcomes and the truth

@pytest.mark.parametrize('amount', [0.4, 2.5])
def test_outcomes_move_with_the_truth_and_no_more_than_needed(contract, amount):
    rng = np.random.default_rng(6)
    truth = np.repeat([0.02, 0.1, 0.5, 0.9], 10_000)
    label = (rng.random(len(truth)) < truth).astype(float)
    label[::10] = np.nan  # not known yet
    out = World('w', '', contract, 0, (Effect('odds', amount=amount),)).apply(0, {'TARGET': label}, truth)
    after, known = out.frame['TARGET'], ~np.isnan(label)
    assert same(np.isnan(after), ~known)
    assert (after >= label)[known].all() if amount > 1 else (after <= label)[known].all()  # odds that rise make nobody good
    np.testing.assert_allclose(out.truth, amount * truth / (1 - truth + amount * truth))
    for pd in np.unique(out.truth):
        assert after[known & (out.truth == pd)].mean() == pytest.approx(pd, abs=4 * (pd * (1 - pd) / 9_000) ** 0.5)


def test_on_real_data_thinning_multiplies_the_odds_of_every_kind_of_applicant(worlds, bank):
    "The truth is hidden from the world and then asked: among those who stay, outcomes are as twice the odds foretell, for low and high risk."
    rng = np.random.default_rng(5)
    truth = np.repeat(bank.truth, 10)
    label = (rng.random(len(truth)) < truth).astype(float)
    world = replace(worlds['recession'], effects=tuple(e for e in worlds['recession'].effects if e.what == 'odds'))
    out = world.apply(LATE, {'TARGET': label})
    assert out.truth is None and len(out.source) < len(truth)
    odds = truth[out.source] / (1 - truth[out.source])
    expected = 2 * odds / (1 + 2 * odds)
    for low, high in ((0, 0.05), (0.05, 0.15), (0.15, 1)):
        here = (truth[out.source] >= low) & (truth[out.source] < high)
        error = 4 * (expected[here] * (1 - expected[here])).sum() ** 0.5 / here.sum()
        assert label[out.source][here].mean() == pytest.approx(expected[here].mean(), abs=error)
    assert (np.isin(np.flatnonzero(label == 1), out.source)).all()  # odds that rise drop good ones only


def test_random_approvals_correct_for_those_that_the_policy_turned_down(bank):
    ids, policy = bank.frame['SK_ID_CURR'], bank.truth < 0.06
    estimates, naive = [], []
    for seed in range(60):
        oracle = Oracle(seed, approvals=0.05)
        bad, weight = oracle.outcomes(ids, bank.truth), oracle.weights(ids, policy)
        assert same(weight > 0, policy | oracle.approved(ids))
        estimates.append((weight * bad).sum() / ROWS)
        naive.append(bad[policy].mean())
    error = 4 * np.std(estimates) / 60 ** 0.5
    assert np.mean(estimates) == pytest.approx(bank.truth.mean(), abs=error)
    assert np.mean(naive) < bank.truth.mean() - error


def test_the_luck_of_an_applicant_is_the_same_in_every_world_and_policy(worlds, bank):
    oracle, ids = Oracle(3), bank.frame['SK_ID_CURR']
    calm = oracle.outcomes(ids, bank.truth)
    bad_times = worlds['recession'].apply(LATE, bank.frame, bank.truth)
    assert (oracle.outcomes(bad_times.frame['SK_ID_CURR'], bad_times.truth) >= calm).all()
    some = np.random.default_rng(0).permutation(ROWS)[:500]
    assert same(oracle.outcomes(ids[some], bank.truth[some]), calm[some]) and same(oracle.matures(ids[some], 5), oracle.matures(ids, 5)[some])
    assert calm.mean() == pytest.approx(bank.truth.mean(), abs=4 * (bank.truth * (1 - bank.truth)).sum() ** 0.5 / ROWS)
    due = oracle.matures(ids, 10)
    assert due.min() == 70 and due.max() == 130 and abs(due.mean() - 100) < 4 * 17.6 / ROWS ** 0.5


# ---------------------------------------------------------------- composing

def test_effects_draw_the_same_alone_and_beside_others(contract, bank):
    ring = Effect('level', ('OCCUPATION_TYPE',), level=('X',), share=0.3)
    noise = Effect('null', ('EXT_SOURCE_1',), share=0.5)
    alone, beside = (World('w', '', contract, 4, effects).apply(3, bank.frame) for effects in ((ring,), (noise, ring)))
    assert same(alone.frame['OCCUPATION_TYPE'], beside.frame['OCCUPATION_TYPE'])
    twice = World('w', '', contract, 4, (noise, noise)).apply(3, bank.frame)
    assert np.isnan(twice.frame['EXT_SOURCE_1']).sum() > np.isnan(beside.frame['EXT_SOURCE_1']).sum()  # not the same half again


def test_a_composed_world_is_its_parts_one_after_another(worlds, bank):
    storm, recession, feed = (worlds[n] for n in ('perfect_storm', 'recession', 'dead_bureau_feed'))
    assert [e.start for e in storm.effects] == [20, 20, 35, 36]
    assert storm.effects[:2] == recession.effects and replace(storm.effects[2], start=20) == feed.effects[0]
    first = replace(recession, seed=storm.seed).apply(35, bank.frame, bank.truth)
    parts = replace(feed, seed=storm.seed).apply(35, first.frame, first.truth)
    whole = storm.apply(35, bank.frame, bank.truth)
    assert same(parts.truth, whole.truth) and all(same(parts.frame[n], whole.frame[n]) for n in whole.frame)


def test_copies_of_copies_have_names_of_their_own(contract, bank):
    again = Effect('duplicate', copies=2, share=0.2)
    mix = Effect('mix', ('NAME_CONTRACT_TYPE',), by={'Revolving loans': 9.0})
    day = World('w', '', contract, 0, (again, mix, again)).apply(0, bank.frame, bank.truth)
    ids = day.frame['SK_ID_CURR']
    assert len(np.unique(ids)) == len(ids) > ROWS and (ids % 1e12 == bank.frame['SK_ID_CURR'][day.source]).all()
    text = replace(contract, columns=contract.columns | {'SK_ID_CURR': replace(contract.columns['SK_ID_CURR'], kind='category')})
    named = bank.frame | {'SK_ID_CURR': np.array([f'A{i}' for i in range(ROWS)], dtype=object)}
    names = World('w', '', text, 0, (again,)).apply(0, named).frame['SK_ID_CURR']
    assert len(set(names)) == len(names) and 'A' in names[0] and sum('~2' in n for n in names) * 3 == sum('~' in n for n in names) * 1.5
    huge = bank.frame | {'SK_ID_CURR': bank.frame['SK_ID_CURR'] + 1e13}
    with pytest.raises(RiskError, match='13 digits'):
        World('w', '', contract, 0, (again,)).apply(0, huge)


def test_small_and_empty_days(contract, worlds, bank):
    for rows in (0, 1, 2):
        frame = {n: v[:rows] for n, v in bank.frame.items()}
        for name, world in worlds.items():
            day = world.apply(ACTS_ON.get(name, LATE), frame, bank.truth[:rows])
            assert len(day.truth) == len(day.source) == len(day.frame['TARGET']) >= rows
            assert all(v.dtype == bank.frame[n].dtype for n, v in day.frame.items())


def test_values_stop_at_hard_limits_unless_the_world_is_about_them(contract, bank):
    effect = Effect('shift', ('DAYS_BIRTH', 'DAYS_ID_PUBLISH'), amount=30000.4)
    for hard in (False, True):
        day = World('w', '', contract, 0, (replace(effect, hard=hard),)).apply(0, bank.frame)
        refused = (day.frame['DAYS_BIRTH'] > 0).any()
        assert refused == hard and (day.frame['DAYS_BIRTH'] % 1 == 0).all()
    end = World('w', '', contract, 0, (Effect('scale', ('AMT_CREDIT',), amount=1e308),)).apply(0, bank.frame)
    assert np.isfinite(end.frame['AMT_CREDIT']).all()


# ---------------------------------------------------------------- errors in words

GOOD = {'what': 'scale', 'columns': 'AMT_CREDIT', 'amount': 2}
WRONG = [
    ({'what': 'scal', 'columns': 'AMT_CREDIT', 'amount': 2}, "got 'scal'. Did you mean 'scale'?"),
    ('scale', 'expected what: one of scale, shift, null'),
    ({'what': ['scale']}, "got ['scale']"),
    (GOOD | {'amonut': 2}, "unknown key 'amonut'. Did you mean 'amount'?"),
    (GOOD | {'columns': 'AMT_CREDITS'}, "no column 'AMT_CREDITS'. Did you mean 'AMT_CREDIT'?"),
    (GOOD | {'columns': 'TARGET'}, 'TARGET is the target; odds changes outcomes'),
    (GOOD | {'columns': 'SK_ID_CURR'}, 'names stay as they are'),
    (GOOD | {'columns': 'CODE_GENDER'}, 'is a category; this works on number, integer'),
    (GOOD | {'columns': 7}, "no column '7'"),
    (GOOD | {'amount': None}, 'scale needs amount (values are multiplied by amount)'),
    (GOOD | {'amount': '2'}, "amount must be a number; got '2'"),
    (GOOD | {'amount': float('inf')}, 'amount must be a number'),
    (GOOD | {'level': 'x'}, 'level does not belong to scale, which takes columns, amount'),
    (GOOD | {'start': -1}, 'start must be at least 0'), (GOOD | {'days': 0}, 'days must be at least 1'), (GOOD | {'ramp': 1.5}, 'ramp must be a whole number'),
    (GOOD | {'share': 0}, 'share must be above 0 and at most 1; got 0'), (GOOD | {'share': 1.2}, 'got 1.2'),
    (GOOD | {'where': {'CODE_GENDR': 'F'}}, "no column 'CODE_GENDR'. Did you mean 'CODE_GENDER'?"),
    (GOOD | {'where': {'CODE_GENDER': 'W'}}, "has no level 'W'"),
    (GOOD | {'where': {'CODE_GENDER': [True]}}, 'quoted where YAML takes them for true and false'),
    (GOOD | {'where': {'FLAG_OWN_CAR': 'J'}}, "has no level 'J'"),
    (GOOD | {'where': {'DAYS_BIRTH': -9000}}, 'expected [lowest, highest], with null for an open end; got -9000'),
    (GOOD | {'where': {'DAYS_BIRTH': [0, -9000]}}, 'expected [lowest, highest]'),
    (GOOD | {'where': {'DAYS_EMPLOYED': [365243, None]}}, 'expected [lowest, highest]'),
    ({'what': 'mix', 'columns': 'DAYS_EMPLOYED', 'by': [[365243, 2]]}, 'points [[value, number], …] with rising values'),
    (GOOD | {'where': 'F'}, 'where must be a mapping'),
    ({'what': 'null', 'columns': ['AMT_CREDIT', 'EXT_SOURCE_1']}, 'AMT_CREDIT requires a value, so that the service refuses such applications'),
    ({'what': 'outlier', 'columns': 'AMT_CREDIT', 'amount': -5}, 'AMT_CREDIT has hard limits from 1 to None'),
    ({'what': 'level', 'columns': 'FLAG_OWN_CAR', 'level': 'perhaps', 'hard': True}, 'is a flag and can only be N, Y; got perhaps'),
    ({'what': 'level', 'columns': 'CODE_GENDER', 'level': []}, 'needs level'),
    ({'what': 'odds', 'amount': 0}, 'a factor of odds and must be above 0; got 0'),
    ({'what': 'odds', 'amount': 2, 'columns': 'AMT_CREDIT'}, 'columns does not belong to odds'),
    ({'what': 'mix', 'columns': ['AMT_CREDIT', 'AMT_ANNUITY'], 'by': [[1, 1]]}, 'mix works on one column'),
    ({'what': 'mix', 'columns': 'CODE_GENDER', 'by': {'F': -1}}, 'weights are 0 or more'),
    ({'what': 'mix', 'columns': 'CODE_GENDER', 'by': {'FF': 1}}, "no level 'FF'"),
    ({'what': 'mix', 'columns': 'AMT_CREDIT', 'by': {'a': 1}}, 'points [[value, number], …] with rising values'),
    ({'what': 'flip', 'columns': 'CODE_GENDER', 'by': [[1, 2]]}, 'a mapping {level: number}'),
    ({'what': 'duplicate', 'copies': 0}, 'copies must be at least 1 and at most 1,000; got 0'),
    ({'what': 'duplicate', 'copies': 5, 'pd': 2}, 'pd must be at least 0 and at most 1; got 2'),
]


@pytest.mark.parametrize('effect, said', WRONG, ids=range(len(WRONG)))
def test_a_wrong_effect_is_said_in_words(contract, effect, said):
    with pytest.raises(RiskError) as error:
        parse_world({'sentence': 'Wrong.', 'effects': [GOOD, effect]}, contract)
    assert said in str(error.value) and 'effect 2' in str(error.value) and 'effect 1' not in str(error.value)


@pytest.mark.parametrize('content, said', [
    ([], 'is no world: expected a mapping with the keys name, sentence'), ({'effects': []}, 'a sentence for a stakeholder'),
    ({'seed': -1, 'sentence': 'x'}, 'a seed from 0'), ({'sentence': 'x', 'contract': 'taiwan'}, 'made for taiwan'),
    ({'sentence': 'x', 'effects': {'what': 'null'}}, 'effects must be a list'), ({'sentence': 'x', 'exspected': {}}, "Did you mean 'expected'?"),
    ({'sentence': 'x', 'expected': {'action': 'stopp', 'from': 1}}, "'stopp' is not one of nothing, refer, stop, recalibrate, retrain. Did you mean 'stop'?"),
    ({'sentence': 'x', 'expected': {'action': 'stop'}}, 'say from which day'), ({'sentence': 'x', 'expected': {}}, 'say what should be done'),
    ({'sentence': 'x', 'expected': {'action': 'nothing', 'from': 3}}, 'nothing happens'),
    ({'sentence': 'x', 'effects': [GOOD | {'start': 9}], 'expected': {'action': 'stop', 'from': 8}}, 'the first effect starts on day 9'),
    ({'sentence': 'x', 'expected': {'action': 'nothing', 'also': ['keep']}}, "'keep' is not one of"),
    ({'sentence': 'x', 'include': ['nowhere']}, 'include nowhere: Cannot read the world'),
    ({'sentence': 'x', 'include': [{'word': 'a'}]}, 'expected the name of a world'),
])
def test_a_wrong_world_is_said_in_words(contract, content, said):
    with pytest.raises(RiskError, match=re.escape(said)):
        parse_world({'expected': {'action': 'nothing'}} | content if isinstance(content, dict) else content, contract)


def test_files_that_are_none_or_include_themselves(contract, tmp_path):
    calm = 'sentence: Calm.\nexpected: {action: nothing}\n'
    for name, text in (('a', 'include: [b]\n'), ('b', 'include: [a]\n'), ('c', 'effects: [{what: nul}]\n'), ('d', 'include: [c, recesion]\nseed: x\n'),
                       ('recession', ''), ('e', 'seed: 1\nseed: 2\n'), ('f', 'include: [: x\n'), ('g', 'include: [{world: recession, later: -1}]\n')):
        (tmp_path / f'{name}.yaml').write_text(calm + text)
    (tmp_path / 'latin.yaml').write_bytes(b'sentence: caf\xe9\n')
    for name, said in (('a', 'include b: include a: it includes itself'), ('c', "Did you mean 'null'?"), ('e', 'A key stands twice in the world: seed'),
                       ('f', 'is not valid YAML'), ('latin', 'not valid YAML in UTF-8'), ('resession', "Did you mean 'recession'?")):
        with pytest.raises(RiskError, match=re.escape(said)):
            load_world(tmp_path / f'{name}.yaml', contract)
    with pytest.raises(RiskError) as error:
        load_world(tmp_path / 'd.yaml', contract)
    assert len(error.value.problems) == 3 and 'include c: effect 1' in str(error.value) and "Did you mean 'recession'?" in str(error.value)
    with pytest.raises(RiskError, match='made for home_credit'):
        load_world(ROOT / 'data/worlds/nothing.yaml', replace(contract, name='other'))
    assert load_world(tmp_path / 'g.yaml', contract).effects == ()
    assert load_world(ROOT / 'data/worlds/nothing.yaml', contract, seed=5).seed == 5


def test_a_day_that_does_not_fit_is_refused_in_words(contract, worlds, bank):
    world = worlds['recession']
    for day, frame, truth, said in ((20, {'AMT_INCOME': np.ones(3)}, None, "AMT_INCOME_TOTAL is not there. Did you mean 'AMT_INCOME'?"),
                                    (-1, bank.frame, None, 'whole numbers from 0; got -1'), (True, bank.frame, None, 'got True'),
                                    (20, bank.frame, bank.truth[:5], 'true pds of shape (5,)')):
        with pytest.raises(RiskError, match=re.escape(said)):
            world.apply(day, frame, truth)


def test_a_scoreboard_can_grade(worlds):
    assert worlds['nothing'].expected.grade(None) == {'detected': False, 'false_alarm': False, 'delay': None, 'right': True}
    assert worlds['nothing'].expected.grade(3, 'stop') == {'detected': False, 'false_alarm': True, 'delay': None, 'right': False}
    assert worlds['new_channel'].expected.grade(25) == {'detected': True, 'false_alarm': False, 'delay': 5, 'right': True}
    assert worlds['unit_change'].expected.grade(20, 'stop') == {'detected': True, 'false_alarm': False, 'delay': 0, 'right': True}
    assert Expected('retrain', 10, ('recalibrate',)).grade(9, 'recalibrate') == {'detected': False, 'false_alarm': True, 'delay': None, 'right': True}
