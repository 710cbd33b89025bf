"Lists, reviews and outcomes give what a plain look at all rows would give, on SQLite and on PostgreSQL, while others write."
import asyncio
import csv
import io
import random
import threading
import tracemalloc

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_postgres import cluster  # noqa: F401 a server of the tests' own

from riskscore import decisions
from riskscore.chain import new_id, now
from riskscore.core import RiskError, canonical_json
from riskscore.decisions import (EXPORTED, PAGE_LIMIT, Filters, export_decisions, finish_batch, instant, list_batches, list_decisions, read_filters, read_state,
                                 receipt, review_counts, review_note, start_batch, store_outcomes, window_counts)
from riskscore.journal import Entry, Journal
from riskscore.ledger import erase_offline, replay, verify
from riskscore.store import open_store

KEY = b'0123456789abcdef0123456789abcdef'
ALL = Filters()
PEOPLE = ['Ana', 'Ben', '=1+1', None]


def rows_of(count, seed=0, start=0):
    "Decisions in a mess: times that repeat, all kinds, some reviewed."
    rng, rows = random.Random(seed), []
    for n in range(start, start + count):
        decision, status = rng.choice(['approve', 'refer', 'decline']), rng.choice(['scored'] * 9 + ['stopped'])
        if status == 'stopped':
            decision = 'refer'
        pd, score = (None, None) if status == 'stopped' else (rng.randrange(9) / 8, rng.randrange(500, 700))
        at = f'2026-03-{rng.randrange(1, 5):02d}T0{rng.randrange(4)}:00:00.000000Z'
        rows.append({'writer': 'w', 'seq': n + 1, 'request_id': f'{rng.getrandbits(128):032x}', 'received_at': at, 'status': status, 'decision': decision,
                     'pd': pd, 'score': score, 'model_version': rng.choice(['m1', 'm2']), 'policy_version': 'p1',
                     'content_digest': '', 'answer': '{"pd":1}', 'mac': '', 'supersedes': None, 'idempotency': None, 'batch': rng.choice([None, None, 'b1'])})
    return rows


def fill(store, rows, seed=0):
    "Stores them, with applications of a few people and reviews of a third; gives who applied and what was reviewed."
    rng = random.Random(seed)
    people = {row['request_id']: rng.choice(PEOPLE) for row in rows}
    reviewed = {row['request_id']: rng.choice(['approve', 'decline']) for row in rows if rng.random() < 0.3}
    with store.write() as connection:
        connection.execute(store.tables['decisions'].insert(), rows)
        connection.execute(store.tables['applications'].insert(), [{'request_id': i, 'salt': 's', 'content': '{}', 'applicant': p} for i, p in people.items()])
        connection.execute(store.tables['audit'].insert(), [
            {'writer': 'w', 'seq': 100_000 + rows[0]['seq'] + n, 'at': now(), 'actor': 'desk', 'event': 'reviewed', 'subject': i, 'mac': '',
             'content': canonical_json({'reviewer': 'Kim', 'decision': d, 'reason': 'seen', 'was': 'refer'})} for n, (i, d) in enumerate(reviewed.items())])
    return people, reviewed


@pytest.fixture(params=['sqlite', 'postgresql'])
def store(request, tmp_path):
    "An empty store of either kind."
    made = open_store(f'sqlite:///{tmp_path}/a.db' if request.param == 'sqlite' else request.getfixturevalue('cluster').database())
    yield made
    made.close()


@pytest.fixture(scope='module')
def mess(tmp_path_factory):
    "A store of 400 decisions, and what is in it."
    made = open_store(f'sqlite:///{tmp_path_factory.mktemp("mess")}/a.db')
    rows = rows_of(400)
    people, reviewed = fill(made, rows)
    yield made, rows, people, reviewed
    made.close()


def order(rows):
    return [r['request_id'] for r in sorted(rows, key=lambda r: (r['received_at'], r['request_id']), reverse=True)]


def pages(store, filters=ALL, limit=37, between=lambda: None):
    found, cursor = [], None
    while True:
        rows, cursor = list_decisions(store, filters, limit, cursor)
        found += rows
        if cursor is None:
            return found
        assert len(rows) == limit
        between()


# ---------------------------------------------------------------- lists

def test_pages_hold_each_decision_once_newest_first(store):
    rows = rows_of(150)
    fill(store, rows)
    for limit in (1, 37, 150, 1000):
        assert [r['request_id'] for r in pages(store, limit=limit)] == order(rows)


def test_pages_stay_right_while_decisions_are_added(store):
    rows, added = rows_of(150), []
    fill(store, rows)

    def add():
        new = [row | {'received_at': '2026-04-01T00:00:00.000000Z'} for row in rows_of(20, seed=1 + len(added), start=150 + 20 * len(added))]
        added.append(new)
        fill(store, new)

    assert [r['request_id'] for r in pages(store, limit=30, between=add)] == order(rows)
    assert len(added) == 4 and len(pages(store)) == 230


@given(decision=st.sampled_from([None, 'approve', 'refer', 'decline']), status=st.sampled_from([None, None, 'scored', 'stopped']),
       reviewed=st.sampled_from([None, True, False]), applicant=st.sampled_from([None, None, 'Ana', '=1+1', 'Nobody']),
       batch=st.sampled_from([None, None, 'b1']), model=st.sampled_from([None, 'm1', 'm3']),
       days=st.tuples(*[st.none() | st.integers(1, 5)] * 2), pds=st.tuples(*[st.none() | st.integers(0, 8)] * 2))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_filters_select_what_a_look_at_every_row_selects(mess, decision, status, reviewed, applicant, batch, model, days, pds):
    store, rows, people, known = mess
    low, high = (None if d is None else f'2026-03-{d:02d}T00:00:00.000000Z' for d in days)
    least, most = (None if p is None else p / 8 for p in pds)
    expected = [r for r in rows if (decision or r['decision']) == r['decision'] and (status or r['status']) == r['status']
                and (reviewed is None or reviewed == (r['request_id'] in known)) and (applicant is None or people[r['request_id']] == applicant)
                and (batch is None or r['batch'] == batch) and (model is None or r['model_version'] == model)
                and (low is None or r['received_at'] >= low) and (high is None or r['received_at'] < high)
                and (least is None or (r['pd'] is not None and r['pd'] >= least)) and (most is None or (r['pd'] is not None and r['pd'] <= most))]
    filters = Filters(low, high, decision, status, model, None, applicant, batch, reviewed, least, most)
    found = pages(store, filters)
    assert [r['request_id'] for r in found] == order(expected)
    by_id = {r['request_id']: r for r in rows}
    for row in found:
        review = known.get(row['request_id'])
        assert (row['review'], row['final'], row['applicant']) == (review, review or by_id[row['request_id']]['decision'], people[row['request_id']])


def test_filters_are_read_strictly_and_all_that_is_wrong_is_said():
    asked = {'from': '2026-03-01', 'to': '2026-03-01', 'decision': 'refer', 'reviewed': 'true', 'min_pd': '0.1', 'max_pd': '1e-3', 'applicant': 'Zoé'}
    assert read_filters(asked) == Filters('2026-03-01T00:00:00.000000Z', '2026-03-02T00:00:00.000000Z', 'refer', applicant='Zoé', reviewed=True, min_pd=0.1,
                                          max_pd=0.001)
    wrong = {'from': 'yesterday', 'decision': 'maybe', 'status': '', 'reviewed': '1', 'min_pd': '-1', 'max_pd': 'inf', 'applicant': 'a\0b', 'batch': 'x' * 401,
             'pd': '1', 'to': '9999-12-31'}
    with pytest.raises(RiskError) as caught:
        read_filters(wrong)
    assert [p.partition(':')[0] for p in caught.value.problems] == list(wrong)


@pytest.mark.parametrize('text', ['2026-13-01', '20260301T', '', 'now', '2026-03-01T25:00:00', '0001-01-01T00:00:00+14:00', None, 5])
def test_a_time_that_is_none_is_refused(text):
    with pytest.raises(RiskError, match='expected a time such as'):
        instant(text)


@given(st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_cursor_is_refused(mess, data):
    store = mess[0]
    cursor = list_decisions(store, limit=5)[1]
    at, char = data.draw(st.integers(0, len(cursor) - 1)), data.draw(st.sampled_from('AZaz09-_=é\0 |'))
    damaged = data.draw(st.sampled_from([cursor[:at] + char + cursor[at + 1:], cursor[:at], cursor[at:] + cursor, char + cursor]))
    if damaged != cursor:
        with pytest.raises(RiskError, match='is damaged'):
            list_decisions(store, cursor=damaged)


@pytest.mark.parametrize('limit', [0, -1, PAGE_LIMIT + 1])
def test_a_page_has_its_bounds(mess, limit):
    with pytest.raises(RiskError, match='expected 1 to 1000'):
        list_decisions(mess[0], limit=limit)


@pytest.mark.parametrize('asked, index', [
    ({}, 'decisions_received'), ({'from': '2026-03-02', 'to': '2026-03-03'}, 'decisions_received'), ({'applicant': 'Ana'}, 'applications_applicant'),
    ({'decision': 'decline', 'from': '2026-03-02'}, 'decisions_decision'), ({'decision': 'refer', 'reviewed': 'false'}, 'decisions_decision'),
    ({'status': 'stopped'}, 'decisions_decision'), ({'batch': 'b1'}, 'decisions_batch')], ids=str)
@pytest.mark.parametrize('deep', [False, True])
def test_lists_are_read_from_an_index_and_sorted_by_it(mess, asked, index, deep):
    store, d, filters = mess[0], mess[0].tables['decisions'], read_filters(asked)
    query = decisions._query(store, filters).limit(101)
    if deep:
        query = query.where(sa.tuple_(d.c.received_at, d.c.request_id) < sa.tuple_(sa.literal('2026-03-03'), sa.literal('f')))
    with store.read() as connection:
        plan = [row[3] for row in connection.exec_driver_sql(f'EXPLAIN QUERY PLAN {query.compile(store.engine, compile_kwargs={"literal_binds": True})}')]
    assert any(index in step for step in plan), plan
    assert not any(step.startswith('SCAN') and 'decisions USING INDEX decisions_received' not in step for step in plan), plan
    before_subqueries = plan[:next(i for i, step in enumerate(plan) if 'CORRELATED' in step)]
    assert filters.applicant or not any('TEMP B-TREE' in step for step in before_subqueries), plan


# ---------------------------------------------------------------- exports

def test_an_export_holds_what_the_list_holds_and_runs_in_no_spreadsheet(mess):
    store, people = mess[0], mess[2]
    table = list(csv.DictReader(io.StringIO(''.join(export_decisions(store)))))
    listed = pages(store)
    assert list(table[0]) == list(EXPORTED) and len(table) == len(listed)
    for cells, row in zip(table, listed, strict=True):
        assert cells['applicant'] == {'=1+1': "'=1+1", None: ''}.get(people[row['request_id']], people[row['request_id']])
        assert {k: v for k, v in cells.items() if k != 'applicant'} == {k: '' if row[k] is None else str(row[k]) for k in EXPORTED if k != 'applicant'}


def test_an_export_holds_one_page_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(decisions, 'PAGE_LIMIT', 50)
    store, peaks = open_store(f'sqlite:///{tmp_path}/a.db'), []
    for more in (100, 1400):
        fill(store, rows_of(more, seed=more, start=more))
        sum(map(len, export_decisions(store)))
        tracemalloc.start()
        assert sum(text.count('\n') for text in export_decisions(store)) > more
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    store.close()
    assert peaks[1] < 2 * peaks[0], peaks


# ---------------------------------------------------------------- one decision, from the journal to erasure

def entry(n, applicant='Ana', **changes):
    said = {'request_id': new_id(), 'received_at': now(), 'status': 'scored', 'pd': n / 16, 'score': 600 + n, 'decision': 'refer', 'model_version': 'm1',
            'policy_version': 'p1'} | changes
    return Entry(purpose='decision', answer=canonical_json(said | {'supersedes': None}), content=canonical_json({'income': n}), applicant=applicant, **said)


async def write(store, folder, entries, notes=()):
    journal = Journal(store, KEY, folder)
    journal.start()
    for answer in entries:
        await journal.put(answer)
    for make in notes:
        await journal.note(*make())
    await asyncio.to_thread(journal.close)


def test_a_decision_is_answered_reviewed_twice_and_erased(store, tmp_path):
    case, auto = entry(3), entry(5, 'Ben', decision='decline')
    notes = [lambda: review_note(store, case.request_id, 'Kim Ro', 'approve', 'Salary slip seen.', 'desk'),
             lambda: review_note(store, case.request_id, 'Lu  Wu', 'decline', 'The slip was\nforged.', 'desk'),
             lambda: review_note(store, auto.request_id, 'Kim Ro', 'approve', 'Typing error in the income.', 'desk')]
    asyncio.run(write(store, tmp_path / 'anchors', [case, auto], notes))
    found = receipt(store, case.request_id)
    assert (found['decision'], found['final'], found['application'], found['erased']) == ('refer', 'decline', {'income': 3}, False)
    assert [(r['event'], r['reviewer'], r['decision'], r['reason'], r['was']) for r in found['reviews']] == [
        ('reviewed', 'Kim Ro', 'approve', 'Salary slip seen.', 'refer'), ('reviewed', 'Lu Wu', 'decline', 'The slip was forged.', 'refer')]
    assert canonical_json(found['answer']) == case.answer and found['chain']['seq'] == 1
    assert [(r['event'], r['was']) for r in receipt(store, auto.request_id)['reviews']] == [('overridden', 'decline')]
    assert [(r['request_id'], r['review'], r['final']) for r in list_decisions(store, Filters(reviewed=True))[0]] == [
        (auto.request_id, 'approve', 'approve'), (case.request_id, 'decline', 'decline')]
    counts = review_counts(store, '2026', '2100')
    assert (counts['override_rate'], counts['review_rate'], counts['waiting'], counts['oldest_waiting']) == (1.0, 1.0, 0, None)
    assert len(erase_offline(store, KEY, tmp_path / 'anchors', 'Ana', 'Kim', 'asked for it').request_ids) == 1
    found = receipt(store, case.request_id)
    assert (found['application'], found['applicant'], found['erased'], found['final'], len(found['reviews'])) == (None, None, True, 'decline', 2)
    report = verify(store, KEY, tmp_path / 'anchors')
    assert report.ok and (report.rows, report.erased, report.chains) == (6, 1, 2), report.findings
    assert replay(store, lambda model, policy: None, [case.request_id]).erased == 1


def test_a_changed_row_is_found_on_either_database(store, tmp_path):
    asyncio.run(write(store, tmp_path / 'anchors', [entry(n) for n in range(5)]))
    assert verify(store, KEY, tmp_path / 'anchors').ok
    with store.write() as connection:
        connection.exec_driver_sql('UPDATE decisions SET pd = 0.03125 WHERE seq = 2')
        connection.exec_driver_sql('DELETE FROM decisions WHERE seq >= 4')
    assert [(f.kind, f.seq) for f in verify(store, KEY, tmp_path / 'anchors').findings] == [('changed', 2), ('columns', 2), ('tail', 4)]


def test_a_case_that_was_scored_after_the_stop_is_reviewed_there(store):
    rows = [row | {'decision': 'refer'} for row in rows_of(2)]
    rows[0] |= {'status': 'stopped', 'pd': None, 'score': None}
    rows[1] |= {'status': 'scored', 'supersedes': rows[0]['request_id']}
    fill(store, rows)
    with pytest.raises(RiskError, match=f"was scored after the stop, as {rows[1]['request_id']}"):
        review_note(store, rows[0]['request_id'], 'Kim', 'approve', 'fine', 'desk')
    assert receipt(store, rows[0]['request_id'])['superseded_by'] == rows[1]['request_id']
    with store.write() as connection:
        connection.execute(store.tables['audit'].delete())
    assert review_counts(store, '2026', '2027')['waiting'] == 1


def test_what_is_no_request_is_not_found_whatever_it_holds(store):
    for request_id in ('', '\0', '\ud800', "'; DROP TABLE decisions", 'F' * 32, 'f' * 32):
        assert receipt(store, request_id) is None
        assert review_note(store, request_id, 'Kim', 'approve', 'fine', 'desk') is None
        told = list(store_outcomes(store, [{'request_id': request_id, 'bad': 1, 'observed_at': '2026-03-01'}], 'lab'))
        assert [t['status'] for t in told] == ['unknown' if request_id else 'refused']


def test_a_review_says_all_that_is_wrong(mess):
    store, rows = mess[:2]
    with pytest.raises(RiskError) as caught:
        review_note(store, rows[0]['request_id'], ' ', 'refer', 'x' * 2001, 'desk')
    assert [p.partition(':')[0] for p in caught.value.problems] == ['decision', 'reviewer', 'reason']


# ---------------------------------------------------------------- outcomes

def outcome(request_id, bad=0, day=5):
    return {'request_id': request_id, 'bad': bad, 'observed_at': f'2026-03-{day:02d}'}


def test_outcomes_are_stored_once_however_often_they_are_sent(store, monkeypatch):
    monkeypatch.setattr(decisions, '_BLOCK', 7)
    rng, rows, model = random.Random(1), rows_of(15), {}
    fill(store, rows)
    for _ in range(4):
        sent = [outcome(rng.choice(rows)['request_id'], rng.randrange(2), rng.randrange(5, 7)) for _ in range(40)]
        expected = []
        for row in sent:
            versions = model.setdefault(row['request_id'], [])
            value = row['bad'], row['observed_at']
            expected.append('unchanged' if versions[-1:] == [value] else 'corrected' if versions else 'new')
            versions += [] if versions[-1:] == [value] else [value]
        told = list(store_outcomes(store, iter(sent), 'lab'))
        assert [t['status'] for t in told] == expected and [t['row'] for t in told] == list(range(1, 41))
    for request_id, versions in model.items():
        kept = receipt(store, request_id)['outcomes']
        assert [(o['version'], o['bad'], o['observed_at'][:10]) for o in kept] == [(n, *v) for n, v in enumerate(versions, 1)]
        assert next(r for r in pages(store) if r['request_id'] == request_id)['bad'] == versions[-1][0]


def test_outcomes_sent_by_two_at_once_are_stored_once(store, monkeypatch):
    monkeypatch.setattr(decisions, '_BLOCK', 5)
    rows, told, ready = rows_of(40), [], threading.Barrier(3)
    fill(store, rows)

    def send():
        ready.wait()
        told.extend(store_outcomes(store, [outcome(row['request_id']) for row in rows], 'lab'))

    threads = [threading.Thread(target=send) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(t['status'] for t in told) == ['new'] * 40 + ['unchanged'] * 80
    assert all(len(receipt(store, row['request_id'])['outcomes']) == 1 for row in rows)


@pytest.mark.parametrize('wrong', [{'bad': 2}, {'bad': True}, {'bad': 1.0}, {'bad': None}, {'bad': '01'}, {'observed_at': '2026-02-30'},
                                   {'observed_at': '2999-01-01'}, {'observed_at': '2026-02-28'}, {'observed_at': None}, {'extra': 1},
                                   {'request_id': ''}], ids=str)
def test_a_wrong_outcome_is_refused_and_its_neighbours_are_not(mess, wrong):
    store, rows = mess[:2]
    good = [outcome(row['request_id']) for row in rows[:2]]
    told = list(store_outcomes(store, [good[0], good[1] | wrong, good[1]], 'lab'))
    assert told[1]['status'] == 'refused' and told[1]['message']
    assert {told[0]['status'], told[2]['status']} <= {'new', 'unchanged'}


# ---------------------------------------------------------------- batches, counts and states

def test_batches_counts_and_states_on_either_database(store):
    first, second = (start_batch(store, 'backtest', 'desk', 'csv', 'm1', 'p1') for _ in range(2))
    finish_batch(store, first, 3, 2, 1, 0, 'ab', 0.25)
    assert [(b['batch'], b['rows'], b['seconds']) for b in list_batches(store)] == [(second, 0, None), (first, 3, 0.25)]
    assert [b['batch'] for b in list_batches(store, 1)] == [second]
    with store.write() as connection:
        for hour, writer, name, item, n in [(1, 'v', 'refused', 'income type', 2), (1, 'w', 'refused', 'income type', 3), (2, 'w', 'decisions', 'refer', 4)]:
            connection.execute(store.tables['windows'].insert(), {'started_at': f'2026-03-01T{hour:02d}:00:00.000000Z', 'writer': writer, 'name': name,
                                                                  'item': item, 'n': n})
        state = {'name': 'stop', 'value': '{"stopped":true}', 'version': 2, 'changed_at': 't', 'changed_by': 'Kim'}
        connection.execute(store.tables['state'].insert(), state)
    assert window_counts(store) == {'refused': {'income type': 5}, 'decisions': {'refer': 4}}
    assert window_counts(store, '2026-03-01T02', '2026-03-02') == {'decisions': {'refer': 4}}
    assert read_state(store, 'stop')['value'] == {'stopped': True} and read_state(store, 'reload') is None
