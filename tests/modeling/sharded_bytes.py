"""Prints the bytes of weights, gradients and optimizer state that a process holds after a step, for each sharding.

Arguments: the folder of a model's config, then the shardings. Started as torchrun starts a process, without a GPU.
"""

import json
import sys

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

IDS = torch.zeros((1, 8), dtype=torch.int64)


def of_fsdp2(model):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in (*model.model.layers, model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters())
    model(IDS).logits.sum().backward()
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    grads = [value.grad for value in model.parameters()]
    return [sum(value.to_local().nbytes for value in values) for values in (model.parameters(), grads, states)]


def of_zero(model, stage):
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    engine, optimizer, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config
    )
    engine.backward(engine(IDS).logits.sum())
    of_stage_3 = stage == 3
    weights = [value.ds_tensor if of_stage_3 else value for value in model.parameters()]
    if of_stage_3:
        grads = list(optimizer.averaged_gradients.values())
    else:
        grads = list(optimizer.averaged_gradients.values()) if stage == 2 else [[w.grad for w in model.parameters()]]
    grads = [value for values in grads for value in values if value is not None]
    engine.step()
    master = optimizer.fp32_partitioned_groups_flat if of_stage_3 else optimizer.single_partition_of_fp32_groups
    states = [value for state in optimizer.state.values() for value in state.values() if getattr(value, "ndim", 0)]
    return [sum(value.nbytes for value in values) for values in (weights, grads, (*master, *states))]


if __name__ == "__main__":
    folder, *shardings = sys.argv[1:]
    torch.distributed.init_process_group("gloo")
    for sharding in shardings:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
        sizes = of_fsdp2(model) if sharding == "fsdp2" else of_zero(model, int(sharding.removeprefix("zero")))
        print(json.dumps({sharding: sizes}), flush=True)
