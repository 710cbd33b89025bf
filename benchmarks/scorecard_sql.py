"""A scorecard in SQL and in Python: are the points of all rows equal, and how fast is each?

Run: python benchmarks/scorecard_sql.py [rows]     (about a minute for the 307,511 rows of Home Credit's size; DuckDB is tried when installed)

The scorecard is fitted on the first 20,000 synthetic applicants. Python reads typed columns and computes features and points; SQL reads the raw table, with
its codes, flags and nulls, from a file of SQLite or DuckDB. One thread each; the time to fill the database is not counted.
"""
import json
import os
import platform
import sqlite3
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

for name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'ARROW_NUM_THREADS'):
    os.environ.setdefault(name, '1')

import numpy as np  # noqa: E402

from riskscore.calibration import fit_calibration  # noqa: E402
from riskscore.contract import load_contract  # noqa: E402
from riskscore.datasets import read_frames  # noqa: E402
from riskscore.feature_sets import feature  # noqa: E402, F401
from riskscore.features import fit_plan  # noqa: E402
from riskscore.scorecard import fit_card, with_points  # noqa: E402
from riskscore.scorecard_sql import scorecard_sql, sql_features  # noqa: E402
from riskscore.sources import read_raw  # noqa: E402
from riskscore.synthetic import write_home_credit  # noqa: E402

CONTRACT = Path(__file__).resolve().parents[1] / 'data/contracts/home_credit.yaml'


def fitted(frame, contract):
    "A scorecard on the first rows that SQL can compute."
    first = {n: v[:20_000] for n, v in frame.items()}
    plan, bad = fit_plan(contract, [first]), first[contract.target.name]
    matrix = plan.frame(first)
    levels = {i: len(plan.levels[plan.outputs[plan.names[i]].args[0]]) for i in plan.categorical}
    card = fit_card(matrix, bad, SimpleNamespace(names=plan.names, levels=levels, directions=()), {}, only=sql_features(plan, contract))
    return plan, with_points(card.additive, fit_calibration(card.additive.margin(matrix), bad))


def fill(path, csv, contract, execute_many):
    "Copies the raw table: numbers as numbers, everything else as text."
    for batch in read_raw(csv, nulls=contract.nulls, known=contract.columns,
                          numbers=[c.name for c in contract.columns.values() if c.kind in ('number', 'integer')]):
        names = batch.table.schema.names
        execute_many(names, zip(*(column.to_pylist() for column in batch.table.columns), strict=True))


def in_sqlite(path, csv, contract, query):
    base = sqlite3.connect(path)

    def execute_many(names, rows):
        base.execute('CREATE TABLE IF NOT EXISTS applications (' + ', '.join(f'"{n}"' for n in names) + ')')
        base.executemany(f'INSERT INTO applications VALUES ({", ".join("?" * len(names))})', rows)

    fill(path, csv, contract, execute_many)
    base.commit()
    start = time.perf_counter()
    rows = base.execute(query).fetchall()
    return rows, time.perf_counter() - start, sqlite3.sqlite_version


def in_duckdb(path, csv, contract, query):
    import duckdb
    base = duckdb.connect(path)
    base.execute('SET threads = 1')
    kinds = {n: 'DOUBLE' if c.kind in ('number', 'integer') else 'VARCHAR' for n, c in contract.columns.items()}
    columns = ', '.join(f"'{n}': '{kinds[n]}'" for n in csv.open(encoding='utf-8').readline().strip().split(','))
    base.execute(f"CREATE TABLE applications AS SELECT * FROM read_csv('{csv}', header = true, columns = {{{columns}}})")
    start = time.perf_counter()
    rows = base.execute(query).fetchall()
    return rows, time.perf_counter() - start, duckdb.__version__


def main(rows: int) -> int:
    print(f'{rows:,} synthetic applicants, {platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}')
    contract, failed = load_contract(CONTRACT), 0
    with tempfile.TemporaryDirectory() as folder:
        csv = Path(folder) / 'raw.csv'
        write_home_credit(csv, rows, seed=42)
        frames = [b.frame for b in read_frames(csv, contract)]
        frame = {n: np.concatenate([f[n] for f in frames]) for n in frames[0]}
        plan, card = fitted(frame, contract)
        query = scorecard_sql(card, plan, contract, 'applications')
        start = time.perf_counter()
        score = 600 - np.rint((card.margin(plan.frame(frame)) + np.log(50)) / np.log(2) * 20)
        seconds = time.perf_counter() - start
        facts = {'features': len(card.terms), 'characters of SQL': len(query), 'scores': len(np.unique(score))}
        print(json.dumps(facts))
        print(f'{"":<18}{"rows":>10}{"differing":>11}{"seconds":>9}{"rows/s":>12}')
        print(f'{"Python":<18}{rows:>10,}{"":>11}{seconds:>9.2f}{rows / seconds:>12,.0f}')
        for name, run in (('SQLite', in_sqlite), ('DuckDB', in_duckdb)):
            if name == 'DuckDB' and find_spec('duckdb') is None:
                print('DuckDB is not installed')
                continue
            found, seconds, version = run(f'{folder}/{name}.db', csv, contract, query)
            by_id = {row[0]: row[-1] for row in found}
            id_ = frame[contract.id.name]
            different = sum(by_id.get(i) != s for i, s in zip(id_.tolist(), score.tolist(), strict=True))
            failed += different
            print(f'{name + " " + version:<18}{len(found):>10,}{different:>11,}{seconds:>9.2f}{len(found) / seconds:>12,.0f}')
    return int(failed > 0)


if __name__ == '__main__':
    sys.exit(main(int(sys.argv[1]) if sys.argv[1:] else 307_511))
