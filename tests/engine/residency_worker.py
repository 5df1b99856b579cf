"""Count, on every rank, the teacher's parameters that are whole at each moment of a forward pass.

deepspeed --num_gpus 2 residency_worker.py CONFIG.yaml OUT.json
"""

import json
import sys

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from dsdistill.config import load
from dsdistill.data import evaluation_batches
from dsdistill.distributed import deepspeed
from dsdistill.distributed.leave import leave
from dsdistill.engine.prepare import prepare
from dsdistill.engine.teacher import LazyTeacher
from dsdistill.models.capture import layer_list

if __name__ == "__main__":
    config_path, out = sys.argv[-2:]
    ranks = deepspeed.start()
    try:
        prepared = prepare(load([config_path]), ranks.world_size)
        loaded = LazyTeacher(prepared.config, prepared.teacher, prepared.objectives, ranks)
        teacher = loaded.tracer(prepared.objectives)
        parameters = list(teacher.model.parameters())
        whole = []

        def count(*_):
            live = sum(p.ds_numel for p in parameters if p.ds_status == ZeroParamStatus.AVAILABLE)
            whole.append(live)

        for module in teacher.model.modules():
            module.register_forward_pre_hook(count)
            module.register_forward_hook(count)
        pad = prepared.tokenizer.pad_token_id
        for batch in evaluation_batches(prepared.data.dev, 4, ranks.world_size, ranks.rank, pad):
            with teacher.frozen(batch):
                count()
        count()
        found = {
            "most": max(whole),
            "after": whole[-1],
            "shard": sum(p.ds_tensor.numel() for p in parameters),
            "all": sum(p.ds_numel for p in parameters),
            "layer": max(sum(p.ds_numel for p in layer.parameters()) for layer in layer_list(teacher.model)),
            "largest": max(p.ds_numel for p in parameters),
        }
        everyone = ranks.gather(found)
        if ranks.first:
            with open(out, "w") as file:
                json.dump(everyone, file)
        torch.distributed.barrier()
    finally:
        deepspeed.stop()
    leave()
