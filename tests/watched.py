"""A small bundle that remembers what history looked like, decisions that were made whenever a test wants, and what their counts have to be."""
import json
from pathlib import Path

import numpy as np
import sqlalchemy as sa
from small_bundle import applications, small_bundle

from riskscore.bundle import load_bundle, write_bundle, write_pointer
from riskscore.chain import new_id, now
from riskscore.contract import check_frame
from riskscore.drift import Counts, count_frame
from riskscore.fast import FastScorer
from riskscore.journal import Entry, Journal
from riskscore.reference import DriftReference, fit_reference
from riskscore.store import Store
from riskscore.windows import LiveCounts, decision_items

KEY = b'0123456789abcdef0123456789abcdef'


def watched_bundle(folder: Path, rows: int = 3000) -> Path:
    "Trains a small bundle with a drift reference, and gives the pointer."
    scorer = load_bundle(small_bundle(folder))
    frame = check_frame(scorer.contract, applications(rows, seed=5)).frame
    answers = scorer.frame(frame)
    reference = fit_reference(scorer.contract, frame.__getitem__, answers['pd'], answers['decision'])
    path = write_bundle(folder / 'models', scorer.predictor, scorer.plan, scorer.calibration, scorer.policy, scorer.contract, {'rows': rows}, {},
                        drift=reference.to_bytes())
    write_pointer(folder / 'champion.json', path)
    return folder / 'champion.json'


def raw_rows(rows: int, seed: int = 11, **changes) -> list[dict]:
    "Applications, one by one; named columns hold something else."
    raw = applications(rows, seed=seed, target=False)
    return [{name: values[i] for name, values in raw.items()} | changes for i in range(rows)]


def scored(model: FastScorer, raw: dict, at: str | None = None) -> Entry:
    "An entry as a worker makes it."
    application, name = model.reader.read(json.dumps(raw).encode()), new_id()
    answer = model.answer(application, name, at or now())
    return Entry(name, answer.received_at, 'decision', 'scored', answer.decision, answer.pd, answer.score, answer.model_version, answer.policy_version,
                 answer.to_json(), content=application.content, typed=application.typed,
                 counts=decision_items('scored', answer.decision, [{'column': c, 'rule': r} for c, r in application.flags]))


async def decide(store: Store, anchors: Path, model: FastScorer, rows: list[dict], at: str | None = None, counted: bool = True) -> str:
    "A worker of its own decides, and ends or, where nothing is to be counted, dies; gives its name."
    live = LiveCounts()
    live.know(model)
    journal = Journal(store, KEY, anchors, follow=live.decided)
    journal.start()
    if counted:
        live.start(store, journal)
    found = await journal.put_many([scored(model, row, at) for row in rows])
    assert not [f for f in found if isinstance(f, Exception)]
    journal.close()
    live.close()
    return journal.writer


def counts_of(store: Store, model: FastScorer, reference: DriftReference, hour: str | None = None) -> Counts:
    "What all scored decisions of the log add up to, of one hour or all: read from the log's own rows, by the way of tables."
    d, a = store.tables['decisions'], store.tables['applications']
    query = sa.select(d.c.received_at, d.c.pd, d.c.decision, a.c.content).join(a, a.c.request_id == d.c.request_id).where(d.c.status == 'scored')
    with store.read() as connection:
        rows = [r for r in connection.execute(query) if hour is None or r.received_at[:13] == hour[:13]]
    told, contract = [json.loads(r.content) for r in rows], model.scorer.contract
    frame = check_frame(contract, {name: [one.get(name) for one in told] for name in contract.columns}).frame
    return count_frame(reference, frame, np.array([r.pd for r in rows]), np.array([r.decision for r in rows], dtype=object))


def items_of(store: Store) -> dict[tuple[str, str], int]:
    "Counts of the log by name and item, over all hours."
    with store.read() as connection:
        return {(name, item): int(n) for name, item, n in connection.exec_driver_sql('SELECT name, item, sum(n) FROM windows GROUP BY name, item')}
