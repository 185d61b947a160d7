"""What cannot be quantized or would be lost is refused by name, with the way out."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, prune

from sdq.config import QuantConfig
from sdq.errors import RequestError
from sdq.quant_model import QuantModel, quantize

SAMPLE = torch.zeros(1, 3, 12, 12)
Compute = Callable[[Any, Tensor], Any]
HERE = "test_refusals.py:"


def kinds(qmodel: QuantModel) -> dict[str, str]:
    return {layer.name: layer.kind for layer in qmodel.layers}


# ---------------------------------------------------------------------- arguments, hooks, made anew


class Arguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0, *, flag: bool = True
    ) -> Tensor:
        x = self.a(x)
        if mask is not None:
            x = x * mask
        return self.head((F.relu(x) * scale if flag else x).mean((2, 3)))


class Required(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.head((self.a(x) * time).mean((2, 3)))


def test_arguments_with_a_default_keep_it(
    exact: Callable[..., Any], images: Callable[[], Tensor], seeded: Callable[..., nn.Module]
) -> None:
    exact(seeded(Arguments), images())


def test_an_argument_without_a_default_is_refused(
    refuses: Callable[..., Any], seeded: Callable[..., nn.Module]
) -> None:
    with refuses("model: must accept a sample of shape (1, 3, 12, 12)", "argument: 'time'"):
        quantize(seeded(Required), sample=SAMPLE)


def test_hooks_of_layers_are_refused_and_others_kept(
    refuses: Callable[..., Any], exact: Callable[..., Any], images: Callable[[], Tensor],
    seeded: Callable[..., nn.Module], between: Callable[..., nn.Module],
    head: Callable[[], nn.Module],
) -> None:  # fmt: skip
    net = between(lambda net, x: F.relu(x))
    net.b.register_forward_hook(lambda module, args, output: 2 * output)
    with refuses("model: layer 'b' (Conv2d) has forward hooks, which would be lost", "--skip 'b'"):
        quantize(net, sample=SAMPLE)
    exact(net, images(), skip=("b",))
    net = seeded(lambda: nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), head()))
    net[0].register_forward_pre_hook(lambda module, args: (args[0] / 2,))
    net[0].register_forward_hook(lambda module, args, output: output - 1)
    exact(net, images())


def old_weight_norm(layer: nn.Module) -> None:
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # its deprecation
        nn.utils.weight_norm(layer)


@pytest.mark.parametrize(
    ("normalise", "remove", "words"),
    [
        (old_weight_norm, nn.utils.remove_weight_norm, "call torch.nn.utils.remove_weight_norm"),
        (nn.utils.spectral_norm, nn.utils.remove_spectral_norm, "remove_spectral_norm"),
        (
            lambda layer: prune.l1_unstructured(layer, "weight", amount=0.3),
            lambda layer: prune.remove(layer, "weight"), "torch.nn.utils.prune.remove",
        ),
        (
            parametrizations.weight_norm,
            lambda layer: nn.utils.parametrize.remove_parametrizations(layer, "weight"),
            "has a parametrized weight",
        ),
    ],
    ids=["weight norm by hook", "spectral norm by hook", "pruning", "weight norm"],
)  # fmt: skip
def test_weights_by_formula_are_refused_until_it_is_removed(
    normalise: Callable[[nn.Module], Any], remove: Callable[[nn.Module], Any], words: str,
    refuses: Callable[..., Any], exact: Callable[..., Any], images: Callable[[], Tensor],
    between: Callable[..., nn.Module],
) -> None:  # fmt: skip
    net = between(lambda net, x: F.relu(x))
    normalise(net.b)
    with refuses("model: layer 'b' (", words):
        quantize(net, sample=SAMPLE)
    if words != "has a parametrized weight":  # a copy of such a module fails once it has trained
        with refuses("model: layer 'b' (Conv2d) has a weight that a hook computes", words):
            quantize(net, QuantConfig(skip=("b",)), sample=SAMPLE)
    remove(net.b)
    exact(net, images(), formats=False)


def test_a_parametrized_layer_may_stay_in_float(
    exact: Callable[..., Any], images: Callable[[], Tensor], between: Callable[..., nn.Module]
) -> None:
    net = between(lambda net, x: F.relu(x))
    parametrizations.weight_norm(net.b)
    assert kinds(exact(net, images(), skip=("b",)))["b"] == "float"


def test_lazy_modules_are_refused(
    refuses: Callable[..., Any], head: Callable[[], nn.Module]
) -> None:
    net = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), head())
    with refuses("model: layer '0' (LazyConv2d)", "pass a sample through the network first"):
        quantize(net, sample=SAMPLE)
    net[0](SAMPLE)
    with refuses("model: layer '1' (LazyBatchNorm2d)", "pass a sample through the network first"):
        quantize(net, sample=SAMPLE)
    net(torch.randn(2, 3, 12, 12))
    assert kinds(quantize(net, sample=SAMPLE)) == {"0": "conv2d", "2.linear": "linear"}


@pytest.mark.parametrize("skip", [(), ("1",)])
def test_compiled_modules_are_refused(
    skip: tuple[str, ...], refuses: Callable[..., Any], head: Callable[[], nn.Module]
) -> None:
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        scripted = torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()))
    net = nn.Sequential(nn.Conv2d(3, 8, 3), scripted, head())
    with refuses("model: layer '1' (RecursiveScriptModule) is compiled by torch.jit", "give the"):
        quantize(net, QuantConfig(skip=skip), sample=SAMPLE)


def test_modules_made_in_forward_are_followed_or_refused(
    refuses: Callable[..., Any], exact: Callable[..., Any], images: Callable[[], Tensor],
    between: Callable[..., nn.Module],
) -> None:  # fmt: skip
    exact(between(lambda net, x: nn.Softplus()(nn.ReLU(inplace=True)(x))), images(), formats=False)
    with refuses("model: Between at ", HERE, "a Conv2d in forward must be a submodule"):
        quantize(between(lambda net, x: nn.Conv2d(8, 8, 1)(x)), sample=SAMPLE)
    with refuses("model: Between at ", HERE, "a PReLU in forward must be a submodule"):
        quantize(between(lambda net, x: nn.PReLU()(x)), sample=SAMPLE)


def test_a_forward_put_in_its_place_is_refused(
    refuses: Callable[..., Any], between: Callable[..., nn.Module]
) -> None:
    net = between(lambda net, x: F.relu(x))
    net.forward = lambda x: 2 * type(net).forward(net, x)
    with refuses("model: Between must compute the same when it is traced"):
        quantize(net, sample=SAMPLE)


@pytest.mark.parametrize("name", ["class", "code", "graph", "meta"])
def test_names_that_generated_code_cannot_have_are_refused(
    name: str, refuses: Callable[..., Any], between: Callable[..., nn.Module]
) -> None:
    net = between(lambda net, x: getattr(net, name)(x), **{name: nn.Conv2d(8, 8, 1)})
    with refuses(f"model: {name!r} must have another name: torch.fx cannot use {name!r}; rename"):
        quantize(net, sample=SAMPLE)


def test_a_name_that_a_quantizer_would_have_may_be_taken(
    exact: Callable[..., Any], images: Callable[[], Tensor], between: Callable[..., nn.Module]
) -> None:
    net = between(lambda net, x: net.b_input(F.relu(x)), b_input=nn.Conv2d(8, 8, 1))
    qmodel = exact(net, images())
    assert list(qmodel.act_quantizers()) == [
        "a_input", "b_input_input", "b_input_again", "head_input",
    ]  # fmt: skip


# -------------------------------------------------------------------- weights that would be float


@fx.wrap
def wrapped(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight)


@fx.wrap
def wrapped_activation(x: Tensor) -> Tensor:
    return x.relu()


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 8, 1, 1) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.conv2d(x, self.kernel))


UNSEEN: dict[str, tuple[Compute, str]] = {
    "functional linear": (
        lambda net, x: F.linear(x, net.square), "functional.linear is called in forward (linear)",
    ),
    "functional attention": (
        lambda net, x: F.multi_head_attention_forward(
            *[x.flatten(2).permute(2, 0, 1)] * 3, 8, 2, net.packed, None, None, None, False, 0.0,
            net.kernel[:, :, 0, 0], None,
        )[0].permute(1, 2, 0).view(x.shape),
        "functional.multi_head_attention_forward is called in forward",
    ),
    "inner": (lambda net, x: torch.inner(x, net.square), "a product with a parameter (square)"),
    "matmul": (lambda net, x: x @ net.square, "a product with a parameter (square)"),
    "matmul of its transpose": (
        lambda net, x: x.matmul(net.square.t().contiguous()), "a product with a parameter (conti",
    ),
    "einsum": (
        lambda net, x: torch.einsum("nchw,wv->nchv", x, net.square), "a product with a parameter",
    ),
    "a layer's own weight": (
        lambda net, x: x * net.b.weight.mean(), "b.weight must be read by its own layer alone",
    ),
    "wrapped": (
        lambda net, x: wrapped(x, net.kernel), "a function that torch.fx does not look into",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSEEN)
def test_weights_that_would_stay_in_float_unseen_are_refused(
    name: str, refuses: Callable[..., Any], between: Callable[..., nn.Module]
) -> None:
    compute, words = UNSEEN[name]
    shapes = {"square": (12, 12), "kernel": (8, 8, 1, 1), "packed": (24, 8)}
    parts = {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    with refuses("model: Between at ", HERE, words, "would stay in float unseen", "--skip"):
        quantize(between(compute, **parts), sample=SAMPLE)


def test_such_a_module_is_named_and_may_be_left_in_float(
    refuses: Callable[..., Any], exact: Callable[..., Any], images: Callable[[], Tensor],
    between: Callable[..., nn.Module],
) -> None:  # fmt: skip
    net = between(lambda net, x: net.odd(x), odd=Functional())
    with refuses("model: layer 'odd' (Functional) at ", "functional.conv2d", "--skip 'odd'"):
        quantize(net, sample=SAMPLE)
    exact(net, images(), skip=("odd",))


def test_parameters_that_scale_or_shift_are_no_layers(
    exact: Callable[..., Any], images: Callable[[], Tensor], between: Callable[..., nn.Module]
) -> None:
    factor, shift = nn.Parameter(torch.rand(8, 1, 1)), nn.Parameter(torch.rand(8, 1, 1))
    net = between(lambda net, x: F.relu(x * net.factor.abs() + net.shift), factor=factor,
                  shift=shift)  # fmt: skip
    exact(net, images())
    exact(between(lambda net, x: wrapped_activation(x)), images(), formats=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused_by_name(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2)).to(dtype)
    with pytest.raises(RequestError, match=r"0\.weight must be float32, got .* model\.float\(\)"):
        quantize(net, QuantConfig(), sample=torch.zeros(1, 3, 8, 8, dtype=dtype))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own imports
def test_what_torch_compile_made_is_refused_by_name() -> None:
    net = torch.compile(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2)))
    with pytest.raises(RequestError, match=r"compiled by torch\.compile.*model\._orig_mod"):
        quantize(net, QuantConfig(), sample=torch.zeros(1, 3, 8, 8))  # type: ignore[arg-type]
