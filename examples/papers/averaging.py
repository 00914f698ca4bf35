"""Claims about when to average and what: a single merge, QSR, MT-DAO."""

from __future__ import annotations

from decentral.inner import SGD, QHAdam
from decentral.journal import Synced
from decentral.protocols import DDP, MTDAO, QSR, LocalSGD, MatchedRandom, SingleMerge
from examples.papers.runner import (
    Findings,
    alone,
    bytes_sent,
    clusters,
    equal,
    loss_of,
    outcome_of,
    replicas,
    run_of,
)


def single_merge(seed: int) -> Findings:
    """Sparse gossip (R = 0.2) and one merge against averaging every round; 16 workers, Dirichlet 0.1, 30 x 20 steps.

    The locals are the workers of the same gossip without the merge. One shot is a merge of workers that never talked.
    Holds if the merged accuracy is at least 95 % of the all-reduce's, the locals' mean is below 80 % of the merged, and
    the merged is above one shot.
    """
    task, fleet, inner = clusters(seed, alpha=0.1), equal(16), SGD(lr=0.05)
    merged = run_of(SingleMerge(period=20, rate=0.2), seed, 600, fleet, task, inner)
    gossip = merged.model_copy(update={"rule": SingleMerge(period=20, rate=0.2, merge_at_end=False)})
    reference = merged.model_copy(update={"rule": LocalSGD(period=20)})
    often = merged.model_copy(update={"rule": SingleMerge(period=20, rate=1.0)})
    silent = merged.model_copy(update={"rule": SingleMerge(period=20, rate=0.0)})
    single = merged.model_copy(update={"rule": LocalSGD(period=600), "fleet": equal(1)})
    once, every = outcome_of(merged), outcome_of(reference)
    accuracy, averaged, shot = (each.after["accuracy"] for each in (once, every, outcome_of(silent)))
    local = replicas(gossip, outcome_of(gossip), "accuracy")
    return Findings(
        {
            "accuracy, merged once": accuracy,
            "accuracy, locals": local,
            "accuracy, merged once, every pair in every round": outcome_of(often).after["accuracy"],
            "accuracy, averaged every round": averaged,
            "accuracy, one shot": shot,
            "accuracy, one worker": outcome_of(single).after["accuracy"],
            "merged / every round, bytes": bytes_sent(once) / bytes_sent(every),
        },
        {
            "merged >= 95 % of all-reduce": accuracy >= 0.95 * averaged,
            "locals < 80 % of merged": local < 0.8 * accuracy,
            "merged > one shot": accuracy > shot,
        },
    )


def qsr(seed: int) -> Findings:
    """QSR against constant H = 4, its own first phase; local AdamW on a cosine, four workers, 240 steps.

    alpha = 0.006 at a peak learning rate of 0.003, so phases begin to grow at once. Controls of about as many rounds as
    QSR has: constant H, and QSR's own phases in random order. Holds if the loss is no higher than under H = 4 with
    fewer bytes, and below both controls.
    """
    fleet, schedule = equal(4), QSR(base=4, alpha=0.006)
    run = run_of(LocalSGD(period=schedule), seed, 240, fleet)
    grown = outcome_of(run)
    constant = outcome_of(run.model_copy(update={"rule": LocalSGD(period=4)}))
    rounds = sum(isinstance(record, Synced) and record.worker == 0 for record in grown.records)
    longer = run.model_copy(update={"rule": LocalSGD(period=round(240 / rounds))})
    shuffled = run.model_copy(update={"rule": LocalSGD(period=MatchedRandom(schedule=schedule))})
    loss, reference, matched, random = grown.after["loss"], constant.after["loss"], loss_of(longer), loss_of(shuffled)
    return Findings(
        {
            "loss, QSR": loss,
            "loss, H = 4": reference,
            "loss, constant H of as many rounds": matched,
            "loss, QSR's phases shuffled": random,
            "loss, one worker": alone(run),
            "rounds of QSR": float(rounds),
            "QSR / H = 4, bytes": bytes_sent(grown) / bytes_sent(constant),
        },
        {
            "no higher than H = 4": loss <= reference,
            "below constant H": loss < matched,
            "below shuffled": loss < random,
        },
    )


def mt_dao(seed: int) -> Findings:
    """MT-DAO (beta 0.99, weight 0.9) against DDP and local Adam (beta 0.9); four workers, K = 32, 256 steps.

    All with QHAdam, of which weight 1 is Adam, at the same learning rate and beta2; DDP also with MT-DAO's momentum.
    There is no outer optimiser. Holds if MT-DAO's loss is at most 1 % above DDP's with Adam and below local Adam's, at
    a tenth of DDP's bytes.
    """
    fields = {"lr": 3e-3, "warmup_steps": 20, "schedule": "cosine", "clip_norm": 1.0}
    slow, quick = QHAdam(decays=(0.99,), weights=(0.9,), **fields), QHAdam(decays=(0.9,), weights=(1.0,), **fields)
    fleet = equal(4)
    run = run_of(MTDAO(period=32), seed, 256, fleet, inner=slow)
    mixed = outcome_of(run)
    parallel = outcome_of(run.model_copy(update={"rule": DDP(), "inner": quick}))
    loss, reference = mixed.after["loss"], parallel.after["loss"]
    local = loss_of(run.model_copy(update={"inner": quick}))
    share = bytes_sent(mixed) / bytes_sent(parallel)
    return Findings(
        {
            "loss, MT-DAO": loss,
            "loss, DDP with Adam": reference,
            "loss, DDP with MT-DAO's momentum": loss_of(run.model_copy(update={"rule": DDP()})),
            "loss, local Adam": local,
            "loss, one worker with MT-DAO's momentum": alone(run),
            "loss, one worker with Adam": alone(run.model_copy(update={"inner": quick})),
            "MT-DAO / DDP, bytes": share,
        },
        {
            "within 1 % of DDP": loss <= 1.01 * reference,
            "below local Adam": loss < local,
            "bytes <= 1/10": share <= 0.1,
        },
    )
