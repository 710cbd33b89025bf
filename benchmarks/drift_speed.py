"""How long does the drift of a day take, 120 columns, 280,000 rows of history against 20,000 of now? Beside Evidently and NannyML in the same run.

Run: python benchmarks/drift_speed.py --peers FOLDER [--rows 280000 20000]

FOLDER holds the environment of the other tools, and is made when it is missing (see drift_accuracy.py). Each tool runs in a process of its own, one thread,
that reads the same Parquet files. Time with the reference ready is counting and judging for ours (the first call of a process), calculate for NannyML, and
the whole run for Evidently, which keeps no reference. Memory is the peak of the process (VmHWM).
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

for name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'ARROW_NUM_THREADS', 'NUMBA_NUM_THREADS', 'MKL_NUM_THREADS'):
    os.environ[name] = '1'

NUMBERS, CATEGORIES = 104, 16


def write_tables(folder, rows):
    "History and the day, as Parquet with dictionaries for categories."
    import numpy as np
    from pyarrow import array, parquet, table
    for seed, (part, size) in enumerate(zip(('history', 'day'), rows, strict=True)):
        rng, columns = np.random.default_rng(seed), {}
        for i in range(NUMBERS):
            values = rng.lognormal(9, 1 + i / NUMBERS, size)
            values = np.round(values, -2) if i % 4 == 0 else values
            columns[f'number {i}'] = array(np.where(rng.random(size) < (i % 3) * 0.2, np.nan, values), from_pandas=True)
        for i in range(CATEGORIES):
            levels = np.array([f'level {j}' for j in range(2 + 4 * i)])
            columns[f'category {i}'] = array(levels[(len(levels) * rng.random(size) ** 2).astype(int)]).dictionary_encode()
        parquet.write_table(table(columns), folder / f'{part}.parquet')


def contract():
    "What ours has to know of the columns."
    from riskscore.contract import Column, Contract
    columns = [Column(f'number {i}') for i in range(NUMBERS)] + [Column(f'category {i}', 'category') for i in range(CATEGORIES)]
    return Contract('speed', {c.name: c for c in columns})


def peak():
    "Largest memory of this process in MB."
    status = dict(line.split(':', 1) for line in Path('/proc/self/status').read_text().splitlines())
    return int(status['VmHWM'].split()[0]) / 1024


# ---------------------------------------------------------------- each in a process of its own

def fit_ours(folder):
    "Freezes the reference, a column at a time."
    from pyarrow import parquet

    from riskscore.datasets import arrow_frame
    from riskscore.reference import fit_reference
    watched, started = contract(), time.perf_counter()
    with parquet.ParquetFile(folder / 'history.parquet') as file:
        reference = fit_reference(watched, lambda name: arrow_frame(file.read([name]), watched)[name])
    data = reference.to_bytes()
    (folder / 'reference').write_bytes(data)
    return {'work': time.perf_counter() - started, 'bytes': len(data)}


def judge_ours(folder):
    "The daily process."
    from pyarrow import parquet

    from riskscore.datasets import arrow_frame
    from riskscore.drift import count_frame, judge_drift
    from riskscore.reference import reference_from_bytes
    started = time.perf_counter()
    reference = reference_from_bytes((folder / 'reference').read_bytes())
    ready = time.perf_counter()
    with parquet.ParquetFile(folder / 'day.parquet') as file:
        frame = arrow_frame(file.read(), contract())
    read = time.perf_counter()
    counts = count_frame(reference, frame)
    counted = time.perf_counter()
    verdict = judge_drift(reference, counts)
    judged = time.perf_counter()
    merges = []
    for _ in range(50):
        merge = time.perf_counter()
        counts + counts
        merges.append(time.perf_counter() - merge)
    loaded = [m for m in ('pandas', 'pyarrow.dataset', 'scipy') if m in sys.modules]
    return {'work': judged - read, 'count': counted - read, 'judge': judged - counted, 'reading': read - ready, 'loading': ready - started,
            'merge': statistics.median(merges), 'columns': verdict['watched'], 'loaded': loaded}


def judge_evidently(folder):
    import pandas as pd
    from evidently import Report
    from evidently.presets import DataDriftPreset
    history, day = (pd.read_parquet(folder / f'{part}.parquet') for part in ('history', 'day'))
    started = time.perf_counter()
    snapshot = Report([DataDriftPreset()]).run(day, history).dict()
    return {'work': time.perf_counter() - started, 'columns': len(snapshot['metrics']) - 1}


def judge_nannyml(folder):
    import pandas as pd
    from nannyml import UnivariateDriftCalculator
    history, day = (pd.read_parquet(folder / f'{part}.parquet') for part in ('history', 'day'))
    started = time.perf_counter()
    methods = {'continuous_methods': ['jensen_shannon'], 'categorical_methods': ['jensen_shannon']}
    calculator = UnivariateDriftCalculator(column_names=list(history), **methods).fit(history)
    fitted = time.perf_counter()
    calculator.calculate(day)
    return {'work': time.perf_counter() - fitted, 'fit': fitted - started}


TASKS = {f.__name__: f for f in (fit_ours, judge_ours, judge_evidently, judge_nannyml)}


def run(python, task, folder):
    "Runs one task in a process; its figures with the time and memory of the whole process."
    environment = {**os.environ, 'NML_DISABLE_USAGE_LOGGING': '1', 'DO_NOT_TRACK': '1'}
    started = time.perf_counter()
    done = subprocess.run([python, '-W', 'ignore', __file__, '--task', task, folder], check=True, env=environment, capture_output=True, text=True)
    return {'wall': time.perf_counter() - started, **json.loads(done.stdout.splitlines()[-1])}


def middle(results):
    "The median of each number of several runs."
    return {k: statistics.median(r[k] for r in results) if isinstance(v, float) else v for k, v in results[0].items()}


def lines(found):
    "The table, line by line."
    ours, evidently, nannyml = found['judge_ours'], found['judge_evidently'], found['judge_nannyml']
    yield '| 120 columns | riskscore | Evidently | NannyML | ratio | target |\n|---|---|---|---|---|---|'
    ratio = f"{evidently['work'] / ours['work']:.0f} and {nannyml['work'] / ours['work']:.1f} times faster"
    yield f"| reference ready | {ours['work']:.4f} s | {evidently['work']:.2f} s | {nannyml['work']:.3f} s | {ratio} | 200 and 8 times |"
    ratio = f"1/{evidently['wall'] / ours['wall']:.0f} of Evidently's"
    yield f"| whole cold process | {ours['wall']:.3f} s | {evidently['wall']:.1f} s | {nannyml['wall']:.1f} s | {ratio} | 1/50 |"
    ratio = f"1/{evidently['peak'] / ours['peak']:.1f} of Evidently's"
    yield f"| peak memory | {ours['peak']:.0f} MB | {evidently['peak']:,.0f} MB | {nannyml['peak']:,.0f} MB | {ratio} | 1/8 |"
    yield f"| merging two windows | {ours['merge'] * 1000:.3f} ms | | | | 1 ms |"
    fit = found['fit_ours']
    yield f"| fitting the reference, once | {fit['work']:.2f} s, {fit['peak']:.0f} MB, {fit['bytes'] / 1000:.0f} KB | | {nannyml['fit']:.2f} s | | 1 MB |"
    parts = ', '.join(f'{part} {ours[part] * 1000:.1f}' for part in ('loading', 'reading', 'count', 'judge'))
    yield f"\nOurs in ms: {parts}; imported beside: {', '.join(ours['loaded']) or 'neither pandas, pyarrow.dataset nor scipy'}."


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--peers')
    parser.add_argument('--rows', type=int, nargs=2, default=(280_000, 20_000))
    parser.add_argument('--task', nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.task:
        figures = TASKS[given.task[0]](Path(given.task[1]))
        print(json.dumps(figures | {'peak': peak()}))
        return
    if not given.peers:
        sys.exit('Name a folder for the environment of the other tools: --peers FOLDER.')
    from drift_accuracy import make_environment
    python = make_environment(given.peers)
    with tempfile.TemporaryDirectory() as place:
        write_tables(Path(place), given.rows)
        found = {'fit_ours': run(sys.executable, 'fit_ours', place)}
        found['judge_ours'] = middle([run(sys.executable, 'judge_ours', place) for _ in range(7)])
        found |= {task: run(python, task, place) for task in ('judge_nannyml', 'judge_evidently')}
    print('\n'.join(lines(found)))


if __name__ == '__main__':
    main()
