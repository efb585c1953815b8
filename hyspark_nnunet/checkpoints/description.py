"""The description of a network that its checkpoints hold."""

import json
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from hyspark_nnunet.checkpoints.heads import head_labels
from hyspark_nnunet.checkpoints.storage import plain


def describe_network(
    configuration: ConfigurationManager,
    dataset_json: dict[str, Any],
    sizes: dict[str, Any],
    input_channels: int,
    with_heads: bool,
    names: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Describes a network by numbers, strings and lists, which checkpoints and JSON hold.

    Args:
        configuration: of the plan.
        dataset_json: of the dataset.
        sizes: of the network, by name.
        input_channels: of the network.
        with_heads: whether the network has heads for the dataset's labels.
        names: further entries, such as the dataset's name.
    """
    description = {
        "input_channels": input_channels,
        "channel_names": dataset_json.get("channel_names"),
        "patch_size": configuration.patch_size,
        **sizes,
        **(names or {}),
    }
    if with_heads:
        description["labels"], description["regions"] = head_labels(dataset_json["labels"])
    # lists instead of tuples, so that the description read from JSON is equal
    return json.loads(json.dumps(plain(description)))
