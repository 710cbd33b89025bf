"""Recourse: what it proposes is approved, allowed, plausible and no larger than it must be; otherwise it says that there is no way."""
import json
from dataclasses import replace
from time import perf_counter
from timeit import repeat

import numpy as np
import pytest
from explained import explained, one, take
from generators import contracts, tables
from hypothesis import given, settings
from hypothesis import strategies as st

from riskscore.contract import LANGUAGES, Column, Contract, check_frame, load_contract
from riskscore.recourse import find_recourse, fit_recourse, recourse_from_dict
from riskscore.synthetic import write_home_credit

SETS = {'taiwan': 'taiwan/UCI_Credit_Card.csv', 'home_credit': 'home_credit_sample/application_train.csv.gz'}


def changed(typed: dict, answer: dict) -> dict:
    "The application as it would be after the change, as a table of one row."
    after = typed | {c['column']: c['to'] for c in answer['changes']}
    return {n: np.array([v], dtype=object if v is None or isinstance(v, str) else float) for n, v in after.items()}


def holds(model, typed: dict, answer: dict) -> bool:
    "Is an answer what it claims to be?"
    contract, ranges = model.scorer.contract, recourse_from_dict(model.scorer.recourse)
    before = model.scorer.frame(changed(typed, {'changes': []}))
    if not answer['found']:
        return before['decision'][0] != 'approve' and not answer['changes']
    after = model.scorer.frame(changed(typed, answer))
    assert after['decision'][0] == 'approve' and after['pd'][0] == answer['pd']
    for change in answer['changes']:
        column, old, new = contract.columns[change['column']], change['from'], change['to']
        assert column.mutable and old != new and all(change[k] for k in LANGUAGES)
        if column.kind != 'category':
            low, high = ranges.limits[column.name]
            assert low <= new <= high and (column.mutable == 'any' or (new > old) == (column.mutable == 'up'))
    for a, b, low, high in ranges.links:
        if {a, b} & {c['column'] for c in answer['changes']} and typed[a] > 0 and typed[b] > 0:
            after_ratio, own = changed(typed, answer)[a][0] / changed(typed, answer)[b][0], typed[a] / typed[b]
            assert min(low, own) * (1 - 1e-6) <= after_ratio <= max(high, own) * (1 + 1e-6)
    return True


@pytest.fixture(scope='module')
def synthetic(tmp_path_factory):
    "A model of synthetic applicants."
    folder = tmp_path_factory.mktemp('synthetic')
    write_home_credit(folder / 'applicants.csv', 6000, 11)
    return explained(folder / 'models', folder / 'applicants.csv', load_contract('data/contracts/home_credit.yaml'))


def search(model, rows: int) -> tuple[list[dict], float]:
    "Answers for declined applicants, and the seconds of the slowest."
    declined, ranges = take(model.by_decision('decline'), slice(rows)), recourse_from_dict(model.scorer.recourse)
    answers, slowest = [], 0.0
    for i in range(len(next(iter(declined.values())))):
        start = perf_counter()
        answers.append(find_recourse(ranges, model.scorer.frame, one(declined, i)))
        slowest = max(slowest, perf_counter() - start)
        assert holds(model, one(declined, i), answers[-1])
    return answers, slowest


def test_what_is_proposed_to_synthetic_applicants_is_approved_allowed_and_plausible(synthetic):
    answers, slowest = search(synthetic, 40)
    found = [a for a in answers if a['found']]
    assert 0 < len(found) < len(answers) and {len(a['changes']) for a in found} <= {1, 2, 3}
    assert slowest < 50 * min(repeat(lambda: synthetic.scorer.frame(take(synthetic.future, slice(500))), number=1, repeat=3))
    json.dumps(answers)


@pytest.mark.parametrize('name', SETS)
def test_what_is_proposed_to_real_applicants_is_approved_allowed_and_plausible(real_data, tmp_path, name):
    model = explained(tmp_path, real_data / SETS[name], load_contract(f'data/contracts/{name}.yaml'))
    answers, _ = search(model, 25)
    assert any(a['found'] for a in answers) and not all(a['found'] for a in answers)


def test_whom_a_rule_keeps_out_no_change_of_a_loan_lets_in(synthetic):
    minor = one(synthetic.by_decision('approve'), 0) | {'DAYS_BIRTH': -6000.0}
    assert find_recourse(recourse_from_dict(synthetic.scorer.recourse), synthetic.scorer.frame, minor)['found'] is False
    strained = one(synthetic.by_decision('approve'), 0)
    strained |= {'AMT_ANNUITY': 0.55 * strained['AMT_INCOME_TOTAL']}
    ranges = replace(recourse_from_dict(synthetic.scorer.recourse), links=())
    answer = find_recourse(ranges, synthetic.scorer.frame, strained)
    assert not answer['found'] or {c['column'] for c in answer['changes']} & {'AMT_ANNUITY', 'AMT_INCOME_TOTAL'}


def test_the_cheapest_single_change_is_found():
    columns = (Column('debt', mutable='down'), Column('income', mutable='up'), Column('job', kind='category', mutable='any'))
    history = {'debt': np.linspace(0, 100, 1001), 'income': np.linspace(0, 1000, 1001), 'job': np.array(['a', 'b'] * 500 + ['rare'], dtype=object)}
    ranges = replace(fit_recourse(Contract('x', {c.name: c for c in columns}), history), links=())

    def score(frame):
        good = (frame['debt'] <= 40) | (frame['income'] >= 900) | (frame['job'] == 'rare')
        return {'pd': np.where(good, 0.1, 0.5), 'decision': np.where(good, 'approve', 'refer').astype(object)}

    answer = find_recourse(ranges, score, {'debt': 50.0, 'income': 100.0, 'job': 'a'})
    assert [c['column'] for c in answer['changes']] == ['debt'] and 36 <= answer['changes'][0]['to'] <= 40 and 0.1 <= answer['cost'] <= 0.14
    answer = find_recourse(ranges, score, {'debt': 50.0, 'income': 850.0, 'job': 'a'})
    assert [c['column'] for c in answer['changes']] == ['income'] and 900 <= answer['changes'][0]['to'] <= 940
    assert find_recourse(ranges, score, {'debt': np.nan, 'income': np.nan, 'job': None})['found'] is False


@settings(max_examples=25)
@given(st.data())
def test_any_contract_and_any_table_give_ranges_that_survive_json(data):
    contract = data.draw(contracts())
    columns = {n: replace(c, mutable='any') if c.role == 'feature' else c for n, c in contract.columns.items()}
    contract = replace(contract, columns=columns)
    typed = check_frame(contract, data.draw(tables(contract))).frame
    ranges = fit_recourse(contract, typed)
    assert recourse_from_dict(json.loads(json.dumps(ranges.to_dict()))) == ranges
    score = lambda frame: {'pd': np.full(len(next(iter(frame.values()))), 0.5), 'decision': np.full(len(next(iter(frame.values()))), 'decline')}  # noqa: E731
    for i in range(min(3, len(next(iter(typed.values()))))):
        assert find_recourse(ranges, score, one(typed, i))['found'] is False


def test_texts_tell_dates_as_dates_flags_in_words_and_sums_with_separators():
    columns = {c.name: c for c in (Column('since', kind='date', mutable='any', words={'en': 'Customer since', 'es': 'Cliente desde'}),
               Column('phone', kind='flag', levels=('N', 'Y'), mutable='up'), Column('home', kind='flag', levels=('rents', 'owns'), mutable='up'),
               Column('debt', mutable='down'))}
    days, flag = np.arange(1000.0, 1200.0), np.tile([0.0, 1.0], 100)
    history = {'since': days, 'phone': flag, 'home': flag, 'debt': days * 1e4}
    ranges = recourse_from_dict(json.loads(json.dumps(fit_recourse(Contract('x', columns), history).to_dict())))
    person = {'since': 1100.0, 'phone': 0.0, 'home': 0.0, 'debt': 11_500_000.0}

    def text(good, language='en'):
        score = lambda frame: {'pd': np.where(good(frame), 0.1, 0.5), 'decision': np.where(good(frame), 'approve', 'decline').astype(object)}  # noqa: E731
        [change] = find_recourse(ranges, score, person)['changes']
        return change[language]

    assert text(lambda f: f['since'] <= 1096) == 'Customer since: 1973-01-01 instead of 1973-01-05'  # 1973-01-01 is day 1096
    assert text(lambda f: f['since'] <= 1096, 'es') == 'Cliente desde: 1973-01-01 en lugar de 1973-01-05'
    assert (text(lambda f: f['phone'] == 1), text(lambda f: f['phone'] == 1, 'es')) == ('phone: yes instead of no', 'phone: sí en lugar de no')
    assert text(lambda f: f['home'] == 1) == 'home: owns instead of rents'
    assert text(lambda f: f['debt'] <= 11_000_000) == 'debt: 11,000,000 instead of 11,500,000'
    old = {k: v for k, v in ranges.to_dict().items() if k not in ('dates', 'flags')}  # as bundles of earlier versions hold it
    assert recourse_from_dict(old).numbers == ranges.numbers
