"""What a checkpoint says of its network, for people and for transfers."""

import json
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from hyspark_nnunet.architectures.from_plans import encoder_arguments
from hyspark_nnunet.checkpoints.heads import head_labels
from hyspark_nnunet.checkpoints.storage import plain


def describe_network(
    configuration: ConfigurationManager,
    dataset_json: dict[str, Any],
    preset: str,
    input_channels: int,
    with_heads: bool,
    names: dict[str, str] | None = None,
) -> dict[str, Any]:
    """The description of a network: numbers, strings and lists of them.

    Args:
        configuration: of the plan.
        dataset_json: of the data set.
        preset: of the recipe.
        input_channels: of the network.
        with_heads: the network has heads for the data set's labels.
        names: more to say, such as the data set's name.
    """
    arguments = encoder_arguments(configuration, preset)
    del arguments["conv_op"]
    description = {
        "preset": preset,
        "input_channels": input_channels,
        "channel_names": dataset_json.get("channel_names"),
        "patch_size": configuration.patch_size,
        **arguments,
        **(names or {}),
    }
    if with_heads:
        description["labels"], description["regions"] = head_labels(dataset_json["labels"])
    # lists, no tuples: what JSON gives back, in plans and .safetensors files, is equal then
    return json.loads(json.dumps(plain(description)))
