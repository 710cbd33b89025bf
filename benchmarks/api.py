"""The scoring service, a no-op of the same server, and the usual tutorial service: requests a second and latencies under wrk.

    python benchmarks/api.py [--model data/models/champion.json] [--duration 5] [--rounds 3] [--connections 1,16,64]

One machine, one model size, one worker each. Ours is `riskscore serve` in a temporary folder: SQLite on disk, every answer durable before it leaves. The no-ops
(noop.py) are endpoints of the same process that take the same requests and answer `{}`: a route of FastAPI, and one that stands before FastAPI as /predict
does, which no service can beat. The tutorial service (tutorial_service.py) has a model of the same table and features, as many
trees of as many leaves, and one without the engineered features; it keeps no log. Both processes stand still but for the one that
is measured, and all modes take turns in rounds, because
machines are shared: figures are medians of the rounds, ratios are medians of ratios within a round, and `cpu us` is the server's own processor time per
answer. wrk sends thousands of different applications in turn; nothing is cached between them. After every run the store must hold a row for each answer
with status 200, and at the end `riskscore verify` must find the chain whole.
"""
import argparse
import http.client
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from record import ROOT, applications_of, build, history_of, size_of

from riskscore.bundle import load_bundle
from riskscore.fast import FastScorer

HERE = Path(__file__).resolve().parent
OURS, TUTORIAL = 8765, 8766  # ports
APPLICATIONS, BATCH = 5_000, 5_000
PROCESSES: dict[int, int] = {}  # port to the process that listens there


class Mode(NamedTuple):
    "What is asked of a server."

    name: str
    port: int
    path: str
    table: str | None = None  # where each answer has a row


DURABLE = Mode('riskscore: score, durable log', OURS, '/predict?explain=false', 'decisions')
REASONS = Mode('riskscore: score, exact reasons, durable log', OURS, '/predict', 'decisions')
WHAT_IF = Mode('riskscore: score, what_if, no decision log', OURS, '/predict?purpose=what_if&explain=false', 'trials')
NOOP = Mode('no-op of the same server, a route of FastAPI', OURS, '/noop')
BARE = Mode('no-op of the same server, before FastAPI', OURS, '/noop-bare')
USUAL = Mode('tutorial: score, no log', TUTORIAL, '/predict')
PLAIN = Mode('tutorial without engineered features: score, no log', TUTORIAL, '/predict_plain')
SHAP = Mode('tutorial: score and shap, no log', TUTORIAL, '/predict_explain')
MODES = (DURABLE, REASONS, WHAT_IF, NOOP, BARE, USUAL, PLAIN, SHAP)


@dataclass
class Run:
    "What wrk measured."

    rate: float  # answers with status 200 a second
    p50: float  # milliseconds
    p99: float
    p999: float
    cpu: float  # microseconds of the server's processor time per answer
    refused: int  # answers with another status
    broken: int  # connections that failed
    unstored: str = ''  # what is wrong with the store


# ---------------------------------------------------------------- servers

@contextmanager
def server(name: str, command: list[str], environment: dict[str, str], folder: Path, port: int, ready: str) -> Iterator[subprocess.Popen[bytes]]:
    "A process that answers; ended at the end."
    log = folder / f'{name}.log'
    with open(log, 'wb') as file, subprocess.Popen(command, env={**os.environ, **environment}, cwd=ROOT, stdout=file, stderr=file) as process:
        try:
            PROCESSES[port] = process.pid
            for _ in range(1200):
                if process.poll() is not None:
                    raise SystemExit(f'{name} did not start:\n{log.read_text()[-3000:]}')
                if status_of(port, 'GET', ready) == 200:
                    break
                time.sleep(0.1)
            else:
                raise SystemExit(f'{name} did not answer within two minutes:\n{log.read_text()[-3000:]}')
            yield process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def status_of(port: int, method: str, path: str, body: bytes | None = None) -> int:
    "The status of one request; 0 when nobody answers."
    try:
        with closing(http.client.HTTPConnection('127.0.0.1', port, timeout=30)) as connection:
            connection.request(method, path, body, {'Content-Type': 'application/json'} if body else {})
            return connection.getresponse().status
    except OSError:
        return 0


# ---------------------------------------------------------------- one run

def rows_in(store: Path, table: str | None) -> int:
    "Rows of a table of the store; 0 for a mode that keeps none."
    if table is None:
        return 0
    with closing(sqlite3.connect(f'file:{store}?mode=ro', uri=True)) as connection:
        return int(connection.execute(f'select count(*) from {table}').fetchone()[0])


def processor_seconds(port: int) -> float:
    "Processor time that the server on a port has used so far; unlike its rate it hardly depends on what else the machine does."
    fields = Path(f'/proc/{PROCESSES[port]}/stat').read_text().rpartition(')')[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


def drive(mode: Mode, connections: int, seconds: float, applications: Path, store: Path) -> Run:
    "Loads one server, and compares its answers with its store."
    before, spent = rows_in(store, mode.table), processor_seconds(mode.port)
    command = ['wrk', '-t1', f'-c{connections}', f'-d{seconds}s', '--timeout', '30s', '-s', str(HERE / 'applications.lua'),
               f'http://127.0.0.1:{mode.port}{mode.path}', '--', str(applications)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    line = next((text for text in said.stdout.splitlines() if text.startswith('RESULT ')), None)
    if line is None:
        raise SystemExit(f'wrk failed: {said.stdout}{said.stderr}')
    found = json.loads(line.removeprefix('RESULT '))
    answered = found['requests'] - found['refused']
    spent = processor_seconds(mode.port) - spent
    time.sleep(0.5)
    stored = rows_in(store, mode.table) - before
    # When its time is over wrk hangs up. At most one request of each connection is then with the server, which stores it as it should; wrk does not count it.
    wrong = mode.table is not None and not answered <= stored <= answered + connections
    return Run(answered / found['seconds'], found['p50'], found['p99'], found['p999'], spent / max(1, answered) * 1e6, found['refused'], found['broken'],
               f'{answered:,} answers and {stored:,} rows' if wrong else '')


def upload(bodies: list[str], purpose: str, store: Path) -> tuple[float, str]:
    "Rows a second of a batch of JSON lines; what is wrong with its results."
    before, data, begin = rows_in(store, 'decisions'), '\n'.join(bodies).encode(), time.perf_counter()
    with closing(http.client.HTTPConnection('127.0.0.1', OURS, timeout=600)) as connection:
        connection.request('POST', f'/predict_batch?purpose={purpose}', data, {'Content-Type': 'application/x-ndjson'})
        answer = connection.getresponse()
        lines = answer.read().splitlines()
    rate, scored = len(bodies) / (time.perf_counter() - begin), sum(json.loads(line).get('status') == 'scored' for line in lines)
    stored = rows_in(store, 'decisions') - before
    wrong = [f'status {answer.status}'] if answer.status != 200 else []
    wrong += [f'{scored:,} of {len(bodies):,} rows scored'] if scored != len(bodies) else []
    wrong += [f'{stored:,} rows stored'] if stored != (len(bodies) if purpose == 'decision' else 0) else []
    return rate, '; '.join(wrong)


def verify(folder: Path) -> tuple[str, bool]:
    "What `riskscore verify` says of the log."
    command = [sys.executable, '-c', 'from riskscore.cli import main; main()', 'verify', '--folder', str(folder)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    return f'riskscore verify: {" ".join((said.stdout + said.stderr).split())[:300]}', said.returncode == 0


# ---------------------------------------------------------------- results

def table_of(runs: dict[tuple[Mode, int], list[Run]]) -> Iterator[str]:
    "Lines of a markdown table, medians of rounds."
    yield '| mode | connections | req/s | p50 ms | p99 ms | p99.9 ms | cpu us | stored |'
    yield '|---|---:|---:|---:|---:|---:|---:|---|'
    for (mode, connections), found in runs.items():
        figures = [median(getattr(run, what) for run in found) for what in ('rate', 'p50', 'p99', 'p999', 'cpu')]
        faults = [run.unstored for run in found if run.unstored] + [f'{run.refused} refused, {run.broken} broken' for run in found if run.refused or run.broken]
        kept = '; '.join(faults) or ('every answer' if mode.table else '')
        yield f'| {mode.name} | {connections} | {figures[0]:,.0f} | {figures[1]:.2f} | {figures[2]:.2f} | {figures[3]:.2f} | {figures[4]:,.0f} | {kept} |'


def ratio(runs: dict[tuple[Mode, int], list[Run]], one: Mode, other: Mode, connections: int) -> tuple[float, float]:
    "How many times the rate of another mode, and how many times the answers per second of processor time; medians over rounds."
    pairs = list(zip(runs[one, connections], runs[other, connections], strict=True))
    return median(a.rate / max(b.rate, 1e-9) for a, b in pairs), median(b.cpu / max(a.cpu, 1e-9) for a, b in pairs)


def verdicts(runs: dict[tuple[Mode, int], list[Run]], middle: int, least: int) -> Iterator[tuple[str, bool]]:
    "What is promised, and whether it holds."
    def p99(mode: Mode, connections: int) -> float:
        return median(run.p99 for run in runs[mode, connections])

    log, reasons = f'score with durable log, {middle} connections', f'score with exact reasons, {middle} connections'
    times, by_cpu = ratio(runs, DURABLE, USUAL, middle)
    plain = ratio(runs, DURABLE, PLAIN, middle)[0]
    yield (f'{log}: {times:.1f} times the tutorial service (at least 30; by processor time {by_cpu:.1f}; '
           f'{plain:.1f} times one that does not compute the engineered features)'), times >= 30
    share, bare = ratio(runs, DURABLE, NOOP, middle)[0], ratio(runs, DURABLE, BARE, middle)[0]
    yield f'{log}: {share:.0%} of the no-op (at least 35%; of the one before FastAPI {bare:.0%})', share >= 0.35
    yield f'{log}: p99 {p99(DURABLE, middle):.2f} ms (under 10)', p99(DURABLE, middle) < 10
    times, by_cpu = ratio(runs, REASONS, SHAP, middle)
    yield f'{reasons}: {times:.1f} times tutorial + shap (at least 4; by processor time {by_cpu:.1f})', times >= 4
    yield f'score with exact reasons, {least} connection: p99 {p99(REASONS, least):.2f} ms (under 8)', p99(REASONS, least) < 8
    yield 'every answer is in the store', not any(run.unstored for found in runs.values() for run in found)


def write_inputs(model: Path, folder: Path) -> tuple[list[str], str, tuple[int, int]]:
    "Applications for wrk and the tutorial's table in a folder; gives the applications, the outcome column, trees and leaves."
    scorer = load_bundle(model)
    bodies = [json.dumps(a, separators=(',', ':')) for a in applications_of(FastScorer(scorer), folder, APPLICATIONS)]
    (folder / 'applications.jsonl').write_text('\n'.join(bodies) + '\n')
    history_of(scorer.contract, folder).to_csv(folder / 'history.csv', index=False)
    return bodies, scorer.contract.target.name, size_of(scorer)


def measure(args: argparse.Namespace, folder: Path, counts: list[int], bodies: list[str]) -> tuple[dict[Any, list[Run]], dict[str, Any]]:
    "All rounds, and the batches."
    runs: dict[tuple[Mode, int], list[Run]] = {(mode, c): [] for c in counts for mode in MODES}
    batches: dict[str, list[tuple[float, str]]] = {'backtest': [], 'decision': []}
    applications, store = folder / 'applications.jsonl', folder / 'serving' / 'riskscore.db'
    for mode in MODES:
        drive(mode, counts[-1], 1, applications, store)  # warm
    for number in range(args.rounds):
        for (mode, connections), found in runs.items():
            print(f'round {number + 1} of {args.rounds}: {mode.name}, {connections} connections', file=sys.stderr)
            found.append(drive(mode, connections, args.duration, applications, store))
        for purpose, done in batches.items():
            done.append(upload((bodies * (BATCH // len(bodies) + 1))[:BATCH], purpose, store))
    return runs, batches


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', type=Path, default=ROOT / 'data' / 'models' / 'champion.json',
                        help='pointer or folder of a LightGBM bundle of home_credit; one is trained when it is not there')
    parser.add_argument('--duration', type=int, default=5, help='seconds of one run')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--connections', default='1,16,64')
    parser.add_argument('--folder', help='where the temporary folder with the store lies; on a disk')
    args = parser.parse_args()
    if shutil.which('wrk') is None:
        raise SystemExit('This benchmark needs wrk, https://github.com/wg/wrk: apt-get install wrk')
    counts = [int(text) for text in args.connections.split(',')]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=args.folder)))
        model = args.model.resolve() if args.model.exists() else build(folder)
        bodies, target, (trees, leaves) = write_inputs(model, folder)
        ours = {'RISKSCORE_MODEL': str(model), 'RISKSCORE_FOLDER': str(folder / 'serving'), 'RISKSCORE_PORT': str(OURS), 'RISKSCORE_WORKERS': '1',
                'RISKSCORE_LOG_LEVEL': 'warning'}
        serve = [sys.executable, str(HERE / 'noop.py')]
        usual = [sys.executable, str(HERE / 'tutorial_service.py'), str(folder / 'history.csv'), target, '--trees', str(trees), '--leaves', str(leaves),
                 '--port', str(TUTORIAL)]
        stack.enter_context(server('riskscore', serve, ours, folder, OURS, '/readyz'))
        stack.enter_context(server('tutorial', usual, {'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'passive'}, folder, TUTORIAL, '/openapi.json'))
        disk = subprocess.run(['stat', '-f', '-c', '%T', folder], capture_output=True, text=True, check=False).stdout.strip()
        runs, batches = measure(args, folder, counts, bodies)
        verified = verify(folder / 'serving')
    print(f'{len(bodies):,} applications, {trees} trees of {leaves} leaves, one worker, {os.cpu_count()} processors, store on {disk}, '
          f'medians of {args.rounds} rounds of {args.duration} s\n')
    print('\n'.join(table_of(runs)))
    for purpose, done in batches.items():
        faults = '; '.join(fault for _, fault in done if fault)
        print(f'\nbatch of {BATCH:,} JSON lines, purpose {purpose}: {median(rate for rate, _ in done):,.0f} rows/s {faults}', end='')
    print('\n')
    held = [*verdicts(runs, 16 if 16 in counts else counts[-1], counts[0]), verified]
    print('\n'.join(f'{"yes" if holds else "NO "} {text}' for text, holds in held))
    return 0 if all(holds for _, holds in held) and not any(fault for done in batches.values() for _, fault in done) else 1


if __name__ == '__main__':
    sys.exit(main())
