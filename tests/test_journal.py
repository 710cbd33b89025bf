"""The journal keeps its word: what was answered is stored, chained, and there once; whatever happens to the process or to its database.

test_postgres.py runs the same tests over PostgreSQL: it has a fixture `place` of its own.
"""
import asyncio
import itertools
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from riskscore.chain import digest_content, link, new_id, now, read_anchors
from riskscore.core import RiskError
from riskscore.journal import Entry, Journal, KeyReused, Overloaded, StateMoved, StopChanged
from riskscore.store import StoreUnavailable, chained_fields, open_store

KEY = b'0123456789abcdef0123456789abcdef'
BLANK = Entry('', '2026-11-20T14:21:24.000123Z', 'decision', 'scored', 'approve', 0.1, 610, 'm1', 'p1', '', content='{"income":5}',
              counts=(('decisions', 'approve'),))


@dataclass
class Place:
    "Where a store is, for a test."
    url: str
    anchors: Path

    def open(self, wait=2.0):
        return open_store(self.url, wait)

    @contextmanager
    def locked(self):
        "Another connection keeps everybody from writing."
        other = sqlite3.connect(sa.make_url(self.url).database, isolation_level=None)
        other.execute('BEGIN IMMEDIATE')
        yield
        other.close()


@pytest.fixture
def place(tmp_path):
    return Place(f'sqlite:///{tmp_path}/riskscore.db', tmp_path / 'anchors')


def entry(text=None, **changes):
    name = new_id()
    return replace(BLANK, **{'request_id': name, 'received_at': now(), 'answer': text or json.dumps({'request_id': name}), **changes})


@contextmanager
def journal(place, wait=2.0, **options):
    "A running journal over a store of its own, inside an event loop."
    store = place.open(wait)
    running = Journal(store, KEY, place.anchors, **options)
    running.start()
    try:
        yield running
    finally:
        running.close()
        store.close()


async def outcome(putting):
    "An answer, or the error in its place."
    try:
        return await putting
    except (RiskError, RuntimeError, ValueError) as error:
        return error


def stored(place):
    "What the database holds, after its chains, its digests and the anchors were found in order: rows by request."
    store = place.open()
    with store.read() as connection:
        rows = {name: [r._asdict() for r in connection.execute(sa.select(table))] for name, table in store.tables.items()}
    store.close()
    heads, problems = read_anchors(place.anchors, KEY)
    assert not problems
    for chain in rows['chains']:
        links = [('decision', r) for r in rows['decisions']] + [('audit', r) for r in rows['audit']]
        links = sorted((r['seq'], kind, r) for kind, r in links if r['writer'] == chain['writer'])
        assert [seq for seq, *_ in links] == list(range(1, len(links) + 1))
        macs = {0: chain['genesis']}
        for seq, kind, row in links:
            macs[seq] = link(KEY, macs[seq - 1], chained_fields(kind, row))
            assert macs[seq] == row['mac']
        anchor = heads.get(chain['writer'])
        assert anchor is None or macs[anchor.seq] == anchor.mac  # never ahead of the database
    applications = {r['request_id']: r for r in rows['applications']}
    assert set(applications) == {r['request_id'] for r in rows['decisions']} and len(applications) == len(rows['decisions'])
    for row in rows['decisions']:
        assert row['content_digest'] == digest_content(*(applications[row['request_id']][name] for name in ('salt', 'content', 'applicant')))
    return rows


def answers(rows):
    return {r['request_id']: r['answer'] for r in rows['decisions'] + rows['trials']}


def approvals(rows):
    return sum(r['n'] for r in rows['windows'] if (r['name'], r['item']) == ('decisions', 'approve'))


# ---------------------------------------------------------------- keys, batches, counts

def test_each_key_has_one_answer_and_each_row_is_counted_once(place):
    async def run():
        dice, given = random.Random(4), []
        with journal(place) as one, journal(place) as two:
            for _ in range(6):
                made = [entry(idempotency=dice.choice([None, *'abcdefghijklmnop'])) for _ in range(60)]
                puts = [outcome(dice.choice([one, two]).put(e)) for e in made]
                given += zip(made, await asyncio.gather(*puts), strict=True)
        return given

    given = asyncio.run(run())
    rows = stored(place)
    for made, got in given:
        assert answers(rows)[got.request_id] == got.text
        assert got.repeated == (got.request_id != made.request_id)
    by_key = {}
    for made, got in given:
        if made.idempotency:
            by_key.setdefault(made.idempotency, set()).add(got.request_id)
    assert len(by_key) == 16 and {len(ids) for ids in by_key.values()} == {1}
    assert len(rows['decisions']) == approvals(rows) == sum(not got.repeated for _, got in given)
    assert len(rows['chains']) == 2 and {r['writer'] for r in rows['decisions']} == {c['writer'] for c in rows['chains']}


def test_batches_of_every_size_are_stored(place):
    async def run():
        with journal(place) as running:
            for size in (1, 2, 3, 63, 64, 65, 129, 1100):
                got = await running.put_many([entry(purpose=p) for p in itertools.islice(itertools.cycle(['decision', 'backtest', 'what_if']), size)])
                assert not any(isinstance(g, Exception) for g in got) and len(got) == size
            assert running.depth == 0

    asyncio.run(run())
    rows = stored(place)
    total = sum((1, 2, 3, 63, 64, 65, 129, 1100))
    assert len(rows['decisions']) + len(rows['trials']) == approvals(rows) == total
    assert Counter(r['purpose'] for r in rows['trials'])['what_if'] == sum(n // 3 for n in (1, 2, 3, 63, 64, 65, 129, 1100))


def test_a_key_is_remembered_by_the_next_process(place):
    async def run():
        with journal(place) as running:
            first = await running.put(entry(idempotency='k', fingerprint='f'))
        with journal(place) as running:
            again = await running.put(entry(idempotency='k', fingerprint='f'))
            assert (again.text, again.repeated) == (first.text, True)
            for other in ({'fingerprint': 'g'}, {'fingerprint': 'f', 'purpose': 'what_if'}):
                assert isinstance(await outcome(running.put(entry(idempotency='k', **other))), KeyReused)

    asyncio.run(run())
    assert len(stored(place)['decisions']) == 1


@pytest.mark.parametrize('bad', [{'content': 'a\0b'}, {'applicant': 'a\0b'}, {'content': '\ud800'}, {'text': '\ud800'}, {'decision': 'a\x1fb'},
                                 {'score': 2**70}, {'applicant': '\ud800'}, {'fingerprint': '\ud800'}, {'text': 'a\0b', 'purpose': 'what_if'},
                                 {'text': '\ud800', 'purpose': 'what_if'}, {'pd': 'no number', 'purpose': 'what_if'}])
def test_a_bad_row_does_not_fail_its_neighbours(place, bad):
    text = bad.get('text')
    changes = {name: value for name, value in bad.items() if name != 'text'}

    async def run():
        with journal(place) as running:
            got = await running.put_many([entry(), entry(text, **changes), *[entry() for _ in range(5)]])
            after = await running.put(entry())
        return got, after

    got, after = asyncio.run(run())
    rows = stored(place)
    fine = [g for g in got if not isinstance(g, Exception)]
    assert {g.request_id for g in fine} | {after.request_id} == set(answers(rows))
    if len(fine) == 7:  # SQLite keeps what PostgreSQL refuses; it came back as it went in
        assert rows['trials'][0]['answer'] == text if text else rows['trials'][0]['pd'] == 'no number'
    else:
        assert len(fine) == 6 and isinstance(got[1], Exception) and not isinstance(got[1], StoreUnavailable)


def test_a_name_that_is_taken_is_refused_alone(place):
    async def run():
        with journal(place) as running:
            first = await running.put(entry())
            return first, await running.put_many([entry(), entry(request_id=first.request_id), entry()])

    first, got = asyncio.run(run())
    assert [isinstance(g, Exception) for g in got] == [False, True, False]
    assert len(stored(place)['decisions']) == 3


def test_counts_come_without_a_row_and_add_up(place):
    async def run():
        with journal(place) as one, journal(place) as two:
            for running in (one, two, two):
                running.count([('refused_requests', ''), ('refused', 'no\0such\ud800 column')])  # named by a client
            for _ in range(100):
                store = place.open()
                with store.read() as connection:
                    total = connection.execute(sa.text("SELECT sum(n) FROM windows WHERE name = 'refused'")).scalar()
                store.close()
                if total == 3:
                    return
                await asyncio.sleep(0.05)
        raise AssertionError('the counts did not arrive while nothing else was written')

    asyncio.run(run())
    assert sum(r['n'] for r in stored(place)['windows'] if r['name'] == 'refused_requests') == 3


def test_more_than_the_limit_is_refused_and_the_rest_is_answered(place):
    async def run():
        with journal(place, limit=5) as running:
            got = await asyncio.gather(*[outcome(running.put(entry())) for _ in range(9)])
            assert running.depth == 0
            return got + [await running.put(entry())]

    async def many():
        with journal(place, limit=600) as running:
            return type(await outcome(running.put_many([entry() for _ in range(601)])))

    got = asyncio.run(run())
    assert [type(g) for g in got].count(Overloaded) == 4
    assert asyncio.run(many()) is Overloaded
    assert len(stored(place)['decisions']) == 6


def test_what_was_accepted_is_stored_by_a_close(place):
    async def run():
        with journal(place) as running:
            tasks = [asyncio.create_task(running.put(entry())) for _ in range(50)]
            lost = asyncio.create_task(running.put(entry('nobody waits')))
            await asyncio.sleep(0)
            lost.cancel()
        got = await asyncio.gather(*tasks)
        assert isinstance(await outcome(running.put(entry())), StoreUnavailable)
        return got

    got = asyncio.run(run())
    kept = answers(stored(place))
    assert {g.request_id for g in got} < set(kept) and 'nobody waits' in kept.values() and len(kept) == 51


# ---------------------------------------------------------------- the stop

def test_a_stop_cannot_be_overtaken(place):
    async def run():
        with journal(place) as one, journal(place) as two, journal(place) as three:
            assert not two.stopped
            going, scored = True, []

            async def client(running):
                while going:
                    scored.append(await outcome(running.put(entry())))

            clients = [asyncio.create_task(client(running)) for running in (two, three) for _ in range(8)]
            await asyncio.sleep(0.2)
            await one.note('ana', 'stopped', 'service', {'reason': 'test'}, ('stop', {'stopped': True, 'reason': 'test', 'by': 'ana'}, None))
            late = await asyncio.gather(*[outcome(two.put(entry())) for _ in range(20)])
            going = False
            await asyncio.gather(*clients)
            assert {type(g) for g in late} == {StopChanged} and late[0].stopped
            assert StopChanged in {type(g) for g in scored} and {type(g).__name__ for g in scored} == {'Answer', 'StopChanged'}
            assert two.stopped and not isinstance(await outcome(two.put(entry(purpose='what_if'))), Exception)
            return sum(not isinstance(g, Exception) for g in scored)

    count = asyncio.run(run())
    assert len(stored(place)['decisions']) == count


def test_an_application_held_by_a_stop_is_scored_and_linked_later(place):
    async def run():
        with journal(place) as one, journal(place) as two:
            done = await one.put(entry(idempotency='done'))
            await one.note('ana', 'stopped', 'service', {}, ('stop', {'stopped': True}, 0))
            held = [await j.put(entry(status='stopped', decision='refer', pd=None, score=None, idempotency='k', fingerprint='f')) for j in (one, two, one)]
            assert len({h.request_id for h in held}) == 1 and [h.repeated for h in held] == [False, True, True]
            assert (await two.put(entry(idempotency='done'))).text == done.text
            with pytest.raises(StateMoved, match='at version 1, and 0 was expected'):
                await two.note('eve', 'resumed', 'service', {}, ('stop', {'stopped': False}, 0))
            await two.note('ana', 'resumed', 'service', {'reason': 'fine'}, ('stop', {'stopped': False}, 1))
            assert isinstance(await outcome(one.put(entry(status='stopped'))), StopChanged)
            assert isinstance(await outcome(one.put(entry(idempotency='k', fingerprint='g'))), KeyReused)
            scored = await one.put(entry('{"pd":0.1,"supersedes":null}', idempotency='k', fingerprint='f'))
            assert json.loads(scored.text)['supersedes'] == held[0].request_id and not scored.repeated
            assert (await two.put(entry(idempotency='k', fingerprint='f'))).text == scored.text
            return held[0], scored

    held, scored = asyncio.run(run())
    rows = stored(place)
    by_id = {r['request_id']: r for r in rows['decisions']}
    assert (by_id[held.request_id]['status'], by_id[scored.request_id]['supersedes']) == ('stopped', held.request_id)
    assert [(r['event'], r['actor']) for r in sorted(rows['audit'], key=lambda r: r['at'])] == [('stopped', 'ana'), ('resumed', 'ana')]


def test_of_two_who_change_a_state_at_once_one_is_told(place):
    async def run():
        with journal(place) as one, journal(place) as two:
            for version in range(10):
                got = await asyncio.gather(*[outcome(j.note('x', 'policy_proposed', 'p', {}, ('policy', {'n': version}, version))) for j in (one, two)])
                assert sorted(type(g).__name__ for g in got) == ['StateMoved', 'int']

    asyncio.run(run())
    assert len(stored(place)['audit']) == 10


# ---------------------------------------------------------------- a database that fails

def test_a_locked_database_is_said_and_got_over(place):
    async def run():
        with journal(place, wait=0.2) as running:
            first = await running.put(entry())
            with place.locked():
                during = await asyncio.gather(*[outcome(running.put(entry())) for _ in range(10)], outcome(running.note('a', 'reviewed', 'b', {})))
            assert {type(d) for d in during} == {StoreUnavailable}
            again = await running.put_many([entry() for _ in range(3)])
            return {first.request_id, *(a.request_id for a in again)}

    expected = asyncio.run(run())
    rows = stored(place)
    assert set(answers(rows)) == expected and approvals(rows) == 4 and not rows['audit']


class Faulty:
    "A connection on which the n-th commit fails, before it happened or after."

    def __init__(self, connection, happened, error):
        self.connection, self.happened, self.error = connection, happened, error

    def execute(self, statement, values=(), **options):
        if statement == 'COMMIT' and self.error:
            error, self.error = self.error, None
            if self.happened:
                self.connection.execute(statement)
            raise error
        return self.connection.execute(statement, values, **options)

    def __getattr__(self, name):
        return getattr(self.connection, name)


@pytest.mark.parametrize('happened', [False, True], ids=['lost before', 'lost after'])
def test_a_commit_of_unknown_fate_leaves_the_chain_whole(place, happened):
    async def run():
        with journal(place) as running:
            await running.put(entry())
            driver = running._book.store.engine.dialect.dbapi
            running._book.connection = Faulty(running._book.connection, happened, driver.OperationalError('connection lost'))
            assert isinstance(await outcome(running.put(entry('first', idempotency='k'))), StoreUnavailable)
            assert read_anchors(place.anchors, KEY)[0][running.writer].seq == 1  # it lags, and never runs ahead
            again = await running.put(entry('second', idempotency='k'))
            assert (again.text, again.repeated) == (('first', True) if happened else ('second', False))
            assert (await running.put(entry('third'))).text == 'third'

    asyncio.run(run())
    rows = stored(place)
    assert len(rows['decisions']) == approvals(rows) == 3


def test_a_full_database_stores_nothing_half(place):
    async def run():
        with journal(place) as running:
            await running.put(entry())
            pages = running._book.connection.execute('PRAGMA page_count').fetchone()[0]
            running._book.connection.execute(f'PRAGMA max_page_count={pages + 40}')
            return await fill(running, lambda: None)  # the journal connects anew, and the limit is the old connection's

    kept = asyncio.run(run())
    assert kept <= set(answers(stored(place)))


async def fill(running, make_room):
    "Stores until nothing fits, makes room, stores again; gives the names of what was answered."
    kept = set()
    for _ in range(500):
        got = await running.put_many([entry(content=json.dumps({'long': 'x' * 2000})) for _ in range(16)])
        assert {type(g).__name__ for g in got} in ({'Answer'}, {'StoreUnavailable'})  # all of a batch, or none
        if isinstance(got[0], Exception):
            break
        kept |= {g.request_id for g in got}
    else:
        raise AssertionError('it never was full')
    make_room()
    return kept | {(await running.put(entry())).request_id for _ in range(3)}


def test_a_full_disk_is_said_and_got_over(tmp_path):
    disk = tmp_path / 'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', disk], capture_output=True).returncode:
        pytest.skip('a small disk can only be mounted by root')
    small = Place(f'sqlite:///{disk}/riskscore.db', disk / 'anchors')
    try:
        (disk / 'filler').write_bytes(b'x' * (2 << 20))

        async def run():
            with journal(small) as running:
                await running.put(entry())
                return await fill(running, (disk / 'filler').unlink)

        kept = asyncio.run(run())
        assert kept <= set(answers(stored(small)))
    finally:
        subprocess.run(['umount', '-l', disk], check=True)


# ---------------------------------------------------------------- processes

WRITER = '''
import asyncio, os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_journal import Place, entry, journal

async def client(running, name):
    for i in range(1_000_000) if {keys} is None else range({keys}):
        got = await running.put(entry(idempotency=None if {keys} is None else f'{{name}}-{{i}}'))
        os.write(1, f'{{name}}-{{i}} {{got.request_id}}\\n'.encode())

async def main():
    with journal(Place({url!r}, Path({anchors!r})), wait=10) as running:
        await asyncio.gather(*[client(running, name) for name in range(8)])

asyncio.run(main())
'''


def writer(place, keys=None):
    "A process that stores for ever, or so many keys each of eight clients, and says what was answered."
    code = WRITER.format(tests=str(Path(__file__).parent), url=place.url, anchors=str(place.anchors), keys=keys)
    return subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, env={**os.environ, 'PYTHONPATH': str(Path(__file__).parents[1])})


def test_a_killed_writer_loses_nothing_it_answered(place):
    acknowledged = []
    for lines in (1, 200):
        process = writer(place)
        acknowledged += [process.stdout.readline() for _ in range(lines)]
        process.send_signal(signal.SIGKILL)
        rest, _ = process.communicate()
        acknowledged += [line for line in rest.splitlines(keepends=True) if line.endswith(b'\n')]
    assert all(line.endswith(b'\n') for line in acknowledged)
    rows = stored(place)
    assert {line.split()[1].decode() for line in acknowledged} <= set(answers(rows))
    heads = read_anchors(place.anchors, KEY)[0]
    assert len(rows['chains']) == 2 and all(heads[c['writer']].seq for c in rows['chains'])  # a tail cut off would be noticed
    assert approvals(rows) == len(rows['decisions'])


def test_two_processes_with_the_same_keys_store_each_once(place):
    processes = [writer(place, 40) for _ in range(2)]
    said = [dict(line.split() for line in p.communicate()[0].splitlines()) for p in processes]
    assert [p.returncode for p in processes] == [0, 0]
    assert said[0] == said[1] and len(said[0]) == 320
    rows = stored(place)
    assert {r['request_id'] for r in rows['decisions']} == {v.decode() for v in said[0].values()}
    assert len(rows['decisions']) == approvals(rows) == 320
