"""Plans as nnU-Net writes them, as far as a trainer reads them."""

from typing import Any

DATASET = "Dataset007_Nothing"
DATASET_JSON = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "organ": 1},
    "numTraining": 1,
    "file_ending": ".nii.gz",
}


def make_plans(patch_size: list[int], strides: list, kernel_sizes: list | None = None, **more) -> dict:
    """A plan as nnU-Net writes it, as far as a trainer reads it."""
    dims = len(patch_size)
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": len(strides),
            "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
            "strides": strides,
            "kernel_sizes": kernel_sizes or [[3] * dims] * len(strides),
        },
        "_kw_requires_import": ["conv_op"],
    }
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "batch_size": 2,
        "patch_size": patch_size,
        "spacing": [1.0] * dims,
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "architecture": architecture,
        "batch_dice": True,
        **more,
    }
    return {
        "dataset_name": DATASET,
        "plans_name": "nnUNetPlans",
        "configurations": {"3d_fullres": configuration},
        "label_manager": "LabelManager",
        "continue_training": False,
    }


REQUIRING_IMPORT = ("conv_op", "norm_op", "dropout_op", "nonlin")


def network_arguments(dims: int, n_stages: int, norm: str = "InstanceNorm") -> dict[str, Any]:
    """What plans say of each of nnU-Net's networks, beside its sizes."""
    return {
        "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
        "n_conv_per_stage_decoder": [1] * (n_stages - 1),
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.{norm.lower()}.{norm}{dims}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }


CUBIC = [[1, 1, 1]] + [[2, 2, 2]] * 3


def plans_of(kind: str, n_stages: int = 3) -> dict:
    """Plans of nnU-Net with one of its own networks and every argument of it."""
    plans = make_plans([16, 16, 16], CUBIC[:n_stages])
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    architecture["network_class_name"] = f"dynamic_network_architectures.architectures.unet.{kind}"
    architecture["arch_kwargs"] |= {
        "features_per_stage": [4, 6, 8, 8][:n_stages],
        "n_conv_per_stage" if kind == "PlainConvUNet" else "n_blocks_per_stage": [1, 2, 1, 1][:n_stages],
        **network_arguments(3, n_stages),
    }
    architecture["_kw_requires_import"] = [*REQUIRING_IMPORT]
    return plans
