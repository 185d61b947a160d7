r"""Rounds in which bits are learned: every client's gradient, one decision for all.

The server has one log-odds :math:`\theta` for each step between the candidate bitwidths of a unit,
and each unit's active pair. In a round every client goes on from them as a search in one place does
(:mod:`sdq.gradient_search`): it trains the weights with the method's loss and :math:`\theta` with
the search's under the budget of all, and leaves pairs that are decided for it, as many as it comes
to. The server averages,

.. math:: \theta \leftarrow \sum_k \frac{n_k}{n}\, \theta_k, \qquad
          \log \lambda_Q \leftarrow \sum_k \frac{n_k}{n} \log \lambda_{Q,k},

which of probabilities :math:`\beta = \sigma(\theta)` and prices is the geometric mean of the odds
and of the prices; and then decides, once and for all clients, which pair of a unit is active: the
highest whose mean probability is above the threshold, where a client that left a pair downwards
counts with the least log-odds there are.

The course of the expected cost (a line from its first value to the budget) and the temperature
depend on the round alone. In a round a client holds its own expected cost on that line with a price
of its own, so that what it adds to the mean is which layers it would rather give the bits to, and
not how hard its images are. Its :math:`\theta` can go equally far in a round however many steps it
makes; its images give it its weight.

Source: SDQ (Huang et al., ICML 2022) has one place. No paper that we know defines it across
clients; docs/federated-bits.md says what is our choice.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fl.method import Aggregated, Method, Progress, Server
from fl.network import Network, Outputs
from fl.quant_network import distinct_acts, set_act_scales_
from fl.quant_rounds import QuantClient, QuantRounds, QuantRoundsConfig
from fl.record import MOST, Record, Reply, Tensors, misfit
from sdq.config import Config, SearchConfig
from sdq.cost import Constraint
from sdq.errors import RequestError
from sdq.gradient_search import LOG_PRICE_RANGE, BitwidthSearch
from sdq.quant_model import QuantModel
from sdq.search_problem import SearchProblem
from sdq.search_space import SearchSpace
from sdq.stochastic import LARGEST_LOG_ODDS, Mixing, logit

GROUP = "bits"

MOST_LOG_ODDS = 1e3
"""No search leads further: a step between candidates begins at 10 at most, and stops at 4."""

FURTHEST = 0.5
"""Pairs that a client's theta can cross in a step: clients may have few steps, and one batch is to
decide nothing."""


class SearchRoundsConfig(QuantRoundsConfig):
    """What server and clients agree on while bits are learned.

    Args:
        search: of phase 1; its ``epochs`` and ``keep_weights`` do not count.
        mixing: draw one of the two bitwidths of a pair, or interpolate.
        limits: of the constraints, by name.
    """

    search: SearchConfig = SearchConfig()
    mixing: Mixing = "draw"
    limits: dict[str, float] = {}  # noqa: RUF012 - pydantic copies defaults


class SearchClient(QuantClient):
    """The inner client, and the bits' own gradient."""

    method: "SearchRounds"

    def start(self) -> None:
        """Take up the bits that came."""
        context, objective = self.context, self.method.objective
        bits, search = objective.bits, self.method.config.search
        self.method.load_bits_(context.received.tensors[GROUP])
        # frozen copies that a method makes predict with the more probable bits
        bits.eval()
        bits.draw_()
        super().start()
        bits.train()
        bits.generator = context.generator("gumbel")
        # not before the method has started: it may have said what is trained on
        epochs = sum(phase.epochs for phase in self.phases())
        self.done, self.of_round = 0, epochs * _count(self.batches(0))
        rounds = context.config.rounds
        objective.prices.pace_(self.of_round * rounds)
        objective.cool_(context.round / rounds)
        reach = min(12 / (self.of_round * rounds), FURTHEST) * objective.one_pair
        lr = search.bitwidth_lr or reach
        self.optimizer: torch.optim.Optimizer | None = None
        if bits.theta.numel():
            self.optimizer = torch.optim.AdamW(
                [bits.theta], lr=lr, betas=(0.9, 0.95), weight_decay=0.0
            )

    def forward(self, images: Tensor) -> Outputs:
        """Draw, and return the inner outputs."""
        self.method.objective.bits.draw_()
        return super().forward(images)

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """Return the mixed loss and the priced regularizer."""
        return super().loss(outputs, labels) + self.method.objective.regularizer()

    def after_step(self) -> None:
        """Step along the bits' gradient; leave decided pairs; hold the cost."""
        super().after_step()
        objective, rounds = self.method.objective, self.context.config.rounds
        search = self.method.config.search
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        objective.bits.move_(search.decay_threshold, search.rise_threshold)
        self.done += 1
        progress = (self.context.round + min(self.done / self.of_round, 1.0)) / rounds
        objective.prices.steer_(objective.usage, progress)

    def finish(self, progress: Progress) -> Record:
        """Send the bits' log-odds and the prices."""
        found = super().finish(progress)
        bits = self.method.objective.bits
        bits.generator = None
        bits.eval()  # what follows is evaluation
        bits.draw_()
        sent = self.method.bits_state()
        self.context.memory.tensors[GROUP] = sent
        return Record({**found.tensors, GROUP: sent}, found.values)


class SearchRounds(QuantRounds):
    """The search around a method.

    Args:
        config: of the phase.
        inner: the method.
        model: the float network.
        space: what is decided.
        constraints: of the budget of all.
    """

    config_type: ClassVar[type[Config]] = SearchRoundsConfig
    client_type = SearchClient

    def __init__(
        self,
        config: SearchRoundsConfig,
        inner: Method,
        model: nn.Module,
        space: SearchSpace,
        constraints: Sequence[Constraint],
    ) -> None:
        super().__init__(config, inner, model)
        self.space, self.constraints = space, list(constraints)
        self.remembered: frozenset[int] = frozenset()
        """Clients whose bits, as they last sent them, the server is to keep."""

    @property
    def objective(self) -> BitwidthSearch:
        """The search in the network of this process."""
        assert self._objective is not None
        return self._objective

    _objective: BitwidthSearch | None = None

    def extend_(self, network: Network, generator: torch.Generator) -> None:
        """Let the shared model draw its bits; a client's personal one has the most of each."""
        super().extend_(network, generator)
        qmodel = network.model
        assert isinstance(qmodel, QuantModel)
        problem = SearchProblem(qmodel, [], self.space, self.constraints, self.config.search)
        self._objective = BitwidthSearch(problem, self.config.mixing, steps=1)
        set_act_scales_(qmodel, {})
        self._objective.bits.eval()
        self._objective.bits.draw_()

    def widths(self) -> dict[str, tuple[int, ...]]:
        """Return an activation's candidates, or its bits where they are fixed."""
        assert self.template is not None
        learned = {unit.name: unit.choices for unit in self.space.act_units}
        acts = distinct_acts(self.template)
        return {path: learned.get(path, (int(q.bits),)) for path, q in acts.items()}  # type: ignore[arg-type]

    def bits_state(self) -> Tensors:
        """Return log-odds, active pairs and prices: what is sent, and what the server keeps."""
        bits, prices = self.objective.bits, self.objective.prices
        found = {"theta": bits.theta, "level": bits.level, "log_price": prices.log_price,
                 "off": prices.off, "first_usage": prices.first_usage}  # fmt: skip
        return {name: t.detach().cpu().clone() for name, t in found.items()}

    @torch.no_grad()
    def load_bits_(self, tensors: Tensors) -> None:
        """Take up what :meth:`bits_state` gave.

        Raises:
            RequestError: they are of another search.
        """
        state = self.bits_state()
        for name, tensor in tensors.items():
            if name not in state or tensor.shape != state[name].shape:
                raise RequestError(
                    f"bits: {name!r} must be as in this search, {tuple(state[name].shape)}, got "
                    f"{tuple(tensor.shape)}; server and client must have the same request"
                )
        bits, prices = self.objective.bits, self.objective.prices
        bits.theta.copy_(tensors["theta"])
        bits.level.copy_(tensors["level"])
        prices.log_price.copy_(tensors["log_price"])
        prices.off.copy_(tensors["off"])
        prices.first_usage.copy_(tensors["first_usage"])

    def start_server(self, server: Server) -> None:
        """Begin the search next to the budget, or where its configuration says."""
        super().start_server(server)
        server.memory.tensors[GROUP] = self.bits_state()

    def send(self, server: Server, client: int) -> Record:
        """Send the bits, beside what the inner method sends."""
        found = super().send(server, client)
        return Record({**found.tensors, GROUP: server.memory.tensors[GROUP]}, found.values)

    def misfit(self, server: Server, reply: Reply) -> str | None:
        """Look at the bits, beside what the inner method looks at."""
        known, sent = server.memory.tensors[GROUP], reply.record.tensors.get(GROUP, {})
        return misfit(sent, known) or self._out_of_range(sent) or super().misfit(server, reply)

    def _out_of_range(self, sent: Tensors) -> str | None:
        """Return which of a client's numbers no training leads to, or None."""
        top = float(self.objective.bits.top.max()) if len(self.objective.bits) else 0.0
        ranges = {
            "theta": (-MOST_LOG_ODDS, MOST_LOG_ODDS), "level": (0.0, top),
            "log_price": LOG_PRICE_RANGE, "off": (-1.0, 1.0), "first_usage": (0.0, MOST),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            found, slack = sent[name].double(), 1e-3
            if bool(((found < low - slack) | (found > high + slack)).any()):
                return f"{name!r} must be from {low:g} to {high:g}"
        return None

    def aggregate(self, server: Server, replies: Sequence[Reply]) -> Aggregated:
        """Average weights as the method does and bits by images; decide which pairs are left."""
        found = super().aggregate(server, replies)
        weights = [float(reply.num_examples) for reply in replies]
        sent = [reply.record.tensors[GROUP] for reply in replies]
        for reply in replies:
            if reply.client in self.remembered:
                server.memory.tensors[last_sent(reply.client)] = reply.record.tensors[GROUP]
        self.load_bits_(self._averaged(server, sent, weights))
        self._decide_(server)
        return found

    def _averaged(self, server: Server, sent: Sequence[Tensors], weights: list[float]) -> Tensors:
        """Return the clients' mean, and the pair that it leaves each unit at."""
        bits, before = self.objective.bits, server.memory.tensors[GROUP]["level"]
        higher = torch.arange(1, bits.theta.shape[1] + 1)  # each pair's candidate
        left = torch.tensor(-LARGEST_LOG_ODDS)
        mean = server.mean(
            [
                {
                    **tensors,
                    "kept": tensors["theta"].where(higher <= tensors["level"][:, None], left),
                }
                for tensors in sent
            ],
            weights,
        )
        kept = mean.pop("kept")
        left_by_few = kept > logit(self.config.search.decay_threshold)
        least = torch.ones(len(bits), 1, dtype=torch.long)  # there are units without a pair
        level = torch.cat([least, left_by_few * higher], 1).amax(1).minimum(bits.top.cpu())
        # a pair that most have only come to holds what they learned, but no more than at its entry
        entered = kept.where(level[:, None] >= before[:, None], kept.clamp_max(bits.entry))
        return {
            **mean,
            "level": level,
            "theta": entered.where(higher == level[:, None], mean["theta"]),
        }

    def _decide_(self, server: Server) -> None:
        objective, search = self.objective, self.config.search
        bits = objective.bits
        with torch.no_grad():
            probabilities = bits.probabilities()
            usage = [float(cost(probabilities)) for cost in objective.costs]
            expected = bits.expected_bits().tolist()
        progress = round((server.round + 1) / server.config.rounds, 4)
        prices = objective.prices().tolist()
        course = server.memory.values.setdefault(GROUP, [])
        server.memory.values[GROUP] = [*course, {
            "trajectory": [[progress, *(round(b, 3) for b in expected)]],
            "price_trajectory": [[progress, *(float(f"{x:.4g}") for x in (*usage, *prices))]],
            "budget_use": {c.name: u for c, u in zip(self.constraints, usage, strict=True)},
            "lambda_q": {c.name: p for c, p in zip(self.constraints, prices, strict=True)},
            "bits_and_beta": {
                u.name: [u.choices[k], round(b, 4)]
                for u, k, b in zip(
                    self.space.units, bits.level.tolist(), bits.beta().tolist(), strict=True
                )
            },
        }]  # fmt: skip
        bits.move_(search.decay_threshold, search.rise_threshold)
        server.memory.tensors[GROUP] = self.bits_state()

    def utilities_of(self, tensors: Tensors) -> list[list[float]]:
        """Return the log-odds of each unit's candidates, of the server's bits or a client's."""
        self.load_bits_(tensors)
        return self.objective.bits.utilities()


def last_sent(client: int) -> str:
    """Return the group of the server's memory that has a client's own bits."""
    return f"{GROUP}:{client}"


def _count(loader: Any) -> int:
    return max(len(loader), 1)
