"""Phase 1: choose a bitwidth for each layer under a budget."""

import copy
from typing import TYPE_CHECKING

from torch import nn

from sdq import plugins
from sdq.batches import seeded
from sdq.calibration import calibrate_
from sdq.checkpoint import Checkpoint
from sdq.config import SearchConfig
from sdq.cost import Budget, Constraint
from sdq.errors import RequestError
from sdq.policy import BitwidthPolicy
from sdq.projection import check_reachable
from sdq.quant_model import QuantModel
from sdq.search_problem import SearchProblem
from sdq.search_space import SearchSpace
from sdq.train import Loader, Watcher

if TYPE_CHECKING:  # it imports half of torch: only who trains waits for it
    from lightning_fabric import Fabric


def search(
    qmodel: QuantModel,
    loader: Loader,
    *,
    budget: Budget,
    teacher: nn.Module | None = None,
    config: SearchConfig | None = None,
    method: str = "sdq",
    fabric: "Fabric | None" = None,
    checkpoint: Checkpoint | None = None,
    watch: Watcher | None = None,
) -> BitwidthPolicy:
    """Choose a policy within the budget.

    Args:
        qmodel: a quantized model; a copy of it is trained. It is left as it is, or with
            ``config.keep_weights`` gets weights, statistics and scales of that copy, but not yet
            the policy.
        loader: of ``(images, labels)``, with a length.
        budget: what the policy may cost; it is never exceeded.
        teacher: a float network whose soft labels are learned; None learns the hard labels, whose
            noise hides more of what a bit is worth.
        config: of the search.
        method: a file of ``sdq/search_methods``: ``sdq``, or what it is compared with.
        fabric: device and precision.
        checkpoint: where to save after each epoch, and to resume from.
        watch: called after every step.

    Raises:
        RequestError: no policy fits the budget (the message gives the reachable range), or the
            method is unknown or cannot decide what is asked.
        RunError: the loss became NaN or infinite.

    Source: Huang et al., SDQ, ICML 2022, section 3.2; the other methods name theirs.
    """
    config = config or SearchConfig()
    space, constraints = check_search(qmodel, budget, config, method)
    if not space.units:
        return qmodel.policy
    searched = copy.deepcopy(qmodel)
    if fabric is not None:  # which methods without a training loop do not look at
        searched.to(fabric.device)
    problem = SearchProblem(
        searched, loader, space, constraints, config, teacher, fabric, checkpoint, watch
    )
    with seeded(config.seed, "choose"):  # what a shuffling DataLoader gives first
        if not qmodel.calibrated:
            calibrate_(searched, loader)
        picks: list[int] = plugins.load("sdq.search_methods", method).choose(problem)
    if config.keep_weights and config.train_weights:
        _take_weights_(qmodel, searched)
    return space.policy_of(picks)


def _take_weights_(qmodel: QuantModel, searched: QuantModel) -> None:
    """Take a search's weights, statistics and scales; those of searched layers are fitted anew."""
    own = qmodel.state_dict()
    shared = {name: tensor for name, tensor in searched.state_dict().items() if name in own}
    # not strict: a searched layer has a quantizer for each bitwidth there
    qmodel.load_state_dict(shared, strict=False)
    for bits in qmodel.policy:
        if bits.searched:
            quantizer = qmodel.new_weight_quantizer(bits.name, bits.weight_bits)
            qmodel.set_weight_quantizer_(bits.name, quantizer)


def check_search(
    qmodel: QuantModel, budget: Budget, config: SearchConfig, method: str = "sdq"
) -> tuple[SearchSpace, list[Constraint]]:
    """Return what a search would decide and its constraints, without searching.

    Raises:
        RequestError: as of :func:`search`.
    """
    chosen = plugins.load("sdq.search_methods", method)
    space = SearchSpace.of(qmodel, config.granularity)
    if space.act_units and not chosen.CHOOSES_ACTS:
        raise RequestError(
            f"search: method {method} chooses weight bitwidths only; fix the activations' "
            "(--act-bits), or use sdq or interpolate"
        )
    if config.granularity == "channel" and not chosen.CHOOSES_CHANNELS:
        raise RequestError(
            f"search: method {method} measures one unit after another, and single channels are "
            "too many; use --granularity layer"
        )
    if config.granularity == "channel" and qmodel.config.weight_scale != "per_channel":
        raise RequestError(
            "search: granularity channel must stand with per_channel scales: channels of different "
            f"bitwidths have scales of their own, got {qmodel.config.weight_scale}"
        )
    if config.start == "hessian" and space.act_units:
        raise RequestError(
            "search.start: must be budget or highest where activations' bits are learned, got "
            "hessian, which knows weights alone"
        )
    constraints = budget.constraints(space)
    check_reachable(constraints)
    return space, constraints


def uniform_policy(qmodel: QuantModel, budget: Budget) -> BitwidthPolicy:
    """Return the policy with the same bits in every searched layer, the most the budget allows.

    Raises:
        RequestError: not even the lowest candidate fits.
    """
    return search(qmodel, [], budget=budget, method="uniform")
