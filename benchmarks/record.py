"""One application to its pd, in process and on one thread: our record path, the usual scikit-learn pipeline, and LightGBM on a ready row.

    python benchmarks/record.py [--model data/models/champion.json] [--rows 300] [--rounds 5]

Without a model one is trained in a temporary folder (Home Credit sample below RISKSCORE_DATA, or the synthetic table). The pipeline (see
tutorial_service.py) learns from the same table, with as many trees of as many leaves. All paths see the same applications, one after the other, in
rounds in which each path runs once; medians and 99th percentiles are over all rows of all rounds. The ratio is of medians of processor time: on a busy
machine a long call is interrupted more often than a short one, which would flatter us. Before anything is timed, the pd of every row must be, to the
bit, that of Booster.predict with the bundle's calibration. Our path is timed from JSON bytes, from a dict, and from an application that was checked
already; the pipeline begins with a dict that nobody checks, and Booster.predict with features that somebody else has computed.
"""
import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

os.environ.update(OMP_NUM_THREADS='1', OMP_WAIT_POLICY='passive')

import lightgbm as lgb
import numpy as np
import pandas as pd
from tutorial_service import engineered, make_pipeline_of, one_row

import riskscore.feature_sets  # noqa: F401  # the features that the contract names
from riskscore.bundle import Scorer, load_bundle, score_one, write_bundle, write_pointer
from riskscore.calibration import Calibration
from riskscore.contract import Contract, load_contract
from riskscore.datasets import read_frames
from riskscore.fast import FastScorer, Refused
from riskscore.features import fit_plan
from riskscore.policy import fit_policy, judge
from riskscore.reasons import fit_reasons
from riskscore.reference import fit_reference
from riskscore.rows import row_pd
from riskscore.synthetic import write_home_credit
from riskscore.trees import Trees

ROOT = Path(__file__).resolve().parents[1]
CONTRACT = ROOT / 'data' / 'contracts' / 'home_credit.yaml'
TREES, LEAVES, HISTORY = 600, 8, 20_000
PARAMS = {'objective': 'binary', 'num_leaves': LEAVES, 'learning_rate': 0.05, 'num_threads': 1, 'verbosity': -1}


# ---------------------------------------------------------------- tables and model

def home_credit_table(folder: Path, part: str) -> Path:
    "Applications of the real sample, or synthetic ones: train to learn from, test to answer."
    real = Path(os.environ.get('RISKSCORE_DATA', '')) / 'home_credit_sample' / f'application_{part}.csv.gz'
    if real.is_file():
        return real
    path = folder / f'{part}.csv'
    write_home_credit(path, HISTORY, seed=1 if part == 'train' else 2)
    return path


def build(folder: Path) -> Path:
    "A bundle of the usual size; calibration and cut-offs are of the rows it learnt from, which is no matter here: only speed is measured."
    contract = load_contract(CONTRACT)
    frames = [{n: v[~b.bad_rows] for n, v in b.frame.items()} for b in read_frames(home_credit_table(folder, 'train'), contract)]
    plan = fit_plan(contract, frames)
    matrix, bad = np.concatenate([plan.frame(f) for f in frames]), np.concatenate([f[contract.target.name] for f in frames])
    data = lgb.Dataset(matrix, bad, categorical_feature=plan.categorical, params=PARAMS)
    model = Trees('lightgbm', lgb.train(PARAMS, data, TREES).model_to_string())
    calibration = Calibration(0.0, 1.0)
    default = calibration.pd(model.margin(matrix, 1))
    policy = fit_policy(contract, default, np.concatenate([f[contract.amount] for f in frames]))
    approved = matrix[default < policy.approve_below][:2000]
    reasons = fit_reasons(contract, plan, approved, model.contributions(approved, 1))
    history = {name: np.concatenate([f[name] for f in frames]) for name in frames[0]}
    reference = fit_reference(contract, history.__getitem__, default, judge(policy, default, history)[0])  # so that the service counts what it decides
    bundle = write_bundle(folder / 'models', model, plan, calibration, policy, contract, {}, {}, reasons, drift=reference.to_bytes())
    write_pointer(folder / 'champion.json', bundle)
    return folder / 'champion.json'


def size_of(scorer: Scorer) -> tuple[int, int]:
    "Trees of the model, and leaves of the largest."
    booster = scorer.predictor.booster
    return booster.num_trees(), max(tree['num_leaves'] for tree in booster.dump_model()['tree_info'])


def history_of(contract: Contract, folder: Path) -> pd.DataFrame:
    "What the model has learnt from: features and outcome."
    table = pd.read_csv(home_credit_table(folder, 'train'))
    return table[[c.name for c in contract.columns.values() if c.role in ('feature', 'target') and c.name in table]]


def applications_of(fast: FastScorer, folder: Path, rows: int) -> list[dict[str, Any]]:
    "Applications that no contract refuses, each another person, as a client would send them."
    contract, found = fast.scorer.contract, []
    table = pd.read_csv(home_credit_table(folder, 'test'), nrows=rows)
    names = [n for n in table if n in contract.columns and contract.columns[n].role != 'target']
    whole = {n for n in names if contract.columns[n].kind == 'integer'}
    for row in table[names].to_dict('records'):
        application = {n: None if v != v else int(v) if n in whole else v for n, v in row.items()}
        try:
            fast.reader.read(json.dumps(application).encode())
        except Refused:
            continue
        found.append(application)
    return found


# ---------------------------------------------------------------- the measurement

def timed(paths: dict[str, tuple[Callable[[Any], Any], Sequence[Any]]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    "Seconds and processor seconds of each call; each round runs each path over its rows."
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in paths}
    for number in range(rounds + 1):
        for name, (run, rows) in paths.items():
            for row in rows:
                processor, begin = time.thread_time(), time.perf_counter()
                run(row)
                seconds[name].append((time.perf_counter() - begin, time.thread_time() - processor))
            if number == 0:  # warm
                seconds[name].clear()
    return seconds


def shown(seconds: dict[str, list[tuple[float, float]]]) -> Iterator[str]:
    "Lines of a markdown table; the first path is the one that others are compared with."
    yield '| path | median us | p99 us | cpu us | times faster |'
    yield '|---|---:|---:|---:|---:|'
    for name, times in seconds.items():
        walls = [wall for wall, _ in times]
        yield (f'| {name} | {median(walls) * 1e6:,.1f} | {quantiles(walls, n=100)[-1] * 1e6:,.1f} | {median(cpu for _, cpu in times) * 1e6:,.1f} '
               f'| {times_faster(seconds, name):,.0f} |')


def times_faster(seconds: dict[str, list[tuple[float, float]]], name: str) -> float:
    "Processor time of the first path over that of another."
    first, other = (median(cpu for _, cpu in times) for times in (next(iter(seconds.values())), seconds[name]))
    return first / other


def assert_same_features(scorer: Scorer, ours: Any, theirs: pd.DataFrame) -> None:
    "The engineered features of both are the same numbers, up to the last digits of float32."
    for place, name in enumerate(scorer.plan.names):
        if name not in scorer.contract.columns:
            np.testing.assert_allclose(theirs[name].to_numpy(float), ours[:, place], rtol=1e-5, atol=1e-6, err_msg=name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', type=Path, default=ROOT / 'data' / 'models' / 'champion.json', help='pointer or folder of a LightGBM bundle of home_credit')
    parser.add_argument('--rows', type=int, default=300)
    parser.add_argument('--rounds', type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scorer = load_bundle(args.model if args.model.exists() else build(folder))
        fast, (trees, leaves) = FastScorer(scorer), size_of(scorer)
        history, target = history_of(scorer.contract, folder), scorer.contract.target.name
        applications = applications_of(fast, folder, args.rows)
    pipeline, plain = (make_pipeline_of(history, target, trees, leaves, plain=only) for only in (False, True))
    booster = scorer.predictor.booster
    inputs = [{n: a.get(n) for n in history if n != target} for a in applications]
    bodies = [json.dumps(a).encode() for a in applications]
    features = [scorer.plan.record(fast.reader.read(body).typed)[None] for body in bodies]

    checked = [fast.reader.read(body).typed for body in bodies]

    def of_checked(typed: dict[str, Any]) -> float:
        return row_pd(scorer.calibration, scorer.calls[0](scorer.plan.record(typed)))

    def of_bytes(body: bytes) -> float:
        return of_checked(fast.reader.read(body).typed)

    expected = scorer.calibration.pd(booster.predict(np.concatenate(features), raw_score=True, num_threads=1)).tolist()
    assert [of_bytes(body) for body in bodies] == expected, 'the record path does not give what Booster.predict gives'
    assert [of_checked(typed) for typed in checked] == expected, 'a checked application does not give what Booster.predict gives'
    assert [scorer.record(a)['pd'] for a in applications] == expected, 'a dict does not give what Booster.predict gives'
    assert_same_features(scorer, np.concatenate(features), pd.concat([engineered(one_row(a)) for a in inputs]))
    seconds = timed({
        'pipeline: dict, one-row DataFrame, features, predict_proba': (lambda a: pipeline.predict_proba(one_row(a))[0, 1], inputs),
        'pipeline without the engineered features': (lambda a: plain.predict_proba(one_row(a))[0, 1], inputs),
        'record: JSON bytes, read and checked, to pd': (of_bytes, bodies),
        'record: checked application to pd': (of_checked, checked),
        'record: checked application to pd, decision and value': (lambda t: score_one(scorer, t), checked),
        'record: dict to pd, decision and value by `Scorer.record`': (scorer.record, applications),
        'record: JSON bytes to the whole answer, exact reasons': (lambda b: fast.answer(fast.reader.read(b), 'id', 'now').to_json(), bodies),
        'Booster.predict on a ready row': (lambda f: booster.predict(f, num_threads=1)[0], features)}, args.rounds)
    print(f'{len(applications)} applications, {args.rounds} rounds, {trees} trees of {leaves} leaves, {features[0].shape[1]} features; '
          'every pd equals Booster.predict with the calibration, to the bit\n')
    print('\n'.join(shown(seconds)))
    for name in list(seconds)[2:4]:
        times = times_faster(seconds, name)
        print(f'\n{name}: {times:,.0f} times faster than the pipeline; to be at least 150: {"yes" if times >= 150 else "NO"}', end='')
    print()


if __name__ == '__main__':
    main()
