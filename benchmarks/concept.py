"""How soon matured outcomes show that a relation has changed, and how often a sound model is accused when somebody looks after every outcome.

Run: RISKSCORE_DATA=../shared/data python benchmarks/concept.py [streams] [outcomes after the change] [tolerance]     (some minutes with 200 and 10,000)

For each data set a LightGBM is trained and calibrated, and streams are drawn (with replacement, seeded) from the approved among applications that
it has not seen: only the approved have outcomes. After 2,000 calm outcomes the world changes. On the synthetic Home Credit the true pd of everybody
is known and outcomes are drawn from it; on taiwan the outcomes are the real ones.

Changes. *Level*: so many goods turn bad that the odds of all rise by so much. *Spread* and *order*: in a world where the pds were true, the log-odds
shrink towards their mean, or are mirrored at it. *Reversed*: a column is handed in mirrored (the highest value for the lowest, by rank), while people
and their outcomes stay as they are; its relation to the outcome is turned around, and the model approves others. "At the edge" is a world that is as
wrong as the tolerance allows, everywhere: no alarm is wanted.

Side by side, on the same streams and after every outcome from the 30th on: the z-test of observed against expected bads, and the chi-square test over
ten bins of the pd (Hosmer and Lemeshow), both at p < 0.01. And the label-free estimate of AUC and bad rate after the change, beside what then is true.
"""
import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

for name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'ARROW_NUM_THREADS'):
    os.environ.setdefault(name, '1')

import lightgbm as lgb  # noqa: E402
import numpy as np  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

import riskscore.feature_sets  # noqa: E402, F401
from riskscore.anytime import CalibrationTest, RankingTest  # noqa: E402
from riskscore.bundle import Scorer, load_bundle, write_bundle  # noqa: E402
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
CALM, WATCHED, TOLERANCE = 2000, 12, 0.15


@dataclass
class Pool:
    "Approved applications whom the model has not seen."
    log_odds: np.ndarray  # the model's
    true: np.ndarray  # pd, or the outcome itself
    parts: np.ndarray  # of the watched columns


@dataclass
class World:
    "A model and those whom it has not seen."
    name: str
    scorer: Scorer
    frame: dict
    true: np.ndarray
    columns: list
    reference: dict
    tolerance: float

    def pool(self, frame):
        "Whom the model approves."
        approved = self.scorer.frame(frame)['decision'] == 'approve'
        columns, parts, log_odds = column_parts(self.scorer, take(frame, approved))
        self.columns = self.columns or [columns[i] for i in np.argsort(-parts.std(axis=0), kind='stable')[:WATCHED]]
        return Pool(log_odds, self.true[approved], parts[:, [columns.index(name) for name in self.columns]])


def take(frame, rows):
    return {name: values[rows] for name, values in frame.items()}


def fit(plan, frame, bad):
    data = lgb.Dataset(plan.frame(frame), bad, categorical_feature=plan.categorical, params={'verbosity': -1})
    settings = {'objective': 'binary', 'learning_rate': 0.06, 'num_leaves': 15, 'min_data_in_leaf': 50, 'feature_fraction': 0.3, 'lambda_l2': 10,
                'cat_smooth': 50, 'verbosity': -1, 'num_threads': 1, 'seed': 1}
    return Trees('lightgbm', lgb.train(settings, data, 120).model_to_string())


def world(name, source, contract, folder, tolerance, truth=None):
    "Trains on three quarters of one half, calibrates on the rest of it; the other half is unseen."
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
    true = (bad if truth is None else truth)[unseen].astype(float)
    return World(name, scorer, future, true, [], performance_reference(pd, bad[learn[held:]]), tolerance)


def mirrored(values):
    "The highest for the lowest, by rank; null stays null."
    known = ~np.isnan(values)
    at, found = np.sort(values[known]), values.copy()
    found[known] = at[::-1][np.searchsorted(at, values[known])]
    return found


def raised(pool, by):
    "Some goods turn bad."
    said = sigmoid(pool.log_odds)
    return replace(pool, true=pool.true + (1 - pool.true) * (sigmoid(pool.log_odds + by) - said) / (1 - said))


def changes(w):
    "Name, the calm world, the changed one, and whether an alarm is wanted."
    real = w.pool(w.frame)
    ideal, middle = replace(real, true=sigmoid(real.log_odds)), real.log_odds.mean()
    away = real.log_odds - middle
    yield 'no change, pds are true', ideal, ideal, False
    yield 'no change, the world as it is', real, real, False
    yield 'at the edge of the tolerance', *[replace(real, true=sigmoid(real.log_odds + w.tolerance))] * 2, False
    yield 'level + 0.4', real, raised(real, 0.4), True
    yield 'level + 0.7 (odds double)', real, raised(real, 0.7), True
    yield 'spread halved', ideal, replace(real, true=sigmoid(real.log_odds - 0.5 * away)), True
    yield 'order reversed', ideal, replace(real, true=sigmoid(real.log_odds - 2 * away)), True
    for name in [c for c in w.columns if w.frame[c].dtype == np.float64][:3]:
        yield f'{name} reversed', real, w.pool(w.frame | {name: mirrored(w.frame[name])}), True


def stream(w, calm, changed, streams, after, seed):
    "Alarms of the tests and of the naive ones, as numbers of outcomes; 0: none."
    rng = np.random.default_rng(seed)
    test = CalibrationTest(0.005, w.tolerance, w.columns, (streams,))
    edges = np.quantile(sigmoid(calm.log_odds), np.linspace(0, 1, 11)[1:-1])
    sums, naive = np.zeros((4, streams)), {'z': np.zeros(streams, dtype=int), 'chi2': np.zeros(streams, dtype=int)}
    bins = np.zeros((3, streams, 10))
    pds, bads = np.empty((2, CALM + after, streams))
    for n in range(CALM + after):
        pool = calm if n < CALM else changed
        at = rng.integers(0, len(pool.true), streams)
        pd = pds[n] = sigmoid(pool.log_odds[at])
        bad = bads[n] = rng.random(streams) < pool.true[at]
        test.add(pd[None], bad[None], pool.parts[at][None])
        sums += np.stack([bad - pd, pd * (1 - pd), pd, bad])
        place = np.searchsorted(edges, pd)
        for kind, value in enumerate((bad - pd, pd * (1 - pd), 1)):
            bins[kind][np.arange(streams), place] += value
        if n >= 29:
            hit = {'z': np.abs(sums[0]) > 2.5758 * np.sqrt(sums[1]), 'chi2': (bins[0]**2 / np.maximum(bins[1], 1e-9)).sum(axis=1) > 23.209}
            for kind, fired in hit.items():
                naive[kind] = np.where((naive[kind] == 0) & fired, n + 1, naive[kind])
    return test.course.alarm_at, naive, order_alarms(w, pds, bads, min(streams, 40)), truly(w, pds, bads)


def order_alarms(w, pds, bads, streams):
    "Alarms of the ranking test; some streams, as it runs them one by one."
    found = []
    for s in range(streams):
        test, pd, histogram = RankingTest(0.005, 0.03), pds[:, s], 0
        for start in range(0, len(pd), 250):
            histogram = histogram + pd_histogram(w.reference, pd[start:start + 250])
            test.add(pd[start:start + 250], bads[start:start + 250, s], estimate_performance(w.reference, histogram)['auc'])
            if test.course.alarm_at:
                break
        found.append(min(start + 250, len(pd)) if test.course.alarm_at else 0)
    return np.array(found)


def truly(w, pds, bads):
    "AUC and bad rate after the change, estimated without outcomes and true."
    pd, bad = pds[CALM:].ravel()[:200_000], bads[CALM:].ravel()[:200_000]
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


def main(streams=200, after=10_000, tolerance=TOLERANCE):
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / 'applications.parquet'
        write_home_credit(source, 60_000, seed=7, truth_path=Path(folder) / 'truth.parquet')
        truth = pq.ParquetFile(Path(folder) / 'truth.parquet').read()['true_pd'].to_numpy()
        worlds = [world('synthetic Home Credit', source, load_contract(ROOT / 'data/contracts/home_credit.yaml'), folder, tolerance, truth)]
        if 'RISKSCORE_DATA' in os.environ:
            taiwan = Path(os.environ['RISKSCORE_DATA']) / 'taiwan/UCI_Credit_Card.csv'
            worlds.append(world('taiwan', taiwan, load_contract(ROOT / 'data/contracts/taiwan.yaml'), folder, tolerance))
    for w in worlds:
        begin, pool = time.perf_counter(), w.pool(w.frame)
        print(f'\n{w.name}: {len(pool.true):,} approved (pd below {w.scorer.policy.approve_below:.3f}), mean pd {sigmoid(pool.log_odds).mean():.2%}, bad rate '
              f'{pool.true.mean():.2%}; {streams} streams, {CALM:,} + {after:,} outcomes, tolerance {tolerance}, alarm at e >= 200 of either test')
        heads = ''.join(f'{head:>24}  ' for head in ('calibration e-test', 'ranking e-test (40)', 'z after each', 'chi2 after each'))
        print(f'{"early alarms, median and 90% delay":37} {heads} AUC est. true   bads est.  true')
        for number, (name, calm, changed, wanted) in enumerate(changes(w)):
            ours, naive, order, told = stream(w, calm, changed, streams, after, number)
            print(f'{name:37} {delays(ours, wanted)}  {delays(order, wanted)}  {delays(naive["z"], wanted)}  {delays(naive["chi2"], wanted)}   '
                  f'{told[0]:8.3f} {told[1]:.3f}   {told[2]:8.2%} {told[3]:.2%}', flush=True)
        print(f'{time.perf_counter() - begin:.0f} s')


if __name__ == '__main__':
    main(*map(int, sys.argv[1:3]), *map(float, sys.argv[3:4]))
