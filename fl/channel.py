"""Both ends of a compressed exchange: changes go as codes, against what both sides know.

*Down.* The server keeps, for each client, the *reference*: the model as that client put it together
from codes. It sends the change from there to the model that the client is to have, so that what
rounding left over goes with the next message, and a client that was away misses nothing. A client
without a reference gets the change from the first weights, which both have, with 8 bits. One whose
reply was missing or not usable loses its reference: it may have taken up the message, or not.

*Up.* A client sends the change of its training, and keeps what rounding left over for the next
time. The server adds the change to the model it meant to send, so that what rounding does on the
way down never enters the server's model. What goes up and does not come down (a personal head) is
sent as the change from what the server has of it.

Only parameters are compressed. Statistics, which rounding could make negative, what ``geometric``
names, integers, and the groups that a method adds go as they are. Where bits are learned, weights
can travel in those of the client's policy.

Source: Philippenko and Dieuleveut, "Preserved Central Model for Faster Bidirectional Compression in
Distributed Settings", NeurIPS 2021, https://arxiv.org/abs/2102.12528, for the way down; error
feedback as in :mod:`fl.compression`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fl.compression import CODES, STEPS, Codec
from fl.record import Record, Reply, Request, Tensors
from fl.setting import Setting
from fl.state import moving_names
from fl.store import Store
from sdq.errors import RunError

CATCH_UP_BITS = 8
"""Of the change from the first weights, which is that of many rounds."""

MODEL, RESIDUAL, UPLOADS = "link.model", "link.residual", "link.uploads"
ROUND = "link.round"
"""What a client keeps: groups of its record, and a value."""


@dataclass(frozen=True)
class Codecs:
    """What is compressed; None: nothing that way.

    Args:
        up: from client to server.
        down: from server to client.
        catch_up: likewise, to a client without a reference.
        uploads: names of ``up`` that do not come down.
    """

    up: Codec | None
    down: Codec | None
    catch_up: Codec | None
    uploads: tuple[str, ...]

    @classmethod
    def of(cls, setting: Setting, client: int) -> "Codecs":
        """Return the codecs of a federation with one client: the ways are the same for all."""
        config = setting.config.compress
        up_bits, down_bits = (None, None) if config is None else (config.up, config.down)
        named = {} if config is None else config.tensor_bits
        if config is not None and config.policy_bits:
            of_policy = setting.method.message_bits(setting.network, client)
            named = {**named, **{n: b for n, b in of_policy.items() if n not in named}}
        names = moving_names(setting.network, setting.config.geometric)
        up = {n: setting.initial[n] for n in setting.names(up=True) if n in names}
        down = {n: setting.initial[n] for n in setting.names(down=True) if n in names}
        return cls(
            up=None if up_bits is None else Codec.of(up, up_bits, named),
            down=None if down_bits is None else Codec.of(down, down_bits, named),
            catch_up=None if down_bits is None else Codec.of(down, CATCH_UP_BITS, {}),
            uploads=() if up_bits is None else tuple(n for n in up if n not in down),
        )

    def downwards(self, reference: int) -> Codec | None:
        """Return the codec of a request against a round's reference, -1 for none."""
        return self.catch_up if reference < 0 else self.down


def difference(of: Tensor, base: Tensor) -> Tensor:
    """Return a change, float32."""
    return of.float() - base.float()


def moved(base: Mapping[str, Tensor], change: Mapping[str, Tensor]) -> Tensors:
    """Return tensors after a change, in their own dtypes; the same bits on both sides."""
    return {n: (base[n].float() + d).to(base[n].dtype) for n, d in change.items()}


class ClientEnd:
    """A client's end, for one request.

    Args:
        setting: of the federation.
        request: what came.
        kept: what the client kept from its last training, or None.
    """

    def __init__(self, setting: Setting, request: Request, kept: Record | None) -> None:
        self.setting, self.request = setting, request
        self.codecs = Codecs.of(setting, request.client)
        self.kept = kept if kept is not None else Record()
        self.reference = int(request.record.values.get("reference", -1))
        self.model = self._received()

    def _received(self) -> Tensors:
        """Return the tensors that come down."""
        came = self.request.record.model
        codec = self.codecs.downwards(self.reference)
        if self.reference >= 0 and self.kept.values.get(ROUND) != self.reference:
            raise RunError(
                f"client {self.request.client}: the message is a change of the model of round "
                f"{self.reference + 1}, which it does not have; the next will not be"
            )
        if codec is None:
            return came
        base = self.setting.initial if self.reference < 0 else self.kept.tensors[MODEL]
        return came | moved(base, codec.decode(self.request.record.tensors))

    def sent(self, state: Tensors) -> tuple[dict[str, Tensors], Record]:
        """Return the groups that go up, and what is to be kept for the next time.

        Args:
            state: the tensors that go up.
        """
        codec, keeps = self.codecs.up, Record()
        if self.setting.config.compress is not None:
            keeps.values[ROUND] = self.request.round
        if self.codecs.down is not None:
            keeps.tensors[MODEL] = {n: self.model[n] for n in self.codecs.down.shapes}
        if codec is None:
            return {"model": state}, keeps
        uploads = self.kept.tensors.get(UPLOADS, {}) if self.reference >= 0 else {}
        base = self.setting.initial | uploads | self.model
        change = {n: difference(state[n], base[n]) for n in codec.shapes}
        for name, rest in self.kept.tensors.get(RESIDUAL, {}).items():
            change[name] += rest
        groups = codec.encode(change)
        decoded = codec.decode(groups)
        keeps.tensors[RESIDUAL] = {
            n: change[n] - decoded[n] for n in codec.shapes if n not in self.codecs.uploads
        }
        keeps.tensors[UPLOADS] = moved(base, {n: decoded[n] for n in self.codecs.uploads})
        exact = {n: t for n, t in state.items() if n not in codec.shapes}
        return {"model": exact, **groups}, keeps


def without_link(kept: Record | None) -> Record:
    """Return what a client kept for its method alone."""
    if kept is None:
        return Record()
    ours = (MODEL, RESIDUAL, UPLOADS)
    tensors = {g: t for g, t in kept.tensors.items() if g not in ours}
    return Record(tensors, {k: v for k, v in kept.values.items() if k != ROUND}).copy()


@dataclass
class ServerEnd:
    """The server's end, for all clients.

    Args:
        setting: of the federation.
        references: by client, the model as it has it (``model``), and what the server has of
            tensors that only go up (``uploads``).
    """

    setting: Setting
    references: Store
    _pending: dict[int, Record] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.codecs = Codecs.of(self.setting, 0)

    def _codecs(self, client: int) -> Codecs:
        """Return a client's codecs."""
        compress = self.setting.config.compress
        own = compress is not None and compress.policy_bits
        return Codecs.of(self.setting, client) if own else self.codecs

    def packed(self, request: Request) -> Request:
        """Return a request to train or adapt as it travels."""
        if self.codecs.up is None and self.codecs.down is None:
            return request
        client, record = request.client, request.record
        known = self.references.get(client)
        number = self.references.index.get(client, -1)
        codec = self._codecs(client).downwards(number)
        held, groups = {}, {"model": record.model}
        if codec is not None:
            base = self.setting.initial if known is None else known.model
            change = {n: difference(record.model[n], base[n]) for n in codec.shapes}
            codes = codec.encode(change)
            held = moved(base, codec.decode(codes))
            exact = {n: t for n, t in record.model.items() if n not in codec.shapes}
            groups = {"model": exact, **codes}
        if request.kind == "train":
            uploads = {} if known is None else known.tensors["uploads"]
            self._pending[client] = Record({"model": held, "uploads": uploads})
        values = {**record.values, "reference": number}
        return Request(
            request.kind, client, request.round, Record({**record.tensors, **groups}, values)
        )

    def unpacked(self, reply: Reply, sent: Tensors) -> Reply:
        """Return a reply to training with the client's model in it.

        Args:
            reply: as it travelled.
            sent: the state that the client was meant to start from.

        Raises:
            RunError: its codes are not such.
        """
        codec = self._codecs(reply.client).up
        if codec is None:
            return reply
        change = codec.decode(reply.record.tensors)
        pending = self._pending[reply.client].tensors
        known = pending["uploads"]
        pending["uploads"] = moved(
            self.setting.initial | known, {n: change[n] for n in self.codecs.uploads}
        )
        base = {n: t for n, t in sent.items() if n in codec.shapes}
        whole = moved(base, {n: d for n, d in change.items() if n in base}) | pending["uploads"]
        tensors = {g: t for g, t in reply.record.tensors.items() if g not in (CODES, STEPS)}
        tensors["model"] = reply.model | whole
        return Reply(reply.client, Record(tensors, reply.record.values))

    def conclude(self, asked: Iterable[int], replied: Iterable[int], round: int) -> None:
        """Take up the references of those who replied, and forget those of the others."""
        for client in asked:
            self.references.drop(client)
        if self.codecs.down is not None or self.codecs.uploads:
            for client in replied:
                self.references.put(client, self._pending[client], round)
        self._pending.clear()
