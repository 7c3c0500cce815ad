"""One rank of a sharded training run: FSDP writes its optimizer state, and a plain run its V, into a folder.

    python sharded_training.py RANK RANKS PORT FOLDER

Every rank sees the same batch, so that the sharded runs and the plain one take the same steps.
"""

import os
import sys
from pathlib import Path

import torch
from conftest import make_examples, make_llama
from torch import distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import StateDictType, fully_shard

STEPS = 3
BETAS = (0.9, 0.99)


def make_model():
    torch.manual_seed(0)
    return make_llama()


def train(model):
    ids = torch.tensor([example["input_ids"] for example in make_examples((12, 12))])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=BETAS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return optimizer


def main(rank, ranks, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    distributed.init_process_group("gloo", rank=int(rank), world_size=int(ranks))
    folder = Path(folder)

    model = make_model()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = train(model)
    states = {
        "fsdp2-sharded": get_optimizer_state_dict(model, optimizer),
        "fsdp2-full": get_optimizer_state_dict(
            model, optimizer, options=StateDictOptions(full_state_dict=True)
        ),
    }
    model = FSDP(make_model(), use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = train(model)
    for kind in (StateDictType.SHARDED_STATE_DICT, StateDictType.FULL_STATE_DICT):
        with FSDP.state_dict_type(model, kind):
            name = kind.name.split("_")[0].lower()
            states[f"fsdp1-{name}"] = FSDP.optim_state_dict(model, optimizer)

    # Where accelerate, and with it transformers' Trainer, writes them.
    for name, state in states.items():
        if name.endswith("sharded"):
            checkpoint.save({"optimizer": state}, checkpoint_id=folder / name / "optimizer_0")
        elif rank == "0":
            (folder / name).mkdir()
            torch.save(state, folder / name / "optimizer.bin")
    if rank == "0":
        model = make_model()
        kept = train(model).state
        torch.save({name: kept[p]["exp_avg_sq"] for name, p in model.named_parameters()}, folder / "plain.pt")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
