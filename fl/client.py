"""What a client does: pure functions from a request and what it kept to a reply and what it keeps.

Whoever carries the messages (the rounds in this process, or Flower) calls :func:`try_answer`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fl.channel import ClientEnd, without_link
from fl.config import Sampling
from fl.evaluation import evaluate, primary
from fl.local_training import train_
from fl.losses import criterion
from fl.method import ClientContext, ClientData, SitsOut
from fl.personal import Personal
from fl.privacy import privatised
from fl.record import Failure, Record, Reply, Request, Tensors, misfit, not_finite, picked
from fl.setting import Setting
from fl.state import load_
from sdq.batches import Batches, Loader, balanced_indices, generator
from sdq.data import ArrayImages
from sdq.errors import RequestError

CRASHES = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, OSError, MemoryError)
"""What a client may raise: it is left out of the round, whatever broke in its data or training."""


def answer(
    setting: Setting, data: ClientData, request: Request, kept: Record | None
) -> tuple[Reply, Record | None]:
    """Do what a request asks.

    Args:
        setting: of the federation; its network is used and left changed.
        data: the client's images.
        request: what is asked.
        kept: what the client kept from its last training, or None.

    Returns:
        The reply, and what the client is to keep now, or None if that does not change.

    Raises:
        RequestError: the client's data or the request do not fit the federation.
        RunError: the training failed.
    """
    match request.kind:
        case "counts":
            return _count(setting, data, request), None
        case "collect":
            return _collect(setting, request, kept), None
        case "train":
            return _train(setting, data, request, kept)
        case "adapt" | "own":
            reply, keeps = _train(setting, data, request, kept)
            return Reply(reply.client, Record({}, reply.record.values)), _own_model(kept, keeps)


def try_answer(
    setting: Setting, data: ClientData, request: Request, kept: Record | None
) -> tuple[Reply | Failure, Record | None]:
    """Do what a request asks, or say why not: whoever carries messages calls this."""
    try:
        reply, keeps = answer(setting, data, request, kept)
    except CRASHES as error:
        return Failure(request.client, f"{type(error).__name__}: {error}"), None
    if keeps is not None and (name := not_finite(keeps)) is not None:
        return Failure(request.client, f"what it keeps is NaN or infinite in {name!r}"), None
    return reply, keeps


def client_generator(seed: int, client: int, purpose: str, round: int = 0) -> torch.Generator:
    """Return a generator of one client's own."""
    return generator(seed, f"client {client} {purpose}", round)


def _count(setting: Setting, data: ClientData, request: Request) -> Reply:
    setting.check(data)
    counts = setting.counts(data.train)
    if (epsilon := setting.config.count_epsilon) is not None:
        rng = client_generator(setting.config.seed, request.client, "counts")
        if setting.config.privacy is not None:
            rng = setting.config.privacy.generator(rng)
        counts = noised(counts, epsilon, rng)
    load_(setting.network, setting.initial)
    rng = client_generator(setting.config.seed, request.client, "introduction")
    # in any order, but every image: a loader that shuffles leaves a last batch of one out
    images = data.train.subset(torch.randperm(len(data.train), generator=rng))
    batches = Batches(images, setting.normalization, batch_size=setting.config.batch_size)
    told = setting.method.introduce(setting.network, batches)
    return Reply(
        request.client, Record(told.tensors, {"class_counts": counts.tolist(), **told.values})
    )


def noised(counts: Tensor, epsilon: float, rng: torch.Generator) -> Tensor:
    """Return counts with Laplace noise of scale 1 / epsilon, rounded and not negative.

    Source: Dwork et al., "Calibrating Noise to Sensitivity in Private Data Analysis", TCC 2006,
    for histograms: one image more or less changes one count by one.
    """
    # float64, and away from the ends: the logarithm of 0 would be an infinite count
    u = torch.rand(counts.shape, generator=rng, dtype=torch.float64).clamp(1e-12, 1 - 1e-12) - 0.5
    noise = -u.sign() * torch.log1p(-2 * u.abs()) / epsilon
    return (counts.double() + noise).round().clamp_min(0).float()


def _collect(setting: Setting, request: Request, kept: Record | None) -> Reply:
    """Return the model's tensors that do not travel otherwise; none if it never trained."""
    if setting.config.privacy is not None:
        raise RequestError(
            f"client {request.client}: what stays with it must not be asked for with privacy"
        )
    names = [n for n in setting.names(up=False) if n.startswith("model.")]
    # one that was only evaluated has kept nothing but that model
    trained = kept is not None and "model" in kept.tensors
    model = {n: kept.model[n] for n in names} if kept is not None and trained else {}
    return Reply(request.client, Record({"model": model}))


def _train(
    setting: Setting, data: ClientData, request: Request, kept: Record | None
) -> tuple[Reply, Record | None]:
    setting.check(data)
    end = ClientEnd(setting, request, kept)
    _load_(setting, request.client, end.model, kept)
    context = _context(setting, data, request, kept)
    client = setting.method.client(context)
    try:
        progress = train_(client)
    except SitsOut as why:
        values = {"sits_out": str(why), **_evaluations(setting, data, request)}
        found = Record()
        _put_own_model(setting, data, request, values, found)
        return Reply(request.client, Record({}, values)), _own_model(kept, found)
    extra = client.finish(progress)
    state = setting.network.state_dict()
    shared = picked(state, setting.names(up=True))
    values = {
        "num_examples": len(data.train),
        "steps": progress.steps,
        "train_loss": progress.mean_loss,
        **extra.values,
    }
    if setting.config.privacy is not None:
        shared, values = _private(setting, shared, end.model, extra, context), {"num_examples": 1}
    groups, keeps = end.sent(shared)
    up = Record({**groups, **extra.tensors}, {**values, **_evaluations(setting, data, request)})
    memory = context.memory
    memory.tensors["model"] = picked(state, setting.names(down=False))
    memory.tensors.update(keeps.tensors)
    memory.values.update(keeps.values)
    if kept is not None and (before := Personal.taken(kept.copy())) is not None:
        before.put(memory)  # of the last round that was evaluated, unless this one is
    _put_own_model(setting, data, request, up.values, memory)
    return Reply(request.client, up), memory


def _put_own_model(
    setting: Setting, data: ClientData, request: Request, values: dict[str, Any], memory: Record
) -> None:
    """Add the client's own model as it was measured, if clients are to keep theirs.

    Of one that pools others there are only their figures, and none of its own; with privacy there
    are no figures.
    """
    keeps = setting.config.keep_clients or request.kind == "own"
    private = setting.config.privacy is not None and request.record.values.get("evaluate")
    if keeps and (private or "evaluations" in values):
        told = values.get("evaluations", {})
        own = {} if data.pooled else told.get(str(request.client), {})
        figures = {part: primary(views) for part, views in own.items()}
        model = setting.method.personal(setting.network)
        number = min(request.round + 1, setting.config.rounds)  # adapting is after the last
        Personal(picked(model, model), number, figures).put(memory)


def _own_model(kept: Record | None, keeps: Record | None) -> Record | None:
    """Return what a client kept before, with the model that it has now, if it is to keep it."""
    personal = None if keeps is None else Personal.taken(keeps)
    if personal is None:
        return None
    before = kept.copy() if kept is not None else Record()
    personal.put(before)
    return before


def _private(
    setting: Setting, state: Tensors, came: Tensors, extra: Record, context: ClientContext
) -> Tensors:
    """Return what may go up: with noise from the server it adds that, and clips first."""
    privacy = setting.config.privacy
    assert privacy is not None
    if extra.tensors or extra.values:
        raise RequestError(
            f"{setting.method.name}: must send nothing beside the model with privacy, got "
            f"{[*extra.tensors, *extra.values]}; use another method"
        )
    if privacy.noise_from == "server":
        return state
    rng = privacy.generator(context.generator("privacy"))
    std = privacy.noise_multiplier * privacy.clip
    return privatised(state, came, privacy.clip, std, rng)


def _load_(setting: Setting, client: int, came: Tensors, kept: Record | None) -> None:
    """Put what came, what was kept and, for the rest, the initial state into the network."""
    expected = {n: setting.initial[n] for n in setting.names(down=True)}
    if (why := misfit(came, expected)) is not None:
        raise RequestError(
            f"client {client}: the model must be the federation's, but {why}; "
            "server and client must have the same network and version"
        )
    own = {n: setting.initial[n] for n in setting.names(down=False)}
    load_(setting.network, own | (kept.model if kept else {}) | came)


def _context(
    setting: Setting, data: ClientData, request: Request, kept: Record | None
) -> ClientContext:
    seed, client, round = setting.config.seed, request.client, request.round
    own = setting.counts(data.train)
    everyone = torch.tensor(request.record.values["class_counts"], dtype=torch.float32)
    memory = without_link(kept)
    memory.tensors.pop("model", None)
    Personal.taken(memory)
    received = {g: t for g, t in request.record.tensors.items() if g != "model"}
    return ClientContext(
        client=client,
        round=round,
        config=setting.config,
        network=setting.network,
        routes=setting.routes,
        labels=data.train.labels,
        own_counts=own,
        all_counts=everyone,
        received=Record(received, request.record.values),
        memory=memory,
        loss=setting.loss,
        criterion=criterion(setting.loss, own, everyone, round / setting.config.rounds),
        batches=_batches(setting, data, client, round),
        generator=lambda purpose: client_generator(seed, client, purpose, round),
        supervision=data.supervision,
        where=data.where,
    )


def _batches(setting: Setting, data: ClientData, client: int, round: int) -> Callable[..., Loader]:
    seed = client_generator(setting.config.seed, client, "batches", round).initial_seed()

    def batches(
        epoch: int, *, augmented: bool = True, sampling: Sampling = setting.config.sampling,
        indices: Tensor | None = None, masks: Tensor | None = None,
    ) -> Loader:  # fmt: skip
        if sampling == "balanced" and augmented and indices is None:
            rng = client_generator(setting.config.seed, client, f"balanced {epoch}", round)
            indices = balanced_indices(data.train.labels, len(data.train), rng)
        images = data.train if indices is None else data.train.subset(indices)
        if masks is not None:
            images = replace(images, masks=ArrayImages(masks))
        made = Batches(
            images, setting.normalization, batch_size=setting.config.batch_size,
            shuffle=augmented, augment=setting.augment if augmented else None, seed=seed,
        )  # fmt: skip
        made.set_epoch(epoch)
        return made

    return batches


def _evaluations(setting: Setting, data: ClientData, request: Request) -> dict[str, Any]:
    """Return what a reply says of the network as it is now, if the request asks for it."""
    if not request.record.values.get("evaluate") or setting.config.privacy is not None:
        return {}
    counts = setting.counts(data.train)
    measured = dict(enumerate(data.pooled)) or {request.client: data}
    return {"evaluations": {str(k): _evaluate(setting, d, counts) for k, d in measured.items()}}


def _evaluate(setting: Setting, data: ClientData, counts: Tensor) -> dict[str, Any]:
    """Return metrics of the client's model on its own validation and test images."""
    views = setting.method.views("client")
    found = {}
    for part, images in (("val", data.val), ("test", data.test)):
        if images is not None and len(images):
            batches = {0: setting.test_batches(images)}
            found[part] = evaluate(
                setting.network, views, batches, counts, adjust=setting.config.adjust
            )
    return found
