"""What a monitor finds and does in every world of data/worlds, against what it should: detection, delay, false alarms, the right action, money lost.

Run: python benchmarks/scoreboard.py [--worlds nothing,recession] [--seeds 10] [--days 60,90] [-o scoreboard.csv] [--jobs 1] [--model POINTER] [--peers FOLDER]

A champion (LightGBM) is trained on synthetic Home Credit by what the train task does, unless --model names one. For each seed the same people come in every
world: --per-day applicants on average, by weekday and pay day. Windows are days. Nothing looks ahead, so the table of a shorter life is read off the longest.
Outcomes mature after --delay days, up to --spread earlier or later; only the approved have one. After a stop all applications are referred until the operator
resumes --repair days later: by then a broken feed is repaired, and columns that are not broken have been accepted. Whatever the monitor calls for (a new
calibration, a new model) is not carried out, so money lost does not show it.

found: told anything (flag, broken column, stop, outcomes) from the first day on which there is something to be found. delay: from that day; its own window, in
the evening, is 0 days. false alarms: days with anything told before that day, or in a world where every alarm is false. done: a stop, else what was called for
when outcomes first contradicted the model, else nothing. lost: money an application, in the policy's currency, that the same policy would earn more if it knew
the true pd; in the calm world that is the price of not being an oracle. unwatched: the same had nobody stopped the bank.

--peers FOLDER judges the same days with Evidently and NannyML (see drift_accuracy.py, which makes the environment), for --peer-seeds seeds. A peer only flags:
a flag from the first day on which there is something to be found on is taken as `retrain`, which is what its users do with it. Evidently judges --peer-days
only, as a window takes it seconds; NannyML all days as chunks. Rules: the tool's own (Evidently: more than half of the columns drift; NannyML has none for a
table: any column alerts) and the share that its users set and we do: more than 15% of the columns. A day on which a tool fails is one without a flag:
Evidently does where a column is empty.

The same arguments give the same bytes.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

for name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'ARROW_NUM_THREADS'):
    os.environ.setdefault(name, '1')

import numpy as np  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PEOPLE = 1000  # seeds of the bank's people begin here, far from those of history
HISTORY_SEED = 7
SHARE = 0.15


def contract_of_bank():
    import riskscore.feature_sets  # noqa: F401  # declares the features that the contract asks for
    from riskscore.contract import load_contract
    return load_contract(ROOT / 'data/contracts/home_credit.yaml')


def history_of(contract, rows):
    "History of the bank, as typed columns."
    from riskscore.bank import _typed
    from riskscore.synthetic import home_credit
    blocks = [_typed(contract, block.applications) for block in home_credit(rows, HISTORY_SEED)]
    return {name: np.concatenate([b[name] for b in blocks]) for name in blocks[0]}


def train_champion(folder, rows, seed=1):
    "A bundle by the functions of the train task; gives its directory."
    from riskscore.assembly import assemble, monitoring_parts, wanted
    from riskscore.bundle import write_bundle
    from riskscore.candidates import family
    from riskscore.features import fit_plan
    from riskscore.matrix import prepare_dataset, write_features
    from riskscore.models import train
    from riskscore.monotone import constrain
    from riskscore.split import cv_folds
    contract, folder = contract_of_bank(), Path(folder)
    history = history_of(contract, rows)
    fitted, kind = constrain(contract, fit_plan(contract, [history])), family('lightgbm')
    write_features(folder / 'features.parquet', fitted.plan, contract, [history])
    data = prepare_dataset(folder / 'features.parquet', fitted.plan, contract.target.name, folder / 'features.bin', 1, fitted.directions)
    folds = cv_folds(data.target, contract.cv)
    params = kind.defaults(len(data.target), len(data.names)) | {'learning_rate': 0.06}  # a third of the trees, as each application is explained
    trained = train(kind, data, folds, params, seed=seed, threads=1)
    made = assemble(contract, fitted.plan, data, trained.predictor, trained.margins, {n: history[n] for n in wanted(contract)}, 1, folds)
    facts = {'family': kind.name, 'params': trained.params, 'rounds': trained.rounds, 'seed': seed, 'folds': trained.folds}
    return write_bundle(folder / 'models', made.predictor, fitted.plan, made.calibration, made.policy, contract, facts, {}, made.reasons, made.recourse,
                        **monitoring_parts(contract, history.__getitem__, made))


def world_names():
    return sorted(path.stem for path in (ROOT / 'data/worlds').glob('*.yaml'))


def people_of(contract, given, seed):
    from riskscore.arrivals import Calendar
    from riskscore.bank import bank_applicants
    return bank_applicants(contract, Calendar(given.per_day), max(given.days), PEOPLE + seed)


def lives(given, model, seed):
    "Rows of one seed: a world each, and for it a row for each length."
    from riskscore.bank import Conduct, grade_life, live
    from riskscore.bundle import load_bundle
    from riskscore.oracle import Oracle
    from riskscore.worlds import load_world
    contract, scorer = contract_of_bank(), load_bundle(model)
    people, rows, memo = people_of(contract, given, seed), [], {}
    for name in given.worlds:
        begun, world = time.perf_counter(), load_world(ROOT / f'data/worlds/{name}.yaml', contract, seed=seed)
        life = live(scorer, world, people, Oracle(seed, given.delay, given.spread), Conduct(repair=given.repair), memo)
        rows.append([grade_life(life.until(days)) for days in given.days])
        r = rows[-1][-1]
        print(f"seed {seed}, {name}: {r['action']}, flag {r['flag_day']}, stop {r['stop_day']}, outcomes {r['outcome_alarm_day']} "
              f'({time.perf_counter() - begun:.1f} s)', file=sys.stderr, flush=True)
    return rows


def run(given, model):
    "All rows: lengths, worlds within, seeds within."
    seeds = range(1, given.seeds + 1)
    if given.jobs > 1:
        with ProcessPoolExecutor(given.jobs) as pool:
            found = list(pool.map(partial(lives, given, model), seeds))
    else:
        found = [lives(given, model, seed) for seed in seeds]
    return [rows[place][length] for length in range(len(given.days)) for place in range(len(given.worlds)) for rows in found]


def summary(rows):
    "Sentences on the targets."
    calm = [r for r in rows if r['expected'] == 'nothing']
    strict, other = [r for r in rows if r['start'] is None], [r for r in rows if r['expected'] != 'nothing']
    before = [r for r in rows if r['start'] is not None]
    false, quiet = (sum(r[key] for r in strict) for key in ('false_days', 'quiet_days'))
    early, days = (sum(r[key] for r in before) for key in ('false_days', 'quiet_days'))
    yield f'False alarms where nothing is to be found: {false} of {quiet} days, in {sum(r["false_alarm"] for r in strict)} of {len(strict)} runs.'
    yield f'False alarms in the days before something begins: {early} of {days} (the same people in every world).'
    yield f'Right action where nothing is to be done: {sum(r["right"] for r in calm)} of {len(calm)} runs.'
    yield f'Right action elsewhere: {sum(r["right"] for r in other)} of {len(other)} runs.'


# ---------------------------------------------------------------- the other tools

def peer_rows(given, contract, model):
    "How the other tools do on the same days: a row for each tool, rule, world and seed."
    from pyarrow import parquet, table
    from riskscore.bundle import load_bundle
    from riskscore.reference import reference_from_bytes
    history = history_of(contract, given.peer_history)
    names = list(reference_from_bytes(load_bundle(model).drift).columns)
    with tempfile.TemporaryDirectory() as place:
        tasks = []

        def write(frame, days, file):
            parquet.write_table(table({'the day': days} | {n: _nullable(frame[n]) for n in names}), Path(place) / file)

        write(history, np.arange(given.peer_history) // int(given.per_day), 'reference.parquet')
        for seed in range(1, given.peer_seeds + 1):
            people = people_of(contract, given, seed)
            for world in _worlds(given, contract, seed):
                days = [world.apply(day, p.frame, p.truth).frame for day, p in enumerate(people)]
                frame = {n: np.concatenate([d[n] for d in days]) for n in names}
                write(frame, np.repeat(np.arange(len(days)), [len(d[names[0]]) for d in days]), f'{len(tasks)}.days.parquet')
                tasks.append((world, seed))
        (Path(place) / 'days.json').write_text(json.dumps(given.peer_days))
        environment = {**os.environ, 'NML_DISABLE_USAGE_LOGGING': '1', 'DO_NOT_TRACK': '1'}
        python = Path(given.peers) / 'bin/python'
        subprocess.run([python, '-W', 'ignore', __file__, '--judge', place], check=True, env=environment, stdout=subprocess.DEVNULL)
        answers = json.loads((Path(place) / 'verdicts.json').read_text())
    return [_peer_row(tool, rule, world, seed, _flags(shares, rule)) | {'failed': list(shares.values()).count(None)}
            for (world, seed), tools in zip(tasks, answers, strict=True) for tool, shares in tools.items() for rule in RULES[tool]]


RULES = {'Evidently': {'own: over half of the columns': 0.5, 'over 15% of the columns': SHARE},
         'NannyML': {'own: any column': 0.0, 'over 15% of the columns': SHARE}}


def _worlds(given, contract, seed):
    from riskscore.worlds import load_world
    return [load_world(ROOT / f'data/worlds/{name}.yaml', contract, seed=seed) for name in given.worlds]


def _nullable(values):
    import pyarrow
    return pyarrow.array(values, from_pandas=True)


def _flags(shares, rule):
    "Day to whether it is flagged."
    limit = {name: limit for rules in RULES.values() for name, limit in rules.items()}[rule]
    return {int(day): share is not None and share > limit for day, share in shares.items()}


def _peer_row(tool, rule, world, seed, flags):
    "One world under one seed, as a tool has judged it."
    start = world.expected.start
    after = [day for day, flag in flags.items() if start is not None and day >= start and flag]
    quiet = [day for day in flags if start is None or day < start]
    action = 'retrain' if after or (start is None and any(flags.values())) else 'nothing'
    return {'tool': tool, 'rule': rule, 'world': world.name, 'seed': seed, 'found': bool(after), 'false_days': sum(flags[d] for d in quiet),
            'quiet_days': len(quiet), 'judged': len(flags), 'right': world.expected.grade(None, action)['right'], 'calm': world.expected.action == 'nothing',
            'strict': start is None}


def peer_lines(rows):
    "A table in Markdown."
    heads = ['tool', 'rule', 'found, of worlds where something is', 'false alarms, days', 'of which in worlds where nothing is', 'right, nothing to do',
             'right, something to do', 'days judged', 'days on which it failed']
    yield heads
    yield ['---'] * len(heads)
    for tool, rules in RULES.items():
        for rule in rules:
            own = [r for r in rows if (r['tool'], r['rule']) == (tool, rule)]
            there, strict = [r for r in own if not r['strict']], [r for r in own if r['strict']]
            cells = [f'{sum(r["found"] for r in there)} of {len(there)}']
            cells += [f'{sum(r["false_days"] for r in some)} of {sum(r["quiet_days"] for r in some)}' for some in (own, strict)]
            cells += [f'{sum(r["right"] for r in some)} of {len(some)}' for some in ([r for r in own if r['calm']], [r for r in own if not r['calm']])]
            yield [tool, rule, *cells, *(str(sum(r.get(key, 0) for r in own)) for key in ('judged', 'failed'))]


def judge_all(place):
    "Runs in the other environment: the share of columns that each tool alarms on each day, by world."
    import pandas as pd
    from evidently import Report
    from evidently.presets import DataDriftPreset
    from nannyml import UnivariateDriftCalculator
    from pandas.util import hash_pandas_object
    place = Path(place)
    judged, first = json.loads((place / 'days.json').read_text()), pd.Timestamp('2026-01-05')

    def read(file):
        table = pd.read_parquet(place / file)
        return table.drop(columns='the day'), table['the day']

    reference, days = read('reference.parquet')
    names, metric = list(reference), 'jensen_shannon'

    def stamped(table, days):
        return table.assign(stamp=first + pd.to_timedelta(days, unit='D'))

    calculator = UnivariateDriftCalculator(column_names=names, timestamp_column_name='stamp', chunk_period='D').fit(stamped(reference, days))

    known = {}  # worlds share days on which none of them acts

    def evidently(table):
        name = hash_pandas_object(table, index=False).to_numpy().tobytes()
        if name not in known:
            try:
                known[name] = evidently_anew(table)
            except Exception as error:  # noqa: BLE001  # such as a column that is empty
                print(f'Evidently fails: {type(error).__name__}: {error}', file=sys.stderr)
                known[name] = None
        return known[name]

    def evidently_anew(table):
        metrics = Report([DataDriftPreset()]).run(table, reference).dict()['metrics'][1:]
        return float(np.mean([m['value'] < m['config']['threshold'] if 'p_value' in m['config']['method'] else m['value'] >= m['config']['threshold']
                              for m in metrics]))

    verdicts = []
    for i in range(len(list(place.glob('*.days.parquet')))):
        begun = time.perf_counter()
        table, days = read(f'{i}.days.parquet')
        result = calculator.calculate(stamped(table, days)).filter(period='analysis').to_df()
        alerts = np.mean([result[(n, metric, 'alert')].to_numpy(dtype=float) for n in names], axis=0)
        between = time.perf_counter()
        own = {day: evidently(table[days == day]) for day in judged if (days == day).any()}
        verdicts.append({'Evidently': own, 'NannyML': dict(zip(sorted(set(days.tolist())), alerts.tolist(), strict=True))})
        print(f'peers, table {i}: NannyML {between - begun:.1f} s, Evidently {time.perf_counter() - between:.1f} s', file=sys.stderr, flush=True)
    (place / 'verdicts.json').write_text(json.dumps(verdicts))


def _numbers(text):
    return sorted(int(number) for number in text.split(','))


def arguments(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--worlds', type=lambda text: text.split(','), default=world_names())
    parser.add_argument('--seeds', type=int, default=10)
    parser.add_argument('--days', type=_numbers, default=[60, 90])
    parser.add_argument('--per-day', type=float, default=300)
    parser.add_argument('--delay', type=int, default=10)
    parser.add_argument('--spread', type=int, default=5)
    parser.add_argument('--repair', type=int, default=3)
    parser.add_argument('--history', type=int, default=40_000)
    parser.add_argument('--model')
    parser.add_argument('--jobs', type=int, default=1)
    parser.add_argument('-o', '--out', help='a CSV file with every run')
    parser.add_argument('--peers')
    parser.add_argument('--peer-seeds', type=int, default=1)
    parser.add_argument('--peer-days', type=_numbers, default=[15, 22, 50])
    parser.add_argument('--peer-history', type=int, default=10_000)
    parser.add_argument('--judge', help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main():
    given = arguments()
    if given.judge:
        return judge_all(given.judge)
    from riskscore.bank import scoreboard, scoreboard_csv, scoreboard_markdown
    from riskscore.core import write_text
    with tempfile.TemporaryDirectory() as folder:
        model = given.model or str(train_champion(folder, given.history))
        rows = run(given, model)
        peers = peer_rows(given, contract_of_bank(), model) if given.peers else []
    if given.out:
        write_text(Path(given.out), scoreboard_csv(rows))
    for days in given.days:
        some = [r for r in rows if r['days'] == days]
        print(f'{days} days\n\n{scoreboard_markdown(scoreboard(some))}\n' + ''.join(f'* {line}\n' for line in summary(some)))
    for line in peer_lines(peers) if peers else ():
        print(f"| {' | '.join(line)} |")


if __name__ == '__main__':
    main()
