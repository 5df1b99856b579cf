"""Choose the learning rate and weight decay of each parameter."""

from collections.abc import Iterable

from torch import nn

from dsdistill.config.schema import Config


def parameter_groups(
    module: nn.Module, terms: Iterable[nn.Parameter], config: Config, rate: float
) -> list[dict]:
    """Return the optimizer's groups of the trained parameters of `module`, in order; none is empty.

    terms: parameters of the objective, which may have a learning rate of their own; rate: that of all others.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    mine = {id(parameter) for parameter in terms}
    groups = [
        {
            "params": [p for p in trained if (id(p) in mine) == own and _is_matrix(p) == matrices],
            "weight_decay": decay,
            "lr": lr,
        }
        for own, lr in ((False, rate), (True, config.train.projector_learning_rate or rate))
        for matrices, decay in ((True, config.train.weight_decay), (False, 0.0))  # none on biases and norms
    ]
    return [group for group in groups if group["params"]]


def _is_matrix(parameter: nn.Parameter) -> bool:
    return len(getattr(parameter, "ds_shape", parameter.shape)) > 1  # ds_shape: whole shape if sharded
