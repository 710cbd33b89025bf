"""Arrivals follow their rate; and whatever happens to service, network or client, each application is answered and stored once.

A real service is killed and started again, and a scripted one misbehaves in all the ways that the network knows.
"""
import asyncio
import datetime as dt
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from running_service import Running, start
from scipy import stats
from service_load import eventually, tables, walk
from small_bundle import applications, small_bundle, small_contract

from riskscore.arrivals import DAY, Calendar, Clock, Spike, arrivals, bank_days
from riskscore.contract import check_frame
from riskscore.core import RiskError
from riskscore.fast import Reader
from riskscore.http_client import KEY_VARIABLE, Address, Answer, Broken, Connection, Patience, _Connected, read_address, retry_after
from riskscore.traffic import Application, Outcome, Sending, bodies, cross_check, key_of, read_answers, send, send_outcomes, service_counts

EAGER = Patience(timeout=5, seconds=30, first_pause=0.02, longest_pause=0.2)


def wanted(rows: int, seed: int = 5) -> list[Application]:
    "Applications of different people."
    found = bodies(small_contract(), {name: np.array(values, object) for name, values in applications(rows, seed, target=False).items()})
    return [Application(f'A{i}', body) for i, body in enumerate(found)]


# ---------------------------------------------------------------- arrivals

CALENDAR = Calendar(per_day=300, spikes=(Spike(2, 50_000, 120, 400),))


def test_times_of_a_day_follow_the_rate():
    days = range(0, 140, 7)  # Mondays
    times = np.concatenate([arrivals(Calendar(per_day=300, pay_days=()), 11, d) for d in days])
    grid = np.linspace(0, DAY, 8641)
    rate = CALENDAR.rate(0, grid)
    reached = np.concatenate([[0], np.cumsum((rate[1:] + rate[:-1]) / 2)])
    assert stats.kstest(times, lambda t: np.interp(t, grid, reached / reached[-1])).pvalue > 0.001


def test_numbers_of_days_are_poisson_and_days_do_not_depend_on_each_other():
    n = np.array([len(arrivals(Calendar(per_day=300, week=(1,) * 7, pay_days=()), 11, d)) for d in range(400)])
    assert abs(n.mean() - 300) < 5 * (300 / 400) ** 0.5
    assert stats.chi2.sf((400 - 1) * n.var(ddof=1) / n.mean(), 399) > 0.001 and stats.chi2.cdf((400 - 1) * n.var(ddof=1) / n.mean(), 399) > 0.001
    assert abs(np.corrcoef(n[1:], n[:-1])[0, 1]) < 0.25


def test_rush_hours_week_ends_pay_days_and_spikes_show():
    by_day = [arrivals(CALENDAR, 3, d) for d in range(56)]
    hours = np.histogram(np.concatenate(by_day), 24, (0, DAY))[0]
    assert hours[10:18].min() > 5 * hours[0:5].max()
    dates = [CALENDAR.date(d) for d in range(56)]
    plain = [(len(times), on.weekday()) for times, on in zip(by_day, dates, strict=True) if on.day not in (1, 15) and on != dates[2]]
    usual = {d: np.mean([n for n, weekday in plain if weekday == d]) for d in (2, 5, 6)}
    assert usual[2] > 1.3 * usual[5] > 1.5 * usual[6]
    assert len(by_day[2]) > usual[2] + 250 and len(by_day[10]) > 1.2 * usual[2]  # day 10 is a Thursday the 15th


@given(st.integers(0, 400), st.integers(0, 2**32), st.integers(1, 5000))
def test_each_applicant_comes_once_and_in_order(days, seed, rows):
    found = list(bank_days(Calendar(per_day=200), seed, rows, min(days, 12)))
    places = [i for day in found for i in range(day.first, day.stop)]
    assert places == list(range(len(places))) and len(places) <= rows
    assert all((np.diff(day.times) >= 0).all() and (len(day.times) == 0 or (day.times[0] >= 0 and day.times[-1] < DAY)) for day in found)


# ---------------------------------------------------------------- bodies

def test_the_service_reads_from_a_body_what_the_frame_holds():
    contract = small_contract()
    frame = check_frame(contract, applications(200, seed=8)).frame
    reader = Reader(contract)
    for i, body in enumerate(bodies(contract, frame)):
        typed, sent = reader.read(body).typed, json.loads(body)
        assert not {'bad', 'arrears'} & set(sent)  # the outcome and a leak stay here
        for name in set(frame) - {'bad', 'arrears'}:
            assert typed[name] == frame[name][i] or typed[name] != typed[name] and frame[name][i] != frame[name][i], name


# ---------------------------------------------------------------- the real service

@pytest.fixture(scope='module')
def model(tmp_path_factory) -> Path:
    small_bundle(folder := tmp_path_factory.mktemp('traffic'))
    return folder / 'champion.json'


def killed_while_it_answers(folder: Path, model: Path, number: int, kills: int, **settings: Any) -> tuple[Running, dict[str, Any], list[Application]]:
    "Sends applications to a service that is killed a few times meanwhile, and started again on the same port."
    running, sent = [start(folder / 'serving', model, **settings)], wanted(number)

    def kill_and_start() -> None:
        for n in range(1, kills + 1):
            eventually(lambda n=n: len(read_answers(folder / 'run.jsonl')) > n * number / (kills + 2))
            running[0].kill()
            running[0] = start(folder / 'serving', model, running[0].port, **settings)

    address = read_address(f'http://127.0.0.1:{running[0].port}', {})
    thread = threading.Thread(target=kill_and_start, daemon=True)
    thread.start()
    summary = asyncio.run(send(address, sent, 'killed', folder / 'run.jsonl', Sending(in_flight=16, patience=EAGER)))
    thread.join(60)
    return running[0], summary, sent


@pytest.fixture(scope='module')
def killed(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp('killed')
    running, summary, sent = killed_while_it_answers(folder, model, 600, 1)
    yield running, summary, sent, folder
    running.kill()


def check_once_each(running: Running, sent: list[Application], run: str, answers: Path) -> None:
    "Client, store and chain agree; each application is stored once."
    found = asyncio.run(cross_check(read_address(f'http://127.0.0.1:{running.port}', {}), answers))
    assert found['agree'] and sum(found['store'].values()) == len(sent), found['words']
    assert {line.key for line in read_answers(answers)} == {key_of(run, a.name) for a in sent}
    assert walk(running.folder).ok
    stored = Counter(json.loads(row['content'])['app'] for row in tables(running.folder)['applications'])
    assert stored == Counter(json.loads(a.body)['app'] for a in sent)


def test_a_service_killed_in_the_middle_loses_and_doubles_nothing(killed):
    running, summary, sent, folder = killed
    assert summary['answered'] == len(sent) and summary['lost'] == 0 and summary['retries'] > 0 and summary['ended'] == 'all were sent'
    check_once_each(running, sent, 'killed', folder / 'run.jsonl')


@pytest.mark.slow
@pytest.mark.parametrize('workers', [1, 2])
def test_a_service_killed_six_times_loses_and_doubles_nothing(tmp_path, model, workers):
    running, summary, sent = killed_while_it_answers(tmp_path, model, 12_000, 6, workers=workers)
    try:
        assert summary['answered'] == len(sent) and summary['retries'] >= 12
        check_once_each(running, sent, 'killed', tmp_path / 'run.jsonl')
    finally:
        running.kill()


def test_what_was_answered_is_never_sent_again(killed):
    running, _, sent, folder = killed
    address = read_address(f'http://127.0.0.1:{running.port}', {})
    before = asyncio.run(service_counts(address))
    again = asyncio.run(send(address, sent, 'killed', folder / 'run.jsonl'))
    assert (again['skipped'], again['sent'], again['answered']) == (len(sent), 0, 0)
    lines = {line.key: line for line in read_answers(folder / 'run.jsonl')}
    (folder / 'lost.jsonl').unlink(missing_ok=True)
    asked = asyncio.run(send(address, sent[:50], 'killed', folder / 'lost.jsonl'))  # as after the file was lost: the service remembers
    assert asked['repeated'] == asked['answered'] == 50
    assert all(line.request_id == lines[line.key].request_id for line in read_answers(folder / 'lost.jsonl'))
    assert asyncio.run(service_counts(address)) == before


CLIENT = '''
import asyncio, sys
from riskscore.traffic import Application, Clock, Patience, Sending, send
from riskscore.http_client import read_address
found = [Application(f'A{i}', body, i * 0.004) for i, body in enumerate(open(sys.argv[3], 'rb').read().splitlines())]
asyncio.run(send(read_address(sys.argv[1], {}), found, 'client', sys.argv[2], Sending(in_flight=16, patience=Patience()), Clock(1)))
'''


def test_a_client_killed_and_resumed_loses_and_doubles_nothing(killed, tmp_path):
    running, path, sent = killed[0], tmp_path / 'client.jsonl', wanted(2000, 6)
    address = read_address(f'http://127.0.0.1:{running.port}', {})
    (tmp_path / 'bodies').write_bytes(b'\n'.join(a.body for a in sent))
    process = subprocess.Popen([sys.executable, '-c', CLIENT, address.url, str(path), str(tmp_path / 'bodies')], stderr=subprocess.PIPE)
    try:
        eventually(lambda: process.poll() is not None or len(read_answers(path)) > 150, 30)
        assert process.poll() is None, process.stderr.read().decode()[-2000:]
        with pytest.raises(RiskError, match='another client'):
            asyncio.run(send(address, [], 'client', path))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    known = {line.key for line in read_answers(path)}
    with open(path, 'ab') as file:
        file.write(b'{"key":"cut o')  # as a power cut would leave it
    keys = {key_of('client', a.name) for a in sent[:len(known) + 200]}
    rest = asyncio.run(send(address, sent[:len(keys)], 'client', path, Sending(patience=EAGER)))
    assert rest['skipped'] == len(known & keys) > 100 and rest['answered'] == len(keys - known) >= 200
    lines = [json.loads(text) for text in path.read_bytes().split(b'\n')[1:] if text.endswith(b'}')]
    assert len(lines) == len({line['key'] for line in lines}) == len(keys | known)
    stored = tables(running.folder)['decisions']
    assert max(Counter(row['idempotency'] for row in stored).values()) == 1
    assert {line['request_id'] for line in lines} <= {row['request_id'] for row in stored}


def test_refusals_stops_and_outcomes(killed, tmp_path):
    running, path = killed[0], tmp_path / 'run.jsonl'
    address, operator = read_address(f'http://127.0.0.1:{running.port}', {}), running.client()
    bad = [Application('bad', b'{"amount": -5, "channel": "web"}'), Application('none', b'nothing')]
    first = asyncio.run(send(address, [*wanted(20, 7), *bad], 'mixed', path, Sending(patience=EAGER)))
    assert first['by_status'] == {'200': 20, '400': 1, '422': 1} and first['retries'] == first['lost'] == 0
    operator.post('/emergency-stop', {'reason': 'a drill'})
    try:
        halted = asyncio.run(send(address, wanted(25, 7), 'mixed', path, Sending(patience=EAGER)))
    finally:
        operator.post('/emergency-stop/resume', {'reason': 'it was a drill'})
    assert halted['skipped'] == 20 and halted['by_status'] == {'503': 5} and halted['by_decision'] == {'refer': 5} and halted['retries'] == 0
    decided = [line for line in read_answers(path) if line.status == 200]
    today = max(line.received_at for line in decided)
    told = [Outcome(line.request_id, i % 2, today) for i, line in enumerate(decided)]
    assert asyncio.run(send_outcomes(address, told, batch=8))['counts'] == {'new': 20}
    again = asyncio.run(send_outcomes(address, [*told, Outcome('0' * 32, 1, today)], batch=8))
    assert again['counts'] == {'unchanged': 20, 'unknown': 1} and again['answered'] == 21 and again['problems'][0].startswith('0' * 32)
    with pytest.raises(RiskError, match='refuses these outcomes: status 422'):
        asyncio.run(send_outcomes(address, [Outcome('r', 2, today)]))


def test_a_cross_check_finds_what_is_missing_different_or_unknown(killed, tmp_path):
    running, path = killed[0], tmp_path / 'run.jsonl'
    address = read_address(f'http://127.0.0.1:{running.port}', {})
    before = asyncio.run(service_counts(address))
    asyncio.run(send(address, wanted(30, 9), 'checked', path, Sending(patience=EAGER)))
    fine = asyncio.run(cross_check(address, path, before))
    assert fine['agree'] and fine['metrics'] == fine['store'] == fine['client'] and sum(fine['client'].values()) == 30
    lines = path.read_text().splitlines()
    first, second = json.loads(lines[1]), json.loads(lines[2])
    first['decision'] = 'approve' if first['decision'] != 'approve' else 'refer'
    made_up = second | {'key': 'k' * 32, 'request_id': 'f' * 32}
    path.write_text('\n'.join([lines[0], *map(json.dumps, (first, made_up)), *lines[3:]]) + '\n')
    wrong = asyncio.run(cross_check(address, path))
    assert not wrong['agree'] and (wrong['missing'], wrong['different'], wrong['others']) == (1, 1, 1)
    assert '1 are missing in the store' in wrong['words']


# ---------------------------------------------------------------- a service that misbehaves

OK = b'{"decision":"approve","request_id":"%d","received_at":"2026-01-05T09:00:00Z"}'
Behave = Callable[[int, dict[str, str], bytes, asyncio.StreamWriter], Awaitable[None]]


def whole(number: int, *more: bytes) -> bytes:
    body = OK % number
    return b'\r\n'.join([b'HTTP/1.1 200 OK', b'Content-Length: %d' % len(body), *more, b'', body])


@asynccontextmanager
async def scripted(behave: Behave, context: ssl.SSLContext | None = None):
    "A service that answers the nth request as it is told; gives its address and what it was asked: when, head, body."
    asked: list[tuple[float, dict[str, str], bytes]] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                lines = (await reader.readuntil(b'\r\n\r\n')).decode().split('\r\n')[1:-2]
                head = dict(line.split(': ', 1) for line in lines)
                body = await reader.readexactly(int(head['Content-Length']))
                asked.append((time.monotonic(), head, body))
                await behave(len(asked) - 1, head, body, writer)
                await writer.drain()
                if writer.is_closing():
                    return
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(talk, '127.0.0.1', 0, ssl=context)
    yield Address('127.0.0.1', server.sockets[0].getsockname()[1], context is not None, ''), asked
    server.close()


def story(behave: Behave, then: Callable[[Address, list[Any]], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with scripted(behave) as (address, asked):
            return await then(address, asked)
    return asyncio.run(run())


def through(behave: Behave, folder: Path, number: int = 6, **sending: Any) -> tuple[dict[str, Any], list[Any]]:
    "Sends some applications through a service that misbehaves; gives the summary, and what the service was asked."
    given = {'in_flight': 2, 'patience': EAGER} | sending
    async def then(address, asked):
        found = await send(address, [Application(str(i), b'{"n":%d}' % i) for i in range(number)], 'odd', folder / 'odd.jsonl', Sending(**given))
        return found, asked
    return story(behave, then)


def tries(asked: list[Any]) -> dict[bytes, list[tuple[float, str]]]:
    "When each body came, and with which key."
    found: dict[bytes, list[tuple[float, str]]] = {}
    for at, head, body in asked:
        found.setdefault(body, []).append((at, head['Idempotency-Key']))
    return found


async def at_first_broken(n, head, body, writer, how):
    writer.write(whole(n)) if n else how(writer)


FAULTS: dict[str, Callable[[asyncio.StreamWriter], Any]] = {
    'closed without a word': lambda w: w.close(),
    'reset': lambda w: w.transport.abort(),
    'half of an answer': lambda w: (w.write(whole(0)[:-9]), w.close()),
    'half of a head': lambda w: (w.write(b'HTTP/1.1 200 OK\r\nContent-Le'), w.close()),
    'not HTTP': lambda w: w.write(b'SSH-2.0-OpenSSH_9.2\r\n'),
    'a chunk cut off': lambda w: (w.write(b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n20\r\n{"dec'), w.close()),
    'two lengths': lambda w: w.write(b'HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}'),
    'an upgrade': lambda w: w.write(b'HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n'),
    'an endless head': lambda w: w.write(b'HTTP/1.1 200 OK\r\n' + b'X: y\r\n' * 12_000),
    'silence': lambda w: None,
    'a gateway without a service': lambda w: w.write(b'HTTP/1.1 502 Bad Gateway\r\nContent-Length: 4\r\n\r\nsad!'),
    'a fault': lambda w: (w.write(b'HTTP/1.1 500 Oh\r\nConnection: close\r\n\r\n<html>'), w.close()),
}


@pytest.mark.parametrize('name', FAULTS)
def test_an_answer_that_is_none_is_asked_for_again_with_the_same_key(name, tmp_path):
    patience = Patience(timeout=0.3 if name == 'silence' else 10, seconds=60, first_pause=0.01, longest_pause=0.1)
    found, asked = through(lambda *given: at_first_broken(*given, FAULTS[name]), tmp_path, patience=patience, in_flight=1)
    assert found['answered'] == 6 and found['lost'] == 0 and found['retries'] >= 1
    assert found['retries'] == 1 == len(asked) - 6 or name == 'silence'  # on a busy machine an answer may be later than that
    times = tries(asked)
    assert len(times) == 6 and len(times[asked[0][2]]) >= 2 and all(len({key for _, key in found}) == 1 for found in times.values())
    assert len({head['Idempotency-Key'] for _, head, _ in asked}) == 6
    assert all(line.status == 200 for line in read_answers(tmp_path / 'odd.jsonl'))


def test_the_pause_is_at_least_what_the_service_asks_for(tmp_path):
    async def busy(n, head, body, writer):
        writer.write(b'HTTP/1.1 503 Busy\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n' if n < 3 else whole(n))
    found, asked = through(busy, tmp_path, 3, in_flight=3)
    assert found['retries'] == 3 and found['answered'] == 3 and found['connections'] == 3
    assert all(len(times) == 2 and times[1][0] - times[0][0] >= 1 and times[0][1] == times[1][1] for times in tries(asked).values())


def test_pauses_grow_and_differ(tmp_path):
    async def down(n, head, body, writer):
        writer.write(b'HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n')
    chances: list[float] = []
    class Noting(Patience):
        def pause(self, tries: int, chance: float, least: float = 0.0) -> float:
            chances.append(chance)
            return super().pause(tries, chance, least)
    found, asked = through(down, tmp_path, 2, patience=Noting(first_pause=0.02, longest_pause=10, seconds=0.8))
    assert found['lost'] == 2 and found['answered'] == 0 and found['ended'].startswith('the service gave no answer')
    pauses = [[b - a for (a, _), (b, _) in pairwise(times)] for times in tries(asked).values()]
    for one in pauses:
        assert len(one) >= 3 and all(pause >= 0.01 * 2 ** i for i, pause in enumerate(one))
    assert found['retries'] == len(asked) - 2 and len(chances) == len(set(chances)) == len(asked) and 0 <= min(chances) < max(chances) < 1
    assert [line.answered for line in read_answers(tmp_path / 'odd.jsonl')] == [False, False]


def test_what_is_lost_is_sent_by_the_next_run(tmp_path):
    async def poison(n, head, body, writer):
        writer.write(b'HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n' if body == b'{"n":2}' else whole(n))
    found, _ = through(poison, tmp_path, 400, patience=Patience(seconds=0.2, first_pause=0.02))
    assert (found['answered'], found['lost'], found['ended']) == (399, 1, 'all were sent')
    async def well(n, head, body, writer):
        writer.write(whole(n))
    again, asked = through(well, tmp_path, 400)
    assert (again['skipped'], again['answered']) == (399, 1) and [body for *_, body in asked] == [b'{"n":2}']


def test_a_service_that_is_gone_ends_the_run_and_not_after_each_application_anew(tmp_path):
    address = Address('127.0.0.1', 9, False, '')
    taken = count()
    endless = (Application(str(i), b'{}') for i in taken)
    short = Sending(in_flight=4, queue=10, patience=Patience(seconds=0.3, first_pause=0.05))
    found = asyncio.run(send(address, endless, 'gone', tmp_path / 'gone.jsonl', short))
    assert found['ended'].startswith('the service gave no answer') and found['answered'] == 0
    assert 4 <= found['lost'] <= 8 and found['lost'] + found['unsent'] <= next(taken) <= 30


def test_never_more_are_under_way_than_allowed_and_the_queue_is_bounded(tmp_path):
    state = {'now': 0, 'most': 0, 'answered': 0, 'ahead': 0}
    async def slow(n, head, body, writer):
        state['now'] += 1
        state['most'] = max(state['most'], state['now'])
        await asyncio.sleep(0.003)
        state['now'] -= 1
        state['answered'] += 1
        writer.write(whole(n))
    def stream():
        for i in range(400):
            state['ahead'] = max(state['ahead'], i + 1 - state['answered'])
            yield Application(str(i), b'{}')
    async def then(address, asked):
        return await send(address, stream(), 'bounded', tmp_path / 'b.jsonl', Sending(in_flight=7, queue=5, patience=EAGER))
    found = story(slow, then)
    assert found['answered'] == 400 and found['connections'] == 7
    assert state['most'] == 7 and state['ahead'] <= 7 + 5 + 1


def test_a_run_is_bounded_in_time_and_number(tmp_path):
    async def slow(n, head, body, writer):
        await asyncio.sleep(0.02)
        writer.write(whole(n))
    endless = (Application(str(i), b'{}') for i in count())
    async def then(address, asked):
        first = await send(address, endless, 'bounds', tmp_path / 'b.jsonl', Sending(in_flight=3, seconds=0.2, patience=EAGER))
        second = await send(address, endless, 'bounds', tmp_path / 'b.jsonl', Sending(in_flight=3, number=11, patience=EAGER))
        late = await send(address, (Application(f'x{i}', b'{}', i * 3600.0) for i in count()), 'bounds', tmp_path / 'b.jsonl',
                          Sending(in_flight=3, seconds=0.3, patience=EAGER), Clock(1))
        return first, second, late, len(asked)
    first, second, late, asked = story(slow, then)
    assert first['ended'] == 'the time is over' and first['answered'] == first['sent'] > 3 and first['lost'] == 0
    assert second['ended'] == 'the number is reached' and second['answered'] == 11
    assert late['ended'] == 'the time is over' and late['answered'] == 1 and asked == first['answered'] + 11 + 1


def test_applications_are_sent_at_their_times(tmp_path):
    async def well(n, head, body, writer):
        writer.write(whole(n))
    async def then(address, asked):
        begun = time.monotonic()
        found = await send(address, [Application(str(i), b'%d' % i, DAY + i * 360.0) for i in range(5)], 'timed', tmp_path / 't.jsonl',
                           clock=Clock(3600, start=DAY))
        return found, [at - begun for at, *_ in asked], [body for *_, body in asked]
    found, times, order = story(well, then)
    assert order == [b'0', b'1', b'2', b'3', b'4'] and all(at >= 0.1 * i for i, at in enumerate(times)) and found['late_ms']['max'] >= 0


def test_a_resumed_run_does_not_wait_for_what_was_sent_before(tmp_path):
    async def well(n, head, body, writer):
        writer.write(whole(n))
    async def then(address, asked):
        days = [Application(str(i), b'{}', 2.0 * DAY + i * 0.01) for i in range(4)]
        await send(address, days[:3], 'resumed', tmp_path / 'r.jsonl')
        async with asyncio.timeout(20):  # from the beginning it would be two days
            return await send(address, [*days, Application('4', b'{}', 2.0 * DAY + 0.1)], 'resumed', tmp_path / 'r.jsonl', clock=Clock(1))
    found = story(well, then)
    assert (found['skipped'], found['answered']) == (3, 2)


def test_bytes_that_nobody_asked_for_are_no_answer_to_the_next_request():
    async def twice(n, head, body, writer):
        writer.write(whole(n) + (whole(666) if n == 0 else b''))
    async def late(n, head, body, writer):
        writer.write(whole(n))
        await writer.drain()
        if n == 0:
            await asyncio.sleep(0.02)
            writer.write(whole(666))
    async def then(address, asked):
        connection = Connection(address)
        found = []
        for _ in range(3):
            found.append((await connection.ask('POST', '/predict', b'{}')).json['request_id'])
            async with asyncio.timeout(10):
                while len(asked) == 1 and connection.wire.open:
                    await asyncio.sleep(0.01)
        connection.close()
        return found, connection.opened
    for behave in (twice, late):
        assert story(behave, then) == (['0', '1', '2'], 2)


def test_a_late_answer_is_no_answer_to_the_next_request():
    async def slow(n, head, body, writer):
        await asyncio.sleep(0.2 if body in (b'0', b'1') else 0)
        writer.write(whole(int(body)))
    async def then(address, asked):
        connection, found = Connection(address), []
        with pytest.raises(Broken, match='within 0.1'):
            await connection.ask('POST', '/predict', b'0', timeout=0.1)
        found.append((await connection.ask('POST', '/predict', b'2')).json['request_id'])
        task = asyncio.create_task(connection.ask('POST', '/predict', b'1'))
        async with asyncio.timeout(10):
            while asked[-1][2] != b'1':
                await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        found.append((await connection.ask('POST', '/predict', b'3')).json['request_id'])
        connection.close()
        return found
    assert story(slow, then) == ['2', '3']


class _Transport:
    def abort(self) -> None:
        pass

    def write(self, data: bytes) -> None:
        pass


def test_a_long_answer_may_come_at_once_or_in_pieces_and_has_a_limit(monkeypatch):
    monkeypatch.setattr('riskscore.http_client._MOST_BODY', 10**6)
    async def long(n, head, body, writer):
        size = int(body)
        writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n' % size + b'x' * size)
    async def then(address, asked):
        connection = Connection(address)
        for size in (0, 60_000, 70_000, 300_000, 900_000):
            assert len((await connection.ask('POST', '/', b'%d' % size)).body) == size
        with pytest.raises(Broken, match='too long'):
            await connection.ask('POST', '/', b'9000000')
        return connection.opened
    assert story(long, then) == 1
    async def run():
        wire = _Connected()
        wire.connection_made(_Transport())
        waiter = wire.ask(b'')
        wire.data_received(b'HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n' + b'x' * 300_000)  # in one piece for sure
        return len((await waiter).body)
    assert asyncio.run(run()) == 300_000


@given(st.data(), st.lists(st.binary(max_size=40), min_size=1, max_size=4), st.sampled_from(['length', 'chunks', 'end']))
def test_an_answer_is_the_same_however_it_is_cut(data, parts, form):
    head = {'length': b'Content-Length: %d\r\n' % len(b''.join(parts)), 'chunks': b'Transfer-Encoding: chunked\r\n', 'end': b''}[form]
    body = b''.join(parts) if form != 'chunks' else b''.join(b'%x\r\n%s\r\n' % (len(p), p) for p in parts if p) + b'0\r\n\r\n'
    text = b'HTTP/1.1 207 Some\r\nX-One: a b\r\n' + head + b'\r\n' + body
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    async def run():
        wire = _Connected()
        wire.connection_made(_Transport())
        waiter = wire.ask(b'')
        for a, b in pairwise([0, *places, len(text)]):
            if a < b:
                wire.data_received(text[a:b])
        if form == 'end':
            wire.connection_lost(None)
        return await asyncio.wait_for(waiter, 5), wire.open
    answer, still_open = asyncio.run(run())
    assert (answer.status, answer.headers['x-one'], answer.body, still_open) == (207, 'a b', b''.join(parts), form != 'end')


# ---------------------------------------------------------------- keys and certificates

def test_the_key_is_sent_and_is_nowhere_else_and_a_wrong_one_ends_the_run(tmp_path, caplog):
    async def locked(n, head, body, writer):
        right = head.get('Authorization') == 'Bearer open-sesame'
        writer.write(whole(n) if right else b'HTTP/1.1 401 No\r\nContent-Length: 25\r\n\r\n{"detail":"Send the key"}')
    async def then(address, asked):
        good = read_address(address.url, {KEY_VARIABLE: 'open-sesame'})
        found = await send(good, [Application('1', b'{}')], 'keys', tmp_path / 'k.jsonl')
        endless = (Application(str(i), b'{}') for i in count(2))
        with pytest.raises(RiskError, match='status 401, Send the key'):
            await send(read_address(address.url, {KEY_VARIABLE: 'close-sesame'}), endless, 'keys', tmp_path / 'k.jsonl')
        return json.dumps(found) + repr(good) + (tmp_path / 'k.jsonl').read_text(), len(asked)
    text, asked = story(locked, then)
    assert 'sesame' not in text + caplog.text and asked <= 1 + Sending().in_flight
    assert len(read_answers(tmp_path / 'k.jsonl')) == 1 and (tmp_path / 'k.jsonl').stat().st_mode & 0o077 == 0


@pytest.mark.parametrize('status', [301, 302, 404])
def test_another_address_ends_the_run_and_is_not_followed(status, tmp_path):
    async def elsewhere(n, head, body, writer):
        writer.write(b'HTTP/1.1 %d Go\r\nLocation: http://elsewhere.example/\r\nContent-Length: 0\r\n\r\n' % status)
    with pytest.raises(RiskError, match=f'takes nothing from this client: status {status}'):
        through(elsewhere, tmp_path)


def certificate(folder: Path, name: str) -> ssl.SSLContext:
    "A certificate for this machine, signed by itself; its file is `name`.pem."
    x509 = pytest.importorskip('cryptography.x509')
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    import ipaddress

    key, subject = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    made = (x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key()).serial_number(1)
            .not_valid_before(now - dt.timedelta(1)).not_valid_after(now + dt.timedelta(1))
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address('127.0.0.1'))]), False).sign(key, hashes.SHA256()))
    (folder / f'{name}.pem').write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / f'{name}.key').write_bytes(private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / f'{name}.pem', folder / f'{name}.key')
    return context


def test_a_certificate_that_nobody_trusts_is_refused_at_once_and_a_trusted_one_taken(tmp_path, monkeypatch):
    async def well(n, head, body, writer):
        writer.write(whole(n))
    async def run():
        async with scripted(well, certificate(tmp_path, 'own')) as (address, asked):
            with pytest.raises(RiskError, match='not trusted'):
                await send(address, [Application('1', b'{}')], 'tls', tmp_path / 't.jsonl')
            assert not asked
            monkeypatch.setenv('SSL_CERT_FILE', str(tmp_path / 'own.pem'))
            assert (await send(address, [Application('1', b'{}')], 'tls', tmp_path / 't.jsonl'))['answered'] == 1
            with pytest.raises(RiskError, match='not trusted'):  # another name than the certificate's
                await Connection(Address('localhost', address.port, True, '')).ask('GET', '/')
    asyncio.run(run())


# ---------------------------------------------------------------- small things

def test_progress_ends_with_all(tmp_path):
    async def well(n, head, body, writer):
        writer.write(whole(n))
    told: list[tuple[int, int | None]] = []
    async def then(address, asked):
        await send(address, [Application(str(i), b'{}') for i in range(300)], 'p', tmp_path / 'p.jsonl', progress=lambda *n: told.append(n))
        await send(address, iter([Application('x', b'{}')]), 'p', tmp_path / 'p.jsonl', progress=lambda *n: told.append(n), total=7)
    story(well, then)
    first = [n for n, total in told if total == 300]
    assert told[-1] == (1, 7) and first[-1] == 300 and first == sorted(first)


def test_a_cancelled_run_closes_its_file_and_leaves_no_task(tmp_path):
    async def silent(n, head, body, writer):
        await asyncio.sleep(5)
    async def then(address, asked):
        task = asyncio.create_task(send(address, [Application(str(i), b'{}') for i in range(50)], 'c', tmp_path / 'c.jsonl'))
        while len(asked) < 5:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        left = [t for t in asyncio.all_tasks() if t.get_coro().__qualname__ in ('_work', '_feed', 'send')]
        assert not left and read_answers(tmp_path / 'c.jsonl') == []
        found = await send(address, [], 'c', tmp_path / 'c.jsonl')  # the file is free again
        assert found['answered'] == 0
    story(silent, then)


def test_a_full_disk_ends_the_run_and_is_said(tmp_path, monkeypatch):
    async def well(n, head, body, writer):
        writer.write(whole(n))
    write = os.write
    monkeypatch.setattr('riskscore.traffic.os.write', lambda file, text: write(file, text[:9] if b'"key"' in text else text))
    with pytest.raises(RiskError, match='disk is full'):
        through(well, tmp_path, 3)
    monkeypatch.undo()
    assert read_answers(tmp_path / 'odd.jsonl') == []
    assert through(well, tmp_path, 3)[0]['answered'] == 3


def test_the_service_may_ask_for_patience_by_a_date():
    moment = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=90)
    for text in (moment.strftime('%a, %d %b %Y %H:%M:%S GMT'), moment.strftime('%A, %d-%b-%y %H:%M:%S GMT')):
        assert 0 < retry_after(Answer(429, {'retry-after': text}, b'')) <= 90
    for text in ('tomorrow', '', '-5', '1e9', 'Fri, 99 Foo 2026'):
        assert retry_after(Answer(429, {'retry-after': text}, b'')) == 0
