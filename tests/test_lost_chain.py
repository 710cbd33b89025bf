"""What a journal does when the ground is pulled from under it: nothing is healed over, nobody waits for ever."""
import asyncio
import json
import os
import sqlite3
from contextlib import closing
from dataclasses import replace

import pytest

from riskscore.chain import new_id, now
from riskscore.journal import Entry, Journal, KeyReused, StoreUnavailable
from riskscore.ledger import erase, verify
from riskscore.store import open_store

KEY = b'k' * 32
ENTRY = Entry('', '', 'decision', 'scored', 'approve', 0.1, 600, 'm', 'p', '', content='{"a":1}', applicant='ana')


def entry(**changes) -> Entry:
    said = {'request_id': new_id(), 'received_at': now(), 'status': 'scored', 'pd': 0.1, 'score': 600, 'decision': 'approve', 'model_version': 'm',
            'policy_version': 'p', 'supersedes': None}
    return replace(ENTRY, request_id=said['request_id'], received_at=said['received_at'], answer=json.dumps(said, separators=(',', ':')), **changes)


def play(tmp_path, story):
    "Runs a story of a store and its journal."
    async def run():
        store = open_store(f'sqlite:///{tmp_path}/a.db', wait=0.3)
        journal = Journal(store, KEY, tmp_path / 'anchors')
        journal.start()
        try:
            return await asyncio.wait_for(story(store, journal), 30)
        finally:
            await asyncio.to_thread(journal.close)
            store.close()

    return asyncio.run(run())


async def stumble(tmp_path, journal):
    "Makes a commit fail, so that the journal looks at its head again."
    with closing(sqlite3.connect(tmp_path / 'a.db', isolation_level=None)) as other:
        other.execute('BEGIN IMMEDIATE')
        with pytest.raises(StoreUnavailable):
            await journal.put(entry())
        other.execute('ROLLBACK')


@pytest.mark.parametrize('damage', ['DELETE FROM decisions WHERE seq > 5', "UPDATE decisions SET mac = 'x' WHERE seq = 10"])
def test_a_cut_is_not_healed_over(tmp_path, damage):
    async def story(store, journal):
        for _ in range(10):
            await journal.put(entry())
        with closing(sqlite3.connect(tmp_path / 'a.db')) as other:
            other.execute(damage)
            other.commit()
        await stumble(tmp_path, journal)
        for _ in range(3):
            with pytest.raises(StoreUnavailable, match='is not in the database any more'):
                await journal.put(entry())
        assert 'chain' in journal.problem
        return verify(store, KEY, tmp_path / 'anchors')

    report = play(tmp_path, story)
    assert not report.ok and set(report.counts) & {'tail', 'changed'}


def test_a_commit_whose_answer_was_lost_is_no_cut(tmp_path):
    async def story(store, journal):
        await journal.put(entry())
        await stumble(tmp_path, journal)
        await journal.put(entry())
        return journal.problem, verify(store, KEY, tmp_path / 'anchors')

    problem, report = play(tmp_path, story)
    assert problem == '' and report.ok and report.rows == 2


@pytest.mark.parametrize('act', [lambda path: path.rename(path.with_suffix('.old')), os.remove])
def test_a_file_that_was_moved_or_removed_takes_no_more_decisions(tmp_path, act):
    async def story(store, journal):
        await journal.put(entry())
        act(tmp_path / 'a.db')
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match='moved, removed or replaced'):
                await journal.put(entry())

    play(tmp_path, story)


@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')
def test_nobody_waits_for_a_thread_that_has_ended(tmp_path, monkeypatch):
    class Ended(BaseException):
        "Nothing that is caught on the way."

    async def story(store, journal):
        await journal.put(entry())
        monkeypatch.setattr('riskscore.journal._commit', lambda *_: (_ for _ in ()).throw(Ended()))
        done = await asyncio.gather(*(journal.put(entry()) for _ in range(5)), return_exceptions=True)
        assert all(isinstance(found, StoreUnavailable) for found in done) and journal.depth == 0
        with pytest.raises(StoreUnavailable):
            await journal.put(entry())
        assert journal.problem

    play(tmp_path, story)


def test_the_key_of_an_erased_application_answers_nobody(tmp_path):
    async def story(store, journal):
        first = await journal.put(entry(idempotency='k', fingerprint='f'))
        assert (await journal.put(entry(idempotency='k', fingerprint='f'))).text == first.text
        await erase(store, journal.note, 'ana', 'desk', 'asked for')
        for finger in ('f', 'g'):
            with pytest.raises(KeyReused, match='erased'):
                await journal.put(entry(idempotency='k', fingerprint=finger))
        assert verify(store, KEY, tmp_path / 'anchors').ok

    play(tmp_path, story)


def test_an_applicant_cannot_be_filed_elsewhere(tmp_path):
    async def story(store, journal):
        await journal.put(entry())
        with closing(sqlite3.connect(tmp_path / 'a.db')) as other:
            other.execute('UPDATE applications SET applicant = NULL')
            other.commit()
        return verify(store, KEY, tmp_path / 'anchors')

    assert set(play(tmp_path, story).counts) == {'content'}
