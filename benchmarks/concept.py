"""How soon matured outcomes show that a relation has changed, and how often a sound model is accused when somebody looks after every outcome.

Run: RISKSCORE_DATA=../shared/data python benchmarks/concept.py [streams] [outcomes after the change]     (about two minutes with 200 and 8,000)

For each data set a LightGBM is trained and calibrated, and streams are drawn (with replacement, seeded) from the approved among applications that it has not seen: only the approved have
outcomes. After 2,000 calm outcomes the world changes. On the synthetic Home Credit the true pd of everybody is known, and outcomes are drawn from it; on taiwan outcomes of the
calm world are drawn from the calibrated pd of a second model, fitted on the applications that the first has not seen. Changes: the level of all log-odds; their spread (around their mean); the effect that the model
gives to a column, turned around. "At the edge" is a world that is as wrong as the tolerance allows, everywhere: no alarm is wanted.

Side by side, on the same streams and after every outcome from the 30th on: the z-test of observed against expected bads, and the chi-square test over ten bins of the
pd (Hosmer and Lemeshow), both at p < 0.01. And the label-free estimate of AUC and bad rate after the change, beside what then is true.
"""
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

for name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'ARROW_NUM_THREADS'):
    os.environ.setdefault(name, '1')

import lightgbm as lgb  # noqa: E402
import numpy as np  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

import riskscore.feature_sets  # noqa: E402, F401
from riskscore.anytime import CalibrationTest, RankingTest  # noqa: E402
from riskscore.bundle import load_bundle, write_bundle  # noqa: E402
from riskscore.calibration import fit_calibration, sigmoid  # noqa: E402
from riskscore.contract import load_contract  # noqa: E402
from riskscore.core import frame_rows  # noqa: E402
from riskscore.datasets import read_frames  # noqa: E402
from riskscore.features import fit_plan  # noqa: E402
from riskscore.money import column_parts  # noqa: E402
from riskscore.performance import estimate_performance, pd_histogram, performance_reference  # noqa: E402
from riskscore.policy import fit_policy  # noqa: E402
from riskscore.synthetic import write_home_credit  # noqa: E402
from riskscore.trees import Trees  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
CALM, WATCHED = 2000, 12


@dataclass
class World:
    "The approved whom the model has not seen."
    name: str
    log_odds: np.ndarray  # the model's
    true: np.ndarray  # log-odds of the calm world
    columns: list
    parts: np.ndarray
    reference: dict
    cut: float


def logit(p):
    p = np.clip(p, 1e-6, 1 - 1e-6)
    return np.log(p / (1 - p))


def take(frame, rows):
    return {name: values[rows] for name, values in frame.items()}


def fit(plan, frame, bad, seed=1):
    data = lgb.Dataset(plan.frame(frame), bad, categorical_feature=plan.categorical, params={'verbosity': -1})
    settings = {'objective': 'binary', 'learning_rate': 0.06, 'num_leaves': 15, 'min_data_in_leaf': 50, 'feature_fraction': 0.3, 'lambda_l2': 10,
                'cat_smooth': 50, 'verbosity': -1, 'num_threads': 1, 'seed': seed}
    return Trees('lightgbm', lgb.train(settings, data, 120).model_to_string())


def world(name, source, contract, folder, truth=None):
    "Trains on half, calibrates on a quarter of it, and keeps the approved of the other half."
    frames = [b.frame for b in read_frames(source, contract)]
    frame = {n: np.concatenate([f[n] for f in frames]) for n in frames[0]}
    order = np.random.default_rng(0).permutation(frame_rows(frame))
    learn, unseen = np.split(order, [len(order) // 2])
    history, future, bad = take(frame, learn), take(frame, unseen), frame[contract.target.name]
    plan, held = fit_plan(contract, [history]), len(learn) * 3 // 4
    model = fit(plan, take(history, slice(0, held)), bad[learn[:held]])
    margin = model.margin(plan.frame(take(history, slice(held, None))))
    calibration = fit_calibration(margin, bad[learn[held:]])
    pd = calibration.pd(margin)
    policy = fit_policy(contract, pd, history[contract.amount][held:])
    scorer = load_bundle(write_bundle(folder, model, plan, calibration, policy, contract, {}, {}))
    reference = performance_reference(pd, bad[learn[held:]])
    approved = scorer.frame(future)['decision'] == 'approve'
    future, unseen = take(future, approved), unseen[approved]
    columns, parts, log_odds = column_parts(scorer, future)
    chosen = np.argsort(-parts.std(axis=0), kind='stable')[:WATCHED]
    if truth is None:
        second = fit(plan, take(frame, unseen), bad[unseen], seed=2)
        true = logit(fit_calibration(second.margin(plan.frame(future)), bad[unseen]).pd(second.margin(plan.frame(future))))
        true = log_odds + np.clip(true - log_odds, -0.3, 0.3)  # what the first model could not know, within reason
    else:
        true = logit(truth[unseen])
    return World(name, log_odds, true, [columns[i] for i in chosen], parts[:, chosen] - parts[:, chosen].mean(axis=0), reference, policy.approve_below)


def changes(w):
    "Name, log-odds of the changed world, and whether an alarm is wanted."
    middle = w.log_odds.mean()
    yield 'no change, pds are true', w.log_odds, False
    yield 'no change, the world as it is', w.true, False
    yield 'at the edge of the tolerance', w.log_odds + 0.2, False
    yield 'level + 0.4', w.true + 0.4, True
    yield 'level + 0.7 (odds double)', w.true + 0.7, True
    yield 'spread halved', w.true - 0.5 * (w.log_odds - middle), True
    yield 'order reversed', w.true - 2 * (w.log_odds - middle), True
    for i in range(3):
        yield f'{w.columns[i]} reversed', w.true - 2 * w.parts[:, i], True
    yield f'{w.columns[0]} without effect', w.true - w.parts[:, 0], True


def stream(w, true, wanted, streams, after, seed):
    "Alarms of the tests and of the naive ones, as numbers of outcomes; 0: none."
    rng = np.random.default_rng(seed)
    calm = w.log_odds if not wanted and true is w.log_odds else w.true if wanted else true
    test = CalibrationTest(0.005, 0.2, w.columns, (streams,))
    edges = np.quantile(sigmoid(w.log_odds), np.linspace(0, 1, 11)[1:-1])
    sums, naive = np.zeros((4, streams)), {'z': np.zeros(streams, dtype=int), 'chi2': np.zeros(streams, dtype=int)}
    bins = np.zeros((3, streams, 10))
    rows, bads = np.empty((CALM + after, streams), dtype=int), np.empty((CALM + after, streams))
    for n in range(CALM + after):
        at = rows[n] = rng.integers(0, len(w.log_odds), streams)
        pd = sigmoid(w.log_odds[at])
        bad = bads[n] = rng.random(streams) < sigmoid((calm if n < CALM else true)[at])
        test.add(pd[None], bad[None], w.parts[at][None])
        sums += np.stack([bad - pd, pd * (1 - pd), pd, bad])
        place = np.searchsorted(edges, pd)
        for kind, value in enumerate((bad - pd, pd * (1 - pd), 1)):
            bins[kind][np.arange(streams), place] += value
        if n >= 29:
            hit = {'z': np.abs(sums[0]) > 2.5758 * np.sqrt(sums[1]), 'chi2': (bins[0]**2 / np.maximum(bins[1], 1e-9)).sum(axis=1) > 23.209}
            for kind, fired in hit.items():
                naive[kind] = np.where((naive[kind] == 0) & fired, n + 1, naive[kind])
    return test.course.alarm_at, naive, order_alarms(w, rows, bads, min(streams, 40)), truly(w, rows, bads)


def order_alarms(w, rows, bads, streams):
    "Alarms of the ranking test; some streams, as it runs them one by one."
    expected = estimate_performance(w.reference, pd_histogram(w.reference, sigmoid(w.log_odds)))['auc']
    found = []
    for s in range(streams):
        test, pd = RankingTest(0.005, 0.03), sigmoid(w.log_odds[rows[:, s]])
        for start in range(0, len(pd), 250):
            test.add(pd[start:start + 250], bads[start:start + 250, s], expected)
            if test.course.alarm_at:
                break
        found.append(min(start + 250, len(pd)) if test.course.alarm_at else 0)
    return np.array(found)


def truly(w, rows, bads):
    "AUC and bad rate after the change, estimated without outcomes and true."
    at, bad = rows[CALM:].ravel()[:200_000], bads[CALM:].ravel()[:200_000]
    pd = sigmoid(w.log_odds[at])
    now = performance_reference(pd, bad)
    estimate = estimate_performance(w.reference, pd_histogram(w.reference, pd))
    goods, hits = np.array(now['goods']), np.array(now['bads'])
    return estimate['auc'], (hits * (goods.cumsum() - goods / 2)).sum() / (goods.sum() * hits.sum()), estimate['bad_rate'], bad.mean()


def delays(alarms, wanted):
    "Early alarms, and median and 90% of the delay."
    early = (alarms > 0) & (alarms <= CALM) if wanted else alarms > 0
    if not wanted:
        return f'{early.mean():6.1%} {"":>17}'
    delay = np.where(alarms > CALM, alarms - CALM, np.inf)[~early] if (~early).any() else np.array([np.inf])
    told = ['never' if np.isinf(q) else f'{q:,.0f}' for q in np.quantile(delay, [0.5, 0.9], method='higher')]
    return f'{early.mean():6.1%} {told[0]:>8} {told[1]:>8}'


def main(streams=200, after=8000):
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / 'applications.parquet'
        write_home_credit(source, 40_000, seed=7, truth_path=Path(folder) / 'truth.parquet')
        truth = pq.ParquetFile(Path(folder) / 'truth.parquet').read()['true_pd'].to_numpy()
        worlds = [world('synthetic Home Credit', source, load_contract(ROOT / 'data/contracts/home_credit.yaml'), folder, truth)]
        if 'RISKSCORE_DATA' in os.environ:
            taiwan = Path(os.environ['RISKSCORE_DATA']) / 'taiwan/UCI_Credit_Card.csv'
            worlds.append(world('taiwan', taiwan, load_contract(ROOT / 'data/contracts/taiwan.yaml'), folder))
    for w in worlds:
        begin = time.perf_counter()
        print(f'\n{w.name}: {len(w.log_odds):,} approved (pd below {w.cut:.3f}), mean pd {sigmoid(w.log_odds).mean():.2%}, bad rate {sigmoid(w.true).mean():.2%}, '
              f'|true - predicted log-odds| {np.abs(w.true - w.log_odds).mean():.2f} on average; {streams} streams, {CALM:,} + {after:,} outcomes, e >= 200 each')
        print(f'{"early = alarms before the change":37} {"calibration e-test":>24}  {"ranking e-test (40)":>24}  {"z after each":>24}  {"chi2 after each":>24}   AUC est. true   bads est.  true')
        for number, (name, true, wanted) in enumerate(changes(w)):
            ours, naive, order, told = stream(w, true, wanted, streams, after, number)
            print(f'{name:37} {delays(ours, wanted)}  {delays(order, wanted)}  {delays(naive["z"], wanted)}  {delays(naive["chi2"], wanted)}   '
                  f'{told[0]:8.3f} {told[1]:.3f}   {told[2]:8.2%} {told[3]:.2%}', flush=True)
        print(f'{time.perf_counter() - begin:.0f} s')


if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
