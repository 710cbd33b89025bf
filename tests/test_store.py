"The store: made once by whoever comes first, refused when it is not ours, and never half written."
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

from riskscore.core import RiskError
from riskscore.store import SCHEMA_VERSION, StoreUnavailable, open_store

STATE = {'name': 'stop', 'value': '{}', 'version': 1, 'changed_at': 'now', 'changed_by': 'me'}


@pytest.fixture
def url(tmp_path):
    return f'sqlite:///{tmp_path}/deep/riskscore.db'


def test_several_processes_may_make_it_at_once(url):
    code = f'from riskscore.store import open_store; s = open_store({url!r}); print(len(s.tables)); s.close()'
    environ = {**os.environ, 'PYTHONPATH': str(Path(__file__).parents[1])}
    processes = [subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ) for _ in range(3)]
    said = [p.communicate() for p in processes]
    assert [p.returncode for p in processes] == [0] * 3, said
    with open_store(url).read() as connection:
        assert connection.exec_driver_sql('SELECT name, value FROM meta').all() == [('schema_version', str(SCHEMA_VERSION))]


def test_a_newer_schema_is_refused_and_left_alone(url):
    store = open_store(url)
    with store.write() as connection:
        connection.exec_driver_sql(f"UPDATE meta SET value = '{SCHEMA_VERSION + 1}'")
    store.close()
    with pytest.raises(RiskError, match=f'schema version {SCHEMA_VERSION + 1}, and this version of riskscore knows {SCHEMA_VERSION}. Upgrade'):
        open_store(url)


def test_a_database_of_something_else_is_refused_and_left_alone(url):
    open_store(url).close()
    path = sa.make_url(url).database
    with sqlite3.connect(path) as connection:
        connection.execute('DROP TABLE meta')
    before = set(sqlite3.connect(path).execute('SELECT name FROM sqlite_master'))
    with pytest.raises(RiskError, match='tables of something else: .* Give the service a database of its own'):
        open_store(url)
    assert set(sqlite3.connect(path).execute('SELECT name FROM sqlite_master')) == before


def test_a_failed_transaction_leaves_nothing(url):
    store = open_store(url)
    with pytest.raises(ZeroDivisionError), store.write() as connection:
        connection.execute(store.tables['state'].insert(), STATE)
        1 / 0  # noqa: B018
    with store.read() as connection:
        assert connection.execute(sa.select(store.tables['state'])).all() == []


def test_a_reader_sees_one_state_while_others_write(url):
    store = open_store(url)
    count = sa.select(sa.func.count()).select_from(store.tables['state'])
    with store.read() as reader:
        assert reader.execute(count).scalar() == 0
        with store.write() as connection:
            connection.execute(store.tables['state'].insert(), STATE)
        assert reader.execute(count).scalar() == 0
    with store.read() as reader:
        assert reader.execute(count).scalar() == 1


def test_an_error_of_ours_is_not_called_an_outage(url):
    store = open_store(url)
    with store.write() as connection:
        connection.execute(store.tables['state'].insert(), STATE)
    with pytest.raises(sa.exc.IntegrityError), store.write() as connection:
        connection.execute(store.tables['state'].insert(), STATE)


def test_a_server_that_is_not_there_is_said_without_the_password():
    with pytest.raises(RiskError, match='cannot be opened') as caught:
        open_store('postgresql://ana:s3cret@127.0.0.1:1/none', wait=1)
    assert 's3cret' not in str(caught.value) and 'Check the URL' in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason='root writes everywhere')
def test_a_read_only_file_is_refused(url):
    open_store(url).close()
    os.chmod(sa.make_url(url).database, 0o400)
    with pytest.raises(RiskError, match='Let the user of the service write'):
        open_store(url)


def test_a_store_that_went_away_is_unavailable(url, tmp_path):
    store = open_store(url)
    store.close()
    os.rename(tmp_path / 'deep', tmp_path / 'gone')
    with pytest.raises(StoreUnavailable, match='Nothing was stored'), store.write() as connection:
        connection.execute(store.tables['state'].insert(), STATE)
