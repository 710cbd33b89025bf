"""Skew: real rows sent over HTTP get the answer of the batch path, the same pd to the last bit or the same refusal."""
import csv
import gzip
import json
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from running_service import service
from test_skew import plain_rows, tiny_scorer

from riskscore.batch import score_batch
from riskscore.bundle import write_bundle
from riskscore.contract import load_contract
from riskscore.datasets import read_frames
from riskscore.feature_sets import feature  # noqa: F401  # declares the features that contracts name
from riskscore.features import fit_plan

FILES = {'home_credit': ('home_credit', 'home_credit_sample/application_train.csv.gz'), 'future': ('home_credit', 'home_credit_sample/application_test.csv.gz'),
         'taiwan': ('taiwan', 'taiwan/UCI_Credit_Card.csv'), 'pi_m5': ('pi_m5', 'pi_m5/Base_de_datos.xlsx')}


def bundle_of(name: str, real_data: Path, root: Path, folder: Path) -> Path:
    "A small model over all features of a contract, learnt from a real table."
    contract = load_contract(root / f'data/contracts/{name}.yaml')
    frames = [b.frame for b in read_frames(real_data / FILES[name][1], contract)]
    frame = {n: np.concatenate([f[n] for f in frames]) for n in contract.columns}
    plan = fit_plan(contract, [frame])
    some = {n: v[:3000] for n, v in frame.items()}
    made = tiny_scorer(contract, plan, plan.frame(some))
    return write_bundle(folder, made.predictor, plan, made.calibration, made.policy, contract, {}, {})


def by_batch(path: Path, bundle: Path, folder: Path, rows: int) -> tuple[list, list]:
    "pd and decision of each row of a file, None where the row was set aside."
    out = folder / 'answers.parquet'
    run = score_batch(path, bundle, out, 1, None)
    with open(run.rejected_out, newline='', encoding='utf-8') as file:
        refused = {int(row['row']) for row in csv.DictReader(file)}
    table = pq.ParquetFile(out).read(['pd', 'decision'])
    told = iter(zip(table.column('pd').to_pylist(), table.column('decision').to_pylist(), strict=True))
    answers = [None if i in refused else next(told) for i in range(1, rows + 1)]
    assert next(told, None) is None
    return answers, sorted(refused)


def ask_all(running, records: list[dict], places: range) -> dict[int, tuple | None]:
    "Asks for each record, on four connections."
    found: dict[int, tuple | None] = {}

    def work(mine):
        client = running.client()
        for i in mine:
            record = {n: None if v != v else v for n, v in records[i].items()}  # a file may say `nan` for null, which JSON cannot
            body = json.dumps(record, default=str, allow_nan=False).encode()
            told = client.post('/predict?purpose=backtest&explain=false', body, Content_Type='application/json')
            assert told.status in (200, 422), told
            found[i] = (told.json['pd'], told.json['decision']) if told.status == 200 else None
        client.close()

    threads = [threading.Thread(target=work, args=(list(places)[k::4],)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def one_by_one(which: str, every: int, real_data: Path, root: Path, folder: Path) -> int:
    name, file = FILES[which]
    bundle, records = bundle_of(name, real_data, root, folder), plain_rows(real_data / file)
    expected, _ = by_batch(real_data / file, bundle, folder, len(records))
    with service(folder / 'serving', bundle) as running:
        found = ask_all(running, records, range(0, len(records), every))
    different = [i for i, answer in found.items() if answer != expected[i]]
    assert len(found) == len(range(0, len(records), every)) and different == []
    return len(found)


def test_some_rows(real_data, root, tmp_path):
    assert one_by_one('pi_m5', 20, real_data, root, tmp_path) > 500


@pytest.mark.slow
@pytest.mark.parametrize('which', FILES)
def test_all_rows(which, real_data, root, tmp_path):
    assert one_by_one(which, 1, real_data, root, tmp_path) > 10_000


def whole_file(which: str, real_data: Path, root: Path, folder: Path) -> int:
    name, file = FILES[which]
    path = real_data / file
    bundle = bundle_of(name, real_data, root, folder)
    body = (gzip.open if path.suffix == '.gz' else open)(path, 'rb').read()
    with service(folder / 'serving', bundle, max_batch_bytes=10**9) as running:
        told = running.client(timeout=600).post('/predict_batch?format=ndjson', body, Content_Type='text/csv')
    assert told.status == 200, told
    results = [json.loads(line) for line in told.body.splitlines()]
    expected, refused = by_batch(path, bundle, folder, len(results))
    assert [(r['pd'], r['decision']) if r['status'] == 'scored' else None for r in results] == expected
    assert [r['row'] for r in results if r['status'] == 'refused'] == refused
    return len(results)


def test_a_whole_file_as_a_batch(real_data, root, tmp_path):
    assert whole_file('taiwan', real_data, root, tmp_path) == 30_000


@pytest.mark.slow
@pytest.mark.parametrize('which', ['home_credit', 'future'])
def test_large_files_as_batches(which, real_data, root, tmp_path):
    assert whole_file(which, real_data, root, tmp_path) > 30_000
