"""Terms and their controller without any framework: ranks are rows of a table."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hvdloss
from hvdloss.comm.communicator import OneProcess, simulate
from hvdloss.errors import ConfigError, ShapeError, UsageError
from hvdloss.losses.ledger import COLUMN, LEDGER_WIDTH
from hvdloss.losses.numpy_ops import NumpyOps
from hvdloss.step.objective import ObjectiveBase
from hvdloss.terms.controller import Controller
from hvdloss.terms.policies import ClassBalance, ImportanceWeights, Proximal, RankWeights
from hvdloss.terms.term import Batch, CommStats, StepStats, Term

OPS = NumpyOps()


class Objective(ObjectiveBase):
    def _named_losses(self):
        return {"mse": lambda y, t: (y - t) ** 2}


def told(objective, prediction, target, losses, weight=None, keys=None, rank=0, size=1, class_axis=None):
    """Ask an objective's terms about a batch of NumPy arrays."""
    objective.controller.reset(rank, size)
    return objective.apply_terms(
        OPS,
        prediction=prediction,
        target=target,
        losses=losses,
        weight=weight,
        keys=keys,
        state=objective.controller.state,
        class_axis=class_axis,
        rank=rank,
        size=size,
    )


def table_of(controller, rows, *, denominators=None, losses=None, communication=None, computation=None):
    """Return what ranks would have told together."""
    rows = np.asarray(rows, dtype=np.float64).reshape(len(rows), controller.width)
    table = np.zeros((len(rows), LEDGER_WIDTH + controller.width))
    table[:, LEDGER_WIDTH:] = rows
    weight = np.ones(len(rows)) if denominators is None else np.asarray(denominators)
    table[:, COLUMN["denominator"]] = table[:, COLUMN["weight"]] = weight
    table[:, COLUMN["numerator"]] = weight * (1.0 if losses is None else np.asarray(losses))
    table[:, COLUMN["elements"]] = weight > 0
    for name, values in (("communication", communication), ("computation", computation)):
        if values is not None:
            table[:, COLUMN[name]] = values
    return table


# -- the protocol -------------------------------------------------------------------------------------


class Count(Term):
    name, unit, width = "count", "elements", 1

    def observe(self, batch):
        return [batch.ops.count(batch.weight > 0)]

    def on_step_end(self, step):
        return step.sums[:, 0]


@pytest.mark.parametrize("terms", [None, "skew", ("skew",), Count(), (Count,), (3,)])
def test_what_is_no_term_is_refused(terms):
    with pytest.raises(ConfigError, match="must be a tuple of terms"):
        Objective("mse", terms=terms)


def test_names_are_unique_and_there():
    with pytest.raises(ConfigError, match="two terms named 'count'"):
        Objective("mse", terms=(Count(), Count()))
    nameless = Count()
    nameless.name = ""
    with pytest.raises(ConfigError, match="Count has no name"):
        Objective("mse", terms=(nameless,))


@pytest.mark.parametrize("price", [-1, math.nan, math.inf, "1", None, True])
def test_a_price_is_a_finite_number(price):
    term = Count()
    term.price = price
    with pytest.raises(ConfigError, match=f"price={price!r} of count"):
        Objective("mse", terms=(term,))
    with pytest.raises(ConfigError, match="of CommunicationCost"):
        hvdloss.CommunicationCost(price=price)


def test_an_act_is_followed_once():
    with pytest.raises(ConfigError, match="two of Proximal"):
        Objective("mse", terms=(hvdloss.DataSkew(classes=2, policies=(Proximal(), Proximal())),))


@pytest.mark.parametrize("sums", [[], [1.0, 2.0], np.zeros((1, 1))])
def test_sums_have_the_width_that_was_declared(sums):
    term = Count()
    term.observe = lambda batch: sums
    with pytest.raises(ConfigError, match=r"Count.observe\(\) gave sums of shape .* width=1"):
        told(Objective("mse", terms=(term,)), *[np.ones(3)] * 3)


@pytest.mark.parametrize("values", [[1.0], [1.0, math.nan], [[1.0, 2.0]], 3.0])
def test_a_term_has_one_finite_value_per_rank(values):
    term = Count()
    term.on_step_end = lambda step: values
    controller = Objective("mse", terms=(term,)).controller
    controller.reset(0, 2)
    with pytest.raises(ConfigError, match=r"Count.on_step_end\(\) must return one finite value per rank"):
        controller.on_step_end(1, table_of(controller, [[1.0], [2.0]]), CommStats())


def test_a_term_without_observe_says_so():
    term = Term()
    term.name, term.width = "lazy", 2
    with pytest.raises(NotImplementedError, match="width=2"):
        told(Objective("mse", terms=(term,)), *[np.ones(3)] * 3)


def test_values_and_prices_reach_the_report():
    term = Count()
    term.price = 0.25
    objective = Objective("mse", terms=(term,))
    weight, penalty, sums = told(objective, *[np.ones((2, 3))] * 3, weight=np.array([0.0, 1, 2]))
    assert penalty is None
    assert [one.tolist() for one in sums] == [[4.0]]
    assert weight.tolist() == [0.0, 1.0, 2.0]  # as it was given
    controller = objective.controller
    controller.reset(0, 2)
    assert controller.reports() == {}
    controller.on_step_end(1, table_of(controller, [[4.0], [6.0]]), CommStats())
    report = controller.reports()["count"]
    assert (report.values, report.total, report.priced, report.unit) == ([4.0, 6.0], 10.0, 2.5, "elements")
    assert objective.settings()["terms.count"] == {"price": 0.25, "policies": []}


def test_sums_that_are_not_finite_stay_here():
    term = Count()
    term.observe = lambda batch: [np.float64(np.nan)]
    _, _, sums = told(Objective("mse", terms=(term,)), *[np.ones(3)] * 3)
    assert sums[0].tolist() == [0.0]


def test_weights_and_penalties_of_several_terms_combine():
    class Doubling(Count):
        has_weights = has_penalty = True

        def weights(self, batch):
            return np.full(batch.losses.shape, 2.0)

        def penalty(self, batch):
            return 0.5

    one, other = Doubling(), Doubling()
    other.name = "other"
    weight, penalty, _ = told(
        Objective("mse", terms=(one, Count.__class__("C", (Count,), {"name": "c"})(), other)),
        *[np.ones(3)] * 3,
    )
    assert weight.tolist() == [4.0] * 3
    assert penalty == 1.0


def test_a_weight_that_does_not_broadcast_is_refused_before_terms_see_it():
    with pytest.raises(ShapeError):
        told(Objective("mse", terms=(Count(),)), *[np.ones((2, 3))] * 3, weight=np.ones(2))


def test_begin_starts_afresh_only_for_other_ranks():
    calls = []
    term = Count()
    term.reset = lambda rank, size: calls.append((rank, size))
    controller = Objective("mse", terms=(term,)).controller
    for rank, size in ((0, 1), (0, 1), (0, 2), (0, 2), (1, 2)):
        controller.reset(rank, size)
    assert calls == [(0, 1), (0, 2), (1, 2)]
    assert controller.size == 2


# -- data skew ----------------------------------------------------------------------------------------


def observe(term, target, losses=None, weight=None, keys=None, class_axis=None, state=None):
    losses = np.zeros(np.shape(target)) if losses is None else losses
    weight = np.ones(losses.shape) if weight is None else np.broadcast_to(weight, losses.shape)
    batch = Batch(
        OPS, None, target, losses, weight, keys, term.state if state is None else state, class_axis, 0
    )
    return batch, term.observe(batch)


@given(
    st.lists(st.tuples(st.integers(0, 4), st.floats(0, 3)), max_size=30),
    st.integers(1, 5),
)
def test_histograms_of_parts_add_up(pairs, parts):
    term = hvdloss.DataSkew(classes=5)
    labels = np.array([label for label, _ in pairs], dtype=np.int64)
    weight = np.array([w for _, w in pairs])
    whole = observe(term, labels, weight=weight)[1]
    pieces = zip(np.array_split(labels, parts), np.array_split(weight, parts), strict=True)
    assert np.allclose(whole, sum(observe(term, y, weight=w)[1] for y, w in pieces))
    assert whole[-1] == 0
    assert whole.sum() == pytest.approx(weight.sum())


def test_labels_of_every_shape():
    tokens = hvdloss.DataSkew(classes=3)
    _, sums = observe(tokens, np.array([[0, 1], [2, 2]]), weight=np.array([[1.0], [0.5]]))
    assert sums.tolist() == [1.0, 1.0, 1.0, 0.0]
    soft = np.array([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    _, sums = observe(tokens, soft, losses=np.zeros(2), weight=np.array([2.0, 1.0]), class_axis=1)
    assert sums.tolist() == [1.0, 1.0, 1.0, 0.0]
    # The class axis is the second, as in PyTorch's (N, C, T).
    _, sums = observe(tokens, soft.T[None], losses=np.zeros((1, 2)), class_axis=1)
    assert sums.tolist() == [0.5, 0.5, 1.0, 0.0]
    several = hvdloss.DataSkew(classes=3, multilabel=True)
    _, sums = observe(several, np.array([[1, 1, 0], [0, 1, 0]]))
    assert sums.tolist() == [1.0, 2.0, 0.0, 0.0]
    keyed = hvdloss.DataSkew(classes=2, of="keys")
    _, sums = observe(keyed, np.zeros((2, 3)), keys=np.array([1, 0]), weight=np.array([1.0, 0, 1]))
    assert sums.tolist() == [2.0, 2.0, 0.0]
    with pytest.raises(UsageError, match="keys="):
        observe(keyed, np.zeros(2))
    labelled = hvdloss.DataSkew(classes=2, label=lambda y: y[:, 0])
    _, sums = observe(labelled, np.array([[1.0, 7.5], [0.0, 3.0]]), losses=np.zeros(2))
    assert sums.tolist() == [1.0, 1.0, 0.0]
    with pytest.raises(ConfigError, match="targets with 4 classes"):
        observe(tokens, np.zeros((2, 4)), losses=np.zeros(2), class_axis=1)


def test_labels_outside_are_counted_unless_they_weigh_nothing():
    term = hvdloss.DataSkew(classes=3)
    _, sums = observe(term, np.array([-100, 1, 3, -1]), weight=np.array([0.0, 1, 1, 1]))
    assert sums.tolist() == [0.0, 1.0, 0.0, 2.0]
    controller = Controller((term,))
    controller.reset(0, 2)
    with pytest.raises(ConfigError, match=r"step 7: 2 label\(s\) outside 0..2 on rank\(s\) 1"):
        controller.on_step_end(7, table_of(controller, [[1, 0, 0, 0], sums]), CommStats())


def test_real_targets_learn_their_bins_from_all_ranks():
    targets = [np.random.default_rng(rank).normal(rank, 1, 400) for rank in range(3)]
    term = hvdloss.DataSkew(bins=10, measure="w1", warmup=2)
    controller = Controller((term,))
    controller.reset(0, 3)
    for step in range(1, 4):
        rows = [
            sum(observe(term, half)[1] for half in np.array_split(targets[rank], 2)) * (rank < 2)
            for rank in range(3)
        ]
        controller.on_step_end(step, table_of(controller, rows), CommStats())
        if step == 1:
            assert term.edges is None
            assert term.skew.tolist() == [0.0] * 3
    both = np.concatenate(targets[:2])
    assert np.abs(term.edges - np.quantile(both, np.arange(1, 10) / 10)).max() < 0.15
    assert term.counts.sum() == 800
    assert term.skew[2] == 0  # without data
    assert np.abs(term.skew[:2] - 0.5).max() < 0.06  # half the distance of two normals one apart
    edges = term.edges.copy()
    assert controller.reports()["skew"].details["edges"] == edges.tolist()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "either classes= .* or bins="),
        ({"classes": 3, "bins": 3}, "either classes= .* or bins="),
        ({"classes": 1}, "classes=1"),
        ({"bins": 2.5}, "bins=2.5"),
        ({"classes": True}, "classes=True"),
        ({"classes": 3, "measure": "kl"}, "measure='kl'"),
        ({"classes": 3, "of": "rank"}, "of='rank'"),
        ({"bins": 3, "of": "keys"}, "bins= of DataSkew is for real targets"),
        ({"bins": 3, "multilabel": True}, "bins= of DataSkew is for real targets"),
        ({"classes": 3, "window": 2, "half_life": 3.0}, "not both"),
        ({"classes": 3, "half_life": -1.0}, "half_life"),
        ({"classes": 3, "label": "first"}, "label='first'"),
        ({"bins": 3, "warmup": 0}, "warmup=0"),
        ({"classes": 3, "price": -1}, "price=-1"),
    ],
)
def test_arguments_of_data_skew(arguments, words):
    with pytest.raises(ConfigError, match=words):
        hvdloss.DataSkew(**arguments)


def closed(term, counts, losses=None, rank=0):
    """Close a step whose histograms are these; return the controller."""
    controller = Controller((term,))
    controller.reset(rank, len(counts))
    rows = np.concatenate([counts, np.zeros((len(counts), 1))], axis=1)
    controller.on_step_end(
        1,
        table_of(controller, rows, denominators=np.asarray(counts).sum(1), losses=losses),
        CommStats(),
    )
    return controller


COUNTS = np.array([[8.0, 2.0, 0.0], [1.0, 4.0, 0.0], [0.0, 0.0, 0.0]])


def test_importance_weights_reach_the_batches():
    for target, goal in (("uniform", [1, 1, 1]), ("global", [9, 6, 0]), ([0.2, 0.8, 0.0], [0.2, 0.8, 0])):
        term = hvdloss.DataSkew(classes=3, policies=(ImportanceWeights(target, clip=None),))
        controller = closed(term, COUNTS, rank=0)
        labels = np.array([0] * 8 + [1] * 2)
        batch, _ = observe(term, labels)
        weight = term.weights(batch)
        share = weight[labels == 1].sum() / weight.sum()
        assert share == pytest.approx(goal[1] / (goal[0] + goal[1]))
        assert weight.mean() == pytest.approx(1)
        sizes = controller.reports()["skew"].details["effective_sample_size"]
        assert sizes[0] == pytest.approx(weight.sum() ** 2 / (weight**2).sum() / 10)
        assert sizes[2] == 1.0


def test_class_balance_is_of_all_ranks():
    for kind, expected in (("inverse", 9 / 6), ("effective", (1 - 0.9**9) / (1 - 0.9**6))):
        term = hvdloss.DataSkew(classes=3, policies=(ClassBalance(kind, beta=0.9),))
        tables = []
        for rank in range(3):
            closed(term, COUNTS, rank=rank)
            batch, _ = observe(term, np.array([0, 1]))
            tables.append(term.weights(batch))
        assert tables[0][1] / tables[0][0] == pytest.approx(expected)
        assert np.array_equal(tables[0], tables[1])


def test_multilabel_weights_are_per_label():
    term = hvdloss.DataSkew(classes=3, multilabel=True, policies=(ClassBalance(),))
    closed(term, COUNTS)
    batch, _ = observe(term, np.array([[1, 0, 1], [0, 1, 0]]))
    weight = term.weights(batch)
    table = term.policies[0].table(term.counts, 0)
    assert np.allclose(weight, [[table[0], 1, table[2]], [1, table[1], 1]])


def test_rank_weights_favour_the_worse():
    for kind in ("dro", "agnostic", "q_fair"):
        policy = RankWeights(kind, step=0.1, q=2.0)
        term = hvdloss.DataSkew(classes=3, policies=(policy,))
        controller = closed(term, COUNTS, losses=[1.0, 3.0, 0.0])
        assert policy.factors[1] > policy.factors[0]
        data = COUNTS.sum(1) / COUNTS.sum()
        if kind != "q_fair":
            assert (policy.factors * data).sum() == pytest.approx(1, abs=0.2)
        else:
            assert policy.factors[1] / policy.factors[0] == pytest.approx(9)
        batch, _ = observe(term, np.array([0, 1]))
        assert np.allclose(term.weights(batch), policy.factors[0])
        assert controller.reports()["skew"].details["rank_weights"] == policy.factors.tolist()


def test_rank_weights_without_any_loss_stay_as_they_are():
    policy = RankWeights()
    closed(hvdloss.DataSkew(classes=3, policies=(policy,)), np.zeros((3, 3)))
    assert policy.factors.tolist() == [1.0] * 3


def test_the_proximal_pull_is_priced_by_the_term():
    policy = Proximal()
    term = hvdloss.DataSkew(price=0.5, classes=3, policies=(policy,))
    closed(term, COUNTS, rank=1)
    assert policy.mu == pytest.approx(0.5 * term.skew[1] / math.log(2))
    assert policy.mu > 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ImportanceWeights("local"), "target='local'"),
        (lambda: ImportanceWeights([0.0, 0.0]), "no weight on any bin"),
        (lambda: ImportanceWeights([-1.0, 2.0]), "at least 0"),
        (lambda: ImportanceWeights([[1.0]]), "at least 0"),
        (lambda: ImportanceWeights(clip=0.5), "clip=0.5"),
        (lambda: ClassBalance("rare"), "kind='rare'"),
        (lambda: ClassBalance(beta=1.0), "beta=1.0"),
        (lambda: RankWeights("worst"), "kind='worst'"),
        (lambda: RankWeights(step=0), "step=0"),
        (lambda: RankWeights(q=-1), "q=-1"),
        (lambda: RankWeights(smoothing=1), "smoothing=1"),
        (lambda: Proximal(-0.1), "strength=-0.1"),
    ],
)
def test_arguments_of_the_acts_on_skew(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_a_target_of_another_length_is_told_at_the_first_step():
    with pytest.raises(ConfigError, match="2 numbers, but there are 3 bins"):
        closed(hvdloss.DataSkew(classes=3, policies=(ImportanceWeights([1.0, 1.0]),)), COUNTS)


# -- communication ------------------------------------------------------------------------------------


def exchange(controller, step, exposed, comm_stats=None, **columns):
    rows = np.zeros((len(exposed), controller.width))
    table = table_of(controller, rows, communication=exposed, **columns)
    controller.on_step_end(step, table, comm_stats or CommStats(messages=2, bytes=1000, full_bytes=1000))
    return controller.reports()["communication"]


def test_waiting_is_told_apart_from_moving_bytes():
    controller = Controller((hvdloss.CommunicationCost(price=2.0),))
    controller.reset(0, 3)
    exchange(controller, 1, [0.0, 0.0, 0.0])
    report = exchange(controller, 2, [0.5, 0.2, 0.3])
    assert report.values == [0.5, 0.2, 0.3]
    assert report.priced == pytest.approx(2.0)
    assert report.details["moving"] == 0.2
    assert np.allclose(report.details["waiting"], [0.3, 0, 0.1])
    assert (report.details["bytes"], report.details["messages"]) == (1000, 2)


def test_exchanges_of_parameters_fit_the_link():
    term = hvdloss.CommunicationCost()
    controller = Controller((term,))
    controller.reset(0, 2)
    previous = None
    for step in range(1, 40):
        bytes = 10**6 * (1 + step % 3)
        comm_stats = CommStats(messages=2, bytes=bytes, full_bytes=bytes, steps=4, parameters=True)
        exposed = 0.0 if previous is None else 2e-4 + previous / 1e8  # of the exchange before
        exchange(controller, step, [exposed + 0.01, exposed], comm_stats)
        previous = bytes
    fit = term.link.fit()
    assert fit.alpha == pytest.approx(1e-4, rel=0.05)
    assert fit.beta == pytest.approx(1e8, rel=0.05)


def test_the_spread_is_that_of_the_exchange_before():
    term = hvdloss.CommunicationCost()
    controller = Controller((term,))
    controller.reset(1, 2)
    comm_stats = CommStats(messages=1, bytes=8, full_bytes=8, steps=2, parameters=True)
    # Moves (1, 0) and (0, 1) of weight 1 and 3: mean (0.25, 0.75), squared length 0.625.
    table = table_of(controller, np.zeros((2, 0)), denominators=[1.0, 3.0])
    table[:, COLUMN["drift_sqnorm"]] = [1.0, 3.0]
    controller.on_step_end(1, table, comm_stats)
    assert math.isnan(term.drift)
    table[:, COLUMN["mean_update_sqnorm"]] = [0.625, 99.0]  # rank 0's counts on all ranks
    controller.on_step_end(2, table, comm_stats)
    assert term.drift == pytest.approx(1 / 0.625 - 1)


def test_calibration_is_alike_on_all_ranks_and_done_once():
    def work(communicator):
        term = hvdloss.CommunicationCost(calibrate=True)
        controller = Controller((term,))
        controller.reset(communicator.rank, communicator.size)
        controller.prepare(communicator)
        state = term.link.state_dict()
        controller.prepare(OneProcess())
        assert term.link.state_dict() == state
        return state

    first, *others = simulate(3, work)
    assert all(other == first for other in others)
    assert hvdloss.CommunicationCost().prepared_state() is None


def test_closed_steps_know_their_losses():
    controller = Controller((Count(),))
    table = table_of(controller, [[1.0], [1.0]], denominators=[4.0, 0.0], losses=[0.5, 0.0])
    step = StepStats(1, 0, table[:, :LEDGER_WIDTH], table[:, LEDGER_WIDTH:], CommStats())
    assert step.losses[0] == 0.5
    assert math.isnan(step.losses[1])
    assert step.loss == 0.5
    nobody = StepStats(1, 0, np.zeros((2, LEDGER_WIDTH)), np.zeros((2, 1)), CommStats())
    assert math.isnan(nobody.loss)
    assert nobody.size == 2
