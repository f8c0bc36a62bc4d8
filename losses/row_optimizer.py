"""Makes an ordinary torch optimiser step only the rows of a parameter that have a gradient."""

import torch


class RowOptimizer:
    """Makes `optimizer` update only the rows of `parameter` that are in its sparse gradient.

    During `optimizer.step()` the parameter is replaced by those rows, with their gradient and their rows of every state
    tensor of the parameter's shape (momentum_buffer, exp_avg, exp_avg_sq, ...); afterwards rows and state are copied
    back. So an untouched row keeps its value and state bit for bit: no weight decay, no momentum drift. Any elementwise
    optimiser works (SGD, Adam, AdamW, ...; foreach and fused, too), with gradient scalers and with gradients
    accumulated over several backwards (the union of their rows). Outside a step `optimizer.state_dict()` has full size
    and loads into any optimiser.

    Other state is shared by all rows: Adam's bias correction counts the optimiser's steps, not a row's. Per-row state
    starts as zeros, so with SGD's `dampening` a row's first momentum is (1 - dampening) * gradient; torch's SGD uses
    the gradient itself.

    A dense gradient (a loss that used all rows) is left to the optimiser: every row takes part in that step.

    Raises ValueError if `optimizer` does not have `parameter`; `optimizer.step(closure)` raises RuntimeError, because
    the rows must be known before the step.
    """

    def __init__(self, optimizer, parameter):
        self.parameter = parameter
        self.rows = self.part = self.state = None
        self._params(optimizer)
        optimizer.register_step_pre_hook(self._take_rows)
        optimizer.register_step_post_hook(self._put_back)

    def _params(self, optimizer):
        """The param group's list that has the parameter, and its position."""
        for group in optimizer.param_groups:
            for position, parameter in enumerate(group["params"]):
                if parameter is self.parameter:
                    return group["params"], position
        raise ValueError("the optimiser does not have the parameter: build it from parameters() first")

    def _is_table(self, value):
        return torch.is_tensor(value) and value.shape == self.parameter.shape

    @torch.no_grad()
    def _take_rows(self, optimizer, args, kwargs):
        gradient = self.parameter.grad
        if gradient is None or not gradient.is_sparse:
            return
        if kwargs.get("closure") is not None or any(callable(arg) for arg in args[1:]):  # args[0] is the optimiser
            raise RuntimeError("a closure cannot be used with sampled classes: call backward before step()")
        gradient = gradient.coalesce()
        self.rows = gradient.indices()[0]
        self.part = torch.nn.Parameter(self.parameter[self.rows])
        self.part.grad = gradient.values()
        self.state = optimizer.state.pop(self.parameter, {})
        if self.state:
            optimizer.state[self.part] = {
                key: value[self.rows] if self._is_table(value) else value for key, value in self.state.items()
            }
        params, position = self._params(optimizer)
        params[position] = self.part

    @torch.no_grad()
    def _put_back(self, optimizer, args, kwargs):
        if self.part is None:
            return
        for params in (group["params"] for group in optimizer.param_groups):
            for position, parameter in enumerate(params):
                if parameter is self.part:
                    params[position] = self.parameter
        self.parameter[self.rows] = self.part
        for key, value in optimizer.state.pop(self.part, {}).items():
            if torch.is_tensor(value) and value.shape == self.part.shape:
                if not self._is_table(self.state.get(key)):
                    self.state[key] = torch.zeros_like(self.parameter, dtype=value.dtype)
                self.state[key][self.rows] = value
            else:
                self.state[key] = value
        if self.state:
            optimizer.state[self.parameter] = self.state
        self.rows = self.part = self.state = None
