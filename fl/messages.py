"""Records as Flower's messages hold them."""

import json

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fl.record import Record

TYPES = {
    "hello": "query.hello",
    "counts": "query.counts",
    "collect": "query.collect",
    "train": "train",
    "adapt": "train.adapt",
    "own": "train.own",
}
"""Kind of a request: type of its message."""


def packed(record: Record, place: str = "") -> RecordDict:
    """Return a record as Flower's: an ArrayRecord a group, and the values as JSON.

    Args:
        record: what is to be held.
        place: what the names begin with, where one RecordDict has several records.
    """
    found = RecordDict(
        {f"{place}tensors:{n}": ArrayRecord(tensors) for n, tensors in record.tensors.items()}
    )
    found[f"{place}values"] = ConfigRecord({"json": json.dumps(record.values)})
    return found


def unpacked(content: RecordDict, place: str = "") -> Record:
    """Return such a message's record."""
    start = f"{place}tensors:"
    tensors = {
        name.removeprefix(start): dict(arrays.to_torch_state_dict())
        for name, arrays in content.array_records.items()
        if name.startswith(start)
    }
    return Record(tensors, json.loads(str(content[f"{place}values"]["json"])))
