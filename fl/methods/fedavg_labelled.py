"""FedAvg on the clients with masks alone: what the others add must show against it.

The others sit every round out; their test images count in the evaluation all the same.
"""

from fl.method import LEVELS, Client, Method, SitsOut


class LabelledClient(Client):
    """Plain training, where there are masks."""

    def start(self) -> None:
        """Sit out without masks."""
        if self.context.supervision != "pixel":
            raise SitsOut("it has no masks, and only clients with masks train")


class FedAvgLabelled(Method):
    """FedAvg with another client."""

    client_type = LabelledClient
    tasks = ("segmentation",)
    supervision = LEVELS
