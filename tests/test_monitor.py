"""The monitor closes each window once, in order, says what it found, and stops what has to be stopped; one leads, another takes over."""
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from running_service import service
from service_load import eventually
from test_journal import Place
from test_live_drift import cluster, model, place_of, pointer  # noqa: F401
from watched import KEY, decide, raw_rows

from riskscore.alerts import TRIES, list_alerts, post_alert, sign
from riskscore.bundle import load_bundle, write_bundle, write_pointer
from riskscore.chain import now
from riskscore.contract import check_frame
from riskscore.core import RiskError
from riskscore.decisions import store_outcomes
from riskscore.fast import FastScorer
from riskscore.ledger import verify
from riskscore.monitor import Monitor, Round, rounds, take_lease
from riskscore.operate import monitor as command
from riskscore.operations import set_stop
from riskscore.reference import fit_reference, reference_from_bytes
from riskscore.settings import Settings
from riskscore.store import Store, StoreUnavailable

DAY = '2026-03-02T'
CALM, BROKEN = {}, {'income': None}


def settings_of(where: Place, bundle: Path, **given) -> Settings:
    return Settings(model=str(bundle), folder=str(where.anchors.parent), store=where.url, ledger_key=KEY.decode(), **{'window_seconds': 3600.0, **given})


@pytest.fixture(params=['sqlite', pytest.param('postgresql', marks=pytest.mark.slow)])
def place(request, tmp_path) -> Place:
    return place_of(request, tmp_path)


@pytest.fixture
def here(tmp_path) -> Place:
    return Place(f'sqlite:///{tmp_path}/riskscore.db', tmp_path / 'anchors')


@asynccontextmanager
async def working(settings: Settings, **options):
    "A monitor that has begun."
    found = Monitor(settings, **options)
    await found.start()
    try:
        yield found
    finally:
        await found.close()


def traffic(where: Place, scorer: FastScorer, hour: int, rows: int = 250, counted: bool = True, **changes) -> None:
    "What was decided in an hour of a day in March."
    store = where.open()
    try:
        asyncio.run(decide(store, where.anchors, scorer, raw_rows(rows, seed=hour, **changes), f'{DAY}{hour:02d}:10:00.000000Z', counted))
    finally:
        store.close()


def one_round(settings: Settings) -> Round:
    "A monitor begins, works once, and ends."
    async def run() -> Round:
        async with working(settings) as found:
            return await found.round()
    return asyncio.run(run())


def rows_of(store: Store, table: str) -> list[dict]:
    with store.read() as connection:
        return [dict(row) for row in connection.execute(sa.select(store.tables[table])).mappings()]


def look(where: Place, table: str) -> list[dict]:
    store = where.open()
    try:
        return rows_of(store, table)
    finally:
        store.close()


def state_of(where: Place, name: str) -> dict:
    return {row['name']: json.loads(row['value']) for row in look(where, 'state')}.get(name, {})


# ---------------------------------------------------------------- windows

def test_missed_windows_are_closed_in_order_and_once(place, pointer, model):  # noqa: F811
    settings = settings_of(place, pointer)
    for hour, counted in ((9, True), (7, False), (8, True), (11, False)):  # two of the workers died
        traffic(place, model, hour, counted=counted)
    first = one_round(settings)
    assert (first.counted, first.code, first.stopped) == (500, 0, False)
    assert [w['from'][11:13] for w in first.closed] == ['07', '08', '09', '11'] and {w['rows'] for w in first.closed} == {250}
    again = one_round(settings)
    assert again.closed == [] and again.last['from'] == f'{DAY}11:00:00.000000Z' and again.line == 'no window to close'
    traffic(place, model, 8)  # too late: it is in the counts, and in no verdict
    traffic(place, model, 12)
    assert [w['from'][11:13] for w in one_round(settings).closed] == ['12']
    verdicts = look(place, 'verdicts')
    assert len(verdicts) == 5 and all(json.loads(v['content'])['rows'] == v['rows'] for v in verdicts)
    noted = [row['subject'][11:13] for row in sorted(look(place, 'audit'), key=lambda row: row['at']) if row['event'] == 'window_closed']
    assert noted == ['07', '08', '09', '11', '12']
    day = one_round(settings_of(place, pointer, window_seconds=86400.0))  # the windows are longer from now on; what was judged is not judged again
    assert day.closed == []


def test_an_hour_that_runs_is_not_closed(here, pointer, model):  # noqa: F811
    store = here.open()
    asyncio.run(decide(store, here.anchors, model, raw_rows(20)))
    store.close()
    before = time.time() // 3600
    told = one_round(settings_of(here, pointer))
    if before != (time.time() - 5) // 3600:
        pytest.skip('an hour ended meanwhile')
    assert told.closed == [] and look(here, 'verdicts') == []


def test_broken_columns_stop_and_the_flag_is_written(here, pointer, model):  # noqa: F811
    settings = settings_of(here, pointer)
    traffic(here, model, 7)
    assert one_round(settings).code == 0
    folder = Path(settings.folder) / 'monitoring'
    assert (folder / 'drift_flag.txt').read_text() == '0\n' and not state_of(here, 'stop')['stopped']
    traffic(here, model, 8, **BROKEN)
    told = one_round(settings)
    assert told.stopped and told.code == 3 and told.closed[0]['broken'] == ['income']
    stop = state_of(here, 'stop')
    assert stop['stopped'] and stop['by'] == 'monitor' and 'income' in stop['reason']
    report = json.loads((folder / 'drift_report.json').read_text())
    assert report['verdict']['broken'] == ['income'] and [w['stop'] for w in report['evolution']] == [False, True] and report['stop']['stopped']
    assert (folder / 'drift_flag.txt').read_text() == f"{report['verdict']['flag']}\n" == '1\n'  # one column of six
    drift = state_of(here, 'drift')
    assert (drift['share'], drift['flag'], drift['stop']) == (report['verdict']['drift_share'], 1, True) and drift['alerts']['critical'] == 1
    alert, = look(here, 'alerts')
    assert (alert['kind'], alert['severity'], alert['next_try']) == ('stopped', 'critical', None)
    audit = [(row['actor'], row['event']) for row in look(here, 'audit')]
    assert audit.count(('monitor', 'stopped')) == 1
    store = here.open()
    report = verify(store, KEY, here.anchors)
    assert report.ok, report.findings
    store.close()


@pytest.mark.parametrize(('stop_on', 'changes', 'stopped', 'kind'), [
    ('never', BROKEN, False, 'broken'), ('broken', {'tenure': 3}, False, 'drift'), ('material', {'tenure': 3}, True, 'stopped')])
def test_what_stops_is_a_setting(here, pointer, model, stop_on, changes, stopped, kind):  # noqa: F811
    traffic(here, model, 7, **changes)
    told = one_round(settings_of(here, pointer, stop_on=stop_on))
    assert told.stopped == stopped == state_of(here, 'stop').get('stopped', False) and told.code == (3 if stopped else 1)
    assert [a['kind'] for a in look(here, 'alerts')] == [kind]


def test_only_the_newest_window_stops_and_not_for_what_an_operator_has_seen(here, pointer, model):  # noqa: F811
    settings = settings_of(here, pointer)
    traffic(here, model, 6, **BROKEN)
    traffic(here, model, 7)
    assert one_round(settings).stopped is False  # it was broken, and is not any more
    assert [a['kind'] for a in look(here, 'alerts')] == ['broken']
    traffic(here, model, 8, **BROKEN)
    traffic(here, model, 9, rows=150)  # too few to say that all is well again
    assert one_round(settings).stopped is True

    async def resume(at: str) -> None:
        async with working(settings) as found:
            await set_stop(found.journal, 'ana', 'the feed is repaired', False)
            state = {'stopped': False, 'reason': 'the feed is repaired', 'by': 'ana', 'at': at}
            await found.journal.note('test', 'clock', 'service', {}, ('stop', state, None))

    asyncio.run(resume(f'{DAY}12:30:00.000000Z'))
    traffic(here, model, 12, **BROKEN)  # before the feed was repaired
    traffic(here, model, 13)
    longer = settings_of(here, pointer, window_seconds=4 * 3600.0)  # 12 to 16
    assert one_round(longer).stopped is False
    asyncio.run(resume(f'{DAY}16:30:00.000000Z'))
    traffic(here, model, 17, **BROKEN)  # it was not
    assert one_round(longer).stopped is True
    asyncio.run(resume('2026-03-03T02:30:00.000000Z'))
    traffic(here, model, 21, **BROKEN)  # long before, and the monitor was down when this window ended
    told = one_round(longer)
    assert told.last['stop'] and not told.stopped and look(here, 'alerts')[-1]['severity'] == 'critical'


def test_files_that_cannot_be_written_hold_up_no_stop(here, pointer, model):  # noqa: F811
    Path(here.anchors.parent, 'monitoring').write_text('a file')
    traffic(here, model, 7, **BROKEN)
    assert one_round(settings_of(here, pointer)).code == 3


def test_a_clock_that_is_put_back_holds_nothing_up(here, pointer, monkeypatch):  # noqa: F811
    ahead = [30 * 86400.0]
    monkeypatch.setattr('riskscore.monitor.time', SimpleNamespace(time=lambda: time.time() + ahead[0]))
    monkeypatch.setattr('riskscore.monitor.now', lambda: datetime.fromtimestamp(time.time() + ahead[0], UTC).isoformat(timespec='microseconds')[:-6] + 'Z')

    async def run() -> int:
        ended, count = asyncio.Event(), 0
        async with working(settings_of(here, pointer), lease=0.3) as found:
            asyncio.get_running_loop().call_later(10.0, ended.set)
            asyncio.get_running_loop().call_later(0.3, ahead.__setitem__, 0, 0.0)
            async for _ in rounds(found, 3600.0, ended):
                count += 1
                if count == 2:
                    ended.set()
        return count

    assert asyncio.run(run()) == 2


@pytest.mark.parametrize(('decided', 'told'), [(0, ['refused']), (501, [])])
def test_a_feed_that_is_refused_is_told_once(here, pointer, decided, told):  # noqa: F811
    store = here.open()
    with store.write() as connection:
        for ago in (0, 3600):
            slot = datetime.fromtimestamp(time.time() - ago, UTC).strftime('%Y-%m-%dT%H:00:00.000000Z')
            connection.execute(store.tables['windows'].insert(), [{'started_at': slot, 'writer': 'w', 'name': name, 'item': item, 'n': n}
                                                                  for name, item, n in (('refused_requests', '', 500), ('decisions', 'refer', decided))])
    store.close()
    for _ in range(2):
        assert one_round(settings_of(here, pointer)).closed == []
    assert [a['kind'] for a in look(here, 'alerts')] == told


def two_models(folder: Path, model: FastScorer) -> tuple[FastScorer, FastScorer]:  # noqa: F811
    "The same model with another history, of pilots alone, and as it is; the pointer names the other history."
    s, rows = model.scorer, raw_rows(800, seed=77, job='pilot')
    frame = check_frame(s.contract, {n: [r.get(n) for r in rows] for n in s.contract.columns}).frame
    drifts = {'first': s.drift, 'second': fit_reference(s.contract, frame.__getitem__).to_bytes()}
    first, second = (write_bundle(folder / 'models', s.predictor, s.plan, s.calibration, s.policy, s.contract, {name: 1}, {}, drift=drift)
                     for name, drift in drifts.items())
    write_pointer(folder / 'champion.json', second)
    return FastScorer(load_bundle(first)), FastScorer(load_bundle(second))


def test_a_window_of_two_models_is_judged_for_each(here, tmp_path, model):  # noqa: F811
    first, second = two_models(tmp_path, model)
    traffic(here, first, 7, rows=300, counted=False)
    traffic(here, second, 7, rows=300)
    told = one_round(settings_of(here, tmp_path / 'champion.json'))
    verdicts = {v['reference']: json.loads(v['content']) for v in look(here, 'verdicts')}
    assert told.counted == 300 and len(verdicts) == 2 and {v['rows'] for v in verdicts.values()} == {300}
    material = {d: [c['column'] for c in v['columns'] if c['verdict'] == 'material'] for d, v in verdicts.items()}
    assert material[reference_from_bytes(second.scorer.drift).digest] == ['job'] and sum(map(len, material.values())) == 1  # it had seen pilots alone
    assert told.last['material'] == ['job']


@pytest.mark.parametrize(('rows', 'stopped'), [(250, False), (20, True)], ids=['it has seen enough', 'it has not'])
def test_the_model_in_place_decides_on_a_stop(here, tmp_path, model, rows, stopped):  # noqa: F811
    first, second = two_models(tmp_path, model)
    traffic(here, first, 7, **BROKEN)
    traffic(here, second, 7, rows, job='pilot')  # trained for what broke the first one
    told = one_round(settings_of(here, tmp_path / 'champion.json'))
    assert told.last['stop'] and told.stopped == stopped


# ---------------------------------------------------------------- who leads

def test_two_monitors_close_each_window_once(place, pointer, model):  # noqa: F811
    settings = settings_of(place, pointer)
    for hour in range(6):
        traffic(place, model, hour, rows=120)

    async def run() -> list[Round]:
        async with working(settings) as one, working(settings) as two:
            return [r for _ in range(2) for r in await asyncio.gather(one.round(), two.round())]

    told = asyncio.run(run())
    assert sorted(r.leads for r in told) == [False, False, True, True]
    assert [w['from'][11:13] for r in told for w in r.closed] == ['00', '01', '02', '03', '04', '05'] and len(look(place, 'verdicts')) == 6


def test_a_leader_that_lost_its_lease_does_nothing_twice(place, pointer, model):  # noqa: F811
    settings = settings_of(place, pointer)
    traffic(place, model, 7, **BROKEN)

    async def run() -> list[Round]:
        async with working(settings, lease=-1.0) as one, working(settings, lease=-1.0) as two:  # both believe that they lead
            take_lease(one.store, 'somebody before', -1.0)
            return await asyncio.gather(one.round(), two.round())

    told = asyncio.run(run())
    assert all(r.leads for r in told) and len(look(place, 'verdicts')) == 1 and sum(r.stopped for r in told) == 1
    assert [row['event'] for row in look(place, 'audit')].count('stopped') == 1
    assert len(look(place, 'alerts')) == 1


def test_another_takes_over_when_the_leader_dies(here, pointer, model):  # noqa: F811
    settings = settings_of(here, pointer)

    async def run() -> list[bool]:
        found: list[bool] = []
        async with working(settings, lease=0.6) as one, working(settings, lease=0.6) as two:
            found += [(await one.round()).leads, (await two.round()).leads]  # and then `one` is silent
            until, ended = time.monotonic() + 30, asyncio.Event()
            async for told in rounds(two, 60.0, ended):
                found.append(told.leads)
                if told.leads or time.monotonic() > until:
                    ended.set()
            found.append((await one.round()).leads)
        return found

    found = asyncio.run(run())
    assert found[:2] == [True, False] and found[-2:] == [True, False]


def test_a_lease_that_is_given_back_is_free(place):  # noqa: F811
    store = place.open()
    assert [take_lease(store, 'one'), take_lease(store, 'two'), take_lease(store, 'one', 0.0), take_lease(store, 'two')] == [True, False, True, True]
    store.close()


# ---------------------------------------------------------------- who is told

class Desk(BaseHTTPRequestHandler):
    "Whoever is told; refuses as often as it is told to."
    got: list[tuple[str, bytes]] = []
    refuse = 0

    def do_POST(self):
        Desk.got.append((self.headers['Riskscore-Signature'], self.rfile.read(int(self.headers['Content-Length']))))
        self.send_response(503 if len(Desk.got) <= Desk.refuse else 200)
        self.end_headers()

    def log_message(self, *args):
        return


@pytest.fixture
def desk():
    Desk.got, Desk.refuse = [], 0
    server = HTTPServer(('127.0.0.1', 0), Desk)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/alerts'
    server.shutdown()
    server.server_close()


def test_an_alert_arrives_after_a_restart_and_once(here, pointer, model, desk):  # noqa: F811
    secret = 'a secret of the desk'
    settings = settings_of(here, pointer, webhook_url=desk, webhook_secret=secret)
    traffic(here, model, 7, **BROKEN)
    Desk.refuse = 1
    assert one_round(settings).sent == 0
    row, = look(here, 'alerts')
    assert row['attempts'] == 1 and row['delivered_at'] is None and row['next_try'] > row['at']
    assert one_round(settings).sent == 0 and len(Desk.got) == 1  # it is not due yet
    store = here.open()
    with store.write() as connection:
        connection.exec_driver_sql('UPDATE alerts SET next_try = at')
    store.close()
    assert one_round(settings).sent == 1 and one_round(settings).sent == 0 and len(Desk.got) == 2
    for signature, body in Desk.got:
        at = int(signature[2:signature.index(',')])
        assert signature == sign(secret.encode(), body, at) and abs(at - time.time()) < 600
        assert json.loads(body)['kind'] == 'stopped' and json.loads(body)['content']['broken'] == ['income']
    assert Desk.got[0][1] == Desk.got[1][1]


def test_a_desk_that_is_gone_is_given_up_and_holds_nothing_up(here, pointer, model):  # noqa: F811
    settings = settings_of(here, pointer, webhook_url='http://127.0.0.1:1/', webhook_secret='a secret of the desk')
    traffic(here, model, 7, **BROKEN)
    assert one_round(settings).stopped
    store = here.open()
    for attempts in (TRIES - 2, TRIES - 1, TRIES):
        with store.write() as connection:
            connection.exec_driver_sql(f'UPDATE alerts SET next_try = at, attempts = {attempts} WHERE next_try IS NOT NULL')
        assert one_round(settings).sent == 0
    found, = list_alerts(store)
    store.close()
    assert (found['attempts'], found['next_try'], found['delivered_at']) == (TRIES, None, None)


def test_a_desk_that_answers_in_drops_holds_nothing_up():
    ended = threading.Event()

    def drip(server: socket.socket) -> None:
        with suppress(OSError), server.accept()[0] as line:
            for _ in range(100):
                line.sendall(b'HTTP/1.1 200 OK\r\n'[:1])
                time.sleep(0.1)
        ended.set()

    with socket.create_server(('127.0.0.1', 0)) as server:
        threading.Thread(target=drip, args=(server,), daemon=True).start()
        row = {'alert': 'a', 'at': now(), 'kind': 'stopped', 'severity': 'critical', 'subject': '', 'content': {}}
        assert post_alert(f'http://127.0.0.1:{server.getsockname()[1]}/', b's' * 16, row, 0.5) and not ended.is_set()


# ---------------------------------------------------------------- outcomes

def test_outcomes_that_contradict_the_model_are_told_once(here, pointer, model):  # noqa: F811
    settings = settings_of(here, pointer)
    traffic(here, model, 7, rows=1500)
    store = here.open()
    with store.read() as connection:
        approved = connection.exec_driver_sql("SELECT request_id FROM decisions WHERE decision = 'approve'").scalars().all()
    assert len(approved) > 300
    list(store_outcomes(store, ({'request_id': r, 'bad': int(i % 3 > 0), 'observed_at': '2026-03-20'} for i, r in enumerate(approved)), 'desk'))
    store.close()
    first = one_round(settings)
    assert first.outcomes['alarm'] and first.code == 1 and first.outcomes['new'] == len(approved)
    again = one_round(settings)
    assert again.outcomes['alarm'] and again.outcomes['new'] == 0
    assert [a['kind'] for a in look(here, 'alerts')] == ['concept']


# ---------------------------------------------------------------- the command

def test_the_command_says_in_its_exit_code_what_it_found(here, tmp_path, pointer, model, monkeypatch):  # noqa: F811
    (tmp_path / 'ledger.key').write_bytes(KEY)
    arguments = ['--once', '--window', '1h', '--folder', str(tmp_path), '--model', str(pointer)]
    for hour, changes, code in ((7, CALM, 0), (8, {'tenure': 3}, 1), (9, BROKEN, 3)):
        traffic(here, model, hour, **changes)
        told = CliRunner().invoke(command, arguments)
        assert told.exit_code == code, told.output
        assert told.stdout.startswith(f'{DAY}{hour:02d}:00:00') and len(told.stdout.splitlines()) == 1
    short = CliRunner().invoke(command, ['--once', '--window', '10s', *arguments[3:]])  # the service counts by the hour
    assert isinstance(short.exception, RiskError) and 'RISKSCORE_WINDOW_SECONDS' in str(short.exception)
    missing = CliRunner().invoke(command, [*arguments[:-1], str(tmp_path / 'nowhere.json')])
    assert isinstance(missing.exception, RiskError) and 'There is no model' in str(missing.exception)
    monkeypatch.setattr('riskscore.monitor.windows_to_close', Mock(side_effect=StoreUnavailable('it is locked')))
    busy = CliRunner().invoke(command, arguments)  # is a fault, and no drift
    assert isinstance(busy.exception, RiskError) and 'nothing can be said: it is locked' in str(busy.exception)


@pytest.mark.slow
def test_the_whole_service_is_stopped_by_a_broken_feed(tmp_path, pointer):  # noqa: F811
    rows = raw_rows(500, seed=3)
    with service(tmp_path / 'serving', pointer, window_seconds=2) as running:
        watch = [sys.executable, '-c', 'from riskscore.operate import monitor; monitor()', '--folder', str(running.folder), '--model', str(pointer)]
        env = os.environ | {'RISKSCORE_WINDOW_SECONDS': '2', 'RISKSCORE_LOG_LEVEL': 'warning'}
        process = subprocess.Popen(watch, env=env, stdout=subprocess.PIPE, text=True)
        try:
            client, sent, until = running.client(), 0, time.monotonic() + 60
            while time.monotonic() < until:
                status = client.post('/predict', rows[sent % 500] | {'income': None}).status
                sent += 1
                if status == 503:
                    break
            assert status == 503 and sent > 200
            stop = client.get('/emergency-stop').json
            assert stop['stopped'] and stop['by'] == 'monitor'
            last = eventually(lambda: client.get('/drift-status').json['last'])
            assert last['stop'] and last['broken'] == ['income']
            assert any(a['kind'] == 'stopped' for a in client.get('/alerts?severity=critical').json)
            for line in (b'riskscore_drift_flag 1.0', b'riskscore_alerts{severity="critical"}'):
                eventually(lambda line=line: line in client.get('/metrics').body)
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        assert 'STOPPED' in process.stdout.read()
