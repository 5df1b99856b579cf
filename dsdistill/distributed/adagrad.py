"""Implement AdaGrad for DeepSpeed."""

import torch


class AdaGrad(torch.optim.Optimizer):
    """AdaGrad (Duchi et al. 2011) equals torch.optim.Adagrad with its defaults; weight decay is added to the gradient.

    DeepSpeed recreates every torch.optim.Adagrad with all parameters in one group, and then looks for the other groups:
    a model with more than one group would crash in its first step.
    """

    def __init__(self, params, lr: float, weight_decay: float = 0.0, eps: float = 1e-10):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "eps": eps})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                if not state:
                    state["sum"] = torch.zeros_like(parameter)
                gradient = parameter.grad.add(parameter, alpha=group["weight_decay"])
                state["sum"].addcmul_(gradient, gradient)
                parameter.addcdiv_(gradient, state["sum"].sqrt().add_(group["eps"]), value=-group["lr"])
