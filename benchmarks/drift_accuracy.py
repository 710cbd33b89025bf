"""How often is drift reported that is not there, and is what is there found? Beside Evidently and NannyML on the same windows.

Run: RISKSCORE_DATA=../shared/data python benchmarks/drift_accuracy.py [--reps 4000] [--only SOURCE] [--peers FOLDER]

--reps repetitions for each of three sources (about 6 ms each, 30 ms for the 116 columns of Home Credit). --peers FOLDER makes an environment there (2.4 GB),
when there is none, and runs the other tools in it, on a few windows of each kind, as one takes them seconds. Without RISKSCORE_DATA only one source is there.

No drift: rows are shuffled, so that reference and window are samples of one population; both are drawn anew in each repetition. A column is alarmed when its
p-value is below 1%, before any correction for the number of columns. In brackets is the one-sided 95% Clopper-Pearson bound of the rate.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

for name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'ARROW_NUM_THREADS'):
    os.environ.setdefault(name, '1')

import numpy as np  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ['evidently==0.7.23', 'nannyml==0.13.1', 'pandas<3', 'statsmodels', 'pyarrow']
SIZES = (50, 100, 200, 500, 1000, 2000, 5000, 20_000)
PEER_SIZES = (50, 100, 200, 1000, 5000)
PEER_WINDOWS = 3
TOOLS = ('Evidently', 'NannyML', 'NannyML, chunks as long as the window')


# ---------------------------------------------------------------- sources of rows without drift

class Table:
    "Real rows; each draw shuffles them."

    def __init__(self, contract, path, reference_rows):
        from riskscore.contract import load_contract
        from riskscore.datasets import read_frames
        self.contract, self.reference_rows = load_contract(ROOT / f'data/contracts/{contract}.yaml'), reference_rows
        blocks = [batch.frame for batch in read_frames(path, self.contract)]
        watched = [c.name for c in self.contract.feature_columns if not c.temporal]
        frame = {n: np.concatenate([b[n] for b in blocks]) for n in watched}
        self.names = watched
        self.texts = {n: v for n, v in frame.items() if v.dtype.kind == 'O'}
        self.numbers = [n for n in watched if n not in self.texts]
        self.table = np.stack([frame[n] for n in self.numbers], axis=1)  # by row, which is shuffled faster
        self.rows = len(self.table)

    def draw(self, rows, rng):
        "Reference and window, without a row in common."
        rows = min(rows, self.rows - self.reference_rows)
        order = rng.permutation(self.rows)[:self.reference_rows + rows]
        return self.rows_of(order[:self.reference_rows]), self.rows_of(order[self.reference_rows:])

    def rows_of(self, order):
        "These rows as a frame."
        frame = dict(zip(self.numbers, np.ascontiguousarray(self.table[order].T), strict=True))
        frame |= {n: v[order] for n, v in self.texts.items()}
        return {n: frame[n] for n in self.names}


class Synthetic:
    "Shapes that are hard to watch: heavy tails, ties, nulls, rare flags, many levels."

    reference_rows = 20_000
    shapes = {
        'normal': lambda n, rng: rng.normal(size=n), 'heavy tail': lambda n, rng: rng.lognormal(0, 2.5, n), 'student 2': lambda n, rng: rng.standard_t(2, n),
        'amount, rounded': lambda n, rng: np.round(rng.lognormal(9, 1, n), -3), 'mostly zero': lambda n, rng: rng.exponential(size=n) * (rng.random(n) < 0.2),
        'half null': lambda n, rng: np.where(rng.random(n) < 0.5, np.nan, rng.normal(size=n)), 'uniform': lambda n, rng: rng.random(n),
        'poisson': lambda n, rng: rng.poisson(7, n) * 1.0,
        'eight values': lambda n, rng: rng.choice(8, n, p=[.55, .25, .1, .05, .03, .012, .006, .002]).astype(float),
        'flag 7.5%': lambda n, rng: (rng.random(n) < 0.075) * 1.0, 'flag 0.1%': lambda n, rng: (rng.random(n) < 0.001) * 1.0,
        '58 levels': lambda n, rng: _levels(58, n, rng), '300 levels': lambda n, rng: _levels(300, n, rng),
    }

    def __init__(self):
        from riskscore.contract import Column, Contract
        kinds = {name: 'flag' if 'flag' in name else 'category' if 'levels' in name else 'number' for name in self.shapes}
        self.contract = Contract('synthetic', {n: Column(n, k, levels=('0', '1') if k == 'flag' else ()) for n, k in kinds.items()})

    def frame(self, rows, rng):
        return {name: draw(rows, rng) for name, draw in self.shapes.items()}

    def draw(self, rows, rng):
        return self.frame(self.reference_rows, rng), self.frame(rows, rng)


LEVELS = np.array([f'level {i}' for i in range(300)], dtype=object)


def _levels(many, rows, rng):
    "Levels of which a few are frequent and most are rare."
    weights = np.cumsum(1 / np.arange(1, many + 1) ** 1.3)
    return LEVELS[np.searchsorted(weights, weights[-1] * rng.random(rows))]


def sources():
    "Every source at hand."
    data = Path(os.environ.get('RISKSCORE_DATA', 'nowhere'))
    if (data / 'taiwan').is_dir():
        yield 'taiwan', Table('taiwan', data / 'taiwan/UCI_Credit_Card.csv', 10_000)
        yield 'Home Credit', Table('home_credit', data / 'home_credit_sample/application_train.csv.gz', 10_000)
    yield 'synthetic', Synthetic()


# ---------------------------------------------------------------- no drift

def bound(hits, of):
    "One-sided 95% Clopper-Pearson bound of a rate."
    from scipy.stats import beta
    return 1.0 if hits >= of else float(beta.ppf(0.95, hits + 1, of - hits))


def rate(hits, of):
    return f'{hits / of:.2%} [{bound(hits, of):.2%}]'


def no_drift(source, reps, rng):
    "For each repetition: its window's rows, (columns, 4) alarms, flag and stop; and which columns are continuous."
    from riskscore.drift import count_frame, judge_drift
    from riskscore.reference import fit_reference
    sizes, alarms, acts = [], [], []
    for i in range(reps):
        history, window = source.draw(SIZES[i % len(SIZES)], rng)
        reference = fit_reference(source.contract, history.__getitem__)
        verdict = judge_drift(reference, count_frame(reference, window))
        entries = {e['column']: e for e in verdict['columns']}
        sizes.append(SIZES[i % len(SIZES)])
        alarms.append([_alarms(entries[name]) for name in reference.columns])
        acts.append((verdict['flag'], verdict['stop']))
    continuous = np.array([c.form == 'grid' for c in reference.columns.values()])
    return np.array(sizes), np.array(alarms), np.array(acts), continuous, list(reference.columns)


def _alarms(entry):
    "Is a column alarmed by PSI, by KS, by JS, by PSI and KS together?"
    return entry['p'] < 0.01, entry['ks'] is not None and entry['ks'] > entry['ks_critical'], entry['js'] > entry['js_critical'], entry['p_combined'] < 0.01


def no_drift_rows(name, found, peers):
    "Lines of the table."
    sizes, alarms, acts, continuous, names = found
    for size in SIZES:
        at = sizes == size
        cells = [f'{alarms[at][:, continuous, 0].mean():.2%}', *(_share(peers, name, size, tool) for tool in TOOLS)]
        yield f'{name}: alarms, mean of {continuous.sum()} continuous columns', size, int(at.sum()), '0.5 to 1.5%', *cells
    reps, hits = len(alarms), alarms.sum(axis=0)
    for place, metric in enumerate(('PSI', 'KS', 'JS', 'PSI and KS')):
        worst = int(np.argmax(hits[:, place]))
        yield f'{name}: alarms by {metric}, worst of {len(names)} columns ({names[worst]})', 'all', reps, '1.5%', rate(hits[worst, place], reps), '', '', ''
    means = ', '.join(f'{alarms[:, continuous, m].mean():.2%}' for m in (0, 1, 3))
    yield f'{name}: mean of continuous columns by PSI, KS, both', 'all', reps, '0.5 to 1.5%', means, '', '', ''
    yield from act_rows(name, sizes, acts, [_flag(peers, name, tool) for tool in TOOLS])


def act_rows(name, sizes, acts, flags=('', '', '')):
    "How often would be retrained or stopped, without drift?"
    for place, (what, least, promised) in enumerate((('retrain flag (share of drifted columns above 15%)', 100, '1%'), ('stop', 200, '0.1%'))):
        judged = sizes >= least
        yield f'{name}: {what}', 'all', int(judged.sum()), promised, rate(acts[judged, place].sum(), judged.sum()), *(('', '', '') if place else flags)


def growing_rows(rng, days=1100):
    "A window a day that is looked at twelve times while it grows, and the yearly budget of stops that this spends."
    from riskscore.drift import DriftRule, count_frame, judge_drift
    from riskscore.reference import fit_reference
    source, looks, step = Synthetic(), 12, 400
    rule, stops, flags, some = DriftRule(looks_per_year=365 * looks), 0, 0, 0
    for day in range(days):
        if day % 10 == 0:
            reference = fit_reference(source.contract, source.frame(20_000, rng).__getitem__)
        window, seen = count_frame(reference, source.frame(0, rng)), []
        for _ in range(looks):
            window = window + count_frame(reference, source.frame(step, rng))
            seen.append(judge_drift(reference, window, rule))
        stops += any(v['stop'] for v in seen)
        flags += any(v['flag'] for v in seen)
        some += np.mean([any(v['columns'][i]['p'] < 0.01 for v in _by_column(seen)) for i in range(len(reference.columns))])
    what, rows = 'a window that grows over a day, looked at 12 times', '400 to 4,800'
    yield f'{what}: false stops a year', rows, days, '1', f'{365 * stops / days:.2f} [{365 * bound(stops, days):.2f}]', '', '', ''
    yield f'{what}: days with a false flag', rows, days, '', rate(flags, days), '', '', ''
    yield f'{what}: days on which a given column is alarmed at some look', rows, days, '', f'{some / days:.1%}', '', '', ''


def _by_column(verdicts):
    "The same verdicts with columns in one order."
    for verdict in verdicts:
        yield {**verdict, 'columns': sorted(verdict['columns'], key=lambda e: e['column'])}


def bursts(rows, mean, alike, rng):
    "Rows in bursts whose members share a part of their value."
    ends = np.cumsum(rng.geometric(1 / mean, size=2 * rows // mean + 50))
    burst = np.searchsorted(ends, np.arange(rows), side='right')
    return np.sqrt(alike) * rng.normal(size=burst.max() + 1)[burst] + np.sqrt(1 - alike) * rng.normal(size=rows)


def burst_rows(rng, reps=20):
    "False alarms on rows that are not independent, with and without the design effect."
    from riskscore.contract import Column, Contract
    from riskscore.drift import count_frame, judge_drift
    from riskscore.reference import fit_reference
    names = [f'column {i}' for i in range(20)]
    contract = Contract('bursts', {n: Column(n) for n in names})
    for mean, alike in ((20, 0.3), (20, 0.8), (100, 0.5)):
        found = {True: [], False: []}
        for _ in range(reps):
            history = {n: bursts(20_000, mean, alike, rng) for n in names}
            windows = [{n: bursts(size, mean, alike, rng) for n in names} for size in (200, 1000, 5000)]
            for timed, results in found.items():
                reference = fit_reference(contract, history.__getitem__, time=np.arange(20_000.0) if timed else None)
                verdicts = [judge_drift(reference, count_frame(reference, w)) for w in windows]
                results += [(np.mean([e['p'] < 0.01 for e in v['columns']]), v['flag'], v['stop']) for v in verdicts]
        for timed, results in found.items():
            alarms, flags, stops = np.mean(results, axis=0)
            what = f'bursts of {mean} rows on average, correlation {alike}, {"with the" if timed else "no"} design effect: alarms; flags; stops'
            yield what, '200 to 5,000', 3 * reps, '', f'{alarms:.1%}; {flags:.1%}; {stops:.1%}', '', '', ''


# ---------------------------------------------------------------- drift that is there

def _nulls(frame, rng):
    frame['normal'][rng.random(len(frame['normal'])) < 0.8] = np.nan


def _outlier(frame, rng):
    frame['normal'] += 0.5
    frame['normal'][0] = 1e6


def _unseen(frame, rng):
    frame['58 levels'][rng.random(len(frame['58 levels'])) < 0.2] = 'never seen'


POWER = { # what happens, to which column, in how many rows
    'nulls jump from 0 to 80%': ('normal', 1000, _nulls),
    'half a standard deviation, and one row of 1,000,000': ('normal', 1000, _outlier),
    'a heavy tail doubles (lognormal, sigma 2.5)': ('heavy tail', 5000, lambda f, rng: f.update({'heavy tail': 2 * f['heavy tail']})),
    'shift of 0.2 standard deviations': ('normal', 1000, lambda f, rng: f.update(normal=f['normal'] + 0.2)),
    'a level that history never held in 20% of rows': ('58 levels', 1000, _unseen),
    'an amount in another unit (x1,000)': ('amount, rounded', 1000, lambda f, rng: f.update({'amount, rounded': 1000 * f['amount, rounded']})),
}


def shocked(case, rng):
    "A reference and a window in which one column has changed."
    _, rows, change = POWER[case]
    source = Synthetic()
    history, window = source.draw(rows, rng)
    change(window, rng)
    return source.contract, history, window


def power_rows(peers, rng, reps=200):
    "Is the changed column found: beyond chance after correction for all columns, or broken?"
    from riskscore.drift import count_frame, judge_drift
    from riskscore.reference import fit_reference
    for case, (column, rows, _) in POWER.items():
        found = alarmed = stops = 0
        for _ in range(reps):
            contract, history, window = shocked(case, rng)
            reference = fit_reference(contract, history.__getitem__)
            verdict = judge_drift(reference, count_frame(reference, window))
            entry = next(e for e in verdict['columns'] if e['column'] == column)
            found += entry['verdict'] in ('material', 'immaterial')
            alarmed += entry['p_combined'] < 0.01
            stops += verdict['stop']
        others = [_found(peers, case, tool, column) for tool in TOOLS]
        yield f'found: {case}', rows, reps, 'found', f'{found / reps:.1%} ({alarmed / reps:.1%} before correction), stops {stops / reps:.0%}', *others


# ---------------------------------------------------------------- the other tools

def make_environment(folder):
    "An environment of their own; gives its Python."
    python = Path(folder) / 'bin/python'
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, '-m', 'pip', 'install', '--quiet', *PACKAGES], check=True)
    return python


def ask_peers(folder, found_sources, rng):
    "Writes windows, lets the other tools judge them, and gives their verdicts by source or case, rows and tool."
    from pyarrow import parquet, table
    python = make_environment(folder)
    with tempfile.TemporaryDirectory() as place:
        tasks = []
        def add(key, rows, history, window):
            for part, frame in (('reference', history), ('window', window)):
                parquet.write_table(table({n: _nullable(v) for n, v in frame.items()}), Path(place) / f'{len(tasks)}.{part}.parquet')
            tasks.append((key, rows))
        for name, source in found_sources:
            for rows in PEER_SIZES if name != 'Home Credit' else ():
                for _ in range(PEER_WINDOWS):
                    add(name, rows, *source.draw(rows, rng))
        for case, (_, rows, _) in POWER.items():
            for _ in range(PEER_WINDOWS):
                add(case, rows, *shocked(case, rng)[1:])
        environment = {**os.environ, 'NML_DISABLE_USAGE_LOGGING': '1', 'DO_NOT_TRACK': '1'}
        subprocess.run([python, '-W', 'ignore', __file__, '--judge', place], check=True, env=environment, stdout=subprocess.DEVNULL)
        answers = json.loads((Path(place) / 'verdicts.json').read_text())
    peers = {}
    for (key, rows), tools in zip(tasks, answers, strict=True):
        for tool, alarms in tools.items():
            peers.setdefault((key, rows, tool), []).append(alarms)
    return peers


def _nullable(values):
    import pyarrow
    return pyarrow.array(values, from_pandas=True)


def judge_all(place):
    "Runs in the other environment: the share of alarms of each column (one verdict, or one a chunk), for each tool and window."
    import pandas as pd
    from evidently import Report
    from evidently.presets import DataDriftPreset
    from nannyml import UnivariateDriftCalculator

    def evidently(reference, window):
        metrics = Report([DataDriftPreset()]).run(window, reference).dict()['metrics'][1:]
        alarms = {}
        for value, setting in ((m['value'], m['config']) for m in metrics):
            beyond = value < setting['threshold'] if 'p_value' in setting['method'] else value >= setting['threshold']
            alarms[setting['column']] = float(beyond)
        return alarms

    def nannyml(reference, window, **chunks):
        names, metric = list(reference), 'jensen_shannon'
        calculator = UnivariateDriftCalculator(column_names=names, continuous_methods=[metric], categorical_methods=[metric], **chunks).fit(reference)
        result = calculator.calculate(window).filter(period='analysis').to_df()
        return {n: float(result[(n, metric, 'alert')].mean()) for n in names}

    verdicts = []
    for i in range(len(list(Path(place).glob('*.window.parquet')))):
        reference, window = (pd.read_parquet(Path(place) / f'{i}.{part}.parquet') for part in ('reference', 'window'))
        tools = (evidently, nannyml, lambda r, w: nannyml(r, w, chunk_size=len(w)))
        verdicts.append({name: _tried(tool, reference, window) for name, tool in zip(TOOLS, tools, strict=True)})
    (Path(place) / 'verdicts.json').write_text(json.dumps(verdicts))


def _tried(tool, *tables):
    "Its verdicts, or none where it fails."
    try:
        return tool(*tables)
    except Exception as error: # noqa: BLE001
        print(f'{type(error).__name__}: {error}', file=sys.stderr)
        return {}


def _share(peers, key, rows, tool):
    values = [v for alarms in peers.get((key, rows, tool), []) for v in alarms.values()]
    return f'{np.mean(values):.1%}' if values else ''


def _flag(peers, key, tool):
    "In how many windows are more than 15% of the columns alarmed?"
    windows = [np.mean(list(a.values())) > 0.15 for (k, _, t), found in peers.items() if (k, t) == (key, tool) for a in found if a]
    return f'{np.mean(windows):.0%} of {len(windows)}' if windows else ''


def _found(peers, case, tool, column):
    values = [alarms[column] for alarms in peers.get((case, POWER[case][1], tool), []) if column in alarms]
    return f'{np.mean(np.array(values) > 0):.0%} of {len(values)}' if values else ''


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--reps', type=int, default=4000)
    parser.add_argument('--peers')
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument('--only', help='one source without drift, and nothing else: taiwan, Home Credit or synthetic')
    parser.add_argument('--judge', help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.judge:
        return judge_all(given.judge)
    found_sources = [(name, source) for name, source in sources() if given.only in (None, name)]
    peers = ask_peers(given.peers, found_sources, np.random.default_rng([given.seed, 9])) if given.peers else {}
    print(f'| what | rows of the window | repetitions | promised | riskscore | {" | ".join(TOOLS)} |\n|---|---|---|---|---|---|---|---|', flush=True)

    def show(lines):
        for line in lines:
            print(f'| {" | ".join(f"{x:,}" if isinstance(x, int) else x for x in line)} |', flush=True)

    found = [no_drift(source, given.reps, np.random.default_rng([given.seed, place])) for place, (_, source) in enumerate(found_sources)]
    for (name, _), results in zip(found_sources, found, strict=True):
        show(no_drift_rows(name, results, peers))
    if given.only:
        return None
    show(act_rows('all sources', *(np.concatenate([f[i] for f in found]) for i in (0, 2))))
    show(growing_rows(np.random.default_rng([given.seed, 5])))
    show(burst_rows(np.random.default_rng([given.seed, 6])))
    show(power_rows(peers, np.random.default_rng([given.seed, 7])))
    return None


if __name__ == '__main__':
    main()
