"""The journal's tests over a PostgreSQL server of our own, and a restart of that server while entries flow.

The server is started for the test from the system's packages, listens on a socket in a temporary folder only, and is thrown away.
"""
import asyncio
import os
import re
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy as sa
import test_journal as shared
from test_journal import Place, answers, approvals, entry, journal, outcome, stored

from riskscore.chain import new_id
from riskscore.core import RiskError
from riskscore.store import SCHEMA_VERSION, StoreUnavailable, open_store

APART = {'test_a_full_database_stores_nothing_half', 'test_a_full_disk_is_said_and_got_over', 'test_two_processes_with_the_same_keys_store_each_once'}
globals().update({name: test for name, test in vars(shared).items() if name.startswith('test_') and name not in APART})


class Cluster:
    "A PostgreSQL server of our own."

    def __init__(self, tools: Path, folder: Path):
        self.tools, self.folder = tools, folder
        if os.geteuid() == 0:
            shutil.chown(folder, 'postgres', 'postgres')
        self.run('initdb', '-D', folder / 'data', '-A', 'trust', '-U', 'postgres', '--no-sync', '-E', 'UTF8', '--locale=C.UTF-8')
        self.control('start')

    def run(self, tool, *arguments):
        "Runs one of the server's tools; the server refuses to run as root."
        command = [str(self.tools / tool), *map(str, arguments)]
        if os.geteuid() == 0:
            command = ['runuser', '-u', 'postgres', '--', *command]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=self.folder)

    def control(self, action, *arguments):
        options = f"-k {self.folder} -c listen_addresses='' -c fsync=off"  # the server dies in these tests and the machine does not
        self.run('pg_ctl', '-D', self.folder / 'data', '-w', '-t', '120', '-l', self.folder / 'log', '-o', options, *arguments, action)

    def url(self, database):
        return f'postgresql+psycopg://postgres@/{database}?host={self.folder}'

    def database(self):
        "The URL of a new and empty database."
        name = f'r{new_id()}'
        engine = sa.create_engine(self.url('postgres'), isolation_level='AUTOCOMMIT')
        with engine.connect() as connection:
            connection.exec_driver_sql(f'CREATE DATABASE {name}')
        engine.dispose()
        return self.url(name)


@dataclass
class Database(Place):
    cluster: Cluster

    @contextmanager
    def locked(self):
        "Another connection keeps everybody from writing."
        engine = sa.create_engine(self.url)
        with engine.begin() as connection:
            connection.exec_driver_sql('LOCK TABLE decisions, trials, audit IN EXCLUSIVE MODE')
            yield
        engine.dispose()


@pytest.fixture(scope='module')
def cluster():
    pytest.importorskip('psycopg')
    found = sorted(Path('/usr/lib/postgresql').glob('*/bin/initdb'), key=lambda path: int(re.sub(r'\D', '', path.parts[4]) or 0))
    if not found:
        pytest.skip('PostgreSQL is not installed: /usr/lib/postgresql/*/bin/initdb is missing')
    if os.geteuid() == 0 and not shutil.which('runuser'):
        pytest.skip('the server does not run as root, and there is no runuser')
    folder = Path(tempfile.mkdtemp(prefix='riskscore-pg-'))  # pytest's own folder is closed to the server's user, and its path too long for a socket
    cluster = Cluster(found[-1].parent, folder)
    try:
        yield cluster
    finally:
        cluster.control('stop', '-m', 'immediate')
        shutil.rmtree(folder)


@pytest.fixture
def place(cluster, tmp_path):
    return Database(cluster.database(), tmp_path / 'anchors', cluster)


@pytest.mark.slow
def test_two_processes_with_the_same_keys_store_each_once(place):
    shared.test_two_processes_with_the_same_keys_store_each_once(place)


def test_a_restart_of_the_server_loses_nothing_that_was_answered(place):
    async def run():
        with journal(place, wait=5) as running:
            going, kept, refused = True, [], []

            async def client():
                while going:
                    got = await outcome(running.put(entry()))
                    (refused if isinstance(got, Exception) else kept).append(got)
                    if isinstance(got, Exception):
                        await asyncio.sleep(0.02)

            clients = [asyncio.create_task(client()) for _ in range(16)]
            await asyncio.sleep(0.4)
            await asyncio.to_thread(place.cluster.control, 'restart', '-m', 'immediate')
            before = len(kept)
            for _ in range(1200):
                await asyncio.sleep(0.05)
                if len(kept) > before + 32:
                    break
            assert len(kept) > before + 32, 'the journal did not recover'
            going = False
            await asyncio.gather(*clients)
            return kept, refused

    kept, refused = asyncio.run(run())
    assert refused and {type(error) for error in refused} == {StoreUnavailable}
    rows = stored(place)
    assert {k.request_id for k in kept} <= set(answers(rows)) and len(answers(rows)) <= len(kept) + len(refused)
    assert len(rows['chains']) == 1 and approvals(rows) >= len(kept)


def test_the_state_is_looked_at_again_after_a_restart(place):
    async def run():
        with journal(place) as running:
            await asyncio.to_thread(place.cluster.control, 'restart', '-m', 'immediate')
            seen = running.looked_at
            for _ in range(1200):
                await asyncio.sleep(0.05)
                if running.looked_at > seen + 0.3:
                    return True

    assert asyncio.run(run())


def test_commits_wait_for_the_disk_where_the_server_would_not(place):
    name = sa.make_url(place.url).database
    engine = sa.create_engine(place.cluster.url('postgres'), isolation_level='AUTOCOMMIT')
    with engine.connect() as connection:
        connection.exec_driver_sql(f'ALTER DATABASE {name} SET synchronous_commit = off')
    engine.dispose()
    connection = place.open().driver()
    assert connection.execute('SHOW synchronous_commit').fetchone() == ('on',)
    connection.close()


def test_a_newer_schema_is_refused(place):
    store = place.open()
    with store.write() as connection:
        connection.exec_driver_sql(f"UPDATE meta SET value = '{SCHEMA_VERSION + 1}'")
    store.close()
    with pytest.raises(RiskError, match='Upgrade riskscore'):
        open_store(place.url)


def test_text_sorts_by_its_bytes(place):
    store = place.open()
    with store.write() as connection:
        connection.execute(store.tables['meta'].insert(), [{'name': n, 'value': ''} for n in ('b', 'B', 'a-1', 'a1', 'A')])
    with store.read() as connection:
        names = connection.execute(sa.select(store.tables['meta'].c.name).order_by('name')).scalars().all()
    store.close()
    assert names == sorted(names)
