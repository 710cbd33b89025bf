"""20,000 applicants over HTTP: client, service and store on one machine, each answer durable, and every count compared.

    python benchmarks/traffic.py [--rows 20000] [--model data/models/champion.json] [--in-flight 16] [--paced 60] [--no-reasons]

The applicants are the first of the real Home Credit test file below RISKSCORE_DATA that no contract refuses, else synthetic ones; the model is the one
given, or one of the usual size is trained. `riskscore serve` runs with one worker in a temporary folder, SQLite on disk; the client (riskscore.traffic) is
this process. The first run sends as fast as the service answers, so that its latencies are those of a queue of --in-flight. With --paced the same
applicants come a second time over so many seconds as ten days of the bank, with rush hours: `late` says how long an application waited for its turn. At
the end the client's file, the service's metrics and the store must agree request by request, and `riskscore verify` must find the chain whole. `cpu us` is
processor time per application: machines are shared, and it depends least on what else they do.
"""
import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import uvloop
from api import OURS, processor_seconds, rows_in, server, verify
from record import ROOT, build, home_credit_table

from riskscore.arrivals import DAY, Calendar, Clock, bank_days, spread
from riskscore.bundle import load_bundle
from riskscore.contract import Contract
from riskscore.datasets import read_frames
from riskscore.http_client import Address, read_address
from riskscore.traffic import Application, Sending, bodies, cross_check, send, service_counts

DAYS = 10  # of the bank in the paced run


def applicants(contract: Contract, folder: Path) -> Iterator[bytes]:
    "Bodies of applications that the contract takes."
    for batch in read_frames(home_credit_table(folder, 'test'), contract):
        yield from bodies(contract, {name: values[~batch.bad_rows] for name, values in batch.frame.items()})


def run(address: Address, found: list[Application], name: str, folder: Path, sending: Sending, clock: Clock | None = None) -> dict[str, Any]:
    "Sends applications once; what came of it, with the processor time of both sides and whether all counts agree."
    client, service = time.process_time(), processor_seconds(OURS)

    async def story() -> dict[str, Any]:
        before = await service_counts(address)
        summary = await send(address, found, name, folder / f'{name}.jsonl', sending, clock)
        spent = (time.process_time() - client) / len(found), (processor_seconds(OURS) - service) / len(found)
        return summary | {'cpu': spent, 'check': await cross_check(address, folder / f'{name}.jsonl', before)}

    return uvloop.run(story())


def shown(runs: dict[str, dict[str, Any]]) -> Iterator[str]:
    "Lines of a table."
    yield '| run | seconds | applications/s | p50 ms | p95 | p99 | max | late p99 ms | retries | lost | client cpu us | service cpu us |'
    yield '|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|'
    for name, s in runs.items():
        late = f'{s["late_ms"]["p99"]:.1f}' if s['late_ms'] else '-'
        times = ' | '.join(f'{s["latency_ms"][k]:.1f}' for k in ('p50', 'p95', 'p99', 'max'))
        yield (f'| {name} | {s["seconds"]:.1f} | {s["per_second"]:,.0f} | {times} | {late} | {s["retries"]} | {s["lost"]} '
               f'| {s["cpu"][0] * 1e6:.0f} | {s["cpu"][1] * 1e6:.0f} |')


def verdicts(runs: dict[str, dict[str, Any]], rows: int, stored: int) -> Iterator[tuple[str, bool]]:
    "What must hold."
    for name, s in runs.items():
        answered = f'{name}: {s["answered"]:,} of {rows:,} answered with {s["by_status"]}, decisions {s["by_decision"]}'
        yield answered + (f', tried again for {s["failures"]}' if s['failures'] else ''), s['answered'] == rows == s['by_status'].get('200') and s['lost'] == 0
        yield f'{name}: {s["check"]["words"]}', s['check']['agree'] and sum(s['check']['metrics'].values()) == rows
    yield f'rows in the store: {stored:,}', stored == rows * len(runs)
    first = next(iter(runs.values()))
    seconds = first['seconds'] * 20_000 / rows
    yield f'20,000 applications as fast as possible: {seconds:.1f} seconds (under 60)', seconds < 60


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', type=int, default=20_000)
    parser.add_argument('--model', type=Path, default=ROOT / 'data' / 'models' / 'champion.json', help='pointer or folder of a bundle of home_credit')
    parser.add_argument('--in-flight', type=int, default=16)
    parser.add_argument('--paced', type=float, default=0, help='seconds of a second run, at the times of a bank; 0: none')
    parser.add_argument('--no-reasons', action='store_true', help='ask for answers without reasons')
    parser.add_argument('--folder', help='where the temporary folder with the store lies; on a disk')
    args = parser.parse_args()
    sending = Sending(args.in_flight, explain=not args.no_reasons)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=args.folder)))
        model = args.model.resolve() if args.model.exists() else build(folder)
        contract = load_bundle(model).contract
        made = list(islice(applicants(contract, folder), args.rows))
        found = [Application(str(i), body) for i, body in enumerate(made)]
        serving = folder / 'serving'
        settings = {'RISKSCORE_MODEL': str(model), 'RISKSCORE_FOLDER': str(serving), 'RISKSCORE_PORT': str(OURS), 'RISKSCORE_WORKERS': '1',
                    'RISKSCORE_LOG_LEVEL': 'warning'}
        stack.enter_context(server('riskscore', [sys.executable, '-c', 'from riskscore.cli import main; main()', 'serve'], settings, folder, OURS, '/readyz'))
        address = read_address(f'http://127.0.0.1:{OURS}', {})
        runs = {'as fast as possible': run(address, found, 'fast', folder, sending)}
        if args.paced:
            bank = bank_days(spread(Calendar(), len(found), DAYS), seed=1, rows=len(found))
            times = [day.day * DAY + at for day in bank for at in day.times]
            paced = [a._replace(at=float(at)) for a, at in zip(found, times, strict=True)]
            runs[f'{DAYS} days of a bank in {args.paced:.0f} s'] = run(address, paced, 'paced', folder, sending, Clock(times[-1] / args.paced))
        stored = rows_in(serving / 'riskscore.db', 'decisions')
        disk = subprocess.run(['stat', '-f', '-c', '%T', folder], capture_output=True, text=True, check=False).stdout.strip()
        held = [*verdicts(runs, len(found), stored), verify(serving)]
    size = sum(map(len, made)) / len(made)
    print(f'{len(found):,} applications of {size:,.0f} bytes of {contract.name}, {args.in_flight} in flight, with{"out" * args.no_reasons} reasons, '
          f'one worker, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}, store on {disk}\n')
    print('\n'.join(shown(runs)) + '\n')
    print('\n'.join(f'{"yes" if holds else "NO "} {text}' for text, holds in held))
    return 0 if all(holds for _, holds in held) else 1


if __name__ == '__main__':
    sys.exit(main())
