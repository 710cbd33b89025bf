"Whatever is done to the log behind the service's back is found and named; nothing is found where nothing was done."
import asyncio
import json
import shutil
import sqlite3
import threading
import tracemalloc
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_bundle import applications, small_bundle

from riskscore import ledger
from riskscore.bundle import load_bundle, write_policy
from riskscore.chain import Anchor, Head, digest_content, genesis, link, new_id, now, read_anchors
from riskscore.core import RiskError, canonical_json
from riskscore.journal import Entry, Journal
from riskscore.ledger import bundle_finder, erase, erase_offline, replay, verify
from riskscore.store import AUDIT_FIELDS, DECISION_FIELDS, chained_fields, open_store

KEY = b'0123456789abcdef0123456789abcdef'
AT = '2026-03-01T12:00:00.000000Z'


def quick(connection, record):
    "Nobody pulls the plug here; and deleted bytes stay in the file, as they do where SQLite is built without SECURE_DELETE."
    connection.execute('PRAGMA synchronous=OFF')
    connection.execute('PRAGMA secure_delete=OFF')


class Log:
    "A log made by hand: chains of any writers, with anchors, as the journal makes them."

    def __init__(self, folder: Path, wait: float = 5.0):
        self.folder, self.anchors, self.path = folder, folder / 'anchors', folder / 'log.db'
        self.store, self.heads = open_store(f'sqlite:///{self.path}', wait), read_anchors(self.anchors, KEY)[0]
        self.store.engine.dispose()
        sa.event.listen(self.store.engine, 'connect', quick)

    def start(self, writer, key=KEY):
        first = genesis(key, writer, AT, self.heads)
        heads = canonical_json({name: [head.seq, head.mac] for name, head in self.heads.items()})
        self.put('chains', {'writer': writer, 'started_at': AT, 'genesis': first, 'heads': heads})
        self.heads[writer] = Head(writer, 0, first)

    def put(self, table, row):
        with self.store.write() as connection:
            connection.execute(self.store.tables[table].insert(), row)

    def add(self, writer, kind, row, key=KEY, anchored=True):
        head = self.heads[writer]
        row = {'writer': writer, 'seq': head.seq + 1, **row}
        self.heads[writer] = head = Head(writer, head.seq + 1, link(key, head.mac, chained_fields(kind, row)))
        self.put('decisions' if kind == 'decision' else 'audit', row | {'mac': head.mac})
        if anchored:
            anchor = Anchor(self.anchors, key, writer)
            anchor.write(head.seq, head.mac)
            anchor.close()
        return row

    def decide(self, writer, pd=0.125, applicant='Ana', key=KEY, anchored=True, **changes):
        said = {'request_id': new_id(), 'received_at': now(), 'status': 'scored', 'pd': pd, 'score': 600, 'decision': 'refer', 'model_version': 'm1',
                'policy_version': 'p1', 'supersedes': None}
        content = canonical_json({'income': pd, 'name': applicant})
        digest = digest_content('salt', content, applicant)
        row = {**said, 'content_digest': digest, 'answer': canonical_json(said), 'idempotency': None, 'batch': 'b1'} | changes
        self.put('applications', {'request_id': said['request_id'], 'salt': 'salt', 'content': content, 'applicant': applicant})
        return self.add(writer, 'decision', row, key, anchored)

    def note(self, writer, event='loaded', subject='m1', key=KEY):
        return self.add(writer, 'audit', {'at': now(), 'actor': 'desk', 'event': event, 'subject': subject, 'content': '{}'}, key)

    def tamper(self, *statements):
        with self.store.write() as connection:
            for statement in statements:
                assert connection.exec_driver_sql(statement).rowcount, f'{statement} did nothing'

    def verify(self, key=KEY):
        return verify(self.store, key, self.anchors)

    def found(self, key=KEY):
        return [(f.kind, f.writer, f.seq) for f in self.verify(key).findings]


def fill(folder: Path) -> Log:
    "Two chains: v with decisions 1, 2, 4, 6 and audit rows 3, 5; and w, which began later, with decisions 1 to 3."
    log = Log(folder)
    log.start('v')
    for kind in 'ddadad':
        log.decide('v') if kind == 'd' else log.note('v')
    log.start('w')
    for _ in range(3):
        log.decide('w', pd=0.5)
    return log


@pytest.fixture(scope='module')
def template(tmp_path_factory):
    "A log to copy."
    made = fill(tmp_path_factory.mktemp('log'))
    made.store.close()
    return made.folder


@pytest.fixture
def log(template, tmp_path):
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    made = Log(tmp_path)
    yield made
    made.store.close()


def test_an_untouched_log_is_as_it_was_written(log):
    report = log.verify()
    assert report.ok and (report.chains, report.rows, report.erased) == (2, 9, 0), report.findings


@pytest.mark.parametrize('column', DECISION_FIELDS)
def test_no_column_of_a_decision_can_be_changed(log, column):
    value = {'seq': '70', 'pd': '0.0625', 'score': '601', 'writer': "'x'", 'supersedes': "''", 'idempotency': "''", 'status': "'stopped'"}.get(column, "'x'")
    log.tamper(f"UPDATE decisions SET {column} = {value} WHERE writer = 'v' AND seq = 4")
    kinds = {(f.kind, f.writer) for f in log.verify().findings}
    assert kinds & {('changed', 'v'), ('gap', 'v')}, kinds
    if column not in ('seq', 'writer', 'request_id'):
        assert [f.seq for f in log.verify().findings if f.kind == 'changed'] == [4]


@pytest.mark.parametrize('column', sorted(set(AUDIT_FIELDS) - {'writer', 'seq'}))
def test_no_column_of_an_audit_row_can_be_changed(log, column):
    log.tamper(f"UPDATE audit SET {column} = 'x' WHERE writer = 'v' AND seq = 3")
    assert log.found() == [('changed', 'v', 3)]


@given(writer_seq=st.sampled_from([('v', n) for n in range(1, 7)] + [('w', n) for n in range(1, 4)]),
       column=st.sampled_from(['model_version', 'answer', 'content_digest', 'received_at', 'mac', 'content', 'at', 'actor', 'event']),
       text=st.text(st.characters(exclude_categories=('Cs',), exclude_characters='\0'), max_size=12))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_put_in_whatever_place_the_row_is_named(template, tmp_path_factory, writer_seq, column, text):
    folder = tmp_path_factory.mktemp('copy')
    shutil.copytree(template, folder, dirs_exist_ok=True)
    log = Log(folder)
    table = 'decisions' if column in log.store.tables['decisions'].columns else 'audit'
    with log.store.write() as connection:
        done = connection.exec_driver_sql(f'UPDATE {table} SET {column} = ? WHERE writer = ? AND seq = ?', (text, *writer_seq)).rowcount
    found = {(f.writer, f.seq) for f in log.verify().findings if f.kind in ('changed', 'rewritten')}
    assert found == ({writer_seq} if done else set())
    log.store.close()


@pytest.mark.parametrize('gone, found', [((1,), ('gap', 'v', 2)), ((2, 3), ('gap', 'v', 4)), ((6,), ('tail', 'v', 6)), ((4, 5, 6), ('tail', 'v', 4))])
def test_removed_rows_are_missed(log, gone, found):
    for seq in gone:
        log.tamper(f"DELETE FROM {'audit' if seq in (3, 5) else 'decisions'} WHERE writer = 'v' AND seq = {seq}")
    assert log.found() == [found]


def test_a_chain_that_is_removed_whole_is_missed_by_its_anchor_and_by_the_chain_that_came_later(log):
    log.tamper("DELETE FROM decisions WHERE writer = 'v'", "DELETE FROM audit WHERE writer = 'v'", "DELETE FROM chains WHERE writer = 'v'")
    assert log.found() == [('chain', 'v', 6)]
    (log.anchors / 'v.anchor').unlink()
    report = log.verify()
    assert [(f.kind, f.writer) for f in report.findings] == [('chain', 'v')] and 'chain w has seen them' in report.findings[0].words


def test_rows_that_a_later_chain_has_seen_are_missed_even_with_an_old_copy_of_the_anchor(log):
    old = Anchor(log.anchors, KEY, 'v')
    log.tamper("DELETE FROM decisions WHERE writer = 'v' AND seq = 6")
    with log.store.read() as connection:
        mac = connection.exec_driver_sql("SELECT mac FROM audit WHERE writer = 'v' AND seq = 5").scalar()
    old.write(5, mac)
    assert log.found() == [('tail', 'v', 6)]


def test_two_rows_that_changed_places_are_found(log):
    log.tamper("UPDATE decisions SET seq = 20 WHERE writer = 'v' AND seq = 1", "UPDATE decisions SET seq = 1 WHERE writer = 'v' AND seq = 2",
               "UPDATE decisions SET seq = 2 WHERE writer = 'v' AND seq = 20")
    assert {('changed', 'v', 1), ('changed', 'v', 2)} <= set(log.found())


@pytest.mark.parametrize('seq', [0, 3, 7, 70])
def test_a_row_that_was_put_in_is_found_and_its_neighbours_are_not_blamed(log, seq):
    columns = ', '.join(c for c in (*DECISION_FIELDS, 'mac') if c not in ('seq', 'request_id', 'answer'))
    log.tamper(f"INSERT INTO decisions (seq, request_id, answer, {columns}) SELECT {seq}, 'forged', replace(answer, request_id, 'forged'), {columns} "
               f"FROM decisions WHERE writer = 'v' AND seq = 4", "INSERT INTO applications SELECT 'forged', salt, content, applicant, fingerprint "
               "FROM applications LIMIT 1")
    kinds = {(f.kind, f.seq) for f in log.verify().findings if f.kind != 'missing'}
    assert kinds == {70: {('gap', 70)}}.get(seq, {('changed', seq)}), kinds


@pytest.mark.parametrize('seq', [1, 4, 6])
def test_an_audit_row_put_in_beside_a_decision_is_found_and_the_decision_is_not_blamed(log, seq):
    log.tamper(f"INSERT INTO audit (writer, seq, at, actor, event, subject, content, mac) SELECT writer, {seq}, at, actor, event, subject, content, mac "
               "FROM audit WHERE writer = 'v' AND seq = 3")
    assert {(f.kind, f.seq, f.request_id) for f in log.verify().findings if f.kind == 'changed'} == {('changed', seq, None)}
    assert len([f for f in log.verify().findings if f.kind == 'changed']) == 1


def test_a_row_behind_a_gap_is_still_held_against_what_others_have_seen(log):
    log.tamper("DELETE FROM audit WHERE writer = 'v' AND seq = 5", "UPDATE decisions SET mac = 'ab' WHERE writer = 'v' AND seq = 6")
    assert log.found() == [('gap', 'v', 6), ('rewritten', 'v', 6), ('rewritten', 'v', 6)][:len(log.found())]
    assert ('rewritten', 'v', 6) in log.found()


def test_one_changed_link_is_one_finding(log):
    log.tamper("UPDATE decisions SET mac = 'ab' WHERE writer = 'v' AND seq = 2")
    assert log.found() == [('changed', 'v', 2)]


def test_where_a_chain_begins_cannot_be_changed(log):
    log.tamper("UPDATE chains SET heads = '{}' WHERE writer = 'w'")
    assert log.found() == [('genesis', 'w', 0)]
    log.tamper("DELETE FROM chains WHERE writer = 'w'")
    assert log.found() == [('genesis', 'w', 0)]


def test_anchors_cannot_be_changed_forged_or_removed(log):
    path = log.anchors / 'v.anchor'
    good = path.read_bytes()
    path.write_bytes(good.replace(b'6 ', b'5 ', 1))
    assert log.found() == [('anchor', 'v', None)]
    forger = Anchor(log.anchors, b'x' * 32, 'v')
    forger.write(6, log.heads['v'].mac)
    assert log.found() == [('anchor', 'v', None)]
    path.unlink()
    assert log.found() == [('anchor', 'v', None)]
    path.write_bytes(good)
    assert log.found() == []
    shutil.rmtree(log.anchors)
    report = log.verify()
    assert [f.kind for f in report.findings] == ['anchor'] and 'Is it the right folder?' in report.findings[0].words


def test_an_anchor_may_lag(log):
    log.decide('v', anchored=False)
    assert log.verify().ok


def test_a_wrong_key_is_said_once(log):
    report = log.verify(b'y' * 32)
    assert [(f.kind, f.writer, f.seq) for f in report.findings] == [('key', '', None)] and 'Name the right one' in report.findings[0].words


def test_a_wrong_key_does_not_hide_an_empty_log(tmp_path):
    log = Log(tmp_path)
    assert log.verify().ok and log.verify().text.startswith('0 chains with 0 rows')
    log.start('v')
    assert log.verify().ok
    assert log.found(b'y' * 32) == [('key', '', None)]
    log.note('v')
    log.tamper('DELETE FROM audit', 'DELETE FROM chains')
    assert log.found() == [('chain', 'v', 1)]
    assert log.found(b'y' * 32) == [('anchor', 'v', None)]
    log.store.close()


def test_a_chain_of_another_key_is_said_once_among_the_others(log):
    log.start('x', key=b'x' * 32)
    for _ in range(5):
        log.decide('x', key=b'x' * 32)
    assert sorted(log.found()) == [('anchor', 'x', None), ('genesis', 'x', 0), ('key', 'x', None)]


def test_a_changed_first_row_is_not_taken_for_a_wrong_key(log):
    log.tamper("UPDATE decisions SET pd = 0.0625 WHERE seq = 1")
    assert sorted({(k, w, s) for k, w, s in log.found()}) == [('changed', 'v', 1), ('changed', 'w', 1), ('columns', 'v', 1), ('columns', 'w', 1)]


def test_columns_and_answers_that_disagree_are_found_though_every_link_fits(log):
    log.decide('v', score=601)
    log.decide('v', answer='no JSON')
    log.decide('v', answer='[1]')
    log.decide('v', status='stopped', pd=None, score=None, answer='{"title":"stopped","status":503}')
    log.decide('v', status='stopped', pd=None, score=None, answer='{"title":"stopped"}')
    assert log.found() == [('columns', 'v', 7), ('answer', 'v', 8), ('answer', 'v', 9)] + [('columns', 'v', 10)]
    assert 'differ in score' in log.verify().findings[0].words


def test_personal_content_is_held_against_its_digest(log):
    log.tamper("UPDATE applications SET content = '{}' WHERE request_id = (SELECT request_id FROM decisions WHERE writer = 'v' AND seq = 2)")
    log.tamper("UPDATE applications SET salt = '' WHERE request_id = (SELECT request_id FROM decisions WHERE writer = 'v' AND seq = 4)")
    log.tamper("DELETE FROM applications WHERE request_id = (SELECT request_id FROM decisions WHERE writer = 'w' AND seq = 2)")
    report = log.verify()
    assert [(f.kind, f.writer, f.seq) for f in report.findings] == [('content', 'v', 2), ('content', 'v', 4), ('missing', 'w', 2)]
    assert all(f.request_id and f.request_id in f.words for f in report.findings)


def test_bytes_that_are_no_text_stop_one_chain_and_not_the_others(log):
    log.tamper("UPDATE decisions SET model_version = CAST(x'ff' AS TEXT) WHERE writer = 'v' AND seq = 2", "UPDATE decisions SET pd = 0 WHERE writer = 'w'")
    kinds = {(f.kind, f.writer) for f in log.verify().findings}
    assert {('unreadable', 'v'), ('changed', 'w')} <= kinds and ('changed', 'v') not in kinds


def test_findings_are_bounded_and_counted(log, monkeypatch):
    monkeypatch.setattr(ledger, 'FINDINGS_KEPT', 2)
    log.tamper('UPDATE decisions SET score = 1')
    report = log.verify()
    assert len(report.findings) == 2 and report.counts == {'changed': 7, 'columns': 7}


def test_pages_do_not_change_what_is_found(log, monkeypatch):
    log.tamper("DELETE FROM decisions WHERE writer = 'v' AND seq = 4", "DELETE FROM applications WHERE request_id IN (SELECT request_id FROM decisions)")
    whole = log.found()
    monkeypatch.setattr(ledger, '_PAGE', 1)
    assert sorted(log.found(), key=str) == sorted(whole, key=str) and len(whole) == 7


def test_memory_does_not_grow_with_the_log(log, monkeypatch):
    monkeypatch.setattr(ledger, '_PAGE', 20)
    peaks = []
    for rows in (100, 700):
        with log.store.write() as connection:  # many rows of a chain of their own, without a Python loop that would be measured
            connection.exec_driver_sql('DELETE FROM decisions')
            connection.exec_driver_sql(
                f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {rows}) INSERT INTO decisions (writer, seq, request_id, "
                "received_at, status, decision, model_version, policy_version, content_digest, answer, mac) "
                "SELECT 'v', i, 'r' || i, '', 'scored', '', '', '', '', printf('%.2000c', 'x'), '' FROM n")
        log.verify()
        tracemalloc.start()
        log.verify()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0] + 400_000, peaks  # 600 rows more of 2 KB, and findings of each


# ---------------------------------------------------------------- beside a server that goes on

def entry(n, applicant=None, **changes):
    request_id, at = new_id(), now()
    said = {'request_id': request_id, 'received_at': at, 'status': 'scored', 'pd': n / 1024, 'score': n, 'decision': 'approve', 'model_version': 'm1',
            'policy_version': 'p1', 'supersedes': None} | changes
    columns = {name: said[name] for name in ('request_id', 'received_at', 'status', 'pd', 'score', 'decision', 'model_version', 'policy_version')}
    return Entry(purpose='decision', answer=canonical_json(said), content=canonical_json({'n': n, 'of': applicant}), applicant=applicant, **columns)


class Writing:
    "Journals that write in a thread until told to stop."

    def __init__(self, log, journals=2):
        self.log, self.journals, self.stop, self.written = log, journals, threading.Event(), 0
        self.thread = threading.Thread(target=lambda: asyncio.run(self.run()))

    async def run(self):
        journals = [Journal(self.log.store, KEY, self.log.anchors) for _ in range(self.journals)]
        for journal in journals:
            journal.start()
        while not self.stop.is_set():
            for journal in journals:
                await journal.put_many([entry(n) for n in range(7)])
                await journal.note('desk', 'loaded', 'm1', {})
                self.written += 8
            await asyncio.sleep(0.02)  # else the log grows faster than it is read, and the test with it
        for journal in journals:
            await asyncio.to_thread(journal.close)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.stop.set()
        self.thread.join()


def test_a_server_that_goes_on_writing_raises_no_alarm(log, monkeypatch):
    monkeypatch.setattr(ledger, '_PAGE', 7)
    seen = []
    with Writing(log) as writing:
        while len(seen) < 8:
            report = log.verify()
            assert report.ok, report.findings
            seen.append(report.rows)
    assert seen[-1] > seen[0], 'nothing was written meanwhile'
    report = log.verify()
    assert report.ok and report.rows == 9 + writing.written and report.chains == 4


def test_a_walk_ends_where_the_chain_ended_when_it_began(log, monkeypatch):
    monkeypatch.setattr(ledger, '_PAGE', 1)
    rows = ledger._chain(log.store, 'v')
    seen = [next(rows).seq]
    log.note('v')
    log.decide('v')
    assert seen + [row.seq for row in rows] == [1, 2, 3, 4, 5, 6]


# ---------------------------------------------------------------- erasing

def bytes_of(folder):
    return b''.join(path.read_bytes() for path in folder.rglob('*') if path.is_file())


async def decided(log, applicants):
    "Applications of these people, answered by a journal that stays open while the rest is done to it."
    journal = Journal(log.store, KEY, log.anchors)
    journal.start()
    for start in range(0, len(applicants), 20):
        await journal.put_many([entry(n, applicant) for n, applicant in enumerate(applicants[start:start + 20])])
    return journal


@pytest.mark.parametrize('beside_a_service', [False, True])
def test_an_erased_applicant_is_gone_from_the_files_and_the_chain_is_whole(tmp_path, beside_a_service):
    log = Log(tmp_path)
    name, other = 'Zoe-Quillfeather-0815', 'Max-Bodenstein-4711'

    async def run():
        journal = await decided(log, [name, other] * 300)  # many, so that pages were split and their cells moved
        assert bytes_of(tmp_path).count(name.encode()) >= 600
        with log.store.write() as connection:  # what an earlier version of the tables has left in free pages
            connection.exec_driver_sql('CREATE TABLE old AS SELECT * FROM applications')
            connection.exec_driver_sql('DROP TABLE old')
        if not beside_a_service:
            await asyncio.to_thread(journal.close)
            return await asyncio.to_thread(erase_offline, log.store, KEY, log.anchors, name, 'Kim', 'asked for it')
        done = await erase(log.store, journal.note, name, 'Kim', 'asked for it')
        await journal.put(entry(1, other))
        await asyncio.to_thread(journal.close)
        return done

    done = asyncio.run(run())
    content = bytes_of(tmp_path)
    assert (len(done.request_ids), done.left) == (300, '')
    assert name.encode() not in content and other.encode() in content
    report = log.verify()
    assert report.ok and report.erased == 300, report.findings
    assert erase_offline(log.store, KEY, log.anchors, name, 'Kim', 'asked again').request_ids == ()
    log.store.close()


def test_an_erasure_may_leave_the_file_as_it_is_and_says_so(tmp_path):
    log = Log(tmp_path)
    asyncio.run(decided(log, ['Zoe-Quillfeather-0815', 'Ben'])).close()
    before = log.path.stat().st_size
    done = erase_offline(log.store, KEY, log.anchors, 'Zoe-Quillfeather-0815', 'Kim', 'asked for it', rewrite=False)
    assert 'was not written anew' in done.left and log.path.stat().st_size >= before
    assert b'Zoe-Quillfeather-0815' not in bytes_of(tmp_path) and b'Ben' in bytes_of(tmp_path)
    assert log.verify().ok
    log.store.close()


def test_an_erasure_that_broke_off_is_told_and_finished_by_asking_again(tmp_path, monkeypatch):
    log = Log(tmp_path)
    asyncio.run(decided(log, ['Ana', 'Ben', 'Ana'])).close()
    with monkeypatch.context() as patch:
        def killed(store, ids):
            raise KeyboardInterrupt
        patch.setattr(ledger, '_remove', killed)
        with pytest.raises(KeyboardInterrupt):
            erase_offline(log.store, KEY, log.anchors, 'Ana', 'Kim', 'asked for it')
    assert {f.kind for f in log.verify().findings} == {'unfinished'} and len(log.verify().findings) == 2
    assert len(erase_offline(log.store, KEY, log.anchors, 'Ana', 'Kim', 'asked for it').request_ids) == 2
    report = log.verify()
    assert report.ok and (report.erased, report.rows) == (2, 5)  # three decisions, and each erasure is noted once
    log.store.close()


def test_an_erasure_says_when_a_reader_keeps_old_pages(tmp_path, monkeypatch):
    log = Log(tmp_path, wait=0.05)
    asyncio.run(decided(log, ['Ana'])).close()
    monkeypatch.setattr(ledger, '_SCRUB_SECONDS', 0.0)
    reader = sqlite3.connect(log.path, isolation_level=None)
    reader.execute('BEGIN')
    reader.execute('SELECT * FROM applications').fetchall()
    done = erase_offline(log.store, KEY, log.anchors, 'Ana', 'Kim', 'asked for it')
    assert len(done.request_ids) == 1 and 'Stop the service and erase again' in done.left
    assert b'Ana' in bytes_of(tmp_path)
    reader.close()
    assert erase_offline(log.store, KEY, log.anchors, 'Ana', 'Kim', 'asked for it').left == '' and b'Ana' not in bytes_of(tmp_path)
    log.store.close()


# ---------------------------------------------------------------- the same decision again

@pytest.fixture(scope='module')
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp('bundles')
    small_bundle(folder)
    return folder


def score(log, scorer, rows, broken=()):
    "Applications scored and stored as the service does it."
    entries = []
    for n, raw in enumerate(rows):
        said = scorer.record(raw)
        request_id, at = new_id(), now()
        answer = {'request_id': request_id, 'received_at': at, 'purpose': 'decision', 'status': 'scored', **{k: said[k] for k in ('pd', 'score', 'decision')},
                  'knockout': said['knockout'], 'reasons': None, 'model_version': scorer.version, 'policy_version': said['policy_version'], 'supersedes': None}
        if n in broken:
            answer['pd'] = round(answer['pd'] + 1e-12, 12)
        entries.append(Entry(request_id, at, 'decision', 'scored', said['decision'], answer['pd'], said['score'], scorer.version, said['policy_version'],
                             canonical_json(answer), content=canonical_json(raw), applicant=raw['app']))

    async def run():
        journal = Journal(log.store, KEY, log.anchors)
        journal.start()
        await journal.put_many(entries)
        await asyncio.to_thread(journal.close)

    asyncio.run(run())
    return [e.request_id for e in entries]


@pytest.fixture
def raws():
    table = applications(30, seed=5, target=False)
    return [{name: values[i] for name, values in table.items() if values[i] is not None} for i in range(30)]


def test_decisions_are_computed_again_to_the_bit_with_the_model_and_policy_of_their_day(tmp_path, models, raws):
    log, first = Log(tmp_path), load_bundle(models / 'champion.json')
    later = replace(first, policy=replace(first.policy, approve_below=0.05, note='stricter'))
    write_policy(models / 'models', later.policy)
    score(log, first, raws[:15])
    score(log, later, raws[15:])
    again = replay(log.store, bundle_finder(models / 'models'))
    assert again.ok and (again.same, again.bits) == (30, 30), again.differences
    assert log.verify().ok
    log.store.close()


def test_what_comes_out_otherwise_is_named(tmp_path, models, raws):
    log, scorer = Log(tmp_path), load_bundle(models / 'champion.json')
    ids = score(log, scorer, raws, broken=(3, 8))
    load = bundle_finder(models / 'models')
    again = replay(log.store, load)
    assert (again.same, again.different, {d.request_id for d in again.differences}) == (28, 2, {ids[3], ids[8]})
    assert {d.name for d in again.differences} == {'pd'}
    assert replay(log.store, load, [ids[0], ids[3]]).different == 1
    assert replay(log.store, load, ids[:3]).ok
    assert replay(log.store, load, ['f' * 32]).unknown == ['f' * 32]
    log.store.close()


def test_what_cannot_be_computed_is_counted_and_not_fatal(tmp_path, models, raws):
    log, scorer = Log(tmp_path), load_bundle(models / 'champion.json')
    score(log, scorer, raws[:6])
    erase_offline(log.store, KEY, log.anchors, raws[0]['app'], 'Kim', 'asked for it')
    log.start('x')
    log.decide('x', model_version='0123456789abcdef')
    log.decide('x', model_version=scorer.version, policy_version='0123456789ab')
    log.decide('x', model_version=scorer.version, policy_version=scorer.policy.version)  # whose application does not fit the contract
    log.decide('x', status='stopped', pd=None, score=None)
    again = replay(log.store, bundle_finder(models / 'models'))
    assert (again.same, again.erased, again.stopped, again.missing.total(), again.different) == (5, 1, 1, 2, 1)
    assert [d.name for d in again.differences] == ['refused']
    log.store.close()


def test_a_bundle_that_was_changed_computes_nothing(tmp_path, models, raws):
    log, scorer = Log(tmp_path), load_bundle(models / 'champion.json')
    score(log, scorer, raws[:2])
    copy = tmp_path / 'models'
    shutil.copytree(models / 'models', copy)
    model = next(copy.glob('*/model.txt'))
    model.write_text(model.read_text().replace('leaf_value=', 'leaf_value=0', 1))
    again = replay(log.store, bundle_finder(copy))
    assert (again.same, again.missing.total()) == (0, 2) and 'was changed' in next(iter(again.missing))
    log.store.close()


def test_reasons_are_compared_by_what_they_say():
    row = {'request_id': 'r', 'answer': json.dumps({'pd': 0.1, 'reasons': [{'group': 'income', 'en': 'low'}]}), 'content': '{}'}

    class Told:
        def __init__(self, *words):
            self.words = words

        def record(self, application, explain):
            return {'pd': 0.1, 'reasons': [{'group': 'income', 'effect': 0.25, 'en': word} for word in self.words]}

    outcome = partial(ledger._compare, row=row)
    for words, same in ((('low',), 1), (('high',), 0), ((), 0), (('low', 'low'), 0)):
        result = ledger.Replay()
        outcome(result, Told(*words))
        assert (result.same, result.different) == (same, 1 - same), words


def test_an_erasure_needs_a_reason_that_does_not_name_the_applicant(log):
    for reason in ('', 'x', 'Ana asked'):
        with pytest.raises(RiskError, match='does not name the applicant'):
            erase_offline(log.store, KEY, log.anchors, 'Ana', 'Kim', reason)
    assert read_anchors(log.anchors, KEY)[1] == [] and log.verify().ok
