"""Every decision is counted once, whatever happens to the one who counts: the sums are held against counts of the whole log, made by the way of tables."""
import asyncio
import json
import os
import random
import signal
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from running_service import service, start
from service_load import Load, eventually
from test_journal import Faulty, Place
from test_postgres import Database, cluster  # noqa: F401
from watched import KEY, counts_of, decide, items_of, raw_rows, scored, watched_bundle

from riskscore.bundle import load_bundle
from riskscore.chain import new_id, now
from riskscore.core import RiskError
from riskscore.decided import Decided
from riskscore.drift import judge_drift
from riskscore.fast import FastScorer
from riskscore.journal import Journal
from riskscore.store import StoreUnavailable, open_store
from riskscore.windows import LiveCounts, Watched, WindowSums, catch_up, evolution, join_days, stored_decisions, window_series

HOUR = '2026-03-02T{:02d}:30:00.000000Z'


@pytest.fixture(scope='module')
def pointer(tmp_path_factory) -> Path:
    return watched_bundle(tmp_path_factory.mktemp('watched'))


@pytest.fixture(scope='module')
def model(pointer) -> FastScorer:
    return FastScorer(load_bundle(pointer))


@pytest.fixture(params=['sqlite', 'postgresql'])
def place(request, tmp_path) -> Place:
    return place_of(request, tmp_path)


def place_of(request, tmp_path) -> Place:
    "A database of the kind that is asked for."
    if request.param == 'sqlite':
        return Place(f'sqlite:///{tmp_path}/riskscore.db', tmp_path / 'anchors')
    server = request.getfixturevalue('cluster')
    return Database(server.database(), tmp_path / 'anchors', server)


@contextmanager
def opened(place):
    store = place.open()
    try:
        yield store
    finally:
        store.close()


def watched_of(model) -> dict[str, Watched]:
    return {model.scorer.version: Watched.of(model)}


def check_counts(store, model, name: str = 'checker') -> int:
    "Counts what is left; then all sums are those of the log, hour by hour. Gives how many were left."
    watched = watched_of(model)
    reference = watched[model.scorer.version].reference
    left = catch_up(store, watched, name, '~')
    assert catch_up(store, watched, name, '~') == 0
    live, log = WindowSums(store, reference).read('', '~'), counts_of(store, model, reference)
    assert live.rows == log.rows and np.array_equal(live.flat, log.flat)
    for hour, _, counts in window_series(store, reference, seconds=3600):
        assert counts == counts_of(store, model, reference, hour), hour
    with store.read() as connection:
        rows = connection.exec_driver_sql("SELECT status, decision, answer FROM decisions").all()
    flags = [f"{f['column']} {f['rule']}" for row in rows if row[0] == 'scored' for f in json.loads(row[2])['flags']]
    items = items_of(store)
    assert items.get(('requests', 'decision'), 0) == live.rows and items.get(('requests', 'stopped'), 0) == len(rows) - live.rows
    assert {item: n for (kind, item), n in items.items() if kind == 'flag'} == {f: flags.count(f) for f in flags}
    return left


def refuse(error: Exception) -> None:
    raise error


# ---------------------------------------------------------------- in one process

def test_workers_that_end_and_workers_that_die_are_counted_once(place, model):
    rows = raw_rows(300)
    with opened(place) as store:
        for hour, counted in ((7, True), (7, False), (8, True), (9, False)):
            asyncio.run(decide(store, place.anchors, model, rows[hour * 20:hour * 20 + 50], HOUR.format(hour), counted))
        assert check_counts(store, model) == 100
        assert [counts.rows for _, _, counts in window_series(store, Watched.of(model).reference, seconds=3600)] == [100, 50, 50]


def test_a_monitor_that_counts_for_living_workers_is_no_second_count(place, model):
    dice, rows = random.Random(8), raw_rows(400)

    async def run(store):
        lives = [LiveCounts(every=0.05), LiveCounts(every=0.05)]
        journals = [Journal(store, KEY, place.anchors, follow=live.decided) for live in lives]
        for live, journal in zip(lives, journals, strict=True):
            live.know(model)
            journal.start()
            live.start(store, journal)
        stolen = 0
        for _ in range(12):
            await asyncio.gather(*[dice.choice(journals).put(scored(model, dice.choice(rows))) for _ in range(40)])
            stolen += await asyncio.to_thread(catch_up, store, watched_of(model), 'thief', '~')
        for live, journal in zip(lives, journals, strict=True):
            await asyncio.to_thread(journal.close)
            await asyncio.to_thread(live.close)
        return stolen

    with opened(place) as store:
        stolen = asyncio.run(run(store))
        assert stolen  # it was there before the workers now and then
        check_counts(store, model)
        assert WindowSums(store, Watched.of(model).reference).read('', '~').rows == 480


@pytest.mark.parametrize('happened', [False, True], ids=['lost before', 'lost after'])
@pytest.mark.parametrize('riding', [False, True], ids=['a decision', 'the counts'])
def test_a_commit_of_unknown_fate_is_counted_as_it_went(tmp_path, model, happened, riding, monkeypatch):
    place, rows = Place(f'sqlite:///{tmp_path}/riskscore.db', tmp_path / 'anchors'), raw_rows(30)
    away = [StoreUnavailable('not yet')]  # nor does the store answer at once when it is asked what happened
    monkeypatch.setattr('riskscore.windows.stored_decisions', lambda *args: refuse(away.pop()) if away else stored_decisions(*args))

    async def run(store):
        live = LiveCounts(every=60.0)
        live.know(model)
        journal = Journal(store, KEY, place.anchors, follow=live.decided)
        journal.start()
        live.start(store, journal)
        await journal.put_many([scored(model, row) for row in rows[:10]])
        if not riding:
            assert live.flush(5.0)
        driver = store.engine.dialect.dbapi
        journal._book.connection = Faulty(journal._book.connection, happened, driver.OperationalError('connection lost'))
        if riding:
            live.flush(5.0)
        else:
            with pytest.raises(StoreUnavailable):
                await journal.put(scored(model, rows[10]))
        assert live.flush(5.0)
        await journal.put_many([scored(model, row) for row in rows[11:]])
        assert live.flush(5.0)
        told = live.sums(model).read('', '~').rows
        await asyncio.to_thread(journal.close)
        await asyncio.to_thread(live.close)
        return told

    with opened(place) as store:
        assert asyncio.run(run(store)) == 29 + (happened and not riding)
        assert check_counts(store, model) == 0


def test_whoever_is_far_behind_reads_the_store(tmp_path, model, monkeypatch):
    monkeypatch.setattr('riskscore.journal._FOLLOWED', 20)
    place = Place(f'sqlite:///{tmp_path}/riskscore.db', tmp_path / 'anchors')

    async def run(store):
        live = LiveCounts()
        live.know(model)
        journal = Journal(store, KEY, place.anchors, follow=live.decided)
        journal.start()
        for _ in range(10):
            await journal.put_many([scored(model, row) for row in raw_rows(10)])
        waiting = len(live.decided)
        live.start(store, journal)
        assert live.flush(5.0)
        await asyncio.to_thread(journal.close)
        await asyncio.to_thread(live.close)
        return waiting

    with opened(place) as store:
        assert asyncio.run(run(store)) == 28  # 20, and a number for each of eight transactions
        assert check_counts(store, model) == 0


@pytest.mark.parametrize('place', ['postgresql'], indirect=True)
def test_a_file_waits_for_a_stop_that_is_being_set(place, model):
    run, told = SimpleNamespace(digest='d' * 64, model_version='m', policy_version='p', notes=[]), []

    def finish(witness):
        try:
            witness.finish(run)
        except RiskError as error:
            told.append(str(error))

    with opened(place) as store:
        thread = threading.Thread(target=finish, args=(Decided(model.scorer, store),))
        with store.write() as connection:
            connection.exec_driver_sql('SELECT pg_advisory_xact_lock(7317202)')
            thread.start()
            thread.join(0.3)
            connection.execute(store.tables['state'].insert(), {'name': 'stop', 'value': '{"stopped":true}', 'version': 1, 'changed_at': '', 'changed_by': ''})
        thread.join()
        assert 'decides nothing' in told[0]


def test_a_stopped_application_is_counted_when_it_is_scored(tmp_path, model):
    place, raw = Place(f'sqlite:///{tmp_path}/riskscore.db', tmp_path / 'anchors'), raw_rows(1)[0]

    async def run(store):
        live = LiveCounts()
        live.know(model)
        journal = Journal(store, KEY, place.anchors, follow=live.decided)
        journal.start()
        live.start(store, journal)
        await journal.note('ana', 'stopped', 'service', {}, ('stop', {'stopped': True}, None))
        entry = scored(model, raw)
        entry.status, entry.pd, entry.typed, entry.counts = 'stopped', None, None, (('requests', 'stopped'),)
        await journal.put(entry)
        assert live.flush(5.0)
        held = live.sums(model).read('', '~').rows
        await journal.note('ana', 'resumed', 'service', {}, ('stop', {'stopped': False}, None))
        await journal.put(scored(model, raw))
        await asyncio.to_thread(journal.close)
        await asyncio.to_thread(live.close)
        return held, live.sums(model).read('', '~').rows

    with opened(place) as store:
        assert asyncio.run(run(store)) == (0, 1)
        assert check_counts(store, model) == 0


def test_what_was_erased_or_belongs_to_a_lost_model_is_counted_without_its_columns(tmp_path, model):
    place = Place(f'sqlite:///{tmp_path}/riskscore.db', tmp_path / 'anchors')
    with opened(place) as store:
        asyncio.run(decide(store, place.anchors, model, raw_rows(20), HOUR.format(7), counted=False))
        with store.write() as connection:
            connection.exec_driver_sql('DELETE FROM applications WHERE request_id IN (SELECT request_id FROM decisions WHERE seq <= 5)')
            connection.exec_driver_sql("UPDATE decisions SET model_version = 'gone' WHERE seq > 12")
        assert catch_up(store, watched_of(model), 'm', '~') == 20
        assert WindowSums(store, Watched.of(model).reference).read('', '~').rows == 7
        assert items_of(store)['requests', 'decision'] == 20


def test_sums_follow_an_hour_that_changes_late(tmp_path, model):
    place, reference = Place(f'sqlite:///{tmp_path}/riskscore.db', tmp_path / 'anchors'), Watched.of(model).reference
    with opened(place) as store:
        sums, rows = WindowSums(store, reference), raw_rows(60)
        for hour, expected in ((7, 10), (8, 20), (7, 30), (9, 40), (8, 50)):  # a late one changes what was added up
            asyncio.run(decide(store, place.anchors, model, rows[expected - 10:expected], HOUR.format(hour)))
            assert sums.read('', '~') == counts_of(store, model, reference)
            assert sums.read(HOUR.format(7)[:13], HOUR.format(8)[:13]).rows == counts_of(store, model, reference, HOUR.format(7)).rows


def test_old_days_are_joined_and_nothing_is_lost(place, model):
    reference = Watched.of(model).reference
    with opened(place) as store:
        for day, hour in ((1, 7), (1, 8), (2, 7), (2, 23), (3, 7)):
            asyncio.run(decide(store, place.anchors, model, raw_rows(20, seed=hour), f'2026-03-{day:02d}T{hour:02d}:10:00.000000Z'))
        days = {first[:10]: counts for first, _, counts in window_series(store, reference)}
        assert join_days(store, reference, '2026-03-03T12:00:00.000000Z') == 2
        asyncio.run(decide(store, place.anchors, model, raw_rows(5), '2026-03-01T09:10:00.000000Z', counted=False))
        assert catch_up(store, watched_of(model), 'late', '~') == 5 and join_days(store, reference, '2026-03-03T12:00:00.000000Z') == 1
        again = {first[:10]: counts for first, _, counts in window_series(store, reference)}
        assert [again[d] == days[d] for d in sorted(days)] == [False, True, True] and again['2026-03-01'].rows == 45
        assert WindowSums(store, reference).read('', '~') == counts_of(store, model, reference)


def test_evolution_says_when_it_began(tmp_path, model):
    place, reference = Place(f'sqlite:///{tmp_path}/riskscore.db', tmp_path / 'anchors'), Watched.of(model).reference
    with opened(place) as store:
        for hour in range(4):
            rows = raw_rows(250, seed=hour, **({'income': None} if hour >= 2 else {}))
            asyncio.run(decide(store, place.anchors, model, rows, HOUR.format(hour)))
        hours = evolution(store, reference, seconds=3600)
        assert [w['broken'] for w in hours] == [[], [], ['income'], ['income']] and [w['rows'] for w in hours] == [250] * 4
        assert max(w['psi']['income'] for w in hours[:2]) < 0.1 < 1 < min(w['psi']['income'] for w in hours[2:])
        assert [w['rows'] for w in evolution(store, reference, applications=400)] == [500, 500]
        assert [w['rows'] for w in evolution(store, reference, seconds=86400)] == [1000]
        found = window_series(store, reference, start=HOUR.format(1)[:13], end=HOUR.format(3)[:13], seconds=3600)
        assert [(first[11:13], counts.rows) for first, _, counts in found] == [('01', 250), ('02', 250)]


# ---------------------------------------------------------------- over HTTP

def test_the_status_is_that_of_the_counts(tmp_path, pointer, model):
    rows = raw_rows(240)
    with service(tmp_path / 'serving', pointer) as running:
        client = running.client()
        begun = now()
        calm = client.get('/drift-status').json
        assert calm['drift']['rows'] == 0 and calm['drift_share'] is None and calm['last'] is None and 'too few' in calm['verdict']
        for row in rows[:60]:
            assert client.post('/predict', row | {'income': None}).status == 200
        assert client.post('/predict?purpose=what_if', rows[0]).status == 200  # is not watched
        body = '\n'.join(json.dumps(row | {'income': None}) for row in rows[60:])
        told = client.post('/predict_batch?purpose=decision', body.encode(), Content_Type='application/x-ndjson')
        assert told.headers['x-scored'] == '180'
        assert client.post('/predict_batch?purpose=backtest', body.encode(), Content_Type='application/x-ndjson').status == 200
        status = client.get('/drift-status').json
        if begun[:10] != now()[:10]:
            pytest.skip('midnight came in between')
        store = open_store(f'sqlite:///{running.folder}/riskscore.db')
        reference = Watched.of(model).reference
        expected = judge_drift(reference, counts_of(store, model, reference))
        assert status['drift']['rows'] == status['decisions'] == 240 and status['drift']['broken'] == expected['broken'] == ['income']
        assert {c['column']: c['psi'] for c in status['drift']['columns']} == pytest.approx({c['column']: c['psi'] for c in expected['columns']})
        assert status['drift_share'] == expected['drift_share'] and status['verdict'].startswith('provisional: Stop') and not status['stopped']
        store.close()
        assert client.get('/alerts').json == []
        for path in ('/emergency-stop', '/emergency-stop', '/emergency-stop/resume'):  # the second changes nothing
            assert client.post(path, {'reason': 'a test'}).status == 200
        told = client.get('/alerts').json
        assert [(a['kind'], a['severity'], a['content']) for a in told] == [('resumed', 'warning', {'by': 'local'}), ('stopped', 'critical', {'by': 'local'})]
        assert client.get('/alerts?severity=info').json == [] and client.get('/alerts?limit=1').json == told[:1]


def killed_and_counted(folder: Path, pointer: Path, model: FastScorer, times: int, workers: int) -> int:
    "Kills a service under load, again and again; then all decisions that it stored are counted, once. Gives how many a monitor had to count."
    dice = random.Random(times)
    for number in range(times):
        running = start(folder, pointer, workers=workers)
        with Load(running.port, name=f'{number}-', first=number * 20_000, clients=8, pause=0) as load:
            load.reach(150)
            time.sleep(dice.random() * 0.5)
            running.kill()
    store = open_store(f'sqlite:///{folder}/riskscore.db')
    try:
        return check_counts(store, model)
    finally:
        store.close()


def test_nothing_is_counted_twice_or_left_out_after_a_kill(tmp_path, pointer, model):
    assert killed_and_counted(tmp_path / 'serving', pointer, model, 1, 2) > 0


@pytest.mark.slow
def test_nothing_is_counted_twice_or_left_out_after_many_kills(tmp_path, pointer, model):
    assert killed_and_counted(tmp_path / 'serving', pointer, model, 6, 2) > 0


@pytest.mark.slow
def test_a_worker_that_dies_under_load_is_counted_by_nobody_but_the_monitor(tmp_path, pointer, model):
    with service(tmp_path / 'serving', pointer, workers=2) as running:
        with Load(running.port, clients=8) as load:
            load.reach(200)
            with suppress(ProcessLookupError):
                os.kill(running.workers()[0], signal.SIGKILL)
            load.reach(200)
        store = open_store(f'sqlite:///{running.folder}/riskscore.db')
        eventually(lambda: check_counts(store, model, new_id()) >= 0)
        store.close()
