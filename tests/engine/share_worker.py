"""Train by a config and print, as JSON, the teacher's share in the features that the student gets at every step.

python share_worker.py CONFIG.yaml
"""

import json

from dsdistill.distributed import deepspeed
from dsdistill.distributed.leave import leave
from dsdistill.models.domain_fusion import DomainFusion
from tests.engine.worker import run_all, start

if __name__ == "__main__":
    configs, ranks = start()
    prepare, shares, taken = DomainFusion.prepare, [], []

    def watched(fusion, teacher, chance):
        found = prepare(fusion, teacher, chance)
        if fusion.training:
            shares.append(fusion.share)
            taken.append(fusion._given[1].float().mean().item())  # share of the examples
        return found

    DomainFusion.prepare = watched
    try:
        run_all(configs, ranks)
    finally:
        deepspeed.stop()
    print(json.dumps({"shares": shares, "taken": taken}), flush=True)
    leave()
