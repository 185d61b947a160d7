r"""FedNova: clients that take more steps do not count for more.

.. math:: \bar w \leftarrow \bar w + \tau_{eff} \sum_k p_k \frac{w_k - \bar w}{\lVert a_k\rVert_1},
          \qquad \tau_{eff} = \sum_k p_k \lVert a_k\rVert_1

where :math:`\lVert a_k\rVert_1` is how often client k's gradients entered its weights: its number
of steps, or more with momentum. For Adam, to which the theory does not apply, it is the steps.

Source: Wang et al., "Tackling the Objective Inconsistency Problem in Heterogeneous Federated
Optimization", NeurIPS 2020, equation 6 and section 4, https://arxiv.org/abs/2007.07481.
"""

from collections.abc import Sequence

from fl.composition import refusals
from fl.config import FederationConfig
from fl.method import Aggregated, Client, Method, Progress, Server
from fl.record import Record, Reply, no_number
from sdq.errors import RequestError

VALUE = "fednova"


def accumulated(steps: int, momentum: float) -> float:
    r"""Return :math:`\lVert a\rVert_1 = \sum_{i=1}^{\tau} (1 - \rho^i) / (1 - \rho)`.

    >>> accumulated(3, 0.0), accumulated(2, 0.5)
    (3.0, 2.5)
    """
    rho = momentum
    return (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)


class FedNovaClient(Client):
    """Plain training, counted."""

    def finish(self, progress: Progress) -> Record:
        """Tell how often gradients entered the weights."""
        config = self.context.config
        momentum = config.momentum if config.optimizer == "sgd" else 0.0
        return Record({}, {VALUE: accumulated(progress.steps, momentum)})


class FedNova(Method):
    """FedAvg of normalised changes."""

    client_type = FedNovaClient
    refuses = refusals(
        aggregation="it sums changes divided by steps",
        noise="how many steps it took leaves the client",
    )

    def check(self, config: FederationConfig) -> None:
        """Refuse momentum that is kept from round to round: its sums begin at zero here."""
        if config.keep_optimizer and config.optimizer == "sgd" and config.momentum:
            raise RequestError(
                "fednova: keep_optimizer must be off with momentum, whose count of gradients "
                "begins anew in each round; leave it out"
            )

    def misfit(self, server: Server, reply: Reply) -> str | None:
        """Look for the count, by which changes are divided; one step is 1, but for rounding."""
        return no_number(reply.record.values, VALUE, least=0.99)

    def aggregate(self, server: Server, replies: Sequence[Reply]) -> Aggregated:
        """Step along the normalised mean; statistics are the clients' mean."""
        model = dict(super().aggregate(server, replies).model)
        weights = self.weights(server, replies)
        parts = [w / sum(weights) for w in weights]
        norms = [float(r.record.values[VALUE]) for r in replies]
        effective = sum(p * a for p, a in zip(parts, norms, strict=True))
        for name in sorted(server.parameter_names()):
            before = server.model[name].double()
            change = sum(
                p / a * (r.model[name].double() - before)
                for p, a, r in zip(parts, norms, replies, strict=True)
            )
            model[name] = (before + effective * change).to(model[name].dtype)
        return Aggregated(model)
