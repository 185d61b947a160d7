"""What goes together: methods and options, as one table that is asked before anything runs.

A method's file says what the method refuses and why (:func:`refusals`); what two options have
against each other, or an option against what a network sends, is here.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from fl.state import moving_names
from sdq import plugins
from sdq.errors import RequestError

if TYPE_CHECKING:
    from fl.config import FederationConfig
    from fl.setting import Setting

Feature = Literal["compression", "robust aggregation", "client noise", "server noise"]
Refusals = Mapping[Feature, str]

FEATURES: tuple[Feature, ...] = (
    "compression", "robust aggregation", "client noise", "server noise",
)  # fmt: skip
"""``compress``; ``aggregation`` but the mean; ``privacy`` with noise from clients or server."""


def refusals(*, aggregation: str = "", noise: str = "", server_noise: str = "") -> Refusals:
    """Return why a method does not go with what, as the end of a sentence.

    Args:
        aggregation: with a median or trimmed mean.
        noise: with differential privacy.
        server_noise: with that of the server alone.
    """
    why: dict[Feature, str] = {
        "robust aggregation": aggregation,
        "client noise": noise,
        "server noise": server_noise or noise,
    }
    return MappingProxyType({feature: reason for feature, reason in why.items() if reason})


def asked(config: "FederationConfig") -> list[Feature]:
    """Return the features that a configuration asks for."""
    found: list[Feature] = ["compression"] if config.compress is not None else []
    if config.aggregation != "mean":
        found.append("robust aggregation")
    if config.privacy is not None:
        found.append("client noise" if config.privacy.noise_from == "client" else "server noise")
    return found


def check(setting: "Setting") -> None:
    """Raise RequestError where method, options and network do not go together."""
    method, config = setting.method, setting.config
    for feature in asked(config):
        if feature in method.refuses:
            others = [n for n, row in table().items() if not row[feature]]
            # what is around a method, such as the learning of bits, has its name
            instead = f", or use one of {', '.join(others)}" if method.name not in others else ""
            raise RequestError(
                f"{method.name}: must go without {feature}: {method.refuses[feature]}; leave it "
                f"out{instead}"
            )
    _check_options(config)
    if config.compress is not None and config.compress.policy_bits:
        method.message_bits(setting.network, 0)  # refuses where there is no policy
    if config.privacy is not None:
        _check_private(setting)


def _check_options(config: "FederationConfig") -> None:
    privacy = config.privacy
    if privacy is None:
        return
    if privacy.noise_from == "server" and config.aggregation != "mean":
        raise RequestError(
            f"aggregation: must be mean with noise from the server, got {config.aggregation!r}: "
            "one client can move a median by more than its share; use noise_from client"
        )
    if config.count_epsilon is None:
        raise RequestError(
            "count_epsilon: must be given with privacy, got none: class counts leave the clients "
            "too; 1.0 adds Laplace noise of scale 1"
        )
    if config.select == "specialization":
        raise RequestError(
            "select: must be last or generalization with privacy, got 'specialization': clients "
            "do not send their metrics then"
        )


def _check_private(setting: "Setting") -> None:
    """Refuse tensors that go up and are no change of a parameter that came down."""
    moving = moving_names(setting.network, setting.config.geometric)
    down = set(setting.names(down=True))
    for name in setting.names(up=True):
        if name not in moving or name not in down:
            raise RequestError(
                f"privacy: only parameters that come down too must go up, got {name!r}; keep "
                "statistics with the clients (batch_norm local_stats or local_all), or use another "
                "method or network"
            )


def table() -> dict[str, dict[Feature, str]]:
    """Return, by method with its default hyper-parameters and feature, why not, or nothing."""
    from fl.method import method

    return {
        name: {feature: method(name).refuses.get(feature, "") for feature in FEATURES}
        for name in plugins.names("fl.methods")
    }
