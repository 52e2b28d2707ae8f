"""A plugin that adds one scorer to moediff: `pip install .`, then name it in a recipe."""

import attrs
import torch

import moediff


@attrs.frozen
class Deepest:
    """Keep the units that come last in the network."""

    power: float = attrs.field(default=1.0, validator=attrs.validators.gt(0))

    def score(
        self, expert: moediff.Subject, task: moediff.Task, run: moediff.Run
    ) -> moediff.Scores:
        """Score units (U,) by their place in network order."""
        return moediff.Scores(torch.arange(1.0, len(expert.anatomy.units) + 1) ** self.power)


@moediff.hookimpl
def scorers() -> dict[str, type]:
    """What this plugin offers, by name."""
    return {"deepest": Deepest}
