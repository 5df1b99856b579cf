"""AdaGrad that DeepSpeed can take apart; whole runs with it are in test_elastic."""

import torch

from dsdistill.distributed.adagrad import AdaGrad


def test_steps_as_torchs():
    torch.manual_seed(0)
    start, gradients = torch.randn(5), torch.randn(4, 5)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    for parameter, kind in ((ours, AdaGrad), (theirs, torch.optim.Adagrad)):
        optimizer = kind([{"params": [parameter], "weight_decay": 0.1}], lr=0.3)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
    assert not torch.allclose(ours, start)
    torch.testing.assert_close(ours, theirs)
