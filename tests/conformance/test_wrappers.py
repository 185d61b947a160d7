"""Every wrapper around every method: absent classes, a client away, and nothing lost on the way."""

from collections.abc import Callable

import pytest
from torch import nn

import fl
from fl.method import Method
from fl.setting import Setting
from fl.state import Route
from fl.wrapper import WrapperConfig
from sdq import plugins
from sdq.errors import RequestError

METHODS = plugins.names("fl.methods")
WRAPPERS = [n for n in METHODS if isinstance(fl.method(n).config, WrapperConfig)]
QUICK = fl.FederationConfig(
    rounds=2, lr=5e-3, batch_size=8, local_epochs=2, evaluate_every=100, participation=0.6
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.parametrize("wrapper", WRAPPERS),
    pytest.mark.parametrize("name", METHODS),
]


def around(wrapper: str, name: str) -> Method:
    try:
        return fl.method(wrapper, around=name)
    except RequestError:
        pytest.skip("it has the wrapper in it already")


def test_it_goes_around(
    wrapper: str, name: str, tiny: Callable[..., nn.Module],
    hospitals: Callable[..., list[fl.ClientData]],
) -> None:  # fmt: skip
    found = fl.run(
        tiny(), method=around(wrapper, name), clients=hospitals(), num_classes=3, config=QUICK
    )
    assert all(not r["failures"] for r in found.history)
    assert all(t.isfinite().all() for t in found.state.values())


def test_the_inner_routes_stay(wrapper: str, name: str, tiny: Callable[..., nn.Module]) -> None:
    """What the inner method keeps or shares, the wrapper does not change."""

    def routes(method: Method) -> dict[str, Route]:
        return Setting.of(tiny(), method, QUICK, num_classes=3, image_shape=(1, 6, 6)).routes

    inner, outer = routes(fl.method(name)), routes(around(wrapper, name))
    assert {n: outer[n] for n in inner} == inner
    assert {outer[n] for n in outer.keys() - inner.keys()} <= {Route.LOCAL}
