"""Ingest against pandas: seconds and peak memory at 307,511 and 4 x 307,511 rows of synthetic Home Credit, in one run.

    python benchmarks/ingest.py [--rows 307511] [--repeats 3] [--folder /tmp/ingest-benchmark]

Each measurement is a fresh process that imports, reads and writes; the order of the candidates turns from repeat to repeat, so
that a change in the machine's load meets all of them. Ours also holds every value against the contract, looks for repeated ids
and digests what came in and what went out; pandas does none of that. Both run in one thread.
"""
import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OURS, READ, STORE = 'riskscore ingest to typed Parquet', 'pandas read_csv whole', 'pandas read_csv whole, to_parquet'
CODE = {
    OURS: '''
from riskscore.contract import load_contract
from riskscore.ingest import ingest
ingest(source, load_contract(contract), out)
assert 'pandas' not in sys.modules
''',
    READ: '''
import pandas
pandas.read_csv(source)
''',
    STORE: '''
import pandas
pandas.read_csv(source).to_parquet(out)
'''}
PEAK = '''
print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))
'''


def measure(name: str, source: Path, folder: Path) -> tuple[float, float, float]:
    "Seconds, peak megabytes and CPU seconds of a fresh process."
    contract = ROOT / 'data' / 'contracts' / 'home_credit.yaml'
    head = f'import sys\nsource, contract, out = {str(source)!r}, {str(contract)!r}, {str(folder / "out" / "table.parquet")!r}\n'
    (folder / 'out').mkdir(exist_ok=True)
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, '-c', head + CODE[name] + PEAK], capture_output=True, text=True, cwd=ROOT)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f'{name} failed:\n{done.stderr}')
    return seconds, int(done.stdout) / 1024, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def candidates(repeat: int) -> list[str]:
    "The candidates, beginning with another one each time."
    names = list(CODE)
    return names[repeat % len(names):] + names[:repeat % len(names)]


def compare(source: Path, repeats: int, folder: Path) -> dict[str, tuple[float, ...]]:
    "Median seconds, megabytes and CPU seconds of each candidate."
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in CODE}
    for repeat in range(repeats):
        for name in candidates(repeat):
            found[name].append(measure(name, source, folder))
    return {name: tuple(map(statistics.median, zip(*values, strict=True))) for name, values in found.items()}


def make(path: Path, rows: int) -> None:
    "A synthetic table; one that is there is used again."
    if not path.exists():
        from riskscore.synthetic import write_home_credit
        print(f'making {rows:,} synthetic rows ...', file=sys.stderr)
        write_home_credit(path, rows=rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', type=int, default=307_511)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--folder', type=Path, default=Path(tempfile.gettempdir()) / 'riskscore-ingest-benchmark')
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    results = {}
    for rows in (given.rows, 4 * given.rows):
        source = given.folder / f'{rows}.csv'
        make(source, rows)
        results[rows] = compare(source, given.repeats, given.folder)
    one, four = results.values()
    print(f'median of {given.repeats} fresh processes; CSV of {given.rows:,} and {4 * given.rows:,} rows, 122 columns\n')
    print(f'{"":36}{"seconds":>9}{"CPU s":>8}{"MB":>7}{"seconds 4x":>13}{"CPU s 4x":>10}{"MB 4x":>7}{"MB 4x / 1x":>13}')
    for name in CODE:
        (seconds, peak, cpu), (seconds4, peak4, cpu4) = one[name], four[name]
        print(f'{name:36}{seconds:9.2f}{cpu:8.2f}{peak:7.0f}{seconds4:13.2f}{cpu4:10.2f}{peak4:7.0f}{peak4 / peak:13.2f}')
    print()
    for label, ratio, limit in (
            ('peak memory at 4x over 1x', four[OURS][1] / one[OURS][1], 1.1),
            ('peak memory over pandas read_csv', one[OURS][1] / one[READ][1], 0.25),
            ('time over pandas read_csv, 1x', one[OURS][0] / one[READ][0], 1.0),
            ('time over pandas read_csv, 4x', four[OURS][0] / four[READ][0], 1.0),
            ('time over pandas read_csv and to_parquet, 1x', one[OURS][0] / one[STORE][0], 1.0)):
        print(f'{label:46}{ratio:6.2f}   at most {limit:.2f}   {"met" if ratio <= limit else "NOT MET"}')


if __name__ == '__main__':
    main()
