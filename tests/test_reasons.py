"""Reasons tell the truth: they add up, they name what moves the decision, and they read the same for a table and for one application."""
import json
from dataclasses import replace
from timeit import repeat

import numpy as np
import pyarrow.parquet as pq
import pytest
from explained import explained, one, take
from generators import contracts, examples, tables
from hypothesis import given, settings
from hypothesis import strategies as st
from small_bundle import applications, small_bundle

from riskscore.batch import score_batch
from riskscore.bundle import load_bundle
from riskscore.contract import LANGUAGES, check_frame, load_contract
from riskscore.core import RiskError, frame_rows
from riskscore.explanations import reason_shares
from riskscore.faithfulness import columns_behind, columns_owned, faithfulness
from riskscore.features import FeaturePlan, fit_plan
from riskscore.policy import judge
from riskscore.reasons import REASON_LIMIT, explain, fit_reasons, mixture, reason_groups, reasons_from_dict, reasons_to_dict
from riskscore.synthetic import write_home_credit

SETS = {'taiwan': 'taiwan/UCI_Credit_Card.csv', 'home_credit': 'home_credit_sample/application_train.csv.gz'}


@pytest.fixture(scope='module')
def synthetic(tmp_path_factory):
    "A model of synthetic applicants."
    folder = tmp_path_factory.mktemp('synthetic')
    write_home_credit(folder / 'applicants.csv', 8000, 7)
    return explained(folder / 'models', folder / 'applicants.csv', load_contract('data/contracts/home_credit.yaml'))


def test_contributions_add_up_to_the_margin(synthetic):
    scorer, features = synthetic.scorer, synthetic.scorer.plan.frame(synthetic.future)
    parts = scorer.predictor.contributions(features)
    margin = scorer.predictor.margin(features)
    np.testing.assert_allclose(parts.sum(axis=1), margin, rtol=0, atol=1e-9)
    shares = scorer.mixture.shares(synthetic.future)
    assert (shares >= 0).all()
    np.testing.assert_allclose(shares.sum(axis=2), 1, rtol=0, atol=1e-12)
    np.testing.assert_allclose(scorer.reasons.grouped(parts, shares).sum(axis=1), margin, rtol=0, atol=1e-9)
    usual = scorer.reasons.effects(parts, shares).sum(axis=1) - parts[:, :-1].sum(axis=1)
    np.testing.assert_allclose(usual, usual[0], rtol=0, atol=1e-6)  # the approved mean is the same for everybody; effects are rounded


def test_moving_the_first_reason_lowers_the_pd_of_synthetic_applicants(synthetic):
    found = faithfulness(synthetic.scorer, synthetic.by_decision('decline'), synthetic.by_decision('approve', 'history'), rows=100, draws=5)
    assert found.error < 1e-9 and found.lowered >= 0.95 and found.agreement > 3 * found.random, found
    assert max(reason_shares(synthetic.scorer, synthetic.by_decision('decline'))['first']) < 0.8


@pytest.mark.parametrize('name', SETS)
def test_moving_the_first_reason_lowers_the_pd_of_real_applicants(real_data, tmp_path, name):
    model = explained(tmp_path, real_data / SETS[name], load_contract(f'data/contracts/{name}.yaml'))
    found = faithfulness(model.scorer, model.by_decision('decline'), model.by_decision('approve', 'history'), rows=150, draws=5)
    assert found.error < 1e-9 and found.lowered >= 0.95 and found.lowered_owned >= 0.9 and found.agreement > 3 * found.random, found
    assert max(reason_shares(model.scorer, model.by_decision('decline'))['first']) < 0.8  # a reason that everybody gets explains nothing


def test_a_table_and_one_application_have_the_same_reasons(synthetic):
    scorer, some = synthetic.scorer, take(synthetic.future, slice(60))
    table = scorer.explain(some)
    for i in range(60):
        typed = one(some, i)
        alone = scorer.explain(typed, scorer.plan.record(typed)[None, :])[0]
        assert [{**r, 'effect': r['effect'] and round(r['effect'], 6)} for r in alone] == [
            {**r, 'effect': r['effect'] and round(r['effect'], 6)} for r in table[i]]


def test_reasons_are_adverse_principal_worst_first_and_in_both_languages(synthetic):
    for row in synthetic.scorer.explain(synthetic.by_decision('decline')):
        effects = [r['effect'] for r in row]
        assert 1 <= len(row) <= REASON_LIMIT and effects == sorted(effects, reverse=True) and effects[-1] >= 0.1 * effects[0] > 0
        assert len({r['group'] for r in row}) == len(row)
        assert all(r[k] and '_' not in r[k].split(':')[0] for r in row for k in LANGUAGES), row
        json.dumps(row)


def test_a_direction_is_true_of_the_value_that_it_speaks_of(synthetic):
    reasons, plan, declined = synthetic.scorer.reasons, synthetic.scorer.plan, synthetic.by_decision('decline')
    features, usual = plan.frame(declined), dict(zip(reasons.features, zip(reasons.typical, reasons.average, strict=True), strict=True))
    seen = set()
    for values, row in zip(features, synthetic.scorer.explain(declined), strict=True):
        for reason in (r for r in row if r['feature']):
            place = plan.names.index(reason['feature'])
            value, (typical, average) = float(values[place]), usual[reason['feature']]
            size = abs if reasons.told[place] == 'back' else float
            seen.add(reason['direction'])
            assert (reason['direction'] == 'missing') == np.isnan(value)
            if reason['direction'] in ('higher', 'lower'):
                against = average if typical is None or typical == value else typical
                assert (size(value) > size(against)) == (reason['direction'] == 'higher'), reason
    assert {'higher', 'lower', 'missing', 'different'} <= seen


def test_external_scores_stay_apart_and_every_feature_has_words(synthetic):
    contract, reasons = synthetic.scorer.contract, synthetic.scorer.reasons
    owner = reason_groups(contract, synthetic.scorer.plan)
    assert [owner[f'EXT_SOURCE_{i}'] for i in (1, 2, 3)] == [f'ext_source_{i}' for i in (1, 2, 3)]
    assert reasons.mixed['ext_mean'] == ('EXT_SOURCE_1', 'EXT_SOURCE_2', 'EXT_SOURCE_3') and 'credit_to_income' not in reasons.mixed
    assert all(f in reasons.mixed for f in reasons.features if f.startswith('ext_'))
    assert set(owner.values()) <= set(contract.groups)
    assert all(set(words) >= set(LANGUAGES) for words in (g['words'] for g in contract.groups.values()))
    assert set(columns_owned(reasons, synthetic.scorer.plan, contract)['ext_source_1']) == {'EXT_SOURCE_1'}
    assert columns_behind(reasons, synthetic.scorer.plan)['ext_source_1'] == ['EXT_SOURCE_1']
    assert {'AMT_CREDIT', 'AMT_INCOME_TOTAL'} <= set(columns_behind(reasons, synthetic.scorer.plan)['affordability'])


def test_a_mixture_blames_the_score_that_is_low_or_missing(synthetic):
    scorer, scores = synthetic.scorer, [f'EXT_SOURCE_{i}' for i in (1, 2, 3)]
    reasons = scorer.reasons
    person = {n: v[:1] for n, v in synthetic.future.items()} | {n: np.array([0.7]) for n in scores}
    place = [reasons.sources.index(n) for n in scores]
    named = list(reasons.mixed)

    def blame(feature, **values):
        shares = scorer.mixture.shares(person | {n: np.array([v]) for n, v in values.items()})[0]
        return shares[named.index(feature), place]

    for low in range(3):
        assert blame('ext_mean', **{scores[low]: 0.01}).argmax() == low
        np.testing.assert_allclose(blame('ext_lowest', **{scores[low]: 0.01}), np.eye(3)[low])
    for feature in ('ext_missing', 'ext_2_to_age'):
        np.testing.assert_array_equal(blame(feature, EXT_SOURCE_1=scorer.mixture.usual['EXT_SOURCE_1'], EXT_SOURCE_2=np.nan), [0, 1, 0])
    both = blame('ext_lowest', EXT_SOURCE_2=0.01, EXT_SOURCE_3=0.01)
    assert both[0] == 0 and both[1] > 0.4 and both[2] > 0.4  # one of them alone would not have been let off by the other


@settings(max_examples=examples(25))
@given(st.data())
def test_any_contract_shares_out_all_of_a_mixture_and_a_table_as_one_application(data):
    contract = data.draw(contracts())
    typed = check_frame(contract, data.draw(tables(contract))).frame
    plan, rows = fit_plan(contract, [typed]), frame_rows(typed)
    if not rows:
        return
    parts = np.random.default_rng(rows).normal(size=(rows, len(plan.names) + 1))
    reasons = reasons_from_dict(json.loads(json.dumps(reasons_to_dict(fit_reasons(contract, plan, plan.frame(typed), parts)))), plan.names)
    shares = mixture(reasons, plan).shares(typed)
    assert set(reasons.mixed).isdisjoint(reasons.sources) and (shares >= 0).all()
    np.testing.assert_allclose(shares.sum(axis=2), 1, rtol=0, atol=1e-12)
    np.testing.assert_allclose(reasons.grouped(parts, shares).sum(axis=1), parts.sum(axis=1), rtol=0, atol=1e-9)
    np.testing.assert_array_equal(np.concatenate([mixture(reasons, plan).shares(one(typed, i)) for i in range(rows)]), shares)
    assert len(explain(reasons, plan.frame(typed), parts, shares)) == rows


def test_features_that_the_plan_leaves_out_do_not_matter(synthetic):
    scorer, some = synthetic.scorer, take(synthetic.future, slice(200))
    kept = [n for n in scorer.plan.names if n not in ('ext_mean', 'enquiries', 'ext_to_credit')]
    part = FeaturePlan({n: scorer.plan.outputs[n] for n in kept}, scorer.plan.levels)
    parts = np.random.default_rng(0).normal(size=(200, len(kept) + 1))
    whole = np.zeros((200, len(scorer.plan.names) + 1))
    whole[:, [*map(scorer.plan.names.index, kept), -1]] = parts
    told = [explain(r, p.frame(some), x, mixture(r, p).shares(some)) for p, x in ((part, parts), (scorer.plan, whole))
            for r in [fit_reasons(scorer.contract, p, p.frame(some), x)]]
    left, right = ([[{**r, 'effect': round(r['effect'], 6)} for r in row] for row in rows] for rows in told)
    assert left == right


@pytest.mark.parametrize('name', ['home_credit', 'taiwan', 'pi_m5'])
def test_every_group_of_a_committed_contract_is_worded(root, name):
    contract = load_contract(root / f'data/contracts/{name}.yaml')
    assert {c.group for c in contract.columns.values() if c.group} <= set(contract.groups)
    assert all(set(LANGUAGES) <= set(group.get('words', ())) for group in contract.groups.values())


def test_a_rule_that_fired_is_the_first_reason(synthetic):
    broke = take(synthetic.future, slice(5)) | {'AMT_ANNUITY': np.full(5, 90_000.0), 'AMT_INCOME_TOTAL': np.full(5, 100_000.0)}
    rows = synthetic.scorer.explain(broke)
    assert all(row[0]['group'] == 'debt_ratio' and row[0]['direction'] == 'rule' and len(row) <= REASON_LIMIT for row in rows)
    assert set(judge(synthetic.scorer.policy, np.zeros(5), broke)[0]) == {'refer'}


def test_nobody_is_refused_without_a_reason_even_by_a_stricter_policy(synthetic):
    usual = synthetic.scorer.reasons
    strict = replace(synthetic.scorer, policy=replace(synthetic.scorer.policy, approve_below=0.0, decline_from=0.0),
                     reasons=replace(usual, mean=tuple(m + 0.03 for m in usual.mean)))
    safest = take(synthetic.future, np.argsort(synthetic.scorer.frame(synthetic.future)['pd'])[:150])
    assert set(strict.frame(safest)['decision']) == {'decline'}
    rows = strict.explain(safest)
    assert all(rows)
    plain = [i for i, row in enumerate(rows) if row[0]['group'] == 'overall']
    assert 0 < len(plain) < 150
    for i in plain:
        [reason] = rows[i]
        assert (reason['direction'], reason['feature']) == ('different', None) and reason['effect'] <= 0
        assert reason['en'] == 'Your details taken together: no single one stands out'
        assert reason['es'] == 'El conjunto de sus datos: ninguno destaca por sí solo'
    typed = one(safest, plain[0])
    [alone] = strict.explain(typed, strict.plan.record(typed)[None, :])[0]
    assert alone == rows[plain[0]][0] | {'effect': pytest.approx(rows[plain[0]][0]['effect'], abs=1e-6)}
    assert reason_shares(strict, take(safest, np.array(plain)))['reason'] == ['Your details taken together: no single one stands out']


def test_a_bundle_without_reasons_says_so(tmp_path):
    scorer = load_bundle(small_bundle(tmp_path))
    with pytest.raises(RiskError, match='without reasons'):
        scorer.explain(check_frame(scorer.contract, applications(2)).frame)


@pytest.mark.parametrize('rows', [1, 1000])
def test_an_explanation_costs_little_beside_the_contributions(synthetic, rows):
    "Those of 80 small trees, which are the cheapest there are."
    scorer, some = synthetic.scorer, take(synthetic.future, slice(rows))
    features = scorer.plan.frame(some)
    parts = scorer.predictor.contributions(features)
    told, exact = (min(repeat(work, number=5, repeat=5)) for work in (
        lambda: explain(scorer.reasons, features, parts, scorer.mixture.shares(some)), lambda: scorer.predictor.contributions(features)))
    assert told < 20 * exact


def test_a_batch_gives_those_who_are_not_approved_the_reasons_of_a_record(tmp_path):
    contract = load_contract('data/contracts/home_credit.yaml')
    write_home_credit(tmp_path / 'loans.parquet', 1_200)
    scorer = explained(tmp_path, tmp_path / 'loans.parquet', contract, rows=1_200).scorer
    score_batch(tmp_path / 'loans.parquet', scorer, tmp_path / 'out.parquet', explain='es')
    out, raw = pq.read_table(tmp_path / 'out.parquet').to_pydict(), pq.read_table(tmp_path / 'loans.parquet').to_pylist()
    assert [text is None for text in out['reasons']] == [decision == 'approve' for decision in out['decision']]
    for row in np.flatnonzero(np.array(out['decision']) != 'approve')[:20]:
        assert out['reasons'][row] == '; '.join(r['es'] for r in scorer.record(raw[row], explain=True)['reasons'])
    score_batch(tmp_path / 'loans.parquet', scorer, tmp_path / 'plain.parquet')
    assert 'reasons' not in pq.read_table(tmp_path / 'plain.parquet').column_names
    with pytest.raises(RiskError, match='en or es'):
        score_batch(tmp_path / 'loans.parquet', scorer, tmp_path / 'x.parquet', explain='fr')
