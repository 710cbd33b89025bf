"""The living bank: nothing looks ahead, outcomes are tested as those of a store are, a stop stops, and the same seeds give the same bytes."""
import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from riskscore import bank
from riskscore.additive import Additive, Term
from riskscore.arrivals import Calendar
from riskscore.bank import Applicants, Conduct, OutcomeWatch, bank_applicants, grade_life, live, money_lost, scoreboard, scoreboard_csv, scoreboard_markdown
from riskscore.bundle import load_bundle, write_bundle
from riskscore.calibration import Calibration, sigmoid
from riskscore.contract import load_contract, parse_contract
from riskscore.core import RiskError, canonical_json
from riskscore.effects import Effect
from riskscore.features import fit_plan
from riskscore.matured import watch_outcomes
from riskscore.oracle import Oracle
from riskscore.performance import performance_reference
from riskscore.policy import Policy
from riskscore.reference import fit_reference
from riskscore.store import open_store
from riskscore.worlds import Expected, World, load_world

ROOT = Path(__file__).resolve().parents[1]
VALUE = {'approve': {'good': 0.1, 'bad': -0.5}, 'refer': {'good': 0.05, 'bad': -0.2, 'fixed': -1.0}, 'decline': {'good': 0.0, 'bad': 0.0}}
CONTRACT = parse_contract({'name': 'demo', 'rare': {'min_count': 1}, 'value': VALUE, 'amount': 'amount', 'columns': {
    'app': {'kind': 'integer', 'role': 'id'}, 'amount': {'kind': 'number'}, 'debt': {'kind': 'number'}, 'bad': {'kind': 'flag', 'role': 'target', 'bad': '1'}}})
ROWS, DAYS, START, ORACLE = 210, 13, 4, Oracle(3, delay=3, spread=1)


def demo_people(rows, seed, first=0):
    rng = np.random.default_rng(seed)
    debt, amount = rng.random(rows), rng.uniform(100, 300, rows)
    frame = {'app': first + np.arange(rows, dtype=float), 'amount': amount, 'debt': debt, 'bad': np.full(rows, np.nan)}
    return Applicants(frame, sigmoid(-4.4 + 4 * debt + amount / 500))


PEOPLE = [demo_people(ROWS, 100 + day, 1000 * (day + 1)) for day in range(DAYS)]


def world(name, expected=None, *effects):
    return World(name, 'A test.', CONTRACT, effects=effects, expected=expected or Expected())


WORLDS = {w.name: w for w in (
    world('calm'),
    world('dead', Expected('stop', START), Effect('null', ('debt',), start=START)),
    world('richer', Expected('retrain', START), Effect('scale', ('amount',), 1000.0, start=START)),
    world('worse', Expected('recalibrate', START, ('retrain',)), Effect('odds', amount=3.0, start=START)))}


@pytest.fixture(scope='module')
def scorer(tmp_path_factory):
    "A champion that knows the truth, but for the rounding of its features."
    history = demo_people(20_000, 1)
    plan = fit_plan(CONTRACT, [history.frame | {'bad': np.zeros(20_000)}])
    terms = [Term('amount', 'lines', (100.0, 300.0), (-0.2, 0.2), 0.0), Term('debt', 'lines', (0.0, 4.0), (0.0, 16.0), 0.0)]
    line = Additive('logistic', plan.names, -4.0, terms)
    policy = Policy(0.15, 0.3, VALUE, 'EUR', 'amount')
    drift = fit_reference(CONTRACT, history.frame.__getitem__, history.truth, policy.decide(history.truth, history.frame)).to_bytes()
    performance = performance_reference(history.truth, Oracle(5).outcomes(history.frame['app'], history.truth), history.frame['amount'])
    return load_bundle(write_bundle(tmp_path_factory.mktemp('bank'), line, plan, Calibration(0.0, 1.0), policy, CONTRACT, {}, {}, drift=drift,
                                    performance=performance))


@pytest.fixture(scope='module')
def lived(scorer):
    memo = {}
    return {name: live(scorer, w, PEOPLE, ORACLE, memo=memo) for name, w in WORLDS.items()}


# ---------------------------------------------------------------- the same seeds, the same bytes

def test_the_same_seeds_give_the_same_bytes_in_any_order_and_without_a_memo(scorer, lived):
    again = {name: live(scorer, WORLDS[name], PEOPLE, ORACLE) for name in ('worse', 'dead')}
    rows, other = ([grade_life(lives[name]) for name in ('dead', 'worse')] for lives in (lived, again))
    assert scoreboard_csv(rows) == scoreboard_csv(other)
    assert scoreboard_markdown(scoreboard(rows)) == scoreboard_markdown(scoreboard(other))
    assert {name: lived[name] for name in again} == again


def test_another_seed_is_another_life(scorer, lived):
    assert grade_life(live(scorer, WORLDS['worse'], PEOPLE, replace(ORACLE, seed=4)))['outcomes'] != grade_life(lived['worse'])['outcomes']


@pytest.mark.parametrize('name', list(WORLDS))
def test_a_shorter_life_is_the_beginning_of_a_longer_one(scorer, lived, name):
    assert live(scorer, WORLDS[name], PEOPLE[:6], ORACLE).days == lived[name].days[:6] == lived[name].until(6).days


def test_what_comes_later_changes_nothing_before(scorer, lived):
    others = [*PEOPLE[:6], *(demo_people(40, 900 + day, 10**6 * (day + 1)) for day in range(2))]
    assert live(scorer, WORLDS['worse'], others, ORACLE).days[:6] == lived['worse'].days[:6]


def test_people_depend_on_the_seed_alone():
    contract = load_contract(ROOT / 'data/contracts/home_credit.yaml')
    week, days = (bank_applicants(contract, Calendar(15), n, 1) for n in (7, 3))
    assert [p.truth.tolist() for p in days] == [p.truth.tolist() for p in week[:3]]
    assert [p.frame['SK_ID_CURR'].tolist() for p in days] == [p.frame['SK_ID_CURR'].tolist() for p in week[:3]]
    assert [len(p.truth) for p in bank_applicants(contract, Calendar(0), 2, 1)] == [0, 0]


# ---------------------------------------------------------------- what happens on a day

def test_each_world_is_found_for_what_it_is(lived):
    assert {name: life.action for name, life in lived.items()} == {'calm': 'nothing', 'dead': 'stop', 'richer': 'stop', 'worse': 'recalibrate'}
    assert [lived['calm'].first('told'), lived['dead'].first('stop'), lived['richer'].first('stop')] == [None, START, START]
    assert lived['worse'].first('flag') is lived['worse'].first('stop') is None and lived['worse'].first('alarm') > START + ORACLE.delay - ORACLE.spread


@pytest.mark.parametrize('repair', [0, 1, 4])
def test_a_stop_ends_automated_decisions_until_the_feed_is_repaired(scorer, repair):
    life = live(scorer, WORLDS['dead'], PEOPLE, ORACLE, Conduct(repair=repair))
    assert [d.decided > 0 for d in life.days] == [not START < d.day <= START + repair for d in life.days]
    assert [d.day for d in life.days if d.stop] == [START] and [d.day for d in life.days if d.broken] == [START]
    for d, people in zip(life.days, PEOPLE, strict=True):
        referred = money_lost(scorer.policy, people.frame, people.truth, np.full(len(people.truth), 'refer', dtype=object))
        assert (d.lost == pytest.approx(referred)) == (d.decided == 0)
        assert d.lost == pytest.approx(0, abs=1) or d.day in range(START, START + repair + 1)  # who knows the truth loses nothing


def test_columns_that_a_person_has_found_right_do_not_stop_again(lived):
    days = lived['richer'].days
    assert [d.day for d in days if d.stop] == [START] and all(d.broken == ('amount',) for d in days if d.day >= START and d.decided)
    assert {d.cause.kind for d in days if d.decided and d.day > START} != {'broken feed'}


def test_an_unwatched_bank_pays_for_the_feed(lived):
    assert all(d.unwatched == d.lost for d in lived['calm'].days + lived['worse'].days)
    after = [d for d in lived['dead'].days if d.day > START]
    assert sum(d.unwatched for d in after) > 2 * sum(d.lost for d in after) > 0


def test_outcomes_are_known_when_they_have_matured_and_of_approved_loans_only(scorer, lived):
    for day in range(DAYS):
        known = 0
        for past in range(day + 1):
            approved = PEOPLE[past].frame['app'][scorer.frame(PEOPLE[past].frame)['decision'] == 'approve']
            known += int((ORACLE.matures(approved, past) <= day).sum())
        assert lived['calm'].days[day].outcomes == known


def test_outcomes_are_tested_as_those_of_a_store_are(scorer, tmp_path, monkeypatch):
    kept, at = [], '2026-01-{:02d}T{:02d}:{:02d}:{:02d}.000000Z'.format

    class Watch(OutcomeWatch):
        def __init__(self, *given):
            super().__init__(*given)
            kept.append(self)

    monkeypatch.setattr(bank, 'OutcomeWatch', Watch)
    live(scorer, WORLDS['calm'], PEOPLE[:7], ORACLE)
    store, due = open_store(f'sqlite:///{tmp_path}/log.db'), []
    for day, people in enumerate(PEOPLE[:7]):
        answers, named = scorer.frame(people.frame), [f'{int(i):032x}' for i in people.frame['app']]
        bad, matures = ORACLE.outcomes(people.frame['app'], people.truth), ORACLE.matures(people.frame['app'], day)
        with store.write() as connection:
            connection.execute(store.tables['decisions'].insert(), [
                dict(writer='w', seq=1000 * day + n + 1, request_id=i, received_at=at(day + 1, 9, n // 60, n % 60), status='scored', score=0,
                     policy_version='p', decision=str(answers['decision'][n]), pd=float(answers['pd'][n]),
                     model_version=scorer.version, content_digest='', answer='{}', mac='')
                for n, i in enumerate(named)])
            connection.execute(store.tables['applications'].insert(), [
                dict(request_id=i, salt='', content=canonical_json({k: people.frame[k][n] for k in ('amount', 'debt')})) for n, i in enumerate(named)])
            due += [(matures[n], dict(request_id=i, version=1, bad=int(bad[n]), observed_at='', received_at=at(matures[n] + 1, 12, 0, 0), actor='desk'))
                    for n, i in enumerate(named)]
            if ready := [row for when, row in due if when == day]:
                connection.execute(store.tables['outcomes'].insert(), ready)
        found = watch_outcomes(store, scorer, until=at(day + 1, 23, 0, 0))
    store.close()
    told = kept[0].verdict()
    assert (found['outcomes'], found['columns'], found['ranking']['reference']) == (told['outcomes'], list(kept[0].calibration.columns), kept[0].auc)
    assert found['outcomes'] > 300 and len(found['columns']) == 2 and found['calibration'] == told['calibration']
    assert {k: found['ranking'][k] for k in told['ranking']} == told['ranking']


def test_a_feed_that_changes_who_applies_is_refused(scorer):
    copies = Effect('duplicate', copies=2, share=0.5, where={'debt': (0.5, 1.0)}, start=1)  # of those with a debt, and none is known
    with pytest.raises(RiskError, match='changes who applies'):
        live(scorer, world('odd', Expected('stop', 1), Effect('null', ('debt',), start=1), copies), PEOPLE[:3], ORACLE)


# ---------------------------------------------------------------- grades

def test_a_false_alarm_and_a_delay_are_counted_from_the_day_that_the_world_says(lived):
    early = replace(lived['dead'].until(START + 3), world=replace(WORLDS['dead'], expected=Expected('stop', START + 2)))
    told = grade_life(early)
    assert (told['false_alarm'], told['false_days'], told['quiet_days'], told['detected']) == (True, 1, START + 2, False)
    right = grade_life(lived['dead'])
    assert (right['delay_days'], right['delay_applications'], right['acted_days'], right['false_days'], right['right']) == (0, ROWS, 0, 0, True)
    calm = grade_life(lived['calm'])
    assert (calm['false_days'], calm['quiet_days'], calm['delay_days'], calm['right']) == (0, DAYS, None, True)
    assert not grade_life(lived['richer'])['right'] and grade_life(lived['worse'])['delay_applications'] == ROWS * (lived['worse'].first('alarm') - START + 1)


def test_worlds_of_the_project_are_judged_as_declared():
    contract = load_contract(ROOT / 'data/contracts/home_credit.yaml')
    feeds = {p.stem: len(bank.feed_effects(load_world(p, contract))) for p in (ROOT / 'data/worlds').glob('*.yaml')}
    assert {name: n for name, n in feeds.items() if n} == {'black_swan': 3, 'dead_bureau_feed': 1, 'perfect_storm': 1, 'unit_change': 1, 'unseen_categories': 2}


# ---------------------------------------------------------------- the benchmark

@pytest.fixture(scope='module')
def script():
    spec = importlib.util.spec_from_file_location('scoreboard_script', ROOT / 'benchmarks/scoreboard.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_tool_that_only_flags_is_graded_by_its_flags(script):
    shares = {str(day): 0.2 if day == 5 else 0.0 for day in (1, 3, 5)}
    rows = [script._peer_row('Evidently', rule, WORLDS[name], 1, script._flags(shares, rule))
            for rule in script.RULES['Evidently'] for name in ('calm', 'richer')]
    assert [(r['found'], r['false_days'], r['quiet_days'], r['right']) for r in rows] == [
        (False, 0, 3, True), (False, 0, 2, False), (False, 1, 3, False), (True, 0, 2, True)]
    table = list(script.peer_lines(rows))
    assert table[3] == ['Evidently', 'over 15% of the columns', '1 of 1', '1 of 5', '1 of 3', '0 of 1', '1 of 1', '6', '0']


@pytest.mark.slow
def test_the_benchmark_gives_the_same_bytes_twice(tmp_path):
    found = []
    for jobs in ('1', '2'):
        words = ['--worlds', 'dead_bureau_feed,nothing', '--seeds', '2', '--days', '12,24', '--history', '4000', '--jobs', jobs]
        words += ['-o', f'{tmp_path}/{jobs}.csv']
        done = subprocess.run([sys.executable, ROOT / 'benchmarks/scoreboard.py', *words], capture_output=True, check=True, timeout=600, cwd=tmp_path)
        found.append((done.stdout, Path(f'{tmp_path}/{jobs}.csv').read_bytes()))
    assert found[0] == found[1] and found[0][1].count(b'\n') == 1 + 2 * 2 * 2
    assert b'| dead_bureau_feed | stop | 2 of 2 |' in found[0][0]
