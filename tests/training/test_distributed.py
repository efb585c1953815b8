"""Several processes: what a trainer does as one of them, and DDP's gradients of real ones."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from torch.torch_version import TorchVersion

from hyspark_nnunet.architectures import HySparKMaskedAutoencoder
from hyspark_nnunet.masking import sample_visible
from hyspark_nnunet.train import leave
from hyspark_nnunet.training.hyspark import HySparKFinetuneTrainer, HySparKPretrainTrainer
from hyspark_nnunet.training.loss import reconstruction_loss
from hyspark_nnunet.training.runtime.ranks import any_rank, maximum_over_ranks
from tests.nnunet_plans import CUBIC, make_plans
from tests.small_networks import small_arguments
from tests.training.conftest import make_trainer

ARGUMENTS = small_arguments(features_per_stage=(4, 6, 12), n_blocks_per_stage=(1, 1, 1), decoder_width=12)


def _one_rank(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    assert any_rank(rank == 1) and not any_rank(False)
    assert maximum_over_ranks(torch.tensor(float(rank))) == 1
    torch.manual_seed(0)
    network = HySparKMaskedAutoencoder(**ARGUMENTS).double().eval()
    network.compile_encoder(backend="aot_eager")  # traced and differentiated by the compiler, without generating C++
    wrapped = DistributedDataParallel(network)
    image, visible = torch.load(f"{folder}/batch.pt")
    for _ in range(2):  # a parameter without gradient would stop the second step
        network.zero_grad()
        part = slice(rank, rank + 1)
        reconstruction_loss(wrapped(image[part], visible[part], 2), image[part], visible[part]).backward()
    torch.save({n: p.grad for n, p in network.named_parameters()}, f"{folder}/gradients_{rank}.pt")
    dist.destroy_process_group()
    # with DDP's wrapper still there: freed here, it may wait for a thread of gloo that waits for the interpreter
    leave()


def test_two_processes_have_the_gradient_of_the_joint_batch(tmp_path: Path) -> None:
    """Real processes over gloo, DDP without the search for unused parameters; BatchNorm in eval, float64."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(2, 1, 8, 8, 8, generator=generator, dtype=torch.float64)
    visible = sample_visible(2, (2, 2, 2), 0.75, generator)
    torch.save((image, visible), tmp_path / "batch.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_one_rank, args=(port, str(tmp_path)), nprocs=2)
    torch.manual_seed(0)
    network = HySparKMaskedAutoencoder(**ARGUMENTS).double().eval()
    reconstruction_loss(network(image, visible), image, visible).backward()
    first, second = (torch.load(tmp_path / f"gradients_{rank}.pt") for rank in range(2))
    for name, parameter in network.named_parameters():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], parameter.grad, rtol=1e-8, atol=1e-8)


@torch._dynamo.config.patch(optimize_ddp=True)  # restored afterwards
@pytest.mark.parametrize("trainer_class", [HySparKPretrainTrainer, HySparKFinetuneTrainer])
def test_of_a_network_with_batchnorm_several_gpus_compile_the_encoder(
    trainer_class, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("nnUNet_compile", raising=False)
    monkeypatch.setattr("torch.compile", lambda part, **_: ("compiled", part))
    trainer = make_trainer(trainer_class, make_plans([16, 16, 16], CUBIC, hyspark={"preset": "S"}))
    built = trainer_class.build_network_architecture(trainer.plans_manager, trainer.configuration_manager, 1, 2)
    trainer.device = torch.device("cuda")  # nnU-Net compiles nowhere else

    def compiled() -> torch.nn.Module:
        trainer.network = built
        trainer.compile_network()
        return trainer.network

    assert compiled() == ("compiled", built)
    trainer.is_ddp = True
    assert compiled() == ("compiled", built)  # torchrun with one process
    monkeypatch.setattr("hyspark_nnunet.training.distributed.world_size", lambda: 2)
    if trainer_class is HySparKFinetuneTrainer:  # without BatchNorm
        for version, divided in (("2.6.0", True), ("2.5.1", False)):
            monkeypatch.setattr("torch.__version__", TorchVersion(version))
            assert compiled() == ("compiled", built)
            assert torch._dynamo.config.optimize_ddp == divided  # earlier versions divide no graph with recomputation
        return
    assert compiled() is built and built.encode[0] == "compiled" and not torch._dynamo.config.optimize_ddp
    # BatchNorm in the encoder, as a plan may ask for
    built = trainer_class.build_network_architecture(trainer.plans_manager, trainer.configuration_manager, 1, 2)
    built.encoder.norm = torch.nn.BatchNorm3d(4)
    assert compiled() is built and not isinstance(built.encode, tuple)


def test_synchronised_norms_have_a_group_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """In DDP's group, their exchanges wait for the gradients that are sent at the same time."""
    trainer = make_trainer(HySparKPretrainTrainer, make_plans([16, 16, 16], CUBIC, hyspark={"preset": "S"}))
    trainer.network = torch.nn.Sequential(torch.nn.BatchNorm3d(2))
    trainer.device, trainer.batch_size = torch.device("cuda", 0), 2
    group = object()
    monkeypatch.setattr("torch.distributed.new_group", lambda: group)
    monkeypatch.setattr("torch.distributed.get_backend", lambda: "nccl")
    monkeypatch.setattr(
        "hyspark_nnunet.training.distributed.DistributedDataParallel", lambda network, device_ids: network
    )
    trainer.distribute_network()
    assert trainer.network[0].process_group is group


def test_who_writes_and_who_draws_what_does_not_follow_from_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net's developers are about to make ``local_rank`` the rank on the machine: 0 for the third of four here."""
    trainer = make_trainer(HySparKPretrainTrainer, make_plans([16, 16, 16], CUBIC, hyspark={"preset": "S"}))
    trainer.network = trainer.build_network_architecture(trainer.plans_manager, trainer.configuration_manager, 1, 2)
    trainer.reset_optimizer()
    trainer.num_input_channels = 1

    def mask_and_file(rank: int, local_rank: int) -> tuple[torch.Tensor, bool]:
        monkeypatch.setattr("hyspark_nnunet.training.loop.global_rank", lambda: rank)
        trainer.local_rank = local_rank
        trainer.on_train_epoch_start()
        file = Path(trainer.output_folder, f"checkpoint_{rank}_{local_rank}.pth")
        trainer.save_checkpoint(str(file))
        return sample_visible(2, trainer.grid, 0.75, trainer.mask_generator), file.exists()

    first, third = mask_and_file(0, local_rank=1), mask_and_file(2, local_rank=0)
    assert first[1] and not third[1]
    assert not torch.equal(first[0], third[0])
    assert torch.equal(third[0], mask_and_file(2, local_rank=1)[0])
