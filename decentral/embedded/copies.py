"""A float32 copy of the user's model and of the running means of its optimiser: what a rule reads and changes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from decentral.embedded import tensors
from decentral.embedded.means import Means
from decentral.embedded.site import Site
from decentral.errors import TaskError
from decentral.replica import norms_of
from decentral.state import laid_out

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Copy:
    """`params` `[P]` float32, and `means[name]` `[P]` float32 once somebody has asked for them; both on `device`.

    On ranks of the site that do not speak they are None, and those take part in gathering and scattering alone. Only
    the thread of the training loop calls anything here, on all ranks of the site alike.

    Raises `TaskError` for a model without trainable parameters, for one of another dtype than float32, bfloat16 and
    float16, for one that the first FSDP has sharded, and for an optimiser that steps none of the model's parameters.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, site: Site, device: torch.device | None = None) -> None:
        trainable = {name: value for name, value in model.named_parameters() if value.requires_grad}
        _require(model, trainable)
        self.optimiser = Means(optimizer)
        self._site, self._parameters = site, list(trainable.values())
        if not any(self.optimiser.holds(parameter) for parameter in self._parameters):
            raise TaskError(
                "attach: the optimizer has none of the model's trainable parameters; make it after the model is where "
                "it will train (moved, compiled, sharded), from that model's parameters()"
            )
        self.layout = laid_out({name: tuple(parameter.shape) for name, parameter in trainable.items()})
        self._device = device or self._parameters[0].device
        self.params = self._vector()
        self.means: dict[str, Tensor | None] = {}
        self.norms = norms_of(model)

    def gather(self) -> None:
        """Copy the model's parameters, and the running means that were asked for."""
        for parameter, flat in self._parts(self.params):
            tensors.read(parameter, flat)
        for name in self.means:
            self._gather_means(name)

    def look(self, name: str) -> None:
        """Copy the running mean of that name, now and whenever the parameters are."""
        self.means[name] = self._vector()
        self._gather_means(name)

    @torch.no_grad()
    def scatter(self) -> None:
        """Write back, in place, what is different from what the model has, and the running means likewise."""
        for parameter, flat in self._parts(self.params):
            tensors.write(parameter, flat, self._site)
        for name, means in self.means.items():
            for parameter, flat in self._parts(means):
                if self._site.same([flat is not None and bool(flat.any())])[0]:
                    self.optimiser.begin(parameter)
                if self.optimiser.holds(parameter):
                    tensors.write(self.optimiser.of(parameter, name), flat, self._site)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all running means that the optimiser keeps."""
        kept = self.optimiser.observed()
        return (*kept.momenta, *kept.variances)

    @property
    def inner_steps(self) -> int:
        """Steps that the optimiser believes it has done; 0 if it does not count them."""
        return self.optimiser.steps(self._parameters)

    def set_inner_steps(self, steps: int) -> None:
        self.optimiser.set_steps(self._parameters, steps)

    def _gather_means(self, name: str) -> None:
        for parameter, flat in self._parts(self.means[name]):
            tensors.read(self.optimiser.of(parameter, name), flat)

    def _parts(self, vector: Tensor | None) -> list[tuple[nn.Parameter, Tensor | None]]:
        spans = [(entry.start, entry.stop) for entry in self.layout.entries]
        return [
            (parameter, None if vector is None else vector[start:stop])
            for parameter, (start, stop) in zip(self._parameters, spans, strict=True)
        ]

    def _vector(self) -> Tensor | None:
        return torch.zeros(self.layout.size, device=self._device) if self._site.speaks else None


def _require(model: nn.Module, trainable: dict[str, nn.Parameter]) -> None:
    # By name: importing the class takes a second. Its parameters are shards that do not say so.
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise TaskError("attach: the model is sharded by FullyShardedDataParallel; shard it by fully_shard (FSDP2)")
    if not trainable:
        raise TaskError("attach: the model has no trainable parameters")
    for name, parameter in trainable.items():
        if parameter.dtype not in DTYPES:
            raise TaskError(
                f"attach: parameter '{name}' is {parameter.dtype}; trainable parameters must be float32, bfloat16 or "
                "float16"
            )
