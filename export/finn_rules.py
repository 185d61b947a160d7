"""What FINN cannot take, found in the quantized network itself: FINN need not be installed.

FINN computes with integers: what a layer reads is codes, what it gives are sums, and thresholds
turn sums into codes again. Batch normalisation, biases, scales and a ReLU are absorbed into the
thresholds, so they stand between a layer and the quantizer of the next, and nothing else does. The
graph is walked once with what each tensor is, and every rule that is broken is a finding.

The rules are those of our own flow through FINN+ 1.6.1, its rewriting of graphs included; each was
tried there. The table is in docs/finn.md, "What is refused, and why".
"""

from dataclasses import dataclass

from torch import Tensor, fx

from export import finn_layers
from export.findings import Finding
from export.network_graph import NetworkGraph
from sdq.learned_scale import ActQuantizer
from sdq.policy import FLOAT_BITS
from sdq.quant_model import QuantModel


@dataclass(frozen=True)
class Pixels:
    """The network's input, or what is made of it before a quantizer: computed in software."""


@dataclass(frozen=True, eq=False)
class Codes:
    """Integer codes, times the scale of a quantizer."""

    quantizer: ActQuantizer


@dataclass(frozen=True)
class Sums:
    """What a layer or an addition of codes gives, until the next quantizer.

    Args:
        rectified: whether a ReLU, or what is as good as one, comes between.
    """

    rectified: bool = False


Kind = Pixels | Codes | Sums


def check(qmodel: QuantModel, sample: Tensor) -> tuple[Finding, ...]:
    """Return what FINN cannot take, in the order of the network; empty if it takes all.

    Args:
        qmodel: need not be calibrated.
        sample: ``(N, C, H, W)``, for shapes only.

    Raises:
        RequestError: the sample does not fit the network.
    """
    walk = _Walk(NetworkGraph(qmodel, sample))
    for node in walk.graph.nodes:
        walk(node)
    return tuple(dict.fromkeys(walk.found))


_RECTIFIERS = ("ReLU", "ReLU6", "relu", "relu6", "clamp", "clamp_min", "clip", "hardtanh",
               "Hardtanh")  # fmt: skip
_NORMS = ("BatchNorm1d", "BatchNorm2d", "FrozenBatchNorm", "FrozenWhole", "SyncBatchNorm")
_SUMS = ("add", "iadd", "add_")
_DIFFERENCES = ("sub", "isub", "sub_")
_PRODUCTS = ("mul", "imul", "mul_", "truediv", "div")
_JOINS = ("cat", "concat")
_AVERAGES = ("AvgPool2d", "AdaptiveAvgPool2d", "avg_pool2d", "adaptive_avg_pool2d", "mean")
_SELECTIONS = ("getitem", "pad", "ZeroPad2d")

_REPAIRS = {
    **dict.fromkeys(
        ("GroupNorm", "InstanceNorm1d", "InstanceNorm2d", "LayerNorm", "group_norm", "layer_norm",
         "instance_norm"),
        "replace it by nn.BatchNorm2d, which becomes thresholds",
    ),
    **dict.fromkeys(
        ("Upsample", "UpsamplingBilinear2d", "interpolate"),
        "use mode='nearest', which repeats codes",
    ),
    **dict.fromkeys(_DIFFERENCES, "add, and let the layer before learn the sign"),
    **dict.fromkeys(("matmul", "bmm", "softmax", "Softmax", "scaled_dot_product_attention"),
                    "FINN has no attention: use convolutions"),
    **dict.fromkeys(("chunk", "split", "permute", "transpose", "roll", "unbind", "stack"),
                    "FINN takes whole tensors of channels: use convolutions"),
    **dict.fromkeys(("AvgPool1d", "AdaptiveAvgPool1d", "MaxPool1d"),
                    "use the layers of two dimensions, with a height of 1"),
    **dict.fromkeys(("amax", "max", "AdaptiveMaxPool2d", "adaptive_max_pool2d"),
                    "use nn.MaxPool2d"),
}  # fmt: skip


class _Walk:
    """Goes through the graph in order and notes what each tensor is, and what is wrong."""

    def __init__(self, graph: NetworkGraph) -> None:
        self.graph = graph
        self.kinds: dict[fx.Node, Kind] = {}
        self.found: list[Finding] = []

    def __call__(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.kinds[node] = Pixels()
        elif node in self.graph.shapes and node.op not in ("output", "get_attr"):
            self.kinds[node] = self._kind(node)

    def _refuse(self, node: fx.Node, rule: str, got: str, repair: str) -> None:
        self.found.append(Finding(self.graph.label(node), rule, got, repair))

    def _kind(self, node: fx.Node) -> Kind:
        """Return what a node gives; where a rule is broken, what it would give if mended."""
        sources = [self.kinds[source] for source in self.graph.sources(node)]
        quantizer, layer = self.graph.quantizer(node), self.graph.layer(node)
        if quantizer is not None:
            self._bits(node, quantizer)
            return Codes(quantizer)
        if layer is not None:
            self.found += finn_layers.findings(self.graph, node, layer)
            if self.graph.qmodel.policy[layer.name].weight_bits != FLOAT_BITS:
                self._input(node, sources)
            return Sums()
        if all(isinstance(kind, Pixels) for kind in sources):
            return Pixels()
        if self.graph.passes_on(node):
            return self._passed_on(node, sources[0])
        return self._operation(node, sources)

    def _bits(self, node: fx.Node, quantizer: ActQuantizer) -> None:
        if quantizer.bits > 8:
            self._refuse(
                self.graph.origin(node),
                "must be quantized to 2 to 8 bits, for each code is a threshold",
                f"{quantizer.bits} bits", "--act-bits 8, or input_bits 8 with --config",
            )  # fmt: skip

    def _input(self, node: fx.Node, sources: list[Kind]) -> None:
        if not isinstance(sources[0], Codes):
            pixels = isinstance(sources[0], Pixels)
            self._refuse(
                node, "must read quantized values",
                "the network's input in float" if pixels else "activations in float",
                "input_bits 8 with --config, and no layer left in float" if pixels
                else "--act-bits 8 or fewer, and no layer left in float",
            )  # fmt: skip

    def _passed_on(self, node: fx.Node, source: Kind) -> Kind:
        pools = self.graph.operation(node) in ("MaxPool2d", "max_pool2d")
        flat = self.graph.operation(node) in ("MaxPool1d", "max_pool1d")
        if flat:
            self._refuse(node, "must pool rows and columns", "one dimension", _REPAIRS["MaxPool1d"])
        elif pools and not self.graph.is_last(node):
            self._pool(node, source)
        return source

    def _pool(self, node: fx.Node, source: Kind) -> None:
        pool = self.graph.arguments(node)
        if pool.get("ceil_mode") or pool.get("dilation", 1) not in (1, (1, 1)):
            self._refuse(
                node, "must pool whole windows of neighbouring pixels", "ceil_mode or dilation",
                "leave them out, and pad or crop the images instead",
            )  # fmt: skip
        if isinstance(source, Sums) and not self.graph.quantized_next(node):
            self._refuse(
                node, "must pool codes", "values that are quantized later",
                "put the activation before the pooling; --integer-datapath",
            )  # fmt: skip

    def _operation(self, node: fx.Node, sources: list[Kind]) -> Kind:
        name = self.graph.operation(node)
        if name in _RECTIFIERS and self._from_zero(node, name):
            return Sums(rectified=True)
        if name in _NORMS:
            return self._affine(node, sources[0], "use nn.BatchNorm2d before the ReLU")
        if name in _SUMS or (name in _DIFFERENCES and len(sources) == 1):
            return self._sum(node, sources)
        if name in _PRODUCTS and len(sources) == 1:
            return self._affine(node, sources[0], "multiply before the ReLU")
        if name in _JOINS:
            return self._join(node, sources)
        if name in _AVERAGES:
            return self._average(node, sources[0])
        if name in _SELECTIONS and self._selects(node, sources):
            return sources[0]
        return self._unknown(node, name)

    def _unknown(self, node: fx.Node, name: str) -> Kind:
        if self.graph.is_last(node):
            rule, repair = "must be left to software", "return logits, and apply it outside"
        elif name in _PRODUCTS:
            rule, repair = (
                "must not multiply activations",
                "leave the gate (squeeze-and-excitation) out",
            )
        elif name in _SELECTIONS:
            rule = "must take every n-th row and column, or pad channels with zeros"
            repair = "use a convolution with a stride, or its padding"
        else:
            rule = "must be a layer that FINN has between quantizers"
            repair = _REPAIRS.get(name, "use nn.ReLU")
        self._refuse(node, rule, name, repair)
        return Sums()

    def _from_zero(self, node: fx.Node, name: str) -> bool:
        """Tell whether a rectifier's lower bound is zero."""
        settings = self.graph.arguments(node)
        bounds = {"clamp": "min", "clip": "min", "clamp_min": "min"}
        low = settings.get(bounds.get(name, "min_val"), -1.0 if "ardtanh" in name else None)
        return "relu" in name.lower() or low == 0

    def _affine(self, node: fx.Node, source: Kind, repair: str) -> Kind:
        if isinstance(source, Sums) and source.rectified:
            self._refuse(
                node, "must stand before the ReLU, where thresholds absorb it",
                "one behind, which FINN would compute in floating point", repair,
            )  # fmt: skip
        return Sums()

    def _one_scale(self, node: fx.Node, sources: list[Kind]) -> bool:
        """Check that all operands have the same quantizer."""
        quantizers = {id(kind.quantizer) for kind in sources if isinstance(kind, Codes)}
        same = len(quantizers) == 1 and all(isinstance(kind, Codes) for kind in sources)
        if not same:
            floats = not all(isinstance(kind, Codes) for kind in sources)
            self._refuse(
                node, "must have operands of one scale",
                "operands in float" if floats else f"operands of {len(quantizers)} scales",
                "--integer-datapath",
            )  # fmt: skip
        return same

    def _sum(self, node: fx.Node, sources: list[Kind]) -> Kind:
        if len(sources) == 1:  # and a number
            return self._affine(node, sources[0], "add before the ReLU")
        self._one_scale(node, sources)
        return Sums()

    def _join(self, node: fx.Node, sources: list[Kind]) -> Kind:
        codes = next((kind for kind in sources if isinstance(kind, Codes)), None)
        if self.graph.arguments(node).get("dim", 0) % len(self.graph.shapes[node]) != 1:
            self._refuse(node, "must join channels", "another dimension", "use dim=1")
        return codes if self._one_scale(node, sources) and codes is not None else Sums()

    def _average(self, node: fx.Node, source: Kind) -> Kind:
        if not isinstance(source, Codes) and not isinstance(source, Pixels):
            self._refuse(node, "must average codes", "activations in float", "--integer-datapath")
        settings = self.graph.arguments(node)
        padded = settings.get("padding", 0) not in (0, (0, 0))
        if settings.get("ceil_mode") or (
            padded and settings.get("count_include_pad", True) is False
        ):
            self._refuse(
                node, "must average windows of one size", "ceil_mode or count_include_pad=False",
                "leave it out",
            )  # fmt: skip
        if self.graph.operation(node) == "mean" and not self._over_pixels(node):
            self._refuse(node, "must average rows and columns", "other dimensions",
                         "use nn.AdaptiveAvgPool2d(1)")  # fmt: skip
        return Sums()

    def _over_pixels(self, node: fx.Node) -> bool:
        dims = self.graph.arguments(node).get("dim")
        rank = len(self.graph.shapes[self.graph.sources(node)[0]])
        given = dims if isinstance(dims, tuple | list) else (dims,)
        return rank == 4 and None not in given and {d % rank for d in given} == {2, 3}

    def _selects(self, node: fx.Node, sources: list[Kind]) -> bool:
        """Tell whether a slice takes every n-th pixel, or a pad puts zeros around channels."""
        if not isinstance(sources[0], Codes):
            return False
        settings = self.graph.arguments(node)
        if self.graph.operation(node) == "getitem":
            index = settings["index"]
            whole = (
                all(
                    isinstance(part, slice) and part.start is None and part.stop is None
                    for part in index
                )
                if isinstance(index, tuple)
                else False
            )
            return whole and all(part.step in (None, 1) for part in index[:2])
        pad = settings.get("pad", settings.get("padding", ()))
        zeros = settings.get("mode", "constant") == "constant" and not settings.get("value")
        return zeros and not any(pad[:4]) and all(size >= 0 for size in pad[4:])
